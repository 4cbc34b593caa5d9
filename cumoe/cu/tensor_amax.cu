// tensor_amax: the largest magnitude of a tensor, NaN left out, in one part for each block.
//
// partials[b] is the maximum of what block b reads; whoever reads them takes the largest (raw.cuh). So there is
// nothing to clear before and no order that matters.
//
// Grid      any; strides over chunks of 512 * kVectors * 8 elements.
// Block     512 threads, kVectors times eight elements each, all loaded before the first is used.
// smem      warp_amax (16,) float.
// From -D   INPUT_TYPE
#include "raw.cuh"

using namespace cumoe;

struct Params {
  const void* x;       // (num_elems,)
  float* partials;     // (gridDim.x,)
  int64_t num_elems;   // a multiple of 8
  int64_t num_chunks;  // of kChunkElems
};

constexpr int kThreads = 512;
constexpr int kVectors = INPUT_TYPE == kF32 ? 4 : 8;
constexpr int kChunkElems = kThreads * kVectors * 8;

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    tensor_amax(const __grid_constant__ Params p) {
  __shared__ float warp_amax[kThreads / kWarpSize];
  ptx::griddepcontrol_wait();
  float amax = 0.0f;
  for (int64_t chunk = blockIdx.x; chunk < p.num_chunks; chunk += gridDim.x) {
    Raw<INPUT_TYPE, 8> raw[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t index = chunk * kChunkElems + (v * kThreads + threadIdx.x) * 8;
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
