"""The hand-over to relays by SMTP (RFC 5321); the only module that knows aiosmtplib.

aiosmtplib connects, negotiates TLS, authenticates and says EHLO; after that the connection's transport is taken over by
`Channel`, which speaks the mail transaction itself. The reason: an outcome depends on the stage at which it was said
(a connection lost before the final dot means "not sent", after it "unknown"), and the library raises the same error for
both (reliability.md 1.6). All errors of the library are translated here, once:

    RelayError
    +-- RelayUnavailable   nothing can be handed over now: a connection failed, the relay said "later" (421)
    +-- RelayMisconfigured a person must act: TLS refused or wrong, credentials refused, no relay

What became of one mail is an `Outcome`, never an exception.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NoReturn, cast

import aiosmtplib

from worker import logs
from worker.settings import RelaySettings

logger = logs.get(__name__)

CONNECT_SECONDS = 30.0
COMMAND_SECONDS = 60.0
#: For the answers to MAIL, RCPT, DATA and RSET.
BODY_SECONDS = 180.0
#: For the relay to take the bytes of a large body (RFC 5321, 4.5.3.2.5).
LARGE_BYTES = 65_536
#: A longer body has left this process before its final dot is written: what is lost meanwhile was not sent.
DOT_SECONDS = 600.0
#: For the answer to the final dot (RFC 5321, 4.5.3.2.6): giving up earlier would make second copies.
CLOSE_SECONDS = 2.0
#: For a closed connection to end politely.
IDLE_SECONDS = 20.0
#: A pooled connection that rested longer is closed: relays drop idle ones, often without a word.
BACKOFF_SECONDS = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)
#: How long a relay that failed is left alone, by failures in a row.
REPLY_BYTES = 32_768
#: The longest answer that is read; a longer one is garbage.


class RelayError(Exception):
    """Nothing was handed over; the message is one sentence with the relay's name and its words."""


class RelayUnavailable(RelayError):  # noqa: N818 - reads as the sentence it is
    """Nothing can be handed over now: it will be tried again by itself."""


class RelayMisconfigured(RelayError):  # noqa: N818 - reads as the sentence it is
    """Nothing can be handed over until a person changes a setting; it is still tried again, seldom."""


class Kind(StrEnum):
    """What became of one mail."""

    ACCEPTED = "accepted"  # the relay said 2yz to the final dot: it is responsible now
    TEMPORARY = "temporary"  # refused for now: send again later
    PERMANENT = "permanent"  # refused for good
    UNKNOWN = "unknown"  # the final dot was written and no readable answer came
    NOT_SENT = "not_sent"  # the connection was lost, or the mail withdrawn, before the final dot


class About(StrEnum):
    """What a refusal is about; only `recipient` may ever count against an address."""

    RECIPIENT = "recipient"
    SENDER = "sender"
    CONTENT = "content"
    RELAY = "relay"


