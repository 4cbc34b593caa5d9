"""Process groups: threads, JAX's key-value store, the wrapper that compares calls, plain data."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from comm_fakes import KeyValueStore, MpiLike, outcomes, ranks

from cumoe.comm import (
    CheckedGroup,
    GroupError,
    JaxGroup,
    SingleGroup,
    ThreadGroup,
    check_same,
    run_ranks,
)
from cumoe.comm.group import allgather_within, check_group
from cumoe.comm.wire import dumps, loads


class TestWire:
    @pytest.mark.parametrize(
        "value",
        [
            None, True, 0, -(2**70), 1.5, float("inf"), "", "é\n", b"", b"\x00\xff", [], (), {},
            [1, (2, [b"x", {"a": (None,)}])], {"bytes": "no", "tuple": [1], "dict": {}},
            [{"tuple": 1}], ({},),
        ],
    )  # fmt: skip
    def test_comes_back(self, value):
        back = loads(dumps(value))
        assert back == value and type(back) is type(value)
        assert repr(back) == repr(value)

    @pytest.mark.parametrize(
        "value",
        [object(), {1: 2}, {"a": {3}}, np.int64(1), np.zeros(2), [[np.float32(1)]], 1j, len],
    )
    def test_refuses_other_types(self, value):
        with pytest.raises(TypeError, match="expected"):
            dumps(value)

    @pytest.mark.parametrize(
        "text",
        ["", "{", '{"a":1,"b":2}', "{}", '{"pickle":"gA=="}', '{"bytes":"?"}', '{"bytes":1}',
         '{"tuple":3}', "[" * 100 + "]" * 100, "[" * 100000, b"\xff"],
    )  # fmt: skip
    def test_refuses_other_text(self, text):
        with pytest.raises(ValueError, match="plain data"):
            loads(text)

    def test_refuses_deep_data(self):
        value: list = []
        value.append(value)
        with pytest.raises(TypeError, match="levels"):
            dumps(value)


class TestThreads:
    @pytest.mark.parametrize("size", [1, 2, 5, 16])
    def test_calls(self, size):
        def work(group):
            assert (group.size, type(group)) == (size, ThreadGroup)
            results = []
            for step in range(20):
                results.append(group.allgather((group.rank, step)))
                group.barrier()
                results.append(group.bcast(group.rank * 100 + step, root=step % size))
            return results

        want = []
        for step in range(20):
            want += [[(rank, step) for rank in range(size)], step % size * 100 + step]
        assert ranks(size, work) == [want] * size

    def test_objects_are_handed_over(self):
        array = np.arange(3)
        found = ranks(2, lambda group: group.bcast(array if group.rank == 1 else None, root=1))
        assert found[0] is array and found[1] is array

    def test_results_are_lists_of_their_own(self):
        lists = ranks(2, lambda group: group.allgather(group.rank))
        assert lists[0] is not lists[1]

    def test_barrier_waits(self):
        arrived = []

        def work(group):
            time.sleep(0.02 * group.rank)
            arrived.append(group.rank)
            group.barrier()
            return len(arrived)

        assert ranks(4, work) == [4] * 4

    def test_a_failure_reaches_everyone(self):
        heard = {}

        def work(group):
            if group.rank == 1:
                raise KeyError("no such expert")
            try:
                group.barrier()
            except GroupError as error:
                heard[group.rank] = str(error)
                raise

        with pytest.raises(KeyError, match="no such expert"):
            ranks(3, work)
        assert set(heard) == {0, 2}
        assert all("rank 1 failed: KeyError" in text for text in heard.values())

    def test_a_failed_group_stays_failed(self):
        def work(group):
            if group.rank == 0:
                raise ValueError("early")
            for _ in range(3):
                with pytest.raises(GroupError, match="rank 0 failed"):
                    group.allgather(1)

        with pytest.raises(ValueError, match="early"):
            ranks(2, work)

    def test_a_rank_that_ends_is_named(self):
        found = outcomes(3, lambda group: None if group.rank == 2 else group.barrier())
        assert found[2] is None
        for error in found[:2]:
            assert isinstance(error, GroupError) and "rank 2 ended without" in str(error)

    def test_time_out_names_who_is_missing(self):
        release = threading.Event()

        def work(group):
            if group.rank in (1, 3):
                release.wait(10)
                return None
            try:
                return group.allgather(0)
            finally:
                release.set()

        found = outcomes(4, work, timeout_s=0.2)
        for rank in (0, 2):
            assert "ranks 1, 3 did not come to allgather() within 0.2 s" in str(found[rank])

    def test_different_calls(self):
        found = outcomes(2, lambda group: group.barrier() if group.rank else group.bcast(1, root=0))
        for error in found:
            assert isinstance(error, GroupError)
            assert "rank 0 is in bcast(root=0), rank 1 in barrier()" in str(error)

    def test_different_roots(self):
        found = outcomes(2, lambda group: group.bcast(1, root=group.rank))
        assert all("bcast(root=0), rank 1 in bcast(root=1)" in str(error) for error in found)

    @pytest.mark.parametrize("root", [-1, 2])
    def test_bad_root(self, root):
        with pytest.raises(ValueError, match=f"root: expected 0 <= root < 2, got {root}"):
            ranks(2, lambda group: group.bcast(1, root=root))

    def test_system_exit_is_a_failure(self):
        def work(group):
            if group.rank:
                raise SystemExit(3)
            group.barrier()

        with pytest.raises(SystemExit):
            ranks(2, work)

    def test_bad_sizes(self):
        with pytest.raises(ValueError, match="size"):
            ranks(0, lambda group: None)
        with pytest.raises(ValueError, match="devices: expected 2"):
            run_ranks(2, lambda group: None, devices=[0])
        with pytest.raises(ValueError, match="size"):
            ThreadGroup.make(0)

    def test_more_ranks_than_gpus(self, monkeypatch):
        from cumoe.comm import threads

        class Runtime:
            class cuda:  # noqa: N801
                class runtime:  # noqa: N801
                    @staticmethod
                    def getDeviceCount():  # noqa: N802
                        return 2

        monkeypatch.setattr(threads, "is_available", lambda: True)
        monkeypatch.setattr(threads, "require", lambda name: Runtime)
        with pytest.raises(ValueError, match="2 GPUs, got 3"):
            run_ranks(3, lambda group: None)


class TestChecked:
    def test_passes_calls_on(self):
        def work(group):
            checked = CheckedGroup(group)
            checked.barrier()
            return checked.allgather(group.rank), checked.bcast(group.rank, root=1)

        assert ranks(3, work) == [([0, 1, 2], 1)] * 3

    def test_names_both_calls_on_a_communicator_that_cannot(self):
        """A communicator with nothing but allgather cannot tell a barrier from a bcast."""
        barriers: dict = {}

        def work(group):
            checked = CheckedGroup(MpiLike(group, barriers))
            checked.barrier()
            if group.rank == 2:
                return checked.bcast(5)
            return checked.allgather(5)

        found = outcomes(3, work)
        for error in found:
            assert isinstance(error, GroupError)
            text = "rank 0 is in allgather(), its call number 2, rank 2 in bcast(root=0)"
            assert text in str(error)

    def test_counts_calls(self):
        """A rank that has left a call out is noticed though the calls have the same name."""

        def work(group):
            checked = CheckedGroup(group)
            if group.rank:
                checked._count += 1
            checked.allgather(0)

        found = outcomes(2, work)
        assert all(
            "call number 1, rank 1 in allgather(), its call number 2" in str(e) for e in found
        )

    def test_a_rank_without_the_wrapper(self):
        def work(group):
            return CheckedGroup(group).allgather(1) if group.rank else group.allgather(1)

        found = outcomes(2, work)
        assert "rank 0 has no CheckedGroup" in str(found[1])

    def test_times_out_by_ibarrier(self):
        barriers: dict = {}
        release = threading.Event()

        def work(group):
            if group.rank == 1:
                release.wait(10)
                return None
            try:
                return CheckedGroup(MpiLike(group, barriers), timeout_s=0.1).barrier()
            finally:
                release.set()

        error = outcomes(2, work)[0]
        assert isinstance(error, GroupError) and "waited 0.1 s" in str(error)

    def test_allgather_within_a_plain_group(self):
        class Plain:
            rank, size = 0, 1
            allgather = staticmethod(lambda obj: [obj])

        assert allgather_within(Plain(), 3, 0.1) == [3]

    def test_check_same(self):
        assert ranks(3, lambda group: check_same(group, "dtype", "bfloat16")) == [None] * 3
        found = outcomes(3, lambda group: check_same(group, "num_tokens", 4 + group.rank // 2))
        text = "num_tokens: expected the same on every rank, got 4 on rank 0 and 5 on rank 2"
        assert [str(error) for error in found] == [text] * 3

    def test_no_group(self):
        with pytest.raises(TypeError, match="has no rank"):
            check_group(object())
        group = SingleGroup()
        group.rank = 1
        with pytest.raises(ValueError, match="0 <= rank < size"):
            CheckedGroup(group)

    def test_single(self):
        group = SingleGroup()
        assert (group.allgather(1), group.bcast(2), group.barrier()) == ([1], 2, None)


class TestJax:
    def test_calls(self):
        store = KeyValueStore()

        def work(group):
            mine = JaxGroup(store, group.rank, group.size, name="a")
            found = []
            for step in range(30):
                found.append(mine.allgather({"rank": group.rank, "data": bytes([step])}))
                found.append(mine.bcast((group.rank, step), root=step % 3))
                mine.barrier()
            return found

        want = []
        for step in range(30):
            want.append([{"rank": rank, "data": bytes([step])} for rank in range(3)])
            want.append((step % 3, step))
        assert ranks(3, work) == [want] * 3
        assert len(store.values) == 3  # one key of each rank, that of the last call

    def test_groups_of_a_process_have_keys_of_their_own(self):
        store = KeyValueStore()
        for _ in range(2):
            assert JaxGroup(store, 0, 1).allgather(1) == [1]

    def test_time_out(self):
        group = JaxGroup(KeyValueStore(), 0, 2, timeout_s=0.05)
        for _ in range(2):
            with pytest.raises(GroupError, match=r"rank 1 did not come to barrier\(\).*0.05 s"):
                group.barrier()

    def test_different_calls(self):
        store = KeyValueStore()

        def work(group):
            mine = JaxGroup(store, group.rank, 2, name="b")
            return mine.barrier() if group.rank else mine.allgather(1)

        found = outcomes(2, work)
        assert all("allgather(), rank 1 in barrier()" in str(error) for error in found)

    def test_without_jax(self, monkeypatch):
        import sys

        monkeypatch.delitem(sys.modules, "jax._src.distributed", raising=False)
        with pytest.raises(GroupError, match="jax.distributed.initialize"):
            JaxGroup()

    def test_client_of_jax(self, monkeypatch):
        import sys
        from types import SimpleNamespace

        state = SimpleNamespace(client=KeyValueStore(), process_id=0, num_processes=1)
        module = SimpleNamespace(global_state=state)
        monkeypatch.setitem(sys.modules, "jax._src.distributed", module)
        assert JaxGroup().allgather(3) == [3]
        state.client = None
        with pytest.raises(GroupError, match="has no client"):
            JaxGroup()

    @pytest.mark.parametrize(("rank", "size"), [(None, 2), (2, 2), (0, None)])
    def test_bad_rank(self, rank, size):
        with pytest.raises(ValueError, match="rank"):
            JaxGroup(KeyValueStore(), rank, size)
