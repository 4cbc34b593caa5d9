"""One process that drives several GPUs: every rank is a thread.

:func:`run_ranks` starts them and gives each its device and a :class:`ThreadGroup`, whose calls hand
objects over by reference. A rank that fails ends the others' calls with an error that names it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cumoe.comm.group import DEFAULT_TIMEOUT_S, ExchangeGroup, GroupError, check_same_call
from cumoe.launch import is_available
from cumoe.launch.errors import require

__all__ = ["ThreadGroup", "run_ranks"]

_JOIN_S = 10.0
"""How long a rank may take to notice that another has failed."""


class _Meeting:
    """Where the ranks of one process meet: one slot for each, filled once per call."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._slots: dict[int, tuple[str, Any]] = {}
        self._ended: set[int] = set()
        self._results: list[Any] = []
        self._number = 0
        self._failure: str | None = None

    def exchange(self, rank: int, call: str, obj: Any, timeout_s: float) -> list[Any]:
        with self._changed:
            self._raise_failure()
            if rank in self._slots:
                raise GroupError(f"rank {rank} is in {self._slots[rank][0]} in another thread")
            self._slots[rank] = (call, obj)
            number = self._number
            if len(self._slots) == self.size:
                self._complete()
            else:
                self._check_ended()
                done = self._changed.wait_for(
                    lambda: self._number != number or self._failure is not None, timeout_s
                )
                if not done:
                    missing = sorted(set(range(self.size)) - set(self._slots))
                    self._fail(f"{_ranks(missing)} did not come to {call} within {timeout_s:g} s")
            if self._number == number:
                self._raise_failure()
            return list(self._results)

    def _complete(self) -> None:
        """Publish what the ranks brought, or fail if they are in different calls."""
        calls = [self._slots[rank][0] for rank in range(self.size)]
        try:
            check_same_call(calls)
        except GroupError as error:
            self._fail(str(error))
            return
        # NOTE: nobody fills a slot of the next call before it has returned from this one, and the
        # results of this call are replaced only when all have.
        self._results = [self._slots[rank][1] for rank in range(self.size)]
        self._slots = {}
        self._number += 1
        self._changed.notify_all()

    def fail(self, message: str) -> None:
        """End every call, now and later, with an error."""
        with self._changed:
            self._fail(message)

    def end(self, rank: int) -> None:
        """Note that a rank makes no more calls."""
        with self._changed:
            self._ended.add(rank)
            self._check_ended()

    def _check_ended(self) -> None:
        if self._slots and self._ended:
            waiting, (call, _) = next(iter(self._slots.items()))
            ended = _ranks(sorted(self._ended))
            self._fail(f"rank {waiting} is in {call}, and {ended} ended without it")

    def _fail(self, message: str) -> None:
        if self._failure is None:
            self._failure = message
        self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise GroupError(self._failure)


class ThreadGroup(ExchangeGroup):
    """A rank of a group whose ranks are threads of this process.

    Made by :func:`run_ranks`, or by :meth:`make` for threads of your own. Objects are handed over
    by reference: what one rank gathers is what another passed, not a copy.
    """

    def __init__(self, meeting: _Meeting, rank: int, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, meeting.size, timeout_s
        self._meeting = meeting

    @classmethod
    def make(cls, size: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[ThreadGroup]:
        """Return the `size` ranks of a new group, one for each thread."""
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        meeting = _Meeting(size)
        return [cls(meeting, rank, timeout_s) for rank in range(size)]

    def exchange(self, call: str, obj: Any, timeout_s: float | None = None) -> list[Any]:
        """Return every rank's `obj`; see :class:`ExchangeGroup`."""
        return self._meeting.exchange(self.rank, call, obj, timeout_s or self.timeout_s)

    def fail(self, message: str) -> None:
        """End the calls of all ranks, now and later, with a GroupError."""
        self._meeting.fail(message)

    def end(self) -> None:
        """Say that this rank makes no more calls; a rank that waits for one gets an error."""
        self._meeting.end(self.rank)


def run_ranks(
    size: int,
    function: Callable[[ThreadGroup], Any],
    *,
    devices: Sequence[int] | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[Any]:
    """Call `function` in `size` threads, each a rank with its device current.

    Parameters
    ----------
    size : int
    function : callable
        Takes the rank's group.
    devices : sequence of int, optional
        Device of each rank. By default 0 to ``size - 1`` where there are GPUs; without any, or with
        an empty sequence, no device is chosen.
    timeout_s : float
        Of the group's calls.

    Returns
    -------
    list
        What the ranks returned.

    Raises
    ------
    ValueError
        If there are fewer GPUs than ranks, or not one device for each.
    Exception
        What a rank raised; of several, the first that did not merely hear of another's failure.

    Examples
    --------
    >>> run_ranks(3, lambda group: group.allgather(group.rank**2), devices=())
    [[0, 1, 4], [0, 1, 4], [0, 1, 4]]
    """
    chosen = _choose_devices(size, devices)
    groups = ThreadGroup.make(size, timeout_s=timeout_s)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def body(group: ThreadGroup) -> None:
        try:
            with _device(chosen[group.rank] if chosen else None):
                results[group.rank] = function(group)
        except BaseException as error:  # SystemExit too must reach the caller and the other ranks
            errors.append((group.rank, error))
            group.fail(f"rank {group.rank} failed: {type(error).__name__}: {error}")
        finally:
            group.end()

    threads = [
        threading.Thread(target=body, args=(group,), name=f"cumoe rank {group.rank}", daemon=True)
        for group in groups
    ]
    for thread in threads:
        thread.start()
    try:
        _join(threads, errors)
    except BaseException as error:
        groups[0].fail(f"interrupted by {type(error).__name__}")
        raise
    if errors:
        own = [e for e in errors if not isinstance(e[1], GroupError)] or errors
        raise own[0][1]
    return results


def _join(threads: list[threading.Thread], errors: list[tuple[int, BaseException]]) -> None:
    """Wait for all threads; after the first error only for a while, as a kernel may never end."""
    deadline = None
    while any(thread.is_alive() for thread in threads):
        if errors and deadline is None:
            deadline = time.monotonic() + _JOIN_S
        if deadline is not None and time.monotonic() > deadline:
            return
        next(thread for thread in threads if thread.is_alive()).join(0.05)


def _choose_devices(size: int, devices: Sequence[int] | None) -> list[int]:
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    if devices is None:
        if not is_available():
            return []
        count = int(require("cupy").cuda.runtime.getDeviceCount())
        if count < size:
            raise ValueError(
                f"size: expected at most one rank for each of {count} GPUs, got {size}; with "
                "devices= several can share one, but not a workspace"
            )
        return list(range(size))
    if devices and len(devices) != size:
        raise ValueError(f"devices: expected {size}, one for each rank, got {list(devices)}")
    return list(devices)


def _device(ordinal: int | None) -> contextlib.AbstractContextManager[Any]:
    if ordinal is None:
        return contextlib.nullcontext()
    device: contextlib.AbstractContextManager[Any] = require("cupy").cuda.Device(ordinal)
    return device


def _ranks(ranks: list[int]) -> str:
    """Write ``rank 1`` or ``ranks 1, 3``."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
