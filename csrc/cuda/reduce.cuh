// Reductions across the lanes of a warp, in a fixed order: every lane gets the same bits.
#pragma once

#include "device.cuh"

namespace m2d::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class Real>
M2D_DEVICE Real warp_sum(Real x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

template <class Real>
M2D_DEVICE Real warp_max(Real x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Real other = __shfl_xor_sync(kAllLanes, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace m2d::cuda
