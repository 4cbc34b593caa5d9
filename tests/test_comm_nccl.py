"""Workspaces by NCCL, on a model of it: who takes it, its errors, its end, and what an op runs."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import weakref
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from comm_fakes import FakeNccl, good, nccl_sum, on, processes, rank_here

from cumoe.comm import (
    AllReduced,
    GroupError,
    SingleGroup,
    Workspace,
    WorkspaceError,
    nccl,
    workspace,
)
from cumoe.comm.nccl import NcclSum, within
from cumoe.kernels import Launch
from cumoe.kernels_comm import Tokens
from cumoe.launch import LaunchError
from cumoe.reference import allreduce as twin
from tests.helpers import BF16, rounding_bound
from tests.host import loader

SIZES = (16, 256, "bfloat16")
DEVICE: Any = SimpleNamespace(num_sms=2, compute_capability=(9, 0))
OP = import_module("cumoe.comm.allreduce")  # the function has its name


@pytest.fixture
def machine(monkeypatch):
    """A machine with NCCL on which every thread counts as a process."""
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    yield processes(monkeypatch)
    os.environ.pop("NCCL_NVLS_ENABLE", None)


@pytest.fixture
def two_hosts(machine, monkeypatch):
    """The same with two ranks on each of several hosts."""
    monkeypatch.setattr(workspace, "_host", lambda: f"host {rank_here.rank // 2}")
    return machine


def aborted(machine, expected):
    """Whether these ranks' communicators and no others are aborted; threads do that."""
    deadline = time.monotonic() + 5
    while True:
        found = sorted(rank for rank, event in machine.log if event == "abort")
        if found == sorted(expected) or time.monotonic() > deadline:
            return found == sorted(expected)
        time.sleep(0.01)


