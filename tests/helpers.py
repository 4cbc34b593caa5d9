"""What tests of ops and layers share: backends, tolerances, block-wise comparison, guarded outputs.

A test marked with :data:`each_backend` runs its one body on NumPy and, marked ``gpu``, on CuPy. It
makes inputs with NumPy, hands them over with :func:`to_backend`, compares after :func:`to_host`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumoe import Activation, ExpertWeights, Quantized
from cumoe.arrays import is_device
from cumoe.launch import KernelSpec, current_device, get_device, warmup
from cumoe.tuning import SM90_ARCH

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
DTYPES = {"bfloat16": BF16, "float16": F16, "float32": F32, "float8_e4m3fn": FP8}

BACKENDS = [pytest.param("numpy"), pytest.param("cupy", marks=pytest.mark.gpu)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)

POISON = 0xFF
"""Every byte of a poisoned buffer: NaN in every floating point type, -1 in every integer."""


@dataclass(frozen=True)
class Tolerance:
    """Largest and root-mean-square error, relative to ``max(rms(reference), abs(reference))``."""

    largest: float
    rms: float
    reason: str


TOLERANCES = {
    "float32": Tolerance(
        1e-4, 1e-5, "float32 sums of up to 1000 products in another order; mma truncates addends"
    ),
    "float16": Tolerance(2.0**-10, 2.0**-11, "one rounding to 11 bits of significand"),
    "bfloat16": Tolerance(
        2.0**-7, 2.0**-8.5, "one rounding to 8 bits, or a neighbour of the reference's rounding"
    ),
    "float8_e4m3fn": Tolerance(
        2.0**-3, 2.0**-5, "one rounding to 4 bits, or a neighbour of the reference's rounding"
    ),
    "float8_e4m3fn twin": Tolerance(
        2.0**-2.9, 0.004, "the same rounding; an element in some thousands goes to a neighbour"
    ),
    "bfloat16 twin": Tolerance(
        2.0**-6.9, 0.001, "the same rounding; an element in some thousands goes to a neighbour"
    ),
    "float8_e4m3fn wgmma": Tolerance(
        2.0**-2.9, 0.02, "sums of Hopper's fp8 tensor cores differ: 1 element in 100 goes there"
    ),
    "bfloat16 wgmma": Tolerance(
        2.0**-6.5, 0.002, "sums of Hopper's fp8 tensor cores differ: 1 element in 20 goes there"
    ),
    "layer bf16": Tolerance(
        0.02, 0.005, "result and rows rounded to 8 bits; activations may go to a neighbour"
    ),
    "layer fp8_block": Tolerance(
        0.05, 0.01, "as bf16, and an fp8 activation may go to a neighbour, 1/8 of it away"
    ),
    "layer fp8_block wgmma": Tolerance(
        0.125, 0.0125, "the tensor cores' sums differ by 1.5e-4: 1 activation in 100 goes there"
    ),
    "layer fp8_tensor": Tolerance(0.05, 0.01, "as fp8_block, with other scales"),
}
"""fp8_block wgmma: Hopper's fp8 tensor cores keep fewer bits of a sum of 128 products than float32.
On an H200 the portable kernels and these differ by 0.067 (largest) and 0.0045 (rms) at most.
"""


def cut_sums(tolerance: str, k: int) -> Tolerance:
    """Return the tolerance where Hopper's fp8 tensor cores cut all sums over `k` each 32 of k.

    They keep 14 bits, towards zero: on average half of 2**-13 of the sum so far is lost each time.
    The sum grows like the root of k, so of the whole ``k / 32 / 3 * 2**-13`` is lost: 1e-3 for 768.

    An activation, a product of two sums, loses 2.25 times that. e4m3 numbers are 0.09 apart on
    average, so the loss over 0.09 is the part of them that goes to its neighbour: 1 in 40 for 768.
    The largest error of a layer is ten times the rms, as of fp8_block.
    """
    limit, cuts = TOLERANCES[tolerance], -(-k // 128) * 4
    lost = cuts * 2.0**-13 / 3
    if not tolerance.startswith(("float8", "layer")):
        return replace(limit, largest=limit.largest + 3 * lost, rms=limit.rms + lost)
    rms = (limit.rms**2 + 0.09 * 2.25 * lost) ** 0.5
    if tolerance.startswith("float8"):
        return replace(limit, rms=rms)
    return replace(limit, largest=10 * (rms + lost), rms=rms + lost)


def relative_errors(actual: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return largest and rms error relative to ``max(rms(reference), abs(reference))``."""
    finite = np.isfinite(reference)
    if not np.array_equal(actual[~finite], reference[~finite], equal_nan=True):
        return np.inf, np.inf
    actual, reference = actual[finite], reference[finite]
    if not actual.size:
        return 0.0, 0.0
    scale = np.maximum(np.sqrt(np.mean(reference**2)), np.abs(reference))
    error = np.abs(actual - reference)
    error = np.divide(error, scale, out=np.where(error > 0, np.inf, error), where=scale > 0)
    return float(error.max()), float(np.sqrt(np.mean(error**2)))


