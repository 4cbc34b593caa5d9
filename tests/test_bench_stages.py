"""The Triton peers of the small kernels: configurations, comparisons, answers, and their timing.

The kernels run in Triton's interpreter here, where torch and Triton are; nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cumoe
from bench import (
    bench_activation,
    bench_quantize,
    bench_routing,
    peer_routing,
    peer_stages,
    stage_checks,
    stage_timing,
)
from bench.bench_quantize import STATIC_GLOBAL_SCALE, STATIC_SCALE, VARIANTS
from bench.harness import Timing
from bench.inputs import random_bf16
from bench.peer_stages import CONFIGS, Stage, StageConfig, why_illegal
from bench.peers import is_installed
from bench.shapes import ModelShape, get_shape
from bench.stage_timing import has_triton

FP8 = ml_dtypes.float8_e4m3fn
QUANTIZERS = [name for name in VARIANTS if name != "finalize" and "swizzled" not in name]
GROUPS = (16, 32, 128)


class TestConfigs:
    @pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"slots"}))
    def test_every_config_is_legal_for_the_benches(self, kind):
        shape = get_shape("deepseek_v3")
        for config in CONFIGS[kind]:
            for width in (shape.hidden_size, shape.intermediate_size):
                for group in GROUPS:
                    assert why_illegal(kind, config, width, group) is None

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_table(self, kind):
        configs = CONFIGS[kind]
        assert len(set(map(str, configs))) == len(configs) >= 3
        for config in configs:
            assert config.num_warps in (1, 2, 4, 8, 16)
            if kind != "slots":
                assert 8 <= config.rows * config.columns / (32 * config.num_warps) <= 64

    @pytest.mark.parametrize(
        ("kind", "config", "reason"),
        [
            ("tile", StageConfig(3, 128, 1), "rows = 3 is no power of two"),
            ("tile", StageConfig(1, 96, 1), "columns = 96 is no power of two"),
            ("tile", StageConfig(1, 0, 1), "columns = 0 is no power of two"),
            ("flat", StageConfig(2, 128, 1), "rows = 2: only tiles"),
            ("row", StageConfig(1, 256, 1), "less than the row of 384"),
            ("tile", StageConfig(1, 256, 1), "width = 384 is no multiple"),
            ("tile", StageConfig(1, 64, 1), "no multiple of the group of 128"),
        ],
    )
    def test_illegal(self, kind, config, reason):
        assert reason in str(why_illegal(kind, config, 384, 128))

    def test_only_legal_ones_are_candidates(self):
        stage = fake_stage(kind="tile", width=384)
        assert {config.columns for config in stage.candidates()} == {128}
        assert fake_stage(kind="row", width=8200).candidates() == []


def fp8(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32).astype(FP8).view(np.uint8)


class TestChecks:
    def test_scales(self):
        want = np.array([[1.0, 1e-30]], np.float32)
        stage_checks.check_scale(want * np.float32(1 + 4e-6), want)
        with pytest.raises(ArithmeticError, match="a scale is off by 2.0e-05"):
            stage_checks.check_scale(want * np.array([1, 1 + 2e-5], np.float32), want)
        with pytest.raises(ArithmeticError, match="nan"):
            stage_checks.check_scale(np.full((1, 2), np.nan, np.float32), want)

    @pytest.mark.parametrize(
        ("got", "want"),
        [(1.0, 1.125), (-448, -416), (0.0, -0.0), (0.0, 2**-9), (2**-9, -0.0), (np.nan, np.nan)],
    )
    def test_fp8_neighbours(self, got, want):
        stage_checks.check_fp8(np, fp8(got, 1), fp8(want, 1))
        stage_checks.check_fp8(np, fp8(1, want), fp8(1, got))

    @pytest.mark.parametrize(
        ("got", "want"), [(1.0, 1.25), (448, 384), (2**-9, -(2**-9)), (np.nan, 448), (1, -1)]
    )
    def test_fp8_apart(self, got, want):
        for a, b in ((got, want), (want, got)):
            with pytest.raises(ArithmeticError, match="steps of fp8"):
                stage_checks.check_fp8(np, fp8(1, a), fp8(1, b))

    @pytest.mark.parametrize("shift", [0, 4])
    def test_fp4(self, shift):
        codes = np.array([0, 7, 8, 9, 15], np.uint8)
        near, far = np.array([8, 6, 1, 10, 14], np.uint8), np.array([2, 7, 8, 9, 15], np.uint8)
        stage_checks.check_fp4(np, near << shift, codes << shift)
        with pytest.raises(ArithmeticError, match="2 steps of e2m1"):
            stage_checks.check_fp4(np, far << shift, codes << shift)

    def test_equal(self):
        codes = np.array([1, 2, 3], np.uint8)
        stage_checks.check_equal(codes, codes.copy())
        with pytest.raises(ArithmeticError, match="1 of 3 scales"):
            stage_checks.check_equal(codes, np.array([1, 2, 4], np.uint8))

    def test_bf16(self):
        def bits(*numbers):
            return np.array(numbers, ml_dtypes.bfloat16).view(np.uint16)

        want = bits(1.0, -256, 0)
        stage_checks.check_bf16(bits(1.0078125, -254, 1e-6), want)
        for wrong in ((1.02, -256, 0), (1, -252, 0), (1, -256, 1e-4), (np.nan, -256, 0)):
            with pytest.raises(ArithmeticError, match="1 of 3 sums"):
                stage_checks.check_bf16(bits(*wrong), want)


def fake_stage(kind="tile", width=1024, fails=(), wrong=(), log=None) -> Stage:
    """A stage that logs its configurations; some do not run, some answers are wrong."""
    out, log = np.zeros(4, np.float32), [] if log is None else log

    def launch(config):
        def run():
            log.append(config)
            if config in fails:
                raise RuntimeError("out of registers")
            if config not in wrong:
                out[...] = 1

        return run

    return Stage(
        kind, width, 128, launch, (out,), lambda: stage_checks.check_scale(out, out * 0 + 1)
    )


class TestTiming:
    """Who is timed with whom, and how; the figures are made up."""

    @pytest.fixture(autouse=True)
    def _measure(self, monkeypatch):
        self.asked = []
        self.us = {"op": 20.0, "triton": 30.0, "peer": 900.0}
        monkeypatch.setattr(stage_timing, "measure", self.measure)
        monkeypatch.setattr(stage_timing, "is_installed", lambda package: True)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(peer_stages, "torch_stream", contextlib.nullcontext)

    def measure(self, variants, *, graph=False, calls=1, inputs_rotate=1, repeats, **settings):
        for run in variants.values():
            run(0)
        self.asked.append((sorted(variants), graph, calls, inputs_rotate, repeats))
        names = list(variants)
        return {name: Timing.of([self.us.get(name, 50.0 - names.index(name))]) for name in names}

    def time_stage(self, **options):
        args = argparse.Namespace(repeats=9, budget=1.0)
        return stage_timing.time_stage(SimpleNamespace(), lambda i: None, 3, args, **options)

    def test_replays(self):
        logs = [], []
        stages = [fake_stage(log=log) for log in logs]
        found = self.time_stage(alone=lambda: None, in_triton=lambda: stages)
        best = CONFIGS["tile"][-1]
        assert self.asked == [
            (["op"], False, 1, 3, 9),
            (sorted(map(str, CONFIGS["tile"])), True, 16, 3, 3),
            (["op", "triton"], True, 16, 3, 9),
            (["peer"], False, 1, 1, 5),
        ]
        assert (found["timing"].us, found["method"], found["num_sets"]) == (20, "graph of 16", 3)
        assert (found["peer"], found["peer_us"]) == ("triton", 30.0)
        assert found["peers"]["triton"]["config"] == str(best)
        assert found["peers"]["triton"]["method"] == "graph of 16"
        assert found["peers"]["cupy"] == {
            "us": 900.0, "us_min": 900.0, "us_max": 900.0, "method": "events"
        }  # fmt: skip
        assert logs[1] == [best]  # compared there too; what the fake calls of input 0

    def test_events(self):
        self.us["op"] = 200.0
        found = self.time_stage(in_triton=lambda: [fake_stage()])
        assert [(graph, calls) for _, graph, calls, *_ in self.asked] == [(False, 1)] * 3
        assert (found["method"], found["peers"]["triton"]["method"]) == ("events", "events")

    def test_a_config_that_does_not_run_is_left_out(self):
        *fails, last = CONFIGS["tile"]
        found = self.time_stage(in_triton=lambda: [fake_stage(fails=fails)])
        assert found["peers"]["triton"]["config"] == str(last)
        assert len(self.asked) == 2  # nothing to choose

    @pytest.mark.parametrize(
        ("stage", "message"),
        [
            (fake_stage(wrong=CONFIGS["tile"]), "ArithmeticError: a scale is off by nan"),
            (fake_stage(fails=CONFIGS["tile"]), "RuntimeError: no configuration runs"),
            (fake_stage(kind="row", width=8200), "RuntimeError: no configuration runs"),
        ],
    )
    def test_without_it_the_rest_is_timed(self, stage, message, capsys):
        found = self.time_stage(alone=lambda: None, in_triton=lambda: [stage])
        assert f"without Triton: {message}" in capsys.readouterr().out
        assert list(found["peers"]) == ["cupy"]
        assert self.asked[-2:] == [(["op"], True, 16, 3, 9), (["peer"], False, 1, 1, 5)]
        assert (found["timing"].us, found["method"]) == (20.0, "graph of 16")

    @pytest.mark.parametrize("missing", ["torch", "triton"])
    def test_not_installed(self, missing, monkeypatch, capsys):
        monkeypatch.setattr(stage_timing, "is_installed", lambda package: package != missing)
        found = self.time_stage(in_triton=lambda: pytest.fail("called"))
        assert (found["peer"], found["peer_us"], found["peers"]) == (None, None, {})
        assert [asked[:2] for asked in self.asked] == [(["op"], False), (["op"], True)]
        assert capsys.readouterr().out == ""

    def test_the_interpreter_is_no_peer(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert not has_triton()
        assert self.time_stage(in_triton=lambda: pytest.fail("called"))["peers"] == {}

    def test_the_host_has_none(self):
        args = argparse.Namespace(repeats=9, budget=1.0)
        found = stage_timing.time_stage(
            np, lambda i: None, 1, args, alone=lambda: None,
            in_triton=lambda: pytest.fail("called"),
        )  # fmt: skip
        assert (found["method"], found["peer"]) == ("host", "numpy")
        assert found["peers"]["numpy"]["method"] == "host"


def convert(x, source, target, rounding):
    """Convert bits as a GPU does; Triton's interpreter drops a carry into the exponent."""
    kinds = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp8e4nv": FP8}
    wide = np.ascontiguousarray(x).view(kinds[source.name]).astype(np.float32)
    if target.name == "fp8e4nv":
        wide = np.clip(wide, -448, 448)
    narrow = wide.astype(kinds[target.name])
    return narrow.view(f"u{narrow.dtype.itemsize}").reshape(x.shape)


