// topk_expand: given routing as plain ids and weights, with the shared experts' columns appended.
//
// Grid      ceil(num_tokens * (top_k + num_shared) / 256) blocks of 256 threads, one slot a thread.
// Input     PACKED: one word a slot, id << 16 | bf16 bits; otherwise ids int32 and weights of WEIGHTS_IN.
// From -D   PACKED WEIGHTS_IN WEIGHTS_OUT
#include "vec.cuh"

using namespace cumoe;

struct Params {
  const int32_t* ids_in;   // (num_tokens, top_k); the packed words with PACKED
  const void* weights_in;  // (num_tokens, top_k); unused with PACKED
  int32_t* ids;            // (num_tokens, top_k + num_shared)
  void* weights;           // (num_tokens, top_k + num_shared)
  int32_t num_tokens;
  int32_t top_k;
  int32_t num_shared;
  int32_t num_experts;  // shared expert j has id num_experts + j
};

extern "C" __global__ void __launch_bounds__(256) topk_expand(const __grid_constant__ Params p) {
  ptx::griddepcontrol_wait();
  const int columns = p.top_k + p.num_shared;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= static_cast<int64_t>(p.num_tokens) * columns) return;
  const int64_t token = slot / columns;
  const int column = static_cast<int>(slot - token * columns);
  int32_t id = p.num_experts + column - p.top_k;
  float weight = 1.0f;
  if (column < p.top_k) {
    const int64_t source = token * p.top_k + column;
    const int32_t word = p.ids_in[source];
    if constexpr (PACKED) {
      id = word >> 16;
      weight = f32_from_bf16(static_cast<uint32_t>(word) & 0xffffu);
    } else {
      // A given id must not reach the shared experts, which have columns of their own.
      id = p.num_shared > 0 && word >= p.num_experts ? -1 : word;
      weight = load_element<WEIGHTS_IN>(p.weights_in, source);
    }
    if constexpr (PACKED) {
      if (p.num_shared > 0 && id >= p.num_experts) id = -1;
    }
  }
  p.ids[slot] = id;
  if constexpr (WEIGHTS_OUT == kBf16) {
    static_cast<uint16_t*>(p.weights)[slot] = ptx::cvt_bf16x2_f32(weight, weight) & 0xffffu;
  } else {
    static_cast<float*>(p.weights)[slot] = weight;
  }
}
