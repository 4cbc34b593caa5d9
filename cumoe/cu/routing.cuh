// One token's experts and weights from its logits, by one warp, for all routing methods.
//
// Lane l holds the neighbouring experts l * kPerLane .. l * kPerLane + kPerLane - 1, so that equal keys go
// to the lower lane as to the lower id, and an expert group is as a rule some whole lanes. Of many experts
// it holds l, l + 32, ..., and only those near the largest keys are looked at closely (kByList).
// A key's order image (exact.cuh) decides; experts outside the picked groups have image 0 and are never
// chosen. Images, sums and weights are computed with separately rounded operations, so the NumPy
// twin gives the same bits.
//
// From -D   METHOD NUM_EXPERTS TOP_K NUM_GROUPS TOP_GROUPS NUM_SHARED_EXPERTS LOGITS_TYPE BIAS_TYPE
//           (-1: none) BIAS_ROUND_BF16 WEIGHTS_TYPE NORMALIZE
#pragma once

#include "exact.cuh"
#include "listed.cuh"
#include "topk.cuh"
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

/// Lanes of an expert group, if all groups are 2^n whole lanes, else 0.
constexpr int kGroupLanes =
    kGroupSize % kPerLane == 0 && ((kGroupSize / kPerLane) & (kGroupSize / kPerLane - 1)) == 0
        ? kGroupSize / kPerLane
        : 0;
/// Otherwise lane l holds the scores of groups l * kGroupSlots and on; its own if a lane is whole groups.
constexpr bool kOwnGroups = kPerLane % kGroupSize == 0;
constexpr int kGroupSlots = kOwnGroups ? kPerLane / kGroupSize : ceil_div(NUM_GROUPS, kWarpSize);

/// Whether the experts that can be chosen are listed (listed.cuh), rather than all of them sorted.
constexpr bool kByList = NUM_GROUPS == 1 && kPerLane * TOP_K > 128;

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

/// Image of a group's score, the sum of its two largest keys.
__device__ __forceinline__ uint32_t score_image(uint32_t first, uint32_t second) {
  return order_image(__fadd_rn(value_of_image(first), value_of_image(second)));
}

__device__ __forceinline__ void insert_top_two(uint32_t& first, uint32_t& second, uint32_t image) {
  second = max(second, min(first, image));
  first = max(first, image);
}

/// Leaves nothing of the lanes outside the TOP_GROUPS best groups; a group is kGroupLanes lanes.
__device__ __forceinline__ void keep_lanes_of_best_groups(uint32_t (&sorted)[kPerLane], int lane) {
  uint32_t first = sorted[0], second = kPerLane > 1 ? sorted[kPerLane > 1 ? 1 : 0] : 0;
#pragma unroll
  for (int offset = 1; offset < kGroupLanes; offset *= 2) {
    const uint32_t other_first = __shfl_xor_sync(kFullMask, first, offset);
    const uint32_t other_second = __shfl_xor_sync(kFullMask, second, offset);
    second = max(min(first, other_first), max(second, other_second));
    first = max(first, other_first);
  }
  const uint32_t score = score_image(first, second);
  constexpr int kLanes = kGroupLanes > 0 ? kGroupLanes : 1;
  int better =
      0;  // groups before this one in the order of scores, of which each of its lanes sees a part
#pragma unroll
  for (int first = 0; first < NUM_GROUPS; first += kLanes) {
    const int group = first + lane % kLanes;
    const uint32_t other = __shfl_sync(kFullMask, score, group * kLanes);
    const bool inside = NUM_GROUPS % kLanes == 0 || group < NUM_GROUPS;
    better += inside && other + (group < lane / kLanes ? 1u : 0u) > score ? 1 : 0;
  }
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    better += __shfl_xor_sync(kFullMask, better, offset);
  }
  if (better >= TOP_GROUPS) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sorted[i] = 0;
  }
}

/// Sets the image of every expert outside the TOP_GROUPS best groups to 0, for groups of any size.
__device__ __forceinline__ void keep_best_groups(uint32_t (&image)[kPerLane], int lane) {
  uint32_t score[kGroupSlots] = {};
  if constexpr (kOwnGroups) {
#pragma unroll
    for (int slot = 0; slot < kGroupSlots; ++slot) {
      uint32_t first = 0, second = 0;
#pragma unroll
      for (int i = 0; i < kGroupSize; ++i) {
        insert_top_two(first, second, image[slot * kGroupSize + i]);
      }
      if (lane * kGroupSlots + slot < NUM_GROUPS) score[slot] = score_image(first, second);
    }
  } else {
#pragma unroll 1
    for (int group = 0; group < NUM_GROUPS; ++group) {
      uint32_t first = 0, second = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const unsigned member = static_cast<unsigned>(lane * kPerLane + i - group * kGroupSize);
        if (member < kGroupSize) insert_top_two(first, second, image[i]);
      }
      const uint32_t best = __reduce_max_sync(kFullMask, first);
      unsigned lanes;
      const bool owner = first_lane(first == best, lane, lanes);
      const uint32_t next = __reduce_max_sync(kFullMask, owner ? second : first);
#pragma unroll
      for (int slot = 0; slot < kGroupSlots; ++slot) {
        if (lane * kGroupSlots + slot == group) score[slot] = score_image(best, next);
      }
    }
  }
  // A picked group is marked by score 0, which no score has.
