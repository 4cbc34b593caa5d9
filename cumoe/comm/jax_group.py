"""A group over the key-value store of ``jax.distributed``, for programs that run under it already.

Nothing runs on the devices: objects travel as text through the coordination service that
``jax.distributed.initialize`` started, with its protection and no other.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from cumoe.comm.group import DEFAULT_TIMEOUT_S, ExchangeGroup, GroupError, check_same_call
from cumoe.comm.wire import dumps, loads

__all__ = ["JaxGroup"]

_NUMBERS = itertools.count()


class JaxGroup(ExchangeGroup):
    """The processes of ``jax.distributed`` as a group.

    Parameters
    ----------
    client : object, optional
        With ``key_value_set(key, text)``, ``blocking_key_value_get(key, timeout_in_ms)`` and
        ``key_value_delete(key)``. By default the one that ``jax.distributed.initialize`` made.
    rank, size : int, optional
        Required with `client`; by default those of JAX.
    name : str, optional
        What the group's keys begin with. By default groups are numbered as they are made, so every
        rank makes its groups in the same order.
    timeout_s : float

    Raises
    ------
    GroupError
        If ``jax.distributed.initialize`` was not called.
    """

    def __init__(
        self,
        client: Any = None,
        rank: int | None = None,
        size: int | None = None,
        *,
        name: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        if client is None:
            client, rank, size = _jax_client()
        if rank is None or size is None or not 0 <= rank < size:
            raise ValueError(f"rank: expected 0 <= rank < size, got {rank} of {size}")
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._client = client
        self._prefix = f"cumoe/{name or next(_NUMBERS)}"
        self._count = 0
        self._failure: str | None = None

    def exchange(self, call: str, obj: Any, timeout_s: float | None = None) -> list[Any]:
        """Return every rank's `obj`; see :class:`ExchangeGroup`."""
        if self._failure is not None:
            raise GroupError(self._failure)
        text = dumps((call, obj))
        number, self._count = self._count, self._count + 1
        try:
            return self._exchange(number, call, text, timeout_s or self.timeout_s)
        except GroupError as error:
            self._failure = str(error)
            raise

    def _exchange(self, number: int, call: str, text: str, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        self._client.key_value_set(self._key(number, self.rank), text)
        found = []
        for rank in range(self.size):
            left_ms = max(1, int((deadline - time.monotonic()) * 1e3))
            try:
                answer = self._client.blocking_key_value_get(self._key(number, rank), left_ms)
            except Exception as error:  # JAX has its own type for a deadline, and others
                raise GroupError(
                    f"rank {rank} did not come to {call}, call number {number + 1}, within "
                    f"{timeout_s:g} s: {error}"
                ) from error
            found.append(loads(answer))
        check_same_call([call for call, _ in found])
        # Whoever is here has every rank's key of this call, so nobody reads the one before.
        if number:
            self._client.key_value_delete(self._key(number - 1, self.rank))
        return [value for _, value in found]

    def _key(self, number: int, rank: int) -> str:
        return f"{self._prefix}/{number}/{rank}"


def _jax_client() -> tuple[Any, int, int]:
    """Return client, rank and size of ``jax.distributed``."""
    # Only a program that has initialised JAX has a client, so JAX is never loaded for asking.
    module = sys.modules.get("jax._src.distributed")
    state = getattr(module, "global_state", None)
    if state is None or state.client is None:
        raise GroupError("jax.distributed has no client; call jax.distributed.initialize() first")
    return state.client, int(state.process_id), int(state.num_processes)
