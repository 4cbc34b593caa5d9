// quantize_fp8_block: one fp32 scale for each row and 128 columns.
//
// scale = max(amax / 448, smallest normal); q = e4m3(x / scale), saturating, nearest even.
//
// Grid      ceil(num_rows * num_blocks / 16) blocks; a block of the scale grid is 16 lanes' work.
// Block     256 threads; a lane holds eight neighbouring elements. The last block may be partial:
//           lanes past the row hold zeros and store nothing.
// From -D   INPUT_TYPE
#include "vec.cuh"

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
};

extern "C" __global__ void __launch_bounds__(256)
    quantize_fp8_block(const __grid_constant__ Params p) {
  constexpr int kLanes = kScaleBlock / 8;
  const int64_t unit =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t row = unit / p.num_blocks;
  const int block = static_cast<int>(unit - row * p.num_blocks);
  const int column = block * kScaleBlock + lane * 8;
  const bool valid = row < p.num_rows && column < p.num_columns;
  const int64_t index = row * p.num_columns + column;
  ptx::griddepcontrol_wait();

  float x[8] = {};
  if (valid) load_8<INPUT_TYPE>(x, p.x, index);
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) amax = fmaxf(amax, fabsf(x[i]));
  const float scale = e4m3_scale(half_warp_max(amax));
  if (!valid) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __fdiv_rn(x[i], scale);
  store_8<kE4m3>(p.values, index, x);
  if (lane == 0) p.scale[row * p.scale_row_stride + block * p.scale_block_stride] = scale;
}
