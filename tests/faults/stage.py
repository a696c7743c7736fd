"""The stage that fault tests play on: an installation with its sink, witness and worker processes.

`scene("sqlite")` has SQLite and memory://, `scene("postgresql")` a PostgreSQL and a Valkey of its own. Every process
that is started here is a session of its own and is ended here by its id, however the test ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import func, select

from subscriptions.database import Database, DatabaseUnusable
from tests.bench.stage import RECIPIENTS_PER_ACCOUNT, Sink, Stage, account, free_port
from tests.faults.account import Account, draw_up
from tests.faults.servers import PostgreSQL, Valkey, until
from tests.faults.witness import Intent, Told, Witness
from worker.ledger import Status
from worker.schema import deliveries, events, flights, slices, workers

Configuration = Literal["sqlite", "postgresql"]

SECRET = "faults-faults-faults-faults-faults-faults"
"""The key of the links in mails: PostgreSQL has no folder to keep one in."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a campaign is played; 0 means the campaign's own figure, which differs in a soak."""

    soak: bool = False
    recipients: int = 0
    kills: int = 0
    times: int = 0
    seed: int = 1

    def choose(self, given: int, usual: int, soak: int) -> int:
        """What was asked for, else the usual figure or the soak's."""
        return given or (soak if self.soak else usual)

    def dice(self, name: str) -> random.Random:
        """The dice of a campaign: the same seed gives the same throws."""
        return random.Random(f"{self.seed} {name}")


