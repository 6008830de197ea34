// Hidden-state gradients of all layers in one launch. Bound by the bytes it writes: each row is formed in registers
// and streamed out, padding included.
#include <algorithm>

#include "launch.h"
#include "tokens.cuh"

namespace m2d::cuda {
namespace {

constexpr int kThreadsOfBlock = 256;
constexpr int kTokensPerItem = 32;  // consecutive tokens of one text
constexpr int kBatch = 4;           // tokens that a thread has on their way at a time
constexpr int kMaxItemsPerText = 8;
constexpr int kMaxBlocksOfGrid = 1 << 16;

struct ScatterArgs {
  DeviceTokens tokens;                            // the gradients to write
  const float* pooled_grad;                       // (L, N, D)
  const float* grad_output;                       // scalar; nullptr: 1
  const void* incoming[kMaxLayers * kMaxBlocks];  // kAdd only; strides of the tokens
  int16_t layers[kMaxLayers];                     // of pooled_grad
  int texts_of_layer;                             // see find_written
  int items_per_text;
};

// The texts of a layer, and after them, of packed tokens, those before the first text and those behind the last one,
// which get 0: nobody else would write their gradients.
constexpr int kOutsideTexts = 2;

template <class Scalar>
M2D_DEVICE Text<Scalar> find_written(const DeviceTokens& tokens, int layer, int index) {
  if (index < tokens.num_texts) return find_text<Scalar>(tokens, layer, index);
  const bool is_behind = index > tokens.num_texts;
  Text<Scalar> text = find_text<Scalar>(tokens, layer, is_behind ? tokens.num_texts - 1 : 0);
  const DeviceBlock& block = tokens.blocks[0];
  const int64_t before = text.coefficients - block.coefficients;
  if (is_behind) {
    text.tokens += text.count * text.token_stride;
    text.coefficients += text.count;
    text.count = block.num_tokens - before - text.count;
  } else {
    text.tokens -= before * text.token_stride;
    text.coefficients = block.coefficients;
    text.count = before;
  }
  return text;
}

// What is added to the gradients of a text's tokens: in their layout.
template <class Scalar>
M2D_DEVICE const Scalar* incoming_tokens(const ScatterArgs& p, const Text<Scalar>& text, int layer,
                                         int index) {
  const DeviceTokens& tokens = p.tokens;
  int b = 0;
  while (b + 1 < tokens.num_blocks && index >= tokens.blocks[b + 1].first_text) ++b;
  const int place = layer * tokens.num_blocks + b;
  return static_cast<const Scalar*>(p.incoming[place]) +
         (text.tokens - static_cast<Scalar*>(tokens.states[place]));
}

// Gradients of up to kBatch tokens in one thread's columns: a x, and what came in. A coefficient of 0 writes that
// alone, whatever the row holds.
template <class Scalar, bool kVectors, bool kAdd>
M2D_DEVICE void scatter_tokens(const Text<Scalar>& text, const Scalar* added, int first, int end,
                               int step, int column,
                               const float (&x)[RowShares<Scalar, kVectors>::kCount]) {
  constexpr int kCount = RowShares<Scalar, kVectors>::kCount;
  float a[kBatch];
  RowVector<Scalar> out[kVectors ? kBatch : 1];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int t = first + i * step;
    if (t >= end) continue;
    a[i] = text.coefficients[t];
    if constexpr (kVectors && kAdd) {
      out[i].bits = load_streaming(reinterpret_cast<const uint4*>(
          added + static_cast<int64_t>(t) * text.token_stride + column));
    }
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int t = first + i * step;
    if (t >= end) continue;
    const int64_t place = static_cast<int64_t>(t) * text.token_stride + column;
    if constexpr (kVectors) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const float before = kAdd ? to_float(out[i].elements[e]) : 0.0f;
        out[i].elements[e] = from_float<Scalar>(a[i] == 0.0f ? before : before + a[i] * x[e]);
      }
      store_streaming(reinterpret_cast<uint4*>(text.tokens + place), out[i].bits);
    } else {
      const float before = kAdd ? to_float(added[place]) : 0.0f;
      text.tokens[place] = from_float<Scalar>(a[i] == 0.0f ? before : before + a[i] * x[0]);
    }
  }
}

