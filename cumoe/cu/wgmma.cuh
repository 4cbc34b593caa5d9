// Warpgroup matrix multiply-accumulate of Hopper (sm_90a): descriptors and the shapes in use.
//
// d (64, N) = w (64, K) @ a (N, K).T, both operands in shared memory, K-major, 128-byte swizzle.
// Lane l of warp w of the group holds d[16 * w + l / 4 + 8 * h][8 * j + 2 * (l % 4) + c] in register
// 4 * j + 2 * h + c.
#pragma once

#include "ptx.cuh"

namespace cumoe {
namespace wgmma {

constexpr int kSwizzleAtomBytes = 8 * 128;  // the swizzle of rows of 128 bytes repeats every eight

/// Matrix descriptor of a K-major tile with rows of 128 bytes, 128-byte swizzle, 1024-byte aligned
/// (PTX ISA, "Matrix Descriptor Format"): address >> 4 in bits 0-13, leading offset (unused) 1 in bits
/// 16-29, offset between groups of eight rows >> 4 in bits 32-45, swizzle mode 1 in bits 62-63.
__device__ __forceinline__ uint64_t descriptor(uint32_t smem) {
  return static_cast<uint64_t>((smem & 0x3ffffu) >> 4) | uint64_t{1} << 16 |
         static_cast<uint64_t>(kSwizzleAtomBytes >> 4) << 32 | uint64_t{1} << 62;
}

// clang-format off
#define CUMOE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CUMOE_D16(i) CUMOE_D4(i), CUMOE_D4(i + 4), CUMOE_D4(i + 8), CUMOE_D4(i + 12)
#define CUMOE_R8 "%0, %1, %2, %3"
#define CUMOE_R16 CUMOE_R8 ", %4, %5, %6, %7"
#define CUMOE_R24 CUMOE_R16 ", %8, %9, %10, %11"
#define CUMOE_R32 CUMOE_R24 ", %12, %13, %14, %15"
#define CUMOE_R40 CUMOE_R32 ", %16, %17, %18, %19"
#define CUMOE_R48 CUMOE_R40 ", %20, %21, %22, %23"
#define CUMOE_R56 CUMOE_R48 ", %24, %25, %26, %27"
#define CUMOE_R64 CUMOE_R56 ", %28, %29, %30, %31"
#define CUMOE_R72 CUMOE_R64 ", %32, %33, %34, %35"
#define CUMOE_R80 CUMOE_R72 ", %36, %37, %38, %39"
#define CUMOE_R88 CUMOE_R80 ", %40, %41, %42, %43"
#define CUMOE_R96 CUMOE_R88 ", %44, %45, %46, %47"
#define CUMOE_R104 CUMOE_R96 ", %48, %49, %50, %51"
#define CUMOE_R112 CUMOE_R104 ", %52, %53, %54, %55"

// One instruction; operands W and A are the descriptors, which advance by 32 bytes a step.
#define CUMOE_MMA(N, W, A, STEP, ACCUMULATE)                                                       \
  "add.s64 w, %" #W ", 2 * " #STEP "; add.s64 a, %" #A ", 2 * " #STEP "; "                          \
  "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" CUMOE_R##N "}, w, a, " #ACCUMULATE   \
  ", 1, 1; "
#define CUMOE_MULTIPLY(N, W, A, ...)                                                                \
  template <>                                                                                      \
  __device__ __forceinline__ void multiply_e4m3<N>(float (&d)[N / 2], uint64_t w, uint64_t a) {     \
    asm volatile("{.reg .b64 w, a; wgmma.fence.sync.aligned; "                                     \
                 CUMOE_MMA(N, W, A, 0, 0) CUMOE_MMA(N, W, A, 1, 1)                                  \
                 CUMOE_MMA(N, W, A, 2, 1) CUMOE_MMA(N, W, A, 3, 1)                                  \
                 "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;}"              \
                 : __VA_ARGS__ : "l"(w), "l"(a) : "memory");                                       \
  }
// clang-format on

/// d = w @ a.T over 128 bytes of k for N tokens; returns when d is there (PTX ISA, "wgmma.mma_async",
/// "wgmma.wait_group").
template <int N>
__device__ __forceinline__ void multiply_e4m3(float (&d)[N / 2], uint64_t w, uint64_t a);

// clang-format off
CUMOE_MULTIPLY(8, 4, 5, CUMOE_D4(0))
CUMOE_MULTIPLY(16, 8, 9, CUMOE_D4(0), CUMOE_D4(4))
CUMOE_MULTIPLY(24, 12, 13, CUMOE_D4(0), CUMOE_D4(4), CUMOE_D4(8))
CUMOE_MULTIPLY(32, 16, 17, CUMOE_D16(0))
CUMOE_MULTIPLY(40, 20, 21, CUMOE_D16(0), CUMOE_D4(16))
CUMOE_MULTIPLY(48, 24, 25, CUMOE_D16(0), CUMOE_D4(16), CUMOE_D4(20))
CUMOE_MULTIPLY(56, 28, 29, CUMOE_D16(0), CUMOE_D4(16), CUMOE_D4(20), CUMOE_D4(24))
CUMOE_MULTIPLY(64, 32, 33, CUMOE_D16(0), CUMOE_D16(16))
CUMOE_MULTIPLY(72, 36, 37, CUMOE_D16(0), CUMOE_D16(16), CUMOE_D4(32))
CUMOE_MULTIPLY(80, 40, 41, CUMOE_D16(0), CUMOE_D16(16), CUMOE_D4(32), CUMOE_D4(36))
CUMOE_MULTIPLY(88, 44, 45, CUMOE_D16(0), CUMOE_D16(16), CUMOE_D4(32), CUMOE_D4(36), CUMOE_D4(40))
CUMOE_MULTIPLY(96, 48, 49, CUMOE_D16(0), CUMOE_D16(16), CUMOE_D16(32))
CUMOE_MULTIPLY(104, 52, 53, CUMOE_D16(0), CUMOE_D16(16), CUMOE_D16(32), CUMOE_D4(48))
CUMOE_MULTIPLY(112, 56, 57, CUMOE_D16(0), CUMOE_D16(16), CUMOE_D16(32), CUMOE_D4(48), CUMOE_D4(52))
// clang-format on

#undef CUMOE_D4
#undef CUMOE_D16
#undef CUMOE_MMA
#undef CUMOE_MULTIPLY

}  // namespace wgmma
}  // namespace cumoe
