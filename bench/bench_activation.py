"""Time of the activation on its own, beside CuPy's and the rate of a copy.

    python -m bench.bench_activation               # into bench/results/stages.json
    python -m bench.bench_activation --dry-run     # a few tokens on NumPy

Rows ``activation``: plain SwiGLU of DeepSeek-V3's experts (intermediate size 2048, top 8 of 256,
uniform routing, the layer's row tiles) to fp8 with a scale per row and 128 columns. Variants:
``fp8`` and ``bf16`` by the input; ``fp8 shard`` holds 32 of the 256 experts, its buffers sized for
all. Bytes: those of the rows that hold a token, read and written once. Peers (``peers``, and the
fastest as ``peer``) have those rows packed: ``cupy`` is the same in array operations, without the
rounding to fp8, a dtype CuPy has not; ``triton``, where torch and Triton are installed, a kernel of
:mod:`bench.triton_stages` with the best of a few configurations, its answer compared. From 100 us
on timed cold, after a flush of the L2; below as replays of a graph of several calls, which rotate
over up to 8 inputs; Triton's likewise, CuPy's by single calls.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console

import cumoe
from bench.arguments import make_stage_parser
from bench.harness import copy_rate_tbps, num_cold_inputs
from bench.inputs import find_backend, free_memory, random_bf16, random_words, to_host
from bench.peer_stages import Stage, activation_stage
from bench.record import REPO, Row, make_row, print_table, write_results
from bench.shapes import ModelShape, get_shape
from bench.stage_timing import time_stage
from cumoe import Activation, ExpertShard, Permutation, Quantized, kernels_activation
from cumoe.arrays import DTYPES, FP8
from cumoe.config import Array
from cumoe.launch import get_device
from cumoe.reference import activation as twin
from cumoe.tuning import SM90_ARCH, select_sm90_tile, select_tile

RESULTS = REPO / "bench" / "results" / "stages.json"
TOKENS = (1, 32, 256, 1024, 4096, 16384)
VARIANTS = ("fp8", "bf16", "fp8 shard")
MAX_SETS = 8
CHECKED_ROWS = 64
MAX_PEER_ROWS = 1 << 17  # whose float32 temporaries fit beside the inputs


@dataclass(eq=False)
class Case:
    """One call's arrays: rows in expert order, their scales if they are fp8, and the result."""

    x: Array
    x_scale: Array | None
    permutation: Permutation
    out: Quantized
    num_rows: int

    def work(self) -> Callable[[], object]:
        """Return the call: the planned launch on a GPU, the op on the host."""
        if isinstance(self.x, np.ndarray):
            x: Any = self.x if self.x_scale is None else Quantized(self.x, self.x_scale)
            options: dict[str, Any] = {
                "gate_up_order": "gate_up",
                "permutation": self.permutation,
                "out_dtype": "float8_e4m3fn",
                "out": self.out,
            }
            return lambda: cumoe.activate(x, **options)
        import cupy

        device = get_device(int(self.x.device.id))
        item = kernels_activation.activation(
            self.x,
            self.x_scale,
            self.out.values,
            self.out.scale,
            gate_up_order="gate_up",
            activation=Activation(),
            permutation=self.permutation,
            num_sms=device.num_sms,
        )
        return lambda: item.run(device, cupy.cuda.get_current_stream().ptr)

    def in_triton(self, xp: Any) -> Stage:
        """Return the same in Triton."""
        held = self.permutation.token_idx >= 0
        return activation_stage(xp, self.x, self.x_scale, self.out, self.num_rows, held)

    def num_bytes(self) -> int:
        """Return the bytes of the rows that hold a token, read and written."""
        arrays = (self.x, self.x_scale, self.out.values, self.out.scale)
        return self.num_rows * sum(a[:1].nbytes for a in arrays if a is not None)


