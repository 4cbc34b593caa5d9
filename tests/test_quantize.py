"""Quantisation per token and per tensor, with UE8M0 groups, and nvfp4: each op against a model that
goes number by number, on NumPy and on CuPy."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cumoe
from cumoe import Quantized, QuantizedNVFP4, QuantizedUE8M0
from cumoe.microscaling import GROUP_SIZES, SCALE_LAYOUTS
from cumoe.reference import to_e2m1
from tests.helpers import (
    BF16,
    DTYPES,
    F32,
    FP8,
    Poisoned,
    assert_same_bits,
    each_backend,
    to_backend,
    to_host,
    words,
)

FLOATS = ("bfloat16", "float16", "float32")
FP4 = np.dtype(ml_dtypes.float4_e2m1fn)
SETTINGS = settings(deadline=None, derandomize=True, max_examples=200)
ANY_FLOAT = st.floats(width=32) | st.sampled_from(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 448.0, 1e-45, -1e-40, 1.2e-38, 3.4e38, 6.0, 2688.0]
)


def numbers(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Return numbers of all magnitudes, with zeros and a few that are no numbers."""
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-20, 12, shape))
    x[:, ::5] = 0.0
    x = np.copysign(x, rng.standard_normal(shape)).astype(DTYPES[dtype])
    x[0, 1], x[-1, 2] = np.nan, -np.inf
    return x


def largest(x: Any) -> float:
    """Return the largest magnitude that is a number."""
    return max((abs(float(v)) for v in np.ravel(x) if not math.isnan(v)), default=0.0)


def divided(x: float, scale: float) -> float:
    """Return a quotient rounded once to float32."""
    with np.errstate(all="ignore"):
        return float(F32.type(np.float64(x) / np.float64(scale)))


def e4m3(x: float) -> int:
    """Return the code of a float32 number, saturating."""
    if math.isnan(x):
        return 0x7F
    return int(np.array(min(max(x, -448.0), 448.0), F32).astype(FP8).view(np.uint8))


def e2m1(x: float) -> int:
    """Return the code of a float32 number, saturating; NaN is 6."""
    if math.isnan(x):
        return 7
    return int(np.array(min(max(x, -6.0), 6.0), F32).astype(FP4).view(np.uint8))


def check_fp8(values: np.ndarray, x: np.ndarray, scale: np.ndarray) -> None:
    """Compare codes with those of quotients; `scale` has a number for each of x."""
    want = [
        e4m3(divided(float(v), float(s)))
        for v, s in zip(x.ravel(), np.broadcast_to(scale, x.shape).ravel(), strict=True)
    ]
    assert values.dtype == FP8 and values.shape == x.shape
    assert values.view(np.uint8).ravel().tolist() == want


def floats32(x: float) -> float:
    return float(F32.type(x))


class TestToken:
    @staticmethod
    def check(x: np.ndarray, q: Quantized) -> None:
        q = to_host(q)
        least = floats32(floats32(2.0**-9) / 448.0)
        with np.errstate(all="ignore"):
            scale = [[max(floats32(largest(row) / 448.0), least)] for row in x]
        assert q.block == (1, None) and q.scale.dtype == F32 and q.scale.tolist() == scale
        check_fp8(q.values, x, q.scale)

    @each_backend
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("columns", [8, 264, 2056])
    def test_against_model(self, rng, backend, dtype, columns):
        x = numbers(rng, (5, columns), dtype)
        self.check(x, cumoe.quantize_fp8_token(to_backend(x, backend)))

    @SETTINGS
    @given(hnp.arrays(F32, (2, 8), elements=ANY_FLOAT, fill=ANY_FLOAT))
    def test_any_floats(self, x):
        self.check(x, cumoe.quantize_fp8_token(x))

    @each_backend
    def test_small_rows_have_the_least_scale(self, backend):
        x = np.array([[0.0] * 8, [2.0**-9] * 8, [2.0**-10] * 8], np.float32)
        q = to_host(cumoe.quantize_fp8_token(to_backend(x, backend)))
        assert q.scale.ravel().tolist() == [floats32(2.0**-9 / 448)] * 3
        assert q.values[:, 0].astype(np.float32).tolist() == [0.0, 448.0, 224.0]


