"""From an accepted event to mail at the relay and into the ledger: the whole path, with a relay that obeys a script."""

from __future__ import annotations

import email
import email.policy
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, text, update

from subscriptions.changes import Actor, SetOptOut, Suppress, apply
from subscriptions.database import Database, system_clock
from tests.databases import _named, _statement
from tests.house import ACME, DAY, GLOBEX, event, house, import_accounts, publish
from tests.smtpd import Act, SmtpServer, close, lose_the_reply, reply, reset
from worker import decisions, fanout, feeding, leases, ledger, migrate
from worker.app import AnotherWorks, App, Engine
from worker.links import delivery_now, read_bounce
from worker.schema import deliveries, domains, events, flights, paces, pauses, relay_days, slices


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as running:
        yield running


class Clock:
    """The system's clock, which a test can put ahead."""

    def __init__(self) -> None:
        self.ahead = 0

    def __call__(self) -> int:
        return system_clock() + self.ahead


@contextmanager
def working(app: App) -> Iterator[Engine]:
    engine = Engine(app)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def run(app: App) -> None:
    """Work until nothing is due now."""
    with working(app) as engine:
        assert engine.until_idle(seconds=20)


@contextmanager
def vendor(folder: Path, server: SmtpServer, *accounts: Mapping[str, Any], **settings: str) -> Iterator[App]:
    settings = {
        "relay_urls": f"smtp://127.0.0.1:{server.port}?tls=none&connections=4",
        "public_url": "https://notify.vendor.example",
    } | settings
    with house(folder, *(accounts or (ACME, GLOBEX)), clock=Clock(), **settings) as app:
        yield app


def read(body: bytes) -> email.message.EmailMessage:
    message = email.message_from_bytes(body, policy=email.policy.default)
    assert isinstance(message, email.message.EmailMessage)
    return message


def states(app: App, event_id: int = 1) -> dict[str, int]:
    with app.database.read() as connection:
        return ledger.totals(connection, event_id)


def rows(app: App, *columns: Any) -> list[Any]:
    with app.database.read() as connection:
        return list(connection.execute(select(*columns)).all())


def test_an_invoice_reaches_the_accounting_contact_and_nobody_else(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        answer = publish(app, event("invoice.issued"))[0]
        run(app)
        assert [mail.recipient for mail in server.accepted] == ["cy@acme.example"]
        message = read(server.accepted[0].body)
        assert message["To"] == "Cy <cy@acme.example>"
        assert message["From"] == "Vendor Support <support@vendor.example>"
        assert message["X-Rolecast-Event"] == answer.event
        assert message["X-Rolecast-Reason"] == "account=acme; category=invoice; role=accounting"
        assert message["Auto-Submitted"] == "auto-generated"
        assert message["List-Unsubscribe"] is None, "nobody may opt out of an invoice that is their duty"
        assert message.get_content_type() == "multipart/alternative"
        assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]
        row = rows(app, deliveries.c.status, deliveries.c.relay, deliveries.c.reply, deliveries.c.attempts)[0]
        assert (row.status, row.relay, row.attempts) == (ledger.Status.ACCEPTED, f"127.0.0.1:{server.port}", 1)
        assert row.reply.startswith("250 ")
        assert rows(app, events.c.status) == [("done",)]
        assert rows(app, flights) == []


def test_the_envelope_sender_names_the_delivery_and_cannot_be_forged(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server, bounce_domain="bounces.vendor.example") as app:
        publish(app, event("invoice.issued"))
        run(app)
        local, _, domain = server.accepted[0].sender.partition("@")
        assert domain == "bounces.vendor.example"
        with app.database.read() as connection:
            from subscriptions.directory import address_key

            found = read_bounce(address_key(connection), local.upper(), partial(delivery_now, connection))
            assert found == (1, 1)


def test_a_promotional_mail_carries_one_click_unsubscribe(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("webinar.scheduled", account="acme"))
        run(app)
        message = read(server.accepted[0].body)
        assert message["List-Unsubscribe"].startswith("<https://notify.vendor.example/unsubscribe/")
        assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"


@pytest.mark.parametrize("done", [1, 35, 40])
def test_of_a_large_slice_only_what_is_still_owed_is_sent(tmp_path: Path, server: SmtpServer, done: int) -> None:
    """Its first flight is begun by numbers alone, before anybody has read what they stand for."""
    many = [
        {"id": f"a{n}", "name": f"Account {n}", "catalogue": "billtrust", "uses": ["invoicing"],
         "contacts": [{"id": "p", "name": f"P{n}", "email": f"p{n}@a{n}.example", "roles": ["executive"]}]}
        for n in range(40)
    ]  # fmt: skip
    with vendor(tmp_path, server, *many) as app:
        publish(app, event("announcement.published", accounts="all"))
        with app.database.write() as connection:
            worker = leases.register(connection, host="test", pid=1, lanes=[ledger.Lane.BULK], now=app.clock())
            taken = fanout.take_event(connection, worker, now=app.clock())
        assert taken is not None
        fanout.plan_event(app.database, app.planner, taken, worker, clock=app.clock, go_on=lambda: True)
        with app.database.write() as connection:
            settled = update(deliveries).where(deliveries.c.n <= done).values(status=int(ledger.Status.ACCEPTED))
            connection.execute(settled)
        run(app)
        assert len(server.accepted) == 40 - done
        assert rows(app, events.c.status) == [("done",)]
        assert rows(app, flights) == []


