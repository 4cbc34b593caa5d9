"""Cases of the Hopper grouped GEMMs with pipelines so deep that they load two stages at a time."""

from __future__ import annotations

from tests.host.checks import Case
from tests.host.gemm_cases import gemm90


def pairs_cases(dtype: str, elem_bytes: int) -> list[Case]:
    """Return the cases of an element type: odd and even numbers of stages, one alone, clusters."""
    stage = 128 // elem_bytes
    sizes = {"n": 272, "tile": 24, "tokens": 30, "experts": 3}
    return [
        Case("pairs", gemm90(dtype, num_sms=1, num_stages=5, num_chunks=2, k=5 * stage, **sizes)),
        Case(
            "pairs, gated",
            gemm90(dtype, num_sms=1, num_stages=6, k=4 * stage - 16, order="gate_up", **sizes),
        ),
        Case(
            "pairs of one stage",
            gemm90(dtype, num_sms=1, num_stages=5, k=stage, order="up_gate", **sizes),
        ),
        Case(
            "pairs, clusters",
            gemm90(
                dtype, cluster=2, num_sms=2, num_stages=5, k=3 * stage, n=528, tile=48,
                counts=(3, 0, 99, 8, 1),
            ),
        ),
        Case(
            "pairs, clusters, gated",
            gemm90(
                dtype, cluster=2, num_sms=2, num_stages=6, k=3 * stage, n=272, tile=48,
                order="gate_up_interleaved", gather=False, counts=(3, 0, 99, 8, 1),
            ),
        ),
    ]  # fmt: skip
