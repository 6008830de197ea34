// What the loss kernel keeps of each row: the CUDA twin of cpu/embeddings.h. Real is double for float32 states, whose
// accuracy it keeps where terms cancel, and float for the half types.
#pragma once

#include "../math.h"
#include "launch.h"
#include "reduce.cuh"

namespace m2d::cuda {

constexpr int kCenterSamples = 8;

// Rows of one kind: the pooled rows, or gathered candidates. See math.h for the names.
template <class Real>
struct RowSet {
  const float* pooled;   // P (L, count, D); may be the memory of delta
  float* delta;          // (L, count, D)
  float* grad;           // dP (L, count, D), nullptr where no gradient is wanted
  Real* full;            // (L, count), 1 / max(|P|, eps)
  Real* prefix;          // (L, K, count), i_k
  Real* prefix_squared;  // (L, K, count), i_k^2, or 0 where the norm is clamped
  Real* along;           // (L, K, count), <c, u>_k
  float* gamma;          // (L, count)
  int count;
};

struct GridShape {
  int num_layers, num_texts, num_anchors, num_candidates, dim, num_dims, target_offset;
  int dims[kMaxDims];
  float kl_temperature;
  float scale, own_scale,
      others_scale;  // Z / C of the positive, an anchor's own other candidates, all others
  int column_size;   // candidates of one column
  bool normalize, gathered, wants_grad, has_kl;
  int16_t used_dims[kMaxLayers];  // prefixes up to the last one whose weight is not 0
  float weights[kMaxLayers * kMaxDims];
  float kl_weights[kMaxLayers];

  M2D_DEVICE int chunk_begin(int k) const { return k == 0 ? 0 : dims[k - 1]; }
  M2D_DEVICE float weight(int layer, int k) const { return weights[layer * num_dims + k]; }
  // Z / C of candidate j for the anchor whose positive is `target`.
  M2D_DEVICE float logit_scale(int j, int target) const {
    if (j == target) return scale;
    if (own_scale == others_scale) return others_scale;
    return j % column_size == target ? own_scale : others_scale;
  }
};

template <class Real>
M2D_DEVICE int64_t row_of(const RowSet<Real>& set, int layer, int r) {
  return static_cast<int64_t>(layer) * set.count + r;
}
template <class Real>
M2D_DEVICE int64_t prefix_of(const GridShape& s, const RowSet<Real>& set, int layer, int k, int r) {
  return (static_cast<int64_t>(layer) * s.num_dims + k) * set.count + r;
}

// Norms of row r, by one warp; every lane gets 1 / max(|P|, eps).
template <class Real>
M2D_DEVICE Real compute_norms(const GridShape& s, const RowSet<Real>& set, int layer, int r) {
  const int lane = threadIdx.x % 32;
  const float* x = set.pooled + row_of(set, layer, r) * s.dim;
  Real squared = 0;
  Real full = 0;
  // Twice: the first round finds |P|, by which the prefixes of the second are measured.
  for (int round = 0; round < 2; ++round) {
    squared = 0;
    for (int k = 0; k <= s.num_dims; ++k) {
      const int end = k < s.num_dims ? s.dims[k] : s.dim;
      Real sum = 0;
      for (int d = s.chunk_begin(k) + lane; d < end; d += 32) {
        const Real value = static_cast<Real>(x[d]);
        sum += value * value;
      }
      squared += warp_sum(sum);
      if (round == 0 || k == s.num_dims || lane != 0) continue;
      const double factor = s.normalize ? static_cast<double>(full) : 1.0;
      const double inverse = clamped_inverse_norm(static_cast<double>(squared) * factor * factor);
      const double relative = inverse * factor / static_cast<double>(full);
      const int64_t place = prefix_of(s, set, layer, k, r);
      set.prefix[place] = static_cast<Real>(relative);
      set.prefix_squared[place] =
          is_clamped(inverse) ? Real(0) : static_cast<Real>(relative * relative);
    }
    if (round == 0) full = static_cast<Real>(clamped_inverse_norm(static_cast<double>(squared)));
  }
  if (lane == 0) set.full[row_of(set, layer, r)] = full;
  return full;
}

// <c, u> of every prefix, gamma, and delta of row r, by one warp. delta may lie where P was.
template <class Real>
M2D_DEVICE void center_row(const GridShape& s, const RowSet<Real>& set, const float* center,
                           const Real* center_squared, int layer, int r) {
  const int lane = threadIdx.x % 32;
  const int64_t row = row_of(set, layer, r);
  const float* x = set.pooled + row * s.dim;
  const Real full = set.full[row];
  Real along = 0;
  Real gamma = 1;
  for (int k = 0; k < s.num_dims; ++k) {
    Real sum = 0;
    for (int d = s.chunk_begin(k) + lane; d < s.dims[k]; d += 32)
      sum += static_cast<Real>(center[d]) * static_cast<Real>(x[d]);
    along += full * warp_sum(sum);
    if (lane == 0) set.along[prefix_of(s, set, layer, k, r)] = along;
    if (!(2 * along >= center_squared[k]) && k < s.used_dims[layer]) gamma = 0;
  }
  __syncwarp();  // other lanes have read what this one overwrites
  float* delta = set.delta + row * s.dim;
  for (int d = lane; d < s.dim; d += 32)
    delta[d] =
        static_cast<float>(full * static_cast<Real>(x[d]) - gamma * static_cast<Real>(center[d]));
  if (lane == 0) set.gamma[row] = static_cast<float>(gamma);
}

// An element of E, from delta.
template <class Real>
struct EmbeddingRow {
  const float* delta;
  const float* center;
  Real gamma, factor;  // E = factor u

  M2D_DEVICE Real unit(int d) const {
    return static_cast<Real>(delta[d]) + gamma * static_cast<Real>(center[d]);
  }
  M2D_DEVICE Real operator()(int d) const { return factor * unit(d); }
};

template <class Real>
M2D_DEVICE EmbeddingRow<Real> embedding_row(const GridShape& s, const RowSet<Real>& set,
                                            const float* centers, int layer, int r) {
  const int64_t row = row_of(set, layer, r);
  return {set.delta + row * s.dim, centers + static_cast<int64_t>(layer) * s.dim,
          static_cast<Real>(set.gamma[row]), s.normalize ? Real(1) : 1 / set.full[row]};
}

}  // namespace m2d::cuda
