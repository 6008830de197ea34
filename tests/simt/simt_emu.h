// CUDA on the CPU, for tests only: one fiber per CUDA thread, all on one OS thread, scheduled by a seed.
//
// csrc/cuda/device.cuh includes this header under -DM2D_EMULATE. The scheduler is simt_emu.cpp, which must not be
// compiled with -fsanitize=thread; what is inline here belongs to the kernels and is instrumented with them.
//
// Threads run without interruption between points that synchronise or communicate. Shared memory starts as NaN. An
// asynchronous copy leaves NaN behind until the issuing thread waits for it. Whatever CUDA leaves undefined and
// can be noticed fails the launch, with the source line.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

// The toolkit's headers define the other keywords as nothing for a host compiler.
#undef __shared__  // it would silently become a variable of one thread
#define __shared__ use_M2D_SHARED_instead_of___shared__
#undef __launch_bounds__
#define __launch_bounds__(...)

// The caller's source line, as last parameters of a function, and its value in the body.
#define SIMT_SITE_DEF const char *simt_file = __builtin_FILE(), int simt_line = __builtin_LINE()
#define SIMT_SITE        \
  ::simt::Site {         \
    simt_file, simt_line \
  }

namespace simt {

struct Site {
  const char* file;
  int line;
};

// The running CUDA thread.
struct ThreadContext {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  unsigned linear;  // index within the block
  unsigned lane;
};
extern ThreadContext* current;

// -- launches --

struct LaunchDesc {
  bool coop;
  dim3 grid, block;
  size_t smem;  // dynamic shared memory: not emulated, must be 0
};

cudaError_t run(const LaunchDesc& desc, const std::function<void()>& thread);

template <class Kernel, class Arguments>
cudaError_t launch(const LaunchDesc& desc, Kernel kernel, const Arguments& arguments) {
  return run(desc, [&] { std::apply(kernel, arguments); });
}

// Seed 0 runs threads in their natural order; of 1 to 12 each is another schedule. Default: SIMT_SEED, or 0.
void set_seed(uint64_t seed);

// Blocks that run at the same time in a cooperative launch. Default: SIMT_SMS, or 3.
void set_sm_count(int count);
int sm_count();

// -- what threads call --

[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

void block_barrier(Site site);
void grid_barrier(Site site);
void warp_barrier(unsigned mask, Site site);
unsigned warp_ballot(unsigned mask, bool predicate, Site site);

enum class Shuffle { kIndex, kUp, kDown, kXor };
void warp_shuffle(Shuffle kind, unsigned mask, void* value, size_t size, int operand, int width,
                  Site site);

constexpr int kTf32 = 2;  // m16n8k8, the only type that is emulated
void warp_mma(int type, const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4], Site site);

// A variable in the memory of the current block, between red zones.
void* shared_var(const void* key, const char* name, size_t size, size_t align);
bool is_shared(const void* begin, size_t size);

// -- asynchronous copies --

using Word = uint32_t __attribute__((may_alias));

struct AsyncCopy {
  Word* target;
  const Word* source;
  unsigned words, present_words;
  bool early;  // whether the source is read at issue; else at the wait
  uint32_t values[4];
};

AsyncCopy& add_copy();
// The oldest copies, of all but the last `pending` committed groups; then forgets them.
AsyncCopy* finished_copies(int pending, int* count);
void remove_copies(int count);
void cp_commit();

bool coin();
void poison(void* begin, size_t size, bool on);  // for AddressSanitizer, where it is there

// Word by word: ThreadSanitizer does not see a small memcpy that the compiler expands.
inline void cp_async(void* target, const void* source, int size, bool present, Site site) {
  if (size != 4 && size != 8 && size != 16) fail(site, "copy of %d bytes", size);
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(target) | (present ? reinterpret_cast<uintptr_t>(source) : 0);
  if (addresses % size != 0) fail(site, "misaligned copy of %d bytes", size);
  if (!is_shared(target, size)) fail(site, "copy to outside this block's shared memory");
  if (present && is_shared(source, size)) fail(site, "copy from shared memory");
  AsyncCopy& copy = add_copy();
  copy.target = static_cast<Word*>(target);
  copy.source = static_cast<const Word*>(source);
  copy.words = size / 4;
  copy.present_words = present ? copy.words : 0;
  copy.early = coin();
  for (unsigned i = 0; i < 4; ++i) copy.values[i] = 0;
  // Even a late copy reads now, so that a bad address is reported at the line that issues it.
  for (unsigned i = 0; i < copy.present_words; ++i) copy.values[i] = copy.source[i];
  for (unsigned i = 0; i < copy.words; ++i) copy.target[i] = 0xffffffffu;
  poison(target, size, true);
}

inline void cp_wait(int pending) {
  int count;
  AsyncCopy* copies = finished_copies(pending, &count);
  for (AsyncCopy* copy = copies; copy < copies + count; ++copy) {
    if (!copy->early)
      for (unsigned i = 0; i < copy->present_words; ++i) copy->values[i] = copy->source[i];
    poison(copy->target, 4 * copy->words, false);
    for (unsigned i = 0; i < copy->words; ++i) copy->target[i] = copy->values[i];
  }
  remove_copies(count);
}

}  // namespace simt

