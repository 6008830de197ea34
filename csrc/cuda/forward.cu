// The loss of all layers and dims in one cooperative launch. The formulas are those of math.h; the stages are those of
// cpu/loss.cpp, with a grid-wide barrier between them:
//
//   pool         P of every text and layer                                      a block per row
//   norms        of every row and prefix; a few unit rows per layer             a warp per row
//   centers      the mean of those                                              a block per layer
//   center       delta, <c, u>, gamma; the teacher's softmax                    a warp per row
//   then for as many layers, or anchors of one layer, as the workspace holds (a wave):
//   similarities <delta_i, delta_j> of every prefix                             a block per 64 x 64 tile
//   softmax      cross-entropies, X in place of the similarities, their sums    a block per 16 anchors
//   gradients    X delta of anchors, X^T delta of candidates                    a block per 64 x 64 tile
//   and last:
//   finish       norm terms, KL, the Jacobian of Normalize; the cells           a warp per row
//   reduce       KLs and the loss                                               one block
//
// Each element has one owner and every sum an order that depends on the sizes alone: the same bits for any grid.
#include <algorithm>
#include <cmath>

#include "launch.h"
#include "rows.cuh"
#include "tile_product.cuh"
#include "tokens.cuh"

namespace m2d::cuda {
namespace {

constexpr int kSoftmaxRows = 16;
constexpr int kScratch = std::max(kTileScratch, kPoolScratch);
constexpr int64_t kWaveBytes = 12 << 20;  // of X; besides, half as much as the pooled rows take
static_assert(kPoolWarps == kWarps);

template <class Real>
struct LossArgs {
  DeviceTokens tokens;
  bool row_vectors;  // of the tokens
  GridShape shape;
  RowSet<Real> pooled, gathered;
  float* samples;         // (L, kCenterSamples, D) unit rows
  float* sample_weights;  // (L, kCenterSamples), 0 for a row without direction
  float* centers;         // (L, D)
  Real* center_squared;   // (L, K), |c_k|^2
  Real* teacher_lse;      // (N,)
  int num_active;         // layers with cells
  int16_t active[kMaxLayers];
  int wave_layers, wave_anchors;
  float* x;  // (wave_layers, K, wave_anchors, x_stride): similarities, then X
  int64_t x_stride;
  Real* tile_sums;       // (wave_layers, tiles, 2, K, M), see Sums
  Real* anchor_sums;     // (2, L, K, B)
  Real* candidate_sums;  // (2, L, K, M)
  Real* cross_entropy;   // (L, K, B)
  Real* cell_means;      // (L, K)
  Real* kl_rows;         // (L, N)
  float* cells;          // outputs
  float* kl;
  float* loss;
};

// The two sums that a row leaves for its norm terms: of G gamma i, over the other side's gamma and i, and of G C.
enum Sums { kWeighted = 0, kCosines = 1 };

struct Wave {
  int first_layer, num_layers;  // places in LossArgs::active
  int first, num_anchors;
};

template <class Real>
M2D_DEVICE const RowSet<Real>& candidate_rows(const LossArgs<Real>& p) {
  return p.shape.gathered ? p.gathered : p.pooled;
}
template <class Real>
M2D_DEVICE int first_candidate(const LossArgs<Real>& p) {
  return p.shape.gathered ? 0 : p.shape.num_anchors;
}
template <class Real>
M2D_DEVICE float* x_row(const LossArgs<Real>& p, int w, int k, int i) {
  return p.x + ((static_cast<int64_t>(w) * p.shape.num_dims + k) * p.wave_anchors + i) * p.x_stride;
}
M2D_DEVICE int min_of(int a, int b) {
  return a < b ? a : b;
}
M2D_DEVICE int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// ---- pool, norms, center ----

template <class Scalar, class Real>
M2D_DEVICE void pool(const LossArgs<Real>& p, float* scratch) {
  const int rows = p.shape.num_layers * p.shape.num_texts;
  for (int i = blockIdx.x; i < rows; i += gridDim.x) {
    const int layer = i / p.shape.num_texts;
    const int text = i % p.shape.num_texts;
    float* out = p.pooled.delta + row_of(p.pooled, layer, text) * p.shape.dim;
    if (p.row_vectors) {
      pool_text<Scalar, true>(p.tokens, layer, text, scratch, out);
    } else {
      pool_text<Scalar, false>(p.tokens, layer, text, scratch, out);
    }
  }
}

// Row i of all is that of block i % gridDim.x here as in `pool`, which needs no barrier in between.
template <class Real, class Body>
M2D_DEVICE void for_each_row(const LossArgs<Real>& p, const RowSet<Real>& set, const Body& body) {
  const int rows = p.shape.num_layers * set.count;
  const int warp = threadIdx.x / 32;
  for (int64_t i = blockIdx.x + static_cast<int64_t>(warp) * gridDim.x; i < rows;
       i += static_cast<int64_t>(kWarps) * gridDim.x)
    body(static_cast<int>(i / set.count), static_cast<int>(i % set.count));
}

template <class Real>
M2D_DEVICE void keep_sample(const LossArgs<Real>& p, int layer, int text, Real full) {
  const int64_t texts = p.shape.num_texts;
  const int sample =
      static_cast<int>((static_cast<int64_t>(text) * kCenterSamples + texts - 1) / texts);
  if (sample >= kCenterSamples || sample * texts / kCenterSamples != text) return;
  const int lane = threadIdx.x % 32;
  const int64_t place = static_cast<int64_t>(layer) * kCenterSamples + sample;
  const float* x = p.pooled.pooled + row_of(p.pooled, layer, text) * p.shape.dim;
  for (int d = lane; d < p.shape.dim; d += 32)
    p.samples[place * p.shape.dim + d] = static_cast<float>(full * static_cast<Real>(x[d]));
  if (lane == 0) p.sample_weights[place] = is_clamped(static_cast<double>(full)) ? 0.0f : 1.0f;
}

template <class Real>
M2D_DEVICE void norms(const LossArgs<Real>& p) {
  for_each_row(p, p.pooled, [&](int layer, int r) {
    keep_sample(p, layer, r, compute_norms(p.shape, p.pooled, layer, r));
  });
  for_each_row(p, p.gathered,
               [&](int layer, int r) { compute_norms(p.shape, p.gathered, layer, r); });
}

// With fewer texts than samples, some samples are of no text.
M2D_DEVICE bool has_sample(const GridShape& s, int sample) {
  const int64_t text = static_cast<int64_t>(sample) * s.num_texts / kCenterSamples;
  return (text * kCenterSamples + s.num_texts - 1) / s.num_texts == sample;
}

template <class Real>
M2D_DEVICE void centers(const LossArgs<Real>& p) {
  const GridShape& s = p.shape;
  for (int layer = blockIdx.x; layer < s.num_layers; layer += gridDim.x) {
    const float* samples = p.samples + static_cast<int64_t>(layer) * kCenterSamples * s.dim;
    const float* weights = p.sample_weights + static_cast<int64_t>(layer) * kCenterSamples;
    float* center = p.centers + static_cast<int64_t>(layer) * s.dim;
    float counted = 0.0f;
    for (int i = 0; i < kCenterSamples; ++i) counted += has_sample(s, i) ? weights[i] : 0.0f;
    for (int d = threadIdx.x; d < s.dim; d += kThreads) {
      float sum = 0.0f;
      for (int i = 0; i < kCenterSamples; ++i) {
        if (has_sample(s, i) && weights[i] != 0.0f) sum += samples[i * s.dim + d];
      }
      center[d] = counted > 0.0f ? sum / counted : 0.0f;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      Real squared = 0;
      for (int k = 0; k < s.num_dims; ++k) {
        Real sum = 0;
        for (int d = s.chunk_begin(k) + threadIdx.x; d < s.dims[k]; d += 32)
          sum += static_cast<Real>(center[d]) * static_cast<Real>(center[d]);
        squared += warp_sum(sum);
        if (threadIdx.x == 0) p.center_squared[layer * s.num_dims + k] = squared;
      }
    }
    __syncthreads();
  }
}

// log sum exp(E / tau) of the final layer's row; P is still there.
template <class Real>
M2D_DEVICE void teach(const LossArgs<Real>& p, int layer, int text) {
  const int lane = threadIdx.x % 32;
  const int64_t row = row_of(p.pooled, layer, text);
  const float* x = p.pooled.pooled + row * p.shape.dim;
  const Real factor = (p.shape.normalize ? p.pooled.full[row] : Real(1)) /
                      static_cast<Real>(p.shape.kl_temperature);
  Real max = -INFINITY;
  for (int d = lane; d < p.shape.dim; d += 32) {
    const Real z = factor * static_cast<Real>(x[d]);
    max = z > max ? z : max;
  }
  max = warp_max(max);
  Real sum = 0;
  for (int d = lane; d < p.shape.dim; d += 32)
    sum += static_cast<Real>(expf(static_cast<float>(factor * static_cast<Real>(x[d]) - max)));
  sum = warp_sum(sum);
  if (lane == 0) p.teacher_lse[text] = max + static_cast<Real>(std::log(static_cast<double>(sum)));
}

template <class Real>
M2D_DEVICE void center_rows(const LossArgs<Real>& p, const RowSet<Real>& set, bool teaching) {
  const GridShape& s = p.shape;
  for_each_row(p, set, [&](int layer, int r) {
    if (teaching && layer == s.num_layers - 1) {
      teach(p, layer, r);
      __syncwarp();
    }
    center_row(s, set, p.centers + static_cast<int64_t>(layer) * s.dim,
               p.center_squared + static_cast<int64_t>(layer) * s.num_dims, layer, r);
  });
}

// ---- similarities ----

template <bool kSplit, class Real>
M2D_DEVICE void similarities(const LossArgs<Real>& p, const Wave& wave, float* scratch) {
  const GridShape& s = p.shape;
  const RowSet<Real>& others = candidate_rows(p);
  const int row_tiles = ceil_div(wave.num_anchors, kTile);
  const int column_tiles = ceil_div(s.num_candidates, kTile);
  const int64_t tiles = static_cast<int64_t>(row_tiles) * column_tiles;
  for (int64_t item = blockIdx.x; item < wave.num_layers * tiles; item += gridDim.x) {
    const int w = static_cast<int>(item / tiles);
    const int layer = p.active[wave.first_layer + w];
    const int row = static_cast<int>(item % tiles) / column_tiles * kTile;
    const int column = static_cast<int>(item % tiles) % column_tiles * kTile;
    const int rows = min_of(kTile, wave.num_anchors - row);
    const int columns = min_of(kTile, s.num_candidates - column);
    const Operand a{p.pooled.delta + row_of(p.pooled, layer, wave.first + row) * s.dim, s.dim,
                    rows};
    const Operand b{others.delta + row_of(others, layer, first_candidate(p) + column) * s.dim,
                    s.dim, columns};
    Accumulator c;
    c.clear();
    for (int k = 0; k < s.used_dims[layer]; ++k) {
      multiply<kSplit, false, false>(a, b, s.chunk_begin(k), s.dims[k], scratch, c);
      c.store(x_row(p, w, k, row) + column, p.x_stride, rows, columns, false);
    }
  }
}

// ---- softmax ----

// An anchor in one cell.
template <class Real>
struct AnchorCell {
  Real inverse;  // ia
  Real gamma;
  Real along;        // <c, u_i>_k - gamma |c_k|^2
  Real max;          // max_j Z_j
  Real coefficient;  // G_j = coefficient exp(Z_j - max), but for the target:
  Real others;       // G_t = -coefficient others
  int target;
};

// The candidates in one cell.
template <class Real>
struct CandidateCell {
  const Real* inverse;  // ib (M,)
  const Real* along;    // <c, u_j>_k
  const float* gamma;
};

template <class Real>
M2D_DEVICE Real cosine(const AnchorCell<Real>& a, const CandidateCell<Real>& b, int j,
                       float product) {
  const Real u =
      static_cast<Real>(product) + a.gamma * b.along[j] + static_cast<Real>(b.gamma[j]) * a.along;
  return u * a.inverse * b.inverse[j];
}

template <class Real>
M2D_DEVICE Real exponential(Real s, Real max) {
  return static_cast<Real>(expf(static_cast<float>(s - max)));
}

// Cross-entropy and sums of one anchor in cell (layer, k), by one warp.
template <class Real>
M2D_DEVICE void anchor_cell(const LossArgs<Real>& p, const CandidateCell<Real>& b, int layer, int k,
                            int anchor, const float* products, AnchorCell<Real>& a) {
  const GridShape& s = p.shape;
  const int lane = threadIdx.x % 32;
  const int m = s.num_candidates;
  const Real scale = static_cast<Real>(s.scale);
  const int64_t place = prefix_of(s, p.pooled, layer, k, anchor);
  a.inverse = p.pooled.prefix[place];
  a.gamma = static_cast<Real>(p.pooled.gamma[row_of(p.pooled, layer, anchor)]);
  a.along = p.pooled.along[place] - a.gamma * p.center_squared[layer * s.num_dims + k];
  a.target = s.target_offset + anchor;
  Real max = -INFINITY;
#pragma unroll 2
  for (int j = lane; j < m; j += 32) {
    const Real logit = static_cast<Real>(s.logit_scale(j, a.target)) * cosine(a, b, j, products[j]);
    max = logit > max ? logit : max;
  }
  a.max = warp_max(max);
  // The target is left out: the gradient needs the others' sum to full relative accuracy.
  Real others = 0;
  Real weighted = 0;
  Real cosines = 0;
#pragma unroll 1
  for (int j = lane; j < m; j += 32) {
    if (j == a.target) continue;
    const Real c = cosine(a, b, j, products[j]);
    const Real e = exponential(static_cast<Real>(s.logit_scale(j, a.target)) * c, a.max);
    others += e;
    weighted += e * b.inverse[j] * static_cast<Real>(b.gamma[j]);
    cosines += e * c;
  }
  a.others = warp_sum(others);
  weighted = warp_sum(weighted);
  cosines = warp_sum(cosines);
  const Real target_cosine = cosine(a, b, a.target, products[a.target]);
  const Real at_target = exponential(scale * target_cosine, a.max);
  a.coefficient = static_cast<Real>(s.weight(layer, k)) * scale / static_cast<Real>(s.num_anchors) /
                  (a.others + at_target);
  weighted -= a.others * b.inverse[a.target] * static_cast<Real>(b.gamma[a.target]);
  cosines -= a.others * target_cosine;
  if (lane != 0) return;
  const int64_t cell = (static_cast<int64_t>(layer) * s.num_dims + k) * s.num_anchors + anchor;
  const int64_t sums = static_cast<int64_t>(s.num_layers) * s.num_dims * s.num_anchors;
  p.cross_entropy[cell] =
      static_cast<Real>(cross_entropy(static_cast<double>(a.others), static_cast<double>(at_target),
                                      static_cast<double>(a.max - scale * target_cosine)));
  p.anchor_sums[kWeighted * sums + cell] = a.coefficient * weighted;
  p.anchor_sums[kCosines * sums + cell] = a.coefficient * cosines;
}

// X of one column in cell k of up to 16 anchors, and the column's sums; by one thread. The similarities at `x` become
// X, to which the sum over the prefixes above is added where there is one, `above` elements away.
template <class Real>
M2D_DEVICE void column_cell(const GridShape& s, const CandidateCell<Real>& b, int j,
                            const AnchorCell<Real>* anchors, int rows, float* x, int64_t stride,
                            int64_t above, Real* weighted, Real* cosines) {
  Real weighted_sum = 0;
  Real cosine_sum = 0;
#pragma unroll 1
  for (int i = 0; i < rows; ++i, x += stride) {
    const AnchorCell<Real>& a = anchors[i];
    const Real c = cosine(a, b, j, *x);
    const Real z = static_cast<Real>(s.logit_scale(j, a.target)) * c;
    const Real g = a.coefficient * (j == a.target ? -a.others : exponential(z, a.max));
    weighted_sum += g * a.inverse * a.gamma;
    cosine_sum += g * c;
    *x = static_cast<float>(g * a.inverse * b.inverse[j]) + (above > 0 ? x[above] : 0.0f);
  }
  *weighted = weighted_sum;
  *cosines = cosine_sum;
}

template <class Real>
M2D_DEVICE void softmax(const LossArgs<Real>& p, const Wave& wave) {
  const GridShape& s = p.shape;
  const RowSet<Real>& others = candidate_rows(p);
  M2D_SHARED(AnchorCell<Real>, anchors, [kSoftmaxRows]);
  const int warp = threadIdx.x / 32;
  const int tiles = ceil_div(wave.num_anchors, kSoftmaxRows);
  for (int item = blockIdx.x; item < wave.num_layers * tiles; item += gridDim.x) {
    const int w = item / tiles;
    const int layer = p.active[wave.first_layer + w];
    const int used = s.used_dims[layer];
    const int first = item % tiles * kSoftmaxRows;
    const int rows = min_of(kSoftmaxRows, wave.num_anchors - first);
    Real* tile_sums = p.tile_sums + static_cast<int64_t>(item) * 2 * s.num_dims * s.num_candidates;
    for (int k = used - 1; k >= 0; --k) {
      const int64_t place = prefix_of(s, others, layer, k, first_candidate(p));
      const CandidateCell<Real> b{others.prefix + place, others.along + place,
                                  others.gamma + row_of(others, layer, first_candidate(p))};
      const bool asked = s.weight(layer, k) != 0.0f;
      if (asked) {
        for (int i = warp; i < rows; i += kWarps) {
          AnchorCell<Real> a;
          anchor_cell(p, b, layer, k, wave.first + first + i, x_row(p, w, k, first + i), a);
          if (threadIdx.x % 32 == 0) anchors[i] = a;
        }
      }
      __syncthreads();
      if (s.wants_grad) {
        // A cell that is not asked for only hands on the suffix sums of X.
        const int64_t above = k + 1 < used ? p.wave_anchors * p.x_stride : 0;
        float* x = x_row(p, w, k, first);
        Real* weighted =
            tile_sums + (kWeighted * s.num_dims + k) * static_cast<int64_t>(s.num_candidates);
        Real* cosines =
            tile_sums + (kCosines * s.num_dims + k) * static_cast<int64_t>(s.num_candidates);
        for (int j = threadIdx.x; j < s.num_candidates; j += kThreads) {
          if (asked) {
            column_cell(s, b, j, anchors, rows, x + j, p.x_stride, above, weighted + j,
                        cosines + j);
          } else {
            for (int i = 0; i < rows; ++i) x[i * p.x_stride + j] = x[i * p.x_stride + j + above];
            weighted[j] = 0;
            cosines[j] = 0;
          }
        }
      }
      __syncthreads();
    }
  }
}

// ---- gradients ----

// A 64-column block of one chunk.
struct ColumnBlock {
  int k, begin, width;
};

M2D_DEVICE int num_column_blocks(const GridShape& s) {
  int count = 0;
  for (int k = 0; k < s.num_dims; ++k) count += ceil_div(s.dims[k] - s.chunk_begin(k), kTile);
  return count;
}

M2D_DEVICE ColumnBlock column_block(const GridShape& s, int index) {
  int k = 0;
  int blocks = ceil_div(s.dims[0], kTile);
  while (index >= blocks) {
    index -= blocks;
    ++k;
    blocks = ceil_div(s.dims[k] - s.chunk_begin(k), kTile);
  }
  const int begin = s.chunk_begin(k) + index * kTile;
  return {k, begin, min_of(kTile, s.dims[k] - begin)};
}

template <bool kSplit, class Real>
M2D_DEVICE void anchor_products(const LossArgs<Real>& p, const Wave& wave, int w, int row,
                                const ColumnBlock& block, float* scratch) {
  const GridShape& s = p.shape;
  const RowSet<Real>& others = candidate_rows(p);
  const int layer = p.active[wave.first_layer + w];
  const int rows = min_of(kTile, wave.num_anchors - row);
  const Operand x{x_row(p, w, block.k, row), p.x_stride, rows};
  const Operand delta{
      others.delta + row_of(others, layer, first_candidate(p)) * s.dim + block.begin, s.dim,
      block.width};
  Accumulator c;
  c.clear();
  multiply<kSplit, false, true>(x, delta, 0, s.num_candidates, scratch, c);
  c.store(p.pooled.grad + row_of(p.pooled, layer, wave.first + row) * s.dim + block.begin, s.dim,
          rows, block.width, false);
}

template <bool kSplit, class Real>
M2D_DEVICE void candidate_products(const LossArgs<Real>& p, const Wave& wave, int w, int column,
                                   const ColumnBlock& block, float* scratch) {
  const GridShape& s = p.shape;
  const RowSet<Real>& others = candidate_rows(p);
  const int layer = p.active[wave.first_layer + w];
  const int columns = min_of(kTile, s.num_candidates - column);
  const Operand x{x_row(p, w, block.k, 0) + column, p.x_stride, columns};
  const Operand delta{p.pooled.delta + row_of(p.pooled, layer, wave.first) * s.dim + block.begin,
                      s.dim, block.width};
  Accumulator c;
  c.clear();
  multiply<kSplit, true, true>(x, delta, 0, wave.num_anchors, scratch, c);
  c.store(others.grad + row_of(others, layer, first_candidate(p) + column) * s.dim + block.begin,
          s.dim, columns, block.width, wave.first > 0);
}

// The sums down the columns of all tiles of a wave, in order.
template <class Real>
M2D_DEVICE void collect_tile_sums(const LossArgs<Real>& p, const Wave& wave) {
  const GridShape& s = p.shape;
  const int tiles = ceil_div(wave.num_anchors, kSoftmaxRows);
  const int64_t cell = static_cast<int64_t>(s.num_dims) * s.num_candidates;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < wave.num_layers * 2 * cell; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t w = i / (2 * cell);
    const int64_t part = i % (2 * cell) / cell;
    const int layer = p.active[wave.first_layer + w];
    if (i % cell / s.num_candidates >= s.used_dims[layer]) continue;
    Real* total = p.candidate_sums + (part * s.num_layers + layer) * cell + i % cell;
    Real sum = wave.first > 0 ? *total : Real(0);
    for (int tile = 0; tile < tiles; ++tile)
      sum += p.tile_sums[(w * tiles + tile) * 2 * cell + i % (2 * cell)];
    *total = sum;
  }
}

template <bool kSplit, class Real>
M2D_DEVICE void gradients(const LossArgs<Real>& p, const Wave& wave, float* scratch) {
  const GridShape& s = p.shape;
  const int blocks = num_column_blocks(s);
  const int row_tiles = ceil_div(wave.num_anchors, kTile);
  const int tiles = row_tiles + ceil_div(s.num_candidates, kTile);
  const int64_t per_layer = static_cast<int64_t>(tiles) * blocks;
  for (int64_t item = blockIdx.x; item < wave.num_layers * per_layer; item += gridDim.x) {
    const int w = static_cast<int>(item / per_layer);
    const ColumnBlock block = column_block(s, static_cast<int>(item % blocks));
    if (block.k >= s.used_dims[p.active[wave.first_layer + w]]) continue;
    const int tile = static_cast<int>(item % per_layer / blocks);
    if (tile < row_tiles) {
      anchor_products<kSplit>(p, wave, w, tile * kTile, block, scratch);
    } else {
      candidate_products<kSplit>(p, wave, w, (tile - row_tiles) * kTile, block, scratch);
    }
  }
  collect_tile_sums(p, wave);
}

// ---- finish ----

// Where the sums of a row's cells stand: of prefix k at weighted[k * stride].
template <class Real>
struct RowSums {
  const Real* weighted;  // nullptr: the row is in no cell
  const Real* cosines;
  int64_t stride;
};

template <class Real>
M2D_DEVICE RowSums<Real> row_sums(const LossArgs<Real>& p, bool is_pooled, int layer, int r) {
  const GridShape& s = p.shape;
  const bool is_anchor = is_pooled && r < s.num_anchors;
  if (s.used_dims[layer] == 0 || (is_pooled && !is_anchor && s.gathered))
    return {nullptr, nullptr, 0};
  const int64_t count = is_anchor ? s.num_anchors : s.num_candidates;
  const int64_t part = static_cast<int64_t>(s.num_layers) * s.num_dims * count;
  const Real* sums = is_anchor ? p.anchor_sums : p.candidate_sums;
  const int64_t i = is_anchor || !is_pooled ? r : r - s.num_anchors;
  const Real* first = sums + static_cast<int64_t>(layer) * s.num_dims * count + i;
  return {first + kWeighted * part, first + kCosines * part, count};
}

// The student's side of one KL: z = E / tau against the teacher's, both as log-probabilities.
template <class Real>
struct Student {
  bool on;
  EmbeddingRow<Real> row, teacher;
  Real inverse_temperature;
  Real teacher_lse;
  Real lse_gap;  // log sum exp z - teacher_lse
  Real coefficient;

