// dP: the products of X with the other side's rows, and to each element, while its sum is in shared memory, the norm
// terms, the KL and the Jacobian of Normalize.
#pragma once

#include "kl.cuh"

namespace m2d::cuda {

// Up to kTile columns of one chunk.
struct ColumnBlock {
  int k, begin, width;
};

M2D_DEVICE int num_column_blocks(const GridShape& s) {
  int count = 0;
  for (int k = 0; k <= s.num_dims; ++k) count += ceil_div(s.chunk_end(k) - s.chunk_begin(k), kTile);
  return count;
}

M2D_DEVICE ColumnBlock column_block(const GridShape& s, int index) {
  int k = 0;
  int blocks = ceil_div(s.chunk_end(0) - s.chunk_begin(0), kTile);
  while (index >= blocks) {
    index -= blocks;
    ++k;
    blocks = ceil_div(s.chunk_end(k) - s.chunk_begin(k), kTile);
  }
  const int begin = s.chunk_begin(k) + index * kTile;
  return {k, begin, min_of(kTile, s.chunk_end(k) - begin)};
}

// What all elements of a row's chunk share:
//
//   du = sum X delta + alpha c - rho u,   dE = du / f + dKL/dE,   dP = (dE - <u, dE> u) / |P| where E is normalised
//
// A cosine does not change with the length of either side, so that a cell adds nothing to <u, dE>, unless its prefix's
// norm is clamped and has no gradient: then it adds sum_j G C.
template <class Real>
struct RowTerms {
  Real gamma, factor;
  Real alpha, rho;
  Real full, along;                                          // 1 / f = 1 / |P|, and <u, dE>
  Real teacher_gamma, teacher_factor, teacher_lse, lse_gap;  // where there is a KL
};

// Rows of one layer from some row on, and dP of their elements, kCount neighbours at a time.
template <class Real>
struct GradientRows {
  const float *delta, *center;
  const float *teacher_delta, *teacher_center;
  float* grad;
  int dim;
  bool normalize, has_kl;
  Real kl_coefficient, inverse_temperature;

  M2D_DEVICE int64_t place(int row, int d) const { return static_cast<int64_t>(row) * dim + d; }

  M2D_DEVICE Real kl(const RowTerms<Real>& terms, Real own_unit, float delta_of_teacher,
                     float center_of_teacher) const {
    const Real teacher_unit = static_cast<Real>(delta_of_teacher) +
                              terms.teacher_gamma * static_cast<Real>(center_of_teacher);
    const Real taught = teacher_unit * terms.teacher_factor * inverse_temperature;
    const Real own = terms.factor * own_unit * inverse_temperature;
    return kl_coefficient *
           probability_difference(taught - terms.teacher_lse, own - taught - terms.lse_gap);
  }

  // Of elements d, d + 1, ..., whose sums over X are given.
  template <int kCount>
  M2D_DEVICE void finish(const RowTerms<Real>& terms, int row, int d,
                         const FloatVector<kCount>& sums) const {
    using Vector = FloatVector<kCount>;
    const auto load = [](const float* source) { return *reinterpret_cast<const Vector*>(source); };
    const Vector u = load(delta + place(row, d));
    const Vector c = load(center + d);
    Vector u_of_teacher{}, c_of_teacher{};
    if (has_kl) {
      u_of_teacher = load(teacher_delta + place(row, d));
      c_of_teacher = load(teacher_center + d);
    }
    Vector out;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const Real center_element = static_cast<Real>(c.x[e]);
      const Real unit = static_cast<Real>(u.x[e]) + terms.gamma * center_element;
      const Real cells =
          static_cast<Real>(sums.x[e]) + terms.alpha * center_element - terms.rho * unit;
      Real value = normalize ? cells : terms.full * cells;
      if (has_kl) value += kl(terms, unit, u_of_teacher.x[e], c_of_teacher.x[e]);
      if (normalize) value = terms.full * (value - terms.along * unit);
      out.x[e] = static_cast<float>(value);
    }
    *reinterpret_cast<Vector*>(grad + place(row, d)) = out;
  }
};

