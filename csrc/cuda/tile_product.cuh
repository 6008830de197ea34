// Products of float32 matrices on the tensor cores, a 64 x 64 tile per block of 256 threads.
//
// A float is the sum of two tf32 numbers, x = hi + lo, to 21 of its 24 bits; hi hi + hi lo + lo hi is accumulated
// in float32 and keeps float32's accuracy (kSplit). Without it the products have tf32's 11 bits.
#pragma once

#include "device.cuh"

namespace m2d::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksOfProcessor = 2;  // at least; by registers
constexpr int kTile = 64;              // rows and columns of a block's tile: 4 x 2 warps of 16 x 32
constexpr int kDepth = 16;             // of one stage
constexpr int kStages = 4;             // of which three are on their way while one is multiplied
constexpr int kRowStride =
    kDepth + 4;  // [64][20]: fragments meet 32 different banks, and so they do in
constexpr int kDepthStride = kTile + 8;  // [16][72]
constexpr int kTileStride =
    kTile + 8;  // of a tile in shared memory; pairs of a fragment meet different banks
constexpr int kStageSize = kTile * kRowStride;
static_assert(kDepth * kDepthStride <= kStageSize);
constexpr int kTileScratch = 2 * kStages * kStageSize;  // floats of shared memory: two operands

// One operand of a tile: element (r, k), r < rows, at data[r * stride + k] or, kByDepth, at data[k * stride + r].
struct Operand {
  const float* data;
  int64_t stride;
  int rows;
};

// The 64 x 64 tile of C that this block of threads owns; each thread holds 16 of its elements.
struct Accumulator {
  float values[4][4];

  M2D_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[n][i] = 0.0f;
  }

  // body(row, column, C) for this thread's elements among the first `rows` and `columns`.
  template <class Body>
  M2D_DEVICE void for_each(int rows, int columns, const Body& body) const {
    const int lane = thread_index() % 32;
    const int warp = thread_index() / 32;
    const int first_row = warp % 4 * 16 + lane / 4;
    const int first_column = warp / 4 * 32 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + i / 2 * 8;
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int column = first_column + n * 8 + i % 2;
        if (column < columns) body(row, column, values[n][i]);
      }
    }
  }
};

M2D_DEVICE bool is_aligned(const Operand& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 4 == 0;
}

// Elements (0..63, depth..depth+31) of an operand, 0 beyond its rows and `depth_end`.
template <bool kByDepth, int kBytes>
M2D_DEVICE void load_stage(const Operand& x, int thread, int depth, int depth_end, float* stage) {
  constexpr int kCount = kBytes / 4;
  constexpr int kInner = (kByDepth ? kTile : kDepth) / kCount;
  const int inner_end = kByDepth ? x.rows : depth_end - depth;
  const int outer_end = kByDepth ? depth_end - depth : x.rows;
  const float* data = x.data + (kByDepth ? depth * x.stride : depth);
#pragma unroll kBytes == 16 ? 2 : 1
  for (int i = thread; i < kTile * kDepth / kCount; i += kThreads) {
    const int outer = i / kInner;
    const int inner = i % kInner * kCount;
    int valid = outer < outer_end ? inner_end - inner : 0;
    valid = valid < 0 ? 0 : valid > kCount ? kCount : valid;
    const float* source = valid > 0 ? data + outer * x.stride + inner : x.data;
    copy_async<kBytes>(stage + outer * (kByDepth ? kDepthStride : kRowStride) + inner, source,
                       4 * valid);
  }
}

template <bool kByDepth>
M2D_DEVICE void load_stage(const Operand& x, bool aligned, int thread, int depth, int depth_end,
                           float* stage) {
  if (aligned) {
    load_stage<kByDepth, 16>(x, thread, depth, depth_end, stage);
  } else {
    load_stage<kByDepth, 4>(x, thread, depth, depth_end, stage);
  }
}

template <bool kByDepth>
M2D_DEVICE float stage_element(const float* stage, int row, int depth) {
  return kByDepth ? stage[depth * kDepthStride + row] : stage[row * kRowStride + depth];
}

struct SplitFloat {
  uint32_t high, low;
};

M2D_DEVICE SplitFloat split(float x) {
  const uint32_t high = to_tf32(x);
  return {high, to_tf32(x - __uint_as_float(high))};
}

// The tensor cores cut what they add to the accumulator, always toward 0. With kSplit, where that counts, every 8 depths
// are summed for themselves and added with rounding.
template <bool kSplit, bool kAByDepth, bool kBByDepth>
M2D_DEVICE void multiply_stage(const float* a_stage, const float* b_stage, int thread,
                               Accumulator& c) {
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int g = lane / 4;
  const int t = lane % 4;
#pragma unroll 1
  for (int k = 0; k < kDepth; k += 8) {
    uint32_t a_high[4], a_low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const SplitFloat a = split(
          stage_element<kAByDepth>(a_stage, warp % 4 * 16 + g + i % 2 * 8, k + t + i / 2 * 4));
      a_high[i] = a.high;
      a_low[i] = a.low;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b_high[2], b_low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const SplitFloat b =
            split(stage_element<kBByDepth>(b_stage, warp / 4 * 32 + n * 8 + g, k + t + i * 4));
        b_high[i] = b.high;
        b_low[i] = b.low;
      }
      if constexpr (kSplit) {
        float part[4] = {};
        mma_tf32(part, a_low, b_high);
        mma_tf32(part, a_high, b_low);
        mma_tf32(part, a_high, b_high);
#pragma unroll
        for (int i = 0; i < 4; ++i) c.values[n][i] += part[i];
      } else {
        mma_tf32(c.values[n], a_high, b_high);
      }
    }
  }
}

// C += A B over depths [depth_begin, depth_end). All threads of the block; ends with shared memory free for reuse.
template <bool kSplit, bool kAByDepth, bool kBByDepth>
M2D_DEVICE void multiply(const Operand& a, const Operand& b, int depth_begin, int depth_end,
                         float* scratch, Accumulator& c) {
  const bool a_aligned = is_aligned(a) && (kAByDepth || depth_begin % 4 == 0);
  const bool b_aligned = is_aligned(b) && (kBByDepth || depth_begin % 4 == 0);
  const int thread = thread_index();
  const int stages = (depth_end - depth_begin + kDepth - 1) / kDepth;
  const auto load = [&](int stage) {
    if (stage < stages) {
      float* place = scratch + stage % kStages * (2 * kStageSize);
      const int depth = depth_begin + stage * kDepth;
      load_stage<kAByDepth>(a, a_aligned, thread, depth, depth_end, place);
      load_stage<kBByDepth>(b, b_aligned, thread, depth, depth_end, place + kStageSize);
    }
    commit_copies();
  };
  // The first rounds only load: one copy of that code.
#pragma unroll 1
  for (int stage = 1 - kStages; stage < stages; ++stage) {
    if (stage >= 0) {
      wait_copies<kStages - 2>();
      __syncthreads();
    }
    // Where the stage before this one was, which all threads are done with.
    load(stage + kStages - 1);
    if (stage < 0) continue;
    const float* place = scratch + stage % kStages * (2 * kStageSize);
    multiply_stage<kSplit, kAByDepth, kBByDepth>(place, place + kStageSize, thread, c);
  }
  wait_copies<0>();
  __syncthreads();
}

}  // namespace m2d::cuda
