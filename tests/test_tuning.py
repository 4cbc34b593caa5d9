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
    GroupedGemmProblem(dtype, out, gated, gather, tile, activated)
    for dtype in (BF16, "float16", FP8)
    for out in (BF16, "float16", "float32", FP8)
    for gated, gather, activated in itertools.product((False, True), repeat=3)
    for tile in tuning.tiles(dtype)
    if (gated or activated or out != FP8) and not (gated and activated)
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


FP8_PROBLEM = GroupedGemmProblem(FP8, FP8, gated=True, gather=True, tile=64)


class TestHopper:
    def test_every_tile_has_a_configuration(self):
        for gated, tile in itertools.product((False, True), tuning.sm90_tiles()):
            problem = replace(
                FP8_PROBLEM, gated=gated, output_dtype=FP8 if gated else BF16, tile=tile
            )
            config = tuning.select_sm90_config(tile, gated)
            assert tuning.why_illegal_sm90(config, problem) is None
            deeper = replace(config, num_stages=config.num_stages + 1)
            needed = tuning.sm90_smem_bytes(deeper, gated)
            assert config.num_stages == tuning.SM90_MAX_STAGES or needed > tuning.SM90_SMEM_BYTES
        assert tuning.SM90_SMEM_BYTES == HOPPER

    @pytest.mark.parametrize(
        ("problem", "config", "reason"),
        [
            ({}, {"cluster": 3}, "cluster = 3: expected 1 or 2"),
            ({}, {"block_n": 72}, "block_n = 72: expected one of"),
            ({}, {"block_n": 32}, "1 blocks of 32 do not hold a tile of 64"),
            ({"tile": 112}, {"block_n": 48, "cluster": 2}, "2 blocks of 48 do not hold"),
            ({}, {"num_stages": 1}, "num_stages = 1: the pipeline needs 2"),
            ({}, {"num_stages": 9}, "382976 bytes of shared memory: a block may have 232448"),
        ],
    )
    def test_why_illegal(self, problem, config, reason):
        config = replace(tuning.Sm90Config(64, 3), **config)
        said = tuning.why_illegal_sm90(config, replace(FP8_PROBLEM, **problem))
        assert said is not None and said.startswith(reason)

    def test_no_configuration(self):
        for tile in (0, 72, 120, 128):
            with pytest.raises(ValueError, match=rf"tile: expected one of .*, got {tile}"):
                tuning.select_sm90_config(tile, True)

    def test_select_gemm(self):
        """Hopper's own kernel runs a layer's fp8 GEMMs on Hopper, the portable one all else."""
        select, arch = tuning.select_gemm, tuning.SM90_ARCH
        down = replace(FP8_PROBLEM, gated=False, output_dtype=BF16)
        for problem in (FP8_PROBLEM, down):
            hopper = select(problem, arch, HOPPER)
            assert hopper == tuning.select_sm90_config(64, problem.gated)
            portable = tuning.select_config(problem, HOPPER)
            assert select(problem, arch, HOPPER, portable=True) == portable
            assert select(problem, "sm_100a", HOPPER) == portable
        no_gate = replace(FP8_PROBLEM, gated=False, activated=True)
        others = (no_gate, replace(no_gate, output_dtype=BF16))
        for other in (PROBLEM, replace(FP8_PROBLEM, output_dtype=BF16), *others):
            assert select(other, arch, HOPPER) == tuning.select_config(other, HOPPER)
        with pytest.raises(ValueError, match="tile: no grouped GEMM configuration runs"):
            select(replace(FP8_PROBLEM, tile=24), "sm_80", HOPPER)

    def test_select_tile(self):
        heights = tuning.sm90_tiles()
        assert tuning.select_sm90_tile(0, 0) == tuning.select_sm90_tile(1, 256) == heights[0] == 8
        chosen = {tuning.select_sm90_tile(slots, 8) for slots in range(20_000)}
        assert chosen <= set(heights) and max(chosen) == heights[-1] == 112
