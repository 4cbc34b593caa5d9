// permute_place: the rows and tables of a permutation from ids and the counts of their chunks.
//
// The second of two launches; routing_count is the first. Every block sums the counts of all chunks
// itself, so no block waits for another.
//
// Grid      one block a chunk of chunk_slots consecutive slots.
// Block     NUM_WARPS warps, a run of the chunk's slots each.
// smem      PermuteShared, dynamic.
// From -D   NUM_WARPS
#include "permute.cuh"

using namespace cumoe;

struct Params {
  const int32_t* ids;            // (num_tokens, columns)
  const uint32_t* chunk_counts;  // (num_chunks, words)
  int32_t num_slots;
  int32_t columns;
  int32_t chunk_slots;
  int32_t num_chunks;
  ExpertRange experts;
  PermuteTables tables;
};

constexpr int kAhead = 16;  // counts that a thread has under way

extern "C" __global__ void __launch_bounds__(NUM_WARPS* kWarpSize, 2)
    permute_place(const __grid_constant__ Params p) {
  extern __shared__ uint32_t smem[];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = warp_of_block();
  const PermuteShared shared(smem, p.experts, NUM_WARPS, p.tables.tile, p.columns);
  shared.clear();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  __syncthreads();

  const int chunk = blockIdx.x;
  const int chunk_begin = chunk * p.chunk_slots;
  const int chunk_end = chunk_begin + min(p.chunk_slots, p.num_slots - chunk_begin);
  const int run = ceil_div(p.chunk_slots, NUM_WARPS * kWarpSize) * kWarpSize;
  const int begin = min(chunk_begin + warp * run, chunk_end);
  const int end = min(begin + run, chunk_end);
  const auto expert_of = [&](int slot, int id) {
    return p.experts.local(id, token_of_slot(slot, shared.by_columns));
  };
  int id = begin + lane < end ? p.ids[begin + lane] : -1;
  sum_chunks<kAhead>(shared, p.num_chunks, chunk, [&](int c, int word) {
    return p.chunk_counts[static_cast<int64_t>(c) * shared.words + word];
  });
#pragma unroll 1
  for (int slot = begin + lane; slot < end; slot += kWarpSize) {
    const int expert = expert_of(slot, id);
    if (slot + kWarpSize < end) id = p.ids[slot + kWarpSize];
    if (expert >= 0) count_slots(shared.runs + warp * shared.words, expert, 1);
  }
  __syncthreads();
  sum_runs<NUM_WARPS>(shared);
  scan_experts<NUM_WARPS>(shared, p.tables, chunk == 0);
  __syncthreads();
  place_run(shared, p.tables, begin, end, warp, lane,
            [&](int slot) { return expert_of(slot, p.ids[slot]); });
  write_tiles(shared, p.tables, chunk, p.num_chunks);
}
