// permute_rows: each token's row, and its scales, to all rows of the permutation that are its own.
//
// out[permuted_idx[t, k]] = a[t] for every k where that is not -1; out_scale likewise
//
// Grid      num_tokens * num_pieces, the pieces of a token next to each other.
// Block     128 threads, kVectors vectors of 16 bytes each; that of a token's first piece has its scales, too.
#include "raw.cuh"

using namespace cumoe;

constexpr int kThreads = 128, kVectors = 4;

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
  const int64_t token = blockIdx.x / p.num_pieces;
  const int piece = static_cast<int>(blockIdx.x % p.num_pieces);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  Destinations<true> to;
  to.begin(p.permuted_idx, token, p.columns);
  uint4 value[kVectors];
  const int first = (piece * kVectors * kThreads + static_cast<int>(threadIdx.x)) * 16;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = first + i * kThreads * 16;
    if (at < p.row_bytes) {
      value[i] = *reinterpret_cast<const uint4*>(p.a + token * p.row_bytes + at);
    }
  }
  to.each([&](int64_t row) {
    uint8_t* out = p.out + row * p.row_bytes;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = first + i * kThreads * 16;
      if (at < p.row_bytes) *reinterpret_cast<uint4*>(out + at) = value[i];
    }
  });
  if (piece > 0) return;
  for (int block = threadIdx.x; block < p.num_blocks; block += kThreads) {
    const float scale = p.a_scale[token * p.a_scale_row_stride + block * p.a_scale_block_stride];
    to.each([&](int64_t row) { p.out_scale[row * p.num_blocks + block] = scale; });
  }
}
