"""NumPy twin of the all-reduces: the ranks of a group in one process, to the bit.

A rank's part of a token is a float32 sum, rounded once to the dtype of the wire; minus zero becomes
zero. Every rank adds the parts of all in float32 by ascending rank, adds the residual in float32,
and rounds once; RMSNorm is of the rounded values, quantisation of the rounded norm. Both protocols
of the kernels and all shapes of their launches give these bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cumoe.arrays import DTYPES, dtype_name
from cumoe.config import Array, Quantized
from cumoe.microscaling import QuantizedNVFP4, QuantizedUE8M0
from cumoe.reference.microscaling import quantize_fp8_ue8m0, quantize_nvfp4
from cumoe.reference.quantize import quantize_fp8_block, quantize_fp8_tensor, quantize_fp8_token

F32 = np.float32
CHUNK, LANES = 256, 32
Quantised = Quantized | QuantizedUE8M0 | QuantizedNVFP4


@dataclass(frozen=True, eq=False)
class Reduced:
    """What follows the sum of the ranks; None for what was not asked for.

    Attributes
    ----------
    sum, result, norm : array, shape (num_tokens, hidden_size)
        `result` is the sum with the residual, rounded once; `norm` its RMSNorm.
    quantized : Quantized, QuantizedUE8M0, QuantizedNVFP4 or None
        Of the norm, or of the result if there is no norm.
    """

    sum: Array
    result: Array
    norm: Array | None = None
    quantized: Quantised | None = None


def part_of_rows(
    rows: Array,
    weights: Array | None,
    permuted_idx: Array,
    *,
    routed_scaling_factor: float = 1.0,
    shared: Array | None = None,
) -> Array:
    """Return a rank's part: each token's rows times their weights, in the order of the slots.

    Parameters
    ----------
    rows : array, bfloat16 or float16, shape (max_rows, hidden_size)
    weights : array or None, shape (num_tokens, top_k)
        None counts as ones.
    permuted_idx : array, int32, shape (num_tokens, top_k)
        Negative slots are skipped.
    routed_scaling_factor : float
        Of the sum, before `shared` is added.
    shared : array or None, shape (num_tokens, hidden_size)

    Returns
    -------
    array, dtype of `rows`, shape (num_tokens, hidden_size)
    """
    wide = np.zeros((permuted_idx.shape[0], rows.shape[1]), F32)
    for k, index in enumerate(permuted_idx.T):
        held = index >= 0
        weight = np.ones(index.shape, F32) if weights is None else weights[:, k].astype(F32)
        _add_product(wide, held, weight, rows[index[held]])
    return _part(wide, routed_scaling_factor, shared, rows.dtype)


def part_of_experts(
    rows: Array,
    weights: Array | None,
    *,
    routed_scaling_factor: float = 1.0,
    shared: Array | None = None,
) -> Array:
    """Return a rank's part: the rows of all its experts times their weights, in their order.

    Parameters
    ----------
    rows : array, bfloat16 or float16, shape (num_experts, num_tokens, hidden_size)
    weights : array or None, shape (num_experts, num_tokens)
    routed_scaling_factor, shared
        See :func:`part_of_rows`.

    Returns
    -------
    array, dtype of `rows`, shape (num_tokens, hidden_size)
    """
    wide = np.zeros(rows.shape[1:], F32)
    every = np.ones(rows.shape[1], bool)
    for expert, values in enumerate(rows):
        weight = np.ones(every.shape, F32) if weights is None else weights[expert].astype(F32)
        _add_product(wide, every, weight, values)
    return _part(wide, routed_scaling_factor, shared, rows.dtype)


def part_of_values(x: Array) -> Array:
    """Return a rank's part that is given: the values themselves, without minus zeros."""
    return np.where(x == 0, DTYPES[dtype_name(x)].type(0), x)


