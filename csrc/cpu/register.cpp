// Operators on CPU tensors: validate, allocate, run the kernel of the dtype.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "fork.h"
#include "kernels.h"
#include "memory.h"

namespace m2d::cpu {
namespace {

template <class Kernel>
void dispatch_states(at::ScalarType type, const Kernel& kernel) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "m2d_ext", [&] {
    using Acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    kernel(scalar_t{}, Acc{});
  });
}

Tensor allocate_pooled(PoolProblem& problem) {
  const PoolParams& p = problem.params;
  Tensor pooled =
      at::empty({p.num_layers, p.num_texts, p.dim}, problem.options.dtype(problem.accumulate_type));
  problem.params.pooled = pooled.data_ptr();
  return pooled;
}

template <class Kernel>
void dispatch_problem(const PoolProblem& problem, const Kernel& kernel) {
  dispatch_states(at::typeMetaToScalarType(problem.options.dtype()), kernel);
}

Tensor pool_op(at::TensorList hidden_states, at::TensorList coefficients,
               const std::optional<Tensor>& cu_seqlens) {
  PoolProblem problem = read_states(hidden_states, coefficients, cu_seqlens);
  Tensor pooled = allocate_pooled(problem);
  dispatch_problem(problem, [&](auto scalar, auto acc) {
    pool<decltype(scalar), decltype(acc)>(problem.params);
  });
  return pooled;
}

GradProblem allocate_grads(const Tensor& pooled_grad, at::IntArrayRef layers,
                           at::TensorList coefficients, const std::optional<Tensor>& cu_seqlens,
                           at::ScalarType dtype) {
  GradProblem problem = allocate_state_grads(pooled_grad, layers, coefficients, cu_seqlens, dtype);
  for (const Tensor& grad : problem.grads) advise_huge_pages(grad);
  return problem;
}

std::vector<Tensor> pool_backward_op(const Tensor& pooled_grad,
                                     const std::optional<Tensor>& grad_output,
                                     at::IntArrayRef layers, at::TensorList coefficients,
                                     const std::optional<Tensor>& cu_seqlens,
                                     at::ScalarType dtype) {
  const Tensor rows = pooled_grad.contiguous();
  GradProblem problem = allocate_grads(rows, layers, coefficients, cu_seqlens, dtype);
  const double factor = grad_output.has_value() ? grad_output->item<double>() : 1.0;
  const bool stream =
      should_stream(problem.grads, problem.pool.params.dim * c10::elementSize(dtype));
  dispatch_states(dtype, [&](auto scalar, auto acc) {
    using Acc = decltype(acc);
    pool_backward<decltype(scalar), Acc>({problem.pool.params, rows.const_data_ptr<Acc>(),
                                          layers.data(), static_cast<Acc>(factor), stream});
  });
  return std::move(problem.grads);
}

Tensor add_pooled_grad_op(const Tensor& grad, const Tensor& pooled_grad,
                          const std::optional<Tensor>& grad_output, const Tensor& coefficients,
                          const std::optional<Tensor>& cu_seqlens) {
  const Tensor rows = pooled_grad.contiguous().unsqueeze(0);
  const Tensor dense = grad.contiguous();
  GradProblem problem = allocate_grads(rows, {0}, coefficients, cu_seqlens, grad.scalar_type());
  TORCH_CHECK(grad.sizes() == problem.grads[0].sizes(), "grad must have shape ",
              problem.grads[0].sizes(), ", got ", grad.sizes());
  const double factor = grad_output.has_value() ? grad_output->item<double>() : 1.0;
  const bool stream = should_stream(problem.grads, problem.pool.params.dim * grad.element_size());
  dispatch_states(grad.scalar_type(), [&](auto scalar, auto acc) {
    using Scalar = decltype(scalar);
    using Acc = decltype(acc);
    pool_backward_add<Scalar, Acc>(problem.pool.params, rows.const_data_ptr<Acc>(),
                                   static_cast<Acc>(factor), dense.const_data_ptr<Scalar>(),
                                   stream);
  });
  return problem.grads[0];
}

