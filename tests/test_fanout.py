"""From an event to planned deliveries: every contact a verdict, every mailbox one delivery, every crash resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select

from subscriptions.audience import resolve
from subscriptions.changes import Actor, RemoveAccount, RemoveContact, apply
from subscriptions.database import Database
from subscriptions.schema import contacts, mailboxes
from tests import invariants
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
    owed,
    publish,
)
from worker import decisions, fanout, feeding, leases, ledger
from worker.app import App, is_idle
from worker.fanout import Planner, event_facts, pack, plan_event, take_event, unpack
from worker.schema import deliveries, events, more_grounds, slices, verdict_shapes, verdicts

WORKER = 7
ANNOUNCED = event_facts(event("announcement.published", accounts="all").type.category, {}, (), attested=False)


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


def plan_on(app: App, *, page: int = 500, pages: int = 10_000) -> None:
    """Another worker goes on where the last one stopped."""
    with app.database.write() as connection:
        leases.free_orphans(connection, 99, dead=None, now=app.clock())
    plan(app, page=page, pages=pages)


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
        box = select(contacts.c.mailbox_id).where(contacts.c.ext == "pat").limit(1).scalar_subquery()
        first = rows(app, select(deliveries).where(deliveries.c.mailbox_id == box))[0]
        assert [row.n for row in rows(app, select(more_grounds))] == [first.n, first.n]
        assert len(rows(app, select(verdicts))) == 3


def test_two_records_of_a_mailbox_in_one_account_make_one_delivery_without_further_grounds(tmp_path: Path) -> None:
    records = [person("one", "executive", email="x@p.example"), person("two", "executive", email="X@p.example ")]
    with house(tmp_path, account(1, *records)) as app:
        publish(app, event("announcement.published", accounts="all"))
        plan(app)
        assert len(rows(app, select(deliveries))) == 1
        assert rows(app, select(more_grounds)) == []


def due_numbers(app: App) -> set[int]:
    """The deliveries that may be sent now."""
    found = rows(app, select(slices.c.first_n, slices.c.last_n).where(slices.c.due_at <= app.clock()))
    return {n for row in found for n in range(row.first_n, row.last_n + 1)}


def mailboxes_of(app: App, numbers: set[int]) -> set[str]:
    query = select(mailboxes.c.address).join(deliveries, deliveries.c.mailbox_id == mailboxes.c.id)
    return {row.address for row in rows(app, query.where(deliveries.c.n.in_(numbers)))}


def test_a_mailbox_of_one_contact_is_written_to_with_its_page_and_a_shared_one_when_all_is_planned(
    database: Database, tmp_path: Path
) -> None:
    app = app_on(database, tmp_path)
    later = {1: "pat@people.example", 2: "gone@people.example"}
    import_accounts(app, [
        account(0, person("p0", "executive"), *[person(f"s{n}", "executive", email=at) for n, at in later.items()]),
        *[account(n, person(f"p{n}", "executive")) for n in range(1, 5)],
        account(5, person("pat", "executive", email=later[1])),
        account(6, person("gone", "executive", email=later[2])),
    ])  # fmt: skip
    with database.write() as connection:
        apply(connection, Actor("cli:anna", "cli"), [RemoveAccount("a6")], catalogues=app.catalogues, now=app.clock())
    publish(app, event("announcement.published", accounts="all"))
    plan(app, page=2, pages=1)
    assert mailboxes_of(app, due_numbers(app)) == {"p0@people.example", "p1@people.example"}
    assert rows(app, select(events.c.status, events.c.plan_after_account > 0)) == [("planning", True)]
    plan_on(app, page=2)
    assert len(due_numbers(app)) == len(rows(app, select(deliveries))) == 7
    [further] = rows(app, select(more_grounds.c.n))
    assert mailboxes_of(app, {further.n}) == {"pat@people.example"}


@pytest.mark.parametrize("seed", range(6))
def test_what_is_released_before_all_is_planned_has_all_its_grounds(
    database: Database, tmp_path: Path, seed: int
) -> None:
    app, chance = app_on(database, tmp_path), Random(seed)
    people = [f"m{number}@people.example" for number in range(40)]
    import_accounts(app, [
        account(n, *[
            person(f"c{k}", "executive", email=chance.choice(people)) for k in range(chance.randrange(4))
        ])
        for n in range(30)
    ])  # fmt: skip
    gone = [RemoveAccount(f"a{n}") for n in chance.sample(range(30), 5)]
    with database.write() as connection:
        apply(connection, Actor("cli:anna", "cli"), gone, catalogues=app.catalogues, now=app.clock())
    publish(app, event("announcement.published", accounts="all"))
    released: set[int] = set()
    plan(app, page=3, pages=1)
    while rows(app, select(events.c.status)) == [("planning",)]:
        released |= due_numbers(app)
        invariants.check(database)
        plan_on(app, page=3, pages=1)
    invariants.check(database)
    assert released
    assert not released & {row.n for row in rows(app, select(more_grounds.c.n))}
    every = rows(app, select(deliveries.c.n, deliveries.c.mailbox_id))
    assert due_numbers(app) == {row.n for row in every} == set(range(1, len(every) + 1))
    with database.read() as connection:
        facts = fanout.directory.facts(connection, app.catalogues)
        grounds = {
            (row.account_id, row.contact_id, row.n)
            for table in (deliveries, more_grounds)
            for row in connection.execute(select(table.c.account_id, table.c.contact_id, table.c.n))
        }
    number_of = {row.mailbox_id: row.n for row in every}
    resolved = [
        (one.number, recipient.contact.number, number_of[recipient.contact.mailbox])
        for one in facts
        for recipient in resolve(app.catalogues[one.catalogue], one, ANNOUNCED).recipients
    ]
    assert grounds == set(resolved)


@pytest.mark.parametrize("pages", range(1, 4))
def test_a_planning_that_crashed_is_resumed_where_it_stopped(database: Database, tmp_path: Path, pages: int) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [account(n, person(f"p{n}", "executive")) for n in range(7)])
    publish(app, event("announcement.published", accounts="all"))
    plan(app, page=2, pages=pages)
    assert len(rows(app, select(deliveries))) == 2 * pages
    plan_on(app, page=2)
    assert sorted(row.n for row in rows(app, select(deliveries))) == list(range(1, 8))
    assert len(rows(app, select(verdicts))) == 7
    assert rows(app, select(events.c.status, events.c.next_n, events.c.plan_owner)) == [("sending", 8, None)]
    assert {row.due_at for row in rows(app, select(slices))} == {NOW}
    invariants.check(database)
    with app.database.read() as connection:
        assert ledger.totals(connection, 1) == {"planned": 7}


class Frozen(Planner):
    """A planner whose process stands still between reading a page and writing it, while `meanwhile` happens."""

    __slots__ = ("meanwhile",)

    def rows(self, *arguments: Any) -> fanout.Rows | None:
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return super().rows(*arguments)


def frozen(app: App, meanwhile: Callable[[], Any]) -> Frozen:
    planner = Frozen(app.catalogues, "live", app.planner.team)
    planner.meanwhile = meanwhile
    return planner


def test_a_worker_of_another_lane_leaves_an_event_to_others_until_it_has_waited(
    database: Database, tmp_path: Path
) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [account(1, person("p1", "executive"))])
    publish(app, event("announcement.published", accounts="all"))
    with database.write() as connection:
        accepted_at = connection.execute(select(events.c.accepted_at)).scalar_one()
        for late, waits in ((499_999, False), (500_000, True)):
            now = accepted_at + late
            assert feeding.look(connection, (), now=now, waited=500_000).plan is waits
            assert (take_event(connection, WORKER, now=now, waited=500_000) is not None) is waits


def test_an_event_that_is_being_planned_is_still_due_where_nobody_sends(database: Database, tmp_path: Path) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [account(1, person("p1", "executive"))])
    publish(app, event("announcement.published", accounts="all"))
    assert not is_idle(app)
    with database.write() as connection:
        assert take_event(connection, WORKER, now=app.clock()) is not None
    assert not is_idle(app)


def test_a_page_that_another_planner_wrote_meanwhile_is_not_written_again(database: Database, tmp_path: Path) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [account(n, person(f"p{n}", "executive")) for n in range(5)])
    publish(app, event("announcement.published", accounts="all"))
    with database.write() as connection:
        taken = take_event(connection, WORKER + 1, now=NOW)
    assert taken is not None
    late = frozen(app, lambda: plan_on(app, page=2))
    plan_event(database, late, taken, WORKER + 1, clock=app.clock, go_on=lambda: True, page=2)
    assert len(rows(app, select(deliveries))) == len(rows(app, select(verdicts))) == 5
    invariants.check(database)
    with database.read() as connection:
        assert ledger.totals(connection, 1) == {"planned": 5}


def test_a_page_that_was_read_before_the_event_was_cancelled_is_not_written(database: Database, tmp_path: Path) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [account(n, person(f"p{n}", "executive")) for n in range(5)])
    publish(app, event("announcement.published", accounts="all"))

    def cancel() -> None:
        with database.write() as connection:
            decisions.cancel(connection, 1, by="cli:test", now=NOW)

    with database.write() as connection:
        taken = take_event(connection, WORKER, now=NOW)
    assert taken is not None
    plan_event(database, frozen(app, cancel), taken, WORKER, clock=app.clock, go_on=lambda: True)
    assert rows(app, select(deliveries)) == []
    assert rows(app, select(events.c.status)) == [("cancelled",)]


def test_what_changes_between_reading_and_writing_a_page_is_looked_at_before_sending(
    database: Database, tmp_path: Path
) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [account(n, person(f"p{n}", "executive")) for n in range(3)])
    publish(app, event("announcement.published", accounts="all"))

    def leave() -> None:
        with database.write() as connection:
            gone = [RemoveContact("a1", "p1")]
            apply(connection, Actor("cli:anna", "cli"), gone, catalogues=app.catalogues, now=NOW)

    with database.write() as connection:
        taken = take_event(connection, WORKER, now=NOW)
    assert taken is not None
    plan_event(database, frozen(app, leave), taken, WORKER, clock=app.clock, go_on=lambda: True)
    assert len(rows(app, select(deliveries))) == 3
    [row] = rows(app, select(events.c.guard_at_plan))
    with database.read() as connection:
        assert ledger.guard(connection) > row.guard_at_plan, "the next flight checks who may still get it"


def test_a_mailbox_that_moves_to_a_later_account_while_pages_are_planned_gets_one_copy(
    database: Database, tmp_path: Path
) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [account(n, person(f"p{n}", "executive")) for n in range(6)])
    publish(app, event("announcement.published", accounts="all"))
    plan(app, page=2, pages=1)
    import_accounts(app, [
        account(0, person("p0", "executive", email="new@people.example")),
        account(5, person("p5", "executive", email="p0@people.example")),
    ])  # fmt: skip
    plan_on(app, page=2)
    assert len(rows(app, select(deliveries))) == 5
    [further] = rows(app, select(more_grounds.c.n))
    assert mailboxes_of(app, {further.n}) == {"p0@people.example"}


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
        plan(app, page=1)
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


def test_a_cancelled_event_is_planned_no_further_and_keeps_what_was_sent(database: Database, tmp_path: Path) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [account(n, person(f"p{n}", "executive")) for n in range(6)])
    publish(app, event("announcement.published", accounts="all"))
    plan(app, page=3, pages=1)
    with database.write() as connection:
        first = connection.execute(select(slices.c.id).where(slices.c.due_at <= NOW)).scalar_one()
        taken = ledger.claim(connection, first, WORKER, now=NOW)
        assert taken is not None
        flight, _ = ledger.begin(connection, taken, WORKER, [1], now=NOW)
        sent = ledger.Settlement(
            1, [1], ["250"], first, taken.epoch, flight, ledger.Status.ACCEPTED, None, True, None, "r", NOW, NOW
        )
        assert ledger.settle(connection, WORKER, ledger.arrange([sent], dialect=database.dialect)) == 1
        ledger.land(connection, [flight])
        assert decisions.cancel(connection, 1, by="cli:test", now=NOW) == 2
        assert owed(connection, taken) == []
        assert not ledger.finish(connection, taken, WORKER, now=NOW)
        connection.execute(events.update().values(plan_owner=None))
        assert take_event(connection, WORKER, now=NOW) is None
        assert ledger.totals(connection, 1) == {"accepted": 1, "cancelled": 2}
        assert connection.execute(select(func.count()).where(slices.c.done_at.is_(None))).scalar_one() == 0


def test_an_event_does_not_end_while_pages_of_it_are_to_come(database: Database, tmp_path: Path) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [account(n, person(f"p{n}", "executive")) for n in range(4)])
    publish(app, event("announcement.published", accounts="all"))
    plan(app, page=2, pages=1)
    with database.write() as connection:
        connection.execute(deliveries.update().values(status=int(ledger.Status.ACCEPTED)))
        first = connection.execute(select(slices.c.id)).scalar_one()
        taken = ledger.claim(connection, first, WORKER, now=NOW)
        assert taken is not None
        assert not ledger.finish(connection, taken, WORKER, now=NOW)
        assert feeding.ended(connection) == ([], 0)
        assert feeding.due_now(connection, now=NOW)
    plan_on(app, page=2)
    assert rows(app, select(events.c.status)) == [("sending",)]


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
                shapes = {c.contact.number: (None, (), c.dropped, False) for c in again.excluded}
                shapes |= {
                    c.contact.number: (c.delivery, c.matched, c.dropped, c.deduplicated) for c in again.recipients
                }
                expected = {number: fanout.shape_text(shape) for number, shape in shapes.items()}
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
