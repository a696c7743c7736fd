"""The ledger: what is owed, to whom, and what became of it. It is the truth; every queue is only a hint.

It owns events, deliveries, slices, flights and tallies of `worker.schema`. Promises:

- One delivery per (event, mailbox), for life: unique in the database.
- A slice is claimed by compare-and-set (owner, epoch); whoever lost it records acceptances only, however late.
- A flight names the mails that may have left; it is committed before its first byte (the hold class: before its last).
- Deliveries are written when planned and when settled. "sending" is read from open flights.
- Tallies are changes per worker; their sums are the counts.

Statuses of a delivery:  planned -> accepted | failed | cancelled | expired | held;  planned with `due_at` = deferred.
Statuses of an event:    accepted -> planning -> sending -> done;  held;  cancelled;  redirected.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Connection,
    bindparam,
    func,
    select,
    update,
)

from subscriptions.bulk import read_columns, run
from subscriptions.schema import installation
from worker import matters
from worker.schema import deliveries, events, flights, slices, tallies

NEVER = 2**62
#: A `due_at` that waits for a person: a pause, a missing https address, a missing sender.

SLICE_SIZE = 512
#: Deliveries that travel as one queue message.

NO_WORKER = 0
#: The owner of changes of counts that no worker made: those of publishers and people.

CANCELLED = "event_cancelled"
#: The reason of mails that were withdrawn with their event.

HOLD_CLASS = "transactional"
#: A flight there is one mail, and an unknown outcome is held until a person or a bounce settles it (principle 6).


class Lane(IntEnum):
    """Which queue and connections a slice travels by."""

    URGENT = 0  # approval, security, and operational mail to one account
    NORMAL = 1  # transactional
    BULK = 2  # every broadcast, promotional and informational mail


class Status(IntEnum):
    """Where a delivery stands."""

    PLANNED = 0  # owed; deferred where `due_at` is set
    ACCEPTED = 1  # the relay said 250
    FAILED = 2  # refused for good, or given up
    CANCELLED = 3  # withdrawn before it was sent: the event, an opt-out, a suppression
    EXPIRED = 4  # its time was over before it could be sent
    HELD = 5  # a person must decide
    BOUNCED = 6  # accepted, and came back
    COMPLAINED = 7  # accepted, and the recipient called it spam


@dataclass(frozen=True, slots=True)
class Claim:
    """A slice that this worker may send, until it loses it."""

    slice_id: int
    event_id: int
    lane: Lane
    epoch: int
    first_n: int
    last_n: int
    members: tuple[int, ...] | None  # a slice of retries names them


class Settlement(NamedTuple):
    """What became of deliveries of one flight that ended alike, as it is to be recorded."""

    event_id: int
    numbers: Sequence[int]
    replies: Sequence[str | None]  # of each
    slice_id: int
    epoch: int
    flight_id: int  # 0 where nothing was begun
    status: Status
    reason: str | None
    attempted: bool
    due_at: int | None
    relay: str | None
    flown_at: int  # the Date of this attempt
    at: int


def lane_of(class_: str, *, broadcast: bool) -> Lane:
    """The lane of a class (design, principle 11)."""
    if broadcast or class_ in {"promotional", "informational"}:
        return Lane.BULK
    return Lane.NORMAL if class_ == "transactional" else Lane.URGENT


# ---------------------------------------------------------------- claim, begin, settle


def claim(connection: Connection, slice_id: int, worker: int, *, now: int) -> Claim | None:
    """Take a slice, once: None where another has it, it is done, or it is not due (all three are no fault)."""
    row = run(connection, _CLAIM, {"s": slice_id, "w": worker, "now": now}).first
    if row is None:
        return None
    event_id, lane, epoch, first_n, last_n, members = row
    named = tuple(json.loads(members)) if members else None
    return Claim(slice_id, event_id, Lane(lane), epoch, first_n, last_n, named)


_CLAIM = """
    UPDATE slices SET owner = :w, epoch = epoch + 1
    WHERE id = :s AND owner IS NULL AND done_at IS NULL AND due_at <= :now
    RETURNING event_id, lane, epoch, first_n, last_n, members
