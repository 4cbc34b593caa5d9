"""`python -m cumoe demo --ranks N`: starts one process for each rank on this host.

Owns the processes: their environment (a fresh secret and a free port, so nobody else can join),
their output behind the rank's number, and their end, all of them when one fails. What a rank does
is in ``rank.py``.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from cumoe.cli.console import CommandError
from cumoe.cli.problem import choose_backend
from cumoe.comm.layout import MAX_WORLD_SIZE
from cumoe.launch.errors import require
from cumoe.models import get_shape

GRACE_S = 5.0
"""How long other ranks may say why they end after one has failed, and may take to end."""

_POLL_S = 0.02
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def run(args: argparse.Namespace) -> int:
    """Start the ranks and return 0 if all pass, 1 if their answer is wrong, 2 if one cannot run."""
    size: int = args.ranks
    if size > MAX_WORLD_SIZE:
        raise CommandError(f"--ranks: expected at most {MAX_WORLD_SIZE}, got {size}")
    backend = choose_backend(args.backend)
    if backend == "cuda":
        _check_gpus(size)
    experts = get_shape(args.model).num_experts
    if size > experts:
        raise CommandError(f"--ranks: {args.model} has {experts} experts, too few for {size} ranks")
    command = [sys.executable, "-u", "-m", "cumoe.cli.rank", "--backend", backend]
    command += ["--model", args.model, "--recipe", args.recipe, "--seed", str(args.seed)]
    if args.tokens is not None:
        command += ["--tokens", str(args.tokens)]
    return start(command, size)


def _check_gpus(size: int) -> None:
    """Raise unless there is a GPU for each rank."""
    count = int(require("cupy").cuda.runtime.getDeviceCount())
    if count < size:
        raise CommandError(
            f"--ranks {size}: there {'is 1 GPU' if count == 1 else f'are {count} GPUs'}; "
            "--backend numpy needs none"
        )


def start(command: Sequence[str], size: int) -> int:
    """Run a command as `size` ranks that can find each other, and return an exit code.

    Returns
    -------
    int
        0 if all ranks return 0, 1 if each that fails returns 1, else 2.
    """
    processes: list[subprocess.Popen[str]] = []
    readers = []
    lock = threading.Lock()
    environment = _environment(size)
    try:
        for rank in range(size):
            process = subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            processes.append(process)
            assert process.stdout is not None
            reader = threading.Thread(target=_copy, args=(process.stdout, rank, size, lock))
            reader.start()
            readers.append(reader)
        _wait(processes)
    finally:
        _stop(processes)
        for reader in readers:
            reader.join(GRACE_S)
    return _exit_code([process.returncode for process in processes])


def _environment(size: int) -> dict[str, str]:
    """Return the environment in which :func:`cumoe.comm.connect_tcp` finds the other ranks."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = dict(os.environ)
    threads = str(max(1, (os.cpu_count() or 1) // size))
    for name in _THREAD_VARIABLES:
        environment.setdefault(name, threads)
    width = shutil.get_terminal_size().columns - len(_prefix(size - 1, size))
    return environment | {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUMOE_SECRET": secrets.token_hex(32),
        "COLUMNS": str(max(40, width)),
    }


def _prefix(rank: int, size: int) -> str:
    return f"[{rank:>{len(str(size - 1))}}] "


def _copy(stream: IO[str], rank: int, size: int, lock: threading.Lock) -> None:
    """Print a rank's lines behind its number."""
    prefix = _prefix(rank, size)
    with stream:
        for line in stream:
            with lock:
                try:
                    print(prefix + line.rstrip("\n"), flush=True)
                except (OSError, ValueError):
                    return  # nobody reads any more


def _wait(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Return when all ranks have ended, or a while after one has failed."""
    deadline = None
    while any(process.poll() is None for process in processes):
        if deadline is None and any(process.returncode for process in processes):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    """End what still runs, politely first."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _exit_code(codes: Sequence[int]) -> int:
    """Sum up the ranks' exit codes, telling of those that a signal ended."""
    for rank, code in enumerate(codes):
        if code < 0:
            print(f"rank {rank} was ended by signal {-code}", file=sys.stderr)
    failed = {code for code in codes if code}
    if not failed:
        return 0
    return 1 if failed == {1} else 2
