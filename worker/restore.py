"""After the database was restored from a backup: what may have gone out since the backup is held, not sent again.

Promises (reliability.md R31): once `hold` has run, no mail that was owed at the time of the backup leaves before a
person releases it. Whatever waited for its planning then may have been planned and sent since, so it is planned first
and held with the rest; only what was not to go before a time still to come is provably unsent, and goes on by itself.

On SQLite an older database is also recognised: each stretch of work is counted in the database's own header
(`PRAGMA user_version`) and then in a small file beside it. Where the file has counted further than the database, mails
were sent that the database does not know of. It tells nothing where the file was restored too, or was never there.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, delete, func, insert, or_, select, update

from subscriptions import directory
from subscriptions.database import Clock, Database, DatabaseUnusable
from subscriptions.schema import audit
from worker import fanout, leases, ledger, logs, matters
from worker.fanout import Planner
from worker.ledger import Status
from worker.lock import WorkLock
from worker.schema import deliveries, events, flights, slices, troubles, workers

logger = logs.get(__name__)

REASON = "restored"
#: Why a mail is held that may have gone out after the backup was made.


class StillWorking(Exception):  # noqa: N818 - it reads as the sentence it is
    """A worker lives: what it sends could not be held. The sentence names it."""


class OlderDatabase(DatabaseUnusable):
    """The database is older than the mails that were sent from it: the sentence names the command to run."""


class LaterMailOwed(Exception):  # noqa: N818 - it reads as the sentence it is
    """On a database older than its mails, owed mail would be left alone, and nobody agreed: nothing is held."""

    def __init__(self, later: Later) -> None:
        super().__init__(f"owed and not held: {later}")
        self.later = later


@dataclass(frozen=True, slots=True)
class Held:
    """How many mails of an event are held."""

    event: str  # the ULID
    deliveries: int


@dataclass(frozen=True, slots=True)
class Later:
    """What is owed for events accepted after the backup, so they say: it is left alone, and sent."""

    deliveries: int = 0
    events: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was held, and what was left alone."""

    held: list[Held]
    later: Later


def hold(
    database: Database,
    planner: Planner,
    *,
    since: int | None,
    agree: Callable[[Later], bool],
    actor: str,
    lease_seconds: int,
    clock: Clock,
) -> Outcome:
    """Hold what was owed when the backup was made; running it again changes nothing more.

    Events accepted after `since` (microseconds) came after the restore and are left alone. Where mail is owed for them,
    `agree` says whether a person wants it sent. Without that the database stays marked as older, if it is.
    Raises `StillWorking`, `LaterMailOwed`, and what `agree` raises to hold nothing.
    """
    lock = WorkLock(database)
    if not lock.take():
        holder = lock.holder()
        named = f" (process {holder})" if holder else ""
        message = f"a worker works on this database{named}: stop it first, and start it again afterwards"
        raise StillWorking(message)
    try:
        with database.write() as connection:
            _refuse_living(database, connection, lease_seconds=lease_seconds, now=clock())
            _forget_workers(connection, now=clock())
        _plan(database, planner, clock=clock)
        with database.read() as connection:
            later = _later(connection, since=since)
        agreed = later.deliveries == 0 or agree(later)
        if not agreed:
            _refuse_to_send(database, later)
        with database.write() as connection:
            held = _hold(connection, since=since, now=clock())
            _record(connection, held, later, since=since, actor=actor, now=clock())
        if agreed:
            mark(database)
    finally:
        lock.free()
    return Outcome(held, later)


def _refuse_to_send(database: Database, later: Later) -> None:
    """Raises `LaterMailOwed` where the database is known to be older than its mails: they would go out twice."""
    try:
        refuse_if_older(database)
    except OlderDatabase as error:
        raise LaterMailOwed(later) from error


def _refuse_living(database: Database, connection: Connection, *, lease_seconds: int, now: int) -> None:
    """On PostgreSQL a worker that was cut off from the server has lost its lock, and may still send."""
    if database.dialect == "sqlite":
        return
    lives = connection.execute(
        select(workers).where(workers.c.beat_at > now - lease_seconds * 1_000_000).order_by(workers.c.id).limit(1)
    ).first()
    if lives is not None:
        message = (
            f"the worker {lives.id} (process {lives.pid} on {lives.host}) said within {lease_seconds} seconds that it "
            "lives: stop all workers, wait that long, then run this again"
        )
        raise StillWorking(message)


def _forget_workers(connection: Connection, *, now: int) -> None:
    """End the flights that were open, and take away the workers of that time with all that they held."""
    opened = select(flights.c.slice_id, slices.c.event_id).join(slices, slices.c.id == flights.c.slice_id).distinct()
    for one in connection.execute(opened).all():
        ledger.end_open_flights(connection, ledger.NO_WORKER, one.slice_id, one.event_id, hold=False, now=now)
    connection.execute(update(slices).where(slices.c.done_at.is_(None)).values(owner=None, queued_at=None))
    connection.execute(update(events).where(events.c.plan_owner.is_not(None)).values(plan_owner=None))
    connection.execute(delete(workers))
    connection.execute(delete(troubles))


