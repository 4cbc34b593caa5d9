"""The ranks of a bench: their group, their memory, NCCL, and an end for those that hang.

Owns what the ranks share and no figure: a rank's arrays, the protocol that is forced on the
all-reduces, and what the peers' all-reduce is. On NumPy the same calls go through the group.
CuPy is imported on use.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.harness import measure_ranks
from cumoe.arrays import DTYPES, dtype_name
from cumoe.comm import SingleGroup, Workspace, layout
from cumoe.comm.group import ExchangeGroup
from cumoe.config import Array
from cumoe.kernels_comm import allreduce_spec, select_config
from cumoe.launch import KernelSpec, get_device, warmup

PROTOCOLS = ("auto", "one_shot", "two_shot", "mixed")
"""Shipped thresholds; one protocol for all numbers of tokens; one-shot up to an eighth of them."""

Kernel = tuple[str, str | None, int, int]
"""Input policy, quantisation, ranks, tokens."""

COPY_BYTES = 128 << 20
_ARRAY = "ndarray"


class ArrayGroup(ExchangeGroup):
    """A group that carries NumPy arrays, over one that carries plain data."""

    def __init__(self, group: ExchangeGroup) -> None:
        self.rank, self.size, self.timeout_s = group.rank, group.size, group.timeout_s
        self._group = group

    def exchange(self, call: str, obj: Any, timeout_s: float | None = None) -> list[Any]:
        """Return every rank's `obj`."""
        if isinstance(obj, np.ndarray):
            obj = (_ARRAY, dtype_name(obj), obj.shape, obj.tobytes())
        found = self._group.exchange(call, obj, timeout_s)
        return [_unpack(value) for value in found]


