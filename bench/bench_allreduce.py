"""Time of the all-reduces over peer memory, beside NCCL, and of an expert layer on several GPUs.

    python -m bench.bench_allreduce --ranks 2          # into bench/results/allreduce.json
    python -m bench.bench_allreduce --ranks 2 --stress # 100000 calls, checked and not timed
    python -m bench.bench_allreduce --dry-run          # a few tokens on NumPy

Starts its ranks itself, a process for each GPU. Rows, of DeepSeek-V3's sizes in bfloat16:
``finalize_allreduce`` (top 8, shared output, residual, RMSNorm; variant ``fp8_block`` quantises the
norm), whose peer is in one graph this package's finalize kernel, NCCL's all-reduce and a kernel for
residual and norm; ``allreduce``, whose peer is NCCL's, as ``nccl_us`` is in the other rows;
``reduce_allreduce`` of 8 experts; ``moe_layer``, experts shared out evenly, with ``rows_us`` for
the call without the sum over ranks, ``sum_us`` for that sum alone, and ``comm_share``, what the
whole call takes longer than the one without it. TB/s: the bytes of the summed tokens. NCCL runs
without NVLink multicast. Timed as replays of a graph of several calls with a warm L2; the slowest
rank counts. ``--protocol`` forces one, for finding the thresholds of ``cumoe/comm/layout.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console

from bench import allreduce_stress
from bench.allreduce_case import (
    Case,
    Chain,
    check_case,
    check_chain,
    check_outputs,
    checked_tokens,
    finalize_case,
    part_of_rows,
    plain_case,
    poison,
    reduce_case,
    reduced,
)
from bench.arguments import make_parser
from bench.harness import measure_ranks
from bench.inputs import (
    TINY,
    compile_ahead,
    find_backend,
    free_memory,
    make_bias,
    make_call,
    make_weights,
)
from bench.ranks import (
    PROTOCOLS,
    Kernel,
    Ranks,
    Watchdog,
    compile_kernels,
    open_ranks,
    peer_copy_rates,
    rank_command,
)
from bench.record import REPO, Row, make_row, print_table, write_results
from bench.shapes import ModelShape, get_shape
from cumoe import ExpertShard, MoELayer
from cumoe.arrays import empty
from cumoe.cli.ranks import start
from cumoe.comm import AllReduced, connect_tcp, finalize_allreduce
from cumoe.comm.layout import MAX_WORLD_SIZE

MODULE = "bench.bench_allreduce"
RESULTS = REPO / "bench" / "results" / "allreduce.json"
OPS = ("finalize_allreduce", "allreduce", "reduce_allreduce", "moe_layer")
RECIPES = ("fp8_block", "bf16")
TOKENS = {
    "finalize_allreduce": (1, 4, 16, 64, 128, 512, 2048, 8192),
    "allreduce": (1, 4, 16, 64, 128, 512, 2048, 8192),
    "reduce_allreduce": (1, 16, 128),
    "moe_layer": (1, 64, 4096),
}
DRY_TOKENS = {op: (1, 7, 130) if op == OPS[0] else (1, 7) for op in OPS}
STRESS_CALLS, STRESS_TOKENS, DRY_STRESS_TOKENS = 100_000, 2048, 40
LAYER_SETS = 8
"""Inputs of a layer of few tokens, whose experts are spread over the ranks by chance."""

Progress = Callable[[], None]


def bench_op(
    ranks: Ranks, op: str, variant: str | None, case: Case, args: argparse.Namespace
) -> Row:
    """Check and time an op and its peer, and return its row; collective.

    Raises
    ------
    ArithmeticError
        On every rank, if an answer is wrong; nothing is timed then.
    """
    tokens = case.num_tokens
    out = check_case(case, ranks)
    runs: dict[str, Callable[[int], object]] = {"op": lambda i: case.fused(out=out)}
    if ranks.reducer is not None:
        chain = Chain.of(case, ranks)
        check_chain(chain)
        runs["peer"] = lambda i: chain.run()
        if case.local is not None:
            runs["nccl"] = lambda i: chain.reduce()
    calls = calls_of(tokens) if ranks.on_device else 1
    timings = measure_ranks(
        runs, ranks.group, calls=calls, repeats=args.repeats, on_device=ranks.on_device
    )
    peer: dict[str, Any] = {}
    if ranks.reducer is not None:
        name = ranks.reducer.name
        peer["peer"] = name if case.local is None else f"{name} between kernels"
        peer["peer_us"] = timings["peer"].us
        if "nccl" in timings:
            peer["nccl_us"] = timings["nccl"].us
    forced = None if args.protocol == "auto" else args.protocol
    return make_row(
        op,
        model=shape_of(args).name,
        recipe=None,
        num_tokens=tokens,
        num_gpus=ranks.group.size,
        timing=timings["op"],
        num_bytes=2 * tokens * ranks.hidden_size,
        variant=", ".join(name for name in (variant, forced) if name) or None,
        protocol=ranks.protocol(tokens),
        method=f"graph of {calls}" if ranks.on_device else "host",
        **peer,
    )


def calls_of(num_tokens: int) -> int:
    """Return the calls of a graph: half a millisecond or a little more of them."""
    return min(50, max(10, 8192 // num_tokens))


def bench_layer(
    ranks: Ranks, layer: MoELayer, shape: ModelShape, num_tokens: int, args: argparse.Namespace
) -> Row:
    """Check and time a layer on all ranks and return its row; collective.

    Raises
    ------
    ArithmeticError
        On every rank, if an answer is wrong; nothing is timed then.
    """
    xp, recipe = ranks.xp, str(layer.weights.recipe)
    num_sets = LAYER_SETS if num_tokens <= 64 else 1
    sets = [make_call(shape, num_tokens, xp, seed=args.seed + i) for i in range(num_sets)]
    out = empty(sets[0][0], (num_tokens, shape.hidden_size), "bfloat16")
    chosen = checked_tokens(num_tokens)
    for x, logits in sets:
        parts = layer(x, logits, finalize=False)
        own = part_of_rows(parts.rows, parts.topk_weights, parts.permuted_idx, chosen)
        want = reduced(ranks.group.allgather(own), None, chosen)
        poison(AllReduced(sum=out))
        layer(x, logits, out=out)
        check_outputs(AllReduced(sum=out), want, chosen, ranks)
    held = (parts.rows, parts.topk_weights, parts.permuted_idx, ranks.memory)
    runs = {
        "layer": lambda i: layer(*sets[i], out=out),
        "rows": lambda i: layer(*sets[i], finalize=False),
        "sum": lambda i: finalize_allreduce(*held, out=AllReduced(sum=out)),
    }
    calls = max(num_sets, 4) if ranks.on_device else num_sets
    timings = measure_ranks(
        runs,
        ranks.group,
        calls=calls,
        repeats=args.repeats,
        inputs_rotate=num_sets,
        on_device=ranks.on_device,
    )
    whole, rows_us = timings["layer"].us, timings["rows"].us
    forced = None if args.protocol == "auto" else args.protocol
    return make_row(
        "moe_layer",
        model=shape.name,
        recipe=recipe,
        num_tokens=num_tokens,
        num_gpus=ranks.group.size,
        timing=timings["layer"],
        variant=forced,
        rows_us=rows_us,
        sum_us=timings["sum"].us,
        comm_share=(whole - rows_us) / whole,
        protocol=ranks.protocol(num_tokens),
        num_input_sets=num_sets,
        method=f"graph of {calls}" if ranks.on_device else "host",
    )


def make_rank_layer(ranks: Ranks, shape: ModelShape, recipe: Any, args: Any) -> MoELayer:
    """Draw this rank's experts and plan its layer; collective."""
    shard = ExpertShard.even(shape.num_experts, ranks.group.rank, ranks.group.size)
    held = range(shard.expert_offset, shard.expert_offset + shard.num_local_experts)
    layer = MoELayer(
        make_weights(shape, recipe, ranks.xp, seed=args.seed, experts=held),
        shape.routing(),
        max_num_tokens=max(tokens_of("moe_layer", args)),
        bias=make_bias(shape, ranks.xp, seed=args.seed),
        shard=shard,
        activation=shape.activation,
        group=ranks.memory,
    )
    if ranks.group.rank == 0:
        compile_ahead(layer, tokens_of("moe_layer", args))
    ranks.group.barrier()
    return layer


