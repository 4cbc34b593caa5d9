"""The table of calls that must be refused: for each, what is changed in a call that is right.

``refusals(call, (error, message, changes), ...)``: a change is the wrong value of an argument, or a
function that makes it of the right value and the :class:`tests.test_bad_input.Arrays` of the
backend. The argument ``out__ids`` is the field ``ids`` of ``out``. The message is a regular
expression. Ops on activations and whole layers are in ``bad_input_layer_cases.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cumoe import ExpertShard, TopK

T, H, I, E, K, S = 6, 256, 128, 8, 2, 1  # noqa: E741
"""Tokens, hidden and intermediate size, experts, top-k and shared experts of the right calls."""

VALUE, TYPE = ValueError, TypeError
NUMPY_AND_CUPY, ONLY_NUMPY, ONLY_CUPY = "numpy cupy", "numpy", "cupy"
TWO_PLACES = "numpy cupy two"
"""Arrays of the host and of a device in one call, which needs a GPU from either side."""

PLACE = r"expected an array on (cuda:0|host)"


class Case(NamedTuple):
    """One refusal."""

    call: str
    changes: dict[str, Any]
    error: type[Exception]
    message: str
    where: str

    @property
    def name(self) -> str:
        """Name of the test: the call and the message's first words."""
        return f"{self.call}: {self.message.replace(chr(92), '')[:50]}"


def refusals(call: str, *rows: tuple[Any, ...]) -> list[Case]:
    """Make the cases of a call; a fourth item of a row names the backends."""
    return [
        Case(call, changes, error, message, where[0] if where else NUMPY_AND_CUPY)
        for error, message, changes, *where in rows
    ]


def zeros(*shape: int, dtype: str | None = None) -> Callable[..., Any]:
    """Make zeros of another shape, or dtype, or both."""
    return lambda x, new: new(shape or x.shape, dtype or x.dtype.name)


def of_dtype(dtype: str) -> Callable[..., Any]:
    """Make zeros of the same shape and another dtype."""
    return zeros(dtype=dtype)


def transposed(x: Any, new: Any) -> Any:
    """Make an array of the same shape in column-major order."""
    return new(x.shape[::-1], x.dtype.name).T


def every_other(x: Any, new: Any) -> Any:
    """Make an array of the same shape whose columns lie apart."""
    return new((*x.shape[:-1], 2 * x.shape[-1]), x.dtype.name)[..., ::2]


def reversed_columns(x: Any, new: Any) -> Any:
    """Make a view with a negative stride."""
    return new(x.shape, x.dtype.name)[..., ::-1]


def elsewhere(x: Any, new: Any) -> Any:
    """Make a copy in the other place, host or device."""
    return new.elsewhere(x)


def read_only(x: Any, new: Any) -> Any:
    """Make a view that must not be written."""
    view = x[...]
    view.flags.writeable = False
    return view


def as_list(x: Any, new: Any) -> Any:
    """Make a list, which is no array."""
    return x.tolist()


def misaligned(x: Any, new: Any) -> Any:
    """Make an array that starts one element past an aligned address."""
    return new((x.size + 1,), x.dtype.name)[1:].reshape(x.shape)


def one_stride(x: Any, new: Any) -> Any:
    """Make a writable array whose rows share their memory."""
    flat = new((x.shape[-1],), x.dtype.name)
    if isinstance(flat, np.ndarray):
        return np.lib.stride_tricks.as_strided(flat, x.shape, (0, flat.itemsize), writeable=True)
    return type(flat)(x.shape, flat.dtype, memptr=flat.data, strides=(0, flat.itemsize))


def of_other(name: str) -> Callable[..., Any]:
    """Make an output that lies in the memory of another argument."""
    return lambda x, new: new.within(name, x)


CASES: list[Case] = []

