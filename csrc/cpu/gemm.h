// Small matrix products on one thread, for use inside at::parallel_for. The order of every sum is that of the
// depth, whatever the sizes and however rows and columns are split among calls.
#pragma once

#include <cstdint>

namespace m2d::cpu {

// Columns of a panel of B. Of the last one `gemm` may read all, also where B has fewer.
constexpr int64_t kGemmPanel = 32;

// C (rows, cols) = A B, or += A B.
template <class T>
struct Gemm {
  int64_t rows, cols, depth;
  const T* a;  // element (i, k) at a[i * a_row_stride + k * a_depth_stride]
  int64_t a_row_stride, a_depth_stride;
  const T*
      b;  // element (k, j) at b[j / kGemmPanel * b_panel_stride + k * b_stride + j % kGemmPanel]
  int64_t b_stride;
  T* c;  // element (i, j) at c[i * c_stride + j]
  int64_t c_stride;
  bool accumulate;
  int64_t b_panel_stride = kGemmPanel;  // that of whole rows one after the other
};

template <class T>
void gemm(const Gemm<T>& problem);

}  // namespace m2d::cpu
