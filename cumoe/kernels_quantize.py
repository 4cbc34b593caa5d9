"""The host side of the quantisation kernels: how work is cut, constants and launches.

As ``kernels.py``, for the quantisers of activations and weights.
"""

from __future__ import annotations

from cumoe.arrays import DTYPES, dtype_name
from cumoe.config import Array
from cumoe.kernels import TYPES, Launch, blocks, make, scale_strides
from cumoe.launch import KernelSpec
from cumoe.microscaling import FP4_GROUP, fp4_scale_shape, round_up, ue8m0_words

THREADS = 128
LANE_ELEMS = 16
"""Neighbouring elements that a thread holds of a row."""

UNIT_ROWS = {2: 4, 4: 2}
"""Bytes of an input element -> the rows that a thread of nvfp4, or the chunks that one of
fp8_tensor, holds at most. H200, (4096, 7168) / (16384, 7168) bfloat16, us for 1, 2, 4: nvfp4 24.5,
23.5, 23.1 / 91.5, 85.9, 81.5; fp8_tensor with its scale to find 39.5, 39.1, 38.4 / 144.6, 144.0,
143.6. The others have one row: fp8_block 22.5, 22.9, 23.5 / 84.4, 84.0, 84.5, fp8_ue8m0 21.8, 22.4,
22.9 / 81.8, 82.6, 83.4."""

MIN_THREADS = 1 << 17
"""Threads that a launch must have left before each takes more rows: about as many as an H200 holds
at a time with 64 registers each."""

ROW_VECTORS = {2: 8, 4: 4}
"""Bytes of an input element -> vectors of eight that a thread holds of a row with one scale."""

AMAX_BLOCKS_PER_SM = 2


