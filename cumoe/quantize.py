"""Quantisation of activations and weights, each format a function.

================================ =============================================== ===============
function                         a scale for                                     returns
================================ =============================================== ===============
``quantize_fp8_block``           each row and 128 columns                        Quantized
``quantize_fp8_block_weights``   each expert's 128 x 128 block                   Quantized
``quantize_fp8_token``           each row                                        Quantized
``quantize_fp8_tensor``          the tensor, its own or a given one              Quantized
``quantize_fp8_ue8m0``           each row and group of columns: a power of two   QuantizedUE8M0
``quantize_nvfp4``               each row and 16 columns, and one for all        QuantizedNVFP4
================================ =============================================== ===============

All round to nearest even and saturate, with the same bits on NumPy and on a GPU.
:func:`cumoe.dequantize` takes them all back.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cumoe import kernels, kernels_quantize
from cumoe.arrays import (
    FP8,
    address,
    as_native,
    empty,
    is_device,
    same_place,
)
from cumoe.config import Array, Quantized, check_choice, check_finite, check_int
from cumoe.launch import get_device
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
from cumoe.reference import microscaling as reference_microscaling
from cumoe.reference import quantize as reference
from cumoe.validate import (
    FLOATS,
    check_aligned,
    check_multiple,
    check_out,
    check_quantized_out,
    check_type,
)


def quantize_fp8_block(x: Any, *, out: Quantized | None = None) -> Quantized:
    """Quantise activations to float8_e4m3fn with one scale per row and 128 columns.

    Parameters
    ----------
    x : array, bfloat16, float16 or float32, shape (num_tokens, hidden_size), C-contiguous
        ``hidden_size`` is a multiple of 8; the last block may be partial.
    out : Quantized, optional
        Values float8_e4m3fn (uint8 on a device) of x's shape; scale float32 of shape
        ``(num_tokens, ceil(hidden_size / 128))`` with any positive strides.

    Returns
    -------
    Quantized
        ``block`` is (1, 128).

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place.

    Notes
    -----
    NaN does not enter ``amax`` and becomes the byte 0x7f; an infinity makes its block's scale
    infinite and leaves every other block alone. A block of zeros gets the smallest normal scale.
    Queued on the current stream.

    Examples
    --------
    >>> import numpy as np
    >>> q = quantize_fp8_block(np.full((1, 128), 896.0, np.float32))
    >>> float(q.scale[0, 0]), float(q.values[0, 0])
    (2.0, 448.0)
    """
    x = _activations(x)
    scale_shape = (x.shape[0], kernels.blocks(x.shape[1]))
    native = _outputs(x, out, scale_shape, (1, 128))
    if is_device(x):
        if x.size:
            kernels.run([kernels_quantize.quantize_fp8_block(x, native.values, native.scale)], x)
    else:
        result = reference.quantize_fp8_block(x)
        native.values[...], native.scale[...] = result.values, result.scale
    return native if out is None else out


def quantize_fp8_block_weights(w: Any, *, out: Quantized | None = None) -> Quantized:
    """Quantise expert matrices to float8_e4m3fn with one scale per 128 x 128 block.

    Parameters
    ----------
    w : array, bfloat16, float16 or float32, shape (num_experts, n, k), C-contiguous
        ``k`` is a multiple of 8; the last blocks of rows and columns may be partial.
    out : Quantized, optional
        Values of w's shape; scale float32 ``(num_experts, ceil(n / 128), ceil(k / 128))``,
        C-contiguous.

    Returns
    -------
    Quantized
        ``block`` is (128, 128).

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place.

    Notes
    -----
    Arithmetic as in :func:`quantize_fp8_block`. Queued on the current stream.
    """
    w = as_native(w, "w", FLOATS, ndim=3)
    num_experts, n, k = w.shape
    check_multiple("w", "k", k, 8)
    native = _outputs(w, out, (num_experts, kernels.blocks(n), kernels.blocks(k)), (128, 128))
    if is_device(w):
        if w.size:
            kernels.run([kernels_quantize.quantize_fp8_weights(w, native.values, native.scale)], w)
    else:
        result = reference.quantize_fp8_block_weights(w)
        native.values[...], native.scale[...] = result.values, result.scale
    return native if out is None else out


def quantize_fp8_token(x: Any, *, out: Quantized | None = None) -> Quantized:
    """Quantise activations to float8_e4m3fn with one scale per row.

    ``scale = max(amax / 448, 2**-9 / 448)`` and ``values = e4m3(x / scale)``.

    Parameters
    ----------
    x : array, bfloat16, float16 or float32, shape (num_tokens, hidden_size), C-contiguous
        ``hidden_size`` is a multiple of 8.
    out : Quantized, optional
        Values of x's shape; scale float32 ``(num_tokens, 1)``, C-contiguous.

    Returns
    -------
    Quantized
        ``block`` is (1, None).

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place.

    Notes
    -----
    NaN and infinity as in :func:`quantize_fp8_block`. Queued on the current stream.

    Examples
    --------
    >>> import numpy as np
    >>> q = quantize_fp8_token(np.full((1, 256), 896.0, np.float32))
    >>> float(q.scale[0, 0]), float(q.values[0, 0])
    (2.0, 448.0)
    """
    x = _activations(x)
    native = _outputs(x, out, (x.shape[0], 1), (1, None))
    if is_device(x):
        if x.size:
            kernels.run([kernels_quantize.quantize_fp8_token(x, native.values, native.scale)], x)
    else:
        result = reference.quantize_fp8_token(x)
        native.values[...], native.scale[...] = result.values, result.scale
    return native if out is None else out


def quantize_fp8_tensor(x: Any, *, scale: Any = None, out: Quantized | None = None) -> Quantized:
    """Quantise activations to float8_e4m3fn with one scale for all.

    ``values = e4m3(x / scale)``, by default with ``scale = max(amax / 448, 1.17549435e-38)``.

    Parameters
    ----------
    x : array, bfloat16, float16 or float32, shape (num_tokens, hidden_size), C-contiguous
        ``hidden_size`` is a multiple of 8.
    scale : float or array, float32, shape (1,), optional
        A positive scale. The result holds an array given here, not a copy.
    out : Quantized, optional
        Values of x's shape; scale float32 ``(1,)``, which is the array given as `scale`, if any.

    Returns
    -------
    Quantized
        ``block`` is (None, None).

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place, or a float is not
        positive.

    Notes
    -----
    Without `scale` x is read twice, by two kernels. NaN and infinity as in
    :func:`quantize_fp8_block`. Queued on the current stream.

    Examples
    --------
    >>> import numpy as np
    >>> q = quantize_fp8_tensor(np.full((2, 8), 3.0, np.float32), scale=0.5)
    >>> float(q.scale[0]), float(q.values[0, 0])
    (0.5, 6.0)
    """
    x = _activations(x)
    given = None if scale is None else _given_scale("scale", scale, x)
    native = _outputs(x, out, (1,), (None, None), given=given)
    own = native.scale if given is not None else None
    if is_device(x):
        if x.size:
            partials = _partials(x) if own is None else None
            launches = [] if partials is None else [kernels_quantize.tensor_amax(x, partials)]
            launches.append(
                kernels_quantize.quantize_fp8_tensor(x, native.values, native.scale, partials)
            )
            kernels.run(launches, x)
    else:
        result = reference.quantize_fp8_tensor(x, own)
        native.values[...], native.scale[...] = result.values, result.scale
    return native if out is None else out


def quantize_fp8_ue8m0(
    x: Any, *, group_size: int = 32, out: QuantizedUE8M0 | None = None
) -> QuantizedUE8M0:
    """Quantise activations to float8_e4m3fn with a power of two per row and group of columns.

    ``scale`` is the power of two at or above ``max(amax / 448, 1e-10)`` and
    ``values = e4m3(x / scale)``.

    Parameters
    ----------
    x : array, bfloat16, float16 or float32, shape (num_tokens, hidden_size), C-contiguous
        ``hidden_size`` is a multiple of `group_size`.
    group_size : {32, 16, 64, 128}
    out : QuantizedUE8M0, optional
        Arrays as there described; the scale's column-major strides are required.

    Returns
    -------
    QuantizedUE8M0

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place.

    Notes
    -----
    NaN does not enter ``amax`` and becomes the byte 0x7f. The scale of a group with an infinity is
    the byte 255, UE8M0's NaN. Queued on the current stream.

    Examples
    --------
    >>> import numpy as np
    >>> q = quantize_fp8_ue8m0(np.full((1, 32), 3.7, np.float32))
    >>> int(q.scale[0, 0]), float(q.values[0, 0])
    (121, 240.0)
    """
    group_size = check_int("group_size", group_size, 1)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected one of {list(GROUP_SIZES)}, got {group_size}")
    x = _activations(x, group_size)
    num_words, stride = ue8m0_words(x.shape, group_size)
    if out is None:
        # Whole columns, so that the words between two of them are there.
        words = empty(x, (num_words, stride), "int32")
        native = QuantizedUE8M0(empty(x, x.shape, FP8), words[:, : x.shape[0]].T, group_size)
    else:
        native = _ue8m0_out(x, out, group_size)
    check_aligned({"x": x, "out.values": native.values})
    if is_device(x):
        if x.size:
            launch = kernels_quantize.quantize_fp8_ue8m0(x, native.values, native.scale, group_size)
            kernels.run([launch], x)
    else:
        result = reference_microscaling.quantize_fp8_ue8m0(x, group_size)
        native.values[...] = result.values
        _whole_columns(native.scale, stride)[...] = _whole_columns(result.scale, stride)
    return native if out is None else out


def quantize_nvfp4(
    x: Any,
    *,
    global_scale: Any = None,
    layout: ScaleLayout = "linear",
    out: QuantizedNVFP4 | None = None,
) -> QuantizedNVFP4:
    """Quantise activations to e2m1 with an fp8 scale per row and 16 columns.

    ``scale = e4m3(global_scale * (amax * (1 / 6)))`` over each group, and
    ``values = e2m1(x * (global_scale / scale))``, zeros where the scale is 0.

    Parameters
    ----------
    x : array, bfloat16, float16 or float32, shape (num_tokens, hidden_size), C-contiguous
        ``hidden_size`` is a multiple of 16.
    global_scale : float or array, float32, shape (1,), optional
        Positive; by default ``2688 / amax`` of the whole tensor. The result holds an array given
        here, not a copy.
    layout : {"linear", "swizzled_128x4"}
        Order of the scales, see :class:`QuantizedNVFP4`.
    out : QuantizedNVFP4, optional
        Arrays as there described, of the same layout; its global scale is the array given as
        `global_scale`, if any.

    Returns
    -------
    QuantizedNVFP4

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place, or a float is not
        positive.

    Notes
    -----
    NaN does not enter ``amax`` and becomes 6; infinities become 6 with their sign. Without `global_scale`
    x is read twice, by two kernels. The conversion is the same arithmetic on every GPU, as no GPU
    before Blackwell has the instruction. Queued on the current stream.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(16, dtype=np.float32).reshape(1, 16)
    >>> q = quantize_nvfp4(x, global_scale=1.0)
    >>> float(q.scale[0, 0]), hex(q.values[0, 7])
    (2.5, '0x77')
    """
    check_choice("layout", layout, SCALE_LAYOUTS)
    x = _activations(x, FP4_GROUP)
    given = None if global_scale is None else _given_scale("global_scale", global_scale, x)
    native = _fp4_outputs(x, out, layout, given)
    own = native.global_scale if given is not None else None
    if is_device(x):
        if x.size:
            partials = _partials(x) if own is None else None
            launches = [] if partials is None else [kernels_quantize.tensor_amax(x, partials)]
            launches.append(kernels_quantize.quantize_nvfp4(x, *native[:3], partials, layout))
            kernels.run(launches, x)
    else:
        result = reference_microscaling.quantize_nvfp4(x, own, layout)
        native.values[...], native.scale[...] = result.values, result.scale
        native.global_scale[...] = result.global_scale
    return native if out is None else out


def _activations(x: Any, multiple: int = 8) -> Array:
    """Return activations as a native array that kernels can read."""
    x = as_native(x, "x", FLOATS, ndim=2)
    if multiple > 8 and x.shape[1] % multiple:
        raise ValueError(
            f"x: expected hidden_size to be a multiple of {multiple}, the columns that share a "
            f"scale, got {x.shape[1]}; pad it with zeros"
        )
    check_multiple("x", "hidden_size", x.shape[1], 8)
    return x


def _given_scale(name: str, scale: Any, x: Array) -> Array | float:
    """Return a scale that the caller chose: a positive float, or an array beside x."""
    if not hasattr(scale, "shape") or isinstance(scale, np.floating):
        value = check_finite(name, scale)
        if value <= 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
        return value
    array = as_native(scale, name, ("float32",))
    if array.size != 1:
        raise ValueError(f"{name}: expected shape (1,), got {tuple(array.shape)}")
    same_place({"x": x, name: array})
    return array.reshape(1)


def _settle_scale(
    name: str, x: Array, out: Array | None, given: Array | float | None, out_name: str
) -> Array:
    """Return the array of a tensor's scale: the given one, the output's, or a new one."""
    if given is None or isinstance(given, float):
        scale = empty(x, (1,), "float32") if out is None else out
        if given is not None:
            scale.fill(given)
        return scale
    if out is not None and address(out) != address(given):
        raise ValueError(f"{out_name}: expected the array given as {name}, got another one")
    return given


def _partials(x: Array) -> Array:
    """Allocate what tensor_amax writes: a part for each of its blocks."""
    blocks_of_device = kernels_quantize.AMAX_BLOCKS_PER_SM * get_device(x.device.id).num_sms
    return empty(x, (blocks_of_device,), "float32")


def _outputs(
    x: Array,
    out: Quantized | None,
    scale_shape: tuple[int, ...],
    block: tuple[int | None, int | None],
    given: Array | float | None = None,
) -> Quantized:
    """Allocate the result beside `x`, or check the caller's."""
    if out is None:
        values = empty(x, x.shape, FP8)
        check_aligned({"x": x})
        if given is not None:
            return Quantized(values, _settle_scale("scale", x, None, given, ""), block=block)
        return Quantized(values, empty(x, scale_shape, "float32"), block=block)
    native = check_quantized_out(out, x.shape, scale_shape, {"x": x}, block=block)
    check_aligned({"x": x, "out.values": native.values})
    _settle_scale("scale", x, native.scale, given, "out.scale")
    return native


