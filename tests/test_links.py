"""Personal links and envelope senders: nobody can make or change one without the key."""

from __future__ import annotations

import base64
import hmac
import random
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import ColumnElement, Connection, Table, delete, insert, select, update
from sqlalchemy import event as listening

from subscriptions.database import Database
from subscriptions.directory import address_key
from subscriptions.schema import accounts, contacts
from tests.house import ACME, GLOBEX, app_on, event, import_accounts, publish
from tests.test_fanout import plan
from worker import links
from worker.fanout import event_row
from worker.links import (
    BadToken,
    Links,
    Purpose,
    contact_now,
    delivery_now,
    keys_for,
    read_bounce,
    varint,
    varints,
)
from worker.mails import Composer, load
from worker.schema import deliveries, events, more_grounds, slices, verdicts
from worker.settings import SettingsError

BASE = "https://notify.acme.example"
LINKS = Links(("a key of the test, long enough",), BASE)
ADDRESS_KEY = b"k" * 32
NUMBERS = st.integers(min_value=0, max_value=2**63 - 1)
PLACES = st.integers(min_value=0, max_value=2**31 - 1)
IT = b"what the numbers stand for"


def token(purpose: Purpose, *numbers: int) -> str:
    return LINKS.token(purpose, *numbers, identity=IT)


def read(purpose: Purpose, token: str, links: Links = LINKS) -> tuple[int, ...]:
    return links.read(purpose, token, lambda *_: IT)


def bounce_sender(address_key: bytes, event: int, n: int, identity: bytes, *, domain: str) -> str:
    return links.bounce_sender(address_key, (varint(event) + varint(n), identity), domain=domain)


def bounced(local_part: str) -> tuple[int, int]:
    return read_bounce(ADDRESS_KEY, local_part, lambda *_: IT)


@given(st.lists(NUMBERS))
def test_numbers_come_back_as_they_were_written(numbers: list[int]) -> None:
    assert varints(b"".join(varint(number) for number in numbers)) == numbers


@given(NUMBERS, PLACES)
def test_a_link_names_what_it_was_made_for(event: int, number: int) -> None:
    assert read("u", token("u", event, number)) == (event, number)
    assert read("p", token("p", number)) == (number,)


def test_links_stand_under_the_public_address() -> None:
    assert LINKS.unsubscribe(1, 2, IT) == f"{BASE}/unsubscribe/{token('u', 1, 2)}"
    assert LINKS.preferences(3, IT) == f"{BASE}/preferences/{token('p', 3)}"
    assert all(letter.isalnum() or letter in "-_" for letter in token("u", 2**63 - 1, 2**31 - 1))


@given(NUMBERS, PLACES)
def test_a_link_for_one_purpose_is_worthless_for_the_other(event: int, number: int) -> None:
    with pytest.raises(BadToken):
        read("p", token("u", event, number))
    with pytest.raises(BadToken):
        read("u", token("p", event))


@given(st.text(min_size=1, max_size=150), NUMBERS, PLACES)
def test_a_link_is_signed_by_hmac_with_keys_of_any_length(key: str, event: int, number: int) -> None:
    body = b"u" + varint(event) + varint(number)
    mac = hmac.digest(key.encode("utf-8", "replace"), b"rolecast link v1\0" + body + IT, "sha256")[:16]
    made = Links((key.encode("utf-8", "replace").decode(),), BASE).token("u", event, number, identity=IT)
    assert made == base64.urlsafe_b64encode(body + mac).rstrip(b"=").decode()


def test_a_link_names_no_address_and_differs_for_each_delivery() -> None:
    tokens = {token("u", event, number) for event in range(30) for number in range(30)}
    assert len(tokens) == 900


def accepted(token: str) -> bool:
    purposes: tuple[Purpose, ...] = ("u", "p")
    for purpose in purposes:
        try:
            read(purpose, token)
        except BadToken:
            continue
        return True
    return False