def test_few_tokens_may_select_almost_equal_keys():
    ours = np.arange(500 * 2, dtype=np.int32).reshape(500, 2), np.ones((500, 2), np.float32)
    own = ours[0].copy(), ours[1].copy()
    own[0][:2], own[1][:2] = 3, 5
    peer_routing._check_selected(own, ours)
    own[0][2, 1] = 3
    with pytest.raises(ArithmeticError, match="3 of 500 tokens have other experts"):
        peer_routing._check_selected(own, ours)
    own[0][2, 1], own[1][2, 1] = ours[0][2, 1], 1.001
    with pytest.raises(ArithmeticError, match="a scale is off"):
        peer_routing._check_selected(own, ours)


def test_routing_that_triton_has_not():
    routing = cumoe.Routing("llama4", num_experts=16, top_k=1)
    with pytest.raises(ValueError, match="llama4"):
        peer_routing.routing_stage(np, routing, np.zeros((1, 16), "f4"), None, None, 16, {})


class TestAnswers:
    @pytest.fixture(autouse=True)
    def _interpreter(self, monkeypatch):
        pytest.importorskip("torch")
        if not is_installed("triton"):
            pytest.skip("Triton is not installed")
        if "triton" in sys.modules and has_triton():
            pytest.skip("Triton was imported to compile kernels; it does either")
        os.environ["TRITON_INTERPRET"] = "1"
        import triton.runtime.interpreter

        monkeypatch.setattr(triton.runtime.interpreter, "_convert_float", convert)

    @pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # of rows past the end
    @pytest.mark.parametrize("num_tokens", [1, 5])
    @pytest.mark.parametrize("variant", QUANTIZERS)
    def test_quantize(self, variant, num_tokens):
        stage = make_quantize(variant, num_tokens)
        for config in stage.candidates():
            stage.check(config)

    @pytest.mark.parametrize("variant", QUANTIZERS)
    def test_a_wrong_quantizer_is_found(self, variant):
        stage = make_quantize(variant, 3)
        launch = stage.launch

        def broken(config):
            run = launch(config)

            def wrong():
                run()
                stage.outputs[0][-1, -1] ^= 0x20

            return wrong

        with pytest.raises(ArithmeticError, match="steps of"):
            replace(stage, launch=broken).check(stage.candidates()[0])

    @pytest.mark.parametrize("num_tokens", [1, 6])
    def test_finalize(self, num_tokens):
        rng = np.random.default_rng(num_tokens)
        index = np.argsort(rng.random((num_tokens, 40)), axis=1)[:, :4].astype(np.int32)
        index[0, 1] = -1
        rows, weights = random_bf16(np, (40, 1000), 3), rng.random(index.shape, np.float32)
        out = cumoe.finalize(rows, weights, index)
        stage = peer_stages.finalize_stage(np, rows, weights, index, out)
        for config in stage.candidates():
            stage.check(config)
        out[-1, -1] += 1
        with pytest.raises(ArithmeticError, match="1 of .* sums"):
            stage.check(config)

    @pytest.mark.parametrize("num_tokens", [1, 3])
    @pytest.mark.parametrize("variant", bench_activation.VARIANTS)
    def test_activation(self, variant, num_tokens):
        shape = ModelShape("small", 1024, 1024, 16, 8)
        case = bench_activation.make_case(np, shape, num_tokens, variant, 4, 0)
        case.work()()
        stage = case.in_triton(np)
        for config in stage.candidates():
            stage.check(config)
        if case.num_rows:
            row = np.flatnonzero(case.permutation.token_idx >= 0)[-1]
            case.out.values.view(np.uint8)[row, -1] ^= 0x20
            with pytest.raises(ArithmeticError, match="steps of"):
                stage.check(config)

    @pytest.mark.parametrize("variant", bench_routing.VARIANTS)
    @pytest.mark.parametrize("model", bench_routing.SHAPES)
    @pytest.mark.parametrize("num_tokens", [1, 20])
    def test_routing(self, model, variant, num_tokens):
        """20 tokens of 8 experts and more: several blocks of slots."""
        stage = make_routing(model, variant, num_tokens)
        stage.check(stage.candidates()[0])

    @pytest.mark.parametrize("config", CONFIGS["slots"], ids=str)
    def test_routing_in_any_blocks(self, config):
        make_routing("qwen3_30b_a3b", "logits", 60).check(config)

    @pytest.mark.parametrize("table", range(9))
    def test_a_wrong_routing_is_found(self, table):
        stage = make_routing("qwen3_30b_a3b", "logits", 3)
        launch = stage.launch

        def broken(config):
            run = launch(config)

            def wrong():
                run()
                stage.outputs[table].ravel()[0] += 1

            return wrong

        with pytest.raises(ArithmeticError):
            replace(stage, launch=broken).check(CONFIGS["slots"][0])

    def test_what_is_timed_is_the_rows_packed(self):
        shape = ModelShape("small", 1024, 1024, 16, 8)
        case = bench_activation.make_case(np, shape, 3, "bf16", 4, 0)
        case.work()()
        stage = case.in_triton(np)
        stage.outputs[1][...] = -1
        stage.run(stage.candidates()[0])()
        written = (stage.outputs[1] >= 0).all(axis=1)
        assert case.num_rows == 24 < case.x.shape[0]
        np.testing.assert_array_equal(np.flatnonzero(written), np.arange(24))


