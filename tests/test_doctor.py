"""What the doctor looks at, and what it makes of it."""

from __future__ import annotations

import pytest

from tests.house import NOW, house
from tests.smtpd import SmtpServer
from tests.test_matters import an_event
from worker import decisions, doctor, ledger, restore
from worker.ledger import Status
from worker.settings import load


def examined(folder, **settings):
    environment = {"ROLECAST_DATABASE_URL": f"sqlite:///{folder / 'rolecast.db'}"}
    environment |= {f"ROLECAST_{name.upper()}": value for name, value in settings.items()}
    return {check.name: check for check in doctor.examine(load(environment, folder=folder))}


def test_an_installation_in_order_has_no_finding(tmp_path):
    with house(tmp_path):
        pass
    with SmtpServer() as server:
        found = examined(
            tmp_path,
            relay_urls=f"smtp://127.0.0.1:{server.port}?tls=none",
            sender="Vendor <support@vendor.example>",
            public_url="https://notify.vendor.example",
        )
    assert [check for check in found.values() if check.level == "finding"] == []
    assert found["relay"].level == "ok"
    assert found["public_url"].level == "ok"


def test_a_new_installation_is_told_what_is_missing(tmp_path):
    found = examined(tmp_path)
    assert {name for name, check in found.items() if check.level == "finding"} == {"relay", "sender"}
    assert "ROLECAST_RELAY_URLS" in found["relay"].message
    assert found["database"].level == "note"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [
        ("relay", {"relay_urls": "smtp://127.0.0.1:9?tls=none"}, "127.0.0.1:9"),
        ("public_url", {"public_url": "http://notify.vendor.example"}, "not https"),
        ("sender", {"sender_security": "Vendor <security@vendor.example>"}, "promotional"),
        ("keys", {"database_url": "postgresql://127.0.0.1:9/x"}, "ROLECAST_SECRET_KEYS"),
        ("database", {"database_url": "postgresql://me:hush@127.0.0.1:9/x"}, "127.0.0.1:9"),
        ("database", {"database_url": "sqlite:///none/x.db"}, "none"),
        ("broker", {"broker_url": "redis://me:hush@127.0.0.1:9/0"}, "127.0.0.1:9"),
        ("catalogues", {"catalogues": "none.toml"}, "none.toml"),
        ("status_page", {"status_page_feed_url": "http://127.0.0.1:9/feed"}, "the feed can't be read"),
    ],
)
def test_what_is_out_of_order_is_a_finding_with_its_name_and_no_secret(tmp_path, name, settings, part):
    found = examined(tmp_path, **settings)[name]
    assert found.level == "finding"
    assert part in found.message
    assert "hush" not in found.message


def test_a_database_that_cannot_be_written_is_a_finding(tmp_path):
    with house(tmp_path):
        pass
    found = examined(tmp_path, database_url=f"sqlite:///{tmp_path / 'rolecast.db'}?mode=ro")["database"]
    assert (found.level, "readonly" in found.message) == ("finding", True)


def test_looking_changes_nothing_in_the_database(tmp_path):
    with house(tmp_path) as app:
        with app.database.read() as connection:
            before = ledger.guard(connection)
        assert examined(tmp_path)["database"].level == "ok"
        with app.database.read() as connection:
            assert ledger.guard(connection) == before


def test_a_database_that_workers_refuse_as_older_is_a_finding_and_stays_as_it_is(tmp_path):
    with house(tmp_path) as app:
        restore.mark(app.database)
    mark = tmp_path / "rolecast.db.mark"
    mark.write_text(mark.read_text().replace(" 1", " 2"))
    found = examined(tmp_path)
    assert (found["database"].level, "`rolecast db restored`" in found["database"].message) == ("finding", True)
    assert found["matters"].level == "ok", "the rest is looked at too"
    assert examined(tmp_path)["database"].level == "finding"
    assert mark.read_text().endswith(" 2\n")


def test_what_needs_a_person_is_a_finding_and_what_is_told_along_a_note(tmp_path):
    with house(tmp_path) as app:
        an_event(app.database, 1, (Status.HELD, "sender_refused", NOW))
        assert examined(tmp_path)["matters"].message.startswith(
            "1 mail is held: the relay does not take our sender (01J"
        )
        with app.database.write() as connection:
            decisions.release(connection, 1, numbers=None, now=NOW)
        assert examined(tmp_path)["matters"].level == "ok"
        an_event(app.database, 2, (Status.FAILED, "recipient_refused", app.database.clock()))
    found = examined(tmp_path)["matters"]
    assert (found.level, "correct the addresses" in found.message) == ("note", True)


@pytest.mark.parametrize(
    ("settings", "level", "part"),
    [
        ({}, "note", "ROLECAST_OPERATORS"),
        ({"operators": "ops@vendor.example"}, "note", "ROLECAST_SENDER"),
        ({"operators": "ops@vendor.example", "sender": "v@vendor.example"}, "ok", "1 hear"),
        ({"operators": "ops@vendor.example", "sender": "v@vendor.example", "delivery": "test"}, "note", "test"),
    ],
)
def test_it_is_said_who_hears_of_what_needs_a_person(tmp_path, settings, level, part):
    found = examined(tmp_path, **settings)["operators"]
    assert (found.level, part in found.message) == (level, True)
