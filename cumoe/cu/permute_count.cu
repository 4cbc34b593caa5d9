// permute_count: how many slots of each chunk go to each local expert.
//
// chunk_counts[c, e] = number of slots s in [c * kChunkSlots, (c + 1) * kChunkSlots) with local expert e.
//
// Grid      ceil(num_slots / kChunkSlots) blocks, one chunk each.
// Block     128 threads.
// smem      counts (num_local,) int32, dynamic.
#include "experts.cuh"
#include "ptx.cuh"

using namespace cumoe;

struct Params {
  const int32_t* ids;     // (num_tokens, columns)
  int32_t* chunk_counts;  // (num_chunks, num_local)
  int32_t num_slots;
  int32_t columns;
  ExpertRange experts;
};

extern "C" __global__ void __launch_bounds__(128) permute_count(const __grid_constant__ Params p) {
  extern __shared__ int32_t counts[];  // (num_local,)
  const int num_local = p.experts.num_local_routed + p.experts.num_shared;
  for (int e = threadIdx.x; e < num_local; e += blockDim.x) counts[e] = 0;
  ptx::griddepcontrol_wait();
  __syncthreads();
  const int begin = blockIdx.x * kChunkSlots;
  const int end = min(begin + kChunkSlots, p.num_slots);
  for (int slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    const int expert = p.experts.local(p.ids[slot], slot / p.columns);
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * num_local;
  for (int e = threadIdx.x; e < num_local; e += blockDim.x) p.chunk_counts[row + e] = counts[e];
}
