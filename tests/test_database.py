"""The way to the database: two kinds of transaction, and a sentence for everything that can be wrong with it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import IntegrityError, ProgrammingError

import subscriptions.database
from subscriptions.bulk import run
from subscriptions.database import Database, DatabaseUnusable, system_clock


def table(database: Database) -> None:
    with database.write() as connection:
        connection.execute(text("CREATE TABLE notes (n INTEGER PRIMARY KEY, words TEXT)"))


def add(database: Database, words: str) -> None:
    with database.write() as connection:
        connection.execute(text("INSERT INTO notes VALUES ((SELECT count(*) FROM notes) + 1, :w)"), {"w": words})


def count(database: Database) -> int:
    with database.read() as connection:
        return connection.execute(text("SELECT count(*) FROM notes")).scalar_one()


def test_what_was_written_is_read(database: Database) -> None:
    table(database)
    add(database, "one")
    assert count(database) == 1


def test_an_error_takes_everything_of_its_transaction_back(database: Database) -> None:
    table(database)

    def fail_after_one() -> None:
        with database.write() as connection:
            connection.execute(text("INSERT INTO notes VALUES (1, 'one')"))
            raise LookupError

    def write_one_twice() -> None:
        with database.write() as connection:
            connection.execute(text("INSERT INTO notes VALUES (2, 'two')"))
            connection.execute(text("INSERT INTO notes VALUES (2, 'again')"))

    with pytest.raises(LookupError):
        fail_after_one()
    with pytest.raises(IntegrityError):
        write_one_twice()
    assert count(database) == 0
    add(database, "after")
    assert count(database) == 1


def test_a_reader_sees_one_state_while_others_write(sqlite_database: Database) -> None:
    table(sqlite_database)
    with sqlite_database.read() as connection:
        before = connection.execute(text("SELECT count(*) FROM notes")).scalar_one()
        add(sqlite_database, "meanwhile")
        assert connection.execute(text("SELECT count(*) FROM notes")).scalar_one() == before
    assert count(sqlite_database) == before + 1


def test_writers_of_one_process_wait_for_each_other(sqlite_database: Database) -> None:
    table(sqlite_database)
    threads = [threading.Thread(target=add, args=(sqlite_database, str(number))) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert count(sqlite_database) == 24


def test_a_writer_has_the_lock_before_its_first_statement(sqlite_database: Database) -> None:
    assert sqlite_database.path is not None
    other = sqlite3.connect(sqlite_database.path, timeout=0)
    with sqlite_database.write(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_a_writer_waits_for_another_process_and_then_says_so(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions.database, "BUSY_SECONDS", 0.1)
    second = Database(sqlite_database.url)
    with sqlite_database.write():
        began = time.monotonic()
        with pytest.raises(DatabaseUnusable, match="another process holds it for long: try again"), second.write():
            raise AssertionError
        assert time.monotonic() - began >= 0.1
    second.close()


def test_who_waited_writes_before_the_process_that_has_just_written(sqlite_database: Database) -> None:
    other, turns, over = Database(sqlite_database.url), [0], threading.Event()

    def write_again_and_again() -> None:
        while not over.is_set():
            with other.write():
                turns[0] += 1
                time.sleep(0.02)

    busy = threading.Thread(target=write_again_and_again)
    busy.start()
    passed = []
    try:
        for _ in range(9):
            time.sleep(0.005)
            asked = turns[0]
            with sqlite_database.write():
                passed.append(turns[0] - asked)
    finally:
        over.set()
        busy.join()
        other.close()
    assert sorted(passed)[4] <= 1, f"so often another one came first: {passed}"


def test_a_turn_that_does_not_come_is_waited_for_once(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(sqlite_database)
    assert sqlite_database.path is not None
    waits: list[float] = []
    with sqlite_database.path.with_name(sqlite_database.path.name + ".turn").open() as of_a_frozen_process:
        fcntl.flock(of_a_frozen_process, fcntl.LOCK_EX)
        monkeypatch.setattr(subscriptions.database.time, "sleep", waits.append)
        for words in ("waits", "does not", "does not either"):
            waits.clear()
            add(sqlite_database, words)
            assert bool(waits) == (words == "waits")
    add(sqlite_database, "had a turn")
    assert count(sqlite_database) == 4


def test_a_commit_survives_the_loss_of_power(sqlite_database: Database, tmp_path: Path) -> None:
    """What is on the disk when a write returns: the files as they stood when they were flushed last."""
    table(sqlite_database)
    path = sqlite_database.path
    assert path is not None

    def flush(_: int) -> None:
        for end in ("", "-wal"):
            shutil.copy(path.with_name(path.name + end), tmp_path / f"survives.db{end}")

    database = Database(sqlite_database.url, flush=flush)
    for number in range(1, 4):
        add(database, "more")
        survives = Database(f"sqlite:///{tmp_path / 'survives.db'}")
        assert count(survives) == number
        survives.close()
    database.close()


def test_nobody_is_told_of_a_commit_that_could_not_be_flushed(sqlite_database: Database) -> None:
    def flush(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    table(sqlite_database)
    database = Database(sqlite_database.url, flush=flush)
    with pytest.raises(DatabaseUnusable, match=r"could not be flushed to its disk.*look at the disk's health"):
        add(database, "one")
    database.close()


def test_after_a_flush_that_failed_nothing_is_written_before_all_before_it_is_safe(
    sqlite_database: Database, tmp_path: Path
) -> None:
    faults = [OSError(errno.EIO, "Input/output error")]

    def flush(_: int) -> None:
        if faults:
            raise faults.pop()

    table(sqlite_database)
    database = Database(sqlite_database.url, flush=flush)
    with pytest.raises(DatabaseUnusable, match="Input/output error"):
        add(database, "one")
    with sqlite_database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM notes")).scalar_one() == 1
        with pytest.raises(DatabaseUnusable, match="not yet: others are reading it"):
            add(database, "two")
    add(database, "two")
    assert sqlite_database.path is not None
    shutil.copy(sqlite_database.path, tmp_path / "without_the_log.db")
    assert count(Database(f"sqlite:///{tmp_path / 'without_the_log.db'}")) == 1
    assert count(sqlite_database) == 2
    database.close()


def test_the_log_beside_the_file_is_flushed_where_the_url_names_a_link(
    sqlite_database: Database, tmp_path: Path
) -> None:
    table(sqlite_database)
    assert sqlite_database.path is not None
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(sqlite_database.path)
    flushed = []
    database = Database(f"sqlite:///{link}", flush=lambda file: flushed.append(os.fstat(file).st_ino))
    add(database, "one")
    assert flushed == [sqlite_database.path.with_name(sqlite_database.path.name + "-wal").stat().st_ino]
    database.close()


def test_others_write_while_a_commit_is_flushed(sqlite_database: Database) -> None:
    table(sqlite_database)
    flushing, go_on = threading.Event(), threading.Event()

    def flush(_: int) -> None:
        flushing.set()
        assert go_on.wait(10)

    database = Database(sqlite_database.url, flush=flush)
    thread = threading.Thread(target=add, args=(database, "one"))
    thread.start()
    assert flushing.wait(10)
    add(sqlite_database, "two")
    assert thread.is_alive()
    go_on.set()
    thread.join()
    assert count(sqlite_database) == 2
    database.close()


def test_it_is_the_log_of_now_that_is_flushed(tmp_path: Path) -> None:
    """SQLite removes its log with its last connection, and makes another."""
    names = []
    database = Database(f"sqlite:///{tmp_path / 'own.db'}", flush=lambda file: names.append(os.fstat(file).st_nlink))
    table(database)
    for number in range(3):
        with pytest.raises(LookupError), database.write():
            raise LookupError  # its connection, the only one, is given up
        add(database, f"after {number}")
    assert names == [1] * 4
    database.close()


def test_a_row_names_nobody_who_is_not_there(sqlite_database: Database) -> None:
    with sqlite_database.write() as connection:
        assert connection.execute(text("PRAGMA foreign_keys")).scalar_one() == 1


def test_a_read_only_database_is_read_and_says_that_it_can_not_be_written(sqlite_database: Database) -> None:
    table(sqlite_database)
    add(sqlite_database, "one")
    read_only = Database(f"{sqlite_database.url}?mode=ro")
    assert count(read_only) == 1
    with pytest.raises(DatabaseUnusable, match=r"readonly.*make the file and its folder writable"):
        add(read_only, "two")
    assert count(read_only) == 1
    read_only.close()


def test_a_full_database_says_so_and_nothing_is_half_written(sqlite_database: Database) -> None:
    table(sqlite_database)
    full = Database(sqlite_database.url)
    event.listen(full.engine, "connect", lambda raw, _: raw.execute("PRAGMA max_page_count = 1"))
    with full.read() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()

    def fill() -> None:
        with full.write() as connection:
            for number in range(1, 2000):
                connection.execute(text("INSERT INTO notes VALUES (:n, :w)"), {"n": number, "w": "x" * 500})

    with pytest.raises(DatabaseUnusable, match=r"full.*free space on its disk.*nothing was half-written"):
        fill()
    assert count(full) == 0
    # and once there is room again, the same connections work
    full.close()
    add(sqlite_database, "one")
    assert count(sqlite_database) == 1
    assert pages > 1


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DatabaseUnusable, match=r"the folder of the database .*/no/rolecast\.db does not exist: make it"
    ):
        Database(f"sqlite:///{tmp_path}/no/rolecast.db")


def test_a_path_that_is_a_folder_is_named(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}")
    with pytest.raises(DatabaseUnusable, match=r"unable to open.*check the path"), database.read():
        raise AssertionError
    database.close()


@pytest.mark.parametrize("url", ["mysql://db.test/x", "rolecast.db", ""])
def test_a_kind_of_database_that_nobody_knows_is_refused(url: str) -> None:
    with pytest.raises(DatabaseUnusable, match="use sqlite:///PATH or postgresql://"):
        Database(url)


def test_a_server_that_can_not_be_reached_is_named_without_the_password() -> None:
    database = Database("postgresql://anna:kanarienvogel@127.0.0.1:1/rolecast?connect_timeout=2")
    words = r"127\.0\.0\.1:1/rolecast.*start the server, or correct"
    with pytest.raises(DatabaseUnusable, match=words) as caught, database.read():
        raise AssertionError
    assert "kanarienvogel" not in str(caught.value)
    assert "\n" not in str(caught.value)
    database.close()


def test_a_fault_in_a_statement_is_ours_and_is_not_dressed_up(postgresql_database: Database) -> None:
    with pytest.raises(ProgrammingError), postgresql_database.read() as connection:
        connection.execute(text("SELECT nonsense"))


def server_process(connection: Connection) -> int:
    return int(run(connection, "SELECT pg_backend_pid()").first[0])


def end(database: Database, *processes: int) -> None:
    """End these processes of the server, as an operator or a restart does, and wait until they are gone."""
    with database.write() as connection:
        for process in processes:
            run(connection, "SELECT pg_terminate_backend(:p, 5000)", {"p": process})


def test_a_connection_that_the_server_ended_while_it_rested_is_replaced(postgresql_database: Database) -> None:
    with postgresql_database.read() as one, postgresql_database.read() as other:
        processes = {server_process(one), server_process(other)}
    ender = Database(postgresql_database.url)
    end(ender, *processes)
    ender.close()
    with postgresql_database.write() as one, postgresql_database.read() as other:
        assert processes.isdisjoint({server_process(one), server_process(other)})


@pytest.mark.parametrize("one_rests", [False, True])
def test_a_server_that_ends_each_connection_as_it_is_made_can_not_be_used(
    one_rests: bool, postgresql_database: Database
) -> None:
    ender = Database(postgresql_database.url)
    postgresql_database.engine.dispose()
    if one_rests:
        with postgresql_database.read() as connection:
            process = server_process(connection)
        end(ender, process)
    event.listen(postgresql_database.engine, "connect", lambda raw, _record: end(ender, raw.info.backend_pid))
    for way in (postgresql_database.read, postgresql_database.write):
        with pytest.raises(DatabaseUnusable), way() as connection:
            server_process(connection)
    ender.close()


@pytest.mark.parametrize("how", ["directly", "by SQLAlchemy"])
def test_a_connection_that_the_server_ends_at_work_is_a_complaint_about_the_database(
    how: str, postgresql_database: Database
) -> None:
    table(postgresql_database)
    ender = Database(postgresql_database.url)

    def lose_it() -> None:
        with postgresql_database.write() as connection:
            connection.execute(text("INSERT INTO notes VALUES (1, 'one')"))
            end(ender, server_process(connection))
            if how == "directly":
                run(connection, "INSERT INTO notes VALUES (2, 'two')")
            else:
                connection.execute(text("INSERT INTO notes VALUES (2, 'two')"))

    with pytest.raises(DatabaseUnusable, match="terminating connection"):
        lose_it()
    ender.close()
    assert count(postgresql_database) == 0
    add(postgresql_database, "again")


def test_a_fault_in_a_statement_that_the_driver_is_asked_directly_is_no_complaint_about_the_database(
    database: Database,
) -> None:
    table(database)

    def ask() -> None:
        with database.write() as connection:
            run(connection, "INSERT INTO notes VALUES (1, :words)", {"words": "one"})
            run(connection, "INSERT INTO notes VALUES (1, :words)", {"words": "again"})

    with pytest.raises(IntegrityError):
        ask()
    assert count(database) == 0


def test_nothing_is_opened_before_the_first_transaction(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'rolecast.db'}")
    assert list(tmp_path.iterdir()) == []
    database.close()


def test_the_clock_tells_microseconds() -> None:
    assert abs(system_clock() - time.time() * 1_000_000) < 5_000_000


@pytest.mark.parametrize("option", ["foo=1", "mdoe=ro", "mode=rwc", "max_page_count=many"])
def test_an_option_that_nobody_knows_is_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnusable, match="mode=ro and max_page_count=N"):
        Database(f"sqlite:///{tmp_path / 'rolecast.db'}?{option}")


def test_a_database_that_may_not_grow_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'rolecast.db'}"
    small = Database(url)
    with small.write() as connection:
        connection.execute(text("CREATE TABLE t (a TEXT)"))
    small.close()
    bounded = Database(url + "?max_page_count=3")
    with pytest.raises(DatabaseUnusable, match=r"full.*free space"), bounded.write() as connection:
        connection.execute(text("INSERT INTO t VALUES (zeroblob(100000))"))
    with bounded.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM t")).scalar_one() == 0
    bounded.close()