// -- CUDA's names --

#define threadIdx (::simt::current->thread)
#define blockIdx (::simt::current->block)
#define blockDim (::simt::current->block_dim)
#define gridDim (::simt::current->grid_dim)

inline void __syncthreads(SIMT_SITE_DEF) {
  simt::block_barrier(SIMT_SITE);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE_DEF) {
  simt::warp_barrier(mask, SIMT_SITE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE_DEF) {
  return simt::warp_ballot(mask, predicate != 0, SIMT_SITE);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE_DEF) {
  return simt::warp_ballot(mask, predicate != 0, SIMT_SITE) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE_DEF) {
  return simt::warp_ballot(mask, predicate != 0, SIMT_SITE) == mask;
}

#define SIMT_SHUFFLE(name, kind, Operand)                                                       \
  template <class T>                                                                            \
  T name(unsigned mask, T value, Operand operand, int width = 32, SIMT_SITE_DEF) {              \
    static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);                                   \
    simt::warp_shuffle(simt::Shuffle::kind, mask, &value, sizeof(T), static_cast<int>(operand), \
                       width, SIMT_SITE);                                                       \
    return value;                                                                               \
  }
SIMT_SHUFFLE(__shfl_sync, kIndex, int)
SIMT_SHUFFLE(__shfl_up_sync, kUp, unsigned)
SIMT_SHUFFLE(__shfl_down_sync, kDown, unsigned)
SIMT_SHUFFLE(__shfl_xor_sync, kXor, int)
#undef SIMT_SHUFFLE

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// Relaxed, as on the device. There are no fences: blocks meet at grid syncs only.
#define SIMT_ATOMIC(name, result)                                                                 \
  template <class T>                                                                              \
  T name(T* p, std::type_identity_t<T> value) {                                                   \
    static_assert(std::is_integral_v<T>, "floating-point atomics depend on the order");           \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                 \
    while (!__atomic_compare_exchange_n(p, &old, static_cast<T>(result), false, __ATOMIC_RELAXED, \
                                        __ATOMIC_RELAXED)) {                                      \
    }                                                                                             \
    return old;                                                                                   \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicExch, value)
SIMT_ATOMIC(atomicMax, old > value ? old : value)
SIMT_ATOMIC(atomicMin, old < value ? old : value)
#undef SIMT_ATOMIC

template <class To, class From>
To simt_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) {
  return simt_bits<unsigned>(x);
}
inline int __float_as_int(float x) {
  return simt_bits<int>(x);
}
inline float __uint_as_float(unsigned x) {
  return simt_bits<float>(x);
}
inline float __int_as_float(int x) {
  return simt_bits<float>(x);
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}

#define SIMT_MIN_MAX(T)    \
  inline T min(T a, T b) { \
    return b < a ? b : a;  \
  }                        \
  inline T max(T a, T b) { \
    return a < b ? b : a;  \
  }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(float)
SIMT_MIN_MAX(double)
#undef SIMT_MIN_MAX
