// The loops over one row of the loss, each compiled per vector level. All of it in double; T is what is stored.
#pragma once

#include <cstdint>
#include <limits>

#include "../math.h"
#include "simd.h"

namespace m2d::cpu {

template <class T>
M2D_MULTIVERSION double sum_of_squares(const T* __restrict x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

template <class T>
M2D_MULTIVERSION double dot(const double* __restrict x, const T* __restrict y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * static_cast<double>(y[i]);
  return sum;
}

template <class T>
M2D_MULTIVERSION void add(const T* __restrict x, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] += x[i];
}

template <class T, class Out>
M2D_MULTIVERSION void add_scaled(const T* __restrict x, double factor, int64_t n,
                                 Out* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] += factor * static_cast<double>(x[i]);
}

template <class T, class Out>
M2D_MULTIVERSION void scale(const T* __restrict x, double factor, int64_t n, Out* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Out>(factor * static_cast<double>(x[i]));
}

M2D_MULTIVERSION inline void scale_in_place(double factor, int64_t n, double* __restrict x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// out = inverse x - gamma center
template <class T, class Out>
M2D_MULTIVERSION void center_row(const T* __restrict x, double inverse,
                                 const double* __restrict center, double gamma, int64_t n,
                                 Out* __restrict out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<Out>(inverse * static_cast<double>(x[i]) - gamma * center[i]);
}

// out (width, rows) = rows (rows, width)^T. A few columns at a time, which stay in the first-level cache until all rows
// are in them, and four rows at a time, so that whole vectors are stored.
template <class T>
M2D_MULTIVERSION void transpose(const T* __restrict x, int64_t stride, int64_t rows, int64_t width,
                                int64_t out_stride, T* __restrict out) {
  constexpr int64_t kColumns = 64;
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t last = first + kColumns < width ? first + kColumns : width;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      const T* row = x + i * stride;
      for (int64_t d = first; d < last; ++d) {
        T* four = out + d * out_stride + i;
        four[0] = row[d];
        four[1] = row[d + stride];
        four[2] = row[d + 2 * stride];
        four[3] = row[d + 3 * stride];
      }
    }
    for (; i < rows; ++i) {
      for (int64_t d = first; d < last; ++d) out[d * out_stride + i] = x[i * stride + d];
    }
  }
}

// S_j = factor ib_j (products_j + gamma along_j + gamma_j along); returns max S.
template <class T>
M2D_MULTIVERSION double logits(const T* __restrict products, double gamma, double along,
                               const double* __restrict gamma_j, const double* __restrict along_j,
                               const double* __restrict ib, double factor, int64_t n,
                               double* __restrict s) {
  double max = -std::numeric_limits<double>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < n; ++j) {
    const double u = static_cast<double>(products[j]) + gamma * along_j[j] + gamma_j[j] * along;
    s[j] = factor * ib[j] * u;
    max = s[j] > max ? s[j] : max;
  }
  return max;
}

// e = exp(s - max)
template <class T>
M2D_MULTIVERSION void exponentials(const double* __restrict s, double max, int64_t n,
                                   double* __restrict e) {
  for (int64_t j = 0; j < n; ++j) e[j] = exp_nonpositive<T>(s[j] - max);
}

M2D_MULTIVERSION inline double sum(const double* __restrict x, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}

struct GradientSums {
  double weighted;  // sum G gamma_j ib_j
  double cosines;   // sum G C
};

// With G = coefficient e and C = S / scale: X = G ia ib, both sums along the row, and both down the columns.
template <class T>
M2D_MULTIVERSION GradientSums gradient_row(const double* __restrict e, const double* __restrict s,
                                           double ia, double gamma, const double* __restrict ib,
                                           const double* __restrict gamma_j, double coefficient,
                                           double inverse_scale, int64_t n, T* __restrict x,
                                           double* __restrict column_weighted,
                                           double* __restrict column_cosines) {
  double weighted = 0;
  double cosines = 0;
#pragma omp simd reduction(+ : weighted, cosines)
  for (int64_t j = 0; j < n; ++j) {
    const double g = coefficient * e[j];
    const double gc = g * (inverse_scale * s[j]);
    weighted += g * ib[j] * gamma_j[j];
    cosines += gc;
    column_weighted[j] += g * ia * gamma;
    column_cosines[j] += gc;
    x[j] = static_cast<T>(g * ia * ib[j]);
  }
  return {weighted, cosines};
}

