"""Work that is captured once and replayed, with a hash on the device of what each replay wrote.

Every piece of work writes the first rows of one arena. The first run's hash is kept, later ones
that differ are counted; nothing waits for the host. On NumPy the work just runs again. Times
nothing. CuPy is imported on use.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cumoe.config import Array

CYCLES_PER_US = 1700
"""Roughly those of the GPUs in question: a delay need not be exact."""

SOURCE = r"""
using u64 = unsigned long long;

// Adds to *sum a hash of `count` words and their positions; sums of hashes need no order.
extern "C" __global__ void fold(const u64* words, long long count, u64* sum) {
  u64 total = 0;
  const long long stride = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
    u64 x = words[i] + (u64)(i + 1) * 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    total += x ^ (x >> 31);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_down_sync(~0u, total, lanes);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, total);
}

// Keeps a graph's first hash; counts later ones that differ in state[0], whose graph is state[1].
extern "C" __global__ void settle(u64* sum, u64* first, u64* state, int graph) {
  const u64 hash = *sum;
  *sum = 0;
  if (first[graph] == 0) first[graph] = hash;
  if (first[graph] != hash) {
    state[0] += 1;
    state[1] = graph;
  }
}

extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}
"""


class DeviceEngine:
    """Captures, replays and hashes on a stream of its own, current while entered."""

    def __init__(self, arena: Array, num_graphs: int) -> None:
        import cupy

        self._arena = arena
        module = cupy.RawModule(code=SOURCE)
        self._fold, self._settle, self._spin = map(module.get_function, ("fold", "settle", "spin"))
        self._sum = cupy.zeros(1, np.uint64)
        self._first = cupy.zeros(num_graphs, np.uint64)
        self._state = cupy.zeros(2, np.uint64)
        self._row_bytes = arena.shape[1] * 2
        self._spin((1,), (1,), (np.int64(1),))
        cupy.cuda.Device().synchronize()
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def __enter__(self) -> DeviceEngine:
        self._stream.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.__exit__(*exc)

    def begin(self, rows: int) -> None:
        """Poison the first rows of the outputs."""
        self._arena.data.memset_async(0xFF, rows * self._row_bytes, self._stream)

    def delay(self, us: float) -> None:
        """Keep this rank's stream busy."""
        self._spin((1,), (1,), (np.int64(us * CYCLES_PER_US),))

    def end(self, graph: int, rows: int) -> None:
        """Fold the first rows into the hash of a graph."""
        words = np.int64(rows * self._row_bytes // 8)
        self._fold((1024,), (256,), (self._arena, words, self._sum))
        self._settle((1,), (1,), (self._sum, self._first, self._state, np.int32(graph)))

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run once as it is, which loads every kernel, and return the replay of a graph of it."""
        run()
        self._stream.synchronize()
        self._stream.begin_capture()
        try:
            run()
        finally:
            captured = self._stream.end_capture()
        captured.upload(self._stream)
        return lambda: captured.launch(self._stream)

    def synchronize(self) -> None:
        """Wait for everything queued."""
        self._stream.synchronize()

    def hashes(self) -> tuple[bytes, int, int]:
        """Return all first hashes, the number of replays that differ, and a graph of theirs."""
        self._stream.synchronize()
        wrong, graph = self._state.get().tolist()
        return self._first.get().tobytes(), wrong, graph


class HostEngine:
    """The same on NumPy, without graphs and without waiting."""

    def __init__(self, arena: Array, num_graphs: int) -> None:
        self._arena = arena
        self._first = np.zeros(num_graphs, np.uint64)
        self._wrong, self._graph = 0, 0

    def __enter__(self) -> HostEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def begin(self, rows: int) -> None:
        """Poison the first rows of the outputs."""
        self._arena[:rows].view(np.uint16).fill(0xFFFF)

    def delay(self, us: float) -> None:
        """Do nothing."""

    def end(self, graph: int, rows: int) -> None:
        """Fold the first rows into the hash of a graph."""
        value = hash_words(self._arena[:rows].view(np.uint64).ravel())
        if self._first[graph] == 0:
            self._first[graph] = value
        if self._first[graph] != value:
            self._wrong, self._graph = self._wrong + 1, graph

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run once and return `run`."""
        run()
        return run

    def synchronize(self) -> None:
        """Return at once."""

    def hashes(self) -> tuple[bytes, int, int]:
        """Return all first hashes, the number of replays that differ, and a graph of theirs."""
        return self._first.tobytes(), self._wrong, self._graph


def hash_words(words: np.ndarray) -> np.uint64:
    """Return what the kernel ``fold`` adds up."""
    x = words + np.arange(1, words.size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.uint64((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))


Engine = DeviceEngine | HostEngine
