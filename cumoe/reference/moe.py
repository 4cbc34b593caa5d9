"""NumPy twin of the whole expert layer, from given routing to unweighted rows."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cumoe.config import Activation, Array, ExpertParts, ExpertShard, PackedTopK, Quantized, TopK
from cumoe.reference.grouped_gemm import (
    activated_gemm,
    grouped_gemm,
    quantize_rows,
    round_rows,
    scale_of_rows,
    weights_of_rows,
)
from cumoe.reference.permutation import group
from cumoe.reference.quantize import dequantize, quantize_fp8_block, quantize_fp8_tensor
from cumoe.reference.routing import unpack


class HostWeights(Protocol):
    """What the twin needs of :class:`cumoe.ExpertWeights`."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def recipe(self) -> str | None: ...

    @property
    def x_scale(self) -> Array | None: ...

    @property
    def act_scale(self) -> Array | None: ...

    def dequantize_expert(self, expert: int) -> tuple[Array | None, Array, Array]: ...


def expert_parts(
    x: Array,
    x_scale: Array | None,
    topk: TopK,
    weights: HostWeights,
    *,
    weights_on_input: bool,
    num_experts: int,
    num_shared_experts: int,
    shard: ExpertShard,
    activation: Activation,
) -> ExpertParts:
    """Run the experts on NumPy with the kernels' rounding points, everything between in float32.

    fp8: activations are quantised 1 x 128, or by the static scales, before each GEMM; otherwise the
    intermediate is rounded to bfloat16. Rows are rounded to bfloat16.
    """
    recipe = weights.recipe
    permutation = group(
        topk.ids,
        num_experts=num_experts,
        num_shared_experts=num_shared_experts,
        shard=shard,
        tile=1,
    )
    if x_scale is not None:
        block = (None, None) if recipe == "fp8_tensor" else (1, 128)
        wide = dequantize(Quantized(x, x_scale, block=block))
    elif recipe == "fp8_tensor":
        wide = dequantize(quantize_fp8_tensor(x, weights.x_scale))
    elif recipe == "fp8_block":
        wide = dequantize(quantize_fp8_block(x))
    else:
        wide = x.astype(np.float32)

    def gate_up(expert: int) -> tuple[Array | None, Array]:
        return weights.dequantize_expert(int(expert))[:2]

    def down(expert: int) -> Array:
        return weights.dequantize_expert(int(expert))[2]

    size = weights.intermediate_size
    row_weights = None
    if weights_on_input:
        row_weights = weights_of_rows(permutation, topk.weights, shard.num_local_experts)
    y = activated_gemm(
        wide, permutation, gate_up, size, activation, gather=True, row_weights=row_weights
    )
    if recipe == "fp8_tensor":
        assert weights.act_scale is not None
        values = quantize_rows(y, permutation, weights.act_scale)
        wide = values.astype(np.float32) * scale_of_rows(permutation, weights.act_scale)
    else:
        rounded = round_rows(y, "float8_e4m3fn" if recipe == "fp8_block" else "bfloat16")
        wide = dequantize(rounded) if isinstance(rounded, Quantized) else rounded.astype(np.float32)
    y = grouped_gemm(wide, permutation, down, weights.hidden_size, gather=False)
    topk_weights = None if weights_on_input else topk.weights
    return ExpertParts(round_rows(y, "bfloat16"), topk_weights, permutation.permuted_idx)


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