@dataclass(slots=True, kw_only=True)
class Scene(Stage):
    """An installation under test. `postgresql` and `valkey` are None where it has none of its own."""

    configuration: Configuration
    witness: Witness
    log: Path
    postgresql: PostgreSQL | None = None
    valkey: Valkey | None = None
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    # ---------------------------------------------------------------- processes

    def start(self, *arguments: str, errors: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own; its stdout is a pipe, its stderr goes to `errors`."""
        with (errors or self.folder / f"{arguments[0]}.log").open("ab") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", *arguments],
                env=self.environment(),
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=sink,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def work(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `rolecast work`; what it says is in `worker_log`."""
        return self.start("work", *arguments)

    def started(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether a worker process has begun to work: its row is in the ledger."""
        return self._ask(select(func.count()).select_from(workers).where(workers.c.pid == process.pid)) > 0

    def serve(self, key_scope: str = "publish:*") -> tuple[subprocess.Popen[bytes], int, str]:
        """Make a key, start `rolecast serve` and wait until it listens: (process, port, key)."""
        port = free_port()
        self.settings["ROLECAST_LISTEN"] = f"127.0.0.1:{port}"
        made = self.run("keys", "create", "--name", f"faults-{port}", "--scope", key_scope, "--json")
        process = self.start("serve")
        until(lambda: listens(port) or process.poll() is not None, seconds=30)
        return process, port, json.loads(made.output)["key"]

    def flying(self) -> set[int]:
        """The process ids of the workers that have open flights now."""
        query = select(workers.c.pid).where(workers.c.id.in_(select(flights.c.owner)))
        return {row.pid for row in self._rows(query)}

    def kill(self, process: subprocess.Popen[bytes], name: str = "kill", **facts: Any) -> None:
        """SIGKILL one process (not its children), told to the witness."""
        process.kill()
        self.witness.fault(name, pid=process.pid, **facts)
        process.wait()
        self._close(process)

    def terminate(self, process: subprocess.Popen[bytes], *, seconds: float = 60.0) -> float:
        """SIGTERM, told to the witness; the seconds until it had ended. Raises `TimeoutExpired`."""
        self.witness.fault("terminate", pid=process.pid)
        began = time.monotonic()
        process.terminate()
        process.wait(timeout=seconds)
        self._close(process)
        return time.monotonic() - began

    def worker_log(self) -> str:
        """What all workers said on stderr."""
        path = self.folder / "work.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def end_workers(self) -> None:
        """End the workers, with their children, at once; what else runs goes on."""
        self._end([one for one in self._processes if "work" in one.args])  # type: ignore[operator]

    def end_processes(self) -> None:
        """End whatever still runs, with its children, at once."""
        self._end(list(self._processes))

    def _end(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            # One that has ended and was waited for has no id any more that is ours.
            if process.poll() is not None:
                continue
            for pid in [process.pid, *children_of(process.pid)]:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            self._close(process)
        self._processes[:] = [one for one in self._processes if one.poll() is None]

    @staticmethod
    def _close(process: subprocess.Popen[bytes]) -> None:
        if process.stdout is not None:
            process.stdout.close()

    # ---------------------------------------------------------------- what is sent

    def people(self, recipients: int) -> str:
        """Import a directory in which a service notice has so many recipients; returns their audience's name."""
        self.fill(recipients)
        found = [f"{role[0]}{n}@a{number}.example" for number in range(recipients // RECIPIENTS_PER_ACCOUNT)
                 for role, how_many in (("primary", 1), ("secondary", 2), ("communication", 1))
                 for n in range(how_many)]  # fmt: skip
        return self.witness.audience("everybody", found)

    def notice(self, id_: str = "notice-1", audience: str = "everybody") -> Intent:
        """A broadcast to everybody: operational news, sent again where its outcome is unknown."""
        data = {"accounts": "all", "title": "Exports move to a new address",
                "body": "From **1 December** on, exports come from `exports.bench.example`."}  # fmt: skip
        return event("service.notice", id_, data, audience=audience)

    def invoices(self, how_many: int, *, accounts: int, prefix: str = "invoice") -> list[Intent]:
        """Single events of the hold class, each to one recipient, dealt out to the accounts of `people`."""
        found = []
        for number in range(how_many):
            owner = number % accounts
            address = f"a0@a{owner}.example"
            if number < accounts:
                self.witness.audience(address, [address])
            data = {"account": f"a{owner}", "number": f"{prefix}-{number}", "amount": "12.50", "currency": "EUR",
                    "due_on": "2027-01-31"}  # fmt: skip
            found.append(event("invoice.issued", f"{prefix}-{number}", data, audience=address))
        return found

    def publish(self, intents: Sequence[Intent]) -> list[Told]:
        """Publish by the command line; raises `RuntimeError` where any was not taken."""
        told = self.witness.publish_cli(self, intents)
        bad = [one for one in told if one.answer != "ok"]
        if bad:
            words = (self.folder / "publish.log").read_text(errors="replace")[-2000:]
            message = f"{len(bad)} of {len(told)} events were not taken (exit {bad[0].code}): {words}"
            raise RuntimeError(message)
        return told

    # ---------------------------------------------------------------- how far it is

    def planned(self) -> int:
        """How many deliveries there are."""
        return self._ask(select(func.count()).select_from(deliveries))

    def with_held(self) -> list[tuple[str, str]]:
        """The events that have held mail: (source, id)."""
        query = (
            select(events.c.source, events.c.ce_id)
            .where(events.c.id.in_(select(deliveries.c.event_id).where(deliveries.c.status == int(Status.HELD))))
            .order_by(events.c.id)
        )
        return [(row.source, row.ce_id) for row in self._rows(query)]

    def held(self, source: str, id_: str) -> set[int]:
        """The numbers of an event's held deliveries."""
        query = (
            select(deliveries.c.n)
            .join(events, events.c.id == deliveries.c.event_id)
            .where(events.c.source == source, events.c.ce_id == id_, deliveries.c.status == int(Status.HELD))
        )
        return {row.n for row in self._rows(query)}

    def accepted(self) -> int:
        """How many mails the sink accepted, second copies included; 0.1 ms."""
        return int(self.sink.counts()["accepted"])

    def done(self) -> bool:
        """Whether every event is done and no flight and no slice is open; False while the database is away."""
        try:
            return not (
                self._ask(select(func.count()).select_from(events).where(events.c.status != "done"))
                or self._ask(select(func.count()).select_from(flights))
                or self._ask(select(func.count()).select_from(slices).where(slices.c.done_at.is_(None)))
            )
        except DatabaseUnusable:
            return False

    def until_done(self, seconds: float) -> bool:
        """Wait for it; whether it came in time."""
        return until(self.done, seconds=seconds, every=0.25)

    def reach(self, mails: int, *, seconds: float = 120.0, meanwhile: Callable[[], None] | None = None) -> bool:
        """Wait until the sink has accepted so many mails; whether in time. `meanwhile` is called all the while."""
        ends = time.monotonic() + seconds
        while self.accepted() < mails:
            if time.monotonic() > ends:
                return False
            if meanwhile is not None:
                meanwhile()
            time.sleep(0.005)
        return True

    def account(self, **options: Any) -> Account:
        """Draw up the account now; options are `draw_up`'s."""
        return draw_up(self.environment()["ROLECAST_DATABASE_URL"], self.witness.path, self.log, **options)

    def _ask(self, query: Any) -> int:
        return int(self._rows(query)[0][0])

    def _rows(self, query: Any) -> Sequence[Any]:
        # Past any proxy: what is looked at must not depend on the fault that is played.
        url = self.postgresql.url if self.postgresql else self.environment()["ROLECAST_DATABASE_URL"]
        database = Database(url)
        try:
            with database.read() as connection:
                return connection.execute(query).all()
        finally:
            database.close()


def event(type_: str, id_: str, data: dict[str, Any], *, audience: str) -> Intent:
    """An event of the source /faults that the named audience should get."""
    return Intent({"specversion": "1.0", "id": id_, "source": "/faults", "type": type_, "data": data}, audience)


def listens(port: int) -> bool:
    """Whether a server takes connections on a port of loopback."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that live."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    return sorted(found)


@contextmanager
def scene(
    configuration: Configuration,
    *,
    rate: float = 300,
    delay: int = 0,
    plain: bool = True,
    connections: int = 8,
    lease_seconds: int = 3,
    persistent_queue: bool = False,
) -> Iterator[Scene]:
    """An installation without accounts; its sink is slowed to `rate` mails a second (0: not at all).

    To put a proxy before a server, make it with the server's port and set `database_url`, `broker_url` or `relay_port`
    of the scene to it: commands that are started from then on go through it.
    """
    folder = Path(tempfile.mkdtemp(prefix="rolecast-faults-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        log = folder / "sink.log"
        sink = Sink(folder, delay=delay, log=log, plain=plain, rate=rate)
        stack.callback(sink.stop)
        witness = Witness(folder / "witness.jsonl")
        stack.callback(witness.close)
        made = Scene(folder, sink, connections, lease_seconds, configuration=configuration, witness=witness, log=log)
        made.settings |= {"ROLECAST_SECRET_KEYS": SECRET, "ROLECAST_PUBLIC_URL": "https://notify.bench.example"}
        if configuration == "postgresql":
            made.postgresql = stack.enter_context(PostgreSQL(folder))
            made.valkey = stack.enter_context(Valkey(folder, persistent=persistent_queue))
            made.database_url, made.broker_url = made.postgresql.url, made.valkey.url
            made.run("db", "upgrade")
        stack.callback(made.end_processes)
        yield made


def directory(accounts: int) -> list[dict[str, Any]]:
    """The accounts of `Scene.people`, for those who import their own."""
    return [account(number) for number in range(accounts)]
