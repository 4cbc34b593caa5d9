// Activations in fp32: y = f(gate, up), or f(x) of one value, with the per-expert parameters alpha,
// beta and limit.
//
// From -D   ACTIVATION, an expression in gate, up (or x), alpha, beta and limit; swiglu without it. A
//           user's activation is its own expression, which may call any function below.
#pragma once

#include "ptx.cuh"

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

/// 1 / (1 + exp(-slope * x)). Two special-function instructions: expf and a division would make a
/// kernel that streams its rows wait for arithmetic. Relative error below (2 + |slope * x|) * 2^-22.
__device__ __forceinline__ float sigmoid(float x, float slope = 1.0f) {
  constexpr float kLog2E = 0x1.715476p+0f;
  return ptx::rcp_approx_ftz(1.0f + ptx::ex2_approx_ftz(x * (slope * -kLog2E)));
}

/// min(x, limit) and clamp(x, -limit, limit).
// NOTE: comparisons, not fminf: a NaN must stay a NaN.
__device__ __forceinline__ float limit_above(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float limit_both(float x, float limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

/// x * Phi(x). The tail Phi(-|x|) is t * 2^(q(t) - x^2 / 2 * log2(e)), t = 1 / (1 + 0.35 |x|), q a
/// polynomial fitted for |x| <= 14: relative error 2e-6 for |x| < 5, and few registers at a time.
__device__ __forceinline__ float gelu(float x) {
  const float t = ptx::rcp_approx_ftz(fmaf(0x1.666666p-2f, fabsf(x), 1.0f));
  float q = fmaf(-0x1.1470ccp-2f, t, 0x1.19285p+0f);
  q = fmaf(q, t, -0x1.80159ap+0f);
  q = fmaf(q, t, 0x1.22d66p-1f);
  q = fmaf(q, t, -0x1.298504p-4f);
  q = fmaf(q, t, 0x1.274032p-1f);
  q = fmaf(q, t, 0x1.70b18cp+0f);
  q = fmaf(q, t, -0x1.6b8d8ap+1f);
  const float tail = t * ptx::ex2_approx_ftz(fmaf(x * x, -0x1.715476p-1f, q));
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

/// 0.5 * x * (1 + tanh(z)), z = sqrt(2 / pi) * (x + 0.044715 * x^3), as x * sigmoid(2 * z).
__device__ __forceinline__ float gelu_tanh(float x) {
  return x * sigmoid(0x1.988454p+0f * (x + 0.044715f * x * x * x));
}

/// tanh(x) within 8 ulp and without a branch: an odd polynomial below 0.6, beyond it by exp.
__device__ __forceinline__ float tanh_f32(float x) {
  const float s = x * x, magnitude = fabsf(x);
  float p = fmaf(0x1.ff9842p-7f, s, -0x1.abb818p-5f);
  p = fmaf(p, s, 0x1.10a712p-3f);
  p = fmaf(p, s, -0x1.555368p-2f);
  const float near = fmaf(x, p * s, x);
  const float far = 1.0f - 2.0f * sigmoid(magnitude, -2.0f);
  return magnitude < 0.6f ? near : copysignf(far, x);
}

/// max(x, 0)^2
__device__ __forceinline__ float relu2(float x) {
  const float positive = x < 0.0f ? 0.0f : x;
  return positive * positive;
}

/// g / (1 + exp(-alpha * g)) * (u + beta), g = min(gate, limit), u = clamp(up, -limit, limit).
__device__ __forceinline__ float swiglu(float gate, float up, float alpha, float beta,
                                        float limit) {
  const float g = limit_above(gate, limit);
  return g * sigmoid(g, alpha) * (limit_both(up, limit) + beta);
}

/// beta * tanh(u / beta) * alpha * tanh(g / alpha) * sigmoid(g), g and u limited as in swiglu.
__device__ __forceinline__ float situ(float gate, float up, float alpha, float beta, float limit) {
  const float g = limit_above(gate, limit), u = limit_both(up, limit);
  const float bounded = beta * tanh_f32(__fdividef(u, beta));
  return bounded * (alpha * tanh_f32(__fdividef(g, alpha)) * sigmoid(g));
}

#ifndef ACTIVATION
#define ACTIVATION swiglu(gate, up, alpha, beta, limit)
#endif

/// The activation that the kernel is compiled for; one without a gate gets its value twice.
__device__ __forceinline__ float activate(float gate, float up, const ActivationValues& a) {
  [[maybe_unused]] const float x = gate, alpha = a.alpha, beta = a.beta, limit = a.limit;
  return ACTIVATION;
}

}  // namespace cumoe