class TestChoice:
    """Which engine is taken, the same on every rank."""

    def test_on_request(self, machine):
        def work(group):
            with Workspace(group, *SIZES, engine="nccl") as made:
                assert (made.kind, made.num_bytes, made.buffers) == ("nccl", 16 * 256 * 2, ())
                assert made.state is None and made.device == group.rank
                assert made.scratch.dtype == np.int32 and made.scratch.nbytes == made.num_bytes
                assert isinstance(made.communicator, nccl.Communicator)
            for name in ("scratch", "communicator"):
                with pytest.raises(ValueError, match="expected an open one, got a closed one"):
                    getattr(made, name)

        good(on(3, work))
        for rank in range(3):
            assert machine.events(rank) == (
                ["join", "sum", "synchronize", "sum", "synchronize"] + ["synchronize", "destroy"]
            )

    def test_one_rank(self, machine):
        rank_here.rank = 0
        with Workspace(SingleGroup(), *SIZES, engine="nccl") as made:
            assert made.kind == "nccl"
        for engine in ("auto", "peer_memory"):
            with Workspace(SingleGroup(), *SIZES, engine=engine) as made:
                assert made.kind == "single" and made.scratch is None

    @pytest.mark.parametrize("engine", ["auto", "peer_memory"])
    def test_peer_memory_where_it_can_be(self, machine, engine):
        def work(group):
            with Workspace(group, *SIZES, engine=engine) as made:
                return made.kind

        assert good(on(4, work)) == ["ipc"] * 4
        assert {"join", "sum"}.isdisjoint(event for _, event in machine.log)

    def kinds(self, size):
        def work(group):
            with Workspace(group, *SIZES) as made:
                return made.kind

        return good(on(size, work))

    def test_several_hosts(self, two_hosts):
        assert self.kinds(4) == ["nccl"] * 4 and not two_hosts.blocks

    def test_processes_of_several_threads(self, machine, monkeypatch):
        monkeypatch.setattr(workspace, "os", SimpleNamespace(getpid=lambda: rank_here.rank // 2))
        assert self.kinds(4) == ["nccl"] * 4

    def test_more_ranks_than_share_memory(self, machine):
        assert self.kinds(17) == ["nccl"] * 17

    def test_one_rank_does_not_reach_another(self, machine):
        """Memory that was already shared is given back before NCCL is taken."""
        machine.fail[1, "open"] = RuntimeError("cudaErrorPeerAccessUnsupported")
        assert self.kinds(3) == ["nccl"] * 3
        assert not machine.blocks and not machine.mapped
        frees = [machine.position(rank, "free") for rank in range(3)]
        assert max(frees) < max(machine.position(rank, "join") for rank in range(3))

    def test_threads_without_peer_access(self, machine, monkeypatch):
        monkeypatch.setattr(workspace, "os", SimpleNamespace(getpid=lambda: 1))
        machine.fail[0, "reach"] = RuntimeError("GPU 0 cannot access the memory of GPU 1")
        assert self.kinds(2) == ["nccl"] * 2

    @pytest.mark.parametrize("given", [None, "1"])
    def test_no_multicast(self, machine, monkeypatch, given):
        if given is not None:
            monkeypatch.setenv("NCCL_NVLS_ENABLE", given)
        good(on(2, lambda group: Workspace(group, *SIZES, engine="nccl").close()))
        assert os.environ["NCCL_NVLS_ENABLE"] == (given or "0")


class TestErrors:
    """Every error is raised on every rank."""

    def refuse(self, monkeypatch, machine, *missing):
        def load():
            if rank_here.rank in missing:
                raise LaunchError("CuPy cannot load NCCL; install nvidia-nccl-cu13")
            return FakeNccl(machine)

        monkeypatch.setattr(nccl, "load", load)

    @pytest.mark.parametrize("missing", [{0}, {2}, {0, 1, 2}])
    def test_nccl_is_missing_on_request(self, machine, monkeypatch, missing):
        self.refuse(monkeypatch, machine, *missing)
        for error in on(3, lambda group: Workspace(group, *SIZES, engine="nccl")):
            assert type(error) is WorkspaceError
            assert f"loading NCCL failed on rank {min(missing)}" in str(error)
            assert "install nvidia-nccl-cu13" in str(error)
        assert not machine.log

    def test_nccl_is_missing_between_hosts(self, two_hosts, monkeypatch):
        self.refuse(monkeypatch, two_hosts, 3)
        for error in on(4, lambda group: Workspace(group, *SIZES)):
            assert type(error) is WorkspaceError
            assert "ranks 0 and 2 are on different hosts" in str(error)
            assert "loading NCCL failed on rank 3" in str(error)

    def test_both_reasons_are_said(self, machine, monkeypatch):
        self.refuse(monkeypatch, machine, 0, 1)
        cause = machine.fail[1, "open"] = RuntimeError("cudaErrorPeerAccessUnsupported")
        found = on(2, lambda group: Workspace(group, *SIZES))
        for error in found:
            assert "reaching the peers failed on rank 1: RuntimeError: cudaErrorPeer" in str(error)
            assert "install nvidia-nccl-cu13" in str(error)
        assert found[1].__cause__ is cause
        assert not machine.blocks and not machine.mapped

    def test_peer_memory_on_request(self, two_hosts):
        for error in on(4, lambda group: Workspace(group, *SIZES, engine="peer_memory")):
            assert isinstance(error, WorkspaceError) and "different hosts" in str(error)
        assert not two_hosts.log

    def test_too_little_memory_is_no_reason_for_nccl(self, machine):
        machine.fail[0, "allocate"] = RuntimeError("out of memory")
        for error in on(2, lambda group: Workspace(group, *SIZES)):
            assert type(error) is WorkspaceError and "out of memory" in str(error)
        assert "join" not in [event for _, event in machine.log]

    def test_engines_differ(self, machine):
        engines = ("auto", "auto", "nccl")
        for error in on(3, lambda g: Workspace(g, *SIZES, engine=engines[g.rank])):
            assert type(error) is ValueError and "Workspace(engine)" in str(error)
            assert "'auto' on rank 0 and 'nccl' on rank 2" in str(error)
        assert not machine.log

    def test_unknown_engine(self, machine):
        for error in on(2, lambda group: Workspace(group, *SIZES, engine="NCCL")):
            assert type(error) is ValueError and "engine: expected one of" in str(error)

    def test_bad_sizes(self, machine):
        for error in on(2, lambda group: Workspace(group, 0, 256, engine="nccl")):
            assert type(error) is ValueError and "max_num_tokens" in str(error)

    @pytest.mark.parametrize("event", ["join", "sum"])
    @pytest.mark.parametrize("failing", [{0}, {1}, {0, 1, 2}])
    def test_a_call_fails(self, machine, event, failing):
        """The others wait in NCCL for the rank that failed, and not for ever."""
        for rank in failing:
            machine.fail[rank, event] = RuntimeError("NCCL_ERROR_SYSTEM_ERROR")
        for error in on(3, lambda g: Workspace(g, *SIZES, engine="nccl", timeout_s=1.0)):
            assert type(error) is WorkspaceError
            assert "connecting by NCCL failed on rank 0" in str(error)
            text = "NCCL_ERROR_SYSTEM_ERROR" if 0 in failing else "not connected the ranks in 0.5 s"
            assert text in str(error)
        joined = {rank for rank, name in machine.log if name == "sum"}
        assert not machine.blocks and aborted(machine, joined)

    def test_usable_after_an_error(self, machine):
        machine.fail[1, "join"] = RuntimeError("busy")

        def work(group):
            with pytest.raises(WorkspaceError):
                Workspace(group, *SIZES, engine="nccl", timeout_s=1.0)
            group.barrier()
            machine.fail.clear()
            group.barrier()
            with Workspace(group, *SIZES, engine="nccl") as made:
                return made.kind

        assert good(on(2, work)) == ["nccl"] * 2


class TestEnd:
    def test_order(self, machine):
        """No communicator is freed before all GPUs are done."""
        good(on(3, lambda group: Workspace(group, *SIZES, engine="nccl").close()))
        last = max(i for i, (_, event) in enumerate(machine.log) if event == "synchronize")
        first = min(i for i, (_, event) in enumerate(machine.log) if event == "destroy")
        assert last < first and "abort" not in [event for _, event in machine.log]

    def test_a_graph_is_left(self, machine):
        """NCCL would wait for ever for it."""
        release = machine.stuck[1, "destroy"] = threading.Event()

        def work(group):
            made = Workspace(group, *SIZES, engine="nccl")
            made.timeout_s = 1.0
            try:
                made.close()
            finally:
                release.set()

        for error in on(2, work):
            assert type(error) is WorkspaceError and "no CUDA graph is left" in str(error)

    def test_abandoned(self, machine):
        """Without waiting, not even for NCCL; once."""
        release = machine.stuck[0, "abort"] = threading.Event()

        def work(group):
            made = Workspace(group, *SIZES, engine="nccl")
            with pytest.raises(KeyError, match="3"), made:
                raise KeyError(3)
            assert made.closed
            made.abandon()
            made.close()

        good(on(2, work))
        release.set()
        assert aborted(machine, [0, 1])
        assert "destroy" not in [event for _, event in machine.log]

    def test_never_closed(self, machine):
        """CuPy destroys a communicator with the last reference, and might wait for ever."""
        rank_here.rank = 0
        made = Workspace(SingleGroup(), *SIZES, engine="nccl")
        inner = weakref.ref(made.communicator._made)
        del made
        gc.collect()
        assert inner() is not None

    def test_a_rank_does_not_come_to_close(self, machine):
        def work(group):
            made = Workspace(group, *SIZES, engine="nccl")
            made.timeout_s = 0.3
            if group.rank == 0:
                made.close()

        error = on(2, work)[0]
        assert type(error) is GroupError and "rank 1" in str(error)
        assert "destroy" not in [event for _, event in machine.log]


class Item:
    """Notes when it is prepared and run."""

    def __init__(self, rank, log):
        self.rank, self.log = rank, log

    def prepare(self, device):
        time.sleep(0.02 * self.rank)
        self.log.append((self.rank, "prepare"))

    def run(self, device, stream_ptr):
        assert (device, stream_ptr) == (DEVICE, 0)
        time.sleep(0.02 * self.rank)
        self.log.append((self.rank, "run"))


class TestQueue:
    """Ranks of one process launch together, by either engine; processes meet nobody."""

    def work(self, log, engine, count=2):
        def body(group):
            with Workspace(group, *SIZES, engine=engine) as made:
                made.queue([Item(group.rank, log) for _ in range(count)])
                log.append((group.rank, "done"))
                group.barrier()

        return body

    @pytest.mark.parametrize("processes", [1, 2])
    @pytest.mark.parametrize("engine", ["nccl", "auto"])
    def test_threads(self, machine, monkeypatch, engine, processes):
        monkeypatch.setattr(workspace, "get_device", lambda ordinal: DEVICE)
        process = SimpleNamespace(getpid=lambda: rank_here.rank % processes)
        monkeypatch.setattr(workspace, "os", process)
        log: list = []
        good(on(4, self.work(log, engine)))
        assert [event for _, event in log] == ["prepare"] * 8 + ["run"] * 8 + ["done"] * 4

    def test_processes(self, machine, monkeypatch):
        """The first is done before the last has begun."""
        monkeypatch.setattr(workspace, "get_device", lambda ordinal: DEVICE)
        log: list = []
        good(on(4, self.work(log, "nccl")))
        assert [event for rank, event in log if rank == 3] == ["run", "run", "done"]
        assert log.index((0, "done")) < log.index((3, "run"))


class TestLoad:
    def test_missing(self, monkeypatch):
        runtime = SimpleNamespace(runtimeGetVersion=lambda: 13000)
        modules = {
            "cupy": SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)),
            "cupy.cuda.nccl": SimpleNamespace(available=False),
        }
        monkeypatch.setattr(nccl, "require", modules.get)
        with pytest.raises(LaunchError, match="cannot load NCCL.*install nvidia-nccl-cu13"):
            nccl.load()
        modules["cupy.cuda.nccl"].available = True
        assert nccl.load() is modules["cupy.cuda.nccl"]

    def test_within(self):
        assert within(5, lambda: 3, "late") == 3
        with pytest.raises(KeyError):
            within(5, lambda: {}[1], "late")
        release = threading.Event()
        with pytest.raises(TimeoutError, match="late"):
            within(0.05, lambda: release.wait(5), "late")
        release.set()


