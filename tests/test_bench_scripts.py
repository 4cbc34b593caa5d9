"""The benches write what they measured: rows, files, exit codes, and how each thing is timed.

No test here looks at how long anything took. Everything runs a tiny layer; with ``-m gpu`` on CuPy.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

from bench import (
    bench_activation,
    bench_error,
    bench_layer,
    bench_quantize,
    bench_routing,
    bench_startup,
)
from bench.harness import Timing
from bench.inputs import TINY, find_model, make_layer, make_weights
from bench.stage_timing import has_triton
from cumoe import Activation

RECIPES = ("bf16", "fp8_block")


class TestBenchError:
    def test_dry_run(self, tmp_path, capsys):
        path = tmp_path / "error.json"
        assert bench_error.main(["--dry-run", "--tokens", "1", "70", "--out", str(path)]) == 0
        found = json.loads(path.read_text())
        assert found["limits"]["bf16"] == list(bench_error.LIMITS["bf16"])
        key = [(r["op"], r["model"], r["recipe"], r["num_tokens"]) for r in found["rows"]]
        assert key == [("layer_error", "tiny", r, t) for r in RECIPES for t in (1, 70)]
        for row in found["rows"]:
            assert 0 <= row["max_rel"] <= bench_error.LIMITS[row["recipe"]][0]
            assert row["unrounded_rms_rel"] > row["rms_rel"]
            assert row["us"] is None
        assert len(capsys.readouterr().out.splitlines()) == 4

    def test_a_wrong_layer_fails_and_is_written(self, tmp_path, monkeypatch, capsys):
        def broken(shape, weights, bias, max_num_tokens):
            other = replace(shape, activation=Activation(alpha=1.1))
            return make_layer(other, weights, bias, max_num_tokens)

        monkeypatch.setattr(bench_error, "make_layer", broken)
        path = tmp_path / "error.json"
        args = ["--dry-run", "--tokens", "7", "--recipes", "bf16", "--out", str(path)]
        assert bench_error.main(args) == 1
        assert json.loads(path.read_text())["rows"][0]["max_rel"] > bench_error.LIMITS["bf16"][0]
        assert "FAILED tiny bf16 T=7: over the limits" in capsys.readouterr().out

    def test_a_case_that_raises_does_not_stop_the_others(self, tmp_path, monkeypatch):
        measure_case = bench_error.measure_case

        def broken(xp, shape, layer, bias, num_tokens, seed):
            if num_tokens == 7:
                raise RuntimeError("broken")
            return measure_case(xp, shape, layer, bias, num_tokens, seed)

        monkeypatch.setattr(bench_error, "measure_case", broken)
        path = tmp_path / "error.json"
        args = ["--dry-run", "--tokens", "1", "7", "8", "--recipes", "bf16", "--out", str(path)]
        assert bench_error.main(args) == 1
        assert [r["num_tokens"] for r in json.loads(path.read_text())["rows"]] == [1, 8]


class TestBenchLayer:
    def test_dry_run(self, tmp_path):
        path = tmp_path / "layer.json"
        args = ["--dry-run", "--shared", "--tokens", "1", "7", "--repeats", "3", "--out", str(path)]
        assert bench_layer.main(args) == 0
        rows = json.loads(path.read_text())["rows"]
        stages = ["routing", "permutation", "quantize", "finalize"]
        for recipe in RECIPES:
            for tokens in (1, 7):
                found = [r for r in rows if (r["recipe"], r["num_tokens"]) == (recipe, tokens)]
                want = {"layer", "gemm1", "gemm2", *stages}
                assert {r["op"] for r in found} == want - (
                    {"quantize"} if recipe == "bf16" else set()
                )
                assert all(r["model"] == "tiny_shared" and r["us"] > 0 for r in found)
        layer = rows[0]
        assert (layer["op"], layer["variant"], layer["method"]) == ("layer", "eager", "host")
        assert layer["max_rel"] <= bench_error.LIMITS["fp8_block"][0]

    def test_layout(self, tmp_path, monkeypatch):
        """Weights in blocks of k: the same answer, under a name of their own."""
        whole = replace(find_model("tiny"), hidden_size=384, intermediate_size=128)
        monkeypatch.setattr(bench_layer, "find_model", lambda *_, **__: whole)
        errors = {}
        for layout in ("major_k", "block_major_k"):
            path = tmp_path / f"{layout}.json"
            args = ["--dry-run", "--tokens", "7", "--repeats", "3", "--layout", layout]
            assert bench_layer.main([*args, "--out", str(path)]) == 0
            rows = json.loads(path.read_text())["rows"]
            named = "tiny" if layout == "major_k" else "tiny_block_major_k"
            assert {row["model"] for row in rows} == {named}
            errors[layout] = [row["max_rel"] for row in rows if row["op"] == "layer"]
        assert errors["major_k"] == errors["block_major_k"]

    def test_work(self):
        shape = find_model("tiny", shared=False)
        weights = make_weights(shape, "fp8_block", np, seed=0)
        calls = bench_layer.make_sets(np, shape, weights, 5, 0)
        assert len(calls) == 1
        active = np.unique(calls[0].ids).size
        work = bench_layer.work_of(shape, weights, calls)
        assert work["layer"]["flops"] == 2 * 5 * 2 * (288 * 272 + 272 * 144)
        assert work["gemm1"]["flops"] == pytest.approx(2 * 5 * 2 * 288 * 272)
        assert work["gemm2"]["flops"] == pytest.approx(2 * 5 * 2 * 272 * 144)
        assert work["gemm1"]["num_bytes"] == pytest.approx(active * (288 * 272 + 4 * 4 * 3))
        assert work["gemm2"]["num_bytes"] == pytest.approx(active * (272 * 144 + 4 * 3 * 2))
        assert work["layer"]["num_bytes"] == pytest.approx(
            shape.active_weight_bytes(active, "fp8_block")
        )
        assert work["quantize"]["num_bytes"] == 5 * (272 * 2 + 272 + 4 * 3)
        assert work["finalize"]["num_bytes"] == 2 * 272 * (10 + 5) + 8 * 10

    def test_a_wrong_answer_is_not_timed(self, tmp_path, monkeypatch, capsys):
        def broken(shape, weights, bias, max_num_tokens):
            other = replace(shape, activation=Activation(beta=0.1))
            return make_layer(other, weights, bias, max_num_tokens)

        monkeypatch.setattr(bench_layer, "make_layer", broken)
        monkeypatch.setattr(bench_layer, "time_all", lambda *a, **k: pytest.fail("timed"))
        path = tmp_path / "layer.json"
        args = ["--dry-run", "--recipes", "bf16", "--tokens", "7", "--out", str(path)]
        assert bench_layer.main(args) == 1
        assert "FAILED tiny bf16 T=7: wrong answer" in capsys.readouterr().out
        assert not path.exists()

    def test_each_thing_is_timed_in_its_own_way(self, monkeypatch):
        speeds = {"routing": 5.0, "gemm1": 150.0, "layer": 200.0, "peer": 90.0}
        asked = []

        def measure(variants, *, graph=False, calls=1, **settings):
            names = [variant.__name__ for variant in variants.values()]
            asked.append((sorted(variants), graph, calls))
            return {k: Timing.of([speeds[n]]) for k, n in zip(variants, names, strict=True)}

        def named(name):
            def run(i):
                return None

            run.__name__ = name
            return run

        monkeypatch.setattr(bench_layer, "measure", measure)
        stages = {"routing": named("routing"), "gemm1": named("gemm1")}
        peers = {"torch gemm1": named("peer")}
        timings, methods = bench_layer.time_all(
            stages, named("layer"), peers, num_sets=4, repeats=3, budget_s=1.0, on_device=True
        )
        assert asked[1:] == [
            (["eager", "gemm1", "torch gemm1"], False, 1),
            (["routing"], True, 12),
            (["graph"], True, 4),
        ]
        assert methods == {
            "routing": "graph of 12",
            "gemm1": "events",
            "torch gemm1": "events",
            "eager": "events",
            "graph": "graph of 4",
        }
        assert set(timings) == set(methods)

    def test_without_graphs_there_are_still_events(self, monkeypatch, capsys):
        def measure(variants, *, graph=False, **settings):
            if graph:
                raise RuntimeError("no capture")
            return {name: Timing.of([5.0]) for name in variants}

        monkeypatch.setattr(bench_layer, "measure", measure)
        timings, methods = bench_layer.time_all(
            {"routing": print}, print, {}, num_sets=1, repeats=3, budget_s=1.0, on_device=True
        )
        assert methods == {"eager": "events", "routing": "events"}
        assert set(timings) == set(methods)
        assert "no capture" in capsys.readouterr().out


class TestBenchActivation:
    def test_dry_run(self, tmp_path):
        path = tmp_path / "stages.json"
        assert bench_activation.main(["--dry-run", "--tokens", "3", "--out", str(path)]) == 0
        rows = json.loads(path.read_text())["rows"]
        assert [row["variant"] for row in rows] == list(bench_activation.VARIANTS)
        assert {(r["op"], r["model"], r["num_tokens"]) for r in rows} == {
            ("activation", "deepseek_v3", 3)
        }
        by_variant = {row["variant"]: row for row in rows}
        for variant, row_bytes in (("fp8", 4096 + 128 + 2048 + 64), ("bf16", 8192 + 2048 + 64)):
            row = by_variant[variant]
            assert row["num_rows"] == 24 and row["peer"] == "numpy"
            moved = row["tbps"] * row["us"] * 1e6
            np.testing.assert_allclose(moved, 24 * row_bytes)
        assert by_variant["fp8 shard"]["num_rows"] < 24

    def test_a_wrong_answer_is_not_timed(self, monkeypatch, capsys):
        def broken(x, **options):
            options["out"].scale[...] = 1.0

        monkeypatch.setattr(bench_activation.cumoe, "activate", broken)
        args = ["--dry-run", "--tokens", "2", "--variants", "bf16"]
        assert bench_activation.main(args) == 1
        assert "FAILED bf16 T=2: wrong answer: a scale is off" in capsys.readouterr().out


class TestBenchRouting:
    def test_dry_run(self, tmp_path):
        path = tmp_path / "stages.json"
        args = ["--dry-run", "--tokens", "3", "70", "--out", str(path)]
        assert bench_routing.main(args) == 0
        rows = json.loads(path.read_text())["rows"]
        key = [(r["op"], r["model"], r["variant"], r["num_tokens"]) for r in rows]
        assert key == [
            ("routing", model, variant, num_tokens)
            for model in bench_routing.SHAPES
            for variant in bench_routing.VARIANTS
            for num_tokens in (3, 70)
        ]
        assert all(row["peer"] == "numpy" and row["peer_us"] > 0 for row in rows)

    @pytest.mark.parametrize("model", bench_routing.SHAPES)
    def test_the_peer_does_the_same(self, model):
        """Keys without ties, so that no order is left open; the tables are then the twin's."""
        case = bench_routing.make_case(np, bench_routing.SHAPES[model], 40, "logits", 0)
        ids, weights, permuted, token_idx, tables, offsets, counts = bench_routing.peer_of(
            np, case
        )()
        want = case.expected
        np.testing.assert_array_equal(ids, want["ids"])
        np.testing.assert_allclose(weights, want["weights"], rtol=1e-5)
        np.testing.assert_array_equal(permuted, want["permuted_idx"].ravel())
        np.testing.assert_array_equal(token_idx, want["token_idx"])
        np.testing.assert_array_equal(tables, [want["tile_expert"], want["tile_row_end"]])
        np.testing.assert_array_equal(offsets, want["expert_offsets"][:-1])
        np.testing.assert_array_equal(counts, want["tokens_per_expert"])

    def test_a_wrong_answer_is_not_timed(self, monkeypatch, capsys):
        group = bench_routing.cumoe.group

        def broken(topk, **options):
            permutation = group(topk, **options)
            permutation.token_idx[-1] = 5
            return permutation

        monkeypatch.setattr(bench_routing.cumoe, "group", broken)
        args = ["--dry-run", "--tokens", "2", "--models", "qwen3_30b_a3b", "--variants", "given"]
        assert bench_routing.main(args) == 1
        found = capsys.readouterr().out
        assert "FAILED qwen3_30b_a3b given T=2: wrong answer: token_idx differs" in found


