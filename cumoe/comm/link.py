"""An authenticated connection between two ranks: handshake, then frames that carry a MAC.

Both sides prove that they know the secret by an HMAC-SHA256 over nonces of both, the connecting
side first, before anything of variable length is read. Every later frame carries an HMAC with the
session's key, its direction and its number, so none can be forged, repeated or left out. Nothing is
encrypted.

::

    listener -> peer      magic (8)  nonce (32)
    peer     -> listener  nonce (32)  rank, size (4 + 4)  HMAC (32)
    listener -> peer      HMAC (32)
    either   -> other     length (8)  HMAC (32)  payload            any number of frames
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time

from cumoe.comm.group import GroupError

__all__ = ["Link", "accept", "connect"]

MAGIC = b"cumoe/1\n"
MAX_FRAME_BYTES = 1 << 31
_NONCE = 32
_MAC = hashlib.sha256().digest_size
_HELLO = struct.Struct(f">{_NONCE}sII{_MAC}s")
_HEADER = struct.Struct(f">Q{_MAC}s")


class HandshakeError(GroupError):
    """The other side is no rank of this group."""


class Link:
    """A connection whose other side has proven that it knows the secret.

    Attributes
    ----------
    rank, size : int
        What the connecting side says it is, and how many ranks it expects.
    """

    def __init__(self, sock: socket.socket, key: bytes, rank: int, size: int, *, out: int) -> None:
        self.socket, self.rank, self.size = sock, rank, size
        self._key = key
        self._directions = (out, 1 - out)  # of what is sent, of what is received
        self._numbers = [0, 0]

    def send(self, payload: bytes, deadline: float) -> None:
        """Send one frame.

        Raises
        ------
        OSError
            If the connection is gone or the deadline has passed.
        """
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"obj: expected at most {MAX_FRAME_BYTES} bytes, got {len(payload)}")
        self.socket.settimeout(_left(deadline))
        mac = self._mac(0, payload)
        self.socket.sendall(_HEADER.pack(len(payload), mac) + payload)

    def receive(self, deadline: float) -> bytes:
        """Return the next frame.

        Raises
        ------
        OSError
            If the connection is gone, the deadline has passed, or the frame is forged.
        """
        length, mac = _HEADER.unpack(_read(self.socket, _HEADER.size, deadline))
        if length > MAX_FRAME_BYTES:
            raise ConnectionError(f"a frame of {length} bytes")
        payload = _read(self.socket, length, deadline)
        if not hmac.compare_digest(mac, self._mac(1, payload)):
            raise ConnectionError("a frame that this group's secret did not sign")
        return payload

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def _mac(self, incoming: int, payload: bytes) -> bytes:
        head = struct.pack(
            ">BQQ", self._directions[incoming], self._numbers[incoming], len(payload)
        )
        self._numbers[incoming] += 1
        mac = hmac.new(self._key, head, hashlib.sha256)
        mac.update(payload)
        return mac.digest()


def accept(sock: socket.socket, secret: bytes, deadline: float) -> Link:
    """Shake hands with whoever has connected.

    Raises
    ------
    HandshakeError, OSError
        If it does not know the secret, or goes away; the socket is then closed.
    """
    try:
        challenge = secrets.token_bytes(_NONCE)
        sock.settimeout(_left(deadline))
        sock.sendall(MAGIC + challenge)
        nonce, rank, size, mac = _HELLO.unpack(_read(sock, _HELLO.size, deadline))
        told = struct.pack(f">{_NONCE}s{_NONCE}sII", challenge, nonce, rank, size)
        if not hmac.compare_digest(mac, _sign(secret, b"connects", told)):
            raise HandshakeError("its secret is another one")
        sock.sendall(_sign(secret, b"listens", told))
    except BaseException:
        sock.close()
        raise
    return Link(sock, _sign(secret, b"session", told), rank, size, out=0)


def connect(sock: socket.socket, secret: bytes, rank: int, size: int, deadline: float) -> Link:
    """Shake hands with the listener.

    Raises
    ------
    HandshakeError, OSError
        If it does not know the secret, or goes away; the socket is then closed.
    """
    try:
        greeting = _read(sock, len(MAGIC) + _NONCE, deadline)
        if not greeting.startswith(MAGIC):
            raise HandshakeError("what listens there is no rank 0 of this version of cumoe")
        nonce = secrets.token_bytes(_NONCE)
        told = struct.pack(f">{_NONCE}s{_NONCE}sII", greeting[len(MAGIC) :], nonce, rank, size)
        sock.settimeout(_left(deadline))
        sock.sendall(_HELLO.pack(nonce, rank, size, _sign(secret, b"connects", told)))
        try:
            mac = _read(sock, _MAC, deadline)
        except ConnectionError:
            raise HandshakeError("it refuses this rank: is the secret the same?") from None
        if not hmac.compare_digest(mac, _sign(secret, b"listens", told)):
            raise HandshakeError("it does not know the secret")
    except BaseException:
        sock.close()
        raise
    return Link(sock, _sign(secret, b"session", told), rank, size, out=1)


def _sign(secret: bytes, role: bytes, told: bytes) -> bytes:
    return hmac.new(secret, b"cumoe " + role + b"\n" + told, hashlib.sha256).digest()


def _read(sock: socket.socket, count: int, deadline: float) -> bytes:
    """Return exactly `count` bytes."""
    # NOTE: the buffer grows with what has arrived; a length alone must not allocate anything.
    data = bytearray()
    while len(data) < count:
        sock.settimeout(_left(deadline))
        part = sock.recv(min(count - len(data), 1 << 20))
        if not part:
            raise ConnectionError("the connection was closed")
        data += part
    return bytes(data)


def _left(deadline: float) -> float:
    """Return the seconds to the deadline; raises TimeoutError past it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
