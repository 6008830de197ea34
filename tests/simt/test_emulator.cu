// What csrc/cuda/device.cuh promises, by small kernels: for the emulation, under many schedules, and for a GPU.
//
//   test_emulator            checks everything
//   test_emulator MISUSE     runs a kernel with a fault; a launch that fails prints why, exit status 3
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "device.cuh"
#include "tile_product.cuh"

using m2d::cuda::commit_copies;
using m2d::cuda::copy_async;
using m2d::cuda::grid_sync;
using m2d::cuda::wait_copies;

namespace {

// Fragments are read by the strides of CUTLASS's CuTe layouts, cute/atom/mma_traits_sm80.hpp, as a second source: the
// address is the sum of (digit of lane or value) * stride, A at m + 16 k, B at n + 8 k, C and D at m + 16 n.
__global__ void multiply(const float* a, const float* b, const float* c, float* d) {
  const int t0 = threadIdx.x % 4;
  const int t1 = threadIdx.x / 4;
  uint32_t a_fragment[4], b_fragment[2];
  float sums[4];
  for (int v = 0; v < 4; ++v)
    a_fragment[v] = __float_as_uint(a[t0 * 16 + t1 * 1 + v % 2 * 8 + v / 2 * 64]);
  for (int v = 0; v < 2; ++v) b_fragment[v] = __float_as_uint(b[t0 * 8 + t1 * 1 + v * 32]);
  for (int v = 0; v < 4; ++v) sums[v] = c[t0 * 32 + t1 * 1 + v % 2 * 16 + v / 2 * 8];
  m2d::cuda::mma_tf32(sums, a_fragment, b_fragment);
  for (int v = 0; v < 4; ++v) d[t0 * 32 + t1 * 1 + v % 2 * 16 + v / 2 * 8] = sums[v];
}

__global__ void split_floats(const float* x, float* high, float* low, float* cut) {
  const int t = static_cast<int>(threadIdx.x);
  const m2d::cuda::SplitFloat parts = m2d::cuda::split(x[t]);
  high[t] = __uint_as_float(parts.high);
  low[t] = __uint_as_float(parts.low);
  cut[t] = __uint_as_float(m2d::cuda::unbiased(x[t]) & m2d::cuda::kTf32Bits);
}

// Shared memory of its own for each block, threads that exit early, two-dimensional indices, votes, shuffles.
__global__ void use_blocks(int* bad, unsigned* count) {
  M2D_SHARED(int, values, [40]);
  M2D_SHARED(int, id, [1]);
  const int block = static_cast<int>(blockIdx.x);
  const int t = static_cast<int>(threadIdx.x + threadIdx.y * blockDim.x);
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  if (t == 0) id[0] = block;
  if (t < 40) values[t] = block * 1000 + t;
  __syncthreads();
  if (t >= threads - 5) return;  // since sm_70 nothing waits for them
  __syncthreads();
  bool wrong = id[0] != block;
  for (int i = 0; i < 40; ++i) wrong |= values[i] != block * 1000 + i;
  if (t < 32) {
    wrong |= __ballot_sync(0xffffffffu, t % 2) != 0xaaaaaaaau;
    wrong |= __all_sync(0xffffffffu, 1) == 0 || __any_sync(0xffffffffu, 0) != 0;
    int sum = t;
    for (int offset = 8; offset > 0; offset /= 2)
      sum += __shfl_down_sync(0xffffffffu, sum, offset, 16);
    wrong |= (t == 0 && sum != 120) || (t == 16 && sum != 376);
    wrong |= __shfl_up_sync(0xffffffffu, t, 3) != (t < 3 ? t : t - 3);
    wrong |= __shfl_sync(0xffffffffu, static_cast<double>(t), 7) != 7.0;
    if (t < 16) {
      wrong |= __shfl_xor_sync(0x0000ffffu, t, 15) != 15 - t;
    } else {
      wrong |= __shfl_sync(0xffff0000u, t, 16) != 16;
    }
    __syncwarp();
  }
  bad[block * threads + t] = wrong;
  atomicAdd(count, 1u);
}

// Each round reads what another block wrote in the last one.
__global__ void chain(int rounds, int* from, int* to) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int n = static_cast<int>(gridDim.x * blockDim.x);
  for (int r = 0; r < rounds; ++r) {
    to[i] = from[(i + 1) % n] + 1;
    grid_sync();
    int* swapped = from;
    from = to;
    to = swapped;
  }
}

// Two groups of copies, one of which is waited for at a time; of some threads they are zeros.
__global__ void copy(const float* source, float* target) {
  M2D_SHARED(float, vectors, [32 * 4]);
  M2D_SHARED(float, words, [32]);
  const int t = static_cast<int>(threadIdx.x);
  copy_async<16>(vectors + 4 * t, source + 4 * t, t % 5 != 0);
  commit_copies();
  copy_async<4>(words + t, source + t, t % 2 != 0);
  commit_copies();
  wait_copies<1>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) target[4 * t + i] = vectors[(4 * t + i + 4) % 128];
  wait_copies<0>();
  __syncthreads();
  target[128 + t] = words[(t + 1) % 32];
}

