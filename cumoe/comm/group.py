"""What a process group is, and helpers over any: comparing calls, values and waiting.

A group is the little that setting up needs: who I am, how many we are, and exchanging small host
objects. An mpi4py communicator is one as it is. The groups of this package derive from
:class:`ExchangeGroup` and always compare the calls of the ranks and time out;
:class:`CheckedGroup` gives others the same.
"""

from __future__ import annotations

import abc
import time
from typing import Any, Protocol

__all__ = ["CheckedGroup", "ExchangeGroup", "Group", "GroupError", "SingleGroup"]

DEFAULT_TIMEOUT_S = 300.0
"""Ranks may be minutes apart while one of them compiles kernels."""

_POLL_S = 0.001


class GroupError(RuntimeError):
    """The ranks of a group could not meet: one is missing, has failed, or made another call."""


class Group(Protocol):
    """A fixed set of ranks that exchange small host objects.

    Every call is collective: each rank makes the same calls in the same order. An mpi4py
    communicator, such as ``MPI.COMM_WORLD``, has exactly these members.
    """

    @property
    def rank(self) -> int:
        """Return the rank of the caller, 0 to ``size - 1``."""

    @property
    def size(self) -> int:
        """Return how many ranks there are."""

    def allgather(self, obj: Any, /) -> list[Any]:
        """Return the objects of all ranks, in the order of the ranks."""

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """Return the object of rank `root`; what the others pass is ignored."""

    def barrier(self) -> None:
        """Return when all ranks have called it."""


class ExchangeGroup(abc.ABC):
    """A group built on one operation, an exchange of named calls.

    Attributes
    ----------
    rank, size : int
    timeout_s : float
        Seconds that a call waits for the other ranks.
    """

    rank: int
    size: int
    timeout_s: float

    @abc.abstractmethod
    def exchange(self, call: str, obj: Any, timeout_s: float | None = None) -> list[Any]:
        """Return every rank's `obj`.

        Parameters
        ----------
        call : str
            What this rank is doing; must be the same on all ranks.
        obj : object
        timeout_s : float, optional
            By default that of the group.

        Raises
        ------
        GroupError
            On every rank, if calls differ (the message names both), a rank fails, or one does not
            come in time. The group cannot be used any more.
        """

    def allgather(self, obj: Any, /) -> list[Any]:
        """Return the objects of all ranks, in the order of the ranks."""
        return self.exchange("allgather()", obj)

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """Return the object of rank `root`."""
        _check_root(root, self.size)
        return self.exchange(f"bcast(root={root})", obj if self.rank == root else None)[root]

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self.exchange("barrier()", None)


class SingleGroup(ExchangeGroup):
    """The group of one rank."""

    def __init__(self) -> None:
        self.rank, self.size, self.timeout_s = 0, 1, DEFAULT_TIMEOUT_S

    def exchange(self, call: str, obj: Any, timeout_s: float | None = None) -> list[Any]:
        """Return ``[obj]``."""
        return [obj]


class CheckedGroup(ExchangeGroup):
    """Compares the calls that ranks make on any group, for debugging.

    Every call becomes one ``allgather`` that carries its name, number and arguments, so ranks that
    have come apart get an error that names both calls instead of a wrong result or a hang.

    Parameters
    ----------
    group : Group
        Every rank wraps it, and makes all its calls through the wrapper.
    timeout_s : float
        Of waiting for the other ranks. Applies to the groups of this package and to mpi4py
        communicators (by ``Ibarrier``); others wait as long as they do.

    Raises
    ------
    TypeError, ValueError
        If `group` is no group.
    """

    def __init__(self, group: Group, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        check_group(group)
        self.group = group
        self.rank, self.size, self.timeout_s = int(group.rank), int(group.size), timeout_s
        self._count = 0

    def exchange(self, call: str, obj: Any, timeout_s: float | None = None) -> list[Any]:
        """Return every rank's `obj` after comparing `call`."""
        self._count += 1
        label = f"{call}, its call number {self._count}"
        found = allgather_within(self.group, (label, obj), timeout_s or self.timeout_s)
        for rank, entry in enumerate(found):
            if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
                raise GroupError(f"rank {self.rank} is in {label}; rank {rank} has no CheckedGroup")
        check_same_call([label for label, _ in found])
        return [value for _, value in found]


def check_group(group: Any) -> None:
    """Raise unless `group` has the members of :class:`Group` and a valid rank."""
    for name in ("rank", "size", "allgather", "bcast", "barrier"):
        if not hasattr(group, name):
            raise TypeError(
                f"group: expected rank, size, allgather, bcast and barrier, as an mpi4py "
                f"communicator has them; {type(group).__name__} has no {name}"
            )
    if not 0 <= int(group.rank) < int(group.size):
        raise ValueError(f"group: expected 0 <= rank < size, got {group.rank} of {group.size}")


def check_same_call(calls: list[str]) -> None:
    """Raise GroupError naming the first two ranks whose calls differ."""
    for rank, call in enumerate(calls):
        if call != calls[0]:
            raise GroupError(
                f"the ranks make different calls: rank 0 is in {calls[0]}, rank {rank} in {call}"
            )


def check_same(group: Group, name: str, value: Any) -> None:
    """Raise on every rank unless all pass an equal `value`; collective.

    Parameters
    ----------
    group : Group
    name : str
        What is compared, for the message.
    value : object
        Plain data: numbers, strings, tuples, dicts.

    Raises
    ------
    ValueError
        Naming two ranks and their values.
    """
    compare(name, group.allgather(value))


def compare(name: str, values: list[Any]) -> None:
    """Raise ValueError naming the first two ranks whose values differ."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ValueError(
                f"{name}: expected the same on every rank, got {values[0]!r} on rank 0 and "
                f"{value!r} on rank {rank}"
            )


def allgather_within(group: Group, obj: Any, timeout_s: float) -> list[Any]:
    """Gather, raising GroupError where a rank does not come in time and the group can tell.

    An MPI communicator has no time-out. There the ranks first meet in an ``Ibarrier``, which can be
    polled; once they all have, the gather does not wait.
    """
    if isinstance(group, ExchangeGroup):
        return group.exchange("allgather()", obj, timeout_s)
    start_barrier = getattr(group, "Ibarrier", None)
    if start_barrier is not None:
        request, deadline = start_barrier(), time.monotonic() + timeout_s
        while not request.Test():
            if time.monotonic() > deadline:
                raise GroupError(
                    f"rank {group.rank} waited {timeout_s:g} s and some of the other "
                    f"{group.size - 1} ranks did not come; one has died, or makes other calls"
                )
            time.sleep(_POLL_S)
    return group.allgather(obj)


def _check_root(root: int, size: int) -> None:
    if not 0 <= root < size:
        raise ValueError(f"root: expected 0 <= root < {size}, got {root}")
