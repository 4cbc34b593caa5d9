"""What a rank of `python -m cumoe demo --ranks N` does, as ``python -m cumoe.cli.rank``.

On NumPy: its shard of an expert layer; the parts are summed through the group and the sum compared
with the whole layer on rank 0. On GPUs: a workspace, through which every rank writes into every
other's memory. Finds the other ranks by the environment (:func:`cumoe.comm.connect_tcp`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from cumoe.cli.console import CommandError, facts, make_console, quantity, seconds
from cumoe.cli.oracle import MAX_ERROR, RMS_ERROR
from cumoe.cli.problem import fit_shape, make_problem, make_weights
from cumoe.comm import GroupError, TcpGroup, Workspace, WorkspaceError, connect_tcp
from cumoe.comm.layout import SENTINEL
from cumoe.config import ExpertShard
from cumoe.launch import LaunchError
from cumoe.launch.errors import require
from cumoe.models import MODELS, ModelShape, get_shape

NUMPY_TOKENS = 64
CUDA_TOKENS = 4096
_WORDS = 8  # that each rank writes into each block


@dataclass(frozen=True)
class SumErrors:
    """How the sum of the shards' parts compares with the whole layer; relative to its RMS.

    The parts have the bits of the layer's terms but for shared experts: NumPy multiplies a slice of
    the tokens in another order, which moves a row's rounding now and then. So the bounds are those
    of the single demo.
    """

    max_error: float
    rms_error: float
    same_on_all: bool

    @property
    def passed(self) -> bool:
        """Whether all is within bounds; a NaN is not."""
        close = self.max_error <= MAX_ERROR and self.rms_error <= RMS_ERROR
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
            check = check_memory if args.backend == "cuda" else check_sum
            return 0 if check(group, args) else 1
    except (GroupError, WorkspaceError, LaunchError, CommandError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


def check_sum(group: TcpGroup, args: argparse.Namespace) -> bool:
    """Run this rank's shard, add all parts up, and compare with the whole layer."""
    console = make_console()
    num_tokens = args.tokens or NUMPY_TOKENS
    shape = fit_shape(get_shape(args.model), args.recipe, num_tokens, "numpy")
    shard = ExpertShard.even(shape.num_experts, group.rank, group.size)
    if group.rank == 0:
        title = f"  {shape.name}, {args.recipe}, {num_tokens} tokens, {group.size} ranks on NumPy"
        console.print(Text.assemble(("cumoe demo", "bold"), title))
    group.barrier()
    start = time.perf_counter()
    part = run_layer(shape, args, num_tokens, shard)
    first, last = shard.expert_offset, shard.expert_offset + shard.num_local_experts - 1
    console.print(f"experts {first} to {last}: {seconds(time.perf_counter() - start)}")
    total = add_parts(group.allgather(part.tobytes()), part.shape)
    digests = group.allgather(hashlib.sha256(total.tobytes()).digest())
    errors = None
    if group.rank == 0:
        whole = run_layer(shape, args, num_tokens, None)
        errors = compare_sum(total, whole, len(set(digests)) == 1)
        verdict = Text("PASS", "bold green") if errors.passed else Text("FAIL", "bold red")
        console.print(Text.assemble(("Sum of the shards against the layer  ", "bold"), verdict))
        table = facts()
        table.add_row("largest", f"{errors.max_error:.2e} (bound {MAX_ERROR:.2e})")
        table.add_row("RMS", f"{errors.rms_error:.2e} (bound {RMS_ERROR:.2e})")
        same = "same bits on every rank" if errors.same_on_all else "DIFFERENT between ranks"
        table.add_row("sum", same)
        console.print(table)
    passed: bool = group.bcast(errors is not None and errors.passed)
    return passed


