"""A file failure published in the middle of a heavy load: how long until the relay has accepted it?

Three loads, each with the web side and the workers running: a service notice to everybody, an upgrade notice to
everybody, and single invoices one by one. While the load is worked on, file failures are published over HTTP; the sink
notes when it accepted each. Prints median and worst per load and configuration, and writes `bench-results/`. Ends with
1 where a file failure is missing, or where the load was over before the last of them (then the figure says nothing).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.bench.stage import Sink, Stage, account, folder, free_port
from tests.faults.servers import PostgreSQL, Valkey

LOADS = ("service notice to everybody", "upgrade notice to everybody", "single invoices")
CONFIGURATIONS = ("sqlite", "postgresql")
BETWEEN_SECONDS = 0.1
START_SECONDS = 60.0


def directory(stage: Stage, recipients: int) -> None:
    """Accounts in which a service notice, or an upgrade notice, has so many recipients."""
    document = stage.folder / "directory.jsonl"
    with document.open("w", encoding="utf-8") as file:
        for number in range(recipients // 4):
            one = account(number)
            one["contacts"].append(
                {"id": "f", "email": f"files@a{number}.example", "kind": "group", "roles": ["invoicing_file_failure"]}
            )
            file.write(json.dumps(one) + "\n")
            roles = ("primary_contact", "technical_contact", "technical_contact", "business_user")
            people = [
                {"id": f"t{index}", "name": f"Person {index}", "email": f"t{index}@b{number}.example", "roles": [role]}
                for index, role in enumerate(roles)
            ]
            file.write(json.dumps({"id": f"b{number}", "catalogue": "issuetrak", "contacts": people}) + "\n")
    stage.run("accounts", "import", str(document))


def load_events(load: str, count: int) -> list[dict[str, Any]]:
    """What makes the load: one broadcast, or so many invoices."""
    if load == LOADS[0]:
        kind, data = "service.notice", {"accounts": "all", "title": "Exports move", "body": "From **1 December** on."}
    elif load == LOADS[1]:
        kind = "upgrade.announced"
        data = {"accounts": "all", "version": "9.1", "title": "Version 9.1", "body": "It is **faster**."}
    else:
        accounts = max(1, count // 100)
        return [
            {
                "specversion": "1.0", "id": f"invoice-{number}", "source": "/bench", "type": "invoice.issued",
                "data": {"account": f"a{number % accounts}", "number": str(number), "amount": "12.50",
                         "currency": "EUR", "due_on": "2026-12-21"},
            }
            for number in range(count)
        ]  # fmt: skip
    return [{"specversion": "1.0", "id": kind, "source": "/bench", "type": kind, "data": data}]


def file_failure(number: int) -> dict[str, Any]:
    """A file failure for one account of the directory."""
    data = {"account": f"a{number}", "products": ["invoicing"], "file_name": f"in-{number}.csv",
            "failed_at": "2026-11-21T10:00:00Z", "reason": "line 7 has no amount"}  # fmt: skip
    return {"specversion": "1.0", "id": f"file-{number}", "source": "/bench", "type": "file.failed", "data": data}


def post(url: str, key: str, event: dict[str, Any]) -> None:
    """Publish an event over HTTP."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/cloudevents+json"}
    request = urllib.request.Request(f"{url}/v1/events", json.dumps(event).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


@contextmanager
def at_work(stage: Stage, configuration: str) -> Iterator[None]:
    """The web side and the workers, ended afterwards."""
    commands = [["up"]] if configuration == "sqlite" else [["serve"], ["work", "--processes", "2"]]
    running = [stage.start(*command, errors=stage.folder / "log") for command in commands]
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()


def measure(load: str, configuration: str, *, size: int, times: int) -> dict[str, Any]:
    """One load with its file failures."""
    with ExitStack() as stack:
        place = stack.enter_context(folder())
        log = place / "accepted.log"
        sink = Sink(place, log=log)
        stack.callback(sink.stop)
        port = free_port()
        stage = Stage(place, sink, settings={"ROLECAST_LISTEN": f"127.0.0.1:{port}", "ROLECAST_SECRET_KEYS": "k" * 32})
        if configuration == "postgresql":
            for name in ("pg", "valkey"):
                (place / name).mkdir()
            server, queue = PostgreSQL(place / "pg"), Valkey(place / "valkey")
            for one in (server, queue):
                one.start()
                stack.callback(one.stop)
            stage.database_url, stage.broker_url = server.url, queue.url
            stage.run("db", "upgrade")
        directory(stage, size if load != LOADS[2] else max(8_000, 8 * times))
        key = json.loads(stage.run("keys", "create", "--name", "bench", "--scope", "publish:*", "--json").output)["key"]
        url = f"http://127.0.0.1:{port}"
        with at_work(stage, configuration):
            wait_for(url)
            events = stage.folder / "load.json"
            events.write_text(json.dumps(load_events(load, size)), encoding="utf-8")
            # Many single events take a while to publish, and are worked on meanwhile.
            publishing = stage.start("publish", str(events))
            while sink.counts()["accepted"] < size // 100:
                time.sleep(0.05)
            published = {}
            for number in range(times):
                published[f"files@a{number}.example"] = time.time()
                post(url, key, file_failure(number))
                time.sleep(BETWEEN_SECONDS)
            still = size - (sink.counts()["accepted"] - times)
            ends = time.monotonic() + 30
            while time.monotonic() < ends and len(accepted_at(log, published)) < times:
                time.sleep(0.1)
            found = accepted_at(log, published)
            publishing.kill()
            publishing.wait()
            if publishing.stdout:
                publishing.stdout.close()
    seconds = sorted(found[one] - at for one, at in published.items() if one in found)
    return {
        "load": load,
        "configuration": configuration,
        "size": size,
        "file_failures": times,
        "missing": times - len(seconds),
        "load_left": max(0, still),
        "median_s": round(statistics.median(seconds), 3) if seconds else None,
        "worst_s": round(seconds[-1], 3) if seconds else None,
    }


def wait_for(url: str) -> None:
    """Wait until the web side answers."""
    ends = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                return
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)


def accepted_at(log: Path, wanted: dict[str, float]) -> dict[str, float]:
    """When the sink accepted the mail to each of these recipients, seconds since 1970."""
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        at, recipient, *_ = line.split()
        if recipient in wanted:
            found.setdefault(recipient, int(at) / 1_000_000)
    return found


def run(*, recipients: int, invoices: int, times: int, configurations: tuple[str, ...] = CONFIGURATIONS) -> int:
    """Measure every load in every configuration, print a table; 0 where every figure means something."""
    results = [
        measure(load, configuration, size=invoices if load == LOADS[2] else recipients, times=times)
        for configuration in configurations
        for load in LOADS
    ]
    print(f"{'file failure during':30} {'configuration':12} {'size':>9} {'median s':>9} {'worst s':>9} {'missing':>8}")
    for one in results:
        print(
            f"{one['load']:30} {one['configuration']:12} {one['size']:>9,} {one['median_s'] or 0:>9.3f} "
            f"{one['worst_s'] or 0:>9.3f} {one['missing']:>8}"
        )
    target = Path("bench-results") / f"urgent-{time.strftime('%Y%m%d-%H%M%S')}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    faults = [one for one in results if one["missing"] or not one["load_left"]]
    for one in faults:
        print(f"FAULT: {one}", file=sys.stderr)
    return int(bool(faults))
