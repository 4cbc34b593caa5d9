// quantize_fp8_tensor: one fp32 scale for the whole tensor, given or made of tensor_amax's maxima.
//
// scale = max(amax / 448, smallest normal); q = e4m3(x / scale), saturating, nearest even.
//
// Unit      16 neighbouring elements on one lane, ROWS of them 128 units apart, all loaded before the first
//           is used. ROWS changes no bit of the result.
// Grid      ceil(units / 128 / ROWS). With maxima from the end of the tensor on, which is still in L2.
// Block     128 threads.
// smem      warp_amax (32,) float, with maxima.
// From -D   INPUT_TYPE ROWS PERMUTED (a row goes to all rows of the permutation that are its own)
#include "raw.cuh"

using namespace cumoe;

struct Params {
  const void* x;          // (num_rows, num_columns)
  uint8_t* values;        // likewise
  float* scale;           // (1,): read, or written if there are maxima
  const float* partials;  // (num_partials,)
  int64_t num_rows;
  int64_t num_columns;          // a multiple of 8; unless PERMUTED of all rows, as one
  const int32_t* permuted_idx;  // PERMUTED: (num_rows, slots) rows of values, or -1
  int32_t slots;
  int32_t num_partials;  // 0: the scale is given
};

constexpr int kThreads = 128;
constexpr int kElems = 16;

/// 16 neighbouring elements of a row.
struct Unit {
  int64_t row, column;
  int valid;

  __device__ __forceinline__ Unit(const Params& p, int64_t unit) {
    const unsigned of_row = static_cast<unsigned>((p.num_columns + kElems - 1) / kElems);
    row = PERMUTED ? static_cast<unsigned>(unit) / of_row : 0;
    column = (unit - row * of_row) * kElems;
    valid = row < p.num_rows ? valid_of_16(column, p.num_columns) : 0;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads)
    quantize_fp8_tensor(const __grid_constant__ Params p) {
  const bool dynamic = p.num_partials > 0;
  const int64_t block = dynamic ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int64_t first = block * ROWS * kThreads + threadIdx.x;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  Destinations<PERMUTED> to[ROWS];
  Raw<INPUT_TYPE, kElems> raw[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const Unit unit(p, first + r * kThreads);
    to[r].begin(p.permuted_idx, unit.row, unit.valid > 0 ? p.slots : 0);
    raw[r].load(p.x, unit.row * p.num_columns + unit.column, unit.valid);
  }
  float value;
  if (dynamic) {
    value = e4m3_scale(max_of_partials(p.partials, p.num_partials));
    if (block == 0 && threadIdx.x == 0) *p.scale = value;
  } else {
    value = *p.scale;
  }
  const E4m3Divisor divisor(value);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const Unit unit(p, first + r * kThreads);
    float y[kElems];
    raw[r].widen(y);
    divisor.divide(y);
    const uint4 q = e4m3x16_from_f32(y);
    to[r].each([&](int64_t row) {
      store_bytes_16(p.values + row * p.num_columns + unit.column, q, unit.valid,
                     !PERMUTED || p.num_columns % kElems == 0);
    });
  }
}
