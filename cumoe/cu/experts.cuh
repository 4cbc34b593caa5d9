// Which local expert a slot or a row belongs to.
#pragma once

#include "types.cuh"

namespace cumoe {

struct ExpertRange {
  int32_t num_experts;  // routed experts over all ranks; shared expert j has id num_experts + j
  int32_t num_shared;
  int32_t expert_offset;       // first routed expert held here
  int32_t num_local_routed;    // routed experts held here; shared expert j follows at this + j
  int32_t shared_token_start;  // tokens whose shared experts are evaluated here
  int32_t shared_token_stop;

  /// Local expert of global id `id` for a token, or -1 when it is not evaluated here.
  __device__ __forceinline__ int local(int id, int token) const {
    const int routed = id - expert_offset;
    if (id < num_experts) return id >= 0 && routed >= 0 && routed < num_local_routed ? routed : -1;
    const int shared = id - num_experts;
    const bool mine = token >= shared_token_start && token < shared_token_stop;
    return shared < num_shared && mine ? num_local_routed + shared : -1;
  }
};

/// Expert whose segment holds `row`: the last e < count with offsets[e] <= row.
__device__ __forceinline__ int expert_of_row(const int32_t* offsets, int count, int64_t row) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

constexpr int kChunkSlots = 512;  // slots one warp ranks

}  // namespace cumoe
