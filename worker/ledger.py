"""The ledger: what is owed, to whom, and what became of it. It is the truth; every queue is only a hint.

It owns the tables of `worker.schema`. Promises:

- One delivery per (event, mailbox), for life: unique in the database.
- A slice is claimed by compare-and-set (owner, epoch); whoever lost it records acceptances only.
- A flight names the mails that may have left; it is committed before its first byte (the hold class: before its last).
- Deliveries are written when planned and when settled. "sending" is read from open flights.
- Tallies are changes per worker; their sums are the counts.

Statuses of a delivery:  planned -> accepted | failed | cancelled | expired | held;  planned with `due_at` = deferred.
Statuses of an event:    accepted -> planning -> sending -> done;  cancelled;  redirected.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    bindparam,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from subscriptions.directory import among
from subscriptions.schema import installation
from worker.schema import deliveries, events, flights, pauses, slices, tallies, workers

NEVER = 2**62
#: A `due_at` that waits for a person: a pause, a missing https address, a missing sender.

SLICE_SIZE = 256
#: Deliveries that travel as one queue message.

HOLD_CLASS = "transactional"
#: A flight there is one mail, and an unknown outcome is held until a person or a bounce settles it (principle 6).

RETRY_MINUTES = (1, 5, 15, 30, 60, 120, 240)
#: How long a mail that was refused for now waits, by attempts made; the last one repeats.
GIVE_UP_DAYS = 4
#: Counted from the acceptance of the event.


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


def retry_at(attempts: int, *, now: int, accepted_at: int, spread: float) -> int | None:
    """When a mail that was refused for now goes again, microseconds; None when it is given up.

    `attempts` are those made, `spread` lies in 0..1 and shifts the time by up to a fifth to either side.
    """
    minutes = RETRY_MINUTES[min(attempts, len(RETRY_MINUTES)) - 1]
    at = now + max(60_000_000, int(minutes * 60_000_000 * (0.8 + 0.4 * spread)))
    return at if at < accepted_at + GIVE_UP_DAYS * 86_400_000_000 else None


# ---------------------------------------------------------------- workers


def register(connection: Connection, *, host: str, pid: int, lanes: str, now: int) -> int:
    """A row for this worker process; its number owns slices."""
    statement = insert(workers).values(host=host, pid=pid, lanes=lanes, started_at=now, beat_at=now)
    return int(connection.execute(statement.returning(workers.c.id)).scalar_one())


def someone_sends(connection: Connection) -> bool:
    """Whether a worker is there that has a relay; one without plans events and sends nothing."""
    return _any(connection, select(workers.c.id).where(workers.c.lanes != ""))


def beat(connection: Connection, worker: int, *, now: int) -> None:
    """Say that the worker lives."""
    connection.execute(update(workers).where(workers.c.id == worker).values(beat_at=now))


def free_own(connection: Connection, worker: int, *, now: int) -> None:
    """At a stop: give back what was claimed; a flight that did not end in time is treated as a vanished worker's."""
    _free(connection, worker, slices.c.owner == worker, now=now)
    connection.execute(update(events).where(events.c.plan_owner == worker).values(plan_owner=None))


def leave(connection: Connection, worker: int) -> None:
    """Take the worker's row away; what it still owns is freed by `rescue`."""
    connection.execute(delete(workers).where(workers.c.id == worker))


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
    row = connection.execute(
        text(
            "INSERT INTO flights (slice_id, epoch, owner, members, begun_at)"
            " SELECT id, epoch, owner, :members, :now FROM slices WHERE id = :s AND owner = :w AND epoch = :p"
            " RETURNING id"
        ),
        {"members": json.dumps(list(members)), "now": now, "s": taken.slice_id, "w": worker, "p": taken.epoch},
    ).one_or_none()
    return (int(row.id) if row is not None else 0), guard(connection)


def guard(connection: Connection) -> int:
    """The counter that opt-outs, suppressions, pauses and cancels raise."""
    return int(connection.execute(select(installation.c.guard)).scalar_one())


