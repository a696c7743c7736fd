"""Outcomes on their way into the ledger: how many mails may be in flight meanwhile, and when a slice goes back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, event, insert, select

from subscriptions.database import Database
from tests.house import NOW
from worker import leases, ledger
from worker.ledger import Claim, Lane, Settlement, Status
from worker.schema import deliveries, events, slices
from worker.settler import IN_FLIGHT, LAG_SECONDS, SETTLE_OUTCOMES, Settler
from worker.writer import Writer

MAILS = IN_FLIGHT + 50


@pytest.fixture
def owing(database: Database) -> tuple[Database, int, Claim]:
    """A database with one claimed slice of many mails, and its worker."""
    with database.write() as connection:
        worker = leases.register(connection, host="h", pid=1, lanes=list(Lane), now=NOW)
        values = dict.fromkeys(["ulid", "source", "ce_id", "type", "category", "scope", "mode"], "x")
        numbers = {"id": 1, "content_mac": b"", "lane": 2, "accepted_at": NOW, "class": "operational"}
        rest = {"status": "sending", "sender_domain": "v.example", "bounce_domain": "v.example"}
        connection.execute(insert(events).values(**values, **numbers, **rest))
        rows = [
            {"event_id": 1, "n": n, "mailbox_id": n, "account_id": 1, "contact_id": n, "shape_id": 1, "status": 0}
            for n in range(1, MAILS + 1)
        ]
        connection.execute(insert(deliveries), rows)
        connection.execute(insert(slices).values(event_id=1, lane=2, first_n=1, last_n=MAILS, due_at=NOW))
        claim = ledger.claim(connection, 1, worker, now=NOW)
    assert claim is not None
    return database, worker, claim


@contextmanager
def writing(database: Database) -> Iterator[Writer]:
    writer = Writer(database)
    writer.start()
    try:
        yield writer
    finally:
        writer.stop()


def accepted(claim: Claim, *numbers: int) -> Settlement:
    replies = [f"250 {n}" for n in numbers]
    return Settlement(
        1, numbers, replies, claim.slice_id, claim.epoch, 0, Status.ACCEPTED, None, True, None, "r", NOW, NOW
    )


def standing(database: Database) -> list[tuple[int, str | None]]:
    with database.read() as connection:
        query = select(deliveries.c.status, deliveries.c.reply).order_by(deliveries.c.n)
        return [(row.status, row.reply) for row in connection.execute(query)]


def kept_busy(writer: Writer) -> Callable[[], None]:
    """Keep the writer from committing anything until the returned function is called."""
    go_on = threading.Event()
    writer.submit(lambda _connection: go_on.wait(10))
    return go_on.set


def test_no_mail_is_begun_while_as_many_are_in_flight_as_may_be(owing: tuple[Database, int, Claim]) -> None:
    """In flight: handed over and not answered, or answered and not on record (design, principle 6)."""
    database, worker, claim = owing

    async def send(writer: Writer) -> None:
        settler = Settler(writer, worker)
        assert settler.take(MAILS) == IN_FLIGHT
        settler.in_air = 200
        assert settler.take(MAILS) == IN_FLIGHT - 200
        go_on = kept_busy(writer)
        for n in range(1, 101):
            settler.in_air -= 1
            settler.add(accepted(claim, n))
            assert settler.take(MAILS) <= IN_FLIGHT - 200, "an answer frees no place: its record does"
        await asyncio.sleep(2 * LAG_SECONDS)
        assert settler.take(MAILS) == 0, "an outcome waits for long"
        go_on()
        await settler.room()
        await settler.recorded(claim.slice_id)
        assert settler.take(MAILS) == IN_FLIGHT - 100

    with writing(database) as writer:
        asyncio.run(send(writer))
    assert standing(database) == [(1, f"250 {n}") for n in range(1, 101)] + [(0, None)] * (MAILS - 100)


def test_outcomes_that_come_together_are_each_recorded_once(owing: tuple[Database, int, Claim]) -> None:
    database, worker, claim = owing

    async def send(writer: Writer) -> None:
        settler = Settler(writer, worker)
        settler.add(accepted(claim, 1))
        settler.add(accepted(claim, *range(2, SETTLE_OUTCOMES)))
        await asyncio.sleep(0)
        settler.add(accepted(claim, *range(SETTLE_OUTCOMES, SETTLE_OUTCOMES + 5)))
        assert settler.take(MAILS) == IN_FLIGHT - SETTLE_OUTCOMES - 4
        await settler.recorded(claim.slice_id)
        assert settler.take(MAILS) == IN_FLIGHT

    with writing(database) as writer:
        asyncio.run(send(writer))
    said = [(1, f"250 {n}") for n in range(1, SETTLE_OUTCOMES + 5)]
    assert standing(database) == said + [(0, None)] * (MAILS - SETTLE_OUTCOMES - 4)


def test_slices_that_need_not_go_back_at_once_go_back_together(owing: tuple[Database, int, Claim]) -> None:
    database, worker, claim = owing
    commits: list[int] = []

    async def send(writer: Writer) -> bool:
        settler = Settler(writer, worker)
        told: list[Connection] = []
        settler.add(accepted(claim, 1))
        settler.besides(told.append)
        ends = asyncio.create_task(settler.finish(claim, now=NOW, at_once=False))
        await asyncio.sleep(0)
        assert (commits, settler.ending[claim.lane]) == ([], 1)
        settler.add(accepted(claim, 2))
        await ends
        assert (len(commits), len(told), settler.ending[claim.lane]) == (1, 1, 0)
        return await settler.finish(claim, now=NOW, at_once=False)  # nothing waits that it could go with

    with writing(database) as writer, counted(database, commits):
        assert not asyncio.run(send(writer)), "mails are left, and it has gone back before"
    assert standing(database)[:3] == [(1, "250 1"), (1, "250 2"), (0, None)]


@contextmanager
def counted(database: Database, commits: list[int]) -> Iterator[None]:
    """Have each commit leave its mark."""

    def count(_connection: Connection) -> None:
        commits.append(1)

    event.listen(database.engine, "commit", count)
    try:
        yield
    finally:
        event.remove(database.engine, "commit", count)


@pytest.mark.parametrize("outcomes", [3, SETTLE_OUTCOMES + 3, MAILS])
def test_a_slice_goes_back_with_its_last_outcomes_and_not_before(
    owing: tuple[Database, int, Claim], outcomes: int
) -> None:
    database, worker, claim = owing
    commits: list[int] = []

    async def send(writer: Writer) -> bool:
        settler = Settler(writer, worker)
        for n in range(1, outcomes + 1):
            settler.add(accepted(claim, n))
        return await settler.finish(claim, now=NOW)

    def count(_connection: Connection) -> None:
        commits.append(1)

    with writing(database) as writer:
        event.listen(database.engine, "commit", count)
        ended = asyncio.run(send(writer))
        event.remove(database.engine, "commit", count)
    assert ended is (outcomes == MAILS), "the event ends with the last of its mails"
    assert sum(status for status, _ in standing(database)) == outcomes
    with database.read() as connection:
        row = connection.execute(select(slices.c.owner, slices.c.done_at)).one()
    assert (row.owner, row.done_at) == (None, NOW if outcomes == MAILS else None)
    assert outcomes > 3 or len(commits) == 1, "in one transaction with them"
