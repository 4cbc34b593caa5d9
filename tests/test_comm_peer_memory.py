"""The CUDA calls behind a workspace, on a runtime that notes them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from comm_fakes import ranks

from cumoe import launch
from cumoe.comm import Workspace, WorkspaceError, peer_memory
from cumoe.comm.layout import SENTINEL


class TestPeerMemory:
    @pytest.mark.skipif(launch.is_available(), reason="there is a GPU")
    def test_without_a_gpu(self):
        found = ranks(2, lambda group: pytest.raises(WorkspaceError, Workspace, group, 64, 256))
        for caught in found:
            assert launch.why_unavailable() in str(caught.value)

    @pytest.fixture
    def memory(self, monkeypatch):
        """PeerMemory over a runtime that notes the calls."""
        calls = []

        class RuntimeFake:
            def __getattr__(self, name):
                def call(*args):
                    calls.append((name, *args))
                    return answers.get(name, 0)

                return call

        class DriverFake:
            @staticmethod
            def cuMemsetD32(*args):  # noqa: N802
                calls.append(("cuMemsetD32", *args))
                return (answers.get("cuMemsetD32", 0),)

        answers: dict = {"getDevice": 1, "malloc": 4096, "deviceCanAccessPeer": 1}
        runtime = RuntimeFake()
        modules = {
            "cupy": SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)),
            "cuda.bindings.driver": DriverFake,
        }
        monkeypatch.setattr(peer_memory, "require", modules.__getitem__)
        monkeypatch.setattr(peer_memory, "why_unavailable", lambda: None)
        memory = peer_memory.PeerMemory()
        return SimpleNamespace(memory=memory, calls=calls, answers=answers, runtime=runtime)

    def test_fill_waits(self, memory):
        memory.memory.fill(4096, 1024, SENTINEL)
        assert memory.calls == [("cuMemsetD32", 4096, 0x80000000, 256), ("deviceSynchronize",)]

    def test_fill_fails(self, memory):
        memory.answers["cuMemsetD32"] = 700
        with pytest.raises(launch.LaunchError, match="cuMemsetD32"):
            memory.memory.fill(4096, 1024, SENTINEL)

    def test_plain_allocation(self, memory):
        memory.memory.free(memory.memory.allocate(1024))
        assert memory.calls == [("malloc", 1024), ("free", 4096)]

    def test_gpu(self, memory):
        memory.answers["getDeviceProperties"] = {"uuid": b"sixteen bytes \0."}
        assert memory.memory.gpu() == b"sixteen bytes \0."
        assert memory.calls == [("getDevice",), ("getDeviceProperties", 1)]

    def test_reach(self, memory):
        memory.memory.reach(1)
        assert memory.calls == [("getDevice",)]
        memory.memory.reach(0)
        assert memory.calls[-2:] == [("deviceCanAccessPeer", 1, 0), ("deviceEnablePeerAccess", 0)]

    def test_no_access(self, memory):
        memory.answers["deviceCanAccessPeer"] = 0
        with pytest.raises(RuntimeError, match="GPU 1 cannot access the memory of GPU 3"):
            memory.memory.reach(3)

    @pytest.mark.parametrize(("status", "passes"), [(704, True), (1, False)])
    def test_access_enabled_already(self, memory, status, passes):
        class CudaError(Exception):
            pass

        def fail(device):
            error = CudaError("no")
            error.status = status
            raise error

        memory.runtime.deviceEnablePeerAccess = fail
        if passes:
            memory.memory.reach(0)
        else:
            with pytest.raises(CudaError):
                memory.memory.reach(0)
