"""Timing, and nothing but timing: every figure of this project is measured here.

Owns the clocks (GPU events, CUDA-graph replay, the host's), warm-up by time, the cold L2 and the
round-robin over variants; :mod:`bench.record` owns what is kept of a run and is re-exported. Knows
no op: a variant is a function of an input index, whose answer its owner has checked once before.
Nothing here asserts a speed. Without a GPU the same calls time NumPy code by the host's clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bench.record import (
    check_row,
    device_available,
    environment,
    l2_bytes,
    make_row,
    print_table,
    write_results,
)

if TYPE_CHECKING:
    from cumoe.comm import Group

__all__ = [
    "Timing",
    "check_row",
    "copy_rate_tbps",
    "device_available",
    "environment",
    "make_row",
    "measure",
    "measure_ranks",
    "num_cold_inputs",
    "print_table",
    "write_results",
]

Variant = Callable[[int], object]
"""Runs the work once on input set ``i``; device work goes to CuPy's current stream."""

MIN_SAMPLES = 3
"""Samples of each variant that a time budget cannot take away."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median, the spread, and every sample in the order taken.

    Attributes
    ----------
    us, us_min, us_max : float
        Median, fastest and slowest.
    us_p10, us_p90 : float
        Tenth and ninetieth percentile.
    samples : tuple of float
    """

    us: float
    us_min: float
    us_max: float
    us_p10: float
    us_p90: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> Timing:
        """Summarise `samples`, in microseconds; at least one."""
        values = tuple(float(s) for s in samples)
        if not values:
            raise ValueError("samples: expected at least one, got none")
        p10, p90 = (float(p) for p in np.percentile(values, (10, 90)))
        return cls(statistics.median(values), min(values), max(values), p10, p90, values)


@dataclass(frozen=True)
class _Work:
    """What one sample runs: ``run(first input set)``, and how long the host takes to queue it."""

    run: Variant
    queue_us: float = 0.0


def _repeat(variant: Variant, calls: int, num_inputs: int) -> Variant:
    """Make a function of the first input set that makes `calls` calls."""

    def run(first: int) -> None:
        for i in range(calls):
            variant((first + i) % num_inputs)

    return run


class HostClock:
    """Times work that has finished when the call returns."""

    def __enter__(self) -> HostClock:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def synchronize(self) -> None:
        """Return at once: nothing is queued."""

    def prepare(self, run: Variant, graph: bool) -> _Work:
        """Return `run` as it is; the host has no graphs."""
        return _Work(run)

    def sample(self, work: _Work, first: int, flush_l2: bool) -> float:
        """Return the microseconds that the work takes from input set `first` on."""
        start = time.perf_counter_ns()
        work.run(first)
        return (time.perf_counter_ns() - start) / 1e3


class DeviceClock:
    """Times queued work by GPU events, on a stream of its own that is current while entered.

    Writes over twice the L2 come before each sample. They evict the inputs, and they keep the GPU
    busy while Python queues the work, so that the time between the events is the GPU's alone.
    """

    def __init__(self) -> None:
        import cupy

        self._elapsed_ms = cupy.cuda.get_elapsed_time
        self._flush_bytes = max(2 * l2_bytes(), 1 << 20)
        self._buffer = cupy.cuda.alloc(self._flush_bytes)
        cupy.cuda.Device().synchronize()  # inputs may still be on their way on other streams
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._start, self._stop = cupy.cuda.Event(), cupy.cuda.Event()
        self.flush()
        flush_us = self._time(_Work(lambda passes: self.flush(passes)), 8) / 8
        self._flush_us = max(flush_us, 1.0)

    def __enter__(self) -> DeviceClock:
        self._stream.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.__exit__(*exc)
        self._stream.synchronize()

    def synchronize(self) -> None:
        """Wait until everything queued has run."""
        self._stream.synchronize()

    def flush(self, passes: int = 1) -> None:
        """Queue `passes` writes over twice the L2."""
        for value in range(passes):
            self._buffer.memset_async(value & 0xFF, self._flush_bytes, self._stream)

    def prepare(self, run: Variant, graph: bool) -> _Work:
        """Return `run`, or one captured graph of ``run(0)``, with the host time that queuing takes.

        `run` has been called before, so nothing is compiled or loaded during the capture.
        """
        if graph:
            self._stream.begin_capture()
            try:
                run(0)
            finally:
                captured = self._stream.end_capture()
            captured.upload(self._stream)
            run = self._replay(captured)
        return _Work(run, max(self._time_queuing(run) for _ in range(3)))

    def sample(self, work: _Work, first: int, flush_l2: bool) -> float:
        """Return the microseconds of GPU time that the work takes from input set `first` on.

        Without `flush_l2` the work runs once untimed just before, so that it finds its own L2.
        """
        passes = math.ceil(1.5 * work.queue_us / self._flush_us)
        self.flush(min(max(passes, 1), 256))
        if not flush_l2:
            work.run(first)
        return self._time(work, first)

    def _time(self, work: _Work, first: int) -> float:
        self._start.record(self._stream)
        work.run(first)
        self._stop.record(self._stream)
        self._stop.synchronize()
        return float(self._elapsed_ms(self._start, self._stop)) * 1e3

    def _replay(self, captured: Any) -> Variant:
        return lambda first: captured.launch(self._stream)

    def _time_queuing(self, run: Variant) -> float:
        self._stream.synchronize()
        start = time.perf_counter_ns()
        run(0)
        elapsed = (time.perf_counter_ns() - start) / 1e3
        self._stream.synchronize()
        return elapsed