class Bench:
    """One rank's run: its rows and what went wrong, the same on every rank."""

    def __init__(self, ranks: Ranks, args: argparse.Namespace, progress: Progress) -> None:
        self.ranks, self.args, self.progress = ranks, args, progress
        self.rows: list[Row] = []
        self.problems: list[str] = []

    def run(self) -> None:
        """Run all ops; rank 0 writes what there is after each of them."""
        args, ranks = self.args, self.ranks
        ops = [op for op in OPS if op in args.ops]
        compile_kernels(ranks, self.kernels(ops))
        self.progress()
        rates = peer_copy_rates(ranks) if "allreduce" in ops else {}
        for op in ops:
            first = len(self.rows)
            if op == "moe_layer":
                self.layers()
            else:
                self.cases(op)
            if op == "allreduce":
                self.rows[first:] = [row | rates for row in self.rows[first:]]
            if ranks.group.rank == 0:
                self.show(self.rows[first:])
        if rates and ranks.group.rank == 0:
            print(", ".join(f"{name} {rate:.3f}" for name, rate in rates.items()), flush=True)

    def cases(self, op: str) -> None:
        """Check and time the cases of one op."""
        args, ranks = self.args, self.ranks
        for variant in (None, "fp8_block") if op == "finalize_allreduce" else (None,):
            for tokens in tokens_of(op, args):
                name = op if variant is None else f"{op} {variant}"

                def work(variant: str | None = variant, tokens: int = tokens) -> Row:
                    if op == "finalize_allreduce":
                        case = finalize_case(ranks, tokens, variant, args.seed)
                    elif op == "reduce_allreduce":
                        case = reduce_case(ranks, tokens, args.seed)
                    else:
                        case = plain_case(ranks, tokens, args.seed)
                    return bench_op(ranks, op, variant, case, args)

                self.attempt(f"{name} T={tokens}", work)

    def layers(self) -> None:
        """Check and time the layers."""
        args, ranks, shape = self.args, self.ranks, shape_of(self.args)
        for recipe in args.recipes:
            layer = make_rank_layer(ranks, shape, recipe, args)
            self.progress()
            for tokens in tokens_of("moe_layer", args):

                def work(layer: MoELayer = layer, tokens: int = tokens) -> Row:
                    return bench_layer(ranks, layer, shape, tokens, args)

                self.attempt(f"moe_layer {recipe} T={tokens}", work)
            del layer, work
            free_memory(ranks.xp)

    def attempt(self, name: str, work: Callable[[], Row]) -> None:
        """Keep a case's row, or say what is wrong with its answer."""
        try:
            self.rows.append(work())
        except ArithmeticError as error:
            self.problems.append(f"{name}: {error}")
            if self.ranks.group.rank == 0:
                print("FAILED", self.problems[-1], flush=True)
        free_memory(self.ranks.xp)
        self.progress()

    def show(self, rows: Sequence[Row]) -> None:
        """Print the rows of an op, and write all so far, so that a run cut off leaves them."""
        args = self.args
        print_table(rows, console=Console(width=None if sys.stdout.isatty() else 150))
        for row in rows:
            name = " ".join(filter(None, (row["op"], row["recipe"], row["variant"])))
            told = ""
            if row["op"] == "moe_layer":
                told = (
                    f"{row['rows_us']:.1f} us without the sum, {row['sum_us']:.1f} us the sum "
                    f"alone, share {row['comm_share']:.1%}"
                )
            elif "nccl_us" in row:
                told = f"{row['nccl_us']:.1f} us {row['peer'].split()[0]} alone"
            print(f"{name} T={row['num_tokens']}: {row['protocol']}, {told}".rstrip(", "))
        out = args.out or (None if args.dry_run else RESULTS)
        if out is not None and self.rows:
            reducer: Any = self.ranks.reducer
            extra = {"nccl": getattr(reducer, "version", None)}
            write_results(out, self.rows, seed=args.seed, merge=args.merge, **extra)

    def kernels(self, ops: Iterable[str]) -> list[Kernel]:
        """Return the all-reduce kernels that the ops and their peers run."""
        size = self.ranks.group.size
        found: list[Kernel] = []
        for op in ops:
            for tokens in tokens_of(op, self.args):
                policy = {"allreduce": "plain", "reduce_allreduce": "experts"}.get(op, "rows")
                found.append((policy, None, size, tokens))
                if op == "finalize_allreduce":
                    found.append((policy, "fp8_block", size, tokens))
                    found.append(("plain", "fp8_block", 1, tokens))
                if op == "reduce_allreduce":
                    found.append((policy, None, 1, tokens))
                if op in ("finalize_allreduce", "reduce_allreduce"):
                    found.append(("plain", None, 1, tokens))
        return found


