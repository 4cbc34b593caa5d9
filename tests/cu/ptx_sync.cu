// ptx_sync: blocks in a ring that hand each other data by every access of sync.cuh.
//
// Grid      three blocks of 64 threads, which must be resident together.
#include "sync.cuh"

using namespace cumoe;

struct Params {
  uint4* payload;      // (4, 3, 64): polled itself, by flag, by counter, by fence; all words ~0
  uint32_t* flags;     // (3,): zeros
  uint32_t* counters;  // (5,): zeros; three of the blocks, sum and tickets of all threads
  uint4* marks;        // (3,): zeros
  uint4* out;          // (4, 3, 64): what each thread received
};

__device__ uint4 value(int step, int block) {
  const uint32_t x = 10000 * step + 1000 * block + threadIdx.x;
  return make_uint4(x, x ^ 0xffff, 3 * x, x << 8);
}

extern "C" __global__ void __launch_bounds__(64) ptx_sync(const __grid_constant__ Params p) {
  const int t = threadIdx.x, block = blockIdx.x, next = (block + 1) % 3, before = (block + 2) % 3;
  const auto slot = [&](uint4* array, int step, int of) {
    return array + (step * 3 + of) * 64 + t;
  };
  const auto receive = [&](int step) {
    *slot(p.out, step, block) = ptx::ld_relaxed_sys_v4(slot(p.payload, step, block));
  };
  const uint32_t none = 0xffffffffu;

  ptx::st_relaxed_sys_v4(slot(p.payload, 0, next), value(0, block));
  uint4 v;
  do {
    v = ptx::ld_relaxed_sys_v4(slot(p.payload, 0, block));
  } while (v.x == none || v.y == none || v.z == none || v.w == none);
  *slot(p.out, 0, block) = v;

  ptx::st_relaxed_sys_v4(slot(p.payload, 1, next), value(1, block));
  __syncthreads();
  if (t == 0) {
    ptx::st_release_sys(p.flags + next, 7 + block);
    while (ptx::ld_acquire_sys(p.flags + block) != 7 + before) {
    }
  }
  __syncthreads();
  receive(1);

  ptx::st_relaxed_sys_v4(slot(p.payload, 2, next), value(2, block));
  ptx::red_add_release_sys(p.counters + next, 1);
  const uint32_t ticket = ptx::atom_add_release_sys(p.counters + 3, 1);
  ptx::red_add_release_sys(p.counters + 4, ticket);
  while (ptx::ld_acquire_sys(p.counters + block) != 64) {
  }
  receive(2);

  ptx::st_relaxed_sys_v4(slot(p.payload, 3, next), value(3, block));
  ptx::fence_acq_rel_sys();
  __syncthreads();
  if (t == 0) {
    ptx::st_relaxed_sys_v4(p.marks + next, make_uint4(1, 2, 3, 4));
    while (ptx::ld_relaxed_sys_v4(p.marks + block).w != 4) {
    }
    ptx::fence_acq_rel_sys();
  }
  __syncthreads();
  receive(3);
}
