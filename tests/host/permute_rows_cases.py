"""The cases of ``permute_rows``: to the bit, with rows that no slot points at left as they were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cumoe import kernels
from tests.host.checks import BF16, F32, Case, Host, virtual


def _permute_rows(
    num_tokens: int, columns: int, row_bytes: int, blocks: int = 0, by_column: bool = False
) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        count = num_tokens * columns
        order = host.rng.permutation(count + 5).astype(np.int32)
        index = order[:count].reshape(num_tokens, columns)
        index[host.rng.random(index.shape) < 0.2] = -1
        index[-1] = -1
        a = host.arena.array(host.rng.integers(0, 256, (num_tokens, row_bytes), np.uint8))
        out = host.empty((count + 5, row_bytes), "uint8")
        expected = out.copy()
        tokens, slots = np.nonzero(index >= 0)
        expected[index[tokens, slots]] = a[tokens]
        scale = out_scale = None
        if blocks:
            values = host.rng.random((num_tokens, blocks), np.float32)
            scale = host.arena.array(values.T).T if by_column else host.arena.array(values)
            out_scale = host.empty((count + 5, blocks), F32)
            expected_scale = out_scale.copy()
            expected_scale[index[tokens, slots]] = values[tokens]
        host.run(kernels.permute_rows(a, host.arena.array(index), out, scale, out_scale))
        assert (out == expected).all(), "out"
        if out_scale is not None:
            same = out_scale.view(np.uint32) == expected_scale.view(np.uint32)
            assert same.all(), "out_scale"

    return check


def _far(host: Host) -> None:
    """Rows whose bytes begin past 2^31 and past 2^32."""
    hidden = 1 << 11
    held = np.array([0, (1 << 19) + 3, (1 << 20) + 5, (1 << 20) - 1], np.int32)
    out = virtual(((1 << 20) + 6, hidden), BF16)
    a = host.normal((2, hidden), BF16)
    host.run(kernels.permute_rows(a, host.arena.array(held.reshape(2, 2)), out))
    assert (out[held].view(np.uint16) == a[[0, 0, 1, 1]].view(np.uint16)).all(), "out"


PERMUTE_ROWS_CASES = [
    Case("tails", _permute_rows(5, 5, 272)),
    Case("one token, no row", _permute_rows(1, 1, 16)),
    Case("two pieces", _permute_rows(3, 3, 8192 + 2064, 3)),
    Case("scales", _permute_rows(7, 8, 1168, 10)),
    Case("scales by column, many", _permute_rows(4, 2, 64, 150, True)),
    Case("64 columns", _permute_rows(2, 64, 48, 1)),
    Case("offsets past 2^32", _far),
]
