// permute_place: the row of every slot, the token of every row, and the tile table.
//
// Slot s of expert e gets row expert_offsets[e] + (number of earlier slots of e): stable order.
//
// Grid      one warp a chunk for the slots; all threads then stride over rows and tiles for the padding
//           and the tile table. Rows that a slot owns and rows that are padding are disjoint, so the two
//           phases need no order between them.
// Block     WARPS_PER_BLOCK warps.
// smem      next_row (WARPS_PER_BLOCK, num_local) int32, dynamic.
// From -D   WARPS_PER_BLOCK
#include "experts.cuh"
#include "ptx.cuh"

using namespace cumoe;

struct Params {
  const int32_t* ids;                // (num_tokens, columns)
  const int32_t* chunk_counts;       // (num_chunks, num_local), exclusive over chunks
  const int32_t* tokens_per_expert;  // (num_local,)
  const int32_t* expert_offsets;     // (num_local + 1,)
  int32_t* permuted_idx;             // (num_tokens, columns)
  int32_t* token_idx;                // (max_rows,)
  int32_t* tile_expert;              // (max_tiles,)
  int32_t* tile_row_end;             // (max_tiles,)
  int32_t num_slots;
  int32_t columns;
  int32_t num_chunks;
  int32_t max_tiles;
  int32_t tile;
  ExpertRange experts;
};

extern "C" __global__ void __launch_bounds__(WARPS_PER_BLOCK* kWarpSize)
    permute_place(const __grid_constant__ Params p) {
  extern __shared__ int32_t next_row_of_block[];  // (WARPS_PER_BLOCK, num_local)
  const int lane = threadIdx.x % kWarpSize;
  const int warp_idx = threadIdx.x / kWarpSize;
  const int num_local = p.experts.num_local_routed + p.experts.num_shared;
  const int chunk = blockIdx.x * WARPS_PER_BLOCK + warp_idx;
  ptx::griddepcontrol_wait();

  if (chunk < p.num_chunks) {
    int32_t* next_row = next_row_of_block + warp_idx * num_local;
    const int32_t* before = p.chunk_counts + static_cast<int64_t>(chunk) * num_local;
    for (int e = lane; e < num_local; e += kWarpSize) {
      next_row[e] = p.expert_offsets[e] + before[e];
    }
    __syncwarp();
    const int begin = chunk * kChunkSlots;
    const int end = min(begin + kChunkSlots, p.num_slots);
    for (int base = begin; base < end; base += kWarpSize) {
      const int slot = base + lane;
      const int token = slot / p.columns;
      const int expert = slot < end ? p.experts.local(p.ids[slot], token) : -1;
      const unsigned peers = __match_any_sync(kFullMask, expert);
      const int earlier = __popc(peers & ((1u << lane) - 1u));
      int row = -1;
      if (expert >= 0) row = next_row[expert] + earlier;
      __syncwarp();
      if (expert >= 0 && earlier == 0) next_row[expert] += __popc(peers);
      __syncwarp();
      if (slot < end) p.permuted_idx[slot] = row;
      if (row >= 0) p.token_idx[row] = token;
    }
  }

  // Padding rows and the tile table.
  const int used_rows = p.expert_offsets[num_local];
  const int num_threads = gridDim.x * blockDim.x;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  for (int t = thread; t < p.max_tiles; t += num_threads) {
    const int row = t * p.tile;
    int expert = -1, row_end = 0;
    if (row < used_rows) {
      expert = expert_of_row(p.expert_offsets, num_local, row);
      row_end = min(row + p.tile, p.expert_offsets[expert] + p.tokens_per_expert[expert]);
    }
    p.tile_expert[t] = expert;
    p.tile_row_end[t] = row_end;
    for (int r = max(row_end, row); r < row + p.tile; ++r) p.token_idx[r] = -1;
  }
}
