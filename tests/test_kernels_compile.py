"""Every shipped kernel compiles for every architecture, unspilled and within its limits.

Needs NVRTC but neither a GPU nor a driver. Cubins go to the user's cache, so a second run is quick.
All configurations that can run on sm_90a and sm_80 are there; for the architectures between and
after them all that a layer takes, and of the rest the highest tile, where registers are short, and
one of two all-reduces and orders. Grouped GEMMs that gather without gating, or the reverse, are
compiled for sm_90a alone, at that tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cumoe import (
    Routing,
    RoutingMethod,
    formulas,
    kernels,
    kernels_activation,
    kernels_comm,
    kernels_quantize,
    kernels_routing,
    kernels_sm90,
    microscaling,
    tuning,
)
from cumoe.config import Activation
from cumoe.grouped_gemm import gemm_spec
from cumoe.kernels_routing import Source
from cumoe.launch import KERNEL_DIR, KernelSpec, compile_cubin, smem_limit
from cumoe.tuning import FP8_TENSOR, GroupedGemmProblem
from tests.helpers import BF16, DTYPES, F32, FP8

ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
WHOLE = ("sm_80", "sm_90a")
FLOATS = ("bfloat16", "float16", "float32")

ACTIVATIONS = [
    Activation(alpha=1.702, beta=1.0, limit=7.0),
    *(Activation(name) for name in formulas.ACTIVATIONS if name != "swiglu"),
]

ROUTING_SIZES = [
    (8, 2, 4, "float32"),
    (160, 6, 8, "bfloat16"),
    (256, 8, 8, "float32"),
    (2048, 32, 64, "float32"),
]
"""Experts, top-k, groups, and dtype of the logits."""

MAX_REGISTERS = {
    "activation": 168,
    "allreduce_one_shot": 128,
    "allreduce_two_shot": 128,
    "finalize": 56,
    "permute_place": 64,
    "permute_rows": 48,
    "quantize_fp8_block": 72,
    "quantize_fp8_tensor": 64,
    "quantize_fp8_token": 64,
    "quantize_fp8_ue8m0": 64,
    "quantize_fp8_weights": 128,
    "quantize_nvfp4": 80,
    "routing_count": 256,
    "routing_permute": 256,
    "routing_topk": 168,
    "sm80_grouped_gemm": 255,
    "sm90_fp8_grouped_gemm": 168,
    "sm90_fp8_rows_grouped_gemm": 168,
    "sm90_grouped_gemm": 168,
    "tensor_amax": 56,
}
"""Registers a thread may take: the most over all architectures with NVRTC 12.9, rounded up to a
multiple of eight."""


class Shipped(NamedTuple):
    """A kernel configuration and the dynamic shared memory of its launch."""

    spec: KernelSpec
    smem_bytes: int = 0


def routing_specs(arch: str) -> Iterator[Shipped]:
    """Yield each method at several sizes, alone and with the permutation."""
    for method, (experts, top_k, groups, dtype) in itertools.product(RoutingMethod, ROUTING_SIZES):
        grouped = method is RoutingMethod.DEEPSEEK_V3
        routing = Routing(
            method,
            num_experts=experts,
            top_k=1 if method is RoutingMethod.LLAMA4 else top_k,
            num_groups=groups if grouped else 1,
            top_groups=groups // 2 if grouped else 1,
            num_shared_experts=top_k % 4 // 2,
            weights_dtype="bfloat16" if dtype == "bfloat16" else "float32",
            bias_round_bf16=dtype == "bfloat16",
        )
        yield Shipped(kernels_routing.routing_spec(routing, dtype, "float32"))
        logits, bias = np.zeros((1, experts), DTYPES[dtype]), np.zeros(experts, F32)
        ids = np.zeros((1, routing.total_top_k), np.int32)
        weights = ids.astype(DTYPES[routing.weights_dtype])
        source = Source(ids, weights, logits=logits, bias=bias, routing=routing)
        specs = kernels_routing.route_permute_specs(source, arch)
        # Another method changes the selection, which is in all of them, sorted or by a list.
        if method is RoutingMethod.DEEPSEEK_V3 or (method is RoutingMethod.MINIMAX2 and top_k > 8):
            yield from map(Shipped, specs)
        elif arch == tuning.SM90_ARCH:
            yield Shipped(specs[0])
    ids, weights = np.zeros((1, 2), np.int32), np.zeros((1, 2), F32)
    given = [Source(ids_in=ids), Source(ids, weights.astype(BF16), ids_in=ids, packed=True)]
    for scores in (weights, weights.astype(BF16)):
        given.append(Source(ids, scores, ids_in=ids, weights_in=scores))
    for source in given:
        yield from map(Shipped, kernels_routing.route_permute_specs(source, arch))


def elementwise_specs() -> Iterator[Shipped]:
    """Yield finalize for all its dtypes, and the copy of rows."""
    ids = np.zeros((1, 2), np.int32)
    yield Shipped(KernelSpec("permute_rows"))
    for rows, weights, out in itertools.product(FLOATS, ("float32", "bfloat16"), FLOATS):
        arrays = (np.zeros((1, 8), DTYPES[dtype]) for dtype in (rows, weights))
        launch = kernels.finalize(*arrays, ids, np.zeros((1, 8), DTYPES[out]))
        yield Shipped(launch.spec)


def quantize_specs() -> Iterator[Shipped]:
    """Yield the quantisers for all their dtypes and units."""
    scale = np.zeros((1, 2), F32)
    for dtype in FLOATS:
        x = np.zeros((1, 1, 256), DTYPES[dtype])
        yield Shipped(kernels_quantize.quantize_fp8_weights(x, x, scale).spec)
        yield Shipped(kernels_quantize.tensor_amax(x, scale).spec)
        for columns in (8, 2048, 2880, 7168, 70000):
            yield Shipped(kernels_quantize.token_spec(dtype, columns))
        yield Shipped(kernels_quantize.block_spec(dtype))
        yield Shipped(kernels_quantize.block_spec(dtype, permuted=True))
        yield Shipped(kernels_quantize.tensor_spec(dtype, 1, permuted=True))
        for group_size in microscaling.GROUP_SIZES:
            yield Shipped(kernels_quantize.ue8m0_spec(dtype, group_size))
        for rows in (1, kernels_quantize.UNIT_ROWS[x.dtype.itemsize]):
            yield Shipped(kernels_quantize.tensor_spec(dtype, rows))
            for layout in microscaling.SCALE_LAYOUTS:
                yield Shipped(kernels_quantize.nvfp4_spec(dtype, rows, layout))


def activation_specs(arch: str) -> Iterator[Shipped]:
    """Yield the activation kernel for all its dtypes and rows, and the other activations."""
    orders = ("gate_up", "gate_up_interleaved", "up_gate_interleaved")[: 3 if arch in WHOLE else 2]
    for source, target in itertools.product((*FLOATS, FP8.name), repeat=2):
        units = kernels_activation.BLOCKS_PER_SM[DTYPES[source].itemsize]
        for order, rows in itertools.product(orders, units):
            if source == FP8.name and order != "gate_up" or order != "gate_up" and rows > 1:
                continue
            spec = kernels_activation.activation_spec(
                source, target, Activation(), gate_up_order=order, rows=rows
            )
            yield Shipped(spec)
    for activation, (source, target) in itertools.product(
        ACTIVATIONS, ((FP8.name, FP8.name), ("bfloat16", FP8.name), ("bfloat16", "bfloat16"))
    ):
        units = kernels_activation.BLOCKS_PER_SM[DTYPES[source].itemsize]
        for rows in {min(units), max(units)}:
            spec = kernels_activation.activation_spec(
                source,
                target,
                activation,
                gate_up_order="gate_up" if activation.gated else None,
                rows=rows,
            )
            yield Shipped(spec)


def allreduce_specs(arch: str) -> Iterator[Shipped]:
    """Yield the all-reduces of few and of many tokens, each with another format and dtype."""
    max_cluster = 1 if arch in ("sm_80", "sm_89") else 8
    configs = [kernels_comm.select_config(t, 7168, 132, max_cluster) for t in (1, 64, 128, 4096)]
    inputs = (("rows", "bfloat16"), ("rows", "float16"), ("experts", "bfloat16"))
    inputs += (("plain", "bfloat16"), ("plain", "float32"))
    formats = list(kernels_comm.QUANTS)
    for i, (config, ranks) in enumerate(itertools.product(configs, (1, 2, 4, 16))):
        for j in (i, i + 3) if arch in WHOLE else (i,):
            quantize = formats[-1 if i == 15 and j == i else j % len(formats)]
            policy, dtype = inputs[(i + j) % len(inputs)]
            spec = kernels_comm.allreduce_spec(
                policy, dtype, "bfloat16", quantize, ranks, config, two_shot=ranks > 2 and j % 2 > 0
            )
            yield Shipped(spec)


def epilogue_specs(arch: str) -> Iterator[Shipped]:
    """Yield the first GEMM of a layer with every activation but swiglu."""
    limit = smem_limit(arch)
    dtypes = ("bfloat16", FP8.name, FP8_TENSOR)
    for activation, dtype in itertools.product(ACTIVATIONS[1:], dtypes):
        gated = activation.gated
        for tile in thinned(tuning.tiles(dtype), arch):
            problem = GroupedGemmProblem(dtype, dtype, gated, True, tile, not gated)
            config = tuning.select_config(problem, limit)
            spec = gemm_spec(problem, config, activation)
            yield Shipped(spec, tuning.smem_bytes(config, problem))
        if arch == tuning.SM90_ARCH:
            one = tuning.sm90_block_heights(dtype)
            for tile in (one[0], one[-1], tuning.SM90_TILES[dtype][-1]):
                problem = GroupedGemmProblem(dtype, dtype, gated, True, tile, not gated)
                hopper = tuning.select_sm90_config(problem)
                spec = gemm_spec(problem, hopper, activation)
                yield Shipped(spec, tuning.sm90_smem_bytes(hopper, problem))
            if gated:  # of tokens in expert order
                problem = replace(problem, gather=False)
                hopper = tuning.select_sm90_config(problem)
                spec = gemm_spec(problem, hopper, activation)
                yield Shipped(spec, tuning.sm90_smem_bytes(hopper, problem))


def thinned(tiles: tuple[int, ...], arch: str) -> tuple[int, ...]:
    """Return all tile heights, or the highest."""
    return tiles if arch in WHOLE else tiles[-1:]


def grouped_gemm_specs(arch: str) -> Iterator[Shipped]:
    """Yield the configuration that every problem has on an architecture."""
    limit = smem_limit(arch)
    for dtype, out, gated, gather in itertools.product(
        ("bfloat16", "float16", FP8.name, FP8_TENSOR),
        (*FLOATS, FP8.name, FP8_TENSOR),
        (False, True),
        (False, True),
    ):
        if (out not in FLOATS and not gated) or (gated != gather and arch != "sm_90a"):
            continue
        if out != dtype and (out == FP8_TENSOR or out == FP8.name and dtype == FP8_TENSOR):
            continue
        in_layer = gated == gather and (dtype, out) in (
            ("bfloat16", "bfloat16"),
            (FP8.name, FP8.name if gated else "bfloat16"),
            (FP8_TENSOR, FP8_TENSOR if gated else "bfloat16"),
        )
        weighted = ("float32", "bfloat16") if out == FP8_TENSOR and gather else ()
        every = tuning.tiles(dtype)
        some = thinned(every, arch) if gated == gather else every[-1:]
        for weights in (None, *weighted):
            for tile in every if in_layer and weights is None else some:
                problem = GroupedGemmProblem(dtype, out, gated, gather, tile, weights_dtype=weights)
                config = tuning.select_config(problem, limit)
                spec = kernels.grouped_gemm_spec(problem, config)
                yield Shipped(spec, tuning.smem_bytes(config, problem))


def hopper_specs() -> Iterator[Shipped]:
    """Yield the Hopper grouped GEMMs at every tile height, and two blocks that share weights."""
    for dtype, gated, gather in itertools.product(
        tuning.SM90_MAX_BLOCK_N, (False, True), (False, True)
    ):
        for tile in tuning.SM90_TILES[dtype]:
            out = dtype if gated else "bfloat16"
            problem = GroupedGemmProblem(dtype, out, gated, gather, tile)
            config = tuning.select_sm90_config(problem)
            shared = tile == tuning.SM90_TILES[dtype][1]
            for chosen in (config, replace(config, cluster=2)) if shared else (config,):
                assert tuning.why_illegal_sm90(chosen, problem) is None
                spec = kernels_sm90.grouped_gemm_spec(problem, chosen)
                yield Shipped(spec, tuning.sm90_smem_bytes(chosen, problem))
    for (gated, gather), weights, tile in itertools.product(
        ((False, True), (True, True), (True, False)),
        ("float32", "bfloat16"),
        tuning.SM90_TILES[FP8_TENSOR],
    ):
        problem = GroupedGemmProblem(
            FP8_TENSOR, FP8_TENSOR, gated, gather, tile, not gated, weights
        )
        config = tuning.select_sm90_config(problem)
        spec = kernels_sm90.grouped_gemm_spec(problem, config)
        yield Shipped(spec, tuning.sm90_smem_bytes(config, problem))


def shipped(arch: str) -> list[Shipped]:
    """Return what can run on an architecture, each configuration once."""
    hopper = hopper_specs() if arch == tuning.SM90_ARCH else ()
    gemms = (*grouped_gemm_specs(arch), *epilogue_specs(arch), *hopper)
    small = (*routing_specs(arch), *elementwise_specs(), *quantize_specs(), *activation_specs(arch))
    small = (*small, *allreduce_specs(arch))
    every = (*small, *gemms)
    return list(dict.fromkeys(every))


def parameters() -> list[object]:
    """Return the parameter sets of the test, each with a name that says what is compiled."""
    return [
        pytest.param(arch, item, id=" ".join([arch, item.spec.name, *map(str, values)]))
        for arch in ARCHS
        for item in shipped(arch)
        for values in [dict(item.spec.defines).values()]
    ]


@pytest.mark.parametrize(("arch", "item"), parameters())
def test_compiles(arch: str, item: Shipped) -> None:
    resources = compile_cubin(item.spec, arch).resources
    assert resources.spill_store_bytes == resources.spill_load_bytes == resources.stack_bytes == 0
    assert resources.registers <= MAX_REGISTERS[item.spec.name]
    assert item.smem_bytes + resources.static_smem_bytes <= smem_limit(arch)
    if item.spec.name == "sm80_grouped_gemm":
        assert resources.static_smem_bytes <= tuning.STATIC_SMEM_BYTES


def smallest_hopper() -> list[Shipped]:
    """Return the lowest tile of each Hopper kernel, with either epilogue and source of rows."""
    first: dict[tuple[object, ...], Shipped] = {}
    for item in hopper_specs():
        defines = dict(item.spec.defines)
        first.setdefault((item.spec.name, defines["GATED"], defines["GATHER"]), item)
    return list(first.values())


@pytest.mark.parametrize("item", smallest_hopper(), ids=lambda item: item.spec.name)
def test_hopper_shared_memory(item: Shipped, tmp_path: Path) -> None:
    """The formula is the size of the kernel's own struct, rounded up to 16 bytes."""
    name = item.spec.name
    struct = "Smem" if "fp8" in name else "Shared"
    text = (KERNEL_DIR / f"{name}.cu").read_text()
    text += f"static_assert((sizeof({struct}) + 15) / 16 * 16 == {item.smem_bytes});\n"
    (tmp_path / f"{name}.cu").write_text(text)
    spec = KernelSpec(name, item.spec.defines, source_dir=tmp_path)
    compile_cubin(spec, tuning.SM90_ARCH, use_cache=False)


def test_every_kernel_is_compiled() -> None:
    stems = {path.stem for path in KERNEL_DIR.glob("*.cu")}
    assert stems == {item.spec.name for item in shipped("sm_90a")} == set(MAX_REGISTERS)
