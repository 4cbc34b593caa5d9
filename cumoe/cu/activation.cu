// activation: the activation on its own, with or without requantisation to fp8.
//
// y[r, c] = activate(gate[r, c], up[r, c]), c < intermediate_size; fp8 output takes one scale for each row
// and 128 columns (scale and rounding as in quantize_fp8_block).
//
// Unit      ROWS rows by 128 columns on 8 lanes, a lane holding 16 neighbouring columns of each row. All
//           loads of a unit are issued before the first is used; the maximum of a scale block is three
//           shuffles, so nothing waits for a block barrier. ROWS changes no bit of the result.
// Grid      persistent; strides over units, the blocks of a row group next to each other.
// Rows      up to *num_held_rows, which the device knows; rows whose token_idx is -1 are padding and are
//           neither read nor written.
// Silu      e4m3 to e4m3, most of all a matter of instructions, has a shorter way: see silu_row.
// From -D   INPUT_TYPE OUTPUT_TYPE GATED (x has gate and up) INTERLEAVED (0: in halves; 1: gate, up, gate,
//           up, ...; 2: up first) SILU (the activation is silu(gate) * up) ROWS BLOCKS_PER_SM ACTIVATION
#include "activation.cuh"
#include "vec.cuh"

using namespace cumoe;

struct Params {
  const uint8_t* x;      // (num_rows, kSides * intermediate_size)
  const float* x_scale;  // (num_rows, kSides * num_blocks), halves as in x; e4m3 input only
  uint8_t* y;            // (num_rows, intermediate_size)
  float* y_scale;        // (num_rows, num_blocks); e4m3 output only
  int64_t x_scale_row_stride;
  int64_t x_scale_block_stride;
  int64_t y_scale_row_stride;
  int64_t y_scale_block_stride;
  const int32_t* num_held_rows;  // (1,) or null: num_rows
  const int32_t* token_idx;      // (num_rows,) or null: every row counts
  const int32_t* tile_expert;    // (num_rows / tile,) or null: one expert
  uint32_t num_rows;
  int32_t tile;               // rows of a tile, a multiple of ROWS
  int32_t intermediate_size;  // a multiple of 16; of 8 without e4m3
  int32_t num_blocks;
  int32_t first_half;  // the half of x that is the gate (GATED, not INTERLEAVED)
  int32_t group_step;  // from a unit of this thread to its next: row groups
  int32_t block_step;  // and blocks, below num_blocks
  uint32_t zero;       // 0, which the compiler does not know
  ActivationParams activation;
};

constexpr int kThreads = 128;
constexpr int kColumns = 16;
constexpr int kLanes = kScaleBlock / kColumns;
constexpr int kSides = GATED ? 2 : 1;
constexpr int kBytesIn = kTypeBytes<INPUT_TYPE>, kBytesOut = kTypeBytes<OUTPUT_TYPE>;
constexpr int kChunks = kSides * kBytesIn;  // 16-byte chunks a lane loads of a row

static_assert(!INTERLEAVED || (GATED && INPUT_TYPE != kE4m3),
              "only 16- and 32-bit pairs alternate");

/// Loads a lane's 16 columns of one row from `sides`, which may be one place; chunks past the row are
/// zeros. The first half of the columns is in the row if any is.
__device__ __forceinline__ void load_row(uint4 (&raw)[kChunks], const uint8_t* const (&sides)[2],
                                         int64_t offset, bool low, bool high) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    // Chunk c holds 16 bytes of one side, or, interleaved, 8 bytes of each.
    const int side = INTERLEAVED ? 0 : c / kBytesIn, part = INTERLEAVED ? c : c % kBytesIn;
    const bool first = part * (INTERLEAVED ? 8 : 16) / kBytesIn < 8;  // of the lane's columns
    raw[c] = make_uint4(0, 0, 0, 0);
    if (first ? low : high) {
      raw[c] = *reinterpret_cast<const uint4*>(sides[side] + offset + part * 16);
    }
  }
}

__device__ __forceinline__ uint32_t word_of(const uint4 (&raw)[kChunks], int i) {
  const uint4& chunk = raw[i / 4];
  return i % 4 == 0 ? chunk.x : i % 4 == 1 ? chunk.y : i % 4 == 2 ? chunk.z : chunk.w;
}

