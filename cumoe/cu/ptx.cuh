// Every PTX instruction the portable kernels use, one free function each, named by the instruction.
// Targets sm_80 and later. Conversions to and from e4m3 are instructions from sm_89 on; below that the
// same rounding is done in integer arithmetic (e4m3.cuh).
#pragma once

#include "types.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "cumoe kernels need compute capability 8.0 or later"
#endif

namespace cumoe {
namespace ptx {

/// Shared-memory address of a generic pointer (PTX ISA, "cvta").
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Waits until the grids this launch depends on have finished and their writes are visible
/// (PTX ISA, "griddepcontrol"). Nothing to wait for before sm_90, where launches never overlap.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next grid of the stream begin its prologue (PTX ISA, "griddepcontrol").
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// The same pointer, of which the compiler no longer knows where it can be read again. No instruction.
template <typename T>
__device__ __forceinline__ T* opaque(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

/// The same value, of which the compiler no longer knows whence it comes: what is computed from it stays
/// here, behind the `asm volatile` before. No instruction.
__device__ __forceinline__ float opaque(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

/// Likewise: what is computed from it in a loop is not computed before and kept.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

/// Copies 16 bytes to shared memory past L1; the bytes from `src_bytes` on become zero
/// (PTX ISA, "cp.async"). The source is not read when `src_bytes` is 0.
__device__ __forceinline__ void cp_async_cg_16(uint32_t smem, const void* gmem, int src_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem),
               "r"(src_bytes)
               : "memory");
}

/// Closes a group of this thread's asynchronous copies (PTX ISA, "cp.async.commit_group").
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most N of this thread's copy groups are pending (PTX ISA, "cp.async.wait_group").
template <int N>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/// Loads four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8
/// and receives elements 2 * (l % 4) and the next of row l / 4 of each (PTX ISA, "ldmatrix").
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

/// d += a @ b for a bf16 (16, 16), b bf16 (16, 8), d fp32 (16, 8) (PTX ISA, "mma.m16n8k16").
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// d += a @ b for a fp16 (16, 16), b fp16 (16, 8), d fp32 (16, 8) (PTX ISA, "mma.m16n8k16").
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Rounds two fp32 values to nearest-even bf16, `low` in bits 0-15 (PTX ISA, "cvt").
__device__ __forceinline__ uint32_t cvt_bf16x2_f32(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

/// Rounds two fp32 values to nearest-even fp16, `low` in bits 0-15 (PTX ISA, "cvt").
__device__ __forceinline__ uint32_t cvt_f16x2_f32(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

/// Multiplies two pairs of fp16 values, each product rounded to nearest even (PTX ISA, "mul").
__device__ __forceinline__ uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

/// Larger of two values, NaN if either is (PTX ISA, "max").
__device__ __forceinline__ float max_nan_f32(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

/// Larger magnitudes of two pairs of fp16 or of bf16 values, each NaN if either is; the sign is that of the
/// product (PTX ISA, "max", from sm_86 on).
__device__ __forceinline__ uint32_t absmax_nan_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t absmax_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

/// Widens the fp16 value in bits 0-15 exactly (PTX ISA, "cvt").
__device__ __forceinline__ float cvt_f32_f16(uint32_t bits) {
  float r;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(bits));
  return r;
}

/// 2^x with a relative error below 2^-22; subnormal numbers count as 0 (PTX ISA, "ex2").
__device__ __forceinline__ float ex2_approx_ftz(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/// 1 / x within 1 ulp; subnormal numbers count as 0 (PTX ISA, "rcp").
__device__ __forceinline__ float rcp_approx_ftz(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

#if __CUDA_ARCH__ >= 890 || !defined(__CUDA_ARCH__)
/// Rounds two fp32 values to nearest-even e4m3, saturating, `low` in bits 0-7; NaN becomes 0x7f
/// (PTX ISA, "cvt").
__device__ __forceinline__ uint32_t cvt_e4m3x2_f32(float low, float high) {
  uint32_t r;
  asm("{.reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, %1, %2; cvt.u32.u16 %0, h;}"
      : "=r"(r)
      : "f"(high), "f"(low));
  return r;
}

/// Widens the two e4m3 values in bits 0-15 exactly to fp16 (PTX ISA, "cvt").
__device__ __forceinline__ uint32_t cvt_f16x2_e4m3x2(uint32_t bits) {
  uint32_t r;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.rn.f16x2.e4m3x2 %0, h;}" : "=r"(r) : "r"(bits));
  return r;
}

/// Rounds four fp32 values as cvt_e4m3x2_f32, the first in bits 0-7: two instructions (PTX ISA, "cvt").
__device__ __forceinline__ uint32_t cvt_e4m3x4_f32(float a, float b, float c, float d) {
  uint32_t r;
  asm("{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %2, %1;"
      " cvt.rn.satfinite.e4m3x2.f32 h, %4, %3; mov.b32 %0, {l, h};}"
      : "=r"(r)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

/// Widens four e4m3 values exactly to fp16, two instructions (PTX ISA, "cvt").
__device__ __forceinline__ void cvt_f16x4_e4m3x4(uint32_t& low, uint32_t& high, uint32_t bits) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l;"
      " cvt.rn.f16x2.e4m3x2 %1, h;}"
      : "=r"(low), "=r"(high)
      : "r"(bits));
}
#endif

}  // namespace ptx
}  // namespace cumoe
