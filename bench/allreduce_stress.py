"""A great many all-reduces back to back, in every order of sizes, with ranks that come late.

About a hundred CUDA graphs of twenty calls each are replayed in a random order, the same on all
ranks. A graph poisons its outputs, runs its calls without anything between them but now and then a
kernel that keeps one rank waiting, and folds all outputs into a hash on the device. Its inputs do
not change, so every replay must give the hash of the first, and every rank the same; now and then
the ranks compare, and one call is checked against float64. In the end the peers' memory must hold
what it held at first. Times nothing but the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.allreduce_case import BF16_HALF_STEP, EPS, TOP_K, take
from bench.inputs import random_bf16, to_backend, to_host
from bench.ranks import Ranks
from cumoe.arrays import empty
from cumoe.comm import AllReduced, Epilogue, Workspace, allreduce, finalize_allreduce
from cumoe.comm.layout import SENTINEL
from cumoe.config import Array
from cumoe.kernels_comm import allreduce_spec, select_config
from cumoe.launch import KernelSpec, get_device, warmup

Kernel = tuple[str, str | None, int, int]
"""Input policy, quantisation, ranks, tokens."""

CALLS = 20  # of a graph
MAX_GRAPHS = 100
CHECK_EVERY, COMPARE_EVERY, SYNC_EVERY = 200, 500, 100  # replays
CHECKED_TOKENS = 8
DELAYED_CALLS, DELAYED_REPLAYS = 0.1, 0.05  # shares of them
MAX_DELAY_US = 200.0
CYCLES_PER_US = 1700
"""Roughly those of the GPUs in question: a delay need not be exact."""
FLOAT32_HALF_STEP = 2.0**-24

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


@dataclass(frozen=True)
class Call:
    """One call of a graph, the same on all ranks: where its inputs and outputs begin, in tokens.

    A rank that is `late` waits for `delay_us` before the call; -1 is none.
    """

    op: str
    num_tokens: int
    index: int
    shared: int
    residual: int
    target: int
    late: int
    delay_us: float


def draw_calls(
    rng: np.random.Generator, num_calls: int, max_tokens: int, pool: int, size: int
) -> list[Call]:
    """Draw a graph: sizes from 1 to `max_tokens`, few as often as many; growing, shrinking or not.

    Parameters
    ----------
    rng : numpy.random.Generator
    num_calls, max_tokens : int
    pool : int
        Tokens of which a call takes some that lie together.
    size : int
        Ranks.
    """
    tokens = np.exp(rng.uniform(0, np.log(max_tokens + 1), num_calls)).astype(int)
    tokens = np.clip(tokens, 1, max_tokens)
    order = rng.integers(3)
    if order < 2:
        tokens = np.sort(tokens)[:: 1 if order == 0 else -1]
    calls, target = [], 0
    for count in map(int, tokens):
        op = "finalize" if rng.random() < 0.6 else "plain"
        late = int(rng.integers(size)) if rng.random() < DELAYED_CALLS else -1
        at = [int(rng.integers(pool - count + 1)) for _ in range(3)]
        calls.append(Call(op, count, *at, target, late, float(rng.uniform(0, MAX_DELAY_US))))
        target += count * (2 if op == "finalize" else 1)
    return calls


class Inputs:
    """The arrays that all calls take their inputs from, and what they write."""

    def __init__(self, ranks: Ranks, seed: int, num_rows: int) -> None:
        xp, hidden, rank = ranks.xp, ranks.hidden_size, ranks.group.rank
        self.ranks, self.pool = ranks, 2 * ranks.max_num_tokens
        slots = ranks.max_num_tokens * TOP_K
        rng = np.random.default_rng([seed, 1 + rank])
        index = rng.integers(-1, slots, (self.pool, TOP_K)).astype(np.int32)
        index[rng.random(index.shape) < 0.05] = -1
        self.index = xp.asarray(index)
        self.weights = xp.asarray(rng.random((self.pool, TOP_K), np.float32))
        self.rows = random_bf16(xp, (slots, hidden), seed, 1 + rank, 0)
        self.shared = random_bf16(xp, (self.pool, hidden), seed, 1 + rank, 1)
        self.residual = random_bf16(xp, (self.pool, hidden), seed, 0, 2)
        gamma = np.random.default_rng(seed).uniform(0.5, 1.5, hidden).astype(np.float32)
        self.norm_weight = to_backend(gamma.astype(self.rows.dtype), xp)
        self.arena = empty(self.rows, (num_rows, hidden), "bfloat16")

    def outputs(self, call: Call) -> AllReduced:
        """Return where a call writes."""
        middle, count = call.target + call.num_tokens, call.num_tokens
        first = self.arena[call.target : middle]
        if call.op == "plain":
            return AllReduced(sum=first)
        return AllReduced(residual=first, norm=self.arena[middle : middle + count])

    def run(self, call: Call) -> None:
        """Queue a call."""
        shared = self.shared[call.shared : call.shared + call.num_tokens]
        memory, out = self.ranks.memory, self.outputs(call)
        if call.op == "plain":
            allreduce(shared, memory, out=out)
            return
        some = slice(call.index, call.index + call.num_tokens)
        residual = self.residual[call.residual : call.residual + call.num_tokens]
        finalize_allreduce(
            self.rows,
            self.weights[some],
            self.index[some],
            memory,
            shared_output=shared,
            epilogue=Epilogue(residual, self.norm_weight, EPS),
            out=out,
        )

    def part(self, call: Call, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's part of some tokens in float64, and a bound of the op's error of it.

        The op adds K products and the shared output in float32, 2 K + 2 roundings at most on the
        way of a term, and rounds the part to bfloat16.
        """
        shared = take(self.shared, call.shared + chosen).astype(np.float64)
        if call.op == "plain":
            return shared, np.zeros_like(shared)
        index = take(self.index, call.index + chosen)
        weights = take(self.weights, call.index + chosen).astype(np.float64)
        weights[index < 0] = 0.0
        rows = take(self.rows, np.maximum(index, 0).ravel()).astype(np.float64)
        terms = weights[:, :, None] * rows.reshape(*index.shape, -1)
        value, size = terms.sum(axis=1) + shared, np.abs(terms).sum(axis=1) + np.abs(shared)
        wide = 1.01 * (2 * TOP_K + 2) * FLOAT32_HALF_STEP * size
        return value, wide + BF16_HALF_STEP * (np.abs(value) + wide)


