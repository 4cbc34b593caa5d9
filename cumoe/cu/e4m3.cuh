// fp8 e4m3 (OCP, finite only, largest 448): rounding from fp32 and exact widening to fp16 and fp32.
// From sm_89 on these are instructions; the integer forms below give the same bits on sm_80 and sm_86.
#pragma once

#include "ptx.cuh"

namespace cumoe {

constexpr float kE4m3Max = 448.0f;
constexpr float kMinScale = 1.17549435e-38f;  // smallest normal fp32: no division by zero
constexpr float kMinTokenScale = 0x1p-9f / 448.0f;
constexpr float kMinUe8m0Scale = 1e-10f;
constexpr int kScaleBlock = 128;

/// Rounds fp32 to nearest-even e4m3 in integer arithmetic, saturating at 448; NaN gives 0x7f.
__device__ __forceinline__ uint32_t e4m3_from_f32_soft(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const float magnitude = fabsf(x);
  if (!(magnitude <= 3.402823466e38f) && magnitude != magnitude) return 0x7fu;
  uint32_t code;
  if (magnitude < 0.015625f) {
    // Below 2^-6 the step is 2^-9: adding 2^14, whose last place is 2^-9, rounds to it.
    code = __float_as_uint(__fadd_rn(magnitude, 16384.0f)) - __float_as_uint(16384.0f);
  } else {
    const uint32_t u = __float_as_uint(magnitude);
    const uint32_t rounded = u + 0x7ffffu + ((u >> 20) & 1u);
    code = (rounded >> 20) - ((127u - 7u) << 3);
    if (magnitude >= kE4m3Max || code > 0x7eu) code = 0x7eu;
  }
  return sign | code;
}

/// Widens two e4m3 values to fp16 without the conversion instruction, exactly; 0x7f becomes NaN.
__device__ __forceinline__ uint32_t f16x2_from_e4m3x2_soft(uint32_t bits) {
  const uint32_t codes = (bits & 0xffu) | (bits & 0xff00u) << 8;
  const uint32_t magnitude = codes & 0x007f007fu;
  // The exponent bias differs by 8: place the bits, then multiply by 2^8 (right for subnormals too).
  const uint32_t value = ptx::mul_f16x2(magnitude << 7, 0x5c005c00u);
  const uint32_t is_nan = ((magnitude + 0x00010001u) & 0x00800080u) >> 7;
  return value | (codes & 0x00800080u) << 8 | is_nan * 0x7fffu;
}

/// Rounds two fp32 values to e4m3, `low` in bits 0-7.
__device__ __forceinline__ uint32_t e4m3x2_from_f32(float low, float high) {
#if __CUDA_ARCH__ >= 890
  return ptx::cvt_e4m3x2_f32(low, high);
#else
  return e4m3_from_f32_soft(low) | (e4m3_from_f32_soft(high) << 8);
#endif
}

/// Widens the two e4m3 values in bits 0-15 to fp16.
__device__ __forceinline__ uint32_t f16x2_from_e4m3x2(uint32_t bits) {
#if __CUDA_ARCH__ >= 890
  return ptx::cvt_f16x2_e4m3x2(bits);
#else
  return f16x2_from_e4m3x2_soft(bits);
#endif
}

/// Rounds four fp32 values to e4m3, the first in bits 0-7.
__device__ __forceinline__ uint32_t e4m3x4_from_f32(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  return ptx::cvt_e4m3x4_f32(a, b, c, d);
#else
  return e4m3x2_from_f32(a, b) | e4m3x2_from_f32(c, d) << 16;
#endif
}

/// Widens the four e4m3 values of a word to fp16.
__device__ __forceinline__ void f16x4_from_e4m3x4(uint32_t& low, uint32_t& high, uint32_t bits) {
#if __CUDA_ARCH__ >= 890
  ptx::cvt_f16x4_e4m3x4(low, high, bits);
#else
  low = f16x2_from_e4m3x2_soft(bits);
  high = f16x2_from_e4m3x2_soft(bits >> 16);
#endif
}

/// Dequantisation scale of a block whose largest magnitude is `amax`.
__device__ __forceinline__ float e4m3_scale(float amax) {
  return fmaxf(__fdiv_rn(amax, kE4m3Max), kMinScale);
}

/// a / b for a rounded reciprocal of b: the quotient and one correction by its remainder, which is exact
/// unless it is subnormal. Negated, so that a zero keeps its sign.
__device__ __forceinline__ float quotient(float a, float b, float reciprocal) {
  const float q = __fmul_rn(a, reciprocal);
  return __fmaf_rn(-__fmaf_rn(b, q, -a), reciprocal, q);
}

/// What `quotient` needs of a divisor between 2^-90 and 2^100.
__device__ __forceinline__ float reciprocal_of(float scale) {
  const float guess = ptx::rcp_approx_ftz(scale);
  return __fmaf_rn(guess, -__fmaf_rn(scale, guess, -1.0f), guess);
}

/// Whether amax / 448 is such a divisor.
__device__ __forceinline__ bool is_usual(float amax) {
  return amax >= 0x1p-80f && amax <= 0x1p108f;
}

/// e4m3_scale of a usual amax.
__device__ __forceinline__ float usual_scale(float amax) {
  return quotient(amax, kE4m3Max, 1.0f / kE4m3Max);
}

/// Divides values of at most 448 scales by a scale that is between 2^-90 and 2^100.
template <int kCount>
__device__ __forceinline__ void divide_usual(float (&y)[kCount], float scale) {
  const float reciprocal = reciprocal_of(scale);
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[i] = quotient(y[i], scale, reciprocal);
}

/// How to divide the values of a block, at most 448 scales, by its scale: for several threads.
// NOTE: kept from subnormal remainders by a power of two, which changes no quotient that e4m3 can hold.
struct __align__(16) BlockDivisor {
  float divisor, reciprocal, factor, unused_;

