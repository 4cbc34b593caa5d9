// What the kernels of an all-reduce share: a rank's part of a token, its way over the wire, and what
// follows the sum (allreduce_one_shot.cu, allreduce_two_shot.cu).
//
// part    by INPUT, in fp32, product and sum rounded separately, in this order:
//           kRows     sum over k ascending, where permuted_idx[t, k] >= 0, of weight[t, k] * rows[idx]
//           kExperts  sum over e ascending of weight[e, t] * rows[e, t]
//         times routed_scaling_factor, plus shared[t]; or, kPlain, rows[t].
//         Rounded once, to TYPE, for the wire; the sign of a zero is lost.
// sum     of the parts by ascending rank, fp32; rounded to TYPE: sum_out
// result  sum, or sum + residual in fp32, rounded to TYPE: result_out
// norm    result * (1 / sqrt(mean of squares + eps)) * (weight_offset + norm_weight), rounded: norm_out
// quant   of the norm, or of the result where there is none, by QUANT: the bits of the quantize_*.cu
//
// NOTE: the squares are added in an order of their own, so that neither the shape of a launch nor the
// protocol changes a bit: eight neighbours ascending, 32 of these by butterfly (a chunk of 256
// columns), then the chunks: lane l adds chunks l, l + 32, ... and the lanes by butterfly again.
//
// Columns   a thread holds VECS times eight neighbouring ones; a warp has whole chunks, dealt out
//           among the blocks of a cluster and then among their warps.
// From -D   INPUT TYPE WEIGHTS_TYPE QUANT GROUP (columns of a scale) RANKS THREADS VECS CLUSTER
//           BLOCKS_PER_SM
#pragma once

#include "allreduce_wire.cuh"

