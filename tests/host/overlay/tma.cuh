// Functional models of the wrappers in cumoe/cu/tma.cuh, one for each, in the same order
// (hopper.cpp).
#pragma once

#include "ptx.cuh"

namespace cumoe {

/// Packed by the loader, not by the driver.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

namespace ptx {

inline void mbarrier_init(uint32_t barrier, int arrivals, CUMOE_SITE) {
  cumoe_host::mbarrier_init(barrier, arrivals, site);
}

inline void fence_mbarrier_init() {}

inline void fence_proxy_async() {}

inline bool elect_one() { return threadIdx.x % 32 == 0; }

inline void mbarrier_arrive(uint32_t barrier, CUMOE_SITE) {
  cumoe_host::mbarrier_arrive(barrier, 0, -1, site);
}

/// Bits 24 and up of an address of the cluster: the block's rank plus one; none for the own block's.
inline uint32_t mapa(uint32_t smem, uint32_t rank, CUMOE_SITE) {
  cumoe_host::shared_pointer(smem, 1, site);
  if (rank >= cumoe_host::cluster_size()) {
    cumoe_host::fail(site, "mapa of block %u in a cluster of %u", rank, cumoe_host::cluster_size());
  }
  return smem | (rank + 1) << 24;
}

inline void mbarrier_arrive_cluster(uint32_t remote, CUMOE_SITE) {
  const int rank = static_cast<int>(remote >> 24) - 1;
  cumoe_host::mbarrier_arrive(remote & 0xffffffu, 0, rank, site);
}

inline void cp_async_mbarrier_arrive_noinc(uint32_t barrier, CUMOE_SITE) {
  cumoe_host::async_arrive(barrier, site);
}

inline void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes, CUMOE_SITE) {
  cumoe_host::mbarrier_arrive(barrier, bytes, -1, site);
}

/// Sleeps or not, whatever the time: either is allowed.
inline bool mbarrier_try_wait_parity(uint32_t barrier, int parity, uint32_t, CUMOE_SITE) {
  return cumoe_host::mbarrier_try_wait(barrier, parity, site);
}

inline void mbarrier_wait(uint32_t barrier, int parity, CUMOE_SITE) {
  cumoe_host::mbarrier_wait(barrier, parity, site);
}

inline void mbarrier_wait_cluster(uint32_t barrier, int parity, CUMOE_SITE) {
  cumoe_host::mbarrier_wait(barrier, parity, site);
}

inline void prefetch_tensor_map(const TensorMap* map, CUMOE_SITE) {
  cumoe_host::check_tensor_map(map, site);
}

inline void tma_load_2d(uint32_t smem, const TensorMap* map, uint32_t barrier, int c0, int c1,
                        CUMOE_SITE) {
  const int c[] = {c0, c1};
  cumoe_host::tma_load(smem, map, barrier, c, 2, 0, site);
}

inline void tma_load_2d_multicast(uint32_t smem, const TensorMap* map, uint32_t barrier,
                                  uint16_t cta_mask, int c0, int c1, CUMOE_SITE) {
  if (cta_mask == 0) cumoe_host::fail(site, "multicast to no block");
  const int c[] = {c0, c1};
  cumoe_host::tma_load(smem, map, barrier, c, 2, cta_mask, site);
}

inline void tma_load_5d(uint32_t smem, const TensorMap* map, uint32_t barrier, int c0, int c1,
                        int c2, int c3, int c4, CUMOE_SITE) {
  const int c[] = {c0, c1, c2, c3, c4};
  cumoe_host::tma_load(smem, map, barrier, c, 5, 0, site);
}

inline void tma_load_5d_multicast(uint32_t smem, const TensorMap* map, uint32_t barrier,
                                  uint16_t cta_mask, int c0, int c1, int c2, int c3, int c4,
                                  CUMOE_SITE) {
  if (cta_mask == 0) cumoe_host::fail(site, "multicast to no block");
  const int c[] = {c0, c1, c2, c3, c4};
  cumoe_host::tma_load(smem, map, barrier, c, 5, cta_mask, site);
}

inline void tma_store_2d(const TensorMap* map, uint32_t smem, int c0, int c1, CUMOE_SITE) {
  const int c[] = {c0, c1};
  cumoe_host::tma_store(map, smem, c, 2, site);
}

inline void cp_async_bulk_store(void* gmem, uint32_t smem, int bytes, CUMOE_SITE) {
  cumoe_host::bulk_store(gmem, smem, bytes, site);
}

inline void cp_async_bulk_commit_group(CUMOE_SITE) { cumoe_host::bulk_commit(site); }

template <int N>
inline void cp_async_bulk_wait_group_read(CUMOE_SITE) {
  cumoe_host::bulk_wait(N, true, site);
}

template <int N>
inline void cp_async_bulk_wait_group(CUMOE_SITE) {
  cumoe_host::bulk_wait(N, false, site);
}

inline uint32_t cluster_rank() { return cumoe_host::cluster_rank(); }

inline void st_cluster_f32(uint32_t remote, float value, CUMOE_SITE) {
  const uint32_t rank = remote >> 24;
  if (rank == 0) cumoe_host::fail(site, "st.shared::cluster to 0x%x: not named by mapa", remote);
  memcpy(cumoe_host::cluster_pointer(remote & 0xffffffu, rank - 1, 4, site), &value, 4);
  cumoe_host::yield(site);
}

inline void st_async_cluster_u32(uint32_t remote, uint32_t value, uint32_t remote_barrier,
                                 CUMOE_SITE) {
  const uint32_t rank = remote >> 24;
  if (rank == 0 || remote_barrier >> 24 != rank) {
    cumoe_host::fail(site, "st.async to 0x%x with a barrier at 0x%x", remote, remote_barrier);
  }
  cumoe_host::store_async(remote & 0xffffffu, remote_barrier & 0xffffffu, rank - 1, value, site);
}

inline void cluster_sync(CUMOE_SITE) { cumoe_host::cluster_barrier(site); }

/// The wait is the whole barrier, so an arrival never lets another block past its wait too early.
inline void cluster_arrive_relaxed() {}

inline void cluster_wait(CUMOE_SITE) { cumoe_host::cluster_barrier(site); }

inline void named_barrier_sync(int id, int threads, CUMOE_SITE) {
  if (threads <= 0) cumoe_host::fail(site, "bar.sync of %d threads", threads);
  cumoe_host::barrier("bar.sync", id, static_cast<unsigned>(threads), true, site);
}

/// Register counts have no model; that all threads of the warp come here, and that N is legal, has.
template <int N>
inline void setmaxnreg_dec(CUMOE_SITE) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256,
                "setmaxnreg takes multiples of 8 from 24 to 256");
  cumoe_host::collective(
      "setmaxnreg", 0xffffffffu, nullptr, [](void* const*, unsigned) {}, true, site);
}

template <int N>
inline void setmaxnreg_inc(CUMOE_SITE) {
  setmaxnreg_dec<N>(site);
}

inline void stmatrix_x4_trans(uint32_t smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3,
                              CUMOE_SITE) {
  if (smem % 16) cumoe_host::fail(site, "stmatrix to shared 0x%x: not 16-byte aligned", smem);
  struct Operands {
    unsigned char* row;
    uint32_t r[4];
  };
  auto* row = static_cast<unsigned char*>(cumoe_host::shared_pointer(smem, 16, site));
  Operands o = {row, {r0, r1, r2, r3}};
  cumoe_host::collective(
      "stmatrix", 0xffffffffu, &o,
      [](void* const* lanes, unsigned) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            const uint32_t r = static_cast<Operands*>(lanes[lane])->r[matrix];
            for (int e = 0; e < 2; ++e) {
              // The fragment's row and column change places.
              const auto* owner = static_cast<Operands*>(lanes[8 * matrix + 2 * (lane % 4) + e]);
              const uint16_t element = static_cast<uint16_t>(r >> (16 * e));
              memcpy(owner->row + 2 * (lane / 4), &element, 2);
            }
          }
        }
      },
      true, site);
}

}  // namespace ptx
}  // namespace cumoe
