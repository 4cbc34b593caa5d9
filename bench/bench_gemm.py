"""The two expert GEMMs beside their peers, on the same data, in one run.

    python -m bench.bench_gemm                     # three models: bench/results/gemm.json
    python -m bench.bench_gemm --models deepseek_v3 --recipes fp8_block --tokens 1 8 64
    python -m bench.bench_gemm --dry-run           # a tiny layer on NumPy

Rows ``gemm1`` (with the activation, and for fp8 the requantisation, fused) and ``gemm2`` are
cumoe's, launched as a layer of such tokens launches them, fp8 ones quantised: where it copies them
to expert order first, the copy is in gemm1's time. Their variant is the routing. Each keeps every
peer's time: torch's grouped GEMM (bf16; rows gathered and sorted beforehand, no activation), a
fused-MoE kernel in Triton tuned for the shape in this run (no activation), and as a roof cuBLAS'
dense product of the same FLOPs. ``peer`` is the fastest but the roof. Rates: useful FLOPs, no
padding; bytes of the active experts' weights. Rows ``gemm_error`` hold errors against a float32
oracle, which is asked before anything is timed; rows ``dense`` cuBLAS' product of 8192 x 8192
matrices. Everything is timed by events, one call after a flush of the L2, variants taking turns;
``sm_mhz`` is the clock read meanwhile, None for what is too short to read it.
"""

from __future__ import annotations

import argparse
import functools
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.arguments import CaseArguments
from bench.bench_error import check_float32
from bench.clocks import SmClock
from bench.gemm_case import GEMMS, ROUTINGS, Case, find_gemm_shape, gemm_work, make_case
from bench.gemm_errors import (
    Errors,
    RowsOf,
    compare,
    error_fields,
    find_problems,
    sample_experts,
)
from bench.harness import Timing, copy_rate_tbps, measure
from bench.inputs import compile_ahead, free_memory, make_bias, make_layer, make_weights
from bench.peers import (
    PEER_LIMIT,
    PEERS,
    Operands,
    Peer,
    cublas_dense,
    cublas_rows,
    dense_products,
    free_torch,
    guest,
    is_installed,
    peer_rows,
    torch_grouped_mm,
    triton_moe,
)
from bench.record import REPO, Row, check_row, make_row, peer_fields, write_results
from bench.shapes import ModelShape

ARGUMENTS = CaseArguments(
    "bench.bench_gemm", models=("deepseek_v3", "mixtral_8x7b", "qwen3_30b_a3b"),
    recipes=("fp8_block", "bf16"), tokens=(256, 512, 1024, 4096, 16384), dry_tokens=(1, 70),
    results=REPO / "bench" / "results" / "gemm.json",
)  # fmt: skip
DENSE_SIZE = 8192
DRY_DENSE_SIZE = 256

Timings = dict[str, tuple[Timing, int | None]]
"""Time and SM clock by variant."""


def find_peers(case: Case, name: str, wanted: Sequence[str]) -> tuple[dict[str, Peer], Any]:
    """Return the peers of a GEMM that are there, and the dense product of the same FLOPs or None.

    One that is not installed or does not run is named and left out: cumoe is timed without it.
    """
    operands = case.operands(name)
    on_device = case.xp is not np
    makers: dict[str, Callable[[Operands], Peer]] = {
        "triton": lambda o: triton_moe(o, on_device=on_device)
    }
    if case.recipe == "bf16":
        makers["torch"] = torch_grouped_mm
    peers: dict[str, Peer] = {}
    for kind, make in makers.items():
        if kind in wanted:
            with guest(f"{kind} {name}"):
                peer = make(operands)
                peers[peer.name] = peer
    dense = None
    if "dense" in wanted and case.recipe == "bf16":
        with guest(f"dense {name}"):
            dense = cublas_dense(operands)
    return peers, dense


def run_peers(case: Case, peers: Mapping[str, Mapping[str, Peer]]) -> dict[str, dict[str, RowsOf]]:
    """Run every peer once and return how to read its rows."""
    found: dict[str, dict[str, RowsOf]] = {name: {} for name in peers}
    for name, group in peers.items():
        for peer in group.values():
            with guest(f"{peer.name} {name}"):
                result = peer.run(0)
                found[name][peer.name] = lambda expert, slots, peer=peer, result=result: peer_rows(
                    case.xp, peer, result, slots
                )  # type: ignore[misc]
    return found


