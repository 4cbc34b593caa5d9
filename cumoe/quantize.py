"""Block-scaled fp8 quantisation of activations (1 x 128) and weights (128 x 128).

``scale = max(amax / 448, 1.17549435e-38)`` and ``values = e4m3(x / scale)``: saturating, to nearest
even, the same bits on NumPy and on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cumoe import kernels
from cumoe.arrays import FP8, as_native, empty, is_device, same_place
from cumoe.config import Array, Quantized
from cumoe.reference import quantize as reference
from cumoe.validate import (
    FLOATS,
    check_aligned,
    check_multiple,
    check_quantized_out,
    check_type,
)


def quantize_fp8_block(x: Any, *, out: Quantized | None = None) -> Quantized:
    """Quantise activations to float8_e4m3fn with one scale per row and 128 columns.

    Parameters
    ----------
    x : array, bfloat16, float16 or float32, shape (num_tokens, hidden_size), C-contiguous
        ``hidden_size`` is a multiple of 8; the last block may be partial.
    out : Quantized, optional
        Values float8_e4m3fn (uint8 on a device) of x's shape; scale float32 of shape
        ``(num_tokens, ceil(hidden_size / 128))`` with any positive strides.

    Returns
    -------
    Quantized
        ``block`` is (1, 128).

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place.

    Notes
    -----
    NaN does not enter ``amax`` and becomes the byte 0x7f; an infinity makes its block's scale
    infinite and leaves every other block alone. A block of zeros gets the smallest normal scale.
    Queued on the current stream.

    Examples
    --------
    >>> import numpy as np
    >>> q = quantize_fp8_block(np.full((1, 128), 896.0, np.float32))
    >>> float(q.scale[0, 0]), float(q.values[0, 0])
    (2.0, 448.0)
    """
    x = as_native(x, "x", FLOATS, ndim=2)
    check_multiple("x", "hidden_size", x.shape[1], 8)
    scale_shape = (x.shape[0], kernels.blocks(x.shape[1]))
    native = _outputs(x, out, scale_shape, (1, 128))
    if is_device(x):
        if x.size:
            kernels.run([kernels.quantize_fp8_block(x, native.values, native.scale)], x)
    else:
        result = reference.quantize_fp8_block(x)
        native.values[...], native.scale[...] = result.values, result.scale
    return native if out is None else out


def quantize_fp8_block_weights(w: Any, *, out: Quantized | None = None) -> Quantized:
    """Quantise expert matrices to float8_e4m3fn with one scale per 128 x 128 block.

    Parameters
    ----------
    w : array, bfloat16, float16 or float32, shape (num_experts, n, k), C-contiguous
        ``k`` is a multiple of 8; the last blocks of rows and columns may be partial.
    out : Quantized, optional
        Values of w's shape; scale float32 ``(num_experts, ceil(n / 128), ceil(k / 128))``,
        C-contiguous.

    Returns
    -------
    Quantized
        ``block`` is (128, 128).

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place.

    Notes
    -----
    Arithmetic as in :func:`quantize_fp8_block`. Queued on the current stream.
    """
    w = as_native(w, "w", FLOATS, ndim=3)
    num_experts, n, k = w.shape
    check_multiple("w", "k", k, 8)
    native = _outputs(w, out, (num_experts, kernels.blocks(n), kernels.blocks(k)), (128, 128))
    if is_device(w):
        if w.size:
            kernels.run([kernels.quantize_fp8_weights(w, native.values, native.scale)], w)
    else:
        result = reference.quantize_fp8_block_weights(w)
        native.values[...], native.scale[...] = result.values, result.scale
    return native if out is None else out


def _outputs(
    x: Array, out: Quantized | None, scale_shape: tuple[int, ...], block: tuple[int, int]
) -> Quantized:
    """Allocate the result beside `x`, or check the caller's."""
    if out is None:
        values, scale = empty(x, x.shape, FP8), empty(x, scale_shape, "float32")
        check_aligned({"x": x})
        return Quantized(values, scale, block=block)
    native = check_quantized_out(out, x.shape, scale_shape, {"x": x}, block=block)
    check_aligned({"x": x, "out.values": native.values})
    return native


def dequantize(q: Quantized) -> Array:
    """Return ``values * scale`` in float32, on the side the arrays live.

    Parameters
    ----------
    q : Quantized

    Returns
    -------
    array, float32, shape of the values

    Raises
    ------
    TypeError, ValueError
        If values and scale do not fit together.
    """
    check_type("q", q, Quantized, "a Quantized")
    values = as_native(q.values, "q.values", (FP8,))
    rows = values.shape[-2]
    scale_rows = rows if q.block == (1, 128) else kernels.blocks(rows)
    scale = as_native(
        q.scale,
        "q.scale",
        ("float32",),
        shape=(*values.shape[:-2], scale_rows, kernels.blocks(values.shape[-1])),
        contiguous=False,
    )
    same_place({"q.values": values, "q.scale": scale})
    if not is_device(values):
        return reference.dequantize(Quantized(values, scale, block=q.block))
    import cupy

    table = cupy.asarray(e4m3_table())
    wide = scale.repeat(128, axis=-1)[..., : values.shape[-1]]
    if q.block == (128, 128):
        wide = wide.repeat(128, axis=-2)[..., :rows, :]
    return table[values] * wide


def e4m3_table() -> np.ndarray:
    """Return the 256 values of float8_e4m3fn as float32."""
    import ml_dtypes

    return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
