"""One mail on a ready connection: the SMTP transaction (RFC 5321) and what its answers mean.

An outcome depends on the stage at which it was said: a connection lost before the final dot means "not sent", after it
"unknown" (reliability.md 1.6). What a refusal is about is read from a table, `REFUSALS`, by stage, reply code and
enhanced status code (RFC 3463). What became of one mail is an `Outcome`, never an exception.

This module knows no library, no pool and no relay: `worker.relay` makes connections ready and owns them.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Container
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

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
REPLY_BYTES = 32_768
#: The longest answer that is read; a longer one is garbage.


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
    POLICY = "policy"  # a block, a rule or a right that is missing: neither the address nor the mail is wrong
    RELAY = "relay"  # the connection, the session or the relay as a whole: it says nothing of this mail


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

    @property
    def detail(self) -> str:
        """Subject and detail of the enhanced status code ("1.1" of 5.1.1, RFC 3463); empty where there is none."""
        found = _ENHANCED.match(self.text)
        return found[2] if found is not None and found[1] == str(self.code)[0] else ""


_ENHANCED = re.compile(r"([245])\.([0-9]{1,3}\.[0-9]{1,3})(?![0-9.])")

WITHDRAWN = Outcome(Kind.NOT_SENT, About.RELAY, text="withdrawn before its last bytes", stage="body")
#: `before_dot` said no: the only outcome that tells nothing of the relay.


# ---------------------------------------------------------------- what a refusal means


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row of `REFUSALS`: where all of its conditions hold, the answer means `kind` and is about `about`."""

    stages: Collection[str]
    codes: Container[int]
    kind: Kind
    about: About
    status: Collection[str] = ()  # one of these ends the enhanced code: "7.8", or its subject "7"; none = any
    words: str = ""  # a regular expression that the text holds; none = any

    def fits(self, reply: Reply, stage: str) -> bool:
        """Whether this row speaks of an answer at a stage."""
        if stage not in self.stages or reply.code not in self.codes:
            return False
        detail = reply.detail
        if self.status and detail not in self.status and detail.partition(".")[0] not in self.status:
            return False
        return re.search(self.words, reply.text, re.IGNORECASE) is not None if self.words else True


_MAIL, _RCPT, _DATA = ("mail",), ("rcpt",), ("data", "dot")
_LATER, _EVERY = (*_RCPT, *_DATA), (*_MAIL, *_RCPT, *_DATA)
_4YZ, _5YZ = range(400, 500), range(500, 600)
_NOT_SIGNED_IN = frozenset({530, 534, 535, 538})  # RFC 4954, 6; RFC 3207, 4

REFUSALS = (
    # for now
    Refusal(_EVERY, {421}, Kind.TEMPORARY, About.RELAY),
    # a rate, or too many recipients (a mail of ours has one): the relay has had enough from us for now (R18)
    Refusal(_EVERY, _4YZ, Kind.TEMPORARY, About.RELAY, status={"5.3"}),
    Refusal(_EVERY, _4YZ, Kind.TEMPORARY, About.RELAY, status={"7"}, words=r"too m(any|uch)|\brate\b"),
    Refusal(_MAIL, _4YZ, Kind.TEMPORARY, About.SENDER),
    Refusal(_RCPT, _4YZ, Kind.TEMPORARY, About.RECIPIENT),
    Refusal(_DATA, _4YZ, Kind.TEMPORARY, About.CONTENT),
    # at MAIL: the relay takes nothing from us, or not this size, or not this sender
    Refusal(_MAIL, _NOT_SIGNED_IN, Kind.PERMANENT, About.RELAY),
    Refusal(_MAIL, _5YZ, Kind.PERMANENT, About.RELAY, status={"7.8"}),
    Refusal(_MAIL, _5YZ, Kind.PERMANENT, About.RELAY, status={"7.0"}, words="authenti|log ?in|TLS"),
    Refusal(_MAIL, {552}, Kind.PERMANENT, About.CONTENT),
    Refusal(_MAIL, _5YZ, Kind.PERMANENT, About.CONTENT, status={"3.4"}),
    Refusal(_MAIL, _5YZ, Kind.PERMANENT, About.SENDER),
    # later: the enhanced code first, because it is the more precise; a sender is often refused only at RCPT, and so is
    # who is not signed in: that says nothing of the address or the mail, and it is said to every one of them
    Refusal(_LATER, _NOT_SIGNED_IN, Kind.PERMANENT, About.SENDER),
    Refusal(
        _LATER,
        _5YZ,
        Kind.PERMANENT,
        About.SENDER,
        words=r"relay(ing)?( access)? (is )?denied|(unable|not permitted) to relay",
    ),
    Refusal(_LATER, _5YZ, Kind.PERMANENT, About.SENDER, status={"1.7", "1.8"}),
    Refusal(_LATER, _5YZ, Kind.PERMANENT, About.SENDER, words="sender address rejected"),
    Refusal(_LATER, _5YZ, Kind.TEMPORARY, About.RECIPIENT, status={"2.2"}),  # the mailbox is full
    Refusal(_LATER, _5YZ, Kind.PERMANENT, About.CONTENT, status={"2.3", "3.4"}),  # the mail is too large
    Refusal(_LATER, _5YZ, Kind.PERMANENT, About.POLICY, status={"7"}),
    # at RCPT: only these count against the address; what is not known as its fault is a matter of policy
    Refusal(_RCPT, _5YZ, Kind.PERMANENT, About.RECIPIENT, status={"1"}),
    Refusal(_RCPT, {552}, Kind.TEMPORARY, About.RECIPIENT),  # the mailbox is full
    Refusal(_RCPT, {501, 550, 551, 553, 556}, Kind.PERMANENT, About.RECIPIENT),
    Refusal(_RCPT, _5YZ, Kind.PERMANENT, About.POLICY),
    # at DATA and at the dot
    Refusal(_DATA, {550, 551, 553}, Kind.PERMANENT, About.RECIPIENT, status={"1"}),
    Refusal(_DATA, _5YZ, Kind.PERMANENT, About.CONTENT),
)
"""What a 4yz or 5yz means (reliability.md 1.6, R13): the first row that fits. The first digit of the reply code says
whether it is for good, with one exception: a full mailbox empties. An enhanced code of another class than the reply
code contradicts it and is not heard (RFC 2034, 4)."""


