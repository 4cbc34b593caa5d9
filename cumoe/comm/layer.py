"""A layer on several ranks: the checks that its ranks fit together, and the sum of their parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cumoe.comm.allreduce import AllReduce, AllReduced, prepare_finalize
from cumoe.comm.epilogue import Epilogue
from cumoe.comm.group import Group, check_group, compare
from cumoe.comm.workspace import Workspace
from cumoe.config import Array, ExpertParts, ExpertShard
from cumoe.layer_call import LayerSpec
from cumoe.layouts import on_device_of


class LayerRanks:
    """The ranks that run a layer together.

    Parameters
    ----------
    group : Group or Workspace
    spec : LayerSpec
        This rank's.
    max_num_tokens : int

    Raises
    ------
    TypeError, ValueError, WorkspaceError, GroupError
        See :class:`cumoe.MoELayer`.
    """

    def __init__(self, group: Any, spec: LayerSpec, max_num_tokens: int) -> None:
        given = isinstance(group, Workspace)
        ranks: Group = group.group if given else group
        check_group(ranks)
        hidden = spec.weights.hidden_size
        check_ranks(ranks, spec, max_num_tokens)
        self._own: Workspace | None = None
        self.workspace: Any = group
        if given:
            have = (group.max_num_tokens, group.hidden_size, group.dtype)
            if have[0] < max_num_tokens or have[1] < hidden or have[2] != "bfloat16":
                raise ValueError(
                    f"group: expected a workspace of {max_num_tokens} tokens of {hidden} bfloat16, "
                    f"got one of {have[0]} of {have[1]} {have[2]}"
                )
        elif spec.weights.is_device:
            with on_device_of(spec.weights.w13):
                self._own = self.workspace = Workspace(ranks, max_num_tokens, hidden)

    def close(self) -> None:
        """Close the workspace that was made here, if one was; collective."""
        if self._own is not None:
            self._own.close()

    def prepare(
        self,
        parts: ExpertParts,
        out: Any,
        *,
        shared_output: Any = None,
        epilogue: Epilogue | None = None,
        outputs: Sequence[str] | None = None,
    ) -> LayerSum:
        """Check the sum of the ranks' parts; they may be written before it runs."""
        plain = epilogue is None and outputs is None
        done = AllReduced(sum=out) if plain and out is not None else out
        op = prepare_finalize(
            *parts,
            self.workspace,
            shared_output=shared_output,
            epilogue=epilogue,
            outputs=outputs,
            out=done,
        )
        return LayerSum(op, plain)


@dataclass(frozen=True, eq=False)
class LayerSum:
    """The last op of a call; `plain` if it returns no more than the sum."""

    op: AllReduce
    plain: bool

    def run(self) -> Array | AllReduced:
        """Run it and return what the caller of the layer gets."""
        done = self.op.run()
        return done.sum if self.plain else done


def check_ranks(group: Group, spec: LayerSpec, max_num_tokens: int) -> None:
    """Raise on every rank unless the ranks hold one layer, each part of it equally often."""
    same = {
        "num_experts": spec.num_experts,
        "num_shared_experts": spec.num_shared,
        "hidden_size": spec.weights.hidden_size,
        "top_k": None if spec.routing is None else spec.routing.top_k,
        "max_num_tokens": max_num_tokens,
        "device": spec.weights.is_device,
    }
    s = spec.shard
    mine = (s.expert_offset, s.num_local_experts, s.rank, s.world_size, s.shared_experts)
    found = group.allgather((same, mine))
    compare("MoELayer(group=...)", [rank for rank, _ in found])
    shards = [ExpertShard(*shard) for _, shard in found]
    held = Counter(
        expert
        for shard in shards
        for expert in range(shard.expert_offset, shard.expert_offset + shard.num_local_experts)
    )
    times = held[0]
    for expert in range(spec.num_experts):
        if held[expert] != times or not times:
            raise ValueError(
                f"shard: expected every expert on equally many ranks, got expert 0 on {times} and "
                f"expert {expert} on {held[expert]}"
            )
    if spec.num_shared:
        _check_shared(shards, times)


def _check_shared(shards: Sequence[ExpertShard], times: int) -> None:
    """Raise unless shared experts see every token as often as routed experts are held."""
    everywhere = sum(shard.shared_experts == "all" for shard in shards)
    slices = Counter(
        (shard.world_size, shard.rank) for shard in shards if shard.shared_experts == "token_slice"
    )
    for world_size in {size for size, _ in slices}:
        counts = [slices[world_size, rank] for rank in range(world_size)]
        if min(counts) != max(counts):
            rank = counts.index(min(counts))
            raise ValueError(
                f"shard: expected the token slices of rank 0 to {world_size - 1} of {world_size} "
                f"equally often, got that of rank {rank} {min(counts)} times of {max(counts)}"
            )
        everywhere += counts[0]
    if everywhere != times:
        raise ValueError(
            f"shard: expected shared experts to see every token {times} times over all ranks, as "
            f"routed experts do, got {everywhere}"
        )
