"""The cases of the finalize kernel: to the bit, with poison in every row that no slot points at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cumoe import kernels
from cumoe.arrays import DTYPES
from cumoe.reference import finalize as twin
from tests.host.checks import BF16, F16, F32, Case, Host, same_bits, virtual


def _finalize(
    num_tokens: int, columns: int, hidden: int, rows_dtype: str, weights: str | None, out: str
) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        count = num_tokens * columns
        rows = host.normal((count + 5, hidden), rows_dtype)
        order = host.rng.permutation(count + 5).astype(np.int32)
        index = order[:count].reshape(num_tokens, columns)
        index[host.rng.random(index.shape) < 0.2] = -1
        index[-1] = -1
        rows[np.setdiff1d(order, index)] = np.nan
        index = host.arena.array(index)
        w = None if weights is None else host.normal((num_tokens, columns), weights)
        if w is not None:
            w[index < 0] = np.nan
        got, expected = (
            host.empty((num_tokens, hidden), out),
            np.zeros((num_tokens, hidden), DTYPES[out]),
        )
        host.run(kernels.finalize(rows, w, index, got))
        same_bits("out", got, twin.finalize(rows, w, index, expected))

    return check


def _far(host: Host) -> None:
    """Rows whose elements begin past 2^31 and past 2^32."""
    hidden = 1 << 12
    held = np.array([0, (1 << 19) + 3, (1 << 20) + 5, (1 << 20) - 1], np.int32)
    rows = virtual(((1 << 20) + 6, hidden), BF16)
    rows[held] = host.normal((held.size, hidden), BF16)
    index = host.arena.array(held[[[3, 1, -1, 0], [2, 0, 1, 3]]])
    w = host.normal(index.shape, F32)
    got, expected = host.empty((2, hidden), BF16), np.zeros((2, hidden), DTYPES[BF16])
    host.run(kernels.finalize(rows, w, index, got))
    same_bits("out", got, twin.finalize(rows, w, index, expected))


FINALIZE_CASES = [
    Case("tails", _finalize(5, 5, 264, BF16, F32, BF16)),
    Case("one token, no row", _finalize(1, 1, 8, BF16, BF16, F32)),
    Case("wide", _finalize(3, 9, 2056, F16, F32, F16)),
    Case("without weights", _finalize(3, 2, 136, BF16, None, BF16)),
    Case("top 8", _finalize(4, 8, 1160, BF16, BF16, BF16)),
    Case("top 32 and a shared one", _finalize(3, 33, 136, BF16, F32, BF16)),
    Case("64 columns", _finalize(2, 64, 40, F32, F32, F32)),
    Case("offsets past 2^32", _far),
]
