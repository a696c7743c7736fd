"""A relay for tests that does at each stage what a script says: the honest fake of the SMTP boundary.

`with SmtpServer() as server:` listens on a free loopback port, one thread a connection. It records what was said
(`commands`), the mails that it took (`accepted`), and whatever no client of ours may do (`faults`: a bare CR or LF in a
mail, a command after the wrong one), which `stop` raises. `server.on("rcpt", reply(450), nth=2)` has it misbehave.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from worker.relay import Envelope, Outcome, Relay
from worker.settings import RelaySettings, Secret

STAGES = ("connect", "ehlo", "starttls", "auth", "mail", "rcpt", "data", "body", "dot", "rset")
"""Where a script can act; `body` is in the middle of the mail, `dot` after its last bytes, by DATA or by BDAT."""

EXTENSIONS = ("PIPELINING", "8BITMIME", "SIZE 10485760", "SMTPUTF8", "ENHANCEDSTATUSCODES")


class _Over(Exception):  # noqa: N818 - the conversation is over
    """The connection ends here."""


Act = Callable[["_Conversation", int, str], int]
"""What is done instead of the usual answer (code, text): the code that was said, or `_Over`."""


def reply(code: int, text: str = "as the script says") -> Act:
    """Another answer."""
    return lambda talk, _code, _text: talk.say(code, text)


def raw(octets: bytes) -> Act:
    """Bytes that need not be SMTP."""

    def act(talk: _Conversation, code: int, _text: str) -> int:
        talk.write(octets)
        return code

    return act


def close() -> Act:
    """End the connection without a word."""

    def act(talk: _Conversation, _code: int, _text: str) -> int:
        talk.hang_up()
        raise _Over

    return act


def reset() -> Act:
    """Break the connection (RST)."""

    def act(talk: _Conversation, _code: int, _text: str) -> int:
        talk.hang_up(rudely=True)
        raise _Over

    return act


def last_words(code: int, text: str = "closing") -> Act:
    """An answer, then the end of the connection."""

    def act(talk: _Conversation, _code: int, _text: str) -> int:
        talk.say(code, text)
        talk.hang_up()
        raise _Over

    return act


def hang() -> Act:
    """Say nothing until the client gives up."""

    def act(talk: _Conversation, _code: int, _text: str) -> int:
        talk.wait_for_the_end()
        raise _Over

    return act


def stall() -> Act:
    """Neither read nor speak any more."""

    def act(talk: _Conversation, _code: int, _text: str) -> int:
        talk.pause(60)
        raise _Over

    return act


def drip(seconds: float) -> Act:
    """The usual answer, a byte at a time."""

    def act(talk: _Conversation, code: int, text: str) -> int:
        talk.promise(code)
        for octet in f"{code} {text}\r\n".encode():
            talk.pause(seconds)
            talk.write(bytes([octet]))
        return code

    return act


def delay(seconds: float) -> Act:
    """The usual answer, later."""

    def act(talk: _Conversation, code: int, text: str) -> int:
        talk.pause(seconds)
        return talk.say(code, text)

    return act


def flood(octets: bytes) -> Act:
    """The same bytes over and over, up to a gigabyte, for as long as the client listens."""

    def act(talk: _Conversation, _code: int, _text: str) -> int:
        chunk = octets * (65_536 // len(octets))
        for _ in range(1_000_000_000 // len(chunk)):
            talk.write(chunk)
        raise _Over

    return act


def crowd(most: int) -> Act:
    """At the banner: 421 to whoever comes while so many connections are open."""

    def act(talk: _Conversation, code: int, text: str) -> int:
        with talk.server.lock:
            crowded = len(talk.server.open) > most
        if crowded:
            talk.say(421, "4.7.0 too many connections")
            talk.hang_up()
            raise _Over
        return talk.say(code, text)

    return act


def lose_the_reply(*, rudely: bool = True) -> Act:
    """At the dot: take the mail, and end or break the connection instead of saying so."""

    def act(talk: _Conversation, _code: int, _text: str) -> int:
        talk.keep()
        talk.hang_up(rudely=rudely)
        raise _Over

    return act


@dataclass(frozen=True, slots=True)
class Accepted:
    """A mail that the server took, as it stood in the transaction."""

    sender: str
    recipient: str
    body: bytes  # without dot-stuffing and the final dot; of BDAT as it came
    options: str  # of MAIL FROM
    tls: bool
    user: str | None
    connection: int


@dataclass(frozen=True, slots=True)
class _Rule:
    stage: str
    act: Act
    nth: int | None
    recipient: str | None


@dataclass(slots=True)
class SmtpServer:
    """The scripted server. `certificate` offers STARTTLS, or with `implicit_tls` speaks TLS from the first byte."""

    extensions: Sequence[str] = EXTENSIONS
    certificate: ssl.SSLContext | None = None
    implicit_tls: bool = False
    offers_starttls: bool = True
    takes_data_anyway: bool = False  # says 354, or 250 to BDAT, although it refused sender or recipient
    gathers: bool = False  # writes its answers together, once it has read all that came, as busy relays do
    pieces: int = 0  # writes its answers in pieces of so many bytes
    users: dict[str, str] | None = None
    accepted: list[Accepted] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    connections: int = 0
    most_at_once: int = 0
    port: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _rules: list[_Rule] = field(default_factory=list)
    _seen: Counter[str] = field(default_factory=Counter)
    open: list[_Conversation] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._start(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def on(self, stage: str, act: Act, *, nth: int | None = None, recipient: str | None = None) -> None:
        """At a stage do `act`: always, the n-th time (from 1) that the stage is reached, or for one address.

        The address is the recipient's; at `mail` it is the sender's, for the recipient is not known yet.
        """
        assert stage in STAGES
        self._rules.append(_Rule(stage, act, nth, recipient))

    def forget(self, act: Act) -> None:
        """From now on not this."""
        self._rules = [rule for rule in self._rules if rule.act is not act]

    def relay(self, **changes: Any) -> RelaySettings:
        """The settings of a client of this server; plain and without a limit unless told otherwise."""
        facts: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": self.port,
            "implicit_tls": self.implicit_tls,
            "tls": "none",
            "user": None,
            "password": None,
            "connections": 8,
            "rate": 0.0,
        }
        if "password" in changes:
            changes["password"] = Secret(changes["password"])
        return RelaySettings(**{**facts, **changes})

    def verbs(self) -> list[str]:
        """The first word of every command, in order."""
        with self.lock:
            return [command.split(" ", 1)[0].upper() for command in self.commands]

    def drop_all(self, farewell: bytes = b"") -> None:
        """End every open connection, after a farewell."""
        with self.lock:
            talks = list(self.open)
        for talk in talks:
            with suppress(OSError):
                if farewell:
                    talk.write(farewell)
            talk.hang_up()

    def stop(self) -> None:
        """End everything, and complain of whatever a client may not do."""
        self.stopping.set()
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        self.drop_all()
        for thread in self._threads:
            thread.join(timeout=10)
            assert not thread.is_alive()
        assert not self.faults, self.faults

    # ------------------------------------------------------------ the server's own side

    def _start(self, do: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=do, args=args, name="smtpd", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _listen(self) -> None:
        assert self._listener is not None
        while not self.stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with self.lock:
            self.connections += 1
            talk = _Conversation(self, connection, self.connections)
            self.open.append(talk)
            self.most_at_once = max(self.most_at_once, len(self.open))
        try:
            talk.run()
        except (_Over, OSError):
            pass
        finally:
            talk.hang_up()
            with self.lock:
                self.open.remove(talk)

    def rule(self, stage: str, recipient: str | None) -> Act | None:
        """What the script says about this time that the stage is reached."""
        with self.lock:
            self._seen[stage] += 1
            for rule in self._rules:
                if (
                    rule.stage == stage
                    and rule.nth in {None, self._seen[stage]}
                    and rule.recipient in {None, recipient}
                ):
                    return rule.act
        return None


class _Conversation:
    """One connection."""

    def __init__(self, server: SmtpServer, connection: socket.socket, number: int) -> None:
        self.server = server
        self.number = number
        self.socket = connection
        self.buffer = b""
        self.tls = False
        self.user: str | None = None
        self.greeted = False
        self.mail: tuple[str, str] | None = None  # sender, options
        self.recipient: str | None = None
        self.body = b""
        self.held: bytes = b""  # answers that are not written yet
        self.at_the_dot = False

    # ------------------------------------------------------------ what acts use

    def write(self, octets: bytes) -> None:
        self.held += octets
        if not self.server.gathers:
            self.flush()

    def flush(self) -> None:
        octets, self.held = self.held, b""
        size = self.server.pieces or len(octets) or 1
        for start in range(0, len(octets), size):
            if start:
                self.pause(0.0002)
            self.socket.sendall(octets[start : start + size])

    def say(self, code: int, *lines: str) -> int:
        self.promise(code)
        marks = ["-"] * (len(lines) - 1) + [" "]
        self.write("".join(f"{code}{mark}{line}\r\n" for mark, line in zip(marks, lines, strict=True)).encode())
        return code

    def promise(self, code: int) -> None:
        """Keep the mail before its acceptance is said: who hears of it may look at once."""
        if self.at_the_dot and code // 100 == 2:
            self.keep()

    def hang_up(self, *, rudely: bool = False) -> None:
        with suppress(OSError):
            self.flush()
            if rudely:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.socket.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self.socket.close()

    def pause(self, seconds: float) -> None:
        """Wait; what was said before is heard meanwhile."""
        if self.server.stopping.wait(seconds):
            raise _Over

    def wait_for_the_end(self) -> None:
        self.flush()
        while self.socket.recv(65_536):
            pass

    def keep(self) -> None:
        assert self.mail is not None
        assert self.recipient is not None
        sender, options = self.mail
        mail = Accepted(sender, self.recipient, self.body, options, self.tls, self.user, self.number)
        with self.server.lock:
            self.server.accepted.append(mail)

    # ------------------------------------------------------------ the conversation

    def run(self) -> None:
        if self.server.implicit_tls:
            self.encrypt()
        if self.answer("connect", 220, "relay.test ESMTP") // 100 != 2:
            raise _Over
        while True:
            line = self.line()
            with self.server.lock:
                self.server.commands.append(line)
            verb, _, rest = line.partition(" ")
            handler = getattr(self, f"do_{verb.lower()}", None)
            if handler is None:
                self.say(502, "unknown command")
            else:
                handler(rest)

    def line(self) -> str:
        while b"\n" not in self.buffer:
            self.read()
        line, _, self.buffer = self.buffer.partition(b"\n")
        if not line.endswith(b"\r") or b"\r" in line[:-1]:
            self.fault(f"a command with a bare CR or LF: {line!r}")
        return line.rstrip(b"\r").decode("utf-8")

    def read(self) -> None:
        self.flush()
        octets = self.socket.recv(65_536)
        if not octets:
            raise _Over
        self.buffer += octets

    @property
    def pipelines(self) -> bool:
        """Whether commands may come before the answers to those before them (RFC 2920)."""
        return "PIPELINING" in self.server.extensions

    def fault(self, what: str) -> None:
        with self.server.lock:
            self.server.faults.append(what)

    def answer(self, stage: str, code: int, text: str = "ok", *, recipient: str | None = None) -> int:
        act = self.server.rule(stage, recipient)
        return self.say(code, text) if act is None else act(self, code, text)

    def encrypt(self) -> None:
        assert self.server.certificate is not None
        self.socket = self.server.certificate.wrap_socket(self.socket, server_side=True)
        self.buffer, self.tls, self.greeted = b"", True, False

    def do_ehlo(self, _name: str) -> None:
        offered = [*self.server.extensions]
        if self.server.certificate is not None and self.server.offers_starttls and not self.tls:
            offered.append("STARTTLS")
        if self.server.users is not None:
            offered.append("AUTH PLAIN LOGIN")
        act = self.server.rule("ehlo", None)
        code = self.say(250, "relay.test", *offered) if act is None else act(self, 250, "relay.test")
        self.greeted = code == 250
        self.mail = self.recipient = None

    def do_helo(self, _name: str) -> None:
        self.say(502, "say EHLO")

    def do_starttls(self, _rest: str) -> None:
        if self.answer("starttls", 220, "go on") == 220:
            self.encrypt()

    def do_auth(self, rest: str) -> None:
        mechanism, _, initial = rest.partition(" ")
        if mechanism.upper() == "PLAIN":
            parts = base64.b64decode(initial or self.challenge("")).decode().split("\0")
            user, password = parts[1], parts[2]
        else:
            user = base64.b64decode(initial or self.challenge("Username:")).decode()
            password = base64.b64decode(self.challenge("Password:")).decode()
        good = self.server.users is not None and self.server.users.get(user) == password
        code = self.answer("auth", *((235, "welcome") if good else (535, "5.7.8 not you")))
        self.user = user if code == 235 else None

    def challenge(self, text: str) -> str:
        self.say(334, base64.b64encode(text.encode()).decode())
        return self.line()

    def do_mail(self, rest: str) -> None:
        found = re.fullmatch(r"FROM:<([^<>]*)>( .*)?", rest)
        if found is None or self.mail is not None or not self.greeted:
            self.fault(f"MAIL out of turn or form: {rest}")
            self.say(503, "not now")
            return
        if self.answer("mail", 250, recipient=found[1]) // 100 == 2:
            self.mail = (found[1], (found[2] or "").strip())

    def do_rcpt(self, rest: str) -> None:
        found = re.fullmatch(r"TO:<([^<>]+)>", rest)
        if found is None or self.mail is None or self.recipient is not None:
            if found is None or not self.pipelines:
                self.fault(f"RCPT out of turn or form: {rest}")
            self.say(503, "not now")
            return
        if self.answer("rcpt", 250, recipient=found[1]) // 100 == 2:
            self.recipient = found[1]

    def do_data(self, _rest: str) -> None:
        if self.recipient is None and self.server.takes_data_anyway:
            self.say(354, "go on")
            self.mail_data()
            self.say(554, "no valid recipients")
            return
        if self.recipient is None:
            if not self.pipelines:
                self.fault("DATA out of turn")
            self.say(503, "not now")
            return
        if self.answer("data", 354, "go on", recipient=self.recipient) != 354:
            return
        act = self.server.rule("body", self.recipient)
        if act is not None:
            self.read()
            act(self, 0, "")
        self.body = self.mail_data()
        self.at_the_dot = True
        self.answer("dot", 250, "2.0.0 taken", recipient=self.recipient)
        self.at_the_dot = False
        self.mail = self.recipient = None

    def do_bdat(self, rest: str) -> None:
        """A whole mail as one chunk (RFC 3030). Like Exim, a refusal leaves the transaction as it was."""
        found = re.fullmatch(r"([0-9]+) LAST", rest)
        if found is None or not {"PIPELINING", "CHUNKING"} <= set(self.server.extensions):
            self.fault(f"BDAT out of turn or form: {rest}")
            raise _Over
        size = int(found[1])
        act = self.server.rule("body", self.recipient) if self.recipient is not None else None
        if act is not None:
            act(self, 0, "")
        while len(self.buffer) < size:
            self.read()
        self.body, self.buffer = self.buffer[:size], self.buffer[size:]
        if self.recipient is None:
            self.say(*((250, "2.0.0 taken") if self.server.takes_data_anyway else (503, "5.5.1 no recipient")))
            return
        self.at_the_dot = True
        code = self.answer("dot", 250, "2.0.0 taken", recipient=self.recipient)
        self.at_the_dot = False
        if code // 100 == 2:
            self.mail = self.recipient = None

    def mail_data(self) -> bytes:
        """The mail up to CRLF.CRLF and nothing else, its stuffing undone (RFC 5321, 4.5.2)."""
        octets, searched = bytearray(b"\r\n" + self.buffer), 0
        while (end := octets.find(b"\r\n.\r\n", max(0, searched - 4))) < 0:
            searched = len(octets)
            self.buffer = b""
            self.read()
            octets += self.buffer
        self.buffer = bytes(octets[end + 5 :])
        data = bytes(octets[: end + 2])
        if re.search(rb"\r(?!\n)|(?<!\r)\n", data):
            self.fault(f"a mail with a bare CR or LF: {data[:200]!r}")
        if re.search(rb"\r\n\.(?!\.)", data):
            self.fault(f"a mail with a dot that is not doubled: {data[:200]!r}")
        return data.replace(b"\r\n.", b"\r\n")[2:]

    def do_rset(self, _rest: str) -> None:
        self.mail = self.recipient = None
        self.answer("rset", 250)

    def do_noop(self, _rest: str) -> None:
        self.say(250, "ok")

    def do_quit(self, _rest: str) -> None:
        with suppress(OSError):
            self.say(221, "bye")
        raise _Over


# ---------------------------------------------------------------- handing mail over to it

BODY = b"Subject: hello\r\n\r\nHello Ada.\r\n"
LOCKSTEP = tuple(name for name in EXTENSIONS if name != "PIPELINING")
CHUNKED = (*EXTENSIONS, "CHUNKING")
WAYS = {"lockstep": LOCKSTEP, "pipelined": EXTENSIONS, "chunked": CHUNKED}
"""What a relay offers, by the way in which mails are handed to it."""
BULK = 2  # the lane of most tests


def mail(recipient: str = "ada@acme.example", body: bytes = BODY, **more: Any) -> Envelope:
    """A mail as delivery hands it over."""
    return Envelope(**{"sender": "b+1@bounces.example", "recipient": recipient, "body": body} | more)


def mails(count: int, **more: Any) -> list[Envelope]:
    """Mails of which each has a sender, a recipient and a body of its own."""
    return [
        mail(f"r{n}@acme.example", b"Subject: %d\r\n\r\n.dotted\r\n" % n, sender=sender_of(n), **more)
        for n in range(count)
    ]


def sender_of(number: int) -> str:
    """The sender of one of `mails`."""
    return f"b+{number}@bounces.example"


def numbers(server: SmtpServer) -> list[int]:
    """Which of `mails` a server took, in order; each came with its own sender, recipient and body."""
    taken = []
    with server.lock:
        accepted = list(server.accepted)
    for one in accepted:
        number = int(one.recipient[1:].partition("@")[0])
        [envelope] = mails(number + 1)[number:]
        assert (one.sender, one.recipient, one.body) == (envelope.sender, envelope.recipient, envelope.body)
        taken.append(number)
    return taken


async def hand_over(relay: Relay, *envelopes: Envelope, lane: int = BULK) -> list[Outcome]:
    """One flight; what became of each of its mails."""
    outcomes: dict[int, Outcome] = {}

    def done(number: int, outcome: Outcome) -> None:
        assert number not in outcomes
        outcomes[number] = outcome

    await relay.send(envelopes, lane=lane, done=done)
    return [outcomes[number] for number in range(len(envelopes))]


def send(settings: RelaySettings, *envelopes: Envelope) -> list[Outcome]:
    """One flight on a relay of its own."""

    async def fly() -> list[Outcome]:
        relay = Relay(settings, host_name="rolecast.test")
        try:
            return await hand_over(relay, *envelopes)
        finally:
            await relay.close()

    return asyncio.run(fly())
