"""The whole layer on the CPU: the stages of a device plan, executed kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import cumoe
from cumoe import Activation, ExpertShard, ExpertWeights, PackedTopK, Routing, TopK
from cumoe.config import ExpertParts
from cumoe.layer_call import check_call, check_layer
from cumoe.plan import DevicePlan
from cumoe.reference import pack
from cumoe.tuning import SM90_ROWS
from tests.host.checks import BF16, F32, SMEM_LIMIT, Case, Host, close
from tests.host.tensor_map import encode_tiled


class _OnDevice(np.ndarray):
    """Host memory that names a device, as the plan expects of its inputs."""

    device = SimpleNamespace(id=0)


class _Workspace:
    """Every buffer fresh, and poisoned but for those that begin with zeros."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def take(
        self, name: str, shape: tuple[int, ...], dtype: str, *, zeros: bool = False
    ) -> np.ndarray:
        made = self._host.empty(shape, dtype)
        if zeros:
            made[...] = 0
        return made.view(_OnDevice)


def run_layer(
    host: Host,
    x: Any,
    weights: ExpertWeights,
    *,
    routing: Routing | None = None,
    logits: np.ndarray | None = None,
    topk: TopK | PackedTopK | None = None,
    bias: np.ndarray | None = None,
    shard: ExpertShard | None = None,
    activation: Activation | None = None,
    num_experts: int | None = None,
    num_shared_experts: int = 0,
    weights_on_input: bool = False,
    out: np.ndarray | None = None,
    copies: bool = False,
) -> tuple[np.ndarray | None, ExpertParts]:
    """Return the result, and the parts it was summed from, of a call that a GPU would plan.

    With `copies` tokens are put in expert order first, as if there were hundreds for each.
    """
    spec = check_layer(
        weights, routing, shard, activation, num_experts, num_shared_experts, weights_on_input
    )
    call = check_call(spec, x, logits, topk, bias, out is not None, out, None)
    call.x = call.x.view(_OnDevice)
    arch = {900: "sm_90a", 800: "sm_80"}[host.options.arch]
    device = SimpleNamespace(arch=arch, max_smem_bytes=SMEM_LIMIT, num_sms=5)
    with (
        mock.patch("cumoe.plan.get_device", lambda ordinal: device),
        mock.patch("cumoe.grouped_gemm.get_device", lambda ordinal: device),
        mock.patch("cumoe.kernels_sm90.encode_tiled", encode_tiled),
        mock.patch("cumoe.layer_call.orders_rows", lambda *_: copies),
    ):
        plan = DevicePlan(spec, call, _Workspace(host))  # type: ignore[arg-type]
    launches = [launch for stage in plan.stages.values() for launch in stage]
    hopper = "sm90_grouped_gemm"
    if weights.recipe == "fp8_block":
        rows = plan.tile == 2 * SM90_ROWS
        hopper = f"sm90_fp8_{'rows_' if rows else ''}grouped_gemm"
    gemm = hopper if spec.runs_sm90(arch) else "sm80_grouped_gemm"
    assert {name for launch in launches if "gemm" in (name := launch.spec.name)} == {gemm}
    first = copies and arch == "sm_90a"
    quantizes = weights.recipe != "bf16" and call.x_scale is None
    kind = f"quantize_{weights.recipe}" if quantizes else "permute_rows"
    orders = [s for launch in launches if (s := launch.spec).name == kind]
    assert first == any(dict(spec.defines).get("PERMUTED", 1) for spec in orders)
    host.run(*launches)
    return call.out, plan.parts_of(call)


@dataclass(frozen=True)
class _Shape:
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    recipe: str = "bf16"
    order: str = "gate_up"
    layout: str = "major_k"
    num_shared: int = 0
    activation: Activation | None = None
    weights_on_input: bool = False  # with given routing
    copies: bool = False


