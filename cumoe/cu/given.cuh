// Experts and weights as the caller gives them, for one warp's run of tokens.
//
// From -D   PACKED WEIGHTS_IN WEIGHTS_TYPE
#pragma once

#include "experts.cuh"
#include "vec.cuh"

namespace cumoe {

/// Calls emit(token, column, id, weight) for each slot of tokens begin .. end - 1, shared experts
/// appended. PACKED: one word a slot, id << 16 | bf16 bits.
template <int WARPS, class P, class Emit>
__device__ __forceinline__ void run_slots(const P& p, int begin, int end, int lane, Emit&& emit) {
  const Divisor columns(p.columns);
#pragma unroll 1
  for (int slot = begin * p.columns + lane; slot < end * p.columns; slot += kWarpSize) {
    const int token = token_of_slot(slot, columns);
    const int column = slot - token * p.columns;
    int32_t id = p.experts.num_experts + column - p.top_k;
    float weight = 1.0f;
    if (column < p.top_k) {
      const int source = token * p.top_k + column;
      const int32_t word = p.ids_in[source];
      id = PACKED ? word >> 16 : word;
      // A given id must not reach the shared experts, which have columns of their own.
      if (p.top_k < p.columns && id >= p.experts.num_experts) id = -1;
      if constexpr (PACKED) {
        weight = f32_from_bf16(static_cast<uint32_t>(word) & 0xffffu);
      } else if (p.ids != nullptr) {
        weight = load_element<WEIGHTS_IN>(p.weights_in, source);
      }
    }
    emit(token, column, id, weight);
  }
}

/// Writes a slot's id and weight, unless those given will do.
template <class P>
__device__ __forceinline__ void write_slot(const P& p, int64_t token, int column, int id,
                                           float weight) {
  if (p.ids == nullptr) return;
  const int64_t slot = token * p.columns + column;
  p.ids[slot] = id;
  if constexpr (WEIGHTS_TYPE == kBf16) {
    static_cast<uint16_t*>(p.weights)[slot] = ptx::cvt_bf16x2_f32(weight, weight) & 0xffffu;
  } else {
    static_cast<float*>(p.weights)[slot] = weight;
  }
}

}  // namespace cumoe
