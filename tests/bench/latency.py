"""One event with two recipients: from before it is accepted until the relay has accepted the second mail.

The relay is the counting sink, whose log says when it accepted which mail, to the microsecond. Measured alone back to
back, alone after idling, and in the middle of a broadcast; embedded (one process with memory:// and SQLite) and on
Redis (two bulk workers, the publisher a process of its own). The floor is a warm connection of smtplib with two mails
that were written before.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import figures, machine
from tests.bench.installation import LATENCY_ACCOUNTS, PROJECT, START_SECONDS, Installation, end
from tests.bench.stage import Sink
from tests.faults.servers import until

PATIENCE_SECONDS = 60.0
WARM_UP = 10
#: Events before the first that is measured.
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Times:
    """How often each is measured; while a broadcast goes on, an event every `every` seconds."""

    floor: int = 300
    back_to_back: int = 300
    idle: int = 20
    every: float = 0.1
    idle_cpu_seconds: float = 5.0


@dataclass(slots=True)
class Latency:
    """Seconds by name: `floor`, `one back to back`, `redis idle`, ... and what idle workers cost."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    idle_cpu_share: float | None = None  # of one core, of all worker processes on Redis together
    problems: list[str] = field(default_factory=list)

    def percentile(self, name: str, share: float) -> float | None:
        """A percentile of one series, in seconds; None where there is none."""
        values = self.seconds.get(name)
        return figures.percentile(values, share) if values else None


