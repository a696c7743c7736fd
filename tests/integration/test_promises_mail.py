"""What recipients and operators are promised, through the front door (reliability.md R20, R25, R28, R33).

Events go in, a scripted relay and a scripted feed stand outside, and the ledger must agree with itself all the time.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from subscriptions.changes import Actor, Change, SetOptOut, apply
from subscriptions.schema import contacts
from tests import invariants
from tests.house import ACME, GLOBEX, event, import_accounts, publish
from tests.smtpd import SmtpServer, delay
from tests.test_delivery import rows, run, states, vendor, working
from tests.web_site import BASE, served
from worker import history, ledger
from worker.app import App
from worker.ledger import Status
from worker.schema import deliveries, feed_state

FLIGHT = 32
MINUTE = 60_000_000


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as running:
        yield running


@contextmanager
def watched(app: App) -> Iterator[None]:
    """R33: while work goes on the ledger agrees with itself, and no state moves backwards."""
    over = threading.Event()
    wrong: list[BaseException] = []

    def watch() -> None:
        before = invariants.standing(app.database)
        while not over.wait(0.1):
            try:
                invariants.check(app.database)
                after = invariants.standing(app.database)
                assert invariants.moved_backwards(before, after) == []
            except BaseException as error:  # told where the test can fail with it
                wrong.append(error)
                return
            before = after

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    assert not wrong, wrong
    invariants.check(app.database)


# ---------------------------------------------------------------- R20: poison events


POISON: tuple[tuple[str, str | bytes, bool], ...] = (  # part, content, whether it is poison for everybody
    ("body.txt", "{% if %}", True),
    ("body.txt", "{{ data.no_such_thing }}", True),
    ("body.txt", '{% if name == "Ben" %}{{ data.no_such_thing }}{% endif %}', False),
    ("body.html", "{{ 1 / 0 }}", True),
    ("body.html", '{% if name == "Ben" %}{{ 1 / 0 }}{% endif %}', False),
    ("body.txt", '{{ "\\ud800" }}', True),
    ("body.html", '<p>{% if name == "Ben" %}{{ "\\udfff" }}{% endif %}</p>', False),
    ("body.txt", b"\xff\xfe\x00", True),
    ("subject.txt", " ", True),
    ("subject.txt", '{% if name != "Ben" %}A word{% endif %}', False),
)
"""Template errors, missing fields, and what no mail can hold."""


@pytest.mark.parametrize(("part", "content", "for_all"), POISON)
def test_a_poison_event_is_held_where_it_hurts_and_hurts_nobody_else(
    tmp_path: Path, server: SmtpServer, part: str, content: str | bytes, for_all: bool
) -> None:
    """R20: its mails are held with the fault, tried by nobody again; an error for one recipient holds that one mail."""
    own = tmp_path / "own" / "service.notice"
    own.mkdir(parents=True)
    (own / part).write_bytes(content if isinstance(content, bytes) else content.encode())
    with vendor(tmp_path, server, templates_dir=str(tmp_path / "own")) as app, watched(app):
        publish(app, event("service.notice", account="acme"), event("invoice.issued", id="good"))
        run(app)
        app.clock.ahead = 24 * 60 * MINUTE
        run(app)
        poisoned = {"ada@acme.example", "ben@acme.example"} if for_all else {"ben@acme.example"}
        everybody = {"ada@acme.example", "ben@acme.example", "cy@acme.example"}
        assert sorted(mail.recipient for mail in server.accepted) == sorted(everybody - poisoned)
        assert Counter(states(app, 1)) == Counter({"held": len(poisoned), "accepted": 2 - len(poisoned)}) + Counter()
        with app.database.read() as connection:
            found = history.find_event(connection, "/test", "e1")
            assert found is not None
            shown = history.list_deliveries(connection, found, status="held")
        assert {(one["email"], one["reason"]) for one in shown} == {(one, "cannot_be_rendered") for one in poisoned}
        assert all(one["attempts"] <= 3 and one["reply"] for one in shown), "and each says what is wrong"


# ---------------------------------------------------------------- R25: changed while queued


def crowd(count: int) -> dict[str, Any]:
    return {
        "id": "crowd", "name": "Crowd", "catalogue": "billtrust",
        "contacts": [{"id": f"p{n}", "email": f"p{n}@crowd.example", "roles": ["executive"]} for n in range(count)],
    }  # fmt: skip


def recipients(app: App) -> dict[str, int]:
    """Address -> number of the delivery, of the first event."""
    query = select(contacts.c.email, deliveries.c.n).join(contacts, contacts.c.id == deliveries.c.contact_id)
    with app.database.read() as connection:
        return {
            row.email: row.n
            for row in connection.execute(query.where(deliveries.c.event_id == 1).order_by(deliveries.c.n))
        }


def preferences(app: App, names: list[str]) -> None:
    changes: list[Change] = [
        SetOptOut(("crowd", name), None, "webinar_invite", opted_out=True, set_by="recipient") for name in names
    ]
    with app.database.write() as connection:
        apply(connection, Actor("recipient:1", "preferences"), changes, catalogues=app.catalogues, now=app.clock())


def removal(app: App, names: list[str]) -> None:
    whole = crowd(300)
    stay = [one for one in whole["contacts"] if one["id"] not in names]
    import_accounts(app, [whole | {"contacts": stay}])


@pytest.mark.parametrize("change", [preferences, removal])
def test_whoever_opts_out_or_leaves_while_mail_is_queued_gets_none_but_what_was_in_flight(
    tmp_path: Path, server: SmtpServer, change: Callable[[App, list[str]], None]
) -> None:
    """R25: after the commit at most one flight a connection still goes to those who left, and to the others all."""
    server.on("dot", delay(0.01))
    count = 300
    with vendor(tmp_path, server, crowd(count), relay_urls=relay_of(server, connections=3)) as app:
        with watched(app), working(app) as engine:
            publish(app, event("webinar.scheduled", accounts="all"))
            while len(server.accepted) < 20:
                time.sleep(0.005)
            had = {mail.recipient for mail in server.accepted}
            gone = [f"p{n}" for n in range(count) if n % 3 and f"p{n}@crowd.example" not in had]
            change(app, gone)
            sent_before = {mail.recipient for mail in server.accepted}
            assert engine.until_idle(seconds=60)
        late = [m.recipient for m in server.accepted if m.recipient.partition("@")[0] in gone]
        after = [one for one in late if one not in sent_before]
        assert len(gone) > 150
        assert len(after) <= FLIGHT * server.most_at_once
        assert len(late) < len(gone)
        assert len(server.accepted) == len({mail.recipient for mail in server.accepted})
        assert {f"p{n}@crowd.example" for n in range(count) if f"p{n}" not in gone} <= {
            mail.recipient for mail in server.accepted
        }
        assert states(app) == {"accepted": len(server.accepted), "cancelled": count - len(server.accepted)}
        assert invariants.unaccounted(app.database, server.accepted) == []


def test_one_click_while_the_mail_is_queued_stops_it(tmp_path: Path, server: SmtpServer) -> None:
    """R25 by the link of the mail itself, for the last in the line: none of them gets it."""
    server.on("dot", delay(0.01))
    with vendor(tmp_path, server, crowd(120), public_url=BASE, relay_urls=relay_of(server, connections=1)) as app:
        with watched(app), working(app) as engine, served(app) as web:
            publish(app, event("webinar.scheduled", accounts="all"))
            while len(server.accepted) < 5:
                time.sleep(0.005)
            for _, n in list(recipients(app).items())[110:]:
                path = web.one_click_path(1, n)
                assert web.client.post(path, data={"List-Unsubscribe": "One-Click"}).status_code == 200
            assert engine.until_idle(seconds=60)
        assert [mail.recipient for mail in server.accepted] == list(recipients(app))[:110]
        assert states(app) == {"accepted": 110, "cancelled": 10}


def relay_of(server: SmtpServer, *, connections: int) -> str:
    return f"smtp://127.0.0.1:{server.port}?tls=none&connections={connections}"


# ---------------------------------------------------------------- R28: the status page's feed fails


class Feed(http.server.ThreadingHTTPServer):
    """A feed that answers as a test says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.body: bytes | None = b""
        self.status = 200
        self.asked = threading.Event()
        self.released = threading.Event()
        self.hangs = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/feed"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Feed

    def do_GET(self) -> None:
        feed = self.server
        feed.asked.set()
        if feed.hangs:
            feed.released.wait(30)
        with suppress(OSError):
            self.send_response(feed.status)
            self.send_header("Connection", "close")
            self.end_headers()
            if feed.body is None:  # 50 MB without saying how long it is
                for _ in range(50):
                    self.wfile.write(b"x" * 2**20)
            else:
                self.wfile.write(feed.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def feed() -> Iterator[Feed]:
    with Feed() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def fed(tmp_path: Path, server: SmtpServer, feed: Feed) -> Iterator[App]:
    settings = {"status_page_feed_url": feed.url, "status_page_feed_allow": "private"}
    with vendor(tmp_path, server, ACME, GLOBEX, **settings) as app:
        yield app


def entries(*incidents: tuple[str, str, str]) -> bytes:
    """An Atom feed of incidents: (title, status, RFC 3339 time)."""
    inner = "".join(
        f"<entry><id>tag:status.vendor.example,2005:Incident/{n}</id><title>{title}</title>"
        f"<published>2026-11-21T10:00:00Z</published><updated>{at}</updated>"
        f'<link rel="alternate" href="https://status.vendor.example/incidents/k{n}"/>'
        f"<content type='html'>&lt;strong&gt;{status}&lt;/strong&gt; - as it stands</content></entry>"
        for n, (title, status, at) in enumerate(incidents)
    )
    return f'<feed xmlns="http://www.w3.org/2005/Atom"><title>Vendor Status</title>{inner}</feed>'.encode()


FAULTS: dict[str, tuple[int, bytes | None]] = {
    "500": (500, b"oops"),
    "an HTML challenge": (200, b"<!DOCTYPE html><html>Just a moment</html>"),
    "empty": (200, b""),
    "50 MB": (200, None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_feed_that_fails_costs_the_answer_its_incident_and_nothing_else(
    fed: App, server: SmtpServer, feed: Feed, fault: str
) -> None:
    """R28: the outage is answered with the page, at once; no mail of it; other mail goes."""
    feed.status, feed.body = FAULTS[fault]
    with working(fed) as engine:
        assert feed.asked.wait(20)
        while not rows(fed, feed_state.c.body):
            time.sleep(0.01)
        outage, invoice = publish(fed, event("outage.started", accounts="all"), event("invoice.issued", id="i"))
        assert (outage.route, outage.status_page) == (
            "status_page", {"url": "https://status.vendor.example", "incident": None}
        )  # fmt: skip
        assert engine.until_idle(seconds=20)
    assert json.loads(rows(fed, feed_state.c.body)[0][0])["error"]
    assert [mail.recipient for mail in server.accepted] == ["cy@acme.example"]
    assert invoice.route == "email"
    invariants.check(fed.database)


def test_while_the_feed_hangs_outages_are_answered_and_other_mail_goes(
    fed: App, server: SmtpServer, feed: Feed
) -> None:
    """R28: nobody waits for a feed: all of this happens before it says its first byte."""
    feed.hangs = True
    with working(fed) as engine:
        assert feed.asked.wait(20)
        outage, _ = publish(fed, event("outage.started", accounts="all"), event("invoice.issued", id="i"))
        assert outage.status_page == {"url": "https://status.vendor.example", "incident": None}
        assert engine.until_idle(seconds=20)
        assert [mail.recipient for mail in server.accepted] == ["cy@acme.example"]
        assert not feed.released.is_set()
        feed.released.set()


def test_a_feed_that_flaps_for_four_hours_mails_nobody(fed: App, server: SmtpServer, feed: Feed) -> None:
    """R28 on a moved clock: each minute another state, sometimes a fault; an outage event each minute."""
    incidents = Counter[str]()
    for minute in range(240):
        fed.clock.ahead = minute * MINUTE
        at = history.moment(fed.clock())
        assert at is not None
        status = ("Investigating", "Resolved")[minute % 2]
        feed.status = 503 if minute % 7 == 6 else 200
        feed.body = entries(("Card payments are confirmed late", status, at))
        fed.feed.refresh()
        kind = ("outage.started", "outage.resolved")[minute % 2]
        title = "Card payments are confirmed late"
        (answer,) = publish(fed, event(kind, id=f"m{minute}", accounts="all", incident="0", title=title, started_at=at))
        assert (answer.route, answer.duplicate) == ("status_page", False)
        assert answer.status_page is not None
        assert answer.status_page["url"] == "https://status.vendor.example"
        incidents[str((answer.status_page["incident"] or {}).get("status"))] += 1
    publish(fed, event("invoice.issued", id="i"))
    run(fed)
    assert [mail.recipient for mail in server.accepted] == ["cy@acme.example"]
    assert set(rows(fed, deliveries.c.status)) == {(int(Status.ACCEPTED),)}
    assert incidents["None"] >= 34, "where the feed failed the page answers"
    invariants.check(fed.database)
    with fed.database.read() as connection:
        assert ledger.totals(connection, 241) == {"accepted": 1}
