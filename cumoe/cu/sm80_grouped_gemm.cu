// sm80_grouped_gemm: every expert's rows times that expert's weight, by mma.sync, with gathered rows.
//
// out[r, j] = epilogue(sum over k of a[source(r), k] * b[e(r), row(j), k])
//
// source(r) is token_idx[r] (GATHER) or r. With GATED the block computes the gate and the up column of
// every j. With ACTIVATED (always with GATED) the epilogue is the activation; e4m3 output, which needs it,
// adds a scale for each row and 128 columns.
//
// Grid      max_tiles * num_column_tiles blocks, the column tiles of a row tile in a row; blocks past
//           *num_tiles leave at once.
// Block     WARPS_M * WARPS_N warps; a warp owns BLOCK_M / WARPS_M rows and BLOCK_N / WARPS_N columns.
// smem      NUM_STAGES of a (BLOCK_M, 128 bytes) and b (kRowsB, 128 bytes), 16-byte chunks swizzled by
//           row % 8; dynamic. Rows of b: BLOCK_N gate rows, then BLOCK_N up rows with GATED.
// fp8       bytes are widened in registers to fp16, which is exact. A thread takes four neighbouring
//           bytes as its four k positions of a 16-wide step, in a and b alike, so ldmatrix serves both
//           types. kE4m3: each 128 of k is summed on its own and added times its two scales (two levels).
//           kE4m3Tensor: all of k is summed, then times a_scale * w_scale of the expert and, with a
//           WEIGHTS_TYPE, the weight of the row's token; output of this type is e4m3(y / out_scale).
// From -D   TYPE (kBf16 kF16 kE4m3 kE4m3Tensor) OUTPUT_TYPE WEIGHTS_TYPE (kNoType kBf16 kF32)
//           GATED ACTIVATED ACTIVATION GATHER BLOCK_M BLOCK_N NUM_STAGES WARPS_M WARPS_N
#include "activation.cuh"
#include "vec.cuh"

using namespace cumoe;

struct Params {
  const uint8_t* a;      // (num_source_rows, k)
  const float* a_scale;  // (num_source_rows, ceil(k / 128)); e4m3 only. Of tensors (num_local,)
  const uint8_t* b;      // (num_local, rows, k), row-major or in 128-byte blocks of k
  const float* b_scale;  // (num_local, b_scale_rows, ceil(k / 128)); of tensors without blocks of k
  void* out;             // (max_rows, n)
  float* out_scale;  // (max_rows, ceil(n / 128)); e4m3 output only. Of tensors (num_local,), read
  const int32_t* token_idx;     // (max_rows,)
  const int32_t* tile_expert;   // (max_tiles,)
  const int32_t* tile_row_end;  // (max_tiles,)
  const int32_t* num_tiles;     // (1,)
  int64_t a_scale_row_stride;   // in elements
  int64_t a_scale_block_stride;
  int64_t b_expert_bytes;  // strides of b in bytes
  int64_t b_row_bytes;
  int64_t b_block_bytes;  // from one 128-byte block of k to the next
  int64_t out_scale_row_stride;
  int64_t out_scale_block_stride;
  int32_t n;          // output columns
  int32_t k_bytes;    // a multiple of 16
  int32_t row_step;   // rows of b from one column to the next
  int32_t first_row;  // row of b of column 0 (the gate with GATED)
  int32_t up_row;     // row of b of the up column 0
  int32_t b_scale_rows;
  int32_t gate_scale_row;  // block row of b_scale of column 0 (the gate with GATED)
  int32_t up_scale_row;
  int32_t num_column_tiles;  // ceil(n / BLOCK_N)
  ActivationParams activation;
  const void* token_weights;  // WEIGHTS_TYPE: (num_tokens, columns), of which column 0 is read
  int32_t token_weights_columns;
  int32_t num_weighted;  // experts before this one multiply by them
};

constexpr int kThreads = WARPS_M * WARPS_N * kWarpSize;
constexpr int kHalves = GATED ? 2 : 1;
constexpr int kRowsB = BLOCK_N * kHalves;
constexpr int kRowBytes = 128;  // bytes of k per stage, one scale block for e4m3
constexpr int kStageBytes = (BLOCK_M + kRowsB) * kRowBytes;
constexpr int kWarpM = BLOCK_M / WARPS_M, kWarpN = BLOCK_N / WARPS_N;
constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
constexpr bool kFp8 = TYPE == kE4m3 || TYPE == kE4m3Tensor;
constexpr bool kTwoLevels = TYPE == kE4m3, kWeighted = WEIGHTS_TYPE != kNoType;

