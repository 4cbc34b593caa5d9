// finalize: the weighted sum of each token's expert rows.
//
// out[t, h] = sum over k ascending, where permuted_idx[t, k] != -1, of weight[t, k] * rows[idx, h]
//
// in fp32, product and sum rounded separately and in that order, so the twin gives the same bits.
//
// Grid      (num_tokens, ceil(hidden_size / (256 * 8))).
// Block     256 threads, eight neighbouring columns each.
// smem      row (64,) int32, weight (64,) float: the token's columns, at most 32 + 32 shared.
// From -D   ROWS_TYPE WEIGHTS_TYPE OUTPUT_TYPE
#include "vec.cuh"

using namespace cumoe;

constexpr int kMaxColumns = 64;

struct Params {
  const void* rows;             // (max_rows, hidden_size)
  const void* weights;          // (num_tokens, columns)
  const int32_t* permuted_idx;  // (num_tokens, columns)
  void* out;                    // (num_tokens, hidden_size)
  int32_t columns;
  int32_t hidden_size;  // a multiple of 8
};

extern "C" __global__ void __launch_bounds__(256) finalize(const __grid_constant__ Params p) {
  __shared__ int32_t row[kMaxColumns];
  __shared__ float weight[kMaxColumns];
  const int64_t token = blockIdx.x;
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  ptx::griddepcontrol_wait();
  if (threadIdx.x < p.columns) {
    const int64_t slot = token * p.columns + threadIdx.x;
    row[threadIdx.x] = p.permuted_idx[slot];
    weight[threadIdx.x] = load_element<WEIGHTS_TYPE>(p.weights, slot);
  }
  __syncthreads();
  if (column >= p.hidden_size) return;

  float sum[8] = {};
  for (int k = 0; k < p.columns; ++k) {
    if (row[k] < 0) continue;
    float x[8];
    load_8<ROWS_TYPE>(x, p.rows, static_cast<int64_t>(row[k]) * p.hidden_size + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = __fadd_rn(sum[i], __fmul_rn(weight[k], x[i]));
  }
  store_8<OUTPUT_TYPE>(p.out, token * p.hidden_size + column, sum);
}
