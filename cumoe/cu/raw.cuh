// Neighbouring elements as they lie in memory: loaded in chunks of 16 bytes and widened later, so that a
// kernel can have all its loads under way before it computes. And 16 results a lane, rounded and stored.
#pragma once

#include "vec.cuh"

namespace cumoe {

/// kCount neighbouring elements; a chunk past the last valid one is zeros.
template <int kType, int kCount>
struct Raw {
  static_assert(kType != kE4m3, "16- and 32-bit elements");
  static constexpr int kChunkElems = 16 / kTypeBytes<kType>;
  static constexpr int kChunks = kCount / kChunkElems;
  uint4 chunk[kChunks];

  /// Loads `valid` elements from `index` on, a multiple of 8; the address is aligned to 16 bytes.
  __device__ __forceinline__ void load(const void* base, int64_t index, int valid) {
    const uint4* p = reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(base) +
                                                    index * kTypeBytes<kType>);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      chunk[c] = c * kChunkElems < valid ? p[c] : make_uint4(0, 0, 0, 0);
    }
  }

  /// Largest magnitude; NaN if any value is.
  __device__ __forceinline__ float amax_or_nan() const {
#if __CUDA_ARCH__ >= 890
    if constexpr (kType != kF32) {
      uint32_t largest = chunk[0].x;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const uint32_t words[4] = {chunk[c].x, chunk[c].y, chunk[c].z, chunk[c].w};
#pragma unroll
        for (int i = c == 0; i < 4; ++i) {
          largest = kType == kBf16 ? ptx::absmax_nan_bf16x2(largest, words[i])
                                   : ptx::absmax_nan_f16x2(largest, words[i]);
        }
      }
      float low, high;
      unpack_pair<kType>(low, high, largest);
      return ptx::max_nan_f32(fabsf(low), fabsf(high));
    }
#endif
    float x[kCount], amax = 0.0f;
    widen(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) amax = ptx::max_nan_f32(amax, fabsf(x[i]));
    return amax;
  }

  __device__ __forceinline__ void widen(float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 8) {
      const uint4& v = chunk[i / kChunkElems];
      if constexpr (kType == kF32) {
        const uint4& w = chunk[i / kChunkElems + 1];
        x[i] = __uint_as_float(v.x), x[i + 1] = __uint_as_float(v.y);
        x[i + 2] = __uint_as_float(v.z), x[i + 3] = __uint_as_float(v.w);
        x[i + 4] = __uint_as_float(w.x), x[i + 5] = __uint_as_float(w.y);
        x[i + 6] = __uint_as_float(w.z), x[i + 7] = __uint_as_float(w.w);
      } else {
        unpack_pair<kType>(x[i], x[i + 1], v.x), unpack_pair<kType>(x[i + 2], x[i + 3], v.y);
        unpack_pair<kType>(x[i + 4], x[i + 5], v.z), unpack_pair<kType>(x[i + 6], x[i + 7], v.w);
      }
    }
  }
};

/// Largest magnitude, NaN left out.
template <int kCount>
__device__ __forceinline__ float amax_of(const float (&x)[kCount]) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) amax = fmaxf(amax, fabsf(x[i]));
  return amax;
}

/// Largest value over kLanes neighbouring lanes, a power of two.
template <int kLanes>
__device__ __forceinline__ float lanes_max(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    v = fmaxf(v, __shfl_xor_sync(kFullMask, v, offset));
  }
  return v;
}

/// Rounds 16 values to e4m3.
__device__ __forceinline__ uint4 e4m3x16_from_f32(const float (&y)[16]) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i] = e4m3x2_from_f32(y[4 * i], y[4 * i + 1]) | e4m3x2_from_f32(y[4 * i + 2], y[4 * i + 3])
                                                         << 16;
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

/// Stores the first `valid` of 16 bytes: 0, 8 or 16. The address is aligned to 16 with `aligned`, else to 8.
__device__ __forceinline__ void store_bytes_16(uint8_t* to, const uint4& v, int valid,
                                               bool aligned) {
  if (aligned && valid == 16) {
    *reinterpret_cast<uint4*>(to) = v;
    return;
  }
  if (valid > 0) *reinterpret_cast<uint2*>(to) = make_uint2(v.x, v.y);
  if (valid > 8) *reinterpret_cast<uint2*>(to + 8) = make_uint2(v.z, v.w);
}

/// The rows of a result that one row goes to: itself or, with kPermuted, those of a permutation that are its own.
template <bool kPermuted>
class Destinations {
 public:
  /// Of a row with `slots` in permuted_idx, or of none with 0: loads the first, before it is needed.
  __device__ __forceinline__ void begin(const int32_t* permuted_idx, int64_t row, int slots) {
    index_ = permuted_idx + row * slots, slots_ = slots;
    first_ = slots > 0 ? index_[0] : -1;
  }

  /// Calls `store` for each row.
  template <typename Store>
  __device__ __forceinline__ void each(const Store& store) const {
    int64_t row = first_;
    for (int slot = 1;; ++slot) {
      if (row >= 0) store(row);
      if (slot >= slots_) return;
      row = index_[slot];
    }
  }

 private:
  const int32_t* index_;
  int slots_, first_;
};

template <>
class Destinations<false> {
 public:
  __device__ __forceinline__ void begin(const int32_t*, int64_t row, int) { row_ = row; }

  template <typename Store>
  __device__ __forceinline__ void each(const Store& store) const {
    store(row_);
  }

 private:
  int64_t row_;
};

/// Valid elements among 16 from `column` on.
__device__ __forceinline__ int valid_of_16(int64_t column, int64_t num_columns) {
  return column + 8 < num_columns ? 16 : column < num_columns ? 8 : 0;
}

/// Largest of the partial maxima that tensor_amax wrote, the same for all threads of a block.
__device__ __forceinline__ float max_of_partials(const float* partials, int count) {
  __shared__ float warp_amax[32];
  float amax = 0.0f;
  for (int i = threadIdx.x; i < count; i += blockDim.x) amax = fmaxf(amax, partials[i]);
  amax = lanes_max<kWarpSize>(amax);
  if (threadIdx.x % kWarpSize == 0) warp_amax[threadIdx.x / kWarpSize] = amax;
  __syncthreads();
  for (int i = 0; i < blockDim.x / kWarpSize; ++i) amax = fmaxf(amax, warp_amax[i]);
  return amax;
}

}  // namespace cumoe
