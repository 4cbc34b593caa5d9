"""NumPy twin of the grouped GEMM and its epilogues, expert by expert in float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cumoe.arrays import DTYPES
from cumoe.config import Activation, Array, Permutation, Quantized
from cumoe.reference.activation import apply
from cumoe.reference.exact import to_e4m3
from cumoe.reference.quantize import quantize_fp8_block


def expert_rows(permutation: Permutation, expert: int) -> slice:
    """Return the valid rows of an expert's segment."""
    start = int(permutation.expert_offsets[expert])
    return slice(start, start + int(permutation.tokens_per_expert[expert]))


def busy_experts(permutation: Permutation) -> list[int]:
    """Return the local experts that have rows."""
    return [int(e) for e in np.flatnonzero(permutation.tokens_per_expert)]


def grouped_gemm(
    x: Array,
    permutation: Permutation,
    expert_matrix: Callable[[int], Array],
    n: int,
    *,
    gather: bool,
) -> Array:
    """Return ``y[i] = x[source(i)] @ w[e(i)].T`` in float32; padding rows are zero.

    Parameters
    ----------
    x : numpy.ndarray, float32
        The dequantised left operand.
    expert_matrix : callable
        The dequantised ``(n, k)`` float32 matrix of an expert.
    """
    y = np.zeros((permutation.max_rows, n), np.float32)
    for expert in busy_experts(permutation):
        rows = expert_rows(permutation, expert)
        source = permutation.token_idx[rows] if gather else rows
        np.matmul(x[source], expert_matrix(expert).T, out=y[rows])
    return y


def activated_gemm(
    x: Array,
    permutation: Permutation,
    expert_gate_up: Callable[[int], tuple[Array | None, Array]],
    intermediate_size: int,
    activation: Activation,
    *,
    gather: bool,
    row_weights: Array | None = None,
) -> Array:
    """Return ``act(x[source(i)] @ gate[e(i)].T, x[source(i)] @ up[e(i)].T)`` in float32.

    An activation without a gate is given matrices without one. `row_weights` (max_rows,) multiply
    the products.
    """
    y = np.zeros((permutation.max_rows, intermediate_size), np.float32)
    for expert in busy_experts(permutation):
        rows = expert_rows(permutation, expert)
        source = x[permutation.token_idx[rows] if gather else rows]
        gate, up = expert_gate_up(expert)
        gate_values = None if gate is None else source @ gate.T
        up_values = source @ up.T
        if row_weights is not None:
            up_values *= row_weights[rows, None]
            if gate_values is not None:
                gate_values *= row_weights[rows, None]
        y[rows] = apply(gate_values, up_values, activation, expert)
    return y


def weights_of_rows(permutation: Permutation, weights: Array, num_weighted: int) -> Array:
    """Return for each row its token's weight (column 0), 1 from expert `num_weighted` on."""
    result = np.ones(permutation.max_rows, np.float32)
    for expert in busy_experts(permutation):
        rows = expert_rows(permutation, expert)
        if expert < num_weighted:
            result[rows] = weights[permutation.token_idx[rows], 0].astype(np.float32)
    return result


def scale_of_rows(permutation: Permutation, scale: Array) -> Array:
    """Return for each row the scale of its expert, shape (max_rows, 1)."""
    result = np.ones((permutation.max_rows, 1), np.float32)
    for expert in busy_experts(permutation):
        result[expert_rows(permutation, expert)] = scale[expert if scale.size > 1 else 0]
    return result


def quantize_rows(y: Array, permutation: Permutation, scale: Array) -> Array:
    """Return ``e4m3(y / scale)`` with the scale of each row's expert."""
    with np.errstate(all="ignore"):
        return to_e4m3(y / scale_of_rows(permutation, scale))


def round_rows(y: Array, out_dtype: str) -> Array | Quantized:
    """Round float32 rows to the output dtype, or quantise them to fp8 with 1 x 128 scales."""
    if out_dtype == "float8_e4m3fn":
        return quantize_fp8_block(y)
    with np.errstate(over="ignore"):
        return y.astype(DTYPES[out_dtype])