// x = g source, kWidth elements at a time.
template <int kWidth, int kCount>
M2D_DEVICE void load_scaled(const float* source, float g, float (&x)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; e += kWidth) {
    const auto part = *reinterpret_cast<const FloatVector<kWidth>*>(source + e);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[e + i] = g * part.x[i];
  }
}

// A block per run of kTokensPerItem tokens of a text, the runs taken in turn by the items of the text.
template <class Scalar, bool kVectors, bool kAdd>
__global__ void __launch_bounds__(kThreadsOfBlock)
    scatter_kernel(const __grid_constant__ ScatterArgs p) {
  constexpr int kCount = RowShares<Scalar, kVectors>::kCount;
  const DeviceTokens& tokens = p.tokens;
  const float g = p.grad_output == nullptr ? 1.0f : *p.grad_output;
  const int64_t texts = static_cast<int64_t>(tokens.num_layers) * p.texts_of_layer;
  for (int64_t i = blockIdx.x; i < texts * p.items_per_text; i += gridDim.x) {
    const int64_t item = i / p.items_per_text;
    const int layer = static_cast<int>(item / p.texts_of_layer);
    const int index = static_cast<int>(item % p.texts_of_layer);
    const Text<Scalar> text = find_written<Scalar>(tokens, layer, index);
    const float* row =
        p.pooled_grad +
        (static_cast<int64_t>(p.layers[layer]) * tokens.num_texts + index) * tokens.dim;
    const Scalar* added = kAdd ? incoming_tokens(p, text, layer, index) : nullptr;
    for (int begin = 0; begin < tokens.dim; begin += kThreadsOfBlock * kCount) {
      const RowShares<Scalar, kVectors> shares(tokens.dim, begin, kThreadsOfBlock);
      const int step = shares.num_groups;
      if (shares.group >= step) continue;
      float x[kCount] = {};
      if (index < tokens.num_texts) load_scaled<kVectors ? 4 : 1>(row + shares.column, g, x);
      const int count = static_cast<int>(text.count);
      for (int run = static_cast<int>(i % p.items_per_text) * kTokensPerItem; run < count;
           run += p.items_per_text * kTokensPerItem) {
        const int end = run + kTokensPerItem < count ? run + kTokensPerItem : count;
        for (int t = run + shares.group; t < end; t += kBatch * step)
          scatter_tokens<Scalar, kVectors, kAdd>(text, added, t, end, step, shares.column, x);
      }
    }
  }
}

// The maximum's token gets the gradient, the others 0; a thread per column.
template <class Scalar>
__global__ void __launch_bounds__(kThreadsOfBlock)
    scatter_max_kernel(const __grid_constant__ ScatterArgs p, const int32_t* indices) {
  const DeviceTokens& tokens = p.tokens;
  const int64_t texts = static_cast<int64_t>(tokens.num_layers) * p.texts_of_layer;
  for (int64_t i = blockIdx.x; i < texts; i += gridDim.x) {
    const int layer = static_cast<int>(i / p.texts_of_layer);
    const int index = static_cast<int>(i % p.texts_of_layer);
    const Text<Scalar> text = find_written<Scalar>(tokens, layer, index);
    const int64_t row =
        (static_cast<int64_t>(p.layers[layer]) * tokens.num_texts + index) * tokens.dim;
    const bool is_text = index < tokens.num_texts;
    for (int d = threadIdx.x; d < tokens.dim; d += kThreadsOfBlock) {
      const Scalar value = from_float<Scalar>(is_text ? p.pooled_grad[row + d] : 0.0f);
      const int64_t chosen = is_text ? indices[row + d] : -1;
      for (int64_t t = 0; t < text.count; ++t)
        text.tokens[t * text.token_stride + d] = t == chosen ? value : from_float<Scalar>(0.0f);
    }
  }
}

