"""`python -m cumoe demo`: one expert layer of a model, planned, loaded, timed and checked.

Prints what it runs on, the plan, how many tokens each expert got, the time of each stage, and the
error against an oracle for a sample of tokens. The exit code says whether that error is in bounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from cumoe import launch
from cumoe.cli.console import bar, facts, is_ascii, make_console, quantity, seconds, token_chart
from cumoe.cli.doctor import describe_driver
from cumoe.cli.oracle import Comparison, compare
from cumoe.cli.problem import Problem, choose_backend, fit_shape, make_problem, make_weights
from cumoe.cli.stages import Measured, measure_cuda, measure_numpy
from cumoe.cli.warmup import compile_specs, kernel_specs
from cumoe.launch import CubinCache, KernelSpec
from cumoe.launch.compile import cache_key
from cumoe.models import ModelShape, get_shape
from cumoe.weights import ExpertWeights

DEFAULT_TOKENS = {"cuda": 4096, "numpy": 256}
BAR_WIDTH = 16


@dataclass(frozen=True)
class Compiled:
    """What it took to have the kernels: how many were compiled, and how long each part took."""

    num_kernels: int
    num_compiled: int
    compile_seconds: float
    read_seconds: float


def run(args: argparse.Namespace) -> int:
    """Run the demo and return 0 if the layer's answer is right, else 1."""
    console = make_console()
    backend = choose_backend(args.backend)
    num_tokens = args.tokens or DEFAULT_TOKENS[backend]
    full = get_shape(args.model)
    shape = fit_shape(full, args.recipe, num_tokens, backend)
    title = f"  {full.name}, {args.recipe}, {num_tokens} tokens\n"
    console.print(Text.assemble(("cumoe demo", "bold"), title))
    console.print(_header(full, shape, backend))
    compiled = None
    if backend == "cuda":
        compiled = _compile(shape, args.recipe, num_tokens, console)
    start = time.perf_counter()
    weights = _make_weights(shape, args, backend, console)
    made = time.perf_counter() - start
    problem = make_problem(shape, args.recipe, weights, num_tokens, args.seed)
    start = time.perf_counter()
    if backend == "cuda":
        problem.layer.warmup(num_tokens)
    loaded = time.perf_counter() - start
    console.print(_setup(problem, made, compiled, loaded))
    measured = measure_cuda(problem) if backend == "cuda" else measure_numpy(problem)
    _print_tokens(console, problem, measured)
    _print_times(console, problem, measured)
    comparison = compare(problem, measured.y, measured.ids)
    _print_comparison(console, comparison)
    return 0 if comparison.passed else 1


def _make_weights(
    shape: ModelShape, args: argparse.Namespace, backend: str, console: Console
) -> ExpertWeights:
    """Draw the weights behind a progress bar, and wait for them."""
    experts = shape.num_experts + shape.num_shared_experts
    columns = (TextColumn("making experts"), BarColumn(bar_width=20), MofNCompleteColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=experts)
        weights = make_weights(
            shape, args.recipe, backend, args.seed, lambda: progress.advance(task)
        )
        if backend == "cuda":
            import cupy

            cupy.cuda.Device().synchronize()
    return weights


def _compile(shape: ModelShape, recipe: str, num_tokens: int, console: Console) -> Compiled:
    """Have the call's kernels in the cache, then read them back as a later process would."""
    device = launch.current_device()
    specs: list[KernelSpec] = kernel_specs(
        shape,
        "bf16" if recipe == "bf16" else "fp8_block",
        device.arch,
        min_num_tokens=num_tokens,
        max_num_tokens=num_tokens,
    )
    start = time.perf_counter()
    missing = compile_specs(specs, device.arch, console)
    compiled = time.perf_counter()
    cache = CubinCache()
    for spec in specs:
        cache.get(cache_key(spec, device.arch))
    read = time.perf_counter() - compiled
    return Compiled(len(specs), missing, compiled - start, read)


def _header(full: ModelShape, shape: ModelShape, backend: str) -> Table:
    """Say what is about to run, and on what."""
    table = facts()
    sizes = f"hidden {shape.hidden_size}, intermediate {shape.intermediate_size}"
    if shape != full:
        sizes += f" (the model's {full.hidden_size} and {full.intermediate_size}, made to fit)"
    if backend == "cuda":
        device = launch.current_device()
        memory = quantity(device.total_memory_bytes, "B")
        table.add_row("device", f"{device.name}, {device.num_sms} SMs, {memory}")
        table.add_row("driver", describe_driver())
        table.add_row("backend", f"CUDA, kernels for {device.arch}")
    else:
        table.add_row("device", f"{platform.machine()} CPU, {os.cpu_count()} cores")
        table.add_row("driver", launch.why_unavailable() or "found, not asked for")
        table.add_row("backend", "NumPy reference")
    table.add_row("layer", sizes)
    table.add_row("routing", _routing_text(shape))
    return table


