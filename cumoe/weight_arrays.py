"""The arrays of expert weights, checked: payloads that kernels can load, and their scales.

A part of :class:`cumoe.ExpertWeights`: what comes in as any library's array, or as a number where
there is one scale, goes out native and of one shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cumoe.arrays import as_native, check_shape, empty
from cumoe.checkpoint import (
    MAX_LOCAL_EXPERTS,
    SCALE_BLOCK,
    check_sizes,
    num_blocks,
    scale_blocks,
)
from cumoe.config import Array, check_finite, check_int
from cumoe.layouts import block_elems, check_weight, on_device_of, rearrange, slice_k

if TYPE_CHECKING:
    from cumoe.weights import ExpertWeights


def native_payloads(weights: ExpertWeights, dtype: str) -> dict[str, Array]:
    """Return w13 and w2 as native arrays once their shapes agree and kernels can read them."""
    blocked = weights.layout == "block_major_k"
    payloads = {}
    for name in ("w13", "w2"):
        x = as_native(getattr(weights, name), name, (dtype,), ndim=4 if blocked else 3)
        payloads[name] = check_weight(x, name)
    w13 = payloads["w13"]
    num_experts, num_rows = int(w13.shape[0]), int(w13.shape[-2])
    hidden_size = int(w13.shape[1] * w13.shape[3] if blocked else w13.shape[2])
    sides = 2 if weights.gated else 1
    if num_rows % sides:
        raise ValueError(f"w13: expected an even number of gate and up rows, got {num_rows}")
    size, bk = num_rows // sides, block_elems(w13)
    check_sizes(hidden_size, size, dtype, weights.layout)
    check_int("num_local_experts", num_experts, 0, MAX_LOCAL_EXPERTS)
    w2_shape = (size // bk, hidden_size, bk) if blocked else (hidden_size, size)
    check_shape("w2", payloads["w2"], (num_experts, *w2_shape))
    return payloads


def native_scales(weights: ExpertWeights) -> dict[str, Array]:
    """Return the scales that the recipe has as native arrays of their shapes."""
    count, sides = weights.num_local_experts, 2 if weights.gated else 1
    if weights.recipe == "fp8_block":
        rows, columns = num_blocks(weights.intermediate_size), num_blocks(weights.hidden_size)
        grids = {"w13_scale": (sides * rows, columns), "w2_scale": (columns, rows)}
        return {
            name: as_native(getattr(weights, name), name, ("float32",), shape=(count, *grid))
            for name, grid in grids.items()
        }
    if weights.recipe != "fp8_tensor":
        return {}
    w13_scale = as_native(weights.w13_scale, "w13_scale", ("float32",))
    if w13_scale.ndim == 1:  # one for both halves
        check_shape("w13_scale", w13_scale, (count,))
        with on_device_of(w13_scale):
            w13_scale = w13_scale[:, None].repeat(sides, axis=1)
    check_shape("w13_scale", w13_scale, (count, sides))
    w2_scale = as_native(weights.w2_scale, "w2_scale", ("float32",), shape=(count,))
    return {
        "w13_scale": w13_scale,
        "w2_scale": w2_scale,
        "x_scale": static_scale("x_scale", weights.x_scale, 1, weights.w13),
        "act_scale": static_scale("act_scale", weights.act_scale, count, weights.w13),
    }


def static_scale(name: str, scale: Any, count: int, like: Array) -> Array:
    """Return a static scale, a number or an array of one or `count` elements, as `count`."""
    if not hasattr(scale, "shape") or isinstance(scale, np.floating):
        value = check_finite(name, scale)
        if value <= 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
        with on_device_of(like):
            array = empty(like, (count,), "float32")
            array.fill(value)
        return array
    array = as_native(scale, name, ("float32",))
    if array.size == 1 and (count != 1 or array.ndim == 0):
        with on_device_of(array):
            array = array.reshape(1).repeat(count)
    check_shape(name, array, (count,))
    return array


def scale_expert(
    weights: ExpertWeights, expert: int, order: str, gate: Array, up: Array, down: Array
) -> None:
    """Multiply one expert's float32 matrices by their scales, in place."""
    assert weights.w13_scale is not None and weights.w2_scale is not None
    sides = 2 if weights.gated else 1
    up_side = sides - 1 if order.startswith("gate") else 0
    parts = ((gate, sides - 1 - up_side), (up, up_side)) if weights.gated else ((up, 0),)
    scales = weights.w13_scale[expert]
    if weights.recipe == "fp8_block":
        halves = scales.reshape(sides, -1, scales.shape[1])
        for matrix, side in parts:
            scale_blocks(matrix, halves[side])
        scale_blocks(down, weights.w2_scale[expert])
        return
    with np.errstate(all="ignore"):
        for matrix, side in parts:
            matrix *= scales[side]
        down *= weights.w2_scale[expert]


def slice_scales(weights: ExpertWeights, start: int, stop: int) -> dict[str, Array]:
    """Return the scales of gate and up rows, and down columns, `start` to ``stop - 1``.

    A tensor's scale stays that of its parts.
    """
    if weights.recipe != "fp8_block":
        return {}
    sides = 2 if weights.gated else 1
    first, last = start // SCALE_BLOCK, num_blocks(stop)
    half = num_blocks(weights.intermediate_size)
    block_rows = np.add.outer(half * np.arange(sides), np.r_[first:last]).ravel()
    return {
        "w13_scale": rearrange(weights.w13_scale, rows=block_rows, name="w13_scale"),
        "w2_scale": slice_k(weights.w2_scale, first, last),
    }
