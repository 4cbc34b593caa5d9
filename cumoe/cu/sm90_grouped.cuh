// What the Hopper grouped GEMMs share: work items, the ring of stages, loaders and bf16 stores.
//
// A tile has 256 weight rows in two halves of 128 (gate and up with GATED, else two neighbouring blocks)
// and up to BLOCK_N tokens, which are the n of the wgmma; products are over the next larger of a few n:
// an expert hardly pays for rows it does not have. Its tokens are split evenly over its tiles. A
// stage is 128 bytes of k.
//
// Grid      persistent clusters; each takes the next of the (row tile, weight tile) items, expert by expert,
//           from a queue in device memory, shortly before it is done with the last: so those with the
//           same weights run at the same time, and find them in L2, however long each takes. The
//           first item is the cluster's own. The CLUSTER blocks of one have neighbouring tokens of one
//           expert and the same weights, of which each loads its share for both (multicast); where one
//           block can take a tile's tokens, both have these, loaded likewise, and each its own
//           weights, and every second item is nothing: passed over, unless it is a first one.
// Block     warpgroup 0 produces: warp 0 loads by TMA, others gather tokens by cp.async (GATHER: a TMA
//           of one row costs as much as one of 32) or write finished rows; warpgroups 1 and 2
//           consume: two parts of 64 weight rows each.
// Barriers  full[s]     TMA bytes, gathering threads, a kernel's own loaders; consumers wait
//           empty[s]    8 * CLUSTER consumer warps of all blocks of the cluster; producers wait
//           announced[i]  the TMA loader, and in a cluster the item's bytes from the first block; all warps wait
//           seen[i]     all warps of all blocks, in the first block; that loader waits
//           staged, drained[group][c]  a chunk of finished rows, between a consumer and its writer
// From -D   GATED ACTIVATED (the epilogue is the activation; always with GATED) GATHER BLOCK_N NUM_STAGES LOAD_STAGES
//           NUM_CHUNKS CLUSTER
#pragma once

#ifndef WHOLE_BLOCKS
#define WHOLE_BLOCKS 0  // an expert's tokens fill one tile after the other, rather than all evenly
#endif

#include "activation.cuh"
#include "tma.cuh"
#include "vec.cuh"
#include "wgmma.cuh"

namespace cumoe {

struct Params {
  TensorMap a_map;       // (rows, bytes of k) in boxes of kBoxRows rows; not GATHER
  TensorMap w_map;       // (num_local, halves, rows, k-blocks, bytes), boxes of 128 rows
  TensorMap out_map;     // (max_rows, bytes of n) in chunks; bf16 and not GATHER
  const uint8_t* a;      // (rows, k)
  const float* a_scale;  // fp8: (rows, k-blocks) at the strides below; of tensors (num_local,)
  const float* w_scale;  // fp8: (num_local, w_scale_rows, k-blocks); of tensors without k-blocks
  void* out;             // (max_rows, n)
  float* out_scale;      // fp8 output: (max_rows, ceil(n / 128)); of tensors (num_local,), read
  const int32_t* token_idx;          // (max_rows,)
  const int32_t* tile_expert;        // (max_tiles,)
  const int32_t* expert_offsets;     // (num_local + 1,)
  const int32_t* tokens_per_expert;  // (num_local,)
  const int32_t* num_tiles;          // (1,)
  int32_t* queue;  // [0] items taken, [1] clusters that are done; zeros between launches
  int64_t a_scale_row_stride;  // in elements
  int64_t a_scale_block_stride;
  int64_t out_scale_row_stride;
  int64_t out_scale_block_stride;
  int32_t n;                 // output columns
  int32_t k_bytes;           // of a row of either operand
  int32_t tile;              // tile height of the permutation, at most CLUSTER * BLOCK_N
  int32_t num_column_tiles;  // of 128 columns with GATED, else of 256
  int32_t w_scale_rows;
  int32_t first_half;       // which half of w_map is half 0 here (the gate with GATED)
  int32_t first_scale_row;  // block row of w_scale where half 0 begins, and half 1
  int32_t second_scale_row;
  int32_t block_major;  // k-blocks are a dimension of their own in w_map
  ActivationParams activation;
  const void* token_weights;  // WEIGHTS_TYPE: (num_tokens, columns), of which column 0 is read
  int32_t token_weights_columns;
  int32_t num_weighted;  // experts before this one multiply by them
};

constexpr int kConsumers = 2, kConsumerThreads = 128 * kConsumers;
constexpr int kHalfBytes = 128 * 128;
constexpr int kStageBytes = 2 * kHalfBytes + BLOCK_N * 128;
constexpr int kBoxRows = BLOCK_N > 64 && BLOCK_N % 16 == 0 ? BLOCK_N / 2 : BLOCK_N;
constexpr int kBoxes = BLOCK_N / kBoxRows;  // of tokens
constexpr bool kWriters = !GATHER;          // warps 1 and 2 write finished rows
// Most tokens that are columns of products; with WHOLE_BLOCKS more of them are rows.
constexpr int kColumns = WHOLE_BLOCKS ? 88 : BLOCK_N;
constexpr int kChunkTokens = WHOLE_BLOCKS ? 64 : 32, kChunkBytes = kChunkTokens * 128;

static_assert(LOAD_STAGES < NUM_STAGES, "a consumer has one stage while it waits for the next");
static_assert(ACTIVATED || !GATED, "gate and up come together in the activation");
static_assert(CLUSTER == 1 || CLUSTER == 2, "a block loads both weight halves or one");
static_assert(BLOCK_N % kBoxRows == 0, "whole boxes of tokens");

/// The ring and the chunks of finished rows: 64 columns of 32 tokens.
struct Shared {
  uint8_t stages[NUM_STAGES][kStageBytes];
  uint8_t chunks[kConsumers][NUM_CHUNKS][kChunkBytes];
  int4 tiles[NUM_STAGES];  // of which a stage is, for the consumers
  int items[2];            // announced
  uint64_t announced[2];
  uint64_t seen[2];
  uint64_t full[NUM_STAGES];
  uint64_t empty[NUM_STAGES];
  uint64_t staged[kConsumers][NUM_CHUNKS];
  uint64_t drained[kConsumers][NUM_CHUNKS];