class TestBenchQuantize:
    def test_dry_run(self, tmp_path):
        path = tmp_path / "stages.json"
        args = ["--dry-run", "--tokens", "3", "--repeats", "1", "--out", str(path)]
        assert bench_quantize.main(args) == 0
        rows = json.loads(path.read_text())["rows"]
        assert [row["variant"] or row["op"] for row in rows] == list(bench_quantize.VARIANTS)
        moved = {r["variant"] or r["op"]: r["tbps"] * r["us"] * 1e6 / 3 for r in rows}
        np.testing.assert_allclose(moved["fp8_block"], 7168 * 3 + 56 * 4)
        np.testing.assert_allclose(moved["nvfp4"], 7168 * (2 + 2 + 0.5) + 448)
        np.testing.assert_allclose(moved["finalize"], (8 + 1) * 7168 * 2 + 8 * 8)

    @pytest.mark.parametrize("variant", bench_quantize.VARIANTS)
    def test_a_wrong_answer_is_not_timed(self, variant, monkeypatch, capsys):
        name = "finalize" if variant == "finalize" else "quantize_" + variant.split()[0]
        real = getattr(bench_quantize.cumoe, name)

        def broken(*arrays, **options):
            out = real(*arrays, **options)
            values = getattr(out, "values", out)
            values.view(np.uint8)[-1, -1] ^= 0x10
            return out

        monkeypatch.setattr(bench_quantize.cumoe, name, broken)
        assert bench_quantize.main(["--dry-run", "--tokens", "2", "--variants", variant]) == 1
        expected = f"FAILED {variant} T=2: ArithmeticError: wrong answer: 1 of "
        assert expected in capsys.readouterr().out


