"""The schema: one Alembic chain inside the package, for SQLite and PostgreSQL.

SQLite migrates itself when it is opened; PostgreSQL waits for `rolecast db upgrade`. A database that is newer than the
code is worked on where it says that code so old still may (`installation.oldest_code`), so that old and new workers run
side by side while hosts are upgraded; else it is refused with the remedy. Several processes that migrate at once do it
one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, inspect, select, text

from subscriptions import directory
from subscriptions.database import Clock, Database, DatabaseUnusable
from subscriptions.schema import installation
from worker import logs

logger = logs.get(__name__)

SCRIPTS = Path(__file__).parent / "migrations"
SCHEMA_LOCK = 7_665_632_016
#: PostgreSQL's advisory lock of who migrates.


class SchemaError(Exception):
    """The database's schema does not fit the code; the message says which of them to bring up to date."""


def prepare(database: Database, *, clock: Clock, migrates: bool = True) -> None:
    """Make sure that the database fits the code. Raises `SchemaError`, `DatabaseUnusable`."""
    found, head = state(database)
    if found == head or _still_serves(database, found, head):
        return
    _refuse_newer(database, found)
    if found is None and (database.dialect == "postgresql" or not migrates):
        message = "the database is empty: run `rolecast db upgrade` first"
        raise SchemaError(message)
    if database.dialect == "postgresql" or not migrates:
        message = f"the database has schema {found}, the code needs {head}: run `rolecast db upgrade` first"
        raise SchemaError(message)
    upgrade(database, clock=clock)


def upgrade(database: Database, *, clock: Clock) -> tuple[str | None, str]:
    """Bring the schema up to the code's: (before, now). Raises `SchemaError`, `DatabaseUnusable`."""
    from alembic import command

    with database.write() as connection:
        if database.dialect == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})
        found = _revision(connection)
        _refuse_newer(database, found)
        command.upgrade(_config(connection), "head")
        directory.install(connection, now=clock())
        now = _revision(connection)
    assert now is not None
    if found != now:
        logger.info("database.upgraded", before=found, now=now)
    return found, now


def state(database: Database) -> tuple[str | None, str]:
    """(the database's revision or None where it is empty, the code's)."""
    with database.read() as connection:
        return _revision(connection), _head()


def misfit(database: Database) -> str | None:
    """Why the code can't work on the database as it is; None where it can. Raises `DatabaseUnusable`."""
    found, head = state(database)
    if found == head or _still_serves(database, found, head):
        return None
    try:
        _refuse_newer(database, found)
    except SchemaError as error:
        return str(error)
    return f"the database has schema {found or 'none'}, the code needs {head}: run `rolecast db upgrade`"


def _still_serves(database: Database, found: str | None, head: str) -> bool:
    """Whether a newer schema says that this code may go on."""
    if found is None or found in _known():
        return False
    with database.read() as connection:
        oldest = connection.execute(select(installation.c.oldest_code)).scalar_one()
    return int(head) >= int(oldest)


def _refuse_newer(database: Database, found: str | None) -> None:
    if found is not None and found not in _known():
        message = (
            f"the database {database.url.rpartition('@')[2]} has schema {found}, which this version of Rolecast does "
            "not know: it was made by a newer one; install that, or restore a backup made before the upgrade"
        )
        raise SchemaError(message)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        if connection.dialect.name == "sqlite" and inspect(connection).get_table_names():
            message = "database_url names a SQLite file that holds something else: give it a path of its own"
            raise DatabaseUnusable(message)
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    return found


def _config(connection: Connection | None = None) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.attributes["connection"] = connection
    return config


def _known() -> set[str]:
    # Read from the names of the files: importing Alembic takes a second, and every command comes by here.
    return {path.name.partition("_")[0] for path in (SCRIPTS / "versions").glob("[0-9]*.py")}


def _head() -> str:
    return max(_known())
