// CUDA C++ for the host compiler: qualifiers, built-in variables, vector types and intrinsics.
//
// Included before a kernel's source (-include). Shared memory is thread-local storage: the engine
// fills it before each block, and blocks that are resident together live on OS threads of their
// own.
#pragma once

// libstdc++'s math.h is then C's, here and in kernels: <cmath> takes longer than most of them.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__
#define __shared__ thread_local

#define threadIdx (::cumoe_host::self->thread_idx)
#define blockIdx (::cumoe_host::self->block_idx)
#define blockDim (::cumoe_host::self->block_dim)
#define gridDim (::cumoe_host::self->grid_dim)

constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------ vector types

#define CUMOE_VECTOR(T, name, align2, align4)                \
  struct alignas(align2) name##2 { T x, y; };                \
  struct name##3 { T x, y, z; };                             \
  struct alignas(align4) name##4 { T x, y, z, w; };          \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUMOE_VECTOR(signed char, char, 2, 4)
CUMOE_VECTOR(unsigned char, uchar, 2, 4)
CUMOE_VECTOR(short, short, 4, 8)
CUMOE_VECTOR(unsigned short, ushort, 4, 8)
CUMOE_VECTOR(int, int, 8, 16)
CUMOE_VECTOR(unsigned, uint, 8, 16)
CUMOE_VECTOR(float, float, 8, 16)
CUMOE_VECTOR(long long, longlong, 16, 16)
CUMOE_VECTOR(unsigned long long, ulonglong, 16, 16)
CUMOE_VECTOR(double, double, 16, 16)
using dim3 = cumoe_host::Dim3;

// -------------------------------------------------------------------------------------- arithmetic

inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }

// Compiled with -ffp-contract=off, so every operation is rounded on its own.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }

#define CUMOE_MINMAX(name, op)                                                                  \
  template <class A, class B,                                                                   \
            class =                                                                             \
                std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>> \
  inline std::common_type_t<A, B> name(A a, B b) {                                              \
    using T = std::common_type_t<A, B>;                                                         \
    return static_cast<T>(a) op static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);      \
  }
CUMOE_MINMAX(min, <)
CUMOE_MINMAX(max, >)

inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t{a} * b >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i) & 0xfu;
    unsigned byte = bytes >> (8 * (s & 7u)) & 0xffu;
    if (s & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    r |= byte << (8 * i);
  }
  return r;
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}

// ------------------------------------------------------------------------------------ whole blocks

inline void __syncthreads(CUMOE_SITE) { cumoe_host::barrier("__syncthreads", 0, 0, true, site); }
inline void __threadfence(CUMOE_SITE) { cumoe_host::full_fence(site); }
inline void __threadfence_block() {}
inline void __threadfence_system(CUMOE_SITE) { cumoe_host::full_fence(site); }
[[noreturn]] inline void __trap(CUMOE_SITE) { cumoe_host::fail(site, "__trap"); }
inline void __nanosleep(unsigned, CUMOE_SITE) { cumoe_host::poll("__nanosleep", site); }

// ------------------------------------------------------------------------------------- whole warps

inline unsigned __activemask() { return cumoe_host::active_lanes(); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CUMOE_SITE) {
  cumoe_host::hand_over();
  cumoe_host::collective("__syncwarp", mask, nullptr, [](void* const*, unsigned) {}, false, site);
}

namespace cumoe_host {

template <class T>
struct LaneValue {
  T value, result;
  int argument;
  int width;
};

/// Lane `from(lane, argument)` of the own section of `width` lanes; outside it the own value.
template <class T, class From>
inline T shuffle(const char* name, unsigned mask, T value, int argument, int width, From,
                 Site site) {
  LaneValue<T> v = {value, value, argument, width};
  collective(
      name, mask, &v,
      [](void* const* lanes, unsigned m) {
        for (int l = 0; l < 32; ++l) {
          if (!(m >> l & 1u)) continue;
          auto* mine = static_cast<LaneValue<T>*>(lanes[l]);
          const int section = l & ~(mine->width - 1);
          const int source = From::of(l, section, mine->argument, mine->width);
          const bool inside = source >= section && source < section + mine->width;
          // A lane outside the mask has no value: a pattern that is no sensible number.
          if (inside && (m >> source & 1u)) {
            mine->result = static_cast<LaneValue<T>*>(lanes[source])->value;
          } else if (inside) {
            memset(&mine->result, 0xb5, sizeof(T));
          }
        }
      },
      false, site);
  return v.result;
}

struct FromXor {
  static int of(int lane, int, int argument, int) { return lane ^ argument; }
};
struct FromUp {
  static int of(int lane, int, int argument, int) { return lane - argument; }
};
struct FromDown {
  static int of(int lane, int, int argument, int) { return lane + argument; }
};
struct FromIndex {
  static int of(int, int section, int argument, int width) {
    return section + (argument & (width - 1));
  }
};

template <class T, class Combine>
inline T reduce(const char* name, unsigned mask, T value, Combine, Site site) {
  LaneValue<T> v = {value, value, 0, 0};
  collective(
      name, mask, &v,
      [](void* const* lanes, unsigned m) {
        bool first = true;
        T total{};
        for (int l = 0; l < 32; ++l) {
          if (!(m >> l & 1u)) continue;
          const T x = static_cast<LaneValue<T>*>(lanes[l])->value;
          total = first ? x : Combine::of(total, x);
          first = false;
        }
        for (int l = 0; l < 32; ++l) {
          if (m >> l & 1u) static_cast<LaneValue<T>*>(lanes[l])->result = total;
        }
      },
      false, site);
  return v.result;
}

#define CUMOE_COMBINE(name, expression)  \
  struct name {                          \
    template <class T>                   \
    static T of(T a, T b) {              \
      return static_cast<T>(expression); \
    }                                    \
  }
CUMOE_COMBINE(Add, a + b);
CUMOE_COMBINE(Min, a < b ? a : b);
CUMOE_COMBINE(Max, a > b ? a : b);
CUMOE_COMBINE(And, a& b);
CUMOE_COMBINE(Or, a | b);
CUMOE_COMBINE(Xor, a ^ b);
#undef CUMOE_COMBINE

}  // namespace cumoe_host

