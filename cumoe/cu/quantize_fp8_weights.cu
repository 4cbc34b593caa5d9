// quantize_fp8_weights: one fp32 scale for each 128 x 128 block of every expert's matrix.
//
// Grid      (ceil(k / 128), ceil(n / 128), num_experts).
// Block     256 threads; a thread holds eight columns of eight rows, 16 rows apart. Blocks at the lower
//           and right edge may be partial: elements outside are zero and not stored.
// smem      amax (8,) float.
// From -D   INPUT_TYPE
#include "raw.cuh"

using namespace cumoe;

struct Params {
  const void* w;                // (num_experts, n, k)
  uint8_t* values;              // (num_experts, n, k)
  float* scale;                 // (num_experts, ceil(n / 128), ceil(k / 128))
  int64_t input_expert_stride;  // in elements
  int64_t values_expert_stride;
  int64_t scale_expert_stride;
  int32_t n;
  int32_t k;  // a multiple of 8
};

extern "C" __global__ void __launch_bounds__(256)
    quantize_fp8_weights(const __grid_constant__ Params p) {
  constexpr int kRowsPerPass = 16, kPasses = kScaleBlock / kRowsPerPass, kWarps = 8;
  __shared__ float warp_amax[kWarps];
  const int column = blockIdx.x * kScaleBlock + threadIdx.x % 16 * 8;
  const int first_row = blockIdx.y * kScaleBlock + threadIdx.x / 16;
  const int64_t expert = blockIdx.z;
  ptx::griddepcontrol_wait();

  float x[kPasses * 8];
  {
    Raw<INPUT_TYPE, 8> raw[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = first_row + pass * kRowsPerPass;
      const int64_t at = expert * p.input_expert_stride + static_cast<int64_t>(row) * p.k + column;
      raw[pass].load(p.w, at, row < p.n && column < p.k ? 8 : 0);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      float wide[8];
      raw[pass].widen(wide);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[pass * 8 + i] = wide[i];
    }
  }
  float amax = lanes_max<kWarpSize>(amax_of(x));
  if (threadIdx.x % kWarpSize == 0) warp_amax[threadIdx.x / kWarpSize] = amax;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) amax = fmaxf(amax, warp_amax[i]);
  const float scale = divide_by_scale(x, amax);

#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = first_row + pass * kRowsPerPass;
    if (row >= p.n || column >= p.k) continue;
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = x[pass * 8 + i];
    const int64_t at = static_cast<int64_t>(row) * p.k + column;
    store_8<kE4m3>(p.values, expert * p.values_expert_stride + at, y);
  }
  if (threadIdx.x == 0) {
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    p.scale[expert * p.scale_expert_stride + block] = scale;
  }
}
