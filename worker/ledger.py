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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Select,
    Text,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    update,
)

from subscriptions.database import insert_into
from subscriptions.schema import installation
from worker import matters
from worker.schema import deliveries, events, flights, slices, tallies

NEVER = 2**62
#: A `due_at` that waits for a person: a pause, a missing https address, a missing sender.

SLICE_SIZE = 256
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


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of one delivery, as it is to be recorded."""

    event_id: int
    n: int
    slice_id: int
    epoch: int
    flight_id: int  # 0 where nothing was begun
    status: Status
    reason: str | None
    attempted: bool
    due_at: int | None
    relay: str | None
    reply: str | None
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
    row = connection.execute(_CLAIM, {"s": slice_id, "w": worker, "now": now}).one_or_none()
    if row is None:
        return None
    members = tuple(json.loads(row.members)) if row.members else None
    return Claim(slice_id, row.event_id, Lane(row.lane), row.epoch, row.first_n, row.last_n, members)


_CLAIM = (
    update(slices)
    .where(slices.c.id == bindparam("s"), slices.c.owner.is_(None), slices.c.done_at.is_(None))
    .where(slices.c.due_at <= bindparam("now"))
    .values(owner=bindparam("w"), epoch=slices.c.epoch + 1)
    .returning(slices.c.event_id, slices.c.lane, slices.c.epoch, slices.c.first_n, slices.c.last_n, slices.c.members)
)


def begin(connection: Connection, taken: Claim, worker: int, members: Sequence[int], *, now: int) -> tuple[int, int]:
    """Name the mails that are about to leave: (flight, guard); flight 0 where the claim was lost."""
    named = {"members": json.dumps(list(members)), "begun": now}
    row = connection.execute(_BEGIN, named | {"s": taken.slice_id, "w": worker, "p": taken.epoch}).one_or_none()
    return (int(row.id) if row is not None else 0), guard(connection)


_BEGIN = (
    insert(flights)
    .from_select(
        ["slice_id", "epoch", "owner", "members", "begun_at"],
        select(
            slices.c.id,
            slices.c.epoch,
            slices.c.owner,
            bindparam("members", type_=Text),
            bindparam("begun", type_=BigInteger),
        )
        .where(slices.c.id == bindparam("s"), slices.c.owner == bindparam("w"), slices.c.epoch == bindparam("p"))
        .with_for_update(read=True),  # whoever frees the slice waits for the commit, and then sees the flight
    )
    .returning(flights.c.id)
)


def guard(connection: Connection, *, held: bool = False) -> int:
    """The counter that opt-outs, suppressions, pauses and cancels raise.

    `held`: who raises it meanwhile waits for this transaction, or is waited for: one sees what the other did.
    """
    query = select(installation.c.guard)
    return int(connection.execute(query.with_for_update(read=True) if held else query).scalar_one())


def raise_guard(connection: Connection) -> None:
    """Make every flight from now on check again what it is about to send."""
    connection.execute(update(installation).values(guard=installation.c.guard + 1))


def settle(connection: Connection, worker: int, settlements: Sequence[Settlement]) -> int:
    """Record what became of deliveries, by compare-and-set; returns how many rows changed.

    A delivery that left `planned` is not written again. Where the claim was lost meanwhile, an acceptance is still
    recorded (it stops a copy not yet begun, and overrides what was held as unknown or withdrawn in flight), everything
    else is left to the new owner.
    """
    held = _held(connection, {(one.slice_id, one.epoch) for one in settlements}, worker)
    groups: dict[tuple[int, Status, str | None], list[dict[str, object]]] = {}
    for one in settlements:
        if (one.slice_id, one.epoch) in held or one.status is Status.ACCEPTED:
            groups.setdefault((one.event_id, one.status, one.reason), []).append(_settle_values(one))
    counts: Counter[tuple[int, Status]] = Counter()
    noted: Counter[tuple[int, str]] = Counter()
    changed = 0
    for (event_id, status, reason), rows in groups.items():
        count = connection.execute(_SETTLE, rows).rowcount
        changed += count
        if reason is not None:
            noted[event_id, reason] += count
        if status is not Status.PLANNED:
            counts[event_id, status] += count
            counts[event_id, Status.PLANNED] -= count
        if status is Status.ACCEPTED and count < len(rows):
            for before, statement in _SETTLE_LATE.items():
                late = connection.execute(statement, [row | {"made": 0} for row in rows]).rowcount
                changed += late
                counts[event_id, status] += late
                counts[event_id, before] -= late
    add_tallies(connection, worker, counts)
    if noted:
        matters.note(connection, worker, noted, now=settlements[0].at)
    return changed


def _held(connection: Connection, claims: Iterable[tuple[int, int]], worker: int) -> set[tuple[int, int]]:
    """Which of these claims (slice, epoch) the worker still has."""
    claims = set(claims)
    rows = connection.execute(
        select(slices.c.id, slices.c.epoch)
        .where(slices.c.id.in_([slice_id for slice_id, _ in claims]), slices.c.owner == worker)
        .with_for_update(read=True)  # nobody frees them before this is committed
    )
    return claims & {(row.id, row.epoch) for row in rows}


_OUTCOME = (
    update(deliveries)
    .where(deliveries.c.event_id == bindparam("e"), deliveries.c.n == bindparam("m"))
    .values(
        status=bindparam("to"),
        reason=bindparam("why"),
        attempts=deliveries.c.attempts + bindparam("made"),
        due_at=bindparam("due"),
        retry_slice=None,
        first_flight_at=func.coalesce(deliveries.c.first_flight_at, bindparam("flown")),
        settled_at=bindparam("settled"),
        relay=func.coalesce(bindparam("by"), deliveries.c.relay),
        reply=func.coalesce(bindparam("said"), deliveries.c.reply),
    )
)
_SETTLE = _OUTCOME.where(deliveries.c.status == int(Status.PLANNED))
#: What an acceptance that is learnt late overrides: it is what happened.
_SETTLE_LATE = {
    status: _OUTCOME.where(deliveries.c.status == int(status), deliveries.c.reason == reason)
    for status, reason in ((Status.HELD, "unknown"), (Status.CANCELLED, CANCELLED))
}


def _settle_values(one: Settlement) -> dict[str, object]:
    return {
        "e": one.event_id,
        "m": one.n,
        "to": int(one.status),
        "why": one.reason,
        "made": int(one.attempted),
        "due": one.due_at,
        "flown": one.flown_at if one.attempted else None,
        "settled": one.at if one.status is not Status.PLANNED else None,
        "by": one.relay,
        "said": one.reply,
    }


def land(connection: Connection, flight_ids: Iterable[int]) -> None:
    """Forget flights whose mails are all settled."""
    chosen = sorted(set(flight_ids) - {0})
    if chosen:
        connection.execute(delete(flights).where(flights.c.id.in_(chosen)))


def finish(connection: Connection, taken: Claim, worker: int, *, now: int) -> bool:
    """Give a slice back: done where it owes nothing by itself, else free for whoever comes next.

    Returns whether its event ended with it: nothing is left that the machine does by itself.
    """
    planned = connection.execute(_members(taken).where(deliveries.c.due_at.is_(None)).limit(1)).first()
    values: dict[str, object] = {"owner": None, "queued_at": None}
    if planned is None:
        values["done_at"] = now
    given = connection.execute(
        update(slices)
        .where(slices.c.id == taken.slice_id, slices.c.owner == worker, slices.c.epoch == taken.epoch)
        .values(**values)
    ).rowcount
    if not given:
        return False
    # A flight whose commit was answered by nobody was begun again: its first row names nothing that is open.
    connection.execute(delete(flights).where(flights.c.slice_id == taken.slice_id, flights.c.epoch == taken.epoch))
    if planned is not None:
        return False
    ended = update(events).where(events.c.id == taken.event_id, events.c.status == "sending")
    return connection.execute(ended.where(nothing_left(taken.event_id)).values(status="done")).rowcount == 1


def nothing_left(event_id: int | ColumnElement[int]) -> ColumnElement[bool]:
    """A clause: no slice of an event is open, and none of its mails is deferred."""
    deferred = (deliveries.c.due_at.is_not(None)) & (deliveries.c.status == int(Status.PLANNED))
    return ~(
        exists().where(slices.c.event_id == event_id, slices.c.done_at.is_(None))
        | exists().where(deliveries.c.event_id == event_id, deferred)
    )


def postpone(
    connection: Connection, taken: Claim, worker: int, *, until: int, now: int, hold: bool, again: bool
) -> None:
    """Give a slice back, not to be tried before `until`.

    Its open flights end: where nothing of them left (`again` False) without a trace, else as a vanished worker's do.
    """
    given = connection.execute(
        update(slices)
        .where(slices.c.id == taken.slice_id, slices.c.owner == worker, slices.c.epoch == taken.epoch)
        .values(owner=None, queued_at=None, due_at=until)
    ).rowcount
    if given and again:
        end_open_flights(connection, worker, taken.slice_id, taken.event_id, hold=hold, now=now)
    elif given:
        connection.execute(delete(flights).where(flights.c.slice_id == taken.slice_id, flights.c.epoch == taken.epoch))


def _members(taken: Claim) -> Select[int]:
    chosen = select(deliveries.c.n).where(
        deliveries.c.event_id == taken.event_id, deliveries.c.status == int(Status.PLANNED)
    )
    if taken.members is not None:
        return chosen.where(deliveries.c.retry_slice == taken.slice_id)
    return chosen.where(deliveries.c.n.between(taken.first_n, taken.last_n), deliveries.c.retry_slice.is_(None))


def owed(connection: Connection, taken: Claim) -> list[int]:
    """The numbers of a claimed slice that are still to be sent now."""
    return list(connection.execute(_members(taken).where(deliveries.c.due_at.is_(None))).scalars())


def add_tallies(connection: Connection, owner: int, counts: Mapping[tuple[int, Status], int]) -> None:
    """Add changes of counts per event and status."""
    rows = [
        {"event_id": event_id, "owner": owner, "status": int(status), "n": n}
        for (event_id, status), n in counts.items()
        if n
    ]
    if not rows:
        return
    statement = insert_into(connection, tallies)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["event_id", "owner", "status"], set_={"n": tallies.c.n + statement.excluded.n}
        ),
        rows,
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
