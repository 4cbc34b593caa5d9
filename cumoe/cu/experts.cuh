// Which local expert a slot belongs to.
#pragma once

#include "divisor.cuh"

namespace cumoe {

struct ExpertRange {
  int32_t num_experts;  // routed experts over all ranks; shared expert j has id num_experts + j
  int32_t num_shared;
  int32_t expert_offset;       // first routed expert held here
  int32_t num_local_routed;    // routed experts held here; shared expert j follows at this + j
  int32_t shared_token_start;  // tokens whose shared experts are evaluated here
  int32_t shared_token_stop;

  /// Experts evaluated here, shared ones included.
  __device__ __forceinline__ int num_local() const { return num_local_routed + num_shared; }

  /// Local expert of global id `id` for a token, or -1 when it is not evaluated here.
  __device__ __forceinline__ int local(int id, int token) const {
    const int routed = id - expert_offset;
    if (id < num_experts) return id >= 0 && routed >= 0 && routed < num_local_routed ? routed : -1;
    const int shared = id - num_experts;
    const bool mine = token >= shared_token_start && token < shared_token_stop;
    return shared < num_shared && mine ? num_local_routed + shared : -1;
  }
};

/// Token of a slot, by the columns of a token.
__device__ __forceinline__ int token_of_slot(int slot, const Divisor& columns) {
  return static_cast<int>(columns.divide(slot));
}

}  // namespace cumoe
