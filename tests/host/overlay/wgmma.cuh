// Functional models of the wrappers in cumoe/cu/wgmma.cuh, of the instructions in hopper.cpp.
#pragma once

#include "ptx.cuh"

namespace cumoe {
namespace wgmma {

constexpr int kSwizzleAtomBytes = 8 * 128;

inline uint32_t descriptor(uint32_t smem) { return (smem & 0x3ffffu) >> 4 | uint32_t{1} << 16; }
constexpr uint32_t kDescriptorHigh = kSwizzleAtomBytes >> 4 | uint32_t{1} << 30;

inline void fence(CUMOE_SITE) { cumoe_host::wgmma_fence(site); }

inline void commit(CUMOE_SITE) { cumoe_host::wgmma_commit(site); }

template <int N>
inline void wait(CUMOE_SITE) {
  static_assert(N >= 0 && N <= 7, "groups that wgmma.wait_group may leave pending");
  cumoe_host::wgmma_wait(N, site);
}

/// Four steps over 128 bytes of k, as the one asm statement of the original makes them.
template <int N>
inline void mma(int kind, float (&d)[N / 2], uint32_t w, uint32_t a, bool accumulate,
                cumoe_host::Site site) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "n of wgmma");
  constexpr uint64_t kHigh = uint64_t{kDescriptorHigh} << 32;
  for (unsigned step = 0; step < 4; ++step) {
    cumoe_host::wgmma_mma(kind, N, d, kHigh | (w + 2 * step), kHigh | (a + 2 * step),
                          step != 0 || accumulate, site);
  }
}

template <int N>
inline void mma_e4m3(float (&d)[N / 2], uint32_t w, uint32_t a, bool accumulate, CUMOE_SITE) {
  mma<N>(cumoe_host::kWgmmaE4m3, d, w, a, accumulate, site);
}

template <int N>
inline void mma_bf16(float (&d)[N / 2], uint32_t w, uint32_t a, bool accumulate, CUMOE_SITE) {
  mma<N>(cumoe_host::kWgmmaBf16, d, w, a, accumulate, site);
}

}  // namespace wgmma
}  // namespace cumoe
