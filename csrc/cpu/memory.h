// Memory that is written once, whole, and soon.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <vector>

#include "simd.h"

#if defined(M2D_HAS_SSE2)
#include <immintrin.h>
#endif

namespace m2d::cpu {

// Ask for huge pages under a large new tensor. The allocator maps it afresh, and with 4 KiB pages the faults
// of the first write cost several times the write itself. Advice only: refused or ignored, nothing changes.
void advise_huge_pages(const at::Tensor& tensor);

// Whether rows of `row_bytes` in these tensors, all written by one call that reads `bytes_read`, should bypass the
// caches: a usual store first reads the line it overwrites. Not in small pages, where the kernel's zeros are still in
// the cache.
bool should_stream(const std::vector<at::Tensor>& tensors, size_t row_bytes, size_t bytes_read = 0);

// memcpy past the caches; `to` and the size are multiples of kStreamPart. Other threads see it after end_streams().
constexpr size_t kStreamPart = 16;
void stream_copy(void* to, const void* from, size_t bytes);
void end_streams();

// Whether rows of so many bytes in these tensors are whole cache lines, each of which can go past the caches by itself.
constexpr size_t kCacheLine = 64;
bool are_whole_lines(const std::vector<at::Tensor>& tensors, size_t row_bytes);

#if defined(M2D_HAS_SSE2)
// A line past the caches, where the loop around it does something else at the same time. By parts: a processor
// joins them before it writes the line, and falls behind where other instructions between them take longer than that.
struct LineBy16 {
  static void copy(void* to, const void* from) {
    const __m128i* source = static_cast<const __m128i*>(from);
    __m128i* target = static_cast<__m128i*>(to);
    const __m128i x0 = _mm_loadu_si128(source), x1 = _mm_loadu_si128(source + 1);
    const __m128i x2 = _mm_loadu_si128(source + 2), x3 = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, x0);
    _mm_stream_si128(target + 1, x1);
    _mm_stream_si128(target + 2, x2);
    _mm_stream_si128(target + 3, x3);
  }
};
#endif
#if defined(M2D_HAS_X86_LEVELS)
struct LineBy32 {
  __attribute__((target("avx2"))) static void copy(void* to, const void* from) {
    const __m256i* source = static_cast<const __m256i*>(from);
    __m256i* target = static_cast<__m256i*>(to);
    const __m256i x0 = _mm256_loadu_si256(source), x1 = _mm256_loadu_si256(source + 1);
    _mm256_stream_si256(target, x0);
    _mm256_stream_si256(target + 1, x1);
  }
};
#endif

}  // namespace m2d::cpu
