"""What needs a person now: one list for `doctor`, `events matters`, the operators' page, `/readyz` and the notices.

It reads what happened (`worker.matters`) against the ledger as it is, and drops what somebody has dealt with since.
Held mail stands for as long as it is held, failed mail and accounts in which nobody could be told for `RECENT_DAYS`.
Cheap at any size: an event whose tallies say that nothing is held or failed is not looked into, one whose tallies agree
with what was noted neither, and of the others at most `LOOKED_INTO` deliveries are read in all; larger ones are told by
the smaller of both numbers. Reading changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, case, func, select

from subscriptions.directory import among
from worker import matters
from worker.history import moment
from worker.ledger import NEVER, Lane, Status
from worker.schema import deliveries, events, pauses, slices, tallies, troubles, workers
from worker.schema import matters as noted
from worker.settings import Settings

NAMED: Final = 5
#: Events that are named before the rest is counted.
RECENT_DAYS: Final = 7
#: How long a failure is told of; nobody can mend it later than that, or has decided not to.
OVERDUE_SECONDS: Final = 86_400
#: After that an unknown outcome is urgent: relays keep their logs for days, not for weeks.
SEEN_SECONDS: Final = 180
#: A trouble that its worker reported longer ago does not stand.
PASSING_SECONDS: Final = 15
#: A trouble that is younger may pass by itself: a relay that closed its connections, a queue that restarts.
NO_WORKER_SECONDS: Final = 60
#: Due work may wait so long without any worker before a person is asked.
LOOKED_INTO: Final = 250_000
#: Deliveries that are read in all to count what the tallies leave in doubt.
MOST_PAIRS: Final = 5_000
#: Pairs of event and reason that are looked at, the latest first: of held mail, of what else needs a person, and of
#: what is told along. Where there are more the count says "at least".
MOST_WAITING: Final = 5_000
#: Waiting mails and held events are counted up to here.


@dataclass(frozen=True, slots=True)
class Matter:
    """One thing that needs a person, or (where not `alone`) that is told together with such things."""

    kind: str  # the reason of the mails, or what is amiss: relay, queue, feed, disk, pause, no_relay, no_worker
    name: str  # which one: HOST:PORT, a class; empty where there is only one
    head: str  # what it is in some words, with {n} for how many
    tail: str  # what is behind it
    what_to_do: str
    count: int = 1
    noun: str = "mail"
    since: int | None = None  # microseconds UTC
    events: tuple[str, ...] = ()  # ULIDs, the longest waiting first
    more: int = 0  # events beyond those
    urgent: bool = False
    alone: bool = True
    lasts: bool = True  # its end is worth telling; a failure just grows old
    overdue: int = 0  # of `count`, those that have waited for more than a day
    ever: int = 0  # a number that grows with each new one and never falls
    at_least: bool = False  # there are more than were counted

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return f"{self.kind} {self.name}".strip()

    @property
    def brief(self) -> str:
        """It in some words: `12 mails are held`."""
        return counted(self.head, self.count, self.noun, at_least=self.at_least)

    @property
    def title(self) -> str:
        """It in a sentence without its full stop."""
        late = f"; {self.overdue:,} for more than a day" if self.overdue else ""
        return f"{self.brief}: {self.tail}{late}" if self.tail else self.brief + late

    def to_json(self) -> dict[str, Any]:
        """The matter as JSON values."""
        return {
            "kind": self.kind,
            "name": self.name or None,
            "title": self.title,
            "count": self.count,
            "at_least": self.at_least,
            "since": moment(self.since),
            "events": list(self.events),
            "more_events": self.more,
            "what_to_do": self.what_to_do,
            "urgent": self.urgent,
            "needs_person": self.alone,
        }


def counted(head: str, count: int, noun: str, *, at_least: bool = False) -> str:
    """A head with its number: `{n} {are} held` becomes `1 mail is held` or `12 mails are held`."""
    many = count != 1
    number = f"{'at least ' if at_least else ''}{count:,} {noun}{'s' if many else ''}"
    return head.format(n=number, are="are" if many else "is")


def look(connection: Connection, settings: Settings, *, now: int, quick: bool = False) -> list[Matter]:
    """What needs a person at `now` (microseconds UTC), the urgent first.

    `quick`, for who asks often and may not wait: the same things, counted less far.
    """
    living = _living(connection, settings, now=now)
    found = [
        *_mails(connection, now=now, effort=_QUICK if quick else _THOROUGH),
        *_held_events(connection),
        *_troubles(connection, [worker.id for worker in living], now=now),
        *_pauses(connection),
        *_waiting(connection),
        *_idle(connection, settings, living, now=now),
    ]
    return sorted(found, key=lambda one: (not one.urgent, not one.alone))


# ---------------------------------------------------------------- mails and accounts


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is told of a reason."""

    status: Status | None  # of the deliveries; None where it is about accounts
    tail: str
    what_to_do: str
    alone: bool = True

    @property
    def head(self) -> str:
        """Before the number is filled in."""
        heads = {Status.HELD: "{n} {are} held", Status.FAILED: "{n} failed", None: "nobody could be told in {n}"}
        return heads[self.status]


