"""Many rows in few steps, and small statements at the least cost: plain SQL for both databases.

SQLite's driver lets other threads run at every step of a statement: beside a busy event loop a row that is inserted
or fetched by itself can cost milliseconds of waiting. So rows go in by statements of many rows, and come out as one
row of JSON. On PostgreSQL rows go in by COPY, the one shape that stays fast in a fresh table, and come out as they
are: its driver has them all before it hands out the first.

Statements are plain SQL that both databases understand: SQLAlchemy spends longer on a small one than SQLite does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import Column, Connection, Integer, Table
from sqlalchemy.exc import DBAPIError, IntegrityError

_SIZES: Final = (64, 256, 1024)
#: Rows of a statement on SQLite, where there are more than the few that have a statement of their own.
_FEW: Final = 16
_NAME: Final = re.compile(r":(\w+)")
_AMONG: Final = re.compile(r"\bAMONG :(\w+)")


@dataclass(slots=True)
class Answer:
    """What a statement came to."""

    rows: Sequence[Any]  # that it found or returns
    rowcount: int  # how many it changed, where it returns none

    @property
    def first(self) -> Any:
        """Its first row; None where there is none."""
        return self.rows[0] if self.rows else None


def run(connection: Connection, statement: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> Answer:
    """Run one statement as it stands; `:name` in it is one of the values, and `?` on SQLite alone.

    The driver is asked directly: SQLAlchemy takes 20 to 60 microseconds where SQLite takes five. Raises what
    SQLAlchemy would, so that `Database` tells a complaint about the database from one about the statement.
    """
    dialect, driver = connection.dialect, _driver(connection)
    try:
        if dialect.name == "sqlite":
            cursor = driver.execute(statement, values)
            return Answer(cursor.fetchall(), cursor.rowcount)
        cursor = driver.execute(_named(statement), values)
        return Answer(() if cursor.rownumber is None else cursor.fetchall(), cursor.rowcount)
    except dialect.loaded_dbapi.Error as error:
        is_lost = dialect.name != "sqlite" and driver.closed
        if is_lost:
            connection.invalidate(error)
        raised = DBAPIError.instance(
            statement, values, error, dialect.loaded_dbapi.Error, connection_invalidated=is_lost, dialect=dialect
        )
        raise raised from error


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


@lru_cache(maxsize=256)
def _named(statement: str) -> str:
    """The same for PostgreSQL's driver."""
    return _NAME.sub(r"%(\1)s", statement)


class RowStands(Exception):  # noqa: N818 - it reads as the sentence it is
    """A row that was to be inserted stands there already, or breaks another rule of its table."""


