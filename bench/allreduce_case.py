"""All-reduces to be timed: their inputs, their answers by the NumPy twin, and what they replace.

A case is one op with the arrays of one rank. Its answer is compared to the bit with the twin, whose
parts every rank makes of its own inputs, for all tokens or a sample of them; and all ranks must
have the same bits of all tokens. Nothing here times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import cumoe
from bench.inputs import random_bf16, to_backend, to_host
from bench.ranks import Ranks
from cumoe.arrays import dtype_name, empty
from cumoe.comm import (
    AllReduced,
    Epilogue,
    Quantization,
    allreduce,
    finalize_allreduce,
    reduce_allreduce,
)
from cumoe.config import Array
from cumoe.reference import allreduce as twin

TOP_K, NUM_EXPERTS = 8, 8
EPS = 1e-6
CHECKED_WHOLE = 128
"""Most tokens of which all are compared with the twin; of more, `SAMPLE`."""
SAMPLE = 64
BF16_HALF_STEP = 2.0**-8

Part = Callable[[np.ndarray], np.ndarray]
"""Returns this rank's part of some tokens, by the twin."""


@dataclass(eq=False)
class Case:
    """One op of one rank.

    Attributes
    ----------
    num_tokens : int
    fused : callable
        Takes `outputs` or `out` and runs the op.
    part : callable
        This rank's part of given tokens, by the twin.
    epilogue : Epilogue or None
    outputs : tuple of str
        What is timed.
    local : callable or None
        Writes this rank's part to an array: the first step of the peer. None if it is given.
    given : array or None
        The part of an op that is given one.
    """

    num_tokens: int
    fused: Callable[..., AllReduced]
    part: Part
    epilogue: Epilogue | None
    outputs: tuple[str, ...]
    local: Callable[[Array], object] | None = None
    given: Array | None = None


def finalize_case(ranks: Ranks, num_tokens: int, quantization: str | None, seed: int) -> Case:
    """Draw a call of finalize_allreduce: top 8, float32 weights, shared output, residual, norm."""
    xp, tokens = ranks.xp, num_tokens
    slots = tokens * TOP_K
    rng = np.random.default_rng([seed, tokens, ranks.group.rank])
    key = (seed, tokens, 1 + ranks.group.rank)
    # The peer's finalize takes the shared output as one more slot of weight 1, at no extra kernel.
    both = random_bf16(xp, (slots + tokens, ranks.hidden_size), *key)
    rows, shared = both[:slots], both[slots:]
    weights = rng.random((tokens, TOP_K), np.float32)
    index = rng.permutation(slots).astype(np.int32).reshape(tokens, TOP_K)
    last = np.arange(slots, slots + tokens, dtype=np.int32)[:, None]
    more = xp.asarray(np.hstack([index, last]))
    more_weights = xp.asarray(np.hstack([weights, np.ones((tokens, 1), np.float32)]))
    own_weights, own_index = xp.asarray(weights), xp.asarray(index)
    epilogue = make_epilogue(ranks, tokens, quantization, seed)

    def fused(**options: Any) -> AllReduced:
        return finalize_allreduce(
            rows,
            own_weights,
            own_index,
            ranks.memory,
            shared_output=shared,
            epilogue=epilogue,
            **options,
        )

    def part(chosen: np.ndarray) -> np.ndarray:
        return part_of_rows(rows, weights, index, chosen, shared=take(shared, chosen))

    def local(out: Array) -> None:
        cumoe.finalize(both, more_weights, more, out=out)

    last_output = "norm" if quantization is None else "quantized"
    return Case(tokens, fused, part, epilogue, ("residual", last_output), local)


def reduce_case(ranks: Ranks, num_tokens: int, seed: int) -> Case:
    """Draw a call of reduce_allreduce: 8 experts, else as :func:`finalize_case`."""
    xp, tokens = ranks.xp, num_tokens
    rng = np.random.default_rng([seed, tokens, ranks.group.rank])
    key = (seed, tokens, 1 + ranks.group.rank)
    rows = random_bf16(xp, (NUM_EXPERTS, tokens, ranks.hidden_size), *key)
    shared = random_bf16(xp, (tokens, ranks.hidden_size), *key, 1)
    weights = rng.random((NUM_EXPERTS, tokens), np.float32)
    own_weights = xp.asarray(weights)
    epilogue = make_epilogue(ranks, tokens, None, seed)

    def fused(**options: Any) -> AllReduced:
        return reduce_allreduce(
            rows, own_weights, ranks.memory, shared_output=shared, epilogue=epilogue, **options
        )

    def part(chosen: np.ndarray) -> np.ndarray:
        held = np.stack([take(rows[e], chosen) for e in range(NUM_EXPERTS)])
        return twin.part_of_experts(held, weights[:, chosen], shared=take(shared, chosen))

    def local(out: Array) -> None:
        done = AllReduced(sum=out)
        reduce_allreduce(rows, own_weights, ranks.alone, shared_output=shared, out=done)

    return Case(tokens, fused, part, epilogue, ("residual", "norm"), local)


