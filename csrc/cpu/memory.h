// Memory that is written once, whole, and soon.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace m2d::cpu {

// Ask for huge pages under a large new tensor. The allocator maps it afresh, and with 4 KiB pages the faults
// of the first write cost several times the write itself. Advice only: refused or ignored, nothing changes.
inline void advise_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kWorthIt = 4 << 20;  // two huge pages of 2 MiB
  if (tensor.nbytes() < kWorthIt) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr()) & ~(page - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes();
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace m2d::cpu