def _weights(host: Host, shape: _Shape, num_experts: int) -> ExpertWeights:
    hidden, size = shape.hidden_size, shape.intermediate_size
    gate, up = (host.rng.standard_normal((num_experts, size, hidden)) for _ in range(2))
    down = host.rng.standard_normal((num_experts, hidden, size))
    gate, up, down = ((w / np.sqrt(w.shape[2])).astype(np.float32) for w in (gate, up, down))
    made = ExpertWeights.from_experts(
        None if shape.order == "up" else gate,
        up,
        down,
        recipe=shape.recipe,  # type: ignore[arg-type]
        gate_up_order=shape.order,  # type: ignore[arg-type]
        layout=shape.layout,  # type: ignore[arg-type]
        **_static_scales(shape, num_experts),
    )
    arrays = {name: host.arena.array(a) for name, a in made._arrays().items()}
    return ExpertWeights(**arrays, gate_up_order=made.gate_up_order, layout=made.layout)


def _static_scales(shape: _Shape, num_experts: int) -> dict[str, Any]:
    if shape.recipe != "fp8_tensor":
        return {}
    act_scale = np.linspace(0.005, 0.02, num_experts, dtype=np.float32)
    return {"x_scale": 0.01, "act_scale": act_scale}


def _layer(
    shape: _Shape, routing: Routing, shard: ExpertShard | None = None, **activation: Any
) -> Callable[[Host], None]:
    """From logits to the result."""

    def check(host: Host) -> None:
        local = routing.num_experts if shard is None else shard.num_local_experts
        weights = _weights(host, shape, local + routing.num_shared_experts)
        x = host.normal((shape.num_tokens, shape.hidden_size), BF16)
        logits = host.normal((shape.num_tokens, routing.num_experts), F32)
        act = shape.activation or Activation(**activation)
        out = host.empty(x.shape, BF16)
        run_layer(
            host,
            x,
            weights,
            routing=routing,
            logits=logits,
            shard=shard,
            activation=act,
            out=out,
            copies=shape.copies,
        )
        expected = cumoe.moe(x, logits, weights, routing=routing, shard=shard, activation=act)
        close("out", out, expected, f"layer {shape.recipe}")

    return check


def _given(shape: _Shape, top_k: int, num_experts: int, packed: bool) -> Callable[[Host], None]:
    """From given ids and weights, some of them not valid, to the parts and the result."""

    def check(host: Host) -> None:
        weights = _weights(host, shape, num_experts + shape.num_shared)
        x = host.normal((shape.num_tokens, shape.hidden_size), BF16)
        ids = host.rng.integers(-1, num_experts + 1, (shape.num_tokens, top_k)).astype(np.int32)
        scores = host.rng.random(ids.shape).astype(np.float32)
        given = pack(TopK(ids, scores)) if packed else TopK(ids, scores)
        topk = type(given)(*(host.arena.array(a) for a in given))
        shared = {
            "num_shared_experts": shape.num_shared, "weights_on_input": shape.weights_on_input
        }  # fmt: skip
        out = host.empty(x.shape, BF16)
        run_layer(host, x, weights, topk=topk, out=out, **shared)
        _, parts = run_layer(host, x, weights, topk=topk, **shared)
        expected = cumoe.routed_moe(x, topk, weights, **shared)
        close("out", out, expected, f"layer {shape.recipe}")
        summed = cumoe.finalize(parts.rows, parts.topk_weights, parts.permuted_idx)
        assert (summed.view(np.uint16) == out.view(np.uint16)).all(), "parts differ from the result"

    return check


