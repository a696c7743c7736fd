"""The one way to the database: SQLite in the embedded default, PostgreSQL at scale.

It promises two kinds of transaction and nothing else: `read()` sees one snapshot, `write()` is the only door for
changes. In a process one writer works at a time (a lock stands before SQLite's own), so that writers queue in order
instead of spinning on "database is locked"; processes look for SQLite's in turn. SQLite is written by one connection
that is kept. Who leaves `write()` without an error knows that what was written survives the loss of power. Nothing is
opened before `Database` is made.

Times are whole microseconds since 1970, UTC, everywhere: `Clock` is what tests replace. On PostgreSQL, where several
hosts work, the server's clock counts (`Database.clock`), so that a host whose clock is wrong does no harm.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, quote

from sqlalchemy import Connection, Engine, Table, create_engine, event, text
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import Insert as SqliteInsert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DatabaseError, DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

Clock = Callable[[], int]
"""The time now in microseconds since 1970, UTC."""

BUSY_SECONDS = 15.0
#: How long a writer waits for another process before it gives up.

LOOK_SECONDS = 0.0003
#: How often it looks whether the other one is done.

AT_ONCE_SECONDS = 0.1
#: After so long it looks a hundred times a second only.

STALL_SECONDS = 20
#: After so long at the most PostgreSQL ends a transaction whose process stopped in the middle: its locks would stop
#: all others.

SILENCE_SECONDS = 15
#: A connection over which nothing comes back for so long is given up: the server, or the way to it, is gone.

CLOCK_SECONDS = 30
#: How often the server's clock is asked for.

RESERVE_BYTES = 64 * 1024 * 1024
#: With less free space beside a SQLite file nothing new is taken on: what is under way must still be recorded.

FLUSH: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
#: Not every system has the former, which leaves out the file's times.

READERS = 32
#: Connections kept for readers of one process; more are opened under load and closed again.


class DatabaseUnusable(Exception):  # noqa: N818 - it reads as the sentence it is
    """The database can't be reached or written: the sentence names it and the remedy; trying later may help."""


def insert_into(connection: Connection, table: Table) -> SqliteInsert:
    """An INSERT that can say what happens where the row is there already; both databases write it alike."""
    return (
        sqlite_insert(table) if connection.dialect.name == "sqlite" else cast("SqliteInsert", postgresql_insert(table))
    )


def system_clock() -> int:
    """The time now in microseconds since 1970, UTC."""
    return time.time_ns() // 1000