  /// Called by one thread; `arrivals` on full[s] there are besides that of the TMA loader, and `helpers`,
  /// warps that walk items besides it and the consumers.
  __device__ __forceinline__ void init(int arrivals, int helpers) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&announced[i]), 1);
      ptx::mbarrier_init(ptx::smem_address(&seen[i]), (1 + kConsumers * 4 + helpers) * CLUSTER);
    }
    for (int s = 0; s < NUM_STAGES; ++s) {
      ptx::mbarrier_init(ptx::smem_address(&full[s]), 1 + arrivals);
      ptx::mbarrier_init(ptx::smem_address(&empty[s]), kConsumers * 4 * CLUSTER);
    }
    for (int g = 0; g < kConsumers; ++g) {
      for (int c = 0; c < NUM_CHUNKS; ++c) {
        ptx::mbarrier_init(ptx::smem_address(&staged[g][c]), 4);
        ptx::mbarrier_init(ptx::smem_address(&drained[g][c]), 1);
      }
    }
    ptx::fence_mbarrier_init();
  }
};

/// One item of work.
struct Tile {
  int expert, row0, rows;
  int column_tile;      // -1: nothing to do, in one step
  bool shares = false;  // the blocks of the cluster have the same weights

  __device__ __forceinline__ Tile(const Params& p, int item, int rank) {
    expert = p.tile_expert[item / p.num_column_tiles];
    const int first = p.expert_offsets[expert], count = p.tokens_per_expert[expert];
    // Row tiles fastest within an expert: the blocks that read the same weights run together.
    const int tiles = ceil_div(count, p.tile);
    const int local = item - first / p.tile * p.num_column_tiles;
    column_tile = local / tiles;
    const int t = local - column_tile * tiles;
    const int even = ceil_div(ceil_div(count, tiles * CLUSTER), 8) * 8 * CLUSTER;
    const int height = WHOLE_BLOCKS ? p.tile : even;
    int begin = t * height;
    take_rows(min(height, count - begin), rank, begin);
    row0 = first + (rows > 0 ? begin : 0);  // without rows one that may be read
  }

  __device__ __forceinline__ explicit Tile(int4 v)
      : expert(v.x), row0(v.y), rows(v.z), column_tile(v.w) {}

  /// Whether tokens are the columns of the products, not their rows.
  __device__ __forceinline__ bool has_columns() const { return !WHOLE_BLOCKS || rows <= kColumns; }

  __device__ __forceinline__ int groups() const { return ceil_div(rows, 8); }

  /// Stages of this tile, of `steps` of k.
  __device__ __forceinline__ int stages(int steps) const {
    return CLUSTER > 1 && column_tile < 0 ? 1 : steps;
  }

