// Operators on CUDA tensors: validate, allocate, launch on the current stream. Nothing here waits for the device.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "launch.h"

namespace m2d::cuda {
namespace {

StateType state_type(at::ScalarType type) {
  TORCH_CHECK(type != at::kDouble,
              "the CUDA kernels of m2d_ext compute in float32: float64 is left to the reference");
  if (type == at::kBFloat16) return StateType::kBFloat16;
  if (type == at::kHalf) return StateType::kHalf;
  TORCH_CHECK(type == at::kFloat, "CUDA tensors must be float32, bfloat16 or float16, got ", type);
  return StateType::kFloat;
}

StateType state_type(const PoolProblem& problem) {
  return state_type(at::typeMetaToScalarType(problem.options.dtype()));
}

void check_fits(const PoolParams& p) {
  TORCH_CHECK(p.num_layers <= kMaxLayers, "the CUDA kernels take at most ", kMaxLayers,
              " layers, got ", p.num_layers);
  TORCH_CHECK(p.num_blocks <= kMaxBlocks, "the CUDA kernels take at most ", kMaxBlocks,
              " tensors of hidden states per layer, got ", p.num_blocks);
  TORCH_CHECK(fits(p), "the CUDA kernels do not take hidden states of ", p.num_texts,
              " texts of width ", p.dim);
}

void check_fits(const LossParams<float>& p) {
  TORCH_CHECK(p.num_layers <= kMaxLayers, "the CUDA kernels take at most ", kMaxLayers,
              " layers, got ", p.num_layers);
  TORCH_CHECK(p.num_dims <= kMaxDims, "the CUDA kernels take at most ", kMaxDims, " dims, got ",
              p.num_dims);
  TORCH_CHECK(fits(p), "the CUDA kernels do not take ", p.num_texts, " texts and ",
              p.num_candidates, " candidates of width ", p.dim);
}

// Nobody steps along a dimension of one element, so any stride will do: that of the first layer.
void align_unused_strides(PoolProblem& problem) {
  const int64_t blocks = problem.params.num_blocks;
  for (size_t i = blocks; i < problem.states.size(); ++i) {
    const TokenBlock& block = problem.blocks[i % blocks];
    const StateView& first = problem.states[i % blocks];
    if (block.num_texts <= 1) problem.states[i].text_stride = first.text_stride;
    if (block.num_tokens <= 1) problem.states[i].token_stride = first.token_stride;
  }
}

bool strides_agree(const PoolProblem& problem) {
  const int64_t blocks = problem.params.num_blocks;
  for (size_t i = blocks; i < problem.states.size(); ++i) {
    const StateView& state = problem.states[i];
    const StateView& first = problem.states[i % blocks];
    if (state.text_stride != first.text_stride || state.token_stride != first.token_stride)
      return false;
  }
  return true;
}

// The layers of a block in one layout, as launch.h wants them: copied where they differ, which a model's own do not.
PoolProblem read_uniform_states(at::TensorList hidden_states, at::TensorList coefficients,
                                const std::optional<Tensor>& cu_seqlens) {
  PoolProblem problem = read_states(hidden_states, coefficients, cu_seqlens);
  align_unused_strides(problem);
  if (!strides_agree(problem)) {
    std::vector<Tensor> dense;
    for (const Tensor& state : hidden_states) dense.push_back(state.contiguous());
    problem = read_states(dense, coefficients, cu_seqlens);
    align_unused_strides(problem);
  }
  check_fits(problem.params);
  return problem;
}

Tensor empty_pooled(const PoolProblem& problem) {
  const PoolParams& p = problem.params;
  return at::empty({p.num_layers, p.num_texts, p.dim}, problem.options.dtype(at::kFloat));
}

Tensor pool_op(at::TensorList hidden_states, at::TensorList coefficients,
               const std::optional<Tensor>& cu_seqlens) {
  PoolProblem problem = read_uniform_states(hidden_states, coefficients, cu_seqlens);
  const StateType type = state_type(problem);
  const c10::cuda::CUDAGuard guard(problem.options.device());
  Tensor pooled = empty_pooled(problem);
  problem.params.pooled = pooled.data_ptr();
  if (pooled.numel() > 0)
    C10_CUDA_CHECK(launch_pool(problem.params, type, c10::cuda::getCurrentCUDAStream()));
  return pooled;
}

std::tuple<Tensor, Tensor> pool_max_op(at::TensorList hidden_states, at::TensorList coefficients,
                                       const std::optional<Tensor>& cu_seqlens) {
  PoolProblem problem = read_uniform_states(hidden_states, coefficients, cu_seqlens);
  const StateType type = state_type(problem);
  const c10::cuda::CUDAGuard guard(problem.options.device());
  Tensor pooled = empty_pooled(problem);
  Tensor indices = at::empty(pooled.sizes(), problem.options.dtype(at::kInt));
  problem.params.pooled = pooled.data_ptr();
  if (pooled.numel() > 0) {
    C10_CUDA_CHECK(launch_pool_max(problem.params, type, indices.data_ptr<int32_t>(),
                                   c10::cuda::getCurrentCUDAStream()));
  }
  return {pooled, indices};
}

bool any_elements(const std::vector<Tensor>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.numel() > 0; });
}

