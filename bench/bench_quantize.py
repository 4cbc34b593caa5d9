"""Time of every quantiser and of finalize, beside CuPy's and the rate of a copy.

    python -m bench.bench_quantize --merge         # into bench/results/stages.json
    python -m bench.bench_quantize --dry-run       # a few tokens on NumPy

Rows ``quantize``: activations in bfloat16 of DeepSeek-V3's hidden size 7168, a variant for each
format; ``static`` forms are given the scale of the tensor, the others find it in a pass of its own,
and the bytes of x count twice. Rows ``finalize``: top 8 of 256, rows in the order of their experts.
Bytes are those read and written once. Peers (``peers``, and the fastest as ``peer``): ``cupy`` is
the same in array operations, without the rounding to fp8 or e2m1, dtypes CuPy has not; ``triton``,
where torch and Triton are installed, kernels of :mod:`bench.triton_stages` with the best of a few
configurations, their answers compared, for all variants but swizzled scales. From 100 us on timed
cold, after a flush of the L2; below as replays of a graph of several calls, which rotate over up to
8 inputs; Triton's likewise, CuPy's by single calls. Results are written after each variant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console

import cumoe
from bench.arguments import make_stage_parser
from bench.harness import copy_rate_tbps, num_cold_inputs
from bench.inputs import find_backend, free_memory, random_bf16, to_backend, to_host
from bench.peer_stages import Stage, finalize_stage, quantize_stage
from bench.record import REPO, Row, make_row, print_table, write_results
from bench.shapes import ModelShape, get_shape
from bench.stage_timing import time_stage
from cumoe import QuantizedNVFP4, kernels, kernels_quantize
from cumoe.config import Array
from cumoe.launch import get_device
from cumoe.microscaling import fp4_tiles
from cumoe.reference import finalize as twin_finalize
from cumoe.reference import microscaling, quantize

RESULTS = REPO / "bench" / "results" / "stages.json"
TOKENS = (1, 256, 4096, 16384)
VARIANTS = (
    "fp8_block",
    "fp8_token",
    "fp8_tensor static",
    "fp8_tensor",
    "fp8_ue8m0 32",
    "fp8_ue8m0 128",
    "nvfp4 static",
    "nvfp4 static swizzled",
    "nvfp4",
    "finalize",
)
MAX_SETS = 8
CHECKED_ROWS = 64
MAX_PEER_TOKENS = 16384
STATIC_SCALE = 0.01
TINY = np.finfo(np.float32).tiny
STATIC_GLOBAL_SCALE = 500.0


@dataclass(eq=False)
class Case:
    """One call: its inputs, its result, what runs it, and what checks some rows of the result.

    Attributes
    ----------
    work : callable
        The planned launches on a GPU, the op on the host.
    check : callable
        Takes row numbers; raises ArithmeticError if the result of one is wrong.
    peer : callable
        The same in array operations.
    in_triton : callable or None
        Returns the same in Triton; None if there is none.
    """

    num_bytes: int
    work: Callable[[], object]
    check: Callable[[np.ndarray], None]
    peer: Callable[[], object]
    in_triton: Callable[[], Stage] | None


def _words(x: Array, rows: np.ndarray) -> np.ndarray:
    """Return some rows of an array on the host, as unsigned integers."""
    kind = f"u{x.dtype.itemsize}"
    return np.stack([to_host(x[int(row)].copy().view(kind)) for row in rows])


def _widen(x: Array) -> Array:
    words = x.view(np.uint16).astype(np.uint32)
    return (words << np.uint32(16)).view(np.float32)


def _amax(x: Array) -> np.ndarray:
    """Return the largest magnitude as one float32 on the host."""
    return np.array([float(abs(_widen(x)).max())], np.float32)


def _expect(name: str, got: np.ndarray, want: np.ndarray) -> None:
    wrong = got != np.ascontiguousarray(want).view(got.dtype).reshape(got.shape)
    if wrong.any():
        raise ArithmeticError(f"wrong answer: {wrong.sum()} of {wrong.size} in {name}")


def _queue(xp: Any, launches: list[kernels.Launch], like: Array) -> Callable[[], object]:
    device = get_device(int(like.device.id))

    def work() -> None:
        stream = xp.cuda.get_current_stream().ptr
        for launch in launches:
            launch.run(device, stream)

    return work


def quantize_case(xp: Any, variant: str, num_tokens: int, hidden: int, seed: int) -> Case:
    """Draw normal activations and plan one quantiser."""
    x = random_bf16(xp, (num_tokens, hidden), seed, num_tokens, deviation=2.0)
    name, *options = variant.split()
    static = "static" in options
    layout: Any = "swizzled_128x4" if "swizzled" in options else "linear"
    call: Callable[[], Any]
    if name == "nvfp4":
        total = xp.full(1, STATIC_GLOBAL_SCALE, np.float32) if static else None
        call = partial(cumoe.quantize_nvfp4, x, global_scale=total, layout=layout)
    elif name == "fp8_tensor":
        scale = xp.full(1, STATIC_SCALE, np.float32) if static else None
        call = partial(cumoe.quantize_fp8_tensor, x, scale=scale)
    elif name == "fp8_ue8m0":
        call = partial(cumoe.quantize_fp8_ue8m0, x, group_size=int(options[0]))
    elif name == "fp8_token":
        call = partial(cumoe.quantize_fp8_token, x)
    else:
        call = partial(cumoe.quantize_fp8_block, x)
    out = call()
    work: Callable[[], object] = call
    if xp is not np:
        work = _queue(xp, _launches(xp, variant, x, out), x)
    passes = 1 if static or name not in ("fp8_tensor", "nvfp4") else 2
    num_bytes = passes * x.nbytes + out.values.nbytes + out.scale.nbytes

    check = partial(_check_quantized, variant, x, out)
    in_triton = None if layout != "linear" else partial(quantize_stage, xp, variant, x, out)
    return Case(num_bytes, work, check, partial(_peer, xp, variant, x), in_triton)


def _launches(xp: Any, variant: str, x: Array, out: Any) -> list[kernels.Launch]:
    """Return the launches that fill `out`."""
    name, *options = variant.split()
    k = kernels_quantize
    if name == "fp8_block":
        return [k.quantize_fp8_block(x, out.values, out.scale)]
    if name == "fp8_token":
        return [k.quantize_fp8_token(x, out.values, out.scale)]
    if name == "fp8_ue8m0":
        return [k.quantize_fp8_ue8m0(x, out.values, out.scale, out.group_size)]
    device = get_device(int(x.device.id))
    partials, first = None, []
    if "static" not in options:
        partials = xp.empty(k.AMAX_BLOCKS_PER_SM * device.num_sms, np.float32)
        first = [k.tensor_amax(x, partials)]
        first[0].owned = (partials,)
    if name == "fp8_tensor":
        return [*first, k.quantize_fp8_tensor(x, out.values, out.scale, partials)]
    arrays = (out.values, out.scale, out.global_scale)
    return [*first, k.quantize_nvfp4(x, *arrays, partials, out.layout)]


def _check_quantized(variant: str, x: Array, out: Any, rows: np.ndarray) -> None:
    """Compare some rows with the twin, to the bit."""
    name = variant.split()[0]
    some = _words(x, rows).view(ml_dtypes.bfloat16)
    want: Any
    if name == "fp8_block":
        want = quantize.quantize_fp8_block(some)
    elif name == "fp8_token":
        want = quantize.quantize_fp8_token(some)
    elif name == "fp8_tensor":
        scale = to_host(out.scale)
        if "static" not in variant:
            _expect("scale", scale.view("u4"), np.maximum(_amax(x) / np.float32(448), TINY))
        want = quantize.quantize_fp8_tensor(some, scale)
    elif name == "fp8_ue8m0":
        want = microscaling.quantize_fp8_ue8m0(some, out.group_size)
    else:
        total = to_host(out.global_scale)
        if "static" not in variant:
            _expect("scale", total.view("u4"), microscaling.nvfp4_global_scale(_amax(x)))
        want = microscaling.quantize_nvfp4(some, total)
    _expect("values", _words(out.values, rows), want.values)
    if name == "fp8_tensor":
        return
    scales = out.scale
    if isinstance(out, QuantizedNVFP4) and out.layout != "linear":
        scales = fp4_tiles(scales).reshape(scales.shape)[:, : x.shape[1] // 16]
    _expect("scale", _words(scales, rows), np.ascontiguousarray(want.scale))


def _peer(xp: Any, variant: str, x: Array) -> object:
    """Do the same with one array operation after the other."""
    name, *options = variant.split()
    wide = _widen(x)
    if name == "fp8_token":
        scale = xp.maximum(abs(wide).max(axis=1, keepdims=True) / np.float32(448), 4.36e-6)
        return wide / scale, scale
    if name == "fp8_tensor":
        scale = np.float32(STATIC_SCALE)
        if not options:
            scale = xp.maximum(abs(wide).max() / np.float32(448), np.float32(1e-38))
        return xp.clip(wide / scale, -448, 448), scale
    width = {"fp8_block": 128, "nvfp4": 16}.get(name) or int(options[0])
    blocks = wide.reshape(x.shape[0], -1, width)
    amax = abs(blocks).max(axis=2, keepdims=True)
    if name == "nvfp4":
        total = np.float32(STATIC_GLOBAL_SCALE)
        if "static" not in options:
            total = np.float32(2688) / amax.max()
        scale = total * (amax * np.float32(1 / 6))
        return xp.clip(blocks * (total / scale), -6, 6), scale
    scale = xp.maximum(amax / np.float32(448), np.float32(1e-10))
    if name == "fp8_ue8m0":
        scale = xp.exp2(xp.ceil(xp.log2(scale)))
    return blocks / scale, scale


def finalize_case(xp: Any, shape: ModelShape, num_tokens: int, hidden: int, seed: int) -> Case:
    """Draw rows in expert order for a uniform routing."""
    rng = np.random.default_rng([seed, num_tokens])
    chosen = np.argsort(rng.random((num_tokens, shape.num_experts)), axis=1)[:, : shape.top_k]
    ids = chosen.astype(np.int32)
    p = cumoe.group(xp.asarray(ids), num_experts=shape.num_experts, tile=16)
    rows = random_bf16(xp, (p.max_rows, hidden), seed, num_tokens)
    weights = to_backend(rng.random(ids.shape, np.float32), xp)
    index = p.permuted_idx
    out = cumoe.finalize(rows, weights, index)
    work: Callable[[], object] = partial(cumoe.finalize, rows, weights, index, out=out)
    if xp is not np:
        work = _queue(xp, [kernels.finalize(rows, weights, index, out)], rows)

    def check(tokens: np.ndarray) -> None:
        slots = to_host(index)[tokens]
        held = _words(rows, slots.ravel()).view(ml_dtypes.bfloat16)
        want = np.zeros((len(tokens), hidden), ml_dtypes.bfloat16)
        order = np.arange(slots.size, dtype=np.int32).reshape(slots.shape)
        twin_finalize.finalize(held, to_host(weights)[tokens], order, want)
        _expect("out", _words(out, tokens), want)

    def peer() -> object:
        total = xp.zeros(out.shape, np.float32)
        for k in range(index.shape[1]):
            total += weights[:, k, None] * _widen(rows.view(np.uint16)[index[:, k]])
        return total

    num_bytes = index.size * hidden * 2 + out.nbytes + weights.nbytes + index.nbytes
    in_triton = partial(finalize_stage, xp, rows, weights, index, out)
    return Case(num_bytes, work, check, peer, in_triton)


def make_case(xp: Any, shape: ModelShape, variant: str, num_tokens: int, seed: int) -> Case:
    """Make the inputs of one variant."""
    if variant == "finalize":
        return finalize_case(xp, shape, num_tokens, shape.hidden_size, seed)
    return quantize_case(xp, variant, num_tokens, shape.hidden_size, seed)


def bench_case(
    xp: Any, shape: ModelShape, variant: str, num_tokens: int, args: argparse.Namespace
) -> Row:
    """Check and time one number of tokens and return its row.

    Raises
    ------
    ArithmeticError
        If the answer is wrong; nothing is timed then.
    """
    first = make_case(xp, shape, variant, num_tokens, args.seed)
    num_sets = min(MAX_SETS, num_cold_inputs(first.num_bytes))
    cases = [first]
    cases += [make_case(xp, shape, variant, num_tokens, args.seed + i) for i in range(1, num_sets)]
    rows = np.unique(np.linspace(0, num_tokens - 1, CHECKED_ROWS).astype(np.int64))
    for case in cases:
        case.work()
        case.check(rows)
    in_triton = [case.in_triton for case in cases if case.in_triton is not None]
    timed = time_stage(
        xp,
        lambda i: cases[i].work(),
        num_sets,
        args,
        alone=first.peer if num_tokens <= MAX_PEER_TOKENS else None,
        in_triton=(lambda: [make() for make in in_triton]) if in_triton else None,
    )
    return make_row(
        "finalize" if variant == "finalize" else "quantize",
        model=shape.name,
        recipe=None if variant == "finalize" else variant.split()[0],
        num_tokens=num_tokens,
        num_bytes=first.num_bytes,
        variant=None if variant == "finalize" else variant,
        **timed,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, print and write; return 1 if a case failed."""
    args = _parser().parse_args(argv)
    xp = find_backend("numpy" if args.dry_run else args.backend)
    out = args.out or (None if args.dry_run else RESULTS)
    shape = get_shape("deepseek_v3")
    roofs = {"copy_tbps": copy_rate_tbps()} if xp is not np else {}
    console = Console(width=None if sys.stdout.isatty() else 150)
    rows: list[Row] = []
    problems: list[str] = []
    for variant in args.variants:
        for num_tokens in args.tokens or ((1, 7) if args.dry_run else TOKENS):
            try:
                rows.append(bench_case(xp, shape, variant, num_tokens, args))
            except Exception as error:  # the other cases are worth having
                problems.append(f"{variant} T={num_tokens}: {type(error).__name__}: {error}")
                print("FAILED", problems[-1], flush=True)
            free_memory(xp)
        if out is not None and rows:
            write_results(out, rows, seed=args.seed, merge=args.merge, **roofs)
    print_table(rows, roof_tbps=roofs.get("copy_tbps"), console=console)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    module = "bench.bench_quantize"
    return make_stage_parser(module, __doc__, RESULTS, variants=VARIANTS, tokens=TOKENS, budget=1.0)


if __name__ == "__main__":
    raise SystemExit(main())