  M2D_DEVICE Real taught(int d) const { return teacher(d) * inverse_temperature; }
  M2D_DEVICE Real gap(int d) const { return row(d) * inverse_temperature - taught(d); }

  // coefficient (softmax(z) - q). Where the two are close, their difference is formed from that of the logits.
  M2D_DEVICE Real gradient(int d) const {
    if (!on) return 0;
    const Real log_q = taught(d) - teacher_lse;
    const Real log_ratio = gap(d) - lse_gap;
    const float q = expf(static_cast<float>(log_q));
    const float difference = fabsf(static_cast<float>(log_ratio)) < 0.5f
                                 ? q * expm1f(static_cast<float>(log_ratio))
                                 : expf(static_cast<float>(log_q + log_ratio)) - q;
    return coefficient * static_cast<Real>(difference);
  }
};

// The KL of a pooled row, and what its gradient needs.
template <class Real>
M2D_DEVICE Student<Real> learn(const LossArgs<Real>& p, const EmbeddingRow<Real>& row, int layer,
                               int text) {
  const GridShape& s = p.shape;
  const int lane = threadIdx.x % 32;
  Student<Real> student{true,
                        row,
                        embedding_row(s, p.pooled, p.centers, s.num_layers - 1, text),
                        1 / static_cast<Real>(s.kl_temperature),
                        p.teacher_lse[text],
                        0,
                        0};
  Real max = -INFINITY;
  Real widest = 0;
  for (int d = lane; d < s.dim; d += 32) {
    const Real gap = student.gap(d);
    const Real z = student.taught(d) + gap;
    max = z > max ? z : max;
    const Real width = gap < 0 ? -gap : gap;
    widest = width > widest ? width : widest;
  }
  max = warp_max(max);
  // Close to the teacher, the normaliser too comes from the differences: sum exp z = exp(lse) (1 + sum q expm1(gap)).
  const bool close = warp_max(widest) < Real(0.5);
  Real sum = 0;
  Real mean_gap = 0;
  for (int d = lane; d < s.dim; d += 32) {
    const Real gap = student.gap(d);
    const Real q = exponential(student.taught(d), student.teacher_lse);
    sum += close ? q * static_cast<Real>(expm1f(static_cast<float>(gap)))
                 : exponential(student.taught(d) + gap, max);
    mean_gap -= q * gap;
  }
  const double total = static_cast<double>(warp_sum(sum));
  student.lse_gap = close ? static_cast<Real>(std::log1p(total))
                          : max + static_cast<Real>(std::log(total)) - student.teacher_lse;
  student.coefficient = static_cast<Real>(s.kl_weights[layer]) * student.inverse_temperature /
                        static_cast<Real>(s.num_texts);
  mean_gap = warp_sum(mean_gap);
  if (lane == 0) {
    p.kl_rows[static_cast<int64_t>(layer) * s.num_texts + text] = static_cast<Real>(
        kl_divergence(static_cast<double>(mean_gap), 0.0, static_cast<double>(student.lse_gap)));
  }
  return student;
}

// dE, in place of the products; returns <u, dE> of the whole row.
template <class Real>
M2D_DEVICE Real collect_gradient(const LossArgs<Real>& p, const RowSet<Real>& set,
                                 const EmbeddingRow<Real>& row, const Student<Real>& student,
                                 const RowSums<Real>& sums, int layer, int r, float* grad) {
  const GridShape& s = p.shape;
  const int lane = threadIdx.x % 32;
  const Real scale = s.normalize ? Real(1) : set.full[row_of(set, layer, r)];
  const int used = sums.weighted == nullptr ? 0 : s.used_dims[layer];
  Real dot = 0;
  for (int d = (used == 0 ? 0 : s.dims[used - 1]) + lane; d < s.dim; d += 32) {
    const Real value = student.gradient(d);
    dot += value * row.unit(d);
    grad[d] = static_cast<float>(value);
  }
  Real alpha = 0;
  Real rho = 0;
  for (int k = used - 1; k >= 0; --k) {
    if (s.weight(layer, k) != 0.0f) {
      const int64_t place = prefix_of(s, set, layer, k, r);
      alpha += set.prefix[place] * sums.weighted[k * sums.stride];
      rho += set.prefix_squared[place] * sums.cosines[k * sums.stride];
    }
    for (int d = s.chunk_begin(k) + lane; d < s.dims[k]; d += 32) {
      const Real unit = row.unit(d);
      const Real cells =
          static_cast<Real>(grad[d]) + alpha * static_cast<Real>(row.center[d]) - rho * unit;
      const Real value = scale * cells + student.gradient(d);
      dot += value * unit;
      grad[d] = static_cast<float>(value);
    }
  }
  return warp_sum(dot);
}

template <class Real>
M2D_DEVICE void finish_row(const LossArgs<Real>& p, const RowSet<Real>& set, bool is_pooled,
                           int layer, int r) {
  const GridShape& s = p.shape;
  const EmbeddingRow<Real> row = embedding_row(s, set, p.centers, layer, r);
  Student<Real> student{};
  if (is_pooled && s.kl_weights[layer] != 0.0f) student = learn(p, row, layer, r);
  if (!s.wants_grad) return;
  float* grad = set.grad + row_of(set, layer, r) * s.dim;
  const Real dot =
      collect_gradient(p, set, row, student, row_sums(p, is_pooled, layer, r), layer, r, grad);
  if (!s.normalize) return;
  __syncwarp();  // the columns change hands
  // dP = (dE - <u, dE> u) / max(|P|, eps); where the norm is clamped E = P / eps, and only the factor remains.
  const Real full = set.full[row_of(set, layer, r)];
  const Real along = is_clamped(static_cast<double>(full)) ? Real(0) : dot;
  for (int d = threadIdx.x % 32; d < s.dim; d += 32)
    grad[d] = static_cast<float>(full * (static_cast<Real>(grad[d]) - along * row.unit(d)));
}

// The mean of n values, by one warp.
template <class Real>
M2D_DEVICE Real warp_mean(const Real* values, int n) {
  Real sum = 0;
  for (int i = threadIdx.x % 32; i < n; i += 32) sum += values[i];
  return warp_sum(sum) / static_cast<Real>(n);
}

template <class Real>
M2D_DEVICE void finish(const LossArgs<Real>& p) {
  const GridShape& s = p.shape;
  for_each_row(p, p.pooled, [&](int layer, int r) { finish_row(p, p.pooled, true, layer, r); });
  for_each_row(p, p.gathered,
               [&](int layer, int r) { finish_row(p, p.gathered, false, layer, r); });
  for (int cell = blockIdx.x * kWarps + threadIdx.x / 32; cell < s.num_layers * s.num_dims;
       cell += gridDim.x * kWarps) {
    const bool asked = s.weights[cell] != 0.0f;
    const Real mean =
        asked
            ? warp_mean(p.cross_entropy + static_cast<int64_t>(cell) * s.num_anchors, s.num_anchors)
            : Real(0);
    if (threadIdx.x % 32 != 0) continue;
    p.cell_means[cell] = mean;
    p.cells[cell] = asked ? static_cast<float>(mean) : NAN;
  }
}

// ---- reduce ----

template <class Real>
M2D_DEVICE void reduce(const LossArgs<Real>& p) {
  if (blockIdx.x != 0) return;
  const GridShape& s = p.shape;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  M2D_SHARED(double, sums, [kWarps]);
  double sum = 0;
  for (int layer = warp; layer < s.num_layers; layer += kWarps) {
    const float weight = s.kl_weights[layer];
    Real kl = 0;
    if (weight != 0.0f)
      kl = warp_mean(p.kl_rows + static_cast<int64_t>(layer) * s.num_texts, s.num_texts);
    if (lane == 0) p.kl[layer] = weight != 0.0f ? static_cast<float>(kl) : NAN;
    if (weight != 0.0f) sum += static_cast<double>(weight) * static_cast<double>(kl);
  }
  double cells = 0;
  for (int cell = threadIdx.x; cell < s.num_layers * s.num_dims; cell += kThreads) {
    if (s.weights[cell] != 0.0f)
      cells += static_cast<double>(s.weights[cell]) * static_cast<double>(p.cell_means[cell]);
  }
  sum += warp_sum(cells);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double loss = 0;
  for (int w = 0; w < kWarps; ++w) loss += sums[w];
  *p.loss = static_cast<float>(loss);
}

// Scalar: of the hidden states, void where pooled rows are given.
template <class Scalar, class Real, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1)
    loss_kernel(const __grid_constant__ LossArgs<Real> p) {
  M2D_SHARED(float, scratch, [kScratch]);
  if constexpr (!std::is_void_v<Scalar>) pool<Scalar>(p, scratch);
  norms(p);
  grid_sync();
  centers(p);
  grid_sync();
  center_rows(p, p.pooled, p.shape.has_kl);
  center_rows(p, p.gathered, false);
  grid_sync();
  for (int layer = 0; layer < p.num_active; layer += p.wave_layers) {
    for (int first = 0; first < p.shape.num_anchors; first += p.wave_anchors) {
      const Wave wave{layer, min_of(p.wave_layers, p.num_active - layer), first,
                      min_of(p.wave_anchors, p.shape.num_anchors - first)};
      similarities<kSplit>(p, wave, scratch);
      grid_sync();
      softmax(p, wave);
      grid_sync();
      if (p.shape.wants_grad) gradients<kSplit>(p, wave, scratch);
      grid_sync();
    }
  }
  finish(p);
  grid_sync();
  reduce(p);
}