CASES += refusals(
    "Routing",
    (VALUE, r"method: expected one of .*top_k_sigmoid.*, got 'softmax'", dict(method="softmax")),
    (TYPE, "method: expected one of .*, got int", dict(method=3)),
    (VALUE, r"num_experts: expected in \[1, 2048\], got 0", dict(num_experts=0)),
    (VALUE, r"num_experts: expected in \[1, 2048\], got 2049", dict(num_experts=2049)),
    (TYPE, "num_experts: expected an int, got str", dict(num_experts="8")),
    (VALUE, r"top_k: expected in \[1, 32\], got 0", dict(top_k=0)),
    (VALUE, r"top_k: expected in \[1, 32\], got -1", dict(top_k=-1)),
    (VALUE, r"top_k: expected in \[1, 32\], got 33", dict(top_k=33, num_experts=64)),
    (VALUE, "top_k: expected at most num_experts = 8, got 9", dict(top_k=9)),
    (TYPE, "top_k: expected an int, got float", dict(top_k=2.0)),
    (TYPE, "top_k: expected an int, got bool", dict(top_k=True)),
    (VALUE, "top_k: expected 1 with method 'llama4', got 2",
     dict(method="llama4", num_groups=1, top_groups=1)),
    (VALUE, "num_groups: expected a divisor of num_experts = 8, got 3", dict(num_groups=3)),
    (VALUE, "num_groups: expected a divisor of num_experts = 8, got 16", dict(num_groups=16)),
    (VALUE, "num_groups: expected >= 1, got 0", dict(num_groups=0)),
    (VALUE, r"num_groups: expected 1 with method 'sigmoid' .*, got 4",
     dict(method="sigmoid")),
    (VALUE, "top_groups: expected at most num_groups = 4, got 5", dict(top_groups=5)),
    (VALUE, "top_groups: 2 groups of 2 experts leave 4 candidates, expected at least top_k = 5",
     dict(top_k=5)),
    (VALUE, "scaling_factor: expected a finite number, got nan", dict(scaling_factor=float("nan"))),
    (VALUE, "scaling_factor: expected a finite number, got -inf",
     dict(scaling_factor=float("-inf"))),
    (TYPE, "scaling_factor: expected a finite number, got str", dict(scaling_factor="2")),
    (VALUE, "normalize: expected None unless method is 'sigmoid_renorm', got True",
     dict(normalize=True)),
    (TYPE, "normalize: expected a bool or None, got str", dict(normalize="yes")),
    (VALUE, r"num_shared_experts: expected in \[0, 32\], got -1", dict(num_shared_experts=-1)),
    (VALUE, r"num_shared_experts: expected in \[0, 32\], got 33", dict(num_shared_experts=33)),
    (VALUE, "weights_dtype: expected one of .*, got 'float16'", dict(weights_dtype="float16")),
    (TYPE, "bias_round_bf16: expected a bool, got int", dict(bias_round_bf16=1)),
)  # fmt: skip

CASES += refusals(
    "ExpertShard",
    (VALUE, "expert_offset: expected >= 0, got -1", dict(expert_offset=-1)),
    (VALUE, r"num_local_experts: expected in \[0, 2048\], got -3", dict(num_local_experts=-3)),
    (TYPE, "num_local_experts: expected an int, got float", dict(num_local_experts=3.0)),
    (VALUE, "world_size: expected >= 1, got 0", dict(world_size=0)),
    (VALUE, r"rank: expected in \[0, 0\], got 1", dict(rank=1)),
    (VALUE, "shared_experts: expected one of .*, got 'some'", dict(shared_experts="some")),
)  # fmt: skip

CASES += refusals(
    "from_counts",
    (VALUE, r"rank: expected in \[0, 1\], got 2", dict(rank=2)),
    (VALUE, "counts: expected >= 0, got -1", dict(counts=[3, -1])),
)  # fmt: skip

CASES += refusals(
    "Activation",
    (VALUE, r"activation: expected one of \['swiglu', .*\], got 'gelu'", dict(name="gelu")),
    (VALUE, "activation.alpha: expected None, since 'geglu' takes no parameter",
     dict(name="geglu", alpha=1.0)),
    (VALUE, "activation.limit: expected None, since 'relu2' takes no parameter",
     dict(name="relu2", limit=1.0)),
    (VALUE, "activation.beta: expected a nonzero number, got 0", dict(name="situ", beta=0)),
    (VALUE, "activation.alpha: expected a finite number, got nan", dict(alpha=float("nan"))),
    (VALUE, "activation.beta: expected a finite number, got inf", dict(beta=float("inf"))),
    (VALUE, "activation.limit: expected a positive number, got 0", dict(limit=0.0)),
    (VALUE, "activation.limit: expected a positive number, got -7", dict(limit=-7)),
    (TYPE, "activation.limit: expected a finite number, got str", dict(limit="7")),
    (TYPE, "activation.alpha: expected a finite number, got list", dict(alpha=[1.0, 2.0])),
)  # fmt: skip