class TestBenchStartup:
    def test_dry_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr(bench_startup, "RESULTS", tmp_path / "none.json")
        path = tmp_path / "startup.json"
        args = ["--dry-run", "--repeats", "1", "--cold-repeats", "1", "--recipes", "bf16"]
        assert bench_startup.main([*args, "--tokens", "2", "--out", str(path)]) == 0
        rows = json.loads(path.read_text())["rows"]
        assert [(r["op"], r.get("variant")) for r in rows] == [
            ("import_cumoe", None),
            ("first_call", "cold"),
            ("first_call", "warm"),
            ("second_call", None),
        ]
        assert [r["recipe"] for r in rows] == [None, "bf16", "bf16", "bf16"]

    def test_cold_calls_have_empty_caches_and_warm_ones_share_one(self, monkeypatch):
        folders = []

        def run_worker(job, CUMOE_CACHE_DIR):
            folders.append(CUMOE_CACHE_DIR)
            return {"first_us": 10.0 * len(folders), "second_us": 1.0}

        monkeypatch.setattr(bench_startup, "run_worker", run_worker)
        job = {"model": "tiny", "recipe": "bf16", "num_tokens": 2, "task": "first_call"}
        cold, warm, second = bench_startup.first_calls(job, 2, 3)
        assert folders[0] != folders[1] and set(folders[2:]) == {folders[0]}
        assert (cold["us"], warm["us"], second["us"]) == (15.0, 40.0, 1.0)

    def test_a_process_that_fails_is_reported(self):
        with pytest.raises(RuntimeError, match="no such thing"):
            bench_startup.run_fresh(["-c", "raise SystemExit('no such thing')"])

    def test_the_install_row_outlives_other_runs(self, tmp_path, monkeypatch):
        path = tmp_path / "startup.json"
        monkeypatch.setattr(bench_startup, "RESULTS", path)
        size = bench_error.check_row(
            {"op": "install_size", "model": None, "recipe": None, "num_tokens": 0, "num_gpus": 1}
            | {"variant": "cu12", "mbytes": 600.0, "largest_mbytes": {}}
        )
        monkeypatch.setattr(bench_startup, "install_row", lambda extra: size | {"variant": extra})
        assert bench_startup.main(["--install-size"]) == 0
        first = json.loads(path.read_text())
        call = size | {
            "op": "first_call",
            "variant": "cold",
            "us": 2.0,
            "us_min": 1.0,
            "us_max": 3.0,
        }
        monkeypatch.setattr(bench_startup, "startup_rows", lambda args: [call])
        assert bench_startup.main(["--dry-run", "--out", str(path)]) == 0
        rows = json.loads(path.read_text())["rows"]
        assert [r["op"] for r in rows] == ["install_size", "first_call"]
        assert (rows[0]["mbytes"], rows[0]["date"]) == (600.0, first["date"])
        assert bench_startup.main(["--install-size", "cu13"]) == 0
        rows = json.loads(path.read_text())["rows"]
        assert [(r["op"], r["variant"]) for r in rows] == [
            ("first_call", "cold"),
            ("install_size", "cu13"),
        ]


