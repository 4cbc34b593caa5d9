// sm90_fp8_rows_grouped_gemm: sm90_fp8_grouped_gemm for experts with hundreds of tokens.
//
// out[r, j] = epilogue(sum over k-blocks b of 128 of
//                      a_scale[source(r), b] * w_scale[block(j), b] * (a[source(r), b] . w[j, b]))
//
// Layout, roles and barriers: sm90_grouped.cuh; warp 3 hands on the scales of a stage. Here tokens are the
// 64 rows of the wgmma and 128 columns its n: fewer bytes of shared memory for a product, and two
// scales a thread instead of one for each column, but tokens come in steps of 64. A block has 128
// tokens, 64 a consumer, and 256 weight rows in two parts. While one consumer adds a product, which
// is summed over 128 of k, times its scales in fp32, the other's runs. A tile of which a block gets up
// to 88 tokens is multiplied as in sm90_fp8_grouped_gemm, with tokens as columns.
//
// From -D   those of sm90_grouped.cuh; ACTIVATED writes fp8 with 1 x 128 scales, else bf16
#define WHOLE_BLOCKS 1
#include "sm90_columns.cuh"

using namespace cumoe;

constexpr int kTokens = BLOCK_N / kConsumers;  // of a consumer
constexpr int kWarpTokens = kTokens / 4;       // of one of its warps
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

static_assert(BLOCK_N == 128, "m of the wgmma, twice");
static_assert(!ACTIVATED || kTokens * kStageRow <= NUM_CHUNKS * kChunkBytes, "staging");
static_assert(!ACTIVATED ||
                  sizeof(Requantised::amax) + kTokens * kStageRow <= NUM_CHUNKS * kChunkBytes,
              "maxima of columns are not in the way of rows that are still staged");

using Sums = float[2][64];  // of two parts of 128 columns

/// Quantises and stores one part, each warp its own tokens: 128 columns, one scale a token. Four lanes have
/// a token; a lane's values 4 j + 2 h + c are of token lane / 4 + 8 h of its warp.
__device__ __forceinline__ void store_quantised(const Params& p, Smem& smem, const Tile& tile,
                                                float (&y)[64], int block, int group, int thread) {
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int rows = min(tile.rows - group * kTokens, kTokens);
  const int row0 = tile.row0 + group * kTokens;
  uint8_t* staging = smem.chunks[group][0];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = warp * kWarpTokens + lane / 4 + 8 * h;
    float amax = 0.0f;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      amax = fmaxf(amax, fmaxf(fabsf(y[4 * j + 2 * h]), fabsf(y[4 * j + 2 * h + 1])));
    }
    amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, 2));
    BlockDivisor by;
    const float scale = block_scale(amax, by);
    if (lane % 4 == 0 && token < rows && block * 128 < p.n) {
      p.out_scale[(row0 + token) * p.out_scale_row_stride + block * p.out_scale_block_stride] =
          scale;
    }
    uint8_t* to = staging + token * kStageRow + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const uint32_t q =
          e4m3x2_from_f32(by.divide(y[4 * j + 2 * h]), by.divide(y[4 * j + 2 * h + 1]));
      *reinterpret_cast<uint16_t*>(to + 8 * j) = static_cast<uint16_t>(q);
    }
  }
  __syncwarp();
  const int column = block * 128 + lane % 8 * 16;
  const int last = min(rows, (warp + 1) * kWarpTokens);
  if (column < p.n) {
    for (int token = warp * kWarpTokens + lane / 8; token < last; token += 4) {
      const int64_t at = static_cast<int64_t>(row0 + token) * p.n + column;
      *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.out) + at) =
          *reinterpret_cast<const uint4*>(staging + token * kStageRow + lane % 8 * 16);
    }
  }
  __syncwarp();  // before the next part, or tile, is staged
}

/// Activation and quantisation: with GATED of gate and up, else of each part.
__device__ __forceinline__ void store_activated(const Params& p, Smem& smem, const Tile& tile,
                                                Sums& y, int group, int thread) {
  const ActivationValues act = activation_of(p.activation, tile.expert);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < 64; ++i) y[part][i] = activate(y[part][i], y[GATED ? 1 : part][i], act);
    const int block = GATED ? tile.column_tile : tile.column_tile * 2 + part;
    store_quantised(p, smem, tile, y[part], block, group, thread);
  }
}

/// Rounds to bf16 and hands chunks of 64 columns of the consumer's tokens to its writer.
__device__ __forceinline__ void store_rounded(const Params& p, Smem& smem, const Tile& tile,
                                              const Sums& y, Ring<NUM_CHUNKS>& ring, int group,
                                              int thread) {
  const int lane = thread % kWarpSize, token = thread / kWarpSize * kWarpTokens + lane / 4;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    uint8_t* chunk = smem.chunks[group][ring.slot];
    if constexpr (kWriters) ring.wait(smem.drained[group], ring.phase ^ 1);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* values = y[c / 2] + (c % 2 * 8 + j) * 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint8_t* to = chunk + chunk_offset(token + 8 * h, j) + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(to) = ptx::cvt_bf16x2_f32(values[2 * h], values[2 * h + 1]);
      }
    }
    if constexpr (kWriters) {
      ptx::fence_proxy_async();
      arrive_warp(smem.staged[group][ring.slot], lane);
    } else {
      ptx::named_barrier_sync(1 + group, 128);
      copy_chunk(p, tile, chunk, group * kTokens, tile.column_tile * 256 + c * 64, thread, 128);
      ptx::named_barrier_sync(1 + group, 128);
    }
    ring.advance();
  }
}