// The scalar stays on the device: reading it here would wait for all that was launched before.
Tensor device_scalar(const Tensor& value, const Tensor& like) {
  TORCH_CHECK(value.numel() == 1 && value.device() == like.device(),
              "grad_output must be a scalar on ", like.device());
  return value.to(at::kFloat);
}

std::vector<Tensor> pool_backward_op(const Tensor& pooled_grad,
                                     const std::optional<Tensor>& grad_output,
                                     at::IntArrayRef layers, at::TensorList coefficients,
                                     const std::optional<Tensor>& cu_seqlens,
                                     at::ScalarType dtype) {
  const StateType type = state_type(dtype);
  const c10::cuda::CUDAGuard guard(pooled_grad.device());
  const Tensor rows = pooled_grad.contiguous();
  GradProblem problem = allocate_state_grads(rows, layers, coefficients, cu_seqlens, dtype);
  check_fits(problem.pool.params);
  const Tensor factor = grad_output.has_value() ? device_scalar(*grad_output, rows) : Tensor();
  if (any_elements(problem.grads)) {
    C10_CUDA_CHECK(launch_pool_backward(problem.pool.params, type, rows.const_data_ptr<float>(),
                                        layers.data(),
                                        factor.defined() ? factor.const_data_ptr<float>() : nullptr,
                                        c10::cuda::getCurrentCUDAStream()));
  }
  return std::move(problem.grads);
}

Tensor add_pooled_grad_op(const Tensor& grad, const Tensor& pooled_grad,
                          const std::optional<Tensor>& grad_output, const Tensor& coefficients,
                          const std::optional<Tensor>& cu_seqlens) {
  const StateType type = state_type(grad.scalar_type());
  const c10::cuda::CUDAGuard guard(pooled_grad.device());
  const Tensor rows = pooled_grad.contiguous().unsqueeze(0);
  const Tensor dense = grad.contiguous();
  GradProblem problem =
      allocate_state_grads(rows, {0}, coefficients, cu_seqlens, grad.scalar_type());
  Tensor& sum = problem.grads[0];
  TORCH_CHECK(grad.sizes() == sum.sizes() && grad.device() == rows.device(),
              "grad must have shape ", sum.sizes(), " on ", rows.device(), ", got ", grad.sizes(),
              " on ", grad.device());
  const Tensor factor = grad_output.has_value() ? device_scalar(*grad_output, rows) : Tensor();
  const int64_t layer = 0;
  const void* incoming = dense.const_data_ptr();
  if (sum.numel() > 0) {
    C10_CUDA_CHECK(
        launch_pool_backward_add(problem.pool.params, type, rows.const_data_ptr<float>(), &layer,
                                 factor.defined() ? factor.const_data_ptr<float>() : nullptr,
                                 &incoming, c10::cuda::getCurrentCUDAStream()));
  }
  return std::move(sum);
}