def _plan(database: Database, planner: Planner, *, clock: Clock) -> None:
    """Plan what waits for it, so that each of its mails can be held and looked at."""
    with database.write() as connection:
        number = leases.register(connection, host=socket.gethostname(), pid=os.getpid(), lanes=(), now=clock())
    try:
        while True:
            with database.write() as connection:
                event = fanout.take_event(connection, number, now=clock())
            if event is None:
                return
            try:
                fanout.plan_event(database, planner, event, number, clock=clock, go_on=lambda: True)
            except DatabaseUnusable:
                raise
            except Exception as error:
                logger.exception("event.held", event_id=event.ulid, why=str(error), what_next="a person decides")
                with database.write() as connection:
                    ledger.hold_event(connection, event.id, reason="cannot_be_planned")
    finally:
        with database.write() as connection:
            leases.leave(connection, number)


def _later(connection: Connection, *, since: int | None) -> Later:
    """What is owed and is not held, because its event was accepted after `since`."""
    if since is None:
        return Later()
    owed = (deliveries.c.status == int(Status.PLANNED)) & (events.c.accepted_at > since)
    counts = select(func.count(), func.count(deliveries.c.event_id.distinct()))
    mails, concerned = connection.execute(
        counts.select_from(deliveries.join(events, events.c.id == deliveries.c.event_id)).where(owed)
    ).one()
    return Later(mails, concerned)


def _hold(connection: Connection, *, since: int | None, now: int) -> list[Held]:
    unfinished = select(slices.c.event_id).where(slices.c.done_at.is_(None))
    chosen = select(events.c.id).where(
        or_(events.c.status == "sending", (events.c.status == "cancelled") & events.c.id.in_(unfinished))
    )
    if since is not None:
        chosen = chosen.where(events.c.accepted_at <= since)
    numbers = list(connection.execute(chosen).scalars())
    owed = directory.among(connection, deliveries.c.event_id, numbers) & (deliveries.c.status == int(Status.PLANNED))
    counts: Mapping[int, int] = {
        row.event_id: row.mails
        for row in connection.execute(
            select(deliveries.c.event_id, func.count().label("mails")).where(owed).group_by(deliveries.c.event_id)
        )
    }
    connection.execute(
        update(deliveries)
        .where(owed)
        .values(status=int(Status.HELD), reason=REASON, due_at=None, retry_slice=None, settled_at=now)
    )
    moved = {(event_id, Status.HELD): count for event_id, count in counts.items()}
    ledger.add_tallies(
        connection, ledger.NO_WORKER, moved | {(one, Status.PLANNED): -count for one, count in counts.items()}
    )
    connection.execute(
        update(slices)
        .where(directory.among(connection, slices.c.event_id, numbers), slices.c.done_at.is_(None))
        .values(done_at=now)
    )
    chosen_events = directory.among(connection, events.c.id, numbers)
    connection.execute(update(events).where(chosen_events, events.c.status == "sending").values(status="done"))
    matters.note(
        connection, ledger.NO_WORKER, {(event_id, REASON): count for event_id, count in counts.items()}, now=now
    )
    rows = connection.execute(
        select(events.c.id, events.c.ulid).where(directory.among(connection, events.c.id, counts)).order_by(events.c.id)
    )
    return [Held(row.ulid, counts[row.id]) for row in rows]


def _record(connection: Connection, held: list[Held], later: Later, *, since: int | None, actor: str, now: int) -> None:
    counts = {one.event: one.deliveries for one in held}
    body = {"since": since, "held": counts, "left_alone": {"deliveries": later.deliveries, "events": later.events}}
    connection.execute(
        insert(audit).values(at=now, actor=actor, door="cli", account_id=None, kind=REASON, body=json.dumps(body))
    )


# ---------------------------------------------------------------- an older database, recognised


def mark(database: Database) -> None:
    """Count one more stretch of work, in the database and then beside it; on PostgreSQL there is no such place.

    A worker does it with its heartbeat: what was sent within one heartbeat of the backup is not recognised.
    """
    if database.path is None:
        return
    with database.write() as connection:
        name, number = _counted(connection)
        connection.exec_driver_sql(f"PRAGMA user_version = {number + 1}")
    beside = _beside(database.path)
    draft = beside.with_name(f"{beside.name}.{os.getpid()}")
    with suppress(OSError):  # a full disk must not stop the work: the count beside stays behind, which accuses nobody
        draft.write_text(f"{name} {number + 1}\n", encoding="utf-8")
        draft.replace(beside)


def refuse_if_older(database: Database) -> None:
    """Raises `OlderDatabase` where mails were sent that the database does not know of."""
    if database.path is None:
        return
    beside = _beside(database.path)
    try:
        name, _, number = beside.read_text(encoding="utf-8").strip().partition(" ")
    except (OSError, UnicodeDecodeError):
        return
    with database.read() as connection:
        own, counted = _counted(connection)
    if name == own and number.isdecimal() and int(number) > counted:
        message = (
            f"the database {database.path} is older than the mails that were sent from it, as after a restore: run "
            f"`rolecast db restored`, which holds what may have gone out (or remove {beside}, if nothing was lost)"
        )
        raise OlderDatabase(message)


def _counted(connection: Connection) -> tuple[str, int]:
    """Which installation this is, and how many stretches of work its database has counted."""
    name = hashlib.blake2b(b"rolecast work mark", key=directory.address_key(connection), digest_size=8).hexdigest()
    return name, int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".mark")
