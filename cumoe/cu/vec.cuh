// Eight neighbouring elements of any supported type, loaded and stored with 16-byte accesses as fp32.
#pragma once

#include "e4m3.cuh"

namespace cumoe {

template <int kType>
constexpr int kTypeBytes = kType == kF32    ? 4
                           : kType == kE4m3 ? 1
                                            : 2;

/// Widens the bf16 value in bits 0-15.
__device__ __forceinline__ float f32_from_bf16(uint32_t bits) {
  return __uint_as_float(bits << 16);
}

/// Reads element `index` of an array of the given type.
template <int kType>
__device__ __forceinline__ float load_element(const void* base, int64_t index) {
  if constexpr (kType == kF32) return static_cast<const float*>(base)[index];
  if constexpr (kType == kBf16) return f32_from_bf16(static_cast<const uint16_t*>(base)[index]);
  return ptx::cvt_f32_f16(static_cast<const uint16_t*>(base)[index]);
}

/// Widens two 16-bit elements packed in a word.
template <int kType>
__device__ __forceinline__ void unpack_pair(float& low, float& high, uint32_t word) {
  if constexpr (kType == kBf16) {
    low = f32_from_bf16(word & 0xffffu);
    high = __uint_as_float(word & 0xffff0000u);
  } else {
    low = ptx::cvt_f32_f16(word & 0xffffu);
    high = ptx::cvt_f32_f16(word >> 16);
  }
}

/// Rounds two values to 16-bit elements of the given type, `low` in bits 0-15.
template <int kType>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (kType == kBf16) return ptx::cvt_bf16x2_f32(low, high);
  return ptx::cvt_f16x2_f32(low, high);
}

/// Writes eight elements from `index` on, rounded to nearest even.
template <int kType>
__device__ __forceinline__ void store_8(void* base, int64_t index, const float (&x)[8]) {
  if constexpr (kType == kF32) {
    float4* p = reinterpret_cast<float4*>(static_cast<float*>(base) + index);
    p[0] = make_float4(x[0], x[1], x[2], x[3]);
    p[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else if constexpr (kType == kE4m3) {
    uint2 v;
    v.x = e4m3x2_from_f32(x[0], x[1]) | (e4m3x2_from_f32(x[2], x[3]) << 16);
    v.y = e4m3x2_from_f32(x[4], x[5]) | (e4m3x2_from_f32(x[6], x[7]) << 16);
    *reinterpret_cast<uint2*>(static_cast<uint8_t*>(base) + index) = v;
  } else {
    uint4 v;
    v.x = pack_pair<kType>(x[0], x[1]);
    v.y = pack_pair<kType>(x[2], x[3]);
    v.z = pack_pair<kType>(x[4], x[5]);
    v.w = pack_pair<kType>(x[6], x[7]);
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(base) + index) = v;
  }
}

/// Largest value over the 16 lanes that share a 128-element block.
__device__ __forceinline__ float half_warp_max(float v) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    v = fmaxf(v, __shfl_xor_sync(kFullMask, v, offset));
  }
  return v;
}

}  // namespace cumoe
