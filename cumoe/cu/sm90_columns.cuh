// fp8 products of the Hopper grouped GEMMs with 64 weight rows as rows and up to kColumns tokens as columns.
//
// Each 128 of k is summed by wgmma and added times its scales in fp32 (two levels). A consumer has two
// such products on the way: one is added while the other runs. Then the epilogue that quantises; the
// one that rounds to bf16 is in sm90_store.cuh.
#pragma once

#include "sm90_scales.cuh"
#include "sm90_store.cuh"

namespace cumoe {

constexpr int kStageRow = 128 + 16;  // bytes; padded so that neighbouring tokens lie in other banks
constexpr int kTeams = GATED ? 1 : kConsumers;  // threads that share columns of the result
constexpr int kTeamThreads = kConsumerThreads / kTeams;
constexpr int kUnroll = 2;  // stages between which products overlap
constexpr int kRun = 32;    // columns of the epilogue that are worked on at once

static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 88, "n of the wgmma, in registers");

/// Rows on their way out and what they are quantised by, at the end of the room for chunks.
struct Requantised {
  uint8_t rows[kTeams][kColumns * kStageRow];
  BlockDivisor by_scale[kTeams][kColumns];
  float amax[kConsumers * 4][kColumns];
};

using Accumulators = float[2][kColumns / 2];  // of the parts of 64 weight rows

/// Activation, one scale a token over 128 columns, fp8 rows. With GATED both warpgroups have 64 of the
/// tile's 128 columns, else each has 128 of its own: a team.
__device__ __forceinline__ void store_requantised(const Params& p, Smem& smem, const Tile& tile,
                                                  Accumulators& y, int group, int thread) {
  static_assert(!ACTIVATED || sizeof(Requantised) <= sizeof(smem.chunks), "room for chunks");
  const int team = GATED ? 0 : group, member = GATED ? thread : thread % 128;
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  Requantised& to = reinterpret_cast<Requantised*>(&smem.chunks + 1)[-1];
  const auto meet = [&] { ptx::named_barrier_sync(GATED ? 3 : 1 + team, kTeamThreads); };
  const ActivationValues act = activation_of(p.activation, tile.expert);
  // NOTE: 32 columns at a time, tokens or not: long runs of independent arithmetic.
#pragma unroll
  for (int begin = 0; begin < kColumns; begin += kRun) {
    if (begin >= tile.rows) break;
    const int end = begin + kRun < kColumns ? begin + kRun : kColumns;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = begin / 2; i < end / 2; ++i) {
        y[part][i] = activate(y[part][i], y[GATED ? 1 : part][i], act);
      }
    }
#pragma unroll
    for (int i = begin / 4; i < end / 4; ++i) {
      float amax = 0.0f;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float* values = y[part] + i / 2 * 4 + i % 2;
        amax = fmaxf(amax, fmaxf(fabsf(values[0]), fabsf(values[2])));
      }
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, offset));
      }
      if (lane < 4) to.amax[warp][i / 2 * 8 + 2 * lane + i % 2] = amax;
    }
  }
  meet();
  const int block = GATED ? tile.column_tile : tile.column_tile * 2 + group;
  if (member < tile.rows) {
    float amax = 0.0f;
#pragma unroll
    for (int w = 0; w < kTeamThreads / kWarpSize; ++w) {
      amax = fmaxf(amax, to.amax[team * 4 + w][member]);
    }
    const float scale = block_scale(amax, to.by_scale[team][member]);
    if (block * 128 < p.n) {
      p.out_scale[(tile.row0 + member) * p.out_scale_row_stride +
                  block * p.out_scale_block_stride] = scale;
    }
  }
  meet();
#pragma unroll
  for (int i = 0; i < kColumns / 4; i += 2) {
    if (i * 4 % kRun == 0 && i * 4 >= tile.rows) break;
    const int token = i * 4 + 2 * (lane % 4);
    const BlockDivisor first = to.by_scale[team][token], second = to.by_scale[team][token + 1];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint8_t* row =
          to.rows[team] + token * kStageRow + part * 64 + member / kWarpSize * 16 + lane / 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* values = y[part] + 2 * i + 2 * h;
        const uint32_t q = e4m3x2_from_f32(first.divide(values[0]), second.divide(values[1]));
        row[8 * h] = static_cast<uint8_t>(q);
        row[8 * h + kStageRow] = static_cast<uint8_t>(q >> 8);
      }
    }
  }
  meet();
  for (int i = member; i < tile.rows * 8; i += kTeamThreads) {
    const int token = i / 8, column = block * 128 + i % 8 * 16;
    if (column >= p.n) continue;
    const int64_t at = static_cast<int64_t>(tile.row0 + token) * p.n + column;
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.out) + at) =
        *reinterpret_cast<const uint4*>(to.rows[team] + token * kStageRow + i % 8 * 16);
  }
  if constexpr (WHOLE_BLOCKS) meet();  // before a tile with tokens as rows is staged
}

/// A consumer's registers: of each part of 64 weight rows the sums and the product of 128 of k, and the
/// scales of a lane's tokens, unless apart times that of the weights. With GATED the parts are the same
/// rows of gate and of up, else those of one half.
template <int N>
struct Columns {
  static constexpr int kVectors = ceil_div(N, 16);  // of a lane's tokens
  Smem& smem;
  Stages& in;
  Accumulators& accum;
  const int lane, group;
  const uint32_t zero;  // unknown to the compiler
  float4 scales[kVectors];
  float2 weight_scale = {1.0f, 1.0f};  // of the parts
  float product[2][N / 2];

