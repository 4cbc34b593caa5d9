// The scales of the fp8 Hopper kernels: one warp brings those of a stage's tokens and weights to shared memory.
#pragma once

#include "sm90_grouped.cuh"

namespace cumoe {

constexpr int kGatherThreads = 2 * kWarpSize;
// Scales of a stage's tokens as columns: [column % 8 / 2][column / 8][column % 2], four rows in other banks.
constexpr int kScaleRow = (ceil_div(kColumns, 16) | 1) * 4;  // floats
constexpr bool kWeightScalesApart =
    GATED || WHOLE_BLOCKS;  // else there are tokens' times each half's
constexpr int kScaleSets = kWeightScalesApart ? 1 : 2;
constexpr int kScaleFloats = WHOLE_BLOCKS ? BLOCK_N : 4 * kScaleRow;

static_assert(4 * kScaleRow <= kScaleFloats, "either order of the scales");

struct Smem : Shared {
  float scale[NUM_STAGES][kScaleSets][kScaleFloats];  // of the tokens
  float2 weight_scale[NUM_STAGES];                    // of the two halves
  // Gathered tokens, of which the warp of the scales tells the consumers.
  uint64_t landed[NUM_STAGES];

  __device__ __forceinline__ void init(int arrivals, int helpers) {
    Shared::init(arrivals, helpers);
    for (int s = 0; s < NUM_STAGES; ++s) {
      ptx::mbarrier_init(ptx::smem_address(&landed[s]), kGatherThreads);
    }
    ptx::fence_mbarrier_init();
  }
};

/// Loads four scales, `stride` apart, of which those from `left` on are zeros; with `vectors` as one.
__device__ __forceinline__ float4 load_four_scales(const float* from, int64_t stride, int left,
                                                   bool vectors) {
  if (vectors && left >= 4) return *reinterpret_cast<const float4*>(from);
  float four[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = i < left ? from[i * stride] : 0.0f;
  return make_float4(four[0], four[1], four[2], four[3]);
}

/// Leaves the scale of a token, which is a column, in a stage; `weights` are those of the two halves.
__device__ __forceinline__ void put_column_scale(Smem& smem, int slot, int token, float scale,
                                                 float2 weights) {
  if (token >= kColumns) return;
  const int at = token % 8 / 2 * kScaleRow + token / 8 * 2 + token % 2;
#pragma unroll
  for (int h = 0; h < kScaleSets; ++h) {
    const float weight = kWeightScalesApart ? 1.0f : h == 0 ? weights.x : weights.y;
    smem.scale[slot][h][at] = scale * weight;
  }
}

/// One warp: the scales of every stage; then gathered tokens are announced, too. Four stages are loaded at
/// once: a load of one float in each of 32 rows keeps the operands of wgmma waiting as long as of four.
__device__ __forceinline__ void load_scales(const Params& p, Smem& smem, const Work& work,
                                            int lane) {
  constexpr int kPerLane = ceil_div(BLOCK_N, kWarpSize);
  const bool vectors = p.a_scale_block_stride == 1 && p.a_scale_row_stride % 4 == 0 &&
                       reinterpret_cast<uint64_t>(p.a_scale) % 16 == 0;
  StageRing ring;
  for (Items<> items(smem, work, lane); items.left(); items.next()) {
    const Tile tile(p, items.item, work.rank);
    int row[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int token = lane + i * kWarpSize;
      row[i] = tile.row0 + (token < tile.rows ? token : 0);
      if constexpr (GATHER) row[i] = max(p.token_idx[row[i]], 0);
    }
    // Weights past the matrix, or of no tile, are zeros: any scale will do.
    const int first = lane % 2 == 0 ? p.first_scale_row : p.second_scale_row;
    const int block = min(first + max(tile.column_tile, 0) * (GATED ? 1 : 2), p.w_scale_rows - 1);
    const uint32_t first_weight = (tile.expert * p.w_scale_rows + block) * work.steps;
    float4 scales[kPerLane];
    float weight;  // of half lane % 2 and stage lane / 2
    const auto load = [&](int step) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int64_t at = row[i] * p.a_scale_row_stride + step * p.a_scale_block_stride;
        scales[i] =
            load_four_scales(p.a_scale + at, p.a_scale_block_stride, work.steps - step, vectors);
      }
      const int of = step + lane / 2;
      weight = of < work.steps ? p.w_scale[first_weight + of] : 0.0f;
    };
    load(0);
    const int stages = tile.stages(work.steps);
    for (int step = 0; step < stages; step += 4) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (step + s >= stages) break;
        const auto at = [s](const float4& v) {
          return s == 0 ? v.x : s == 1 ? v.y : s == 2 ? v.z : v.w;
        };
        const float2 weights = {__shfl_sync(kFullMask, weight, 2 * s),
                                __shfl_sync(kFullMask, weight, 2 * s + 1)};
        ring.wait(smem.empty, ring.phase ^ 1);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          const int token = lane + i * kWarpSize;
          if (tile.has_columns()) {
            put_column_scale(smem, ring.slot, token, at(scales[i]), weights);
          } else {
            smem.scale[ring.slot][0][token] = at(scales[i]);
          }
        }
        if (lane == 0) smem.weight_scale[ring.slot] = weights;
        if (s == 3) load(step + 4);
        if constexpr (GATHER) {
          ring.wait(smem.landed, ring.phase);
          ptx::fence_proxy_async();
        }
        arrive_warp(smem.full[ring.slot], lane);
        ring.advance();
      }
    }
  }
}

}  // namespace cumoe
