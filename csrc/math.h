// Every formula of the loss, once, for host and device. Standard headers only.
//
// For layer l, prefix k (the first d_k of D dimensions), anchor i, candidate j:
//
//   E[l,n,:]   = P[l,n,:], or P / max(|P|, eps) where a Normalize follows the pooling
//   U[l,k,i,j] = <E[l,i,:d_k], E[l,j,:d_k]>           telescopes: U_k = U_{k-1} + chunk k's product
//   C[l,k,i,j] = U * ia_k[i] * ib_k[j],  ia_k[i] = 1 / max(|E[l,i,:d_k]|, eps)
//   S[l,k,i,j] = scale * C
//   Z[l,k,i,j] = S + h[i,j] * C                               h weighs hard candidates, C detached there
//   CE[l,k]    = mean_i ( logsumexp_j Z[l,k,i,j] - Z[l,k,i,t(i)] )
//   KL[l]      = mean_n KL( q[n] || softmax(E[l,n]/tau) ),  q[n] = softmax(E[L-1,n]/tau), detached
//   loss       = sum_{l,k} W[l,k] CE[l,k] + sum_l V[l] KL[l]
//
// h is 0 for the positive t(i), own_hardness for the candidates at its place in the other columns, hardness for
// all others.
//
// Gradient. With G_k = dloss/dC_k = W scale/B (softmax(Z_k) - onehot), C_k depends on the rows through
// the product and through both norms:
//
//   dC_k/dE[i] = ia_k ib_k[j] E[j,:d_k] - C_k ia_k^2 E[i,:d_k]        (second term 0 where clamped)
//
// Chunk c of the dimensions belongs to every prefix k >= c, so all its terms are suffix sums:
//
//   X_c  = sum_{k>=c} G_k ia_k ib_k                                   (B, M)
//   ra_c = sum_{k>=c} ia_k^2 rowsum(G_k C_k),   rb_c likewise with ib and colsum
//   dE[anchors, chunk c]    = X_c   E[candidates, chunk c] - ra_c E[anchors, chunk c]
//   dE[candidates, chunk c] = X_c^T E[anchors, chunk c]    - rb_c E[candidates, chunk c]
//
// Precision. X E - r E cancels where rows are nearly parallel, as those of early layers are, and U agrees
// with |E[i]| |E[j]| in most of its digits. Kernels that multiply in less than double therefore take rows
// apart, exactly or in double:
//
//   u[n] = E[n] / f[n] = gamma[n] c + delta[n],   f = |E|, so that nothing over- or underflows
//
// with a center c of the layer's rows and gamma = 1, or gamma = 0 where u without c is the shorter one in
// some prefix (2 <c, u>_k < |c_k|^2: a row of zeros, or one that points elsewhere). i_k = f / |E_k| takes
// the place of ia and ib, and only what is small is multiplied in low precision:
//
//   U_k[i,j] = <delta_i, delta_j>_k + gamma_i <c, u_j>_k + gamma_j (<c, u_i>_k - gamma_i |c_k|^2)
//   du[i, chunk c] = sum_j X_c delta_j + alpha_c c - ra_c u_i,    dE = du / f
//   alpha_c = sum_{k>=c} i_k[i] sum_j G_k i_k[j] gamma_j          likewise for the candidates
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define M2D_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define M2D_INLINE inline __attribute__((always_inline))
#else
#define M2D_INLINE inline
#endif

namespace m2d {

constexpr double kNormEps = 1e-12;  // torch.nn.functional.normalize's eps

// 1 / max(|x|, eps) from |x|^2.
template <class T>
M2D_INLINE T clamped_inverse_norm(T squared) {
  const T norm = std::sqrt(squared);
  return norm < static_cast<T>(kNormEps) ? static_cast<T>(1.0 / kNormEps) : 1 / norm;
}

// The norm is clamped, and so has no gradient, exactly where its inverse is 1 / eps, as T has it.
template <class T>
M2D_INLINE bool is_clamped(T inverse_norm) {
  return inverse_norm >= static_cast<T>(1.0 / kNormEps);
}

// exp(x) for x <= 0, branch-free so that a loop over it vectorises: 2^n exp(r), |r| <= ln(2) / 2, by the
// Taylor series to r^9 / 9! (relative error below 2^-36), which is for results that are stored as float, or to
// r^13 / 13! (below 2^-52). NaN stays NaN; the result never falls below the smallest normal number.
template <class T>
M2D_INLINE double exp_nonpositive(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  x = x < -708.0 ? -708.0 : x;
  const double shifted = x * 1.4426950408889634 + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 362880.0;
  if constexpr (std::is_same_v<T, double>) {
    double tail = 1.0 / 6227020800.0;
    tail = tail * r + 1.0 / 479001600.0;
    tail = tail * r + 1.0 / 39916800.0;
    tail = tail * r + 1.0 / 3628800.0;
    p = tail * r + p;
  }
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  // The low bits of `shifted` hold n; its bits plus the exponent's bias, shifted up, are those of 2^n.
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 1023) << 52;
  double two_to_n;
  std::memcpy(&two_to_n, &bits, sizeof(bits));
  return p * two_to_n;
}

// std::log1p(float) is not for the device.
M2D_INLINE float log_one_plus(float x) {
  return log1pf(x);
}
M2D_INLINE double log_one_plus(double x) {
  return log1p(x);
}

// logsumexp_j Z_j - Z_t. `target` is exp(Z_t - max), `gap` is max - Z_t >= 0: two non-negative terms.
template <class T>
M2D_INLINE T cross_entropy(T others, T target, T gap) {
  return gap == 0 ? log_one_plus(others) : std::log(others + target) + gap;
}

// KL(q || p) of one row = sum q (zt - z) - (lse_t - lse), z = E/tau of the student, zt of the teacher.
template <class T>
M2D_INLINE T kl_divergence(T expected_gap, T teacher_lse, T student_lse) {
  return expected_gap - (teacher_lse - student_lse);
}

}  // namespace m2d