"""


def claim_new(connection: Connection, event_id: int, lane: Lane, worker: int, *, mails: int, now: int) -> Claim:
    """One slice of all deliveries of a new event, made and taken in the transaction that accepts it."""
    values = {"event_id": event_id, "lane": int(lane), "last_n": mails, "now": now, "w": worker}
    number = int(run(connection, _CLAIM_NEW, values).first[0])
    return Claim(number, event_id, lane, 1, 1, mails, None)


_CLAIM_NEW = """
    INSERT INTO slices (event_id, lane, first_n, last_n, due_at, queued_at, owner, epoch)
    VALUES (:event_id, :lane, 1, :last_n, :now, :now, :w, 1) RETURNING id
"""


def begin(connection: Connection, taken: Claim, worker: int, members: Sequence[int], *, now: int) -> tuple[int, int]:
    """Name the mails that are about to leave: (flight, guard); both 0 where the claim was lost."""
    named = {"members": json.dumps(list(members)), "begun": now}
    statement = _BEGIN_SQLITE if connection.dialect.name == "sqlite" else _BEGIN_POSTGRESQL
    row = run(connection, statement, named | {"s": taken.slice_id, "w": worker, "p": taken.epoch}).first
    return (row[0], row[1]) if row is not None else (0, 0)


_BEGIN = """
    INSERT INTO flights (slice_id, epoch, owner, members, begun_at)
    SELECT id, epoch, owner, CAST(:members AS text), CAST(:begun AS bigint) FROM slices
    WHERE id = :s AND owner = :w AND epoch = :p {lock}
    RETURNING id, (SELECT guard FROM installation)
"""
_BEGIN_SQLITE = _BEGIN.format(lock="")
_BEGIN_POSTGRESQL = _BEGIN.format(lock="FOR SHARE")  # whoever frees the slice waits for the commit, and sees the flight


def guard(connection: Connection, *, held: bool = False) -> int:
    """The counter that opt-outs, suppressions, pauses and cancels raise.

    `held`: who raises it meanwhile waits for this transaction, or is waited for: one sees what the other did.
    """
    shared = held and connection.dialect.name != "sqlite"
    return int(run(connection, _GUARD_HELD if shared else _GUARD).first[0])


_GUARD = "SELECT guard FROM installation"
_GUARD_HELD = f"{_GUARD} FOR SHARE"


def raise_guard(connection: Connection) -> None:
    """Make every flight from now on check again what it is about to send."""
    connection.execute(update(installation).values(guard=installation.c.guard + 1))


class Alike(NamedTuple):
    """Outcomes that the same words record."""

    first: Settlement
    mails: int
    rows: Sequence[Mapping[str, object]]  # the values of each statement that records some of them


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What became of deliveries, sorted and written down before the transaction that records it: others wait for it."""

    settlements: Sequence[Settlement]
    groups: Sequence[Alike]


def arrange(settlements: Sequence[Settlement], *, dialect: str) -> Outcomes:
    """Put together what one statement writes on a database of this kind.

    SQLite is asked for mails of a flight whose numbers follow one another, as nearly all do: it walks through its rows
    once, in half the time in which it joins them with a list. PostgreSQL, for which each question is a way to go, is
    asked for all at once, and finds its values in JSON by number: asked for runs it would walk through the whole event.
    """
    groups: dict[tuple[Any, ...], list[Settlement]] = {}
    for one in settlements:
        groups.setdefault((one.event_id, one.status, one.reason, one.attempted, one.relay), []).append(one)
    rows = _in_runs if dialect == "sqlite" else _by_number
    return Outcomes(settlements, [Alike(group[0], _mails(group), rows(group)) for group in groups.values()])


