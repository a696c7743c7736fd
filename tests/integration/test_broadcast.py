"""The broadcast of `make bench` and the kills of `make kills`, in the short form that CI runs."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.bench.broadcast import GROWTH_MB, measure
from tests.bench.kills import play
from tests.bench.stage import Sink, Stage

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiler() -> None:
    """The counting sink is a C program: skipped at home where nothing compiles it, a failure in CI."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler: install the packages gcc and libc6-dev")
        pytest.skip("no C compiler on this machine")


def test_everybody_gets_exactly_one_mail_and_memory_does_not_grow_with_the_audience() -> None:
    small, large = measure(1_000), measure(20_000)
    for one in (small, large):
        assert one["accepted_by_the_sink"] == one["distinct"] == one["recipients"]
        assert one["ledger"] == {"accepted": one["recipients"]}
    assert large["peak_mb"] - small["peak_mb"] < GROWTH_MB


def test_three_kills_in_a_broadcast_miss_nobody_and_make_few_second_copies(tmp_path: Path) -> None:
    sink = Sink(tmp_path, delay=1000)
    try:
        assert play(Stage(tmp_path, sink, lease_seconds=3), random.Random(7), recipients=6_000, kills=3) == 0
    finally:
        sink.stop()
