// What the loss needs to know of each row before rows meet: norms, and a center of every layer.
#pragma once

#include <algorithm>
#include <vector>

#include "../math.h"
#include "../params.h"
#include "buffer.h"
#include "rows.h"

namespace m2d::cpu {

// Rows of one kind (the pooled rows, or gathered candidates) with their norms.
template <class T>
struct NormedRows {
  Rows<const T> pooled;     // P
  Rows<T> grad;             // dP; data is nullptr where no gradient is wanted
  Buffer<double> full;      // (L, rows), 1 / max(|P|, eps)
  Buffer<double> prefix;    // (L, K, rows), i_k of math.h
  Buffer<double> gradient;  // (L, K, rows), i_k^2, or 0 where the prefix's norm is clamped
};

// The anchors or the candidates of one layer: rows [first, first + count) of their kind.
template <class T>
struct Side {
  const NormedRows<T>& rows;
  int64_t layer, first, count;

  Side part(int64_t begin, int64_t end) const { return {rows, layer, first + begin, end - begin}; }
};

template <class T>
class Embeddings {
 public:
  explicit Embeddings(const LossParams<T>& params)
      : p_(params),
        pooled_(make_rows(params.pooled, params.pooled_grad)),
        gathered_(make_rows(params.candidates, params.candidate_grad)),
        centers_(params.num_layers * params.dim),
        center_squared_(params.num_layers * params.num_dims) {}

  // -- before anything else of a layer is asked for --

  void compute_norms(const Side<T>& s) const {
    for (int64_t i = 0; i < s.count; ++i) compute_norms_of_row({s.rows, s.layer, s.first + i, 1});
  }

  // After the norms. Any center is right; the mean of some rows is near all of them where they are nearly parallel.
  void compute_center(int64_t l) const {
    double* center = centers_.get() + l * p_.dim;
    add_samples(texts(l), center);
    for (int64_t k = 0; k < p_.num_dims; ++k)
      center_squared_.get()[l * p_.num_dims + k] = sum_of_squares(center, p_.dims[k]);
  }

  // -- the grid --

  const LossParams<T>& params() const { return p_; }
  double weight(int64_t l, int64_t k) const { return p_.weights[l * p_.num_dims + k]; }

  // Prefixes of a layer up to the last one whose weight is not 0.
  int64_t used_dims(int64_t l) const {
    int64_t k = p_.num_dims;
    while (k > 0 && weight(l, k - 1) == 0) --k;
    return k;
  }
  int64_t chunk_begin(int64_t k) const { return k == 0 ? 0 : p_.dims[k - 1]; }
  int64_t chunk_size(int64_t k) const { return p_.dims[k] - chunk_begin(k); }

  // -- rows --

  Side<T> anchors(int64_t l) const { return {pooled_, l, 0, p_.num_anchors}; }
  Side<T> candidates(int64_t l) const {
    return p_.gathered ? Side<T>{gathered_, l, 0, p_.num_candidates} : own_candidates(l);
  }
  Side<T> own_candidates(int64_t l) const {
    return {pooled_, l, p_.num_anchors, p_.num_texts - p_.num_anchors};
  }
  Side<T> texts(int64_t l) const { return {pooled_, l, 0, p_.num_texts}; }
  Side<T> gathered(int64_t l) const { return {gathered_, l, 0, gathered_.pooled.count}; }
  bool is_pooled(const Side<T>& s) const { return &s.rows == &pooled_; }

  const T* row(const Side<T>& s, int64_t i) const {
    return s.rows.pooled.data + s.layer * s.rows.pooled.layer_stride + (s.first + i) * p_.dim;
  }
  T* grad_row(const Side<T>& s, int64_t i) const {
    return s.rows.grad.data + s.layer * s.rows.grad.layer_stride + (s.first + i) * p_.dim;
  }
  double full_inverse(const Side<T>& s, int64_t i) const {
    return s.rows.full.get()[s.layer * s.rows.pooled.count + s.first + i];
  }
  // (count,) of one prefix.
  const double* prefix_inverse(const Side<T>& s, int64_t k) const {
    return s.rows.prefix.get() + prefix_index(s, k);
  }
  const double* prefix_gradient(const Side<T>& s, int64_t k) const {
    return s.rows.gradient.get() + prefix_index(s, k);
  }
  const double* center(int64_t l) const { return centers_.get() + l * p_.dim; }
  // |c_k|^2 of one prefix.
  double center_squared(int64_t l, int64_t k) const {
    return center_squared_.get()[l * p_.num_dims + k];
  }

 private:
  static constexpr int64_t kCenterSamples = 32;

  NormedRows<T> make_rows(const Rows<const T>& rows, const Rows<T>& grad) const {
    const int64_t n = p_.num_layers * rows.count;
    return {rows, grad, Buffer<double>(n), Buffer<double>(n * p_.num_dims),
            Buffer<double>(n * p_.num_dims)};
  }

  int64_t prefix_index(const Side<T>& s, int64_t k) const {
    return (s.layer * p_.num_dims + k) * s.rows.pooled.count + s.first;
  }

  void compute_norms_of_row(const Side<T>& s) const {
    const T* x = row(s, 0);
    const int64_t stride = s.rows.pooled.count;
    double* prefix = s.rows.prefix.get() + prefix_index(s, 0);
    double* gradient = s.rows.gradient.get() + prefix_index(s, 0);
    double squared = 0;
    for (int64_t k = 0; k < p_.num_dims; ++k) {
      squared += sum_of_squares(x + chunk_begin(k), chunk_size(k));
      prefix[k * stride] = squared;
    }
    const int64_t reached = p_.dims[p_.num_dims - 1];
    const double full =
        clamped_inverse_norm(squared + sum_of_squares(x + reached, p_.dim - reached));
    s.rows.full.get()[s.layer * stride + s.first] = full;
    const double factor = p_.normalize ? full : 1.0;  // from P to E
    for (int64_t k = 0; k < p_.num_dims; ++k) {
      const double inverse = clamped_inverse_norm(prefix[k * stride] * factor * factor);
      const double relative = inverse * factor / full;
      prefix[k * stride] = relative;
      gradient[k * stride] = is_clamped(inverse) ? 0.0 : relative * relative;
    }
  }

  // The mean of u over evenly spaced rows that have a direction; 0 where none has.
  void add_samples(const Side<T>& s, double* center) const {
    std::fill_n(center, p_.dim, 0.0);
    const int64_t samples = std::min(s.count, kCenterSamples);
    int64_t counted = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t n = i * s.count / samples;
      if (is_clamped(full_inverse(s, n))) continue;
      add_scaled(row(s, n), full_inverse(s, n), p_.dim, center);
      ++counted;
    }
    if (counted > 0) scale_in_place(1.0 / static_cast<double>(counted), p_.dim, center);
  }

  const LossParams<T>& p_;
  const NormedRows<T> pooled_, gathered_;
  const Buffer<double> centers_;         // (L, D), c of math.h
  const Buffer<double> center_squared_;  // (L, K)
};

}  // namespace m2d::cpu