Clock = HostClock | DeviceClock


def measure(
    variants: Mapping[str, Variant],
    *,
    repeats: int = 30,
    warmup_s: float = 0.2,
    flush_l2: bool = True,
    graph: bool = False,
    calls: int | None = None,
    inputs_rotate: int = 1,
    budget_s: float | None = None,
    clock: Literal["auto", "host", "device"] = "auto",
    on_sample: Callable[[str | None], object] | None = None,
) -> dict[str, Timing]:
    """Time every variant, taking turns, and return each one's microseconds per call.

    Each variant is warmed up by time. Then, `repeats` times over, each gives one sample in turn, so
    that a drift of the clocks meets all of them alike.

    Parameters
    ----------
    variants : mapping of str to callable
        ``variant(i)`` runs the work on input set ``i``, ``0 <= i < inputs_rotate``. Their answers
        have been checked by the caller.
    repeats : int
        Samples of each variant.
    warmup_s : float
        Seconds of calls before the first sample, for each variant; two calls at least.
    flush_l2 : bool
        Begin every sample with a cold L2. Device clock only.
    graph : bool
        Time replays of one captured CUDA graph of `calls` calls: for work below about 100 us. The
        variant allocates nothing.
    calls : int, optional
        Back-to-back calls in a sample, whose time is divided by them. 1 by default; with `graph`
        10 or `inputs_rotate`, whichever is more. Only the first call of a sample follows the
        flush: to keep all of them cold, rotate over :func:`num_cold_inputs` input sets.
    inputs_rotate : int
        Input sets to cycle through.
    budget_s : float, optional
        Stop early once this many seconds of samples were taken, with three samples each at least.
    clock : {"auto", "host", "device"}
        ``"auto"`` is ``"device"`` where there is a GPU.
    on_sample : callable, optional
        Called with a variant's name before each of its samples, and with None after the last.

    Returns
    -------
    dict of str to Timing
        In the order of `variants`.

    Raises
    ------
    ValueError
        If an argument is out of range, or `graph` is asked of the host clock.

    Examples
    --------
    >>> timings = measure({"sum": lambda i: sum(range(100))}, repeats=5, warmup_s=0, clock="host")
    >>> len(timings["sum"].samples)
    5
    """
    if clock not in ("auto", "host", "device"):
        raise ValueError(f"clock: expected 'auto', 'host' or 'device', got {clock!r}")
    if calls is None:
        calls = max(10, inputs_rotate) if graph else 1
    for name, value in (("repeats", repeats), ("calls", calls), ("inputs_rotate", inputs_rotate)):
        if value < 1:
            raise ValueError(f"{name}: expected >= 1, got {value}")
    on_device = clock == "device" or (clock == "auto" and device_available())
    if graph and not on_device:
        raise ValueError("graph: expected False with the host clock, got True")
    timer: Clock = DeviceClock() if on_device else HostClock()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    with timer:
        prepared: dict[str, _Work] = {}
        for name, variant in variants.items():
            _warm_up(timer, variant, inputs_rotate, warmup_s)
            prepared[name] = timer.prepare(_repeat(variant, calls, inputs_rotate), graph)
        begin = time.perf_counter()
        for repeat in range(repeats):
            first = repeat * calls % inputs_rotate
            for name, work in prepared.items():
                if on_sample is not None:
                    on_sample(name)
                samples[name].append(timer.sample(work, first, flush_l2) / calls)
            late = budget_s is not None and time.perf_counter() - begin > budget_s
            if late and repeat + 1 >= MIN_SAMPLES:
                break
        if on_sample is not None:
            on_sample(None)
    return {name: Timing.of(values) for name, values in samples.items()}


