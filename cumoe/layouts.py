"""Exact converters among the memory layouts and row orders of expert weights.

Owns what the layouts are called and how one becomes another: MajorK and BlockMajorK, FlashInfer's
row shuffle, the four gate/up row orders and their combination. Every converter moves bytes and
changes none, has an exact inverse, and runs on NumPy and CuPy arrays alike, one expert at a time,
so temporary memory is one expert. Knows no recipe beyond FlashInfer's table, and no kernel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cumoe.arrays import (
    DTYPES,
    FP8,
    address,
    as_native,
    dtype_name,
    empty,
    is_device,
    overlaps,
    same_place,
)
from cumoe.config import Array, check_choice, check_int

GateUpOrder = Literal["gate_up", "up_gate", "gate_up_interleaved", "up_gate_interleaved"]
"""How the ``2 * intermediate_size`` rows of w13 hold gate and up.

``"gate_up"``: all gate rows, then all up rows. ``"up_gate"``: up first (FlashInfer).
``"gate_up_interleaved"``: row ``2i`` is gate row i and row ``2i + 1`` up row i (gpt-oss).
``"up_gate_interleaved"``: row ``2i`` is up row i and row ``2i + 1`` gate row i.
"""

WeightLayout = Literal["major_k", "block_major_k"]
"""``"major_k"``: (num_experts, m, k). ``"block_major_k"``: (num_experts, k / bk, m, bk) where bk
elements are 128 bytes, ``blocked[e, b, i, j] = w[e, i, b * bk + j]``."""

GATE_UP_ORDERS: tuple[str, ...] = get_args(GateUpOrder)
WEIGHT_LAYOUTS: tuple[str, ...] = get_args(WeightLayout)
BLOCK_BYTES = 128

FLASHINFER_ROWS: dict[str, tuple[bool, int]] = {
    "bf16": (True, 128),
    "fp8_block": (False, 64),
    "fp8_tensor": (True, 128),
}
"""FlashInfer's rows by recipe: (w13 interleaved or not, epilogue_tile_m of the row shuffle)."""

_WORDS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def words(x: Array) -> Array:
    """View an array as unsigned integers of the same width."""
    return x.view(_WORDS[x.dtype.itemsize])


def block_elems(x: Array) -> int:
    """Return the elements in a BlockMajorK block of the array's dtype."""
    return BLOCK_BYTES // int(x.dtype.itemsize)


def on_device_of(x: Array) -> AbstractContextManager[Any]:
    """Return a context in which new arrays live beside `x`."""
    if not is_device(x):
        return nullcontext()
    import cupy

    context: AbstractContextManager[Any] = cupy.cuda.Device(x.device.id)
    return context


def half_slices(order: str, intermediate_size: int) -> tuple[slice, slice]:
    """Return the rows of the gate half and of the up half of w13; the same rows for ``"up"``."""
    if order == "up":
        return slice(None), slice(None)
    if order.endswith("_interleaved"):
        first, second = slice(0, None, 2), slice(1, None, 2)
    else:
        first, second = slice(0, intermediate_size), slice(intermediate_size, None)
    return (first, second) if order.startswith("gate") else (second, first)


