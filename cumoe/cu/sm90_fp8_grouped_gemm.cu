// sm90_fp8_grouped_gemm: every expert's rows times that expert's fp8 weight, by TMA and wgmma.
//
// out[r, j] = epilogue(sum over k-blocks b of 128 of
//                      a_scale[source(r), b] * w_scale[block(j), b] * (a[source(r), b] . w[j, b]))
//
// Layout, roles and barriers: sm90_grouped.cuh; warp 3 multiplies the scales of a stage. Each 128 of k is
// summed by wgmma and added times its scales in fp32 (two levels). A consumer has two such products on
// the way: one is added while the other runs.
//
// From -D   those of sm90_grouped.cuh; ACTIVATED writes fp8 with 1 x 128 scales, else bf16
#include "sm90_grouped.cuh"
#include "sm90_scales.cuh"
#include "sm90_store.cuh"

using namespace cumoe;

constexpr int kStageRow = 128 + 16;  // bytes; padded so that neighbouring tokens lie in other banks
constexpr int kScaleSets = GATED ? 1 : 2;
constexpr int kTeams = GATED ? 1 : kConsumers;  // threads that share columns of the result
constexpr int kTeamThreads = kConsumerThreads / kTeams;
constexpr int kRequantised = ACTIVATED ? BLOCK_N : 1;  // tokens
constexpr int kScaleVectors = ceil_div(BLOCK_N, 16);   // of a lane's tokens
constexpr int kScaleRow = (kScaleVectors | 1) * 4;     // floats; four rows in other banks
constexpr int kUnroll = 2;                             // stages between which products overlap
constexpr int kGatherThreads = 2 * kWarpSize;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

static_assert(BLOCK_N % 8 == 0 && BLOCK_N >= 8 && BLOCK_N <= 88, "n of the wgmma, in registers");
static_assert(!ACTIVATED || kTeams * BLOCK_N * kStageRow <= kConsumers * NUM_CHUNKS * kChunkBytes,
              "staging");

struct Smem : Shared {
  // Scales of the tokens, [column % 8 / 2][column / 8][column % 2]: with GATED as they are, else times
  // that of a weight half.
  float scale[NUM_STAGES][kScaleSets][4 * kScaleRow];
  BlockDivisor by_scale[kTeams][kRequantised];
  float amax[kConsumers * 4][kRequantised];
  float2 weight_scale[NUM_STAGES];  // of gate and up
  uint64_t landed[NUM_STAGES];      // gathered tokens, of which warp 3 tells the consumers

  __device__ __forceinline__ void init(int arrivals, int helpers) {
    Shared::init(arrivals, helpers);
    for (int s = 0; s < NUM_STAGES; ++s) {
      ptx::mbarrier_init(ptx::smem_address(&landed[s]), kGatherThreads);
    }
    ptx::fence_mbarrier_init();
  }
};

/// Activation, one scale a token over 128 columns, fp8 rows. With GATED both warpgroups have 64 of the
/// tile's 128 columns, else each has 128 of its own: a team.
__device__ __forceinline__ void store_requantised(const Params& p, Smem& smem, const Tile& tile,
                                                  float (&y)[2][BLOCK_N / 2], int group,
                                                  int thread) {
  constexpr int kParts = GATED ? 1 : 2;
  const int team = GATED ? 0 : group, member = GATED ? thread : thread % 128;
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const auto meet = [&] { ptx::named_barrier_sync(1 + team, kTeamThreads); };
  const ActivationValues act = activation_of(p.activation, tile.expert);
  // NOTE: all columns, tokens or not: one long run of independent arithmetic.
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) {
      y[part][i] = activate(y[part][i], y[GATED ? 1 : part][i], act);
    }
  }
