"""Cases of the routing kernels: routing alone, and with the permutation in one launch or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np

from cumoe import kernels_routing
from cumoe.arrays import DTYPES
from cumoe.config import ExpertShard, Routing, TopK
from cumoe.kernels_routing import Experts, Source
from cumoe.permutation import plan_permutation
from cumoe.reference import moe as twin_moe
from cumoe.reference import permutation as twin_permutation
from cumoe.reference import routing
from tests.host.checks import BF16, F32, Case, Host, same_bits


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


def _hard_logits(host: Host, num_experts: int, top_k: int, dtype: str) -> np.ndarray:
    """Return rows whose largest numbers are many, equal, lie badly, or are no numbers."""
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    expert = np.arange(num_experts)
    x = host.rng.standard_normal((20, num_experts)).astype(np.float32)
    x[0] = 0.25
    x[1] = np.where(expert % 3 == 0, 1.0, 0.5)
    x[2] = np.round(x[2])
    x[3], x[4] = np.sort(x[3]), np.sort(x[4])[::-1]
    x[5][expert % 32 == 7] += 9  # all in one lane
    x[6][expert % 32 > 3] = -inf
    x[7][expert >= top_k - 1] = -inf  # fewer finite ones than are chosen
    x[8][expert % 2 == 1] = nan
    x[9][expert < num_experts - top_k + 2] = nan
    x[10] = nan
    x[11] = -inf
    x[12][host.rng.integers(0, num_experts, top_k // 2)] = inf
    x[13][host.rng.permutation(num_experts)[: 2 * top_k]] = inf
    x[14] = inf
    x[15] = np.where(host.rng.random(num_experts) < 0.5, -0.0, 0.0)
    x[16] = (expert - num_experts) * np.float32(1e-10)  # their terms of a softmax are equal
    x[17] = np.where(expert == num_experts - 1, 130.0, x[17])  # these are 0
    x[18] = x[18] * 60
    x[19] = np.where(expert % 40 == 5, 3e38, x[19] * 5e37)
    return host.arena.array(x.astype(DTYPES[dtype]))


def _routing(
    config: Routing,
    num_tokens: int = 9,
    *,
    logits: str = F32,
    bias: str | None = None,
    replay: bool = False,
    hard: bool = False,
) -> Callable[[Host], None]:
    """Routing alone; with `hard`, of 20 rows that are hard to choose from."""
    num_tokens = 20 if hard else num_tokens

    def check(host: Host) -> None:
        x = _logits(host, num_tokens, config.num_experts, logits)
        if hard:
            x = _hard_logits(host, config.num_experts, config.top_k, logits)
        b = None
        if bias is not None:
            numbers = bias if bias in DTYPES else F32
            b = host.normal((config.num_experts,), numbers, 0.3)
            if bias == "no numbers":
                b[1::3], b[2::9], b[5::9] = np.nan, np.inf, -np.inf
            if bias == "negative":
                b -= 9
            if bias == "last":
                b[-1] = 9
        shape = (num_tokens, config.total_top_k)
        ids, weights = host.empty(shape, "int32"), host.empty(shape, config.weights_dtype)
        replay_out = host.empty((num_tokens, config.top_k), "int16") if replay else None
        host.run(kernels_routing.routing_topk(x, b, ids, weights, replay_out, config))
        expected = routing.route(x, config, bias=b)
        same_bits("ids", ids, expected.ids)
        same_bits("weights", weights, expected.weights)
        if replay_out is not None:
            same_bits("replay", replay_out, expected.ids[:, : config.top_k].astype(np.int16))

    return check


def _sigmoids(host: Host) -> None:
    """Every lane's sigmoid of numbers of all magnitudes, as a weight of its own."""
    config = Routing("sigmoid", 32, 32)
    x = host.rng.standard_normal((400, 32)) * np.exp2(host.rng.integers(-26, 5, (400, 1)))
    x[:8] = np.linspace(-20, 20, 256).reshape(8, 32)
    x[8] = 2.0**-23 * np.linspace(-2, 2, 32)
    x[9] = np.linspace(-110, 110, 32)
    logits = host.arena.array(x.astype(np.float32))
    ids, weights = host.empty(x.shape, "int32"), host.empty(x.shape, F32)
    host.run(kernels_routing.routing_topk(logits, None, ids, weights, None, config))
    expected = routing.route(logits, config)
    same_bits("ids", ids, expected.ids)
    same_bits("weights", weights, expected.weights)


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
    Case("deepseek_v3 few groups", _routing(Routing("deepseek_v3", 48, 8, 3, 2), bias=F32)),
    Case("deepseek_v3 groups of one", _routing(Routing("deepseek_v3", 12, 3, 12, 5))),
    Case("deepseek_v3 ungrouped", _routing(Routing("deepseek_v3", 33, 5), bias=BF16)),
    Case(
        "deepseek_v3 groups of one lane",
        _routing(Routing("deepseek_v3", 256, 8, 64, 9), bias=F32, logits=BF16),
    ),
    Case("bias without numbers", _routing(Routing("minimax2", 40, 4), bias="no numbers")),
    Case("negative keys", _routing(Routing("minimax2", 33, 4), bias="negative")),
    Case("many sigmoids", _sigmoids),
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
    Case("default list", _routing(Routing("default", 2048, 32), hard=True)),
    Case("default list, odd", _routing(Routing("default", 1000, 32), logits=BF16, hard=True)),
    Case("default list, many tokens", _routing(Routing("default", 600, 20), 60)),
    Case("top_k list", _routing(Routing("top_k", 2047, 32), hard=True)),
    Case("top_k_sigmoid list", _routing(Routing("top_k_sigmoid", 1000, 20), hard=True)),
    Case(
        "deepseek_v3 list",
        _routing(Routing("deepseek_v3", 512, 22, scaling_factor=5.0), bias=F32, hard=True),
    ),
    Case(
        "minimax2 list",
        _routing(Routing("minimax2", 513, 32, bias_round_bf16=True), bias="no numbers", hard=True),
    ),
    Case("minimax2 list, last", _routing(Routing("minimax2", 513, 32), bias="last", hard=True)),
    Case("renormalize list", _routing(Routing("renormalize", 1025, 8), hard=True)),
    Case("renormalize_naive list", _routing(Routing("renormalize_naive", 130, 32), hard=True)),
    Case("sigmoid list", _routing(Routing("sigmoid", 700, 31), logits=BF16, hard=True)),
    Case("sigmoid_renorm list", _routing(Routing("sigmoid_renorm", 2000, 5), hard=True)),
    Case("hard to sort", _routing(Routing("default", 256, 8), hard=True)),
]  # fmt: skip