std::vector<Tensor> pool_max_backward_op(const Tensor& pooled_grad, const Tensor& indices,
                                         at::IntArrayRef layers, at::TensorList coefficients,
                                         const std::optional<Tensor>& cu_seqlens,
                                         at::ScalarType dtype) {
  const StateType type = state_type(dtype);
  const c10::cuda::CUDAGuard guard(pooled_grad.device());
  const Tensor rows = pooled_grad.contiguous();
  TORCH_CHECK(indices.sizes() == rows.sizes() && indices.scalar_type() == at::kInt &&
                  indices.is_contiguous() && indices.device() == rows.device(),
              "indices must be those of pool_max");
  GradProblem problem = allocate_state_grads(rows, layers, coefficients, cu_seqlens, dtype);
  check_fits(problem.pool.params);
  if (any_elements(problem.grads)) {
    C10_CUDA_CHECK(launch_pool_max_backward(problem.pool.params, type, rows.const_data_ptr<float>(),
                                            indices.const_data_ptr<int32_t>(), layers.data(),
                                            c10::cuda::getCurrentCUDAStream()));
  }
  return std::move(problem.grads);
}

// Whether products of float32 may lose bits. Asked of the context and not in Python: it answers whichever of torch's
// three settings the user has used, and a compiled graph sees a change of them.
bool allow_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

LossOutputs run_loss(LossProblem<float> problem, const PoolParams* tokens, StateType type) {
  check_fits(problem.params);
  const LossLaunch how{tokens, type, allow_tf32()};
  const at::TensorOptions options = problem.outputs.loss.options();
  const auto bytes = static_cast<int64_t>(loss_workspace_bytes(problem.params, how));
  const Tensor workspace = at::empty({bytes}, options.dtype(at::kByte));
  C10_CUDA_CHECK(
      launch_loss(problem.params, how, workspace.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return std::move(problem.outputs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_op(
    at::TensorList hidden_states, at::TensorList coefficients,
    const std::optional<Tensor>& cu_seqlens, const Tensor& weights, const Tensor& kl_weights,
    at::IntArrayRef dims, int64_t num_columns, double scale, double kl_temperature, bool normalize,
    double hardness, double own_hardness, bool needs_grad) {
  const PoolProblem problem = read_uniform_states(hidden_states, coefficients, cu_seqlens);
  const StateType type = state_type(problem);
  const c10::cuda::CUDAGuard guard(problem.options.device());
  LossOutputs out = run_loss(
      read_loss_of_tokens(problem, {weights, kl_weights, dims, num_columns, scale, kl_temperature,
                                    normalize, hardness, own_hardness, needs_grad}),
      &problem.params, type);
  return {out.loss, out.cells, out.kl, out.pooled_grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pooled_loss_op(
    const Tensor& pooled, const std::optional<Tensor>& candidates, int64_t target_offset,
    const Tensor& weights, const Tensor& kl_weights, at::IntArrayRef dims, int64_t num_columns,
    double scale, double kl_temperature, bool normalize, double hardness, double own_hardness,
    bool needs_grad) {
  const StateType type = state_type(pooled.scalar_type());
  const c10::cuda::CUDAGuard guard(pooled.device());
  LossOutputs out =
      run_loss(read_loss<float>(accumulated(pooled), accumulated(candidates), target_offset,
                                {weights, kl_weights, dims, num_columns, scale, kl_temperature,
                                 normalize, hardness, own_hardness, needs_grad}),
               nullptr, type);
  return {out.loss, out.cells, out.kl, out.pooled_grad, out.candidate_grad};
}

// Whether the device can launch a grid whose blocks wait for each other.
bool launches_cooperatively(int64_t device) {
  int value = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&value, cudaDevAttrCooperativeLaunch, static_cast<int>(device)));
  return value != 0;
}

}  // namespace
}  // namespace m2d::cuda

TORCH_LIBRARY_IMPL(m2d_ext, CUDA, m) {
  m.impl("pool", &m2d::cuda::pool_op);
  m.impl("pool_backward", &m2d::cuda::pool_backward_op);
  m.impl("add_pooled_grad", &m2d::cuda::add_pooled_grad_op);
  m.impl("pool_max", &m2d::cuda::pool_max_op);
  m.impl("pool_max_backward", &m2d::cuda::pool_max_backward_op);
  m.impl("loss", &m2d::cuda::loss_op);
  m.impl("pooled_loss", &m2d::cuda::pooled_loss_op);
}

// A question about a device, not an operator of several backends, and so defined where it is answered.
TORCH_LIBRARY_FRAGMENT(m2d_ext, m) {
  m.def("cuda_launches_cooperatively(int device) -> bool", &m2d::cuda::launches_cooperatively);
}
