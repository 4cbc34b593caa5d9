"""The command line: what it prints, its exit codes, and that a warmed-up cache has every kernel."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import BF16, DTYPES

from cumoe import launch, layer_call, plan
from cumoe.cli import console as cli_console
from cumoe.cli import demo, doctor, main, oracle, problem, stages, warmup
from cumoe.cli.console import CommandError
from cumoe.config import Activation, ExpertShard
from cumoe.launch import Device
from cumoe.models import MODELS, ModelShape, get_shape
from cumoe.weights import ExpertWeights

REPO = Path(__file__).resolve().parents[1]

SMALL = ModelShape(
    "small", 144, 80, 16, 4, num_shared_experts=1, method="deepseek_v3", num_groups=4,
    top_groups=2, scaling_factor=2.5, has_bias=True,
)  # fmt: skip


def run_module(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m cumoe`` away from any terminal, 80 columns wide, without a GPU."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("COLUMNS", None)
    return subprocess.run(
        [sys.executable, "-m", "cumoe", *args],
        env=environment | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def small_model(monkeypatch):
    """Lets the demo run a layer that takes no time, whatever the model."""
    monkeypatch.setattr(demo, "get_shape", lambda name: SMALL)


@pytest.fixture(scope="module", params=["fp8_block", "bf16"])
def measured(request):
    """The small layer and what the demo measures of it."""
    weights = problem.make_weights(SMALL, request.param, "numpy", 1)
    given = problem.make_problem(SMALL, request.param, weights, 40, 1)
    return given, stages.measure_numpy(given)


class TestConsole:
    @pytest.mark.parametrize(
        ("value", "text"),
        [(1.234e-6, "1.23 us"), (0.0456, "45.6 ms"), (1.5, "1.5 s"), (215.4, "215 s"), (0, "0 us")],
    )
    def test_seconds(self, value, text):
        assert cli_console.seconds(value) == text

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0, "0 B"), (999, "999 B"), (11.3e9, "11.3 GB"), (999.9e6, "1 GB"), (2e15, "2e+03 TB")],
    )
    def test_quantity(self, value, text):
        assert cli_console.quantity(value, "B") == text

    def test_only_a_zero_is_blank(self):
        assert cli_console.sparkline([0, 1, 500, 1000], 1000, ascii_only=False) == " ▁▄█"
        assert cli_console.sparkline([0, 1, 500, 1000], 1000, ascii_only=True) == " .=@"
        assert cli_console.sparkline([0, 0], 0, ascii_only=False) == "  "

    @pytest.mark.parametrize(
        ("fraction", "drawn"), [(0, ""), (1, "█" * 4), (0.53, "██▏"), (7, "████")]
    )
    def test_bar(self, fraction, drawn):
        assert cli_console.bar(fraction, 4, ascii_only=False) == drawn
        assert cli_console.bar(1, 4, ascii_only=True) == "####"

    @pytest.mark.parametrize("ascii_only", [False, True])
    @pytest.mark.parametrize("num_experts", [1, 8, 16, 17, 160, 256, 2048])
    def test_chart_fits_80_columns(self, num_experts, ascii_only):
        counts = list(range(num_experts))
        lines = cli_console.token_chart(counts, ascii_only=ascii_only)
        assert max(map(len, lines)) <= 80
        assert len(lines) == (num_experts if num_experts <= 16 else -(-min(num_experts, 512) // 64))
        assert not ascii_only or "".join(lines).isascii()


class TestMain:
    def test_no_command_shows_help(self, capsys):
        assert main([]) == 0
        assert "warmup" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "argv",
        [
            ["bench"],
            ["demo", "--tokens", "0"],
            ["demo", "--tokens", "many"],
            ["demo", "--model", "gpt_5"],
            ["demo", "--recipe", "int4"],
            ["demo", "--seed", "-1"],
            ["warmup", "--shapes", "mixtral_8x7b,nobody"],
            ["warmup", "--shapes", ""],
            ["warmup", "--shapes", "all", "--arch", "sm_70"],
        ],
    )
    def test_bad_arguments(self, argv, capsys):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 2
        assert "error:" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "code", "text"),
        [
            (CommandError("no room"), 2, "error: no room"),
            (launch.LaunchError("no GPU"), 2, "doctor"),
            (launch.CompileError("a.cu", ["-x"], "line 3"), 2, "line 3"),
            (KeyboardInterrupt(), 130, "interrupted"),
        ],
    )
    def test_errors_become_messages(self, error, code, text, monkeypatch, capsys):
        def fail(args: argparse.Namespace) -> int:
            raise error

        monkeypatch.setattr(doctor, "run", fail)
        assert main(["doctor"]) == code
        assert text in capsys.readouterr().err

    def test_a_bug_is_not_hidden(self, monkeypatch):
        monkeypatch.setattr(doctor, "examine", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            main(["doctor"])

    def test_version(self):
        from cumoe import __version__

        assert run_module("--version").stdout.strip() == f"cumoe {__version__}"


class TestDemo:
    @pytest.mark.parametrize("recipe", ["fp8_block", "bf16"])
    @pytest.mark.parametrize("tokens", ["1", "37"])
    def test_passes_on_numpy(self, recipe, tokens, small_model, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "80")
        argv = ["demo", "--backend", "numpy", "--recipe", recipe, "--tokens", tokens]
        assert main(argv) == 0
        out = capsys.readouterr().out
        words = "device driver backend plan Tokens gemm1 finalize layer FLOP/s PASS largest RMS"
        for word in words.split():
            assert word in out, word
        assert ("quantize" in out) == (recipe == "fp8_block")
        assert max(map(len, out.splitlines())) <= 80

    def test_piped_and_without_block_characters(self):
        done = run_module(
            "demo", "--model", "mixtral_8x7b", "--tokens", "9", PYTHONIOENCODING="ascii"
        )
        assert done.returncode == 0, done.stderr
        assert "PASS" in done.stdout and done.stdout.isascii() and "\x1b" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80

    def test_a_wrong_answer_fails(self, small_model, monkeypatch, capsys):
        def wrong(given: problem.Problem) -> stages.Measured:
            measured = stages.measure_numpy(given)
            measured.y[0, 3] += BF16.type(1)
            return measured

        monkeypatch.setattr(demo, "measure_numpy", wrong)
        assert main(["demo", "--backend", "numpy", "--tokens", "5"]) == 1
        assert "FAIL" in capsys.readouterr().out

    @pytest.mark.skipif(launch.is_available(), reason="there is a GPU")
    def test_cuda_without_a_gpu(self, capsys):
        assert main(["demo", "--backend", "cuda"]) == 2
        assert launch.why_unavailable() in capsys.readouterr().err

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("recipe", ["fp8_block", "bf16"])
    def test_every_model_fits_numpy(self, model, recipe):
        full = get_shape(model)
        fitted = problem.fit_shape(full, recipe, 64, "numpy")
        experts = full.num_experts + full.num_shared_experts
        size = 3 * experts * fitted.hidden_size * fitted.intermediate_size
        assert 0.05 * problem.NUMPY_MAX_PARAMETERS < size <= problem.NUMPY_MAX_PARAMETERS
        sizes = {"hidden_size": full.hidden_size, "intermediate_size": full.intermediate_size}
        assert replace(fitted, **sizes) == full
        assert fitted.hidden_size % 128 == fitted.intermediate_size % 128 == 0

    def test_a_shape_that_fits_is_left_alone(self):
        assert problem.fit_shape(SMALL, "bf16", 64, "numpy") == SMALL

    def test_nothing_fits(self, monkeypatch):
        monkeypatch.setattr(problem, "NUMPY_MAX_PARAMETERS", 1000)
        with pytest.raises(CommandError, match="deepseek_v3"):
            problem.fit_shape(get_shape("deepseek_v3"), "bf16", 64, "numpy")

    def test_uniform(self):
        values = problem.uniform(np, 1 << 16, 5, 0)
        assert values.dtype == np.float32
        assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
        np.testing.assert_array_equal(values[:100], problem.uniform(np, 100, 5, 0))
        for other in (problem.uniform(np, 1 << 16, 6, 0), problem.uniform(np, 1 << 16, 5, 1)):
            assert abs(np.mean(values * other)) < 0.02


class TestOracle:
    def test_right(self, measured):
        given, result = measured
        comparison = oracle.compare(given, result.y, result.ids, num_samples=40)
        assert comparison.passed and comparison.num_tokens == 40
        assert comparison.total_ids == 40 * 5 and comparison.wrong_ids == 0
        assert comparison.num_experts == len(np.unique(result.ids))
        assert result.tokens_per_expert.sum() == 40 * 5

    def test_one_wrong_element(self, measured):
        given, result = measured
        y = result.y.copy()
        y[-1, 7] = y[-1, 7].astype(np.float32) + 0.2
        comparison = oracle.compare(given, y, result.ids)
        assert not comparison.passed and comparison.max_error > oracle.MAX_ERROR

    def test_nan(self, measured):
        given, result = measured
        y = result.y.copy()
        y[0, 0] = np.nan
        assert not oracle.compare(given, y, result.ids).passed

    def test_wrong_id_of_a_token_that_is_not_sampled(self, measured):
        given, result = measured
        ids = result.ids.copy()
        ids[1, 0] += 1
        comparison = oracle.compare(given, result.y, ids, num_samples=2)
        assert comparison.wrong_ids == 1 and not comparison.passed

    def test_another_activation_is_seen(self, measured):
        given, result = measured
        given = replace(given, shape=replace(SMALL, activation=Activation(alpha=1.05)))
        assert not oracle.compare(given, result.y, result.ids).passed


class TestDoctor:
    def test_report(self, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        for word in ("NumPy", "CUDA", "multi-GPU", "NVRTC", "cache", "numpy 2", "driver"):
            assert word in out, word
        assert max(map(len, out.splitlines())) <= 80

    def test_json_without_gpu(self):
        done = run_module("doctor", "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        backends = {b["name"]: b for b in report["backends"]}
        assert backends["NumPy"]["on"] and not backends["CUDA"]["on"]
        assert backends["CUDA"]["reason"] and backends["CUDA"]["turn_on"]
        assert report["packages"]["base"]["numpy"] == np.__version__
        assert report["gpus"] == []

    def test_brackets_are_no_markup(self, monkeypatch, capsys):
        reason = "CuPy is not installed (install cumoe[cu12] or cumoe[cu13])"
        monkeypatch.setattr(doctor, "_nvrtc", lambda: {"error": "install cumoe[cu12]"})
        monkeypatch.setattr(doctor.launch, "why_unavailable", lambda: reason)
        assert main(["doctor"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert reason in out and "none: install cumoe[cu12]" in out

    def test_imports_no_partner(self):
        code = (
            "import sys; from cumoe.cli import doctor; doctor.examine();"
            "print(*{m.split('.')[0] for m in sys.modules} & {'torch', 'jax', 'mpi4py'})"
        )
        env = {**os.environ, "PYTHONPATH": str(REPO)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr

    def test_survives_everything(self, monkeypatch, capsys):
        def fail(*args, **kwargs):
            raise OSError("broken")

        probes = ("_nvrtc", "_driver", "_gpus", "_peers", "_nccl", "_cache", "_cumoe_version")
        for name in probes:
            monkeypatch.setattr(doctor, name, fail)
        monkeypatch.setattr(doctor.launch, "why_unavailable", fail)
        assert main(["doctor"]) == 0
        assert "broken" in capsys.readouterr().out
        states = {b["name"]: b["on"] for b in doctor.examine()["backends"]}
        assert states == {
            "NumPy": True, "kernel compiler": False, "CUDA": False, "multi-GPU": False,
        }  # fmt: skip

    def report(self, **changes):
        found = {
            "packages": {"cuda": {**dict.fromkeys(doctor._CUPY), "cuda-bindings": "12.9"}},
            "nvrtc": {"version": "12.9", "path": "/x"},
            "driver": {"version": "580.1", "cuda": "13.0"},
            "gpus": [{"compute_capability": (9, 0)}],
            "cache": {"writable": True},
            "peers": [],
            "mpirun": "/usr/bin/mpirun",
        }
        found["packages"]["communication"] = {"mpi4py": "4.1"}
        found["packages"]["cuda"]["cupy-cuda12x"] = "14.2"
        return found | changes

    def judge(self, monkeypatch, reason=None, **changes):
        monkeypatch.setattr(doctor.launch, "why_unavailable", lambda: reason)
        return {b.name: b for b in doctor._backends(self.report(**changes))}

    def test_on(self, monkeypatch):
        backends = self.judge(monkeypatch)
        assert backends["CUDA"].on and backends["kernel compiler"].on
        assert "1 found" in backends["multi-GPU"].reason

    def test_old_gpu(self, monkeypatch):
        cuda = self.judge(monkeypatch, gpus=[{"compute_capability": (7, 5)}])["CUDA"]
        assert not cuda.on and "8.0" in cuda.reason

    def test_no_driver(self, monkeypatch):
        cuda = self.judge(monkeypatch, "no driver", driver={"error": "none"}, gpus=[])["CUDA"]
        assert (cuda.on, cuda.reason) == (False, "no driver") and "driver" in cuda.turn_on

    def test_two_cupys(self, monkeypatch):
        packages = {"cuda": {"cupy-cuda12x": "14", "cupy-cuda13x": "14", "cupy": None}}
        cuda = self.judge(monkeypatch, packages=packages)["CUDA"]
        assert not cuda.on and "exclude each other" in cuda.reason

    def test_no_cupy(self, monkeypatch):
        packages = {"cuda": {**dict.fromkeys(doctor._CUPY), "cuda-bindings": None}}
        cuda = self.judge(monkeypatch, "CuPy is not installed", packages=packages)["CUDA"]
        assert "cu12" in cuda.turn_on and "cu13" in cuda.turn_on

    def test_read_only_cache(self, monkeypatch):
        compiler = self.judge(monkeypatch, cache={"writable": False})["kernel compiler"]
        assert compiler.on and "CUMOE_CACHE_DIR" in compiler.turn_on

    def test_looking_at_the_cache_makes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CUMOE_CACHE_DIR", str(tmp_path / "a" / "b"))
        assert doctor._cache() == {
            "directory": str(tmp_path / "a" / "b"), "kernels": 0, "bytes": 0, "writable": True,
        }  # fmt: skip
        assert not (tmp_path / "a").exists()
        (tmp_path / "file").touch()
        monkeypatch.setenv("CUMOE_CACHE_DIR", str(tmp_path / "file"))
        assert not doctor._cache()["writable"]


class OnDevice(np.ndarray):
    """A host array that says it is on device 0, for plans that are never run."""

    device = SimpleNamespace(id=0)


class HostWorkspace:
    def take(self, name, shape, dtype, zeros=False):
        return np.empty(tuple(shape), DTYPES.get(dtype, dtype))


def plan_on_host(monkeypatch, shape: ModelShape, recipe: str, kind: str, num_tokens: int):
    """Plan a call for an sm_80 GPU on host arrays, and return its kernels."""
    device = Device(0, "fake", (8, 0), "sm_80", 108, launch.smem_limit("sm_80"), 1 << 25, 1 << 36)
    monkeypatch.setattr(plan, "get_device", lambda ordinal: device)
    hidden, size = shape.hidden_size, shape.intermediate_size
    experts = shape.num_experts + shape.num_shared_experts
    weights = ExpertWeights.from_experts(
        np.zeros((experts, size, hidden), np.float32),
        np.zeros((experts, size, hidden), np.float32),
        np.zeros((experts, hidden, size), np.float32),
        recipe=recipe,
        **({"x_scale": 1.0, "act_scale": 1.0} if recipe == "fp8_tensor" else {}),
    )
    spec = layer_call.LayerSpec(
        weights,
        routing := shape.routing(recipe),
        shape.num_experts,
        shape.num_shared_experts,
        ExpertShard(0, shape.num_experts),
        Activation(),
        weights_on_input=routing.weights_on_input,
    )
    ids = np.zeros((num_tokens, shape.top_k), np.int32)
    given = {
        "float32": {"logits": np.zeros((num_tokens, shape.num_experts), np.float32)},
        "bfloat16": {"logits": np.zeros((num_tokens, shape.num_experts), BF16)},
        "topk": {"ids": ids, "topk_weights": np.zeros(ids.shape, np.float32)},
        "topk bf16": {"ids": ids, "topk_weights": np.zeros(ids.shape, BF16)},
        "packed": {"ids": ids},
    }[kind]
    if "logits" in given and shape.has_bias:
        given["bias"] = np.zeros(shape.num_experts, np.float32)
    x = np.empty((num_tokens, hidden), BF16).view(OnDevice)
    call = layer_call.LayerCall(x=x, out=np.empty(x.shape, BF16), **given)
    stages = plan.DevicePlan(spec, call, HostWorkspace()).stages
    return {item.spec for launches in stages.values() for item in launches}


class TestWarmup:
    @pytest.mark.parametrize("recipe", ["fp8_block", "bf16", "fp8_tensor", "weights on input"])
    @pytest.mark.parametrize("shared", [0, 1])
    @pytest.mark.parametrize("kind", ["float32", "bfloat16", "topk", "topk bf16", "packed"])
    def test_has_what_a_plan_launches(self, monkeypatch, recipe, shared, kind):
        shape = replace(SMALL, num_shared_experts=shared)
        if recipe == "weights on input":
            shape, recipe = replace(shape, top_k=1, weights_on_input=True), "fp8_tensor"
        everything = set(warmup.kernel_specs(shape, recipe, "sm_80"))
        for num_tokens in (1, 64, 300, 2000):
            needed = plan_on_host(monkeypatch, shape, recipe, kind, num_tokens)
            assert needed <= everything
            exact = warmup.kernel_specs(
                shape,
                recipe,
                "sm_80",
                min_num_tokens=num_tokens,
                max_num_tokens=num_tokens,
            )
            assert needed <= set(exact) <= everything

    @pytest.mark.parametrize("arch", launch.ARCHS)
    @pytest.mark.parametrize("model", MODELS)
    def test_every_model_on_every_architecture(self, model, arch):
        few = warmup.kernel_specs(MODELS[model], "bf16", arch, max_num_tokens=1)
        every = warmup.kernel_specs(MODELS[model], "bf16", arch)
        assert len(few) < len(every) == len(set(every))

    def test_compiles_once(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("CUMOE_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("COLUMNS", "80")
        sizes = "--hidden 64 --intermediate 64 --experts 4 --top-k 2 --max-num-tokens 1"
        argv = ["warmup", *sizes.split(), "--recipe", "bf16", "--arch", "sm_90a"]
        assert main([*argv, "--processes", "1"]) == 0
        first = capsys.readouterr().out
        num_files = len(list(tmp_path.glob("*.cubin")))
        assert f"{num_files}: {num_files} compiled, 0 were there already" in first
        assert tmp_path.name in first.replace("\n", "")
        assert main(argv) == 0
        assert f"{num_files}: 0 compiled, {num_files} were there already" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("argv", "text"),
        [
            ([], "nothing to compile"),
            (["--hidden", "64"], "--intermediate, --experts, --top-k"),
            (["--hidden", "63", "--intermediate", "64", "--experts", "4", "--top-k", "2"], "63"),
            (["--hidden", "64", "--intermediate", "64", "--experts", "4", "--top-k", "5"], "top_k"),
            (
                ["--hidden", "64", "--intermediate", "64", "--experts", "4", "--top-k", "2"]
                + ["--groups", "2"],
                "num_groups",
            ),
        ],
    )
    def test_impossible(self, argv, text, capsys):
        assert main(["warmup", *argv]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.gpu
class TestDevice:
    @pytest.mark.parametrize("recipe", ["fp8_block", "bf16"])
    @pytest.mark.parametrize("tokens", ["1", "129"])
    def test_demo(self, recipe, tokens, capsys):
        argv = ["demo", "--model", "qwen3_30b_a3b", "--recipe", recipe, "--tokens", tokens]
        assert main([*argv, "--backend", "cuda"]) == 0, capsys.readouterr().out
        out = capsys.readouterr().out
        for word in ("row tiles of", "workspace", "warm", "as a graph", "as a call", "PASS"):
            assert word in out, word

    def test_doctor(self):
        report = doctor.examine()
        assert {b["name"]: b["on"] for b in report["backends"]}["CUDA"]
        assert report["gpus"] and not isinstance(report["driver"].get("error"), str)

    def test_the_same_numbers(self):
        import cupy

        np.testing.assert_array_equal(
            problem.uniform(cupy, 1000, 7, 3).get(), problem.uniform(np, 1000, 7, 3)
        )

    @pytest.mark.parametrize("recipe", ["fp8_block", "bf16"])
    @pytest.mark.parametrize("num_tokens", [1, 64, 300])
    def test_warmup_has_what_a_layer_launches(self, recipe, num_tokens):
        weights = problem.make_weights(SMALL, recipe, "cuda", 0)
        given = problem.make_problem(SMALL, recipe, weights, num_tokens, 0)
        device = launch.current_device()
        specs = warmup.kernel_specs(SMALL, recipe, device.arch)
        launches = given.layer.plan(num_tokens).stages.values()
        assert {item.spec for items in launches for item in items} <= set(specs)
