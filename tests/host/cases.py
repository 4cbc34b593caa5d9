"""Every kernel with the cases it runs on the CPU, against its NumPy twin.

``CASES`` has an entry for each ``.cu`` file of ``cumoe/cu``; a test fails if one is missing. A case
is a function of :class:`~tests.host.checks.Host`, which runs launches and holds their arrays. Sizes
are small and awkward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cumoe import kernels
from cumoe.arrays import DTYPES, FP8
from cumoe.reference import finalize as twin_finalize
from cumoe.reference import quantize
from tests.host.activation_cases import ACTIVATION_CASES
from tests.host.checks import (
    BF16,
    F16,
    F32,
    Case,
    Host,
    check,
    same_bits,
)
from tests.host.gemm_cases import GEMM90_BF16_CASES, GEMM90_FP8_CASES, GEMM_CASES
from tests.host.routing_cases import ONE_LAUNCH_CASES, ROUTING_CASES, TWO_LAUNCH_CASES

__all__ = ["BF16", "CASES", "F16", "F32", "Case", "Host", "check"]

# ----------------------------------------------------------------------------------- quantize_fp8_*


def _wild(host: Host, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return numbers of many magnitudes with zeros, NaN and infinity."""
    x = host.rng.standard_normal(shape) * np.exp2(host.rng.integers(-12, 8, shape))
    flat = x.reshape(-1)
    flat[:: max(flat.size // 40, 1)] = 0.0
    flat[-1] = -0.0
    if flat.size > 300:
        flat[40], flat[300] = np.nan, np.inf
    return host.arena.array(x.astype(DTYPES[dtype]))


def _quantize(shape: tuple[int, int], dtype: str, column_major: bool = False) -> Any:
    def check(host: Host) -> None:
        x = _wild(host, shape, dtype)
        rows, columns = shape[0], kernels.blocks(shape[1])
        values = host.empty(shape, FP8)
        scale = (
            host.empty((columns, rows), F32).T if column_major else host.empty((rows, columns), F32)
        )
        host.run(kernels.quantize_fp8_block(x, values, scale))
        expected = quantize.quantize_fp8_block(x)
        same_bits("scale", scale, expected.scale)
        same_bits("values", values, expected.values)

    return check


def _quantize_weights(shape: tuple[int, int, int], dtype: str) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        w = _wild(host, shape, dtype)
        values = host.empty(shape, FP8)
        scale = host.empty((shape[0], kernels.blocks(shape[1]), kernels.blocks(shape[2])), F32)
        host.run(kernels.quantize_fp8_weights(w, values, scale))
        expected = quantize.quantize_fp8_block_weights(w)
        same_bits("scale", scale, expected.scale)
        same_bits("values", values, expected.values)

    return check


QUANTIZE_CASES = [
    Case("one row", _quantize((1, 8), BF16)),
    Case("tails", _quantize((5, 264), F32)),
    Case("column-major scales", _quantize((19, 392), BF16, True)),
    Case("float16", _quantize((3, 128), F16)),
]
QUANTIZE_WEIGHTS_CASES = [
    Case("tails", _quantize_weights((2, 200, 136), BF16)),
    Case("one row", _quantize_weights((1, 1, 8), F32)),
    Case("float16", _quantize_weights((1, 128, 264), F16)),
]


# ----------------------------------------------------------------------------------------- finalize


def _finalize(
    num_tokens: int, columns: int, hidden: int, rows_dtype: str, weights: str, out: str
) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        count = num_tokens * columns
        rows = host.normal((count + 5, hidden), rows_dtype)
        index = (
            host.rng.permutation(count + 5)[:count].astype(np.int32).reshape(num_tokens, columns)
        )
        index[host.rng.random(index.shape) < 0.2] = -1
        index[-1] = -1
        index = host.arena.array(index)
        w = host.normal((num_tokens, columns), weights)
        got, expected = (
            host.empty((num_tokens, hidden), out),
            np.zeros((num_tokens, hidden), DTYPES[out]),
        )
        host.run(kernels.finalize(rows, w, index, got))
        same_bits("out", got, twin_finalize.finalize(rows, w, index, expected))

    return check


FINALIZE_CASES = [
    Case("tails", _finalize(5, 5, 264, BF16, F32, BF16)),
    Case("one token, no row", _finalize(1, 1, 8, BF16, BF16, F32)),
    Case("wide", _finalize(3, 9, 2056, F16, F32, F16)),
    Case("64 columns", _finalize(2, 64, 40, F32, F32, F32)),
]


CASES: dict[str, list[Case]] = {
    "routing_topk": ROUTING_CASES,
    "routing_permute": ONE_LAUNCH_CASES,
    "routing_count": TWO_LAUNCH_CASES,
    "permute_place": TWO_LAUNCH_CASES,
    "quantize_fp8_block": QUANTIZE_CASES,
    "quantize_fp8_weights": QUANTIZE_WEIGHTS_CASES,
    "activation": ACTIVATION_CASES,
    "finalize": FINALIZE_CASES,
    "sm80_grouped_gemm": GEMM_CASES,
    "sm90_bf16_grouped_gemm": GEMM90_BF16_CASES,
    "sm90_fp8_grouped_gemm": GEMM90_FP8_CASES,
}
"""Kernel to cases; routing_count and permute_place run one after the other in each of theirs."""
