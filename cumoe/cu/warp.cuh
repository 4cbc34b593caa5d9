// A thread's warp.
#pragma once

#include "types.cuh"

namespace cumoe {

/// Warp of a block that a thread is in. The compiler knows that it is one number for a warp, and so that what
/// depends on it does not part its lanes: it leaves out the other way through each warp operation.
__device__ __forceinline__ int warp_of_block() {
  return __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpSize, 0);
}

}  // namespace cumoe