static_assert(kWarpM % 16 == 0, "a warp's rows are a multiple of the mma m (16)");
static_assert(kWarpN % 16 == 0, "ldmatrix.x4 loads two n tiles of b at once");
static_assert(kThreads % 8 == 0 && BLOCK_M % (kThreads / 8) == 0 || BLOCK_M < kThreads / 8,
              "threads copy whole passes of rows");
static_assert(OUTPUT_TYPE != kE4m3 || (ACTIVATED && BLOCK_N == kScaleBlock),
              "requantisation needs the 128 columns of a scale block in one thread block");
static_assert(ACTIVATED || !GATED, "gate and up come together in the activation");
static_assert(OUTPUT_TYPE != kE4m3Tensor || ACTIVATED, "fp8 rows are an activation's");
static_assert(!kWeighted || (TYPE == kE4m3Tensor && ACTIVATED && GATHER),
              "a token's weight comes before the activation");
static_assert(NUM_STAGES >= 2, "the pipeline needs two stages");

/// Address of a 16-byte chunk in a (rows, 128 bytes) tile.
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int row, int chunk) {
  return tile + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

/// Copies the tiles of one 128-byte step of k; a thread keeps to one chunk column and strides over rows.
struct Loader {
  static constexpr int kRowsPerPass = kThreads / 8;
  static constexpr int kPassesA = ceil_div(BLOCK_M, kRowsPerPass);
  static constexpr int kPassesB = ceil_div(kRowsB, kRowsPerPass);

  const uint8_t* a_row[kPassesA];  // null: outside
  const uint8_t* b_expert;
  int chunk, first;

  __device__ __forceinline__ void init(const Params& p, int expert, int row0, int row_end) {
    chunk = threadIdx.x % 8;
    first = threadIdx.x / 8;
    b_expert = p.b + expert * p.b_expert_bytes;
#pragma unroll
    for (int i = 0; i < kPassesA; ++i) {
      const int row = row0 + first + i * kRowsPerPass;
      const int source = row >= row_end ? -1 : GATHER ? p.token_idx[row] : row;
      a_row[i] = source < 0 ? nullptr : p.a + static_cast<int64_t>(source) * p.k_bytes;
    }
  }

  __device__ __forceinline__ void load(const Params& p, uint32_t stage, int step,
                                       int column0) const {
    const int k = step * kRowBytes + chunk * 16;
    const bool k_valid = k < p.k_bytes;
#pragma unroll
    for (int i = 0; i < kPassesA; ++i) {
      const int row = first + i * kRowsPerPass;
      if (BLOCK_M % kRowsPerPass != 0 && row >= BLOCK_M) break;
      const bool valid = k_valid && a_row[i] != nullptr;
      ptx::cp_async_cg_16(swizzled(stage, row, chunk), valid ? a_row[i] + k : p.a, valid ? 16 : 0);
    }
    const uint32_t b_tile = stage + BLOCK_M * kRowBytes;
    const uint8_t* b = b_expert + step * p.b_block_bytes + chunk * 16;
#pragma unroll
    for (int i = 0; i < kPassesB; ++i) {
      const int row = first + i * kRowsPerPass;
      if (kRowsB % kRowsPerPass != 0 && row >= kRowsB) break;
      const int column = column0 + row % BLOCK_N;
      const int base = GATED && row >= BLOCK_N ? p.up_row : p.first_row;
      const bool valid = k_valid && column < p.n;
      const int64_t offset = (base + static_cast<int64_t>(column) * p.row_step) * p.b_row_bytes;
      ptx::cp_async_cg_16(swizzled(b_tile, row, chunk), valid ? b + offset : p.b, valid ? 16 : 0);
    }
  }
};

/// The accumulators of a warp: rows 16 * i + lane / 4 (+ 8), columns 8 * j + lane % 4 * 2 (+ 1).
using Accum = float[kHalves][kTilesM][kTilesN][4];

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (TYPE == kBf16) {
    ptx::mma_m16n8k16_bf16(d, a, b0, b1);
  } else {
    ptx::mma_m16n8k16_f16(d, a, b0, b1);
  }
}

