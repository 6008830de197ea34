// Memory that is written once, whole, and soon.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>
#include <vector>

#include "simd.h"

#if defined(M2D_HAS_SSE2)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace m2d::cpu {

constexpr size_t kHugePagesFrom = 4 << 20;  // two huge pages of 2 MiB
constexpr size_t kStreamFrom =
    32 << 20;  // what a last-level cache would still hold when it is read again

// Ask for huge pages under a large new tensor. The allocator maps it afresh, and with 4 KiB pages the faults
// of the first write cost several times the write itself. Advice only: refused or ignored, nothing changes.
inline void advise_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (tensor.nbytes() < kHugePagesFrom) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr()) & ~(page - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes();
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Whether rows of `row_bytes` in these tensors, all written by one call, should bypass the caches: a usual store
// first reads the line it overwrites. Not in small pages, where the kernel's zeros are still in the cache.
inline bool should_stream(const std::vector<at::Tensor>& tensors, size_t row_bytes) {
#if defined(M2D_HAS_SSE2)
  size_t total = 0;
  for (const at::Tensor& tensor : tensors) {
    if (tensor.nbytes() < kHugePagesFrom) return false;
    if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % sizeof(__m128i) != 0) return false;
    total += tensor.nbytes();
  }
  return row_bytes % sizeof(__m128i) == 0 && total >= kStreamFrom;
#else
  return false;
#endif
}

// memcpy past the caches; both ends and the size are multiples of 16 bytes. Other threads see it after end_streams().
// A cache line per round: a processor joins the parts of a line before it writes it, and falls behind where the loop
// around each part takes longer than memory does.
inline void stream_copy(void* to, const void* from, size_t bytes) {
#if defined(M2D_HAS_SSE2)
  constexpr size_t kLine = 4;
  const __m128i* source = static_cast<const __m128i*>(from);
  __m128i* target = static_cast<__m128i*>(to);
  const size_t parts = bytes / sizeof(__m128i);
  size_t i = 0;
  for (; i + kLine <= parts; i += kLine) {
    const __m128i x0 = _mm_loadu_si128(source + i), x1 = _mm_loadu_si128(source + i + 1);
    const __m128i x2 = _mm_loadu_si128(source + i + 2), x3 = _mm_loadu_si128(source + i + 3);
    _mm_stream_si128(target + i, x0);
    _mm_stream_si128(target + i + 1, x1);
    _mm_stream_si128(target + i + 2, x2);
    _mm_stream_si128(target + i + 3, x3);
  }
  for (; i < parts; ++i) _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
#else
  std::memcpy(to, from, bytes);
#endif
}

inline void end_streams() {
#if defined(M2D_HAS_SSE2)
  _mm_sfence();
#endif
}

}  // namespace m2d::cpu
