"""Debug mode: the ranks of an op compare what they are about to run, before any of them runs it.

Only what must be the same on every rank is compared. What a rank sums up by itself is its own: its
rows and weights, how many slots or experts, whether there is a shared output.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from cumoe.arrays import dtype_name
from cumoe.comm.group import Group, GroupError, allgather_within, compare
from cumoe.kernels_comm import Tokens
from cumoe.launch import Device

__all__ = ["Comparison", "compare_calls", "describe", "is_asked_for"]

OPS = {"rows": "finalize_allreduce", "experts": "reduce_allreduce", "plain": "allreduce"}
"""The policy of `Tokens` to the op."""

_WHAT = "an all-reduce"


def is_asked_for() -> bool:
    """Tell whether ``CUMOE_DEBUG_COMM`` turns the debug mode on."""
    return os.environ.get("CUMOE_DEBUG_COMM", "") not in ("", "0")


def describe(tokens: Tokens, outputs: tuple[str, ...]) -> dict[str, Any]:
    """Return what must be the same on every rank, by the names of the arguments; plain data."""
    return {
        "op": OPS[tokens.policy],
        "num_tokens": tokens.num_tokens,
        "hidden_size": tokens.hidden_size,
        "dtype": dtype_name(tokens.rows),
        "outputs": outputs,
        "routed_scaling_factor": tokens.routed_scaling_factor,
        "epilogue.residual": tokens.residual is not None,
        "epilogue.norm_weight": tokens.norm_weight is not None,
        "epilogue.eps": tokens.eps,
        "epilogue.weight_offset": tokens.weight_offset,
        "epilogue.quantization": tokens.quantize,
        "epilogue.quantization.group_size": int(tokens.group_size),
    }


def compare_calls(group: Group, call: dict[str, Any], timeout_s: float) -> None:
    """Raise on every rank unless all are about to run the same; collective.

    Raises
    ------
    ValueError
        Naming what differs, two ranks and their values.
    GroupError
        If a rank does not come in time, has gone, or does something else with the group.
    """
    found = allgather_within(group, (_WHAT, "", call), timeout_s)
    for rank, other in enumerate(found):
        if not (isinstance(other, tuple) and len(other) == 3 and other[0] == _WHAT):
            raise GroupError(f"rank {group.rank} is in {call['op']}, rank {rank} is not")
    calls = [other[2] for other in found]
    for name in call:
        what = name if name == "op" else f"{name} of {call['op']}"
        compare(what, [other[name] for other in calls])


@dataclass(frozen=True, eq=False)
class Comparison:
    """The comparison of an op as the first item of its launches.

    Attributes
    ----------
    group, call, timeout_s
        Of :func:`compare_calls`.
    """

    group: Group
    call: dict[str, Any]
    timeout_s: float

    def prepare(self, device: Device) -> None:
        """Do nothing: ranks compare when they run."""

    def run(self, device: Device, stream_ptr: int) -> None:
        """Compare; queues nothing, so it is not part of a graph that is captured."""
        compare_calls(self.group, self.call, self.timeout_s)
