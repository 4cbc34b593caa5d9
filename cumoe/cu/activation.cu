// activation: the activation on its own, with or without requantisation to fp8.
//
// y[r, c] = activate(gate[r, c], up[r, c]), c < intermediate_size; fp8 output takes one scale for each row
// and 128 columns (scale and rounding as in quantize_fp8_block).
//
// Unit      ROWS rows by 128 columns on 8 lanes, a lane holding 16 neighbouring columns of each row. All
//           loads of a unit are issued before the first is used; the maximum of a scale block is three
//           shuffles, so nothing waits for a block barrier. What a row has but once (its index, scales and
//           parameters) is one lane's, which shuffles it to the others. ROWS changes no bit of the result.
// Grid      any; strides over units, the blocks of a row group next to each other.
// Walk      with a permutation over its slots, or over the rows up to *num_held_rows unless these are a third
//           more (rows lie in order, slots do not); only the device knows. Of slots those of experts that are
//           not held here are no work, of rows the padding (token_idx is -1): both take their turn, but
//           nothing of them is read or written. A shard walks its own rows alone.
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
  const int32_t* permuted_idx;   // (num_slots,), the row of each slot, or null: rows are walked
  const int32_t* tile_expert;    // (num_rows / tile,) or null: one expert
  uint32_t num_rows;
  uint32_t num_slots;
  int32_t tile;               // rows of a tile
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

/// Start of a row's columns, which are fewer than 2^32 bytes.
template <class T>
__device__ __forceinline__ T* row_at(T* columns, int32_t row, uint32_t row_bytes) {
  return columns + static_cast<uint64_t>(static_cast<uint32_t>(row)) * row_bytes;
}

template <class T>
__device__ __forceinline__ T* scale_at(T* scale, int32_t row, int block, int64_t row_stride,
                                       int64_t block_stride) {
  return scale + static_cast<uint32_t>(row) * row_stride + block * block_stride;
}

/// Loads a lane's 16 columns of one row from `sides`, which may be one place; chunks past the row are
/// zeros. The first half of the columns is in the row if any is.
__device__ __forceinline__ void load_row(uint4 (&raw)[kChunks], const uint8_t* const (&sides)[2],
                                         int32_t row, uint32_t row_bytes, bool low, bool high) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    // Chunk c holds 16 bytes of one side, or, interleaved, 8 bytes of each.
    const int side = INTERLEAVED ? 0 : c / kBytesIn, part = INTERLEAVED ? c : c % kBytesIn;
    const bool first = part * (INTERLEAVED ? 8 : 16) / kBytesIn < 8;  // of the lane's columns
    raw[c] = make_uint4(0, 0, 0, 0);
    if (first ? low : high) {
      raw[c] = *reinterpret_cast<const uint4*>(row_at(sides[side], row, row_bytes) + part * 16);
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
      if (i % 4) continue;
      uint32_t low, high;
      f16x4_from_e4m3x4(low, high, word_of(raw, begin + i / 4));
      unpack_pair<kF16>(v[i], v[i + 1], low);
      unpack_pair<kF16>(v[i + 2], v[i + 3], high);
    } else {
      if (i % 2) continue;
      unpack_pair<INPUT_TYPE>(v[i], v[i + 1], word_of(raw, begin + i / 2));
    }
  }
}

/// Entry of a table, negative where there is no row; without a table every index is a row.
__device__ __forceinline__ int32_t look_up(const int32_t* table, unsigned index, unsigned size) {
  if (index >= size) return -1;
  return table != nullptr ? table[index] : 0;
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
        words[w] = e4m3x4_from_f32(v[0], v[1], v[2], v[3]);
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

/// Largest value over the lanes of a unit.
__device__ __forceinline__ float unit_max(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  }
  return x;
}

/// Largest magnitude of the block that a lane's values are in.
__device__ __forceinline__ float block_amax(const float (&y)[kColumns], bool low, bool high) {
  float amax[2] = {};
#pragma unroll
  for (int i = 0; i < kColumns; ++i) amax[i / 8] = fmaxf(amax[i / 8], fabsf(y[i]));
  return unit_max(fmaxf(low ? amax[0] : 0.0f, high ? amax[1] : 0.0f));
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
                                         const uint4 (&raw)[kChunks], const float (&x_scale)[2]) {
  float gate[kColumns], up[kColumns];
  unpack(gate, raw, 0);
  unpack(up, raw, kSides - 1);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) y[i] = gate[i] * up[i] * sigmoid(gate[i], x_scale[0]);
  // Past the row they are 0 or NaN, and neither counts.
  float low = fabsf(y[0]), high = fabsf(y[kColumns / 2]);
#pragma unroll
  for (int i = 1; i < kColumns / 2; ++i) {
    low = fmaxf(low, fabsf(y[i])), high = fmaxf(high, fabsf(y[i + kColumns / 2]));
  }
  const float factor = x_scale[0] * x_scale[1], largest = unit_max(fmaxf(low, high));
  const float amax = largest * fabsf(factor);
  // NOTE: NaN scales fail the comparisons; a block of zeros, as where there is no row, does not.
  const bool zeros = largest == 0.0f;
  const bool usual =
      (zeros | is_usual(amax)) & (fabsf(x_scale[0]) <= 0x1p100f) & (fabsf(x_scale[1]) <= 0x1p100f);
  scale = zeros ? kMinScale : usual_scale(amax);
  const float quotient_factor = zeros ? 0.0f : factor * reciprocal_of(scale);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) y[i] *= quotient_factor;
  return usual;
}