# --------------------------------------------------------------------- with the permutation

Cut = dict[str, Any]
"""Constants of kernels_routing, as they are for a case; `CLUSTER` is what the device has."""

ANY = 1 << 20
ONE_BLOCK: Cut = {"BLOCK_TOKENS": ANY, "BLOCK_SLOTS": ANY}
SHIPPED: Cut = {"BLOCK_TOKENS": kernels_routing.BLOCK_TOKENS}


def cluster(blocks: int) -> Cut:
    """Return what makes any call one cluster."""
    cut = {"BLOCK_TOKENS": -1, "BLOCK_SLOTS": -1, "CLUSTER": blocks}
    return {**cut, "CLUSTER_TOKENS": ANY, "CLUSTER_SLOTS": ANY}


def chunks(most: int, min_tokens: int = 1) -> Cut:
    """Return what makes any call two launches."""
    cut = {"BLOCK_TOKENS": -1, "BLOCK_SLOTS": -1, "CLUSTER": 0}
    return {**cut, "MAX_CHUNKS": most, "FEW_CHUNKS": most, "MIN_CHUNK_TOKENS": min_tokens}


def _check(
    host: Host,
    cut: Cut,
    source: Source,
    expected: TopK,
    experts: tuple[int, int, ExpertShard | None],
    tile: int,
) -> None:
    """Run the launches of a source and compare everything that they write."""
    num_experts, num_shared, shard = experts

    def allocate(name: str, shape: Sequence[int], dtype: str) -> np.ndarray:
        array = host.empty(shape, dtype)
        array[...] = 77  # not -1, which is what belongs in padding
        return array

    local = Experts(num_experts, num_shared, shard or ExpertShard(0, num_experts))
    with mock.patch.multiple(kernels_routing, **cut):
        size = cut.get("CLUSTER", kernels_routing.LARGE_CLUSTER["sm_90a"])
        permutation, launches = plan_permutation(source, local, tile, size, allocate)
    names = [launch.spec.name for launch in launches]
    two = cut.get("CLUSTER") == 0
    assert names == (["routing_count", "permute_place"] if two else ["routing_permute"])
    host.run(*launches)
    if source.ids is not None:
        same_bits("ids", source.ids, expected.ids)
        same_bits("weights", source.weights, expected.weights)
    if source.replay is not None:
        same_bits("replay", source.replay, expected.ids[:, : source.top_k].astype(np.int16))
    twin = twin_permutation.group(
        expected.ids,
        num_experts=num_experts,
        num_shared_experts=num_shared,
        shard=local.shard,
        tile=tile,
    )
    for name, got in permutation._asdict().items():
        if name != "tile":
            same_bits(name, got, getattr(twin, name))


