"""Time of the layer and of each of its stages.

    python -m bench.bench_layer                    # DeepSeek-V3: bench/results/layer.json
    python -m bench.bench_layer --peers --tokens 1 8 64 512 4096 16384
    python -m bench.bench_layer --dry-run          # a tiny layer on NumPy

Rows: ``layer`` (variant ``graph``: replay of a captured call; ``eager``: the call itself, with its
``host_us`` of Python), ``routing`` (with the permutation; on NumPy that is ``permutation``),
``quantize``, ``gemm1`` (with the activation, and with the quantisation or copy that puts tokens in
expert order where there is one), ``gemm2``, ``finalize``. Timed cold, after a flush of the L2; what
is below 100 us as replays of a graph of several calls, which rotate over enough calls' inputs to
keep weights cold, while the small tables between stages stay in L2 as they do in the layer. Rates:
useful FLOPs of the two GEMMs; bytes of the active experts' weights, or, for the stages without
weights, bytes read and written. Shared experts are left out unless asked for, as in the peers'
published figures.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

import cumoe
from bench.arguments import CaseArguments
from bench.bench_error import (
    LIMITS,
    check_float32,
    run_oracle,
    slots_by_expert,
    widen,
    worst_block,
)
from bench.gemm_case import gemm_work, planned_stage
from bench.harness import Timing, copy_rate_tbps, measure, num_cold_inputs
from bench.inputs import (
    compile_ahead,
    find_model,
    free_memory,
    make_bias,
    make_call,
    make_layer,
    make_weights,
    random_bf16,
    to_host,
)
from bench.peers import Operands, check_rows, peer_rows, take_rows, torch_grouped_mm
from bench.record import REPO, Row, make_row, print_table, write_results
from bench.shapes import ModelShape
from cumoe import ExpertWeights, MoELayer, Quantized, Routing, TopK
from cumoe.config import Array
from cumoe.layouts import WEIGHT_LAYOUTS

ARGUMENTS = CaseArguments(
    "bench.bench_layer", models=("deepseek_v3",), recipes=("fp8_block", "bf16"),
    tokens=(1, 64, 4096), dry_tokens=(1, 7), results=REPO / "bench" / "results" / "layer.json",
    more_recipes=("fp8_tensor",),
)  # fmt: skip
GRAPH_BELOW_US = 100.0
GRAPH_CALLS = 10
MAX_SETS = 8
CHECKED_TOKENS = 16

Stage = Callable[[], object]


@dataclass(eq=False)
class CallSet:
    """One call's inputs, its result, and a layer of its own: a workspace that only it writes."""

    shape: ModelShape
    layer: MoELayer
    bias: Array | None
    x: Array
    logits: Array
    out: Array
    topk: TopK
    ids: np.ndarray

    @property
    def routing(self) -> Routing:
        """The model's, as the recipe has it."""
        return self.shape.routing(self.layer.weights.recipe or "bf16")

    def call(self) -> object:
        """Run the layer."""
        return self.layer(self.x, self.logits, out=self.out)

    def stages(self) -> dict[str, Stage]:
        """Return each stage as a function that finds its inputs ready."""
        self.call()
        if self.layer.weights.is_device:
            return _planned_stages(self)
        return _host_stages(self)


def _planned_stages(call: CallSet) -> dict[str, Stage]:
    """Return the launches of the plan, which stays bound to the arrays of the layer's last call."""
    plan = call.layer.plan(call.x.shape[0])
    if int(plan.stages["routing"][0].params["logits"]) != call.logits.data.ptr:
        raise RuntimeError("the plan is not the one that the call ran")
    return {
        name: functools.partial(planned_stage(launches), 0)
        for name, launches in plan.stages.items()
    }


