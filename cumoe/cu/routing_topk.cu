// routing_topk: expert ids and weights of every token from its logits, for all routing methods.
//
// Grid      ceil(num_tokens / WARPS_PER_BLOCK) blocks.
// Block     WARPS_PER_BLOCK warps, one token each; lane l holds experts l, l + 32, l + 64, ...
// smem      group_image (WARPS_PER_BLOCK, NUM_GROUPS) uint32, only with expert groups.
// Selection A key's order image (exact.cuh) decides, ties go to the lower id; a taken expert and an expert
//           outside the picked groups have image 0 and are never chosen. Images, sums and weights are
//           computed with separately rounded operations, so the NumPy twin gives the same bits.
// From -D   METHOD NUM_EXPERTS TOP_K NUM_GROUPS TOP_GROUPS NUM_SHARED_EXPERTS LOGITS_TYPE BIAS_TYPE
//           (-1: none) BIAS_ROUND_BF16 WEIGHTS_TYPE NORMALIZE WARPS_PER_BLOCK
#include "exact.cuh"
#include "vec.cuh"

using namespace cumoe;

enum Method : int {
  kDefault = 0,
  kRenormalize = 1,
  kDeepSeekV3 = 2,
  kLlama4 = 3,
  kTopK = 5,
  kSigmoidRenorm = 6,
  kMiniMax2 = 7,
  kSigmoid = 8,
  kTopKSigmoid = 9,
};

struct Params {
  const void* logits;  // (num_tokens, NUM_EXPERTS)
  const void* bias;    // (NUM_EXPERTS,) or null
  int32_t* ids;        // (num_tokens, TOP_K + NUM_SHARED_EXPERTS)
  void* weights;       // (num_tokens, TOP_K + NUM_SHARED_EXPERTS)
  int16_t* replay;     // (>= num_tokens, TOP_K) or null
  int32_t num_tokens;
  float scaling_factor;
};

constexpr int kPerLane = ceil_div(NUM_EXPERTS, kWarpSize);
constexpr int kColumns = TOP_K + NUM_SHARED_EXPERTS;
constexpr int kGroupSize = NUM_EXPERTS / NUM_GROUPS;
constexpr bool kBiased = METHOD == kDeepSeekV3 || METHOD == kMiniMax2;
constexpr bool kKeyIsSigmoid = kBiased || METHOD == kSigmoidRenorm || METHOD == kSigmoid;
constexpr bool kSoftmaxOfSelected = METHOD == kRenormalize;  // renormalize_naive, too

static_assert(TOP_K >= 1 && TOP_K <= kWarpSize, "lane k holds column k");
static_assert(NUM_EXPERTS % NUM_GROUPS == 0, "groups have equal size");
static_assert(TOP_GROUPS * kGroupSize >= TOP_K, "the picked groups must hold top_k experts");

/// Logit with NaN replaced by -inf.
__device__ __forceinline__ float load_logit(const void* logits, int64_t index) {
  const float x = load_element<LOGITS_TYPE>(logits, index);
  return x == x ? x : -INFINITY;
}

__device__ __forceinline__ float load_bias(const void* bias, int expert) {
  if constexpr (BIAS_TYPE < 0) return 0.0f;
  const float b = load_element<(BIAS_TYPE < 0 ? kF32 : BIAS_TYPE)>(bias, expert);
  if constexpr (BIAS_ROUND_BF16) return f32_from_bf16(ptx::cvt_bf16x2_f32(b, b) & 0xffffu);
  return b;
}

/// Best image over the warp, and the smallest index that has it.
__device__ __forceinline__ void warp_argmax(uint32_t& image, int& index) {
  const uint32_t best = __reduce_max_sync(kFullMask, image);
  const unsigned candidate = image == best ? static_cast<unsigned>(index) : 0xffffffffu;
  index = static_cast<int>(__reduce_min_sync(kFullMask, candidate));
  image = best;
}

/// Sets the image of every expert outside the TOP_GROUPS best groups to 0.
__device__ __forceinline__ void keep_best_groups(uint32_t (&image)[kPerLane], uint32_t* group_image,
                                                 int lane) {
  // A group's score is the sum of its two largest keys.
  for (int group = 0; group < NUM_GROUPS; ++group) {
    uint32_t first = 0, second = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = i * kWarpSize + lane;
      if (expert / kGroupSize == group && expert < NUM_EXPERTS) {
        second = max(second, min(first, image[i]));
        first = max(first, image[i]);
      }
    }
    const uint32_t best = __reduce_max_sync(kFullMask, first);
    const int owner = __ffs(__ballot_sync(kFullMask, first == best)) - 1;
    const uint32_t next = __reduce_max_sync(kFullMask, lane == owner ? second : first);
    if (lane == 0) {
      group_image[group] = order_image(__fadd_rn(value_of_image(best), value_of_image(next)));
    }
  }
  __syncwarp();
  for (int pick = 0; pick < TOP_GROUPS; ++pick) {
    uint32_t best = 0;
    int group = NUM_GROUPS;
    for (int g = lane; g < NUM_GROUPS; g += kWarpSize) {
      if (group_image[g] > best) best = group_image[g], group = g;
    }
    warp_argmax(best, group);
    __syncwarp();
    if (lane == 0) group_image[group] = 0;
    __syncwarp();
  }
  // A picked group is marked by image 0, which no score has.
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    if (expert < NUM_EXPERTS && group_image[expert / kGroupSize] != 0) image[i] = 0;
  }
}