def raise_guard(connection: Connection) -> None:
    """Make every flight from now on check again what it is about to send."""
    connection.execute(update(installation).values(guard=installation.c.guard + 1))


def settle(connection: Connection, worker: int, settlements: Sequence[Settlement]) -> int:
    """Record what became of deliveries, by compare-and-set; returns how many rows changed.

    A delivery that left `planned` is not written again. Where the claim was lost meanwhile, an acceptance is still
    recorded (it stops a copy not yet begun), everything else is left to the new owner.
    """
    held = _held(connection, {(one.slice_id, one.epoch) for one in settlements}, worker)
    groups: dict[tuple[int, Status], list[dict[str, object]]] = {}
    for one in settlements:
        if (one.slice_id, one.epoch) in held or one.status is Status.ACCEPTED:
            groups.setdefault((one.event_id, one.status), []).append(_settle_values(one))
    counts: Counter[tuple[int, Status]] = Counter()
    changed = 0
    for (event_id, status), rows in groups.items():
        count = connection.execute(_SETTLE, rows).rowcount
        changed += count
        if status is not Status.PLANNED:
            counts[event_id, status] += count
            counts[event_id, Status.PLANNED] -= count
    add_tallies(connection, worker, counts)
    return changed


def _held(connection: Connection, claims: Iterable[tuple[int, int]], worker: int) -> set[tuple[int, int]]:
    """Which of these claims (slice, epoch) the worker still has."""
    claims = set(claims)
    rows = connection.execute(
        select(slices.c.id, slices.c.epoch).where(
            slices.c.id.in_([slice_id for slice_id, _ in claims]), slices.c.owner == worker
        )
    )
    return claims & {(row.id, row.epoch) for row in rows}


