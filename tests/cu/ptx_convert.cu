// ptx_convert: the conversions of ptx.cuh, word by word.
//
// Grid      ceil(n / 256) blocks of 256 threads, one input pair a thread.
#include "ptx.cuh"

using namespace cumoe;

struct Params {
  const float* in;  // (n, 2)
  uint32_t* out;    // (n, 10)
  int32_t n;
};

extern "C" __global__ void ptx_convert(const __grid_constant__ Params p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  const float low = p.in[2 * i], high = p.in[2 * i + 1];
  uint32_t* out = p.out + 10 * i;
  out[0] = ptx::cvt_bf16x2_f32(low, high);
  out[1] = ptx::cvt_f16x2_f32(low, high);
  out[2] = ptx::mul_f16x2(__float_as_uint(low), __float_as_uint(high));
  out[3] = __float_as_uint(ptx::cvt_f32_f16(__float_as_uint(low) & 0xffffu));
  out[4] = ptx::cvt_e4m3x2_f32(low, high);
  out[5] = ptx::cvt_f16x2_e4m3x2(__float_as_uint(low) & 0xffffu);
  out[6] = ptx::cvt_f16x2_e4m3x2(i & 0xffff);
  out[7] = ptx::cvt_e4m3x4_f32(low, high, -high, low + high);
  ptx::cvt_f16x4_e4m3x4(out[8], out[9], __float_as_uint(low));
}
