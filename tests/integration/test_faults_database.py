"""The database fails in the middle of a broadcast: the short form of `python -m tests.faults databases hosts`."""

from __future__ import annotations

import os
import random
import shutil
import time

import pytest

from tests.faults.play import play

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled")]


@pytest.fixture
def compiled() -> None:
    """The sink is a C program: skipped at home where nothing compiles it, a failure in CI."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler: install the packages gcc and libc6-dev")
        pytest.skip("no C compiler on this machine")


def test_nobody_is_missed_or_written_to_twice_when_postgresql_restarts_and_a_worker_is_cut_off_from_it() -> None:
    with play("postgresql", 2_400, dice=random.Random(1), rate=300, lease_seconds=3) as one:
        for share in (0.2, 0.4):
            one.reach(share)
            one.scene.witness.fault("restart")
            one.postgresql.restart(immediate=True)
        one.reach(0.6)
        one.scene.witness.fault("cut off")
        assert one.database is not None
        one.database.cut(silently=True)
        time.sleep(1.0)  # shorter than the lease: nobody takes over, and nothing is sent twice
        one.database.restore()
        one.over()
        assert one.end(bound=0).faults == []
