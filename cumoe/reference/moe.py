"""NumPy twin of the whole expert layer, from given routing to unweighted rows."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cumoe.config import Activation, Array, ExpertParts, ExpertShard, PackedTopK, Quantized, TopK
from cumoe.reference.grouped_gemm import activated_gemm, grouped_gemm, round_rows
from cumoe.reference.permutation import group
from cumoe.reference.quantize import dequantize, quantize_fp8_block
from cumoe.reference.routing import unpack


class HostWeights(Protocol):
    """What the twin needs of :class:`cumoe.ExpertWeights`."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    def dequantize_expert(self, expert: int) -> tuple[Array | None, Array, Array]: ...


def expert_parts(
    x: Array,
    x_scale: Array | None,
    topk: TopK,
    weights: HostWeights,
    *,
    fp8: bool,
    num_experts: int,
    num_shared_experts: int,
    shard: ExpertShard,
    activation: Activation,
) -> ExpertParts:
    """Run the experts on NumPy with the kernels' rounding points, everything between in float32.

    fp8: activations are quantised 1 x 128 before each GEMM; otherwise the intermediate is rounded
    to bfloat16. Rows are rounded to bfloat16.
    """
    permutation = group(
        topk.ids,
        num_experts=num_experts,
        num_shared_experts=num_shared_experts,
        shard=shard,
        tile=1,
    )
    if x_scale is not None:
        wide = dequantize(Quantized(x, x_scale))
    elif fp8:
        wide = dequantize(quantize_fp8_block(x))
    else:
        wide = x.astype(np.float32)

    def gate_up(expert: int) -> tuple[Array | None, Array]:
        return weights.dequantize_expert(int(expert))[:2]

    def down(expert: int) -> Array:
        return weights.dequantize_expert(int(expert))[2]

    size = weights.intermediate_size
    y = activated_gemm(wide, permutation, gate_up, size, activation, gather=True)
    rounded = round_rows(y, "float8_e4m3fn" if fp8 else "bfloat16")
    wide = dequantize(rounded) if isinstance(rounded, Quantized) else rounded.astype(np.float32)
    y = grouped_gemm(wide, permutation, down, weights.hidden_size, gather=False)
    return ExpertParts(round_rows(y, "bfloat16"), topk.weights, permutation.permuted_idx)


def expand(ids: Array, weights: Array | None, num_experts: int, num_shared: int) -> TopK:
    """Unpack given routing and append the shared experts' columns (twin of ``topk_expand``)."""
    if weights is None:
        ids, weights = unpack(PackedTopK(ids))
    if not num_shared:
        return TopK(ids, weights)
    num_tokens = ids.shape[0]
    # A given id must not reach the shared experts, which have columns of their own.
    routed = np.where(ids >= num_experts, -1, ids).astype(np.int32)
    shared = np.broadcast_to(
        num_experts + np.arange(num_shared, dtype=np.int32), (num_tokens, num_shared)
    )
    ones = np.ones((num_tokens, num_shared), weights.dtype)
    return TopK(np.concatenate([routed, shared], 1), np.concatenate([weights, ones], 1))
