// The largest of a warp's many numbers: those that can be among them are few, and listed in shared memory.
//
// Lane l holds the numbers l, l + 32, ... Below a bound none can be one of the COUNT largest; what is not
// below it, as a rule a little more than COUNT, is ranked by counting.
// A number is a word here: its order image (exact.cuh) above the complement of its index. So all words are
// different, equal numbers go by ascending index, and 0 is none.
#pragma once

#include "exact.cuh"
#include "topk.cuh"

namespace cumoe {

constexpr int kListed = 2 * kWarpSize;  // words of a warp's list, which is aligned to 16 bytes

__device__ __forceinline__ uint64_t word_of(uint32_t image, int index) {
  return static_cast<uint64_t>(image) << 32 | static_cast<uint32_t>(~index);
}

__device__ __forceinline__ Ranked ranked_of(uint64_t word) {
  return {static_cast<uint32_t>(word >> 32), ~static_cast<int>(static_cast<uint32_t>(word))};
}

/// A number that at least COUNT of the warp's are not below, as few more as is found fast; NaN counts as -inf.
///
/// A lane's numbers are some groups, and as many numbers as groups have a maximum of no less than the
/// bound are themselves no less. It is found by bisection between the least and the largest maximum.
template <int COUNT, int N>
__device__ __forceinline__ float bound_of_largest(const float (&x)[N]) {
  constexpr int kGroups = 4;
  constexpr int kMore = COUNT / 8;  // groups above the bound that may be too many
  static_assert(N > kGroups && COUNT <= kGroups * kWarpSize, "every group has a number");
  float largest[kGroups];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    largest[i % kGroups] = i < kGroups ? x[i] : fmaxf(largest[i % kGroups], x[i]);
  }
  uint32_t image[kGroups], least = ~0u, most = 0;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    image[j] = order_image(largest[j]);
    least = min(least, image[j]);
    most = max(most, image[j]);
  }
  uint32_t low = __reduce_min_sync(kFullMask, least), high = __reduce_max_sync(kFullMask, most);
#pragma unroll 1
  while (low < high) {
    const uint32_t middle = high - (high - low) / 2;
    int own = 0;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) own += image[j] >= middle ? 1 : 0;
    const int groups = __reduce_add_sync(kFullMask, own);
    if (groups < COUNT) {
      high = middle - 1;
    } else {
      low = middle;
      if (groups <= COUNT + kMore) break;
    }
  }
  return value_of_image(low);
}

/// How many words of a list of `held` are larger than each of `own`.
template <int OWN>
__device__ __forceinline__ void count_larger(int (&larger)[OWN], const uint64_t (&own)[OWN],
                                             const uint64_t* list, int held) {
  const ulonglong2* pairs = reinterpret_cast<const ulonglong2*>(list);
#pragma unroll
  for (int j = 0; j < OWN; ++j) larger[j] = 0;
#pragma unroll 1
  for (int i = 0; i < held; i += 4) {
    const ulonglong2 a = pairs[i / 2], b = pairs[i / 2 + 1];
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      const int of_a = (a.x > own[j] ? 1 : 0) + (a.y > own[j] ? 1 : 0);
      const int of_b = (b.x > own[j] ? 1 : 0) + (b.y > own[j] ? 1 : 0);
      larger[j] += of_a + of_b;
    }
  }
}

/// Sorts a list of `held` words in descending order and drops all but the first COUNT; what is not used
/// of it is 0 before and after.
template <int COUNT>
__device__ __forceinline__ void sort_list(uint64_t* list, int held, int lane) {
  uint64_t own[2] = {list[lane], list[kWarpSize + lane]};
  int rank[2] = {COUNT, COUNT};
  if (held <= kWarpSize) {
    const uint64_t one[1] = {own[0]};
    int larger[1];
    count_larger(larger, one, list, held);
    rank[0] = larger[0];
  } else {
    count_larger(rank, own, list, held);
  }
  __syncwarp();
  list[lane] = list[kWarpSize + lane] = 0;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (own[j] != 0 && rank[j] < COUNT) list[rank[j]] = own[j];
  }
  __syncwarp();
}

/// The word of rank k, in lane k < COUNT, of those of the candidates: lane l's number 32 * i + l is one if
/// bit i of `candidates` is set, and its word is word_at(index). There are at least COUNT.
template <int COUNT, int N, class WordAt>
__device__ __forceinline__ uint64_t largest_of_candidates(
    const uint32_t (&candidates)[ceil_div(N, 32)], uint64_t* list, int lane, WordAt&& word_at) {
  constexpr int kWords = ceil_div(N, 32);
  int own = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) own += __popc(candidates[w]);
  int through = own;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int left = __shfl_up_sync(kFullMask, through, offset);
    if (lane >= offset) through += left;
  }
  int held = __shfl_sync(kFullMask, through, kWarpSize - 1);
  if (held <= kListed) {
    // The indices of all, in any order, and then each lane's words in their places.
    int at = through - own;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll 1
      for (uint32_t left = candidates[w]; left != 0; left &= left - 1) {
        list[at++] = static_cast<uint64_t>((32 * w + __ffs(left) - 1) * kWarpSize + lane);
      }
    }
    __syncwarp();
    constexpr bool kRarelyTwo = COUNT <= 24;  // words of a lane
#pragma unroll
    for (int j = 0; j < kListed; j += kWarpSize) {
      uint64_t word = 0;
      if (j == 0 || !kRarelyTwo || held > j) {
        const bool inside = j + lane < held;
        word = word_at(inside ? static_cast<int>(list[j + lane]) : 0);
        if (!inside) word = 0;
      }
      list[j + lane] = word;
    }
  } else {
    // Many, perhaps all of them equal: 32 indices at a time, of which only those count that are larger than
    // the COUNT-th of the earlier ones.
    list[lane] = list[kWarpSize + lane] = 0;
    uint64_t bar = 0;
    held = 0;
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < N; ++i) {
      uint32_t mine = candidates[0];
#pragma unroll
      for (int w = 1; w < kWords; ++w) {
        if (i >= 32 * w) mine = candidates[w];
      }
      const bool candidate = mine >> (i % 32) & 1;
      if (!__any_sync(kFullMask, candidate)) continue;
      const uint64_t word = candidate ? word_at(i * kWarpSize + lane) : 0;
      const unsigned lanes = __ballot_sync(kFullMask, word > bar);
      if (word > bar) list[held + __popc(lanes & ((1u << lane) - 1u))] = word;
      held += __popc(lanes);
      __syncwarp();
      if (held > kWarpSize) {
        sort_list<COUNT>(list, held, lane);
        bar = list[COUNT - 1];
        held = COUNT;
      }
    }
  }
  __syncwarp();
  sort_list<COUNT>(list, held, lane);
  const uint64_t word = list[lane];
  __syncwarp();
  return word;
}

}  // namespace cumoe
