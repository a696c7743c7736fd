"""A TCP proxy that breaks connections on purpose; it stands before Redis, PostgreSQL and SMTP alike.

It runs on a thread with an event loop of its own and listens on loopback. What it can do: cut every connection and
refuse new ones, or let bytes wait as when hosts are cut off from each other; lose replies of commands that the server
has executed (reliability.md R8); act when certain bytes pass, before they are forwarded; delay.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

Verdict = Literal["drop", "swallow"] | None
"""What an action asks for: reset the connection, let nothing more pass this way, or go on."""

Side = Literal["client", "server"]
CHUNK = 65_536
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST instead of FIN


@dataclass(slots=True)
class _Watch:
    """Bytes that are waited for, on one side, and what is to be done then; `left` None means every time."""

    side: Side
    pattern: bytes | re.Pattern[bytes]
    action: Callable[[], Verdict]
    left: int | None

    def find(self, data: bytes, start: int) -> tuple[int, int] | None:
        """Where the pattern stands in `data` such that it ends behind `start`: (from, to)."""
        if isinstance(self.pattern, bytes):
            at = data.find(self.pattern, max(0, start - len(self.pattern) + 1))
            return None if at < 0 else (at, at + len(self.pattern))
        found = next((match for match in self.pattern.finditer(data) if match.end() > start), None)
        return None if found is None else found.span()


@dataclass(slots=True, eq=False)
class _Connection:
    """One client's connection and its counterpart."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    stale: bool = False  # made while packets vanished: what it said has never arrived anywhere
    asked: bool = False  # the client has said something that the server has not answered
    tails: dict[str, bytes] = field(default_factory=lambda: {"client": b"", "server": b""})

    def close(self) -> None:
        """End both sides once what was said has left."""
        for writer in (self.client, self.server):
            if writer is not None:
                writer.close()

    def reset(self) -> None:
        """End both sides with RST."""
        for writer in (self.client, self.server):
            if writer is not None:
                raw = writer.get_extra_info("socket")
                if raw is not None and raw.fileno() >= 0:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.transport.abort()


