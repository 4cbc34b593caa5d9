// tensor_amax: the largest magnitude of a tensor, NaN left out, in one part for each block.
//
// partials[b] is the maximum of what block b reads; whoever reads them takes the largest (raw.cuh). So there is
// nothing to clear before and no order that matters.
//
// Grid      any; strides over slabs of 512 * 8 elements, so that no block has two more than another.
// Block     512 threads. kVectors slabs, eight elements a thread of each, are loaded before the first is used.
// smem      warp_amax (16,) float.
// From -D   INPUT_TYPE
#include "raw.cuh"

using namespace cumoe;

struct Params {
  const void* x;      // (num_elems,)
  float* partials;    // (gridDim.x,)
  int64_t num_elems;  // a multiple of 8
};

constexpr int kThreads = 512;
constexpr int kVectors = INPUT_TYPE == kF32 ? 4 : 8;
constexpr int kSlabElems = kThreads * 8;

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    tensor_amax(const __grid_constant__ Params p) {
  __shared__ float warp_amax[kThreads / kWarpSize];
  ptx::griddepcontrol_wait();
  float amax = 0.0f;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSlabElems;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kSlabElems + threadIdx.x * 8;
  for (; first < p.num_elems; first += kVectors * step) {
    Raw<INPUT_TYPE, 8> raw[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t index = first + v * step;
      raw[v].load(p.x, index, index < p.num_elems ? 8 : 0);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float x[8];
      raw[v].widen(x);
      amax = fmaxf(amax, amax_of(x));
    }
  }
  ptx::griddepcontrol_launch_dependents();
  amax = lanes_max<kWarpSize>(amax);
  if (threadIdx.x % kWarpSize == 0) warp_amax[threadIdx.x / kWarpSize] = amax;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 1; i < kThreads / kWarpSize; ++i) amax = fmaxf(amax, warp_amax[i]);
    p.partials[blockIdx.x] = amax;
  }
}
