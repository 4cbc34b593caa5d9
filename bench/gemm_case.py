"""One case of the GEMM bench: a model's expert weights, a draw of the routing, and the two GEMMs.

Owns the data that cumoe and its peers share, and cumoe's own launches: on a GPU those of a
:class:`~cumoe.plan.DevicePlan`, the ones a layer makes. Times nothing and judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import cumoe
from bench.inputs import TINY, find_model, random_bf16, to_backend, to_host
from bench.peers import Operands, take_rows
from bench.record import Row
from bench.shapes import ModelShape, make_logits
from cumoe import Activation, ExpertWeights, Permutation, Quantized, TopK
from cumoe.arrays import is_device
from cumoe.config import Array
from cumoe.models import SCALE_BLOCK

GEMMS = ("gemm1", "gemm2")
ROUTINGS: dict[str, float | None] = {"uniform": None, "zipf": 1.2}
"""Zipf exponent of each routing; see :func:`bench.shapes.make_logits`."""

POISON = 0xFF  # bytes of NaN in bfloat16, float32 and e4m3
_TINY = replace(TINY, hidden_size=384, intermediate_size=128, num_shared_experts=0)
_ROWS_AT_ONCE = 8192

Stage = Callable[[int], object]


def find_gemm_shape(name: str) -> ModelShape:
    """Return a model's experts without shared ones and without its router.

    Raises
    ------
    ValueError
        If there is none of that name, or a size is no multiple of a scale block: peers know the
        scales of whole blocks only.
    """
    shape = _TINY if name == TINY.name else find_model(name, shared=False)
    for what, size in (("hidden", shape.hidden_size), ("intermediate", shape.intermediate_size)):
        if size % SCALE_BLOCK:
            raise ValueError(
                f"models: expected sizes in whole blocks of {SCALE_BLOCK}, got {name} with "
                f"{what}_size = {size}"
            )
    return shape


def draw_ids(
    shape: ModelShape, num_tokens: int, skew: float | None, seed: int
) -> np.ndarray[Any, Any]:
    """Draw each token's experts, without replacement within a token.

    Returns
    -------
    numpy.ndarray, int32, shape (num_tokens, top_k)
        The first choice first. Groups and biases of the model's own router do not take part.
    """
    logits = make_logits(shape, num_tokens, skew=skew, seed=seed)
    best = np.argpartition(-logits, shape.top_k - 1, axis=1)[:, : shape.top_k]
    order = np.argsort(-np.take_along_axis(logits, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1).astype(np.int32)


def gemm_work(weights: ExpertWeights, num_slots: int, num_active: float) -> dict[str, Row]:
    """Return useful FLOPs of the two GEMMs and the bytes of their active experts' weights."""
    matrices = {"gemm1": (weights.w13, weights.w13_scale), "gemm2": (weights.w2, weights.w2_scale)}
    elems = weights.hidden_size * weights.intermediate_size
    return {
        name: {
            "flops": 2 * num_slots * elems * (2 if name == "gemm1" else 1),
            "num_bytes": num_active * sum(a.nbytes / a.shape[0] for a in arrays if a is not None),
        }
        for name, arrays in matrices.items()
    }


