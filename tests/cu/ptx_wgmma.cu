// ptx_wgmma: groups of wgmma in flight, e4m3 and bf16, at several n (sm_90a).
//
// Grid      one block of 128 threads.
// smem      w (2, 64, 128), a (2, 160, 128) bytes with 128-byte swizzle, dynamic.
#include "tma.cuh"
#include "wgmma.cuh"

using namespace cumoe;

struct Params {
  const uint8_t* w;  // (2, 64, 128)
  const uint8_t* a;  // (2, 160, 128)
  float* d;          // (6, 2, 64, 160): 3 + w[0] @ a[0].T, and the sum of both products
};

/// Rows of 128 bytes to where a TMA with 128-byte swizzle would put them.
__device__ void fill(uint8_t* to, const uint8_t* rows, int num_rows) {
  for (int i = threadIdx.x; i < num_rows * 128; i += 128) to[i ^ (i >> 7 & 7) << 4] = rows[i];
}

__device__ void store(float* out, const float* d, int n) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int v = 0; v < n / 2; ++v) {
    const int row = warp * 16 + lane / 4 + 8 * (v / 2 % 2);
    out[row * 160 + v / 4 * 8 + 2 * (lane % 4) + v % 2] = d[v];
  }
}

template <int N, bool kBf16>
__device__ void products(float* out, const uint32_t (&w)[2], const uint32_t (&a)[2]) {
  float first[N / 2], both[N / 2];
  for (float& x : first) x = 3.0f;
  for (float& x : both) x = 0.0f;
  wgmma::fence();
  if constexpr (kBf16) {
    wgmma::mma_bf16<N>(first, w[0], a[0], true);
    wgmma::commit();
    wgmma::mma_bf16<N>(both, w[0], a[0], false);
    wgmma::mma_bf16<N>(both, w[1], a[1], true);
  } else {
    wgmma::mma_e4m3<N>(first, w[0], a[0], true);
    wgmma::commit();
    wgmma::mma_e4m3<N>(both, w[0], a[0], false);
    wgmma::mma_e4m3<N>(both, w[1], a[1], true);
  }
  wgmma::commit();
  wgmma::wait<1>();
  store(out, first, N);
  wgmma::wait<0>();
  store(out + 64 * 160, both, N);
}

extern "C" __global__ void __launch_bounds__(128) ptx_wgmma(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  uint32_t w[2], a[2];
  for (int i = 0; i < 2; ++i) {
    uint8_t *rows_w = smem + i * 8192, *rows_a = smem + 16384 + i * 20480;
    fill(rows_w, p.w + i * 8192, 64);
    fill(rows_a, p.a + i * 20480, 160);
    w[i] = wgmma::descriptor(ptx::smem_address(rows_w));
    a[i] = wgmma::descriptor(ptx::smem_address(rows_a));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  products<8, false>(p.d, w, a);
  products<56, false>(p.d + 1 * 20480, w, a);
  products<104, false>(p.d + 2 * 20480, w, a);
  products<16, true>(p.d + 3 * 20480, w, a);
  products<88, true>(p.d + 4 * 20480, w, a);
  products<160, true>(p.d + 5 * 20480, w, a);
}
