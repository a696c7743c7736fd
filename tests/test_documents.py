from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subscriptions.addresses import normalise
from subscriptions.audience import AccountFacts, ContactFacts
from subscriptions.catalogue import load_catalogues
from subscriptions.documents import (
    ABSENT,
    MAX_FAULTS,
    AccountRecord,
    ContactRecord,
    DocumentError,
    OptOutRecord,
    SuppressionRecord,
    facts,
    read_accounts,
    write_accounts,
)
from tests.shared import shared

CATALOGUES = load_catalogues()

ACME = {
    "id": "acme",
    "name": "Acme Corp",
    "catalogue": "billtrust",
    "uses": ["invoicing", "payments"],
    "bounced": [" Gone@Acme.Example "],
    "contacts": [
        {
            "id": "c1",
            "name": "Ada",
            "email": " Ada@Acme.Example",
            "kind": "person",
            "roles": ["executive", "primary_support"],
            "products": None,
            "opt_outs": [{"role": "executive", "category": "webinar_invite"}],
        },
        {"id": "c2", "email": "bills@acme.example", "kind": "group", "roles": ["accounting"], "products": ["payments"]},
    ],
}


def read(data: bytes | str | dict, name: str = "directory.json") -> list[AccountRecord]:
    if isinstance(data, dict):
        data = json.dumps(data)
    stream = io.BytesIO(data.encode() if isinstance(data, str) else data)
    return list(read_accounts(stream, catalogues=CATALOGUES, name=name))


def one(account: dict) -> AccountRecord:
    (record,) = read({"accounts": [account]})
    return record


def with_contact(**contact: object) -> dict:
    return {"id": "acme", "catalogue": "billtrust", "contacts": [{"id": "c1", "email": "a@acme.example"} | contact]}


# ---------------------------------------------------------------- what is read


def test_an_account_is_read_as_it_stands_in_the_document():
    assert one(ACME) == AccountRecord(
        id="acme",
        catalogue="billtrust",
        name="Acme Corp",
        uses=frozenset({"invoicing", "payments"}),
        bounced=("gone@acme.example",),
        contacts=(
            ContactRecord(
                id="c1",
                email="Ada@Acme.Example",
                address="ada@acme.example",
                name="Ada",
                kind="person",
                roles=("executive", "primary_support"),
                products=None,
                opt_outs=(OptOutRecord("executive", "webinar_invite"),),
            ),
            ContactRecord(
                id="c2",
                email="bills@acme.example",
                address="bills@acme.example",
                kind="group",
                roles=("accounting",),
                products=frozenset({"payments"}),
            ),
        ),
    )


def test_an_absent_key_is_told_from_an_empty_one():
    bare = one({"id": "acme", "catalogue": "billtrust"})
    assert (bare.name, bare.uses, bare.bounced, bare.suppressions, bare.contacts) == (ABSENT,) * 5
    empty = one({"id": "acme", "catalogue": "billtrust", "name": None, "uses": [], "bounced": [], "contacts": []})
    assert (empty.name, empty.uses, empty.bounced, empty.contacts) == (None, frozenset(), (), ())
    contact = one(with_contact()).contacts[0]
    assert {contact.roles, contact.products, contact.opt_outs, contact.kind, contact.unreachable} == {ABSENT}
    assert one(with_contact(products=None)).contacts[0].products is None


def test_who_set_an_opt_out_and_when_is_read():
    opt_outs = [{"role": "executive", "category": "announcement", "by": "recipient", "at": "2026-11-21T11:00:00+01:00"}]
    (opt_out,) = one(with_contact(opt_outs=opt_outs)).contacts[0].opt_outs
    assert opt_out == OptOutRecord("executive", "announcement", by="recipient", at=1_795_255_200_000_000)


def test_suppressions_are_read_with_cause_setter_and_time():
    told = {"address": "X@acme.example", "cause": "complaint", "by": "complaint", "at": "1970-01-01T00:00:01.5Z"}
    account = {"id": "acme", "catalogue": "billtrust", "suppressions": [told]}
    assert one(account).suppressions == (SuppressionRecord("x@acme.example", "complaint", "complaint", 1_500_000),)


