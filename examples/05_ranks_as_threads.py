"""Ranks as threads of one process: each runs its shard of a layer, which sums the parts.

Needs   cumoe. Runs on GPUs if CuPy can use any, two if it finds as many, else on NumPy.
Shows   run_ranks, ExpertShard and MoELayer's group; processes do the same with connect_tcp() or an
        mpi4py communicator as the group.
"""

import numpy as np

import cumoe
from cumoe import comm

NUM_RANKS, NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS = 2, 33, 256, 128, 8

rng = np.random.default_rng(0)
gate, up = rng.standard_normal((2, NUM_EXPERTS, INTERMEDIATE, HIDDEN), np.float32) / 16
down = rng.standard_normal((NUM_EXPERTS, HIDDEN, INTERMEDIATE), np.float32) / 11
weights = cumoe.ExpertWeights.from_experts(gate, up, down, recipe="fp8_block")
routing = cumoe.Routing("renormalize", num_experts=NUM_EXPERTS, top_k=2)
x = rng.standard_normal((NUM_TOKENS, HIDDEN), np.float32)
logits = rng.standard_normal((NUM_TOKENS, NUM_EXPERTS), np.float32)

devices = []
if cumoe.launch.is_available():
    import cupy as xp

    count = xp.cuda.runtime.getDeviceCount()
    devices = [rank % count for rank in range(NUM_RANKS)]  # one each, if there are enough
else:
    xp = np


def work(group):
    """Return the layer's result, the sum over ranks; `group` says which rank this thread is."""
    shard = cumoe.ExpertShard.even(NUM_EXPERTS, group.rank, group.size)
    mine = weights.shard(shard)
    layer = cumoe.MoELayer(
        mine.to_device() if devices else mine,
        routing,
        max_num_tokens=NUM_TOKENS,
        shard=shard,
        group=group,
    )
    y = layer(xp.asarray(x), xp.asarray(logits))
    layer.close()  # by all ranks together, as they made it
    return np.asarray(y.astype(np.float32).get() if devices else y, np.float32)


sums = comm.run_ranks(NUM_RANKS, work, devices=devices)

# The whole layer, by NumPy. The sum of the parts is the same but for its roundings to bfloat16, and
# on GPUs for what their tensor cores round.
whole = np.empty(x.shape, np.float32)
cumoe.moe(x, logits, weights, routing=routing, out=whole)
rms = np.sqrt(np.mean(whole**2))
error = (np.abs(sums[0] - whole) / np.maximum(rms, np.abs(whole))).max()
print(f"{xp.__name__}, {NUM_RANKS} ranks: largest error {error:.1e}")

assert error < (2**-4 if devices else 2**-6) and all((s == sums[0]).all() for s in sums)
