// Warpgroup matrix multiply-accumulate of Hopper (sm_90a): descriptors, fences and products.
//
// d (64, N) (+)= w (64, K) @ a (N, K).T, both operands in shared memory, K-major, 128-byte swizzle, over
// 128 bytes of k. Lane l of warp w of the group holds d[16 * w + l / 4 + 8 * h][8 * j + 2 * (l % 4) + c]
// in register 4 * j + 2 * h + c. Products are asynchronous: fence() before the first, commit() after the
// last of a group, wait<P>() until at most P groups are pending; d may be touched only then.
//
// NOTE: ptxas gives up overlap (C7514) when a register of d is read while a product is in flight that was
// issued before the loop's back edge: drain with wait<0>() at the end of an iteration, or read d after
// the loop only.
#pragma once

#include "ptx.cuh"

namespace cumoe {
namespace wgmma {

constexpr int kSwizzleAtomBytes = 8 * 128;  // the swizzle of rows of 128 bytes repeats every eight

/// Matrix descriptor of a K-major tile with rows of 128 bytes, 128-byte swizzle, 1024-byte aligned
/// (PTX ISA, "Matrix Descriptor Format"): address >> 4 in bits 0-13, leading offset (unused) 1 in bits
/// 16-29, offset between groups of eight rows >> 4 in bits 32-45, swizzle mode 1 in bits 62-63. This is
/// its low word; the high one is the same for all. A tile `bytes` further has it `bytes / 16` higher.
__device__ __forceinline__ uint32_t descriptor(uint32_t smem) {
  return (smem & 0x3ffffu) >> 4 | uint32_t{1} << 16;
}
constexpr uint32_t kDescriptorHigh = kSwizzleAtomBytes >> 4 | uint32_t{1} << 30;

/// Orders register and shared-memory accesses before the products that follow (PTX ISA, "wgmma.fence").
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// Closes a group of products (PTX ISA, "wgmma.commit_group").
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most N groups are pending (PTX ISA, "wgmma.wait_group").
template <int N>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/// d = (accumulate ? d : 0) + w @ a.T for e4m3 (PTX ISA, "wgmma.mma_async").
template <int N>
__device__ __forceinline__ void mma_e4m3(float (&d)[N / 2], uint32_t w, uint32_t a,
                                         bool accumulate);

/// The same for bf16.
template <int N>
__device__ __forceinline__ void mma_bf16(float (&d)[N / 2], uint32_t w, uint32_t a,
                                         bool accumulate);

// clang-format off
#define CUMOE_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CUMOE_F8 CUMOE_F4(0)
#define CUMOE_F16 CUMOE_F8, CUMOE_F4(4)
#define CUMOE_F24 CUMOE_F16, CUMOE_F4(8)
#define CUMOE_F32 CUMOE_F24, CUMOE_F4(12)
#define CUMOE_F40 CUMOE_F32, CUMOE_F4(16)
#define CUMOE_F48 CUMOE_F40, CUMOE_F4(20)
#define CUMOE_F56 CUMOE_F48, CUMOE_F4(24)
#define CUMOE_F64 CUMOE_F56, CUMOE_F4(28)
#define CUMOE_F72 CUMOE_F64, CUMOE_F4(32)
#define CUMOE_F80 CUMOE_F72, CUMOE_F4(36)
#define CUMOE_F88 CUMOE_F80, CUMOE_F4(40)
#define CUMOE_F96 CUMOE_F88, CUMOE_F4(44)
#define CUMOE_F104 CUMOE_F96, CUMOE_F4(48)
#define CUMOE_F112 CUMOE_F104, CUMOE_F4(52)
#define CUMOE_F120 CUMOE_F112, CUMOE_F4(56)
#define CUMOE_F128 CUMOE_F120, CUMOE_F4(60)
#define CUMOE_F136 CUMOE_F128, CUMOE_F4(64)
#define CUMOE_F144 CUMOE_F136, CUMOE_F4(68)
#define CUMOE_F152 CUMOE_F144, CUMOE_F4(72)
#define CUMOE_F160 CUMOE_F152, CUMOE_F4(76)
#define CUMOE_F168 CUMOE_F160, CUMOE_F4(80)
#define CUMOE_F176 CUMOE_F168, CUMOE_F4(84)
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
#define CUMOE_R120 CUMOE_R112 ", %56, %57, %58, %59"
#define CUMOE_R128 CUMOE_R120 ", %60, %61, %62, %63"
#define CUMOE_R136 CUMOE_R128 ", %64, %65, %66, %67"
#define CUMOE_R144 CUMOE_R136 ", %68, %69, %70, %71"
#define CUMOE_R152 CUMOE_R144 ", %72, %73, %74, %75"
#define CUMOE_R160 CUMOE_R152 ", %76, %77, %78, %79"
#define CUMOE_R168 CUMOE_R160 ", %80, %81, %82, %83"
#define CUMOE_R176 CUMOE_R168 ", %84, %85, %86, %87"

// One instruction; W and A are the operand numbers of the descriptors, which advance by 32 bytes a step.
#define CUMOE_MMA(N, TYPE, W, A, STEP, ACCUMULATE, MODES)                                           \
  "add.u32 l, %" #W ", 2 * " #STEP "; mov.b64 w, {l, h}; add.u32 l, %" #A ", 2 * " #STEP "; "       \
  "mov.b64 a, {l, h}; wgmma.mma_async.sync.aligned.m64n" #N TYPE " {" CUMOE_R##N "}, w, a, " ACCUMULATE MODES "; "
#define CUMOE_PRODUCT(NAME, N, TYPE, MODES, W, A, P)                                                \
  template <>                                                                                      \
  __device__ __forceinline__ void NAME<N>(float (&d)[N / 2], uint32_t w, uint32_t a,               \
                                          bool accumulate) {                                       \
    asm volatile("{.reg .b64 w, a; .reg .b32 l, h; .reg .pred p; setp.ne.b32 p, %" #P ", 0; "      \
                 "mov.u32 h, 0x40000040; "                                                         \
                 CUMOE_MMA(N, TYPE, W, A, 0, "p", MODES) CUMOE_MMA(N, TYPE, W, A, 1, "1", MODES)   \
                 CUMOE_MMA(N, TYPE, W, A, 2, "1", MODES) CUMOE_MMA(N, TYPE, W, A, 3, "1", MODES)   \
                 "}"                                                                               \
                 : CUMOE_F##N                                                                      \
                 : "r"(w), "r"(a), "r"(static_cast<int>(accumulate))                               \
                 : "memory");                                                                      \
  }
#define CUMOE_E4M3(N, ...)                                                                         \
  CUMOE_PRODUCT(mma_e4m3, N, "k32.f32.e4m3.e4m3", ", 1, 1", __VA_ARGS__)
#define CUMOE_BF16(N, ...)                                                                         \
  CUMOE_PRODUCT(mma_bf16, N, "k16.f32.bf16.bf16", ", 1, 1, 0, 0", __VA_ARGS__)

CUMOE_E4M3(8, 4, 5, 6)
CUMOE_E4M3(16, 8, 9, 10)
CUMOE_E4M3(24, 12, 13, 14)
CUMOE_E4M3(32, 16, 17, 18)
CUMOE_E4M3(40, 20, 21, 22)
CUMOE_E4M3(48, 24, 25, 26)
CUMOE_E4M3(56, 28, 29, 30)
CUMOE_E4M3(64, 32, 33, 34)
CUMOE_E4M3(72, 36, 37, 38)
CUMOE_E4M3(80, 40, 41, 42)
CUMOE_E4M3(88, 44, 45, 46)
CUMOE_E4M3(96, 48, 49, 50)
CUMOE_E4M3(104, 52, 53, 54)
CUMOE_E4M3(112, 56, 57, 58)
CUMOE_E4M3(120, 60, 61, 62)
CUMOE_E4M3(128, 64, 65, 66)
CUMOE_E4M3(136, 68, 69, 70)
CUMOE_E4M3(144, 72, 73, 74)
CUMOE_E4M3(152, 76, 77, 78)
CUMOE_E4M3(160, 80, 81, 82)
CUMOE_E4M3(168, 84, 85, 86)
CUMOE_E4M3(176, 88, 89, 90)
CUMOE_BF16(8, 4, 5, 6)
CUMOE_BF16(16, 8, 9, 10)
CUMOE_BF16(24, 12, 13, 14)
CUMOE_BF16(32, 16, 17, 18)
CUMOE_BF16(40, 20, 21, 22)
CUMOE_BF16(48, 24, 25, 26)
CUMOE_BF16(56, 28, 29, 30)
CUMOE_BF16(64, 32, 33, 34)
CUMOE_BF16(72, 36, 37, 38)
CUMOE_BF16(80, 40, 41, 42)
CUMOE_BF16(88, 44, 45, 46)
CUMOE_BF16(96, 48, 49, 50)
CUMOE_BF16(104, 52, 53, 54)
CUMOE_BF16(112, 56, 57, 58)
CUMOE_BF16(120, 60, 61, 62)
CUMOE_BF16(128, 64, 65, 66)
CUMOE_BF16(136, 68, 69, 70)
CUMOE_BF16(144, 72, 73, 74)
CUMOE_BF16(152, 76, 77, 78)
CUMOE_BF16(160, 80, 81, 82)
CUMOE_BF16(168, 84, 85, 86)
CUMOE_BF16(176, 88, 89, 90)
// clang-format on

#undef CUMOE_F4
#undef CUMOE_MMA
#undef CUMOE_PRODUCT
#undef CUMOE_E4M3
#undef CUMOE_BF16

}  // namespace wgmma
}  // namespace cumoe
