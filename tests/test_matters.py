"""What needs a person: noted as it happens, told as it stands, dropped when somebody dealt with it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import insert, select, update

from subscriptions.audience import Verdicts
from subscriptions.database import Database
from tests.house import DAY, NOW
from worker import decisions, leases, ledger, matters, standing
from worker.ledger import NEVER, Lane, Status
from worker.schema import deliveries, events, pauses, slices
from worker.settings import Settings, load

SETTINGS = load({"ROLECAST_RELAY_URLS": "smtps://relay.example", "ROLECAST_SENDER": "v@vendor.example"})
MINUTE = 60_000_000


def an_event(database: Database, number: int, *standing_ones: tuple[Status, str | None, int], **given: Any) -> str:
    """An event with these deliveries: status, reason, when it was settled; tallied and noted as the ledger does."""
    ulid = f"01J{number:023d}"
    values = {"class": "transactional", "status": "done", **given}
    with database.write() as connection:
        connection.execute(
            insert(events).values(
                id=number, ulid=ulid, source="/test", ce_id=str(number), content_mac=b"", type="invoice.issued",
                category="invoice", lane=1, scope="one", accepted_at=NOW, mode="live", sender_domain="vendor.example",
                bounce_domain="vendor.example", next_n=len(standing_ones) + 1, **values,
            )
        )  # fmt: skip
        for n, (status, reason, at) in enumerate(standing_ones, start=1):
            connection.execute(
                insert(deliveries).values(
                    event_id=number, n=n, mailbox_id=n, account_id=1, contact_id=n, shape_id=1, status=int(status),
                    reason=reason, settled_at=at,
                )
            )  # fmt: skip
            ledger.add_tallies(connection, 1, {(number, status): 1})
            matters.note(connection, 1, {(number, reason or ""): 1}, now=at)
    return ulid


def standing_now(database: Database, now: int = NOW, settings: Settings = SETTINGS) -> dict[str, standing.Matter]:
    with database.read() as connection:
        return {one.key: one for one in standing.look(connection, settings, now=now)}


def a_worker(database: Database, *, at: int = NOW) -> int:
    with database.write() as connection:
        return leases.register(connection, host="test", pid=1, lanes=(Lane.BULK,), now=at)


UNKNOWN = (Status.HELD, "unknown", NOW)
GIVEN_UP = (Status.FAILED, "given_up", NOW)


def test_held_and_failed_mail_is_told_by_reason_with_its_events_and_the_command(database: Database) -> None:
    first = an_event(database, 1, UNKNOWN, UNKNOWN, (Status.ACCEPTED, None, NOW))
    an_event(database, 2, UNKNOWN, GIVEN_UP)
    for number in range(3, 9):
        an_event(database, number, (Status.FAILED, "recipient_refused", NOW))
    found = standing_now(database)
    assert {key: one.count for key, one in found.items()} == {"unknown": 3, "given_up": 1, "recipient_refused": 6}
    assert found["unknown"].title.startswith("3 mails are held: the relay's answer was lost")
    assert found["unknown"].events[0] == first
    assert f"rolecast deliveries retry 01J{2:023d}" in found["given_up"].what_to_do
    assert not found["recipient_refused"].alone
    assert (len(found["recipient_refused"].events), found["recipient_refused"].more) == (5, 1)
    assert found["unknown"].to_json()["since"] == "2026-11-21T10:00:00.000Z"


def test_nothing_stands_that_was_dealt_with(database: Database) -> None:
    an_event(database, 1, UNKNOWN, UNKNOWN, (Status.HELD, "sender_refused", NOW))
    with database.write() as connection:
        decisions.release(connection, 1, numbers=[1, 3], now=NOW)
    assert {key: one.count for key, one in standing_now(database).items()} == {"unknown": 1}
    with database.write() as connection:
        decisions.settle(connection, 1, numbers=None, accepted=True, by="cli:ada", now=NOW)
    assert standing_now(database) == {}


def test_mail_that_test_and_team_mode_hold_is_no_matter(database: Database) -> None:
    an_event(database, 1, (Status.HELD, "test", NOW), (Status.HELD, "team", NOW))
    assert standing_now(database) == {}
    an_event(database, 2, (Status.HELD, "team", NOW), UNKNOWN)
    assert standing_now(database)["unknown"].count == 1


def test_an_unknown_outcome_is_urgent_after_a_day(database: Database) -> None:
    an_event(database, 1, UNKNOWN, (Status.HELD, "unknown", NOW + DAY))
    an_event(database, 2, UNKNOWN)
    assert not standing_now(database, NOW + DAY)["unknown"].urgent
    found = standing_now(database, NOW + DAY + 1)["unknown"]
    assert (found.urgent, found.count, found.overdue) == (True, 3, 2)
    assert found.title.endswith("; 2 for more than a day")


def test_failures_grow_old_and_held_mail_does_not(database: Database) -> None:
    an_event(database, 1, UNKNOWN, GIVEN_UP)
    assert set(standing_now(database, NOW + 8 * DAY)) == {"unknown"}


def test_an_event_of_any_size_is_told_without_reading_it(database: Database) -> None:
    an_event(database, 1, *[UNKNOWN] * 3)
    with database.write() as connection:
        connection.execute(update(events).values(next_n=10_000_000))
        decisions.release(connection, 1, numbers=[1], now=NOW)
    assert standing_now(database)["unknown"].count == 2  # the tally's


def test_where_there_is_more_than_can_be_counted_the_number_is_said_to_be_low(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "_THOROUGH", standing._Effort(3, 100))
    for number in range(1, 6):
        an_event(sqlite_database, number, (Status.FAILED, "recipient_refused", NOW + number))
    an_event(sqlite_database, 6, UNKNOWN)
    found = standing_now(sqlite_database)
    assert {key: one.brief for key, one in found.items()} == {
        "unknown": "1 mail is held",
        "recipient_refused": "at least 3 mails failed",
    }


def test_a_worker_notes_on_top_of_what_was_noted(database: Database) -> None:
    an_event(database, 1)
    with database.write() as connection:
        for owner in (1, 2, 1):
            matters.note(connection, owner, {(1, "no_reachable_recipient"): 2, (1, "connection_lost"): 5}, now=NOW)
    found = standing_now(database)
    assert {key: (one.count, one.ever) for key, one in found.items()} == {"no_reachable_recipient": (6, 6)}
    assert found["no_reachable_recipient"].brief == "nobody could be told in 6 accounts"


def test_an_account_without_anybody_for_it_is_a_matter_only_where_the_mail_is_needed() -> None:
    nobody = Verdicts("no_recipient", "no_reachable_recipient", "invoice", (), ())
    unused = Verdicts("no_recipient", "product_not_on_account", "invoice", (), ())
    told = Verdicts("deliver", None, "invoice", (), ())
    assert matters.unreached(7, "transactional", [nobody, unused, told]) == {(7, "no_reachable_recipient"): 1}
    assert matters.unreached(7, "promotional", [nobody]) == {(7, "nobody_interested"): 1}
    assert matters.unreached(7, "promotional", [told, unused]) == {}


# ---------------------------------------------------------------- troubles


def test_a_trouble_stands_while_a_living_worker_reports_it(database: Database) -> None:
    one, other = a_worker(database), a_worker(database)
    why = "the relay relay.example:465 can't be used now (421 later)"
    for owner, at in ((one, NOW - 10_000_000), (one, NOW - MINUTE // 4), (other, NOW)):
        with database.write() as connection:
            matters.report(connection, owner, "relay", "relay.example:465", why, now=at - 10_000_000)
    assert standing_now(database, NOW - 6_000_000) == {}  # it may pass by itself
    found = standing_now(database)["relay relay.example:465"]
    assert (found.brief, found.tail, found.since) == ("relay relay.example:465 is down", why, NOW - 20_000_000)
    with database.write() as connection:
        matters.report(connection, one, "relay", "relay.example:465", None, now=NOW)
    assert standing_now(database, NOW + MINUTE // 4)["relay relay.example:465"].since == NOW - 10_000_000
    with database.write() as connection:
        leases.leave(connection, other)
    assert standing_now(database) == {}


@pytest.mark.parametrize("later", [10 * MINUTE, 4 * MINUTE])
def test_a_trouble_of_a_worker_that_vanished_or_fell_silent_does_not_stand(database: Database, later: int) -> None:
    owner = a_worker(database, at=NOW if later > 5 * MINUTE else NOW + later)
    with database.write() as connection:
        matters.report(connection, owner, "disk", "", "only 90 MB are free", now=NOW)
    assert set(standing_now(database, NOW + 20_000_000)) == {"disk"}
    assert standing_now(database, NOW + later) == {}


# ---------------------------------------------------------------- what else waits for a person


def test_events_that_could_not_be_planned_and_pauses_of_our_own_stand(database: Database) -> None:
    ulid = an_event(database, 1, status="held", reason="cannot_be_planned")
    with database.write() as connection:
        rows = [("class", "promotional", "rolecast:complaints"), ("all", "", "ada")]
        connection.execute(
            insert(pauses), [{"scope": scope, "value": value, "by": by, "at": NOW} for scope, value, by in rows]
        )
    found = standing_now(database)
    assert set(found) == {"event_held", "pause class promotional"}
    assert found["event_held"].title == "1 event is held: they could not be planned"
    assert f"rolecast events retry {ulid}" in found["event_held"].what_to_do
    assert "rolecast resume --class promotional" in found["pause class promotional"].what_to_do


def test_mail_that_waits_for_a_setting_stands(database: Database) -> None:
    an_event(database, 1, *[(Status.PLANNED, "no_sender", None), (Status.PLANNED, "paused", None)], status="sending")
    with database.write() as connection:
        connection.execute(update(deliveries).values(due_at=NEVER))
    found = standing_now(database)
    assert {key: one.count for key, one in found.items()} == {"no_sender": 1}


def test_due_mail_without_a_relay_or_a_worker_stands_after_a_minute(database: Database) -> None:
    an_event(database, 1, status="sending")
    with database.write() as connection:
        connection.execute(insert(slices).values(event_id=1, lane=1, first_n=1, last_n=1, due_at=NOW))
    assert standing_now(database, NOW + MINUTE - 1) == {}
    assert set(standing_now(database, NOW + MINUTE)) == {"no_worker"}
    assert set(standing_now(database, NOW + MINUTE, load({}))) == {"no_relay"}
    a_worker(database, at=NOW + MINUTE)
    assert standing_now(database, NOW + MINUTE) == {}


# ---------------------------------------------------------------- decisions


def test_a_person_settles_unknown_outcomes_one_by_one_or_all(database: Database) -> None:
    an_event(database, 1, UNKNOWN, UNKNOWN, UNKNOWN, (Status.HELD, "sender_refused", NOW))
    with database.write() as connection:
        assert decisions.settle(connection, 1, numbers=[2, 4, 9], accepted=True, by="cli:ada", now=NOW + 5) == 1
        assert decisions.settle(connection, 1, numbers=None, accepted=False, by="cli:ada", now=NOW + 6) == 2
        assert decisions.settle(connection, 1, numbers=None, accepted=False, by="cli:ada", now=NOW + 7) == 0
        assert ledger.totals(connection, 1) == {"accepted": 1, "failed": 2, "held": 1}
        rows = connection.execute(select(deliveries.c.status, deliveries.c.reason, deliveries.c.settled_at)).all()
        kept = connection.execute(select(decisions.audit)).all()
    assert sorted(tuple(row) for row in rows) == [
        (int(Status.ACCEPTED), "settled_by_person", NOW + 5),
        (int(Status.FAILED), "settled_by_person", NOW + 6),
        (int(Status.FAILED), "settled_by_person", NOW + 6),
        (int(Status.HELD), "sender_refused", NOW),
    ]
    assert [(row.actor, row.door, row.kind, row.at) for row in kept] == [
        ("cli:ada", "cli", "deliveries.settled", NOW + 5),
        ("cli:ada", "cli", "deliveries.settled", NOW + 6),
    ]
    assert '"numbers": [2]' in kept[0].body
    assert set(standing_now(database)) == {"sender_refused"}


def test_an_event_that_could_not_be_planned_is_planned_again_or_withdrawn(database: Database) -> None:
    for number in (1, 2, 3):
        an_event(database, number, status="held" if number < 3 else "done")
    with database.write() as connection:
        assert decisions.plan_again(connection, 1, by="cli:ada", now=NOW)
        decisions.cancel(connection, 2, by="cli:ada", now=NOW)
        assert not decisions.plan_again(connection, 3, by="cli:ada", now=NOW)
        states = list(connection.execute(select(events.c.status).order_by(events.c.id)).scalars())
    assert states == ["planning", "cancelled", "done"]


def rows_of(database: Database) -> list[tuple[int, str | None]]:
    with database.read() as connection:
        query = select(deliveries.c.status, deliveries.c.reason).order_by(deliveries.c.n)
        return [(row.status, row.reason) for row in connection.execute(query)]


HELD = tuple((Status.HELD, reason, NOW) for reason in decisions.HELD_REASONS)


def test_held_mail_that_may_have_gone_out_is_released_only_where_it_was_chosen(database: Database) -> None:
    an_event(database, 1, *HELD)
    with database.write() as connection:
        assert decisions.release(connection, 1, numbers=None, now=NOW) == 4
        assert decisions.uncertain(connection, 1) == {"restored": 1, "unknown": 1}
        assert decisions.release(connection, 1, numbers=None, now=NOW) == 0
        assert decisions.release(connection, 1, numbers=None, reason="unknown", now=NOW) == 1
        [restored] = [n for n, reason in enumerate(decisions.HELD_REASONS, start=1) if reason == "restored"]
        assert decisions.release(connection, 1, numbers=[restored], reason="unknown", now=NOW) == 0
        assert decisions.release(connection, 1, numbers=[restored], now=NOW) == 1
        assert ledger.totals(connection, 1) == {"planned": 6}


def test_a_cancelled_event_keeps_only_the_held_mail_that_may_have_gone_out(database: Database) -> None:
    an_event(database, 1, *HELD, (Status.ACCEPTED, None, NOW), GIVEN_UP)
    with database.write() as connection:
        assert decisions.cancel(connection, 1, by="cli:ada", now=NOW + 5) == 4
        assert decisions.cancel(connection, 1, by="cli:test", now=NOW + 6) == 0
        assert ledger.totals(connection, 1) == {"cancelled": 4, "held": 2, "accepted": 1, "failed": 1}
        event = connection.execute(select(events.c.status, events.c.cancelled_at)).one()
    assert tuple(event) == ("cancelled", NOW + 5)
    cancelled = (int(Status.CANCELLED), "event_cancelled")
    assert rows_of(database) == [
        *((int(Status.HELD), reason) if reason in matters.UNCERTAIN else cancelled for _, reason, _ in HELD),
        (int(Status.ACCEPTED), None),
        (int(Status.FAILED), "given_up"),
    ]
    assert set(standing_now(database)) == {"restored", "unknown", "given_up"}
    with database.write() as connection:
        assert decisions.settle(connection, 1, numbers=None, accepted=True, by="cli:ada", now=NOW + 7) == 2
        assert ledger.totals(connection, 1) == {"cancelled": 4, "accepted": 3, "failed": 1}


def test_an_event_under_way_is_cancelled_with_what_is_planned_and_what_is_held(database: Database) -> None:
    an_event(database, 1, (Status.PLANNED, None, NOW), (Status.HELD, "team", NOW), UNKNOWN, status="sending")
    with database.write() as connection:
        assert decisions.cancel(connection, 1, by="cli:test", now=NOW) == 2
        assert ledger.totals(connection, 1) == {"cancelled": 2, "held": 1}


@pytest.mark.parametrize("standing_one", [UNKNOWN, GIVEN_UP, (Status.ACCEPTED, None, NOW)])
def test_an_event_that_is_done_stays_so_where_nothing_can_be_withdrawn(
    database: Database, standing_one: tuple[Status, str | None, int]
) -> None:
    an_event(database, 1, standing_one)
    with database.write() as connection:
        assert decisions.cancel(connection, 1, by="cli:test", now=NOW) == 0
        assert connection.execute(select(events.c.status)).scalar_one() == "done"
