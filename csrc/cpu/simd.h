// How the CPU kernels reach vector units without -march=native, which must not be in what others install.
#pragma once

// GCC compiles one copy of the function per level and picks at load time. Elsewhere (aarch64, whose
// baseline has NEON; clang; other libcs without ifunc) the baseline is used. The loops are plain C++.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define M2D_MULTIVERSION \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"), noinline))
#else
#define M2D_MULTIVERSION
#endif