def _routed(
    config: Routing,
    num_tokens: int,
    cut: Cut,
    *,
    logits: str = F32,
    bias: str | None = None,
    replay: bool = False,
    shard: ExpertShard | None = None,
    tile: int = 16,
    same: bool = False,
) -> Callable[[Host], None]:
    """From logits; with `same`, all tokens go to the same experts."""

    def check(host: Host) -> None:
        x = _logits(host, max(num_tokens, 1), config.num_experts, logits)
        x[1:] = x[:1] if same else x[1:]
        x = host.arena.array(x[:num_tokens])
        b = None if bias is None else host.normal((config.num_experts,), bias, 0.3)
        shape = (num_tokens, config.total_top_k)
        source = Source(
            host.empty(shape, "int32"),
            host.empty(shape, config.weights_dtype),
            logits=x,
            bias=b,
            replay=host.empty((num_tokens, config.top_k), "int16") if replay else None,
            routing=config,
        )
        experts = (config.num_experts, config.num_shared_experts, shard)
        _check(host, cut, source, routing.route(x, config, bias=b), experts, tile)

    return check


def _given(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    cut: Cut,
    *,
    num_shared: int = 0,
    weights: str | None = None,
    packed: bool = False,
    shard: ExpertShard | None = None,
    tile: int = 16,
    skew: bool = False,
) -> Callable[[Host], None]:
    """From given ids, some of them no expert's and some repeated."""

    def check(host: Host) -> None:
        shape = (num_tokens, top_k)
        ids = host.rng.integers(-2, num_experts + num_shared + 1, shape).astype(np.int32)
        if skew:
            ids[:, 0] = num_experts // 2
            ids[:, 1:] = np.minimum(ids[:, 1:], 3)
        given: np.ndarray = host.arena.array(ids)
        scores = host.rng.standard_normal(shape).astype(DTYPES[weights or BF16])
        if packed:
            words = ids.astype(np.uint32) << np.uint32(16) | scores.view(np.uint16)
            given = host.arena.array(words.view(np.int32))
        weights_in = None if weights is None else host.arena.array(scores)
        written: dict[str, Any] = {}
        expected = TopK(ids, None)
        if packed or weights:
            wide = (num_tokens, top_k + num_shared)
            dtype = weights or BF16
            written = {"ids": host.empty(wide, "int32"), "weights": host.empty(wide, dtype)}
            expected = twin_moe.expand(given, weights_in, num_experts, num_shared)
        source = Source(ids_in=given, weights_in=weights_in, packed=packed, **written)
        _check(host, cut, source, expected, (num_experts, num_shared, shard), tile)

    return check


_SHARED = Routing("deepseek_v3", 64, 8, 8, 4, scaling_factor=2.5, num_shared_experts=1)
_ODD = Routing("renormalize", 33, 5)
_UNEVEN = ExpertShard.from_counts([9, 11, 13], 1)
_EMPTY = ExpertShard.from_counts([33, 0], 1)

