"""Weight layouts and row orders: definitions, golden lists, exact inverses, in-place use."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumoe import layouts
from cumoe.layouts import GATE_UP_ORDERS

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = [FP8, np.dtype(np.uint8), BF16, np.dtype(np.float16), np.dtype(np.float32)]
SIZES = [(2, 96, 384), (3, 32, 1408), (2, 64, 2880), (1, 352, 704), (2, 2880, 128), (1, 1408, 128)]
BACKENDS = ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)]
ORDER_PAIRS = list(itertools.product(GATE_UP_ORDERS, repeat=2))
Put = Callable[[np.ndarray], Any]


@pytest.fixture(params=BACKENDS)
def put(request: pytest.FixtureRequest) -> Put:
    """Hand a NumPy array to the backend under test; fp8 becomes uint8 on a device."""
    if request.param == "numpy":
        return lambda x: x
    import cupy

    return lambda x: cupy.asarray(x.view(np.uint8) if x.dtype == FP8 else x)


def get(x: Any, dtype: np.dtype) -> np.ndarray:
    """Bring an array back as NumPy integers, once its dtype is what it should be."""
    if not isinstance(x, np.ndarray):
        assert x.dtype == (np.uint8 if dtype == FP8 else dtype)
        x = x.get()
    else:
        assert x.dtype == dtype
    assert x.flags.c_contiguous
    return bits(x)


def bits(x: np.ndarray) -> np.ndarray:
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return random bits, so NaN, infinities and subnormals are among the values."""
    count = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(count), dtype=np.uint8).view(dtype).reshape(shape).copy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_block_major_k_by_definition_and_back(
    put: Put, rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype
) -> None:
    w = draw(rng, shape, dtype)
    bk = 128 // dtype.itemsize
    if shape[2] % bk:
        with pytest.raises(ValueError, match=rf"^w: expected k to be a multiple of {bk} .* got"):
            layouts.to_block_major_k(put(w))
        return
    blocked = layouts.to_block_major_k(put(w))
    want = np.empty((shape[0], shape[2] // bk, shape[1], bk), bits(w).dtype)
    for block in range(shape[2] // bk):
        want[:, block] = bits(w)[:, :, block * bk : (block + 1) * bk]
    np.testing.assert_array_equal(get(blocked, dtype), want)
    np.testing.assert_array_equal(get(layouts.to_major_k(blocked), dtype), bits(w))


@pytest.mark.parametrize("blocked", [False, True], ids=["major_k", "block_major_k"])
@pytest.mark.parametrize("epilogue_tile_m", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shuffle_moves_each_row_where_the_formula_says_and_back(
    put: Put, rng: np.random.Generator, dtype: np.dtype, epilogue_tile_m: int, blocked: bool
) -> None:
    w = draw(rng, (2, 192, 128), dtype)
    block = 32 if epilogue_tile_m in (128, 256) else 16
    step = block // 8
    want = np.empty_like(bits(w))
    for old in range(192):
        base, q = old // block * block, old % block
        want[:, base + q % step * 8 + q // step] = bits(w)[:, old]
    x = layouts.to_block_major_k(put(w)) if blocked else put(w)
    before = get(x, dtype).copy()
    shuffled = layouts.shuffle_rows(x, epilogue_tile_m)
    plain = layouts.to_major_k(shuffled) if blocked else shuffled
    np.testing.assert_array_equal(get(plain, dtype), want)
    undone = layouts.unshuffle_rows(shuffled, epilogue_tile_m)
    np.testing.assert_array_equal(get(undone, dtype), before)
    np.testing.assert_array_equal(get(x, dtype), before)


def test_golden_row_lists() -> None:
    sixteen = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
    thirty_two = [*range(0, 29, 4), *range(1, 30, 4), *range(2, 31, 4), *range(3, 32, 4)]
    assert layouts.row_shuffle_indices(16, 64).tolist() == sixteen
    assert layouts.row_shuffle_indices(32, 64).tolist() == [*sixteen, *(16 + i for i in sixteen)]
    assert layouts.row_shuffle_indices(32, 128).tolist() == thirty_two
    interleave = layouts.gate_up_indices(8, "up_gate", "up_gate_interleaved")
    assert interleave.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("num_rows", [2, 6, 64, 1408, 5760])
@pytest.mark.parametrize(("source", "target"), ORDER_PAIRS)
def test_gate_up_orders_by_name(source: Any, target: Any, num_rows: int) -> None:
    """Row labels tell gate from up: each order is built by its definition, then converted."""
    half = num_rows // 2
    gate, up = np.arange(half), 10_000 + np.arange(half)
    labels = {
        "gate_up": np.concatenate([gate, up]),
        "up_gate": np.concatenate([up, gate]),
        "gate_up_interleaved": np.stack([gate, up], axis=1).ravel(),
        "up_gate_interleaved": np.stack([up, gate], axis=1).ravel(),
    }
    indices = layouts.gate_up_indices(num_rows, source, target)
    np.testing.assert_array_equal(labels[source][indices], labels[target])
    back = layouts.gate_up_indices(num_rows, target, source)
    np.testing.assert_array_equal(indices[back], np.arange(num_rows))
    np.testing.assert_array_equal(layouts.inverse(indices), back)


@pytest.mark.parametrize("blocked", [False, True], ids=["major_k", "block_major_k"])
@pytest.mark.parametrize(("source", "target"), ORDER_PAIRS)
def test_convert_gate_up_order_moves_rows(
    put: Put, rng: np.random.Generator, source: Any, target: Any, blocked: bool
) -> None:
    w13 = draw(rng, (2, 2 * 88, 256), BF16)
    x = layouts.to_block_major_k(put(w13)) if blocked else put(w13)
    converted = layouts.convert_gate_up_order(x, source, target)
    plain = layouts.to_major_k(converted) if blocked else converted
    rows = layouts.gate_up_indices(2 * 88, source, target)
    np.testing.assert_array_equal(get(plain, BF16), bits(w13)[:, rows])
    back = layouts.convert_gate_up_order(converted, target, source)
    np.testing.assert_array_equal(get(back, BF16), get(x, BF16))


@pytest.mark.parametrize(("source", "target"), ORDER_PAIRS)
def test_gate_up_scale_halves_change_places_with_the_first_name(
    put: Put, source: Any, target: Any
) -> None:
    gate = np.arange(2 * 6 * 5, dtype=np.float32).reshape(2, 6, 5)
    halves = {"g": [gate, -gate - 1], "u": [-gate - 1, gate]}
    of, to = (np.concatenate(halves[order[0]], axis=1) for order in (source, target))
    converted = layouts.convert_gate_up_scale(put(of), source, target)
    np.testing.assert_array_equal(get(converted, np.dtype(np.float32)), bits(to))


@pytest.mark.parametrize("order", GATE_UP_ORDERS)
@pytest.mark.parametrize(("recipe", "tile"), [("bf16", 128), ("fp8_tensor", 128)])
def test_flashinfer_w13_is_interleave_of_shuffle(
    put: Put, rng: np.random.Generator, recipe: str, tile: int, order: Any
) -> None:
    """The combined gather list is ``interleave[shuffle]`` on rows with up first."""
    dtype = BF16 if recipe == "bf16" else FP8
    up_gate = draw(rng, (2, 2 * 704, 128), dtype)
    interleave = np.stack([np.arange(704), 704 + np.arange(704)], axis=1).ravel()
    perm = interleave[layouts.row_shuffle_indices(2 * 704, tile)]
    want = bits(up_gate)[:, perm]
    plain = layouts.convert_gate_up_order(put(up_gate), "up_gate", order)
    prepared = layouts.to_flashinfer_w13(plain, recipe, order)
    np.testing.assert_array_equal(get(prepared, dtype), want)
    back = layouts.from_flashinfer_w13(prepared, recipe, order)
    np.testing.assert_array_equal(get(back, dtype), get(plain, dtype))
    blocked = layouts.to_flashinfer_w13(layouts.to_block_major_k(plain), recipe, order)
    np.testing.assert_array_equal(get(layouts.to_major_k(blocked), dtype), want)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("interleaved", [None, False, True])
def test_flashinfer_fp8_block_has_no_interleave_of_its_own(
    put: Put, rng: np.random.Generator, interleaved: bool | None, shuffled: bool
) -> None:
    up_gate = draw(rng, (2, 2 * 128, 256), FP8)
    perm = np.arange(256)
    if interleaved:
        perm = perm.reshape(2, 128).T.ravel()
    if shuffled:
        perm = perm[layouts.row_shuffle_indices(256, 64)]
    options: Any = {"shuffled": shuffled, "interleaved": interleaved}
    prepared = layouts.to_flashinfer_w13(put(up_gate), "fp8_block", "up_gate", **options)
    np.testing.assert_array_equal(get(prepared, FP8), bits(up_gate)[:, perm])
    back = layouts.from_flashinfer_w13(prepared, "fp8_block", "up_gate", **options)
    np.testing.assert_array_equal(get(back, FP8), bits(up_gate))


@pytest.mark.parametrize(("recipe", "tile"), [("bf16", 128), ("fp8_block", 64)])
def test_flashinfer_w2_is_shuffled_only(
    put: Put, rng: np.random.Generator, recipe: str, tile: int
) -> None:
    w2 = draw(rng, (2, 2880, 128), BF16)
    prepared = layouts.to_flashinfer_w2(put(w2), recipe)
    want = bits(w2)[:, layouts.row_shuffle_indices(2880, tile)]
    np.testing.assert_array_equal(get(prepared, BF16), want)
    np.testing.assert_array_equal(get(layouts.from_flashinfer_w2(prepared, recipe), BF16), bits(w2))


CONVERSIONS: dict[str, Callable[..., Any]] = {
    "to_block_major_k": layouts.to_block_major_k,
    "shuffle_rows": lambda w, out: layouts.shuffle_rows(w, 128, out=out),
    "unshuffle_rows": lambda w, out: layouts.unshuffle_rows(w, 64, out=out),
    "convert_gate_up_order": lambda w, out: layouts.convert_gate_up_order(
        w, "gate_up", "up_gate_interleaved", out=out
    ),
    "to_flashinfer_w13": lambda w, out: layouts.to_flashinfer_w13(w, "bf16", "gate_up", out=out),
    "same_layout": lambda w, out: layouts.rearrange(w, out=out),
}


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_receives_the_result_and_may_be_the_input(
    put: Put, rng: np.random.Generator, dtype: np.dtype, name: str
) -> None:
    convert = CONVERSIONS[name]
    w = draw(rng, (3, 64, 256), dtype)
    want = get(convert(put(w), out=None), dtype)
    poisoned = put(np.full(want.shape, 0xA5, bits(w).dtype).view(dtype))
    result = convert(put(w), out=poisoned)
    np.testing.assert_array_equal(get(result, dtype), want)
    np.testing.assert_array_equal(get(poisoned, dtype), want)
    x = put(w.copy())
    convert(x, out=x.reshape(want.shape))
    np.testing.assert_array_equal(get(x, dtype).ravel(), want.ravel())


def test_strided_input_is_read_in_place_of_a_copy(put: Put, rng: np.random.Generator) -> None:
    wide = draw(rng, (4, 96, 512), BF16)
    part = wide[1::2, :64, 128:384]
    x = put(wide)[1::2, :64, 128:384]
    bk = 64
    want = bits(np.ascontiguousarray(part)).reshape(2, 64, 4, bk).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(get(layouts.to_block_major_k(x), BF16), want)
    shuffle = layouts.row_shuffle_indices(64, 128)
    np.testing.assert_array_equal(
        get(layouts.shuffle_rows(x, 128), BF16), bits(np.ascontiguousarray(part[:, shuffle]))
    )


@pytest.mark.parametrize("shape", [(0, 64, 256), (2, 0, 256)], ids=str)
def test_nothing_to_convert(put: Put, shape: tuple[int, ...]) -> None:
    w = put(np.zeros(shape, BF16))
    blocked = layouts.to_block_major_k(w)
    assert blocked.shape == (shape[0], 4, shape[1], 64)
    assert layouts.to_major_k(blocked).shape == shape
    assert layouts.shuffle_rows(w, 128).shape == shape


def test_temporary_memory_is_one_expert(rng: np.random.Generator) -> None:
    w = draw(rng, (32, 256, 512), BF16)
    expert_bytes = w[0].nbytes
    for name, convert in CONVERSIONS.items():
        out = w.reshape(32, 8, 256, 64) if name == "to_block_major_k" else w
        tracemalloc.start()
        convert(w, out=out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.5 * expert_bytes, name


W = np.zeros((2, 64, 256), BF16)
BUFFER = np.zeros((3, 64, 256), BF16)
READ_ONLY = np.zeros((2, 64, 256), BF16)
READ_ONLY.flags.writeable = False
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no array": (lambda: layouts.to_block_major_k([[1.0]]), TypeError, "w: expected a NumPy"),
    "dtype": (
        lambda: layouts.shuffle_rows(W.astype(np.float64), 64),
        TypeError,
        "w: expected dtype .*, got float64",
    ),
    "rank": (
        lambda: layouts.shuffle_rows(W[0], 64),
        ValueError,
        r"w: expected \(num_experts, m, k\) or .*, got shape \(64, 256\)",
    ),
    "block bytes": (
        lambda: layouts.shuffle_rows(np.zeros((2, 2, 64, 128), BF16), 64),
        ValueError,
        "w: expected blocks of 128 bytes, 64 elements of bfloat16, got 128",
    ),
    "blocked already": (
        lambda: layouts.to_block_major_k(np.zeros((2, 4, 64, 64), BF16)),
        ValueError,
        r"w: expected shape \(num_experts, m, k\), got \(2, 4, 64, 64\)",
    ),
    "plain already": (
        lambda: layouts.to_major_k(W),
        ValueError,
        r"w: expected shape \(num_experts, k / bk, m, bk\), got \(2, 64, 256\)",
    ),
    "ragged k": (
        lambda: layouts.to_block_major_k(np.zeros((1, 4, 704), FP8)),
        ValueError,
        r"w: expected k to be a multiple of 128 \(128 bytes of float8_e4m3fn\) .*, got 704",
    ),
    "ragged rows, 16": (
        lambda: layouts.shuffle_rows(np.zeros((1, 40, 64), BF16), 64),
        ValueError,
        "w: expected a multiple of 16 rows with epilogue_tile_m = 64, got 40",
    ),
    "ragged rows, 32": (
        lambda: layouts.row_shuffle_indices(48, 128),
        ValueError,
        "num_rows: expected a multiple of 32 rows with epilogue_tile_m = 128, got 48",
    ),
    "tile of 0": (
        lambda: layouts.unshuffle_rows(W, 0),
        ValueError,
        "epilogue_tile_m: expected >= 1, got 0",
    ),
    "tile not an int": (
        lambda: layouts.shuffle_rows(W, 64.0),  # type: ignore[arg-type]
        TypeError,
        "epilogue_tile_m: expected an int, got float",
    ),
    "odd rows": (
        lambda: layouts.convert_gate_up_order(W[:, :63], "gate_up", "up_gate"),
        ValueError,
        "w13: expected an even number of gate and up rows, got 63",
    ),
    "unknown source": (
        lambda: layouts.convert_gate_up_order(W, "w1w3", "up_gate"),  # type: ignore[arg-type]
        ValueError,
        "source: expected one of .*, got 'w1w3'",
    ),
    "unknown target": (
        lambda: layouts.convert_gate_up_scale(
            np.zeros((1, 2, 2), np.float32),
            "gate_up",
            "interleaved",  # type: ignore[arg-type]
        ),
        ValueError,
        "target: expected one of .*, got 'interleaved'",
    ),
    "odd scale rows": (
        lambda: layouts.convert_gate_up_scale(
            np.zeros((1, 11, 2), np.float32), "gate_up", "up_gate"
        ),
        ValueError,
        "w13_scale: expected an even number of gate and up rows, got 11",
    ),
    "scale dtype": (
        lambda: layouts.convert_gate_up_scale(W, "gate_up", "up_gate"),
        TypeError,
        "w13_scale: expected dtype float32, got bfloat16",
    ),
    "unknown recipe": (
        lambda: layouts.to_flashinfer_w13(W, "nvfp4", "gate_up"),
        ValueError,
        "recipe: expected one of .*, got 'nvfp4'",
    ),
    "unknown recipe of w2": (
        lambda: layouts.from_flashinfer_w2(W, "nvfp4"),
        ValueError,
        "recipe: expected one of .*, got 'nvfp4'",
    ),
    "unknown layout": (
        lambda: layouts.rearrange(W, layout="major_mn"),  # type: ignore[arg-type]
        ValueError,
        "layout: expected one of .*, got 'major_mn'",
    ),
    "out shape": (
        lambda: layouts.to_block_major_k(W, out=np.zeros((2, 64, 256), BF16)),
        ValueError,
        r"out: expected shape \(2, 4, 64, 64\), got \(2, 64, 256\)",
    ),
    "out dtype": (
        lambda: layouts.shuffle_rows(W, 64, out=np.zeros(W.shape, np.float16)),
        TypeError,
        "out: expected dtype bfloat16, got float16",
    ),
    "out strides": (
        lambda: layouts.shuffle_rows(W, 64, out=np.zeros((2, 64, 512), BF16)[:, :, ::2]),
        ValueError,
        "out: expected a C-contiguous array",
    ),
    "out read-only": (
        lambda: layouts.shuffle_rows(W, 64, out=READ_ONLY),
        ValueError,
        "out: expected a writable array, got a read-only one",
    ),
    "out overlaps": (
        lambda: layouts.shuffle_rows(BUFFER[:2], 64, out=BUFFER[1:]),
        ValueError,
        "out: expected memory of its own or exactly that of w, got a part",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match="^" + message):
        call()
    assert not bits(W).any() and not bits(BUFFER).any()