@pytest.mark.gpu
class TestDevice:
    def test_error_bench(self, tmp_path):
        path = tmp_path / "error.json"
        args = ["--models", "tiny", "--tokens", "1", "70", "--out", str(path)]
        assert bench_error.main(args) == 0
        assert len(json.loads(path.read_text())["rows"]) == 4

    def test_activation_bench(self, tmp_path):
        path = tmp_path / "stages.json"
        assert bench_activation.main(["--tokens", "1", "300", "--out", str(path)]) == 0
        expected = {"cupy", "triton"} if has_triton() else {"cupy"}
        assert set(json.loads(path.read_text())["rows"][0]["peers"]) == expected

    def test_routing_bench(self, tmp_path):
        path = tmp_path / "stages.json"
        args = ["--tokens", "1", "40", "700", "--models", "deepseek_v3", "--out", str(path)]
        assert bench_routing.main(args) == 0
        rows = json.loads(path.read_text())["rows"]
        assert [row["num_launches"] for row in rows if row["variant"] == "logits"] == [1, 1, 2]
        expected = {"cupy", "triton"} if has_triton() else {"cupy"}
        assert all(set(row["peers"]) == expected for row in rows)

    def test_quantize_bench(self, tmp_path):
        path = tmp_path / "stages.json"
        assert bench_quantize.main(["--tokens", "1", "300", "--out", str(path)]) == 0
        for row in json.loads(path.read_text())["rows"]:
            in_triton = has_triton() and "swizzled" not in (row["variant"] or "")
            assert set(row["peers"]) == ({"cupy", "triton"} if in_triton else {"cupy"})

    def test_layer_bench(self, tmp_path):
        path = tmp_path / "layer.json"
        args = ["--models", "tiny", "--tokens", "1", "70", "--repeats", "3", "--out", str(path)]
        assert bench_layer.main(args) == 0
        found = json.loads(path.read_text())
        assert found["copy_tbps"] > 0
        variants = {r.get("variant") for r in found["rows"] if r["op"] == "layer"}
        assert variants == {"eager", "graph"}

    def test_peers(self):
        pytest.importorskip("torch")
        import cupy

        weights = make_weights(TINY, "bf16", cupy, seed=0)
        (call, *_) = bench_layer.make_sets(cupy, TINY, weights, 7, 0)
        peers = bench_layer.torch_peers(call)
        assert list(peers) == ["torch gemm1", "torch gemm2"]

    def test_first_call_and_compile(self):
        figures = bench_startup.first_call("tiny", "fp8_block", 2, "cupy")
        assert figures["first_us"] > 0 and figures["second_us"] > 0
        assert all(us > 0 for us in bench_startup.compile_times("tiny", "bf16", 2).values())


def test_arguments_are_the_ones_the_code_reads():
    modules = (bench_activation, bench_layer, bench_error, bench_quantize, bench_routing)
    for module in (*modules, bench_startup):
        args = module._parser().parse_args(["--dry-run"])
        assert isinstance(args, argparse.Namespace) and args.dry_run and args.out is None
