"""The harness measures what it says it measures: order, counts, statistics, rows, files.

No test here looks at how long anything took.
"""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from bench import harness, record
from bench.harness import Timing, check_row, make_row, measure, print_table, write_results
from bench.record import peer_fields
from bench.shapes import MODELS, ModelShape, get_shape, make_bias, make_hidden_states, make_logits
from cumoe.config import Routing, RoutingMethod

ROW = {"op": "layer", "model": "mixtral_8x7b", "recipe": "bf16", "num_tokens": 64, "num_gpus": 1}
TIMES = {"us": 2.0, "us_min": 1.5, "us_max": 4.0}


class TestTiming:
    def test_statistics(self):
        timing = Timing.of([5, 1, 2, 3, 100])
        assert (timing.us, timing.us_min, timing.us_max) == (3, 1, 100)
        assert timing.us_p10 == pytest.approx(1.4)
        assert timing.us_p90 == pytest.approx(62)
        assert timing.samples == (5, 1, 2, 3, 100)

    def test_empty(self):
        with pytest.raises(ValueError, match="samples"):
            Timing.of([])


class TestMeasure:
    def test_variants_take_turns(self):
        log: list[str] = []
        timings = measure(
            {"a": lambda i: log.append(f"a{i}"), "b": lambda i: log.append(f"b{i}")},
            repeats=3,
            warmup_s=0,
            clock="host",
        )
        assert list(timings) == ["a", "b"]
        assert log == ["a0", "a0", "b0", "b0"] + ["a0", "b0"] * 3
        assert all(len(t.samples) == 3 and t.us_min >= 0 for t in timings.values())

    def test_inputs_rotate(self):
        seen: list[int] = []
        measure({"a": seen.append}, repeats=4, warmup_s=0, calls=2, inputs_rotate=3, clock="host")
        assert seen == [0, 1] + [0, 1, 2, 0, 1, 2, 0, 1]

    def test_time_is_per_call(self, monkeypatch):
        ticks = iter(range(0, 10**9, 6000))
        monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: next(ticks))
        timing = measure({"a": lambda i: None}, repeats=3, warmup_s=0, calls=3, clock="host")["a"]
        assert timing.samples == (2.0, 2.0, 2.0)

    def test_warm_up_is_by_time(self, monkeypatch):
        clock = iter(x / 4 for x in range(10**6))
        monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
        seen: list[int] = []
        measure({"a": seen.append}, repeats=1, warmup_s=2.0, inputs_rotate=2, clock="host")
        assert len(seen) > 4
        assert set(seen) == {0, 1}

    def test_budget_leaves_three_samples(self):
        timing = measure({"a": lambda i: None}, repeats=50, warmup_s=0, budget_s=0.0, clock="host")[
            "a"
        ]
        assert len(timing.samples) == harness.MIN_SAMPLES

    @pytest.mark.parametrize(
        "bad", [{"repeats": 0}, {"calls": 0}, {"inputs_rotate": 0}, {"clock": "wall"}]
    )
    def test_bad_arguments(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            measure({"a": lambda i: None}, **({"clock": "host"} | bad))

    def test_host_has_no_graphs(self):
        with pytest.raises(ValueError, match="graph"):
            measure({"a": lambda i: None}, graph=True, clock="host")

    def test_an_error_of_a_variant_is_passed_on(self):
        def broken(i):
            raise RuntimeError("broken variant")

        with pytest.raises(RuntimeError, match="broken variant"):
            measure({"a": broken}, clock="host")

    def test_num_cold_inputs(self, monkeypatch):
        monkeypatch.setattr(harness, "device_available", lambda: True)
        monkeypatch.setattr(harness, "l2_bytes", lambda: 1000)
        assert harness.num_cold_inputs(1) == 3001
        assert harness.num_cold_inputs(1000) == 4
        assert harness.num_cold_inputs(10**6) == 2
        monkeypatch.setattr(harness, "device_available", lambda: False)
        assert harness.num_cold_inputs(10**6) == 1
        with pytest.raises(ValueError, match="bytes_per_call"):
            harness.num_cold_inputs(0)


class TestRows:
    def test_absent_fields_become_none(self):
        row = check_row(ROW | {"us_p90": 3.0})
        assert [row[name] for name in ("us", "tflops", "tbps", "peer", "peer_us")] == [None] * 5
        assert row["us_p90"] == 3.0

    def test_rates(self):
        timing = Timing.of([2.0, 1.5, 4.0])
        row = make_row(
            "gemm1",
            model=None,
            recipe="bf16",
            num_tokens=8,
            timing=timing,
            flops=4e9,
            num_bytes=6e6,
            peer="cublas",
            peer_us=3.0,
            config="64x128",
        )
        assert row == ROW | TIMES | {
            "op": "gemm1",
            "model": None,
            "num_tokens": 8,
            "tflops": pytest.approx(2000.0),
            "tbps": pytest.approx(3.0),
            "peer": "cublas",
            "peer_us": 3.0,
            "config": "64x128",
        }

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"op": ""}, "op"),
            ({"op": 3}, "op"),
            ({"model": 3}, "model"),
            ({"recipe": True}, "recipe"),
            ({"num_tokens": -1}, "num_tokens"),
            ({"num_tokens": 1.0}, "num_tokens"),
            ({"num_tokens": True}, "num_tokens"),
            ({"num_gpus": 0}, "num_gpus"),
            ({"us": None}, "us"),
            ({"us": 0.0}, "us"),
            ({"us": math.nan}, "us"),
            ({"us": "2"}, "us"),
            ({"us": 1.0}, "us"),
            ({"us_max": 1.9}, "us"),
            ({"tflops": -1.0}, "tflops"),
            ({"tbps": math.inf}, "tbps"),
            ({"peer": "cublas"}, "peer"),
            ({"peer_us": 3.0}, "peer"),
        ],
    )
    def test_bad_rows(self, change, field):
        with pytest.raises(ValueError, match=f"^{field}"):
            check_row(ROW | TIMES | change)

    @pytest.mark.parametrize("name", list(ROW))
    def test_missing_fields(self, name):
        with pytest.raises(ValueError, match=name):
            check_row({key: value for key, value in ROW.items() if key != name})

    def test_table(self):
        stream = io.StringIO()
        rows = [
            ROW | TIMES | {"tbps": 2.15, "tflops": 320.0, "peer": "cublas", "peer_us": 3.0},
            ROW | {"op": "error", "max_error": 1e-3, "variant": "fp8"},
        ]
        print_table(rows, title="t", roof_tbps=4.3, console=Console(file=stream, width=200))
        text = stream.getvalue()
        for part in ("layer", "1.5 .. 4.0", "320.00", "2.15 (50 %)", "(cublas)", "1.50", "(fp8)"):
            assert part in text

    def test_peers(self):
        peers = {"cupy": {"us": 500.0}, "triton": {"us": 3.0, "config": "1x512x1"}}
        fields = peer_fields(peers)
        assert fields == {"peer": "triton", "peer_us": 3.0, "peers": peers}
        assert peer_fields({}) == {"peer": None, "peer_us": None, "peers": {}}
        stream = io.StringIO()
        rows = [ROW | TIMES | fields, ROW | TIMES | peer_fields({})]
        print_table(rows, console=Console(file=stream, width=200))
        lines = [line for line in stream.getvalue().splitlines() if "(" in line]
        assert [line.replace("│", " ").split()[-3:] for line in lines] == [
            ["3.0", "(triton)", "1.50"],
            ["500.0", "(cupy)", "250.00"],
        ]


