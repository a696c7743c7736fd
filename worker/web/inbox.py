"""A local inbox: an SMTP server on loopback that delivers nothing and keeps what it caught.

It owns one SQLite file in its folder and keeps the last mails only. It loses no mail that it answered 250 while the
machine stays up, and it is for looking, not for keeping: nothing is synced to disk. Told how to find signing links
(`hide`), it masks them before it keeps a mail, so no page, search or file of it can show one. Addresses at `.test`
domains whose local part begins with `bounce`, `tempfail` or `slow` are refused for good, refused for now, or answered
late, so that an operator sees what Rolecast makes of it.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email import message_from_bytes
from email.errors import HeaderParseError, MessageError
from email.header import Header, decode_header, make_header
from email.message import Message
from pathlib import Path
from typing import Any, Final

from aiosmtpd.smtp import SMTP, Envelope, Session

from subscriptions.database import DatabaseUnusable
from worker.masking import MASKED, mask, pattern

LARGEST: Final = 12 * 1024 * 1024
#: Bytes of a mail: 5 MB of attachments grow by a third in base64.
STOP_SECONDS: Final = 5.0
LEFT_OUT: Final = "Left out here: this file goes with a mail that holds a signing link.\n"

LinkOf = Callable[[str], str | None]
"""From an event's ULID to its signing link, if it has one. May raise `DatabaseUnusable`."""

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS mails (
    id INTEGER PRIMARY KEY,
    at INTEGER NOT NULL,           -- microseconds UTC
    envelope_from TEXT NOT NULL,
    recipient TEXT NOT NULL,
    subject TEXT NOT NULL,
    message_id TEXT NOT NULL,
    event TEXT NOT NULL,           -- X-Rolecast-Event
    searched TEXT NOT NULL,        -- recipient, subject and text in one, case folded
    raw BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS mails_by_message_id ON mails (message_id);
"""
_COLUMNS: Final = "id, at, envelope_from, recipient, subject, message_id, event, length(raw)"


@dataclass(frozen=True, slots=True)
class Caught:
    """One caught mail, as the list shows it."""

    id: int
    at: int  # microseconds UTC
    envelope_from: str
    recipient: str  # the envelope's, which is who would have got it
    subject: str
    message_id: str
    event: str  # the event's ULID; empty where the mail is not ours
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Opened:
    """One caught mail, opened."""

    caught: Caught
    raw: bytes
    headers: tuple[tuple[str, str], ...]  # decoded, in order
    text: str
    html: str
    attachments: tuple[str, ...]  # their names

    def header(self, name: str) -> str:
        """The first header of that name, empty where there is none."""
        return next((value for found, value in self.headers if found.lower() == name.lower()), "")


class Inbox:
    """Catches mail from `start` to `stop`; may be read before and after. Keeps the last `keep` mails of its folder."""

    def __init__(self, folder: Path, *, keep: int = 10_000, slow_seconds: float = 5.0) -> None:
        self.keep = keep
        self.slow_seconds = slow_seconds
        self._path = folder / "inbox.db"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="inbox", daemon=True)
        self._server: asyncio.Server | None = None
        self._link_of: LinkOf | None = None
        folder.mkdir(parents=True, exist_ok=True)
        # One connection writes, on the server's thread; each reader opens its own.
        self._writer = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        self._writer.execute("PRAGMA journal_mode=WAL")
        self._writer.execute("PRAGMA synchronous=OFF")
        self._writer.executescript(_TABLE)

    def hide(self, link_of: LinkOf) -> None:
        """Mask signing links in every mail that is caught from now on; only the demonstration goes without."""
        self._link_of = link_of

    def start(self) -> tuple[str, int]:
        """Begin to catch mail on a free port of 127.0.0.1; returns host and port. Call it once."""
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def stop(self) -> None:
        """End; what was caught stays."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(STOP_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_SECONDS)
        self._loop.close()
        self._writer.close()

    def count(self) -> int:
        """How many mails are kept now."""
        with self._reading() as database:
            return int(database.execute("SELECT count(*) FROM mails").fetchone()[0])

    def mails(self, search: str = "", *, before: int | None = None, limit: int = 50) -> list[Caught]:
        """Caught mails, the newest first; `search` is looked for in recipient, subject and text.

        Every word of it must occur. `before` is the id of the last one of the page before.
        """
        conditions, values = (
            ["id < ?"],
            [
                before if before is not None else 2**62,
            ],
        )  # type: list[str], list[Any]
        for word in search.casefold().split():
            conditions.append("instr(searched, ?) > 0")
            values.append(word)
        query = f"SELECT {_COLUMNS} FROM mails WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?"  # noqa: S608 - fixed texts only
        with self._reading() as database:
            return [Caught(*row) for row in database.execute(query, (*values, limit))]

    def open(self, number: int) -> Opened | None:
        """The mail with that id; None where there is none (any more)."""
        with self._reading() as database:
            row = database.execute(f"SELECT {_COLUMNS}, raw FROM mails WHERE id = ?", (number,)).fetchone()  # noqa: S608 - fixed text
        return _opened(Caught(*row[:-1]), bytes(row[-1])) if row else None

    def find(self, message_ids: Iterable[str]) -> dict[str, int]:
        """The newest mail with each of these Message-IDs, as far as there is one."""
        wanted = [one for one in message_ids if one]
        marks = ",".join("?" * len(wanted))
        query = f"SELECT message_id, max(id) FROM mails WHERE message_id IN ({marks}) GROUP BY message_id"  # noqa: S608 - marks only
        with self._reading() as database:
            return dict(database.execute(query, wanted).fetchall())

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=10)) as database:
            yield database

    async def _listen(self) -> tuple[str, int]:
        self._server = await self._loop.create_server(self._protocol, "127.0.0.1", 0, backlog=256)
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    def _protocol(self) -> SMTP:
        # Naming ourselves spares aiosmtpd a look-up of this machine's name for each connection.
        return SMTP(self, data_size_limit=LARGEST, enable_SMTPUTF8=True, hostname="inbox.test", ident="Rolecast inbox",
                    loop=self._loop)  # fmt: skip

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    # ------------------------------------------------------------ aiosmtpd's hooks

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """Answer RCPT TO, with the faults that an address asks for."""
        fault = fault_of(address)
        if fault == "bounce":
            return "550 5.1.1 no such mailbox: addresses that begin with bounce have none"
        if fault == "tempfail":
            return "451 4.2.1 mailbox busy: addresses that begin with tempfail always are"
        if fault == "slow":
            await asyncio.sleep(self.slow_seconds)
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's name
        """Keep the mail, once for each recipient."""
        raw = envelope.content if isinstance(envelope.content, bytes) else b""
        try:
            raw = self._without_link(raw)
        except DatabaseUnusable:
            return "451 4.3.0 the ledger can't be asked now whether this mail holds a signing link"
        for recipient in envelope.rcpt_tos:
            self._keep(envelope.mail_from or "", recipient, raw)
        return "250 2.0.0 caught"

    def _without_link(self, raw: bytes) -> bytes:
        if self._link_of is None:
            return raw
        event = str(message_from_bytes(raw)["x-rolecast-event"] or "").strip()
        link = self._link_of(event) if event else None
        return masked(raw, link) if link else raw

    def _keep(self, envelope_from: str, recipient: str, raw: bytes) -> None:
        message = message_from_bytes(raw)
        subject, text, _ = decoded(message["subject"]), *_bodies(message)
        searched = "\n".join((recipient, decoded(message["to"]), subject, text)).casefold()
        number = self._writer.execute(
            "INSERT INTO mails (at, envelope_from, recipient, subject, message_id, event, searched, raw)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
            (
                time.time_ns() // 1000, envelope_from, recipient, subject, str(message["message-id"] or "").strip(),
                str(message["x-rolecast-event"] or "").strip(), searched, raw,
            ),
        ).fetchone()[0]  # fmt: skip
        if number % 100 == 0:
            self._writer.execute("DELETE FROM mails WHERE id <= ?", (number - self.keep,))


