// ptx_hopper: two TMA boxes, wgmma on them, stmatrix, and a thread elected of each warp, in one warpgroup
// (sm_90a).
//
// Grid      one block of 128 threads.
// smem      a (64, 128), b (64, 128) bytes with 128-byte swizzle, dynamic.
#include "tma.cuh"
#include "wgmma.cuh"

using namespace cumoe;

struct Params {
  TensorMap map;           // uint8 in boxes of (64, 128), 128-byte swizzle
  uint8_t* boxes;          // (2, 64, 128): shared memory as the copies laid it out
  float* d;                // (64, 64): box 0 times box 1 transposed, e4m3
  uint16_t* transposed;    // (4, 32, 8): what stmatrix stored for the registers 4 * thread + i
  int32_t* elected;        // (4,): threads of each warp
  int32_t coordinates[4];  // column and row of either box
};

extern "C" __global__ void __launch_bounds__(128) ptx_hopper(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  __shared__ __align__(8) uint64_t full[2];
  __shared__ __align__(16) uint16_t matrices[4][32][8];
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  if (t == 0) {
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(ptx::smem_address(&full[i]), 1);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(&p.map);
    for (int i = 0; i < 2; ++i) {
      const uint32_t barrier = ptx::smem_address(&full[i]);
      ptx::mbarrier_arrive_expect_tx(barrier, 8192);
      ptx::tma_load_2d(ptx::smem_address(smem + 8192 * i), &p.map, barrier, p.coordinates[2 * i],
                       p.coordinates[2 * i + 1]);
    }
  }
  __syncthreads();
  for (int i = 0; i < 2; ++i) ptx::mbarrier_wait(ptx::smem_address(&full[i]), 0);
  for (int i = t; i < 16384; i += 128) p.boxes[i] = smem[i];

  float d[32];
  wgmma::fence();
  wgmma::mma_e4m3<64>(d, wgmma::descriptor(ptx::smem_address(smem)),
                      wgmma::descriptor(ptx::smem_address(smem + 8192)), false);
  wgmma::commit();
  wgmma::wait<0>();
  for (int v = 0; v < 32; ++v) {
    const int row = warp * 16 + lane / 4 + 8 * (v / 2 % 2);
    p.d[row * 64 + v / 4 * 8 + 2 * (lane % 4) + v % 2] = d[v];
  }

  const uint32_t r = 0x10001u * (8 * t) + 0x10000u;
  ptx::stmatrix_x4_trans(ptx::smem_address(matrices[warp][lane]), r, r + 0x20002u, r + 0x40004u,
                         r + 0x60006u);
  __syncthreads();
  if (ptx::elect_one()) atomicAdd(p.elected + warp, 1);
  for (int k = 0; k < 8; ++k) p.transposed[(warp * 32 + lane) * 8 + k] = matrices[warp][lane][k];
}
