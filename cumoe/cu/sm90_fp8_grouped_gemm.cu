// sm90_fp8_grouped_gemm: every expert's rows times that expert's fp8 weight, by TMA and wgmma.
//
// out[r, j] = epilogue(sum over k-blocks b of 128 of
//                      a_scale[source(r), b] * b_scale[block(j), b] * (a[source(r), b] . w[j, b]))
//
// The weight is the 64-row wgmma operand and the tokens are its n: a tile has 256 weight rows in two
// halves of 128 (gate and up with GATED, else two neighbouring blocks) and up to BLOCK_N tokens, in steps
// of eight, so no expert pays for rows it does not have. An expert's tokens are split evenly over its
// tiles. Each 128 of k is summed by wgmma and added times its scales in fp32 (two levels).
//
// Grid      persistent clusters; each walks (row tile, weight tile) items expert by expert. The CLUSTER blocks of one have neighbouring tokens of one expert and the same weights, of which
//           each loads its share for both (multicast).
// Block     warpgroup 0 produces: warp 0 loads weights, warps 1-2 tokens (by TMA, or with GATHER by
//           cp.async: a TMA of one row costs as much as one of 32), warp 3 scales; warpgroups 1 and 2
//           consume: rows 64 * (group - 1) of either half.
// smem      NUM_STAGES of w (2, 128, 128) and a (BLOCK_N, 128) bytes, 128-byte swizzle; scale
//           (NUM_STAGES, BLOCK_N) and w_scale (NUM_STAGES, 2) float; the epilogue's staging.
// Barriers  full[s]   weights 1, tokens 1 (64 threads with GATHER), scales 32; consumers wait
//           empty[s]  8 * CLUSTER arrivals (consumer warps of all its blocks); producers wait
// From -D   GATED (activation, fp8 output with 1 x 128 scales; else bf16 output) GATHER BLOCK_N NUM_STAGES CLUSTER
#include "activation.cuh"
#include "tma.cuh"
#include "vec.cuh"
#include "wgmma.cuh"

using namespace cumoe;

struct Params {
  TensorMap a_map;                   // (rows, k) in boxes of kBoxRows rows and 128 of k; not GATHER
  TensorMap w_map;                   // (num_local, halves, rows, k-blocks, k), boxes of 128 rows
  const uint8_t* a;                  // (rows, k)
  const float* a_scale;              // (rows, k-blocks) at the strides below
  const float* w_scale;              // (num_local, w_scale_rows, k-blocks)
  void* out;                         // (max_rows, n)
  float* out_scale;                  // (max_rows, ceil(n / 128)), GATED only
  const int32_t* token_idx;          // (max_rows,)
  const int32_t* tile_expert;        // (max_tiles,)
  const int32_t* expert_offsets;     // (num_local + 1,)
  const int32_t* tokens_per_expert;  // (num_local,)
  const int32_t* num_tiles;          // (1,)
  int64_t a_scale_row_stride;        // in elements
  int64_t a_scale_block_stride;
  int64_t out_scale_row_stride;
  int64_t out_scale_block_stride;
  int32_t n;  // output columns
  int32_t k;
  int32_t tile;              // tile height of the permutation, at most CLUSTER * BLOCK_N
  int32_t num_column_tiles;  // of 128 columns with GATED, else of 256
  int32_t w_scale_rows;
  int32_t first_half;       // which half of w_map is half 0 here (the gate with GATED)
  int32_t first_scale_row;  // block row of w_scale where half 0 begins, and half 1
  int32_t second_scale_row;
  int32_t block_major;  // k-blocks are a dimension of their own in w_map
  ActivationParams activation;
};

constexpr int kConsumers = 2, kConsumerThreads = 128 * kConsumers;
constexpr int kHalfBytes = 128 * 128;
constexpr int kTokenBytes = BLOCK_N * 128;
constexpr int kStageBytes = 2 * kHalfBytes + kTokenBytes;
constexpr int kStageRow = 128 + 16;  // bytes; padded so that neighbouring tokens lie in other banks
constexpr int kStagingBytes = GATED ? BLOCK_N * kStageRow : kConsumers * 64 * kStageRow;
constexpr int kTailN = BLOCK_N > 64 ? BLOCK_N / 16 * 8 : BLOCK_N;  // n of the wgmma for short tiles
constexpr int kBoxRows = BLOCK_N > 64 ? kTailN : BLOCK_N;
constexpr int kGatherThreads = 2 * kWarpSize;
constexpr int kFullArrivals = 1 + (GATHER ? kGatherThreads : 1) + kWarpSize;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