class Database:
    """Engine and transactions of one database.

    `url` is `sqlite:///PATH` or `postgresql://...`. Raises `DatabaseUnusable` where the URL names no database that
    Rolecast knows, or its folder does not exist. `flush` is for tests: what brings a file's octets to its disk.
    """

    def __init__(self, url: str, *, stall_seconds: int = STALL_SECONDS, flush: Callable[[int], None] = FLUSH) -> None:
        self.url = url
        self.dialect = _dialect(url)
        self.path = _sqlite_path(url) if self.dialect == "sqlite" else None
        self._turn = _Turn(self.path) if self.path is not None else None
        self.engine = _sqlite_engine(url, self._turn) if self._turn else _postgresql_engine(url, stall_seconds)
        self.clock: Clock = system_clock if self.dialect == "sqlite" else _ServerClock()
        self._writer = threading.Lock()
        self._writes: Connection | None = None  # the one that SQLite is written by, kept open
        self._has_log = False  # whether that connection leaves it to us to flush its commits
        self._log: _Log | None = None
        self._flush = flush

    @contextmanager
    def read(self, *, patient: bool = False) -> Iterator[Connection]:
        """A connection that sees one state of the database and changes nothing.

        `patient`: it may rest between two statements for as long as it likes, as an export into a pager does.
        """
        with self.translated(), self.engine.connect() as plain:
            # PostgreSQL's default would let each statement see another state; SQLite has one state a transaction.
            level = {"isolation_level": "REPEATABLE READ"} if self.dialect == "postgresql" else {}
            connection = plain.execution_options(**level)
            with connection.begin():
                if patient and self.dialect == "postgresql":
                    connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
                yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that commits at the end and rolls back on any error; one at a time on SQLite.

        Where its flush fails it is `DatabaseUnusable` too, though others see what was written.
        """
        if self.dialect != "sqlite":
            with self.translated(), self.engine.begin() as connection:
                if isinstance(self.clock, _ServerClock):
                    self.clock.renew(connection)
                yield connection
            return
        with self.translated():
            with self._writer:
                connection = self._writes or self._write_by()
                if self._log is not None and self._log.doubtful:
                    self._log.mend(_driver(connection))
                try:
                    with connection.begin():
                        yield connection
                except BaseException:
                    self._write_by_another()  # whatever state this one is in
                    raise
            if self._has_log and self._log is not None:
                self._log.flush()

    def _write_by(self) -> Connection:
        """The connection that SQLite is written by.

        It never waits in SQLite, so that `_begin_to_write` can, and leaves it to `_Log` to flush a commit.
        """
        self._writes = self.engine.connect().execution_options(rolecast_writes=True)
        raw = _driver(self._writes)
        raw.execute("PRAGMA busy_timeout=0")
        self._has_log = raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        if self._has_log:
            raw.execute("PRAGMA synchronous=NORMAL")
            if self._log is None:  # beside the file itself, where `path` is a link
                self._log = _Log(raw.execute("PRAGMA database_list").fetchone()[2], self._flush)
        return self._writes

    def _write_by_another(self) -> None:
        broken, self._writes = self._writes, None
        if broken is not None:
            with suppress(DBAPIError):
                broken.invalidate()
            broken.close()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn a driver's complaint about the database itself (not about a statement) into `DatabaseUnusable`."""
        try:
            yield
        except (OperationalError, InterfaceError) as error:
            raise DatabaseUnusable(_sentence(self.url, error)) from error
        except PoolTimeout as error:
            message = f"the database {_place(self.url)} has no free connection for us: try again"
            raise DatabaseUnusable(message) from error
        except DatabaseError as error:
            said = str(error.orig)
            damaged = isinstance(error.orig, sqlite3.DatabaseError) and (
                "not a database" in said or "malformed" in said
            )
            if damaged or error.connection_invalidated:
                raise DatabaseUnusable(_sentence(self.url, error)) from error
            raise

    def shortage(self) -> str | None:
        """Why nothing new should be taken on: the disk of a SQLite file is almost full; None where there is room.

        SQLite may say "full" to one statement and not to the next, so the record of a mail that left could fail
        (reliability.md R12): room for it is kept.
        """
        if self.path is None:
            return None
        free = shutil.disk_usage(self.path.parent).free
        if free >= RESERVE_BYTES:
            return None
        return (
            f"only {free // 1_048_576} MB are free beside {self.path}, and {RESERVE_BYTES // 1_048_576} are kept for "
            "what is under way: make room"
        )

    def close(self) -> None:
        """Close every connection."""
        with self._writer:
            self._write_by_another()
            for file in (self._turn, self._log):
                if file is not None:
                    file.close()
        self.engine.dispose()


class _ServerClock:
    """The PostgreSQL server's clock, as this process knows it: asked for now and then, and counted on from there."""

    def __init__(self) -> None:
        self._offset: float | None = None
        self._asked_at = 0.0

    def __call__(self) -> int:
        """The time now in microseconds; this host's until the server was asked once."""
        return system_clock() if self._offset is None else int((time.monotonic() + self._offset) * 1_000_000)

    def renew(self, connection: Connection) -> None:
        """Ask the server, where that was long ago."""
        before = time.monotonic()
        if self._offset is not None and before - self._asked_at < CLOCK_SECONDS:
            return
        query = text("SELECT extract(epoch FROM clock_timestamp())::double precision")
        there = float(connection.execute(query).scalar_one())
        after = time.monotonic()
        self._offset = there - (before + after) / 2
        self._asked_at = after


def _dialect(url: str) -> str:
    scheme = url.partition(":")[0]
    if scheme == "sqlite":
        return "sqlite"
    if scheme in {"postgresql", "postgres", "postgresql+psycopg"}:
        return "postgresql"
    message = f"database_url {url!r} is of no kind that Rolecast knows: use sqlite:///PATH or postgresql://..."
    raise DatabaseUnusable(message)


def _sqlite_path(url: str) -> Path:
    path = Path(url.removeprefix("sqlite:///").partition("?")[0])
    if not path.parent.exists():
        message = f"the folder of the database {path} does not exist: make it, or name another in database_url"
        raise DatabaseUnusable(message)
    return path


def _sqlite_options(url: str) -> dict[str, str]:
    """What stands behind the `?`: `mode=ro` opens for reading alone, `max_page_count=N` bounds the file."""
    options = dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))
    good = options.get("mode", "ro") in {"ro", "rw"} and options.get("max_page_count", "1").isdecimal()
    if set(options) - {"mode", "max_page_count"} or not good:
        message = (
            f"database_url {url!r} has an option that Rolecast does not know: there are mode=ro and max_page_count=N"
        )
        raise DatabaseUnusable(message)
    return options


