// From counts of slots to the rows of an expert-ordered permutation, one chunk of slots a block.
//
// Chunks are consecutive slots and so are the runs of slots that the warps of a block have, so slot s of
// expert e gets row offset[e] + (e's slots in earlier chunks, runs and lanes): stable order.
// Counts of a chunk are below 2^16 and lie in pairs: word w holds expert 2 w in its low half and 2 w + 1
// in its high half.
#pragma once

#include "experts.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace cumoe {

/// The tables of a permutation (cumoe.Permutation).
struct PermuteTables {
  int32_t* tokens_per_expert;  // (num_local,)
  int32_t* expert_offsets;     // (num_local + 1,)
  int32_t* permuted_idx;       // (num_tokens, columns)
  int32_t* token_idx;          // (max_tiles * tile,)
  int32_t* tile_expert;        // (max_tiles,)
  int32_t* tile_row_end;       // (max_tiles,)
  int32_t* num_tiles;          // (1,)
  int32_t max_tiles;
  int32_t tile;
};

/// Words that hold the counts of a chunk; at least one.
__device__ __forceinline__ int count_words(const ExpertRange& experts) {
  return max(ceil_div(experts.num_local(), 2), 1);
}

/// What a block shares while it permutes; lies in dynamic shared memory.
struct PermuteShared {
  int32_t* total;     // (num_local,) slots of each expert
  int32_t* before;    // (num_local,) of these in earlier chunks; then the row of the chunk's first
  int32_t* first;     // (num_local + 1,) first tile of each expert
  int32_t* warp_sum;  // (32,)
  uint32_t* runs;     // (warps, words) slots in each warp's run; then those in earlier runs
  uint32_t* end;      // of the words above
  int num_local, words;
  Divisor by_words, by_tile, by_columns;  // made while nothing else is to be done

  __device__ __forceinline__ PermuteShared(uint32_t* smem, const ExpertRange& experts, int warps,
                                           int tile, int columns)
      : num_local(experts.num_local()),
        words(count_words(experts)),
        by_words(words),
        by_tile(tile),
        by_columns(columns) {
    total = reinterpret_cast<int32_t*>(smem);
    before = total + 2 * words;
    first = before + 2 * words;
    warp_sum = first + 2 * words + 1;
    runs = reinterpret_cast<uint32_t*>(warp_sum + kWarpSize);
    end = runs + warps * words;
  }

  /// Clears the counts; the block meets before they are used.
  __device__ __forceinline__ void clear() const {
    for (int e = threadIdx.x; e < 4 * words; e += blockDim.x) total[e] = 0;
    for (uint32_t* word = runs + threadIdx.x; word < end; word += blockDim.x) *word = 0;
  }
};

/// Counts slots of an expert.
__device__ __forceinline__ void count_slots(uint32_t* counts, int expert, uint32_t slots) {
  atomicAdd(&counts[expert >> 1], slots << (16 * (expert & 1)));
}

__device__ __forceinline__ int counted(uint32_t counts, int expert) {
  return static_cast<int>(counts >> (16 * (expert & 1)) & 0xffffu);
}

/// Sum of a word of the runs' counts.
template <int WARPS>
__device__ __forceinline__ uint32_t sum_of_runs(const PermuteShared& s, int word) {
  uint32_t sum = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) sum += s.runs[warp * s.words + word];
  return sum;
}

/// Makes the runs' counts exclusive prefix sums over the warps.
template <int WARPS>
__device__ __forceinline__ void sum_runs(const PermuteShared& s) {
  for (int word = threadIdx.x; word < s.words; word += blockDim.x) {
    uint32_t counts[WARPS];
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) counts[warp] = s.runs[warp * s.words + word];
    uint32_t running = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
      s.runs[warp * s.words + word] = running;
      running += counts[warp];
    }
  }
}

/// Adds the counts of all chunks to `total` and those of the chunks before `chunk` to `before`;
/// load(c, word) reads one, AHEAD of them at a time. The block meets before the sums are read.
template <int AHEAD, class Load>
__device__ __forceinline__ void sum_chunks(const PermuteShared& s, int num_chunks, int chunk,
                                           Load&& load) {
  const int parts = max(static_cast<int>(s.by_words.divide(blockDim.x)), 1);
#pragma unroll 1
  for (int i = threadIdx.x; i < parts * s.words; i += blockDim.x) {
    const int part = static_cast<int>(s.by_words.divide(i)), word = i - part * s.words;
    int low = 0, high = 0, low_before = 0, high_before = 0;
#pragma unroll 1
    for (int base = part; base < num_chunks; base += AHEAD * parts) {
      uint32_t counts[AHEAD];
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        const int c = base + j * parts;
        counts[j] = c < num_chunks ? load(c, word) : 0;
      }
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        const int l = counted(counts[j], 0), h = counted(counts[j], 1);
        low += l, high += h;
        if (base + j * parts < chunk) low_before += l, high_before += h;
      }
    }
    // NOTE: with an odd number of experts the last word's high half is 0.
    if (low != 0) atomicAdd(&s.total[2 * word], low);
    if (high != 0) atomicAdd(&s.total[2 * word + 1], high);
    if (low_before != 0) atomicAdd(&s.before[2 * word], low_before);
    if (high_before != 0) atomicAdd(&s.before[2 * word + 1], high_before);
  }
}

