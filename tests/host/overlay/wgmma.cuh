// Functional models of the wrappers in cumoe/cu/wgmma.cuh, of the instructions in hopper.cpp.
#pragma once

#include "ptx.cuh"

namespace cumoe {
namespace wgmma {

constexpr int kSwizzleAtomBytes = 8 * 128;

inline uint64_t descriptor(uint32_t smem) {
  return static_cast<uint64_t>((smem & 0x3ffffu) >> 4) | uint64_t{1} << 16 |
         static_cast<uint64_t>(kSwizzleAtomBytes >> 4) << 32 | uint64_t{1} << 62;
}

/// Four steps over 128 bytes of k, as the one asm statement of the original makes them.
template <int N>
inline void multiply(int kind, float (&d)[N / 2], uint64_t w, uint64_t a, cumoe_host::Site site) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "n of wgmma");
  cumoe_host::wgmma_fence(site);
  for (unsigned step = 0; step < 4; ++step) {
    cumoe_host::wgmma_mma(kind, N, d, w + 2 * step, a + 2 * step, step != 0, site);
  }
  cumoe_host::wgmma_commit(site);
  cumoe_host::wgmma_wait(0, site);
}

template <int N>
inline void multiply_e4m3(float (&d)[N / 2], uint64_t w, uint64_t a, CUMOE_SITE) {
  multiply<N>(cumoe_host::kWgmmaE4m3, d, w, a, site);
}

template <int N>
inline void multiply_bf16(float (&d)[N / 2], uint64_t w, uint64_t a, CUMOE_SITE) {
  multiply<N>(cumoe_host::kWgmmaBf16, d, w, a, site);
}

}  // namespace wgmma
}  // namespace cumoe
