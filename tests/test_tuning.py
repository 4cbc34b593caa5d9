"""The rules that choose a grouped GEMM's configuration: pure functions, no device."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from cumoe import tuning
from cumoe.launch import ARCHS
from cumoe.tuning import GroupedGemmConfig, GroupedGemmProblem

BF16, FP8, TENSOR = "bfloat16", "float8_e4m3fn", tuning.FP8_TENSOR
PROBLEM = GroupedGemmProblem(BF16, BF16, gated=True, gather=True, tile=64)
CONFIG = GroupedGemmConfig(block_m=64, block_n=64, num_stages=3, warps_m=2, warps_n=4)
HOPPER = ARCHS["sm_90a"]

PROBLEMS = [
    GroupedGemmProblem(dtype, out, gated, gather, tile, activated)
    for dtype in (BF16, "float16", FP8, TENSOR)
    for out in (BF16, "float16", "float32", TENSOR if dtype == TENSOR else FP8)
    for gated, gather, activated in itertools.product((False, True), repeat=3)
    for tile in tuning.tiles(dtype)
    if (gated or activated or out not in (FP8, TENSOR)) and not (gated and activated)
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


@pytest.mark.parametrize("dtype", [BF16, FP8, TENSOR])
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
BF16_PROBLEM = replace(FP8_PROBLEM, dtype=BF16, output_dtype=BF16)
TENSOR_PROBLEM = replace(FP8_PROBLEM, dtype=TENSOR, output_dtype=TENSOR)
HOPPER_PROBLEMS = [
    GroupedGemmProblem(dtype, dtype if gated or alone else BF16, gated, gather, tile, alone)
    for dtype in (BF16, FP8, TENSOR)
    for gated, alone in ((False, False), (True, False), (False, True))
    for gather in (False, True)
    for tile in (*tuning.SM90_TILES[dtype], 16, 56, 96, 200)
]


class TestHopper:
    def test_every_tile_has_a_configuration(self):
        """The deepest pipeline there is room for, then the most chunks."""
        for problem in HOPPER_PROBLEMS:
            config = tuning.select_sm90_config(problem)
            assert tuning.why_illegal_sm90(config, problem) is None
            height = config.block_n * config.cluster
            lower = [h for h in tuning.SM90_TILES[problem.dtype] if h < height]
            assert height in tuning.SM90_TILES[problem.dtype]
            assert lower[-1:] < [problem.tile] <= [height]
            one = height in tuning.sm90_block_heights(problem.dtype)
            assert config.cluster == (1 if one else 2)
            deeper = replace(config, num_stages=config.num_stages + 1)
            fewest = next(
                chunks
                for chunks in itertools.count(1)
                if tuning.why_illegal_sm90(replace(config, num_chunks=chunks), problem) is None
            )
            most = tuning._sm90_chunks(config.block_n, problem)[1]
            assert fewest <= config.num_chunks <= most
            if config.num_stages < tuning.SM90_MAX_STAGES:
                # Two chunks at least, so that a consumer stages one while the other is written.
                chunks = min(most, max(fewest, 2))
                needed = tuning.sm90_smem_bytes(replace(deeper, num_chunks=chunks), problem)
                assert needed > tuning.SM90_SMEM_BYTES
            if config.num_chunks < most:
                wider = replace(config, num_chunks=config.num_chunks + 1)
                assert tuning.sm90_smem_bytes(wider, problem) > tuning.SM90_SMEM_BYTES
        assert tuning.SM90_SMEM_BYTES == HOPPER

    def test_shared_memory(self):
        """The ring, chunks of both consumers, barriers, and what fp8 needs for scales."""
        config = tuning.Sm90Config(block_n=64, num_stages=4, num_chunks=3)
        common = 4 * (256 + 64) * 128 + 3 * 2 * 4096 + 4 * 16 + 8 * (2 * 4 + 4 * 3)
        common += 48  # two items and four barriers, in whole 16 bytes
        assert tuning.sm90_smem_bytes(config, BF16_PROBLEM) == common
        # Token scales: four rows of five vectors a stage. Two barriers or weight scales a stage.
        scales, stage = 4 * 4 * 4 * 20, 2 * 8 * 4
        assert tuning.sm90_smem_bytes(config, FP8_PROBLEM) == common + scales + stage
        # Without a gate each half has scales of its own.
        alone = replace(FP8_PROBLEM, gated=False, activated=True)
        assert tuning.sm90_smem_bytes(config, alone) == common + 2 * scales + stage
        down = replace(FP8_PROBLEM, gated=False, output_dtype=BF16)
        assert tuning.sm90_smem_bytes(config, down) == common + 2 * scales + stage
        # Tokens as rows: two chunks' room in each; one scale for each of 128 tokens.
        config = tuning.Sm90Config(block_n=128, num_stages=4, num_chunks=2, cluster=2)
        common = 4 * (256 + 128) * 128 + 2 * 2 * 8192 + 4 * 16 + 8 * (2 * 4 + 4 * 2) + 48
        assert tuning.sm90_smem_bytes(config, down) == common - 8 + 4 * 4 * 128 + stage + 8

    @pytest.mark.parametrize(
        ("problem", "config", "reason"),
        [
            ({}, {"cluster": 3}, "cluster = 3: expected 1 or 2"),
            ({}, {"block_n": 68}, "block_n = 68: expected one of"),
            ({}, {"block_n": 96}, "block_n = 96: expected one of"),
            ({}, {"block_n": 32}, "1 blocks of 32 do not hold a tile of 64"),
            ({"tile": 112}, {"block_n": 48, "cluster": 2}, "2 blocks of 48 do not hold"),
            ({}, {"num_stages": 3}, "num_stages = 3: the pipeline needs 4"),
            ({}, {"num_chunks": 1}, "num_chunks = 1: the epilogue needs 2"),
            ({}, {"num_stages": 9}, "388448 bytes of shared memory: a block may have 232448"),
            ({}, {"num_chunks": 20}, "329840 bytes of shared memory: a block may have 232448"),
        ],
    )
    def test_why_illegal(self, problem, config, reason):
        config = replace(tuning.Sm90Config(64, 4, 2), **config)
        said = tuning.why_illegal_sm90(config, replace(FP8_PROBLEM, **problem))
        assert said is not None and said.startswith(reason), said

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            ({"block_n": 200}, "block_n = 200: expected one of"),
            ({"num_stages": 2}, "num_stages = 2: the pipeline needs 3"),
            ({"num_chunks": 0}, "num_chunks = 0: the epilogue needs 1"),
        ],
    )
    def test_why_illegal_bf16(self, config, reason):
        first = tuning.Sm90Config(64, 3, 1)
        assert tuning.why_illegal_sm90(first, BF16_PROBLEM) is None
        said = tuning.why_illegal_sm90(replace(first, **config), BF16_PROBLEM)
        assert said is not None and said.startswith(reason), said

    @pytest.mark.parametrize("problem", [BF16_PROBLEM, FP8_PROBLEM], ids=[BF16, FP8])
    def test_no_configuration(self, problem):
        for tile in (0, 4, 68, 1000):
            with pytest.raises(ValueError, match=rf"tile: expected a multiple of .*, got {tile}"):
                tuning.select_sm90_config(replace(problem, tile=tile))

    def test_select_gemm(self):
        """Hopper's own kernels run a layer's GEMMs on Hopper, the portable one all else."""
        select, arch = tuning.select_gemm, tuning.SM90_ARCH
        for up in (BF16_PROBLEM, FP8_PROBLEM, TENSOR_PROBLEM):
            alone = replace(up, gated=False, activated=True)
            for problem in (up, alone, replace(up, gated=False, output_dtype=BF16)):
                assert select(problem, arch, HOPPER) == tuning.select_sm90_config(problem)
                portable = tuning.select_config(problem, HOPPER)
                assert select(problem, arch, HOPPER, portable=True) == portable
                assert select(problem, "sm_100a", HOPPER) == portable
        for other in (
            replace(PROBLEM, dtype="float16", output_dtype="float16"),
            replace(PROBLEM, output_dtype="float32"),
            replace(FP8_PROBLEM, output_dtype=BF16),
            replace(FP8_PROBLEM, gated=False, activated=True, output_dtype=BF16),
        ):
            assert select(other, arch, HOPPER) == tuning.select_config(other, HOPPER)
        with pytest.raises(ValueError, match="tile: no grouped GEMM configuration runs"):
            select(replace(FP8_PROBLEM, tile=24), "sm_80", HOPPER)

    @pytest.mark.parametrize("dtype", [BF16, FP8, TENSOR])
    def test_tiles(self, dtype):
        """Of one block, the highest included, and of two such blocks beyond."""
        blocks, heights = tuning.sm90_block_heights(dtype), tuning.SM90_TILES[dtype]
        assert blocks[0] == heights[0] == 8 and list(heights) == sorted(set(heights))
        assert blocks[-1] == tuning.SM90_MAX_BLOCK_N[dtype] and blocks[-1] in heights
        rows = (tuning.SM90_ROWS,) if dtype == FP8 else ()
        pairs = tuple(2 * height for height in blocks + rows)
        assert all(height in (blocks if height <= blocks[-1] else pairs) for height in heights)
        assert heights[-1] > blocks[-1]

    @pytest.mark.parametrize("dtype", [BF16, FP8, TENSOR])
    def test_every_tile_is_chosen(self, dtype):
        """No height is there that nothing runs with."""
        tokens = (16, *range(1, 9000, 16), 16384)
        shapes = [(8, 256), (2, 8), (8, 128), (1, 16)]
        chosen = {tuning.select_sm90_tile(t, k, e, dtype) for t in tokens for k, e in shapes}
        assert chosen == set(tuning.SM90_TILES[dtype])

    @pytest.mark.parametrize("dtype", [BF16, FP8, TENSOR])
    def test_select_tile_few_tokens(self, dtype):
        """No higher than the rows that an expert can get need."""
        heights = tuning.SM90_TILES[dtype]
        for num_experts in (1, 8, 256):
            for num_tokens in range(100):
                chosen = tuning.select_sm90_tile(num_tokens, 1, num_experts, dtype)
                least = next(height for height in heights if height >= num_tokens)
                assert chosen == least if num_experts == 1 else chosen <= least
        assert tuning.select_sm90_tile(0, 0, 0, dtype) == heights[0]

    @pytest.mark.parametrize(
        ("dtype", "heights"),
        [
            (FP8, {8: 8, 64: 72, 256: 72, 1024: 72, 2048: 88, 3072: 256, 16384: 256}),
            (BF16, {8: 8, 64: 80, 512: 80, 2048: 80, 4096: 176, 8192: 288, 10240: 176}),
            (TENSOR, {8: 8, 64: 80, 512: 80, 2048: 80, 4096: 176, 8192: 288, 10240: 176}),
        ],
    )
    def test_select_tile(self, dtype, heights):
        """The choices that the measurements in its docstring are about."""
        chosen = {t: tuning.select_sm90_tile(t, 8, 256, dtype) for t in heights}
        assert chosen == heights


def test_orders_rows():
    """From 256 rows an expert on, from 128 where quantisation writes them; not of small experts."""
    for dtype, quantizes, least, smallest in (
        (BF16, False, 256, 1536),
        (FP8, False, 256, 1536),
        (FP8, True, 128, 1536),
        (TENSOR, False, 256, 4096),
        (TENSOR, True, 256, 4096),
    ):
        for size in (smallest, 2 * smallest):
            assert tuning.orders_rows(32 * least, 8, 256, size, dtype, quantizes)
            assert not tuning.orders_rows(32 * least - 1, 8, 256, size, dtype, quantizes)
        assert not tuning.orders_rows(1 << 20, 8, 256, smallest - 1, dtype, quantizes)
