// A row's end: what its cells left, its KL, and the Jacobian of Normalize, in one pass over its gradient.
#pragma once

#include "embeddings.h"

namespace m2d::cpu {

// What the cells of a layer leave for the gradient of one row; see math.h.
template <class Product>
struct CellTerms {
  const Product* products;  // (D,) sum_j X_c delta_j, for the used prefixes
  const double* weighted;   // sum G gamma i_k, both of the other side; element k at [k * stride]
  const double* cosines;    // sum G C
  int64_t stride;
};

template <class T>
class RowGradient {
 public:
  explicit RowGradient(const Embeddings<T>& embeddings)
      : e_(embeddings),
        p_(embeddings.params()),
        wants_grad_(p_.pooled_grad.data != nullptr),
        has_kl_(std::any_of(p_.kl_weights, p_.kl_weights + p_.num_layers,
                            [](double v) { return v != 0; })),
        teacher_(has_kl_ ? p_.num_texts * p_.dim : 0),
        teacher_lse_(has_kl_ ? p_.num_texts : 0),
        teacher_mean_(has_kl_ ? p_.num_texts : 0),
        kl_(has_kl_ ? p_.num_layers * p_.num_texts : 0) {}

  bool wants_grad() const { return wants_grad_; }
  bool has_kl() const { return has_kl_; }

  // Before any row is finished: z = E[L-1] / tau, q = softmax(z), log sum exp z and sum q z, of texts [first, last).
  void compute_teacher(int64_t first, int64_t last) const {
    const Side<T> s = e_.texts(p_.num_layers - 1);
    const Buffer<double> p(p_.dim);
    for (int64_t n = first; n < last; ++n) {
      T* q = teacher_.get() + n * p_.dim;
      const double scaled = scaled_factor(s, n);
      const double shift = softmax_shift(s, n);
      const double sum = softmax_numerators(e_.row(s, n), scaled, shift, p_.dim, p.get());
      scale(p.get(), 1.0 / sum, p_.dim, q);
      teacher_lse_.get()[n] = shift + std::log(sum);
      teacher_mean_.get()[n] = expectation(q, e_.row(s, n), scaled, p_.dim);
    }
  }

  // Doubles that `finish` works in.
  int64_t scratch_size() const { return 2 * p_.dim; }

  // Row i of a side, in the cells of its layer or, where `cells` is nullptr, in none.
  template <class Product>
  void finish(const Side<T>& s, int64_t i, const CellTerms<Product>* cells, double* scratch) const {
    const bool learns = e_.is_pooled(s) && p_.kl_weights[s.layer] != 0;
    const KlTerms kl = learns ? learn(s, i, scratch) : KlTerms{};
    if (!wants_grad_) return;
    if (!p_.normalize) {
      collect(s, i, cells, kl, e_.grad_row(s, i));
      return;
    }
    double* grad = scratch + p_.dim;
    collect(s, i, cells, kl, grad);
    store(s, i, grad);
  }

  // The KL of each text of a layer (N,).
  const double* kl(int64_t l) const { return kl_.get() + l * p_.num_texts; }

 private:
  // The KL's gradient is coefficient (inverse_sum p - q), where p is not nullptr.
  struct KlTerms {
    const double* p = nullptr;
    const T* q = nullptr;
    double inverse_sum = 0, coefficient = 0;
  };

  // Factors from P to E, and to E / tau.
  double factor(const Side<T>& s, int64_t i) const {
    return p_.normalize ? e_.full_inverse(s, i) : 1.0;
  }
  double scaled_factor(const Side<T>& s, int64_t i) const {
    return factor(s, i) / p_.kl_temperature;
  }

  // What is taken off E / tau before it is raised: its largest element, or where that saves a pass its norm, which is
  // no smaller, and so small that nothing underflows.
  double softmax_shift(const Side<T>& s, int64_t i) const {
    constexpr double kSafeNorm = 300;  // exp(-2 * 300) is a normal number
    const double norm = scaled_factor(s, i) / e_.full_inverse(s, i);
    return norm < kSafeNorm ? norm : max_scaled(e_.row(s, i), scaled_factor(s, i), p_.dim);
  }

  // KL of one row; exp(E / tau), unnormalised, into p.
  KlTerms learn(const Side<T>& s, int64_t i, double* p) const {
    const int64_t n = s.first + i;
    const T* q = teacher_.get() + n * p_.dim;
    const double shift = softmax_shift(s, i);
    const SoftmaxSums sums =
        softmax_numerators(e_.row(s, i), scaled_factor(s, i), shift, q, p_.dim, p);
    kl_.get()[s.layer * p_.num_texts + n] =
        kl_divergence(teacher_mean_.get()[n] - sums.expected, teacher_lse_.get()[n],
                      shift + std::log(sums.total));
    return {p, q, 1.0 / sums.total,
            p_.kl_weights[s.layer] / (static_cast<double>(p_.num_texts) * p_.kl_temperature)};
  }

  // dE = (X delta + alpha c - rho u) / f + V / (N tau) (softmax(E / tau) - q), chunk by chunk; see math.h.
  template <class Product, class Out>
  void collect(const Side<T>& s, int64_t i, const CellTerms<Product>* cells, const KlTerms& kl,
               Out* grad) const {
    const int64_t used = cells == nullptr ? 0 : e_.used_dims(s.layer);
    const double full = e_.full_inverse(s, i);
    const double to_rows = p_.normalize ? 1.0 : full;  // from u to E, or on to P
    double alpha = 0;
    double rho = 0;
    for (int64_t k = used - 1; k >= 0; --k) {
      if (e_.weight(s.layer, k) != 0) {
        alpha += e_.prefix_inverse(s, k)[i] * cells->weighted[k * cells->stride];
        rho += e_.prefix_gradient(s, k)[i] * cells->cosines[k * cells->stride];
      }
      const int64_t begin = e_.chunk_begin(k);
      const Product* products = cells->products + begin;
      const double* center = e_.center(s.layer) + begin;
      const T* x = e_.row(s, i) + begin;
      if (kl.p == nullptr) {
        combine(products, alpha, center, rho * full, x, to_rows, e_.chunk_size(k), grad + begin);
      } else {
        combine_with_kl(products, alpha, center, rho * full, x, to_rows, kl.p + begin,
                        kl.inverse_sum, kl.q + begin, kl.coefficient, e_.chunk_size(k),
                        grad + begin);
      }
    }
    const int64_t reached = used == 0 ? 0 : p_.dims[used - 1];
    if (kl.p == nullptr) {
      std::fill(grad + reached, grad + p_.dim, Out(0));
    } else {
      kl_gradients(kl.p + reached, kl.inverse_sum, kl.q + reached, kl.coefficient, p_.dim - reached,
                   grad + reached);
    }
  }

  // dP = (dE - <u, dE> u) / max(|P|, eps); where the norm is clamped E = P / eps, and only the factor remains.
  void store(const Side<T>& s, int64_t i, const double* grad) const {
    const T* x = e_.row(s, i);
    const double inverse = factor(s, i);
    const double along = is_clamped(inverse) ? 0.0 : inverse * inverse * dot(grad, x, p_.dim);
    store_gradient(grad, x, along, inverse, p_.dim, e_.grad_row(s, i));
  }

  const Embeddings<T>& e_;
  const LossParams<T>& p_;
  const bool wants_grad_;
  const bool has_kl_;
  const Buffer<T> teacher_;            // q (N, D)
  const Buffer<double> teacher_lse_;   // (N,)
  const Buffer<double> teacher_mean_;  // (N,)
  const Buffer<double> kl_;            // (L, N)
};

}  // namespace m2d::cpu
