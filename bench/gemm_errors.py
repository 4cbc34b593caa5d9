"""How far the expert GEMMs are from float32: cumoe's, its unfused form's, cuBLAS' and the peers'.

The oracle is :mod:`bench.bench_error`'s: each expert's matrices in float32, its own quantiser, its
own activation. It runs on a sample of experts and, of those, of blocks of 64 rows. Bounds are
stated here and judged by :func:`find_problems`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench.bench_error import (
    BLOCK_ROWS,
    LIMITS,
    Matrices,
    Worst,
    block_errors,
    round_bf16,
    round_fp8_block,
    slots_by_expert,
    swiglu,
    widen,
)
from bench.gemm_case import Case
from bench.inputs import to_host
from bench.peers import take_rows
from bench.record import Row
from cumoe import Quantized
from cumoe.config import Array
from cumoe.dequantize import dequantize

CUBLAS_BOUND = 2.0
"""Largest error in bfloat16, as a multiple of cuBLAS' on the same rows and weights."""

FUSED_BOUND = 1.001
"""Largest RMS error of the fused fp8 path, as a multiple of the unfused one's, over all rows.

Both round the activation's result to fp8, by far the largest error of either. Values that fall on
the other side of a boundary in one of them move the quotient by a percent when rows are few, so it
is judged from :data:`FUSED_ROWS` rows on.
"""

FUSED_ROWS = 256
SAMPLE_BLOCKS = 8  # blocks of 64 rows of one expert: half from its start, half from its end

RowsOf = Callable[[int, np.ndarray], Array]
"""Float32 rows of an expert's slots; cuBLAS also takes the float32 left operand."""