class TestResults:
    def test_file(self, tmp_path):
        path = tmp_path / "new" / "r.json"
        row = ROW | TIMES | {"max_error": np.float32(0.5)}
        write_results(path, [row], seed=7, copy_tbps=4.3)
        found = json.loads(path.read_text())
        assert {"gpu", "driver", "cuda", "clocks", "commit", "command", "date"} <= set(found)
        assert (found["seed"], found["copy_tbps"]) == (7, 4.3)
        assert found["command"].startswith("python ")
        assert found["packages"]["numpy"] == np.__version__
        assert found["rows"] == [check_row(row) | {"max_error": 0.5}]
        assert [p.name for p in path.parent.iterdir()] == ["r.json"]

    def test_merge_keeps_other_rows_with_their_origin(self, tmp_path, monkeypatch):
        path = tmp_path / "r.json"
        one, two = ROW | TIMES, ROW | TIMES | {"num_tokens": 1}
        old = write_results(path, [one, two], seed=0)
        monkeypatch.setattr(record, "_commit", lambda: "new")
        write_results(path, [one | {"us": 3.0}, one | {"variant": "graph"}], seed=0, merge=True)
        found = json.loads(path.read_text())
        assert [(r["num_tokens"], r["us"], r.get("variant")) for r in found["rows"]] == [
            (1, 2.0, None),
            (64, 3.0, None),
            (64, 2.0, "graph"),
        ]
        assert (found["commit"], found["rows"][0]["commit"]) == ("new", old["commit"])
        write_results(path, [one], seed=0)
        assert len(json.loads(path.read_text())["rows"]) == 1

    def test_merge_refuses_another_machine(self, tmp_path):
        path = tmp_path / "r.json"
        write_results(path, [ROW], seed=0)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"gpu": "another"}))
        before = path.read_text()
        with pytest.raises(ValueError, match="merge: .*gpu 'another'"):
            write_results(path, [ROW], seed=0, merge=True)
        assert path.read_text() == before

    @pytest.mark.parametrize(
        "rows", [[ROW, ROW], [ROW | {"op": ""}], [ROW | {"max_error": math.nan}]]
    )
    def test_nothing_is_written_for_bad_rows(self, tmp_path, rows):
        with pytest.raises(ValueError):
            write_results(tmp_path / "r.json", rows, seed=0)
        assert not list(tmp_path.iterdir())

    def test_commit_without_git(self, monkeypatch):
        def no_git(*command):
            raise FileNotFoundError("git")

        monkeypatch.setattr(record, "_output", no_git)
        monkeypatch.delenv("BENCH_COMMIT", raising=False)
        assert record.environment()["commit"] is None
        monkeypatch.setenv("BENCH_COMMIT", "abc")
        assert record.environment()["commit"] == "abc"


