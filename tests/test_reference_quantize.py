"""Quantisation twin: a scalar model of fp8 rounding, special values, error bounds, round trips."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cumoe.config import Quantized
from cumoe.reference import (
    dequantize,
    quantize_fp8_block,
    quantize_fp8_block_weights,
    round_bf16,
    to_e4m3,
)

F32, FP8 = np.float32, np.dtype(ml_dtypes.float8_e4m3fn)
INPUTS = [np.dtype(F32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
FLT_MIN = F32(1.17549435e-38)
SETTINGS = settings(deadline=None, derandomize=True, max_examples=200)


def e4m3_value(byte: int) -> float:
    """Decode one byte: sign, 4 exponent bits of bias 7, 3 mantissa bits, no infinity."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e4m3_byte(v: float) -> int:
    """Encode by exact float64 arithmetic: nearest, ties to even, saturating; NaN is 0x7F."""
    if math.isnan(v):
        return 0x7F
    sign = 0x80 if math.copysign(1.0, v) < 0 else 0
    v = abs(v)
    if v >= 448:
        return sign | 0x7E
    exponent = max(math.frexp(v)[1] - 1, -6) if v else -6
    steps = round(v / 2.0 ** (exponent - 3))  # Python rounds half to even; the division is exact
    return sign | min((exponent + 6) * 8 + steps, 0x7E)


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8 if x.dtype == FP8 else np.uint32)


def block_model(block: np.ndarray) -> tuple[np.float32, list[int]]:
    """Quantise one block number by number; float64 quotients rounded once are float32 quotients."""
    x = [float(v) for v in block.astype(F32).ravel()]
    amax = max((abs(v) for v in x if not math.isnan(v)), default=0.0)
    with np.errstate(under="ignore", over="ignore", invalid="ignore"):
        scale = max(F32(amax / 448.0), FLT_MIN)
        return scale, [e4m3_byte(float(F32(np.float64(v) / np.float64(scale)))) for v in x]


def check_bits(q: Quantized, x: np.ndarray) -> None:
    """Compare all scales and bytes of activations with the scalar model."""
    num_rows, num_columns = x.shape
    assert q.values.dtype == FP8 and q.values.shape == x.shape
    assert q.scale.dtype == F32 and q.scale.shape == (num_rows, -(-num_columns // 128))
    assert q.block == (1, 128)
    for row in range(num_rows):
        for start in range(0, num_columns, 128):
            scale, values = block_model(x[row, start : start + 128])
            got = q.scale[row, start // 128]
            assert got.tobytes() == scale.tobytes(), (row, start, got, scale)
            assert bits(q.values)[row, start : start + 128].tolist() == values, (row, start)


# --- rounding ----------------------------------------------------------------------------------


def test_e4m3_decodes_every_byte() -> None:
    want = np.array([e4m3_value(b) for b in range(256)])
    got = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float64)
    np.testing.assert_array_equal(got, want)


def test_e4m3_rounds_to_nearest_even_around_every_midpoint() -> None:
    codes = np.array([e4m3_value(b) for b in range(0x7F)])
    # 464 is the midpoint to 480, the value that the NaN pattern would have.
    marks = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, [464.0, 480.0, 1e9]]).astype(F32)
    near = np.concatenate(
        [marks, np.nextafter(marks, F32(np.inf)), np.nextafter(marks, F32(-np.inf))]
    )
    # Just past a midpoint by less than bfloat16 or float16 resolves: no rounding twice.
    x = np.concatenate([near, -near, marks * F32(1 + 2.0**-20), marks * F32(1 - 2.0**-20)])
    assert bits(to_e4m3(x)).tolist() == [e4m3_byte(float(v)) for v in x]


@SETTINGS
@given(hnp.arrays(F32, 64, elements=st.floats(width=32) | st.floats(-500, 500, width=32)))
def test_e4m3_matches_the_scalar_model(x: np.ndarray) -> None:
    assert bits(to_e4m3(x)).tolist() == [e4m3_byte(float(v)) for v in x]


def test_e4m3_special_values() -> None:
    nan = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(F32)
    assert bits(to_e4m3(nan)).tolist() == [0x7F] * 4
    x = np.array([0.0, -0.0, np.inf, -np.inf, 3e38, -449, 2.0**-10, -(2.0**-10), 1e-45], F32)
    want = [0x00, 0x80, 0x7E, 0xFE, 0x7E, 0xFE, 0x00, 0x80, 0x00]
    assert bits(to_e4m3(x)).tolist() == want