def test_an_outage_is_never_mailed(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("outage.started", accounts="all"), event("maintenance.scheduled", id="m", accounts="all"))
        run(app)
        assert server.accepted == []
        assert rows(app, deliveries) == []


def test_only_the_signer_gets_the_signing_link(tmp_path: Path, server: SmtpServer) -> None:
    link = "https://sign.vendor.example/secret-token"
    with vendor(tmp_path, server) as app:
        publish(app, event("quote.issued", account="globex", signing_url=link))
        run(app)
        assert [mail.recipient for mail in server.accepted] == ["quinn@globex.example"]
        assert b"secret-token" in server.accepted[0].body


def test_without_a_signer_the_primaries_get_a_plain_notice(tmp_path: Path, server: SmtpServer) -> None:
    alone = GLOBEX | {"contacts": GLOBEX["contacts"][:2]}
    with vendor(tmp_path, server, alone) as app:
        publish(app, event("quote.issued", account="globex", signing_url="https://sign.vendor.example/secret-token"))
        run(app)
        assert [mail.recipient for mail in server.accepted] == ["ann@globex.example"]
        assert b"secret-token" not in server.accepted[0].body


def test_a_copy_says_that_it_is_one(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("invoice.issued", account="globex"))
        run(app)
        by_recipient = {mail.recipient: read(mail.body) for mail in server.accepted}
        assert set(by_recipient) == {"pay@globex.example", "ann@globex.example"}
        assert by_recipient["ann@globex.example"]["Subject"].startswith("Copy:")
        assert by_recipient["ann@globex.example"]["X-Rolecast-Copy"] == "yes"
        assert by_recipient["pay@globex.example"]["X-Rolecast-Copy"] is None


def test_one_mail_tells_all_its_grounds(tmp_path: Path, server: SmtpServer) -> None:
    def account(name: str) -> dict[str, Any]:
        person = {"id": "pat", "name": "Pat", "email": "pat@people.example", "roles": ["executive"]}
        return {"id": name, "name": name.title(), "catalogue": "billtrust", "contacts": [person]}

    with vendor(tmp_path, server, account("one"), account("two")) as app:
        publish(app, event("corporate.published", accounts="all"))
        run(app)
        assert len(server.accepted) == 1
        message = read(server.accepted[0].body)
        assert message.get_all("X-Rolecast-Reason") == [
            "account=one; category=corporate_communication; role=executive",
            "account=two; category=corporate_communication; role=executive",
        ]


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "dot"])
def test_a_temporary_refusal_is_tried_again_as_the_same_message(stage: str, tmp_path: Path, server: SmtpServer) -> None:
    server.on(stage, reply(450, "4.2.0 later"), nth=1)
    with vendor(tmp_path, server) as app:
        publish(app, event("file.failed"))
        run(app)
        row = rows(app, deliveries.c.status, deliveries.c.due_at, deliveries.c.reason, deliveries.c.reply)[0]
        assert row.status == ledger.Status.PLANNED
        assert row.due_at is not None
        assert row.reply.startswith("450 4.2.0 later (")
        assert rows(app, events.c.status) == [("sending",)]
        app.clock.ahead = 3_600_000_000  # type: ignore[attr-defined]
        run(app)
        assert states(app) == {"accepted": 1}
        assert rows(app, events.c.status) == [("done",)]
        assert len(server.accepted) == 1


def test_message_id_date_and_envelope_sender_stay_the_same_on_every_attempt(tmp_path: Path, server: SmtpServer) -> None:
    server.on("dot", lose_the_reply(), nth=1)
    with vendor(tmp_path, server) as app:
        publish(app, event("file.failed"))
        run(app)
        app.clock.ahead = 3_600_000_000  # type: ignore[attr-defined]
        run(app)
        first, second = server.accepted
        assert first.sender == second.sender
        for header in ("Message-ID", "Date"):
            assert read(first.body)[header] == read(second.body)[header]
        assert states(app) == {"accepted": 1}


def test_an_unknown_outcome_of_money_mail_is_held_and_never_sent_again_by_itself(
    tmp_path: Path, server: SmtpServer
) -> None:
    server.on("dot", lose_the_reply(), nth=1)
    with vendor(tmp_path, server) as app:
        publish(app, event("invoice.issued"))
        run(app)
        app.clock.ahead = 5 * DAY  # type: ignore[attr-defined]
        run(app)
        assert states(app) == {"held": 1}
        assert rows(app, deliveries.c.reason) == [("unknown",)]
        assert len(server.accepted) == 1
        assert rows(app, events.c.status) == [("done",)]


@pytest.mark.parametrize("act", [close(), reset()], ids=["closed", "reset"])
@pytest.mark.parametrize("stage", ["mail", "rcpt", "data"])
def test_a_connection_lost_before_the_dot_costs_nobody_a_copy(
    stage: str, act: Any, tmp_path: Path, server: SmtpServer
) -> None:
    server.on(stage, act, nth=1)
    with vendor(tmp_path, server) as app:
        publish(app, event("invoice.issued"))
        run(app)
        app.clock.ahead = 3_600_000_000  # type: ignore[attr-defined]
        run(app)
        assert len(server.accepted) == 1
        assert states(app) == {"accepted": 1}