def _mails(settlements: Iterable[Settlement]) -> int:
    return sum(len(one.numbers) for one in settlements)


@dataclass(slots=True)
class _Run:
    """Mails of one flight whose numbers follow one another."""

    flown: int
    first: int
    replies: list[str | None] = field(default_factory=list)
    times: list[int | None] = field(default_factory=list)

    @property
    def end(self) -> tuple[int, int]:
        return self.flown, self.first + len(self.replies)


def _in_runs(settlements: Sequence[Settlement]) -> list[Mapping[str, object]]:
    pieces: list[tuple[int, int, Sequence[str | None], int | None]] = []
    for one in settlements:
        flown, first = one.flown_at if one.attempted else 0, one.numbers[0]
        if [*one.numbers] == [*range(first, first + len(one.numbers))]:
            pieces.append((flown, first, one.replies, one.due_at))
        else:
            pieces += [(flown, n, (said,), one.due_at) for n, said in zip(one.numbers, one.replies, strict=True)]
    runs: list[_Run] = []
    for flown, first, replies, due_at in sorted(pieces, key=itemgetter(0, 1)):
        if not runs or runs[-1].end != (flown, first):
            runs.append(_Run(flown, first))
        runs[-1].replies += replies
        runs[-1].times += [due_at] * len(replies)
    alike, over = _alike(settlements), settlements[0].status is not Status.PLANNED
    return [
        alike | {
            "first": one.first, "last": one.end[1] - 1, "flown": one.flown, "replies": json.dumps(one.replies),
            "times": None if over else json.dumps(one.times),
        }
        for one in runs
    ]  # fmt: skip


def _by_number(settlements: Sequence[Settlement]) -> list[Mapping[str, object]]:
    numbers = list(chain.from_iterable(one.numbers for one in settlements))
    replies = chain.from_iterable(one.replies for one in settlements)
    flown = (one.flown_at if one.attempted else 0 for one in settlements for _ in one.numbers)
    over = settlements[0].status is not Status.PLANNED
    times = {} if over else {n: one.due_at for one in settlements for n in one.numbers}
    return [
        _alike(settlements) | {
            "numbers": f"{{{','.join(map(str, numbers))}}}",  # as text, for the driver takes long for a list
            "first": min(numbers),
            "last": max(numbers),
            "replies": json.dumps(dict(zip(numbers, replies, strict=True))),
            "flown": json.dumps(dict(zip(numbers, flown, strict=True))),
            "times": json.dumps(times),
        }
    ]  # fmt: skip


def _alike(settlements: Sequence[Settlement]) -> dict[str, object]:
    first = settlements[0]
    settled = None if first.status is Status.PLANNED else settlements[-1].at
    return {
        "e": first.event_id, "to": int(first.status), "why": first.reason, "by": first.relay, "settled": settled,
    }  # fmt: skip


def settle(connection: Connection, worker: int, outcomes: Outcomes) -> int:
    """Record what became of deliveries, by compare-and-set; returns how many rows changed.

    A delivery that left `planned` is not written again. Where the claim was lost meanwhile, an acceptance is still
    recorded (it stops a copy not yet begun, and overrides what was held as unknown or withdrawn in flight), everything
    else is left to the new owner.
    """
    outcomes = _still_ours(connection, worker, outcomes)
    counts: Counter[tuple[int, Status]] = Counter()
    noted: Counter[tuple[int, str]] = Counter()
    changed = 0
    for alike in outcomes.groups:
        first = alike.first
        event_id, status = first.event_id, first.status
        count = _record(connection, alike, before=Status.PLANNED)
        changed += count
        if first.reason is not None:
            noted[event_id, first.reason] += count
        if status is not Status.PLANNED:
            counts[event_id, status] += count
            counts[event_id, Status.PLANNED] -= count
        if status is Status.ACCEPTED and count < alike.mails:
            for before, why in _OVERRIDDEN.items():
                late = _record(connection, alike, before=before, why=why)
                changed += late
                counts[event_id, status] += late
                counts[event_id, before] -= late
    add_tallies(connection, worker, counts)
    if noted:
        matters.note(connection, worker, noted, now=outcomes.settlements[0].at)
    return changed


