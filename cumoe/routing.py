"""Routing: which experts each token uses and with what weights.

:func:`route` decides from logits; :func:`pack` and :func:`unpack` convert to and from the packed
form. Ids are global. Results are the same bits on NumPy and on a GPU, and on every run.
"""

from __future__ import annotations

from typing import Any

from cumoe import kernels, kernels_routing
from cumoe.arrays import as_native, check_no_overlap, empty, is_device, same_place
from cumoe.config import Array, PackedTopK, Routing, TopK
from cumoe.reference import routing as reference
from cumoe.validate import check_out, check_topk, check_type


def route(
    logits: Any,
    routing: Routing,
    *,
    bias: Any = None,
    out: TopK | None = None,
    replay_out: Any = None,
) -> TopK:
    """Choose each token's experts and their weights.

    Parameters
    ----------
    logits : array, float32 or bfloat16, shape (num_tokens, num_experts), C-contiguous
        NaN counts as -inf.
    routing : Routing
    bias : array, float32 or bfloat16, shape (num_experts,), optional
        Added to the sigmoid for the selection only; read by ``deepseek_v3`` and ``minimax2``,
        accepted and ignored by the other methods. Missing means zero.
    out : TopK, optional
        Arrays to write: ids int32 and weights of ``routing.weights_dtype``, both of shape
        ``(num_tokens, top_k + num_shared_experts)``.
    replay_out : array, int16, shape (at least num_tokens, top_k), optional
        Receives the routed ids; rows past ``num_tokens`` are left as they are.

    Returns
    -------
    TopK
        Columns in descending order of the selection key, ties to the lower id, no id twice; then
        the shared experts, ids ``num_experts + j``, weight 1.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place.

    Notes
    -----
    float32 arithmetic, one rounding to ``weights_dtype``. Queued on the current stream, no host
    synchronisation. Weights of a row whose selected logits are all -inf are 0 under a softmax.

    References
    ----------
    DeepSeek-V3 Technical Report, section 2.1.2 (auxiliary-loss-free load balancing).

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[0.1, 2.0, -1.0, 1.0]], np.float32)
    >>> ids, weights = route(logits, Routing("renormalize", num_experts=4, top_k=2))
    >>> ids
    array([[1, 3]], dtype=int32)
    """
    check_type("routing", routing, Routing, "a Routing")
    logits, bias, replay_out = check_logits(logits, routing, bias, replay_out)
    inputs: dict[str, Array | None] = {"logits": logits, "bias": bias}
    shape = (logits.shape[0], routing.total_top_k)
    if out is not None:
        check_type("out", out, TopK, "a TopK")
        native = TopK(
            check_out(out.ids, "out.ids", ("int32",), shape, inputs),
            check_out(out.weights, "out.weights", (routing.weights_dtype,), shape, inputs),
        )
        check_no_overlap("out.weights", native.weights, {"out.ids": native.ids})
        if replay_out is not None:
            written = {"out.ids": native.ids, "out.weights": native.weights}
            check_no_overlap("replay_out", replay_out, written)
    elif is_device(logits):
        native = TopK(empty(logits, shape, "int32"), empty(logits, shape, routing.weights_dtype))
    if is_device(logits):
        if logits.shape[0]:
            item = kernels_routing.routing_topk(logits, bias, *native, replay_out, routing)
            kernels.run([item], logits)
        return native if out is None else out
    result = reference.route(logits, routing, bias=bias)
    if replay_out is not None:
        replay_out[: logits.shape[0]] = result.ids[:, : routing.top_k]
    if out is None:
        return result
    native.ids[...], native.weights[...] = result
    return out


def check_logits(
    logits: Any, routing: Routing, bias: Any, replay_out: Any
) -> tuple[Array, Array | None, Array | None]:
    """Return the native arrays of a routing call after checking them."""
    logits = as_native(logits, "logits", ("float32", "bfloat16"), shape=(None, routing.num_experts))
    if bias is not None:
        bias = as_native(bias, "bias", ("float32", "bfloat16"), shape=(routing.num_experts,))
    if replay_out is not None:
        replay_out = as_native(
            replay_out, "replay_out", ("int16",), shape=(None, routing.top_k), writable=True
        )
        if replay_out.shape[0] < logits.shape[0]:
            raise ValueError(
                f"replay_out: expected at least {logits.shape[0]} rows, got {replay_out.shape[0]}"
            )
        check_no_overlap("replay_out", replay_out, {"logits": logits, "bias": bias})
    same_place({"logits": logits, "bias": bias, "replay_out": replay_out})
    return logits, bias, replay_out


def pack(topk: TopK) -> PackedTopK:
    """Pack ids and weights into ``(id << 16) | bits(bfloat16(weight))``.

    Parameters
    ----------
    topk : TopK

    Returns
    -------
    PackedTopK
        int32, shape of the ids. The weight's bits are masked, so a negative weight leaves the id
        alone. An id that does not fit a signed 16-bit field becomes -1, which names no expert.

    Raises
    ------
    TypeError, ValueError
        If ids and weights are no matching pair.
    """
    check_type("topk", topk, TopK, "a TopK")
    ids, weights = check_topk(topk)
    same_place({"topk.ids": ids, "topk.weights": weights})
    if weights is None or not is_device(ids):
        return reference.pack(TopK(ids, weights))
    import cupy

    fits = (ids >= -(1 << 15)) & (ids < 1 << 15)
    ids = cupy.where(fits, ids, ids.dtype.type(-1))
    bits = weights.astype(empty(ids, (0,), "bfloat16").dtype).view("uint16").astype("int32")
    return PackedTopK((ids << 16) | bits)


def unpack(packed: PackedTopK) -> TopK:
    """Split packed words into ids and bfloat16 weights.

    Parameters
    ----------
    packed : PackedTopK

    Returns
    -------
    TopK
        ids int32 and weights bfloat16, both of the packed shape.

    Raises
    ------
    TypeError, ValueError
        If `packed` is no int32 matrix.
    """
    check_type("packed", packed, PackedTopK, "a PackedTopK")
    words, _ = check_topk(packed)
    if not is_device(words):
        return reference.unpack(PackedTopK(words))
    bfloat16 = empty(words, (0,), "bfloat16").dtype
    return TopK(words >> 16, (words & 0xFFFF).astype("uint16").view(bfloat16))
