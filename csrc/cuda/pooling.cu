// Pooling of all layers in one launch: weighted token sums, and maxima.
#include <algorithm>

#include "launch.h"
#include "tokens.cuh"

namespace m2d::cuda {
namespace {

constexpr int kMaxBlocksOfGrid = 1 << 16;

template <class Scalar, bool kVectors>
__global__ void __launch_bounds__(kPoolThreads)
    pool_kernel(const __grid_constant__ DeviceTokens tokens, float* pooled) {
  M2D_SHARED(float, scratch, [kPoolScratch]);
  pool_rows<Scalar, kVectors>(tokens, scratch, pooled);
}

// A thread per column: the maximum over tokens whose coefficient is not 0, NaN the largest, the first of equals.
template <class Scalar>
__global__ void __launch_bounds__(kPoolThreads)
    pool_max_kernel(const __grid_constant__ DeviceTokens tokens, float* pooled, int32_t* indices) {
  const int64_t items = static_cast<int64_t>(tokens.num_layers) * tokens.num_texts;
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    const Text<Scalar> text = find_text<Scalar>(tokens, static_cast<int>(i / tokens.num_texts),
                                                static_cast<int>(i % tokens.num_texts));
    for (int d = threadIdx.x; d < tokens.dim; d += kPoolThreads) {
      float best = 0.0f;
      int32_t index = -1;
      for (int64_t t = 0; t < text.count; ++t) {
        if (text.coefficients[t] == 0.0f) continue;
        const float x = to_float(text.tokens[t * text.token_stride + d]);
        if (index < 0 || x > best || (x != x && best == best)) {
          best = x;
          index = static_cast<int32_t>(t);
        }
      }
      pooled[i * tokens.dim + d] = best;
      indices[i * tokens.dim + d] = index;
    }
  }
}

Launch text_launch(const PoolParams& params, cudaStream_t stream) {
  const int64_t items = params.num_layers * params.num_texts;
  const int64_t blocks = std::clamp<int64_t>(items, 1, kMaxBlocksOfGrid);
  return {dim3(static_cast<unsigned>(blocks)), dim3(kPoolThreads), stream, false};
}

template <class Scalar>
cudaError_t launch_pool(const PoolParams& params, cudaStream_t stream) {
  float* pooled = static_cast<float*>(params.pooled);
  return rows_are_vectors(params, sizeof(Scalar))
             ? launch(text_launch(params, stream), pool_kernel<Scalar, true>, device_tokens(params),
                      pooled)
             : launch(text_launch(params, stream), pool_kernel<Scalar, false>,
                      device_tokens(params), pooled);
}

}  // namespace

bool fits(const PoolParams& p) {
  if (p.num_layers > kMaxLayers || p.num_blocks > kMaxBlocks || p.dim > kMostCounted ||
      p.num_layers * p.num_texts > kMostCounted)
    return false;
  for (int64_t i = 0; i < p.num_layers * p.num_blocks; ++i) {
    const StateView& first = p.states[i % p.num_blocks];
    if (p.states[i].text_stride != first.text_stride ||
        p.states[i].token_stride != first.token_stride)
      return false;
  }
  return true;
}

cudaError_t launch_pool(const PoolParams& params, StateType type, cudaStream_t stream) {
  switch (type) {
    case StateType::kFloat:
      return launch_pool<float>(params, stream);
    case StateType::kBFloat16:
      return launch_pool<__nv_bfloat16>(params, stream);
    case StateType::kHalf:
      return launch_pool<__half>(params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_pool_max(const PoolParams& params, StateType type, int32_t* indices,
                            cudaStream_t stream) {
  const Launch config = text_launch(params, stream);
  const DeviceTokens tokens = device_tokens(params);
  float* pooled = static_cast<float*>(params.pooled);
  switch (type) {
    case StateType::kFloat:
      return launch(config, pool_max_kernel<float>, tokens, pooled, indices);
    case StateType::kBFloat16:
      return launch(config, pool_max_kernel<__nv_bfloat16>, tokens, pooled, indices);
    case StateType::kHalf:
      return launch(config, pool_max_kernel<__half>, tokens, pooled, indices);
  }
  return cudaErrorInvalidValue;
}

}  // namespace m2d::cuda
