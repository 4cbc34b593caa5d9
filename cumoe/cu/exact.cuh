// Float32 arithmetic whose bits the NumPy twin reproduces (cumoe/reference/exact.py).
// Every operation is rounded on its own: the _rn intrinsics keep the compiler from contracting to FMA.
#pragma once

#include "ptx.cuh"

namespace cumoe {

constexpr uint32_t kImageNegInf = 0x007fffffu;

/// exp(x) * 2^SCALE within 1 ulp by a fixed sequence of operations, for x <= 0 of which that is no subnormal
/// number. Products that are exact are fused with the sum.
///
/// NOTE: each operation is done for all N before the next, an order that the compiler keeps. One number
/// after the other, a warp would wait for every single result.
template <int SCALE, int N>
__device__ __forceinline__ void exp_scaled(float (&x)[N]) {
  constexpr float kRound = 0x1.8p+23f + SCALE;  // a sum with it is rounded to an integer
  float shifted[N], n[N], r[N], p[N];
#pragma unroll
  for (int i = 0; i < N; ++i) shifted[i] = __fmul_rn(x[i], 0x1.715476p+0f);
#pragma unroll
  for (int i = 0; i < N; ++i) shifted[i] = __fadd_rn(shifted[i], kRound);
#pragma unroll
  for (int i = 0; i < N; ++i) n[i] = __fsub_rn(shifted[i], kRound);
#pragma unroll
  for (int i = 0; i < N; ++i) r[i] = __fmaf_rn(n[i], -0x1.62e4p-1f, x[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) n[i] = __fmul_rn(n[i], 0x1.7f7d1cp-20f);
#pragma unroll
  for (int i = 0; i < N; ++i) r[i] = __fsub_rn(r[i], n[i]);
  // exp(r) for |r| <= 0.34665.
  constexpr float kTerms[4] = {0x1.123974p-7f, 0x1.5558acp-5f, 0x1.555492p-3f, 0x1.fffffcp-2f};
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = 0x1.6a504cp-10f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = __fmul_rn(p[i], r[i]);
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = __fadd_rn(p[i], kTerms[j]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = __fmul_rn(p[i], __fmul_rn(r[i], r[i]));
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = __fadd_rn(p[i], r[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = __fadd_rn(p[i], 1.0f);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = __uint_as_float(__float_as_uint(p[i]) + (__float_as_uint(shifted[i]) << 23));
  }
}

/// 0.5 * tanh(0.5 * x) + 0.5 for x that is not NaN; saturates to exactly 0 and 1 near |x| = 17.
///
/// With e = exp(-|x|): 0.5 + 0.5 * copysign((1 - e) / (1 + e), x), in fewer instructions to the same bits.
/// Below -80 nothing is left of e in 1 - e and 1 + e.
/// NOTE: the quotient is that of __fdiv_rn for every e, with a reciprocal up to 4 ulp off: all of them were
/// tried. Only e = 1 - 2^-23, half way between two numbers but for 2^-48, does not come out by itself.
template <int N>
__device__ __forceinline__ void det_sigmoid(float (&x)[N]) {
  float e[N], above[N], below[N], reciprocal[N], t[N];
#pragma unroll
  for (int i = 0; i < N; ++i) e[i] = fmaxf(-fabsf(x[i]), -80.0f);
  exp_scaled<0>(e);
#pragma unroll
  for (int i = 0; i < N; ++i) below[i] = __fadd_rn(1.0f, e[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) reciprocal[i] = ptx::rcp_approx_ftz(below[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) above[i] = __fsub_rn(1.0f, e[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) t[i] = __fmaf_rn(-below[i], reciprocal[i], 1.0f);
#pragma unroll
  for (int i = 0; i < N; ++i) reciprocal[i] = __fmaf_rn(t[i], reciprocal[i], reciprocal[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) t[i] = __fmul_rn(above[i], reciprocal[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) above[i] = __fmaf_rn(-below[i], t[i], above[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) t[i] = __fmaf_rn(above[i], reciprocal[i], t[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (e[i] == 0x1.fffffcp-1f) t[i] = 0x1.000002p-24f;
    x[i] = __fmaf_rn(0.5f, copysignf(t[i], x[i]), 0.5f);
  }
}

__device__ __forceinline__ float det_sigmoid(float x) {
  float one[1] = {x};
  det_sigmoid(one);
  return one[0];
}

/// exp(x) for x <= 0; 0 below -103.98, as for NaN. A subnormal one is rounded once, by the product.
template <int N>
__device__ __forceinline__ void exp_of_difference(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = fmaxf(x[i], -104.0f);
  exp_scaled<64>(x);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = __fmul_rn(x[i], 0x1p-64f);
}

/// Numerator of a softmax term under the maximum `m`: 0 for -inf, 1 at the maximum.
__device__ __forceinline__ float softmax_term(float x, float m) {
  float one[1] = {__fsub_rn(x, m)};  // of infinities, that is NaN
  exp_of_difference(one);
  return x == INFINITY ? 1.0f : one[0];
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
