// sm90_grouped_gemm: every expert's rows times that expert's weight, by TMA and wgmma, in bf16 or in e4m3
// with one scale for a tensor.
//
// out[r, j] = epilogue(a[source(r)] . w[j])                                        bf16
// out[r, j] = epilogue((a[source(r)] . w[j]) * (a_scale * w_scale) * weight(r))    e4m3
//
// One rounding, to bf16 or, of an activation of e4m3 operands, to e4m3(y / out_scale). A scale is one of the
// expert: of w one for each half with GATED. weight(r) is that of the row's token, or nothing (kNoType).
//
// Layout, roles and barriers: sm90_grouped.cuh. The sums stay in the accumulators for the whole of k,
// one product of a stage always in flight behind the running one.
// NOTE: wgmma of e4m3 cuts its sum to 14 bits each 32 of k, so it loses up to 2^-13 of it each time.
//
// From -D   TYPE (kBf16 kE4m3Tensor) WEIGHTS_TYPE (kNoType kBf16 kF32) and those of sm90_grouped.cuh
#include "sm90_grouped.cuh"
#include "sm90_store.cuh"

using namespace cumoe;

constexpr int kGatherThreads = 3 * kWarpSize;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr bool kFp8 = TYPE == kE4m3Tensor, kFp8Rows = kFp8 && ACTIVATED,
               kWeighted = WEIGHTS_TYPE != kNoType;
constexpr int kRowElemBytes = kFp8Rows ? 1 : 2;

static_assert(BLOCK_N % 8 == 0 && BLOCK_N >= 8 && BLOCK_N <= 176, "n of the wgmma, in registers");
static_assert(TYPE == kBf16 || TYPE == kE4m3Tensor, "operands without scales of blocks");
static_assert(!kWeighted || kFp8Rows, "a token's weight comes before the activation");

/// What the sums of an expert are multiplied by: of each part, gate and up with GATED.
__device__ __forceinline__ float2 scale_of_parts(const Params& p, int expert) {
  const float a = p.a_scale[expert * p.a_scale_row_stride];
  const float* w = p.w_scale + expert * p.w_scale_rows;
  return make_float2(a * w[p.first_scale_row], a * w[p.second_scale_row]);
}

/// The weights of a tile's tokens, 32 at a time, one on each lane.
struct TokenWeights {
  static constexpr int kCount = kWeighted ? ceil_div(BLOCK_N, kWarpSize) : 1;
  float of_lane[kCount];

  __device__ __forceinline__ TokenWeights(const Params& p, const Tile& tile, int lane) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      of_lane[i] = 1.0f;
      const int row = i * kWarpSize + lane;
      if (kWeighted && row < tile.rows && tile.expert < p.num_weighted) {
        const int64_t token = p.token_idx[tile.row0 + row];
        of_lane[i] = load_element<WEIGHTS_TYPE>(p.token_weights, token * p.token_weights_columns);
      }
    }
  }
  /// That of token `first + lane`, of the tile; `first` is a multiple of 32.
  __device__ __forceinline__ float of(int first, int lane) const {
    return kWeighted ? __shfl_sync(kFullMask, of_lane[first / kWarpSize], lane) : 1.0f;
  }
};

/// A warpgroup's activation as e4m3 with the expert's scale, handed over in chunks as store_bf16 does it. Two
/// columns eight apart, which a thread has, are one 16-bit element of stmatrix (columns_in_order).
__device__ __forceinline__ void store_e4m3(const Params& p, Shared& smem, const Tile& tile,
                                           const float (&accum)[2][BLOCK_N / 2],
                                           Ring<NUM_CHUNKS>& ring, int group, int thread) {
  const int lane = thread % kWarpSize, warp = thread / kWarpSize % 4;
  const ActivationValues act = activation_of(p.activation, tile.expert);
  const float2 scale = scale_of_parts(p, tile.expert);
  const E4m3Divisor divisor(p.out_scale[tile.expert * p.out_scale_row_stride]);
  const TokenWeights weights(p, tile, lane);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int token0 = 0; token0 < BLOCK_N; token0 += kChunkTokens) {
      if (token0 >= tile.rows) break;
      uint8_t* chunk = smem.chunks[group][ring.slot];
      if constexpr (kWriters) ring.wait(smem.drained[group], ring.phase ^ 1);
      uint32_t r[4] = {};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int at = 4 * (token0 / 8 + m);
        if (at >= BLOCK_N / 2) break;
        const int from = 8 * m + 2 * (lane % 4);
        const float weight[2] = {weights.of(token0, from), weights.of(token0, from + 1)};
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = accum[part][at + i] * (part == 0 ? scale.x : scale.y) * weight[i % 2];
          y[i] = activate(x, GATED ? accum[1][at + i] * scale.y * weight[i % 2] : x, act);
        }
        divisor.divide(y);
        r[m] = e4m3x2_from_f32(y[0], y[2]) | e4m3x2_from_f32(y[1], y[3]) << 16;
      }
      ptx::stmatrix_x4_trans(ptx::smem_address(chunk + half_chunk_offset(lane, warp)), r[0], r[1],
                             r[2], r[3]);
      if constexpr (kWriters) {
        arrive_warp(smem.staged[group][ring.slot], lane);
      } else {
        ptx::named_barrier_sync(1 + group, 128);
        copy_chunk<kRowElemBytes>(p, tile, chunk, token0, first_column(tile, part, group),
                                  thread % 128, 128);
        ptx::named_barrier_sync(1 + group, 128);
      }
      ring.advance();
    }
  }
}