def sample_experts(ids: np.ndarray, count: int) -> dict[int, np.ndarray]:
    """Return slots of `count` experts in use: the most and the least loaded and some in between.

    Parameters
    ----------
    ids : numpy.ndarray, int32, shape (num_tokens, top_k)
    count : int
        0 for all.

    Returns
    -------
    dict of int to numpy.ndarray
        Each expert's slots, ascending; whole blocks of 64 from both ends of a longer list.
    """
    every = dict(slots_by_expert(ids))
    order = sorted(every, key=lambda expert: (-every[expert].size, expert))
    if 0 < count < len(order):
        order = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, count).astype(int))]
    found = {}
    half = SAMPLE_BLOCKS // 2
    for expert in order:
        slots = every[expert]
        if slots.size > SAMPLE_BLOCKS * BLOCK_ROWS:
            tail = ((slots.size - 1) // BLOCK_ROWS + 1 - half) * BLOCK_ROWS
            slots = np.concatenate([slots[: half * BLOCK_ROWS], slots[tail:]])
        found[expert] = slots
    return found


class Errors:
    """Errors of one result: by block of 64 rows, by expert, and over all of the sample."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.experts: list[int] = []
        self.blocks: list[np.ndarray] = []  # (num_blocks, 2) as block_errors gives
        self.squares: list[tuple[float, float]] = []  # of the error, of what it should be

    def add(self, xp: Any, expert: int, got: Array, want: Array) -> None:
        """Add an expert's rows, both float32."""
        self.num_rows += got.shape[0]
        self.experts.append(expert)
        self.blocks.append(to_host(block_errors(xp, got, want)).astype(np.float64))
        error = got - want
        sums = [float((x * x).sum(dtype=np.float64)) for x in (error, want)]
        self.squares.append((sums[0], sums[1]))

    @property
    def rms(self) -> float:
        """Relative RMS error over all rows."""
        error, want = map(sum, zip(*self.squares, strict=True))
        return float(np.sqrt(error / max(want, 1e-300)))

    def by_expert(self) -> np.ndarray:
        """Return largest max_rel and the relative RMS error of each expert."""
        return np.array(
            [
                (blocks[:, 0].max(), np.sqrt(error / max(want, 1e-300)))
                for blocks, (error, want) in zip(self.blocks, self.squares, strict=True)
            ]
        )

    def worst(self) -> Worst:
        """Return the worst block."""
        places = [
            (e, i) for e, b in zip(self.experts, self.blocks, strict=True) for i in range(len(b))
        ]
        return Worst.of(np.concatenate(self.blocks), places)

    def fields(self) -> Row:
        """Return worst block and overall error as fields of a row."""
        return {**self.worst().fields(), "overall_rms_rel": self.rms}

    def over(self, other: Errors) -> Row:
        """Return this one's errors as multiples of another's.

        Returns
        -------
        dict
            ``block_max``, ``block_rms``: the largest quotient over blocks; ``expert_max``,
            ``expert_rms``: over experts; ``overall_rms``; ``expert``, of the largest
            ``block_max``.
        """
        tiny = 1e-12
        mine, theirs = np.concatenate(self.blocks), np.concatenate(other.blocks)
        block = mine / np.maximum(theirs, tiny)
        expert = self.by_expert() / np.maximum(other.by_expert(), tiny)
        owner = np.repeat(self.experts, [len(b) for b in self.blocks])
        return {
            "block_max": float(block[:, 0].max()),
            "block_rms": float(block[:, 1].max()),
            "expert_max": float(expert[:, 0].max()),
            "expert_rms": float(expert[:, 1].max()),
            "overall_rms": self.rms / max(other.rms, tiny),
            "expert": int(owner[int(np.argmax(np.nan_to_num(block[:, 0], nan=np.inf)))]),
        }


def wide(x: Array | Quantized) -> Array:
    """Return rows as float32."""
    return dequantize(x) if isinstance(x, Quantized) else widen(x)


def compare(
    case: Case,
    sample: Mapping[int, np.ndarray],
    *,
    cublas: Callable[[Array, Array], Array] | None = None,
    peers: Mapping[str, Mapping[str, RowsOf]] | None = None,
) -> dict[str, Errors]:
    """Compare the results of ``case.run()`` and others with the oracle.

    Parameters
    ----------
    case : Case
        After its run.
    sample : mapping of int to numpy.ndarray
        Of :func:`sample_experts`.
    cublas : callable, optional
        Product of bfloat16 rows and a bfloat16 matrix, for the bf16 recipe.
    peers : mapping, optional
        For each GEMM and peer, a function that gives float32 rows of slots.

    Returns
    -------
    dict of str to Errors
        ``gemm1``: the activation's result, against the oracle's rounded as the layer rounds;
        ``gemm2``: against the product of cumoe's own activation's result, so each GEMM answers for
        itself. ``fused`` and ``unfused``: rows of both paths against the oracle without any
        rounding after GEMM1's operands. With `cublas`: ``product``, ``act`` and ``rows`` of cumoe
        against the unrounded oracle, and the same with the prefix ``cublas_``: gate and up before
        the activation, after it, and GEMM2. Peers by ``"gemm1 NAME"`` and ``"gemm2 NAME"``.
    """
    xp, activation, columns = case.xp, case.activation, case.ids.shape[1]
    fp8 = case.recipe == "fp8_block"
    matrices = Matrices(xp, case.weights)
    product, unfused, unfused_idx = case.unfused()
    found: dict[str, Errors] = {}

    def add(name: str, expert: int, got: Array, want: Array) -> None:
        found.setdefault(name, Errors()).add(xp, expert, got, want)

    for expert, slots in sample.items():
        w13, w2 = matrices.of(expert)
        x = take_rows(case.x, slots // columns)
        plain = widen(x)
        gate_up = (round_fp8_block(xp, plain) if fp8 else plain) @ w13.T
        exact = swiglu(xp, gate_up, activation, expert)
        own = case.act_rows(slots)
        act = wide(own)
        got = widen(take_rows(case.rows, case.permuted_idx[slots]))
        want = act @ w2.T
        add("gemm1", expert, act, round_fp8_block(xp, exact) if fp8 else round_bf16(exact))
        add("gemm2", expert, got, round_bf16(want))
        path = exact @ w2.T
        add("fused", expert, got, path)
        add("unfused", expert, widen(take_rows(unfused, unfused_idx[slots])), path)
        for name, rows_of in ((peers or {}).get("gemm1") or {}).items():
            add(f"gemm1 {name}", expert, rows_of(expert, slots), gate_up)
        for name, rows_of in ((peers or {}).get("gemm2") or {}).items():
            add(f"gemm2 {name}", expert, rows_of(expert, slots), want)
        if cublas is not None and not fp8:
            theirs = cublas(x, case.weights.w13[expert])
            add("product", expert, widen(take_rows(product, unfused_idx[slots])), gate_up)
            add("cublas_product", expert, theirs, gate_up)
            theirs = round_bf16(swiglu(xp, theirs, activation, expert))
            add("act", expert, act, exact)
            add("cublas_act", expert, theirs, exact)
            assert not isinstance(own, Quantized)
            add("rows", expert, got, want)
            add("cublas_rows", expert, cublas(own, case.weights.w2[expert]), want)
    return found


def error_fields(errors: Mapping[str, Errors], sample: Mapping[int, np.ndarray]) -> Row:
    """Return what :func:`compare` found as fields of a row."""
    row: Row = {
        "checked_experts": len(sample),
        "checked_rows": int(sum(slots.size for slots in sample.values())),
        "fused_over_unfused": errors["fused"].over(errors["unfused"]),
    }
    for name in ("gemm1", "gemm2", "fused", "unfused"):
        row[name] = errors[name].fields()
    for name in ("product", "act", "rows"):
        if f"cublas_{name}" in errors:
            row[f"{name}_over_cublas"] = errors[name].over(errors[f"cublas_{name}"])
    return row


def find_problems(errors: Mapping[str, Errors], recipe: str) -> list[str]:
    """Return what is over its bound: the layer's limits, cuBLAS' error, the unfused path's."""
    problems = []
    for name in ("gemm1", "gemm2"):
        worst = errors[name].worst()
        if not worst.passes(recipe):
            problems.append(
                f"wrong answer: {name} max_rel {worst.max_rel:.2e}, rms_rel {worst.rms_rel:.2e} in "
                f"expert {worst.expert}, limits {LIMITS[recipe]}"
            )
    for name in ("product", "act", "rows"):
        if f"cublas_{name}" in errors:
            ratios = errors[name].over(errors[f"cublas_{name}"])
            largest = max(value for key, value in ratios.items() if key != "expert")
            if not largest <= CUBLAS_BOUND:
                problems.append(
                    f"{name}: {largest:.2f} times cuBLAS' error, at most {CUBLAS_BOUND}"
                )
    if recipe == "fp8_block" and errors["fused"].num_rows >= FUSED_ROWS:
        ratio = errors["fused"].over(errors["unfused"])["overall_rms"]
        if not ratio <= FUSED_BOUND:
            problems.append(f"fused: {ratio:.4f} times the unfused error, at most {FUSED_BOUND}")
    return problems
