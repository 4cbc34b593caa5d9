"""Several GPUs: ranks that differ or die end in errors and not in kernels that wait for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from launched import LAUNCHERS, without_mpirun

from cumoe.comm import AllReduced, Epilogue, Workspace, allreduce
from tests.helpers import BF16
from tests.test_multigpu_allreduce import replay

pytestmark = pytest.mark.multigpu

REPO = Path(__file__).resolve().parents[1]
ENGINES = ("peer_memory", "nccl")


def total(group):
    """The sum of ``rank + 1`` over the ranks."""
    return group.size * (group.size + 1) // 2


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_that_differ(ranks, engine):
    """Nothing is launched, so the GPUs are free and the workspace serves the next call."""
    import cupy

    def work(group):
        last = group.rank == group.size - 1
        x = cupy.full((8, 64), group.rank + 1, np.float16)
        epilogue = Epilogue(cupy.zeros_like(x))
        with Workspace(group, 8, 64, engine=engine, debug=True, timeout_s=60) as made:
            wrong = (
                ("num_tokens", lambda: allreduce(x[: 3 + last], made)),
                ("num_tokens", lambda: allreduce(x[: 0 if last else 8], made)),
                ("dtype", lambda: allreduce(cupy.zeros((8, 64), BF16) if last else x, made)),
                ("outputs", lambda: allreduce(x, made, epilogue=epilogue if last else None)),
            )
            for name, call in wrong:
                with pytest.raises(ValueError, match=f"^{name} of allreduce: .*on rank 0 and "):
                    call()
                assert (allreduce(x, made).sum.get() == total(group)).all()

    ranks(work)


@pytest.mark.parametrize("engine", ENGINES)
def test_graph(ranks, engine):
    """Compared when it is captured, and a replay meets nobody."""
    import cupy

    def work(group):
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream, Workspace(group, 8, 64, engine=engine, debug=True, timeout_s=60) as made:
            x = cupy.full((8, 64), group.rank + 1, np.float16)
            out = AllReduced(cupy.zeros_like(x))
            allreduce(x, made, out=out)
            stream.synchronize()
            stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
            with pytest.raises(ValueError, match="num_tokens of allreduce"):
                allreduce(x[: 1 + group.rank], made, out=AllReduced(out.sum[: 1 + group.rank]))
            allreduce(x, made, out=out)
            graph = stream.end_capture()
            for step in range(3):
                x.fill(group.rank + 1 + step)
                replay(group, graph, stream)
                assert (out.sum.get() == total(group) + step * group.size).all()
            del graph

    ranks(work)


DIES = textwrap.dedent("""
    import os, sys
    import cupy
    from cumoe.comm import GroupError, Workspace, allreduce, connect_tcp
    group = connect_tcp(timeout_s=60, call_timeout_s=60)
    cupy.cuda.Device(group.rank).use()
    made = Workspace(group, 8, 64, engine=sys.argv[1], debug=True, timeout_s=60)
    x = cupy.full((8, 64), group.rank + 1, "float16")
    assert (allreduce(x, made).sum.get() == 3).all()
    if group.rank == 1:
        os._exit(3)
    try:
        allreduce(x, made)
    except GroupError as error:
        cupy.cuda.Device().synchronize()
        print("heard:", error, flush=True)
    made.abandon()
""")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_that_dies(engine):
    """Processes that meet by TCP; the one that is left hears of it and its GPU is free."""
    without_mpirun()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)} | {
        "PYTHONPATH": str(REPO),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUMOE_SECRET": "s" * 16,
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", DIES, engine],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [child.communicate(timeout=180)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 3], printed
    assert "heard: " in printed[0] and "rank 1" in printed[0], printed[0]