def test_too_many_holders_and_void_opt_outs_are_no_faults():
    contacts = [{"id": f"c{n}", "email": f"c{n}@acme.example", "roles": ["quote_approver"]} for n in range(3)]
    contacts[0]["opt_outs"] = [{"role": "quote_approver", "category": "quote"}]
    contacts[1]["opt_outs"] = [{"role": "chat_admin", "category": "announcement"}]  # neither held nor in the catalogue
    assert len(one({"id": "acme", "catalogue": "issuetrak", "contacts": contacts}).contacts) == 3


ACCOUNT_LINE = '{"id": "acme", "catalogue": "billtrust"}'


@pytest.mark.parametrize(
    "document",
    [
        f'{{"accounts": [{ACCOUNT_LINE}]}}',
        f'\n\n {{"accounts":\n [{ACCOUNT_LINE}]\n}}\n\n',
        f'{{\n  "accounts": [\n    {ACCOUNT_LINE}\n  ]\n}}',
        ACCOUNT_LINE,
        f"\n{ACCOUNT_LINE}\r\n\n",
        f"\ufeff{ACCOUNT_LINE}\n",
        f'\ufeff{{"accounts": [{ACCOUNT_LINE}]}}',
    ],
)
def test_json_is_told_from_json_lines_by_its_first_line(document):
    assert [account.id for account in read(document)] == ["acme"]


def test_a_document_of_no_accounts_has_none():
    assert read('{"accounts": []}') == []


# ---------------------------------------------------------------- what is refused, and where

FAULTS = [
    # (the account, the place in the account, what the sentence says)
    ({"catalogue": "billtrust"}, "", "'id' is missing"),
    ({"id": "acme"}, "", "'catalogue' is missing"),
    ({"id": "a b", "catalogue": "billtrust"}, "/id", '"a b" is no id'),
    ({"id": "", "catalogue": "billtrust"}, "/id", '"" is no id'),
    ({"id": "a" * 65, "catalogue": "billtrust"}, "/id", "is no id"),
    ({"id": "acme\n", "catalogue": "billtrust"}, "/id", "is no id"),
    ({"id": 7, "catalogue": "billtrust"}, "/id", "7 is no id"),
    ({"id": "acme", "catalogue": "biltrust"}, "/catalogue", "known are billtrust, issuetrak"),
    ({"id": "acme", "catalogue": ["billtrust"]}, "/catalogue", "is no catalogue"),
    ({"id": "acme", "catalogue": "billtrust", "contact": []}, "/contact", "unknown key; did you mean 'contacts'?"),
    ({"id": "acme", "catalogue": "billtrust", "name": 1}, "/name", "must be a text or null, not a number"),
    ({"id": "acme", "catalogue": "billtrust", "uses": "chat"}, "/uses", "must be a list, not a text"),
    ({"id": "acme", "catalogue": "billtrust", "uses": ["a", 1]}, "/uses/1", "1 is no product"),
    ({"id": "acme", "catalogue": "billtrust", "uses": ["a;b"]}, "/uses/0", "is no product"),
    ({"id": "acme", "catalogue": "billtrust", "bounced": ["x"]}, "/bounced/0", "'x' is not a mail address"),
    ({"id": "acme", "catalogue": "billtrust", "bounced": [None]}, "/bounced/0", "must be a text, not null"),
    ({"id": "acme", "catalogue": "billtrust", "suppressions": [{"cause": "operator"}]}, "/suppressions/0", "'address'"),
    (
        {"id": "acme", "catalogue": "billtrust", "suppressions": [{"address": "a@b.test", "cause": "Why?"}]},
        "/suppressions/0/cause",
        "is no cause",
    ),
    ({"id": "acme", "catalogue": "billtrust", "suppressions": ["a@b.test"]}, "/suppressions/0", "must be an object"),
    ({"id": "acme", "catalogue": "billtrust", "contacts": {}}, "/contacts", "must be a list, not an object"),
    ({"id": "acme", "catalogue": "billtrust", "contacts": ["c1"]}, "/contacts/0", "must be an object, not a text"),
    ({"id": "acme", "catalogue": "billtrust", "contacts": [{"id": "c1"}]}, "/contacts/0", "'email' is missing"),
    (
        {"id": "acme", "catalogue": "billtrust", "contacts": [{"email": "a@b.test"}]},
        "/contacts/0",
        "The key 'id' is missing",
    ),
    (with_contact(id="c/1"), "/contacts/0/id", '"c/1" is no id'),
    (with_contact(email="ada@acme"), "/contacts/0/email", "'ada@acme' is not a mail address"),
    (with_contact(email=["a@b.test"]), "/contacts/0/email", "must be a text, not a list"),
    (with_contact(phone="1"), "/contacts/0/phone", '"phone" is an unknown key'),
    (with_contact(name=["Ada"]), "/contacts/0/name", "must be a text or null"),
    (with_contact(kind="robot"), "/contacts/0/kind", '"robot" is no kind of contact; use person or group'),
    (with_contact(kind=None), "/contacts/0/kind", "null is no kind"),
    (with_contact(roles="executive"), "/contacts/0/roles", "must be a list of role keys"),
    (
        with_contact(roles=["executive", "ceo"]),
        "/contacts/0/roles/1",
        '"ceo" is no role of billtrust; its roles are exec',
    ),
    (with_contact(roles=[["executive"]]), "/contacts/0/roles/0", "is no role of billtrust"),
    (with_contact(roles=["executive"], kind="group"), "/contacts/0/roles/0", "needs a person"),
    (with_contact(products=[]), "/contacts/0/products", "'products' is empty; write null for all"),
    (with_contact(products="payments"), "/contacts/0/products", "must be a list"),
    (with_contact(products=[""]), "/contacts/0/products/0", "is no product"),
    (with_contact(unreachable="yes"), "/contacts/0/unreachable", "must be true or false, not a text"),
    (with_contact(locale="deutsch!"), "/contacts/0/locale", "is no language tag"),
    (with_contact(timezone="Mars/Olympus"), "/contacts/0/timezone", "is no timezone"),
    (with_contact(timezone="../etc/passwd"), "/contacts/0/timezone", "is no timezone"),
    (with_contact(opt_outs={}), "/contacts/0/opt_outs", "must be a list"),
    (with_contact(opt_outs=["executive:announcement"]), "/contacts/0/opt_outs/0", "must be an object"),
    (with_contact(opt_outs=[{"role": "executive"}]), "/contacts/0/opt_outs/0", "'category' is missing"),
    (
        with_contact(opt_outs=[{"role": "ceo", "category": "announcement"}]),
        "/contacts/0/opt_outs/0/role",
        '"ceo" is no role',
    ),
    (
        with_contact(opt_outs=[{"role": "executive", "category": "anouncement"}]),
        "/contacts/0/opt_outs/0/category",
        "did you mean 'announcement'?",
    ),
    (
        with_contact(opt_outs=[{"role": "executive", "category": "announcement", "by": "me"}]),
        "/contacts/0/opt_outs/0/by",
        "use recipient, operator, import or complaint",
    ),
    (
        with_contact(opt_outs=[{"role": "executive", "category": "announcement", "who": "me"}]),
        "/contacts/0/opt_outs/0/who",
        "unknown key",
    ),
    *(
        (
            with_contact(opt_outs=[{"role": "executive", "category": "announcement", "at": at}]),
            "/contacts/0/opt_outs/0/at",
            "is no time",
        )
        for at in ("2026-11-21", "2026-11-21T10:00:00", "2026-02-30T10:00:00Z", "2026-11-21 10:00:00Z", 7, None)
    ),
    ([], "", "must be an object, not a list"),
    (None, "", "must be an object, not null"),
]


