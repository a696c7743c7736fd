"""Mail to `ROLECAST_OPERATORS` about what needs a person: grouped, each thing once, an end where something is over.

It owns the table `notices`. One row is one notice; what it told stands in it, so that nothing is told twice whichever
worker makes the next one. Of any number of workers one makes a notice (its number is the one behind the last, and only
one can insert it) and sends it; where that worker vanished, another sends the same one again, under the same
Message-ID. The path:

    prepare     what stands now, against what was told: a row, claimed; None where there is nothing to tell
    envelopes   one mail for each operator
    tell        hands them over, in the urgent lane
    sent        records the relay's answer;  give_back where nothing was handed over

A notice names events and counts, and no recipient. Nothing is sent without `ROLECAST_OPERATORS` and `ROLECAST_SENDER`,
nor under `ROLECAST_DELIVERY=test`; under `team` only to operators who belong to the team.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime, parseaddr
from typing import Any, Final

from sqlalchemy import Connection, delete, select, update

from subscriptions.addresses import normalise
from subscriptions.database import Database, insert_into
from worker import logs, mime, standing
from worker.history import moment
from worker.ledger import Lane
from worker.relay import Envelope, Kind, Outcome, RelayError, Relays, RelayUnavailable
from worker.sandbox import environment, shipped_templates
from worker.schema import notices, troubles
from worker.settings import Settings, domain_of
from worker.standing import Matter, counted

logger = logs.get(__name__)

CLAIM_SECONDS: Final = 300
#: So long a worker may take to hand a notice over before another does.
EVERY_SECONDS: Final = 600
#: Between two notices.
_CLAIM: Final = CLAIM_SECONDS * 1_000_000
_EVERY: Final = EVERY_SECONDS * 1_000_000
MOST_SUBJECT: Final = 150
TEMPLATE: Final = "_operators/notice.txt"
FORGOTTEN_SECONDS: Final = 3600
#: Troubles that nobody reported for so long are swept away.

_Told = Mapping[str, Sequence[Any]]
"""What was told: matter -> [ever, overdue, brief words]; brief is empty where its end is not worth telling."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A notice that this worker is to send."""

    id: int
    made_at: int
    subject: str
    body: str
    claimed_until: int


def prepare(database: Database, settings: Settings, worker: int, *, now: int) -> Notice | None:
    """The notice that this worker is to send now, claimed for `CLAIM_SECONDS`; None where there is none.

    It looks in a reading transaction, so that nobody who writes waits for it. Raises `DatabaseUnusable`.
    """
    if not recipients(settings):
        return None
    with database.read() as connection:
        last = connection.execute(select(notices).order_by(notices.c.id.desc()).limit(1)).one_or_none()
        if last is not None and now < (last.claimed_until if last.sent_at is None else last.sent_at + _EVERY):
            return None
        found = [] if _is_unsent(last) else standing.look(connection, settings, now=now)
    if _is_unsent(last):
        with database.write() as connection:
            return _take_over(connection, last, now=now)
    told: _Told = json.loads(last.told) if last is not None else {}
    news = [one for one in found if _is_new(one, told)]
    ended = _ended(told, found)
    if not ended and not any(one.alone for one in news):
        return None
    subject, body = _written(found, news, ended, told, host=settings.public_host)
    notice = Notice(last.id + 1 if last is not None else 1, now, subject, body, now + _CLAIM)
    with database.write() as connection:
        connection.execute(delete(troubles).where(troubles.c.seen_at < now - FORGOTTEN_SECONDS * 1_000_000))
        if not _insert(connection, notice, found):
            return None  # another worker made this one
    logger.info("notice.prepared", notice=notice.id, worker=worker, subject=subject)
    return notice


def _is_unsent(last: Any) -> bool:
    return last is not None and last.sent_at is None