_SETTLE = (
    update(deliveries)
    .where(deliveries.c.event_id == bindparam("e"), deliveries.c.n == bindparam("m"))
    .where(deliveries.c.status == int(Status.PLANNED))
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


def finish(connection: Connection, taken: Claim, worker: int, *, now: int) -> None:
    """Give a slice back: done where it owes nothing by itself, else free for whoever comes next."""
    planned = connection.execute(_members(taken).where(deliveries.c.due_at.is_(None)).limit(1)).first()
    values: dict[str, object] = {"owner": None, "queued_at": None}
    if planned is None:
        values["done_at"] = now
    connection.execute(
        update(slices)
        .where(slices.c.id == taken.slice_id, slices.c.owner == worker, slices.c.epoch == taken.epoch)
        .values(**values)
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
        _end_open_flights(connection, worker, taken.slice_id, taken.event_id, hold=hold, now=now)
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
    make = sqlite_insert if connection.dialect.name == "sqlite" else postgresql_insert
    statement = make(tallies)
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


# ---------------------------------------------------------------- slices: making, feeding, rescue


def make_slices(
    connection: Connection, event_id: int, lane: Lane, *, first_n: int, last_n: int, due_at: int | None
) -> None:
    """Cut the deliveries first_n..last_n of an event into slices."""
    if last_n < first_n:
        return
    connection.execute(
        insert(slices),
        [
            {
                "event_id": event_id,
                "lane": int(lane),
                "first_n": start,
                "last_n": min(start + SLICE_SIZE - 1, last_n),
                "due_at": due_at,
            }
            for start in range(first_n, last_n + 1, SLICE_SIZE)
        ],
    )


def gather_retries(connection: Connection, *, now: int, limit: int = 500) -> int:
    """Put deferred deliveries that are due into slices of their own; returns how many there were."""
    rows = connection.execute(
        select(deliveries.c.event_id, deliveries.c.n, events.c.lane)
        .join(events, events.c.id == deliveries.c.event_id)
        .where(deliveries.c.due_at <= now, deliveries.c.status == int(Status.PLANNED))
        .order_by(deliveries.c.due_at)
        .limit(limit)
    ).all()
    by_event: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        by_event.setdefault((row.event_id, row.lane), []).append(row.n)
    for (event_id, lane), members in by_event.items():
        members.sort()
        slice_id = connection.execute(
            insert(slices)
            .values(
                event_id=event_id,
                lane=lane,
                first_n=members[0],
                last_n=members[-1],
                members=json.dumps(members),
                due_at=now,
            )
            .returning(slices.c.id)
        ).scalar_one()
        connection.execute(
            update(deliveries)
            .where(deliveries.c.event_id == event_id, deliveries.c.n.in_(members))
            .values(due_at=None, retry_slice=slice_id)
        )
    return len(rows)


def waits_for_plan(connection: Connection, *, now: int) -> bool:
    """Whether an accepted event is to be planned now and nobody plans it."""
    return _any(
        connection,
        select(events.c.id)
        .where(events.c.status.in_(["accepted", "planning"]), events.c.plan_owner.is_(None))
        .where(or_(events.c.not_before.is_(None), events.c.not_before <= now)),
    )


def retries_due(connection: Connection, *, now: int) -> bool:
    """Whether deferred mail is due."""
    return _any(
        connection,
        select(deliveries.c.n).where(deliveries.c.due_at <= now, deliveries.c.status == int(Status.PLANNED)),
    )


def lanes_to_feed(connection: Connection, *, now: int) -> list[Lane]:
    """The lanes that have slices which are due and stand in no queue, the most urgent first."""
    waiting = select(slices.c.lane).where(
        slices.c.done_at.is_(None), slices.c.due_at <= now, slices.c.queued_at.is_(None), slices.c.owner.is_(None)
    )
    return [lane for lane in Lane if _any(connection, waiting.where(slices.c.lane == int(lane)))]


def _any(connection: Connection, query: Select[Any]) -> bool:
    return connection.execute(query.limit(1)).first() is not None


def take_for_queue(connection: Connection, lane: Lane, *, room: int, now: int) -> list[int]:
    """Slices of a lane to be put into its queue now, marked as queued; at most `room` stand there or are in work."""
    standing = connection.execute(
        select(func.count())
        .select_from(slices)
        .where(slices.c.lane == int(lane), slices.c.done_at.is_(None), slices.c.due_at <= now)
        .where(slices.c.queued_at.is_not(None))
    ).scalar_one()
    if standing >= room:
        return []
    chosen = list(
        connection.execute(
            select(slices.c.id)
            .join(events, events.c.id == slices.c.event_id)
            .where(slices.c.lane == int(lane), slices.c.done_at.is_(None), slices.c.due_at <= now)
            .where(slices.c.queued_at.is_(None), slices.c.owner.is_(None))
            .where(~_paused(connection))
            .order_by(slices.c.due_at, slices.c.id)
            .limit(room - standing)
        ).scalars()
    )
    if chosen:
        connection.execute(update(slices).where(slices.c.id.in_(chosen)).values(queued_at=now))
    return chosen


def forget_queued(connection: Connection, *, before: int) -> int:
    """Slices that were queued before `before` and that nobody took: they are queued again. Returns how many."""
    return connection.execute(
        update(slices)
        .where(slices.c.done_at.is_(None), slices.c.owner.is_(None), slices.c.queued_at < before)
        .where(slices.c.due_at.is_not(None))
        .values(queued_at=None)
    ).rowcount


def free_orphans(connection: Connection, worker: int, *, dead_before: int | None, now: int) -> int:
    """Free what vanished workers held: `dead_before` None means that every other worker is gone (the lock is ours).

    What their open flights name in the hold class is held with the reason `unknown`; everything else is sent again or
    was never attempted. Returns the number of slices that were freed.
    """
    alive = select(workers.c.id).where(
        workers.c.id == worker if dead_before is None else or_(workers.c.beat_at >= dead_before, workers.c.id == worker)
    )
    freed = _free(connection, worker, slices.c.owner.is_not(None) & slices.c.owner.not_in(alive), now=now)
    connection.execute(
        update(events)
        .where(events.c.plan_owner.is_not(None), events.c.plan_owner.not_in(alive))
        .values(plan_owner=None)
    )
    connection.execute(delete(workers).where(workers.c.id.not_in(alive)))
    return freed


def _free(connection: Connection, worker: int, whose: ColumnElement[bool], *, now: int) -> int:
    """Free the slices that `whose` says and end their open flights; returns how many slices."""
    held = connection.execute(
        select(slices.c.id, slices.c.event_id, slices.c.owner, slices.c.epoch, events.c["class"])
        .join(events, events.c.id == slices.c.event_id)
        .where(whose, slices.c.done_at.is_(None))
    ).all()
    for one in held:
        freed = connection.execute(
            update(slices)
            .where(slices.c.id == one.id, slices.c.owner == one.owner, slices.c.epoch == one.epoch)
            .values(owner=None, queued_at=None)
        ).rowcount
        if freed:
            _end_open_flights(connection, worker, one.id, one.event_id, hold=one[4] == HOLD_CLASS, now=now)
    return len(held)


def _end_open_flights(
    connection: Connection, worker: int, slice_id: int, event_id: int, *, hold: bool, now: int
) -> None:
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
    land(connection, (row.id for row in open_ones))


def ended(connection: Connection) -> list[tuple[int, str]]:
    """Events of which nothing is left that the machine does by itself: (number, ULID)."""
    rows = connection.execute(
        select(events.c.id, events.c.ulid)
        .where(events.c.status == "sending")
        .where(~exists().where(slices.c.event_id == events.c.id, slices.c.done_at.is_(None)))
        .where(
            ~exists().where(
                deliveries.c.event_id == events.c.id,
                deliveries.c.due_at.is_not(None),
                deliveries.c.status == int(Status.PLANNED),
            )
        )
    )
    return [(row.id, row.ulid) for row in rows]


def end_events(connection: Connection, numbers: Sequence[int]) -> None:
    """Mark events as done that are still being sent."""
    connection.execute(
        update(events).where(events.c.id.in_(numbers), events.c.status == "sending").values(status="done")
    )


def due_now(connection: Connection, *, now: int, event_ids: Sequence[int] | None = None) -> bool:
    """Whether anything is owed that could be done now: planning, slices, retries; paused work is not."""
    planning = select(events.c.id).where(
        or_(events.c.status == "planning", events.c.status == "accepted"),
        or_(events.c.not_before.is_(None), events.c.not_before <= now),
    )
    sending = (
        select(slices.c.id)
        .join(events, events.c.id == slices.c.event_id)
        .where(slices.c.done_at.is_(None), slices.c.due_at <= now)
        .where(~_paused(connection))
    )
    retries = select(deliveries.c.n).where(deliveries.c.due_at <= now, deliveries.c.status == int(Status.PLANNED))
    if event_ids is not None:
        planning = planning.where(among(connection, events.c.id, event_ids))
        sending = sending.where(among(connection, slices.c.event_id, event_ids))
        retries = retries.where(among(connection, deliveries.c.event_id, event_ids))
    return any(_any(connection, query) for query in (planning, sending, retries))


def hold_event(connection: Connection, event_id: int, *, reason: str) -> None:
    """Set an event aside that can't be planned: a person must look, and it is tried again by nobody."""
    connection.execute(
        update(events).where(events.c.id == event_id).values(status="held", reason=reason, plan_owner=None)
    )


# ---------------------------------------------------------------- stopping and going on


def _paused(connection: Connection) -> ColumnElement[bool]:
    """A clause on `events`: everything, their class or they themselves are paused (accounts: see `delivery`)."""
    standing = connection.execute(select(pauses.c.scope, pauses.c.value)).all()
    if any(row.scope == "all" for row in standing):
        return true()
    classes = [row.value for row in standing if row.scope == "class"]
    ulids = [row.value for row in standing if row.scope == "event"]
    return or_(events.c["class"].in_(classes), events.c.ulid.in_(ulids))


def pauses_stand(connection: Connection) -> bool:
    """Whether anything is paused."""
    return connection.execute(select(pauses.c.scope).limit(1)).first() is not None


def paused_relays(connection: Connection) -> set[str]:
    """The names of the relays that are paused."""
    return set(connection.execute(select(pauses.c.value).where(pauses.c.scope == "relay")).scalars())


def wake_waiting(connection: Connection, *, reasons: Sequence[str], now: int) -> int:
    """Make deliveries that wait for a person due now, where what they waited for has changed."""
    return connection.execute(
        update(deliveries)
        .where(deliveries.c.due_at == NEVER, deliveries.c.reason.in_(list(reasons)))
        .where(deliveries.c.status == int(Status.PLANNED))
        .values(due_at=now, reason=None)
    ).rowcount


def cancel(connection: Connection, event_id: int, *, owner: int, now: int) -> int:
    """Withdraw what is not yet sent of an event; takes effect before the next flight. Returns how many deliveries."""
    connection.execute(
        update(events)
        .where(events.c.id == event_id, events.c.status.in_(["accepted", "planning", "sending"]))
        .values(status="cancelled", cancelled_at=now)
    )
    raise_guard(connection)
    open_members = {
        n
        for row in connection.execute(
            select(flights.c.members)
            .join(slices, slices.c.id == flights.c.slice_id)
            .where(slices.c.event_id == event_id)
        )
        for n in json.loads(row.members)
    }
    withdrawn = connection.execute(
        update(deliveries)
        .where(deliveries.c.event_id == event_id, deliveries.c.status.in_([int(Status.PLANNED)]))
        .where(~among(connection, deliveries.c.n, sorted(open_members)))
        .values(status=int(Status.CANCELLED), reason="event_cancelled", due_at=None, settled_at=now)
    ).rowcount
    add_tallies(connection, owner, {(event_id, Status.CANCELLED): withdrawn, (event_id, Status.PLANNED): -withdrawn})
    return withdrawn


# --- a person decides


def release(connection: Connection, event_id: int, *, numbers: Sequence[int] | None, now: int) -> int:
    """Let held deliveries of an event go now, all or those of these numbers; returns how many."""
    return _owe_again(connection, event_id, deliveries.c.status == int(Status.HELD), numbers=numbers, now=now)


def retry(connection: Connection, event_id: int, *, numbers: Sequence[int] | None, now: int) -> int:
    """Try failed and deferred deliveries of an event again now, all or those of these numbers; returns how many."""
    failed = deliveries.c.status == int(Status.FAILED)
    deferred = (deliveries.c.status == int(Status.PLANNED)) & deliveries.c.due_at.is_not(None)
    return _owe_again(connection, event_id, failed | deferred, numbers=numbers, now=now)


def _owe_again(
    connection: Connection, event_id: int, wanted: ColumnElement[bool], *, numbers: Sequence[int] | None, now: int
) -> int:
    chosen = (deliveries.c.event_id == event_id) & wanted
    if numbers is not None:
        chosen &= deliveries.c.n.in_(list(numbers))
    before = connection.execute(select(deliveries.c.status, func.count()).where(chosen).group_by(deliveries.c.status))
    changes: Counter[tuple[int, Status]] = Counter()
    for status, count in before.all():
        changes[event_id, Status(status)] -= count
        changes[event_id, Status.PLANNED] += count
    owed_again = connection.execute(
        update(deliveries)
        .where(chosen)
        .values(status=int(Status.PLANNED), reason=None, due_at=now, retry_slice=None, settled_at=None)
    ).rowcount
    add_tallies(connection, 0, changes)
    if owed_again:
        ended = (events.c.id == event_id) & (events.c.status == "done")
        connection.execute(update(events).where(ended).values(status="sending"))
    return owed_again