def plain_case(ranks: Ranks, num_tokens: int, seed: int) -> Case:
    """Draw a call of allreduce without an epilogue."""
    shape = (num_tokens, ranks.hidden_size)
    x = random_bf16(ranks.xp, shape, seed, num_tokens, 1 + ranks.group.rank)
    return Case(
        num_tokens,
        lambda **options: allreduce(x, ranks.memory, **options),
        lambda chosen: twin.part_of_values(take(x, chosen)),
        None,
        ("sum",),
        given=x,
    )


def make_epilogue(ranks: Ranks, num_tokens: int, quantization: str | None, seed: int) -> Epilogue:
    """Draw residual and norm weights, the same on every rank."""
    xp, hidden = ranks.xp, ranks.hidden_size
    residual = random_bf16(xp, (num_tokens, hidden), seed, num_tokens, 0)
    weight = np.random.default_rng(seed).uniform(0.5, 1.5, hidden).astype(np.float32)
    norm_weight = to_backend(weight.astype(np.dtype(residual.dtype)), xp)
    wanted = None if quantization is None else Quantization(quantization)  # type: ignore[arg-type]
    return Epilogue(residual, norm_weight, EPS, quantization=wanted)


@dataclass(eq=False)
class Chain:
    """What the op replaces: this rank's part, an all-reduce in place, and what follows."""

    case: Case
    ranks: Ranks
    part: Array
    out: AllReduced

    @classmethod
    def of(cls, case: Case, ranks: Ranks) -> Chain:
        """Make the arrays between the steps."""
        made = case.fused(outputs=case.outputs)
        _, like = next(arrays_of(made))
        return cls(case, ranks, empty(like, like.shape, dtype_name(like)), empty_like(made))

    def run(self) -> None:
        """Run all steps."""
        case, reducer = self.case, self.ranks.reducer
        assert reducer is not None
        if case.local is None:
            assert self.out.sum is not None
            reducer(case.given, self.out.sum)
            return
        case.local(self.part)
        reducer(self.part, self.part)
        allreduce(self.part, self.ranks.alone, epilogue=case.epilogue, out=self.out)

    def reduce(self) -> None:
        """Run the all-reduce alone; not in place, so that nothing grows."""
        reducer = self.ranks.reducer
        assert reducer is not None
        source = self.part if self.case.given is None else self.case.given
        reducer(source, self.sum())

    def sum(self) -> Array:
        """Return the array that receives the sum, with the residual if there is one."""
        found = self.out.sum if self.out.residual is None else self.out.residual
        assert found is not None
        return found


def check_case(case: Case, ranks: Ranks) -> AllReduced:
    """Compare the op with the twin, with all its outputs and with those that are timed.

    Collective. Returns the outputs that are timed.

    Raises
    ------
    ArithmeticError
        On every rank, if a bit of one differs from the twin's or from another rank's.
    """
    chosen = checked_tokens(case.num_tokens)
    parts = ranks.group.allgather(case.part(chosen))
    want = reduced(parts, case.epilogue, chosen)
    everything = ("sum",)
    if case.epilogue is not None:
        wide = case.epilogue.quantization is not None
        everything = ("sum", "residual", "norm", *(("quantized",) if wide else ()))
    for outputs in (everything, case.outputs):
        out = case.fused(outputs=outputs)
        poison(out)
        case.fused(out=out)
        check_outputs(out, want, chosen, ranks)
    return out


def check_chain(chain: Chain) -> None:
    """Compare the peer's sum with that of the twin: it rounds once more for each rank.

    Raises
    ------
    ArithmeticError
        On every rank, if one is further off than the roundings allow.
    """
    case, ranks = chain.case, chain.ranks
    chosen = checked_tokens(case.num_tokens)
    parts = ranks.group.allgather(case.part(chosen))
    want = reduced(parts, case.epilogue, chosen)
    poison(chain.out)
    chain.run()
    size = sum(np.abs(part.astype(np.float32)) for part in parts)
    if case.epilogue is not None:
        size = size + np.abs(take(case.epilogue.residual, chosen).astype(np.float32))
    error = take(chain.sum(), chosen).astype(np.float32) - want.result.astype(np.float32)
    bound = (ranks.group.size + 2) * BF16_HALF_STEP * size
    good = bool((np.abs(error) <= bound).all())
    ranks.agree(None if good else "wrong answer of the peer")