def _insert(connection: Connection, notice: Notice, found: Iterable[Matter]) -> bool:
    """Store a notice with all that stands; of several workers one can, for its number is the next one."""
    statement = insert_into(connection, notices).values(
        id=notice.id,
        made_at=notice.made_at,
        subject=notice.subject,
        body=notice.body,
        told=json.dumps({one.key: [one.ever, one.overdue, one.brief if one.lasts else ""] for one in found}),
        claimed_until=notice.claimed_until,
    )
    made = statement.on_conflict_do_nothing(index_elements=["id"]).returning(notices.c.id)
    return connection.execute(made).one_or_none() is not None


def _take_over(connection: Connection, last: Any, *, now: int) -> Notice | None:
    """An unsent notice whose worker had its time; by compare-and-set, so that one takes it."""
    claimed_until = now + _CLAIM
    taken = connection.execute(
        update(notices)
        .where(notices.c.id == last.id, notices.c.sent_at.is_(None), notices.c.claimed_until == last.claimed_until)
        .values(claimed_until=claimed_until)
    ).rowcount
    return Notice(last.id, last.made_at, last.subject, last.body, claimed_until) if taken else None


def recipients(settings: Settings) -> tuple[str, ...]:
    """The operators who may be mailed now."""
    if settings.delivery == "test" or not settings.sender:
        return ()
    if settings.delivery == "team":
        return tuple(one for one in settings.operators if normalise(one) in settings.team)
    return settings.operators


# ---------------------------------------------------------------- what is new, and how it is told


def _is_new(matter: Matter, told: _Told) -> bool:
    """Whether there is more of a matter than was told, or some of it became overdue."""
    ever, overdue, _ = told.get(matter.key, (-1, 0, ""))
    return bool(matter.ever > ever or matter.overdue > overdue)


def _ended(told: _Told, found: Iterable[Matter]) -> list[str]:
    """What was told and is over; what merely grew old is not."""
    stand = {one.key for one in found}
    return [brief for key, (_, _, brief) in told.items() if brief and key not in stand]


def _written(
    found: Sequence[Matter], news: Sequence[Matter], ended: Sequence[str], told: _Told, *, host: str
) -> tuple[str, str]:
    """Subject and text; `host` is which installation it is about."""
    still = [one.brief for one in found if one.alone and one not in news]
    body = (
        environment((shipped_templates(),), filters={})
        .get_template(TEMPLATE)
        .render(
            alone=any(one.alone for one in news),
            matters=[_shown(one, told) for one in news],
            ended=[_printable(one) for one in ended],
            still=[_printable(one) for one in still],
            minutes=EVERY_SECONDS // 60,
        )
    )
    clear = "" if still else "all clear, "
    said = ", ".join(_briefly(news)) or clear + ", ".join(f"{one} no more" for one in ended)
    urgent = ", urgent" if any(one.urgent for one in news) else ""
    return _header_text(f"Rolecast at {host}{urgent}: {said}"), body


def _header_text(text: str) -> str:
    """What can stand in a header as it is: one line of ASCII, not too long, nothing that reads as an encoded word."""
    plain = " ".join(_printable(text).encode("ascii", "replace").decode().replace("=?", "= ?").split())
    return plain if len(plain) <= MOST_SUBJECT else plain[: MOST_SUBJECT - 4] + " ..."


def _briefly(news: Sequence[Matter]) -> list[str]:
    """The matters in some words each, those of one head together: `12 mails are held`."""
    groups: dict[tuple[str, str], list[Matter]] = {}
    for one in news:
        if one.alone:
            groups.setdefault((one.head, one.noun), []).append(one)
    return [
        counted(head, sum(one.count for one in ones), noun, at_least=any(one.at_least for one in ones))
        for (head, noun), ones in groups.items()
    ]


