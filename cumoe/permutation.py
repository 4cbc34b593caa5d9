"""Grouping: sorts the (token, expert) slots into the order in which the expert GEMMs read them.

:func:`group` builds a :class:`~cumoe.config.Permutation`: stable, the same on every run and
backend, with every element written. A slot whose expert is not held here gets row -1 and costs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cumoe import kernels
from cumoe.arrays import as_native, empty, is_device
from cumoe.config import (
    MAX_NUM_EXPERTS,
    MAX_SHARED_EXPERTS,
    Array,
    ExpertShard,
    Permutation,
    TopK,
    check_int,
    max_tiles,
)
from cumoe.kernels_routing import (
    MAX_CHUNK_SLOTS,
    Experts,
    Source,
    cluster_size,
    route_permute,
)
from cumoe.launch import get_device
from cumoe.reference import permutation as reference
from cumoe.validate import check_shard

Allocator = Callable[[str, Sequence[int], str], Array]
"""Gives the array of a name, shape and dtype."""


def group(
    topk: TopK | Any,
    *,
    num_experts: int,
    num_shared_experts: int = 0,
    shard: ExpertShard | None = None,
    tile: int = 1,
) -> Permutation:
    """Sort slots by local expert, stably, each expert's rows padded to a multiple of `tile`.

    Parameters
    ----------
    topk : TopK or array, int32, shape (num_tokens, top_k)
        Global expert ids. Routed experts are below `num_experts`; shared expert j is
        ``num_experts + j``. Any other id is skipped. Every copy of a repeated id is processed.
    num_experts : int
        Routed experts over all ranks.
    num_shared_experts : int
        Shared experts, which follow the routed ones.
    shard : ExpertShard, optional
        The experts held here; by default all.
    tile : int
        Tile height in rows.

    Returns
    -------
    Permutation

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape or range.

    Notes
    -----
    Queued on the current stream; sizes are upper bounds, so there is no host synchronisation.

    Examples
    --------
    >>> import numpy as np
    >>> p = group(np.array([[2, 0], [2, 1], [0, 2]], np.int32), num_experts=4, tile=4)
    >>> p.permuted_idx.tolist(), p.tokens_per_expert.tolist()
    ([[8, 0], [9, 4], [1, 10]], [2, 1, 3, 0])
    """
    ids = as_native(topk.ids if isinstance(topk, TopK) else topk, "topk.ids", ("int32",), ndim=2)
    num_experts = check_int("num_experts", num_experts, 1, MAX_NUM_EXPERTS)
    num_shared = check_int("num_shared_experts", num_shared_experts, 0, MAX_SHARED_EXPERTS)
    tile = check_int("tile", tile, 1, 1 << 16)
    if not 1 <= ids.shape[1] <= MAX_CHUNK_SLOTS:
        raise ValueError(
            f"topk.ids: expected 1 to {MAX_CHUNK_SLOTS} columns, got shape {ids.shape}"
        )
    if ids.size + num_experts * tile >= 1 << 31:
        raise ValueError(f"topk.ids: expected fewer than 2**31 rows, got {ids.size} slots")
    local = check_shard(shard, num_experts)
    if not is_device(ids):
        return reference.group(
            ids,
            num_experts=num_experts,
            num_shared_experts=num_shared,
            shard=local if shard is not None else None,
            tile=tile,
        )

    # NOTE: a launch holds addresses only; scratch memory must live until it is queued.
    arrays: dict[str, Array] = {}

    def allocate(name: str, shape: Sequence[int], dtype: str) -> Array:
        return arrays.setdefault(name, empty(ids, shape, dtype))

    experts = Experts(num_experts, num_shared, local)
    permutation, launches = plan_permutation(
        Source(ids_in=ids), experts, tile, cluster_size(get_device(int(ids.device.id))), allocate
    )
    kernels.run(launches, ids)
    return permutation


def plan_permutation(
    source: Source, experts: Experts, tile: int, cluster: int, allocate: Allocator
) -> tuple[Permutation, list[kernels.Launch]]:
    """Return a permutation's arrays on the device and the launches that fill them.

    The launches write the ids and weights of `source`, too. `cluster` is the device's
    :func:`~cumoe.kernels_routing.cluster_size`.
    """
    num_tokens, columns = source.num_tokens, source.columns
    tiles = max_tiles(num_tokens, columns, experts.num_local, tile)
    shapes: dict[str, tuple[int, ...]] = {
        "tokens_per_expert": (experts.num_local,),
        "expert_offsets": (experts.num_local + 1,),
        "permuted_idx": (num_tokens, columns),
        "token_idx": (tiles * tile,),
        "tile_expert": (tiles,),
        "tile_row_end": (tiles,),
        "num_tiles": (1,),
    }
    arrays = {name: allocate(name, shape, "int32") for name, shape in shapes.items()}
    permutation = Permutation(**arrays, tile=tile)
    return permutation, route_permute(source, experts, permutation, cluster, allocate)
