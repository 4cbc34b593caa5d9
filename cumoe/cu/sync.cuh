// Accesses to memory that other grids and other GPUs read and write while this kernel runs: flags, counters,
// 16-byte payloads and the fence between them. Scope .sys, so memory of a peer will do. sm_80 and later.
//
// NOTE: sixteen bytes are four accesses of four bytes to the memory model: a reader may see some of a
// store's words and not yet the others, in any order. Whoever polls a payload checks every word.
// NOTE: relaxed accesses order nothing. Data is published by a release (st_release_sys,
// red_add_release_sys, atom_add_release_sys, or fence_acq_rel_sys before a relaxed store) after the stores
// of this thread and of those that met it at a barrier; it is received by ld_acquire_sys, or by a relaxed
// load and fence_acq_rel_sys, before the loads. Plain accesses to words that are stored relaxed wait for one of
// the two.
#pragma once

#include "types.cuh"

namespace cumoe {
namespace ptx {

/// Stores a flag after all earlier accesses (PTX ISA, "st.release").
__device__ __forceinline__ void st_release_sys(uint32_t* gmem, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(gmem), "r"(value) : "memory");
}

/// Loads a flag before all later accesses (PTX ISA, "ld.acquire").
__device__ __forceinline__ uint32_t ld_acquire_sys(const uint32_t* gmem) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(gmem) : "memory");
  return value;
}

/// Adds to a counter after all earlier accesses (PTX ISA, "red").
__device__ __forceinline__ void red_add_release_sys(uint32_t* gmem, uint32_t value) {
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(gmem), "r"(value) : "memory");
}

/// Adds to a counter after all earlier accesses and returns what it held (PTX ISA, "atom").
__device__ __forceinline__ uint32_t atom_add_release_sys(uint32_t* gmem, uint32_t value) {
  uint32_t old;
  asm volatile("atom.release.sys.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(gmem), "r"(value)
               : "memory");
  return old;
}

/// Stores 16 aligned bytes, in no order with other stores (PTX ISA, "st.relaxed").
__device__ __forceinline__ void st_relaxed_sys_v4(uint4* gmem, uint4 value) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(gmem), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

/// Loads 16 aligned bytes from memory, never from a cache that other writers pass by; in no order with
/// other loads (PTX ISA, "ld.relaxed").
__device__ __forceinline__ uint4 ld_relaxed_sys_v4(const uint4* gmem) {
  uint4 value;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(gmem)
               : "memory");
  return value;
}

/// Orders this thread's accesses before it before those after it, for all GPUs (PTX ISA, "fence").
__device__ __forceinline__ void fence_acq_rel_sys() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

}  // namespace ptx
}  // namespace cumoe
