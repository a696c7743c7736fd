"""The broadcast of `make bench`, in the short form that CI runs."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.bench.broadcast import GROWTH_MB, measure

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