def _ue8m0_out(x: Array, out: Any, group_size: int) -> QuantizedUE8M0:
    """Check the caller's output."""
    check_type("out", out, QuantizedUE8M0, "a QuantizedUE8M0")
    if out.group_size != group_size:
        raise ValueError(f"out.group_size: expected {group_size}, got {out.group_size}")
    num_words, stride = ue8m0_words(x.shape, group_size)
    values = check_out(out.values, "out.values", (FP8,), x.shape, {"x": x})
    inputs: dict[str, Array | None] = {"x": x, "out.values": values}
    shape = (x.shape[0], num_words)
    scale = check_out(out.scale, "out.scale", ("int32",), shape, inputs, contiguous=False)
    wanted = (4, 4 * stride)
    got = tuple(w if n == 1 else s for n, s, w in zip(shape, scale.strides, wanted, strict=True))
    if scale.size and got != wanted:
        raise ValueError(f"out.scale: expected strides {wanted} (bytes), got {scale.strides}")
    return QuantizedUE8M0(values, scale, group_size)


def _whole_columns(words: Array, stride: int) -> Array:
    """View the words of UE8M0 scales with those between two columns, all but the last ones."""
    num_rows, num_words = words.shape
    length = (num_words - 1) * stride + num_rows if words.size else 0
    return np.lib.stride_tricks.as_strided(words, (length,), (4,))


