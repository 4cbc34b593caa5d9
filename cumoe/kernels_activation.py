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
    1: {1: 10, 2: 8, 4: 7},
    2: {1: 10},
    4: {1: 5},
}
"""Bytes of an input element -> rows of a unit -> blocks that an SM holds, which bound the kernel's
registers."""

MIN_WAVES = {2: 2, 4: 8}
"""Rows of a unit -> how many times all SMs must be filled before a unit takes so many."""

MAX_WAVES = 8
"""Blocks of the grid, in the number that is resident at a time. Up to there a thread has two units,
of which it looks one up while it computes the other, and the GPU deals out blocks as SMs get free.

H200, DeepSeek-V3, us by MAX_WAVES of 1 / 2 / 4 / 8 / 16. fp8, rows x blocks, T = 16384: 1x10 251 /
245 / 240 / 235 / 235, 2x8 243 / 235 / 230 / 223 / 224, 4x6 238 / 237 / 233 / 224 / 225, 4x7 225 /
224 / 224 / 217 / 215; T = 4096: 4x7 62.5 / 60.8 / 57.8 / 57.5 / 61.8; T = 1024 by slots: 1x10 17.5
/ 17.9 / 18.0 / 19.4, 2x8 17.5 / 17.2 / 17.9, 4x7 18.3 / 18.5 / 18.3; T = 256: 1x10 7.1 / 6.8. bf16,
T = 16384: 1x10 340 / 336 / 334 / 326 / 321, 2x6 341 / 339 / 336 / 328 / 322; T = 4096: 1x10 85.9 /
85.0 / 82.6 / 80.8 / 80.5, 2x6 88.5 / 86.4 / 85.0 / 82.4 / 83.5."""

GRID_PERCENT = 60
"""Blocks of a grid of some waves, in those that have one unit for each thread. A little more than
half: the blocks that come last have one unit and the others two, so the SMs finish together.
H200, DeepSeek-V3, fp8, T = 4096, us by percent of 50 / 60 / 67 / 75: 57.8 / 57.0 / 57.2 / 57.5."""

LIGHT = ("swiglu", "geglu_tanh", "relu2", "silu", "identity")
"""Activations whose arithmetic fits those registers."""

PARAMETERS_BLOCKS_PER_SM = 8
"""For these with parameters."""

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
    most = BLOCKS_PER_SM[element_bytes][rows]
    if activation.name not in LIGHT:
        return min(most, HEAVY_BLOCKS_PER_SM)
    return most if is_plain(activation) else min(most, PARAMETERS_BLOCKS_PER_SM)


def select_rows(num_rows: int, num_blocks: int, element_bytes: int, num_sms: int) -> int:
    """Return the rows of a unit: the most that leave every SM :data:`MIN_WAVES` of blocks.

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
        if rows == 1 or _num_blocks(num_rows, num_blocks, rows) >= (
            MIN_WAVES[rows] * per_sm * num_sms
        ):
            break
    return rows


def _num_blocks(num_rows: int, num_blocks: int, rows: int) -> int:
    """Return the blocks in which every thread has one unit."""
    return -(-(-(-num_rows // rows) * num_blocks) // UNITS_PER_BLOCK)


def _grid(most: int, resident: int) -> int:
    """Return the blocks of the grid."""
    if most <= 2 * resident:
        return most
    return min(-(-most * GRID_PERCENT // 100), MAX_WAVES * resident)


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
        # It walks the slots, or at most a third more rows; only the device knows which.
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
    grid = _grid(_num_blocks(walked, num_blocks, rows), per_sm * num_sms)
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
