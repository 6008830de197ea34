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
constexpr int kDepth = 32;             // of one stage
constexpr int kStages = 2;             // one is on its way while the other is multiplied
// [64][36], or by depth [32][72], and a tile of results: what a warp reads or writes at a time meets different banks.
constexpr int kRowStride = kDepth + 4;
constexpr int kDepthStride = kTile + 8;
constexpr int kTileStride = kTile + 8;
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

  M2D_DEVICE void add(const Accumulator& other) {
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[n][i] += other.values[n][i];
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

// This thread's part of an operand's stages: four neighbours each of some rows, or depths, kStep apart. One copy where
// all fours are whole and aligned.
template <bool kByDepth>
struct StageCopies {
  static constexpr int kVectors = (kByDepth ? kTile : kDepth) / 4;  // side by side
  static constexpr int kStep = kThreads / kVectors;
  static constexpr int kCopies = kTile * kDepth / (4 * kThreads);
  static_assert(!kByDepth || kCopies * kStep == kDepth);

  const float* source;
  int64_t across;    // elements from one of the rows or depths to the next
  int place;         // in a stage
  int rows, depths;  // from this thread's first element to the end
  bool vectors;

  M2D_DEVICE StageCopies(const Operand& x, int depth_begin, int depth_end, int thread) {
    const int outer = thread / kVectors;
    const int inner = thread % kVectors * 4;
    rows = x.rows - (kByDepth ? inner : outer);
    depths = depth_end - depth_begin - (kByDepth ? outer : inner);
    source = x.data + (kByDepth ? depth_begin + outer : outer) * x.stride +
             (kByDepth ? inner : depth_begin + inner);
    across = kStep * x.stride;
    place = outer * (kByDepth ? kDepthStride : kRowStride) + inner;
    vectors = is_aligned(x) && (kByDepth ? x.rows : depth_begin | depth_end) % 4 == 0;
  }

  // The next stage, 0 beyond the operand.
  M2D_DEVICE void start(float* stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const float* from = source + i * across;
      float* to = stage + place + i * kStep * (kByDepth ? kDepthStride : kRowStride);
      const int present =
          (kByDepth ? depths : rows) > i * kStep ? (kByDepth ? rows : depths) : 0;  // of the four
      if (vectors) {
        copy_async<16>(to, from, present > 0);
      } else {
#pragma unroll 1
        for (int e = 0; e < 4; ++e) copy_async<4>(to + e, from + e, e < present);
      }
    }
    source += kByDepth ? kCopies * across : kDepth;
    depths -= kDepth;
  }
};

// Elements of 16 rows and 8 depths as the tensor cores want them: with g = lane / 4, t = lane % 4,
//   x = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
template <bool kByDepth>
M2D_DEVICE void load_fragment(float (&x)[4], const float* stage, int first_row, int depth,
                              int lane) {
  if constexpr (kByDepth) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] =
          stage[(depth + lane % 4 + i / 2 * 4) * kDepthStride + first_row + lane / 4 + i % 2 * 8];
  } else {
    load_rows(x, stage + first_row * kRowStride + depth, kRowStride, lane);
  }
}

struct SplitFloat {
  uint32_t high, low;
};

// x - high is exact, and the tensor cores read its first 11 bits. NaN stays NaN in `low`, infinity in `high`.
M2D_DEVICE SplitFloat split(float x) {
  const uint32_t high = (__float_as_uint(x) + kTf32Half) & kTf32Bits;
  return {high, __float_as_uint(x - __uint_as_float(high))};
}

// The tensor cores cut off the bits beyond tf32's, half a unit of its last place on average. Multiplied with
// 1 + 1.4 2^-12 numbers are rounded as often up as down, those that tf32 has keep their value, and so do infinity and
// NaN.
M2D_DEVICE uint32_t unbiased(float x) {
  return __float_as_uint(x * (1.0f + 1.4f / 4096));
}

// The tensor cores cut what they add to the accumulator, always toward 0. With kSplit, where that counts, a stage is
// summed for itself and added with rounding.
template <bool kSplit, bool kAByDepth, bool kBByDepth>
M2D_DEVICE void multiply_stage(const float* a_stage, const float* b_stage, int thread,
                               Accumulator& c) {
  const int lane = thread % 32;
  const int first_row = thread / 32 % 4 * 16;
  const int first_column = thread / 128 * 32;
  Accumulator part;
  if constexpr (kSplit) part.clear();
#pragma unroll
  for (int k = 0; k < kDepth; k += 8) {
    float x[4];
    load_fragment<kAByDepth>(x, a_stage, first_row, k, lane);
    uint32_t a_high[4], a_low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kSplit) {
        const SplitFloat a = split(x[i]);
        a_high[i] = a.high;
        a_low[i] = a.low;
      } else {
        a_high[i] = unbiased(x[i]);
      }
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float y[4];
      load_fragment<kBByDepth>(y, b_stage, first_column + pair * 16, k, lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = pair * 2 + i;
        if constexpr (kSplit) {
          const SplitFloat b0 = split(y[i]), b1 = split(y[i + 2]);
          const uint32_t b_high[2] = {b0.high, b1.high}, b_low[2] = {b0.low, b1.low};
          mma_tf32(part.values[n], a_low, b_high);
          mma_tf32(part.values[n], a_high, b_low);
          mma_tf32(part.values[n], a_high, b_high);
        } else {
          const uint32_t b_high[2] = {unbiased(y[i]), unbiased(y[i + 2])};
          mma_tf32(c.values[n], a_high, b_high);
        }
      }
    }
  }
  if constexpr (kSplit) c.add(part);
}

// C += A B over depths [depth_begin, depth_end), and while the first of them are on their way, meanwhile(), whose own
// shared memory is not seen by others before the end. All threads of the block; ends with shared memory free for reuse.
template <bool kSplit, bool kAByDepth, bool kBByDepth, class Meanwhile>
M2D_DEVICE void multiply(const Operand& a, const Operand& b, int depth_begin, int depth_end,
                         float* scratch, Accumulator& c, const Meanwhile& meanwhile) {
  const int thread = thread_index();
  StageCopies<kAByDepth> a_copies(a, depth_begin, depth_end, thread);
  StageCopies<kBByDepth> b_copies(b, depth_begin, depth_end, thread);
  const int stages = (depth_end - depth_begin + kDepth - 1) / kDepth;
  // The first rounds only load: one copy of that code.
#pragma unroll 1
  for (int stage = 1 - kStages; stage < stages; ++stage) {
    if (stage >= 0) {
      wait_copies<kStages - 2>();
      __syncthreads();
    }
    const int next = stage + kStages - 1;
    if (next < stages) {
      // Where the stage before this one was, which all threads are done with.
      float* place = scratch + next % kStages * (2 * kStageSize);
      a_copies.start(place);
      b_copies.start(place + kStageSize);
    }
    commit_copies();
    if (stage < 0) {
      if (stage == -1) meanwhile();
      continue;
    }
    const float* place = scratch + stage % kStages * (2 * kStageSize);
    multiply_stage<kSplit, kAByDepth, kBByDepth>(place, place + kStageSize, thread, c);
  }
  wait_copies<0>();
  __syncthreads();
}

}  // namespace m2d::cuda