#pragma unroll
  for (int i = 0; i < BLOCK_N / 4; ++i) {
    float amax = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float* values = y[part] + i / 2 * 4 + i % 2;
      amax = fmaxf(amax, fmaxf(fabsf(values[0]), fabsf(values[2])));
    }
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, offset));
    }
    if (lane < 4) smem.amax[warp][i / 2 * 8 + 2 * lane + i % 2] = amax;
  }
  meet();
  const int block = GATED ? tile.column_tile : tile.column_tile * 2 + group;
  if (member < tile.rows) {
    float amax = 0.0f;
#pragma unroll
    for (int w = 0; w < kTeamThreads / kWarpSize; ++w) {
      amax = fmaxf(amax, smem.amax[team * 4 + w][member]);
    }
    const float scale = block_scale(amax, smem.by_scale[team][member]);
    if (block * 128 < p.n) {
      p.out_scale[(tile.row0 + member) * p.out_scale_row_stride +
                  block * p.out_scale_block_stride] = scale;
    }
  }
  meet();
  uint8_t* staging = smem.chunks[0][0] + team * (BLOCK_N * kStageRow);
#pragma unroll
  for (int i = 0; i < BLOCK_N / 4; i += 2) {
    const int token = i * 4 + 2 * (lane % 4);
    const BlockDivisor first = smem.by_scale[team][token], second = smem.by_scale[team][token + 1];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint8_t* to = staging + token * kStageRow + part * 64 + member / kWarpSize * 16 + lane / 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* values = y[part] + 2 * i + 2 * h;
        const uint32_t q = e4m3x2_from_f32(first.divide(values[0]), second.divide(values[1]));
        to[8 * h] = static_cast<uint8_t>(q);
        to[8 * h + kStageRow] = static_cast<uint8_t>(q >> 8);
      }
    }
  }
  meet();
  for (int i = member; i < tile.rows * 8; i += kTeamThreads) {
    const int token = i / 8, column = block * 128 + i % 8 * 16;
    if (column >= p.n) continue;
    const int64_t at = static_cast<int64_t>(tile.row0 + token) * p.n + column;
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.out) + at) =
        *reinterpret_cast<const uint4*>(staging + token * kStageRow + i % 8 * 16);
  }
}

/// A consumer's registers: of each part of 64 weight rows the sums and the product of 128 of k, and the
/// scales of a lane's tokens times that of the weights. With GATED the parts are the same rows of gate
/// and of up, else those of one half.
struct Consumer {
  Smem& smem;
  const int lane, group;
  const uint32_t zero;  // unknown to the compiler
  Stages in;
  float4 scales[kScaleVectors];
  float2 weight_scale = {1.0f, 1.0f};  // of gate and up
  float accum[2][BLOCK_N / 2], product[2][BLOCK_N / 2];

  __device__ __forceinline__ const float4* scales_of_stage() const {
    const float* row = smem.scale[in.ring.slot][GATED ? 0 : group] + lane % 4 * kScaleRow;
    return reinterpret_cast<const float4*>(row);
  }

  __device__ __forceinline__ void multiply(int part) {
    const int half = GATED ? part : group, quarter = GATED ? group : part;
    const uint32_t weights = in.stage() + half * kHalfBytes + quarter * (kHalfBytes / 2);
    wgmma::fence();
    wgmma::mma_e4m3<BLOCK_N>(product[part], wgmma::descriptor(weights),
                             wgmma::descriptor(in.stage() + 2 * kHalfBytes), false);
    wgmma::commit();
  }

  /// Adds a product; with `load` the scales are replaced by those of the ring's stage as they are done
  /// with. NOTE: a load waits in line behind products already issued: long before it is needed.
  __device__ __forceinline__ void add(int part, bool load) {
    const float4* next = scales_of_stage();
    float weight = part == 0 ? weight_scale.x : weight_scale.y;
    if constexpr (GATED) {
      // NOTE: tied to the product, or ptxas multiplies by it, and so waits for the scales, between the
      // instructions that issue the next one.
      product[part][0] = ptx::opaque(product[part][0]);
      weight =
          __uint_as_float(__float_as_uint(weight) | (__float_as_uint(product[part][0]) & zero));
    }
#pragma unroll
    for (int v = 0; v < kScaleVectors; ++v) {
      const float4 scale = scales[v];
#pragma unroll
      for (int i = 8 * v; i < 8 * v + 8 && i < BLOCK_N / 2; ++i) {
        const int column = i % 8 / 4 * 2 + i % 2;
        const float token = column == 0   ? scale.x
                            : column == 1 ? scale.y
                            : column == 2 ? scale.z
                                          : scale.w;
        accum[part][i] = fmaf(product[part][i], GATED ? token * weight : token, accum[part][i]);
      }
      if (load) scales[v] = next[v];
    }
    if (GATED && load) weight_scale = smem.weight_scale[in.ring.slot];
  }

