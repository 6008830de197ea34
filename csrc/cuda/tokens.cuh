// Hidden states by value in a kernel's arguments, and the weighted sum of one text's tokens.
#pragma once

#include "../params.h"
#include "device.cuh"
#include "launch.h"

namespace m2d::cuda {

struct DeviceBlock {
  int64_t num_tokens;
  int64_t text_stride, token_stride;
  const int64_t* token_offsets;
  const float* coefficients;
  int first_text, num_texts;
};

struct DeviceTokens {
  int num_layers, num_blocks, num_texts, dim;
  DeviceBlock blocks[kMaxBlocks];
  void* states[kMaxLayers * kMaxBlocks];  // (num_layers, num_blocks)
};

inline DeviceTokens device_tokens(const PoolParams& p) {
  DeviceTokens tokens{};
  tokens.num_layers = static_cast<int>(p.num_layers);
  tokens.num_blocks = static_cast<int>(p.num_blocks);
  tokens.num_texts = static_cast<int>(p.num_texts);
  tokens.dim = static_cast<int>(p.dim);
  for (int b = 0; b < tokens.num_blocks; ++b) {
    const TokenBlock& block = p.blocks[b];
    tokens.blocks[b] = {block.num_tokens,
                        p.states[b].text_stride,
                        p.states[b].token_stride,
                        block.token_offsets,
                        static_cast<const float*>(block.coefficients),
                        static_cast<int>(block.first_text),
                        static_cast<int>(block.num_texts)};
  }
  for (int64_t i = 0; i < p.num_layers * p.num_blocks; ++i) tokens.states[i] = p.states[i].data;
  return tokens;
}

// Whether every row of every state starts at a multiple of 16 bytes and is as long as one.
inline bool rows_are_vectors(const PoolParams& p, int64_t element_size) {
  const int64_t count = 16 / element_size;
  bool aligned = p.dim % count == 0;
  for (int64_t i = 0; i < p.num_layers * p.num_blocks; ++i) {
    const StateView& state = p.states[i];
    aligned = aligned && reinterpret_cast<uintptr_t>(state.data) % 16 == 0 &&
              state.text_stride % count == 0 && state.token_stride % count == 0;
  }
  return aligned;
}

M2D_DEVICE float to_float(float x) {
  return x;
}
M2D_DEVICE float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
M2D_DEVICE float to_float(__half x) {
  return __half2float(x);
}

template <class Scalar>
M2D_DEVICE Scalar from_float(float x);
template <>
M2D_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
M2D_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
M2D_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// 16 bytes of a row.
template <class Scalar>
union RowVector {
  static constexpr int kCount = 16 / sizeof(Scalar);
  uint4 bits;
  Scalar elements[kCount];