def _host_stages(call: CallSet) -> dict[str, Stage]:
    """Return the same stages as public ops."""
    weights, routing = call.layer.weights, call.routing
    fp8, tensors = weights.recipe != "bf16", weights.recipe == "fp8_tensor"
    x: Any = call.x
    w13: Any = weights.w13
    w2: Any = weights.w2

    def quantize() -> Quantized:
        if tensors:
            return cumoe.quantize_fp8_tensor(call.x, scale=weights.x_scale)
        return cumoe.quantize_fp8_block(call.x)

    if fp8:
        x = quantize()
        block = (None, None) if tensors else (128, 128)
        w2_scale = weights.w2_scale
        if tensors and w2_scale is not None:
            w2_scale = w2_scale[:, None]
        w13 = Quantized(w13, weights.w13_scale, block=block)
        w2 = Quantized(w2, w2_scale, block=block)

    def group() -> Any:
        return cumoe.group(
            call.topk,
            num_experts=routing.num_experts,
            num_shared_experts=routing.num_shared_experts,
        )

    permutation = group()
    out = None
    if tensors:
        shape = (permutation.max_rows, weights.intermediate_size)
        out = Quantized(np.empty(shape, weights.w13.dtype), weights.act_scale, block=(None, None))

    # NOTE: weights on the input are left out of this op; they take no time to speak of.
    def gemm1() -> Any:
        return cumoe.grouped_gemm(
            x,
            w13,
            permutation,
            gate_up_order=weights.gate_up_order,
            activation=call.shape.activation,
            layout=weights.layout,
            out_dtype="float8_e4m3fn" if fp8 else "bfloat16",
            out=out,
        )

    act = gemm1()

    def gemm2() -> Any:
        return cumoe.grouped_gemm(act, w2, permutation, gather=False, layout=weights.layout)

    rows = gemm2()
    stages: dict[str, Stage] = {
        "routing": lambda: cumoe.route(call.logits, routing, bias=call.bias),
        "permutation": group,
        "gemm1": gemm1,
        "gemm2": gemm2,
        "finalize": lambda: cumoe.finalize(rows, call.topk.weights, permutation.permuted_idx),
    }
    if fp8:
        stages["quantize"] = quantize
    return stages


def make_sets(
    xp: Any, shape: ModelShape, weights: ExpertWeights, num_tokens: int, seed: int
) -> list[CallSet]:
    """Make as many calls with inputs of their own as it takes to keep the weights cold.

    More than 512 tokens touch far more than the L2 in any one call, so one set is enough.
    """
    bias = make_bias(shape, xp, seed=seed)
    active = max(1, int(shape.expected_active_experts(num_tokens)))
    num_sets = 1
    if num_tokens <= 512:
        call_bytes = shape.active_weight_bytes(active, weights.recipe or "bf16")
        num_sets = min(MAX_SETS, num_cold_inputs(call_bytes))
    sets = []
    for i in range(num_sets):
        layer = make_layer(shape, weights, bias, num_tokens)
        x, logits = make_call(shape, num_tokens, xp, seed=seed + i)
        topk = cumoe.route(logits, shape.routing(), bias=bias)
        out = xp.full(x.shape, 0xFFFF, np.uint16).view(x.dtype)
        sets.append(CallSet(shape, layer, bias, x, logits, out, topk, to_host(topk.ids)))
    return sets


def check_answer(xp: Any, call: CallSet) -> Row:
    """Compare a sample of the tokens with the oracle and return the errors.

    Raises
    ------
    ArithmeticError
        If they are over the limits of :mod:`bench.bench_error`.
    """
    weights, recipe = call.layer.weights, str(call.layer.weights.recipe)
    num_tokens = call.x.shape[0]
    tokens = np.unique(np.linspace(0, num_tokens - 1, CHECKED_TOKENS).astype(np.int64))
    index = xp.asarray(tokens)

    def sample(a: Array) -> Array:  # as words: not every library takes bfloat16 rows
        words = a.view(np.uint16) if a.dtype.itemsize == 2 else a
        return words.take(index, axis=0).view(a.dtype)

    topk = TopK(sample(call.topk.ids), sample(call.topk.weights))
    (answer,) = run_oracle(
        xp,
        sample(call.x),
        topk,
        weights,
        call.shape.activation,
        weights_on_input=call.routing.weights_on_input,
    )
    call.call()
    worst = worst_block(xp, sample(call.out), answer.out)
    if not worst.passes(recipe):
        raise ArithmeticError(
            f"wrong answer: max_rel {worst.max_rel:.2e}, rms_rel {worst.rms_rel:.2e}, limits "
            f"{LIMITS[recipe]}"
        )
    return worst.fields()


