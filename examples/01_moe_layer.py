"""One mixture-of-experts layer from router logits: called once, then planned.

Needs   cumoe. Runs on a GPU if CuPy can use one, else on NumPy.
Shows   ExpertWeights.from_experts, Routing, moe, MoELayer, and its capture in a CUDA graph.
"""

import ml_dtypes
import numpy as np

import cumoe

NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS = 40, 256, 128, 16

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


# The experts' matrices as a checkpoint has them; they are quantised one by one. The shared expert,
# which every token uses, comes last.
gate = draw(NUM_EXPERTS + 1, INTERMEDIATE, HIDDEN)
up = draw(NUM_EXPERTS + 1, INTERMEDIATE, HIDDEN)
down = draw(NUM_EXPERTS + 1, HIDDEN, INTERMEDIATE)
weights = cumoe.ExpertWeights.from_experts(gate, up, down, recipe="fp8_block")

routing = cumoe.Routing(
    "deepseek_v3",
    num_experts=NUM_EXPERTS,
    top_k=4,
    num_groups=4,
    top_groups=2,
    scaling_factor=2.5,
    num_shared_experts=1,
)
x = draw(NUM_TOKENS, HIDDEN) * 16
logits = xp.asarray(rng.standard_normal((NUM_TOKENS, NUM_EXPERTS), np.float32))

# Once: buffers are made for the call.
y = cumoe.moe(x, logits, weights, routing=routing)

# Planned: buffers and launches are kept, so that a call only queues kernels.
layer = cumoe.MoELayer(weights, routing, max_num_tokens=NUM_TOKENS)
out = xp.empty((NUM_TOKENS, HIDDEN), ml_dtypes.bfloat16)
layer(x, logits, out=out)
assert to_host(out).tobytes() == to_host(y).tobytes()

if xp is not np:
    # A planned call can be captured: it allocates nothing and waits for nothing.
    stream = xp.cuda.Stream(non_blocking=True)
    xp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        layer(x, logits, out=out)
        graph = stream.end_capture()
        out.fill(0)
        graph.launch(stream)
        stream.synchronize()
    assert to_host(out).tobytes() == to_host(y).tobytes()

# The same in float32, token by token, without quantisation: fp8 keeps three bits after the point.
ids, topk_weights = (to_host(a) for a in cumoe.route(logits, routing))
g, u, d, wide = (to_host(a).astype(np.float32) for a in (gate, up, down, x))
exact = np.zeros((NUM_TOKENS, HIDDEN), np.float32)
for t in range(NUM_TOKENS):
    for expert, weight in zip(ids[t], topk_weights[t], strict=True):
        h = g[expert] @ wide[t]
        h = h / (1 + np.exp(-h)) * (u[expert] @ wide[t])
        exact[t] += weight * (d[expert] @ h)
error = np.sqrt(np.mean((to_host(y).astype(np.float32) - exact) ** 2) / np.mean(exact**2))
print(f"{xp.__name__}: {NUM_TOKENS} tokens, error of the fp8 layer {error:.1%} RMS")
assert error < 0.08
