"""API keys: made once, stored as a hash, known again, revoked."""

from __future__ import annotations

import hashlib
import re

import pytest
from sqlalchemy import select

from tests.databases import NOW
from worker import keys
from worker.events import TYPES
from worker.schema import api_keys


def made(database, **given):
    facts = {"name": "billing", "mode": "live", "scopes": ["publish:invoice.issued", "read"], **given}
    with database.write() as connection:
        return keys.create(connection, types=TYPES, now=NOW, **facts)


def test_a_key_is_known_again_and_says_what_it_may(sqlite_database):
    key, presented = made(sqlite_database)
    with sqlite_database.read() as connection:
        found = keys.check(connection, presented, NOW)
    assert found is not None
    assert (found.name, found.mode) == (key.name, "live")
    assert found.may_publish("invoice.issued")
    assert not found.may_publish("quote.issued")
    assert found.may_read
    assert found.publisher.name == "key:billing"
    assert not found.publisher.attests


def test_a_key_for_everything_that_attests_publishes_any_type_and_its_word_counts(sqlite_database):
    key, _ = made(sqlite_database, scopes=["publish:*", "attest"], mode="test")
    assert key.may_publish("anything")
    assert key.publisher.attests
    assert key.publisher.mode == "test"
    assert not key.may_read


def test_the_secret_is_stored_nowhere(sqlite_database):
    _, presented = made(sqlite_database)
    assert re.fullmatch(r"rolecast_live_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}", presented)
    with sqlite_database.read() as connection:
        row = connection.execute(select(api_keys)).one()
    assert bytes(row.secret_hash) == hashlib.sha256(presented.encode()).digest()
    assert presented.rpartition("_")[2] not in str(row)


def test_a_key_with_a_letter_changed_anywhere_is_none_of_ours(sqlite_database):
    _, presented = made(sqlite_database)
    with sqlite_database.read() as connection:
        for place in range(len(presented)):
            other = "x" if presented[place] != "x" else "y"
            assert keys.check(connection, presented[:place] + other + presented[place + 1 :], NOW) is None
        for wrong in (
            "",
            "rolecast_live",
            presented + "0",
            presented[:-1],
            presented.replace("live", "test"),
            "é" * 70,
        ):
            assert keys.check(connection, wrong, NOW) is None


def test_a_key_with_a_right_checksum_but_another_secret_is_none_of_ours(sqlite_database):
    _, presented = made(sqlite_database)
    body = presented[:-49] + "A" * 43
    with sqlite_database.read() as connection:
        assert keys.check(connection, body + keys._checksum(body), NOW) is None


def test_a_revoked_key_is_refused_at_once_and_keeps_its_name(sqlite_database):
    _, presented = made(sqlite_database)
    with sqlite_database.write() as connection:
        keys.revoke(connection, "billing", now=NOW)
        assert keys.check(connection, presented, NOW) is None
        assert keys.revoke(connection, "billing", now=NOW + 5).revoked_at == NOW
    with pytest.raises(keys.KeyRefused, match="exists already") as refused:
        made(sqlite_database)
    assert refused.value.kind == "conflict"


def test_the_last_use_is_due_to_be_recorded_once_a_minute(sqlite_database):
    _, presented = made(sqlite_database)
    with sqlite_database.write() as connection:
        first = keys.check(connection, presented, NOW)
        assert first.unrecorded
        keys.record_use(connection, first, now=NOW)
        assert not keys.check(connection, presented, NOW + 59_000_000).unrecorded
        assert keys.check(connection, presented, NOW + 60_000_000).unrecorded
        assert [key.used_at for key in keys.list_keys(connection)] == [NOW]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"name": ""}, "the name ''"),
        ({"name": "a\nb"}, "the name"),
        ({"mode": "loud"}, "the mode 'loud'"),
        ({"scopes": []}, "without a scope"),
        ({"scopes": ["publish:invoice.paid"]}, "the scope 'publish:invoice.paid'"),
        ({"scopes": ["everything"]}, "the scope 'everything'"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused_in_a_sentence(sqlite_database, given, names):
    with pytest.raises(keys.KeyRefused, match=names) as refused:
        made(sqlite_database, **given)
    assert refused.value.kind == "invalid"


def test_a_key_that_does_not_exist_cannot_be_revoked(sqlite_database):
    with sqlite_database.write() as connection, pytest.raises(keys.KeyRefused, match="no key 'other'"):
        keys.revoke(connection, "other", now=NOW)
