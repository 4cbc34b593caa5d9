// The largest of a warp's numbers, kept in registers: lane l holds the neighbours l * N .. l * N + N - 1.
// Numbers are order images (exact.cuh); 0 is none. Equal ones go by ascending index.
#pragma once

#include "types.cuh"

namespace cumoe {

/// One pass of sort_descending: neighbours at a distance of STEP, within blocks of 2 * SORTED.
template <int SORTED, int STEP, int N>
__device__ __forceinline__ void sort_pass(uint32_t (&v)[N]) {
  constexpr int kBegin = STEP % SORTED;
#pragma unroll
  for (int i = kBegin; i + STEP < N; ++i) {
    if ((i - kBegin) % (2 * STEP) < STEP && i / (2 * SORTED) == (i + STEP) / (2 * SORTED)) {
      const uint32_t larger = max(v[i], v[i + STEP]);
      v[i + STEP] = min(v[i], v[i + STEP]);
      v[i] = larger;
    }
  }
  if constexpr (STEP > 1) sort_pass<SORTED, STEP / 2>(v);
}

/// Sorts in descending order by Batcher's odd-even merges. What is not read of the result costs nothing.
template <int SORTED = 1, int N>
__device__ __forceinline__ void sort_descending(uint32_t (&v)[N]) {
  if constexpr (SORTED < N) {
    sort_pass<SORTED, SORTED>(v);
    sort_descending<2 * SORTED>(v);
  }
}

/// Whether this lane is the first of those for which `holds`; `lanes` becomes all of them.
__device__ __forceinline__ bool first_lane(bool holds, int lane, unsigned& lanes) {
  lanes = __ballot_sync(kFullMask, holds);
  return holds && (lanes & ((1u << lane) - 1u)) == 0;
}

/// A number and where it is.
struct Ranked {
  uint32_t image;
  int index;
};

/// The number of rank k, in lane k < COUNT. `sorted` is each lane's `image` in descending order, or zeros
/// in a lane that takes no part; it is used up. There are at least COUNT numbers.
template <int COUNT, int N>
__device__ __forceinline__ Ranked warp_top(const uint32_t (&image)[N], uint32_t (&sorted)[N],
                                           int lane) {
  constexpr int kDepth =
      N < COUNT ? N : COUNT;  // further numbers of a lane cannot be among the ranks
  constexpr int kUnroll = COUNT * kDepth <= 512 ? COUNT : 1;
  uint32_t mine = 0;
  unsigned holders = 1;
#pragma unroll kUnroll
  for (int k = 0; k < COUNT; ++k) {
    const uint32_t best = __reduce_max_sync(kFullMask, sorted[0]);
    unsigned lanes;
    const bool taken = first_lane(sorted[0] == best, lane, lanes);
    if (lane == k) mine = best, holders = lanes;
    if (taken) {
#pragma unroll
      for (int i = 0; i + 1 < kDepth; ++i) sorted[i] = sorted[i + 1];
      sorted[kDepth - 1] = 0;
    }
  }

  // Of equal numbers of one lane, the earlier ranks have the earlier ones.
  const int owner = __ffs(holders) - 1;
  const uint32_t image_before = __shfl_up_sync(kFullMask, mine, 1);
  const int owner_before = __shfl_up_sync(kFullMask, owner, 1);
  const bool again = lane > 0 && image_before == mine && owner_before == owner;
  const unsigned repeats = __ballot_sync(kFullMask, again);
  int skip = __clz(static_cast<int>(~(repeats << (31 - lane))));
  constexpr int kWords = ceil_div(N, 32);
  uint32_t equal[kWords] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (__shfl_sync(kFullMask, image[i], owner) == mine) equal[i / 32] |= 1u << (i % 32);
  }
  int index = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    for (; skip > 0 && equal[w] != 0; --skip) equal[w] &= equal[w] - 1;
    if (equal[w] != 0) {
      index = 32 * w + __ffs(equal[w]) - 1;
      break;
    }
  }
  return {mine, owner * N + index};
}

}  // namespace cumoe
