"""Tensors of PyTorch and JAX in and out, and of anything else that speaks DLPack.

Needs   cumoe; PyTorch, JAX, both or neither. Runs on a GPU if CuPy can use one, else on the host.
Shows   inputs taken over without a copy, out= into a PyTorch tensor, results imported by DLPack.
"""

import contextlib
import importlib.util

import numpy as np

import cumoe

NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS = 12, 128, 64, 8

on_gpu = cumoe.launch.is_available()
rng = np.random.default_rng(0)
x = rng.standard_normal((NUM_TOKENS, HIDDEN), np.float32)
logits = rng.standard_normal((NUM_TOKENS, NUM_EXPERTS), np.float32)
gate, up = rng.standard_normal((2, NUM_EXPERTS, INTERMEDIATE, HIDDEN), np.float32) / 16
down = rng.standard_normal((NUM_EXPERTS, HIDDEN, INTERMEDIATE), np.float32) / 8
routing = cumoe.Routing("renormalize", num_experts=NUM_EXPERTS, top_k=2)


def run(name, convert, **outputs):
    """Run the layer on the arrays that `convert` makes, and return its result."""
    weights = cumoe.ExpertWeights.from_experts(
        *(convert(a) for a in (gate, up, down)), recipe="fp8_block"
    )
    y = cumoe.moe(convert(x), convert(logits), weights, routing=routing, **outputs)
    print(f"{name}: arrays of {type(convert(x)).__module__}, result {type(y).__module__}")
    return y


def from_torch():
    import torch

    # cumoe takes float32 tokens for fp8 weights. bfloat16 tensors work on a GPU; on the host NumPy
    # cannot see them.
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    out = torch.empty(NUM_TOKENS, HIDDEN, device=device)

    def convert(a):
        return torch.from_numpy(a).to(device)

    # Inputs are waited for. An out= has no such protocol, so cumoe works on PyTorch's own stream.
    stream = contextlib.nullcontext()
    if device == "cuda":
        import cupy

        stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream())
    with stream:
        y = run("PyTorch", convert, out=out)
    assert y is out
    return y.cpu().numpy()


def from_jax():
    import jax
    import jax.numpy as jnp

    y = run("JAX", jnp.asarray)
    # A result on the device goes back by DLPack, bfloat16 included; JAX arrays are never written.
    y = jax.dlpack.from_dlpack(y) if hasattr(y, "get") else jnp.asarray(y)
    assert y.dtype == jnp.bfloat16
    return np.asarray(y).astype(np.float32)


class AnyArray:
    """An array of a library that cumoe has never heard of."""

    def __init__(self, array):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def from_anything():
    if on_gpu:
        import cupy as xp
    else:
        xp = np
    y = run("DLPack", lambda a: AnyArray(xp.asarray(a)))
    return (y.get() if hasattr(y, "get") else y).astype(np.float32)


expected = cumoe.moe(
    x,
    logits,
    cumoe.ExpertWeights.from_experts(gate, up, down, recipe="fp8_block"),
    routing=routing,
).astype(np.float32)

results = [from_anything()]
for library, example in (("torch", from_torch), ("jax", from_jax)):
    if importlib.util.find_spec(library) is None:
        print(f"{library} is not installed: skipped")
    else:
        results.append(example())
for result in results:
    error = np.abs(result - expected).max() / np.sqrt(np.mean(expected**2))
    assert error < 0.05, error
