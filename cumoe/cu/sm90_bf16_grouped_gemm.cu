// sm90_bf16_grouped_gemm: every expert's rows times that expert's bf16 weight, by TMA and wgmma.
//
// out[r, j] = epilogue(a[source(r)] . w[j]), fp32 sums, one rounding to bf16.
//
// Layout, roles and barriers: sm90_grouped.cuh. The sums stay in the accumulators for the whole of k,
// one product of a stage always in flight behind the running one.
//
// From -D   those of sm90_grouped.cuh
#include "sm90_grouped.cuh"

using namespace cumoe;

constexpr int kGatherThreads = 3 * kWarpSize;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

static_assert(BLOCK_N % 8 == 0 && BLOCK_N >= 8 && BLOCK_N <= 192, "n of the wgmma, in registers");

/// Warpgroups 1 and 2: products and epilogue.
__device__ __forceinline__ void consume(const Params& p, Shared& smem, const Work& work,
                                        int thread) {
  const int lane = thread % kWarpSize, group = __shfl_sync(kFullMask, thread / 128, 0);
  // Parts: the same rows of gate and up with GATED, else all rows of one half.
  const int group_bytes = GATED ? kHalfBytes / 2 : kHalfBytes;
  const int part_bytes = GATED ? kHalfBytes : kHalfBytes / 2;
  Stages in(smem, lane);
  Ring<NUM_CHUNKS> chunks;
  for (int item = work.first; item < work.count; item += work.stride) {
    float accum[2][BLOCK_N / 2] = {};
    int previous = 0;
    for (int step = 0; step < work.steps; ++step) {
      in.wait();
      if constexpr (GATHER) ptx::fence_proxy_async();
      const uint32_t weights = in.stage() + group * group_bytes;
      const uint32_t tokens = wgmma::descriptor(in.stage() + 2 * kHalfBytes);
      wgmma::fence();
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        wgmma::mma_bf16<BLOCK_N>(accum[part], wgmma::descriptor(weights + part * part_bytes),
                                 tokens, true);
      }
      wgmma::commit();
      wgmma::wait<1>();
      if (step > 0) in.release(previous, lane);
      previous = in.ring.slot;
      in.ring.advance();
    }
    const Tile tile(smem.tiles[previous]);
    wgmma::wait<0>();
    in.release(previous, lane);
    store_bf16(p, smem, tile, accum, chunks, group, thread);
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(128 + kConsumerThreads, 1)
        sm90_bf16_grouped_gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  Shared& smem = *reinterpret_cast<Shared*>(smem_bytes);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (threadIdx.x == 0) {
    if constexpr (!GATHER) ptx::prefetch_tensor_map(&p.a_map);
    ptx::prefetch_tensor_map(&p.w_map);
    smem.init(GATHER ? kGatherThreads : 0);
  }
  // The blocks of a cluster write to each other's barriers and shared memory: all must be there.
  CLUSTER > 1 ? ptx::cluster_sync() : __syncthreads();
  ptx::griddepcontrol_wait();
  const Work work(p, ceil_div(p.k_bytes, 128));
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      if (lane == 0) load_by_tma(p, smem, work);
    } else if constexpr (GATHER) {
      gather_tokens<kGatherThreads>(p, smem, smem.full, work, threadIdx.x - kWarpSize);
    } else {
      if (warp < 3) write_rows(p, smem, work, warp - 1, lane);
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume(p, smem, work, threadIdx.x - 128);
  }
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
}