def right_peers(
    peers: Mapping[str, Mapping[str, Peer]], errors: Mapping[str, Errors]
) -> dict[str, dict[str, Peer]]:
    """Return the peers whose rows of every expert are right; a wrong one is named and left out."""
    found: dict[str, dict[str, Peer]] = {}
    for name, group in peers.items():
        found[name] = {}
        for peer in group.values():
            with guest(f"{peer.name} {name}"):
                if f"{name} {peer.name}" not in errors:
                    raise RuntimeError("it did not run")
                worst = float(errors[f"{name} {peer.name}"].by_expert()[:, 1].max())
                if not worst < PEER_LIMIT:
                    raise ArithmeticError(f"wrong by {worst:.2e}")
                found[name][peer.name] = peer
    return found


def installed(wanted: Sequence[str]) -> tuple[str, ...]:
    """Return those of the wanted peers that are installed; the missing packages are named."""
    missing = [name for name in ("torch", "triton") if not is_installed(name)]
    for name in missing if wanted else ():
        print(f"{name} is not installed: {'no peers' if name == 'torch' else 'not a peer'}")
    if "torch" in missing:
        return ()
    return tuple(name for name in wanted if name not in missing)


def time_group(
    variants: Mapping[str, Callable[[int], object]], args: argparse.Namespace, clock: SmClock,
    on_device: bool,
) -> Timings:  # fmt: skip
    """Time variants that take turns, each with the SM clock read while it ran."""
    timings = measure(
        variants,
        repeats=args.repeats,
        budget_s=args.budget,
        warmup_s=0.02 if on_device else 0.0,
        clock="device" if on_device else "host",
        on_sample=clock.mark,
    )
    mhz = clock.take()
    return {name: (timing, mhz.get(name)) for name, timing in timings.items()}


def gemm_row(
    name: str,
    case: Case,
    key: Row,
    timings: Timings,
    peers: Mapping[str, Peer],
    errors: Mapping[str, Errors],
) -> Row:
    """Return a GEMM's row: cumoe's time, and every peer's beside it."""
    rows_per_expert = np.bincount(case.ids.ravel(), minlength=case.weights.num_local_experts)
    active = int((rows_per_expert > 0).sum())
    work = gemm_work(case.weights, case.ids.size, active)[name]

    def figures(variant: str) -> Row:
        timing, mhz = timings[variant]
        return {
            "us": timing.us,
            "us_min": timing.us_min,
            "us_max": timing.us_max,
            "tflops": work["flops"] / timing.us * 1e-6,
            "sm_mhz": mhz,
        }

    beside: dict[str, Row] = {}
    for variant, peer in peers.items():
        rms = float(errors[f"{name} {variant}"].by_expert()[:, 1].max())
        beside[variant] = figures(variant) | {"config": peer.config, "expert_rms_rel": rms}
    timing, mhz = timings["cumoe"]
    return make_row(
        name,
        **key,
        timing=timing,
        **peer_fields(beside),
        **work,
        sm_mhz=mhz,
        config=case.configs.get(name),
        dense=figures("dense") if "dense" in timings else None,
        num_active_experts=active,
        most_rows_of_an_expert=int(rows_per_expert.max()),
        num_samples=len(timing.samples),
    )


def bench_case(
    xp: Any,
    shape: ModelShape,
    weights: Any,
    num_tokens: int,
    routing: str,
    args: argparse.Namespace,
    clock: SmClock,
) -> tuple[list[Row], list[str]]:
    """Check and time one case.

    Returns
    -------
    rows : list of dict
        ``gemm_error`` first. Alone if an answer is wrong: nothing is timed then.
    problems : list of str
        What is over its bound.
    """
    case = make_case(xp, shape, weights, num_tokens, routing, args.seed)
    case.run()
    key = {"model": shape.name, "recipe": case.recipe, "num_tokens": num_tokens}
    key["variant"] = routing
    found = {name: find_peers(case, name, args.peers) for name in GEMMS}
    peers = {name: group for name, (group, _) in found.items()}
    sample = sample_experts(case.ids, args.check_experts)
    cublas = functools.partial(cublas_rows, xp) if is_installed("torch") else None
    errors = compare(
        case,
        sample,
        cublas=cublas,
        peers=run_peers(case, peers),
    )
    rows = [check_row({"op": "gemm_error", "num_gpus": 1, **key, **error_fields(errors, sample)})]
    problems = find_problems(errors, case.recipe)
    if any(problem.startswith("wrong answer") for problem in problems):
        return rows, problems
    right = right_peers(peers, errors)
    for name in GEMMS:
        variants: dict[str, Callable[[int], object]] = {"cumoe": case.stages[name]}
        variants |= {peer.name: peer.run for peer in right[name].values()}
        dense = found[name][1]
        if dense is not None:
            variants["dense"] = dense
        timings = time_group(variants, args, clock, xp is not np)
        rows.append(gemm_row(name, case, key, timings, right[name], errors))
    return rows, problems


