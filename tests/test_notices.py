"""Notices to operators: grouped, each thing once, by one of any number of workers, and an end where one is over."""

from __future__ import annotations

import asyncio
import email
import email.policy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from typing import Any

import pytest
from sqlalchemy import insert, select

from subscriptions.database import Database
from tests.house import DAY, NOW
from tests.smtpd import SmtpServer, lose_the_reply, reply
from tests.test_matters import GIVEN_UP, MINUTE, UNKNOWN, a_worker, an_event
from worker import decisions, matters, notices
from worker.ledger import Status
from worker.notices import Notice
from worker.relay import Relay, RelayError, Relays, RelayUnavailable
from worker.schema import notices as rows
from worker.schema import pauses
from worker.settings import Settings, load


def settings(**given: str) -> Settings:
    values = {"relay_urls": "smtps://relay.example", "sender": "Vendor <support@vendor.example>"}
    values |= {"operators": "ops@vendor.example, night@vendor.example"}
    values |= {"public_url": "https://notify.vendor.example"} | given
    return load({f"ROLECAST_{name.upper()}": value for name, value in values.items() if value})


SETTINGS = settings()


def prepared(database: Database, now: int = NOW, given: Settings = SETTINGS, worker: int = 1) -> Notice | None:
    return notices.prepare(database, given, worker, now=now)


def told(database: Database, now: int = NOW) -> Notice:
    """The next notice, prepared and sent."""
    notice = prepared(database, now)
    assert notice is not None
    with database.write() as connection:
        notices.sent(connection, notice, "relay.example:465: 250 ok", now=now)
    return notice


def mail_of(notice: Notice, given: Settings = SETTINGS) -> EmailMessage:
    found = email.message_from_bytes(notices.envelopes(notice, given)[0].body, policy=email.policy.default)
    assert isinstance(found, EmailMessage)
    return found


def a_trouble(database: Database, worker: int, why: str | None, now: int = NOW - MINUTE) -> None:
    with database.write() as connection:
        matters.report(connection, worker, "relay", "mail.example:587", why, now=now)


def test_a_notice_tells_everything_that_stands_in_one_mail(database: Database) -> None:
    event = an_event(database, 1, *[UNKNOWN] * 2, (Status.HELD, "sender_refused", NOW))
    an_event(database, 2, GIVEN_UP)
    a_trouble(database, a_worker(database), "the relay mail.example:587 can't be used now (421 for ops@vendor.example)")
    notice = told(database)
    assert (
        notice.subject
        == "Rolecast at notify.vendor.example, urgent: relay mail.example:587 is down, 3 mails are held, 1 mail failed"
    )
    mail = mail_of(notice)
    assert mail["Subject"] == notice.subject
    assert (mail["From"], mail["To"]) == ("Rolecast <support@vendor.example>", "ops@vendor.example")
    assert mail["Auto-Submitted"] == "auto-generated"
    text = mail.get_content()
    assert f"rolecast deliveries settle {event} --accepted" in text
    assert "2 mails are held: the relay's answer was lost" in text
    assert "o***@vendor.example" in text
    assert "since   2026-11-21T10:00:00.000Z" in text


def test_nothing_is_told_twice_and_what_grew_is_told_after_ten_minutes(database: Database) -> None:
    an_event(database, 1, UNKNOWN)
    told(database)
    assert prepared(database, NOW + 11 * MINUTE) is None
    an_event(database, 2, UNKNOWN)
    told(database, NOW + 12 * MINUTE)
    an_event(database, 3, UNKNOWN)
    assert prepared(database, NOW + 13 * MINUTE) is None
    later = told(database, NOW + 22 * MINUTE)
    assert "3 mails are held: the relay's answer was lost" in later.body
    assert "(1 new since the last notice)" in later.body


def test_what_comes_back_after_somebody_dealt_with_it_is_told_again(database: Database) -> None:
    an_event(database, 1, UNKNOWN, UNKNOWN)
    told(database)
    with database.write() as connection:
        decisions.settle(connection, 1, numbers=[1], accepted=True, by="cli:ada", now=NOW)
    an_event(database, 2, UNKNOWN)
    assert "2 mails are held" in told(database, NOW + 11 * MINUTE).subject


