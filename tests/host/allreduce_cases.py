"""Cases of the all-reduce kernels: ranks as grids that run together, one call after the other.

Every rank has a stream of its own, so that one may be in its next call while another is still in
this one. All results are compared with the twin to the bit, all ranks with each other, and after
the calls the shared memory must hold nothing but the sentinel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cumoe.arrays import DTYPES, FP8
from cumoe.comm.layout import SENTINEL, STATE_WORDS, block_layout
from cumoe.kernels import Launch, blocks
from cumoe.kernels_comm import AllReduceConfig, PeerMemory, Tokens, allreduce
from cumoe.microscaling import fp4_scale_shape, ue8m0_words
from cumoe.quantize import _whole_columns
from cumoe.reference import allreduce as twin
from tests.host.checks import BF16, F16, F32, Case, Host, same_bits

ALL = ("sum", "result", "norm", "quant")


@dataclass(frozen=True)
class Call:
    """One call of all ranks.

    Attributes
    ----------
    num_tokens : int
    policy, weights, quantize, group
        See :class:`cumoe.kernels_comm.Tokens`.
    columns : int
        Slots of a token, or experts.
    shared, residual, norm, two_shot : bool
    outputs : tuple of str
        Of ``ALL``.
    factor, offset : float
        Of the routed sum, and of the norm's weight.
    config : tuple of int
        Blocks of a cluster, warps, vecs, clusters.
    zeros : float
        Share of the values that are zeros, of either sign.
    cancel : bool
        The second slot of a token is the first with the opposite weight.
    column_major : bool
        Of the scales.
    """

    num_tokens: int
    policy: str = "rows"
    columns: int = 3
    weights: str | None = F32
    shared: bool = True
    residual: bool = True
    norm: bool = True
    quantize: str | None = None
    group: int = 0
    outputs: tuple[str, ...] = ALL
    factor: float = 2.5
    offset: float = 0.0
    config: tuple[int, int, int, int] = (1, 2, 1, 2)
    two_shot: bool = False
    zeros: float = 0.0
    cancel: bool = False
    column_major: bool = False


@dataclass
class _Group:
    """The ranks' shared memory of one case."""

    host: Host
    ranks: int
    hidden: int
    dtype: str
    max_num_tokens: int
    one_shot_tokens: int
    blocks: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = (self.ranks, self.max_num_tokens, self.hidden, self.dtype)
        row_bytes = self.hidden * DTYPES[self.dtype].itemsize
        layout = block_layout(*sizes, one_shot=self.one_shot_tokens * row_bytes)
        self.layout = layout
        words = max(layout.num_bytes // 4, 1)
        for _ in range(self.ranks):
            self.blocks.append(self.host.arena.array(np.full(words, SENTINEL, np.uint32)))
            self.states.append(self.host.arena.array(np.zeros(STATE_WORDS, np.int32)))

    def memory(self, rank: int) -> PeerMemory:
        """Return the blocks as a rank sees them."""
        buffers = tuple(block.ctypes.data for block in self.blocks)
        at = self.layout
        return PeerMemory(
            rank, buffers, self.states[rank], at.buffer_bytes, at.slot_bytes, at.share_bytes,
            at.results_offset,
        )  # fmt: skip

    def check(self) -> None:
        """Assert that only the sentinel is left."""
        for rank, block in enumerate(self.blocks if self.ranks > 1 else ()):
            assert (block == SENTINEL).all(), f"rank {rank}: {(block != SENTINEL).sum()} words left"
        for rank, state in enumerate(self.states):
            assert state[1] == 0 and not state[2:].any(), f"rank {rank}: state {state}"


def _values(host: Host, shape: Sequence[int], dtype: str, zeros: float) -> np.ndarray:
    x = host.rng.standard_normal(shape).astype(DTYPES[dtype])
    chosen = host.rng.random(shape) < zeros
    x[chosen] = np.where(host.rng.random(shape) < 0.5, -0.0, 0.0)[chosen]
    return x


def _rank_inputs(host: Host, group: _Group, call: Call) -> dict[str, Any]:
    """Return what differs from rank to rank."""
    shape = (call.num_tokens, group.hidden)
    given: dict[str, Any] = {}
    if call.policy == "plain":
        return {"rows": host.arena.array(_values(host, shape, group.dtype, call.zeros))}
    if call.policy == "rows":
        count = call.num_tokens * call.columns
        index = host.rng.permutation(count + 3)[:count].astype(np.int32)
        index = index.reshape(call.num_tokens, call.columns)
        index[host.rng.random(index.shape) < 0.3] = -1
        rows = _values(host, (count + 3, group.hidden), group.dtype, call.zeros)
        unused = np.setdiff1d(np.arange(count + 3), index)
        rows[unused] = np.nan
        if call.cancel:
            index[:, 1] = index[:, 0]
        given["permuted_idx"] = host.arena.array(index)
        weights_shape = index.shape
    else:
        weights_shape = (call.columns, call.num_tokens)
        rows = _values(host, (*weights_shape, group.hidden), group.dtype, call.zeros)
    given["rows"] = host.arena.array(rows)
    if call.weights is not None:
        weights = _values(host, weights_shape, call.weights, call.zeros)
        if call.cancel:
            weights[:, 1] = -weights[:, 0]
        given["weights"] = host.arena.array(weights)
    if call.shared:
        given["shared"] = host.arena.array(_values(host, shape, group.dtype, call.zeros))
    return given


def _part(call: Call, given: dict[str, Any]) -> np.ndarray:
    """Return a rank's part by the twin."""
    if call.policy == "plain":
        return twin.part_of_values(given["rows"])
    common = {"routed_scaling_factor": call.factor, "shared": given.get("shared")}
    weights = given.get("weights")
    if call.policy == "rows":
        return twin.part_of_rows(given["rows"], weights, given["permuted_idx"], **common)
    return twin.part_of_experts(given["rows"], weights, **common)


def _outputs(host: Host, group: _Group, call: Call) -> dict[str, Any]:
    shape = (call.num_tokens, group.hidden)
    names = [name for name in call.outputs if name in ("sum", "result", "norm")]
    out = {f"{name}_out": host.empty(shape, group.dtype) for name in names}
    if not call.residual:
        out["result_out"] = out.pop("sum_out", None)
    if not call.norm:
        out.pop("norm_out", None)
    if call.two_shot:
        out.pop("sum_out", None)
    if call.quantize is None:
        return out
    fp4 = call.quantize.startswith("nvfp4")
    values = (shape[0], shape[1] // 2) if fp4 else shape
    out["quant_out"] = host.empty(values, "uint8" if fp4 else FP8)
    if fp4:
        layout = "linear" if call.quantize == "nvfp4" else "swizzled_128x4"
        out["scale_out"] = host.empty(fp4_scale_shape(shape, layout), FP8)
    elif call.quantize == "fp8_ue8m0":
        num_words, stride = ue8m0_words(shape, call.group)
        out["scale_out"] = host.empty((num_words, stride), "int32")[:, : shape[0]].T
    elif call.quantize != "fp8_tensor":
        scale = (shape[0], 1 if call.quantize == "fp8_token" else blocks(shape[1]))
        out["scale_out"] = (
            host.empty(scale[::-1], F32).T if call.column_major else host.empty(scale, F32)
        )
    return out


def _plan(host: Host, group: _Group, call: Call) -> tuple[list[Launch], Callable[[], None]]:
    """Return a launch for each rank, and what compares their results."""
    common: dict[str, Any] = {"eps": 1e-5, "weight_offset": call.offset, "quantize": call.quantize}
    if call.residual:
        shape = (call.num_tokens, group.hidden)
        common["residual"] = host.arena.array(_values(host, shape, group.dtype, call.zeros))
    if call.norm:
        common["norm_weight"] = host.normal((group.hidden,), group.dtype)
    if call.quantize == "fp8_ue8m0":
        common["group_size"] = call.group
    if call.quantize in ("fp8_tensor", "nvfp4", "nvfp4_swizzled"):
        common["quant_scale"] = host.arena.array(np.array([0.037], np.float32))
    given = [_rank_inputs(host, group, call) for _ in range(group.ranks)]
    out = [_outputs(host, group, call) for _ in range(group.ranks)]
    launches = []
    for rank in range(group.ranks if call.num_tokens else 0):
        tokens = Tokens(
            call.policy,
            routed_scaling_factor=call.factor,
            **common,
            **given[rank],
            **out[rank],
        )
        config = AllReduceConfig(*call.config)
        clusters = min(config.num_clusters, call.num_tokens)
        config = replace(config, num_clusters=clusters)
        launches.append(allreduce(tokens, group.memory(rank), config, two_shot=call.two_shot))

    def compare() -> None:
        reduced = twin.reduce_parts([_part(call, g) for g in given], **common)
        expected = {
            "sum_out": reduced.sum,
            "result_out": reduced.result,
            "norm_out": reduced.norm,
            "quant_out": getattr(reduced.quantized, "values", None),
            "scale_out": getattr(reduced.quantized, "scale", None),
        }
        for rank, arrays in enumerate(out):
            for name, got in arrays.items():
                want = expected[name]
                if got is not None and name == "scale_out" and call.quantize == "fp8_ue8m0":
                    stride = ue8m0_words((call.num_tokens, group.hidden), call.group)[1]
                    got, want = _whole_columns(got, stride), _whole_columns(want, stride)
                if got is not None:
                    same_bits(f"rank {rank}, {name}", got, want)

    return launches, compare


def _calls(
    ranks: int, hidden: int, *calls: Call, dtype: str = BF16, tokens: tuple[int, int] = (5, 5)
) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        group = _Group(host, ranks, hidden, dtype, *tokens)
        planned = [_plan(host, group, call) for call in calls]
        streams: list[list[Launch]] = [[] for _ in range(ranks)]
        for launches, _ in planned:
            for stream, launch in zip(streams, launches, strict=bool(launches)):
                stream.append(launch)
        host.run_streams(streams)
        for _, compare in planned:
            compare()
        group.check()

    return check


GROWING = (Call(1), Call(5), Call(2), Call(0), Call(4), Call(1), Call(3))
"""More calls than buffers, with fewer and more tokens."""

MIXED = (
    Call(3, two_shot=True), Call(2), Call(11, two_shot=True), Call(1, two_shot=True), Call(3),
    Call(7, two_shot=True), Call(4, "plain", two_shot=True),
)  # fmt: skip

ALLREDUCE_CASES = [
    Case("one rank", _calls(1, 264, Call(3, quantize="fp8_block"), Call(1, shared=False))),
    Case(
        "one rank, minus zeros",
        _calls(
            1, 72, Call(3, "plain", zeros=0.9, residual=False, norm=False), dtype=F16
        ),
    ),
    Case(
        "rows that cancel",
        _calls(2, 264, Call(4, columns=2, cancel=True, shared=False, residual=False, norm=False)),
    ),
    Case("two ranks, growing and shrinking", _calls(2, 264, *GROWING)),
    Case("three ranks", _calls(3, 504, Call(4), Call(2, quantize="fp8_token"), Call(3), Call(4))),
    Case(
        "four ranks, minus zeros",
        _calls(4, 72, *(Call(3, zeros=0.7, columns=c) for c in (1, 2, 3, 1)), dtype=F16),
    ),
    Case("plain, minus zeros", _calls(2, 72, *(Call(3, "plain", zeros=0.9) for _ in range(4)))),
    Case(
        "plain, float32",
        _calls(
            3, 136,
            *(Call(t, "plain", zeros=0.5, quantize="fp8_block") for t in (2, 5, 1, 3)),
            dtype=F32,
        ),
    ),
    Case("eight ranks", _calls(8, 40, Call(2), Call(1), Call(2, quantize="fp8_tensor"), Call(2))),
    Case("sixteen ranks", _calls(16, 24, *[Call(1, config=(1, 1, 1, 1))] * 4, tokens=(1, 1))),
    Case(
        "experts",
        _calls(2, 264, *(Call(3, "experts", columns=35, weights=w) for w in (F32, None, F32))),
    ),
    Case(
        "more slots than lanes",
        _calls(2, 264, Call(3, columns=61, weights=BF16), Call(2, columns=33, weights=F16)),
    ),
    Case(
        "clusters",
        _calls(
            2, 1544,
            Call(3, config=(4, 2, 1, 3), quantize="fp8_token"),
            Call(5, config=(2, 2, 2, 2), quantize="fp8_block", column_major=True),
            Call(2, config=(7, 1, 1, 1), offset=1.0),
            Call(4, config=(2, 4, 1, 2), quantize="fp8_token", norm=False),
        ),
    ),
    Case(
        "8200 columns",
        _calls(2, 8200, Call(2, config=(1, 17, 2, 1), columns=2), Call(1, config=(8, 3, 2, 1))),
    ),
    Case(
        "small scales",
        _calls(
            2, 336,
            Call(5, quantize="fp8_ue8m0", group=16), Call(3, quantize="nvfp4"),
            Call(2, quantize="nvfp4_swizzled"), Call(1, quantize="nvfp4_swizzled", norm=False),
        ),
    ),
    Case(
        "small scales, wider",
        _calls(
            2, 1152,
            Call(5, quantize="fp8_ue8m0", group=128, config=(2, 3, 1, 2)),
            Call(3, quantize="fp8_ue8m0", group=32, config=(1, 3, 2, 2)),
            Call(4, "plain", quantize="nvfp4_swizzled", config=(5, 1, 1, 2), zeros=0.9),
        ),
    ),
    Case(
        "few outputs",
        _calls(
            2, 136,
            Call(3, outputs=("norm",), config=(1, 1, 1, 2)),
            Call(3, outputs=("quant",), quantize="fp8_token", residual=False),
            Call(3, outputs=("sum",), norm=False, config=(1, 1, 1, 1)),
            Call(3, outputs=("result",), norm=False, shared=False, weights=None),
            Call(2, "plain", outputs=("sum",), residual=False, norm=False),
        ),
    ),
]  # fmt: skip

TWO_SHOT_CASES = [
    Case("two ranks", _calls(2, 264, *MIXED, tokens=(11, 4))),
    Case("three ranks", _calls(3, 264, *MIXED, tokens=(11, 4))),
    Case(
        "four ranks, minus zeros",
        _calls(
            4, 72,
            *(Call(t, zeros=0.7, columns=1, two_shot=True, quantize=q)
              for t, q in ((6, "fp8_block"), (2, "fp8_token"), (9, None), (5, "fp8_tensor"))),
            dtype=F16, tokens=(9, 1),
        ),
    ),
    Case(
        "plain, float32",
        _calls(
            3, 136,
            *(Call(t, "plain", zeros=0.9, two_shot=True, residual=False) for t in (2, 7)),
            *(Call(t, "plain", zeros=0.9, two_shot=True, norm=False) for t in (1, 4)),
            dtype=F32, tokens=(7, 1),
        ),
    ),
    Case(
        "eight ranks",
        _calls(8, 40, *(Call(t, two_shot=True) for t in (9, 3, 8, 1)), tokens=(9, 1)),
    ),
    Case(
        "clusters",
        _calls(
            2, 776,
            Call(5, config=(2, 2, 1, 2), two_shot=True, quantize="fp8_token"),
            Call(3, config=(4, 1, 1, 1), two_shot=True, quantize="fp8_block"),
            Call(6, "experts", config=(2, 1, 2, 2), two_shot=True),
            tokens=(6, 1),
        ),
    ),
    Case("one token each", _calls(3, 40, *[Call(1, two_shot=True)] * 7, tokens=(2, 1))),
]  # fmt: skip