class TestTensor:
    @staticmethod
    def check(x: np.ndarray, q: Quantized, scale: float | None = None) -> None:
        q = to_host(q)
        if scale is None:
            with np.errstate(all="ignore"):
                scale = max(floats32(largest(x) / 448.0), float(np.finfo(F32).tiny))
        assert q.block == (None, None) and q.scale.dtype == F32 and q.scale.tolist() == [scale]
        check_fp8(q.values, x, q.scale)

    @each_backend
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("columns", [8, 264, 2056])
    def test_against_model(self, rng, backend, dtype, columns):
        x = numbers(rng, (5, columns), dtype)
        x[-1, 2] = 3
        self.check(x, cumoe.quantize_fp8_tensor(to_backend(x, backend)))

    @each_backend
    @pytest.mark.parametrize("scale", [0.0123, 1e-42, 3e-25, 1e38])
    def test_given(self, rng, backend, scale):
        """A float, or an array, which the result holds as it is."""
        with np.errstate(over="ignore"):
            x = numbers(rng, (5, 72), "float32") * np.float32(scale)
        scale = floats32(scale)
        self.check(x, cumoe.quantize_fp8_tensor(to_backend(x, backend), scale=scale), scale)
        given = to_backend(np.array([scale], F32), backend)
        q = cumoe.quantize_fp8_tensor(to_backend(x, backend), scale=given)
        self.check(x, q, scale)
        assert (
            np.shares_memory(q.scale, given)
            if backend == "numpy"
            else (q.scale.data.ptr == given.data.ptr)
        )

    @SETTINGS
    @given(hnp.arrays(F32, (2, 8), elements=ANY_FLOAT, fill=ANY_FLOAT))
    def test_any_floats(self, x):
        self.check(x, cumoe.quantize_fp8_tensor(x))

    @each_backend
    @pytest.mark.parametrize("given", [None, 0.5, "array"])
    def test_out(self, rng, backend, given):
        x = numbers(rng, (3, 264), "bfloat16")
        values = Poisoned((3, 264), FP8, backend)
        scale = to_backend(np.array([0.5], F32), backend)
        out = Quantized(values.array, scale, block=(None, None))
        kwargs = {"scale": scale if given == "array" else given}
        assert cumoe.quantize_fp8_tensor(to_backend(x, backend), out=out, **kwargs) is out
        values.check_guards()
        want = cumoe.quantize_fp8_tensor(x, scale=None if given is None else 0.5)
        assert_same_bits(to_host(out).values, want.values)
        assert to_host(scale).tolist() == want.scale.tolist()