def test_an_end_is_told_and_an_age_is_not(database: Database) -> None:
    worker = a_worker(database, at=NOW + 11 * MINUTE)
    an_event(database, 1, GIVEN_UP)
    a_trouble(database, worker, "it is down")
    told(database)
    a_trouble(database, worker, None)
    ended = told(database, NOW + 11 * MINUTE)
    assert ended.subject == "Rolecast at notify.vendor.example: relay mail.example:587 is down no more"
    assert "This was told before and still stands:\n\n- 1 mail failed" in ended.body
    assert prepared(database, NOW + 8 * DAY) is None


def test_the_last_end_gives_the_all_clear(database: Database) -> None:
    an_event(database, 1, UNKNOWN)
    told(database)
    with database.write() as connection:
        decisions.settle(connection, 1, numbers=None, accepted=True, by="cli:ada", now=NOW)
    clear = told(database, NOW + 10 * MINUTE)
    assert clear.subject == "Rolecast at notify.vendor.example: all clear, 1 mail is held no more"
    assert "All clear: nothing needs a person now." in clear.body
    assert prepared(database, NOW + 30 * MINUTE) is None


def test_an_unknown_outcome_is_told_once_more_after_a_day(database: Database) -> None:
    an_event(database, 1, UNKNOWN)
    told(database)
    assert prepared(database, NOW + DAY) is None
    late = told(database, NOW + DAY + MINUTE)
    assert late.subject == "Rolecast at notify.vendor.example, urgent: 1 mail is held"
    assert "! 1 mail is held: the relay's answer was lost" in late.body
    assert prepared(database, NOW + 3 * DAY) is None


def test_refused_addresses_are_told_along_and_never_by_themselves(database: Database) -> None:
    an_event(database, 1, (Status.FAILED, "recipient_refused", NOW))
    assert prepared(database) is None
    an_event(database, 2, UNKNOWN)
    notice = told(database)
    assert notice.subject == "Rolecast at notify.vendor.example: 1 mail is held"
    assert "1 mail failed: the relay refused the address for good" in notice.body


def test_a_notice_says_which_installation_it_is_about(sqlite_database: Database) -> None:
    an_event(sqlite_database, 1, UNKNOWN)
    notice = prepared(sqlite_database, given=settings(public_url="https://staging.vendor.example:8443/rolecast"))
    assert notice is not None
    assert mail_of(notice)["Subject"] == "Rolecast at staging.vendor.example:8443: 1 mail is held"


# ---------------------------------------------------------------- one of many workers


def test_of_any_number_of_workers_one_sends(database: Database) -> None:
    an_event(database, 1, UNKNOWN)
    with ThreadPoolExecutor(8) as pool:
        made = [one for one in pool.map(lambda worker: prepared(database, worker=worker), range(16)) if one]
    assert len(made) == 1
    later = NOW + 5 * MINUTE
    with ThreadPoolExecutor(8) as pool:
        again = [one for one in pool.map(lambda worker: prepared(database, later, worker=worker), range(16)) if one]
    assert [(one.id, one.body) for one in again] == [(made[0].id, made[0].body)]
    assert mail_of(again[0])["Message-ID"] == mail_of(made[0])["Message-ID"]
    first, second = notices.envelopes(made[0], SETTINGS)
    assert (first.recipient, second.recipient) == ("ops@vendor.example", "night@vendor.example")
    assert first.body.split(b"Message-ID")[1][:80] != second.body.split(b"Message-ID")[1][:80]
    with database.write() as connection:
        notices.sent(connection, again[0], "250 ok", now=later)
        row = connection.execute(select(rows)).one()
    assert (row.sent_at, row.reply) == (later, "250 ok")
    assert prepared(database, later + MINUTE) is None