def test_bf16_rounds_to_nearest_even() -> None:
    x = np.array([1, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-23, 3.4e38, -0.0], F32)
    want = np.array([1, 1, 1 + 2.0**-6, 1 + 2.0**-7, np.inf, -0.0], F32)
    got = round_bf16(x)
    assert got.dtype == F32
    np.testing.assert_array_equal(bits(got), bits(want))


# --- activations -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("hidden_size", [1, 5, 127, 128, 129, 256, 704])
def test_activations_match_the_scalar_model(
    hidden_size: int, dtype: np.dtype, rng: np.random.Generator
) -> None:
    magnitude = 10.0 ** rng.uniform(-4, 4, (6, 1))
    x = (rng.standard_normal((6, hidden_size)) * magnitude).astype(dtype)
    x[:, ::7] *= dtype.type(0.001)
    before = x.copy()
    check_bits(quantize_fp8_block(x), x)
    assert x.tobytes() == before.tobytes()


ANY_FLOAT = st.floats(width=32) | st.sampled_from(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 448.0, 1e-45, -1e-40, 1.2e-38, 3.4e38, 5.2e-36]
)


@SETTINGS
@given(hnp.arrays(F32, (2, 130), elements=ANY_FLOAT, fill=ANY_FLOAT))
def test_any_floats_match_the_scalar_model(x: np.ndarray) -> None:
    check_bits(quantize_fp8_block(x), x)


def test_zero_block_has_the_least_scale() -> None:
    x = np.zeros((1, 384), F32)
    x[0, 128:256] = -0.0
    x[0, 300] = 448.0
    q = quantize_fp8_block(x)
    assert q.scale.tolist() == [[float(FLT_MIN), float(FLT_MIN), 1.0]]
    assert bits(q.values)[0].tolist() == [0] * 128 + [0x80] * 128 + [0] * 44 + [0x7E] + [0] * 83


def test_nan_and_infinity_stay_in_their_block() -> None:
    x = np.ones((1, 512), F32)
    x[0, 3] = -np.nan
    x[0, 128:256] = np.nan
    x[0, 256:260] = [np.inf, -np.inf, -5.0, np.nan]
    q = quantize_fp8_block(x)
    one = e4m3_byte(448.0)
    assert bits(q.values)[0].tolist() == (
        [one] * 3 + [0x7F] + [one] * 124
        + [0x7F] * 128
        + [0x7F, 0x7F, 0x80, 0x7F] + [0x00] * 124
        + [one] * 128
    )  # fmt: skip
    unit = F32(1) / F32(448)
    assert q.scale.tolist() == [[unit, FLT_MIN, np.inf, unit]]


