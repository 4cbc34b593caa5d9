"""Inputs of the benches, made where they are used: expert weights, tokens, logits, router bias.

Weights are drawn in place, expert by expert, by hashing positions: the largest layers take about a
second on a GPU, no generator library is needed, and a seed gives the same bits on NumPy and CuPy.
They look like trained ones after scaling: normal values, so that gate and up have a variance of
order one and no fp8 code is a NaN. Nothing here times. CuPy is imported on use.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from bench.record import device_available
from bench.shapes import ModelShape, Recipe, get_shape, make_hidden_states, make_logits
from bench.shapes import make_bias as make_host_bias
from cumoe import ExpertWeights, MoELayer
from cumoe.checkpoint import num_blocks
from cumoe.config import Array

TINY = ModelShape(
    "tiny", 272, 144, 8, 2, num_shared_experts=1, method="deepseek_v3", num_groups=2,
    top_groups=1, scaling_factor=2.5, has_bias=True,
)  # fmt: skip
"""A layer for dry runs on NumPy, its sizes no multiples of a scale block."""

GATE_UP_GAIN = 2.0
"""Standard deviation of gate and up for tokens of unit variance: some pass a limit of 7."""

_SPREAD = np.uint32(0x9E3779B9)  # 2**32 / golden ratio, odd
_FP8_MAX = 448.0


def find_backend(choice: str = "auto") -> Any:
    """Return the ``numpy`` or the ``cupy`` module.

    Parameters
    ----------
    choice : {"auto", "numpy", "cupy"}
        ``"auto"`` is ``"cupy"``: figures are a GPU's unless NumPy is asked for by name.

    Raises
    ------
    SystemExit
        If CuPy finds no GPU; the message says what to do.
    """
    if choice == "numpy":
        return np
    if not device_available():
        raise SystemExit(
            "no GPU: expected one that CuPy can use; --dry-run runs a tiny layer on NumPy"
        )
    # Oracles multiply in float32: TF32 keeps only 10 bits. Read by cuBLAS when it is loaded.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    os.environ["CUPY_TF32"] = "0"
    import cupy

    return cupy


def find_model(name: str, *, shared: bool = True) -> ModelShape:
    """Return a shape by name, ``"tiny"`` included, with or without its shared experts.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    shape = TINY if name == TINY.name else get_shape(name)
    return shape if shared else replace(shape, num_shared_experts=0)


def to_backend(host: np.ndarray, xp: Any) -> Array:
    """Return a host array as `xp`'s; bfloat16 stays bfloat16."""
    if xp is np:
        return host
    if host.dtype == ml_dtypes.bfloat16:
        return xp.asarray(host.view(np.uint16)).view(host.dtype)
    return xp.asarray(host)


def to_host(x: Array) -> np.ndarray:
    """Return an array as NumPy's, waiting for the device."""
    return x if isinstance(x, np.ndarray) else x.get()


def free_memory(xp: Any) -> None:
    """Give what no array uses any more back to the device."""
    import gc

    gc.collect()
    if xp is not np:
        xp.cuda.Device().synchronize()
        xp.get_default_memory_pool().free_all_blocks()


def random_words(xp: Any, count: int, *key: int) -> Array:
    """Return `count` random 32-bit words that depend on `key` only.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    count : int
        At most ``2**32``.
    *key : int
        0 or more each.

    Returns
    -------
    array, uint32, shape (count,)
        A hash of ``position * odd + key``: each of the 32 bits is balanced, and the words of one
        key are all different.
    """
    start = np.uint32(np.random.SeedSequence(key).generate_state(1)[0])
    x = xp.arange(count, dtype=np.uint32)
    x *= _SPREAD
    x += start
    # The finalizer "lowbias32" of C. Wellons' hash prospector.
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