/// Widens the gate (side 0) or up of a row.
__device__ __forceinline__ void unpack(float (&v)[kColumns], const uint4 (&raw)[kChunks],
                                       int side) {
  const int begin = side * kBytesIn * 4;               // first word of the side
  const int odd = INTERLEAVED == 2 ? 1 - side : side;  // which of a pair
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if constexpr (INPUT_TYPE == kF32) {
      v[i] = __uint_as_float(word_of(raw, INTERLEAVED ? 2 * i + odd : begin + i));
    } else if constexpr (INTERLEAVED) {
      float pair[2];
      unpack_pair<INPUT_TYPE>(pair[0], pair[1], word_of(raw, i));
      v[i] = pair[odd];
    } else if constexpr (INPUT_TYPE == kE4m3) {
      if (i % 2) continue;
      const uint32_t two = word_of(raw, begin + i / 4) >> (i % 4 * 8);
      unpack_pair<kF16>(v[i], v[i + 1], f16x2_from_e4m3x2(two));
    } else {
      if (i % 2) continue;
      unpack_pair<INPUT_TYPE>(v[i], v[i + 1], word_of(raw, begin + i / 2));
    }
  }
}

/// Loads the tokens of a row group, -1 for padding; 0 where every row counts, or there is none.
__device__ __forceinline__ void load_tokens(int32_t (&tokens)[ROWS], const Params& p,
                                            unsigned row0) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    tokens[r] = 0;
    if (p.token_idx != nullptr && row0 + r < p.num_rows) tokens[r] = p.token_idx[row0 + r];
  }
}

/// Rounds and stores a lane's 16 columns of one row.
__device__ __forceinline__ void store_row(uint8_t* to, const float (&y)[kColumns], bool high) {
#pragma unroll
  for (int c = 0; c < kBytesOut; ++c) {
    constexpr int kElems = 16 / kBytesOut;
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float* v = y + c * kElems + w * kElems / 4;
      if constexpr (OUTPUT_TYPE == kE4m3) {
        words[w] = e4m3x2_from_f32(v[0], v[1]) | e4m3x2_from_f32(v[2], v[3]) << 16;
      } else if constexpr (OUTPUT_TYPE == kF32) {
        words[w] = __float_as_uint(v[0]);
      } else {
        words[w] = pack_pair<OUTPUT_TYPE>(v[0], v[1]);
      }
    }
    if (c * kElems < 8 || high) {
      *reinterpret_cast<uint4*>(to + c * 16) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

/// Largest magnitude of the block that a lane's values are in.
__device__ __forceinline__ float block_amax(const float (&y)[kColumns], bool low, bool high) {
  float amax[2] = {};
#pragma unroll
  for (int i = 0; i < kColumns; ++i) amax[i / 8] = fmaxf(amax[i / 8], fabsf(y[i]));
  float block = fmaxf(low ? amax[0] : 0.0f, high ? amax[1] : 0.0f);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    block = fmaxf(block, __shfl_xor_sync(kFullMask, block, offset));
  }
  return block;
}

/// Activates a lane's values of one row; e4m3 output is divided by the block's scale, which is returned.
__device__ __forceinline__ float activate_row(float (&y)[kColumns], const uint4 (&raw)[kChunks],
                                              const float (&x_scale)[2],
                                              const ActivationValues& act, bool low, bool high) {
  float v[2][kColumns];
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    unpack(v[side], raw, side);
    if constexpr (INPUT_TYPE == kE4m3) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) v[side][i] *= x_scale[side];
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) y[i] = activate(v[0][i], v[kSides - 1][i], act);
  if constexpr (OUTPUT_TYPE == kE4m3) return divide_by_scale(y, block_amax(y, low, high));
  return 0.0f;
}