def meaning(reply: Reply, stage: str) -> Outcome:
    """What a refusal at a stage means; an answer of no use there ends the session, for now."""
    for row in REFUSALS:
        if row.fits(reply, stage):
            return Outcome(row.kind, row.about, reply.code, reply.text, stage)
    return Outcome(Kind.TEMPORARY, About.RELAY, reply.code, reply.text, stage)


# ---------------------------------------------------------------- the transaction


class _Lost(Exception):  # noqa: N818 - a fact about the connection, used inside this module only
    """The connection broke, or what came could not be read."""


class Channel(asyncio.Protocol):
    """The SMTP transaction, spoken on a connection that somebody made ready: after EHLO, TLS and AUTH."""

    def __init__(self, transport: asyncio.Transport, *, extensions: frozenset[str], size: int) -> None:
        self._transport = transport
        self._extensions = extensions
        self._size = size
        self._buffer = bytearray()  # an answer that is not whole yet
        self._seen = 0  # so much of it is whole lines that were looked at
        self._waiting: deque[asyncio.Future[Reply]] = deque()  # one for each answer that is due, in order
        self._broken: str | None = None
        self._garbage = False  # it broke because what came could not be read
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
        if self._broken is not None:
            return
        self._buffer += data
        while (line_end := self._buffer.find(b"\n", self._seen)) >= 0 and line_end < REPLY_BYTES:
            line = bytes(self._buffer[self._seen : line_end]).rstrip(b"\r")
            self._seen = line_end + 1
            if not _REPLY_LINE.match(line):
                self._break("the answer is not SMTP: " + printable(line[:100]), garbage=True)
                return
            if line[3:4] == b"-":
                continue
            reply = _parse_reply(bytes(self._buffer[: self._seen]))
            del self._buffer[: self._seen]
            self._seen = 0
            if not self._waiting or self._waiting[0].done():
                # An answer that nobody asked for could be paired with the wrong command.
                self._break(f"an answer came unasked: {reply.code} {reply.text}", garbage=True)
                return
            self._waiting.popleft().set_result(reply)
        if len(self._buffer) > REPLY_BYTES:
            self._break("the answer is too long", garbage=True)

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

    def _break(self, why: str, *, garbage: bool = False) -> None:
        if self._broken is None:
            self._broken, self._garbage = why, garbage
            self._buffer.clear()
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
                return WITHDRAWN
            [waiter] = self._put(await self._all_but_the_dot(stuffed(envelope.body)), 1)
            stage = "dot"  # not before it was written: until then a lost connection means "not sent"
            return self._answer_to_dot(await self._answer(waiter, DOT_SECONDS))
        except (_Lost, TimeoutError, OSError) as error:
            return self._lost(stage, error)
        except BaseException:
            self._break("the transaction was interrupted")  # what is written next would belong to this mail
            raise
        finally:
            self.rested_since = self._loop.time()

    async def _announce(self, envelope: Envelope) -> Outcome | None:
        """Say MAIL, RCPT and DATA; None where the relay waits for the mail, else what became of it.

        All three go in one packet where the relay offers PIPELINING (RFC 2920), and every answer is waited for.
        """
        commands = (
            ("mail", _mail_command(envelope, with_size="size" in self._extensions)),
            ("rcpt", f"RCPT TO:<{envelope.recipient}>\r\n".encode()),
            ("data", b"DATA\r\n"),
        )
        together = self.supports("pipelining")
        waiters = self._put(b"".join(command for _, command in commands), 3) if together else []
        refused: tuple[Reply, str] | None = None
        for number, (stage, command) in enumerate(commands):
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
                refused = reply, stage
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

    async def _refused(self, reply: Reply, stage: str) -> Outcome:
        outcome = meaning(reply, stage)
        if outcome.about is About.RELAY:
            self._break("the relay ended the session")
            return outcome
        with suppress(_Lost, TimeoutError, OSError):  # the outcome stands, whatever becomes of the connection
            [waiter] = self._put(b"RSET\r\n", 1)
            if (await self._answer(waiter, COMMAND_SECONDS)).code // 100 != 2:
                self._break("the relay did not reset the session")
        return outcome

    def _answer_to_dot(self, reply: Reply) -> Outcome:
        """The first digit decides (RFC 5321, 4.2.1); an answer of no use there leaves the mail unknown."""
        match reply.code // 100:
            case 2:
                return Outcome(Kind.ACCEPTED, About.CONTENT, reply.code, reply.text)
            case 4 | 5:
                outcome = meaning(reply, "dot")
            case _:
                outcome = Outcome(Kind.UNKNOWN, About.RELAY, reply.code, reply.text)
        if outcome.about is About.RELAY:
            self._break("the relay ended the session")
        return outcome

    def _lost(self, stage: str, error: BaseException) -> Outcome:
        why = "no answer in time" if isinstance(error, TimeoutError) else str(error)
        self._break(why)
        kind = Kind.UNKNOWN if stage == "dot" else Kind.TEMPORARY if self._garbage else Kind.NOT_SENT
        return Outcome(kind, About.RELAY, text=printable(why.encode())[:500], stage=stage)

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
