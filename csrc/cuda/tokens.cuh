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

constexpr int kPoolWarps = 8;
constexpr int kPoolThreads = 32 * kPoolWarps;
constexpr int kLoads = 4;  // of one lane and token: 16 bytes, or one element
constexpr int kPoolScratch =
    kPoolWarps * 32 * kLoads * 8;  // floats of shared memory; 8: half types in 16 bytes

// A panel of one token's columns, as a warp holds it.
template <class Scalar, bool kVectors>
struct PanelRow {
  static constexpr int kCount = kVectors ? RowVector<Scalar>::kCount : 1;
  static constexpr int kSums = kLoads * kCount;  // columns of one lane
  static constexpr int kColumns = 32 * kSums;
  RowVector<Scalar> vectors[kVectors ? kLoads : 1];
  Scalar scalars[kVectors ? 1 : kLoads];

  // Column of element e of load q.
  M2D_DEVICE static int column(int q, int e) {
    return (static_cast<int>(threadIdx.x) % 32 + 32 * q) * kCount + e;
  }

  M2D_DEVICE void load(const Scalar* row, int width) {
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      if (column(q, 0) >= width) continue;
      if constexpr (kVectors) {
        vectors[q].bits = load_streaming(reinterpret_cast<const uint4*>(row + column(q, 0)));
      } else {
        scalars[q] = row[column(q, 0)];
      }
    }
  }

  M2D_DEVICE void add_to(float* sums, float a, int width) const {
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      if (column(q, 0) >= width) continue;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const Scalar x = [&] {
          if constexpr (kVectors)
            return vectors[q].elements[e];
          else
            return scalars[q];
        }();
        sums[q * kCount + e] += a * to_float(x);
      }
    }
  }
};

// out (D) = sum_t a[t] H[t], by all 256 threads of the block: a warp per token, then the warps' sums in order.
// Tokens of coefficient 0 are not read. Ends with `out` visible to the block.
template <class Scalar, bool kVectors>
M2D_DEVICE void pool_text(const DeviceTokens& tokens, int layer, int index, float* scratch,
                          float* out) {
  using Row = PanelRow<Scalar, kVectors>;
  const Text<Scalar> text = find_text<Scalar>(tokens, layer, index);
  const int warp = threadIdx.x / 32;
  for (int begin = 0; begin < tokens.dim; begin += Row::kColumns) {
    const int width = tokens.dim - begin < Row::kColumns ? tokens.dim - begin : Row::kColumns;
    float sums[Row::kSums];
#pragma unroll
    for (int i = 0; i < Row::kSums; ++i) sums[i] = 0.0f;
    // Two tokens at a time: both are on their way before the first is needed.
    for (int64_t t = warp; t < text.count; t += 2 * kPoolWarps) {
      const int64_t next = t + kPoolWarps;
      const float a0 = text.coefficients[t];
      const float a1 = next < text.count ? text.coefficients[next] : 0.0f;
      Row row0, row1;
      if (a0 != 0.0f) row0.load(text.tokens + t * text.token_stride + begin, width);
      if (a1 != 0.0f) row1.load(text.tokens + next * text.token_stride + begin, width);
      if (a0 != 0.0f) row0.add_to(sums, a0, width);
      if (a1 != 0.0f) row1.add_to(sums, a1, width);
    }
#pragma unroll
    for (int i = 0; i < Row::kSums; ++i) {
      const int column = Row::column(i / Row::kCount, i % Row::kCount);
      if (column < width) scratch[warp * Row::kColumns + column] = sums[i];
    }
    __syncthreads();
    for (int column = threadIdx.x; column < width; column += kPoolThreads) {
      float sum = scratch[column];
#pragma unroll
      for (int w = 1; w < kPoolWarps; ++w) sum += scratch[w * Row::kColumns + column];
      out[begin + column] = sum;
    }
    __syncthreads();
  }
}

}  // namespace m2d::cuda
