// What the kernels of an all-reduce share: a rank's part of a token, its way over the wire, and what
// follows the sum (allreduce_one_shot.cu, allreduce_two_shot.cu).
//
// part    by INPUT, in fp32, product and sum rounded separately, in this order:
//           kRows     sum over k ascending, where permuted_idx[t, k] >= 0, of weight[t, k] * rows[idx]
//           kExperts  sum over e ascending of weight[e, t] * rows[e, t]
//         times routed_scaling_factor, plus shared[t]; or, kPlain, rows[t].
//         Rounded once, to TYPE, for the wire; minus zero becomes zero.
// sum     of the parts by ascending rank, fp32; rounded to TYPE: sum_out
// result  sum, or sum + residual in fp32, rounded to TYPE: result_out
// norm    result * (1 / sqrt(mean of squares + eps)) * (weight_offset + norm_weight), rounded: norm_out
// quant   of the norm, or of the result where there is none, by QUANT
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

#include "exact.cuh"
#include "sync.cuh"
#include "vec.cuh"
#if CLUSTER > 1
#include "tma.cuh"
#endif

namespace cumoe {

enum InputPolicy : int { kRows = 0, kExperts = 1, kPlain = 2 };
enum QuantFormat : int { kNoQuant = 0, kFp8Tensor = 1, kFp8Token = 2, kFp8Block = 3 };

constexpr int kMaxRanks = 16;
constexpr int kChunk = 32 * 8;   // columns
constexpr int kMaxChunks = 256;  // of a token
constexpr int kNumBuffers = 3;
constexpr int kWarps = THREADS / 32;
constexpr int kParts = kTypeBytes<TYPE> / 2;     // 16-byte words of eight elements
constexpr int kBatch = VECS > 2 ? 1 : 8 / VECS;  // rows of experts in flight
constexpr int kPolled = 8 / kParts;              // slots in flight
constexpr uint32_t kSentinel = 0x80000000u;      // see cumoe/comm/layout.py
constexpr float kMinTokenAmax = 1.0f / 512.0f;   // the smallest e4m3 number

static_assert(TYPE == kBf16 || TYPE == kF16 || TYPE == kF32, "no such wire");
static_assert(INPUT == kPlain || TYPE != kF32, "the rows of experts have 16-bit elements");
static_assert(THREADS % 32 == 0 && 32 % kBatch == 0, "whole warps, and whole batches of slots");

struct AllReduceParams {
  const void* rows;             // (max_rows, hidden_size), (columns, num_tokens, hidden_size) or
                                // (num_tokens, hidden_size)
  const void* weights;          // (num_tokens, columns), or (columns, num_tokens); null: ones
  const int32_t* permuted_idx;  // (num_tokens, columns); kRows only
  const void* shared;           // (num_tokens, hidden_size) or null, as all below
  const void* residual;
  const void* norm_weight;  // (hidden_size,)
  void* sum_out;
  void* result_out;
  void* norm_out;
  void* quant_out;
  float* scale_out;
  const float* quant_scale;  // (1,), kFp8Tensor only
  int32_t* state;            // [0] buffer of this call, [1] blocks of it that have arrived
  uint8_t* buffers[kMaxRanks];
  int64_t buffer_bytes;
  int64_t slot_bytes;      // of a peer: its rows, or its rows of the tokens this rank reduces
  int64_t results_offset;  // of the reduced rows in a buffer
  int64_t scale_row_stride;
  int64_t scale_block_stride;
  int32_t num_tokens;   // at least 1
  int32_t hidden_size;  // a multiple of 8, at most kMaxChunks * kChunk
  int32_t columns;      // top_k or experts
  int32_t rank;
  float routed_scaling_factor;
  float eps;
  float weight_offset;
};

/// Eight elements of TYPE.
struct Wire {
  uint4 part[kParts];
};

// ------------------------------------------------------------------------------------------- columns

/// Chunk `i` of this warp.
__device__ __forceinline__ int chunk_of(int i) {
#if CLUSTER > 1
  const int block = static_cast<int>(ptx::cluster_rank());
#else
  constexpr int block = 0;
#endif
  return (i * CLUSTER + block) * kWarps + static_cast<int>(threadIdx.x) / 32;
}

/// First of the eight columns `i` of this thread; not below hidden_size if it has none.
__device__ __forceinline__ int column_of(int i) {
  return chunk_of(i) * kChunk + static_cast<int>(threadIdx.x) % 32 * 8;
}

__device__ __forceinline__ Wire load_wire(const void* base, int64_t index) {
  const uint4* from =
      reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(base) + index * kTypeBytes<TYPE>);
  Wire w;
#pragma unroll
  for (int i = 0; i < kParts; ++i) w.part[i] = from[i];
  return w;
}