@pytest.mark.parametrize(("account", "place", "sentence"), FAULTS)
def test_a_fault_is_refused_with_its_place(account, place, sentence):
    with pytest.raises(DocumentError) as refused:
        read({"accounts": [{"id": "first", "catalogue": "issuetrak"}, account]})
    (fault,) = refused.value.faults
    assert fault.place == "/accounts/1" + place
    assert sentence in fault.message
    text = str(refused.value)
    assert text.startswith(f"directory.json, /accounts/1{place}: ")
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize(("account", "place", "sentence"), FAULTS)
def test_a_fault_in_json_lines_is_refused_with_its_line(account, place, sentence):
    with pytest.raises(DocumentError) as refused:
        read(f'{{"id": "first", "catalogue": "issuetrak"}}\n\n{json.dumps(account)}\n')
    (fault,) = refused.value.faults
    assert fault.place == (f"line 3, {place}" if place else "line 3")
    assert sentence in fault.message


def test_an_account_id_that_stands_twice_is_refused():
    for document in ('{"accounts": [%s, %s]}', "%s\n%s"):
        with pytest.raises(DocumentError, match=r'/id: The account id "acme" stands twice'):
            read(document % (ACCOUNT_LINE, ACCOUNT_LINE))


def test_a_contact_id_that_stands_twice_in_its_account_is_refused_and_in_two_accounts_is_not():
    contact = {"id": "c1", "email": "a@acme.example"}
    twice = {"id": "acme", "catalogue": "billtrust", "contacts": [contact, contact]}
    with pytest.raises(DocumentError, match=r'/accounts/0/contacts/1/id: The contact id "c1" stands twice'):
        one(twice)
    accounts = [{"id": id_, "catalogue": "billtrust", "contacts": [contact]} for id_ in ("acme", "bolt")]
    assert len(read({"accounts": accounts})) == 2


