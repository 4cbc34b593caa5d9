"""Each op on its own against formulas written here, on NumPy and on CuPy.

The routing formulas have their own test (``test_reference_routing.py``), as do weights and layouts.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cumoe
from cumoe import Activation, ExpertShard, Quantized, Routing, TopK
from cumoe.layouts import GATE_UP_ORDERS
from tests import brute_force
from tests.brute_force import random_layer
from tests.helpers import (
    BF16,
    DTYPES,
    F32,
    FP8,
    Poisoned,
    assert_close_blocks,
    assert_same_bits,
    dequantized,
    each_backend,
    to_backend,
    to_host,
)

FLOATS = ["bfloat16", "float16", "float32"]


def draw_ids(rng, num_tokens, top_k, num_experts):
    """Draw ids without repeats in a row."""
    rows = [rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]
    return np.array(rows, np.int32).reshape(num_tokens, top_k)


class TestRoute:
    @each_backend
    @pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
    def test_out_and_replay(self, rng, backend, weights_dtype):
        routing = Routing(
            "minimax2", num_experts=72, top_k=6, num_shared_experts=2, weights_dtype=weights_dtype
        )
        logits = rng.standard_normal((11, 72), np.float32)
        bias = rng.standard_normal(72, np.float32).astype(BF16)
        expected = cumoe.route(logits, routing, bias=bias)
        ids, weights, replay = (
            Poisoned(shape, dtype, backend)
            for shape, dtype in (((11, 8), "i4"), ((11, 8), weights_dtype), ((13, 6), "i2"))
        )
        out = TopK(ids.array, weights.array)
        x, b = (to_backend(a, backend) for a in (logits, bias))
        assert cumoe.route(x, routing, bias=b, out=out, replay_out=replay.array) is out
        for poisoned in (ids, weights, replay):
            poisoned.check_guards()
        assert_same_bits(out.ids, expected.ids)
        assert_same_bits(out.weights, expected.weights)
        written = to_host(replay.array)
        np.testing.assert_array_equal(written[:11], expected.ids[:, :6])
        assert (written[11:] == -1).all()

    @each_backend
    def test_bias_is_ignored_by_other_methods(self, rng, backend):
        logits = to_backend(rng.standard_normal((5, 16), np.float32), backend)
        bias = to_backend(rng.standard_normal(16, np.float32) * 9, backend)
        for method in ("default", "sigmoid", "top_k", "sigmoid_renorm"):
            routing = Routing(method, num_experts=16, top_k=4)
            plain, biased = cumoe.route(logits, routing), cumoe.route(logits, routing, bias=bias)
            assert_same_bits(biased.ids, plain.ids)
            assert_same_bits(biased.weights, plain.weights)

    @each_backend
    @pytest.mark.parametrize("shared", [0, 3])
    def test_no_tokens(self, backend, shared):
        routing = Routing("default", num_experts=5, top_k=2, num_shared_experts=shared)
        logits = to_backend(np.empty((0, 5), np.float32), backend)
        ids, weights = cumoe.route(logits, routing)
        assert ids.shape == weights.shape == (0, 2 + shared)
        assert ids.dtype == np.int32 and weights.dtype == np.float32

    @each_backend
    def test_pack(self, backend):
        """The upper half is the id even beside a negative weight; one that does not fit is -1."""
        ids = np.array([[3, 3, -1, 2047, 32767, 32768, 65536, -32768, -40000]], np.int32)
        weights = np.array([[0.5, -0.5, 1.0, 1.00390625, -0.0, 1, 1, 2, 3]], np.float32)
        packed = cumoe.pack(to_backend(TopK(ids, weights), backend))
        words = to_host(packed.packed).view(np.uint32)
        assert [hex(w) for w in words[0, :3]] == ["0x33f00", "0x3bf00", "0xffff3f80"]
        unpacked = to_host(cumoe.unpack(packed))
        assert unpacked.ids.tolist() == [[3, 3, -1, 2047, 32767, -1, -1, -32768, -1]]
        assert_same_bits(unpacked.weights, weights.astype(BF16))


class TestGroup:
    @staticmethod
    def brute(ids, num_experts, num_shared, shard, tile):
        """Return the permutation's arrays by walking over the slots of each local expert."""
        num_tokens, columns = ids.shape
        shard = shard or ExpertShard(0, num_experts)
        held = range(shard.expert_offset, shard.expert_offset + shard.num_local_experts)
        start, stop = shard.shared_token_range(num_tokens)
        local = [*held, *range(num_experts, num_experts + num_shared)]
        index = np.full((num_tokens, columns), -1)
        tokens, owners, ends, offsets, counts = [], [], [], [0], []
        for e, expert in enumerate(local):
            slots = [
                (t, k)
                for t, k in np.ndindex(num_tokens, columns)
                if ids[t, k] == expert and (expert < num_experts or start <= t < stop)
            ]
            first = len(tokens)
            for t, k in slots:
                index[t, k] = len(tokens)
                tokens.append(t)
            for begin in range(first, len(tokens), tile):
                owners.append(e)
                ends.append(min(begin + tile, len(tokens)))
            tokens += [-1] * (-len(tokens) % tile)
            offsets.append(len(tokens))
            counts.append(len(slots))
        return counts, offsets, index, tokens, owners, ends

    @each_backend
    @pytest.mark.parametrize("tile", [1, 3, 16])
    @pytest.mark.parametrize(
        ("num_shared", "shard"),
        [
            (0, None),
            (2, None),
            (0, ExpertShard(3, 4)),
            (1, ExpertShard.from_counts([5, 0, 6], 2)),
            (2, ExpertShard.from_counts([5, 0, 6], 1)),
            (1, ExpertShard(0, 11, shared_experts="none")),
        ],
    )
    def test_against_loops(self, rng, backend, tile, num_shared, shard):
        ids = rng.integers(-2, 11 + num_shared + 2, (23, 4)).astype(np.int32)
        ids[:, 0] = 6
        p = cumoe.group(
            to_backend(ids, backend),
            num_experts=11,
            num_shared_experts=num_shared,
            shard=shard,
            tile=tile,
        )
        counts, offsets, index, tokens, owners, ends = self.brute(ids, 11, num_shared, shard, tile)
        used = len(owners)
        host = to_host(p)
        assert host.tokens_per_expert.tolist() == counts
        assert host.expert_offsets.tolist() == offsets
        np.testing.assert_array_equal(host.permuted_idx, index)
        assert host.num_tiles.tolist() == [used] and used <= p.max_tiles
        rest = p.max_tiles - used
        assert host.tile_expert.tolist() == owners + [-1] * rest
        assert host.tile_row_end.tolist() == ends + [0] * rest
        assert host.token_idx.tolist() == tokens + [-1] * rest * tile
        assert p.max_rows == p.max_tiles * tile and p.tile == tile
        for array in host[:-1]:
            assert array.dtype == np.int32

    @each_backend
    def test_no_tokens(self, backend):
        empty = to_backend(np.empty((0, 3), np.int32), backend)
        p = to_host(cumoe.group(TopK(empty, None), num_experts=4, num_shared_experts=1, tile=16))
        assert p.tokens_per_expert.tolist() == [0] * 5 and p.expert_offsets.tolist() == [0] * 6
        assert p.num_tiles.tolist() == [0] and p.max_rows == 0 and p.permuted_idx.shape == (0, 3)


