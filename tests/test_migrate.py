"""The Alembic chain gives exactly the tables that the code knows, on both databases, however many start at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, select, text

from subscriptions.database import Database, DatabaseUnusable, system_clock
from subscriptions.schema import installation, metadata
from tests.databases import NOW, _named, _statement
from tests.house import ACME, event, house, publish
from tests.smtpd import SmtpServer
from worker import migrate
from worker.app import Engine

ROOT = Path(__file__).resolve().parent.parent


def clock() -> int:
    return NOW


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without any table, on each kind."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'rolecast.db'}")
        yield database
        database.close()
        return
    server = request.getfixturevalue("postgresql_server")
    name = f"empty_{abs(hash(request.node.nodeid)):x}"
    _statement(server, f"CREATE DATABASE {name}")
    database = Database(_named(server, name))
    yield database
    database.close()
    _statement(server, f"DROP DATABASE {name} WITH (FORCE)")


def test_the_chain_gives_exactly_the_tables_that_the_code_knows(empty: Database) -> None:
    before, now = migrate.upgrade(empty, clock=clock)
    assert before is None
    with empty.read() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": empty.dialect == "sqlite",
                "include_object": lambda one, *_: one.info.get("dialect", empty.dialect) == empty.dialect,
            },
        )
        assert compare_metadata(context, metadata) == []
        assert connection.execute(select(func.count()).select_from(installation)).scalar_one() == 1
    assert migrate.state(empty) == (now, now)
    # and a second upgrade changes nothing
    assert migrate.upgrade(empty, clock=clock) == (now, now)


def test_a_sqlite_database_migrates_itself(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'rolecast.db'}")
    migrate.prepare(database, clock=clock)
    found, head = migrate.state(database)
    assert found == head
    migrate.prepare(database, clock=clock)
    database.close()


def test_a_database_that_may_not_be_migrated_now_is_refused_with_the_command(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'rolecast.db'}")
    with pytest.raises(migrate.SchemaError, match="run `rolecast db upgrade` first") as caught:
        migrate.prepare(database, clock=clock, migrates=False)
    assert "None" not in str(caught.value)
    database.close()


def test_an_empty_postgresql_database_waits_for_the_upgrade(empty: Database) -> None:
    if empty.dialect != "postgresql":
        migrate.prepare(empty, clock=clock)
        return
    with pytest.raises(migrate.SchemaError, match="is empty: run `rolecast db upgrade` first"):
        migrate.prepare(empty, clock=clock)
    migrate.upgrade(empty, clock=clock)
    migrate.prepare(empty, clock=clock)


def a_newer_schema(database: Database, *, oldest_code: int) -> None:
    """What a later version's migration might leave: a table and columns more."""
    with database.write() as connection:
        connection.execute(text("CREATE TABLE later (id INTEGER PRIMARY KEY)"))
        for table in ("events", "deliveries", "slices", "workers"):
            connection.execute(text(f"ALTER TABLE {table} ADD COLUMN later TEXT"))
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        connection.execute(text("UPDATE installation SET oldest_code = :oldest"), {"oldest": oldest_code})


def test_a_worker_goes_on_while_and_after_a_newer_version_migrates_the_database(tmp_path: Path) -> None:
    with SmtpServer() as server:
        relay = f"smtp://127.0.0.1:{server.port}?tls=none"
        with house(tmp_path, ACME, clock=system_clock, relay_urls=relay, public_url="https://n.vendor.example") as app:
            engine = Engine(app)
            engine.start()
            try:
                publish(app, event("file.failed", id="before"))
                a_newer_schema(app.database, oldest_code=1)
                publish(app, event("file.failed", id="meanwhile"))
                assert engine.until_idle(seconds=30)
            finally:
                engine.stop()
        with house(tmp_path, clock=system_clock, relay_urls=relay, public_url="https://n.vendor.example") as app:
            publish(app, event("file.failed", id="afterwards"))
            engine = Engine(app)
            engine.start()
            try:
                assert engine.until_idle(seconds=30)
            finally:
                engine.stop()
        assert len(server.accepted) == 3


def test_a_database_newer_than_the_code_is_refused_in_one_sentence(empty: Database) -> None:
    migrate.upgrade(empty, clock=clock)
    a_newer_schema(empty, oldest_code=9999)
    for attempt in (migrate.prepare, migrate.upgrade):
        with pytest.raises(migrate.SchemaError, match=r"schema 9999, .*made by a newer one; install that") as caught:
            attempt(empty, clock=clock)
        assert "\n" not in str(caught.value)
        assert "password" not in str(caught.value)
    with empty.read() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "9999"


def test_a_sqlite_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "photos.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE photos (name TEXT)")
    other.commit()
    other.close()
    database = Database(f"sqlite:///{path}")
    with pytest.raises(DatabaseUnusable, match="holds something else: give it a path of its own"):
        migrate.prepare(database, clock=clock)
    with database.read() as connection:
        assert connection.execute(text("SELECT name FROM sqlite_master")).scalars().all() == ["photos"]
    database.close()


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, and no database\n" * 50)
    before = path.read_bytes()
    database = Database(f"sqlite:///{path}")
    with pytest.raises(DatabaseUnusable, match="must name a SQLite file that Rolecast made, or a new path"):
        migrate.prepare(database, clock=clock)
    database.close()
    assert path.read_bytes() == before


def test_an_upgrade_that_fails_leaves_nothing_half_made(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'rolecast.db'}")

    def broken_clock() -> int:
        message = "the clock stopped"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="the clock stopped"):
        migrate.upgrade(database, clock=broken_clock)
    with database.read() as connection:
        assert connection.execute(text("SELECT name FROM sqlite_master")).scalars().all() == []
    migrate.upgrade(database, clock=clock)
    database.close()


START = """
import os, sys
import alembic.command
from subscriptions.database import Database, system_clock
from worker import migrate
from worker.app import Engine

def start():
    database = Database(sys.argv[1])
    os.read(gate, 1)
    migrate.upgrade(database, clock=system_clock)
    migrate.prepare(database, clock=system_clock)
    print(migrate.state(database)[0], flush=True)
    database.close()

gate, opener = os.pipe()
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        os.close(opener)
        start()
        os._exit(0)
    children.append(child)
os.close(opener)  # whoever reads goes on: all at once
sys.exit(sum(os.waitpid(child, 0)[1] for child in children) != 0)
"""


def test_four_processes_that_start_at_once_make_one_schema(empty: Database) -> None:
    command = [sys.executable, "-c", START, empty.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    with empty.read() as connection:
        assert connection.execute(select(func.count()).select_from(installation)).scalar_one() == 1
    found, head = migrate.state(empty)
    assert (found, set(out.split()[-4:])) == (head, {head})


def test_the_migrations_are_found_through_the_package_from_any_folder(tmp_path: Path) -> None:
    files = {file.name for file in resources.files("worker").joinpath("migrations", "versions").iterdir()}
    chain = {path.name for path in (migrate.SCRIPTS / "versions").glob("[0-9]*.py")}
    assert chain
    assert chain <= files
    code = (
        "import sys; from subscriptions.database import Database, system_clock; from worker import migrate; "
        "d = Database('sqlite:///rolecast.db'); print(migrate.upgrade(d, clock=system_clock)[1]); d.close()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in {name.partition("_")[0] for name in chain}


def test_every_migration_names_the_one_before_it() -> None:
    names = sorted(path.name.partition("_")[0] for path in (migrate.SCRIPTS / "versions").glob("[0-9]*.py"))
    assert names == [f"{number:04}" for number in range(1, len(names) + 1)]
