"""A worker that was called dead ends; a database that is away for a while ends nobody."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import delete, insert, text, update

from subscriptions.database import Database, system_clock
from tests.databases import NOW
from tests.house import ACME, event, house, publish
from tests.smtpd import SmtpServer
from worker import leases
from worker.app import App, Engine
from worker.heartbeat import Heartbeat
from worker.ledger import Lane
from worker.lock import WorkLock
from worker.schema import pauses, slices, workers


def until(done: Callable[[], bool], seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.02)


def heart_of(database: Database, lock: WorkLock) -> Heartbeat:
    assert lock.take()
    with database.write() as connection:
        number = leases.register(connection, host="h", pid=1, lanes=list(Lane), now=NOW)
    return Heartbeat(database, lock, worker=number, lease_seconds=0.3, clock=lambda: NOW)


def test_a_heart_that_beats_holds_its_lease_and_one_that_stops_does_not(database: Database) -> None:
    lock = WorkLock(database)
    heart = heart_of(database, lock)
    assert not heart.holds()
    heart.start()
    time.sleep(0.6)
    assert heart.holds()
    heart.stop()
    until(lambda: not heart.holds())
    lock.free()


def test_a_worker_that_others_called_dead_learns_of_it_and_holds_nothing(database: Database) -> None:
    lock = WorkLock(database)
    heart = heart_of(database, lock)
    heart.start()
    with database.write() as connection:
        connection.execute(delete(workers))
    until(lambda: heart.lost is not None)
    assert not heart.holds()
    heart.stop()
    lock.free()


def test_the_right_to_work_is_taken_again_after_the_server_cut_its_connection(postgresql_database: Database) -> None:
    mine, other = WorkLock(postgresql_database), WorkLock(postgresql_database)
    heart = heart_of(postgresql_database, mine)
    heart.start()
    cut_connections(postgresql_database)
    time.sleep(0.6)
    assert heart.lost is None
    assert not other.take()
    heart.stop()
    mine.free()
    until(other.take)  # the server notices the end of a connection when it comes to it
    other.free()


def test_who_lost_the_right_to_work_to_another_process_ends(postgresql_database: Database) -> None:
    mine, other = WorkLock(postgresql_database), WorkLock(postgresql_database)
    heart = heart_of(postgresql_database, mine)
    cut_connections(postgresql_database)
    until(other.take)
    heart.start()
    until(lambda: heart.lost is not None)
    heart.stop()
    other.free()


def cut_connections(database: Database) -> None:
    """What a restart of the server, or of the network, does to those who are connected."""
    with database.read() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
        )


def worked(app: App, look: Callable[[Engine], None]) -> None:
    engine = Engine(app)
    engine.start()
    try:
        look(engine)
    finally:
        engine.stop()


def test_an_engine_whose_place_was_taken_is_not_healthy_and_stops_in_peace(tmp_path: Path) -> None:
    with SmtpServer() as server, house(
        tmp_path, ACME, clock=system_clock, lease_seconds="1", relay_urls=f"smtp://127.0.0.1:{server.port}?tls=none"
    ) as app:  # fmt: skip

        def look(engine: Engine) -> None:
            assert engine.healthy()
            with app.database.write() as connection:
                connection.execute(delete(workers))
            until(lambda: not engine.healthy())
            publish(app, event("file.failed"))
            time.sleep(0.5)
            assert server.accepted == [], "it begins nothing more"

        worked(app, look)
        worked(app, lambda engine: until(engine.idle))
        assert len(server.accepted) == 1


def test_a_slice_that_is_ours_and_that_nobody_works_on_is_sent_all_the_same(tmp_path: Path) -> None:
    """As after a claim whose commit was answered by nobody: the connection to the database broke there."""
    with SmtpServer() as server, house(
        tmp_path, ACME, clock=system_clock, lease_seconds="1", relay_urls=f"smtp://127.0.0.1:{server.port}?tls=none"
    ) as app:  # fmt: skip
        with app.database.write() as connection:
            connection.execute(insert(pauses).values(scope="all", value="", by="test", at=1))
        publish(app, event("file.failed"))

        def look(engine: Engine) -> None:
            with app.database.write() as connection:
                connection.execute(update(slices).values(owner=engine.number, epoch=7))
                connection.execute(delete(pauses))
            until(engine.idle)

        worked(app, look)
        assert len(server.accepted) == 1