class TestQuantize:
    @staticmethod
    def values(rng, shape, dtype):
        x = rng.standard_normal(shape) * np.exp2(rng.integers(-12, 12, shape[-1]))
        x[..., : shape[-1] // 4] = 0
        return x.astype(DTYPES[dtype])

    @each_backend
    @pytest.mark.parametrize("columns", [8, 128, 136, 720])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_activations(self, rng, backend, dtype, columns):
        x = self.values(rng, (9, columns), dtype)
        q = cumoe.quantize_fp8_block(to_backend(x, backend))
        assert q.block == (1, 128) and q.scale.shape == (9, -(-columns // 128))
        expected = [brute_force.quantize_row(row) for row in x.astype(np.float64)]
        np.testing.assert_array_equal(dequantized(q), expected)
        assert_close_blocks(to_host(cumoe.dequantize(q)), np.array(expected), "float32")

    @each_backend
    @pytest.mark.parametrize("shape", [(3, 128, 128), (2, 96, 136), (1, 272, 720)])
    def test_weights(self, rng, backend, shape):
        w = self.values(rng, shape, "bfloat16")
        q = cumoe.quantize_fp8_block_weights(to_backend(w, backend))
        expected = np.stack([brute_force.quantize_matrix(m) for m in w.astype(np.float64)])
        got = to_host(cumoe.dequantize(q))
        for expert in range(shape[0]):
            assert_close_blocks(got[expert], expected[expert], "float32")

    @each_backend
    def test_out_with_column_major_scale(self, rng, backend):
        x = self.values(rng, (7, 264), "bfloat16")
        plain = to_host(cumoe.quantize_fp8_block(x))
        values = Poisoned((7, 264), FP8, backend)
        scale = Poisoned((7, 3), F32, backend, column_major=True)
        out = Quantized(values.array, scale.array)
        assert cumoe.quantize_fp8_block(to_backend(x, backend), out=out) is out
        values.check_guards()
        scale.check_guards()
        got = to_host(out)
        assert_same_bits(got.values, plain.values)
        np.testing.assert_array_equal(got.scale, plain.scale)

    @each_backend
    def test_values_that_are_no_numbers(self, backend):
        """NaN stays out of the scale and becomes 0x7F; an infinity spoils its own block only."""
        x = np.ones((3, 256), np.float32)
        x[0, 5], x[1, 200], x[2] = np.nan, -np.inf, 0.0
        q = to_host(cumoe.quantize_fp8_block(to_backend(x, backend)))
        codes = q.values.view(np.uint8)
        assert codes[0, 5] == 0x7F and codes[0, 6] == 0x7E and np.isfinite(q.scale[0]).all()
        assert np.isinf(q.scale[1]).tolist() == [False, True] and codes[1, 201] == 0
        assert (codes[1, :128] == 0x7E).all()
        assert (q.scale[2] == np.finfo(np.float32).tiny).all() and not codes[2].any()

    @each_backend
    def test_empty(self, backend):
        q = cumoe.quantize_fp8_block(to_backend(np.empty((0, 256), BF16), backend))
        assert q.values.shape == (0, 256) and q.scale.shape == (0, 2)


class TestGroupedGemm:
    @staticmethod
    def problem(rng, *, gated, dtype, layout="major_k", order=None, k=None, n=48, tile=16):
        """Return x, the stored weight, exact matrices, and a permutation with an empty expert."""
        unit = 128 if dtype == "float8_e4m3fn" else 64
        k = k or (2 * unit if layout == "block_major_k" else 176)
        routing = Routing("top_k", num_experts=4, top_k=2)
        recipe = "fp8_block" if dtype == "float8_e4m3fn" else "bf16"
        size, hidden = (n, k) if gated else (k, n)
        layer = random_layer(
            rng,
            routing,
            recipe,
            num_tokens=37,
            hidden_size=hidden,
            intermediate_size=size,
            order=order or "gate_up",
            layout=layout,
        )
        ids = draw_ids(rng, 37, 2, 3)
        permutation = cumoe.group(ids, num_experts=4, tile=tile)
        weights = layer.weights
        payload, scale = (
            (weights.w13, weights.w13_scale) if gated else (weights.w2, weights.w2_scale)
        )
        weight = payload if scale is None else Quantized(payload, scale, block=(128, 128))
        x = layer.x if gated else rng.standard_normal((37, k), np.float32).astype(BF16)
        return layer, x, weight, permutation

    @staticmethod
    def expected(layer, x, permutation, *, gated, gather):
        """Return the float64 rows, the valid rows, and the expert of each."""
        x = x.astype(np.float64)
        if layer.recipe == "fp8_block":
            x = np.stack([brute_force.quantize_row(row) for row in x])
        rows = np.flatnonzero(permutation.token_idx >= 0)
        experts = np.searchsorted(permutation.expert_offsets, rows, side="right") - 1
        y = []
        for row, expert in zip(rows, experts, strict=True):
            source = x[permutation.token_idx[row] if gather else row]
            gate, up, down = layer.rounded(int(expert))
            values = {n: v[expert] if np.ndim(v) else v for n, v in layer.activation.items()}
            y.append(
                brute_force.swiglu(gate @ source, up @ source, **values) if gated else down @ source
            )
        return np.array(y), rows, experts

    @each_backend
    @pytest.mark.parametrize("layout", ["major_k", "block_major_k"])
    @pytest.mark.parametrize("order", [None, *GATE_UP_ORDERS])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
    def test_orders_and_layouts(self, rng, backend, dtype, order, layout):
        gated = order is not None
        unit = 128 if dtype == "float8_e4m3fn" else 64
        blocked = layout == "block_major_k"
        layer, x, weight, p = self.problem(
            rng, gated=gated, dtype=dtype, layout=layout, order=order, n=unit if blocked else 176
        )
        native = cumoe.quantize_fp8_block(x) if layer.recipe == "fp8_block" else x
        y = cumoe.grouped_gemm(
            to_backend(native, backend),
            to_backend(weight, backend),
            to_backend(p, backend),
            gate_up_order=order,
            layout=layout,
            out_dtype="float32",
        )
        want, rows, experts = self.expected(layer, x, p, gated=gated, gather=True)
        assert_close_blocks(to_host(y)[rows], want, "float32", experts=experts)

    @each_backend
    @pytest.mark.parametrize("out_dtype", [*FLOATS, "float8_e4m3fn"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
    def test_out_without_gather(self, rng, backend, dtype, out_dtype):
        layer, x, weight, p = self.problem(rng, gated=True, dtype=dtype, n=144)
        padded = np.zeros((p.max_rows, x.shape[1]), BF16)
        padded[: len(x)] = x
        native = cumoe.quantize_fp8_block(padded) if layer.recipe == "fp8_block" else padded
        values = Poisoned((p.max_rows, 144), out_dtype, backend)
        scale = Poisoned((p.max_rows, 2), F32, backend, column_major=True)
        fp8_out = out_dtype == "float8_e4m3fn"
        out = Quantized(values.array, scale.array) if fp8_out else values.array
        result = cumoe.grouped_gemm(
            to_backend(native, backend),
            to_backend(weight, backend),
            to_backend(p, backend),
            gather=False,
            gate_up_order="gate_up",
            out_dtype=out_dtype,
            out=out,
        )
        assert result is out
        values.check_guards()
        scale.check_guards()
        want, rows, experts = self.expected(layer, padded, p, gated=True, gather=False)
        got = dequantized(out) if fp8_out else to_host(out)
        assert_close_blocks(got[rows], want, out_dtype, experts=experts)

    @each_backend
    def test_float16_and_activation_per_expert(self, rng, backend):
        layer, x, weight, p = self.problem(rng, gated=True, dtype="bfloat16")
        layer.activation = {
            "alpha": np.array([1.0, 1.702, 0.5, 2.0], np.float32),
            "beta": 1.0,
            "limit": np.array([0.5, 7.0, 2.0, 1.0], np.float32),
        }
        half = {"x": x.astype(np.float16), "weight": weight.astype(np.float16)}
        y = cumoe.grouped_gemm(
            to_backend(half["x"], backend),
            to_backend(half["weight"], backend),
            to_backend(p, backend),
            gate_up_order="gate_up",
            activation=to_backend(Activation(**layer.activation), backend),
            out_dtype="float32",
        )
        want, rows, experts = self.expected(layer, x, p, gated=True, gather=True)
        assert_close_blocks(to_host(y)[rows], want, "float16", experts=experts)

    @each_backend
    def test_no_rows(self, backend):
        p = cumoe.group(to_backend(np.empty((0, 2), np.int32), backend), num_experts=4, tile=16)
        x, w = np.empty((0, 64), BF16), np.zeros((4, 8, 64), BF16)
        y = cumoe.grouped_gemm(to_backend(x, backend), to_backend(w, backend), p)
        assert y.shape == (0, 8) and y.dtype == BF16


class TestActivate:
    @each_backend
    @pytest.mark.parametrize(
        ("order", "dtype"),
        [
            *itertools.product(GATE_UP_ORDERS, FLOATS),
            ("gate_up", "float8_e4m3fn"),
            ("up_gate", "float8_e4m3fn"),
        ],
    )
    def test_orders(self, rng, backend, order, dtype):
        gate, up = rng.standard_normal((2, 21, 144), np.float32) * 4
        first, second = (gate, up) if order.startswith("gate") else (up, gate)
        if order.endswith("interleaved"):
            x = np.stack([first, second], axis=2).reshape(21, 288)
        else:
            x = np.concatenate([first, second], axis=1)
        if dtype == "float8_e4m3fn":
            halves = [cumoe.quantize_fp8_block(half) for half in (first, second)]
            native = Quantized(
                np.concatenate([h.values for h in halves], axis=1),
                np.concatenate([h.scale for h in halves], axis=1),
            )
            parts = [dequantized(h) for h in halves]
        else:
            native = x.astype(DTYPES[dtype])
            parts = [half.astype(DTYPES[dtype]).astype(np.float64) for half in (first, second)]
        gate64, up64 = parts if order.startswith("gate") else parts[::-1]
        want = brute_force.swiglu(gate64, up64)
        for out_dtype in (*FLOATS, "float8_e4m3fn"):
            given = to_backend(native, backend)
            y = cumoe.activate(given, gate_up_order=order, out_dtype=out_dtype)
            got = dequantized(y) if isinstance(y, Quantized) else to_host(y)
            assert_close_blocks(got, want, out_dtype)

    @each_backend
    @pytest.mark.parametrize("out_dtype", ["float32", "float8_e4m3fn"])
    def test_parameters_of_each_expert(self, rng, backend, out_dtype):
        """Rows that are padding are skipped, so NaN in them does no harm."""
        ids = draw_ids(rng, 19, 2, 3)
        p = cumoe.group(ids, num_experts=4, tile=16)
        x = rng.standard_normal((p.max_rows, 288), np.float32) * 3
        x[p.token_idx < 0] = np.nan
        fields = {
            "alpha": np.array([1.0, 1.702, 0.5, 2.0], np.float32),
            "beta": np.array([0.0, 1.0, -1.0, 2.0], np.float32),
            "limit": 2.0,
        }
        values = Poisoned((p.max_rows, 144), out_dtype, backend)
        scale = Poisoned((p.max_rows, 2), F32, backend)
        fp8_out = out_dtype == "float8_e4m3fn"
        out = Quantized(values.array, scale.array) if fp8_out else values.array
        cumoe.activate(
            to_backend(x, backend),
            gate_up_order="up_gate",
            activation=to_backend(Activation(**fields), backend),
            permutation=to_backend(p, backend),
            out_dtype=out_dtype,
            out=out,
        )
        values.check_guards()
        scale.check_guards()
        rows = np.flatnonzero(p.token_idx >= 0)
        experts = np.searchsorted(p.expert_offsets, rows, side="right") - 1
        wide = x[rows].astype(np.float64)
        alpha, beta = (fields[n][experts][:, None] for n in ("alpha", "beta"))
        want = brute_force.swiglu(wide[:, 144:], wide[:, :144], alpha, beta, 2.0)
        got = dequantized(out) if fp8_out else to_host(out)
        assert_close_blocks(got[rows], want, out_dtype, experts=experts)

    @each_backend
    def test_extremes(self, backend):
        """No overflow at either end; a NaN stays one, even under a limit."""
        x = np.zeros((4, 16), np.float32)
        x[:, :8], x[:, 8:] = np.array([[-1e4], [1e4], [np.nan], [1.0]]), 3.0
        x[3, 8] = np.nan
        for limit in (None, 7.0):
            y = cumoe.activate(
                to_backend(x, backend),
                gate_up_order="gate_up",
                activation=Activation(limit=limit),
                out_dtype="float32",
            )
            got = to_host(y)
            assert (got[0] == 0).all() and np.isnan(got[2]).all() and np.isnan(got[3, 0])
            np.testing.assert_allclose(got[1], 3 * (limit or 1e4), rtol=2e-3)

    @each_backend
    def test_no_rows(self, backend):
        x = to_backend(np.empty((0, 16), BF16), backend)
        assert cumoe.activate(x, gate_up_order="gate_up").shape == (0, 8)


class TestFinalize:
    @each_backend
    @pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("rows_dtype", FLOATS)
    @pytest.mark.parametrize("out_dtype", FLOATS)
    def test_against_loops(self, rng, backend, rows_dtype, out_dtype, weights_dtype):
        rows = rng.standard_normal((50, 264), np.float32).astype(DTYPES[rows_dtype])
        weights = rng.standard_normal((19, 5), np.float32).astype(DTYPES[weights_dtype])
        index = rng.integers(-1, 50, (19, 5)).astype(np.int32)
        index[3] = -1
        rows[7] = np.nan
        index[index == 7] = -1
        want = np.zeros((19, 264), np.float32)
        for t, k in np.ndindex(19, 5):
            if index[t, k] >= 0:
                want[t] += weights[t, k].astype(np.float32) * rows[index[t, k]].astype(np.float32)
        out = Poisoned((19, 264), out_dtype, backend)
        arguments = [to_backend(a, backend) for a in (rows, weights, index)]
        assert cumoe.finalize(*arguments, out=out.array) is out.array
        out.check_guards()
        assert_same_bits(out.array, want.astype(DTYPES[out_dtype]))
        assert_same_bits(cumoe.finalize(*arguments, out_dtype=out_dtype), out.array)

    @each_backend
    @pytest.mark.parametrize("columns", [1, 33, 64])
    def test_many_columns(self, rng, backend, columns):
        rows = rng.standard_normal((columns, 8), np.float32)
        weights = rng.standard_normal((1, columns), np.float32)
        index = rng.permutation(columns).astype(np.int32)[None]
        arguments = [to_backend(a, backend) for a in (rows, weights, index)]
        got = cumoe.finalize(*arguments, out_dtype="float32")
        want = weights.astype(np.float64) @ rows[index[0]].astype(np.float64)
        assert_close_blocks(got, want, "float32")

    @each_backend
    @pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (3, 0)])
    def test_nothing_to_add(self, backend, tokens, rows):
        arguments = (
            np.empty((rows, 16), BF16),
            np.ones((tokens, 2), np.float32),
            np.full((tokens, 2), -1, np.int32),
        )
        got = cumoe.finalize(*(to_backend(a, backend) for a in arguments))
        assert got.shape == (tokens, 16) and not to_host(got).astype(np.float32).any()