__device__ __forceinline__ void store_wire(void* base, int64_t index, const Wire& w) {
  uint4* to = reinterpret_cast<uint4*>(static_cast<uint8_t*>(base) + index * kTypeBytes<TYPE>);
#pragma unroll
  for (int i = 0; i < kParts; ++i) to[i] = w.part[i];
}

__device__ __forceinline__ void unpack(float (&x)[8], const Wire& w) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const uint32_t words[4] = {w.part[i].x, w.part[i].y, w.part[i].z, w.part[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (TYPE == kF32) {
        x[4 * i + j] = __uint_as_float(words[j]);
      } else {
        unpack_pair<TYPE>(x[2 * j], x[2 * j + 1], words[j]);
      }
    }
  }
}

__device__ __forceinline__ Wire pack(const float (&x)[8]) {
  Wire w;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (TYPE == kF32) {
        words[j] = __float_as_uint(x[4 * i + j]);
      } else {
        words[j] = pack_pair<TYPE>(x[2 * j], x[2 * j + 1]);
      }
    }
    w.part[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  return w;
}

// ---------------------------------------------------------------------------------------------- wire

__device__ __forceinline__ uint32_t without_minus_zero(uint32_t word) {
  if constexpr (TYPE == kF32) return word == kSentinel ? 0u : word;
  if ((word & 0xffffu) == 0x8000u) word &= 0xffff0000u;
  if ((word & 0xffff0000u) == 0x80000000u) word &= 0xffffu;
  return word;
}

__device__ __forceinline__ void remove_minus_zeros(Wire& w) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    uint4& v = w.part[i];
    v.x = without_minus_zero(v.x), v.y = without_minus_zero(v.y);
    v.z = without_minus_zero(v.z), v.w = without_minus_zero(v.w);
  }
}

/// Stores to a peer's buffer.
__device__ __forceinline__ void send(uint8_t* to, const Wire& w) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    ptx::st_relaxed_sys_v4(reinterpret_cast<uint4*>(to) + i, w.part[i]);
  }
}

/// Waits for `kCount` words of 16 or 32 bytes in the own buffer, `stride` bytes apart, and clears them.
///
/// NOTE: every word of 32 bits is compared, since they come one by one. A thread's store of the sentinel
/// follows its load of the same word, which is all the order that is needed in this call; before the
/// next call's words come, this kernel has ended.
template <int kCount>
__device__ __forceinline__ void receive(Wire (&w)[kCount], uint8_t* from, int64_t stride) {
  bool here;
  do {
    here = true;
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const uint4 v =
            ptx::ld_relaxed_sys_v4(reinterpret_cast<const uint4*>(from + s * stride) + i);
        here &= v.x != kSentinel && v.y != kSentinel && v.z != kSentinel && v.w != kSentinel;
        w[s].part[i] = v;
      }
    }
  } while (!here);
  Wire empty;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    empty.part[i] = make_uint4(kSentinel, kSentinel, kSentinel, kSentinel);
  }
#pragma unroll
  for (int s = 0; s < kCount; ++s) send(from + s * stride, empty);
}

__device__ __forceinline__ void add(float (&sum)[8], const Wire& w) {
  float x[8];
  unpack(x, w);
#pragma unroll
  for (int c = 0; c < 8; ++c) sum[c] = __fadd_rn(sum[c], x[c]);
}

/// Adds the slots from `kFirst` on, as many of them in flight as registers allow.
template <int kFirst>
__device__ __forceinline__ void add_slots(float (&sum)[8], const Wire& mine, uint8_t* slots,
                                          int64_t slot_bytes, int rank) {
  constexpr int kLeft = RANKS - 1 - kFirst, kCount = kLeft < kPolled ? kLeft : kPolled;
  if constexpr (kCount > 0) {
    Wire peers[kCount];
    receive(peers, slots + kFirst * slot_bytes, slot_bytes);
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      if (kFirst + s == rank) add(sum, mine);
      add(sum, peers[s]);
    }
    add_slots<kFirst + kCount>(sum, mine, slots, slot_bytes, rank);
  }
}

/// Sum of the parts of all ranks, by ascending rank; waits for those of the peers. Slot s holds peer s,
/// or, from the own rank on, peer s + 1.
__device__ __forceinline__ void sum_of_ranks(float (&sum)[8], const Wire& mine, uint8_t* slots,
                                             int64_t slot_bytes, int rank) {
  // Parts have no minus zero, so the first is not changed by zero.
#pragma unroll
  for (int c = 0; c < 8; ++c) sum[c] = 0.0f;
  add_slots<0>(sum, mine, slots, slot_bytes, rank);
  if (rank == RANKS - 1) add(sum, mine);
}

// --------------------------------------------------------------------------------------------- part

