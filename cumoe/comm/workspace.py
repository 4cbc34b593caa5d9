"""What the ranks of a collective share, made and closed by all of them together.

Every rank owns one block (``layout.py`` says what is in it) and can write those of its peers: by
CUDA IPC where ranks are processes, by peer access where they are threads of one. Ranks that cannot
reach each other's memory share a communicator of NCCL instead. Each step that may fail on one rank
is followed by an exchange, so either all ranks have a workspace or all get an error that says which
rank failed and why.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from cumoe.arrays import DTYPES
from cumoe.comm import nccl
from cumoe.comm.debug import is_asked_for
from cumoe.comm.group import (
    DEFAULT_TIMEOUT_S,
    Group,
    GroupError,
    allgather_within,
    check_group,
    compare,
)
from cumoe.comm.layout import (
    MAX_WORLD_SIZE,
    SENTINEL,
    STATE_WORDS,
    check_sizes,
    workspace_bytes,
)
from cumoe.comm.peer_memory import PeerMemory
from cumoe.config import check_choice, check_int
from cumoe.kernels import Runnable
from cumoe.launch import get_device

__all__ = ["Workspace", "WorkspaceError"]

_PROCESS = secrets.token_hex(8)
"""With the pid the identity of this process, also where containers number theirs alike."""

_REFUSALS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}
"""Errors about the arguments keep their type on every rank."""

Engine = Literal["auto", "peer_memory", "nccl"]
ENGINES: tuple[str, ...] = get_args(Engine)

_GRAPHS = (
    "NCCL has not ended in {seconds:g} s; it waits until no CUDA graph is left that was captured "
    "with the workspace"
)

T = TypeVar("T")
_Place = tuple[str, str, int, bytes]  # host, process, device there, UUID of the device


class WorkspaceError(RuntimeError):
    """A workspace cannot be made; every rank gets the same message."""


class UnreachableError(WorkspaceError):
    """The ranks do not reach each other's memory."""


