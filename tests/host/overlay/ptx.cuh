// Functional models of the wrappers in cumoe/cu/ptx.cuh, one for each, in the same order.
//
// The loader puts this file in the place of the original. What a model does beyond the
// instruction: it refuses addresses that are misaligned or outside shared memory, and lets
// asynchronous copies land late.
#pragma once

#include "numbers.h"
#include "types.cuh"

namespace cumoe {
namespace ptx {

using cumoe_host::Site;

inline uint32_t smem_address(const void* pointer, CUMOE_SITE) {
  return cumoe_host::shared_address(pointer, site);
}

// Grids of one stream run one after the other here, so there is nothing to wait for.
inline void griddepcontrol_wait(CUMOE_SITE) { cumoe_host::yield(site); }
inline void griddepcontrol_launch_dependents() {}

template <typename T>
inline T* opaque(T* pointer) {
  return pointer;
}
inline float opaque(float value) { return value; }
inline int opaque(int value) { return value; }

inline void cp_async_cg_16(uint32_t smem, const void* gmem, int src_bytes, CUMOE_SITE) {
  if (src_bytes < 0 || src_bytes > 16) cumoe_host::fail(site, "cp.async of %d bytes", src_bytes);
  if (smem % 16 || reinterpret_cast<uintptr_t>(gmem) % 16) {
    cumoe_host::fail(site, "cp.async from %p to shared 0x%x: not 16-byte aligned", gmem, smem);
  }
  void* destination = cumoe_host::shared_pointer(smem, 16, site);
  const unsigned bytes = static_cast<unsigned>(src_bytes);
  cumoe_host::async_copy(destination, gmem, bytes, 16 - bytes, site);
}

inline void cp_async_commit_group(CUMOE_SITE) { cumoe_host::async_commit(site); }

template <int N>
inline void cp_async_wait_group(CUMOE_SITE) {
  cumoe_host::async_wait(N, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem, CUMOE_SITE) {
  if (smem % 16) cumoe_host::fail(site, "ldmatrix of shared 0x%x: not 16-byte aligned", smem);
  struct Operands {
    const unsigned char* row;
    uint32_t r[4];
  };
  Operands o = {static_cast<const unsigned char*>(cumoe_host::shared_pointer(smem, 16, site)), {}};
  cumoe_host::collective(
      "ldmatrix", 0xffffffffu, &o,
      [](void* const* lanes, unsigned) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            const auto* owner = static_cast<Operands*>(lanes[8 * matrix + lane / 4]);
            memcpy(&static_cast<Operands*>(lanes[lane])->r[matrix], owner->row + 4 * (lane % 4), 4);
          }
        }
      },
      true, site);
  memcpy(r, o.r, sizeof r);
}

/// d += a @ b in double, rounded once: the hardware rounds in a way of its own (docs/testing.md).
template <float (*kWiden)(uint32_t)>
inline void mma_m16n8k16(const char* name, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                         uint32_t b1, Site site) {
  struct Operands {
    float d[4];
    uint32_t a[4], b[2];
  };
  Operands o = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  cumoe_host::collective(
      name, 0xffffffffu, &o,
      [](void* const* lanes, unsigned) {
        // Lane l holds rows l / 4 (+ 8) and k = 2 * (l % 4) + (0, 1) (+ 8) of a, columns l / 4 of
        // b.
        float wide_a[16][16], wide_b[8][16];
        for (int l = 0; l < 32; ++l) {
          const auto* lane = static_cast<Operands*>(lanes[l]);
          for (int e = 0; e < 2; ++e) {
            const int shift = 16 * e, k = 2 * (l % 4) + e;
            for (int v = 0; v < 4; ++v) {
              wide_a[l / 4 + v % 2 * 8][k + v / 2 * 8] = kWiden(lane->a[v] >> shift & 0xffffu);
            }
            for (int v = 0; v < 2; ++v)
              wide_b[l / 4][k + 8 * v] = kWiden(lane->b[v] >> shift & 0xffffu);
          }
        }
        for (int l = 0; l < 32; ++l) {
          auto* lane = static_cast<Operands*>(lanes[l]);
          for (int v = 0; v < 4; ++v) {
            const int row = l / 4 + v / 2 * 8, column = l % 4 * 2 + v % 2;
            double sum = lane->d[v];
            for (int k = 0; k < 16; ++k) sum += double{wide_a[row][k]} * wide_b[column][k];
            lane->d[v] = static_cast<float>(sum);
          }
        }
      },
      true, site);
  memcpy(d, o.d, sizeof d);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              CUMOE_SITE) {
  mma_m16n8k16<cumoe_host::from_bf16>("mma.bf16", d, a, b0, b1, site);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             CUMOE_SITE) {
  mma_m16n8k16<cumoe_host::from_f16>("mma.f16", d, a, b0, b1, site);
}