def assert_close_blocks(
    actual: Any,
    reference: np.ndarray,
    tolerance: str | Tolerance,
    *,
    row_block: int = 64,
    experts: np.ndarray | None = None,
    k: int = 768,
) -> None:
    """Hold the error of all rows, of each block of rows, and of each expert's rows to a tolerance.

    Parameters
    ----------
    actual : array of either backend, shape (num_rows, n)
    reference : numpy.ndarray, shape (num_rows, n)
    tolerance : str or Tolerance
        A key of :data:`TOLERANCES`, or one of its own.
    row_block : int
        Rows of a block.
    experts : numpy.ndarray, shape (num_rows,), optional
        The expert of each row.
    k : int
        The longest sum of a layer, at most.
    """
    hopper = is_device(actual) and get_device(int(actual.device.id)).arch == SM90_ARCH
    if tolerance == "layer fp8_tensor" and hopper:
        tolerance = cut_sums(tolerance, k)
    elif tolerance == "layer fp8_block" and hopper:
        tolerance += " wgmma"
    limit = tolerance if isinstance(tolerance, Tolerance) else TOLERANCES[tolerance]
    got = to_host(actual).astype(np.float64)
    want = np.asarray(reference).astype(np.float64)
    assert got.shape == want.shape
    parts: dict[str, Any] = {"all rows": slice(None)}
    for start in range(0, len(want), row_block):
        parts[f"rows {start} to {start + row_block - 1}"] = slice(start, start + row_block)
    if experts is not None:
        parts |= {f"expert {e}": np.flatnonzero(experts == e) for e in np.unique(experts)}
    for name, rows in parts.items():
        largest, rms = relative_errors(got[rows], want[rows])
        assert largest <= limit.largest and rms <= limit.rms, (
            f"{name}: errors {largest:.3g} (largest) and {rms:.3g} (rms), expected at most "
            f"{limit.largest:.3g} and {limit.rms:.3g}: {limit.reason}"
        )


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Check that two arrays of either backend are equal to the bit, dtype and shape included."""
    actual, expected = to_host(actual), to_host(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(words(actual), words(expected))


def words(x: Any) -> Any:
    """View an array's elements as unsigned integers."""
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])


def to_backend(x: Any, backend: str) -> Any:
    """Hand arrays, and containers of them, to a backend; column-major stays column-major.

    CuPy takes fp8 as uint8 and bfloat16 as it is. Waits for the copies, so any stream may use them.
    """
    if backend == "numpy" or x is None or isinstance(x, (str, int, float)):
        return x
    if isinstance(x, ExpertWeights):
        weights = x.to_device()
        _wait()
        return weights
    if isinstance(x, Quantized):
        payload, scale = (to_backend(a, backend) for a in (x.values, x.scale))
        return Quantized(payload, scale, block=x.block)
    if isinstance(x, Activation):
        fields = ("alpha", "beta", "limit")
        return replace(x, **{f: to_backend(getattr(x, f), backend) for f in fields})
    if isinstance(x, dict):
        return {name: to_backend(value, backend) for name, value in x.items()}
    if isinstance(x, tuple):
        values = [to_backend(value, backend) for value in x]
        return type(x)(*values) if hasattr(x, "_fields") else tuple(values)
    if not isinstance(x, np.ndarray):
        return x
    import cupy

    if x.ndim == 2 and x.flags.f_contiguous and not x.flags.c_contiguous:
        return to_backend(x.T, backend).T
    dtype = np.dtype(np.uint8) if x.dtype == FP8 else x.dtype
    native = cupy.asarray(np.ascontiguousarray(words(x))).view(dtype)
    _wait()
    return native


