// One token's experts and weights from its logits, by one warp, for all routing methods.
//
// Lane l holds the neighbouring experts l * kPerLane .. l * kPerLane + kPerLane - 1, so that equal keys go
// to the lower lane as to the lower id, and an expert group is as a rule some whole lanes. Of many experts
// it holds l, l + 32, ..., and only those near the largest keys are looked at closely (kByList).
// A key's order image (exact.cuh) decides; experts outside the picked groups have image 0 and are never
// chosen. Images, sums and weights are computed with separately rounded operations, so the NumPy
// twin gives the same bits.
//
// From -D   those of routing_keys.cuh
#pragma once

#include "listed.cuh"
#include "routing_groups.cuh"
#include "warp.cuh"

namespace cumoe {

/// Whether the experts that can be chosen are listed (listed.cuh), rather than all of them sorted.
constexpr bool kByList = NUM_GROUPS == 1 && kPerLane * TOP_K > 128;

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
  if constexpr (kHasBias && kPerLane > 16) {  // too many to keep
    selected.score = det_sigmoid(lane < TOP_K ? load_logit(p.logits, row + ranked.index) : 0.0f);
  } else if constexpr (kHasBias) {
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
      const int expert = i * kWarpSize + lane;
      x[i] = expert < NUM_EXPERTS ? key_at(expert, x[i]) : -INFINITY;
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
