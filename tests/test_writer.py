"""The writer: what waits together is committed together, in order, and a piece that fails fails alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Connection, event, text

from subscriptions.database import Database
from worker.writer import MOST, Writer


@pytest.fixture
def notes(sqlite_database: Database) -> Database:
    with sqlite_database.write() as connection:
        connection.execute(text("CREATE TABLE notes (n INTEGER PRIMARY KEY, words TEXT UNIQUE)"))
    return sqlite_database


@pytest.fixture
def writer(notes: Database) -> Iterator[Writer]:
    running = Writer(notes)
    running.start()
    yield running
    running.stop()


def note(words: str) -> Callable[[Connection], str]:
    def work(connection: Connection) -> str:
        connection.execute(text("INSERT INTO notes (words) VALUES (:words)"), {"words": words})
        return words

    return work


def words(database: Database) -> list[str]:
    with database.read() as connection:
        return list(connection.execute(text("SELECT words FROM notes ORDER BY n")).scalars())


def commits(database: Database) -> list[int]:
    """A list that grows by one with each commit of a transaction."""
    seen: list[int] = []
    event.listen(database.engine, "commit", lambda _: seen.append(1))
    return seen


def held(writer: Writer) -> threading.Event:
    """Keep the writer busy until the event is set, so that what comes meanwhile waits together."""
    begun, go_on = threading.Event(), threading.Event()

    def work(_connection: Connection) -> None:
        begun.set()
        go_on.wait(10)

    writer.submit(work)
    begun.wait(10)
    return go_on


def test_the_result_is_there_after_the_commit(notes: Database, writer: Writer) -> None:
    assert writer.submit(note("one")).result(10) == "one"
    assert words(notes) == ["one"]


def test_what_waits_together_is_committed_together_and_in_order(notes: Database, writer: Writer) -> None:
    go_on = held(writer)
    futures = [writer.submit(note(str(number))) for number in range(MOST)]
    seen = commits(notes)
    go_on.set()
    assert [future.result(10) for future in futures] == [str(number) for number in range(MOST)]
    assert len(seen) == 2  # the one that kept it busy, and all the others
    assert words(notes) == [str(number) for number in range(MOST)]


def test_no_transaction_holds_more_than_its_share(notes: Database, writer: Writer) -> None:
    go_on = held(writer)
    futures = [writer.submit(note(str(number))) for number in range(2 * MOST + 1)]
    seen = commits(notes)
    go_on.set()
    for future in futures:
        future.result(10)
    assert len(seen) == 4


def test_a_piece_that_fails_fails_alone(notes: Database, writer: Writer) -> None:
    go_on = held(writer)
    before = [writer.submit(note("a")), writer.submit(note("b"))]
    broken = writer.submit(note("a"))  # there is one already
    after = [writer.submit(note("c"))]
    go_on.set()
    assert [future.result(10) for future in before + after] == ["a", "b", "c"]
    assert "UNIQUE" in str(broken.exception(10))
    assert words(notes) == ["a", "b", "c"]


def test_a_fault_in_a_piece_is_told_to_whoever_asked_and_the_writer_goes_on(notes: Database, writer: Writer) -> None:
    def broken(_connection: Connection) -> None:
        message = "a fault of ours"
        raise LookupError(message)

    with pytest.raises(LookupError, match="a fault of ours"):
        writer.submit(broken).result(10)
    assert writer.submit(note("next")).result(10) == "next"


def test_a_piece_that_nobody_waits_for_any_more_does_not_stop_the_writer(notes: Database, writer: Writer) -> None:
    go_on = held(writer)
    given_up = writer.submit(note("a"))
    given_up.cancel()
    other = writer.submit(note("b"))
    go_on.set()
    assert other.result(10) == "b"
    assert writer.submit(note("c")).result(10) == "c"


def test_a_coroutine_waits_for_the_commit(notes: Database, writer: Writer) -> None:
    async def work() -> list[str]:
        return list(await asyncio.gather(*(writer.run(note(str(number))) for number in range(20))))

    assert asyncio.run(work()) == [str(number) for number in range(20)]
    assert words(notes) == [str(number) for number in range(20)]


def test_what_waits_is_written_before_the_end(notes: Database) -> None:
    writer = Writer(notes)
    writer.start()
    go_on = held(writer)
    futures = [writer.submit(note(str(number))) for number in range(MOST + 5)]
    stopper = threading.Thread(target=writer.stop)
    stopper.start()
    go_on.set()
    stopper.join(10)
    assert all(future.done() for future in futures)
    assert len(words(notes)) == MOST + 5
