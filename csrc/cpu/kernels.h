// The CPU kernels, on plain structs.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "../params.h"

namespace m2d::cpu {

// pooled (L, N, D) = the weighted token sums. Tokens whose coefficient is 0 are never read.
template <class Scalar, class Acc>
void pool(const PoolParams& params);

// Rows [first, last) of the same, counted through all layers, on the calling thread.
template <class Scalar, class Acc>
void pool_rows(const PoolParams& params, int64_t first, int64_t last);

// states = grad_output * a[n, t] * pooled_grad[layers[l], n, :], 0 where the coefficient is 0; past the caches if
// `stream`, see memory.h.
template <class Scalar, class Acc>
void pool_backward(const PoolParams& params, const Acc* pooled_grad, const int64_t* layers,
                   Acc grad_output, bool stream);

// Rows [first, last) of the same, counted through all layers, on the calling thread.
template <class Scalar, class Acc>
void scatter_rows(const PoolParams& params, const Acc* pooled_grad, const int64_t* layers,
                  Acc grad_output, bool stream, int64_t first, int64_t last);

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

// What is done with rows [first, last) of a layer, on the calling thread.
using OfRows = std::function<void(int64_t layer, int64_t first, int64_t last)>;

// The loss, its cells and, where pooled_grad is given, its gradient. See math.h. Pooled rows that are not there yet
// come of `read`; `write`, where there is one, is called when their gradients are finished.
template <class T>
void loss(const LossParams<T>& params, const OfRows& read, const OfRows& write);

// The cosines, and what their gradient is to the rows; see cosines.cpp.
template <class T>
void nested_cosines(const CosineParams<T>& params, double* cosines);
template <class T>
void nested_cosines_backward(const CosineParams<T>& params, const CosineGrads<T>& grads);

}  // namespace m2d::cpu
