"""What a person decides about mail and events that the machine set aside; each decision is kept with who and when.

`settle` says what became of mails whose answer was lost; `plan_again` is for events that could not be planned;
`release`, `retry` and `cancel` are for what a person wants otherwise, and `record` keeps who did it. The
record is a row of the audit table: actor, door, and what was decided by row numbers, with no address in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from sqlalchemy import ColumnElement, Connection, and_, exists, func, insert, or_, select, update

from subscriptions.directory import among
from subscriptions.schema import audit
from worker import ledger, matters
from worker.ledger import Status
from worker.schema import deliveries, events, flights, slices

SETTLED = "settled_by_person"
#: The reason of a mail that a person said was not sent.
KEPT = 1_000
#: Numbers of mails that a record names; the rest is counted.
HELD_REASONS: Final = tuple(sorted(matters.HELD | {"test", "team"}))
#: Every reason for which mail is held.

_HELD: Final = deliveries.c.status == int(Status.HELD)
_UNCERTAIN: Final = deliveries.c.reason.in_(sorted(matters.UNCERTAIN))

Decision = Literal[
    "deliveries.settled", "deliveries.released", "deliveries.retried", "event.planned_again", "event.cancelled"
]


def settle(
    connection: Connection, event_id: int, *, numbers: Sequence[int] | None, accepted: bool, by: str, now: int
) -> int:
    """Say of held mails of which nobody knew, all of an event or those of these numbers, whether they went out.

    `accepted`: the relay's log has them. Otherwise they failed and can be retried. Mails that are held for another
    reason, or not held, stay as they are. Returns how many were settled; `by` is who, such as `cli:ada`.
    """
    chosen = and_(deliveries.c.event_id == event_id, _HELD, _UNCERTAIN)
    if numbers is not None:
        chosen &= among(connection, deliveries.c.n, sorted(set(numbers)))
    status = Status.ACCEPTED if accepted else Status.FAILED
    settled = connection.execute(
        update(deliveries)
        .where(chosen)
        .values(status=int(status), reason=SETTLED, due_at=None, settled_at=now)
        .returning(deliveries.c.n)
    )
    found = sorted(settled.scalars())
    if not found:
        return 0
    count = len(found)
    ledger.add_tallies(connection, ledger.NO_WORKER, {(event_id, Status.HELD): -count, (event_id, status): count})
    if not accepted:
        matters.note(connection, ledger.NO_WORKER, {(event_id, SETTLED): count}, now=now)
    record(
        connection, "deliveries.settled", event_id, by=by, now=now, numbers=found[:KEPT], deliveries=count,
        became=status.name.lower(),
    )  # fmt: skip
    return count


def plan_again(connection: Connection, event_id: int, *, by: str, now: int) -> bool:
    """Let an event that could not be planned be planned again, from where it stopped; False where it is not held."""
    changed = connection.execute(
        update(events)
        .where(events.c.id == event_id, events.c.status == "held")
        .values(status="planning", reason=None, plan_owner=None)
    ).rowcount
    if changed:
        record(connection, "event.planned_again", event_id, by=by, now=now)
    return bool(changed)


def cancel(connection: Connection, event_id: int, *, by: str, now: int) -> int:
    """Withdraw what is not yet sent of an event; takes effect before the next flight. Returns how many deliveries.

    Held mail is withdrawn too, of an event that is done as well; but not what may have gone out (`uncertain`), which
    is left to be settled. What is in flight may go out all the same: its acceptance is recorded then (`ledger.settle`).
    """
    kept_back = and_(deliveries.c.event_id == event_id, _HELD, ~_UNCERTAIN)
    under_way = events.c.status.in_(["accepted", "planning", "sending", "held"])
    changed = connection.execute(
        update(events)
        .where(events.c.id == event_id, or_(under_way, and_(events.c.status == "done", exists().where(kept_back))))
        .values(status="cancelled", cancelled_at=now)
    ).rowcount
    named = select(flights.c.members).join(slices, slices.c.id == flights.c.slice_id)
    rows = connection.execute(named.where(slices.c.event_id == event_id)).scalars()
    in_flight = {n for members in rows for n in json.loads(members)}
    cancelled = update(deliveries).values(
        status=int(Status.CANCELLED), reason=ledger.CANCELLED, due_at=None, settled_at=now
    )
    planned = connection.execute(
        cancelled.where(deliveries.c.event_id == event_id, deliveries.c.status == int(Status.PLANNED)).where(
            ~among(connection, deliveries.c.n, sorted(in_flight))
        )
    ).rowcount
    held = connection.execute(cancelled.where(kept_back)).rowcount
    withdrawn = planned + held
    counts = {
        (event_id, Status.CANCELLED): withdrawn,
        (event_id, Status.PLANNED): -planned,
        (event_id, Status.HELD): -held,
    }
    ledger.add_tallies(connection, ledger.NO_WORKER, counts)
    if changed or withdrawn:
        record(connection, "event.cancelled", event_id, by=by, now=now, withdrawn=withdrawn)
    # The last: a flight that is being begun holds the guard, and then wants what stands above.
    ledger.raise_guard(connection)
    return withdrawn


def release(
    connection: Connection, event_id: int, *, numbers: Sequence[int] | None, reason: str | None = None, now: int
) -> int:
    """Let held deliveries of an event go now, those of these numbers and this reason; returns how many.

    What may have gone out already (`uncertain`) goes only where its numbers or its reason are given.
    """
    wanted = _HELD
    if reason is not None:
        wanted &= deliveries.c.reason == reason
    elif numbers is None:
        wanted &= ~_UNCERTAIN
    return _owe_again(connection, event_id, wanted, numbers=numbers, now=now)


def uncertain(connection: Connection, event_id: int) -> Mapping[str, int]:
    """How many mails of an event are held of which nobody knows whether they went out, by reason."""
    query = (
        select(deliveries.c.reason, func.count().label("n"))
        .where(deliveries.c.event_id == event_id, _HELD, _UNCERTAIN)
        .group_by(deliveries.c.reason)
        .order_by(deliveries.c.reason)
    )
    return {row.reason: row.n for row in connection.execute(query)}


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
    ledger.add_tallies(connection, ledger.NO_WORKER, changes)
    if owed_again:
        ended = (events.c.id == event_id) & (events.c.status == "done")
        connection.execute(update(events).where(ended).values(status="sending"))
    return owed_again


def record(connection: Connection, what: Decision, event_id: int, *, by: str, now: int, **body: object) -> None:
    """Keep who decided what, and when."""
    connection.execute(
        insert(audit).values(
            at=now,
            actor=by,
            door=by.partition(":")[0],
            account_id=None,
            kind=what,
            body=json.dumps({"event": event_id, **body}),
        )
    )
