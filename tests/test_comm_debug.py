"""Debug mode: what ranks must agree on before an op runs, and ranks that do not come."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from comm_fakes import MpiLike, good, on, outcomes, processes

from cumoe.comm import (
    AllReduced,
    CheckedGroup,
    Epilogue,
    GroupError,
    Quantization,
    SingleGroup,
    Workspace,
    allreduce,
    connect_tcp,
    debug,
    finalize_allreduce,
    reduce_allreduce,
    wire,
)
from cumoe.comm.debug import Comparison, compare_calls, describe
from cumoe.kernels_comm import Tokens
from tests.helpers import BF16

REPO = Path(__file__).resolve().parents[1]
OP = import_module("cumoe.comm.allreduce")  # the function has its name
DEVICE: Any = SimpleNamespace(num_sms=2, compute_capability=(9, 0))

X, OTHER = np.ones((3, 32), BF16), np.ones((4, 32), BF16)
WEIGHT = np.ones(32, BF16)
ROWS, INDEX = np.ones((6, 32), BF16), np.zeros((3, 2), np.int32)
EXPERTS = np.ones((2, 3, 32), BF16)


def finalize(group, **changed):
    return finalize_allreduce(ROWS, None, INDEX, group, **changed)


def quantized(*arguments, **options):
    return Epilogue(quantization=Quantization(*arguments, **options))


NORM = Epilogue(X, WEIGHT)
DIFFERENT: dict[str, tuple[Any, Any, str, str]] = {
    "op": (finalize, lambda g: allreduce(X, g), "op: ", "'finalize_allreduce' on rank 0 and 'allr"),
    "op of experts": (
        lambda g: reduce_allreduce(EXPERTS, None, g),
        lambda g: allreduce(X, g),
        "op: ",
        "'reduce_allreduce' on rank 0 and 'allreduce' on rank 2",
    ),
    "tokens": (
        lambda g: allreduce(X, g),
        lambda g: allreduce(OTHER, g),
        "num_tokens of allreduce: ",
        "3 on rank 0 and 4 on rank 2",
    ),
    "no token": (
        lambda g: allreduce(X, g),
        lambda g: allreduce(X[:0], g),
        "num_tokens of allreduce: ",
        "3 on rank 0 and 0 on rank 2",
    ),
    "columns": (
        lambda g: allreduce(X, g),
        lambda g: allreduce(np.ones((3, 40), BF16), g),
        "hidden_size of allreduce: ",
        "32 on rank 0 and 40 on rank 2",
    ),
    "dtype": (
        lambda g: allreduce(X, g),
        lambda g: allreduce(X.astype(np.float16), g),
        "dtype of allreduce: ",
        "'bfloat16' on rank 0 and 'float16' on rank 2",
    ),
    "outputs": (
        lambda g: finalize(g, epilogue=NORM),
        lambda g: finalize(g, epilogue=NORM, outputs=("sum", "norm")),
        "outputs of finalize_allreduce: ",
        "('residual', 'norm') on rank 0 and ('sum', 'norm') on rank 2",
    ),
    "factor": (
        lambda g: finalize(g, routed_scaling_factor=2.5),
        finalize,
        "routed_scaling_factor of finalize_allreduce: ",
        "2.5 on rank 0 and 1.0 on rank 2",
    ),
    "residual": (
        lambda g: finalize(g, epilogue=NORM, outputs=("norm",)),
        lambda g: finalize(g, epilogue=Epilogue(norm_weight=WEIGHT)),
        "epilogue.residual of finalize_allreduce: ",
        "True on rank 0 and False on rank 2",
    ),
    "norm": (
        lambda g: allreduce(X, g, epilogue=NORM, outputs=("residual",)),
        lambda g: allreduce(X, g, epilogue=Epilogue(X)),
        "epilogue.norm_weight of allreduce: ",
        "True on rank 0 and False on rank 2",
    ),
    "eps": (
        lambda g: allreduce(X, g, epilogue=NORM),
        lambda g: allreduce(X, g, epilogue=Epilogue(X, WEIGHT, 1e-5)),
        "epilogue.eps of allreduce: ",
        "1e-06 on rank 0 and 1e-05 on rank 2",
    ),
    "weight offset": (
        lambda g: allreduce(X, g, epilogue=NORM),
        lambda g: allreduce(X, g, epilogue=Epilogue(X, WEIGHT, weight_offset=1.0)),
        "epilogue.weight_offset of allreduce: ",
        "0.0 on rank 0 and 1.0 on rank 2",
    ),
    "format": (
        lambda g: allreduce(X, g, epilogue=quantized("fp8_token")),
        lambda g: allreduce(X, g, epilogue=quantized("fp8_block")),
        "epilogue.quantization of allreduce: ",
        "'fp8_token' on rank 0 and 'fp8_block' on rank 2",
    ),
    "group size": (
        lambda g: allreduce(X, g, epilogue=quantized("fp8_ue8m0", group_size=16)),
        lambda g: allreduce(X, g, epilogue=quantized("fp8_ue8m0", group_size=32)),
        "epilogue.quantization.group_size of allreduce: ",
        "16 on rank 0 and 32 on rank 2",
    ),
}


@pytest.fixture
def machine(monkeypatch):
    """A machine on which every thread counts as a process."""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    return processes(monkeypatch)


class TestDifferent:
    """Ranks that call differently all hear who and how, and nothing is written."""

    @pytest.mark.parametrize("name", DIFFERENT)
    @pytest.mark.parametrize("how", ["workspace", "group"])
    def test_arguments(self, machine, monkeypatch, name, how):
        first, last, what, values = DIFFERENT[name]
        if how == "group":
            monkeypatch.setenv("CUMOE_DEBUG_COMM", "1")

        def work(group):
            call = last if group.rank == 2 else first
            if how == "group":
                return call(group)
            with Workspace(group, 8, 64, debug=True) as made:
                with pytest.raises(ValueError, match="expected the same on every rank") as error:
                    call(made)
                allreduce(X, made)  # the workspace is as it was
                raise error.value

        for error in on(3, work):
            assert type(error) is ValueError
            assert str(error).startswith(what) and values in str(error), error

    def test_nothing_is_written(self, monkeypatch):
        monkeypatch.setenv("CUMOE_DEBUG_COMM", "1")
        outs = [AllReduced(np.full((3 + rank, 32), 7, BF16)) for rank in range(2)]

        def work(group):
            allreduce(np.ones((3 + group.rank, 32), BF16), group, out=outs[group.rank])

        assert all(type(error) is ValueError for error in outcomes(2, work))
        assert all((out.sum == 7).all() for out in outs)

    def test_what_is_a_ranks_own(self, monkeypatch):
        """Slots, weights, experts and the shared output of one rank are no business of others."""
        monkeypatch.setenv("CUMOE_DEBUG_COMM", "1")

        def work(group):
            top_k = 2 + group.rank
            index = np.zeros((3, top_k), np.int32)
            weights = np.ones((3, top_k), BF16) if group.rank else None
            shared = None if group.rank else X
            done = finalize_allreduce(ROWS, weights, index, group, shared_output=shared)
            rows = np.ones((1 + group.rank, 3, 32), BF16)
            return done.sum[0, 0], reduce_allreduce(rows, None, group).sum[0, 0]

        assert good(outcomes(2, work)) == [(6, 3)] * 2


class TestOnAndOff:
    def test_off_by_default(self, machine, monkeypatch):
        monkeypatch.delenv("CUMOE_DEBUG_COMM", raising=False)
        monkeypatch.setattr(OP, "describe", None)  # would raise
        monkeypatch.setattr(OP, "compare_calls", None)

        def work(group):
            allreduce(X, group)
            with Workspace(group, 8, 64) as made:
                allreduce(X, made)
                return made.debug

        assert good(on(2, work)) == [False] * 2

    @pytest.mark.parametrize(
        ("variable", "given", "found"),
        [("1", None, True), ("0", None, False), ("", None, False), ("1", False, False),
         ("0", True, True), ("1", True, True)],
    )  # fmt: skip
    def test_variable_and_argument(self, machine, monkeypatch, variable, given, found):
        monkeypatch.setenv("CUMOE_DEBUG_COMM", variable)

        def work(group):
            with Workspace(group, 8, 64, debug=given) as made:
                return made.debug

        assert good(on(2, work)) == [found] * 2
        assert debug.is_asked_for() == (variable == "1")

    def test_on_some_ranks_only(self, machine):
        for error in on(3, lambda g: Workspace(g, 8, 64, debug=g.rank == 1)):
            assert type(error) is ValueError and "Workspace(debug)" in str(error)
            assert "False on rank 0 and True on rank 1" in str(error)

    def test_no_bool(self, machine):
        for error in on(2, lambda g: Workspace(g, 8, 64, debug=1)):
            assert type(error) is TypeError and "debug: expected a bool or None" in str(error)

    def test_one_rank(self, monkeypatch):
        monkeypatch.setenv("CUMOE_DEBUG_COMM", "1")
        assert (allreduce(X, SingleGroup()).sum == 1).all()

    def test_plain_data(self):
        """What is compared travels by every group, and comes back equal."""
        tokens = Tokens("rows", ROWS, None, INDEX, residual=X, quantize="fp8_ue8m0")
        call = describe(OP.replace(tokens, group_size=np.int64(32)), ("sum", "quantized"))
        assert wire.loads(wire.dumps(call)) == call
        assert (call["op"], call["num_tokens"], call["hidden_size"]) == (
            "finalize_allreduce",
            3,
            32,
        )

    @pytest.mark.parametrize("kind", ["checked", "mpi"])
    def test_other_groups(self, monkeypatch, kind):
        monkeypatch.setenv("CUMOE_DEBUG_COMM", "1")
        barriers: dict = {}

        def work(group):
            other = CheckedGroup(group) if kind == "checked" else MpiLike(group, barriers)
            return allreduce(np.ones((3 + group.rank, 32), BF16), other)

        for error in outcomes(2, work):
            assert type(error) is ValueError and "3 on rank 0 and 4 on rank 1" in str(error)


class TestLaunches:
    """On devices the comparison is the first thing that is run, and the only one if it fails."""

    def plan(self, made, num_tokens):
        tokens = Tokens("plain", np.ones((num_tokens, 32), BF16))
        native = AllReduced(np.zeros((num_tokens, 32), BF16))
        return OP.plan_launches(tokens, native, made, DEVICE)

    @pytest.mark.parametrize("engine", ["peer_memory", "nccl"])
    def test_first(self, machine, engine):
        def work(group):
            with Workspace(group, 8, 64, engine=engine, debug=True) as made:
                first, *others = self.plan(made, 3 + group.rank)
                assert isinstance(first, Comparison) and len(others) == 1
                with pytest.raises(ValueError, match="num_tokens of allreduce: .*3 on rank 0 and "):
                    first.run(DEVICE, 0)
                first, *_ = self.plan(made, 5)
                for _ in range(3):
                    first.run(DEVICE, 0)

        good(on(2, work))

    def test_no_token(self, machine):
        """A rank without tokens launches nothing, and others must know."""

        def work(group):
            with Workspace(group, 8, 64, debug=True) as made:
                items = self.plan(made, 3 * group.rank)
                assert len(items) == 1 + group.rank
                with pytest.raises(ValueError, match="0 on rank 0 and 3 on rank 1"):
                    items[0].run(DEVICE, 0)
                (only,) = self.plan(made, 0)
                only.run(DEVICE, 0)

        good(on(2, work))

    def test_off(self, machine):
        def work(group):
            with Workspace(group, 8, 64, debug=False) as made:
                assert self.plan(made, 0) == []
                assert not any(isinstance(item, Comparison) for item in self.plan(made, 3))

        good(on(2, work))


class TestMissing:
    """A rank that does not come: the others hear of it in time."""

    @staticmethod
    def late(size, like=lambda group: group):
        """What the ranks get when rank 1 of a group does not come."""
        release = threading.Event()

        def work(group):
            made = Workspace(like(group), 8, 64, debug=True)
            made.timeout_s = 0.2
            if group.rank == 1:
                release.wait(10)
                return None
            try:
                allreduce(X, made)
            finally:
                release.set()

        return on(size, work)

    def test_late(self, machine):
        found = self.late(3)
        assert type(found[0]) is GroupError and type(found[2]) is GroupError
        assert "rank 1 did not come to allgather() within 0.2 s" in str(found[0])

    def test_late_by_mpi(self, machine):
        """Which rank it is MPI does not tell."""
        barriers: dict = {}
        error = self.late(2, lambda group: MpiLike(group, barriers))[0]
        assert type(error) is GroupError and "rank 0 waited 0.2 s" in str(error)

    def test_ended(self, machine):
        def work(group):
            made = Workspace(group, 8, 64, debug=True)
            if group.rank == 0:
                allreduce(X, made)

        error = on(2, work)[0]
        assert type(error) is GroupError and "rank 1 ended without it" in str(error)

    def test_elsewhere(self, machine):
        def work(group):
            made = Workspace(group, 8, 64, debug=True)
            if group.rank:
                made.close()
            else:
                allreduce(X, made)

        found = on(2, work)
        assert all(type(error) is GroupError for error in found)
        assert "rank 0 is in allreduce, rank 1 is not" in str(found[0])
        assert "waiting for the GPU, rank 0 is not" in str(found[1])

    def test_dead(self):
        """A process that is gone is missed at once, by its number."""
        code = textwrap.dedent("""
            import os
            from cumoe.comm import connect_tcp
            from cumoe.comm.debug import compare_calls
            group = connect_tcp()
            compare_calls(group, {"op": "allreduce", "num_tokens": 3}, 30)
            os._exit(3)
        """)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        environment = {
            "PYTHONPATH": str(REPO),
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "CUMOE_SECRET": "s" * 16,
        }
        child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment)
        with connect_tcp(0, 2, "127.0.0.1", port, secret="s" * 16) as group:
            call = {"op": "allreduce", "num_tokens": 3}
            compare_calls(group, call, 30)
            assert child.wait(30) == 3
            with pytest.raises(GroupError, match="rank 1"):
                compare_calls(group, call, 30)
