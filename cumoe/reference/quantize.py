"""fp8 with float32 scales: of blocks of 1 x 128 and 128 x 128, of a token, of a tensor.

Bit-exact model of the quantisation kernels: ``scale = max(amax / 448, FLT_MIN)`` and
``q = e4m3(x / scale)``, two true float32 divisions, saturating, to nearest even. The last block of
a row or column may be partial. Knows nothing of experts beyond a leading axis of weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cumoe.config import Array, Quantized
from cumoe.reference.exact import FP8_MAX, to_e4m3

BLOCK = 128
MIN_SCALE = np.float32(np.finfo(np.float32).tiny)
MIN_TOKEN_SCALE = np.float32(2.0**-9) / FP8_MAX
"""What the smallest number of e4m3 is scaled with to become the largest."""


def quantize_fp8_block(x: Array) -> Quantized:
    """Quantise activations to float8_e4m3fn with one scale per row and 128 columns.

    ``scale = max(max|x| / 448, 1.17549435e-38)``, ``values = e4m3(x / scale)`` over each block.

    Parameters
    ----------
    x : numpy.ndarray, bfloat16, float16 or float32, shape (num_tokens, hidden_size)

    Returns
    -------
    Quantized
        ``values`` float8_e4m3fn ``(num_tokens, hidden_size)``, ``scale`` float32
        ``(num_tokens, ceil(hidden_size / 128))``, ``block`` (1, 128).

    Notes
    -----
    NaN does not enter the maximum and becomes the byte 0x7F. If a block holds an infinity its scale
    is infinite: infinities become 0x7F and finite numbers become zeros of their sign.
    """
    wide = np.asarray(x).astype(np.float32, order="C")
    scale = _scale(_block_amax(wide))
    _scale_blocks(np.divide, wide, scale)
    return Quantized(to_e4m3(wide), scale, block=(1, BLOCK))


def quantize_fp8_block_weights(w: Array) -> Quantized:
    """Quantise expert weights to float8_e4m3fn with one scale per expert and 128 x 128 block.

    Parameters
    ----------
    w : numpy.ndarray, bfloat16, float16 or float32, shape (num_experts, n, k)

    Returns
    -------
    Quantized
        ``values`` float8_e4m3fn ``(num_experts, n, k)``, ``scale`` float32
        ``(num_experts, ceil(n / 128), ceil(k / 128))``, ``block`` (128, 128).

    Notes
    -----
    The arithmetic is that of :func:`quantize_fp8_block`. Works through 128 rows at a time, so no
    float32 copy of the tensor is made.
    """
    w = np.asarray(w)
    num_experts, n, k = w.shape
    values = np.empty(w.shape, dtype=ml_dtypes.float8_e4m3fn)
    scale = np.empty((num_experts, -(-n // BLOCK), -(-k // BLOCK)), dtype=np.float32)
    for expert in range(num_experts):
        for block_row, start in enumerate(range(0, n, BLOCK)):
            strip = w[expert, start : start + BLOCK].astype(np.float32)
            column_amax = np.fmax.reduce(np.abs(strip), axis=0)
            strip_scale = _scale(_block_amax(column_amax[None]))
            _scale_blocks(np.divide, strip, strip_scale)
            scale[expert, block_row] = strip_scale[0]
            values[expert, start : start + BLOCK] = to_e4m3(strip)
    return Quantized(values, scale, block=(BLOCK, BLOCK))


def quantize_fp8_token(x: Array) -> Quantized:
    """Quantise activations to float8_e4m3fn with one scale per row.

    ``scale = max(max|x| / 448, 2**-9 / 448)``, ``values = e4m3(x / scale)``.

    Parameters
    ----------
    x : numpy.ndarray, bfloat16, float16 or float32, shape (num_tokens, hidden_size)

    Returns
    -------
    Quantized
        ``scale`` float32 ``(num_tokens, 1)``, ``block`` (1, None). NaN and infinity as in
        :func:`quantize_fp8_block`.
    """
    wide = np.asarray(x).astype(np.float32)
    amax = np.fmax.reduce(np.abs(wide), axis=1, initial=np.float32(0.0), keepdims=True)
    with np.errstate(under="ignore"):
        scale = np.maximum(amax / FP8_MAX, MIN_TOKEN_SCALE)
    return Quantized(to_e4m3(_divide(wide, scale)), scale, block=(1, None))


def quantize_fp8_tensor(x: Array, scale: Array | None = None) -> Quantized:
    """Quantise activations to float8_e4m3fn with one scale, ``max|x| / 448`` or a given one.

    Parameters
    ----------
    x : numpy.ndarray, bfloat16, float16 or float32, shape (num_tokens, hidden_size)
    scale : numpy.ndarray, float32, shape (1,), optional
        Positive. By default ``max(max|x| / 448, 1.17549435e-38)``.

    Returns
    -------
    Quantized
        ``scale`` float32 ``(1,)``, ``block`` (None, None). NaN and infinity as in
        :func:`quantize_fp8_block`.
    """
    wide = np.asarray(x).astype(np.float32)
    if scale is None:
        scale = _scale(tensor_amax(wide))
    return Quantized(to_e4m3(_divide(wide, scale)), scale, block=(None, None))


def tensor_amax(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the largest magnitude as an array of one element, NaN left out, 0 if there is none."""
    return np.asarray(np.fmax.reduce(np.abs(x), axis=None, initial=np.float32(0.0))).reshape(1)


def _divide(x: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return np.asarray(x / scale)


def dequantize(q: Quantized) -> NDArray[np.float32]:
    """Return ``values * scale`` in float32, each block by its own scale.

    Parameters
    ----------
    q : Quantized
        Of any block; the scale may have any strides.

    Returns
    -------
    numpy.ndarray, float32, the shape of ``q.values``
    """
    wide = np.asarray(q.values).astype(np.float32, order="C")
    scale = np.asarray(q.scale)
    if q.block[1] is None:
        with np.errstate(all="ignore"):
            wide *= scale
    elif q.block[0] == 1:
        _scale_blocks(np.multiply, wide, scale)
    else:
        for expert in range(wide.shape[0]):
            for block_row, start in enumerate(range(0, wide.shape[1], BLOCK)):
                strip = wide[expert, start : start + BLOCK]
                _scale_blocks(np.multiply, strip, scale[expert, block_row : block_row + 1])
    return wide


def _blocks(x: NDArray[np.float32]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield views of `x` as (rows, blocks, columns of a block), whole blocks and then the tail."""
    num_rows, num_columns = x.shape
    full = num_columns // BLOCK
    yield slice(0, full), x[:, : full * BLOCK].reshape(num_rows, full, BLOCK)
    if full * BLOCK < num_columns:
        yield slice(full, full + 1), x[:, None, full * BLOCK :]


def _block_amax(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the largest magnitude in each block, NaN left out, 0 if there is none."""
    amax = np.empty((x.shape[0], -(-x.shape[1] // BLOCK)), dtype=np.float32)
    for columns, part in _blocks(np.abs(x)):
        amax[:, columns] = np.fmax.reduce(part, axis=2, initial=np.float32(0.0))
    return amax


def _scale(amax: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``max(amax / 448, FLT_MIN)``; the division may underflow, the floor catches it."""
    with np.errstate(under="ignore"):
        return np.asarray(np.maximum(amax / FP8_MAX, MIN_SCALE))


def _scale_blocks(operation: np.ufunc, x: NDArray[np.float32], scale: NDArray[np.float32]) -> None:
    """Multiply or divide each block of `x` by its scale, in place."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for columns, part in _blocks(x):
            operation(part, scale[:, columns, None], out=part)
