"""Many rows in few steps: one way to insert a page of rows, and one to read a page, for both databases.

SQLite's driver lets other threads run at every step of a statement: beside a busy event loop a row that is inserted
or fetched by itself can cost milliseconds of waiting. So rows go in by statements of many rows, and come out as one
row of JSON. On PostgreSQL rows go in by COPY, the one shape that stays fast in a fresh table, and come out as they
are: its driver has them all before it hands out the first.

Statements are plain SQL that both databases understand: SQLAlchemy would spend as long on a statement as the database.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final

from sqlalchemy import Connection, Table

_SIZES: Final = (256, 64, 16)
#: Rows of a statement on SQLite, besides those below the last: few sizes, so that each is prepared once and kept.
_NAME: Final = re.compile(r":(\w+)")
_AMONG: Final = re.compile(r"\bAMONG :(\w+)")


def insert_rows(connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows of plain values (numbers, text, bytes, None) into these columns; a row that is there is an error."""
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        _copy(connection, table, columns, rows)
        return
    done, count = 0, len(rows)
    while done < count:
        left = count - done
        size = next((size for size in _SIZES if size <= left), left)
        some = chain.from_iterable(rows[done : done + size])
        connection.exec_driver_sql(_insert(table.name, tuple(columns), size), tuple(some))
        done += size


@lru_cache(maxsize=256)
def _insert(table: str, columns: tuple[str, ...], rows: int) -> str:
    marks = f"({', '.join('?' * len(columns))})"
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join([marks] * rows)}"  # noqa: S608 - our names


def _copy(connection: Connection, table: Table, columns: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> None:
    driver: Any = connection.connection.driver_connection
    statement = f"COPY {table.name} ({', '.join(columns)}) FROM STDIN"
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def read_columns(
    connection: Connection, columns: tuple[str, ...], rest: str, **values: int | list[int] | list[str]
) -> list[Sequence[Any]]:
    """What `SELECT columns rest` finds, as one list for each column: numbers, truth values (0 and 1 too), text, NULL.

    `rest` begins with FROM. `:name` stands for one of the values, `AMONG :name` for the condition that the column
    before it is one of a list. The order of rows is the one that `rest` asks for in its innermost query.
    """
    if connection.dialect.name == "postgresql":
        rows = connection.exec_driver_sql(_postgresql(columns, rest), values).all()
        return list(zip(*rows, strict=True)) if rows else [() for _ in columns]
    plain = {name: json.dumps(value) if isinstance(value, list) else value for name, value in values.items()}
    row = connection.exec_driver_sql(_sqlite(columns, rest), plain).one()
    return [json.loads(column) for column in row]


@lru_cache(maxsize=256)
def _sqlite(columns: tuple[str, ...], rest: str) -> str:
    lists = ", ".join([f"json_group_array({column})" for column in columns])
    return " ".join(["SELECT", lists, _AMONG.sub(r"IN (SELECT value FROM json_each(:\1))", rest)])


@lru_cache(maxsize=256)
def _postgresql(columns: tuple[str, ...], rest: str) -> str:
    marked = _NAME.sub(r"%(\1)s", _AMONG.sub(r"= ANY(:\1)", rest))
    return " ".join(["SELECT", ", ".join(columns), marked])