namespace cumoe {

// --------------------------------------------------------------------------------------------- part

/// This rank's part of a token, as it goes over the wire.
__device__ __forceinline__ void part_of(Wire (&mine)[VECS], const Params& p, int token) {
  const int64_t row_start = static_cast<int64_t>(token) * p.hidden_size;
  if constexpr (INPUT == kPlain) {
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
      const int column = column_of(i);
      if (column < p.hidden_size) mine[i] = load_wire(p.rows, row_start + column);
    }
  } else {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float sum[VECS][8] = {};
    for (int first = 0; first < p.columns; first += 32) {
      // Each lane reads one slot; the warp then goes through them.
      const int slot = first + lane;
      int my_row = -1;
      float my_weight = 1.0f;
      if (slot < p.columns) {
        const int64_t by_token = static_cast<int64_t>(token) * p.columns + slot;
        const int64_t by_expert = static_cast<int64_t>(slot) * p.num_tokens + token;
        my_row = INPUT == kRows ? p.permuted_idx[by_token] : static_cast<int>(by_expert);
        if (p.weights != nullptr) {
          my_weight = load_element<WEIGHTS_TYPE>(p.weights, INPUT == kRows ? by_token : by_expert);
        }
      }
      const int count = min(32, p.columns - first);
      for (int k = 0; k < count; k += kBatch) {
        int row[kBatch];
        Wire raw[kBatch][VECS];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          row[j] = __shfl_sync(kFullMask, my_row, k + j);
          if (row[j] < 0) continue;
#pragma unroll
          for (int i = 0; i < VECS; ++i) {
            const int column = column_of(i);
            if (column >= p.hidden_size) continue;
            raw[j][i] = load_wire(p.rows, static_cast<int64_t>(row[j]) * p.hidden_size + column);
          }
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const float weight = __shfl_sync(kFullMask, my_weight, k + j);
          if (row[j] < 0) continue;
#pragma unroll
          for (int i = 0; i < VECS; ++i) {
            if (column_of(i) >= p.hidden_size) continue;
            float x[8];
            unpack(x, raw[j][i]);
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              sum[i][c] = __fadd_rn(sum[i][c], __fmul_rn(weight, x[c]));
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[i][c] = __fmul_rn(sum[i][c], p.routed_scaling_factor);
      const int column = column_of(i);
      if (p.shared != nullptr && column < p.hidden_size) {
        add(sum[i], load_wire(p.shared, row_start + column));
      }
      mine[i] = pack(sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < VECS; ++i) remove_sentinels(mine[i]);
}

// ------------------------------------------------------------------------------------- after the sum

/// Values of the chunks of a token, twice: a block may write the next ones while others read these.
struct Exchange {
  float values[2][kMaxChunks];
};

__device__ __forceinline__ void sync_blocks() {
#if CLUSTER > 1
  ptx::cluster_sync();
#else
  __syncthreads();
#endif
}

/// Puts a chunk's value, which all lanes hold, before every block of the cluster.
__device__ __forceinline__ void put_chunk(float* values, int chunk, float value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#if CLUSTER > 1
  if (lane < CLUSTER) {
    ptx::st_cluster_f32(ptx::mapa(ptx::smem_address(values + chunk), lane), value);
  }
#else
  if (lane == 0) values[chunk] = value;
#endif
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    v = fmaxf(v, __shfl_xor_sync(kFullMask, v, offset));
  }
  return v;
}

/// Combines one value per chunk over the token, `kSum` or the largest; every thread gets it.
template <bool kSum>
__device__ __forceinline__ float over_token(const float (&of_chunk)[VECS], int num_chunks,
                                            Exchange& exchange, int& turn) {
  float* values = exchange.values[turn];
  turn ^= 1;
#pragma unroll
  for (int i = 0; i < VECS; ++i) {
    put_chunk(values, chunk_of(i), of_chunk[i]);
  }
  sync_blocks();
  float v = 0.0f;
  for (int chunk = static_cast<int>(threadIdx.x) % 32; chunk < num_chunks; chunk += 32) {
    v = kSum ? __fadd_rn(v, values[chunk]) : fmaxf(v, values[chunk]);
  }
  return kSum ? warp_sum(v) : warp_max(v);
}

/// sum_out, and the result as it is rounded.
///
/// NOTE: it holds no sentinel, so that it may go over the wire: no sum is -0, and one of TYPE's numbers
/// that is not 0 does not round to it.
__device__ __forceinline__ Wire result_of(const Params& p, int64_t at, float (&sum)[8],
                                          const Wire& residual) {
  if (p.sum_out != nullptr) store_wire(p.sum_out, at, pack(sum));
  if (p.residual != nullptr) add(sum, residual);
  return pack(sum);
}

/// Largest magnitude of eight values, NaN left out.
__device__ __forceinline__ float largest(const float (&x)[8]) {
  float amax = 0.0f;
#pragma unroll
  for (int c = 0; c < 8; ++c) amax = fmaxf(amax, fabsf(x[c]));
  return amax;
}

/// Largest value over the lanes that share a group of columns.
template <int kLanes>
__device__ __forceinline__ float group_max(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    v = fmaxf(v, __shfl_xor_sync(kFullMask, v, offset));
  }
  return v;
}

/// One float a row, or a row and 128 columns (quantize_fp8_token.cu, quantize_fp8_block.cu).
__device__ __forceinline__ void put_scale(const Params& p, int token, int block, float scale) {
  static_cast<float*>(p.scale_out)[token * p.scale_row_stride + block * p.scale_block_stride] =
      scale;
}

/// The byte of a group in column-major words (quantize_fp8_ue8m0.cu), and zeros for padding: bytes past the
/// last group, and rows that fill up four, but for the last words.
__device__ __forceinline__ void put_ue8m0(const Params& p, int token, int group, uint32_t scale) {
  const int num_groups = p.hidden_size / kGroup;
  uint8_t* word = static_cast<uint8_t*>(p.scale_out) + group / 4 * p.scale_block_stride * 4;
  word[token * 4 + group % 4] = static_cast<uint8_t>(scale);
  if (group + 1 == num_groups) {
    for (int byte = num_groups; byte % 4; ++byte) word[token * 4 + byte % 4] = 0;
  }
  const bool last = group / 4 == (num_groups - 1) / 4;
  if (token + 1 == p.num_tokens && !last) {
    for (int row = p.num_tokens; row % 4; ++row) word[row * 4 + group % 4] = 0;
  }
}

/// The byte of a group (quantize_nvfp4.cu), and, in tiles, zeros for padding: groups past the last one, and
/// rows that fill up 128.
__device__ __forceinline__ void put_nvfp4(const Params& p, int token, int group, uint32_t scale) {
  uint8_t* scales = static_cast<uint8_t*>(p.scale_out);
  const int num_groups = p.hidden_size / kFp4Group;
  if constexpr (QUANT == kNvfp4) {
    scales[static_cast<int64_t>(token) * num_groups + group] = static_cast<uint8_t>(scale);
  } else {
    const int width = ceil_div(num_groups, 4) * 4;
    const int end = group + 1 == num_groups ? width : group + 1;
    const int num_rows = ceil_div(p.num_tokens, 128) * 128;
    // The padding rows are dealt out among the tokens.
#pragma unroll 1
    for (int row = token; row < num_rows; row += p.num_tokens) {
#pragma unroll 1
      for (int g = group; g < end; ++g) {
        const bool real = row == token && g == group;
        scales[scale_offset_128x4(row, g, width)] = static_cast<uint8_t>(real ? scale : 0);
      }
    }
  }
}

/// Quantises eight values and stores them and, on one lane of a group, its scale. All lanes come here;
/// columns that are not there hold zeros.
__device__ __forceinline__ void quantise_8(const Params& p, int token, int column, float (&x)[8],
                                           const E4m3Divisor& divisor) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t at = static_cast<int64_t>(token) * p.hidden_size + column;
  const bool inside = column < p.hidden_size;
  if constexpr (QUANT == kNvfp4 || QUANT == kNvfp4Swizzled) {
    const float amax = group_max<kFp4Group / 8>(largest(x));
    if (!inside) return;
    const uint32_t scale = nvfp4_scale(amax, *p.quant_scale);
    const float factor = nvfp4_factor(scale, *p.quant_scale);
    static_cast<uint32_t*>(p.quant_out)[at / 8] = e2m1x8_from_f32(x, factor, true);
    if (lane % (kFp4Group / 8) == 0) put_nvfp4(p, token, column / kFp4Group, scale);
  } else {
    if constexpr (QUANT == kFp8Ue8m0) {
      const uint32_t scale = ue8m0_scale(group_max<kGroup / 8>(largest(x)));
      const float reciprocal = ue8m0_reciprocal(scale);
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] = __fmul_rn(x[c], reciprocal);
      if (inside && lane % (kGroup / 8) == 0) put_ue8m0(p, token, column / kGroup, scale);
    } else if constexpr (QUANT == kFp8Block) {
      const float scale = divide_by_scale(x, half_warp_max(largest(x)));
      if (inside && lane % 16 == 0) put_scale(p, token, column / kScaleBlock, scale);
    } else {
      divisor.divide(x);
    }
    if (inside) store_8<kE4m3>(p.quant_out, at, x);
  }
}