  M2D_DEVICE RowVector() : bits{0, 0, 0, 0} {}
};

// Its elements as floats.
template <class Scalar>
M2D_DEVICE void to_floats(const RowVector<Scalar>& x, float (&out)[RowVector<Scalar>::kCount]) {
#pragma unroll
  for (int e = 0; e < RowVector<Scalar>::kCount; ++e) out[e] = to_float(x.elements[e]);
}
// A bfloat16 is the first half of a float.
M2D_DEVICE void to_floats(const RowVector<__nv_bfloat16>& x, float (&out)[8]) {
  const uint32_t words[4] = {x.bits.x, x.bits.y, x.bits.z, x.bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// The tokens of one text in one layer.
template <class Scalar>
struct Text {
  Scalar* tokens;
  int64_t token_stride;
  const float* coefficients;
  int64_t count;
};

// Offsets in device memory are nobody's promise: they are clamped to the tokens that are there.
template <class Scalar>
M2D_DEVICE Text<Scalar> find_text(const DeviceTokens& tokens, int layer, int text) {
  int b = 0;
  while (text >= tokens.blocks[b].first_text + tokens.blocks[b].num_texts) ++b;
  const DeviceBlock& block = tokens.blocks[b];
  Scalar* states = static_cast<Scalar*>(tokens.states[layer * tokens.num_blocks + b]);
  const int64_t local = text - block.first_text;
  if (block.token_offsets == nullptr) {
    return {states + local * block.text_stride, block.token_stride,
            block.coefficients + local * block.num_tokens, block.num_tokens};
  }
  int64_t begin = block.token_offsets[local];
  int64_t end = block.token_offsets[local + 1];
  begin = begin < 0 ? 0 : begin > block.num_tokens ? block.num_tokens : begin;
  end = end < begin ? begin : end > block.num_tokens ? block.num_tokens : end;
  return {states + begin * block.token_stride, block.token_stride, block.coefficients + begin,
          end - begin};
}

// How the threads of a block share rows of `dim` elements: a thread owns one vector of the row, or one element, and
// every num_groups-th token.
template <class Scalar, bool kVectors>
struct RowShares {
  static constexpr int kCount = kVectors ? RowVector<Scalar>::kCount : 1;  // elements of a thread
  int width, num_groups;  // threads to a row, tokens at a time
  int group, column;      // of this thread; from group num_groups on, it has none

  // Of the columns from `begin` on, as many as there are threads.
  M2D_DEVICE RowShares(int dim, int begin, int threads) {
    const int left = (dim - begin) / kCount;
    width = left < threads ? left : threads;
    num_groups = threads / width;
    group = static_cast<int>(threadIdx.x) / width;
    column = begin + static_cast<int>(threadIdx.x) % width * kCount;
  }
};

template <int kCount>
struct alignas(4 * kCount) FloatVector {
  float x[kCount];
};

constexpr int kPoolThreads = 256;
// Steps of a lap: so many vectors of each thread are on their way at any time.
constexpr int kPoolSteps = 8;
constexpr int kPoolCommit = 2;  // steps whose copies are waited for together
// Floats of shared memory: those vectors, and a sum per column.
constexpr int kPoolScratch = kPoolThreads * kPoolSteps * 4 + kPoolThreads * 8;

// Some tokens of a row: each group of threads takes so many neighbours as a lap has steps. A row is so many laps long.
template <class Scalar>
struct PoolLap {
  using Shares = RowShares<Scalar, true>;
  int row, begin;             // of all layers' rows; first column
  int lap, laps;              // of the row's panel of columns
  const Scalar* source;       // this thread's vector of its first token
  const float* coefficients;  // from its first token on
  int left;                   // tokens from there to the end; none for a thread without a group
  int tokens_of_lap;
  int64_t token_stride;

  M2D_DEVICE void start(const DeviceTokens& tokens) {
    left = 0;
    if (row >= tokens.num_layers * tokens.num_texts) return;
    const Text<Scalar> text =
        find_text<Scalar>(tokens, row / tokens.num_texts, row % tokens.num_texts);
    const Shares shares(tokens.dim, begin, kPoolThreads);
    const int count = static_cast<int>(text.count);
    const int first = shares.group * kPoolSteps;
    tokens_of_lap = shares.num_groups * kPoolSteps;
    lap = 0;
    laps = (count + tokens_of_lap - 1) / tokens_of_lap;
    token_stride = text.token_stride;
    source = text.tokens + first * token_stride + shares.column;
    coefficients = text.coefficients + first;
    if (shares.group < shares.num_groups) left = count - first;
  }

  M2D_DEVICE bool is_last() const { return lap + 1 >= laps; }

  M2D_DEVICE PoolLap next(const DeviceTokens& tokens) const {
    PoolLap result = *this;
    if (!is_last()) {
      ++result.lap;
      result.source += tokens_of_lap * token_stride;
      result.coefficients += tokens_of_lap;
      result.left -= tokens_of_lap;
      return result;
    }
    result.begin += kPoolThreads * Shares::kCount;
    if (result.begin >= tokens.dim) {
      result.begin = 0;
      result.row += block_count();
    }
    result.start(tokens);
    return result;
  }

  // 0 where there is no token.
  M2D_DEVICE float coefficient(int i) const { return i < left ? coefficients[i] : 0.0f; }
};

// The groups' sums of one panel of a row, in order, to where P is.
template <class Scalar>
M2D_DEVICE void store_row(const DeviceTokens& tokens, int row, int begin, const float* sums,
                          float* scratch, float* out) {
  using Shares = RowShares<Scalar, true>;
  const Shares shares(tokens.dim, begin, kPoolThreads);
  const int thread = thread_index();
#pragma unroll
  for (int e = 0; e < Shares::kCount; e += 4) {
    *reinterpret_cast<FloatVector<4>*>(scratch + thread * Shares::kCount +
                                       e) = {{sums[e], sums[e + 1], sums[e + 2], sums[e + 3]}};
  }
  __syncthreads();
  const int columns = shares.width * Shares::kCount;
  for (int i = 4 * thread; i < columns; i += 4 * kPoolThreads) {
    auto sum = *reinterpret_cast<const FloatVector<4>*>(scratch + i);
    for (int g = 1; g < shares.num_groups; ++g) {
      const auto other = *reinterpret_cast<const FloatVector<4>*>(scratch + g * columns + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.x[e] += other.x[e];
    }
    *reinterpret_cast<FloatVector<4>*>(out + static_cast<int64_t>(row) * tokens.dim + begin + i) =
        sum;
  }
  __syncthreads();
}

// What the sums of laps are summed in. The rounding errors of one running float would grow with the number of tokens,
// and the means of long texts are so nearly parallel that little but their last digits makes the gradient.
template <class Scalar>
using SumOf = std::conditional_t<std::is_same_v<Scalar, float>, double, float>;

// P = sum_t a[t] H[t] of rows blockIdx.x, blockIdx.x + gridDim.x, ... of all layers (L N, D), by the kPoolThreads
// threads of a block. The tokens stream through shared memory, without a pause from one row to the next: while a lap is
// summed, the vectors of the next are on their way, and so are the coefficients of the one after. Each thread reads
// what it has copied itself, so that nobody waits for others before the end of a row. Tokens of coefficient 0 are not
// read.
template <class Scalar>
M2D_DEVICE void stream_rows(const DeviceTokens& tokens, float* scratch, float* out) {
  constexpr int kCount = RowShares<Scalar, true>::kCount;
  const int rows = tokens.num_layers * tokens.num_texts;
  RowVector<Scalar>* slots = reinterpret_cast<RowVector<Scalar>*>(scratch) + thread_index();
  float* row_scratch = scratch + kPoolThreads * kPoolSteps * 4;
  PoolLap<Scalar> current{};
  current.row = static_cast<int>(blockIdx.x);
  current.start(tokens);
  float a[kPoolSteps], next_a[kPoolSteps];
#pragma unroll
  for (int i = 0; i < kPoolSteps; ++i) a[i] = current.coefficient(i);
#pragma unroll
  for (int i = 0; i < kPoolSteps; ++i) {
    copy_async<16>(slots + i * kPoolThreads, current.source + i * current.token_stride,
                   a[i] != 0.0f);
    if (i % kPoolCommit == kPoolCommit - 1) commit_copies();
  }
  PoolLap<Scalar> next = current.row < rows ? current.next(tokens) : current;
#pragma unroll
  for (int i = 0; i < kPoolSteps; ++i) next_a[i] = next.coefficient(i);
  float of_lap[kCount] = {};
  SumOf<Scalar> sums[kCount] = {};
#pragma unroll 1
  while (current.row < rows) {
    const PoolLap<Scalar> after = next.row < rows ? next.next(tokens) : next;
    const Scalar* source = next.source;
#pragma unroll
    for (int i = 0; i < kPoolSteps; ++i) {
      if (i % kPoolCommit == 0) wait_copies<kPoolSteps / kPoolCommit - 1>();
      RowVector<Scalar>* slot = slots + i * kPoolThreads;
      float x[kCount];
      to_floats(*slot, x);
#pragma unroll
      for (int e = 0; e < kCount; ++e) of_lap[e] += a[i] * x[e];
      a[i] = next_a[i];
      copy_async<16>(slot, source, a[i] != 0.0f);
      if (i % kPoolCommit == kPoolCommit - 1) commit_copies();
      source += next.token_stride;
      next_a[i] = after.coefficient(i);
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      sums[e] += static_cast<SumOf<Scalar>>(of_lap[e]);
      of_lap[e] = 0.0f;
    }
    if (current.is_last()) {
      float row[kCount];
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        row[e] = static_cast<float>(sums[e]);
        sums[e] = 0;
      }
      store_row<Scalar>(tokens, current.row, current.begin, row, row_scratch, out);
    }
    current = next;
    next = after;
  }
  wait_copies<0>();
}

// The same where rows are not whole vectors: a thread per column.
template <class Scalar>
M2D_DEVICE void sum_rows(const DeviceTokens& tokens, float* out) {
  const int rows = tokens.num_layers * tokens.num_texts;
  for (int row = blockIdx.x; row < rows; row += block_count()) {
    const Text<Scalar> text =
        find_text<Scalar>(tokens, row / tokens.num_texts, row % tokens.num_texts);
    for (int d = thread_index(); d < tokens.dim; d += kPoolThreads) {
      SumOf<Scalar> sum = 0;
      for (int64_t first = 0; first < text.count; first += kPoolSteps) {
        float of_lap = 0.0f;
#pragma unroll 4
        for (int64_t t = first; t < first + kPoolSteps && t < text.count; ++t) {
          const float a = text.coefficients[t];
          if (a != 0.0f) of_lap += a * to_float(text.tokens[t * text.token_stride + d]);
        }
        sum += static_cast<SumOf<Scalar>>(of_lap);
      }
      out[static_cast<int64_t>(row) * tokens.dim + d] = static_cast<float>(sum);
    }
  }
}

// Ends with the rows visible to the block.
template <class Scalar, bool kVectors>
M2D_DEVICE void pool_rows(const DeviceTokens& tokens, float* scratch, float* out) {
  if constexpr (kVectors) {
    stream_rows<Scalar>(tokens, scratch, out);
  } else {
    sum_rows<Scalar>(tokens, out);
  }
  __syncthreads();
}

}  // namespace m2d::cuda
