#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace m2d::cpu {
namespace {

constexpr size_t kHugePagesFrom = 4 << 20;  // two huge pages of 2 MiB
constexpr size_t kStreamFrom =
    32 << 20;  // what a last-level cache would still hold when it is read again

#if defined(M2D_HAS_SSE2)

bool are_multiples(const void* address, size_t size, size_t of) {
  return (reinterpret_cast<uintptr_t>(address) | size) % of == 0;
}

// `bytes` is a multiple of kStreamPart.
void copy_by_16(void* to, const void* from, size_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  size_t i = 0;
  for (; i + kCacheLine <= bytes; i += kCacheLine) LineBy16::copy(target + i, source + i);
  for (; i < bytes; i += kStreamPart) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
  }
}

#if defined(M2D_HAS_X86_LEVELS)
__attribute__((target("avx2"))) void copy_by_32(void* to, const void* from, size_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  size_t i = 0;
  for (; i + kCacheLine <= bytes; i += kCacheLine) LineBy32::copy(target + i, source + i);
  if (i < bytes) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
  }
}
#endif
#endif

}  // namespace

void advise_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (tensor.nbytes() < kHugePagesFrom) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr()) & ~(page - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes();
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

bool should_stream(const std::vector<at::Tensor>& tensors, size_t row_bytes, size_t bytes_read) {
#if defined(M2D_HAS_SSE2)
  size_t total = bytes_read;
  for (const at::Tensor& tensor : tensors) {
    if (tensor.nbytes() < kHugePagesFrom) return false;
    if (!are_multiples(tensor.data_ptr(), row_bytes, kStreamPart)) return false;
    total += tensor.nbytes();
  }
  return total >= kStreamFrom;
#else
  return false;
#endif
}

bool are_whole_lines(const std::vector<at::Tensor>& tensors, size_t row_bytes) {
#if defined(M2D_HAS_SSE2)
  return std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& tensor) {
    return are_multiples(tensor.data_ptr(), row_bytes, kCacheLine);
  });
#else
  return false;
#endif
}

void stream_copy(void* to, const void* from, size_t bytes) {
#if defined(M2D_HAS_X86_LEVELS)
  static const bool has_32 = __builtin_cpu_supports("avx2");
  if (has_32 && are_multiples(to, bytes, 32)) return copy_by_32(to, from, bytes);
#endif
#if defined(M2D_HAS_SSE2)
  copy_by_16(to, from, bytes);
#else
  std::memcpy(to, from, bytes);
#endif
}

void end_streams() {
#if defined(M2D_HAS_SSE2)
  _mm_sfence();
#endif
}

}  // namespace m2d::cpu
