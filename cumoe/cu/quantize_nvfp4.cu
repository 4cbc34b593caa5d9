// quantize_nvfp4: e2m1 values, two a byte, an e4m3 scale for each row and 16 columns, one fp32 scale for all.
//
// scale = e4m3(global * (amax * (1 / 6))); q = e2m1(x * (global / scale)). The global scale is given, or
// made of the maxima that tensor_amax wrote.
//
// Unit      ROWS rows by 16 columns on one lane. All loads of a unit come before its arithmetic. ROWS changes
//           no bit of the result.
// Grid      ceil(units / 128), the groups of a row next to each other; padding of the scales, which becomes
//           zero, is units without values. With maxima from the last rows on, which are still in L2.
// Block     128 threads.
// smem      warp_amax (32,) float, with maxima.
// From -D   INPUT_TYPE ROWS SWIZZLED (scales in tiles of 128 rows by 4 groups)
#include "fp4.cuh"
#include "raw.cuh"

using namespace cumoe;

struct Params {
  const void* x;          // (num_rows, num_columns)
  uint8_t* values;        // (num_rows, num_columns / 2), the even column in the low four bits
  uint8_t* scale;         // (scale_rows, scale_groups)
  float* global_scale;    // (1,): read, or written if there are maxima
  const float* partials;  // (num_partials,)
  int64_t num_rows;
  int64_t scale_rows;    // num_rows, rounded up to a multiple of 128 if SWIZZLED
  int32_t num_columns;   // a multiple of 16
  int32_t scale_groups;  // num_columns / 16, rounded up to a multiple of 4 if SWIZZLED
  int32_t num_partials;  // 0: the global scale is given
};

constexpr int kThreads = 128;

extern "C" __global__ void __launch_bounds__(kThreads, 6)
    quantize_nvfp4(const __grid_constant__ Params p) {
  static_assert(32 % ROWS == 0, "the rows of a unit lie in one line of the tiles");
  const bool dynamic = p.num_partials > 0;
  const unsigned block = dynamic ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const unsigned unit = block * kThreads + threadIdx.x;
  const unsigned row_group = unit / p.scale_groups;
  const int group = static_cast<int>(unit - row_group * p.scale_groups);
  const int64_t row0 = static_cast<int64_t>(row_group) * ROWS;
  const int column = group * kFp4Group;
  const bool inside = column < p.num_columns;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  Raw<INPUT_TYPE, kFp4Group> raw[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const bool valid = inside && row0 + r < p.num_rows;
    raw[r].load(p.x, (row0 + r) * p.num_columns + column, valid ? kFp4Group : 0);
  }
  float global_scale;
  if (dynamic) {
    global_scale = nvfp4_global_scale(max_of_partials(p.partials, p.num_partials));
    if (unit == 0) *p.global_scale = global_scale;
  } else {
    global_scale = *p.global_scale;
  }
  // NOTE: the rows of a unit start at a multiple of ROWS, so they lie in a line of the tiles, 16 bytes apart.
  uint8_t* scales = p.scale + (SWIZZLED ? scale_offset_128x4(row0, group, p.scale_groups)
                                        : row0 * p.scale_groups + group);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = row0 + r;
    const bool valid = inside && row < p.num_rows;
    float x[kFp4Group];
    raw[r].widen(x);
    float amax = raw[r].amax_or_nan();
    const bool has_nan = amax != amax;
    if (has_nan) amax = amax_of(x);
    const uint32_t scale = nvfp4_scale(amax, global_scale);
    const float factor = nvfp4_factor(scale, global_scale);
    const bool saturate = has_nan || !(__fmul_rn(amax, factor) < 7.0f);
    const uint2 word =
        make_uint2(e2m1x8_from_f32(x, factor, saturate), e2m1x8_from_f32(x + 8, factor, saturate));
    if (valid) *reinterpret_cast<uint2*>(p.values + (row * p.num_columns + column) / 2) = word;
    if (row < p.scale_rows) {
      scales[r * (SWIZZLED ? 16 : p.scale_groups)] = static_cast<uint8_t>(valid ? scale : 0);
    }
  }
}
