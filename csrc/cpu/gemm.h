// torch's BLAS on raw rows, callable inside at::parallel_for (where it runs on the calling thread).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

namespace m2d::cpu {

// A row-major matrix inside a larger one: element (i, j) at data[i * stride + j].
inline at::Tensor matrix(const double* data, int64_t rows, int64_t cols, int64_t stride) {
  return at::from_blob(const_cast<double*>(data), {rows, cols}, {stride, 1},
                       at::dtype(at::kDouble));
}

// out = a b, or out += a b.
inline void gemm(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  if (accumulate) {
    at::addmm_out(out, out, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

}  // namespace m2d::cpu
