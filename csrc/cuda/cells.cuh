// The cells of the loss, from centered rows to X and the sums of norm terms.
#pragma once

#include "loss_args.cuh"

namespace m2d::cuda {

// ---- products ----

// <delta_i, delta_j> over each chunk of the dimensions; a block per 64 x 64 tile and chunk.
template <bool kSplit, class Real>
M2D_DEVICE void chunk_products(const LossArgs<Real>& p, const Wave& wave, float* scratch) {
  const GridShape& s = p.shape;
  const RowSet<Real>& others = candidate_rows(p);
  const int column_tiles = ceil_div(s.num_candidates, kTile);
  const int tiles = ceil_div(wave.num_anchors, kTile) * column_tiles;
  const int items = wave.num_layers * tiles * s.num_dims;
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
    multiply<kSplit, false, false>(a, b, s.chunk_begin(k), s.dims[k], scratch, c, [] {});
    // Rows of X are whole vectors: 0 where there is no candidate.
    const int columns = min_of(kTile, static_cast<int>(p.x_stride) - column);
    float* out = x_row(p, w, k, row) + column;
    c.for_each(rows, columns, [&](int i, int j, float value) { out[i * p.x_stride + j] = value; });
  }
}

// ---- cosines ----

template <class Real>
M2D_DEVICE CosineSide<Real> anchor_side(const LossArgs<Real>& p, int layer, int k, int anchor) {
  const GridShape& s = p.shape;
  const PrefixRow<Real> row = p.pooled.prefixes[prefix_of(s, p.pooled, layer, k, anchor)];
  return {row.inverse, row.gamma, row.along - row.gamma * p.center_squared[layer * s.num_dims + k]};
}

template <class Real>
M2D_DEVICE CosineSide<Real> candidate_side(const LossArgs<Real>& p, int layer, int k, int j) {
  const RowSet<Real>& others = candidate_rows(p);
  const PrefixRow<Real> row =
      others.prefixes[prefix_of(p.shape, others, layer, k, first_candidate(p) + j)];
  return {row.inverse, row.gamma, row.along};
}

template <class Real>
M2D_DEVICE Real cosine(const CosineSide<Real>& a, const CosineSide<Real>& b, Real product) {
  return (product + a.gamma * b.along + b.gamma * a.along) * a.inverse * b.inverse;
}

// ---- softmax of each anchor ----

// Cells of an anchor that a warp takes together: one wait for what they read. As registers allow.
template <class Real>
constexpr int kCellGroup = sizeof(Real) == 4 ? 2 : 1;

// Up to so many neighbouring prefixes, from `first` on.
struct CellGroup {
  int first, count;
};

// Group `index` of a layer's cells, by `size`; none of them where it has fewer groups.
M2D_DEVICE CellGroup cell_group(const GridShape& s, int layer, int index, int size) {
  const int first = index * size;
  return {first, min_of(size, s.used_dims[layer] - first)};
}

// Whether any of its cells counts.
M2D_DEVICE bool is_asked(const GridShape& s, int layer, const CellGroup& group) {
  bool asked = false;
  for (int g = 0; g < group.count; ++g) asked = asked || s.weight(layer, group.first + g) != 0.0f;
  return asked;
}

// What one warp sums of an anchor, by cell of a group.
template <class Real>
struct AnchorSums {
  SoftmaxSums<Real> sums[kCellGroup<Real>];
  Real target_cosines[kCellGroup<Real>];  // 0 where the target is not among its candidates
};

