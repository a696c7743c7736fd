"""Import and export of the directory: all or nothing, nothing lost, nothing of others lifted."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, func, select, text

from subscriptions import directory, schema
from subscriptions.catalogue import load_catalogues
from subscriptions.changes import Actor, Change, ChangeError, PutContact, RemoveContact, SetOptOut, Suppress, apply
from subscriptions.database import Database
from subscriptions.documents import DocumentError
from subscriptions.transfer import checked, export, plan_import, run_import
from tests.databases import NOW, fill

CATALOGUES = load_catalogues()
ANNA = Actor("cli:anna", "cli")
TABLES = ("mailboxes", "accounts", "account_products", "contacts", "opt_outs", "suppressions", "audit")

ACME = {
    "id": "acme",
    "name": "Acme Corp",
    "catalogue": "billtrust",
    "uses": ["invoicing", "payments"],
    "bounced": ["Gone@acme.example"],
    "contacts": [
        {
            "id": "c1",
            "name": "Ada",
            "email": "Ada@acme.example",
            "roles": ["executive", "primary_support"],
            "products": ["payments", "invoicing"],
            "opt_outs": [{"role": "executive", "category": "webinar_invite"}],
            "locale": "de-AT",
            "timezone": "Europe/Vienna",
        },
        {"id": "it", "email": "it@acme.example", "kind": "group", "roles": ["invoicing_file_failure"]},
    ],
}
BETA = {"id": "beta", "catalogue": "issuetrak", "contacts": [{"id": "c1", "email": "gone@acme.example"}]}


def lines(*accounts: dict) -> bytes:
    return b"".join(json.dumps(account).encode() + b"\n" for account in accounts)


def document(*accounts: dict) -> bytes:
    return json.dumps({"accounts": accounts}).encode()


def load(database: Database, data: bytes, *, dry_run: bool = False, now: int = NOW, **options):
    with checked(io.BytesIO(data), catalogues=CATALOGUES, name="test.json") as read:
        act = plan_import if dry_run else run_import
        return act(database, read, catalogues=CATALOGUES, now=now, **options)


def dump(database: Database, *, as_lines: bool = True, only: list[str] | None = None) -> bytes:
    stream = io.BytesIO()
    with database.read() as connection:
        export(connection, stream, catalogues=CATALOGUES, lines=as_lines, only=only)
    return stream.getvalue()


def change(database: Database, *changes: Change, now: int = NOW):
    with database.write() as connection:
        return apply(connection, ANNA, changes, catalogues=CATALOGUES, now=now)


def rows(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {name: connection.scalar(select(func.count()).select_from(getattr(schema, name))) for name in TABLES}


def contents(database: Database) -> dict[str, list]:
    """Every row of the directory but the audit."""
    with database.read() as connection:
        tables = [getattr(schema, name) for name in TABLES if name != "audit"]
        return {table.name: sorted(map(repr, connection.execute(select(table)))) for table in tables}


def many(count: int) -> bytes:
    return lines(
        *(
            {
                "id": f"a{n}",
                "catalogue": "billtrust",
                "contacts": [{"id": f"c{m}", "email": f"c{m}@a{n}.example", "roles": ["executive"]} for m in range(5)],
            }
            for n in range(count // 5)
        )
    )


# ---------------------------------------------------------------- import


@pytest.mark.parametrize("write", [lines, document])
def test_a_document_becomes_the_directory(database: Database, write):
    difference = load(database, write(ACME, BETA))
    assert difference.accounts_added.first == ["acme", "beta"]
    assert difference.contacts_added.first == ["acme/c1", "acme/it", "beta/c1"]
    assert difference.roles_given.count == 3
    assert difference.opt_outs_set.first == ["acme/c1 executive:webinar_invite (import)"]
    assert difference.suppressions_set.first == ["gone@acme.example hard_bounce (import:acme)"]
    with database.read() as connection:
        acme, beta = directory.facts(connection, CATALOGUES)
    assert [one.id for one in acme.contacts] == ["c1", "it"]
    assert acme.opted_out == {("ada@acme.example", "webinar_invite")}
    assert beta.suppressed == {"gone@acme.example"}


def test_importing_the_same_document_again_changes_nothing(database: Database):
    load(database, lines(ACME, BETA))
    before = contents(database), rows(database)
    difference = load(database, lines(ACME, BETA), now=NOW + 1)
    assert difference.empty
    assert (difference.accounts_unchanged, difference.contacts_unchanged) == (2, 3)
    assert (contents(database), rows(database)) == before


def test_a_dry_run_says_what_the_import_then_does_and_writes_nothing(database: Database):
    load(database, lines(ACME))
    changed = {**ACME, "contacts": [ACME["contacts"][1], {"id": "new", "email": "n@x.test", "roles": ["accounting"]}]}
    before = contents(database), rows(database)
    planned = load(database, lines(changed, BETA), dry_run=True)
    assert (contents(database), rows(database)) == before
    assert load(database, lines(changed, BETA)) == planned
    assert planned.accounts_changed.first == ["acme"]
    assert planned.contacts_removed.first == ["acme/c1"]
    assert planned.contacts_added.first == ["acme/new", "beta/c1"]


def test_accounts_that_are_not_named_stay_unless_they_are_pruned(database: Database):
    load(database, lines(ACME, BETA))
    assert load(database, lines(ACME)).empty
    planned = load(database, lines(ACME), dry_run=True, prune=True)
    assert planned.accounts_removed.first == ["beta"]
    assert planned.contacts_removed.first == ["beta/c1"]
    assert len(dump(database).splitlines()) == 2
    assert load(database, lines(ACME), prune=True) == planned
    assert [json.loads(line)["id"] for line in dump(database).splitlines()] == ["acme"]


def test_a_contact_that_moves_to_another_account_of_the_document_is_in_the_new_one(database: Database):
    load(database, lines(ACME, BETA))
    moved = {**ACME, "contacts": ACME["contacts"][1:]}
    load(database, lines(moved, {**BETA, "contacts": [*BETA["contacts"], {"id": "c2", "email": "ada@acme.example"}]}))
    with database.read() as connection:
        acme, beta = directory.facts(connection, CATALOGUES)
    assert [one.id for one in acme.contacts] == ["it"]
    assert [one.email for one in beta.contacts] == ["gone@acme.example", "ada@acme.example"]
    assert beta.opted_out == {("ada@acme.example", "webinar_invite")}


def test_what_recipients_and_bounces_set_is_kept_and_listed(database: Database):
    load(database, lines(ACME))
    change(
        database,
        SetOptOut(("acme", "it"), "executive", "announcement", True, "recipient"),
        Suppress("it@acme.example", "hard_bounce", "delivery:01X/3"),
        Suppress("ada@acme.example", "complaint", "delivery:01X/4"),
    )
    people = [{**contact, "opt_outs": []} for contact in ACME["contacts"]]
    difference = load(database, lines({**ACME, "contacts": people, "suppressions": []}))
    assert difference.opt_outs_kept.first == ["acme/it executive:announcement (recipient)"]
    assert sorted(difference.suppressions_kept.first) == [
        "ada@acme.example complaint (delivery:01X/4)",
        "it@acme.example hard_bounce (delivery:01X/3)",
    ]
    assert difference.opt_outs_lifted.first == ["acme/c1 executive:webinar_invite (import)"]


def test_void_holders_vacant_roles_and_void_opt_outs_are_noted(database: Database):
    people = [{"id": f"p{n}", "email": f"p{n}@x.test", "roles": ["primary_contact"]} for n in range(4)]
    people[0]["opt_outs"] = [{"role": "primary_contact", "category": "sales_correspondence"}]
    difference = load(database, lines({"id": "a", "catalogue": "issuetrak", "contacts": people}), dry_run=True)
    assert [note.rpartition("(")[2] for note in difference.notes.first] == ["S-41)", "S-43)", "S-23)"]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "bad",
    [
        b'{"id": "new", "catalogue": "billtrust", "contacts": [{"id": "c", "email": "no address"}]}',
        b'{"id": "new", "catalogue": "nothing"}',
        b'{"id": "new", "catalogue": "billtrust", "contacts": [{"id": "c", "email": "a@x.test", "roles": ["boss"]}]}',
        b'{"id": "new", "catalogue": "billtrust", "contacts": [{"id": "c", "email": "a@x.test", "products": []}]}',
        b'{"id": "acme", "catalogue": "billtrust"}',
        b'{"id": "new", "catalogue": "billtrust", "naem": "typo"}',
        b'{"id": "new", "catalogue": ',
        b"\xff\xfe",
    ],
)
def test_one_fault_anywhere_refuses_the_whole_document(database: Database, bad: bytes):
    load(database, lines(BETA))
    before = contents(database), rows(database)
    with pytest.raises(DocumentError, match="line 2"):
        load(database, lines(ACME) + bad + b"\n")
    assert (contents(database), rows(database)) == before


def test_a_document_that_does_not_fit_what_is_there_is_refused_as_a_whole(database: Database):
    load(database, lines(ACME))
    before = contents(database), rows(database)
    wrong = {"id": "acme", "catalogue": "billtrust", "contacts": [{"id": "c1", "email": "a@x.test", "kind": "group"}]}
    for dry_run in (True, False):
        with pytest.raises(ChangeError, match="acme/c1: the role 'executive' needs a person"):
            load(database, many(50) + lines(wrong), dry_run=dry_run)
        assert (contents(database), rows(database)) == before


@pytest.mark.parametrize("table", ["accounts", "contacts", "mailboxes", "audit"])
def test_a_failure_late_in_an_import_leaves_nothing_behind(sqlite_database: Database, table: str):
    load(sqlite_database, lines(BETA))
    before = contents(sqlite_database), rows(sqlite_database)
    seen = []

    def fail(_connection, _cursor, statement: str, *_others) -> None:
        if statement.startswith(f"INSERT INTO {table} "):
            seen.append(statement)
            if len(seen) == 2:
                raise RuntimeError("the plug was pulled")

    event.listen(sqlite_database.engine, "before_cursor_execute", fail)
    with pytest.raises(RuntimeError):
        load(sqlite_database, many(12_000))
    event.remove(sqlite_database.engine, "before_cursor_execute", fail)
    assert len(seen) == 2
    assert (contents(sqlite_database), rows(sqlite_database)) == before


def test_an_import_that_is_interrupted_while_it_reports_leaves_nothing_behind(database: Database):
    def stop(done: int, size: int | None) -> None:
        if size is not None and done > size // 2:
            raise KeyboardInterrupt

    before = rows(database)
    with pytest.raises(KeyboardInterrupt):
        load(database, many(20_000), progress=stop)
    assert rows(database) == before


# ---------------------------------------------------------------- size, progress, concurrency


def test_progress_is_told_in_bytes_up_to_the_whole(sqlite_database: Database):
    data, reading, applying = many(12_000), [], []
    with checked(
        io.BytesIO(data),
        catalogues=CATALOGUES,
        name="x",
        size=len(data),
        progress=lambda done, size: reading.append((done, size)),
    ) as read:
        run_import(
            sqlite_database,
            read,
            catalogues=CATALOGUES,
            now=NOW,
            progress=lambda done, size: applying.append((done, size)),
        )
        assert (read.accounts, read.contacts) == (2400, 12_000)
    for told in (reading, applying):
        assert told == sorted(told)
        assert len(told) > 2
        assert told[-1][0] == told[-1][1]
    assert reading[-1][1] == len(data)


def test_memory_does_not_grow_with_the_document(tmp_path: Path):
    peaks = []
    for size in (10_000, 30_000):
        database = fill(Database(f"sqlite:///{tmp_path}/{size}.db"))
        path = tmp_path / "large.jsonl"
        path.write_bytes(many(size))
        tracemalloc.start()
        with path.open("rb") as stream, checked(stream, catalogues=CATALOGUES, name="large") as read:
            run_import(database, read, catalogues=CATALOGUES, now=NOW)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        database.close()
    # Ids of accounts are kept, to find one that comes twice: some 120 bytes each.
    assert peaks[1] - peaks[0] < 1_500_000


def test_after_a_large_import_postgresql_finds_a_page_of_accounts_by_their_numbers(postgresql_database: Database):
    fill(postgresql_database)
    load(postgresql_database, many(6_000))
    page = text("EXPLAIN SELECT ext FROM accounts WHERE id > 0 AND removed_at IS NULL ORDER BY id LIMIT 100")
    with postgresql_database.read() as connection:
        plan = " ".join(connection.execute(page).scalars())
    assert "Index Scan using pk_accounts" in plan, "it would read and sort all of them for each page"


def test_two_imports_at_once_happen_one_after_the_other(database: Database):
    def people(mark: str) -> bytes:
        return lines(
            *(
                {
                    "id": f"a{n}",
                    "catalogue": "billtrust",
                    "name": mark,
                    "contacts": [{"id": "c", "email": f"{mark}{n}@x.test", "name": mark}],
                }
                for n in range(6000)
            )
        )

    faults: list[BaseException] = []

    def run(mark: str) -> None:
        try:
            load(database, people(mark))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=(mark,)) for mark in ("ada", "ben")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    found = [json.loads(line) for line in dump(database).splitlines()]
    assert len(found) == 6000
    assert len({(one["name"], one["contacts"][0]["name"]) for one in found}) == 1


# ---------------------------------------------------------------- export


def test_an_export_has_every_key_and_reads_as_it_was_written(database: Database):
    load(database, lines(ACME, BETA))
    acme, beta = map(json.loads, dump(database).splitlines())
    assert set(acme) == {"id", "name", "catalogue", "uses", "suppressions", "contacts"}
    assert acme["contacts"][0] == {
        "id": "c1",
        "name": "Ada",
        "email": "Ada@acme.example",
        "kind": "person",
        "roles": ["executive", "primary_support"],
        "products": ["invoicing", "payments"],
        "opt_outs": [{"role": "executive", "category": "webinar_invite", "by": "import", "at": "2026-11-21T10:00:00Z"}],
        "locale": "de-AT",
        "timezone": "Europe/Vienna",
        "unreachable": False,
    }
    assert acme["suppressions"] == [
        {"address": "gone@acme.example", "cause": "hard_bounce", "by": "import", "at": "2026-11-21T10:00:00Z"}
    ]
    assert (beta["name"], beta["suppressions"]) == (None, [])
    assert json.loads(dump(database, as_lines=False)) == {"accounts": [acme, beta]}


def test_some_accounts_can_be_exported(database: Database):
    load(database, lines(ACME, BETA))
    (beta,) = map(json.loads, dump(database, only=["beta"]).splitlines())
    assert beta["id"] == "beta"


def test_suppressions_without_a_contact_stand_with_the_first_account(database: Database):
    load(database, lines(BETA, ACME))
    change(database, Suppress("nobody@x.test", "hard_bounce", "delivery:01X/1"), now=NOW + 1)
    change(database, Suppress("ada@acme.example", "operator", "operator:anna"), now=NOW + 2)
    beta, acme = map(json.loads, dump(database).splitlines())
    assert [(one["address"], one["by"]) for one in beta["suppressions"]] == [("nobody@x.test", "import")]
    assert [(one["address"], one["by"]) for one in acme["suppressions"]] == [
        ("gone@acme.example", "import"),
        ("ada@acme.example", "operator"),
    ]


_ids = st.sampled_from(["a", "b", "c", "d"])
_addresses = st.sampled_from(["ada@x.test", "Ada@X.test", "ben@x.test", "eve@y.example", "ünal@y.example"])
_roles = {key: list(catalogue.roles) for key, catalogue in CATALOGUES.items()}


@st.composite
def _contacts(draw, catalogue: str):
    kind = draw(st.sampled_from(["person", "group"]))
    allowed = [key for key, role in CATALOGUES[catalogue].roles.items() if kind in role.holder_kinds]
    wish = st.fixed_dictionaries(
        {
            "role": st.sampled_from(_roles[catalogue]),
            "category": st.sampled_from(list(CATALOGUES[catalogue].vocabulary.categories)),
            "by": st.sampled_from(["recipient", "operator", "import", "complaint"]),
        },
        optional={"at": st.sampled_from(["2026-01-02T03:04:05Z", "2025-12-31T23:59:59.000001+02:00"])},
    )
    return draw(
        st.fixed_dictionaries(
            {
                "id": _ids,
                "email": _addresses,
                "kind": st.just(kind),
                "roles": st.lists(st.sampled_from(allowed), unique=True, max_size=3),
            },
            optional={
                "name": st.sampled_from(["Ada", "Zoë Ünal", "", None]),
                "products": st.one_of(
                    st.none(), st.lists(st.sampled_from(["p", "q r"]), min_size=1, max_size=2, unique=True)
                ),
                "opt_outs": st.lists(wish, max_size=3),
                "locale": st.sampled_from(["en", "de-AT", None]),
                "timezone": st.sampled_from(["Europe/Vienna", None]),
                "unreachable": st.booleans(),
            },
        )
    )


@st.composite
def _accounts(draw):
    catalogue = draw(st.sampled_from(list(CATALOGUES)))
    stopped = st.fixed_dictionaries(
        {"address": _addresses, "cause": st.sampled_from(["hard_bounce", "complaint", "operator"])},
        optional={
            "by": st.sampled_from(["recipient", "operator", "import", "complaint"]),
            "at": st.just("2026-02-03T04:05:06.789Z"),
        },
    )
    return draw(
        st.fixed_dictionaries(
            {"id": _ids, "catalogue": st.just(catalogue)},
            optional={
                "name": st.sampled_from(["Acme", "", None]),
                "uses": st.lists(st.sampled_from(["chat", "invoicing", "q r"]), unique=True),
                "bounced": st.lists(_addresses, max_size=2),
                "suppressions": st.lists(stopped, max_size=3),
                "contacts": st.lists(_contacts(catalogue), max_size=4, unique_by=lambda one: one["id"]),
            },
        )
    )


_directories = st.lists(_accounts(), max_size=4, unique_by=lambda one: one["id"])


@st.composite
def _changes(draw):
    """Changes of every door after an import; those that name nobody are left out when they are done."""
    who = draw(st.tuples(_ids, _ids))
    return draw(
        st.one_of(
            st.builds(PutContact, st.just(who[0]), st.just(who[1]), email=_addresses),
            st.just(RemoveContact(*who)),
            st.builds(
                SetOptOut,
                st.just(who),
                st.none(),
                st.sampled_from(["webinar_invite", "announcement", "marketing_communication"]),
                st.booleans(),
                st.sampled_from(["recipient", "operator"]),
            ),
            st.builds(
                Suppress,
                _addresses,
                st.sampled_from(["hard_bounce", "complaint", "operator"]),
                st.sampled_from(["delivery:01X/7", "operator:anna", "operator:ben"]),
            ),
        )
    )


@settings(max_examples=50, deadline=None, phases=set(Phase) - {Phase.explain})
@given(_directories, st.lists(_changes(), max_size=5), st.lists(_directories, max_size=2))
def test_an_export_loses_nothing(first, changes, later):
    """Importing an export changes nothing where it came from, and makes an equal directory elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        database, elsewhere = (_copied(Path(folder) / name) for name in ("one.db", "two.db"))
        try:
            for accounts in (first, *later):
                _try(lambda accounts=accounts: load(database, document(*accounts)))
            for one in changes:
                _try(lambda one=one: change(database, one))
            before = contents(database)
            exported = dump(database)
            difference = load(database, exported or document(), now=NOW + 10**6)
            assert difference.empty
            assert contents(database) == before
            assert dump(database) == exported
            load(elsewhere, exported or document(), now=NOW + 2 * 10**6)
            if exported:
                assert dump(elsewhere) == exported
                whole = dump(database, as_lines=False)
                assert load(elsewhere, whole).empty
                assert dump(elsewhere, as_lines=False) == whole
        finally:
            database.close()
            elsewhere.close()


def _copied(path: Path) -> Database:
    """An installed database out of a copy of empty tables: making them costs ten times as much."""
    path.write_bytes(_empty_tables())
    return fill(Database(f"sqlite:///{path}"))


@functools.cache
def _empty_tables() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty.db"
        database = Database(f"sqlite:///{path}")
        schema.metadata.create_all(database.engine)
        database.close()
        return path.read_bytes()


def _try(step) -> None:
    with contextlib.suppress(ChangeError):
        step()  # the directory so far does not allow it: a role of another catalogue, a contact that is not there
