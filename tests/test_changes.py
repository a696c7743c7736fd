"""The one writer of the directory: what it does, what it refuses, what it keeps of others, and what it records."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import event, func, select

from subscriptions import schema
from subscriptions.catalogue import load_catalogues
from subscriptions.changes import (
    LISTED,
    Actor,
    ChangeError,
    LiftSuppression,
    NotFound,
    PutAccount,
    PutContact,
    RemoveAccount,
    RemoveContact,
    SetOptOut,
    Suppress,
    apply,
    plan_batches,
)
from subscriptions.database import Database
from subscriptions.directory import account as account_facts
from subscriptions.directory import contacts_of
from subscriptions.documents import AccountRecord, ContactRecord, OptOutRecord, SuppressionRecord
from tests.databases import NOW

CATALOGUES = load_catalogues()
ANNA = Actor("cli:anna", "cli")
IMPORT = Actor("import:acme.json", "import")
TABLES = ("mailboxes", "accounts", "account_products", "contacts", "opt_outs", "suppressions", "audit")


def contact(id_: str, address: str, *roles: str, **others) -> ContactRecord:
    return ContactRecord(id_, address, address.lower(), roles=roles, **others)


def account(id_: str, *contacts: ContactRecord, catalogue: str = "billtrust", **others) -> AccountRecord:
    return AccountRecord(id_, catalogue, contacts=contacts, **others)


def change(database: Database, *changes, actor: Actor = ANNA, now: int = NOW, why: str = ""):
    with database.write() as connection:
        return apply(connection, actor, changes, catalogues=CATALOGUES, now=now, why=why)


def one(database: Database, ext: str = "acme"):
    with database.read() as connection:
        return account_facts(connection, CATALOGUES, ext)


def rows(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {name: connection.scalar(select(func.count()).select_from(getattr(schema, name))) for name in TABLES}


def guard(database: Database) -> int:
    with database.read() as connection:
        return connection.scalar(select(schema.installation.c.guard))


def audit(database: Database) -> list[dict]:
    with database.read() as connection:
        found = connection.execute(select(schema.audit).order_by(schema.audit.c.id)).all()
    return [{**row._mapping, "body": json.loads(row.body)} for row in found]


def opt_outs(database: Database) -> set[tuple[str, str, str]]:
    with database.read() as connection:
        columns = schema.opt_outs.c
        return {tuple(row) for row in connection.execute(select(columns.role, columns.category, columns.set_by))}


def standing(database: Database) -> set[tuple[str, str]]:
    with database.read() as connection:
        columns = schema.suppressions.c
        query = select(columns.cause, columns.source).where(columns.lifted_at.is_(None))
        return {tuple(row) for row in connection.execute(query)}


# ---------------------------------------------------------------- adding and changing


def test_a_new_account_gets_its_defaults(database: Database):
    change(
        database, PutAccount(AccountRecord("acme", "billtrust", contacts=(ContactRecord("c", "A@x.test", "a@x.test"),)))
    )
    found = one(database)
    (person,) = found.contacts
    assert (found.uses, person.roles, person.kind, person.products, person.unreachable) == (
        set(),
        (),
        "person",
        None,
        False,
    )


def test_what_is_absent_stays_as_it_is(database: Database):
    first = contact(
        "c1", "a@x.test", "accounting", kind="group", products=frozenset({"p"}), name="Ada", unreachable=True
    )
    change(database, PutAccount(account("acme", first, name="Acme", uses=frozenset({"invoicing"}))))
    before = one(database)
    came = change(
        database,
        PutAccount(AccountRecord("acme", "billtrust", contacts=(ContactRecord("c1", "a@x.test", "a@x.test"),))),
    )
    assert came.empty
    assert came.accounts_unchanged == came.contacts_unchanged == 1
    assert one(database) == before
    came = change(database, PutAccount(AccountRecord("acme", "billtrust")))
    assert came.empty
    assert one(database) == before


def test_a_list_of_contacts_replaces_the_known_ones(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test", "executive"), contact("c2", "b@x.test"))))
    came = change(
        database, PutAccount(account("acme", contact("c2", "b@x.test"), contact("c3", "c@x.test", "executive")))
    )
    assert [one.id for one in one(database).contacts] == ["c2", "c3"]
    assert came.contacts_added.first == ["acme/c3"]
    assert came.contacts_removed.first == ["acme/c1"]
    assert came.roles_given.first == ["acme/c3 executive"]
    assert came.roles_taken.first == ["acme/c1 executive"]
    assert came.accounts_changed.first == ["acme"]
    assert came.contacts_unchanged == 1


def test_contacts_stand_in_the_order_of_the_list(database: Database):
    people = {id_: contact(id_, f"{id_}@x.test") for id_ in "abcde"}
    for order in ("abc", "cab", "cdab", "cdeab", "ba", "abcde"):
        change(database, PutAccount(account("acme", *(people[id_] for id_ in order))))
        assert "".join(one.id for one in one(database).contacts) == order
    came = change(database, PutAccount(account("acme", *(people[id_] for id_ in "bacde"))))
    assert came.accounts_changed.count == 1
    assert came.contacts_unchanged == 5


def test_a_contact_comes_back_as_the_same_contact(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test", "executive", name="Ada"))))
    before = one(database).contacts[0]
    change(database, RemoveContact("acme", "c1"))
    assert one(database).contacts == ()
    came = change(database, PutContact("acme", "c1", email="a@x.test", roles=["executive"]))
    assert one(database).contacts[0] == before
    assert came.contacts_added.count == 1
    with database.read() as connection:
        (rows_of,) = contacts_of(connection, [one(database).number]).values()
        assert rows_of[0].name == ""


def test_a_removed_account_comes_back_with_defaults_under_its_number(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test"), uses=frozenset({"p"}), name="Acme")))
    number = one(database).number
    assert change(database, RemoveAccount("acme")).accounts_removed.first == ["acme"]
    assert one(database) is None
    came = change(database, PutAccount(AccountRecord("acme", "issuetrak")))
    assert came.accounts_added.first == ["acme"]
    back = one(database)
    assert (back.number, back.uses, back.contacts, back.catalogue) == (number, set(), (), "issuetrak")


def test_one_contact_can_be_changed_in_parts(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test", "executive"))))
    came = change(
        database, PutContact("acme", "c1", roles=["primary_support", "executive"], products=["p"], unreachable=True)
    )
    (person,) = one(database).contacts
    assert (person.roles, person.products, person.unreachable) == (("executive", "primary_support"), {"p"}, True)
    assert came.roles_given.first == ["acme/c1 primary_support"]
    change(database, PutContact("acme", "c2", email=" New@x.test "))
    assert [one.id for one in one(database).contacts] == ["c1", "c2"]
    assert one(database).contacts[1].email == "new@x.test"


def test_two_contacts_of_one_address_share_a_mailbox(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "Ada@x.test"), contact("c2", "ada@X.TEST"))))
    first, second = one(database).contacts
    assert first.mailbox == second.mailbox
    assert rows(database)["mailboxes"] == 1


def test_an_address_that_was_erased_is_known_again_by_its_key(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test"))))
    mailbox = one(database).contacts[0].mailbox
    change(database, Suppress(mailbox, "erased", "operator:anna"), RemoveContact("acme", "c1"))
    with database.write() as connection:
        connection.execute(schema.mailboxes.update().values(address=None))
    change(database, PutContact("acme", "c2", email="A@x.test"))
    found = one(database)
    assert found.contacts[0].mailbox == mailbox
    assert found.suppressed == {"a@x.test"}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ([PutContact("acme", "c1", kind="group")], "acme/c1", "needs a person"),
        ([PutContact("acme", "c1", roles=["boss"])], "acme/c1", "'boss' is no role of billtrust"),
        ([PutContact("acme", "c1", products=[])], "acme/c1", "products are empty"),
        ([PutAccount(AccountRecord("acme", "nothing"))], "acme", "'nothing' is no catalogue"),
        ([PutAccount(AccountRecord("acme", "issuetrak"))], "acme/c1", "'executive' is no role of issuetrak"),
        ([SetOptOut(("acme", "c1"), "boss", "webinar_invite", True, "operator")], "acme/c1", "'boss' is no role"),
        ([SetOptOut(("acme", "c1"), None, "weather", True, "operator")], "acme/c1", "'weather' is no category"),
        ([SetOptOut(("acme", "c1"), None, "invoice", True, "operator")], "acme/c1", "no role of billtrust may opt out"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_its_place(database: Database, changes, place: str, words: str):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test", "executive"))))
    before = rows(database), one(database)
    with pytest.raises(ChangeError, match=words) as refused:
        change(database, PutContact("acme", "c9", email="new@x.test"), *changes)
    assert refused.value.faults[0].place == place
    assert not isinstance(refused.value, NotFound)
    assert (rows(database), one(database)) == before


@pytest.mark.parametrize(
    "wrong",
    [
        RemoveAccount("nobody"),
        RemoveContact("nobody", "c1"),
        RemoveContact("acme", "c7"),
        PutContact("nobody", "c1", email="a@x.test"),
        PutContact("acme", "c7", name="No address"),
        SetOptOut(4711, None, "webinar_invite", True, "recipient"),
        SetOptOut(("acme", "c7"), None, "webinar_invite", True, "recipient"),
        Suppress(4711, "hard_bounce", "delivery:01X/1"),
        LiftSuppression("a@x.test"),
        LiftSuppression("nobody@x.test"),
        LiftSuppression(4711),
    ],
)
def test_what_is_not_there_is_told_apart_from_what_is_wrong(database: Database, wrong):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test", "executive"))))
    before = rows(database)
    with pytest.raises(NotFound):
        change(database, wrong)
    assert rows(database) == before


def test_a_failure_in_the_middle_of_writing_leaves_nothing_half_written(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test", "executive"))))
    before = rows(database), one(database), guard(database)

    def fail(_connection, _cursor, statement: str, *_others) -> None:
        if statement.startswith("INSERT INTO suppressions"):
            raise RuntimeError("the plug was pulled")

    event.listen(database.engine, "before_cursor_execute", fail)
    try:
        with pytest.raises(RuntimeError):
            change(
                database,
                PutAccount(account("new", contact("c1", "n@x.test"), bounced=("gone@x.test",))),
                PutContact("acme", "c1", roles=[]),
            )
    finally:
        event.remove(database.engine, "before_cursor_execute", fail)
    assert (rows(database), one(database), guard(database)) == before


# ---------------------------------------------------------------- what is accepted and void


def test_holders_beyond_a_limit_are_accepted_and_told(database: Database):
    people = [contact(f"c{n}", f"c{n}@x.test", "primary_contact") for n in range(5)]
    came = change(database, PutAccount(account("acme", *people, catalogue="issuetrak")))
    assert len(one(database).contacts) == 5
    assert "acme: more than 3 hold primary_contact; it is void for c3, c4 (S-41)" in came.notes.first


def test_a_vacant_role_that_has_to_be_held_is_told(database: Database):
    came = change(database, PutAccount(account("acme", catalogue="issuetrak", uses=frozenset({"chat"}))))
    assert came.notes.first == [
        "acme: nobody holds primary_contact, which is required (S-43)",
        "acme: nobody holds invoice_primary, which is required (S-43)",
        "acme: nobody holds chat_admin, which is conditional (S-43)",
    ]
    assert change(database, PutAccount(account("bare", catalogue="billtrust"))).notes.count == 0


def test_an_opt_out_that_the_catalogue_does_not_allow_is_accepted_void_and_told(database: Database):
    wishes = (OptOutRecord("accounting", "invoice"), OptOutRecord("executive", "webinar_invite"))
    came = change(database, PutAccount(account("acme", contact("c1", "a@x.test", "accounting", opt_outs=wishes))))
    assert came.notes.first == [
        "acme/c1 accounting:invoice (import): the catalogue does not allow this opt-out; it is void (S-23)"
    ]
    assert len(opt_outs(database)) == 2


# ---------------------------------------------------------------- opt-outs and who set them


def put_wishes(database: Database, *wishes: OptOutRecord, actor: Actor = IMPORT):
    return change(
        database, PutAccount(account("acme", contact("c1", "a@x.test", "executive", opt_outs=wishes))), actor=actor
    )


def test_an_import_adds_opt_outs_and_lifts_only_what_imports_and_operators_set(database: Database):
    put_wishes(database, OptOutRecord("executive", "announcement"))
    who = ("acme", "c1")
    change(
        database,
        SetOptOut(who, "executive", "webinar_invite", True, "recipient"),
        SetOptOut(who, "executive", "corporate_communication", True, "operator"),
        SetOptOut(who, "executive", "announcement", True, "complaint"),
    )
    came = put_wishes(database)
    assert opt_outs(database) == {
        ("executive", "webinar_invite", "recipient"),
        ("executive", "announcement", "complaint"),
    }
    assert sorted(came.opt_outs_kept.first) == [
        "acme/c1 executive:announcement (complaint)",
        "acme/c1 executive:webinar_invite (recipient)",
    ]
    assert came.opt_outs_lifted.count == 2


def test_an_operator_does_not_undo_what_a_recipient_asked_for(database: Database):
    put_wishes(database)
    change(database, SetOptOut(("acme", "c1"), "executive", "webinar_invite", True, "recipient"))
    came = change(database, SetOptOut(("acme", "c1"), "executive", "webinar_invite", False, "operator"))
    assert came.opt_outs_kept.count == 1
    assert opt_outs(database) == {("executive", "webinar_invite", "recipient")}


def test_a_recipient_undoes_everything_but_a_complaint(database: Database):
    every = [
        OptOutRecord("executive", "announcement", by=by) for by in ("recipient", "operator", "import", "complaint")
    ]
    put_wishes(database, *every)
    change(database, SetOptOut(one(database).contacts[0].number, "executive", "announcement", False, "recipient"))
    assert opt_outs(database) == {("executive", "announcement", "complaint")}
    change(database, SetOptOut(("acme", "c1"), "executive", "announcement", False, "operator"))
    assert opt_outs(database) == set()


def test_no_role_means_every_role_that_may_opt_out(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test", "primary_support"))))
    change(database, SetOptOut(("acme", "c1"), None, "service_communication", True, "recipient"))
    assert {role for role, *_ in opt_outs(database)} == {"primary_support", "secondary_support", "communication_only"}


def test_a_recipient_who_wants_promotional_mail_again_gets_it_in_every_account(database: Database):
    for ext in ("acme", "two", "three"):
        change(
            database, PutAccount(account(ext, contact("c1", f"{'b' if ext == 'three' else 'a'}@x.test", "executive")))
        )
        change(database, SetOptOut((ext, "c1"), "executive", "webinar_invite", True, "recipient"))
        change(database, SetOptOut((ext, "c1"), "executive", "announcement", True, "recipient"))
    came = change(database, SetOptOut(("acme", "c1"), "executive", "webinar_invite", False, "recipient"))
    assert sorted(came.opt_outs_lifted.first) == [
        "acme/c1 executive:webinar_invite (recipient)",
        "two/c1 executive:webinar_invite (recipient)",
    ]
    assert one(database, "two").opted_out == frozenset()
    assert one(database, "two").contacts[0].opt_outs == {("executive", "announcement")}
    assert one(database, "three").opted_out == {("b@x.test", "webinar_invite")}


def test_an_opt_out_set_twice_keeps_its_first_time(database: Database):
    put_wishes(database)
    for now in (NOW, NOW + 5):
        change(database, SetOptOut(("acme", "c1"), "executive", "announcement", True, "recipient"), now=now)
    with database.read() as connection:
        assert connection.scalars(select(schema.opt_outs.c.set_at)).all() == [NOW]


# ---------------------------------------------------------------- suppressions


def test_bounced_addresses_of_a_document_are_never_lifted_by_it(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test"), bounced=("a@x.test",))), actor=IMPORT)
    assert standing(database) == {("hard_bounce", "import:acme")}
    came = change(
        database, PutAccount(account("acme", contact("c1", "a@x.test"), bounced=(), suppressions=())), actor=IMPORT
    )
    assert standing(database) == {("hard_bounce", "import:acme")}
    assert came.suppressions_kept.first == ["a@x.test hard_bounce (import:acme)"]
    assert came.empty


def test_an_import_lifts_what_it_set_for_the_operator_and_keeps_what_others_set(database: Database):
    said = (SuppressionRecord("a@x.test", "operator"),)
    change(database, PutAccount(account("acme", contact("c1", "a@x.test"), suppressions=said)), actor=IMPORT)
    change(database, Suppress("a@x.test", "operator", "operator:anna"))
    came = change(database, PutAccount(account("acme", contact("c1", "a@x.test"), suppressions=())), actor=IMPORT)
    assert standing(database) == {("operator", "operator:anna")}
    assert came.suppressions_lifted.first == ["a@x.test operator (import:acme)"]
    assert came.suppressions_kept.first == ["a@x.test operator (operator:anna)"]


def test_a_document_does_not_say_again_what_a_delivery_said(database: Database):
    change(database, Suppress("a@x.test", "hard_bounce", "delivery:01X/7", "550"))
    said = (SuppressionRecord("a@x.test", "hard_bounce"),)
    came = change(database, PutAccount(account("acme", contact("c1", "a@x.test"), suppressions=said)), actor=IMPORT)
    assert came.suppressions_set.count == 0
    assert standing(database) == {("hard_bounce", "delivery:01X/7")}


def test_an_address_can_be_suppressed_again_after_it_was_lifted(database: Database):
    for turn in range(2):
        change(database, Suppress("a@x.test", "operator", "operator:anna"), now=NOW + turn)
        assert standing(database) == {("operator", "operator:anna")}
        change(database, LiftSuppression("A@x.test"))
        assert standing(database) == set()


def test_an_erased_address_is_not_freed_with_the_others(database: Database):
    change(database, Suppress("a@x.test", "operator", "operator:anna"), Suppress("a@x.test", "erased", "operator:anna"))
    change(database, LiftSuppression("a@x.test"))
    assert standing(database) == {("erased", "operator:anna")}


# ---------------------------------------------------------------- guard and audit


@pytest.mark.parametrize(
    ("changes", "raised"),
    [
        ([SetOptOut(("acme", "c1"), "executive", "announcement", True, "recipient")], 1),
        ([Suppress("a@x.test", "hard_bounce", "x"), Suppress("b@x.test", "hard_bounce", "x")], 1),
        ([RemoveContact("acme", "c1")], 1),
        ([RemoveAccount("acme")], 1),
        ([PutContact("acme", "c1", email="b@x.test")], 1),
        ([PutContact("acme", "c1", email="A@x.test")], 0),
        ([PutContact("acme", "c1", name="Ada")], 0),
        ([PutAccount(AccountRecord("new", "billtrust"))], 0),
        ([], 0),
    ],
)
def test_the_guard_rises_once_where_a_reason_to_mail_may_be_gone(database: Database, changes, raised: int):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test", "executive"))))
    before = guard(database)
    change(database, *changes)
    assert guard(database) - before == raised


def test_the_audit_tells_who_when_why_before_and_after_by_numbers(database: Database):
    change(
        database,
        PutAccount(account("acme", contact("c1", "secret@x.test", "executive", name="Ada Secret"))),
        why="new customer",
    )
    change(
        database,
        PutContact("acme", "c1", email="hidden@x.test", roles=["accounting"], name="Ada Hidden"),
        SetOptOut(("acme", "c1"), "executive", "announcement", True, "operator"),
        Suppress("secret@x.test", "hard_bounce", "operator:anna"),
        now=NOW + 1,
        why="she asked by phone",
    )
    added, changed, suppressed = audit(database)
    assert (added["actor"], added["door"], added["at"], added["kind"]) == ("cli:anna", "cli", NOW, "added")
    assert added["body"]["why"] == "new customer"
    person = one(database).contacts[0]
    assert added["body"]["contacts"] == {"count": 1, "first": person.number}
    assert (changed["account_id"], changed["kind"], changed["at"]) == (one(database).number, "changed", NOW + 1)
    told = changed["body"]["contacts"][str(person.number)]
    assert told["before"]["roles"] == ["executive"]
    assert told["after"]["roles"] == ["accounting"]
    assert told["after"]["mailbox"] == person.mailbox != told["before"]["mailbox"]
    assert changed["body"]["opt_outs"] == {"set": [[person.number, "executive", "announcement", "operator"]]}
    assert suppressed["body"]["set"] == [[told["before"]["mailbox"], "hard_bounce", "operator:anna"]]
    assert not any(word in json.dumps(audit(database)) for word in ("secret@", "hidden@", "Secret", "Hidden"))


def test_a_change_that_changes_nothing_leaves_no_trace(database: Database):
    change(database, PutAccount(account("acme", contact("c1", "a@x.test", "executive"))))
    before = rows(database)
    change(database, PutContact("acme", "c1", roles=["executive"]), PutAccount(AccountRecord("acme", "billtrust")))
    assert rows(database) == before


def test_a_plan_says_what_the_change_then_does_and_writes_nothing(database: Database):
    changes = [PutAccount(account("acme", contact("c1", "a@x.test", "executive"), bounced=("b@x.test",)))]
    before = rows(database)
    with database.read() as connection:
        planned = plan_batches(connection, ANNA, [changes], catalogues=CATALOGUES, now=NOW)
    assert rows(database) == before
    assert planned == change(database, *changes)


def test_a_difference_counts_everything_and_names_the_first(database: Database):
    came = change(database, *(PutAccount(AccountRecord(f"a{n}", "billtrust")) for n in range(LISTED + 5)))
    assert came.accounts_added.count == LISTED + 5
    assert len(came.accounts_added.first) == LISTED
    assert came.to_json()["accounts"]["added"]["count"] == LISTED + 5
    assert [(what, count) for what, count, _ in came.lines()] == [("accounts added", LISTED + 5)]


def test_a_batch_costs_the_same_number_of_statements_however_many_contacts_it_has(database: Database):
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    costs = []
    for ext, size in (("small", 1), ("large", 300)):
        statements.clear()
        change(
            database,
            PutAccount(account(ext, *(contact(f"c{n}", f"{ext}{n}@x.test", "executive") for n in range(size)))),
        )
        costs.append(len(statements))
    assert costs[0] == costs[1] < 20