def make_case(
    xp: Any, shape: ModelShape, num_tokens: int, variant: str, tile: int, seed: int
) -> Case:
    """Draw rows of normal gate and up values, and a uniform routing."""
    rng = np.random.default_rng([seed, num_tokens])
    chosen = np.argsort(rng.random((num_tokens, shape.num_experts)), axis=1)[:, : shape.top_k]
    shard = ExpertShard(0, shape.num_experts // 8) if variant.endswith("shard") else None
    permutation = cumoe.group(
        xp.asarray(chosen.astype(np.int32)), num_experts=shape.num_experts, shard=shard, tile=tile
    )
    size, rows = shape.intermediate_size, permutation.max_rows
    x_scale = None
    x = random_bf16(xp, (rows, 2 * size), seed, deviation=2.0)
    if variant.startswith("fp8"):
        codes = (random_words(xp, rows * size // 2, seed).view(np.uint8) & 0xF7).reshape(x.shape)
        x = codes.view(ml_dtypes.float8_e4m3fn) if xp is np else codes
        x_scale = xp.full((rows, 2 * -(-size // 128)), 2.0**-7, np.float32)
    values = xp.zeros((rows, size), np.uint8)
    out = Quantized(
        values.view(ml_dtypes.float8_e4m3fn) if xp is np else values,
        xp.zeros((rows, -(-size // 128)), np.float32),
    )
    held = int(to_host(permutation.tokens_per_expert).sum())
    return Case(x, x_scale, permutation, out, held)


def check_answer(case: Case) -> None:
    """Compare some rows with the twin.

    Raises
    ------
    ArithmeticError
        If a scale is off by 1e-5, or a number by more than one step of fp8.
    """
    case.work()()
    held = np.flatnonzero(to_host(case.permutation.token_idx) >= 0)
    if not held.size:
        return
    rows = held[np.unique(np.linspace(0, held.size - 1, CHECKED_ROWS).astype(np.int64))]

    def sample(a: Array) -> np.ndarray:
        words = a.view(np.uint16) if a.dtype.itemsize == 2 else a.view(f"u{a.dtype.itemsize}")
        return np.stack([to_host(words[int(row)]) for row in rows])

    fp8 = np.dtype(ml_dtypes.float8_e4m3fn)
    x = sample(case.x).view(ml_dtypes.bfloat16 if case.x_scale is None else fp8)
    x_scale = None if case.x_scale is None else sample(case.x_scale).view(np.float32)
    want = twin.activate(
        x,
        x_scale,
        gate_up_order="gate_up",
        activation=Activation(),
        permutation=None,
        out_dtype=fp8.name,
    )
    assert isinstance(want, Quantized)
    scale = sample(case.out.scale).view(np.float32)
    values = sample(case.out.values).view(fp8).astype(np.float32)
    wide = want.values.astype(np.float32)
    scale_error = float(np.abs(scale / want.scale - 1).max())
    step = np.maximum(np.abs(wide) / 8, 2.0**-9)
    if not (scale_error < 1e-5 and (np.abs(values - wide) <= step).all()):
        raise ArithmeticError(f"wrong answer: a scale is off by {scale_error:.1e}, or a number is")


def peer_of(xp: Any, case: Case) -> Callable[[], object]:
    """Return the same with one array operation after the other."""
    rows, size = case.num_rows, case.out.values.shape[1]
    table = xp.asarray(
        np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )

    def run() -> object:
        if case.x_scale is None:
            words = case.x[:rows].view(np.uint16).astype(np.uint32)
            wide = (words << np.uint32(16)).view(np.float32)
        else:
            blocks = table[case.x[:rows].view(np.uint8)].reshape(rows, -1, 128)
            wide = (blocks * case.x_scale[:rows, :, None]).reshape(rows, 2 * size)
        gate, up = wide[:, :size], wide[:, size:]
        y = (gate / (1 + xp.exp(-gate)) * up).reshape(rows, -1, 128)
        scale = xp.maximum(abs(y).max(axis=2) / np.float32(448), np.float32(1.17549435e-38))
        return y / scale[:, :, None], scale

    return run


def bench_case(
    xp: Any, shape: ModelShape, num_tokens: int, variant: str, args: argparse.Namespace
) -> Row:
    """Check and time one number of tokens and return its row.

    Raises
    ------
    ArithmeticError
        If the answer is wrong; nothing is timed then.
    """
    slots = num_tokens * shape.top_k
    tile = select_tile(slots, shape.num_experts, "float8_e4m3fn")
    if xp is not np and get_device(xp.cuda.Device().id).arch == SM90_ARCH:
        tile = select_sm90_tile(num_tokens, shape.top_k, shape.num_experts, FP8)
    first = make_case(xp, shape, num_tokens, variant, tile, args.seed)
    num_sets = min(MAX_SETS, num_cold_inputs(max(first.num_bytes(), 1)))
    cases = [first]
    for i in range(1, num_sets):
        cases.append(make_case(xp, shape, num_tokens, variant, tile, args.seed + i))
    for case in cases:
        check_answer(case)
    work = [case.work() for case in cases]
    alone = peer_of(xp, first) if 0 < first.num_rows <= MAX_PEER_ROWS else None
    timed = time_stage(
        xp,
        lambda i: work[i](),
        num_sets,
        args,
        alone=alone,
        in_triton=(lambda: [case.in_triton(xp) for case in cases]) if first.num_rows else None,
    )
    return make_row(
        "activation",
        model=shape.name,
        recipe="fp8_block",
        num_tokens=num_tokens,
        num_bytes=sum(case.num_bytes() for case in cases) / num_sets,
        variant=variant,
        num_rows=first.num_rows,
        tile=tile,
        **timed,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, print and write; return 1 if an answer is wrong."""
    args = _parser().parse_args(argv)
    xp = find_backend("numpy" if args.dry_run else args.backend)
    out = args.out or (None if args.dry_run else RESULTS)
    shape = get_shape("deepseek_v3")
    roofs = {"copy_tbps": copy_rate_tbps()} if xp is not np else {}
    console = Console(width=None if sys.stdout.isatty() else 150)
    if xp is not np:
        _compile_ahead(xp)
    rows: list[Row] = []
    problems: list[str] = []
    for variant in args.variants:
        for num_tokens in args.tokens or ((1, 7) if args.dry_run else TOKENS):
            try:
                rows.append(bench_case(xp, shape, num_tokens, variant, args))
            except ArithmeticError as error:
                problems.append(f"{variant} T={num_tokens}: {error}")
                print("FAILED", problems[-1], flush=True)
            free_memory(xp)
    print_table(rows, roof_tbps=roofs.get("copy_tbps"), console=console)
    if out is not None and rows:
        write_results(out, rows, seed=args.seed, merge=args.merge, **roofs)
    return 1 if problems else 0


def _compile_ahead(xp: Any) -> None:
    """Compile the kernel for all rows of a unit, so that no call has to."""
    from cumoe.launch import warmup

    specs = [
        kernels_activation.activation_spec(
            source, "float8_e4m3fn", Activation(), gate_up_order="gate_up", rows=rows
        )
        for source in ("float8_e4m3fn", "bfloat16")
        for rows in kernels_activation.BLOCKS_PER_SM[DTYPES[source].itemsize]
    ]
    warmup(specs, [get_device(xp.cuda.Device().id).arch])


def _parser() -> argparse.ArgumentParser:
    module = "bench.bench_activation"
    return make_stage_parser(module, __doc__, RESULTS, variants=VARIANTS, tokens=TOKENS, budget=2.0)


if __name__ == "__main__":
    raise SystemExit(main())