template <class T>
M2D_MULTIVERSION double max_scaled(const T* __restrict x, double factor, int64_t n) {
  double max = -std::numeric_limits<double>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) {
    const double z = factor * static_cast<double>(x[i]);
    max = z > max ? z : max;
  }
  return max;
}

// p = exp(factor x - max), unnormalised; returns the sum.
template <class T>
M2D_MULTIVERSION double softmax_numerators(const T* __restrict x, double factor, double max,
                                           int64_t n, double* __restrict p) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    p[i] = exp_nonpositive<T>(factor * static_cast<double>(x[i]) - max);
    total += p[i];
  }
  return total;
}

struct SoftmaxSums {
  double total;     // sum p
  double expected;  // sum q factor x
};

// The same, beside a distribution q.
template <class T>
M2D_MULTIVERSION SoftmaxSums softmax_numerators(const T* __restrict x, double factor, double max,
                                                const T* __restrict q, int64_t n,
                                                double* __restrict p) {
  double total = 0;
  double expected = 0;
#pragma omp simd reduction(+ : total, expected)
  for (int64_t i = 0; i < n; ++i) {
    const double z = factor * static_cast<double>(x[i]);
    p[i] = exp_nonpositive<T>(z - max);
    total += p[i];
    expected += static_cast<double>(q[i]) * z;
  }
  return {total, expected};
}

// sum q factor x
template <class T>
M2D_MULTIVERSION double expectation(const T* __restrict q, const T* __restrict x, double factor,
                                    int64_t n) {
  double expected = 0;
#pragma omp simd reduction(+ : expected)
  for (int64_t i = 0; i < n; ++i)
    expected += static_cast<double>(q[i]) * (factor * static_cast<double>(x[i]));
  return expected;
}

// factor * (products + along_center * center - along_row * x), of one element
template <class Product, class T>
M2D_INLINE double combined(Product product, double along_center, double center, double along_row,
                           T x, double factor) {
  return factor * (static_cast<double>(product) + along_center * center -
                   along_row * static_cast<double>(x));
}

// coefficient * (inverse_sum * p - q), of one element
template <class T>
M2D_INLINE double kl_gradient(double p, double inverse_sum, T q, double coefficient) {
  return coefficient * (p * inverse_sum - static_cast<double>(q));
}

// What the cells leave for a chunk. `out` may be where the products are.
template <class Product, class T, class Out>
M2D_MULTIVERSION void combine(const Product* products, double along_center,
                              const double* __restrict center, double along_row,
                              const T* __restrict x, double factor, int64_t n, Out* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] =
        static_cast<Out>(combined(products[i], along_center, center[i], along_row, x[i], factor));
  }
}

// The same and the gradient of the KL.
template <class Product, class T, class Out>
M2D_MULTIVERSION void combine_with_kl(const Product* products, double along_center,
                                      const double* __restrict center, double along_row,
                                      const T* __restrict x, double factor,
                                      const double* __restrict p, double inverse_sum,
                                      const T* __restrict q, double coefficient, int64_t n,
                                      Out* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] =
        static_cast<Out>(combined(products[i], along_center, center[i], along_row, x[i], factor) +
                         kl_gradient(p[i], inverse_sum, q[i], coefficient));
  }
}

// The latter alone.
template <class T, class Out>
M2D_MULTIVERSION void kl_gradients(const double* __restrict p, double inverse_sum,
                                   const T* __restrict q, double coefficient, int64_t n,
                                   Out* __restrict out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<Out>(kl_gradient(p[i], inverse_sum, q[i], coefficient));
}

// out = factor * (grad - along * x)
template <class T>
M2D_MULTIVERSION void store_gradient(const double* __restrict grad, const T* __restrict x,
                                     double along, double factor, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<T>(factor * (grad[i] - along * static_cast<double>(x[i])));
}

}  // namespace m2d::cpu
