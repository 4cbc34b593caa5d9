"""The models of ``tests/host`` against the hardware: the same tiny kernel on both, the same bits.

Each test runs on the CPU alone, where it compares with NumPy, and marked ``gpu`` on a device as
well. The tensor cores round in a way of their own: products are compared within a bound that the
test states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumoe.kernels import Launch
from cumoe.launch import TENSOR_MAP, KernelSpec, LaunchConfig, encode_tiled, params_dtype
from tests.host import loader
from tests.host import tensor_map as host_map

CU = Path(__file__).resolve().parent / "cu"
POINTER, I32 = np.uint64, np.int32


def launch_on(
    place: str,
    name: str,
    dtype: np.dtype,
    block: int,
    grid: int = 1,
    smem: int = 0,
    options: loader.HostOptions = loader.HostOptions(seed=5),  # noqa: B008
    **fields: Any,
) -> dict[str, np.ndarray]:
    """Run a kernel of ``tests/cu`` on ``"host"`` or ``"device"`` and return its arrays afterwards.

    Arrays become addresses, a callable is called with the place for a tensor map, others stay.
    """
    if place == "host":
        loader.require()
        arrays = {n: v.copy() for n, v in fields.items() if isinstance(v, np.ndarray) and v.ndim}
        address = {n: a.ctypes.data for n, a in arrays.items()}
    else:
        import cupy

        arrays = {n: cupy.asarray(v) for n, v in fields.items() if isinstance(v, np.ndarray)}
        address = {n: a.data.ptr for n, a in arrays.items()}
    params = np.zeros((), dtype)
    for field, value in fields.items():
        if field not in dtype.names:
            continue  # memory that a tensor map names
        if field in address:
            params[field] = address[field]
        elif callable(value):
            encode = host_map.encode_tiled if place == "host" else encode_tiled
            params[field] = value(encode, address)
        else:
            params[field] = value
    config = LaunchConfig((grid, 1, 1), (block, 1, 1), smem_bytes=smem)
    launch = Launch(KernelSpec(name, source_dir=CU), config, params)
    if place == "host":
        loader.run([launch], options)
        return arrays
    import cupy

    from cumoe.launch import current_device

    launch.run(current_device(), cupy.cuda.get_current_stream().ptr)
    return {n: a.get() for n, a in arrays.items()}


def awkward_floats() -> np.ndarray:
    """Return float32 pairs: every half and e4m3, their neighbours, ties, NaN, infinities."""
    rng = np.random.default_rng(7)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    nudges = (halves.view(np.uint32) + rng.integers(-2, 3, halves.size)).astype(np.uint32)
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (codes[:-1] + codes[1:]) / 2
    random = rng.integers(0, 1 << 32, 40000, dtype=np.uint32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 448.0, 464.0, 464.1, 65504.0, 65520.0, 1e-8]
    special_values = np.array(special, np.float32)
    around = [np.nextafter(ties, np.float32(side)) for side in (-999, 999)]
    x = np.concatenate(
        [halves, nudges.view(np.float32), codes, ties, *around, random.view(np.float32)]
    )
    x = np.concatenate([x, special_values])
    return np.stack([x, rng.permutation(x)], 1)


CONVERT = params_dtype([("in", POINTER), ("out", POINTER), ("n", I32)])
COPY = params_dtype([("in", POINTER), ("out", POINTER)])
FRAGMENTS = params_dtype([(n, POINTER) for n in ("in", "accum", "fragments", "d")])
HOPPER = params_dtype(
    [("map", TENSOR_MAP)]
    + [(n, POINTER) for n in ("boxes", "d", "transposed", "elected")]
    + [("coordinates", I32, (4,))]
)
STORE = params_dtype([("map", TENSOR_MAP), ("row", POINTER), ("coordinates", I32, (4,))])
CLUSTER = params_dtype(
    [(n, TENSOR_MAP) for n in ("two", "five")]
    + [(n, POINTER) for n in ("boxes", "words", "floats")]
    + [(n, I32, (2,)) for n in ("rows", "columns")]
)
WGMMA = params_dtype([(n, POINTER) for n in ("w", "a", "d")])
SYNC = params_dtype([(n, POINTER) for n in ("payload", "flags", "counters", "marks", "out")])
WGMMA_SIZES = (8, 56, 104, 16, 88, 160)
"""n of each product of ``ptx_wgmma``: three of e4m3, then three of bf16."""


def require_hopper() -> None:
    """Skip the calling test on other devices."""
    import cupy

    if int(cupy.cuda.Device().compute_capability) != 90:
        pytest.skip("needs compute capability 9.0")


def convert(place: str) -> np.ndarray:
    x = awkward_floats()
    out = np.zeros((len(x), 10), np.uint32)
    fields = {"in": x, "out": out, "n": len(x)}
    return launch_on(place, "ptx_convert", CONVERT, 256, -(-len(x) // 256), **fields)["out"]


def copy(place: str) -> np.ndarray:
    given = np.arange(512, dtype=np.uint32).reshape(128, 4) * 0x01010101 + 7
    fields = {"in": given, "out": np.zeros_like(given)}
    return launch_on(place, "ptx_copy", COPY, 64, **fields)["out"]


def fragments(place: str, exact: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the arrays of ``ptx_fragments`` and the operand's words; exact: small integers."""
    rng = np.random.default_rng(3)
    x = rng.integers(-8, 9, (32, 8)) if exact else rng.standard_normal((32, 8))
    words = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    if not exact:
        words &= np.uint16(0xBFFF)  # finite as fp16 too
    accum = rng.integers(-9, 9, (16, 8)).astype(np.float32)
    given = {
        "in": words,
        "accum": accum,
        "fragments": np.zeros((32, 4), np.uint32),
        "d": np.zeros((2, 16, 8), np.float32),
    }
    return launch_on(place, "ptx_fragments", FRAGMENTS, 32, **given), words