#pragma unroll 1
  for (int pick = 0; pick < TOP_GROUPS; ++pick) {
    uint32_t own = 0;
#pragma unroll
    for (int slot = 0; slot < kGroupSlots; ++slot) own = max(own, score[slot]);
    const uint32_t best = __reduce_max_sync(kFullMask, own);
    unsigned lanes;
    bool mine = first_lane(own == best, lane, lanes);
#pragma unroll
    for (int slot = 0; slot < kGroupSlots; ++slot) {
      if (mine && score[slot] == best) score[slot] = 0, mine = false;
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    uint32_t mark = 0;
    if constexpr (kOwnGroups) {
      mark = score[i / kGroupSize];
    } else {
      const int group = min(lane * kPerLane + i, NUM_EXPERTS - 1) / kGroupSize;
#pragma unroll
      for (int slot = 0; slot < kGroupSlots; ++slot) {
        const uint32_t held = __shfl_sync(kFullMask, score[slot], group / kGroupSlots);
        if (group % kGroupSlots == slot) mark = held;
      }
    }
    if (mark != 0) image[i] = 0;
  }
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

/// What is chosen in a lane.
struct Selected {
  uint32_t image;  // of the key
  int index;
  float score;  // sigmoid of the logit, if there are biases
};

/// What has rank k, in lane k < TOP_K, with all experts sorted.
template <class P>
__device__ __forceinline__ Selected select_by_sort(const P& p, int64_t row, int lane) {
  float x[kPerLane];
  load_lane<LOGITS_TYPE>(x, p.logits, row, lane, -INFINITY);
  [[maybe_unused]] float bias[kPerLane];
  if constexpr (kHasBias) load_lane<(kHasBias ? BIAS_TYPE : kF32)>(bias, p.bias, 0, lane, 0.0f);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = not_nan(x[i]);
  float row_max = 0.0f, row_sum = 0.0f;
  if constexpr (METHOD == kDefault) softmax_sum(row_max, row_sum, x, p.logits, row, lane);
  if constexpr (kKeyIsSigmoid) sigmoids(x);
  uint32_t image[kPerLane], sorted[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    float key = x[i];
    if constexpr (METHOD == kDefault) key = __fdiv_rn(softmax_term(x[i], row_max), row_sum);
    if constexpr (kHasBias) key = biased(x[i], bias[i]);
    const bool inside = NUM_EXPERTS % kPerLane == 0 && NUM_EXPERTS / kPerLane == kWarpSize ||
                        lane * kPerLane + i < NUM_EXPERTS;
    image[i] = inside ? order_image_of_number(key) : 0;
  }
  constexpr bool kGrouped = NUM_GROUPS > 1;
  if constexpr (kGrouped && kGroupLanes == 0) keep_best_groups(image, lane);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sorted[i] = image[i];
  sort_descending(sorted);
  if constexpr (kGrouped && kGroupLanes > 0) keep_lanes_of_best_groups(sorted, lane);
  const Ranked ranked = warp_top<TOP_K>(image, sorted, lane);
  Selected selected = {ranked.image, ranked.index, 0.0f};
  if constexpr (kHasBias) {
    const int owner = ranked.index / kPerLane, own = ranked.index % kPerLane;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float score = __shfl_sync(kFullMask, x[i], owner);
      if (own == i) selected.score = score;
    }
  }
  return selected;
}

