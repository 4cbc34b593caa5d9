"""Permutation twin: golden examples, a slow loop, the invariants, and shards that add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumoe.config import ExpertShard, Permutation, max_tiles
from cumoe.reference import group

SETTINGS = settings(deadline=None, derandomize=True, max_examples=300)
INT32 = np.iinfo(np.int32)
L3_IDS = np.array([[2, 0], [2, 1], [0, 2]], np.int32)


def slow_group(
    ids: np.ndarray,
    num_experts: int,
    num_shared_experts: int,
    shard: ExpertShard | None,
    tile: int,
) -> dict[str, Any]:
    """Fill every array slot by slot and row by row, in Python ints."""
    num_tokens, top_k = ids.shape
    held = range(num_experts)
    shared_tokens = range(num_tokens)
    if shard is not None:
        held = range(shard.expert_offset, shard.expert_offset + shard.num_local_experts)
        shared_tokens = range(*shard.shared_token_range(num_tokens))
    slots: list[list[tuple[int, int]]] = [[] for _ in range(len(held) + num_shared_experts)]
    for t in range(num_tokens):
        for k in range(top_k):
            g = int(ids[t, k])
            if 0 <= g < num_experts and g in held:
                slots[g - held.start].append((t, k))
            for j in range(num_shared_experts):
                if g == num_experts + j and t in shared_tokens:
                    slots[len(held) + j].append((t, k))
    tiles = max_tiles(num_tokens, top_k, len(slots), tile)
    permuted = [[-1] * top_k for _ in range(num_tokens)]
    token_idx, tile_expert, tile_row_end = [-1] * (tiles * tile), [-1] * tiles, [0] * tiles
    offsets, row, used = [0], 0, 0
    for expert, members in enumerate(slots):
        for i, (t, k) in enumerate(members):
            if i % tile == 0:
                tile_expert[used] = expert
                used += 1
            permuted[t][k] = row
            token_idx[row] = t
            tile_row_end[used - 1] = row + 1
            row += 1
        while row % tile:
            row += 1
        offsets.append(row)
    return {
        "tokens_per_expert": [len(members) for members in slots],
        "expert_offsets": offsets,
        "permuted_idx": permuted,
        "token_idx": token_idx,
        "tile_expert": tile_expert,
        "tile_row_end": tile_row_end,
        "num_tiles": [used],
    }


def check(p: Permutation, expected: dict[str, Any]) -> None:
    assert set(p._fields) == {*expected, "tile"}
    for name, want in expected.items():
        got = getattr(p, name)
        assert got.dtype == np.int32, name
        assert got.flags.c_contiguous, name
        assert got.tolist() == want, name


# --- golden examples ---------------------------------------------------------------------------


def test_golden_all_local() -> None:
    p = group(L3_IDS, num_experts=4, tile=4)
    padding = -1
    check(
        p,
        {
            "tokens_per_expert": [2, 1, 3, 0],
            "expert_offsets": [0, 4, 8, 12, 12],
            "permuted_idx": [[8, 0], [9, 4], [1, 10]],
            "token_idx": [0, 2, *[padding] * 2, 1, *[padding] * 3, 0, 1, 2, *[padding] * 5],
            "tile_expert": [0, 1, 2, -1],
            "tile_row_end": [2, 5, 11, 0],
            "num_tiles": [3],
        },
    )
    assert (p.tile, p.max_tiles, p.max_rows) == (4, 4, 16)


def test_golden_shard() -> None:
    p = group(L3_IDS, num_experts=4, shard=ExpertShard(2, 2, 1, 2), tile=4)
    check(
        p,
        {
            "tokens_per_expert": [3, 0],
            "expert_offsets": [0, 4, 4],
            "permuted_idx": [[0, -1], [1, -1], [-1, 2]],
            "token_idx": [0, 1, 2, *[-1] * 9],
            "tile_expert": [0, -1, -1],
            "tile_row_end": [3, 0, 0],
            "num_tiles": [1],
        },
    )


@pytest.mark.parametrize(("rank", "start", "count"), [(0, 0, 3), (1, 3, 3), (2, 6, 2), (3, 8, 2)])
def test_golden_token_slices(rank: int, start: int, count: int) -> None:
    """Ten tokens on four ranks: each rank runs the shared expert, id 8, for its own tokens."""
    ids = np.tile(np.array([0, 8], np.int32), (10, 1))
    p = group(ids, num_experts=8, num_shared_experts=1, shard=ExpertShard.even(8, rank, 4))
    shared = np.flatnonzero(p.permuted_idx[:, 1] >= 0)
    assert shared.tolist() == list(range(start, start + count))
    assert p.tokens_per_expert.tolist() == [10 if rank == 0 else 0, 0, count]


# --- slow loop and invariants ------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    num_experts, num_shared = draw(st.integers(1, 12)), draw(st.integers(0, 3))
    num_tokens, top_k = draw(st.integers(0, 20)), draw(st.integers(1, 5))
    valid = st.integers(0, num_experts + num_shared - 1)
    foreign = st.sampled_from(
        [-1, -num_experts, num_experts + num_shared, 1 << 16, INT32.min, INT32.max]
    )
    one_id = draw(st.sampled_from([valid, valid | foreign, st.just(0), foreign]))
    ids = draw(st.lists(one_id, min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    shard = None
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, num_experts), min_size=2, max_size=2)))
        world_size = draw(st.integers(1, 5))
        shard = ExpertShard(
            cuts[0],
            cuts[1] - cuts[0],
            draw(st.integers(0, world_size - 1)),
            world_size,
            draw(st.sampled_from(["token_slice", "all", "none"])),
        )
    return {
        "ids": np.array(ids, np.int32).reshape(num_tokens, top_k),
        "num_experts": num_experts,
        "num_shared_experts": num_shared,
        "shard": shard,
        "tile": draw(st.integers(1, 9) | st.sampled_from([16, 64, 128])),
    }


@SETTINGS
@given(cases())
def test_matches_the_slow_loop(case: dict[str, Any]) -> None:
    before = case["ids"].copy()
    p = group(case.pop("ids"), **case)
    check(p, slow_group(before, **case))
    assert p.tile == case["tile"]


def check_invariants(p: Permutation, local: np.ndarray) -> None:
    """Check what makes a permutation usable, from the local expert of each slot (-1: not held)."""
    held = np.argwhere(local >= 0)
    rows = p.permuted_idx[local >= 0]
    assert (p.permuted_idx[local < 0] == -1).all()
    # A bijection between held slots and the rows that name a token.
    assert len(np.unique(rows)) == len(rows) == np.count_nonzero(p.token_idx >= 0)
    assert (p.token_idx[rows] == held[:, 0]).all()
    # Segment membership, alignment, and padding only at the end of a segment.
    experts = local[local >= 0]
    assert (rows >= p.expert_offsets[experts]).all()
    assert (rows < p.expert_offsets[experts] + p.tokens_per_expert[experts]).all()
    assert (p.expert_offsets % p.tile == 0).all()
    assert (-(-p.tokens_per_expert // p.tile) * p.tile == np.diff(p.expert_offsets)).all()
    # Stable: within an expert, rows ascend with the slots.
    for expert in np.unique(experts):
        assert (np.diff(rows[experts == expert]) == 1).all()
    # Tiles: owner and limit describe exactly the valid rows, and the rest is blank.
    used = int(p.num_tiles[0])
    assert used <= p.max_tiles and p.expert_offsets[-1] == used * p.tile
    owners = np.repeat(p.tile_expert[:used], p.tile)
    assert (owners[rows] == experts).all()
    within = np.arange(used * p.tile) < np.repeat(p.tile_row_end[:used], p.tile)
    assert (within == (p.token_idx[: used * p.tile] >= 0)).all()
    first = np.arange(used) * p.tile
    assert ((p.tile_row_end[:used] > first) & (p.tile_row_end[:used] <= first + p.tile)).all()
    assert (p.tile_expert[used:] == -1).all() and (p.tile_row_end[used:] == 0).all()
    assert (p.token_idx[used * p.tile :] == -1).all()


@pytest.mark.parametrize("skew", ["uniform", "hot expert", "one expert"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "tile"),
    [(1, 256, 8, 8), (8, 128, 4, 32), (150, 96, 8, 8), (257, 2048, 32, 1), (4096, 256, 8, 64),
     (1000, 7, 3, 12)],
)  # fmt: skip
def test_invariants(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    tile: int,
    skew: str,
    rng: np.random.Generator,
) -> None:
    ids = rng.integers(0, num_experts, (num_tokens, top_k), dtype=np.int32)
    if skew != "uniform":
        ids[rng.random(ids.shape) < (0.9 if skew == "hot expert" else 1.1)] = num_experts - 1
    check_invariants(group(ids, num_experts=num_experts, tile=tile), ids)
    half = num_experts // 2
    shard = ExpertShard(half, num_experts - half, 1, 2)
    local = np.where(ids >= half, ids - half, -1)
    check_invariants(group(ids, num_experts=num_experts, shard=shard, tile=tile), local)


# --- shards, duplicates, sizes -----------------------------------------------------------------


@pytest.mark.parametrize("shared_experts", ["token_slice", "all"])
@SETTINGS
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 13), st.integers(0, 9))
def test_ranks_cover_each_slot_once(
    shared_experts: str, counts: list[int], num_tokens: int, seed: int
) -> None:
    """Over all ranks of an uneven split, every slot gets one row: routed and shared alike."""
    num_experts, num_shared = sum(counts), 2
    if num_experts == 0:
        counts, num_experts = [*counts, 1], 1
    rng = np.random.default_rng(seed)
    ids = np.empty((num_tokens, 5), np.int32)
    ids[:, :3] = rng.integers(0, num_experts, (num_tokens, 3))
    ids[:, 3:] = num_experts + np.arange(num_shared)
    rows = np.zeros(ids.shape, int)
    for rank in range(len(counts)):
        mode: Any = shared_experts
        if shared_experts == "all" and rank:
            mode = "none"
        shard = ExpertShard.from_counts(counts, rank, mode)
        p = group(ids, num_experts=num_experts, num_shared_experts=num_shared, shard=shard)
        assert p.tokens_per_expert.shape == (counts[rank] + num_shared,)
        rows += p.permuted_idx >= 0
    assert (rows == 1).all()


def test_shard_of_a_middle_rank_is_not_confused_by_shared_ids() -> None:
    """Shared id 8 is local 2 here, although 8 - offset would be 4; a routed 6 or 7 is foreign."""
    ids = np.array([[4, 8], [6, 8], [7, 5]], np.int32)
    shard = ExpertShard(4, 2, 2, 4, "all")
    p = group(ids, num_experts=8, num_shared_experts=1, shard=shard)
    assert p.tokens_per_expert.tolist() == [1, 1, 2]
    assert p.permuted_idx.tolist() == [[0, 2], [-1, 3], [-1, 1]]


def test_routed_ids_past_the_last_expert_are_inert() -> None:
    """A shard said to end past num_experts does not turn shared or foreign ids into routed ones."""
    ids = np.array([[3, 4, 5]], np.int32)
    p = group(ids, num_experts=4, shard=ExpertShard(2, 8), tile=2)
    assert p.permuted_idx.tolist() == [[0, -1, -1]]


def test_every_copy_of_a_repeated_id_gets_a_row() -> None:
    p = group(np.array([[1, 1, 0], [1, 0, 1]], np.int32), num_experts=2, tile=2)
    assert p.permuted_idx.tolist() == [[2, 3, 0], [4, 1, 5]]
    assert p.token_idx[:6].tolist() == [0, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("shard", [None, ExpertShard(1, 2), ExpertShard(0, 0)])
def test_zero_tokens(shard: ExpertShard | None) -> None:
    p = group(np.empty((0, 4), np.int32), num_experts=3, num_shared_experts=1, shard=shard, tile=8)
    num_local = 4 if shard is None else shard.num_local_experts + 1
    assert p.tokens_per_expert.tolist() == [0] * num_local
    assert p.expert_offsets.tolist() == [0] * (num_local + 1)
    assert p.permuted_idx.shape == (0, 4) and p.num_tiles.tolist() == [0]
    assert (p.max_tiles, p.max_rows) == (0, 0)


def test_shard_without_experts() -> None:
    p = group(L3_IDS, num_experts=4, shard=ExpertShard(0, 0), tile=4)
    assert p.num_tiles.tolist() == [0] and p.expert_offsets.tolist() == [0]
    assert (p.permuted_idx == -1).all() and (p.token_idx == -1).all()


@pytest.mark.parametrize("tile", [1, 3, 8])
@pytest.mark.parametrize("num_slots", [1, 3, 4, 5, 11, 12, 13])
def test_max_tiles_is_reached_and_never_exceeded(num_slots: int, tile: int) -> None:
    """One slot for each expert and the rest on the first needs the most tiles."""
    num_experts = 4
    ids = np.zeros((num_slots, 1), np.int32)
    ids[:num_experts, 0] = np.arange(min(num_slots, num_experts))
    p = group(ids, num_experts=num_experts, tile=tile)
    assert p.num_tiles.tolist() == [p.max_tiles]