@dataclass(eq=False)
class Case:
    """Inputs, results and launches of one number of tokens.

    Attributes
    ----------
    xp : module
    weights : ExpertWeights
    activation : Activation
    ids : numpy.ndarray, int32, shape (num_tokens, top_k)
    x : array, bfloat16, shape (num_tokens, hidden_size)
    a : array or Quantized
        x as GEMM1 reads it: quantised for fp8 weights.
    permuted_idx : numpy.ndarray, int32, shape (num_slots,)
        Row of each slot in `act` and `rows`.
    act : array, bfloat16, or Quantized, shape (max_rows, intermediate_size)
        Result of GEMM1 with its activation.
    rows : array, bfloat16, shape (max_rows, hidden_size)
        Result of GEMM2.
    stages : dict of str to callable
        ``"gemm1"`` and ``"gemm2"``, each of which finds its inputs ready; in that order first.
    configs : dict of str to str
        What the kernels were built for.
    """

    xp: Any
    weights: ExpertWeights
    activation: Activation
    ids: np.ndarray
    x: Array
    a: Array | Quantized
    permuted_idx: np.ndarray
    act: Array | Quantized
    rows: Array
    stages: dict[str, Stage]
    configs: dict[str, str]

    @property
    def recipe(self) -> str:
        """The weights' recipe."""
        return str(self.weights.recipe)

    @property
    def matrices(self) -> tuple[Array | Quantized, Array | Quantized]:
        """w13 and w2 as the ops take them: with their scales for fp8."""
        w = self.weights
        if w.w13_scale is None or w.w2_scale is None:
            return w.w13, w.w2
        block = (SCALE_BLOCK, SCALE_BLOCK)
        return (
            Quantized(w.w13, w.w13_scale, block=block),
            Quantized(w.w2, w.w2_scale, block=block),
        )

    def run(self) -> None:
        """Run both GEMMs into poisoned outputs.

        Raises
        ------
        ArithmeticError
            If a row is not written, or NaN.
        """
        outputs = [self.rows]
        outputs += (
            [self.act.values, self.act.scale] if isinstance(self.act, Quantized) else [self.act]
        )
        for array in outputs:
            array.view(np.uint8).fill(POISON)
        for name in GEMMS:
            self.stages[name](0)
        for array in outputs:
            self._check_written(array)

    def _check_written(self, array: Array) -> None:
        limits = {1: (np.uint8, 0x7F, 0x7E), 2: (np.uint16, 0x7FFF, 0x7F80)}
        limits[4] = (np.uint32, 0x7FFFFFFF, 0x7F800000)
        word, mask, largest = limits[array.dtype.itemsize]
        for start in range(0, self.permuted_idx.size, _ROWS_AT_ONCE):
            bits = take_rows(array, self.permuted_idx[start : start + _ROWS_AT_ONCE]).view(word)
            if int((bits & word(mask)).max()) > largest:
                raise ArithmeticError("wrong answer: not every row was written, or one has a NaN")

    def act_rows(self, slots: np.ndarray) -> Array | Quantized:
        """Return slots' rows of the activation's result."""
        index = self.permuted_idx[slots]
        if isinstance(self.act, Quantized):
            return Quantized(take_rows(self.act.values, index), take_rows(self.act.scale, index))
        return take_rows(self.act, index)

    def operands(self, name: str) -> Operands:
        """Return a GEMM as its peers read it; GEMM2's left operand in the order of the slots."""
        w13, w2 = self.matrices
        if name == "gemm1":
            return Operands(name, self.ids, self.a, w13, self.ids.shape[1])
        return Operands(name, self.ids, self.act_rows(np.arange(self.ids.size)), w2, 1)

    def unfused(self) -> tuple[Array, Array, np.ndarray]:
        """Run both GEMMs with the activation as a kernel of its own, gate and up in bfloat16.

        Returns
        -------
        product : array, bfloat16, shape (max_rows, 2 * intermediate_size)
            Gate and up.
        rows : array, bfloat16, shape (max_rows, hidden_size)
        permuted_idx : numpy.ndarray, int32, shape (num_slots,)
            Row of each slot in both.
        """
        w13, w2 = self.matrices
        ids = to_backend(self.ids, self.xp)
        experts = self.weights.num_local_experts
        permutation = cumoe.group(ids, num_experts=experts, tile=64)
        product = cumoe.grouped_gemm(self.a, w13, permutation)
        act = cumoe.activate(
            product,
            gate_up_order=str(self.weights.gate_up_order),
            activation=self.activation,
            permutation=permutation,
            out_dtype="bfloat16" if self.recipe == "bf16" else "float8_e4m3fn",
        )
        rows: Any = cumoe.grouped_gemm(act, w2, permutation, gather=False)
        return product, rows, to_host(permutation.permuted_idx).ravel()


