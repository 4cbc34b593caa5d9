// ptx_copy: cp.async with every number of valid bytes, in two groups.
//
// Grid      one block of 64 threads; thread t copies chunks t and t + 64, valid bytes t % 17.
#include "ptx.cuh"

using namespace cumoe;

struct Params {
  const uint4* in;  // (128,)
  uint4* out;       // (128,)
};

extern "C" __global__ void ptx_copy(const __grid_constant__ Params p) {
  __shared__ uint4 chunks[128];
  const int t = threadIdx.x;
  ptx::cp_async_cg_16(ptx::smem_address(&chunks[t]), p.in + t, t % 17);
  ptx::cp_async_commit_group();
  ptx::cp_async_cg_16(ptx::smem_address(&chunks[t + 64]), p.in + t + 64, 16 - t % 17);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<1>();
  __syncthreads();
  p.out[t] = chunks[63 - t];
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  p.out[t + 64] = chunks[127 - t];
}
