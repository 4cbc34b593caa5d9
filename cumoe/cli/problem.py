"""The demo's layer: a model's shape fitted to the machine, with weights, tokens and logits drawn.

Numbers come from a counter-based hash, so a seed means the same layer on NumPy and on a GPU, and
weights are made where they are used, one matrix at a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cumoe import launch
from cumoe.cli.console import CommandError
from cumoe.config import Array, ExpertShard, Routing, max_tiles
from cumoe.models import ModelShape, Recipe
from cumoe.moe import MoELayer
from cumoe.tuning import tiles
from cumoe.weights import ExpertWeights

if TYPE_CHECKING:
    from cumoe.comm import Group

NUMPY_MAX_PARAMETERS = 60e6
"""Weights of a layer that NumPy runs in a few seconds on two cores."""

MEMORY_SHARE = 0.9
"""Part of a GPU's free memory that the demo takes at most."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer and one call of it; `host_logits` and `host_x` are what the oracle starts from."""

    shape: ModelShape
    recipe: Recipe
    routing: Routing
    weights: ExpertWeights
    layer: MoELayer
    x: Array
    logits: Array
    bias: Array | None
    host_x: NDArray[Any]
    host_logits: NDArray[np.float32]
    host_bias: NDArray[np.float32] | None

    @property
    def num_tokens(self) -> int:
        """Rows of x."""
        return int(self.x.shape[0])


def choose_backend(wanted: str) -> str:
    """Return ``"cuda"`` or ``"numpy"`` for a wish that may be ``"auto"``.

    Raises
    ------
    CommandError
        If CUDA is wanted and there is no usable GPU.
    """
    if wanted == "numpy":
        return wanted
    reason = launch.why_unavailable()
    if reason is None:
        return "cuda"
    if wanted == "cuda":
        raise CommandError(f"--backend cuda: {reason}")
    return "numpy"


def fit_shape(shape: ModelShape, recipe: Recipe, num_tokens: int, backend: str) -> ModelShape:
    """Return the shape with hidden and intermediate size halved until the machine can hold it.

    Experts, routing and tokens stay; a halved size is rounded up to a multiple of 128.

    Raises
    ------
    CommandError
        If even the smallest size does not fit.
    """
    limit = NUMPY_MAX_PARAMETERS
    if backend == "cuda":
        import cupy

        limit = MEMORY_SHARE * cupy.cuda.runtime.memGetInfo()[0]
    hidden, size = shape.hidden_size, shape.intermediate_size
    divisor = 1
    while True:
        fitted = replace(shape, hidden_size=hidden, intermediate_size=size)
        if backend == "cuda":
            needed = float(_device_bytes(fitted, recipe, num_tokens))
        else:
            experts = fitted.num_experts + fitted.num_shared_experts
            needed = 3.0 * experts * hidden * size
        if needed <= limit:
            return fitted
        if hidden <= 128 and size <= 128:
            raise CommandError(
                f"--tokens {num_tokens}: {shape.name} does not fit this machine at any size"
            )
        divisor *= 2
        hidden = _shrunk(shape.hidden_size, divisor)
        size = _shrunk(shape.intermediate_size, divisor)


def _shrunk(size: int, divisor: int) -> int:
    return max(1, -(-size // (128 * divisor))) * 128


def _device_bytes(shape: ModelShape, recipe: Recipe, num_tokens: int) -> int:
    """Bound the memory of weights, workspace, tokens, and the matrices that the oracle widens."""
    hidden, size = shape.hidden_size, shape.intermediate_size
    experts = shape.num_experts + shape.num_shared_experts
    heights = tiles("float8_e4m3fn" if recipe == "fp8_block" else "bfloat16")
    rows = max(max_tiles(num_tokens, shape.total_top_k, experts, t) * t for t in heights)
    workspace = rows * (2 * hidden + 2 * size) + num_tokens * (8 * hidden + 8 * experts)
    return experts * shape.expert_bytes(recipe) + workspace + 48 * hidden * size


def make_weights(
    shape: ModelShape,
    recipe: Recipe,
    backend: str,
    seed: int,
    advance: Callable[[], None] = lambda: None,
    *,
    experts: Sequence[int] | None = None,
) -> ExpertWeights:
    """Draw the weights, one matrix at a time; `advance` is called after each expert.

    `experts` are the ids to draw, by default all; an expert is the same whichever others are drawn.

    Each matrix is uniform with variance ``1 / columns``, which keeps the layer's values near one.
    """
    xp = importlib.import_module("cupy" if backend == "cuda" else "numpy")
    if experts is None:
        experts = range(shape.num_experts + shape.num_shared_experts)
    hidden, size = shape.hidden_size, shape.intermediate_size

    def matrices(rows: int, columns: int, kind: int) -> Iterator[Array]:
        for expert in experts:
            values = uniform(xp, rows * columns, 3 * expert + kind, seed)
            values *= np.float32(columns**-0.5)
            yield values.reshape(rows, columns)
            if kind == 2:
                advance()

    return ExpertWeights.from_experts(
        matrices(size, hidden, 0),
        matrices(size, hidden, 1),
        matrices(hidden, size, 2),
        recipe=recipe,
        num_experts=len(experts),
    )


def uniform(xp: Any, count: int, stream: int, seed: int) -> Array:
    """Return float32 numbers of mean 0 and variance 1, the same for NumPy and CuPy as `xp`."""
    # Two rounds of a 32-bit finaliser over the index; the stream enters between them.
    x = xp.arange(count, dtype=np.uint32)
    key = np.random.SeedSequence([seed, stream]).generate_state(1)[0]
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x ^= x >> np.uint32(16)
        x *= np.uint32(multiplier)
        x ^= np.uint32(key)
    x ^= x >> np.uint32(15)
    values = x.view(np.int32).astype(np.float32)
    values *= np.float32(3**0.5 / 2**31)
    return values


def make_problem(
    shape: ModelShape,
    recipe: Recipe,
    weights: ExpertWeights,
    num_tokens: int,
    seed: int,
    *,
    shard: ExpertShard | None = None,
    group: Group | None = None,
) -> Problem:
    """Build the layer, or a shard of it, and draw a call's tokens, logits and selection bias."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_tokens, shape.hidden_size), dtype=np.float32)
    host_x = x.astype(ml_dtypes.bfloat16)
    host_logits = rng.standard_normal((num_tokens, shape.num_experts), dtype=np.float32)
    host_bias = None
    if shape.has_bias:
        host_bias = 0.01 * rng.standard_normal(shape.num_experts, dtype=np.float32)
    routing = shape.routing()
    bias = _beside(weights, host_bias)
    layer = MoELayer(
        weights,
        routing,
        max_num_tokens=num_tokens,
        bias=bias,
        shard=shard,
        activation=shape.activation,
        group=group,
    )
    return Problem(
        shape=shape,
        recipe=recipe,
        routing=routing,
        weights=weights,
        layer=layer,
        x=_beside(weights, host_x),
        logits=_beside(weights, host_logits),
        bias=bias,
        host_x=host_x,
        host_logits=host_logits,
        host_bias=host_bias,
    )


def _beside(weights: ExpertWeights, x: NDArray[Any] | None) -> Any:
    """Copy a host array to where the weights are."""
    if x is None or not weights.is_device:
        return x
    import cupy

    return cupy.asarray(x)
