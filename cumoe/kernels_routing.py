"""The host side of routing and permutation: how tokens are cut into chunks, and the launches.

As ``kernels.py``. From logits, or from ids that the caller gives, to ids, weights and permutation:
one launch for few tokens, two for many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cumoe.arrays import dtype_name
from cumoe.config import Array, ExpertShard, Permutation, Routing, RoutingMethod
from cumoe.kernels import TYPES, Launch, make
from cumoe.launch import Device, KernelSpec

METHODS = {method: number for number, method in enumerate(RoutingMethod)}
METHODS[RoutingMethod.RENORMALIZE_NAIVE] = METHODS[RoutingMethod.RENORMALIZE]

TOPK_WARPS = 4
"""Warps of a block of routing_topk."""

CLUSTER = 8
LARGE_CLUSTER = {"sm_90a": 16}
LARGE_CLUSTER_SMS = 121
"""Blocks of a cluster: on any GPU that has clusters, and, by architecture, on one with so many SMs.
A cluster is within one of at most 8 GPCs, so with 121 SMs one of them has 16."""

BLOCK_TOKENS = 4
BLOCK_SLOTS = 512
"""The most tokens (from logits) and slots (of given ids) that one block routes and permutes; where
there are no clusters twice as many tokens."""

SMALL_CLUSTER_TOKENS = 4
"""Tokens of each block up to which a cluster has no more than ``CLUSTER`` blocks."""

CLUSTER_TOKENS = 16
CLUSTER_SLOTS = 512
"""As ``BLOCK_TOKENS`` for each block of a cluster. Past it there are two launches.