def _fp4_outputs(
    x: Array, out: Any, layout: ScaleLayout, given: Array | float | None
) -> QuantizedNVFP4:
    """Allocate the result beside `x`, or check the caller's."""
    shape = (x.shape[0], x.shape[1] // 2)
    scale_shape = fp4_scale_shape(x.shape, layout)
    name = "global_scale"
    if out is None:
        values, scale = empty(x, shape, "uint8"), empty(x, scale_shape, FP8)
        check_aligned({"x": x})
        return QuantizedNVFP4(values, scale, _settle_scale(name, x, None, given, ""), layout)
    check_type("out", out, QuantizedNVFP4, "a QuantizedNVFP4")
    if out.layout != layout:
        raise ValueError(f"out.layout: expected {layout!r}, got {out.layout!r}")
    inputs: dict[str, Array | None] = {"x": x}
    values = check_out(out.values, "out.values", ("uint8",), shape, inputs)
    inputs["out.values"] = values
    scale = check_out(out.scale, "out.scale", (FP8,), scale_shape, inputs)
    inputs["out.scale"] = scale
    total = check_out(out.global_scale, "out.global_scale", ("float32",), (1,), inputs)
    check_aligned({"x": x, "out.values": values})
    _settle_scale(name, x, total, given, "out.global_scale")
    return QuantizedNVFP4(values, scale, total, layout)
