"""Several GPUs: workspaces by CUDA IPC and by peer access, written through by kernels and copies.

Under mpirun the ranks run the tests of MPI together, one GPU each; threads and ``demo --ranks`` are
tested without it. ``make test-multigpu`` does both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launched import LAUNCHERS, without_mpirun, world

from cumoe.comm import CheckedGroup, GroupError, Workspace, WorkspaceError, check_same
from cumoe.comm.layout import SENTINEL, STATE_WORDS, workspace_bytes

pytestmark = pytest.mark.multigpu

REPO = Path(__file__).resolve().parents[1]
SIZES = (512, 7168)  # 66 MB of two ranks
CYCLES = 10


def words(workspace, rank):
    """A rank's block as this rank reaches it, an array of its 32-bit words."""
    import cupy

    memory = cupy.cuda.UnownedMemory(
        workspace.buffers[rank], workspace.num_bytes, workspace, workspace.device
    )
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    return cupy.ndarray((workspace.num_bytes // 4,), np.uint32, memptr=pointer)


def wait():
    import cupy

    cupy.cuda.Device().synchronize()


def pattern(sender, receiver, count):
    """What a sender writes for a receiver: words that tell who, to whom and where."""
    return (np.arange(count, dtype=np.uint32) * 2654435761) ^ np.uint32(sender << 8 | receiver)


class TestWorkspace:
    def test_attributes(self, ranks):
        def work(group):
            with Workspace(group, *SIZES) as made:
                assert made.num_bytes == workspace_bytes(group.size, *SIZES)
                assert made.kind == ("peer" if type(group).__name__ == "ThreadGroup" else "ipc")
                assert len(set(made.buffers)) == group.size
                assert all(address % 256 == 0 for address in made.buffers)
                assert made.state.shape == (STATE_WORDS,) and made.state.dtype == np.int32
                assert int(made.state.device.id) == made.device
                assert not made.state.get().any()
                check_same(group, "num_bytes", made.num_bytes)

        ranks(work)

    def test_initial_contents(self, ranks):
        """The own block, and the peers' as they are mapped here."""

        def work(group):
            with Workspace(group, *SIZES) as made:
                for rank in range(group.size):
                    assert (words(made, rank).get() == SENTINEL).all()
                group.barrier()

        ranks(work)

    @pytest.mark.parametrize("how", ["kernel", "copy"])
    def test_written_by_every_peer(self, ranks, how):
        """Every rank writes a part of every block, its own included, and reads its own."""
        import cupy

        def work(group):
            with Workspace(group, *SIZES) as made:
                count = made.num_bytes // 4 // group.size
                part = slice(group.rank * count, (group.rank + 1) * count)
                for rank in range(group.size):
                    view, data = words(made, rank)[part], pattern(group.rank, rank, count)
                    if how == "kernel":
                        cupy.bitwise_xor(cupy.asarray(data), np.uint32(0), out=view)
                    else:
                        view.set(data)
                wait()
                group.barrier()
                own = words(made, group.rank).get()
                for sender in range(group.size):
                    got = own[sender * count : (sender + 1) * count]
                    np.testing.assert_array_equal(got, pattern(sender, group.rank, count))
                group.barrier()

        ranks(work)

    def test_read_from_peers(self, ranks):
        """What an owner writes is what the peers read."""

        def work(group):
            with Workspace(group, *SIZES) as made:
                count = made.num_bytes // 4
                words(made, group.rank).set(pattern(group.rank, 99, count))
                wait()
                group.barrier()
                for rank in range(group.size):
                    np.testing.assert_array_equal(words(made, rank).get(), pattern(rank, 99, count))
                group.barrier()

        ranks(work)

    def test_close_and_reopen(self, ranks):
        """A block that were left behind, or a mapping, would show in the free memory."""
        import cupy

        def work(group):
            def cycle(step):
                with Workspace(group, *SIZES) as made:
                    for rank in range(group.size):
                        words(made, rank)[group.rank] = step
                    wait()
                    group.barrier()
                    got = words(made, group.rank)[: group.size].get()
                    assert got.tolist() == [step] * group.size
                    group.barrier()

            cycle(0)  # contexts, kernels and mappings of the driver that stay
            group.barrier()
            before = cupy.cuda.runtime.memGetInfo()[0]
            for step in range(1, CYCLES + 1):
                cycle(step)
            group.barrier()
            lost = before - cupy.cuda.runtime.memGetInfo()[0]
            assert lost < workspace_bytes(group.size, *SIZES)

        ranks(work)

    def test_two_at_once(self, ranks):
        def work(group):
            with Workspace(group, 16, 4096) as small, Workspace(group, 16, 8192, "float32") as big:
                assert set(small.buffers).isdisjoint(big.buffers)
                words(small, (group.rank + 1) % group.size)[0] = 7
                wait()
                group.barrier()
                assert int(words(small, group.rank)[0]) == 7
                assert (words(big, group.rank).get() == SENTINEL).all()
                group.barrier()

        ranks(work)

    def test_sizes_differ(self, ranks):
        def work(group):
            with pytest.raises(ValueError, match=r"\(4, 64, 'bfloat16'\) on rank 0 and \(5, 64"):
                Workspace(group, 4 + group.rank, 64)
            group.barrier()

        ranks(work)

    def test_out_of_memory_on_all(self, ranks):
        """Every rank hears of it, and the next workspace works."""

        def work(group):
            with pytest.raises(WorkspaceError, match="failed on rank 0 and on .*[Mm]emory"):
                Workspace(group, 1 << 26, 1 << 16)
            Workspace(group, *SIZES).close()

        ranks(work)

    def test_checked(self, ranks):
        def work(group):
            with Workspace(CheckedGroup(group), 16, 64) as made:
                assert made.group.rank == group.rank

        ranks(work)


class TestMpi:
    def test_a_communicator_is_a_group(self):
        comm = world()
        everyone = list(range(comm.size))
        assert comm.allgather(comm.rank) == everyone
        assert comm.bcast({"root": 1} if comm.rank == 1 else None, root=1) == {"root": 1}
        comm.barrier()
        checked = CheckedGroup(comm, timeout_s=60)
        assert checked.allgather(comm.rank) == everyone
        assert checked.bcast(comm.rank, root=1) == 1
        checked.barrier()

    def test_different_calls(self):
        checked = CheckedGroup(world(), timeout_s=60)
        with pytest.raises(GroupError, match="different calls: rank 0 is in bcast"):
            if checked.rank == 0:
                checked.bcast(1)
            else:
                checked.barrier()

    def test_a_rank_that_does_not_come(self):
        """On a communicator of its own, which nobody uses afterwards."""
        comm = world()
        aside = comm.Dup()
        if aside.rank == 0:
            with pytest.raises(GroupError, match=r"rank 0 waited 0.5 s"):
                Workspace(aside, 16, 64, timeout_s=0.5)
        comm.barrier()
        if aside.rank:
            aside.Ibarrier().Wait()  # that of rank 0 must not be left behind unmatched
        comm.barrier()


def test_demo_of_two_ranks():
    """Processes that meet by TCP and share memory by CUDA IPC."""
    without_mpirun()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    done = subprocess.run(
        [sys.executable, "-m", "cumoe", "demo", "--ranks", "2", "--backend", "cuda"],
        env=environment | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout and "same bits on every rank" in done.stdout
    assert "[1] GPU 1" in done.stdout and "experts 128 to 255" in done.stdout
