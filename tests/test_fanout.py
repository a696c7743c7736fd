"""From an event to planned deliveries: every contact a verdict, every mailbox one delivery, every crash resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select

from subscriptions.audience import resolve
from subscriptions.database import Database
from tests.house import (
    ACME,
    CLI,
    DAY,
    GLOBEX,
    NOW,
    MovedClock,
    app_on,
    event,
    house,
    import_accounts,
    publish,
)
from worker import decisions, fanout, leases, ledger
from worker.app import App
from worker.fanout import pack, plan_event, take_event, unpack
from worker.schema import deliveries, events, more_grounds, slices, verdict_shapes, verdicts

WORKER = 7


def account(number: int, *contacts: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"a{number}", "catalogue": "billtrust", "uses": ["invoicing"], "contacts": list(contacts)}


def person(name: str, *roles: str, email: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": name, "name": name.title(), "email": email or f"{name}@people.example", "roles": list(roles)} | more


def plan(app: App, *, page: int = 500, pages: int = 10_000) -> None:
    """Plan what waits, at most so many pages."""
    left = [pages]

    def go_on() -> bool:
        left[0] -= 1
        return left[0] >= 0

    with app.database.write() as connection:
        taken = take_event(connection, WORKER, now=app.clock())
    assert taken is not None
    plan_event(app.database, app.planner, taken, WORKER, clock=app.clock, go_on=go_on, page=page)


def rows(app: App, query: Any) -> list[Any]:
    with app.database.read() as connection:
        return list(connection.execute(query).all())


def test_a_person_of_several_accounts_gets_one_delivery_with_several_grounds(tmp_path: Path) -> None:
    shared = "pat@people.example"
    accounts = [account(n, person("pat", "executive", email=shared), person(f"x{n}", "executive")) for n in range(3)]
    with house(tmp_path, *accounts) as app:
        publish(app, event("announcement.published", accounts="all"))
        plan(app, page=1)
        assert len(rows(app, select(deliveries))) == 4
        first = rows(app, select(deliveries).order_by(deliveries.c.n))[0]
        assert [row.n for row in rows(app, select(more_grounds))] == [first.n, first.n]
        assert len(rows(app, select(verdicts))) == 3


def test_two_records_of_a_mailbox_in_one_account_make_one_delivery_without_further_grounds(tmp_path: Path) -> None:
    records = [person("one", "executive", email="x@p.example"), person("two", "executive", email="X@p.example ")]
    with house(tmp_path, account(1, *records)) as app:
        publish(app, event("announcement.published", accounts="all"))
        plan(app)
        assert len(rows(app, select(deliveries))) == 1
        assert rows(app, select(more_grounds)) == []


def test_slices_are_released_only_when_the_event_is_wholly_planned(tmp_path: Path) -> None:
    with house(tmp_path, *[account(n, person(f"p{n}", "executive")) for n in range(5)]) as app:
        publish(app, event("announcement.published", accounts="all"))
        plan(app, page=2, pages=2)
        assert {row.due_at for row in rows(app, select(slices))} == {None}
        assert rows(app, select(events.c.status, events.c.plan_after_account > 0)) == [("planning", True)]


def test_a_planning_that_crashed_is_resumed_where_it_stopped(tmp_path: Path) -> None:
    with house(tmp_path, *[account(n, person(f"p{n}", "executive")) for n in range(7)]) as app:
        publish(app, event("announcement.published", accounts="all"))
        plan(app, page=2, pages=2)
        assert len(rows(app, select(deliveries))) == 4
        with app.database.write() as connection:
            leases.free_orphans(connection, 99, dead=None, now=NOW)
        plan(app, page=2)
        assert sorted(row.n for row in rows(app, select(deliveries))) == list(range(1, 8))
        assert rows(app, select(events.c.status, events.c.next_n, events.c.plan_owner)) == [("sending", 8, None)]
        assert {row.due_at for row in rows(app, select(slices))} == {NOW}
        with app.database.read() as connection:
            assert ledger.totals(connection, 1) == {"planned": 7}


def test_a_planner_that_lost_its_event_writes_nothing_more(tmp_path: Path) -> None:
    with house(tmp_path, *[account(n, person(f"p{n}", "executive")) for n in range(4)]) as app:
        publish(app, event("announcement.published", accounts="all"))
        with app.database.write() as connection:
            mine = take_event(connection, WORKER, now=NOW)
            assert mine is not None
            connection.execute(events.update().values(plan_owner=WORKER + 1))
        plan_event(app.database, app.planner, mine, WORKER, clock=app.clock, go_on=lambda: True)
        assert rows(app, select(deliveries)) == []


def test_a_broadcast_to_a_list_reaches_these_accounts_alone(tmp_path: Path) -> None:
    with house(tmp_path, *[account(n, person(f"p{n}", "executive")) for n in range(5)]) as app:
        publish(app, event("announcement.published", accounts=["a1", "a3"]))
        plan(app)
        assert len(rows(app, select(deliveries))) == 2
        assert len(rows(app, select(verdicts))) == 2


def test_an_event_that_waited_for_its_time_is_planned_then(tmp_path: Path) -> None:
    clock = MovedClock()
    with house(tmp_path, ACME, clock=clock) as app:
        publish(app, event("invoice.issued", not_before="2026-11-22T09:00:00Z"))
        clock.now = NOW + DAY
        plan(app)
        assert rows(app, select(events.c.status)) == [("sending",)]
        assert len(rows(app, select(deliveries))) == 1


def test_an_event_that_reaches_nobody_is_done_with_its_verdicts(tmp_path: Path) -> None:
    with house(tmp_path, account(1, person("p", "accounting"))) as app:
        answer = publish(app, event("file.failed", account="a1"))[0]
        assert (answer.outcome, answer.reason) == ("no_recipient", "no_reachable_recipient")
        assert rows(app, select(events.c.status)) == [("done",)]
        assert rows(app, select(verdicts.c.warnings)) == [("no_recipient",)]


def test_a_cancelled_event_is_planned_no_further(tmp_path: Path) -> None:
    with house(tmp_path, *[account(n, person(f"p{n}", "executive")) for n in range(6)]) as app:
        publish(app, event("announcement.published", accounts="all"))
        plan(app, page=2, pages=1)
        with app.database.write() as connection:
            assert decisions.cancel(connection, 1, by="cli:test", now=NOW) == 2
            connection.execute(events.update().values(plan_owner=None))
            assert take_event(connection, WORKER, now=NOW) is None
            assert ledger.totals(connection, 1) == {"cancelled": 2}


def test_test_mode_and_team_mode_hold_what_they_may_not_send(tmp_path: Path) -> None:
    with house(tmp_path, ACME, GLOBEX, delivery="team", team="ada@acme.example,@globex.example") as app:
        publish(app, event("service.notice", accounts="all"), event("invoice.issued", id="i", account="globex"))
        plan(app)
        held = rows(app, select(deliveries.c.status, deliveries.c.reason).where(deliveries.c.event_id == 1))
        assert sorted(held, key=str) == [(ledger.Status.PLANNED, None), (ledger.Status.HELD, "team")]
        assert {row.status for row in rows(app, select(deliveries).where(deliveries.c.event_id == 2))} == {
            ledger.Status.PLANNED
        }


def test_what_is_planned_is_what_a_dry_run_says(tmp_path: Path) -> None:
    """Every (contact, shape) that the ledger keeps is the resolver's own answer, account by account."""
    accounts = [ACME, *[account(n, person(f"p{n}", "executive", "primary_support")) for n in range(30)]]
    with house(tmp_path, *accounts) as app:
        notice = event("service.notice", accounts="all")
        dry = {one.id: verdict for _, one, verdict in app.intake.dry_run([notice], CLI)}
        publish(app, notice)
        plan(app, page=7)
        with app.database.read() as connection:
            bodies = {row.id: row.body for row in connection.execute(select(verdict_shapes))}
            facts = fanout.directory.facts(connection, app.catalogues)
            for one in facts:
                stored = connection.execute(
                    select(verdicts.c.outcome, verdicts.c.packed).where(verdicts.c.account_id == one.number)
                ).one()
                again = resolve(app.catalogues[one.catalogue], one, fanout.event_facts(
                    "service_communication", notice.data, notice.products, attested=True))  # fmt: skip
                assert again == dry[one.id]
                assert stored.outcome == again.outcome
                expected = {c.contact.number: fanout._shape(c) for c in (*again.recipients, *again.excluded)}
                assert {number: bodies[shape] for number, shape in unpack(stored.packed)} == expected