H200, DeepSeek-V3, us: T = 8 in one block 4.84, in clusters of 4 / 8 / 16 4.65 / 4.52 / 4.73; T = 32
in 8 / 16 4.78 / 4.82; T = 64 5.14 / 4.92. Since each block stores its counts to all of a cluster:
T = 256 in 16 5.07, in two launches 5.48; T = 512 in 16 7.31, in two launches 6.5 at most."""

LARGE_CLUSTER_BYTES = 216 << 10
CLUSTER_BYTES = 88 << 10
"""Dynamic shared memory of a block up to which there is a cluster, on a GPU that has large ones and
on any: what is left beside the static. Only thousands of local experts take more."""

CLUSTER_EXPERTS = 384
"""Routed experts past which a block of a cluster has half of ``CLUSTER_TOKENS``, each of which is
then so much work that it is better spread over more blocks."""

PERMUTE_WARPS = {1024: 16, 2048: 8}
"""Most routed experts -> warps of a block of routing_permute, which bound its registers."""

COUNT_WARPS = 16
GROUPED_COUNT_WARPS = {1024: 16, 2048: 8}
"""The same of routing_count, which takes more registers where experts are in groups."""

PLACE_WARPS = 16
"""Warps of a block of permute_place."""

MAX_CHUNKS = 132
FEW_CHUNKS = 64
FEW_CHUNKS_TOKENS = 1024
MIN_CHUNK_TOKENS = 4
"""Blocks of each of the two launches: the SMs of an H200, half of them up to so many tokens; and
the fewest tokens of a block. H200, DeepSeek-V3, us with 64 / 128 blocks: T = 1024 7.3 / 8.4, 2048
9.4 / 8.7, 4096 13.6 / 11.6."""

MAX_CHUNK_SLOTS = (1 << 16) - 1
"""Counts of a chunk are 16 bits wide."""


@dataclass(frozen=True)
class Experts:
    """The experts of a call, and those that are held here.

    Parameters
    ----------
    num_experts, num_shared : int
        Routed experts over all ranks, and shared experts.
    shard : ExpertShard
    """

    num_experts: int
    num_shared: int
    shard: ExpertShard

    @property
    def num_local(self) -> int:
        """Experts evaluated here, shared ones included."""
        return self.shard.num_local_experts + self.num_shared

    @property
    def num_words(self) -> int:
        """Words that hold the counts of a chunk, two experts each."""
        return max(-(-self.num_local // 2), 1)

    def fields(self, num_tokens: int) -> dict[str, int]:
        """Return the ExpertRange of experts.cuh."""
        start, stop = self.shard.shared_token_range(num_tokens)
        return {
            "num_experts": self.num_experts,
            "num_shared": self.num_shared,
            "expert_offset": self.shard.expert_offset,
            "num_local_routed": self.shard.num_local_experts,
            "shared_token_start": start,
            "shared_token_stop": stop,
        }


@dataclass(frozen=True, eq=False)
class Source:
    """Where ids and weights come from, and the arrays they are written to.

    Parameters
    ----------
    ids, weights : array or None
        Written: ``(num_tokens, columns)``. With given ids, None if those will do as they are.
    logits, bias, replay, routing
        As :func:`cumoe.route`.
    ids_in, weights_in : array or None
        Given, in the place of logits: ``(num_tokens, top_k)``; no `weights_in` with packed words.
    packed : bool
    """

    ids: Array | None = None
    weights: Array | None = None
    logits: Array | None = None
    bias: Array | None = None
    replay: Array | None = None
    routing: Routing | None = None
    ids_in: Array | None = None
    weights_in: Array | None = None
    packed: bool = False

    @property
    def num_tokens(self) -> int:
        """Rows of the input."""
        given = self.ids_in if self.logits is None else self.logits
        assert given is not None
        return int(given.shape[0])

    @property
    def top_k(self) -> int:
        """Routed columns."""
        if self.routing is not None and self.logits is not None:
            return self.routing.top_k
        assert self.ids_in is not None
        return int(self.ids_in.shape[1])

    @property
    def num_experts(self) -> int:
        """Routed experts that logits are of, 0 with given ids."""
        return self.routing.num_experts if self.routing and self.logits is not None else 0

    @property
    def columns(self) -> int:
        """Columns of the ids that are permuted."""
        permuted = self.ids_in if self.ids is None else self.ids
        assert permuted is not None
        return int(permuted.shape[1])

    def defines(self) -> tuple[tuple[str, int], ...]:
        """Return the constants of given.cuh or routing.cuh."""
        if self.logits is not None:
            assert self.routing is not None
            bias = None if self.bias is None else dtype_name(self.bias)
            return (("GIVEN", 0), *routing_defines(self.routing, dtype_name(self.logits), bias))
        weights_in = "float32" if self.weights_in is None else dtype_name(self.weights_in)
        weights = "float32" if self.weights is None else dtype_name(self.weights)
        return (
            ("GIVEN", 1),
            ("PACKED", int(self.packed)),
            ("WEIGHTS_IN", TYPES[weights_in]),
            ("WEIGHTS_TYPE", TYPES[weights]),
        )

    def fields(self) -> dict[str, Any]:
        """Return the parameters that routing_permute and routing_count share."""
        routing = self.routing
        return {
            "logits": self.logits,
            "bias": self.bias,
            "ids_in": self.ids_in,
            "weights_in": self.weights_in,
            "ids": self.ids,
            "weights": self.weights,
            "replay": self.replay,
            "num_tokens": self.num_tokens,
            "top_k": self.top_k,
            "columns": self.columns,
            "scaling_factor": 1.0 if routing is None else routing.scaling_factor,
        }


def routing_defines(
    routing: Routing, logits_dtype: str, bias_dtype: str | None
) -> tuple[tuple[str, int], ...]:
    """Return the constants of routing.cuh for a method, its sizes and dtypes."""
    grouped = routing.num_groups > 1 and routing.method is RoutingMethod.DEEPSEEK_V3
    biased = routing.method in (RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2)
    has_bias = biased and bias_dtype is not None
    return (
        ("METHOD", METHODS[RoutingMethod(routing.method)]),
        ("NUM_EXPERTS", routing.num_experts),
        ("TOP_K", routing.top_k),
        ("NUM_GROUPS", routing.num_groups if grouped else 1),
        ("TOP_GROUPS", routing.top_groups if grouped else 1),
        ("NUM_SHARED_EXPERTS", routing.num_shared_experts),
        ("LOGITS_TYPE", TYPES[logits_dtype]),
        ("BIAS_TYPE", TYPES[str(bias_dtype)] if has_bias else -1),
        ("BIAS_ROUND_BF16", int(has_bias and routing.bias_round_bf16)),
        ("WEIGHTS_TYPE", TYPES[routing.weights_dtype]),
        ("NORMALIZE", int(routing.normalize is not False)),
    )


def routing_spec(routing: Routing, logits_dtype: str, bias_dtype: str | None) -> KernelSpec:
    """Return the kernel that routes alone for a method, its sizes and dtypes."""
    defines = routing_defines(routing, logits_dtype, bias_dtype)
    return KernelSpec("routing_topk", (*defines, ("WARPS_PER_BLOCK", TOPK_WARPS)))


def routing_topk(
    logits: Array,
    bias: Array | None,
    ids: Array,
    weights: Array,
    replay: Array | None,
    routing: Routing,
) -> Launch:
    """Launch for expert ids and weights from logits."""
    num_tokens = logits.shape[0]
    spec = routing_spec(routing, dtype_name(logits), None if bias is None else dtype_name(bias))
    return make(
        spec,
        (-(-num_tokens // TOPK_WARPS), 1, 1),
        TOPK_WARPS * 32,
        logits=logits,
        bias=bias,
        ids=ids,
        weights=weights,
        replay=replay,
        num_tokens=num_tokens,
        scaling_factor=routing.scaling_factor,
    )


def chunk_tokens(num_tokens: int, columns: int) -> int:
    """Return the tokens of a chunk of the two launches."""
    chunks = FEW_CHUNKS if num_tokens <= FEW_CHUNKS_TOKENS else MAX_CHUNKS
    wanted = max(-(-num_tokens // chunks), MIN_CHUNK_TOKENS)
    return min(wanted, MAX_CHUNK_SLOTS // columns)


def max_chunks(num_tokens: int, columns: int) -> int:
    """Return the most chunks that up to `num_tokens` tokens are cut into."""
    return max(MAX_CHUNKS, -(-num_tokens // (MAX_CHUNK_SLOTS // columns)))


def cluster_size(device: Device) -> int:
    """Return the blocks of a cluster on a device, 0 if it has no clusters."""
    return cluster_size_of(device.arch, device.num_sms)


def cluster_size_of(arch: str, num_sms: int) -> int:
    """Return the blocks of a cluster for an architecture and a number of SMs."""
    if arch.startswith("sm_8"):
        return 0
    return LARGE_CLUSTER.get(arch, CLUSTER) if num_sms >= LARGE_CLUSTER_SMS else CLUSTER


def num_blocks(source: Source, cluster: int) -> int:
    """Return the blocks of the one launch, 0 if it takes two; `cluster` is the device's."""
    work, one, each = source.num_tokens, BLOCK_TOKENS * (1 if cluster else 2), CLUSTER_TOKENS
    if source.logits is None:
        work, one, each = work * source.columns, BLOCK_SLOTS, CLUSTER_SLOTS
    else:
        each = CLUSTER_TOKENS // (1 if source.num_experts <= CLUSTER_EXPERTS else 2)
        if work <= CLUSTER * SMALL_CLUSTER_TOKENS:
            cluster = min(cluster, CLUSTER)
    if work <= one:
        return 1
    return cluster if work <= cluster * each else 0