class TestUE8M0:
    @staticmethod
    def check(x: np.ndarray, q: QuantizedUE8M0, group_size: int) -> None:
        values, scale, size = to_host(q)
        rows, columns = x.shape
        groups = columns // group_size
        assert size == group_size and scale.dtype == np.int32
        assert scale.shape == (rows, -(-groups // 4))
        codes = np.zeros((rows, 4 * scale.shape[1]), np.int64)
        for row, group in np.ndindex(rows, groups):
            part = x[row, group * group_size : (group + 1) * group_size]
            with np.errstate(all="ignore"):
                y = max(floats32(largest(part) / 448.0), floats32(1e-10))
            mantissa, exponent = math.frexp(y)  # y = mantissa * 2 ** exponent, mantissa from 0.5
            codes[row, group] = 255 if math.isinf(y) else 127 + exponent - (mantissa == 0.5)
        shifts = 8 * np.arange(4)
        got = (scale.astype(np.int64)[:, :, None] >> shifts & 255).reshape(codes.shape)
        assert got.tolist() == codes.tolist()
        wide = np.where(codes == 255, np.inf, np.exp2(codes - 127.0))[:, :groups]
        check_fp8(values.view(FP8), x, wide.repeat(group_size, axis=1))

    @each_backend
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("group_size", GROUP_SIZES)
    def test_against_model(self, rng, backend, dtype, group_size):
        x = numbers(rng, (5, 5 * group_size), dtype)
        q = cumoe.quantize_fp8_ue8m0(to_backend(x, backend), group_size=group_size)
        assert q.scale.strides == (4, 4 * 8)
        self.check(x, q, group_size)

    @SETTINGS
    @given(hnp.arrays(F32, (1, 48), elements=ANY_FLOAT, fill=ANY_FLOAT))
    def test_any_floats(self, x):
        self.check(x, cumoe.quantize_fp8_ue8m0(x, group_size=16), 16)

    @each_backend
    def test_example(self, backend):
        """The worked example of the format: 3.7 has the scale 2^-6, byte 121."""
        x = np.full((1, 32), 3.7, np.float32)
        q = to_host(cumoe.quantize_fp8_ue8m0(to_backend(x, backend)))
        assert q.scale.tolist() == [[121]] and q.group_size == 32

    @each_backend
    @pytest.mark.parametrize("rows", [1, 3, 4, 6])
    def test_out_with_words_between_columns(self, rng, backend, rows):
        """Rows that pad a column become zero; behind the last column nothing is written."""
        x = numbers(rng, (rows, 288), "bfloat16")
        padded = -(-rows // 4) * 4
        flat = Poisoned((2 * padded + rows,), "int32", backend)
        if backend == "numpy":
            scale = np.lib.stride_tricks.as_strided(flat.array, (rows, 3), (4, 4 * padded))
        else:
            import cupy

            scale = cupy.lib.stride_tricks.as_strided(flat.array, (rows, 3), (4, 4 * padded))
        values = Poisoned((rows, 288), FP8, backend)
        out = QuantizedUE8M0(values.array, scale, 32)
        assert cumoe.quantize_fp8_ue8m0(to_backend(x, backend), out=out) is out
        values.check_guards()
        flat.check_guards()
        self.check(x, out, 32)
        between = to_host(flat.array)[: 2 * padded].reshape(2, padded)[:, rows:]
        assert not between.any()


class TestNVFP4:
    @staticmethod
    def codes(values: np.ndarray) -> np.ndarray:
        """Return one code an element."""
        return np.stack([values & 15, values >> 4], -1).reshape(values.shape[0], -1)

    @classmethod
    def check(cls, x: np.ndarray, q: QuantizedNVFP4, total: float, layout: str) -> None:
        values, scale, global_scale, got_layout = to_host(q)
        rows, columns = x.shape
        assert got_layout == layout and values.dtype == np.uint8
        assert global_scale.tolist() == [total]
        scale = scale.view(np.uint8)
        tiles = -(-columns // 64)
        padded = (-(-rows // 128) * 128, 4 * tiles) if layout != "linear" else (rows, columns // 16)
        assert scale.shape == padded
        want_scale = np.zeros(scale.size, np.uint8)
        want = np.zeros((rows, columns), np.uint8)
        sixth = floats32(1 / 6)
        for r, c in np.ndindex(rows, columns // 16):
            group = x[r, 16 * c : 16 * c + 16]
            with np.errstate(all="ignore"):
                code = e4m3(floats32(F32.type(total) * F32.type(floats32(largest(group) * sixth))))
                wide = float(np.uint8(code).view(FP8))
                factor = divided(total, wide) if wide else 0.0
                scaled = (F32.type(v) * F32.type(factor) for v in group.astype(F32))
                want[r, 16 * c : 16 * c + 16] = [e2m1(float(v)) for v in scaled]
            at = r * (columns // 16) + c
            if layout != "linear":
                at = (r // 128 * tiles + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
            want_scale[at] = code
        assert scale.ravel().tolist() == want_scale.tolist()
        assert cls.codes(values).tolist() == want.tolist()

    @each_backend
    @pytest.mark.parametrize("layout", SCALE_LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", [(1, 16), (5, 80), (133, 64)])
    def test_against_model(self, rng, backend, dtype, shape, layout):
        x = numbers(rng, shape, dtype)
        given = to_backend(np.array([0.75], F32), backend)
        q = cumoe.quantize_nvfp4(to_backend(x, backend), global_scale=given, layout=layout)
        self.check(x, q, 0.75, layout)
        x[~np.isfinite(x)] = 1
        total = floats32(2688.0 / largest(x))
        self.check(x, cumoe.quantize_nvfp4(to_backend(x, backend), layout=layout), total, layout)

    @SETTINGS
    @given(hnp.arrays(F32, (1, 32), elements=ANY_FLOAT, fill=ANY_FLOAT), st.sampled_from([1, 100]))
    def test_any_floats(self, x, total):
        self.check(x, cumoe.quantize_nvfp4(x, global_scale=float(total)), float(total), "linear")

    @each_backend
    @pytest.mark.parametrize("value", [0.0, 1e-40, 3e38, np.inf])
    def test_its_own_scale_is_a_number(self, backend, value):
        """Of zeros, tiny numbers and infinities too."""
        x = np.zeros((2, 32), np.float32)
        x[1, 5] = value
        q = cumoe.quantize_nvfp4(to_backend(x, backend))
        total = float(to_host(q).global_scale[0])
        assert np.finfo(F32).tiny <= total <= np.finfo(F32).max
        self.check(x, q, total, "linear")

    def test_every_code_comes_back(self):
        codes = np.arange(16, dtype=np.uint8)
        x = codes.view(FP4).astype(F32)
        assert to_e2m1(x).tolist() == codes.tolist()
        q = cumoe.quantize_nvfp4(x[None], global_scale=448.0)
        assert (q.scale == 448).all() and self.codes(q.values)[0].tolist() == codes.tolist()
        np.testing.assert_array_equal(cumoe.dequantize(q)[0], x)

    def test_ties_go_to_the_even_code(self):
        ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], F32)
        assert to_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
        assert to_e2m1(np.nextafter(ties, F32.type(9))).tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert to_e2m1(-np.nextafter(ties, F32.type(0))).tolist() == [8, 9, 10, 11, 12, 13, 14]

    def test_rounding_matches_ml_dtypes(self, rng):
        x = rng.integers(0, 1 << 32, 300_000, dtype=np.uint32).view(F32)
        x = np.concatenate([x, rng.standard_normal(300_000, F32) * 3])
        x = x[~np.isnan(x)]
        want = np.clip(x, -6, 6).astype(FP4).view(np.uint8)
        np.testing.assert_array_equal(to_e2m1(x), want)

    @each_backend
    @pytest.mark.parametrize("layout", SCALE_LAYOUTS)
    def test_out(self, rng, backend, layout):
        """Padding of the scales is written, nothing else past the arrays is."""
        x = numbers(rng, (130, 80), "bfloat16")
        want = cumoe.quantize_nvfp4(x, global_scale=2.0, layout=layout)
        values = Poisoned((130, 40), "uint8", backend)
        scale = Poisoned(want.scale.shape, FP8, backend)
        total = Poisoned((1,), F32, backend)
        out = QuantizedNVFP4(values.array, scale.array, total.array, layout)
        x = to_backend(x, backend)
        assert cumoe.quantize_nvfp4(x, global_scale=2.0, layout=layout, out=out) is out
        for output, expected in ((values, want.values), (scale, want.scale)):
            output.check_guards()
            np.testing.assert_array_equal(words(to_host(output.array)), words(expected))
        total.check_guards()

    @each_backend
    def test_error(self, rng, backend):
        """Half a step of e2m1 and of its scale: a quarter of the magnitude or of the smallest."""
        x = rng.standard_normal((64, 256), np.float32)
        back = to_host(cumoe.dequantize(cumoe.quantize_nvfp4(to_backend(x, backend))))
        group = np.abs(x).reshape(64, -1, 16).max(2).repeat(16, axis=1)
        bound = np.maximum(np.abs(x) / 4, group / 24) * (1 + 2.0**-4)
        assert (np.abs(back - x) <= bound).all()
        assert np.sqrt(np.mean((back - x) ** 2)) < 0.12


@each_backend
@pytest.mark.parametrize("rows", [0, 3])
def test_dequantize(rng, backend, rows):
    """``values * scale`` element by element, on either side."""
    x = rng.standard_normal((rows, 256), np.float32)
    native = to_backend(x, backend)
    for quantize, kwargs in (
        (cumoe.quantize_fp8_token, {}),
        (cumoe.quantize_fp8_tensor, {}),
        (cumoe.quantize_fp8_ue8m0, {"group_size": 128}),
        (cumoe.quantize_nvfp4, {}),
        (cumoe.quantize_nvfp4, {"layout": "swizzled_128x4"}),
    ):
        back = to_host(cumoe.dequantize(quantize(native, **kwargs)))
        assert back.shape == x.shape and back.dtype == F32
        np.testing.assert_array_equal(back, cumoe.dequantize(quantize(x, **kwargs)))
        assert (np.abs(back - x) <= 0.27 * np.abs(x) + 0.27).all()
    token = cumoe.quantize_fp8_token(x)
    np.testing.assert_array_equal(cumoe.dequantize(token), token.values.astype(F32) * token.scale)


@each_backend
@pytest.mark.parametrize("shape", [(0, 256), (3, 0)])
def test_empty(backend, shape):
    x = to_backend(np.empty(shape, BF16), backend)
    token, tensor = cumoe.quantize_fp8_token(x), cumoe.quantize_fp8_tensor(x)
    assert token.values.shape == tensor.values.shape == shape
    assert to_host(token).scale.tolist() == [[floats32(2.0**-9 / 448)]] * shape[0]
    assert to_host(tensor).scale.tolist() == [float(np.finfo(F32).tiny)]
    assert cumoe.quantize_fp8_ue8m0(x).values.shape == shape
    fp4 = cumoe.quantize_nvfp4(x)
    assert fp4.values.shape == (shape[0], shape[1] // 2)
    assert to_host(fp4.global_scale).tolist() == [float(np.finfo(F32).max)]
