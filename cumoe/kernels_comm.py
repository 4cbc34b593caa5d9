"""The host side of the all-reduce kernels: their shape, their constants and their launches.

As ``kernels.py``, for ``allreduce_one_shot.cu`` and ``allreduce_two_shot.cu``. The shape of a
launch changes no bit of a result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cumoe.arrays import DTYPES, dtype_name
from cumoe.config import Array
from cumoe.kernels import TYPES, Launch, make
from cumoe.launch import KernelSpec

INPUTS = {"rows": 0, "experts": 1, "plain": 2}
"""InputPolicy of allreduce.cuh."""

QUANTS = {
    None: 0,
    "fp8_tensor": 1,
    "fp8_token": 2,
    "fp8_block": 3,
    "fp8_ue8m0": 4,
    "nvfp4": 5,
    "nvfp4_swizzled": 6,
}
"""QuantFormat of allreduce.cuh."""

CHUNK = 256  # kChunk
MAX_HIDDEN_SIZE = 256 * CHUNK  # kMaxChunks
MAX_RANKS = 16  # kMaxRanks
MAX_WARPS = 16
THREADS_PER_SM = 512
"""Threads that are resident together: each may take 128 registers."""

CLUSTERS = (8, 4, 2, 1)


@dataclass(frozen=True)
class AllReduceConfig:
    """The shape of an all-reduce kernel.

    Attributes
    ----------
    cluster : int
        Blocks that share a token.
    warps : int
        Of a block.
    vecs : int
        Groups of eight columns that a thread holds.
    num_clusters : int
        Of the grid.
    """

    cluster: int
    warps: int
    vecs: int
    num_clusters: int

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return 32 * self.warps

    @property
    def blocks_per_sm(self) -> int:
        """Return the blocks that an SM holds at least."""
        return max(1, THREADS_PER_SM // self.threads)


def resident_clusters(cluster: int, warps: int, num_sms: int) -> int:
    """Return how many clusters are resident together on an otherwise empty GPU, at least.

    A cluster lies within a group of SMs whose number its size need not divide: where it is more
    than a pair, half of the room is counted.
    """
    blocks = num_sms * max(1, THREADS_PER_SM // (32 * warps))
    return blocks // cluster // (2 if cluster > 2 else 1)


def select_config(
    num_tokens: int, hidden_size: int, num_sms: int, max_cluster: int = 8
) -> AllReduceConfig:
    """Return the shape for a number of tokens: the more blocks for each, the fewer they are.

    Parameters
    ----------
    num_tokens : int
        That one launch handles, at least 1.
    hidden_size : int
        At most ``MAX_HIDDEN_SIZE``.
    num_sms : int
    max_cluster : int
        1 before sm_90, which has no clusters.

    Raises
    ------
    ValueError
        If a token is too wide for ``max_cluster`` blocks.
    """
    chunks = -(-hidden_size // CHUNK)
    streaming = None
    for cluster in CLUSTERS:
        for vecs in (1, 2, 4):
            warps = -(-chunks // (cluster * vecs))
            if cluster > min(max_cluster, chunks) or warps > MAX_WARPS:
                continue
            room = resident_clusters(cluster, warps, num_sms)
            if vecs < 4 and 1 <= num_tokens <= room:
                return AllReduceConfig(cluster, warps, vecs, num_tokens)
            # Of those that take turns, the narrowest cluster whose threads hold two groups.
            if vecs == 2 or (streaming is None and cluster == 1):
                streaming = AllReduceConfig(cluster, warps, vecs, min(num_tokens, room))
    if streaming is None:
        raise ValueError(
            f"hidden_size: expected at most {4 * MAX_WARPS * max_cluster * CHUNK} on this GPU, "
            f"got {hidden_size}"
        )
    return streaming


@dataclass(frozen=True, eq=False)
class PeerMemory:
    """The blocks of all ranks as one rank addresses them; sizes in bytes (``comm/layout.py``).

    Attributes
    ----------
    rank : int
    buffers : tuple of int
        Address of each rank's block.
    state : array, int32
        Of this rank alone.
    buffer_bytes, slot_bytes, share_bytes, results_offset : int
    """

    rank: int
    buffers: tuple[int, ...]
    state: Array | None
    buffer_bytes: int
    slot_bytes: int
    share_bytes: int
    results_offset: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """The arrays of one rank; None for those that are not there.

    Attributes
    ----------
    policy : {"rows", "experts", "plain"}
        What `rows` are: one for each slot, one for each expert and token, or one for each token.
    rows, weights, permuted_idx, shared : array or None
    routed_scaling_factor : float
    residual, norm_weight : array or None
    eps, weight_offset : float
    quantize : str or None
    quant_scale : array or None
        Of ``"fp8_tensor"`` and nvfp4.
    group_size : int
        Of ``"fp8_ue8m0"``.
    sum_out, result_out, norm_out, quant_out, scale_out : array or None
        `result_out` is the sum, with the residual if there is one; `sum_out` the one without.
    """

    policy: str
    rows: Array
    weights: Array | None = None
    permuted_idx: Array | None = None
    shared: Array | None = None
    routed_scaling_factor: float = 1.0
    residual: Array | None = None
    norm_weight: Array | None = None
    eps: float = 1e-6
    weight_offset: float = 0.0
    quantize: str | None = None
    quant_scale: Array | None = None
    group_size: int = 0
    sum_out: Array | None = None
    result_out: Array | None = None
    norm_out: Array | None = None
    quant_out: Array | None = None
    scale_out: Array | None = None

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens."""
        like = self.permuted_idx if self.policy == "rows" else self.rows
        assert like is not None
        return int(like.shape[1 if self.policy == "experts" else 0])

    @property
    def hidden_size(self) -> int:
        """Return the columns of a token."""
        return int(self.rows.shape[-1])

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tokens on the wire."""
        return self.num_tokens * self.hidden_size * int(self.rows.dtype.itemsize)


@functools.cache
def allreduce_spec(
    policy: str,
    dtype: str,
    weights_dtype: str | None,
    quantize: str | None,
    ranks: int,
    config: AllReduceConfig,
    *,
    group_size: int = 0,
    two_shot: bool = False,
) -> KernelSpec:
    """Return the kernel of a policy, its dtypes, a format and a number of ranks."""
    return KernelSpec(
        "allreduce_two_shot" if two_shot else "allreduce_one_shot",
        (
            ("INPUT", INPUTS[policy]),
            ("TYPE", TYPES[dtype]),
            ("WEIGHTS_TYPE", TYPES[weights_dtype or "float32"]),
            ("QUANT", QUANTS[quantize]),
            ("GROUP", group_size),
            ("RANKS", ranks),
            ("THREADS", config.threads),
            ("VECS", config.vecs),
            ("CLUSTER", config.cluster),
            ("BLOCKS_PER_SM", config.blocks_per_sm),
        ),
        # Each operation is rounded on its own, as in the twin.
        fmad=False,
    )


def allreduce(
    tokens: Tokens, memory: PeerMemory, config: AllReduceConfig, *, two_shot: bool = False
) -> Launch:
    """Launch for the all-reduce of at least one token and what follows it."""
    t, ranks = tokens, len(memory.buffers)
    assert not two_shot or t.sum_out is None, "only the result goes over the wire"
    assert config.cluster * config.warps * config.vecs * CHUNK >= t.hidden_size, config
    weights_dtype = None if t.weights is None else dtype_name(t.weights)
    spec = allreduce_spec(
        t.policy,
        dtype_name(t.rows),
        weights_dtype,
        t.quantize,
        ranks,
        config,
        group_size=t.group_size,
        two_shot=two_shot,
    )
    columns = {"rows": 1, "experts": 0}.get(t.policy)
    slots = t.rows if t.permuted_idx is None else t.permuted_idx
    scale_strides = (0, 0)
    if t.scale_out is not None:
        size = DTYPES[dtype_name(t.scale_out)].itemsize
        scale_strides = tuple(s // size for s in t.scale_out.strides)
    launch = make(
        spec,
        (config.num_clusters * config.cluster, 1, 1),
        config.threads,
        cluster=config.cluster,
        rows=t.rows,
        weights=t.weights,
        permuted_idx=t.permuted_idx,
        shared=t.shared,
        residual=t.residual,
        norm_weight=t.norm_weight,
        sum_out=t.sum_out,
        result_out=t.result_out,
        norm_out=t.norm_out,
        quant_out=t.quant_out,
        scale_out=t.scale_out,
        quant_scale=t.quant_scale,
        state=memory.state,
        buffer_bytes=memory.buffer_bytes,
        slot_bytes=memory.share_bytes if two_shot else memory.slot_bytes,
        results_offset=memory.results_offset,
        scale_row_stride=scale_strides[0],
        scale_block_stride=scale_strides[1],
        num_tokens=t.num_tokens,
        hidden_size=t.hidden_size,
        columns=1 if columns is None else int(slots.shape[columns]),
        rank=memory.rank,
        routed_scaling_factor=t.routed_scaling_factor,
        eps=t.eps,
        weight_offset=t.weight_offset,
    )
    launch.params["buffers"][:ranks] = memory.buffers
    return launch
