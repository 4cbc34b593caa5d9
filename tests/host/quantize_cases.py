"""The cases of the quantisation kernels: to the bit, with every number of rows a unit can have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cumoe import kernels, kernels_quantize
from cumoe.arrays import DTYPES, FP8
from cumoe.config import Array
from cumoe.microscaling import FP4_GROUP, fp4_scale_shape, ue8m0_words
from cumoe.reference import microscaling, quantize
from tests.host.checks import BF16, F16, F32, Case, Host, same_bits, virtual

Fill = Callable[[Host, Sequence[int], str], np.ndarray]


def _wild(host: Host, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return numbers of many magnitudes with zeros, NaN and infinity."""
    x = host.rng.standard_normal(shape) * np.exp2(host.rng.integers(-12, 8, shape))
    flat = x.reshape(-1)
    flat[:: max(flat.size // 40, 7)] = 0.0
    flat[-1] = -0.0
    if flat.size > 300:
        flat[40], flat[300] = np.nan, np.inf
        flat[41], flat[700 % flat.size] = -np.nan, -np.inf
    return host.arena.array(x.astype(DTYPES[dtype]))


def _finite(host: Host, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return numbers of many magnitudes, with zeros of both signs."""
    x = host.rng.standard_normal(shape) * np.exp2(host.rng.integers(-12, 8, shape))
    x[..., ::7] = 0.0
    return host.arena.array(np.copysign(x, host.rng.standard_normal(shape)).astype(DTYPES[dtype]))


def _extreme(host: Host, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return rows of all magnitudes from 2^-149 to 2^127, and a row of zeros."""
    x = host.rng.standard_normal(shape)
    exponents = np.linspace(-149, 124, shape[0] * (shape[1] // 16)).repeat(16)
    x *= np.exp2(np.resize(host.rng.permutation(exponents), shape))
    x[shape[0] // 2] = 0.0
    with np.errstate(all="ignore"):
        return host.arena.array(x.astype(DTYPES[dtype]))


def _scaled(exponent: int) -> Fill:
    """Make numbers near the ends of float32 with a few of any magnitude."""

    def fill(host: Host, shape: Sequence[int], dtype: str) -> np.ndarray:
        x = host.rng.standard_normal(shape) * np.exp2(host.rng.integers(-20, 1, shape))
        with np.errstate(all="ignore"):
            return host.arena.array((x * np.exp2(float(exponent))).astype(DTYPES[dtype]))

    return fill


def _e4m3_ties(host: Host, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return numbers at and beside the midpoints of e4m3, for a scale of 1.3 * 2^n in each row."""
    codes = np.arange(0x7F, dtype=np.uint8).view(DTYPES[FP8]).astype(np.float32)
    middle = (codes[1:] + codes[:-1]) / 2
    scale = np.float32(1.3) * np.exp2(host.rng.integers(-14, 30, (shape[0], 1)), dtype="f4")
    near = (host.rng.choice(middle, shape) * scale).view(np.int32)
    near += host.rng.integers(-1, 2, shape).astype(np.int32)
    x = near.view(np.float32)
    x[:, ::16] = scale * np.float32(448)
    return host.arena.array(x.astype(DTYPES[dtype]))


def _e4m3_ties_of_one(host: Host, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return such numbers for the matrix of one expert."""
    return _e4m3_ties(host, shape[1:], dtype)[None]


def _zeros(host: Host, shape: Sequence[int], dtype: str) -> np.ndarray:
    return host.arena.array(np.zeros(shape, DTYPES[dtype]))


def _e2m1_ties(host: Host, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return numbers at and beside the thresholds of e2m1, in groups with a 6 or more."""
    marks = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.75, 2.5, 3, 3.5, 4, 5, 6], np.float32)
    near = host.rng.choice(marks, shape).view(np.int32)
    near += host.rng.integers(-1, 2, shape).astype(np.int32) * (near != 0)
    x = np.copysign(near.view(np.float32), host.rng.standard_normal(shape).astype(np.float32))
    groups = x.reshape(-1, FP4_GROUP)
    groups[:, 0] = 6.0
    groups[1::3, 0] = host.rng.choice(np.array([6.5, 6.999, 7.0, 9.0]), len(groups[1::3]))
    groups *= np.exp2(host.rng.integers(-3, 4, (len(groups), 1)), dtype=np.float32)
    return host.arena.array(x.astype(DTYPES[dtype]))


def _rows(x: Array) -> Iterator[int]:
    """Yield the rows that a unit can have for an input."""
    yield from (1, kernels_quantize.UNIT_ROWS[x.dtype.itemsize])


def _permuted_idx(host: Host, num_rows: int, slots: int) -> tuple[Array, int]:
    """Return rows for two thirds of the slots, none for the others, and how many rows there are."""
    held = num_rows * slots
    index = host.rng.permutation(held + 5)[:held].reshape(num_rows, slots).astype(np.int32)
    index[host.rng.random(index.shape) < 1 / 3] = -1
    return host.arena.array(index), held + 5


def _quantize_permuted(slots: int, dtype: str, columns: int) -> Callable[[Host], None]:
    """Rows go to those of a permutation, which has others too."""

    def check(host: Host) -> None:
        x = _wild(host, (7, columns), dtype)
        index, num_rows = _permuted_idx(host, 7, slots)
        values = host.empty((num_rows, columns), FP8)
        scale = host.empty((num_rows, kernels.blocks(columns)), F32)
        want_values, want_scale = values.copy(), scale.copy()
        expected = quantize.quantize_fp8_block(x)
        for row, to in enumerate(index):
            want_values[to[to >= 0]] = expected.values[row]
            want_scale[to[to >= 0]] = expected.scale[row]
        host.run(kernels_quantize.quantize_fp8_block(x, values, scale, index))
        same_bits("scale", scale, want_scale)
        same_bits("values", values, want_values)

    return check


def _quantize(
    shape: tuple[int, int], dtype: str, column_major: bool = False, fill: Fill = _wild
) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        x = fill(host, shape, dtype)
        expected = quantize.quantize_fp8_block(x)
        rows, columns = shape[0], kernels.blocks(shape[1])
        values = host.empty(shape, FP8)
        scale = host.empty((columns, rows) if column_major else (rows, columns), F32)
        scale = scale.T if column_major else scale
        host.run(kernels_quantize.quantize_fp8_block(x, values, scale))
        same_bits("scale", scale, expected.scale)
        same_bits("values", values, expected.values)

    return check


def _quantize_weights(shape: tuple[int, int, int], dtype: str, fill: Fill = _wild) -> Any:
    def check(host: Host) -> None:
        w = fill(host, shape, dtype)
        values = host.empty(shape, FP8)
        scale = host.empty((shape[0], kernels.blocks(shape[1]), kernels.blocks(shape[2])), F32)
        host.run(kernels_quantize.quantize_fp8_weights(w, values, scale))
        expected = quantize.quantize_fp8_block_weights(w)
        same_bits("scale", scale, expected.scale)
        same_bits("values", values, expected.values)

    return check


def _quantize_token(shape: tuple[int, int], dtype: str, fill: Fill = _wild) -> Any:
    def check(host: Host) -> None:
        x = fill(host, shape, dtype)
        values, scale = host.empty(shape, FP8), host.empty((shape[0], 1), F32)
        host.run(kernels_quantize.quantize_fp8_token(x, values, scale))
        expected = quantize.quantize_fp8_token(x)
        same_bits("scale", scale, expected.scale)
        same_bits("values", values, expected.values)

    return check


def _quantize_tensor_permuted(slots: int, dtype: str, columns: int) -> Callable[[Host], None]:
    """Rows go to those of a permutation, as in `_quantize_permuted`, by a given scale."""

    def check(host: Host) -> None:
        x = _wild(host, (7, columns), dtype)
        index, num_rows = _permuted_idx(host, 7, slots)
        values = host.empty((num_rows, columns), FP8)
        scale = host.arena.array(np.full(1, 0.02, F32))
        want = values.copy()
        for row, to in enumerate(index):
            want[to[to >= 0]] = quantize.quantize_fp8_tensor(x, scale).values[row]
        host.run(kernels_quantize.quantize_fp8_tensor(x, values, scale, None, index))
        same_bits("values", values, want)

    return check


def _quantize_tensor(
    shape: tuple[int, int],
    dtype: str,
    fill: Fill = _finite,
    *,
    scale: float | None = None,
    num_partials: int = 3,
) -> Callable[[Host], None]:
    """Compare with the twin; a given scale, or the maxima of `num_partials` blocks."""

    def check(host: Host) -> None:
        x = fill(host, shape, dtype)
        given = None if scale is None else host.arena.array(np.array([scale], np.float32))
        expected = quantize.quantize_fp8_tensor(x, given)
        if given is None:
            partials = host.empty((num_partials,), F32)
            host.run(kernels_quantize.tensor_amax(x, partials))
            partials[...] = np.roll(partials, -1)
        for count in _rows(x):
            values = host.empty(shape, FP8)
            if given is not None:
                launch = kernels_quantize.quantize_fp8_tensor(x, values, given, None, rows=count)
                host.run(launch)
                assert given[0] == np.float32(scale), "the given scale was written"
            else:
                got = host.empty((1,), F32)
                launch = kernels_quantize.quantize_fp8_tensor(x, values, got, partials, rows=count)
                host.run(launch)
                same_bits("scale", got, expected.scale)
            same_bits("values", values, expected.values)

    return check


def _tensor_amax(shape: tuple[int, int], dtype: str, num_partials: int) -> Any:
    def check(host: Host) -> None:
        x = _wild(host, shape, dtype)
        for position in (0, x.size // 2 + 3, x.size - 1, min(511 * 8 + 3, x.size - 1)):
            again = host.arena.array(x.copy())
            again[np.isinf(again)] = 0
            again.reshape(-1)[position] = -60000.0
            partials = host.empty((num_partials,), F32)
            host.run(kernels_quantize.tensor_amax(again, partials))
            expected = quantize.tensor_amax(again.astype(np.float32))
            same_bits("amax", partials.max(keepdims=True), expected)
            assert (partials >= 0).all(), "a part was not written"

    return check


def _quantize_ue8m0(
    shape: tuple[int, int], dtype: str, group_size: int, fill: Fill = _wild
) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        x = fill(host, shape, dtype)
        expected = microscaling.quantize_fp8_ue8m0(x, group_size)
        num_words, stride = ue8m0_words(shape, group_size)
        values = host.empty(shape, FP8)
        # As long as an array of these strides is: the last column has no padding.
        flat = host.empty(((num_words - 1) * stride + shape[0],), "int32")
        words = np.lib.stride_tricks.as_strided(flat, (shape[0], num_words), (4, 4 * stride))
        host.run(kernels_quantize.quantize_fp8_ue8m0(x, values, words, group_size))
        same_bits("scale", words, expected.scale)
        same_bits("values", values, expected.values)
        between = np.ones(flat.size, bool)
        for word in range(num_words):
            between[word * stride : word * stride + shape[0]] = False
        assert not flat[between].any(), "the words between two columns are not zero"

    return check


def _quantize_nvfp4(
    shape: tuple[int, int],
    dtype: str,
    layout: Any,
    fill: Fill = _wild,
    *,
    global_scale: float | None = 3.0,
    num_partials: int = 3,
) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        x = fill(host, shape, dtype)
        given = None
        if global_scale is not None:
            given = host.arena.array(np.array([global_scale], np.float32))
        expected = microscaling.quantize_nvfp4(x, given, layout)
        for count in _rows(x):
            values = host.empty((shape[0], shape[1] // 2), "uint8")
            scale = host.empty(fp4_scale_shape(shape, layout), FP8)
            if given is not None:
                launch = kernels_quantize.quantize_nvfp4(
                    x, values, scale, given, None, layout, rows=count
                )
                host.run(launch)
                assert given[0] == np.float32(global_scale), "the given scale was written"
            else:
                got, partials = host.empty((1,), F32), host.empty((num_partials,), F32)
                host.run(
                    kernels_quantize.tensor_amax(x, partials),
                    kernels_quantize.quantize_nvfp4(
                        x, values, scale, got, partials, layout, rows=count
                    ),
                )
                same_bits("global scale", got, expected.global_scale)
            same_bits("scale", scale, expected.scale)
            same_bits("values", values, expected.values)

    return check


FAR = (5, 1 << 30)
"""Rows and columns of arrays whose last row begins at element 2^32."""


def _far(host: Host, visited: int) -> tuple[Array, Array, np.ndarray]:
    """Return x, values, and the first columns of x, the only ones with numbers."""
    small = host.normal((FAR[0], visited), BF16)
    x = virtual(FAR, BF16)
    x[:, :visited] = small
    return x, virtual(FAR, FP8), small


def _run_first(host: Host, launch: kernels.Launch, **changes: int) -> None:
    """Run a launch's first blocks, as if its rows were short; they keep their distance."""
    for name, value in changes.items():
        launch.params[name] = value
    launch.config = kernels.replace(launch.config, grid=(FAR[0], 1, 1))
    host.run(launch)


def _far_block(host: Host) -> None:
    x, values, small = _far(host, 128)
    scale = host.empty((FAR[0], 1), F32)
    _run_first(host, kernels_quantize.quantize_fp8_block(x, values, scale), num_blocks=1)
    expected = quantize.quantize_fp8_block(small)
    same_bits("scale", scale, expected.scale)
    same_bits("values", values[:, :128], expected.values)


def _far_tensor(host: Host) -> None:
    """Rows of a permutation whose bytes begin past 2^31 and past 2^32."""
    held = np.array([[0, (1 << 20) + 3], [(1 << 21) + 5, (1 << 21) - 1]], np.int32)
    values, scale = virtual(((1 << 21) + 6, 1 << 11), FP8), host.arena.array(np.full(1, 0.02, F32))
    x = host.normal((2, 1 << 11), BF16)
    index = host.arena.array(held)
    host.run(kernels_quantize.quantize_fp8_tensor(x, values, scale, None, index))
    expected = quantize.quantize_fp8_tensor(x, scale).values
    for row, to in enumerate(held):
        same_bits("values", values[to], expected[[row, row]])


def _far_token(host: Host) -> None:
    x, values, small = _far(host, 65536)
    scale = host.empty((FAR[0], 1), F32)
    _run_first(host, kernels_quantize.quantize_fp8_token(x, values, scale), num_pieces=1)
    expected = quantize.quantize_fp8_token(small)
    same_bits("scale", scale, expected.scale)
    same_bits("values", values[:, :65536], expected.values)


def _far_ue8m0(host: Host) -> None:
    x, values, small = _far(host, 512)
    words = host.empty((8, 1), "int32")
    launch = kernels_quantize.quantize_fp8_ue8m0(x, values, words, 128)
    _run_first(host, launch, num_words=1)
    expected = microscaling.quantize_fp8_ue8m0(small, 128)
    same_bits("scale", words[: FAR[0]], expected.scale)
    same_bits("values", values[:, :512], expected.values)


def _far_nvfp4(host: Host) -> None:
    x, values, small = _far(host, 128)
    scale, one = host.empty((FAR[0], 8), FP8), host.arena.array(np.ones(1, np.float32))
    packed = values.view(np.uint8).reshape(-1)[: FAR[0] << 29].reshape(FAR[0], -1)
    launch = kernels_quantize.quantize_nvfp4(x, packed, scale, one, None, "linear", rows=1)
    _run_first(host, launch, scale_groups=8)
    expected = microscaling.quantize_nvfp4(small, one)
    same_bits("scale", scale, expected.scale)
    same_bits("values", packed[:, :64], expected.values)


QUANTIZE_CASES: dict[str, list[Case]] = {
    "quantize_fp8_block": [
        Case("one row", _quantize((1, 8), BF16)),
        Case("tails", _quantize((5, 264), F32)),
        Case("extreme", _quantize((9, 392), F32, fill=_extreme)),
        Case("ties", _quantize((12, 256), F32, fill=_e4m3_ties)),
        Case("column-major scales", _quantize((19, 392), BF16, True)),
        Case("float16", _quantize((3, 128), F16)),
        Case("permuted", _quantize_permuted(3, BF16, 400)),
        Case("permuted, one slot, tails", _quantize_permuted(1, F32, 136)),
        Case("offsets past 2^32", _far_block),
    ],
    "quantize_fp8_weights": [
        Case("tails", _quantize_weights((2, 200, 136), BF16)),
        Case("one row", _quantize_weights((1, 1, 8), F32)),
        Case("float16", _quantize_weights((1, 128, 264), F16)),
        Case("ties", _quantize_weights((1, 130, 256), F32, _e4m3_ties_of_one)),
    ],
    "quantize_fp8_token": [
        Case("one row", _quantize_token((1, 8), BF16)),
        Case("several rows a block", _quantize_token((7, 264), BF16)),
        Case("float16, two rows a block", _quantize_token((3, 2880), F16)),
        Case("float32", _quantize_token((3, 1400), F32)),
        Case("extreme", _quantize_token((40, 64), F32, _extreme)),
        Case("ties", _quantize_token((12, 256), F32, _e4m3_ties)),
        Case("several pieces", _quantize_token((2, 70000), BF16)),
        Case("offsets past 2^32", _far_token),
    ],
    "quantize_fp8_tensor": [
        Case("one row", _quantize_tensor((1, 8), BF16)),
        Case("tails", _quantize_tensor((7, 1032), BF16)),
        Case("wild", _quantize_tensor((3, 264), F32, _wild)),
        Case("float16", _quantize_tensor((2, 4104), F16)),
        Case("many maxima", _quantize_tensor((2, 520), BF16, num_partials=300)),
        Case("ties", _quantize_tensor((1, 1000), F32, _e4m3_ties)),
        Case("tiny", _quantize_tensor((3, 264), F32, _scaled(-120))),
        Case("huge", _quantize_tensor((3, 264), F32, _scaled(124))),
        Case("permuted", _quantize_tensor_permuted(3, BF16, 400)),
        Case("permuted, one slot, tails", _quantize_tensor_permuted(1, F32, 136)),
        Case("permuted, offsets past 2^32", _far_tensor),
        Case("given", _quantize_tensor((5, 264), BF16, _wild, scale=0.0123)),
        Case("given, tiny", _quantize_tensor((5, 264), F32, _extreme, scale=1e-42)),
        Case("given, small", _quantize_tensor((5, 264), F32, _extreme, scale=3e-25)),
        Case("given, huge", _quantize_tensor((5, 264), F32, _extreme, scale=1e38)),
        Case("given, infinite", _quantize_tensor((5, 264), F32, _wild, scale=np.inf)),
    ],
    "tensor_amax": [
        Case("one row", _tensor_amax((1, 320), BF16, 4)),
        Case("several rounds", _tensor_amax((9, 16392), BF16, 2)),
        Case("float16", _tensor_amax((3, 264), F16, 2)),
        Case("float32", _tensor_amax((5, 8200), F32, 1)),
    ],
    "quantize_fp8_ue8m0": [
        Case("one row", _quantize_ue8m0((1, 32), BF16, 32)),
        Case("tails", _quantize_ue8m0((5, 416), BF16, 32)),
        Case("groups of 16", _quantize_ue8m0((6, 400), F32, 16)),
        Case("groups of 64", _quantize_ue8m0((9, 704), F16, 64)),
        Case("groups of 128", _quantize_ue8m0((7, 1152), BF16, 128)),
        Case("extreme", _quantize_ue8m0((40, 64), F32, 32, _extreme)),
        Case("offsets past 2^32", _far_ue8m0),
        Case("ties", _quantize_ue8m0((12, 256), F32, 32, _e4m3_ties)),
    ],
    "quantize_nvfp4": [
        Case("one row", _quantize_nvfp4((1, 16), BF16, "linear")),
        Case("one row, swizzled", _quantize_nvfp4((1, 16), BF16, "swizzled_128x4")),
        Case("tails", _quantize_nvfp4((5, 400), BF16, "linear")),
        Case("tails, swizzled", _quantize_nvfp4((131, 208), BF16, "swizzled_128x4")),
        Case("ties", _quantize_nvfp4((30, 64), F32, "linear", _e2m1_ties, global_scale=1.0)),
        Case("float16", _quantize_nvfp4((3, 176), F16, "swizzled_128x4", global_scale=100.0)),
        Case("offsets past 2^32", _far_nvfp4),
        Case("extreme", _quantize_nvfp4((40, 64), F32, "linear", _extreme, global_scale=1.0)),
        Case(
            "its own scale", _quantize_nvfp4((7, 272), BF16, "linear", _finite, global_scale=None)
        ),
        Case(
            "its own scale, swizzled",
            _quantize_nvfp4((6, 96), F32, "swizzled_128x4", _finite, global_scale=None),
        ),
        Case(
            "its own scale, tiny",
            _quantize_nvfp4((3, 96), F32, "linear", _scaled(-120), global_scale=None),
        ),
        Case(
            "its own scale, infinite",
            _quantize_nvfp4((3, 160), F32, "linear", _wild, global_scale=None),
        ),
        Case(
            "its own scale, zeros",
            _quantize_nvfp4((2, 32), BF16, "linear", _zeros, global_scale=None),
        ),
    ],
}
"""Kernel to cases."""