inline uint32_t cvt_bf16x2_f32(float low, float high) {
  return cumoe_host::to_bf16(low) | cumoe_host::to_bf16(high) << 16;
}

inline uint32_t cvt_f16x2_f32(float low, float high) {
  return cumoe_host::to_f16(low) | cumoe_host::to_f16(high) << 16;
}

inline float max_nan_f32(float a, float b) {
  return a != a || b != b ? __builtin_nanf("") : a > b ? a : b;
}

inline uint32_t absmax_nan_16(uint32_t a, uint32_t b, uint32_t infinity) {
  const uint32_t x = a & 0x7fffu, y = b & 0x7fffu, largest = x > y ? x : y;
  return largest > infinity ? 0x7fffu : largest | ((a ^ b) & 0x8000u);
}
inline uint32_t absmax_nan_f16x2(uint32_t a, uint32_t b) {
  return absmax_nan_16(a & 0xffffu, b & 0xffffu, 0x7c00u) | absmax_nan_16(a >> 16, b >> 16, 0x7c00u)
                                                                << 16;
}
inline uint32_t absmax_nan_bf16x2(uint32_t a, uint32_t b) {
  return absmax_nan_16(a & 0xffffu, b & 0xffffu, 0x7f80u) | absmax_nan_16(a >> 16, b >> 16, 0x7f80u)
                                                                << 16;
}

inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  using cumoe_host::from_f16;
  // Products of 11-bit numbers are exact in double.
  const double low = double{from_f16(a & 0xffffu)} * from_f16(b & 0xffffu);
  const double high = double{from_f16(a >> 16)} * from_f16(b >> 16);
  return cumoe_host::to_f16(low) | cumoe_host::to_f16(high) << 16;
}

/// NaN becomes the one NaN that the instruction makes, 0x7fffffff.
inline float cvt_f32_f16(uint32_t bits) {
  const float x = cumoe_host::from_f16(bits & 0xffffu);
  return x == x ? x : cumoe_host::float_of(0x7fffffffu);
}

/// Flushes a subnormal number to the zero of its sign.
inline float flushed(float x) { return fabs(x) < 0x1p-126f ? copysign(0.0f, x) : x; }

inline float ex2_approx_ftz(float x) { return flushed(exp2(flushed(x))); }

inline float rcp_approx_ftz(float x) { return flushed(1.0f / flushed(x)); }

inline uint32_t cvt_e4m3x2_f32(float low, float high) {
  return cumoe_host::to_e4m3(low) | cumoe_host::to_e4m3(high) << 8;
}

inline uint32_t cvt_f16x2_e4m3x2(uint32_t bits) {
  using cumoe_host::from_e4m3;
  return cumoe_host::to_f16(from_e4m3(bits & 0xffu)) |
         cumoe_host::to_f16(from_e4m3(bits >> 8 & 0xffu)) << 16;
}

inline uint32_t cvt_e4m3x4_f32(float a, float b, float c, float d) {
  return cvt_e4m3x2_f32(a, b) | cvt_e4m3x2_f32(c, d) << 16;
}

inline void cvt_f16x4_e4m3x4(uint32_t& low, uint32_t& high, uint32_t bits) {
  low = cvt_f16x2_e4m3x2(bits & 0xffffu);
  high = cvt_f16x2_e4m3x2(bits >> 16);
}

}  // namespace ptx
}  // namespace cumoe
