"""The workspace on a model of CUDA memory: order of calls, errors on every rank, closing."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from comm_fakes import MpiLike, good, on, processes, rank_here

from cumoe.comm import (
    CheckedGroup,
    GroupError,
    SingleGroup,
    Workspace,
    WorkspaceError,
    workspace,
)
from cumoe.comm.layout import SENTINEL, STATE_WORDS, workspace_bytes
from cumoe.launch import LaunchError

SIZES = (64, 256, "bfloat16")
EVENTS = ("allocate", "fill", "export", "open", "reach", "synchronize", "close", "free")


@pytest.fixture
def machine(monkeypatch):
    """A machine on which every thread counts as a process."""

    def load():
        raise LaunchError("there is no NCCL")

    return processes(monkeypatch, load)


@pytest.fixture
def one_process(machine, monkeypatch):
    """The same with all threads in one process."""
    monkeypatch.setattr(workspace, "os", SimpleNamespace(getpid=lambda: 1))
    return machine


class TestMaking:
    @pytest.mark.parametrize("size", [2, 3, 16])
    def test_processes(self, machine, size):
        def work(group):
            with Workspace(group, *SIZES) as made:
                assert (made.group, made.max_num_tokens, made.hidden_size) == (group, 64, 256)
                assert (made.dtype, made.kind, made.device) == ("bfloat16", "ipc", group.rank)
                assert made.num_bytes == workspace_bytes(size, *SIZES)
                assert made.state.dtype == np.int32 and made.state.tolist() == [0] * STATE_WORDS
                assert all(type(address) is int for address in made.buffers)
                with machine.lock:
                    own = made.buffers[group.rank]
                    assert machine.blocks[own] == {"bytes": made.num_bytes, "word": SENTINEL}
                group.barrier()
                return own, made.buffers, dict(machine.mapped)

        found = good(on(size, work))
        owners = [own for own, _, _ in found]
        for rank, (_, buffers, mapped) in enumerate(found):
            assert [mapped.get(address, address) for address in buffers] == owners
            assert sum(address in mapped for address in buffers) == size - 1
            events = machine.events(rank)
            assert events == (
                ["allocate", "fill", "export"] + ["open"] * (size - 1)
                + ["synchronize"] + ["close"] * (size - 1) + ["free"]
            )  # fmt: skip
        assert not machine.blocks and not machine.mapped

    def test_threads(self, one_process):
        def work(group):
            with Workspace(group, *SIZES) as made:
                assert made.kind == "peer"
                group.barrier()
                return made.buffers

        found = good(on(3, work))
        assert found[0] == found[1] == found[2] and len(set(found[0])) == 3
        assert one_process.events(1) == (
            ["allocate", "fill", "reach", "reach", "reach", "synchronize", "free"]
        )

    def test_one_rank(self, machine):
        rank_here.rank = 0
        with Workspace(SingleGroup(), *SIZES) as made:
            assert (made.kind, made.num_bytes, made.buffers) == ("single", 0, (0,))
            assert len(made.state) == STATE_WORDS
        assert machine.events(0) == ["synchronize"]

    def test_filled_and_exported_before_any_peer_opens(self, machine):
        good(on(4, lambda group: Workspace(group, *SIZES).close()))
        first_open = min(machine.position(rank, "open") for rank in range(4))
        assert first_open > max(machine.position(rank, "export") for rank in range(4))
        assert first_open > max(machine.position(rank, "fill") for rank in range(4))

    @pytest.mark.parametrize("kind", ["checked", "mpi"])
    def test_other_groups(self, machine, kind):
        barriers: dict = {}

        def work(group):
            other = CheckedGroup(group) if kind == "checked" else MpiLike(group, barriers)
            Workspace(other, *SIZES).close()

        assert good(on(2, work)) == [None, None] and not machine.blocks

    def test_numpy_integers(self, machine):
        def work(group):
            with Workspace(group, np.int64(64), np.int32(256)) as made:
                return type(made.max_num_tokens), type(made.hidden_size)

        assert good(on(2, work)) == [(int, int)] * 2


class TestErrors:
    """Every error is raised on every rank, and leaves neither memory nor mappings."""

    @pytest.fixture(autouse=True)
    def nothing_left(self, machine):
        yield
        assert not machine.blocks and not machine.mapped

    @pytest.mark.parametrize(
        ("other", "text"),
        [
            ((65, 256, "bfloat16"), r"(64, 256, 'bfloat16') on rank 0 and (65, 256, 'bfloat16')"),
            ((64, 512, "bfloat16"), r"(64, 512, 'bfloat16') on rank 2"),
            ((64, 256, "float16"), r"(64, 256, 'float16') on rank 2"),
        ],
    )
    def test_sizes_differ(self, machine, other, text):
        found = on(3, lambda group: Workspace(group, *(other if group.rank == 2 else SIZES)))
        for error in found:
            assert type(error) is ValueError and text in str(error)
            assert "expected the same on every rank" in str(error)
        assert not machine.log

    @pytest.mark.parametrize(
        ("sizes", "kind", "text"),
        [
            ((0, 256), ValueError, "max_num_tokens"),
            ((64, 12), ValueError, "hidden_size: expected a multiple of 8, got 12"),
            ((64, 256, "int8"), ValueError, "dtype"),
            ((64.0, 256), TypeError, "max_num_tokens: expected an int, got float"),
        ],
    )
    @pytest.mark.parametrize("bad_ranks", [{1}, {0, 1, 2}])
    def test_bad_sizes(self, sizes, kind, text, bad_ranks):
        found = on(
            3, lambda group: Workspace(group, *(sizes if group.rank in bad_ranks else SIZES))
        )
        for error in found:
            assert type(error) is kind and text in str(error)
            assert f"(rank {min(bad_ranks)})" in str(error)

    def test_too_many_ranks(self):
        found = on(17, lambda group: Workspace(group, *SIZES, engine="peer_memory"))
        assert all(type(e) is ValueError and "world_size" in str(e) for e in found)
        found = on(17, lambda group: Workspace(group, *SIZES))
        assert all(type(e) is WorkspaceError and "world_size" in str(e) for e in found)

    def test_no_group(self):
        with pytest.raises(TypeError, match="group: expected rank, size"):
            Workspace(None, *SIZES)

    @pytest.mark.parametrize("engine", ["auto", "peer_memory", "nccl"])
    def test_two_ranks_on_one_gpu(self, machine, engine):
        machine.gpus[3] = 1
        found = on(4, lambda group: Workspace(group, *SIZES, engine=engine))
        for error in found:
            assert type(error) is ValueError and "got device 3 for ranks 1 and 3" in str(error)
        assert not machine.log

    def test_several_hosts(self, monkeypatch):
        monkeypatch.setattr(workspace, "_host", lambda: f"host {rank_here.rank // 2}")
        found = on(4, lambda group: Workspace(group, *SIZES))
        for error in found:
            assert type(error) is WorkspaceError
            assert "ranks 0 and 2 are on different hosts" in str(error) and "NCCL" in str(error)

    def test_processes_of_several_threads(self, monkeypatch):
        monkeypatch.setattr(workspace, "os", SimpleNamespace(getpid=lambda: rank_here.rank // 2))
        found = on(4, lambda group: Workspace(group, *SIZES))
        assert all("the 4 ranks are 2 processes" in str(error) for error in found)

    @pytest.mark.parametrize("event", ["allocate", "fill", "export", "open"])
    @pytest.mark.parametrize("failing", [{0}, {2}, {0, 1, 2}])
    def test_a_cuda_call_fails(self, machine, event, failing):
        for rank in failing:
            machine.fail[rank, event] = RuntimeError("cudaErrorMemoryAllocation: out of memory")
        found = on(3, lambda group: Workspace(group, *SIZES, engine="peer_memory"))
        first = min(failing)
        for error in found:
            assert isinstance(error, WorkspaceError)
            assert f"failed on rank {first}" in str(error)
            assert "RuntimeError: cudaErrorMemoryAllocation" in str(error)
            assert (" and on 2 more" in str(error)) == (len(failing) == 3)

    def test_cause_is_kept_where_it_failed(self, machine):
        cause = machine.fail[1, "allocate"] = RuntimeError("out of memory")
        found = on(2, lambda group: Workspace(group, *SIZES))
        assert found[1].__cause__ is cause and found[0].__cause__ is None

    def test_usable_after_an_error(self, machine):
        machine.fail[1, "open"] = RuntimeError("busy")

        def work(group):
            with pytest.raises(WorkspaceError, match="busy"):
                Workspace(group, *SIZES)
            group.barrier()
            machine.fail.clear()
            group.barrier()
            with Workspace(group, *SIZES) as made:
                return made.kind

        assert good(on(2, work)) == ["ipc", "ipc"]

    def test_a_rank_does_not_come(self):
        release = threading.Event()

        def work(group):
            if group.rank == 1:
                release.wait(10)
                return None
            try:
                return Workspace(group, *SIZES, timeout_s=0.1)
            finally:
                release.set()

        error = on(2, work)[0]
        assert type(error) is GroupError and "rank 1 did not come" in str(error)

    def test_a_rank_of_mpi_does_not_come(self):
        barriers: dict = {}
        release = threading.Event()

        def work(group):
            if group.rank == 1:
                release.wait(10)
                return None
            try:
                return Workspace(MpiLike(group, barriers), *SIZES, timeout_s=0.1)
            finally:
                release.set()

        error = on(2, work)[0]
        assert type(error) is GroupError and "waited 0.1 s" in str(error)

    def test_a_rank_is_elsewhere(self):
        found = on(2, lambda g: g.allgather((1, 2)) if g.rank else Workspace(g, *SIZES))
        assert type(found[0]) is GroupError and "rank 0 is in Workspace, rank 1 is not" in str(
            found[0]
        )


class TestLoss:
    """Where ranks cannot meet, memory that a peer may still use is left alone."""

    def test_a_rank_dies_while_it_is_made(self, machine):
        class Died(BaseException):
            pass

        machine.fail[1, "open"] = Died()

        def work(group):
            try:
                Workspace(group, *SIZES)
            except Died:
                group.fail("rank 1 failed")
                return None

        found = on(3, work)
        assert [type(e) for e in found] == [GroupError, type(None), GroupError]
        assert "free" not in [event for _, event in machine.log]
        assert len(machine.blocks) == 3

    def test_an_exception_in_the_block(self, machine):
        def work(group):
            with pytest.raises(KeyError, match="3"), Workspace(group, *SIZES) as made:
                raise KeyError(3)
            assert made.closed
            made.close()  # nothing, and no meeting
            with pytest.raises(ValueError, match="got a closed one"):
                _ = made.buffers

        good(on(2, work))
        assert len(machine.blocks) == 2
        assert {event for _, event in machine.log} == {"allocate", "fill", "export", "open"}

    def test_one_rank_leaves_by_an_exception(self, machine):
        """The others wait in close() and hear why."""

        def work(group):
            with Workspace(group, *SIZES):
                if group.rank == 1:
                    group.fail("rank 1 failed: KeyError")
                    raise KeyError(3)

        found = on(3, work)
        assert [type(e) for e in found] == [GroupError, KeyError, GroupError]
        assert "close" not in [event for _, event in machine.log]

    def test_the_gpu_fails_before_closing(self, machine):
        machine.fail[0, "synchronize"] = RuntimeError("cudaErrorIllegalAddress")

        def work(group):
            made = Workspace(group, *SIZES)
            with pytest.raises(WorkspaceError, match="on rank 0: .*cudaErrorIllegalAddress"):
                made.close()
            made.close()
            return made.closed

        assert good(on(2, work)) == [True, True]
        assert {"close", "free"}.isdisjoint(event for _, event in machine.log)

    def test_unmapping_fails(self, machine):
        machine.fail[1, "close"] = RuntimeError("cudaErrorUnknown")

        def work(group):
            made = Workspace(group, *SIZES)
            with pytest.raises(WorkspaceError, match="unmapping failed on rank 1"):
                made.close()

        good(on(2, work))
        assert "free" not in [event for _, event in machine.log]


class TestClosing:
    def test_order(self, machine):
        """All work done, then all unmapped, then freed; the fake frees nothing that is mapped."""
        good(on(4, lambda group: Workspace(group, *SIZES).close()))
        last = {e: max(i for i, (_, x) in enumerate(machine.log) if x == e) for e in EVENTS[5:]}
        first = {e: min(i for i, (_, x) in enumerate(machine.log) if x == e) for e in EVENTS[5:]}
        assert last["synchronize"] < first["close"]
        assert last["close"] < first["free"]

    def test_twice(self, machine):
        def work(group):
            made = Workspace(group, *SIZES)
            made.close()
            made.close()
            assert made.closed
            for name in ("buffers", "state"):
                with pytest.raises(ValueError, match="workspace: expected an open one"):
                    getattr(made, name)
            with pytest.raises(ValueError, match="closed"), made:
                pass

        good(on(2, work))

    def test_many_times(self, machine):
        def work(group):
            for tokens in range(1, 11):
                with Workspace(group, tokens, 256) as first, Workspace(group, 4, 64) as second:
                    assert set(first.buffers).isdisjoint(second.buffers)

        good(on(3, work))
        assert not machine.blocks and not machine.mapped


def test_same_host_and_process():
    assert workspace._host() == workspace._host() != ""
