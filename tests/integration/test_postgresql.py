"""The whole path on PostgreSQL: made with `db upgrade`'s statements, worked with the queue in memory."""

from __future__ import annotations

from pathlib import Path

from subscriptions.database import Database, system_clock
from tests.databases import _named, _statement
from tests.house import ACME, GLOBEX, event, house, publish
from tests.smtpd import SmtpServer
from tests.test_delivery import run
from worker import history, ledger, migrate

CROWD = {
    "id": "crowd",
    "catalogue": "billtrust",
    "contacts": [{"id": f"p{n}", "email": f"p{n}@crowd.example", "roles": ["secondary_support"]} for n in range(600)],
}


def test_a_broadcast_and_an_invoice_go_out_once_on_postgresql(tmp_path: Path, postgresql_server: str) -> None:
    _statement(postgresql_server, "CREATE DATABASE whole_path")
    url = _named(postgresql_server, "whole_path")
    database = Database(url)
    try:
        assert migrate.upgrade(database, clock=system_clock) == (None, migrate.state(database)[1])
    finally:
        database.close()
    with (
        SmtpServer() as server,
        house(
            tmp_path,
            ACME,
            GLOBEX,
            CROWD,
            clock=system_clock,
            database_url=url,
            relay_urls=f"smtp://127.0.0.1:{server.port}?tls=none&connections=4",
            public_url="https://notify.vendor.example",
            secret_keys="a-key-of-some-length",
        ) as app,
    ):
        publish(app, event("service.notice", accounts="all"), event("invoice.issued", id="i", account="globex"))
        run(app)
        assert len(server.accepted) == 604
        assert len({(mail.recipient, mail.sender) for mail in server.accepted}) == 604
        with app.database.read() as connection:
            assert ledger.totals(connection, 1) == {"accepted": 602}
            assert ledger.totals(connection, 2) == {"accepted": 2}
            # What pages read is written for each database of its own.
            second, first = history.list_events(connection)
            assert (first["accounts"], second["account"]) == ("all", "globex")
            assert second["title"].startswith("Invoice issued: ")
            notice = history.find_event(connection, first["event"])
            assert notice is not None
            audience = history.audience(connection, notice)
            assert (audience.accounts, audience.contacts, audience.recipients) == (3, 607, 602)
            assert history.catalogues_of(connection, notice, ["acme"]) == {"acme": "billtrust"}
