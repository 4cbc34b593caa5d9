"""The demo's clock: the time of each stage of a layer, and of the whole.

On a GPU a stage's launches are captured in a graph, several times over, and the replays timed by
events; on NumPy each op runs once by the host's clock. Figures worth keeping come from ``bench/``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumoe.cli.problem import Problem
from cumoe.config import Array, Quantized
from cumoe.finalize import finalize
from cumoe.grouped_gemm import grouped_gemm
from cumoe.launch import get_device
from cumoe.permutation import group
from cumoe.plan import DevicePlan
from cumoe.quantize import quantize_fp8_block
from cumoe.routing import route

REPLAYS = 5
SECONDS_PER_REPLAY = 0.02
MAX_CALLS = 50


@dataclass(frozen=True, eq=False)
class Measured:
    """A layer's result, what each expert got, and times in seconds.

    Attributes
    ----------
    y : array, shape (num_tokens, hidden_size)
    ids : array, int32, shape (num_tokens, top_k + num_shared_experts)
    tokens_per_expert : numpy.ndarray, int32, shape (num_experts + num_shared_experts,)
    stages : dict of str to float
        In the order in which they run.
    layer : float
        One whole call.
    layer_call : float or None
        On a GPU, one call made from Python rather than replayed from a graph.
    """

    y: Array
    ids: Array
    tokens_per_expert: NDArray[np.int32]
    stages: dict[str, float]
    layer: float
    layer_call: float | None = None


def measure_numpy(problem: Problem) -> Measured:
    """Run a layer on NumPy op by op and as a whole."""
    weights, stages = problem.weights, {}
    routing, order = problem.routing, str(weights.gate_up_order)
    fp8 = problem.recipe == "fp8_block"

    def timed(name: str, op: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = op()
        stages[name] = time.perf_counter() - start
        return result

    topk = timed("routing", lambda: route(problem.logits, routing, bias=problem.bias))
    permutation = timed(
        "permutation",
        lambda: group(
            topk,
            num_experts=routing.num_experts,
            num_shared_experts=routing.num_shared_experts,
        ),
    )
    x: Any = problem.x
    w13, w2 = weights.w13, weights.w2
    if fp8:
        x = timed("quantize", lambda: quantize_fp8_block(problem.x))
        w13 = Quantized(weights.w13, weights.w13_scale, block=(128, 128))
        w2 = Quantized(weights.w2, weights.w2_scale, block=(128, 128))
    hidden = timed(
        "gemm1",
        lambda: grouped_gemm(
            x,
            w13,
            permutation,
            gate_up_order=order,
            activation=problem.shape.activation,
            out_dtype="float8_e4m3fn" if fp8 else "bfloat16",
        ),
    )
    rows = timed(
        "gemm2",
        lambda: grouped_gemm(hidden, w2, permutation, gather=False),
    )
    timed("finalize", lambda: finalize(rows, topk.weights, permutation.permuted_idx))
    start = time.perf_counter()
    y = problem.layer(problem.x, problem.logits)
    layer = time.perf_counter() - start
    return Measured(y, topk.ids, permutation.tokens_per_expert, stages, layer)


def measure_cuda(problem: Problem) -> Measured:
    """Run a layer on a GPU and time its stages and the whole, replayed and called."""
    import cupy

    layer, x, logits = problem.layer, problem.x, problem.logits
    y = cupy.empty_like(x)
    device = get_device(int(x.device.id))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        layer(x, logits, out=y)
        # The plan of the call just made: its launches hold the addresses of this call's arrays.
        plan: DevicePlan = layer.plan(problem.num_tokens)
        counts = plan.permutation.tokens_per_expert.get()
        ids = route(logits, problem.routing, bias=problem.bias).ids

        def stage(name: str) -> Callable[[], None]:
            def queue() -> None:
                for item in plan.stages[name]:
                    item.run(device, stream.ptr)

            return queue

        stages = {name: _time_graph(stage(name), stream) for name in plan.stages}
        whole = _time_graph(lambda: layer(x, logits, out=y), stream)
        called = _time_calls(lambda: layer(x, logits, out=y), stream)
        stream.synchronize()
    return Measured(y, ids, counts, stages, whole, called)


def _time_graph(work: Callable[[], object], stream: Any) -> float:
    """Return the time of one call of `work` in a graph of many, the median of several replays."""
    work()  # the first call builds launches, which is not the GPU's time
    calls = int(min(MAX_CALLS, max(1, SECONDS_PER_REPLAY // _elapsed(work, stream))))
    stream.begin_capture()
    try:
        for _ in range(calls):
            work()
    finally:
        graph = stream.end_capture()
    graph.launch(stream)
    samples = [_elapsed(lambda: graph.launch(stream), stream) for _ in range(REPLAYS)]
    return statistics.median(samples) / calls


def _time_calls(work: Callable[[], object], stream: Any) -> float:
    """Return the mean time of a call of `work`, several queued one after the other."""
    calls = int(min(MAX_CALLS, max(1, SECONDS_PER_REPLAY // _elapsed(work, stream))))

    def repeat() -> None:
        for _ in range(calls):
            work()

    return _elapsed(repeat, stream) / calls


def _elapsed(work: Callable[[], object], stream: Any) -> float:
    """Return the seconds between the events around `work`."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    work()
    stop.record(stream)
    stop.synchronize()
    return max(float(cupy.cuda.get_elapsed_time(start, stop)) * 1e-3, 1e-9)
