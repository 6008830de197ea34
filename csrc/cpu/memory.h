// Memory that is written once, whole, and soon.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <vector>

namespace m2d::cpu {

// Ask for huge pages under a large new tensor. The allocator maps it afresh, and with 4 KiB pages the faults
// of the first write cost several times the write itself. Advice only: refused or ignored, nothing changes.
void advise_huge_pages(const at::Tensor& tensor);

// Whether rows of `row_bytes` in these tensors, all written by one call, should bypass the caches: a usual store
// first reads the line it overwrites. Not in small pages, where the kernel's zeros are still in the cache.
bool should_stream(const std::vector<at::Tensor>& tensors, size_t row_bytes);

// memcpy past the caches; `to` and the size are multiples of kStreamPart. Other threads see it after end_streams().
constexpr size_t kStreamPart = 16;
void stream_copy(void* to, const void* from, size_t bytes);
void end_streams();

}  // namespace m2d::cpu
