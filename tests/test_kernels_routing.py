"""How routing cuts tokens into blocks and chunks, on which kernels and workspace rely."""

from __future__ import annotations

import numpy as np
import pytest

from cumoe import ExpertShard, Routing
from cumoe import kernels_routing as routing
from cumoe.kernels_routing import Experts, Source
from cumoe.launch import ARCHS

TOKENS = (*range(1, 600, 7), 1055, 1056, 1057, 4096, 16384, 16385, 131071, 1 << 20, 33_554_431)


def given(num_tokens: int, top_k: int = 8) -> Source:
    """Return given ids that take no memory."""
    return Source(ids_in=np.broadcast_to(np.zeros((1, 1), np.int32), (num_tokens, top_k)))


def from_logits(num_tokens: int, num_experts: int = 256, num_groups: int = 1) -> Source:
    """Return logits that take no memory."""
    wide = np.broadcast_to(np.zeros((1, 1), np.float32), (num_tokens, num_experts))
    ids = np.broadcast_to(np.zeros((1, 1), np.int32), (num_tokens, 8))
    weights = ids.view(np.float32)
    routing_ = Routing("deepseek_v3", num_experts, 8, num_groups, num_groups)
    return Source(ids, weights, logits=wide, routing=routing_)


@pytest.mark.parametrize("columns", [1, 8, 9, 64, 3000, routing.MAX_CHUNK_SLOTS])
def test_chunks(columns: int) -> None:
    """Counts of a chunk fit 16 bits, and the workspace of the most tokens holds those of fewer."""
    most = 0
    for num_tokens in TOKENS:
        tokens = routing.chunk_tokens(num_tokens, columns)
        assert tokens >= 1 and tokens * columns < 1 << 16
        most = max(most, -(-num_tokens // tokens))
        assert most <= routing.max_chunks(num_tokens, columns)


def test_every_sm_has_a_chunk() -> None:
    assert routing.chunk_tokens(1, 8) == routing.MIN_CHUNK_TOKENS
    assert [routing.chunk_tokens(t, 8) for t in (257, 1024, 1025)] == [5, 16, 8]
    assert routing.chunk_tokens(16384, 8) == 125
    assert routing.MAX_CHUNKS == -(-16384 // 125)


@pytest.mark.parametrize(
    ("arch", "num_sms", "cluster"),
    [("sm_80", 108, 0), ("sm_89", 142, 0), ("sm_90a", 132, 16), ("sm_90a", 78, 8)]
    + [("sm_100a", 148, 8), ("sm_120a", 170, 8)],
)
def test_launches(arch: str, num_sms: int, cluster: int) -> None:
    """One block, a cluster where there are any, then two launches."""
    assert routing.cluster_size_of(arch, num_sms) == cluster
    specs = routing.route_permute_specs(from_logits(1), arch)
    compiled = {dict(s.defines)["CLUSTER"] for s in specs if s.name == "routing_permute"}
    assert {1, cluster or 1} <= compiled
    one, each = routing.BLOCK_TOKENS * (1 if cluster else 2), routing.CLUSTER_TOKENS
    slots, slots_each = routing.BLOCK_SLOTS // 8, routing.CLUSTER_SLOTS // 8
    small = min(cluster, routing.CLUSTER)
    for source, first, more in ((from_logits, one, each), (given, slots, slots_each)):
        assert [routing.num_blocks(source(t), cluster) for t in (0, 1, first)] == [1, 1, 1]
        few = small if source is from_logits else cluster
        assert routing.num_blocks(source(first + 1), cluster) == few
        last = cluster * more or first
        assert routing.num_blocks(source(last), cluster) == (cluster or 1)
        assert routing.num_blocks(source(last + 1), cluster) == 0


def test_small_cluster() -> None:
    most = routing.CLUSTER * routing.SMALL_CLUSTER_TOKENS
    assert [routing.num_blocks(from_logits(t), 16) for t in (most, most + 1)] == [8, 16]
    assert [routing.num_blocks(from_logits(t), 8) for t in (most, most + 1)] == [8, 8]


@pytest.mark.parametrize("num_local", [0, 1, 2, 33, 2048])
def test_words(num_local: int) -> None:
    """Two experts a word, and a word where there is none."""
    shard = ExpertShard(0, num_local)
    assert Experts(2048, 0, shard).num_words == max(1, -(-num_local // 2))
    assert Experts(2048, 3, shard).num_words == -(-(num_local + 3) // 2)


@pytest.mark.parametrize("num_experts", [8, 384, 385, 1024, 1025, 2048])
def test_shared_memory(num_experts: int) -> None:
    """The largest launches fit every architecture with clusters; a block its registers."""
    limit = min(ARCHS.values())
    experts = Experts(num_experts, 32, ExpertShard(0, num_experts))
    logits, ids = from_logits(1, num_experts), given(1)
    for source, slots in ((logits, 64 * routing.CLUSTER_TOKENS), (ids, routing.CLUSTER_SLOTS)):
        warps = routing._permute_warps(source)
        own = experts.num_words + 5 * slots // 2
        lists = 128 * warps if source is logits else 0
        assert 4 * (routing._permute_words(experts, warps) + own + lists) <= limit
    assert 4 * routing._permute_words(experts, routing.PLACE_WARPS) <= limit
    # A lane's numbers, twice where all are sorted, and what else it needs, of the 65536 registers.
    each = -(-num_experts // 32)
    for groups, copies in ((1, 1), (num_experts, 2)):
        source = from_logits(1, num_experts, groups)
        for warps in (routing._permute_warps(source), routing._count_warps(source)):
            assert 32 * warps * (copies * each + 64 // copies) <= 1 << 16


@pytest.mark.parametrize("num_experts", [8, 384, 1024, 2048])
@pytest.mark.parametrize(("arch", "cluster"), [("sm_90a", 16), ("sm_100a", 8), ("sm_120a", 8)])
def test_cluster_memory(arch: str, cluster: int, num_experts: int) -> None:
    """A cluster's counts fit beside the static memory of its blocks, or there are two launches."""
    experts = Experts(num_experts, 32, ExpertShard(0, num_experts))
    for tokens in (routing.BLOCK_TOKENS + 1, 64, 128):
        for source in (from_logits(tokens, num_experts), given(tokens)):
            blocks = routing.one_launch_blocks(source, experts, cluster)
            lists = 512 * routing._permute_warps(source) if source.routing is not None else 0
            if blocks:
                total = routing._permute_bytes(source, experts, blocks) + lists + 16
                assert total <= ARCHS[arch]
            elif tokens <= 64:
                assert num_experts == 2048 and arch != "sm_90a"


def test_many_experts() -> None:
    """A block of a cluster has fewer tokens where each is more work."""
    most = 16 * routing.CLUSTER_TOKENS
    for num_experts, last in ((routing.CLUSTER_EXPERTS, most), (512, most // 2)):
        tokens = (last, last + 1)
        blocks = [routing.num_blocks(from_logits(t, num_experts), 16) for t in tokens]
        assert blocks == [16, 0]
