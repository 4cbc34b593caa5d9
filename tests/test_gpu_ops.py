"""Every op's kernels against their NumPy twins: all configurations, all dtypes, every row count."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cumoe
from cumoe import Activation, ExpertShard, Quantized, kernels, kernels_sm90, tuning
from cumoe.launch import current_device
from cumoe.layouts import GATE_UP_ORDERS
from cumoe.tuning import GroupedGemmProblem
from tests.helpers import (
    BF16,
    DTYPES,
    F32,
    FP8,
    Poisoned,
    assert_close_blocks,
    assert_same_bits,
    dequantized,
    precompile,
    to_backend,
    to_host,
)

pytestmark = pytest.mark.gpu

FLOATS = ("bfloat16", "float16", "float32")


class TestPermutation:
    SETTINGS = [
        (8, 2, 16, 0, None),
        (256, 8, 64, 1, None),
        (60, 4, 128, 2, ExpertShard.from_counts([22, 22, 16], 1)),
        (2048, 8, 1, 0, None),
        (64, 6, 32, 0, ExpertShard(40, 0)),
    ]

    @staticmethod
    def check(ids, num_experts, tile, shared, shard):
        options = {
            "num_experts": num_experts,
            "num_shared_experts": shared,
            "shard": shard,
            "tile": tile,
        }
        want = cumoe.group(ids, **options)
        got = to_host(cumoe.group(to_backend(ids, "cupy"), **options))
        for name, expected in want._asdict().items():
            np.testing.assert_array_equal(getattr(got, name), expected, err_msg=name)

    @pytest.mark.parametrize(("num_experts", "top_k", "tile", "shared", "shard"), SETTINGS)
    def test_every_number_of_tokens(self, rng, num_experts, top_k, tile, shared, shard):
        most = num_experts + shared + 2
        ids = rng.integers(-1, most, (257, top_k)).astype(np.int32)
        ids[::2, 0] = num_experts // 2
        for count in range(258):
            self.check(ids[:count].copy(), num_experts, tile, shared, shard)

    @pytest.mark.parametrize("count", [511, 512, 513, 4096, 20_011])
    @pytest.mark.parametrize("tile", [16, 128])
    def test_many_slots(self, rng, count, tile):
        """More slots than a chunk and more than a block, skewed to a few experts."""
        ids = (rng.exponential(20, (count, 8)) % 256).astype(np.int32)
        self.check(ids, 256, tile, 0, None)
        self.check(np.full((count, 8), 255, np.int32), 256, tile, 0, None)

    def test_repeats(self, rng):
        ids = to_backend(rng.integers(0, 256, (4096, 8)).astype(np.int32), "cupy")
        first = to_host(cumoe.group(ids, num_experts=256, tile=64))
        for _ in range(3):
            again = to_host(cumoe.group(ids, num_experts=256, tile=64))
            for expected, got in zip(first[:-1], again[:-1], strict=True):
                np.testing.assert_array_equal(got, expected)


class TestQuantize:
    @staticmethod
    def values(rng, shape, dtype):
        """Draw numbers of all magnitudes, among them halves of steps, NaN and infinities."""
        x = rng.standard_normal(shape) * np.exp2(rng.integers(-20, 14, shape[-1]))
        x[..., 1::3] = rng.integers(-448, 449, x[..., 1::3].shape) * 0.25
        x = x.astype(DTYPES[dtype])
        flat = x.reshape(-1, shape[-1])
        flat[1::5, 7], flat[2::5, 100:], flat[3::5, 9] = np.nan, 0, -np.inf
        return x

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("columns", [128, 136, 720, 7168])
    def test_activations(self, rng, dtype, columns):
        for count in (1, 15, 16, 17, 129):
            x = self.values(rng, (count, columns), dtype)
            blocks = -(-columns // 128)
            values = Poisoned((count, columns), FP8, "cupy")
            scale = Poisoned((count, blocks), F32, "cupy", column_major=count % 2 == 0)
            out = Quantized(values.array, scale.array)
            cumoe.quantize_fp8_block(to_backend(x, "cupy"), out=out)
            values.check_guards()
            scale.check_guards()
            want = cumoe.quantize_fp8_block(x)
            assert_same_bits(to_host(out).values, want.values)
            np.testing.assert_array_equal(to_host(scale.array), want.scale)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", [(1, 128, 128), (3, 96, 136), (2, 257, 720)])
    def test_weights(self, rng, dtype, shape):
        w = self.values(rng, shape, dtype)
        got = to_host(cumoe.quantize_fp8_block_weights(to_backend(w, "cupy")))
        want = cumoe.quantize_fp8_block_weights(w)
        assert_same_bits(got.values, want.values)
        assert_same_bits(got.scale, want.scale)
        # Numbers, not bits: a NaN times a scale has a payload of its own on each side.
        wide = to_host(cumoe.dequantize(to_backend(want, "cupy")))
        np.testing.assert_array_equal(wide, cumoe.dequantize(want))


class TestActivate:
    @pytest.mark.parametrize("out_dtype", [*FLOATS, FP8.name])
    @pytest.mark.parametrize("dtype", [*FLOATS, FP8.name])
    @pytest.mark.parametrize("size", [48, 1408])
    def test_against_twin(self, rng, size, dtype, out_dtype):
        ids = np.stack([rng.permutation(5)[:2] for _ in range(150)]).astype(np.int32)
        p = cumoe.group(ids, num_experts=6, tile=16)
        x = rng.standard_normal((p.max_rows, 2 * size), np.float32) * 4
        if dtype == FP8.name:
            halves = [cumoe.quantize_fp8_block(h) for h in (x[:, :size].copy(), x[:, size:].copy())]
            native = Quantized(
                *(np.concatenate(parts, axis=1) for parts in
                  zip(*((h.values, h.scale) for h in halves), strict=True))
            )  # fmt: skip
        else:
            native = x.astype(DTYPES[dtype])
        activation = Activation(alpha=1.702, beta=np.linspace(0, 1, 6, dtype=np.float32), limit=7.0)
        order = "gate_up" if dtype == FP8.name or size == 48 else "up_gate_interleaved"
        options = {"gate_up_order": order, "out_dtype": out_dtype}
        want = cumoe.activate(native, activation=activation, permutation=p, **options)
        got = cumoe.activate(
            to_backend(native, "cupy"),
            activation=to_backend(activation, "cupy"),
            permutation=to_backend(p, "cupy"),
            **options,
        )
        rows = np.flatnonzero(p.token_idx >= 0)
        if out_dtype == FP8.name:
            got, want = dequantized(got), dequantized(want)
        tolerance = out_dtype if out_dtype in ("float32", "float16") else f"{out_dtype} twin"
        assert_close_blocks(to_host(got)[rows], want[rows], tolerance)


def problems() -> list[GroupedGemmProblem]:
    """Return every problem of the grouped GEMM."""
    return [
        GroupedGemmProblem(dtype, out, gated, gather, tile)
        for dtype in ("bfloat16", "float16", FP8.name)
        for out in (*FLOATS, FP8.name)
        for gated, gather in itertools.product((False, True), repeat=2)
        for tile in tuning.tiles(dtype)
        if gated or out != FP8.name
    ]


def block_major(w: Any) -> Any:
    """Return a weight in blocks of 128 bytes of k."""
    values = w.values if isinstance(w, Quantized) else w
    experts, rows, k = values.shape
    width = 128 // values.dtype.itemsize
    blocked = values.reshape(experts, rows, k // width, width).transpose(0, 2, 1, 3).copy()
    return Quantized(blocked, w.scale, block=w.block) if isinstance(w, Quantized) else blocked


def check_problem(
    rng: np.random.Generator, problem: GroupedGemmProblem, configs: list[Any], kind: str = "twin"
) -> None:
    """Run 150 tokens of two experts each, one expert idle, sizes that are no tile's multiple."""
    fp8 = problem.dtype == FP8.name
    blocked = problem.tile // 16 % 2 == 1
    n, k = (144, 256) if blocked else (272, 208 if fp8 else 200)
    order = GATE_UP_ORDERS[(problem.tile // 16 + problem.gather) % 4] if problem.gated else None
    ids = np.stack([rng.permutation(5)[:2] for _ in range(150)]).astype(np.int32)
    p = cumoe.group(ids, num_experts=6, tile=problem.tile)
    x: Any = rng.standard_normal((150 if problem.gather else p.max_rows, k), np.float32)
    w: Any = rng.standard_normal((6, 2 * n if problem.gated else n, k), np.float32)
    w /= np.float32(np.sqrt(k))
    if fp8:
        x, w = cumoe.quantize_fp8_block(x), cumoe.quantize_fp8_block_weights(w)
        rows = 2 * -(-n // 128) if problem.gated else w.scale.shape[1]
        scale = rng.uniform(0.5, 2, (6, rows, w.scale.shape[2])) * w.scale.mean()
        w = Quantized(w.values, scale.astype(np.float32), block=(128, 128))
    else:
        x, w = x.astype(DTYPES[problem.dtype]), w.astype(DTYPES[problem.dtype])
    options: dict[str, Any] = {
        "gather": problem.gather,
        "gate_up_order": order,
        "layout": "block_major_k" if blocked else "major_k",
        "out_dtype": problem.output_dtype,
    }
    w = block_major(w) if blocked else w
    fp8_out = problem.output_dtype == FP8.name
    want: Any = cumoe.grouped_gemm(x, w, p, **options)
    want = dequantized(want) if fp8_out else want
    valid = np.flatnonzero(p.token_idx >= 0)
    experts = np.searchsorted(p.expert_offsets, valid, side="right") - 1
    arguments = [to_backend(a, "cupy") for a in (x, w, p)]
    name = problem.output_dtype
    tolerance = name if name in ("float32", "float16") else f"{name} {kind}"
    for config in configs:
        values = Poisoned((p.max_rows, n), name, "cupy")
        scales = Poisoned((p.max_rows, -(-n // 128)), F32, "cupy", column_major=True)
        out = Quantized(values.array, scales.array) if fp8_out else values.array
        cumoe.grouped_gemm(*arguments, **options, out=out, config=config)
        values.check_guards()
        scales.check_guards()
        got = dequantized(out) if fp8_out else to_host(out)
        assert_close_blocks(got[valid], want[valid], tolerance, experts=experts)


def name_of(problem: GroupedGemmProblem) -> str:
    """Name a problem by its fields."""
    return "-".join(map(str, vars(problem).values()))


@pytest.fixture(scope="module")
def portable_kernels() -> None:
    """Compile every configuration of the portable kernel in parallel."""
    limit = current_device().max_smem_bytes
    precompile(
        kernels.grouped_gemm_spec(problem, config)
        for problem in problems()
        for config in tuning.candidates(problem, limit)
    )


@pytest.mark.usefixtures("portable_kernels")
class TestGroupedGemm:
    @pytest.mark.parametrize("problem", problems(), ids=name_of)
    def test_every_configuration(self, rng, problem):
        check_problem(rng, problem, tuning.candidates(problem, current_device().max_smem_bytes))

    @pytest.mark.parametrize("dtype", ["bfloat16", FP8.name])
    @pytest.mark.parametrize("k", [16, 128, 144, 2880])
    def test_depths(self, rng, k, dtype):
        """One step of k, exactly one block, and tails of 16 bytes."""
        p = cumoe.group(rng.integers(0, 3, (33, 1)).astype(np.int32), num_experts=3, tile=32)
        x = rng.standard_normal((33, k), np.float32)
        w = rng.standard_normal((3, 24, k), np.float32) / np.float32(np.sqrt(k))
        if dtype == FP8.name:
            x, w = cumoe.quantize_fp8_block(x), cumoe.quantize_fp8_block_weights(w)
        else:
            x, w = x.astype(BF16), w.astype(BF16)
        got = cumoe.grouped_gemm(*(to_backend(a, "cupy") for a in (x, w, p)), out_dtype="float32")
        want = cumoe.grouped_gemm(x, w, p, out_dtype="float32")
        valid = np.flatnonzero(p.token_idx >= 0)
        assert_close_blocks(to_host(got)[valid], want[valid], "float32")


HOPPER_PROBLEMS = [
    GroupedGemmProblem(dtype, dtype if gated else "bfloat16", gated, gather, tile)
    for dtype in ("bfloat16", FP8.name)
    for gated, gather in itertools.product((False, True), repeat=2)
    for tile in (*tuning.SM90_TILES[dtype], 56)
]


def hopper_configs(problem: GroupedGemmProblem) -> list[Any]:
    """Return the preferred configuration, a shallow one, and two blocks that share weights."""
    first = tuning.select_sm90_config(problem)
    shallow = replace(first, num_stages=tuning.SM90_MIN_STAGES[problem.dtype])
    chunks = range(1, first.num_chunks + 1)
    shallow = next(
        config
        for config in (replace(shallow, num_chunks=count) for count in chunks)
        if tuning.why_illegal_sm90(config, problem) is None
    )
    pairs = [replace(first, cluster=2)] if first.cluster == 1 else []
    return list(dict.fromkeys([first, shallow, *pairs]))


@pytest.fixture(scope="module")
def hopper_kernels() -> None:
    """Compile every configuration of Hopper's kernels in parallel, if the GPU can run them."""
    if current_device().arch != tuning.SM90_ARCH:
        pytest.skip(f"needs an {tuning.SM90_ARCH} GPU, found {current_device().arch}")
    precompile(
        kernels_sm90.grouped_gemm_spec(problem, config)
        for problem in HOPPER_PROBLEMS
        for config in hopper_configs(problem)
    )


@pytest.mark.usefixtures("hopper_kernels")
class TestHopperGroupedGemm:
    @pytest.mark.parametrize("problem", HOPPER_PROBLEMS, ids=name_of)
    def test_every_tile(self, rng, problem):
        configs = hopper_configs(problem)
        for config in configs:
            assert tuning.why_illegal_sm90(config, problem) is None
        # Sums of bf16 products are as exact as mma's; those of fp8 products are not.
        check_problem(rng, problem, configs, "twin" if problem.dtype == "bfloat16" else "wgmma")

    @pytest.mark.parametrize("dtype", ["bfloat16", FP8.name])
    @pytest.mark.parametrize("stages", [1, 2, 3, 5, 6, 7, 13])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("tile", [32, 176, 256])
    def test_depths(self, rng, tile, gated, stages, dtype):
        """Odd and even numbers of stages, fewer and more than the ring has; the last one a tail."""
        fp8 = dtype == FP8.name
        out_dtype = dtype if gated else "bfloat16"
        k = (128 if fp8 else 64) * stages - (16 if stages > 1 else 0)
        counts = [0, 1, 70, 8, 97, 23]
        ids = rng.permutation(np.repeat(np.arange(6, dtype=np.int32), counts))[:, None].copy()
        p = cumoe.group(ids, num_experts=6, tile=tile)
        x: Any = rng.standard_normal((len(ids), k), np.float32)
        w: Any = rng.standard_normal((6, 288, k), np.float32) / np.float32(np.sqrt(k))
        if fp8:
            x, w = cumoe.quantize_fp8_block(x), cumoe.quantize_fp8_block_weights(w)
            # Gate and up have blocks of scales of their own.
            rows = 4 if gated else w.scale.shape[1]
            scale = rng.uniform(0.5, 2, (6, rows, w.scale.shape[2])) * w.scale.mean()
            w = Quantized(w.values, scale.astype(np.float32), block=(128, 128))
        else:
            x, w = x.astype(BF16), w.astype(BF16)
        options: dict[str, Any] = {
            "gate_up_order": "up_gate" if gated else None,
            "out_dtype": out_dtype,
        }
        want: Any = cumoe.grouped_gemm(x, w, p, **options)
        arguments = [to_backend(a, "cupy") for a in (x, w, p)]
        problem = GroupedGemmProblem(dtype, out_dtype, gated, True, tile)
        assert tuning.runs_sm90(problem)
        got: Any = cumoe.grouped_gemm(*arguments, **options)
        if out_dtype == FP8.name:
            got, want = dequantized(got), dequantized(want)
        valid = np.flatnonzero(p.token_idx >= 0)
        experts = np.searchsorted(p.expert_offsets, valid, side="right") - 1
        kind = "wgmma" if fp8 else "twin"
        assert_close_blocks(
            to_host(got)[valid], want[valid], f"{out_dtype} {kind}", experts=experts
        )


class TestFinalize:
    @pytest.mark.parametrize("hidden_size", [8, 264, 2048, 7168])
    @pytest.mark.parametrize("columns", [1, 9, 64])
    def test_same_bits_as_twin(self, rng, columns, hidden_size):
        """A slot of -1 reads no row: the last one is NaN."""
        for count, dtypes in (
            (1, ("bfloat16", "float32", "bfloat16")),
            (2, ("bfloat16", "bfloat16", "float32")),
            (63, ("float16", "float32", "float16")),
            (130, ("float32", "bfloat16", "bfloat16")),
        ):
            rows_dtype, weights_dtype, out_dtype = dtypes
            rows = rng.standard_normal((300, hidden_size), np.float32).astype(DTYPES[rows_dtype])
            weights = rng.standard_normal((count, columns)).astype(DTYPES[weights_dtype])
            index = rng.integers(-1, 299, (count, columns)).astype(np.int32)
            rows[299] = np.nan
            out = Poisoned((count, hidden_size), out_dtype, "cupy")
            arguments = (to_backend(a, "cupy") for a in (rows, weights, index))
            cumoe.finalize(*arguments, out=out.array)
            out.check_guards()
            want = cumoe.finalize(rows, weights, index, out_dtype=out_dtype)
            assert_same_bits(out.array, want)
