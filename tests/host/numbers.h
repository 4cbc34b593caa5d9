// The number formats of the tensor cores, in integer arithmetic: rounding to nearest even and exact
// widening, with the NaNs and the saturation of the PTX conversions.
#pragma once

#include <cstdint>
#include <cstring>

namespace cumoe_host {

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bf16(uint32_t bits) { return float_of(bits << 16); }

inline uint32_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return 0x7fffu;
  return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}

/// Rounds to a format with the given mantissa bits and least exponent, as a multiple of its last
/// place.
inline double round_to(double x, int mantissa_bits, int min_exponent) {
  if (x == 0.0 || !__builtin_isfinite(x)) return x;
  int exponent;
  __builtin_frexp(x, &exponent);  // x = f * 2^exponent, f in [0.5, 1)
  const int last_place =
      (exponent - 1 < min_exponent ? min_exponent : exponent - 1) - mantissa_bits;
  return __builtin_ldexp(__builtin_nearbyint(__builtin_ldexp(x, -last_place)), last_place);
}

inline float from_f16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 0x1fu,
                 mantissa = bits & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float x = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -x : x;
  }
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

/// Overflow becomes infinity, every NaN 0x7fff.
inline uint32_t to_f16(double x) {
  if (x != x) return 0x7fffu;
  const uint32_t sign = __builtin_signbit(x) ? 0x8000u : 0u;
  const double r = __builtin_fabs(round_to(x, 10, -14));
  if (r > 65504.0) return sign | 0x7c00u;
  if (r == 0.0) return sign;
  int exponent;
  __builtin_frexp(r, &exponent);
  if (exponent - 1 < -14) return sign | static_cast<uint32_t>(__builtin_ldexp(r, 24));
  const uint32_t mantissa = static_cast<uint32_t>(__builtin_ldexp(r, 10 - (exponent - 1))) & 0x3ffu;
  return sign | static_cast<uint32_t>(exponent - 1 + 15) << 10 | mantissa;
}

inline float from_e4m3(uint32_t bits) {
  const uint32_t exponent = bits >> 3 & 0xfu, mantissa = bits & 7u;
  float x;
  if (exponent == 15 && mantissa == 7) {
    return float_of(0x7fc00000u);
  } else if (exponent == 0) {
    x = static_cast<float>(mantissa) * 0x1p-9f;
  } else {
    x = __builtin_ldexpf(static_cast<float>(8 + mantissa), static_cast<int>(exponent) - 10);
  }
  return bits & 0x80u ? -x : x;
}

/// Saturates at 448, infinity too; every NaN becomes 0x7f.
inline uint32_t to_e4m3(float x) {
  if (x != x) return 0x7fu;
  const uint32_t sign = __builtin_signbit(x) ? 0x80u : 0u;
  double r = __builtin_fabs(round_to(x, 3, -6));
  if (r >= 448.0) return sign | 0x7eu;
  if (r == 0.0) return sign;
  int exponent;
  __builtin_frexp(r, &exponent);
  if (exponent - 1 < -6) return sign | static_cast<uint32_t>(__builtin_ldexp(r, 9));
  const uint32_t mantissa = static_cast<uint32_t>(__builtin_ldexp(r, 3 - (exponent - 1))) & 7u;
  return sign | static_cast<uint32_t>(exponent - 1 + 7) << 3 | mantissa;
}

}  // namespace cumoe_host
