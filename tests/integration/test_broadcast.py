"""The benchmark in the short form that CI runs: every part once, with few recipients, so that it can't rot."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.bench import latency, resolution, roundtrips, throughput
from tests.bench.goals import Results, judge
from tests.bench.installation import ONE, POSTGRESQL, Servers, make, servers
from tests.bench.stage import Sink, folder

pytestmark = pytest.mark.slow

GROWTH_MB = 30.0
#: How much more memory a large audience may take than a small one (performance.md, G6).


@pytest.fixture(scope="module")
def shared() -> Iterator[Servers]:
    """The counting sink is a C program: skipped at home where nothing compiles it, a failure in CI."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler: install the packages gcc and libc6-dev")
        pytest.skip("no C compiler on this machine")
    with folder() as place, servers(place) as made:
        yield made


def quiet(_text: str) -> None:
    """Nobody watches."""


def dialogue(sink: Sink, sent: bytes, answers: int) -> list[bytes]:
    """Send everything at once, and read so many answers behind the greeting and EHLO's."""
    with socket.create_connection(("127.0.0.1", sink.port), timeout=10) as client, client.makefile("rb") as lines:
        client.sendall(b"EHLO bench.example\r\n")
        while not (offer := lines.readline()).startswith(b"250 "):
            assert offer
        sender = threading.Thread(target=client.sendall, args=[sent])
        sender.start()
        found = [lines.readline()[:3] for _ in range(answers)]
        sender.join()
        return found


def test_the_sink_answers_every_command_of_deep_windows(shared: Servers) -> None:
    sink = shared.chunking
    sink.reset()
    body = b"Subject: x\r\n\r\n" + b"." * 70_000 + b"\r\n.\r\nMAIL FROM:<>\r\n"
    chunked = b"".join(
        b"RSET\r\nMAIL FROM:<s@a.example>\r\nRCPT TO:<r%d@a.example>\r\nBDAT 40000\r\n%bBDAT %d LAST\r\n%b"
        % (number, body[:40_000], len(body) - 40_000, body[40_000:])
        for number in range(64)
    )
    assert dialogue(sink, chunked, 64 * 5) == [b"250"] * 64 * 5
    assert dialogue(sink, b"BDAT 10 LAST\r\nQUIT\r\n...." + b"NOOP\r\n", 2) == [b"503", b"250"]
    assert dialogue(sink, b"NOOP\r\n" * 40_000, 40_000) == [b"250"] * 40_000
    counts = sink.counts()
    assert (counts["accepted"], counts["distinct"], counts["dup"]) == (64, 64, 0)


def test_everybody_gets_exactly_one_mail_and_memory_does_not_grow_with_the_audience(shared: Servers) -> None:
    small, large = (make(ONE, shared, recipients).by_one_command() for recipients in (1_000, 10_000))
    assert small.complete
    assert large.complete
    assert large.peak_mb - small.peak_mb < GROWTH_MB


def test_every_sender_of_the_benchmark_is_measured(shared: Servers) -> None:
    sizes = throughput.Sizes(400, (), 20, 1, configurations=(POSTGRESQL,), at_full_size=())
    found = throughput.measure(shared, sizes, quiet)
    runs = [run for several in found.runs.values() for run in several]
    assert {"postgresql", "dramatiq", "asyncio"} <= {run.name for run in runs}
    assert all(run.complete for run in runs)
    # Not `cpu_of_1000`: the start of a process, which varies, is most of what so few mails cost.
    assert all(run.rate > 0 and sum(run.cpu.values()) > 0 and run.peak_mb > 1 for run in runs)


def test_one_event_is_timed_alone_and_in_the_middle_of_a_broadcast(shared: Servers) -> None:
    times = latency.Times(floor=5, back_to_back=5, idle=1, idle_cpu_seconds=0.5)
    found = latency.measure([make(ONE, shared, 2_000)], times, quiet)
    assert found.problems == []
    assert all(found.seconds.values())
    assert {goal.key for goal in judge(Results(latency=found)) if goal.measured is not None} >= {"G9", "G11"}


def test_round_trips_and_resolution_are_measured(shared: Servers) -> None:
    found = roundtrips.measure(make(ONE, shared, 400), 1, quiet, share=0.05)
    assert all(one["rate"] > 0 for one in found.values())
    assert resolution.measure(5_000)["contacts"] == 5_000