def gate_up_indices(
    num_rows: int, source: GateUpOrder, target: GateUpOrder, *, name: str = "num_rows"
) -> NDArray[np.int64]:
    """Return the gather list that turns w13 rows in order `source` into order `target`.

    ``converted[:, i] = w13[:, indices[i]]``.

    Parameters
    ----------
    num_rows : int
        Rows of w13, ``2 * intermediate_size``.
    source, target : GateUpOrder
    name : str
        What messages call the number of rows.

    Raises
    ------
    ValueError
        If `num_rows` is odd or an order is unknown.
    """
    num_rows = check_int(name, num_rows, 0)
    check_choice("source", source, GATE_UP_ORDERS)
    check_choice("target", target, GATE_UP_ORDERS)
    if num_rows % 2:
        raise ValueError(f"{name}: expected an even number of gate and up rows, got {num_rows}")
    rows = np.arange(num_rows, dtype=np.int64)
    indices = np.empty_like(rows)
    for to, of in zip(
        half_slices(target, num_rows // 2), half_slices(source, num_rows // 2), strict=True
    ):
        indices[to] = rows[of]
    return indices


def row_shuffle_indices(
    num_rows: int, epilogue_tile_m: int, *, name: str = "num_rows"
) -> NDArray[np.int64]:
    """Return the gather list of FlashInfer's row shuffle: the old row of each new row.

    Rows move within blocks of B = 32 rows if ``epilogue_tile_m % 128 == 0``, else 16:
    ``indices[b * B + n] = b * B + (n % 8) * (B // 8) + n // 8``.

    Parameters
    ----------
    num_rows : int
        A multiple of B.
    epilogue_tile_m : int
        Rows of the epilogue tile the shuffle is made for.
    name : str
        What messages call the number of rows.

    Raises
    ------
    ValueError
        If `num_rows` is not a multiple of the block.

    Examples
    --------
    >>> row_shuffle_indices(16, 64).tolist()
    [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
    """
    num_rows = check_int(name, num_rows, 0)
    epilogue_tile_m = check_int("epilogue_tile_m", epilogue_tile_m, 1)
    block = 32 if epilogue_tile_m % 128 == 0 else 16
    if num_rows % block:
        raise ValueError(
            f"{name}: expected a multiple of {block} rows with epilogue_tile_m = "
            f"{epilogue_tile_m}, got {num_rows}"
        )
    new = np.arange(num_rows, dtype=np.int64)
    offset = new % block
    return new - offset + (offset % 8) * (block // 8) + offset // 8


def inverse(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the gather list that undoes a row permutation."""
    undo = np.empty_like(indices)
    undo[indices] = np.arange(len(indices), dtype=np.int64)
    return undo


def check_weight(w: Any, name: str) -> Array:
    """Return `w` as a native array in one of the two layouts, told apart by rank, or raise."""
    dtypes = (FP8,) if dtype_name(w) == FP8 else tuple(d for d in DTYPES if d != FP8)
    w = as_native(w, name, dtypes, contiguous=False)
    if w.ndim not in (3, 4):
        raise ValueError(
            f"{name}: expected (num_experts, m, k) or (num_experts, k / bk, m, bk), got shape "
            f"{tuple(w.shape)}"
        )
    if w.ndim == 4 and w.shape[3] != block_elems(w):
        raise ValueError(
            f"{name}: expected blocks of {BLOCK_BYTES} bytes, {block_elems(w)} elements of "
            f"{dtype_name(w)}, got {w.shape[3]} (shape {tuple(w.shape)})"
        )
    return w


def num_rows_of(w: Array) -> int:
    """Return the rows m of a weight array in either layout."""
    return int(w.shape[w.ndim - 2])


def row_view(w: Array, blocks: int) -> Array:
    """View a weight array as words of shape (num_experts, m, blocks, k / blocks)."""
    if w.ndim == 4:
        return words(w).transpose(0, 2, 1, 3)
    return words(w).reshape(w.shape[0], w.shape[1], blocks, w.shape[2] // blocks)


def rearrange(
    w: Any,
    *,
    rows: NDArray[np.int64] | None = None,
    layout: WeightLayout | None = None,
    out: Any = None,
    name: str = "w",
) -> Array:
    """Gather rows and change the layout of expert weights in one pass.

    ``out[e] = w[e][rows]`` in MajorK terms.

    Parameters
    ----------
    w : array, shape (num_experts, m, k) or (num_experts, k / bk, m, bk), any strides
        Any dtype of 1, 2 or 4 bytes.
    rows : numpy.ndarray, int64, shape (new_m,), optional
        Source row of each result row; all rows in order by default.
    layout : WeightLayout, optional
        Layout of the result; that of `w` by default.
    out : array, C-contiguous, optional
        Receives the result. It may be `w` itself, or `w` seen in the shape of the result.
    name : str
        What messages call `w`.

    Returns
    -------
    array
        `out`, or a new array of the dtype and place of `w`.

    Raises
    ------
    ValueError, TypeError
        If k is not a multiple of the block when the layout changes, or `out` does not fit.

    Notes
    -----
    Temporary memory is one expert. Device work is queued on the current stream.
    """
    w = check_weight(w, name)
    source = "major_k" if w.ndim == 3 else "block_major_k"
    target = source if layout is None else check_choice("layout", layout, WEIGHT_LAYOUTS)
    bk = block_elems(w)
    k = int(w.shape[2]) if w.ndim == 3 else int(w.shape[1]) * bk
    if target == "block_major_k" and k % bk:
        raise ValueError(
            f"{name}: expected k to be a multiple of {bk} ({BLOCK_BYTES} bytes of {dtype_name(w)}) "
            f"for layout 'block_major_k', got {k}"
        )
    blocks = 1 if target == source == "major_k" else k // bk
    m = num_rows_of(w) if rows is None else len(rows)
    shape = (w.shape[0], m, k) if target == "major_k" else (w.shape[0], k // bk, m, bk)
    with on_device_of(w):
        if out is None:
            out = empty(w, shape, dtype_name(w))
            in_place = False
        else:
            out, in_place = _check_out(out, w, shape, name)
        if out.size:
            gather = rows if rows is None or not is_device(w) else to_device(rows)
            _copy_rows(row_view(w, blocks), row_view(out, blocks), gather, in_place)
    return out


def _copy_rows(source: Array, target: Array, gather: Array | None, in_place: bool) -> None:
    for e in range(source.shape[0]):
        if gather is not None:
            target[e] = source[e][gather]
        else:
            target[e] = source[e].copy() if in_place else source[e]


def to_device(x: NDArray[Any]) -> Array:
    """Copy a NumPy array to CuPy's current device."""
    import cupy

    return cupy.asarray(x)


def slice_k(w: Array, start: int, stop: int) -> Array:
    """Copy columns `start` to ``stop - 1`` of weights; whole blocks in BlockMajorK."""
    if w.ndim == 4:
        bk = block_elems(w)
        part = words(w)[:, start // bk : stop // bk]
    else:
        part = words(w)[:, :, start:stop]
    with on_device_of(w):
        return part.copy().view(w.dtype)


def _check_out(out: Any, w: Array, shape: tuple[int, ...], name: str) -> tuple[Array, bool]:
    """Check `out`; returns it and whether it is the memory of `w` itself."""
    out = as_native(out, "out", (dtype_name(w),), shape=shape, writable=True)
    same_place({name: w, "out": out})
    if not overlaps(out, w):
        return out, False
    whole = w.flags.c_contiguous and out.nbytes == w.nbytes
    if not (whole and address(out) == address(w)):
        raise ValueError(f"out: expected memory of its own or exactly that of {name}, got a part")
    return out, True


def to_block_major_k(w: Array, *, out: Array | None = None) -> Array:
    """Convert MajorK weights to BlockMajorK: ``out[e, b, i, j] = w[e, i, b * bk + j]``.

    Parameters
    ----------
    w : array, shape (num_experts, m, k)
        ``k`` is a multiple of ``bk = 128 / itemsize``.
    out : array, shape (num_experts, k / bk, m, bk), C-contiguous, optional
        May be the memory of `w`.

    Raises
    ------
    ValueError, TypeError
        If `w` is not MajorK, ``k`` is not a multiple of bk, or `out` does not fit.
    """
    return rearrange(_expect_rank(w, 3), layout="block_major_k", out=out)


def to_major_k(w: Array, *, out: Array | None = None) -> Array:
    """Undo :func:`to_block_major_k`; `w` and `out` exchange their shapes.

    Raises
    ------
    ValueError, TypeError
        If `w` is not BlockMajorK or `out` does not fit.
    """
    return rearrange(_expect_rank(w, 4), layout="major_k", out=out)


def _expect_rank(w: Any, ndim: int) -> Array:
    w = check_weight(w, "w")
    if w.ndim != ndim:
        wanted = "(num_experts, m, k)" if ndim == 3 else "(num_experts, k / bk, m, bk)"
        raise ValueError(f"w: expected shape {wanted}, got {tuple(w.shape)}")
    return w


def shuffle_rows(w: Array, epilogue_tile_m: int, *, out: Array | None = None) -> Array:
    """Shuffle the rows of weights in either layout as FlashInfer does.

    ``out[e, i] = w[e, row_shuffle_indices(m, epilogue_tile_m)[i]]``, see
    :func:`row_shuffle_indices`. `out` has the shape of `w` and may be `w`.

    Raises
    ------
    ValueError, TypeError
        If m is not a multiple of the shuffle's block, or `out` does not fit.
    """
    w = check_weight(w, "w")
    return rearrange(
        w, rows=row_shuffle_indices(num_rows_of(w), epilogue_tile_m, name="w"), out=out
    )


def unshuffle_rows(w: Array, epilogue_tile_m: int, *, out: Array | None = None) -> Array:
    """Undo :func:`shuffle_rows`; same arguments, result and errors."""
    w = check_weight(w, "w")
    shuffle = row_shuffle_indices(num_rows_of(w), epilogue_tile_m, name="w")
    return rearrange(w, rows=inverse(shuffle), out=out)


def convert_gate_up_order(
    w13: Array, source: GateUpOrder, target: GateUpOrder, *, out: Array | None = None
) -> Array:
    """Change the gate/up order of the rows of w13, in either layout.

    Its inverse is the same call with `source` and `target` exchanged. `out` has the shape of `w13`
    and may be `w13`. Block scales stay valid if passed through :func:`convert_gate_up_scale`.

    Raises
    ------
    ValueError, TypeError
        If the number of rows is odd, an order is unknown, or `out` does not fit.
    """
    w13 = check_weight(w13, "w13")
    rows = gate_up_indices(num_rows_of(w13), source, target, name="w13")
    return rearrange(w13, rows=rows, out=out, name="w13")


def convert_gate_up_scale(
    w13_scale: Array, source: GateUpOrder, target: GateUpOrder, *, out: Array | None = None
) -> Array:
    """Change the block scales of w13 along with :func:`convert_gate_up_order`.

    Scales are always in halves, the first half for what the order names first, whether the rows are
    interleaved or not; so the halves change places exactly when the first name changes.

    Parameters
    ----------
    w13_scale : array, float32, shape (num_experts, 2 * ceil(intermediate_size / 128), k_blocks)
    source, target : GateUpOrder
    out : array, same shape, C-contiguous, optional
        May be `w13_scale`.

    Raises
    ------
    ValueError, TypeError
        If the number of block rows is odd, an order is unknown, or `out` does not fit.
    """
    w13_scale = as_native(w13_scale, "w13_scale", ("float32",), ndim=3, contiguous=False)
    rows = gate_up_indices(
        int(w13_scale.shape[1]),
        _plain(source, "source"),
        _plain(target, "target"),
        name="w13_scale",
    )
    return rearrange(w13_scale, rows=rows, out=out, name="w13_scale")


def _plain(order: str, name: str) -> GateUpOrder:
    """Return the order without its interleave."""
    check_choice(name, order, GATE_UP_ORDERS)
    return "gate_up" if order.startswith("gate") else "up_gate"


def flashinfer_w13_indices(
    num_rows: int,
    recipe: str,
    gate_up_order: GateUpOrder,
    *,
    shuffled: bool = True,
    interleaved: bool | None = None,
) -> NDArray[np.int64]:
    """Return the gather list from w13 rows in `gate_up_order` to FlashInfer's rows.

    Up first; then interleaved, if the recipe's kernels want that; then shuffled: the parts compose
    as ``interleave[shuffle]``.

    Parameters
    ----------
    num_rows : int
        Rows of w13, ``2 * intermediate_size``.
    recipe : {"bf16", "fp8_block", "fp8_tensor"}
        Says by :data:`FLASHINFER_ROWS` whether rows are interleaved and for which tile shuffled.
    gate_up_order : GateUpOrder
        Order on the plain side.
    shuffled : bool
        FlashInfer's ``use_shuffled_weight``.
    interleaved : bool, optional
        Overrides the recipe's entry.

    Raises
    ------
    ValueError, TypeError
        If an argument is unknown or `num_rows` fits no shuffle block.
    """
    by_recipe, tile = FLASHINFER_ROWS[check_choice("recipe", recipe, tuple(FLASHINFER_ROWS))]
    check_choice("gate_up_order", gate_up_order, GATE_UP_ORDERS)
    interleave = by_recipe if interleaved is None else interleaved
    order: GateUpOrder = "up_gate_interleaved" if interleave else "up_gate"
    indices = gate_up_indices(num_rows, gate_up_order, order, name="w13")
    return indices[row_shuffle_indices(num_rows, tile, name="w13")] if shuffled else indices


def to_flashinfer_w13(
    w13: Array,
    recipe: str,
    gate_up_order: GateUpOrder,
    *,
    shuffled: bool = True,
    interleaved: bool | None = None,
    out: Array | None = None,
) -> Array:
    """Permute the rows of w13 from `gate_up_order` into what FlashInfer's kernels of `recipe` read.

    See :func:`flashinfer_w13_indices` for the arguments. Works in either layout, on axis m; `out`
    has the shape of `w13` and may be `w13`. FlashInfer's scales are those of order ``"up_gate"``.
    """
    w13 = check_weight(w13, "w13")
    rows = flashinfer_w13_indices(
        num_rows_of(w13), recipe, gate_up_order, shuffled=shuffled, interleaved=interleaved
    )
    return rearrange(w13, rows=rows, out=out, name="w13")


def from_flashinfer_w13(
    w13: Array,
    recipe: str,
    gate_up_order: GateUpOrder,
    *,
    shuffled: bool = True,
    interleaved: bool | None = None,
    out: Array | None = None,
) -> Array:
    """Undo :func:`to_flashinfer_w13`; the rows of the result are in `gate_up_order`."""
    w13 = check_weight(w13, "w13")
    rows = flashinfer_w13_indices(
        num_rows_of(w13), recipe, gate_up_order, shuffled=shuffled, interleaved=interleaved
    )
    return rearrange(w13, rows=inverse(rows), out=out, name="w13")


def to_flashinfer_w2(w2: Array, recipe: str, *, out: Array | None = None) -> Array:
    """Shuffle the rows of w2, in either layout, as FlashInfer's kernels of `recipe` read them."""
    check_choice("recipe", recipe, tuple(FLASHINFER_ROWS))
    return shuffle_rows(w2, FLASHINFER_ROWS[recipe][1], out=out)


def from_flashinfer_w2(w2: Array, recipe: str, *, out: Array | None = None) -> Array:
    """Undo :func:`to_flashinfer_w2`."""
    check_choice("recipe", recipe, tuple(FLASHINFER_ROWS))
    return unshuffle_rows(w2, FLASHINFER_ROWS[recipe][1], out=out)
