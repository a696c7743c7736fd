"""The queue's server fails in the middle of a broadcast: the short form of `python -m tests.faults queues`."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.faults import queues
from tests.faults.play import Play, play
from tests.integration.test_faults_database import compiled

__all__ = ["compiled"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled")]


def every_fault_of_the_queue(one: Play) -> None:
    """Emptied three times, read-only once, away once, its answers lost all the while."""
    queues.emptied(one, times=3)
    queues.read_only(one, seconds=2.0)
    one.valkey.stop()
    one.scene.witness.fault("away")
    one.scene.publish(one.scene.invoices(1, accounts=1, prefix="meanwhile"))
    one.valkey.start()
    one.over()


@pytest.mark.parametrize(
    "fault",
    [every_fault_of_the_queue, queues.replies_lost],
    ids=["it is emptied, read-only and away", "it loses replies"],
)
def test_nobody_is_missed_or_written_to_twice_when_the_queue_fails(fault: Callable[[Play], None]) -> None:
    with play("postgresql", 2_000, dice=random.Random(1), rate=400, lease_seconds=3) as one:
        fault(one)
        assert one.end(bound=0).faults == []
