// Float32 arithmetic whose bits the NumPy twin reproduces (cumoe/reference/exact.py).
// Every operation is rounded on its own: the _rn intrinsics keep the compiler from contracting to FMA.
#pragma once

#include "ptx.cuh"

namespace cumoe {

constexpr uint32_t kImageNegInf = 0x007fffffu;

/// exp(r) for |r| <= 0.34665.
__device__ __forceinline__ float exp_polynomial(float r) {
  float p = __fadd_rn(__fmul_rn(0x1.6a504cp-10f, r), 0x1.123974p-7f);
  p = __fadd_rn(__fmul_rn(p, r), 0x1.5558acp-5f);
  p = __fadd_rn(__fmul_rn(p, r), 0x1.555492p-3f);
  p = __fadd_rn(__fmul_rn(p, r), 0x1.fffffcp-2f);
  p = __fmul_rn(p, __fmul_rn(r, r));
  p = __fadd_rn(p, r);
  return __fadd_rn(p, 1.0f);
}

/// exp(x) * 2^SCALE within 1 ulp by a fixed sequence of operations, for x <= 0 of which that is no subnormal
/// number. Products that are exact are fused with the sum.
template <int SCALE>
__device__ __forceinline__ float exp_scaled(float x) {
  constexpr float kRound = 0x1.8p+23f + SCALE;  // a sum with it is rounded to an integer
  const float shifted = __fadd_rn(__fmul_rn(x, 0x1.715476p+0f), kRound);
  const float n = __fsub_rn(shifted, kRound);
  float r = __fmaf_rn(n, -0x1.62e4p-1f, x);
  r = __fsub_rn(r, __fmul_rn(n, 0x1.7f7d1cp-20f));
  const uint32_t power = __float_as_uint(shifted) << 23;
  return __uint_as_float(__float_as_uint(exp_polynomial(r)) + power);
}

/// 0.5 * tanh(0.5 * x) + 0.5 for x that is not NaN; saturates to exactly 0 and 1 near |x| = 17.
///
/// With e = exp(-|x|): 0.5 + 0.5 * copysign((1 - e) / (1 + e), x), in fewer instructions to the same bits.
/// Below -80 nothing is left of e in 1 - e and 1 + e.
/// NOTE: the quotient is that of __fdiv_rn for every e, with a reciprocal up to 4 ulp off: all of them were
/// tried. Only e = 1 - 2^-23, half way between two numbers but for 2^-48, does not come out by itself.
__device__ __forceinline__ float det_sigmoid(float x) {
  const float e = exp_scaled<0>(fmaxf(-fabsf(x), -80.0f));
  const float numerator = __fsub_rn(1.0f, e), denominator = __fadd_rn(1.0f, e);
  float reciprocal = ptx::rcp_approx_ftz(denominator);
  reciprocal = __fmaf_rn(__fmaf_rn(-denominator, reciprocal, 1.0f), reciprocal, reciprocal);
  float t = __fmul_rn(numerator, reciprocal);
  t = __fmaf_rn(__fmaf_rn(-denominator, t, numerator), reciprocal, t);
  if (e == 0x1.fffffcp-1f) t = 0x1.000002p-24f;
  return __fmaf_rn(0.5f, copysignf(t, x), 0.5f);
}

/// exp(x) for x <= 0; 0 below -103.98, as for NaN. A subnormal one is rounded once, by the product.
__device__ __forceinline__ float exp_of_difference(float x) {
  return __fmul_rn(exp_scaled<64>(fmaxf(x, -104.0f)), 0x1p-64f);
}

/// Numerator of a softmax term under the maximum `m`: 0 for -inf, 1 at the maximum.
__device__ __forceinline__ float softmax_term(float x, float m) {
  const float term = exp_of_difference(__fsub_rn(x, m));  // of infinities, that is NaN
  return x == INFINITY ? 1.0f : term;
}

/// Adds one value per lane by butterfly; every lane gets the same bits.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    v = __fadd_rn(v, __shfl_xor_sync(kFullMask, v, offset));
  }
  return v;
}

/// Maps fp32 that is not NaN to an unsigned integer in selection order; 0 is no number's.
__device__ __forceinline__ uint32_t order_image_of_number(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// The same for any fp32: NaN ranks as -inf.
__device__ __forceinline__ uint32_t order_image(float x) {
  return x != x ? kImageNegInf : order_image_of_number(x);
}

/// Inverse of order_image; -inf for 0.
__device__ __forceinline__ float value_of_image(uint32_t image) {
  if (image < kImageNegInf) return -INFINITY;
  return __uint_as_float(image & 0x80000000u ? image ^ 0x80000000u : ~image);
}

}  // namespace cumoe