template <class Real>
M2D_DEVICE GradientRows<Real> gradient_rows(const LossArgs<Real>& p, bool is_pooled, int layer,
                                            int first) {
  const GridShape& s = p.shape;
  const RowSet<Real>& set = row_set(p, is_pooled);
  const bool has_kl = is_pooled && s.kl_weights[layer] != 0.0f;
  const int64_t begin = row_of(set, layer, first) * s.dim;
  const int teacher = s.num_layers - 1;
  return {set.delta + begin,
          p.centers + static_cast<int64_t>(layer) * s.dim,
          has_kl ? set.delta + row_of(set, teacher, first) * s.dim : nullptr,
          p.centers + static_cast<int64_t>(teacher) * s.dim,
          set.grad + begin,
          s.dim,
          s.normalize,
          has_kl,
          has_kl ? kl_coefficient<Real>(s, layer) : Real(0),
          1 / static_cast<Real>(s.kl_temperature)};
}

// Where the sums of a row's cells stand: of prefix k at sums[k * stride]. nullptr: the row is in no cell.
template <class Real>
struct CellsOfRow {
  const RowSums<Real>* sums;
  int64_t stride;
};

template <class Real>
M2D_DEVICE CellsOfRow<Real> cells_of_row(const LossArgs<Real>& p, bool is_pooled, int layer,
                                         int r) {
  const GridShape& s = p.shape;
  const bool is_anchor = is_pooled && r < s.num_anchors;
  if (s.used_dims[layer] == 0 || (is_pooled && !is_anchor && s.gathered)) return {nullptr, 0};
  if (is_anchor) return {p.anchor_sums + anchor_cell_of(s, layer, 0, r), s.num_anchors};
  const int candidate = is_pooled ? r - s.num_anchors : r;
  return {p.candidate_sums + candidate_cell_of(s, layer, 0, candidate), s.num_candidates};
}

// What a row's cells add to its terms.
template <class Real>
struct CellTerms {
  Real alpha, rho, along;

  // Over `count` neighbouring lanes, a power of 2: all of them get the sums.
  M2D_DEVICE void merge_lanes(int count) {
    for (int offset = 1; offset < count; offset *= 2) {
      alpha += __shfl_xor_sync(kAllLanes, alpha, offset);
      rho += __shfl_xor_sync(kAllLanes, rho, offset);
      along += __shfl_xor_sync(kAllLanes, along, offset);
    }
  }
};

// Of the elements of chunk k: what prefixes first, first + step, ... add.
template <class Real>
M2D_DEVICE CellTerms<Real> cell_terms(const LossArgs<Real>& p, bool is_pooled, int layer, int r,
                                      int k, int first, int step) {
  const GridShape& s = p.shape;
  const RowSet<Real>& set = row_set(p, is_pooled);
  const CellsOfRow<Real> cells = cells_of_row(p, is_pooled, layer, r);
  const int used = cells.sums == nullptr ? 0 : s.used_dims[layer];
  CellTerms<Real> terms{};
  for (int i = first; i < used; i += step) {
    if (s.weight(layer, i) == 0.0f) continue;
    const PrefixRow<Real> row = set.prefixes[prefix_of(s, set, layer, i, r)];
    const RowSums<Real> sums = cells.sums[i * cells.stride];
    if (i >= k) terms.alpha += row.inverse * sums.weighted;
    if (i >= k) terms.rho += row.squared * sums.cosines;
    if (row.squared == 0) terms.along += sums.cosines;
  }
  return terms;
}

