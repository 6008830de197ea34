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
  const PrefixRow<Real> row = p.pooled.prefixes[prefix_of(s, p.pooled, layer, k, anchor)];
  return {row.inverse, row.gamma, row.along - row.gamma * p.center_squared[layer * s.num_dims + k]};
}

// Of all candidates in one cell.
template <class Real>
M2D_DEVICE const PrefixRow<Real>* candidate_sides(const LossArgs<Real>& p, int layer, int k) {
  const RowSet<Real>& others = candidate_rows(p);
  return others.prefixes + prefix_of(p.shape, others, layer, k, first_candidate(p));
}

template <class Real>
M2D_DEVICE Real cosine(const AnchorSide<Real>& a, const PrefixRow<Real>& b, Real product) {
  return (product + a.gamma * b.along + b.gamma * a.along) * a.inverse * b.inverse;
}

// ---- softmax of each anchor ----

// The sums of one anchor in one cell over candidates [first, end), by one warp that reads each product once. Lane
// target % 32 gets the target's cosine, where it meets it.
template <class Real>
M2D_DEVICE SoftmaxSums<Real> softmax_sums(const LossArgs<Real>& p, int w, int layer, int k, int row,
                                          int anchor, int first, int end, Real& target_cosine) {
  constexpr int kBatch = 4;
  const GridShape& s = p.shape;
  const int target = s.target_offset + anchor;
  const AnchorSide<Real> a = anchor_side(p, layer, k, anchor);
  const PrefixRow<Real>* candidates = candidate_sides(p, layer, k);
  const float* products = x_row(p, w, 0, row);
  const int64_t chunk_stride = p.wave_anchors * p.x_stride;
  SoftmaxSums<Real> sums{-INFINITY, 0, 0, 0};
  for (int begin = first + thread_index() % 32; begin < end; begin += 32 * kBatch) {
    Real c[kBatch], weight[kBatch];
#pragma unroll
    for (int e = 0; e < kBatch; ++e) c[e] = 0;
#pragma unroll 2
    for (int chunk = 0; chunk <= k; ++chunk) {
#pragma unroll
      for (int e = 0; e < kBatch; ++e) {
        const int j = begin + 32 * e;
        if (j < end) c[e] += static_cast<Real>(products[chunk * chunk_stride + j]);
      }
    }
    Real max = sums.max;
#pragma unroll
    for (int e = 0; e < kBatch; ++e) {
      const int j = begin + 32 * e;
      if (j >= end) continue;
      const PrefixRow<Real> b = candidates[j];
      c[e] = cosine(a, b, c[e]);
      weight[e] = b.inverse * b.gamma;
      const Real logit = rounded_product(static_cast<Real>(s.logit_scale(j, target)), c[e]);
      max = logit > max ? logit : max;
    }
    if (max > sums.max) sums.raise(max);
#pragma unroll
    for (int e = 0; e < kBatch; ++e) {
      const int j = begin + 32 * e;
      if (j >= end) continue;
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
  return sums;
}

// What an anchor's sums in a cell come to, by one thread.
template <class Real>
M2D_DEVICE void finish_anchor_cell(const LossArgs<Real>& p, int layer, int k, int anchor,
                                   const SoftmaxSums<Real>& sums, Real target_cosine) {
  const GridShape& s = p.shape;
  const Real scale = static_cast<Real>(s.scale);
  const Real target_logit =
      rounded_product(scale, target_cosine);  // of the very bits that max has, if it is that
  const Real at_target = exponential(target_logit, sums.max);
  const Real coefficient = static_cast<Real>(s.weight(layer, k)) * scale /
                           static_cast<Real>(s.num_anchors) / (sums.others + at_target);
  const PrefixRow<Real> b = candidate_sides(p, layer, k)[s.target_offset + anchor];
  const int64_t place = anchor_cell_of(s, layer, k, anchor);
  p.anchor_cells[place] = {sums.max, coefficient, sums.others,
                           cross_entropy(sums.others, at_target, sums.max - target_logit)};
  p.anchor_sums[place] = {coefficient * (sums.weighted - sums.others * b.inverse * b.gamma),
                          coefficient * (sums.cosines - sums.others * target_cosine)};
}

// Place of row `row` of the wave in the cell (w, k).
template <class Real>
M2D_DEVICE int64_t wave_cell_of(const LossArgs<Real>& p, int w, int k, int row) {
  return (static_cast<int64_t>(w) * p.shape.num_dims + k) * p.wave_anchors + row;
}
template <class Real>
M2D_DEVICE SoftmaxSums<Real>& cell_part(const LossArgs<Real>& p, int w, int k, int part, int row) {
  return p.cell_parts[((static_cast<int64_t>(w) * p.shape.num_dims + k) * p.parts + part) *
                          p.wave_anchors +
                      row];
}

// One part of an anchor in one cell, by one warp; where there is no other, all of it.
template <class Real>
M2D_DEVICE void anchor_cell(const LossArgs<Real>& p, int w, int layer, int k, int part, int row,
                            int anchor) {
  const int first = part * kPart;
  const int end = min_of(first + kPart, p.shape.num_candidates);
  const int target = p.shape.target_offset + anchor;
  Real target_cosine = 0;
  const SoftmaxSums<Real> sums =
      softmax_sums(p, w, layer, k, row, anchor, first, end, target_cosine);
  target_cosine = __shfl_sync(kAllLanes, target_cosine, target % 32);
  if (thread_index() % 32 != 0) return;
  if (p.parts == 1) {
    finish_anchor_cell(p, layer, k, anchor, sums, target_cosine);
    return;
  }
  cell_part(p, w, k, part, row) = sums;
  if (target >= first && target < end) p.target_cosines[wave_cell_of(p, w, k, row)] = target_cosine;
}

// body(w, layer, k, row) of cell `item` of all of the wave's anchors.
template <class Real, class Body>
M2D_DEVICE void visit_anchor_cell(const LossArgs<Real>& p, const Wave& wave, int item,
                                  const Body& body) {
  const GridShape& s = p.shape;
  const int cell = item / wave.num_anchors;
  const int k = cell % s.num_dims;
  const int w = cell / s.num_dims;
  const int layer = p.active[wave.first_layer + w];
  if (s.weight(layer, k) != 0.0f) body(w, layer, k, item % wave.num_anchors);
}
template <class Real>
M2D_DEVICE int num_anchor_cells(const LossArgs<Real>& p, const Wave& wave) {
  return wave.num_layers * p.shape.num_dims * wave.num_anchors;
}

template <class Real>
M2D_DEVICE void anchor_cells(const LossArgs<Real>& p, const Wave& wave) {
  const int cells = num_anchor_cells(p, wave);
  for_each_by_warp(cells * p.parts, [&](int item) {
    visit_anchor_cell(p, wave, item % cells, [&](int w, int layer, int k, int row) {
      anchor_cell(p, w, layer, k, item / cells, row, wave.first + row);
    });
  });
}

// The parts of each anchor, in order, by a thread per cell.
template <class Real>
M2D_DEVICE void merge_cell_parts(const LossArgs<Real>& p, const Wave& wave) {
  const int cells = num_anchor_cells(p, wave);
  for (int item = static_cast<int>(blockIdx.x) * kThreads + thread_index(); item < cells;
       item += block_count() * kThreads) {
    visit_anchor_cell(p, wave, item, [&](int w, int layer, int k, int row) {
      SoftmaxSums<Real> sums = cell_part(p, w, k, 0, row);
      for (int part = 1; part < p.parts; ++part) sums.add(cell_part(p, w, k, part, row));
      finish_anchor_cell(p, layer, k, wave.first + row, sums,
                         p.target_cosines[wave_cell_of(p, w, k, row)]);
    });
  }
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
  PrefixRow<Real> b[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    b[e] = asked && column + e < s.num_candidates ? candidate_sides(p, layer, k)[column + e]
                                                  : PrefixRow<Real>{0, 0, 0, 0};
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