def test_of_a_hundred_thousand_forged_links_none_is_accepted() -> None:
    rng = random.Random(2026)
    good = [token("u", rng.randrange(10**6), rng.randrange(10**6)) for _ in range(50)]
    good += [token("p", rng.randrange(10**6)) for _ in range(50)]
    assert all(accepted(token) for token in good)
    raw = [base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)) for token in good]
    forged = 0
    for number in range(50_000):  # a bit flipped anywhere
        octets = bytearray(raw[number % len(raw)])
        bit = rng.randrange(8 * len(octets))
        octets[bit // 8] ^= 1 << bit % 8
        forged += accepted(base64.urlsafe_b64encode(octets).rstrip(b"=").decode())
    for _ in range(50_000):  # bytes out of the air, with the purpose right
        forged += accepted(base64.urlsafe_b64encode(b"u" + rng.randbytes(rng.randrange(16, 30))).rstrip(b"=").decode())
    assert forged == 0


def test_a_link_has_one_spelling() -> None:
    good = token("p", 5)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    others = {good[:place] + letter + good[place + 1 :] for place in range(len(good)) for letter in alphabet}
    others |= {good + "=", good + "==", good + "\n", " " + good, good + "A", good[:-1], good.swapcase()}
    others |= {good.replace("-", "+").replace("_", "/"), good + "é", ""}
    assert [other for other in others - {good} if accepted(other)] == []


def test_keys_are_changed_without_breaking_the_links_in_older_mails() -> None:
    old = Links(("the older key, long enough",), BASE)
    both = Links(("the newer key, long enough", "the older key, long enough"), BASE)
    newer = Links(("the newer key, long enough",), BASE)
    # given a link of an older mail
    link = old.token("u", 7, 8, identity=IT)
    # then it works while the older key is still listed
    assert read("u", link, both) == (7, 8)
    # and the newer one signs
    assert read("u", both.token("u", 7, 8, identity=IT), newer) == (7, 8)
    # and once the older key is withdrawn its links end
    with pytest.raises(BadToken):
        read("u", link, newer)


def test_a_link_whose_numbers_stand_for_another_is_no_link() -> None:
    one_click, page = token("u", 7, 8), token("p", 7)
    sender = bounce_sender(ADDRESS_KEY, 7, 8, IT, domain="b.example").partition("@")[0]
    for now in (b"another", b"", IT + b"x", IT[:-1], None):
        with pytest.raises(BadToken):
            LINKS.read("u", one_click, lambda *_, now=now: now)
        with pytest.raises(BadToken):
            LINKS.read("p", page, lambda *_, now=now: now)
        with pytest.raises(BadToken):
            read_bounce(ADDRESS_KEY, sender, lambda *_, now=now: now)


def test_no_database_is_asked_for_numbers_that_it_cannot_hold() -> None:
    def asked(*numbers: int) -> bytes:
        pytest.fail(f"asked for {numbers}")

    pages: list[tuple[int, ...]] = [(2**63,), (2**9000,), (1, 2), ()]
    for numbers in pages:
        with pytest.raises(BadToken):
            LINKS.read("p", token("p", *numbers), asked)
    clicks: list[tuple[int, ...]] = [(2**63, 1), (1, 2**31), (1,), (1, 2, 3), ()]
    for numbers in clicks:
        with pytest.raises(BadToken):
            LINKS.read("u", token("u", *numbers), asked)
    for event_id, n in ((2**63, 1), (1, 2**31)):
        sender = bounce_sender(ADDRESS_KEY, event_id, n, IT, domain="b.example").partition("@")[0]
        with pytest.raises(BadToken):
            read_bounce(ADDRESS_KEY, sender, asked)


# ---------------------------------------------------------------- envelope senders


@given(NUMBERS, PLACES)
def test_a_bounce_finds_its_delivery_in_whatever_case_it_comes_back(event: int, number: int) -> None:
    local, _, domain = bounce_sender(ADDRESS_KEY, event, number, IT, domain="bounces.acme.example").rpartition("@")
    assert domain == "bounces.acme.example"
    assert len(local) <= len("b+") + (40 if event < 2**35 else 48)  # of 64: RFC 5321, 4.5.3.1.1
    assert local == local.lower()
    assert all(letter.isalnum() or letter == "+" for letter in local)
    assert bounced(local) == bounced(local.upper()) == (event, number)


def test_the_envelope_sender_is_the_same_on_every_attempt() -> None:
    first, second = (bounce_sender(ADDRESS_KEY, 4, 5, IT, domain="b.example") for _ in range(2))
    assert first == second


def test_forged_envelope_senders_are_refused() -> None:
    rng = random.Random(2026)
    local = bounce_sender(ADDRESS_KEY, 1234, 56, IT, domain="b.example").partition("@")[0]
    letters = "0123456789abcdef+ "
    forged = [local[:place] + letter + local[place + 1 :] for place in range(2, len(local)) for letter in letters]
    forged += ["b+" + "".join(rng.choices(letters, k=rng.randrange(1, 45))) for _ in range(20_000)]
    forged += [
        "",
        "b",
        "b+",
        "+",
        "b+1",
        "b+ä",
        "b+\u0131",
        "postmaster",
        local + "a",
        local + "00",
        local + " ",
        f"{local[:6]} {local[6:]}",
        f"b+00{local[2:]}",
        local[:-1],
        local.replace("+", "-"),
    ]
    for one in set(forged) - {local}:
        with pytest.raises(BadToken):
            bounced(one)
    with pytest.raises(BadToken):
        read_bounce(b"x" * 32, local, lambda *_: IT)


# ---------------------------------------------------------------- after a restore


@pytest.fixture
def planned(database: Database, tmp_path: Path) -> Database:
    """Three accounts, with a webinar's mails planned: the first for Ada of Acme, the second for Bea of Beta."""
    bea = {"id": "bea", "name": "Bea", "email": "bea@beta.example", "roles": ["executive"]}
    app = app_on(database, tmp_path)
    import_accounts(app, [ACME, GLOBEX, {**ACME, "id": "beta", "contacts": [bea]}])
    publish(app, event("webinar.scheduled", accounts="all"))
    plan(app)
    return database


def given_again(connection: Connection, table: Table, where: ColumnElement[bool], **other: Any) -> None:
    """Delete a row and give its numbers to another one."""
    row = connection.execute(select(table).where(where)).mappings().one()
    connection.execute(delete(table).where(where))
    connection.execute(insert(table).values(**{**row, **other}))


def given_to_another_event(connection: Connection) -> None:
    """Delete the event with all that hangs on it, and give its number to another event that is planned alike."""
    tables = (slices, verdicts, deliveries, more_grounds)
    kept = [(table, connection.execute(select(table)).mappings().all()) for table in tables]
    for table in tables:
        connection.execute(delete(table))
    given_again(connection, events, events.c.id == 1, ulid="01ANOTHEREVENT000000000000", ce_id="another")
    for table, rows in kept:
        for row in rows:
            connection.execute(insert(table).values(**row))


def tokens(connection: Connection) -> dict[str, str]:
    """A token of each kind: of the event's first delivery, and of its contact."""
    named = connection.execute(select(deliveries).where(deliveries.c.n == 1)).one()
    delivery, contact = delivery_now(connection, 1, 1), contact_now(connection, named.contact_id)
    assert delivery is not None
    assert contact is not None
    sender = bounce_sender(address_key(connection), 1, 1, delivery, domain="b.example")
    return {
        "unsubscribe": LINKS.token("u", 1, 1, identity=delivery),
        "preferences": LINKS.token("p", named.contact_id, identity=contact),
        "bounce": sender.partition("@")[0],
    }


def working_tokens(connection: Connection, made: dict[str, str]) -> set[str]:
    """Which of the tokens still verify."""
    readers = {
        "unsubscribe": lambda one: LINKS.read("u", one, partial(delivery_now, connection)),
        "preferences": lambda one: LINKS.read("p", one, partial(contact_now, connection)),
        "bounce": lambda one: read_bounce(address_key(connection), one, partial(delivery_now, connection)),
    }
    found = set()
    for kind, reader in readers.items():
        try:
            reader(made[kind])
        except BadToken:
            continue
        found.add(kind)
    return found


def test_tokens_end_where_their_numbers_were_given_to_others(planned: Database) -> None:
    with planned.write() as connection:
        made = tokens(connection)
        first = connection.execute(select(deliveries).where(deliveries.c.n == 1)).one()
        everything = {"unsubscribe", "preferences", "bounce"}
        assert working_tokens(connection, made) == everything
        # when the contact's number is another contact's of the account
        given_again(connection, contacts, contacts.c.id == first.contact_id, ext="other")
        assert working_tokens(connection, made) == {"unsubscribe", "bounce"}
        given_again(connection, contacts, contacts.c.id == first.contact_id, ext="ada")
        assert working_tokens(connection, made) == everything
        # or one of another account that has the same id
        other = connection.execute(select(accounts.c.id).where(accounts.c.ext == "globex")).scalar_one()
        given_again(connection, contacts, contacts.c.id == first.contact_id, account_id=other)
        assert working_tokens(connection, made) == {"unsubscribe", "bounce"}
        # when the event is the same and was planned again, for others
        box = connection.execute(select(contacts.c.mailbox_id).where(contacts.c.ext == "ben")).scalar_one()
        given_again(connection, deliveries, deliveries.c.n == 1, mailbox_id=box)
        assert working_tokens(connection, made) == set()


def test_tokens_end_where_the_events_number_was_given_to_another(planned: Database) -> None:
    with planned.write() as connection:
        made = tokens(connection)
        given_to_another_event(connection)
        assert working_tokens(connection, made) == {"preferences"}
        connection.execute(delete(deliveries))
        assert working_tokens(connection, made) == {"preferences"}


def test_the_links_of_a_contact_with_a_new_name_and_address_keep_working(planned: Database) -> None:
    with planned.write() as connection:
        made = tokens(connection)
        box = connection.execute(select(contacts.c.mailbox_id).where(contacts.c.ext == "ben")).scalar_one()
        connection.execute(update(contacts).where(contacts.c.ext == "ada").values(name="Ada L.", mailbox_id=box))
        assert working_tokens(connection, made) == {"unsubscribe", "preferences", "bounce"}


@contextmanager
def counted(database: Database) -> Iterator[list[str]]:
    """The statements that are executed meanwhile."""
    statements: list[str] = []

    def note(*call: Any) -> None:
        statements.append(call[2])

    listening.listen(database.engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        listening.remove(database.engine, "before_cursor_execute", note)


def test_the_links_of_a_mail_cost_no_statement(planned: Database, tmp_path: Path) -> None:
    app = app_on(planned, tmp_path)
    with planned.read() as connection:
        row = event_row(connection.execute(select(events)).one())
        numbers = list(connection.execute(select(deliveries.c.n)).scalars())
        with counted(planned) as of_one:
            load(connection, row, numbers[:1])
        with counted(planned) as of_all:
            dues, people = load(connection, row, numbers)
        with counted(planned) as of_mails:
            mails = [Composer(app.settings, app.catalogues, LINKS).mail_of(row, due, people, now=1) for due in dues]
        assert len(mails) == len(numbers) == 2
        assert all(mail.unsubscribe_url and mail.grounds[0].preference_url for mail in mails)
        for mail, due in zip(mails, dues, strict=True):
            assert mail.unsubscribe_url is not None
            link = mail.unsubscribe_url.rpartition("/")[2]
            assert LINKS.read("u", link, partial(delivery_now, connection)) == (1, due.n)
    assert len(of_one) == len(of_all)
    assert of_mails == []


# ---------------------------------------------------------------- keys


def test_configured_keys_win_and_nothing_is_written(tmp_path: Path) -> None:
    assert keys_for(["one", "two"], tmp_path / "rolecast.db") == ("one", "two")
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_key_where_none_is_configured_and_no_file_can_hold_one() -> None:
    assert keys_for([], None) == ()


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = keys_for([], tmp_path / "rolecast.db")
    assert keys_for([], tmp_path / "rolecast.db") == first
    [file] = tmp_path.iterdir()
    assert file.name == "rolecast.db.key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(first[0]) == 64


def test_processes_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    code = "import sys, pathlib, worker.links; print(worker.links.keys_for([], pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path / "rolecast.db")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert len({process.communicate(timeout=30)[0] for process in processes}) == 1
    assert [process.returncode for process in processes] == [0] * 6
    assert [file.name for file in tmp_path.iterdir()] == ["rolecast.db.key"]


def test_a_key_file_that_was_emptied_signs_nothing(tmp_path: Path) -> None:
    (tmp_path / "rolecast.db.key").write_text("\n")
    with pytest.raises(SettingsError, match=r"rolecast\.db\.key .*remove it"):
        keys_for([], tmp_path / "rolecast.db")


def test_random_text_is_no_token() -> None:
    for _ in range(1000):
        assert not accepted(secrets.token_urlsafe(20))