_STAGES = {
    "mail": "at MAIL FROM",
    "rcpt": "at RCPT TO",
    "data": "at DATA",
    "body": "within the mail",
    "dot": "after the mail",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one mail, with the relay's own words."""

    kind: Kind
    about: About
    code: int = 0  # the reply code, 0 where there was none
    text: str = ""  # the reply, printable, at most 500 characters
    stage: str = "dot"  # mail | rcpt | data | body | dot

    @property
    def reply(self) -> str:
        """Code and text as one line for the ledger, with the stage where the mail was not accepted."""
        said = f"{self.code} {self.text}".strip() if self.code else self.text
        return said if self.kind is Kind.ACCEPTED else f"{said} ({_STAGES[self.stage]})"


@dataclass(slots=True)
class Envelope:
    """One mail as it is handed over: to one recipient, CRLF lines, not yet dot-stuffed."""

    sender: str
    recipient: str
    body: bytes
    smtputf8: bool = False
    before_dot: Callable[[], Awaitable[bool]] | None = None
    """Awaited after the relay said 354 and before the first byte of the body; False withdraws the mail."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of the server."""

    code: int
    text: str


class _Lost(Exception):  # noqa: N818 - a fact about the connection, used inside this module only
    """The connection broke or the answer could not be read; `readable` is False for garbage."""


class Channel(asyncio.Protocol):
    """The SMTP transaction, spoken on a connection that aiosmtplib made ready."""

    def __init__(self, transport: asyncio.Transport, *, extensions: frozenset[str], size: int) -> None:
        self._transport = transport
        self._extensions = extensions
        self._size = size
        self._buffer = bytearray()
        self._waiting: deque[asyncio.Future[Reply]] = deque()  # one for each answer that is due, in order
        self._broken: str | None = None
        self._drained = asyncio.Event()
        self._drained.set()
        self._gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.rested_since = self._loop.time()
        transport.set_protocol(self)
        # Not 0: asyncio's TLS takes "at least 0 bytes wait" for full, and would pause and go on by turns.
        transport.set_write_buffer_limits(high=1, low=0)
        transport.resume_reading()

    # ------------------------------------------------------------ asyncio's side

    def data_received(self, data: bytes) -> None:
        """Bytes of the server: whole answers go to who waits; anything unreadable breaks the connection."""
        self._buffer += data
        if len(self._buffer) > REPLY_BYTES:
            self._break("the answer is too long")
            return
        while (end := _end_of_reply(self._buffer)) != 0:
            if end < 0:
                self._break("the answer is not SMTP: " + printable(bytes(self._buffer[:100])))
                return
            reply = _parse_reply(bytes(self._buffer[:end]))
            del self._buffer[:end]
            if not self._waiting or self._waiting[0].done():
                # An answer that nobody asked for could be paired with the wrong command.
                self._break(f"an answer came unasked: {reply.code} {reply.text}")
                return
            self._waiting.popleft().set_result(reply)

    def eof_received(self) -> bool:
        """The server closed its side."""
        self._break("the server closed the connection")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone."""
        self._break(f"the connection was lost ({error})" if error else "the connection was lost")
        self._gone.set()

    def pause_writing(self) -> None:
        """The system takes no more bytes for now."""
        self._drained.clear()

    def resume_writing(self) -> None:
        """The system took all the bytes."""
        self._drained.set()

    def _break(self, why: str) -> None:
        if self._broken is None:
            self._broken = why
            self._transport.abort()
        self._drained.set()
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(_Lost(self._broken))
                waiter.exception()  # who waits for an earlier answer may never look at this one

    # ------------------------------------------------------------ the transaction

    @property
    def usable(self) -> bool:
        """Whether another mail can be sent here."""
        return self._broken is None and not self._transport.is_closing()

    def supports(self, extension: str) -> bool:
        """Whether the relay offered an extension in its answer to EHLO."""
        return extension in self._extensions

    async def send(self, envelope: Envelope) -> Outcome:
        """Hand one mail over (RFC 5321, 3.3); the outcome says what became of it and at which stage it was said."""
        stage = "mail"
        try:
            refused = self._refused_ahead(envelope) or await self._announce(envelope)
            if refused is not None:
                return refused
            stage = "body"
            if envelope.before_dot is not None and not await envelope.before_dot():
                self._break("the mail was withdrawn")
                return Outcome(Kind.NOT_SENT, About.RELAY, text="withdrawn before its last bytes", stage=stage)
            rest = await self._all_but_the_dot(stuffed(envelope.body))
            stage = "dot"
            reply = await self._ask(rest, seconds=DOT_SECONDS)
        except (_Lost, TimeoutError, OSError) as error:
            return self._lost(stage, error)
        except BaseException:
            self._break("the transaction was interrupted")  # what is written next would belong to this mail
            raise
        finally:
            self.rested_since = self._loop.time()
        return _answer_to_dot(reply)

    async def _announce(self, envelope: Envelope) -> Outcome | None:
        """Say MAIL, RCPT and DATA; None where the relay waits for the mail, else what became of it.

        All three go in one packet where the relay offers PIPELINING (RFC 2920), and every answer is waited for.
        """
        commands = (
            ("mail", About.SENDER, _mail_command(envelope, with_size="size" in self._extensions)),
            ("rcpt", About.RECIPIENT, f"RCPT TO:<{envelope.recipient}>\r\n".encode()),
            ("data", About.CONTENT, b"DATA\r\n"),
        )
        together = self.supports("pipelining")
        waiters = self._put(b"".join(command for _, _, command in commands), 3) if together else []
        refused: tuple[Reply, str, About] | None = None
        for number, (stage, about, command) in enumerate(commands):
            try:
                reply = await self._answer(waiters[number] if together else self._put(command, 1)[0], COMMAND_SECONDS)
            except (_Lost, TimeoutError, OSError) as error:
                if refused is None:
                    return self._lost(stage, error)
                break  # it refused, then hung up
            if refused is not None:
                if reply.code == 354:
                    self._break("the relay waits for a mail that it refused")
            elif (reply.code != 354) if stage == "data" else (reply.code // 100 != 2):
                refused = reply, stage, about
                if not together:
                    break
        return await self._refused(*refused) if refused is not None else None

    async def _all_but_the_dot(self, data: bytes) -> bytes:
        """Write a large body up to its final dot; the bytes that remain to be written."""
        if len(data) <= LARGE_BYTES:
            return data
        self._transport.write(data[:-3])
        async with asyncio.timeout(BODY_SECONDS):
            await self._drained.wait()
        if self._broken is not None:
            raise _Lost(self._broken)
        return data[-3:]

    def close(self) -> None:
        """Say QUIT without waiting for the answer: nothing depends on it (RFC 5321, 4.1.1.10)."""
        if self.usable:
            self._transport.write(b"QUIT\r\n")
        self._broken = self._broken or "closed"
        self._transport.close()

    async def gone(self) -> None:
        """Wait until a closed connection has ended; one that does not in time is broken off."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._gone.wait()
        self._transport.abort()

    def _refused_ahead(self, envelope: Envelope) -> Outcome | None:
        for address, about in ((envelope.sender, About.SENDER), (envelope.recipient, About.RECIPIENT)):
            if _NOT_AN_ADDRESS.search(address):
                text = f"5.1.3 {printable(address.encode())!r} can't stand in an SMTP command"
                return Outcome(Kind.PERMANENT, about, text=text, stage="mail")
        if not envelope.body.count(b"\r") == envelope.body.count(b"\n") == envelope.body.count(b"\r\n"):
            text = "5.6.0 the mail has a line that does not end in CRLF"  # a relay could read two mails in it
            return Outcome(Kind.PERMANENT, About.CONTENT, text=text, stage="mail")
        if envelope.smtputf8 and not self.supports("smtputf8"):
            text = "5.6.7 the address needs SMTPUTF8, which the relay does not offer"
            return Outcome(Kind.PERMANENT, About.RECIPIENT, text=text, stage="mail")
        if self._size and len(envelope.body) > self._size:
            text = f"5.3.4 the mail has {len(envelope.body)} bytes, the relay takes {self._size}"
            return Outcome(Kind.PERMANENT, About.CONTENT, text=text, stage="mail")
        return None

    async def _refused(self, reply: Reply, stage: str, about: About) -> Outcome:
        if reply.code == 421 or reply.code // 100 not in {4, 5}:
            self._break("the relay ended the session")
            return Outcome(Kind.TEMPORARY, About.RELAY, reply.code, reply.text, stage)
        with suppress(_Lost, TimeoutError, OSError):  # the outcome stands, whatever becomes of the connection
            if (await self._ask(b"RSET\r\n")).code // 100 != 2:
                self._break("the relay did not reset the session")
        kind = Kind.TEMPORARY if reply.code // 100 == 4 else Kind.PERMANENT
        return Outcome(kind, about, reply.code, reply.text, stage)

    def _lost(self, stage: str, error: BaseException) -> Outcome:
        why = "no answer in time" if isinstance(error, TimeoutError) else str(error)
        self._break(why)
        kind = Kind.UNKNOWN if stage == "dot" else Kind.NOT_SENT
        return Outcome(kind, About.RELAY, text=printable(why.encode()), stage=stage)

    async def _ask(self, data: bytes, *, seconds: float | None = None) -> Reply:
        return await self._answer(self._put(data, 1)[0], COMMAND_SECONDS if seconds is None else seconds)

    def _put(self, data: bytes, answers: int) -> list[asyncio.Future[Reply]]:
        """Write commands that so many answers are due to."""
        if self._broken is not None:
            raise _Lost(self._broken)
        waiters = [self._loop.create_future() for _ in range(answers)]
        self._waiting.extend(waiters)
        self._transport.write(data)
        return waiters

    async def _answer(self, waiter: asyncio.Future[Reply], seconds: float) -> Reply:
        timer = self._loop.call_later(seconds, _too_late, waiter)
        try:
            return await waiter
        finally:
            timer.cancel()


def _too_late(waiter: asyncio.Future[Reply]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


_NOT_AN_ADDRESS = re.compile(r"[\s<>\x00-\x1f\x7f-\x9f]")
#: What could end the address, or the command, before its time.
_REPLY_LINE = re.compile(rb"[2-5][0-9]{2}(?:[ -][^\r\n]*)?\Z")


def _end_of_reply(buffer: bytearray) -> int:
    """Where the first whole answer ends: 0 = not yet, -1 = this is no SMTP answer (RFC 5321, 4.2)."""
    start = 0
    while (line_end := buffer.find(b"\n", start)) >= 0:
        line = bytes(buffer[start:line_end]).rstrip(b"\r")
        if not _REPLY_LINE.match(line):
            return -1
        if line[3:4] != b"-":
            return line_end + 1
        start = line_end + 1
    return 0


def _parse_reply(raw: bytes) -> Reply:
    lines = raw.splitlines()
    text = " ".join(printable(line[4:]) for line in lines if line[4:])
    return Reply(int(lines[-1][:3]), text[:500])


def printable(raw: bytes) -> str:
    """Bytes of a stranger as text without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in raw.decode("utf-8", "backslashreplace"))


def stuffed(body: bytes) -> bytes:
    """A body with its leading dots doubled and the final dot (RFC 5321, 4.5.2)."""
    if b"\n." in body:
        body = body.replace(b"\r\n.", b"\r\n..")
    if body.startswith(b"."):
        body = b"." + body
    return body + (b".\r\n" if body.endswith(b"\r\n") else b"\r\n.\r\n")


def _mail_command(envelope: Envelope, *, with_size: bool) -> bytes:
    size = f" SIZE={len(envelope.body)}" if with_size else ""
    utf8 = " BODY=8BITMIME SMTPUTF8" if envelope.smtputf8 else ""
    return f"MAIL FROM:<{envelope.sender}>{size}{utf8}\r\n".encode()


def _answer_to_dot(reply: Reply) -> Outcome:
    """The first digit decides (RFC 5321, 4.2.1)."""
    kinds = {2: Kind.ACCEPTED, 4: Kind.TEMPORARY, 5: Kind.PERMANENT}
    kind = kinds.get(reply.code // 100, Kind.UNKNOWN)
    about = About.RELAY if reply.code == 421 else About.CONTENT
    return Outcome(kind, about, reply.code, reply.text, "dot")


# ---------------------------------------------------------------- connections and their limits


@dataclass(slots=True)
class Places:
    """The connections of one worker process, shared by its lanes: one is kept free for each other lane."""

    total: int
    lanes: int
    _taken: dict[int, int] = field(default_factory=dict)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def one(self, lane: int) -> AsyncIterator[None]:
        """Hold a place for as long as the block lasts."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free(lane))
            self._taken[lane] = self._taken.get(lane, 0) + 1
        try:
            yield
        finally:
            async with self._changed:
                self._taken[lane] -= 1
                self._changed.notify_all()

    def _free(self, lane: int) -> bool:
        taken, held = sum(self._taken.values()), self._taken.get(lane, 0)
        if not held:
            return taken < self.total
        others_without = self.lanes - sum(count > 0 for count in self._taken.values())
        return taken + 1 + others_without <= self.total


@dataclass(slots=True)
class Rate:
    """A token bucket: at most `per_second` mails a second, tokens taken for a whole flight."""

    per_second: float
    _ready_at: float = 0.0

    async def take(self, count: int) -> None:
        """Wait until `count` mails may go."""
        if not self.per_second:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        starts = max(now, self._ready_at)
        self._ready_at = starts + count / self.per_second
        await asyncio.sleep(max(0.0, starts - now))

    def flight_size(self, wanted: int) -> int:
        """The largest flight that takes no more than a quarter of a second of the rate."""
        return wanted if not self.per_second else max(1, min(wanted, int(self.per_second / 4)))


class Relay:
    """One relay with its pooled connections."""

    def __init__(self, settings: RelaySettings, *, host_name: str, lanes: int = 3) -> None:
        self.settings = settings
        self.name = settings.name
        self.rate = Rate(settings.rate)
        self.paused = False
        self.problem: str | None = None
        self._host_name = host_name
        self._places = Places(settings.connections, lanes)
        self._resting: list[Channel] = []
        self._failures = 0
        self._retry_at = 0.0
        self._context: ssl.SSLContext | None = None

    @property
    def ready(self) -> bool:
        """Whether it may be tried now."""
        return not self.paused and asyncio.get_running_loop().time() >= self._retry_at

    async def send(
        self,
        envelopes: Iterable[Envelope],
        *,
        lane: int,
        done: Callable[[int, Outcome], None],
        gate: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Hand a flight over, one mail after the other; `done(i, outcome)` is called as each is answered.

        `envelopes` are taken one by one, as each mail's turn comes; `gate` is awaited after each answer. Raises
        `RelayError` where no connection could be had; `done` was not called for the mails that remain.
        """
        async with self._places.one(lane):
            channel: Channel | None = None
            try:
                for number, envelope in enumerate(envelopes):
                    await self.rate.take(1)
                    reused = channel is not None
                    if channel is None or not channel.usable:
                        channel, reused = await self._channel()
                    outcome = await channel.send(envelope)
                    if reused and outcome.stage == "mail" and (outcome.kind is Kind.NOT_SENT or outcome.code == 421):
                        # The relay ended a connection that rested or carried enough: that says nothing of this mail.
                        channel, _ = await self._channel(fresh=True)
                        outcome = await channel.send(envelope)
                    done(number, outcome)
                    if gate is not None:
                        await gate()
            finally:
                if channel is not None and channel.usable:
                    self._resting.append(channel)

    async def connect(self) -> Channel:
        """A new connection, ready for mail. Raises `RelayError`."""
        settings = self.settings
        client = aiosmtplib.SMTP(
            hostname=settings.host,
            port=settings.port,
            local_hostname=self._host_name,
            timeout=CONNECT_SECONDS,
            use_tls=settings.implicit_tls,
            start_tls={"required": True, "opportunistic": None, "none": False}[settings.tls]
            if not settings.implicit_tls
            else False,
            tls_context=self._tls_context(),
        )
        try:
            await client.connect()
            if client.is_ehlo_or_helo_needed:
                await client.ehlo()
            if settings.user is not None:
                self._password_is_safe(client)
                await client.login(settings.user, str(settings.password or ""))
        except RelayError:
            client.close()
            raise
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            client.close()
            _translate(self.name, settings, error)
        extensions = {name.lower(): value for name, value in client.esmtp_extensions.items()}
        size = extensions.get("size", "")
        channel = Channel(
            cast("asyncio.Transport", client.transport),
            extensions=frozenset(extensions),
            size=int(size) if size.isdecimal() else 0,
        )
        # aiosmtplib closes what it believes to hold when it is collected: the connection is the channel's now.
        client.transport = client.protocol = None
        return channel

    def _password_is_safe(self, client: aiosmtplib.SMTP) -> None:
        """A password crosses no network in the clear that the settings did not allow (`tls=none` did)."""
        encrypted = client.get_transport_info("sslcontext") is not None
        if not encrypted and self.settings.tls == "opportunistic" and not self.settings.loopback:
            message = f"the relay {self.name} offers no TLS and would get the password in the clear: use tls=required"
            raise RelayMisconfigured(message)

    def _tls_context(self) -> ssl.SSLContext | None:
        """Made once and after failures: reading the machine's authorities takes some 20 ms."""
        if self._context is None and (self.settings.implicit_tls or self.settings.tls != "none"):
            self._context = _tls_context(self.settings)
        return self._context

    async def _channel(self, *, fresh: bool = False) -> tuple[Channel, bool]:
        now = asyncio.get_running_loop().time()
        while self._resting and not fresh:
            channel = self._resting.pop()
            if channel.usable and now - channel.rested_since < IDLE_SECONDS:
                return channel, True
            channel.close()
        try:
            channel = await self.connect()
        except RelayError as error:
            self._failed(error)
            raise
        if self.problem is not None or not self._failures:
            logger.debug("relay.connected", relay=self.name)
        self._failures, self.problem = 0, None
        return channel, False

    def _failed(self, error: RelayError) -> None:
        wait = BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS) - 1)]
        if isinstance(error, RelayMisconfigured):
            wait = BACKOFF_SECONDS[-1]
        self._failures += 1
        self._context = None
        self._retry_at = asyncio.get_running_loop().time() + wait
        if self.problem != str(error):
            logger.warning("relay.unusable", relay=self.name, why=str(error), tried_again_in_seconds=wait)
        self.problem = str(error)

    async def close(self) -> None:
        """End every resting connection."""
        closing, self._resting = self._resting, []
        for channel in closing:
            channel.close()
        await asyncio.gather(*(channel.gone() for channel in closing))
        await asyncio.sleep(0)