 private:
  /// This block's of the tile's `rest` rows from `begin` on. Few rows are one block's, and the other has
  /// them with the next weights (zeros past the last), which the next item then has no need to do.
  __device__ __forceinline__ void take_rows(int rest, int rank, int& begin) {
    shares = CLUSTER > 1 && rest > BLOCK_N;
    if (CLUSTER == 1 || shares) {
      const int step = WHOLE_BLOCKS && rest > CLUSTER * kColumns ? 64 : 8;
      const int height = ceil_div(ceil_div(rest, CLUSTER), step) * step;
      begin += rank * height;
      rows = min(rest - rank * height, height);
    } else {
      rows = column_tile % 2 == 0 ? max(rest, 0) : 0;  // none where the tiles before took all
      column_tile = rows > 0 ? column_tile + rank : -1;
    }
  }
};

/// The first item of a cluster, how many there are, which of its blocks this is, and the stages of a tile.
struct Work {
  int first, count, rank, steps;

  __device__ __forceinline__ Work(const Params& p, int steps_) : steps(steps_) {
    first = static_cast<int>(blockIdx.x) / CLUSTER;
    count = *p.num_tiles * p.num_column_tiles;
    rank = CLUSTER > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  }
  __device__ __forceinline__ int or_none(int item) const { return item < count ? item : -1; }
};

/// Prepares a block of which the shared memory is a SMEM, for `init`, and waits for the launches before.
template <typename SMEM>
__device__ __forceinline__ Work start_block(const Params& p, SMEM& smem, int arrivals,
                                            int helpers) {
  if (threadIdx.x == 0) {
    if constexpr (!GATHER) ptx::prefetch_tensor_map(&p.a_map);
    ptx::prefetch_tensor_map(&p.w_map);
    smem.init(arrivals, helpers);
  }
  // The blocks of a cluster write to each other's barriers and shared memory: all must be there.
  CLUSTER > 1 ? ptx::cluster_sync() : __syncthreads();
  ptx::griddepcontrol_wait();
  return Work(p, ceil_div(p.k_bytes, 128));
}

/// Position in a ring of SIZE slots.
template <int SIZE>
struct Ring {
  int slot = 0, phase = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == SIZE) slot = 0, phase ^= 1;
  }
  __device__ __forceinline__ int previous() const { return slot == 0 ? SIZE - 1 : slot - 1; }
  __device__ __forceinline__ void wait(const uint64_t (&barriers)[SIZE], int parity) const {
    ptx::mbarrier_wait(ptx::smem_address(&barriers[slot]), parity);
  }
};
using StageRing = Ring<NUM_STAGES>;

/// A warp's walk over the cluster's items, or one thread's with ALONE.
template <bool ALONE = false>
struct Items {
  Shared& smem;
  const int lane;
  int item;  // -1 past the last
  Ring<2> ring;

  __device__ __forceinline__ Items(Shared& smem_, const Work& work, int lane_)
      : smem(smem_), lane(lane_), item(work.or_none(work.first)) {}

  __device__ __forceinline__ bool left() const { return item >= 0; }

  __device__ __forceinline__ void next() {
    const uint32_t announced = ptx::smem_address(&smem.announced[ring.slot]);
    CLUSTER > 1 ? ptx::mbarrier_wait_cluster(announced, ring.phase)
                : ptx::mbarrier_wait(announced, ring.phase);
    item = smem.items[ring.slot];
    if constexpr (!ALONE) __syncwarp();
    if (lane == 0 && item >= -1) {  // always: see Stages::release
      const uint32_t seen = ptx::smem_address(&smem.seen[ring.slot]);
      if constexpr (CLUSTER == 1) {
        ptx::mbarrier_arrive(seen);
      } else {
        ptx::mbarrier_arrive_cluster(ptx::mapa(seen, 0));
      }
    }
    ring.advance();
  }
};

/// The TMA loader of every block, tile by tile: the first block's tells all warps of the cluster its next item.
__device__ __forceinline__ void announce(Shared& smem, Ring<2>& ring, const Work& work, int next) {
  const uint32_t item = ptx::smem_address(&smem.items[ring.slot]);
  const uint32_t announced = ptx::smem_address(&smem.announced[ring.slot]);
  if (work.rank == 0) ring.wait(smem.seen, ring.phase ^ 1);
  if constexpr (CLUSTER == 1) {
    smem.items[ring.slot] = work.or_none(next);
    ptx::mbarrier_arrive(announced);
  } else {
    // NOTE: stores and arrivals with release to other blocks would each be a fence of the whole GPU.
    ptx::mbarrier_arrive_expect_tx(announced, sizeof(int));
#pragma unroll
    for (int block = 0; block < CLUSTER; ++block) {
      if (work.rank > 0) break;
      ptx::st_async_cluster_u32(ptx::mapa(item, block), static_cast<uint32_t>(work.or_none(next)),
                                ptx::mapa(announced, block));
    }
  }
  ring.advance();
}

