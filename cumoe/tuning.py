"""Which configuration of the grouped GEMM runs a problem: pure functions over frozen dataclasses.

Owns the legality rule, the shared-memory formula, the candidates and the thresholds. Touches no
device: the caller says how much shared memory a block may have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ROW_BYTES = 128  # bytes of k per pipeline stage
STATIC_SMEM_BYTES = 2048  # the epilogue's own shared memory, at most
MAX_STAGES = 4
TILES = (16, 32, 64, 128)
MAX_ACCUMULATORS = 128  # per thread, beside fragments and addresses
FP8_TENSOR = "fp8_tensor"
"""Element type of a problem: float8_e4m3fn with a scale for the tensor, summed like bfloat16, where
``"float8_e4m3fn"`` has one for each block."""


@dataclass(frozen=True)
class GroupedGemmProblem:
    """What is multiplied: element type, epilogue, and row tile height.

    Parameters
    ----------
    dtype : str
        ``"bfloat16"``, ``"float16"``, ``"float8_e4m3fn"`` or :data:`FP8_TENSOR`.
    output_dtype : str
        Any of these or ``"float32"``.
    gated : bool
        The epilogue is a gated activation: two weight rows for each output column.
    gather : bool
        Rows of the left operand are read through the permutation.
    tile : int
        Tile height of the permutation.
    activated : bool
        The epilogue is an activation without a gate.
    weights_dtype : str, optional
        Of the tokens' weights that are applied before the activation.
    """

    dtype: str
    output_dtype: str
    gated: bool
    gather: bool
    tile: int
    activated: bool = False
    weights_dtype: str | None = None


@dataclass(frozen=True)
class GroupedGemmConfig:
    """Tile sizes of ``sm80_grouped_gemm``: names as the kernel's compile-time constants."""

    block_m: int
    block_n: int
    num_stages: int
    warps_m: int
    warps_n: int

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_m * self.warps_n


def smem_bytes(config: GroupedGemmConfig, problem: GroupedGemmProblem) -> int:
    """Return the dynamic shared memory of a block."""
    rows = config.block_m + config.block_n * (2 if problem.gated else 1)
    return config.num_stages * rows * ROW_BYTES


def why_illegal(
    config: GroupedGemmConfig, problem: GroupedGemmProblem, smem_limit: int
) -> str | None:
    """Return why the kernel cannot run `problem` with `config`, or None if it can."""
    if config.block_m != problem.tile:
        return f"block_m = {config.block_m} differs from the permutation's tile {problem.tile}"
    if config.num_stages < 2:
        return f"num_stages = {config.num_stages}: the pipeline needs 2"
    if config.block_m % (16 * config.warps_m):
        return f"block_m = {config.block_m} is no multiple of 16 * warps_m"
    if config.block_n % (16 * config.warps_n):
        return f"block_n = {config.block_n} is no multiple of 16 * warps_n"
    if not 32 <= config.num_threads <= 1024:
        return f"{config.num_threads} threads: expected 32 to 1024"
    fp8 = problem.dtype == "float8_e4m3fn"
    activated = problem.gated or problem.activated
    if problem.output_dtype == "float8_e4m3fn" and not (activated and config.block_n == 128):
        return "fp8 output needs the activation epilogue and block_n = 128"
    if fp8 and 128 % config.block_n:
        return f"block_n = {config.block_n} does not divide a scale block (128)"
    sets = (2 if problem.gated else 1) * (2 if fp8 else 1)
    accumulators = sets * config.block_m * config.block_n // config.num_threads
    if accumulators > MAX_ACCUMULATORS:
        return f"{accumulators} accumulators a thread: expected at most {MAX_ACCUMULATORS}"
    needed = smem_bytes(config, problem) + STATIC_SMEM_BYTES
    if needed > smem_limit:
        return f"{needed} bytes of shared memory: a block may have {smem_limit}"
    return None