class Workspace:
    """What the all-reduces of a group need, peer memory or NCCL; made by all ranks together.

    Parameters
    ----------
    group : Group
        Each rank with a GPU of its own as CuPy's current device. Peer memory takes 1 to 16 ranks on
        one host: processes, or threads of one process.
    max_num_tokens, hidden_size : int
        Largest call: at least one token, a multiple of 8 columns.
    dtype : {"bfloat16", "float16", "float32"}
        On the wire.
    engine : {"auto", "peer_memory", "nccl"}
        What the ranks exchange rows by. ``"auto"`` takes peer memory where every rank reaches that
        of all others, and NCCL elsewhere; the same on every rank.
    timeout_s : float
        Of waiting for the other ranks while it is made or closed. Applies to groups of this package
        and to mpi4py communicators; half of it to NCCL.
    debug : bool, optional
        Let the ranks compare every op before it runs. By default what ``CUMOE_DEBUG_COMM`` says.

    Attributes
    ----------
    group, max_num_tokens, hidden_size, dtype, timeout_s, debug
        As given.
    num_bytes : int
        Of one rank's block, ``layout.workspace_bytes`` of the sizes; with NCCL of `scratch`.
    device : int
        Ordinal of the GPU that holds this rank's block.
    kind : {"ipc", "peer", "single", "nccl"}
        How peers are reached: in memory, as processes or as threads, or there are none; or by NCCL.

    Raises
    ------
    TypeError, ValueError
        On every rank, if sizes are out of range or differ between ranks (the message names both),
        or two ranks have the same GPU.
    WorkspaceError
        On every rank, if ranks share no memory and one cannot load NCCL, or a call of CUDA or NCCL
        fails on one.
    GroupError
        If a rank does not come in time.

    Notes
    -----
    Closing is collective too: :meth:`close`, or the end of a ``with`` block. A block that an
    exception leaves calls :meth:`abandon` instead, because the peers may not be on their way out.
    A CUDA graph that was captured with a workspace must not be replayed after it is closed; with
    NCCL it must be gone by then.
    """

    def __init__(
        self,
        group: Group,
        max_num_tokens: int,
        hidden_size: int,
        dtype: str = "bfloat16",
        *,
        engine: Engine = "auto",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        debug: bool | None = None,
    ) -> None:
        check_group(group)
        self.group, self.dtype, self.timeout_s = group, dtype, timeout_s
        self.debug = is_asked_for() if debug is None else debug
        self.max_num_tokens, self.hidden_size = max_num_tokens, hidden_size
        self._buffers: tuple[int, ...] = ()
        self._mapped: list[int] = []
        self._own = 0
        self._state: Any = None
        self._scratch: Any = None
        self._communicator: nccl.Communicator | None = None
        self._closed = True
        prepared = self._together("Workspace", lambda: self._prepare(engine))
        compare("Workspace(max_num_tokens, hidden_size, dtype)", [p[0] for p in prepared])
        compare("Workspace(engine)", [p[1] for p in prepared])
        compare("Workspace(debug)", [p[2] for p in prepared])
        places = [p[3] for p in prepared]
        _check_gpus(places)
        self._shared_process = len({process for _, process, *_ in places}) < len(places)
        self._connect(engine, places)
        self._closed = False

    def _prepare(self, engine: str) -> tuple[tuple[int, int, str], str, bool, _Place]:
        """Check the arguments; return what must be the same everywhere and where this rank is."""
        self.max_num_tokens = check_int("max_num_tokens", self.max_num_tokens, 1)
        self.hidden_size = check_int("hidden_size", self.hidden_size, 8)
        check_choice("engine", engine, ENGINES)
        if not isinstance(self.debug, bool):
            raise TypeError(f"debug: expected a bool or None, got {type(self.debug).__name__}")
        size = int(self.group.size)
        sizes = (self.max_num_tokens, self.hidden_size, self.dtype)
        check_sizes(size if engine == "peer_memory" else min(size, MAX_WORLD_SIZE), *sizes)
        self._memory = PeerMemory()
        self.device = self._memory.device()
        place = (_host(), f"{os.getpid()}-{_PROCESS}", self.device, self._memory.gpu())
        return sizes, engine, self.debug, place

    def _connect(self, engine: str, places: list[_Place]) -> None:
        """Make what the engine needs; auto tries peer memory first."""
        refusal = None
        if engine != "nccl":
            try:
                self._or_release(lambda: self._share(places))
                return
            except UnreachableError as error:
                if engine == "peer_memory":
                    raise
                refusal = error
        self._load_nccl(refusal)
        self._or_release(self._join_nccl)

    def _or_release(self, make: Callable[[], None]) -> None:
        """Call `make`, and leave nothing of it behind if all ranks hear of an error."""
        try:
            make()
        except WorkspaceError:  # on every rank; after any other error the ranks cannot meet
            self._release(failed=True)
            raise

    def _share(self, places: list[_Place]) -> None:
        """Allocate and fill this rank's block, then reach those of the others."""
        self.kind = _kind(places)
        self.num_bytes = workspace_bytes(
            len(places), self.max_num_tokens, self.hidden_size, self.dtype
        )

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
                    self._memory.reach(places[rank][2])
                buffers.append(address)
            self._buffers = tuple(buffers)

        try:
            self._together("Workspace: reaching the peers", reach)
        except WorkspaceError as error:
            raise UnreachableError(str(error)) from error.__cause__

    def _load_nccl(self, refusal: UnreachableError | None) -> None:
        """Load NCCL, or raise on every rank; `refusal` is why peer memory was not taken."""

        def find() -> None:
            nccl.load()

        try:
            self._together("Workspace: loading NCCL", find)
        except WorkspaceError as error:
            if refusal is None:
                raise
            raise WorkspaceError(f"{refusal}; {error}") from (refusal.__cause__ or error.__cause__)

    def _join_nccl(self) -> None:
        """Make the memory of sums and the communicator, and connect the ranks."""
        self.kind = "nccl"
        rank, size, seconds = int(self.group.rank), int(self.group.size), self.timeout_s / 2
        dtype = DTYPES[self.dtype]
        self.num_bytes = self.max_num_tokens * self.hidden_size * dtype.itemsize

        def make() -> bytes:
            self._scratch = self._memory.zeros(self.num_bytes // 4)
            return b"" if rank else nccl.Communicator.new_id()

        unique_id = self._together(f"Workspace: allocating {self.num_bytes} bytes", make)[0]

        def join() -> None:
            with self._memory.use(self.device):
                self._communicator = nccl.Communicator(size, unique_id, rank)
                # NOTE: NCCL connects ranks when it first adds, a few bytes otherwise than many;
                # left to a captured call it might fail the capture, and wait without an end.
                for words in (4, self._scratch.size):
                    part = self._scratch[:words].view(dtype)
                    self._communicator.queue_sum(part, part, 0)
                    self._memory.synchronize()

        late = f"NCCL has not connected the ranks in {seconds:g} s (NCCL_DEBUG=INFO says more)"
        self._together("Workspace: connecting by NCCL", lambda: nccl.within(seconds, join, late))

    def _together(self, what: str, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return all results, or raise on all if one failed."""
        own: Exception | None = None
        entry: tuple[Any, ...]
        try:
            entry = (what, "", action())
        except Exception as error:  # whatever it is, the other ranks must hear of it
            own = error
            entry = (what, type(error).__name__, str(error))
        found = allgather_within(self.group, entry, self.timeout_s)
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
    def scratch(self) -> Any:
        """With NCCL a device array of this rank alone, int32, as many bytes as its largest call."""
        self._check_open()
        return self._scratch

    @property
    def communicator(self) -> nccl.Communicator:
        """With NCCL the communicator of the ranks."""
        self._check_open()
        assert self._communicator is not None, self.kind
        return self._communicator

    @property
    def closed(self) -> bool:
        """Whether the workspace is closed or was abandoned."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("workspace: expected an open one, got a closed one")

    def queue(self, items: Sequence[Runnable]) -> None:
        """Queue what an op runs on CuPy's current stream of the workspace's device.

        NOTE: ranks of one process do it together. Until its peers have launched theirs, a rank's
        kernel does not end, and CUDA may let allocations and the loading of kernels anywhere in the
        process wait for it, behind locks that the peers' launches need.
        """
        device = get_device(self.device)
        with self._memory.use(self.device):
            if self._shared_process:
                for item in items:
                    item.prepare(device)
                allgather_within(self.group, None, self.timeout_s)
            stream = self._memory.stream()
            for item in items:
                item.run(device, stream)
            if self._shared_process:
                allgather_within(self.group, None, self.timeout_s)

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

    def _release(self, *, failed: bool = False) -> None:
        """Unmap what is mapped and leave NCCL, wait until all ranks have, and free."""
        seconds = self.timeout_s / 2

        def unmap() -> None:
            self._buffers = ()
            while self._mapped:
                self._memory.close(self._mapped.pop())
            communicator, self._communicator = self._communicator, None
            if communicator is None:
                return
            if failed:
                communicator.abort()
            else:
                nccl.within(seconds, communicator.destroy, _GRAPHS.format(seconds=seconds))

        # NOTE: CUDA leaves undefined what happens when memory is freed that a process still maps.
        self._together("Workspace.close: unmapping", unmap)
        own, self._own, self._state, self._scratch = self._own, 0, None, None
        if own:
            self._memory.free(own)

    def abandon(self) -> None:
        """Give the workspace up without the other ranks; not collective, never raises or waits.

        The memory stays allocated and mapped until the process ends: peers, or a kernel that polls
        for one that has died, may still use it. NCCL's communicator is aborted, which ends sums of
        this rank that wait for others.
        """
        if not self._closed and self._communicator is not None:
            self._communicator.abort()
        self._closed = True

    def __enter__(self) -> Workspace:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _check_gpus(places: list[_Place]) -> None:
    """Raise where two ranks have one GPU: nothing promises that it runs both at a time."""
    gpus = [gpu for *_, gpu in places]
    for rank, gpu in enumerate(gpus):
        first = gpus.index(gpu)
        if first < rank:
            raise ValueError(
                "group: expected a GPU for each rank, since their kernels wait for each other, got "
                f"device {places[rank][2]} for ranks {first} and {rank}"
            )


def _kind(places: list[_Place]) -> str:
    """Return how ranks at these hosts and processes reach each other's memory."""
    hosts = {host for host, *_ in places}
    processes = {process for _, process, *_ in places}
    if len(places) == 1:
        return "single"
    if len(hosts) > 1:
        other = next(rank for rank, place in enumerate(places) if place[0] != places[0][0])
        raise UnreachableError(
            f"ranks 0 and {other} are on different hosts, whose GPUs share no memory; NCCL is "
            "needed between hosts"
        )
    if len(places) > MAX_WORLD_SIZE:
        raise UnreachableError(
            f"world_size: expected at most {MAX_WORLD_SIZE} ranks that share memory, got "
            f"{len(places)}"
        )
    if len(processes) == len(places):
        return "ipc"
    if len(processes) == 1:
        return "peer"
    raise UnreachableError(
        f"the {len(places)} ranks are {len(processes)} processes; expected one process for each, "
        "or all in one"
    )


def _host() -> str:
    """Identify this machine: the same in all of its containers, another after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
