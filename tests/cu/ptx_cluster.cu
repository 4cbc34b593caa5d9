// ptx_cluster: what the blocks of a cluster of two do to each other's shared memory (sm_90a).
//
// Grid      one cluster of two blocks of 128 threads.
// smem      four boxes (8, 128) bytes without swizzle, dynamic: block r loads 2 * r and 2 * r + 1, the first as
//           two dimensions, the second as five, for both blocks.
#include "tma.cuh"

using namespace cumoe;

struct Params {
  TensorMap two;       // uint8 in boxes of (8, 128)
  TensorMap five;      // the same array as (2, 1, rows, 1, columns), boxes of (1, 1, 8, 1, 128)
  uint8_t* boxes;      // (2, 4, 8, 128): what each block has
  uint32_t* words;     // (2, 2): rank, and what the other block sent with st.async
  float* floats;       // (2, 128): stored by the other block's threads
  int32_t rows[2];     // first row of either block's boxes
  int32_t columns[2];  // first column of the first box and of the second
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128)
    ptx_cluster(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  __shared__ __align__(8) uint64_t full, sent, met;
  __shared__ uint32_t word;
  __shared__ float floats[128];
  const int t = threadIdx.x;
  const uint32_t rank = ptx::cluster_rank(), other = 1 - rank;
  const uint32_t full_address = ptx::smem_address(&full), sent_address = ptx::smem_address(&sent);
  if (t == 0) {
    ptx::mbarrier_init(full_address, 1);
    ptx::mbarrier_init(sent_address, 1);
    ptx::mbarrier_init(ptx::smem_address(&met), 128);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (t == 0) {
    ptx::mbarrier_arrive_expect_tx(full_address, 4096);
    ptx::mbarrier_arrive_expect_tx(sent_address, 4);
    const uint32_t to = ptx::smem_address(smem) + 2048 * rank;
    ptx::tma_load_2d_multicast(to, &p.two, full_address, 0x3, p.columns[0], p.rows[rank]);
    ptx::tma_load_5d_multicast(to + 1024, &p.five, full_address, 0x3, p.columns[1], 0, p.rows[rank],
                               0, 1);
    ptx::st_async_cluster_u32(ptx::mapa(ptx::smem_address(&word), other), 1000 + rank,
                              ptx::mapa(sent_address, other));
  }
  ptx::mbarrier_arrive_cluster(ptx::mapa(ptx::smem_address(&met), other));
  ptx::st_cluster_f32(ptx::mapa(ptx::smem_address(&floats[t]), other), 0.5f * t + rank);
  ptx::mbarrier_wait(full_address, 0);
  ptx::mbarrier_wait_cluster(sent_address, 0);
  ptx::mbarrier_wait(ptx::smem_address(&met), 0);
  for (int i = t; i < 4096; i += 128) p.boxes[4096 * rank + i] = smem[i];
  if (t == 0) {
    p.words[2 * rank] = rank;
    p.words[2 * rank + 1] = word;
  }
  ptx::cluster_sync();
  p.floats[128 * rank + t] = floats[t];
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
}
