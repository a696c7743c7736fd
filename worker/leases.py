"""Which worker processes live, and what becomes of the work of those that vanished.

A worker that holds a lease may send; it says that it lives, and stops by its own clock before others may take over.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, delete, insert, or_, select, update

from worker import ledger
from worker.ledger import HOLD_CLASS
from worker.schema import events, slices, workers


def register(connection: Connection, *, host: str, pid: int, lanes: str, now: int) -> int:
    """A row for this worker process; its number owns slices."""
    statement = insert(workers).values(host=host, pid=pid, lanes=lanes, started_at=now, beat_at=now)
    return int(connection.execute(statement.returning(workers.c.id)).scalar_one())


def someone_sends(connection: Connection) -> bool:
    """Whether a worker is there that has a relay; one without plans events and sends nothing."""
    return connection.execute(select(workers.c.id).where(workers.c.lanes != "").limit(1)).first() is not None


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
            ledger.end_open_flights(connection, worker, one.id, one.event_id, hold=one[4] == HOLD_CLASS, now=now)
    return len(held)