template <class Real>
M2D_DEVICE RowTerms<Real> row_terms(const LossArgs<Real>& p, bool is_pooled, int layer, int r,
                                    const CellTerms<Real>& cells) {
  const GridShape& s = p.shape;
  const RowSet<Real>& set = row_set(p, is_pooled);
  const int64_t row = row_of(set, layer, r);
  RowTerms<Real> terms{};
  const auto factor_of = [&](int64_t i) { return s.normalize ? Real(1) : 1 / set.full[i]; };
  terms.gamma = static_cast<Real>(set.gamma[row]);
  terms.factor = factor_of(row);
  terms.full = set.full[row];
  terms.alpha = cells.alpha;
  terms.rho = cells.rho;
  terms.along = cells.along;
  if (is_pooled && s.kl_weights[layer] != 0.0f) {
    const int64_t teacher = row_of(set, s.num_layers - 1, r);
    const KlRow<Real> kl = p.kl_rows[row];
    terms.teacher_gamma = static_cast<Real>(set.gamma[teacher]);
    terms.teacher_factor = factor_of(teacher);
    terms.teacher_lse = kl.teacher_lse;
    terms.lse_gap = kl.lse_gap;
    terms.along += kl.along;
  }
  // Where |P| is clamped E = P / eps, and only the factor remains.
  if (is_clamped(terms.full)) terms.along = 0;
  return terms;
}

// A tile of rows in one column block: anchors, or candidates.
struct GradientTile {
  int w, layer;
  bool is_anchors;
  int first, rows;  // among the wave's anchors, or among all candidates
  ColumnBlock block;
  int part;  // of the candidates that anchors multiply with
};

// The products with X. An anchor's run over a part of the candidates; a candidate's over the wave's anchors.
template <bool kSplit, class Real, class Meanwhile>
M2D_DEVICE void multiply_x(const LossArgs<Real>& p, const Wave& wave, const GradientTile& tile,
                           float* scratch, Accumulator& c, const Meanwhile& meanwhile) {
  const GridShape& s = p.shape;
  const RowSet<Real>& others = candidate_rows(p);
  const ColumnBlock& block = tile.block;
  if (tile.is_anchors) {
    const Operand x{x_row(p, tile.w, block.k, tile.first), p.x_stride, tile.rows};
    const Operand delta{
        others.delta + row_of(others, tile.layer, first_candidate(p)) * s.dim + block.begin, s.dim,
        block.width};
    const int begin = tile.part * kPart;
    multiply<kSplit, false, true>(x, delta, begin, min_of(begin + kPart, s.num_candidates), scratch,
                                  c, meanwhile);
  } else {
    const Operand x{x_row(p, tile.w, block.k, 0) + tile.first, p.x_stride, tile.rows};
    const Operand delta{
        p.pooled.delta + row_of(p.pooled, tile.layer, wave.first) * s.dim + block.begin, s.dim,
        block.width};
    multiply<kSplit, true, true>(x, delta, 0, wave.num_anchors, scratch, c, meanwhile);
  }
}

// Whether vectors of a tile's elements start at multiples of 16 bytes wherever they lie.
template <class Real>
M2D_DEVICE bool has_vectors(const GradientRows<Real>& rows, const ColumnBlock& block) {
  return (block.begin | block.width | rows.dim) % 4 == 0 &&
         reinterpret_cast<uintptr_t>(rows.grad) % 16 == 0;
}

// From the sums of a tile to dP, or to what the next wave goes on with.
template <int kCount, class Real>
M2D_DEVICE void finish_elements(const GradientRows<Real>& rows, const GradientTile& tile,
                                const RowTerms<Real>* terms, const float* sums, bool is_complete,
                                bool continues) {
  constexpr int kVectors = kTile / kCount;
#pragma unroll 1
  for (int i = thread_index(); i < tile.rows * kVectors; i += kThreads) {
    const int row = i / kVectors;
    const int column = i % kVectors * kCount;
    if (column >= tile.block.width) continue;
    const int d = tile.block.begin + column;
    auto sum = *reinterpret_cast<const FloatVector<kCount>*>(sums + row * kTileStride + column);
    auto& out = *reinterpret_cast<FloatVector<kCount>*>(rows.grad + rows.place(row, d));
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum.x[e] += continues ? out.x[e] : 0.0f;
    if (is_complete) {
      rows.finish(terms[row], row, d, sum);
    } else {
      out = sum;
    }
  }
}

