"""Expert layers of named public models: sizes, routing, FLOPs and bytes.

Every number is that of the model's published ``config.json``; a name that ends in ``_like`` takes
sizes from the model it is named after but not all of its arithmetic, and its comment says what
differs. The command line and the benchmarks share this table. Host only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cumoe.config import Activation, Routing

Recipe = Literal["bf16", "fp8_block", "fp8_tensor"]

SCALE_BLOCK = 128
"""Rows and columns of a weight block that share a scale."""


def _blocks(size: int) -> int:
    return -(-size // SCALE_BLOCK)


@dataclass(frozen=True)
class ModelShape:
    """One model's expert layer.

    Parameters
    ----------
    name : str
    hidden_size, intermediate_size : int
        Width of a token and of one expert; an expert is three matrices of
        ``hidden_size * intermediate_size``.
    num_experts, top_k : int
        Routed experts, and how many of them a token uses.
    num_shared_experts : int
        Experts of the same size that every token uses with weight 1.
    method : str
        Routing method, as in :class:`cumoe.config.RoutingMethod`.
    num_groups, top_groups, scaling_factor
        As in :class:`cumoe.config.Routing`.
    has_bias : bool
        The router adds a bias for selection.
    activation : Activation
    weights_on_input : bool
        The model scales an expert's input by the routing weight, which recipe ``"fp8_tensor"``
        does; with the others its output is scaled.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_shared_experts: int = 0
    method: str = "renormalize"
    num_groups: int = 1
    top_groups: int = 1
    scaling_factor: float = 1.0
    has_bias: bool = False
    activation: Activation = field(default_factory=Activation)
    weights_on_input: bool = False

    @property
    def total_top_k(self) -> int:
        """Experts a token uses, shared ones included."""
        return self.top_k + self.num_shared_experts

    def routing(self, recipe: Recipe = "fp8_block", **overrides: Any) -> Routing:
        """Return the model's :class:`Routing`, with `overrides` replacing its arguments.

        Examples
        --------
        >>> MODELS["kimi_k2"].routing(num_shared_experts=0).total_top_k
        8
        """
        arguments: dict[str, Any] = {
            "method": self.method,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "num_groups": self.num_groups,
            "top_groups": self.top_groups,
            "scaling_factor": self.scaling_factor,
            "num_shared_experts": self.num_shared_experts,
            "weights_on_input": self.weights_on_input and recipe == "fp8_tensor",
        }
        return Routing(**(arguments | overrides))

    def gemm_flops(self, num_tokens: int) -> int:
        """Return the useful FLOPs of both expert GEMMs: ``2 * T * K' * 3 * H * I``.

        Rows that only pad a tile are not counted. The first GEMM is two thirds of it.
        """
        slots = num_tokens * self.total_top_k
        return 2 * slots * 3 * self.hidden_size * self.intermediate_size

    def expert_bytes(self, recipe: Recipe) -> int:
        """Return the bytes of one expert's weights, scales included."""
        elems = 3 * self.hidden_size * self.intermediate_size
        if recipe == "bf16":
            return 2 * elems
        if recipe not in ("fp8_block", "fp8_tensor"):
            raise ValueError(
                f"recipe: expected 'bf16', 'fp8_block' or 'fp8_tensor', got {recipe!r}"
            )
        num_scales = 3
        if recipe == "fp8_block":
            num_scales *= _blocks(self.hidden_size) * _blocks(self.intermediate_size)
        return elems + 4 * num_scales

    def active_weight_bytes(self, num_active_experts: int, recipe: Recipe) -> int:
        """Return the bytes of that many experts' weights; shared experts count like the others."""
        return num_active_experts * self.expert_bytes(recipe)

    def min_bytes(self, num_tokens: int, num_active_experts: int, recipe: Recipe) -> int:
        """Return the least a layer call moves: active weights, logits and tokens in, tokens out.

        Tokens come and go as bfloat16, logits are float32; whatever lies between may stay on chip.
        """
        per_token = 2 * 2 * self.hidden_size + 4 * self.num_experts
        return self.active_weight_bytes(num_active_experts, recipe) + num_tokens * per_token

    def expected_active_experts(self, num_tokens: int) -> float:
        """Return how many experts uniform routing touches on average, shared ones included.

        ``E * (1 - (1 - K / E) ** T) + S``, and 0 for no tokens.
        """
        if num_tokens == 0:
            return 0.0
        missed = (1.0 - self.top_k / self.num_experts) ** num_tokens
        return self.num_experts * (1.0 - missed) + self.num_shared_experts


_SHAPES = (
    ModelShape(
        "deepseek_v3", 7168, 2048, 256, 8, num_shared_experts=1, method="deepseek_v3",
        num_groups=8, top_groups=4, scaling_factor=2.5, has_bias=True,
    ),
    ModelShape(
        "kimi_k2", 7168, 2048, 384, 8, num_shared_experts=1, method="deepseek_v3",
        scaling_factor=2.827, has_bias=True,
    ),
    ModelShape(
        "glm_4_5", 5120, 1536, 160, 8, num_shared_experts=1, method="deepseek_v3",
        scaling_factor=2.5, has_bias=True,
    ),
    ModelShape("mixtral_8x7b", 4096, 14336, 8, 2),
    ModelShape("qwen3_30b_a3b", 2048, 768, 128, 8),
    # The shared expert is scaled by a gate of its own, so it is no fused column.
    ModelShape("qwen3_next", 2048, 512, 512, 10),
    # Router and expert biases are left out.
    ModelShape(
        "gpt_oss_120b_like", 2880, 2880, 128, 4,
        activation=Activation(alpha=1.702, beta=1.0, limit=7.0),
    ),
    # Their inputs are scaled by the routing weight with recipe fp8_tensor only.
    ModelShape(
        "llama4_scout_like", 5120, 8192, 16, 1, num_shared_experts=1, method="llama4",
        weights_on_input=True,
    ),
    ModelShape(
        "llama4_maverick_like", 5120, 8192, 128, 1, num_shared_experts=1, method="llama4",
        weights_on_input=True,
    ),
    ModelShape("minimax_m2", 3072, 1536, 256, 8, method="minimax2", has_bias=True),
    # Experts work in a latent space of 1024 with a plain squared ReLU; run here as SwiGLU.
    ModelShape(
        "nemotron_3_super_like", 1024, 2688, 512, 22, method="deepseek_v3",
        scaling_factor=5.0, has_bias=True,
    ),
)  # fmt: skip

MODELS: dict[str, ModelShape] = {shape.name: shape for shape in _SHAPES}
"""Every shape by name."""


def get_shape(name: str) -> ModelShape:
    """Return the shape called `name`.

    Raises
    ------
    ValueError
        If there is none.
    """
    if name not in MODELS:
        raise ValueError(f"name: expected one of {sorted(MODELS)}, got {name!r}")
    return MODELS[name]
