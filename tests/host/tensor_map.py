"""Tensor maps for kernels on the CPU: ``cumoe.launch.encode_tiled`` without a driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cumoe.launch.tensor_map import _DTYPES, _aligned_words, _dtype_name, why_illegal

_MARK = 0x637564615F6D6170
_SWIZZLES = ("none", "32B", "64B", "128B")
_HOST_MAP = np.dtype(
    [
        ("mark", np.uint64),
        ("address", np.uint64),
        ("strides", np.uint64, 4),
        ("last", np.uint32, 5),
        ("box", np.uint16, 5),
        ("rank", np.uint8),
        ("itemsize", np.uint8),
        ("swizzle", np.uint8),
        ("fill_nan", np.uint8),
    ],
    align=True,
)
"""``HostMap`` of ``hopper.cpp``."""


def encode_tiled(
    address: int,
    dtype: Any,
    shape: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    *,
    swizzle: Any = "none",
    l2_promotion: Any = "256B",
    oob_fill: Any = "zeros",
    element_strides: Sequence[int] | None = None,
) -> np.ndarray:
    """Return 16 words that the models of ``tests/host`` understand.

    Raises
    ------
    ValueError
        If the driver would refuse, or a step other than 1 is asked for, which has no model.
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
    if reason is None and set(element_strides or (1,)) != {1}:
        reason = f"element_strides: expected 1, got {element_strides}"
    if reason is not None:
        raise ValueError(reason)
    rank = len(shape)
    made = np.zeros((), _HOST_MAP)
    made["mark"], made["address"], made["rank"] = _MARK, address, rank
    made["itemsize"] = _DTYPES[_dtype_name(dtype)][1]
    made["swizzle"], made["fill_nan"] = _SWIZZLES.index(swizzle), oob_fill == "nan"
    made["strides"][: rank - 1] = strides_bytes[:-1][::-1]
    made["last"][:rank] = [size - 1 for size in reversed(shape)]
    made["box"][:rank] = box[::-1]
    words = _aligned_words()
    words.view(np.uint8)[: _HOST_MAP.itemsize] = np.frombuffer(made.tobytes(), np.uint8)
    return words
