"""The demo's check: a layer's result against an oracle, for a sample of its tokens.

The oracle routes with the NumPy reference and multiplies float64 copies of the dequantised expert
matrices, rounding where the layer rounds. It reads one expert at a time, on the side where the
weights are, so that a layer of any size is checked in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cumoe.arrays import is_device
from cumoe.cli.problem import Problem
from cumoe.config import Array
from cumoe.launch import get_device
from cumoe.reference import activation as reference_activation
from cumoe.reference import routing as reference_routing
from cumoe.reference.quantize import dequantize, quantize_fp8_block
from cumoe.tuning import SM90_ARCH

MAX_ERROR = 2.0**-5
"""Bound of the largest error: four steps of bfloat16, a step being at most 2**-7 of a value. Sums
in another order flip single roundings: of the result, of a row, of an activation to fp8."""

RMS_ERROR = 2.0**-9
"""Bound of the RMS error, a quarter of such a step. Activations that were not rounded to fp8, or by
a wrong scale, would exceed it ten times."""

WGMMA_MAX_ERROR, WGMMA_RMS_ERROR = 2.0**-4, 2.0**-7
"""The bounds where Hopper's fp8 tensor cores multiply: they keep fewer bits than float32 of a sum
over 128 products (a relative error of 1.5e-4 was measured on an H200), so one activation in a
hundred is rounded to its fp8 neighbour."""


@dataclass(frozen=True)
class Comparison:
    """How a layer's result compares with the oracle.

    Attributes
    ----------
    num_tokens, num_experts : int
        Tokens compared, and experts that they used.
    total_ids, wrong_ids : int
        Expert ids of all tokens, and how many of them differ from the reference's.
    max_error : float
        Largest ``|y - oracle| / max(rms(oracle), |oracle|)``.
    rms_error : float
        ``rms(y - oracle) / rms(oracle)``.
    max_bound, rms_bound : float
        What the errors may be.
    """

    num_tokens: int
    num_experts: int
    total_ids: int
    wrong_ids: int
    max_error: float
    rms_error: float
    max_bound: float = MAX_ERROR
    rms_bound: float = RMS_ERROR

    @property
    def passed(self) -> bool:
        """Whether ids are right and errors within bounds; a NaN is not."""
        close = self.max_error <= self.max_bound and self.rms_error <= self.rms_bound
        return self.wrong_ids == 0 and close


def compare(problem: Problem, y: Array, ids: Array, *, num_samples: int = 16) -> Comparison:
    """Compare a sample of the result's rows, and all ids, with the oracle.

    Parameters
    ----------
    problem : Problem
    y : array, shape (num_tokens, hidden_size)
    ids : array, int32, shape (num_tokens, top_k + num_shared_experts)
        As the layer's backend routed the tokens.
    num_samples : int
        Tokens to compare, spread evenly; fewer if there are fewer.
    """
    expected_ids, weights = reference_routing.route(
        problem.host_logits, problem.routing, bias=problem.host_bias
    )
    count = min(num_samples, problem.num_tokens)
    tokens = np.unique(np.linspace(0, problem.num_tokens - 1, count).astype(np.int64))
    oracle = _layer_rows(problem, tokens, expected_ids[tokens], weights[tokens])
    got = _to_host(y)[tokens].astype(np.float64)
    rms = float(np.sqrt(np.mean(oracle**2)))
    error = np.abs(got - oracle)
    return Comparison(
        num_tokens=len(tokens),
        num_experts=len(np.unique(expected_ids[tokens])),
        total_ids=int(expected_ids.size),
        wrong_ids=int((_to_host(ids) != expected_ids).sum()),
        max_error=float((error / np.maximum(rms, np.abs(oracle))).max()),
        rms_error=float(np.sqrt(np.mean(error**2)) / rms),
        max_bound=WGMMA_MAX_ERROR if _is_wgmma(problem) else MAX_ERROR,
        rms_bound=WGMMA_RMS_ERROR if _is_wgmma(problem) else RMS_ERROR,
    )


def _is_wgmma(problem: Problem) -> bool:
    """Tell whether Hopper's fp8 tensor cores computed the result."""
    weights = problem.weights
    if problem.recipe != "fp8_block" or not weights.is_device:
        return False
    return get_device(int(weights.w13.device.id)).arch == SM90_ARCH


def _layer_rows(
    problem: Problem,
    tokens: NDArray[np.int64],
    ids: NDArray[np.int32],
    weights: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Return the oracle's result for some tokens, rounded to bfloat16."""
    x = problem.host_x[tokens]
    fp8 = problem.recipe == "fp8_block"
    wide = dequantize(quantize_fp8_block(x)) if fp8 else x.astype(np.float32)
    rows = np.zeros((*ids.shape, x.shape[1]), np.float32)
    for expert in np.unique(ids):
        token, column = np.nonzero(ids == expert)
        gate, up, down = problem.weights.dequantize_expert(int(expert))
        hidden = reference_activation.apply(
            _product(wide[token], gate).astype(np.float32),
            _product(wide[token], up).astype(np.float32),
            problem.shape.activation,
        )
        if fp8:
            hidden = dequantize(quantize_fp8_block(hidden))
        else:
            hidden = hidden.astype(ml_dtypes.bfloat16).astype(np.float32)
        rows[token, column] = _product(hidden, down).astype(ml_dtypes.bfloat16)
    total = np.einsum("tk,tkh->th", weights.astype(np.float64), rows.astype(np.float64))
    return total.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def _product(x: NDArray[np.float32], w: Array) -> NDArray[np.float64]:
    """Return ``x @ w.T`` in float64, computed where `w` is."""
    wide = x.astype(np.float64)
    if not is_device(w):
        product: NDArray[np.float64] = wide @ w.T.astype(np.float64)
        return product
    import cupy

    # Row by row and without cuBLAS, which cumoe does not install; there are few rows.
    rows = [(w * cupy.asarray(row)).sum(axis=1) for row in wide]
    return np.stack([_to_host(row) for row in rows])


def _to_host(x: Array) -> NDArray[Any]:
    """Return an array as NumPy, waiting for the device."""
    return np.asarray(x.get() if is_device(x) else x)
