"""Weights from expert matrices: rounding, placement, memory, and what is refused."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cumoe
from cumoe.layouts import GATE_UP_ORDERS, WEIGHT_LAYOUTS
from cumoe.weights import ExpertWeights
from tests.weight_matrices import (
    BF16,
    F32,
    FORMS,
    RECIPES,
    Foreign,
    assert_holds,
    assert_same,
    build,
    draw,
    quantize,
    static_scales,
)


@pytest.mark.parametrize(
    ("size", "hidden_size"),
    [(256, 384), (704, 256), (1408, 128), (2880, 144), (144, 2880), (16, 16)],
)
def test_fp8_block_equals_an_independent_quantiser(
    rng: np.random.Generator, size: int, hidden_size: int
) -> None:
    """Each half of w13 has its own block grid, so gate's last block never mixes with up."""
    gate, up, down = draw(rng, 2, size, hidden_size)
    weights: Any = ExpertWeights.from_experts(gate, up, down)
    blocks = -(-size // 128)
    assert weights.w13_scale.shape == (2, 2 * blocks, -(-hidden_size // 128))
    assert weights.w2_scale.shape == (2, -(-hidden_size // 128), blocks)
    for e in range(2):
        places = {
            "gate": (gate, weights.w13[e, :size], weights.w13_scale[e, :blocks]),
            "up": (up, weights.w13[e, size:], weights.w13_scale[e, blocks:]),
            "down": (down, weights.w2[e], weights.w2_scale[e]),
        }
        for name, (matrix, values, scale) in places.items():
            codes, scale_want = quantize(matrix[e])
            np.testing.assert_array_equal(values.view(np.uint8), codes, err_msg=name)
            np.testing.assert_array_equal(scale, scale_want, err_msg=name)


@pytest.mark.parametrize(("size", "hidden_size"), [(256, 384), (704, 256), (160, 2880)])
def test_fp8_block_error_is_bounded_in_every_block(
    rng: np.random.Generator, size: int, hidden_size: int
) -> None:
    """Half an e4m3 step: 2^-4 of a normal number, 2^-10 of the scale below; amax is met exactly."""
    weights, matrices = build(rng, "fp8_block", 2, size, hidden_size)
    for e in range(2):
        for got, matrix in zip(weights.dequantize_expert(e), matrices, strict=True):
            x = matrix[e].astype(np.float64)
            for i, j in np.ndindex(-(-len(x) // 128), -(-x.shape[1] // 128)):
                block = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                amax = np.abs(x[block]).max()
                bound = np.maximum(np.abs(x[block]) * 2.0**-4, amax / 448 * 2.0**-10)
                assert (np.abs(got[block] - x[block]) <= bound * (1 + 1e-6)).all()
                assert abs(np.abs(got[block]).max() - amax) <= 1e-6 * amax


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_without_a_gate(rng: np.random.Generator, recipe: Any, layout: Any) -> None:
    """w13 holds the up rows alone: those of the gated weights, from both ways to build them."""
    gate, up, down = draw(rng, 5, 256, 384)
    options: dict[str, Any] = {"recipe": recipe, "layout": layout, **static_scales(recipe)}
    gated = ExpertWeights.from_experts(gate, up, down, **options)
    weights = ExpertWeights.from_experts(None, up, down, gate_up_order="up", **options)
    assert not weights.gated and gated.gated
    assert (weights.intermediate_size, weights.hidden_size) == (256, 384)
    assert weights.nbytes < gated.nbytes
    for e in range(5):
        none, *got = weights.dequantize_expert(e)
        assert none is None
        for a, b in zip(got, gated.dequantize_expert(e)[1:], strict=True):
            np.testing.assert_array_equal(a, b)
    lazy = ExpertWeights.from_experts(
        None, iter(up), iter(down), gate_up_order="up", num_experts=5, **options
    )
    assert_same(lazy, weights)
    other = {"major_k": "block_major_k", "block_major_k": "major_k"}[layout]
    changed = weights.convert(layout=other)  # type: ignore[arg-type]
    want = ExpertWeights.from_experts(
        None, up, down, **{**options, "gate_up_order": "up", "layout": other}
    )
    assert_same(changed, want)
    half = weights.slice_intermediate(128, 256)
    np.testing.assert_array_equal(
        half.dequantize_expert(2)[1], weights.dequantize_expert(2)[1][128:]
    )
    shard = weights.shard(cumoe.ExpertShard(1, 2), num_shared_experts=1)
    np.testing.assert_array_equal(shard.dequantize_expert(2)[1], weights.dequantize_expert(4)[1])


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), F32], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_source_dtypes(rng: np.random.Generator, recipe: Any, dtype: np.dtype) -> None:
    matrices = draw(rng, 2, 48, 160, dtype)
    weights = ExpertWeights.from_experts(*matrices, recipe=recipe, **static_scales(recipe))
    assert_holds(weights, matrices)


@pytest.mark.parametrize(("order", "layout"), FORMS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_form_holds_the_same_matrices(
    rng: np.random.Generator, recipe: str, order: str, layout: str
) -> None:
    """Gate, up and down are unlike each other, so a confusion of any two shows."""
    weights, matrices = build(rng, recipe, 2, 256, 384, order, layout)
    assert weights.gate_up_order == order and weights.layout == layout
    assert_holds(weights, matrices)


@pytest.mark.parametrize("order", GATE_UP_ORDERS)
def test_rows_are_where_the_order_says(order: Any) -> None:
    """With gate rows 0, 1, ... and up rows 100, 101, ... w13 spells the order out."""
    gate = np.repeat(np.arange(8, dtype=np.float32)[:, None], 16, axis=1)[None]
    down = np.zeros((1, 16, 8), np.float32)
    weights = ExpertWeights.from_experts(gate, gate + 100, down, recipe="bf16", gate_up_order=order)
    g, u = range(8), range(100, 108)
    want = {
        "gate_up": [*g, *u],
        "up_gate": [*u, *g],
        "gate_up_interleaved": [x for pair in zip(g, u, strict=True) for x in pair],
        "up_gate_interleaved": [x for pair in zip(u, g, strict=True) for x in pair],
    }
    assert weights.w13[0, :, 0].astype(int).tolist() == want[order]


def test_strided_matrices(rng: np.random.Generator) -> None:
    """A checkpoint's transposed matrix needs no copy of the layer."""
    gate, up, down = draw(rng, 2, 96, 160)
    want = ExpertWeights.from_experts(gate, up, down)
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (gate, up, down)]
    assert_same(ExpertWeights.from_experts(*turned), want)


@pytest.mark.parametrize("recipe", RECIPES)
def test_sequences_and_iterators(rng: np.random.Generator, recipe: Any) -> None:
    gate, up, down = draw(rng, 3, 48, 160)
    options: dict[str, Any] = {"recipe": recipe, **static_scales(recipe)}
    want = ExpertWeights.from_experts(gate, up, down, **options)
    lists = [list(x) for x in (gate, up, down)]
    assert_same(ExpertWeights.from_experts(*lists, **options), want)
    streams = [iter(x) for x in lists]
    assert_same(ExpertWeights.from_experts(*streams, **options, num_experts=3), want)
    mixed = ExpertWeights.from_experts(gate, tuple(up), iter(lists[2]), **options)
    assert_same(mixed, want)


@pytest.mark.parametrize("recipe", RECIPES)
def test_iterators_keep_one_matrix_alive(rng: np.random.Generator, recipe: Any) -> None:
    loaded: list[weakref.ref[np.ndarray]] = []
    asked: list[str] = []

    def load(name: str, shape: tuple[int, int]) -> Iterator[np.ndarray]:
        for _ in range(4):
            assert not any(ref() is not None for ref in loaded), "an earlier matrix is still held"
            matrix = rng.standard_normal(shape, dtype=np.float32)
            loaded.append(weakref.ref(matrix))
            asked.append(name)
            handed = [matrix]
            del matrix
            yield handed.pop()

    ExpertWeights.from_experts(
        load("gate", (32, 48)),
        load("up", (32, 48)),
        load("down", (48, 32)),
        recipe=recipe,
        num_experts=4,
        **static_scales(recipe),
    )
    assert asked == ["gate", "up", "down"] * 4


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_memory_is_the_result_and_a_few_matrices(recipe: Any, layout: Any) -> None:
    """Peak memory stays at one copy of the layer: a second one would be 24 matrices more."""
    num_experts, size, hidden_size = 24, 256, 512
    matrix_bytes = 4 * size * hidden_size

    def load(shape: tuple[int, int]) -> Iterator[np.ndarray]:
        for e in range(num_experts):
            yield np.full(shape, e + 1, np.float32)

    arguments: dict[str, Any] = {
        "recipe": recipe,
        "layout": layout,
        "gate_up_order": "up_gate_interleaved",
        "num_experts": num_experts,
        **static_scales(recipe),
    }
    shapes = [(size, hidden_size), (size, hidden_size), (hidden_size, size)]
    tracemalloc.start()
    weights = ExpertWeights.from_experts(*map(load, shapes), **arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < weights.nbytes + 5 * matrix_bytes
    assert 5 * matrix_bytes < 0.3 * weights.nbytes


def test_matrices_of_other_libraries(rng: np.random.Generator) -> None:
    gate, up, down = draw(rng, 2, 64, 128)
    want = ExpertWeights.from_experts(gate, up, down)
    assert_same(ExpertWeights.from_experts(Foreign(gate), Foreign(up), Foreign(down)), want)
    lists = [[Foreign(m) for m in x] for x in (gate, up, down)]
    assert_same(ExpertWeights.from_experts(*lists), want)


G, D = np.zeros((2, 64, 128), np.float32), np.zeros((2, 128, 64), np.float32)
ONE = G[0]


def from_experts(*matrices: Any, **options: Any) -> Callable[[], Any]:
    return lambda: ExpertWeights.from_experts(*matrices, **options)


def of_sizes(size: int, hidden_size: int, **options: Any) -> Callable[[], Any]:
    gate = np.zeros((1, size, hidden_size), np.float32)
    return from_experts(gate, gate, gate.swapaxes(1, 2), **options)


BAD_VALUES: list[tuple[str, Callable[[], Any]]] = [
    ("recipe: expected one of .*, got 'fp8'", from_experts(G, G, D, recipe="fp8")),
    ("x_scale: expected a static scale .*, got None", from_experts(G, G, D, recipe="fp8_tensor")),
    (
        "act_scale: expected None with recipe 'fp8_block', got a scale",
        from_experts(G, G, D, act_scale=1.0),
    ),
    ("layout: expected one of .*, got 'k_major'", from_experts(G, G, D, layout="k_major")),
    (
        "gate: expected None with gate_up_order 'up', got ",
        from_experts(G, G, D, gate_up_order="up"),
    ),
    ("gate_up_order: expected one of .*, got None", from_experts(G, G, D, gate_up_order=None)),
    (r"up\[0\]: expected shape \(64, 128\), got \(64, 64\)", from_experts(G, G[:, :, :64], D)),
    (r"down\[0\]: expected shape \(128, 64\), got \(64, 128\)", from_experts(G, G, G)),
    (
        r"gate\[1\]: expected shape \(64, 128\), got \(32, 128\)",
        from_experts([ONE, ONE[:32]], G, D),
    ),
    ("down: expected 2 experts like gate, got 1", from_experts(G, G, D[:1])),
    ("gate: expected 3 experts like num_experts, got 2", from_experts(G, G, D, num_experts=3)),
    (r"num_experts: expected in \[1, 2080\], got 0", from_experts(G, G, D, num_experts=0)),
    (
        "num_experts: expected an int, since gate, up and down are iterators .*, got None",
        from_experts(iter(G), iter(G), iter(D)),
    ),
    ("up: expected 2 matrices, got 1", from_experts(iter(G), iter([ONE]), D)),
    ("up: expected 1 matrices, got more", from_experts(G[:1], iter(G), D[:1])),
    (r"gate: expected in \[1, 2080\], got 0", from_experts([], [], [])),
    (r"gate: expected 3 dimensions, got 2 \(shape \(64, 128\)\)", from_experts(ONE, G, D)),
    (r"down\[0\]: expected 2 dimensions, got 1", from_experts(G, G, [ONE[0], ONE[0]])),
    (
        "intermediate_size: expected a positive multiple of 16 .*, got 72; zero padding to 80",
        of_sizes(72, 128),
    ),
    (
        "hidden_size: expected a positive multiple of 8 .*, got 100",
        of_sizes(64, 100, recipe="bf16"),
    ),
    ("hidden_size: expected a positive multiple of 16 .*, got 0", of_sizes(64, 0)),
    (
        r"intermediate_size: .* multiple of 128 \(128 bytes of float8_e4m3fn with .*, got 192",
        of_sizes(192, 128, layout="block_major_k"),
    ),
]

BAD_TYPES: list[tuple[str, Callable[[], Any]]] = [
    (
        "gate: expected dtype bfloat16 or float16 or float32, got float64",
        from_experts(G.astype(np.float64), G, D),
    ),
    (
        r"up\[1\]: expected dtype bfloat16 or float16 or float32, got int64",
        from_experts(G, [ONE, ONE.astype(int)], D),
    ),
    ("up: expected a stacked array or an iterable of matrices, got int", from_experts(G, 7, D)),
    (r"up\[0\]: expected a NumPy or CuPy array .*, got float", from_experts(G, [1.0, 2.0], D)),
    ("num_experts: expected an int, got float", from_experts(G, G, D, num_experts=2.0)),
    ("recipe: expected one of .*, got NoneType", from_experts(G, G, D, recipe=None)),
]


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [(ValueError, *row) for row in BAD_VALUES] + [(TypeError, *row) for row in BAD_TYPES],
)
def test_bad_input(error: type[Exception], message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(error, match="^" + message):
        make()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), F32], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("size", "hidden_size"), [(704, 256), (128, 2880)])
def test_device_from_experts_equals_the_host(
    rng: np.random.Generator, size: int, hidden_size: int, recipe: Any, dtype: np.dtype
) -> None:
    import cupy

    matrices = draw(rng, 2, size, hidden_size, dtype)
    options: dict[str, Any] = {"recipe": recipe, "gate_up_order": "gate_up_interleaved"}
    options |= static_scales(recipe)
    want = ExpertWeights.from_experts(*matrices, **options)
    on_device = [cupy.asarray(x) for x in matrices]
    assert_same(ExpertWeights.from_experts(*on_device, **options).to_host(), want)
    streams = [map(cupy.asarray, x) for x in matrices]
    assert_same(ExpertWeights.from_experts(*streams, **options, num_experts=2).to_host(), want)


@pytest.mark.gpu
def test_device_and_host_matrices_do_not_mix() -> None:
    import cupy

    with pytest.raises(ValueError, match=r"^up\[0\]: expected an array on cuda:0 like gate\[0\]"):
        ExpertWeights.from_experts(cupy.asarray(G), G, D)
