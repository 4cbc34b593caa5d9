// routing_permute: the experts of every token and their whole permutation in one launch, for few tokens.
//
// Grid      CLUSTER blocks, one cluster: block b has tokens b * chunk_tokens and on, a chunk.
// Block     NUM_WARPS warps, each a run of the chunk's tokens.
// smem      PermuteShared, counts (CLUSTER, words) of all chunks, and of the own slots id_of_slot int32,
//           weight_of_slot float, expert_of_slot int16 (local experts, -1 for none); dynamic.
// Cluster   Every block stores its chunk's counts to all blocks, once it knows that they have begun.
// Barriers  complete   1 arrival (thread 0, expects all counts)   waited by all
// From -D   CLUSTER NUM_WARPS GIVEN, and those of given.cuh or routing.cuh
#include "permute.cuh"
#if GIVEN
#include "given.cuh"
#else
#include "routing.cuh"
#endif
#if CLUSTER > 1
#include "tma.cuh"
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
  int32_t num_tokens;
  int32_t top_k;
  int32_t columns;
  int32_t chunk_tokens;
  float scaling_factor;
  ExpertRange experts;
  PermuteTables tables;
};

extern "C" __global__ void __launch_bounds__(NUM_WARPS* kWarpSize, 1)
    routing_permute(const __grid_constant__ Params p) {
  extern __shared__ uint32_t smem[];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = warp_of_block();
  const int chunk = blockIdx.x;
  const PermuteShared shared(smem, p.experts, NUM_WARPS, p.tables.tile, p.columns);
  uint32_t* counts = shared.end;
  const int chunk_slots = p.chunk_tokens * p.columns;
  int32_t* id_of_slot = reinterpret_cast<int32_t*>(counts + CLUSTER * shared.words);
  float* weight_of_slot = reinterpret_cast<float*>(id_of_slot + chunk_slots);
  int16_t* expert_of_slot = reinterpret_cast<int16_t*>(weight_of_slot + chunk_slots);
#if CLUSTER > 1
  __shared__ uint64_t complete_barrier;
  const uint32_t complete = ptx::smem_address(&complete_barrier);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(complete, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(complete, CLUSTER * shared.words * 4);
  }
  ptx::cluster_arrive_relaxed();
#endif
  shared.clear();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  __syncthreads();

  const int run = ceil_div(p.chunk_tokens, NUM_WARPS);
  const int chunk_begin = min(chunk * p.chunk_tokens, p.num_tokens);
  const int chunk_end = min(chunk_begin + p.chunk_tokens, p.num_tokens);
  const int begin = min(chunk_begin + warp * run, chunk_end), end = min(begin + run, chunk_end);
  run_slots<NUM_WARPS>(p, begin, end, lane, [&](int token, int column, int id, float weight) {
    const int slot = (token - chunk_begin) * p.columns + column;
    const int expert = p.experts.local(id, token);
    id_of_slot[slot] = id;
    weight_of_slot[slot] = weight;
    expert_of_slot[slot] = static_cast<int16_t>(expert);
    if (expert >= 0) count_slots(shared.runs + warp * shared.words, expert, 1);
  });
  __syncthreads();
#if CLUSTER > 1
  ptx::cluster_wait();
  for (int word = threadIdx.x; word < shared.words; word += blockDim.x) {
    const uint32_t sum = sum_of_runs<NUM_WARPS>(shared, word);
    const uint32_t own = ptx::smem_address(counts + chunk * shared.words + word);
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) {
      const int to = (chunk + i) % CLUSTER;
      ptx::st_async_cluster_u32(ptx::mapa(own, to), sum, ptx::mapa(complete, to));
    }
  }
  sum_runs<NUM_WARPS>(shared);
  ptx::mbarrier_wait_cluster(complete, 0);
#else
  // A thread reads the words that it wrote itself.
  for (int word = threadIdx.x; word < shared.words; word += blockDim.x) {
    counts[word] = sum_of_runs<NUM_WARPS>(shared, word);
  }
  sum_runs<NUM_WARPS>(shared);
#endif
  sum_blocks<CLUSTER>(shared, counts, chunk);
  __syncthreads();
  scan_experts<NUM_WARPS>(shared, p.tables, chunk == 0);
  __syncthreads();
  const int first_slot = chunk_begin * p.columns;
  place_run(shared, p.tables, begin * p.columns, end * p.columns, warp, lane,
            [&](int slot) { return expert_of_slot[slot - first_slot]; });
  for (int slot = threadIdx.x; slot < (chunk_end - chunk_begin) * p.columns; slot += blockDim.x) {
    const int token = token_of_slot(slot, shared.by_columns);
    write_slot(p, chunk_begin + token, slot - token * p.columns, id_of_slot[slot],
               weight_of_slot[slot]);
  }
  write_tiles(shared, p.tables, chunk, CLUSTER);
}
