// Gated activations in fp32: y = f(gate, up) with the per-expert parameters alpha, beta and limit.
#pragma once

#include "types.cuh"

namespace cumoe {

/// One parameter: a pointer to one value per local expert, or a single value.
struct PerExpert {
  const float* values;
  float value;
  float unused_;

  __device__ __forceinline__ float of(int expert) const {
    return values != nullptr ? values[expert] : value;
  }
};

struct ActivationParams {
  PerExpert alpha;
  PerExpert beta;
  PerExpert limit;  // +inf: no limit
};

struct ActivationValues {
  float alpha, beta, limit;
};

__device__ __forceinline__ ActivationValues activation_of(const ActivationParams& p, int expert) {
  return {p.alpha.of(expert), p.beta.of(expert), p.limit.of(expert)};
}

/// g / (1 + exp(-alpha * g)) * (u + beta), g = min(gate, limit), u = clamp(up, -limit, limit).
__device__ __forceinline__ float swiglu(float gate, float up, const ActivationValues& a) {
  // NOTE: comparisons, not fminf: a NaN must stay a NaN.
  const float g = gate > a.limit ? a.limit : gate;
  const float u = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
  return __fdividef(g, 1.0f + expf(-a.alpha * g)) * (u + a.beta);
}

}  // namespace cumoe
