// The launchers of the CUDA kernels. Pointers in the structs of params.h are device pointers here, except those of
// tables that travel to the kernel by value: blocks, states, dims, weights, kl_weights.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace m2d::cuda {

// What fits into a kernel's arguments.
constexpr int kMaxLayers = 128;
constexpr int kMaxBlocks = 8;
constexpr int kMaxDims = 16;
constexpr int64_t kMostCounted = INT32_MAX / 2;  // rows, columns and widths are counted in 32 bits

enum class StateType { kFloat, kBFloat16, kHalf };

// Whether a problem fits the limits above; the strides of a block must be those of its first layer.
bool fits(const PoolParams& params);
bool fits(const LossParams<float>& params);

// The weighted token sums, as m2d::cpu::pool.
cudaError_t launch_pool(const PoolParams& params, StateType type, cudaStream_t stream);

// The maxima and their tokens, as m2d::cpu::pool_max.
cudaError_t launch_pool_max(const PoolParams& params, StateType type, int32_t* indices,
                            cudaStream_t stream);

// states = grad_output * a * pooled_grad[layers[l]], as m2d::cpu::pool_backward; `grad_output` is a device scalar, or
// nullptr for 1. `layers` is a host array.
cudaError_t launch_pool_backward(const PoolParams& params, StateType type, const float* pooled_grad,
                                 const int64_t* layers, const float* grad_output,
                                 cudaStream_t stream);

// states = incoming + grad_output * a * pooled_grad[layers[l]]; `incoming` has the layout of the states.
cudaError_t launch_pool_backward_add(const PoolParams& params, StateType type,
                                     const float* pooled_grad, const int64_t* layers,
                                     const float* grad_output, const void* const* incoming,
                                     cudaStream_t stream);

// As m2d::cpu::pool_max_backward.
cudaError_t launch_pool_max_backward(const PoolParams& params, StateType type,
                                     const float* pooled_grad, const int32_t* indices,
                                     const int64_t* layers, cudaStream_t stream);

// How the loss is computed.
struct LossLaunch {
  const PoolParams*
      tokens;       // nullptr: params.pooled is given. Else it is not, and is pooled from these
  StateType type;   // of the tokens, or of the pooled rows before they were widened
  bool allow_tf32;  // products in tf32 alone; gradients of half types always have them
};

// Device memory that the launch works in, 256-byte aligned, uninitialised.
size_t loss_workspace_bytes(const LossParams<float>& params, const LossLaunch& how);

// One cooperative launch: cells, kl, loss and, where pooled_grad.data is given, the gradients.
cudaError_t launch_loss(const LossParams<float>& params, const LossLaunch& how, void* workspace,
                        cudaStream_t stream);

}  // namespace m2d::cuda