def check_call(inputs: Inputs, call: Call, chosen: np.ndarray) -> str | None:
    """Compare some tokens of a call's outputs with float64; collective.

    Parts are added in float32, with the residual as one more, and rounded to bfloat16. The norm is
    held against that of the op's own rounded sum, so that only its own roundings count: one to
    bfloat16, and in float32 those of a mean of squares, a root, a quotient and two products.

    Returns
    -------
    str or None
        What is wrong.
    """
    group = inputs.ranks.group
    value, bound = inputs.part(call, chosen)
    found = group.allgather((value.tobytes(), bound.tobytes()))
    values, bounds = (
        np.stack([np.frombuffer(own[i]).reshape(value.shape) for own in found]) for i in range(2)
    )
    total, error = values.sum(axis=0), bounds.sum(axis=0)
    size = (np.abs(values) + bounds).sum(axis=0)
    if call.op == "finalize":
        residual = take(inputs.residual, call.residual + chosen).astype(np.float64)
        total, size = total + residual, size + np.abs(residual)
    error = error + 1.01 * (group.size + 1) * FLOAT32_HALF_STEP * size
    error = error + BF16_HALF_STEP * (np.abs(total) + error)
    out = inputs.outputs(call)
    first = out.sum if call.op == "plain" else out.residual
    assert first is not None
    got = take(first, chosen).astype(np.float64)
    if not (np.abs(got - total) <= error).all():
        return f"wrong answer: {call.op} of {call.num_tokens} tokens"
    if out.norm is None:
        return None
    scale = to_host(inputs.norm_weight).astype(np.float64)
    want = got / np.sqrt((got**2).mean(axis=1, keepdims=True) + EPS) * scale
    near = (BF16_HALF_STEP + 128 * FLOAT32_HALF_STEP) * np.abs(want)
    if not (np.abs(take(out.norm, chosen).astype(np.float64) - want) <= near).all():
        return f"wrong answer: norm of {call.num_tokens} tokens"
    return None