def _still_ours(connection: Connection, worker: int, outcomes: Outcomes) -> Outcomes:
    """Without those that are left to whoever has their claim now."""
    # An acceptance is recorded whoever has the claim; on PostgreSQL slices are locked before their mails all the same.
    locks, settlements = connection.dialect.name != "sqlite", outcomes.settlements
    if not locks and all(one.first.status is Status.ACCEPTED for one in outcomes.groups):
        return outcomes
    asked = {(one.slice_id, one.epoch) for one in settlements if locks or one.status is not Status.ACCEPTED}
    lost = asked - _held(connection, asked, worker)
    left = [one for one in settlements if one.status is Status.ACCEPTED or (one.slice_id, one.epoch) not in lost]
    return arrange(left, dialect=connection.dialect.name) if len(left) < len(settlements) else outcomes


def _held(connection: Connection, claims: Collection[tuple[int, int]], worker: int) -> set[tuple[int, int]]:
    """Which of these claims (slice, epoch) the worker still has."""
    numbers = [slice_id for slice_id, _ in claims]
    if connection.dialect.name == "sqlite":
        found = run(connection, _HELD_SQLITE, {"numbers": json.dumps(numbers), "w": worker})
    else:
        found = run(connection, _HELD_POSTGRESQL, {"numbers": numbers, "w": worker})
    return set(claims) & {(number, epoch) for number, epoch in found.rows}


_HELD_SQLITE = "SELECT id, epoch FROM slices WHERE owner = :w AND id IN (SELECT value FROM json_each(:numbers))"
_HELD_POSTGRESQL = "SELECT id, epoch FROM slices WHERE owner = :w AND id = ANY(:numbers) FOR SHARE"
#: Nobody frees them before this is committed.


_OVERRIDDEN = {Status.HELD: "unknown", Status.CANCELLED: CANCELLED}
#: What an acceptance that is learnt late overrides (status and reason): it is what happened.


def _record(connection: Connection, alike: Alike, *, before: Status, why: str | None = None) -> int:
    """Write outcomes that are alike where their deliveries stand as `before`; returns how many rows changed."""
    made = int(alike.first.attempted and before is Status.PLANNED)
    statement = _RECORD_SQLITE if connection.dialect.name == "sqlite" else _RECORD_POSTGRESQL
    stands = {"made": made, "before": int(before), "because": why}
    return sum(run(connection, statement, {**rows, **stands}).rowcount for rows in alike.rows)


_RECORD = """
    UPDATE deliveries SET status = :to, reason = :why, due_at = {due_at}, retry_slice = NULL,
      attempts = attempts + :made, first_flight_at = coalesce(first_flight_at, nullif({flown_at}, 0)),
      settled_at = :settled, relay = coalesce(CAST(:by AS text), relay), reply = coalesce({reply}, reply)
    {found} AND status = :before AND (CAST(:because AS text) IS NULL OR reason = CAST(:because AS text))
"""
_RECORD_SQLITE = _RECORD.format(
    due_at="json_extract(:times, '$[' || (n - :first) || ']')",
    flown_at=":flown",
    reply="json_extract(:replies, '$[' || (n - :first) || ']')",
    found="WHERE event_id = :e AND n BETWEEN :first AND :last",
)
_RECORD_POSTGRESQL = _RECORD.format(
    due_at="CAST(times ->> CAST(n AS text) AS bigint)",
    flown_at="CAST(flown ->> CAST(n AS text) AS bigint)",
    reply="replies ->> CAST(n AS text)",
    # OFFSET: JSON is read once, not once for each row. Each row is looked up by its key (performance.md, 2); BETWEEN
    # keeps PostgreSQL from walking through the whole event where its statistics are old.
    found="""
      FROM (SELECT CAST(:replies AS jsonb) replies, CAST(:flown AS jsonb) flown, CAST(:times AS jsonb) times OFFSET 0) t
      WHERE event_id = :e AND n = ANY(CAST(:numbers AS integer[])) AND n BETWEEN :first AND :last
    """,
)


