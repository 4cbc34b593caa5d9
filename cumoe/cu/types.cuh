// Fixed-width integers and bounds, which NVRTC does not predefine.
#pragma once

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#define INFINITY __int_as_float(0x7f800000)
#else
#include <math.h>
#include <stdint.h>
#endif

namespace cumoe {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpSize = 32;

/// Element types named by the -D constants of the kernels; the values are shared with the host. e4m3 has a
/// scale for each block of a matrix, kE4m3Tensor one for the whole of it.
enum DataType : int { kNoType = -1, kBf16 = 0, kF16 = 1, kF32 = 2, kE4m3 = 3, kE4m3Tensor = 4 };

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace cumoe