class DeviceEngine:
    """Captures, replays and hashes on a stream of its own, current while entered."""

    def __init__(self, inputs: Inputs, num_graphs: int) -> None:
        import cupy

        self._cupy, self._inputs = cupy, inputs
        module = cupy.RawModule(code=SOURCE)
        self._fold, self._settle, self._spin = map(
            module.get_function, ("fold", "settle", "spin")
        )
        self._sum = cupy.zeros(1, np.uint64)
        self._first = cupy.zeros(num_graphs, np.uint64)
        self._state = cupy.zeros(2, np.uint64)
        self._row_bytes = inputs.arena.shape[1] * 2
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
        self._inputs.arena.data.memset_async(0xFF, rows * self._row_bytes, self._stream)

    def delay(self, us: float) -> None:
        """Keep this rank's stream busy."""
        self._spin((1,), (1,), (np.int64(us * CYCLES_PER_US),))

    def end(self, graph: int, rows: int) -> None:
        """Fold the first rows into the hash of a graph."""
        words = np.int64(rows * self._row_bytes // 8)
        self._fold((1024,), (256,), (self._inputs.arena, words, self._sum))
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

    def __init__(self, inputs: Inputs, num_graphs: int) -> None:
        self._inputs = inputs
        self._first = np.zeros(num_graphs, np.uint64)
        self._wrong, self._graph = 0, 0

    def __enter__(self) -> HostEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def begin(self, rows: int) -> None:
        """Poison the first rows of the outputs."""
        self._inputs.arena[:rows].view(np.uint16).fill(0xFFFF)

    def delay(self, us: float) -> None:
        """Do nothing."""

    def end(self, graph: int, rows: int) -> None:
        """Fold the first rows into the hash of a graph."""
        value = hash_words(self._inputs.arena[:rows].view(np.uint64).ravel())
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


def run(ranks: Ranks, num_calls: int, seed: int, progress: Callable[[], None]) -> int:
    """Make at least `num_calls` calls and print a line on rank 0; collective.

    Returns
    -------
    int
        0, or 1 if something is wrong; the same on every rank.
    """
    common = np.random.default_rng([seed, 3])
    num_graphs = int(np.clip(num_calls // (2 * CALLS), 1, MAX_GRAPHS))
    size, pool = ranks.group.size, 2 * ranks.max_num_tokens
    graphs = [
        draw_calls(common, CALLS, ranks.max_num_tokens, pool, size) for _ in range(num_graphs)
    ]
    ops = {"finalize": "rows", "plain": "plain"}
    each = [call for calls in graphs for call in calls]
    compile_kernels(ranks, [(ops[c.op], None, size, c.num_tokens) for c in each])
    progress()
    inputs = Inputs(ranks, seed, max(map(rows_of, graphs)))
    engine_type = DeviceEngine if ranks.on_device else HostEngine
    try:
        with engine_type(inputs, num_graphs) as engine:
            told = _replay_all(ranks, inputs, engine, graphs, num_calls, common, progress)
    except ArithmeticError as error:
        if ranks.group.rank == 0:
            print(f"FAILED stress: {error}", flush=True)
        return 1
    if ranks.group.rank == 0:
        protocols = sorted({ranks.protocol(call.num_tokens) for call in each})
        print(f"stress, {size} ranks, {' and '.join(protocols)}: {told}", flush=True)
    return 0


def rows_of(calls: Sequence[Call]) -> int:
    """Return the rows that the outputs of a graph take."""
    last = calls[-1]
    return last.target + last.num_tokens * (2 if last.op == "finalize" else 1)


def _replay_all(
    ranks: Ranks,
    inputs: Inputs,
    engine: DeviceEngine | HostEngine,
    graphs: Sequence[Sequence[Call]],
    num_calls: int,
    common: np.random.Generator,
    progress: Callable[[], None],
) -> str:
    """Capture and replay; return what was done, or raise ArithmeticError on every rank."""
    rank, begin = ranks.group.rank, time.perf_counter()

    def queue(number: int) -> None:
        calls = graphs[number]
        engine.begin(rows_of(calls))
        for call in calls:
            if call.late == rank:
                engine.delay(call.delay_us)
            inputs.run(call)
        engine.end(number, rows_of(calls))

    replays = []
    for number in range(len(graphs)):
        replays.append(engine.capture(lambda number=number: queue(number)))
        progress()
    num_replays = max(1, -(-num_calls // CALLS) - len(graphs))
    checks = comparisons = 0
    for n in range(1, num_replays + 1):
        number = int(common.integers(len(graphs)))
        late = int(common.integers(ranks.group.size))
        delayed, us = common.random() < DELAYED_REPLAYS, common.uniform(0, MAX_DELAY_US)
        if delayed and late == rank:
            engine.delay(us)
        replays[number]()
        done = n == num_replays
        if n % SYNC_EVERY == 0 or done:
            engine.synchronize()
            progress()
        if n % CHECK_EVERY == 0 or done:
            call = graphs[number][int(common.integers(CALLS))]
            chosen = np.unique(common.integers(0, call.num_tokens, CHECKED_TOKENS))
            engine.synchronize()
            ranks.agree(check_call(inputs, call, chosen))
            checks += 1
        if n % COMPARE_EVERY == 0 or done:
            compare_hashes(ranks, engine)
            comparisons += 1
    engine.synchronize()
    seconds = time.perf_counter() - begin
    ranks.group.barrier()
    ranks.agree(leftovers(ranks))
    total = (len(graphs) + num_replays) * CALLS
    return (
        f"{total} calls in {seconds:.1f} s, {num_replays} replays of {len(graphs)} graphs each "
        f"with the hash of its first run, hashes compared between ranks {comparisons} times, "
        f"{checks} answers checked: PASS"
    )


def compare_hashes(ranks: Ranks, engine: DeviceEngine | HostEngine) -> None:
    """Raise ArithmeticError on every rank where outputs changed or ranks differ; collective."""
    first, wrong, graph = engine.hashes()
    problem = f"{wrong} replays gave other bits, one of graph {graph}" if wrong else None
    ranks.agree(problem)
    found = ranks.group.allgather(first)
    if any(other != found[0] for other in found):
        raise ArithmeticError("ranks have different bits")


def leftovers(ranks: Ranks) -> str | None:
    """Say how many words of this rank's block are not what they are between two calls."""
    memory = ranks.memory
    if not isinstance(memory, Workspace) or not memory.num_bytes:
        return None
    import cupy

    own = cupy.cuda.UnownedMemory(
        memory.buffers[ranks.group.rank], memory.num_bytes, memory, memory.device
    )
    pointer = cupy.cuda.MemoryPointer(own, 0)
    words = cupy.ndarray((memory.num_bytes // 4,), np.uint32, memptr=pointer)
    wrong = int(cupy.count_nonzero(words != np.uint32(SENTINEL)))
    return f"{wrong} words of the workspace are no sentinels" if wrong else None