def fault_of(address: str) -> str | None:
    """Which fault an address asks for: bounce, tempfail or slow; None for every other."""
    local, _, domain = address.lower().rpartition("@")
    if not domain.endswith(".test"):
        return None
    return next((fault for fault in ("bounce", "tempfail", "slow") if local.startswith(fault)), None)


def masked(raw: bytes, link: str) -> bytes:
    """A mail with the link masked in its headers and texts; files that can't be looked through are left out."""
    message = message_from_bytes(raw)
    for part in message.walk():
        for name, value in part.items():
            if pattern(link).search(decoded(value)):
                part.replace_header(name, Header(mask(decoded(value), link), "utf-8").encode())
        if part.is_multipart():
            continue
        text = mask(_content(part), link, instead=MASKED) if part.get_content_maintype() == "text" else LEFT_OUT
        del part["Content-Transfer-Encoding"]
        part["Content-Transfer-Encoding"] = "8bit"
        if part.get_content_maintype() == "text":
            part.set_param("charset", "utf-8")
        part.set_payload(text.encode().decode("ascii", "surrogateescape"))
    return re.sub(rb"\r?\n", b"\r\n", message.as_bytes())


def decoded(value: Any) -> str:
    """A header as people read it; as it stands where its encoding is broken."""
    if value is None:
        return ""
    unfolded = re.sub(r"\r?\n[ \t]*", " ", str(value))
    try:
        return str(make_header(decode_header(unfolded)))
    except (HeaderParseError, MessageError, LookupError, UnicodeError, ValueError):
        return unfolded


def _opened(caught: Caught, raw: bytes) -> Opened:
    message = message_from_bytes(raw)
    text, html = _bodies(message)
    return Opened(
        caught=caught,
        raw=raw,
        headers=tuple((name, decoded(value)) for name, value in message.items()),
        text=text,
        html=html,
        attachments=tuple(decoded(part.get_filename()) for part in message.walk() if part.get_filename()),
    )


def _bodies(message: Message) -> tuple[str, str]:
    """The first text part and the first HTML part that are no attachments."""
    text = html = ""
    for part in message.walk():
        kind = part.get_content_type()
        if part.is_multipart() or part.get_filename() or kind not in {"text/plain", "text/html"}:
            continue
        if kind == "text/plain" and not text:
            text = _content(part)
        elif kind == "text/html" and not html:
            html = _content(part)
    return text, html


def _content(part: Message) -> str:
    payload = part.get_payload(decode=True)
    raw = payload if isinstance(payload, bytes) else b""
    try:
        return raw.decode(part.get_content_charset("utf-8"), "replace")
    except LookupError:
        return raw.decode("utf-8", "replace")
