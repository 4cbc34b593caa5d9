"""What stands for other ranks and their GPUs in the tests of ``cumoe.comm``."""

from __future__ import annotations

import contextlib
import itertools
import threading

import numpy as np

from cumoe.comm import run_ranks
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

    def memory(self):
        return FakeMemory(self)

    def events(self, rank):
        return [event for who, event in self.log if who == rank]

    def position(self, rank, event):
        return self.log.index((rank, event))


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

    def use(self, device):
        assert device == rank_here.rank
        return contextlib.nullcontext()

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
