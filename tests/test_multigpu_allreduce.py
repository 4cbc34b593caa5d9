"""The all-reduces and layers of several ranks on GPUs, against the twin over the same group.

The ``gpu`` test has a workspace of one rank; the ``multigpu`` ones have a GPU for each rank.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from cumoe import comm
from cumoe.comm import (
    AllReduced,
    Epilogue,
    Quantization,
    SingleGroup,
    Workspace,
    allreduce,
    finalize_allreduce,
    layout,
    reduce_allreduce,
)
from tests import rank_layers
from tests.helpers import BF16, F16, F32, assert_same_bits, to_backend, to_host

HIDDEN = 7168
FORMATS = {
    None: None,
    "fp8_block": Quantization("fp8_block"),
    "fp8_token": Quantization("fp8_token"),
    "fp8_tensor": Quantization("fp8_tensor", np.array([0.03], np.float32)),
    "fp8_ue8m0": Quantization("fp8_ue8m0", group_size=32),
    "nvfp4": Quantization("nvfp4", np.array([40.0], np.float32)),
    "nvfp4_swizzled": Quantization("nvfp4", np.array([40.0], np.float32), layout="swizzled_128x4"),
}
LOW = 48 << 10  # bytes up to which the tests' workspaces use one shot


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Draw normal numbers, a tenth of them zeros of both signs."""
    x = rng.standard_normal(shape, np.float32)
    x[rng.random(shape) < 0.1] = 0.0
    return np.copysign(x, rng.standard_normal(shape)).astype(dtype)


def arguments(
    op: Any, rank: int, seed: int, num_tokens: int, hidden: int, dtype: Any, weights: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Return an op's arrays of one rank, and what follows ``workspace``."""
    rng = np.random.default_rng([seed, rank])
    if op is allreduce:
        return [values(rng, (num_tokens, hidden), dtype)], {}
    shared = values(rng, (num_tokens, hidden), dtype)
    if op is reduce_allreduce:
        w = values(rng, (3, num_tokens), weights)
        return [values(rng, (3, num_tokens, hidden), dtype), w], {"shared_output": shared}
    index = rng.permutation(num_tokens * 5 + 3)[: num_tokens * 5].astype(np.int32)
    index[rng.random(index.size) < 0.3] = -1
    w = values(rng, (num_tokens, 5), weights)
    rows = values(rng, (num_tokens * 5 + 3, hidden), dtype)
    rows[np.setdiff1d(np.arange(len(rows)), index)] = np.nan
    options = {"shared_output": shared, "routed_scaling_factor": 2.5}
    return [rows, w, index.reshape(num_tokens, 5)], options


def epilogue(
    seed: int, num_tokens: int, hidden: int, dtype: Any, name: str | None, backend: str
) -> Epilogue:
    """Return the same epilogue on every rank."""
    rng = np.random.default_rng(seed)
    residual, gamma = values(rng, (num_tokens, hidden), dtype), values(rng, (hidden,), dtype)
    q = FORMATS[name]
    if q is not None and q.scale is not None:
        q = Quantization(q.format, to_backend(q.scale, backend), layout=q.layout)
    return Epilogue(*to_backend((residual, gamma), backend), 1e-5, 1.0, q)


def assert_same(got: AllReduced, want: AllReduced) -> None:
    """Compare everything that was asked for, to the bit."""
    for name in ("sum", "residual", "norm"):
        if getattr(want, name) is not None:
            assert_same_bits(getattr(got, name), getattr(want, name))
    if want.quantized is not None:
        a, b = to_host(got.quantized.values), to_host(want.quantized.values)
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
        a, b = to_host(got.quantized.scale), to_host(want.quantized.scale)
        np.testing.assert_array_equal(
            np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
        )


def check(group: Any, workspace: Workspace, op: Any, case: dict[str, Any], seed: int) -> None:
    """Run an op on the device and the same on the host over the group."""
    sizes = (case["num_tokens"], case["hidden"], case["dtype"])
    arrays, options = arguments(op, group.rank, seed, *sizes, case.get("weights", F32))
    outputs = case.get("outputs")
    host, there = (
        epilogue(seed, *sizes, case.get("quantize"), backend) for backend in ("numpy", "cupy")
    )
    want = op(*arrays, group, epilogue=host, outputs=outputs, **options)
    arrays, options = [to_backend(a, "cupy") for a in arrays], to_backend(options, "cupy")
    assert_same(op(*arrays, workspace, epilogue=there, outputs=outputs, **options), want)


def every_case(dtype: Any, hidden: int) -> list[dict[str, Any]]:
    """Return cases of every format, and of every choice of outputs."""
    cases: list[dict[str, Any]] = [
        {"quantize": name, "num_tokens": tokens, "hidden": hidden, "dtype": dtype}
        for name, tokens in zip(FORMATS, itertools.cycle((1, 3, 130, 16)), strict=False)
        if dtype != F32 or name is None
    ]
    for outputs in (["sum"], ["residual"], ["norm"], ["sum", "residual", "norm"]):
        cases.append({"outputs": outputs, "num_tokens": 9, "hidden": hidden, "dtype": dtype})
    return cases


def run_cases(group: Any, dtype: Any, hidden: int) -> None:
    """Run every op of a dtype and size, back to back in one workspace."""
    name = np.dtype(dtype).name
    with Workspace(group, 130, hidden, name) as workspace:
        for seed, case in enumerate(every_case(dtype, hidden)):
            for op in (finalize_allreduce, reduce_allreduce, allreduce):
                if op is allreduce or dtype != F32:
                    check(
                        group, workspace, op, case | {"weights": (F32, BF16, F16)[seed % 3]}, seed
                    )


SIZES = [(BF16, HIDDEN), (F16, 2048), (BF16, 288), (F32, 4096), (BF16, 16384)]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "hidden"), SIZES)
def test_one_rank(dtype, hidden):
    run_cases(SingleGroup(), dtype, hidden)


