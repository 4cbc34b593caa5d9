"""Layers that several ranks run together: how they share a layer out, and what must come of it.

Used on NumPy with ranks as threads, and on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import cumoe
from cumoe import ExpertShard, MoELayer, Routing
from cumoe.arrays import empty
from cumoe.comm import AllReduced, Epilogue, Quantization, Workspace
from cumoe.comm.group import Group
from cumoe.reference import allreduce as twin
from tests.brute_force import Layer, random_layer
from tests.helpers import BF16, assert_close_blocks, assert_same_bits, to_backend, to_host

ROUTING = Routing(
    "deepseek_v3",
    num_experts=12,
    top_k=3,
    num_groups=4,
    top_groups=2,
    scaling_factor=2.5,
    num_shared_experts=1,
)
HIDDEN, INTERMEDIATE = 272, 384
MAX_TOKENS = 300


@dataclass(frozen=True)
class Split:
    """How ranks share a layer: experts, columns of the intermediate size, or pairs of both."""

    kind: Literal["experts", "columns", "both"] = "experts"
    counts: tuple[int, ...] | None = None
    shared: str = "token_slice"

    def shard(self, rank: int, size: int) -> ExpertShard | None:
        """Return a rank's experts."""
        if self.kind == "columns":
            return None
        if self.kind == "both":
            rank, size = rank // 2, size // 2
        shared = self.shared
        if shared == "one":
            shared = "all" if rank == size - 1 else "none"
        if self.counts is None:
            return ExpertShard.even(ROUTING.num_experts, rank, size, shared)  # type: ignore[arg-type]
        return ExpertShard.from_counts(self.counts, rank, shared)  # type: ignore[arg-type]

    def weights(self, whole: cumoe.ExpertWeights, rank: int, size: int) -> cumoe.ExpertWeights:
        """Return what a rank holds, on the host."""
        shard = self.shard(rank, size)
        held = whole if shard is None else whole.shard(shard, ROUTING.num_shared_experts)
        if self.kind == "experts":
            return held
        part, parts = (rank, size) if self.kind == "columns" else (rank % 2, 2)
        blocks = INTERMEDIATE // 128
        ends = [blocks * p // parts * 128 for p in range(parts + 1)]
        return held.slice_intermediate(ends[part], ends[part + 1])


SPLITS = {
    "even": Split(),
    "shared on one rank": Split(shared="one"),
    "columns": Split("columns"),
}


def drawn(recipe: str, num_tokens: int = MAX_TOKENS) -> Layer:
    """Draw the layer; the same on every rank."""
    return random_layer(
        np.random.default_rng(7),
        ROUTING,
        recipe,
        num_tokens=num_tokens,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
    )


def make_layer(group: Any, random: Layer, split: Split, backend: str, **options: Any) -> MoELayer:
    """Plan a rank's layer."""
    ranks = group.group if isinstance(group, Workspace) else group
    weights = split.weights(random.weights, ranks.rank, ranks.size)
    return MoELayer(
        to_backend(weights, backend),
        ROUTING,
        max_num_tokens=MAX_TOKENS,
        bias=to_backend(random.bias, backend),
        shard=split.shard(ranks.rank, ranks.size),
        group=group,
        **options,
    )


def check_calls(group: Group, random: Layer, split: Split, backend: str, tokens: Any) -> None:
    """Calls with these numbers of tokens: the bits of the twin, near the whole layer's result.

    Where columns are split, rows are rounded on every rank: there the reference is the sum of what
    the slices give in NumPy.
    """
    layer = make_layer(group, random, split, backend)
    rng = np.random.default_rng(11)
    held, shard = split.weights(random.weights, group.rank, group.size), None
    if split.kind == "experts":
        held = random.weights
    else:
        shard = split.shard(group.rank, group.size)
    for count in tokens:
        x, logits = random.x[:count], random.logits[:count]
        there = to_backend((x, logits), backend)
        got = layer(*there)
        own = to_host(got)
        parts = to_host(layer(*there, finalize=False))
        want = twin.reduce_parts(group.allgather(part_of(parts)))
        assert_same_bits(own, want.sum)
        reference = np.empty((count, HIDDEN), np.float32)
        if split.kind != "experts" or group.rank == 0:
            options = {"routing": ROUTING, "bias": random.bias, "shard": shard}
            cumoe.moe(x, logits, held, out=reference, **options)
        if split.kind != "experts":
            reference = sum(group.allgather(reference))
        if group.rank == 0:
            assert_close_blocks(got, reference, f"layer {random.recipe}")
        out = empty(there[0], (count, HIDDEN), "bfloat16")
        assert layer(*there, out=out) is out
        assert_same_bits(out, own)

        residual = rng.standard_normal((count, HIDDEN), np.float32).astype(BF16)
        gamma = rng.standard_normal(HIDDEN, np.float32).astype(BF16)
        dense = rng.standard_normal((count, HIDDEN), np.float32).astype(BF16)
        epilogue = Epilogue(
            *to_backend((residual, gamma), backend), 1e-5, 1.0, Quantization("fp8_block")
        )
        done = layer(*there, shared_output=to_backend(dense, backend), epilogue=epilogue)
        assert isinstance(done, AllReduced) and done.sum is None
        want = twin.reduce_parts(
            group.allgather(part_of(parts, shared=dense)),
            residual=residual,
            norm_weight=gamma,
            eps=1e-5,
            weight_offset=1.0,
            quantize="fp8_block",
        )
        assert_same_bits(done.residual, want.result)
        assert_same_bits(done.norm, want.norm)
        quantized = to_host(done.quantized)
        assert_same_bits(quantized.values, want.quantized.values)
        assert_same_bits(quantized.scale, want.quantized.scale)
    layer.close()


def part_of(parts: Any, shared: np.ndarray | None = None) -> np.ndarray:
    """Return a rank's part of the sum, from the rows of its experts."""
    rows, weights, index = (np.ascontiguousarray(a) for a in parts)
    return twin.part_of_rows(rows, weights, index, shared=shared)
