// The cells of the loss, from centered rows to X and the sums of norm terms.
#pragma once

#include "loss_args.cuh"

namespace m2d::cuda {

// ---- products ----

// Tiles of the wave's products.
template <class Real>
M2D_DEVICE int num_product_tiles(const LossArgs<Real>& p, const Wave& wave) {
  return wave.num_layers * ceil_div(wave.num_anchors, kTile) *
         ceil_div(p.shape.num_candidates, kTile) * p.shape.num_dims;
}

// <delta_i, delta_j> over each chunk of the dimensions; a block per 64 x 64 tile and chunk.
template <bool kSplit, class Real>
M2D_DEVICE void chunk_products(const LossArgs<Real>& p, const Wave& wave, float* scratch) {
  const GridShape& s = p.shape;
  const RowSet<Real>& others = candidate_rows(p);
  const int column_tiles = ceil_div(s.num_candidates, kTile);
  const int tiles = ceil_div(wave.num_anchors, kTile) * column_tiles;
  const int items = num_product_tiles(p, wave);
  for (int item = blockIdx.x; item < items; item += block_count()) {
    // The last chunks, often the widest, first.
    const int k = s.num_dims - 1 - item % s.num_dims;
    const int tile = item / s.num_dims % tiles;
    const int w = item / s.num_dims / tiles;
    const int layer = p.active[wave.first_layer + w];
    if (k >= s.used_dims[layer]) continue;
    const int row = tile / column_tiles * kTile;
    const int column = tile % column_tiles * kTile;
    const int rows = min_of(kTile, wave.num_anchors - row);
    const Operand a{p.pooled.delta + row_of(p.pooled, layer, wave.first + row) * s.dim, s.dim,
                    rows};
    const Operand b{others.delta + row_of(others, layer, first_candidate(p) + column) * s.dim,
                    s.dim, min_of(kTile, s.num_candidates - column)};
    Accumulator c;
    c.clear();
    multiply<kSplit, false, false>(a, b, s.chunk_begin(k), s.dims[k], scratch, c);
    // Rows of X are whole vectors: 0 where there is no candidate.
    const int columns = min_of(kTile, static_cast<int>(p.x_stride) - column);
    float* out = x_row(p, w, k, row) + column;
    c.for_each(rows, columns, [&](int i, int j, float value) { out[i * p.x_stride + j] = value; });
  }
}

// ---- cosines ----

// An anchor's side of its cosines.
template <class Real>
struct AnchorSide {
  Real inverse;  // i_k
  Real gamma;
  Real along;  // <c, u>_k - gamma |c_k|^2
};

template <class Real>
M2D_DEVICE AnchorSide<Real> anchor_side(const LossArgs<Real>& p, int layer, int k, int anchor) {
  const GridShape& s = p.shape;
  const int64_t place = prefix_of(s, p.pooled, layer, k, anchor);
  const Real gamma = static_cast<Real>(p.pooled.gamma[row_of(p.pooled, layer, anchor)]);
  return {p.pooled.prefix[place], gamma,
          p.pooled.along[place] - gamma * p.center_squared[layer * s.num_dims + k]};
}

// A candidate's side.
template <class Real>
struct CandidateSide {
  Real inverse;  // i_k
  Real gamma;
  Real along;  // <c, u>_k
};

// Of all candidates in one cell.
template <class Real>
struct CandidateSides {
  const Real* inverse;
  const Real* along;
  const float* gamma;

  M2D_DEVICE CandidateSide<Real> operator[](int j) const {
    return {inverse[j], static_cast<Real>(gamma[j]), along[j]};
  }
};

template <class Real>
M2D_DEVICE CandidateSides<Real> candidate_sides(const LossArgs<Real>& p, int layer, int k) {
  const RowSet<Real>& others = candidate_rows(p);
  const int64_t place = prefix_of(p.shape, others, layer, k, first_candidate(p));
  return {others.prefix + place, others.along + place,
          others.gamma + row_of(others, layer, first_candidate(p))};
}

template <class Real>
M2D_DEVICE Real cosine(const AnchorSide<Real>& a, const CandidateSide<Real>& b, Real product) {
  return (product + a.gamma * b.along + b.gamma * a.along) * a.inverse * b.inverse;
}

// ---- softmax of each anchor ----

// Sums over candidates but for the target, of e = exp(Z - max), of which `max` may still grow. The gradient needs the
// others' sum to full relative accuracy.
template <class Real>
struct SoftmaxSums {
  Real max, others;
  Real weighted;  // e i_j gamma_j
  Real cosines;   // e C

