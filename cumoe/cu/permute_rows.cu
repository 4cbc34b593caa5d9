// permute_rows: each token's row, and its scales, to all rows of the permutation that are its own.
//
// out[permuted_idx[t, k]] = a[t] for every k where that is not -1; out_scale likewise
//
// Grid      num_tokens * num_pieces, the pieces of a token next to each other.
// Block     128 threads, kVectors vectors of 16 bytes each; that of a token's first piece has its scales, too.
// smem      row (64,) int32: the token's columns, at most 32 + 32 shared.
#include "ptx.cuh"

using namespace cumoe;

constexpr int kThreads = 128, kVectors = 4;
constexpr int kMaxColumns = 64;

struct Params {
  const uint8_t* a;             // (num_tokens, row_bytes)
  const float* a_scale;         // (num_tokens, num_blocks) at the strides below, or null
  const int32_t* permuted_idx;  // (num_tokens, columns)
  uint8_t* out;                 // (max_rows, row_bytes)
  float* out_scale;             // (max_rows, num_blocks)
  int64_t a_scale_row_stride;   // in elements
  int64_t a_scale_block_stride;
  int32_t columns;
  int32_t row_bytes;   // a multiple of 16
  int32_t num_blocks;  // 0 without scales
  int32_t num_pieces;  // ceil(row_bytes / (128 * 4 * 16))
};

extern "C" __global__ void __launch_bounds__(kThreads)
    permute_rows(const __grid_constant__ Params p) {
  __shared__ int32_t row[kMaxColumns];
  const int64_t token = blockIdx.x / p.num_pieces;
  const int piece = static_cast<int>(blockIdx.x % p.num_pieces);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x < p.columns) row[threadIdx.x] = p.permuted_idx[token * p.columns + threadIdx.x];
  uint4 value[kVectors];
  const int first = (piece * kVectors * kThreads + static_cast<int>(threadIdx.x)) * 16;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = first + i * kThreads * 16;
    if (at < p.row_bytes) {
      value[i] = *reinterpret_cast<const uint4*>(p.a + token * p.row_bytes + at);
    }
  }
  __syncthreads();
  for (int k = 0; k < p.columns; ++k) {
    if (row[k] < 0) continue;
    uint8_t* out = p.out + static_cast<int64_t>(row[k]) * p.row_bytes;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = first + i * kThreads * 16;
      if (at < p.row_bytes) *reinterpret_cast<uint4*>(out + at) = value[i];
    }
  }
  if (piece > 0) return;
  for (int block = threadIdx.x; block < p.num_blocks; block += kThreads) {
    const float scale = p.a_scale[token * p.a_scale_row_stride + block * p.a_scale_block_stride];
    for (int k = 0; k < p.columns; ++k) {
      if (row[k] >= 0) p.out_scale[static_cast<int64_t>(row[k]) * p.num_blocks + block] = scale;
    }
  }
}