def run_layer(
    shape: ModelShape, args: argparse.Namespace, num_tokens: int, shard: ExpertShard | None
) -> NDArray[np.float32]:
    """Return the float32 result of a shard, or of the whole layer; weights depend on the seed."""
    experts = list(range(shape.num_experts + shape.num_shared_experts))
    if shard is not None:
        first, shared = shard.expert_offset, experts[shape.num_experts :]
        experts = experts[first : first + shard.num_local_experts] + shared
    weights = make_weights(shape, args.recipe, "numpy", args.seed, experts=experts)
    problem = make_problem(shape, args.recipe, weights, num_tokens, args.seed, shard=shard)
    out = np.empty(problem.x.shape, np.float32)
    problem.layer(problem.x, problem.logits, out=out)
    return out


def add_parts(parts: Sequence[bytes], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Add the ranks' parts in the order of the ranks, which gives all of them the same bits."""
    total = np.zeros(shape, np.float32)
    for part in parts:
        total += np.frombuffer(part, np.float32).reshape(shape)
    return total


def compare_sum(
    total: NDArray[np.float32], whole: NDArray[np.float32], same_on_all: bool
) -> SumErrors:
    """Compare the sum of the parts with the whole layer."""
    error = np.abs(total.astype(np.float64) - whole)
    rms = float(np.sqrt(np.mean(whole.astype(np.float64) ** 2)))
    return SumErrors(
        max_error=float((error / np.maximum(rms, np.abs(whole))).max()),
        rms_error=float(np.sqrt(np.mean(error**2)) / rms),
        same_on_all=same_on_all,
    )


def check_memory(group: TcpGroup, args: argparse.Namespace) -> bool:
    """Make a workspace and write through it from every rank to every other."""
    console = make_console()
    local = int(os.environ.get("LOCAL_RANK", group.rank))
    with require("cupy").cuda.Device(local) as device:
        name = require("cupy").cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        hidden, num_tokens = get_shape(args.model).hidden_size, args.tokens or CUDA_TOKENS
        if group.rank == 0:
            title = f"  {group.size} ranks, workspace for {num_tokens} tokens of {hidden} bfloat16"
            console.print(Text.assemble(("cumoe demo", "bold"), title))
        group.barrier()
        start = time.perf_counter()
        with Workspace(group, num_tokens, hidden, engine="peer_memory") as workspace:
            made = seconds(time.perf_counter() - start)
            size = quantity(workspace.num_bytes, "B")
            console.print(f"GPU {device.id}, {name}: {size} by {workspace.kind}, made in {made}")
            wrong = write_to_peers(workspace)
        results = group.allgather(wrong)
    if group.rank == 0:
        verdict = Text("FAIL", "bold red") if any(results) else Text("PASS", "bold green")
        told = f"  {group.size * group.size} blocks written, {sum(map(len, results))} wrong"
        console.print(Text.assemble(("Memory of the peers  ", "bold"), verdict, told))
    return not any(results)


def write_to_peers(workspace: Workspace) -> list[int]:
    """Write from a kernel into every rank's block; return the ranks whose words are wrong here.

    Collective; the block holds what it held before.
    """
    cupy = require("cupy")
    group = workspace.group

    def words(address: int) -> object:
        memory = cupy.cuda.UnownedMemory(address, workspace.num_bytes, workspace, workspace.device)
        return cupy.ndarray(
            (group.size, _WORDS), dtype=np.uint32, memptr=cupy.cuda.MemoryPointer(memory, 0)
        )

    if group.size == 1:
        return []
    views = [words(address) for address in workspace.buffers]
    for rank, view in enumerate(views):
        view[group.rank] = np.uint32(1000 * group.rank + rank)  # type: ignore[index]
    cupy.cuda.Device().synchronize()
    group.barrier()
    own = views[group.rank]
    found = cupy.asnumpy(own)
    group.barrier()
    own[...] = np.uint32(SENTINEL)  # type: ignore[index]
    cupy.cuda.Device().synchronize()
    group.barrier()
    return [r for r in range(group.size) if (found[r] != 1000 * r + group.rank).any()]


if __name__ == "__main__":
    sys.exit(main())
