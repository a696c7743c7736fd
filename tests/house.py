"""An installation for tests: an opened App on a database, with a small directory, a moved clock and short words."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from subscriptions.bulk import read_columns
from subscriptions.catalogue import load_catalogues
from subscriptions.database import Database
from subscriptions.transfer import checked, run_import
from worker import ledger
from worker.app import App, open_app
from worker.events import Event, parse_event, sample
from worker.fanout import Planner
from worker.intake import Accepted, Intake, Publisher
from worker.ledger import Claim
from worker.settings import load
from worker.sharedfeed import SharedFeed
from worker.statuspage import StatusPage

NOW = 1_795_255_200_000_000
"""2026-11-21 10:00 UTC, where every test's clock begins."""

DAY = 86_400_000_000
CLI = Publisher()

ACME: dict[str, Any] = {
    "id": "acme",
    "name": "Acme Corp",
    "catalogue": "billtrust",
    "uses": ["invoicing", "payments"],
    "contacts": [
        {"id": "ada", "name": "Ada", "email": "ada@acme.example", "roles": ["executive", "primary_support"]},
        {"id": "ben", "name": "Ben", "email": "ben@acme.example", "roles": ["secondary_support"]},
        {"id": "cy", "name": "Cy", "email": "cy@acme.example", "roles": ["accounting"]},
        {"id": "di", "name": "Di", "email": "di@acme.example", "roles": ["invoicing_file_failure"]},
    ],
}
GLOBEX: dict[str, Any] = {
    "id": "globex",
    "name": "Globex",
    "catalogue": "issuetrak",
    "uses": ["issuetrak"],
    "contacts": [
        {"id": "ann", "name": "Ann", "email": "ann@globex.example", "roles": ["primary_contact"]},
        {"id": "pay", "name": "Payables", "email": "pay@globex.example", "kind": "group", "roles": ["invoice_primary"]},
        {"id": "quinn", "name": "Quinn", "email": "quinn@globex.example", "roles": ["quote_approver"]},
    ],
}


class MovedClock:
    """A clock that stands where a test puts it, and moves when told."""

    def __init__(self, now: int = NOW) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def event(type_name: str, *, id: str = "e1", source: str = "/test", **data: Any) -> Event:  # noqa: A002 - CloudEvents' word
    """A valid event of a type: its sample with other ids and data; a datum of None is taken out."""
    return parse_event(envelope(type_name, id=id, source=source, **data))


def envelope(type_name: str, *, id: str = "e1", source: str = "/test", **data: Any) -> dict[str, Any]:  # noqa: A002
    """The same as a JSON value."""
    value = deepcopy(sample(type_name))
    value |= {"id": id, "source": source}
    body = value["data"]
    for name in ("products", "account", "accounts", "attachments"):
        body.pop(name, None)
    if "account" not in data and "accounts" not in data:
        data["account"] = "acme"
    for name, given in data.items():
        if given is None:
            body.pop(name, None)
        else:
            body[name] = given
    return value


@contextmanager
def house(
    folder: Path,
    *accounts: Mapping[str, Any],
    clock: Any = None,
    database_url: str | None = None,
    **settings: str,
) -> Iterator[App]:
    """An App on a new SQLite database in `folder` (or on `database_url`), with these accounts imported."""
    environment = {
        "ROLECAST_DATABASE_URL": database_url or f"sqlite:///{folder / 'rolecast.db'}",
        "ROLECAST_SENDER": "Vendor Support <support@vendor.example>",
        "ROLECAST_STATUS_PAGE_URL": "https://status.vendor.example",
    } | {f"ROLECAST_{name.upper()}": value for name, value in settings.items()}
    with open_app(load(environment, folder=folder), clock=clock or MovedClock()) as app:
        if accounts:
            import_accounts(app, accounts)
        yield app


def app_on(database: Database, folder: Path) -> App:
    """An App on an opened database of either kind."""
    settings = load({"ROLECAST_SENDER": "v@vendor.example"}, folder=folder)
    catalogues, clock = load_catalogues(), MovedClock()
    planner = Planner(catalogues, "live", settings.team)
    feed = SharedFeed(database, StatusPage(None, clock=lambda: datetime.now(UTC)))
    return App(settings, database, catalogues, planner, feed, Intake(database, planner, feed, settings, clock), clock)


def import_accounts(app: App, accounts: Sequence[Mapping[str, Any]]) -> None:
    """Import accounts as a directory document."""
    stream = io.BytesIO(json.dumps({"accounts": list(accounts)}).encode())
    with checked(stream, catalogues=app.catalogues, name="test.json") as document:
        run_import(app.database, document, catalogues=app.catalogues, now=app.clock())


def publish(app: App, *events: Event, publisher: Publisher = CLI) -> list[Accepted]:
    """Accept events."""
    return app.intake.accept(events, publisher)


def owed(connection: Connection, taken: Claim) -> list[int]:
    """The numbers that a claimed slice of the first event is to send now."""
    condition, values = ledger.owed(taken)
    found = read_columns(connection, ("d.n",), f"FROM deliveries d WHERE event_id = 1 AND {condition}", **values)
    return sorted(found[0])
