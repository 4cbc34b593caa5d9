"""Fixtures and markers of the tests; shared assertions live in ``tests/helpers.py``.

Tests marked ``gpu`` or ``multigpu`` are deselected by default (see ``addopts``); selected, they are
skipped only where the machine has no or too few GPUs. Any other failure to reach one is a failure.
"""

from __future__ import annotations

import functools
import os
import zlib

import hypothesis
import numpy as np
import pytest

NO_DEVICE = 100
"""``cudaErrorNoDevice``: a driver, but no GPU."""

INSUFFICIENT_DRIVER = 35
"""``cudaErrorInsufficientDriver``: what the runtime says where there is no driver at all."""

# Tests never time, so no deadline. On CI every run draws the same examples.
hypothesis.settings.register_profile("cumoe", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("cumoe")


@functools.cache
def num_gpus() -> int:
    """Count the GPUs; 0 only if CUDA says that there is no device or no driver."""
    import cupy

    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status == NO_DEVICE:
            return 0
        if error.status == INSUFFICIENT_DRIVER and cupy.cuda.runtime.driverGetVersion() == 0:
            return 0
        raise


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rng-seed", type=int, default=0, help="changes what the rng fixture draws")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first, so that the others fill what is left of the workers' time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = 2 if item.get_closest_marker("multigpu") else int(bool(item.get_closest_marker("gpu")))
    if needed and num_gpus() < needed:
        pytest.skip(f"needs {needed} NVIDIA GPU(s), found {num_gpus()}")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name and ``--rng-seed``; a failure shows both."""
    seed = [request.config.getoption("--rng-seed"), zlib.crc32(request.node.nodeid.encode())]
    print(f"rng: numpy.random.default_rng({seed})")
    return np.random.default_rng(seed)


@pytest.fixture(params=["mpi", "threads"])
def ranks(request):
    """Runs a function as every rank of a group, its GPU current: ``ranks(function)``."""
    from launched import without_mpirun, world

    from cumoe import comm

    if request.param == "threads":
        without_mpirun()
        return lambda function: comm.run_ranks(2, function, timeout_s=60)
    mpi = world()

    def run(function):
        import cupy

        with cupy.cuda.Device(mpi.rank % num_gpus()):
            return [function(mpi)]

    return run
