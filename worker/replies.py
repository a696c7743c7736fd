"""What a relay answers, and what became of a mail by it: replies, refusals and outcomes.

What a refusal is about is read from a table, `REFUSALS`, by stage, reply code and enhanced status code (RFC 3463).
What became of one mail is an `Outcome`, never an exception. This module does no input or output.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container
from dataclasses import dataclass
from enum import StrEnum


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


@dataclass(slots=True)  # not frozen: one is made for each mail
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


def acceptance(reply: str) -> Outcome:
    """The outcome of a mail that was accepted with a 250, of which this is `Outcome.reply`."""
    return Outcome(Kind.ACCEPTED, About.CONTENT, 250, reply[4:])


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


# ---------------------------------------------------------------- reading replies

_REPLY_LINE = re.compile(rb"[2-5][0-9]{2}(?:[ -][^\r\n]*)?\Z")


def reply_line(line: bytes) -> bool:
    """Whether this is a line of an answer (RFC 5321, 4.2), its line end taken off."""
    return _REPLY_LINE.match(line) is not None


def parse_reply(raw: bytes) -> Reply:
    """A whole answer, of one or more lines that `reply_line` knows; its text at most 500 characters."""
    lines = raw.splitlines()
    text = " ".join(printable(line[4:]) for line in lines if line[4:])
    return Reply(int(lines[-1][:3]), text[:500])


def printable(raw: bytes) -> str:
    """Bytes of a stranger as text without control characters."""
    text = raw.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)
