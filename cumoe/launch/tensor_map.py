"""Tensor maps: the 128-byte descriptors by which the copy engine (TMA) reads and writes tiles.

Owns the legality rules, as a pure function, and the encoding. A map is 16 words that go into a
kernel's parameter struct by value. Arguments follow NumPy: outermost dimension first, strides in
bytes. Fp8 payloads are uint8. Encode once and keep: a map holds an address, so it lives as long as
the array.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .errors import LaunchError, check, require

__all__ = ["TENSOR_MAP", "encode_tiled", "why_illegal"]

Swizzle = Literal["none", "32B", "64B", "128B"]
L2Promotion = Literal["none", "64B", "128B", "256B"]
OobFill = Literal["zeros", "nan"]

TENSOR_MAP = np.dtype((np.uint64, (16,)))
"""Dtype of a tensor map as a field of a parameter struct (see :func:`.params_dtype`)."""

_ALIGNMENT = 64
_MAX_RANK = 5
_MAX_BOX = 256
_MAX_SIZE = 2**32
_MAX_STRIDE_BYTES = 2**40
_MAX_ELEMENT_STRIDE = 8
# name -> (CUtensorMapDataType, bytes, may be filled with NaN)
_DTYPES = {
    "uint8": ("UINT8", 1, False),
    "float8_e4m3fn": ("UINT8", 1, False),
    "float8_e5m2": ("UINT8", 1, False),
    "float8_e8m0fnu": ("UINT8", 1, False),
    "uint16": ("UINT16", 2, False),
    "uint32": ("UINT32", 4, False),
    "int32": ("INT32", 4, False),
    "uint64": ("UINT64", 8, False),
    "int64": ("INT64", 8, False),
    "float16": ("FLOAT16", 2, True),
    "bfloat16": ("BFLOAT16", 2, True),
    "float32": ("FLOAT32", 4, True),
    "float64": ("FLOAT64", 8, True),
}
_SWIZZLE_BYTES = {"none": None, "32B": 32, "64B": 64, "128B": 128}
_L2_PROMOTIONS = {"none": "NONE", "64B": "L2_64B", "128B": "L2_128B", "256B": "L2_256B"}
_OOB_FILLS = {"zeros": "NONE", "nan": "NAN_REQUEST_ZERO_FMA"}


def why_illegal(
    address: int,
    dtype: Any,
    shape: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    *,
    swizzle: Swizzle = "none",
    l2_promotion: L2Promotion = "256B",
    oob_fill: OobFill = "zeros",
    element_strides: Sequence[int] | None = None,
) -> str | None:
    """Say why a tensor map cannot be made, or return None if it can.

    Parameters
    ----------
    address, dtype, shape, strides_bytes, box, swizzle, l2_promotion, oob_fill, element_strides
        As :func:`encode_tiled`.

    Returns
    -------
    str or None
        Argument, what was expected, what was got.

    References
    ----------
    CUDA driver API, "Tensor Map Object Management", cuTensorMapEncodeTiled.
    """
    for name, value, table in (
        ("dtype", _dtype_name(dtype), _DTYPES),
        ("swizzle", swizzle, _SWIZZLE_BYTES),
        ("l2_promotion", l2_promotion, _L2_PROMOTIONS),
        ("oob_fill", oob_fill, _OOB_FILLS),
    ):
        if value not in table:
            return f"{name}: expected one of {', '.join(table)}, got {value!r}"
    _, itemsize, is_float = _DTYPES[_dtype_name(dtype)]
    rank = len(shape)
    steps = (1,) * rank if element_strides is None else tuple(element_strides)
    if not 1 <= rank <= _MAX_RANK:
        return f"shape: expected 1 to {_MAX_RANK} dimensions, got {rank}"
    for name, values in (
        ("strides_bytes", strides_bytes),
        ("box", box),
        ("element_strides", steps),
    ):
        if len(values) != rank:
            return f"{name}: expected {rank} values, one for each dimension, got {len(values)}"
    if address <= 0 or address % 16:
        return f"address: expected a multiple of 16, got {address:#x}"
    if any(not 1 <= size <= _MAX_SIZE for size in shape):
        return f"shape: expected sizes from 1 to 2**32, got {tuple(shape)}"
    if strides_bytes[-1] != itemsize:
        return (
            f"strides_bytes: expected the last dimension contiguous ({itemsize}), "
            f"got {tuple(strides_bytes)}"
        )
    if any(stride % 16 or not 0 < stride < _MAX_STRIDE_BYTES for stride in strides_bytes[:-1]):
        return (
            "strides_bytes: expected multiples of 16 above 0 and below 2**40 for all but the last "
            f"dimension, got {tuple(strides_bytes)}"
        )
    if any(not 1 <= size <= _MAX_BOX for size in box):
        return f"box: expected sizes from 1 to {_MAX_BOX}, got {tuple(box)}"
    row_bytes = box[-1] * itemsize
    if row_bytes % 16:
        return f"box: expected a multiple of 16 bytes along the last dimension, got {row_bytes}"
    span = _SWIZZLE_BYTES[swizzle]
    if span is not None and row_bytes > span:
        return f"box: expected at most {span} bytes along the last dimension, got {row_bytes}"
    if any(not 1 <= step <= _MAX_ELEMENT_STRIDE for step in steps):
        return f"element_strides: expected values from 1 to {_MAX_ELEMENT_STRIDE}, got {steps}"
    if steps[-1] != 1:
        return f"element_strides: expected 1 along the last dimension, got {steps}"
    if oob_fill == "nan" and not is_float:
        return f"oob_fill: expected 'zeros' for {_dtype_name(dtype)}, got 'nan'"
    return None


def encode_tiled(
    address: int,
    dtype: Any,
    shape: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    *,
    swizzle: Swizzle = "none",
    l2_promotion: L2Promotion = "256B",
    oob_fill: OobFill = "zeros",
    element_strides: Sequence[int] | None = None,
) -> np.ndarray:
    """Encode the tensor map of a strided array in global memory.

    Parameters
    ----------
    address : int
        Device address of element 0; a multiple of 16.
    dtype : dtype-like or str
        By ml_dtypes name; fp8 counts as uint8.
    shape, strides_bytes : sequence of int
        As ``array.shape`` and ``array.strides``; 1 to 5 dimensions, the last one contiguous.
    box : sequence of int
        Elements one copy moves in each dimension, outermost first; 1 to 256 each.
    swizzle : {"none", "32B", "64B", "128B"}
        Shared memory pattern; the box's last dimension is at most that many bytes.
    l2_promotion : {"none", "64B", "128B", "256B"}
        Granularity at which L2 is filled.
    oob_fill : {"zeros", "nan"}
        What elements outside of the array read as; NaN for floating point only.
    element_strides : sequence of int, optional
        Step in each dimension, 1 to 8, the last one 1. Default: all 1.

    Returns
    -------
    numpy.ndarray, uint64, shape (16,)
        The map, aligned to 64 bytes; assign it to a field of dtype :data:`TENSOR_MAP`.

    Raises
    ------
    ValueError
        If :func:`why_illegal` objects.
    LaunchError
        If there is no driver, or it refuses.
    """
    reason = why_illegal(
        address,
        dtype,
        shape,
        strides_bytes,
        box,
        swizzle=swizzle,
        l2_promotion=l2_promotion,
        oob_fill=oob_fill,
        element_strides=element_strides,
    )
    if reason is not None:
        raise ValueError(reason)
    driver = require("cuda.bindings.driver")
    rank = len(shape)
    words = _aligned_words()
    status = _encoder()(
        words.ctypes.data,
        getattr(
            driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_DTYPES[_dtype_name(dtype)][0]}"
        ),
        rank,
        address,
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * rank)(*reversed(strides_bytes[:-1])),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*reversed(element_strides or (1,) * rank)),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle.upper()}"),
        getattr(
            driver.CUtensorMapL2promotion,
            f"CU_TENSOR_MAP_L2_PROMOTION_{_L2_PROMOTIONS[l2_promotion]}",
        ),
        getattr(
            driver.CUtensorMapFloatOOBfill, f"CU_TENSOR_MAP_FLOAT_OOB_FILL_{_OOB_FILLS[oob_fill]}"
        ),
    )
    check((driver.CUresult(status),), "cuTensorMapEncodeTiled")
    return words


@functools.cache
def _encoder() -> Any:
    """Return the driver's cuTensorMapEncodeTiled.

    NOTE: taken from libcuda itself, because it must write to 64-byte aligned memory and the
    descriptor objects of cuda.bindings (12.9, 13.3) lie at 16-byte aligned addresses.
    """
    try:
        function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise LaunchError(
            f"tensor maps need an NVIDIA driver of CUDA 12 or later ({error})"
        ) from error
    pointer, enum = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, enum, ctypes.c_uint32, *[pointer] * 5, *[enum] * 4]
    function.restype = ctypes.c_int
    return function


def _aligned_words() -> np.ndarray:
    """Return 16 zeroed words at an address that is a multiple of 64."""
    buffer = np.zeros(16 + _ALIGNMENT // 8, np.uint64)
    start = -buffer.ctypes.data % _ALIGNMENT // 8
    return buffer[start : start + 16]


def _dtype_name(dtype: Any) -> str:
    """Name a dtype; a string is taken as the name."""
    return dtype if isinstance(dtype, str) else np.dtype(dtype).name
