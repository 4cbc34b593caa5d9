"""The TCP rendezvous: who is let in, what strangers see, what ranks hear when one is lost."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from comm_fakes import in_threads, read

from cumoe.comm import GroupError, connect_tcp, link, rendezvous

REPO = Path(__file__).resolve().parents[1]
SECRET = "0123456789abcdef0123456789abcdef"
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUMOE_SECRET")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def meet(size, port, work, *, options=None, **common):
    """Form a group of `size` threads and run `work` on each rank."""
    common = {"secret": SECRET, "timeout_s": 10.0, "call_timeout_s": 10.0} | common

    def body(rank):
        given = common | (options or {}).get(rank, {})
        with connect_tcp(rank, given.pop("size", size), "127.0.0.1", port, **given) as group:
            return work(group)

    return in_threads(*(lambda rank=rank: body(rank) for rank in range(size)))


def dial(port):
    """Connect as soon as somebody listens."""
    while True:
        try:
            sock = socket.create_connection(("127.0.0.1", port), timeout=5)
        except ConnectionRefusedError:
            time.sleep(0.005)
            continue
        if sock.getsockname() != sock.getpeername():
            return sock
        sock.close()


class TestGroup:
    @pytest.mark.parametrize("size", [1, 2, 5])
    def test_calls(self, size, port):
        def work(group):
            found = []
            for step in range(10):
                found.append(group.allgather((group.rank, b"\x00" * step)))
                found.append(group.bcast({"step": step} if group.rank == step % size else None,
                                         root=step % size))  # fmt: skip
                group.barrier()
            return found

        want = []
        for step in range(10):
            want += [[(rank, b"\x00" * step) for rank in range(size)], {"step": step}]
        assert meet(size, port, work) == [want] * size

    def test_large_data(self, port):
        data = os.urandom(3 << 20)
        found = meet(3, port, lambda group: group.bcast(data if group.rank == 2 else None, root=2))
        assert found == [data] * 3

    def test_from_the_environment(self, port):
        code = textwrap.dedent("""
            from cumoe.comm import connect_tcp
            with connect_tcp() as group:
                print(group.rank, group.allgather(group.rank))
        """)
        environment = os.environ | {
            "PYTHONPATH": str(REPO), "WORLD_SIZE": "3", "MASTER_PORT": str(port),
            "CUMOE_SECRET": SECRET,
        }  # fmt: skip
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(3)
        ]
        printed = [process.communicate(timeout=60)[0] for process in processes]
        assert printed == [f"{rank} [0, 1, 2]\n" for rank in range(3)]

    def test_no_plain_data(self, port):
        """Refused before anything is sent, and the rank goes: the other hears of it."""
        found = meet(2, port, lambda group: group.allgather(object() if group.rank else 1))
        assert isinstance(found[1], TypeError)
        assert isinstance(found[0], GroupError) and "rank 1 is gone" in str(found[0])

    def test_different_calls(self, port):
        found = meet(3, port, lambda g: g.barrier() if g.rank == 2 else g.allgather(1))
        for error in found:
            assert isinstance(error, GroupError)
            assert "rank 0 is in allgather(), rank 2 in barrier()" in str(error)

    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_rank_that_goes(self, port, lost):
        def work(group):
            group.barrier()
            if group.rank == lost:
                return None
            with pytest.raises(GroupError, match=f"rank {lost} is gone, in allgather"):
                group.allgather(1)
            with pytest.raises(GroupError, match=f"rank {lost} is gone"):
                group.barrier()  # at once, and with the reason
            return "heard"

        found = meet(2, port, work)
        assert found[1 - lost] == "heard"

    @pytest.mark.parametrize("num_bytes", [1, 20 << 20])
    def test_a_rank_that_calls_after_the_group_has_failed(self, port, num_bytes):
        """Rank 0 is gone by then; what it said of rank 2 is still heard, whatever is sent."""
        failed = threading.Event()

        def work(group):
            if group.rank == 2:
                return None
            if group.rank == 1:
                assert failed.wait(10)
            try:
                return group.allgather(bytes(num_bytes))
            finally:
                if group.rank == 0:
                    group.close()
                    failed.set()

        found = meet(3, port, work)
        assert all("rank 2 is gone, in allgather" in str(error) for error in found[:2])

    def test_time_out_names_who_is_missing(self, port):
        release = threading.Event()

        def work(group):
            if group.rank == 2:
                release.wait(10)
                return None
            with pytest.raises(GroupError, match=r"rank 2 did not come to barrier\(\) within 0.3"):
                group.barrier()
            release.set()
            return "heard"

        assert meet(3, port, work, call_timeout_s=0.3) == ["heard", "heard", None]

    def test_closed(self, port):
        def work(group):
            group.barrier()
            group.close()
            group.close()
            with pytest.raises(GroupError, match="the group is closed"):
                group.barrier()

        assert meet(2, port, work) == [None, None]


class TestMeeting:
    def test_late_ranks(self, port, monkeypatch):
        """Rank 0 may start last; the others try until somebody listens."""
        real = rendezvous._listen

        def late(*args, **options):
            time.sleep(0.3)
            return real(*args, **options)

        monkeypatch.setattr(rendezvous, "_listen", late)
        assert meet(3, port, lambda group: group.allgather(group.rank)) == [[0, 1, 2]] * 3

    def test_names_the_ranks_that_do_not_come(self, port):
        def rank(number):
            return lambda: connect_tcp(number, 4, port=port, secret=SECRET, timeout_s=0.7)

        found = in_threads(rank(0), rank(2))
        for error in found:
            assert isinstance(error, GroupError)
            assert "ranks 1, 3 did not come to the rendezvous within 0.7 s" in str(error)

    def test_nobody_listens(self, port):
        with pytest.raises(GroupError, match=rf"rank 1 did not reach rank 0 at .* port {port}"):
            connect_tcp(1, 2, port=port, secret=SECRET, timeout_s=0.3)

    def test_port_in_use(self, port):
        text = f"cannot listen on 127.0.0.1 port {port}"
        with socket.create_server(("127.0.0.1", port)), pytest.raises(GroupError, match=text):
            connect_tcp(0, 2, port=port, secret=SECRET, timeout_s=1)

    def test_world_size_differs(self, port):
        found = meet(2, port, lambda group: None, options={1: {"size": 3}})
        for error in found:
            assert isinstance(error, GroupError)
            assert "WORLD_SIZE: rank 0 has 2, rank 1 has 3" in str(error)

    def test_a_rank_comes_twice(self, port):
        def rank(number):
            return lambda: connect_tcp(number, 3, port=port, secret=SECRET, timeout_s=10)

        found = in_threads(rank(0), rank(1), rank(1))
        for error in found:
            assert isinstance(error, GroupError)
            assert "two processes are rank 1" in str(error)

    def test_one_address_only(self, port):
        """Rank 0 listens where MASTER_ADDR says, not on every interface."""
        with rendezvous._listen("localhost", port, on_all=False) as listener:
            assert listener.getsockname()[0] in ("127.0.0.1", "::1")

    @pytest.mark.parametrize("address", ["0.0.0.0", "::", "", "*"])
    @pytest.mark.parametrize("rank", [0, 1])
    def test_all_interfaces_only_when_asked(self, address, rank, port):
        with pytest.raises(ValueError, match="listen_on='0.0.0.0'"):
            connect_tcp(rank, 2, address, port, secret=SECRET, timeout_s=0.1)

    def test_a_name_of_all_interfaces(self, port):
        with pytest.raises(ValueError, match="which stands for all"):
            connect_tcp(0, 2, "0", port, secret=SECRET, timeout_s=0.1)

    def test_all_interfaces_when_asked(self, port):
        found = meet(2, port, lambda group: group.size, options={0: {"listen_on": "0.0.0.0"}})
        assert found == [2, 2]

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"RANK": None}, "rank: expected an integer, or RANK"),
            ({"RANK": "one"}, "RANK: expected an integer, got 'one'"),
            ({"RANK": "2"}, r"rank \(RANK\): expected 0 to 1, got 2"),
            ({"WORLD_SIZE": None}, "WORLD_SIZE in the environment"),
            ({"WORLD_SIZE": "0"}, r"size \(WORLD_SIZE\)"),
            ({"MASTER_PORT": None}, "MASTER_PORT in the environment"),
            ({"MASTER_PORT": "70000"}, r"port \(MASTER_PORT\)"),
            ({"CUMOE_SECRET": None}, "secret: expected one, or CUMOE_SECRET"),
            ({"CUMOE_SECRET": "short"}, "secret: expected at least 16 bytes, got 5"),
        ],
    )
    def test_what_is_not_given(self, changes, text, monkeypatch, port):
        given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port), "CUMOE_SECRET": SECRET}
        for name, value in (given | changes).items():
            if value is not None:
                monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=text):
            connect_tcp(timeout_s=0.1)

    def test_a_port_connected_to_itself(self, port, monkeypatch):
        """Linux may connect a socket to its own port where nobody listens; that is no rank 0."""
        closed = []

        class Mirror:
            getsockname = getpeername = staticmethod(lambda: ("127.0.0.1", port))

            def close(self):
                closed.append(self)

        monkeypatch.setattr(rendezvous.socket, "create_connection", lambda *a, **k: Mirror())
        with pytest.raises(GroupError, match="did not reach rank 0"):
            connect_tcp(1, 2, port=port, secret=SECRET, timeout_s=0.05)
        assert closed


class TestSecurity:
    def test_wrong_secret(self, port):
        """The stranger is turned away and the group forms without it."""
        other = "f" * 32

        def stranger():
            return connect_tcp(1, 2, port=port, secret=other, timeout_s=10)

        def honest():
            time.sleep(0.3)
            with connect_tcp(1, 2, port=port, secret=SECRET, timeout_s=10) as group:
                return group.allgather(1)

        def lead():
            with connect_tcp(0, 2, port=port, secret=SECRET, timeout_s=10) as group:
                return group.allgather(0)

        found = in_threads(lead, stranger, honest)
        assert found[0] == found[2] == [0, 1]
        assert isinstance(found[1], GroupError) and "is the secret the same?" in str(found[1])

    def test_strangers_are_counted(self, port):
        def lead():
            return connect_tcp(0, 2, port=port, secret=SECRET, timeout_s=1)

        def stranger():
            sock = dial(port)
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100)
            read(sock, 1 << 10)

        error = in_threads(lead, stranger)[0]
        assert "rank 1 did not come" in str(error)
        assert "1 connection turned away, the last from 127.0.0.1" in str(error)

    def test_silent_strangers_do_not_hold_up_ranks(self, port):
        """Waiting for each of them in turn would take longer than the ranks have."""
        silent = []

        def lead():
            with connect_tcp(0, 2, port=port, secret=SECRET, timeout_s=10) as group:
                return group.allgather(0)

        def rank():
            silent.extend(dial(port) for _ in range(20))
            with connect_tcp(1, 2, port=port, secret=SECRET, timeout_s=10) as group:
                return group.allgather(1)

        assert in_threads(lead, rank) == [[0, 1]] * 2
        for sock in silent:
            sock.close()

    def test_a_rank_does_not_talk_to_a_false_rank_0(self, port):
        """Whoever has taken the port cannot sign, and gets nothing but a nonce and a MAC."""
        heard = []

        def impostor():
            with socket.create_server(("127.0.0.1", port)) as listener:
                sock, _ = listener.accept()
                with sock:
                    sock.sendall(link.MAGIC + bytes(32))
                    heard.append(read(sock, link._HELLO.size))
                    sock.sendall(bytes(32))
                    heard.append(read(sock, 1 << 10))

        def rank():
            return connect_tcp(1, 2, port=port, secret=SECRET, timeout_s=5)

        _, error = in_threads(impostor, rank)
        assert isinstance(error, GroupError) and "does not know the secret" in str(error)
        assert len(heard[0]) == link._HELLO.size and heard[1] == b""
        assert SECRET.encode() not in heard[0]

    def test_another_service(self, port):
        def service():
            with socket.create_server(("127.0.0.1", port)) as listener:
                sock, _ = listener.accept()
                with sock:
                    sock.sendall(b"SSH-2.0-OpenSSH_9.6 and some more text to be long enough\r\n")
                    read(sock, 1)

        def rank():
            return connect_tcp(1, 2, port=port, secret=SECRET, timeout_s=5)

        error = in_threads(service, rank)[1]
        assert isinstance(error, GroupError) and "is no rank 0" in str(error)

    def test_nothing_is_unpickled(self, port):
        """A pickle that a rank sends is bytes to the others, and no module here knows more."""
        data = pickle.dumps(os.getcwd)
        assert meet(2, port, lambda group: group.bcast(data, root=1)) == [data] * 2
        for module in ("group", "link", "rendezvous", "wire", "threads", "jax_group"):
            text = (REPO / "cumoe" / "comm" / f"{module}.py").read_text()
            assert "import pickle" not in text and "eval(" not in text