def _sqlite_engine(url: str, turn: _Turn) -> Engine:
    options = _sqlite_options(url)
    path = url.removeprefix("sqlite:///").partition("?")[0]
    read_only = options.get("mode") == "ro"

    def connect() -> sqlite3.Connection:
        # check_same_thread: the pool hands a connection to one thread at a time.
        return sqlite3.connect(
            f"file:{quote(path)}?mode={options['mode']}" if "mode" in options else path,
            uri="mode" in options,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=512,
        )

    engine = create_engine(
        "sqlite://", creator=connect, poolclass=QueuePool, pool_size=READERS, max_overflow=-1, pool_reset_on_return=None
    )

    @event.listens_for(engine, "connect")
    def _prepare(raw: sqlite3.Connection, _record: Any) -> None:
        if not read_only:
            _write_ahead(raw)
        if "max_page_count" in options:
            raw.execute(f"PRAGMA max_page_count={int(options['max_page_count'])}")
        # FULL: a commit survives the loss of power (reliability.md 1.2); with the kept connection that is up to `_Log`.
        raw.execute("PRAGMA synchronous=FULL")
        raw.execute("PRAGMA foreign_keys=ON")
        raw.execute("PRAGMA cache_size=-16000")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # IMMEDIATE: a writer that began as a reader could not become one while another writes.
        if not connection.get_execution_options().get("rolecast_writes", False):
            connection.exec_driver_sql("BEGIN")
        elif not _begin_to_write(_driver(connection), turn):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _driver(connection: Connection) -> sqlite3.Connection:
    return cast("sqlite3.Connection", connection.connection.driver_connection)


def _begin_to_write(raw: sqlite3.Connection, turn: _Turn) -> bool:
    """Begin to write as soon as another process ends; False where that takes too long, or can't be at all.

    Transactions of workers take a millisecond or two, and SQLite itself would look again after 1, 2, 5, 10 ... of them.
    Processes look in turn, so that who has just written does not come before who waited.
    """
    began = time.monotonic()
    ours = turn.wait()
    try:
        while True:
            try:
                raw.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                waited = time.monotonic() - began
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or waited > BUSY_SECONDS:
                    return False  # whoever asks once more is told, in words
                time.sleep(LOOK_SECONDS if waited < AT_ONCE_SECONDS else 0.01)
            else:
                return True
    finally:
        if ours:
            turn.end()


