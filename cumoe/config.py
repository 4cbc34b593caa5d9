"""What a layer is asked to do, and the small containers that ops pass to each other.

Owns the frozen descriptions that validate themselves when they are built, and the tuples that carry
routing decisions, permutations and quantised arrays. Imports NumPy only, and the table
of activations; knows no kernel and no device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple

import numpy as np

from cumoe.formulas import ACTIVATIONS, PARAMETERS, ActivationFormula

Array = Any
"""A NumPy or CuPy array."""

MAX_NUM_EXPERTS = 2048
MAX_TOP_K = 32
MAX_SHARED_EXPERTS = 32
FP8_BLOCKS = ((1, 128), (128, 128), (1, None), (None, None))


class RoutingMethod(str, Enum):
    """How logits become expert ids and weights (FlashInfer's ``RoutingMethodType``, by name).

    With ``x`` the logits in float32, ``b`` the bias and ``s = sigmoid(x)``:

    ==================== =============================== =========================================
    name                 top-k is taken of               weights
    ==================== =============================== =========================================
    default              ``softmax(x)``                  the selected probabilities
    renormalize          ``x``                           softmax over the selected logits
    renormalize_naive    ``x``                           same as ``renormalize``
    deepseek_v3          ``s + b`` in the best groups    ``s / (sum of selected s + 1e-20)``
    minimax2             ``s + b``                       ``s / (sum of selected s + 1e-20)``
    llama4               ``x``, top-1 only               ``s``
    top_k                ``x``                           ``x``
    sigmoid_renorm       ``s``                           ``s / max(sum of selected s, 1e-20)``
    sigmoid              ``s``                           ``s``
    top_k_sigmoid        ``x``                           ``s``
    ==================== =============================== =========================================

    Only ``deepseek_v3`` and ``minimax2`` read the bias; the others accept and ignore one.
    """

    DEFAULT = "default"
    RENORMALIZE = "renormalize"
    DEEPSEEK_V3 = "deepseek_v3"
    LLAMA4 = "llama4"
    RENORMALIZE_NAIVE = "renormalize_naive"
    TOP_K = "top_k"
    SIGMOID_RENORM = "sigmoid_renorm"
    MINIMAX2 = "minimax2"
    SIGMOID = "sigmoid"
    TOP_K_SIGMOID = "top_k_sigmoid"


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int in ``[low, high]`` or raise naming the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    value = int(value)
    if value < low or (high is not None and value > high):
        bound = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected {bound}, got {value}")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices` or raise naming the argument and the choices."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {list(choices)}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")
    return str(value)


def check_finite(name: str, value: object) -> float:
    """Return `value` as a finite float or raise naming the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a finite number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


@dataclass(frozen=True)
class Routing:
    """How tokens choose their experts.

    Parameters
    ----------
    method : RoutingMethod or str
        See :class:`RoutingMethod`.
    num_experts : int
        Routed experts over all ranks, 1 to 2048. Any number, no power of two needed.
    top_k : int
        Routed experts a token uses, 1 to 32, at most ``num_experts``; 1 for ``llama4``.
    num_groups, top_groups : int
        ``deepseek_v3`` only: experts form ``num_groups`` contiguous groups of equal size and only
        the best ``top_groups`` are candidates. A group's score is its two best keys' sum.
    scaling_factor : float
        Multiplies the routed weights after any normalisation; never the shared experts.
    normalize : bool, optional
        ``sigmoid_renorm`` only: divide by the sum of the selected sigmoids (default True).
    num_shared_experts : int
        Shared experts fused as extra columns of every token: ids ``num_experts + j``, weight 1.
    weights_dtype : {"float32", "bfloat16"}
        Dtype of the returned weights; ``"bfloat16"`` reproduces FlashInfer's rounding.
    bias_round_bf16 : bool
        Round the bias to bfloat16 before use, as FlashInfer's grouped kernel does.
    weights_on_input : bool
        The routed weight multiplies a token's products with gate and up instead of the expert's
        result (Llama 4); top-1 and weights of recipe ``"fp8_tensor"`` only.

    Raises
    ------
    ValueError, TypeError
        If a value is out of range or the combination cannot run.

    Examples
    --------
    >>> Routing("deepseek_v3", num_experts=256, top_k=8, num_groups=8, top_groups=4,
    ...         scaling_factor=2.5, num_shared_experts=1).total_top_k
    9
    """

    method: RoutingMethod | str
    num_experts: int
    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    scaling_factor: float = 1.0
    normalize: bool | None = None
    num_shared_experts: int = 0
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    bias_round_bf16: bool = False
    weights_on_input: bool = False

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        choices = [m.value for m in RoutingMethod]
        method = self.method.value if isinstance(self.method, RoutingMethod) else self.method
        set_(self, "method", RoutingMethod(check_choice("method", method, choices)))
        set_(self, "num_experts", check_int("num_experts", self.num_experts, 1, MAX_NUM_EXPERTS))
        set_(self, "top_k", check_int("top_k", self.top_k, 1, MAX_TOP_K))
        set_(self, "num_groups", check_int("num_groups", self.num_groups, 1))
        set_(self, "top_groups", check_int("top_groups", self.top_groups, 1))
        set_(self, "scaling_factor", check_finite("scaling_factor", self.scaling_factor))
        set_(
            self,
            "num_shared_experts",
            check_int("num_shared_experts", self.num_shared_experts, 0, MAX_SHARED_EXPERTS),
        )
        check_choice("weights_dtype", self.weights_dtype, ("float32", "bfloat16"))
        for name in ("bias_round_bf16", "weights_on_input"):
            if not isinstance(got := getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {type(got).__name__}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k: expected at most num_experts = {self.num_experts}, got {self.top_k}"
            )
        if self.method is RoutingMethod.LLAMA4 and self.top_k != 1:
            raise ValueError(f"top_k: expected 1 with method 'llama4', got {self.top_k}")
        if self.weights_on_input and self.top_k != 1:
            raise ValueError(f"weights_on_input: expected top_k = 1, got {self.top_k}")
        self._check_groups()
        if self.normalize is not None:
            if not isinstance(self.normalize, bool):
                raise TypeError(
                    f"normalize: expected a bool or None, got {type(self.normalize).__name__}"
                )
            if self.method is not RoutingMethod.SIGMOID_RENORM:
                raise ValueError(
                    "normalize: expected None unless method is 'sigmoid_renorm', got "
                    f"{self.normalize} with method {RoutingMethod(self.method).value!r}"
                )

    def _check_groups(self) -> None:
        groups, top_groups = self.num_groups, self.top_groups
        if groups > 1 and self.method is not RoutingMethod.DEEPSEEK_V3:
            raise ValueError(
                f"num_groups: expected 1 with method {RoutingMethod(self.method).value!r} "
                f"(only 'deepseek_v3' has groups), got {groups}"
            )
        if groups > self.num_experts or self.num_experts % groups:
            raise ValueError(
                f"num_groups: expected a divisor of num_experts = {self.num_experts}, got {groups}"
            )
        if top_groups > groups:
            raise ValueError(
                f"top_groups: expected at most num_groups = {groups}, got {top_groups}"
            )
        candidates = top_groups * (self.num_experts // groups)
        if candidates < self.top_k:
            raise ValueError(
                f"top_groups: {top_groups} groups of {self.num_experts // groups} experts leave "
                f"{candidates} candidates, expected at least top_k = {self.top_k}"
            )

    @property
    def total_top_k(self) -> int:
        """Columns of ids and weights: ``top_k + num_shared_experts``."""
        return self.top_k + self.num_shared_experts

    @property
    def total_experts(self) -> int:
        """Routed and shared experts: ``num_experts + num_shared_experts``."""
        return self.num_experts + self.num_shared_experts


@dataclass(frozen=True)
class ExpertShard:
    """The experts that one rank holds.

    Parameters
    ----------
    expert_offset, num_local_experts : int
        The rank holds routed experts ``expert_offset`` to ``expert_offset + num_local_experts -
        1``.
    rank, world_size : int
        Which of how many ranks this is; decides the rank's slice of the tokens for shared experts.
    shared_experts : {"token_slice", "all", "none"}
        Shared experts are replicated, and the sum over ranks must count each token once.
        ``"token_slice"``: this rank evaluates them for its slice of the tokens (the first
        ``num_tokens % world_size`` ranks take one token more); ``"all"``: for every token, and
        every other rank says ``"none"``.

    Examples
    --------
    >>> shard = ExpertShard.from_counts([22, 22, 20], rank=1)
    >>> shard.expert_offset, shard.num_local_experts, shard.shared_token_range(10)
    (22, 22, (4, 7))
    """

    expert_offset: int
    num_local_experts: int
    rank: int = 0
    world_size: int = 1
    shared_experts: Literal["token_slice", "all", "none"] = "token_slice"

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "expert_offset", check_int("expert_offset", self.expert_offset, 0))
        set_(
            self,
            "num_local_experts",
            check_int("num_local_experts", self.num_local_experts, 0, MAX_NUM_EXPERTS),
        )
        set_(self, "world_size", check_int("world_size", self.world_size, 1))
        set_(self, "rank", check_int("rank", self.rank, 0, self.world_size - 1))
        check_choice("shared_experts", self.shared_experts, ("token_slice", "all", "none"))

    @classmethod
    def even(
        cls,
        num_experts: int,
        rank: int,
        world_size: int,
        shared_experts: Literal["token_slice", "all", "none"] = "token_slice",
    ) -> ExpertShard:
        """Split `num_experts` as evenly as possible; the first ranks take the remainder."""
        world_size = check_int("world_size", world_size, 1)
        base, extra = divmod(check_int("num_experts", num_experts, 1), world_size)
        counts = [base + (r < extra) for r in range(world_size)]
        return cls.from_counts(counts, rank, shared_experts)

    @classmethod
    def from_counts(
        cls,
        counts: Sequence[int],
        rank: int,
        shared_experts: Literal["token_slice", "all", "none"] = "token_slice",
    ) -> ExpertShard:
        """Make the shard of `rank` when rank r holds ``counts[r]`` consecutive experts."""
        rank = check_int("rank", rank, 0, len(counts) - 1)
        counts = [check_int("counts", c, 0) for c in counts]
        return cls(sum(counts[:rank]), counts[rank], rank, len(counts), shared_experts)

    def shared_token_range(self, num_tokens: int) -> tuple[int, int]:
        """Return ``(start, stop)`` of the tokens whose shared experts this rank evaluates."""
        if self.shared_experts == "all":
            return 0, num_tokens
        if self.shared_experts == "none":
            return 0, 0
        base, extra = divmod(num_tokens, self.world_size)
        start = self.rank * base + min(self.rank, extra)
        return start, start + base + (self.rank < extra)


@dataclass(frozen=True, eq=False)
class Activation:
    """What is between the two expert GEMMs.

    With ``g = min(gate, limit)`` and ``u = clip(up, -limit, limit)``; no limit unless one is given:

    ============== ================================================================== =============
    name           value                                                              parameters
    ============== ================================================================== =============
    ``swiglu``     ``g / (1 + exp(-alpha * g)) * (u + beta)``                         default 1, 0
    ``situ``       ``beta * tanh(u / beta) * alpha * tanh(g / alpha) / (1 + exp(-g))`` default 1, 1
    ``geglu``      ``gate * (1 + erf(gate / sqrt(2))) / 2 * up``                      none
    ``geglu_tanh`` geglu with the tanh approximation of erf                           none
    ``relu2``      ``max(x, 0) ** 2``                                                 none
    ``silu``       ``x / (1 + exp(-x))``                                              none
    ``identity``   ``x``                                                              none
    ============== ================================================================== =============

    The last three have no gate: they go with weights of ``gate_up_order="up"``, half as many rows.

    Parameters
    ----------
    name : str
        One of these; :func:`cumoe.custom_activation` makes others.
    alpha, beta, limit : float or array, optional
        One number, or a float32 array of one value per local expert (shared experts last), on the
        device of the weights. A limit is positive; those of situ are not 0.
    formula : ActivationFormula, optional
        Given for a user's activation only.
    """

    name: str = "swiglu"
    alpha: Array | float | None = None
    beta: Array | float | None = None
    limit: Array | float | None = None
    formula: ActivationFormula | None = None

    def __post_init__(self) -> None:
        if self.formula is None or self.name in ACTIVATIONS:
            check_choice("activation", self.name, tuple(ACTIVATIONS))
            object.__setattr__(self, "formula", ACTIVATIONS[self.name])
        taken = dict(self.definition.defaults)
        for field in PARAMETERS:
            value = getattr(self, field)
            if value is not None and field not in taken:
                raise ValueError(
                    f"activation.{field}: expected None, since {self.name!r} takes "
                    f"{' and '.join(taken) or 'no parameter'}"
                )
            if value is None or hasattr(value, "shape") and getattr(value, "ndim", 0) > 0:
                continue
            value = check_finite(f"activation.{field}", value)
            if value == 0 and self.name == "situ" or field == "limit" and value <= 0:
                kind = "positive" if field == "limit" else "nonzero"
                raise ValueError(f"activation.{field}: expected a {kind} number, got {value}")
            object.__setattr__(self, field, value)

    @property
    def definition(self) -> ActivationFormula:
        """The formula, which every activation has."""
        assert self.formula is not None
        return self.formula

    @property
    def gated(self) -> bool:
        """Whether w13 holds gate rows beside the up rows."""
        return self.definition.gated

    def value(self, parameter: str) -> Array | float:
        """Return a parameter as given, or its default."""
        given = getattr(self, parameter)
        default = dict(self.definition.defaults).get(parameter, PARAMETERS[parameter])
        return default if given is None else given


class TopK(NamedTuple):
    """Chosen experts and their weights.

    Attributes
    ----------
    ids : array, int32, shape (num_tokens, top_k)
        Global expert ids; an id outside the local experts contributes nothing.
    weights : array, float32 or bfloat16, shape (num_tokens, top_k)
        Used as they are: no normalisation, no scaling.
    """

    ids: Array
    weights: Array


class PackedTopK(NamedTuple):
    """Ids and bfloat16 weights packed into one word: ``(id << 16) | bits(weight)``.

    Attributes
    ----------
    packed : array, int32, shape (num_tokens, top_k)
    """

    packed: Array


@dataclass(frozen=True, eq=False)
class Quantized:
    """An fp8 array and its dequantisation scales: ``real = values * scale``, block by block.

    Parameters
    ----------
    values : array
        ``float8_e4m3fn``, as ``uint8`` on CuPy: activations ``(num_tokens, hidden_size)``, weights
        ``(num_experts, n, k)``.
    scale : array, float32
        One value per block; the last block of a row or column may be partial. For (1, 128)
        ``(num_tokens, ceil(hidden_size / 128))`` in row- or column-major order, so FlashInfer's
        ``(hidden_size / 128, num_tokens)`` is passed as its transpose; (T, 1) per token, else (1,).
    dtype : str
    block : (int or None, int or None)
        Rows and columns of a block, None for all: (1, 128), (128, 128), (1, None), (None, None).
    """

    values: Array
    scale: Array
    dtype: str = "float8_e4m3fn"
    block: tuple[int | None, int | None] = (1, 128)

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("float8_e4m3fn",))
        if self.values is None or self.scale is None:
            missing = "values" if self.values is None else "scale"
            raise ValueError(f"Quantized.{missing}: expected an array, got None")
        if tuple(self.block) not in FP8_BLOCKS:
            raise ValueError(f"block: expected one of {list(FP8_BLOCKS)}, got {self.block}")
        object.__setattr__(self, "block", tuple(self.block))