CASES += refusals(
    "Quantized",
    (VALUE, "Quantized.values: expected an array, got None", dict(values=None)),
    (VALUE, "Quantized.scale: expected an array, got None", dict(scale=None)),
    (VALUE, "dtype: expected one of .*, got 'float8_e5m2'", dict(dtype="float8_e5m2")),
    (VALUE, r"block: expected \(1, 128\) or \(128, 128\), got \(64, 128\)", dict(block=(64, 128))),
)  # fmt: skip

CASES += refusals(
    "ExpertWeights",
    (VALUE, "gate_up_order: expected one of .*, got None", dict(gate_up_order=None)),
    (VALUE, "gate_up_order: expected one of .*, got 'gate_first'",
     dict(gate_up_order="gate_first")),
    (VALUE, "layout: expected one of .*, got 'k_major'", dict(layout="k_major")),
    (VALUE, "recipe: expected one of .*, got 'int8'", dict(recipe="int8")),
    (VALUE, "dtype: expected 'float8_e4m3fn' with recipe 'fp8_block', got 'float8_e5m2'",
     dict(dtype="float8_e5m2")),
    (VALUE, "w13_scale: expected float32 block scales of an fp8 payload, got None",
     dict(w13_scale=None)),
    (VALUE, "w2_scale: expected float32 block scales of an fp8 payload, got None",
     dict(w2_scale=None)),
    (VALUE, "w13_scale: expected None with recipe 'bf16', got an array", dict(recipe="bf16")),
    (VALUE, r"w13_scale: expected shape \(9, 2, 2\), got \(9, 1, 2\)",
     dict(w13_scale=zeros(9, 1, 2))),
    (VALUE, r"w2_scale: expected shape \(9, 2, 1\), got \(8, 2, 1\)",
     dict(w2_scale=zeros(8, 2, 1))),
    (TYPE, "w2_scale: expected dtype float32, got float16", dict(w2_scale=of_dtype("float16"))),
    (TYPE, "w13: expected a NumPy or CuPy array .*, got list", dict(w13=as_list)),
    (TYPE, "w13: expected dtype float8_e4m3fn, got float32", dict(w13=of_dtype("float32"))),
    (VALUE, "w13: expected 3 dimensions, got 2", dict(w13=zeros(2 * I, H))),
    (VALUE, "w13: expected an even number of gate and up rows, got 255",
     dict(w13=zeros(9, 255, H))),
    (VALUE, r"w2: expected shape \(9, 256, 128\), got \(9, 256, 64\)", dict(w2=zeros(9, H, 64))),
    (VALUE, r"w2: expected shape \(9, 256, 128\), got \(8, 256, 128\)", dict(w2=zeros(8, H, I))),
    (VALUE, "w13: expected a C-contiguous array", dict(w13=every_other)),
    (VALUE, "hidden_size: expected a positive multiple of 16 .*, got 250",
     dict(w13=zeros(9, 2 * I, 250))),
    (VALUE, "w2: " + PLACE, dict(w2=elsewhere), TWO_PLACES),
    (VALUE, "w13: expected memory aligned to 16 bytes", dict(w13=misaligned), ONLY_CUPY),
)  # fmt: skip

