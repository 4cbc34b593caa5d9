"""fp8 with UE8M0 groups and nvfp4: bit-exact models of their kernels.

Every operation is one float32 operation rounded to nearest even; conversions saturate. Knows where
scales lie through :mod:`cumoe.microscaling` alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cumoe.arrays import DTYPES, FP8
from cumoe.config import Array
from cumoe.microscaling import (
    FP4_GROUP,
    QuantizedNVFP4,
    QuantizedUE8M0,
    ScaleLayout,
    fp4_scale_shape,
    fp4_tiles,
    ue8m0_words,
)
from cumoe.reference.exact import FP8_MAX, to_e4m3
from cumoe.reference.quantize import MIN_SCALE, tensor_amax

F32 = np.float32
MIN_UE8M0_SCALE = F32(1e-10)
FP4_MAX = F32(2688.0)
"""The largest e2m1 number times the largest e4m3 number: 6 * 448."""

FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], F32)
FP4_TABLE = np.concatenate([FP4_VALUES, -FP4_VALUES])
"""The number of each e2m1 code."""


def quantize_fp8_ue8m0(x: Array, group_size: int) -> QuantizedUE8M0:
    """Quantise activations to float8_e4m3fn with a power of two per row and group of columns.

    ``y = max(max|x| / 448, 1e-10)``, ``scale`` the power of two at or above ``y``,
    ``values = e4m3(x / scale)``.

    Parameters
    ----------
    x : numpy.ndarray, bfloat16, float16 or float32, shape (num_tokens, hidden_size)
        ``hidden_size`` is a multiple of `group_size`.
    group_size : int

    Returns
    -------
    QuantizedUE8M0

    Notes
    -----
    NaN does not enter the maximum and becomes the byte 0x7F. The scale of a group with an infinity
    is the byte 255, which is NaN; its infinities become 0x7F and its other numbers zeros.
    """
    wide = np.asarray(x).astype(F32)
    num_rows, num_columns = wide.shape
    groups = num_columns // group_size
    blocks = wide.reshape(num_rows, groups, group_size)
    amax = np.fmax.reduce(np.abs(blocks), axis=2, initial=F32(0.0))
    with np.errstate(all="ignore"):
        y = np.maximum(amax / FP8_MAX, MIN_UE8M0_SCALE)
        exponent = (y.view(np.uint32) + np.uint32(0x7FFFFF)) >> np.uint32(23)
        scale = (exponent << np.uint32(23)).view(F32)
        values = to_e4m3((blocks / scale[:, :, None]).reshape(wide.shape))
    num_words, stride = ue8m0_words(wide.shape, group_size)
    codes = np.zeros((num_words, stride, 4), np.uint8)
    for group in range(groups):
        codes[group // 4, :num_rows, group % 4] = exponent[:, group]
    words = codes.view("<i4")[:, :num_rows, 0].T
    return QuantizedUE8M0(values, words, group_size)


def to_e2m1(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round float32 to the codes of e2m1: nearest, ties to even, saturating.

    Magnitudes above 5, infinity included, become 6 (code 7) and so does NaN; the sign of zero is
    kept. The bits are those of PTX ``cvt.rn.satfinite.e2m1x2.f32``.
    """
    a = np.abs(x)
    code = np.zeros(x.shape, np.uint8)
    # A tie goes to the even code: up from the thresholds that count themselves.
    for threshold, inclusive in zip(
        (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), (False, True) * 3 + (False,), strict=True
    ):
        code += (a >= F32(threshold)) if inclusive else (a > F32(threshold))
    code |= np.signbit(x).astype(np.uint8) << 3
    code[np.isnan(x)] = 7
    return np.asarray(code)


def nvfp4_global_scale(amax: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what maps the largest magnitude of a tensor to 6 * 448, within float32's range."""
    with np.errstate(all="ignore"):
        return np.asarray(np.clip(FP4_MAX / amax, MIN_SCALE, np.finfo(F32).max))


def quantize_nvfp4(
    x: Array, global_scale: Array | None = None, layout: ScaleLayout = "linear"
) -> QuantizedNVFP4:
    """Quantise activations to e2m1 with an e4m3 scale per row and 16 columns.

    ``scale = e4m3(global_scale * (max|x| * (1 / 6)))`` over each group, and
    ``values = e2m1(x * (global_scale / scale))``, zeros where the scale is 0.

    Parameters
    ----------
    x : numpy.ndarray, bfloat16, float16 or float32, shape (num_tokens, hidden_size)
        ``hidden_size`` is a multiple of 16.
    global_scale : numpy.ndarray, float32, shape (1,), optional
        Positive. By default ``2688 / max|x|``, within float32's normal range.
    layout : {"linear", "swizzled_128x4"}

    Returns
    -------
    QuantizedNVFP4

    Notes
    -----
    NaN does not enter the maximum and becomes 6. Infinities become 6 with their sign.
    """
    wide = np.asarray(x).astype(F32)
    num_rows, num_columns = wide.shape
    if global_scale is None:
        global_scale = nvfp4_global_scale(tensor_amax(wide))
    groups = wide.reshape(num_rows, num_columns // FP4_GROUP, FP4_GROUP)
    amax = np.fmax.reduce(np.abs(groups), axis=2, initial=F32(0.0))
    with np.errstate(all="ignore"):
        scale = to_e4m3(np.asarray(global_scale * (amax * F32(1.0 / 6.0)), F32))
        wide_scale = scale.astype(F32)
        factor = np.where(wide_scale == 0, F32(0), global_scale / wide_scale)
        codes = to_e2m1(groups * factor[:, :, None]).reshape(wide.shape)
    values = codes[:, 0::2] | codes[:, 1::2] << 4
    laid = np.zeros(fp4_scale_shape(wide.shape, layout), DTYPES[FP8])
    if layout == "linear":
        laid[...] = scale
    else:
        padded = np.zeros(laid.shape, np.uint8)
        padded[:num_rows, : scale.shape[1]] = scale.view(np.uint8)
        tiles = fp4_tiles(laid.view(np.uint8))
        tiles[...] = padded.reshape(tiles.shape)
    return QuantizedNVFP4(values, laid, global_scale, layout)