@pytest.mark.parametrize(
    ("stage", "code", "status", "reason"),
    [
        ("rcpt", 550, ledger.Status.FAILED, "recipient_refused"),
        ("rcpt", 554, ledger.Status.FAILED, "policy_refused"),  # nothing against the address either
        ("dot", 554, ledger.Status.FAILED, "content_refused"),
        ("data", 554, ledger.Status.FAILED, "content_refused"),
        ("mail", 553, ledger.Status.HELD, "sender_refused"),  # our configuration: nothing against the address
    ],
)
def test_a_refusal_for_good_is_final_and_says_what_it_is_about(
    stage: str, code: int, status: ledger.Status, reason: str, tmp_path: Path, server: SmtpServer
) -> None:
    server.on(stage, reply(code, "no"))
    with vendor(tmp_path, server) as app:
        publish(app, event("file.failed"))
        run(app)
        assert rows(app, deliveries.c.status, deliveries.c.reason) == [(status, reason)]
        assert rows(app, events.c.status) == [("done",)]


def test_mail_that_is_refused_for_days_is_given_up(tmp_path: Path, server: SmtpServer) -> None:
    server.on("rcpt", reply(451, "greylisted"))
    with vendor(tmp_path, server) as app:
        publish(app, event("file.failed"))
        run(app)
        app.clock.ahead = 5 * DAY  # type: ignore[attr-defined]
        run(app)
        assert rows(app, deliveries.c.status, deliveries.c.reason) == [(ledger.Status.FAILED, "given_up")]


def test_one_refused_recipient_costs_the_others_nothing(tmp_path: Path, server: SmtpServer) -> None:
    server.on("rcpt", reply(550, "unknown user"), recipient="ben@acme.example")
    with vendor(tmp_path, server) as app:
        publish(app, event("service.notice", account="acme"))
        run(app)
        assert [mail.recipient for mail in server.accepted] == ["ada@acme.example"]
        assert states(app) == {"accepted": 1, "failed": 1}


def test_without_a_relay_mail_is_planned_and_waits(tmp_path: Path, server: SmtpServer) -> None:
    with house(tmp_path, ACME, clock=Clock()) as app:
        publish(app, event("invoice.issued"), event("service.notice", id="n", accounts="all"))
        run(app)
        assert states(app, 1) == {"planned": 1}
        assert states(app, 2) == {"planned": 2}
    with vendor(tmp_path, server) as app:
        run(app)
        assert len(server.accepted) == 3


def test_a_relay_that_is_down_costs_no_attempts_and_mail_goes_when_it_is_back(tmp_path: Path) -> None:
    with SmtpServer() as gone:
        port = gone.port
    down = SmtpServer(port=port)
    with vendor(tmp_path, down) as app:
        publish(app, event("file.failed"))
        with working(app) as engine:
            time.sleep(1.0)
            assert rows(app, deliveries.c.attempts) == [(0,)]
            with down:
                for _ in range(100):
                    app.clock.ahead += 10_000_000  # type: ignore[attr-defined]
                    engine.wake()
                    time.sleep(0.1)
                    if down.accepted:
                        break
                assert engine.until_idle(seconds=20)
                assert len(down.accepted) == 1
        assert rows(app, deliveries.c.attempts, deliveries.c.status) == [(1, ledger.Status.ACCEPTED)]


def test_an_opt_out_after_the_planning_stops_the_mail(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("service.notice", account="acme"))
        with app.database.write() as connection:
            change = SetOptOut(("acme", "ben"), None, "service_communication", opted_out=True, set_by="operator")
            apply(connection, Actor("cli:test", "cli"), [change], catalogues=app.catalogues, now=app.clock())
        run(app)
        assert [mail.recipient for mail in server.accepted] == ["ada@acme.example"]
        assert states(app) == {"accepted": 1, "cancelled": 1}
        assert ("opted_out",) in rows(app, deliveries.c.reason)


def test_mail_that_may_not_leave_is_withdrawn_though_the_relay_is_down(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server, relay_urls="smtp://127.0.0.1:1?tls=none") as app:
        publish(app, event("file.failed"))
        with app.database.write() as connection:
            change = Suppress("di@acme.example", "hard_bounce", "operator:test", "said so")
            apply(connection, Actor("cli:test", "cli"), [change], catalogues=app.catalogues, now=app.clock())
        run(app)
        assert states(app) == {"cancelled": 1}


@pytest.mark.parametrize("type_name", ["file.failed", "invoice.issued"])
def test_an_account_that_was_paused_before_the_event_gets_nothing(
    tmp_path: Path, server: SmtpServer, type_name: str
) -> None:
    with vendor(tmp_path, server) as app:
        with app.database.write() as connection:
            connection.execute(pauses.insert().values(scope="account", value="acme", by="test", at=1))
        publish(app, event(type_name))
        run(app)
        assert server.accepted == []
        assert rows(app, deliveries.c.status, deliveries.c.reason) == [(ledger.Status.PLANNED, "paused")]


def test_a_suppression_after_the_planning_stops_the_mail(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("file.failed"))
        with app.database.write() as connection:
            apply(
                connection,
                Actor("cli:test", "cli"),
                [Suppress("di@acme.example", "hard_bounce", "operator:test", "said so")],
                catalogues=app.catalogues,
                now=app.clock(),
            )
        run(app)
        assert server.accepted == []
        assert rows(app, deliveries.c.status, deliveries.c.reason) == [(ledger.Status.CANCELLED, "address_suppressed")]


