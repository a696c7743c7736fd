"""Installations of Rolecast in its configurations, worked by the real commands, and what one broadcast costs there.

An installation is made and filled once; every measurement publishes a new event into it. Workers run before an event
is published and have sent a small broadcast, so that their start is in no figure; the `rolecast publish` command is
started for each event, and its whole processor time is told apart.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import func, select

from subscriptions.database import Database
from tests.bench import machine
from tests.bench.stage import RECIPIENTS_PER_ACCOUNT, Sink, Stage
from tests.faults.servers import PostgreSQL, Valkey, until
from worker.ledger import Status
from worker.schema import deliveries, events, workers

WARM_UP_ACCOUNTS = 500
#: What a small broadcast goes to before anything is measured: every worker has sent some of it.
LATENCY_ACCOUNTS = 50
#: Accounts of their own for `tests.bench.latency`; nobody there gets a service notice.
START_SECONDS = 60.0
STILL_SECONDS = 60.0
#: A broadcast that moves no further for so long has failed; it is counted as it stands.
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Configuration:
    """How an installation works: one process on SQLite, unless told otherwise."""

    key: str
    label: str
    redis: bool = False
    postgresql: bool = False
    chunking: bool = True
    computes: Literal["", "in_a_block", "outside"] = ""  # where an operator's template works with a name


ONE = Configuration("one", "one process, SQLite")
REDIS = Configuration("redis", "Redis, 2 workers, SQLite", redis=True)
POSTGRESQL = Configuration("postgresql", "Redis, 2 workers, PostgreSQL", redis=True, postgresql=True)
PIPELINING = Configuration("pipelining", "Redis, 2 workers, SQLite; no CHUNKING", redis=True, chunking=False)
IN_PARTS = Configuration("in_parts", "Redis, 2 workers, SQLite; in parts", redis=True, computes="in_a_block")
IN_FULL = Configuration("in_full", "Redis, 2 workers, SQLite; in full", redis=True, computes="outside")


@dataclass(slots=True)
class Run:
    """One measured broadcast, of whatever sender."""

    name: str
    recipients: int
    seconds: float
    accepted: int
    distinct: int
    ledger: int | None  # deliveries recorded as accepted; None for those that keep no ledger
    cpu: dict[str, float]  # processor seconds of workers, publisher, queue, database
    started_cpu: float  # of these, what starting the publisher takes
    peak_mb: float  # the largest process
    peak_sum_mb: float  # all of the workers' processes together
    bytes_a_mail: float
    sink_cpu: float

    @property
    def rate(self) -> float:
        """Mails a second."""
        return self.recipients / self.seconds

    @property
    def cpu_of_1000(self) -> float:
        """Processor seconds for 1,000 mails, over all processes but the sink."""
        return 1000 * sum(self.cpu.values()) / self.recipients

    @property
    def running_cpu_of_1000(self) -> float:
        """The same without the publisher's start."""
        return 1000 * (sum(self.cpu.values()) - self.started_cpu) / self.recipients

    @property
    def complete(self) -> bool:
        """Whether the sink, the ledger and the recipients are the same number."""
        return self.recipients == self.accepted == self.distinct and self.ledger in (None, self.recipients)

    def as_json(self) -> dict[str, Any]:
        """For the raw results."""
        more = {"rate": self.rate, "cpu_of_1000": self.cpu_of_1000, "running_cpu_of_1000": self.running_cpu_of_1000}
        return asdict(self) | more | {"complete": self.complete}


@dataclass(slots=True)
class Servers:
    """What installations and peers share: sinks, a queue's server and a database server, all on loopback."""

    folder: Path
    chunking: Sink
    pipelining: Sink
    valkey: Valkey
    postgresql: PostgreSQL
    _queues: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # 0 is the peers'; there are 16

    def new_queue(self) -> str:
        """The URL of a queue that nobody else uses."""
        return self.valkey.url.removesuffix("/0") + f"/{next(self._queues)}"

    def peer_queue(self) -> str:
        """The URL of an empty queue for a peer."""
        self.valkey.call("FLUSHDB")
        return self.valkey.url

    def new_database(self, name: str) -> str:
        """The URL of an empty database of the server."""
        self.postgresql.start()
        self.postgresql.call(f"CREATE DATABASE {name}")
        return self.postgresql.url.removesuffix("/rolecast") + f"/{name}"


@contextmanager
def servers(folder: Path) -> Iterator[Servers]:
    """Start them; PostgreSQL is started when it is first asked for."""
    with ExitStack() as stack:
        sinks = [Sink(folder), Sink(folder, chunking=False)]
        for sink in sinks:
            stack.callback(sink.stop)
        for name in ("valkey", "pg"):
            (folder / name).mkdir()
        postgresql = PostgreSQL(folder / "pg")
        stack.callback(postgresql.stop)
        yield Servers(folder, *sinks, stack.enter_context(Valkey(folder / "valkey")), postgresql)