def make_routing(model: str, variant: str, num_tokens: int) -> Stage:
    case = bench_routing.make_case(np, bench_routing.SHAPES[model], num_tokens, variant, 0)
    case.check_answer()
    return case.in_triton(np)


def make_quantize(variant: str, num_tokens: int) -> Stage:
    x = random_bf16(np, (num_tokens, 1024), 0, num_tokens, deviation=2.0)
    name, *options = variant.split()
    keywords = {}
    if name == "fp8_ue8m0":
        keywords["group_size"] = int(options[0])
    if "static" in options and name == "nvfp4":
        keywords["global_scale"] = np.full(1, STATIC_GLOBAL_SCALE, np.float32)
    elif "static" in options:
        keywords["scale"] = np.full(1, STATIC_SCALE, np.float32)
    out = getattr(cumoe, f"quantize_{name}")(x, **keywords)
    return peer_stages.quantize_stage(np, variant, x, out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_variant_has_a_peer(variant):
    case = bench_quantize.make_case(np, get_shape("deepseek_v3"), variant, 1, 0)
    assert (case.in_triton is None) == ("swizzled" in variant)


@pytest.mark.gpu
class TestDevice:
    @pytest.fixture(autouse=True)
    def _triton(self):
        if not has_triton():
            pytest.skip("Triton is not installed, or interprets")

    @pytest.mark.parametrize("variant", [*QUANTIZERS, "finalize"])
    def test_quantize(self, variant):
        import cupy

        case = bench_quantize.make_case(cupy, get_shape("deepseek_v3"), variant, 300, 0)
        case.work()
        check_all(case.in_triton())

    @pytest.mark.parametrize("variant", bench_activation.VARIANTS)
    def test_activation(self, variant):
        import cupy

        shape = get_shape("deepseek_v3")
        case = bench_activation.make_case(cupy, shape, 300, variant, 16, 0)
        case.work()()
        check_all(case.in_triton(cupy))

    @pytest.mark.parametrize("variant", bench_routing.VARIANTS)
    @pytest.mark.parametrize("model", bench_routing.SHAPES)
    def test_routing(self, model, variant):
        import cupy

        case = bench_routing.make_case(cupy, bench_routing.SHAPES[model], 300, variant, 0)
        case.check_answer()
        check_all(case.in_triton(cupy))


def check_all(stage: Stage) -> None:
    for config in stage.candidates():
        stage.check(config)