// ---- on the host ----

// Hands out pieces of the workspace; without one, only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 256;
  char* base_;
  size_t used_ = 0;
};

GridShape grid_shape(const LossParams<float>& p) {
  GridShape s{};
  s.num_layers = static_cast<int>(p.num_layers);
  s.num_texts = static_cast<int>(p.num_texts);
  s.num_anchors = static_cast<int>(p.num_anchors);
  s.num_candidates = static_cast<int>(p.num_candidates);
  s.dim = static_cast<int>(p.dim);
  s.num_dims = static_cast<int>(p.num_dims);
  s.target_offset = static_cast<int>(p.target_offset);
  s.scale = static_cast<float>(p.scale);
  s.own_scale = static_cast<float>(p.scale + p.own_hardness);
  s.others_scale = static_cast<float>(p.scale + p.hardness);
  s.column_size = static_cast<int>(p.column_size);
  s.kl_temperature = static_cast<float>(p.kl_temperature);
  s.normalize = p.normalize;
  s.gathered = p.gathered;
  s.wants_grad = p.pooled_grad.data != nullptr;
  for (int k = 0; k < s.num_dims; ++k) s.dims[k] = static_cast<int>(p.dims[k]);
  for (int l = 0; l < s.num_layers; ++l) {
    s.kl_weights[l] = static_cast<float>(p.kl_weights[l]);
    s.has_kl = s.has_kl || s.kl_weights[l] != 0.0f;
    for (int k = 0; k < s.num_dims; ++k) {
      const float weight = static_cast<float>(p.weights[l * p.num_dims + k]);
      s.weights[l * s.num_dims + k] = weight;
      if (weight != 0.0f) s.used_dims[l] = static_cast<int16_t>(k + 1);
    }
  }
  return s;
}