RUNS = {
    "sum of rows": ("rows", ("sum",), None),
    "residual of rows": ("rows", ("residual", "norm"), None),
    "all of rows": ("rows", ("sum", "residual", "norm", "quantized"), "fp8_token"),
    "norm of experts, no residual": ("experts", ("sum", "norm"), None),
    "quantised sum of experts": ("experts", ("quantized",), "fp8_block"),
    "given": ("plain", ("sum",), None),
    "given, with residual and norm": ("plain", ("residual", "norm"), None),
    "given, quantised": ("plain", ("norm", "quantized"), "fp8_tensor"),
}
WITHOUT_RESIDUAL = {"norm of experts, no residual", "quantised sum of experts", "given, quantised"}
WITHOUT_NORM = {"quantised sum of experts"}


def inputs(policy, num_tokens, hidden, rank, dtype=BF16):
    """A rank's tokens and its part by the twin."""
    rng = np.random.default_rng(rank)
    shared = rng.standard_normal((num_tokens, hidden)).astype(dtype)
    if policy == "plain":
        return Tokens("plain", shared), twin.part_of_values(shared)
    rows = rng.standard_normal((3, num_tokens, hidden)).astype(dtype)
    if policy == "experts":
        weights = rng.random((3, num_tokens)).astype(np.float32)
        tokens = Tokens("experts", rows, weights, shared=shared)
        return tokens, twin.part_of_experts(rows, weights, shared=shared)
    flat = rows.reshape(-1, hidden)
    index = rng.permutation(len(flat)).astype(np.int32).reshape(num_tokens, 3)
    index[rng.random(index.shape) < 0.3] = -1
    weights = rng.random(index.shape).astype(np.float32)
    tokens = Tokens("rows", flat, weights, index, shared, routed_scaling_factor=2.5)
    return tokens, twin.part_of_rows(flat, weights, index, routed_scaling_factor=2.5, shared=shared)


