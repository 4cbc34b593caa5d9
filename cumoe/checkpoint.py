"""From one matrix per expert, as checkpoints hold them, to the arrays of a layer's weights.

Owns the payload dtypes and sizes that kernels can read, the allocation of w13, w2 and their scales,
and their filling: each matrix is rounded or quantised on its own and put straight in its place, so
no second copy of the layer ever exists; and the way back to float32. ExpertWeights is built on top,
and unknown here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any, Literal, cast, get_args

import numpy as np

from cumoe.arrays import (
    DTYPES,
    FP8,
    address,
    as_native,
    check_shape,
    dtype_name,
    empty,
    is_device,
    same_place,
)
from cumoe.config import (
    MAX_NUM_EXPERTS,
    MAX_SHARED_EXPERTS,
    Array,
    Quantized,
    check_choice,
    check_int,
)
from cumoe.layouts import (
    BLOCK_BYTES,
    WEIGHT_LAYOUTS,
    GateUpOrder,
    half_slices,
    on_device_of,
    row_view,
    to_device,
    words,
)
from cumoe.reference import quantize as reference_quantize

WeightRecipe = Literal["bf16", "fp8_block", "fp8_tensor"]
"""``"bf16"``: bfloat16 weights. ``"fp8_block"``: float8_e4m3fn, a float32 scale per 128 x 128.
``"fp8_tensor"``: float8_e4m3fn, a float32 scale per matrix, and static scales of activations."""

W13Order = Literal[GateUpOrder, "up"]
"""How w13 holds gate and up, or ``"up"``: rows of up alone, for an activation without a gate."""

W13_ORDERS: tuple[str, ...] = get_args(W13Order)
WEIGHT_RECIPES: tuple[str, ...] = get_args(WeightRecipe)
PAYLOAD_DTYPES = {"bf16": "bfloat16", "fp8_block": FP8, "fp8_tensor": FP8}
SCALE_BLOCK = 128
ROW_ALIGNMENT_BYTES = 16
MAX_LOCAL_EXPERTS = MAX_NUM_EXPERTS + MAX_SHARED_EXPERTS

_FLOATS = ("bfloat16", "float16", "float32")


def num_blocks(size: int) -> int:
    """Return the blocks of 128 that cover `size`, the last one maybe partial."""
    return -(-size // SCALE_BLOCK)


def check_order(order: str | None, name: str = "gate_up_order") -> W13Order:
    """Return a known order of w13 or raise; a missing one is explained."""
    if order is None:
        raise ValueError(
            f"{name}: expected one of {list(W13_ORDERS)}, got None; the order of w13's rows "
            "decides which half passes through the activation, and no shape tells it"
        )
    return cast(W13Order, check_choice(name, order, W13_ORDERS))


def find_recipe(
    recipe: str | None, w13: Any, scales: dict[str, Any], static: dict[str, Any]
) -> str:
    """Return the stated recipe, or the one that the arrays imply, once the scales agree with it."""
    if recipe is None:
        fp8 = dtype_name(w13) in (FP8, "uint8")
        recipe = "fp8_block" if fp8 or any(s is not None for s in scales.values()) else "bf16"
        recipe = "fp8_tensor" if any(s is not None for s in static.values()) else recipe
    check_choice("recipe", recipe, WEIGHT_RECIPES)
    for name, scale in scales.items():
        if recipe != "bf16" and scale is None:
            kind = "block scales" if recipe == "fp8_block" else "scales"
            raise ValueError(f"{name}: expected float32 {kind} of an fp8 payload, got None")
        if recipe == "bf16" and scale is not None:
            raise ValueError(f"{name}: expected None with recipe 'bf16', got an array")
    check_static(recipe, static)
    return recipe


def check_static(recipe: str, static: dict[str, Any]) -> None:
    """Raise unless static scales of activations are there exactly where the recipe has them."""
    for name, scale in static.items():
        if recipe == "fp8_tensor" and scale is None:
            raise ValueError(
                f"{name}: expected a static scale with recipe 'fp8_tensor', got None; "
                "cumoe.calibrate finds it from sample tokens"
            )
        if recipe != "fp8_tensor" and scale is not None:
            raise ValueError(f"{name}: expected None with recipe {recipe!r}, got a scale")


def check_sizes(hidden_size: int, intermediate_size: int, dtype: str, layout: str) -> None:
    """Raise unless kernels can load rows of these sizes in this layout, saying what would work."""
    row_bytes = BLOCK_BYTES if layout == "block_major_k" else ROW_ALIGNMENT_BYTES
    granule = row_bytes // DTYPES[dtype].itemsize
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size < 1 or size % granule:
            padded = max(1, -(-size // granule)) * granule
            raise ValueError(
                f"{name}: expected a positive multiple of {granule} ({row_bytes} bytes of {dtype} "
                f"with layout {layout!r}), got {size}; zero padding to {padded} would work"
            )


def fill_from_experts(
    gate: Any,
    up: Any,
    down: Any,
    *,
    recipe: str,
    gate_up_order: W13Order,
    layout: str,
    num_experts: int | None = None,
) -> dict[str, Array]:
    """Return w13, w2 and, if quantised, their scales, filled matrix by matrix.

    `gate` is None with the order ``"up"``, which has none.

    The arguments, errors and rounding are those of :meth:`cumoe.ExpertWeights.from_experts`; the
    keys are its fields.
    """
    check_choice("recipe", recipe, WEIGHT_RECIPES)
    check_choice("layout", layout, WEIGHT_LAYOUTS)
    order = check_order(gate_up_order)
    given = {"gate": gate, "up": up, "down": down}
    if order == "up":
        if gate is not None:
            raise ValueError(
                f"gate: expected None with gate_up_order 'up', got {type(gate).__name__}"
            )
        del given["gate"]
    streams = [_Matrices(x, name) for name, x in given.items()]
    count = _agree_on_count(num_experts, streams)
    arrays: dict[str, Array] = {}
    for expert in range(count):
        for stream in streams:
            matrix = stream.take(expert, count)
            if not arrays:
                arrays = _allocate(matrix, count, recipe, layout, sides=len(streams) - 1)
            _store(arrays, stream.name, expert, matrix, order)
            # NOTE: an iterator that loads lazily must not find the previous matrix still alive.
            del matrix
    for stream in streams:
        stream.expect_end(count)
    return arrays


class _Matrices:
    """One matrix per expert, out of a stacked array or any iterable."""

    def __init__(self, x: Any, name: str) -> None:
        self.name = name
        if hasattr(x, "shape"):
            x = as_native(x, name, _FLOATS, ndim=3, contiguous=False)
        elif not isinstance(x, Iterable):
            raise TypeError(
                f"{name}: expected a stacked array or an iterable of matrices, got "
                f"{type(x).__name__}"
            )
        self.count = len(x) if isinstance(x, Sized) else None
        self._matrices = iter(x)

    def take(self, expert: int, count: int) -> Array:
        """Return the next expert's matrix as a native array."""
        try:
            matrix = next(self._matrices)
        except StopIteration:
            raise ValueError(f"{self.name}: expected {count} matrices, got {expert}") from None
        return as_native(matrix, f"{self.name}[{expert}]", _FLOATS, ndim=2, contiguous=False)

    def expect_end(self, count: int) -> None:
        """Raise if a matrix is left."""
        if next(self._matrices, None) is not None:
            raise ValueError(f"{self.name}: expected {count} matrices, got more")


