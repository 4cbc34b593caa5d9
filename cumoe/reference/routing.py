"""From logits to expert ids and weights, for every routing method, and the packed form of both.

Bit-exact model of the routing kernel: the same order images, the same sums in the same order, the
exponential of :mod:`cumoe.reference.exact`. Selection never returns an expert twice, ties go to the
lower id, and a NaN logit counts as ``-inf``. Knows nothing of shards, rows or tiles.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cumoe.config import Array, PackedTopK, Routing, RoutingMethod, TopK
from cumoe.reference.exact import (
    F32,
    det_exp,
    from_order_image,
    order_image,
    round_bf16,
    sigmoid,
    warp_sum,
)

SUM_FLOOR = F32(1e-20)
NEG_INF = F32(-np.inf)
INT16_MIN, INT16_MAX = -(1 << 15), (1 << 15) - 1

_RowSum = Callable[[NDArray[np.float32]], NDArray[np.float32]]
_BIASED = (RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2)
_SOFTMAX_OF_SELECTED = (RoutingMethod.RENORMALIZE, RoutingMethod.RENORMALIZE_NAIVE)
_SIGMOID_OF_SELECTED = (RoutingMethod.LLAMA4, RoutingMethod.TOP_K_SIGMOID)


def route(logits: Array, routing: Routing, *, bias: Array | None = None) -> TopK:
    """Choose each token's experts and their weights.

    The formulas of the ten methods are in :class:`cumoe.config.RoutingMethod`.

    Parameters
    ----------
    logits : numpy.ndarray, float32 or bfloat16, shape (num_tokens, num_experts)
        NaN counts as ``-inf``.
    routing : Routing
    bias : numpy.ndarray, float32 or bfloat16, shape (num_experts,), optional
        Added to the sigmoids for selection by ``deepseek_v3`` and ``minimax2``, ignored by the
        other methods. None means zeros.

    Returns
    -------
    TopK
        ``ids`` int32 and ``weights`` in ``routing.weights_dtype``, both of shape
        ``(num_tokens, top_k + num_shared_experts)``. Routed experts come first, in descending order
        of their keys, ties by ascending id; then the shared experts ``num_experts + j`` with weight
        1.

    Notes
    -----
    float32 throughout, each operation rounded on its own, in this order. Softmax over a set of
    maximum m: ``e = 0`` if ``x == -inf``, 1 if ``x == m``, else ``det_exp(x - m)``; the weight is
    ``e / sum``, or 0 if the sum is 0. The sum over all experts is
    :func:`~cumoe.reference.exact.warp_sum`; sums over the selected experts start from 0 and run
    through the columns in ascending order. Normalised sigmoids of ``deepseek_v3`` and ``minimax2``
    are ``(s * scaling_factor) / (sum + 1e-20)``; weights of all other methods are finished, then
    multiplied by ``scaling_factor`` unless it is 1. Rounded to ``routing.weights_dtype`` once, at
    the end.
    """
    x = np.asarray(logits).astype(np.float32)
    x[np.isnan(x)] = NEG_INF
    method = RoutingMethod(routing.method)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        keys = _selection_keys(x, method, bias, routing.bias_round_bf16)
        images = order_image(keys)
        if routing.num_groups > 1:
            images = _mask_groups(images, routing.num_groups, routing.top_groups)
        ids = _top_ids(images, routing.top_k)
        weights = _weights(x, keys, ids, method, routing)
        return _finish(ids, weights, routing)


def _selection_keys(
    x: NDArray[np.float32], method: RoutingMethod, bias: Array | None, bias_round_bf16: bool
) -> NDArray[np.float32]:
    """Return what the top-k is taken of."""
    if method is RoutingMethod.DEFAULT:
        return _softmax(x, x.max(axis=1, initial=NEG_INF), warp_sum)
    if method in (RoutingMethod.SIGMOID, RoutingMethod.SIGMOID_RENORM):
        return sigmoid(x)
    if method in _BIASED:
        scores = sigmoid(x)
        if bias is None:
            return scores
        bias = np.asarray(bias).astype(np.float32)
        return scores + (round_bf16(bias) if bias_round_bf16 else bias)
    return x


def _mask_groups(
    images: NDArray[np.uint32], num_groups: int, top_groups: int
) -> NDArray[np.uint32]:
    """Set the images of experts outside each token's best groups to 0."""
    num_tokens, num_experts = images.shape
    grouped = images.reshape(num_tokens, num_groups, num_experts // num_groups)
    if grouped.shape[2] == 1:
        scores = from_order_image(grouped[:, :, 0]) + NEG_INF
    else:
        best_two = from_order_image(np.partition(grouped, (-2, -1), axis=2)[:, :, -2:])
        scores = best_two[:, :, 1] + best_two[:, :, 0]
    picked = np.zeros((num_tokens, num_groups), dtype=bool)
    np.put_along_axis(picked, _top_ids(order_image(scores), top_groups), True, axis=1)
    return np.where(picked[:, :, None], grouped, np.uint32(0)).reshape(num_tokens, num_experts)


def _top_ids(images: NDArray[np.uint32], count: int) -> NDArray[np.int32]:
    """Return the columns of the `count` largest images, descending, ties by ascending column."""
    num_columns = images.shape[1]
    low = np.arange(num_columns - 1, -1, -1, dtype=np.uint64)
    words = (images.astype(np.uint64) << np.uint64(32)) | low
    if count < num_columns:
        words.partition(num_columns - count, axis=1)
        words = words[:, num_columns - count :]
    # Every word is different, so any sort gives the same order.
    words = np.sort(words, axis=1)[:, ::-1]
    columns = np.int32(num_columns - 1) - words.astype(np.uint32).view(np.int32)
    return np.asarray(columns, dtype=np.int32)


def _weights(
    x: NDArray[np.float32],
    keys: NDArray[np.float32],
    ids: NDArray[np.int32],
    method: RoutingMethod,
    routing: Routing,
) -> NDArray[np.float32]:
    """Return the float32 weights of the selected experts, scaling factor included."""
    scale = F32(routing.scaling_factor)
    if method in _BIASED:
        scores = sigmoid(np.take_along_axis(x, ids, axis=1))
        denominators = (_column_sum(scores) + SUM_FLOOR)[:, None]
        np.divide(scores * scale, denominators, out=scores)
        return scores
    if method in _SOFTMAX_OF_SELECTED:
        selected = np.take_along_axis(x, ids, axis=1)
        weights = _softmax(selected, selected[:, 0], _column_sum)
    elif method in _SIGMOID_OF_SELECTED:
        weights = sigmoid(np.take_along_axis(x, ids, axis=1))
    else:
        weights = np.take_along_axis(keys, ids, axis=1)
        if method is RoutingMethod.SIGMOID_RENORM and routing.normalize is not False:
            np.divide(weights, np.maximum(_column_sum(weights), SUM_FLOOR)[:, None], out=weights)
    return weights if scale == F32(1.0) else weights * scale


def _softmax(
    x: NDArray[np.float32], maximum: NDArray[np.float32], total: _RowSum
) -> NDArray[np.float32]:
    """Return the softmax of each row, summed by `total`; all zeros for a row of ``-inf``."""
    e = det_exp(x - maximum[:, None])
    e[x == maximum[:, None]] = F32(1.0)
    e[x == NEG_INF] = F32(0.0)
    sums = total(e)[:, None]
    return np.divide(e, sums, out=np.zeros_like(e), where=sums != 0)


def _column_sum(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum each row from 0, one column after the other."""
    total = np.zeros(values.shape[0], dtype=np.float32)
    for column in range(values.shape[1]):
        total += values[:, column]
    return total


def _finish(ids: NDArray[np.int32], weights: NDArray[np.float32], routing: Routing) -> TopK:
    """Append the shared experts' columns and round the weights to their dtype."""
    dtype = ml_dtypes.bfloat16 if routing.weights_dtype == "bfloat16" else np.float32
    num_tokens = ids.shape[0]
    all_ids = np.empty((num_tokens, routing.total_top_k), dtype=np.int32)
    all_weights = np.ones((num_tokens, routing.total_top_k), dtype=dtype)
    all_ids[:, : routing.top_k] = ids
    all_ids[:, routing.top_k :] = np.arange(routing.num_experts, routing.total_experts)
    all_weights[:, : routing.top_k] = weights.astype(dtype)
    return TopK(all_ids, all_weights)


def pack(topk: TopK) -> PackedTopK:
    """Pack ids and weights into one word each: ``(id << 16) | bits(bfloat16(weight))``.

    Parameters
    ----------
    topk : TopK
        float32 weights are rounded to bfloat16, to nearest even.

    Returns
    -------
    PackedTopK
        int32 of the same shape. An id that does not fit a signed 16-bit field becomes -1: such an
        id names no expert, and cut to 16 bits it could name one.
    """
    ids = np.asarray(topk.ids).astype(np.int32)
    ids = np.where((ids < INT16_MIN) | (ids > INT16_MAX), np.int32(-1), ids)
    weights = np.ascontiguousarray(topk.weights).astype(ml_dtypes.bfloat16)
    words = (ids.view(np.uint32) << np.uint32(16)) | weights.view(np.uint16)
    return PackedTopK(words.view(np.int32))


def unpack(packed: PackedTopK) -> TopK:
    """Return the ids, sign-extended to int32, and the bfloat16 weights of packed words."""
    words = np.ascontiguousarray(packed.packed, dtype=np.int32)
    weights = (words & np.int32(0xFFFF)).astype(np.uint16).view(ml_dtypes.bfloat16)
    return TopK(words >> np.int32(16), weights)
