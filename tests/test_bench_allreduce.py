"""The bench of the all-reduces: rows, exit codes, what it checks, and how its ranks are started.

Ranks are threads on NumPy, or processes where starting them is what is tested. No test here looks
at how long anything took.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from cuda.bindings import nvrtc

from bench import allreduce_case, allreduce_stress, bench_allreduce, harness, ranks, replays
from bench.inputs import find_model, make_weights, random_bf16
from cumoe.comm import AllReduced, SingleGroup, layout
from cumoe.comm.allreduce import plan_launches, prepare_finalize
from cumoe.comm.group import ExchangeGroup
from cumoe.comm.wire import dumps, loads
from cumoe.reference import allreduce as twin
from tests.comm_fakes import good, on, outcomes, rank_here
from tests.comm_fakes import ranks as run_threads

H200 = SimpleNamespace(num_sms=132, compute_capability=(9, 0), arch="sm_90a")


@pytest.fixture(autouse=True)
def thresholds(monkeypatch):
    """The shipped ones again after the test."""
    monkeypatch.setattr(layout, "ONE_SHOT_BYTES", dict(layout.ONE_SHOT_BYTES))


def run(*arguments, size=2):
    """What each rank returns."""
    args = bench_allreduce._parser().parse_args(["--dry-run", "--repeats", "2", *arguments])

    def work(group):
        return bench_allreduce.run_rank(np, group, args, lambda: None)

    return run_threads(size, work)


class TestRows:
    def test_dry_run_in_processes(self, tmp_path, capsys):
        path = tmp_path / "allreduce.json"
        args = ["--dry-run", "--repeats", "1", "--recipes", "bf16", "--out", str(path)]
        assert bench_allreduce.main(args) == 0
        found = json.loads(path.read_text())
        key = [(r["op"], r["variant"], r["num_tokens"]) for r in found["rows"]]
        assert key == [
            *(("finalize_allreduce", v, t) for v in (None, "fp8_block") for t in (1, 7, 130)),
            *(
                (op, None, t)
                for op in ("allreduce", "reduce_allreduce", "moe_layer")
                for t in (1, 7)
            ),
        ]
        for row in found["rows"]:
            assert (row["model"], row["num_gpus"], row["protocol"]) == ("tiny", 2, "one_shot")
            assert row["us"] > 0
            if row["op"] == "moe_layer":
                assert row["recipe"] == "bf16" and row["rows_us"] > 0 and row["sum_us"] > 0
                np.testing.assert_allclose(row["comm_share"], 1 - row["rows_us"] / row["us"])
            else:
                assert row["peer_us"] > 0 and ("nccl_us" in row) == (row["op"] != "allreduce")
                np.testing.assert_allclose(
                    row["tbps"] * row["us"] * 1e6, 2 * 272 * row["num_tokens"]
                )
        lines = capsys.readouterr().out.splitlines()
        assert lines and all(line.startswith("[0] ") for line in lines)

    def test_forced_protocol(self, tmp_path):
        path = tmp_path / "two_shot.json"
        tokens = ["--tokens", "1", "9", "--ops", "allreduce", "moe_layer", "--recipes", "bf16"]
        assert run("--protocol", "two_shot", *tokens, "--no-peers", "--out", str(path)) == [0, 0]
        rows = json.loads(path.read_text())["rows"]
        assert [row["protocol"] for row in rows] == ["one_shot", "two_shot"] * 2
        assert all(row["variant"] == "two_shot" and row["peer"] is None for row in rows)

    def test_three_ranks(self):
        assert run("--tokens", "5", "--recipes", "fp8_block", size=3) == [0, 0, 0]

    def test_a_failing_case_does_not_stop_the_others(self, tmp_path, monkeypatch, capsys):
        broken(monkeypatch, "finalize_allreduce", "residual", tokens=7)
        path = tmp_path / "rows.json"
        ops = ["--ops", "finalize_allreduce", "allreduce"]
        assert run(*ops, "--tokens", "1", "7", "--out", str(path)) == [1, 1]
        rows = json.loads(path.read_text())["rows"]
        assert [(r["op"], r["variant"], r["num_tokens"]) for r in rows] == [
            ("finalize_allreduce", None, 1),
            ("finalize_allreduce", "fp8_block", 1),
            ("allreduce", None, 1),
            ("allreduce", None, 7),
        ]
        assert capsys.readouterr().out.count("FAILED finalize_allreduce") == 2

    def test_a_rank_that_raises_ends_all(self, monkeypatch):
        def fails(case, there):
            if there.group.rank == 1:
                raise RuntimeError("no such thing")
            return check(case, there)

        check = bench_allreduce.check_case
        monkeypatch.setattr(bench_allreduce, "check_case", fails)
        with pytest.raises(RuntimeError, match="no such thing"):
            args = bench_allreduce._parser().parse_args(["--dry-run", "--ops", "allreduce"])
            run_threads(2, lambda group: bench_allreduce.run_rank(np, group, args, lambda: None))


def broken(monkeypatch, name, output, *, token=-1, rank=None, tokens=None, module=allreduce_case):
    """Let an op change a bit of one token of an output, on a rank or all."""
    real = getattr(module, name)

    def changed(*arrays, **options):
        out = real(*arrays, **options)
        array = dict(allreduce_case.arrays_of(out)).get(output)
        group = next(a for a in arrays if hasattr(a, "allgather"))
        there = array is not None and (tokens is None or len(array) == tokens)
        if there and group.size > 1 and rank in (None, group.rank):
            allreduce_case.bits(array)[token, 1] ^= 1
        return out

    monkeypatch.setattr(module, name, changed)


def never(*args, **options):
    raise RuntimeError("timed")


class TestChecks:
    @pytest.mark.parametrize(
        ("op", "outputs"),
        [
            ("finalize_allreduce", ("sum", "residual", "norm", "values", "scale")),
            ("reduce_allreduce", ("sum", "residual", "norm")),
            ("allreduce", ("sum",)),
        ],
    )
    def test_a_wrong_answer_is_not_timed(self, op, outputs, monkeypatch, capsys):
        for output in outputs:
            with monkeypatch.context() as patch:
                broken(patch, op, output, rank=1)
                if output not in ("values", "scale"):  # else one of two variants is right
                    patch.setattr(bench_allreduce, "measure_ranks", never)
                assert run("--ops", op, "--tokens", "4") == [1, 1]
            told = f"T=4: wrong answer: {output} of 1 of 4 tokens differs from the twin's, first"
            assert f"{told} that of token 3 (rank 1)" in capsys.readouterr().out

    def test_what_is_not_sampled_must_be_the_same_on_all_ranks(self, monkeypatch, capsys):
        chosen = allreduce_case.checked_tokens(200)
        assert chosen.size == 64 and chosen[0] == 0 and chosen[-1] == 199
        token = int(np.setdiff1d(np.arange(200), chosen)[0])
        broken(monkeypatch, "allreduce", "sum", token=token, rank=0)
        assert run("--ops", "allreduce", "--tokens", "200") == [1, 1]
        assert "wrong answer: ranks have different bits of sum" in capsys.readouterr().out

    def test_outputs_that_are_not_written(self, monkeypatch, capsys):
        real = allreduce_case.allreduce

        def idle(x, memory, *, out=None, **options):
            return real(x, memory, **options) if out is None else out

        monkeypatch.setattr(allreduce_case, "allreduce", idle)
        assert run("--ops", "allreduce", "--tokens", "4") == [1, 1]
        assert "sum of 4 of 4 tokens differs" in capsys.readouterr().out

    @pytest.mark.parametrize("op", ["finalize_allreduce", "allreduce", "reduce_allreduce"])
    def test_a_wrong_peer(self, op, monkeypatch, capsys):
        def wrong(self, source, target):
            target[...] = source

        monkeypatch.setattr(ranks.HostSum, "__call__", wrong)
        assert run("--ops", op, "--tokens", "4") == [1, 1]
        assert "wrong answer of the peer" in capsys.readouterr().out

    def test_a_wrong_layer(self, monkeypatch, capsys):
        real = bench_allreduce.MoELayer.__call__

        def wrong(self, x, logits, *, out=None, **options):
            done = real(self, x, logits, out=out, **options)
            if out is not None:
                out[0, 0] *= 2
            return done

        monkeypatch.setattr(bench_allreduce.MoELayer, "__call__", wrong)
        args = ["--ops", "moe_layer", "--tokens", "4", "--recipes", "bf16"]
        assert run(*args) == [1, 1]
        assert "FAILED moe_layer bf16 T=4: wrong answer: sum" in capsys.readouterr().out

    def test_parts_of_some_tokens(self):
        rng = np.random.default_rng(0)
        rows = random_bf16(np, (40, 16), 1)
        weights = rng.random((9, 3), np.float32)
        index = rng.integers(-1, 40, (9, 3)).astype(np.int32)
        index[2] = -1
        shared = random_bf16(np, (9, 16), 2)
        whole = twin.part_of_rows(rows, weights, index, shared=shared)
        for chosen in (np.arange(9), np.array([2]), np.array([0, 2, 8])):
            some = allreduce_case.part_of_rows(rows, weights, index, chosen, shared=shared[chosen])
            np.testing.assert_array_equal(some, whole[chosen])


class TestStress:
    def test_passes(self, capsys):
        assert run("--stress", "400") == [0, 0]
        told = capsys.readouterr().out
        assert "stress, 2 ranks, one_shot and two_shot: 400 calls in" in told
        assert "10 replays of 10 graphs" in told and "PASS" in told

    def test_a_rank_with_other_bits(self, monkeypatch, capsys):
        broken(monkeypatch, "allreduce", "sum", rank=1, module=allreduce_stress)
        assert run("--stress", "100") == [1, 1]
        assert "FAILED stress: ranks have different bits" in capsys.readouterr().out

    def test_replays_with_other_bits(self, monkeypatch, capsys):
        real, calls = allreduce_stress.Inputs.run, []

        def sometimes(self, call):
            real(self, call)
            if self.ranks.group.rank == 0:
                calls.append(call)
                if len(calls) == 90:
                    self.arena.view(np.uint16)[call.target, 1] ^= 1

        monkeypatch.setattr(allreduce_stress.Inputs, "run", sometimes)
        assert run("--stress", "100") == [1, 1]
        assert "1 replays gave other bits, one of graph" in capsys.readouterr().out

    @pytest.mark.parametrize("op", ["finalize", "plain"])
    def test_the_same_wrong_answer_everywhere(self, op, monkeypatch, capsys):
        real = allreduce_stress.Inputs.run

        def wrong(self, call):
            real(self, call)
            if call.op == op:
                first = next(a for _, a in allreduce_case.arrays_of(self.outputs(call)))
                first[...] = first + first.dtype.type(0.25)

        monkeypatch.setattr(allreduce_stress.Inputs, "run", wrong)
        assert run("--stress", "400") == [1, 1]
        assert f"FAILED stress: wrong answer: {op} of" in capsys.readouterr().out

    def test_bounds_are_tight(self):
        """A fifth of a part's bound is used: it would not pass just anything."""

        def work(group):
            with ranks.open_ranks(np, group, 64, 256, "auto", peers=False) as there:
                inputs = allreduce_stress.Inputs(there, 0, 128)
                call = allreduce_stress.Call("finalize", 64, 3, 5, 7, 0, -1, 0.0)
                inputs.run(call)
                chosen = np.arange(64)
                assert allreduce_stress.check_call(inputs, call, chosen) is None
                value, bound = inputs.part(call, chosen)
                out = inputs.outputs(call)
                got = twin.part_of_rows(
                    inputs.rows,
                    inputs.weights[3:67],
                    inputs.index[3:67],
                    shared=inputs.shared[5:69],
                )
                used = np.abs(got.astype(np.float64) - value) / bound
                assert 0.2 < used.max() <= 1
                out.norm[...] = out.norm * out.norm.dtype.type(1.02)
                return allreduce_stress.check_call(inputs, call, chosen)

        assert good(outcomes(2, work)) == ["wrong answer: norm of 64 tokens"] * 2

    def test_graphs(self):
        rng, kinds = np.random.default_rng(0), set()
        for _ in range(60):
            calls = allreduce_stress.draw_calls(rng, 20, 300, 600, 4)
            sizes = [call.num_tokens for call in calls]
            assert min(sizes) >= 1 and max(sizes) <= 300
            grows, shrinks = sizes == sorted(sizes), sizes == sorted(sizes, reverse=True)
            kinds.add((grows, shrinks))
            ends = [c.target + c.num_tokens * (2 if c.op == "finalize" else 1) for c in calls]
            assert [c.target for c in calls] == [0, *ends[:-1]]
            assert allreduce_stress.rows_of(calls) == ends[-1]
            for call in calls:
                assert call.late in range(-1, 4) and 0 <= call.delay_us <= 200
                for first in (call.index, call.shared, call.residual):
                    assert 0 <= first <= 600 - call.num_tokens
        assert kinds == {(True, False), (False, True), (False, False)}

    def test_hash(self):
        """The kernel's formula in Python's integers."""
        words = np.random.default_rng(0).integers(0, 1 << 64, 50, dtype=np.uint64)
        mask, total = (1 << 64) - 1, 0
        for i, word in enumerate(words.tolist()):
            x = (word + (i + 1) * 0x9E3779B97F4A7C15) & mask
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
            x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
            total += x ^ x >> 31
        assert int(replays.hash_words(words)) == total & mask

    def test_kernels_compile(self):
        status, program = nvrtc.nvrtcCreateProgram(replays.SOURCE.encode(), b"s.cu", 0, [], [])
        assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
        (status,) = nvrtc.nvrtcCompileProgram(program, 1, [b"--gpu-architecture=sm_90"])
        assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS


