// Float32 arithmetic whose bits the NumPy twin reproduces (cumoe/reference/exact.py).
// Every operation is rounded on its own: the _rn intrinsics keep the compiler from contracting to FMA.
#pragma once

#include "types.cuh"

namespace cumoe {

constexpr uint32_t kImageNegInf = 0x007fffffu;

/// exp(x) within 1 ulp by a fixed sequence of operations; subnormal results are rounded once.
__device__ __forceinline__ float det_exp(float x) {
  x = fminf(fmaxf(x, -104.0f), 89.0f);
  const float n = rintf(__fmul_rn(x, 0x1.715476p+0f));
  float r = __fsub_rn(x, __fmul_rn(n, 0x1.62e4p-1f));
  r = __fsub_rn(r, __fmul_rn(n, 0x1.7f7d1cp-20f));
  float p = __fadd_rn(__fmul_rn(0x1.6a504cp-10f, r), 0x1.123974p-7f);
  p = __fadd_rn(__fmul_rn(p, r), 0x1.5558acp-5f);
  p = __fadd_rn(__fmul_rn(p, r), 0x1.555492p-3f);
  p = __fadd_rn(__fmul_rn(p, r), 0x1.fffffcp-2f);
  p = __fmul_rn(p, __fmul_rn(r, r));
  p = __fadd_rn(p, r);
  p = __fadd_rn(p, 1.0f);
  const int i = static_cast<int>(n);
  const int half = i >> 1;
  p = __fmul_rn(p, __int_as_float((half + 127) << 23));
  return __fmul_rn(p, __int_as_float((i - half + 127) << 23));
}

/// 0.5 * tanh(0.5 * x) + 0.5; saturates to exactly 0 and 1 near |x| = 17.
__device__ __forceinline__ float det_sigmoid(float x) {
  const float e = det_exp(-fabsf(x));
  const float t = copysignf(__fdiv_rn(__fsub_rn(1.0f, e), __fadd_rn(1.0f, e)), x);
  return __fadd_rn(__fmul_rn(0.5f, t), 0.5f);
}

/// Numerator of a softmax term under the maximum `m`: 0 for -inf, 1 at the maximum.
__device__ __forceinline__ float softmax_term(float x, float m) {
  if (x == -INFINITY) return 0.0f;
  return x == m ? 1.0f : det_exp(__fsub_rn(x, m));
}

/// Adds one value per lane by butterfly; every lane gets the same bits.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    v = __fadd_rn(v, __shfl_xor_sync(kFullMask, v, offset));
  }
  return v;
}

/// Maps fp32 to an unsigned integer in selection order; NaN ranks as -inf, 0 is no number.
__device__ __forceinline__ uint32_t order_image(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return kImageNegInf;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// Inverse of order_image; -inf for 0.
__device__ __forceinline__ float value_of_image(uint32_t image) {
  if (image < kImageNegInf) return -INFINITY;
  return __uint_as_float(image & 0x80000000u ? image ^ 0x80000000u : ~image);
}

}  // namespace cumoe