  __device__ __forceinline__ const float4* scales_of_stage() const {
    const float* row =
        smem.scale[in.ring.slot][kWeightScalesApart ? 0 : group] + lane % 4 * kScaleRow;
    return reinterpret_cast<const float4*>(row);
  }

  __device__ __forceinline__ void load_weight_scale() {
    if constexpr (kWeightScalesApart) {
      weight_scale = smem.weight_scale[in.ring.slot];
      if (!GATED) weight_scale.x = weight_scale.y = group == 0 ? weight_scale.x : weight_scale.y;
    }
  }

  __device__ __forceinline__ void multiply(int part) {
    const int half = GATED ? part : group, quarter = GATED ? group : part;
    const uint32_t weights = in.stage() + half * kHalfBytes + quarter * (kHalfBytes / 2);
    wgmma::fence();
    wgmma::mma_e4m3<N>(product[part], wgmma::descriptor(weights),
                       wgmma::descriptor(in.stage() + 2 * kHalfBytes), false);
    wgmma::commit();
  }

  /// Adds a product; with `load` the scales are replaced by those of the ring's stage as they are done
  /// with. NOTE: a load waits in line behind products already issued: long before it is needed.
  __device__ __forceinline__ void add(int part, bool load) {
    const float4* next = scales_of_stage();
    float weight = part == 0 ? weight_scale.x : weight_scale.y;
    if constexpr (kWeightScalesApart) {
      // NOTE: tied to the product, or ptxas multiplies by it, and so waits for the scales, between the
      // instructions that issue the next one.
      product[part][0] = ptx::opaque(product[part][0]);
      weight =
          __uint_as_float(__float_as_uint(weight) | (__float_as_uint(product[part][0]) & zero));
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float4 scale = scales[v];
#pragma unroll
      for (int i = 8 * v; i < 8 * v + 8 && i < N / 2; ++i) {
        const int column = i % 8 / 4 * 2 + i % 2;
        const float token = column == 0   ? scale.x
                            : column == 1 ? scale.y
                            : column == 2 ? scale.z
                                          : scale.w;
        const float by = kWeightScalesApart ? token * weight : token;
        accum[part][i] = fmaf(product[part][i], by, accum[part][i]);
      }
      if (load) scales[v] = next[v];
    }
    if (load) load_weight_scale();
  }

  /// Before the first stage of a tile, which has come.
  __device__ __forceinline__ void begin() {
    const float4* first = scales_of_stage();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) scales[v] = first[v];
    load_weight_scale();
  }

  /// STAGES stages, of which each product runs while the one before it is added; `more` follow. The last
  /// stage of a tile is not released.
  template <int STAGES>
  __device__ __forceinline__ void run(bool more) {
    multiply(0);
    multiply(1);
#pragma unroll
    for (int s = 1; s <= STAGES; ++s) {
      const int previous = in.ring.slot;
      in.ring.advance();
      wgmma::wait<1>();
      add(0, false);
      if (s < STAGES) {
        in.wait();
        multiply(0);
        wgmma::wait<1>();
      } else {
        if (more) in.wait();
        wgmma::wait<0>();
      }
      if (s < STAGES || more) in.release(previous, lane);
      add(1, s < STAGES || more);
      if (s < STAGES) multiply(1);
    }
  }

  /// All of a tile, of which the first stage has come.
  __device__ __forceinline__ void run_all(int steps) {
    begin();
    int left = steps;
    for (; left >= kUnroll; left -= kUnroll) run<kUnroll>(left > kUnroll);
    for (; left > 0; --left) run<1>(left > 1);
  }
};

/// Sums the products of a tile of at most N tokens, over N or fewer columns. The last stage is not released.
template <int N>
__device__ __forceinline__ void sum_columns(const Params& p, Smem& smem, int steps, Stages& in,
                                            Accumulators& accum, int group, int lane) {
  constexpr int kFewer = N > 64 ? 64 : N > 32 ? 32 : 0;
  if constexpr (kFewer > 0) {
    if (smem.tiles[in.ring.slot].z <= kFewer) {
      return sum_columns<kFewer>(p, smem, steps, in, accum, group, lane);
    }
  }
  Columns<N> columns{smem, in, accum, lane, group, static_cast<uint32_t>(p.w_scale_rows) >> 31};
  columns.run_all(steps);
}

/// A tile of which the tokens are columns: products and epilogue.
__device__ __forceinline__ void consume_columns(const Params& p, Smem& smem, int steps, Stages& in,
                                                Ring<NUM_CHUNKS>& chunks, int group, int thread) {
  const int lane = thread % kWarpSize;
  Accumulators accum = {};
  sum_columns<kColumns>(p, smem, steps, in, accum, group, lane);
  const Tile tile(smem.tiles[in.ring.previous()]);
  in.release(in.ring.previous(), lane, tile.rows > 0);
  if constexpr (ACTIVATED) {
    store_requantised(p, smem, tile, accum, group, ptx::opaque(thread));
  } else {
    store_bf16(p, smem, tile, accum, chunks, group, ptx::opaque(thread));
  }
}

}  // namespace cumoe