/// The same with only those listed that can be chosen. `list` is the warp's, of kListed words.
template <class P>
__device__ __forceinline__ Selected select_by_list(const P& p, int64_t row, int lane,
                                                   uint64_t* list) {
  const auto logit_at = [&](int expert) { return load_logit(p.logits, row + expert); };
  const auto key_at = [&](int expert, float score) {
    if constexpr (!kHasBias) return score;
    return biased(score, load_element<(kHasBias ? BIAS_TYPE : kF32)>(p.bias, expert));
  };
  float x[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    x[i] = expert < NUM_EXPERTS ? load_element<LOGITS_TYPE>(p.logits, row + expert) : -INFINITY;
  }
  float row_max = 0.0f, row_sum = 0.0f;
  if constexpr (METHOD == kDefault) {
    softmax_sum(row_max, row_sum, x, p.logits, row, lane);
  } else if constexpr (kKeyIsSigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = not_nan(x[i]);
    sigmoids(x);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      x[i] = key_at(min(i * kWarpSize + lane, NUM_EXPERTS - 1), x[i]);
    }
  }
  float bound = bound_of_largest<TOP_K>(x);
  if constexpr (METHOD == kDefault) {
    // x is the logit. A term is within 1 ulp of its exponential, so the keys of logits 2^-12 apart are in
    // their order and different, if both can be told from 0.
    bound = __fsub_rn(bound, row_max) > -75.0f ? __fsub_rn(bound, 0x1p-12f) : -INFINITY;
  }
  uint32_t candidates[ceil_div(kPerLane, 32)] = {};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (!(x[i] < bound)) candidates[i / 32] |= 1u << (i % 32);  // NaN, too
  }
  constexpr int kLast = kPerLane - 1;
  if ((NUM_EXPERTS % kWarpSize != 0) && kLast * kWarpSize + lane >= NUM_EXPERTS) {
    candidates[kLast / 32] &= ~(1u << (kLast % 32));
  }
  const auto word_at = [&](int expert) {
    float key = logit_at(expert);
    if constexpr (METHOD == kDefault) key = __fdiv_rn(softmax_term(key, row_max), row_sum);
    if constexpr (kKeyIsSigmoid) key = key_at(expert, det_sigmoid(key));
    return word_of(order_image_of_number(key), expert);
  };
  const Ranked ranked =
      ranked_of(largest_of_candidates<TOP_K, kPerLane>(candidates, list, lane, word_at));
  Selected selected = {ranked.image, ranked.index, 0.0f};
  if constexpr (kHasBias) {
    selected.score = det_sigmoid(lane < TOP_K ? logit_at(ranked.index) : 0.0f);
  }
  return selected;
}

/// Routes a token: calls emit(column, id, weight) in the lane of each column. A block has at most WARPS.
template <int WARPS, class P, class Emit>
__device__ __forceinline__ void token_columns(const P& p, int64_t token, int lane, Emit&& emit) {
  const int64_t row = token * NUM_EXPERTS;
  Selected selected;
  if constexpr (kByList) {
    __shared__ ulonglong2 lists[WARPS][kListed / 2];
    uint64_t* list = reinterpret_cast<uint64_t*>(lists[warp_of_block()]);
    selected = select_by_list(p, row, lane, list);
  } else {
    selected = select_by_sort(p, row, lane);
  }

  // Lane k has column k.
  const float key = value_of_image(selected.image);
  float weight = key;  // the logit itself, or the weight that it was the key of
  if constexpr (kHasBias) {
    weight = selected.score;
  } else if constexpr (METHOD == kRenormalize) {
    weight = softmax_term(key, __shfl_sync(kFullMask, key, 0));
  } else if constexpr (METHOD == kLlama4 || METHOD == kTopKSigmoid) {
    weight = det_sigmoid(key);
  }
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) sum = __fadd_rn(sum, __shfl_sync(kFullMask, weight, k));
  if constexpr (kBiased) {
    weight = __fdiv_rn(__fmul_rn(weight, p.scaling_factor), __fadd_rn(sum, 1e-20f));
  } else {
    if constexpr (METHOD == kRenormalize) weight = sum > 0.0f ? __fdiv_rn(weight, sum) : 0.0f;
    if constexpr (METHOD == kSigmoidRenorm && NORMALIZE) {
      weight = __fdiv_rn(weight, fmaxf(sum, 1e-20f));
    }
    if (p.scaling_factor != 1.0f) weight = __fmul_rn(weight, p.scaling_factor);
  }

  // Shared experts follow the routed columns with weight 1.
#pragma unroll
  for (int first = 0; first < kColumns; first += kWarpSize) {
    const int column = first + lane;
    if (column < TOP_K) {
      emit(column, selected.index, weight);
    } else if (column < kColumns) {
      emit(column, NUM_EXPERTS + column - TOP_K, 1.0f);
    }
  }
}

/// Writes a slot's id and weight, and its replay.
template <class P>
__device__ __forceinline__ void write_slot(const P& p, int64_t token, int column, int id,
                                           float weight) {
  const int64_t slot = token * kColumns + column;
  p.ids[slot] = id;
  if constexpr (WEIGHTS_TYPE == kBf16) {
    static_cast<uint16_t*>(p.weights)[slot] = ptx::cvt_bf16x2_f32(weight, weight) & 0xffffu;
  } else {
    static_cast<float*>(p.weights)[slot] = weight;
  }
  if (column < TOP_K && p.replay != nullptr) {
    p.replay[token * TOP_K + column] = static_cast<int16_t>(id);
  }
}

/// Routes tokens begin .. end - 1: calls emit(token, column, id, weight) for each slot.
template <int WARPS, class P, class Emit>
__device__ __forceinline__ void run_slots(const P& p, int begin, int end, int lane, Emit&& emit) {
#pragma unroll 1
  for (int token = begin; token < end; ++token) {
    token_columns<WARPS>(
        p, token, lane, [&](int column, int id, float weight) { emit(token, column, id, weight); });
  }
}

}  // namespace cumoe