template <class Real>
RowSet<Real> row_set(const LossParams<float>& p, const Rows<const float>& pooled,
                     const Rows<float>& grad, int64_t count, Arena& arena) {
  const int64_t rows = p.num_layers * count;
  RowSet<Real> set{};
  set.delta = arena.take<float>(rows * p.dim);
  set.pooled = pooled.data == nullptr ? set.delta : pooled.data;
  set.grad = grad.data;
  set.full = arena.take<Real>(rows);
  set.prefix = arena.take<Real>(rows * p.num_dims);
  set.prefix_squared = arena.take<Real>(rows * p.num_dims);
  set.along = arena.take<Real>(rows * p.num_dims);
  set.gamma = arena.take<float>(rows);
  set.count = static_cast<int>(count);
  return set;
}

// As many layers as fit, or else a part of one layer's anchors.
template <class Real>
void choose_waves(LossArgs<Real>& args) {
  const GridShape& s = args.shape;
  const int64_t budget = kWaveBytes + static_cast<int64_t>(s.num_layers) * s.num_texts * s.dim * 2;
  const int64_t row = s.num_dims * args.x_stride * static_cast<int64_t>(sizeof(float));
  const int64_t layers = std::max(1, args.num_active);
  args.wave_layers =
      static_cast<int>(std::clamp<int64_t>(budget / (row * s.num_anchors), 1, layers));
  const int64_t tiles = std::max<int64_t>(1, budget / (row * kTile));
  args.wave_anchors = static_cast<int>(std::min<int64_t>(s.num_anchors, tiles * kTile));
}

