"""What a layer is and what one call of it brings, checked: between the public face and the plan.

:func:`check_layer` and :func:`check_call` are where a layer's arguments are validated; everything
below them takes native arrays that fit together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cumoe.arrays import check_no_overlap, dtype_name, empty, same_place
from cumoe.config import (
    MAX_NUM_EXPERTS,
    MAX_SHARED_EXPERTS,
    MAX_TOP_K,
    Activation,
    Array,
    ExpertShard,
    PackedTopK,
    Routing,
    TopK,
    check_int,
)
from cumoe.custom_activation import check_twin
from cumoe.launch import get_device
from cumoe.routing import check_logits
from cumoe.tuning import (
    FP8_TENSOR,
    SM90_ARCH,
    SM90_TILES,
    GroupedGemmConfig,
    GroupedGemmProblem,
    Sm90Config,
    orders_rows,
    select_gemm,
    select_sm90_tile,
    select_tile,
    tiles,
)
from cumoe.validate import (
    FLOATS,
    activation_arrays,
    check_activation,
    check_aligned,
    check_out,
    check_rows,
    check_shard,
    check_topk,
    check_type,
)
from cumoe.weights import ExpertWeights


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """A checked layer: weights and everything that does not change from call to call."""

    weights: ExpertWeights
    routing: Routing | None
    num_experts: int
    num_shared: int
    shard: ExpertShard
    activation: Activation
    portable: bool = False
    weights_on_input: bool = False

    @property
    def fp8(self) -> bool:
        """Whether activations are quantised."""
        return self.weights.recipe != "bf16"

    @property
    def tensors(self) -> bool:
        """Whether a scale is that of a tensor."""
        return self.weights.recipe == "fp8_tensor"

    @property
    def gemm_dtype(self) -> str:
        """Element type of both GEMMs, as a GroupedGemmProblem names it."""
        return FP8_TENSOR if self.tensors else str(self.weights.dtype)

    def runs_sm90(self, arch: str) -> bool:
        """Whether both GEMMs are Hopper's own on a device of this architecture."""
        return arch == SM90_ARCH and not self.portable

    def tiles(self, arch: str) -> tuple[int, ...]:
        """Return the row tile heights that the GEMMs have on an architecture."""
        return SM90_TILES[self.gemm_dtype] if self.runs_sm90(arch) else tiles(self.gemm_dtype)

    def select_tile(self, num_tokens: int, top_k: int, arch: str) -> int:
        """Return the row tile height for tokens of `top_k` experts each, shared ones included."""
        num_experts = self.num_experts + self.num_shared
        if self.runs_sm90(arch):
            return select_sm90_tile(num_tokens, top_k, num_experts, self.gemm_dtype)
        return select_tile(num_tokens * top_k, num_experts, self.gemm_dtype)

    def orders_rows(self, num_tokens: int, top_k: int, arch: str, quantizes: bool) -> bool:
        """Whether tokens are put in expert order first, in a call that `quantizes` them or not."""
        if not self.runs_sm90(arch) or not self.activation.gated:
            return False
        num_experts = self.num_experts + self.num_shared
        size = self.weights.intermediate_size
        return orders_rows(num_tokens, top_k, num_experts, size, self.gemm_dtype, quantizes)


@dataclass(eq=False)
class LayerCall:
    """The checked native arrays of one call; `topk_weights` is None with packed `ids`."""

    x: Array
    x_scale: Array | None = None
    logits: Array | None = None
    bias: Array | None = None
    ids: Array | None = None
    topk_weights: Array | None = None
    replay: Array | None = None
    out: Array | None = None

    @property
    def num_tokens(self) -> int:
        """Rows of x."""
        return int(self.x.shape[0])

    def weights_dtype(self, spec: LayerSpec) -> str:
        """Return the dtype of the weights that routing makes or that came."""
        if self.topk_weights is not None:
            return dtype_name(self.topk_weights)
        if self.ids is not None or spec.routing is None:
            return "bfloat16"
        return str(spec.routing.weights_dtype)

    def key(self) -> tuple[Any, ...]:
        """Return what two calls must share to run the same plan."""
        names = ("x", "x_scale", "logits", "bias", "ids", "topk_weights", "out")
        arrays = (getattr(self, name) for name in names)
        return (self.num_tokens, *[None if a is None else (a.shape[-1], a.dtype) for a in arrays])