// Of the rows of the tile that a block is at.
template <class Real>
M2D_DEVICE RowTerms<Real>* shared_terms() {
  M2D_SHARED(RowTerms<Real>, terms, [kTile]);
  return terms;
}

// Whose sums are complete: a candidate's with the last anchors.
M2D_DEVICE bool is_complete(const Wave& wave, const GradientTile& tile) {
  return tile.is_anchors || wave.is_last;
}

// Row 0 of the tile among the pooled rows, or the gathered.
template <class Real>
M2D_DEVICE int first_row(const LossArgs<Real>& p, const Wave& wave, const GradientTile& tile) {
  return tile.is_anchors ? wave.first + tile.first : first_candidate(p) + tile.first;
}

// Some threads per row, each of which reads a few of its prefixes.
template <class Real>
M2D_DEVICE void load_terms(const LossArgs<Real>& p, const Wave& wave, const GradientTile& tile) {
  constexpr int kThreadsOfRow = kThreads / kTile;
  if (!is_complete(wave, tile)) return;
  const bool is_pooled = tile.is_anchors || !p.shape.gathered;
  const int row = thread_index() / kThreadsOfRow;
  const int mine = thread_index() % kThreadsOfRow;
  const int r = first_row(p, wave, tile) + row;
  CellTerms<Real> cells{};
  if (row < tile.rows)
    cells = cell_terms(p, is_pooled, tile.layer, r, tile.block.k, mine, kThreadsOfRow);
  cells.merge_lanes(kThreadsOfRow);
  if (row < tile.rows && mine == 0)
    shared_terms<Real>()[row] = row_terms(p, is_pooled, tile.layer, r, cells);
}

// With the terms and sums in shared memory, which the block has written.
template <class Real>
M2D_DEVICE void finish_tile(const LossArgs<Real>& p, const Wave& wave, const GradientTile& tile,
                            const float* sums) {
  const bool is_pooled = tile.is_anchors || !p.shape.gathered;
  const bool in_cells = tile.block.k < p.shape.used_dims[tile.layer];
  const bool continues = in_cells && !tile.is_anchors && wave.first > 0;
  const bool complete = is_complete(wave, tile);
  const RowTerms<Real>* terms = shared_terms<Real>();
  __syncthreads();
  const GradientRows<Real> rows = gradient_rows(p, is_pooled, tile.layer, first_row(p, wave, tile));
  if (has_vectors(rows, tile.block)) {
    finish_elements<4>(rows, tile, terms, sums, complete, continues);
  } else {
    finish_elements<1>(rows, tile, terms, sums, complete, continues);
  }
  __syncthreads();  // before the terms and sums of the next tile
}

template <bool kSplit, class Real>
M2D_DEVICE void gradient_tile(const LossArgs<Real>& p, const Wave& wave, const GradientTile& tile,
                              float* scratch) {
  const bool is_part = tile.is_anchors && p.parts > 1;
  const auto terms = [&] {
    if (!is_part) load_terms(p, wave, tile);
  };
  Accumulator c;
  c.clear();
  if (tile.block.k < p.shape.used_dims[tile.layer]) {
    multiply_x<kSplit>(p, wave, tile, scratch, c, terms);
  } else {
    terms();
  }
  if (is_part) {
    float* out = gradient_part(p, tile.w, tile.part, tile.first) + tile.block.begin;
    c.for_each(tile.rows, tile.block.width, [&](int row, int column, float value) {
      out[static_cast<int64_t>(row) * p.shape.dim + column] = value;
    });
    return;
  }
  // By way of shared memory, so that a thread has neighbouring columns, and the code of an element is there once.
  c.for_each(kTile, kTile, [&](int row, int column, float value) {
    scratch[row * kTileStride + column] = value;
  });
  finish_tile(p, wave, tile, scratch);
}

