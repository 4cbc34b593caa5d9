// routing_topk: expert ids and weights of every token from its logits, for all routing methods.
//
// Grid      ceil(num_tokens / WARPS_PER_BLOCK) blocks.
// Block     WARPS_PER_BLOCK warps, one token each.
// From -D   WARPS_PER_BLOCK and those of routing.cuh
#include "routing.cuh"

using namespace cumoe;

struct Params {
  const void* logits;  // (num_tokens, NUM_EXPERTS)
  const void* bias;    // (NUM_EXPERTS,) or null
  int32_t* ids;        // (num_tokens, TOP_K + NUM_SHARED_EXPERTS)
  void* weights;       // (num_tokens, TOP_K + NUM_SHARED_EXPERTS)
  int16_t* replay;     // (>= num_tokens, TOP_K) or null
  int32_t num_tokens;
  float scaling_factor;
};

extern "C" __global__ void __launch_bounds__(WARPS_PER_BLOCK* kWarpSize)
    routing_topk(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS_PER_BLOCK + warp_of_block();
  ptx::griddepcontrol_wait();
  if (token >= p.num_tokens) return;
  token_columns<WARPS_PER_BLOCK>(p, token, lane, [&](int column, int id, float weight) {
    write_slot(p, token, column, id, weight);
  });
}
