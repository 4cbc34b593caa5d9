"""Which configuration of the grouped GEMM runs a problem: pure functions over frozen dataclasses.

Owns the legality rule, the shared-memory formula, the candidates and the thresholds. Touches no
device: the caller says how much shared memory a block may have.
"""

from __future__ import annotations

from dataclasses import dataclass

ROW_BYTES = 128  # bytes of k per pipeline stage
STATIC_SMEM_BYTES = 2048  # the epilogue's own shared memory, at most
MAX_STAGES = 4
TILES = (16, 32, 64, 128)
MAX_ACCUMULATORS = 128  # per thread, beside fragments and addresses


@dataclass(frozen=True)
class GroupedGemmProblem:
    """What is multiplied: element type, epilogue, and row tile height.

    Parameters
    ----------
    dtype : str
        ``"bfloat16"``, ``"float16"`` or ``"float8_e4m3fn"``.
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
    """

    dtype: str
    output_dtype: str
    gated: bool
    gather: bool
    tile: int
    activated: bool = False


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
    configs = [
        GroupedGemmConfig(problem.tile, block_n, stages, *warps)
        for stages in range(MAX_STAGES, 1, -1)
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
SM90_MAX_BLOCK_N = 112  # two accumulators, the running product and the scales fill the registers
SM90_MAX_STAGES = 6


@dataclass(frozen=True)
class Sm90Config:
    """Tile sizes of ``sm90_fp8_grouped_gemm``: names as the kernel's compile-time constants.

    A block takes up to `block_n` tokens; the `cluster` blocks that share weights take a row tile.
    """

    block_n: int
    num_stages: int
    cluster: int = 1


def sm90_smem_bytes(config: Sm90Config, gated: bool) -> int:
    """Return the dynamic shared memory of a block, the kernel's ``Smem`` rounded up to 1 KB."""
    n, stages = config.block_n, config.num_stages
    staging = n * 144 if gated else 2 * 64 * 144
    floats = stages * (n + 2) + 8 * n + n
    size = stages * (2 * 128 + n) * ROW_BYTES + staging + 4 * floats + 16 * stages
    return -(-size // 1024) * 1024


def select_sm90_config(tile: int, gated: bool) -> Sm90Config:
    """Return the deepest pipeline that fits row tiles of up to `tile` tokens.

    Raises
    ------
    ValueError
        If no block can take such a tile.
    """
    if tile in sm90_tiles():
        for stages in range(SM90_MAX_STAGES, 1, -1):
            config = Sm90Config(tile, stages)
            if sm90_smem_bytes(config, gated) <= SM90_SMEM_BYTES:
                return config
    raise ValueError(f"tile: expected one of {sm90_tiles()}, got {tile}")


def why_illegal_sm90(config: Sm90Config, problem: GroupedGemmProblem) -> str | None:
    """Return why the Hopper kernel cannot run `problem` with `config`, or None if it can."""
    if config.cluster not in (1, 2):
        return f"cluster = {config.cluster}: expected 1 or 2"
    if config.block_n not in sm90_tiles():
        return f"block_n = {config.block_n}: expected one of {sm90_tiles()}"
    if config.block_n * config.cluster < problem.tile:
        return f"{config.cluster} blocks of {config.block_n} do not hold a tile of {problem.tile}"
    if config.num_stages < 2:
        return f"num_stages = {config.num_stages}: the pipeline needs 2"
    needed = sm90_smem_bytes(config, problem.gated)
    if needed > SM90_SMEM_BYTES:
        return f"{needed} bytes of shared memory: a block may have {SM90_SMEM_BYTES}"
    return None


def sm90_tiles() -> tuple[int, ...]:
    """Return the row tile heights of the Hopper kernels: whole boxes of tokens."""
    return (*range(8, 65, 8), *range(80, SM90_MAX_BLOCK_N + 1, 16))


def runs_sm90(problem: GroupedGemmProblem) -> bool:
    """Tell whether ``sm90_fp8_grouped_gemm`` runs a problem: those of a layer's two GEMMs."""
    output = "float8_e4m3fn" if problem.gated else "bfloat16"
    fp8 = problem.dtype == "float8_e4m3fn"
    runs = fp8 and problem.output_dtype == output and problem.tile in sm90_tiles()
    return runs and not problem.activated


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
        return select_sm90_config(problem.tile, problem.gated)
    return select_config(problem, max_smem_bytes)


def select_sm90_tile(num_slots: int, num_experts: int) -> int:
    """Return the tile height for the mean number of rows an expert gets.

    Tokens are the n of the wgmma, in steps of eight, and an expert's rows are split evenly, so the
    height is that of the parts into which an expert with the mean and 2 standard deviations more
    (of a uniform draw) is cut.

    H200, DeepSeek-V3, both GEMMs in us at the heights tried:
    T = 16384 (mean 512): 112 16962, 96 19052. T = 4096 (128): 80 5127, 64 5283, 96 6201, 112 6886.
    T = 512 (16): 24 2678, 32 2680. T = 64 (2): 8 2291, 16 2286. The last two are ties.
    """
    mean = num_slots / max(num_experts, 1)
    likely = mean + 2 * mean**0.5
    parts = max(1, -(-likely // SM90_MAX_BLOCK_N))
    heights = sm90_tiles()
    return next((height for height in heights if likely <= height * parts), heights[-1])
