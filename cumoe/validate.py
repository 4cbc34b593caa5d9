"""Checks that several ops share, each raising with the argument's name, what was expected and what
came.

Everything here runs before anything is launched or written; only results are allocated, last.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cumoe.arrays import (
    FP8,
    as_native,
    check_no_overlap,
    empty,
    is_device,
    place_of,
    same_place,
)
from cumoe.config import (
    MAX_SHARED_EXPERTS,
    MAX_TOP_K,
    Activation,
    Array,
    ExpertShard,
    PackedTopK,
    Permutation,
    Quantized,
    TopK,
    check_int,
)
from cumoe.formulas import PARAMETERS

FLOATS = ("bfloat16", "float16", "float32")
HALVES = ("bfloat16", "float16")


def check_type(name: str, value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Raise TypeError unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")


def check_multiple(name: str, what: str, value: int, of: int) -> None:
    """Raise unless a size is a multiple of `of`, which the kernels' 16-byte accesses need."""
    if value % of:
        raise ValueError(
            f"{name}: expected {what} to be a multiple of {of} (16-byte accesses), got {value}; "
            "pad it with zeros"
        )


def check_shard(shard: ExpertShard | None, num_experts: int) -> ExpertShard:
    """Return the shard, or the whole of the experts, after checking its range."""
    if shard is None:
        return ExpertShard(0, num_experts)
    check_type("shard", shard, ExpertShard, "an ExpertShard or None")
    if shard.expert_offset + shard.num_local_experts > num_experts:
        raise ValueError(
            f"shard: expected experts below num_experts = {num_experts}, got expert_offset "
            f"{shard.expert_offset} and num_local_experts {shard.num_local_experts}"
        )
    return shard


