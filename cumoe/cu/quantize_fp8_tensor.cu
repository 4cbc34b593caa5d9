// quantize_fp8_tensor: one fp32 scale for the whole tensor, given or made of tensor_amax's maxima.
//
// scale = max(amax / 448, smallest normal); q = e4m3(x / scale), saturating, nearest even.
//
// Unit      16 neighbouring elements on one lane, ROWS of them 128 units apart, all loaded before the first
//           is used. ROWS changes no bit of the result.
// Grid      ceil(units / 128 / ROWS). With maxima from the end of the tensor on, which is still in L2.
// Block     128 threads.
// smem      warp_amax (32,) float, with maxima.
// From -D   INPUT_TYPE ROWS
#include "raw.cuh"

using namespace cumoe;

struct Params {
  const void* x;          // (num_elems,)
  uint8_t* values;        // (num_elems,)
  float* scale;           // (1,): read, or written if there are maxima
  const float* partials;  // (num_partials,)
  int64_t num_elems;      // a multiple of 8
  int32_t num_partials;   // 0: the scale is given
  int32_t unused_;
};

constexpr int kThreads = 128;
constexpr int kElems = 16;

extern "C" __global__ void __launch_bounds__(kThreads)
    quantize_fp8_tensor(const __grid_constant__ Params p) {
  const bool dynamic = p.num_partials > 0;
  const int64_t block = dynamic ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int64_t first = (block * ROWS * kThreads + threadIdx.x) * kElems;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  Raw<INPUT_TYPE, kElems> raw[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t index = first + r * (kThreads * kElems);
    raw[r].load(p.x, index, valid_of_16(index, p.num_elems));
  }
  float value;
  if (dynamic) {
    value = e4m3_scale(max_of_partials(p.partials, p.num_partials));
    if (block == 0 && threadIdx.x == 0) *p.scale = value;
  } else {
    value = *p.scale;
  }
  const E4m3Divisor divisor(value);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t index = first + r * (kThreads * kElems);
    float y[kElems];
    raw[r].widen(y);
    divisor.divide(y);
    store_e4m3_16(p.values + index, y, valid_of_16(index, p.num_elems), true);
  }
}
