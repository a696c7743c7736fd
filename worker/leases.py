"""Which worker processes live, and what becomes of the work of those that vanished.

A worker says that it lives by changing its row (`beat`). Others call it dead when that row did not change for a lease
of their own time (`Watch`): no clock is compared with another host's, so clocks that are wrong or jump free nothing.
A worker that was called dead finds its row gone, sends nothing more, and ends.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, Connection, case, delete, insert, select, update

from subscriptions.bulk import run
from worker import ledger
from worker.ledger import HOLD_CLASS, Lane
from worker.schema import events, slices, troubles, workers

NUMBERS = 2**53
#: A worker's number is drawn below this and never given again: a frozen worker that comes back is not taken for a new
#: one. JSON keeps whole numbers up to it.


def register(connection: Connection, *, host: str, pid: int, lanes: Collection[Lane], now: int) -> int:
    """A row for this worker process; its number owns slices. No lanes: it plans and sends nothing."""
    named = ",".join(lane.name.lower() for lane in lanes)
    number = 1 + secrets.randbelow(NUMBERS - 1)
    connection.execute(insert(workers).values(id=number, host=host, pid=pid, lanes=named, started_at=now, beat_at=now))
    return number


def beat(connection: Connection, worker: int, *, now: int) -> bool:
    """Say that the worker lives; False where others called it dead meanwhile."""
    # A clock that jumped back must not look like silence: the row changes with every heartbeat.
    moved = case((workers.c.beat_at >= now, workers.c.beat_at + 1), else_=now)
    return connection.execute(update(workers).where(workers.c.id == worker).values(beat_at=moved)).rowcount == 1


def someone_sends(connection: Connection) -> bool:
    """Whether a worker is there that has a relay; one without plans events and sends nothing."""
    return connection.execute(select(workers.c.id).where(workers.c.lanes != "").limit(1)).first() is not None


def serving(connection: Connection, lane: Lane) -> int:
    """How many workers on record serve a lane."""
    named = run(connection, "SELECT lanes FROM workers").rows
    return sum(lane.name.lower() in lanes.split(",") for (lanes,) in named)


def free_own(connection: Connection, worker: int, *, now: int) -> None:
    """At a stop: give back what was claimed; a flight that did not end in time is treated as a vanished worker's."""
    _free(connection, worker, slices.c.owner == worker, now=now)
    free_plans(connection, worker)


def leave(connection: Connection, worker: int) -> None:
    """Take the worker's row away; what it still owns is freed by `rescue`."""
    connection.execute(delete(workers).where(workers.c.id == worker))
    connection.execute(delete(troubles).where(troubles.c.owner == worker))


@dataclass(slots=True)
class Watch:
    """What one process saw of the others' heartbeats: number -> (the last one, seconds without a new one).

    Only time in which this process looked counts: one that was frozen, or could not reach the database, has seen
    nothing, and calls nobody dead because of it.
    """

    worker: int
    lease_seconds: float
    longest_step: float  # seconds between two looks that count in full
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)
    _looked_at: float | None = None

    def look(self, connection: Connection, *, at: float) -> dict[int, int]:
        """Look once, at `at` (seconds of a steady clock): the dead by number, with their last heartbeat."""
        step = 0.0 if self._looked_at is None else max(0.0, min(at - self._looked_at, self.longest_step))
        self._looked_at = at
        found: dict[int, tuple[int, float]] = {}
        for row in connection.execute(select(workers.c.id, workers.c.beat_at).where(workers.c.id != self.worker)):
            last, silent = self._seen.get(row.id, (row.beat_at, 0.0))
            found[row.id] = (row.beat_at, silent + step if last == row.beat_at else 0.0)
        self._seen = found
        return {number: last for number, (last, silent) in found.items() if silent >= self.lease_seconds}


def owned(connection: Connection, worker: int) -> set[int]:
    """The slices that a worker holds, by number."""
    return set(connection.execute(select(slices.c.id).where(slices.c.owner == worker)).scalars())


def free_some(connection: Connection, worker: int, numbers: Collection[int], *, now: int) -> int:
    """Free slices of a worker on which nobody there works; returns how many."""
    if not numbers:
        return 0
    return _free(connection, worker, (slices.c.owner == worker) & slices.c.id.in_(list(numbers)), now=now)


def free_plans(connection: Connection, worker: int) -> None:
    """Let others plan what this worker took over and does not plan."""
    mine = (events.c.status == "planning") & (events.c.plan_owner == worker)
    connection.execute(update(events).where(mine).values(plan_owner=None))


def free_orphans(connection: Connection, worker: int, *, dead: dict[int, int] | None, now: int) -> int:
    """Free what vanished workers held: `dead` as `Watch.look` gives it; None: every other worker is gone.

    What their open flights name in the hold class is held with the reason `unknown`; everything else is sent again or
    was never attempted. Returns the number of slices that were freed.
    """
    if dead is None:
        connection.execute(delete(workers).where(workers.c.id != worker))
    for number, last in (dead or {}).items():
        connection.execute(delete(workers).where(workers.c.id == number, workers.c.beat_at == last))
    alive = select(workers.c.id)
    freed = _free(connection, worker, slices.c.owner.is_not(None) & slices.c.owner.not_in(alive), now=now)
    connection.execute(
        update(events)
        .where(events.c.status == "planning", events.c.plan_owner.is_not(None), events.c.plan_owner.not_in(alive))
        .values(plan_owner=None)
    )
    connection.execute(delete(troubles).where(troubles.c.owner.not_in(alive)))
    return freed


def _free(connection: Connection, worker: int, whose: ColumnElement[bool], *, now: int) -> int:
    """Free the slices that `whose` says and end their open flights; returns how many slices."""
    held = connection.execute(
        select(slices.c.id, slices.c.event_id, slices.c.owner, slices.c.epoch, events.c["class"])
        .join(events, events.c.id == slices.c.event_id)
        .where(whose, slices.c.done_at.is_(None))
        .order_by(slices.c.id)
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