def make_case(
    xp: Any, shape: ModelShape, weights: ExpertWeights, num_tokens: int, routing: str, seed: int
) -> Case:
    """Draw the inputs of a case and prepare cumoe's launches.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    shape : ModelShape
        Of :func:`find_gemm_shape`.
    weights : ExpertWeights
    num_tokens : int
    routing : str
        A name of :data:`ROUTINGS`.
    seed : int

    Returns
    -------
    Case
        Whose GEMMs have not run yet.
    """
    ids = draw_ids(shape, num_tokens, ROUTINGS[routing], seed)
    x = random_bf16(xp, (num_tokens, shape.hidden_size), seed, num_tokens, 99)
    a = cumoe.quantize_fp8_block(x) if weights.recipe == "fp8_block" else x
    make = _make_planned if is_device(x) else _make_host
    return make(xp, weights, shape.activation, ids, x, a)


def _make_planned(
    xp: Any,
    weights: ExpertWeights,
    activation: Activation,
    ids: np.ndarray,
    x: Array,
    a: Array | Quantized,
) -> Case:
    """Plan a layer call with given routing; the stages before the GEMMs run once, here.

    Tokens come quantised, as for the peers: GEMM1 gathers them, or begins with a copy to their
    rows, where in a layer that quantises them it begins with that.
    """
    from cumoe.layer_call import check_call, check_layer
    from cumoe.plan import DevicePlan, Workspace, expert_buffers

    spec = check_layer(weights, None, None, activation, None, 0)
    topk = TopK(xp.asarray(ids), xp.full(ids.shape, 1.0 / ids.shape[1], np.float32))
    call = check_call(spec, a, None, topk, None, False, None, None)
    workspace = Workspace(x)
    plan = DevicePlan(spec, call, workspace)
    plan.run(call, xp.cuda.get_current_stream().ptr)
    buffers = expert_buffers(spec, ids.shape[0], plan.permutation.max_rows)
    act: Any = workspace.take("act", *buffers["act"])
    if "act_scale" in buffers:
        act = Quantized(act, workspace.take("act_scale", *buffers["act_scale"]))
    permuted_idx = to_host(plan.permutation.permuted_idx).ravel()
    stages = {name: planned_stage(plan.stages[name]) for name in GEMMS}
    keep = (workspace, topk, a)  # launches hold addresses only
    stages["gemm2"] = lambda i, run=stages["gemm2"], keep=keep: run(i)  # type: ignore[misc]
    configs = {name: str(config) for name, config in plan.configs.items()}
    return Case(
        xp, weights, activation, ids, x, a, permuted_idx, act, plan.parts.rows, stages, configs
    )


def planned_stage(launches: Sequence[Any]) -> Stage:
    """Return a plan's launches as a function that queues them on CuPy's current stream."""
    import cupy

    from cumoe.launch import get_device

    device = get_device(cupy.cuda.Device().id)

    def run(i: int) -> None:
        stream = cupy.cuda.get_current_stream().ptr
        for item in launches:
            item.run(device, stream)

    return run


def _make_host(
    xp: Any,
    weights: ExpertWeights,
    activation: Activation,
    ids: np.ndarray,
    x: Array,
    a: Array | Quantized,
) -> Case:
    """Prepare the same GEMMs as public ops."""
    permutation: Permutation = cumoe.group(ids, num_experts=weights.num_local_experts)
    rows = np.zeros((permutation.max_rows, weights.hidden_size), x.dtype)
    act: Any = np.zeros((permutation.max_rows, weights.intermediate_size), x.dtype)
    out_dtype = "bfloat16"
    if isinstance(a, Quantized):
        out_dtype = a.dtype
        blocks = weights.intermediate_size // SCALE_BLOCK
        act = Quantized(act.astype(a.values.dtype), np.zeros((rows.shape[0], blocks), np.float32))
    permuted_idx = permutation.permuted_idx.ravel()
    case = Case(xp, weights, activation, ids, x, a, permuted_idx, act, rows, {}, {})
    w13, w2 = case.matrices

    def gemm1(i: int) -> object:
        return cumoe.grouped_gemm(
            a,
            w13,
            permutation,
            gate_up_order=weights.gate_up_order,
            activation=activation,
            out_dtype=out_dtype,
            out=act,
        )

    case.stages["gemm1"] = gemm1
    case.stages["gemm2"] = lambda i: cumoe.grouped_gemm(
        act, w2, permutation, gather=False, out=rows
    )
    return case