def hopper(place: str, codes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of ``ptx_hopper`` for e4m3 codes (150, 320); the second box hangs over."""

    def encode(encode_map: Any, address: dict[str, int]) -> np.ndarray:
        box, shape = (64, 128), codes.shape
        return encode_map(address["x"], "uint8", shape, (shape[1], 1), box, swizzle="128B")

    return launch_on(
        place,
        "ptx_hopper",
        HOPPER,
        128,
        smem=16384,
        x=codes,
        map=encode,
        boxes=np.zeros((2, 64, 128), np.uint8),
        d=np.zeros((64, 64), np.float32),
        transposed=np.zeros((4, 32, 8), np.uint16),
        elected=np.zeros(4, np.int32),
        coordinates=np.array([128, 16, 240, 100], np.int32).tolist(),
    )


def hopper_codes(exact: bool) -> np.ndarray:
    rng = np.random.default_rng(4)
    x = rng.integers(-3, 4, (150, 320)) if exact else rng.standard_normal((150, 320))
    return x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def store(place: str) -> dict[str, np.ndarray]:
    """Return the arrays of ``ptx_store``; the second box hangs over on two sides."""

    def encode(encode_map: Any, address: dict[str, int]) -> np.ndarray:
        return encode_map(address["x"], "uint8", (150, 320), (320, 1), (64, 128), swizzle="128B")

    return launch_on(
        place,
        "ptx_store",
        STORE,
        128,
        smem=16384,
        x=np.full((150, 320), 0xEE, np.uint8),
        map=encode,
        row=np.full(4200, 0xEE, np.uint8),
        coordinates=np.array([16, 24, 240, 100], np.int32).tolist(),
    )


def cluster(place: str, seed: int = 5) -> dict[str, np.ndarray]:
    """Return the arrays of ``ptx_cluster`` for bytes (2, 40, 272); one box hangs over."""

    def two(encode_map: Any, address: dict[str, int]) -> np.ndarray:
        return encode_map(address["x"], "uint8", (40, 272), (272, 1), (8, 128))

    def five(encode_map: Any, address: dict[str, int]) -> np.ndarray:
        strides = (40 * 272, 272, 272, 272, 1)
        return encode_map(address["x"], "uint8", (2, 1, 40, 1, 272), strides, (1, 1, 8, 1, 128))

    return launch_on(
        place,
        "ptx_cluster",
        CLUSTER,
        128,
        2,
        smem=4096,
        options=loader.HostOptions(seed=seed),
        x=np.random.default_rng(8).integers(0, 256, (2, 40, 272)).astype(np.uint8),
        two=two,
        five=five,
        boxes=np.full((2, 4, 8, 128), 0xEE, np.uint8),
        words=np.full((2, 2), 0xEEEEEEEE, np.uint32),
        floats=np.full((2, 128), np.nan, np.float32),
        rows=np.array([8, 36], np.int32).tolist(),
        columns=np.array([16, 160], np.int32).tolist(),
    )


def sync(place: str, seed: int = 5) -> dict[str, np.ndarray]:
    """Return the arrays of ``ptx_sync``."""
    return launch_on(
        place,
        "ptx_sync",
        SYNC,
        64,
        3,
        options=loader.HostOptions(seed=seed, resident=3),
        payload=np.full((4, 3, 64, 4), 0xFFFFFFFF, np.uint32),
        flags=np.zeros(3, np.uint32),
        counters=np.zeros(5, np.uint32),
        marks=np.zeros((3, 4), np.uint32),
        out=np.zeros((4, 3, 64, 4), np.uint32),
    )


def wgmma_operands(exact: bool, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return w (64, k) and a (160, k) of 256 bytes of k; exact: small integers."""
    rng = np.random.default_rng(6)
    k = 256 // np.dtype(dtype).itemsize
    x = rng.integers(-3, 4, (224, k)) if exact else rng.standard_normal((224, k))
    x = x.astype(np.float32).astype(dtype)
    return x[:64], x[64:]


def wgmma(place: str, exact: bool, dtype: Any) -> np.ndarray:
    """Return what ``ptx_wgmma`` stores for one dtype, (3, 2, 64, 160), and not for the other."""
    w, a = (
        np.ascontiguousarray(np.stack(np.split(x.view(np.uint8), 2, 1)))
        for x in wgmma_operands(exact, dtype)
    )
    d = np.full((6, 2, 64, 160), np.nan, np.float32)
    got = launch_on(place, "ptx_wgmma", WGMMA, 128, smem=65536, w=w, a=a, d=d)["d"]
    return got[:3] if dtype is ml_dtypes.float8_e4m3fn else got[3:]


def wgmma_products(exact: bool, dtype: Any, absolute: bool = False) -> np.ndarray:
    """Return in float64 what ``ptx_wgmma`` computes, over all 160 columns: (2, 64, 160)."""
    w, a = (x.astype(np.float64) for x in wgmma_operands(exact, dtype))
    if absolute:
        w, a = np.abs(w), np.abs(a)
    half = w.shape[1] // 2
    return np.stack([3 + w[:, :half] @ a[:, :half].T, w @ a.T])


WGMMA_DTYPES = pytest.mark.parametrize(
    "dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16], ids=["e4m3", "bf16"]
)


class TestHost:
    """The models alone, against NumPy."""

    def test_conversions(self):
        x, out = awkward_floats(), convert("host")
        with np.errstate(all="ignore"):
            pairs = {
                0: (x.astype(ml_dtypes.bfloat16).view(np.uint16), ml_dtypes.bfloat16),
                1: (x.astype(np.float16).view(np.uint16), np.float16),
            }
        for column, (expected, dtype) in pairs.items():
            got = np.ascontiguousarray(out[:, column]).view(np.uint16).reshape(-1, 2)
            nan = np.isnan(expected.view(dtype).astype(np.float32))
            assert (got[nan] == 0x7FFF).all() and (got[~nan] == expected[~nan]).all()
        from cumoe.reference import to_e4m3

        codes = to_e4m3(x).view(np.uint8).astype(np.uint32)
        assert (out[:, 4] == (codes[:, 0] | codes[:, 1] << 8)).all()
        with np.errstate(all="ignore"):
            others = np.stack([-x[:, 1], x[:, 0] + x[:, 1]], 1)
        codes = np.concatenate([codes, to_e4m3(others).view(np.uint8)], 1).astype(np.uint8)
        assert (out[:, 7] == codes.view(np.uint32)[:, 0]).all()
        fours = np.ascontiguousarray(x[:, 0]).view(np.uint8).view(ml_dtypes.float8_e4m3fn)
        wide = np.ascontiguousarray(out[:, 8:]).view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(wide, fours.reshape(-1, 4).astype(np.float32))
        halves = (np.ascontiguousarray(x[:, 0]).view(np.uint32) & 0xFFFF).astype(np.uint16)
        widened = halves.view(np.float16).astype(np.float32)
        same = np.ascontiguousarray(out[:, 3]).view(np.float32)
        np.testing.assert_array_equal(same, widened)

    def test_copy(self):
        given = np.arange(512, dtype=np.uint32).reshape(128, 4) * 0x01010101 + 7
        expected = given.view(np.uint8).reshape(128, 16).copy()
        for t in range(64):
            expected[t, t % 17 :] = 0
            expected[t + 64, 16 - t % 17 :] = 0
        got = copy("host").view(np.uint8).reshape(128, 16)
        assert (got[:64] == expected[63::-1]).all() and (got[64:] == expected[:63:-1]).all()

    def test_fragments(self):
        arrays, words = fragments("host", True)
        a = words.view(ml_dtypes.bfloat16).astype(np.float64).reshape(4, 8, 8)
        left = np.block([[a[0], a[2]], [a[1], a[3]]])
        right = np.concatenate([a[0], a[1]], 1)
        assert (arrays["d"][0] == left @ right.T + arrays["accum"]).all()
        pairs = words.view(np.uint32).reshape(4, 8, 4)
        lanes = np.arange(32)
        assert (arrays["fragments"] == pairs[:, lanes // 4, lanes % 4].T).all()

    def test_hopper(self):
        codes = hopper_codes(True)
        arrays = hopper("host", codes)
        wide = np.pad(codes, ((0, 64), (0, 128)))
        boxes = np.stack([wide[16:80, 128:256], wide[100:164, 240:368]])
        rows, chunks = np.indices((64, 8))
        laid = arrays["boxes"].reshape(2, 64, 8, 16)[:, rows, chunks ^ rows % 8]
        assert (laid.reshape(boxes.shape) == boxes).all()
        a, b = boxes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        assert (arrays["d"] == a @ b.T).all()
        lanes = np.arange(32)
        for warp in range(4):
            for matrix in range(4):
                low = 8 * (32 * warp + lanes) + 2 * matrix
                expected = np.zeros((8, 8), np.uint16)
                expected[2 * (lanes % 4), lanes // 4] = low
                expected[2 * (lanes % 4) + 1, lanes // 4] = low + 1
                got = arrays["transposed"][warp, 8 * matrix : 8 * matrix + 8]
                assert (got == expected).all()
        assert (arrays["elected"] == 1).all()

    def test_store(self):
        arrays = store("host")
        i = np.arange(16384)
        smem = (i * 7 + i // 251).astype(np.uint8)
        rows, chunks = np.indices((64, 8))
        boxes = smem.reshape(2, 64, 8, 16)[:, rows, chunks ^ rows % 8].reshape(2, 64, 128)
        expected = np.full((164, 368), 0xEE, np.uint8)
        expected[24:88, 16:144], expected[100:164, 240:368] = boxes
        assert (arrays["x"] == expected[:150, :320]).all()
        assert (arrays["row"][:4112] == smem[-4112:]).all() and (arrays["row"][4112:] == 0xEE).all()

    def test_cluster(self):
        for seed in range(8):
            arrays = cluster("host", seed)
            wide = np.pad(arrays["x"], ((0, 0), (0, 8), (0, 128)))
            boxes = [wide[0, 8:16, 16:144], wide[1, 8:16, 160:288]]
            boxes += [wide[0, 36:44, 16:144], wide[1, 36:44, 160:288]]
            assert (arrays["boxes"] == np.stack([boxes, boxes])).all()
            assert arrays["words"].tolist() == [[0, 1001], [1, 1000]]
            half = np.arange(128, dtype=np.float32) / 2
            assert (arrays["floats"] == np.stack([half + 1, half])).all()

    def test_sync(self):
        step, block, t = np.indices((4, 3, 64)).astype(np.uint32)
        x = 10000 * step + 1000 * ((block + 2) % 3) + t
        expected = np.stack([x, x ^ 0xFFFF, 3 * x, x << 8], -1)
        for seed in range(8):
            arrays = sync("host", seed)
            assert (arrays["out"] == expected).all() and (arrays["payload"] == expected).all()
            assert arrays["flags"].tolist() == [9, 7, 8]
            assert arrays["counters"].tolist() == [64, 64, 64, 192, 192 * 191 // 2]
            assert (arrays["marks"] == [1, 2, 3, 4]).all()

    @WGMMA_DTYPES
    def test_wgmma(self, dtype):
        got, expected = wgmma("host", True, dtype), wgmma_products(True, dtype)
        sizes = WGMMA_SIZES[:3] if dtype is ml_dtypes.float8_e4m3fn else WGMMA_SIZES[3:]
        for d, n in zip(got, sizes, strict=True):
            assert (d[:, :, :n] == expected[:, :, :n]).all() and np.isnan(d[:, :, n:]).all()


@pytest.mark.gpu
class TestDevice:
    """The hardware against the models."""

    def test_conversions(self):
        np.testing.assert_array_equal(convert("device"), convert("host"))

    def test_copy(self):
        np.testing.assert_array_equal(copy("device"), copy("host"))

    @pytest.mark.parametrize("exact", [True, False])
    def test_fragments(self, exact):
        device, words = fragments("device", exact)
        host, _ = fragments("host", exact)
        np.testing.assert_array_equal(device["fragments"], host["fragments"])
        a = words.reshape(4, 8, 8)
        left = np.block([[a[0], a[2]], [a[1], a[3]]])
        right = np.concatenate([a[0], a[1]], 1)
        for type_, dtype in enumerate((ml_dtypes.bfloat16, np.float16)):
            wide = (np.abs(x.view(dtype).astype(np.float64)) for x in (left, right))
            sums = np.matmul(next(wide), next(wide).T) + np.abs(device["accum"])
            error = np.abs(device["d"][type_].astype(np.float64) - host["d"][type_])
            # Integers are exact; otherwise addends are cut to the last place of the largest one.
            assert (error <= (0 if exact and type_ == 0 else 2**-20) * sums).all()

    @pytest.mark.parametrize("exact", [True, False])
    def test_hopper(self, exact):
        require_hopper()
        codes = hopper_codes(exact)
        device, host = hopper("device", codes), hopper("host", codes)
        for name in ("boxes", "transposed", "elected"):
            np.testing.assert_array_equal(device[name], host[name])
        wide = np.pad(codes, ((0, 64), (0, 128)))
        boxes = np.stack([wide[16:80, 128:256], wide[100:164, 240:368]])
        a, b = np.abs(boxes.view(ml_dtypes.float8_e4m3fn).astype(np.float64))
        error = np.abs(device["d"].astype(np.float64) - host["d"])
        # Measured on an H200: 1.3e-4 of sum |a||b| over K = 128; small integers are exact.
        assert (error <= (0 if exact else 2.5e-4) * (a @ b.T)).all()

    def test_sync(self):
        device, host = sync("device"), sync("host")
        for name in host:
            np.testing.assert_array_equal(device[name], host[name])

    def test_cluster(self):
        require_hopper()
        device, host = cluster("device"), cluster("host")
        for name in ("boxes", "words", "floats"):
            np.testing.assert_array_equal(device[name], host[name])

    def test_store(self):
        require_hopper()
        device, host = store("device"), store("host")
        for name in ("x", "row"):
            np.testing.assert_array_equal(device[name], host[name])

    @WGMMA_DTYPES
    @pytest.mark.parametrize("exact", [True, False])
    def test_wgmma(self, exact, dtype):
        require_hopper()
        device, host = wgmma("device", exact, dtype), wgmma("host", exact, dtype)
        # By the 128 bytes of k in each sum. Of e4m3, as in test_hopper; bf16 keeps the bits of fp32
        # and cuts addends to the last place of the largest one, eight times.
        step = 2.5e-4 if dtype is ml_dtypes.float8_e4m3fn else 2**-20
        bound = wgmma_products(exact, dtype, absolute=True) * [[[step]], [[2 * step]]]
        error = np.abs(device.astype(np.float64) - host)
        assert (np.isnan(device) == np.isnan(host)).all()
        assert not (error > (0 if exact else bound)).any()
