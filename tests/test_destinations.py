"""Domains that refuse for now: left alone together, tried by one mail at a time; on both databases."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from sqlalchemy import select

from subscriptions.database import Database
from worker.destinations import FAILURES, FORGET_HOURS, MINUTE, Destinations, about_the_domain, record
from worker.relay import About, Kind, Outcome
from worker.schema import domains

NOW = 1_795_255_200_000_000
LATER = Outcome(Kind.TEMPORARY, About.RECIPIENT, 451, "4.4.1 no answer from host", "rcpt")
YES = Outcome(Kind.ACCEPTED, About.CONTENT, 250, "taken", "dot")
DEAD = "dead.example"


def may_go(database: Database, process: Destinations, names: Iterable[str], now: int) -> list[bool]:
    """Which mails of a flight to these domains may go now."""
    numbered = dict(enumerate(names))
    with database.write() as connection:
        later = process.put_off(connection, numbered, now=now)
    assert all(at > now for at in later.values())
    return [n not in later for n in numbered]


def hear(database: Database, process: Destinations, outcome: Outcome, now: int, *, times: int = 1, tried: int = 0,
         domain: str = DEAD) -> None:  # fmt: skip
    """Mails to a domain are answered, and that is committed."""
    for _ in range(times):
        process.answered(domain, outcome, attempts=tried, now=now)
    write(database, process, now)


def write(database: Database, process: Destinations, now: int) -> None:
    changes = process.changes()
    with database.write() as connection:
        record(connection, changes, now=now)
    process.written(changes)


def row(database: Database) -> tuple[int, int, str] | None:
    with database.read() as connection:
        found = connection.execute(select(domains.c.failures, domains.c.until_at, domains.c.said)).one_or_none()
    return None if found is None else (found.failures, found.until_at, found.said)


def test_three_refusals_in_a_row_and_no_process_mails_the_domain(database: Database) -> None:
    here, there = Destinations(), Destinations()
    hear(database, here, LATER, NOW, times=FAILURES - 1)
    assert row(database) is None
    assert may_go(database, here, [DEAD], NOW) == [True]
    hear(database, here, LATER, NOW)
    found = row(database)
    assert found is not None
    assert (found[0], found[2]) == (3, "451 4.4.1 no answer from host (at RCPT TO)")
    assert NOW + MINUTE <= found[1] <= NOW + 2 * MINUTE
    for process in (here, there):
        assert may_go(database, process, [DEAD, "lively.example", DEAD], NOW + 1) == [False, True, False]


def test_an_acceptance_between_them_begins_the_count_again(database: Database) -> None:
    here = Destinations()
    for _ in range(5):
        hear(database, here, LATER, NOW, times=2)
        hear(database, here, YES, NOW)
    assert row(database) is None


def test_when_the_wait_is_over_one_mail_of_all_workers_tries(database: Database) -> None:
    here, there = Destinations(), Destinations()
    hear(database, here, LATER, NOW, times=3)
    assert may_go(database, there, [DEAD], NOW) == [False]
    now = NOW + 3 * MINUTE
    assert may_go(database, here, [DEAD] * 5, now) == [True, False, False, False, False]
    assert may_go(database, there, [DEAD] * 5, now) == [False] * 5
    assert may_go(database, here, [DEAD] * 5, now) == [False] * 5
    # refused again: the wait is longer
    hear(database, here, LATER, now)
    found = row(database)
    assert found is not None
    assert found[0] == 4
    assert now + MINUTE < found[1] <= now + 3 * MINUTE


def test_a_domain_that_stays_dead_is_tried_ever_more_seldom_and_at_last_once_an_hour(database: Database) -> None:
    here, now, waits = Destinations(), NOW, []
    hear(database, here, LATER, now, times=3)
    for _ in range(10):
        found = row(database)
        assert found is not None
        waits.append((found[1] - now) / MINUTE)
        now = found[1] + 1
        assert may_go(database, here, [DEAD] * 3, now) == [True, False, False]
        hear(database, here, LATER, now)
    for wait, expected in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60], strict=True):
        assert max(1, 0.8 * expected) <= wait <= 1.2 * expected


def test_an_acceptance_ends_the_wait_for_everybody(database: Database) -> None:
    here, there = Destinations(), Destinations()
    hear(database, here, LATER, NOW, times=3)
    assert may_go(database, there, [DEAD], NOW) == [False]
    now = NOW + 3 * MINUTE
    assert may_go(database, here, [DEAD], now) == [True]
    hear(database, here, YES, now)
    assert row(database) is None
    assert may_go(database, here, [DEAD] * 3, now) == [True] * 3
    assert may_go(database, there, [DEAD] * 3, now + MINUTE) == [True] * 3


def test_mails_that_were_on_their_way_do_not_make_the_wait_longer(database: Database) -> None:
    here = Destinations()
    hear(database, here, LATER, NOW, times=20)
    found = row(database)
    assert found is not None
    assert found[0] == 3
    assert here.waits(DEAD, now=NOW + 1) is not None
    assert here.waits("lively.example", now=NOW + 1) is None


def test_a_mail_that_was_to_try_and_never_went_is_followed_by_another(database: Database) -> None:
    here = Destinations()
    hear(database, here, LATER, NOW, times=3)
    assert may_go(database, here, [DEAD], NOW + 3 * MINUTE) == [True]
    assert may_go(database, here, [DEAD], NOW + 5 * MINUTE) == [True]


def test_what_is_not_yet_written_is_known_all_the_same(database: Database) -> None:
    here = Destinations()
    for _ in range(3):
        here.answered(DEAD, LATER, attempts=0, now=NOW)
    assert may_go(database, here, [DEAD], NOW) == [False]
    assert row(database) is None
    write(database, here, NOW)
    assert row(database) is not None
    assert here.changes() == {}


def test_a_domain_that_greylists_is_known_after_its_first_acceptance(database: Database) -> None:
    """Its refusals of first tries say nothing then: else a thousand mails would be let through by threes."""
    here = Destinations()
    hear(database, here, YES, NOW, tried=2)
    hear(database, here, LATER, NOW, times=50)
    assert row(database) is None
    hear(database, here, LATER, NOW, times=3, tried=1)
    assert row(database) is not None


@pytest.mark.parametrize(
    ("outcome", "counts"),
    [
        (LATER, True),
        (Outcome(Kind.TEMPORARY, About.RECIPIENT, 450, "4.7.1 try later", "rcpt"), True),
        (Outcome(Kind.TEMPORARY, About.RECIPIENT, 450, "no", "rcpt"), True),
        (Outcome(Kind.NOT_SENT, About.RELAY, text="no answer in time", stage="rcpt"), True),
        (Outcome(Kind.NOT_SENT, About.RELAY, text="no answer in time", stage="mail"), False),
        (Outcome(Kind.NOT_SENT, About.RELAY, text="the connection was lost", stage="rcpt"), False),
        (Outcome(Kind.TEMPORARY, About.RECIPIENT, 450, "4.2.0 Greylisted, see http://postgrey.example", "rcpt"), False),
        (Outcome(Kind.TEMPORARY, About.RECIPIENT, 451, "4.7.1 Graylisting in action", "rcpt"), False),
        (Outcome(Kind.TEMPORARY, About.RECIPIENT, 450, "4.2.1 this mailbox gets too much", "rcpt"), False),
        (Outcome(Kind.TEMPORARY, About.RECIPIENT, 452, "mailbox full", "rcpt"), False),
        (Outcome(Kind.TEMPORARY, About.RECIPIENT, 552, "5.2.2 mailbox full", "rcpt"), False),
        (Outcome(Kind.TEMPORARY, About.RELAY, 421, "too many", "rcpt"), False),
        (Outcome(Kind.TEMPORARY, About.CONTENT, 451, "later", "dot"), False),
        (Outcome(Kind.PERMANENT, About.RECIPIENT, 550, "5.1.1 unknown", "rcpt"), False),
        (YES, False),
    ],
)  # fmt: skip
def test_what_counts_against_a_domain(outcome: Outcome, counts: bool) -> None:
    assert about_the_domain(outcome) is counts


def test_of_two_waits_the_longer_one_stays_and_old_ones_are_forgotten(database: Database) -> None:
    here, there = Destinations(), Destinations()
    hear(database, here, LATER, NOW, times=3, domain="old.example")
    now = NOW + (FORGET_HOURS + 1) * 60 * MINUTE
    hear(database, here, LATER, now, times=3)
    hear(database, there, LATER, NOW, times=3)
    found = row(database)
    assert found is not None, "old.example is forgotten"
    assert found[1] > now