/// Quantises the rounded values of a token; those of columns that are not there are zeros.
__device__ __forceinline__ void quantise(const Params& p, int token, float (&x)[VECS][8],
                                         Exchange& exchange, int& turn) {
  float scale = 1.0f;
  if constexpr (QUANT == kFp8Tensor) scale = *p.quant_scale;
  if constexpr (QUANT == kFp8Token) {
    float of_chunk[VECS];
#pragma unroll
    for (int i = 0; i < VECS; ++i) of_chunk[i] = group_max<32>(largest(x[i]));
    const int num_chunks = ceil_div(p.hidden_size, kChunk);
    scale = e4m3_token_scale(over_token<false>(of_chunk, num_chunks, exchange, turn));
    if (column_of(0) == 0) put_scale(p, token, 0, scale);
  }
  const E4m3Divisor divisor(scale);
#pragma unroll
  for (int i = 0; i < VECS; ++i) quantise_8(p, token, column_of(i), x[i], divisor);
}

/// Loads the row of an array that may be null, at this thread's columns.
__device__ __forceinline__ void load_columns(Wire (&w)[VECS], const Params& p, const void* base,
                                             int token) {
#pragma unroll
  for (int i = 0; i < VECS; ++i) {
    const int column = column_of(i);
    if (base != nullptr && column < p.hidden_size) {
      w[i] = load_wire(base, static_cast<int64_t>(token) * p.hidden_size + column);
    }
  }
}

/// Everything that follows the result of a token. `gamma` holds norm_weight at this thread's columns, if
/// kEarly.
__device__ __forceinline__ void finish(const Params& p, int token, const Wire (&result)[VECS],
                                       Wire (&gamma)[VECS], Exchange& exchange, int& turn) {
  if constexpr (!kEarly) load_columns(gamma, p, p.norm_weight, 0);
  const int64_t row_start = static_cast<int64_t>(token) * p.hidden_size;
  float x[VECS][8];
#pragma unroll
  for (int i = 0; i < VECS; ++i) {
    const int column = column_of(i);
    if (column < p.hidden_size) {
      if (p.result_out != nullptr) store_wire(p.result_out, row_start + column, result[i]);
      unpack(x[i], result[i]);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c) x[i][c] = 0.0f;
    }
  }
  if (p.norm_weight != nullptr) {
    float squares[VECS];
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
      float sum = __fmul_rn(x[i][0], x[i][0]);
#pragma unroll
      for (int c = 1; c < 8; ++c) sum = __fadd_rn(sum, __fmul_rn(x[i][c], x[i][c]));
      squares[i] = warp_sum(sum);
    }
    const int num_chunks = ceil_div(p.hidden_size, kChunk);
    const float total = over_token<true>(squares, num_chunks, exchange, turn);
    const float mean = __fdiv_rn(total, static_cast<float>(p.hidden_size));
    const float inverse = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, p.eps)));
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
      const int column = column_of(i);
      if (column >= p.hidden_size) continue;
      float weight[8];
      unpack(weight, gamma[i]);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float scaled = __fmul_rn(x[i][c], inverse);
        x[i][c] = __fmul_rn(scaled, __fadd_rn(p.weight_offset, weight[c]));
      }
      const Wire rounded = pack(x[i]);
      if (p.norm_out != nullptr) store_wire(p.norm_out, row_start + column, rounded);
      unpack(x[i], rounded);
    }
  }
  if constexpr (QUANT != kNoQuant) quantise(p, token, x, exchange, turn);
}

}  // namespace cumoe