def one_launch_blocks(source: Source, experts: Experts, cluster: int) -> int:
    """Return :func:`num_blocks`, or 0 where a cluster's counts are too much for shared memory."""
    blocks = num_blocks(source, cluster)
    most = LARGE_CLUSTER_BYTES if cluster > CLUSTER else CLUSTER_BYTES
    return 0 if blocks > 1 and _permute_bytes(source, experts, blocks) > most else blocks


def route_permute(
    source: Source, experts: Experts, permutation: Permutation, cluster: int, allocate: Any
) -> list[Launch]:
    """Launches that write ids, weights and a permutation: one, or two for many tokens.

    Parameters
    ----------
    source : Source
    experts : Experts
    permutation : Permutation
        Written.
    cluster : int
        :func:`cluster_size` of the device.
    allocate : callable
        Gives the buffer of a name, shape and dtype.
    """
    blocks = one_launch_blocks(source, experts, cluster)
    if blocks:
        return [_routing_permute(source, experts, permutation, blocks)]
    num_tokens, columns = source.num_tokens, source.columns
    tokens = chunk_tokens(num_tokens, columns)
    chunks = -(-num_tokens // tokens)
    counts = allocate("chunk_counts", (chunks, experts.num_words), "int32")
    shared = experts.fields(num_tokens)
    warps = min(_count_warps(source), max(tokens, 4))
    count = make(
        _count_spec(source),
        (chunks, 1, 1),
        32 * warps,
        smem_bytes=4 * experts.num_words,
        chunk_counts=counts,
        chunk_tokens=tokens,
        run_tokens=-(-tokens // warps),
        experts=shared,
        **source.fields(),
    )
    place = make(
        _PLACE_SPEC,
        (chunks, 1, 1),
        32 * PLACE_WARPS,
        smem_bytes=4 * _permute_words(experts, PLACE_WARPS),
        ids=source.ids_in if source.ids is None else source.ids,
        chunk_counts=counts,
        num_slots=num_tokens * columns,
        columns=columns,
        chunk_slots=tokens * columns,
        num_chunks=chunks,
        experts=shared,
        tables=_tables(permutation),
    )
    return [count, place]


def route_permute_specs(source: Source, arch: str) -> list[KernelSpec]:
    """Return the kernels of :func:`route_permute` for any number of tokens."""
    sizes = {1, cluster_size_of(arch, 1), cluster_size_of(arch, LARGE_CLUSTER_SMS)} - {0}
    one = [_permute_spec(source, blocks) for blocks in sorted(sizes)]
    return [*one, _count_spec(source), _PLACE_SPEC]


def _routing_permute(
    source: Source, experts: Experts, permutation: Permutation, blocks: int
) -> Launch:
    warps = _permute_warps(source)
    return make(
        _permute_spec(source, blocks),
        (blocks, 1, 1),
        32 * warps,
        smem_bytes=_permute_bytes(source, experts, blocks),
        cluster=blocks,
        chunk_tokens=-(-source.num_tokens // blocks),
        experts=experts.fields(source.num_tokens),
        tables=_tables(permutation),
        **source.fields(),
    )


_PLACE_SPEC = KernelSpec("permute_place", (("NUM_WARPS", PLACE_WARPS),))


def _count_spec(source: Source) -> KernelSpec:
    warps = ("MAX_WARPS", _count_warps(source))
    return KernelSpec("routing_count", (warps, *source.defines()))


def _permute_spec(source: Source, blocks: int) -> KernelSpec:
    defines = (("CLUSTER", blocks), ("NUM_WARPS", _permute_warps(source)))
    return KernelSpec("routing_permute", (*defines, *source.defines()))


def _permute_words(experts: Experts, num_warps: int) -> int:
    """Return the words of PermuteShared."""
    return (6 + num_warps) * experts.num_words + 1 + 32


def _permute_bytes(source: Source, experts: Experts, blocks: int) -> int:
    """Return the dynamic shared memory of routing_permute: counts of every block, slots of one."""
    slots = -(-source.num_tokens // blocks) * source.columns
    own_words = blocks * experts.num_words + -(-5 * slots // 2)
    return 4 * (_permute_words(experts, _permute_warps(source)) + own_words)


def _permute_warps(source: Source) -> int:
    """Return the warps of a block of routing_permute."""
    return _of_experts(PERMUTE_WARPS, source.num_experts)


def _count_warps(source: Source) -> int:
    """Return the most warps of a block of routing_count."""
    grouped = source.routing is not None and source.routing.num_groups > 1
    return _of_experts(GROUPED_COUNT_WARPS, source.num_experts) if grouped else COUNT_WARPS


def _of_experts(table: dict[int, int], num_experts: int) -> int:
    return next(n for most, n in table.items() if num_experts <= most)


def _tables(permutation: Permutation) -> dict[str, Any]:
    return {**permutation._asdict(), "max_tiles": permutation.max_tiles}