void add_pooled_grad_inplace_op(const Tensor& grad, const Tensor& pooled_grad,
                                const std::optional<Tensor>& grad_output,
                                const Tensor& coefficients,
                                const std::optional<Tensor>& cu_seqlens) {
  TORCH_CHECK(grad.is_contiguous(), "grad must be contiguous");
  const PoolProblem problem = read_states({grad}, {coefficients}, cu_seqlens, true);
  const Tensor rows = pooled_grad.contiguous();
  TORCH_CHECK(rows.dim() == 2 && rows.size(0) == problem.params.num_texts &&
                  rows.size(1) == problem.params.dim &&
                  rows.scalar_type() == problem.accumulate_type,
              "pooled_grad must be (texts, width) of the accumulation dtype");
  const double factor = grad_output.has_value() ? grad_output->item<double>() : 1.0;
  dispatch_states(grad.scalar_type(), [&](auto scalar, auto acc) {
    using Acc = decltype(acc);
    pool_backward_accumulate<decltype(scalar), Acc>(problem.params, rows.const_data_ptr<Acc>(),
                                                    static_cast<Acc>(factor));
  });
}

std::tuple<Tensor, Tensor> pool_max_op(at::TensorList hidden_states, at::TensorList coefficients,
                                       const std::optional<Tensor>& cu_seqlens) {
  PoolProblem problem = read_states(hidden_states, coefficients, cu_seqlens);
  Tensor pooled = allocate_pooled(problem);
  Tensor indices = at::empty(pooled.sizes(), problem.options.dtype(at::kInt));
  dispatch_problem(problem, [&](auto scalar, auto acc) {
    pool_max<decltype(scalar), decltype(acc)>(problem.params, indices.data_ptr<int32_t>());
  });
  return {pooled, indices};
}

std::vector<Tensor> pool_max_backward_op(const Tensor& pooled_grad, const Tensor& indices,
                                         at::IntArrayRef layers, at::TensorList coefficients,
                                         const std::optional<Tensor>& cu_seqlens,
                                         at::ScalarType dtype) {
  const Tensor rows = pooled_grad.contiguous();
  TORCH_CHECK(indices.sizes() == rows.sizes() && indices.scalar_type() == at::kInt &&
                  indices.is_contiguous(),
              "indices must be those of pool_max");
  GradProblem problem = allocate_grads(rows, layers, coefficients, cu_seqlens, dtype);
  dispatch_states(dtype, [&](auto scalar, auto acc) {
    using Acc = decltype(acc);
    pool_max_backward<decltype(scalar), Acc>(problem.pool.params, rows.const_data_ptr<Acc>(),
                                             indices.const_data_ptr<int32_t>(), layers.data());
  });
  return std::move(problem.grads);
}

LossOutputs run_loss(const Tensor& pooled, const std::optional<Tensor>& candidates,
                     int64_t target_offset, const LossOptions& options) {
  LossOutputs outputs;
  AT_DISPATCH_FLOATING_TYPES(pooled.scalar_type(), "m2d_ext", [&] {
    auto problem = read_loss<scalar_t>(pooled, candidates, target_offset, options);
    loss<scalar_t>(problem.params, {});
    outputs = std::move(problem.outputs);
  });
  return outputs;
}

struct TokenLossOutputs {
  LossOutputs loss;
  std::vector<Tensor> grads;  // of the hidden states of `layers`
};