@pytest.mark.parametrize(
    ("document", "place", "sentence"),
    [
        ("", "", "document is empty"),
        (" \n\n", "", "document is empty"),
        ("[]", "", "not a bare list"),
        ("{}", "line 1", "'id' is missing"),
        ("{\n}", "/accounts", "list of accounts under 'accounts'"),
        ('{"accounts": {}}', "/accounts", "list of accounts"),
        ('{"accounts": [], "version": 1}', "/version", "unknown key"),
        ('{"accounts": [], "accounts": []}', "/accounts", "duplicate key"),
        ('\n{"accounts": [\n{"id": "a",}]}', "line 3", "line 3, column 12"),
        ('{"accounts": [{"id": "a\\u0000"}]}', "/accounts/0/id", "U+0000"),
        ('{"accounts": [{"id": "\\ud800"}]}', "/accounts/0/id", "surrogate"),
        ('{"accounts": [NaN]}', "/accounts/0", "NaN"),
        ('{"accounts": []}\n{"accounts": []}', "line 2", "extra data"),
        (ACCOUNT_LINE + '\n{"id": "b", "id": "b"}', "line 2, /id", "duplicate key"),
        (ACCOUNT_LINE + '\n\n{"id": ', "line 3", "line 3, column"),
        (ACCOUNT_LINE + '\n{"accounts": []}', "line 2, /accounts", "unknown key"),
        ("account,catalogue,id\nacme,billtrust,c1\n", "line 1", "broken at line 1"),
        (b'\n{"accounts": ["\xff"]}', "line 2", "not UTF-8"),
        (ACCOUNT_LINE.encode() + b"\n\xff\n", "line 2", "not UTF-8"),
    ],
)
def test_a_document_that_is_none_is_refused(document, place, sentence):
    with pytest.raises(DocumentError) as refused:
        read(document)
    first = refused.value.faults[0]
    assert first.place == place
    assert sentence in first.message


def test_all_faults_are_told_and_the_sentence_counts_them():
    account = with_contact(email="nobody", roles=["ceo"], products=[])
    with pytest.raises(DocumentError) as refused:
        one(account | {"uses": [7]})
    places = [fault.place for fault in refused.value.faults]
    contact = "/accounts/0/contacts/0"
    assert places == ["/accounts/0/uses/0", f"{contact}/email", f"{contact}/roles/0", f"{contact}/products"]
    assert str(refused.value).endswith("(3 more faults).")


def test_reading_stops_at_the_hundredth_fault():
    def endless() -> Iterator[bytes]:
        while True:
            yield b"{}\n"

    class Endless(io.RawIOBase):
        lines = endless()

        def readline(self, size: int | None = -1) -> bytes:
            return next(self.lines)

    with pytest.raises(DocumentError, match=r"at least 99 more faults") as refused:
        list(read_accounts(Endless(), catalogues=CATALOGUES, name="endless.jsonl"))
    assert len(refused.value.faults) == MAX_FAULTS


def test_after_the_first_fault_no_account_is_passed_on():
    accounts = read_accounts(
        io.BytesIO(f'{ACCOUNT_LINE}\n{{}}\n{{"id": "bolt", "catalogue": "billtrust"}}\n'.encode()),
        catalogues=CATALOGUES,
        name="directory.jsonl",
    )
    assert next(accounts).id == "acme"
    with pytest.raises(DocumentError, match=r"directory\.jsonl, line 2: The key 'id' is missing \(1 more fault\)\."):
        next(accounts)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["acme", "billtrust", "executive", "a@b.test"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "catalogue", "contacts", "email", "roles", "opt_outs", "role", "category", "products", "x"]
            ),
            inner,
        )
    ),
)


@given(st.one_of(st.binary(), JSON_VALUES.map(lambda value: json.dumps(value).encode())))
def test_any_bytes_are_read_or_refused_in_one_sentence(data):
    for document in (data, b'{"accounts": [' + data + b"]}"):
        try:
            read(document)
        except DocumentError as error:
            message = str(error)
        else:
            continue
        assert message.isprintable()
        assert message.endswith(".")