  M2D_DEVICE void raise(Real new_max) {
    const Real factor = exponential(max, new_max);
    others *= factor;
    weighted *= factor;
    cosines *= factor;
    max = new_max;
  }

  M2D_DEVICE void merge_lanes() {
    const Real highest = warp_max(max);
    if (max < highest) raise(highest);
    others = warp_sum(others);
    weighted = warp_sum(weighted);
    cosines = warp_sum(cosines);
  }
};

// The normaliser and the sums of one anchor in one cell, by one warp that reads each product once.
template <class Real>
M2D_DEVICE void anchor_cell(const LossArgs<Real>& p, int w, int layer, int k, int row, int anchor) {
  constexpr int kBatch = 4;
  const GridShape& s = p.shape;
  const int lane = thread_index() % 32;
  const int m = s.num_candidates;
  const int target = s.target_offset + anchor;
  const AnchorSide<Real> a = anchor_side(p, layer, k, anchor);
  const CandidateSides<Real> candidates = candidate_sides(p, layer, k);
  const float* products = x_row(p, w, 0, row);
  const int64_t chunk_stride = p.wave_anchors * p.x_stride;
  SoftmaxSums<Real> sums{-INFINITY, 0, 0, 0};
  Real target_cosine = 0;
  for (int begin = lane; begin < m; begin += 32 * kBatch) {
    Real c[kBatch], weight[kBatch];
#pragma unroll
    for (int e = 0; e < kBatch; ++e) c[e] = 0;
#pragma unroll 2
    for (int chunk = 0; chunk <= k; ++chunk) {
#pragma unroll
      for (int e = 0; e < kBatch; ++e) {
        const int j = begin + 32 * e;
        if (j < m) c[e] += static_cast<Real>(products[chunk * chunk_stride + j]);
      }
    }
    Real max = sums.max;
#pragma unroll
    for (int e = 0; e < kBatch; ++e) {
      const int j = begin + 32 * e;
      if (j >= m) continue;
      const CandidateSide<Real> b = candidates[j];
      c[e] = cosine(a, b, c[e]);
      weight[e] = b.inverse * b.gamma;
      const Real logit = rounded_product(static_cast<Real>(s.logit_scale(j, target)), c[e]);
      max = logit > max ? logit : max;
    }
    if (max > sums.max) sums.raise(max);
#pragma unroll
    for (int e = 0; e < kBatch; ++e) {
      const int j = begin + 32 * e;
      if (j >= m) continue;
      if (j == target) {
        target_cosine = c[e];
        continue;
      }
      const Real logit = rounded_product(static_cast<Real>(s.logit_scale(j, target)), c[e]);
      const Real value = exponential(logit, sums.max);
      sums.others += value;
      sums.weighted += value * weight[e];
      sums.cosines += value * c[e];
    }
  }
  sums.merge_lanes();
  target_cosine = __shfl_sync(kAllLanes, target_cosine, target % 32);
  if (lane != 0) return;
  const Real scale = static_cast<Real>(s.scale);
  const Real target_logit =
      rounded_product(scale, target_cosine);  // of the very bits that max has, if it is that
  const Real at_target = exponential(target_logit, sums.max);
  const Real coefficient = static_cast<Real>(s.weight(layer, k)) * scale /
                           static_cast<Real>(s.num_anchors) / (sums.others + at_target);
  const CandidateSide<Real> b = candidates[target];
  const int64_t place = anchor_cell_of(s, layer, k, anchor);
  p.anchor_cells[place] = {sums.max, coefficient, sums.others,
                           cross_entropy(sums.others, at_target, sums.max - target_logit)};
  p.anchor_sums[place] = {coefficient * (sums.weighted - sums.others * b.inverse * b.gamma),
                          coefficient * (sums.cosines - sums.others * target_cosine)};
}

template <class Real>
M2D_DEVICE void anchor_cells(const LossArgs<Real>& p, const Wave& wave) {
  const GridShape& s = p.shape;
  for_each_by_warp(wave.num_layers * s.num_dims * wave.num_anchors, [&](int item) {
    const int cell = item / wave.num_anchors;
    const int row = item % wave.num_anchors;
    const int w = cell / s.num_dims;
    const int k = cell % s.num_dims;
    const int layer = p.active[wave.first_layer + w];
    if (s.weight(layer, k) != 0.0f) anchor_cell(p, w, layer, k, row, wave.first + row);
  });
}

// ---- X, and the sums down its columns ----

constexpr int kColumnThreads = 4;                       // side by side
constexpr int kColumnRows = kThreads / kColumnThreads;  // one below the other
template <class Real>
constexpr int kColumnVector = sizeof(Real) == 4 ? 4 : 2;  // columns of a thread, as registers allow
template <class Real>
constexpr int kColumnWidth = kColumnVector<Real> * kColumnThreads;  // columns of a block
static_assert(2 * kWarps * kColumnWidth<float> * sizeof(RowSums<double>) <=
              kTileScratch * sizeof(float));

// One thread's columns in cell k.
template <class Real>
struct ColumnSums {
  Real weighted[kColumnVector<Real>];
  Real cosines[kColumnVector<Real>];