class Publishing:
    """A publisher process and the sink whose log tells what it led to."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._number = 0
        assert process.stdin is not None
        assert process.stdout is not None
        self._in, self._out = process.stdin, process.stdout
        if self._out.readline().strip() != b"ready":
            raise SystemExit("the publisher did not start")

    def publish(self, event: dict[str, Any]) -> float:
        """Publish an event; the moment before it was accepted."""
        self._in.write(json.dumps(event).encode() + b"\n")
        self._in.flush()
        answer = self._out.readline()
        if not answer:
            raise SystemExit("the publisher has ended")
        return float(answer)

    def file_failed(self) -> tuple[float, str]:
        """Publish the failure of a file; when, and the domain of the two who hear of it."""
        self._number += 1
        account = f"l{self._number % LATENCY_ACCOUNTS}"
        return self.publish(file_failed(account, time.time_ns())), f"@{account}.example"

    def one(self) -> float:
        """Publish one and wait until the sink has accepted both mails: seconds. Raises `SystemExit`."""
        start = self._log.stat().st_size
        began, domain = self.file_failed()
        wanted = domain.encode()
        ends = time.monotonic() + PATIENCE_SECONDS
        with self._log.open("rb") as file:
            while True:
                file.seek(start)
                mine = [line for line in file.read().splitlines(keepends=True) if wanted in line and line[-1:] == b"\n"]
                if len(mine) >= 2:
                    return int(mine[1].split()[0]) / 1_000_000 - began
                if time.monotonic() > ends:
                    said = [path.read_text(errors="replace")[-1500:] for path in self._log.parent.glob("[pw]*.log")]
                    message = f"the file failure of {domain} was mailed to {len(mine)} of two within a minute"
                    raise SystemExit("\n".join([message, *said]))
                time.sleep(0.0005)


def file_failed(account: str, number: int) -> dict[str, Any]:
    """A file failure for one account."""
    data = {"account": account, "products": ["invoicing"], "file_name": f"in-{number}.csv",
            "failed_at": "2026-11-21T10:00:00Z", "reason": "line 7 has no amount"}  # fmt: skip
    return {"specversion": "1.0", "id": f"file-{number}", "source": "/bench", "type": "file.failed", "data": data}


def measure(homes: Sequence[Installation], times: Times, tell: Tell) -> Latency:
    """Everything about latency, in installations that nobody works on."""
    found = Latency()
    tell("latency: the floor")
    found.seconds["floor"] = floor(homes[0].folder, times.floor)
    for home in homes:
        name = home.configuration.key
        with scene(home) as (publishing, work):
            tell(f"latency: {name}, back to back")
            for _ in range(WARM_UP):
                publishing.one()
            found.seconds[f"{name} back to back"] = [publishing.one() for _ in range(times.back_to_back)]
            tell(f"latency: {name}, after idling")
            found.seconds[f"{name} idle"] = list(_idling(publishing, times.idle))
            if work is not None:
                found.idle_cpu_share = _idle_cpu(work, times.idle_cpu_seconds)
            tell(f"latency: {name}, in the middle of a broadcast")
            found.seconds[f"{name} under load"] = under_load(publishing, home, times, found.problems)
        tell(f"latency: {name}, in the middle of a broadcast, a connection to the relay hangs")
        with scene(home, hang=3) as (publishing, _work):
            publishing.one()
            values = under_load(publishing, home, times, found.problems, hanging=True)
            found.seconds[f"{name} under load, relay hangs"] = values
    return found


def floor(place: Path, times: int) -> list[float]:
    """Two mails that were written before, on a connection that stands: seconds, in the same rhythm as ours."""
    with ExitStack() as stack:
        log = place / "floor.log"
        sink = Sink(place, log=log)
        stack.callback(sink.stop)
        process = _publisher(["tests.bench.floor", str(sink.port)], dict(os.environ), place)
        stack.callback(_end, process, hang=0)
        publishing = Publishing(process, log)
        for _ in range(WARM_UP):
            publishing.one()
        return [publishing.one() for _ in range(times)]


@contextmanager
def scene(home: Installation, *, hang: int = 0) -> Iterator[tuple[Publishing, subprocess.Popen[bytes] | None]]:
    """A publisher, the workers (None: the publisher sends) and a sink of their own that keeps a log."""
    with ExitStack() as stack:
        usual = home.sink
        log = home.folder / "latency.log"
        log.unlink(missing_ok=True)
        home.sink = Sink(home.folder, log=log, hang=hang)
        stack.callback(setattr, home, "sink", usual)
        stack.callback(home.sink.stop)
        work = None
        if home.configuration.redis:
            work = home.start("work", "--processes", "2", errors=home.folder / "work.log")
            stack.callback(_end, work, hang=hang)
            if not until(lambda: home.workers() == 4, seconds=START_SECONDS):
                raise SystemExit(f"the workers did not start: {home.log_end()}")
        command = ["tests.bench.publisher"] + ([] if work else ["--engine"])
        process = _publisher(command, home.environment(), home.folder)
        stack.callback(_end, process, hang=hang)
        yield Publishing(process, log), work


def _publisher(module: list[str], environment: dict[str, str], place: Path) -> subprocess.Popen[bytes]:
    with (place / "publisher.log").open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", *module],
            env=environment | {"PYTHONPATH": str(PROJECT)},
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )


def _end(process: subprocess.Popen[bytes], *, hang: int) -> None:
    """End a process; where a connection hangs nobody waits for it."""
    if hang:
        for pid in machine.family(process.pid)[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
    end(process)


def _idling(publishing: Publishing, times: int) -> Iterator[float]:
    dice = random.Random("idle")
    for _ in range(times):
        time.sleep(dice.uniform(0.5, 1.5))
        yield publishing.one()


def _idle_cpu(work: subprocess.Popen[bytes], seconds: float) -> float:
    before = machine.cpu_seconds(work.pid)
    time.sleep(seconds)
    return (machine.cpu_seconds(work.pid) - before) / seconds


def under_load(
    publishing: Publishing, home: Installation, times: Times, problems: list[str], *, hanging: bool = False
) -> list[float]:
    """Publish a broadcast, and file failures until nine tenths of it are accepted (where a connection hangs, 30)."""
    before = home.sink.counts()["accepted"]
    publishing.publish(json.loads(home.notice().read_text(encoding="utf-8")))
    ends = time.monotonic() + PATIENCE_SECONDS
    until(lambda: home.sink.counts()["accepted"] - before > home.recipients // 50, seconds=PATIENCE_SECONDS)
    began: list[tuple[float, str]] = []
    while time.monotonic() < ends and home.sink.counts()["accepted"] - before < 0.9 * home.recipients:
        began.append(publishing.file_failed())
        time.sleep(times.every)
        if hanging and len(began) == 30:
            break
    if not hanging:
        reached = lambda: home.sink.counts()["accepted"] - before >= home.recipients + 2 * len(began)  # noqa: E731
        if not until(reached, seconds=PATIENCE_SECONDS + home.recipients / 200):
            problems.append(f"{home.configuration.label}: not everything was accepted")
    else:
        time.sleep(3)
    found, missing = _paired(began, home.folder / "latency.log")
    if missing and not hanging:  # one that waits on the hanging connection itself is as slow as we had patience
        problems.append(f"{home.configuration.label}: {missing} file failures were not mailed")
    return found


def _paired(began: list[tuple[float, str]], log: Path) -> tuple[list[float], int]:
    """How long each took, and how many never came: an account's mails came in the order of its events."""
    moments: dict[str, list[float]] = {}
    first = began[0][0] if began else 0.0
    for line in log.read_text(encoding="utf-8").splitlines():
        at, recipient, *_ = line.split()
        moment = int(at) / 1_000_000
        if recipient.startswith(("one@l", "two@l")) and moment >= first:
            moments.setdefault(recipient.partition("@")[2], []).append(moment)
    found, missing = [], 0
    for at, domain in began:
        mine = moments.get(domain.removeprefix("@"), [])
        if len(mine) < 2:
            missing += 1
            found.append(PATIENCE_SECONDS)
            continue
        found.append(mine[1] - at)
        del mine[:2]
    return found, missing
