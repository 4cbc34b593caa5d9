"""The cases of ``sm90_fp8_rows_grouped_gemm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cumoe.arrays import FP8
from cumoe.config import Activation
from tests.host.checks import Case, Host
from tests.host.gemm_cases import gemm90

# Rows an expert gets: none, what is columns of products (32, 64, 88), a consumer's, a block's and a
# cluster's share, and one more or fewer.
SHARES = (0, 1, 32, 33, 63, 64, 65, 88, 89, 128, 129, 200)


def _rows90(**sizes: Any) -> Callable[[Host], None]:
    """``sm90_fp8_rows_grouped_gemm``."""
    cluster = sizes.setdefault("cluster", 1)
    return gemm90(FP8, **{"tile": 128 * cluster, "block_n": 128} | sizes)


GEMM90_FP8_ROWS_CASES = [
    Case("gated", _rows90(k=272, n=144, order="up_gate", per_expert=True, counts=(100, 5))),
    Case(
        "gated interleaved, up first, rows in order",
        _rows90(k=400, n=80, order="up_gate_interleaved", gather=False, counts=(0, 97)),
    ),
    Case(
        "gated, block-major", _rows90(k=256, n=144, block_major=True, order="gate_up", counts=(90,))
    ),
    Case("plain", _rows90(k=144, n=264, counts=(50, 110), num_chunks=2)),
    Case("plain, gathered", _rows90(k=272, n=264, gather=True, counts=(40, 121))),
    Case(
        "scales in rows", _rows90(k=1168, n=48, order="up_gate", scale_stride=12, counts=(89, 17))
    ),
    Case("shares", _rows90(k=144, n=40, counts=SHARES)),
    Case("shares, gated", _rows90(k=144, n=80, order="gate_up", counts=SHARES)),
    Case(
        "one block, several tiles",
        _rows90(num_sms=1, k=640, n=272, counts=(100, 3, 220), num_chunks=2),
    ),
    Case(
        "one block, several tiles, gated",
        _rows90(num_sms=1, k=640, n=272, order="gate_up", counts=(100, 3, 220)),
    ),
    Case("clusters, gated", _rows90(cluster=2, k=640, n=144, order="gate_up", counts=(140, 9, 0))),
    Case("clusters, plain", _rows90(cluster=2, num_sms=2, k=640, n=264, counts=(3, 0, 300, 128))),
    Case(
        "clusters, few rows, odd columns",
        _rows90(cluster=2, num_sms=4, k=400, n=520, counts=(3, 150, 64, 129)),
    ),
    Case(
        "clusters, few rows, gated",
        _rows90(cluster=2, num_sms=4, k=272, n=400, order="up_gate", counts=(92, 193, 1, 110)),
    ),
    Case(
        "clusters, columns",
        _rows90(cluster=2, num_sms=2, k=400, n=264, counts=(176, 177, 88, 89, 64, 130)),
    ),
    Case(
        "clusters, columns, gated",
        _rows90(cluster=2, num_sms=2, k=640, n=144, order="gate_up", counts=(176, 177, 66, 130)),
    ),
    Case(
        "columns and rows by turns",
        _rows90(num_sms=1, k=128, n=2064, order="gate_up", counts=(217, 216)),
    ),
    Case(
        "columns, gathered",
        _rows90(cluster=2, num_sms=2, k=272, n=264, gather=True, counts=(70, 140, 33)),
    ),
    Case(
        "columns, activated",
        _rows90(
            cluster=2, num_sms=2, k=144, n=272, counts=(70, 140, 33), activation=Activation("silu")
        ),
    ),
    Case("activated", _rows90(k=272, n=272, activation=Activation("relu2"), counts=(100, 9))),
]