def time_all(
    stages: Mapping[str, Callable[[int], object]],
    layer: Callable[[int], object],
    peers: Mapping[str, Callable[[int], object]],
    *,
    num_sets: int,
    repeats: int,
    budget_s: float,
    on_device: bool,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time everything, each thing in the way that its length asks for.

    Returns
    -------
    timings : dict of str to Timing
        Names of `stages` and `peers`, ``"eager"`` and, on a GPU, ``"graph"``.
    methods : dict of str to str
        How each of them was timed.
    """
    events: dict[str, Callable[[int], object]] = {**peers, "eager": layer}
    settings: dict[str, Any] = {"repeats": repeats, "budget_s": budget_s}
    if not on_device:
        events |= stages
        timings = measure(events, inputs_rotate=num_sets, warmup_s=0.0, clock="host", **settings)
        return timings, dict.fromkeys(timings, "host")
    settings |= {"warmup_s": 0.05}
    both = {**stages, "graph": layer}
    rough = measure(both, inputs_rotate=num_sets, repeats=5, warmup_s=0.02, clock="device")
    short = {name: run for name, run in both.items() if rough[name].us < GRAPH_BELOW_US}
    events |= {name: run for name, run in stages.items() if name not in short}
    timings = measure(events, inputs_rotate=num_sets, clock="device", **settings)
    methods = dict.fromkeys(timings, "events")
    several = num_sets * math.ceil(GRAPH_CALLS / num_sets)
    groups = {several: short} if "graph" in short else {several: short, num_sets: {"graph": layer}}
    for calls, group in groups.items():
        try:
            found = measure(group, graph=True, calls=calls, inputs_rotate=num_sets, **settings)
            methods |= dict.fromkeys(group, f"graph of {calls}")
        except RuntimeError as error:
            print(f"no graphs of {', '.join(group)}: {error}")
            group = {name: run for name, run in group.items() if name != "graph"}
            found = measure(group, inputs_rotate=num_sets, clock="device", **settings)
            methods |= dict.fromkeys(group, "events")
        timings |= found
    return timings, methods


def work_of(shape: ModelShape, weights: ExpertWeights, calls: Sequence[CallSet]) -> dict[str, Row]:
    """Return the useful FLOPs and the bytes of each row, the mean over the calls."""
    num_tokens, hidden = calls[0].x.shape
    slots = num_tokens * shape.total_top_k
    active = sum(np.unique(call.ids).size for call in calls) / len(calls)

    gemms = gemm_work(weights, slots, active)
    return {
        "layer": {
            name: gemms["gemm1"][name] + gemms["gemm2"][name] for name in ("flops", "num_bytes")
        },
        **gemms,
        "routing": {"num_bytes": 4 * num_tokens * shape.num_experts + 8 * slots},
        "permutation": {},
        "quantize": {"num_bytes": num_tokens * (3 * hidden + 4 * -(-hidden // 128))},
        "finalize": {"num_bytes": 2 * hidden * (slots + num_tokens) + 8 * slots},
    }


def torch_peers(call: CallSet) -> dict[str, Callable[[int], object]]:
    """Return torch's grouped GEMM for both products, or nothing where torch is not installed.

    Raises
    ------
    ArithmeticError
        If a product is wrong.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        print("torch is not installed: no peers")
        return {}
    import cupy

    weights, ids = call.layer.weights, call.ids
    act = random_bf16(cupy, (ids.size, weights.intermediate_size), 1)
    peers: dict[str, Callable[[int], object]] = {}
    for operands in (
        Operands("gemm1", ids, call.x, weights.w13, ids.shape[1]),
        Operands("gemm2", ids, act, weights.w2, 1),
    ):
        peer = torch_grouped_mm(operands)
        expert, slots = max(slots_by_expert(ids), key=lambda item: item[1].size)
        a, w = operands.payloads
        want = widen(take_rows(a, slots // operands.slots_per_row)) @ widen(w[expert]).T
        check_rows(f"torch's {operands.name}", peer_rows(cupy, peer, peer.run(0), slots), want)
        peers[f"torch {operands.name}"] = peer.run
    return peers


def bench_case(
    xp: Any,
    shape: ModelShape,
    weights: ExpertWeights,
    num_tokens: int,
    args: argparse.Namespace,
) -> list[Row]:
    """Check and time one number of tokens and return its rows.

    Raises
    ------
    ArithmeticError
        If the answer is wrong; nothing is timed then.
    """
    on_device = xp is not np
    calls = make_sets(xp, shape, weights, num_tokens, args.seed)
    errors = check_answer(xp, calls[0])
    each = [call.stages() for call in calls]
    stages = {name: lambda i, name=name: each[i][name]() for name in each[0]}
    peers = {}
    if args.peers and on_device and weights.recipe == "bf16":
        try:
            peers = torch_peers(calls[0])
        except Exception as error:  # a peer is a guest: the layer is timed without it
            print(f"no peers: {error}")
    timings, methods = time_all(
        stages, lambda i: calls[i].call(), peers,
        num_sets=len(calls), repeats=args.repeats, budget_s=args.budget, on_device=on_device,
    )  # fmt: skip
    work = work_of(shape, weights, calls)
    peer_us = {name.removeprefix("torch "): timings.pop(name).us for name in peers}
    if peer_us:
        peer_us["layer"] = peer_us["gemm1"] + peer_us["gemm2"]
    host_us = _host_us(calls[0]) if on_device else None
    rows = []
    for name, timing in timings.items():
        op = "layer" if name in ("graph", "eager") else name
        extra: Row = {"method": methods[name]}
        if op == "layer":
            extra |= {"variant": name, **errors, "num_input_sets": len(calls)}
        if name == "eager" and host_us is not None:
            extra["host_us"] = host_us
        if on_device and op in ("gemm1", "gemm2"):
            extra["config"] = str(calls[0].layer.plan(num_tokens).configs.get(op))
        rows.append(
            make_row(
                op,
                model=shape.name,
                recipe=weights.recipe,
                num_tokens=num_tokens,
                timing=timing,
                peer="torch_grouped_mm" if op in peer_us else None,
                peer_us=peer_us.get(op),
                **work[op],
                **extra,
            )
        )
    order = list(work)
    return sorted(rows, key=lambda row: order.index(row["op"]))


def _host_us(call: CallSet) -> float:
    """Return the time Python takes to queue a call; few enough calls that the queue never fills."""
    call.call()
    timing = measure({"call": lambda i: call.call()}, repeats=20, warmup_s=0.0, clock="host")
    return timing["call"].us


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, print and write; return 1 if an answer is wrong."""
    args = _parser().parse_args(argv)
    settings = ARGUMENTS.settle(args)
    xp, out, tokens = settings.xp, settings.out, settings.tokens
    check_float32(xp)
    roofs = {"copy_tbps": copy_rate_tbps()} if xp is not np else {}
    console = Console(width=None if sys.stdout.isatty() else 150)
    rows: list[Row] = []
    problems: list[str] = []
    for model in settings.models:
        shape = find_model(model, shared=args.shared)
        for recipe in args.recipes:
            weights = make_weights(shape, recipe, xp, seed=args.seed).convert(layout=args.layout)
            bias = make_bias(shape, xp, seed=args.seed)
            compile_ahead(make_layer(shape, weights, bias, max(tokens)), tokens)
            for num_tokens in tokens:
                try:
                    found = bench_case(xp, shape, weights, num_tokens, args)
                except Exception as error:  # the other cases are still worth their time
                    traceback.print_exc()
                    problems.append(f"{shape.name} {recipe} T={num_tokens}: {error}")
                    print("FAILED", problems[-1], flush=True)
                    free_memory(xp)  # an error that stays ends the run here
                    continue
                named = [shape.name]
                named += ["shared"] if args.shared and shape.num_shared_experts else []
                named += [args.layout] if args.layout != "major_k" else []
                found = [row | {"model": "_".join(named)} for row in found]
                print_table(found, roof_tbps=roofs.get("copy_tbps"), console=console)
                rows += found
                free_memory(xp)
            del weights
            free_memory(xp)
            if out is not None and rows:  # now, so that a run that is cut off leaves its rows
                write_results(out, rows, seed=args.seed, merge=args.merge, **roofs)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = ARGUMENTS.parser(__doc__)
    add = parser.add_argument
    add("--shared", action="store_true", help="with shared experts; the model is then NAME_shared")
    add("--layout", choices=WEIGHT_LAYOUTS, default="major_k",
        help="of the weights; of block_major_k the model is NAME_block_major_k")  # fmt: skip
    add("--peers", action="store_true", help="time torch's grouped GEMM beside the bf16 ones")
    add("--repeats", type=int, default=30, help="samples (default: 30)")
    add("--budget", type=float, default=2.0, metavar="SECONDS", help="of one group's samples (2)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