def _unpack(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 4 and str(value[0]) == _ARRAY:
        _, dtype, shape, data = value
        return np.frombuffer(data, DTYPES[dtype]).reshape(shape)
    return value


class Nccl:
    """NCCL's all-reduce of bfloat16, on CuPy's current stream.

    Parameters
    ----------
    group : Group
        Collective. Each rank with its GPU current, and ``NCCL_NVLS_ENABLE`` set as it shall be.
    """

    name = "nccl"

    def __init__(self, group: Any) -> None:
        from cupy.cuda import nccl

        own = nccl.get_unique_id() if group.rank == 0 else None
        unique_id = group.bcast(own)
        self.version = int(nccl.get_version())
        self._kinds = (nccl.NCCL_BFLOAT16, nccl.NCCL_SUM)
        self._comm = nccl.NcclCommunicator(group.size, unique_id, group.rank)

    def __call__(self, source: Array, target: Array) -> None:
        """Queue the sum of all ranks' `source` to `target`."""
        import cupy

        stream = cupy.cuda.get_current_stream().ptr
        self._comm.allReduce(source.data.ptr, target.data.ptr, source.size, *self._kinds, stream)

    def close(self) -> None:
        """Give the communicator up; graphs that hold its work are gone by then. Collective."""
        self._comm.destroy()


class HostSum:
    """The same on NumPy: float32, by ascending rank, rounded once."""

    name = "numpy"

    def __init__(self, group: Any) -> None:
        self._group = group

    def __call__(self, source: Array, target: Array) -> None:
        """Write the sum of all ranks' `source` to `target`."""
        total = np.zeros(source.shape, np.float32)
        for part in self._group.allgather(source):
            total += part.astype(np.float32)
        target[...] = total.astype(target.dtype)

    def close(self) -> None:
        """Do nothing."""


@dataclass(eq=False)
class Ranks:
    """What a rank has of all of them.

    Attributes
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    group : Group
        Carries NumPy arrays.
    memory : Workspace or Group
        What an all-reduce takes: the peers' memory, or on NumPy the group.
    alone : Workspace or Group
        The same of one rank.
    reducer : Nccl, HostSum or None
        None where NCCL is not installed or not wanted.
    max_num_tokens, hidden_size : int
        Largest all-reduce.
    """

    xp: Any
    group: Any
    memory: Any
    alone: Any
    reducer: Nccl | HostSum | None
    max_num_tokens: int
    hidden_size: int

    @property
    def on_device(self) -> bool:
        """Whether arrays are CuPy's."""
        return self.xp is not np

    @property
    def one_shot_tokens(self) -> int:
        """Most tokens of bfloat16 that go one-shot."""
        at = layout.block_layout(self.group.size, self.max_num_tokens, self.hidden_size)
        return at.slot_bytes // (2 * self.hidden_size)

    def protocol(self, num_tokens: int) -> str:
        """Return by which protocol a number of tokens goes."""
        if self.group.size == 1:
            return "none"
        return "one_shot" if num_tokens <= self.one_shot_tokens else "two_shot"

    def agree(self, problem: str | None) -> None:
        """Raise ArithmeticError on every rank if one has a problem; collective."""
        for rank, text in enumerate(self.group.allgather(problem)):
            if text is not None:
                raise ArithmeticError(f"{text} (rank {rank})")


@contextlib.contextmanager
def open_ranks(
    xp: Any,
    group: Any,
    max_num_tokens: int,
    hidden_size: int,
    protocol: str,
    *,
    peers: bool = True,
) -> Iterator[Ranks]:
    """Make the memory of the ranks, and NCCL's communicator; collective.

    Parameters
    ----------
    xp : module
    group : Group
        Of this package.
    max_num_tokens, hidden_size : int
    protocol : {"auto", "one_shot", "two_shot", "mixed"}
        Set for the whole process, before the memory is made.
    peers : bool
        False makes no communicator.

    Yields
    ------
    Ranks
    """
    group = ArrayGroup(group)
    force_protocol(protocol, group.size, max_num_tokens * hidden_size * 2)
    if xp is np:
        alone = SingleGroup()
        host = HostSum(group) if peers else None
        yield Ranks(xp, group, group, alone, host, max_num_tokens, hidden_size)
        return
    reducer = _nccl(group) if peers else None
    sizes = (max_num_tokens, hidden_size)
    with Workspace(group, *sizes) as memory, Workspace(SingleGroup(), *sizes) as single:
        yield Ranks(xp, group, memory, single, reducer, *sizes)
        if reducer is not None:
            group.barrier()
            reducer.close()


def _nccl(group: Any) -> Nccl | None:
    """Return NCCL if every rank has it."""
    from cupy.cuda import nccl

    have = group.allgather(bool(nccl.available))
    if not all(have):
        if group.rank == 0:
            print("NCCL is not installed: no peers", flush=True)
        return None
    return Nccl(group)


def force_protocol(protocol: str, size: int, max_bytes: int) -> None:
    """Set the threshold of this process between one-shot and two-shot; see :data:`PROTOCOLS`."""
    limits = {"one_shot": 1 << 62, "two_shot": 0, "mixed": max_bytes // 8}
    if protocol in limits:
        layout.ONE_SHOT_BYTES[size] = limits[protocol]


def peer_copy_rates(ranks: Ranks, num_bytes: int = COPY_BYTES) -> dict[str, float]:
    """Measure the roof of the links: TB/s of a copy from a rank's memory to a peer's workspace.

    Returns
    -------
    dict
        ``peer_copy_tbps``, rank 0 to rank 1 alone, and ``peer_copy_all_tbps``, what each rank
        sends while every rank copies to the next: with two ranks both directions at once. Empty
        on NumPy and for one rank.
    """
    group = ranks.group
    if not ranks.on_device or group.size == 1:
        return {}
    import cupy

    # NOTE: a workspace of its own, since those of all-reduces hold sentinels between two calls.
    with Workspace(group, 4096, 7168) as target:
        size = min(num_bytes, target.num_bytes)
        block = np.random.default_rng(group.rank).integers(0, 256, size, dtype=np.uint8)
        source = cupy.asarray(block)
        peer = target.buffers[(group.rank + 1) % group.size]
        runtime = cupy.cuda.runtime

        def copy(i: int) -> None:
            stream = cupy.cuda.get_current_stream().ptr
            runtime.memcpyAsync(peer, source.data.ptr, size, runtime.memcpyDefault, stream)

        def copy_one(i: int) -> None:
            if group.rank == 0:
                copy(i)

        both = measure_ranks({"one": copy_one, "all": copy}, group, calls=10, graph=False)
    return {
        "peer_copy_tbps": size / both["one"].us * 1e-6,
        "peer_copy_all_tbps": size / both["all"].us * 1e-6,
    }


def compile_kernels(ranks: Ranks, kernels: Iterable[Kernel]) -> None:
    """Compile all-reduce kernels into the cache, on all CPUs at once; collective."""
    if ranks.on_device and ranks.group.rank == 0:
        device = get_device(ranks.xp.cuda.Device().id)
        warmup(specs_of(ranks, kernels, device), [device.arch])
    ranks.group.barrier()


def specs_of(ranks: Ranks, kernels: Iterable[Kernel], device: Any) -> list[KernelSpec]:
    """Return the compiled form of each kernel on a device."""
    max_cluster = 8 if device.compute_capability >= (9, 0) else 1
    found: dict[KernelSpec, None] = {}
    for policy, quantize, size, tokens in kernels:
        config = select_config(tokens, ranks.hidden_size, device.num_sms, max_cluster)
        two_shot = size > 1 and ranks.protocol(tokens) == "two_shot"
        weights = None if policy == "plain" else "float32"
        spec = allreduce_spec(
            policy, "bfloat16", weights, quantize, size, config, two_shot=two_shot
        )
        found[spec] = None
    return list(found)


class Watchdog:
    """Ends the process, saying where every thread was, when nothing has been done for a while.

    It is Python's ``faulthandler``, whose thread needs no interpreter lock; so a rank also ends
    whose main thread never comes back from CUDA.

    Parameters
    ----------
    seconds : float
        0 never ends anything.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def progress(self) -> None:
        """Start the time anew."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=2)

    def stop(self) -> None:
        """Watch no more."""
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()


def rank_command(module: str, arguments: Sequence[str]) -> list[str]:
    """Return what starts one rank of a bench, for :func:`cumoe.cli.ranks.start`."""
    # NVLink multicast is not used by this package, and not by the NCCL beside it.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    return [sys.executable, "-u", "-m", module, *arguments, "--as-rank"]
