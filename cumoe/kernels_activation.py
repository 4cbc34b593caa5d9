"""The host side of the activation kernel: how its work is cut, its constants and its launch.

As ``kernels.py``, for ``activation.cu`` alone.
"""

from __future__ import annotations

from typing import Any

from cumoe.arrays import DTYPES, address, dtype_name
from cumoe.config import Activation, Array, Permutation
from cumoe.formulas import PARAMETERS
from cumoe.kernels import (
    TYPES,
    Launch,
    activation_fields,
    blocks,
    is_plain,
    make,
    scale_strides,
    with_activation,
)
from cumoe.launch import KernelSpec

THREADS = 128
UNITS_PER_BLOCK = THREADS // 8  # kLanes

BLOCKS_PER_SM: dict[int, dict[int, int]] = {
    1: {1: 10, 2: 8, 4: 6},
    2: {1: 10, 2: 6},
    4: {1: 5},
}
"""Bytes of an input element -> rows of a unit -> blocks of the grid per SM, which bound the
kernel's registers. H200, 2048 columns, us for rows x blocks: fp8, 32768 / 131072 rows in order 1x10
63 / 245, 1x12 (spills) 64 / 271, 2x6 65 / 250, 2x8 62 / 241, 2x10 (spills) 78 / 304, 4x4 65 / 249,
4x5 63 / 242, 4x6 62 / 233; bf16, at 256 / 4096 / 16384 tokens of DeepSeek-V3 1x8 8.2 / 89.8 / 335,
1x10 6.8 / 89.9 / 343, 2x6 8.9 / 90.1 / 340."""

WAVES = 16
"""Units that each group of lanes must have before a unit takes more rows."""

LIGHT = ("swiglu", "geglu_tanh", "relu2", "silu", "identity")
"""Activations whose arithmetic fits those registers."""

HEAVY_BLOCKS_PER_SM = 3
"""For the others, a user's among them: as many registers as they may need."""


def activation_spec(
    input_dtype: str,
    output_dtype: str,
    activation: Activation,
    *,
    gate_up_order: str | None,
    rows: int,
) -> KernelSpec:
    """Return the kernel for two dtypes, an activation, an order, and the rows of a unit."""
    order = gate_up_order or ""
    interleaved = (1 if order.startswith("gate") else 2) if order.endswith("interleaved") else 0
    element_bytes = DTYPES[input_dtype].itemsize
    spec = KernelSpec(
        "activation",
        (
            ("INPUT_TYPE", TYPES[input_dtype]),
            ("OUTPUT_TYPE", TYPES[output_dtype]),
            ("GATED", int(gate_up_order is not None)),
            ("INTERLEAVED", interleaved),
            ("SILU", int(activation.name == "swiglu" and is_plain(activation))),
            ("ROWS", rows),
            ("BLOCKS_PER_SM", blocks_per_sm(activation, element_bytes, rows)),
        ),
        # Each operation is rounded on its own, so that the rows of a unit change no bit.
        fmad=False,
    )
    return with_activation(spec, activation)


def blocks_per_sm(activation: Activation, element_bytes: int, rows: int) -> int:
    """Return the blocks of the grid per SM."""
    light = BLOCKS_PER_SM[element_bytes][rows]
    return light if activation.name in LIGHT else min(light, HEAVY_BLOCKS_PER_SM)


def select_rows(num_rows: int, num_blocks: int, element_bytes: int, num_sms: int) -> int:
    """Return the rows of a unit: as many as leave every SM several times its full number of blocks.

    Parameters
    ----------
    num_rows, num_blocks : int
        Rows or slots that the kernel walks, and blocks of 128 columns of each.
    element_bytes : int
        Of the input.
    num_sms : int
        Of the device that runs the kernel.
    """
    for rows, per_sm in sorted(BLOCKS_PER_SM[element_bytes].items(), reverse=True):
        units = -(-num_rows // rows) * num_blocks
        if units >= WAVES * per_sm * UNITS_PER_BLOCK * num_sms:
            return rows
    return 1


def activation(
    x: Array,
    x_scale: Array | None,
    y: Array,
    y_scale: Array | None,
    *,
    gate_up_order: str | None,
    activation: Activation,
    permutation: Permutation | None,
    num_sms: int,
    rows: int | None = None,
) -> Launch:
    """Launch for the activation of (num_rows, intermediate_size), or twice as wide with an order.

    `rows` overrides :func:`select_rows`.
    """
    num_rows, intermediate_size = y.shape
    num_blocks = blocks(intermediate_size)
    walked = num_rows
    tables: dict[str, Any] = {}
    if permutation is not None:
        num_slots = int(permutation.permuted_idx.size)
        # The kernel walks the slots unless there are fewer rows: at most so many of either.
        walked = max(1, min(num_rows, num_slots))
        num_local = int(permutation.tokens_per_expert.shape[0])
        tables = {
            "num_held_rows": address(permutation.expert_offsets) + 4 * num_local,
            "token_idx": permutation.token_idx,
            "permuted_idx": permutation.permuted_idx,
            "num_slots": num_slots,
            "tile": permutation.tile,
        }
        if any(hasattr(activation.value(name), "shape") for name in PARAMETERS):
            tables["tile_expert"] = permutation.tile_expert
    if rows is None:
        rows = select_rows(walked, num_blocks, x.dtype.itemsize, num_sms)
    spec = activation_spec(
        dtype_name(x), dtype_name(y), activation, gate_up_order=gate_up_order, rows=rows
    )
    per_sm = blocks_per_sm(activation, x.dtype.itemsize, rows)
    units = -(-walked // rows) * num_blocks
    grid = min(-(-units // UNITS_PER_BLOCK), per_sm * num_sms)
    group_step, block_step = divmod(grid * UNITS_PER_BLOCK, num_blocks)
    x_row, x_block = scale_strides(x_scale)
    y_row, y_block = scale_strides(y_scale)
    return make(
        spec,
        (grid, 1, 1),
        THREADS,
        x=x,
        x_scale=x_scale,
        y=y,
        y_scale=y_scale,
        x_scale_row_stride=x_row,
        x_scale_block_stride=x_block,
        y_scale_row_stride=y_row,
        y_scale_block_stride=y_block,
        num_rows=num_rows,
        intermediate_size=intermediate_size,
        num_blocks=num_blocks,
        first_half=int(gate_up_order is not None and not gate_up_order.startswith("gate")),
        group_step=group_step,
        block_step=block_step,
        activation=activation_fields(activation),
        **tables,
    )