static_assert(CLUSTER == 1 || CLUSTER == 2, "a block loads both weight halves or one");
static_assert(BLOCK_N % 8 == 0 && BLOCK_N >= 8 && BLOCK_N <= 112, "n of the wgmma, in registers");
static_assert(BLOCK_N % kBoxRows == 0, "whole boxes of tokens");

struct Smem {
  uint8_t stages[NUM_STAGES][kStageBytes];
  uint8_t staging[kStagingBytes];
  float scale[NUM_STAGES][BLOCK_N];
  float w_scale[NUM_STAGES][2];
  float amax[kConsumers * 4][BLOCK_N];
  float row_scale[BLOCK_N];
  uint64_t full[NUM_STAGES];
  uint64_t empty[NUM_STAGES];
};

/// One item of work.
struct Tile {
  int expert, row0, rows, column_tile;

  __device__ __forceinline__ Tile(const Params& p, int item, int rank) {
    expert = p.tile_expert[item / p.num_column_tiles];
    const int first = p.expert_offsets[expert], count = p.tokens_per_expert[expert];
    // Row tiles fastest within an expert: the blocks that read the same weights run together.
    const int tiles = ceil_div(count, p.tile);
    const int local = item - first / p.tile * p.num_column_tiles;
    column_tile = local / tiles;
    // The expert's rows in equal steps of eight over the blocks of its tiles.
    const int height = ceil_div(ceil_div(count, tiles * CLUSTER), 8) * 8;
    const int begin = ((local - column_tile * tiles) * CLUSTER + rank) * height;
    row0 = first + begin;
    rows = max(min(height, count - begin), 0);
  }

  __device__ __forceinline__ int groups() const { return ceil_div(rows, 8); }
};

/// The items a cluster walks, and which of its blocks this is.
struct Work {
  int first, stride, count, steps, rank;
};

/// Position in the ring of stages.
struct Ring {
  int stage = 0, phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == NUM_STAGES) stage = 0, phase ^= 1;
  }
};

/// Warp 0: one thread loads both weight halves of every stage.
__device__ __forceinline__ void load_weights(const Params& p, Smem& smem, const Work& work) {
  Ring ring;
  for (int item = work.first; item < work.count; item += work.stride) {
    const Tile tile(p, item, work.rank);
    for (int step = 0; step < work.steps; ++step, ring.advance()) {
      const uint32_t full = ptx::smem_address(&smem.full[ring.stage]);
      ptx::mbarrier_wait(ptx::smem_address(&smem.empty[ring.stage]), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, 2 * kHalfBytes);
      const int k = p.block_major ? 0 : step * 128, block = p.block_major ? step : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = GATED ? tile.column_tile * 128 : tile.column_tile * 256 + h * 128;
        const int half = GATED ? p.first_half ^ h : 0;
        const uint32_t to = ptx::smem_address(smem.stages[ring.stage] + h * kHalfBytes);
        if constexpr (CLUSTER == 1) {
          ptx::tma_load_5d(to, &p.w_map, full, k, block, row, half, tile.expert);
        } else if (h == work.rank) {
          ptx::tma_load_5d_multicast(to, &p.w_map, full, 0x3, k, block, row, half, tile.expert);
        }
      }
    }
  }
}

/// Warp 1: the tokens of every stage where they lie in a row, in boxes of kBoxRows.
__device__ __forceinline__ void load_tokens(const Params& p, Smem& smem, const Work& work) {
  Ring ring;
  for (int item = work.first; item < work.count; item += work.stride) {
    const Tile tile(p, item, work.rank);
    const int boxes = ceil_div(tile.rows, kBoxRows);
    for (int step = 0; step < work.steps; ++step, ring.advance()) {
      const uint32_t full = ptx::smem_address(&smem.full[ring.stage]);
      ptx::mbarrier_wait(ptx::smem_address(&smem.empty[ring.stage]), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, boxes * kBoxRows * 128);
      const uint32_t tokens = ptx::smem_address(smem.stages[ring.stage] + 2 * kHalfBytes);
      for (int box = 0; box < boxes; ++box) {
        ptx::tma_load_2d(tokens + box * kBoxRows * 128, &p.a_map, full, step * 128,
                         tile.row0 + box * kBoxRows);
      }
    }
  }
}