class Proxy:
    """A proxy on `port` (loopback, or `host`) before `upstream_port` of `upstream_host`; a context manager.

    All methods may be called from any thread, an action's included.
    """

    #: So many bytes before a packet are looked at again, for patterns that lie across its border.
    TAIL = 1024

    def __init__(
        self, upstream_port: int, *, upstream_host: str = "127.0.0.1", host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.host = host
        self.port = port
        self.replies_lost = 0
        self._upstream = (upstream_host, upstream_port)
        self._watches: list[_Watch] = []
        self._connections: set[_Connection] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._lose = 0.0
        self._dice = random.Random()
        self._delay = 0.0
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()
        self._call(self._listen())

    def __enter__(self) -> Proxy:
        """The proxy, which listens already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Reset every connection and end the thread."""
        if self._loop.is_closed():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---------------------------------------------------------------- the faults

    def cut(self, *, silently: bool = False) -> None:
        """Reset every connection and refuse new ones; `silently`: packets vanish, and nobody is told.

        Bytes that were on their way when packets began to vanish arrive at `restore`, as TCP sends them again. What a
        connection said that was made meanwhile never arrives: it is reset then.
        """
        self._call(self._hold() if silently else self._refuse())

    def restore(self) -> None:
        """Let connections through again."""
        self._call(self._restore())

    def reset(self) -> None:
        """Reset every connection once; new ones are let through."""
        self._call(self._reset())

    def drop_replies(self, probability: float, dice: random.Random | None = None) -> None:
        """From now on lose a server's answer with this probability, and reset its connection; 0 ends it."""
        self._dice = dice or random.Random()
        self._lose = probability

    def on_client(
        self, pattern: bytes | re.Pattern[bytes], action: Callable[[], Verdict], *, times: int | None = 1
    ) -> None:
        """Call `action` when a client sends `pattern`, before it is forwarded; what came before it is.

        `action` runs on a thread while this connection waits and others go on. It returns None to forward, "drop" to
        reset the connection without forwarding, "swallow" to let nothing more pass this way on a connection that stays
        open.
        """
        self._watches.append(_Watch("client", pattern, action, times))

    def on_server(
        self, pattern: bytes | re.Pattern[bytes], action: Callable[[], Verdict], *, times: int | None = 1
    ) -> None:
        """The same for what the server sends."""
        self._watches.append(_Watch("server", pattern, action, times))

    def forget(self) -> None:
        """Watch for nothing any more."""
        self._watches.clear()

    def delay(self, milliseconds: float) -> None:
        """From now on let every packet wait so long, either way."""
        self._delay = milliseconds / 1000

    # ---------------------------------------------------------------- on the loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._reset()

    async def _hold(self) -> None:
        self._flows.clear()

    async def _restore(self) -> None:
        if self._server is None:
            await self._listen()
        for connection in list(self._connections):
            if connection.stale:
                connection.reset()
        self._flows.set()

    async def _reset(self) -> None:
        for connection in list(self._connections):
            connection.reset()

    async def _end(self) -> None:
        await self._refuse()
        for task in list(self._pumps):
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        connection = _Connection(writer, stale=not self._flows.is_set())
        self._connections.add(connection)
        try:
            if connection.stale:
                await self._flows.wait()
                connection.reset()
                return
            answers, connection.server = await asyncio.open_connection(*self._upstream)
            for one in (writer, connection.server):
                one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, connection, "client"))
                both.create_task(self._pump(answers, connection, "server"))
            connection.close()
        except* (OSError, _Cut, asyncio.CancelledError):
            connection.reset()
        finally:
            self._connections.discard(connection)
            self._pumps.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, connection: _Connection, side: Side) -> None:
        """Forward what one side says until it ends; then tell the other side so."""
        assert connection.server is not None
        writer = connection.server if side == "client" else connection.client
        swallowed = False
        while chunk := await reader.read(CHUNK):
            await self._flows.wait()
            if swallowed:
                continue
            if self._delay:
                await asyncio.sleep(self._delay)
            if side == "client":
                connection.asked = True
            elif connection.asked and self._lose:
                connection.asked = False
                if self._dice.random() < self._lose:
                    self.replies_lost += 1
                    raise _Cut
            try:
                await self._forward(chunk, writer, connection, side)
            except _Swallowed:
                swallowed = True
        await self._flows.wait()
        if writer.can_write_eof():
            writer.write_eof()

    async def _forward(self, chunk: bytes, writer: asyncio.StreamWriter, connection: _Connection, side: Side) -> None:
        while found := self._next(connection.tails[side], chunk, side):
            watch, start, end = found
            if watch.left is not None:
                watch.left -= 1
                if not watch.left:
                    self._watches.remove(watch)
            await self._send(chunk[:start], writer, connection, side)
            verdict = await asyncio.to_thread(watch.action)
            await self._flows.wait()
            if verdict == "drop":
                raise _Cut
            if verdict == "swallow":
                raise _Swallowed
            await self._send(chunk[start:end], writer, connection, side)
            chunk = chunk[end:]
        await self._send(chunk, writer, connection, side)

    def _next(self, tail: bytes, chunk: bytes, side: Side) -> tuple[_Watch, int, int] | None:
        """The first pattern that ends in `chunk`: (watch, from, to), places in the chunk."""
        data = tail + chunk
        hits = []
        for watch in self._watches:
            place = watch.find(data, len(tail)) if watch.side == side else None
            if place is not None:
                hits.append((watch, max(0, place[0] - len(tail)), place[1] - len(tail)))
        return min(hits, key=lambda hit: hit[2], default=None)

    async def _send(self, data: bytes, writer: asyncio.StreamWriter, connection: _Connection, side: Side) -> None:
        if data:
            if self._watches:
                connection.tails[side] = (connection.tails[side] + data)[-self.TAIL :]
            writer.write(data)
            await writer.drain()


class _Swallowed(Exception):  # noqa: N818 - not an error
    """Nothing more passes this way."""


class _Cut(Exception):  # noqa: N818 - not an error: the connection is to be reset
    """The connection is to be reset."""