CASES += refusals(
    "route",
    (TYPE, "logits: expected a NumPy or CuPy array .*, got list", dict(logits=as_list)),
    (TYPE, "logits: expected a NumPy or CuPy array .*, got NoneType", dict(logits=None)),
    (TYPE, "logits: expected dtype float32 or bfloat16, got float64",
     dict(logits=of_dtype("float64"))),
    (TYPE, "logits: expected dtype float32 or bfloat16, got int32", dict(logits=of_dtype("int32"))),
    (VALUE, r"logits: expected shape \(\*, 8\), got \(6, 9\)", dict(logits=zeros(T, 9))),
    (VALUE, r"logits: expected shape \(\*, 8\), got \(8,\)", dict(logits=zeros(E))),
    (VALUE, r"logits: expected shape \(\*, 8\), got \(1, 6, 8\)", dict(logits=zeros(1, T, E))),
    (VALUE, "logits: expected a C-contiguous array, got .* strides", dict(logits=transposed)),
    (VALUE, "logits: expected a C-contiguous array", dict(logits=every_other)),
    (VALUE, "logits: expected a C-contiguous array", dict(logits=reversed_columns)),
    (TYPE, "routing: expected a Routing, got dict", dict(routing={"method": "default"})),
    (TYPE, "routing: expected a Routing, got str", dict(routing="default")),
    (VALUE, r"bias: expected shape \(8,\), got \(7,\)", dict(bias=zeros(7))),
    (TYPE, "bias: expected dtype float32 or bfloat16, got float16", dict(bias=of_dtype("float16"))),
    (TYPE, "out: expected a TopK, got tuple", dict(out=lambda x, new: tuple(x))),
    (TYPE, "out.ids: expected dtype int32, got int64", dict(out__ids=of_dtype("int64"))),
    (VALUE, r"out.ids: expected shape \(6, 3\), got \(6, 2\)", dict(out__ids=zeros(T, K))),
    (TYPE, "out.weights: expected dtype float32, got bfloat16",
     dict(out__weights=of_dtype("bfloat16"))),
    (VALUE, "out.weights: expected a C-contiguous array", dict(out__weights=transposed)),
    (VALUE, "out.weights: expected memory of its own, got an overlap with logits",
     dict(out__weights=of_other("logits"))),
    (VALUE, "out.weights: expected a writable array, got a read-only one",
     dict(out__weights=read_only), ONLY_NUMPY),
    (VALUE, "out.weights: expected memory of its own, got an overlap with out.ids",
     dict(out=lambda x, new: TopK(x.ids, x.ids.view(np.float32)))),
    (TYPE, "replay_out: expected dtype int16, got int32", dict(replay_out=of_dtype("int32"))),
    (VALUE, "replay_out: expected at least 6 rows, got 5", dict(replay_out=zeros(T - 1, K))),
    (VALUE, r"replay_out: expected shape \(\*, 2\), got \(6, 3\)",
     dict(replay_out=zeros(T, K + S))),
    (VALUE, "replay_out: expected a writable array, got a read-only one",
     dict(replay_out=read_only), ONLY_NUMPY),
    (VALUE, "replay_out: expected memory of its own, got an overlap with out.ids",
     dict(replay_out=of_other("out.ids"))),
    (VALUE, "bias: " + PLACE, dict(bias=elsewhere), TWO_PLACES),
    (VALUE, "out.ids: " + PLACE, dict(out__ids=elsewhere), TWO_PLACES),
    (VALUE, "replay_out: " + PLACE, dict(replay_out=elsewhere), TWO_PLACES),
)  # fmt: skip

CASES += refusals(
    "pack",
    (TYPE, "topk: expected a TopK, got tuple", dict(topk=lambda x, new: tuple(x))),
    (TYPE, "topk.ids: expected dtype int32, got int64", dict(topk__ids=of_dtype("int64"))),
    (VALUE, "topk.ids: expected 2 dimensions, got 1", dict(topk__ids=zeros(T * K))),
    (TYPE, "topk.weights: expected dtype float32 or bfloat16, got float16",
     dict(topk__weights=of_dtype("float16"))),
    (VALUE, r"topk.weights: expected shape \(6, 2\), got \(6, 3\)",
     dict(topk__weights=zeros(T, 3))),
    (VALUE, "topk.weights: " + PLACE, dict(topk__weights=elsewhere), TWO_PLACES),
)  # fmt: skip

CASES += refusals(
    "unpack",
    (TYPE, "packed: expected a PackedTopK, got TopK",
     dict(packed=lambda x, new: TopK(x.packed, x.packed))),
    (TYPE, "topk.packed: expected dtype int32, got float32",
     dict(packed__packed=of_dtype("float32"))),
)  # fmt: skip

