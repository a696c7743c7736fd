"""From an accepted event to mail at the relay and into the ledger: the whole path, with a relay that obeys a script."""

from __future__ import annotations

import email
import email.policy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text

from subscriptions.changes import Actor, SetOptOut, Suppress, apply
from subscriptions.database import system_clock
from tests.house import ACME, DAY, GLOBEX, event, house, import_accounts, publish
from tests.smtpd import SmtpServer, close, lose_the_reply, reply, reset
from worker import feeding, leases, ledger
from worker.app import AnotherWorks, App, Engine
from worker.links import read_bounce
from worker.schema import deliveries, events, flights, pauses, slices


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

            assert read_bounce(address_key(connection), local.upper()) == (1, 1)


def test_a_promotional_mail_carries_one_click_unsubscribe(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("webinar.scheduled", account="acme"))
        run(app)
        message = read(server.accepted[0].body)
        assert message["List-Unsubscribe"].startswith("<https://notify.vendor.example/unsubscribe/")
        assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"


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
            assert ledger.cancel(connection, 1, owner=0, now=app.clock()) == 2
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
            dead = leases.register(connection, host="gone", pid=1, lanes="bulk", now=1)
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