@pytest.mark.multigpu
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("dtype", "hidden"), SIZES)
def test_every_op(ranks, monkeypatch, dtype, hidden, low):
    """One shot at every size, and two shots above a low threshold."""
    for size in range(2, 17):
        monkeypatch.setitem(layout.ONE_SHOT_BYTES, size, LOW if low else 1 << 30)
    ranks(lambda group: run_cases(group, dtype, hidden))


@pytest.mark.multigpu
def test_tokens_grow_and_shrink(ranks, monkeypatch):
    """Calls of both protocols without a host synchronisation between them."""
    for size in range(2, 17):
        monkeypatch.setitem(layout.ONE_SHOT_BYTES, size, 16 * HIDDEN * 2)
    tokens = [1, 512, 3, 0, 16, 17, 512, 1, 2, 40, 1, 300, 7]

    def work(group):
        inputs = [values(np.random.default_rng([n, group.rank]), (n, HIDDEN), BF16) for n in tokens]
        there = to_backend(tuple(inputs), "cupy")
        with Workspace(group, 512, HIDDEN) as workspace:
            got = [allreduce(x, workspace).sum for x in there for _ in range(2)]
            want = [allreduce(x, group).sum for x in inputs]
            for i, result in enumerate(got):
                assert_same_bits(result, want[i // 2])

    ranks(work)


def replay(group: Any, graph: Any, stream: Any) -> None:
    """Launch a graph; threads allocate nothing until all have done so (``docs/multi-gpu.md``)."""
    group.barrier()
    graph.launch(stream)
    group.barrier()
    stream.synchronize()


@pytest.mark.multigpu
def test_replay_of_a_graph(ranks):
    """Three calls in a graph, replayed with other data in place; no multiple of the buffers."""
    import cupy

    def work(group):
        stream = cupy.cuda.Stream(non_blocking=True)
        with Workspace(group, 64, HIDDEN) as workspace, stream:
            x = [cupy.zeros((n, HIDDEN), BF16) for n in (64, 1, 16, 5)]
            outs = [AllReduced(sum=cupy.empty_like(a)) for a in x]
            for a, out in zip(x, outs, strict=True):
                allreduce(a, workspace, out=out)
            stream.synchronize()
            group.barrier()
            stream.begin_capture()
            for a, out in zip(x, outs, strict=True):
                allreduce(a, workspace, out=out)
            graph = stream.end_capture()
            for step in range(7):
                rng = np.random.default_rng([step, group.rank])
                data = [values(rng, a.shape, BF16) for a in x]
                for a, new in zip(x, data, strict=True):
                    a.view(np.uint16).set(new.view(np.uint16), stream)
                replay(group, graph, stream)
                for out, new in zip(outs, data, strict=True):
                    assert_same_bits(out.sum, allreduce(new, group).sum)
            group.barrier()

    ranks(work)


@pytest.mark.multigpu
@pytest.mark.parametrize("split", rank_layers.SPLITS)
@pytest.mark.parametrize("recipe", ["bf16", "fp8_block"])
def test_a_layer(ranks, recipe, split):
    random = rank_layers.drawn(recipe)
    tokens = (rank_layers.MAX_TOKENS, 0, 1, 7, 64)

    def work(group):
        if split == "columns" and group.size > 3:
            return  # three blocks of columns
        rank_layers.check_calls(group, random, rank_layers.SPLITS[split], "cupy", tokens)

    ranks(work)


@pytest.mark.multigpu
def test_a_layer_in_a_graph(ranks):
    """Two layers of one workspace, captured together."""
    import cupy

    random = rank_layers.drawn("fp8_block", 64)

    def work(group):
        stream = cupy.cuda.Stream(non_blocking=True)
        with comm.Workspace(group, 512, rank_layers.HIDDEN) as workspace, stream:
            layers = [
                rank_layers.make_layer(workspace, random, rank_layers.SPLITS["even"], "cupy")
                for _ in range(2)
            ]
            x, logits = to_backend((random.x, random.logits), "cupy")
            middle, out = cupy.empty_like(x), cupy.empty_like(x)
            for layer in layers:
                layer.warmup(len(x))
            stream.synchronize()
            stream.begin_capture()
            layers[0](x, logits, out=middle)
            layers[1](middle, logits, out=out)
            graph = stream.end_capture()
            want = layers[1](layers[0](x, logits), logits)
            for _ in range(4):
                out.view(np.uint16).fill(0xFFFF)
                replay(group, graph, stream)
                assert_same_bits(out, want)
            for layer in layers:
                layer.close()
            group.barrier()

    ranks(work)
