"""NumPy twin of the gated activation, alone and with requantisation."""

from __future__ import annotations

from typing import Any

import numpy as np

from cumoe.arrays import DTYPES
from cumoe.config import Activation, Array, Permutation, Quantized
from cumoe.reference.quantize import quantize_fp8_block


def apply(gate: Array, up: Array, activation: Activation, expert: int | None = None) -> Array:
    """Return ``g / (1 + exp(-alpha * g)) * (u + beta)`` in float32.

    `expert` picks the value of per-expert parameters; None means that the parameters broadcast over
    rows.
    """
    alpha, beta, limit = (
        _parameter(value, default, expert)
        for value, default in (
            (activation.alpha, 1.0),
            (activation.beta, 0.0),
            (activation.limit, np.inf),
        )
    )
    # Comparisons, not minimum: a NaN must stay a NaN, and does either way here.
    g = np.minimum(gate, limit)
    u = np.clip(up, -limit, limit)
    with np.errstate(over="ignore", invalid="ignore"):
        return g / (np.float32(1) + np.exp(-alpha * g)) * (u + beta)


def _parameter(value: Any, default: float, expert: int | None) -> Any:
    if value is None:
        return np.float32(default)
    if not hasattr(value, "shape"):
        return np.float32(value)
    return np.float32(value[0 if expert is None else expert])


def split_gate_up(x: Array, gate_up_order: str) -> tuple[Array, Array]:
    """Return the gate and the up part of the last axis (views)."""
    if gate_up_order.endswith("interleaved"):
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
    return (first, second) if gate_up_order.startswith("gate") else (second, first)


def swiglu(
    x: Array,
    x_scale: Array | None,
    *,
    gate_up_order: str,
    activation: Activation,
    permutation: Permutation | None,
    out_dtype: str,
) -> Array | Quantized:
    """Twin of :func:`cumoe.swiglu`; rows that are padding come back as zeros."""
    num_rows, width = x.shape
    half = width // 2
    wide = x.astype(np.float32)
    if x_scale is not None:
        blocks = -(-half // 128)
        for side in range(2):
            scale = np.repeat(x_scale[:, side * blocks : (side + 1) * blocks], 128, axis=1)
            wide[:, side * half : (side + 1) * half] *= scale[:, :half]
    gate, up = split_gate_up(wide, gate_up_order)
    if permutation is None:
        y = apply(gate, up, activation)
    else:
        y = np.zeros((num_rows, half), np.float32)
        offsets = permutation.expert_offsets
        for expert, count in enumerate(permutation.tokens_per_expert):
            rows = slice(offsets[expert], offsets[expert] + count)
            y[rows] = apply(gate[rows], up[rows], activation, expert)
    if out_dtype == "float8_e4m3fn":
        return quantize_fp8_block(y)
    return y.astype(DTYPES[out_dtype])