class TestShapes:
    @pytest.mark.parametrize("shape", MODELS.values(), ids=list(MODELS))
    def test_each_model_is_a_valid_layer(self, shape):
        routing = shape.routing()
        assert isinstance(routing, Routing)
        assert routing.total_top_k == shape.total_top_k
        assert shape.routing(scaling_factor=3.0, num_shared_experts=0).scaling_factor == 3.0
        biased = routing.method in (RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2)
        assert shape.has_bias == biased
        bias = make_bias(shape, seed=0)
        assert (bias is not None) == biased
        assert bias is None or bias.shape == (shape.num_experts,)

    def test_unknown_model(self):
        assert get_shape("kimi_k2").num_experts == 384
        with pytest.raises(ValueError, match="kimi_k2"):
            get_shape("kimi")

    def test_flops_and_bytes(self):
        shape = ModelShape("tiny", 130, 100, 4, 2, num_shared_experts=1)
        assert shape.gemm_flops(5) == 2 * 5 * 3 * (200 * 130 + 130 * 100)
        assert shape.expert_bytes("bf16") == 2 * (200 * 130 + 130 * 100)
        assert shape.expert_bytes("fp8_block") == 39000 + 4 * (2 * 2 + 2 * 1)
        assert shape.active_weight_bytes(3, "bf16") == 3 * 78000
        assert shape.min_bytes(5, 3, "bf16") == 3 * 78000 + 5 * (4 * 130 + 4 * 4)
        with pytest.raises(ValueError, match="recipe"):
            shape.expert_bytes("int4")

    def test_known_weight_bytes(self):
        shape = get_shape("deepseek_v3")
        routed_bytes = shape.active_weight_bytes(8, "fp8_block")
        assert routed_bytes == pytest.approx(352e6, rel=0.01)

    def test_expected_active_experts(self):
        shape = get_shape("deepseek_v3")
        assert shape.expected_active_experts(0) == 0
        assert shape.expected_active_experts(1) == pytest.approx(9)
        assert shape.expected_active_experts(10**6) == pytest.approx(257)

    def test_logits_repeat_with_the_seed(self):
        shape = get_shape("qwen3_30b_a3b")
        logits = make_logits(shape, 16, skew=1.2, seed=3)
        assert logits.dtype == np.float32 and np.isfinite(logits).all()
        np.testing.assert_array_equal(logits, make_logits(shape, 16, skew=1.2, seed=3))
        assert (logits != make_logits(shape, 16, skew=1.2, seed=4)).all()
        assert make_logits(shape, 0, seed=0).shape == (0, 128)
        assert make_hidden_states(shape, 3, seed=0).shape == (3, 2048)

    def test_uniform_and_skewed_first_choices(self):
        shape = get_shape("deepseek_v3")
        num_tokens = 20000

        def most_popular(skew):
            first = make_logits(shape, num_tokens, skew=skew, seed=0).argmax(axis=1)
            return np.bincount(first).max() / num_tokens

        weights = np.arange(1, 257) ** -1.2
        assert most_popular(None) < 2 / 256
        assert most_popular(1.2) == pytest.approx(weights[0] / weights.sum(), abs=0.02)

    @pytest.mark.parametrize("skew", [0.0, -1.0, math.nan, math.inf])
    def test_bad_skew(self, skew):
        with pytest.raises(ValueError, match="skew"):
            make_logits(get_shape("mixtral_8x7b"), 1, skew=skew, seed=0)

    def test_bad_num_tokens(self):
        with pytest.raises(ValueError, match="num_tokens"):
            make_logits(get_shape("mixtral_8x7b"), -1, seed=0)


