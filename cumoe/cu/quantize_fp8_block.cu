// quantize_fp8_block: one fp32 scale for each row and 128 columns.
//
// scale = max(amax / 448, smallest normal); q = e4m3(x / scale), saturating, nearest even.
//
// Unit      128 columns of a row on 8 lanes, a lane holding 16 neighbouring columns.
// Grid      ceil(units / 16), the blocks of a row next to each other.
// Block     128 threads. The last block of a row may be partial: lanes past it hold zeros and store nothing.
// From -D   INPUT_TYPE PERMUTED (a row goes to all rows of the permutation that are its own)
#include "raw.cuh"

using namespace cumoe;

struct Params {
  const void* x;             // (num_rows, num_columns)
  uint8_t* values;           // (num_rows, num_columns)
  float* scale;              // (num_rows, num_blocks) at the strides below
  int64_t scale_row_stride;  // in elements
  int64_t scale_block_stride;
  int64_t num_rows;
  int32_t num_columns;  // a multiple of 8
  int32_t num_blocks;
  const int32_t* permuted_idx;  // PERMUTED: (num_rows, slots) rows of values and scale, or -1
  int32_t slots;
  int32_t unused_;
};

constexpr int kThreads = 128;
constexpr int kColumns = 16;
constexpr int kLanes = kScaleBlock / kColumns;

extern "C" __global__ void __launch_bounds__(kThreads)
    quantize_fp8_block(const __grid_constant__ Params p) {
  const unsigned unit = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t row = unit / p.num_blocks;
  const int block = static_cast<int>(unit % p.num_blocks);
  const int column = block * kScaleBlock + lane * kColumns;
  const int valid = row < p.num_rows ? valid_of_16(column, p.num_columns) : 0;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  Destinations<PERMUTED> to;
  to.begin(p.permuted_idx, row, valid > 0 ? p.slots : 0);
  Raw<INPUT_TYPE, kColumns> raw;
  raw.load(p.x, row * p.num_columns + column, valid);
  float y[kColumns];
  raw.widen(y);
  const float scale = divide_by_scale(y, lanes_max<kLanes>(amax_of(y)));
  if (valid == 0) return;
  const uint4 q = e4m3x16_from_f32(y);
  to.each([&](int64_t to_row) {
    store_bytes_16(p.values + to_row * p.num_columns + column, q, valid, p.num_columns % 16 == 0);
    if (lane == 0) p.scale[to_row * p.scale_row_stride + block * p.scale_block_stride] = scale;
  });
}