/// Adds the products of a tile of `rows` tokens, over N or fewer columns. The last stage is not released.
template <int N>
__device__ __forceinline__ void sum_products(float (&accum)[2][BLOCK_N / 2], Stages& in, int steps,
                                             int rows, int group, int lane) {
  constexpr int kStep = N > 128 ? 16 : 32, kFewer = (N - 1) / kStep * kStep;
  if constexpr (kFewer > 0) {
    if (rows <= kFewer) return sum_products<kFewer>(accum, in, steps, rows, group, lane);
  }
  // Parts: the same rows of gate and up with GATED, else all rows of one half.
  const int group_bytes = GATED ? kHalfBytes / 2 : kHalfBytes;
  const int part_bytes = GATED ? kHalfBytes : kHalfBytes / 2;
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    in.wait();
    if constexpr (GATHER) ptx::fence_proxy_async();
    const uint32_t weights = in.stage() + group * group_bytes;
    const uint32_t tokens = wgmma::descriptor(in.stage() + 2 * kHalfBytes);
    wgmma::fence();
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t of_part = wgmma::descriptor(weights + part * part_bytes);
      float (&sums)[N / 2] = reinterpret_cast<float (&)[N / 2]>(accum[part]);
      if constexpr (kFp8) {
        wgmma::mma_e4m3<N>(sums, of_part, tokens, true);
      } else {
        wgmma::mma_bf16<N>(sums, of_part, tokens, true);
      }
    }
    wgmma::commit();
    wgmma::wait<1>();
    if (left < steps) in.release(in.ring.previous(), lane);
    in.ring.advance();
  }
  wgmma::wait<0>();
}

/// Warpgroups 1 and 2: products and epilogue.
__device__ __forceinline__ void consume(const Params& p, Shared& smem, const Work& work,
                                        int thread) {
  const int lane = thread % kWarpSize, group = __shfl_sync(kFullMask, thread / 128, 0);
  Stages in(smem, lane);
  Ring<NUM_CHUNKS> chunks;
  for (Items<> items(smem, work, lane); items.left(); items.next()) {
    in.wait();
    if (in.skip(smem, lane)) continue;
    float accum[2][BLOCK_N / 2] = {};
    const int rows = smem.tiles[in.ring.slot].z;
    sum_products<BLOCK_N>(accum, in, work.steps, rows, group, lane);
    const Tile tile(smem.tiles[in.ring.previous()]);
    in.release(in.ring.previous(), lane, tile.rows > 0);
    if constexpr (kFp8Rows) {
      store_e4m3(p, smem, tile, accum, chunks, group, ptx::opaque(thread));
    } else {
      const float scale = kFp8 ? scale_of_parts(p, tile.expert).x : 1.0f;
      store_bf16(p, smem, tile, accum, chunks, group, ptx::opaque(thread), scale);
    }
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(128 + kConsumerThreads, 1)
        sm90_grouped_gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  Shared& smem = *reinterpret_cast<Shared*>(smem_bytes);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Work work = start_block(p, smem, GATHER ? kGatherThreads : 0, GATHER ? 3 : 2);
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      if (ptx::elect_one()) load_by_tma(p, smem, work);
    } else if constexpr (GATHER) {
      gather_tokens<kGatherThreads>(p, smem, smem.full, work, threadIdx.x - kWarpSize);
    } else {
      if (warp < 3) write_rows<kRowElemBytes>(p, smem, work, warp - 1, lane);
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume(p, smem, work, threadIdx.x - 128);
  }
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
}