/// This rank's part of a token, as it goes over the wire.
__device__ __forceinline__ void part_of(Wire (&mine)[VECS], const AllReduceParams& p, int token) {
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
  for (int i = 0; i < VECS; ++i) remove_minus_zeros(mine[i]);
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
    if (chunk_of(i) < num_chunks) put_chunk(values, chunk_of(i), of_chunk[i]);
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
/// NOTE: it holds no minus zero, so that it may go over the wire: parts have none, a sum of two numbers
/// is -0 only if both are, and one of TYPE's own numbers that is not 0 does not round to it.
__device__ __forceinline__ Wire result_of(const AllReduceParams& p, int64_t at, float (&sum)[8],
                                          const Wire& residual) {
  if (p.sum_out != nullptr) store_wire(p.sum_out, at, pack(sum));
  if (p.residual != nullptr) add(sum, residual);
  return pack(sum);
}

__device__ __forceinline__ void store_codes(const AllReduceParams& p, int64_t at,
                                            const float (&x)[8]) {
  store_8<kE4m3>(p.quant_out, at, x);
}

/// Largest magnitude of eight values.
__device__ __forceinline__ float largest(const float (&x)[8]) {
  float amax = 0.0f;
#pragma unroll
  for (int c = 0; c < 8; ++c) amax = fmaxf(amax, fabsf(x[c]));
  return amax;
}

/// Quantises the rounded values of a token; those of columns that are not there are zeros.
__device__ __forceinline__ void quantise(const AllReduceParams& p, int token, float (&x)[VECS][8],
                                         Exchange& exchange, int& turn) {
  const int64_t row_start = static_cast<int64_t>(token) * p.hidden_size;
  float* scale_row = p.scale_out + token * p.scale_row_stride;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float amax = 0.0f;
  if constexpr (QUANT == kFp8Token) {
    float of_chunk[VECS];
#pragma unroll
    for (int i = 0; i < VECS; ++i) of_chunk[i] = warp_max(largest(x[i]));
    const int num_chunks = ceil_div(p.hidden_size, kChunk);
    amax = fmaxf(over_token<false>(of_chunk, num_chunks, exchange, turn), kMinTokenAmax);
  }
#pragma unroll
  for (int i = 0; i < VECS; ++i) {
    const int column = column_of(i);
    float scale = 0.0f;
    if constexpr (QUANT == kFp8Tensor) {
      const float inverse = __frcp_rn(*p.quant_scale);
#pragma unroll
      for (int c = 0; c < 8; ++c) x[i][c] = __fmul_rn(x[i][c], inverse);
    } else if constexpr (QUANT == kFp8Token) {
      scale = divide_by_scale(x[i], amax);
    } else if constexpr (QUANT == kFp8Block) {
      scale = divide_by_scale(x[i], half_warp_max(largest(x[i])));
    }
    if (column >= p.hidden_size) continue;
    store_codes(p, row_start + column, x[i]);
    if constexpr (QUANT == kFp8Token) {
      if (column == 0) *scale_row = scale;
    } else if constexpr (QUANT == kFp8Block) {
      if (lane % 16 == 0) scale_row[column / kScaleBlock * p.scale_block_stride] = scale;
    }
  }
}

/// Everything that follows the result of a token. `gamma` holds norm_weight at this thread's columns.
__device__ __forceinline__ void finish(const AllReduceParams& p, int token,
                                       const Wire (&result)[VECS], const Wire (&gamma)[VECS],
                                       Exchange& exchange, int& turn) {
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

/// Loads the row of an array that may be null, at this thread's columns.
__device__ __forceinline__ void load_columns(Wire (&w)[VECS], const AllReduceParams& p,
                                             const void* base, int token) {
#pragma unroll
  for (int i = 0; i < VECS; ++i) {
    const int column = column_of(i);
    if (base != nullptr && column < p.hidden_size) {
      w[i] = load_wire(base, static_cast<int64_t>(token) * p.hidden_size + column);
    }
  }
}

// --------------------------------------------------------------------------------------------- turns

/// Address in a rank's buffer of this call.
__device__ __forceinline__ uint8_t* buffer_of(const AllReduceParams& p, int rank, int turn) {
  return p.buffers[rank] + turn * p.buffer_bytes;
}

/// Slot of this rank at a peer.
__device__ __forceinline__ int slot_at(int peer, int rank) { return rank < peer ? rank : rank - 1; }

/// One thread of each block, after it has read the turn: the last to come passes it on.
__device__ __forceinline__ void pass_turn_on(const AllReduceParams& p, int turn) {
  if (atomicAdd(p.state + 1, 1) == static_cast<int>(gridDim.x) - 1) {
    p.state[1] = 0;
    p.state[0] = turn + 1 == kNumBuffers ? 0 : turn + 1;
  }
}

}  // namespace cumoe
