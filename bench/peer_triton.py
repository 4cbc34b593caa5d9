"""What surrounds the Triton kernel of :mod:`bench.triton_moe`: configurations, blocks of slots.

Pure functions over NumPy and frozen dataclasses; Triton is imported on the first launch. The tables
of slots are made on the host and are not part of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.shapes import Recipe

SCALE_BLOCK = 128


@dataclass(frozen=True)
class TritonConfig:
    """Tile sizes of the kernel, the rows of blocks that share weights, warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return "x".join(map(str, asdict(self).values()))


CONFIGS: dict[Recipe, tuple[TritonConfig, ...]] = {
    "fp8_block": (
        TritonConfig(16, 64, 128, 1, 4, 5),
        TritonConfig(16, 128, 128, 1, 4, 4),
        TritonConfig(32, 128, 128, 8, 4, 4),
        TritonConfig(64, 64, 128, 16, 4, 4),
        TritonConfig(64, 128, 128, 16, 4, 4),
        TritonConfig(64, 128, 128, 32, 4, 3),
        TritonConfig(128, 128, 128, 16, 8, 3),
        TritonConfig(128, 128, 128, 32, 4, 4),
        TritonConfig(128, 256, 128, 16, 8, 3),
    ),
    "bf16": (
        TritonConfig(16, 64, 128, 1, 4, 4),
        TritonConfig(16, 128, 128, 1, 4, 3),
        TritonConfig(32, 128, 64, 8, 4, 4),
        TritonConfig(64, 128, 64, 16, 4, 4),
        TritonConfig(64, 256, 64, 16, 8, 3),
        TritonConfig(128, 128, 64, 16, 8, 4),
        TritonConfig(128, 128, 64, 32, 4, 3),
        TritonConfig(128, 256, 64, 16, 8, 3),
    ),
}
"""Candidates of each recipe: what public tables for H100 and H200 choose most often."""


def why_illegal(config: TritonConfig, recipe: Recipe, n: int, k: int) -> str | None:
    """Return why the kernel cannot run a product with `config`, or None if it can."""
    if n % config.block_n:
        return f"n = {n} is no multiple of block_n = {config.block_n}"
    if k % config.block_k:
        return f"k = {k} is no multiple of block_k = {config.block_k}"
    if recipe == "fp8_block":
        if n % SCALE_BLOCK or k % SCALE_BLOCK:
            return f"n = {n}, k = {k}: expected whole scale blocks of {SCALE_BLOCK}"
        if SCALE_BLOCK % config.block_k:
            return f"block_k = {config.block_k} has more than one scale"
        if SCALE_BLOCK % config.block_n and config.block_n % SCALE_BLOCK:
            return f"block_n = {config.block_n} fits no whole scale blocks"
    return None


def candidates(recipe: Recipe, n: int, k: int, rows_per_expert: np.ndarray) -> list[TritonConfig]:
    """Return the configurations worth a try.

    Parameters
    ----------
    recipe : {"bf16", "fp8_block"}
    n, k : int
        Sizes of an expert's matrix.
    rows_per_expert : numpy.ndarray, int, shape (num_experts,)

    Returns
    -------
    list of TritonConfig
        Legal ones, without blocks lower than an eighth of the active experts' mean rows (weights
        would be read again and again) or higher than eight times what most rows' experts have
        (most of a block would be padding). The mean over rows and the mean over experts differ when
        routing is skewed.
    """
    active = rows_per_expert[rows_per_expert > 0].astype(np.int64)
    by_expert = float(active.mean())
    by_row = float((active * active).sum() / active.sum())
    heights = {config.block_m for config in CONFIGS[recipe]}
    low, high = min(by_expert / 8, max(heights)), max(8 * by_row, min(heights))
    return [
        config
        for config in CONFIGS[recipe]
        if why_illegal(config, recipe, n, k) is None and low <= config.block_m <= high
    ]


def block_slots(ids: np.ndarray, num_experts: int, block_m: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort slots ``t * top_k + j`` by expert and pad each expert's to whole blocks.

    Parameters
    ----------
    ids : numpy.ndarray, int32, shape (num_tokens, top_k)
        Each below `num_experts`.
    num_experts, block_m : int

    Returns
    -------
    slots : numpy.ndarray, int32, shape (num_blocks * block_m,)
        Ascending within an expert; ``ids.size`` in padding.
    experts : numpy.ndarray, int32, shape (num_blocks,)
        Of each block. An expert without slots has no block.

    Examples
    --------
    >>> slots, experts = block_slots(np.array([[2, 0], [2, 1], [0, 2]]), 4, 2)
    >>> slots.tolist(), experts.tolist()
    ([1, 4, 3, 6, 0, 2, 5, 6], [0, 1, 2, 2])
    """
    flat = ids.ravel()
    counts = np.bincount(flat, minlength=num_experts)
    blocks = -(-counts // block_m)
    starts = np.cumsum(blocks) - blocks
    order = np.argsort(flat, kind="stable")
    rank = np.arange(flat.size) - np.repeat(np.cumsum(counts) - counts, counts)
    slots = np.full(int(blocks.sum()) * block_m, flat.size, np.int32)
    slots[np.repeat(starts, counts) * block_m + rank] = order
    return slots, np.repeat(np.arange(num_experts), blocks).astype(np.int32)


def make_launch(
    config: TritonConfig,
    operands: Sequence[Any],
    out: Any,
    tables: Sequence[Any],
    *,
    num_slots: int,
    slots_per_row: int,
) -> Callable[[], Any]:
    """Return the kernel's launch on torch tensors, queued on torch's current stream.

    Parameters
    ----------
    config : TritonConfig
    operands : sequence of tensor or None
        a ``(num_rows, k)``, b ``(num_experts, n, k)``, and their scales or None.
    out : tensor, bfloat16, shape (num_slots, n)
    tables : sequence of tensor
        What :func:`block_slots` gives for ``config.block_m``.
    num_slots, slots_per_row : int
        Slot ``s`` reads row ``s // slots_per_row`` of a.
    """
    from bench.triton_moe import triton_moe

    a, b, a_scale, b_scale = operands
    n, k = int(b.shape[1]), int(b.shape[2])
    grid = (int(tables[1].shape[0]) * (n // config.block_n),)

    def launch() -> Any:
        return triton_moe[grid](
            a, b, out, a_scale, b_scale, *tables, num_slots, slots_per_row, n, k,
            FP8=a_scale is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip

    return launch
