"""Many rows in few steps: what goes in comes out as it was, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from subscriptions.bulk import RowStands, insert_rows, read_columns, read_rows, run
from subscriptions.database import Database, DatabaseUnusable
from subscriptions.schema import accounts, audit, mailboxes
from tests.databases import NOW

HOSTILE = (
    "tab\tnewline\nreturn\rbackslash\\ \\N \\. \\t",
    "quotes ' \" ` ; -- /* :name %s %(name)s ? {among}",
    '["json", {"a": 1}] \\u0041 \\"',
    "ünïcode \u2028 \U0001f600 \u0001\u007f",
    "\\.",
    "",
)
COLUMNS = ("at", "actor", "door", "account_id", "kind", "body")


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 63, 255, 256, 700, 1024, 1025, 1100])
def test_rows_come_out_as_they_went_in_whatever_stands_in_them(database: Database, count: int) -> None:
    texts = [HOSTILE[number % len(HOSTILE)] for number in range(count)]
    rows = [(NOW + n, text, "cli", None if n % 3 else n, "x", text * 3) for n, text in enumerate(texts)]
    with database.write() as connection:
        insert_rows(connection, audit, COLUMNS, rows)
    with database.read() as connection:
        found = read_columns(connection, COLUMNS, "FROM (SELECT * FROM audit ORDER BY at) a")
    assert list(zip(*found, strict=True)) == rows


def test_bytes_go_in_as_they_are(database: Database) -> None:
    keys = [bytes(range(number, number + 16)) for number in range(240)]
    with database.write() as connection:
        insert_rows(connection, mailboxes, ("id", "address_key"), list(enumerate(keys, 1)))
    with database.read() as connection:
        query = mailboxes.select().with_only_columns(mailboxes.c.address_key).order_by(mailboxes.c.id)
        assert [bytes(row.address_key) for row in connection.execute(query)] == keys


def test_what_all_rows_have_alike_is_given_once(database: Database) -> None:
    rows = [(NOW + n, HOSTILE[n % len(HOSTILE)]) for n in range(70)]
    alike = {"actor": HOSTILE[1], "door": "cli", "account_id": None, "kind": "x"}
    with database.write() as connection:
        insert_rows(connection, audit, ("at", "body"), rows, alike)
    with database.read() as connection:
        found = read_columns(connection, COLUMNS, "FROM (SELECT * FROM audit ORDER BY at) a")
    assert list(zip(*found, strict=True)) == [(at, HOSTILE[1], "cli", None, "x", body) for at, body in rows]


def test_a_row_that_is_there_already_fails_and_writes_nothing(database: Database) -> None:
    row = (1, b"k" * 16)
    with pytest.raises(RowStands, match=r"(?i)unique"), database.write() as connection:  # noqa: PT012
        insert_rows(connection, mailboxes, ("id", "address_key"), [(2, b"j" * 16)])
        insert_rows(connection, mailboxes, ("id", "address_key"), [row, row])
    with database.read() as connection:
        assert [list(column) for column in read_columns(connection, ("id",), "FROM mailboxes")] == [[]]


def test_rows_are_chosen_by_lists_of_numbers_and_of_text(database: Database) -> None:
    with database.write() as connection:
        names = [{"id": n, "ext": text, "name": "x", "catalogue": "c"} for n, text in enumerate(HOSTILE, 1)]
        connection.execute(insert(accounts), names)
    rest = "FROM accounts WHERE ext AMONG :exts AND id AMONG :numbers AND id > :after"
    with database.read() as connection:
        found = read_columns(
            connection, ("ext", "removed_at"), rest, exts=list(HOSTILE[:4]), numbers=[1, 2, 3, 9], after=1
        )
        assert [list(column) for column in found] == [list(HOSTILE[1:3]), [None, None]]
        nothing = read_columns(connection, ("ext", "id"), rest, exts=[], numbers=[], after=0)
        assert [list(column) for column in nothing] == [[], []]


def test_the_rows_of_a_small_question_come_as_they_went_in(database: Database) -> None:
    with database.write() as connection:
        names = [{"id": n, "ext": text, "name": "x", "catalogue": "c"} for n, text in enumerate(HOSTILE, 1)]
        connection.execute(insert(accounts), names)
    columns, rest = ("id", "ext", "removed_at"), "FROM (SELECT * FROM accounts WHERE id < :below ORDER BY id) a"
    with database.read() as connection:
        found = read_rows(connection, columns, rest, below=4)
        assert [tuple(row) for row in found] == [(n, HOSTILE[n - 1], None) for n in (1, 2, 3)]
        assert read_rows(connection, columns, rest, below=0) == []


def test_a_statement_answers_with_its_rows_and_how_many_it_changed(database: Database) -> None:
    statement = "INSERT INTO accounts (ext, name, catalogue) VALUES (:ext, :name, 'c') RETURNING id, ext"
    with database.write() as connection:
        first, second = [run(connection, statement, {"ext": ext, "name": "x"}).first for ext in HOSTILE[:2]]
        assert (first[1], second[1]) == HOSTILE[:2]
        assert run(connection, "UPDATE accounts SET name = 'y'").rowcount == 2
        assert run(connection, "SELECT id FROM accounts WHERE ext = :ext", {"ext": "nobody"}).first is None
    with database.read() as connection:
        found = run(connection, "SELECT id, name FROM accounts ORDER BY id").rows
        assert [tuple(row) for row in found] == [(first[0], "y"), (second[0], "y")]


def test_a_statement_that_fails_takes_its_transaction_with_it(database: Database) -> None:
    statement = "INSERT INTO accounts (ext, name, catalogue) VALUES ('acme', 'x', 'c')"
    with pytest.raises(IntegrityError), database.write() as connection:  # noqa: PT012
        run(connection, statement)
        run(connection, statement)
    with database.read() as connection:
        assert read_rows(connection, ("id",), "FROM accounts") == []


def test_a_database_that_has_no_room_is_told_from_a_statement_that_is_wrong(tmp_path: Path) -> None:
    house = Database(f"sqlite:///{tmp_path}/rolecast.db?max_page_count=8")
    with house.write() as connection:
        run(connection, "CREATE TABLE rows (body TEXT)")
    with pytest.raises(DatabaseUnusable, match="full"), house.write() as connection:
        run(connection, "INSERT INTO rows VALUES (:body)", {"body": "x" * 100_000})
    with house.read() as connection:
        assert run(connection, "SELECT count(*) FROM rows").first[0] == 0
    house.close()