@pytest.mark.gpu
class TestDevice:
    @pytest.mark.parametrize("flush_l2", [False, True])
    @pytest.mark.parametrize("graph", [False, True])
    def test_every_call_runs_on_the_current_stream(self, graph, flush_l2):
        import cupy

        blocks = [cupy.zeros(1 << 16, cupy.uint8) for _ in range(3)]
        streams = set()

        def fill(i):
            streams.add(cupy.cuda.get_current_stream().ptr)
            blocks[i].data.memset_async(i + 1, blocks[i].nbytes)

        timings = measure(
            {"a": fill, "b": fill},
            repeats=5,
            warmup_s=0.01,
            flush_l2=flush_l2,
            graph=graph,
            inputs_rotate=3,
            clock="device",
        )
        assert all(len(t.samples) == 5 and t.us_min > 0 for t in timings.values())
        assert len(streams) == 1 and 0 not in streams
        for i, block in enumerate(blocks):
            assert (block.get() == i + 1).all()
        assert cupy.cuda.get_current_stream().ptr != next(iter(streams))

    def test_an_error_during_capture_is_passed_on(self):
        import cupy

        calls = []

        def broken(i):
            calls.append(i)
            if len(calls) > 2:
                raise RuntimeError("broken variant")

        with pytest.raises(RuntimeError, match="broken variant"):
            measure({"a": broken}, warmup_s=0, graph=True, clock="device")
        cupy.zeros(1).get()

    def test_environment(self):
        found = record.environment()
        assert found["gpu"] and found["driver"] and found["cuda"] and found["nvrtc"]
        assert found["clocks"]["sm_mhz"] > 0

    def test_copy_rate(self):
        assert harness.copy_rate_tbps(1 << 26) > 0
        assert harness.num_cold_inputs(1 << 20) > 1
