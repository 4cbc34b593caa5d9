"""Mutations of the all-reduce kernels, as in ``test_host_mutations.py``."""

from __future__ import annotations

import pytest

from tests.host import loader
from tests.test_host_mutations import Mutation, assert_caught

BARRIER = "__syncthreads();"
ALLREDUCE, WIRE = "allreduce.cuh", "allreduce_wire.cuh"
ONE_SHOT, TWO_SHOT = "allreduce_one_shot", "allreduce_two_shot"
GROWING = "two ranks, growing and shrinking"

MUTATIONS = {
    # The way over the wire: turns, sentinels, waits.
    "allreduce: buffers not cleared": Mutation(
        WIRE, "send(from + s * stride, empty);", ";", ONE_SHOT, case=GROWING
    ),
    "allreduce: one slot not cleared": Mutation(
        WIRE, "s < kCount; ++s) send(", "s < kCount - 1; ++s) send(", ONE_SHOT,
        case="three ranks",
    ),
    "allreduce: sentinels sent": Mutation(
        WIRE, "return word == kSentinel ? 0u : word;", "return word;", ONE_SHOT,
        case="plain, minus zeros",
    ),
    "allreduce: sentinels of float32 sent": Mutation(
        WIRE, "return word == kSentinel ? 0u : word;", "return word;", ONE_SHOT,
        case="plain, float32",
    ),
    "allreduce: sums from the first part on": Mutation(
        WIRE, "sum[c] = 0.0f;", "sum[c] = -0.0f;", ONE_SHOT, case="one rank, minus zeros"
    ),
    "allreduce: one buffer": Mutation(
        WIRE, "turn + 1 == kNumBuffers ? 0 : turn + 1", "0", ONE_SHOT, case=GROWING
    ),
    "allreduce: a turn for each block": Mutation(
        WIRE, "static_cast<int>(gridDim.x) - 1)", "0)", ONE_SHOT, case=GROWING
    ),
    "allreduce: arrivals not reset": Mutation(
        WIRE, "p.state[1] = 0;", "", ONE_SHOT, case=GROWING
    ),
    "allreduce: one word of four awaited": Mutation(
        WIRE, " && v.y != kSentinel && v.z != kSentinel && v.w != kSentinel", "", ONE_SHOT,
        case=GROWING,
    ),
    "allreduce: no wait": Mutation(
        WIRE, "while (!here);", "while (false);", ONE_SHOT, case=GROWING
    ),
    "allreduce: the last slot alone awaited": Mutation(
        WIRE, "here &= v.x", "here = v.x", ONE_SHOT, case="three ranks"
    ),
    "allreduce: a peer's buffer polled": Mutation(
        f"{ONE_SHOT}.cu", "buffer_of(p, p.rank, turn)", "buffer_of(p, (p.rank + 1) % RANKS, turn)",
        case="three ranks",
    ),
    "allreduce: slot of the sender": Mutation(
        WIRE, "return rank < peer ? rank : rank - 1;", "return rank ? rank - 1 : 0;", ONE_SHOT,
        case="three ranks",
    ),
    "allreduce: order of the ranks": Mutation(
        WIRE, "if (kFirst + s == rank) add(sum, mine);", "", ONE_SHOT, case="three ranks"
    ),
    "allreduce: the last rank": Mutation(
        WIRE, "if (rank == RANKS - 1) add(sum, mine);", "", ONE_SHOT, case="three ranks"
    ),
    "allreduce: turn of the block": Mutation(f"{ONE_SHOT}.cu", BARRIER, "", case=GROWING),
    "allreduce: two-shot, turn of the block": Mutation(
        f"{TWO_SHOT}.cu", BARRIER, "", case="three ranks"
    ),
    "allreduce: two-shot, owner": Mutation(
        f"{TWO_SHOT}.cu", "other < p.rank ? other : other + 1", "other", case="three ranks"
    ),
    "allreduce: two-shot, results to all": Mutation(
        f"{TWO_SHOT}.cu", "peer = 0; peer < RANKS", "peer = 1; peer < RANKS", case="three ranks"
    ),
    "allreduce: two-shot, tokens of a rank": Mutation(
        f"{TWO_SHOT}.cu", "p.num_tokens - p.rank + RANKS - 1", "p.num_tokens + RANKS - 1",
        case="three ranks",
    ),
    "allreduce: two-shot, a peer's results polled": Mutation(
        f"{TWO_SHOT}.cu", "buffer_of(p, p.rank, shared_turn)",
        "buffer_of(p, (p.rank + 1) % RANKS, shared_turn)", case="three ranks",
    ),
    # What follows the sum.
    "allreduce: slot of -1": Mutation(
        ALLREDUCE, "if (row[j] < 0) continue;", "", ONE_SHOT, case=GROWING, nth=1
    ),
    "allreduce: slots past the lanes": Mutation(
        ALLREDUCE, "first += 32", "first += 64", ONE_SHOT, case="more slots than lanes"
    ),
    "allreduce: factor": Mutation(
        ALLREDUCE, "__fmul_rn(sum[i][c], p.routed_scaling_factor)", "sum[i][c]", ONE_SHOT,
        case=GROWING,
    ),
    "allreduce: fused": Mutation(
        ALLREDUCE, "__fadd_rn(sum[i][c], __fmul_rn(weight, x[c]))",
        "__fmaf_rn(weight, x[c], sum[i][c])", ONE_SHOT, case="rows that cancel",
    ),
    "allreduce: quantised before it is rounded": Mutation(
        ALLREDUCE, "unpack(x[i], rounded);", "", ONE_SHOT, case="one rank"
    ),
    "allreduce: blocks meet": Mutation(
        ALLREDUCE, "  ptx::cluster_sync();", "", ONE_SHOT, case="clusters"
    ),
    "allreduce: threads meet": Mutation(
        ALLREDUCE, "  __syncthreads();", "", ONE_SHOT, case=GROWING
    ),
    "allreduce: exchange in turns": Mutation(
        ALLREDUCE, "turn ^= 1;", "", ONE_SHOT, case="clusters"
    ),
    "allreduce: largest of the token": Mutation(
        ALLREDUCE, "over_token<false>(of_chunk, num_chunks, exchange, turn)", "of_chunk[0]",
        ONE_SHOT, case="clusters",
    ),
    "allreduce: columns": Mutation(
        ALLREDUCE, "if (column < p.hidden_size) {", "if (true) {", ONE_SHOT, case=GROWING
    ),
    "allreduce: offset of the weight": Mutation(
        ALLREDUCE, "__fadd_rn(p.weight_offset, weight[c])", "weight[c]", ONE_SHOT, case="clusters"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _compiler() -> None:
    loader.require()


@pytest.mark.parametrize("name", MUTATIONS, ids=lambda n: n.replace(" ", "_"))
def test_caught(name):
    assert_caught(MUTATIONS[name])