ScatterArgs scatter_args(const PoolParams& params, const float* pooled_grad, const int64_t* layers,
                         const float* grad_output) {
  ScatterArgs args{};
  args.tokens = device_tokens(params);
  args.pooled_grad = pooled_grad;
  args.grad_output = grad_output;
  for (int64_t l = 0; l < params.num_layers; ++l) args.layers[l] = static_cast<int16_t>(layers[l]);
  const bool packed = params.num_texts > 0 && params.blocks[0].token_offsets != nullptr;
  args.texts_of_layer = args.tokens.num_texts + (packed ? kOutsideTexts : 0);
  // Of a packed text only the sum of all lengths is known on the host.
  int64_t longest = 1;
  for (int64_t b = 0; b < params.num_blocks; ++b)
    longest = std::max(longest, params.blocks[b].num_tokens);
  args.items_per_text = static_cast<int>(
      std::min<int64_t>((longest + kTokensPerItem - 1) / kTokensPerItem, kMaxItemsPerText));
  return args;
}

Launch scatter_launch(int64_t items, cudaStream_t stream) {
  const int64_t blocks = std::clamp<int64_t>(items, 1, kMaxBlocksOfGrid);
  return {dim3(static_cast<unsigned>(blocks)), dim3(kThreadsOfBlock), stream, false};
}

template <class Scalar, bool kAdd>
cudaError_t launch_scatter(const PoolParams& params, const ScatterArgs& args, bool vectors,
                           cudaStream_t stream) {
  const Launch config =
      scatter_launch(params.num_layers * args.texts_of_layer * args.items_per_text, stream);
  return vectors ? launch(config, scatter_kernel<Scalar, true, kAdd>, args)
                 : launch(config, scatter_kernel<Scalar, false, kAdd>, args);
}

template <bool kAdd>
cudaError_t launch_scatter(const PoolParams& params, StateType type, const ScatterArgs& args,
                           cudaStream_t stream) {
  bool vectors = rows_are_vectors(params, type == StateType::kFloat ? 4 : 2) &&
                 reinterpret_cast<uintptr_t>(args.pooled_grad) % 16 == 0;
  if (kAdd) {
    for (int64_t i = 0; i < params.num_layers * params.num_blocks; ++i)
      vectors = vectors && reinterpret_cast<uintptr_t>(args.incoming[i]) % 16 == 0;
  }
  switch (type) {
    case StateType::kFloat:
      return launch_scatter<float, kAdd>(params, args, vectors, stream);
    case StateType::kBFloat16:
      return launch_scatter<__nv_bfloat16, kAdd>(params, args, vectors, stream);
    case StateType::kHalf:
      return launch_scatter<__half, kAdd>(params, args, vectors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_pool_backward(const PoolParams& params, StateType type, const float* pooled_grad,
                                 const int64_t* layers, const float* grad_output,
                                 cudaStream_t stream) {
  return launch_scatter<false>(params, type, scatter_args(params, pooled_grad, layers, grad_output),
                               stream);
}

cudaError_t launch_pool_backward_add(const PoolParams& params, StateType type,
                                     const float* pooled_grad, const int64_t* layers,
                                     const float* grad_output, const void* const* incoming,
                                     cudaStream_t stream) {
  ScatterArgs args = scatter_args(params, pooled_grad, layers, grad_output);
  std::copy_n(incoming, params.num_layers * params.num_blocks, args.incoming);
  return launch_scatter<true>(params, type, args, stream);
}

cudaError_t launch_pool_max_backward(const PoolParams& params, StateType type,
                                     const float* pooled_grad, const int32_t* indices,
                                     const int64_t* layers, cudaStream_t stream) {
  const ScatterArgs args = scatter_args(params, pooled_grad, layers, nullptr);
  const Launch config = scatter_launch(params.num_layers * args.texts_of_layer, stream);
  switch (type) {
    case StateType::kFloat:
      return launch(config, scatter_max_kernel<float>, args, indices);
    case StateType::kBFloat16:
      return launch(config, scatter_max_kernel<__nv_bfloat16>, args, indices);
    case StateType::kHalf:
      return launch(config, scatter_max_kernel<__half>, args, indices);
  }
  return cudaErrorInvalidValue;
}

}  // namespace m2d::cuda
