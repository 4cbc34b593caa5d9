"""Expert matrices for tests, what they read back as, and weights compared field by field.

The quantiser here searches among all e4m3 values; it shares no code with the package.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import ml_dtypes
import numpy as np

from cumoe.layouts import GATE_UP_ORDERS, WEIGHT_LAYOUTS
from cumoe.weights import ExpertWeights

BF16, FP8, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype("f4")
RECIPES = ["bf16", "fp8_block", "fp8_tensor"]
STATIC = {"x_scale": 0.25, "act_scale": 0.5}
"""Static scales of recipe fp8_tensor."""

FORMS = list(itertools.product(GATE_UP_ORDERS, WEIGHT_LAYOUTS))
Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw(
    rng: np.random.Generator, num_experts: int, size: int, hidden_size: int, dtype: np.dtype = F32
) -> Matrices:
    """Return gate, up and down whose magnitudes differ by block, expert and matrix."""
    shapes = [(size, hidden_size), (size, hidden_size), (hidden_size, size)]
    parts = []
    for i, (n, k) in enumerate(shapes):
        x = rng.standard_normal((num_experts, n, k), dtype=np.float32)
        x *= np.exp2(np.arange(n) // 128 % 7)[:, None] * np.exp2(-(np.arange(k) // 128 % 5))
        x *= (1 + i) * (1 + np.arange(num_experts))[:, None, None]
        parts.append(x.astype(dtype))
    return parts[0], parts[1], parts[2]


@functools.cache
def e4m3_values() -> np.ndarray:
    """Return the finite non-negative values of codes 0 to 0x7E, ascending, in float64."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (8 + mantissa) * np.exp2(exponent - 10.0)
    return np.where(exponent == 0, mantissa * 2.0**-9, normal)


def quantize_block(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Quantise one block by search among all values: codes and scale."""
    x = x.astype(np.float32)
    scale = np.maximum(np.abs(x).max() / np.float32(448), np.float32(1.17549435e-38))
    ratio = np.abs(x / scale).astype(np.float64)
    values = e4m3_values()
    above = np.clip(np.searchsorted(values, ratio), 1, 0x7E)
    middle = (values[above - 1] + values[above]) / 2
    even = np.where(above % 2 == 0, above, above - 1)
    code = np.where(ratio > middle, above, np.where(ratio < middle, above - 1, even))
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8), scale


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a matrix in blocks of 128 x 128: codes and scales."""
    n, k = x.shape
    codes = np.empty((n, k), np.uint8)
    scale = np.empty((-(-n // 128), -(-k // 128)), np.float32)
    for i, j in np.ndindex(scale.shape):
        block = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        codes[block], scale[i, j] = quantize_block(x[block])
    return codes, scale


def dequantize(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    wide = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[: len(codes), : codes.shape[1]]
    return codes.view(FP8).astype(np.float32) * wide


def expected(matrix: np.ndarray, recipe: str) -> np.ndarray:
    """Return what a matrix reads back as after `recipe`'s rounding."""
    if recipe == "bf16":
        return matrix.astype(np.float32).astype(BF16).astype(np.float32)
    if recipe == "fp8_tensor":
        codes, scale = quantize_block(matrix)
        return codes.view(FP8).astype(np.float32) * scale
    return dequantize(*quantize(matrix))


def build(
    rng: np.random.Generator,
    recipe: str = "bf16",
    num_experts: int = 2,
    size: int = 256,
    hidden_size: int = 384,
    order: Any = "gate_up",
    layout: Any = "major_k",
) -> tuple[ExpertWeights, Matrices]:
    matrices = draw(rng, num_experts, size, hidden_size)
    weights = ExpertWeights.from_experts(
        *matrices,
        recipe=recipe,  # type: ignore[arg-type]
        gate_up_order=order,
        layout=layout,
        **static_scales(recipe),
    )
    return weights, matrices


def static_scales(recipe: str) -> dict[str, Any]:
    """Return the arguments that a recipe needs beside the matrices."""
    return dict(STATIC) if recipe == "fp8_tensor" else {}


def assert_holds(weights: ExpertWeights, matrices: Matrices, experts: Any = None) -> None:
    """Check that every expert dequantises to its own matrices, bit for bit."""
    experts = range(len(matrices[0])) if experts is None else experts
    assert weights.num_local_experts == len(experts)
    for local, expert in enumerate(experts):
        for got, matrix in zip(weights.dequantize_expert(local), matrices, strict=True):
            assert got.dtype == np.float32 and got.flags.c_contiguous
            np.testing.assert_array_equal(got, expected(matrix[expert], str(weights.recipe)))


def assert_same(a: ExpertWeights, b: ExpertWeights) -> None:
    assert (a.gate_up_order, a.layout, a.recipe, a.dtype) == (
        b.gate_up_order,
        b.layout,
        b.recipe,
        b.dtype,
    )
    for name in ("w13", "w2", "w13_scale", "w2_scale", "x_scale", "act_scale"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), name


def plain_arrays(recipe: str, layout: str = "major_k") -> dict[str, Any]:
    """Return arguments that are accepted: 2 experts, hidden size 384, intermediate size 256."""
    dtype, bk = (BF16, 64) if recipe == "bf16" else (FP8, 128)
    arguments: dict[str, Any] = {
        "w13": np.zeros((2, 512, 384), dtype),
        "w2": np.zeros((2, 384, 256), dtype),
        "gate_up_order": "gate_up",
        "layout": layout,
    }
    if layout == "block_major_k":
        arguments["w13"] = np.zeros((2, 384 // bk, 512, bk), dtype)
        arguments["w2"] = np.zeros((2, 256 // bk, 384, bk), dtype)
    if recipe == "fp8_block":
        arguments["w13_scale"] = np.ones((2, 4, 3), np.float32)
        arguments["w2_scale"] = np.ones((2, 3, 2), np.float32)
    if recipe == "fp8_tensor":
        arguments["w13_scale"] = np.ones((2, 2), np.float32)
        arguments["w2_scale"] = np.ones(2, np.float32)
        arguments |= STATIC
    return arguments


class Foreign:
    """An array of some other library: DLPack and nothing else."""

    def __init__(self, x: np.ndarray) -> None:
        self._x = x
        self.shape, self.dtype = x.shape, x.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0
