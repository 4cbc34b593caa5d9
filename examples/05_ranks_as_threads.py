"""Ranks as threads of one process: each runs its shard of a layer, which sums the parts.

Needs   cumoe. Two ranks on two GPUs; one rank where CuPy finds one GPU, and two on NumPy without.
Shows   run_ranks, ExpertShard and MoELayer's group; processes do the same with connect_tcp() or an
        mpi4py communicator as the group.
"""

import numpy as np

import cumoe
from cumoe import comm

NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS = 33, 256, 128, 8

rng = np.random.default_rng(0)
gate, up = rng.standard_normal((2, NUM_EXPERTS, INTERMEDIATE, HIDDEN), np.float32) / 16
down = rng.standard_normal((NUM_EXPERTS, HIDDEN, INTERMEDIATE), np.float32) / 11
weights = cumoe.ExpertWeights.from_experts(gate, up, down, recipe="fp8_block")
routing = cumoe.Routing("renormalize", num_experts=NUM_EXPERTS, top_k=2)
x = rng.standard_normal((NUM_TOKENS, HIDDEN), np.float32)
logits = rng.standard_normal((NUM_TOKENS, NUM_EXPERTS), np.float32)

if cumoe.launch.is_available():
    import cupy as xp

    num_ranks = min(2, xp.cuda.runtime.getDeviceCount())  # a GPU for each
else:
    xp, num_ranks = np, 2


def work(group):
    """Return the layer's result, the sum over ranks; `group` says which rank this thread is."""
    shard = cumoe.ExpertShard.even(NUM_EXPERTS, group.rank, group.size)
    mine = weights.shard(shard)
    layer = cumoe.MoELayer(
        mine.to_device() if xp is not np else mine,
        routing,
        max_num_tokens=NUM_TOKENS,
        shard=shard,
        group=group,
    )
    y = layer(xp.asarray(x), xp.asarray(logits))
    layer.close()  # by all ranks together, as they made it
    return np.asarray(y.astype(np.float32).get() if xp is not np else y, np.float32)


sums = comm.run_ranks(num_ranks, work)

# The whole layer, by NumPy. The sum of the parts is the same but for its roundings to bfloat16, and
# on GPUs for what their tensor cores round.
whole = np.empty(x.shape, np.float32)
cumoe.moe(x, logits, weights, routing=routing, out=whole)
rms = np.sqrt(np.mean(whole**2))
error = (np.abs(sums[0] - whole) / np.maximum(rms, np.abs(whole))).max()
print(f"{xp.__name__}, {num_ranks} ranks: largest error {error:.1e}")

assert error < (2**-6 if xp is np else 2**-4) and all((s == sums[0]).all() for s in sums)