TokenLossOutputs run_token_loss(at::TensorList hidden_states, at::TensorList coefficients,
                                const std::optional<Tensor>& cu_seqlens, const LossOptions& options,
                                double grad_output, at::IntArrayRef layers) {
  PoolProblem tokens = read_states(hidden_states, coefficients, cu_seqlens);
  const Tensor pooled = allocate_pooled(tokens);
  TokenLossOutputs outputs;
  dispatch_problem(tokens, [&](auto scalar, auto acc) {
    using Scalar = decltype(scalar);
    using Acc = decltype(acc);
    auto problem = read_loss<Acc>(pooled, std::nullopt, 0, options);
    const PoolParams& p = tokens.params;
    TokenSide side;
    side.read = [&p](const RowRange& texts) { pool_rows<Scalar, Acc>(p, texts); };
    GradProblem grads;
    ScatterParams<Acc> scatter = {};
    if (!layers.empty()) {
      const Tensor& rows = problem.outputs.pooled_grad;
      grads =
          allocate_grads(rows, layers, coefficients, cu_seqlens, hidden_states[0].scalar_type());
      const size_t row_bytes = p.dim * sizeof(Scalar);
      const size_t bytes_read = hidden_states.size() * hidden_states[0].nbytes();
      scatter = {grads.pool.params, rows.const_data_ptr<Acc>(), layers.data(),
                 static_cast<Acc>(grad_output), should_stream(grads.grads, row_bytes, bytes_read)};
      // Texts of a layer as those of its gradients; -1 where none are wanted.
      const auto place = [layers](const RowRange& texts) {
        const auto found = std::find(layers.begin(), layers.end(), texts.layer);
        const int64_t layer = found == layers.end() ? -1 : found - layers.begin();
        return RowRange{layer, texts.first, texts.last};
      };
      side.write = [&scatter, place](const RowRange& texts) {
        const RowRange to = place(texts);
        if (to.layer >= 0) scatter_rows<Scalar, Acc>(scatter, to);
      };
      if (scatter.stream && are_whole_lines(grads.grads, row_bytes)) {
        side.read_and_write = [&p, &scatter, place](const RowRange& read, const RowRange& written) {
          const RowRange to = place(written);
          if (to.layer < 0) return pool_rows<Scalar, Acc>(p, read);
          pool_and_scatter_rows<Scalar, Acc>(p, read, scatter, to);
        };
      }
    }
    loss<Acc>(problem.params, side);
    outputs.grads = std::move(grads.grads);
    outputs.loss = std::move(problem.outputs);
  });
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_op(
    at::TensorList hidden_states, at::TensorList coefficients,
    const std::optional<Tensor>& cu_seqlens, const Tensor& weights, const Tensor& kl_weights,
    at::IntArrayRef dims, int64_t num_columns, double scale, double kl_temperature, bool normalize,
    double hardness, double own_hardness, bool needs_grad) {
  const LossOutputs out =
      run_token_loss(hidden_states, coefficients, cu_seqlens,
                     {weights, kl_weights, dims, num_columns, scale, kl_temperature, normalize,
                      hardness, own_hardness, needs_grad},
                     1.0, {})
          .loss;
  return {out.loss, out.cells, out.kl, out.pooled_grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> loss_and_gradients_op(
    at::TensorList hidden_states, at::TensorList coefficients,
    const std::optional<Tensor>& cu_seqlens, const Tensor& weights, const Tensor& kl_weights,
    at::IntArrayRef dims, int64_t num_columns, double scale, double kl_temperature, bool normalize,
    double hardness, double own_hardness, double grad_output, at::IntArrayRef layers) {
  TORCH_CHECK(
      std::adjacent_find(layers.begin(), layers.end(), std::greater_equal<>()) == layers.end(),
      "layers must ascend and be distinct, got ", layers);
  TokenLossOutputs out = run_token_loss(hidden_states, coefficients, cu_seqlens,
                                        {weights, kl_weights, dims, num_columns, scale,
                                         kl_temperature, normalize, hardness, own_hardness, true},
                                        grad_output, layers);
  return {out.loss.loss, out.loss.cells, out.loss.kl, out.loss.pooled_grad, std::move(out.grads)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pooled_loss_op(
    const Tensor& pooled, const std::optional<Tensor>& candidates, int64_t target_offset,
    const Tensor& weights, const Tensor& kl_weights, at::IntArrayRef dims, int64_t num_columns,
    double scale, double kl_temperature, bool normalize, double hardness, double own_hardness,
    bool needs_grad) {
  LossOutputs out = run_loss(accumulated(pooled), accumulated(candidates), target_offset,
                             {weights, kl_weights, dims, num_columns, scale, kl_temperature,
                              normalize, hardness, own_hardness, needs_grad});
  return {out.loss, out.cells, out.kl, out.pooled_grad, out.candidate_grad};
}

Tensor nested_cosines_op(const Tensor& a, const Tensor& b, at::IntArrayRef dims, bool pairs) {
  Tensor cosines;
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "m2d_ext", [&] {
    const auto problem = read_cosines<scalar_t>(a, b, dims, pairs);
    cosines = at::empty(problem.cosines, a.options().dtype(at::kDouble));
    nested_cosines<scalar_t>(problem.params, cosines.data_ptr<double>());
  });
  return cosines;
}

std::tuple<Tensor, Tensor> nested_cosines_backward_op(const Tensor& grad, const Tensor& cosines,
                                                      const Tensor& a, const Tensor& b,
                                                      at::IntArrayRef dims, bool pairs,
                                                      bool needs_a, bool needs_b) {
  std::tuple<Tensor, Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "m2d_ext", [&] {
    const auto problem = read_cosines<scalar_t>(a, b, dims, pairs);
    const auto wanted = allocate_cosine_grads(problem, grad, cosines, needs_a, needs_b);
    nested_cosines_backward<scalar_t>(problem.params, wanted.grads);
    grads = {wanted.a, wanted.b};
  });
  return grads;
}

Tensor masked_logsumexp_op(const Tensor& scores, const std::optional<Tensor>& mask, double scale,
                           bool over_rows) {
  const LogSumExpProblem problem = read_scores(scores, mask, scale, over_rows);
  Tensor result = at::empty(problem.result, scores.options());
  masked_logsumexp(problem.params, result.data_ptr<double>());
  return result;
}

Tensor masked_logsumexp_backward_op(const Tensor& grad, const Tensor& result, const Tensor& scores,
                                    const std::optional<Tensor>& mask, double scale,
                                    bool over_rows) {
  const LogSumExpProblem problem = read_scores(scores, mask, scale, over_rows);
  for (const Tensor& table : {grad, result}) {
    TORCH_CHECK(table.sizes() == problem.result && table.scalar_type() == at::kDouble,
                "grad and result must be float64 of shape ", at::IntArrayRef(problem.result),
                ", got ", table.scalar_type(), " of shape ", table.sizes());
  }
  Tensor scores_grad = at::empty(scores.sizes(), scores.options());
  masked_logsumexp_backward(problem.params, result.contiguous().const_data_ptr<double>(),
                            grad.contiguous().const_data_ptr<double>(),
                            scores_grad.data_ptr<double>());
  return scores_grad;
}

// An operator as it is registered: what it reads may already be copied by several threads.
template <auto op>
struct AfterFork;

template <class Result, class... Arguments, Result (*op)(Arguments...)>
struct AfterFork<op> {
  static Result run(Arguments... arguments) {
    use_one_thread_after_fork();
    return op(std::forward<Arguments>(arguments)...);
  }
};

}  // namespace
}  // namespace m2d::cpu

TORCH_LIBRARY_IMPL(m2d_ext, CPU, m) {
  using namespace m2d::cpu;
  m.impl("pool", &AfterFork<&pool_op>::run);
  m.impl("pool_backward", &AfterFork<&pool_backward_op>::run);
  m.impl("add_pooled_grad", &AfterFork<&add_pooled_grad_op>::run);
  m.impl("add_pooled_grad_", &AfterFork<&add_pooled_grad_inplace_op>::run);
  m.impl("pool_max", &AfterFork<&pool_max_op>::run);
  m.impl("pool_max_backward", &AfterFork<&pool_max_backward_op>::run);
  m.impl("loss", &AfterFork<&loss_op>::run);
  m.impl("loss_and_gradients", &AfterFork<&loss_and_gradients_op>::run);
  m.impl("pooled_loss", &AfterFork<&pooled_loss_op>::run);
  m.impl("nested_cosines", &AfterFork<&nested_cosines_op>::run);
  m.impl("nested_cosines_backward", &AfterFork<&nested_cosines_backward_op>::run);
  m.impl("masked_logsumexp", &AfterFork<&masked_logsumexp_op>::run);
  m.impl("masked_logsumexp_backward", &AfterFork<&masked_logsumexp_backward_op>::run);
}