/// Warps 1 and 2: the tokens of every stage, gathered eight rows at a time; eight threads copy a row's 128
/// bytes.
__device__ __forceinline__ void gather_tokens(const Params& p, Smem& smem, const Work& work,
                                              int thread) {
  static_assert(kGatherThreads == 64, "a pass copies eight rows, after which the swizzle repeats");
  constexpr int kPasses = BLOCK_N / 8;
  const int chunk = thread % 8, first = thread / 8;
  const uint32_t offset = 2 * kHalfBytes + first * 128 + ((chunk ^ first) << 4);
  Ring ring;
  for (int item = work.first; item < work.count; item += work.stride) {
    const Tile tile(p, item, work.rank);
    const int groups = tile.groups();
    uint32_t source[kPasses];  // in 16-byte units: half the registers of pointers
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = first + i * 8;
      // Rows that round the tile up to eight repeat its first one; their results are not stored.
      const int token = max(p.token_idx[tile.row0 + (row < tile.rows ? row : 0)], 0);
      source[i] = static_cast<uint32_t>(static_cast<int64_t>(token) * p.k / 16) + chunk;
    }
    for (int step = 0; step < work.steps; ++step, ring.advance()) {
      ptx::mbarrier_wait(ptx::smem_address(&smem.empty[ring.stage]), ring.phase ^ 1);
      const uint32_t to = ptx::smem_address(smem.stages[ring.stage]) + offset;
      const int bytes = step * 128 + chunk * 16 < p.k ? 16 : 0;
      const uint8_t* a = p.a + step * 128;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        if (i < groups) {
          ptx::cp_async_cg_16(to + i * 1024, a + static_cast<uint64_t>(source[i]) * 16, bytes);
        }
      }
      ptx::cp_async_mbarrier_arrive_noinc(ptx::smem_address(&smem.full[ring.stage]));
    }
  }
}

/// Warp 3: the scales of every stage, by asynchronous copies: a load's latency would bound every step.
__device__ __forceinline__ void load_scales(const Params& p, Smem& smem, const Work& work,
                                            int lane) {
  constexpr int kPerLane = ceil_div(BLOCK_N, kWarpSize);
  Ring ring;
  for (int item = work.first; item < work.count; item += work.stride) {
    const Tile tile(p, item, work.rank);
    const float* a_scale[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int column = lane + i * kWarpSize;
      const int row = tile.row0 + (column < tile.rows ? column : 0);
      a_scale[i] = p.a_scale + (GATHER ? max(p.token_idx[row], 0) : row) * p.a_scale_row_stride;
    }
    // Lanes 0 and 1 copy the scales of the two weight halves. The second half of the last tile may lie
    // past the matrix: any scale will do for its zeros.
    const int first = lane == 0 ? p.first_scale_row : p.second_scale_row;
    const int block = min(first + tile.column_tile * (GATED ? 1 : 2), p.w_scale_rows - 1);
    const float* w_scale =
        p.w_scale + (static_cast<int64_t>(tile.expert) * p.w_scale_rows + block) * work.steps;
    for (int step = 0; step < work.steps; ++step, ring.advance()) {
      ptx::mbarrier_wait(ptx::smem_address(&smem.empty[ring.stage]), ring.phase ^ 1);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int column = lane + i * kWarpSize;
        if (column < BLOCK_N) {
          ptx::cp_async_ca_4(ptx::smem_address(&smem.scale[ring.stage][column]),
                             a_scale[i] + step * p.a_scale_block_stride);
        }
      }
      if (lane < 2) {
        ptx::cp_async_ca_4(ptx::smem_address(&smem.w_scale[ring.stage][lane]), w_scale + step);
      }
      ptx::cp_async_mbarrier_arrive_noinc(ptx::smem_address(&smem.full[ring.stage]));
    }
  }
}

/// The token scales of this thread's columns.
struct Scales {
  float2 of[BLOCK_N / 8];

  __device__ __forceinline__ void load(const float* scale, int lane) {
#pragma unroll
    for (int j = 0; j < BLOCK_N / 8; ++j) {
      of[j] = *reinterpret_cast<const float2*>(scale + 8 * j + 2 * (lane % 4));
    }
  }
};