template <class Real>
LossArgs<Real> loss_args(const LossParams<float>& p, Arena& arena) {
  LossArgs<Real> args{};
  args.shape = grid_shape(p);
  const GridShape& s = args.shape;
  for (int l = 0; l < s.num_layers; ++l) {
    if (s.used_dims[l] > 0) args.active[args.num_active++] = static_cast<int16_t>(l);
  }
  args.pooled = row_set<Real>(p, p.pooled, p.pooled_grad, p.num_texts, arena);
  args.gathered =
      row_set<Real>(p, p.candidates, p.candidate_grad, p.gathered ? p.num_candidates : 0, arena);
  args.samples = arena.take<float>(p.num_layers * kCenterSamples * p.dim);
  args.sample_weights = arena.take<float>(p.num_layers * kCenterSamples);
  args.centers = arena.take<float>(p.num_layers * p.dim);
  args.center_squared = arena.take<Real>(p.num_layers * p.num_dims);
  args.teacher_lse = arena.take<Real>(p.num_texts);
  args.x_stride = (p.num_candidates + 3) / 4 * 4;  // rows of whole 16-byte vectors
  choose_waves(args);
  const int64_t cells = p.num_layers * p.num_dims;
  const int64_t wave_rows = static_cast<int64_t>(args.wave_layers) * args.wave_anchors;
  args.x = arena.take<float>(wave_rows * p.num_dims * args.x_stride);
  if (s.wants_grad) {
    const int64_t tiles = (args.wave_anchors + kSoftmaxRows - 1) / kSoftmaxRows;
    args.tile_sums = arena.take<Real>(args.wave_layers * tiles * 2 * p.num_dims * p.num_candidates);
    args.candidate_sums = arena.take<Real>(2 * cells * p.num_candidates);
  }
  args.anchor_sums = arena.take<Real>(2 * cells * p.num_anchors);
  args.cross_entropy = arena.take<Real>(cells * p.num_anchors);
  args.cell_means = arena.take<Real>(cells);
  args.kl_rows = arena.take<Real>(p.num_layers * p.num_texts);
  args.cells = p.cells;
  args.kl = p.kl;
  args.loss = p.loss;
  return args;
}