def measure_ranks(
    variants: Mapping[str, Variant],
    group: Group,
    *,
    calls: int,
    repeats: int = 20,
    inputs_rotate: int = 1,
    graph: bool = True,
    on_device: bool = True,
) -> dict[str, Timing]:
    """Time what the ranks of a group run together, and return the microseconds of a call.

    A sample begins with a barrier and `calls` calls that are not timed, in which the ranks come
    into step; then as many are, on every rank by its own clock. The slowest rank's time counts.

    Parameters
    ----------
    variants : mapping of str to callable
        As :func:`measure` wants them; every rank passes the same names and makes the same calls.
    group : Group
        Each rank with its GPU current.
    calls : int
        Back-to-back calls in a sample, with a warm L2.
    repeats : int
        Samples of each variant.
    inputs_rotate : int
        Input sets to cycle through; those of a sample start with the first.
    graph : bool
        Replay one captured CUDA graph of the calls; has no meaning on the host's clock.
    on_device : bool
        GPU events, or the host's clock.

    Returns
    -------
    dict of str to Timing
        The same on every rank.

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    for name, value in (("repeats", repeats), ("calls", calls), ("inputs_rotate", inputs_rotate)):
        if value < 1:
            raise ValueError(f"{name}: expected >= 1, got {value}")
    timer: Clock = DeviceClock() if on_device else HostClock()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    with timer:
        prepared: dict[str, _Work] = {}
        for name, variant in variants.items():
            for i in range(max(2, inputs_rotate)):
                variant(i % inputs_rotate)
            timer.synchronize()
            group.barrier()
            prepared[name] = timer.prepare(
                _repeat(variant, calls, inputs_rotate), graph and on_device
            )
        for _ in range(repeats):
            for name, work in prepared.items():
                timer.synchronize()
                group.barrier()
                samples[name].append(timer.sample(work, 0, flush_l2=False) / calls)
    found = group.allgather(samples)
    return {
        name: Timing.of(max(times) for times in zip(*(own[name] for own in found), strict=True))
        for name in samples
    }


def _warm_up(timer: Clock, variant: Variant, num_inputs: int, seconds: float) -> None:
    """Call `variant` over all inputs until `seconds` have passed, at least twice."""
    begin, i = time.perf_counter(), 0
    while i < 2 or time.perf_counter() - begin < seconds:
        variant(i % num_inputs)
        timer.synchronize()
        i += 1


def num_cold_inputs(bytes_per_call: int) -> int:
    """Return how many input sets a rotation needs to pass three times the L2, 1 without a GPU."""
    if bytes_per_call < 1:
        raise ValueError(f"bytes_per_call: expected >= 1, got {bytes_per_call}")
    if not device_available():
        return 1
    return math.ceil(3 * l2_bytes() / bytes_per_call) + 1


def copy_rate_tbps(num_bytes: int | None = None) -> float:
    """Measure the roof of memory: TB/s of a device-to-device copy, bytes read plus bytes written.

    Measured in the same run as the figures that are held against it. Without a GPU, the rate of a
    NumPy copy.

    Parameters
    ----------
    num_bytes : int, optional
        Bytes copied; 2 GiB by default, 256 MiB on the host.
    """
    on_device = device_available()
    size = num_bytes or (1 << 31 if on_device else 1 << 28)
    if on_device:
        import cupy

        # Random source: some memory paths move zeros faster.
        block = cupy.asarray(np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8))
        device_source, device_target = cupy.cuda.alloc(size), cupy.cuda.alloc(size)
        for offset in range(0, size, block.nbytes):
            part = min(block.nbytes, size - offset)
            (device_source + offset).copy_from_device(block.data, part)

        def copy(i: int) -> None:
            device_target.copy_from_device_async(device_source, size)

    else:
        source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        target = np.empty_like(source)

        def copy(i: int) -> None:
            np.copyto(target, source)

    timing = measure({"copy": copy}, repeats=15, warmup_s=0.1, flush_l2=False)["copy"]
    return 2 * size / timing.us * 1e-6