class Permutation(NamedTuple):
    """Tokens in expert order, each expert's rows starting at a multiple of the tile height.

    Slot ``(t, k)`` of expert ``e`` is row ``expert_offsets[e] + (number of earlier slots of e)``,
    slots counted in row-major order, so the order is stable. All arrays are int32 and every element
    is written on every call.

    Attributes
    ----------
    tokens_per_expert : array, shape (num_local_experts,)
        Slots routed to each local expert, shared experts last.
    expert_offsets : array, shape (num_local_experts + 1,)
        ``expert_offsets[e + 1] = expert_offsets[e] + ceil(tokens_per_expert[e] / tile) * tile``.
    permuted_idx : array, shape (num_tokens, top_k)
        Row of each slot; -1 where the expert is not held here.
    token_idx : array, shape (max_rows,)
        Source token of each row; -1 in padding and past ``expert_offsets[-1]``.
    tile_expert : array, shape (max_tiles,)
        Local expert of each row tile; -1 past ``num_tiles``.
    tile_row_end : array, shape (max_tiles,)
        One past the last valid row of each tile; 0 past ``num_tiles``.
    num_tiles : array, shape (1,)
        Row tiles in use, ``expert_offsets[-1] / tile``.
    tile : int
        Tile height in rows; segments are padded to a multiple of it.
    """

    tokens_per_expert: Array
    expert_offsets: Array
    permuted_idx: Array
    token_idx: Array
    tile_expert: Array
    tile_row_end: Array
    num_tiles: Array
    tile: int

    @property
    def max_rows(self) -> int:
        """Rows to allocate for permuted arrays."""
        return int(self.token_idx.shape[0])

    @property
    def max_tiles(self) -> int:
        """Upper bound of ``num_tiles`` for any routing of this size."""
        return int(self.tile_expert.shape[0])


class ExpertParts(NamedTuple):
    """A layer's result before the weighted sum (``finalize=False``).

    Attributes
    ----------
    rows : array, bfloat16, shape (max_rows, hidden_size)
        Output of each permuted row, not yet weighted; rows no slot points at are undefined.
    topk_weights : array, shape (num_tokens, top_k + num_shared_experts), or None
        None, which counts as ones, where the weights were applied on the input.
    permuted_idx : array, int32, shape (num_tokens, top_k + num_shared_experts)
        Row of each slot, -1 where the expert is not held here.
    """

    rows: Array
    topk_weights: Array | None
    permuted_idx: Array


def max_tiles(num_tokens: int, top_k: int, num_local_experts: int, tile: int) -> int:
    """Return the most row tiles that any routing of ``num_tokens * top_k`` slots can need."""
    slots = num_tokens * top_k
    experts = min(num_local_experts, slots)
    return experts + (slots - experts) // tile
