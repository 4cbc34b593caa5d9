"""The clock of the multiprocessors while something is timed: a large GEMM may be limited by power.

A thread reads it through NVML every few milliseconds and keeps what it reads under the name of the
work that is running then. Where NVML is absent there is nothing to read and every figure is None.
"""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

Reader = Callable[[], int]
"""Returns the clock now, in MHz."""

INTERVAL_S = 0.003
_NVML_CLOCK_SM = 1  # nvmlClockType_t


class SmClock:
    """Medians of the SM clock by what was running; a context that owns the reading thread.

    Parameters
    ----------
    read : callable, optional
        By default NVML's reading of the current device, where there is one.

    Examples
    --------
    >>> with SmClock(read=lambda: 1980) as clock:
    ...     clock.mark("gemm")
    ...     clock.wait_for_reading()
    ...     clock.mark(None)
    >>> clock.take(), clock.take()
    ({'gemm': 1980}, {})
    """

    def __init__(self, read: Reader | None = None) -> None:
        self._read = read if read is not None else find_reader()
        self._name: str | None = None
        self._readings: defaultdict[str, list[int]] = defaultdict(list)
        self._stop, self._has_read = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SmClock:
        if self._read is not None:
            self._thread = threading.Thread(target=self._loop, args=(self._read,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def mark(self, name: str | None) -> None:
        """Say what runs from now on; None for nothing worth reading."""
        self._name = name

    def take(self) -> dict[str, int]:
        """Return the median of each name in MHz, and forget the readings.

        Work shorter than the interval between readings may have none.
        """
        found = {name: int(statistics.median(r)) for name, r in dict(self._readings).items()}
        self._readings.clear()
        return found

    def wait_for_reading(self) -> None:
        """Wait until the thread has read once more."""
        self._has_read.clear()
        self._has_read.wait(timeout=5)

    def _loop(self, read: Reader) -> None:
        while not self._stop.wait(INTERVAL_S):
            name = self._name
            if name is None:
                continue
            try:
                value = read()
            except Exception:  # NVML went away: the figures so far stand
                return
            if self._name == name:  # else it may be the clock of either
                self._readings[name].append(value)
                self._has_read.set()


def find_reader() -> Reader | None:
    """Return how to read the current device's SM clock, or None where nothing can."""
    try:
        import cupy
        from cuda.bindings import nvml

        nvml.init_v2()
        bus_id = cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.Device().id)
        handle: Any = nvml.device_get_handle_by_pci_bus_id_v2(bus_id)

        def read() -> int:
            return int(nvml.device_get_clock_info(handle, _NVML_CLOCK_SM))

        read()
    except Exception:  # not installed, no driver, no permission, no such function
        return None
    return read
