// The CPU kernels, on plain structs.
#pragma once

#include <ATen/core/Tensor.h>

#include "../params.h"

namespace m2d::cpu {

// pooled (L, N, D) = the weighted token sums. Tokens whose coefficient is 0 are never read.
template <class Scalar, class Acc>
void pool(const PoolParams& params);

// states = grad_output * a[n, t] * pooled_grad[layers[l], n, :], 0 where the coefficient is 0.
template <class Scalar, class Acc>
void pool_backward(const PoolParams& params, const Acc* pooled_grad, const int64_t* layers,
                   Acc grad_output);

// The loss, its cells and, where pooled_grad is given, its gradient. See math.h.
template <class T>
void loss(const LossParams<T>& params);

}  // namespace m2d::cpu