def _shown(matter: Matter, told: _Told) -> dict[str, object]:
    """A matter as the template sees it."""
    before = told.get(matter.key)
    fresh = matter.ever - before[0] if before is not None else 0
    events = ", ".join(matter.events) + (f" and {matter.more:,} more" if matter.more else "")
    return {
        "title": _printable(matter.title),
        "new": f"{fresh:,} new since the last notice" if fresh > 0 else "",
        "since": moment(matter.since) or "",
        "events": events,
        "what_to_do": _printable(matter.what_to_do),
        "urgent": matter.urgent,
    }


def _printable(text: str) -> str:
    """One line without control characters: relays and feeds have their words in it."""
    return "".join(letter if letter.isprintable() else " " for letter in logs.masked(text))


# ---------------------------------------------------------------- the mails


def envelopes(notice: Notice, settings: Settings) -> list[Envelope]:
    """The notice as mails, one for each operator; the same bytes whoever makes them."""
    sender = settings.sender or ""
    return [_envelope(notice, sender, one) for one in recipients(settings)]


def _envelope(notice: Notice, sender: str, recipient: str) -> Envelope:
    """Written out: every header is ASCII of ours but for an operator's own address."""
    address = mime.wire_address(parseaddr(sender)[1])
    to = mime.wire_address(recipient)
    body, encoding = mime.encoded_body(notice.body)
    made = datetime.fromtimestamp(notice.made_at // 1_000_000, UTC)
    head = (
        f"From: Rolecast <{address}>",
        f"To: {to}",
        "Subject: " + "\r\n ".join(textwrap.wrap(notice.subject, 68)),
        f"Date: {format_datetime(made)}",
        f"Message-ID: {message_id(notice, sender, recipient)}",
        "Auto-Submitted: auto-generated",
        "MIME-Version: 1.0",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Transfer-Encoding: {encoding.decode()}",
    )
    written = "\r\n".join(head).encode() + b"\r\n\r\n" + body
    return Envelope(sender=address, recipient=to, body=written, smtputf8=mime.needs_smtputf8(recipient))


def message_id(notice: Notice, sender: str, recipient: str) -> str:
    """The Message-ID of a notice to an operator, the same however often it is handed over."""
    who = hashlib.sha256(normalise(recipient).encode()).hexdigest()[:12]
    return f"<notice.{notice.id}.{notice.made_at}.{who}@{domain_of(sender)}>"


async def tell(relays: Relays, mails: Sequence[Envelope]) -> str:
    """Hand the mails over by a relay that can be used now; returns what it said.

    Lives on the event loop of the relays. Raises `RelayError` where no mail was taken: nobody has been told. A mail
    whose answer was lost counts as told: twice would be worse than late.
    """
    outcomes: dict[int, Outcome] = {}
    relay = relays.choose()
    failed: RelayError | None = None
    try:
        await relay.send(mails, lane=int(Lane.URGENT), done=outcomes.__setitem__)
    except RelayError as error:
        failed = error
    said = "; ".join(dict.fromkeys(one.reply for one in outcomes.values()))
    taken = sum(one.kind in {Kind.ACCEPTED, Kind.UNKNOWN} for one in outcomes.values())
    if taken:
        return f"{relay.name}: {taken} of {len(mails)} taken: {said}"
    if failed is not None:
        raise failed
    message = f"the relay {relay.name} took no notice to operators ({said})"
    raise RelayUnavailable(message)


def sent(connection: Connection, notice: Notice, reply: str, *, now: int) -> None:
    """Record that a notice was handed over."""
    connection.execute(
        update(notices).where(notices.c.id == notice.id, notices.c.sent_at.is_(None)).values(sent_at=now, reply=reply)
    )
    logger.info("notice.sent", notice=notice.id, subject=notice.subject, reply=reply)


def give_back(connection: Connection, notice: Notice) -> None:
    """Nothing of a notice was handed over: it is forgotten, and the next one tells things as they stand then."""
    connection.execute(
        delete(notices).where(
            notices.c.id == notice.id, notices.c.sent_at.is_(None), notices.c.claimed_until == notice.claimed_until
        )
    )
