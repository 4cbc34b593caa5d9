// One token's experts and weights as the caller gives them, by one warp.
//
// From -D   PACKED WEIGHTS_IN WEIGHTS_TYPE
#pragma once

#include "vec.cuh"

namespace cumoe {

/// Writes ids and weights of a token, shared experts appended, unless p.ids is null, and calls
/// emit(column, id) in the lane of each column. PACKED: one word a slot, id << 16 | bf16 bits.
template <class P, class Emit>
__device__ __forceinline__ void token_columns(const P& p, int64_t token, int lane, Emit&& emit) {
  for (int column = lane; column < p.columns; column += kWarpSize) {
    const int64_t slot = token * p.columns + column;
    int32_t id = p.experts.num_experts + column - p.top_k;
    float weight = 1.0f;
    if (column < p.top_k) {
      const int64_t source = token * p.top_k + column;
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
    if (p.ids != nullptr) {
      p.ids[slot] = id;
      if constexpr (WEIGHTS_TYPE == kBf16) {
        static_cast<uint16_t*>(p.weights)[slot] = ptx::cvt_bf16x2_f32(weight, weight) & 0xffffu;
      } else {
        static_cast<float*>(p.weights)[slot] = weight;
      }
    }
    emit(column, id);
  }
}

}  // namespace cumoe
