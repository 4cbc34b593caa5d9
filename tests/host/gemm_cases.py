"""The cases of the grouped GEMMs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cumoe import kernels, kernels_sm90, tuning
from cumoe.arrays import DTYPES, FP8
from cumoe.config import Activation, Array, Quantized
from cumoe.reference import exact, quantize
from cumoe.tuning import (
    FP8_TENSOR,
    SM90_MIN_STAGES,
    GroupedGemmConfig,
    GroupedGemmProblem,
    Sm90Config,
    select_config,
    why_illegal_sm90,
)
from tests.host.activation_cases import PRODUCT
from tests.host.checks import (
    BF16,
    F16,
    F32,
    SMEM_LIMIT,
    Case,
    Host,
    close,
    per_expert_activation,
    random_group,
    valid_rows,
)
from tests.host.tensor_map import encode_tiled


@dataclass(frozen=True)
class _Gemm:
    """A grouped GEMM; `n` counts output columns."""

    dtype: str
    out_dtype: str
    k: int
    n: int
    tile: int
    order: str | None = None
    gather: bool = True
    block_major: bool = False
    tokens: int = 11
    experts: int = 4
    top_k: int = 3
    per_expert: bool = False
    counts: tuple[int, ...] | None = None
    activation: Activation | None = None
    weights: str | None = None  # dtype of the tokens' weights
    num_weighted: int = 2  # of the experts
    scale_stride: int | None = None  # from row to row of the left operand's scales; None: by column

    @property
    def problem(self) -> GroupedGemmProblem:
        """What is multiplied; an activation without an order has no gate."""
        gated = self.order is not None
        activated = self.activation is not None and not gated
        return GroupedGemmProblem(
            self.dtype, self.out_dtype, gated, self.gather, self.tile, activated, self.weights
        )

    def scales(self, host: Host, scale: Array) -> Array:
        """Return the scales of the left operand where the case wants them."""
        if self.scale_stride is None:
            return host.arena.array(scale.T).T
        rows, blocks = scale.shape
        flat = host.empty(((rows - 1) * self.scale_stride + blocks,), F32)
        padded = as_strided(flat, (rows, blocks), (4 * self.scale_stride, 4))
        padded[...] = scale
        return padded

    def check(self, host: Host, launch: Callable[..., kernels.Launch]) -> None:
        """Run what `launch` makes of the operands and compare it with the twin."""
        from cumoe.grouped_gemm import on_host

        n, k, order = self.n, self.k, self.order
        p = random_group(host, self.tokens, self.top_k, self.experts, self.tile, self.counts)
        num_rows = 2 * n if order else n
        count = self.tokens if self.gather else p.max_rows
        a = host.rng.standard_normal((count, k)).astype(np.float32)
        w = host.rng.standard_normal((self.experts, num_rows, k)).astype(np.float32) / np.sqrt(k)
        a_scale = w_scale = None
        if self.dtype == FP8:
            qa = quantize.quantize_fp8_block(a)
            a, a_scale = qa.values, self.scales(host, qa.scale)
            rows = 2 * kernels.blocks(n) if order else kernels.blocks(n)
            scale = host.rng.random((self.experts, rows, kernels.blocks(k))) / 100 + 0.005
            w, w_scale = exact.to_e4m3(w * 100), host.arena.array(scale.astype(np.float32))
        elif self.dtype == FP8_TENSOR:
            # One scale for all tokens, or that of an expert for the rows of an activation.
            scale = host.rng.random(1 if self.gather else self.experts) / 100 + 0.005
            a, a_scale = exact.to_e4m3(a * 100), host.arena.array(scale.astype(np.float32))
            scale = host.rng.random((self.experts, 2 if order else 1)) / 100 + 0.005
            w, w_scale = exact.to_e4m3(w * 100), host.arena.array(scale.astype(np.float32))
        else:
            a, w = a.astype(DTYPES[self.dtype]), w.astype(DTYPES[self.dtype])
        if self.block_major:
            bk = 128 // w.dtype.itemsize
            w = w.reshape(self.experts, num_rows, k // bk, bk).transpose(0, 2, 1, 3)
        a, w = host.arena.array(a), host.arena.array(np.ascontiguousarray(w))
        operand = kernels.GemmOperand(w, w_scale, num_rows, k, self.block_major, order)
        act = self.activation or Activation()
        if self.per_expert:
            act = per_expert_activation(host, self.experts)
        tensors = self.out_dtype == FP8_TENSOR
        y = host.empty((p.max_rows, n), FP8 if tensors else self.out_dtype)
        y_scale = None
        if self.out_dtype == FP8:
            y_scale = host.empty((p.max_rows, kernels.blocks(n)), F32)
        elif tensors:
            y_scale = host.rng.random(self.experts) / 50 + 0.003
            y_scale = host.arena.array(y_scale.astype(np.float32))
        weights = None
        if self.weights is not None:
            values = host.rng.random((self.tokens, 2)) + 0.3
            values = host.arena.array(values.astype(DTYPES[self.weights]))
            weights = kernels.TokenWeights(values, self.num_weighted)
        made = launch(a, a_scale, operand, y, y_scale, p, act, weights)
        host.run(made)
        assert not any(queue.any() for queue in made.owned), "queue: not as it was found"
        expected = on_host(
            a, a_scale, operand, p, act, self.problem, n, y_scale if tensors else None, weights
        )
        held = valid_rows(p)
        if isinstance(expected, Quantized):
            assert y_scale is not None
            close("scale", y_scale[held], expected.scale[held], F32)
            got, want = (
                quantize.dequantize(Quantized(v[held], s[held]))
                for v, s in ((y, y_scale), (expected.values, expected.scale))
            )
        else:
            got, want = y[held], expected[held]
        close("y", got, want, FP8 if tensors else self.out_dtype)
        padding = np.flatnonzero(p.token_idx < 0)
        assert (y[padding].view(np.uint8) == 0xFF).all(), "y: padding rows were written"
        if y_scale is not None and not tensors:
            assert np.isnan(y_scale[padding]).all(), "scale: padding rows were written"


def _gemm(
    dtype: str, out_dtype: str, *, config: GroupedGemmConfig | None = None, **sizes: Any
) -> Callable[[Host], None]:
    """``sm80_grouped_gemm``."""
    gemm = _Gemm(dtype, out_dtype, **sizes)
    problem = gemm.problem

    def launch(a, a_scale, operand, y, y_scale, p, act, weights):  # type: ignore[no-untyped-def]
        chosen = config or select_config(problem, SMEM_LIMIT)
        arrays = (a, a_scale, operand, y, y_scale, p)
        return kernels.grouped_gemm(*arrays, problem, chosen, act, weights)

    return lambda host: gemm.check(host, launch)


def gemm90(
    dtype: str,
    *,
    num_stages: int | None = None,
    num_chunks: int | None = None,
    block_n: int | None = None,
    cluster: int = 1,
    num_sms: int = 4,
    counts: tuple[int, ...] | None = None,
    **sizes: Any,
) -> Callable[[Host], None]:
    """``sm90_grouped_gemm`` and ``sm90_fp8_grouped_gemm``; a cluster takes `tile` tokens.

    By default a layer's: with an activation rows are gathered. The pipelines are as shallow as
    they may be.
    """
    gated = sizes.get("order") is not None
    activated = gated or "activation" in sizes
    sizes = {"gather": activated, **sizes}
    if counts is not None:
        sizes |= {"counts": counts, "tokens": sum(counts), "experts": len(counts), "top_k": 1}
    gemm = _Gemm(dtype, dtype if activated else BF16, **sizes)
    block_n = block_n or gemm.tile // cluster
    fewest, _ = tuning._sm90_chunks(block_n, gemm.problem)
    stages = num_stages or SM90_MIN_STAGES[dtype]
    chosen = Sm90Config(block_n, stages, num_chunks or fewest, cluster)
    reason = why_illegal_sm90(chosen, gemm.problem)
    assert reason is None, reason

    def launch(a, a_scale, operand, y, y_scale, p, act, weights):  # type: ignore[no-untyped-def]
        with mock.patch("cumoe.kernels_sm90.encode_tiled", encode_tiled):
            made = kernels_sm90.grouped_gemm(
                a, a_scale, operand, y, y_scale, p, gemm.problem, chosen, act, num_sms, weights
            )
        made.spec = kernels.with_activation(made.spec, act)
        return made

    return lambda host: gemm.check(host, launch)


TENSOR = FP8_TENSOR


def _config(*sizes: int) -> GroupedGemmConfig:
    return GroupedGemmConfig(*sizes)


GEMM_CASES = [
    Case("bf16 gated", _gemm(BF16, BF16, k=200, n=72, tile=16, order="gate_up")),
    Case(
        "bf16 gated interleaved",
        _gemm(BF16, F32, k=64, n=40, tile=32, order="up_gate_interleaved", per_expert=True),
    ),
    Case("bf16 plain", _gemm(BF16, BF16, k=136, n=136, tile=16, gather=False)),
    Case("bf16 short k", _gemm(BF16, F32, k=8, n=8, tile=16, tokens=1, top_k=1, experts=1)),
    Case(
        "f16 block-major, tall tile",
        _gemm(F16, F16, k=128, n=136, tile=64, block_major=True, tokens=50),
    ),
    Case(
        "bf16 tile 128",
        _gemm(BF16, BF16, k=72, n=24, tile=128, order="gate_up", tokens=60, experts=2),
    ),
    Case(
        "fp8 gated to fp8",
        _gemm(FP8, FP8, k=272, n=136, tile=16, order="up_gate", per_expert=True),
    ),
    Case(
        "fp8 gated to fp8, interleaved, two tiles",
        _gemm(FP8, FP8, k=144, n=48, tile=32, order="gate_up_interleaved", tokens=40),
    ),
    Case("fp8 plain", _gemm(FP8, BF16, k=144, n=264, tile=16, gather=False)),
    Case(
        "fp8 block-major, tile 64",
        _gemm(FP8, BF16, k=384, n=40, tile=64, gather=False, block_major=True, tokens=50),
    ),
    Case(
        "fp8 relu2 to fp8",
        _gemm(FP8, FP8, k=272, n=144, tile=16, activation=Activation("relu2")),
    ),
    Case(
        "bf16 silu",
        _gemm(BF16, BF16, k=72, n=136, tile=32, tokens=40, activation=Activation("silu")),
    ),
    Case(
        "bf16 geglu",
        _gemm(BF16, BF16, k=72, n=40, tile=16, order="up_gate", activation=Activation("geglu")),
    ),
    Case(
        "fp8 situ to fp8",
        _gemm(
            FP8,
            FP8,
            k=144,
            n=48,
            tile=16,
            order="gate_up",
            activation=Activation("situ", alpha=4, beta=25, limit=3),
        ),
    ),
    Case(
        "bf16 user's activation",
        _gemm(BF16, F32, k=72, n=40, tile=16, order="gate_up", activation=PRODUCT),
    ),
    Case(
        "fp8 tensor gated to fp8",
        _gemm(TENSOR, TENSOR, k=272, n=136, tile=16, order="up_gate", per_expert=True),
    ),
    Case(
        "fp8 tensor, weights of tokens",
        _gemm(
            TENSOR, TENSOR, k=144, n=48, tile=32, order="gate_up_interleaved", tokens=40,
            weights=BF16,
        ),
    ),
    Case(
        "fp8 tensor relu2, weights of tokens, block-major",
        _gemm(
            TENSOR, TENSOR, k=256, n=144, tile=64, activation=Activation("relu2"),
            block_major=True, tokens=70, weights=F32,
        ),
    ),
    Case(
        "fp8 tensor plain, tile 128",
        _gemm(TENSOR, BF16, k=144, n=264, tile=128, gather=False, tokens=60, experts=2),
    ),
    Case(
        "two stages, other warps",
        _gemm(FP8, F32, k=640, n=72, tile=32, config=_config(32, 64, 2, 2, 2)),
    ),
]  # fmt: skip

# Rows an expert gets: none, and every remainder of eight in one tile of 24 or more.
REMAINDERS = (0, 1, 10, 19, 28, 37, 46, 55, 0, 64)

# k is given in elements: a stage has 128 bytes of it.
GEMM90_FP8_CASES = [
    Case("gated", gemm90(FP8, k=272, n=144, tile=16, order="up_gate", per_expert=True)),
    Case(
        "gated interleaved",
        gemm90(FP8, k=144, n=48, tile=32, order="gate_up_interleaved", tokens=40),
    ),
    Case(
        "gated interleaved, up first, rows in order",
        gemm90(FP8, k=400, n=80, tile=24, order="up_gate_interleaved", gather=False),
    ),
    Case("plain", gemm90(FP8, k=144, n=264, tile=16)),
    Case("plain, gathered", gemm90(FP8, k=272, n=264, tile=40, gather=True, tokens=40)),
    Case("block-major", gemm90(FP8, k=384, n=40, tile=64, block_major=True, tokens=50)),
    Case(
        "gated, block-major",
        gemm90(FP8, k=256, n=144, tile=8, block_major=True, order="gate_up"),
    ),
    Case(
        "gated, tile 88",
        gemm90(FP8, k=128, n=80, tile=88, order="gate_up", tokens=70, experts=2, num_chunks=3),
    ),
    Case("columns, gated", gemm90(FP8, k=144, n=80, tile=88, order="up_gate", counts=(32, 33, 88))),
    Case("plain, tile 80", gemm90(FP8, k=144, n=136, tile=80, tokens=60, experts=2)),
    Case(
        "one token",
        gemm90(FP8, k=128, n=128, tile=8, order="gate_up", tokens=1, top_k=1, experts=1),
    ),
    Case("every remainder", gemm90(FP8, k=144, n=40, tile=24, counts=REMAINDERS)),
    Case(
        "every remainder, gated",
        gemm90(FP8, k=144, n=80, tile=72, order="up_gate", counts=REMAINDERS, num_chunks=4),
    ),
    Case(
        "one block, several tiles",
        gemm90(FP8, num_sms=1, num_chunks=2, k=640, n=272, tile=24, tokens=30, experts=3),
    ),
    Case(
        "one block, several tiles, gated",
        gemm90(FP8, num_sms=1, k=640, n=272, tile=24, order="gate_up", tokens=30, experts=3),
    ),
    Case(
        "one block, several tiles, short k",
        gemm90(FP8, num_sms=1, k=128, n=272, tile=32, order="gate_up", tokens=40, experts=3),
    ),
    Case("scales in rows", gemm90(FP8, k=1168, n=40, tile=40, scale_stride=12)),
    Case("scales in unaligned rows", gemm90(FP8, k=640, n=40, tile=40, scale_stride=5)),
    Case(
        "clusters, gated",
        gemm90(FP8, cluster=2, k=272, n=144, tile=48, order="gate_up", tokens=60),
    ),
    Case("clusters, plain", gemm90(FP8, cluster=2, k=640, n=264, tile=96, tokens=60)),
    Case(
        "clusters, few rows",
        gemm90(FP8, cluster=2, num_sms=2, k=640, n=136, tile=48, counts=(3, 0, 99, 8, 1)),
    ),
    Case(
        "clusters, few rows, gated",
        gemm90(
            FP8, cluster=2, num_sms=4, k=144, n=144, tile=48, order="up_gate_interleaved",
            counts=(3, 0, 99, 8, 1),
        ),
    ),
    Case(
        "clusters that take more than a tile",
        gemm90(FP8, cluster=2, k=144, n=40, tile=8, block_n=8, gather=True, counts=(8,)),
    ),
    Case(
        "clusters that take more than a tile, rows in order",
        gemm90(FP8, cluster=2, num_sms=12, k=144, n=272, tile=8, block_n=8, counts=(40, 3)),
    ),
    Case("activated", gemm90(FP8, k=272, n=272, tile=40, activation=Activation("relu2"))),
    Case(
        "activated, one block, several tiles",
        gemm90(
            FP8, num_sms=1, k=144, n=400, tile=24, tokens=30, activation=Activation("silu")
        ),
    ),
    Case(
        "geglu_tanh",
        gemm90(
            FP8, k=272, n=144, tile=16, order="up_gate", activation=Activation("geglu_tanh")
        ),
    ),
]  # fmt: skip

GEMM90_CASES = [
    Case("gated", gemm90(BF16, k=136, n=144, tile=16, order="up_gate", per_expert=True)),
    Case(
        "gated interleaved",
        gemm90(BF16, k=72, n=48, tile=32, order="gate_up_interleaved", tokens=40),
    ),
    Case(
        "gated interleaved, up first, rows in order",
        gemm90(BF16, k=200, n=200, tile=24, order="up_gate_interleaved", gather=False),
    ),
    Case("plain", gemm90(BF16, k=72, n=264, tile=16)),
    Case("plain, gathered", gemm90(BF16, k=136, n=264, tile=40, gather=True, tokens=40)),
    Case("block-major", gemm90(BF16, k=192, n=40, tile=64, block_major=True, tokens=50)),
    Case(
        "gated, block-major",
        gemm90(BF16, k=128, n=136, tile=8, block_major=True, order="gate_up"),
    ),
    Case(
        "gated, tile 112",
        gemm90(BF16, k=64, n=80, tile=112, order="gate_up", tokens=70, experts=2),
    ),
    Case("plain, tile 176", gemm90(BF16, k=72, n=136, tile=176, tokens=140, experts=2)),
    Case("columns", gemm90(BF16, k=72, n=40, tile=128, counts=(32, 33, 64, 65, 80, 81, 112, 113))),
    Case(
        "one token",
        gemm90(BF16, k=64, n=128, tile=8, order="gate_up", tokens=1, top_k=1, experts=1),
    ),
    Case("every remainder", gemm90(BF16, k=72, n=40, tile=24, counts=REMAINDERS)),
    Case(
        "every remainder, gated",
        gemm90(BF16, k=72, n=80, tile=72, order="up_gate", counts=REMAINDERS),
    ),
    Case(
        "one block, several tiles",
        gemm90(BF16, num_sms=1, num_chunks=2, k=320, n=272, tile=40, tokens=30, experts=3),
    ),
    Case(
        "one block, several tiles, gated",
        gemm90(BF16, num_sms=1, k=320, n=272, tile=40, order="gate_up", tokens=30, experts=3),
    ),
    Case(
        "one block, several tiles, short k",
        gemm90(BF16, num_sms=1, k=64, n=272, tile=32, order="gate_up", tokens=40, experts=3),
    ),
    Case(
        "clusters, gated",
        gemm90(BF16, cluster=2, k=136, n=144, tile=48, order="gate_up", tokens=60),
    ),
    Case("clusters, plain", gemm90(BF16, cluster=2, k=320, n=264, tile=96, tokens=60)),
    Case(
        "clusters, few rows",
        gemm90(BF16, cluster=2, num_sms=2, k=320, n=136, tile=48, counts=(3, 0, 99, 8, 1)),
    ),
    Case(
        "clusters, few rows, gated",
        gemm90(
            BF16, cluster=2, num_sms=4, k=72, n=136, tile=48, order="up_gate_interleaved",
            counts=(3, 0, 99, 8, 1),
        ),
    ),
    Case("silu", gemm90(BF16, k=136, n=264, tile=40, activation=Activation("silu"))),
    Case(
        "geglu",
        gemm90(BF16, k=72, n=136, tile=16, order="up_gate", activation=Activation("geglu")),
    ),
    Case(
        "fp8 gated",
        gemm90(TENSOR, k=272, n=144, tile=16, order="up_gate", per_expert=True),
    ),
    Case("fp8 plain", gemm90(TENSOR, k=272, n=264, tile=40, tokens=40)),
    Case("fp8 plain, gathered", gemm90(TENSOR, k=144, n=264, tile=112, gather=True, tokens=90)),
    Case(
        "fp8 gated interleaved, weights of tokens",
        gemm90(
            TENSOR, k=144, n=48, tile=48, order="gate_up_interleaved", tokens=60, weights=F32
        ),
    ),
    Case(
        "fp8 gated, rows in order",
        gemm90(TENSOR, k=272, n=208, tile=40, order="gate_up", gather=False, num_chunks=2),
    ),
    Case(
        "fp8 every remainder, gated",
        gemm90(
            TENSOR, k=144, n=80, tile=72, order="up_gate", counts=REMAINDERS, weights=BF16,
            num_weighted=8,
        ),
    ),
    Case(
        "fp8 one block, several tiles, gated",
        gemm90(TENSOR, num_sms=1, k=640, n=272, tile=40, order="gate_up", tokens=30, experts=3),
    ),
    Case(
        "fp8 clusters, gated",
        gemm90(TENSOR, cluster=2, k=272, n=144, tile=48, order="gate_up", tokens=60),
    ),
    Case(
        "fp8 relu2, block-major",
        gemm90(
            TENSOR, k=256, n=272, tile=40, activation=Activation("relu2"), block_major=True,
            weights=BF16, num_weighted=3,
        ),
    ),
    Case(
        "fp8 silu, rows in order, one block",
        gemm90(
            TENSOR, num_sms=1, k=144, n=400, tile=24, tokens=30, gather=False,
            activation=Activation("silu"), num_chunks=2,
        ),
    ),
    Case("fp8 plain, tile 176", gemm90(TENSOR, k=144, n=136, tile=176, tokens=140, experts=2)),
]  # fmt: skip