extern "C" __global__ void __launch_bounds__(WARPS_PER_BLOCK* kWarpSize)
    routing_topk(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp_idx = threadIdx.x / kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS_PER_BLOCK + warp_idx;
  ptx::griddepcontrol_wait();
  if (token >= p.num_tokens) return;
  const int64_t row = token * NUM_EXPERTS;

  // Keys: what the top-k is taken of.
  float x[kPerLane];
  uint32_t image[kPerLane];
  float row_max = -INFINITY, row_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    x[i] = expert < NUM_EXPERTS ? load_logit(p.logits, row + expert) : -INFINITY;
    row_max = fmaxf(row_max, x[i]);
  }
  if constexpr (METHOD == kDefault) {
    for (int offset = 16; offset > 0; offset /= 2) {
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullMask, row_max, offset));
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float term = softmax_term(x[i], row_max);
      row_sum = i == 0 ? term : __fadd_rn(row_sum, term);
    }
    row_sum = warp_sum(row_sum);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    float key = x[i];
    if constexpr (METHOD == kDefault) {
      key = row_sum > 0.0f ? __fdiv_rn(softmax_term(x[i], row_max), row_sum) : 0.0f;
    } else if constexpr (kKeyIsSigmoid) {
      key = det_sigmoid(x[i]);
      if constexpr (kBiased) {
        if (expert < NUM_EXPERTS) key = __fadd_rn(key, load_bias(p.bias, expert));
      }
    }
    image[i] = expert < NUM_EXPERTS ? order_image(key) : 0;
  }

#if NUM_GROUPS > 1
  __shared__ uint32_t group_image[WARPS_PER_BLOCK][NUM_GROUPS];
  keep_best_groups(image, group_image[warp_idx], lane);
#endif

  // Selection: lane k ends up with the id of column k.
  int selected = 0;
  for (int k = 0; k < TOP_K; ++k) {
    uint32_t best = 0;
    int expert = NUM_EXPERTS;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (image[i] > best) best = image[i], expert = i * kWarpSize + lane;
    }
    warp_argmax(best, expert);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * kWarpSize + lane == expert) image[i] = 0;
    }
    if (lane == k) selected = expert;
  }

  // Weights: lane k computes the weight of column k from the logit itself.
  const bool has_column = lane < TOP_K;
  const float logit = has_column ? load_logit(p.logits, row + selected) : 0.0f;
  float weight = logit;
  if constexpr (METHOD == kDefault) {
    weight = row_sum > 0.0f ? __fdiv_rn(softmax_term(logit, row_max), row_sum) : 0.0f;
  } else if constexpr (kSoftmaxOfSelected) {
    weight = softmax_term(logit, __shfl_sync(kFullMask, logit, 0));
  } else if constexpr (METHOD != kTopK) {
    weight = det_sigmoid(logit);
  }
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) sum = __fadd_rn(sum, __shfl_sync(kFullMask, weight, k));
  if constexpr (kBiased) {
    weight = __fdiv_rn(__fmul_rn(weight, p.scaling_factor), __fadd_rn(sum, 1e-20f));
  } else {
    if constexpr (kSoftmaxOfSelected) weight = sum > 0.0f ? __fdiv_rn(weight, sum) : 0.0f;
    if constexpr (METHOD == kSigmoidRenorm && NORMALIZE) {
      weight = __fdiv_rn(weight, fmaxf(sum, 1e-20f));
    }
    if (p.scaling_factor != 1.0f) weight = __fmul_rn(weight, p.scaling_factor);
  }

  // Shared experts follow the routed columns with weight 1.
  for (int column = lane; column < kColumns; column += kWarpSize) {
    const bool routed = column < TOP_K;
    const int64_t slot = token * kColumns + column;
    const float w = routed ? weight : 1.0f;
    p.ids[slot] = routed ? selected : NUM_EXPERTS + column - TOP_K;
    if constexpr (WEIGHTS_TYPE == kBf16) {
      static_cast<uint16_t*>(p.weights)[slot] = ptx::cvt_bf16x2_f32(w, w) & 0xffffu;
    } else {
      static_cast<float*>(p.weights)[slot] = w;
    }
    if (routed && p.replay != nullptr) {
      p.replay[token * TOP_K + column] = static_cast<int16_t>(selected);
    }
  }
}
