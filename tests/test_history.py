"""What became of events, as people read it."""

from __future__ import annotations

import ast
import inspect

import pytest

from subscriptions.changes import Actor, PutContact, RemoveContact, apply
from tests.house import ACME, GLOBEX, NOW, event, house, publish
from worker import decisions, delivery, fanout, feeding, history, leases, ledger
from worker.ledger import Lane, Status

SHARED_ADA = {
    **GLOBEX,
    "id": "initech",
    "catalogue": "billtrust",
    "uses": ["invoicing"],
    "contacts": [{"id": "boss", "name": "Ada again", "email": "ADA@acme.example", "roles": ["executive"]}],
}


@pytest.fixture
def app(tmp_path):
    with house(tmp_path, ACME, GLOBEX, SHARED_ADA) as app:
        yield app


def planned(app):
    """Plan every broadcast that waits."""
    with app.database.write() as connection:
        worker = leases.register(connection, host="test", pid=1, lanes=[Lane.BULK], now=NOW)
    while True:
        with app.database.write() as connection:
            taken = fanout.take_event(connection, worker, now=app.clock())
        if taken is None:
            return
        fanout.plan_event(app.database, app.planner, taken, worker, clock=app.clock, go_on=lambda: True, page=1)


def asked(app, question, *args, **options):
    with app.database.read() as connection:
        found = history.find_event(connection, *args)
        assert found is not None
        return question(connection, found, **options)


def test_an_event_is_found_by_its_ulid_in_any_case_and_by_source_and_id(app):
    [receipt] = publish(app, event("invoice.issued"))
    with app.database.read() as connection:
        for names in ((receipt.event,), (receipt.event.lower(),), ("/test", "e1")):
            assert history.find_event(connection, *names).ulid == receipt.event
        assert history.find_event(connection, "/test", "e2") is None
        assert history.find_event(connection, "nonsense") is None


def test_the_state_of_an_event_counts_deliveries_by_status(app):
    publish(app, event("invoice.issued", products=["payments", "toasters"]))
    state = asked(app, history.event_state, "/test", "e1")
    assert state["status"] == "sending"
    assert (state["route"], state["outcome"], state["class"]) == ("email", "deliver", "transactional")
    assert state["totals"] == {"planned": 1}
    assert state["accounts"] == 1
    assert state["notes"] == ["no account uses the product 'toasters'"]
    assert state["accepted_at"] == "2026-11-21T10:00:00.000Z"


def test_what_an_open_flight_names_counts_as_sending(app):
    publish(app, event("invoice.issued"))
    with app.database.write() as connection:
        worker = leases.register(connection, host="test", pid=1, lanes=[Lane.BULK], now=NOW)
        taken = ledger.claim(connection, 1, worker, now=NOW)
        ledger.begin(connection, taken, worker, [1], now=NOW)
    assert asked(app, history.event_state, "/test", "e1")["totals"] == {"sending": 1}
    [delivery] = asked(app, history.list_deliveries, "/test", "e1")
    assert delivery["status"] == "sending"
    assert asked(app, history.list_deliveries, "/test", "e1", status="planned") == []
    assert len(asked(app, history.list_deliveries, "/test", "e1", status="sending")) == 1


def test_events_are_listed_the_newest_first_in_pages(app):
    receipts = publish(app, *[event("invoice.issued", id=f"e{number}") for number in range(5)])
    with app.database.read() as connection:
        page = history.list_events(connection, limit=2)
        assert [one["id"] for one in page] == ["e4", "e3"]
        assert page[0]["totals"] == {"planned": 1}
        following = history.list_events(connection, limit=9, before=page[-1]["event"])
    assert [one["event"] for one in following] == [receipt.event for receipt in reversed(receipts[:3])]


def test_a_broadcast_has_one_delivery_for_a_mailbox_with_every_account_as_a_ground(app):
    publish(app, event("announcement.published", account=None, accounts="all"))
    planned(app)
    [delivery] = asked(app, history.list_deliveries, "/test", "e1")
    assert delivery["email"] == "ada@acme.example"
    assert [(ground["account"], ground["contact"]) for ground in delivery["grounds"]] == [
        ("acme", "ada"),
        ("initech", "boss"),
    ]
    assert delivery["grounds"][0]["matched"] == [{"role": "executive", "reason": "role_matched"}]
    assert delivery["message_id"].endswith(".1@vendor.example>")