/// The same of the blocks of a cluster, which have fewer than 2^16 slots in all; `counts` (BLOCKS, words).
template <int BLOCKS>
__device__ __forceinline__ void sum_blocks(const PermuteShared& s, const uint32_t* counts,
                                           int block) {
#pragma unroll 1
  for (int word = threadIdx.x; word < s.words; word += blockDim.x) {
    uint32_t sum = 0, before = 0;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const uint32_t count = counts[b * s.words + word];
      sum += count;
      before += b < block ? count : 0;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      s.total[2 * word + half] = counted(sum, half);
      s.before[2 * word + half] = counted(before, half);
    }
  }
}

/// From `total` and `before` to the first tile of each expert and the row of its first slot in this
/// chunk; `writes` has this block write the tables of experts. The block meets before and after.
template <int WARPS>
__device__ __forceinline__ void scan_experts(const PermuteShared& s, const PermuteTables& t,
                                             bool writes) {
  const int lane = threadIdx.x % kWarpSize, warp = warp_of_block();
  const int per_thread = ceil_div(s.num_local, WARPS * kWarpSize);
  const int begin = min(static_cast<int>(threadIdx.x) * per_thread, s.num_local);
  const int end = min(begin + per_thread, s.num_local);
  int own = 0;
#pragma unroll 1
  for (int e = begin; e < end; ++e) {
    const int tiles = static_cast<int>(s.by_tile.divide(s.total[e] + t.tile - 1));
    s.first[e] = tiles;
    own += tiles;
  }
  int through = own;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int left = __shfl_up_sync(kFullMask, through, offset);
    if (lane >= offset) through += left;
  }
  if (lane == kWarpSize - 1) s.warp_sum[warp] = through;
  __syncthreads();
  const int earlier = __reduce_add_sync(kFullMask, lane < warp ? s.warp_sum[lane] : 0);
  int tiles = earlier + through - own;
#pragma unroll 1
  for (int e = begin; e < end; ++e) {
    const int of_expert = s.first[e];
    s.first[e] = tiles;
    s.before[e] += tiles * t.tile;
    if (writes) {
      t.tokens_per_expert[e] = s.total[e];
      t.expert_offsets[e] = tiles * t.tile;
    }
    tiles += of_expert;
  }
  // After the last thread's experts all tiles are counted.
  if (threadIdx.x == blockDim.x - 1) {
    s.first[s.num_local] = tiles;
    if (writes) {
      t.expert_offsets[s.num_local] = tiles * t.tile;
      t.num_tiles[0] = tiles;
    }
  }
}

/// Gives the slots of a warp's run their rows; expert_of(slot) is a slot's local expert or -1.
template <class ExpertOf>
__device__ __forceinline__ void place_run(const PermuteShared& s, const PermuteTables& t, int begin,
                                          int end, int warp, int lane, ExpertOf&& expert_of) {
  uint32_t* run = s.runs + warp * s.words;
#pragma unroll 1
  for (int base = begin; base < end; base += kWarpSize) {
    const int slot = base + lane;
    const int expert = slot < end ? expert_of(slot) : -1;
    const unsigned peers = __match_any_sync(kFullMask, expert);
    const int earlier = __popc(peers & ((1u << lane) - 1u));
    int row = -1;
    if (expert >= 0) row = s.before[expert] + counted(run[expert >> 1], expert) + earlier;
    __syncwarp();
    if (expert >= 0 && earlier == 0) count_slots(run, expert, __popc(peers));
    __syncwarp();
    if (slot < end) t.permuted_idx[slot] = row;
    if (row >= 0) t.token_idx[row] = token_of_slot(slot, s.by_columns);
  }
}

/// Writes the tile table and the padding rows, all blocks together; `block` is this one of `blocks`.
__device__ __forceinline__ void write_tiles(const PermuteShared& s, const PermuteTables& t,
                                            int block, int blocks) {
  const int lane = threadIdx.x % kWarpSize;
  const int warps_of_block = blockDim.x / kWarpSize;
  const int warp = warp_of_block() * blocks + block;
  const int num_warps = warps_of_block * blocks;
  // A warp has experts warp, warp + num_warps, ..., of which each lane looks at one at a time.
  for (int base = warp; base < s.num_local; base += num_warps * kWarpSize) {
    const int own = base + lane * num_warps;
    const int own_count = own < s.num_local ? s.total[own] : 0;
    unsigned active = __ballot_sync(kFullMask, own_count > 0);
    for (; active != 0; active &= active - 1) {
      const int holder = __ffs(active) - 1;
      const int expert = base + holder * num_warps;
      const int count = __shfl_sync(kFullMask, own_count, holder);
      const int first = s.first[expert], last = s.first[expert + 1];
      const int row_end = first * t.tile + count;
#pragma unroll 1
      for (int i = first + lane; i < last; i += kWarpSize) {
        t.tile_expert[i] = expert;
        t.tile_row_end[i] = min((i + 1) * t.tile, row_end);
      }
#pragma unroll 1
      for (int r = row_end + lane; r < last * t.tile; r += kWarpSize) t.token_idx[r] = -1;
    }
  }
  const int thread = block * blockDim.x + threadIdx.x, num_threads = blocks * blockDim.x;
  const int used = s.first[s.num_local];
#pragma unroll 1
  for (int i = used + thread; i < t.max_tiles; i += num_threads) {
    t.tile_expert[i] = -1;
    t.tile_row_end[i] = 0;
  }
#pragma unroll 1
  for (int r = used * t.tile + thread; r < t.max_tiles * t.tile; r += num_threads) {
    t.token_idx[r] = -1;
  }
}

}  // namespace cumoe
