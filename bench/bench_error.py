"""The layer's largest error, per expert and per 64-row block, against a float32 oracle.

    python -m bench.bench_error            # every model, both recipes: bench/results/error.json
    python -m bench.bench_error --dry-run  # a tiny layer on NumPy

Owns the oracle. It shares nothing with the kernels or their NumPy twins but ids and weights from
:func:`cumoe.route`: it gathers, quantises, multiplies (cuBLAS SGEMM on a GPU) and sums in code of
its own, expert by expert, and rounds where the layer rounds. The same code runs on NumPy and CuPy.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

import cumoe
from bench.arguments import CaseArguments
from bench.inputs import (
    compile_ahead,
    find_model,
    free_memory,
    make_bias,
    make_call,
    make_layer,
    make_weights,
    to_host,
)
from bench.record import REPO, Row, check_row, write_results
from bench.shapes import ModelShape, Recipe
from cumoe import Activation, ExpertWeights, MoELayer, TopK
from cumoe.config import Array
from cumoe.layouts import to_major_k

ARGUMENTS = CaseArguments(
    "bench.bench_error",
    models=(
        "deepseek_v3", "mixtral_8x7b", "qwen3_30b_a3b", "gpt_oss_120b_like", "kimi_k2",
        "llama4_maverick_like",
    ),
    recipes=("bf16", "fp8_block"), tokens=(1, 7, 64, 1000, 4096), dry_tokens=(1, 7, 64),
    results=REPO / "bench" / "results" / "error.json",
)  # fmt: skip
BLOCK_ROWS = 64
COLUMNS = 128  # columns of an activation block, rows and columns of a weight block, with one scale

LIMITS: dict[str, tuple[float, float]] = {
    "bf16": (0.05, 0.004),
    "fp8_block": (0.2, 0.02),
    "fp8_tensor": (0.35, 0.06),
}
"""Largest max_rel and rms_rel that pass.

Two sums in different order differ by about 1e-6, which now and then moves a value over a rounding
boundary. In bfloat16 that is 1/128 of a value of the intermediate, a row or the result, and the sum
over experts may cancel to less than its terms. In fp8 it is up to 1/8 of one of the
intermediate's values, which for a value far above the others shows in the whole row.

fp8_tensor: Hopper's tensor cores lose ``k / 32 / 3 * 2**-13`` of a sum, 0.9 % for k = 7168, and an
activation twice that; e4m3 numbers are 9 % apart, so one in five goes to its neighbour: 4 % rms.
"""

Float32 = Array


def widen(x: Array) -> Float32:
    """Return a bfloat16 array as float32, through the bits."""
    return (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(x: Float32) -> Float32:
    """Round to the nearest bfloat16, ties to even, through the bits; for finite values."""
    bits = x.view(np.uint32)
    half = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32)


def round_e4m3(xp: Any, x: Float32) -> Float32:
    """Round to the nearest e4m3 value, ties to even, saturating at 448."""
    magnitude = xp.minimum(xp.abs(x), np.float32(448))
    # A number in [2**e, 2**(e + 1)) is a multiple of 2**(e - 3); below 2**-6 of 2**-9.
    exponent = xp.maximum(magnitude.view(np.uint32) >> np.uint32(23), np.uint32(127 - 6))
    step = ((exponent - np.uint32(3)) << np.uint32(23)).view(np.float32)
    return xp.copysign(xp.minimum(xp.rint(magnitude / step) * step, np.float32(448)), x)


def round_fp8_static(xp: Any, x: Float32, scale: Float32) -> Float32:
    """Quantise to fp8 by a given scale and return what the values stand for."""
    return round_e4m3(xp, x / scale) * scale


def round_fp8_block(xp: Any, x: Float32) -> Float32:
    """Quantise rows in blocks of 128 columns to fp8 and return what they stand for."""
    num_rows, width = x.shape
    blocks = -(-width // COLUMNS)
    tiles = xp.zeros((num_rows, blocks * COLUMNS), np.float32)
    tiles[:, :width] = x
    tiles = tiles.reshape(num_rows, blocks, COLUMNS)
    amax = xp.abs(tiles).max(axis=2, keepdims=True)
    scale = xp.maximum(amax / np.float32(448), np.float32(2.0**-126))
    tiles = round_e4m3(xp, tiles / scale) * scale
    return xp.ascontiguousarray(tiles.reshape(num_rows, -1)[:, :width])


class Matrices:
    """Each expert's w13 and w2 as float32, made when they are asked for.

    Raises
    ------
    ValueError
        If the weights do not have all gate rows first.
    """

    def __init__(self, xp: Any, weights: ExpertWeights) -> None:
        if weights.gate_up_order != "gate_up":
            raise ValueError(f"weights: expected order 'gate_up', got {weights.gate_up_order!r}")
        self._xp, self._weights = xp, weights
        codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        self._table = xp.asarray(codes.astype(np.float32))

    def of(self, expert: int) -> tuple[Float32, Float32]:
        """Return ``(2 * intermediate_size, hidden_size)``, gate first, and w2."""
        weights = self._weights
        gate_up, down = self._rows(weights.w13[expert]), self._rows(weights.w2[expert])
        if weights.w13_scale is None or weights.w2_scale is None:
            return widen(gate_up), widen(down)
        size, scale = weights.intermediate_size, weights.w13_scale[expert]
        blocks = scale.shape[0] // 2
        w13 = self._values(gate_up)
        if weights.recipe == "fp8_tensor":
            w13[:size] *= scale[0]
            w13[size:] *= scale[1]
            return w13, self._values(down) * weights.w2_scale[expert]
        w13[:size] *= self._spread(scale[:blocks], size, w13.shape[1])
        w13[size:] *= self._spread(scale[blocks:], size, w13.shape[1])
        w2 = self._values(down)
        w2 *= self._spread(weights.w2_scale[expert], *w2.shape)
        return w13, w2

    def _rows(self, payload: Array) -> Array:
        """Return an expert's matrix row after row, whatever its layout."""
        return payload if self._weights.layout == "major_k" else to_major_k(payload[None])[0]

    def _values(self, payload: Array) -> Float32:
        return self._table.take(payload.view(np.uint8))

    def _spread(self, scale: Float32, rows: int, columns: int) -> Float32:
        """Repeat each scale over its block of a (rows, columns) matrix."""
        row = self._xp.arange(rows) // COLUMNS
        column = self._xp.arange(columns) // COLUMNS
        return scale.take(row, axis=0).take(column, axis=1)