def test_verdicts_come_in_pages_as_they_were_answered(app):
    publish(app, event("announcement.published", account=None, accounts="all"))
    planned(app)
    first, cursor = asked(app, history.list_verdicts, "/test", "e1", limit=2)
    rest, end = asked(app, history.list_verdicts, "/test", "e1", after=cursor, limit=2)
    assert [one["account"] for one in first + rest] == ["acme", "globex", "initech"]
    assert end is None
    assert first[0]["recipients"][0]["email"] == "ada@acme.example"
    assert {one["contact"] for one in first[0]["excluded"]} == {"ben", "cy", "di"}
    assert first[1]["outcome"] == "rejected"
    assert first[1]["reason"] == "category_not_in_catalogue"


def test_the_audience_is_counted_without_reading_anybody(app):
    publish(app, event("announcement.published", account=None, accounts="all"))
    planned(app)
    found = asked(app, history.audience, "/test", "e1")
    assert (found.accounts, found.contacts, found.recipients, found.mailboxes) == (3, 8, 2, 1)
    assert found.outcomes == {("deliver", None): 2, ("rejected", "category_not_in_catalogue"): 1}


def test_verdicts_can_be_told_for_so_many_contacts_at_a_time(app):
    publish(app, event("announcement.published", account=None, accounts="all"))
    planned(app)
    seen, after, left_out = [], 0, []
    while after is not None:
        answers, after = asked(app, history.list_verdicts, "/test", "e1", after=after, contacts_limit=3)
        left_out += [one.get("left_out", 0) for one in answers]
        assert sum(len(one["recipients"]) + len(one["excluded"]) for one in answers) <= 3
        seen += [one["account"] for one in answers]
    assert (seen, left_out) == (["acme", "globex", "initech"], [1, 0, 0])


def test_each_account_is_named_with_the_catalogue_that_judged_it(app):
    publish(app, event("announcement.published", account=None, accounts="all"))
    planned(app)
    found = asked(app, history.catalogues_of, "/test", "e1", account_ids=["acme", "globex", "nobody"])
    assert found == {"acme": "billtrust", "globex": "issuetrak"}


def test_a_listed_event_says_what_it_is_about_and_keeps_its_signing_link(app):
    link = "https://sign.example/d/1"
    publish(
        app,
        event("quote.issued", id="e1", account="globex", title=f"Sign at {link}", signing_url=link),
        event("service.notice", id="e2", account=None, accounts=["acme", "globex"], title="Moved"),
    )
    with app.database.read() as connection:
        second, first = history.list_events(connection)
        assert (first["title"], first["account"]) == ("Sign at [signing link withheld]", "globex")
        assert (second["title"], second["accounts"]) == ("Moved", 2)
    assert history.signing_link(app.database, first["event"]) == link
    assert history.signing_link(app.database, second["event"]) is None
    assert history.signing_link(app.database, "nonsense") is None


def test_why_answers_by_contact_by_account_and_contact_and_by_address(app):
    publish(app, event("announcement.published", account=None, accounts="all"))
    planned(app)
    [boss] = asked(app, history.why, "/test", "e1", who="initech/boss")
    assert boss["matched"] == [{"role": "executive", "reason": "role_matched"}]
    assert boss["sent"]["status"] == "planned"
    both = asked(app, history.why, "/test", "e1", who=" Ada@ACME.example ")
    assert [one["account"] for one in both] == ["acme", "initech"]
    [ben] = asked(app, history.why, "/test", "e1", who="ben")
    assert ben["dropped"] == [{"role": None, "reason": "no_role_match"}]
    assert ben["delivery"] is None
    for nobody in ("nobody", "acme/nobody", "nobody@acme.example", "@", "a@b@c"):
        assert asked(app, history.why, "/test", "e1", who=nobody) == []


def test_the_verdict_stays_as_it_was_when_the_contact_moves_and_goes(app):
    publish(app, event("invoice.issued"))
    moves = [PutContact("acme", "cy", email="new@acme.example", roles=[]), RemoveContact("acme", "di")]
    with app.database.write() as connection:
        apply(connection, Actor("cli:test", "cli"), moves, catalogues=app.catalogues, now=NOW)
    for who in ("cy", "new@acme.example", "cy@acme.example"):
        [cy] = asked(app, history.why, "/test", "e1", who=who)
        assert cy["email"] == "cy@acme.example"
        assert cy["matched"] == [{"role": "accounting", "reason": "role_matched"}]
    assert len(asked(app, history.why, "/test", "e1", who="di")) == 1
    [answer], _ = asked(app, history.list_verdicts, "/test", "e1")
    assert [one["email"] for one in answer["recipients"]] == ["cy@acme.example"]