def _wait() -> None:
    """Wait for what is queued on CuPy's current stream."""
    import cupy

    cupy.cuda.get_current_stream().synchronize()


def to_host(x: Any) -> Any:
    """Return a backend's array, or Quantized, on the host; waits for the device."""
    if isinstance(x, Quantized):
        values = to_host(x.values)
        return Quantized(values.view(FP8), to_host(x.scale), block=x.block)
    if isinstance(x, tuple):
        values = [to_host(value) for value in x]
        return type(x)(*values) if hasattr(x, "_fields") else tuple(values)
    if isinstance(x, (np.ndarray, int, str)):
        return x
    import cupy

    assert isinstance(x, cupy.ndarray), f"expected an array, got {type(x).__name__}"
    if x.dtype == BF16:
        return words(cupy.ascontiguousarray(x)).get().view(BF16)
    return x.get()


def dequantized(q: Quantized) -> np.ndarray:
    """Return the float64 numbers of activations with 1 x 128 scales, of either backend."""
    host = to_host(q)
    scale = np.repeat(host.scale.astype(np.float64), 128, axis=1)[:, : host.values.shape[1]]
    return host.values.astype(np.float64) * scale


class Poisoned:
    """An output array inside a larger buffer, every byte of both poisoned.

    Attributes
    ----------
    array : array of the backend
        uint8 for fp8 on CuPy. 16-byte aligned.
    """

    GUARD_BYTES = 4096

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, backend: str, *, column_major: bool = False
    ) -> None:
        kind = np.dtype(DTYPES.get(dtype, dtype))
        self._nbytes = int(np.prod(shape)) * kind.itemsize
        total = self._nbytes + 2 * self.GUARD_BYTES
        if backend == "numpy":
            self._buffer: Any = np.full(total, POISON, np.uint8)
        else:
            import cupy

            self._buffer = cupy.full(total, POISON, cupy.uint8)
            kind = np.dtype(np.uint8) if kind == FP8 else kind
        view = self._buffer[self.GUARD_BYTES : self.GUARD_BYTES + self._nbytes].view(kind)
        self.array = view.reshape(shape[::-1]).T if column_major else view.reshape(shape)

    def check_guards(self) -> None:
        """Check that nothing was written before or behind the array."""
        host = to_host(self._buffer)
        assert (host[: self.GUARD_BYTES] == POISON).all(), "written before the array"
        assert (host[self.GUARD_BYTES + self._nbytes :] == POISON).all(), "written past the array"

    def check_untouched(self) -> None:
        """Check that nothing was written at all."""
        assert (to_host(self._buffer) == POISON).all()


def precompile(specs: Iterable[KernelSpec]) -> None:
    """Compile kernels for the GPU at hand in parallel, so that tests find them in the cache."""
    warmup(specs, [current_device().arch])


def rounding_bound(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of arrays in float64, and how far one rounded after each addition may be.

    ``n - 1`` additions in any order multiply each array by at most that many factors of
    ``1 + unit``, the unit roundoff of its dtype; sums in the range of subnormals are exact.
    """
    wide = [part.astype(np.float64) for part in parts]
    unit = float(ml_dtypes.finfo(parts[0].dtype).eps) / 2
    growth = np.expm1((len(parts) - 1) * np.log1p(unit))
    # The sum in float64 is off by far less than a thousandth of the bound.
    return np.sum(wide, axis=0), 1.001 * growth * np.sum(np.abs(wide), axis=0)
