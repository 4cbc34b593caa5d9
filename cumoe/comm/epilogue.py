"""What follows the sum of an all-reduce: its description, its checks and its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cumoe.arrays import FP8, as_native, empty
from cumoe.config import Array, Quantized, check_choice, check_finite
from cumoe.kernels import blocks
from cumoe.microscaling import (
    FP4_GROUP,
    GROUP_SIZES,
    SCALE_LAYOUTS,
    QuantizedNVFP4,
    QuantizedUE8M0,
    ScaleLayout,
    fp4_scale_shape,
    ue8m0_words,
)
from cumoe.validate import check_out, check_type

__all__ = ["Epilogue", "Quantization"]

OUTPUTS = ("sum", "residual", "norm", "quantized")
Format = Literal["fp8_block", "fp8_token", "fp8_tensor", "fp8_ue8m0", "nvfp4"]
FORMATS: tuple[str, ...] = get_args(Format)
SCALED = {"fp8_tensor": "scale", "nvfp4": "global scale"}
"""Formats with a scale for all of a tensor, which one pass cannot find."""

BLOCKS: dict[str, tuple[int | None, int | None]] = {
    "fp8_block": (1, 128),
    "fp8_token": (1, None),
    "fp8_tensor": (None, None),
}


@dataclass(frozen=True, eq=False)
class Quantization:
    """A format of the quantised output; values and scales are those of the op of its name.

    Parameters
    ----------
    format : {"fp8_block", "fp8_token", "fp8_tensor", "fp8_ue8m0", "nvfp4"}
        See :func:`cumoe.quantize_fp8_block` and its neighbours.
    scale : array, float32, shape (1,), optional
        Required by ``"fp8_tensor"`` (the scale) and ``"nvfp4"`` (the global scale), and only there.
    group_size : {32, 16, 64, 128}
        Columns of a scale of ``"fp8_ue8m0"``.
    layout : {"linear", "swizzled_128x4"}
        Of the scales of ``"nvfp4"``.

    Raises
    ------
    TypeError, ValueError
        If a choice is unknown, or a scale is missing or has no use.
    """

    format: Format
    scale: Any = None
    group_size: int = 32
    layout: ScaleLayout = "linear"

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)
        check_choice("layout", self.layout, SCALE_LAYOUTS)
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size: expected one of {list(GROUP_SIZES)}, got {self.group_size}"
            )
        whole = SCALED.get(self.format)
        if whole is not None and self.scale is None:
            raise ValueError(f"scale: expected the {whole} of {self.format}, got None")
        if whole is None and self.scale is not None:
            raise ValueError(f"scale: expected None for {self.format}, which makes its own scales")


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What follows the sum of the ranks.

    ``residual' = sum + residual``, ``norm = residual' / sqrt(mean(residual' ** 2) + eps) *
    (weight_offset + norm_weight)``, and `norm` quantised; each is left out if its argument is None.

    Parameters
    ----------
    residual : array, dtype of the summed rows, shape (num_tokens, hidden_size), optional
        The same on every rank.
    norm_weight : array, dtype of the summed rows, shape (hidden_size,), optional
    eps : float
    weight_offset : float
        1 for models that store ``weight - 1``.
    quantization : Quantization, optional
    """

    residual: Any = None
    norm_weight: Any = None
    eps: float = 1e-6
    weight_offset: float = 0.0
    quantization: Quantization | None = None


@dataclass(frozen=True, eq=False)
class CheckedEpilogue:
    """An epilogue over native arrays; `quantize` is the kernels' name of the format."""

    residual: Array | None
    norm_weight: Array | None
    eps: float
    weight_offset: float
    quantization: Quantization | None
    quantize: str | None
    quant_scale: Array | None
    group_size: int

    def arrays(self) -> dict[str, Array | None]:
        """Return the arrays by argument name."""
        return {
            "epilogue.residual": self.residual,
            "epilogue.norm_weight": self.norm_weight,
            "epilogue.quantization.scale": self.quant_scale,
        }