def _agree_on_count(num_experts: int | None, streams: list[_Matrices]) -> int:
    """Return the one number of experts that everything with a length states."""
    counts = [("num_experts", num_experts), *((s.name, s.count) for s in streams)]
    known = [(name, count) for name, count in counts if count is not None]
    if not known:
        raise ValueError(
            f"num_experts: expected an int, since {', '.join(s.name for s in streams[:-1])} and "
            "down are iterators without a length, got None"
        )
    first, expected = known[0]
    for name, count in known:
        check_int(name, count, 1, MAX_LOCAL_EXPERTS)
        if count != expected:
            raise ValueError(f"{name}: expected {expected} experts like {first}, got {count}")
    return expected


def _allocate(first: Array, count: int, recipe: str, layout: str, sides: int) -> dict[str, Array]:
    """Allocate the arrays of the result, beside the first matrix and by its shape."""
    size, hidden_size = (int(n) for n in first.shape)
    dtype = PAYLOAD_DTYPES[recipe]
    check_sizes(hidden_size, size, dtype, layout)
    bk = BLOCK_BYTES // DTYPES[dtype].itemsize
    arrays = {}
    for name, m, k in (("w13", sides * size, hidden_size), ("w2", hidden_size, size)):
        shape = (count, m, k) if layout == "major_k" else (count, k // bk, m, bk)
        arrays[name] = empty(first, shape, dtype)
    if recipe == "fp8_block":
        rows, columns = num_blocks(size), num_blocks(hidden_size)
        arrays["w13_scale"] = empty(first, (count, sides * rows, columns), "float32")
        arrays["w2_scale"] = empty(first, (count, columns, rows), "float32")
    elif recipe == "fp8_tensor":
        arrays["w13_scale"] = empty(first, (count, sides), "float32")
        arrays["w2_scale"] = empty(first, (count,), "float32")
    return arrays


def _store(
    arrays: dict[str, Array], name: str, expert: int, matrix: Array, order: W13Order
) -> None:
    """Round or quantise one matrix and put it in its place."""
    w13, w2 = arrays["w13"], arrays["w2"]
    sides = 1 if order == "up" else 2
    size, hidden_size = int(w13.shape[-2]) // sides, int(w2.shape[-2])
    label = f"{name}[{expert}]"
    check_shape(label, matrix, (hidden_size, size) if name == "down" else (size, hidden_size))
    same_place({"up[0]" if order == "up" else "gate[0]": w13, label: matrix})
    if name == "down":
        target, rows, scale = w2, slice(None), arrays.get("w2_scale")
    else:
        gate_rows, up_rows = half_slices(order, size)
        target, rows = w13, gate_rows if name == "gate" else up_rows
        scale = arrays.get("w13_scale")
        if scale is not None:
            half = 0 if order.startswith(name) else 1
            if scale.ndim == 3:
                scale = scale.reshape(scale.shape[0], sides, -1, scale.shape[2])
            scale = scale[:, half]
    with on_device_of(matrix):
        if scale is None:
            payload = _round_bf16(matrix)
        else:
            quantized = _quantize(matrix, tensors=scale.ndim == 1)
            payload = quantized.values
            scale[expert] = quantized.scale[0]
        place = row_view(target, 1)[expert][rows]
        place[...] = words(payload).reshape(place.shape)


def _round_bf16(matrix: Array) -> Array:
    bfloat16 = DTYPES["bfloat16"]
    if matrix.dtype == bfloat16:
        return matrix
    with np.errstate(over="ignore"):
        return matrix.astype(np.float32, copy=False).astype(bfloat16)


def _quantize(matrix: Array, *, tensors: bool) -> Quantized:
    """Quantise one matrix with one scale, or with those of its blocks."""
    if not is_device(matrix):
        if tensors:
            return reference_quantize.quantize_fp8_tensor(matrix)
        return reference_quantize.quantize_fp8_block_weights(matrix[None])
    import cupy

    from cumoe import quantize

    matrix = cupy.ascontiguousarray(matrix)
    if address(matrix) % ROW_ALIGNMENT_BYTES:
        matrix = matrix.copy()
    if tensors:
        return quantize.quantize_fp8_tensor(matrix)
    return quantize.quantize_fp8_block_weights(matrix[None])


def widen(x: Array) -> Array:
    """Return one expert's bf16 or fp8 payload as float32 (m, k), exactly."""
    bits = words(x)
    if bits.ndim == 3:
        bits = bits.transpose(1, 0, 2).reshape(bits.shape[1], -1)
    if bits.dtype.itemsize == 2:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    table = np.arange(256, dtype=np.uint8).view(DTYPES[FP8]).astype(np.float32)
    return (to_device(table) if is_device(bits) else table)[bits]


def scale_blocks(matrix: Array, scale: Array) -> None:
    """Multiply each 128 x 128 block of a float32 matrix by its scale, in place."""
    with np.errstate(all="ignore"):
        for i in range(scale.shape[0]):
            strip = matrix[i * SCALE_BLOCK : (i + 1) * SCALE_BLOCK]
            strip *= scale[i].repeat(SCALE_BLOCK)[: matrix.shape[1]]
