"""NCCL as the engine of a workspace: the sum of ranks that do not reach each other's memory.

A communicator of all ranks, by CuPy's binding of NCCL, which is loaded on use; and the launches of
an op with NCCL's sum in their middle. NVLink multicast is not used.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cumoe.arrays import DTYPES, address, dtype_name
from cumoe.config import Array
from cumoe.kernels import Runnable
from cumoe.kernels_comm import AllReduceConfig, PeerMemory, Tokens, allreduce
from cumoe.launch import Device, LaunchError
from cumoe.launch.errors import require

__all__ = ["Communicator", "NcclSum", "load", "plan_sum", "within"]

CONSTANTS = {
    "bfloat16": "NCCL_BFLOAT16",
    "float16": "NCCL_FLOAT16",
    "float32": "NCCL_FLOAT32",
}

LAST_WAIT_S = 10.0
"""How long the end of the interpreter waits for a communicator that is being aborted."""

ALONE = PeerMemory(0, (0,), None, 0, 0, 0, 0)
"""Of kernels that exchange nothing."""

T = TypeVar("T")


def load() -> Any:
    """Return CuPy's binding of NCCL.

    Raises
    ------
    LaunchError
        If CuPy or NCCL is not installed; the message says what to install.
    """
    module = require("cupy.cuda.nccl")
    if not module.available:
        major = require("cupy").cuda.runtime.runtimeGetVersion() // 1000
        raise LaunchError(f"CuPy cannot load NCCL (libnccl.so.2); install nvidia-nccl-cu{major}")
    return module


def _load_without_multicast() -> Any:
    """Return the binding, its environment set before NCCL first reads it."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    return load()


def within(seconds: float, action: Callable[[], T], late: str) -> T:
    """Return what `action` returns in a thread of its own.

    Raises
    ------
    TimeoutError
        With the message `late`, if it takes longer. The thread is then left behind.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def body() -> None:
        try:
            done.append(action())
        except BaseException as error:  # raised again where it is waited for
            failed.append(error)

    thread = threading.Thread(target=body, name="cumoe NCCL", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(late)
    return done[0]


class Communicator:
    """NCCL's communicator of all ranks; made by all together, on the current device.

    Making one sets ``NCCL_NVLS_ENABLE=0`` in the environment unless it is set: no NVLink multicast.

    Parameters
    ----------
    size, rank : int
    unique_id : bytes
        What :meth:`new_id` returned on one rank.
    """

    def __init__(self, size: int, unique_id: bytes, rank: int) -> None:
        self._nccl = _load_without_multicast()
        self._made = self._nccl.NcclCommunicator(size, unique_id, rank)
        # NOTE: one reference for good. With the last CuPy destroys what is not closed, which at the
        # end of the interpreter may wait for ever: for a graph, or for ranks that are gone.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._made))

    @staticmethod
    def new_id() -> bytes:
        """Return what identifies a new communicator; opens a socket that its ranks connect to."""
        return bytes(_load_without_multicast().get_unique_id())

    def queue_sum(self, part: Array, total: Array, stream_ptr: int) -> None:
        """Queue the sum over ranks of equally many elements; `total` may be `part`."""
        kind = getattr(self._nccl, CONSTANTS[dtype_name(part)])
        count, op = int(part.size), self._nccl.NCCL_SUM
        self._made.allReduce(address(part), address(total), count, kind, op, stream_ptr)

    def destroy(self) -> None:
        """Free it; waits for the other ranks, and until no CUDA graph contains a sum of it."""
        self._made.destroy()

    def abort(self) -> None:
        """End what is queued and free it without the other ranks; does not wait, never raises."""

        def body() -> None:
            with contextlib.suppress(Exception):  # nobody is there to hear of it
                self._made.abort()

        # NOTE: in a thread, since this too waits until no CUDA graph contains a sum of it. The end
        # of the process must not come in the middle of NCCL, nor wait for such a graph.
        thread = threading.Thread(target=body, name="cumoe NCCL abort", daemon=True)
        with contextlib.suppress(RuntimeError):  # the interpreter is at its end already
            thread.start()
            atexit.register(thread.join, LAST_WAIT_S)


@dataclass(frozen=True, eq=False)
class NcclSum:
    """The sum over ranks as one item of a list of launches.

    Attributes
    ----------
    communicator : Communicator
    part, total : array
        This rank's, and the sum; may be the same.
    """

    communicator: Communicator
    part: Array
    total: Array

    def prepare(self, device: Device) -> None:
        """Do nothing: ranks are connected when the communicator is made."""

    def run(self, device: Device, stream_ptr: int) -> None:
        """Queue it on a stream of the device, which is current."""
        self.communicator.queue_sum(self.part, self.total, stream_ptr)


def plan_sum(
    tokens: Tokens,
    full: Tokens,
    communicator: Communicator,
    scratch: Array,
    config: AllReduceConfig,
) -> list[Runnable]:
    """Return what a rank runs: the kernel of its part, NCCL's sum, the kernel of what follows.

    Parameters
    ----------
    tokens, full : Tokens
        Without and with outputs. `result_out` is not used without a residual: it is the sum.
    communicator : Communicator
    scratch : array, int32
        Of this rank, as large as all its tokens; holds part and sum where the sum is no output.
    config : AllReduceConfig

    Returns
    -------
    list of Runnable
        One to three: no kernel for a part that is given, nor where nothing follows the sum.
    """
    shape, dtype = (tokens.num_tokens, tokens.hidden_size), dtype_name(tokens.rows)
    total = full.sum_out
    if total is None:
        total = scratch[: tokens.num_bytes // 4].view(DTYPES[dtype]).reshape(shape)
    items: list[Runnable] = []
    part = tokens.rows
    if tokens.policy != "plain":
        part = total
        bare = replace(tokens, residual=None, norm_weight=None, quantize=None, group_size=0)
        items.append(allreduce(replace(bare, result_out=total), ALONE, config))
    items.append(NcclSum(communicator, part, total))
    if any(x is not None for x in (full.result_out, full.norm_out, full.quant_out)):
        after = replace(full, policy="plain", rows=total, weights=None, permuted_idx=None)
        launch = allreduce(replace(after, sum_out=None), ALONE, config)
        # NCCL's kernel lets nothing begin before its end, so nothing is gained by a programmatic
        # launch; and on a captured stream what NCCL leaves last need not be a kernel.
        launch.config = replace(launch.config, programmatic=False)
        items.append(launch)
    return items
