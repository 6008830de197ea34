// The only place with inline assembly and #ifdef: the same names for nvcc and for the emulation of tests/simt,
// which runs kernels on the CPU (M2D_EMULATE). One function per instruction.
#pragma once

#ifdef M2D_EMULATE
#include "simt_emu.h"
#define M2D_DEVICE inline
#define M2D_SITE , SIMT_SITE_DEF
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>
#define M2D_DEVICE __device__ __forceinline__
#define M2D_SITE
#endif

// Shared memory, explicitly aligned: M2D_SHARED(float, sums, [2][64]).
#ifdef M2D_EMULATE
#define M2D_SHARED(T, name, dims)                   \
  using name##_element = T;                         \
  typedef name##_element name##_array dims;         \
  static const char name##_key = 0;                 \
  name##_array& name = *static_cast<name##_array*>( \
      ::simt::shared_var(&name##_key, #name, sizeof(name##_array), 16))
#else
#define M2D_SHARED(T, name, dims) __shared__ __align__(16) T name dims
#endif

namespace m2d::cuda {

struct Launch {
  dim3 grid, block;
  cudaStream_t stream;
  bool cooperative;
};

#ifdef M2D_EMULATE
template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return simt::launch(
      simt::LaunchDesc{config.cooperative, config.grid, config.block, 0}, kernel,
      std::tuple<std::decay_t<Parameters>...>(std::forward<Arguments>(arguments)...));
}

template <class Kernel>
cudaError_t cooperative_grid(Kernel, int, int* blocks) {
  *blocks = simt::sm_count();
  return cudaSuccess;
}
#else
template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t full{};
  full.gridDim = config.grid;
  full.blockDim = config.block;
  full.stream = config.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  full.attrs = &attribute;
  full.numAttrs = config.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&full, kernel, std::forward<Arguments>(arguments)...);
}

// As many blocks of `threads` as run at the same time on the current device.
template <class Kernel>
cudaError_t cooperative_grid(Kernel kernel, int threads, int* blocks) {
  int device = 0;
  int processors = 0;
  int per_processor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0);
  *blocks = processors * per_processor;
  return error;
}
#endif

// All threads of a cooperative grid. One function for all calls: where it is inlined it holds registers in between.
#ifdef M2D_EMULATE
M2D_DEVICE void grid_sync(SIMT_SITE_DEF) {
  simt::grid_barrier(SIMT_SITE);
}
#else
[[maybe_unused]] static __device__ __noinline__ void grid_sync() {
  cooperative_groups::this_grid().sync();
}
#endif

// threadIdx.x where it is asked for: what follows from it is not kept in registers through the stages before.
M2D_DEVICE int thread_index() {
#ifdef M2D_EMULATE
  return static_cast<int>(threadIdx.x);
#else
  int index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
#endif
}

// gridDim.x, likewise.
M2D_DEVICE int block_count() {
#ifdef M2D_EMULATE
  return static_cast<int>(gridDim.x);
#else
  int count;
  asm volatile("mov.u32 %0, %%nctaid.x;\n" : "=r"(count));
  return count;
#endif
}

// x y, rounded: never one with the sum that it goes into, as the compiler fuses them where it can.
#ifdef M2D_EMULATE
template <class Real>
M2D_DEVICE Real rounded_product(Real x, Real y) {
  return x * y;
}
#else
M2D_DEVICE float rounded_product(float x, float y) {
  return __fmul_rn(x, y);
}
M2D_DEVICE double rounded_product(double x, double y) {
  return __dmul_rn(x, y);
}
#endif

// Of a float, what the tensor cores read as tf32, and half a unit of its last place.
constexpr uint32_t kTf32Bits = 0xffffe000u;
constexpr uint32_t kTf32Half = 0x1000u;

// Elements of a 16 x 8 block of floats in shared memory whose rows lie `stride` apart, 16-byte aligned; all 32 lanes,
// converged. With g = lane / 4, t = lane % 4: x = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4).
M2D_DEVICE void load_rows(float (&x)[4], const float* block, int stride, int lane) {
#ifdef M2D_EMULATE
  for (int i = 0; i < 4; ++i) x[i] = block[(lane / 4 + i % 2 * 8) * stride + lane % 4 + i / 2 * 4];
#else
  // Lane i gives the address of row i % 8 of the i / 8th 8 x 4 part.
  const float* source = block + lane % 16 * stride + lane / 16 * 4;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(source)))
               : "memory");
#endif
}

// d (16 x 8) += a (16 x 8) b (8 x 8); all 32 lanes, converged. With g = lane / 4, t = lane % 4:
//   a[0..3] = A[g][t], A[g+8][t], A[g][t+4], A[g+8][t+4]      b[0..1] = B[t][g], B[t+4][g]
//   d[0..3] = D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1]
M2D_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] M2D_SITE) {
#ifdef M2D_EMULATE
  simt::warp_mma(2, a, b, d, SIMT_SITE);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Asynchronous copy of kBytes (4 or 16) to shared memory, or of zeros: the source is read only where it is `present`.
template <int kBytes>
M2D_DEVICE void copy_async(void* target, const void* source, bool present M2D_SITE) {
  static_assert(kBytes == 4 || kBytes == 16);
#ifdef M2D_EMULATE
  simt::cp_async(target, source, kBytes, present, SIMT_SITE);
#else
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  const size_t global = __cvta_generic_to_global(source);
  if constexpr (kBytes == 16) {
    asm volatile(
        "{\n.reg .pred ignored;\nsetp.eq.u32 ignored, %2, 0;\n"
        "cp.async.cg.shared.global [%0], [%1], 16, ignored;\n}\n" ::"r"(shared),
        "l"(global), "r"(static_cast<uint32_t>(present))
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred ignored;\nsetp.eq.u32 ignored, %2, 0;\n"
        "cp.async.ca.shared.global [%0], [%1], 4, ignored;\n}\n" ::"r"(shared),
        "l"(global), "r"(static_cast<uint32_t>(present))
        : "memory");
  }
#endif
}

M2D_DEVICE void commit_copies() {
#ifdef M2D_EMULATE
  simt::cp_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Until at most kPending of this thread's committed groups are under way.
template <int kPending>
M2D_DEVICE void wait_copies() {
#ifdef M2D_EMULATE
  simt::cp_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// 16 bytes that are read, or written, once.
M2D_DEVICE uint4 load_streaming(const uint4* source) {
  return __ldcs(source);
}
M2D_DEVICE void store_streaming(uint4* target, uint4 value) {
  __stcs(target, value);
}

}  // namespace m2d::cuda