def test_whoever_joins_after_the_event_has_no_verdict_on_it(app):
    publish(app, event("invoice.issued"))
    joins = PutContact("acme", "eve", email="eve@acme.example", roles=["accounting"])
    with app.database.write() as connection:
        apply(connection, Actor("cli:test", "cli"), [joins], catalogues=app.catalogues, now=NOW)
    assert asked(app, history.why, "/test", "e1", who="eve") == []


def test_an_outage_was_answered_with_the_status_page_for_everybody(app):
    publish(
        app,
        event("outage.started", id="one", account=None, accounts=["acme"]),
        event("outage.started", id="all", account=None, accounts="all"),
    )
    for id_ in ("one", "all"):
        [ada] = asked(app, history.why, "/test", id_, who="acme/ada")
        assert ada["outcome"] == "redirected_to_status_page"
        assert ada["status_page"] == {"url": "https://status.vendor.example", "incident": None}
        assert asked(app, history.event_state, "/test", id_)["totals"] == {}
    assert asked(app, history.why, "/test", "one", who="globex/ann") == []


def test_a_rejected_request_says_so_though_nobody_was_judged(app):
    publish(app, event("action.requested", action="contact_change", requested_by="cy", approved_by=None, change=None))
    [cy] = asked(app, history.why, "/test", "e1", who="cy")
    assert (cy["outcome"], cy["reason"]) == ("rejected", "not_authorised_to_request")
    assert cy["delivery"] is None


def test_what_waits_is_counted_by_its_reason(app):
    publish(app, event("invoice.issued"))
    with app.database.write() as connection:
        connection.exec_driver_sql("UPDATE deliveries SET due_at = 4611686018427387904, reason = 'paused'")
    with app.database.read() as connection:
        found = history.find_event(connection, "/test", "e1")
        assert history.waiting(connection, [found.id]) == {"paused": 1}
        [delivery] = history.list_deliveries(connection, found)
    assert (delivery["due_at"], delivery["reason"]) == (None, "paused")


def test_a_status_that_does_not_exist_is_refused_with_those_that_do(app):
    publish(app, event("invoice.issued"))
    with pytest.raises(ValueError, match="'sent' is no status of a delivery: there are planned"):
        asked(app, history.list_deliveries, "/test", "e1", status="sent")


def test_a_reason_that_does_not_exist_is_refused_with_those_that_do(app):
    publish(app, event("invoice.issued"))
    with pytest.raises(ValueError, match="'nonsense' is no reason of a delivery: there are address_suppressed"):
        asked(app, history.list_deliveries, "/test", "e1", reason="nonsense")


def test_deliveries_can_be_listed_by_every_reason_that_is_written_to_one():
    written = set(decisions.HELD_REASONS)
    named = {"_settle": 2, "_again": 1, "_then": 1, "_put_off": 1}  # the place of the reason among the arguments
    for node in ast.walk(ast.parse(inspect.getsource(delivery))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in named:
            given = node.args[named[node.func.attr] :][:1]
            written |= {one.value for one in given if isinstance(one, ast.Constant) and one.value}
        elif (
            isinstance(node, ast.Return) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            written.add(node.value.value)  # why a mail is kept back, or a ground fell
    assert {"unknown", "content_refused", "connection_lost", "domain_waits", "no_https", "contact_removed"} <= written
    assert written <= set(history.REASONS)


def settled(app, status, reason):
    """Put the only delivery of the event into a state, tallies included, and end the event."""
    with app.database.write() as connection:
        connection.exec_driver_sql("UPDATE deliveries SET status = ?, reason = ?", (int(status), reason))
        connection.exec_driver_sql("UPDATE events SET status = 'done'")
        ledger.add_tallies(connection, 0, {(1, Status.PLANNED): -1, (1, status): 1})


@pytest.mark.parametrize(
    ("decide", "status", "changed"),
    [
        (decisions.release, Status.HELD, 1),
        (decisions.release, Status.FAILED, 0),
        (decisions.retry, Status.FAILED, 1),
        (decisions.retry, Status.HELD, 0),
        (decisions.retry, Status.ACCEPTED, 0),
    ],
)
def test_a_person_lets_held_mail_go_and_tries_failed_mail_again(app, decide, status, changed):
    publish(app, event("invoice.issued"))
    settled(app, status, "because")
    with app.database.write() as connection:
        assert decide(connection, 1, numbers=[1], now=NOW) == changed
        assert decide(connection, 1, numbers=[2], now=NOW) == 0
    state = asked(app, history.event_state, "/test", "e1")
    assert state["totals"] == ({"planned": 1} if changed else {status.name.lower(): 1})
    assert state["status"] == ("sending" if changed else "done")
    with app.database.read() as connection:
        assert feeding.look(connection, (), now=NOW).retries == bool(changed)
