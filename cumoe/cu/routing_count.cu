// routing_count: the experts of every token, and how many slots of each chunk go to each local expert.
//
// The first of two launches; permute_place is the second.
//
// Grid      one block a chunk of chunk_tokens consecutive tokens.
// Block     at most MAX_WARPS warps, each a run of the chunk's tokens.
// smem      counts (words,) uint32, dynamic: pairs of counts (permute.cuh).
// From -D   MAX_WARPS GIVEN, and those of given.cuh or routing.cuh
#include "permute.cuh"
#if GIVEN
#include "given.cuh"
#else
#include "routing.cuh"
#endif

using namespace cumoe;

struct Params {
  const void* logits;      // (num_tokens, NUM_EXPERTS)
  const void* bias;        // (NUM_EXPERTS,) or null
  const int32_t* ids_in;   // (num_tokens, top_k), GIVEN; packed words with PACKED
  const void* weights_in;  // (num_tokens, top_k), GIVEN and not PACKED
  int32_t* ids;            // (num_tokens, columns); null if those given will do
  void* weights;           // (num_tokens, columns)
  int16_t* replay;         // (>= num_tokens, top_k) or null
  uint32_t* chunk_counts;  // (num_chunks, words)
  int32_t num_tokens;
  int32_t top_k;
  int32_t columns;
  int32_t chunk_tokens;
  int32_t run_tokens;  // of each warp
  float scaling_factor;
  ExpertRange experts;
};

extern "C" __global__ void __launch_bounds__(MAX_WARPS* kWarpSize, 1)
    routing_count(const __grid_constant__ Params p) {
  extern __shared__ uint32_t counts[];  // (words,)
  const int lane = threadIdx.x % kWarpSize;
  const int words = count_words(p.experts);
  for (int word = threadIdx.x; word < words; word += blockDim.x) counts[word] = 0;
  ptx::griddepcontrol_wait();
  // NOTE: permute_place waits for this grid's end before it reads anything.
  ptx::griddepcontrol_launch_dependents();
  __syncthreads();
  const int warp = warp_of_block();
  const int chunk_begin = blockIdx.x * p.chunk_tokens;
  const int chunk_end = min(chunk_begin + p.chunk_tokens, p.num_tokens);
  const int begin = min(chunk_begin + warp * p.run_tokens, chunk_end);
  const int end = min(begin + p.run_tokens, chunk_end);
  run_slots<MAX_WARPS>(p, begin, end, lane, [&](int token, int column, int id, float weight) {
    const int expert = p.experts.local(id, token);
    if (expert >= 0) count_slots(counts, expert, 1);
    write_slot(p, token, column, id, weight);
  });
  __syncthreads();
  uint32_t* chunk = p.chunk_counts + static_cast<int64_t>(blockIdx.x) * words;
  for (int word = threadIdx.x; word < words; word += blockDim.x) chunk[word] = counts[word];
}