LAYER_CASES = [
    Case(
        "bf16",
        _layer(_Shape(13, 200, 72), Routing("renormalize", 33, 5)),
    ),
    Case(
        "fp8",
        _layer(
            _Shape(13, 272, 144, "fp8_block", "up_gate"),
            Routing("deepseek_v3", 32, 5, 4, 2, scaling_factor=2.5, num_shared_experts=1),
        ),
    ),
    Case(
        "bf16 one token, block-major, shared experts",
        _layer(
            _Shape(1, 128, 64, layout="block_major_k", order="gate_up_interleaved"),
            Routing("default", 4, 2, num_shared_experts=2),
            alpha=1.7,
            limit=7.0,
        ),
    ),
    Case(
        "fp8 shard with shared experts",
        _layer(
            _Shape(21, 144, 112, "fp8_block"),
            Routing("sigmoid_renorm", 9, 3, num_shared_experts=1),
            ExpertShard.from_counts([4, 3, 2], 1),
        ),
    ),
    Case(
        "bf16 shard with only a shared expert",
        _layer(
            _Shape(3, 64, 40),
            Routing("top_k_sigmoid", 4, 2, num_shared_experts=1),
            ExpertShard.from_counts([4, 0], 1),
        ),
    ),
    Case(
        "fp8 relu2, tall tile",
        _layer(
            _Shape(40, 144, 80, "fp8_block", "up", activation=Activation("relu2")),
            Routing("renormalize", 3, 2),
        ),
    ),
    Case(
        "bf16 silu, block-major",
        _layer(
            _Shape(9, 128, 64, order="up", layout="block_major_k", activation=Activation("silu")),
            Routing("renormalize", 6, 3),
        ),
    ),
    Case(
        "fp8 geglu",
        _layer(
            _Shape(13, 144, 80, "fp8_block", "up_gate", activation=Activation("geglu")),
            Routing("renormalize", 6, 2),
        ),
    ),
    Case(
        "bf16 tokens in order first",
        _layer(
            _Shape(40, 200, 72, copies=True),
            Routing("renormalize", 9, 3, num_shared_experts=1),
            ExpertShard.from_counts([4, 3, 2], 1),
        ),
    ),
    Case(
        "fp8 tokens in order first",
        _layer(
            _Shape(300, 272, 144, "fp8_block", "gate_up_interleaved", copies=True),
            Routing("renormalize", 3, 2),
        ),
    ),
    Case(
        "fp8 tensor tokens in order first",
        _layer(
            _Shape(300, 272, 144, "fp8_tensor", "gate_up_interleaved", copies=True),
            Routing("renormalize", 3, 2),
        ),
    ),
    Case(
        "fp8 tensor tokens in order first, weights on input, shard",
        _layer(
            _Shape(40, 144, 112, "fp8_tensor", copies=True),
            Routing("llama4", 9, 1, num_shared_experts=1, weights_on_input=True),
            ExpertShard.from_counts([4, 3, 2], 1),
        ),
    ),
    Case("bf16 given ids", _given(_Shape(17, 72, 64), 3, 6, False)),
    Case(
        "fp8 packed, shared experts",
        _given(_Shape(5, 128, 128, "fp8_block", num_shared=2), 5, 6, True),
    ),
    Case("bf16 one expert, many tokens", _given(_Shape(150, 64, 48), 1, 1, False)),
    Case("bf16 one expert, tiles of two blocks", _given(_Shape(270, 200, 136), 1, 1, False)),
    Case(
        "fp8 tensor",
        _layer(
            _Shape(13, 272, 144, "fp8_tensor", "up_gate"),
            Routing("deepseek_v3", 32, 5, 4, 2, scaling_factor=2.5, num_shared_experts=1),
        ),
    ),
    Case(
        "fp8 tensor, weights on input, shared expert",
        _layer(
            _Shape(21, 144, 112, "fp8_tensor", "gate_up_interleaved"),
            Routing("llama4", 5, 1, num_shared_experts=1, weights_on_input=True),
        ),
    ),
    Case(
        "fp8 tensor, weights on input, shard",
        _layer(
            _Shape(
                30, 256, 128, "fp8_tensor", "up", "block_major_k", activation=Activation("relu2")
            ),
            Routing("llama4", 9, 1, weights_on_input=True, weights_dtype="bfloat16"),
            ExpertShard.from_counts([4, 3, 2], 1),
        ),
    ),
    Case(
        "fp8 tensor given ids, weights on input",
        _given(_Shape(17, 144, 80, "fp8_tensor", weights_on_input=True), 1, 4, False),
    ),
    Case(
        "fp8 tensor packed, weights on input, shared experts",
        _given(
            _Shape(5, 128, 128, "fp8_tensor", num_shared=2, weights_on_input=True), 1, 6, True
        ),
    ),
    Case(
        "fp8 tensor one expert, tiles of two blocks",
        _given(_Shape(270, 272, 144, "fp8_tensor"), 1, 1, False),
    ),
    Case(
        "fp8 one expert, tiles of two blocks",
        _given(_Shape(120, 272, 144, "fp8_block"), 1, 1, False),
    ),
    Case("fp8 one expert, many tokens", _given(_Shape(310, 272, 144, "fp8_block"), 1, 1, False)),
]  # fmt: skip
"""The layer from logits or given routing to its result."""
