"""The one way to the database: SQLite in the embedded default, PostgreSQL at scale.

It promises two kinds of transaction and nothing else: `read()` sees one snapshot, `write()` is the only door for
changes. In a process one writer works at a time (a lock stands before SQLite's own), so that writers queue in order
instead of spinning on "database is locked". Nothing is opened before `Database` is made.

Times are whole microseconds since 1970, UTC, everywhere: `Clock` is what tests replace.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import QueuePool

Clock = Callable[[], int]
"""The time now in microseconds since 1970, UTC."""

BUSY_SECONDS = 15.0
#: How long a writer waits for another process before it gives up.

READERS = 32
#: Connections kept for readers of one process; more are opened under load and closed again.


class DatabaseUnusable(Exception):  # noqa: N818 - it reads as the sentence it is
    """The database can't be reached or written: the sentence names it and the remedy; trying later may help."""


def system_clock() -> int:
    """The time now in microseconds since 1970, UTC."""
    return time.time_ns() // 1000


class Database:
    """Engine and transactions of one database.

    `url` is `sqlite:///PATH` or `postgresql://...`. Raises `DatabaseUnusable` where the URL names no database that
    Rolecast knows, or its folder does not exist.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.dialect = _dialect(url)
        self.path = _sqlite_path(url) if self.dialect == "sqlite" else None
        self.engine = _sqlite_engine(url) if self.dialect == "sqlite" else _postgresql_engine(url)
        self._writer = threading.Lock()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state of the database and changes nothing."""
        with _translated(self.url), self.engine.connect() as plain:
            # PostgreSQL's default would let each statement see another state; SQLite has one state a transaction.
            level = {"isolation_level": "REPEATABLE READ"} if self.dialect == "postgresql" else {}
            connection = plain.execution_options(**level)
            with connection.begin():
                yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that commits at the end and rolls back on any error; one at a time on SQLite."""
        if self.dialect != "sqlite":
            with _translated(self.url), self.engine.begin() as connection:
                yield connection
            return
        with self._writer, _translated(self.url), self.engine.connect() as plain:
            connection = plain.execution_options(rolecast_writes=True)
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


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


def _sqlite_engine(url: str) -> Engine:
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
            raw.execute("PRAGMA journal_mode=WAL")
        if "max_page_count" in options:
            raw.execute(f"PRAGMA max_page_count={int(options['max_page_count'])}")
        # FULL: a commit survives the loss of power, not only of the process (reliability.md 1.2).
        raw.execute("PRAGMA synchronous=FULL")
        raw.execute("PRAGMA foreign_keys=ON")
        raw.execute("PRAGMA cache_size=-16000")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # IMMEDIATE: a writer that began as a reader could not become one while another writes.
        writes = connection.get_execution_options().get("rolecast_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql_engine(url: str) -> Engine:
    address = "postgresql+psycopg://" + url.partition("://")[2]
    try:
        return create_engine(address, pool_size=10, max_overflow=20, pool_pre_ping=True)
    except ModuleNotFoundError as error:
        message = "database_url names PostgreSQL, but its driver is not installed: install rolecast[postgres]"
        raise DatabaseUnusable(message) from error


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn a driver's complaint about the database itself (not about a statement) into one sentence."""
    try:
        yield
    except OperationalError as error:
        raise DatabaseUnusable(_sentence(url, error)) from error
    except DatabaseError as error:
        said = str(error.orig)
        if isinstance(error.orig, sqlite3.DatabaseError) and ("not a database" in said or "malformed" in said):
            raise DatabaseUnusable(_sentence(url, error)) from error
        raise


def _sentence(url: str, error: DatabaseError) -> str:
    place = url.rpartition("@")[2]  # never the password
    said = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
    for mark, remedy in _REMEDIES:
        if mark in said:
            return f"the database {place} said {said!r}: {remedy}"
    return f"the database {place} said {said!r}"


_REMEDIES = (
    ("readonly", "make the file and its folder writable, or name another in database_url"),
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