/// The value of the lane that is `index` in its unit.
template <class T>
__device__ __forceinline__ T from_lane(T value, int index) {
  return __shfl_sync(kFullMask, value, index, kLanes);
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM)
    activation(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % kLanes, own = lane % ROWS;  // the row this lane looks up
  const unsigned unit = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  unsigned group = unit / p.num_blocks;  // of ROWS entries
  int block = unit - group * p.num_blocks;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  // The first entries of both tables, beside what decides between them: few tokens wait for one load and
  // not for two.
  const unsigned first = group * ROWS + own;
  const int32_t slot_entry = look_up(p.permuted_idx, first, p.num_slots);
  const int32_t row_entry = look_up(p.token_idx, first, p.num_rows);
  const unsigned num_held = p.num_held_rows != nullptr ? *p.num_held_rows : p.num_rows;
  const bool by_slots = p.permuted_idx != nullptr && p.num_slots <= num_held / 4 * 3;
  const unsigned num_entries = by_slots ? p.num_slots : num_held;
  int32_t entry = by_slots ? slot_entry : first < num_held ? row_entry : -1;

  // NOTE: the shuffles need whole warps, so a warp goes on until none of its lanes has an entry left.
  do {
    const int column = block * kScaleBlock + lane * kColumns;
    const bool inside = column < p.intermediate_size, high = column + 8 < p.intermediate_size;
    const int32_t own_row =
        entry < 0 || by_slots ? entry : static_cast<int32_t>(group * ROWS + own);
    const unsigned wrapped = block + p.block_step >= p.num_blocks;
    group += p.group_step + wrapped;
    entry = look_up(by_slots ? p.permuted_idx : p.token_idx, group * ROWS + own,
                    num_entries);  // of the next round, ahead of time
    if (__any_sync(kFullMask, own_row >= 0)) {
      const uint32_t half_bytes = p.intermediate_size * kBytesIn;
      const uint32_t y_row_bytes = p.intermediate_size * kBytesOut;
      const uint8_t* x = p.x + static_cast<int64_t>(column) * (INTERLEAVED ? 2 : 1) * kBytesIn;
      uint8_t* const y_columns = p.y + static_cast<int64_t>(column) * kBytesOut;
      const bool swapped = GATED && !INTERLEAVED && p.first_half;
      const uint8_t* const sides[2] = {x + (swapped ? half_bytes : 0),
                                       x + (swapped ? 0 : half_bytes)};
      int32_t rows[ROWS];
      uint4 raw[ROWS][kChunks];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        rows[r] = from_lane(own_row, r);
        const bool held = rows[r] >= 0;
        load_row(raw[r], sides, rows[r], kSides * half_bytes, held && inside, held && high);
      }
      // Lane s * ROWS + r: of side s of row r. Later, lane r: of the result's row r.
      float own_scale = 0.0f;
      if (INPUT_TYPE == kE4m3 && own_row >= 0) {
        const bool second = (lane / ROWS % kSides != 0) != swapped;
        own_scale = *scale_at(p.x_scale, own_row, block + (second ? p.num_blocks : 0),
                              p.x_scale_row_stride, p.x_scale_block_stride);
      }
      const bool per_expert = !SILU && p.tile_expert != nullptr;
      const int expert = per_expert && own_row >= 0 ? p.tile_expert[own_row / p.tile] : 0;
      const ActivationValues own_act = activation_of(p.activation, expert);
      if constexpr (ROWS > 1) {
        // NOTE: never taken. It makes the first row wait until the loads of the last are issued, which
        // the compiler would spread among the arithmetic.
        uint32_t words = __float_as_uint(own_scale);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
          for (int c = 0; c < kChunks; ++c) words |= raw[r][c].x;
        }
        if (__any_sync(kFullMask, words & p.zero)) break;
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const bool low = rows[r] >= 0 && inside;
        float x_scale[2] = {};
#pragma unroll
        for (int side = 0; INPUT_TYPE == kE4m3 && side < kSides; ++side) {
          x_scale[side] = from_lane(own_scale, side * ROWS + r);
        }
        float y[kColumns], scale;
        bool usual = false;
        const auto finish = [&](bool chosen) {
          if (chosen & (lane == r)) own_scale = scale;
          if (chosen & low) store_row(row_at(y_columns, rows[r], y_row_bytes), y, high);
        };
        if constexpr (SILU && INPUT_TYPE == kE4m3 && OUTPUT_TYPE == kE4m3) {
          usual = silu_row(y, scale, raw[r], x_scale);
          finish(usual);
          if (!__any_sync(kFullMask, low & !usual)) continue;
          // NOTE: changes nothing, so that no register keeps for the rare case what it can unpack again.
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            raw[r][c].x ^= p.zero, raw[r][c].y ^= p.zero;
            raw[r][c].z ^= p.zero, raw[r][c].w ^= p.zero;
          }
        }
        ActivationValues act = own_act;
        if (per_expert) {
          act = {from_lane(act.alpha, r), from_lane(act.beta, r), from_lane(act.limit, r)};
        }
        scale = activate_row(y, raw[r], x_scale, act, low, low && high);
        finish(!usual);
      }
      if (OUTPUT_TYPE == kE4m3 && lane < ROWS && own_row >= 0) {
        *scale_at(p.y_scale, own_row, block, p.y_scale_row_stride, p.y_scale_block_stride) =
            own_scale;
      }
    }
    block += p.block_step - wrapped * p.num_blocks;
  } while (__any_sync(kFullMask, group * ROWS < num_entries));
}
