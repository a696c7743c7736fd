"""Mails on a ready connection: the SMTP transaction (RFC 5321), several of them in flight where the relay allows it.

Three ways, by what the relay offered:

1. CHUNKING and PIPELINING: up to `WINDOW` whole mails in flight, `RSET MAIL RCPT BDAT` with its bytes; few with a relay
   that takes long for each
2. PIPELINING: the bytes of a mail and the commands of the next one in one write: a mail costs one round trip
3. neither: one command at a time

What must not be lost in a window goes alone, before and behind an empty one: a mail that has to be marked before its
last bytes (`before_dot`), and a large one.

An outcome depends on the stage at which it was said: a connection lost before the last bytes were handed to it means
"not sent", after that "unknown" (reliability.md 1.6). Answers belong to commands in order.

This module knows no library, no pool and no relay: `worker.relay` makes connections ready and owns them.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from worker.replies import About, Kind, Outcome, Reply, meaning, parse_reply, printable, reply_line

WINDOW = 16
#: Mails in flight on one connection, at most.
NARROW = 2
#: And at first: what a relay takes long for is not to be written far ahead, for a crash would send it again.
QUICK_SECONDS = 0.001
#: The window grows to its most where the relay takes less for a mail, else until there is always one underway.
COMMAND_SECONDS = 60.0
#: For the answers to MAIL, RCPT, DATA and RSET.
BODY_SECONDS = 180.0
#: For the relay to take the bytes of a large body (RFC 5321, 4.5.3.2.5).
LARGE_BYTES = 65_536
#: A longer body has left this process before its final dot is written: what is lost meanwhile was not sent.
DOT_SECONDS = 600.0
#: For the answer to the last bytes (RFC 5321, 4.5.3.2.6): giving up earlier would make second copies.
PROVE_SECONDS = 1.0
#: A connection that rested longer answers for one mail, step by step, before whole mails are written ahead to it: where
#: the relay has ended it, no mail is unknown.
CLOSE_SECONDS = 2.0
#: For a closed connection to end politely.
REPLY_BYTES = 32_768
#: The longest answer that is read; a longer one is garbage.

WITHDRAWN = Outcome(Kind.NOT_SENT, About.RELAY, text="withdrawn before its last bytes", stage="body")
#: `before_dot` said no: it tells nothing of the relay.
NEEDS_8BITMIME = Outcome(
    Kind.NOT_SENT, About.RELAY, text="it was made for a relay that offers 8BITMIME: it is made again", stage="mail"
)
#: Neither does this: the mail was made for another relay.


@dataclass(slots=True)
class Envelope:
    """One mail as it is handed over: to one recipient, CRLF lines, not yet dot-stuffed."""

    sender: str
    recipient: str
    body: bytes
    smtputf8: bool = False
    eightbit: bool = False
    """The body has octets above 127: it goes only where the relay offers 8BITMIME (RFC 6152)."""
    checked: bool = False
    """Its line ends are known to be CRLF only, and its addresses to be such as may stand in an SMTP command."""
    before_dot: Callable[[], Awaitable[bool]] | None = None
    """Awaited after the relay said 354 and before the first byte of the body; False withdraws the mail."""

    @property
    def alone(self) -> bool:
        """Whether no other mail may be in flight beside it."""
        return self.before_dot is not None or len(self.body) > LARGE_BYTES


class Gate(Protocol):
    """What limits the mails that a process has in flight; it lives on the event loop."""

    def take(self, wanted: int) -> int:
        """How many of these may be begun now, 0 to `wanted`."""

    async def room(self) -> None:
        """Wait until `take` would grant one."""


@dataclass(slots=True)
class Mail:
    """One envelope on its way."""

    number: int  # in its flight
    envelope: Envelope
    follows: bool = False  # another mail was begun before it on the same connection
    stages: tuple[str, ...] = ()  # of the answers that are due to it, in order
    written: bool = False  # its last bytes were handed to the connection
    group: int = 0  # how many were written at once, where it is the last of them
    written_at: float = 0.0  # and when, on the loop's clock


class Cargo(Protocol):
    """The mails of one flight, as a connection takes them."""

    async def ready(self) -> bool:
        """Wait until `take` gives a mail; False where there are no more."""

    def take(self, wanted: int) -> list[Mail]:
        """At most so many that may be begun now; one that goes alone is the last of them."""

    def put_back(self, mail: Mail) -> None:
        """One that was taken and not begun is the next again."""

    def done(self, mail: Mail, outcome: Outcome) -> None:
        """What became of a mail that was taken."""

    def accepted(self, mails: Sequence[Mail], replies: Sequence[str]) -> None:
        """The same of several that were accepted, with the relay's words as `Outcome.reply` has them."""


