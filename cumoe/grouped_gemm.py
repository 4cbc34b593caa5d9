"""Grouped GEMM: every expert's rows times that expert's matrix, with the activation as an epilogue.

:func:`grouped_gemm` is the public op; :func:`plan_gemm` makes its launch for a layer that planned
its arrays. Rows of the left operand are read where they lie, through the permutation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cumoe import kernels, kernels_sm90
from cumoe.arrays import FP8, as_native, dtype_name, is_device, same_place
from cumoe.config import Activation, Array, Permutation, Quantized, check_choice
from cumoe.custom_activation import check_twin
from cumoe.launch import Device, KernelSpec, get_device
from cumoe.layouts import GATE_UP_ORDERS, WEIGHT_LAYOUTS, half_slices
from cumoe.reference import grouped_gemm as reference
from cumoe.reference.quantize import dequantize
from cumoe.tuning import (
    FP8_TENSOR,
    SM90_ARCH,
    GroupedGemmConfig,
    GroupedGemmProblem,
    Sm90Config,
    runs_sm90,
    select_gemm,
    why_illegal,
    why_illegal_sm90,
)
from cumoe.validate import (
    FLOATS,
    HALVES,
    activation_arrays,
    activation_outputs,
    check_activation,
    check_aligned,
    check_multiple,
    check_permutation,
    check_rows,
    check_static_out,
    check_type,
)


def grouped_gemm(
    x: Any,
    weight: Any,
    permutation: Permutation,
    *,
    gather: bool = True,
    gate_up_order: str | None = None,
    activation: Activation | None = None,
    layout: str = "major_k",
    out_dtype: str = "bfloat16",
    out: Any = None,
    config: GroupedGemmConfig | Sm90Config | None = None,
) -> Array | Quantized:
    """Multiply each expert's rows by that expert's matrix.

    ``y[i] = x[source(i)] @ weight[e(i)].T`` for the valid rows i of the permutation, where
    ``source(i)`` is ``token_idx[i]`` with `gather` and i without. With `gate_up_order` the matrix
    holds gate and up rows and ``y[i] = act(x[source(i)] @ gate.T, x[source(i)] @ up.T)``; with an
    activation that has no gate, ``y[i] = act(x[source(i)] @ weight[e(i)].T)``.

    Parameters
    ----------
    x : array, bfloat16 or float16, shape (num_tokens or max_rows, k), C-contiguous, or Quantized
        A row is a multiple of 16 bytes. One scale for all, block (None, None), has shape (1,), or
        without `gather` (num_local_experts,).
    weight : array, dtype of x, shape (num_local_experts, n, k), or Quantized with 128 x 128 blocks
        Beside an x with one scale block (None, None): scale (num_local_experts, 2) for gate and up
        in their order, else (num_local_experts, 1). C-contiguous; in ``"block_major_k"``
        ``(num_local_experts, k / bk, n, bk)`` with ``bk`` the elements of 128 bytes. ``n`` is a
        multiple of 8. Scales of blocks of a gate-and-up matrix are in halves as
        :class:`ExpertWeights` says.
    permutation : Permutation
        From :func:`group`; on a device its ``tile`` must be a height the kernels have: 16, 32, 64,
        or 128 for 16-bit types; on Hopper any multiple of 8 up to ``tuning.SM90_TILES[dtype][-1]``
        for bfloat16, and for fp8 with fp8 output (with `gate_up_order`) or bfloat16 output
        (without, and without an activation).
    gather : bool
        Rows of x are tokens rather than permuted rows.
    gate_up_order : {"gate_up", "up_gate", "gate_up_interleaved", "up_gate_interleaved"}, optional
        Applies the activation; the result then has ``n / 2`` columns.
    activation : Activation, optional
        With `gate_up_order` one with a gate, by default plain SwiGLU; without, one without.
    layout : {"major_k", "block_major_k"}
    out_dtype : {"bfloat16", "float16", "float32", "float8_e4m3fn"}
        ``"float8_e4m3fn"`` (with an activation) requantises with one scale per row and 128 columns,
        or by the scale of `out` where x has one.
    out : array or Quantized, optional
        Required, with its scale, (1,) or (num_local_experts,), for fp8 of an x with one scale.
    config : GroupedGemmConfig or Sm90Config, optional
        Chooses the kernel and its configuration instead of :func:`cumoe.tuning.select_gemm`.

    Returns
    -------
    array or Quantized, ``max_rows`` rows
        Padding rows are undefined.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place, or no kernel can run it.

    Notes
    -----
    float32 accumulation; fp8 products are summed per 128 of k, then scaled and added, or over all
    of k where there is one scale (Hopper's tensor cores keep 14 bits of such a sum); one rounding
    at the end. Bitwise repeatable. Queued on the current stream; the first use of a user's
    activation on a device waits for a comparison with its twin.

    References
    ----------
    PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
    """
    permutation = check_permutation(permutation)
    check_choice("layout", layout, WEIGHT_LAYOUTS)
    check_choice("out_dtype", out_dtype, (*FLOATS, FP8))
    check_type("gather", gather, bool, "a bool")
    gated = gate_up_order is not None
    if gated:
        check_choice("gate_up_order", gate_up_order, GATE_UP_ORDERS)
    if gated or activation is not None:
        kind = check_activation(activation)
        if kind.gated != gated:
            expected = "one without a gate or None without" if kind.gated else "a gated one with"
            raise ValueError(f"activation: expected {expected} gate_up_order, got {kind.name!r}")
    elif out_dtype == FP8:
        raise ValueError(
            "out_dtype: 'float8_e4m3fn' needs gate_up_order or an activation without a gate, "
            "got neither"
        )
    num_local = permutation.tokens_per_expert.shape[0]
    tensors = isinstance(x, Quantized) and x.block == (None, None)
    block = (None, None) if tensors else (1, 128)
    a, a_scale = check_rows(x, "x", HALVES, block, 1 if gather else num_local)
    activated = gated or activation is not None
    operand = _check_weight(
        weight, a, a_scale, num_local, layout, gate_up_order, activated, tensors
    )
    if not gather and a.shape[0] != permutation.max_rows:
        raise ValueError(f"x: expected {permutation.max_rows} permuted rows, got {a.shape[0]}")
    act = check_activation(activation, num_local)
    if config is not None:
        check_type(
            "config",
            config,
            (GroupedGemmConfig, Sm90Config),
            "a GroupedGemmConfig, Sm90Config or None",
        )
    inputs: dict[str, Array | None] = {
        "x": a,
        "x.scale": a_scale,
        "weight": operand.values,
        "weight.scale": operand.scale,
        "permutation": permutation.token_idx,
        **activation_arrays(act),
    }
    same_place(inputs)
    n = operand.num_rows // (2 if gated else 1)
    shape = (permutation.max_rows, n)
    fp8 = FP8_TENSOR if tensors else FP8
    problem = GroupedGemmProblem(
        fp8 if a_scale is not None else dtype_name(a),
        fp8 if out_dtype == FP8 else out_dtype,
        gated,
        gather,
        permutation.tile,
        activation is not None and not gated,
    )
    if is_device(a):
        config = _check_config(config, problem, get_device(a.device.id))
    if problem.output_dtype == FP8_TENSOR:
        y, y_scale = check_static_out(out, shape, num_local, inputs)
    else:
        y, y_scale = activation_outputs(a, out, out_dtype, shape, inputs)
    check_aligned({"x": a, "weight": operand.values, "out": y})
    if is_device(a):
        assert config is not None
        if y.size:
            check_twin(act, a)
            launch = plan_gemm(a, a_scale, operand, y, y_scale, permutation, problem, config, act)
            kernels.run([launch], a)
    else:
        result = on_host(a, a_scale, operand, permutation, act, problem, n, y_scale)
        if isinstance(result, Quantized):
            assert y_scale is not None
            y[...], y_scale[...] = result.values, result.scale
        else:
            y[...] = result
    if out is not None:
        return out
    return y if y_scale is None else Quantized(y, y_scale)  # a static scale came with `out`


def gemm_spec(
    problem: GroupedGemmProblem,
    config: GroupedGemmConfig | Sm90Config,
    activation: Activation | None = None,
) -> KernelSpec:
    """Return the kernel that a configuration and an activation, swiglu by default, stand for."""
    if isinstance(config, Sm90Config):
        spec = kernels_sm90.grouped_gemm_spec(problem, config)
    else:
        spec = kernels.grouped_gemm_spec(problem, config)
    return spec if activation is None else kernels.with_activation(spec, activation)


def plan_gemm(
    a: Array,
    a_scale: Array | None,
    operand: kernels.GemmOperand,
    out: Array,
    out_scale: Array | None,
    permutation: Permutation,
    problem: GroupedGemmProblem,
    config: GroupedGemmConfig | Sm90Config,
    activation: Activation,
    token_weights: kernels.TokenWeights | None = None,
    queue: Array | None = None,
) -> kernels.Launch:
    """Return the launch of a checked problem; `queue` is for Hopper's own kernels."""
    arrays = (a, a_scale, operand, out, out_scale, permutation)
    if not isinstance(config, Sm90Config):
        return kernels.grouped_gemm(*arrays, problem, config, activation, token_weights)
    num_sms = get_device(int(a.device.id)).num_sms
    launch = kernels_sm90.grouped_gemm(
        *arrays, problem, config, activation, num_sms, token_weights, queue
    )
    if problem.gated or problem.activated:
        launch.spec = kernels.with_activation(launch.spec, activation)
    return launch


def _check_config(
    config: Any, problem: GroupedGemmProblem, device: Device
) -> GroupedGemmConfig | Sm90Config:
    if config is None:
        return select_gemm(problem, device.arch, device.max_smem_bytes)
    if isinstance(config, GroupedGemmConfig):
        reason = why_illegal(config, problem, device.max_smem_bytes)
    elif device.arch != SM90_ARCH or not runs_sm90(problem):
        reason = f"the {SM90_ARCH} kernel does not run {problem} on {device.arch}"
    else:
        reason = why_illegal_sm90(config, problem)
    if reason is not None:
        raise ValueError(f"config: {reason}")
    return config


def _check_weight(
    weight: Any,
    a: Array,
    a_scale: Array | None,
    num_local: int,
    layout: str,
    gate_up_order: str | None,
    activated: bool,
    tensors: bool,
) -> kernels.GemmOperand:
    """Return the weight as the kernel addresses it, checked against the left operand."""
    if (a_scale is not None) != isinstance(weight, Quantized):
        left = "Quantized" if a_scale is not None else dtype_name(a)
        raise TypeError(
            "weight: expected a Quantized exactly when x is one, got "
            f"{type(weight).__name__} with x {left}"
        )
    payload = weight.values if isinstance(weight, Quantized) else weight
    dtype = FP8 if a_scale is not None else dtype_name(a)
    block_major = layout == "block_major_k"
    values = as_native(payload, "weight", (dtype,), ndim=4 if block_major else 3)
    k = a.shape[1]
    if block_major:
        block = 128 // values.dtype.itemsize
        num_rows, got_k = values.shape[2], values.shape[1] * values.shape[3]
        if values.shape[3] != block:
            raise ValueError(f"weight: expected blocks of {block} elements, got {values.shape[3]}")
    else:
        num_rows, got_k = values.shape[1:]
    if got_k != k:
        raise ValueError(f"weight: expected k = {k} like x, got {got_k}")
    if values.shape[0] != num_local:
        raise ValueError(
            f"weight: expected {num_local} experts like the permutation, got {values.shape[0]}"
        )
    check_multiple("weight", "k", k, 16 // values.dtype.itemsize)
    gated = gate_up_order is not None
    # A result that is fp8 rows is written, and read by the next GEMM, in 16-byte pieces too.
    sides = 2 if gated else 1
    granule = 16 if a_scale is not None and activated else 8
    check_multiple("weight", "n", num_rows, sides * granule)
    scale = None
    if isinstance(weight, Quantized):
        block = (None, None) if tensors else (128, 128)
        if weight.block != block:
            raise ValueError(f"weight.block: expected {block}, got {weight.block}")
    if isinstance(weight, Quantized) and tensors:
        scale = as_native(
            weight.scale, "weight.scale", ("float32",), shape=(num_local, 2 if gated else 1)
        )
    elif isinstance(weight, Quantized):
        rows = 2 * kernels.blocks(num_rows // 2) if gated else kernels.blocks(num_rows)
        scale = as_native(
            weight.scale, "weight.scale", ("float32",), shape=(num_local, rows, kernels.blocks(k))
        )
    return kernels.GemmOperand(values, scale, num_rows, k, block_major, gate_up_order)


def on_host(
    a: Array,
    a_scale: Array | None,
    operand: kernels.GemmOperand,
    permutation: Permutation,
    activation: Activation,
    problem: GroupedGemmProblem,
    n: int,
    out_scale: Array | None = None,
    token_weights: kernels.TokenWeights | None = None,
) -> Array | Quantized:
    """Run the twin: float32 products of the dequantised operands."""
    tensors = problem.dtype == FP8_TENSOR
    if a_scale is not None and tensors:
        rows = a_scale if a_scale.size == 1 else reference.scale_of_rows(permutation, a_scale)
        wide = a.astype(np.float32) * rows
    else:
        wide = dequantize(Quantized(a, a_scale)) if a_scale is not None else a.astype(np.float32)

    def matrix(expert: int) -> Array:
        w = operand.values[expert]
        if operand.block_major:
            w = np.ascontiguousarray(w.transpose(1, 0, 2)).reshape(operand.num_rows, operand.k)
        return w

    def natural(expert: int) -> Array:
        if operand.scale is None:
            return matrix(expert).astype(np.float32)
        if tensors:
            return matrix(expert).astype(np.float32) * operand.scale[expert, 0]
        q = Quantized(matrix(expert)[None], operand.scale[expert][None], block=(128, 128))
        return dequantize(q)[0]

    def gate_up(expert: int) -> tuple[Array, Array]:
        order, rows = str(operand.gate_up_order), kernels.blocks(n)
        parts = [np.ascontiguousarray(matrix(expert)[half]) for half in half_slices(order, n)]
        if operand.scale is None:
            return parts[0].astype(np.float32), parts[1].astype(np.float32)
        if tensors:
            sides = (0, 1) if order.startswith("gate") else (1, 0)
            gate, up = (
                part.astype(np.float32) * operand.scale[expert, side]
                for part, side in zip(parts, sides, strict=True)
            )
            return gate, up
        scales = [operand.scale[expert, :rows], operand.scale[expert, rows:]]
        if not order.startswith("gate"):
            scales.reverse()
        gate, up = (
            dequantize(Quantized(part[None], scale[None], block=(128, 128)))[0]
            for part, scale in zip(parts, scales, strict=True)
        )
        return gate, up

    row_weights = None
    if token_weights is not None:
        row_weights = reference.weights_of_rows(
            permutation, token_weights.values, token_weights.num_experts
        )
    if problem.gated or problem.activated:
        y = reference.activated_gemm(
            wide,
            permutation,
            gate_up if problem.gated else lambda e: (None, natural(e)),
            n,
            activation,
            gather=problem.gather,
            row_weights=row_weights,
        )
    else:
        y = reference.grouped_gemm(wide, permutation, natural, n, gather=problem.gather)
    if problem.output_dtype == FP8_TENSOR:
        assert out_scale is not None
        return reference.quantize_rows(y, permutation, out_scale)
    return reference.round_rows(y, problem.output_dtype)