class TestRuns:
    """What an op runs, its kernels on the CPU."""

    lock = threading.Lock()

    @pytest.fixture(autouse=True)
    def _compiler(self):
        loader.require()

    def run(self, items):
        for item in items:
            if isinstance(item, Launch):
                with self.lock:
                    loader.run_streams([[item]], loader.HostOptions(seed=3))
            else:
                item.run(DEVICE, 0)

    @pytest.mark.parametrize("size", [1, 3])
    @pytest.mark.parametrize("name", RUNS)
    def test_op(self, machine, name, size):
        policy, outputs, quantize = RUNS[name]
        num_tokens, hidden = 5, 264 if quantize != "fp8_block" else 256
        shape = (num_tokens, hidden)
        rng = np.random.default_rng(99)
        after: dict[str, Any] = {"weight_offset": 1.0, "eps": 1e-5, "quantize": quantize}
        if name not in WITHOUT_RESIDUAL:
            after["residual"] = rng.standard_normal(shape).astype(BF16)
        if name not in WITHOUT_NORM:
            after["norm_weight"] = rng.standard_normal(hidden).astype(BF16)
        if quantize == "fp8_tensor":
            after["quant_scale"] = np.array([0.02], np.float32)
        ranks = [inputs(policy, *shape, rank) for rank in range(size)]
        total = nccl_sum([part for _, part in ranks])
        want = twin.reduce_parts([total], **after)

        def work(group):
            tokens = OP.replace(ranks[group.rank][0], **after)
            quantized = None
            if quantize:
                like = want.quantized
                scale = like.scale if quantize == "fp8_tensor" else np.zeros_like(like.scale)
                quantized = SimpleNamespace(values=np.zeros_like(like.values), scale=scale)
            arrays = [np.zeros(shape, BF16) if o in outputs else None for o in AllReduced._fields]
            native = AllReduced(*arrays[:3], quantized)
            with Workspace(group, 6, 512, engine="nccl") as made:
                items = OP.plan_launches(tokens, native, made, DEVICE)
                sums = [i for i, item in enumerate(items) if isinstance(item, NcclSum)]
                assert sums == [policy != "plain"]
                assert len(items) == sums[0] + 1 + (outputs != ("sum",))
                for item in items[sums[0] + 1 :]:
                    assert item.config.programmatic is False
                for _ in range(2):  # the memory of sums needs no clearing
                    self.run(items)
            return native

        for got in good(on(size, work)):
            for kind, expected in (("sum", total), ("residual", want.result), ("norm", want.norm)):
                if kind in outputs:
                    assert getattr(got, kind).tobytes() == expected.tobytes(), kind
            if quantize:
                assert got.quantized.values.tobytes() == want.quantized.values.tobytes()
                assert got.quantized.scale.tobytes() == want.quantized.scale.tobytes()

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_another_dtype_than_the_workspace(self, machine, dtype):
        """Rows of as many bytes as the workspace was made for."""
        shape = (6, 512 if dtype == "float16" else 256)
        ranks = [inputs("plain", *shape, rank, dtype) for rank in range(2)]
        residual = np.ones(shape, dtype)

        def work(group):
            native = AllReduced(residual=np.zeros(shape, dtype))
            tokens = OP.replace(ranks[group.rank][0], residual=residual)
            with Workspace(group, 6, 512, engine="nccl") as made:
                self.run(OP.plan_launches(tokens, native, made, DEVICE))
            return native

        want = twin.reduce_parts([nccl_sum([p for _, p in ranks])], residual=residual)
        for got in good(on(2, work)):
            assert got.residual.tobytes() == want.result.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_bound(dtype, size):
    """Sums in any order, rounded after each addition, are within it; a lost part is not."""
    parts = [inputs("plain", 64, 128, rank, dtype)[1] for rank in range(size)]
    exact, bound = rounding_bound(parts)
    for order in itertools.islice(itertools.permutations(range(size)), 3):
        total = nccl_sum([parts[rank] for rank in order])
        assert (np.abs(total.astype(np.float64) - exact) <= bound).all()
    lost = nccl_sum(parts[1:])
    assert not (np.abs(lost.astype(np.float64) - exact) <= bound).all()