/// accum += scales * w_scale * (w @ a.T) for the first N tokens, over 128 of k.
template <int N>
__device__ __forceinline__ void accumulate(float (&accum)[BLOCK_N / 2], uint64_t w, uint64_t a,
                                           const Scales& scales, float w_scale) {
  float slab[N / 2];
  wgmma::multiply_e4m3<N>(slab, w, a);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float x = scales.of[j].x * w_scale, y = scales.of[j].y * w_scale;
    accum[4 * j] = fmaf(slab[4 * j], x, accum[4 * j]);
    accum[4 * j + 1] = fmaf(slab[4 * j + 1], y, accum[4 * j + 1]);
    accum[4 * j + 2] = fmaf(slab[4 * j + 2], x, accum[4 * j + 2]);
    accum[4 * j + 3] = fmaf(slab[4 * j + 3], y, accum[4 * j + 3]);
  }
}

/// Activation, one scale a token over the tile's 128 columns, fp8 rows.
__device__ __forceinline__ void store_requantised(const Params& p, Smem& smem, const Tile& tile,
                                                  float (&gate)[BLOCK_N / 2],
                                                  const float (&up)[BLOCK_N / 2], int thread) {
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int row = warp * 16 + lane / 4;  // weight row within 128, and eight further
  const ActivationValues act = activation_of(p.activation, tile.expert);
#pragma unroll
  for (int j = 0; j < BLOCK_N / 8; ++j) {
    if (j >= tile.groups()) break;
#pragma unroll
    for (int v = 0; v < 4; ++v) gate[4 * j + v] = activate(gate[4 * j + v], up[4 * j + v], act);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float amax = fmaxf(fabsf(gate[4 * j + c]), fabsf(gate[4 * j + 2 + c]));
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, offset));
      }
      if (lane < 4) smem.amax[warp][8 * j + 2 * lane + c] = amax;
    }
  }
  ptx::named_barrier_sync(1, kConsumerThreads);
  if (thread < tile.rows) {
    float amax = 0.0f;
#pragma unroll
    for (int w = 0; w < kConsumers * 4; ++w) amax = fmaxf(amax, smem.amax[w][thread]);
    const float scale = e4m3_scale(amax);
    smem.row_scale[thread] = scale;
    p.out_scale[(tile.row0 + thread) * p.out_scale_row_stride +
                tile.column_tile * p.out_scale_block_stride] = scale;
  }
  ptx::named_barrier_sync(1, kConsumerThreads);
#pragma unroll
  for (int j = 0; j < BLOCK_N / 8; ++j) {
    if (j >= tile.groups()) break;
    const int column = 8 * j + 2 * (lane % 4);
    const float s0 = smem.row_scale[column], s1 = smem.row_scale[column + 1];
    uint8_t* to = smem.staging + column * kStageRow + row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t q = e4m3x2_from_f32(__fdiv_rn(gate[4 * j + 2 * h], s0),
                                         __fdiv_rn(gate[4 * j + 2 * h + 1], s1));
      to[8 * h] = static_cast<uint8_t>(q);
      to[8 * h + kStageRow] = static_cast<uint8_t>(q >> 8);
    }
  }
  ptx::named_barrier_sync(1, kConsumerThreads);
  const int column0 = tile.column_tile * 128;
  for (int i = thread; i < tile.rows * 8; i += kConsumerThreads) {
    const int token = i / 8, column = i % 8 * 16;
    if (column0 + column >= p.n) continue;
    const int64_t at = static_cast<int64_t>(tile.row0 + token) * p.n + column0 + column;
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.out) + at) =
        *reinterpret_cast<const uint4*>(smem.staging + token * kStageRow + column);
  }
}

/// bf16 rows, 64 tokens of 64 columns at a time through shared memory.
__device__ __forceinline__ void store_bf16(const Params& p, Smem& smem, const Tile& tile,
                                           const float (&accum)[2][BLOCK_N / 2], int group,
                                           int thread) {
  const int lane = thread % kWarpSize, warp = thread / kWarpSize % 4, local = thread % 128;
  uint8_t* staging = smem.staging + group * 64 * kStageRow;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int first = 0; first < BLOCK_N / 8; first += 8) {
      if (first >= tile.groups()) break;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        if (first + j >= BLOCK_N / 8) break;
        // Matrices: rows 0-7 and 8-15 of eight tokens, then of the next eight.
        const int token = 8 * (j + lane / 16) + lane % 8, row = warp * 16 + lane / 8 % 2 * 8;
        uint32_t r[4] = {};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int at = 4 * (first + j + m / 2) + 2 * (m % 2);
          if (at + 1 < BLOCK_N / 2)
            r[m] = ptx::cvt_bf16x2_f32(accum[half][at], accum[half][at + 1]);
        }
        ptx::stmatrix_x4_trans(ptx::smem_address(staging + token * kStageRow + row * 2), r[0], r[1],
                               r[2], r[3]);
      }
      ptx::named_barrier_sync(2 + group, 128);
      const int column0 = tile.column_tile * 256 + half * 128 + group * 64;
      for (int i = local; i < 64 * 8; i += 128) {
        const int token = i / 8, column = i % 8 * 8;
        const int row = first * 8 + token;
        if (row >= tile.rows || column0 + column >= p.n) continue;
        const int64_t at = static_cast<int64_t>(tile.row0 + row) * p.n + column0 + column;
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + at) =
            *reinterpret_cast<const uint4*>(staging + token * kStageRow + column * 2);
      }
      ptx::named_barrier_sync(2 + group, 128);
    }
  }
}

