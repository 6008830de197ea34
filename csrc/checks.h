// From tensors to the plain structs of params.h: validation, allocation, nothing numerical.
// Shared by both backends. User-facing messages are Python's (m2d_ext/arguments.py); the checks here
// guard what the kernels rely on, so that no call of the private ops can read out of bounds.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "params.h"

namespace m2d {

using at::Tensor;

// Owns what PoolParams points to.
struct PoolProblem {
  PoolParams params;
  std::vector<TokenBlock> blocks;
  std::vector<StateView> states;
  std::vector<Tensor> storage;
  at::TensorOptions options;       // of the hidden states
  at::ScalarType accumulate_type;  // float32 for the half types, else the states' own
};

// Reading, or writing where they lie: `states` are given. L * blocks of them, layer-major.
PoolProblem read_states(at::TensorList hidden_states, at::TensorList coefficients,
                        const std::optional<Tensor>& cu_seqlens, bool written = false);

// Writing: `states` are allocated, contiguous, for the given layers of pooled_grad (L, N, D).
struct GradProblem {
  PoolProblem pool;
  std::vector<Tensor> grads;  // len(layers) * blocks, layer-major
};
GradProblem allocate_state_grads(const Tensor& pooled_grad, at::IntArrayRef layers,
                                 at::TensorList coefficients,
                                 const std::optional<Tensor>& cu_seqlens, at::ScalarType dtype);

struct LossOptions {
  const Tensor& weights;     // (L, K) float64, CPU
  const Tensor& kl_weights;  // (L,) float64, CPU
  at::IntArrayRef dims;
  int64_t num_columns;
  double scale;
  double kl_temperature;
  bool normalize;
  double hardness;
  double own_hardness;
  bool needs_grad;
};

struct LossOutputs {
  Tensor loss, cells, kl, pooled_grad, candidate_grad;
};

// Owns what LossParams<T> points to.
template <class T>
struct LossProblem {
  LossParams<T> params;
  LossOutputs outputs;
  std::vector<Tensor> storage;
};

// In the dtype in which a loss of it is computed: half types as float32.
Tensor accumulated(const Tensor& rows);
std::optional<Tensor> accumulated(const std::optional<Tensor>& rows);

template <class T>
LossProblem<T> read_loss(const Tensor& pooled, const std::optional<Tensor>& candidates,
                         int64_t target_offset, const LossOptions& options);

// Of rows that are still to be pooled: params.pooled.data is nullptr.
LossProblem<float> read_loss_of_tokens(const PoolProblem& tokens, const LossOptions& options);

// Owns what CosineParams<T> points to.
template <class T>
struct CosineProblem {
  CosineParams<T> params;
  Tensor a, b;
  std::vector<int64_t> cosines;  // their shape
};

template <class T>
CosineProblem<T> read_cosines(const Tensor& a, const Tensor& b, at::IntArrayRef dims, bool pairs);

// `grad` is contiguous; (0, 0, 0) for rows of which no gradient is wanted.
template <class T>
struct CosineGradProblem {
  CosineGrads<T> grads;
  Tensor grad, cosines, a, b;
};

template <class T>
CosineGradProblem<T> allocate_cosine_grads(const CosineProblem<T>& problem, const Tensor& grad,
                                           const Tensor& cosines, bool needs_a, bool needs_b);

// Owns what LogSumExpParams points to.
struct LogSumExpProblem {
  LogSumExpParams params;
  Tensor scores, mask;
  std::vector<int64_t> result;  // its shape
};

LogSumExpProblem read_scores(const Tensor& scores, const std::optional<Tensor>& mask, double scale,
                             bool over_rows);

}  // namespace m2d