# ---------------------------------------------------------------- facts


def facts_of(*accounts: dict) -> dict[str, AccountFacts]:
    return facts(iter(read({"accounts": list(accounts)})), CATALOGUES)


def test_the_resolver_sees_defaults_for_what_is_absent():
    acme = facts_of(with_contact())["acme"]
    assert acme == AccountFacts(
        id="acme",
        catalogue="billtrust",
        uses=frozenset(),
        contacts=(ContactFacts(id="c1", email="a@acme.example", roles=()),),
    )


def test_the_resolver_sees_all_of_an_account():
    acme = facts_of(ACME)["acme"]
    assert acme.uses == {"invoicing", "payments"}
    assert acme.contacts == (
        ContactFacts(
            id="c1",
            email="ada@acme.example",
            roles=("executive", "primary_support"),
            opt_outs=frozenset({("executive", "webinar_invite")}),
        ),
        ContactFacts("c2", "bills@acme.example", ("accounting",), "group", frozenset({"payments"})),
    )


def test_bounced_addresses_and_suppressions_hold_in_every_account_of_the_document():
    bolt = {"id": "bolt", "catalogue": "issuetrak", "bounced": ["B@bolt.example"]}
    bolt["suppressions"] = [
        {"address": "c@bolt.example", "cause": "operator"},
        {"address": "d@bolt.example", "cause": "complaint"},
    ]
    both = facts_of(ACME, bolt)
    for account in both.values():
        assert account.suppressed == {"gone@acme.example", "b@bolt.example", "c@bolt.example"}
        assert account.complained == {"d@bolt.example"}


def test_a_promotional_opt_out_holds_for_the_address_across_the_document_and_another_does_not():
    ada = with_contact(
        email="Ada@Shared.example",
        opt_outs=[
            {"role": "accounting", "category": "webinar_invite"},
            {"role": "executive", "category": "announcement"},
        ],
    )
    bolt = {"id": "bolt", "catalogue": "issuetrak", "contacts": [{"id": "c9", "email": "ada@shared.example"}]}
    both = facts_of(ada, bolt)
    assert both["bolt"].opted_out == {("ada@shared.example", "webinar_invite")}
    assert both["bolt"].contacts[0].opt_outs == frozenset()
    assert both["acme"].contacts[0].opt_outs == {("accounting", "webinar_invite"), ("executive", "announcement")}


def test_an_opt_out_by_complaint_is_a_complaint_of_the_address():
    opt_outs = [{"role": "executive", "category": "announcement", "by": "complaint"}]
    acme = facts_of(with_contact(opt_outs=opt_outs))["acme"]
    assert acme.complained == {"a@acme.example"}
    assert acme.suppressed == frozenset()


def test_the_accounts_of_the_example_scenarios_become_facts():
    lines = shared("scenarios", "examples.jsonl").read_text(encoding="utf-8").splitlines()
    for scenario in map(json.loads, lines):
        account = scenario["account"] | {"catalogue": scenario["catalogue"]}
        read_facts = facts_of(account)[account["id"]]
        assert [contact.id for contact in read_facts.contacts] == [contact["id"] for contact in account["contacts"]]
        assert read_facts.suppressed == {normalise(address) for address in account["bounced"]}


# ---------------------------------------------------------------- writing, and reading back

IDS = st.text("abcXYZ019._-", min_size=1, max_size=64)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
ADDRESSES = st.builds("{}@{}.example".format, st.text("abAB.é", min_size=1, max_size=6), st.sampled_from(["A", "bü"]))
GOOD_ADDRESSES = ADDRESSES.filter(lambda text: ".." not in text and not text.startswith(".") and ".@" not in text)
PRODUCTS = st.frozensets(st.sampled_from(["invoicing", "payments", "Digital lockbox", "chat"]))
TIMES = st.none() | st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999)
SETTERS = st.sampled_from(["recipient", "operator", "import", "complaint"])


def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.just(ABSENT), strategy)


