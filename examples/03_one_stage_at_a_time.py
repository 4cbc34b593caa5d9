"""A layer put together from its stages, each an op of its own.

Needs   cumoe. Runs on a GPU if CuPy can use one, else on NumPy.
Shows   route, group, quantize_fp8_block, grouped_gemm, finalize; where rows lie in between.
"""

import ml_dtypes
import numpy as np

import cumoe

NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS = 33, 256, 128, 8

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
    recipe="fp8_block",
)
x = draw(NUM_TOKENS, HIDDEN) * 16
logits = xp.asarray(rng.standard_normal((NUM_TOKENS, NUM_EXPERTS), np.float32))
routing = cumoe.Routing("renormalize", num_experts=NUM_EXPERTS, top_k=2)

# 1. Which experts, with what weights: ids and weights of shape (tokens, 2).
topk = cumoe.route(logits, routing)

# 2. Slots sorted by expert. An expert's rows start at a multiple of the tile height; rows that only
#    fill a tile have token -1.
permutation = cumoe.group(topk, num_experts=NUM_EXPERTS, tile=16)
counts, offsets = to_host(permutation.tokens_per_expert), to_host(permutation.expert_offsets)
assert counts.sum() == NUM_TOKENS * 2 and (offsets % 16 == 0).all()
row = int(to_host(permutation.permuted_idx)[5, 0])  # where token 5 meets its first expert
assert int(to_host(permutation.token_idx)[row]) == 5

# 3. Tokens to fp8, one scale for 128 columns of a token.
x_fp8 = cumoe.quantize_fp8_block(x)

# 4. Gate and up in one GEMM that reads tokens where they lie; its epilogue is the activation, and
#    quantises again. w13 goes in with its scales.
hidden = cumoe.grouped_gemm(
    x_fp8,
    cumoe.Quantized(weights.w13, weights.w13_scale, block=(128, 128)),
    permutation,
    gate_up_order=weights.gate_up_order,
    out_dtype="float8_e4m3fn",
)

# 5. Down, from rows to rows.
rows = cumoe.grouped_gemm(
    hidden,
    cumoe.Quantized(weights.w2, weights.w2_scale, block=(128, 128)),
    permutation,
    gather=False,
)

# 6. The weighted sum of each token's rows, in a fixed order.
y = cumoe.finalize(rows, topk.weights, permutation.permuted_idx)

whole = cumoe.moe(x, logits, weights, routing=routing)
difference = np.abs(to_host(y).astype(np.float32) - to_host(whole).astype(np.float32)).max()
print(f"{xp.__name__}: rows of the experts {counts.tolist()}, largest difference {difference:g}")
assert difference == 0
