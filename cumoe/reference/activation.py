"""NumPy twin of the activations, alone and with requantisation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cumoe.arrays import DTYPES
from cumoe.config import Activation, Array, Permutation, Quantized
from cumoe.formulas import PARAMETERS
from cumoe.reference.quantize import quantize_fp8_block

F32 = np.float32
_erfc = np.frompyfunc(math.erfc, 1, 1)


def _sigmoid(x: Array) -> Array:
    return F32(1) / (F32(1) + np.exp(-x))


def _limited(gate: Array, up: Array, limit: Any) -> tuple[Array, Array]:
    # A NaN stays a NaN.
    return np.minimum(gate, limit), np.clip(up, -limit, limit)


def _swiglu(gate: Array, up: Array, alpha: Any, beta: Any, limit: Any) -> Array:
    g, u = _limited(gate, up, limit)
    return g / (F32(1) + np.exp(-alpha * g)) * (u + beta)


def _situ(gate: Array, up: Array, alpha: Any, beta: Any, limit: Any) -> Array:
    g, u = _limited(gate, up, limit)
    return beta * np.tanh(u / beta) * (alpha * np.tanh(g / alpha) * _sigmoid(g))


def _geglu(gate: Array, up: Array) -> Array:
    """``x * Phi(x)``; erfc is that of the C library, in float64 and rounded once."""
    phi = 0.5 * np.asarray(_erfc(gate.astype(np.float64) * -math.sqrt(0.5)), np.float64)
    return gate * phi.astype(F32) * up


def _geglu_tanh(gate: Array, up: Array) -> Array:
    """``0.5 * (1 + tanh(z)) = 1 / (1 + exp(-2 z))``, which keeps its precision for negative z."""
    z = F32(math.sqrt(8 / math.pi)) * (gate + F32(0.044715) * gate * gate * gate)
    return gate * _sigmoid(z) * up


def _relu2(x: Array) -> Array:
    return np.square(np.maximum(x, F32(0)))


TWINS: dict[str, Callable[..., Array]] = {
    "swiglu": _swiglu,
    "geglu": _geglu,
    "geglu_tanh": _geglu_tanh,
    "situ": _situ,
    "relu2": _relu2,
    "silu": lambda x: x * _sigmoid(x),
    "identity": lambda x: x,
}
"""The built-in activations; each takes the values and parameters that its arguments name."""


def apply(
    gate: Array | None, up: Array, activation: Activation, expert: int | None = None
) -> Array:
    """Return the activation of float32 values, in float32.

    `gate` is None without a gate. `expert` picks the value of per-expert parameters; None means
    that they are single values.

    Raises
    ------
    ValueError, TypeError
        If the twin of a user's activation returns something else than values like its arguments.
    """
    twin = activation.definition.numpy or TWINS[activation.name]
    values = {"gate": gate, "up": up, "x": up}
    for name in PARAMETERS:
        values[name] = _parameter(activation.value(name), expert)
    arguments = {name: values[name] for name in inspect.signature(twin).parameters}
    with np.errstate(all="ignore"):
        result = np.asarray(twin(**arguments))
    if result.shape != up.shape:
        raise ValueError(
            f"activation.numpy: expected the shape of its arguments, {up.shape}, from the twin of "
            f"{activation.name!r}, got {result.shape}"
        )
    if result.dtype.kind != "f":
        raise TypeError(
            f"activation.numpy: expected floating point values from the twin of "
            f"{activation.name!r}, got {result.dtype.name}"
        )
    return result.astype(F32, copy=False)


def _parameter(value: Any, expert: int | None) -> Any:
    if not hasattr(value, "shape"):
        return F32(value)
    return F32(value[0 if expert is None else expert])


def split_gate_up(x: Array, gate_up_order: str | None) -> tuple[Array | None, Array]:
    """Return the gate and the up part of the last axis (views); no gate without an order."""
    if gate_up_order is None:
        return None, x
    if gate_up_order.endswith("interleaved"):
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
    return (first, second) if gate_up_order.startswith("gate") else (second, first)


def activate(
    x: Array,
    x_scale: Array | None,
    *,
    gate_up_order: str | None,
    activation: Activation,
    permutation: Permutation | None,
    out_dtype: str,
) -> Array | Quantized:
    """Twin of :func:`cumoe.activate`; rows that are padding come back as zeros."""
    num_rows, width = x.shape
    sides = 1 if gate_up_order is None else 2
    size = width // sides
    wide = x.astype(np.float32)
    if x_scale is not None:
        blocks = -(-size // 128)
        for side in range(sides):
            scale = np.repeat(x_scale[:, side * blocks : (side + 1) * blocks], 128, axis=1)
            with np.errstate(over="ignore", invalid="ignore"):
                wide[:, side * size : (side + 1) * size] *= scale[:, :size]
    gate, up = split_gate_up(wide, gate_up_order)
    if permutation is None:
        y = apply(gate, up, activation)
    else:
        y = np.zeros((num_rows, size), np.float32)
        offsets = permutation.expert_offsets
        for expert, count in enumerate(permutation.tokens_per_expert):
            rows = slice(offsets[expert], offsets[expert] + count)
            y[rows] = apply(None if gate is None else gate[rows], up[rows], activation, expert)
    if out_dtype == "float8_e4m3fn":
        return quantize_fp8_block(y)
    with np.errstate(over="ignore"):
        return y.astype(DTYPES[out_dtype])