def land(connection: Connection, flight_ids: Iterable[int]) -> None:
    """Forget flights whose mails are all settled."""
    for flight_id in sorted(set(flight_ids) - {0}):  # one or two, nearly always
        run(connection, "DELETE FROM flights WHERE id = :f", {"f": flight_id})


def finish(connection: Connection, taken: Claim, worker: int, *, now: int) -> bool:
    """Give a slice back: done where it owes nothing by itself, else free for whoever comes next.

    Returns whether its event ended with it: nothing is left that the machine does by itself.
    """
    mine = {"s": taken.slice_id, "w": worker, "p": taken.epoch}
    if taken.members is None:
        row = run(connection, _GIVE_BACK_RANGE, mine | {"now": now}).first
        given, left = row is not None, row is not None and row[0] is None
    else:
        condition, values = owed(taken)
        rest = f"FROM (SELECT n FROM deliveries d WHERE event_id = :event AND {condition} LIMIT 1) d"  # noqa: S608 - our own
        [some] = read_columns(connection, ("n",), rest, event=taken.event_id, **values)
        left = bool(some)
        given = connection.execute(_GIVE_BACK, mine | {"now": None if left else now}).rowcount == 1
    if not given:
        return False
    # A flight whose commit was answered by nobody was begun again: its first row names nothing that is open.
    run(connection, _FORGET_FLIGHTS, mine)
    return not left and run(connection, _END, {"e": taken.event_id}).rowcount == 1


_MINE = (slices.c.id == bindparam("s"), slices.c.owner == bindparam("w"), slices.c.epoch == bindparam("p"))
_GIVE_BACK = update(slices).where(*_MINE).values(owner=None, queued_at=None, done_at=bindparam("now", type_=BigInteger))
_GIVE_BACK_RANGE = """
    UPDATE slices SET owner = NULL, queued_at = NULL, done_at = CASE WHEN EXISTS (
      SELECT 1 FROM deliveries d WHERE d.event_id = slices.event_id AND d.n BETWEEN slices.first_n AND slices.last_n
      AND d.retry_slice IS NULL AND d.status = 0 AND d.due_at IS NULL) THEN NULL ELSE CAST(:now AS bigint) END
    WHERE id = :s AND owner = :w AND epoch = :p RETURNING done_at
"""
_FORGET_FLIGHTS = "DELETE FROM flights WHERE slice_id = :s AND epoch = :p"


def nothing_left(event_id: str) -> str:
    """A condition: no slice of an event is open, and none of its mails is deferred; `event_id` as it stands in SQL."""
    return (
        f"NOT EXISTS (SELECT 1 FROM slices s WHERE s.event_id = {event_id} AND s.done_at IS NULL)"  # noqa: S608 - our own
        f" AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.event_id = {event_id}"
        " AND d.due_at IS NOT NULL AND d.status = 0)"
    )


_END = f"UPDATE events SET status = 'done' WHERE id = :e AND status = 'sending' AND {nothing_left(':e')}"  # noqa: S608


def postpone(
    connection: Connection, taken: Claim, worker: int, *, until: int, now: int, hold: bool, again: bool
) -> None:
    """Give a slice back, not to be tried before `until`.

    Its open flights end: where nothing of them left (`again` False) without a trace, else as a vanished worker's do.
    """
    mine = {"s": taken.slice_id, "w": worker, "p": taken.epoch}
    give_back = update(slices).where(*_MINE).values(owner=None, queued_at=None, due_at=until)
    given = connection.execute(give_back, mine).rowcount
    if given and again:
        end_open_flights(connection, worker, taken.slice_id, taken.event_id, hold=hold, now=now)
    elif given:
        run(connection, _FORGET_FLIGHTS, mine)