/// One warp arrives on a barrier that counts warps.
__device__ __forceinline__ void arrive_warp(uint64_t& barrier, int lane) {
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(ptx::smem_address(&barrier));
}

/// Calls a function with each step from `first` on that is loaded together, and its place in the ring; returns the
/// place behind them.
template <typename Load>
__device__ __forceinline__ StageRing each_load(StageRing at, int first, int stages,
                                               const Load& load) {
#pragma unroll
  for (int i = 0; i < LOAD_STAGES; ++i) {
    if (first + i >= stages) break;
    load(first + i, at);
    at.advance();
  }
  return at;
}

/// One thread: both weight halves of every stage, and the tokens where they lie in a row; LOAD_STAGES stages at
/// a time, whose bytes of a weight row are neighbours in memory. That of a cluster's first block takes the
/// items from the queue, so late that tiles begin in its order even after ones that took longer, in steps that
/// leave each answer the time to come.
__device__ __forceinline__ void load_by_tma(const Params& p, Shared& smem, const Work& work) {
  StageRing ring;
  Ring<2> queue;
  const int clusters = static_cast<int>(gridDim.x) / CLUSTER;
  int next = 0;
  Items<true> items(smem, work, 0);
  for (; items.left(); items.next()) {
    const Tile tile(p, items.item, work.rank);
    const int boxes = GATHER ? 0 : ceil_div(tile.rows, kBoxRows);
    const int stages = tile.stages(work.steps);
    for (int first = 0; first < stages; first += LOAD_STAGES) {
      each_load(ring, first, stages, [&](int, const StageRing& at) {
        at.wait(smem.empty, at.phase ^ 1);
        smem.tiles[at.slot] = make_int4(tile.expert, tile.row0, tile.rows, tile.column_tile);
        ptx::mbarrier_arrive_expect_tx(ptx::smem_address(&smem.full[at.slot]),
                                       2 * kHalfBytes + boxes * kBoxRows * 128);
      });
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = GATED ? tile.column_tile * 128 : tile.column_tile * 256 + h * 128;
        const int half = GATED ? p.first_half ^ h : 0;
        each_load(ring, first, stages, [&](int step, const StageRing& at) {
          const uint32_t full = ptx::smem_address(&smem.full[at.slot]);
          const uint32_t to = ptx::smem_address(smem.stages[at.slot]) + h * kHalfBytes;
          const int k = p.block_major ? 0 : step * 128, block = p.block_major ? step : 0;
          if (!tile.shares) {
            ptx::tma_load_5d(to, &p.w_map, full, k, block, row, half, tile.expert);
          } else if (h == work.rank) {
            ptx::tma_load_5d_multicast(to, &p.w_map, full, 0x3, k, block, row, half, tile.expert);
          }
        });
      }
      ring = each_load(ring, first, stages, [&](int step, const StageRing& at) {
        const uint32_t full = ptx::smem_address(&smem.full[at.slot]);
        const uint32_t tokens = ptx::smem_address(smem.stages[at.slot]) + 2 * kHalfBytes;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          if (box >= boxes) break;
          const uint32_t to = tokens + box * kBoxRows * 128;
          const int row = tile.row0 + box * kBoxRows;
          if (CLUSTER == 1 || tile.shares) {
            ptx::tma_load_2d(to, &p.a_map, full, step * 128, row);
          } else if ((boxes > 1 ? box : step % 2) == work.rank) {
            ptx::tma_load_2d_multicast(to, &p.a_map, full, 0x3, step * 128, row);
          }
        }
        if (work.rank == 0) {
          if (step == stages * 5 / 8) next = clusters + atomicAdd(p.queue, 1);
          if (step == stages * 6 / 8) {
            while (CLUSTER > 1 && next < work.count && Tile(p, next, 0).column_tile < 0) {
              next = clusters + atomicAdd(p.queue, 1);
            }
          }
        }
        if (step == stages * 7 / 8) announce(smem, queue, work, next);
      });
    }
  }
  // The last cluster leaves the queue as it was found.
  if (work.rank == 0 && atomicAdd(p.queue + 1, 1) == clusters - 1) p.queue[0] = p.queue[1] = 0;
}

