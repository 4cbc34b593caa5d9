// ptx_fragments: ldmatrix and mma.sync on one warp.
//
// Grid      one block of 32 threads.
// Out       fragments (32, 4) of four 8x8 matrices; then d (16, 8) of mma in bf16, and in fp16.
#include "ptx.cuh"

using namespace cumoe;

struct Params {
  const uint4* in;     // (32,): rows of four 8x8 matrices of 16-bit elements: a; b is the first two
  const float* accum;  // (16, 8)
  uint32_t* fragments;  // (32, 4)
  float* d;             // (2, 16, 8)
};

extern "C" __global__ void ptx_fragments(const __grid_constant__ Params p) {
  __shared__ uint4 rows[32];
  const int lane = threadIdx.x;
  rows[lane] = p.in[lane];
  __syncthreads();
  uint32_t a[4];
  ptx::ldmatrix_x4(a, ptx::smem_address(&rows[lane]));
  for (int i = 0; i < 4; ++i) p.fragments[4 * lane + i] = a[i];
  for (int type = 0; type < 2; ++type) {
    float d[4];
    for (int v = 0; v < 4; ++v) {
      d[v] = p.accum[(lane / 4 + v / 2 * 8) * 8 + lane % 4 * 2 + v % 2];
    }
    if (type == 0) {
      ptx::mma_m16n8k16_bf16(d, a, a[0], a[1]);
    } else {
      ptx::mma_m16n8k16_f16(d, a, a[0], a[1]);
    }
    for (int v = 0; v < 4; ++v) {
      p.d[type * 128 + (lane / 4 + v / 2 * 8) * 8 + lane % 4 * 2 + v % 2] = d[v];
    }
  }
}
