// Hopper's asynchronous machinery (sm_90 and later): mbarriers, the tensor memory accelerator, clusters
// and register reallocation. Barrier and shared-memory arguments are 32-bit shared addresses.
#pragma once

#include "ptx.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "tma.cuh needs compute capability 9.0 or later"
#endif

namespace cumoe {

/// A tensor map as the driver encodes it; a kernel parameter in __grid_constant__ memory.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

namespace ptx {

/// Sets a barrier's number of arrivals per phase (PTX ISA, "mbarrier.init").
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// Makes barrier initialisation visible to the cluster and the async proxy (PTX ISA, "fence").
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Orders generic accesses to shared memory before async-proxy ones (PTX ISA, "fence.proxy.async").
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// True in one thread of a converged warp, which ptxas then knows to be alone: it takes the operands of TMA
/// instructions from uniform registers as they are, where it would loop over threads otherwise
/// (PTX ISA, "elect.sync").
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
}

/// Arrives once (PTX ISA, "mbarrier.arrive").
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0];}" ::"r"(barrier) : "memory");
}

/// Address of the same shared memory in block `rank` of the cluster (PTX ISA, "mapa").
__device__ __forceinline__ uint32_t mapa(uint32_t smem, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem), "r"(rank));
  return remote;
}

/// Arrives once on a barrier of a block of the cluster, named by mapa. Orders nothing this thread wrote or
/// loads (PTX ISA, "mbarrier.arrive").
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t remote) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

/// Arrives once when this thread's earlier cp.async copies have landed; the arrival counts among those
/// the barrier was set up for (PTX ISA, "cp.async.mbarrier.arrive").
__device__ __forceinline__ void cp_async_mbarrier_arrive_noinc(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/// Arrives once and expects `bytes` more of asynchronous copies (PTX ISA, "mbarrier.arrive").
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile(
      "{.reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1;}" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}

/// Tells whether the phase of this parity has completed, asleep for up to `nanoseconds` until it has
/// (PTX ISA, "mbarrier.try_wait").
__device__ __forceinline__ bool mbarrier_try_wait_parity(uint32_t barrier, int parity,
                                                         uint32_t nanoseconds) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3; "
      "selp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(barrier), "r"(parity), "r"(nanoseconds)
      : "memory");
  return done != 0;
}

/// Waits for the phase of this parity.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  while (!mbarrier_try_wait_parity(barrier, parity, 10'000'000)) {
  }
}

/// The same; then what other blocks of the cluster stored with st_async_cluster_u32, completing on the barrier,
/// is seen (PTX ISA, "mbarrier.try_wait").
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

/// Fetches a tensor map ahead of its first use (PTX ISA, "prefetch").
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Copies a 2-D box to shared memory, completing on a barrier (PTX ISA, "cp.async.bulk.tensor").
__device__ __forceinline__ void tma_load_2d(uint32_t smem, const TensorMap* map, uint32_t barrier,
                                            int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

/// Like tma_load_2d, to the same offset and barrier of every block of the cluster in `cta_mask`.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t smem, const TensorMap* map,
                                                      uint32_t barrier, uint16_t cta_mask, int c0,
                                                      int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(smem),
      "l"(map), "r"(barrier), "h"(cta_mask), "r"(c0), "r"(c1)
      : "memory");
}

/// Copies a 5-D box to shared memory, completing on a barrier (PTX ISA, "cp.async.bulk.tensor").
__device__ __forceinline__ void tma_load_5d(uint32_t smem, const TensorMap* map, uint32_t barrier,
                                            int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

/// Like tma_load_5d, to the same offset and barrier of every block of the cluster in `cta_mask`.
__device__ __forceinline__ void tma_load_5d_multicast(uint32_t smem, const TensorMap* map,
                                                      uint32_t barrier, uint16_t cta_mask, int c0,
                                                      int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(smem),
      "l"(map), "r"(barrier), "h"(cta_mask), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

/// Copies a 2-D box from shared memory, leaving out what lies outside the array; joins the bulk group that
/// this thread commits next. Writes to the box come before a fence_proxy_async of their threads
/// (PTX ISA, "cp.async.bulk.tensor").
__device__ __forceinline__ void tma_store_2d(const TensorMap* map, uint32_t smem, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(smem), "r"(c0), "r"(c1)
      : "memory");
}

/// Copies `bytes`, a multiple of 16, from shared to global memory, both 16-byte aligned; otherwise like
/// tma_store_2d (PTX ISA, "cp.async.bulk").
__device__ __forceinline__ void cp_async_bulk_store(void* gmem, uint32_t smem, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(gmem), "r"(smem),
               "r"(bytes)
               : "memory");
}

/// Closes this thread's group of bulk stores (PTX ISA, "cp.async.bulk.commit_group").
__device__ __forceinline__ void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Waits until all but the last N groups of this thread have read shared memory, which may then be
/// written again; a thread that stored does so before it exits (PTX ISA, "cp.async.bulk.wait_group").
template <int N>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

/// Waits until all but the last N groups of this thread are complete: their writes are visible to it.
template <int N>
__device__ __forceinline__ void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

/// Index of this block in its cluster (PTX ISA, "%cluster_ctarank").
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// Stores to shared memory of a block of the cluster, named by mapa; cluster_sync makes it visible (PTX
/// ISA, "st").
__device__ __forceinline__ void st_cluster_f32(uint32_t remote, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

/// Stores a word to shared memory of a block of the cluster and completes its four bytes on a barrier of the
/// same block, both named by mapa; seen by who waits there with mbarrier_wait_cluster (PTX ISA, "st.async").
__device__ __forceinline__ void st_async_cluster_u32(uint32_t remote, uint32_t value,
                                                     uint32_t remote_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote),
      "r"(value), "r"(remote_barrier)
      : "memory");
}

/// Barrier over all threads of the cluster (PTX ISA, "barrier.cluster").
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

/// Arrives at the barrier of the cluster without ordering anything; cluster_wait follows (PTX ISA,
/// "barrier.cluster").
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

/// Waits until all threads of the cluster have arrived (PTX ISA, "barrier.cluster").
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Barrier `id` over `threads` threads of the block (PTX ISA, "bar.sync").
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Gives up registers above N for the rest of the warpgroup's life (PTX ISA, "setmaxnreg").
template <int N>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/// Takes registers up to N (PTX ISA, "setmaxnreg").
template <int N>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

/// Stores four 8x8 matrices of 16-bit elements transposed; lane l gives the address of row l % 8 of
/// matrix l / 8 (PTX ISA, "stmatrix").
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t smem, uint32_t r0, uint32_t r1,
                                                  uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace ptx
}  // namespace cumoe