def candidates(problem: GroupedGemmProblem, smem_limit: int) -> list[GroupedGemmConfig]:
    """Return the legal configurations for a problem, the preferred one first."""
    narrow = problem.gated and problem.dtype != "float8_e4m3fn"
    if problem.output_dtype == "float8_e4m3fn":
        narrow = False
    block_n = 64 if narrow else 128
    if problem.tile <= 32:
        warps = (1, block_n // 16)
    elif problem.tile == 64:
        warps = (2, 4)
    else:
        warps = (4, 2)
    # NOTE: with two stages ptxas gives widened fp8 80 registers on sm_120a, which spill.
    fewest = 3 if problem.dtype == FP8_TENSOR else 2
    configs = [
        GroupedGemmConfig(problem.tile, block_n, stages, *warps)
        for stages in range(MAX_STAGES, fewest - 1, -1)
    ]
    return [c for c in configs if why_illegal(c, problem, smem_limit) is None]


def select_config(problem: GroupedGemmProblem, smem_limit: int) -> GroupedGemmConfig:
    """Return the configuration for a problem on a device with `smem_limit` bytes a block.

    Raises
    ------
    ValueError
        If no configuration can run the problem.
    """
    legal = candidates(problem, smem_limit)
    if not legal:
        raise ValueError(
            f"tile: no grouped GEMM configuration runs {problem} in {smem_limit} bytes of shared "
            f"memory; the tile heights are {tiles(problem.dtype)}"
        )
    return legal[0]


def tiles(dtype: str) -> tuple[int, ...]:
    """Return the row tile heights that a recipe's kernels have."""
    return TILES[:3] if dtype == "float8_e4m3fn" else TILES


def select_tile(num_slots: int, num_local_experts: int, dtype: str) -> int:
    """Return the tile height for the mean number of rows an expert gets.

    The smallest height that holds the mean in one tile: below it a taller tile only multiplies
    padding, above it weights are fetched again for every tile.
    """
    mean = num_slots / max(num_local_experts, 1)
    heights = tiles(dtype)
    return next((height for height in heights if mean <= height), heights[-1])


SM90_ARCH = "sm_90a"
SM90_SMEM_BYTES = 232448
SM90_MAX_STAGES = 6
SM90_CHUNK_BYTES = 32 * 128  # finished rows on their way out: 64 bf16 columns of 32 tokens
# accumulators and products in registers
SM90_MAX_BLOCK_N = {"bfloat16": 192, "float8_e4m3fn": 88, FP8_TENSOR: 192}
SM90_TILES = {
    "bfloat16": (8, 16, 32, 48, 64, 96, 128, 144, 160, 176, 192, 224, 288),
    "float8_e4m3fn": (8, 16, 32, 64, 88, 176, 256),
    FP8_TENSOR: (8, 16, 32, 48, 64, 96, 128, 144, 160, 176, 192, 224, 288),
}
"""Heights without which some problem would be slower by 2 % or more."""
SM90_MIN_STAGES = {"bfloat16": 3, "float8_e4m3fn": 4, FP8_TENSOR: 3}  # fp8 takes two at a time

SM90_ROWS = 128
"""Tokens of a block of ``sm90_fp8_rows_grouped_gemm``, which no other fp8 kernel has."""

SM90_ROWS_COST = (170, 270)
"""What up to 128 tokens cost there, and up to 256, in tokens of the other kernels' tiles."""

SM90_FLOOR = {
    "bfloat16": (170, 0.155, 40),
    "float8_e4m3fn": (150, 0.2, 24),
    FP8_TENSOR: (170, 0.155, 40),
}
"""What a tile costs at least, in tokens: the time in which its weights come from memory, and what
each token above the last number adds to it, since its arithmetic takes power from that."""


@dataclass(frozen=True)
class Sm90Config:
    """Tile sizes of the Hopper grouped GEMMs: names as the kernels' compile-time constants.

    A block takes up to `block_n` tokens; the `cluster` blocks that share weights take a row tile.
    `num_chunks` buffers of finished rows lie between each consumer and its writer.
    """

    block_n: int
    num_stages: int
    num_chunks: int
    cluster: int = 1


def sm90_smem_bytes(config: Sm90Config, problem: GroupedGemmProblem) -> int:
    """Return the dynamic shared memory of a block, the kernel's ``Smem``."""
    n, stages, chunks = config.block_n, config.num_stages, config.num_chunks
    rows = _is_rows(problem.dtype, n)
    size = stages * (2 * 128 + n) * ROW_BYTES + (4 if rows else 2) * chunks * SM90_CHUNK_BYTES
    size += 16 * stages + 8 * (2 * stages + 4 * chunks) + 40  # tiles, barriers, items
    if rows:
        size += (4 * n + 2 * 8) * stages
    elif problem.dtype == "float8_e4m3fn":
        sets = 1 if problem.gated else 2  # of token scales, and of teams that requantise
        size += 4 * stages * sets * 16 * (-(-n // 16) | 1) + 2 * 8 * stages
        size += (16 * sets + 4 * 8) * (n if problem.gated or problem.activated else 1)
    return -(-size // 16) * 16


def _is_rows(dtype: str, block_n: int) -> bool:
    """Tell whether a block's tokens are the rows of its products, not their columns."""
    return dtype == "float8_e4m3fn" and block_n == SM90_ROWS


def _sm90_chunks(block_n: int, problem: GroupedGemmProblem) -> tuple[int, int]:
    """Return the fewest and the most chunk buffers that are of use."""
    if _is_rows(problem.dtype, block_n):
        return (2, 2) if problem.output_dtype == "float8_e4m3fn" else (1, 4)
    if problem.output_dtype == "float8_e4m3fn":  # the staging of requantised rows lies there
        chunks = -(-block_n * 144 * (1 if problem.gated else 2) // (2 * SM90_CHUNK_BYTES))
        return chunks, chunks
    if problem.gather:
        return 1, 1
    return 1, -(-block_n // 32) * (1 if problem.gated else 2)


def _sm90_max_block_n(problem: GroupedGemmProblem) -> int:
    """Return the most tokens a block takes, whose sums must fit its registers."""
    # Consumers that copy rows of two parts, or scale them by weights, need registers for it.
    needs_registers = problem.dtype == "bfloat16" or problem.weights_dtype is not None
    if needs_registers and problem.gather and not problem.gated:
        return 176
    return SM90_MAX_BLOCK_N[problem.dtype]


def select_sm90_config(problem: GroupedGemmProblem) -> Sm90Config:
    """Return the deepest pipeline for a problem's row tiles, then the most chunks that fit.

    A tile higher than one block can take is shared by a cluster of two. The highest of fp8 is that
    of ``sm90_fp8_rows_grouped_gemm``.

    Raises
    ------
    ValueError
        If no block can take such a tile.
    """
    heights = sm90_tiles(problem.dtype)
    if problem.tile not in heights:
        raise ValueError(f"tile: expected one of {heights}, got {problem.tile}")
    cluster = 1 if problem.tile <= _sm90_max_block_n(problem) else 2
    block_n = problem.tile // cluster
    fewest, most = _sm90_chunks(block_n, problem)
    fewest = min(most, max(fewest, 2))
    for stages in range(SM90_MAX_STAGES, 1, -1):
        for chunks in range(most, fewest - 1, -1):
            config = Sm90Config(block_n, stages, chunks, cluster)
            if why_illegal_sm90(config, problem) is None:
                return config
    raise AssertionError(f"no configuration for {problem}")


def why_illegal_sm90(config: Sm90Config, problem: GroupedGemmProblem) -> str | None:
    """Return why the Hopper kernel cannot run `problem` with `config`, or None if it can."""
    if config.cluster not in (1, 2):
        return f"cluster = {config.cluster}: expected 1 or 2"
    most = _sm90_max_block_n(problem)
    blocks = tuple(h for h in sm90_block_heights(problem.dtype) if h <= most)
    if config.block_n not in blocks and not _is_rows(problem.dtype, config.block_n):
        return f"block_n = {config.block_n}: expected one of {blocks}"
    if config.block_n * config.cluster < problem.tile:
        return f"{config.cluster} blocks of {config.block_n} do not hold a tile of {problem.tile}"
    least = SM90_MIN_STAGES[problem.dtype]
    if config.num_stages < least:
        return f"num_stages = {config.num_stages}: the pipeline needs {least}"
    fewest, _ = _sm90_chunks(config.block_n, problem)
    if config.num_chunks < fewest:
        return f"num_chunks = {config.num_chunks}: the epilogue needs {fewest}"
    needed = sm90_smem_bytes(config, problem)
    if needed > SM90_SMEM_BYTES:
        return f"{needed} bytes of shared memory: a block may have {SM90_SMEM_BYTES}"
    return None


def sm90_block_heights(dtype: str) -> tuple[int, ...]:
    """Return the tokens a block of the Hopper kernels can take as columns of its products."""
    most = SM90_MAX_BLOCK_N[dtype]
    return tuple(h for h in (*range(8, 65, 8), 72, 80, 88, *range(96, 193, 16)) if h <= most)


def sm90_tiles(dtype: str) -> tuple[int, ...]:
    """Return the row tile heights of the Hopper kernels: of one block, or of a pair."""
    return SM90_TILES[dtype]


def runs_sm90(problem: GroupedGemmProblem) -> bool:
    """Tell whether a Hopper kernel runs a problem: those of a layer's two GEMMs."""
    if problem.dtype not in SM90_MAX_BLOCK_N or problem.tile not in sm90_tiles(problem.dtype):
        return False
    activated = problem.gated or problem.activated
    return problem.output_dtype == (problem.dtype if activated else "bfloat16")


def select_gemm(
    problem: GroupedGemmProblem, arch: str, max_smem_bytes: int, *, portable: bool = False
) -> GroupedGemmConfig | Sm90Config:
    """Return the kernel and configuration for a problem: Hopper's own where there is one.

    Raises
    ------
    ValueError
        If no configuration can run the problem.
    """
    if not portable and arch == SM90_ARCH and runs_sm90(problem):
        return select_sm90_config(problem)
    return select_config(problem, max_smem_bytes)


def select_sm90_tile(num_tokens: int, top_k: int, num_experts: int, dtype: str) -> int:
    """Return the tile height for the mean number of rows an expert gets.

    The highest, within what an expert can get at most, of those within a fiftieth of the least
    expected work: uneven routing gains by a high one. Work is that of an expert with normally
    distributed rows (a uniform draw): the tiles it is cut into times what the blocks of a tile
    cost, which is their tokens and a part that does not depend on them, or the time in which their
    weights come from memory.

    Under load, H200 at its power limit, both GEMMs back to back in us, uniform routing / Zipf 1.2:
    fp8, DeepSeek-V3: T = 64 (mean 2) 8 2175, 64 2216; 512 (16) 24 2628 / 2876, 32 2626, 48 2716 /
    2786, 88 2849 / 2941; 1024 (32) 40 2823, 64 2793, 88 2874; 4096 (128) 144 4497, 256 4508.
    bf16: 512 (16) 24 5192 / 5550, 48 5198 / 5246, 128 5574 / 5620; 4096 (128) 144 6774, 160 6618.

    Single runs on a cool chip, likewise; comparable within a line.
    fp8, DeepSeek-V3:
    T = 64 (mean 2): 8 2162, 64 2188
    256 (8): 16 2596 / 2419, 48 2600 / 2228, 88 2589 / 2208
    512 (16): 24 2642 / 2863, 48 2630 / 2674, 88 2638 / 2637
    1024 (32): 48 2669 / 3038, 88 2674 / 2956
    2048 (64): 88 2712 / 3406, 144 2870 / 3600, 256 2898 / 3388
    3072 (96): 112 3348, 144 3498, 256 3053
    4096 (128): 88 3991 / 4593, 144 3794 / 4854, 256 3790 / 4380
    4480 (140): 160 3958, 176 3992, 256 4307
    5120 (160): 176 4431 / 5352, 256 5040 / 4829
    6400 (200): 144 7180 / 6523, 256 5076 / 5655
    8192 (256): 176 7689, 256 6066
    fp8, Mixtral:
    256 (64): 80 364 / 443, 88 371 / 444
    512 (128): 144 541 / 582, 160 504 / 620, 256 538 / 534
    1024 (256): 144 854, 256 797
    4096 (1024): 176 2776, 256 2568
    fp8, Qwen3:
    256 (16): 24 183, 88 188
    512 (32): 48 175, 88 182
    1024 (64): 80 187, 88 188, 256 223
    2048 (128): 144 287 / 339, 256 281 / 296
    4096 (256): 144 481, 256 414
    bf16, DeepSeek-V3:
    256 (8): 16 5100, 128 5128
    512 (16): 24 5205 / 5558, 64 5215 / 5213, 128 5163 / 5145
    1024 (32): 48 5283 / 5893, 128 5277 / 5661
    2048 (64): 80 5409 / 6358, 128 5346 / 6267, 192 5728 / 6992
    4096 (128): 128 6612 / 7937, 144 5728 / 7970, 160 5771 / 8022, 192 6223 / 8874
    6400 (200): 144 9433, 192 10157, 224 8236, 256 8690
    8192 (256): 144 9324, 192 12244, 288 9453
    16384 (512): 192 18007, 176 19430, 288 20194
    bf16, Mixtral:
    256 (64): 72 690, 128 706
    1024 (256): 144 1146 / 1371, 176 1326 / 1253, 192 1424 / 1324, 288 1100 / 1415
    4096 (1024): 176 4110, 288 4285, 192 4555
    """
    mean = num_tokens * top_k / max(num_experts, 1)
    fixed = {"float8_e4m3fn": 30}.get(dtype, 40)  # tokens that cost as much
    alone = {"float8_e4m3fn": 1.19}.get(dtype, 1.0)  # of a block without a partner
    least, per_token, free = SM90_FLOOR[dtype]

    def expected_steps(height: int) -> list[float]:
        """Return the probabilities of more than 0, height, 2 * height, ... rows."""
        ends = range(height, int(mean + 6 * mean**0.5) + 1, height)
        return [1.0, *(0.5 * math.erfc((row - mean) / (2 * mean) ** 0.5) for row in ends)]

    def cost(height: int) -> float:
        if _is_rows(dtype, height // 2):
            one, both = SM90_ROWS_COST
            steps = expected_steps(SM90_ROWS)
            return one * sum(steps[::2]) + (both - one) * sum(steps[1::2])
        pair = height > SM90_MAX_BLOCK_N[dtype]
        tile = height + 2 * fixed if pair else alone * (height + fixed)
        floor = least + per_token * max(height - free, 0)
        return sum(expected_steps(height)) * max(tile, 1.1 * floor if pair else floor)

    heights = sm90_tiles(dtype)
    most = next((height for height in heights if height >= num_tokens), heights[-1])
    costs = {height: cost(height) for height in heights if height <= most}
    return max(h for h in costs if costs[h] <= 1.02 * min(costs.values()))


def copies_rows(
    num_tokens: int, top_k: int, num_experts: int, intermediate_size: int, dtype: str
) -> bool:
    """Tell whether the Hopper GEMM1 is faster with its tokens copied to expert order beforehand.

    Gathered tokens come to shared memory by ``cp.async``, which holds up the tensor cores' operands
    where these are what limits: from 256 tokens an expert on. The copy takes the less of the time
    the more columns there are.

    H200 under load, GEMM1 in us, gathered / in expert order: fp8 DeepSeek-V3 T = 16384 8543 / 7989,
    Mixtral 7307 / 6824; bf16 DeepSeek-V3 14035 / 12503, Mixtral 12120 / 11140, T = 4096 3245 /
    2951.
    """
    mean = num_tokens * top_k / max(num_experts, 1)
    return dtype in ("bfloat16", "float8_e4m3fn") and mean >= 256 and intermediate_size >= 1536
