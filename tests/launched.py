"""The ranks that mpirun has started, for tests of several GPUs.

Under mpirun the ranks run the tests of MPI together, one GPU each. Those that start their own ranks
run without it. ``make test-multigpu`` does the one, then the other.
"""

from __future__ import annotations

import functools
import os

import pytest

LAUNCHERS = ("OMPI_", "PMI", "PRTE_")
"""What the variables begin with by which mpirun tells a process its rank."""


@functools.cache
def launched():
    """The communicator of mpirun, or None."""
    if not any(name.startswith(LAUNCHERS) for name in os.environ):
        return None
    from mpi4py import MPI

    return MPI.COMM_WORLD


def world():
    """The communicator of mpirun; skips without one of two ranks."""
    comm = launched()
    if comm is None or comm.size < 2:
        pytest.skip("needs mpirun with two or more ranks")
    return comm


def without_mpirun():
    """Skip on several ranks of mpirun, whose memory a test would see come and go."""
    comm = launched()
    if comm is not None and comm.size > 1:
        pytest.skip("runs without mpirun")
