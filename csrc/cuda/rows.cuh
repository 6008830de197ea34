// What the loss kernel keeps of each row: the CUDA twin of cpu/embeddings.h. Real is double for float32 states, whose
// accuracy it keeps where terms cancel, and float for the half types.
#pragma once

#include "../math.h"
#include "launch.h"
#include "reduce.cuh"

namespace m2d::cuda {

M2D_DEVICE int min_of(int a, int b) {
  return a < b ? a : b;
}
M2D_DEVICE int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

constexpr int kCenterSamples = 8;

// A row in one prefix.
template <class Real>
struct alignas(4 * sizeof(Real)) PrefixRow {
  Real inverse;  // i_k
  Real squared;  // i_k^2, or 0 where the norm is clamped
  Real along;    // <c, u>_k
  Real gamma;
};

// Rows of one kind: the pooled rows, or gathered candidates. See math.h for the names.
template <class Real>
struct RowSet {
  const float* pooled;        // P (L, count, D); may be the memory of delta
  float* delta;               // (L, count, D)
  float* grad;                // dP (L, count, D), nullptr where no gradient is wanted
  Real* full;                 // (L, count), 1 / max(|P|, eps)
  PrefixRow<Real>* prefixes;  // (L, K, count)
  float* gamma;               // (L, count)
  int count;
};

// What a row's KL leaves to its gradient.
template <class Real>
struct alignas(4 * sizeof(Real)) KlRow {
  Real kl;
  Real teacher_lse;  // log sum exp of the teacher's z
  Real lse_gap;      // log sum exp of its own z, less that
  Real along;        // <u, d(weighted KL)/dE>, where E is normalised
};

// One side of a cosine.
template <class Real>
struct CosineSide {
  Real inverse;  // i_k
  Real gamma;
  Real along;  // <c, u>_k of a candidate; of an anchor less gamma |c_k|^2
};

// An anchor in one cell, once its normaliser is known.
template <class Real>
struct alignas(4 * sizeof(Real)) AnchorCell {
  CosineSide<Real> side;
  Real max;            // max_j Z_j
  Real coefficient;    // G_j = coefficient exp(Z_j - max), but for the target:
  Real others;         // G_t = -coefficient others
  Real cross_entropy;  // of this anchor
};

// What a row's cells leave to its norm terms: the sums of G gamma i, over the other side's gamma and i, and of G C.
template <class Real>
struct alignas(2 * sizeof(Real)) RowSums {
  Real weighted, cosines;
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

  // Chunk K is what no prefix covers.
  M2D_DEVICE int chunk_begin(int k) const { return k == 0 ? 0 : dims[k - 1]; }
  M2D_DEVICE int chunk_end(int k) const { return k < num_dims ? dims[k] : dim; }
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

// What a lane holds of a row at a time: elements begin + lane, begin + lane + 32, ... of it, all on their way together.
constexpr int kRowBatch = 8;
constexpr int kRowPanel = 32 * kRowBatch;

struct RowPanel {
  float x[kRowBatch];