def insert_rows(
    connection: Connection,
    table: Table,
    columns: Sequence[str],
    rows: Sequence[tuple[Any, ...]],
    alike: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Insert rows of plain values (numbers, text, bytes, None) into these columns.

    `alike` are further columns, with the one value that all rows have. Raises `RowStands`; the transaction is lost.
    """
    if not rows:
        return
    try:
        if connection.dialect.name == "postgresql":
            _copy(connection, table, columns, rows, alike)
            return
        same, width = tuple(alike.values()), len(columns)
        done, count = 0, len(rows)
        while done < count:
            left = min(count - done, _SIZES[-1])
            size = left if left <= _FEW else next(size for size in _SIZES if left <= size)
            some = chain.from_iterable(rows[done : done + left])
            statement = _insert(table.name, (*alike, *columns), len(same), size)
            padding = (0,) * (width * (size - left))  # a number: None costs its driver ten times as much
            run(connection, statement, (*same, *some, *padding, left))
            done += left
    except (IntegrityError, connection.dialect.loaded_dbapi.IntegrityError) as error:
        raise RowStands(str(error)) from error


@lru_cache(maxsize=256)
def _insert(table: str, columns: tuple[str, ...], alike: int, rows: int) -> str:
    """The statement for so many rows; the first columns have one value, bound once. Its last value is a limit.

    There are few such statements, so that each is prepared once and kept: the limit passes over rows that fill up.
    """
    width = len(columns) - alike
    row = f"({', '.join('?' * width)})"
    # A number binds by its place; the marks without one go on behind the highest number so far.
    chosen = [f"?{number + 1}" for number in range(alike)] + [f"column{number + 1}" for number in range(width)]
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) SELECT {', '.join(chosen)}"  # noqa: S608 - our own names
        f" FROM (VALUES {', '.join([row] * rows)}) LIMIT ?"
    )


def _copy(
    connection: Connection,
    table: Table,
    columns: Sequence[str],
    rows: Sequence[tuple[Any, ...]],
    alike: Mapping[str, Any],
) -> None:
    names, same = (*columns, *alike), tuple(alike.values())
    statement = f"COPY {table.name} ({', '.join(names)}) FROM STDIN"
    with _driver(connection).cursor() as cursor, cursor.copy(statement) as copy:
        if all(_is_a_number(table.c[name]) for name in names):  # a line needs no escapes: four times as quick
            line = "\t".join(["%d" for _ in columns] + [f"{value:d}" for value in same]) + "\n"
            copy.write("".join([line % row for row in rows]))
            return
        for row in rows:
            copy.write_row((*row, *same))


def _is_a_number(column: Column[Any]) -> bool:
    return isinstance(column.type, Integer) and not column.nullable


def read_columns(
    connection: Connection, columns: tuple[str, ...], rest: str, **values: int | list[int] | list[str]
) -> list[Sequence[Any]]:
    """What `SELECT columns rest` finds, as one list for each column: numbers, truth values (0 and 1 too), text, NULL.

    `rest` begins with FROM. `:name` stands for one of the values, `AMONG :name` for the condition that the column
    before it is one of a list. The order of rows is the one that `rest` asks for in its innermost query.
    """
    if connection.dialect.name == "postgresql":
        rows = run(connection, _postgresql(columns, rest), values).rows
        return list(zip(*rows, strict=True)) if rows else [() for _ in columns]
    plain = {name: json.dumps(value) if isinstance(value, list) else value for name, value in values.items()}
    return [json.loads(column) for column in run(connection, _sqlite(columns, rest), plain).first]


@lru_cache(maxsize=256)
def _sqlite(columns: tuple[str, ...], rest: str) -> str:
    lists = ", ".join([f"json_group_array({column})" for column in columns])
    return " ".join(["SELECT", lists, _AMONG.sub(r"IN (SELECT value FROM json_each(:\1))", rest)])


@lru_cache(maxsize=256)
def _postgresql(columns: tuple[str, ...], rest: str) -> str:
    return " ".join(["SELECT", ", ".join(columns), _AMONG.sub(r"= ANY(:\1)", rest)])


def by_id(connection: Connection, table: str, name: str, number: str, *, kind: str = "JOIN") -> str:
    """A join with the one row of a table that has this number as its id; the row is called `name`.

    PostgreSQL is kept (by OFFSET 0) from reading the whole table instead, for each page again.
    """
    if connection.dialect.name == "sqlite":
        return f"{kind} {table} {name} ON {name}.id = {number}"
    return f"{kind} LATERAL (SELECT * FROM {table} WHERE id = {number} OFFSET 0) {name} ON true"  # noqa: S608 - ours


def read_rows(connection: Connection, columns: tuple[str, ...], rest: str, **values: int | str) -> list[Sequence[Any]]:
    """The same row by row, for the few rows of a small question: there one list of them is quicker than many."""
    if connection.dialect.name == "postgresql":
        return list(run(connection, _postgresql(columns, rest), values).rows)
    (found,) = run(connection, _sqlite_rows(columns, rest), values).first
    rows: list[Sequence[Any]] = json.loads(found)
    return rows


@lru_cache(maxsize=64)
def _sqlite_rows(columns: tuple[str, ...], rest: str) -> str:
    return f"SELECT json_group_array(json_array({', '.join(columns)})) {rest}"
