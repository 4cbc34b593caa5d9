"""ExpertWeights: what is accepted and refused, conversions, shards, FlashInfer's layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cumoe.config import ExpertShard
from cumoe.layouts import (
    GATE_UP_ORDERS,
    WEIGHT_LAYOUTS,
    row_shuffle_indices,
    to_block_major_k,
    to_flashinfer_w2,
    to_flashinfer_w13,
)
from cumoe.weights import ExpertWeights
from tests.weight_matrices import (
    BF16,
    FORMS,
    FP8,
    RECIPES,
    Foreign,
    assert_holds,
    assert_same,
    build,
    draw,
    plain_arrays,
    static_scales,
)


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_fields_and_properties(recipe: str, layout: str) -> None:
    arguments = plain_arrays(recipe, layout)
    weights = ExpertWeights(**arguments)
    assert weights.w13 is arguments["w13"] and weights.w2 is arguments["w2"]
    assert weights.recipe == recipe
    assert weights.dtype == ("bfloat16" if recipe == "bf16" else "float8_e4m3fn")
    sizes = (weights.num_local_experts, weights.hidden_size, weights.intermediate_size)
    assert sizes == (2, 384, 256)
    assert not weights.is_device
    arrays = [x for x in arguments.values() if isinstance(x, np.ndarray)]
    static = 3 * 4 if recipe == "fp8_tensor" else 0  # of tokens, and of two experts
    assert weights.nbytes == sum(x.nbytes for x in arrays) + static
    assert weights.to_host() is weights


def test_uint8_payload_is_tagged() -> None:
    arguments = plain_arrays("fp8_block")
    arguments |= {name: arguments[name].view(np.uint8) for name in ("w13", "w2")}
    weights = ExpertWeights(**arguments, dtype="float8_e4m3fn")
    assert weights.w13.dtype == FP8 and np.shares_memory(weights.w13, arguments["w13"])
    assert weights.recipe == "fp8_block"


def test_arrays_of_other_libraries_are_taken_over() -> None:
    plain = plain_arrays("fp8_block")
    names = ["w13", "w2", "w13_scale", "w2_scale"]
    bytes_of = {
        n: x.view(np.uint8) if x.dtype == FP8 else x for n, x in plain.items() if n in names
    }
    weights = ExpertWeights(*(Foreign(bytes_of[n]) for n in names), gate_up_order="up_gate")
    for name in names:
        assert isinstance(getattr(weights, name), np.ndarray)
        assert np.shares_memory(getattr(weights, name), plain[name])


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_experts(recipe: str) -> None:
    weights = ExpertWeights(**plain_arrays(recipe)).slice_experts(1, 1)
    assert weights.num_local_experts == 0
    assert weights.nbytes == (4 if recipe == "fp8_tensor" else 0)  # the scale of tokens
    assert weights.hidden_size == 384 and weights.intermediate_size == 256
    converted = weights.convert(layout="block_major_k", gate_up_order="up_gate_interleaved")
    assert converted.num_local_experts == 0 and converted.intermediate_size == 256


@pytest.mark.parametrize(("order", "layout"), FORMS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_convert_equals_building_it_so(
    rng: np.random.Generator, recipe: Any, order: Any, layout: Any
) -> None:
    first, matrices = build(rng, recipe, 2, 128, 256)
    for source_order, source_layout in FORMS:
        source = first.convert(gate_up_order=source_order, layout=source_layout)  # type: ignore[arg-type]
        want = ExpertWeights.from_experts(
            *matrices,
            recipe=recipe,
            gate_up_order=order,
            layout=layout,
            **static_scales(recipe),
        )
        assert_same(source.convert(gate_up_order=order, layout=layout), want)


def test_convert_shares_what_does_not_change(rng: np.random.Generator) -> None:
    weights, _ = build(rng, "fp8_block")
    same = weights.convert()
    assert same.w13 is weights.w13 and same.w13_scale is weights.w13_scale
    order = weights.convert(gate_up_order="gate_up_interleaved")
    assert order.w13_scale is weights.w13_scale and order.w2 is weights.w2
    layout = weights.convert(layout="block_major_k")
    assert layout.w2_scale is weights.w2_scale and layout.w2.shape == (2, 2, 384, 128)


@pytest.mark.parametrize(("size", "hidden_size"), [(704, 2880), (1408, 144)])
@pytest.mark.parametrize("order", GATE_UP_ORDERS)
def test_partial_blocks_survive_conversion(
    rng: np.random.Generator, order: Any, size: int, hidden_size: int
) -> None:
    weights, matrices = build(rng, "fp8_block", 1, size, hidden_size)
    converted = weights.convert(gate_up_order=order)
    assert_holds(converted, matrices)
    assert_same(converted.convert(gate_up_order="gate_up"), weights)


@pytest.mark.parametrize("recipe", RECIPES)
def test_slice_experts_is_a_view(rng: np.random.Generator, recipe: str) -> None:
    weights, matrices = build(rng, recipe, 4, 32, 48)
    part = weights.slice_experts(1, 3)
    assert np.shares_memory(part.w13, weights.w13) and np.shares_memory(part.w2, weights.w2)
    assert_holds(part, matrices, [1, 2])


@pytest.mark.parametrize(("order", "layout"), FORMS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_slice_intermediate_takes_rows_and_columns(
    rng: np.random.Generator, recipe: str, order: str, layout: str
) -> None:
    weights, (gate, up, down) = build(rng, recipe, 2, 384, 256, order, layout)
    for start, stop in [(0, 128), (128, 384), (256, 384), (0, 384)]:
        part = weights.slice_intermediate(start, stop)
        assert (part.gate_up_order, part.layout) == (order, layout)
        assert not np.shares_memory(part.w2, weights.w2)
        if recipe == "fp8_tensor":  # parts keep the scale of the whole
            for e in range(2):
                g, u, d = weights.dequantize_expert(e)
                want = (g[start:stop], u[start:stop], d[:, start:stop])
                for got, matrix in zip(part.dequantize_expert(e), want, strict=True):
                    np.testing.assert_array_equal(got, matrix)
            continue
        assert_holds(part, (gate[:, start:stop], up[:, start:stop], down[:, :, start:stop]))


def test_slice_intermediate_up_to_a_partial_block(rng: np.random.Generator) -> None:
    weights, (gate, up, down) = build(rng, "fp8_block", 2, 704, 144, "up_gate")
    assert_holds(
        weights.slice_intermediate(640, 704), (gate[:, 640:], up[:, 640:], down[:, :, 640:])
    )
    weights, (gate, up, down) = build(rng, "bf16", 2, 704, 144)
    part = weights.slice_intermediate(8, 352)
    assert_holds(part, (gate[:, 8:352], up[:, 8:352], down[:, :, 8:352]))


@pytest.mark.parametrize("num_shared", [0, 1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_shards_hold_their_experts_and_all_shared_ones(
    rng: np.random.Generator, recipe: str, num_shared: int
) -> None:
    weights, matrices = build(rng, recipe, 7 + num_shared, 32, 48, "up_gate")
    for rank in range(3):
        shard = ExpertShard.from_counts([3, 0, 4], rank)
        part = weights.shard(shard, num_shared)
        first, count = shard.expert_offset, shard.num_local_experts
        experts = [*range(first, first + count), *range(7, 7 + num_shared)]
        assert_holds(part, matrices, experts)
        if count:
            assert np.shares_memory(part.w13, weights.w13) == (num_shared == 0)


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("interleaved", [None, False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_from_flashinfer_undoes_the_permutation(
    rng: np.random.Generator, recipe: str, interleaved: bool | None, shuffled: bool, layout: Any
) -> None:
    want, matrices = build(rng, recipe, 2, 256, 384, "up_gate", layout)
    w13, w2 = want.w13, want.w2
    w13 = to_flashinfer_w13(w13, recipe, "up_gate", shuffled=shuffled, interleaved=interleaved)
    if shuffled:
        w2 = to_flashinfer_w2(w2, recipe)
    got = ExpertWeights.from_flashinfer(
        w13,
        w2,
        want.w13_scale,
        want.w2_scale,
        shuffled=shuffled,
        layout=layout,
        interleaved=interleaved,
        **static_scales(recipe),
    )
    assert_same(got, want)
    assert_holds(got, matrices)
    if recipe == "fp8_block" and not shuffled and not interleaved:
        assert got.w13 is w13 and got.w2 is w2


def test_from_flashinfer_by_hand(rng: np.random.Generator) -> None:
    """The bf16 recipe: up and gate alternate, then rows shuffle in blocks of 32, then 64-blocks."""
    gate, up, down = (x.astype(BF16) for x in draw(rng, 2, 64, 128))
    interleaved = np.stack([up, gate], axis=2).reshape(2, 128, 128)
    w13 = to_block_major_k(interleaved[:, row_shuffle_indices(128, 128)])
    w2 = to_block_major_k(down[:, row_shuffle_indices(128, 128)])
    weights = ExpertWeights.from_flashinfer(w13, w2, shuffled=True, layout="block_major_k")
    assert_holds(weights, (gate, up, down))


def bf16(*shape: int) -> np.ndarray:
    return np.zeros(shape, BF16)


def fp8(*shape: int) -> np.ndarray:
    return np.zeros(shape, FP8)


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def of(form: str, /, **changes: Any) -> Callable[[], Any]:
    """Build weights of a "recipe" or "recipe/layout" that are fine but for `changes`."""
    return lambda: ExpertWeights(**{**plain_arrays(*form.split("/")), **changes})


def up_alone(form: str, **changes: Any) -> Callable[[], Any]:
    """Build weights without a gate that are fine but for `changes`."""
    w13 = plain_arrays(form)["w13"][:, :256].copy()
    scale = {"w13_scale": f32(2, 2, 3)} if form == "fp8_block" else {}
    return of(form, **{"w13": w13, "gate_up_order": "up", **scale, **changes})


def call(form: str, name: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    """Call a method of weights that are fine."""
    return lambda: getattr(of(form)(), name)(*arguments, **options)


def sized(dtype: Any, size: int, hidden_size: int, **options: Any) -> Callable[[], ExpertWeights]:
    """Build weights of two experts with these sizes, with `options` over the defaults."""
    arrays = (np.zeros(s, dtype) for s in [(2, 2 * size, hidden_size), (2, hidden_size, size)])
    w13, w2 = arrays
    if dtype == FP8:
        rows, columns = -(-size // 128), -(-hidden_size // 128)
        scales = {"w13_scale": f32(2, 2 * rows, columns), "w2_scale": f32(2, columns, rows)}
        options = scales | options
    return lambda: ExpertWeights(w13, w2, **{"gate_up_order": "up_gate", **options})


def from_flashinfer(*arrays: Any, **options: Any) -> Callable[[], Any]:
    return lambda: ExpertWeights.from_flashinfer(*arrays, shuffled=True, **options)


NO_SCALE = "expected float32 block scales of an fp8 payload, got None"
STRIDES = "expected a C-contiguous array, got shape"

BAD_VALUES: list[tuple[str, Callable[[], Any]]] = [
    (
        r"gate_up_order: expected one of \['gate_up', 'up_gate', 'gate_up_interleaved', "
        r"'up_gate_interleaved', 'up'\], got None; the order of w13's rows decides which half",
        of("bf16", gate_up_order=None),
    ),
    ("gate_up_order: expected one of .*, got 'w3w1'", of("bf16", gate_up_order="w3w1")),
    ("layout: expected one of .*, got 'major_mn'", of("bf16", layout="major_mn")),
    ("recipe: expected one of .*, got 'nvfp4'", of("bf16", recipe="nvfp4")),
    ("dtype: expected 'bfloat16' with recipe 'bf16', got 'fp8'", of("bf16", dtype="fp8")),
    # Scales and payload that disagree.
    (f"w13_scale: {NO_SCALE}", of("bf16", recipe="fp8_block")),
    (f"w13_scale: {NO_SCALE}", of("fp8_block", w13_scale=None, w2_scale=None)),
    (f"w13_scale: {NO_SCALE}", of("fp8_block", w13_scale=None)),
    (f"w2_scale: {NO_SCALE}", of("fp8_block", w2_scale=None)),
    (f"w2_scale: {NO_SCALE}", of("bf16", w13_scale=f32(2, 4, 3))),
    ("w13_scale: expected None with recipe 'bf16', got an array", of("fp8_block", recipe="bf16")),
    # Ranks and shapes.
    (r"w13: expected 3 dimensions, got 2 \(shape \(512, 384\)\)", of("bf16", w13=bf16(512, 384))),
    ("w2: expected 3 dimensions, got 4", of("bf16", w2=bf16(2, 4, 384, 64))),
    ("w13: expected 4 dimensions, got 3", of("bf16", layout="block_major_k")),
    (
        "w13: expected blocks of 128 bytes, 64 elements of bfloat16, got 128",
        of("bf16/block_major_k", w13=bf16(2, 3, 512, 128)),
    ),
    (
        "w2: expected blocks of 128 bytes, 128 elements of float8_e4m3fn, got 64",
        of("fp8_block/block_major_k", w2=fp8(2, 4, 384, 64)),
    ),
    ("w13: expected an even number of .* rows, got 511", of("bf16", w13=bf16(2, 511, 384))),
    (r"w2: .* \(2, 384, 256\), got \(3, 384, 256\)", of("bf16", w2=bf16(3, 384, 256))),
    (r"w2: .* \(2, 384, 256\), got \(2, 256, 384\)", of("bf16", w2=bf16(2, 256, 384))),
    (r"w2: .* \(2, 384, 256\), got \(2, 384, 248\)", of("bf16", w2=bf16(2, 384, 248))),
    (
        r"w2: expected shape \(2, 4, 384, 64\), got \(2, 5, 384, 64\)",
        of("bf16/block_major_k", w2=bf16(2, 5, 384, 64)),
    ),
    (r"w13_scale: .* \(2, 4, 3\), got \(2, 3, 4\)", of("fp8_block", w13_scale=f32(2, 3, 4))),
    (
        r"w13_scale: expected shape \(2, 12, 3\), got \(2, 11, 3\)",
        sized(FP8, 704, 384, w13_scale=f32(2, 11, 3)),
    ),
    (r"w2_scale: .* \(2, 3, 2\), got \(2, 2, 3\)", of("fp8_block", w2_scale=f32(2, 2, 3))),
    (r"w2_scale: .* \(2, 3, 2\), got \(3, 2\)", of("fp8_block", w2_scale=f32(3, 2))),
    (
        r"num_local_experts: expected in \[0, 2080\], got 2081",
        of("bf16", w13=bf16(2081, 16, 8), w2=bf16(2081, 8, 8)),
    ),
    # Sizes that no kernel loads.
    ("hidden_size: expected a positive multiple of 8 .*, got 0", sized(BF16, 256, 0)),
    ("intermediate_size: expected a positive multiple of 8 .*, got 0", sized(BF16, 0, 384)),
    (
        r"hidden_size: expected a positive multiple of 8 \(16 bytes of bfloat16 with layout "
        r"'major_k'\), got 390; zero padding to 392 would work",
        sized(BF16, 256, 390),
    ),
    ("intermediate_size: .* multiple of 8 .*, got 10; zero padding to 16", sized(BF16, 10, 384)),
    ("hidden_size: .* multiple of 16 .*, got 392; zero padding to 400", sized(FP8, 256, 392)),
    ("intermediate_size: .* multiple of 16 .*, got 24; zero padding to 32", sized(FP8, 24, 384)),
    # Strides.
    (f"w13: {STRIDES}", of("bf16", w13=bf16(2, 512, 768)[:, :, ::2])),
    (f"w2: {STRIDES}", of("bf16", w2=bf16(2, 256, 384).swapaxes(1, 2))),
    (f"w13_scale: {STRIDES}", of("fp8_block", w13_scale=f32(2, 4, 6)[:, :, ::2])),
    (f"w2_scale: {STRIDES}", of("fp8_block", w2_scale=f32(2, 2, 3).swapaxes(1, 2))),
    # Methods.
    (
        "gate_up_order: expected 'gate_up' or another order with a gate, got 'up'",
        call("bf16", "convert", gate_up_order="up"),
    ),
    (
        "gate_up_order: expected 'up' or another order without a gate, got 'gate_up'",
        lambda: up_alone("bf16")().convert(gate_up_order="gate_up"),
    ),
    (
        r"w13_scale: expected shape \(2, 2, 3\), got \(2, 4, 3\)",
        up_alone("fp8_block", w13_scale=f32(2, 4, 3)),
    ),
    (
        "gate: expected None with gate_up_order 'up', got ndarray",
        lambda: ExpertWeights.from_experts(
            *[np.ones((1, 16, 16), np.float32)] * 3, gate_up_order="up"
        ),
    ),
    ("layout: expected one of .*, got 'k_major'", call("bf16", "convert", layout="k_major")),
    (
        "intermediate_size: .* multiple of 64 .*, got 104; zero padding to 128",
        lambda: sized(BF16, 104, 64)().convert(layout="block_major_k"),
    ),
    (r"stop: expected in \[1, 2\], got 3", call("bf16", "slice_experts", 1, 3)),
    (r"stop: expected in \[2, 2\], got 1", call("bf16", "slice_experts", 2, 1)),
    (r"start: expected in \[0, 2\], got -1", call("bf16", "slice_experts", -1, 1)),
    (r"stop: expected in \[9, 256\], got 8", call("bf16", "slice_intermediate", 8, 8)),
    (
        "start: expected a multiple of 128 with recipe 'fp8_block' and layout 'major_k', got 64",
        call("fp8_block", "slice_intermediate", 64, 256),
    ),
    (
        "stop: expected a multiple of 64 with recipe 'bf16' and layout 'block_major_k', got 96",
        call("bf16/block_major_k", "slice_intermediate", 0, 96),
    ),
    (
        "intermediate_size: expected a positive multiple of 8 .*, got 100",
        call("bf16", "slice_intermediate", 0, 100),
    ),
    (
        "shard: expected experts within the 2 routed ones, got 1 to 3",
        call("bf16", "shard", ExpertShard(1, 2)),
    ),
    (
        "shard: expected experts within the 1 routed ones, got 0 to 2",
        call("bf16", "shard", ExpertShard(0, 2), 1),
    ),
    (
        r"num_shared_experts: expected in \[0, 2\], got 3",
        call("bf16", "shard", ExpertShard(0, 0), 3),
    ),
    (r"expert: expected in \[0, 1\], got 2", call("bf16", "dequantize_expert", 2)),
    # FlashInfer's layouts.
    (
        "intermediate_size: expected a multiple of 128, as FlashInfer's scale grid needs, got 208",
        from_flashinfer(fp8(2, 416, 256), fp8(2, 256, 208), f32(2, 4, 2), f32(2, 2, 2)),
    ),
    (
        "w13: expected a multiple of 32 rows with epilogue_tile_m = 128, got 80",
        from_flashinfer(bf16(1, 80, 64), bf16(1, 64, 40)),
    ),
    (
        "w13: expected 4 dimensions, got 3",
        from_flashinfer(bf16(1, 64, 64), bf16(1, 64, 32), layout="block_major_k"),
    ),
]

BAD_TYPES: list[tuple[str, Callable[[], Any]]] = [
    ("gate_up_order: expected one of .*, got int", of("bf16", gate_up_order=1)),
    ("layout: expected one of .*, got NoneType", of("bf16", layout=None)),
    ("w13: expected a NumPy or CuPy array .*, got NoneType", of("bf16", w13=None)),
    ("w2: expected a NumPy or CuPy array .*, got list", of("bf16", w2=[[[0.0]]])),
    ("w13: expected dtype bfloat16, got float32", of("bf16", w13=f32(2, 512, 384))),
    ("w2: expected dtype bfloat16, got float8_e4m3fn", of("bf16", w2=fp8(2, 384, 256))),
    ("w2: expected dtype float8_e4m3fn, got bfloat16", of("fp8_block", w2=bf16(2, 384, 256))),
    ("w13: expected dtype float8_e4m3fn, got bfloat16", of("fp8_block", w13=bf16(2, 512, 384))),
    ("w13_scale: expected dtype float32, got bfloat16", of("fp8_block", w13_scale=bf16(2, 4, 3))),
    (
        "w2_scale: expected dtype float32, got float64",
        of("fp8_block", w2_scale=np.ones((2, 3, 2))),
    ),
    ("w2_scale: expected a NumPy or CuPy array .*, got float", of("fp8_block", w2_scale=1.0)),
    ("start: expected an int, got float", call("bf16", "slice_experts", 0.0, 1)),
    ("shard: expected an ExpertShard, got int", call("bf16", "shard", 1)),
    ("expert: expected an int, got str", call("bf16", "dequantize_expert", "0")),
]


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [(ValueError, *row) for row in BAD_VALUES] + [(TypeError, *row) for row in BAD_TYPES],
)
def test_bad_input(error: type[Exception], message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(error, match="^" + message):
        make()


def test_positional_arguments_stop_at_the_arrays() -> None:
    arguments = plain_arrays("fp8_block")
    arrays = [arguments[n] for n in ("w13", "w2", "w13_scale", "w2_scale")]
    with pytest.raises(TypeError):
        ExpertWeights(*arrays, "gate_up")  # type: ignore[call-arg]
    assert ExpertWeights(*arrays, gate_up_order="gate_up").recipe == "fp8_block"


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_device_round_trip_and_methods(rng: np.random.Generator, recipe: Any) -> None:
    """Everything that works on NumPy gives the same bytes on a device."""
    import cupy

    host, _ = build(rng, recipe, 4, 384, 256, "up_gate")
    device = host.to_device()
    assert device.is_device and device.to_device() is device and device.nbytes == host.nbytes
    assert device.w13.dtype == (BF16 if recipe == "bf16" else np.uint8)
    assert_same(device.to_host(), host)
    shard = ExpertShard(1, 1)
    actions: list[Callable[[ExpertWeights], ExpertWeights]] = [
        lambda w: w.convert(layout="block_major_k", gate_up_order="gate_up_interleaved"),
        lambda w: w.slice_experts(1, 3),
        lambda w: w.slice_intermediate(128, 384),
        lambda w: w.convert(layout="block_major_k").slice_intermediate(0, 128),
        lambda w: w.shard(shard, 1),
        lambda w: ExpertWeights.from_flashinfer(
            *(w.w13, w.w2, w.w13_scale, w.w2_scale),
            shuffled=True,
            x_scale=w.x_scale,
            act_scale=w.act_scale,
        ),
    ]
    for action in actions:
        assert_same(action(device).to_host(), action(host))
    for got, want in zip(device.dequantize_expert(2), host.dequantize_expert(2), strict=True):
        assert isinstance(got, cupy.ndarray)
        np.testing.assert_array_equal(got.get(), want)


@pytest.mark.gpu
def test_device_bad_input() -> None:
    import cupy

    host = plain_arrays("bf16")
    with pytest.raises(ValueError, match=r"^w2: expected an array on host like w13, got one on"):
        ExpertWeights(**{**host, "w2": cupy.asarray(host["w2"])})
    buffer = cupy.zeros(2 * 512 * 384 + 1, BF16)
    with pytest.raises(ValueError, match="^w13: expected memory aligned to 16 bytes, got address"):
        ExpertWeights(
            buffer[1:].reshape(2, 512, 384), cupy.asarray(host["w2"]), gate_up_order="gate_up"
        )
