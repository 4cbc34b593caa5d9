// quantize_fp8_token: one fp32 scale for each row.
//
// scale = max(amax / 448, 2^-9 / 448); q = e4m3(x / scale), saturating, nearest even.
//
// Grid      ceil(num_rows / (blockDim.x / ROW_THREADS)).
// Block     a multiple of ROW_THREADS; ROW_THREADS threads share a row, which they hold in registers: VECTORS
//           times eight neighbouring columns each, all loaded before the first is used. Of a longer row
//           they hold the last piece and read the others twice.
// smem      warp_amax (32,) float, if ROW_THREADS is more than a warp.
// From -D   INPUT_TYPE ROW_THREADS (a power of two from 32 to 1024) VECTORS
#include "raw.cuh"

using namespace cumoe;

struct Params {
  const void* x;    // (num_rows, num_columns)
  uint8_t* values;  // (num_rows, num_columns)
  float* scale;     // (num_rows,)
  int64_t num_rows;
  int32_t num_columns;  // a multiple of 8
  int32_t num_pieces;   // of a row, at least 1
};

constexpr int kThreads = ROW_THREADS < 128 ? 128 : ROW_THREADS;
constexpr int kRowWarps = ROW_THREADS / kWarpSize;
constexpr int kPieceElems = ROW_THREADS * VECTORS * 8;

extern "C" __global__ void __launch_bounds__(kThreads)
    quantize_fp8_token(const __grid_constant__ Params p) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kThreads / ROW_THREADS) + threadIdx.x / ROW_THREADS;
  const int thread = threadIdx.x % ROW_THREADS;
  const int num_columns = row < p.num_rows ? p.num_columns : 0;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  Raw<INPUT_TYPE, 8> raw[VECTORS];
  const auto load = [&](int piece) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int column = piece * kPieceElems + (v * ROW_THREADS + thread) * 8;
      raw[v].load(p.x, row * p.num_columns + column, column < num_columns ? 8 : 0);
    }
  };
  float amax = 0.0f;
  for (int piece = 0; piece < p.num_pieces; ++piece) {
    load(piece);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      float x[8];
      raw[v].widen(x);
      amax = fmaxf(amax, amax_of(x));
    }
  }
  amax = lanes_max<kWarpSize>(amax);
  if constexpr (kRowWarps > 1) {
    __shared__ float warp_amax[kThreads / kWarpSize];
    if (threadIdx.x % kWarpSize == 0) warp_amax[threadIdx.x / kWarpSize] = amax;
    __syncthreads();
    const int first = threadIdx.x / ROW_THREADS * kRowWarps;
#pragma unroll
    for (int i = 0; i < kRowWarps; ++i) amax = fmaxf(amax, warp_amax[first + i]);
  }
  const float scale = e4m3_token_scale(amax);
  if (thread == 0 && row < p.num_rows) p.scale[row] = scale;
  const E4m3Divisor divisor(scale);

  for (int piece = p.num_pieces - 1;; load(--piece)) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int column = piece * kPieceElems + (v * ROW_THREADS + thread) * 8;
      float y[8];
      raw[v].widen(y);
      divisor.divide(y);
      if (column < num_columns) store_8<kE4m3>(p.values, row * p.num_columns + column, y);
    }
    if (piece == 0) break;
  }
}
