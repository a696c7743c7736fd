"""A fact is accepted exactly once, and what can't be accepted leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from subscriptions.database import Database
from subscriptions.directory import Known
from subscriptions.schema import accounts
from tests.house import (
    ACME,
    CLI,
    DAY,
    GLOBEX,
    NOW,
    app_on,
    envelope,
    event,
    house,
    import_accounts,
    publish,
)
from worker import feeding, ledger
from worker.app import App
from worker.delivery import Taken
from worker.events import TYPES
from worker.fanout import EventRow, Planning, event_row, unpack
from worker.intake import Publisher, Refused
from worker.mails import Due, People, as_planned, gather, numbered
from worker.schema import deliveries, events, flights, slices, tallies, verdicts


def count(app: App, table: object) -> int:
    with app.database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())  # type: ignore[arg-type]


def test_an_event_for_one_account_is_planned_when_it_is_accepted(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        answer = publish(app, event("invoice.issued"))[0]
        assert (answer.duplicate, answer.route, answer.outcome) == (False, "email", "deliver")
        assert len(answer.event) == 26
        with app.database.read() as connection:
            row = connection.execute(select(events)).one()
            assert (row.status, row.scope, row.lane) == ("sending", "one", ledger.Lane.NORMAL)
            assert ledger.totals(connection, row.id) == {"planned": 1}
            packed = connection.execute(select(verdicts.c.packed)).scalar_one()
            assert len(unpack(packed)) == 4, "every contact has a verdict"
        assert count(app, slices) == 1


class Witness:
    """Takes no mail; of each event it is offered, keeps what its mails would be made from, and what the ledger says."""

    def __init__(self) -> None:
        self.told: list[tuple[EventRow, list[Due], People]] = []
        self.read: list[tuple[list[Due], People]] = []

    def take(
        self, planning: Planning, event: EventRow, *, mails: int, guard: int, known: Known | None, now: int
    ) -> None:
        assert known is not None
        assert guard == ledger.guard(planning.connection)
        planned = planning.planned
        self.told.append((event, *as_planned(planning.connection, event, planned, known, {})))
        owing = [n for n, *_ in planned]
        self.read.append(gather(planning.connection, event, *numbered(owing), {}))
        assert mails >= len(owing)

    def send(self, taken: Sequence[Taken]) -> None:
        raise AssertionError(taken)

    def forget(self, taken: Sequence[Taken]) -> None:
        raise AssertionError(taken)


@pytest.mark.parametrize("mode", ["live", "test", "team"])
def test_what_is_handed_on_in_the_process_is_what_the_ledger_says(
    database: Database, tmp_path: Path, mode: str
) -> None:
    app = app_on(database, tmp_path)
    roles = ["invoicing_file_failure", "accounting"]
    twice = {"id": "twin", "name": "Twin", "email": "DI@acme.example", "roles": roles, "timezone": "Europe/Berlin"}
    import_accounts(app, [ACME | {"contacts": [*ACME["contacts"], twice]}, GLOBEX])
    witness = app.intake.hands = Witness()
    publisher = Publisher(mode=mode)  # type: ignore[arg-type]
    for name, kind in TYPES.items():
        for account in () if kind.broadcast else ("acme", "globex"):
            with suppress(Refused):
                publish(app, event(name, id=f"{name} {account}", account=account), publisher=publisher)
    assert len(witness.told) > 5
    for (told, dues, people), (read, there) in zip(witness.told, witness.read, strict=True):
        assert dues == read
        assert people == there or not dues
        with database.read() as connection:
            assert told == event_row(connection.execute(select(events).where(events.c.id == told.id)).one())


def test_the_same_fact_again_is_a_duplicate_and_changes_nothing(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        first = publish(app, event("invoice.issued"))[0]
        again = publish(app, event("invoice.issued"))[0]
        assert again.duplicate
        assert (again.event, again.outcome) == (first.event, first.outcome)
        assert (count(app, events), count(app, deliveries), count(app, slices)) == (1, 1, 1)


def test_the_same_source_and_id_with_other_content_is_a_conflict(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        publish(app, event("invoice.issued"))
        with pytest.raises(Refused, match="needs a new id") as refused:
            publish(app, event("invoice.issued", amount="9.99"))
        assert [fault.kind for fault in refused.value.faults] == ["conflict"]
        assert count(app, events) == 1


def test_time_and_extensions_do_not_make_another_fact(tmp_path: Path) -> None:
    from worker.events import parse_event

    with house(tmp_path, ACME) as app:
        publish(app, event("invoice.issued"))
        value = envelope("invoice.issued") | {"time": "2030-01-01T00:00:00Z", "trace": "abc"}
        assert publish(app, parse_event(value))[0].duplicate


def test_a_thousand_publishers_of_one_fact_make_one_event(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app, ThreadPoolExecutor(16) as pool:
        start = threading.Barrier(16)

        def one(number: int) -> bool:
            if number < 16:
                start.wait()
            return publish(app, event("invoice.issued"))[0].duplicate

        duplicates = list(pool.map(one, range(1000)))
        assert duplicates.count(False) == 1
        assert (count(app, events), count(app, deliveries)) == (1, 1)


def test_one_fault_refuses_a_whole_batch_and_leaves_nothing(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        good, bad = event("invoice.issued"), event("invoice.issued", id="e2", account="nobody")
        with pytest.raises(Refused, match="'nobody', which the directory does not have") as refused:
            publish(app, good, bad)
        assert [(fault.index, fault.pointer) for fault in refused.value.faults] == [(1, "/data/account")]
        assert (count(app, events), count(app, deliveries), count(app, tallies)) == (0, 0, 0)
        assert not publish(app, good)[0].duplicate


def test_invalid_events_are_told_before_conflicting_ones(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        publish(app, event("invoice.issued"))
        with pytest.raises(Refused) as refused:
            publish(app, event("invoice.issued", amount="1.00"), event("invoice.issued", id="e2", account="nobody"))
        assert [fault.kind for fault in refused.value.faults] == ["invalid", "conflict"]


def test_a_duplicate_inside_a_batch_is_a_duplicate(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        answers = publish(app, event("invoice.issued"), event("invoice.issued"))
        assert [answer.duplicate for answer in answers] == [False, True]


def test_a_category_that_the_account_does_not_have_refuses_the_event(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        with pytest.raises(Refused, match="does not have"):
            publish(app, event("quote.issued"))
        assert count(app, events) == 0


def test_in_a_broadcast_accounts_without_the_category_are_rejected_and_the_event_is_accepted(tmp_path: Path) -> None:
    with house(tmp_path, ACME, GLOBEX) as app:
        answer = publish(app, event("announcement.published", accounts="all"))[0]
        assert (answer.route, answer.outcome) == ("email", None)


def test_an_unknown_account_in_a_list_refuses_the_event_with_its_place(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        with pytest.raises(Refused) as refused:
            publish(app, event("announcement.published", accounts=["acme", "nobody"]))
        assert refused.value.faults[0].pointer == "/data/accounts/1"
        assert count(app, events) == 0


def test_a_broadcast_to_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with house(tmp_path) as app, pytest.raises(Refused, match="the directory has no account: import one first"):
        publish(app, event("announcement.published", accounts="all"))


def test_an_outage_is_answered_with_the_status_page_and_plans_no_mail(tmp_path: Path) -> None:
    with house(tmp_path, ACME, GLOBEX) as app:
        answers = publish(
            app,
            event("outage.started", accounts="all"),
            event("outage.started", id="e2", account="acme"),
        )
        assert [answer.route for answer in answers] == ["status_page", "status_page"]
        assert [answer.outcome for answer in answers] == [None, "redirected_to_status_page"]
        assert all(a.status_page == {"url": "https://status.vendor.example", "incident": None} for a in answers)
        assert (count(app, deliveries), count(app, slices), count(app, flights)) == (0, 0, 0)
        assert count(app, verdicts) == 1, "a status-page broadcast stores one row: the event's own"


def test_a_product_that_no_account_uses_is_told_back(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        answer = publish(app, event("announcement.published", account="acme", products=["invoicing", "teleport"]))[0]
        assert answer.notes == ("no account uses the product 'teleport'",)


def test_an_event_that_waits_for_its_time_is_not_planned_before(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        publish(app, event("invoice.issued", not_before="2026-11-22T10:00:00Z"))
        with app.database.read() as connection:
            assert connection.execute(select(events.c.status)).scalar_one() == "accepted"
            assert not feeding.look(connection, (), now=NOW).plan
            assert feeding.look(connection, (), now=NOW + DAY).plan
        assert count(app, deliveries) == 0


def test_who_asked_counts_only_from_a_publisher_that_attests(tmp_path: Path) -> None:
    change = {"change": "add_role", "role": "secondary_support", "contact": "cy"}
    asked = {"action": "contact_change", "requested_by": "ada", "change": change}
    with house(tmp_path, ACME) as app:
        attested = publish(app, event("action.requested", id="a", **asked))[0]
        plain = publish(app, event("action.requested", id="b", **asked), publisher=Publisher("key", attests=False))[0]
        assert (attested.outcome, plain.outcome) == ("authorised", "pending_approval")
        assert attested.route == "request"


def test_a_dry_run_answers_as_the_acceptance_would_and_stores_nothing(tmp_path: Path) -> None:
    with house(tmp_path, ACME, GLOBEX) as app:
        found = app.intake.dry_run([event("announcement.published", accounts="all"), event("invoice.issued")], CLI)
        assert [(account.id, verdict.outcome) for _, account, verdict in found] == [
            ("acme", "deliver"),
            ("globex", "rejected"),
            ("acme", "deliver"),
        ]
        assert count(app, events) == 0


def test_a_fact_whose_account_has_gone_since_is_still_known(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        first = publish(app, event("invoice.issued"))[0]
        with app.database.write() as connection:
            connection.execute(update(accounts).values(removed_at=NOW))
        again = publish(app, event("invoice.issued"))[0]
        assert (again.duplicate, again.event, again.outcome) == (True, first.event, first.outcome)
        with pytest.raises(Refused, match="needs a new id"):
            publish(app, event("invoice.issued", amount="9.99"))
        with pytest.raises(Refused, match="does not have"):
            publish(app, event("invoice.issued", id="new"))


def test_concurrent_publishers_of_different_facts_under_one_id_are_one_event_and_conflicts(
    database: Database, tmp_path: Path
) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [ACME])

    def one(number: int) -> str:
        try:
            return "known" if publish(app, event("invoice.issued", amount=f"{number % 2}.00"))[0].duplicate else "first"
        except Refused as refused:
            return refused.faults[0].kind

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(40)))
    assert sorted(set(answers)) == ["conflict", "first", "known"]
    assert (answers.count("first"), answers.count("known"), answers.count("conflict")) == (1, 19, 20)
    assert (count(app, events), count(app, deliveries), count(app, slices)) == (1, 1, 1)


def test_an_event_remembers_the_guard_as_it_stood_before_anything_was_looked_up(
    database: Database, tmp_path: Path
) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [ACME])
    with database.write() as connection:
        ledger.raise_guard(connection)
        before = ledger.guard(connection)
    publish(app, event("invoice.issued"), event("invoice.issued", id="later", not_before="2026-11-22T10:00:00Z"))
    with database.read() as connection:
        rows = connection.execute(select(events.c.status, events.c.guard_at_plan).order_by(events.c.id)).all()
    assert [tuple(row) for row in rows] == [("sending", before), ("accepted", 0)]


def test_events_for_many_accounts_in_one_call_find_each_its_own(database: Database, tmp_path: Path) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [{**ACME, "id": f"a{number}"} for number in range(30)] + [GLOBEX])
    batch = [event("invoice.issued", id=f"e{n}", account=f"a{n % 30}") for n in range(60)]
    answers = publish(app, *batch, event("quote.issued", id="q", account="globex"))
    assert {answer.outcome for answer in answers} == {"deliver"}
    with database.read() as connection:
        found = connection.execute(
            select(accounts.c.ext, func.count())
            .join(deliveries, deliveries.c.account_id == accounts.c.id)
            .group_by(accounts.c.ext)
        ).all()
    assert dict(tuple(row) for row in found) == {f"a{number}": 2 for number in range(30)} | {"globex": 1}
    with pytest.raises(Refused) as refused:
        publish(app, event("invoice.issued", id="x", account="a1"), event("invoice.issued", id="y", account="a99"))
    assert [(fault.index, fault.pointer) for fault in refused.value.faults] == [(1, "/data/account")]


def test_acceptance_works_alike_on_both_databases(database: Database, tmp_path: Path) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [ACME, GLOBEX])
    answers = publish(app, event("invoice.issued"), event("quote.issued", id="q", account="globex"))
    assert [answer.outcome for answer in answers] == ["deliver", "deliver"]
    assert publish(app, event("invoice.issued"))[0].duplicate
    assert count(app, deliveries) == 2