// Of a layer's rows: those of the wave's anchors, once for each part, then those of all candidates.
template <class Real>
M2D_DEVICE int num_row_tiles(const LossArgs<Real>& p, const Wave& wave) {
  return ceil_div(wave.num_anchors, kTile) * p.parts + ceil_div(p.shape.num_candidates, kTile);
}

template <class Real>
M2D_DEVICE GradientTile gradient_tile_at(const LossArgs<Real>& p, const Wave& wave, int index) {
  const int blocks = num_column_blocks(p.shape);
  const int anchor_tiles = ceil_div(wave.num_anchors, kTile);
  const int tiles = num_row_tiles(p, wave);
  const int w = index / blocks / tiles;
  const int tile = index / blocks % tiles;
  const bool is_anchors = tile < anchor_tiles * p.parts;
  const int first = (is_anchors ? tile % anchor_tiles : tile - anchor_tiles * p.parts) * kTile;
  const int count = is_anchors ? wave.num_anchors : p.shape.num_candidates;
  return {w,
          p.active[wave.first_layer + w],
          is_anchors,
          first,
          min_of(kTile, count - first),
          column_block(p.shape, index % blocks),
          is_anchors ? tile / anchor_tiles : 0};
}

template <bool kSplit, class Real>
M2D_DEVICE void gradients(const LossArgs<Real>& p, const Wave& wave, float* scratch) {
  const int items = wave.num_layers * num_row_tiles(p, wave) * num_column_blocks(p.shape);
  for (int item = blockIdx.x; item < items; item += block_count())
    gradient_tile<kSplit>(p, wave, gradient_tile_at(p, wave, item), scratch);
}

constexpr int kMergeRows = 16;  // so few that all blocks have some

// The parts of the anchors' sums, in order.
template <class Real>
M2D_DEVICE void merge_gradient_parts(const LossArgs<Real>& p, const Wave& wave, float* scratch) {
  const int blocks = num_column_blocks(p.shape);
  const int tiles = ceil_div(wave.num_anchors, kMergeRows);
  for (int item = blockIdx.x; item < wave.num_layers * tiles * blocks; item += block_count()) {
    const int w = item / (tiles * blocks);
    const int first = item / blocks % tiles * kMergeRows;
    const GradientTile tile{w,
                            p.active[wave.first_layer + w],
                            true,
                            first,
                            min_of(kMergeRows, wave.num_anchors - first),
                            column_block(p.shape, item % blocks),
                            0};
    load_terms(p, wave, tile);
    for (int i = thread_index(); i < tile.rows * tile.block.width; i += kThreads) {
      const int row = i / tile.block.width;
      const int column = i % tile.block.width;
      float sum = 0.0f;
      for (int part = 0; part < p.parts; ++part)
        sum += gradient_part(p, w, part, first + row)[tile.block.begin + column];
      scratch[row * kTileStride + column] = sum;
    }
    finish_tile(p, wave, tile, scratch);
  }
}

// Rows that no tile covers: of layers without cells, and of texts that are neither anchors nor candidates.
template <class Real>
M2D_DEVICE void other_gradients(const LossArgs<Real>& p) {
  for_each_row(p, [&](bool is_pooled, int layer, int r) {
    if (cells_of_row(p, is_pooled, layer, r).sums != nullptr) return;
    const RowTerms<Real> terms = row_terms(p, is_pooled, layer, r, CellTerms<Real>{});
    const GradientRows<Real> rows = gradient_rows(p, is_pooled, layer, r);
    for (int d = threadIdx.x % 32; d < rows.dim; d += 32)
      rows.finish(terms, 0, d, FloatVector<1>{});
  });
}

}  // namespace m2d::cuda
