"""Authenticated connections: what a stranger, a replay or a changed bit gets."""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
import time

import pytest
from comm_fakes import in_threads, read

from cumoe.comm import GroupError, link
from cumoe.comm.link import Link

SECRET = "0123456789abcdef0123456789abcdef"


def handshake(secret_of_listener=SECRET, secret_of_peer=SECRET):
    """A connected pair of links."""
    left, right = socket.socketpair()
    deadline = time.monotonic() + 5
    return in_threads(
        lambda: link.accept(left, secret_of_listener.encode(), deadline),
        lambda: link.connect(right, secret_of_peer.encode(), 1, 2, deadline),
    )


class TestLink:
    def soon(self):
        return time.monotonic() + 2

    def test_frames(self):
        listener, peer = handshake()
        assert (listener.rank, listener.size) == (1, 2)
        for payload in (b"", b"a", b"b" * 100000):
            listener.send(payload, self.soon())
            assert peer.receive(self.soon()) == payload
            peer.send(payload + b"!", self.soon())
            assert listener.receive(self.soon()) == payload + b"!"

    @pytest.mark.parametrize("secrets", [(SECRET, SECRET[::-1]), (SECRET[::-1], SECRET)])
    def test_secrets_differ(self, secrets):
        found = handshake(*secrets)
        assert all(isinstance(error, GroupError) for error in found)

    def test_session_keys_differ(self):
        assert handshake()[0]._key != handshake()[0]._key

    @pytest.mark.parametrize("where", [0, 7, 8, 39, 40, -1])
    def test_a_changed_bit(self, where):
        """Of the length, the MAC or the payload."""
        listener, peer = handshake()
        frame = self.frame_of(listener, b"payload")
        frame[where] ^= 1
        listener.socket.sendall(frame)
        listener.socket.close()
        with pytest.raises(OSError):
            peer.receive(self.soon())

    def test_a_frame_again(self):
        listener, peer = handshake()
        frame = self.frame_of(listener, b"payload")
        listener.socket.sendall(frame + frame)
        assert peer.receive(self.soon()) == b"payload"
        with pytest.raises(ConnectionError, match="did not sign"):
            peer.receive(self.soon())

    def test_a_frame_left_out(self):
        listener, peer = handshake()
        self.frame_of(listener, b"one")
        listener.socket.sendall(self.frame_of(listener, b"two"))
        with pytest.raises(ConnectionError, match="did not sign"):
            peer.receive(self.soon())

    def test_a_frame_sent_back(self):
        """What a rank has signed cannot be turned round as if its peer had."""
        listener, peer = handshake()
        peer.socket.sendall(self.frame_of(listener, b"payload"))
        with pytest.raises(ConnectionError, match="did not sign"):
            listener.receive(self.soon())

    def test_a_mac_of_the_handshake_sent_back(self):
        """The peer's proof is no proof of the listener."""
        left, right = socket.socketpair()

        def mirror():
            left.sendall(link.MAGIC + bytes(32))
            hello = read(left, link._HELLO.size)
            left.sendall(hello[-32:])

        found = in_threads(
            mirror, lambda: link.connect(right, SECRET.encode(), 1, 2, time.monotonic() + 5)
        )
        assert isinstance(found[1], GroupError) and "does not know" in str(found[1])

    def test_a_proof_used_again(self):
        """A recorded handshake does not open a second one: the listener's nonce is another."""
        key = SECRET.encode()

        def record(sock):
            challenge = read(sock, len(link.MAGIC) + 32)[-32:]
            told = struct.pack(">32s32sII", challenge, bytes(32), 1, 2)
            mac = hmac.new(key, b"cumoe connects\n" + told, hashlib.sha256).digest()
            hello = link._HELLO.pack(bytes(32), 1, 2, mac)
            sock.sendall(hello)
            return hello

        left, right = socket.socketpair()
        accepted, hello = in_threads(
            lambda: link.accept(left, key, time.monotonic() + 5), lambda: record(right)
        )
        assert isinstance(accepted, Link)
        left, right = socket.socketpair()
        right.sendall(hello)
        with pytest.raises(GroupError, match="secret"):
            link.accept(left, key, time.monotonic() + 5)

    def test_rank_and_size_are_signed(self):
        left, right = socket.socketpair()
        key = SECRET.encode()

        def change_rank():
            challenge = read(right, len(link.MAGIC) + 32)[-32:]
            told = struct.pack(">32s32sII", challenge, bytes(32), 1, 2)
            mac = hmac.new(key, b"cumoe connects\n" + told, hashlib.sha256).digest()
            right.sendall(link._HELLO.pack(bytes(32), 0, 2, mac))

        found = in_threads(lambda: link.accept(left, key, time.monotonic() + 5), change_rank)
        assert isinstance(found[0], GroupError)

    def test_a_length_allocates_nothing(self):
        listener, peer = handshake()
        listener.socket.sendall(struct.pack(">Q32s", 1 << 62, bytes(32)))
        with pytest.raises(ConnectionError, match="a frame of"):
            peer.receive(self.soon())

    def test_deadlines(self):
        _, peer = handshake()
        with pytest.raises(TimeoutError):
            peer.receive(time.monotonic() + 0.05)
        with pytest.raises(TimeoutError):
            peer.receive(time.monotonic() - 1)

    @staticmethod
    def frame_of(sender, payload):
        """The bytes that `sender` would send; counts as sent."""
        mac = sender._mac(0, payload)
        return bytearray(struct.pack(">Q32s", len(payload), mac) + payload)
