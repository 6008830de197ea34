// The CPU kernels, on plain structs.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "../params.h"

namespace m2d::cpu {

// pooled (L, N, D) = the weighted token sums. Tokens whose coefficient is 0 are never read.
template <class Scalar, class Acc>
void pool(const PoolParams& params);

// Texts [first, last) of a layer.
struct RowRange {
  int64_t layer, first, last;
};

// The same of some texts, on the calling thread.
template <class Scalar, class Acc>
void pool_rows(const PoolParams& params, const RowRange& texts);

// states = grad_output * a[n, t] * pooled_grad[layers[l], n, :], 0 where the coefficient is 0.
template <class Acc>
struct ScatterParams {
  PoolParams states;  // to be written; `pooled` is not used
  const Acc* pooled_grad;
  const int64_t* layers;
  Acc grad_output;
  bool stream;  // past the caches, see memory.h
};

template <class Scalar, class Acc>
void pool_backward(const ScatterParams<Acc>& params);

// The same of some texts, on the calling thread.
template <class Scalar, class Acc>
void scatter_rows(const ScatterParams<Acc>& params, const RowRange& texts);

// pool_rows of `read` and scatter_rows of `written`, past the caches, at the same time: faster than one after the
// other, where rows are whole cache lines (memory.h).
template <class Scalar, class Acc>
void pool_and_scatter_rows(const PoolParams& params, const RowRange& read,
                           const ScatterParams<Acc>& scatter, const RowRange& written);

// states = grads + grad_output * a[n, t] * pooled_grad[n, :] of one layer and block. `grads` lies as the states do.
template <class Scalar, class Acc>
void pool_backward_add(const PoolParams& params, const Acc* pooled_grad, Acc grad_output,
                       const Scalar* grads, bool stream);

// states += grad_output * a[n, t] * pooled_grad[n, :] of one layer and block. Tokens whose coefficient is 0 are not
// touched.
template <class Scalar, class Acc>
void pool_backward_accumulate(const PoolParams& params, const Acc* pooled_grad, Acc grad_output);

// pooled (L, N, D) = the maximum over tokens whose coefficient is not 0, and indices (L, N, D) the first
// token of the text that has it; 0 and -1 for a text without tokens. NaN is the largest.
template <class Scalar, class Acc>
void pool_max(const PoolParams& params, int32_t* indices);

// states = pooled_grad[layers[l], n, :] at the indices, 0 elsewhere.
template <class Scalar, class Acc>
void pool_max_backward(const PoolParams& params, const Acc* pooled_grad, const int32_t* indices,
                       const int64_t* layers);

// How the loss meets the hidden states, on the calling thread. Any may be nullptr.
struct TokenSide {
  std::function<void(const RowRange&)> read;   // pools rows that are not there yet
  std::function<void(const RowRange&)> write;  // takes gradients that are finished
  std::function<void(const RowRange& read, const RowRange& written)> read_and_write;  // if faster
};

// The loss, its cells and, where pooled_grad is given, its gradient. See math.h.
template <class T>
void loss(const LossParams<T>& params, const TokenSide& tokens);

// The cosines, and what their gradient is to the rows; see cosines.cpp.
template <class T>
void nested_cosines(const CosineParams<T>& params, double* cosines);
template <class T>
void nested_cosines_backward(const CosineParams<T>& params, const CosineGrads<T>& grads);

// The logsumexp of scaled scores, and what its gradient is to the scores, contiguous; see logsumexp.cpp.
void masked_logsumexp(const LogSumExpParams& params, double* result);
void masked_logsumexp_backward(const LogSumExpParams& params, const double* result,
                               const double* result_grad, double* scores_grad);

}  // namespace m2d::cpu