@dataclass(slots=True, kw_only=True)
class Installation(Stage):
    """One configuration with its directory. `open` makes it; workers run only inside `at_work`."""

    configuration: Configuration
    servers: Servers
    recipients: int
    _events: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _work: subprocess.Popen[bytes] | None = None
    _start_cpu: float = 0.0  # of the publisher

    @contextmanager
    def at_work(self, *, warm_up_accounts: int = WARM_UP_ACCOUNTS) -> Iterator[subprocess.Popen[bytes]]:
        """Workers that are warm; ended afterwards."""
        many = ("--processes", "2") if self.configuration.redis else ()
        self._work = self.start("work", *many, errors=self.folder / "work.log")
        try:
            wanted = 4 if self.configuration.redis else 1
            if not until(lambda: self.workers() == wanted, seconds=START_SECONDS):
                raise SystemExit(f"the workers did not start: {self.log_end()}")
            self._warm_up(min(warm_up_accounts, self.recipients // RECIPIENTS_PER_ACCOUNT))
            yield self._work
        finally:
            end(self._work)
            self._work = None

    def log_end(self) -> str:
        """The last that the workers said."""
        path = self.folder / "work.log"
        return path.read_text(encoding="utf-8", errors="replace")[-2000:] if path.exists() else ""

    def broadcast(self, accounts: int | None = None) -> Run:
        """Publish a service notice to everybody (or to the first accounts) and see it through."""
        assert self._work is not None
        recipients = self.recipients if accounts is None else accounts * RECIPIENTS_PER_ACCOUNT
        self.sink.reset()
        before, sink_before = self._cpu(), self.sink.counts()["cpu"]
        published = self.run("publish", str(self.notice(accounts)), "--json")
        ulid = json.loads(published.output)["receipts"][0]["event"]
        self.see_through(ulid, recipients)
        after, counts = self._cpu(), self.sink.counts()
        peaks = machine.peaks_mb(self._work.pid)
        cpu = {name: after[name] - before[name] for name in after} | {"publisher": published.cpu_seconds}
        return Run(
            name=self.configuration.key,
            recipients=recipients,
            seconds=counts["last"] - self._accepted_at(ulid),
            accepted=counts["accepted"],
            distinct=counts["distinct"],
            ledger=self.recorded(ulid),
            cpu=cpu,
            started_cpu=min(self._start_cpu, published.cpu_seconds),
            peak_mb=peaks[0],
            peak_sum_mb=sum(peaks),
            bytes_a_mail=counts["bytes"] / max(1, counts["accepted"]),
            sink_cpu=counts["cpu"] - sink_before,
        )

    def by_one_command(self) -> Run:
        """The same with `rolecast publish --wait` alone, whose start, planning and end are in every figure."""
        self.sink.reset()
        sink_before = self.sink.counts()["cpu"]
        ran = self.run("publish", str(self.notice()), "--wait", "--json")
        counts, told = self.sink.counts(), json.loads(ran.output)
        return Run(
            name=f"{self.configuration.key}_command",
            recipients=self.recipients,
            seconds=ran.seconds,
            accepted=counts["accepted"],
            distinct=counts["distinct"],
            ledger=told["totals"].get("accepted", 0),
            cpu={"workers": ran.cpu_seconds},
            started_cpu=0.0,
            peak_mb=ran.peak_mb,
            peak_sum_mb=ran.peak_mb,
            bytes_a_mail=counts["bytes"] / max(1, counts["accepted"]),
            sink_cpu=counts["cpu"] - sink_before,
        )

    def notice(self, accounts: int | None = None) -> Path:
        """The file of a new service notice, to everybody or to the first accounts."""
        notice = json.loads((self.folder / "event.json").read_text(encoding="utf-8"))
        notice["id"] = f"bench-{next(self._events)}"
        if accounts is not None:
            notice["data"]["accounts"] = [f"a{number}" for number in range(accounts)]
        path = self.folder / "notice.json"
        path.write_text(json.dumps(notice), encoding="utf-8")
        return path

    def see_through(self, ulid: str, recipients: int) -> None:
        """Wait until the sink has what an event owes and the event is done, or until nothing moves any more."""
        accepted, moved = -1, time.monotonic()
        while accepted < recipients or not self._done(ulid):
            found = self.sink.counts()["accepted"]
            if found != accepted:
                accepted, moved = found, time.monotonic()
            elif time.monotonic() - moved > STILL_SECONDS:
                return
            time.sleep(0.02)

    def recorded(self, ulid: str) -> int:
        """How many deliveries of an event the ledger calls accepted."""
        return int(
            self._ask(
                select(func.count())
                .select_from(deliveries)
                .join(events, events.c.id == deliveries.c.event_id)
                .where(events.c.ulid == ulid, deliveries.c.status == int(Status.ACCEPTED))
            )
        )

    def _warm_up(self, accounts: int) -> None:
        self.sink.reset()
        ran = self.run("publish", str(self.notice(accounts)), "--json")
        self._start_cpu = ran.cpu_seconds
        self.see_through(json.loads(ran.output)["receipts"][0]["event"], accounts * RECIPIENTS_PER_ACCOUNT)
        if self.sink.counts()["accepted"] < accounts * RECIPIENTS_PER_ACCOUNT:
            raise SystemExit(f"{self.configuration.label}: the workers do not send: {self.log_end()}")

    def _cpu(self) -> dict[str, float]:
        assert self._work is not None
        found = {"workers": machine.cpu_seconds(self._work.pid)}
        if self.configuration.redis:
            found["queue"] = machine.cpu_seconds(self.servers.valkey.pid)
        if self.configuration.postgresql:
            found["database"] = machine.cpu_seconds(self.servers.postgresql.pid)
        return found

    def workers(self) -> int:
        """How many worker processes are on record."""
        return int(self._ask(select(func.count()).select_from(workers)))

    def _done(self, ulid: str) -> bool:
        return bool(self._ask(select(events.c.status).where(events.c.ulid == ulid)) == "done")

    def _accepted_at(self, ulid: str) -> float:
        """When an event was accepted, by the monotonic clock that the sink uses."""
        micros = self._ask(select(events.c.accepted_at).where(events.c.ulid == ulid))
        return float(micros) / 1_000_000 - time.time() + time.monotonic()

    def _ask(self, query: Any) -> Any:
        database = Database(self.environment()["ROLECAST_DATABASE_URL"])
        try:
            with database.read() as connection:
                return connection.execute(query).scalar_one()
        finally:
            database.close()


def make(
    configuration: Configuration,
    servers: Servers,
    recipients: int,
    *,
    like: Installation | None = None,
    sink: Sink | None = None,
) -> Installation:
    """Make an installation with a directory in which a service notice has so many recipients.

    The directory is imported, or is that of another installation on SQLite, with all that was published there.
    """
    place = servers.folder / f"{configuration.key}-{recipients}"
    place.mkdir()
    made = Installation(
        place,
        sink or (servers.chunking if configuration.chunking else servers.pipelining),
        configuration=configuration,
        servers=servers,
        recipients=recipients,
        settings={"ROLECAST_SECRET_KEYS": "bench-" * 6},
    )
    if configuration.redis:
        made.broker_url = servers.new_queue()
    if configuration.postgresql:
        made.database_url = servers.new_database(f"bench_{recipients}")
        made.run("db", "upgrade")
    if configuration.computes:
        made.settings["ROLECAST_TEMPLATES_DIR"] = str(_template(place, configuration.computes))
    if like is not None:
        _copy(like.folder, place)
        return made
    made.fill(recipients)
    people = place / "latency.jsonl"
    people.write_text("".join(json.dumps(_latency_account(n)) + "\n" for n in range(LATENCY_ACCOUNTS)), "utf-8")
    made.run("accounts", "import", str(people))
    return made


def _copy(source: Path, target: Path) -> None:
    """Copy a SQLite database that nobody works on, and the event to publish."""
    with sqlite3.connect(source / "rolecast.db") as old, sqlite3.connect(target / "rolecast.db") as new:
        old.backup(new)
    shutil.copy(source / "event.json", target / "event.json")


def _latency_account(number: int) -> dict[str, Any]:
    """An account with two contacts that hear of a file failure, and nobody for a service notice."""
    people = [
        {
            "id": name,
            "name": f"Person {name}",
            "email": f"{name}@l{number}.example",
            "roles": ["invoicing_file_failure"],
        }
        for name in ("one", "two")
    ]
    return {"id": f"l{number}", "catalogue": "billtrust", "uses": ["invoicing"], "contacts": people}


def _template(place: Path, computes: str) -> Path:
    """The service notice's own templates, and a line that works with the recipient's name.

    In a block that block alone must be rendered for each recipient; what is computed outside of all concerns each part.
    """
    target = place / "templates" / "service.notice"
    shutil.copytree(PROJECT / "templates" / "service.notice", target)
    for name in ("body.html", "body.txt"):
        path = target / name
        written = path.read_text(encoding="utf-8")
        if computes == "outside":
            written = written.replace("{% set more", "{% set shouted = name|upper %}\n{% set more")
        said = "shouted" if computes == "outside" else "name|upper"
        path.write_text(written.replace("{% block facts %}", "{% block facts %}\n{{ " + said + " }}"), encoding="utf-8")
    return target.parent


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL where it does not end."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdout, process.stdin):
        if pipe is not None:
            pipe.close()