  __device__ __forceinline__ float divide(float y) const {
    return quotient(y * factor, divisor, reciprocal);
  }
};

/// That of a scale which is not between 2^-90 and 2^100, from the smallest normal number on.
__device__ __forceinline__ BlockDivisor extreme_divisor(float scale) {
  const float factor = scale < 1.0f ? 0x1p64f : 0x1p-64f;
  // Finite / inf = 0, inf / inf = NaN.
  return {scale == INFINITY ? 0.0f : scale * factor, __frcp_rn(scale * factor), factor, 0.0f};
}

/// The scale of a block, e4m3_scale(amax), and how to divide by it.
__device__ __forceinline__ float block_scale(float amax, BlockDivisor& by) {
  if (!is_usual(amax)) {
    const float scale = e4m3_scale(amax);
    by = extreme_divisor(scale);
    return scale;
  }
  const float scale = usual_scale(amax);
  by = {scale, reciprocal_of(scale), 1.0f, 0.0f};
  return scale;
}

template <int kCount>
__device__ __forceinline__ void divide_extreme(float (&y)[kCount], float scale) {
  const BlockDivisor by = extreme_divisor(scale);
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[i] = by.divide(y[i]);
}

/// Divides the values of a block by its scale, e4m3_scale(amax), and returns the scale. Scale and e4m3
/// values have the bits of true divisions, at three operations for each value.
template <int kCount>
__device__ __forceinline__ float divide_by_scale(float (&y)[kCount], float amax) {
  if (is_usual(amax)) {
    const float scale = usual_scale(amax);
    divide_usual(y, scale);
    return scale;
  }
  const float scale = e4m3_scale(amax);
  divide_extreme(y, scale);
  return scale;
}

/// Dequantisation scale of a row that has one: at least 1/448 of the smallest e4m3 number.
__device__ __forceinline__ float e4m3_token_scale(float amax) {
  return fmaxf(__fdiv_rn(amax, kE4m3Max), kMinTokenScale);
}

/// Divides any values by any positive scale, each to the e4m3 value that a true division gives: for scales
/// that many values share.
struct E4m3Divisor {
  float factor;  // takes the divisor between 2^-90 and 2^100
  float divisor;
  float reciprocal;

  __device__ __forceinline__ explicit E4m3Divisor(float scale) {
    factor = scale < 0x1p-80f ? 0x1p64f : scale > 0x1p90f ? 0x1p-64f : 1.0f;
    const bool infinite = scale == INFINITY;  // finite / inf = 0, inf / inf = NaN
    divisor = infinite ? 0.0f : scale * factor;
    reciprocal = infinite ? 0.0f : reciprocal_of(divisor);
  }

  template <int kCount>
  __device__ __forceinline__ void divide(float (&y)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float a = y[i] * factor;
      // NOTE: cut far above 448, so that no remainder is infinite; a NaN comes back with the remainder.
      const float q = fminf(fmaxf(a * reciprocal, -0x1p20f), 0x1p20f);
      y[i] = __fmaf_rn(-__fmaf_rn(divisor, q, -a), reciprocal, q);
    }
  }
};

/// UE8M0 scale of a group: the biased exponent of the power of two at or above max(amax / 448, 1e-10).
/// 255 (NaN) for an infinite amax.
__device__ __forceinline__ uint32_t ue8m0_scale(float amax) {
  const float scale = is_usual(amax) ? usual_scale(amax) : __fdiv_rn(amax, kE4m3Max);
  return (__float_as_uint(fmaxf(scale, kMinUe8m0Scale)) + 0x7fffffu) >> 23;
}

/// 1 / scale of a UE8M0 scale from ue8m0_scale: exact, and 0 for 255.
__device__ __forceinline__ float ue8m0_reciprocal(uint32_t scale) {
  return __uint_as_float(scale < 255u ? (254u - scale) << 23 : 0u);
}

}  // namespace cumoe
