"""Every kernel with the cases it runs on the CPU, against its NumPy twin.

``CASES`` has an entry for each ``.cu`` file of ``cumoe/cu``; a test fails if one is missing. A case
is a function of :class:`~tests.host.checks.Host`, which runs launches and holds their arrays. Sizes
are small and awkward.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cumoe import kernels
from cumoe.arrays import DTYPES
from cumoe.config import ExpertShard, Routing
from cumoe.permutation import plan_group
from cumoe.reference import moe as twin_moe
from cumoe.reference import permutation as twin_permutation
from cumoe.reference import routing
from tests.host.activation_cases import ACTIVATION_CASES
from tests.host.allreduce_cases import ALLREDUCE_CASES, TWO_SHOT_CASES
from tests.host.checks import (
    BF16,
    F16,
    F32,
    Case,
    Host,
    check,
    same_bits,
)
from tests.host.finalize_cases import FINALIZE_CASES
from tests.host.gemm_cases import GEMM90_BF16_CASES, GEMM90_FP8_CASES, GEMM_CASES
from tests.host.quantize_cases import QUANTIZE_CASES

__all__ = ["BF16", "CASES", "F16", "F32", "Case", "Host", "check"]

# ------------------------------------------------------------------------------------- routing_topk


def _logits(host: Host, num_tokens: int, num_experts: int, dtype: str) -> np.ndarray:
    """Return logits with ties, infinities, NaN and rows of one value."""
    x = host.rng.standard_normal((num_tokens, num_experts)).astype(np.float32) * 3
    x[0] = np.round(x[0])
    specials = [np.nan, -np.inf, np.inf, -0.0, 0.0, 30.0, -30.0]
    for row in range(1, min(num_tokens, 4)):
        at = host.rng.integers(0, num_experts, len(specials) - row)
        x[row, at] = specials[row:] if row > 1 else specials[: at.size]
    if num_tokens > 4:
        x[4] = 0.0
    if num_tokens > 5:
        x[5] = -np.inf
    if num_tokens > 6:
        x[6] = np.nan
    return host.arena.array(x.astype(DTYPES[dtype]))


def _routing(
    config: Routing,
    num_tokens: int = 9,
    *,
    logits: str = F32,
    bias: str | None = None,
    replay: bool = False,
) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        x = _logits(host, num_tokens, config.num_experts, logits)
        b = None if bias is None else host.normal((config.num_experts,), bias, 0.3)
        shape = (num_tokens, config.total_top_k)
        ids, weights = host.empty(shape, "int32"), host.empty(shape, config.weights_dtype)
        replay_out = host.empty((num_tokens, config.top_k), "int16") if replay else None
        host.run(kernels.routing_topk(x, b, ids, weights, replay_out, config))
        expected = routing.route(x, config, bias=b)
        same_bits("ids", ids, expected.ids)
        same_bits("weights", weights, expected.weights)
        if replay_out is not None:
            same_bits("replay", replay_out, expected.ids[:, : config.top_k].astype(np.int16))

    return check


ROUTING_CASES = [
    Case("default", _routing(Routing("default", 33, 5))),
    Case("default one expert", _routing(Routing("default", 1, 1), 1)),
    Case("renormalize shared", _routing(Routing("renormalize", 33, 5, num_shared_experts=2))),
    Case(
        "deepseek_v3 groups",
        _routing(
            Routing(
                "deepseek_v3", 64, 8, 8, 4, scaling_factor=2.5, num_shared_experts=1,
            ),
            bias=F32,
        ),
    ),
    Case(
        "deepseek_v3 odd groups",
        _routing(
            Routing("deepseek_v3", 105, 6, 35, 3, weights_dtype=BF16, bias_round_bf16=True),
            bias=F32,
            replay=True,
        ),
    ),
    Case("deepseek_v3 groups of one", _routing(Routing("deepseek_v3", 12, 3, 12, 5))),
    Case("deepseek_v3 ungrouped", _routing(Routing("deepseek_v3", 33, 5), bias=BF16)),
    Case("llama4", _routing(Routing("llama4", 16, 1), logits=BF16)),
    Case("renormalize_naive", _routing(Routing("renormalize_naive", 70, 32), logits=BF16)),
    Case("top_k", _routing(Routing("top_k", 33, 5, scaling_factor=0.5), replay=True)),
    Case("sigmoid_renorm", _routing(Routing("sigmoid_renorm", 33, 5))),
    Case(
        "sigmoid_renorm not normalized",
        _routing(Routing("sigmoid_renorm", 33, 5, normalize=False, weights_dtype=BF16)),
    ),
    Case("minimax2", _routing(Routing("minimax2", 40, 4, scaling_factor=1.5), bias=F32)),
    Case("sigmoid", _routing(Routing("sigmoid", 33, 33 - 1), 3)),
    Case("top_k_sigmoid all experts", _routing(Routing("top_k_sigmoid", 5, 5), 2)),
]  # fmt: skip


# -------------------------------------------------------------------------------------- topk_expand


def _expand(
    num_tokens: int, top_k: int, num_shared: int, dtype: str | None, num_experts: int = 33
) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        shape = (num_tokens, top_k)
        ids = host.rng.integers(-2, num_experts + 4, shape).astype(np.int32)
        weights = host.rng.standard_normal(shape).astype(DTYPES[dtype or BF16])
        given: np.ndarray = host.arena.array(ids)
        if dtype is None:
            words = ids.astype(np.uint32) << np.uint32(16) | weights.view(np.uint16)
            given = host.arena.array(words.view(np.int32))
        weights_in = None if dtype is None else host.arena.array(weights)
        wide = (num_tokens, top_k + num_shared)
        out_ids, out_weights = host.empty(wide, "int32"), host.empty(wide, dtype or BF16)
        host.run(kernels.topk_expand(given, weights_in, out_ids, out_weights, num_experts))
        expected = twin_moe.expand(given, weights_in, num_experts, num_shared)
        same_bits("ids", out_ids, expected.ids)
        same_bits("weights", out_weights, expected.weights)

    return check


EXPAND_CASES = [
    Case("packed", _expand(7, 5, 0, None)),
    Case("packed shared", _expand(61, 5, 3, None)),
    Case("float32 shared", _expand(1, 1, 1, F32)),
    Case("bfloat16 shared", _expand(53, 5, 2, BF16)),
]


# ---------------------------------------------------------------------------------------- permute_*


def _permute(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    num_shared: int = 0,
    shard: ExpertShard | None = None,
    tile: int = 16,
    skew: bool = False,
) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        shape = (num_tokens, top_k)
        ids = host.rng.integers(-2, num_experts + num_shared + 1, shape).astype(np.int32)
        if skew:
            ids[:, 0] = num_experts // 2
            ids[:, 1:] = np.minimum(ids[:, 1:], 3)
        ids = host.arena.array(ids)
        local = shard or ExpertShard(0, num_experts)
        permutation, launches = plan_group(ids, num_experts, num_shared, local, tile, host.take)
        host.run(*launches)
        expected = twin_permutation.group(
            ids, num_experts=num_experts, num_shared_experts=num_shared, shard=local, tile=tile
        )
        for name, got in permutation._asdict().items():
            if name != "tile":
                same_bits(name, got, getattr(expected, name))

    return check


PERMUTE_CASES = [
    Case("no token", _permute(0, 5, 33)),
    Case("one token", _permute(1, 5, 33)),
    Case("one slot, one expert", _permute(1, 1, 1, tile=1)),
    Case("tails", _permute(37, 5, 33)),
    Case("several chunks", _permute(341, 5, 33, tile=32)),
    Case("shared experts", _permute(103, 5, 33, num_shared=2, tile=7)),
    Case(
        "shard",
        _permute(103, 5, 33, num_shared=2, shard=ExpertShard.from_counts([9, 11, 13], 1)),
    ),
    Case(
        "shard without experts",
        _permute(20, 3, 8, num_shared=1, shard=ExpertShard.from_counts([8, 0], 1)),
    ),
    Case("all tokens on one expert", _permute(520, 2, 40, tile=64, skew=True)),
    Case("more experts than threads", _permute(30, 5, 1100, tile=16)),
]


CASES: dict[str, list[Case]] = {
    "routing_topk": ROUTING_CASES,
    "topk_expand": EXPAND_CASES,
    "permute_count": PERMUTE_CASES,
    "permute_scan": PERMUTE_CASES,
    "permute_place": PERMUTE_CASES,
    **QUANTIZE_CASES,
    "activation": ACTIVATION_CASES,
    "finalize": FINALIZE_CASES,
    "allreduce_one_shot": ALLREDUCE_CASES,
    "allreduce_two_shot": TWO_SHOT_CASES,
    "sm80_grouped_gemm": GEMM_CASES,
    "sm90_bf16_grouped_gemm": GEMM90_BF16_CASES,
    "sm90_fp8_grouped_gemm": GEMM90_FP8_CASES,
}
"""Kernel to cases; the three permutation kernels run one after the other in each of theirs."""
