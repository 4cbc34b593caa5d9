"""A group over TCP, found by ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``.

Rank 0 listens until every other rank has come, then all exchange small plain data through it. Every
rank proves that it knows a shared secret (``link.py``); whoever does not is turned away. No pickle:
``wire.py`` says what can be sent.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import queue
import selectors
import socket
import threading
import time
from typing import Any

from cumoe.comm import link as links
from cumoe.comm.group import DEFAULT_TIMEOUT_S, ExchangeGroup, GroupError, check_same_call
from cumoe.comm.link import HandshakeError, Link
from cumoe.comm.wire import dumps, loads

__all__ = ["TcpGroup", "connect_tcp"]

MIN_SECRET_BYTES = 16
MAX_TCP_RANKS = 1024
_HANDSHAKE_S = 10.0
_MAX_STRANGERS = 32
"""Handshakes under way at once beyond those of the ranks that are missing."""
_POLL_S = 0.05


class TcpGroup(ExchangeGroup):
    """A group whose ranks talk through rank 0; made by :func:`connect_tcp`.

    Objects are plain data: None, bool, int, float, str, bytes, and lists, tuples and dicts of
    these. Calls are compared, and a rank that goes away ends the others' calls with an error. Not
    for several threads at once. A context manager that closes the connections.
    """

    def __init__(self, rank: int, size: int, peers: dict[int, Link], timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._peers = peers  # on rank 0 every other rank, elsewhere rank 0
        self._failure: str | None = None

    def exchange(self, call: str, obj: Any, timeout_s: float | None = None) -> list[Any]:
        """Return every rank's `obj`; see :class:`ExchangeGroup`.

        Raises
        ------
        TypeError
            If `obj` is no plain data.
        """
        if self._failure is not None:
            raise GroupError(self._failure)
        text = dumps((call, obj))
        timeout_s = timeout_s or self.timeout_s
        try:
            if self.rank == 0:
                return self._lead(call, text, timeout_s)
            return self._follow(call, text, timeout_s)
        except BaseException as error:
            self._fail(str(error) or type(error).__name__)
            raise

    def _lead(self, call: str, text: str, timeout_s: float) -> list[Any]:
        """Collect what every rank sends and answer with all of it, or with what is wrong."""
        try:
            texts = {0: text} | self._collect(call, timeout_s)
            found = [loads(texts[rank]) for rank in range(self.size)]
            check_same_call([call for call, _ in found])
            answer = "+" + dumps([value for _, value in found])
        except GroupError as error:
            self._send_all("-" + str(error))
            raise
        self._send_all(answer)
        result: list[Any] = loads(answer[1:])
        return result

    def _collect(self, call: str, timeout_s: float) -> dict[int, bytes]:
        """Receive one frame of every other rank, in the order in which they come."""
        deadline = time.monotonic() + timeout_s
        texts: dict[int, bytes] = {}
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer.socket, selectors.EVENT_READ, rank)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = sorted(set(self._peers) - set(texts))
                    raise GroupError(_late(missing, call, timeout_s))
                for key, _ in ready:
                    rank = key.data
                    try:
                        texts[rank] = self._peers[rank].receive(deadline)
                    except OSError as error:
                        raise GroupError(f"rank {rank} is gone, in {call}: {error}") from error
                    selector.unregister(key.fileobj)
        return texts

    def _send_all(self, answer: str) -> None:
        """Send to every other rank; one that is gone shows in the next call."""
        deadline = time.monotonic() + self.timeout_s
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.send(answer.encode(), deadline)

    def _follow(self, call: str, text: str, timeout_s: float) -> list[Any]:
        # Rank 0 says who is missing; it is given a little longer than it gives the others.
        deadline = time.monotonic() + timeout_s * 1.1 + 1.0
        try:
            with contextlib.suppress(ConnectionError):  # rank 0 has left word why it went
                self._peers[0].send(text.encode(), deadline)
            answer = self._peers[0].receive(deadline).decode()
        except TimeoutError:
            raise GroupError(_late([0], call, timeout_s)) from None
        except OSError as error:
            raise GroupError(f"rank 0 is gone, in {call}: {error}") from error
        if answer[:1] != "+":
            raise GroupError(answer[1:])
        result: list[Any] = loads(answer[1:])
        return result

    def _fail(self, message: str) -> None:
        if self._failure is None:
            self._failure = message
        for peer in self._peers.values():
            peer.close()

    def close(self) -> None:
        """Close the connections; not collective. A rank that still calls gets an error."""
        self._fail("the group is closed")

    def __enter__(self) -> TcpGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def connect_tcp(
    rank: int | None = None,
    size: int | None = None,
    address: str | None = None,
    port: int | None = None,
    *,
    secret: str | bytes | None = None,
    timeout_s: float = 60.0,
    call_timeout_s: float = DEFAULT_TIMEOUT_S,
    listen_on: str | None = None,
) -> TcpGroup:
    """Meet the other ranks at rank 0; returns when all have come.

    Parameters
    ----------
    rank, size : int, optional
        By default ``RANK`` and ``WORLD_SIZE`` of the environment.
    address : str, optional
        Where rank 0 listens; by default ``MASTER_ADDR``, else ``127.0.0.1``.
    port : int, optional
        By default ``MASTER_PORT``.
    secret : str or bytes, optional
        Known to all ranks and nobody else, at least 16 bytes, random; by default ``CUMOE_SECRET``.
    timeout_s : float
        Of the whole meeting.
    call_timeout_s : float
        Of each later call.
    listen_on : str, optional
        What rank 0 binds where `address` is no address of its machine. ``"0.0.0.0"`` listens on
        all interfaces, which never happens unless it is asked for.

    Returns
    -------
    TcpGroup

    Raises
    ------
    ValueError
        If something is not given, or `address` stands for all interfaces.
    GroupError
        If not every rank comes in time (the message names the missing and counts strangers), ranks
        disagree about the size, a rank comes twice, or the secret differs.

    Notes
    -----
    Ranks prove their knowledge of the secret to each other and sign every message. Nothing is
    encrypted: what ranks send can be read on the network, the secret cannot.
    """
    rank = _given("rank", rank, "RANK")
    size = _given("size", size, "WORLD_SIZE")
    if not 1 <= size <= MAX_TCP_RANKS:
        raise ValueError(f"size (WORLD_SIZE): expected 1 to {MAX_TCP_RANKS}, got {size}")
    if not 0 <= rank < size:
        raise ValueError(f"rank (RANK): expected 0 to {size - 1}, got {rank}")
    if size == 1:
        return TcpGroup(0, 1, {}, call_timeout_s)
    port = _given("port", port, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise ValueError(f"port (MASTER_PORT): expected 1 to 65535, got {port}")
    address = address if address is not None else os.environ.get("MASTER_ADDR", "127.0.0.1")
    _check_address(address)
    key = _secret(secret)
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        with _listen(listen_on or address, port, on_all=listen_on is not None) as listener:
            peers = _gather(listener, size, key, deadline, timeout_s)
        for peer in peers.values():
            with contextlib.suppress(OSError):
                peer.send(b"+", deadline)
        return TcpGroup(rank, size, peers, call_timeout_s)
    link = _reach(address, port, key, rank, size, deadline, timeout_s)
    try:
        verdict = link.receive(deadline + 1.0).decode()
    except OSError as error:
        link.close()
        raise GroupError(f"rank 0 came, and went before all others had come: {error}") from error
    if verdict != "+":
        link.close()
        raise GroupError(verdict[1:])
    return TcpGroup(rank, size, {0: link}, call_timeout_s)


def _given(name: str, value: int | None, variable: str) -> int:
    """Return an integer given as an argument or in the environment."""
    if value is not None:
        return int(value)
    text = os.environ.get(variable)
    if text is None:
        raise ValueError(f"{name}: expected an integer, or {variable} in the environment; got none")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{variable}: expected an integer, got {text!r}") from None


def _secret(secret: str | bytes | None) -> bytes:
    if secret is None:
        secret = os.environ.get("CUMOE_SECRET")
    if secret is None:
        raise ValueError(
            "secret: expected one, or CUMOE_SECRET in the environment, the same on every rank; "
            "`python -c 'import secrets; print(secrets.token_hex())'` makes one"
        )
    key = secret.encode() if isinstance(secret, str) else bytes(secret)
    if len(key) < MIN_SECRET_BYTES:
        raise ValueError(f"secret: expected at least {MIN_SECRET_BYTES} bytes, got {len(key)}")
    return key


def _check_address(address: str) -> None:
    """Raise if the address stands for every interface."""
    if not address or address == "*" or _is_unspecified(address):
        raise ValueError(
            f"address (MASTER_ADDR): expected an address of rank 0's machine, got {address!r}, "
            "which stands for all; listen_on='0.0.0.0' makes rank 0 listen on all"
        )


def _is_unspecified(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False  # a name


def _listen(address: str, port: int, *, on_all: bool) -> socket.socket:
    """Bind the one address and no other."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        family, place = found[0][0], found[0][4]
        if not on_all:
            _check_address(str(place[0]))  # "0" and names that resolve to 0.0.0.0 too
        return socket.create_server(place[:2], family=family, backlog=128)
    except OSError as error:
        raise GroupError(
            f"rank 0 cannot listen on {address} port {port}: {error} (listen_on= takes another "
            "address of this machine)"
        ) from error