ONE_LAUNCH_CASES = [
    Case("no token", _routed(_ODD, 0, ONE_BLOCK)),
    Case("one token", _routed(_SHARED, 1, ONE_BLOCK, bias=F32, replay=True)),
    Case("one slot, one expert", _given(1, 1, 1, ONE_BLOCK, tile=1)),
    Case("block", _routed(_SHARED, 37, ONE_BLOCK, bias=BF16, logits=BF16)),
    Case("block, 2048 experts", _routed(Routing("top_k", 2048, 32), 2, ONE_BLOCK)),
    Case(
        "block, 2048 experts in groups",
        _routed(Routing("deepseek_v3", 2048, 32, 64, 32), 2, ONE_BLOCK),
    ),
    Case("block, one expert for all", _routed(Routing("llama4", 40, 1), 40, ONE_BLOCK, same=True)),
    Case("no token, cluster", _given(0, 5, 33, cluster(4))),
    Case("fewer tokens than blocks", _routed(_ODD, 2, cluster(4), replay=True)),
    Case("cluster", _routed(_SHARED, 37, cluster(4), bias=F32, tile=7)),
    Case("cluster, shard", _routed(_ODD, 37, cluster(3), shard=_UNEVEN)),
    Case("cluster, no expert", _routed(_ODD, 5, cluster(2), shard=_EMPTY)),
    Case(
        "cluster, shared on a shard",
        _routed(
            Routing("sigmoid_renorm", 33, 5, num_shared_experts=2), 20, cluster(3), shard=_UNEVEN,
        ),
    ),
    Case(
        "cluster, only a shared expert",
        _given(20, 3, 8, cluster(2), num_shared=1, shard=ExpertShard.from_counts([8, 0], 1)),
    ),
    Case("cluster, 2048 experts", _routed(Routing("sigmoid", 2048, 32), 3, cluster(2))),
    Case("given", _given(103, 5, 33, ONE_BLOCK)),
    Case("given, packed", _given(61, 5, 33, ONE_BLOCK, num_shared=3, packed=True)),
    Case("given, cluster", _given(103, 5, 33, cluster(4), num_shared=2, weights=F32)),
    Case("given, more columns than lanes", _given(7, 70, 90, cluster(2), weights=BF16)),
    Case("given, all on one expert", _given(260, 2, 40, cluster(3), tile=64, skew=True)),
    Case("more experts than threads", _given(30, 5, 1100, cluster(2))),
    Case("last of one block", _routed(_ODD, kernels_routing.BLOCK_TOKENS, SHIPPED)),
    Case("first of a cluster", _routed(_ODD, kernels_routing.BLOCK_TOKENS + 1, SHIPPED)),
]  # fmt: skip

TWO_LAUNCH_CASES = [
    Case("tails", _routed(_SHARED, 37, chunks(7), bias=F32, tile=7)),
    Case("one token", _routed(_ODD, 1, chunks(7), replay=True)),
    Case("shard", _routed(_ODD, 50, chunks(4), shard=_UNEVEN)),
    Case("no expert", _routed(_ODD, 5, chunks(2), shard=_EMPTY)),
    Case("2048 experts", _routed(Routing("top_k", 2048, 32), 5, chunks(3))),
    Case("more chunks than are under way", _routed(Routing("top_k", 700, 3), 40, chunks(40))),
    Case("given", _given(341, 5, 33, chunks(9), tile=32)),
    Case("given, packed", _given(61, 5, 33, chunks(4, 8), num_shared=3, packed=True)),
    Case(
        "given, shared on a shard",
        _given(103, 5, 33, chunks(5), num_shared=2, weights=F32, shard=_UNEVEN),
    ),
    Case("given, several rounds of a run", _given(400, 5, 33, chunks(2), tile=1)),
    Case("given, all on one expert", _given(520, 2, 40, chunks(3), tile=64, skew=True)),
    Case("more experts than threads", _given(30, 5, 1100, chunks(6))),
]
