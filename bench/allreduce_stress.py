"""A great many all-reduces back to back, in every order of sizes, with ranks that come late.

About a hundred CUDA graphs of twenty calls each are replayed in a random order, the same on all
ranks. A graph poisons its outputs, runs its calls without anything between them but now and then a
kernel that keeps one rank waiting, and folds all outputs into a hash on the device. Its inputs do
not change, so every replay must give the hash of the first run, and every rank the same; now and
then the ranks compare, and one call is checked against float64, as one of each first run is. In
the end the peers' memory must hold what it held at first. Times nothing but the whole.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.allreduce_case import BF16_HALF_STEP, EPS, TOP_K, take
from bench.inputs import random_bf16, to_backend, to_host
from bench.ranks import Ranks, compile_kernels
from bench.replays import DeviceEngine, Engine, HostEngine
from cumoe.arrays import empty
from cumoe.comm import AllReduced, Epilogue, Workspace, allreduce, finalize_allreduce
from cumoe.comm.layout import SENTINEL

CALLS = 20  # of a graph
MAX_GRAPHS = 100
CHECK_EVERY, COMPARE_EVERY, SYNC_EVERY = 200, 500, 100  # replays
CHECKED_TOKENS = 8
DELAYED_CALLS, DELAYED_REPLAYS = 0.1, 0.05  # shares of them
MAX_DELAY_US = 200.0
FLOAT32_HALF_STEP = 2.0**-24


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
        index, shared, residual = (int(rng.integers(pool - count + 1)) for _ in range(3))
        delay_us = float(rng.uniform(0, MAX_DELAY_US))
        calls.append(Call(op, count, index, shared, residual, target, late, delay_us))
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
        with engine_type(inputs.arena, num_graphs) as engine:
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
    engine: Engine,
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

    def check(number: int) -> None:
        call = graphs[number][int(common.integers(CALLS))]
        chosen = np.unique(common.integers(0, call.num_tokens, CHECKED_TOKENS))
        engine.synchronize()
        ranks.agree(check_call(inputs, call, chosen))

    replays = []
    for number in range(len(graphs)):
        replays.append(engine.capture(functools.partial(queue, number)))
        check(number)
        progress()
    num_replays = max(1, -(-num_calls // CALLS) - len(graphs))
    checks, comparisons = len(graphs), 0
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
            check(number)
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


def compare_hashes(ranks: Ranks, engine: Engine) -> None:
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
