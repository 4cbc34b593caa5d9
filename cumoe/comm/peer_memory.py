"""Device memory that other ranks can write: the CUDA calls of a workspace, on the current device.

Memory is allocated by ``cudaMalloc`` and never by a pool, since an IPC handle stands for a whole
allocation. Other processes map it by CUDA IPC, other devices of this process reach it by peer
access. NVLink multicast is not used.
"""

from __future__ import annotations

import contextlib
from typing import Any

from cumoe.launch import LaunchError, why_unavailable
from cumoe.launch.errors import check, require

__all__ = ["PeerMemory"]

_PEER_ACCESS_ALREADY_ENABLED = 704  # cudaErrorPeerAccessAlreadyEnabled


class PeerMemory:
    """The CUDA calls that make memory shared, on CuPy's current device.

    Addresses are integers. A call that fails raises CuPy's ``CUDARuntimeError`` or a LaunchError.

    Raises
    ------
    LaunchError
        If there is no usable GPU; the message says why.
    """

    def __init__(self) -> None:
        reason = why_unavailable()
        if reason is not None:
            raise LaunchError(reason)
        self._runtime = require("cupy").cuda.runtime
        self._driver = require("cuda.bindings.driver")

    def device(self) -> int:
        """Return the ordinal of the current device."""
        return int(self._runtime.getDevice())

    def gpu(self) -> bytes:
        """Return the UUID of the current device, the same in every process."""
        return bytes(self._runtime.getDeviceProperties(self.device())["uuid"])

    def use(self, device: int) -> contextlib.AbstractContextManager[Any]:
        """Make a device current for a while."""
        context: contextlib.AbstractContextManager[Any] = require("cupy").cuda.Device(device)
        return context

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new memory, aligned to 256 bytes."""
        return int(self._runtime.malloc(num_bytes))

    def free(self, address: int) -> None:
        """Free memory of :meth:`allocate`."""
        self._runtime.free(address)

    def fill(self, address: int, num_bytes: int, word: int) -> None:
        """Set every 32-bit word, and wait for it."""
        count = num_bytes // 4
        check(self._driver.cuMemsetD32(address, word, count), "cuMemsetD32")
        self.synchronize()

    def zeros(self, count: int) -> Any:
        """Return `count` int32 zeros as an array of this rank's own."""
        cupy = require("cupy")
        array = cupy.zeros(count, "int32")
        self.synchronize()
        return array

    def stream(self) -> int:
        """Return CuPy's current stream."""
        return int(require("cupy").cuda.get_current_stream().ptr)

    def synchronize(self) -> None:
        """Wait for all work of the device."""
        self._runtime.deviceSynchronize()

    def export(self, address: int) -> bytes:
        """Return the IPC handle of an allocation."""
        return bytes(self._runtime.ipcGetMemHandle(address))

    def open(self, handle: bytes) -> int:
        """Map another process's allocation; enables peer access to its device."""
        return int(self._runtime.ipcOpenMemHandle(handle))

    def close(self, address: int) -> None:
        """Unmap what :meth:`open` mapped."""
        self._runtime.ipcCloseMemHandle(address)

    def reach(self, device: int) -> None:
        """Let the current device access another device of this process.

        Raises
        ------
        RuntimeError
            If the two devices cannot.
        """
        here = self.device()
        if device == here:
            return
        if not self._runtime.deviceCanAccessPeer(here, device):
            raise RuntimeError(
                f"GPU {here} cannot access the memory of GPU {device} (`nvidia-smi topo -p2p rw` "
                "shows which can)"
            )
        try:
            self._runtime.deviceEnablePeerAccess(device)
        except Exception as error:  # CUDARuntimeError, a type of CuPy
            if getattr(error, "status", None) != _PEER_ACCESS_ALREADY_ENABLED:
                raise
