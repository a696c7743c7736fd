"""What is owed now, and which slices go into the queues: read from the ledger alone, so a lost queue costs nothing.

It makes slices, gathers deferred mail into slices of its own, and picks what a lane's queue is filled with. Pauses are
looked at here, so that what is paused stands in no queue.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Select,
    bindparam,
    func,
    insert,
    or_,
    select,
    text,
    true,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from subscriptions.bulk import insert_rows, run
from subscriptions.directory import among
from worker import ledger
from worker.ledger import NEVER, SLICE_SIZE, Lane, Status
from worker.schema import deliveries, events, pauses, slices


def make_slices(
    connection: Connection, event_id: int, lane: Lane, *, first_n: int, last_n: int, due_at: int | None
) -> None:
    """Cut the deliveries first_n..last_n of an event into slices."""
    if last_n < first_n:
        return
    rows = [(start, min(start + SLICE_SIZE - 1, last_n)) for start in range(first_n, last_n + 1, SLICE_SIZE)]
    alike = {"event_id": event_id, "lane": int(lane), "due_at": due_at}
    insert_rows(connection, slices, ("first_n", "last_n"), rows, alike)


def room_at_once(connection: Connection, lane: Lane, class_: str, account: str, *, width: int, now: int) -> bool:
    """Whether a new slice for an account may be begun without the queue.

    So it is where fewer than `width` are at work, nobody waits, and nothing is paused that concerns it.
    """
    asked = {"lane": int(lane), "now": now, "width": width, "class_": class_, "account": account}
    undone, queued, pauses = run(connection, _AT_WORK, asked).first
    return bool(undone < width and undone == queued and not pauses)


_AT_WORK = """
    SELECT count(*), count(queued_at),
      (SELECT count(*) FROM pauses WHERE scope = 'all' OR (scope = 'class' AND value = :class_)
        OR (scope = 'account' AND value = :account))
    FROM (SELECT queued_at FROM slices WHERE lane = :lane AND done_at IS NULL AND due_at <= :now LIMIT :width) undone
"""


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


def _now(now: int, waited: int) -> dict[str, int]:
    return {"now": now, "before": now - waited if waited else NEVER}


_TO_PLAN = """
    SELECT 1 FROM events WHERE status IN ('accepted', 'planning') AND plan_owner IS NULL
      AND (not_before IS NULL OR not_before <= :now) AND accepted_at <= :before
"""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is due and nobody has begun."""

    plan: bool  # an event waits to be planned
    retries: bool  # deferred mail is due
    lanes: Sequence[Lane]  # those with slices that stand in no queue, the most urgent first


def look(connection: Connection, lanes: Collection[Lane], *, now: int, waited: int = 0) -> Waiting:
    """What is due and nobody has begun, in these lanes: one statement.

    With `waited` of the events to be planned only those that were accepted so many microseconds ago.
    """
    plan, retries, *to_feed = run(connection, _LOOK, _now(now, waited)).first
    fed = [lane for lane, waits in zip(Lane, to_feed, strict=True) if waits and lane in lanes]
    return Waiting(bool(plan), bool(retries), fed)


_DUE = "SELECT 1 FROM slices WHERE done_at IS NULL AND due_at <= :now AND queued_at IS NULL AND owner IS NULL"
_LOOK = ", ".join(
    [
        f"SELECT EXISTS ({_TO_PLAN})",
        "EXISTS (SELECT 1 FROM deliveries WHERE due_at <= :now AND status = 0)",
        *[f"EXISTS ({_DUE} AND lane = {int(lane)})" for lane in Lane],
    ]
)


def _any(connection: Connection, query: Select[Any]) -> bool:
    return connection.execute(query.limit(1)).first() is not None


def queued(connection: Connection, lane: Lane, *, before: int) -> dict[int, int]:
    """The slices of a lane that were queued before `before` and that nobody took yet: number -> when."""
    rows = connection.execute(
        select(slices.c.id, slices.c.queued_at)
        .where(slices.c.lane == int(lane), slices.c.done_at.is_(None), slices.c.owner.is_(None))
        .where(slices.c.queued_at < before)
    )
    return {row.id: row.queued_at for row in rows}


REFILL = 4
#: A queue of small slices is filled up again once a quarter of it is free.


@dataclass(frozen=True, slots=True)
class Taken:
    """Slices that were marked as queued: they go into the queue of their lane now."""

    numbers: Sequence[int]
    mails: int  # in all of them
    first: bool  # none of their lane stood in its queue or was at work before
    standing: int  # slices that stand there or are at work now
    whole: bool  # at least half of the mails are there that may be


NOTHING_TAKEN = Taken((), 0, first=False, standing=0, whole=False)


def take(connection: Connection, lane: Lane, *, room: int, now: int, small: int = 1) -> Taken:
    """Slices of a lane to be put into its queue now, marked as queued.

    At most the mails of `room` whole slices stand there or are in work, and at most `small` slices for each of them:
    most events are for one account, and have a mail or two.
    """
    count, mails_there, paused = run(connection, _STANDING, {"lane": int(lane)}).first
    left, space = small * room - count, SLICE_SIZE * room - mails_there
    if left <= (small - 1) * room // REFILL or space <= 0:  # small ones are queued many at a time
        return NOTHING_TAKEN
    mark = _mark(~_paused(connection)) if paused else _MARK
    rows = connection.execute(mark, {"fed": int(lane), "now": now, "left": left, "space": space}).all()
    if not rows:
        return NOTHING_TAKEN
    mails = sum(row.last_n - row.first_n + 1 for row in rows)
    whole = 2 * (mails_there + mails) >= SLICE_SIZE * room
    return Taken(sorted(row.id for row in rows), mails, count == 0, standing=count + len(rows), whole=whole)