template <class Scalar, class Real, bool kSplit>
cudaError_t launch_kernel(const LossArgs<Real>& args, cudaStream_t stream) {
  int blocks = 0;
  const cudaError_t error = cooperative_grid(loss_kernel<Scalar, Real, kSplit>, kThreads, &blocks);
  if (error != cudaSuccess) return error;
  return launch({dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, true},
                loss_kernel<Scalar, Real, kSplit>, args);
}

template <class Scalar, class Real, bool kSplit>
cudaError_t launch_loss(const LossParams<float>& params, const LossLaunch& how, void* workspace,
                        cudaStream_t stream) {
  Arena arena(workspace);
  LossArgs<Real> args = loss_args<Real>(params, arena);
  if constexpr (!std::is_void_v<Scalar>) {
    args.tokens = device_tokens(*how.tokens);
    args.row_vectors = rows_are_vectors(*how.tokens, sizeof(Scalar));
  }
  return launch_kernel<Scalar, Real, kSplit>(args, stream);
}

}  // namespace

bool fits(const LossParams<float>& p) {
  // Rows and columns are counted in 32 bits.
  constexpr int64_t kMost = INT32_MAX / 2;
  return p.num_layers <= kMaxLayers && p.num_dims <= kMaxDims && p.dim <= kMost &&
         p.num_layers * p.num_texts <= kMost && p.num_layers * p.num_candidates <= kMost;
}

size_t loss_workspace_bytes(const LossParams<float>& params, const LossLaunch& how) {
  Arena arena(nullptr);
  if (how.type == StateType::kFloat) {
    loss_args<double>(params, arena);
  } else {
    loss_args<float>(params, arena);
  }
  return arena.used();
}

cudaError_t launch_loss(const LossParams<float>& params, const LossLaunch& how, void* workspace,
                        cudaStream_t stream) {
  const bool split = !how.allow_tf32;
  if (how.tokens == nullptr) {
    return split ? launch_loss<void, double, true>(params, how, workspace, stream)
                 : launch_loss<void, double, false>(params, how, workspace, stream);
  }
  switch (how.type) {
    case StateType::kFloat:
      return split ? launch_loss<float, double, true>(params, how, workspace, stream)
                   : launch_loss<float, double, false>(params, how, workspace, stream);
    case StateType::kBFloat16:
      return launch_loss<__nv_bfloat16, float, false>(params, how, workspace, stream);
    case StateType::kHalf:
      return launch_loss<__half, float, false>(params, how, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace m2d::cuda