def dense_rows(xp: Any, size: int, args: argparse.Namespace, clock: SmClock) -> list[Row]:
    """Time cuBLAS' square products and return their rows."""
    timings = time_group(dense_products(xp, size), args, clock, xp is not np)
    return [
        make_row(
            "dense", model=None, recipe=variant.partition("_")[0], num_tokens=size, timing=timing,
            flops=2 * size**3, variant=variant, sm_mhz=mhz,
        )
        for variant, (timing, mhz) in timings.items()
    ]  # fmt: skip


def print_head() -> None:
    """Print the names of the columns of :func:`print_case`."""
    gemm = f"{'us':>8}{'TF':>6}  {'best peer us':>24}{'x':>6}"
    print(f"{'model':<15}{'recipe':<10}{'T':>6} {'routing':<8} | gemm1{gemm} | gemm2{gemm}")


def print_case(rows: Sequence[Row]) -> None:
    """Print one line of a case's rows; the last figure of a GEMM is peer over cumoe."""
    first, parts = rows[0], []
    for row in rows:
        if row["op"] in GEMMS:
            text = f"{row['us']:>14.1f}{row['tflops']:>6.0f}"
            if row["peer"] is not None:
                peer = f"{row['peer_us']:.1f} {row['peer']}"
                text += f"  {peer:>24}{row['peer_us'] / row['us']:>6.2f}"
            else:
                text += f"{'':>32}"
            parts.append(text)
    print(
        f"{first['model']:<15}{first['recipe']:<10}{first['num_tokens']:>6} "
        f"{first['variant']:<8} |{' |'.join(parts)}",
        flush=True,
    )


def bench_model(
    xp: Any,
    shape: ModelShape,
    recipe: Any,
    tokens: Sequence[int],
    args: argparse.Namespace,
    clock: SmClock,
) -> tuple[list[Row], list[str]]:
    """Go through tokens and routings of one model and recipe; return rows and what went wrong."""
    weights = make_weights(shape, recipe, xp, seed=args.seed)
    if weights.is_device:
        bias = make_bias(shape, xp, seed=args.seed)
        compile_ahead(make_layer(shape, weights, bias, max(tokens)), tokens)
        free_memory(xp)
    rows: list[Row] = []
    problems: list[str] = []
    for num_tokens in tokens:
        for routing in args.routing:
            name = f"{shape.name} {recipe} T={num_tokens} {routing}"
            try:
                found, wrong = bench_case(xp, shape, weights, num_tokens, routing, args, clock)
                rows += found
                print_case(found)
            except Exception as error:  # the other cases are still worth their time
                traceback.print_exc()
                wrong = [str(error)]
            for problem in wrong:
                problems.append(f"{name}: {problem}")
                print("FAILED", problems[-1], flush=True)
            free_memory(xp)  # an error that stays ends the run here
            free_torch()
    return rows, problems


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, print and write; return 1 if an answer is wrong or an error over its bound."""
    args = _parser().parse_args(argv)
    args.peers = installed(args.peers)
    settings = ARGUMENTS.settle(args)
    xp = settings.xp
    check_float32(xp)
    roofs = {"copy_tbps": copy_rate_tbps()} if xp is not np else {}
    rows: list[Row] = []
    problems: list[str] = []
    with SmClock() as clock:
        if "dense" in args.peers:
            with guest("dense products"):
                size = DRY_DENSE_SIZE if xp is np else DENSE_SIZE
                rows += dense_rows(xp, size, args, clock)
                for row in rows:
                    print(f"cuBLAS {size}^3 {row['variant']}: {row['tflops']:.0f} TF")
            free_memory(xp)
            free_torch()
        print_head()
        for model in settings.models:
            for recipe in args.recipes:
                shape = find_gemm_shape(model)
                found, wrong = bench_model(xp, shape, recipe, settings.tokens, args, clock)
                rows += found
                problems += wrong
                free_memory(xp)
                if settings.out is not None and rows:  # a run that is cut off leaves its rows
                    write_results(settings.out, rows, seed=args.seed, merge=args.merge, **roofs)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = ARGUMENTS.parser(__doc__)
    add = parser.add_argument
    add("--routing", nargs="+", choices=tuple(ROUTINGS), default=tuple(ROUTINGS))
    add("--peers", nargs="*", choices=PEERS, default=PEERS, help="none after it: cumoe alone")
    add("--check-experts", type=int, default=12, metavar="N", help="experts compared; 0 for all")
    add("--repeats", type=int, default=7, help="samples (default: 7)")
    add("--budget", type=float, default=0.5, metavar="SECONDS", help="of one GEMM's samples (0.5)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
