"""What a rank of `python -m cumoe demo --ranks N` does, as ``python -m cumoe.cli.rank``.

Runs its shard of an expert layer; the layer sums the parts of all ranks, on GPUs through memory
that they share. Rank 0 then runs the whole layer and compares. Finds the other ranks by the
environment (:func:`cumoe.comm.connect_tcp`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from cumoe.arrays import empty
from cumoe.cli.console import CommandError, facts, make_console, seconds
from cumoe.cli.oracle import MAX_ERROR, RMS_ERROR
from cumoe.cli.problem import Problem, fit_shape, make_problem, make_weights
from cumoe.comm import Group, GroupError, WorkspaceError, connect_tcp
from cumoe.config import Array, ExpertShard
from cumoe.launch import LaunchError
from cumoe.launch.errors import require
from cumoe.models import MODELS, ModelShape, get_shape

DEFAULT_TOKENS = {"numpy": 64, "cuda": 4096}
TIMED_CALLS = 20

RMS_BOUND = 2**0.5 * RMS_ERROR
"""Two roundings where the single demo has one: the sum's, and those of the parts, whose squares add
up to about that of the sum."""


@dataclass(frozen=True)
class SumErrors:
    """How the sum over ranks compares with the whole layer; relative to its RMS.

    The whole is not rounded to bfloat16; the parts are, and their sum.
    """

    max_error: float
    rms_error: float
    same_on_all: bool

    @property
    def passed(self) -> bool:
        """Whether all is within bounds; a NaN is not."""
        close = self.max_error <= MAX_ERROR and self.rms_error <= RMS_BOUND
        return close and self.same_on_all


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m cumoe.cli.rank", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--recipe", choices=("fp8_block", "bf16"), required=True)
    parser.add_argument("--backend", choices=("numpy", "cuda"), required=True)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        with connect_tcp() as group:
            return 0 if check_sum(group, args) else 1
    except (GroupError, WorkspaceError, LaunchError, CommandError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


def check_sum(group: Group, args: argparse.Namespace) -> bool:
    """Run the layer together, and compare its result with the whole layer's on rank 0."""
    console = make_console()
    num_tokens = args.tokens or DEFAULT_TOKENS[args.backend]
    with _device(group, args.backend) as name:
        shape = fit_shape(get_shape(args.model), args.recipe, num_tokens, args.backend)
        shard = ExpertShard.even(shape.num_experts, group.rank, group.size)
        if group.rank == 0:
            title = f"  {shape.name}, {args.recipe}, {num_tokens} tokens, {group.size} ranks"
            console.print(Text.assemble(("cumoe demo", "bold"), title))
        group.barrier()
        start = time.perf_counter()
        problem = draw_layer(shape, args, num_tokens, shard, group)
        got, took = run_layer(problem, group)
        first, last = shard.expert_offset, shard.expert_offset + shard.num_local_experts - 1
        made = seconds(time.perf_counter() - start)
        call = f", then {seconds(took)} a call" if args.backend == "cuda" else ""
        console.print(f"{name}experts {first} to {last}: {made}{call}")
        digests = group.allgather(hashlib.sha256(got.tobytes()).digest())
        problem.layer.close()
        errors = None
        if group.rank == 0:
            alone = draw_layer(shape, args, num_tokens, None, None)
            whole = run_layer(alone, None, empty(alone.x, got.shape, "float32"))[0]
            errors = compare_sum(got, whole, len(set(digests)) == 1)
            _print_errors(console, errors)
        passed: bool = group.bcast(errors is not None and errors.passed)
    return passed


@contextlib.contextmanager
def _device(group: Group, backend: str) -> Iterator[str]:
    """Make a rank's GPU current and say which it is; nothing on the host."""
    if backend != "cuda":
        yield ""
        return
    cupy = require("cupy")
    with cupy.cuda.Device(int(os.environ.get("LOCAL_RANK", group.rank))) as device:
        name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        yield f"GPU {device.id}, {name}: "


def draw_layer(
    shape: ModelShape,
    args: argparse.Namespace,
    num_tokens: int,
    shard: ExpertShard | None,
    group: Group | None,
) -> Problem:
    """Return a shard of the layer, or all of it; weights depend on the seed."""
    experts = list(range(shape.num_experts + shape.num_shared_experts))
    if shard is not None:
        first, shared = shard.expert_offset, experts[shape.num_experts :]
        experts = experts[first : first + shard.num_local_experts] + shared
    weights = make_weights(shape, args.recipe, args.backend, args.seed, experts=experts)
    return make_problem(
        shape, args.recipe, weights, num_tokens, args.seed, shard=shard, group=group
    )


def run_layer(
    problem: Problem, group: Group | None, out: Array | None = None
) -> tuple[NDArray[Any], float]:
    """Return the result on the host, and the seconds of a later call on a GPU."""

    def call() -> Any:
        return problem.layer(problem.x, problem.logits, out=out)

    y = call()
    if isinstance(y, np.ndarray):
        return y, 0.0
    stream = require("cupy").cuda.get_current_stream()
    stream.synchronize()
    host = np.asarray(y.view(np.uint8).get()).view(y.dtype)
    if group is not None:
        group.barrier()
    start = time.perf_counter()
    for _ in range(TIMED_CALLS):
        call()
    stream.synchronize()
    return host, (time.perf_counter() - start) / TIMED_CALLS


def _print_errors(console: Console, errors: SumErrors) -> None:
    verdict = Text("PASS", "bold green") if errors.passed else Text("FAIL", "bold red")
    console.print(Text.assemble(("Sum over ranks against the layer  ", "bold"), verdict))
    table = facts()
    table.add_row("largest", f"{errors.max_error:.2e} (bound {MAX_ERROR:.2e})")
    table.add_row("RMS", f"{errors.rms_error:.2e} (bound {RMS_BOUND:.2e})")
    same = "same bits on every rank" if errors.same_on_all else "DIFFERENT between ranks"
    table.add_row("sum", same)
    console.print(table)


def compare_sum(got: NDArray[Any], whole: NDArray[Any], same_on_all: bool) -> SumErrors:
    """Compare the sum over ranks with the whole layer."""
    expected = whole.astype(np.float64)
    error = np.abs(got.astype(np.float64) - expected)
    rms = float(np.sqrt(np.mean(expected**2)))
    return SumErrors(
        max_error=float((error / np.maximum(rms, np.abs(expected))).max()),
        rms_error=float(np.sqrt(np.mean(error**2)) / rms),
        same_on_all=same_on_all,
    )


if __name__ == "__main__":
    sys.exit(main())
