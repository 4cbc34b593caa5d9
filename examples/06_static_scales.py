"""A layer as Llama 4 has it: fp8 with static scales, routing weights on the input, a shared expert.

Needs   cumoe. Runs on a GPU if CuPy can use one, else on NumPy.
Shows   calibrate, recipe "fp8_tensor", Routing(weights_on_input=True), finalize=False.
"""

import ml_dtypes
import numpy as np

import cumoe

NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS = 64, 256, 128, 8

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


# Eight routed experts and, last, the shared one, as a checkpoint has them.
matrices = [draw(NUM_EXPERTS + 1, INTERMEDIATE, HIDDEN) for _ in range(2)]
matrices.append(draw(NUM_EXPERTS + 1, HIDDEN, INTERMEDIATE))
routing = cumoe.Routing(
    "llama4", num_experts=NUM_EXPERTS, top_k=1, num_shared_experts=1, weights_on_input=True
)

# Offline: the largest token and the largest activation of some sample tokens fill the range of fp8.
# Given routing leaves out the column of the shared expert, which the layer adds.
samples = draw(200, HIDDEN) * 16
ids, scores = cumoe.route(xp.asarray(rng.standard_normal((200, NUM_EXPERTS), np.float32)), routing)
scales = cumoe.calibrate(
    samples,
    cumoe.TopK(ids[:, :1].copy(), scores[:, :1].copy()),
    cumoe.ExpertWeights.from_experts(*matrices, recipe="bf16"),
    num_shared_experts=1,
    weights_on_input=True,
)
weights = cumoe.ExpertWeights.from_experts(
    *matrices, recipe="fp8_tensor", x_scale=scales.x_scale, act_scale=scales.act_scale
)

x = draw(NUM_TOKENS, HIDDEN) * 16
logits = xp.asarray(rng.standard_normal((NUM_TOKENS, NUM_EXPERTS), np.float32))
y = cumoe.moe(x, logits, weights, routing=routing)

# The weights are in the rows already, so nothing but the rows' sum is left to do.
parts = cumoe.moe(x, logits, weights, routing=routing, finalize=False)
assert parts.topk_weights is None
assert to_host(cumoe.finalize_parts(parts)).tobytes() == to_host(y).tobytes()

# The same in float32 without quantisation.
ids, scores = (to_host(a) for a in cumoe.route(logits, routing))
gate, up, down = (to_host(m).astype(np.float32) for m in matrices)
wide = to_host(x).astype(np.float32)
exact = np.zeros((NUM_TOKENS, HIDDEN), np.float32)
for t in range(NUM_TOKENS):
    for expert, weight in zip(ids[t], scores[t], strict=True):  # the shared one's weight is 1
        g, u = weight * (gate[expert] @ wide[t]), weight * (up[expert] @ wide[t])
        exact[t] += down[expert] @ (g / (1 + np.exp(-g)) * u)

error = np.sqrt(np.mean((to_host(y).astype(np.float32) - exact) ** 2) / np.mean(exact**2))
print(f"{xp.__name__}: x_scale {scales.x_scale:.2g}, act_scale {scales.act_scale:.2g}")
print(f"relative error of fp8 with static scales: {error:.1%}")

assert 0.02 < error < 0.1
