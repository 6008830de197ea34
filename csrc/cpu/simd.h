// How the CPU kernels reach vector units without -march=native, which must not be in what others install.
#pragma once

// x86-64 with GCC and glibc: functions can be compiled for several vector levels and chosen at load time. Elsewhere
// (aarch64, whose baseline has NEON; clang; other libcs without ifunc) the baseline is used.
// M2D_PORTABLE leaves out all that is x86's own: what other processors get, compiled by any.
#if defined(__x86_64__) && !defined(M2D_PORTABLE)
#define M2D_HAS_SSE2 1
#if defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define M2D_HAS_X86_LEVELS 1
#endif
#endif

// One copy of the function per level; the loops are plain C++. The sanitizers cannot instrument ifuncs.
#if defined(M2D_HAS_X86_LEVELS) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define M2D_MULTIVERSION \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"), noinline))
#else
#define M2D_MULTIVERSION
#endif