class _Lost(Exception):  # noqa: N818 - a fact about the connection, used inside this module only
    """The connection broke, or what came could not be read."""


_DATA = ("mail", "rcpt", "data", "dot")
_BDAT = ("mail", "rcpt", "dot")
_RESET_DATA, _RESET_BDAT = ("rset", *_DATA), ("rset", *_BDAT)
_BEFORE_DATA = frozenset({"rset", "mail", "rcpt"})
_NOTHING_DUE = ("",)


class Channel(asyncio.Protocol):
    """SMTP transactions, spoken on a connection that somebody made ready: after EHLO, TLS and AUTH.

    `round_trip` is how long an answer takes that costs the relay nothing, seconds.
    """

    def __init__(
        self, transport: asyncio.Transport, *, extensions: frozenset[str], size: int, round_trip: float = 0.0
    ) -> None:
        self._transport = transport
        self._round_trip = round_trip
        self._extensions = extensions
        self._size = size
        self._pipelining = "pipelining" in extensions
        self._chunking = self._pipelining and "chunking" in extensions
        self._buffer = bytearray()  # an answer that is not whole yet
        self._seen = 0  # so much of it is whole lines that were looked at
        self._begun = 0  # mails
        self._clean = True  # no transaction is open that was refused in part
        self._ending = False  # nothing more is written; what was written is still answered
        self._broken: str | None = None
        self._garbage = False  # it broke because what came could not be read
        self._drained = asyncio.Event()
        self._drained.set()
        self._gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.rested_since = self._loop.time()
        # One mail step by step: a future for each answer that is due, in order.
        self._waiting: deque[asyncio.Future[Reply]] = deque()
        # Several in flight: the answers that are due are the stages of these mails, in order.
        self._flying: deque[Mail] = deque()
        self._step = 0  # so many stages of the first of them are answered
        self._window = NARROW
        self._answered_at = 0.0  # when the last of mails that were written at once was answered
        self._refused: tuple[Reply, str] | None = None  # the first of them, and at which stage
        self._contradicts = False  # then its recipient was accepted
        self._cargo: Cargo | None = None
        self._landed: asyncio.Future[None] = self._loop.create_future()
        self._deadline = 0.0  # of the oldest answer that is due
        self._timer: asyncio.TimerHandle | None = None
        transport.set_protocol(self)
        # Not 0: asyncio's TLS takes "at least 0 bytes wait" for full, and would pause and go on by turns.
        transport.set_write_buffer_limits(high=1, low=0)
        transport.resume_reading()

    # ------------------------------------------------------------ asyncio's side

    def data_received(self, data: bytes) -> None:
        """Bytes of the server: whole answers go to who waits; anything unreadable breaks the connection."""
        if self._broken is not None:
            return
        try:
            if self._buffer or not self._flying or not self._read_quickly(data):
                self._read(data)
        except Exception as error:  # noqa: BLE001 - of who is told: it goes to who awaits the mails
            self._fail(error)
        self._go_on()

    def _read_quickly(self, data: bytes) -> bool:
        """A packet of whole answers of one line, as nearly all are; False, and nothing was read, where it is not."""
        lines = data.split(b"\r\n")
        if lines.pop() or not data.count(b"\r") == data.count(b"\n") == len(lines) or self._refused is not None:
            return False
        flying, cargo, step = self._flying, self._cargo, self._step
        assert cargo is not None
        if self._chunking and data.startswith(b"250 ") and data.count(b"\r\n250 ") == len(lines) - 1:
            self._hear_good(lines)
            return True
        stages = flying[0].stages
        for position, line in enumerate(lines):
            stage = stages[step]
            if line.startswith(b"250 "):
                if stage in _BEFORE_DATA:
                    step += 1
                    continue
                if stage == "dot":
                    mail = flying.popleft()
                    self._step = step = 0
                    self._clean = True
                    stages = flying[0].stages if flying else _NOTHING_DUE
                    cargo.done(mail, Outcome(Kind.ACCEPTED, About.CONTENT, 250, printable(line[4:])[:500]))
                    continue
            elif stage == "data" and line.startswith(b"354 ") and position == len(lines) - 1:
                self._step = step + 1
                self._write_body(flying[0])
                self._due()
                return True
            self._step = step
            self._due()
            self._read(b"\r\n".join(lines[position:]) + b"\r\n")
            return True
        self._step = step
        self._due()
        return True

    def _hear_good(self, lines: Sequence[bytes]) -> None:
        """Answers to whole mails that all say 250: only the last one of each mail says more."""
        flying, cargo, heard = self._flying, self._cargo, 0
        assert cargo is not None
        mails, replies = [], []
        while flying and heard < len(lines):
            due = len(flying[0].stages) - self._step
            if heard + due > len(lines):
                self._step += len(lines) - heard
                heard = len(lines)
                break
            heard += due
            self._step, self._clean = 0, True
            replies.append(printable(lines[heard - 1])[:504].rstrip())  # the code, a space and at most 500 characters
            mail = flying.popleft()
            mails.append(mail)
            if mail.group:
                self._learn_pace(mail)
        if mails:
            cargo.accepted(mails, replies)
        self._due()
        if heard < len(lines):
            self._read(b"\r\n".join(lines[heard:]) + b"\r\n")

    def _read(self, data: bytes) -> None:
        self._buffer += data
        while (line_end := self._buffer.find(b"\n", self._seen)) >= 0 and line_end < REPLY_BYTES:
            line = bytes(self._buffer[self._seen : line_end]).rstrip(b"\r")
            self._seen = line_end + 1
            if not reply_line(line):
                self._break("the answer is not SMTP: " + printable(line[:100]), garbage=True)
                return
            if line[3:4] == b"-":
                continue
            reply = parse_reply(bytes(self._buffer[: self._seen]))
            del self._buffer[: self._seen]
            self._seen = 0
            if self._flying:
                self._hear(reply, more=bool(self._buffer))
                if self._broken is not None:
                    return
            elif self._waiting and not self._waiting[0].done():
                self._waiting.popleft().set_result(reply)
            else:
                # An answer that nobody asked for could be paired with the wrong command.
                self._break(f"an answer came unasked: {reply.code} {reply.text}", garbage=True)
                return
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
        self._loop.call_soon(self._go_on)  # TLS says so within a write

    def _break(self, why: str, *, garbage: bool = False) -> None:
        if self._broken is None:
            self._broken, self._garbage = why, garbage
            self._buffer.clear()
            self._transport.abort()
            self._lose()
        self._drained.set()
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(_Lost(self._broken))
                waiter.exception()  # who waits for an earlier answer may never look at this one

    # ------------------------------------------------------------ a flight

    @property
    def usable(self) -> bool:
        """Whether another mail can be sent here."""
        return self._broken is None and not self._ending and not self._transport.is_closing()

    def supports(self, extension: str) -> bool:
        """Whether the relay offered an extension in its answer to EHLO."""
        return extension in self._extensions

    async def carry(self, cargo: Cargo) -> None:
        """Hand mails over until there are no more, or the session ends; every mail that was begun is answered for.

        Raises what `cargo.done` raises; then the session has ended, and of the mails in flight nobody hears.
        """
        while await cargo.ready() and self.usable:
            [mail] = cargo.take(1)
            if not self._pipelining or mail.envelope.alone or self._doubtful():
                self._begin(mail)
                cargo.done(mail, await self._send(mail.envelope))
            else:
                cargo.put_back(mail)
                await self._stream(cargo)

    def _doubtful(self) -> bool:
        return self._chunking and self._begun > 0 and self._loop.time() - self.rested_since > PROVE_SECONDS

    def _begin(self, mail: Mail) -> None:
        mail.follows = self._begun > 0
        mail.written = False
        self._begun += 1

    # ------------------------------------------------------------ several mails in flight

    async def _stream(self, cargo: Cargo) -> None:
        """Keep mails in flight; returns when there are none, and none that may join them."""
        if not self._drained.is_set():
            self._break("the relay answered what it had not read")
            return
        self._cargo, self._landed = cargo, self._loop.create_future()
        try:
            self._pump()
            if self._flying:
                self._watch()
                await self._landed
        except BaseException:
            self._flying.clear()
            self._break("the transaction was interrupted")  # what is written next would belong to these mails
            raise
        finally:
            self._cargo = None
            self.rested_since = self._loop.time()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _pump(self) -> None:
        """Write the mails that may join those in flight; as long as bytes wait for the system, none."""
        if self._ending or not self._drained.is_set():
            return
        was_empty = not self._flying
        if self._chunking:
            if 2 * len(self._flying) < self._window:
                self._write_group()
        elif was_empty and (commands := self._commands_of_next()):
            self._transport.write(commands)
        if was_empty:
            self._due()

    def _write_group(self) -> None:
        """Several whole mails in one write, as Google sends them and Exim takes them (RFC 3030; RFC 2920, 3.1).

        A relay discards the chunk of a mail that it refused (RFC 3030, 2), but may leave the transaction open: Exim
        then refuses the next MAIL ("sender already given") and would take what follows it under the sender before.
        Hence a RSET between any two; Exim allows one a mail, and Postfix forgets them with each mail that it takes.
        """
        cargo, flying = self._cargo, self._flying
        assert cargo is not None
        parts = []
        mails = cargo.take(self._window - len(flying))
        if mails and mails[-1].envelope.alone:
            cargo.put_back(mails.pop())
        for mail in mails:
            envelope = mail.envelope
            refused = self._refused_ahead(envelope)
            if refused is not None:
                cargo.done(mail, refused)
                continue
            self._begin(mail)
            body = envelope.body if envelope.body.endswith(b"\r\n") else envelope.body + b"\r\n"
            if flying or not self._clean:
                mail.stages, reset = _RESET_BDAT, "RSET\r\n"
            else:
                mail.stages, reset = _BDAT, ""
            parts.append(f"{reset}{self._mail_and_rcpt(envelope)}BDAT {len(body)} LAST\r\n".encode())
            parts.append(body)
            mail.written, mail.group = True, 0
            flying.append(mail)
        if parts:
            flying[-1].group, flying[-1].written_at = len(parts) // 2, self._loop.time()
            self._transport.write(b"".join(parts))

    def _learn_pace(self, mail: Mail) -> None:
        """Mails that were written at once are answered, `mail` the last: see how long the relay took for each.

        It began when they had arrived and those before them were done. Postfix answers all of them together, so that
        nothing can be read from the time between two answers.
        """
        now = self._loop.time()
        self._round_trip = min(self._round_trip, now - mail.written_at)  # it was measured while much began
        each = (now - max(mail.written_at + self._round_trip, self._answered_at)) / mail.group
        self._answered_at = now
        enough = WINDOW if each < QUICK_SECONDS else NARROW + int(2 * self._round_trip / each)
        self._window = min(2 * self._window, enough, WINDOW)

    def _commands_of_next(self) -> bytes:
        """MAIL, RCPT and DATA of the next mail, which is in flight then; nothing where none may follow.

        Behind a mail's bytes they need no RSET: its end clears the transaction (RFC 5321, 4.1.1.4).
        """
        cargo = self._cargo
        assert cargo is not None
        while mails := cargo.take(1):
            mail = mails[0]
            if mail.envelope.alone:
                cargo.put_back(mail)
                break
            refused = self._refused_ahead(mail.envelope)
            if refused is not None:
                cargo.done(mail, refused)
                continue
            self._begin(mail)
            if self._flying or self._clean:
                mail.stages, reset = _DATA, ""
            else:
                mail.stages, reset = _RESET_DATA, "RSET\r\n"
            self._flying.append(mail)
            return f"{reset}{self._mail_and_rcpt(mail.envelope)}DATA\r\n".encode()
        return b""

    def _write_body(self, mail: Mail) -> None:
        commands = self._commands_of_next()
        mail.written = True
        self._transport.write(stuffed(mail.envelope.body) + commands)

    def _hear(self, reply: Reply, *, more: bool) -> None:
        """An answer to the first mail in flight; `more`: there are further answers in the same packet."""
        mail = self._flying[0]
        stage = mail.stages[self._step]
        good = reply.code == 354 if stage == "data" else reply.code // 100 == 2
        self._step += 1
        if mail.written and reply.code // 100 == 3:  # no such answer is due: none can be told from another any more
            self._finish(Outcome(Kind.UNKNOWN, About.RELAY, reply.code, reply.text))
        elif stage == "rset":
            if not good:
                self._step -= 1
                self._break("the relay did not reset the session")
        elif stage == "dot":
            self._hear_the_end(reply, good=good)
        elif stage == "data" and self._refused is not None:
            self._finish(meaning(*self._refused))
            if good:
                self._break("the relay waits for a mail that it refused")
        elif stage == "data" and good and more:
            self._step -= 1
            self._break("an answer came before its mail", garbage=True)
        elif stage == "data" and good:
            self._write_body(mail)
        elif good:
            self._contradicts = stage == "rcpt" and self._refused is not None
        elif self._refused is None:
            self._refused = reply, stage
            if stage == "data":
                self._finish(meaning(reply, stage))
        self._due()

    def _hear_the_end(self, reply: Reply, *, good: bool) -> None:
        """The last answer to a mail."""
        if self._refused is None:
            self._finish(_answer_to_dot(reply), at_the_dot=True)
            return
        outcome = meaning(*self._refused)
        if good and self._contradicts:
            outcome = Outcome(Kind.UNKNOWN, About.RELAY, reply.code, reply.text)
        self._finish(outcome, at_the_dot=True)
        if good:
            self._break("the relay took a mail that it refused")

    def _finish(self, outcome: Outcome, *, at_the_dot: bool = False) -> None:
        """The first mail in flight is answered for; an answer that ends the session ends it."""
        mail = self._flying.popleft()
        if mail.group:
            self._learn_pace(mail)
        self._step, self._refused, self._contradicts = 0, None, False
        # After a refused BDAT the state is "indeterminate" (RFC 3030, 2), after a refused dot it is clear.
        self._clean = outcome.kind is Kind.ACCEPTED or (at_the_dot and not self._chunking)
        assert self._cargo is not None
        self._cargo.done(mail, outcome)
        if outcome.about is not About.RELAY:
            return
        if outcome.kind is not Kind.UNKNOWN and any(one.written for one in self._flying):
            self._ending = True  # the relay may have read them, and then it answers to them: Exim goes on after a 421
        else:
            self._break("the relay ended the session")

    def _go_on(self) -> None:
        """After answers, or after bytes left: more mails are written, or it is over."""
        if self._cargo is None or self._landed.done():
            return
        try:
            self._pump()
        except Exception as error:  # noqa: BLE001 - of who is told: it goes to who awaits the mails
            self._fail(error)
        if not self._flying:
            if self._ending:
                self._break("the relay ended the session")
            if not self._landed.done():
                self._landed.set_result(None)

    def _lose(self) -> None:
        """The connection broke: what that means for each mail in flight."""
        lost = list(self._flying)
        self._flying.clear()
        text = printable((self._broken or "").encode())[:500]
        try:
            for number, mail in enumerate(lost):
                outcome = Outcome(Kind.UNKNOWN, About.RELAY, text=text)
                if number == 0 and self._refused is not None and not (mail.written and self._contradicts):
                    outcome = meaning(*self._refused)  # it refused, then hung up
                elif not mail.written:
                    stage = mail.stages[self._step] if number == 0 else "mail"
                    kind = Kind.TEMPORARY if self._garbage else Kind.NOT_SENT
                    outcome = Outcome(kind, About.RELAY, text=text, stage="mail" if stage == "rset" else stage)
                assert self._cargo is not None
                self._cargo.done(mail, outcome)
        except Exception as error:  # noqa: BLE001 - of who is told: it goes to who awaits the mails
            self._fail(error)
        if not self._landed.done():
            self._landed.set_result(None)

    def _fail(self, error: Exception) -> None:
        """Who is told of the mails failed."""
        self._flying.clear()
        if self._landed.done():
            raise error
        self._landed.set_exception(error)
        self._break("the transaction was interrupted")

    def _due(self) -> None:
        """The first answer that is due now has its time from now on."""
        if self._flying:
            at_the_dot = self._flying[0].stages[self._step] == "dot"
            self._deadline = self._loop.time() + (DOT_SECONDS if at_the_dot else COMMAND_SECONDS)

    def _watch(self) -> None:
        """One timer for a whole flight: it looks again when the time of the oldest answer may be over."""
        left = self._deadline - self._loop.time()
        if left <= 0:
            self._break(_TOO_LATE)
        else:  # a deadline may come nearer when a dot is answered, but never nearer than that of a command
            self._timer = self._loop.call_later(min(left, COMMAND_SECONDS), self._watch)

    # ------------------------------------------------------------ one mail, step by step

    async def _send(self, envelope: Envelope) -> Outcome:
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
            outcome = _answer_to_dot(await self._answer(waiter, DOT_SECONDS))
        except (_Lost, TimeoutError, OSError) as error:
            return self._lost(stage, error)
        except BaseException:
            self._break("the transaction was interrupted")  # what is written next would belong to this mail
            raise
        finally:
            self.rested_since = self._loop.time()
        self._clean = True
        if outcome.about is About.RELAY:
            self._break("the relay ended the session")
        return outcome

    async def _announce(self, envelope: Envelope) -> Outcome | None:
        """Say MAIL, RCPT and DATA; None where the relay waits for the mail, else what became of it.

        All three go in one packet where the relay offers PIPELINING (RFC 2920), and every answer is waited for.
        """
        mail, _, rcpt = self._mail_and_rcpt(envelope).encode().partition(b"\r\n")
        commands = [("mail", mail + b"\r\n"), ("rcpt", rcpt), ("data", b"DATA\r\n")]
        if not self._clean:
            commands.insert(0, ("rset", b"RSET\r\n"))
        self._clean = False
        together = self._pipelining
        waiters = self._put(b"".join(command for _, command in commands), len(commands)) if together else []
        refused: tuple[Reply, str] | None = None
        for number, (stage, command) in enumerate(commands):
            try:
                reply = await self._answer(waiters[number] if together else self._put(command, 1)[0], COMMAND_SECONDS)
                if stage == "rset" and reply.code // 100 != 2:
                    raise _Lost("the relay did not reset the session")  # noqa: TRY301 - as if it had hung up
            except (_Lost, TimeoutError, OSError) as error:
                if refused is None:
                    return self._lost("mail" if stage == "rset" else stage, error)
                break  # it refused, then hung up
            if refused is not None:
                if reply.code == 354:
                    self._break("the relay waits for a mail that it refused")
            elif (reply.code != 354) if stage == "data" else (reply.code // 100 != 2):
                refused = reply, stage
                if not together:
                    break
        if refused is None:
            return None
        outcome = meaning(*refused)
        if outcome.about is About.RELAY:
            self._break("the relay ended the session")
        return outcome

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

    def _lost(self, stage: str, error: BaseException) -> Outcome:
        why = _TOO_LATE if isinstance(error, TimeoutError) else str(error)
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

    # ------------------------------------------------------------ of both

    def _refused_ahead(self, envelope: Envelope) -> Outcome | None:
        """What can be said of a mail before it is begun."""
        body = envelope.body
        if not envelope.checked:
            for address, about in ((envelope.sender, About.SENDER), (envelope.recipient, About.RECIPIENT)):
                if _NOT_AN_ADDRESS.search(address):
                    text = f"5.1.3 {printable(address.encode())!r} can't stand in an SMTP command"
                    return Outcome(Kind.PERMANENT, about, text=text, stage="mail")
            if not body.count(b"\r") == body.count(b"\n") == body.count(b"\r\n"):
                text = "5.6.0 the mail has a line that does not end in CRLF"  # a relay could read two mails in it
                return Outcome(Kind.PERMANENT, About.CONTENT, text=text, stage="mail")
        if envelope.smtputf8 and not self.supports("smtputf8"):
            text = "5.6.7 the address needs SMTPUTF8, which the relay does not offer"
            return Outcome(Kind.PERMANENT, About.RECIPIENT, text=text, stage="mail")
        if envelope.eightbit and not self.supports("8bitmime"):
            return NEEDS_8BITMIME
        if self._size and len(body) > self._size:
            text = f"5.3.4 the mail has {len(body)} bytes, the relay takes {self._size}"
            return Outcome(Kind.PERMANENT, About.CONTENT, text=text, stage="mail")
        return None

    def _mail_and_rcpt(self, envelope: Envelope) -> str:
        size = f" SIZE={len(envelope.body)}" if "size" in self._extensions else ""
        body = " BODY=8BITMIME" if envelope.eightbit or envelope.smtputf8 else ""
        utf8 = " SMTPUTF8" if envelope.smtputf8 else ""
        return f"MAIL FROM:<{envelope.sender}>{size}{body}{utf8}\r\nRCPT TO:<{envelope.recipient}>\r\n"

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


_TOO_LATE = "no answer in time"


def _too_late(waiter: asyncio.Future[Reply]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


def _answer_to_dot(reply: Reply) -> Outcome:
    """The first digit decides (RFC 5321, 4.2.1); an answer of no use there leaves the mail unknown."""
    match reply.code // 100:
        case 2:
            return Outcome(Kind.ACCEPTED, About.CONTENT, reply.code, reply.text)
        case 4 | 5:
            return meaning(reply, "dot")
        case _:
            return Outcome(Kind.UNKNOWN, About.RELAY, reply.code, reply.text)


_NOT_AN_ADDRESS = re.compile(r"[\s<>\x00-\x1f\x7f-\x9f]")
#: What could end the address, or the command, before its time.


def stuffed(body: bytes) -> bytes:
    """A body with its leading dots doubled and the final dot (RFC 5321, 4.5.2)."""
    if body.rfind(b"\r\n.") >= 0:  # from behind it takes a fourth of the time
        body = body.replace(b"\r\n.", b"\r\n..")
    if body.startswith(b"."):
        body = b"." + body
    return body + (b".\r\n" if body.endswith(b"\r\n") else b"\r\n.\r\n")