def test_a_contact_that_was_removed_or_moved_after_the_planning_gets_nothing(
    tmp_path: Path, server: SmtpServer
) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("service.notice", account="acme"))
        ada, _, *rest = ACME["contacts"]
        import_accounts(app, [ACME | {"contacts": [ada | {"email": "ada@elsewhere.example"}, *rest]}])
        run(app)
        assert server.accepted == []
        assert states(app) == {"cancelled": 2}


def test_a_cancelled_event_sends_nothing_more(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("service.notice", account="acme"))
        with app.database.write() as connection:
            assert decisions.cancel(connection, 1, by="cli:test", now=app.clock()) == 2
        run(app)
        assert server.accepted == []
        assert states(app) == {"cancelled": 2}


def test_an_event_whose_time_is_over_expires_unsent(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(app.clock() / 1e6 + 3600))
        publish(app, event("service.notice", account="acme", expires_at=soon))
        app.clock.ahead = 2 * 3_600_000_000  # type: ignore[attr-defined]
        run(app)
        assert server.accepted == []
        assert states(app) == {"expired": 2}


@pytest.mark.parametrize(
    ("scope", "value"), [("all", ""), ("class", "informational"), ("account", "acme"), ("event", None)]
)
def test_what_is_paused_waits_and_goes_on_when_resumed(
    scope: str, value: str | None, tmp_path: Path, server: SmtpServer
) -> None:
    with vendor(tmp_path, server) as app:
        ulid = publish(app, event("service.notice", account="acme"))[0].event
        with app.database.write() as connection:
            connection.execute(
                pauses.insert().values(scope=scope, value=ulid if value is None else value, by="test", at=1)
            )
            ledger.raise_guard(connection)
        with working(app) as engine:
            assert engine.until_idle(seconds=20)
            assert server.accepted == []
            with app.database.write() as connection:
                connection.execute(pauses.delete())
                ledger.raise_guard(connection)
                feeding.wake_waiting(connection, reasons=["paused"], now=app.clock())
            engine.wake()
            assert engine.until_idle(seconds=20)
        assert len(server.accepted) == 2


def test_a_mail_that_may_be_opted_out_of_waits_while_its_link_could_not_work(
    tmp_path: Path, server: SmtpServer
) -> None:
    """Others go without the preference link. With http off loopback no link in a mail can be trusted."""
    with vendor(tmp_path, server, public_url="http://notify.vendor.example") as app:
        publish(app, event("service.notice", account="acme"), event("file.failed", id="f"))
        run(app)
        assert [mail.recipient for mail in server.accepted] == ["di@acme.example"]
        assert b"/preferences/" not in server.accepted[0].body
        assert states(app, 1) == {"planned": 2}
    with vendor(tmp_path, server) as app:
        run(app)
        assert states(app, 1) == {"accepted": 2}


def test_a_template_that_cannot_be_rendered_holds_its_own_mails_alone(tmp_path: Path, server: SmtpServer) -> None:
    own = tmp_path / "own" / "file.failed"
    own.mkdir(parents=True)
    (own / "body.txt").write_text("{{ data.no_such_thing }}")
    with vendor(tmp_path, server, templates_dir=str(tmp_path / "own")) as app:
        publish(app, event("file.failed"), event("invoice.issued", id="i"))
        run(app)
        assert [mail.recipient for mail in server.accepted] == ["cy@acme.example"]
        assert rows(app, deliveries.c.status, deliveries.c.reason) == [
            (ledger.Status.HELD, "cannot_be_rendered"),
            (ledger.Status.ACCEPTED, None),
        ]


def test_a_worker_that_vanished_in_flight_is_survived(tmp_path: Path, server: SmtpServer) -> None:
    """What its open flight named is sent again, or held where it is money; everything else was never attempted."""
    with vendor(tmp_path, server) as app:
        publish(app, event("service.notice", account="acme"), event("invoice.issued", id="i"))
        with app.database.write() as connection:
            dead = leases.register(connection, host="gone", pid=1, lanes=[ledger.Lane.BULK], now=1)
            for slice_id in (1, 2):
                taken = ledger.claim(connection, slice_id, dead, now=app.clock())
                assert taken is not None
                flight, _ = ledger.begin(connection, taken, dead, [1], now=app.clock())
                assert flight
        run(app)
        assert sorted(mail.recipient for mail in server.accepted) == ["ada@acme.example", "ben@acme.example"]
        assert (states(app, 1), states(app, 2)) == ({"accepted": 2}, {"held": 1})
        assert rows(app, flights) == []
        assert all(row.done_at for row in rows(app, slices))