@functools.cache
def _normal_quantiles(count: int) -> np.ndarray:
    """Return the standard normal's quantiles at the middle of `count` equal parts, float32."""
    inverse = statistics.NormalDist().inv_cdf
    half = [inverse((i + 0.5) / count) for i in range(count // 2)]
    return np.array(half + [-z for z in reversed(half)], np.float32)


def _fp8_table() -> tuple[np.ndarray, float]:
    """Return the e4m3 code for each random byte, and the root mean square of the codes' values."""
    z = _normal_quantiles(256)
    values = (z * (_FP8_MAX / float(z[-1]))).astype(ml_dtypes.float8_e4m3fn)
    rms = float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
    return values.view(np.uint8), rms


def _draw(xp: Any, table: Array, shape: tuple[int, ...], *key: int) -> Array:
    """Return an array of `shape` with entries of `table` drawn at random."""
    count = int(np.prod(shape, dtype=np.int64))
    per_word = 4 // table.dtype.itemsize
    words = random_words(xp, -(-count // per_word), *key)
    return table.take(words.view(table.dtype)[:count]).reshape(shape)


def random_bf16(xp: Any, shape: tuple[int, ...], *key: int, deviation: float = 1.0) -> Array:
    """Return normal numbers in bfloat16 that depend on `key` only."""
    values = (_normal_quantiles(1 << 16) * np.float32(deviation)).astype(ml_dtypes.bfloat16)
    table = xp.asarray(values.view(np.uint16))
    return _draw(xp, table, shape, *key).view(values.dtype)


STATIC_SCALES = {"x_scale": 6 / 448, "act_scale": 64 / 448}
"""Of recipe fp8_tensor: six standard deviations of a token, and what few activations exceed."""


def make_weights(
    shape: ModelShape,
    recipe: Recipe,
    xp: Any,
    *,
    seed: int,
    experts: Sequence[int] | None = None,
) -> ExpertWeights:
    """Draw the weights of a layer, shared experts included, in order ``"gate_up"``.

    Parameters
    ----------
    shape : ModelShape
    recipe : {"bf16", "fp8_block", "fp8_tensor"}
    xp : module
        ``numpy`` or ``cupy``.
    seed : int
    experts : sequence of int, optional
        Only these, in this order: a rank's. They have the numbers that they have in the whole
        layer.

    Returns
    -------
    ExpertWeights
        Normal values; standard deviation ``GATE_UP_GAIN / sqrt(hidden_size)`` for w13 and
        ``1 / sqrt(intermediate_size)`` for w2. Scales vary by a quarter either way; static ones
        are :data:`STATIC_SCALES`.
    """
    if recipe not in ("bf16", "fp8_block", "fp8_tensor"):
        raise ValueError(f"recipe: expected bf16, fp8_block or fp8_tensor, got {recipe!r}")
    count = shape.num_experts + shape.num_shared_experts
    held = range(count) if experts is None else experts
    hidden, size = shape.hidden_size, shape.intermediate_size
    fp8 = recipe != "bf16"
    matrices = {
        "w13": ((2 * size, hidden), GATE_UP_GAIN / hidden**0.5),
        "w2": ((hidden, size), size**-0.5),
    }
    arrays: dict[str, Any] = {}
    for number, (name, (matrix, deviation)) in enumerate(matrices.items()):
        payload = xp.empty((len(held), *matrix), np.uint8 if fp8 else np.uint16)
        if fp8:
            codes, rms = _fp8_table()
            table = xp.asarray(codes)
            rows = 2 * num_blocks(size) if name == "w13" else num_blocks(hidden)
            grid: tuple[int, ...] = (count, rows, num_blocks(matrix[1]))
            if recipe == "fp8_tensor":
                grid = (count, 2) if name == "w13" else (count,)
            scale = _draw_scale(xp, grid, deviation / rms, seed, number)
            arrays[f"{name}_scale"] = scale.take(xp.asarray(np.array(held)), axis=0)
        else:
            values = _normal_quantiles(1 << 16) * np.float32(deviation)
            table = xp.asarray(values.astype(ml_dtypes.bfloat16).view(np.uint16))
        for i, expert in enumerate(held):
            payload[i] = _draw(xp, table, matrix, seed, number, expert)
        arrays[name] = payload if fp8 else payload.view(np.dtype(ml_dtypes.bfloat16))
    arrays |= STATIC_SCALES if recipe == "fp8_tensor" else {}
    return ExpertWeights(**arrays, gate_up_order="gate_up", recipe=recipe)


def _draw_scale(xp: Any, grid: tuple[int, ...], mean: float, *key: int) -> Array:
    """Return block scales, uniform within a quarter of `mean`."""
    words = random_words(xp, int(np.prod(grid)), *key)
    uniform = words.astype(np.float32) * np.float32(2.0**-32)
    scale = (uniform * np.float32(0.5) + np.float32(0.75)) * np.float32(mean)
    return scale.reshape(grid)


def make_call(
    shape: ModelShape, num_tokens: int, xp: Any, *, seed: int, skew: float | None = None
) -> tuple[Array, Array]:
    """Return tokens (bfloat16) and logits (float32) of one call."""
    x = make_hidden_states(shape, num_tokens, seed=seed)
    logits = make_logits(shape, num_tokens, skew=skew, seed=seed)
    return to_backend(x, xp), to_backend(logits, xp)


def make_bias(shape: ModelShape, xp: Any, *, seed: int) -> Array | None:
    """Return the router's bias where the model has one."""
    bias = make_host_bias(shape, seed=seed)
    return None if bias is None else to_backend(bias, xp)


def make_layer(
    shape: ModelShape, weights: ExpertWeights, bias: Array | None, max_num_tokens: int
) -> MoELayer:
    """Plan the model's layer."""
    return MoELayer(
        weights,
        shape.routing(weights.recipe or "bf16"),
        max_num_tokens=max_num_tokens,
        bias=bias,
        activation=shape.activation,
    )


def compile_ahead(layer: MoELayer, num_tokens: Iterable[int]) -> int:
    """Compile the kernels of these calls into the cache, on all CPUs at once; return how many.

    Nothing to do on the host.
    """
    if not layer.weights.is_device:
        return 0
    from cumoe.launch import get_device, warmup

    arch = get_device(int(layer.weights.w13.device.id)).arch
    plans = [layer.plan(tokens) for tokens in num_tokens]
    specs = dict.fromkeys(item.spec for p in plans for stage in p.stages.values() for item in stage)
    return len(warmup(specs, [arch]))
