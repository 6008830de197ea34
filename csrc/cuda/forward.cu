// The loss of all layers and dims in one cooperative launch. The formulas are those of math.h; between these stages
// lies a grid-wide barrier:
//
//   pool        P of every text and layer                                      a block per row
//               and its norms of every prefix                                  a warp per row
//   centers     the mean of a few unit rows per layer, the center c            a thread per element
//   center      delta, <c, u>, gamma                                           a warp per row
//   then for as many layers, or anchors of one layer, as the workspace holds (a wave):
//   products    <delta_i, delta_j> over each chunk                             a block per 64 x 64 tile
//               and, once, the KL                                              a warp per row
//   cells       normaliser and cross-entropy of an anchor in a cell            a warp each
//   columns     X in place of the products, and the sums down its columns      a block per 8 columns
//   gradients   X delta of anchors, X^T delta of candidates, and from them dP  a block per 64 x 64 tile
//
// Each element has one owner and every sum an order that depends on the sizes alone: the same bits for any grid.
#include <algorithm>
#include <cmath>

#include "cells.cuh"
#include "gradients.cuh"
#include "kl.cuh"
#include "launch.h"

namespace m2d::cuda {
namespace {

constexpr int kScratch = std::max(kTileScratch, kPoolScratch);
constexpr int64_t kWaveBytes = 12 << 20;  // of X; besides, half as much as the pooled rows take
static_assert(kPoolThreads == kThreads);

// ---- pool, centers, center ----

template <class Scalar, class Real>
M2D_DEVICE void pool(const LossArgs<Real>& p, float* scratch) {
  if (p.row_vectors) {
    pool_rows<Scalar, true>(p.tokens, scratch, p.pooled.delta);
  } else {
    pool_rows<Scalar, false>(p.tokens, scratch, p.pooled.delta);
  }
}

// Of rows that this very block has pooled: no barrier in between.
template <class Real>
M2D_DEVICE void norms(const LossArgs<Real>& p) {
  for_each_row(p, [&](bool is_pooled, int layer, int r) {
    compute_norms(p.shape, row_set(p, is_pooled), layer, r);
  });
}

// A block per layer and chunk, and what no prefix covers.
template <class Real>
M2D_DEVICE void centers(const LossArgs<Real>& p) {
  const GridShape& s = p.shape;
  const int chunks = s.num_dims + 1;
  M2D_SHARED(Real, sums, [kWarps]);
  for (int item = blockIdx.x; item < s.num_layers * chunks; item += block_count()) {
    const int layer = item / chunks;
    const int k = item % chunks;
    const int thread = thread_index();
    Real squared = 0;
    for (int d = s.chunk_begin(k) + thread; d < s.chunk_end(k); d += kThreads) {
      const float element = center_element(s, p.pooled, layer, d);
      p.centers[static_cast<int64_t>(layer) * s.dim + d] = element;
      squared += static_cast<Real>(element) * static_cast<Real>(element);
    }
    squared = warp_sum(squared);
    if (thread % 32 == 0) sums[thread / 32] = squared;
    __syncthreads();
    if (thread == 0 && k < s.num_dims) {
      squared = 0;
      for (int warp = 0; warp < kWarps; ++warp) squared += sums[warp];
      p.center_chunks[layer * s.num_dims + k] = squared;
    }
    __syncthreads();
  }
}

template <class Real>
M2D_DEVICE void center_rows(const LossArgs<Real>& p) {
  const GridShape& s = p.shape;
  for_each_row(p, [&](bool is_pooled, int layer, int r) {
    const int64_t first = static_cast<int64_t>(layer) * s.num_dims;
    center_row(s, row_set(p, is_pooled), p.centers + static_cast<int64_t>(layer) * s.dim,
               p.center_chunks + first, is_pooled && r == 0 ? p.center_squared + first : nullptr,
               layer, r);
  });
}

// ---- reduce ----

// The loss, and the cells that are handed out, by one block.
template <class Real>
M2D_DEVICE void reduce(const LossArgs<Real>& p) {
  if (blockIdx.x != gridDim.x - 1) return;  // which has the fewest tiles
  const GridShape& s = p.shape;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  M2D_SHARED(double, sums, [kWarps]);
  double sum = 0;
  for (int cell = threadIdx.x; cell < s.num_layers * s.num_dims; cell += kThreads) {
    const bool asked = s.weights[cell] != 0.0f;
    p.cells[cell] = asked ? static_cast<float>(p.cell_means[cell]) : NAN;
    if (asked)
      sum += static_cast<double>(s.weights[cell]) * static_cast<double>(p.cell_means[cell]);
  }
  for (int layer = threadIdx.x; layer < s.num_layers; layer += kThreads) {
    const float weight = s.kl_weights[layer];
    if (weight != 0.0f) sum += static_cast<double>(weight) * static_cast<double>(p.kl_means[layer]);
  }
  sum = warp_sum(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double loss = 0;
  for (int w = 0; w < kWarps; ++w) loss += sums[w];
  *p.loss = static_cast<float>(loss);
}

// ---- the kernel ----

template <bool kSplitCells, bool kSplitGradients, class Real>
M2D_DEVICE void run_wave(const LossArgs<Real>& p, const Wave& wave, float* scratch) {
  chunk_products<kSplitCells>(p, wave, scratch);
  if (wave.first_layer + wave.first == 0) learn(p);
  grid_sync();
  anchor_cells(p, wave);
  grid_sync();
  if (p.parts > 1) {
    merge_cell_parts(p, wave);
    grid_sync();
  }
  if (p.shape.wants_grad) columns(p, wave, scratch);
  if (wave.is_last) cell_means(p, wave);
  if (wave.first_layer + wave.first == 0) kl_means(p);
  grid_sync();
  if (!p.shape.wants_grad) return;
  gradients<kSplitGradients>(p, wave, scratch);
  if (p.parts > 1) {
    grid_sync();
    merge_gradient_parts(p, wave, scratch);
  }
}

// In shared memory, a wave takes no registers from the stages. Where no layer has cells, the first one has none either,
// and brings the KL.
template <bool kSplitCells, bool kSplitGradients, class Real>
M2D_DEVICE void run_waves(const LossArgs<Real>& p, float* scratch) {
  M2D_SHARED(Wave, wave, [1]);
  if (threadIdx.x == 0) wave[0] = make_wave(p, 0, 0);
  __syncthreads();
  for (;;) {
    run_wave<kSplitCells, kSplitGradients>(p, wave[0], scratch);
    __syncthreads();
    if (threadIdx.x == 0) wave[0] = next_wave(p, wave[0]);
    __syncthreads();
    if (wave[0].num_layers <= 0) return;
    grid_sync();  // X of the wave before is no longer read
  }
}

// Scalar: of the hidden states, void where pooled rows are given.
template <class Scalar, class Real, bool kSplitCells, bool kSplitGradients>
__global__ void __launch_bounds__(kThreads, kBlocksOfProcessor)
    loss_kernel(const __grid_constant__ LossArgs<Real> p) {
  M2D_SHARED(float, scratch, [kScratch]);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.kl_ticket = 0;
  if constexpr (!std::is_void_v<Scalar>) pool<Scalar>(p, scratch);
  norms(p);
  grid_sync();
  centers(p);
  grid_sync();
  center_rows(p);
  grid_sync();
  run_waves<kSplitCells, kSplitGradients>(p, scratch);
  if (p.shape.wants_grad) other_gradients(p);
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
RowSet<Real> make_rows(const LossParams<float>& p, const Rows<const float>& pooled,
                       const Rows<float>& grad, int64_t count, Arena& arena) {
  const int64_t rows = p.num_layers * count;
  RowSet<Real> set{};
  set.delta = arena.take<float>(rows * p.dim);
  set.pooled = pooled.data == nullptr ? set.delta : pooled.data;
  set.grad = grad.data;
  set.full = arena.take<Real>(rows);
  set.prefixes = arena.take<PrefixRow<Real>>(rows * p.num_dims);
  set.gamma = arena.take<float>(rows);
  set.count = static_cast<int>(count);
  return set;
}

// As many layers as fit, or else a part of one layer's anchors.
template <class Real>
void choose_waves(LossArgs<Real>& args) {
  const GridShape& s = args.shape;
  const int64_t budget = kWaveBytes + static_cast<int64_t>(s.num_layers) * s.num_texts * s.dim * 2;
  args.parts = std::max(1, (s.num_candidates + kPart - 1) / kPart);
  const int64_t part_rows = args.parts > 1 ? args.parts : 0;
  const int64_t row =
      (s.num_dims * args.x_stride + part_rows * s.dim) * static_cast<int64_t>(sizeof(float));
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
  args.pooled = make_rows<Real>(p, p.pooled, p.pooled_grad, p.num_texts, arena);
  args.gathered =
      make_rows<Real>(p, p.candidates, p.candidate_grad, p.gathered ? p.num_candidates : 0, arena);
  args.centers = arena.take<float>(p.num_layers * p.dim);
  args.center_chunks = arena.take<Real>(p.num_layers * p.num_dims);
  args.center_squared = arena.take<Real>(p.num_layers * p.num_dims);
  args.kl_rows = arena.take<KlRow<Real>>(s.has_kl ? p.num_layers * p.num_texts : 0);
  args.kl_ticket = arena.take<int>(1);
  args.x_stride = (p.num_candidates + 3) / 4 * 4;  // rows of whole 16-byte vectors
  choose_waves(args);
  const int64_t cells = p.num_layers * p.num_dims;
  const int64_t wave_rows = static_cast<int64_t>(args.wave_layers) * args.wave_anchors;
  args.x = arena.take<float>(wave_rows * p.num_dims * args.x_stride);
  args.anchor_cells = arena.take<AnchorCell<Real>>(cells * p.num_anchors);
  args.anchor_sums = arena.take<RowSums<Real>>(cells * p.num_anchors);
  args.candidate_sums = arena.take<RowSums<Real>>(s.wants_grad ? cells * p.num_candidates : 0);
  const int64_t part_rows = args.parts > 1 ? wave_rows * args.parts : 0;
  args.cell_parts = arena.take<SoftmaxSums<Real>>(part_rows * p.num_dims);
  args.target_cosines = arena.take<Real>(args.parts > 1 ? wave_rows * p.num_dims : 0);
  args.gradient_parts = arena.take<float>(s.wants_grad ? part_rows * p.dim : 0);
  args.cell_means = arena.take<Real>(cells);
  args.kl_means = arena.take<Real>(p.num_layers);
  args.cells = p.cells;
  args.kl = p.kl;
  args.loss = p.loss;
  return args;
}

template <class Scalar, class Real, bool kSplitCells, bool kSplitGradients>
cudaError_t launch_loss(const LossParams<float>& params, const LossLaunch& how, void* workspace,
                        cudaStream_t stream) {
  Arena arena(workspace);
  LossArgs<Real> args = loss_args<Real>(params, arena);
  if constexpr (!std::is_void_v<Scalar>) {
    args.tokens = device_tokens(*how.tokens);
    args.row_vectors = rows_are_vectors(*how.tokens, sizeof(Scalar));
  }
  const auto kernel = loss_kernel<Scalar, Real, kSplitCells, kSplitGradients>;
  int blocks = 0;
  const cudaError_t error = cooperative_grid(kernel, kThreads, &blocks);
  if (error != cudaSuccess) return error;
  return launch({dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, true}, kernel, args);
}

}  // namespace

bool fits(const LossParams<float>& p) {
  return p.num_layers <= kMaxLayers && p.num_dims <= kMaxDims &&
         p.num_layers * p.dim <= kMostCounted && p.num_layers * p.num_texts <= kMostCounted &&
         p.num_layers * p.num_candidates <= kMostCounted;
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
  if (how.tokens == nullptr && how.type == StateType::kFloat) {
    return split ? launch_loss<void, double, true, true>(params, how, workspace, stream)
                 : launch_loss<void, double, false, false>(params, how, workspace, stream);
  }
  // Of half types the gradient is rounded to fewer bits than tf32 has; the loss is not, and has the scale before it.
  if (how.tokens == nullptr)
    return launch_loss<void, float, true, false>(params, how, workspace, stream);
  switch (how.type) {
    case StateType::kFloat:
      return split ? launch_loss<float, double, true, true>(params, how, workspace, stream)
                   : launch_loss<float, double, false, false>(params, how, workspace, stream);
    case StateType::kBFloat16:
      return launch_loss<__nv_bfloat16, float, true, false>(params, how, workspace, stream);
    case StateType::kHalf:
      return launch_loss<__half, float, true, false>(params, how, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace m2d::cuda