def select_rows(num_rows: int, lanes: int, element_bytes: int) -> int:
    """Return the rows of a unit: several where enough threads are left.

    Parameters
    ----------
    num_rows : int
    lanes : int
        Threads that one row takes.
    element_bytes : int
        Of the input.
    """
    rows = UNIT_ROWS[element_bytes]
    return rows if -(-num_rows // rows) * lanes >= MIN_THREADS else 1


def _grid(num_rows: int, rows: int, lanes: int) -> tuple[int, int, int]:
    """Return the blocks for units of `rows` rows by one thread."""
    return (-(-(-(-num_rows // rows) * lanes) // THREADS), 1, 1)


def block_spec(input_dtype: str, permuted: bool = False) -> KernelSpec:
    """Return the 1 x 128 quantiser for an input dtype, of rows as they are or permuted."""
    defines = (("INPUT_TYPE", TYPES[input_dtype]), ("PERMUTED", int(permuted)))
    return KernelSpec("quantize_fp8_block", defines)


def quantize_fp8_block(
    x: Array, values: Array, scale: Array, permuted_idx: Array | None = None
) -> Launch:
    """Launch for 1 x 128 quantisation of a 2-D array.

    With `permuted_idx`, (num_rows, slots), row i goes to all rows ``permuted_idx[i]`` but -1.
    """
    num_rows, num_columns = x.shape
    row_stride, block_stride = scale_strides(scale)
    return make(
        block_spec(dtype_name(x), permuted_idx is not None),
        _grid(num_rows, 1, blocks(num_columns) * (128 // LANE_ELEMS)),
        THREADS,
        x=x,
        values=values,
        scale=scale,
        scale_row_stride=row_stride,
        scale_block_stride=block_stride,
        num_rows=num_rows,
        num_columns=num_columns,
        num_blocks=blocks(num_columns),
        permuted_idx=permuted_idx,
        slots=0 if permuted_idx is None else permuted_idx.shape[1],
    )


def quantize_fp8_weights(w: Array, values: Array, scale: Array) -> Launch:
    """Launch for 128 x 128 quantisation of (num_experts, n, k) matrices."""
    num_experts, n, k = w.shape
    return make(
        KernelSpec("quantize_fp8_weights", (("INPUT_TYPE", TYPES[dtype_name(w)]),)),
        (blocks(k), blocks(n), num_experts),
        256,
        w=w,
        values=values,
        scale=scale,
        input_expert_stride=n * k,
        values_expert_stride=n * k,
        scale_expert_stride=blocks(n) * blocks(k),
        n=n,
        k=k,
    )


def token_spec(input_dtype: str, num_columns: int) -> KernelSpec:
    """Return the quantiser with a scale per row for an input dtype and a width."""
    vectors = max(1, -(-num_columns // 8))
    most = ROW_VECTORS[DTYPES[input_dtype].itemsize]
    threads = min(1024, max(32, 1 << (-(-vectors // most) - 1).bit_length()))
    return KernelSpec(
        "quantize_fp8_token",
        (
            ("INPUT_TYPE", TYPES[input_dtype]),
            ("ROW_THREADS", threads),
            ("VECTORS", min(most, -(-vectors // threads))),
        ),
    )


def quantize_fp8_token(x: Array, values: Array, scale: Array) -> Launch:
    """Launch for quantisation of a 2-D array with a scale per row."""
    num_rows, num_columns = x.shape
    spec = token_spec(dtype_name(x), num_columns)
    constants = dict(spec.defines)
    threads = int(constants["ROW_THREADS"])
    block = max(THREADS, threads)
    piece = threads * int(constants["VECTORS"]) * 8
    return make(
        spec,
        (-(-num_rows // (block // threads)), 1, 1),
        block,
        x=x,
        values=values,
        scale=scale,
        num_rows=num_rows,
        num_columns=num_columns,
        num_pieces=max(1, -(-num_columns // piece)),
    )


def tensor_amax(x: Array, partials: Array) -> Launch:
    """Launch for the largest magnitude of an array, in as many parts as `partials` holds."""
    return make(
        KernelSpec("tensor_amax", (("INPUT_TYPE", TYPES[dtype_name(x)]),)),
        (int(partials.size), 1, 1),
        512,
        x=x,
        partials=partials,
        num_elems=x.size,
    )


def tensor_spec(input_dtype: str, rows: int, permuted: bool = False) -> KernelSpec:
    """Return the quantiser with one scale for an input dtype and the chunks of a thread."""
    defines = (("INPUT_TYPE", TYPES[input_dtype]), ("ROWS", rows), ("PERMUTED", int(permuted)))
    return KernelSpec("quantize_fp8_tensor", defines)


def quantize_fp8_tensor(
    x: Array,
    values: Array,
    scale: Array,
    partials: Array | None,
    permuted_idx: Array | None = None,
    *,
    rows: int | None = None,
) -> Launch:
    """Launch for quantisation with one scale: read, or made of `partials` and written.

    With `permuted_idx`, (num_rows, slots), row i goes to all rows ``permuted_idx[i]`` but -1.
    """
    permuted = permuted_idx is not None
    num_rows, num_columns = x.shape if permuted else (1, x.size)
    lanes = num_rows * -(-num_columns // LANE_ELEMS)
    rows = rows or (1 if permuted else select_rows(lanes, 1, x.dtype.itemsize))
    return make(
        tensor_spec(dtype_name(x), rows, permuted),
        _grid(lanes, rows, 1),
        THREADS,
        x=x,
        values=values,
        scale=scale,
        partials=partials,
        num_rows=num_rows,
        num_columns=num_columns,
        permuted_idx=permuted_idx,
        slots=permuted_idx.shape[1] if permuted_idx is not None else 0,
        num_partials=0 if partials is None else partials.size,
    )


def ue8m0_spec(input_dtype: str, group_size: int) -> KernelSpec:
    """Return the quantiser with UE8M0 groups for an input dtype and a group size."""
    defines = (("INPUT_TYPE", TYPES[input_dtype]), ("GROUP", group_size))
    return KernelSpec("quantize_fp8_ue8m0", defines)


def quantize_fp8_ue8m0(x: Array, values: Array, scale: Array, group_size: int) -> Launch:
    """Launch for quantisation of a 2-D array with UE8M0 groups."""
    num_rows, num_columns = x.shape
    num_words, word_stride = ue8m0_words(x.shape, group_size)
    return make(
        ue8m0_spec(dtype_name(x), group_size),
        _grid(word_stride, 1, num_words * (4 * group_size // LANE_ELEMS)),
        THREADS,
        x=x,
        values=values,
        scale=scale,
        word_stride=word_stride,
        num_rows=num_rows,
        num_columns=num_columns,
        num_words=num_words,
    )


def nvfp4_spec(input_dtype: str, rows: int, layout: str) -> KernelSpec:
    """Return the nvfp4 quantiser for an input dtype, a unit and an order of the scales."""
    swizzled = int(layout != "linear")
    defines = (("INPUT_TYPE", TYPES[input_dtype]), ("ROWS", rows), ("SWIZZLED", swizzled))
    return KernelSpec("quantize_nvfp4", defines)


def quantize_nvfp4(
    x: Array,
    values: Array,
    scale: Array,
    global_scale: Array,
    partials: Array | None,
    layout: str,
    *,
    rows: int | None = None,
) -> Launch:
    """Launch for nvfp4: the global scale is read, or made of `partials` and written."""
    num_rows, num_columns = x.shape
    scale_rows, scale_groups = fp4_scale_shape(x.shape, layout)
    rows = rows or select_rows(num_rows, num_columns // FP4_GROUP, x.dtype.itemsize)
    return make(
        nvfp4_spec(dtype_name(x), rows, layout),
        _grid(round_up(scale_rows, rows), rows, scale_groups),
        THREADS,
        x=x,
        values=values,
        scale=scale,
        global_scale=global_scale,
        partials=partials,
        num_rows=num_rows,
        scale_rows=scale_rows,
        num_columns=num_columns,
        scale_groups=scale_groups,
        num_partials=0 if partials is None else partials.size,
    )
