"""Quantised arrays of any format back to float32."""

from __future__ import annotations

import numpy as np

from cumoe import kernels
from cumoe.arrays import FP8, as_native, check_shape, empty, is_device, same_place
from cumoe.config import Array, Quantized, check_choice, check_int
from cumoe.microscaling import (
    FP4_GROUP,
    SCALE_LAYOUTS,
    QuantizedNVFP4,
    QuantizedUE8M0,
    fp4_scale_shape,
    fp4_tiles,
    ue8m0_words,
)
from cumoe.reference import quantize as reference
from cumoe.reference.microscaling import FP4_TABLE
from cumoe.validate import check_multiple, check_type


def dequantize(q: Quantized | QuantizedUE8M0 | QuantizedNVFP4) -> Array:
    """Return the real numbers in float32, on the side the arrays live.

    Parameters
    ----------
    q : Quantized, QuantizedUE8M0 or QuantizedNVFP4

    Returns
    -------
    array, float32, shape of the values, twice as wide for nvfp4
        ``values * scale``; for nvfp4 ``values * scale / global_scale``.

    Raises
    ------
    TypeError, ValueError
        If values and scale do not fit together.
    """
    if isinstance(q, QuantizedUE8M0):
        return _dequantize_ue8m0(q)
    if isinstance(q, QuantizedNVFP4):
        return _dequantize_nvfp4(q)
    check_type("q", q, Quantized, "a Quantized, QuantizedUE8M0 or QuantizedNVFP4")
    values = as_native(q.values, "q.values", (FP8,))
    rows, columns = values.shape[-2:]
    shape: tuple[int, ...] = (*values.shape[:-2], rows, kernels.blocks(columns))
    if q.block == (128, 128):
        shape = (*values.shape[:-2], kernels.blocks(rows), kernels.blocks(columns))
    elif q.block[1] is None:
        shape = (1,) if q.block[0] is None else (rows, 1)
    scale = as_native(q.scale, "q.scale", ("float32",), shape=shape, contiguous=False)
    same_place({"q.values": values, "q.scale": scale})
    if not is_device(values):
        return reference.dequantize(Quantized(values, scale, block=q.block))
    if q.block[1] is None:
        return _widen(values) * scale
    wide = scale.repeat(128, axis=-1)[..., :columns]
    if q.block == (128, 128):
        wide = wide.repeat(128, axis=-2)[..., :rows, :]
    return _widen(values) * wide


def _dequantize_ue8m0(q: QuantizedUE8M0) -> Array:
    values = as_native(q.values, "q.values", (FP8,), ndim=2)
    group_size = check_int("q.group_size", q.group_size, 1)
    num_rows, columns = values.shape
    if columns % group_size:
        raise ValueError(f"q.group_size: expected a divisor of {columns} columns, got {group_size}")
    num_words, _ = ue8m0_words(values.shape, group_size)
    words = as_native(q.scale, "q.scale", ("int32",), shape=(num_rows, num_words), contiguous=False)
    same_place({"q.values": values, "q.scale": words})
    # Row by row the bytes of the words are those of the groups.
    codes = words.copy(order="C").view(np.uint8)[:, : columns // group_size].astype(np.uint32)
    scale = (codes << np.uint32(23)).view(np.float32)
    scale[codes == 0], scale[codes == 255] = 2.0**-127, np.nan
    with np.errstate(all="ignore"):
        return _widen(values) * scale.repeat(group_size, axis=1)


def _dequantize_nvfp4(q: QuantizedNVFP4) -> Array:
    check_choice("q.layout", q.layout, SCALE_LAYOUTS)
    values = as_native(q.values, "q.values", ("uint8",), ndim=2)
    num_rows, columns = values.shape[0], 2 * values.shape[1]
    check_multiple("q.values", "hidden_size", columns, FP4_GROUP)
    scale = as_native(q.scale, "q.scale", (FP8,))
    check_shape("q.scale", scale, fp4_scale_shape((num_rows, columns), q.layout))
    total = as_native(q.global_scale, "q.global_scale", ("float32",), shape=(1,))
    same_place({"q.values": values, "q.scale": scale, "q.global_scale": total})
    if q.layout != "linear":
        scale = fp4_tiles(scale).reshape(scale.shape)[:num_rows, : columns // FP4_GROUP]
    table = _beside(values, FP4_TABLE)
    wide = empty(values, (num_rows, columns), "float32")
    wide[:, 0::2], wide[:, 1::2] = table[values & np.uint8(15)], table[values >> np.uint8(4)]
    with np.errstate(all="ignore"):
        return wide * _widen(scale).repeat(FP4_GROUP, axis=1) / total


def _beside(x: Array, table: np.ndarray) -> Array:
    """Return a host array on the side of `x`."""
    if not is_device(x):
        return table
    import cupy

    with cupy.cuda.Device(x.device.id):
        return cupy.asarray(table)


def _widen(values: Array) -> Array:
    """Return e4m3 values in float32."""
    if not is_device(values):
        return values.astype(np.float32)
    return _beside(values, e4m3_table())[values]


def e4m3_table() -> np.ndarray:
    """Return the 256 values of float8_e4m3fn as float32."""
    import ml_dtypes

    return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