/// activate_row of silu(gate) * up, in four operations fewer for each value: the scales of gate and up are
/// one factor of the block, and go with its own scale into one product. False, and no result, where factor
/// or scale are out of the range in which they round like numbers.
__device__ __forceinline__ bool silu_row(float (&y)[kColumns], float& scale,
                                         const uint4 (&raw)[kChunks], const float (&x_scale)[2],
                                         bool low, bool high) {
  float gate[kColumns], up[kColumns];
  unpack(gate, raw, 0);
  unpack(up, raw, kSides - 1);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) y[i] = gate[i] * up[i] * sigmoid(gate[i], x_scale[0]);
  const float factor = x_scale[0] * x_scale[1], largest = block_amax(y, low, high);
  const float amax = largest * fabsf(factor);
  // NOTE: NaN scales fail the comparisons; a block of zeros, as where there is no row, does not.
  const bool usual = (is_usual(amax) || largest == 0.0f) && fabsf(x_scale[0]) <= 0x1p100f &&
                     fabsf(x_scale[1]) <= 0x1p100f;
  scale = largest == 0.0f ? kMinScale : usual_scale(amax);
  const float quotient_factor = largest == 0.0f ? 0.0f : factor * reciprocal_of(scale);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) y[i] *= quotient_factor;
  return usual;
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM)
    activation(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % kLanes;
  const unsigned unit = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  unsigned group = unit / p.num_blocks;  // of ROWS rows
  int block = unit - group * p.num_blocks;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  int32_t tokens[ROWS];
  load_tokens(tokens, p, group * ROWS);
  // Needed only after the first token_idx, so that few tokens wait for one load and not for two.
  const unsigned num_held = p.num_held_rows != nullptr ? *p.num_held_rows : p.num_rows;

  // NOTE: the shuffles need whole warps, so a warp goes on until none of its lanes has a row left.
  do {
    const unsigned row0 = group * ROWS;
    const int column = block * kScaleBlock + lane * kColumns;
    const bool inside = column < p.intermediate_size, high = column + 8 < p.intermediate_size;
    unsigned held = 0;  // bit r: row0 + r is no padding
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      held |= static_cast<unsigned>(inside && tokens[r] >= 0 && row0 + r < num_held) << r;
    }
    const unsigned wrapped = block + p.block_step >= p.num_blocks;
    const unsigned next_group = group + p.group_step + wrapped;
    load_tokens(tokens, p, next_group * ROWS);  // of the next round, while this one computes
    if (__any_sync(kFullMask, held)) {
      const int64_t size = p.intermediate_size, half_bytes = size * kBytesIn;
      const uint8_t* x = p.x + row0 * (kSides * half_bytes) +
                         static_cast<int64_t>(column) * (INTERLEAVED ? 2 * kBytesIn : kBytesIn);
      const bool swapped = GATED && !INTERLEAVED && p.first_half;
      const uint8_t* const sides[2] = {x + (swapped ? half_bytes : 0),
                                       x + (swapped ? 0 : half_bytes)};
      uint4 raw[ROWS][kChunks];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const bool low = held >> r & 1;
        load_row(raw[r], sides, r * (kSides * half_bytes), low, low && high);
      }
      float x_scale[ROWS][2] = {};
      if constexpr (INPUT_TYPE == kE4m3) {
        const float* scale =
            p.x_scale + row0 * p.x_scale_row_stride + block * p.x_scale_block_stride;
        const int64_t half = p.num_blocks * p.x_scale_block_stride;
        const float* const scales[2] = {scale + (swapped ? half : 0), scale + (swapped ? 0 : half)};
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
          for (int side = 0; side < kSides; ++side) {
            if (held >> r & 1) x_scale[r][side] = scales[side][r * p.x_scale_row_stride];
          }
        }
      }
      const int expert = p.tile_expert != nullptr && held ? p.tile_expert[row0 / p.tile] : 0;
      const ActivationValues act = activation_of(p.activation, expert);
      uint8_t* y_row = p.y + (row0 * size + column) * kBytesOut;
      float* y_scale = p.y_scale + row0 * p.y_scale_row_stride + block * p.y_scale_block_stride;
      if constexpr (ROWS > 1) {
        // NOTE: never taken. It makes the first row wait until the loads of the last are issued, which
        // the compiler would spread among the arithmetic.
        uint32_t words = 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
          for (int c = 0; c < kChunks; ++c) words |= raw[r][c].x;
          words |= __float_as_uint(x_scale[r][0]) | __float_as_uint(x_scale[r][1]);
        }
        if (__any_sync(kFullMask, words & p.zero)) break;
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const bool low = held >> r & 1;
        const auto store = [&](const float (&y)[kColumns], float scale) {
          if (OUTPUT_TYPE == kE4m3 && lane == 0) y_scale[r * p.y_scale_row_stride] = scale;
          store_row(y_row + r * (size * kBytesOut), y, high);
        };
        bool to_do = low;
        float y[kColumns], scale;
        if constexpr (SILU && INPUT_TYPE == kE4m3 && OUTPUT_TYPE == kE4m3) {
          if (silu_row(y, scale, raw[r], x_scale[r], low, low && high)) {
            if (low) store(y, scale);
            to_do = false;
          }
          if (!__any_sync(kFullMask, to_do)) continue;
          // NOTE: changes nothing, so that no register keeps for the rare case what it can unpack again.
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            raw[r][c].x ^= p.zero, raw[r][c].y ^= p.zero;
            raw[r][c].z ^= p.zero, raw[r][c].w ^= p.zero;
          }
        }
        scale = activate_row(y, raw[r], x_scale[r], act, low, low && high);
        if (to_do) store(y, scale);
      }
    }
    group = next_group;
    block += p.block_step - wrapped * p.num_blocks;
  } while (__any_sync(kFullMask, group * ROWS < num_held));
}