def test_planning_works_alike_on_both_databases(database: Database, tmp_path: Path) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [account(n, person(f"p{n}", "executive"), person("pat", "executive")) for n in range(9)])
    publish(app, event("announcement.published", accounts="all"))
    plan(app, page=4)
    with database.read() as connection:
        assert ledger.totals(connection, 1) == {"planned": 10}
        assert connection.execute(select(func.count()).select_from(more_grounds)).scalar_one() == 8


@given(st.dictionaries(st.integers(1, 2**40), st.integers(1, 2**20)))
def test_packed_verdicts_read_back_as_they_were(pairs: dict[int, int]) -> None:
    assert dict(unpack(pack(pairs.items()))) == pairs


def test_a_shape_is_stored_once_however_many_contacts_have_it(tmp_path: Path) -> None:
    with house(tmp_path, *[account(n, person(f"p{n}", "executive"), person(f"q{n}")) for n in range(20)]) as app:
        publish(app, event("announcement.published", accounts="all"))
        plan(app, page=3)
        bodies = {row.body for row in rows(app, select(verdict_shapes))}
        assert bodies == {
            json.dumps(["email", [["executive", "role_matched"]], [], False], separators=(",", ":")),
            json.dumps([None, [], [[None, "no_role_match"]], False], separators=(",", ":")),
        }
