"""Quantised arrays whose scales are small numbers themselves: fp8 with UE8M0 groups, and nvfp4.

Owns their containers and the formulas of where a scale lies. Imports NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from cumoe.config import Array

ScaleLayout = Literal["linear", "swizzled_128x4"]
"""Order of nvfp4 scales: row-major, or in the tiles that Blackwell's tensor cores read."""

SCALE_LAYOUTS: tuple[str, ...] = get_args(ScaleLayout)
GROUP_SIZES = (16, 32, 64, 128)
"""Columns that may share a UE8M0 scale."""

FP4_GROUP = 16
"""Columns that share a scale of nvfp4."""


class QuantizedUE8M0(NamedTuple):
    """fp8 values with a power of two as the scale of each row and group of columns.

    Attributes
    ----------
    values : array, float8_e4m3fn (uint8 on a device), shape (num_tokens, hidden_size)
    scale : array, int32, shape (num_tokens, ceil(hidden_size / group_size / 4))
        Column-major, each column starting at a multiple of four words: strides
        ``(1, 4 * ceil(num_tokens / 4))``. Group g is byte ``g % 4`` of word ``g // 4``; a byte b
        is the scale ``2 ** (b - 127)``. Bytes past the last group are 0, and so are the words
        between two columns.
    group_size : int
        16, 32, 64 or 128.
    """

    values: Array
    scale: Array
    group_size: int


class QuantizedNVFP4(NamedTuple):
    """e2m1 values with an fp8 scale for each row and 16 columns, and one scale for all.

    ``real = value * scale / global_scale``

    Attributes
    ----------
    values : array, uint8, shape (num_tokens, hidden_size / 2)
        Two codes a byte, the even column in the low four bits. Codes 0 to 7 are 0, 0.5, 1, 1.5, 2,
        3, 4 and 6, and 8 more is the same negated.
    scale : array, float8_e4m3fn (uint8 on a device), C-contiguous
        ``"linear"``: shape ``(num_tokens, hidden_size / 16)``. ``"swizzled_128x4"``: shape
        ``(128 * ceil(num_tokens / 128), 4 * ceil(hidden_size / 64))``, the scale of row r and
        group c at byte ``((r // 128) * ceil(hidden_size / 64) + c // 4) * 512 + (r % 32) * 16 +
        (r % 128) // 32 * 4 + c % 4``; what is padding is 0.
    global_scale : array, float32, shape (1,)
        What the numbers were multiplied by.
    layout : {"linear", "swizzled_128x4"}
    """

    values: Array
    scale: Array
    global_scale: Array
    layout: ScaleLayout = "linear"


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def ue8m0_words(shape: Sequence[int], group_size: int) -> tuple[int, int]:
    """Return the columns of UE8M0 scales of a (rows, columns) array, and the stride between two."""
    return -(-shape[1] // (4 * group_size)), round_up(shape[0], 4)


def fp4_scale_shape(shape: Sequence[int], layout: str) -> tuple[int, int]:
    """Return the shape of the nvfp4 scales of a (rows, columns) array."""
    rows, groups = shape[0], shape[1] // FP4_GROUP
    return (rows, groups) if layout == "linear" else (round_up(rows, 128), round_up(groups, 4))


def fp4_tiles(scale: Array) -> Array:
    """View swizzled scales (rows, groups) as (row tile, 4, 32, group tile, 4), in reading order."""
    rows, groups = scale.shape
    return scale.reshape(rows // 128, groups // 4, 32, 4, 4).transpose(0, 3, 2, 1, 4)