_RETRY: Final = "`rolecast deliveries retry EVENT`"
_RELEASE: Final = "`rolecast deliveries release EVENT --reason {}`"
_FAILED_LIST: Final = "`rolecast deliveries list EVENT --status failed` shows the relay's words"
_KINDS: Final[Mapping[str, _Kind]] = {
    "unknown": _Kind(
        Status.HELD,
        "the relay's answer was lost, so nobody knows whether they went out",
        "look in the relay's log for the Message-IDs that `rolecast deliveries list EVENT --status held --reason "
        "unknown` shows, then `rolecast deliveries settle EVENT --accepted` or `--failed`",
    ),
    "restored": _Kind(
        Status.HELD,
        "the database was restored, and they may have gone out after the backup",
        "look in the relay's log for the Message-IDs that `rolecast deliveries list EVENT --status held --reason "
        "restored` shows, then `rolecast deliveries settle EVENT --accepted` or `--failed` for those it tells of "
        "(`-n N`), and `rolecast deliveries release EVENT --reason restored` for the others",
    ),
    "sender_refused": _Kind(
        Status.HELD,
        "the relay does not take our sender",
        f"correct the sender or the relay, then {_RELEASE.format('sender_refused')}",
    ),
    "cannot_be_rendered": _Kind(
        Status.HELD,
        "the template could not be filled in",
        f"mend the template, look at it with `rolecast templates check`, then {_RELEASE.format('cannot_be_rendered')}",
    ),
    "given_up": _Kind(Status.FAILED, "given up after many attempts", f"once the reason is gone, {_RETRY}"),
    "content_refused": _Kind(Status.FAILED, "the relay refused the content", f"{_FAILED_LIST}; then {_RETRY}"),
    "policy_refused": _Kind(Status.FAILED, "the relay refused them by its policy", f"{_FAILED_LIST}; then {_RETRY}"),
    "recipient_refused": _Kind(
        Status.FAILED,
        "the relay refused the address for good",
        "correct the addresses in the directory; `rolecast deliveries list EVENT --status failed` shows them",
        alone=False,
    ),
    matters.NOBODY: _Kind(
        None,
        "no contact should get it, can be reached and wants it",
        "`rolecast why EVENT ACCOUNT/CONTACT` tells why; give somebody the role, or mend an address",
    ),
    matters.NOBODY_INTERESTED: _Kind(
        None,
        "no contact gets promotional and informational mail, can be reached and wants it",
        "`rolecast why EVENT ACCOUNT/CONTACT` tells why",
        alone=False,
    ),
}
_ALONG: Final = frozenset(reason for reason, kind in _KINDS.items() if not kind.alone)
_GROUPS: Final = (matters.HELD, (matters.FAILED | {matters.NOBODY}) - _ALONG, _ALONG)
#: What is looked at separately, so that much of the one hides nothing of the other.


@dataclass(slots=True)
class _Pair:
    """An event and a reason, as noted, then as it stands."""

    event: int
    reason: str
    ever: int
    first_at: int
    last_at: int
    ulid: str = ""
    count: int = 0
    overdue: int = 0


@dataclass(frozen=True, slots=True)
class _Counts:
    """What the ledger says of the events that were noted."""

    tallies: Mapping[tuple[int, Status], int]
    noted: Mapping[tuple[int, Status], int]
    exact: Mapping[tuple[int, str], Any] = field(default_factory=dict)
    looked_into: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class _Effort:
    """How far is counted."""

    pairs: int
    deliveries: int


