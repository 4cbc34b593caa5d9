// quantize_fp8_ue8m0: one power-of-two scale for each row and GROUP columns.
//
// scale = the power of two at or above max(amax / 448, 1e-10), kept as its biased exponent, a byte;
// q = e4m3(x / scale). Four scales of a row are one word, words column-major.
//
// Unit      4 groups of a row, one word of scales, on GROUP / 4 lanes, a lane holding 16 columns.
// Grid      ceil(units / units of a block); rows up to a multiple of four, whose words become zero.
// Block     128 threads.
// From -D   INPUT_TYPE GROUP (16, 32, 64 or 128)
#include "raw.cuh"

using namespace cumoe;

struct Params {
  const void* x;        // (num_rows, num_columns)
  uint8_t* values;      // (num_rows, num_columns)
  uint32_t* scale;      // (num_words, word_stride): word w of row r at w * word_stride + r
  int64_t word_stride;  // num_rows rounded up to a multiple of 4
  int64_t num_rows;
  int32_t num_columns;  // a multiple of GROUP
  int32_t num_words;    // ceil(num_columns / GROUP / 4)
};

constexpr int kThreads = 128;
constexpr int kColumns = 16;
constexpr int kGroupLanes = GROUP / kColumns;
constexpr int kLanes = 4 * kGroupLanes;

static_assert(kGroupLanes >= 1 && kLanes <= kWarpSize, "the lanes of a word are in one warp");

extern "C" __global__ void __launch_bounds__(kThreads)
    quantize_fp8_ue8m0(const __grid_constant__ Params p) {
  const unsigned unit = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t row = unit / p.num_words;
  const int word = static_cast<int>(unit % p.num_words);
  const int column = (word * kLanes + lane) * kColumns;
  const int valid = row < p.num_rows && column < p.num_columns ? kColumns : 0;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  Raw<INPUT_TYPE, kColumns> raw;
  raw.load(p.x, row * p.num_columns + column, valid);
  float y[kColumns];
  raw.widen(y);
  const uint32_t scale = ue8m0_scale(lanes_max<kGroupLanes>(amax_of(y)));
  const float reciprocal = ue8m0_reciprocal(scale);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) y[i] = __fmul_rn(y[i], reciprocal);
  store_bytes_16(p.values + row * p.num_columns + column, e4m3x16_from_f32(y), valid, true);
  uint32_t scales = valid ? scale << lane / kGroupLanes * 8 : 0;
  scales |= __shfl_xor_sync(kFullMask, scales, kGroupLanes);
  scales |= __shfl_xor_sync(kFullMask, scales, 2 * kGroupLanes);
  // NOTE: the rows that pad the last column of words lie past the array.
  const int64_t last = word + 1 < p.num_words ? p.word_stride : p.num_rows;
  if (lane == 0 && row < last) p.scale[word * p.word_stride + row] = scales;
}
