// Division by a number that many quotients share, and that is known early.
#pragma once

#include "types.cuh"

namespace cumoe {

/// Quotients of numbers below 2^32, each a few instructions instead of some hundred cycles.
struct Divisor {
  uint32_t divisor, magic;

  __device__ __forceinline__ explicit Divisor(uint32_t by) : divisor(by), magic(0xffffffffu / by) {}

  /// The high word of the product is the quotient or one less.
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    const uint32_t low = __umulhi(n, magic);
    return low + (n - low * divisor >= divisor ? 1u : 0u);
  }
};

}  // namespace cumoe
