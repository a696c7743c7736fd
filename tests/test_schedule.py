"""Retries: never too soon, never too late, never all at once (reliability.md R19)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.schedule import HOUR, MINUTE, Over, in_time, retry_at
from worker.settings import Settings

NOW = 1_795_255_200_000_000
MINUTES = st.lists(st.integers(1, 1440), min_size=1, max_size=12)
SPREAD = st.floats(0, 1)


@given(
    attempts=st.integers(1, 200), minutes=MINUTES, hours=st.integers(1, 720), age=st.integers(0, 800 * HOUR),
    life=st.none() | st.integers(0, 800 * HOUR), spread=SPREAD,
)  # fmt: skip
def test_a_retry_comes_after_a_minute_or_more_and_before_the_mails_time_is_over(
    attempts: int, minutes: list[int], hours: int, age: int, life: int | None, spread: float
) -> None:
    now, expires_at = NOW + age, None if life is None else NOW + life
    at = retry_at(
        attempts, minutes=minutes, give_up_hours=hours, now=now, owed_since=NOW, expires_at=expires_at, spread=spread
    )
    wait = minutes[min(attempts, len(minutes)) - 1] * MINUTE
    latest = now + max(MINUTE, int(wait * 1.2) + 1)
    if isinstance(at, Over):
        ends = NOW + hours * HOUR
        first = min(ends, expires_at) if expires_at is not None else ends
        assert first <= latest, "it is over only where its next attempt could come too late"
        assert at is (Over.EXPIRED if expires_at is not None and expires_at <= ends else Over.GIVEN_UP)
    else:
        assert now + max(MINUTE, int(wait * 0.8)) <= at <= latest
        assert at < NOW + hours * HOUR
        assert expires_at is None or at < expires_at


@given(minutes=MINUTES, hours=st.integers(1, 200), life=st.none() | st.integers(1, 250 * HOUR), spread=SPREAD)
def test_a_mail_that_is_always_refused_ends_in_time(
    minutes: list[int], hours: int, life: int | None, spread: float
) -> None:
    now, attempts, expires_at = NOW, 0, None if life is None else NOW + life
    while True:
        attempts += 1
        at = retry_at(
            attempts, minutes=minutes, give_up_hours=hours, now=now, owed_since=NOW, expires_at=expires_at,
            spread=spread,
        )  # fmt: skip
        if isinstance(at, Over):
            break
        assert at - now >= MINUTE
        now = at
    assert now < NOW + hours * HOUR
    assert attempts <= 1 + hours * 60


@pytest.mark.parametrize(
    ("attempts", "minutes"), [(1, 1), (2, 5), (3, 15), (4, 30), (5, 60), (6, 120), (7, 240), (8, 240), (99, 240)]
)
def test_the_shipped_schedule_grows_from_a_minute_to_four_hours(attempts: int, minutes: int) -> None:
    settings = Settings()
    at = retry_at(
        attempts, minutes=settings.retry_minutes_of("security"), give_up_hours=settings.give_up_hours_of("security"),
        now=NOW, owed_since=NOW, expires_at=None, spread=0.5,
    )  # fmt: skip
    assert at == NOW + minutes * MINUTE


def test_the_earlier_end_is_the_one_that_is_told() -> None:
    def end(hours: int, expires: int) -> int | Over:
        return in_time(NOW + 5 * HOUR, give_up_hours=hours, owed_since=NOW, expires_at=NOW + expires * HOUR)

    assert (end(6, 7), end(6, 2), end(2, 4), end(2, 7)) == (
        NOW + 5 * HOUR, Over.EXPIRED, Over.GIVEN_UP, Over.GIVEN_UP,
    )  # fmt: skip
