"""Arrays of other libraries on the host: a library with DLPack alone, PyTorch, JAX.

Device arrays of PyTorch and JAX are in ``test_gpu_interop.py``.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cumoe
from cumoe import Quantized, Routing, TopK
from cumoe.arrays import is_device
from tests.brute_force import random_layer
from tests.helpers import BF16, FP8, assert_same_bits
from tests.weight_matrices import Foreign

ROUTING = Routing("renormalize", num_experts=6, top_k=2, num_shared_experts=1)


class NoDtype(Foreign):
    """A library whose arrays NumPy cannot view."""

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("no such dtype")


class Gpu(Foreign):
    """An array that says it lives on another kind of device."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 10, 0  # kDLROCM


def test_dlpack_alone(rng):
    """Logits, ids and weights come in without a copy; the result is a NumPy array."""
    layer = random_layer(rng, ROUTING, "fp8_block", x_dtype=np.dtype(np.float32))
    expected = cumoe.moe(layer.x, layer.logits, layer.weights, routing=ROUTING)
    got = cumoe.moe(Foreign(layer.x), Foreign(layer.logits), layer.weights, routing=ROUTING)
    assert isinstance(got, np.ndarray)
    assert_same_bits(got, expected)
    ids, weights = cumoe.route(Foreign(layer.logits), ROUTING)
    topk = TopK(Foreign(ids[:, :2].copy()), Foreign(weights[:, :2].copy()))
    got = cumoe.routed_moe(Foreign(layer.x), topk, layer.weights, num_shared_experts=1)
    assert_same_bits(got, expected)


def test_fp8_payload_as_bytes(rng):
    """A uint8 payload of another library is fp8, in activations and in weights."""
    layer = random_layer(rng, ROUTING, "fp8_block")
    weights = layer.weights
    given = cumoe.ExpertWeights(
        *(Foreign(w.view(np.uint8)) for w in (weights.w13, weights.w2)),
        *(Foreign(scale) for scale in (weights.w13_scale, weights.w2_scale)),
        gate_up_order="gate_up",
    )
    q = cumoe.quantize_fp8_block(layer.x)
    x = Quantized(Foreign(q.values.view(np.uint8)), Foreign(q.scale))
    got = cumoe.moe(x, layer.logits, given, routing=ROUTING)
    assert_same_bits(got, cumoe.moe(layer.x, layer.logits, weights, routing=ROUTING))


def test_results_leave_by_dlpack(rng):
    """float32 results are importable; bfloat16 has no DLPack export in NumPy and goes as bits."""
    layer = random_layer(rng, ROUTING, "bf16")
    out = np.empty(layer.x.shape, np.float32)
    got = cumoe.moe(layer.x, layer.logits, layer.weights, routing=ROUTING, out=out)
    assert np.shares_memory(np.from_dlpack(got), out)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            NoDtype(np.zeros((3, 6), np.float32)),
            "logits: expected a host array that NumPy can view, got dtype float32",
        ),
        (Gpu(np.zeros((3, 6), np.float32)), "logits: expected host or CUDA memory, got"),
        (object(), "logits: expected a NumPy or CuPy array .* got object"),
    ],
    ids=["no view", "another device", "no array"],
)
def test_refused(x, message):
    with pytest.raises(TypeError, match=message):
        cumoe.route(x, Routing("default", num_experts=6, top_k=2))


class TestTorch:
    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    def test_inputs_and_out(self, rng, torch):
        layer = random_layer(rng, ROUTING, "fp8_block", x_dtype=np.dtype(np.float32))
        expected = cumoe.moe(layer.x, layer.logits, layer.weights, routing=ROUTING)
        x, logits = torch.from_numpy(layer.x), torch.from_numpy(layer.logits)
        got = cumoe.moe(x, logits, layer.weights, routing=ROUTING)
        assert isinstance(got, np.ndarray)
        assert_same_bits(got, expected)
        out = torch.full(x.shape, float("nan"))
        assert cumoe.moe(x, logits, layer.weights, routing=ROUTING, out=out) is out
        assert_same_bits(out.numpy().astype(BF16), expected)

    def test_bfloat16_goes_as_bits(self, torch):
        """NumPy cannot view torch's bfloat16; the message says what to pass instead."""
        x = torch.zeros((3, 8), dtype=torch.bfloat16)
        with pytest.raises(
            TypeError, match="x: expected a host array .*, got dtype bfloat16 of torch"
        ):
            cumoe.quantize_fp8_block(x)
        bits = x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        assert cumoe.quantize_fp8_block(bits).values.dtype == FP8

    def test_gradients_are_refused(self, torch):
        logits = torch.zeros((3, 6), requires_grad=True)
        with pytest.raises(ValueError, match="logits: expected a tensor without gradient, got"):
            cumoe.route(logits, Routing("default", num_experts=6, top_k=2))


class TestJax:
    @pytest.fixture
    def cpu(self):
        """Return a function that puts a NumPy array on JAX's CPU device."""
        jax = pytest.importorskip("jax")
        device = jax.devices("cpu")[0]
        return lambda x: jax.device_put(x, device)

    @pytest.mark.parametrize("recipe", ["bf16", "fp8_block"])
    def test_inputs(self, rng, cpu, recipe):
        layer = random_layer(rng, ROUTING, recipe)
        expected = cumoe.moe(layer.x, layer.logits, layer.weights, routing=ROUTING)
        got = cumoe.moe(cpu(layer.x), cpu(layer.logits), layer.weights, routing=ROUTING)
        assert_same_bits(got, expected)

    def test_fp8(self, rng, cpu):
        layer = random_layer(rng, ROUTING, "fp8_block")
        q = cumoe.quantize_fp8_block(layer.x)
        given = Quantized(cpu(q.values), cpu(q.scale))
        got = cumoe.moe(given, layer.logits, layer.weights, routing=ROUTING)
        expected = cumoe.moe(layer.x, layer.logits, layer.weights, routing=ROUTING)
        assert_same_bits(got, expected)

    def test_immutable_out_is_refused(self, rng, cpu):
        layer = random_layer(rng, ROUTING, "bf16")
        out = cpu(np.zeros(layer.x.shape, np.float32))
        with pytest.raises(ValueError, match="out: expected a writable array, got an immutable"):
            cumoe.moe(layer.x, layer.logits, layer.weights, routing=ROUTING, out=out)


def test_cupy_that_another_thread_is_importing(monkeypatch):
    """A module is listed before it has its names."""
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    assert not is_device(np.zeros(3))
