// The numbers that a token's experts are chosen by, and what they are made of: logits, softmax, sigmoids.
//
// From -D   METHOD NUM_EXPERTS TOP_K NUM_GROUPS TOP_GROUPS NUM_SHARED_EXPERTS LOGITS_TYPE BIAS_TYPE
//           (-1: none) BIAS_ROUND_BF16 WEIGHTS_TYPE NORMALIZE
#pragma once

#include "exact.cuh"
#include "vec.cuh"

namespace cumoe {

enum Method : int {
  kDefault = 0,
  kRenormalize = 1,  // renormalize_naive, too
  kDeepSeekV3 = 2,
  kLlama4 = 3,
  kTopK = 5,
  kSigmoidRenorm = 6,
  kMiniMax2 = 7,
  kSigmoid = 8,
  kTopKSigmoid = 9,
};

constexpr int kPerLane = ceil_div(NUM_EXPERTS, kWarpSize);
constexpr int kColumns = TOP_K + NUM_SHARED_EXPERTS;
constexpr int kGroupSize = NUM_EXPERTS / NUM_GROUPS;
constexpr bool kBiased = METHOD == kDeepSeekV3 || METHOD == kMiniMax2;
constexpr bool kHasBias = kBiased && BIAS_TYPE >= 0;
constexpr bool kKeyIsSigmoid = kBiased || METHOD == kSigmoidRenorm || METHOD == kSigmoid;

static_assert(TOP_K >= 1 && TOP_K <= kWarpSize, "lane k holds column k");
static_assert(NUM_EXPERTS % NUM_GROUPS == 0, "groups have equal size");
static_assert(TOP_GROUPS * kGroupSize >= TOP_K, "the picked groups must hold top_k experts");

/// Reads this lane's part of a row of NUM_EXPERTS elements; `past` for what is not in it.
template <int TYPE>
__device__ __forceinline__ void load_lane(float (&x)[kPerLane], const void* base, int64_t row,
                                          int lane, float past) {
  constexpr int kBytes = 4 * kTypeBytes<TYPE>;
  if constexpr (NUM_EXPERTS % 4 == 0 && kPerLane % 4 == 0) {
    const char* source = static_cast<const char*>(base) + row * kTypeBytes<TYPE>;
    if (reinterpret_cast<uint64_t>(source) % kBytes == 0) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += 4) {
        const int expert = lane * kPerLane + i;
        if (expert >= NUM_EXPERTS) {
          x[i] = x[i + 1] = x[i + 2] = x[i + 3] = past;
        } else if constexpr (TYPE == kF32) {
          const float4 v = *reinterpret_cast<const float4*>(source + expert * 4);
          x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        } else {
          const uint2 v = *reinterpret_cast<const uint2*>(source + expert * 2);
          unpack_pair<TYPE>(x[i], x[i + 1], v.x);
          unpack_pair<TYPE>(x[i + 2], x[i + 3], v.y);
        }
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane * kPerLane + i;
    x[i] = expert < NUM_EXPERTS ? load_element<TYPE>(base, row + expert) : past;
  }
}

/// A number, -inf if it is none.
__device__ __forceinline__ float not_nan(float x) { return fmaxf(x, -INFINITY); }

__device__ __forceinline__ float load_logit(const void* logits, int64_t index) {
  return not_nan(load_element<LOGITS_TYPE>(logits, index));
}

/// Numbers of a lane on which an operation is done before the next; so many hide what each takes.
constexpr int kBatch = kPerLane <= 16 ? kPerLane : 8;

/// Sum of a row's softmax terms in the order of warp_sum: lane l adds experts l, l + 32, ... With infinity
/// for the maximum, each infinite logit has term 1 and the others 0.
template <bool INFINITE>
__device__ __forceinline__ float sum_of_terms(const void* logits, int64_t row, float row_max,
                                              int lane) {
  float sum = 0.0f;
#pragma unroll 1
  for (int first = 0; first < kPerLane; first += kBatch) {
    float x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int expert = (first + i) * kWarpSize + lane;
      const bool inside = NUM_EXPERTS % (kBatch * kWarpSize) == 0 || expert < NUM_EXPERTS;
      x[i] = inside ? load_element<LOGITS_TYPE>(logits, row + expert) : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      x[i] = INFINITE ? (x[i] == INFINITY ? 1.0f : 0.0f) : __fsub_rn(x[i], row_max);
    }
    if constexpr (!INFINITE) exp_of_difference(x);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum = __fadd_rn(sum, x[i]);
  }
  return warp_sum(sum);
}

/// Maximum of a row, of which `x` is any lane's part, and the sum of its softmax terms. The sum is at
/// least 1, which it is by itself but for a row of -inf.
__device__ __forceinline__ void softmax_sum(float& row_max, float& row_sum,
                                            const float (&x)[kPerLane], const void* logits,
                                            int64_t row, int lane) {
  float own = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) own = fmaxf(own, x[i]);
  row_max = value_of_image(__reduce_max_sync(kFullMask, order_image(own)));
  row_sum = row_max == INFINITY ? sum_of_terms<true>(logits, row, row_max, lane)
                                : sum_of_terms<false>(logits, row, row_max, lane);
  row_sum = fmaxf(row_sum, 1.0f);
}

/// det_sigmoid of each number.
template <int N>
__device__ __forceinline__ void sigmoids(float (&x)[N]) {
#pragma unroll
  for (int first = 0; first < N; first += kBatch) {
    float batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) batch[i] = x[min(first + i, N - 1)];
    det_sigmoid(batch);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < N) x[first + i] = batch[i];
    }
  }
}

/// The sum of a sigmoid and a bias.
__device__ __forceinline__ float biased(float score, float bias) {
  if constexpr (BIAS_ROUND_BF16) bias = f32_from_bf16(ptx::cvt_bf16x2_f32(bias, bias) & 0xffffu);
  return not_nan(__fadd_rn(score, bias));
}

}  // namespace cumoe