class PlainGroup(ExchangeGroup):
    """Two ranks of which the other says the same, over the wire of TCP."""

    rank, size, timeout_s = 0, 2, 1.0

    def exchange(self, call, obj, timeout_s=None):
        return [loads(dumps(obj))] * 2


class TestRanks:
    def test_arrays_over_the_wire(self):
        group = ranks.ArrayGroup(PlainGroup())
        for x in (random_bf16(np, (3, 4), 0), np.arange(4.0, dtype=np.float32), np.zeros((0, 8))):
            if x.dtype == np.float64:
                x = x.astype(np.int32)
            for found in group.allgather(x):
                assert found.dtype == x.dtype and found.tobytes() == x.tobytes()
                assert found.shape == x.shape
        for plain in (None, "text", (1, 2, 3, 4), {"a": (1.5, b"x")}):
            assert group.allgather(plain) == [plain, plain]

    def test_agree(self):
        def work(group):
            there = ranks.Ranks(np, group, group, SingleGroup(), None, 8, 8)
            there.agree(None)
            with pytest.raises(ArithmeticError, match=r"too late \(rank 1\)"):
                there.agree("too late" if group.rank == 1 else None)

        good(outcomes(2, work))

    def test_protocols(self):
        there = ranks.Ranks(np, SimpleNamespace(rank=0, size=4), None, None, None, 64, 7168)
        for protocol, most in (("auto", 32), ("two_shot", 1), ("mixed", 8), ("one_shot", 64)):
            ranks.force_protocol(protocol, 4, 64 * 7168 * 2)
            assert there.one_shot_tokens == most
            assert there.protocol(most) == "one_shot"
            assert most == 64 or there.protocol(most + 1) == "two_shot"

    @pytest.mark.parametrize("size", [2, 4])
    def test_the_kernels_compiled_ahead_are_those_that_run(self, size):
        """Of finalize_allreduce, whose plan takes NumPy arrays for a device's."""
        most, hidden = 128, 7168
        group = SimpleNamespace(rank=0, size=size, allgather=None)
        there = ranks.Ranks(np, group, None, None, None, most, hidden)
        memory = SimpleNamespace(
            group=group,
            max_num_tokens=most,
            hidden_size=hidden,
            dtype="bfloat16",
            buffers=(1 << 20,) * size,
            state=np.zeros(4, np.int32),
            debug=False,
            kind="ipc",
        )
        drawn = replace(there, group=SimpleNamespace(rank=0, size=1), memory=SingleGroup())
        for tokens in (1, 16, 128):
            for quantize in (None, "fp8_block"):
                case = allreduce_case.finalize_case(drawn, tokens, quantize, 0)
                slots = tokens * allreduce_case.TOP_K
                op = prepare_finalize(
                    random_bf16(np, (slots, hidden), 0),
                    np.ones((tokens, 8), np.float32),
                    np.zeros((tokens, 8), np.int32),
                    SingleGroup(),
                    shared_output=random_bf16(np, (tokens, hidden), 1),
                    epilogue=case.epilogue,
                    outputs=case.outputs,
                )
                launches = plan_launches(op.tokens, op.native, memory, H200)
                kernels = [("rows", quantize, size, tokens)]
                assert ranks.specs_of(there, kernels, H200) == [item.spec for item in launches]

    def test_nccl(self, monkeypatch):
        """Arguments in the order of CuPy's NcclCommunicator; the id of rank 0 on every rank."""
        made, sums = [], []

        class Communicator:
            def __init__(self, ndev, comm_id, rank):
                made.append((ndev, comm_id, rank))

            def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):  # noqa: N802
                sums.append((sendbuf, recvbuf, count, datatype, op, stream))

            def destroy(self):
                sums.append("destroyed")

        fake = SimpleNamespace(
            available=True,
            get_unique_id=lambda: b"\x80" * 128,
            get_version=lambda: 22809,
            NcclCommunicator=Communicator,
            NCCL_BFLOAT16=9,
            NCCL_SUM=0,
        )
        cupy = pytest.importorskip("cupy")
        monkeypatch.setattr(cupy.cuda, "nccl", fake, raising=False)
        monkeypatch.setattr(
            cupy.cuda, "get_current_stream", lambda: SimpleNamespace(ptr=77), raising=False
        )
        reducer = ranks._nccl(ranks.ArrayGroup(PlainGroup()))
        assert made == [(2, b"\x80" * 128, 0)] and reducer.version == 22809
        x, y = (SimpleNamespace(data=SimpleNamespace(ptr=p), size=56) for p in (1, 2))
        reducer(x, y)
        reducer.close()
        assert sums == [(1, 2, 56, 9, 0, 77), "destroyed"]

    def test_a_hang_ends(self):
        code = (
            "import time; from bench.ranks import Watchdog\n"
            "dog = Watchdog(0.2); dog.progress(); dog.stop(); time.sleep(0.5); print('alive')\n"
            "dog.progress(); time.sleep(60)\n"
        )
        done = subprocess.run(
            [sys.executable, "-u", "-c", code], capture_output=True, text=True, timeout=50
        )
        assert done.returncode == 1 and done.stdout == "alive\n"
        assert "Timeout (0:00:00.2" in done.stderr

    def test_ranks_are_started_without_multicast(self, monkeypatch):
        monkeypatch.setenv("NCCL_NVLS_ENABLE", "2")
        started = []

        def start(command, size):
            started.append((command[2:], size, bench_allreduce.os.environ["NCCL_NVLS_ENABLE"]))
            return 7

        monkeypatch.setattr(bench_allreduce, "start", start)
        assert bench_allreduce.main(["--dry-run", "--ranks", "3"]) == 7
        args = ["--dry-run", "--ranks", "3", "--as-rank"]
        assert started == [(["-m", "bench.bench_allreduce", *args], 3, "0")]
        with pytest.raises(SystemExit, match="expected 1 to 16, got 17"):
            bench_allreduce.main(["--dry-run", "--ranks", "17"])


