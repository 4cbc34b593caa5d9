"""Finalize: the weighted sum that brings expert rows back to their tokens."""

from __future__ import annotations

from typing import Any

from cumoe import kernels
from cumoe.arrays import as_native, empty, is_device, same_place
from cumoe.config import Array, ExpertParts
from cumoe.reference import finalize as reference
from cumoe.validate import FLOATS, check_aligned, check_multiple, check_out, check_type

MAX_COLUMNS = 64  # kMaxColumns of finalize.cu: 32 routed and 32 shared experts


def finalize(
    rows: Any, topk_weights: Any, permuted_idx: Any, *, out: Any = None, out_dtype: str = "bfloat16"
) -> Array:
    """Sum each token's expert rows with its weights.

    ``out[t] = sum over k ascending of topk_weights[t, k] * rows[permuted_idx[t, k]]``

    Parameters
    ----------
    rows : array, bfloat16, float16 or float32, shape (max_rows, hidden_size), C-contiguous
        ``hidden_size`` is a multiple of 8.
    topk_weights : array, float32 or bfloat16, shape (num_tokens, top_k), or None
        None counts as ones.
    permuted_idx : array, int32, shape (num_tokens, top_k)
        Row of each slot; -1 contributes nothing. At most 64 columns.
    out : array, bfloat16, float16 or float32, shape (num_tokens, hidden_size), optional
    out_dtype : str
        Dtype of the result if `out` is not given.

    Returns
    -------
    array, shape (num_tokens, hidden_size)

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place.

    Notes
    -----
    float32 accumulation in fixed order, products and sums rounded separately, one rounding at the
    end: the same bits on NumPy and on a GPU, and on every run. Queued on the current stream.
    """
    rows = as_native(rows, "rows", FLOATS, ndim=2)
    check_multiple("rows", "hidden_size", rows.shape[1], 8)
    index = as_native(permuted_idx, "permuted_idx", ("int32",), ndim=2)
    if not 1 <= index.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"permuted_idx: expected 1 to {MAX_COLUMNS} columns, got {index.shape[1]}")
    weights = topk_weights
    if weights is not None:
        weights = as_native(weights, "topk_weights", ("float32", "bfloat16"), shape=index.shape)
    inputs: dict[str, Array | None] = {
        "rows": rows,
        "topk_weights": weights,
        "permuted_idx": index,
    }
    same_place(inputs)
    shape = (index.shape[0], rows.shape[1])
    if out is None:
        if out_dtype not in FLOATS:
            raise ValueError(f"out_dtype: expected one of {list(FLOATS)}, got {out_dtype!r}")
        native = empty(rows, shape, out_dtype)
    else:
        native = check_out(out, "out", FLOATS, shape, inputs)
    check_aligned({"rows": rows, "out": native})
    if not is_device(rows):
        reference.finalize(rows, weights, index, native)
    elif native.size:
        kernels.run([kernels.finalize(rows, weights, index, native)], rows)
    return native if out is None else out


def finalize_parts(parts: ExpertParts, *, out: Any = None) -> Array:
    """Finalize what a layer returned with ``finalize=False``.

    Parameters
    ----------
    parts : ExpertParts
    out : array, optional
        See :func:`finalize`.

    Returns
    -------
    array, shape (num_tokens, hidden_size)

    Raises
    ------
    TypeError, ValueError
        As :func:`finalize`.
    """
    check_type("parts", parts, ExpertParts, "an ExpertParts")
    return finalize(parts.rows, parts.topk_weights, parts.permuted_idx, out=out)