_THOROUGH: Final = _Effort(MOST_PAIRS, LOOKED_INTO)
_QUICK: Final = _Effort(MOST_PAIRS // 20, LOOKED_INTO // 20)


def _mails(connection: Connection, *, now: int, effort: _Effort) -> Iterator[Matter]:
    """What stands of the mails and accounts that were noted, by reason."""
    pairs, more = _noted(connection, now=now, most=effort.pairs)
    if not pairs:
        return
    heads = _heads(connection, {pair.event for pair in pairs})
    counts = _counted_in_the_ledger(connection, pairs, heads, now=now, room=effort.deliveries)
    by_reason: dict[str, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.event in heads and pair.reason in _KINDS:
            pair.ulid = heads[pair.event].ulid
            _count(pair, counts, now=now)
            if pair.count:
                by_reason[pair.reason].append(pair)
    ever = _ever(connection) if by_reason else {}
    for reason in _KINDS:
        if reason in by_reason:
            yield _matter(reason, by_reason[reason], ever.get(reason, 0), at_least=reason in more)


def _noted(connection: Connection, *, now: int, most: int) -> tuple[list[_Pair], set[str]]:
    """What was noted, and the reasons of which there is more than that."""
    recent = now - RECENT_DAYS * 86_400_000_000
    latest = func.max(noted.c.last_at)
    pairs: list[_Pair] = []
    more: set[str] = set()
    for group in _GROUPS:
        query = (
            select(noted.c.event_id, noted.c.reason, func.sum(noted.c.n), func.min(noted.c.first_at), latest)
            .where(noted.c.reason.in_(sorted(group)))
            .group_by(noted.c.event_id, noted.c.reason)
            .order_by(latest.desc())
            .limit(most)
        )
        rows = connection.execute(query if group is matters.HELD else query.where(noted.c.last_at >= recent)).all()
        pairs += [_Pair(event, reason, int(ever), first, last) for event, reason, ever, first, last in rows]
        if len(rows) == most:
            more |= group
    return pairs, more


def _ever(connection: Connection) -> dict[str, int]:
    rows = connection.execute(select(noted.c.reason, func.sum(noted.c.n)).group_by(noted.c.reason))
    return {reason: int(count) for reason, count in rows}


def _heads(connection: Connection, numbers: Iterable[int]) -> dict[int, Any]:
    """ULID and size by number."""
    columns = (events.c.id, events.c.ulid, events.c.next_n)
    rows = connection.execute(select(*columns).where(among(connection, events.c.id, numbers)))
    return {row.id: row for row in rows}


def _counted_in_the_ledger(
    connection: Connection, pairs: Sequence[_Pair], heads: Mapping[int, Any], *, now: int, room: int
) -> _Counts:
    """The tallies of these events, and the deliveries of those whose tallies leave a doubt, as far as they are few."""
    expected: dict[tuple[int, Status], int] = defaultdict(int)
    for pair in pairs:
        status = Status.FAILED if pair.reason in matters.FAILED else Status.HELD
        if pair.reason in matters.HELD | matters.FAILED:
            expected[pair.event, status] += pair.ever
    rows = connection.execute(
        select(tallies.c.event_id, tallies.c.status, func.sum(tallies.c.n))
        .where(among(connection, tallies.c.event_id, {event for event, _ in expected}))
        .where(tallies.c.status.in_([int(Status.HELD), int(Status.FAILED)]))
        .group_by(tallies.c.event_id, tallies.c.status)
    )
    found = {(event, Status(status)): int(count) for event, status, count in rows}
    late = now - OVERDUE_SECONDS * 1_000_000
    doubtful = {key[0] for key, count in expected.items() if found.get(key, 0) > 0 and found[key] != count}
    doubtful |= {pair.event for pair in pairs if pair.reason == "unknown" and pair.first_at < late <= pair.last_at}
    chosen = set()
    for number in sorted(doubtful & set(heads), key=lambda one: int(heads[one].next_n)):
        room -= heads[number].next_n
        if room < 0:
            break
        chosen.add(number)
    exact = _exactly(connection, chosen, late=late) if chosen else {}
    return _Counts(found, expected, exact, frozenset(chosen))


def _exactly(connection: Connection, chosen: Iterable[int], *, late: int) -> dict[tuple[int, str], Any]:
    overdue = func.sum(case((deliveries.c.settled_at < late, 1), else_=0))
    rows = connection.execute(
        select(
            deliveries.c.event_id,
            deliveries.c.reason,
            func.count().label("standing"),
            func.min(deliveries.c.settled_at).label("since"),
            overdue.label("overdue"),
        )
        .where(among(connection, deliveries.c.event_id, chosen))
        .where(deliveries.c.status.in_([int(Status.HELD), int(Status.FAILED)]))
        .group_by(deliveries.c.event_id, deliveries.c.reason)
    )
    return {(row.event_id, row.reason): row for row in rows}


def _count(pair: _Pair, counts: _Counts, *, now: int) -> None:
    """How many of a pair stand, since when, and how many of them are overdue."""
    status = _KINDS[pair.reason].status
    if status is None:
        pair.count = pair.ever
        return
    late = now - OVERDUE_SECONDS * 1_000_000
    tally = counts.tallies.get((pair.event, status), 0)
    if tally <= 0:
        return
    if pair.event in counts.looked_into:
        row = counts.exact.get((pair.event, pair.reason))
        if row is not None:
            pair.count, pair.first_at, pair.overdue = row.standing, row.since or pair.first_at, int(row.overdue)
        return
    pair.count = min(pair.ever, tally)
    pair.overdue = pair.count if pair.last_at < late else 0


def _matter(reason: str, pairs: list[_Pair], ever: int, *, at_least: bool) -> Matter:
    kind = _KINDS[reason]
    pairs.sort(key=lambda pair: (pair.first_at, pair.event))
    overdue = sum(pair.overdue for pair in pairs) if reason == "unknown" else 0
    named = tuple(pair.ulid for pair in pairs[:NAMED])
    return Matter(
        kind=reason,
        name="",
        head=kind.head,
        tail=kind.tail,
        what_to_do=_for_event(kind.what_to_do, named),
        count=sum(pair.count for pair in pairs),
        noun="mail" if kind.status is not None else "account",
        since=pairs[0].first_at,
        events=named,
        more=max(0, len(pairs) - NAMED),
        urgent=overdue > 0,
        alone=kind.alone,
        lasts=kind.status is Status.HELD,
        overdue=overdue,
        ever=ever,
        at_least=at_least,
    )


def _for_event(what_to_do: str, named: Sequence[str]) -> str:
    """The command itself where only one event is meant."""
    return what_to_do.replace("EVENT", named[0]) if len(named) == 1 else what_to_do


# ---------------------------------------------------------------- events, workers, pauses


def _held_events(connection: Connection) -> Iterator[Matter]:
    """Events that could not be planned."""
    rows = connection.execute(
        select(events.c.id, events.c.ulid, events.c.accepted_at)
        .where(events.c.status == "held")
        .order_by(events.c.id)
        .limit(MOST_WAITING)
    ).all()
    if rows:
        named = tuple(row.ulid for row in rows[:NAMED])
        yield Matter(
            "event_held", "", "{n} {are} held", "they could not be planned",
            _for_event("read `event.held` in the log, mend the cause, then `rolecast events retry EVENT`; or "
                       "`rolecast events cancel EVENT`", named),
            count=len(rows), noun="event", since=min(row.accepted_at for row in rows), events=named,
            more=max(0, len(rows) - NAMED), ever=max(row.id for row in rows),
        )  # fmt: skip


TROUBLES: Final[Mapping[str, tuple[str, str, bool]]] = {  # what is told, what to do, whether it is urgent
    "relay": ("relay {name} is down", "`rolecast doctor` tries it; mail waits or goes by another relay", True),
    "queue": (
        "the queue {name} is down",
        "start it, or correct ROLECAST_BROKER_URL; events are accepted, and nothing is lost meanwhile",
        True,
    ),
    "feed": (
        "the status page's feed can't be read",
        "`rolecast status-page show` tries it; outages are answered with the page alone",
        False,
    ),
    "disk": ("the disk is nearly full", "make room, before events are refused", True),
}


def _living(connection: Connection, settings: Settings, *, now: int) -> Sequence[Any]:
    """The workers that have said that they live for twice the lease."""
    since = now - 2 * settings.lease_seconds * 1_000_000
    return connection.execute(select(workers.c.id, workers.c.lanes).where(workers.c.beat_at >= since)).all()


def _troubles(connection: Connection, living: Sequence[int], *, now: int) -> Iterator[Matter]:
    """What living workers report, each thing once."""
    rows = connection.execute(
        select(troubles)
        .where(troubles.c.seen_at >= now - SEEN_SECONDS * 1_000_000, among(connection, troubles.c.owner, living))
        .where(troubles.c.since_at <= now - PASSING_SECONDS * 1_000_000)
        .order_by(troubles.c.kind, troubles.c.name, troubles.c.since_at)
    ).all()
    told: set[tuple[str, str]] = set()
    for row in rows:
        if (row.kind, row.name) not in told and row.kind in TROUBLES:
            told.add((row.kind, row.name))
            head, what_to_do, urgent = TROUBLES[row.kind]
            sentence = " ".join(head.format(name=row.name).split())
            yield Matter(
                row.kind, row.name, _plain(sentence), row.why, what_to_do, since=row.since_at, urgent=urgent
            )  # fmt: skip


def _plain(head: str) -> str:
    """A head without a number in it: its braces mean themselves."""
    return head.replace("{", "{{").replace("}", "}}")


def _pauses(connection: Connection) -> Iterator[Matter]:
    """What Rolecast paused by itself; what a person paused is as that person wants it."""
    rows = connection.execute(select(pauses).where(pauses.c.by.like("rolecast:%")))
    for row in rows:
        what = f"{row.scope} {row.value}".strip()
        option = f" --{row.scope} {row.value}" if row.value else ""
        yield Matter(
            "pause", what, _plain(f"{what} is paused"), f"Rolecast paused it by itself ({row.by.partition(':')[2]})",
            f"see to the cause, then `rolecast resume{option}`", since=row.at, urgent=True,
        )  # fmt: skip


_WAITS: Final = {
    "no_sender": ("no sender is configured for them", "set ROLECAST_SENDER and start the worker again"),
    "no_https": (
        "they may be opted out of, and the link for that could not work",
        "set ROLECAST_PUBLIC_URL to an https address and start the worker again",
    ),
}


def _waiting(connection: Connection) -> Iterator[Matter]:
    """Planned mails that wait for a setting; those that are paused wait as somebody wants it."""
    page = (
        select(deliveries.c.reason, deliveries.c.event_id)
        .where(deliveries.c.due_at == NEVER)
        .limit(MOST_WAITING)
        .subquery()
    )
    rows = connection.execute(
        select(page.c.reason, events.c.ulid, func.count(), events.c.accepted_at)
        .join(events, events.c.id == page.c.event_id)
        .where(page.c.reason.in_(list(_WAITS)))
        .group_by(page.c.reason, events.c.ulid, events.c.accepted_at)
        .order_by(events.c.accepted_at)
    ).all()
    for reason, (tail, what_to_do) in _WAITS.items():
        found = [(ulid, count, at) for why, ulid, count, at in rows if why == reason]
        if found:
            yield Matter(
                reason, "", "{n} {are} waiting", tail, what_to_do, count=sum(count for _, count, _ in found),
                since=found[0][2], events=tuple(ulid for ulid, _, _ in found[:NAMED]),
                more=max(0, len(found) - NAMED),
            )  # fmt: skip


def _idle(connection: Connection, settings: Settings, living: Sequence[Any], *, now: int) -> Iterator[Matter]:
    """Work that is due, and nobody who could do it."""
    if any(worker.lanes for worker in living):
        return
    due = oldest_due(connection, now=now)
    if not due or min(due.values()) > now - NO_WORKER_SECONDS * 1_000_000:
        return
    since = min(due.values())
    if not settings.relay_urls:
        yield Matter(
            "no_relay", "", "mail is waiting", "no relay is configured", "set ROLECAST_RELAY_URLS", since=since,
            urgent=True,
        )  # fmt: skip
    else:
        yield Matter(
            "no_worker",
            "",
            "mail is waiting",
            "no worker is at work",
            "start `rolecast work`",
            since=since,
            urgent=True,
        )


def oldest_due(connection: Connection, *, now: int) -> dict[Lane, int]:
    """Since when the oldest slice of each lane is due, microseconds UTC; lanes where nothing is due are left out."""
    found = {}
    for lane in Lane:
        at = connection.execute(
            select(slices.c.due_at)
            .where(slices.c.lane == int(lane), slices.c.done_at.is_(None), slices.c.due_at <= now)
            .order_by(slices.c.due_at)
            .limit(1)
        ).scalar()
        if at is not None:
            found[lane] = int(at)
    return found
