// Which of x86's vector levels the CPU kernels are compiled for.
#pragma once

#include <cstdint>  // any header of the C library says whether that is glibc

// x86-64 with GCC and glibc: functions can be compiled for several vector levels and chosen at load time. Elsewhere
// (aarch64, whose baseline has NEON; clang; GCC before 12, which does not know the levels by name; other libcs without
// ifunc) the baseline is used.
// M2D_PORTABLE leaves out all that is x86's own: what other processors get, compiled by any.
#if defined(__x86_64__) && !defined(M2D_PORTABLE)
#define M2D_HAS_SSE2 1
#if defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define M2D_HAS_X86_LEVELS 1
#endif
#endif

namespace m2d {

// The widest level that the kernels were compiled for and this processor has.
inline const char* vector_level() {
#if defined(M2D_HAS_X86_LEVELS)
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace m2d