def _routing_text(shape: ModelShape) -> str:
    """Describe a routing in one line."""
    parts = [f"{shape.method}, top {shape.top_k} of {shape.num_experts} experts"]
    if shape.num_groups > 1:
        parts.append(f"in the best {shape.top_groups} of {shape.num_groups} groups")
    if shape.num_shared_experts:
        parts.append(f"+ {shape.num_shared_experts} shared")
    text = " ".join(parts)
    if shape.scaling_factor != 1:
        text += f", scaled by {shape.scaling_factor:g}"
    return text + (", with bias" if shape.has_bias else "")


def _setup(problem: Problem, made: float, compiled: Compiled | None, loaded: float) -> Table:
    """Say what was made ready: weights, plan, kernels."""
    table = facts()
    weights = problem.weights
    size = quantity(weights.nbytes, "B")
    table.add_row("weights", f"{weights.num_local_experts} experts, {size}, {seconds(made)}")
    if compiled is None:
        table.add_row("plan", "one NumPy op per stage, nothing to compile")
        return table
    plan = problem.layer.plan(problem.num_tokens)
    workspace = quantity(problem.layer.workspace_bytes, "B")
    table.add_row("plan", f"row tiles of {plan.tile}, workspace {workspace}")
    for stage, config in plan.configs.items():
        sizes = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
        table.add_row("", f"{stage}: {sizes}")
    cold = "all cached already"
    if compiled.num_compiled:
        cold = f"cold: {compiled.num_compiled} compiled in {seconds(compiled.compile_seconds)}"
    warm = f"warm: read in {seconds(compiled.read_seconds)}, loaded in {seconds(loaded)}"
    table.add_row("kernels", f"{compiled.num_kernels}; {cold}; {warm}")
    return table


def _print_tokens(console: Console, problem: Problem, measured: Measured) -> None:
    """Draw how many tokens each expert got."""
    shared = problem.shape.num_shared_experts
    counts = [int(n) for n in measured.tokens_per_expert]
    routed = counts[: len(counts) - shared]
    mean, idle = sum(routed) / len(routed), routed.count(0)
    told = f"  mean {mean:.3g}, most {max(routed)}, none for {idle} of {len(routed)}"
    if shared:
        told += f"; shared {', '.join(map(str, counts[-shared:]))}"
    console.print(Text.assemble(("\nTokens per expert", "bold"), told))
    for line in token_chart(routed, ascii_only=is_ascii(console)):
        console.print(Text(line), no_wrap=True)


def _print_times(console: Console, problem: Problem, measured: Measured) -> None:
    """Print the time of each stage and of the layer, and the rates that they make."""
    shape, num_tokens = problem.shape, problem.num_tokens
    flops = shape.gemm_flops(num_tokens)
    active = sum(1 for n in measured.tokens_per_expert if n)
    weight_bytes = shape.active_weight_bytes(active, problem.recipe)
    work = {
        "gemm1": (flops * 2 / 3, weight_bytes * 2 / 3),
        "gemm2": (flops / 3, weight_bytes / 3),
        "layer": (float(flops), float(shape.min_bytes(num_tokens, active, problem.recipe))),
    }
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Stage", min_width=11)
    table.add_column("time", justify="right", min_width=8)
    table.add_column("share", min_width=BAR_WIDTH)
    table.add_column("", justify="right")
    table.add_column("", justify="right")
    total = sum(measured.stages.values())
    for name, elapsed in measured.stages.items():
        drawn = bar(elapsed / total, BAR_WIDTH, ascii_only=is_ascii(console))
        table.add_row(name, seconds(elapsed), Text(drawn, "cyan"), *_rates(work.get(name), elapsed))
    whole = "layer" if measured.layer_call is None else "layer, as a graph"
    table.add_row(whole, seconds(measured.layer), "", *_rates(work["layer"], measured.layer))
    if measured.layer_call is not None:
        rates = _rates(work["layer"], measured.layer_call)
        table.add_row("layer, as a call", seconds(measured.layer_call), "", *rates)
    console.print()
    console.print(table)


def _rates(work: tuple[float, float] | None, elapsed: float) -> tuple[str, str]:
    """Return FLOP/s and B/s of useful work, nothing for a stage that has none to count."""
    if work is None:
        return "", ""
    return quantity(work[0] / elapsed, "FLOP/s"), quantity(work[1] / elapsed, "B/s")


def _print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the errors, their bounds, and the verdict."""
    verdict = Text("PASS", "bold green") if comparison.passed else Text("FAIL", "bold red")
    sample = f"  {comparison.num_tokens} tokens, {comparison.num_experts} experts"
    console.print(Text.assemble(("\nError against the oracle  ", "bold"), verdict, sample))
    table = facts()
    table.add_row("largest", f"{comparison.max_error:.2e} (bound {comparison.max_bound:.2e})")
    table.add_row("RMS", f"{comparison.rms_error:.2e} (bound {comparison.rms_bound:.2e})")
    ids = f"{comparison.wrong_ids} differ"
    table.add_row("expert ids", f"{ids} (all {comparison.total_ids} compared)")
    console.print(table)