struct Large {
  float values[5000];
};

__global__ void take_large(const __grid_constant__ Large large, float* target) {
  target[threadIdx.x] = large.values[5000 - 1 - threadIdx.x];
}

template <class T>
T* allocate(size_t count) {
  void* memory = nullptr;
#ifdef M2D_EMULATE
  memory = std::malloc(count * sizeof(T));
#else
  if (cudaMallocManaged(&memory, count * sizeof(T)) != cudaSuccess) std::abort();
#endif
  return static_cast<T*>(memory);
}

template <class T>
void release(T* memory) {
#ifdef M2D_EMULATE
  std::free(memory);
#else
  cudaFree(memory);
#endif
}

int failures = 0;

void check(bool good, int line, int seed) {
  if (good) return;
  ++failures;
  std::printf("line %d fails, seed %d\n", line, seed);
}
#define CHECK(good) check(good, __LINE__, seed)

template <class... Parameters, class... Arguments>
bool launch(int blocks, dim3 threads, bool cooperative, void (*kernel)(Parameters...),
            Arguments... arguments) {
  const m2d::cuda::Launch config{dim3(blocks), threads, nullptr, cooperative};
  if (m2d::cuda::launch(config, kernel, arguments...) != cudaSuccess) return false;
#ifndef M2D_EMULATE
  if (cudaDeviceSynchronize() != cudaSuccess) return false;
#endif
  return true;
}

void check_products(int seed) {
  float* a = allocate<float>(16 * 8);
  float* b = allocate<float>(8 * 8);
  float* c = allocate<float>(16 * 8);
  float* d = allocate<float>(16 * 8);
  for (int i = 0; i < 128; ++i) a[i] = static_cast<float>(std::rand() % 17 - 8);
  for (int i = 0; i < 64; ++i) b[i] = static_cast<float>(std::rand() % 17 - 8);
  for (int i = 0; i < 128; ++i) c[i] = static_cast<float>(std::rand() % 17 - 8);
  CHECK(launch(1, dim3(32), false, multiply, a, b, c, d));
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = c[m + 16 * n];
      for (int k = 0; k < 8; ++k) sum += a[m + 16 * k] * b[n + 8 * k];
      CHECK(d[m + 16 * n] == sum);
    }
  }
  // Ties go away from zero; the exponent takes a carry.
  const float x[4] = {1.0f + 0x1p-11f, 1.0f + 0x1p-12f, -1.0f - 0x1p-11f, 2.0f - 0x1p-23f};
  const float rounded[4] = {1.0f + 0x1p-10f, 1.0f, -1.0f - 0x1p-10f, 2.0f};
  for (int i = 0; i < 4; ++i) a[i] = x[i];
  CHECK(launch(1, dim3(4), false, split_floats, a, b, c, d));
  for (int i = 0; i < 4; ++i) CHECK(b[i] == rounded[i] && b[i] + c[i] == x[i]);
  // What tf32 has keeps its value when it is cut off again, and what is not finite stays so.
  const float whole[4] = {1.0f, -2.0f + 0x1p-10f, INFINITY, NAN};
  for (int i = 0; i < 4; ++i) a[i] = whole[i];
  CHECK(launch(1, dim3(4), false, split_floats, a, b, c, d));
  for (int i = 0; i < 3; ++i) CHECK(d[i] == whole[i]);
  CHECK(std::isnan(d[3]) && std::isnan(b[3] + c[3]));
  release(a);
  release(b);
  release(c);
  release(d);
}

void check_blocks(int seed) {
  const int blocks = 37;
  int* bad = allocate<int>(blocks * 96);
  unsigned* count = allocate<unsigned>(1);
  for (int i = 0; i < blocks * 96; ++i) bad[i] = 0;
  *count = 0;
  CHECK(launch(blocks, dim3(24, 4), false, use_blocks, bad, count));
  for (int i = 0; i < blocks * 96; ++i) CHECK(bad[i] == 0);
  CHECK(*count == blocks * 91);
  release(bad);
  release(count);
}

void check_grid(int seed) {
  const int n = 5 * 48;
  int* from = allocate<int>(n);
  int* to = allocate<int>(n);
  for (int i = 0; i < n; ++i) from[i] = i;
  CHECK(launch(5, dim3(48), true, chain, 6, from, to));
  for (int i = 0; i < n; ++i) CHECK(from[i] == (i + 6) % n + 6);
#ifdef M2D_EMULATE
  const m2d::cuda::Launch config{dim3(6), dim3(48), nullptr, true};
  CHECK(m2d::cuda::launch(config, chain, 1, from, to) == cudaErrorCooperativeLaunchTooLarge);
#endif
  release(from);
  release(to);
}