def check_epilogue(
    epilogue: Epilogue | None, dtype: str, shape: tuple[int, int]
) -> CheckedEpilogue:
    """Return an epilogue after checking it for rows of a dtype and shape."""
    e = Epilogue() if epilogue is None else epilogue
    check_type("epilogue", e, Epilogue, "an Epilogue or None")
    residual, weight, scale, name, group = e.residual, e.norm_weight, None, None, 0
    if residual is not None:
        residual = as_native(residual, "epilogue.residual", (dtype,), shape=shape)
    if weight is not None:
        weight = as_native(weight, "epilogue.norm_weight", (dtype,), shape=shape[1:])
    eps = check_finite("epilogue.eps", e.eps)
    if eps < 0:
        raise ValueError(f"epilogue.eps: expected at least 0, got {eps}")
    q = e.quantization
    if q is not None:
        check_type("epilogue.quantization", q, Quantization, "a Quantization or None")
        name = "nvfp4_swizzled" if (q.format, q.layout) == ("nvfp4", "swizzled_128x4") else q.format
        group = q.group_size if q.format == "fp8_ue8m0" else 0
        multiple = {"fp8_ue8m0": group, "nvfp4": FP4_GROUP}.get(q.format, 1)
        if shape[1] % multiple:
            raise ValueError(
                f"epilogue.quantization: expected hidden_size to be a multiple of {multiple}, the "
                f"columns that share a scale of {q.format}, got {shape[1]}"
            )
        if q.scale is not None:
            scale = as_native(q.scale, "epilogue.quantization.scale", ("float32",), shape=(1,))
    offset = check_finite("epilogue.weight_offset", e.weight_offset)
    return CheckedEpilogue(residual, weight, eps, offset, q, name, scale, group)


def select_outputs(
    after: CheckedEpilogue, outputs: Sequence[str] | None, out: Any
) -> tuple[str, ...]:
    """Return the outputs that are asked for, in order; at least one."""
    there = {
        "sum": True,
        "residual": after.residual is not None,
        "norm": after.norm_weight is not None,
        "quantized": after.quantize is not None,
    }
    computed = tuple(name for name in OUTPUTS if there[name])
    if out is not None:
        if outputs is not None:
            raise ValueError("outputs: expected None beside out, whose arrays say what is computed")
        if not all(hasattr(out, name) for name in OUTPUTS):
            raise TypeError(f"out: expected an AllReduced or None, got {type(out).__name__}")
        outputs = [name for name in OUTPUTS if getattr(out, name) is not None]
    if outputs is None:
        return computed[1:] or computed
    if isinstance(outputs, str):
        raise TypeError(f"outputs: expected a sequence of names, got the string {outputs!r}")
    for name in outputs:
        check_choice("outputs", name, OUTPUTS)
        if not there[name]:
            raise ValueError(f"outputs: expected some of {list(computed)}, got {name!r}")
    if not outputs:
        raise ValueError(f"outputs: expected at least one of {list(computed)}, got none")
    return tuple(name for name in OUTPUTS if name in outputs)


def output_arrays(
    like: Array,
    dtype: str,
    shape: tuple[int, int],
    after: CheckedEpilogue,
    wanted: tuple[str, ...],
    out: Any,
    inputs: dict[str, Array | None],
) -> list[Any]:
    """Return sum, residual, norm and quantised output: the caller's, checked, or new ones."""
    found: list[Any] = []
    seen = dict(inputs)
    for name in OUTPUTS[:3]:
        array = None
        if name in wanted and out is None:
            array = empty(like, shape, dtype)
        elif name in wanted:
            given = getattr(out, name)
            others = dict(seen)
            if name == "residual" and _same_array(given, after.residual):
                del others["epilogue.residual"]  # each element is read before it is written
            array = check_out(given, f"out.{name}", (dtype,), shape, others)
            seen[f"out.{name}"] = array
        found.append(array)
    if "quantized" not in wanted:
        return [*found, None]
    assert after.quantization is not None
    if out is None:
        return [*found, _new_quantized(like, shape, after)]
    return [*found, _check_quantized(out.quantized, shape, after, seen)]