def test_a_notice_that_nobody_took_is_made_anew_as_things_stand_then(database: Database) -> None:
    an_event(database, 1, UNKNOWN)
    notice = prepared(database)
    assert notice is not None
    an_event(database, 2, UNKNOWN)
    with database.write() as connection:
        notices.give_back(connection, notice)
    again = told(database, NOW + MINUTE)
    assert "2 mails are held" in again.subject
    with database.write() as connection:
        notices.give_back(connection, again)  # too late: it was sent
    assert prepared(database, NOW + 2 * MINUTE) is None


# ---------------------------------------------------------------- to whom


@pytest.mark.parametrize(
    "given", [{"operators": ""}, {"sender": ""}, {"delivery": "test"}, {"delivery": "team", "team": "@acme.example"}]
)
def test_nobody_is_mailed_by_accident(sqlite_database: Database, given: dict[str, str]) -> None:
    an_event(sqlite_database, 1, UNKNOWN)
    assert prepared(sqlite_database, given=settings(**given)) is None


def test_under_team_only_operators_of_the_team_are_told(sqlite_database: Database) -> None:
    chosen = settings(delivery="team", team="night@vendor.example")
    an_event(sqlite_database, 1, UNKNOWN)
    notice = prepared(sqlite_database, given=chosen)
    assert notice is not None
    assert [one.recipient for one in notices.envelopes(notice, chosen)] == ["night@vendor.example"]


def test_hostile_words_stay_words(sqlite_database: Database) -> None:
    evil = "x\r\nBcc: all@acme.example\r\n\r\n=?utf-8?q?=0aBcc:_a@b.example?= é {n} \u2028"
    worker = a_worker(sqlite_database)
    with sqlite_database.write() as connection:
        matters.report(connection, worker, "queue", evil, evil, now=NOW - MINUTE)
        connection.execute(insert(pauses).values(scope="class", value=evil, by="rolecast:{n}", at=NOW))
    notice = told(sqlite_database)
    mail = mail_of(notice)
    assert mail["Bcc"] is None
    assert sorted(mail.keys()) == sorted(
        ["From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "MIME-Version", "Content-Type",
         "Content-Transfer-Encoding"]
    )  # fmt: skip
    raw = notices.envelopes(notice, SETTINGS)[0].body
    assert raw.isascii()
    assert b"\n" not in raw.replace(b"\r\n", b"")
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    assert not [line for line in mail.get_content().splitlines() if line.startswith("Bcc")]


# ---------------------------------------------------------------- the hand-over


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as running:
        yield running


def handed_over(server: SmtpServer, mails: Any) -> str:
    async def run() -> str:
        (relay,) = load({"ROLECAST_RELAY_URLS": f"smtp://127.0.0.1:{server.port}?tls=none"}).relay_urls
        relays = Relays([Relay(relay, host_name="vendor.example")])
        try:
            return await notices.tell(relays, mails)
        finally:
            await relays.close()

    return asyncio.run(run())


def some_mails(database: Database) -> Any:
    an_event(database, 1, UNKNOWN)
    notice = prepared(database)
    assert notice is not None
    return notices.envelopes(notice, SETTINGS)


def test_a_notice_reaches_every_operator(sqlite_database: Database, server: SmtpServer) -> None:
    said = handed_over(server, some_mails(sqlite_database))
    assert "2 of 2 taken: 250" in said
    assert [mail.recipient for mail in server.accepted] == ["ops@vendor.example", "night@vendor.example"]


def test_one_operator_who_is_refused_keeps_nothing_from_the_other(
    sqlite_database: Database, server: SmtpServer
) -> None:
    server.on("rcpt", reply(550, "no such user"), nth=1)
    assert "1 of 2 taken" in handed_over(server, some_mails(sqlite_database))


def test_a_lost_answer_counts_as_told(sqlite_database: Database, server: SmtpServer) -> None:
    server.on("dot", lose_the_reply())
    assert "taken" in handed_over(server, some_mails(sqlite_database))


def test_where_nobody_could_be_told_the_caller_hears_of_it(sqlite_database: Database, server: SmtpServer) -> None:
    server.on("rcpt", reply(450, "later"))
    mails = some_mails(sqlite_database)
    with pytest.raises(RelayUnavailable, match="450 later"):
        handed_over(server, mails)
    server.stop()
    with pytest.raises(RelayError):
        handed_over(server, mails)