  /// Before the first stage of a tile.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) accum[0][i] = accum[1][i] = 0.0f;
    in.wait();
    const float4* first = scales_of_stage();
#pragma unroll
    for (int v = 0; v < kScaleVectors; ++v) scales[v] = first[v];
    if constexpr (GATED) weight_scale = smem.weight_scale[in.ring.slot];
  }

  /// STAGES stages, of which each product runs while the one before it is added; `more` follow. The last
  /// stage of a tile is not released.
  template <int STAGES>
  __device__ __forceinline__ void run(bool more) {
    multiply(0);
    multiply(1);
#pragma unroll
    for (int s = 1; s <= STAGES; ++s) {
      const int previous = in.ring.slot;
      in.ring.advance();
      wgmma::wait<1>();
      add(0, false);
      if (s < STAGES) {
        in.wait();
        multiply(0);
        wgmma::wait<1>();
      } else {
        if (more) in.wait();
        wgmma::wait<0>();
      }
      if (s < STAGES || more) in.release(previous, lane);
      add(1, s < STAGES || more);
      if (s < STAGES) multiply(1);
    }
  }
};

/// Warpgroups 1 and 2: products, promotion and epilogue.
__device__ __forceinline__ void consume(const Params& p, Smem& smem, const Work& work, int thread) {
  const int lane = thread % kWarpSize, group = __shfl_sync(kFullMask, thread / 128, 0);
  const uint32_t zero = static_cast<uint32_t>(p.w_scale_rows) >> 31;
  Consumer consumer{smem, lane, group, zero, Stages(smem, lane)};
  Ring<NUM_CHUNKS> chunks;
  for (Items<> items(smem, work, lane); items.left(); items.next()) {
    consumer.begin();
    if (consumer.in.skip(smem, lane)) continue;
    int left = work.steps;
    for (; left >= kUnroll; left -= kUnroll) consumer.run<kUnroll>(left > kUnroll);
    for (; left > 0; --left) consumer.run<1>(left > 1);
    const int last = consumer.in.ring.slot == 0 ? NUM_STAGES - 1 : consumer.in.ring.slot - 1;
    const Tile tile(smem.tiles[last]);
    consumer.in.release(last, lane);
    if constexpr (ACTIVATED) {
      store_requantised(p, smem, tile, consumer.accum, group, thread);
    } else {
      store_bf16(p, smem, tile, consumer.accum, chunks, group, thread);
    }
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(128 + kConsumerThreads, 1)
        sm90_fp8_grouped_gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Work work = start_block(p, smem, 1, GATHER || !ACTIVATED ? 3 : 1);
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      if (lane == 0) load_by_tma(p, smem, work);
    } else if (warp == 3) {
      load_scales(p, smem, work, lane, [&](int slot, int token, float scale, float2 weights) {
        if (token >= BLOCK_N) return;
        const int at = token % 8 / 2 * kScaleRow + token / 8 * 2 + token % 2;
#pragma unroll
        for (int h = 0; h < kScaleSets; ++h) {
          const float weight = GATED ? 1.0f : h == 0 ? weights.x : weights.y;
          smem.scale[slot][h][at] = scale * weight;
        }
      });
    } else if constexpr (GATHER) {
      gather_tokens<kGatherThreads>(p, smem, smem.landed, work, threadIdx.x - kWarpSize);
    } else if constexpr (!ACTIVATED) {
      write_rows(p, smem, work, warp - 1, lane);
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume(p, smem, work, threadIdx.x - 128);
  }
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
}