/// Adds one stage's product to `accum`: four steps of 32 bytes of k.
__device__ __forceinline__ void multiply_stage(Accum& accum, uint32_t stage, int warp_m, int warp_n,
                                               int lane) {
  const uint32_t b_tile = stage + BLOCK_M * kRowBytes;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t a[kTilesM][4];
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      // Matrices: rows 0-7 and 8-15 of the first 16 bytes, then of the second.
      const int row = warp_m * kWarpM + i * 16 + lane % 16;
      ptx::ldmatrix_x4(a[i], swizzled(stage, row, step * 2 + lane / 16));
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int pair = 0; pair < kTilesN / 2; ++pair) {
        // Matrices: columns 0-7, first and second 16 bytes, then columns 8-15.
        const int column = warp_n * kWarpN + pair * 16 + lane % 8 + lane / 16 * 8;
        uint32_t b[4];
        ptx::ldmatrix_x4(b, swizzled(b_tile, half * BLOCK_N + column, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) {
            float (&d)[4] = accum[half][i][pair * 2 + t];
            if constexpr (kFp8) {
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const uint32_t a0 = a[i][2 * h], a1 = a[i][2 * h + 1], bh = b[2 * t + h];
                const uint32_t wide[4] = {f16x2_from_e4m3x2(a0 & 0xffffu),
                                          f16x2_from_e4m3x2(a1 & 0xffffu),
                                          f16x2_from_e4m3x2(a0 >> 16), f16x2_from_e4m3x2(a1 >> 16)};
                mma(d, wide, f16x2_from_e4m3x2(bh & 0xffffu), f16x2_from_e4m3x2(bh >> 16));
              }
            } else {
              mma(d, a[i], b[2 * t], b[2 * t + 1]);
            }
          }
        }
      }
    }
  }
}

/// Multiplies the sums by the scales of an expert and by the weights of the rows' tokens.
__device__ __forceinline__ void scale_sums(const Params& p, Accum& accum, int expert, int row0,
                                           int row_end) {
  const float a_scale = p.a_scale[expert * p.a_scale_row_stride];
  const float* b_scale = p.b_scale + expert * p.b_scale_rows;
  float scale[kHalves];
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    scale[half] = a_scale * b_scale[half ? p.up_scale_row : p.gate_scale_row];
  }
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + i * 16 + h * 8;
      float weight = 1.0f;
      if (kWeighted && row < row_end && expert < p.num_weighted) {
        const int64_t token = p.token_idx[row];
        weight = load_element<WEIGHTS_TYPE>(p.token_weights, token * p.token_weights_columns);
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          float (&d)[4] = accum[half][i][j];
          d[2 * h] = d[2 * h] * scale[half] * weight;
          d[2 * h + 1] = d[2 * h + 1] * scale[half] * weight;
        }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    sm80_grouped_gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t smem[];
  const int lane = threadIdx.x % kWarpSize;
  const int warp_idx = threadIdx.x / kWarpSize;
  const int warp_m = warp_idx / WARPS_N, warp_n = warp_idx % WARPS_N;
  const int row_tile = blockIdx.x / p.num_column_tiles;
  const int column_tile = blockIdx.x - row_tile * p.num_column_tiles;
  ptx::griddepcontrol_wait();
  if (row_tile >= *p.num_tiles) return;
  const int expert = p.tile_expert[row_tile];
  const int row0 = row_tile * BLOCK_M;
  const int row_end = p.tile_row_end[row_tile];
  const int column0 = column_tile * BLOCK_N;
  const uint32_t smem_base = ptx::smem_address(smem);
  const int num_steps = ceil_div(p.k_bytes, kRowBytes);

  Loader loader;
  loader.init(p, expert, row0, row_end);