_STANDING = """
    SELECT count(*), coalesce(sum(last_n - first_n + 1), 0), EXISTS (SELECT 1 FROM pauses)
    FROM slices WHERE lane = :lane AND done_at IS NULL AND queued_at IS NOT NULL
"""


def _mark(condition: ColumnElement[bool]) -> ReturningUpdate[Any]:
    """Marks as queued the first `left` waiting slices of a lane whose events meet a condition, up to `space` mails.

    Other workers feed the same lane: each slice is marked, and queued, by one of them.
    """
    waiting = (
        select(slices.c.id, slices.c.due_at, (slices.c.last_n - slices.c.first_n + 1).label("mails"))
        .join(events, events.c.id == slices.c.event_id)
        .where(slices.c.lane == bindparam("fed"), slices.c.done_at.is_(None), slices.c.due_at <= bindparam("now"))
        .where(slices.c.queued_at.is_(None), slices.c.owner.is_(None), condition)
        .order_by(slices.c.due_at, slices.c.id)
        .limit(bindparam("left"))
        .subquery()
    )
    before = func.sum(waiting.c.mails).over(order_by=(waiting.c.due_at, waiting.c.id)) - waiting.c.mails
    chosen = select(waiting.c.id, before.label("before")).subquery()
    return (
        update(slices)
        .where(slices.c.id.in_(select(chosen.c.id).where(chosen.c.before < bindparam("space"))))
        .where(slices.c.queued_at.is_(None))
        .values(queued_at=bindparam("now", type_=BigInteger))
        .returning(slices.c.id, slices.c.first_n, slices.c.last_n)
    )


_MARK = _mark(true())


def forget_queued(connection: Connection, *, before: int, numbers: Sequence[int] | None = None) -> int:
    """Slices (of these numbers) that were queued before `before` and that nobody took are queued again; how many."""
    chosen = slices.c.done_at.is_(None) & slices.c.owner.is_(None) & (slices.c.queued_at < before)
    if numbers is not None:
        chosen &= slices.c.id.in_(list(numbers))
    return connection.execute(update(slices).where(chosen).values(queued_at=None)).rowcount


def ended(connection: Connection, *, after: int = 0, limit: int = 1000) -> tuple[list[tuple[int, str]], int]:
    """Events of which nothing is left that the machine does by itself: (number, ULID); looks at `limit` of them.

    Also returns behind which event to look next, 0 where all were looked at.
    """
    looked = list(
        connection.execute(
            select(events.c.id).where(events.c.status == "sending", events.c.id > after)
            .order_by(events.c.id).limit(limit)
        ).scalars()
    )  # fmt: skip
    if not looked:
        return [], 0
    rows = connection.execute(
        select(events.c.id, events.c.ulid)
        .where(events.c.status == "sending", events.c.id.between(looked[0], looked[-1]))
        .where(text(ledger.nothing_left("events.id")))
    )
    return [(row.id, row.ulid) for row in rows], looked[-1] if len(looked) == limit else 0


def end_events(connection: Connection, numbers: Sequence[int]) -> None:
    """Mark events as done that are still being sent."""
    connection.execute(
        update(events).where(events.c.id.in_(numbers), events.c.status == "sending").values(status="done")
    )


REST_MICROSECONDS = 1_500_000
#: A slice that rests no longer than this waits for a relay's rate, or for the database: it counts as due.


def due_now(
    connection: Connection, *, now: int, event_ids: Sequence[int] | None = None, lanes: Collection[Lane] = tuple(Lane)
) -> bool:
    """Whether anything is owed that could be done now: planning, slices, retries; paused work is not.

    Of these events, and in these lanes; every worker plans for all lanes.
    """
    served = [int(lane) for lane in lanes]
    planning = select(events.c.id).where(
        or_(events.c.status == "planning", events.c.status == "accepted"),
        or_(events.c.not_before.is_(None), events.c.not_before <= now),
    )
    sending = (
        select(slices.c.id)
        .join(events, events.c.id == slices.c.event_id)
        .where(slices.c.done_at.is_(None), slices.c.due_at <= now + REST_MICROSECONDS, slices.c.lane.in_(served))
        .where(~_paused(connection))
    )
    retries = (
        select(deliveries.c.n)
        .join(events, events.c.id == deliveries.c.event_id)
        .where(deliveries.c.due_at <= now, deliveries.c.status == int(Status.PLANNED), events.c.lane.in_(served))
    )
    if event_ids is not None:
        planning = planning.where(among(connection, events.c.id, event_ids))
        sending = sending.where(among(connection, slices.c.event_id, event_ids))
        retries = retries.where(among(connection, deliveries.c.event_id, event_ids))
    return any(_any(connection, query) for query in (planning, sending, retries))


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
