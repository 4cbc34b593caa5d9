// sm90_fp8_grouped_gemm: every expert's rows times that expert's fp8 weight, by TMA and wgmma.
//
// out[r, j] = epilogue(sum over k-blocks b of 128 of
//                      a_scale[source(r), b] * w_scale[block(j), b] * (a[source(r), b] . w[j, b]))
//
// Layout, roles and barriers: sm90_grouped.cuh; warp 3 multiplies the scales of a stage (sm90_scales.cuh).
// Products and their sums: sm90_columns.cuh.
//
// From -D   those of sm90_grouped.cuh; ACTIVATED writes fp8 with 1 x 128 scales, else bf16
#include "sm90_columns.cuh"

using namespace cumoe;

constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

/// Warpgroups 1 and 2: products, promotion and epilogue.
__device__ __forceinline__ void consume(const Params& p, Smem& smem, const Work& work, int thread) {
  const int lane = thread % kWarpSize, group = __shfl_sync(kFullMask, thread / 128, 0);
  Stages in(smem, lane);
  Ring<NUM_CHUNKS> chunks;
  for (Items<> items(smem, work, lane); items.left(); items.next()) {
    in.wait();
    if (in.skip(smem, lane)) continue;
    consume_columns(p, smem, work.steps, in, chunks, group, thread);
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
      if (ptx::elect_one()) load_by_tma(p, smem, work);
    } else if (warp == 3) {
      load_scales(p, smem, work, lane);
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
