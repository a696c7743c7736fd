"""Limits that all workers keep together: rates, the day's quota, its warm-up; on both databases."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from subscriptions.database import Database
from worker.ledger import Lane
from worker.paces import AT_ONCE, DAY, MIDNIGHT_SECONDS, PATIENCE, SECOND, Choice, Paces, Rest, flight_size, quota_of
from worker.relay import Relay
from worker.schema import paces as paces_table
from worker.schema import relay_days
from worker.settings import RelaySettings

NOON = 1_795_262_400_000_000
"""2026-11-21 12:00 UTC."""


def relay(host: str = "relay.test", **limits: Any) -> Relay:
    settings = RelaySettings(host, 25, False, "none", None, None, connections=8, **({"rate": 0.0} | limits))
    return Relay(settings, host_name="here.test")


def begin(database: Database, paces: Paces, count: int, *relays: Relay, lane: Lane = Lane.BULK, now: int = NOON) -> Any:
    """Begin a flight of `count` mails: (relay, when it starts, how many), or until when it rests."""
    with database.write() as connection:
        choice = paces.choose(connection, relays, among=len(relays), lane=lane, now=now)
        if isinstance(choice, Rest):
            return choice.until
        count = min(count, choice.room)
        starts = paces.take(connection, choice.relay, count, now=now)
        assert starts is not None
        return choice.relay.name.partition(":")[0], starts, count


def test_flights_of_a_limited_relay_start_one_after_the_other(database: Database) -> None:
    one = relay(rate=10)
    starts = [begin(database, Paces({}), 2, one) for _ in range(4)]
    assert [at - NOON for _, at, _ in starts] == [0, 200_000, 400_000, 600_000]
    # a rate that nobody used is not saved up
    assert begin(database, Paces({}), 2, one, now=NOON + DAY)[1] == NOON + DAY


def test_a_rate_holds_over_processes_and_restarts(database: Database) -> None:
    one, starts = relay(rate=50), []

    def worker() -> None:
        for _ in range(5):
            starts.append(begin(database, Paces({}), 2, relay(rate=50), lane=Lane.URGENT)[1])

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(at - NOON for at in starts) == [place * 40_000 for place in range(20)]
    assert begin(database, Paces({}), 1, one)[1] == NOON + 800_000


def test_a_slot_that_is_far_away_is_not_taken(database: Database) -> None:
    slow = relay(rate=0.1)
    assert begin(database, Paces({}), 1, slow)[1] == NOON
    for lane in Lane:
        assert begin(database, Paces({}), 1, slow, lane=lane) == NOON + 10 * SECOND
    assert begin(database, Paces({}), 1, slow, now=NOON + 10 * SECOND)[1] == NOON + 10 * SECOND


def test_bulk_mail_leaves_room_for_urgent_mail_at_a_slow_relay(database: Database) -> None:
    one = relay(rate=1)
    while not isinstance(begin(database, Paces({}), 1, one), int):
        pass
    _, starts, _ = begin(database, Paces({}), 1, one, lane=Lane.URGENT)
    assert starts - NOON <= PATIENCE[Lane.BULK] + SECOND


@pytest.mark.parametrize(("rate", "size"), [(0, 32), (1, 1), (3, 1), (10, 2), (100, 25), (1000, 32)])
def test_a_flight_takes_a_quarter_of_a_second_of_the_rate(rate: float, size: int) -> None:
    assert flight_size([relay(rate=rate)], 32) == size
    assert flight_size([relay(), relay(rate=rate)], 32) == size
    assert flight_size([], 32) == 32


def test_any_number_of_workers_never_exceed_the_quota(database: Database) -> None:
    begun, rested = [], []

    def worker() -> None:
        paces = Paces({})
        while True:
            got = begin(database, paces, 7, relay(daily=100))
            if isinstance(got, int):
                rested.append(got)
                return
            begun.append(got[2])

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(begun) == 100
    midnight = (NOON // DAY + 1) * DAY
    assert all(midnight <= until < midnight + MIDNIGHT_SECONDS * SECOND for until in rested)
    with database.read() as connection:
        assert connection.execute(select(relay_days.c.mails)).scalars().all() == [100]


def test_a_spent_relay_is_passed_over_until_the_next_day(database: Database) -> None:
    first, second = relay("first.test", daily=10), relay("second.test", daily=4)
    paces = Paces({})
    got = [begin(database, paces, 8, first, second) for _ in range(3)]
    assert [(name, count) for name, _, count in got] == [("first.test", 8), ("first.test", 2), ("second.test", 4)]
    assert begin(database, paces, 8, first, second) > NOON
    assert begin(database, Paces({}), 8, first, second) > NOON, "a restart does not reset it"
    assert begin(database, paces, 8, first, second, now=NOON + DAY)[0] == "first.test"


def test_a_spent_relay_beside_one_that_is_down_is_not_waited_for_until_midnight(database: Database) -> None:
    with database.write() as connection:
        choice = Paces({}).choose(connection, [], among=2, lane=Lane.BULK, now=NOON)
        assert isinstance(choice, Rest)
        assert choice.until - NOON < 60 * SECOND
    one = relay(daily=1)
    begin(database, Paces({}), 1, one)
    with database.write() as connection:
        choice = Paces({}).choose(connection, [one], among=2, lane=Lane.BULK, now=NOON)
        assert isinstance(choice, Rest)
        assert choice.until - NOON < 60 * SECOND


@given(daily=st.integers(1, 10**9), warmup=st.integers(0, 60), number=st.integers(1, 90))
def test_the_quota_doubles_until_the_warm_up_is_over(daily: int, warmup: int, number: int) -> None:
    quota = quota_of(daily, warmup, number)
    assert 1 <= quota <= daily
    assert (quota == daily) >= (number >= warmup)
    if number < warmup:
        assert quota == math.ceil(daily * 2.0 ** (number - warmup))
        assert quota <= quota_of(daily, warmup, number + 1) <= 2 * quota


def test_the_warm_up_counts_from_the_relays_first_day_on_record(database: Database) -> None:
    one, sent = relay(daily=1000, warmup=4), []
    for day in range(6):
        _, _, count = begin(database, Paces({}), 5000, one, now=NOON + day * DAY)
        assert isinstance(begin(database, Paces({}), 1, one, now=NOON + day * DAY), int)
        sent.append(count)
    assert sent == [125, 250, 500, 1000, 1000, 1000]


# ---------------------------------------------------------------- domains


def slots(database: Database, paces: Paces, domains: list[str], *, lane: Lane = Lane.BULK, now: int = NOON) -> Any:
    with database.write() as connection:
        later = paces.put_off(connection, dict(enumerate(domains)), lane=lane, now=now)
    return [(later[n] - now) / SECOND if n in later else None for n in range(len(domains))]


def test_mails_to_a_limited_domain_get_slots_of_their_own(database: Database) -> None:
    paces = Paces({"slow.example": 2.0})
    assert slots(database, paces, ["slow.example", "other.example"] * 3) == [None, None, None, None, 1.0, None]
    assert slots(database, Paces({"slow.example": 2.0}), ["slow.example"]) == [1.5], "another process lines up behind"
    assert slots(database, paces, ["slow.example"], now=NOON + 10 * SECOND) == [None]
    assert AT_ONCE == SECOND // 2


def test_a_broadcast_does_not_keep_urgent_mail_from_a_limited_domain(database: Database) -> None:
    paces = Paces({"slow.example": 1.0})
    assert slots(database, paces, ["slow.example"] * 100)[-1] == 99.0
    assert slots(database, paces, ["slow.example"] * 2, lane=Lane.URGENT) == [None, 1.0]
    assert slots(database, paces, ["slow.example"]) == [102.0], "bulk goes slower for it"


def test_nothing_is_asked_of_the_ledger_where_nothing_is_limited(database: Database) -> None:
    assert begin(database, Paces({}), 32, relay()) == ("relay.test", NOON, 32)
    assert slots(database, Paces({}), ["a.example"]) == [None]
    with database.read() as connection:
        assert connection.execute(select(paces_table)).all() == []
        assert connection.execute(select(relay_days)).all() == []


def test_a_choice_names_the_relay_and_its_room(database: Database) -> None:
    one = relay(daily=5)
    with database.write() as connection:
        assert Paces({}).choose(connection, [one], among=1, lane=Lane.BULK, now=NOON) == Choice(one, 5)
        assert Paces({}).take(connection, one, 6, now=NOON) is None
        assert Paces({}).take(connection, one, 5, now=NOON) == NOON
        assert Paces({}).take(connection, one, 1, now=NOON) is None
