// finalize: the weighted sum of each token's expert rows.
//
// out[t, h] = sum over k ascending, where permuted_idx[t, k] != -1, of weight[t, k] * rows[idx, h]
//
// in fp32, product and sum rounded separately and in that order, so the twin gives the same bits.
//
// Grid      num_tokens * num_pieces, the pieces of a token next to each other: its rows are read as wholes.
// Block     128 threads, eight neighbouring columns each. The loads of kBatch rows come before their sums.
// smem      row (64,) int32, weight (64,) float: the token's columns, at most 32 + 32 shared.
// From -D   ROWS_TYPE WEIGHTS_TYPE OUTPUT_TYPE
#include "raw.cuh"

using namespace cumoe;

constexpr int kThreads = 128;
constexpr int kMaxColumns = 64;
constexpr int kBatch = ROWS_TYPE == kF32 ? 4 : 8;

struct Params {
  const void* rows;             // (max_rows, hidden_size)
  const void* weights;          // (num_tokens, columns), or null: ones
  const int32_t* permuted_idx;  // (num_tokens, columns)
  void* out;                    // (num_tokens, hidden_size)
  int32_t columns;
  int32_t hidden_size;  // a multiple of 8
  int32_t num_pieces;   // ceil(hidden_size / (128 * 8))
  int32_t unused_;
};

extern "C" __global__ void __launch_bounds__(kThreads) finalize(const __grid_constant__ Params p) {
  __shared__ int32_t row[kMaxColumns];
  __shared__ float weight[kMaxColumns];
  const int64_t token = blockIdx.x / p.num_pieces;
  const int column = static_cast<int>(blockIdx.x % p.num_pieces * kThreads + threadIdx.x) * 8;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x < kMaxColumns) {
    const bool valid = threadIdx.x < p.columns;
    const int64_t slot = token * p.columns + threadIdx.x;
    row[threadIdx.x] = valid ? p.permuted_idx[slot] : -1;
    const bool given = valid && p.weights != nullptr;
    weight[threadIdx.x] = given ? load_element<WEIGHTS_TYPE>(p.weights, slot) : 1.0f;
  }
  __syncthreads();
  if (column >= p.hidden_size) return;

  float sum[8] = {};
  for (int first = 0; first < p.columns; first += kBatch) {
    Raw<ROWS_TYPE, 8> raw[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t from = row[first + i];
      raw[i].load(p.rows, from * p.hidden_size + column, from >= 0 ? 8 : 0);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int k = first + i;
      if (row[k] < 0) continue;
      float x[8];
      raw[i].widen(x);
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] = __fadd_rn(sum[c], __fmul_rn(weight[k], x[c]));
    }
  }
  store_8<OUTPUT_TYPE>(p.out, token * p.hidden_size + column, sum);
}
