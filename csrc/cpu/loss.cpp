// The loss over pooled rows, all layers and dims at once. The formulas are those of math.h.
//
//   1. embed       inverse norms of every row and prefix, the teacher's softmax   one task per row
//   2. anchors     U_k, row softmaxes, X_c, and the anchors' finished gradient    one task per tile
//   3. candidates  the candidates' finished gradient                              one task per tile
//   4. reduce      cells, KLs, loss                                               fixed order
//
// The pooled rows are read as they are; all else is computed in double: rows of a real batch are nearly
// parallel in the early layers, where cosines agree in most of their digits and X E - r E cancels, and
// the arithmetic is small beside the pooling's memory traffic.
//
// Each output element has one owner and every sum a fixed order that does not depend on the number of
// threads. X (L, K, B, M) is kept between 2 and 3 while it is small; else 3 recomputes it from the row
// softmaxes, so that memory grows with B + M and not with B * M.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "../math.h"
#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace m2d::cpu {
namespace {

constexpr int64_t kStoredBytes = 8 << 20;  // X is kept up to this size
constexpr int64_t kTileBytes = 2 << 20;    // working set of one tile: U and X of all its prefixes
constexpr int64_t kPanelBytes = 1 << 20;   // rows converted to double at a time
constexpr int64_t kMinTasks = 8;           // tiles shrink until this many can run at once
constexpr int64_t kMinTile = 16;
constexpr int64_t kMaxTile = 256;
constexpr int64_t kRowGrain = 16;

// Uninitialised memory: every stage writes before it reads.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(size > 0 ? new T[size] : nullptr) {}
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
};

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// ---- loops over one row, compiled per vector level ----

template <class T>
M2D_MULTIVERSION double sum_of_squares(const T* __restrict x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

M2D_MULTIVERSION double dot(const double* __restrict x, const double* __restrict y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

M2D_MULTIVERSION double sum(const double* __restrict x, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}

template <class From, class To>
M2D_MULTIVERSION void scale_row(const From* __restrict x, double factor, int64_t n,
                                To* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<To>(factor * static_cast<double>(x[i]));
}

M2D_MULTIVERSION void add_scaled(const double* __restrict x, double factor, int64_t n,
                                 double* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] += factor * x[i];
}

// e_j = exp(S_j - max) with S_j = scale_ia u_j ib_j; returns max.
M2D_MULTIVERSION double logits_to_exp(const double* __restrict u, const double* __restrict ib,
                                      double scale_ia, int64_t n, double* __restrict e) {
  double max = -std::numeric_limits<double>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < n; ++j) {
    e[j] = scale_ia * u[j] * ib[j];
    max = e[j] > max ? e[j] : max;
  }
  for (int64_t j = 0; j < n; ++j) e[j] = exp_nonpositive(e[j] - max);
  return max;
}

// The same with a known maximum.
M2D_MULTIVERSION void logits_to_exp_at(const double* __restrict u, const double* __restrict ib,
                                       double scale_ia, double max, int64_t n,
                                       double* __restrict e) {
  for (int64_t j = 0; j < n; ++j) e[j] = exp_nonpositive(scale_ia * u[j] * ib[j] - max);
}

// In: e, with -others in the target's place. Out: X = G ia ib in place, colsum += G C, returns sum G C.
M2D_MULTIVERSION double exp_to_gradient(const double* __restrict u, const double* __restrict ib,
                                        double ia, double coefficient, int64_t n,
                                        double* __restrict x, double* __restrict colsum) {
  double rowsum = 0;
#pragma omp simd reduction(+ : rowsum)
  for (int64_t j = 0; j < n; ++j) {
    const double iaib = ia * ib[j];
    const double g = coefficient * x[j];
    const double gc = g * (u[j] * iaib);
    rowsum += gc;
    colsum[j] += gc;
    x[j] = g * iaib;
  }
  return rowsum;
}

struct MaxSum {
  double max, sum;
};

// p = exp(z - max) with z = factor * x, unnormalised; returns max and sum p.
template <class T>
M2D_MULTIVERSION MaxSum softmax_numerators(const T* __restrict x, double factor, int64_t n,
                                           double* __restrict p) {
  double max = -std::numeric_limits<double>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) {
    p[i] = factor * static_cast<double>(x[i]);
    max = p[i] > max ? p[i] : max;
  }
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    p[i] = exp_nonpositive(p[i] - max);
    total += p[i];
  }
  return {max, total};
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

