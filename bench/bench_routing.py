"""Time of routing with its permutation, beside CuPy's.

    python -m bench.bench_routing               # into bench/results/stages.json
    python -m bench.bench_routing --dry-run     # a few tokens on NumPy

Rows ``routing``: float32 logits of normal numbers and the router's bias to ids, weights and every
table of the permutation in stable order, shared experts left out, with the layer's row tiles.
Variants: ``logits``, and ``given``, which permutes ids that are there already. Every array is
compared with the twin's, to the bit, before anything is timed. Peers (``peers``, and the fastest as
``peer``): ``cupy`` is the same in array operations; ``triton``, where torch and Triton are
installed, kernels of :mod:`bench.triton_routing`, one for the selection and three for a counting
sort, with the best of a few configurations, their answers compared. Times are of replays of a graph
of several calls, inputs in L2, where the router leaves them; those of CuPy, which allocates, of
single calls.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

import cumoe
from bench.arguments import make_stage_parser
from bench.harness import measure
from bench.inputs import find_backend, free_memory, make_bias, to_backend, to_host
from bench.peer_routing import routing_stage
from bench.peer_stages import Stage
from bench.record import REPO, Row, make_row, peer_fields, print_table, write_results
from bench.shapes import MODELS, ModelShape
from bench.stage_timing import figures_of, has_triton, time_beside
from cumoe import ExpertShard
from cumoe.arrays import FP8
from cumoe.config import Array, Routing, RoutingMethod
from cumoe.kernels_routing import Experts, Source, cluster_size, route_permute_specs
from cumoe.launch import get_device, warmup
from cumoe.permutation import plan_permutation
from cumoe.reference import permutation as twin_permutation
from cumoe.reference import routing as twin_routing
from cumoe.tuning import SM90_ARCH, select_sm90_tile, select_tile

RESULTS = REPO / "bench" / "results" / "stages.json"
TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
VARIANTS = ("logits", "given")
GRAPH_CALLS = 50

_NAMED = ("deepseek_v3", "kimi_k2", "nemotron_3_super_like", "qwen3_30b_a3b")
SHAPES = {name: replace(MODELS[name], num_shared_experts=0) for name in _NAMED}
SHAPES["2048_experts"] = replace(
    MODELS["qwen3_30b_a3b"], name="2048_experts", method="default", num_experts=2048, top_k=32
)
"""The models, and the largest routing there is."""


@dataclass(eq=False)
class Case:
    """One call: its inputs, what it writes, and what that must be."""

    routing: Routing
    logits: Array
    bias: Array | None
    ids: Array | None
    written: dict[str, Array]
    expected: dict[str, np.ndarray]
    tile: int
    work: Callable[[], object]
    num_launches: int

    def in_triton(self, xp: Any) -> Stage:
        """Return the same in Triton."""
        return routing_stage(
            xp, self.routing, self.logits, self.bias, self.ids, self.tile, self.written
        )

    def check_answer(self) -> None:
        """Run the call and compare everything that it writes with the twin.

        Raises
        ------
        ArithmeticError
            If an element differs.
        """
        self.work()
        for name, want in self.expected.items():
            got = to_host(self.written[name])
            word = f"u{want.dtype.itemsize}"
            if (
                np.ascontiguousarray(got).view(word) != np.ascontiguousarray(want).view(word)
            ).any():
                raise ArithmeticError(f"wrong answer: {name} differs from the twin")


def make_case(xp: Any, shape: ModelShape, num_tokens: int, variant: str, seed: int) -> Case:
    """Draw logits and plan the call on a GPU, or the ops on the host."""
    routing = shape.routing()
    rng = np.random.default_rng([seed, num_tokens])
    logits = rng.standard_normal((num_tokens, shape.num_experts)).astype(np.float32) * 2
    bias = make_bias(shape, np, seed=seed)
    topk = twin_routing.route(logits, routing, bias=bias)
    slots, on_host = topk.ids.size, xp is np
    arch = "" if on_host else get_device(xp.cuda.Device().id).arch
    if arch == SM90_ARCH:
        tile = select_sm90_tile(num_tokens, shape.top_k, shape.num_experts, FP8)
    else:
        tile = select_tile(slots, shape.num_experts, FP8)
    permutation = twin_permutation.group(topk.ids, num_experts=shape.num_experts, tile=tile)
    tables = {name: np.asarray(a) for name, a in permutation._asdict().items() if name != "tile"}
    expected = tables if variant == "given" else tables | topk._asdict()
    inputs = (to_backend(logits, xp), None if bias is None else to_backend(bias, xp))
    ids = to_backend(topk.ids, xp) if variant == "given" else None
    written: dict[str, Array] = {}
    if on_host:
        work, launches = _ops(routing, *inputs, ids, tile, written), 0
    else:
        work, launches = _planned(xp, routing, *inputs, ids, tile, arch, written)
    return Case(routing, *inputs, ids, written, expected, tile, work, launches)


def _ops(
    routing: Routing,
    logits: Array,
    bias: Array | None,
    ids: Array | None,
    tile: int,
    written: dict[str, Array],
) -> Callable[[], object]:
    def run() -> None:
        topk = cumoe.route(logits, routing, bias=bias) if ids is None else None
        given: Any = ids if topk is None else topk
        permutation = cumoe.group(given, num_experts=routing.num_experts, tile=tile)
        written.update(permutation._asdict() | ({} if topk is None else topk._asdict()))

    return run


def _planned(
    xp: Any,
    routing: Routing,
    logits: Array,
    bias: Array | None,
    ids: Array | None,
    tile: int,
    arch: str,
    written: dict[str, Array],
) -> tuple[Callable[[], object], int]:
    def allocate(name: str, shape: Sequence[int], dtype: str) -> Array:
        written[name] = xp.full(tuple(shape), 77, dtype)
        return written[name]

    source = Source(ids_in=ids)
    if ids is None:
        shape = (logits.shape[0], routing.total_top_k)
        out = allocate("ids", shape, "int32"), allocate("weights", shape, "float32")
        source = Source(*out, logits=logits, bias=bias, routing=routing)
    device = get_device(xp.cuda.Device().id)
    warmup(route_permute_specs(source, arch), [arch])
    experts = Experts(routing.num_experts, 0, ExpertShard(0, routing.num_experts))
    cluster = cluster_size(device)
    _, launches = plan_permutation(source, experts, tile, cluster, allocate)

    def run() -> None:
        stream = xp.cuda.get_current_stream().ptr
        for item in launches:
            item.run(device, stream)

    return run, len(launches)


def _softmax(xp: Any, logits: Array) -> Array:
    e = xp.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def peer_of(xp: Any, case: Case) -> Callable[[], object]:
    """Return the same with one array operation after the other."""
    routing, logits, bias, tile = case.routing, case.logits, case.bias, case.tile
    num_tokens, num_experts = logits.shape
    token = xp.arange(num_tokens)[:, None]
    max_tiles = case.expected["tile_expert"].size

    def route() -> tuple[Array, Array]:
        sigmoid = routing.method is RoutingMethod.DEEPSEEK_V3
        scores = 1 / (1 + xp.exp(-logits)) if sigmoid else _softmax(xp, logits)
        keys = scores if bias is None else scores + bias
        if routing.num_groups > 1:
            grouped = keys.reshape(num_tokens, routing.num_groups, -1)
            sums = xp.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
            kept = xp.argsort(-sums, axis=1)[:, : routing.top_groups]
            mask = xp.full(sums.shape, -xp.inf, np.float32)
            mask[token, kept] = 0
            keys = (grouped + mask[:, :, None]).reshape(keys.shape)
        ids = xp.argsort(-keys, axis=1)[:, : routing.top_k]
        weights = scores[token, ids] * routing.scaling_factor
        if routing.method is not RoutingMethod.DEFAULT:
            weights /= scores[token, ids].sum(axis=1, keepdims=True)
        return ids, weights

    def run() -> object:
        ids, weights = (case.ids, None) if case.ids is not None else route()
        flat = ids.ravel()
        order = xp.argsort(flat, kind="stable")
        counts = xp.bincount(flat, minlength=num_experts)
        tiles = -(-counts // tile)
        ends = xp.cumsum(tiles)
        offsets = (ends - tiles) * tile
        firsts = xp.cumsum(counts) - counts
        experts = flat[order]
        rows = offsets[experts] + xp.arange(flat.size) - firsts[experts]
        permuted = xp.empty(flat.shape, np.int32)
        permuted[order] = rows
        token_idx = xp.full(max_tiles * tile, -1, np.int32)
        token_idx[rows] = order // ids.shape[1]
        at = xp.arange(max_tiles)
        owner = xp.minimum(xp.searchsorted(ends, at, side="right"), num_experts - 1)
        row_end = xp.minimum((at + 1) * tile, offsets[owner] + counts[owner])
        used = at < ends[-1]
        tables = xp.where(used, owner, -1), xp.where(used, row_end, 0)
        return ids, weights, permuted, token_idx, tables, offsets, counts

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
    case = make_case(xp, shape, num_tokens, variant, args.seed)
    case.check_answer()
    on_host = xp is np
    settings: dict[str, Any] = {
        "repeats": args.repeats,
        "budget_s": args.budget,
        "warmup_s": 0.0 if on_host else 0.05,
        "clock": "host" if on_host else "device",
        "flush_l2": False,
    }
    method = "host" if on_host else f"graph of {GRAPH_CALLS}"
    timing, peers = time_beside(
        lambda i: case.work(),
        (lambda: [case.in_triton(xp)]) if not on_host and has_triton() else None,
        settings | ({} if on_host else {"graph": True, "calls": GRAPH_CALLS}),
        method,
    )
    alone = peer_of(xp, case)
    settings["repeats"] = min(args.repeats, 5)
    found = measure({"peer": lambda i: alone()}, **settings)["peer"]
    peers["numpy" if on_host else "cupy"] = figures_of(found, "host" if on_host else "events")
    return make_row(
        "routing",
        model=shape.name,
        recipe=None,
        num_tokens=num_tokens,
        timing=timing,
        **peer_fields(peers),
        variant=variant,
        method=method,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        tile=case.tile,
        num_launches=case.num_launches,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, print and write; return 1 if an answer is wrong."""
    args = _parser().parse_args(argv)
    xp = find_backend("numpy" if args.dry_run else args.backend)
    out = args.out or (None if args.dry_run else RESULTS)
    console = Console(width=None if sys.stdout.isatty() else 150)
    rows: list[Row] = []
    problems: list[str] = []
    for model in args.models:
        for variant in args.variants:
            for num_tokens in args.tokens or ((1, 7) if args.dry_run else TOKENS):
                try:
                    rows.append(bench_case(xp, SHAPES[model], num_tokens, variant, args))
                except ArithmeticError as error:
                    problems.append(f"{model} {variant} T={num_tokens}: {error}")
                    print("FAILED", problems[-1], flush=True)
                free_memory(xp)
    print_table(rows, console=console)
    if out is not None and rows:
        write_results(out, rows, seed=args.seed, merge=args.merge)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    module = "bench.bench_routing"
    parser = make_stage_parser(
        module, __doc__, RESULTS, variants=VARIANTS, tokens=TOKENS, budget=2.0
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