  M2D_DEVICE void clear() {
#pragma unroll
    for (int e = 0; e < kColumnVector<Real>; ++e) weighted[e] = cosines[e] = 0;
  }
  // Over the rows of a warp; the first kColumnThreads lanes get the sums.
  M2D_DEVICE void merge_lanes() {
#pragma unroll
    for (int offset = kColumnThreads; offset < 32; offset *= 2) {
#pragma unroll
      for (int e = 0; e < kColumnVector<Real>; ++e) {
        weighted[e] += __shfl_xor_sync(kAllLanes, weighted[e], offset);
        cosines[e] += __shfl_xor_sync(kAllLanes, cosines[e], offset);
      }
    }
  }
};

// X of cell k in this thread's columns. The products of chunk k become X, to which the sum over the prefixes above is
// added where there is one. A cell that is not asked for only hands on the suffix sums.
template <class Real>
M2D_DEVICE void column_cell(const LossArgs<Real>& p, const Wave& wave, int w, int layer, int k,
                            int column, ColumnSums<Real>& sums) {
  constexpr int kCount = kColumnVector<Real>;
  constexpr int kChunks = sizeof(Real) == 4 ? 2 : 1;  // on their way at a time, as registers allow
  using Vector = FloatVector<kCount>;
  const GridShape& s = p.shape;
  const bool asked = s.weight(layer, k) != 0.0f;
  const bool has_above = k + 1 < s.used_dims[layer];
  const int64_t chunk_stride = p.wave_anchors * p.x_stride;
  CandidateSide<Real> b[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    b[e] = asked && column + e < s.num_candidates ? candidate_sides(p, layer, k)[column + e]
                                                  : CandidateSide<Real>{0, 0, 0};
  }
#pragma unroll 1
  for (int row = thread_index() / kColumnThreads; row < wave.num_anchors; row += kColumnRows) {
    float* x = x_row(p, w, k, row) + column;
    Vector out{};
    if (has_above) out = *reinterpret_cast<const Vector*>(x + chunk_stride);
    if (asked) {
      Real product[kCount];
#pragma unroll
      for (int e = 0; e < kCount; ++e) product[e] = 0;
#pragma unroll kChunks
      for (int chunk = 0; chunk <= k; ++chunk) {
        const Vector part = *reinterpret_cast<const Vector*>(x + (chunk - k) * chunk_stride);
#pragma unroll
        for (int e = 0; e < kCount; ++e) product[e] += static_cast<Real>(part.x[e]);
      }
      const int anchor = wave.first + row;
      const int target = s.target_offset + anchor;
      const AnchorSide<Real> a = anchor_side(p, layer, k, anchor);
      const AnchorCell<Real> cell = p.anchor_cells[anchor_cell_of(s, layer, k, anchor)];
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const int j = column + e;
        if (j >= s.num_candidates) continue;
        const Real c = cosine(a, b[e], product[e]);
        const Real z = static_cast<Real>(s.logit_scale(j, target)) * c;
        const Real g = cell.coefficient * (j == target ? -cell.others : exponential(z, cell.max));
        sums.weighted[e] += g * a.inverse * a.gamma;
        sums.cosines[e] += g * c;
        out.x[e] += static_cast<float>(g * a.inverse * b[e].inverse);
      }
    }
    *reinterpret_cast<Vector*>(x) = out;
  }
}

