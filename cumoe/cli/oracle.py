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
from cumoe.reference import activation as reference_activation
from cumoe.reference import routing as reference_routing
from cumoe.reference.quantize import dequantize, quantize_fp8_block

MAX_ERROR = 2.0**-5
"""Bound of the largest error: four steps of bfloat16, a step being at most 2**-7 of a value. Sums
in another order flip single roundings: of the result, of a row, of an activation to fp8."""

RMS_ERROR = 2.0**-9
"""Bound of the RMS error, a quarter of such a step. Activations that were not rounded to fp8, or by
a wrong scale, would exceed it ten times."""


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
    """

    num_tokens: int
    num_experts: int
    total_ids: int
    wrong_ids: int
    max_error: float
    rms_error: float

    @property
    def passed(self) -> bool:
        """Whether ids are right and errors within bounds; a NaN is not."""
        return self.wrong_ids == 0 and self.max_error <= MAX_ERROR and self.rms_error <= RMS_ERROR


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
    )


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