def _gather(
    listener: socket.socket, size: int, secret: bytes, deadline: float, timeout_s: float
) -> dict[int, Link]:
    """Accept until every rank has come; whoever does not know the secret is turned away."""
    peers: dict[int, Link] = {}
    strangers: list[str] = []
    arrived: queue.Queue[Link | str] = queue.Queue()
    pending = 0

    def shake(sock: socket.socket, source: str) -> None:
        # A thread for each, as a stranger that says nothing must not keep the ranks waiting.
        try:
            limit = min(deadline, time.monotonic() + _HANDSHAKE_S)
            arrived.put(links.accept(sock, secret, limit))
        except (OSError, GroupError) as error:
            arrived.put(f"{source}: {error}")

    try:
        while len(peers) < size - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = sorted(set(range(1, size)) - set(peers))
                raise GroupError(_late(missing, "the rendezvous", timeout_s) + _turned(strangers))
            listener.settimeout(min(left, _POLL_S))
            with contextlib.suppress(TimeoutError):
                sock, source = listener.accept()
                if pending >= size + _MAX_STRANGERS:
                    sock.close()
                    strangers.append(f"{source[0]}: too many at once")
                else:
                    pending += 1
                    thread = threading.Thread(target=shake, args=(sock, source[0]), daemon=True)
                    thread.start()
            while not arrived.empty():
                pending -= 1
                link = arrived.get()
                if isinstance(link, str):
                    strangers.append(link)
                else:
                    _admit(link, peers, size)
    except BaseException as error:
        _dismiss(peers, str(error))
        raise
    return peers