class Relays:
    """The relays in order of preference: a later one is used while the earlier ones fail."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self.all = tuple(relays)

    @property
    def connections(self) -> int:
        """How many connections the preferred relay may have in this process."""
        return self.all[0].settings.connections if self.all else 0

    def choose(self) -> Relay:
        """The first relay that may be tried now. Raises `RelayError` where there is none."""
        for relay in self.all:
            if relay.ready:
                return relay
        if not self.all:
            message = "no relay is configured: set ROLECAST_RELAY_URLS; until then mail waits"
            raise RelayMisconfigured(message)
        message = "; ".join(relay.problem or f"{relay.name} is paused" for relay in self.all)
        raise RelayUnavailable(message)

    async def close(self) -> None:
        """End every resting connection."""
        for relay in self.all:
            await relay.close()


def _tls_context(settings: RelaySettings) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.tls == "opportunistic" and not settings.implicit_tls:
        # Opportunistic: any encryption is better than none, so a wrong certificate does not send it in the clear.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _translate(name: str, settings: RelaySettings, error: Exception) -> NoReturn:
    """The library's errors, sorted by who can help; the most specific first."""
    said = printable(str(getattr(error, "message", error) or type(error).__name__).encode())[:300]
    code = getattr(error, "code", None)
    if code is not None and code // 100 == 4:  # said for now, at whatever stage (454 to AUTH: RFC 4954, 4.7.9)
        message = f"the relay {name} can't be used now ({code} {said})"
        raise RelayUnavailable(message) from error
    if isinstance(error, aiosmtplib.SMTPAuthenticationError) or code in {530, 534, 535, 538}:
        message = f"the relay {name} refused the user or password ({said}): correct them in ROLECAST_RELAY_URLS"
        raise RelayMisconfigured(message) from error
    if "WRONG_VERSION_NUMBER" in said:
        message = f"the relay {name} speaks no TLS on this port ({said}): use smtp:// for STARTTLS, or correct the port"
        raise RelayMisconfigured(message) from error
    if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError) or "certificate" in said.lower():
        message = f"the relay {name} has no certificate that this machine trusts ({said}): correct the host name or it"
        raise RelayMisconfigured(message) from error
    if settings.tls == "required" and "starttls" in said.lower():
        message = f"the relay {name} does not offer TLS ({said}): use tls=opportunistic only if its network is yours"
        raise RelayMisconfigured(message) from error
    if isinstance(error, aiosmtplib.SMTPException) and "auth" in said.lower() and settings.user:
        message = f"the relay {name} takes no user and password here ({said}): correct ROLECAST_RELAY_URLS"
        raise RelayMisconfigured(message) from error
    message = f"the relay {name} can't be used now ({code or ''} {said})".replace("( ", "(")
    raise RelayUnavailable(message) from error