@st.composite
def account_records(draw: st.DrawFn, id_: str) -> AccountRecord:
    catalogue = CATALOGUES[draw(st.sampled_from(sorted(CATALOGUES)))]
    roles = st.sampled_from(sorted(catalogue.roles))
    group_roles = st.sampled_from(sorted(key for key, role in catalogue.roles.items() if "group" in role.holder_kinds))
    categories = st.sampled_from(sorted(catalogue.vocabulary.categories))
    opt_outs = st.builds(OptOutRecord, roles, categories, SETTERS, TIMES)
    contacts = []
    for contact_id in draw(st.lists(IDS, unique=True, max_size=3)):
        email = draw(GOOD_ADDRESSES)
        kind = draw(maybe(st.sampled_from(["person", "group"])))
        contacts.append(
            ContactRecord(
                id=contact_id,
                email=email,
                address=normalise(email),
                name=draw(maybe(st.none() | TEXTS)),
                kind=kind,
                roles=draw(maybe(st.lists(group_roles if kind == "group" else roles, unique=True).map(tuple))),
                products=draw(maybe(st.none() | PRODUCTS.filter(bool))),
                opt_outs=draw(maybe(st.lists(opt_outs, max_size=2).map(tuple))),
                locale=draw(maybe(st.sampled_from([None, "en", "de-AT"]))),
                timezone=draw(maybe(st.sampled_from([None, "UTC", "Europe/Vienna"]))),
                unreachable=draw(maybe(st.booleans())),
            )
        )
    addresses = GOOD_ADDRESSES.map(normalise)
    suppressions = st.builds(SuppressionRecord, addresses, st.sampled_from(["operator", "complaint"]), SETTERS, TIMES)
    return AccountRecord(
        id=id_,
        catalogue=catalogue.key,
        name=draw(maybe(st.none() | TEXTS)),
        uses=draw(maybe(PRODUCTS)),
        bounced=draw(maybe(st.lists(addresses, max_size=2).map(tuple))),
        suppressions=draw(maybe(st.lists(suppressions, max_size=2).map(tuple))),
        contacts=draw(maybe(st.just(tuple(contacts)))),
    )


DIRECTORIES = st.lists(IDS, unique=True, min_size=1, max_size=3).flatmap(
    lambda ids: st.tuples(*(account_records(id_) for id_ in ids))
)


@given(DIRECTORIES, st.booleans())
def test_what_is_written_is_read_back_without_loss(records, lines):
    stream = io.BytesIO()
    write_accounts(records, stream, lines=lines)
    stream.seek(0)
    assert tuple(read_accounts(stream, catalogues=CATALOGUES, name="again")) == records


def test_an_empty_directory_is_written_as_a_document_that_is_read_back():
    stream = io.BytesIO()
    write_accounts([], stream, lines=False)
    assert read(stream.getvalue()) == []


# ---------------------------------------------------------------- speed and memory


def many(number: int) -> dict:
    contacts = [
        {
            "id": f"c{index}",
            "name": "Ada Lovelace",
            "email": f"Ada.{index}@acct-{number}.example",
            "kind": "person",
            "roles": ["executive", "primary_support"],
            "products": None,
            "opt_outs": [],
        }
        for index in range(5)
    ]
    return {"id": f"acct-{number}", "catalogue": "billtrust", "uses": ["invoicing"], "contacts": contacts}


def test_five_thousand_accounts_become_facts_within_seconds():
    data = json.dumps({"accounts": [many(number) for number in range(5_000)]}).encode()
    started = time.perf_counter()
    assert len(facts(read_accounts(io.BytesIO(data), catalogues=CATALOGUES, name="many"), CATALOGUES)) == 5_000
    assert time.perf_counter() - started < 4  # about 0.7 on a quiet machine


MEMORY = """
import resource, sys
from subscriptions.catalogue import load_catalogues
from subscriptions.documents import read_accounts
catalogues = load_catalogues()
most = []
for path in sys.argv[1:]:
    with open(path, "rb") as stream:
        assert sum(1 for _ in read_accounts(stream, catalogues=catalogues, name=path)) > 0
    most.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(most[1] - most[0])
"""


def test_json_lines_are_read_in_flat_memory(tmp_path):
    few, lots = tmp_path / "few.jsonl", tmp_path / "lots.jsonl"
    few.write_text("".join(json.dumps(many(number)) + "\n" for number in range(100)))
    lots.write_text("".join(json.dumps(many(number)) + "\n" for number in range(10_000)))
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(few), str(lots)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    grown = int(ran.stdout) / (1024 if sys.platform != "darwin" else 1024**2)  # megabytes
    assert lots.stat().st_size > 7_000_000
    assert grown < 4