def swiglu(xp: Any, gate_up: Float32, activation: Activation, expert: int) -> Float32:
    """Return ``g / (1 + exp(-alpha * g)) * (u + beta)`` for rows of gate, then up."""

    def parameter(value: Any, default: float) -> Any:
        per_expert = getattr(value, "ndim", 0) > 0
        return value[expert] if per_expert else np.float32(default if value is None else value)

    size = gate_up.shape[1] // 2
    limit = parameter(activation.limit, np.inf)
    gate = xp.minimum(gate_up[:, :size], limit)
    up = xp.clip(gate_up[:, size:], -limit, limit)
    with np.errstate(over="ignore"):
        act = gate / (xp.exp(gate * -parameter(activation.alpha, 1.0)) + 1)
    return act * (up + parameter(activation.beta, 0.0))


def slots_by_expert(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each expert in use with its slots ``t * top_k + k``, ascending."""
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    experts, starts = np.unique(flat[order], return_index=True)
    for expert, slots in zip(experts, np.split(order, starts[1:]), strict=True):
        yield int(expert), slots


@dataclass(frozen=True, eq=False)
class Answer:
    """What the layer should give, in float32.

    Attributes
    ----------
    rows : array, shape (num_tokens * top_k, hidden_size)
        Each slot's expert output, not weighted.
    out : array, shape (num_tokens, hidden_size)
    """

    rows: Float32
    out: Float32


def run_oracle(
    xp: Any,
    x: Array,
    topk: TopK,
    weights: ExpertWeights,
    activation: Activation,
    *,
    rounded: Sequence[bool] = (True,),
    weights_on_input: bool = False,
) -> list[Answer]:
    """Run the experts in float32, with the layer's rounding points or without any.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``, whose arrays the others are.
    x : array, bfloat16, shape (num_tokens, hidden_size)
    topk : TopK
        Ids of `weights`, and float32 weights; of the whole call or of a sample of its tokens.
    weights : ExpertWeights
        Row-major, gate first.
    activation : Activation
    rounded : sequence of bool
        One answer for each. True rounds where the layer does. fp8: x, then the activation's result,
        to fp8 in blocks of 1 x 128; bf16: the activation's result to bfloat16; both: rows, then the
        weighted sum, to bfloat16. False rounds nothing; weights are what their payload says.
        fp8_tensor rounds as fp8, by the static scales.
    weights_on_input : bool
        The weights of `topk` multiply gate and up, and not the rows.

    Returns
    -------
    list of Answer
    """
    act_scale: Any = weights.act_scale  # static, of recipe fp8_tensor
    fp8 = weights.recipe == "fp8_block"
    ids = to_host(topk.ids)
    num_tokens, columns = ids.shape
    matrices, plain = Matrices(xp, weights), widen(x)
    inputs = [round_fp8_block(xp, plain) if r and fp8 else plain for r in rounded]
    if act_scale is not None:
        by_scale = round_fp8_static(xp, plain, weights.x_scale)
        inputs = [by_scale if r else plain for r in rounded]
    on_input = topk.weights.reshape(-1, 1)
    shape = (num_tokens * columns, weights.hidden_size)
    rows = [xp.empty(shape, np.float32) for _ in rounded]
    for expert, slots in slots_by_expert(ids):
        w13, w2 = matrices.of(expert)
        index, tokens = xp.asarray(slots), xp.asarray(slots // columns)
        for rounds, source, target in zip(rounded, inputs, rows, strict=True):
            gate_up = source.take(tokens, axis=0) @ w13.T
            if weights_on_input:
                gate_up *= on_input.take(index, axis=0)
            act = swiglu(xp, gate_up, activation, expert)
            if rounds and act_scale is not None:
                act = round_fp8_static(xp, act, act_scale[expert])
            elif rounds:
                act = round_fp8_block(xp, act) if fp8 else round_bf16(act)
            y = act @ w2.T
            target[index] = round_bf16(y) if rounds else y
    answers = []
    for rounds, y in zip(rounded, rows, strict=True):
        out = xp.zeros((num_tokens, shape[1]), np.float32)
        slots_of_token = y.reshape(num_tokens, columns, -1)
        for k in range(columns):
            weight = np.float32(1) if weights_on_input else topk.weights[:, k, None]
            out += weight * slots_of_token[:, k]
        answers.append(Answer(y, round_bf16(out) if rounds else out))
    return answers


def block_errors(xp: Any, got: Float32, want: Float32) -> Float32:
    """Return the errors of each block of 64 rows.

    Returns
    -------
    array, float32, shape (ceil(num_rows / 64), 2)
        Largest ``|got - want| / max(rms(want), |want|)`` and ``rms(got - want) / rms(want)``, the
        root mean squares taken over the block. NaN in `got` gives NaN.
    """
    errors = xp.empty((-(-got.shape[0] // BLOCK_ROWS), 2), np.float32)
    tiny = np.float32(2.0**-126)
    for block in range(errors.shape[0]):
        rows = slice(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        error, reference = got[rows] - want[rows], want[rows]
        rms = xp.maximum(xp.sqrt(xp.mean(reference * reference)), tiny)
        errors[block, 0] = (xp.abs(error) / xp.maximum(rms, xp.abs(reference))).max()
        errors[block, 1] = xp.sqrt(xp.mean(error * error)) / rms
    return errors


@dataclass(frozen=True)
class Worst:
    """The largest errors over blocks, and where the largest max_rel is."""

    max_rel: float
    rms_rel: float
    block: int
    expert: int | None = None

    @classmethod
    def of(cls, errors: np.ndarray, experts: Sequence[tuple[int, int]] | None = None) -> Worst:
        """Summarise rows of :func:`block_errors`; `experts` says (expert, block) of each."""
        at = int(np.argmax(np.nan_to_num(errors[:, 0], nan=np.inf)))
        expert, block = (None, at) if experts is None else experts[at]
        return cls(float(errors[:, 0].max()), float(errors[:, 1].max()), block, expert)

    def passes(self, recipe: str) -> bool:
        """Whether both errors are finite and within :data:`LIMITS`."""
        max_rel, rms_rel = LIMITS[recipe]
        return self.max_rel <= max_rel and self.rms_rel <= rms_rel

    def fields(self, prefix: str = "") -> Row:
        """Return the errors as fields of a row; what is not finite becomes None."""
        values = {"max_rel": self.max_rel, "rms_rel": self.rms_rel}
        return {f"{prefix}{k}": v if np.isfinite(v) else None for k, v in values.items()}


def worst_block(xp: Any, got: Array, want: Float32) -> Worst:
    """Compare a bfloat16 result with the oracle's, in blocks of 64 tokens."""
    return Worst.of(to_host(block_errors(xp, widen(got), want)))


def worst_expert(
    xp: Any, rows: Array, permuted_idx: np.ndarray, ids: np.ndarray, want: Float32
) -> Worst:
    """Compare unweighted rows with the oracle's, expert by expert in blocks of 64 of its rows.

    Raises
    ------
    ValueError
        If two slots share a row or a slot has none.
    """
    index = permuted_idx.ravel()
    if not (
        index.min() >= 0 and index.max() < rows.shape[0] and np.unique(index).size == index.size
    ):
        raise ValueError("permuted_idx: expected a row of its own for every slot")
    bits, errors, places = rows.view(np.uint16), [], []
    for expert, slots in slots_by_expert(ids):
        got = widen(bits.take(xp.asarray(index[slots]), axis=0))
        errors.append(block_errors(xp, got, want.take(xp.asarray(slots), axis=0)))
        places += [(expert, block) for block in range(errors[-1].shape[0])]
    return Worst.of(to_host(xp.concatenate(errors)), places)


def check_float32(xp: Any) -> None:
    """Make sure that matrix products are there and keep float32's last bits, unlike TF32.

    Raises
    ------
    RuntimeError
        If they are not or do not; the message says what to do.
    """
    x, unit = xp.full((256, 256), 1 + 2.0**-20, np.float32), xp.eye(256, dtype=np.float32)
    try:
        product = x @ unit
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(f"the oracle needs cuBLAS (cuda-toolkit[cublas]): {error}") from error
    if float(product.min()) != 1 + 2.0**-20:
        raise RuntimeError("float32 matrix products are not float32: unset CUPY_TF32")


def measure_case(
    xp: Any, shape: ModelShape, layer: MoELayer, bias: Array | None, num_tokens: int, seed: int
) -> tuple[Row, bool]:
    """Return the row of one call and whether its errors pass."""
    weights, recipe = layer.weights, str(layer.weights.recipe)
    x, logits = make_call(shape, num_tokens, xp, seed=seed)
    topk = cumoe.route(logits, shape.routing(), bias=bias)
    rounded, exact = run_oracle(xp, x, topk, weights, shape.activation, rounded=(True, False))
    out = xp.full(x.shape, 0xFFFF, np.uint16).view(x.dtype)  # NaN: what is not written shows
    layer(x, logits, out=out)
    whole = worst_block(xp, out, rounded.out)
    unrounded = worst_block(xp, out, exact.out)
    parts = layer(x, logits, finalize=False)
    ids = to_host(topk.ids)
    expert = worst_expert(xp, parts.rows, to_host(parts.permuted_idx), ids, rounded.rows)
    row = {
        "op": "layer_error",
        "model": shape.name,
        "recipe": recipe,
        "num_tokens": num_tokens,
        "num_gpus": 1,
        **whole.fields(),
        "worst_block": whole.block,
        **expert.fields("expert_"),
        "worst_expert": expert.expert,
        "worst_expert_block": expert.block,
        "num_active_experts": int(np.unique(ids).size),
        **unrounded.fields("unrounded_"),
    }
    return check_row(row), whole.passes(recipe) and expert.passes(recipe)


def measure_model(
    xp: Any, shape: ModelShape, recipe: Recipe, tokens: Sequence[int], seed: int
) -> Iterator[tuple[Row | None, str | None]]:
    """Yield for each number of tokens its row, or None, and what is wrong, or None."""
    weights = make_weights(shape, recipe, xp, seed=seed)
    bias = make_bias(shape, xp, seed=seed)
    layer = make_layer(shape, weights, bias, max(tokens))
    compile_ahead(layer, tokens)
    for num_tokens in tokens:
        name = f"{shape.name} {recipe} T={num_tokens}"
        try:
            row, passes = measure_case(xp, shape, layer, bias, num_tokens, seed)
        except Exception as error:  # the other cases are still worth their time
            traceback.print_exc()
            yield None, f"{name}: {error}"
            if xp is not np:
                xp.cuda.Device().synchronize()  # an error that stays ends the run here
            continue
        yield row, None if passes else f"{name}: over the limits {LIMITS[recipe]}"


def print_row(row: Row) -> None:
    """Print one line of figures."""

    def text(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.2e}"

    print(
        f"{row['model']:<22}{row['recipe']:<10}T={row['num_tokens']:<6}"
        f"max {text(row['max_rel'])}  rms {text(row['rms_rel'])}  (block {row['worst_block']})   "
        f"rows: max {text(row['expert_max_rel'])}  rms {text(row['expert_rms_rel'])}  "
        f"(expert {row['worst_expert']}, block {row['worst_expert_block']})   "
        f"unrounded: max {text(row['unrounded_max_rel'])}  rms {text(row['unrounded_rms_rel'])}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; return 1 if a case fails or is over its limits."""
    args = _parser().parse_args(argv)
    settings = ARGUMENTS.settle(args)
    xp, out = settings.xp, settings.out
    check_float32(xp)
    rows: list[Row] = []
    problems: list[str] = []
    for model in settings.models:
        shape = find_model(model)
        for recipe in args.recipes:
            for row, problem in measure_model(xp, shape, recipe, settings.tokens, args.seed):
                if row is not None:
                    rows.append(row)
                    print_row(row)
                if problem is not None:
                    problems.append(problem)
            if out is not None and rows:  # now, so that a run that is cut off leaves its rows
                write_results(out, rows, seed=args.seed, merge=args.merge, limits=LIMITS)
            free_memory(xp)
    for problem in problems:
        print("FAILED", problem)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    return ARGUMENTS.parser(__doc__)


if __name__ == "__main__":
    raise SystemExit(main())
