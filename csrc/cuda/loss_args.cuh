// What the stages of the loss kernel share: the problem by value, and where they leave their results to each other.
#pragma once

#include "rows.cuh"
#include "tile_product.cuh"
#include "tokens.cuh"

namespace m2d::cuda {

template <class Real>
M2D_DEVICE Real exponential(Real s, Real max) {
  return static_cast<Real>(expf(static_cast<float>(s - max)));
}

// Sums over candidates but for the target, of e = exp(Z - max), of which `max` may still grow. The gradient needs the
// others' sum to full relative accuracy.
template <class Real>
struct alignas(4 * sizeof(Real)) SoftmaxSums {
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

  M2D_DEVICE void add(SoftmaxSums other) {
    if (other.max > max) raise(other.max);
    if (max > other.max) other.raise(max);
    others += other.others;
    weighted += other.weighted;
    cosines += other.cosines;
  }

  M2D_DEVICE void merge_lanes() {
    const Real highest = warp_max(max);
    if (max < highest) raise(highest);
    others = warp_sum(others);
    weighted = warp_sum(weighted);
    cosines = warp_sum(cosines);
  }
};

// What runs over all candidates of an anchor is summed in parts of so many, for the sake of more blocks and warps.
constexpr int kPart = 1024;

template <class Real>
struct LossArgs {
  DeviceTokens tokens;
  bool row_vectors;  // of the tokens
  GridShape shape;
  RowSet<Real> pooled, gathered;
  float* centers;        // (L, D)
  Real* center_chunks;   // (L, K), |c|^2 of each chunk
  Real* center_squared;  // (L, K), |c_k|^2
  KlRow<Real>* kl_rows;  // (L, N)
  int* kl_ticket;        // the next row whose KL nobody has taken
  int num_active;        // layers with cells
  int16_t active[kMaxLayers];
  int wave_layers, wave_anchors;
  int parts;         // of kPart candidates
  float* x;          // (wave_layers, K, wave_anchors, x_stride): products of the chunks, then X
  int64_t x_stride;  // a multiple of 4
  AnchorCell<Real>* anchor_cells;  // (L, K, B)
  RowSums<Real>* anchor_sums;      // (L, K, B)
  RowSums<Real>* candidate_sums;   // (L, K, M)
  Real* cell_means;                // (L, K)
  Real* kl_means;                  // (L,)
  float* cells;                    // outputs
  float* kl;
  float* loss;
  // Where there is more than one part:
  SoftmaxSums<Real>* cell_parts;  // (wave_layers, K, parts, wave_anchors)
  Real* target_cosines;           // (wave_layers, K, wave_anchors)
  float* gradient_parts;          // (wave_layers, parts, wave_anchors, D), X delta
};

// The layers and anchors whose X are in the workspace at a time.
struct Wave {
  int first_layer, num_layers;  // places in LossArgs::active; none: there is no such wave
  int first, num_anchors;
  bool is_last;  // of these layers
};

// The pooled rows, or the gathered ones.
template <class Real>
M2D_DEVICE const RowSet<Real>& row_set(const LossArgs<Real>& p, bool is_pooled) {
  return is_pooled ? p.pooled : p.gathered;
}

template <class Real>
M2D_DEVICE const RowSet<Real>& candidate_rows(const LossArgs<Real>& p) {
  return row_set(p, !p.shape.gathered);
}
template <class Real>
M2D_DEVICE int first_candidate(const LossArgs<Real>& p) {
  return p.shape.gathered ? 0 : p.shape.num_anchors;
}
template <class Real>
M2D_DEVICE float* x_row(const LossArgs<Real>& p, int w, int k, int i) {
  return p.x + ((static_cast<int64_t>(w) * p.shape.num_dims + k) * p.wave_anchors + i) * p.x_stride;
}
template <class Real>
M2D_DEVICE float* gradient_part(const LossArgs<Real>& p, int w, int part, int i) {
  return p.gradient_parts +
         ((static_cast<int64_t>(w) * p.parts + part) * p.wave_anchors + i) * p.shape.dim;
}
M2D_DEVICE int64_t anchor_cell_of(const GridShape& s, int layer, int k, int anchor) {
  return (static_cast<int64_t>(layer) * s.num_dims + k) * s.num_anchors + anchor;
}
M2D_DEVICE int64_t candidate_cell_of(const GridShape& s, int layer, int k, int candidate) {
  return (static_cast<int64_t>(layer) * s.num_dims + k) * s.num_candidates + candidate;
}

template <class Real>
M2D_DEVICE Wave make_wave(const LossArgs<Real>& p, int first_layer, int first) {
  const int num_anchors = min_of(p.wave_anchors, p.shape.num_anchors - first);
  return {first_layer, min_of(p.wave_layers, p.num_active - first_layer), first, num_anchors,
          first + num_anchors == p.shape.num_anchors};
}
template <class Real>
M2D_DEVICE Wave next_wave(const LossArgs<Real>& p, const Wave& wave) {
  return wave.is_last ? make_wave(p, wave.first_layer + wave.num_layers, 0)
                      : make_wave(p, wave.first_layer, wave.first + wave.num_anchors);
}

// body(i) for the i < count of this warp, where the blocks are counted from `block` on. Counts are of rows, cells or
// tiles: fits() keeps them within 32 bits.
template <class Body>
M2D_DEVICE void for_each_by_warp(int block, int count, const Body& body) {
  const int blocks = block_count();
  for (int i = thread_index() / 32 * blocks + block; i < count; i += kWarps * blocks) body(i);
}

// Of all warps of the grid.
template <class Body>
M2D_DEVICE void for_each_by_warp(int count, const Body& body) {
  for_each_by_warp(static_cast<int>(blockIdx.x), count, body);
}

// Those of the last blocks first, which have the fewest items of their own.
template <class Body>
M2D_DEVICE void for_each_by_last_warps(int count, const Body& body) {
  for_each_by_warp(block_count() - 1 - static_cast<int>(blockIdx.x), count, body);
}

// body(is_pooled, layer, row) for the rows of this warp, the pooled ones first: one copy of its code. Row i of all of
// either kind is one of block i % gridDim.x.
template <class Real, class Body>
M2D_DEVICE void for_each_row(const LossArgs<Real>& p, const Body& body) {
#pragma unroll 1
  for (int kind = 0; kind < (p.shape.gathered ? 2 : 1); ++kind) {
    const int count = row_set(p, kind == 0).count;
    for_each_by_warp(p.shape.num_layers * count,
                     [&](int i) { body(kind == 0, i / count, i % count); });
  }
}

// The mean of value(0..n), by one warp.
template <class Real, class Value>
M2D_DEVICE Real warp_mean(int n, const Value& value) {
  Real sum = 0;
  for (int i = threadIdx.x % 32; i < n; i += 32) sum += value(i);
  return warp_sum(sum) / static_cast<Real>(n);
}

}  // namespace m2d::cuda
