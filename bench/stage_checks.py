"""Whether two results of a stage differ by rounding alone, compared where the arrays are.

Knows the bits of small formats, and no op. Every function raises ArithmeticError that says what is
wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cumoe.config import Array

MAX_SCALE_ERROR = 1e-5


def _steps(xp: Any, codes: Array, sign: int) -> Array:
    """Number the codes of a small format so that neighbours differ by one; zeros are one number."""
    magnitude = (codes & np.uint8(sign - 1)).astype(np.int16)
    return xp.where(codes & np.uint8(sign), -magnitude, magnitude)


def check_scale(got: Array, want: Array) -> None:
    """Compare float32 scales.

    Raises
    ------
    ArithmeticError
        If one is off by 1e-5 of itself, or is not a number.
    """
    error = float(abs(got / want.reshape(got.shape) - 1).max())
    if not error < MAX_SCALE_ERROR:
        raise ArithmeticError(f"a scale is off by {error:.1e}")


def check_fp8(xp: Any, got: Array, want: Array) -> None:
    """Compare the codes of e4m3.

    Raises
    ------
    ArithmeticError
        If two are more than one step apart, or only one of them is a NaN.
    """
    apart = int(abs(_steps(xp, got, 0x80) - _steps(xp, want, 0x80)).max())
    low = np.uint8(0x7F)
    if apart > 1 or bool((((got & low) == low) != ((want & low) == low)).any()):
        raise ArithmeticError(f"a number is {apart} steps of fp8 off, or a NaN")


def check_fp4(xp: Any, got: Array, want: Array) -> None:
    """Compare the codes of e2m1, two in a byte.

    Raises
    ------
    ArithmeticError
        If two are more than one step apart.
    """
    for shift in (np.uint8(0), np.uint8(4)):
        apart = abs(_steps(xp, got >> shift, 8) - _steps(xp, want >> shift, 8)).max()
        if int(apart) > 1:
            raise ArithmeticError(f"a number is {int(apart)} steps of e2m1 off")


def check_equal(got: Array, want: Array) -> None:
    """Compare bits.

    Raises
    ------
    ArithmeticError
        If any differ.
    """
    if wrong := int((got != want).sum()):
        raise ArithmeticError(f"{wrong} of {got.size} scales are wrong")


def check_bf16(got: Array, want: Array) -> None:
    """Compare the bits of bfloat16 sums whose products may be fused.

    Raises
    ------
    ArithmeticError
        If two differ by more than the last place of the larger, and float32 rounding of a sum that
        cancels.
    """
    a, b = ((x.astype(np.uint32) << np.uint32(16)).view(np.float32) for x in (got, want))
    far = ~(abs(a - b) <= 2.0**-7 * abs(b) + 1e-5)
    if wrong := int(far.sum()):
        raise ArithmeticError(f"{wrong} of {got.size} sums are wrong")