/// Warpgroups 1 and 2: products, promotion and epilogue.
__device__ __forceinline__ void consume(const Params& p, Smem& smem, const Work& work, int thread) {
  const int lane = thread % kWarpSize, group = thread / 128;
  Ring ring;
  for (int item = work.first; item < work.count; item += work.stride) {
    const Tile tile(p, item, work.rank);
    float accum[2][BLOCK_N / 2] = {};
    const int groups = tile.groups();
    for (int step = 0; step < work.steps; ++step, ring.advance()) {
      ptx::mbarrier_wait(ptx::smem_address(&smem.full[ring.stage]), ring.phase);
      // cp.async writes through the generic proxy, wgmma reads through the async one.
      if constexpr (GATHER) ptx::fence_proxy_async();
      const uint32_t stage = ptx::smem_address(smem.stages[ring.stage]);
      const uint64_t tokens = wgmma::descriptor(stage + 2 * kHalfBytes);
      // NOTE: ahead of the products; between them their latency would leave the tensor cores waiting.
      Scales scales;
      scales.load(smem.scale[ring.stage], lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint64_t weights =
            wgmma::descriptor(stage + half * kHalfBytes + group * (kHalfBytes / 2));
        const float w_scale = smem.w_scale[ring.stage][half];
        if (kTailN < BLOCK_N && groups <= kTailN / 8) {
          accumulate<kTailN>(accum[half], weights, tokens, scales, w_scale);
        } else {
          accumulate<BLOCK_N>(accum[half], weights, tokens, scales, w_scale);
        }
      }
      __syncwarp();
      if (CLUSTER == 1 && lane == 0) {
        ptx::mbarrier_arrive(ptx::smem_address(&smem.empty[ring.stage]));
      } else if (lane < CLUSTER) {
        ptx::mbarrier_arrive_cluster(ptx::smem_address(&smem.empty[ring.stage]), lane);
      }
    }
    if constexpr (GATED) {
      store_requantised(p, smem, tile, accum[0], accum[1], thread);
    } else {
      store_bf16(p, smem, tile, accum, group, thread);
    }
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(128 + kConsumerThreads, 1)
        sm90_fp8_grouped_gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (threadIdx.x == 0) {
    if constexpr (!GATHER) ptx::prefetch_tensor_map(&p.a_map);
    ptx::prefetch_tensor_map(&p.w_map);
    for (int s = 0; s < NUM_STAGES; ++s) {
      ptx::mbarrier_init(ptx::smem_address(&smem.full[s]), kFullArrivals);
      ptx::mbarrier_init(ptx::smem_address(&smem.empty[s]), kConsumers * 4 * CLUSTER);
    }
    ptx::fence_mbarrier_init();
  }
  // The blocks of a cluster write to each other's barriers and shared memory: all must be there.
  CLUSTER > 1 ? ptx::cluster_sync() : __syncthreads();
  ptx::griddepcontrol_wait();
  const Work work{static_cast<int>(blockIdx.x) / CLUSTER, static_cast<int>(gridDim.x) / CLUSTER,
                  *p.num_tiles * p.num_column_tiles, ceil_div(p.k, 128),
                  CLUSTER > 1 ? static_cast<int>(ptx::cluster_rank()) : 0};
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      if (lane == 0) load_weights(p, smem, work);
    } else if (warp == 3) {
      load_scales(p, smem, work, lane);
    } else if constexpr (GATHER) {
      gather_tokens(p, smem, work, threadIdx.x - kWarpSize);
    } else {
      if (warp == 1 && lane == 0) load_tokens(p, smem, work);
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume(p, smem, work, threadIdx.x - 128);
  }
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
}