// grad += coefficient * (p * inverse_sum - q)
template <class T>
M2D_MULTIVERSION void add_kl_gradient(const double* __restrict p, double inverse_sum,
                                      const T* __restrict q, double coefficient, int64_t n,
                                      double* __restrict grad) {
  for (int64_t i = 0; i < n; ++i)
    grad[i] += coefficient * (p[i] * inverse_sum - static_cast<double>(q[i]));
}

// out = factor * (grad - along * e), e = inverse * x
template <class T>
M2D_MULTIVERSION void store_gradient(const double* __restrict grad, const T* __restrict x,
                                     double along, double factor, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<T>(factor * (grad[i] - along * static_cast<double>(x[i])));
  }
}

// ---- the stages ----

// Rows of one kind (the pooled rows, or gathered candidates) with what stage 1 learns of them.
template <class T>
struct EmbeddedRows {
  Rows<const T> pooled;           // P
  Rows<T> grad;                   // dP; data is nullptr where no gradient is wanted
  Buffer<double> prefix_inverse;  // (L, K, rows), 1 / max(|E[:d_k]|, eps)
  Buffer<double> full_inverse;    // (L, rows), E = P * full_inverse: 1 where normalize is off

  EmbeddedRows(Rows<const T> p, Rows<T> d, int64_t layers, int64_t dims)
      : pooled(p),
        grad(d),
        prefix_inverse(layers * dims * p.count),
        full_inverse(layers * p.count) {}
};

// The anchors or the candidates of one layer: rows [first, first + count) of their kind.
template <class T>
struct Side {
  const EmbeddedRows<T>& rows;
  int64_t layer, first, count;
  const double* prefix_inverse;  // (K, count), `inverse_stride` between prefixes
  int64_t inverse_stride;
};

template <class T>
class LossKernel {
 public:
  explicit LossKernel(const LossParams<T>& params)
      : p_(params),
        wants_grad_(params.pooled_grad.data != nullptr),
        has_kl_(std::any_of(params.kl_weights, params.kl_weights + params.num_layers,
                            [](double v) { return v != 0; })),
        pooled_(params.pooled, params.pooled_grad, params.num_layers, params.num_dims),
        gathered_(params.candidates, params.candidate_grad, params.gathered ? params.num_layers : 0,
                  params.num_dims),
        stored_(cells() * params.num_anchors * params.num_candidates *
                    static_cast<int64_t>(sizeof(double)) <=
                kStoredBytes),
        anchor_tile_(tile_size(params.num_anchors, params.num_candidates)),
        candidate_tile_(tile_size(params.num_candidates, stored_ ? 1 : anchor_tile_)),
        anchor_tiles_(ceil_div(params.num_anchors, anchor_tile_)),
        x_(wants_grad_ && stored_ ? cells() * params.num_anchors * params.num_candidates : 0),
        tile_colsum_(wants_grad_ && stored_ ? cells() * anchor_tiles_ * params.num_candidates : 0),
        softmax_(cells() * params.num_anchors),
        cross_entropy_(cells() * params.num_anchors),
        teacher_(has_kl_ ? params.num_texts * params.dim : 0),
        teacher_lse_(has_kl_ ? params.num_texts : 0),
        kl_rows_(has_kl_ ? params.num_layers * params.num_texts : 0) {}

  void run() {
    embed(pooled_);
    if (p_.gathered) embed(gathered_);
    if (has_kl_) embed_teacher();
    tiles(p_.num_anchors, anchor_tile_,
          [this](int64_t l, int64_t begin, int64_t end) { anchors(l, begin, end); });
    tiles(p_.num_candidates, candidate_tile_,
          [this](int64_t l, int64_t begin, int64_t end) { candidates(l, begin, end); });
    if (p_.gathered) {
      tiles(p_.num_texts - p_.num_anchors, kMaxTile,
            [this](int64_t l, int64_t begin, int64_t end) { own_candidates(l, begin, end); });
    }
    reduce();
  }

 private:
  // -- sizes and places --

