// Which groups of experts a token's are chosen from: those with the largest sums of two keys.
//
// Lane l holds the neighbouring experts l * kPerLane .. l * kPerLane + kPerLane - 1.
#pragma once

#include "routing_keys.cuh"
#include "topk.cuh"

namespace cumoe {

/// Lanes of an expert group, if all groups are 2^n whole lanes, else 0.
constexpr int kGroupLanes =
    kGroupSize % kPerLane == 0 && ((kGroupSize / kPerLane) & (kGroupSize / kPerLane - 1)) == 0
        ? kGroupSize / kPerLane
        : 0;
/// Otherwise lane l holds the scores of groups l * kGroupSlots and on; its own if a lane is whole groups.
constexpr bool kOwnGroups = kPerLane % kGroupSize == 0;
constexpr int kGroupSlots = kOwnGroups ? kPerLane / kGroupSize : ceil_div(NUM_GROUPS, kWarpSize);

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

}  // namespace cumoe