def shape_of(args: argparse.Namespace) -> ModelShape:
    """Return the sizes, without shared experts."""
    shape = TINY if args.dry_run else get_shape("deepseek_v3")
    return replace(shape, num_shared_experts=0)


def tokens_of(op: str, args: argparse.Namespace) -> tuple[int, ...]:
    """Return the numbers of tokens of an op."""
    return tuple(args.tokens or (DRY_TOKENS if args.dry_run else TOKENS)[op])


def run_rank(xp: Any, group: Any, args: argparse.Namespace, progress: Progress) -> int:
    """Do what the arguments ask for as one rank; return 1 if an answer is wrong. Collective."""
    hidden = shape_of(args).hidden_size
    protocol = args.protocol
    if args.stress is not None:
        most = max(args.tokens or [DRY_STRESS_TOKENS if args.dry_run else STRESS_TOKENS])
        protocol = "mixed" if protocol == "auto" else protocol
        with open_ranks(xp, group, most, hidden, protocol, peers=False) as ranks:
            return allreduce_stress.run(ranks, args.stress, args.seed, progress)
    most = max(max(tokens_of(op, args)) for op in args.ops)
    with open_ranks(xp, group, most, hidden, protocol, peers=args.peers) as ranks:
        bench = Bench(ranks, args, progress)
        bench.run()
    return 1 if bench.problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks, or be one; return 1 if an answer is wrong, 2 if a rank could not run."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    if not 1 <= args.ranks <= MAX_WORLD_SIZE:
        raise SystemExit(f"--ranks: expected 1 to {MAX_WORLD_SIZE}, got {args.ranks}")
    xp = find_backend("numpy" if args.dry_run else "cupy")
    if not args.as_rank:
        if xp is not np and xp.cuda.runtime.getDeviceCount() < args.ranks:
            count = xp.cuda.runtime.getDeviceCount()
            raise SystemExit(f"--ranks {args.ranks}: expected as many GPUs, there are {count}")
        return start(rank_command(MODULE, argv), args.ranks)
    default_s = 180.0 if args.stress is None else 60.0
    watchdog = Watchdog(default_s if args.timeout is None else args.timeout)
    watchdog.progress()
    try:
        if xp is not np:
            xp.cuda.Device(int(os.environ["LOCAL_RANK"])).use()
        with connect_tcp() as group:
            code = run_rank(xp, group, args, watchdog.progress)
    except BaseException:
        # NOTE: what is left, as graphs and NCCL, may wait for ranks that do not come any more.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(2)
    watchdog.stop()
    return code


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, RESULTS)
    add = parser.add_argument
    add("--ranks", type=int, default=2, metavar="N", help="GPUs (default: 2)")
    add("--ops", nargs="+", choices=OPS, default=OPS)
    add("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="of moe_layer")
    add("--tokens", nargs="+", type=_count, metavar="T", help="default: those of each op")
    add("--protocol", choices=PROTOCOLS, default="auto", help="of all calls (default: auto)")
    add("--no-peers", dest="peers", action="store_false", help="time nothing of NCCL's")
    add("--repeats", type=_count, default=20, help="samples (default: 20)")
    add("--seed", type=int, default=0)
    add("--merge", action="store_true", help="keep rows of the file that are not repeated")
    text = "make N calls, check them, time nothing (default: %(const)s); --tokens is the most"
    add("--stress", nargs="?", type=_count, const=STRESS_CALLS, metavar="N", help=text)
    text = "end a rank that does nothing for so long (default: 180, or 60 under stress)"
    add("--timeout", type=float, metavar="SECONDS", help=text)
    add("--as-rank", action="store_true", help=argparse.SUPPRESS)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