// A block per kColumnWidth columns of a layer, from the last prefix to the first.
template <class Real>
M2D_DEVICE void columns(const LossArgs<Real>& p, const Wave& wave, float* scratch) {
  const GridShape& s = p.shape;
  // Of each warp, in turn: what one cell leaves is read while the next is written, and one barrier a cell will do.
  RowSums<Real>* partial = reinterpret_cast<RowSums<Real>*>(scratch);
  const auto place = [](int turn, int warp, int column) {
    return (turn * kWarps + warp) * kColumnWidth<Real> + column;
  };
  int turn = 0;
  const int thread = thread_index();
  const int warp = thread / 32;
  const int blocks = ceil_div(s.num_candidates, kColumnWidth<Real>);
  for (int item = blockIdx.x; item < wave.num_layers * blocks; item += block_count()) {
    const int w = item / blocks;
    const int layer = p.active[wave.first_layer + w];
    const int first = item % blocks * kColumnWidth<Real>;
    const int mine = thread % kColumnThreads * kColumnVector<Real>;
    for (int k = s.used_dims[layer] - 1; k >= 0; --k) {
      ColumnSums<Real> sums;
      sums.clear();
      if (first + mine < s.num_candidates) column_cell(p, wave, w, layer, k, first + mine, sums);
      if (s.weight(layer, k) == 0.0f) continue;
      turn = 1 - turn;
      sums.merge_lanes();
      if (thread % 32 < kColumnThreads) {
#pragma unroll
        for (int e = 0; e < kColumnVector<Real>; ++e)
          partial[place(turn, warp, mine + e)] = {sums.weighted[e], sums.cosines[e]};
      }
      __syncthreads();
      const int j = first + thread;
      if (thread >= kColumnWidth<Real> || j >= s.num_candidates) continue;
      RowSums<Real>& out = p.candidate_sums[candidate_cell_of(s, layer, k, j)];
      RowSums<Real> total = wave.first > 0 ? out : RowSums<Real>{0, 0};
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const RowSums<Real> part = partial[place(turn, i, thread)];
        total.weighted += part.weighted;
        total.cosines += part.cosines;
      }
      out = total;
    }
  }
}

// Cross-entropies of the wave's cells.
template <class Real>
M2D_DEVICE void cell_means(const LossArgs<Real>& p, const Wave& wave) {
  const GridShape& s = p.shape;
  for_each_by_warp(wave.num_layers * s.num_dims, [&](int item) {
    const int layer = p.active[wave.first_layer + item / s.num_dims];
    const int k = item % s.num_dims;
    if (s.weight(layer, k) == 0.0f) return;
    const AnchorCell<Real>* anchors = p.anchor_cells + anchor_cell_of(s, layer, k, 0);
    const Real mean =
        warp_mean<Real>(s.num_anchors, [&](int i) { return anchors[i].cross_entropy; });
    if (threadIdx.x % 32 == 0) p.cell_means[layer * s.num_dims + k] = mean;
  });
}

}  // namespace m2d::cuda