/// THREADS threads: the tokens of every stage, gathered; eight threads copy a row's 128 bytes. They come
/// through the generic proxy: who sees landed[s] complete must fence the async one before wgmma reads.
template <int THREADS>
__device__ __forceinline__ void gather_tokens(const Params& p, Shared& smem,
                                              uint64_t (&landed)[NUM_STAGES], const Work& work,
                                              int thread) {
  constexpr int kRows = THREADS / 8, kPasses = ceil_div(BLOCK_N, kRows);
  static_assert(kRows % 4 == 0,
                "a pass moves the swizzle, which repeats every eight rows, by 0 or 4");
  const int chunk = thread % 8, first = thread / 8;
  const uint32_t offset = 2 * kHalfBytes + first * 128 + ((chunk ^ first % 8) << 4);
  StageRing ring;
  for (Items<> items(smem, work, thread % kWarpSize); items.left(); items.next()) {
    const Tile tile(p, items.item, work.rank);
    const int rows = tile.groups() * 8;
    uint32_t source[kPasses];  // in 16-byte units: half the registers of pointers
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = first + i * kRows;
      // Rows that round the tile up to eight repeat its first one; their results are not stored.
      const int token = max(p.token_idx[tile.row0 + (row < tile.rows ? row : 0)], 0);
      source[i] = static_cast<uint32_t>(static_cast<int64_t>(token) * p.k_bytes / 16) + chunk;
    }
    // NOTE: opaque, or the compiler loads the parameter again for every copy.
    const uint8_t* a = ptx::opaque(p.a);
    const int stages = tile.stages(work.steps);
    for (int step = 0; step < stages; ++step, ring.advance()) {
      ring.wait(smem.empty, ring.phase ^ 1);
      const uint32_t stage = ptx::smem_address(smem.stages[ring.slot]);
      const uint32_t to[2] = {stage + offset, stage + (offset ^ kRows % 8 << 4)};
      const int bytes = step * 128 + chunk * 16 < p.k_bytes ? 16 : 0;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        if (first + i * kRows < rows) {
          ptx::cp_async_cg_16(to[i % 2] + i * kRows * 128,
                              a + static_cast<uint64_t>(source[i]) * 16, bytes);
        }
      }
      a += 128;
      ptx::cp_async_mbarrier_arrive_noinc(ptx::smem_address(&landed[ring.slot]));
    }
  }
}

/// A consumer's view of the ring, in addresses kept in registers.
struct Stages {
  uint32_t stages, full, released;
  StageRing ring;

  __device__ __forceinline__ Stages(const Shared& smem, int lane) {
    // NOTE: shuffles tell the compiler that the addresses are uniform and keep it from deriving them anew.
    stages = __shfl_sync(kFullMask, ptx::smem_address(smem.stages), 0);
    full = __shfl_sync(kFullMask, ptx::smem_address(smem.full), 0);
    released = ptx::smem_address(smem.empty);
    if constexpr (CLUSTER > 1) released = ptx::mapa(released, lane % CLUSTER);
  }
  __device__ __forceinline__ void wait() const {
    ptx::mbarrier_wait(full + 8 * ring.slot, ring.phase);
  }
  __device__ __forceinline__ uint32_t stage() const { return stages + ring.slot * kStageBytes; }

  /// This warp is done with a stage: tells all blocks of the cluster. `read`, always true, depends on what
  /// was read last of it.
  /// NOTE: an arrival at another block's barrier does not wait for loads by itself, and one that releases to the
  /// cluster would be a fence of the whole GPU; instructions wait for the condition, and it for the load.
  __device__ __forceinline__ void release(int slot, int lane, bool read = true) const {
    __syncwarp();
    if constexpr (CLUSTER == 1) {
      if (lane == 0) ptx::mbarrier_arrive(released + 8 * slot);
    } else {
      if (lane < CLUSTER && read) ptx::mbarrier_arrive_cluster(released + 8 * slot);
    }
  }

  /// Passes the one stage of a tile with nothing to do.
  __device__ __forceinline__ bool skip(const Shared& smem, int lane) {
    if (CLUSTER == 1 || smem.tiles[ring.slot].w >= 0) return false;
    release(ring.slot, lane);
    ring.advance();
    return true;
  }
};

}  // namespace cumoe