def test_two_processes_cannot_work_on_one_database_with_the_queue_in_memory(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app, working(app), pytest.raises(AnotherWorks, match="works on this database"):
        Engine(app).start()


def test_urgent_mail_overtakes_a_broadcast(tmp_path: Path, server: SmtpServer) -> None:
    crowd = {
        "id": "crowd",
        "catalogue": "billtrust",
        "contacts": [
            {"id": f"p{n}", "email": f"p{n}@crowd.example", "roles": ["secondary_support"]} for n in range(1500)
        ],
    }
    with vendor(tmp_path, server, ACME, crowd) as app:
        publish(app, event("service.notice", accounts="all"))
        with working(app) as engine:
            while len(server.accepted) < 200:
                time.sleep(0.02)
            publish(app, event("file.failed", id="f"))
            before = len(server.accepted)
            while not any(mail.recipient == "di@acme.example" for mail in list(server.accepted)):
                time.sleep(0.01)
            assert len(server.accepted) - before < 700, "it did not wait for the end of the broadcast"
            assert engine.until_idle(seconds=60)
        assert len(server.accepted) == 1503
        assert len({mail.recipient for mail in server.accepted}) == 1503


def test_a_relay_that_cannot_be_reached_leaves_no_flight_open(tmp_path: Path) -> None:
    with SmtpServer() as gone:
        port = gone.port
    with vendor(tmp_path, SmtpServer(port=port)) as app:
        publish(app, event("service.notice", account="acme"))
        with working(app) as engine:
            assert engine.until_idle(seconds=20)
        assert rows(app, flights) == []
        assert rows(app, deliveries.c.attempts) == [(0,), (0,)]
        assert rows(app, slices.c.owner, slices.c.done_at) == [(None, None)]


def test_a_mail_speaks_only_of_the_grounds_that_still_stand(tmp_path: Path, server: SmtpServer) -> None:
    """Pat moved away from account one after the planning, and opted out in account two: three is left."""

    def account(name: str, address: str = "pat@people.example") -> dict[str, Any]:
        person = {"id": "pat", "name": f"Pat {name}", "email": address, "roles": ["executive"]}
        return {"id": name, "name": name.title(), "catalogue": "billtrust", "contacts": [person]}

    with vendor(tmp_path, server, account("one"), account("two"), account("three")) as app:
        publish(app, event("corporate.published", accounts="all"))
        with working(app) as engine:
            with app.database.write() as connection:
                connection.execute(pauses.insert().values(scope="all", value="", by="test", at=1))
                ledger.raise_guard(connection)
            assert engine.until_idle(seconds=20)
        import_accounts(app, [account("one", "elsewhere@people.example")])
        with app.database.write() as connection:
            change = SetOptOut(("two", "pat"), None, "corporate_communication", opted_out=True, set_by="operator")
            apply(connection, Actor("cli:test", "cli"), [change], catalogues=app.catalogues, now=app.clock())
            connection.execute(pauses.delete())
            feeding.wake_waiting(connection, reasons=["paused"], now=app.clock())
        run(app)
        assert [mail.recipient for mail in server.accepted] == ["pat@people.example"]
        message = read(server.accepted[0].body)
        assert message["To"] == "Pat three <pat@people.example>"
        assert message.get_all("X-Rolecast-Reason") == [
            "account=three; category=corporate_communication; role=executive"
        ]


@pytest.mark.parametrize("type_name", ["invoice.issued", "file.failed"])
def test_an_outcome_that_cannot_be_recorded_at_once_is_kept_and_costs_no_second_copy(
    type_name: str, tmp_path: Path, server: SmtpServer
) -> None:
    """The database refuses to record the acceptance for a while, as a full disk does after the relay's yes."""
    with vendor(tmp_path, server) as app:
        publish(app, event(type_name))
        with app.database.write() as connection:
            connection.execute(
                text(
                    "CREATE TRIGGER full BEFORE UPDATE ON deliveries WHEN NEW.status = 1"
                    " BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
                )
            )
        with working(app) as engine:
            while not server.accepted:
                time.sleep(0.02)
            time.sleep(1.5)
            assert states(app) == {"planned": 1}
            with app.database.write() as connection:
                connection.execute(text("DROP TRIGGER full"))
            assert engine.until_idle(seconds=20)
        assert states(app) == {"accepted": 1}
        assert len(server.accepted) == 1
        assert rows(app, flights) == []


# ---------------------------------------------------------------- retries, limits, domains that refuse


MINUTE = 60_000_000


def crowd(*addresses: str) -> dict[str, Any]:
    """An account of which everybody gets a service notice."""
    people = [{"id": f"p{n}", "email": one, "roles": ["secondary_support"]} for n, one in enumerate(addresses)]
    return {"id": "crowd", "catalogue": "billtrust", "contacts": people}


def later(app: App, microseconds: int) -> None:
    app.clock.ahead += microseconds  # type: ignore[attr-defined]


def test_a_session_that_the_relay_ended_costs_the_mail_no_attempt(tmp_path: Path, server: SmtpServer) -> None:
    server.on("rcpt", reply(421, "4.3.2 too many connections"), nth=1)
    with vendor(tmp_path, server) as app:
        publish(app, event("file.failed"))
        run(app)
        row = rows(app, deliveries.c.attempts, deliveries.c.reason, deliveries.c.due_at, deliveries.c.reply)[0]
        assert (row.attempts, row.reason) == (0, "refused_for_now")
        assert row.reply.startswith("421 ")
        assert 0 < row.due_at - app.clock() <= 72_000_000
        later(app, 2 * MINUTE)
        run(app)
        assert rows(app, deliveries.c.attempts, deliveries.c.status) == [(1, ledger.Status.ACCEPTED)]


def test_a_class_is_tried_again_by_its_own_schedule(tmp_path: Path, server: SmtpServer) -> None:
    server.on("rcpt", reply(450, "4.2.0 later"))
    with vendor(tmp_path, server, retry_minutes_operational="100") as app:
        publish(app, event("file.failed"), event("invoice.issued", id="i"))
        run(app)
        failure, invoice = (row.due_at - app.clock() for row in rows(app, deliveries.c.due_at))
        assert 70 * MINUTE < failure < 130 * MINUTE
        assert invoice < 2 * MINUTE


def test_a_mail_that_would_expire_before_its_next_try_has_expired(tmp_path: Path, server: SmtpServer) -> None:
    server.on("rcpt", reply(450, "4.2.0 later"))
    with vendor(tmp_path, server) as app:
        soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(app.clock() / 1e6 + 50))
        publish(app, event("service.notice", account="acme", expires_at=soon))
        run(app)
        row = rows(app, deliveries.c.status, deliveries.c.reason, deliveries.c.attempts, deliveries.c.reply)[0]
        assert (row.status, row.reason, row.attempts) == (ledger.Status.EXPIRED, "expired", 1)
        assert rows(app, events.c.status) == [("done",)]


