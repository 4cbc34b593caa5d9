"""A mixture-of-experts layer in float64, token by token, expert by expert, and random layers.

Written from the formulas alone: rounds, quantises, routes and sums without a line of the package,
at the same rounding points. Slow and plain on purpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cumoe import ExpertShard, ExpertWeights, Routing
from tests.helpers import BF16

Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]


def _round(x: np.ndarray, bits: int, lowest_exponent: int, largest: float) -> np.ndarray:
    """Round to `bits` bits behind the point, ties to even, with subnormals, saturating."""
    exponent = np.maximum(np.frexp(x)[1] - 1, lowest_exponent)
    step = np.exp2(exponent - float(bits))
    return np.clip(np.rint(x / step) * step, -largest, largest)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Round float64 to bfloat16 numbers."""
    return _round(x, 7, -126, 3.3895313892515355e38)


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """Round float64 to float8_e4m3fn numbers, saturating at 448."""
    return _round(x, 3, -6, 448.0)


def _quantize_block(x: np.ndarray) -> np.ndarray:
    """Return what a block reads back as after fp8 quantisation with one float32 scale.

    Both divisions are float32 by definition: ties are ties of the rounded quotient.
    """
    x = x.astype(np.float32)
    scale = np.maximum(np.max(np.abs(x), initial=0) / np.float32(448), np.finfo(np.float32).tiny)
    return round_e4m3((x / scale).astype(np.float64)) * np.float64(scale)


def quantize_row(x: np.ndarray) -> np.ndarray:
    """Return what a row reads back as with a scale for each 128 columns."""
    return np.concatenate([_quantize_block(x[i : i + 128]) for i in range(0, len(x), 128)])


def quantize_static(x: np.ndarray, scale: float) -> np.ndarray:
    """Return what numbers read back as after fp8 quantisation by a given float32 scale."""
    quotient = x.astype(np.float32) / np.float32(scale)
    return round_e4m3(quotient.astype(np.float64)) * np.float64(np.float32(scale))


def quantize_matrix(w: np.ndarray) -> np.ndarray:
    """Return what a matrix reads back as with a scale for each 128 x 128 block."""
    result = np.empty(w.shape)
    for i in range(0, w.shape[0], 128):
        for j in range(0, w.shape[1], 128):
            block = np.s_[i : i + 128, j : j + 128]
            result[block] = _quantize_block(w[block])
    return result


def swiglu(
    gate: np.ndarray, up: np.ndarray, alpha: float = 1.0, beta: float = 0.0, limit: float = np.inf
) -> np.ndarray:
    """Return the gated activation."""
    g = np.minimum(gate, limit)
    return g / (1 + np.exp(-alpha * g)) * (np.clip(up, -limit, limit) + beta)


def activate(kind: str, gate: np.ndarray | None, up: np.ndarray, **values: float) -> np.ndarray:
    """Return any built-in activation; `gate` is None or unused for those without one."""
    if kind == "swiglu":
        return swiglu(gate, up, **values)  # type: ignore[arg-type]
    if kind == "situ":
        alpha, beta = values.get("alpha", 1.0), values.get("beta", 1.0)
        limit = values.get("limit", np.inf)
        g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)  # type: ignore[arg-type]
        return beta * np.tanh(u / beta) * alpha * np.tanh(g / alpha) / (1 + np.exp(-g))
    if kind == "geglu":
        erf = np.vectorize(math.erf, otypes=[np.float64])
        return 0.5 * gate * (1 + erf(gate / math.sqrt(2))) * up  # type: ignore[operator]
    if kind == "geglu_tanh":
        z = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)  # type: ignore[operator]
        return 0.5 * gate * (1 + np.tanh(z)) * up
    if kind == "relu2":
        return np.where(up > 0, up, 0) ** 2
    return up / (1 + np.exp(-up)) if kind == "silu" else up


def _top(keys: np.ndarray, count: int) -> list[int]:
    """Return the indices of the largest keys, descending, ties by index."""
    return sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:count]


