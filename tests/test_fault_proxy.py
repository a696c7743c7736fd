"""The proxy of the fault tests does what it says, in front of a server that answers every line with its echo."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Proxy, Verdict


class Echo(socketserver.ThreadingTCPServer):
    """Answers each line with `echo LINE`, and remembers what it was told."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.told: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Lines)

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Lines(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            for line in self.rfile:
                assert isinstance(self.server, Echo)
                self.server.told.append(line)
                self.wfile.write(b"echo " + line)


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as one:
        yield one


class Client:
    """A connection through the proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self._socket = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def say(self, data: bytes) -> None:
        self._socket.sendall(data)

    def hear(self, length: int) -> bytes:
        """That many bytes, or fewer where the connection ends."""
        heard = b""
        while len(heard) < length and (more := self._socket.recv(length - len(heard))):
            heard += more
        return heard

    def silent(self, seconds: float = 0.1) -> bool:
        """Whether nothing comes for a while on a connection that stays open."""
        self._socket.settimeout(seconds)
        try:
            self._socket.recv(1)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(5)
        return False


def test_bytes_pass_both_ways_whole(proxy: Proxy) -> None:
    line = b"x" * 1_000_000 + b"\n"
    with Client(proxy) as client:
        speaker = threading.Thread(target=client.say, args=(line,))
        speaker.start()
        assert client.hear(len(line) + 5) == b"echo " + line
        speaker.join()


def test_what_a_server_says_before_it_closes_arrives(proxy: Proxy, echo: Echo) -> None:
    with Client(proxy) as client:
        client.say(b"last words\n")
        client._socket.shutdown(socket.SHUT_WR)
        assert client.hear(100) == b"echo last words\n"


def test_a_cut_resets_connections_and_refuses_new_ones_until_it_is_restored(proxy: Proxy) -> None:
    with Client(proxy) as client:
        client.say(b"a\n")
        assert client.hear(7) == b"echo a\n"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.hear(1)
    with pytest.raises(ConnectionRefusedError):
        Client(proxy)
    proxy.restore()
    with Client(proxy) as client:
        client.say(b"b\n")
        assert client.hear(7) == b"echo b\n"


def test_a_silent_cut_holds_what_was_said_and_a_connection_made_meanwhile_says_nothing_ever(
    proxy: Proxy, echo: Echo
) -> None:
    with Client(proxy) as early:
        early.say(b"a\n")
        assert early.hear(7) == b"echo a\n"
        proxy.cut(silently=True)
        early.say(b"b\n")
        with Client(proxy) as late:
            late.say(b"never\n")
            assert late.silent()
            assert early.silent()
            assert echo.told == [b"a\n"]
            proxy.restore()
            assert early.hear(7) == b"echo b\n"
            with pytest.raises(ConnectionResetError):
                late.hear(1)
    assert echo.told == [b"a\n", b"b\n"]


def test_a_lost_reply_is_of_a_command_that_was_executed(proxy: Proxy, echo: Echo) -> None:
    proxy.drop_replies(1.0)
    with Client(proxy) as client:
        client.say(b"a\n")
        with pytest.raises(ConnectionResetError):
            client.hear(1)
    assert echo.told == [b"a\n"]
    assert proxy.replies_lost == 1


def test_replies_are_lost_as_often_as_was_asked(proxy: Proxy) -> None:
    proxy.drop_replies(0.1, random.Random(1))
    lost = 0
    for _ in range(200):
        with Client(proxy) as client:
            client.say(b"a\n")
            try:
                client.hear(7)
            except ConnectionResetError:
                lost += 1
    assert lost == proxy.replies_lost
    assert 10 <= lost <= 30


def test_an_action_comes_before_the_bytes_and_after_what_stood_before_them(proxy: Proxy, echo: Echo) -> None:
    seen: list[list[bytes]] = []

    def look() -> Verdict:
        time.sleep(0.05)  # what was forwarded before has arrived
        seen.append(list(echo.told))
        return None

    proxy.on_client(b"DATA", look)
    with Client(proxy) as client:
        client.say(b"first\nDATA\n")
        assert client.hear(21) == b"echo first\necho DATA\n"
        client.say(b"DATA\n")
        assert client.hear(10) == b"echo DATA\n"
    assert seen == [[b"first\n"]]


def test_bytes_are_found_across_packets(proxy: Proxy, echo: Echo) -> None:
    calls: list[int] = []
    proxy.on_client(b"\r\n.\r\n", lambda: calls.append(1), times=None)  # type: ignore[func-returns-value]
    proxy.on_client(re.compile(rb"RCPT TO:<[^>]*>"), lambda: calls.append(2), times=None)  # type: ignore[func-returns-value]
    with Client(proxy) as client:
        for part in (b"RCPT TO:<a@b", b".example>\n", b"body\r", b"\n.", b"\r\n", b"\r\n.\r\nRCPT TO:<c@d.example>\n"):
            client.say(part)
            time.sleep(0.02)
        client.hear(len(b"echo ") * 6)
        client.say(b"end\n")
    deadline = time.monotonic() + 5
    while len(calls) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert calls == [2, 1, 1, 2]


def test_an_action_may_drop_the_bytes_and_the_connection(proxy: Proxy, echo: Echo) -> None:
    proxy.on_client(b"secret", lambda: "drop")
    with Client(proxy) as client:
        client.say(b"a\nsecret\n")
        with pytest.raises(ConnectionResetError):
            client.hear(100)
    time.sleep(0.05)
    assert b"secret\n" not in echo.told


def test_an_action_may_swallow_an_answer_on_a_connection_that_stays_open(proxy: Proxy, echo: Echo) -> None:
    proxy.on_server(b"echo b", lambda: "swallow")
    with Client(proxy) as client:
        client.say(b"a\n")
        assert client.hear(7) == b"echo a\n"
        client.say(b"b\n")
        client.say(b"c\n")
        assert client.silent()
    assert echo.told == [b"a\n", b"b\n", b"c\n"]


def test_an_action_may_cut_the_proxy_itself(proxy: Proxy, echo: Echo) -> None:
    proxy.on_server(b"echo", proxy.cut)  # type: ignore[arg-type]
    with Client(proxy) as client:
        client.say(b"a\n")
        with pytest.raises(ConnectionResetError):
            client.hear(1)
    assert echo.told == [b"a\n"]


def test_delay_holds_each_packet(proxy: Proxy) -> None:
    proxy.delay(40)
    with Client(proxy) as client:
        before = time.monotonic()
        client.say(b"a\n")
        assert client.hear(7) == b"echo a\n"
        assert time.monotonic() - before >= 0.08
