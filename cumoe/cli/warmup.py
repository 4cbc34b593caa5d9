"""`python -m cumoe warmup`: compile what expert layers need into the cache, GPU or not.

:func:`kernel_specs` enumerates the kernels of a layer with the functions that plan one, on empty
host arrays; a test compares it with real plans.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cumoe import kernels, kernels_quantize, launch
from cumoe.arrays import DTYPES, FP8
from cumoe.cli.console import CommandError, facts, make_console, quantity, seconds
from cumoe.config import Array, ExpertShard
from cumoe.kernels_routing import Source, route_permute_specs
from cumoe.launch import KernelSpec
from cumoe.launch.compile import cache_key
from cumoe.layer_call import LayerSpec
from cumoe.models import MODELS, ModelShape, Recipe
from cumoe.plan import gemm_specs
from cumoe.weights import ExpertWeights

DEFAULT_ARCH = "sm_90a"


def run(args: argparse.Namespace) -> int:
    """Compile what the arguments ask for and print a summary."""
    console = make_console()
    shapes = _shapes(args)
    jobs = {arch: _all_specs(shapes, args, arch) for arch in _architectures(args.arch)}
    cache, start = launch.default_cache(), time.perf_counter()
    compiled = sum(
        compile_specs(specs, arch, console, processes=args.processes)
        for arch, specs in jobs.items()
    )
    elapsed, total = time.perf_counter() - start, sum(map(len, jobs.values()))
    table = facts()
    table.add_row("shapes", ", ".join(shape.name for shape in shapes))
    table.add_row("recipes", ", ".join(args.recipe))
    table.add_row("targets", ", ".join(jobs) + _why_default(args.arch))
    table.add_row("kernels", f"{total}: {compiled} compiled, {total - compiled} were there already")
    table.add_row("time", seconds(elapsed))
    size = quantity(cache.size_bytes(), "B")
    table.add_row("cache", f"{cache.directory} ({len(cache.entries())} kernels, {size})")
    console.print(table)
    return 0


def _shapes(args: argparse.Namespace) -> list[ModelShape]:
    """Return the named shapes and the one given by its sizes."""
    shapes = [MODELS[name] for name in args.shapes or []]
    sizes = [args.hidden, args.intermediate, args.experts, args.top_k]
    names = ("--hidden", "--intermediate", "--experts", "--top-k")
    missing = [name for name, size in zip(names, sizes, strict=True) if size is None]
    if missing and len(missing) < len(names):
        raise CommandError(f"a shape given by its sizes needs {', '.join(missing)} too")
    if not missing:
        shapes.append(
            ModelShape(
                "custom",
                hidden_size=args.hidden,
                intermediate_size=args.intermediate,
                num_experts=args.experts,
                top_k=args.top_k,
                num_shared_experts=args.shared_experts,
                method=args.method,
                num_groups=args.groups,
                top_groups=args.top_groups,
                has_bias=args.method in ("deepseek_v3", "minimax2"),
            )
        )
    if not shapes:
        raise CommandError(
            "nothing to compile: give --shapes NAME,... or --hidden, --intermediate, --experts "
            "and --top-k"
        )
    return shapes


def _architectures(names: list[str] | None) -> list[str]:
    """Return the architectures to compile for: those named, or those of the GPUs here."""
    if names is not None:
        return list(dict.fromkeys(names))
    if not launch.is_available():
        return [DEFAULT_ARCH]
    import cupy

    devices = [launch.get_device(i) for i in range(cupy.cuda.runtime.getDeviceCount())]
    return list(dict.fromkeys(device.arch for device in devices))


def _why_default(names: list[str] | None) -> str:
    if names is not None or launch.is_available():
        return ""
    return " (there is no GPU here; --arch chooses others)"


def _all_specs(
    shapes: Iterable[ModelShape], args: argparse.Namespace, arch: str
) -> list[KernelSpec]:
    specs: list[KernelSpec] = []
    for shape in shapes:
        for recipe in args.recipe:
            try:
                specs += kernel_specs(shape, recipe, arch, max_num_tokens=args.max_num_tokens)
            except (ValueError, TypeError) as error:
                raise CommandError(f"{shape.name}, {recipe}: {error}") from error
    return list(dict.fromkeys(specs))


def compile_specs(
    specs: list[KernelSpec], arch: str, console: Console, *, processes: int | None = None
) -> int:
    """Compile for one target what the cache lacks, with a progress bar; returns how many."""
    cache = launch.default_cache()
    missing = [spec for spec in specs if cache.get(cache_key(spec, arch)) is None]
    columns = (
        TextColumn("compiling for {task.fields[arch]}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.description}"),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=len(missing), arch=arch)

        def advance(done: int, total: int, spec: KernelSpec, arch: str) -> None:
            progress.update(task, completed=done, description=spec.name)

        launch.warmup(missing, [arch], advance, processes)
    return len(missing)


def kernel_specs(
    shape: ModelShape,
    recipe: Recipe,
    arch: str,
    *,
    min_num_tokens: int = 1,
    max_num_tokens: int | None = None,
) -> list[KernelSpec]:
    """Return every kernel that calls of a layer of this shape may need.

    Parameters
    ----------
    shape : ModelShape
    recipe : {"fp8_block", "bf16", "fp8_tensor"}
    arch : str
        Target architecture, such as ``"sm_90a"``.
    min_num_tokens, max_num_tokens : int
        Range of the tokens of a call; by default all.

    Returns
    -------
    list of KernelSpec
        Those of calls with bfloat16 tokens (for fp8 quantised ones too), float32 or
        bfloat16 logits, given routing plain or packed, and a bfloat16 result; and the quantisation
        of weights from bfloat16 or float32.

    Raises
    ------
    ValueError
        If the shape's sizes cannot run.
    """
    spec = _layer_spec(shape, recipe)

    def reads_of(numbers: range) -> set[tuple[int, bool]]:
        """Return tile heights, and whether rows are gathered, from bfloat16 and from fp8 tokens."""
        asked = [(num_tokens, shape.total_top_k, arch) for num_tokens in numbers]
        return {
            (spec.select_tile(*a), not spec.orders_rows(*a, quantizes))
            for a in asked
            for quantizes in {False, recipe != "bf16"}
        }

    if max_num_tokens is not None:
        reads = reads_of(range(min_num_tokens, max_num_tokens + 1))
    else:
        reads = reads_of(range(1, 1 << 17, 64))
        reads |= {(tile, True) for tile in spec.tiles(arch)}
    specs = [*_routing_specs(spec, shape, arch), *_rows_specs(recipe)]
    weights = ("float32", "bfloat16") if spec.weights_on_input else ("float32",)
    for tile, gather in sorted(reads):
        for dtype in weights:
            specs += gemm_specs(spec, tile, arch, dtype, gather)
        if not gather:
            specs.append(KernelSpec("permute_rows"))
            if recipe == "fp8_block":
                specs.append(kernels_quantize.block_spec("bfloat16", permuted=True))
            if recipe == "fp8_tensor":
                specs.append(kernels_quantize.tensor_spec("bfloat16", 1, permuted=True))
    return list(dict.fromkeys(specs))


def _layer_spec(shape: ModelShape, recipe: Recipe) -> LayerSpec:
    """Return the layer without a single expert, which has every size that planning asks for."""
    hidden, size = shape.hidden_size, shape.intermediate_size
    dtype = "bfloat16" if recipe == "bf16" else FP8
    arrays = [_empty((0, 2 * size, hidden), dtype), _empty((0, hidden, size), dtype)]
    if recipe == "fp8_block":
        rows, columns = kernels.blocks(size), kernels.blocks(hidden)
        arrays += [_empty((0, 2 * rows, columns), "float32"), _empty((0, columns, rows), "float32")]
    static: dict[str, Any] = {}
    if recipe == "fp8_tensor":
        arrays += [_empty((0, 2), "float32"), _empty((0,), "float32")]
        static = {"x_scale": 1.0, "act_scale": 1.0}
    weights = ExpertWeights(*arrays, gate_up_order="gate_up", recipe=recipe, **static)
    routing = shape.routing(recipe)
    return LayerSpec(
        weights,
        routing,
        shape.num_experts,
        shape.num_shared_experts,
        ExpertShard(0, shape.num_experts),
        shape.activation,
        weights_on_input=routing.weights_on_input,
    )


def _empty(shape: tuple[int, ...], dtype: str) -> Array:
    return np.empty(shape, DTYPES[dtype])


def _routing_specs(spec: LayerSpec, shape: ModelShape, arch: str) -> list[KernelSpec]:
    """Return routing from logits and from given ids, with the permutation."""
    assert spec.routing is not None
    bias = _empty((shape.num_experts,), "float32") if shape.has_bias else None
    given, ids = _empty((1, shape.top_k), "int32"), _empty((1, shape.total_top_k), "int32")
    written = {dtype: _empty(ids.shape, dtype) for dtype in ("float32", "bfloat16")}
    sources = [Source(ids_in=given)] if not spec.num_shared else []
    sources += [Source(ids, written["bfloat16"], ids_in=given, packed=True)]
    for dtype, weights in written.items():
        logits = _empty((1, shape.num_experts), dtype)
        out = written[spec.routing.weights_dtype]
        sources += [Source(ids, out, logits=logits, bias=bias, routing=spec.routing)]
        if spec.num_shared:
            weights_in = _empty(given.shape, dtype)
            sources += [Source(ids, weights, ids_in=given, weights_in=weights_in)]
    return [item for source in sources for item in route_permute_specs(source, arch)]


def _rows_specs(recipe: Recipe) -> list[KernelSpec]:
    """Return the kernels before and after the GEMMs, whose only variable is a dtype."""
    rows, index = _empty((1, 128), "bfloat16"), _empty((1, 1), "int32")
    specs = []
    for dtype in ("float32", "bfloat16"):
        weights = _empty((1, 1), dtype)
        specs.append(kernels.finalize(rows, weights, index, rows).spec)
    if recipe == "fp8_tensor":
        units = (1, kernels_quantize.UNIT_ROWS[2])
        specs += [kernels_quantize.tensor_spec("bfloat16", count) for count in units]
        for dtype in ("bfloat16", "float32"):
            w, scale = _empty((1, 128), dtype), _empty((1,), "float32")
            specs.append(kernels_quantize.tensor_amax(w, scale).spec)
            rows_of_w = (1, kernels_quantize.UNIT_ROWS[w.dtype.itemsize])
            specs += [kernels_quantize.tensor_spec(dtype, count) for count in rows_of_w]
    if recipe == "fp8_block":
        specs.append(kernels_quantize.block_spec("bfloat16"))
        for dtype in ("bfloat16", "float32"):
            w, scale = _empty((1, 1, 128), dtype), _empty((1, 1, 1), "float32")
            specs.append(kernels_quantize.quantize_fp8_weights(w, _empty(w.shape, FP8), scale).spec)
    return specs
