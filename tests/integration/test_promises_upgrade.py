"""An upgrade with ten thousand mails queued loses none and sends none twice (reliability.md R30), on both databases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import MetaData, Table, insert, select, text

from subscriptions.database import Database
from subscriptions.schema import metadata
from tests import invariants
from tests.databases import _named, _statement
from tests.house import ACME, app_on, event, house, import_accounts, publish
from tests.smtpd import SmtpServer
from tests.test_delivery import Clock, states, working
from worker import fanout, leases, migrate
from worker.app import App
from worker.ledger import Lane

QUEUED = 10_000
FIRST = "0001"

Rows = dict[str, list[tuple[Any, ...]]]


@pytest.fixture(params=["sqlite", "postgresql"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An installation as the first release left it, with a broadcast planned and queued and an invoice beside it."""
    url = f"sqlite:///{tmp_path / 'old.db'}"
    server = ""
    if request.param == "postgresql":
        server = request.getfixturevalue("postgresql_server")
        _statement(server, "CREATE DATABASE upgraded")
        url = _named(server, "upgraded")
    database = Database(url)
    try:
        with database.write() as connection:
            command.upgrade(migrate._config(connection), FIRST)
        _fill(database, request.getfixturevalue("sqlite_database"), tmp_path)
        yield database
    finally:
        database.close()
        if server:
            _statement(server, "DROP DATABASE upgraded WITH (FORCE)")


def _fill(database: Database, today: Database, folder: Path) -> None:
    """Plan in a database of today, and copy what the first schema has a place for."""
    app = app_on(today, folder)
    people = [{"id": f"p{n}", "email": f"p{n}@crowd.example", "roles": ["executive"]} for n in range(QUEUED)]
    import_accounts(app, [{"id": "crowd", "catalogue": "billtrust", "contacts": people}, ACME])
    publish(app, event("corporate.published", accounts=["crowd"]), event("invoice.issued", id="i"))
    _plan(app)
    tables = _tables(database)
    with today.read() as source, database.write() as target:
        target.execute(tables["installation"].delete())
        for one in metadata.sorted_tables:
            if one.name in tables:
                names = [column.name for column in tables[one.name].columns if column.name in one.columns]
                rows = [dict(row._mapping) for row in source.execute(select(*(one.c[name] for name in names)))]
                if rows:
                    target.execute(insert(tables[one.name]), rows)
                if database.dialect == "postgresql" and "id" in names:
                    _count_on(target, one.name)


def _plan(app: App) -> None:
    with app.database.write() as connection:
        number = leases.register(connection, host="test", pid=1, lanes=list(Lane), now=app.clock())
        taken = fanout.take_event(connection, number, now=app.clock())
        assert taken is not None
    fanout.plan_event(app.database, app.planner, taken, number, clock=app.clock, go_on=lambda: True)
    with app.database.write() as connection:
        leases.leave(connection, number)


def _count_on(connection: Any, table: str) -> None:
    """The next row gets a number that none has: a copy does not move PostgreSQL's sequences."""
    name = connection.execute(text("SELECT pg_get_serial_sequence(:table, 'id')"), {"table": table}).scalar()
    if name:
        connection.execute(text(f"SELECT setval('{name}', (SELECT COALESCE(max(id), 0) + 1 FROM {table}))"))


def _tables(database: Database) -> dict[str, Table]:
    """The tables as they stand in the database."""
    found = MetaData()
    with database.read() as connection:
        found.reflect(connection)
    return {name: table for name, table in found.tables.items() if name != "alembic_version"}


def _contents(database: Database, tables: dict[str, Table]) -> Rows:
    with database.read() as connection:
        return {
            name: sorted((tuple(row) for row in connection.execute(select(table))), key=repr)
            for name, table in tables.items()
        }


def test_an_upgrade_with_ten_thousand_queued_loses_none_and_sends_none_twice(old: Database, tmp_path: Path) -> None:
    before_tables = _tables(old)
    before = _contents(old, before_tables)
    assert len(before["deliveries"]) == QUEUED + 1
    if old.dialect == "postgresql":
        with pytest.raises(migrate.SchemaError, match="run `rolecast db upgrade` first"):
            migrate.prepare(old, clock=Clock())
        migrate.upgrade(old, clock=Clock())
    else:
        migrate.prepare(old, clock=Clock())
    assert migrate.state(old)[0] == migrate.state(old)[1] != FIRST
    after = _contents(old, before_tables)
    assert {name: rows for name, rows in after.items() if name != "installation"} == {
        name: rows for name, rows in before.items() if name != "installation"
    }
    invariants.check(old)
    with (
        SmtpServer() as server,
        house(
            tmp_path,
            clock=Clock(),
            database_url=old.url,
            relay_urls=f"smtp://127.0.0.1:{server.port}?tls=none&connections=4",
            public_url="https://notify.vendor.example",
            secret_keys="a-key-of-some-length",
        ) as app,
    ):
        with working(app):
            while len(server.accepted) < 700:
                time.sleep(0.01)
        taken = len(server.accepted)
        assert len({(mail.recipient, mail.sender) for mail in server.accepted}) == taken
        assert invariants.unaccounted(app.database, server.accepted) == []
        assert states(app, 1) == {"accepted": taken - 1, "planned": QUEUED - taken + 1}
        assert states(app, 2) == {"accepted": 1}
        invariants.check(app.database)
