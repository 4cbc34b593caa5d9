"""What stands for other ranks and their GPUs in the tests of ``cumoe.comm``."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from cumoe.comm import ThreadGroup, nccl, run_ranks, workspace
from cumoe.comm.layout import SENTINEL

rank_here = threading.local()
"""``rank_here.rank`` is the rank that the current thread is, in :func:`on`."""


def ranks(size, function, **options):
    """Run threads without devices, whatever the machine has."""
    return run_ranks(size, function, devices=(), **options)


def outcomes(size, function, **options):
    """What each rank returned or raised."""

    def caught(group):
        try:
            return function(group)
        except Exception as error:
            return error

    return ranks(size, caught, **options)


class MpiLike:
    """An mpi4py communicator as far as cumoe sees one: no time-outs, but ``Ibarrier``."""

    def __init__(self, group, barriers):
        self.rank, self.size = group.rank, group.size
        self._group, self._barriers = group, barriers

    def allgather(self, sendobj):
        return self._group.allgather(sendobj)

    def bcast(self, obj, root=0):
        return self._group.bcast(obj, root)

    def barrier(self):
        self._group.barrier()

    def Ibarrier(self):  # noqa: N802
        mine = self._barriers.setdefault(id(self), [])
        mine.append(None)
        return MpiRequest(self._barriers, len(mine), self.size)


class MpiRequest:
    def __init__(self, barriers, number, size):
        self._barriers, self._number, self._size = barriers, number, size

    def Test(self):  # noqa: N802
        return sum(len(b) >= self._number for b in list(self._barriers.values())) == self._size


def on(size, function, **options):
    """Run ranks that know who they are; what each returned or raised."""

    def body(group):
        rank_here.rank = group.rank
        return function(group)

    return outcomes(size, body, **options)


def good(found):
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


class KeyValueStore:
    """The client of ``jax.distributed``, shared by the threads of a test."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key, value):
        assert isinstance(key, str) and isinstance(value, str)
        with self._changed:
            assert key not in self.values, f"{key} is set twice"
            self.values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        assert isinstance(timeout_in_ms, int)
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, timeout_in_ms / 1e3):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    def key_value_delete(self, key):
        with self._changed:
            del self.values[key]


