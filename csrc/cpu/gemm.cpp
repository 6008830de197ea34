// The block of C that one call of `block` owns stays in registers over the whole depth: kRows broadcasts of A meet
// two vectors of B. Written with the compiler's vector types, so one source serves every vector width.
#include "gemm.h"

#include <algorithm>
#include <cstring>

#include "../math.h"
#include "simd.h"

namespace m2d::cpu {
namespace {

#if defined(__GNUC__)

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <class Vector, class T>
M2D_INLINE void store(const Vector& sum, bool accumulate, T* c) {
  Vector total = {};
  if (accumulate) std::memcpy(&total, c, sizeof(total));
  total += sum;
  std::memcpy(c, &total, sizeof(total));
}

// `cols` <= two vectors are stored; lanes beyond them hold whatever followed in B.
template <int kBytes, int kRows, class T>
M2D_INLINE void block(const Gemm<T>& p, int64_t row, int64_t col, int64_t cols) {
  using Vector = typename VectorOf<T, kBytes>::type;
  constexpr int64_t kLanes = kBytes / sizeof(T);
  const T* a = p.a + row * p.a_row_stride;
  const T* b = p.b + col / kGemmPanel * p.b_panel_stride + col % kGemmPanel;
  Vector sums[kRows][2] = {};
  for (int64_t k = 0; k < p.depth; ++k) {
    Vector b0, b1;
    std::memcpy(&b0, b + k * p.b_stride, kBytes);
    std::memcpy(&b1, b + k * p.b_stride + kLanes, kBytes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T factor = a[r * p.a_row_stride + k * p.a_depth_stride];
      sums[r][0] += factor * b0;
      sums[r][1] += factor * b1;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    T* c = p.c + (row + r) * p.c_stride + col;
    if (cols == 2 * kLanes) {
      store(sums[r][0], p.accumulate, c);
      store(sums[r][1], p.accumulate, c + kLanes);
    } else {
      T sum[2 * kLanes];
      std::memcpy(sum, sums[r], sizeof(sum));
      for (int64_t j = 0; j < cols; ++j) c[j] = p.accumulate ? c[j] + sum[j] : sum[j];
    }
  }
}

// The rows that are left: halves of a block, then of that, so that few rows are alone with their loads of B.
template <int kBytes, int kRows, class T>
M2D_INLINE void rows_from(const Gemm<T>& p, int64_t row, int64_t col, int64_t cols) {
  for (; row + kRows <= p.rows; row += kRows) block<kBytes, kRows>(p, row, col, cols);
  if constexpr (kRows > 1) rows_from<kBytes, kRows / 2>(p, row, col, cols);
}

// So much of the depth at a time that what a block of columns reads of B stays in the first-level cache until all rows
// have met it.
constexpr int64_t kDepth = 64;

template <int kBytes, int kRows, class T>
M2D_INLINE void blocks(const Gemm<T>& whole) {
  constexpr int64_t kCols = 2 * kBytes / sizeof(T);
  static_assert(kGemmPanel % kCols == 0);
  Gemm<T> p = whole;
  for (int64_t done = 0; done < whole.depth; done += kDepth) {
    p.depth = std::min(kDepth, whole.depth - done);
    for (int64_t col = 0; col < p.cols; col += kCols)
      rows_from<kBytes, kRows>(p, 0, col, std::min(kCols, p.cols - col));
    p.a += kDepth * p.a_depth_stride;
    p.b += kDepth * p.b_stride;
    p.accumulate = true;
  }
}

#if defined(M2D_HAS_X86_LEVELS)
template <class T>
__attribute__((target("arch=x86-64-v4"))) void gemm_v4(const Gemm<T>& p) {
  blocks<64, 8>(p);
}

template <class T>
__attribute__((target("arch=x86-64-v3"))) void gemm_v3(const Gemm<T>& p) {
  blocks<32, 4>(p);
}
#endif

template <class T>
void gemm_baseline(const Gemm<T>& p) {
  blocks<16, 4>(p);
}

template <class T>
auto best_gemm() {
#if defined(M2D_HAS_X86_LEVELS)
  if (__builtin_cpu_supports("x86-64-v4")) return &gemm_v4<T>;
  if (__builtin_cpu_supports("x86-64-v3")) return &gemm_v3<T>;
#endif
  return &gemm_baseline<T>;
}

#else  // a compiler without vector types

template <class T>
void gemm_baseline(const Gemm<T>& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    T* c = p.c + i * p.c_stride;
    if (!p.accumulate) std::fill_n(c, p.cols, T(0));
    for (int64_t k = 0; k < p.depth; ++k) {
      const T factor = p.a[i * p.a_row_stride + k * p.a_depth_stride];
      for (int64_t j = 0; j < p.cols; ++j) {
        const int64_t panel = j / kGemmPanel * p.b_panel_stride;
        c[j] += factor * p.b[panel + k * p.b_stride + j % kGemmPanel];
      }
    }
  }
}

template <class T>
auto best_gemm() {
  return &gemm_baseline<T>;
}

#endif

}  // namespace

template <class T>
void gemm(const Gemm<T>& problem) {
  static const auto best = best_gemm<T>();
  best(problem);
}

template void gemm(const Gemm<float>&);
template void gemm(const Gemm<double>&);

}  // namespace m2d::cpu
