// launch_tma: out[tile] = the BOX_ROWS x BOX_COLUMNS bytes the copy engine brings for that tile.
//
// Grid      (tile columns, tile rows). Block 128 threads; thread 0 issues the copy.
// smem      tile (BOX_ROWS, BOX_COLUMNS) bytes, as the tensor map's swizzle laid them out
// Barriers  full   1 arrival (thread 0, expects the tile's bytes)   waited by all
// From -D   BOX_ROWS BOX_COLUMNS
#if __CUDA_ARCH__ < 900
#error "the copy engine needs sm_90 or later"
#endif
struct alignas(64) TensorMap {
  unsigned long long words[16];
};
struct Params {
  unsigned char* out;  // (gridDim.y, gridDim.x, BOX_ROWS, BOX_COLUMNS)
  TensorMap map;
};
constexpr int kTileBytes = BOX_ROWS * BOX_COLUMNS;

extern "C" __global__ void launch_tma(const __grid_constant__ Params p) {
  __shared__ alignas(1024) unsigned char tile[kTileBytes];
  __shared__ alignas(8) unsigned long long full;
  const unsigned barrier = static_cast<unsigned>(__cvta_generic_to_shared(&full));
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(tile));

  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(kTileBytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(target),
        "l"(&p.map), "r"(blockIdx.x * BOX_COLUMNS), "r"(blockIdx.y * BOX_ROWS), "r"(barrier)
        : "memory");
  }
  unsigned done = 0;
  while (!done) {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier)
        : "memory");
  }

  unsigned char* out = p.out + (blockIdx.y * gridDim.x + blockIdx.x) * kTileBytes;
  for (int i = threadIdx.x; i < kTileBytes; i += blockDim.x) out[i] = tile[i];
}