class Machine:
    """GPUs as far as a workspace sees them, the ranks being threads.

    Holds what CUDA would let pass and not forgive: mapping what is not filled, freeing what is
    still mapped, freeing or unmapping twice.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.addresses = itertools.count(0x7000_0000, 0x1000)
        self.blocks: dict[int, dict] = {}
        self.mapped: dict[int, int] = {}
        self.log: list[tuple[int, str]] = []
        self.fail: dict[tuple[int, str], Exception] = {}
        self.stuck: dict[tuple[int, str], threading.Event] = {}
        self.joined: dict[bytes, list] = {}
        self.gpus: dict[int, int] = {}

    def memory(self):
        return FakeMemory(self)

    def nccl(self):
        """What ``cupy.cuda.nccl`` is, the ranks being threads."""
        return FakeNccl(self)

    def events(self, rank):
        return [event for who, event in self.log if who == rank]

    def position(self, rank, event):
        return self.log.index((rank, event))


def processes(monkeypatch, load=None):
    """Make every thread count as a process of a new machine; `load` loads NCCL, by default its."""
    made = Machine()
    monkeypatch.setattr(workspace, "PeerMemory", made.memory)
    monkeypatch.setattr(workspace, "os", SimpleNamespace(getpid=threading.get_ident))
    monkeypatch.setattr(nccl, "load", load or made.nccl)
    return made


class FakeMemory:
    """:class:`PeerMemory` on a Machine."""

    def __init__(self, machine):
        self._machine = machine

    def _note(self, event):
        rank = rank_here.rank
        self._machine.log.append((rank, event))
        error = self._machine.fail.get((rank, event))
        if error is not None:
            raise error

    def device(self):
        return rank_here.rank

    def gpu(self):
        return b"GPU %d" % self._machine.gpus.get(rank_here.rank, rank_here.rank)

    @contextlib.contextmanager
    def use(self, device):
        """In this thread or in one that belongs to the rank."""
        assert getattr(rank_here, "rank", device) == device
        rank_here.rank = device
        yield

    def allocate(self, num_bytes):
        with self._machine.lock:
            self._note("allocate")
            address = next(self._machine.addresses)
            self._machine.blocks[address] = {"bytes": num_bytes, "word": None}
            return address

    def fill(self, address, num_bytes, word):
        with self._machine.lock:
            self._note("fill")
            assert self._machine.blocks[address]["bytes"] == num_bytes
            self._machine.blocks[address]["word"] = word

    def zeros(self, count):
        return np.zeros(count, np.int32)

    def stream(self):
        return 0

    def synchronize(self):
        with self._machine.lock:
            self._note("synchronize")

    def export(self, address):
        with self._machine.lock:
            self._note("export")
            return b"handle %d" % address

    def open(self, handle):
        with self._machine.lock:
            self._note("open")
            block = int(handle.split()[1])
            assert self._machine.blocks[block]["word"] == SENTINEL
            address = next(self._machine.addresses)
            self._machine.mapped[address] = block
            return address

    def reach(self, device):
        with self._machine.lock:
            self._note("reach")
            assert device >= 0

    def close(self, address):
        with self._machine.lock:
            self._note("close")
            del self._machine.mapped[address]

    def free(self, address):
        with self._machine.lock:
            self._note("free")
            assert address not in self._machine.mapped.values(), "freed while mapped"
            del self._machine.blocks[address]


class FakeNccl:
    """``cupy.cuda.nccl`` on a Machine."""

    available = True
    NCCL_SUM, NCCL_FLOAT16, NCCL_FLOAT32, NCCL_BFLOAT16 = 0, 6, 7, 9

    def __init__(self, machine):
        self._machine = machine

    def get_unique_id(self):
        with self._machine.lock:
            made = next(self._machine.addresses)
        return made.to_bytes(8, "little") + b"\xff" * 120

    def NcclCommunicator(self, size, unique_id, rank):  # noqa: N802
        assert type(unique_id) is bytes and len(unique_id) == 128  # of CuPy 14
        assert os.environ["NCCL_NVLS_ENABLE"]
        return FakeCommunicator(self._machine, size, unique_id, rank)


class FakeCommunicator:
    """Adds by ascending rank, each sum rounded; knows who is in, and who has left how."""

    DTYPES = {6: np.float16, 7: np.float32, 9: ml_dtypes.bfloat16}

    def __init__(self, machine, size, unique_id, rank):
        self._machine, self.rank = machine, rank
        self._note("join")
        with machine.lock:
            groups = machine.joined.setdefault(unique_id, ThreadGroup.make(size, timeout_s=20))
        self._group = groups[rank]
        self._group.barrier()

    def _note(self, event):
        with self._machine.lock:
            self._machine.log.append((self.rank, event))
        stuck = self._machine.stuck.get((self.rank, event))
        if stuck is not None:
            assert stuck.wait(20)
        error = self._machine.fail.get((self.rank, event))
        if error is not None:
            raise error

    def allReduce(self, send, receive, count, dtype, op, stream):  # noqa: N802
        self._note("sum")
        assert op == FakeNccl.NCCL_SUM and type(stream) is int
        dtype = np.dtype(self.DTYPES[dtype])
        part, total = (view(address, count, dtype) for address in (send, receive))
        parts = self._group.allgather(part.copy())
        assert {p.shape for p in parts} == {part.shape} and {p.dtype for p in parts} == {dtype}
        total[...] = nccl_sum(parts)

    def destroy(self):
        self._note("destroy")
        self._group.barrier()

    def abort(self):
        self._note("abort")
        self._group.fail("aborted")


def nccl_sum(parts):
    """A sum as NCCL's may be rounded: after every addition."""
    total = parts[0].copy()
    with np.errstate(over="ignore", invalid="ignore"):
        for part in parts[1:]:
            total = (total.astype(np.float32) + part.astype(np.float32)).astype(total.dtype)
    return total


def view(address, count, dtype):
    """An array over memory of the host."""
    data = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(data, np.uint8).view(dtype)


def in_threads(*functions):
    """Run functions together; what each returned or raised."""
    found = [None] * len(functions)

    def body(index):
        try:
            found[index] = functions[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), found
    return found


def read(sock, count):
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            return data
        data += part
    return data
