// swiglu: the gated activation on its own, with or without requantisation to fp8.
//
// y[r, c] = swiglu(gate[r, c], up[r, c]), c < intermediate_size; fp8 output takes one scale for each row
// and 128 columns (scale and rounding as in quantize_fp8_block).
//
// Grid      strides over (row, 128 columns) units, 16 lanes a unit; only rows below *num_rows if given.
// Block     256 threads; a lane holds eight neighbouring columns. The last unit of a row may be partial.
// Rows      with `token_idx`, rows whose entry is -1 are padding and are left unwritten.
// From -D   INPUT_TYPE OUTPUT_TYPE INTERLEAVED (gate and up alternate along the row)
#include "activation.cuh"
#include "experts.cuh"
#include "vec.cuh"

using namespace cumoe;

struct Params {
  const void* x;         // (num_rows, 2 * intermediate_size)
  const float* x_scale;  // (num_rows, 2 * num_blocks), halves as in x; e4m3 input only
  void* y;               // (num_rows, intermediate_size)
  float* y_scale;        // (num_rows, num_blocks); e4m3 output only
  int64_t x_scale_row_stride;
  int64_t x_scale_block_stride;
  int64_t y_scale_row_stride;
  int64_t y_scale_block_stride;
  const int32_t* expert_offsets;  // (num_local + 1,) or null: one expert
  const int32_t* token_idx;       // (num_rows,) or null: every row counts
  int64_t num_rows;
  int32_t num_local;
  int32_t intermediate_size;  // a multiple of 8
  int32_t num_blocks;
  int32_t gate_first;  // gate is the first half, or the first of each pair
  ActivationParams activation;
};

extern "C" __global__ void __launch_bounds__(256, 4) swiglu(const __grid_constant__ Params p) {
  constexpr int kLanes = kScaleBlock / 8;
  const int lane = threadIdx.x % kLanes;
  ptx::griddepcontrol_wait();
  int64_t rows = p.num_rows;
  if (p.expert_offsets != nullptr) {
    rows = min(rows, static_cast<int64_t>(p.expert_offsets[p.num_local]));
  }
  const int64_t num_units = rows * p.num_blocks;
  const int units_per_block = blockDim.x / kLanes;

  for (int64_t base = static_cast<int64_t>(blockIdx.x) * units_per_block; base < num_units;
       base += static_cast<int64_t>(gridDim.x) * units_per_block) {
    const int64_t unit = base + threadIdx.x / kLanes;
    const int64_t row = unit / p.num_blocks;
    const int block = static_cast<int>(unit - row * p.num_blocks);
    const int column = block * kScaleBlock + lane * 8;
    // NOTE: lanes without work go on to the shuffles below with zeros; all lanes of a warp take part.
    const bool valid = unit < num_units && column < p.intermediate_size &&
                       (p.token_idx == nullptr || p.token_idx[row] >= 0);
    float first[8] = {}, second[8] = {};
    if (valid) {
      const int64_t start = row * 2 * p.intermediate_size;
      if constexpr (INTERLEAVED) {
        float low[8], high[8];
        load_8<INPUT_TYPE>(low, p.x, start + 2 * column);
        load_8<INPUT_TYPE>(high, p.x, start + 2 * column + 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          first[i] = low[2 * i], second[i] = low[2 * i + 1];
          first[i + 4] = high[2 * i], second[i + 4] = high[2 * i + 1];
        }
      } else {
        load_8<INPUT_TYPE>(first, p.x, start + column);
        load_8<INPUT_TYPE>(second, p.x, start + p.intermediate_size + column);
      }
      if constexpr (INPUT_TYPE == kE4m3) {
        const float* scale = p.x_scale + row * p.x_scale_row_stride;
        const float scale_first = scale[block * p.x_scale_block_stride];
        const float scale_second = scale[(block + p.num_blocks) * p.x_scale_block_stride];
#pragma unroll
        for (int i = 0; i < 8; ++i) first[i] *= scale_first, second[i] *= scale_second;
      }
    }
    const int expert = p.expert_offsets != nullptr && valid
                           ? expert_of_row(p.expert_offsets, p.num_local, row)
                           : 0;
    const ActivationValues act = activation_of(p.activation, expert);
    float y[8];
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float gate = p.gate_first ? first[i] : second[i];
      const float up = p.gate_first ? second[i] : first[i];
      y[i] = valid ? swiglu(gate, up, act) : 0.0f;
      amax = fmaxf(amax, fabsf(y[i]));
    }
    const int64_t index = row * p.intermediate_size + column;
    if constexpr (OUTPUT_TYPE == kE4m3) {
      const float scale = e4m3_scale(half_warp_max(amax));
      if (valid) {
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] = __fdiv_rn(y[i], scale);
        store_8<kE4m3>(p.y, index, y);
        if (lane == 0) {
          p.y_scale[row * p.y_scale_row_stride + block * p.y_scale_block_stride] = scale;
        }
      }
    } else {
      if (valid) store_8<OUTPUT_TYPE>(p.y, index, y);
    }
  }
}
