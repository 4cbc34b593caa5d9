"""``demo --ranks N``: the processes and their end, what a rank checks, and the doctor's part."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from comm_fakes import ranks as thread_ranks

from cumoe.cli import doctor, main, rank, ranks
from cumoe.models import MODELS, ModelShape
from cumoe.reference import allreduce as reference

REPO = Path(__file__).resolve().parents[1]

SMALL = ModelShape(
    "small", 144, 80, 16, 4, num_shared_experts=1, method="deepseek_v3", num_groups=4,
    top_groups=2, scaling_factor=2.5, has_bias=True,
)  # fmt: skip

GROUP = "import os, sys; from cumoe.comm import connect_tcp; group = connect_tcp(timeout_s=30)\n"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO))


def start(code: str, size: int) -> int:
    return ranks.start([sys.executable, "-u", "-c", code], size)


class TestStart:
    def test_ranks_find_each_other(self, capfd):
        assert start(GROUP + "print('I am', group.rank, group.allgather(group.rank))", 3) == 0
        lines = sorted(capfd.readouterr().out.splitlines())
        assert lines == [f"[{r}] I am {r} [0, 1, 2]" for r in range(3)]

    def test_environment(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        first, second = ranks._environment(12), ranks._environment(12)
        assert first["CUMOE_SECRET"] != second["CUMOE_SECRET"] and len(first["CUMOE_SECRET"]) == 64
        assert (first["WORLD_SIZE"], first["MASTER_ADDR"]) == ("12", "127.0.0.1")
        assert (first["COLUMNS"], ranks._prefix(3, 12)) == ("75", "[ 3] ")
        assert (first["OMP_NUM_THREADS"], first["OPENBLAS_NUM_THREADS"]) == ("7", "1")

    def test_both_streams_and_the_last_line(self, capfd):
        code = "import sys; sys.stderr.write('oh\\n'); sys.stdout.write('no newline')"
        assert start(code, 1) == 0
        assert sorted(capfd.readouterr().out.splitlines()) == ["[0] no newline", "[0] oh"]

    @pytest.mark.parametrize(
        ("codes", "expected"),
        [([0, 0], 0), ([1, 1], 1), ([0, 1], 1), ([1, 2], 2), ([3, 0], 2), ([-9, 1], 2)],
    )
    def test_exit_code(self, codes, expected, capsys):
        assert ranks._exit_code(codes) == expected
        assert ("rank 0 was ended by signal 9" in capsys.readouterr().err) == (-9 in codes)

    def test_one_that_fails_ends_all(self, capfd, monkeypatch):
        """Rank 1 would sleep for an hour."""
        monkeypatch.setattr(ranks, "GRACE_S", 0.2)
        code = "import os, sys, time\nif os.environ['RANK'] == '0': sys.exit(3)\ntime.sleep(3600)"
        assert start(code, 2) == 2
        assert f"rank 1 was ended by signal {signal.SIGTERM.value}" in capfd.readouterr().err

    def test_one_that_does_not_want_to_end(self, capfd, monkeypatch):
        monkeypatch.setattr(ranks, "GRACE_S", 0.5)
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + GROUP
        code += "if group.rank == 0: sys.exit(1)\ntime.sleep(3600)"
        assert start(code, 2) == 2
        assert f"rank 1 was ended by signal {signal.SIGKILL.value}" in capfd.readouterr().err

    def test_the_others_say_what_they_heard(self, capfd):
        code = GROUP + (
            "if group.rank == 1: print('bad'); sys.exit(1)\n"
            "try: group.barrier()\n"
            "except Exception as error: print(error); sys.exit(1)"
        )
        assert start(code, 2) == 1
        out = capfd.readouterr().out
        assert "[1] bad" in out and "[0] rank 1 is gone, in barrier()" in out

    def test_interrupted(self, monkeypatch):
        """Ctrl-C in the starter leaves no process behind."""
        monkeypatch.setattr(ranks, "GRACE_S", 2.0)
        started = []
        real = subprocess.Popen

        def note(*args, **options):
            started.append(real(*args, **options))
            return started[-1]

        def interrupt(processes):
            raise KeyboardInterrupt

        monkeypatch.setattr(ranks.subprocess, "Popen", note)
        monkeypatch.setattr(ranks, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            start("import time; time.sleep(3600)", 2)
        assert len(started) == 2 and all(process.returncode is not None for process in started)


class TestArguments:
    @pytest.mark.parametrize("number", ["0", "-1", "two"])
    def test_no_number(self, number, capsys):
        with pytest.raises(SystemExit) as exit_:
            main(["demo", "--ranks", number])
        assert exit_.value.code == 2

    @pytest.mark.parametrize(
        ("argv", "text"),
        [
            (["--ranks", "17"], "--ranks: expected at most 16, got 17"),
            (["--ranks", "9", "--model", "mixtral_8x7b"], "8 experts, too few for 9 ranks"),
        ],
    )
    def test_too_many(self, argv, text, capsys):
        assert main(["demo", "--backend", "numpy", *argv]) == 2
        assert text in capsys.readouterr().err

    @pytest.mark.parametrize(("count", "text"), [(1, "there is 1 GPU"), (3, "there are 3 GPUs")])
    def test_too_few_gpus(self, count, text, monkeypatch, capsys):
        class Cupy:
            class cuda:  # noqa: N801
                class runtime:  # noqa: N801
                    getDeviceCount = staticmethod(lambda: count)  # noqa: N815

        monkeypatch.setattr(ranks, "choose_backend", lambda wanted: "cuda")
        monkeypatch.setattr(ranks, "require", lambda name: Cupy)
        assert main(["demo", "--ranks", "4"]) == 2
        assert f"--ranks 4: {text}" in capsys.readouterr().err

    def test_what_a_rank_is_told(self, monkeypatch):
        told = []
        monkeypatch.setattr(ranks, "start", lambda command, size: told.append((command, size)) or 0)
        argv = "demo --ranks 2 --backend numpy --model mixtral_8x7b --recipe bf16 --seed 5"
        assert main([*argv.split(), "--tokens", "7"]) == 0
        ((command, size),) = told
        assert size == 2 and command[:4] == [sys.executable, "-u", "-m", "cumoe.cli.rank"]
        seen = []
        monkeypatch.setattr(rank, "connect_tcp", lambda: thread_ranks(1, lambda group: Fake())[0])
        monkeypatch.setattr(rank, "check_sum", lambda group, args: seen.append(args) or True)
        assert rank.main(command[4:]) == 0
        want = {"model": "mixtral_8x7b", "recipe": "bf16", "backend": "numpy"}
        assert vars(seen[0]) == want | {"tokens": 7, "seed": 5}


class Fake:
    """A group that is not used."""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


def check_on_threads(size: int, recipe: str, capsys) -> tuple[list[bool], str]:
    """Run what the ranks do on NumPy, as threads."""
    args = argparse.Namespace(
        model="deepseek_v3", recipe=recipe, backend="numpy", tokens=23, seed=3
    )
    results = thread_ranks(size, lambda group: rank.check_sum(group, args))
    return results, capsys.readouterr().out


class TestRank:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(rank, "fit_shape", lambda *args: SMALL)
        monkeypatch.setenv("COLUMNS", "76")

    @pytest.mark.parametrize("recipe", ["fp8_block", "bf16"])
    @pytest.mark.parametrize("size", [1, 2, 3, 16])
    def test_passes(self, size, recipe, capsys):
        results, out = check_on_threads(size, recipe, capsys)
        assert results == [True] * size
        assert out.count("PASS") == 1 and "same bits on every rank" in out
        assert out.count("experts ") == size
        assert max(map(len, out.splitlines())) <= 76

    @pytest.mark.parametrize("size", [2, 3])
    def test_a_part_is_missing(self, size, capsys, monkeypatch):
        add = reference.reduce_parts
        monkeypatch.setattr(
            reference, "reduce_parts", lambda parts, **options: add(parts[:-1], **options)
        )
        results, out = check_on_threads(size, "bf16", capsys)
        assert results == [False] * size and "FAIL" in out

    def test_sums_that_differ_between_ranks(self, capsys, monkeypatch):
        add = reference.reduce_parts
        calls = []

        def differ(parts, **options):
            done = add(parts, **options)
            calls.append(done)
            done.sum.view(np.uint16)[0, 0] += len(calls) == 1  # one step, on one rank
            return done

        monkeypatch.setattr(reference, "reduce_parts", differ)
        results, out = check_on_threads(3, "bf16", capsys)
        assert results == [False] * 3 and "DIFFERENT between ranks" in out

    def test_nan(self):
        total = np.ones((2, 3), np.float32)
        assert rank.compare_sum(total, total, True).passed
        total[1, 1] = np.nan
        assert not rank.compare_sum(total, np.ones((2, 3), np.float32), True).passed

    def test_shards_have_the_experts_of_the_layer(self):
        whole = rank.make_weights(SMALL, "bf16", "numpy", 3)
        some = rank.make_weights(SMALL, "bf16", "numpy", 3, experts=[4, 5, 16])
        for one, other in zip(some.w13, whole.w13[[4, 5, 16]], strict=True):
            np.testing.assert_array_equal(one.view(np.uint16), other.view(np.uint16))

    def test_errors_become_messages(self, monkeypatch, capsys):
        monkeypatch.delenv("RANK", raising=False)
        argv = ["--model", "deepseek_v3", "--recipe", "bf16", "--backend", "numpy"]
        assert rank.main(argv) == 2
        assert "error: rank: expected an integer, or RANK" in capsys.readouterr().err


class TestDemo:
    def test_two_processes(self):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
        command = "demo --ranks 2 --backend numpy --model mixtral_8x7b --tokens 9"
        done = subprocess.run(
            [sys.executable, "-m", "cumoe", *command.split()],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert all(line.startswith(("[0] ", "[1] ")) and len(line) <= 80 for line in lines)
        assert "[1] experts 4 to 7:" in done.stdout and "PASS" in done.stdout

    def test_a_rank_that_is_killed(self):
        """The starter notices, and says which; the other rank says what it waited for."""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        command = "demo --ranks 2 --backend numpy --model deepseek_v3 --tokens 4000"
        process = subprocess.Popen(
            [sys.executable, "-m", "cumoe", *command.split()],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        assert "cumoe demo" in process.stdout.readline()  # both have met
        os.kill(child_of(process.pid, "1"), signal.SIGKILL)
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 2
        assert "rank 1 was ended by signal 9" in out


def child_of(parent: int, rank_: str) -> int:
    """The pid of the process that the starter made for a rank."""
    for _ in range(100):
        for entry in Path("/proc").iterdir():
            try:
                stat = (entry / "stat").read_text()
                environment = (entry / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue
            is_child = int(stat.rpartition(")")[2].split()[1]) == parent
            if is_child and f"RANK={rank_}".encode() in environment:
                return int(entry.name)
        time.sleep(0.05)
    raise AssertionError("no such process")


class TestDoctor:
    def report(self, **changes):
        return {
            "gpus": [{"compute_capability": (9, 0)}] * 2,
            "peers": [],
            "mpirun": "/usr/bin/mpirun",
            "packages": {"communication": {"mpi4py": "4.1"}},
        } | changes

    @pytest.mark.parametrize(
        ("changes", "on", "text", "peers"),
        [
            ({}, True, "2 GPUs share memory; ranks meet by MPI, TCP, threads", "every GPU"),
            ({"mpirun": None}, True, "ranks meet by TCP, threads", "every GPU"),
            ({"peers": [[1, 0]]}, False, "GPU 1 cannot access the memory of GPU 0", "GPU 1 to 0"),
            ({"peers": {"error": "broken"}}, False, "peer access is not known: broken", "broken"),
            ({"gpus": {"error": "broken"}}, False, "(0 found)", "needs two or more GPUs"),
            ({"gpus": []}, False, "(0 found)", "needs two or more GPUs"),
        ],
    )
    def test_judges(self, changes, on, text, peers):
        report = self.report(**changes)
        multi = doctor._multi_gpu(report)
        assert (multi.name, multi.on) == ("multi-GPU", on) and multi.reason.endswith(text)
        assert peers in doctor._peers_text(report)

    def test_mpi(self):
        assert doctor._mpi_text(self.report()) == "/usr/bin/mpirun; mpi4py 4.1"
        without = self.report(mpirun=None, packages={"communication": {"mpi4py": None}})
        assert doctor._mpi_text(without).startswith("mpirun is not found; mpi4py is not installed")

    def test_asks_for_every_pair(self, monkeypatch):
        class Driver:
            cuDeviceGet = staticmethod(lambda ordinal: (0, f"device {ordinal}"))  # noqa: N815
            cuDeviceCanAccessPeer = staticmethod(  # noqa: N815
                lambda a, b: (0, int((a, b) != ("device 2", "device 0")))
            )

        class Cupy:
            class cuda:  # noqa: N801
                class runtime:  # noqa: N801
                    getDeviceCount = staticmethod(lambda: 3)  # noqa: N815

        modules = {"cuda.bindings.driver": Driver, "cupy": Cupy}
        monkeypatch.setattr(doctor, "require", modules.__getitem__)
        monkeypatch.setattr(doctor.launch, "is_available", lambda: True)
        assert doctor._peers() == [[2, 0]]


def test_every_model_can_run_two_ranks():
    assert all(shape.num_experts >= 2 for shape in MODELS.values())
