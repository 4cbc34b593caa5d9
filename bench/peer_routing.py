"""What surrounds the Triton kernels of :mod:`bench.triton_routing`: buffers, launches, comparison.

torch and Triton are imported on use; on NumPy arrays the kernels run in Triton's interpreter. Times
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench.inputs import to_host
from bench.peer_stages import Stage, StageConfig
from bench.peers import as_torch
from bench.stage_checks import check_scale
from cumoe.config import Array, Routing, RoutingMethod
from cumoe.reference import permutation as twin

TABLES = (
    "tokens_per_expert",
    "expert_offsets",
    "permuted_idx",
    "token_idx",
    "tile_expert",
    "tile_row_end",
    "num_tiles",
)
SIGMOID = (RoutingMethod.DEEPSEEK_V3,)
SOFTMAX = (RoutingMethod.DEFAULT, RoutingMethod.RENORMALIZE)
FILL = 1024
COMPARED = 4096
"""Pairs of a tile and an expert that a program compares."""

SUMMED = 8192
"""Counts that a program sums."""

ALMOST_EQUAL = 250
"""One token in so many may select another expert, whose key differs by rounding alone."""


def round_up_to_power(n: int) -> int:
    """Return the least power of two that is at least `n`, which is 1 or more."""
    return 1 << (n - 1).bit_length()


def routing_stage(
    xp: Any,
    routing: Routing,
    logits: Array,
    bias: Array | None,
    ids: Array | None,
    tile: int,
    ours: Mapping[str, Array],
) -> Stage:
    """Return routing and its permutation in Triton.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    routing : Routing
        Without shared experts; method DeepSeek-V3, default or renormalize.
    logits : array, float32, shape (num_tokens, num_experts)
    bias : array, float32, shape (num_experts,), or None
    ids : array, int32, shape (num_tokens, top_k), or None
        Given ids are permuted only.
    tile : int
    ours : mapping of str to array
        cumoe's results by name, ``ids`` and ``weights`` among them unless ids are given.

    Raises
    ------
    ValueError
        If the routing is another.
    """
    if routing.method not in (*SIGMOID, *SOFTMAX):
        raise ValueError(f"method: expected one of Triton's, got {routing.method!r}")
    shape = (logits.shape[0], routing.top_k)
    selected: tuple[Array, ...] = ()
    if ids is None:
        selected = xp.empty(shape, np.int32), xp.empty(shape, np.float32)
    chosen = selected[0] if ids is None else ids
    tables = {name: xp.empty(ours[name].shape, np.int32) for name in TABLES}
    # Padded to a power of two, as the kernels have it.
    totals = xp.empty(round_up_to_power(routing.num_experts), np.int32)
    tables["tokens_per_expert"] = totals

    def launch(config: StageConfig) -> Callable[[], Any]:
        select = _select(routing, logits, bias, selected, config) if ids is None else None
        permute = _permute(xp, routing, chosen, tables, tile, config)

        def run() -> None:
            if select is not None:
                select()
            permute()

        return run

    def compare() -> None:
        if ids is None:
            _check_selected(selected, (ours["ids"], ours["weights"]))
        want = twin.group(to_host(chosen), num_experts=routing.num_experts, tile=tile)
        for name, table in tables.items():
            expected = np.asarray(getattr(want, name))
            if (to_host(table).ravel()[: expected.size] != expected.ravel()).any():
                raise ArithmeticError(f"{name} is wrong")

    return Stage("slots", routing.num_experts, 1, launch, (*selected, *tables.values()), compare)


def _check_selected(got: tuple[Array, ...], want: tuple[Array, ...]) -> None:
    same = (got[0] == want[0]).all(axis=1)
    if int((~same).sum()) > same.size // ALMOST_EQUAL:
        raise ArithmeticError(f"{int((~same).sum())} of {same.size} tokens have other experts")
    if bool(same.any()):
        check_scale(got[1][same], want[1][same])


def _select(
    routing: Routing, logits: Array, bias: Array | None, out: tuple[Array, ...], config: StageConfig
) -> Callable[[], Any]:
    from bench.triton_routing import select_experts

    sigmoid = routing.method in SIGMOID
    arrays = [as_torch(a) for a in (logits, bias if sigmoid else None, *out)]
    return lambda: select_experts[(logits.shape[0],)](
        *arrays,
        SIGMOID=sigmoid,
        RENORMALIZE=routing.method is not RoutingMethod.DEFAULT,
        SCALING=float(routing.scaling_factor),
        NUM_EXPERTS=routing.num_experts,
        EXPERTS=round_up_to_power(routing.num_experts),
        GROUPS=routing.num_groups,
        TOP_GROUPS=routing.top_groups,
        TOP_K=routing.top_k,
        SLOTS=round_up_to_power(routing.top_k),
        num_warps=config.num_warps,
    )


def _permute(
    xp: Any,
    routing: Routing,
    ids: Array,
    tables: Mapping[str, Array],
    tile: int,
    config: StageConfig,
) -> Callable[[], Any]:
    from bench.triton_routing import count_slots, place_slots, sum_blocks

    block, experts = config.columns, round_up_to_power(routing.num_experts)
    max_rows, max_tiles = tables["token_idx"].size, tables["tile_expert"].size
    num_blocks = -(-ids.size // block)
    height = round_up_to_power(num_blocks)
    columns, tiles = min(experts, max(1, SUMMED // height)), max(1, COMPARED // experts)
    # Blocks past the last slot write what is left of the tables.
    count_grid = (max(num_blocks, -(-max_rows // FILL)),)
    place_grid = (max(num_blocks, -(-max_tiles // tiles)),)
    chosen = as_torch(ids)
    counts = as_torch(xp.empty((count_grid[0], experts), np.int32))
    to = {name: as_torch(table) for name, table in tables.items()}
    totals = to["tokens_per_expert"]
    written = [to[name] for name in TABLES[1:]]

    def run() -> None:
        count_slots[count_grid](
            chosen,
            counts,
            to["token_idx"],
            ids.size,
            max_rows,
            EXPERTS=experts,
            BLOCK=block,
            FILL=FILL,
        )
        sum_blocks[(experts // columns,)](
            counts,
            totals,
            num_blocks,
            EXPERTS=experts,
            BLOCKS=height,
            COLUMNS=columns,
            num_warps=8,
        )
        place_slots[place_grid](
            chosen,
            counts,
            totals,
            *written,
            ids.size,
            max_tiles,
            NUM_EXPERTS=routing.num_experts,
            EXPERTS=experts,
            TOP_K=routing.top_k,
            TILE=tile,
            BLOCK=block,
            TILES=tiles,
        )

    return run
