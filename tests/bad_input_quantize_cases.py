"""The table of refused calls for the other quantisers, as ``bad_input_cases.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cumoe
from cumoe import Quantized, QuantizedNVFP4, QuantizedUE8M0
from tests.bad_input_cases import (
    ONLY_CUPY,
    ONLY_NUMPY,
    PLACE,
    TWO_PLACES,
    TYPE,
    VALUE,
    Case,
    H,
    T,
    elsewhere,
    every_other,
    misaligned,
    of_dtype,
    of_other,
    read_only,
    refusals,
    zeros,
)
from tests.helpers import FP8

GROUP = 64


def _x(new: Any) -> Any:
    return new.random(T, H, dtype="bfloat16")


def _words(new: Any) -> Any:
    """Return a poisoned scale of UE8M0 groups: T words, and two more up to the next column."""
    flat = new.out(T, dtype="i4")
    return flat.reshape(1, T).T


CALLS: dict[str, tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]] = {
    "quantize_token": (
        cumoe.quantize_fp8_token,
        lambda new: {
            "x": _x(new),
            "out": Quantized(
                new.out(T, H, dtype=FP8.name), new.out(T, 1, dtype="float32"), block=(1, None)
            ),
        },
    ),
    "quantize_tensor": (
        cumoe.quantize_fp8_tensor,
        lambda new: {
            "x": _x(new),
            "out": Quantized(
                new.out(T, H, dtype=FP8.name), new.out(1, dtype="float32"), block=(None, None)
            ),
        },
    ),
    "quantize_ue8m0": (
        cumoe.quantize_fp8_ue8m0,
        lambda new: {
            "x": _x(new),
            "group_size": GROUP,
            "out": QuantizedUE8M0(new.out(T, H, dtype=FP8.name), _words(new), GROUP),
        },
    ),
    "quantize_nvfp4": (
        cumoe.quantize_nvfp4,
        lambda new: {
            "x": _x(new),
            "layout": "swizzled_128x4",
            "out": QuantizedNVFP4(
                new.out(T, H // 2, dtype="uint8"),
                new.out(128, H // 16, dtype=FP8.name),
                new.out(1, dtype="float32"),
                "swizzled_128x4",
            ),
        },
    ),
    "dequantize_ue8m0": (
        cumoe.dequantize,
        lambda new: {"q": cumoe.quantize_fp8_ue8m0(_x(new), group_size=GROUP)},
    ),
    "dequantize_nvfp4": (cumoe.dequantize, lambda new: {"q": cumoe.quantize_nvfp4(_x(new))}),
}

CASES: list[Case] = []

CASES += refusals(
    "quantize_token",
    (TYPE, "x: expected dtype bfloat16 or float16 or float32, got int32", dict(x=of_dtype("i4"))),
    (VALUE, "x: expected hidden_size to be a multiple of 8 .*, got 252", dict(x=zeros(T, 252))),
    (VALUE, "x: expected a 16-byte aligned address", dict(x=misaligned), ONLY_CUPY),
    (VALUE, r"out.block: expected \(1, None\), got \(1, 128\)", dict(out__block=(1, 128))),
    (VALUE, r"out.scale: expected shape \(6, 1\), got \(6, 2\)", dict(out__scale=zeros(T, 2))),
    (VALUE, "out.scale: expected a C-contiguous array",
     dict(out__scale=lambda x, new: new((2 * T, 1))[::2])),
)  # fmt: skip

CASES += refusals(
    "quantize_tensor",
    (VALUE, "x: expected 2 dimensions, got 1", dict(x=zeros(H))),
    (VALUE, "scale: expected a positive number, got 0", dict(scale=0.0)),
    (VALUE, "scale: expected a positive number, got -1", dict(scale=-1)),
    (VALUE, "scale: expected a finite number, got nan", dict(scale=float("nan"))),
    (TYPE, "scale: expected a finite number, got str", dict(scale="1")),
    (TYPE, "scale: expected dtype float32, got float16",
     dict(scale=lambda x, new: new((1,), "float16"))),
    (VALUE, r"scale: expected shape \(1,\), got \(6, 1\)",
     dict(scale=lambda x, new: new((T, 1)))),
    (VALUE, "out.scale: expected the array given as scale, got another one",
     dict(scale=lambda x, new: new((1,)))),
    (VALUE, "scale: " + PLACE, dict(scale=lambda x, new: new.elsewhere(new((1,))), out=None),
     TWO_PLACES),
    (VALUE, r"out.block: expected \(None, None\), got \(1, None\)", dict(out__block=(1, None))),
    (VALUE, r"out.scale: expected shape \(1,\), got \(6, 1\)", dict(out__scale=zeros(T, 1))),
)  # fmt: skip

CASES += refusals(
    "quantize_ue8m0",
    (VALUE, r"group_size: expected one of \[16, 32, 64, 128\], got 48", dict(group_size=48)),
    (TYPE, "group_size: expected an int, got float", dict(group_size=32.0)),
    (VALUE, "x: expected hidden_size to be a multiple of 64, the columns that share .*, got 32",
     dict(x=zeros(T, 32))),
    (TYPE, "out: expected a QuantizedUE8M0, got Quantized",
     dict(out=lambda x, new: Quantized(x.values, x.scale))),
    (VALUE, "out.group_size: expected 64, got 32", dict(out__group_size=32)),
    (VALUE, r"out.values: expected shape \(6, 256\), got \(6, 128\)",
     dict(out__values=zeros(T, 128))),
    (TYPE, "out.scale: expected dtype int32, got float32", dict(out__scale=of_dtype("float32"))),
    (VALUE, r"out.scale: expected shape \(6, 1\), got \(6, 2\)", dict(out__scale=zeros(T, 2))),
    (VALUE, r"out.scale: expected strides \(4, 32\) \(bytes\), got \(8, .*\)",
     dict(out__scale=lambda x, new: new((T, 2), "i4")[:, :1])),
    (VALUE, "out.scale: expected a writable array", dict(out__scale=read_only), ONLY_NUMPY),
    (VALUE, "out.values: expected memory of its own, got an overlap with x",
     dict(out__values=of_other("x"))),
    (VALUE, "out.scale: " + PLACE, dict(out__scale=elsewhere), TWO_PLACES),
)  # fmt: skip

CASES += refusals(
    "quantize_nvfp4",
    (VALUE, r"layout: expected one of \['linear', 'swizzled_128x4'\], got 'swizzled_8x4'",
     dict(layout="swizzled_8x4")),
    (VALUE, "x: expected hidden_size to be a multiple of 16, the columns that share .*, got 264",
     dict(x=zeros(T, 264))),
    (VALUE, "global_scale: expected a positive number, got 0", dict(global_scale=0)),
    (VALUE, "global_scale: expected a finite number, got inf", dict(global_scale=float("inf"))),
    (VALUE, r"global_scale: expected shape \(1,\), got \(2,\)",
     dict(global_scale=lambda x, new: new((2,)))),
    (VALUE, "out.global_scale: expected the array given as global_scale, got another one",
     dict(global_scale=lambda x, new: new((1,)))),
    (VALUE, "out.layout: expected 'swizzled_128x4', got 'linear'", dict(out__layout="linear")),
    (VALUE, r"out.values: expected shape \(6, 128\), got \(6, 256\)",
     dict(out__values=zeros(T, H))),
    (VALUE, r"out.scale: expected shape \(128, 16\), got \(6, 16\)",
     dict(out__scale=zeros(T, H // 16))),
    (TYPE, "out.scale: expected dtype float8_e4m3fn, got float32",
     dict(out__scale=of_dtype("float32"))),
    (VALUE, "out.scale: expected a C-contiguous array", dict(out__scale=every_other)),
    (VALUE, r"out.global_scale: expected shape \(1,\), got \(2,\)",
     dict(out__global_scale=zeros(2))),
    (TYPE, "out: expected a QuantizedNVFP4, got tuple", dict(out=lambda x, new: tuple(x))),
)  # fmt: skip

CASES += refusals(
    "dequantize_ue8m0",
    (VALUE, "q.group_size: expected a divisor of 256 columns, got 48", dict(q__group_size=48)),
    (VALUE, r"q.scale: expected shape \(6, 1\), got \(6, 2\)",
     dict(q__scale=lambda x, new: new((T, 2), "i4"))),
)  # fmt: skip

CASES += refusals(
    "dequantize_nvfp4",
    (VALUE, "q.layout: expected one of .*, got 'tiled'", dict(q__layout="tiled")),
    (VALUE, r"q.scale: expected shape \(128, 16\), got \(6, 16\)",
     dict(q__layout="swizzled_128x4")),
    (TYPE, "q.values: expected dtype uint8, got int32", dict(q__values=of_dtype("i4"))),
)  # fmt: skip
