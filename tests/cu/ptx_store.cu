// ptx_store: bulk copies from shared to global memory, of two TMA boxes and of a row of bytes (sm_90).
//
// Grid      one block of 128 threads.
// smem      boxes (2, 64, 128) bytes, dynamic.
#include "tma.cuh"

using namespace cumoe;

struct Params {
  TensorMap map;  // uint8 in boxes of (64, 128), 128-byte swizzle
  uint8_t* row;   // (4112,): the last bytes of the second box, as they lie in shared memory
  int32_t coordinates[4];  // column and row of either box
};

extern "C" __global__ void __launch_bounds__(128) ptx_store(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  const int t = threadIdx.x;
  for (int i = t; i < 16384; i += 128) smem[i] = static_cast<uint8_t>(i * 7 + i / 251);
  ptx::fence_proxy_async();
  __syncthreads();
  if (t != 0) return;
  for (int i = 0; i < 2; ++i) {
    ptx::tma_store_2d(&p.map, ptx::smem_address(smem + 8192 * i), p.coordinates[2 * i],
                      p.coordinates[2 * i + 1]);
    ptx::cp_async_bulk_commit_group();
  }
  ptx::cp_async_bulk_store(p.row, ptx::smem_address(smem + 16384 - 4112), 4112);
  ptx::cp_async_bulk_commit_group();
  ptx::cp_async_bulk_wait_group_read<2>();
  for (int i = 0; i < 8192; ++i) smem[i] = 0xdd;
  ptx::cp_async_bulk_wait_group<1>();
  ptx::cp_async_bulk_wait_group<0>();
}
