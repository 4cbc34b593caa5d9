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
SM90_MAX_BLOCK_N = {"bfloat16": 176, "float8_e4m3fn": 88, FP8_TENSOR: 176}
_ONE_SUM_TILES = (8, 80, 176, 288)  # of the kernel that has one sum for all of k
SM90_TILES = {
    "bfloat16": _ONE_SUM_TILES,
    "float8_e4m3fn": (8, 72, 88, 256),
    FP8_TENSOR: _ONE_SUM_TILES,
}
"""Row tile heights that the Hopper kernels are compiled for: of one block, or of a pair."""
SM90_MIN_STAGES = {"bfloat16": 3, "float8_e4m3fn": 4, FP8_TENSOR: 3}  # fp8 takes two at a time

SM90_ROWS = 128
"""Tokens of a block of ``sm90_fp8_rows_grouped_gemm``, which no other fp8 kernel has."""

_ONE_SUM_CHOICES = ((64, 80), (176, 176), (272, 288), (math.inf, 176))
SM90_CHOICES = {
    "bfloat16": _ONE_SUM_CHOICES,
    "float8_e4m3fn": ((56, 72), (80, 88), (math.inf, 256)),
    FP8_TENSOR: _ONE_SUM_CHOICES,
}
"""The tile height up to a mean number of rows of an expert."""


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

    @property
    def load_stages(self) -> int:
        """Stages whose weights are loaded at a time, 128 bytes of each row for each of them.

        Pairs read 256 neighbouring bytes of a row at a time, for which DRAM is faster, and wait for
        two free stages. H200, DeepSeek-V3, one / two at a time, both GEMMs in us: with five and six
        stages bf16 T = 256 5137 / 5045, fp8 64 2233 / 2190, 8 606 / 594; with four bf16 512 5186 /
        5370, fp8 512 2633 / 2674, 16384 10448 / 11199; with three bf16 16384 17525 / 25145.
        """
        return 2 if self.num_stages > 4 else 1


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
    return -(-size // 16) * 16


def _is_rows(dtype: str, block_n: int) -> bool:
    """Tell whether a block's tokens are the rows of its products, not their columns."""
    return dtype == "float8_e4m3fn" and block_n == SM90_ROWS


def _sm90_chunks(block_n: int, problem: GroupedGemmProblem) -> tuple[int, int]:
    """Return the fewest and the most chunk buffers that are of use."""
    if _is_rows(problem.dtype, block_n):
        return (2, 2) if problem.output_dtype == "float8_e4m3fn" else (1, 4)
    if problem.output_dtype == "float8_e4m3fn":  # the staging of requantised rows lies there
        teams = 1 if problem.gated else 2
        chunks = -(-block_n * ((144 + 16) * teams + 4 * 8) // (2 * SM90_CHUNK_BYTES))
        return chunks, chunks
    if problem.gather:
        return 1, 1
    return 1, -(-block_n // 32) * (1 if problem.gated else 2)


def select_sm90_config(problem: GroupedGemmProblem) -> Sm90Config:
    """Return the deepest pipeline for a problem's row tiles, then the most chunks that fit.

    Blocks are those of the least height in ``SM90_TILES`` that holds a tile; what they do not need
    of it they do not multiply. A pair of blocks, a cluster, has the highest. That of fp8 is
    ``sm90_fp8_rows_grouped_gemm``.

    Raises
    ------
    ValueError
        If no block can take such a tile.
    """
    heights = SM90_TILES[problem.dtype]
    if not 0 < problem.tile <= heights[-1] or problem.tile % 8:
        raise ValueError(f"tile: expected a multiple of 8 up to {heights[-1]}, got {problem.tile}")
    height = next(height for height in heights if height >= problem.tile)
    cluster = 1 if height <= SM90_MAX_BLOCK_N[problem.dtype] else 2
    block_n = height // cluster
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
    blocks = sm90_block_heights(problem.dtype)
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
    return tuple(h for h in (*range(8, 65, 8), 72, 80, 88, *range(96, 177, 16)) if h <= most)


def runs_sm90(problem: GroupedGemmProblem) -> bool:
    """Tell whether a Hopper kernel runs a problem: those of a layer's two GEMMs."""
    highest = SM90_TILES.get(problem.dtype, (0,))[-1]
    if problem.tile > highest or problem.tile % 8:
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

    A block multiplies over as many columns as its tokens need, so a high tile costs an expert of
    few tokens nothing but stages in flight; the experts with most tokens under uneven routing are
    cut into fewer tiles. None is higher than what an expert can get at most needs.

    H200, both GEMMs in us, uniform routing / Zipf 1.2; comparable within a line. Up to a mean of 72
    with L2 flushed, beyond back to back, at the power limit.
    fp8, DeepSeek-V3:
    T = 256 (mean 8): 32 2505 / 2222, 48 2506 / 2198, 64 2511 / 2187
    512 (16): 48 2542 / 2558, 64 2546 / 2536, 88 2612 / 2600
    1024 (32): 64 2645 / 2820, 72 2649 / 2788, 88 2670
    1536 (48): 64 2665 / 3054, 72 2669 / 3012, 88 2699 / 3032
    2048 (64): 72 2756 / 3276, 88 2739 / 3279
    2560 (80): 88 3227 / 3934, 256 3331 / 3885
    3072 (96): 88 4072, 256 3582
    5120 (160): 256 5258, pairs of 88 5090
    fp8, others: Mixtral T = 128 (32): 64 352, 88 362; 256 (64): 72 411, 88 371, 256 442; 384 (96):
    88 542, 256 531; Qwen3 T = 512 (32): 64 176, 88 182; 1024 (64): 72 191, 88 194, 256 217
    bf16, DeepSeek-V3:
    T = 64 (2): 32 4241, 64 4252
    256 (8): 32 5046 / 4482, 64 5065 / 4407, 80 5056, 128 - / 4472
    512 (16): 64 5116 / 5098, 80 5109, 128 5197 / 5115
    1024 (32): 64 5197 / 5511, 80 5194 / 5412, 128 - / 5420
    1536 (48): 64 5247, 80 5256, 128 5319
    2048 (64): 80 5333 / 6188, 128 5394 / 6042, 160 5571 / 6387
    3072 (96): 128 6051, 160 6052, 176 6052, 288 6308
    4096 (128): 160 6670 / 8396, 176 6445 / 8182
    5120 (160): 176 7417, 288 8187
    6144 (192): 176 9690, 288 9206
    8192 (256): 176 11101 / 12180, 288 10550 / 12247
    10240 (320): 176 12768, 288 14861
    12288 (384): 176 15766, 288 16700
    14336 (448): 176 17418, 288 18773
    16384 (512): 176 19412 / 20784, 288 19703 / 21254
    bf16, others: Mixtral T = 256 (64): 80 683, 128 698; 512 (128): 80 - / 912, 176 - / 957;
    160 805 / 918, 192 833 / 1019, 288 932 / 975; 2048 (512; few tiles, which fill the last round
    better): 176 2499, 288 2370; 4096 (1024): 176 4540, 288 4653; Qwen3 T = 256 (16): 64 305, 128
    315; 1024 (64): 80 326, 128 335; 8192 (512): 176 1181, 288 1200
    """
    heights = SM90_TILES[dtype]
    mean = num_tokens * top_k / max(num_experts, 1)
    chosen = next(height for most, height in SM90_CHOICES[dtype] if mean <= most)
    enough = next((height for height in heights if height >= num_tokens), heights[-1])
    return min(chosen, enough)


def orders_rows(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    intermediate_size: int,
    dtype: str,
    quantizes: bool = False,
) -> bool:
    """Tell whether the Hopper GEMM1 is faster with its tokens in expert order beforehand.

    Gathered tokens come to shared memory by ``cp.async``, which holds up the tensor cores' operands
    where these are what limits: from 256 tokens an expert on. The copy takes the less of the time
    the larger an expert is. If the layer `quantizes` its tokens, that writes them in order,
    which takes less than a copy of its own.

    H200 under load, GEMM1 in us, gathered / in expert order, with the copy: fp8 DeepSeek-V3
    T = 16384 8543 / 7989, Mixtral 7307 / 6824; bf16 DeepSeek-V3 14035 / 12503, Mixtral 12120 /
    11140, T = 4096 3245 / 2951. Quantisation and GEMM1, L2 flushed: DeepSeek-V3 T = 16384 7655 /
    6619, 8192 3893 / 3683, 4096 2363 / 2333 (back to back with GEMM2 4266 / 4229, Zipf 1.2 4611 /
    4475), 3072 1948 / 1960; Mixtral 1024 583 / 485, 512 407 / 385; Qwen3 16384 811 / 808, 4096
    254 / 252. With one scale for a tensor, where products are shorter, likewise, and of whole
    layers back to back: Mixtral 4096 1478 / 1378 (2560 / 2447), 1024 412 / 392 (724 / 716), 512 267
    / 268; Llama 4 Scout 16384 4321 / 4089 (7471 / 7314), 4096 1111 / 1102 (1997 / 1956), 1024 474 /
    471 (787 / 810); Maverick 32768 9197 / 9128; DeepSeek-V3 16384 6691 / 6646, 6810 / 6783 (12637
    / 12408, 12393 / 12886), 8192 3649 / 3707; Qwen3 16384 716 / 728.
    """
    mean = num_tokens * top_k / max(num_experts, 1)
    if dtype == FP8_TENSOR:
        return mean >= 256 and intermediate_size >= 4096
    return mean >= (128 if quantizes else 256) and intermediate_size >= 1536