class _Log:
    """SQLite's write-ahead log, flushed by us: SQLite's own flush would keep its lock from others meanwhile.

    Others see a commit before it is flushed. Nobody is told of his own before, and what was committed earlier is
    flushed with it, for that stands in the same file: so what somebody built on is never lost alone.
    """

    def __init__(self, database: str, flush: Callable[[int], None]) -> None:
        self.doubtful = False
        """A flush failed: systems then call what was not written clean, and the log may have a hole (`mend`)."""
        self._database = database
        self._path = Path(f"{database}-wal")
        self._flush = flush
        self._file: int | None = None
        self._lock = threading.Lock()
        self._closed = False

    def flush(self) -> None:
        """What was committed survives the loss of power from here on. Raises `DatabaseUnusable`."""
        try:
            with self._lock:
                file = self._opened()
                if file is not None:
                    self._flush(file)
                if self._closed:
                    self._close()
        except OSError as error:
            self.doubtful = True
            raise DatabaseUnusable(self._sentence(error)) from error

    def mend(self, raw: sqlite3.Connection) -> None:
        """Have SQLite take the whole log into the database, flush that, and begin anew. Raises `DatabaseUnusable`."""
        try:
            busy, _, _ = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise DatabaseUnusable(self._sentence(error)) from error
        if busy:
            raise DatabaseUnusable(self._sentence("not yet: others are reading it"))
        self.doubtful = False

    def _sentence(self, why: object) -> str:
        return (
            f"the database {self._database} could not be flushed to its disk ({why}): look at the disk's health; what "
            "was written last may be lost with the power"
        )

    def _opened(self) -> int | None:
        """The log of now. None where the last connection was closed meanwhile: that flushes all into the database."""
        try:
            there = self._path.stat()
            if self._file is not None and not os.path.samestat(there, os.fstat(self._file)):
                self._close()
            if self._file is None:
                self._file = os.open(self._path, os.O_RDONLY)
                self._flush_folder()
        except FileNotFoundError:
            self._close()
        return self._file

    def _flush_folder(self) -> None:
        """The log's name survives too, where its folder may be opened; SQLite asks for no more."""
        with suppress(OSError):
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._closed = True
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _Turn:
    """Who waits for SQLite's lock next, for as long as it waits: a lock on a file beside the database.

    SQLite gives its lock to whoever asks at the right moment: a process that has just written would have it again
    before one that looks for it from time to time. Nothing depends on a turn: one that does not come is done without,
    and not waited for again before one came, for who has it may be frozen.
    """

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(database.name + ".turn")
        self._file: int | None = None
        self._patience = AT_ONCE_SECONDS

    def wait(self) -> bool:
        """Wait for our turn; whether it came."""
        gives_up_at = time.monotonic() + self._patience
        while not (ours := self._take()) and time.monotonic() < gives_up_at:
            time.sleep(LOOK_SECONDS)
        self._patience = AT_ONCE_SECONDS if ours else 0.0
        return ours

    def _take(self) -> bool:
        with suppress(OSError):  # a folder in which we can't write, a file system without locks
            if self._file is None:
                self._file = os.open(self._path, os.O_RDONLY | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def end(self) -> None:
        """Let another have it."""
        if self._file is not None:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _write_ahead(raw: sqlite3.Connection) -> None:
    """Keep the file's changes in a log of their own: readers and the writer don't wait for each other.

    Several processes may open a new file at once, and SQLite does not wait at this statement as it does at others.
    """
    ends = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            raw.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > ends:
                raise
            time.sleep(0.02)
        else:
            return


def _postgresql_engine(url: str, stall_seconds: int) -> Engine:
    address = "postgresql+psycopg://" + url.partition("://")[2]
    try:
        engine = create_engine(
            address,
            pool_size=10,
            max_overflow=20,
            pool_use_lifo=True,  # the few that are at work have their statements prepared
            connect_args=_connection_options(url, stall_seconds),
        )
    except ModuleNotFoundError as error:
        message = "database_url names PostgreSQL, but its driver is not installed: install rolecast[postgres]"
        raise DatabaseUnusable(message) from error
    event.listen(engine, "checkin", _note_that_it_rests)
    event.listen(engine, "checkout", _refuse_an_ended_one)
    return engine


def _note_that_it_rests(_driver: object, record: Any) -> None:
    record.info["rests"] = True  # forgotten with the connection


def _refuse_an_ended_one(driver: Any, record: Any, _proxy: object) -> None:
    """Take no connection of the pool that the server ended: there is something to read though nothing was asked.

    SQLAlchemy's `pool_pre_ping` would ask the server before each transaction, for as much time as a statement takes.
    Raises `DisconnectionError`, at which the pool makes another; that one is taken as it is, for of two that are
    refused it makes an error of its own.
    """
    if "rests" not in record.info:
        return
    if not driver.closed:
        waiting = select.poll()
        waiting.register(driver.fileno(), select.POLLIN)
        if not waiting.poll(0):
            return
    raise DisconnectionError


def _connection_options(url: str, stall_seconds: int) -> dict[str, Any]:
    """libpq's options that keep a lost server from being waited for; those in the URL win."""
    ours: dict[str, Any] = {
        "connect_timeout": 5,
        "keepalives_idle": 5,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": SILENCE_SECONDS * 1000,
        "application_name": "rolecast",
        # Its statements are short: helpers of the server, or compiling them, would take longer than they do.
        "options": f"-c idle_in_transaction_session_timeout={stall_seconds}s"
        " -c max_parallel_workers_per_gather=0 -c jit=off",
    }
    given = dict(parse_qsl(url.partition("?")[2]))
    return {name: value for name, value in ours.items() if name not in given}


def _place(url: str) -> str:
    return url.rpartition("@")[2]  # never the password


def _sentence(url: str, error: DBAPIError) -> str:
    place = _place(url)
    said = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
    for mark, remedy in _REMEDIES:
        if mark in said:
            return f"the database {place} said {said!r}: {remedy}"
    return f"the database {place} said {said!r}"


_REMEDIES = (
    ("readonly", "make the file and its folder writable, or name another in database_url"),
    ("deadlock", "another process worked on the same: run the command again"),
    ("full", "free space on its disk, then run the command again; nothing was half-written"),
    ("disk I/O error", "free space on its disk or look at its health, then run the command again"),
    ("unable to open", "check the path and the rights of its folder"),
    ("locked", "another process holds it for long: try again"),
    ("not a database", "database_url must name a SQLite file that Rolecast made, or a new path"),
    ("malformed", "the file is damaged: restore a backup, or save what is left with `sqlite3 FILE .recover`"),
    ("no such table", "run `rolecast db upgrade`"),
    ("does not exist", "create it, or run `rolecast db upgrade`"),
    ("onnection", "start the server, or correct database_url"),
)
