"""Static scales of activations, from sample tokens and the experts before they are quantised.

An offline step: it waits for the device. What it finds goes into
:meth:`cumoe.ExpertWeights.from_experts` with recipe ``"fp8_tensor"``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cumoe.arrays import DTYPES, as_native, same_place
from cumoe.config import (
    MAX_SHARED_EXPERTS,
    Activation,
    Array,
    PackedTopK,
    TopK,
    check_int,
)
from cumoe.grouped_gemm import grouped_gemm
from cumoe.layouts import on_device_of
from cumoe.permutation import group
from cumoe.reference.exact import FP8_MAX
from cumoe.reference.quantize import MIN_SCALE
from cumoe.routing import unpack
from cumoe.tuning import select_tile
from cumoe.validate import FLOATS, check_topk, check_type
from cumoe.weights import ExpertWeights


class StaticScales(NamedTuple):
    """Scales of recipe ``"fp8_tensor"``, named as the arguments they are for.

    Attributes
    ----------
    x_scale : float
        Of the tokens.
    act_scale : float
        Of the activation's result, one for all experts.
    """

    x_scale: float
    act_scale: float


def calibrate(
    x: Any,
    topk: TopK | PackedTopK,
    weights: ExpertWeights,
    *,
    num_shared_experts: int = 0,
    weights_on_input: bool = False,
    activation: Activation | None = None,
) -> StaticScales:
    """Find the static scales under which sample tokens just fill the range of fp8.

    ``x_scale = max|x| / 448`` and ``act_scale = max|act(gate[e] @ x[t], up[e] @ x[t])| / 448`` over
    all tokens t and their experts e, without quantisation.

    Parameters
    ----------
    x : array, bfloat16, float16 or float32, shape (num_tokens, hidden_size), C-contiguous
        Tokens like those of real calls. Of several batches take the largest of each scale.
    topk : TopK or PackedTopK
        Their ids and weights, as :func:`routed_moe` takes them.
    weights : ExpertWeights
        All experts, recipe ``"bf16"``.
    num_shared_experts, weights_on_input, activation
        As in :func:`routed_moe`.

    Returns
    -------
    StaticScales

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape or place, or there is no number but 0 and
        NaN to go by.

    Notes
    -----
    NaN does not enter a maximum. Tokens are rounded to bfloat16 for the products, which are
    float32. Waits for the device.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> ones = np.ones((1, 16, 16), np.float32)
    >>> weights = ExpertWeights.from_experts(ones, ones, ones, recipe="bf16")
    >>> x = np.full((2, 16), 2.0, ml_dtypes.bfloat16)
    >>> topk = TopK(np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32))
    >>> scales = calibrate(x, topk, weights)
    >>> round(scales.x_scale * 448), round(scales.act_scale * 448)
    (2, 1024)
    """
    check_type("weights", weights, ExpertWeights, "an ExpertWeights")
    check_type("weights_on_input", weights_on_input, bool, "a bool")
    if weights.recipe != "bf16":
        raise ValueError(f"weights: expected recipe 'bf16', got {weights.recipe!r}")
    shape = (None, weights.hidden_size)
    x = as_native(x, "x", FLOATS, shape=shape)
    num_shared = check_int(
        "num_shared_experts",
        num_shared_experts,
        0,
        min(MAX_SHARED_EXPERTS, weights.num_local_experts),
    )
    ids, scores = check_topk(topk)
    same_place({"weights": weights.w13, "x": x, "topk.ids": ids, "topk.weights": scores})
    if ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk: expected {x.shape[0]} rows like x, got {ids.shape[0]}")
    if weights_on_input and ids.shape[1] != 1:
        raise ValueError(f"topk: expected 1 column with weights_on_input, got {ids.shape[1]}")
    if scores is None:
        ids, scores = unpack(PackedTopK(ids))
    with on_device_of(x):
        largest_x = _largest(x)
        num_routed = weights.num_local_experts - num_shared
        ids = ids.copy()
        ids[ids >= num_routed] = -1
        wide = x.astype(np.float32)
        tokens = wide * scores.astype(np.float32) if weights_on_input else wide
        largest = _largest_activation(tokens, ids, weights, activation)
        if num_shared:
            ids = ids[:, :1].repeat(num_shared, axis=1)
            for j in range(num_shared):
                ids[:, j] = num_routed + j
            largest = max(largest, _largest_activation(wide, ids, weights, activation))
    return StaticScales(_scale("x", largest_x), _scale("topk", largest))


def _largest_activation(
    x: Array, ids: Array, weights: ExpertWeights, activation: Activation | None
) -> float:
    """Return the largest magnitude behind the activation, over the experts of every token."""
    count = weights.num_local_experts
    if not ids.size:
        return 0.0
    tile = select_tile(ids.size, count, "bfloat16")
    permutation = group(ids, num_experts=count, tile=tile)
    rows: Array = grouped_gemm(
        x.astype(DTYPES["bfloat16"]),
        weights.w13,
        permutation,
        gate_up_order=weights.gate_up_order if weights.gated else None,
        activation=activation,
        layout=weights.layout,
        out_dtype="float32",
    )
    return _largest(rows[permutation.token_idx >= 0])


def _largest(x: Array) -> float:
    """Return the largest magnitude, NaN left out; 0 if there is none."""
    wide = abs(x.astype(np.float32))
    wide[wide != wide] = 0.0
    return float(wide.max()) if wide.size else 0.0


def _scale(name: str, largest: float) -> float:
    if not 0.0 < largest < float("inf"):
        raise ValueError(f"{name}: expected samples with a finite largest value, got {largest}")
    return float(max(np.float32(largest) / FP8_MAX, MIN_SCALE))
