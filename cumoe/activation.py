"""The gated activation on its own: SwiGLU, with and without requantisation to fp8."""

from __future__ import annotations

from typing import Any

from cumoe import kernels
from cumoe.arrays import FP8, as_native, is_device, same_place
from cumoe.config import Activation, Array, Permutation, Quantized, check_choice
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


def swiglu(
    x: Any,
    *,
    gate_up_order: str,
    activation: Activation | None = None,
    permutation: Permutation | None = None,
    out_dtype: str = "bfloat16",
    out: Any = None,
) -> Array | Quantized:
    """Apply ``y = g / (1 + exp(-alpha * g)) * (u + beta)`` to rows of gate and up values.

    ``g = min(gate, limit)`` and ``u = clip(up, -limit, limit)``; see :class:`Activation`.

    Parameters
    ----------
    x : array, bfloat16, float16 or float32, shape (num_rows, 2 * intermediate_size), or Quantized
        C-contiguous; ``intermediate_size`` is a multiple of 8. A Quantized x has one scale per row
        and 128 columns of each half: ``scale`` is ``(num_rows, 2 * ceil(intermediate_size /
        128))``.
    gate_up_order : {"gate_up", "up_gate", "gate_up_interleaved", "up_gate_interleaved"}
        Which columns are gate and which up; not interleaved for a Quantized x.
    activation : Activation, optional
        By default plain SwiGLU.
    permutation : Permutation, optional
        Skips padding rows and gives each row its expert's parameters; without it every row counts
        and parameters are single values.
    out_dtype : {"bfloat16", "float16", "float32", "float8_e4m3fn"}
        ``"float8_e4m3fn"`` requantises with one scale per row and 128 columns.
    out : array or Quantized, optional
        Shape ``(num_rows, intermediate_size)``.

    Returns
    -------
    array or Quantized
        Padding rows of a permutation are undefined.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place.

    Notes
    -----
    float32 arithmetic, one rounding at the end. Queued on the current stream.

    References
    ----------
    N. Shazeer, "GLU Variants Improve Transformer", section 2.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.zeros((1, 16), np.float32)
    >>> x[:, :8], x[:, 8:] = 20.0, 3.0
    >>> float(swiglu(x, gate_up_order="gate_up", out_dtype="float32")[0, 0])
    60.0
    """
    order = check_choice("gate_up_order", gate_up_order, GATE_UP_ORDERS)
    check_choice("out_dtype", out_dtype, (*FLOATS, FP8))
    x, x_scale = _check_input(x, order)
    num_rows, intermediate_size = x.shape[0], x.shape[1] // 2
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
            item = kernels.swiglu(
                x,
                x_scale,
                y,
                y_scale,
                gate_first=order.startswith("gate"),
                interleaved=order.endswith("interleaved"),
                activation=act,
                permutation=permutation,
            )
            kernels.run([item], x)
    else:
        result = reference.swiglu(
            x,
            x_scale,
            gate_up_order=order,
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


def _check_input(x: Any, order: str) -> tuple[Array, Array | None]:
    """Return payload and scale of the gate and up rows."""
    if isinstance(x, Quantized):
        values = as_native(x.values, "x.values", (FP8,), ndim=2)
    else:
        values = as_native(x, "x", FLOATS, ndim=2)
    if values.shape[1] % 2 or values.shape[1] == 0:
        raise ValueError(f"x: expected 2 * intermediate_size columns, got {values.shape[1]}")
    intermediate_size = values.shape[1] // 2
    check_multiple("x", "intermediate_size", intermediate_size, 8)
    if not isinstance(x, Quantized):
        return values, None
    if order.endswith("interleaved"):
        raise ValueError(
            f"gate_up_order: expected 'gate_up' or 'up_gate' for a Quantized x, got {order!r}"
        )
    shape = (values.shape[0], 2 * kernels.blocks(intermediate_size))
    return values, as_native(x.scale, "x.scale", ("float32",), shape=shape, contiguous=False)