def test_a_refused_sender_pauses_its_class_instead_of_holding_every_mail(tmp_path: Path, server: SmtpServer) -> None:
    server.on("mail", reply(553, "5.1.8 not your sender"))
    everybody = crowd(*(f"p{n}@crowd.example" for n in range(400)))
    with vendor(tmp_path, server, everybody) as app:
        publish(app, event("service.notice", account="crowd"))
        run(app)
        held = states(app)["held"]
        assert 3 <= held <= 3 + 4, "three in a row, and what was being said on the other connections"
        assert states(app) == {"held": held, "planned": 400 - held}
        assert rows(app, pauses.c.scope, pauses.c.value, pauses.c.by) == [
            ("class", "informational", "rolecast: the relay refused the sender")
        ]
        server._rules.clear()
        with app.database.write() as connection:
            connection.execute(pauses.delete())
            ledger.raise_guard(connection)
            feeding.wake_waiting(connection, reasons=["paused"], now=app.clock())
        run(app)
        assert states(app) == {"held": held, "accepted": 400 - held}


def when_asked_for_the_mail(do: Callable[[], None]) -> Act:
    """Something happens while the relay is about to say 354: after the mail was checked, before its last bytes."""

    def act(talk: Any, code: int, text: str) -> int:
        do()
        return int(talk.say(code, text))

    return act


def cancelled(app: App, connection: Connection) -> None:
    decisions.cancel(connection, 1, by="cli:test", now=app.clock())


def suppressed(app: App, connection: Connection) -> None:
    change = Suppress("cy@acme.example", "hard_bounce", "operator:test", "said so")
    apply(connection, Actor("cli:test", "cli"), [change], catalogues=app.catalogues, now=app.clock())


def someone_else_suppressed(app: App, connection: Connection) -> None:
    change = Suppress("ada@acme.example", "hard_bounce", "operator:test", "said so")
    apply(connection, Actor("cli:test", "cli"), [change], catalogues=app.catalogues, now=app.clock())


def paused(_app: App, connection: Connection) -> None:
    connection.execute(pauses.insert().values(scope="all", value="", by="test", at=1))
    ledger.raise_guard(connection)


@pytest.mark.parametrize(
    ("happens", "status", "reason"),
    [
        (cancelled, ledger.Status.CANCELLED, "event_cancelled"),
        (suppressed, ledger.Status.CANCELLED, "address_suppressed"),
        (paused, ledger.Status.PLANNED, "paused"),
        (someone_else_suppressed, ledger.Status.ACCEPTED, None),
    ],
)
def test_what_happens_before_the_last_bytes_of_money_mail_still_counts(
    happens: Callable[[App, Connection], None], status: ledger.Status, reason: str | None,
    tmp_path: Path, server: SmtpServer,
) -> None:  # fmt: skip
    with vendor(tmp_path, server) as app:

        def do() -> None:
            with app.database.write() as connection:
                happens(app, connection)

        server.on("data", when_asked_for_the_mail(do), nth=1)
        publish(app, event("invoice.issued"))
        run(app)
        assert rows(app, deliveries.c.status, deliveries.c.reason) == [(status, reason)]
        assert len(server.accepted) == (status is ledger.Status.ACCEPTED)
        assert rows(app, flights) == []
        if reason == "paused":
            with app.database.write() as connection:
                connection.execute(pauses.delete())
                ledger.raise_guard(connection)
                feeding.wake_waiting(connection, reasons=["paused"], now=app.clock())
            run(app)
            assert len(server.accepted) == 1


def test_who_lost_the_claim_before_the_last_bytes_of_money_mail_does_not_send_it(
    tmp_path: Path, server: SmtpServer
) -> None:
    with vendor(tmp_path, server, lease_seconds="3") as app:

        def lose() -> None:
            with app.database.write() as connection:
                connection.execute(update(slices).values(owner=999, epoch=slices.c.epoch + 1))

        server.on("data", when_asked_for_the_mail(lose), nth=1)
        publish(app, event("invoice.issued"))
        run(app)
        assert len(server.accepted) == 1, "by whoever frees what the lost worker left, and nobody else"
        assert rows(app, deliveries.c.status, deliveries.c.attempts) == [(ledger.Status.ACCEPTED, 1)]