#define CUMOE_SHUFFLE(name, from, argument_type)                                              \
  template <class T>                                                                          \
  inline T name(unsigned mask, T value, argument_type argument, int width = 32, CUMOE_SITE) { \
    return cumoe_host::shuffle(#name, mask, value, static_cast<int>(argument), width,         \
                               cumoe_host::from{}, site);                                     \
  }
CUMOE_SHUFFLE(__shfl_sync, FromIndex, int)
CUMOE_SHUFFLE(__shfl_xor_sync, FromXor, int)
CUMOE_SHUFFLE(__shfl_up_sync, FromUp, unsigned)
CUMOE_SHUFFLE(__shfl_down_sync, FromDown, unsigned)

#define CUMOE_REDUCE(name, combine, T)                                          \
  inline T name(unsigned mask, T value, CUMOE_SITE) {                           \
    return cumoe_host::reduce(#name, mask, value, cumoe_host::combine{}, site); \
  }
CUMOE_REDUCE(__reduce_max_sync, Max, unsigned)
CUMOE_REDUCE(__reduce_max_sync, Max, int)
CUMOE_REDUCE(__reduce_min_sync, Min, unsigned)
CUMOE_REDUCE(__reduce_min_sync, Min, int)
CUMOE_REDUCE(__reduce_add_sync, Add, unsigned)
CUMOE_REDUCE(__reduce_add_sync, Add, int)
CUMOE_REDUCE(__reduce_and_sync, And, unsigned)
CUMOE_REDUCE(__reduce_or_sync, Or, unsigned)
CUMOE_REDUCE(__reduce_xor_sync, Xor, unsigned)

inline unsigned __ballot_sync(unsigned mask, int predicate, CUMOE_SITE) {
  const unsigned mine = predicate ? 1u << cumoe_host::self->lane : 0u;
  return cumoe_host::reduce("__ballot_sync", mask, mine, cumoe_host::Or{}, site);
}
inline int __any_sync(unsigned mask, int predicate, CUMOE_SITE) {
  return static_cast<int>(
      cumoe_host::reduce("__any_sync", mask, predicate ? 1u : 0u, cumoe_host::Or{}, site));
}
inline int __all_sync(unsigned mask, int predicate, CUMOE_SITE) {
  return static_cast<int>(
      cumoe_host::reduce("__all_sync", mask, predicate ? 1u : 0u, cumoe_host::And{}, site));
}

template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, CUMOE_SITE) {
  cumoe_host::LaneValue<T> v = {value, value, 0, 0};
  cumoe_host::collective(
      "__match_any_sync", mask, &v,
      [](void* const* lanes, unsigned m) {
        for (int l = 0; l < 32; ++l) {
          if (!(m >> l & 1u)) continue;
          auto* mine = static_cast<cumoe_host::LaneValue<T>*>(lanes[l]);
          unsigned peers = 0;
          for (int o = 0; o < 32; ++o) {
            if (!(m >> o & 1u)) continue;
            auto* other = static_cast<cumoe_host::LaneValue<T>*>(lanes[o]);
            if (memcmp(&other->value, &mine->value, sizeof(T)) == 0) peers |= 1u << o;
          }
          mine->argument = static_cast<int>(peers);
        }
      },
      false, site);
  return static_cast<unsigned>(v.argument);
}

// ----------------------------------------------------------------------------------------- atomics

namespace cumoe_host {

/// A read-modify-write; another thread may come before it.
template <class T, class F>
inline T atomic(T* p, F&& change, Site site) {
  if ((random_bits() & 7u) == 0) yield(site);
  settle(p, sizeof(T));
  const T old = *p;
  const T value = change(old);
  *p = value;
  if (old != value) {
    note_event();
    if ((random_bits() & 7u) == 0) pass_turn(site);
  } else {
    poll("an atomic", site, p);  // perhaps in a loop, until another thread changes it
  }
  return old;
}

}  // namespace cumoe_host

#define CUMOE_ATOMIC(name, expression)                                                     \
  template <class T>                                                                       \
  inline T name(T* p, std::common_type_t<T> value, CUMOE_SITE) {                           \
    return cumoe_host::atomic(p, [&](T old) { return static_cast<T>(expression); }, site); \
  }
CUMOE_ATOMIC(atomicAdd, old + value)
CUMOE_ATOMIC(atomicSub, old - value)
CUMOE_ATOMIC(atomicMax, old > value ? old : value)
CUMOE_ATOMIC(atomicMin, old < value ? old : value)
CUMOE_ATOMIC(atomicOr, old | value)
CUMOE_ATOMIC(atomicAnd, old& value)
CUMOE_ATOMIC(atomicExch, ((void)old, value))

template <class T>
inline T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value, CUMOE_SITE) {
  return cumoe_host::atomic(p, [&](T old) { return old == expected ? value : old; }, site);
}
