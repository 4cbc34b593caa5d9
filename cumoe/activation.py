"""The activation on its own, with and without requantisation to fp8."""

from __future__ import annotations

from typing import Any

from cumoe import kernels, kernels_activation
from cumoe.arrays import DTYPES, FP8, as_native, is_device, same_place
from cumoe.config import Activation, Array, Permutation, Quantized, check_choice
from cumoe.custom_activation import check_twin
from cumoe.launch import get_device
from cumoe.layouts import GATE_UP_ORDERS
from cumoe.reference import activation as reference
from cumoe.validate import (
    FLOATS,
    activation_arrays,
    activation_outputs,
    check_activation,
    check_aligned,
    check_multiple,
    check_permutation,
)


def activate(
    x: Any,
    *,
    gate_up_order: str | None = None,
    activation: Activation | None = None,
    permutation: Permutation | None = None,
    out_dtype: str = "bfloat16",
    out: Any = None,
) -> Array | Quantized:
    """Apply an activation to rows of gate and up values, or of values without a gate.

    By default ``y = gate / (1 + exp(-gate)) * up``; see :class:`Activation`.

    Parameters
    ----------
    x : array, bfloat16, float16 or float32, shape (num_rows, 2 * intermediate_size), or Quantized
        C-contiguous; ``intermediate_size`` columns for an activation without a gate. The size is a
        multiple of 8, of 16 if x or the result is fp8, and a row less than 4 GiB. A Quantized x has
        one scale per row and 128 columns of each half: ``scale`` is ``(num_rows, 2 *
        ceil(intermediate_size / 128))``.
    gate_up_order : {"gate_up", "up_gate", "gate_up_interleaved", "up_gate_interleaved"}
        Which columns are gate and which up; not interleaved for a Quantized x. None, and only then,
        for an activation without a gate.
    activation : Activation, optional
        By default plain SwiGLU.
    permutation : Permutation, optional
        Skips padding, the rows at which no slot points, and gives each row its expert's parameters;
        without it every row counts and parameters are single values.
    out_dtype : {"bfloat16", "float16", "float32", "float8_e4m3fn"}
        ``"float8_e4m3fn"`` requantises with one scale per row and 128 columns.
    out : array or Quantized, optional
        Shape ``(num_rows, intermediate_size)``.

    Returns
    -------
    array or Quantized
        Padding rows are undefined.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place.

    Notes
    -----
    float32 arithmetic, one rounding at the end. Bitwise repeatable. Queued on the current stream;
    the first use of a user's activation on a device waits for a comparison with its twin.

    References
    ----------
    N. Shazeer, "GLU Variants Improve Transformer", section 2.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.zeros((1, 16), np.float32)
    >>> x[:, :8], x[:, 8:] = 20.0, 3.0
    >>> float(activate(x, gate_up_order="gate_up", out_dtype="float32")[0, 0])
    60.0
    >>> float(activate(x, activation=Activation("relu2"), out_dtype="float32")[0, 15])
    9.0
    """
    check_choice("out_dtype", out_dtype, (*FLOATS, FP8))
    act = check_activation(activation)
    if act.gated:
        check_choice("gate_up_order", gate_up_order, GATE_UP_ORDERS)
    elif gate_up_order is not None:
        raise ValueError(
            f"gate_up_order: expected None, since {act.name!r} has no gate, got {gate_up_order!r}"
        )
    x, x_scale = _check_input(x, gate_up_order, out_dtype)
    num_rows, intermediate_size = x.shape[0], x.shape[1] // (2 if act.gated else 1)
    num_local = 0
    if permutation is not None:
        permutation = check_permutation(permutation)
        num_local = permutation.tokens_per_expert.shape[0]
        if permutation.max_rows != num_rows:
            raise ValueError(
                f"permutation: expected {num_rows} rows like x, got {permutation.max_rows}"
            )
    act = check_activation(activation, num_local)
    if permutation is None and any(v is not None for v in activation_arrays(act).values()):
        raise ValueError("activation: per-expert parameters need a permutation, got None")
    inputs: dict[str, Array | None] = {
        "x": x,
        "x.scale": x_scale,
        "permutation": None if permutation is None else permutation.token_idx,
        **activation_arrays(act),
    }
    same_place(inputs)
    y, y_scale = activation_outputs(x, out, out_dtype, (num_rows, intermediate_size), inputs)
    check_aligned({"x": x, "out": y})
    if is_device(x):
        if y.size:
            check_twin(act, x)
            item = kernels_activation.activation(
                x,
                x_scale,
                y,
                y_scale,
                gate_up_order=gate_up_order,
                activation=act,
                permutation=permutation,
                num_sms=get_device(int(x.device.id)).num_sms,
            )
            kernels.run([item], x)
    else:
        result = reference.activate(
            x,
            x_scale,
            gate_up_order=gate_up_order,
            activation=act,
            permutation=permutation,
            out_dtype=out_dtype,
        )
        if isinstance(result, Quantized):
            assert y_scale is not None
            y[...], y_scale[...] = result.values, result.scale
        else:
            y[...] = result
    if out is not None:
        return out
    return y if y_scale is None else Quantized(y, y_scale)


def _check_input(x: Any, order: str | None, out_dtype: str) -> tuple[Array, Array | None]:
    """Return payload and scale of the rows."""
    if isinstance(x, Quantized):
        values = as_native(x.values, "x.values", (FP8,), ndim=2)
    else:
        values = as_native(x, "x", FLOATS, ndim=2)
    num_rows, width = values.shape
    if num_rows >= 1 << 31:
        raise ValueError(f"x: expected fewer than {1 << 31} rows, got {num_rows}")
    sides = 1 if order is None else 2
    if width % sides or width == 0:
        columns = "2 * intermediate_size" if order else "intermediate_size"
        raise ValueError(f"x: expected {columns} columns, got {width}")
    fp8 = isinstance(x, Quantized) or out_dtype == FP8
    size = width // sides
    check_multiple("x", "intermediate_size", size, 16 if fp8 else 8)
    row_bytes = max(width * values.dtype.itemsize, size * DTYPES[out_dtype].itemsize)
    if row_bytes >= 1 << 32:
        raise ValueError(
            f"x: expected rows, and rows of the result, below {1 << 32} bytes, got {row_bytes}"
        )
    if not isinstance(x, Quantized):
        return values, None
    if order is not None and order.endswith("interleaved"):
        raise ValueError(
            f"gate_up_order: expected 'gate_up' or 'up_gate' for a Quantized x, got {order!r}"
        )
    shape = (num_rows, sides * kernels.blocks(width // sides))
    return values, as_native(x.scale, "x.scale", ("float32",), shape=shape, contiguous=False)
