// fp8 e4m3 (OCP, finite only, largest 448): rounding from fp32 and exact widening to fp16 and fp32.
// From sm_89 on these are instructions; the integer forms below give the same bits on sm_80 and sm_86.
#pragma once

#include "ptx.cuh"

namespace cumoe {

constexpr float kE4m3Max = 448.0f;
constexpr float kMinScale = 1.17549435e-38f;  // smallest normal fp32: no division by zero
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

/// How to divide by a scale: quotient(y * factor, divisor, reciprocal) rounds y / scale to the bits, or
/// to what e4m3 cannot tell from it. The factor is a power of two that keeps remainders from being
/// subnormal or infinite, and 1 for an `amax` within the bounds of usual_amax.
struct __align__(16) Divisor {
  float divisor, reciprocal, factor, unused_;
};

__device__ __forceinline__ bool usual_amax(float amax) {
  return amax >= 0x1p-80f && amax <= 0x1p108f;
}

/// The scale of a block with a usual amax, and its reciprocal.
__device__ __forceinline__ float usual_scale(float amax, float& reciprocal) {
  const float scale = quotient(amax, kE4m3Max, 1.0f / kE4m3Max);
  const float guess = ptx::rcp_approx_ftz(scale);
  reciprocal = __fmaf_rn(guess, -__fmaf_rn(scale, guess, -1.0f), guess);
  return scale;
}

/// The scale of any other block, and how to divide by it.
__device__ __forceinline__ float unusual_scale(float amax, Divisor& by) {
  const float scale = e4m3_scale(amax), factor = amax < 1.0f ? 0x1p64f : 0x1p-64f;
  // Finite / inf = 0, inf / inf = NaN.
  by = {scale == INFINITY ? 0.0f : scale * factor, __frcp_rn(scale * factor), factor, 0.0f};
  return scale;
}

/// The scale of a block, e4m3_scale(amax), and how to divide by it.
__device__ __forceinline__ float block_scale(float amax, Divisor& by) {
  if (!usual_amax(amax)) return unusual_scale(amax, by);
  by.divisor = usual_scale(amax, by.reciprocal);
  by.factor = 1.0f;
  return by.divisor;
}

__device__ __forceinline__ float divide(float y, const Divisor& by) {
  return quotient(y * by.factor, by.divisor, by.reciprocal);
}

/// Divides the values of a block by its scale and returns it: three operations for each value.
template <int kCount>
__device__ __forceinline__ float divide_by_scale(float (&y)[kCount], float amax) {
  if (usual_amax(amax)) {
    float reciprocal;
    const float scale = usual_scale(amax, reciprocal);
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = quotient(y[i], scale, reciprocal);
    return scale;
  }
  Divisor by;
  const float scale = unusual_scale(amax, by);
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[i] = divide(y[i], by);
  return scale;
}

}  // namespace cumoe
