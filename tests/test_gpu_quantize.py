"""The quantisers and finalize on a GPU against their twins, to the bit: real sizes, all rows of a
unit, poisoned outputs, more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cumoe
from cumoe import Quantized, QuantizedNVFP4, QuantizedUE8M0
from cumoe.microscaling import GROUP_SIZES, SCALE_LAYOUTS
from tests.helpers import BF16, DTYPES, FP8, Poisoned, to_backend, to_host, words

pytestmark = pytest.mark.gpu

FLOATS = ("bfloat16", "float16", "float32")
HUGE = (1 << 19, 1 << 13)
"""Rows and columns of 2^32 elements."""

FORMATS: dict[str, Callable[[Any], Any]] = {
    "block": cumoe.quantize_fp8_block,
    "token": cumoe.quantize_fp8_token,
    "tensor": cumoe.quantize_fp8_tensor,
    "tensor, given": lambda x: cumoe.quantize_fp8_tensor(x, scale=0.0123),
    **{
        f"ue8m0 {size}": lambda x, size=size: cumoe.quantize_fp8_ue8m0(x, group_size=size)
        for size in GROUP_SIZES
    },
    **{
        f"nvfp4 {name}": lambda x, name=name: cumoe.quantize_nvfp4(x, layout=name)
        for name in SCALE_LAYOUTS
    },
    "nvfp4, given": lambda x: cumoe.quantize_nvfp4(x, global_scale=3.0),
}


def values(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Draw numbers of all magnitudes, among them halves of steps, zeros and NaN."""
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-20, 14, shape[-1]))
    x[:, 1::3] = rng.integers(-448, 449, x[:, 1::3].shape) * 0.25
    x[:, 2::16] = rng.integers(-24, 25, x[:, 2::16].shape) * 0.25
    x = x.astype(DTYPES[dtype])
    x[1::5, 7], x[2::5, 4:] = np.nan, 0
    return x


def parts(q: Any) -> dict[str, Any]:
    """Return the arrays of a quantised array on the host, as unsigned integers."""
    fields = q._asdict() if isinstance(q, tuple) else {"values": q.values, "scale": q.scale}
    arrays = {name: to_host(a) for name, a in fields.items() if hasattr(a, "shape")}
    return {name: words(np.ascontiguousarray(a)) for name, a in arrays.items()}


def check(got: Any, want: Any) -> None:
    expected = parts(want)
    for name, array in parts(got).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", FORMATS)
def test_same_bits_as_twin(rng, name, dtype):
    quantize = FORMATS[name]
    for rows, columns in ((1, 128), (17, 384), (33, 7168), (129, 2944), (700, 4096)):
        x = values(rng, (rows, columns), dtype)
        check(quantize(to_backend(x, "cupy")), quantize(x))


@pytest.mark.parametrize("name", FORMATS)
def test_large(rng, name):
    """Enough rows for units of several; twice, with the same bits."""
    quantize = FORMATS[name]
    x = values(rng, (5003, 3072), "bfloat16")
    native = to_backend(x, "cupy")
    got = quantize(native)
    check(got, quantize(x))
    check(quantize(native), got)


@pytest.mark.parametrize("columns", [8, 136, 720, 2880, 7168, 16384, 70000])
def test_tokens_of_every_width(rng, columns):
    x = values(rng, (9, columns), "bfloat16")
    out = Quantized(
        Poisoned((9, columns), FP8, "cupy").array,
        Poisoned((9, 1), np.float32, "cupy").array,
        block=(1, None),
    )
    check(cumoe.quantize_fp8_token(to_backend(x, "cupy"), out=out), cumoe.quantize_fp8_token(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block", "token", "tensor, given", "ue8m0 128", "nvfp4, given"])
def test_past_two_to_the_32(rng, name):
    """The first and the last rows of an array of 2^32 elements."""
    import cupy

    few = 24
    x = cupy.zeros(HUGE, np.uint16).view(BF16)
    edges = values(rng, (2 * few, HUGE[1]), "bfloat16")
    x[:few], x[-few:] = to_backend(edges[:few], "cupy"), to_backend(edges[few:], "cupy")
    got, want = FORMATS[name](x), FORMATS[name](edges)
    np.testing.assert_array_equal(
        np.concatenate([to_host(got.values[:few]), to_host(got.values[-few:])]),
        words(want.values),
    )
    if want.scale.shape[0] == 2 * few:
        scale = np.concatenate([to_host(got.scale[:few]), to_host(got.scale[-few:])])
        np.testing.assert_array_equal(scale.view(want.scale.dtype), want.scale)


@pytest.mark.slow
def test_finalize_past_two_to_the_32(rng):
    import cupy

    rows = cupy.full(HUGE, 0x7FFF, np.uint16).view(BF16)  # NaN
    held = np.array([0, (1 << 18) - 1, 1 << 18, (1 << 18) + 77, HUGE[0] - 1], np.int32)
    numbers = rng.standard_normal((held.size, HUGE[1]), np.float32).astype(BF16)
    for row, number in zip(held, numbers, strict=True):
        rows[int(row)] = to_backend(number, "cupy")
    slots = rng.integers(-1, held.size, (40, 9)).astype(np.int32)
    index = np.where(slots < 0, -1, held[slots]).astype(np.int32)
    weights = rng.standard_normal(slots.shape, np.float32)
    got = cumoe.finalize(rows, to_backend(weights, "cupy"), to_backend(index, "cupy"))
    want = cumoe.finalize(numbers, weights, slots)
    np.testing.assert_array_equal(words(to_host(got)), words(want))


def test_a_graph_captures_the_given_forms(rng):
    """With outputs and scales given nothing is allocated, so a capture holds them."""
    import cupy

    x = values(rng, (64, 2048), "bfloat16")
    native, scale = to_backend(x, "cupy"), to_backend(np.array([0.5], np.float32), "cupy")
    tensor = Quantized(cupy.zeros((64, 2048), np.uint8), scale, block=(None, None))
    fp4 = QuantizedNVFP4(
        cupy.zeros((64, 1024), np.uint8), cupy.zeros((64, 128), np.uint8), scale, "linear"
    )
    groups = QuantizedUE8M0(cupy.zeros((64, 2048), np.uint8), cupy.zeros((16, 64), np.int32).T, 32)

    def run() -> None:
        cumoe.quantize_fp8_tensor(native, scale=scale, out=tensor)
        cumoe.quantize_nvfp4(native, global_scale=scale, out=fp4)
        cumoe.quantize_fp8_ue8m0(native, out=groups)

    run()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        run()
        graph = stream.end_capture()
    for array in (tensor.values, fp4.values, groups.values):
        array.fill(0)
    cupy.cuda.get_current_stream().synchronize()
    graph.launch(stream)
    stream.synchronize()
    check(tensor, cumoe.quantize_fp8_tensor(x, scale=0.5))
    check(fp4, cumoe.quantize_nvfp4(x, global_scale=0.5))
    check(groups, cumoe.quantize_fp8_ue8m0(x))