def reduced(
    parts: Sequence[np.ndarray], epilogue: Epilogue | None, chosen: np.ndarray
) -> twin.Reduced:
    """Return the twin's answer for some tokens."""
    if epilogue is None:
        return twin.reduce_parts(parts)
    wanted = epilogue.quantization
    return twin.reduce_parts(
        parts,
        residual=take(epilogue.residual, chosen),
        norm_weight=to_host(epilogue.norm_weight),
        eps=epilogue.eps,
        quantize=None if wanted is None else wanted.format,
    )


def check_outputs(out: AllReduced, want: twin.Reduced, chosen: np.ndarray, ranks: Ranks) -> None:
    """Compare outputs with the twin's answer for some tokens, and whole between ranks; collective.

    Raises
    ------
    ArithmeticError
        On every rank.
    """
    expected: dict[str, Any] = {"sum": want.sum, "residual": want.result, "norm": want.norm}
    if want.quantized is not None:
        expected |= {"values": want.quantized.values, "scale": want.quantized.scale}
    problem, digests = None, {}
    for name, array in arrays_of(out):
        host = to_host(bits(array))
        digests[name] = hashlib.sha256(host.tobytes()).hexdigest()
        wrong = (host[chosen] != bits(np.ascontiguousarray(expected[name]))).any(axis=1)
        if wrong.any() and problem is None:
            first = int(chosen[np.flatnonzero(wrong)[0]])
            problem = (
                f"wrong answer: {name} of {int(wrong.sum())} of {chosen.size} tokens differs from "
                f"the twin's, first that of token {first}"
            )
    ranks.agree(problem)
    found = ranks.group.allgather(digests)
    different = [name for name in digests if any(d[name] != digests[name] for d in found)]
    if different:
        raise ArithmeticError(f"wrong answer: ranks have different bits of {', '.join(different)}")


def checked_tokens(num_tokens: int) -> np.ndarray:
    """Return the tokens that are compared: all, or some with the first and the last."""
    if num_tokens <= CHECKED_WHOLE:
        return np.arange(num_tokens)
    return np.unique(np.linspace(0, num_tokens - 1, SAMPLE).astype(np.int64))


def arrays_of(out: AllReduced) -> Iterator[tuple[str, Array]]:
    """Yield the arrays that are there, by name."""
    for name in ("sum", "residual", "norm"):
        array = getattr(out, name)
        if array is not None:
            yield name, array
    if out.quantized is not None:
        yield "values", out.quantized.values
        yield "scale", out.quantized.scale


def empty_like(out: AllReduced) -> AllReduced:
    """Return new arrays like those of `out`, whose quantised one has scales of its own."""

    def new(array: Array | None) -> Any:
        return None if array is None else empty(array, array.shape, dtype_name(array))

    quantized: Any = out.quantized
    if quantized is not None:
        quantized = cumoe.Quantized(
            new(quantized.values), new(quantized.scale), block=quantized.block
        )
    return AllReduced(new(out.sum), new(out.residual), new(out.norm), quantized)


def poison(out: AllReduced) -> None:
    """Fill every array with ones, a NaN in most dtypes."""
    for _, array in arrays_of(out):
        words = bits(array)
        words.fill(words.dtype.type(np.iinfo(words.dtype).max))


def bits(x: Array) -> Array:
    """Return an array as unsigned integers of the same size."""
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def take(x: Array, index: np.ndarray) -> np.ndarray:
    """Return some rows of a two-dimensional array, on the host."""
    if isinstance(x, np.ndarray):
        return x[index]
    import cupy

    return to_host(bits(x).take(cupy.asarray(index), axis=0)).view(x.dtype)


def part_of_rows(
    rows: Array,
    weights: Array,
    index: Array,
    chosen: np.ndarray,
    *,
    shared: np.ndarray | None = None,
) -> np.ndarray:
    """Return this rank's part of some tokens, by the twin, from no more rows than it takes."""
    slots = take(index, chosen)
    held = slots >= 0
    there = np.where(held, np.cumsum(held).reshape(held.shape) - 1, -1).astype(np.int32)
    own = take(rows, slots[held]) if held.any() else np.zeros((0, rows.shape[1]), rows.dtype)
    return twin.part_of_rows(own, take(weights, chosen), there, shared=shared)