CASES += refusals(
    "group",
    (TYPE, "topk.ids: expected a NumPy or CuPy array .*, got list", dict(topk=as_list)),
    (TYPE, "topk.ids: expected dtype int32, got int64", dict(topk=of_dtype("int64"))),
    (VALUE, "topk.ids: expected 2 dimensions, got 1", dict(topk=zeros(T))),
    (VALUE, "topk.ids: expected at least one column, got shape", dict(topk=zeros(T, 0))),
    (VALUE, "topk.ids: expected a C-contiguous array", dict(topk=transposed)),
    (VALUE, r"num_experts: expected in \[1, 2048\], got 0", dict(num_experts=0)),
    (VALUE, r"num_shared_experts: expected in \[0, 32\], got -1", dict(num_shared_experts=-1)),
    (VALUE, r"tile: expected in \[1, 65536\], got 0", dict(tile=0)),
    (TYPE, "tile: expected an int, got float", dict(tile=16.0)),
    (TYPE, "shard: expected an ExpertShard or None, got tuple", dict(shard=(0, 4))),
    (VALUE, r"shard: expected experts below num_experts = 8, got expert_offset 6 and",
     dict(shard=ExpertShard(6, 3))),
)  # fmt: skip

CASES += refusals(
    "quantize",
    (TYPE, "x: expected dtype bfloat16 or float16 or float32, got float64",
     dict(x=of_dtype("float64"))),
    (VALUE, "x: expected 2 dimensions, got 3", dict(x=zeros(T, 1, H))),
    (VALUE, "x: expected hidden_size to be a multiple of 8 .*, got 252", dict(x=zeros(T, 252))),
    (VALUE, "x: expected a C-contiguous array", dict(x=every_other)),
    (VALUE, "x: expected a 16-byte aligned address, got .*; copy the slice",
     dict(x=misaligned), ONLY_CUPY),
    (TYPE, "out: expected a Quantized for float8_e4m3fn, got tuple",
     dict(out=lambda x, new: (x.values, x.scale))),
    (VALUE, r"out.block: expected \(1, 128\), got \(128, 128\)", dict(out__block=(128, 128))),
    (VALUE, r"out.values: expected shape \(6, 256\), got \(6, 128\)",
     dict(out__values=zeros(T, 128))),
    (TYPE, "out.values: expected dtype float8_e4m3fn, got bfloat16",
     dict(out__values=of_dtype("bfloat16"))),
    (VALUE, r"out.scale: expected shape \(6, 2\), got \(2, 6\)", dict(out__scale=zeros(2, T))),
    (TYPE, "out.scale: expected dtype float32, got float16", dict(out__scale=of_dtype("float16"))),
    (VALUE, "out.scale: expected strides above 0, got", dict(out__scale=one_stride)),
    (VALUE, "out.scale: expected non-negative strides, got", dict(out__scale=reversed_columns)),
    (VALUE, "out.scale: expected a writable array", dict(out__scale=read_only), ONLY_NUMPY),
    (VALUE, "out.values: expected memory of its own, got an overlap with x",
     dict(out__values=of_other("x"))),
    (VALUE, "out.scale: expected memory of its own, got an overlap with out.values",
     dict(out__scale=of_other("out.values"))),
    (VALUE, "out.scale: " + PLACE, dict(out__scale=elsewhere), TWO_PLACES),
)  # fmt: skip

CASES += refusals(
    "quantize_weights",
    (VALUE, "w: expected 3 dimensions, got 2", dict(w=zeros(I, H))),
    (VALUE, "w: expected k to be a multiple of 8 .*, got 4", dict(w=zeros(2, I, 4))),
    (VALUE, r"out.block: expected \(128, 128\), got \(1, 128\)", dict(out__block=(1, 128))),
    (VALUE, "out.scale: expected a C-contiguous array", dict(out__scale=every_other)),
)  # fmt: skip

CASES += refusals(
    "dequantize",
    (TYPE, "q: expected a Quantized, QuantizedUE8M0 or QuantizedNVFP4, got list", dict(q=[1.0])),
    (VALUE, r"q.scale: expected shape \(6, 2\), got \(6, 1\)", dict(q__scale=zeros(T, 1))),
    (TYPE, "q.values: expected dtype float8_e4m3fn, got float32",
     dict(q__values=of_dtype("float32"))),
    (VALUE, "q.scale: " + PLACE, dict(q__scale=elsewhere), TWO_PLACES),
)  # fmt: skip
