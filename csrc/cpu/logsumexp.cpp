// The logsumexp of scaled scores, some of them left out, and its adjoint: what the losses that rank candidates by
// cosines are made of.
//
//   Y[r] = log sum_c exp(s X[r,c])  over the columns c that the mask leaves,   or Y[c] over the rows
//   dX   = dY s exp(s X - Y),       0 where masked, and where nothing is left: there Y is -inf
//
// In double, as the cosines are. All matrices of a batch share one mask. Neither s X nor the exponentials are stored.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../math.h"
#include "buffer.h"
#include "kernels.h"
#include "simd.h"

namespace m2d::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kGrain = 1 << 14;  // scores that are worth a thread
constexpr int64_t kColumns = 256;    // summed side by side, over rows

template <bool kMasked>
M2D_INLINE double exponential(double score, double max, const double* masked, int64_t j) {
  const double e = exp_nonpositive<double>(score - max);
  return kMasked && masked[j] != 0 ? 0.0 : e;
}

template <bool kMasked>
M2D_MULTIVERSION double row_max(const double* __restrict x, const double* __restrict masked,
                                double scale, int64_t n) {
  double max = -kInfinity;
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < n; ++j) {
    const double score = kMasked && masked[j] != 0 ? -kInfinity : scale * x[j];
    max = score > max ? score : max;
  }
  return max;
}

template <bool kMasked>
M2D_MULTIVERSION double row_sum(const double* __restrict x, const double* __restrict masked,
                                double scale, double max, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += exponential<kMasked>(scale * x[j], max, masked, j);
  return sum;
}

template <bool kMasked>
M2D_MULTIVERSION void raise_maxima(const double* __restrict x, const double* __restrict masked,
                                   double scale, int64_t n, double* __restrict max) {
  for (int64_t j = 0; j < n; ++j) {
    const double score = kMasked && masked[j] != 0 ? -kInfinity : scale * x[j];
    max[j] = score > max[j] ? score : max[j];
  }
}

template <bool kMasked>
M2D_MULTIVERSION void add_exponentials(const double* __restrict x, const double* __restrict masked,
                                       double scale, const double* __restrict max, int64_t n,
                                       double* __restrict sum) {
  for (int64_t j = 0; j < n; ++j) sum[j] += exponential<kMasked>(scale * x[j], max[j], masked, j);
}

// out = factor exp(scale x - y)
template <bool kMasked>
M2D_MULTIVERSION void weigh_row(const double* __restrict x, const double* __restrict masked,
                                double scale, double y, double factor, int64_t n,
                                double* __restrict out) {
  for (int64_t j = 0; j < n; ++j)
    out[j] = factor * exponential<kMasked>(scale * x[j], y, masked, j);
}

// The same with an own y and factor per column.
template <bool kMasked>
M2D_MULTIVERSION void weigh_columns(const double* __restrict x, const double* __restrict masked,
                                    double scale, const double* __restrict y,
                                    const double* __restrict factor, int64_t n,
                                    double* __restrict out) {
  for (int64_t j = 0; j < n; ++j) {
    const double e = exponential<kMasked>(scale * x[j], y[j], masked, j);
    out[j] = y[j] == -kInfinity ? 0.0 : factor[j] * scale * e;
  }
}

// Infinite maxima, of nothing or of an overflow, are left: -inf, or NaN by inf - inf.
double logarithm(double max, double sum) {
  return max == -kInfinity && sum == 0 ? max : max + std::log(sum);
}

template <bool kMasked>
class LogSumExp {
 public:
  explicit LogSumExp(const LogSumExpParams& p) : p_(p) {}

  void forward(double* y) const {
    if (p_.over_rows) {
      for_column_blocks([&](int64_t b, int64_t first, int64_t last) {
        sum_columns(b, first, last, y + b * p_.columns + first);
      });
      return;
    }
    for_rows([&](int64_t b, int64_t r) {
      const double max = row_max<kMasked>(row(b, r), mask(r), p_.scale, p_.columns);
      const double sum = row_sum<kMasked>(row(b, r), mask(r), p_.scale, max, p_.columns);
      y[b * p_.rows + r] = logarithm(max, sum);
    });
  }

  // x (batches, rows, columns) contiguous
  void backward(const double* y, const double* y_grad, double* x) const {
    for_rows([&](int64_t b, int64_t r) {
      double* out = x + (b * p_.rows + r) * p_.columns;
      if (p_.over_rows) {
        const int64_t at = b * p_.columns;
        weigh_columns<kMasked>(row(b, r), mask(r), p_.scale, y + at, y_grad + at, p_.columns, out);
        return;
      }
      const int64_t at = b * p_.rows + r;
      if (y[at] == -kInfinity) {
        std::fill_n(out, p_.columns, 0.0);
      } else {
        weigh_row<kMasked>(row(b, r), mask(r), p_.scale, y[at], y_grad[at] * p_.scale, p_.columns,
                           out);
      }
    });
  }

 private:
  const double* row(int64_t b, int64_t r) const {
    return p_.scores + b * p_.batch_stride + r * p_.row_stride;
  }
  const double* mask(int64_t r) const { return kMasked ? p_.mask + r * p_.columns : nullptr; }

  template <class Body>
  void for_rows(const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p_.columns));
    at::parallel_for(0, p_.batches * p_.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / p_.rows, i % p_.rows);
    });
  }

  template <class Body>
  void for_column_blocks(const Body& body) const {
    const int64_t blocks = ceil_div(p_.columns, kColumns);
    const int64_t scores = std::max<int64_t>(1, p_.rows * std::min(p_.columns, kColumns));
    at::parallel_for(0, p_.batches * blocks, std::max<int64_t>(1, kGrain / scores),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i) {
                         const int64_t first = i % blocks * kColumns;
                         body(i / blocks, first, std::min(p_.columns, first + kColumns));
                       }
                     });
  }

  void sum_columns(int64_t b, int64_t first, int64_t last, double* y) const {
    const int64_t n = last - first;
    double max[kColumns], sum[kColumns];
    std::fill_n(max, n, -kInfinity);
    std::fill_n(sum, n, 0.0);
    for (int64_t r = 0; r < p_.rows; ++r)
      raise_maxima<kMasked>(row(b, r) + first, mask_from(r, first), p_.scale, n, max);
    for (int64_t r = 0; r < p_.rows; ++r)
      add_exponentials<kMasked>(row(b, r) + first, mask_from(r, first), p_.scale, max, n, sum);
    for (int64_t c = 0; c < n; ++c) y[c] = logarithm(max[c], sum[c]);
  }

  const double* mask_from(int64_t r, int64_t first) const {
    return kMasked ? mask(r) + first : nullptr;
  }

  const LogSumExpParams& p_;
};

}  // namespace

void masked_logsumexp(const LogSumExpParams& p, double* y) {
  p.mask == nullptr ? LogSumExp<false>(p).forward(y) : LogSumExp<true>(p).forward(y);
}

void masked_logsumexp_backward(const LogSumExpParams& p, const double* y, const double* y_grad,
                               double* x) {
  p.mask == nullptr ? LogSumExp<false>(p).backward(y, y_grad, x)
                    : LogSumExp<true>(p).backward(y, y_grad, x);
}

}  // namespace m2d::cpu
