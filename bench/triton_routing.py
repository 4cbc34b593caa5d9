"""Routing and its permutation in Triton, with which cumoe's is compared; imported only where it is.

Written for this comparison. A program selects the experts of one token. The permutation is a stable
counting sort in three launches: each program counts the slots of its block by expert, columns of
those counts are summed down the blocks, and each program gives its slots their rows and writes its
share of the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def select_experts(  # type: ignore[no-untyped-def]  # Triton would evaluate annotations
    logits,  # (num_tokens, NUM_EXPERTS), float32
    bias,  # (NUM_EXPERTS,), float32, or None
    ids,  # (num_tokens, TOP_K), int32, best first
    weights,  # (num_tokens, TOP_K), float32
    SIGMOID: tl.constexpr,  # else softmax
    RENORMALIZE: tl.constexpr,
    SCALING: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,  # the power of two above; the same with groups
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,  # the power of two above
):
    """Select a token's best experts of its best groups, by the two largest keys of each."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    low = float("-inf")
    x = tl.load(logits + token * NUM_EXPERTS + expert, mask=expert < NUM_EXPERTS, other=low)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
        keys = tl.where(expert < NUM_EXPERTS, scores, low)
    else:
        scores = tl.exp(x - tl.max(x, axis=0))
        keys = x
    if bias is not None:
        keys += tl.load(bias + expert, mask=expert < NUM_EXPERTS, other=0.0)
    if GROUPS > 1:
        grouped = tl.reshape(keys, (GROUPS, EXPERTS // GROUPS))
        place = tl.arange(0, EXPERTS // GROUPS)[None, :]
        leader = tl.argmax(grouped, axis=1)
        others = tl.where(place == leader[:, None], low, grouped)
        sums = tl.max(grouped, axis=1) + tl.max(others, axis=1)
        group = tl.arange(0, GROUPS)
        same = (sums[None, :] == sums[:, None]) & (group[None, :] < group[:, None])
        ahead = (sums[None, :] > sums[:, None]) | same
        kept = tl.sum(ahead.to(tl.int32), axis=1) < TOP_GROUPS
        keys = tl.reshape(tl.where(kept[:, None], grouped, low), (EXPERTS,))
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), tl.int32)
    values = tl.zeros((SLOTS,), tl.float32)
    for k in range(TOP_K):
        best = tl.argmax(keys, axis=0)
        value = tl.sum(tl.where(expert == best, scores, 0.0), axis=0)
        keys = tl.where(expert == best, low, keys)
        chosen = tl.where(slot == k, best, chosen)
        values = tl.where(slot == k, value, values)
    if RENORMALIZE:
        values = values / (tl.sum(values, axis=0) + 1e-20)
    elif not SIGMOID:
        values = values / tl.sum(scores, axis=0)
    at = token * TOP_K + slot
    tl.store(ids + at, chosen, mask=slot < TOP_K)
    tl.store(weights + at, values * SCALING, mask=slot < TOP_K)


@triton.jit(do_not_specialize=["num_slots", "max_rows"])  # type: ignore[untyped-decorator]
def count_slots(  # type: ignore[no-untyped-def]
    ids,  # (num_slots,), int32
    counts,  # (programs, EXPERTS), int32
    token_idx,  # (max_rows,), int32; -1 in padding, the rest is written later
    num_slots,
    max_rows,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FILL: tl.constexpr,
):
    """Count a block's slots by expert, if there are any, and write FILL rows of padding."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = slot < num_slots
    found = tl.histogram(tl.load(ids + slot, mask=live, other=0), EXPERTS, mask=live)
    tl.store(counts + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), found)
    row = tl.program_id(0) * FILL + tl.arange(0, FILL)
    tl.store(token_idx + row, tl.full((FILL,), -1, tl.int32), mask=row < max_rows)


@triton.jit(do_not_specialize=["num_blocks"])  # type: ignore[untyped-decorator]
def sum_blocks(  # type: ignore[no-untyped-def]
    counts,  # (num_blocks, EXPERTS), int32: in, and out the slots of earlier blocks
    tokens_per_expert,  # (EXPERTS,), int32
    num_blocks,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,  # the power of two above
    COLUMNS: tl.constexpr,
):
    """Sum the counts of COLUMNS experts down the blocks."""
    block = tl.arange(0, BLOCKS)
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = counts + block[:, None] * EXPERTS + expert[None, :]
    live = (block < num_blocks)[:, None]
    own = tl.load(at, mask=live, other=0)
    tl.store(at, tl.cumsum(own, axis=0) - own, mask=live)
    tl.store(tokens_per_expert + expert, tl.sum(own, axis=0))


@triton.jit(do_not_specialize=["num_slots", "max_tiles"])  # type: ignore[untyped-decorator]
def place_slots(  # type: ignore[no-untyped-def]
    ids,  # (num_slots,), int32
    earlier,  # (programs, EXPERTS), int32: slots of earlier blocks
    tokens_per_expert,  # (EXPERTS,), int32
    expert_offsets,  # (NUM_EXPERTS + 1,), int32
    permuted_idx,  # (num_slots,), int32
    token_idx,  # (max_rows,), int32
    tile_expert,  # (max_tiles,), int32
    tile_row_end,  # (max_tiles,), int32
    num_tiles,  # (1,), int32
    num_slots,
    max_tiles,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Give a block's slots their rows, if there are any, and write TILES entries of the tables."""
    expert = tl.arange(0, EXPERTS)
    total = tl.load(tokens_per_expert + expert)
    tiles = (total + TILE - 1) // TILE
    ends = tl.cumsum(tiles, axis=0)
    first = (ends - tiles) * TILE

    lane = tl.arange(0, BLOCK)
    slot = tl.program_id(0) * BLOCK + lane
    live = slot < num_slots
    own = tl.load(ids + slot, mask=live, other=0)
    before = (own[:, None] == own[None, :]) & (lane[:, None] < lane[None, :])
    row = tl.gather(first, own, axis=0) + tl.sum(before.to(tl.int32), axis=0)
    row += tl.load(earlier + tl.program_id(0) * EXPERTS + own, mask=live, other=0)
    tl.store(permuted_idx + slot, row, mask=live)
    tl.store(token_idx + row, slot // TOP_K, mask=live)

    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    owner = tl.sum((ends[:, None] <= tile[None, :]).to(tl.int32), axis=0)
    used = owner < EXPERTS
    held = tl.minimum(owner, EXPERTS - 1)
    row_end = tl.minimum((tile + 1) * TILE, tl.gather(first + total, held, axis=0))
    tl.store(tile_expert + tile, tl.where(used, owner, -1), mask=tile < max_tiles)
    tl.store(tile_row_end + tile, tl.where(used, row_end, 0), mask=tile < max_tiles)
    if tl.program_id(0) == 0:
        tl.store(expert_offsets + expert, first, mask=expert < NUM_EXPERTS)
        tl.store(expert_offsets + NUM_EXPERTS, tl.sum(tiles, axis=0) * TILE)
        tl.store(num_tiles, tl.sum(tiles, axis=0))