@pytest.mark.parametrize("words", ["4.7.1 Greylisted, come back later", "4.7.1 try again later"])
def test_greylisted_mail_is_through_at_its_first_try_after_five_minutes(
    words: str, tmp_path: Path, server: SmtpServer
) -> None:
    """Everybody at one domain, each pair of sender and recipient greylisted by itself."""
    addresses = [f"p{n}@grey.example" for n in range(12)]
    tries: dict[tuple[str, str], list[int]] = {}
    with vendor(tmp_path, server, crowd(*addresses)) as app:
        for address in addresses:

            def act(talk: Any, code: int, text: str, address: str = address) -> int:
                seen = tries.setdefault((talk.mail[0], address), [])
                seen.append(app.clock())
                young = seen[-1] - seen[0] < 5 * MINUTE
                return int(talk.say(451, words) if young else talk.say(code, text))

            server.on("rcpt", act, recipient=address)
        publish(app, event("service.notice", account="crowd"))
        minutes = 0.0
        with working(app) as engine:
            assert engine.until_idle(seconds=20)
            while states(app) != {"accepted": 12}:
                minutes += 0.5
                assert minutes < 60
                later(app, MINUTE // 2)
                engine.wake()
                assert engine.until_idle(seconds=20)
        if "Grey" in words:
            assert minutes < 9, "nobody waited for another's greylisting"
    assert len(tries) == 12, "the envelope sender is the same on every attempt"
    for times in tries.values():
        assert all(at - times[0] < 5 * MINUTE for at in times[:-1]), "it was through the first time it could be"
    ids = Counter(read(mail.body)["Message-ID"] for mail in server.accepted)
    assert set(ids.values()) == {1}


def test_a_dead_domain_is_hardly_tried_and_the_others_do_not_notice(tmp_path: Path, server: SmtpServer) -> None:
    dead = {f"p{n}@dead.example" for n in range(0, 2000, 40)}
    lively = [f"p{n}@d{n % 49}.example" for n in range(2000) if n % 40]
    for address in dead:
        server.on("rcpt", reply(451, "4.4.1 no route to host"), recipient=address)

    def tried() -> int:
        with server.lock:
            return sum(command.startswith("RCPT") and "@dead.example" in command for command in server.commands)

    everybody = [f"p{n}@d{n % 49}.example" if n % 40 else f"p{n}@dead.example" for n in range(2000)]
    with vendor(tmp_path, server, crowd(*everybody)) as app:
        publish(app, event("service.notice", account="crowd"))
        run(app)
        assert sorted(mail.recipient for mail in server.accepted) == sorted(lively)
        assert tried() <= 3 + 4, "three in a row, and what was under way on the other connections"
        reasons = Counter(row.reason for row in rows(app, deliveries.c.reason, deliveries.c.status) if row.status == 0)
        assert set(reasons) == {"refused_for_now", "domain_waits"}
        assert sum(reasons.values()) == 50
        before, windows = tried(), 0
        with working(app) as engine:
            for _ in range(30):  # an hour
                later(app, 2 * MINUTE)
                engine.wake()
                assert engine.until_idle(seconds=20)
        windows = rows(app, domains.c.failures)[0][0] - 3
        assert 4 <= windows <= 6
        assert tried() - before == windows, "one mail a window"
        server._rules.clear()
        with working(app) as engine:
            for _ in range(90):
                later(app, 2 * MINUTE)
                engine.wake()
                assert engine.until_idle(seconds=20)
                if states(app) == {"accepted": 2000}:
                    break
        assert states(app) == {"accepted": 2000}
        assert rows(app, domains) == []


def test_a_days_quota_holds_over_a_restart_and_costs_no_attempts(tmp_path: Path, server: SmtpServer) -> None:
    url = f"smtp://127.0.0.1:{server.port}?tls=none&connections=4&daily=2"
    everybody = crowd(*(f"p{n}@crowd.example" for n in range(5)))
    with vendor(tmp_path, server, everybody, relay_urls=url) as app:
        publish(app, event("service.notice", account="crowd"))
        for _ in range(2):
            run(app)
            assert states(app) == {"accepted": 2, "planned": 3}
        waiting = [row for row in rows(app, deliveries.c.attempts, deliveries.c.status) if row.status == 0]
        assert [row.attempts for row in waiting] == [0, 0, 0]
        assert rows(app, flights) == []
        for sent in (4, 5):
            later(app, DAY)
            run(app)
            assert len(server.accepted) == sent
        assert sorted(row.mails for row in rows(app, relay_days.c.mails)) == [1, 2, 2]


def test_what_one_relays_day_has_no_room_for_goes_by_the_next(tmp_path: Path, server: SmtpServer) -> None:
    with SmtpServer() as second:
        urls = [f"smtp://127.0.0.1:{one.port}?tls=none&connections=4" for one in (server, second)]
        everybody = crowd(*(f"p{n}@crowd.example" for n in range(100)))
        with vendor(tmp_path, server, everybody, relay_urls=f"{urls[0]}&daily=40 {urls[1]}") as app:
            publish(app, event("service.notice", account="crowd"))
            run(app)
            assert (len(server.accepted), len(second.accepted)) == (40, 60)


def test_a_relays_rate_is_kept_in_the_ledger(tmp_path: Path, server: SmtpServer) -> None:
    url = f"smtp://127.0.0.1:{server.port}?tls=none&connections=4&rate=40"
    everybody = crowd(*(f"p{n}@crowd.example" for n in range(30)))
    with vendor(tmp_path, server, everybody, relay_urls=url) as app:
        began = app.clock()
        publish(app, event("service.notice", account="crowd"), event("file.failed", id="f", account="crowd"))
        run(app)
        assert states(app) == {"accepted": 30}
        [(name, ready_at)] = rows(app, paces.c.name, paces.c.ready_at)
        assert name == f"relay 127.0.0.1:{server.port}"
        assert ready_at >= began + 30 * 1_000_000 // 40
        assert app.clock() >= began + 29 * 1_000_000 // 40 - 250_000, "the last flight began in its slot"


def test_mails_to_a_limited_domain_wait_for_their_slots_and_pay_once(tmp_path: Path, server: SmtpServer) -> None:
    everybody = crowd("a@slow.example", "b@slow.example", "c@quick.example", "d@slow.example")
    with vendor(tmp_path, server, everybody, domain_rates="Slow.example=0.1") as app:
        publish(app, event("service.notice", account="crowd"))
        run(app)
        assert sorted(mail.recipient for mail in server.accepted) == ["a@slow.example", "c@quick.example"]
        waiting = [row for row in rows(app, deliveries.c.reason, deliveries.c.attempts, deliveries.c.status)
                   if row.status == 0]  # fmt: skip
        assert [(row.reason, row.attempts) for row in waiting] == [("domain_rate", 0)] * 2
        for sent in (3, 4):
            later(app, 10_000_000)
            run(app)
            assert len(server.accepted) == sent
        assert states(app) == {"accepted": 4}


def test_a_relay_that_is_down_does_not_spend_its_day(tmp_path: Path) -> None:
    with SmtpServer() as gone:
        port = gone.port
    down = SmtpServer(port=port)
    url = f"smtp://127.0.0.1:{port}?tls=none&connections=4&daily=10"
    with vendor(tmp_path, down, crowd(*(f"p{n}@crowd.example" for n in range(10))), relay_urls=url) as app:
        publish(app, event("service.notice", account="crowd"))
        with working(app) as engine:
            for _ in range(3):
                assert engine.until_idle(seconds=20)
                later(app, 10_000_000)
                engine.wake()
                time.sleep(0.3)
        assert rows(app, relay_days.c.mails) == [(0,)]
        with down:
            later(app, MINUTE)
            run(app)
            assert states(app) == {"accepted": 10}


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """None stands for SQLite in the test's folder."""
    if request.param == "sqlite":
        yield None
        return
    server = request.getfixturevalue("postgresql_server")
    name = f"delivery_{abs(hash(request.node.nodeid)):x}"
    _statement(server, f"CREATE DATABASE {name}")
    database = Database(_named(server, name))
    migrate.upgrade(database, clock=system_clock)
    database.close()
    yield _named(server, name)
    _statement(server, f"DROP DATABASE {name} WITH (FORCE)")


def test_a_cancel_under_way_is_waited_for_before_the_last_bytes_of_money_mail(
    tmp_path: Path, server: SmtpServer, database_url: str | None
) -> None:
    """It is not committed yet when the relay asks for the mail: the mail may not slip by it."""
    with house(
        tmp_path, ACME, clock=system_clock, database_url=database_url,
        relay_urls=f"smtp://127.0.0.1:{server.port}?tls=none&connections=4", secret_keys="a-key-of-some-length",
    ) as app:  # fmt: skip
        holds, threads = threading.Event(), []

        def cancel() -> None:
            with app.database.write() as connection:
                cancelled(app, connection)
                holds.set()
                time.sleep(0.5)

        def do() -> None:
            threads.append(threading.Thread(target=cancel))
            threads[0].start()
            holds.wait()

        server.on("data", when_asked_for_the_mail(do), nth=1)
        publish(app, event("invoice.issued"))
        run(app)
        threads[0].join()
        assert server.accepted == []
        assert rows(app, deliveries.c.status, deliveries.c.reason) == [(ledger.Status.CANCELLED, "event_cancelled")]


def test_every_limit_at_once_loses_nothing_and_doubles_nothing(
    tmp_path: Path, server: SmtpServer, database_url: str | None
) -> None:
    addresses = [f"p{n}@{'slow' if n % 10 == 0 else 'dead' if n % 10 == 1 else 'd'}.example" for n in range(200)]
    for address in addresses:
        if "dead" in address:
            server.on("rcpt", reply(450, "4.4.1 no route"), recipient=address)
    with SmtpServer() as second:
        first, other = (f"smtp://127.0.0.1:{one.port}?tls=none&connections=4" for one in (server, second))
        with house(
            tmp_path, crowd(*addresses), clock=system_clock, database_url=database_url,
            relay_urls=f"{first}&rate=500&daily=100 {other}&daily=1000&warmup=3",
            domain_rates="slow.example=20", secret_keys="a-key-of-some-length",
            public_url="https://notify.vendor.example",
        ) as app:  # fmt: skip
            publish(app, event("service.notice", account="crowd"))
            ends = time.monotonic() + 60
            with working(app):
                while len(server.accepted) + len(second.accepted) < 180 and time.monotonic() < ends:
                    time.sleep(0.05)
            taken = [mail.recipient for mail in [*server.accepted, *second.accepted]]
            tried = {row.relay: row.mails for row in rows(app, relay_days.c.relay, relay_days.c.mails)}
        assert sorted(taken) == sorted(set(addresses) - {one for one in addresses if "dead" in one})
        assert tried[f"127.0.0.1:{server.port}"] == 100
