"""What the cases of kernels on the CPU share: their host, their comparisons, and random inputs."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe import kernels
from cumoe.arrays import DTYPES, FP8
from cumoe.config import Activation, Permutation
from cumoe.reference import permutation as twin_permutation
from tests.helpers import TOLERANCES, relative_errors
from tests.host.loader import HostOptions, run, run_streams, run_together
from tests.host.memory import Arena

SMEM_LIMIT = 227 << 10
MAP_NORESERVE = 0x4000  # of Linux; in Python's mmap from 3.13 on
BF16, F16, F32 = "bfloat16", "float16", "float32"

TOLERANCE_OF = {F32: "float32", BF16: "bfloat16 twin", F16: "float16", FP8: "float8_e4m3fn twin"}
"""The tolerance of ``tests/helpers.py`` for a kernel's result of each dtype, against its twin."""


class Host:
    """Runs launches of one case on the CPU, on arrays of its own."""

    def __init__(self, options: HostOptions, arena: Arena) -> None:
        self.options = options
        self.arena = arena
        self.rng = np.random.default_rng(1234)

    def run(self, *launches: kernels.Launch) -> None:
        """Run launches in order."""
        run(launches, self.options)

    def run_together(self, *launches: kernels.Launch) -> None:
        """Run launches at the same time: the ranks of a multi-GPU kernel."""
        run_together(launches, self.options)

    def run_streams(self, streams: Sequence[Sequence[kernels.Launch]]) -> None:
        """Run streams at the same time: several calls of each rank."""
        run_streams(streams, self.options)

    def empty(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        """Return an array of poison."""
        return self.arena.empty(shape, dtype)

    def take(self, name: str, shape: Sequence[int], dtype: str) -> np.ndarray:
        """Return an array of poison (an ``Allocator`` of the planning functions)."""
        return self.arena.empty(shape, dtype)

    def normal(self, shape: Sequence[int], dtype: str = F32, scale: float = 1.0) -> np.ndarray:
        """Return random numbers."""
        return self.arena.array((self.rng.standard_normal(shape) * scale).astype(DTYPES[dtype]))


@dataclass(frozen=True)
class Case:
    """One case of a kernel."""

    name: str
    check: Callable[[Host], None]


def same_bits(name: str, got: Any, expected: Any) -> None:
    """Assert that two arrays have the same bits, NaN by value."""
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    assert got.dtype == expected.dtype, f"{name}: dtype {got.dtype}, expected {expected.dtype}"
    words = f"u{got.dtype.itemsize}"
    a, b = np.ascontiguousarray(got).view(words), np.ascontiguousarray(expected).view(words)
    wrong = a != b
    if got.dtype.kind != "i" and got.dtype != DTYPES[FP8]:
        wrong &= ~(np.isnan(got.astype(np.float32)) & np.isnan(expected.astype(np.float32)))
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} elements differ, the first at {first}: "
            f"{got[first]!r}, expected {expected[first]!r}"
        )


def close(name: str, got: Any, expected: Any, tolerance: str) -> None:
    """Assert a tolerance of ``tests/helpers.py``, or that of a dtype."""
    limit = TOLERANCES[TOLERANCE_OF.get(tolerance, tolerance)]
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    largest, rms = relative_errors(got.astype(np.float64), expected.astype(np.float64))
    assert largest <= limit.largest and rms <= limit.rms, (
        f"{name}: errors {largest:.3g} (largest) and {rms:.3g} (rms), expected at most "
        f"{limit.largest:.3g} and {limit.rms:.3g}: {limit.reason}"
    )


def check(case: Case, options: HostOptions | None = None) -> None:
    """Run one case and compare it with its twin."""
    with Arena() as arena:
        case.check(Host(options or HostOptions(), arena))


def virtual(shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Return zeros that take memory only where they are touched."""
    kind = DTYPES[dtype]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, shape[0] * shape[1] * kind.itemsize, flags=flags)
    return np.frombuffer(memory, np.uint8).view(kind).reshape(shape)


def random_group(
    host: Host,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    tile: int,
    counts: Sequence[int] | None = None,
) -> Permutation:
    """Return the twin's permutation in watched arrays, of random ids with one empty expert.

    With `counts`, the rows of each expert, every token goes to one expert.
    """
    if counts is None:
        ids = host.rng.integers(0, num_experts, (num_tokens, top_k)).astype(np.int32)
        if num_experts > 2:
            ids[ids == 1] = 0
    else:
        assert (len(counts), sum(counts), 1) == (num_experts, num_tokens, top_k)
        ids = host.rng.permutation(np.repeat(np.arange(num_experts, dtype=np.int32), counts))
        ids = ids[:, None].copy()
    made = twin_permutation.group(ids, num_experts=num_experts, tile=tile)
    arrays = {n: host.arena.array(a) for n, a in made._asdict().items() if n != "tile"}
    return Permutation(**arrays, tile=tile)


def valid_rows(p: Permutation) -> np.ndarray:
    return np.flatnonzero(p.token_idx >= 0)


def per_expert_activation(host: Host, num_experts: int) -> Activation:
    return Activation(
        alpha=host.arena.array(np.linspace(0.5, 2.0, num_experts, dtype=np.float32)),
        beta=1.0,
        limit=host.arena.array(np.linspace(0.7, 7.0, num_experts, dtype=np.float32)),
    )
