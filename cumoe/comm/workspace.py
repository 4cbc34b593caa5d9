"""The memory that the ranks of a collective share, made and closed by all of them together.

Every rank owns one block (``layout.py`` says what is in it) and can write those of its peers: by
CUDA IPC where ranks are processes, by peer access where they are threads of one. Each step that may
fail on one rank is followed by an exchange, so either all ranks have a workspace or all get an
error that says which rank failed and why.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cumoe.comm.group import (
    DEFAULT_TIMEOUT_S,
    Group,
    GroupError,
    allgather_within,
    check_group,
    compare,
)
from cumoe.comm.layout import SENTINEL, STATE_WORDS, workspace_bytes
from cumoe.comm.peer_memory import PeerMemory
from cumoe.config import check_int
from cumoe.kernels import Launch
from cumoe.launch import get_device

__all__ = ["Workspace", "WorkspaceError"]

_PROCESS = secrets.token_hex(8)
"""With the pid the identity of this process, also where containers number theirs alike."""

_REFUSALS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}
"""Errors about the arguments keep their type on every rank."""

T = TypeVar("T")
_Place = tuple[str, str, int]  # host, process, device


class WorkspaceError(RuntimeError):
    """A workspace cannot be made; every rank gets the same message."""


class Workspace:
    """Peer memory for the all-reduces of a group; made by all ranks together.

    Parameters
    ----------
    group : Group
        Of 1 to 16 ranks on one host, each with its GPU as CuPy's current device: processes, or
        threads of one process.
    max_num_tokens, hidden_size : int
        Largest call: at least one token, a multiple of 8 columns.
    dtype : {"bfloat16", "float16", "float32"}
        On the wire.
    timeout_s : float
        Of waiting for the other ranks while it is made or closed. Applies to groups of this package
        and to mpi4py communicators.

    Attributes
    ----------
    group, max_num_tokens, hidden_size, dtype
        As given.
    num_bytes : int
        Of one rank's block, ``layout.workspace_bytes`` of the sizes.
    device : int
        Ordinal of the GPU that holds this rank's block.
    kind : {"ipc", "peer", "single"}
        How peers are reached: processes, threads, or there are none.

    Raises
    ------
    TypeError, ValueError
        On every rank, if sizes are out of range or differ between ranks (the message names both).
    WorkspaceError
        On every rank, if ranks are on several hosts, or a CUDA call fails on one.
    GroupError
        If a rank does not come in time.

    Notes
    -----
    Closing is collective too: :meth:`close`, or the end of a ``with`` block. A block that an
    exception leaves calls :meth:`abandon` instead, because the peers may not be on their way out.
    A CUDA graph that was captured with a workspace must not be replayed after it is closed.
    """

    def __init__(
        self,
        group: Group,
        max_num_tokens: int,
        hidden_size: int,
        dtype: str = "bfloat16",
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        check_group(group)
        self.group, self.dtype, self._timeout_s = group, dtype, timeout_s
        self.max_num_tokens, self.hidden_size = max_num_tokens, hidden_size
        self._buffers: tuple[int, ...] = ()
        self._mapped: list[int] = []
        self._own = 0
        self._state: Any = None
        self._closed = True
        prepared = self._together("Workspace", self._prepare)
        compare("Workspace(max_num_tokens, hidden_size, dtype)", [sizes for sizes, _ in prepared])
        places = [place for _, place in prepared]
        self.kind = _kind(places)
        try:
            self._share([device for _, _, device in places])
        except WorkspaceError:  # on every rank; after any other error the ranks cannot meet
            self._release()
            raise
        self._closed = False

    def _prepare(self) -> tuple[tuple[int, int, str], _Place]:
        """Check the sizes; return them and where this rank is."""
        self.max_num_tokens = check_int("max_num_tokens", self.max_num_tokens, 1)
        self.hidden_size = check_int("hidden_size", self.hidden_size, 8)
        sizes = (self.max_num_tokens, self.hidden_size, self.dtype)
        self.num_bytes = workspace_bytes(int(self.group.size), *sizes)
        self._memory = PeerMemory()
        self.device = self._memory.device()
        return sizes, (_host(), f"{os.getpid()}-{_PROCESS}", self.device)

    def _share(self, devices: list[int]) -> None:
        """Allocate and fill this rank's block, then reach those of the others."""

        def make() -> tuple[int, bytes]:
            self._state = self._memory.zeros(STATE_WORDS)
            if not self.num_bytes:
                return 0, b""
            self._own = self._memory.allocate(self.num_bytes)
            self._memory.fill(self._own, self.num_bytes, SENTINEL)
            return self._own, self._memory.export(self._own) if self.kind == "ipc" else b""

        # NOTE: a peer's block is reached only after this exchange, so it is filled by then.
        made = self._together(f"Workspace: allocating {self.num_bytes} bytes", make)

        def reach() -> None:
            buffers = []
            for rank, (address, handle) in enumerate(made):
                if rank != int(self.group.rank) and self.kind == "ipc":
                    address = self._memory.open(handle)
                    self._mapped.append(address)
                elif self.kind == "peer":
                    self._memory.reach(devices[rank])
                buffers.append(address)
            self._buffers = tuple(buffers)

        self._together("Workspace: reaching the peers", reach)

    def _together(self, what: str, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return all results, or raise on all if one failed."""
        own: Exception | None = None
        entry: tuple[Any, ...]
        try:
            entry = (what, "", action())
        except Exception as error:  # whatever it is, the other ranks must hear of it
            own = error
            entry = (what, type(error).__name__, str(error))
        found = allgather_within(self.group, entry, self._timeout_s)
        for rank, other in enumerate(found):
            if not (isinstance(other, tuple) and len(other) == 3 and other[0] == what):
                raise GroupError(f"rank {self.group.rank} is in {what}, rank {rank} is not")
        failed = [(rank, kind, text) for rank, (_, kind, text) in enumerate(found) if kind]
        if failed:
            rank, kind, text = failed[0]
            if kind in _REFUSALS:
                raise _REFUSALS[kind](f"{text} (rank {rank})") from own
            more = f" and on {len(failed) - 1} more" if len(failed) > 1 else ""
            raise WorkspaceError(f"{what} failed on rank {rank}{more}: {kind}: {text}") from own
        return [value for _, _, value in found]

    @property
    def buffers(self) -> tuple[int, ...]:
        """Addresses of all ranks' blocks as this rank reaches them, its own included."""
        self._check_open()
        return self._buffers

    @property
    def state(self) -> Any:
        """Device array of this rank alone, int32, shape (STATE_WORDS,), zeros at first."""
        self._check_open()
        return self._state

    @property
    def closed(self) -> bool:
        """Whether the workspace is closed or was abandoned."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("workspace: expected an open one, got a closed one")

    def queue(self, launches: Sequence[Launch]) -> None:
        """Queue an op's launches on CuPy's current stream of the workspace's device.

        NOTE: ranks of one process do it together. Until its peers have launched theirs, a rank's
        kernel does not end, and CUDA may let allocations and the loading of kernels anywhere in the
        process wait for it, behind locks that the peers' launches need.
        """
        device = get_device(self.device)
        with self._memory.use(self.device):
            if self.kind == "peer":
                for launch in launches:
                    launch.prepare(device)
                allgather_within(self.group, None, self._timeout_s)
            stream = self._memory.stream()
            for launch in launches:
                launch.run(device, stream)
            if self.kind == "peer":
                allgather_within(self.group, None, self._timeout_s)

    def close(self) -> None:
        """Wait for all ranks' work, unmap the peers' memory and free the own; collective.

        Does nothing the second time.

        Raises
        ------
        GroupError, WorkspaceError
            If a rank does not come, or a CUDA call fails on one. The blocks are then left
            allocated, since a peer may still have them mapped.
        """
        if self._closed:
            return
        self._closed = True
        with self._memory.use(self.device):
            self._together("Workspace.close: waiting for the GPU", self._memory.synchronize)
            self._release()

    def _release(self) -> None:
        """Unmap what is mapped, wait until all ranks have, and free."""

        def unmap() -> None:
            self._buffers = ()
            while self._mapped:
                self._memory.close(self._mapped.pop())

        # NOTE: CUDA leaves undefined what happens when memory is freed that a process still maps.
        self._together("Workspace.close: unmapping", unmap)
        own, self._own, self._state = self._own, 0, None
        if own:
            self._memory.free(own)

    def abandon(self) -> None:
        """Give the workspace up without the other ranks; not collective, never raises or waits.

        The memory stays allocated and mapped until the process ends: peers, or a kernel that polls
        for one that has died, may still use it.
        """
        self._closed = True

    def __enter__(self) -> Workspace:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _kind(places: list[_Place]) -> str:
    """Return how ranks at these hosts and processes reach each other."""
    hosts = {host for host, _, _ in places}
    processes = {process for _, process, _ in places}
    if len(places) == 1:
        return "single"
    if len(hosts) > 1:
        other = next(rank for rank, place in enumerate(places) if place[0] != places[0][0])
        raise WorkspaceError(
            f"ranks 0 and {other} are on different hosts, whose GPUs share no memory; NCCL is "
            "needed between hosts"
        )
    if len(processes) == len(places):
        return "ipc"
    if len(processes) == 1:
        return "peer"
    raise WorkspaceError(
        f"the {len(places)} ranks are {len(processes)} processes; expected one process for each, "
        "or all in one"
    )


def _host() -> str:
    """Identify this machine: the same in all of its containers, another after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
