"""Routing decided elsewhere, packed routing, and a layer shared out over ranks.

Needs   cumoe. Runs on a GPU if CuPy can use one, else on NumPy.
Shows   TopK, PackedTopK, routed_moe, ExpertShard; one process plays all ranks.
"""

import ml_dtypes
import numpy as np

import cumoe

NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 24, 128, 64, 10, 3

if cumoe.launch.is_available():
    import cupy as xp
else:
    xp = np

rng = np.random.default_rng(0)


def draw(*shape):
    """Return bfloat16 numbers whose matrix products stay near one."""
    return xp.asarray(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5).astype(
        ml_dtypes.bfloat16
    )


def to_host(a):
    return a.get() if hasattr(a, "get") else a


weights = cumoe.ExpertWeights.from_experts(
    draw(NUM_EXPERTS, INTERMEDIATE, HIDDEN),
    draw(NUM_EXPERTS, INTERMEDIATE, HIDDEN),
    draw(NUM_EXPERTS, HIDDEN, INTERMEDIATE),
    recipe="bf16",
)
x = draw(NUM_TOKENS, HIDDEN) * 8

# Any router will do; this one deals experts out in turn. Weights are used as they are.
ids = (np.arange(NUM_TOKENS)[:, None] + np.array([0, 1, 5])) % NUM_EXPERTS
topk = cumoe.TopK(
    xp.asarray(ids.astype(np.int32)),
    xp.asarray(np.tile(np.float32([0.5, 0.3, 0.2]), (NUM_TOKENS, 1))),
)
y = cumoe.routed_moe(x, topk, weights)

# Packed: (id << 16) | bfloat16 weight, in one int32.
y_packed = cumoe.routed_moe(x, cumoe.pack(topk), weights)

# An id that is no expert contributes nothing, so a slot can be switched off.
off = topk.ids.copy()
off[:, 2] = -1
y_off = cumoe.routed_moe(x, cumoe.TopK(off, topk.weights), weights)

# Three ranks with 4, 3 and 3 experts. Each skips what it does not hold; their results add up.
total = np.zeros((NUM_TOKENS, HIDDEN), np.float32)
for rank in range(3):
    shard = cumoe.ExpertShard.from_counts([4, 3, 3], rank)
    part = cumoe.routed_moe(x, topk, weights.shard(shard), num_experts=NUM_EXPERTS, shard=shard)
    total += to_host(part).astype(np.float32)

wide = to_host(y).astype(np.float32)
scale = np.sqrt(np.mean(wide**2))
packed_error = np.abs(to_host(y_packed).astype(np.float32) - wide).max() / scale
shard_error = np.abs(total - wide).max() / scale
print(f"{xp.__name__}: packed differs by {packed_error:.4f}, shards by {shard_error:.4f}")
assert packed_error < 0.05  # the packed weights are bfloat16
assert shard_error < 0.05  # each rank's part is rounded to bfloat16
assert np.abs(to_host(y_off).astype(np.float32) - wide).max() / scale > 0.1