// Over candidates [first, end), by one warp that reads each product once.
template <class Real>
M2D_DEVICE void sum_softmax(const LossArgs<Real>& p, int w, int layer, const CellGroup& group,
                            int row, int anchor, int first, int end, AnchorSums<Real>& out) {
  constexpr int kBatch = sizeof(Real) == 4 ? 4 : 2;  // as registers allow
  constexpr int kGroup = kCellGroup<Real>;
  const GridShape& s = p.shape;
  const int target = s.target_offset + anchor;
  const int last = group.first + group.count - 1;
  const float* products = x_row(p, w, 0, row);
  const int64_t chunk_stride = p.wave_anchors * p.x_stride;
  CosineSide<Real> a[kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    a[g] = anchor_side(p, layer, min_of(group.first + g, last), anchor);
    out.sums[g] = {-INFINITY, 0, 0, 0};
    out.target_cosines[g] = 0;
  }
#pragma unroll 1
  for (int begin = first + thread_index() % 32; begin < end; begin += 32 * kBatch) {
    float part[kGroup][kBatch];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
#pragma unroll
      for (int e = 0; e < kBatch; ++e) {
        const int j = begin + 32 * e;
        part[g][e] =
            g < group.count && j < end ? products[(group.first + g) * chunk_stride + j] : 0.0f;
      }
    }
    Real product[kBatch];
#pragma unroll
    for (int e = 0; e < kBatch; ++e) product[e] = 0;
#pragma unroll 2
    for (int chunk = 0; chunk < group.first; ++chunk) {
#pragma unroll
      for (int e = 0; e < kBatch; ++e) {
        const int j = begin + 32 * e;
        if (j < end) product[e] += static_cast<Real>(products[chunk * chunk_stride + j]);
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (g >= group.count) break;
      SoftmaxSums<Real>& sums = out.sums[g];
      Real c[kBatch], weight[kBatch];
      Real max = sums.max;
#pragma unroll
      for (int e = 0; e < kBatch; ++e) {
        const int j = begin + 32 * e;
        product[e] += static_cast<Real>(part[g][e]);
        if (j >= end) continue;
        const CosineSide<Real> b = candidate_side(p, layer, group.first + g, j);
        c[e] = cosine(a[g], b, product[e]);
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
          out.target_cosines[g] = c[e];
          continue;
        }
        const Real logit = rounded_product(static_cast<Real>(s.logit_scale(j, target)), c[e]);
        const Real value = exponential(logit, sums.max);
        sums.others += value;
        sums.weighted += value * weight[e];
        sums.cosines += value * c[e];
      }
    }
  }
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    if (g >= group.count) break;
    out.sums[g].merge_lanes();
    out.target_cosines[g] = __shfl_sync(kAllLanes, out.target_cosines[g], target % 32);
  }
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
  const CosineSide<Real> b = candidate_side(p, layer, k, s.target_offset + anchor);
  const int64_t place = anchor_cell_of(s, layer, k, anchor);
  p.anchor_cells[place] = {anchor_side(p, layer, k, anchor), sums.max, coefficient, sums.others,
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

// One part of an anchor in a group of cells, by one warp; where there is no other, all of it.
template <class Real>
M2D_DEVICE void anchor_group(const LossArgs<Real>& p, int w, int layer, const CellGroup& group,
                             int part, int row, int anchor) {
  const int first = part * kPart;
  const int end = min_of(first + kPart, p.shape.num_candidates);
  const int target = p.shape.target_offset + anchor;
  AnchorSums<Real> found;
  sum_softmax(p, w, layer, group, row, anchor, first, end, found);
  // Lane g goes on with cell g.
  const int lane = thread_index() % 32;
  SoftmaxSums<Real> sums = found.sums[0];
  Real target_cosine = found.target_cosines[0];
#pragma unroll
  for (int g = 1; g < kCellGroup<Real>; ++g) {
    if (lane != g) continue;
    sums = found.sums[g];
    target_cosine = found.target_cosines[g];
  }
  const int k = group.first + lane;
  if (lane >= group.count || p.shape.weight(layer, k) == 0.0f) return;
  if (p.parts == 1) {
    finish_anchor_cell(p, layer, k, anchor, sums, target_cosine);
    return;
  }
  cell_part(p, w, k, part, row) = sums;
  if (target >= first && target < end) p.target_cosines[wave_cell_of(p, w, k, row)] = target_cosine;
}

template <class Real>
M2D_DEVICE void anchor_cells(const LossArgs<Real>& p, const Wave& wave) {
  const GridShape& s = p.shape;
  const int groups = ceil_div(s.num_dims, kCellGroup<Real>);
  const int items = wave.num_layers * groups * wave.num_anchors;
  for_each_by_warp(items * p.parts, [&](int item) {
    const int row = item % wave.num_anchors;
    const int index = item % items / wave.num_anchors;
    const int w = index / groups;
    const int layer = p.active[wave.first_layer + w];
    const CellGroup group = cell_group(s, layer, index % groups, kCellGroup<Real>);
    if (!is_asked(s, layer, group)) return;
    anchor_group(p, w, layer, group, item / items, row, wave.first + row);
  });
}

// The parts of each anchor, in order, by a thread per cell.
template <class Real>
M2D_DEVICE void merge_cell_parts(const LossArgs<Real>& p, const Wave& wave) {
  const GridShape& s = p.shape;
  const int items = wave.num_layers * s.num_dims * wave.num_anchors;
  for (int item = static_cast<int>(blockIdx.x) * kThreads + thread_index(); item < items;
       item += block_count() * kThreads) {
    const int row = item % wave.num_anchors;
    const int k = item / wave.num_anchors % s.num_dims;
    const int w = item / wave.num_anchors / s.num_dims;
    const int layer = p.active[wave.first_layer + w];
    if (s.weight(layer, k) == 0.0f) continue;
    SoftmaxSums<Real> sums = cell_part(p, w, k, 0, row);
    for (int part = 1; part < p.parts; ++part) sums.add(cell_part(p, w, k, part, row));
    finish_anchor_cell(p, layer, k, wave.first + row, sums,
                       p.target_cosines[wave_cell_of(p, w, k, row)]);
  }
}

// ---- X, and the sums down its columns ----

// Cells of a layer that a block takes together, as registers allow.
template <class Real>
constexpr int kColumnGroup = sizeof(Real) == 4 ? 3 : 1;
constexpr int kColumnVector = 2;  // columns of a thread
constexpr int kColumnWidth = 8;   // and of a block: so few that most blocks have some
constexpr int kColumnThreads = kColumnWidth / kColumnVector;  // side by side
constexpr int kColumnRows = kThreads / kColumnThreads;        // one below the other

// Floats of shared memory: the warps' sums, twice, and the candidates' sides.
constexpr int kColumnSums =
    2 * kWarps * kColumnGroup<float> * kColumnWidth * sizeof(RowSums<double>) / sizeof(float);
static_assert(kColumnSums * sizeof(float) + kMaxDims * kColumnWidth * sizeof(CosineSide<double>) <=
              kTileScratch * sizeof(float));

// One thread's columns in one cell.
template <class Real>
struct ColumnSums {
  Real weighted[kColumnVector];
  Real cosines[kColumnVector];

  M2D_DEVICE void clear() {
#pragma unroll
    for (int e = 0; e < kColumnVector; ++e) weighted[e] = cosines[e] = 0;
  }
  // Over the rows of a warp; the first kColumnThreads lanes get the sums.
  M2D_DEVICE void merge_lanes() {
#pragma unroll
    for (int offset = kColumnThreads; offset < 32; offset *= 2) {
#pragma unroll
      for (int e = 0; e < kColumnVector; ++e) {
        weighted[e] += __shfl_xor_sync(kAllLanes, weighted[e], offset);
        cosines[e] += __shfl_xor_sync(kAllLanes, cosines[e], offset);
      }
    }
  }
};

// X of a group of cells in this thread's columns, in place of the products of its chunks: the sum over the prefixes
// from the cell's own on, to which one that is not asked for adds nothing. sides[k * kColumnWidth] is the first of
// these candidates in prefix k.
template <class Real>
M2D_DEVICE void column_group(const LossArgs<Real>& p, const Wave& wave, int w, int layer,
                             const CellGroup& group, int column, const CosineSide<Real>* sides,
                             ColumnSums<Real> (&sums)[kColumnGroup<Real>]) {
  constexpr int kCount = kColumnVector;
  constexpr int kGroup = kColumnGroup<Real>;
  using Vector = FloatVector<kCount>;
  const GridShape& s = p.shape;
  const bool has_above = group.first + group.count < s.used_dims[layer];
  const int64_t chunk_stride = p.wave_anchors * p.x_stride;
  bool asked[kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; ++g)
    asked[g] = g < group.count && s.weight(layer, group.first + g) != 0.0f;
#pragma unroll 1
  for (int row = thread_index() / kColumnThreads; row < wave.num_anchors; row += kColumnRows) {
    const int anchor = wave.first + row;
    const int target = s.target_offset + anchor;
    float* x = x_row(p, w, group.first, row) + column;
    Vector part[kGroup], above{};
    AnchorCell<Real> cell[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (g < group.count) part[g] = *reinterpret_cast<const Vector*>(x + g * chunk_stride);
    }
    if (has_above) above = *reinterpret_cast<const Vector*>(x + group.count * chunk_stride);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (asked[g]) cell[g] = p.anchor_cells[anchor_cell_of(s, layer, group.first + g, anchor)];
    }
    Real product[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) product[e] = 0;
#pragma unroll 2
    for (int chunk = -group.first; chunk < 0; ++chunk) {
      const Vector before = *reinterpret_cast<const Vector*>(x + chunk * chunk_stride);
#pragma unroll
      for (int e = 0; e < kCount; ++e) product[e] += static_cast<Real>(before.x[e]);
    }
    // Of each cell alone, in place of the products.
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (g >= group.count) break;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const int j = column + e;
        product[e] += static_cast<Real>(part[g].x[e]);
        part[g].x[e] = 0.0f;
        if (!asked[g] || j >= s.num_candidates) continue;
        const CosineSide<Real> b = sides[(group.first + g) * kColumnWidth + e];
        const Real c = cosine(cell[g].side, b, product[e]);
        const Real z = static_cast<Real>(s.logit_scale(j, target)) * c;
        const Real gradient =
            cell[g].coefficient * (j == target ? -cell[g].others : exponential(z, cell[g].max));
        sums[g].weighted[e] += gradient * cell[g].side.inverse * cell[g].side.gamma;
        sums[g].cosines[e] += gradient * c;
        part[g].x[e] = static_cast<float>(gradient * cell[g].side.inverse * b.inverse);
      }
    }
