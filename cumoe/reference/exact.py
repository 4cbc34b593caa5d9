"""Float32 arithmetic that a device reproduces bit for bit.

Owns the elementary functions and reductions whose exact sequence of operations is part of cumoe's
contract. Everything is separately rounded float32 (no FMA, no float64) with subnormals kept, so a
kernel that performs the same steps with ``__fmul_rn``, ``__fadd_rn``, ``__fsub_rn`` and
``__fdiv_rn`` (and no flush to zero) returns the same bits. Knows nothing of experts or tokens.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

F32 = np.float32
WARP_SIZE = 32
FP8_MAX = F32(448.0)
FP8_NAN = np.uint8(0x7F)

EXP_LOW = F32(-104.0)
EXP_HIGH = F32(89.0)
LOG2_E = F32(float.fromhex("0x1.715476p+0"))
LN2_HIGH = F32(float.fromhex("0x1.62e4p-1"))
LN2_LOW = F32(float.fromhex("0x1.7f7d1cp-20"))
# Minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= 0.34665; relative error of exp(r) below 2^-28.
EXP_C2 = F32(float.fromhex("0x1.fffffcp-2"))
EXP_C3 = F32(float.fromhex("0x1.555492p-3"))
EXP_C4 = F32(float.fromhex("0x1.5558acp-5"))
EXP_C5 = F32(float.fromhex("0x1.123974p-7"))
EXP_C6 = F32(float.fromhex("0x1.6a504cp-10"))

IMAGE_NEG_INF = np.uint32(0x007FFFFF)
_SIGN = np.uint32(0x80000000)


def det_exp(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``exp(x)`` in float32 by a fixed sequence of separately rounded operations.

    The sequence, each line one rounding (``fmaxf`` and ``fminf`` return the number when the other
    operand is NaN, ``rintf`` rounds to nearest even)::

        x = fminf(fmaxf(x, -104.0f), 89.0f)
        n = rintf(x * 0x1.715476p+0f)            // LOG2_E
        r = x - n * 0x1.62e4p-1f                 // LN2_HIGH; the product is exact
        r = r - n * 0x1.7f7d1cp-20f              // LN2_LOW
        p = 0x1.6a504cp-10f                      // EXP_C6
        p = p * r;  p = p + 0x1.123974p-7f       // EXP_C5
        p = p * r;  p = p + 0x1.5558acp-5f       // EXP_C4
        p = p * r;  p = p + 0x1.555492p-3f       // EXP_C3
        p = p * r;  p = p + 0x1.fffffcp-2f       // EXP_C2
        r2 = r * r
        p = p * r2
        p = p + r
        p = p + 1.0f
        i = int(n)                               // in [-150, 128]
        h = i >> 1                               // arithmetic shift
        p = p * float_from_bits((h + 127) << 23)         // exact
        p = p * float_from_bits((i - h + 127) << 23)     // the only rounding of a subnormal

    Parameters
    ----------
    x : numpy.ndarray, float32, any shape

    Returns
    -------
    numpy.ndarray, float32, same shape
        Within 1 ulp of ``exp(x)`` wherever the result is finite, subnormal results included. Zero
        below about -103.98, infinity above 88.72284. ``det_exp(+-0)`` is exactly 1. NaN, like
        ``-inf``, gives 0.
    """
    x = np.minimum(np.where(x > EXP_LOW, x, EXP_LOW), EXP_HIGH)
    n = np.rint(x * LOG2_E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = EXP_C6 * r
    for coefficient in (EXP_C5, EXP_C4, EXP_C3):
        p += coefficient
        p *= r
    p += EXP_C2
    p *= r * r
    p += r
    p += F32(1.0)
    i = n.astype(np.int32)
    half = i >> 1
    with np.errstate(over="ignore", under="ignore"):
        p *= _power_of_two(half)
        p *= _power_of_two(i - half)
    return np.asarray(p)


def _power_of_two(exponent: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return ``2 ** exponent`` for exponents of normal float32 numbers, through the bits."""
    return np.asarray((exponent + np.int32(127)) << np.int32(23)).view(np.float32)


def sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``0.5 * tanh(0.5 * x) + 0.5`` in float32, the tanh made of :func:`det_exp`.

    The sequence, each operation rounded on its own::

        e = det_exp(-|x|)
        t = (1 - e) / (1 + e)
        t = -t if x has its sign bit set
        s = 0.5f * t;  s = s + 0.5f

    It saturates to exactly 1 above about 17 and to exactly 0 below about -17, as the formula with
    the float32 tanh does; the absolute error is below one ulp of 1.

    Parameters
    ----------
    x : numpy.ndarray, float32, any shape
        Not NaN.

    Returns
    -------
    numpy.ndarray, float32, same shape
    """
    e = det_exp(-np.abs(x))
    t = (F32(1.0) - e) / (F32(1.0) + e)
    return F32(0.5) * np.copysign(t, x) + F32(0.5)


def warp_sum(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum the last axis in the order in which a warp of 32 lanes sums it.

    Lane l adds elements ``l, l + 32, l + 64, ...`` in ascending order, starting from the first,
    with +0.0 for elements past the end (every lane adds ``ceil(n / 32)`` values). Then the lanes
    combine by butterfly: for ``o`` in 16, 8, 4, 2, 1, ``v[l] = v[l] + v[l ^ o]``.

    Parameters
    ----------
    values : numpy.ndarray, float32, shape (..., n), n >= 1

    Returns
    -------
    numpy.ndarray, float32, shape (...)
    """
    *lead, n = values.shape
    padded = -(-n // WARP_SIZE) * WARP_SIZE
    if padded != n:
        padding = [(0, 0)] * len(lead) + [(0, padded - n)]
        values = np.pad(values, padding)
    lanes = values[..., :WARP_SIZE].copy()
    for start in range(WARP_SIZE, padded, WARP_SIZE):
        lanes += values[..., start : start + WARP_SIZE]
    # Both lanes of a pair hold the same bits after a step, so only the lower one is kept.
    for offset in (16, 8, 4, 2, 1):
        lanes = lanes[..., :offset] + lanes[..., offset:]
    return np.asarray(lanes[..., 0])


def order_image(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Map float32 to uint32 so that unsigned order is selection order.

    ``bits ^ 0xFFFFFFFF`` if the sign bit is set, else ``bits | 0x80000000``. So -0.0 ranks below
    +0.0; NaN of either sign takes the image of ``-inf``, 0x007FFFFF. Smaller images belong to no
    number: 0 marks what may not be selected.

    Parameters
    ----------
    x : numpy.ndarray, float32, any shape

    Returns
    -------
    numpy.ndarray, uint32, same shape
    """
    bits = x.view(np.uint32)
    image = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return np.where(np.isnan(x), IMAGE_NEG_INF, image)


def from_order_image(image: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Return the float32 numbers that :func:`order_image` maps to `image`."""
    return np.where(image & _SIGN, image ^ _SIGN, ~image).view(np.float32)


def round_bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round float32 to the nearest bfloat16, ties to even, and return it as float32."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def to_e4m3(x: NDArray[np.float32]) -> NDArray[np.generic]:
    """Round float32 to float8_e4m3fn: nearest, ties to even, saturating.

    Parameters
    ----------
    x : numpy.ndarray, float32, any shape

    Returns
    -------
    numpy.ndarray, float8_e4m3fn, same shape
        Magnitudes above 448, infinity included, become 448; every NaN becomes the byte 0x7F; the
        sign of zero is kept. The bits are those of PTX ``cvt.rn.satfinite.e4m3x2.f32``.
    """
    # Clipped first: ml_dtypes turns what rounds past 448 into NaN.
    with np.errstate(under="ignore", invalid="ignore"):
        q = np.clip(x, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    nan = np.isnan(x)
    if nan.any():
        q.view(np.uint8)[nan] = FP8_NAN
    return q
