// What the kernels of an all-reduce put into their peers' memory: parameters, columns, words on the wire,
// turns of the buffers (allreduce.cuh; comm/layout.py has the layout of the memory).
#pragma once

#include "exact.cuh"
#include "fp4.cuh"
#include "sync.cuh"
#include "vec.cuh"
#if CLUSTER > 1
#include "tma.cuh"
#endif

namespace cumoe {

enum InputPolicy : int { kRows = 0, kExperts = 1, kPlain = 2 };
enum QuantFormat : int {
  kNoQuant = 0,
  kFp8Tensor = 1,
  kFp8Token = 2,
  kFp8Block = 3,
  kFp8Ue8m0 = 4,
  kNvfp4 = 5,
  kNvfp4Swizzled = 6
};

constexpr int kMaxRanks = 16;
constexpr int kChunk = 32 * 8;                  // columns
constexpr int kMaxChunks = 256;                 // of a token
constexpr int kGroup = GROUP > 0 ? GROUP : 32;  // columns of a UE8M0 scale
constexpr int kNumBuffers = 3;
constexpr int kWarps = THREADS / 32;
constexpr int kParts = kTypeBytes<TYPE> / 2;                     // 16-byte words of eight elements
constexpr int kBatch = VECS > 2 ? 1 : 8 / VECS;                  // rows of experts in flight
constexpr int kMostPolled = __CUDA_ARCH__ >= 900 ? 4 : 2;        // more take too many registers
constexpr int kPolled = (VECS == 1 ? 8 : kMostPolled) / kParts;  // slots in flight
constexpr bool kEarly = VECS == 1;           // norm_weight is loaded before the wait, not after it
constexpr uint32_t kSentinel = 0x80000000u;  // see cumoe/comm/layout.py

static_assert(TYPE == kBf16 || TYPE == kF16 || TYPE == kF32, "no such wire");
static_assert(INPUT == kPlain || TYPE != kF32, "the rows of experts have 16-bit elements");
static_assert(CLUSTER * kWarps * VECS <= kMaxChunks, "chunks that threads hold");
static_assert(THREADS % 32 == 0 && 32 % kBatch == 0, "whole warps, and whole batches of slots");

struct Params {
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
  void* scale_out;
  const float* quant_scale;  // (1,): kFp8Tensor, or the global scale of kNvfp4
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

__device__ __forceinline__ uint32_t without_sentinel(uint32_t word) {
  return word == kSentinel ? 0u : word;
}

/// Makes a part fit for the wire. Sums begin with zero, which other minus zeros do not change.
__device__ __forceinline__ void remove_sentinels(Wire& w) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    uint4& v = w.part[i];
    v.x = without_sentinel(v.x), v.y = without_sentinel(v.y);
    v.z = without_sentinel(v.z), v.w = without_sentinel(v.w);
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
  // NOTE: from zero on, so no sum is -0, which the result may not be on the wire.
#pragma unroll
  for (int c = 0; c < 8; ++c) sum[c] = 0.0f;
  add_slots<0>(sum, mine, slots, slot_bytes, rank);
  if (rank == RANKS - 1) add(sum, mine);
}

// --------------------------------------------------------------------------------------------- turns

/// Address in a rank's buffer of this call.
__device__ __forceinline__ uint8_t* buffer_of(const Params& p, int rank, int turn) {
  return p.buffers[rank] + turn * p.buffer_bytes;
}

/// Slot of this rank at a peer.
__device__ __forceinline__ int slot_at(int peer, int rank) { return rank < peer ? rank : rank - 1; }

/// One thread of each block, after it has read the turn: the last to come passes it on.
__device__ __forceinline__ void pass_turn_on(const Params& p, int turn) {
  if (atomicAdd(p.state + 1, 1) == static_cast<int>(gridDim.x) - 1) {
    p.state[1] = 0;
    p.state[0] = turn + 1 == kNumBuffers ? 0 : turn + 1;
  }
}

}  // namespace cumoe
