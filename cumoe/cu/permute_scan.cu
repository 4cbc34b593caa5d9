// permute_scan: expert segments from the chunk counts.
//
// tokens_per_expert[e] = sum over chunks; chunk_counts becomes its exclusive prefix sum over chunks;
// expert_offsets[e + 1] = expert_offsets[e] + ceil(tokens_per_expert[e] / tile) * tile;
// num_tiles = expert_offsets[num_local] / tile.
//
// Grid      one block.
// Block     1024 threads; thread t owns consecutive experts from t * per_thread on for the offsets.
// smem      counts (num_local,) int32, dynamic; scan (1024,) int32.
#include "ptx.cuh"

using namespace cumoe;

constexpr int kThreads = 1024;

struct Params {
  int32_t* chunk_counts;       // (num_chunks, num_local), in and out
  int32_t* tokens_per_expert;  // (num_local,)
  int32_t* expert_offsets;     // (num_local + 1,)
  int32_t* num_tiles;          // (1,)
  int32_t num_chunks;
  int32_t num_local;
  int32_t tile;
};

extern "C" __global__ void __launch_bounds__(kThreads)
    permute_scan(const __grid_constant__ Params p) {
  extern __shared__ int32_t counts[];  // (num_local,)
  __shared__ int32_t scan[kThreads];
  ptx::griddepcontrol_wait();

  // Over chunks, one expert a thread: neighbouring threads read neighbouring words.
  for (int e = threadIdx.x; e < p.num_local; e += kThreads) {
    int running = 0;
    int32_t* column = p.chunk_counts + e;
#pragma unroll 8
    for (int c = 0; c < p.num_chunks; ++c) {
      const int64_t at = static_cast<int64_t>(c) * p.num_local;
      const int count = column[at];
      column[at] = running;
      running += count;
    }
    p.tokens_per_expert[e] = running;
    counts[e] = running;
  }
  __syncthreads();

  // Over experts: each thread sums its own, then an inclusive scan over the threads.
  const int per_thread = ceil_div(p.num_local, kThreads);
  const int first = min(static_cast<int>(threadIdx.x) * per_thread, p.num_local);
  const int last = min(first + per_thread, p.num_local);
  int own = 0;
  for (int e = first; e < last; ++e) own += ceil_div(counts[e], p.tile);
  scan[threadIdx.x] = own;
  __syncthreads();
  for (int offset = 1; offset < kThreads; offset *= 2) {
    const int left = static_cast<int>(threadIdx.x) >= offset ? scan[threadIdx.x - offset] : 0;
    __syncthreads();
    scan[threadIdx.x] += left;
    __syncthreads();
  }
  int tiles = scan[threadIdx.x] - own;
  for (int e = first; e < last; ++e) {
    p.expert_offsets[e] = tiles * p.tile;
    tiles += ceil_div(counts[e], p.tile);
  }
  if (threadIdx.x == kThreads - 1) {
    p.expert_offsets[p.num_local] = scan[threadIdx.x] * p.tile;
    p.num_tiles[0] = scan[threadIdx.x];
  }
}
