"""The benches' inputs are what they say, and their oracle finds what is wrong, and where.

Everything runs a tiny layer; with ``-m gpu`` on CuPy.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import cumoe
from bench import bench_activation, bench_error, bench_layer, bench_routing, bench_startup
from bench.bench_error import Matrices, Worst, block_errors, run_oracle, slots_by_expert
from bench.inputs import (
    TINY,
    find_backend,
    find_model,
    make_bias,
    make_call,
    make_layer,
    make_weights,
    random_bf16,
    random_words,
    to_host,
)
from cumoe import Activation, TopK
from cumoe.reference import activation as reference_activation
from cumoe.reference import exact
from cumoe.reference import quantize as reference_quantize

RECIPES = ("bf16", "fp8_block", "fp8_tensor")
LIMITED = replace(
    TINY, name="limited", method="renormalize", num_groups=1, has_bias=False, scaling_factor=1.0,
    activation=Activation(alpha=1.702, beta=1.0, limit=3.0),
)  # fmt: skip
ON_INPUT = replace(
    TINY, name="on input", method="llama4", top_k=1, num_groups=1, top_groups=1, has_bias=False,
    scaling_factor=1.0, weights_on_input=True,
)  # fmt: skip


def run_case(shape, recipe, num_tokens, xp=np, rounded=(True,)):
    weights = make_weights(shape, recipe, xp, seed=3)
    bias = make_bias(shape, xp, seed=3)
    layer = make_layer(shape, weights, bias, num_tokens)
    x, logits = make_call(shape, num_tokens, xp, seed=3)
    routing = shape.routing(recipe)
    topk = cumoe.route(logits, routing, bias=bias)
    on_input = routing.weights_on_input
    answers = run_oracle(
        xp, x, topk, weights, shape.activation, rounded=rounded, weights_on_input=on_input
    )
    return layer, x, logits, topk, answers


class TestInputs:
    def test_words_are_balanced_and_depend_on_the_key(self):
        words = random_words(np, 1 << 16, 1, 2)
        np.testing.assert_array_equal(words, random_words(np, 1 << 16, 1, 2))
        assert np.unique(words).size == words.size
        assert (words != random_words(np, 1 << 16, 2, 1)).mean() > 0.999
        for bit in range(32):
            assert ((words >> np.uint32(bit)) & 1).mean() == pytest.approx(0.5, abs=0.01)

    def test_bf16_is_normal(self):
        x = random_bf16(np, (512, 256), 0, deviation=3.0).astype(np.float32)
        assert x.mean() == pytest.approx(0, abs=0.05)
        assert x.std() == pytest.approx(3, rel=0.02)
        assert (abs(x) > 6).mean() == pytest.approx(0.0455, abs=0.005)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_weights(self, recipe):
        weights = make_weights(TINY, recipe, np, seed=0)
        assert (weights.num_local_experts, weights.recipe) == (9, recipe)
        assert (weights.hidden_size, weights.intermediate_size) == (272, 144)
        for expert in (0, 8):
            gate, up, down = weights.dequantize_expert(expert)
            for matrix, deviation in ((gate, 2 / 272**0.5), (up, 2 / 272**0.5), (down, 144**-0.5)):
                assert np.isfinite(matrix).all()
                assert matrix.std() == pytest.approx(deviation, rel=0.25)
        again = make_weights(TINY, recipe, np, seed=0)
        other = make_weights(TINY, recipe, np, seed=1)
        bits = np.uint16 if recipe == "bf16" else np.uint8
        np.testing.assert_array_equal(weights.w13.view(bits), again.w13.view(bits))
        assert (weights.w13.view(bits) != other.w13.view(bits)).mean() > 0.9
        assert (weights.w13.view(bits)[0] != weights.w13.view(bits)[1]).mean() > 0.9

    def test_bad_recipe(self):
        with pytest.raises(ValueError, match="recipe"):
            make_weights(TINY, "int4", np, seed=0)

    def test_models(self):
        assert find_model("tiny") is TINY
        assert find_model("deepseek_v3").num_shared_experts == 1
        assert find_model("deepseek_v3", shared=False).num_shared_experts == 0
        with pytest.raises(ValueError, match="kimi_k2"):
            find_model("none")

    def test_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr("bench.inputs.device_available", lambda: False)
        assert find_backend("numpy") is np
        for bench in (bench_activation, bench_layer, bench_error, bench_routing, bench_startup):
            with pytest.raises(SystemExit, match="--dry-run"):
                bench.main([])


class TestOracleParts:
    def test_round_bf16(self, rng):
        x = rng.standard_normal(10000).astype(np.float32)
        ties = (np.arange(1, 2000, dtype=np.uint32) << np.uint32(15)).view(np.float32)
        x = np.concatenate([x, ties, -ties])
        np.testing.assert_array_equal(bench_error.round_bf16(x), exact.round_bf16(x))
        half = x.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(bench_error.widen(half), half.astype(np.float32))

    def test_round_e4m3(self, rng):
        codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        codes = codes[np.isfinite(codes)]
        ordered = np.unique(codes)
        ties = (ordered[1:] + ordered[:-1]) / 2
        near = [np.nextafter(ties, np.float32(s)) for s in (-np.inf, np.inf)]
        wide = rng.standard_normal(10000).astype(np.float32) * 10.0 ** rng.uniform(-5, 4, 10000)
        x = np.concatenate([codes, ties, *near, wide.astype(np.float32)])
        want = exact.to_e4m3(x).astype(np.float32)
        np.testing.assert_array_equal(bench_error.round_e4m3(np, x), want)
        assert np.isnan(bench_error.round_e4m3(np, np.array([np.nan], np.float32)))[0]

    @pytest.mark.parametrize("width", [1, 127, 128, 130, 384])
    def test_round_fp8_block(self, rng, width):
        x = rng.standard_normal((5, width)).astype(np.float32)
        x *= 10.0 ** rng.uniform(-3, 3, (5, 1)).astype(np.float32)
        x[2] = 0
        want = reference_quantize.dequantize(reference_quantize.quantize_fp8_block(x))
        np.testing.assert_array_equal(bench_error.round_fp8_block(np, x), want)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_matrices(self, recipe):
        weights = make_weights(TINY, recipe, np, seed=1)
        w13, w2 = Matrices(np, weights).of(4)
        gate, up, down = weights.dequantize_expert(4)
        np.testing.assert_array_equal(w13, np.concatenate([gate, up]))
        np.testing.assert_array_equal(w2, down)
        with pytest.raises(ValueError, match="up_gate"):
            Matrices(np, weights.convert(gate_up_order="up_gate"))

    @pytest.mark.parametrize("per_expert", [False, True])
    def test_swiglu(self, rng, per_expert):
        x = 4 * rng.standard_normal((20, 64)).astype(np.float32)
        values = (1.702, 1.0, 3.0)
        names = ("alpha", "beta", "limit")
        if per_expert:
            arrays = (np.array([9, v, 9], np.float32) for v in values)
            activation = Activation(**dict(zip(names, arrays, strict=True)))
        else:
            activation = Activation(**dict(zip(names, values, strict=True)))
        got = bench_error.swiglu(np, x, activation, 1)
        want = reference_activation.apply(x[:, :32], x[:, 32:], activation, 1)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)

    def test_slots_by_expert(self):
        found = {e: s.tolist() for e, s in slots_by_expert(np.array([[3, 0], [0, 5], [3, 5]]))}
        assert found == {0: [1, 2], 3: [0, 4], 5: [3, 5]}

    def test_block_errors(self, rng):
        want = rng.standard_normal((150, 40)).astype(np.float32)
        want[130:] = 0
        got = want + 0.1 * rng.standard_normal(want.shape).astype(np.float32)
        got[130:] = 0
        errors = block_errors(np, got, want)
        assert errors.shape == (3, 2)
        for i, rows in enumerate((slice(0, 64), slice(64, 128), slice(128, 150))):
            error, reference = got[rows] - want[rows], want[rows]
            rms = np.sqrt(np.mean(reference**2))
            floor = np.maximum(rms, abs(reference))
            assert errors[i, 0] == pytest.approx((abs(error) / floor).max(), rel=1e-5)
            assert errors[i, 1] == pytest.approx(np.sqrt(np.mean(error**2)) / rms, rel=1e-5)
        assert (block_errors(np, want * 0, want * 0) == 0).all()
        got[70, 3] = np.nan
        assert np.isnan(block_errors(np, got, want)[1]).all()

    def test_worst_names_the_block(self):
        errors = np.array([[0.1, 0.01], [0.3, 0.001], [0.2, 0.02]], np.float32)
        worst = Worst.of(errors, [(4, 0), (4, 1), (7, 0)])
        assert (worst.expert, worst.block) == (4, 1)
        assert worst.fields("a_") == {
            "a_max_rel": pytest.approx(0.3),
            "a_rms_rel": pytest.approx(0.02),
        }
        errors[2] = np.nan
        worst = Worst.of(errors, [(4, 0), (4, 1), (7, 0)])
        assert (worst.expert, worst.block) == (7, 0)
        assert worst.fields() == {"max_rel": None, "rms_rel": None}
        assert not worst.passes("bf16")

    def test_float32_products(self):
        bench_error.check_float32(np)


class TestOracle:
    @pytest.mark.parametrize("shape", [TINY, LIMITED, ON_INPUT], ids=lambda s: s.name)
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_agrees_with_the_layer(self, shape, recipe):
        layer, x, logits, topk, (answer,) = run_case(shape, recipe, 100)
        assert bench_error.worst_block(np, layer(x, logits), answer.out).passes(recipe)
        parts = layer(x, logits, finalize=False)
        worst = bench_error.worst_expert(np, parts.rows, parts.permuted_idx, topk.ids, answer.rows)
        assert worst.passes(recipe)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_unrounded_is_the_formula(self, recipe):
        layer, x, _, topk, (answer,) = run_case(LIMITED, recipe, 9, rounded=(False,))
        want = np.zeros(x.shape)
        for t, (ids, weights) in enumerate(zip(*topk, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                gate, up, down = layer.weights.dequantize_expert(int(expert))
                token = x[t].astype(np.float64)
                g, u = np.minimum(gate @ token, 3.0), np.clip(up @ token, -3.0, 3.0)
                want[t] += weight * (down @ (g / (1 + np.exp(-1.702 * g)) * (u + 1.0)))
        np.testing.assert_allclose(answer.out, want, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_rounding_is_seen(self, recipe):
        *_, (rounded, plain) = run_case(TINY, recipe, 64, rounded=(True, False))
        error = block_errors(np, rounded.out, plain.out)[0, 1]
        assert (1e-3 if recipe == "bf16" else 1e-2) < error < 0.1

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_a_sample_of_tokens_gives_the_same(self, recipe):
        layer, x, _, topk, (answer,) = run_case(TINY, recipe, 20)
        some = [3, 4, 19]
        part = TopK(topk.ids[some], topk.weights[some])
        (sample,) = run_oracle(np, x[some], part, layer.weights, TINY.activation)
        np.testing.assert_allclose(sample.out, answer.out[some], rtol=1e-2, atol=1e-2)

    def test_an_error_in_one_expert_is_found_and_placed(self):
        layer, x, logits, topk, (answer,) = run_case(TINY, "bf16", 300)
        rows, _, index = layer(x, logits, finalize=False)
        expert = 8  # the shared one: a row for every token
        slot = np.flatnonzero(topk.ids.ravel() == expert)[130]
        rows[index.ravel()[slot], 5] += np.asarray(1.0, rows.dtype)
        worst = bench_error.worst_expert(np, rows, index, topk.ids, answer.rows)
        assert (worst.expert, worst.block) == (expert, 2)
        assert not worst.passes("bf16")

    @pytest.mark.parametrize("bad", [-1, "twice", 10**6])
    def test_bad_permutation(self, bad):
        layer, x, logits, topk, (answer,) = run_case(TINY, "bf16", 8)
        rows, _, index = layer(x, logits, finalize=False)
        index = index.copy()
        index[2, 1] = index[0, 0] if bad == "twice" else bad
        with pytest.raises(ValueError, match="permuted_idx"):
            bench_error.worst_expert(np, rows, index, topk.ids, answer.rows)


@pytest.mark.gpu
class TestDevice:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_weights_have_the_same_bits(self, recipe):
        import cupy

        host, device = (make_weights(TINY, recipe, xp, seed=5) for xp in (np, cupy))
        for name in ("w13", "w2", "w13_scale", "w2_scale"):
            if getattr(host, name) is not None:
                got = to_host(getattr(device.to_host(), name)).view(np.uint8)
                np.testing.assert_array_equal(got, getattr(host, name).view(np.uint8))

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_oracle_agrees_with_numpy(self, recipe):
        import cupy

        bench_error.check_float32(find_backend("cupy"))
        *_, (host,) = run_case(TINY, recipe, 100)
        *_, (device,) = run_case(TINY, recipe, 100, xp=cupy)
        errors = block_errors(np, device.out.get(), host.out)
        assert Worst.of(errors).passes(recipe)
