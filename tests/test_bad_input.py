"""Every wrong call of the table is refused by name, nothing is written, a right call succeeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cumoe
from cumoe import (
    Activation,
    ExpertParts,
    ExpertShard,
    ExpertWeights,
    MoELayer,
    PackedTopK,
    Permutation,
    Quantized,
    Routing,
    TopK,
)
from tests import bad_input_cases, bad_input_layer_cases, bad_input_quantize_cases
from tests.bad_input_cases import Case, E, H, I, K, S, T
from tests.helpers import DTYPES, FP8, Poisoned, to_backend, to_host

CASES = bad_input_cases.CASES + bad_input_layer_cases.CASES + bad_input_quantize_cases.CASES
ROUTING = Routing("deepseek_v3", num_experts=E, top_k=K, num_shared_experts=S)


class Arrays:
    """Makes the arguments of one backend and keeps the poisoned outputs among them."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.outputs: list[Poisoned] = []
        self.arguments: dict[str, Any] = {}

    def __call__(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        return to_backend(np.zeros(shape, DTYPES.get(dtype, dtype)), self.backend)

    def random(self, *shape: int, dtype: str = "float32") -> Any:
        """Return random numbers, always the same."""
        x = np.random.default_rng(5).standard_normal(shape)
        return to_backend(x.astype(DTYPES[dtype]), self.backend)

    def out(self, *shape: int, dtype: str = "bfloat16") -> Any:
        """Return a poisoned output."""
        self.outputs.append(Poisoned(shape, dtype, self.backend))
        return self.outputs[-1].array

    def elsewhere(self, x: Any) -> Any:
        """Return a copy in the other place, host or device."""
        return to_backend(x, "cupy") if self.backend == "numpy" else to_host(x)

    def within(self, path: str, x: Any) -> Any:
        """Return an array like `x` in the memory of an argument."""
        name, _, field = path.partition(".")
        source = self.arguments[name]
        memory = (getattr(source, field) if field else source).reshape(-1).view(np.uint8)
        return memory[: x.nbytes].view(x.dtype).reshape(x.shape)

    def ids(self) -> Any:
        """Return valid expert ids."""
        rows = (np.arange(T)[:, None] + np.arange(K) * 3) % E
        return to_backend(rows.astype(np.int32), self.backend)

    def topk(self) -> TopK:
        """Return valid given routing."""
        return TopK(self.ids(), self.random(T, K))

    def permutation(self, tile: int = 16) -> Permutation:
        """Return a permutation."""
        return cumoe.group(self.ids(), num_experts=E, tile=tile)

    def quantized(self) -> Quantized:
        """Return quantised activations."""
        return cumoe.quantize_fp8_block(self.random(T, H, dtype="bfloat16"))

    def quantized_weight(self) -> Quantized:
        """Return a quantised matrix of gate and up rows for every expert."""
        return cumoe.quantize_fp8_block_weights(self.random(E, 2 * I, H, dtype="bfloat16"))

    def quantized_in_one(self, num_rows: int, columns: int) -> Quantized:
        """Return values and scale in the same memory."""
        values = self((num_rows, columns), "uint8")
        return Quantized(values, values.reshape(-1)[: 4 * num_rows].view(np.float32)[:, None])

    def weights(self, recipe: Any = "fp8_block", experts: int = E + S) -> ExpertWeights:
        """Return expert weights."""
        matrices = np.random.default_rng(6).standard_normal((experts, I, H), np.float32)
        weights = ExpertWeights.from_experts(
            matrices, matrices, matrices.transpose(0, 2, 1).copy(), recipe=recipe
        )
        return to_backend(weights, self.backend)

    def activation(self, count: int, dtype: str = "float32", *, place: str = "here") -> Activation:
        """Return an activation with a parameter for each expert."""
        alpha = self((count,), dtype)
        return Activation(alpha=alpha if place == "here" else self.elsewhere(alpha))


def weight_arrays(new: Arrays) -> dict[str, Any]:
    weights = new.weights()
    arrays = {name: getattr(weights, name) for name in ("w13", "w2", "w13_scale", "w2_scale")}
    return arrays | {"gate_up_order": "gate_up"}


def layer_call(layer: MoELayer, x: Any, logits: Any, **options: Any) -> Any:
    return layer(x, logits, **options)


CALLS: dict[str, tuple[Callable[..., Any], Callable[[Arrays], dict[str, Any]]]] = {
    "Routing": (
        Routing,
        lambda new: {
            "method": "deepseek_v3",
            "num_experts": 8,
            "top_k": 2,
            "num_groups": 4,
            "top_groups": 2,
        },
    ),
    "ExpertShard": (ExpertShard, lambda new: {"expert_offset": 2, "num_local_experts": 3}),
    "from_counts": (ExpertShard.from_counts, lambda new: {"counts": [3, 2], "rank": 1}),
    "Activation": (Activation, lambda new: {}),
    "Quantized": (Quantized, lambda new: {"values": new((4, H), "uint8"), "scale": new((4, 2))}),
    "ExpertWeights": (ExpertWeights, weight_arrays),
    "route": (
        cumoe.route,
        lambda new: {
            "logits": new.random(T, E),
            "routing": ROUTING,
            "bias": new.random(E),
            "out": TopK(new.out(T, K + S, dtype="i4"), new.out(T, K + S, dtype="float32")),
            "replay_out": new.out(T, K, dtype="i2"),
        },
    ),
    "pack": (cumoe.pack, lambda new: {"topk": new.topk()}),
    "unpack": (cumoe.unpack, lambda new: {"packed": PackedTopK(new.ids())}),
    "group": (cumoe.group, lambda new: {"topk": new.ids(), "num_experts": E, "tile": 16}),
    "quantize": (
        cumoe.quantize_fp8_block,
        lambda new: {
            "x": new.random(T, H, dtype="bfloat16"),
            "out": Quantized(new.out(T, H, dtype=FP8.name), new.out(T, 2, dtype="float32")),
        },
    ),
    "quantize_weights": (
        cumoe.quantize_fp8_block_weights,
        lambda new: {
            "w": new.random(2, I, H, dtype="bfloat16"),
            "out": Quantized(
                new.out(2, I, H, dtype=FP8.name),
                new.out(2, 1, 2, dtype="float32"),
                block=(128, 128),
            ),
        },
    ),
    "dequantize": (cumoe.dequantize, lambda new: {"q": new.quantized()}),
    "activate": (
        cumoe.activate,
        lambda new: {
            "x": new.random(T, 2 * I, dtype="bfloat16"),
            "gate_up_order": "gate_up",
            "out": new.out(T, I),
        },
    ),
    "grouped_gemm": (
        cumoe.grouped_gemm,
        lambda new: {
            "x": new.random(T, H, dtype="bfloat16"),
            "weight": new.random(E, 2 * I, H, dtype="bfloat16"),
            "permutation": new.permutation(),
            "gate_up_order": "gate_up",
            "out": new.out(new.permutation().max_rows, I),
        },
    ),
    "finalize": (
        cumoe.finalize,
        lambda new: {
            "rows": new.random(40, H, dtype="bfloat16"),
            "topk_weights": new.random(T, K),
            "permuted_idx": new.ids(),
            "out": new.out(T, H),
        },
    ),
    "finalize_parts": (
        cumoe.finalize_parts,
        lambda new: {
            "parts": ExpertParts(new.random(40, H, dtype="bfloat16"), new.random(T, K), new.ids()),
            "out": new.out(T, H),
        },
    ),
    "moe": (
        cumoe.moe,
        lambda new: {
            "x": new.random(T, H, dtype="bfloat16"),
            "logits": new.random(T, E),
            "weights": new.weights(),
            "routing": ROUTING,
            "bias": new.random(E),
            "out": new.out(T, H),
            "replay_out": new.out(T, K, dtype="i2"),
        },
    ),
    "routed_moe": (
        cumoe.routed_moe,
        lambda new: {
            "x": new.random(T, H, dtype="bfloat16"),
            "topk": new.topk(),
            "weights": new.weights(),
            "num_shared_experts": S,
            "out": new.out(T, H),
        },
    ),
    "MoELayer": (
        MoELayer,
        lambda new: {
            "weights": new.weights(),
            "routing": ROUTING,
            "max_num_tokens": T,
            "bias": new.random(E),
        },
    ),
    "layer call": (
        layer_call,
        lambda new: {
            "layer": MoELayer(new.weights(), ROUTING, max_num_tokens=T),
            "x": new.random(T, H, dtype="bfloat16"),
            "logits": new.random(T, E),
            "out": new.out(T, H),
        },
    ),
    **bad_input_quantize_cases.CALLS,
}


def wrong_arguments(right: dict[str, Any], changes: dict[str, Any], new: Arrays) -> dict[str, Any]:
    """Return the arguments with the changes of a case made."""
    wrong = dict(right)
    for path, value in changes.items():
        name, _, field = path.partition("__")
        old = wrong.get(name)
        if callable(value):
            value = value(getattr(old, field) if field else old, new)
        if not field:
            wrong[name] = value
        elif dataclasses.is_dataclass(old) and not isinstance(old, type):
            wrong[name] = dataclasses.replace(old, **{field: value})
        else:
            assert old is not None
            wrong[name] = old._replace(**{field: value})
    return wrong


def runs() -> list[Any]:
    """Return a parameter set for each case and backend."""
    sets = []
    for case in CASES:
        for backend in ("numpy", "cupy"):
            if backend in case.where.split():
                needs_gpu = backend == "cupy" or "two" in case.where
                marks = [pytest.mark.gpu] if needs_gpu else []
                sets.append(pytest.param(case, backend, id=f"{case.name}-{backend}", marks=marks))
    return sets


@pytest.mark.parametrize(("case", "backend"), runs())
def test_refused(case: Case, backend: str) -> None:
    function, right_arguments = CALLS[case.call]
    new = Arrays(backend)
    new.arguments = right_arguments(new)
    wrong = wrong_arguments(new.arguments, case.changes, new)
    with pytest.raises(case.error, match=f"^{case.message}") as caught:
        function(**wrong)
    assert type(caught.value) is case.error and caught.value.__cause__ is None
    for output in new.outputs:
        output.check_untouched()
    new = Arrays(backend)
    function(**right_arguments(new))
    for output in new.outputs:
        output.check_guards()


def test_table() -> None:
    """The table is as large as it is meant to be, and every message says what was expected."""
    assert sum("numpy" in case.where and "two" not in case.where for case in CASES) >= 200
    assert {case.call for case in CASES} == set(CALLS)
    for case in CASES:
        assert any(word in case.message for word in ("expected", "need", "runs", "differs")), case