def _admit(link: Link, peers: dict[int, Link], size: int) -> None:
    """Add a rank, or raise where it does not belong; it then hears why with the others."""
    wrong = None
    if link.size != size:
        wrong = f"WORLD_SIZE: rank 0 has {size}, rank {link.rank} has {link.size}"
    elif not 0 < link.rank < size:
        wrong = f"RANK: a second rank {link.rank} came, of {size}"
    elif link.rank in peers:
        wrong = f"RANK: two processes are rank {link.rank}"
    if wrong is not None:
        _dismiss({0: link}, wrong)
        raise GroupError(wrong)
    with contextlib.suppress(OSError):
        link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        link.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peers[link.rank] = link


def _dismiss(peers: dict[int, Link], reason: str) -> None:
    """Tell ranks that there will be no group, and why."""
    for peer in peers.values():
        with contextlib.suppress(OSError):
            peer.send(f"-{reason}".encode(), time.monotonic() + 1.0)
        peer.close()


def _reach(
    address: str,
    port: int,
    secret: bytes,
    rank: int,
    size: int,
    deadline: float,
    timeout_s: float,
) -> Link:
    """Connect to rank 0, which may not listen yet."""
    pause = 0.01
    reason: object = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            sock = socket.create_connection((address, port), timeout=left)
        except OSError as error:
            reason = error
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.5)
            continue
        if sock.getsockname() == sock.getpeername():
            # NOTE: with nobody listening, Linux may connect a port of its own range to itself.
            sock.close()
            continue
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            return links.connect(sock, secret, rank, size, deadline)
        except HandshakeError as error:
            raise GroupError(f"rank {rank} reached {address} port {port}: {error}") from None
        except OSError as error:
            reason = error
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
    raise GroupError(
        f"rank {rank} did not reach rank 0 at {address} port {port} within {timeout_s:g} s: "
        f"{reason}"
    )


def _late(missing: list[int], call: str, timeout_s: float) -> str:
    names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    return f"{names} did not come to {call} within {timeout_s:g} s"


def _turned(strangers: list[str]) -> str:
    """Describe who was turned away, in brief."""
    if not strangers:
        return ""
    count = len(strangers)
    return f"; {count} connection{'s' * (count > 1)} turned away, the last from {strangers[-1]}"
