// nvfp4: e2m1 values, two a byte, with an e4m3 scale for each 16 and one fp32 scale for all.
//
// No GPU before sm_100 converts to e2m1; this is integer and fp32 arithmetic, the same bits everywhere.
// Magnitudes of e2m1 by code: 0, 0.5, 1, 1.5, 2, 3, 4, 6; the sign is bit 3.
#pragma once

#include "e4m3.cuh"

namespace cumoe {

constexpr int kFp4Group = 16;       // columns that share a scale
constexpr float kFp4Max = 2688.0f;  // 6 * 448: the largest number for a global scale of 1

/// Code of the e2m1 magnitude nearest to y, ties to even, for 0 <= y < 7.
__device__ __forceinline__ uint32_t e2m1_magnitude(float y) {
  // The power of two below, at least 1. Half of it is the step between neighbours, so the sum with 2^22
  // of it is rounded to whole steps, and its last bits count them.
  const uint32_t power = __float_as_uint(fmaxf(y, 1.0f)) & 0x7f800000u;
  const float sum = __fmaf_rn(__uint_as_float(power), 0x1p22f, y);
  // Two codes for each doubling. The constants are those of sum and power for y = 0.
  return (__float_as_uint(sum) - power - (22u << 23)) + ((power >> 22) - (127u << 1));
}

/// Rounds x[i] * factor to e2m1, x[0] in bits 0-3. Zeros keep their sign; NaN becomes 6, as with the
/// instruction. Without `saturate` magnitudes are below 7 and no NaN.
__device__ __forceinline__ uint32_t e2m1x8_from_f32(const float* x, float factor, bool saturate) {
  float y[8];
  uint32_t bits[8];  // of which the sign is used
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    y[i] = __fmul_rn(fabsf(x[i]), factor);
    bits[i] = __float_as_uint(x[i]);
  }
  if (saturate) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (y[i] != y[i]) bits[i] = 0;
      y[i] = fminf(y[i], 6.0f);
    }
  }
  // Elements 0, 2, 4, 6 and 1, 3, 5, 7 in the four bytes of a word, and their signs in bits 7.
  uint32_t codes[2], signs[2];
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    codes[odd] = e2m1_magnitude(y[odd]) + (e2m1_magnitude(y[odd + 2]) << 8) +
                 (e2m1_magnitude(y[odd + 4]) << 16) + (e2m1_magnitude(y[odd + 6]) << 24);
    const uint32_t low = __byte_perm(bits[odd], bits[odd + 2], 0x0073);
    const uint32_t high = __byte_perm(bits[odd + 4], bits[odd + 6], 0x0073);
    signs[odd] = __byte_perm(low, high, 0x5410);
  }
  return (codes[0] + (codes[1] << 4)) | (signs[0] >> 4 & 0x08080808u) | (signs[1] & 0x80808080u);
}

/// The global scale that maps the largest magnitude of a tensor to the largest number.
__device__ __forceinline__ float nvfp4_global_scale(float amax) {
  return fminf(fmaxf(__fdiv_rn(kFp4Max, amax), kMinScale), 3.402823466e38f);
}

/// Scale of a group whose largest magnitude is `amax`, as an e4m3 byte: a sixth of it in units of
/// 1 / global_scale.
__device__ __forceinline__ uint32_t nvfp4_scale(float amax, float global_scale) {
  const float scale = __fmul_rn(global_scale, __fmul_rn(amax, 1.0f / 6.0f));
  return e4m3x2_from_f32(scale, 0.0f) & 0xffu;
}

/// What the values of a group are multiplied by before they are rounded.
__device__ __forceinline__ float nvfp4_factor(uint32_t scale, float global_scale) {
  const float wide = ptx::cvt_f32_f16(f16x2_from_e4m3x2(scale) & 0xffffu);
  return wide == 0.0f ? 0.0f : __fdiv_rn(global_scale, wide);
}

/// Where the tensor cores of sm_100 read the scale of a row and a group of columns: tiles of 128 rows by 4
/// groups, 512 bytes each, in rows of `num_groups` groups, a multiple of 4.
__device__ __forceinline__ int64_t scale_offset_128x4(int64_t row, int group, int num_groups) {
  const int64_t tile = row / 128 * (num_groups / 4) + group / 4;
  const int row_in_tile = static_cast<int>(row % 128);
  return tile * 512 + row_in_tile % 32 * 16 + row_in_tile / 32 * 4 + group % 4;
}

}  // namespace cumoe
