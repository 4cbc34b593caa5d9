// allreduce_two_shot: rank r adds the parts of tokens r, r + RANKS, ... and sends the results to all.
//
// What is computed is said in allreduce.cuh, what the buffers hold in cumoe/comm/layout.py. The result
// that goes over the wire is the rounded one of allreduce.cuh, residual included, so the bits are those
// of allreduce_one_shot.
//
// Grid      persistent clusters of CLUSTER blocks, no more than are resident together, one token each at
//           a time, in three phases: parts of tokens of the peers are sent to them; own tokens are added
//           and sent; the other results are received.
// Waits     only for words of peers in the own buffer: phase 1 for their phase 0, which waits for
//           nothing, and phase 2 for their phase 1.
// smem      Exchange (2, 256) floats; the turn.
#include "allreduce.cuh"
#include "allreduce_wire.cuh"

using namespace cumoe;

static_assert(RANKS > 1, "there are peers");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    allreduce_two_shot(const __grid_constant__ Params p) {
  __shared__ Exchange exchange;
  __shared__ int shared_turn;
#if CLUSTER > 1
  ptx::cluster_sync();  // every block has started before another writes to its shared memory
#endif
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    shared_turn = p.state[0];
    pass_turn_on(p, shared_turn);
  }
  int exchange_turn = 0;
  __syncthreads();
  uint8_t* const mine = buffer_of(p, p.rank, shared_turn);

  const int step = static_cast<int>(gridDim.x) / CLUSTER;
  // Tokens of this rank; the peers have the others.
  const int owned = (p.num_tokens - p.rank + RANKS - 1) / RANKS;
#pragma unroll 1
  for (int phase = 0; phase < 3; ++phase) {
    const int count = phase == 1 ? owned : p.num_tokens - owned;
    for (int j = static_cast<int>(blockIdx.x) / CLUSTER; j < count; j += step) {
      const int group = phase == 1 ? j : j / (RANKS - 1);
      const int other = j - group * (RANKS - 1);
      const int owner = phase == 1 ? p.rank : other < p.rank ? other : other + 1;
      const int token = group * RANKS + owner;
      const int64_t row_start = static_cast<int64_t>(token) * p.hidden_size;
      const int64_t group_start = static_cast<int64_t>(group) * p.hidden_size;
      Wire part[VECS], residual[VECS], gamma[VECS], result[VECS];
      if (phase < 2) part_of(part, p, token);
      if (phase == 1) load_columns(residual, p, p.residual, token);
      if (kEarly && phase > 0) load_columns(gamma, p, p.norm_weight, 0);
#pragma unroll
      for (int i = 0; i < VECS; ++i) {
        const int column = column_of(i);
        if (column >= p.hidden_size) continue;
        const int64_t result_at = p.results_offset + (row_start + column) * kTypeBytes<TYPE>;
        const int64_t part_at = (group_start + column) * kTypeBytes<TYPE>;
        if (phase == 0) {
          send(buffer_of(p, owner, shared_turn) + slot_at(owner, p.rank) * p.slot_bytes + part_at,
               part[i]);
        } else if (phase == 1) {
          float sum[8];
          sum_of_ranks(sum, part[i], mine + part_at, p.slot_bytes, p.rank);
          result[i] = result_of(p, row_start + column, sum, residual[i]);
#pragma unroll 1
          for (int peer = 0; peer < RANKS; ++peer) {
            if (peer != p.rank) send(buffer_of(p, peer, shared_turn) + result_at, result[i]);
          }
        } else {
          Wire one[1];
          receive(one, mine + result_at, 0);
          result[i] = one[0];
        }
      }
      if (phase > 0) finish(p, token, result, gamma, exchange, exchange_turn);
    }
  }
}
