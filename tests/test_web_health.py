"""What machines ask: whether events can be taken, what is amiss besides, and the counts behind it."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import delete, insert, update

from subscriptions.database import Database, DatabaseUnusable
from tests.servers import redis_url
from tests.test_matters import an_event
from tests.web_site import Web, opened, served
from worker import leases, matters
from worker.ledger import Lane, Status
from worker.schema import deliveries, feed_state, flights, slices, workers
from worker.settings import Secret, load
from worker.statuspage import FeedState

__all__ = ["redis_url"]

MINUTE = 60_000_000
IN_ORDER = {
    "relay_urls": load({"ROLECAST_RELAY_URLS": "smtps://relay.example"}).relay_urls,
}


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with opened(tmp_path, **IN_ORDER) as app:
        object.__setattr__(app.settings, "public_url", "https://notify.vendor.example")
        with app.database.write() as connection:
            leases.register(connection, host="test", pid=1, lanes=(Lane.BULK, Lane.URGENT), now=app.clock())
        with served(app) as web:
            yield web


def ready(web: Web) -> tuple[int, str, list[str]]:
    answer = web.client.get("/readyz")
    return answer.status_code, answer.json()["status"], answer.json()["facts"]


def metrics(web: Web) -> dict[str, float]:
    """Every sample, by its name with labels; the text is what Prometheus can read."""
    answer = web.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    described = re.findall(r"^# HELP (\S+) \S.*\n# TYPE \1 (?:gauge|counter)$", answer.text, re.MULTILINE)
    samples = re.findall(r"^([a-z_]+)((?:\{.*\})?) (\S+)$", answer.text, re.MULTILINE)
    assert {name for name, _, _ in samples} <= set(described)
    assert all(name.startswith("rolecast_") for name in described)
    assert len(samples) + 2 * len(described) == len(answer.text.splitlines())
    return {name + labels: float(value) for name, labels, value in samples}


def number_of(web: Web) -> int:
    with web.app.database.read() as connection:
        return int(connection.execute(workers.select()).one().id)


# ---------------------------------------------------------------- readiness


def test_an_installation_in_order_is_ready(web: Web) -> None:
    assert ready(web) == (200, "ready", [])


def test_without_a_worker_it_is_degraded(web: Web) -> None:
    with web.app.database.write() as connection:
        connection.execute(update(workers).values(beat_at=web.app.clock() - 2 * MINUTE))
    assert ready(web) == (200, "degraded", ["no worker is at work: start `rolecast work`"])


def test_what_a_worker_reports_and_what_waits_for_a_person_degrades_it(web: Web) -> None:
    now = web.app.clock()
    with web.app.database.write() as connection:
        matters.report(connection, number_of(web), "relay", "relay.example:465", "it said 421", now=now - MINUTE // 2)
    an_event(web.app.database, 1, (Status.HELD, "unknown", now), (Status.FAILED, "recipient_refused", now))
    code, status, (first, second) = ready(web)
    assert (code, status) == (200, "degraded")
    assert first.startswith("relay relay.example:465 is down: it said 421")
    assert second.startswith("1 mail is held: the relay's answer was lost")


def test_a_feed_that_fails_degrades_it(web: Web) -> None:
    object.__setattr__(web.app.settings, "status_page_feed_url", "https://status.vendor.example/feed")
    read_at = datetime.fromtimestamp(web.app.clock() / 1_000_000 - 90, UTC)
    body = FeedState(checked_at=read_at, succeeded_at=read_at, error="it answered 500").to_json()
    with web.app.database.write() as connection:
        connection.execute(insert(feed_state).values(one=1, body=body))
    assert ready(web)[2] == ["the feed of the status page can't be read: it answered 500"]
    assert 89 < metrics(web)["rolecast_feed_age_seconds"] < 1000


def test_a_queue_that_answers_is_no_fact_and_a_silent_one_is(web: Web, redis_url: str) -> None:
    object.__setattr__(web.app.settings, "broker_url", Secret(redis_url))
    assert ready(web)[1] == "ready"
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections and never answers
        place = f"127.0.0.1:{mute.getsockname()[1]}/0"
        object.__setattr__(web.app.settings, "broker_url", Secret(f"redis://me:hush@{place}"))
        assert ready(web) == (
            200, "degraded", [f"the queue {place} does not answer: events are taken, mail waits for it"]
        )  # fmt: skip


def test_a_database_that_cannot_be_read_is_not_ready(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_self: Database) -> object:
        message = "the database said 'gone'"
        raise DatabaseUnusable(message)

    monkeypatch.setattr(Database, "read", gone)
    assert ready(web)[:2] == (503, "unready")
    assert web.client.get("/readyz").headers["retry-after"] == "5"
    assert web.client.get("/healthz").status_code == 200


def test_a_database_that_the_code_can_not_serve_is_not_ready(web: Web) -> None:
    with web.app.database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    assert ready(web)[1] == "ready"  # a newer one says itself which code may go on
    with web.app.database.write() as connection:
        connection.exec_driver_sql("UPDATE installation SET oldest_code = 9999")
    code, status, (fact,) = ready(web)
    assert (code, status) == (503, "unready")
    assert "9999" in fact


# ---------------------------------------------------------------- metrics


def test_every_count_of_an_empty_installation_is_there_and_zero(web: Web) -> None:
    found = metrics(web)
    assert found.pop('rolecast_workers{lane="bulk"}') == found.pop('rolecast_workers{lane="urgent"}') == 1
    assert set(found.values()) == {0}
    assert 'rolecast_deliveries{status="held"}' in found
    assert 'rolecast_slices_due{lane="urgent"}' in found
    assert "rolecast_unknown_outcomes_sent_again_total" in found


def test_the_counts_are_the_ledgers(web: Web) -> None:
    now = web.app.clock()
    an_event(
        web.app.database,
        1,
        (Status.HELD, "unknown", now),
        (Status.FAILED, "given_up", now),
        (Status.ACCEPTED, None, now),
    )
    an_event(web.app.database, 2, (Status.PLANNED, "refused_for_now", now), status="sending")
    with web.app.database.write() as connection:
        connection.execute(update(deliveries).where(deliveries.c.event_id == 2).values(due_at=now - MINUTE))
        rows = [{"event_id": 2, "lane": 2, "first_n": 1, "last_n": 1, "due_at": now - age * MINUTE} for age in (1, 2)]
        connection.execute(insert(slices), rows)
        connection.execute(insert(flights).values(slice_id=1, epoch=1, owner=1, members="[1]", begun_at=now))
        matters.note(connection, 1, {(1, "sent_again"): 3}, now=now)
        matters.report(connection, number_of(web), "disk", "", "only 90 MB are free", now=now - MINUTE // 2)
    found = metrics(web)
    told = {name: value for name, value in found.items() if value and "age_seconds" not in name}
    assert told == {
        'rolecast_events{status="done"}': 1,
        'rolecast_events{status="sending"}': 1,
        'rolecast_deliveries{status="accepted"}': 1,
        'rolecast_deliveries{status="failed"}': 1,
        'rolecast_deliveries{status="held"}': 1,
        'rolecast_deliveries{status="planned"}': 1,
        'rolecast_matters_total{reason="unknown"}': 1,
        'rolecast_matters_total{reason="given_up"}': 1,
        "rolecast_unknown_outcomes_sent_again_total": 3,
        'rolecast_slices_due{lane="bulk"}': 2,
        "rolecast_deferred": 1,
        "rolecast_flights_open": 1,
        'rolecast_workers{lane="bulk"}': 1,
        'rolecast_workers{lane="urgent"}': 1,
        'rolecast_troubles{kind="disk"}': 1,
        'rolecast_needs_person{kind="unknown"}': 1,
        'rolecast_needs_person{kind="given_up"}': 1,
    }
    assert 120 <= found['rolecast_slice_due_age_seconds{lane="bulk"}'] < 1000
    assert 60 <= found["rolecast_deferred_due_age_seconds"] < 1000


def test_a_label_cannot_break_out_of_its_line(web: Web) -> None:
    an_event(web.app.database, 1, status='do"ne\\\nrolecast_evil 1')
    text = web.client.get("/metrics").text
    assert 'rolecast_events{status="do\\"ne\\\\\\nrolecast_evil 1"} 1' in text
    assert "\nrolecast_evil" not in text


def test_a_worker_without_a_relay_serves_no_lane(web: Web) -> None:
    with web.app.database.write() as connection:
        connection.execute(delete(workers))
        leases.register(connection, host="test", pid=1, lanes=(), now=web.app.clock())
    found = metrics(web)
    assert found['rolecast_workers{lane="none"}'] == 1
    assert found['rolecast_workers{lane="bulk"}'] == 0


def test_no_address_and_nothing_published_is_told(web: Web) -> None:
    ulid = web.publish("service.notice", accounts="all", title="A secret plan")
    for address in ("/metrics", "/readyz"):
        text = web.client.get(address).text
        assert "@" not in text
        assert "secret plan" not in text
        assert ulid not in text
