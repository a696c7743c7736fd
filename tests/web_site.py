"""An opened installation with a small directory, its web side, and what the tests of the web side do with them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from subscriptions import directory, transfer
from subscriptions.audience import AccountFacts
from subscriptions.database import system_clock
from worker import events, fanout, keys, leases, settings
from worker.app import App, open_app
from worker.intake import Publisher
from worker.ledger import Lane
from worker.links import Links, contact_now, delivery_now, keys_for
from worker.web.inbox import Inbox
from worker.web.server import build

LISTEN = ("127.0.0.1", 8080)
BASE = "http://127.0.0.1:8080"

DIRECTORY = {
    "accounts": [
        {
            "id": "acme",
            "name": "Acme Corp",
            "catalogue": "billtrust",
            "uses": ["invoicing", "payments"],
            "contacts": [
                {"id": "c1", "name": "Ada", "email": "Ada@acme.example", "roles": ["executive", "primary_support"]},
                {"id": "c2", "name": "Bob", "email": "bob@acme.example", "roles": ["secondary_support"],
                 "products": ["payments"]},
                {"id": "c3", "name": "Cleo", "email": "cleo@acme.example", "roles": []},
            ],
        },
        {
            "id": "beta",
            "name": "Beta Ltd",
            "catalogue": "billtrust",
            "uses": ["invoicing"],
            "contacts": [
                {"id": "b1", "name": "Ada", "email": "ada@acme.example", "roles": ["executive"]},
                {"id": "b2", "name": "Zoe", "email": "zoe@beta.example", "roles": ["executive", "primary_support"]},
            ],
        },
        {
            "id": "city",
            "name": "City Works",
            "catalogue": "issuetrak",
            "contacts": [
                {"id": "p1", "name": "Pia", "email": "pia@city.example",
                 "roles": ["primary_contact", "invoice_primary"]},
                {"id": "p2", "name": "Tom", "email": "tom@city.example", "roles": ["primary_contact"]},
            ],
        },
    ]
}  # fmt: skip


@contextmanager
def opened(folder: Path, *, contents: dict[str, Any] = DIRECTORY, **given: Any) -> Iterator[App]:
    """An installation in a folder, with a directory imported."""
    chosen = settings.Settings(
        database_url=settings.Secret(f"sqlite:///{folder / 'rolecast.db'}"),
        sender="Vendor <news@vendor.example>",
        status_page_url="https://status.vendor.example/",
        public_url=BASE,
        **given,
    )
    with open_app(chosen, clock=system_clock) as app:
        load(app, contents)
        yield app


def load(app: App, contents: dict[str, Any]) -> None:
    """Import a directory document."""
    stream = io.BytesIO(json.dumps(contents).encode())
    with transfer.checked(stream, catalogues=app.catalogues, name="test.json") as document:
        transfer.run_import(app.database, document, catalogues=app.catalogues, now=app.clock())


@dataclass(slots=True)
class Web:
    """The web side of an installation, and a browser on the same machine."""

    app: App
    client: TestClient

    def key(self, *scopes: str, mode: str = "live", name: str = "publisher") -> dict[str, str]:
        """The headers of a new API key."""
        with self.app.database.write() as connection:
            _, presented = keys.create(
                connection,
                name=name,
                mode=mode,
                scopes=scopes or ("publish:*",),
                types=events.TYPES,
                now=self.app.clock(),
            )
        return {"Authorization": f"Bearer {presented}", "Content-Type": "application/cloudevents+json"}

    def publish(self, type_name: str, **data: Any) -> str:
        """Accept an event by the command line's door and plan it; returns its ULID."""
        event = events.parse_event(an_event(type_name, **data))
        (accepted,) = self.app.intake.accept([event], Publisher())
        with self.app.database.write() as connection:
            worker = leases.register(connection, host="test", pid=1, lanes=[Lane.BULK], now=self.app.clock())
            taken = fanout.take_event(connection, worker, now=self.app.clock())
        if taken is not None:
            fanout.plan_event(
                self.app.database, self.app.planner, taken, worker, clock=self.app.clock, go_on=lambda: True
            )
        return accepted.event

    @property
    def links(self) -> Links:
        """What makes the links in mails."""
        return Links(keys_for((), self.app.database.path), BASE)

    def unsubscribe_path(self, event: str, email: str) -> str:
        """The one-click path of the mail that an event sends to an address."""
        from worker import history

        with self.app.database.read() as connection:
            row = history.find_event(connection, event)
            assert row is not None
            n = next(one["n"] for one in history.list_deliveries(connection, row) if one["email"] == email)
        return self.one_click_path(row.id, n)

    def one_click_path(self, event_id: int, n: int) -> str:
        """The one-click path of a delivery's mail, by its numbers."""
        with self.app.database.read() as connection:
            identity = delivery_now(connection, event_id, n)
        assert identity is not None
        return self.links.unsubscribe(event_id, n, identity).removeprefix(BASE)

    def preferences_path(self, account: str, contact: str) -> str:
        """The path of a contact's preference page."""
        number = self.number(account, contact)
        with self.app.database.read() as connection:
            identity = contact_now(connection, number)
        assert identity is not None
        return self.links.preferences(number, identity).removeprefix(BASE)

    def number(self, account: str, contact: str) -> int:
        """A contact's row number."""
        return next(one.number for one in self.facts(account).contacts if one.id == contact)

    def facts(self, account: str) -> AccountFacts:
        """What the resolver sees of an account."""
        with self.app.database.read() as connection:
            found = directory.account(connection, self.app.catalogues, account)
        assert found is not None
        return found


@contextmanager
def served(
    app: App,
    *,
    inbox: Inbox | None = None,
    client: str = "127.0.0.1",
    base: str = BASE,
    listen: tuple[str, int] = LISTEN,
) -> Iterator[Web]:
    """The web side, reached from `client` under the name `base`."""
    application = build(app, engine=None, inbox=inbox, listen=listen)
    with TestClient(
        application, base_url=base, client=(client, 50000), follow_redirects=False, raise_server_exceptions=False
    ) as browser:
        yield Web(app, browser)


def an_event(type_name: str, **data: Any) -> dict[str, Any]:
    """A sample of the type with other data, and an id of its own."""
    event = events.sample(type_name)
    if "accounts" in data:
        event["data"].pop("account", None)
    if "account" in data:
        event["data"].pop("accounts", None)
    event["data"].pop("products", None)
    event["data"].update(data)
    event["id"] = f"{type_name}-{abs(hash(json.dumps(data, sort_keys=True)))}"
    return event