  M2D_DEVICE static int column(int begin, int i) {
    return begin + 32 * i + static_cast<int>(threadIdx.x) % 32;
  }
  M2D_DEVICE void load(const float* row, int begin, int width) {
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i) {
      const int d = column(begin, i);
      x[i] = d < width ? row[d] : 0.0f;
    }
  }
};

// take(k, sum of term(panel, i) over chunk k) for every chunk k < chunks, the last of which may be what no prefix
// covers; by one warp, all lanes of which get the sums. load(begin) is the panel of the row from column `begin` on, 0
// beyond it, and is on its way while the panel before is summed.
template <class Real, class Load, class Term, class Take>
M2D_DEVICE void sum_chunks(const GridShape& s, int chunks, const Load& load, const Term& term,
                           const Take& take) {
  int k = 0;
  int first = 0;
  int end = s.chunk_end(0);
  Real sum = 0;
  auto panel = load(0);
#pragma unroll 1
  for (int begin = 0; k < chunks; begin += kRowPanel) {
    const auto next = load(begin + kRowPanel);
#pragma unroll 1
    while (k < chunks && first < begin + kRowPanel) {
#pragma unroll
      for (int i = 0; i < kRowBatch; ++i) {
        const int d = RowPanel::column(begin, i);
        if (d >= first && d < end) sum += term(panel, i);
      }
      if (end > begin + kRowPanel) break;  // goes on in the next panel
      take(k, warp_sum(sum));
      sum = 0;
      first = end;
      if (++k < chunks) end = s.chunk_end(k);
    }
    panel = next;
  }
}

// Norms of row r, by one warp. Lane k holds what belongs to chunk k until all are known.
template <class Real>
M2D_DEVICE void compute_norms(const GridShape& s, const RowSet<Real>& set, int layer, int r) {
  static_assert(kMaxDims < 32);
  const int lane = threadIdx.x % 32;
  const float* row = set.pooled + row_of(set, layer, r) * s.dim;
  Real chunk = 0;
  const auto load = [&](int begin) {
    RowPanel panel;
    panel.load(row, begin, s.dim);
    return panel;
  };
  const auto square = [](const RowPanel& panel, int i) {
    const Real x = static_cast<Real>(panel.x[i]);
    return x * x;
  };
  sum_chunks<Real>(s, s.num_dims + 1, load, square, [&](int k, Real sum) {
    if (lane == k) chunk = sum;
  });
  Real squared = 0;
  Real prefix = 0;
  for (int k = 0; k <= s.num_dims; ++k) {
    squared += __shfl_sync(kAllLanes, chunk, k);
    if (lane == k) prefix = squared;
  }
  const Real full = clamped_inverse_norm(squared);
  if (lane == 0) set.full[row_of(set, layer, r)] = full;
  if (lane >= s.num_dims) return;
  // Measured by |P|, so that nothing over- or underflows.
  const Real factor = s.normalize ? full : Real(1);
  const Real inverse = clamped_inverse_norm(prefix * factor * factor);
  const Real relative = inverse * factor / full;
  PrefixRow<Real>& out = set.prefixes[prefix_of(s, set, layer, lane, r)];
  out.inverse = relative;
  out.squared = is_clamped(inverse) ? Real(0) : relative * relative;
}

// The text whose unit row is sample i of the layer's center, or -1: with fewer texts than samples, some are of no text.
M2D_DEVICE int sample_text(const GridShape& s, int i) {
  const int text = static_cast<int>(static_cast<int64_t>(i) * s.num_texts / kCenterSamples);
  if (s.num_texts >= kCenterSamples) return text;
  return ceil_div(text * kCenterSamples, s.num_texts) == i ? text : -1;
}

// Element d of the layer's center: the mean of its samples but for those without direction.
template <class Real>
M2D_DEVICE float center_element(const GridShape& s, const RowSet<Real>& pooled, int layer, int d) {
  Real full[kCenterSamples];
  float x[kCenterSamples];
  bool exists[kCenterSamples];
#pragma unroll
  for (int i = 0; i < kCenterSamples; ++i) {
    const int text = sample_text(s, i);
    exists[i] = text >= 0;
    const int64_t row = row_of(pooled, layer, exists[i] ? text : 0);
    full[i] = pooled.full[row];
    x[i] = pooled.pooled[row * s.dim + d];
  }
  Real sum = 0;
  float counted = 0.0f;
#pragma unroll
  for (int i = 0; i < kCenterSamples; ++i) {
    if (!exists[i] || is_clamped(full[i])) continue;
    counted += 1.0f;
    sum += full[i] * static_cast<Real>(x[i]);
  }
  return counted > 0.0f ? static_cast<float>(sum / static_cast<Real>(counted)) : 0.0f;
}

// A panel of a row and of its layer's center.
struct CenterPanel {
  RowPanel x, c;
};

// <c, u> of every prefix, gamma, and delta of row r, by one warp; `center_chunks` is |c|^2 of every chunk, and whoever
// asks for it gets that of every prefix. delta may lie where P was.
template <class Real>
M2D_DEVICE void center_row(const GridShape& s, const RowSet<Real>& set, const float* center,
                           const Real* center_chunks, Real* center_squared, int layer, int r) {
  const int lane = threadIdx.x % 32;
  const int64_t row = row_of(set, layer, r);
  const float* pooled = set.pooled + row * s.dim;
  const Real full = set.full[row];
  const auto load = [&](int begin) {
    CenterPanel panel;
    panel.x.load(pooled, begin, s.dim);
    panel.c.load(center, begin, s.dim);
    return panel;
  };
  const auto product = [](const CenterPanel& panel, int i) {
    return static_cast<Real>(panel.c.x[i]) * static_cast<Real>(panel.x.x[i]);
  };
  Real along_chunk = 0;
  sum_chunks<Real>(s, s.num_dims, load, product, [&](int k, Real sum) {
    if (lane == k) along_chunk = sum;
  });
  const Real squared_chunk = lane < s.num_dims ? center_chunks[lane] : Real(0);
  Real along = 0, squared = 0;
  Real my_along = 0, my_squared = 0;
  for (int k = 0; k < s.num_dims; ++k) {
    along += full * __shfl_sync(kAllLanes, along_chunk, k);
    squared += __shfl_sync(kAllLanes, squared_chunk, k);
    if (lane == k) my_along = along;
    if (lane == k) my_squared = squared;
  }
  const bool longer = lane < s.used_dims[layer] && !(2 * my_along >= my_squared);
  const Real gamma = __any_sync(kAllLanes, longer) ? Real(0) : Real(1);
  if (lane < s.num_dims) {
    PrefixRow<Real>& out = set.prefixes[prefix_of(s, set, layer, lane, r)];
    out.along = my_along;
    out.gamma = gamma;
    if (center_squared != nullptr) center_squared[lane] = my_squared;
  }
  if (lane == 0) set.gamma[row] = static_cast<float>(gamma);
  float* delta = set.delta + row * s.dim;
  for (int begin = 0; begin < s.dim; begin += kRowPanel) {
    const CenterPanel panel = load(begin);
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i) {
      const int d = RowPanel::column(begin, i);
      if (d < s.dim) {
        delta[d] = static_cast<float>(full * static_cast<Real>(panel.x.x[i]) -
                                      gamma * static_cast<Real>(panel.c.x[i]));
      }
    }
  }
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
