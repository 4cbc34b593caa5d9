// allreduce_one_shot: every rank sends its part of each token to all peers, and adds what it receives.
//
// What is computed is said in allreduce.cuh, what the buffers hold in cumoe/comm/layout.py.
//
// Grid      persistent clusters of CLUSTER blocks, one token each at a time: no more than are resident
//           together. A cluster sends its next token before it waits for the peers' parts of this one.
// Waits     only for words of peers in the own buffer. A peer sends token t before it waits for any
//           token after t - gridDim / CLUSTER, and the ranks' clusters take tokens in one order, so
//           the ranks never wait for each other in a circle.
// smem      Exchange (2, 256) floats; the turn.
#include "allreduce.cuh"
#include "allreduce_wire.cuh"

using namespace cumoe;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    allreduce_one_shot(const __grid_constant__ Params p) {
  __shared__ Exchange exchange;
  __shared__ int shared_turn;
#if CLUSTER > 1
  ptx::cluster_sync();  // every block has started before another writes to its shared memory
#endif
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  int turn = RANKS > 1 && threadIdx.x == 0 ? p.state[0] : 0;
  int exchange_turn = 0;

  const int step = static_cast<int>(gridDim.x) / CLUSTER;
  Wire mine[VECS], next[VECS];
  for (int token = static_cast<int>(blockIdx.x) / CLUSTER - step; token < p.num_tokens;
       token += step) {
    const bool first = token < 0;
    if (token + step < p.num_tokens) {
      part_of(next, p, token + step);
      if constexpr (RANKS > 1) {
        if (first) {
          if (threadIdx.x == 0) shared_turn = turn;
          __syncthreads();
          turn = shared_turn;
        }
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
          const int column = column_of(i);
          if (column >= p.hidden_size) continue;
          const int64_t at = static_cast<int64_t>(token + step) * p.hidden_size + column;
#pragma unroll 1
          for (int other = 1; other < RANKS; ++other) {
            const int peer = p.rank + other < RANKS ? p.rank + other : p.rank + other - RANKS;
            send(buffer_of(p, peer, turn) + slot_at(peer, p.rank) * p.slot_bytes +
                     at * kTypeBytes<TYPE>,
                 next[i]);
          }
        }
        if (first && threadIdx.x == 0) pass_turn_on(p, turn);
      }
    }
    if (!first) {
      Wire residual[VECS], gamma[VECS], result[VECS];
      load_columns(residual, p, p.residual, token);
      if constexpr (kEarly) load_columns(gamma, p, p.norm_weight, 0);
#pragma unroll
      for (int i = 0; i < VECS; ++i) {
        const int column = column_of(i);
        if (column >= p.hidden_size) continue;
        const int64_t at = static_cast<int64_t>(token) * p.hidden_size + column;
        float sum[8];
        sum_of_ranks(sum, mine[i], buffer_of(p, p.rank, turn) + at * kTypeBytes<TYPE>, p.slot_bytes,
                     p.rank);
        result[i] = result_of(p, at, sum, residual[i]);
      }
      finish(p, token, result, gamma, exchange, exchange_turn);
    }
#pragma unroll
    for (int i = 0; i < VECS; ++i) mine[i] = next[i];
  }
}
