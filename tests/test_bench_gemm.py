"""The GEMM bench: its data, its errors, what it keeps of peers, its rows and exit codes.

No test here looks at how long anything took. Peers are stand-ins where torch is not installed; the
launches of a planned case run on the CPU, kernel by kernel.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

import cumoe
from bench import bench_gemm, gemm_case
from bench.bench_error import BLOCK_ROWS, round_bf16, widen
from bench.gemm_case import ROUTINGS, draw_ids, find_gemm_shape, gemm_work, make_case
from bench.gemm_errors import Errors, compare, error_fields, find_problems, sample_experts
from bench.harness import Timing
from bench.inputs import make_weights
from bench.peers import Peer
from bench.shapes import MODELS
from cumoe import Quantized
from tests.host import loader
from tests.host.memory import Arena
from tests.host.tensor_map import encode_tiled

RECIPES = ("bf16", "fp8_block")
TINY = find_gemm_shape("tiny")


class OnDevice(np.ndarray):
    """Host memory that names a device, as a plan expects of its inputs."""

    device = SimpleNamespace(id=0)


def tiny_case(recipe: str, num_tokens: int = 40, routing: str = "uniform", seed: int = 0):
    weights = make_weights(TINY, recipe, np, seed=seed)
    case = make_case(np, TINY, weights, num_tokens, routing, seed)
    case.run()
    return case


class TestShapes:
    @pytest.mark.parametrize("name", bench_gemm.ARGUMENTS.models)
    def test_models_without_shared_experts(self, name):
        shape, model = find_gemm_shape(name), MODELS[name]
        assert shape.num_shared_experts == 0
        for field in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            assert getattr(shape, field) == getattr(model, field)

    def test_sizes_are_whole_blocks(self):
        with pytest.raises(ValueError, match="2880"):
            find_gemm_shape("gpt_oss_120b_like")


class TestIds:
    @pytest.mark.parametrize("skew", ROUTINGS.values())
    @pytest.mark.parametrize("name", ["tiny", "deepseek_v3", "mixtral_8x7b"])
    def test_no_expert_twice(self, name, skew):
        shape = find_gemm_shape(name)
        ids = draw_ids(shape, 300, skew, 3)
        assert ids.shape == (300, shape.top_k) and ids.dtype == np.int32
        assert ids.min() >= 0 and ids.max() < shape.num_experts
        assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
        np.testing.assert_array_equal(ids, draw_ids(shape, 300, skew, 3))
        assert (ids != draw_ids(shape, 300, skew, 4)).any()

    def test_every_expert_can_be_chosen(self):
        shape = find_gemm_shape("mixtral_8x7b")
        assert set(draw_ids(shape, 500, None, 0)[:, 1]) == set(range(8))

    def test_loads(self):
        shape = find_gemm_shape("deepseek_v3")
        uniform, zipf = (
            np.bincount(draw_ids(shape, 4000, skew, 0).ravel(), minlength=256)
            for skew in (None, 1.2)
        )
        assert uniform.min() > 80 and uniform.max() < 180  # 125 expected
        assert zipf.max() > 3000 and np.median(zipf) < 80

    def test_first_choices_follow_the_weights(self):
        shape = find_gemm_shape("deepseek_v3")
        first = np.bincount(draw_ids(shape, 20000, 1.2, 0)[:, 0], minlength=256)
        p = np.arange(1, 257) ** -1.2
        want = 20000 * np.sort(p / p.sum())[::-1]
        np.testing.assert_allclose(np.sort(first)[::-1][:5], want[:5], rtol=0.1)


class TestCase:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_rows_are_the_layers(self, recipe):
        case = tiny_case(recipe)
        weights = np.full(case.ids.shape, 0.5, np.float32)
        parts = cumoe.routed_moe(
            case.x, cumoe.TopK(case.ids, weights), case.weights, finalize=False
        )
        want = parts.rows[parts.permuted_idx.ravel()]
        got = case.rows[case.permuted_idx]
        np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("stage", ["gemm1", "gemm2"])
    def test_rows_that_are_not_written_are_found(self, recipe, stage):
        case = tiny_case(recipe)
        real = case.stages[stage]

        def broken(i):
            out = case.rows if stage == "gemm2" else case.act
            values = out.values if isinstance(out, Quantized) else out
            row = case.permuted_idx[-1]
            before = values[row].copy()
            real(i)
            values[row] = before

        case.stages[stage] = broken
        with pytest.raises(ArithmeticError, match="not every row"):
            case.run()

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_operands_give_the_products(self, recipe):
        case = tiny_case(recipe, 9)
        for name in gemm_case.GEMMS:
            operands = case.operands(name)
            a, w = operands.a, operands.w
            wide = [
                cumoe.dequantize(q) if isinstance(q, Quantized) else q.astype(np.float32)
                for q in (a, w)
            ]
            slots = np.arange(case.ids.size)
            want = np.einsum(
                "sk,snk->sn", wide[0][slots // operands.slots_per_row], wide[1][case.ids.ravel()]
            )
            if name == "gemm2":
                got = widen(case.rows[case.permuted_idx])
                np.testing.assert_allclose(got, want, rtol=0.01, atol=0.01)
            else:
                product, _, index = case.unfused()
                np.testing.assert_allclose(widen(product[index]), want, rtol=0.01, atol=0.02)

    def test_work(self):
        weights = make_weights(TINY, "fp8_block", np, seed=0)
        work = gemm_work(weights, 10, 3)
        assert work["gemm1"] == {"flops": 2 * 10 * 256 * 384, "num_bytes": 3 * (256 * 384 + 4 * 6)}
        assert work["gemm2"] == {"flops": 2 * 10 * 128 * 384, "num_bytes": 3 * (128 * 384 + 4 * 3)}

    @pytest.mark.parametrize("arch", [800, 900])
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_planned_launches(self, recipe, arch):
        """The case of a GPU, its launches executed on the CPU, agrees with the oracle."""
        loader.require()
        options = loader.HostOptions(arch=arch)
        device = SimpleNamespace(
            arch={800: "sm_80", 900: "sm_90a"}[arch], max_smem_bytes=232448, num_sms=5
        )
        made = make_weights(TINY, recipe, np, seed=0)
        ids = draw_ids(TINY, 21, None, 0)
        with Arena() as arena:
            buffers: dict[str, np.ndarray] = {}

            class Workspace:
                def __init__(self, like):
                    pass

                def take(self, name, shape, dtype, zeros=False):
                    if name not in buffers:
                        buffers[name] = arena.empty(shape, dtype).view(OnDevice)
                        if zeros:
                            buffers[name][...] = 0
                    return buffers[name]

            def run_plan(plan, call, stream):
                for launches in plan.stages.values():
                    loader.run(launches, options)

            xp = SimpleNamespace(
                asarray=arena.array,
                full=lambda *a: arena.array(np.full(*a)),
                cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0)),
            )
            names = ("w13", "w2", "w13_scale", "w2_scale")
            parts = [getattr(made, n) for n in names if getattr(made, n) is not None]
            weights = cumoe.ExpertWeights(*map(arena.array, parts), gate_up_order="gate_up")
            x = arena.array(gemm_case.random_bf16(np, (21, TINY.hidden_size), 5)).view(OnDevice)
            a = x
            if recipe == "fp8_block":
                q = cumoe.quantize_fp8_block(np.asarray(x))
                values = arena.array(q.values).view(OnDevice)
                a = cumoe.Quantized(values, arena.array(q.scale))
            with (
                mock.patch("cumoe.plan.get_device", lambda ordinal: device),
                mock.patch("cumoe.grouped_gemm.get_device", lambda ordinal: device),
                mock.patch("cumoe.kernels_sm90.encode_tiled", encode_tiled),
                mock.patch("cumoe.plan.Workspace", Workspace),
                mock.patch("cumoe.plan.DevicePlan.run", run_plan),
                mock.patch.object(
                    gemm_case,
                    "planned_stage",
                    lambda launches: lambda i: loader.run(launches, options),
                ),
            ):
                case = gemm_case._make_planned(xp, weights, TINY.activation, ids, x, a)
                case.run()
            case.xp = np
            sample = sample_experts(ids, 0)
            with mock.patch.object(
                type(case), "unfused", lambda case: (None, case.rows, case.permuted_idx)
            ):
                errors = compare(case, sample)
            assert find_problems(errors, recipe) == []
            assert set(case.configs) == {"gemm1", "gemm2"}


class TestErrors:
    def test_sample(self):
        counts = [1, 2000, 70, 0, 5, 512, 3]
        ids = np.repeat(np.arange(7), counts).astype(np.int32)[:, None]
        every = sample_experts(ids, 0)
        assert sorted(every) == [0, 1, 2, 4, 5, 6]
        assert {e: s.size for e, s in every.items() if e != 1} == {0: 1, 2: 70, 4: 5, 5: 512, 6: 3}
        some = sample_experts(ids, 3)
        assert len(some) == 3 and {1, 0} < set(some)
        slots = some[1] - 1  # expert 1 has slots 1 to 2000: 31 blocks of 64 and one of 16
        assert slots[: 4 * 64].tolist() == list(range(256))
        assert slots[4 * 64 :].tolist() == list(range(28 * BLOCK_ROWS, 2000))

    def test_over(self, rng):
        want = rng.standard_normal((150, 40)).astype(np.float32)
        noise = rng.standard_normal(want.shape).astype(np.float32)
        ours, theirs = Errors(), Errors()
        for expert, factor in ((3, 1.0), (8, 1.5)):
            ours.add(np, expert, want + np.float32(0.01 * factor) * noise, want)
            theirs.add(np, expert, want + np.float32(0.01) * noise, want)
        ratio = ours.over(theirs)
        assert ratio["expert"] == 8
        for name in ("block_max", "block_rms", "expert_max", "expert_rms"):
            assert ratio[name] == pytest.approx(1.5, rel=1e-3)
        assert ratio["overall_rms"] == pytest.approx(((1 + 1.5**2) / 2) ** 0.5, rel=1e-3)
        assert theirs.rms == pytest.approx(
            0.01 * np.sqrt((noise**2).mean() / (want**2).mean()), rel=1e-3
        )
        assert (ours.num_rows, ours.worst().expert, len(ours.blocks[0])) == (300, 8, 3)

    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_the_reference_passes(self, recipe, routing):
        case = tiny_case(recipe, 300, routing)
        sample = sample_experts(case.ids, 0)
        errors = compare(case, sample, cublas=round_product)
        assert find_problems(errors, recipe) == []
        row = error_fields(errors, sample)
        assert row["checked_rows"] == 600 and row["checked_experts"] == len(sample)
        assert row["fused_over_unfused"]["overall_rms"] < 1
        assert ("rows_over_cublas" in row) == (recipe == "bf16")
        if recipe == "bf16":  # the activation of a rounded product is worse than the fused one
            assert row["act_over_cublas"]["overall_rms"] < 0.9
            assert row["rows_over_cublas"]["expert_rms"] == pytest.approx(1, abs=0.01)
        json.dumps(row, allow_nan=False)

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("stage", ["gemm1", "gemm2"])
    def test_one_wrong_row_is_found_and_placed(self, recipe, stage):
        case = tiny_case(recipe)
        slot = 17
        if stage == "gemm2":
            values = widen(case.rows[case.permuted_idx[slot]])
            values[5] += 4
            case.rows[case.permuted_idx[slot]] = values.astype(ml_dtypes.bfloat16)
        else:
            values = case.act.values if isinstance(case.act, Quantized) else case.act
            values[case.permuted_idx[slot]] = values[case.permuted_idx[slot]][::-1]
        problems = find_problems(compare(case, sample_experts(case.ids, 0)), recipe)
        expert = case.ids.ravel()[slot]
        assert any(f"wrong answer: {stage}" in p and f"expert {expert}," in p for p in problems)

    def test_an_error_over_cublas_is_found(self):
        case = tiny_case("bf16", 300)
        noise = np.random.default_rng(0).standard_normal(case.rows.shape).astype(np.float32)
        case.rows[...] = (widen(case.rows) * (1 + 0.006 * noise)).astype(case.rows.dtype)
        errors = compare(case, sample_experts(case.ids, 0), cublas=round_product)
        assert any(p.startswith("rows: ") and "cuBLAS" in p for p in find_problems(errors, "bf16"))

    def test_a_fused_path_that_is_worse_is_found(self):
        case = tiny_case("fp8_block", 300)
        unfused = case.unfused()
        noise = np.random.default_rng(0).standard_normal(case.rows.shape).astype(np.float32)
        case.rows[...] = (widen(case.rows) * (1 + 0.005 * noise)).astype(case.rows.dtype)
        with mock.patch.object(type(case), "unfused", lambda case: unfused):
            errors = compare(case, sample_experts(case.ids, 0))
        assert [p for p in find_problems(errors, "fp8_block") if p.startswith("fused: 1.0")]


def round_product(rows, matrix):
    """cuBLAS in NumPy: a product rounded once."""
    return round_bf16(widen(rows) @ widen(matrix).T)


class TestPeers:
    def peer(self, case, name, product, order):
        """A peer that computes in float32 and returns rows in an order of its own."""
        operands = case.operands(name)
        a, w = (widen(x) for x in operands.payloads)
        flat = case.ids.ravel()

        def run(i):
            rows = [product(a[s // operands.slots_per_row], w[flat[s]]) for s in order]
            return np.array(rows, np.float32)

        return Peer("stand_in", run, np.argsort(order))

    def test_rows_are_found_and_wrong_peers_left_out(self, monkeypatch, capsys):
        case = tiny_case("bf16", 20)
        order = np.random.default_rng(0).permutation(case.ids.size)
        monkeypatch.setattr(
            bench_gemm, "peer_rows", lambda xp, peer, result, slots: result[peer.place[slots]]
        )
        peers = {
            "gemm1": {"stand_in": self.peer(case, "gemm1", lambda a, w: w @ a, order)},
            "gemm2": {"stand_in": self.peer(case, "gemm2", lambda a, w: w @ a * 1.02, order)},
        }
        errors = compare(case, sample_experts(case.ids, 0), peers=bench_gemm.run_peers(case, peers))
        right = bench_gemm.right_peers(peers, errors)
        assert {name: list(group) for name, group in right.items()} == {
            "gemm1": ["stand_in"],
            "gemm2": [],
        }
        assert "without stand_in gemm2: ArithmeticError: wrong by 2.0" in capsys.readouterr().out

    def test_a_peer_that_fails_is_left_out(self, capsys):
        case = tiny_case("bf16", 5)

        def fail(i):
            raise RuntimeError("no kernel")

        peers = {"gemm1": {"broken": Peer("broken", fail, np.arange(10))}}
        rows_of = bench_gemm.run_peers(case, peers)
        assert rows_of == {"gemm1": {}}
        assert bench_gemm.right_peers(peers, {}) == {"gemm1": {}}
        assert "without broken gemm1: RuntimeError: no kernel" in capsys.readouterr().out

    def test_interrupts_are_not_held_back(self):
        with pytest.raises(KeyboardInterrupt), bench_gemm.guest("peer"):
            raise KeyboardInterrupt

    def test_row(self):
        case = tiny_case("bf16", 20)
        peers = {n: Peer(n, print, np.arange(40), "16x64") for n in ("slow", "fast")}
        errors = {}
        for name in peers:
            errors[f"gemm1 {name}"] = Errors()
            errors[f"gemm1 {name}"].add(np, 0, np.full((1, 4), 1.001), np.ones((1, 4)))
        times = {"cumoe": 10.0, "slow": 30.0, "fast": 20.0, "dense": 5.0}
        timings = {name: (Timing.of([us]), 1500) for name, us in times.items()}
        key = {"model": "tiny", "recipe": "bf16", "num_tokens": 20, "variant": "zipf"}
        row = bench_gemm.gemm_row("gemm1", case, key, timings, peers, errors)
        assert (row["peer"], row["peer_us"], row["us"], row["sm_mhz"]) == ("fast", 20.0, 10.0, 1500)
        flops = 2 * 40 * 256 * 384
        assert row["tflops"] == pytest.approx(flops / 10 * 1e-6)
        assert row["peers"]["slow"]["tflops"] == pytest.approx(flops / 30 * 1e-6)
        assert row["peers"]["slow"]["config"] == "16x64"
        assert row["peers"]["slow"]["expert_rms_rel"] == pytest.approx(1e-3, rel=1e-3)
        assert row["dense"]["us"] == 5.0
        assert row["num_active_experts"] == np.unique(case.ids).size
        assert row["most_rows_of_an_expert"] == np.bincount(case.ids.ravel()).max()
        alone = bench_gemm.gemm_row("gemm1", case, key, {"cumoe": timings["cumoe"]}, {}, {})
        assert (alone["peer"], alone["peers"], alone["dense"]) == (None, {}, None)

    def test_lines(self, capsys):
        key = {"model": "deepseek_v3", "recipe": "bf16", "num_tokens": 16384, "variant": "uniform"}
        gemm = key | {"us": 12345.6, "tflops": 640.2, "peer": "triton_moe", "peer_us": 14000.0}
        bench_gemm.print_head()
        bench_gemm.print_case([key | {"op": "gemm_error"}])
        bench_gemm.print_case([key | {"op": "gemm_error"}, gemm | {"op": "gemm1"}])
        bench_gemm.print_case(
            [key | {"op": "x"}, gemm | {"op": "gemm1"}, gemm | {"op": "gemm2", "peer": None}]
        )
        lines = capsys.readouterr().out.splitlines()
        assert all(len(line) <= 150 for line in lines)
        assert "14000.0 triton_moe  1.13" in lines[2]
        assert lines[0].index("| gemm2") == lines[3].index("|", 60)


class TestScript:
    @pytest.fixture(autouse=True)
    def _no_torch(self, monkeypatch):
        monkeypatch.setattr(bench_gemm, "is_installed", lambda package: False)

    def test_dry_run(self, tmp_path, capsys):
        path = tmp_path / "gemm.json"
        args = ["--dry-run", "--tokens", "1", "70", "--repeats", "3", "--out", str(path)]
        assert bench_gemm.main(args) == 0
        rows = json.loads(path.read_text())["rows"]
        key = [(r["recipe"], r["num_tokens"], r["variant"], r["op"]) for r in rows]
        ops = ("gemm_error", "gemm1", "gemm2")
        assert key == [
            (recipe, tokens, routing, op)
            for recipe in ("fp8_block", "bf16")
            for tokens in (1, 70)
            for routing in ROUTINGS
            for op in ops
        ]
        for row in rows:
            assert (row["us"] is None) == (row["op"] == "gemm_error")
            assert row["peer"] is None and row["num_gpus"] == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "torch is not installed: no peers"
        assert len(lines) == 3 + 8  # both packages, the head, one line a case

    def test_choices(self, tmp_path):
        path = tmp_path / "gemm.json"
        args = ["--dry-run", "--routing", "zipf", "--recipes", "bf16", "--tokens", "7"]
        assert bench_gemm.main([*args, "--peers", "--seed", "3", "--out", str(path)]) == 0
        found = json.loads(path.read_text())
        assert {r["variant"] for r in found["rows"]} == {"zipf"} and found["seed"] == 3

    @pytest.mark.parametrize(
        "bad", [["--tokens", "0"], ["--peers", "flashinfer"], ["--routing", "skewed"]]
    )
    def test_bad_arguments(self, bad, capsys):
        with pytest.raises(SystemExit):
            bench_gemm.main(["--dry-run", *bad])
        assert bad[0] in capsys.readouterr().err

    def test_a_wrong_answer_is_written_but_not_timed(self, tmp_path, monkeypatch, capsys):
        def broken(*args):
            case = make_case(*args)
            real = case.stages["gemm2"]

            def gemm2(i):
                real(i)
                case.rows[...] = (widen(case.rows) * 1.1).astype(case.rows.dtype)

            case.stages["gemm2"] = gemm2
            return case

        monkeypatch.setattr(bench_gemm, "make_case", broken)
        monkeypatch.setattr(bench_gemm, "time_group", lambda *a: pytest.fail("timed"))
        path = tmp_path / "gemm.json"
        args = ["--dry-run", "--recipes", "bf16", "--tokens", "7", "--routing", "uniform"]
        assert bench_gemm.main([*args, "--out", str(path)]) == 1
        assert "FAILED tiny bf16 T=7 uniform: wrong answer: gemm2" in capsys.readouterr().out
        (row,) = json.loads(path.read_text())["rows"]
        assert row["op"] == "gemm_error" and row["gemm2"]["rms_rel"] > 0.05

    def test_a_case_that_raises_does_not_stop_the_others(self, tmp_path, monkeypatch):
        def broken(xp, shape, weights, num_tokens, routing, seed):
            if num_tokens == 7:
                raise RuntimeError("broken")
            return make_case(xp, shape, weights, num_tokens, routing, seed)

        monkeypatch.setattr(bench_gemm, "make_case", broken)
        path = tmp_path / "gemm.json"
        args = ["--dry-run", "--recipes", "bf16", "--tokens", "1", "7", "8", "--repeats", "1"]
        assert bench_gemm.main([*args, "--out", str(path)]) == 1
        assert {r["num_tokens"] for r in json.loads(path.read_text())["rows"]} == {1, 8}

    def test_packages_that_are_missing(self, monkeypatch, capsys):
        monkeypatch.setattr(bench_gemm, "is_installed", lambda package: package == "torch")
        assert bench_gemm.installed(("torch", "triton", "dense")) == ("torch", "dense")
        monkeypatch.setattr(bench_gemm, "is_installed", lambda package: package == "triton")
        assert bench_gemm.installed(("torch", "triton", "dense")) == ()
        monkeypatch.setattr(bench_gemm, "is_installed", lambda package: True)
        assert bench_gemm.installed(("dense",)) == ("dense",)
        assert capsys.readouterr().out.count("is not installed") == 2


@pytest.mark.gpu
class TestDevice:
    def test_gemm_bench(self, tmp_path):
        path = tmp_path / "gemm.json"
        args = ["--models", "tiny", "--tokens", "1", "70", "--repeats", "3", "--out", str(path)]
        assert bench_gemm.main(args) == 0
        rows = json.loads(path.read_text())["rows"]
        assert sum(r["op"] in gemm_case.GEMMS for r in rows) == 16
