"""Every kernel with the cases it runs on the CPU, against its NumPy twin.

``CASES`` has an entry for each ``.cu`` file of ``cumoe/cu``; a test fails if one is missing. A case
is a function of :class:`~tests.host.checks.Host`, which runs launches and holds their arrays. Sizes
are small and awkward.
"""

from __future__ import annotations

from cumoe.arrays import FP8
from tests.host.activation_cases import ACTIVATION_CASES
from tests.host.allreduce_cases import ALLREDUCE_CASES, TWO_SHOT_CASES
from tests.host.checks import BF16, F16, F32, Case, Host, check
from tests.host.finalize_cases import FINALIZE_CASES
from tests.host.gemm_cases import (
    GEMM90_CASES,
    GEMM90_FP8_CASES,
    GEMM_CASES,
)
from tests.host.gemm_pairs_cases import pairs_cases
from tests.host.gemm_rows_cases import GEMM90_FP8_ROWS_CASES
from tests.host.permute_rows_cases import PERMUTE_ROWS_CASES
from tests.host.quantize_cases import QUANTIZE_CASES
from tests.host.routing_cases import ONE_LAUNCH_CASES, ROUTING_CASES, TWO_LAUNCH_CASES

__all__ = ["BF16", "CASES", "F16", "F32", "Case", "Host", "check"]

CASES: dict[str, list[Case]] = {
    "routing_topk": ROUTING_CASES,
    "routing_permute": ONE_LAUNCH_CASES,
    "routing_count": TWO_LAUNCH_CASES,
    "permute_place": TWO_LAUNCH_CASES,
    **QUANTIZE_CASES,
    "activation": ACTIVATION_CASES,
    "finalize": FINALIZE_CASES,
    "permute_rows": PERMUTE_ROWS_CASES,
    "allreduce_one_shot": ALLREDUCE_CASES,
    "allreduce_two_shot": TWO_SHOT_CASES,
    "sm80_grouped_gemm": GEMM_CASES,
    "sm90_fp8_grouped_gemm": [*GEMM90_FP8_CASES, *pairs_cases(FP8, 1)],
    "sm90_fp8_rows_grouped_gemm": GEMM90_FP8_ROWS_CASES,
    "sm90_grouped_gemm": [*GEMM90_CASES, *pairs_cases(BF16, 2)],
}
"""Kernel to cases; routing_count and permute_place run one after the other in each of theirs."""
