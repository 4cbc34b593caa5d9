"""The rules that choose a grouped GEMM's configuration: pure functions, no device."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from cumoe import tuning
from cumoe.launch import ARCHS
from cumoe.tuning import GroupedGemmConfig, GroupedGemmProblem

BF16, FP8 = "bfloat16", "float8_e4m3fn"
PROBLEM = GroupedGemmProblem(BF16, BF16, gated=True, gather=True, tile=64)
CONFIG = GroupedGemmConfig(block_m=64, block_n=64, num_stages=3, warps_m=2, warps_n=4)
HOPPER = ARCHS["sm_90a"]

PROBLEMS = [
    GroupedGemmProblem(dtype, out, gated, gather, tile)
    for dtype in (BF16, "float16", FP8)
    for out in (BF16, "float16", "float32", FP8)
    for gated, gather in itertools.product((False, True), repeat=2)
    for tile in tuning.tiles(dtype)
    if gated or out != FP8
]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_problem_has_a_configuration(arch):
    for problem in PROBLEMS:
        legal = tuning.candidates(problem, ARCHS[arch])
        assert legal and legal[0] == tuning.select_config(problem, ARCHS[arch])
        assert len(set(legal)) == len(legal)
        for config in legal:
            assert tuning.why_illegal(config, problem, ARCHS[arch]) is None


def test_shared_memory():
    """A stage is 128 bytes of k for each row of both operands; gate and up are two."""
    assert tuning.smem_bytes(CONFIG, PROBLEM) == 3 * (64 + 2 * 64) * 128
    assert tuning.smem_bytes(CONFIG, replace(PROBLEM, gated=False)) == 3 * (64 + 64) * 128
    needed = tuning.smem_bytes(CONFIG, PROBLEM) + tuning.STATIC_SMEM_BYTES
    assert tuning.why_illegal(CONFIG, PROBLEM, needed) is None
    assert "shared memory" in str(tuning.why_illegal(CONFIG, PROBLEM, needed - 1))


@pytest.mark.parametrize(
    ("problem", "config", "reason"),
    [
        ({}, {"block_m": 32}, "block_m = 32 differs from the permutation's tile 64"),
        ({}, {"num_stages": 1}, "num_stages = 1: the pipeline needs 2"),
        ({"tile": 40}, {"block_m": 40}, "block_m = 40 is no multiple of 16"),
        ({}, {"warps_m": 3}, "block_m = 64 is no multiple of 16"),
        ({}, {"block_n": 72}, "block_n = 72 is no multiple of 16"),
        ({}, {"warps_m": 4, "warps_n": 16, "block_n": 256}, "2048 threads: expected 32 to 1024"),
        ({"output_dtype": FP8}, {}, "fp8 output needs the activation epilogue and block_n = 128"),
        ({"dtype": FP8}, {"block_n": 192}, "block_n = 192 does not divide a scale block"),
        ({}, {"warps_m": 1, "warps_n": 1}, "256 accumulators a thread: expected at most 128"),
        ({}, {"num_stages": 10}, "247808 bytes of shared memory: a block may have 232448"),
    ],
)
def test_why_illegal(problem, config, reason):
    said = tuning.why_illegal(replace(CONFIG, **config), replace(PROBLEM, **problem), HOPPER)
    assert said is not None and said.startswith(reason)


def test_no_configuration():
    with pytest.raises(ValueError, match=r"tile: no grouped GEMM .* the tile heights are \(16, 32"):
        tuning.select_config(replace(PROBLEM, tile=48), HOPPER)
    with pytest.raises(ValueError, match="in 1000 bytes of shared memory"):
        tuning.select_config(PROBLEM, 1000)


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_select_tile(dtype):
    """The smallest height that holds the mean number of rows, and the largest beyond."""
    heights = tuning.tiles(dtype)
    assert tuning.select_tile(0, 0, dtype) == tuning.select_tile(1, 256, dtype) == heights[0]
    for height in heights:
        assert tuning.select_tile(8 * height, 8, dtype) == height
        assert tuning.select_tile(8 * height + 1, 8, dtype) == min(
            (taller for taller in heights if taller > height), default=heights[-1]
        )
    chosen = [tuning.select_tile(slots, 8, dtype) for slots in range(4000)]
    assert chosen == sorted(chosen)