class TestTiming:
    def test_calls_and_inputs(self, monkeypatch):
        left, calls = [4.0, 10.0, 6.0], []

        def sample(self, work, first, flush_l2):
            work.run(first)
            return left.pop(0)

        monkeypatch.setattr(harness.HostClock, "sample", sample)
        settings = {"calls": 4, "repeats": 3, "inputs_rotate": 3, "on_device": False}
        timings = harness.measure_ranks({"a": calls.append}, SingleGroup(), **settings)
        assert timings["a"].samples == (1.0, 2.5, 1.5)
        assert calls == [0, 1, 2] + [0, 1, 2, 0] * 3

    def test_the_slowest_rank_counts(self, monkeypatch):
        def sample(self, work, first, flush_l2):
            return times[rank_here.rank].pop(0)

        times = {0: [4.0, 10.0, 6.0], 1: [8.0, 2.0, 6.0]}
        monkeypatch.setattr(harness.HostClock, "sample", sample)

        def work(group):
            return harness.measure_ranks(
                {"a": lambda i: None}, group, calls=2, repeats=3, on_device=False
            )["a"]

        for timing in good(on(2, work)):
            assert timing.samples == (4.0, 5.0, 3.0) and timing.us == 4.0

    @pytest.mark.parametrize("name", ["calls", "repeats", "inputs_rotate"])
    def test_refused(self, name):
        settings = {"calls": 1, name: 0, "on_device": False}
        with pytest.raises(ValueError, match=f"{name}: expected >= 1, got 0"):
            harness.measure_ranks({}, SingleGroup(), **settings)

    def test_calls_of_a_graph(self):
        found = [bench_allreduce.calls_of(t) for t in (1, 128, 256, 8192)]
        assert found == [50, 50, 32, 10]


@pytest.mark.parametrize("recipe", ["bf16", "fp8_block"])
def test_a_rank_draws_its_experts_of_the_whole_layer(recipe):
    shape = find_model("tiny", shared=False)
    whole = make_weights(shape, recipe, np, seed=3)
    part = make_weights(shape, recipe, np, seed=3, experts=range(2, 5))
    for name, values in part._arrays().items():
        want = getattr(whole, name)
        if values is None:
            assert want is None
        else:
            assert values.tobytes() == want[2:5].tobytes() and values.flags.c_contiguous


def test_poison_leaves_nothing():
    out = AllReduced(sum=np.zeros((2, 8), np.float16), norm=np.zeros((2, 8), np.float16))
    allreduce_case.poison(out)
    for _, array in allreduce_case.arrays_of(out):
        assert np.isnan(array).all()