def owed(taken: Claim) -> tuple[str, dict[str, int | list[int]]]:
    """A condition on rows `d` of `deliveries` of its event, with its values: what a claimed slice is to send now."""
    planned = "d.status = 0 AND d.due_at IS NULL"
    if taken.members is not None:
        values: dict[str, int | list[int]] = {"members": list(taken.members), "slice": taken.slice_id}
        return f"d.n AMONG :members AND d.retry_slice = :slice AND {planned}", values
    numbers: dict[str, int | list[int]] = {"first": taken.first_n, "last": taken.last_n}
    return f"d.n BETWEEN :first AND :last AND d.retry_slice IS NULL AND {planned}", numbers


def add_tallies(connection: Connection, owner: int, counts: Mapping[tuple[int, Status], int]) -> None:
    """Add changes of counts per event and status."""
    changes = [(event_id, status, n) for (event_id, status), n in counts.items() if n]
    if not changes:
        return
    values: dict[str, int] = {"owner": owner}
    for place, (event_id, status, n) in enumerate(changes):
        values |= {f"event_{place}": event_id, f"status_{place}": int(status), f"n_{place}": n}
    run(connection, _tally(len(changes)), values)


@lru_cache(maxsize=256)
def _tally(changes: int) -> str:
    rows = [f"(:event_{place}, :owner, :status_{place}, :n_{place})" for place in range(changes)]
    return (
        f"INSERT INTO tallies (event_id, owner, status, n) VALUES {', '.join(rows)}"  # noqa: S608 - our own names
        " ON CONFLICT (event_id, owner, status) DO UPDATE SET n = tallies.n + excluded.n"
    )


def totals(connection: Connection, event_id: int) -> dict[str, int]:
    """How many deliveries of an event stand where, by name of the status; zero counts are left out."""
    rows = connection.execute(
        select(tallies.c.status, func.sum(tallies.c.n)).where(tallies.c.event_id == event_id).group_by(tallies.c.status)
    )
    return {Status(status).name.lower(): int(n) for status, n in rows if n}


def end_open_flights(
    connection: Connection, worker: int, slice_id: int, event_id: int, *, hold: bool, now: int
) -> None:
    """What a slice's open flights name is sent again, or held with the reason `unknown`; the flights are forgotten."""
    open_ones = connection.execute(
        select(flights.c.id, flights.c.members, flights.c.begun_at).where(flights.c.slice_id == slice_id)
    ).all()
    for flight in open_ones:
        values: dict[str, object] = {
            "attempts": deliveries.c.attempts + 1,
            "first_flight_at": func.coalesce(deliveries.c.first_flight_at, flight.begun_at),
        }
        if hold:
            values |= {"status": int(Status.HELD), "reason": "unknown", "settled_at": now}
        else:
            values["reason"] = "sent_again"
        changed = connection.execute(
            update(deliveries)
            .where(deliveries.c.event_id == event_id, deliveries.c.n.in_(json.loads(flight.members)))
            .where(deliveries.c.status == int(Status.PLANNED))
            .values(**values)
        ).rowcount
        if hold:
            add_tallies(connection, worker, {(event_id, Status.HELD): changed, (event_id, Status.PLANNED): -changed})
        matters.note(connection, worker, {(event_id, "unknown" if hold else "sent_again"): changed}, now=now)
    land(connection, (row.id for row in open_ones))


def hold_event(connection: Connection, event_id: int, *, reason: str) -> None:
    """Set an event aside that can't be planned: a person must look, and it is tried again by nobody."""
    connection.execute(
        update(events).where(events.c.id == event_id).values(status="held", reason=reason, plan_owner=None)
    )