#pragma unroll
  for (int s = 0; s < NUM_STAGES - 1; ++s) {
    if (s < num_steps) loader.load(p, smem_base + s * kStageBytes, s, column0);
    ptx::cp_async_commit_group();
  }

  // Scales (e4m3): this thread's rows of a, and the two block rows of b.
  const float* a_scale[kTilesM][2];
  const float* b_scale[kHalves];
  if constexpr (kTwoLevels) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + warp_m * kWarpM + i * 16 + h * 8 + lane / 4;
        const int source = row >= row_end ? 0 : GATHER ? p.token_idx[row] : row;
        a_scale[i][h] = p.a_scale + source * p.a_scale_row_stride;
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int block = (half ? p.up_scale_row : p.gate_scale_row) + column0 / kScaleBlock;
      b_scale[half] =
          p.b_scale + (static_cast<int64_t>(expert) * p.b_scale_rows + block) * num_steps;
    }
  }

  // NOTE: running addresses, not step % NUM_STAGES, whose registers spill on sm_100a with 3 stages.
  uint32_t stage = smem_base, refill = smem_base + (NUM_STAGES - 1) * kStageBytes;
  Accum accum = {};
  for (int step = 0; step < num_steps; ++step) {
    ptx::cp_async_wait_group<NUM_STAGES - 2>();
    // All threads' copies of this stage have landed, and all have read the stage refilled below.
    __syncthreads();
    const int next = step + NUM_STAGES - 1;
    if (next < num_steps) {
      loader.load(p, refill, next, column0);
    }
    ptx::cp_async_commit_group();
    if constexpr (kTwoLevels) {
      float row_scale[kTilesM][2];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        row_scale[i][0] = a_scale[i][0][step * p.a_scale_block_stride];
        row_scale[i][1] = a_scale[i][1][step * p.a_scale_block_stride];
      }
      Accum slab = {};
      multiply_stage(slab, stage, warp_m, warp_n, lane);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const float scale = b_scale[half][step];
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
          for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              float& sum = accum[half][i][j][v];
              sum = fmaf(slab[half][i][j][v], row_scale[i][v / 2] * scale, sum);
            }
          }
        }
      }
    } else {
      multiply_stage(accum, stage, warp_m, warp_n, lane);
    }
    refill = stage;
    stage = stage == smem_base + (NUM_STAGES - 1) * kStageBytes ? smem_base : stage + kStageBytes;
  }

  // Epilogue: scales and the activation in place, then one scale a row for e4m3, then the store.
  if constexpr (TYPE == kE4m3Tensor) {
    scale_sums(p, accum, expert, row0 + warp_m * kWarpM + lane / 4, row_end);
  }
  if constexpr (ACTIVATED) {
    const ActivationValues act = activation_of(p.activation, expert);
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          accum[0][i][j][v] = activate(accum[0][i][j][v], accum[kHalves - 1][i][j][v], act);
        }
      }
    }
  }
#if OUTPUT_TYPE == 3
  __shared__ float warp_amax[WARPS_N][BLOCK_M];
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float amax = 0.0f;
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        amax = fmaxf(amax, fmaxf(fabsf(accum[0][i][j][2 * h]), fabsf(accum[0][i][j][2 * h + 1])));
      }
      amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, 1));
      amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, 2));
      if (lane % 4 == 0) warp_amax[warp_n][warp_m * kWarpM + i * 16 + h * 8 + lane / 4] = amax;
    }
  }
  __syncthreads();
#elif OUTPUT_TYPE == 4
  const E4m3Divisor divisor(p.out_scale[expert * p.out_scale_row_stride]);
#endif
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int tile_row = warp_m * kWarpM + i * 16 + h * 8 + lane / 4;
      const int row = row0 + tile_row;
      if (row >= row_end) continue;
#if OUTPUT_TYPE == 3
      float amax = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS_N; ++w) amax = fmaxf(amax, warp_amax[w][tile_row]);
      const float scale = e4m3_scale(amax);
      if (warp_n == 0 && lane % 4 == 0) {
        p.out_scale[row * p.out_scale_row_stride + column_tile * p.out_scale_block_stride] = scale;
      }
#endif
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        const int column = column0 + warp_n * kWarpN + j * 8 + lane % 4 * 2;
        if (column >= p.n) continue;
        const float low = accum[0][i][j][2 * h], high = accum[0][i][j][2 * h + 1];
        const int64_t at = static_cast<int64_t>(row) * p.n + column;
#if OUTPUT_TYPE == 3
        *reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(p.out) + at) =
            static_cast<uint16_t>(e4m3x2_from_f32(__fdiv_rn(low, scale), __fdiv_rn(high, scale)));
#elif OUTPUT_TYPE == 4
        float y[2] = {low, high};
        divisor.divide(y);
        *reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(p.out) + at) =
            static_cast<uint16_t>(e4m3x2_from_f32(y[0], y[1]));
#elif OUTPUT_TYPE == 2
        *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at) = make_float2(low, high);
#else
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + at) =
            pack_pair<OUTPUT_TYPE>(low, high);
#endif
      }
    }
  }
}
