"""From expert ids to expert-ordered rows: the arrays that the grouped GEMMs and the finalize walk.

Bit-exact model of the grouping kernels. The order is stable, so it is the same on every run, and
every element of every array is written. Slots of experts that are not held here, invalid ids
included, get no row. Knows nothing of weights or logits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cumoe.config import Array, ExpertShard, Permutation, max_tiles


def group(
    ids: Array,
    *,
    num_experts: int,
    num_shared_experts: int = 0,
    shard: ExpertShard | None = None,
    tile: int = 1,
) -> Permutation:
    """Give every slot whose expert is held here a row, expert by expert.

    The arrays are defined in :class:`cumoe.config.Permutation`. Local experts are the shard's
    routed experts in ascending order of their ids, then the shared experts.

    Parameters
    ----------
    ids : numpy.ndarray, int32, shape (num_tokens, top_k)
        Global ids: routed ``0 .. num_experts - 1``, shared ``num_experts + j``. Any other id is
        inert. Each copy of an id that occurs twice in a row gets its own row.
    num_experts : int
        Routed experts over all ranks.
    num_shared_experts : int
    shard : ExpertShard, optional
        The routed experts held here, and the tokens whose shared experts are evaluated here. All
        experts and all tokens if None.
    tile : int
        Tile height in rows, at least 1. Need not be a power of two.

    Returns
    -------
    Permutation
    """
    ids = np.asarray(ids)
    num_tokens, top_k = ids.shape
    num_routed = num_experts if shard is None else shard.num_local_experts
    num_local = num_routed + num_shared_experts
    local = _local_experts(ids, num_experts, num_shared_experts, shard).reshape(-1)

    # Slots in row order: by expert, then by slot. A stable sort keeps the slots ascending.
    slots = np.flatnonzero(local >= 0)
    slots = slots[np.argsort(local[slots], kind="stable")]
    experts = local[slots]
    counts = np.bincount(experts, minlength=num_local)
    tiles = -(-counts // tile)
    tile_offsets = np.concatenate([[0], np.cumsum(tiles)])
    first_slot = np.cumsum(counts) - counts
    rows = tile_offsets[experts] * tile + np.arange(slots.size) - first_slot[experts]

    num_tiles = max_tiles(num_tokens, top_k, num_local, tile)
    permuted_idx = np.full(num_tokens * top_k, -1, dtype=np.int32)
    permuted_idx[slots] = rows
    token_idx = np.full(num_tiles * tile, -1, dtype=np.int32)
    token_idx[rows] = slots // max(top_k, 1)

    used = int(tile_offsets[-1])
    tile_expert = np.full(num_tiles, -1, dtype=np.int32)
    tile_row_end = np.zeros(num_tiles, dtype=np.int32)
    owners = np.repeat(np.arange(num_local), tiles)
    tile_expert[:used] = owners
    last_row = (tile_offsets[:-1] * tile + counts)[owners]
    tile_row_end[:used] = np.minimum(np.arange(1, used + 1) * tile, last_row)
    return Permutation(
        tokens_per_expert=counts.astype(np.int32),
        expert_offsets=(tile_offsets * tile).astype(np.int32),
        permuted_idx=permuted_idx.reshape(num_tokens, top_k),
        token_idx=token_idx,
        tile_expert=tile_expert,
        tile_row_end=tile_row_end,
        num_tiles=np.array([used], dtype=np.int32),
        tile=tile,
    )


def _local_experts(
    ids: NDArray[np.int32], num_experts: int, num_shared_experts: int, shard: ExpertShard | None
) -> NDArray[np.int64]:
    """Return the local expert of every slot, -1 where it is not held here."""
    num_tokens = ids.shape[0]
    if shard is None:
        shard = ExpertShard(0, num_experts, shared_experts="all")
    wide = ids.astype(np.int64)
    local = wide - shard.expert_offset
    held = (wide >= 0) & (wide < num_experts) & (local >= 0) & (local < shard.num_local_experts)
    start, stop = shard.shared_token_range(num_tokens)
    tokens = np.arange(num_tokens)[:, None]
    shared = (wide >= num_experts) & (wide < num_experts + num_shared_experts)
    shared &= (tokens >= start) & (tokens < stop)
    local[shared] = wide[shared] - num_experts + shard.num_local_experts
    return np.where(held | shared, local, -1)