def check_layer(
    weights: Any,
    routing: Routing | None,
    shard: ExpertShard | None,
    activation: Activation | None,
    num_experts: int | None,
    num_shared_experts: int,
    weights_on_input: bool = False,
) -> LayerSpec:
    """Return the checked layer that weights, routing and shard make."""
    check_type("weights", weights, ExpertWeights, "an ExpertWeights")
    check_type("weights_on_input", weights_on_input, bool, "a bool")
    held = weights.num_local_experts
    if routing is not None:
        check_type("routing", routing, Routing, "a Routing")
        if num_experts is not None or num_shared_experts:
            raise ValueError("num_experts: expected None with routing, which states it")
        if weights_on_input:
            raise ValueError("weights_on_input: expected False with routing, which states it")
        experts, shared = routing.num_experts, routing.num_shared_experts
        weights_on_input = routing.weights_on_input
    else:
        shared = check_int("num_shared_experts", num_shared_experts, 0, MAX_SHARED_EXPERTS)
        if num_experts is None:
            if shard is not None:
                raise ValueError("num_experts: expected a number with a shard, got None")
            num_experts = held - shared
        experts = check_int("num_experts", num_experts, 1, MAX_NUM_EXPERTS)
    local = check_shard(shard, experts)
    if held != local.num_local_experts + shared:
        raise ValueError(
            f"weights: expected {local.num_local_experts} routed and {shared} shared experts, "
            f"got {held}"
        )
    act = check_activation(activation, held)
    if act.gated != weights.gated:
        needed = "gate and up rows" if act.gated else "gate_up_order 'up'"
        raise ValueError(
            f"activation: {act.name!r} needs weights with {needed}, got gate_up_order "
            f"{weights.gate_up_order!r}"
        )
    if weights_on_input and weights.recipe != "fp8_tensor":
        raise ValueError(
            f"weights_on_input: expected weights of recipe 'fp8_tensor', got {weights.recipe!r}"
        )
    same_place({"weights": weights.w13, **activation_arrays(act)})
    spec = LayerSpec(
        weights, routing, experts, shared, local, act, weights_on_input=weights_on_input
    )
    if weights.is_device:
        device = get_device(int(weights.w13.device.id))
        check_twin(act, weights.w13)
        gemm_configs(spec, spec.tiles(device.arch)[-1], device.arch, device.max_smem_bytes)
    return spec


def check_call(
    spec: LayerSpec,
    x: Any,
    logits: Any,
    topk: TopK | PackedTopK | None,
    bias: Any,
    finalize: Any,
    out: Any,
    replay_out: Any,
) -> LayerCall:
    """Return the checked arrays of a call; allocates the result when everything is right."""
    check_type("finalize", finalize, bool, "a bool")
    if not finalize and out is not None:
        raise ValueError("out: expected None with finalize=False, which returns parts")
    weights = spec.weights
    block = (None, None) if spec.tensors else (1, 128)
    native, x_scale = check_rows(x, "x", FLOATS if spec.fp8 else ("bfloat16",), block)
    if x_scale is not None and not spec.fp8:
        raise TypeError("x: expected a bfloat16 array for recipe 'bf16', got Quantized")
    if native.shape[1] != weights.hidden_size:
        raise ValueError(
            f"x: expected hidden_size = {weights.hidden_size} like weights, got {native.shape[1]}"
        )
    call = LayerCall(native, x_scale)
    if spec.routing is not None and topk is None:
        call.logits, call.bias, call.replay = check_logits(logits, spec.routing, bias, replay_out)
        rows, name = call.logits.shape[0], "logits"
    else:
        if replay_out is not None:
            raise ValueError("replay_out: expected None with given routing")
        call.ids, call.topk_weights = check_topk(topk)
        rows, name = call.ids.shape[0], "topk"
        if spec.routing is not None and call.ids.shape[1] != spec.routing.top_k:
            raise ValueError(
                f"topk: expected top_k = {spec.routing.top_k} columns, got {call.ids.shape[1]}"
            )
        if call.ids.shape[1] > MAX_TOP_K:
            raise ValueError(f"topk: expected at most {MAX_TOP_K} columns, got {call.ids.shape[1]}")
        if spec.weights_on_input and call.ids.shape[1] != 1:
            raise ValueError(
                f"topk: expected 1 column with weights_on_input, got {call.ids.shape[1]}"
            )
    if rows != call.num_tokens:
        raise ValueError(f"{name}: expected {call.num_tokens} rows like x, got {rows}")
    if rows * (MAX_TOP_K + MAX_SHARED_EXPERTS) >= 1 << 31:
        raise ValueError(f"x: expected fewer than {(1 << 31) // 64} tokens, got {rows}")
    inputs: dict[str, Array | None] = {
        "x": call.x,
        "x.scale": call.x_scale,
        "logits": call.logits,
        "bias": call.bias,
        "topk.ids": call.ids,
        "topk.weights": call.topk_weights,
    }
    same_place({"weights": weights.w13, **inputs, "replay_out": call.replay})
    shape = (call.num_tokens, weights.hidden_size)
    if out is not None:
        everything = inputs | {"weights.w13": weights.w13, "weights.w2": weights.w2}
        call.out = check_out(out, "out", FLOATS, shape, everything)
        if call.replay is not None:
            check_no_overlap("out", call.out, {"replay_out": call.replay})
    check_aligned({"x": call.x, "out": call.out})
    if finalize and out is None:
        call.out = empty(call.x, shape, "bfloat16")
    return call


def gemm_configs(
    spec: LayerSpec,
    tile: int,
    arch: str,
    max_smem_bytes: int,
    weights_dtype: str = "float32",
    gather: bool = True,
) -> list[tuple[GroupedGemmProblem, GroupedGemmConfig | Sm90Config]]:
    """Return problem and configuration of the two GEMMs; `weights_dtype` is that of the routing."""
    dtype, gated = spec.gemm_dtype, spec.activation.gated
    portable = not spec.runs_sm90(arch)
    weights = weights_dtype if spec.weights_on_input else None
    problems = (
        GroupedGemmProblem(dtype, dtype, gated, gather, tile, not gated, weights),
        GroupedGemmProblem(dtype, "bfloat16", False, False, tile),
    )
    return [
        (problem, select_gemm(problem, arch, max_smem_bytes, portable=portable))
        for problem in problems
    ]