def route(
    logits: np.ndarray, routing: Routing, bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and float64 weights of every token, shared experts last."""
    method, top_k = routing.method.value, routing.top_k  # type: ignore[union-attr]
    b = np.zeros(routing.num_experts) if bias is None else bias.astype(np.float64)
    if routing.bias_round_bf16:
        b = round_bf16(b)
    all_ids, all_weights = [], []
    for x in logits.astype(np.float64):
        s = 1 / (1 + np.exp(-x))
        keys = x
        if method == "default":
            keys = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        elif method in ("deepseek_v3", "minimax2"):
            keys = s + b
        elif method in ("sigmoid", "sigmoid_renorm"):
            keys = s
        if routing.num_groups > 1:
            groups = keys.reshape(routing.num_groups, -1)
            best = _top(np.sort(groups)[:, -2:].sum(axis=1), routing.top_groups)
            outside = np.setdiff1d(np.arange(routing.num_groups), best)
            groups = groups.copy()
            groups[outside] = -np.inf
            keys = groups.reshape(-1)
        ids = _top(keys, top_k)
        if method in ("renormalize", "renormalize_naive"):
            weights = np.exp(x[ids] - x[ids].max())
            weights /= weights.sum()
        elif method == "default":
            weights = keys[ids]
        elif method == "top_k":
            weights = x[ids]
        else:
            weights = s[ids]
        if method in ("deepseek_v3", "minimax2") or (
            method == "sigmoid_renorm" and routing.normalize is not False
        ):
            weights = weights / weights.sum()
        shared = range(routing.num_experts, routing.total_experts)
        all_ids.append([*ids, *shared])
        all_weights.append([*weights * routing.scaling_factor, *np.ones(len(shared))])
    columns = routing.total_top_k
    return np.array(all_ids, np.int32).reshape(-1, columns), np.array(all_weights).reshape(
        -1, columns
    )


@dataclass
class Layer:
    """A random layer: its inputs, and its experts as float32 matrices, shared experts last."""

    x: np.ndarray
    logits: np.ndarray
    bias: np.ndarray
    matrices: Matrices
    routing: Routing
    recipe: str
    order: str = "gate_up"
    layout: str = "major_k"
    activation: dict[str, Any] = field(default_factory=dict)
    kind: str = "swiglu"
    x_scale: float = 0.0  # static scales of recipe fp8_tensor
    act_scale: np.ndarray | None = None
    _exact: dict[int, Matrices] = field(default_factory=dict)

    @property
    def weights(self) -> ExpertWeights:
        """The experts as the package stores them."""
        gate, up, down = self.matrices
        return ExpertWeights.from_experts(
            None if self.order == "up" else gate,
            up,
            down,
            recipe=self.recipe,  # type: ignore[arg-type]
            gate_up_order=self.order,  # type: ignore[arg-type]
            layout=self.layout,  # type: ignore[arg-type]
            **({} if self.act_scale is None else self.static_scales),
        )

    @property
    def static_scales(self) -> dict[str, Any]:
        """The scales of recipe fp8_tensor, by argument name."""
        return {"x_scale": self.x_scale, "act_scale": self.act_scale}

    def topk(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the oracle's ids and weights."""
        return route(self.logits, self.routing, self.bias)

    def rounded(self, expert: int) -> Matrices:
        """Return what an expert's matrices read back as, in float64."""
        if expert not in self._exact:
            rounding = {
                "bf16": round_bf16, "fp8_block": quantize_matrix, "fp8_tensor": _quantize_block
            }[self.recipe]  # fmt: skip
            gate, up, down = (rounding(m[expert].astype(np.float64)) for m in self.matrices)
            self._exact[expert] = gate, up, down
        return self._exact[expert]

    def slot(self, token: np.ndarray, expert: int, local: int, weight: float = 1.0) -> np.ndarray:
        """Return the row of one token and one expert, rounded to bfloat16.

        `weight` is one that is applied on the input.
        """
        gate, up, down = self.rounded(expert)
        if self.act_scale is not None:
            x = quantize_static(token, self.x_scale)
        else:
            x = quantize_row(token) if self.recipe == "fp8_block" else token
        values = {n: v[local] if np.ndim(v) else v for n, v in self.activation.items()}
        y = activate(self.kind, gate @ x * weight, up @ x * weight, **values)
        if self.act_scale is not None:
            y = quantize_static(y, self.act_scale[expert])
        else:
            y = quantize_row(y) if self.recipe == "fp8_block" else round_bf16(y)
        return round_bf16(down @ y)

    def run(
        self,
        ids: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        shard: ExpertShard | None = None,
    ) -> np.ndarray:
        """Return the layer's result; ids that name no expert held by `shard` add nothing."""
        if ids is None or weights is None:
            ids, weights = self.topk()
        num_experts = self.routing.num_experts
        shard = shard or ExpertShard(0, num_experts)
        first, held = shard.expert_offset, shard.num_local_experts
        start, stop = shard.shared_token_range(len(self.x))
        x = self.x.astype(np.float64)
        out = np.zeros(x.shape)
        for t, k in np.ndindex(*ids.shape):
            e, weight = int(ids[t, k]), float(weights[t, k])
            if max(first, 0) <= e < min(first + held, num_experts):
                on_input = weight if self.routing.weights_on_input else 1.0
                row = self.slot(x[t], e, e - first, on_input)
                out[t] += weight * row if on_input == 1.0 else row
            elif num_experts <= e < len(self.matrices[0]) and start <= t < stop:
                out[t] += weight * self.slot(x[t], e, held + e - num_experts)
        return out


def random_layer(
    rng: np.random.Generator,
    routing: Routing,
    recipe: str,
    *,
    num_tokens: int = 13,
    hidden_size: int = 64,
    intermediate_size: int = 48,
    x_dtype: np.dtype = BF16,
    logits_dtype: Any = np.float32,
    **fields: Any,
) -> Layer:
    """Draw a layer whose experts differ in size and whose inputs have large columns."""
    experts = routing.total_experts
    size = (experts, intermediate_size, hidden_size)
    scale = 0.5 + np.arange(experts)[:, None, None] % 3 / 2
    gate, up = (rng.standard_normal(size, np.float32) * scale for _ in range(2))
    down = rng.standard_normal((experts, hidden_size, intermediate_size), np.float32) * scale
    matrices = [
        (m / np.sqrt(m.shape[2])).astype(np.float32) for m in (gate * np.float32(1.5), up, down)
    ]
    x = rng.standard_normal((num_tokens, hidden_size), np.float32)
    x[:, ::37] *= 8
    if recipe == "fp8_tensor":
        act_scale = 0.05 * (1 + np.arange(experts) % 3 / 2)
        fields = {"x_scale": 0.05, "act_scale": act_scale.astype(np.float32)} | fields
    return Layer(
        x.astype(x_dtype),
        rng.standard_normal((num_tokens, routing.num_experts), np.float32).astype(logits_dtype),
        rng.uniform(-0.3, 0.3, routing.num_experts).astype(np.float32),
        (matrices[0], matrices[1], matrices[2]),
        routing,
        recipe,
        **fields,
    )