void check_copies(int seed) {
  float* source = allocate<float>(128);
  float* target = allocate<float>(160);
  for (int i = 0; i < 128; ++i) source[i] = static_cast<float>(1 + i);
  CHECK(launch(1, dim3(32), false, copy, source, target));
  for (int i = 0; i < 128; ++i) {
    const int from = (i + 4) % 128;
    CHECK(target[i] == (from / 4 % 5 != 0 ? source[from] : 0.0f));
  }
  for (int t = 0; t < 32; ++t) {
    const int from = (t + 1) % 32;
    CHECK(target[128 + t] == (from % 2 == 1 ? source[from] : 0.0f));
  }
  release(source);
  release(target);
}

void check_arguments(int seed) {
  static Large large;
  float* target = allocate<float>(256);
  for (int i = 0; i < 5000; ++i) large.values[i] = static_cast<float>(i);
  CHECK(launch(1, dim3(256), false, take_large, large, target));
  for (int i = 0; i < 256; ++i) CHECK(target[i] == static_cast<float>(4999 - i));
  release(target);
}

#ifdef M2D_EMULATE
enum Misuse {
  kNone,
  kDivergentBarrier,
  kDivergentWarp,
  kHalfWarp,
  kMisalignedCopy,
  kCopyToGlobal,
  kReadBeforeWait,
  kForgottenCopy,
  kSharedOverrun,
  kUnwrittenShared,
  kMisalignedVector,
  kEarlyExit,
  kNoGrid,
  kRace,
  kMisuses
};
const char* const kMisuseNames[kMisuses] = {"none",
                                            "divergent_barrier",
                                            "divergent_warp",
                                            "half_warp",
                                            "misaligned_copy",
                                            "copy_to_global",
                                            "read_before_wait",
                                            "forgotten_copy",
                                            "shared_overrun",
                                            "unwritten_shared",
                                            "misaligned_vector",
                                            "early_exit",
                                            "no_grid",
                                            "race"};

__global__ void misuse(int what, float* memory) {
  M2D_SHARED(float, values, [64]);
  const int t = static_cast<int>(threadIdx.x);
  values[t] = 0.0f;
  __syncthreads();
  float result = 0.0f;
  switch (what) {
    case kDivergentBarrier:
      if (t != 3) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case kDivergentWarp:
      if (t % 2 == 0) {
        __syncwarp();
      } else {
        __shfl_xor_sync(0xffffffffu, t, 1);
      }
      break;
    case kHalfWarp:
      if (t < 16) __shfl_xor_sync(0xffffffffu, t, 1);
      break;
    case kMisalignedCopy:
      copy_async<16>(values + 1, memory, true);
      break;
    case kCopyToGlobal:
      copy_async<4>(memory + t, memory + t, true);
      break;
    case kReadBeforeWait:
      copy_async<16>(values + 4 * (t % 16), memory + 4 * (t % 16), t < 16);
      commit_copies();
      result = values[4 * (t % 16)];
      wait_copies<0>();
      break;
    case kForgottenCopy:
      copy_async<4>(values + t, memory + t, true);
      commit_copies();
      break;
    case kSharedOverrun:
      values[t + 1] = 1.0f;
      break;
    case kUnwrittenShared: {
      M2D_SHARED(float, others, [64]);
      result = others[t];
      break;
    }
    case kMisalignedVector:
      *reinterpret_cast<float4*>(values + 1) = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
      break;
    case kEarlyExit:
      if (blockIdx.x == 1 && t == 7) return;
      grid_sync();
      break;
    case kNoGrid:
      if (blockIdx.x == 0) grid_sync();
      break;
    case kRace:
      values[t] = 1.0f;
      result = values[63 - t];
      break;
    default:
      break;
  }
  __syncthreads();
  if (blockIdx.x == 0) memory[t] = result;
}

int run_misuse(const std::string& name) {
  for (int what = 0; what < kMisuses; ++what) {
    if (name != kMisuseNames[what]) continue;
    float* memory = allocate<float>(64);
    for (int i = 0; i < 64; ++i) memory[i] = 0.0f;
    bool good = launch(2, dim3(64), what != kNoGrid, misuse, what, memory);
    for (int i = 0; i < 64 && good; ++i) {
      if (memory[i] == memory[i]) continue;
      std::fprintf(stderr, "the result is NaN\n");
      good = false;
    }
    release(memory);
    return good ? 0 : 3;
  }
  std::fprintf(stderr, "no misuse is called %s\n", name.c_str());
  return 2;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  int seeds = 1;
#ifdef M2D_EMULATE
  simt::set_sm_count(5);
  if (argc > 1) {
    simt::set_seed(1);
    return run_misuse(argv[1]);
  }
  seeds = 13;
#else
  (void)argc;
  (void)argv;
#endif
  for (int seed = 0; seed < seeds; ++seed) {
#ifdef M2D_EMULATE
    simt::set_seed(seed);
#endif
    check_products(seed);
    check_blocks(seed);
    check_grid(seed);
    check_copies(seed);
    check_arguments(seed);
  }
  std::printf("%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