def reduce_parts(
    parts: Sequence[Array],
    *,
    residual: Array | None = None,
    norm_weight: Array | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    quantize: str | None = None,
    quant_scale: Array | None = None,
    group_size: int = 0,
) -> Reduced:
    """Add the parts of all ranks and apply what follows; every rank gets the same.

    Parameters
    ----------
    parts : sequence of array, bfloat16, float16 or float32, shape (num_tokens, hidden_size)
        By rank.
    residual : array or None, dtype and shape of a part
    norm_weight : array or None, shape (hidden_size,)
    eps, weight_offset : float
        ``norm = result / sqrt(mean(result ** 2) + eps) * (weight_offset + norm_weight)``
    quantize : None or str
        ``"fp8_tensor"``, ``"fp8_token"``, ``"fp8_block"``, ``"fp8_ue8m0"``, ``"nvfp4"``, or, with
        scales in tiles, ``"nvfp4_swizzled"``.
    quant_scale : array or None, float32, shape (1,)
        Of ``"fp8_tensor"``, and the global scale of nvfp4.
    group_size : int
        Of ``"fp8_ue8m0"``.

    Returns
    -------
    Reduced
    """
    dtype = parts[0].dtype
    with np.errstate(over="ignore", invalid="ignore"):
        wide = np.zeros(parts[0].shape, F32)
        for part in parts:
            wide += part.astype(F32)
        total = wide.astype(dtype)
        if residual is not None:
            wide += residual.astype(F32)
        result = wide.astype(dtype)
        last, norm = result, None
        if norm_weight is not None:
            x = result.astype(F32)
            inverse = F32(1) / np.sqrt(mean_square(x) + F32(eps))
            factor = F32(weight_offset) + norm_weight.astype(F32)
            last = norm = (x * inverse[:, None] * factor).astype(dtype)
    return Reduced(total, result, norm, quantise(last, quantize, quant_scale, group_size))


def mean_square(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return each row's mean of squares, added in the order of the kernels (``allreduce.cuh``)."""
    num_tokens, hidden_size = x.shape
    chunks = -(-hidden_size // CHUNK)
    padded = np.zeros((num_tokens, chunks * CHUNK), F32)
    padded[:, :hidden_size] = x * x
    eights = padded.reshape(num_tokens, chunks, LANES, CHUNK // LANES)
    of_chunk = _butterfly(_ascending(eights))
    rounds = -(-chunks // LANES)
    lanes = np.zeros((num_tokens, rounds * LANES), F32)
    lanes[:, :chunks] = of_chunk
    total = _butterfly(_ascending(lanes.reshape(num_tokens, rounds, LANES).swapaxes(1, 2)))
    return total / F32(hidden_size)


def quantise(
    x: Array, quantize: str | None, quant_scale: Array | None = None, group_size: int = 0
) -> Quantised | None:
    """Return quantised rows: see :func:`reduce_parts`."""
    if quantize is None:
        return None
    if quantize == "fp8_ue8m0":
        return quantize_fp8_ue8m0(x, group_size)
    if quantize.startswith("nvfp4"):
        return quantize_nvfp4(x, quant_scale, "linear" if quantize == "nvfp4" else "swizzled_128x4")
    if quantize == "fp8_tensor":
        return quantize_fp8_tensor(x, quant_scale)
    return {"fp8_block": quantize_fp8_block, "fp8_token": quantize_fp8_token}[quantize](x)


def _add_product(wide: Array, held: Array, weight: Array, rows: Array) -> None:
    """Add weighted rows to the tokens that hold them, product and sum rounded separately."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide[held] += weight[held, None] * rows.astype(F32)


def _part(wide: Array, factor: float, shared: Array | None, dtype: np.dtype) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        wide = wide * F32(factor)
        if shared is not None:
            wide = wide + shared.astype(F32)
        return part_of_values(wide.astype(dtype))


def _ascending(x: Array) -> Array:
    """Add the last axis from its first element on."""
    total = x[..., 0].copy()
    for i in range(1, x.shape[-1]):
        total += x[..., i]
    return total


def _butterfly(x: Array) -> Array:
    """Add the last axis as a warp does, by pairs 16, 8, 4, 2 and 1 lanes apart."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]
