// How the Hopper grouped GEMMs hand over finished rows: chunks of 64 columns of 32 tokens (64 with
// WHOLE_BLOCKS), from a consumer to the warp that writes it to its rows, or to the warpgroup itself.
#pragma once

#include "sm90_grouped.cuh"

namespace cumoe {

/// Where 16-byte piece `piece` of a token's 128 bytes lies in a chunk.
__device__ __forceinline__ int chunk_offset(int token, int piece) {
  return token * 128 + ((piece ^ token % 8) << 4);
}

/// 16 columns of one byte, from pairs of columns eight apart to their order.
__device__ __forceinline__ uint4 columns_in_order(uint4 v) {
  return make_uint4(__byte_perm(v.x, v.y, 0x6420), __byte_perm(v.z, v.w, 0x6420),
                    __byte_perm(v.x, v.y, 0x7531), __byte_perm(v.z, v.w, 0x7531));
}

/// Where piece `piece` of a token's 64 bytes lies: a chunk half full, neighbouring tokens in other banks.
__device__ __forceinline__ int half_chunk_offset(int token, int piece) {
  return chunk_offset(token, piece + token % 2 * 4);
}

/// `threads` threads copy a chunk to its rows: tokens from `token0` of the tile, columns from `column0`.
/// Columns of one byte fill half a chunk, in the pairs that stmatrix takes.
template <int ELEM_BYTES = 2>
__device__ __forceinline__ void copy_chunk(const Params& p, const Tile& tile, const uint8_t* chunk,
                                           int token0, int column0, int thread, int threads) {
  constexpr int kPieces = 64 * ELEM_BYTES / 16;  // of a token's columns
  const int piece = thread % kPieces, column = column0 + piece * (16 / ELEM_BYTES);
  if (column >= p.n) return;
  uint8_t* out = static_cast<uint8_t*>(p.out) +
                 (static_cast<int64_t>(tile.row0 + token0) * p.n + column) * ELEM_BYTES;
#pragma unroll 4
  for (int token = thread / kPieces; token < kChunkTokens; token += threads / kPieces) {
    if (token0 + token >= tile.rows) break;
    const int at = ELEM_BYTES == 1 ? half_chunk_offset(token, piece) : chunk_offset(token, piece);
    const uint4 v = *reinterpret_cast<const uint4*>(chunk + at);
    *reinterpret_cast<uint4*>(out + static_cast<int64_t>(token) * p.n * ELEM_BYTES) =
        ELEM_BYTES == 1 ? columns_in_order(v) : v;
  }
}

/// One warp takes a chunk to its rows: by TMA, if it is full.
template <int ELEM_BYTES = 2>
__device__ __forceinline__ void write_chunk(const Params& p, const Tile& tile, const uint8_t* chunk,
                                            int token0, int column0, int lane) {
  if (ELEM_BYTES == 1 || token0 + kChunkTokens > tile.rows) {
    copy_chunk<ELEM_BYTES>(p, tile, chunk, token0, column0, lane, kWarpSize);
  } else if (column0 < p.n && ptx::elect_one()) {
    ptx::tma_store_2d(&p.out_map, ptx::smem_address(chunk), column0 * ELEM_BYTES,
                      tile.row0 + token0);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

constexpr int kParts = GATED ? 1 : 2;  // of finished rows

/// Column of the output where part `part` of a group's rows begins: gated, its one part; else of two.
__device__ __forceinline__ int first_column(const Tile& tile, int part, int group) {
  return GATED ? tile.column_tile * 128 + group * 64
               : tile.column_tile * 256 + group * 128 + part * 64;
}

/// A warpgroup rounds its rows, times a scale, to bf16 and hands them over in chunks: with GATED the
/// activation of its two parts, else both parts.
template <int N>
__device__ __forceinline__ void store_bf16(const Params& p, Shared& smem, const Tile& tile,
                                           const float (&accum)[2][N], Ring<NUM_CHUNKS>& ring,
                                           int group, int thread, float scale = 1.0f) {
  const int lane = thread % kWarpSize, warp = thread / kWarpSize % 4;
  const ActivationValues act =
      ACTIVATED ? activation_of(p.activation, tile.expert) : ActivationValues{};
  const auto value = [&](int part, int i) {
    const float x = accum[part][i] * scale;
    return ACTIVATED ? activate(x, GATED ? accum[1][i] * scale : x, act) : x;
  };
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int token0 = 0; token0 < 2 * N; token0 += kChunkTokens) {
      if (token0 >= tile.rows) break;
      uint8_t* chunk = smem.chunks[group][ring.slot];
      if constexpr (kWriters) ring.wait(smem.drained[group], ring.phase ^ 1);
#pragma unroll
      for (int j = 0; j < kChunkTokens / 8; j += 2) {
        if (token0 + 8 * j >= 2 * N) break;
        // Matrices: rows 0-7 and 8-15 of eight tokens, then of the next eight.
        const int token = 8 * (j + lane / 16) + lane % 8, piece = warp * 2 + lane / 8 % 2;
        uint32_t r[4] = {};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int at = 4 * (token0 / 8 + j + m / 2) + 2 * (m % 2);
          if (at + 1 < N) {
            r[m] = ptx::cvt_bf16x2_f32(value(part, at), value(part, at + 1));
          }
        }
        ptx::stmatrix_x4_trans(ptx::smem_address(chunk + chunk_offset(token, piece)), r[0], r[1],
                               r[2], r[3]);
      }
      if constexpr (kWriters) {
        ptx::fence_proxy_async();
        arrive_warp(smem.staged[group][ring.slot], lane);
      } else {
        ptx::named_barrier_sync(1 + group, 128);
        copy_chunk(p, tile, chunk, token0, first_column(tile, part, group), thread % 128, 128);
        ptx::named_barrier_sync(1 + group, 128);
      }
      ring.advance();
    }
  }
}

/// One warp writes what consumer `group` hands over of a tile.
template <int ELEM_BYTES = 2>
__device__ __forceinline__ void write_tile(const Params& p, Shared& smem, const Tile& tile,
                                           Ring<NUM_CHUNKS>& ring, int group, int lane) {
  for (int part = 0; part < kParts; ++part) {
    for (int token0 = 0; token0 < tile.rows; token0 += kChunkTokens, ring.advance()) {
      ring.wait(smem.staged[group], ring.phase);
      write_chunk<ELEM_BYTES>(p, tile, smem.chunks[group][ring.slot], token0,
                              first_column(tile, part, group), lane);
      arrive_warp(smem.drained[group][ring.slot], lane);
    }
  }
}

/// One warp writes what consumer `group` hands over.
template <int ELEM_BYTES = 2>
__device__ __forceinline__ void write_rows(const Params& p, Shared& smem, const Work& work,
                                           int group, int lane) {
  Ring<NUM_CHUNKS> ring;
  for (Items<> items(smem, work, lane); items.left(); items.next()) {
    write_tile<ELEM_BYTES>(p, smem, Tile(p, items.item, work.rank), ring, group, lane);
  }
}

}  // namespace cumoe