#pragma unroll
    for (int g = kGroup - 1; g >= 0; --g) {
      if (g >= group.count) continue;
#pragma unroll
      for (int e = 0; e < kCount; ++e) above.x[e] += part[g].x[e];
      *reinterpret_cast<Vector*>(x + g * chunk_stride) = above;
    }
  }
}

// A block per kColumnWidth columns of a layer, from the last prefixes to the first.
template <class Real>
M2D_DEVICE void columns(const LossArgs<Real>& p, const Wave& wave, float* scratch) {
  constexpr int kGroup = kColumnGroup<Real>;
  const GridShape& s = p.shape;
  // Of each warp, in turn: what one group leaves is read while the next is written, and one barrier a group will do.
  RowSums<Real>* partial = reinterpret_cast<RowSums<Real>*>(scratch);
  const auto place = [](int turn, int warp, int g, int column) {
    return ((turn * kWarps + warp) * kGroup + g) * kColumnWidth + column;
  };
  int turn = 0;
  // Of the block's columns in every prefix.
  auto* sides = reinterpret_cast<CosineSide<Real>*>(scratch + kColumnSums);
  const int thread = thread_index();
  const int warp = thread / 32;
  const int blocks = ceil_div(s.num_candidates, kColumnWidth);
  for (int item = blockIdx.x; item < wave.num_layers * blocks; item += block_count()) {
    const int w = item / blocks;
    const int layer = p.active[wave.first_layer + w];
    const int first = item % blocks * kColumnWidth;
    const int mine = thread % kColumnThreads * kColumnVector;
    for (int i = thread; i < s.used_dims[layer] * kColumnWidth; i += kThreads) {
      const int column = first + i % kColumnWidth;
      if (column < s.num_candidates) sides[i] = candidate_side(p, layer, i / kColumnWidth, column);
    }
    __syncthreads();
    for (int index = ceil_div(s.used_dims[layer], kGroup) - 1; index >= 0; --index) {
      const CellGroup group = cell_group(s, layer, index, kGroup);
      ColumnSums<Real> sums[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) sums[g].clear();
      if (first + mine < s.num_candidates)
        column_group(p, wave, w, layer, group, first + mine, sides + mine, sums);
      turn = 1 - turn;
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        sums[g].merge_lanes();
        if (thread % 32 >= kColumnThreads) continue;
#pragma unroll
        for (int e = 0; e < kColumnVector; ++e)
          partial[place(turn, warp, g, mine + e)] = {sums[g].weighted[e], sums[g].cosines[e]};
      }
      __syncthreads();
      const int g = thread / kColumnWidth;
      const int j = first + thread % kColumnWidth;
      const int k = group.first + g;
      if (g >= group.count || j >= s.num_candidates || s.weight(layer, k) == 0.0f) continue;
      RowSums<Real>& out = p.candidate_sums[candidate_cell_of(s, layer, k, j)];
      RowSums<Real> total = wave.first > 0 ? out : RowSums<Real>{0, 0};
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const RowSums<Real> part = partial[place(turn, i, g, thread % kColumnWidth)];
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
  for_each_by_last_warps(wave.num_layers * s.num_dims, [&](int item) {
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
