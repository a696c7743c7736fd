"""`rolecast work --processes N` on Redis: a small parent, a process for each lane, and a new one for one that died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from sqlalchemy import select

from subscriptions.database import Database
from tests.house import ACME, GLOBEX, envelope
from tests.servers import redis_url
from tests.smtpd import SmtpServer
from worker.schema import workers

__all__ = ["redis_url"]


class House:
    """An installation for commands in processes of their own."""

    def __init__(self, folder: Path, broker_url: str, port: int) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ROLECAST_")},
            "ROLECAST_DATABASE_URL": f"sqlite:///{folder / 'rolecast.db'}",
            "ROLECAST_BROKER_URL": broker_url,
            "ROLECAST_RELAY_URLS": f"smtp://127.0.0.1:{port}?tls=none&connections=4",
            "ROLECAST_SENDER": "v@vendor.example",
            "ROLECAST_PUBLIC_URL": "https://notify.vendor.example",
            "ROLECAST_LEASE_SECONDS": "2",
            "ROLECAST_LOG_FORMAT": "json",
        }
        (folder / "accounts.json").write_text(json.dumps({"accounts": [ACME, GLOBEX]}))
        assert self.run("accounts", "import", "accounts.json").returncode == 0

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "worker.cli", *arguments],
                env=self.environment, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "worker.cli", *arguments],
            env=self.environment, cwd=self.folder, text=True, capture_output=True, timeout=60, check=False,
        )  # fmt: skip

    def publish(self, *ids: str) -> None:
        events = [envelope(kind, id=f"{id_}-{kind}") for id_ in ids for kind in ("file.failed", "invoice.issued")]
        (self.folder / "events.json").write_text(json.dumps(events))
        assert self.run("publish", "events.json").returncode == 0

    def at_work(self) -> dict[int, str]:
        """The workers on record: process number -> lanes."""
        database = Database(self.environment["ROLECAST_DATABASE_URL"])
        try:
            with database.read() as connection:
                return {row.pid: row.lanes for row in connection.execute(select(workers.c.pid, workers.c.lanes))}
        finally:
            database.close()

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as running:
        yield running


@contextmanager
def parent(house: House, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`rolecast work --processes 2`, ended with all its children however the test ends."""
    process = house.start("work", "--processes", "2", *arguments)
    try:
        yield process
    finally:
        for pid in (process.pid, *house.at_work()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def until(done: Callable[[], bool], seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z" if Path(f"/proc/{pid}").exists() else True


def test_each_lane_has_a_process_and_one_that_dies_is_replaced(
    tmp_path: Path, redis_url: str, server: SmtpServer
) -> None:
    redis.Redis.from_url(redis_url).flushall()
    house = House(tmp_path, redis_url, server.port)
    with parent(house) as process:
        until(lambda: sorted(house.at_work().values()) == ["bulk", "bulk", "normal", "urgent"])
        house.publish("a")
        until(lambda: len(server.accepted) == 2)
        urgent = next(pid for pid, lanes in house.at_work().items() if lanes == "urgent")
        os.kill(urgent, signal.SIGKILL)
        house.publish("b")
        until(lambda: len(server.accepted) == 4)
        until(lambda: len(house.at_work()) == 4 and urgent not in house.at_work())
        children = list(house.at_work())
        process.terminate()
        assert process.wait(30) == 0
        assert all(gone(pid) for pid in children)
        assert house.at_work() == {}, "who stops in peace leaves no claim behind"
    assert '"worker.died"' in house.log()


def test_children_end_when_their_parent_is_killed(tmp_path: Path, redis_url: str, server: SmtpServer) -> None:
    redis.Redis.from_url(redis_url).flushall()
    house = House(tmp_path, redis_url, server.port)
    with parent(house) as process:
        until(lambda: len(house.at_work()) == 4)
        children = list(house.at_work())
        process.kill()
        until(lambda: all(gone(pid) for pid in children))
        assert house.at_work() == {}


def test_until_idle_ends_the_processes_when_nothing_is_due(tmp_path: Path, redis_url: str, server: SmtpServer) -> None:
    redis.Redis.from_url(redis_url).flushall()
    house = House(tmp_path, redis_url, server.port)
    house.publish("a", "b", "c")
    with parent(house, "--until-idle", "--json") as process:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert json.loads(output) == {"stopped": False, "idle": True}
    assert len(server.accepted) == 6


def test_a_lone_worker_and_workers_on_a_shared_queue_do_not_work_side_by_side(
    tmp_path: Path, redis_url: str, server: SmtpServer
) -> None:
    house = House(tmp_path, redis_url, server.port)
    with parent(house):
        until(lambda: len(house.at_work()) == 4)
        house.environment["ROLECAST_BROKER_URL"] = "memory://"
        refused = house.run("work", "--until-idle")
        assert refused.returncode != 0
        assert "another process works on this database" in refused.stderr
