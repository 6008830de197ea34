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

// z = factor s; returns max z.
M2D_MULTIVERSION inline double max_of_scaled(const double* __restrict s, double factor, int64_t n,
                                             double* __restrict z) {
  double max = -std::numeric_limits<double>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < n; ++j) {
    z[j] = factor * s[j];
    max = z[j] > max ? z[j] : max;
  }
  return max;
}

// e = exp(s - max)
M2D_MULTIVERSION inline void exponentials(const double* __restrict s, double max, int64_t n,
                                          double* __restrict e) {
  for (int64_t j = 0; j < n; ++j) e[j] = exp_nonpositive(s[j] - max);
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

// grad = factor * (products + along_center * center - along_row * x)
template <class Product, class T>
M2D_MULTIVERSION void combine(const Product* __restrict products, double along_center,
                              const double* __restrict center, double along_row,
                              const T* __restrict x, double factor, int64_t n,
                              double* __restrict grad) {
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = factor * (static_cast<double>(products[i]) + along_center * center[i] -
                        along_row * static_cast<double>(x[i]));
  }
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
    p[i] = exp_nonpositive(factor * static_cast<double>(x[i]) - max);
    total += p[i];
  }
  return total;
}

// sum_i q_i (teacher_factor teacher_i - student_factor student_i)
template <class T>
M2D_MULTIVERSION double expected_gap(const T* __restrict q, const T* __restrict teacher,
                                     double teacher_factor, const T* __restrict student,
                                     double student_factor, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    total += static_cast<double>(q[i]) * (teacher_factor * static_cast<double>(teacher[i]) -
                                          student_factor * static_cast<double>(student[i]));
  }
  return total;
}

// grad += coefficient * (inverse_sum * p - q)
template <class T>
M2D_MULTIVERSION void add_kl_gradient(const double* __restrict p, double inverse_sum,
                                      const T* __restrict q, double coefficient, int64_t n,
                                      double* __restrict grad) {
  for (int64_t i = 0; i < n; ++i)
    grad[i] += coefficient * (p[i] * inverse_sum - static_cast<double>(q[i]));
}

// out = factor * (grad - along * x)
template <class T>
M2D_MULTIVERSION void store_gradient(const double* __restrict grad, const T* __restrict x,
                                     double along, double factor, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<T>(factor * (grad[i] - along * static_cast<double>(x[i])));
}

}  // namespace m2d::cpu