def _same_array(given: Any, residual: Array | None) -> bool:
    return residual is not None and given is residual


def _new_quantized(like: Array, shape: tuple[int, int], after: CheckedEpilogue) -> Any:
    q = after.quantization
    assert q is not None
    if q.format == "nvfp4":
        values = empty(like, (shape[0], shape[1] // 2), "uint8")
        scale = empty(like, fp4_scale_shape(shape, q.layout), FP8)
        return QuantizedNVFP4(values, scale, after.quant_scale, q.layout)
    values = empty(like, shape, FP8)
    if q.format == "fp8_ue8m0":
        num_words, stride = ue8m0_words(shape, q.group_size)
        words = empty(like, (num_words, stride), "int32")
        return QuantizedUE8M0(values, words[:, : shape[0]].T, q.group_size)
    if q.format == "fp8_tensor":
        assert after.quant_scale is not None
        return Quantized(values, after.quant_scale, block=BLOCKS[q.format])
    columns = 1 if q.format == "fp8_token" else blocks(shape[1])
    return Quantized(values, empty(like, (shape[0], columns), "float32"), block=BLOCKS[q.format])


def _check_quantized(
    out: Any, shape: tuple[int, int], after: CheckedEpilogue, inputs: dict[str, Array | None]
) -> Any:
    """Return a caller's quantised output as native memory."""
    q, name = after.quantization, "out.quantized"
    assert q is not None
    kind = {"nvfp4": QuantizedNVFP4, "fp8_ue8m0": QuantizedUE8M0}.get(q.format, Quantized)
    check_type(name, out, kind, f"a {kind.__name__} for {q.format}")
    for field, want in (("block", BLOCKS.get(q.format)), ("layout", q.layout)):
        if want is not None and getattr(out, field, want) != want:
            raise ValueError(f"{name}.{field}: expected {want!r}, got {getattr(out, field)!r}")
    if getattr(out, "group_size", q.group_size) != q.group_size:
        raise ValueError(f"{name}.group_size: expected {q.group_size}, got {out.group_size}")
    values_dtype, values_shape = (FP8, shape)
    if q.format == "nvfp4":
        values_dtype, values_shape = "uint8", (shape[0], shape[1] // 2)
    values = check_out(out.values, f"{name}.values", (values_dtype,), values_shape, inputs)
    others = {**inputs, f"{name}.values": values}
    if q.format == "fp8_tensor":
        return Quantized(values, after.quant_scale, block=BLOCKS[q.format])
    if q.format == "nvfp4":
        scale_shape = fp4_scale_shape(shape, q.layout)
        scale = check_out(out.scale, f"{name}.scale", (FP8,), scale_shape, others)
        return QuantizedNVFP4(values, scale, after.quant_scale, q.layout)
    if q.format == "fp8_ue8m0":
        num_words, stride = ue8m0_words(shape, q.group_size)
        words = (shape[0], num_words)
        scale = check_out(out.scale, f"{name}.scale", ("int32",), words, others, contiguous=False)
        wanted = (4, 4 * stride)
        strides = zip(words, scale.strides, wanted, strict=True)
        if scale.size and any(n > 1 and s != w for n, s, w in strides):
            raise ValueError(
                f"{name}.scale: expected strides {wanted} (bytes), got {scale.strides}"
            )
        return QuantizedUE8M0(values, scale, q.group_size)
    columns = 1 if q.format == "fp8_token" else blocks(shape[1])
    scale = check_out(
        out.scale, f"{name}.scale", ("float32",), (shape[0], columns), others, contiguous=False
    )
    return Quantized(values, scale, block=BLOCKS[q.format])
