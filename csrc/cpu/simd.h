// How the CPU kernels reach vector units without -march=native, which must not be in what others install.
#pragma once

#include "../vector_levels.h"

// One copy of the function per level; the loops are plain C++. The sanitizers cannot instrument ifuncs.
#if defined(M2D_HAS_X86_LEVELS) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define M2D_MULTIVERSION \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"), noinline))
#else
#define M2D_MULTIVERSION
#endif