/// One warp writes what consumer `group` hands over.
__device__ __forceinline__ void write_chunks(const Params& p, Smem& smem, const Work& work,
                                             int group, int lane) {
  Ring<NUM_CHUNKS> ring;
  for (Items<> items(smem, work, lane); items.left(); items.next()) {
    const Tile tile(p, items.item, work.rank);
    if (tile.has_columns()) {
      write_tile(p, smem, tile, ring, group, lane);
      continue;
    }
    for (int c = 0; c < 4; ++c, ring.advance()) {
      ring.wait(smem.staged[group], ring.phase);
      write_chunk(p, tile, smem.chunks[group][ring.slot], group * kTokens,
                  tile.column_tile * 256 + c * 64, lane);
      arrive_warp(smem.drained[group][ring.slot], lane);
    }
  }
}

/// Adds a product times the scales of this lane's two tokens.
__device__ __forceinline__ void add(float (&sum)[64], const float (&product)[64], float2 by) {
#pragma unroll
  for (int i = 0; i < 64; ++i) sum[i] = fmaf(product[i], i % 4 < 2 ? by.x : by.y, sum[i]);
}

/// What a consumer needs to know of a stage.
struct Operands {
  uint32_t tokens, weights;  // descriptors of its tokens and of the first part
  float2 token, weight;      // scales of this lane's two tokens and of the parts

  __device__ __forceinline__ Operands(const Smem& smem, const Stages& in, int group, int row) {
    tokens = wgmma::descriptor(in.stage() + 2 * kHalfBytes + group * (kTokens * 128));
    weights = wgmma::descriptor(in.stage());
    const float* scale = smem.scale[in.ring.slot][0];
    token = make_float2(scale[row], scale[row + 8]);
    // NOTE: row >> 30, a zero, keeps ptxas from waiting for the load to have it in uniform registers.
    weight = smem.weight_scale[in.ring.slot + (row >> 30)];
  }
  __device__ __forceinline__ float2 scales(int part) const {
    const float of_part = part == 0 ? weight.x : weight.y;
    return make_float2(token.x * of_part, token.y * of_part);
  }
};

/// Starts a product of 128 of k.
__device__ __forceinline__ void multiply(float (&product)[64], uint32_t tokens, uint32_t weights) {
  wgmma::fence();
  wgmma::mma_e4m3<128>(product, tokens, weights, false);
  wgmma::commit();
}

/// Warpgroups 1 and 2: products, promotion and epilogue.
__device__ __forceinline__ void consume(const Params& p, Smem& smem, const Work& work, int thread) {
  const int lane = thread % kWarpSize, group = __shfl_sync(kFullMask, thread / 128, 0);
  Stages in(smem, lane);
  Ring<NUM_CHUNKS> chunks;
  for (Items<> items(smem, work, lane); items.left(); items.next()) {
    in.wait();
    if (in.skip(smem, lane)) continue;
    const Tile tile(smem.tiles[in.ring.slot]);
    if (tile.has_columns()) {
      consume_columns(p, smem, work.steps, in, chunks, group, thread);
      continue;
    }
    const int row = ptx::opaque(thread) / kWarpSize * 16 + lane / 4;  // of the block's tokens
    Sums sum;
    float product[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[0][i] = sum[1][i] = 0.0f;
    Operands of(smem, in, group, row);
#pragma unroll 1
    for (int left = work.steps; left > 0; --left) {
      multiply(product, of.tokens, of.weights);
      const float2 by[2] = {of.scales(0), of.scales(1)};
      wgmma::wait<0>();
      add(sum[0], product, by[0]);
      multiply(product, of.tokens, of.weights + kHalfBytes / 16);
      const int slot = in.ring.slot;
      in.ring.advance();
      if (left > 1) {  // while the product runs
        in.wait();
        of = Operands(smem, in, group, row);
      }
      wgmma::wait<0>();
      in.release(slot, lane);
      add(sum[1], product, by[1]);
    }
    if constexpr (ACTIVATED) {
      store_activated(p, smem, tile, sum, group, ptx::opaque(thread) % 128);
    } else {
      store_rounded(p, smem, tile, sum, chunks, group, ptx::opaque(thread) % 128);
    }
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(128 + kConsumerThreads, 1)
        sm90_fp8_rows_grouped_gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Work work = start_block(p, smem, 1, GATHER || !ACTIVATED ? 3 : 1);
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      if (ptx::elect_one()) load_by_tma(p, smem, work);
    } else if (warp == 3) {
      load_scales(p, smem, work, lane);
    } else if constexpr (GATHER) {
      gather_tokens<kGatherThreads>(p, smem, smem.landed, work, threadIdx.x - kWarpSize);
    } else if constexpr (!ACTIVATED) {
      write_chunks(p, smem, work, warp - 1, lane);
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume(p, smem, work, threadIdx.x - 128);
  }
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
}