def test_division_is_by_the_rounded_scale() -> None:
    """Neither a multiplication by 448 / amax nor a reciprocal gives the same bytes and scales."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4096, 128)).astype(F32)
    q = quantize_fp8_block(x)
    amax = np.abs(x).max(axis=1, keepdims=True)
    assert (q.scale != amax * F32(1 / 448)).any() and (q.scale == amax / F32(448)).all()
    # Midpoints of e4m3 times the scale, where one float32 ulp of the quotient decides.
    middle = np.array([(e4m3_value(b) + e4m3_value(b + 1)) / 2 for b in range(126)], F32)
    x = np.concatenate([middle * q.scale, amax, amax], axis=1).astype(F32)
    exact = quantize_fp8_block(x)
    multiplied = to_e4m3(x * (F32(448) / amax))
    assert (bits(exact.values) != bits(multiplied)).any()
    check_bits(Quantized(exact.values[:50], exact.scale[:50]), x[:50])


@pytest.mark.parametrize("num_tokens", [0, 1, 257])
def test_shapes_and_strides(num_tokens: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((num_tokens, 2880)).astype(ml_dtypes.bfloat16)
    q = quantize_fp8_block(x)
    assert q.values.shape == x.shape and q.scale.shape == (num_tokens, 23)
    assert q.values.flags.c_contiguous and q.scale.flags.c_contiguous
    for other in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x.astype(F32)):
        again = quantize_fp8_block(other)
        np.testing.assert_array_equal(bits(q.values), bits(again.values))
        np.testing.assert_array_equal(q.scale, again.scale)
    column_major = Quantized(q.values, np.asfortranarray(q.scale))
    np.testing.assert_array_equal(dequantize(q), dequantize(column_major))


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize(
    "shape", [(1, 128, 128), (2, 130, 257), (3, 64, 5), (1, 1, 1), (2, 300, 384)]
)
def test_weights_match_the_scalar_model(
    shape: tuple[int, int, int], dtype: np.dtype, rng: np.random.Generator
) -> None:
    w = (rng.standard_normal(shape) * 0.02).astype(dtype)
    w[..., :2] *= dtype.type(30)
    q = quantize_fp8_block_weights(w)
    num_experts, n, k = shape
    assert q.values.dtype == FP8 and q.values.shape == shape and q.block == (128, 128)
    assert q.scale.dtype == F32 and q.scale.shape == (num_experts, -(-n // 128), -(-k // 128))
    for e, row, column in np.ndindex(*q.scale.shape):
        block = np.s_[e, row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
        scale, values = block_model(w[block])
        assert q.scale[e, row, column] == scale
        assert bits(q.values[block]).ravel().tolist() == values


def test_weight_blocks_are_independent() -> None:
    """A zero block, one with NaN, one with an infinity, one plain: no scale leaks."""
    w = np.ones((1, 256, 256), F32)
    w[0, :128, 128:] = 0
    w[0, 200, 5] = np.nan
    w[0, 201, 5] = -2  # the largest of its block, in the column of the NaN
    w[0, 130, 130] = -np.inf
    q = quantize_fp8_block_weights(w)
    unit = F32(1) / F32(448)
    assert q.scale.tolist() == [[[unit, FLT_MIN], [2 * unit, np.inf]]]
    want = np.full((256, 256), e4m3_byte(448.0))
    want[128:, :128] = e4m3_byte(224.0)
    want[:128, 128:] = want[128:, 128:] = 0
    want[201, 5] = e4m3_byte(-448.0)
    want[200, 5] = want[130, 130] = 0x7F
    np.testing.assert_array_equal(bits(q.values)[0], want)


def test_weights_are_not_copied_to_float32() -> None:
    w = np.zeros((16, 256, 1024), np.float16)
    quantize_fp8_block_weights(w[:1])
    tracemalloc.start()
    quantize_fp8_block_weights(w)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    strip_bytes = 128 * 1024 * 4
    assert peak_bytes < w.size + 5 * strip_bytes < w.size * 4


@pytest.mark.parametrize("shape", [(0, 128, 128), (2, 0, 128), (2, 128, 0)])
def test_empty_weights(shape: tuple[int, int, int]) -> None:
    q = quantize_fp8_block_weights(np.empty(shape, F32))
    assert q.values.shape == shape
    assert q.scale.shape == (shape[0], -(-shape[1] // 128), -(-shape[2] // 128))
    assert dequantize(q).shape == shape


# --- back again --------------------------------------------------------------------------------


def error_bound(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Half a step: 2^-4 relative for normals, 2^-10 of the scale below; and two fp32 roundings."""
    return np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)


@pytest.mark.parametrize("dtype", INPUTS)
@SETTINGS
@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 0.02, 1.0, 300.0]))
def test_error_of_each_element(dtype: np.dtype, size: int, seed: int, magnitude: float) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((4, size)) * rng.random((4, size)) ** 8 * magnitude).astype(dtype)
    wide = x.astype(np.float64)
    q = quantize_fp8_block(x)
    back = dequantize(q)
    assert back.dtype == F32
    scale = np.repeat(q.scale, 128, axis=1)[:, :size].astype(np.float64)
    assert (np.abs(back - wide) <= error_bound(wide, scale)).all()
    weights = quantize_fp8_block_weights(x[None])
    scale = np.repeat(weights.scale[0], 128, axis=1)[:, :size].astype(np.float64)
    assert (np.abs(dequantize(weights)[0] - wide) <= error_bound(wide, scale)).all()


@pytest.mark.parametrize("exponent", [-120, -9, 0, 13, 100])
def test_every_value_round_trips(exponent: int) -> None:
    """All 254 finite bytes under a scale that is a power of two come back as themselves."""
    byte = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    rows = np.stack([byte[:127], byte[127:]])
    x = np.ldexp(rows.view(FP8).astype(F32), exponent)
    for q in (quantize_fp8_block(x), quantize_fp8_block_weights(x[None])):
        assert (q.scale == F32(2.0**exponent)).all()
        np.testing.assert_array_equal(bits(q.values).reshape(rows.shape), rows)
        np.testing.assert_array_equal(bits(dequantize(q)).reshape(x.shape), bits(x))


@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_dequantize_uses_each_blocks_scale(block: Any, rng: np.random.Generator) -> None:
    shape = (3, 130) if block == (1, 128) else (2, 130, 257)
    values = rng.integers(0, 0x7F, shape).astype(np.uint8).view(FP8)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // 128))
    scale = rng.uniform(0.5, 2, grid).astype(F32)
    back = dequantize(Quantized(values, scale, block=block))
    for index in np.ndindex(*shape):
        row, column = index[-2:]
        of_block = scale[(*index[:-2], row // block[0], column // 128)]
        assert back[index] == F32(e4m3_value(int(bits(values)[index]))) * of_block