def check_rows(
    x: Any,
    name: str,
    dtypes: tuple[str, ...],
    block: tuple[int | None, int | None] = (1, 128),
    num_scales: int = 1,
) -> tuple[Array, Array | None]:
    """Return payload and scale of ``(num_rows, k)`` activations, plain or Quantized in blocks.

    A tensor has one scale or, with rows in expert order, one for each of `num_scales` experts.
    """
    if not isinstance(x, Quantized):
        return as_native(x, name, dtypes, ndim=2), None
    if x.block != block:
        raise ValueError(f"{name}.block: expected {block} for activations, got {x.block}")
    values = as_native(x.values, f"{name}.values", (FP8,), ndim=2)
    if block == (None, None):
        return values, check_scales(x.scale, f"{name}.scale", num_scales)
    num_rows, k = values.shape
    scale = as_native(
        x.scale, f"{name}.scale", ("float32",), shape=(num_rows, -(-k // 128)), contiguous=False
    )
    return values, scale


def check_scales(scale: Any, name: str, num_experts: int) -> Array:
    """Return a tensor's scale, or one for each expert."""
    native = as_native(scale, name, ("float32",), ndim=1)
    if native.shape[0] not in (1, num_experts):
        one = "(1,)" if num_experts == 1 else f"(1,) or ({num_experts},)"
        raise ValueError(f"{name}: expected shape {one}, got {tuple(native.shape)}")
    return native


def check_topk(topk: Any) -> tuple[Array, Array | None]:
    """Return ids and weights of given routing; the packed words and None for a PackedTopK."""
    if isinstance(topk, PackedTopK):
        packed = as_native(topk.packed, "topk.packed", ("int32",), ndim=2)
        _check_top_k("topk.packed", packed.shape[1])
        return packed, None
    check_type("topk", topk, TopK, "a TopK or PackedTopK")
    ids = as_native(topk.ids, "topk.ids", ("int32",), ndim=2)
    _check_top_k("topk.ids", ids.shape[1])
    weights = as_native(topk.weights, "topk.weights", ("float32", "bfloat16"), shape=ids.shape)
    return ids, weights


def _check_top_k(name: str, top_k: int) -> None:
    if not 1 <= top_k <= MAX_TOP_K + MAX_SHARED_EXPERTS:
        raise ValueError(
            f"{name}: expected 1 to {MAX_TOP_K} columns (and {MAX_SHARED_EXPERTS} shared), "
            f"got {top_k}"
        )


def check_permutation(permutation: Any) -> Permutation:
    """Return a permutation after checking that its arrays fit together and lie in one place."""
    check_type("permutation", permutation, Permutation, "a Permutation")
    tile = check_int("permutation.tile", permutation.tile, 1)
    arrays: dict[str, Array] = {}

    def check(name: str, *shape: int | None) -> int:
        x = as_native(getattr(permutation, name), f"permutation.{name}", ("int32",), shape=shape)
        arrays[name] = x
        return int(x.shape[0])

    num_local = check("tokens_per_expert", None)
    check("expert_offsets", num_local + 1)
    check("permuted_idx", None, None)
    num_tiles = check("tile_expert", None)
    check("token_idx", num_tiles * tile)
    check("tile_row_end", num_tiles)
    check("num_tiles", 1)
    same_place({f"permutation.{name}": x for name, x in arrays.items()})
    return Permutation(**arrays, tile=tile)


def check_activation(activation: Any, num_local_experts: int | None = None) -> Activation:
    """Return an activation, with a number of experts one whose parameters are checked arrays."""
    if activation is None:
        return Activation()
    check_type("activation", activation, Activation, "an Activation or None")
    native = {}
    for field in PARAMETERS if num_local_experts is not None else ():
        value = getattr(activation, field)
        if value is not None and hasattr(value, "shape"):
            value = as_native(
                value, f"activation.{field}", ("float32",), shape=(num_local_experts,)
            )
        native[field] = value
    return replace(activation, **native)


def activation_arrays(activation: Activation) -> dict[str, Array | None]:
    """Return the per-expert arrays of an activation by argument name."""
    fields = {f"activation.{f}": getattr(activation, f) for f in PARAMETERS}
    return {name: x if hasattr(x, "shape") else None for name, x in fields.items()}


def check_out(
    out: Any,
    name: str,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...],
    inputs: dict[str, Array | None],
    *,
    contiguous: bool = True,
) -> Array:
    """Return a caller's output array as native memory, checked against the inputs."""
    native = as_native(out, name, dtypes, shape=shape, contiguous=contiguous, writable=True)
    like = next(x for x in inputs.values() if x is not None)
    if place_of(native) != place_of(like):
        raise ValueError(
            f"{name}: expected an array on {place_of(like)} like the inputs, got one on "
            f"{place_of(native)}"
        )
    if native.size > 1 and any(
        s == 0 and n > 1 for n, s in zip(native.shape, native.strides, strict=True)
    ):
        raise ValueError(f"{name}: expected strides above 0, got {native.strides} (bytes)")
    check_no_overlap(name, native, inputs)
    return native


def check_quantized_out(
    out: Any,
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    inputs: dict[str, Array | None],
    *,
    block: tuple[int | None, int | None] = (1, 128),
) -> Quantized:
    """Return a caller's fp8 output as native memory; only scales of activations may be strided."""
    check_type("out", out, Quantized, "a Quantized for float8_e4m3fn")
    if out.block != block:
        raise ValueError(f"out.block: expected {block}, got {out.block}")
    strided = block == (1, 128)
    values = check_out(out.values, "out.values", (FP8,), shape, inputs)
    scale = check_out(
        out.scale, "out.scale", ("float32",), scale_shape, inputs, contiguous=not strided
    )
    check_no_overlap("out.scale", scale, {"out.values": values})
    return Quantized(values, scale, block=block)


def check_static_out(
    out: Any, shape: tuple[int, int], num_experts: int, inputs: dict[str, Array | None]
) -> tuple[Array, Array]:
    """Return payload and scale of a caller's fp8 output whose scale is given."""
    if out is None:
        raise ValueError(
            "out: expected a Quantized with a static scale, block (None, None), for fp8 of an x "
            "with one scale, got None"
        )
    check_type("out", out, Quantized, "a Quantized for float8_e4m3fn")
    if out.block != (None, None):
        raise ValueError(f"out.block: expected (None, None), got {out.block}")
    scale = check_scales(out.scale, "out.scale", num_experts)
    values = check_out(out.values, "out.values", (FP8,), shape, inputs | {"out.scale": scale})
    same_place({"out.values": values, "out.scale": scale})
    return values, scale


def activation_outputs(
    like: Array,
    out: Any,
    out_dtype: str,
    shape: tuple[int, int],
    inputs: dict[str, Array | None],
) -> tuple[Array, Array | None]:
    """Return payload and scale of a result: the caller's, checked, or new beside `like`."""
    scale_shape = (shape[0], -(-shape[1] // 128))
    if out_dtype == FP8:
        if out is None:
            return empty(like, shape, FP8), empty(like, scale_shape, "float32")
        native = check_quantized_out(out, shape, scale_shape, inputs)
        return native.values, native.scale
    if out is None:
        return empty(like, shape, out_dtype), None
    return check_out(out, "out", (out_dtype,), shape, inputs), None


def check_aligned(arrays: dict[str, Array | None]) -> None:
    """Raise if a device array that kernels access 16 bytes at a time is not aligned to them."""
    for name, x in arrays.items():
        if x is not None and is_device(x) and x.size and x.data.ptr % 16:
            raise ValueError(
                f"{name}: expected a 16-byte aligned address, got {x.data.ptr:#x}; copy the slice"
            )
