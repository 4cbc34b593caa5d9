"""All-reduces over peer memory or NCCL, with what comes before the sum of the ranks and follows it.

On device arrays one kernel does all of an op, or one on either side of NCCL's sum; on NumPy arrays
the twin does it, over any group. All ranks make the same calls in the same order, with the same
shapes and dtypes; every rank gets the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from cumoe import kernels
from cumoe.arrays import as_native, dtype_name, is_device, same_place
from cumoe.comm.debug import Comparison, compare_calls, describe, is_asked_for
from cumoe.comm.epilogue import Epilogue, check_epilogue, output_arrays, select_outputs
from cumoe.comm.group import DEFAULT_TIMEOUT_S
from cumoe.comm.layout import block_layout
from cumoe.comm.nccl import plan_sum
from cumoe.comm.workspace import Workspace
from cumoe.config import Array, Quantized, check_finite
from cumoe.finalize import MAX_COLUMNS
from cumoe.kernels_comm import MAX_HIDDEN_SIZE, PeerMemory, Tokens, select_config
from cumoe.kernels_comm import allreduce as launch_allreduce
from cumoe.launch import Device, get_device
from cumoe.microscaling import QuantizedNVFP4, QuantizedUE8M0, ue8m0_words
from cumoe.quantize import _whole_columns as whole_columns
from cumoe.reference import allreduce as reference
from cumoe.validate import FLOATS, HALVES, check_aligned, check_multiple

__all__ = ["AllReduced", "allreduce", "finalize_allreduce", "reduce_allreduce"]


class AllReduced(NamedTuple):
    """What an all-reduce returns; None for what was not asked for.

    Attributes
    ----------
    sum : array, shape (num_tokens, hidden_size)
        Of all ranks.
    residual : array, shape (num_tokens, hidden_size)
        Sum plus residual.
    norm : array, shape (num_tokens, hidden_size)
        RMSNorm of `residual`, or of `sum` where there is no residual.
    quantized : Quantized, QuantizedUE8M0 or QuantizedNVFP4
        Of the last of these three that the epilogue computes.
    """

    sum: Array | None = None
    residual: Array | None = None
    norm: Array | None = None
    quantized: Quantized | QuantizedUE8M0 | QuantizedNVFP4 | None = None


def finalize_allreduce(
    rows: Any,
    topk_weights: Any,
    permuted_idx: Any,
    workspace: Workspace | Any,
    *,
    routed_scaling_factor: float = 1.0,
    shared_output: Any = None,
    epilogue: Epilogue | None = None,
    outputs: Sequence[str] | None = None,
    out: AllReduced | None = None,
) -> AllReduced:
    """Sum each token's expert rows over its slots and over all ranks.

    ``part = factor * sum over k of topk_weights[t, k] * rows[permuted_idx[t, k]] + shared_output``,
    ``sum = sum of the parts of all ranks``, and then the epilogue.

    Parameters
    ----------
    rows : array, bfloat16 or float16, shape (max_rows, hidden_size), C-contiguous
        This rank's. ``hidden_size`` is a multiple of 8.
    topk_weights : array or None, bfloat16, float16 or float32, shape (num_tokens, top_k)
        None counts as ones.
    permuted_idx : array, int32, shape (num_tokens, top_k)
        Row of each slot; -1 contributes nothing. At most 64 columns.
    workspace : Workspace
        Open, of the device of the arrays, and at least as large; for NumPy arrays any group, too.
    routed_scaling_factor : float
        Of the routed sum. Leave it where the weights contain it.
    shared_output : array, dtype of `rows`, shape (num_tokens, hidden_size), optional
        This rank's, added after the factor.
    epilogue : Epilogue, optional
        Residual, RMSNorm and quantisation.
    outputs : sequence of {"sum", "residual", "norm", "quantized"}, optional
        What to return. By default all that the epilogue computes, or the sum without one.
    out : AllReduced, optional
        Arrays to write; what is None is not computed. Its residual may be the epilogue's array.

    Returns
    -------
    AllReduced

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place, no output is asked for,
        one is that the epilogue does not compute, or the workspace is closed or too small. In debug
        mode (:class:`Workspace`) also if ranks call differently.
    GroupError
        In debug mode, if a rank does not come.

    Notes
    -----
    Part and sum are float32, products and sums rounded separately, in the order of slots and of
    ranks. They are rounded to the dtype of `rows` twice: each part for its way to the peers, and
    the sum, or the sum plus the residual. The norm is of rounded values and rounded, quantisation
    of the rounded norm. The sign of zeros is lost. Ranks get the same bits, on every run, whatever
    the number of tokens. No host synchronisation; queued on the current stream; can be captured.

    With NCCL (``workspace.kind``) the parts are the same, and the sum is NCCL's: in an order of its
    own, rounded after each addition, so up to ``size - 1`` times, and once more with the residual.
    Order and bits may depend on the number of tokens; the sign of a zero sum is not defined. What
    follows is of that sum as above. Ranks get the same bits as NCCL gives them the same sum.

    References
    ----------
    FlashInfer, pull request 2966, ``trtllm_moe_finalize_allreduce_fusion``.

    Examples
    --------
    >>> import ml_dtypes
    >>> import numpy as np
    >>> from cumoe.comm import SingleGroup
    >>> rows = np.ones((2, 8), ml_dtypes.bfloat16)
    >>> index = np.array([[1, 0], [-1, 1]], np.int32)
    >>> done = finalize_allreduce(rows, None, index, SingleGroup(), routed_scaling_factor=2.5)
    >>> done.sum[:, 0].astype(int).tolist()
    [5, 2]
    """
    return prepare_finalize(
        rows,
        topk_weights,
        permuted_idx,
        workspace,
        routed_scaling_factor=routed_scaling_factor,
        shared_output=shared_output,
        epilogue=epilogue,
        outputs=outputs,
        out=out,
    ).run()


def prepare_finalize(
    rows: Any,
    topk_weights: Any,
    permuted_idx: Any,
    workspace: Any,
    *,
    routed_scaling_factor: float = 1.0,
    shared_output: Any = None,
    epilogue: Epilogue | None = None,
    outputs: Sequence[str] | None = None,
    out: AllReduced | None = None,
) -> AllReduce:
    """Check the arguments of :func:`finalize_allreduce`; the rows may be written before the run."""
    rows = as_native(rows, "rows", HALVES, ndim=2)
    index = as_native(permuted_idx, "permuted_idx", ("int32",), ndim=2)
    if not 1 <= index.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"permuted_idx: expected 1 to {MAX_COLUMNS} columns, got {index.shape[1]}")
    weights = topk_weights
    if weights is not None:
        weights = as_native(weights, "topk_weights", FLOATS, shape=index.shape)
    factor = check_finite("routed_scaling_factor", routed_scaling_factor)
    tokens = Tokens("rows", rows, weights, index, routed_scaling_factor=factor)
    given = {"rows": rows, "topk_weights": weights, "permuted_idx": index}
    return _prepare(tokens, given, shared_output, workspace, epilogue, outputs, out)


def reduce_allreduce(
    rows: Any,
    expert_weights: Any,
    workspace: Workspace | Any,
    *,
    shared_output: Any = None,
    epilogue: Epilogue | None = None,
    outputs: Sequence[str] | None = None,
    out: AllReduced | None = None,
) -> AllReduced:
    """Sum the rows that every expert of a rank has for every token, over experts and ranks.

    ``part = sum over e of expert_weights[e, t] * rows[e, t] + shared_output``

    Parameters
    ----------
    rows : array, bfloat16 or float16, shape (num_experts, num_tokens, hidden_size), C-contiguous
        This rank's.
    expert_weights : array or None, bfloat16, float16 or float32, shape (num_experts, num_tokens)
    workspace, shared_output, epilogue, outputs, out
        See :func:`finalize_allreduce`.

    Returns
    -------
    AllReduced

    Raises
    ------
    TypeError, ValueError
        As :func:`finalize_allreduce`.

    Notes
    -----
    As :func:`finalize_allreduce`.
    """
    rows = as_native(rows, "rows", HALVES, ndim=3)
    if not rows.shape[0] >= 1 or rows.shape[0] * rows.shape[1] >= 1 << 31:
        raise ValueError(
            f"rows: expected at least one expert and fewer than {1 << 31} rows, got {rows.shape}"
        )
    weights = expert_weights
    if weights is not None:
        weights = as_native(weights, "expert_weights", FLOATS, shape=rows.shape[:2])
    given = {"rows": rows, "expert_weights": weights}
    tokens = Tokens("experts", rows, weights)
    return _prepare(tokens, given, shared_output, workspace, epilogue, outputs, out).run()


def allreduce(
    x: Any,
    workspace: Workspace | Any,
    *,
    epilogue: Epilogue | None = None,
    outputs: Sequence[str] | None = None,
    out: AllReduced | None = None,
) -> AllReduced:
    """Sum an array over all ranks.

    Parameters
    ----------
    x : array, bfloat16, float16 or float32, shape (num_tokens, hidden_size), C-contiguous
        This rank's. ``hidden_size`` is a multiple of 8.
    workspace, epilogue, outputs, out
        See :func:`finalize_allreduce`.

    Returns
    -------
    AllReduced

    Raises
    ------
    TypeError, ValueError
        As :func:`finalize_allreduce`.

    Notes
    -----
    The sum is float32, by ascending rank, and rounded once; NCCL's is as it is said for
    :func:`finalize_allreduce`, as is all else.
    """
    x = as_native(x, "x", FLOATS, ndim=2)
    return _prepare(Tokens("plain", x), {"x": x}, None, workspace, epilogue, outputs, out).run()


@dataclass(frozen=True, eq=False)
class AllReduce:
    """A checked op of one rank: what goes in, what comes out, and through which memory."""

    tokens: Tokens
    native: AllReduced
    workspace: Any
    out: AllReduced | None

    def launches(self) -> list[kernels.Runnable]:
        """Return what a device runs; see :func:`plan_launches`."""
        device = get_device(int(self.tokens.rows.device.id))
        return plan_launches(self.tokens, self.native, self.workspace, device)

    def run(self) -> AllReduced:
        """Run the kernel or the twin."""
        if is_device(self.tokens.rows):
            launches = self.launches()
            if launches:
                self.workspace.queue(launches)
        else:
            made = isinstance(self.workspace, Workspace)
            group = self.workspace.group if made else self.workspace
            if self.workspace.debug if made else is_asked_for():
                timeout_s = getattr(self.workspace, "timeout_s", DEFAULT_TIMEOUT_S)
                compare_calls(group, describe(self.tokens, _names(self.native)), timeout_s)
            _run_twin(self.tokens, self.native, group)
        return self.native if self.out is None else self.out


def _prepare(
    tokens: Tokens,
    given: dict[str, Array | None],
    shared: Any,
    workspace: Any,
    epilogue: Epilogue | None,
    outputs: Sequence[str] | None,
    out: AllReduced | None,
) -> AllReduce:
    """Check what the ops have in common."""
    rows, shape = tokens.rows, (tokens.num_tokens, tokens.hidden_size)
    name = "x" if tokens.policy == "plain" else "rows"
    check_multiple(name, "hidden_size", shape[1], 8)
    if not 8 <= shape[1] <= MAX_HIDDEN_SIZE:
        raise ValueError(f"{name}: expected 8 to {MAX_HIDDEN_SIZE} columns, got {shape[1]}")
    dtype = dtype_name(rows)
    if shared is not None:
        shared = given["shared_output"] = as_native(shared, "shared_output", (dtype,), shape=shape)
    after = check_epilogue(epilogue, dtype, shape)
    given |= after.arrays()
    same_place(given)
    wanted = select_outputs(after, outputs, out)
    _check_workspace(workspace, rows, shape)
    native = AllReduced(*output_arrays(rows, dtype, shape, after, wanted, out, given))
    quantized = native.quantized
    values = None if quantized is None else quantized.values
    written = {"out.sum": native.sum, "out.residual": native.residual, "out.norm": native.norm}
    aligned = {k: v for k, v in given.items() if v is not None and dtype_name(v) == dtype}
    check_aligned({**aligned, **written, "out.quantized.values": values})
    tokens = replace(
        tokens,
        shared=shared,
        residual=after.residual,
        norm_weight=after.norm_weight,
        eps=after.eps,
        weight_offset=after.weight_offset,
        quantize=after.quantize if quantized is not None else None,
        quant_scale=after.quant_scale,
        group_size=after.group_size if quantized is not None else 0,
    )
    return AllReduce(tokens, native, workspace, out)


def _check_workspace(workspace: Any, rows: Array, shape: tuple[int, int]) -> None:
    """Raise unless a workspace can take the call; NumPy arrays need no more than a group."""
    if not isinstance(workspace, Workspace):
        if is_device(rows) or not hasattr(workspace, "allgather"):
            more = "" if is_device(rows) else " or, for NumPy arrays, a group"
            kind = type(workspace).__name__
            raise TypeError(f"workspace: expected a Workspace{more}, got {kind}")
        return
    if workspace.closed:
        raise ValueError("workspace: expected an open one, got a closed one")
    have = (workspace.max_num_tokens, workspace.hidden_size)
    item = {"float32": 4}
    row_bytes = shape[1] * item.get(dtype_name(rows), 2)
    most_bytes = have[1] * item.get(workspace.dtype, 2)
    if shape[0] > have[0] or row_bytes > most_bytes:
        raise ValueError(
            f"workspace: expected room for {shape[0]} tokens of {row_bytes} bytes, got one made "
            f"for {have[0]} of {most_bytes} (hidden_size {have[1]}, {workspace.dtype})"
        )
    if is_device(rows) and int(rows.device.id) != workspace.device:
        raise ValueError(
            f"workspace: expected one of cuda:{rows.device.id} like the arrays, got one of "
            f"cuda:{workspace.device}"
        )


def _names(native: AllReduced) -> tuple[str, ...]:
    """Return the outputs that are written."""
    return tuple(name for name, value in native._asdict().items() if value is not None)


def plan_launches(
    tokens: Tokens, native: AllReduced, workspace: Workspace, device: Device
) -> list[kernels.Runnable]:
    """Return what a rank runs, one-shot where the rows of all tokens fit a slot.

    Parameters
    ----------
    tokens : Tokens
        Of checked arrays, without outputs.
    native : AllReduced
        Outputs.
    workspace : Workspace
    device : Device
        That holds the arrays.

    Returns
    -------
    list of Runnable
        One launch, or two where sum and residual are asked for and more goes over the wire than
        one-shot; none without tokens. With NCCL see :func:`cumoe.comm.nccl.plan_sum`. In debug mode
        a comparison comes first, also without tokens.
    """
    first: list[kernels.Runnable] = []
    if workspace.debug:
        call = describe(tokens, _names(native))
        first.append(Comparison(workspace.group, call, workspace.timeout_s))
    if not tokens.num_tokens:
        return first
    max_cluster = 8 if device.compute_capability >= (9, 0) else 1
    config = select_config(tokens.num_tokens, tokens.hidden_size, device.num_sms, max_cluster)
    quantized = native.quantized
    full = replace(
        tokens,
        sum_out=native.sum,
        result_out=native.residual,
        norm_out=native.norm,
        quant_out=None if quantized is None else quantized.values,
        scale_out=None if tokens.quantize == "fp8_tensor" else getattr(quantized, "scale", None),
    )
    if workspace.kind == "nccl":
        sums = plan_sum(tokens, full, workspace.communicator, workspace.scratch, config)
        return first + sums
    at = block_layout(
        int(workspace.group.size), workspace.max_num_tokens, workspace.hidden_size, workspace.dtype
    )
    memory = PeerMemory(
        int(workspace.group.rank),
        workspace.buffers,
        workspace.state,
        at.buffer_bytes,
        at.slot_bytes,
        at.share_bytes,
        at.results_offset,
    )
    two_shot = len(memory.buffers) > 1 and tokens.num_bytes > at.slot_bytes
    calls = [full]
    if tokens.residual is None:
        calls = [replace(full, result_out=native.sum, sum_out=None)]
    elif two_shot and native.sum is not None:
        # NOTE: one result goes over the wire in two steps; the sum before the residual is another.
        alone = replace(tokens, residual=None, norm_weight=None, quantize=None, group_size=0)
        calls = [replace(alone, result_out=native.sum), replace(full, sum_out=None)]
    return first + [launch_allreduce(c, memory, config, two_shot=two_shot) for c in calls]


def _run_twin(tokens: Tokens, native: AllReduced, group: Any) -> None:
    """Exchange the parts through the group and write the twin's results."""
    common: dict[str, Any] = {
        "routed_scaling_factor": tokens.routed_scaling_factor,
        "shared": tokens.shared,
    }
    if tokens.policy == "rows":
        index = tokens.permuted_idx
        part = reference.part_of_rows(tokens.rows, tokens.weights, index, **common)
    elif tokens.policy == "experts":
        part = reference.part_of_experts(tokens.rows, tokens.weights, **common)
    else:
        part = reference.part_of_values(tokens.rows)
    parts = [part] if int(group.size) == 1 else _gather(group, part)
    done = reference.reduce_parts(
        parts,
        residual=tokens.residual,
        norm_weight=tokens.norm_weight,
        eps=tokens.eps,
        weight_offset=tokens.weight_offset,
        quantize=tokens.quantize,
        quant_scale=tokens.quant_scale,
        group_size=tokens.group_size,
    )
    for array, values in (
        (native.sum, done.sum),
        (native.residual, done.result),
        (native.norm, done.norm),
    ):
        if array is not None:
            array[...] = values
    if native.quantized is not None and done.quantized is not None:
        native.quantized.values[...] = done.quantized.values
        if tokens.quantize == "fp8_ue8m0":
            stride = ue8m0_words(part.shape, tokens.group_size)[1]
            words = whole_columns(done.quantized.scale, stride)
            whole_columns(native.quantized.scale, stride)[...] = words
        elif tokens.quantize != "fp8_tensor":
            native.quantized.scale[...] = done.quantized.scale


def _gather(group: Any, part: Array) -> list[Array]:
    """Return the parts of all ranks; groups carry plain data, so arrays go as bytes."""
    own = (tuple(int(n) for n in part.shape), dtype_name(part))
    found = group.allgather((*own, part.tobytes()))
    for rank, (*other, _) in enumerate(found):
        if (tuple(other[0]), other[1]) != own:
            raise ValueError(
                f"rank {group.rank} calls with shape {own[0]} and dtype {own[1]}, rank {rank} with "
                f"{tuple(other[0])} and {other[1]}"
            )
    return [np.frombuffer(data, part.dtype).reshape(part.shape) for *_, data in found]
