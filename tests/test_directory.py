"""The directory as the resolver reads it: pages, opt-outs and suppressions that hold for an address."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event, insert, select, text

from subscriptions import directory
from subscriptions.audience import EventFacts, resolve
from subscriptions.catalogue import load_catalogues
from subscriptions.changes import (
    Actor,
    LiftSuppression,
    PutAccount,
    PutContact,
    RemoveAccount,
    RemoveContact,
    SetOptOut,
    Suppress,
    apply,
)
from subscriptions.database import Database
from subscriptions.documents import AccountRecord, ContactRecord, OptOutRecord
from subscriptions.schema import installation, metadata
from tests.databases import NOW, fill

CATALOGUES = load_catalogues()
PRODUCTS = ("invoicing", "payments", "chat")
ANNA = Actor("cli:anna", "cli")


def contact(id_: str, address: str, *roles: str, opt_outs: tuple[OptOutRecord, ...] = (), **others) -> ContactRecord:
    return ContactRecord(id_, address, address.lower(), roles=roles, opt_outs=opt_outs, **others)


def account(id_: str, *contacts: ContactRecord, catalogue: str = "billtrust", uses=("invoicing",)) -> AccountRecord:
    return AccountRecord(id_, catalogue, uses=frozenset(uses), contacts=contacts)


def change(database: Database, *changes, actor: Actor = ANNA, now: int = NOW):
    with database.write() as connection:
        return apply(connection, actor, changes, catalogues=CATALOGUES, now=now)


def facts(database: Database, **options):
    with database.read() as connection:
        return directory.facts(connection, CATALOGUES, **options)


def page(database: Database, **options):
    with database.read() as connection:
        return directory.read_page(connection, CATALOGUES, **options)


def one(database: Database, ext: str):
    with database.read() as connection:
        return directory.account(connection, CATALOGUES, ext)


def test_an_installation_is_made_once_and_keeps_its_key(database: Database):
    with database.write() as connection:
        before = directory.address_key(connection)
        directory.install(connection, now=NOW)
        assert directory.address_key(connection) == before
        assert len(before) == 32
        assert connection.execute(select(installation.c.guard)).scalars().all() == [0]


def test_an_address_has_another_key_in_another_installation():
    assert directory.mailbox_key(b"a" * 32, "ada@acme.example") != directory.mailbox_key(b"b" * 32, "ada@acme.example")
    assert len(directory.mailbox_key(b"a" * 32, "ada@acme.example")) == 16


def test_the_facts_of_an_account_are_what_was_put_in(database: Database):
    change(
        database,
        PutAccount(
            account(
                "acme",
                contact("c2", "Ben@acme.example", "secondary_support", "executive", products=frozenset({"invoicing"})),
                contact("c1", "it@acme.example", "invoicing_file_failure", kind="group", unreachable=True),
                uses=("payments", "invoicing"),
            )
        ),
    )
    found = one(database, "acme")
    assert (found.id, found.catalogue, found.uses) == ("acme", "billtrust", {"invoicing", "payments"})
    ben, it = found.contacts
    assert (ben.id, ben.email, ben.roles) == ("c2", "ben@acme.example", ("executive", "secondary_support"))
    assert (ben.kind, ben.products, ben.unreachable) == ("person", {"invoicing"}, False)
    assert (it.id, it.kind, it.products, it.unreachable) == ("c1", "group", None, True)
    assert found.number > 0
    assert ben.number > 0
    assert ben.mailbox != it.mailbox


def test_pages_hold_every_account_once_in_the_order_of_their_numbers(database: Database):
    change(database, *(PutAccount(account(f"a{n}", contact("c", f"c@a{n}.example"))) for n in range(25)))
    seen, after = [], 0
    while page := facts(database, after=after, limit=10):
        assert len(page) <= 10
        assert [one.number for one in page] == sorted(one.number for one in page)
        seen += [one.id for one in page]
        after = page[-1].number
    assert seen == [f"a{n}" for n in range(25)]


def test_a_page_can_be_narrowed_to_accounts_by_name(database: Database):
    change(database, *(PutAccount(account(f"a{n}")) for n in range(5)))
    assert [found.id for found in facts(database, only=["a3", "a1", "nobody"])] == ["a1", "a3"]
    assert facts(database, only=[]) == []


def test_a_page_can_be_narrowed_to_the_accounts_that_an_event_names(sqlite_database: Database):
    import worker.schema

    metadata.create_all(sqlite_database.engine)
    change(sqlite_database, *(PutAccount(account(f"a{n}")) for n in range(5)))
    wanted = [found.number for found in facts(sqlite_database, only=["a1", "a4"])]
    with sqlite_database.write() as connection:
        connection.execute(text("PRAGMA defer_foreign_keys=ON"))
        connection.execute(insert(worker.schema.event_accounts), [{"event_id": 7, "account_id": n} for n in wanted])
        connection.execute(text("PRAGMA foreign_keys"))
        page = directory.facts(connection, CATALOGUES, scope_event=7)
        assert [found.id for found in page] == ["a1", "a4"]
        assert directory.facts(connection, CATALOGUES, scope_event=8) == []
        connection.execute(worker.schema.event_accounts.delete())


def test_removed_accounts_and_contacts_are_not_in_the_facts(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "a@x.example"), contact("c2", "b@x.example"))))
    change(database, PutAccount(account("gone")))
    change(database, RemoveContact("acme", "c1"), RemoveAccount("gone"))
    assert [[c.id for c in found.contacts] for found in facts(database)] == [["c2"]]


def test_an_account_that_nobody_has_named_is_none(database: Database):
    assert one(database, "nobody") is None
    assert facts(database) == []


def test_an_informational_opt_out_is_the_contacts_own(database: Database):
    wish = OptOutRecord("executive", "announcement")
    change(database, PutAccount(account("acme", contact("c1", "ada@x.example", "executive", opt_outs=(wish,)))))
    change(database, PutAccount(account("other", contact("c1", "ada@x.example", "executive"))))
    assert one(database, "acme").contacts[0].opt_outs == {("executive", "announcement")}
    assert one(database, "acme").opted_out == frozenset()
    assert one(database, "other").contacts[0].opt_outs == frozenset()


def test_a_promotional_opt_out_holds_for_the_address_in_every_account(database: Database):
    wish = OptOutRecord("executive", "webinar_invite")
    change(database, PutAccount(account("acme", contact("c1", "Ada@x.example", "executive", opt_outs=(wish,)))))
    change(database, PutAccount(account("other", contact("c7", "ada@X.example", "executive"))))
    change(database, PutAccount(account("third", contact("c7", "eve@X.example", "executive"))))
    assert one(database, "other").opted_out == {("ada@x.example", "webinar_invite")}
    assert one(database, "other").contacts[0].opt_outs == frozenset()
    assert one(database, "third").opted_out == frozenset()


def test_an_opt_out_holds_for_the_contact_and_for_the_mailbox_it_was_set_under(database: Database):
    wish = OptOutRecord("executive", "webinar_invite", by="recipient")
    change(database, PutAccount(account("acme", contact("c1", "old@x.example", "executive", opt_outs=(wish,)))))
    change(database, PutContact("acme", "c1", email="new@x.example"))
    change(database, PutAccount(account("two", contact("c1", "old@x.example"), contact("c2", "new@x.example"))))
    assert one(database, "acme").contacts[0].opt_outs == {("executive", "webinar_invite")}
    assert one(database, "acme").opted_out == {("new@x.example", "webinar_invite")}
    assert one(database, "two").opted_out == {("old@x.example", "webinar_invite"), ("new@x.example", "webinar_invite")}


def test_an_opt_out_of_a_removed_contact_still_holds_for_its_address(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "ada@x.example", "executive"))))
    change(database, SetOptOut(("acme", "c1"), "executive", "webinar_invite", True, "recipient"))
    change(database, RemoveContact("acme", "c1"))
    change(database, PutAccount(account("other", contact("c9", "ada@x.example", "executive"))))
    assert one(database, "other").opted_out == {("ada@x.example", "webinar_invite")}


@pytest.mark.parametrize("cause", ["hard_bounce", "operator", "erased"])
def test_a_suppressed_address_is_suppressed_in_every_account_that_has_it(database: Database, cause: str):
    change(database, PutAccount(account("acme", contact("c1", "ada@x.example"), contact("c2", "eve@x.example"))))
    change(database, PutAccount(account("other", contact("c1", "ADA@x.example"))))
    change(database, Suppress("Ada@x.example", cause, "operator:anna"))
    assert one(database, "acme").suppressed == {"ada@x.example"}
    assert one(database, "other").suppressed == {"ada@x.example"}
    assert one(database, "other").complained == frozenset()


def test_a_complaint_does_not_make_an_address_unreachable(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "ada@x.example"))))
    change(database, Suppress(one(database, "acme").contacts[0].mailbox, "complaint", "delivery:01X/7"))
    assert one(database, "acme").complained == {"ada@x.example"}
    assert one(database, "acme").suppressed == frozenset()


def test_an_opt_out_set_by_a_complaint_counts_as_a_complaint_of_the_address(database: Database):
    wish = OptOutRecord("executive", "announcement", by="complaint")
    change(database, PutAccount(account("acme", contact("c1", "ada@x.example", "executive", opt_outs=(wish,)))))
    change(database, PutAccount(account("other", contact("c1", "ada@x.example", "executive"))))
    assert one(database, "other").complained == {"ada@x.example"}


def test_a_lifted_suppression_no_longer_stands(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "ada@x.example"))))
    change(database, Suppress("ada@x.example", "hard_bounce", "delivery:01X/7"))
    change(database, Suppress("ada@x.example", "operator", "operator:anna"))
    change(database, LiftSuppression("ada@x.example", "hard_bounce"))
    assert one(database, "acme").suppressed == {"ada@x.example"}
    change(database, LiftSuppression("ada@x.example"))
    assert one(database, "acme").suppressed == frozenset()


def test_an_account_that_is_read_with_its_people_has_the_same_facts_whatever_holds_for_them(database: Database):
    wish = OptOutRecord("executive", "webinar_invite", by="recipient")
    people = [contact(f"c{n}", f"c{n}@acme.example", "executive", opt_outs=(wish,) if n == 1 else ()) for n in range(7)]
    change(
        database,
        PutAccount(account("acme", *people, uses=("payments", "invoicing"))),
        PutAccount(account("other", contact("c2", "c2@acme.example", "executive"))),
        PutAccount(account("calm", contact("c9", "c9@acme.example", "executive"))),
        PutAccount(account("empty", uses=())),
        Suppress("c3@acme.example", "hard_bounce", "import:acme"),
        Suppress("c4@acme.example", "complaint", "import:acme"),
        Suppress("c5@acme.example", "operator", "operator:anna"),
        SetOptOut(("other", "c2"), "executive", "marketing_communication", opted_out=True, set_by="recipient"),
    )
    change(database, LiftSuppression("c5@acme.example"), RemoveContact("acme", "c6"))
    change(database, PutContact("acme", "c1", email="moved@acme.example"))  # its opt-out goes with it, and stays
    change(database, PutAccount(account("heir", contact("c1", "c1@acme.example", "executive"))))
    found = {}
    with database.read() as connection:
        for ext in ("acme", "other", "heir", "calm", "empty"):
            known = directory.known(connection, CATALOGUES, ext)
            assert known is not None
            assert known.facts == directory.account(connection, CATALOGUES, ext)
            assert known.people.keys() == {one.number for one in known.facts.contacts}
            found[ext] = known.facts
        assert directory.known(connection, CATALOGUES, "nobody") is None
    acme = found["acme"]
    assert (acme.suppressed, acme.complained) == ({"c3@acme.example"}, {"c4@acme.example"})
    assert acme.opted_out == {
        ("c2@acme.example", "marketing_communication"),
        ("moved@acme.example", "webinar_invite"),
    }
    assert found["heir"].opted_out == {("c1@acme.example", "webinar_invite")}
    assert [bool(one.opt_outs) for one in acme.contacts] == [False, True, False, False, False, False]
    assert not found["calm"].suppressed | found["calm"].opted_out


def test_a_page_costs_the_same_number_of_statements_however_many_contacts_it_has(sqlite_database: Database):
    change(
        sqlite_database,
        *(
            PutAccount(account(f"a{n}", *(contact(f"c{m}", f"c{m}@a{n}.example", "executive") for m in range(5))))
            for n in range(100)
        ),
    )
    selects: list[str] = []

    def note(said: str) -> None:
        if said.startswith("SELECT"):
            selects.append(said)

    event.listen(sqlite_database.engine, "checkout", lambda raw, *_: raw.set_trace_callback(note))
    assert len(facts(sqlite_database, limit=1)) == 1
    few = len(selects)
    assert len(facts(sqlite_database, limit=100, after=0)) == 100
    assert len(selects) - few == few == 3


def test_rows_for_people_show_names_and_addresses_as_written(database: Database):
    record = AccountRecord(
        "acme", "billtrust", name="Acme Corp", uses=frozenset({"b", "a"}), contacts=(contact("c1", "Ada@X.example"),)
    )
    change(database, PutAccount(record))
    change(database, PutContact("acme", "c1", name="Ada", locale="de-AT", timezone="Europe/Vienna"))
    with database.read() as connection:
        (row,) = directory.list_accounts(connection)
        assert (row.id, row.name, row.uses, row.contacts) == ("acme", "Acme Corp", ("a", "b"), 1)
        assert directory.account_row(connection, "acme") == row
        assert directory.account_row(connection, "nobody") is None
        assert directory.account_names(connection, [row.number]) == {row.number: ("acme", "Acme Corp")}
        (person,) = directory.contacts_of(connection, [row.number])[row.number]
        assert (person.name, person.email, person.address) == ("Ada", "Ada@X.example", "ada@x.example")
        assert (person.locale, person.timezone) == ("de-AT", "Europe/Vienna")
        assert directory.contact_rows(connection, [person.number]) == {person.number: person}
        assert directory.mailbox_number(connection, "ada@x.example") == person.mailbox
        assert directory.mailbox_number(connection, "nobody@x.example") is None


def test_suppressions_are_listed_with_who_set_them(database: Database):
    change(database, Suppress("ada@x.example", "hard_bounce", "delivery:01X/7", "550 5.1.1"), now=NOW)
    change(database, Suppress("eve@x.example", "operator", "operator:anna"), now=NOW + 1)
    change(database, LiftSuppression("eve@x.example"), now=NOW + 2)
    with database.read() as connection:
        (standing,) = directory.suppressions_of(connection)
        assert (standing.address, standing.cause, standing.evidence) == ("ada@x.example", "hard_bounce", "550 5.1.1")
        _, lifted = directory.suppressions_of(connection, lifted=True)
        assert (lifted.address, lifted.lifted_by, lifted.lifted_at) == ("eve@x.example", "cli:anna", NOW + 2)
        assert directory.suppressions_of(connection, [lifted.mailbox]) == []


def test_a_database_file_survives_a_new_process(tmp_path: Path):
    database = fill(Database(f"sqlite:///{tmp_path / 'kept.db'}"))
    change(database, PutAccount(account("acme", contact("c1", "ada@x.example"))))
    database.close()
    again = Database(f"sqlite:///{tmp_path / 'kept.db'}")
    assert one(again, "acme").contacts[0].email == "ada@x.example"
    again.close()


def test_ids_with_quotes_backslashes_and_any_script_come_through_as_they_are(database: Database):
    hostile = ['a"b', "a'b;--", "a\\b\\n", "tab\there", "line\nhere", "żółć 📦", ":name %s %(n)s AMONG :x", "[1,{}]"]
    change(
        database,
        *(
            PutAccount(
                account(text, *(contact(each, f"c{m}@a{n}.example", "executive") for m, each in enumerate(hostile)))
            )
            for n, text in enumerate(hostile)
        ),
    )
    for page in (facts(database), facts(database, only=hostile)):
        assert [found.id for found in page] == hostile
        assert [[each.id for each in found.contacts] for found in page] == [hostile] * len(hostile)


def test_contacts_come_in_the_order_of_assignment_whatever_their_ids(database: Database):
    change(database, PutAccount(account("acme", *(contact(f"c{n}", f"c{n}@x.example") for n in (3, 1, 2)))))
    change(database, PutContact("acme", "c0", email="c0@x.example"))
    found = one(database, "acme")
    assert found is not None
    assert [each.id for each in found.contacts] == ["c3", "c1", "c2", "c0"]


def test_mailboxes_that_several_contacts_have_are_known_as_shared_for_good(database: Database):
    change(database, PutAccount(account("a", contact("one", "x@p.example"), contact("two", "y@p.example"))))
    change(database, PutAccount(account("b", contact("one", "X@p.example"), contact("two", "z@p.example"))))
    boxes = {each.email: each.mailbox for found in facts(database) for each in found.contacts}
    assert page(database).shared == {boxes["x@p.example"]}
    change(database, RemoveContact("b", "one"))
    assert page(database).shared == {boxes["x@p.example"]}, "held back rather than missed"


CATEGORY = st.sampled_from(["service_communication", "announcement", "webinar_invite", "invoice", "file_failure"])
ROLES = ("executive", "primary_support", "secondary_support", "accounting", "communication_only")


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), CATEGORY)
def test_accounts_that_are_alike_have_the_verdicts_that_each_would_have_by_itself(chance, category):
    """A stand-in for the constellation of an account is resolved as the account is, contact by contact."""
    category = category if category in CATALOGUES["billtrust"].categories else "announcement"
    with TemporaryDirectory() as folder:
        database = fill(Database(f"sqlite:///{folder}/r.db"))
        try:
            people = [f"p{number}@x.example" for number in range(10)]
            wishes = [OptOutRecord(role, key) for role in ROLES[:3] for key in (category, "announcement")]
            for number in range(8):
                given_to = [
                    contact(
                        f"c{chance.randrange(100)}-{n}", chance.choice(people),
                        *sorted(chance.sample(ROLES, chance.randrange(3))),
                        products=frozenset({"invoicing"}) if chance.random() < 0.3 else None,
                        unreachable=chance.random() < 0.2,
                        opt_outs=(chance.choice(wishes),) if chance.random() < 0.2 else (),
                    )
                    for n in range(chance.randrange(5))
                ]  # fmt: skip
                change(database, PutAccount(account(f"a{number}", *given_to, uses=chance.sample(PRODUCTS, 1))))
            for address in chance.sample(people, 3):
                cause = chance.choice(["hard_bounce", "complaint", "operator"])
                change(database, Suppress(address, cause, "operator:anna"))
            event = EventFacts(category, products=tuple(chance.sample(PRODUCTS, chance.randrange(3))))
            found = page(database, products=bool(event.products))
            plain = facts(database)
            assert [one.number for one in plain] == list(found.accounts)
            start = 0
            for one, alike, end in zip(plain, found.constellations(category), found.ends, strict=True):
                stand_in = directory.stand_in(alike, category, number=one.number)
                numbers, boxes = found.contacts[start:end], found.mailboxes[start:end]
                assert sorted(numbers) == sorted(each.number for each in one.contacts)
                expected = resolve(CATALOGUES[one.catalogue], one, event)
                again = resolve(CATALOGUES[one.catalogue], stand_in, event)
                assert (again.outcome, again.reason, again.warnings) == (
                    expected.outcome, expected.reason, expected.warnings,
                )  # fmt: skip
                assert [
                    (numbers[each.contact.number], each.delivery, each.matched, each.dropped, each.deduplicated)
                    for each in again.recipients
                ] == [
                    (each.contact.number, each.delivery, each.matched, each.dropped, each.deduplicated)
                    for each in expected.recipients
                ]
                assert [(numbers[each.contact.number], each.dropped) for each in again.excluded] == [
                    (each.contact.number, each.dropped) for each in expected.excluded
                ]
                assert {each.number: each.mailbox for each in one.contacts} == dict(zip(numbers, boxes, strict=True))
                start = end
        finally:
            database.close()
