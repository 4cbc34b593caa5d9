"""The host side of the Hopper grouped GEMM: tensor maps, compile-time constants and launches.

As ``kernels.py``, for sm_90a only. A launch's tensor maps hold the addresses of its arrays;
gathered rows are read through a plain pointer, so a call may bring its own tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cumoe.arrays import address, zeros
from cumoe.config import Activation, Array, Permutation
from cumoe.kernels import (
    TYPES,
    GemmOperand,
    Launch,
    TokenWeights,
    activation_fields,
    make,
    scale_strides,
    weights_type,
)
from cumoe.launch import KernelSpec, encode_tiled
from cumoe.tuning import (
    ROW_BYTES,
    SM90_ROWS,
    GroupedGemmProblem,
    Sm90Config,
    sm90_smem_bytes,
)


def grouped_gemm_spec(problem: GroupedGemmProblem, config: Sm90Config) -> KernelSpec:
    """Return the Hopper grouped GEMM for a problem and a configuration."""
    blocks = problem.dtype == "float8_e4m3fn"  # scales of blocks
    types = (("TYPE", TYPES[problem.dtype]), ("WEIGHTS_TYPE", weights_type(problem)))
    name = "sm90_fp8_rows_grouped_gemm" if config.block_n == SM90_ROWS else "sm90_fp8_grouped_gemm"
    return KernelSpec(
        name if blocks else "sm90_grouped_gemm",
        (
            *(() if blocks else types),
            ("GATED", int(problem.gated)),
            ("ACTIVATED", int(problem.gated or problem.activated)),
            ("GATHER", int(problem.gather)),
            ("BLOCK_N", config.block_n),
            ("NUM_STAGES", config.num_stages),
            ("LOAD_STAGES", config.load_stages),
            ("NUM_CHUNKS", config.num_chunks),
            ("CLUSTER", config.cluster),
        ),
    )


def rows_map(rows: Array, box_rows: int) -> np.ndarray:
    """Encode tokens or finished rows in boxes of `box_rows` rows and 128 bytes."""
    row_bytes = rows.shape[1] * rows.dtype.itemsize
    return encode_tiled(
        address(rows),
        np.uint8,
        (rows.shape[0], row_bytes),
        (row_bytes, 1),
        (box_rows, ROW_BYTES),
        swizzle="128B",
    )


def weight_map(operand: GemmOperand, load_stages: int = 1) -> np.ndarray:
    """Encode a weight as (experts, halves, rows, k-blocks, bytes of k) in boxes of 128 rows."""
    w = operand.values
    fields = operand.fields()
    row, block = fields["b_row_bytes"], fields["b_block_bytes"]
    gated = operand.gate_up_order is not None
    halves, rows = (2, operand.num_rows // 2) if gated else (1, operand.num_rows)
    step = fields["row_step"]
    half = row * max(fields.get("first_row", 0), fields.get("up_row", 0)) if gated else row
    if operand.block_major:
        k_shape = (fields["k_bytes"] // ROW_BYTES, ROW_BYTES)
    else:
        k_shape, block = (1, fields["k_bytes"]), row
    return encode_tiled(
        address(w),
        np.uint8,
        (max(w.shape[0], 1), halves, rows, *k_shape),
        (fields["b_expert_bytes"], half, row * step, block, 1),
        (1, 1, 128, 1, ROW_BYTES),
        swizzle="128B",
        # The next 128 bytes of a row come into L2 too, unless they are loaded as well or those
        # behind are another row's.
        l2_promotion="128B" if operand.block_major or load_stages > 1 else "256B",
    )


def grouped_gemm(
    a: Array,
    a_scale: Array | None,
    operand: GemmOperand,
    out: Array,
    out_scale: Array | None,
    permutation: Permutation,
    problem: GroupedGemmProblem,
    config: Sm90Config,
    activation: Activation,
    num_sms: int,
    token_weights: TokenWeights | None = None,
    queue: Array | None = None,
) -> Launch:
    """Launch for ``out[i] = epilogue(a[source(i)] @ w[e(i)].T)``.

    `queue` are two int32 of the launch's own, zeros before and after it; by default new ones.
    """
    if queue is None:
        queue = zeros(a, (2,), "int32")
    gated = problem.gated
    n = out.shape[1]
    column_tiles = -(-n // (128 if gated else 256))
    num_clusters = min(num_sms // config.cluster, permutation.max_tiles * column_tiles)
    fields: dict[str, Any] = operand.fields()
    tensors = operand.scale is not None and operand.scale.ndim == 2
    # Without a gate the second half is the next block of rows; a tensor has one scale for all.
    up_scale_row = fields["up_scale_row"] if gated else int(not tensors)
    gate_first = gated and fields["first_row"] == 0
    a_row, a_block = scale_strides(a_scale)
    out_row, out_block = scale_strides(out_scale)
    spec = grouped_gemm_spec(problem, config)
    maps: dict[str, Any] = {}
    if not problem.gather:
        halves = config.block_n > 64 and config.block_n % 16 == 0
        maps["a_map"] = rows_map(a, config.block_n // 2 if halves else config.block_n)  # kBoxRows
        if problem.output_dtype == "bfloat16":  # kChunkTokens
            maps["out_map"] = rows_map(out, 64 if spec.name.startswith("sm90_fp8_rows") else 32)
    launch = make(
        spec,
        (num_clusters * config.cluster, 1, 1),
        384,
        smem_bytes=sm90_smem_bytes(config, problem),
        **maps,
        a=a,
        w_map=weight_map(operand, config.load_stages),
        a_scale=a_scale,
        w_scale=operand.scale,
        out=out,
        out_scale=out_scale,
        token_idx=permutation.token_idx,
        tile_expert=permutation.tile_expert,
        expert_offsets=permutation.expert_offsets,
        tokens_per_expert=permutation.tokens_per_expert,
        num_tiles=permutation.num_tiles,
        queue=queue,
        a_scale_row_stride=a_row,
        a_scale_block_stride=a_block,
        out_scale_row_stride=out_row,
        out_scale_block_stride=out_block,
        n=n,
        k_bytes=operand.k * a.dtype.itemsize,
        tile=permutation.tile,
        num_column_tiles=column_tiles,
        w_scale_rows=fields["b_scale_rows"] if a_scale is not None else 0,
        first_half=0 if gate_first or not gated else 1,
        first_scale_row=fields["gate_scale_row"],
        second_scale_row=up_scale_row,
        block_major=int(operand.block_major),
        activation=activation_fields(activation),
        **(token_weights.fields() if token_weights is not None else {}),
    )
    launch.owned = (queue,)
    return launch