  int64_t cells() const { return p_.num_layers * p_.num_dims; }
  double weight(int64_t l, int64_t k) const { return p_.weights[l * p_.num_dims + k]; }
  bool has_cells(int64_t l) const {
    return std::any_of(p_.weights + l * p_.num_dims, p_.weights + (l + 1) * p_.num_dims,
                       [](double w) { return w != 0; });
  }
  int64_t chunk_begin(int64_t k) const { return k == 0 ? 0 : p_.dims[k - 1]; }
  int64_t chunk_size(int64_t k) const { return p_.dims[k] - chunk_begin(k); }

  // Rows per tile: its matrices against `others` columns fit the cache, and there are tiles for many
  // threads. It must not depend on how many threads there are: the order of sums would.
  int64_t tile_size(int64_t rows, int64_t others) const {
    const int64_t row_bytes = (p_.num_dims + 1) * others * static_cast<int64_t>(sizeof(double));
    const int64_t fitting = kTileBytes / std::max<int64_t>(row_bytes, 1);
    const int64_t parallel = ceil_div(p_.num_layers * rows, kMinTasks);
    return std::min(rows, std::clamp(std::min(fitting, parallel), kMinTile, kMaxTile));
  }

  // Calls body(layer, begin, end) for the tiles of all layers, in parallel.
  template <class Body>
  void tiles(int64_t rows, int64_t size, const Body& body) {
    const int64_t per_layer = ceil_div(rows, size);
    at::parallel_for(0, p_.num_layers * per_layer, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView no_autograd;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % per_layer * size;
        body(i / per_layer, first, std::min(rows, first + size));
      }
    });
  }

  Side<T> side(const EmbeddedRows<T>& rows, int64_t l, int64_t first, int64_t count) const {
    const int64_t total = rows.pooled.count;
    return {rows, l, first, count, rows.prefix_inverse.get() + l * p_.num_dims * total + first,
            total};
  }
  Side<T> anchor_side(int64_t l) const { return side(pooled_, l, 0, p_.num_anchors); }
  Side<T> candidate_side(int64_t l) const {
    return p_.gathered ? side(gathered_, l, 0, p_.num_candidates)
                       : side(pooled_, l, p_.num_anchors, p_.num_candidates);
  }

  const T* row(const Side<T>& s, int64_t i) const {
    return s.rows.pooled.data + s.layer * s.rows.pooled.layer_stride + (s.first + i) * p_.dim;
  }
  double full_inverse(const Side<T>& s, int64_t i) const {
    return s.rows.full_inverse.get()[s.layer * s.rows.pooled.count + s.first + i];
  }

  // E[begin:end, chunk k] in double, contiguous.
  void load(const Side<T>& s, int64_t begin, int64_t end, int64_t k, double* panel) const {
    for (int64_t i = begin; i < end; ++i) {
      scale_row(row(s, i) + chunk_begin(k), full_inverse(s, i), chunk_size(k),
                panel + (i - begin) * chunk_size(k));
    }
  }

  // Calls body(begin, end, panel) for panels of E[begin:end, chunk k].
  template <class Body>
  void panels(const Side<T>& s, int64_t begin, int64_t end, int64_t k, const Body& body) const {
    const int64_t width = chunk_size(k) * static_cast<int64_t>(sizeof(double));
    const int64_t size = std::min(end - begin, std::max(kMinTile, kPanelBytes / width));
    const Buffer<double> panel(size * chunk_size(k));
    for (int64_t first = begin; first < end; first += size) {
      const int64_t last = std::min(end, first + size);
      load(s, first, last, k, panel.get());
      body(first, last, matrix(panel.get(), last - first, chunk_size(k), chunk_size(k)));
    }
  }

  // U (rows, cols) += E_a[chunk k] E_b[chunk k]^T
  void add_products(const Side<T>& a, int64_t a_begin, int64_t a_end, const Side<T>& b,
                    int64_t b_begin, int64_t b_end, int64_t k, double* u) const {
    const int64_t rows = a_end - a_begin;
    const int64_t cols = b_end - b_begin;
    const Buffer<double> panel(rows * chunk_size(k));
    load(a, a_begin, a_end, k, panel.get());
    const at::Tensor left = matrix(panel.get(), rows, chunk_size(k), chunk_size(k));
    panels(b, b_begin, b_end, k, [&](int64_t first, int64_t last, const at::Tensor& right) {
      gemm(matrix(u + first - b_begin, rows, last - first, cols), left, right.t(), k > 0);
    });
  }

  // -- 1. embed --

  void embed(const EmbeddedRows<T>& rows) const {
    at::parallel_for(0, p_.num_layers * rows.pooled.count, kRowGrain,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i)
                         embed_row(rows, i / rows.pooled.count, i % rows.pooled.count);
                     });
  }

  void embed_row(const EmbeddedRows<T>& rows, int64_t l, int64_t r) const {
    const T* pooled = rows.pooled.data + l * rows.pooled.layer_stride + r * p_.dim;
    const double inverse =
        p_.normalize ? clamped_inverse_norm(sum_of_squares(pooled, p_.dim)) : 1.0;
    rows.full_inverse.get()[l * rows.pooled.count + r] = inverse;
    double squared = 0;
    for (int64_t k = 0; k < p_.num_dims; ++k) {
      squared += sum_of_squares(pooled + chunk_begin(k), chunk_size(k));
      rows.prefix_inverse.get()[(l * p_.num_dims + k) * rows.pooled.count + r] =
          clamped_inverse_norm(squared * inverse * inverse);
    }
  }

  // q = softmax(E[L-1] / tau) and its log-sum-exp.
  void embed_teacher() const {
    const Side<T> teacher = side(pooled_, p_.num_layers - 1, 0, p_.num_texts);
    at::parallel_for(0, p_.num_texts, kRowGrain, [&](int64_t begin, int64_t end) {
      const Buffer<double> p(p_.dim);
      for (int64_t n = begin; n < end; ++n) {
        const MaxSum z = softmax_numerators(
            row(teacher, n), full_inverse(teacher, n) / p_.kl_temperature, p_.dim, p.get());
        scale_row(p.get(), 1.0 / z.sum, p_.dim, teacher_.get() + n * p_.dim);
        teacher_lse_.get()[n] = z.max + std::log(z.sum);
      }
    });
  }

  // -- 2. anchors --

  void anchors(int64_t l, int64_t begin, int64_t end) const {
    const Side<T> a = anchor_side(l);
    const int64_t rows = end - begin;
    const Buffer<double> grad(wants_grad_ ? rows * p_.dim : 0);
    const Buffer<double> rowsum(wants_grad_ ? p_.num_dims * rows : 0);
    if (has_cells(l)) anchor_cells(l, begin, end, rowsum.get(), grad.get());
    for (int64_t i = 0; i < rows; ++i) {
      finish_row(a, begin + i, has_cells(l), rowsum.get() + i, rows, grad.get() + i * p_.dim);
    }
  }

  // The cross-entropies, rowsum (K, rows) = sum_j G C, and grad (rows, D) = X E[candidates].
  void anchor_cells(int64_t l, int64_t begin, int64_t end, double* rowsum, double* grad) const {
    const Side<T> a = anchor_side(l);
    const Side<T> b = candidate_side(l);
    const int64_t rows = end - begin;
    const int64_t m = p_.num_candidates;
    const bool keep = stored_ && wants_grad_;
    const Buffer<double> u(rows * m);
    const Buffer<double> scratch(keep ? 0 : wants_grad_ ? p_.num_dims * rows * m : m);
    const Buffer<double> unused_colsum(wants_grad_ && !keep ? m : 0);
    double* x = keep ? x_.get() + (l * p_.num_dims * p_.num_anchors + begin) * m : scratch.get();
    const int64_t x_stride = keep ? p_.num_anchors * m : rows * m;

    for (int64_t k = 0; k < p_.num_dims; ++k) {
      add_products(a, begin, end, b, 0, m, k, u.get());
      double* x_k = wants_grad_ ? x + k * x_stride : x;
      double* colsum = keep ? tile_colsum(l, begin / anchor_tile_, k) : unused_colsum.get();
      if (wants_grad_) std::fill_n(colsum, m, 0.0);
      if (weight(l, k) == 0) {
        if (wants_grad_) std::fill_n(x_k, rows * m, 0.0);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {
        double* x_i = wants_grad_ ? x_k + i * m : x_k;
        anchor_row(a, b, k, begin + i, u.get() + i * m, x_i);
        if (wants_grad_) {
          rowsum[k * rows + i] =
              gradient_row(a, b, k, begin + i, 0, m, u.get() + i * m, x_i, colsum);
        }
      }
    }
    if (!wants_grad_) return;
    suffix_sum(x, x_stride, rows * m);
    for (int64_t k = 0; k < p_.num_dims; ++k) {
      panels(b, 0, m, k, [&](int64_t first, int64_t last, const at::Tensor& right) {
        gemm(matrix(grad + chunk_begin(k), rows, chunk_size(k), p_.dim),
             matrix(x + k * x_stride + first, rows, last - first, m), right, first > 0);
      });
    }
  }

  RowSoftmax& softmax(int64_t l, int64_t k, int64_t i) const {
    return softmax_.get()[(l * p_.num_dims + k) * p_.num_anchors + i];
  }

  // Cross-entropy of anchor i in cell (l, k); leaves exp(S - max) in e.
  void anchor_row(const Side<T>& a, const Side<T>& b, int64_t k, int64_t i, const double* u,
                  double* e) const {
    const double* ib = b.prefix_inverse + k * b.inverse_stride;
    const double scale_ia = p_.scale * a.prefix_inverse[k * a.inverse_stride + i];
    const int64_t target = p_.target_offset + i;
    const double max = logits_to_exp(u, ib, scale_ia, p_.num_candidates, e);
    const double at_target = e[target];
    e[target] = 0;
    const double others = sum(e, p_.num_candidates);
    const double gap = max - scale_ia * u[target] * ib[target];
    cross_entropy_.get()[(a.layer * p_.num_dims + k) * p_.num_anchors + i] =
        cross_entropy(others, at_target, gap);
    softmax(a.layer, k, i) = {max, others, 1.0 / (others + at_target)};
  }

  // Anchor i against candidates [begin, end): exp(S - max) in x becomes X; colsum += G C; returns sum G C.
  double gradient_row(const Side<T>& a, const Side<T>& b, int64_t k, int64_t i, int64_t begin,
                      int64_t end, const double* u, double* x, double* colsum) const {
    const RowSoftmax& s = softmax(a.layer, k, i);
    const int64_t target = p_.target_offset + i;
    if (begin <= target && target < end) x[target - begin] = -s.others;
    const double coefficient =
        weight(a.layer, k) * p_.scale / static_cast<double>(p_.num_anchors) * s.inverse;
    return exp_to_gradient(u, b.prefix_inverse + k * b.inverse_stride + begin,
                           a.prefix_inverse[k * a.inverse_stride + i], coefficient, end - begin, x,
                           colsum);
  }

  // X_c = sum_{k >= c} X_k, in place.
  void suffix_sum(double* x, int64_t stride, int64_t size) const {
    for (int64_t k = p_.num_dims - 2; k >= 0; --k)
      add_scaled(x + (k + 1) * stride, 1.0, size, x + k * stride);
  }

  double* tile_colsum(int64_t l, int64_t tile, int64_t k) const {
    return tile_colsum_.get() + ((l * anchor_tiles_ + tile) * p_.num_dims + k) * p_.num_candidates;
  }

  // -- 3. candidates --

  void candidates(int64_t l, int64_t begin, int64_t end) const {
    const Side<T> b = candidate_side(l);
    const int64_t cols = end - begin;
    const Buffer<double> grad(wants_grad_ ? cols * p_.dim : 0);
    const Buffer<double> colsum(wants_grad_ ? p_.num_dims * cols : 0);
    if (wants_grad_ && has_cells(l)) {
      std::fill_n(colsum.get(), p_.num_dims * cols, 0.0);
      if (stored_) {
        stored_cells(l, begin, end, colsum.get(), grad.get());
      } else {
        for (int64_t first = 0; first < p_.num_anchors; first += anchor_tile_) {
          recomputed_cells(l, begin, end, first, std::min(p_.num_anchors, first + anchor_tile_),
                           colsum.get(), grad.get());
        }
      }
    }
    for (int64_t j = 0; j < cols; ++j) {
      finish_row(b, begin + j, has_cells(l), colsum.get() + j, cols, grad.get() + j * p_.dim);
    }
  }

  // colsum (K, cols) += sum_i G C, and grad (cols, D) = X^T E[anchors], from the X that stage 2 left.
  void stored_cells(int64_t l, int64_t begin, int64_t end, double* colsum, double* grad) const {
    const int64_t m = p_.num_candidates;
    const int64_t cols = end - begin;
    for (int64_t k = 0; k < p_.num_dims; ++k) {
      const double* x = x_.get() + (l * p_.num_dims + k) * p_.num_anchors * m + begin;
      panels(anchor_side(l), 0, p_.num_anchors, k,
             [&](int64_t first, int64_t last, const at::Tensor& right) {
               gemm(matrix(grad + chunk_begin(k), cols, chunk_size(k), p_.dim),
                    matrix(x + first * m, last - first, cols, m).t(), right, first > 0);
             });
      for (int64_t tile = 0; tile < anchor_tiles_; ++tile) {
        add_scaled(tile_colsum(l, tile, k) + begin, 1.0, cols, colsum + k * cols);
      }
    }
  }

  // The part of anchors [first, last) in both, from their row softmaxes.
  void recomputed_cells(int64_t l, int64_t begin, int64_t end, int64_t first, int64_t last,
                        double* colsum, double* grad) const {
    const Side<T> a = anchor_side(l);
    const Side<T> b = candidate_side(l);
    const int64_t rows = last - first;
    const int64_t cols = end - begin;
    const Buffer<double> u(rows * cols);
    const Buffer<double> x(p_.num_dims * rows * cols);
    for (int64_t k = 0; k < p_.num_dims; ++k) {
      add_products(a, first, last, b, begin, end, k, u.get());
      double* x_k = x.get() + k * rows * cols;
      if (weight(l, k) == 0) {
        std::fill_n(x_k, rows * cols, 0.0);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {
        const double scale_ia = p_.scale * a.prefix_inverse[k * a.inverse_stride + first + i];
        logits_to_exp_at(u.get() + i * cols, b.prefix_inverse + k * b.inverse_stride + begin,
                         scale_ia, softmax(l, k, first + i).max, cols, x_k + i * cols);
        gradient_row(a, b, k, first + i, begin, end, u.get() + i * cols, x_k + i * cols,
                     colsum + k * cols);
      }
    }
    suffix_sum(x.get(), rows * cols, rows * cols);
    for (int64_t k = 0; k < p_.num_dims; ++k) {
      panels(a, first, last, k, [&](int64_t from, int64_t to, const at::Tensor& right) {
        gemm(matrix(grad + chunk_begin(k), cols, chunk_size(k), p_.dim),
             matrix(x.get() + (k * rows + from - first) * cols, to - from, cols, cols).t(), right,
             from > 0);
      });
    }
  }

  // With gathered candidates the rows after the anchors only meet the KL.
  void own_candidates(int64_t l, int64_t begin, int64_t end) const {
    const Side<T> own = side(pooled_, l, p_.num_anchors, p_.num_texts - p_.num_anchors);
    const Buffer<double> grad(wants_grad_ ? p_.dim : 0);
    for (int64_t i = begin; i < end; ++i) finish_row(own, i, false, nullptr, 0, grad.get());
  }

  // -- a row's end: norm terms, KL, the Jacobian of Normalize --

  // grad: X E' of this row (in, where the row is in a cell), scratch after; sums[k * stride] = sum G C.
  void finish_row(const Side<T>& s, int64_t i, bool in_cells, const double* sums, int64_t stride,
                  double* grad) const {
    if (wants_grad_) {
      const int64_t reached = in_cells ? p_.dims[p_.num_dims - 1] : 0;
      std::fill(grad + reached, grad + p_.dim, 0.0);
      if (in_cells) subtract_norm_terms(s, i, sums, stride, grad);
    }
    if (&s.rows == &pooled_ && p_.kl_weights[s.layer] != 0) add_kl(s, i, grad);
    if (wants_grad_) store(s, i, grad);
  }

  // dE[chunk c] -= r_c E[chunk c], r_c = sum_{k >= c} inv_k^2 sums[k].
  void subtract_norm_terms(const Side<T>& s, int64_t i, const double* sums, int64_t stride,
                           double* grad) const {
    const Buffer<double> e(p_.dims[p_.num_dims - 1]);
    double suffix = 0;
    for (int64_t k = p_.num_dims - 1; k >= 0; --k) {
      const double inverse = s.prefix_inverse[k * s.inverse_stride + i];
      if (weight(s.layer, k) != 0 && !is_clamped(inverse))
        suffix += inverse * inverse * sums[k * stride];
      load(s, i, i + 1, k, e.get());
      add_scaled(e.get(), -suffix, chunk_size(k), grad + chunk_begin(k));
    }
  }

  // KL of one row, and dE += V / (N tau) (softmax(E / tau) - q).
  void add_kl(const Side<T>& s, int64_t i, double* grad) const {
    const int64_t n = s.first + i;
    const double factor = full_inverse(s, i) / p_.kl_temperature;
    const T* q = teacher_.get() + n * p_.dim;
    const Side<T> teacher = side(pooled_, p_.num_layers - 1, 0, p_.num_texts);
    const Buffer<double> p(p_.dim);
    const MaxSum z = softmax_numerators(row(s, i), factor, p_.dim, p.get());
    const double gap =
        expected_gap(q, row(teacher, n), full_inverse(teacher, n) / p_.kl_temperature, row(s, i),
                     factor, p_.dim);
    kl_rows_.get()[s.layer * p_.num_texts + n] =
        kl_divergence(gap, teacher_lse_.get()[n], z.max + std::log(z.sum));
    if (wants_grad_) {
      const double coefficient =
          p_.kl_weights[s.layer] / (static_cast<double>(p_.num_texts) * p_.kl_temperature);
      add_kl_gradient(p.get(), 1.0 / z.sum, q, coefficient, p_.dim, grad);
    }
  }

  // dP = (dE - <E, dE> E) / |P|; where the norm is clamped E = P / eps, and only the factor remains.
  void store(const Side<T>& s, int64_t i, const double* grad) const {
    const double inverse = full_inverse(s, i);
    double along = 0;
    if (p_.normalize && !is_clamped(inverse)) {
      const Buffer<double> e(p_.dim);
      scale_row(row(s, i), inverse, p_.dim, e.get());
      along = dot(e.get(), grad, p_.dim) * inverse;
    }
    store_gradient(grad, row(s, i), along, inverse, p_.dim,
                   s.rows.grad.data + s.layer * s.rows.grad.layer_stride + (s.first + i) * p_.dim);
  }

  // -- 4. reduce --

  static double mean(const double* x, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += x[i];
    return total / static_cast<double>(n);
  }

  void reduce() const {
    constexpr double kNotComputed = std::numeric_limits<double>::quiet_NaN();
    double loss = 0;
    for (int64_t cell = 0; cell < cells(); ++cell) {
      const double w = p_.weights[cell];
      const double ce = w == 0 ? kNotComputed
                               : mean(cross_entropy_.get() + cell * p_.num_anchors, p_.num_anchors);
      p_.cells[cell] = static_cast<T>(ce);
      if (w != 0) loss += w * ce;
    }
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      const double v = p_.kl_weights[l];
      const double kl =
          v == 0 ? kNotComputed : mean(kl_rows_.get() + l * p_.num_texts, p_.num_texts);
      p_.kl[l] = static_cast<T>(kl);
      if (v != 0) loss += v * kl;
    }
    *p_.loss = static_cast<T>(loss);
  }

  const LossParams<T>& p_;
  const bool wants_grad_;
  const bool has_kl_;
  const EmbeddedRows<T> pooled_, gathered_;
  const bool stored_;  // X is kept from the anchors' stage to the candidates'
  const int64_t anchor_tile_, candidate_tile_, anchor_tiles_;
  const Buffer<double> x_;              // (L, K, B, M) suffix sums, stored only
  const Buffer<double> tile_colsum_;    // (L, tiles, K, M), stored only
  const Buffer<RowSoftmax> softmax_;    // (L, K, B)
  const Buffer<double> cross_entropy_;  // (L, K, B)
  const Buffer<T> teacher_;             // q (N, D)
  const Buffer<double> teacher_lse_;    // (N,)
  const Buffer<double> kl_rows_;        // (L, N)
};

}  // namespace

template <class T>
void loss(const LossParams<T>& params) {
  LossKernel<T>(params).run();
}

template void loss<float>(const LossParams<float>&);
template void loss<double>(const LossParams<double>&);

}  // namespace m2d::cpu
