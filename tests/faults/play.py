"""A broadcast on its way while something breaks, and publishers who go on meanwhile: what queues and databases play on.

`play` gives a `Play`: workers at work on a scene whose servers stand behind proxies, and a notice to everybody
published. A campaign breaks something, says `over`, and ends with `end`, which draws up the account.
"""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

from tests.faults.account import Account
from tests.faults.proxy import Proxy
from tests.faults.servers import PostgreSQL, Valkey, until
from tests.faults.stage import Configuration, Scene, scene
from tests.faults.witness import Intent, Told

DRAINED_SECONDS = 60.0
"""So soon after a server's return everything owed has been sent (R6, R7)."""


@dataclass(slots=True)
class Play:
    """A broadcast that is being sent by workers whose queue (and database) stands behind a proxy."""

    scene: Scene
    queue: Proxy | None  # before Valkey; None with memory://
    database: Proxy | None  # before PostgreSQL; None on SQLite
    recipients: int
    workers: list[Popen[bytes]]
    dice: random.Random
    returned: float = 0.0  # when the last fault was over, by the monotonic clock
    wrong: list[str] = field(default_factory=list)

    @property
    def valkey(self) -> Valkey:
        """The queue's server, where there is one."""
        assert self.scene.valkey is not None
        return self.scene.valkey

    @property
    def postgresql(self) -> PostgreSQL:
        """The database's server, where there is one."""
        assert self.scene.postgresql is not None
        return self.scene.postgresql

    def reach(self, share: float) -> None:
        """Wait until so much of the broadcast was accepted."""
        if not self.scene.reach(int(share * self.recipients), seconds=180, meanwhile=self._look_at_workers):
            self.wrong.append(f"the broadcast did not get to {share:.0%} within 180 seconds")

    def over(self) -> None:
        """The fault is over: what is owed must be sent soon."""
        self.returned = time.monotonic()

    def end(self, *, drained: float = DRAINED_SECONDS, **options: Any) -> Account:
        """Wait until all is done, stop the workers, and draw up the account with what was wrong besides."""
        rest = max(0, self.recipients - self.scene.accepted())
        # What was still to be sent at the sink's own speed is no fault of the recovery.
        allowed = drained + 3 * rest / 300
        if not self.scene.until_done(allowed + 60):
            self.wrong.append(f"not done {allowed + 60:.0f} seconds after the end of the fault")
        elif self.returned and time.monotonic() - self.returned > allowed:
            took = time.monotonic() - self.returned
            self.wrong.append(f"done {took:.0f} seconds after the end of the fault, more than {allowed:.0f}")
        self._look_at_workers()
        for worker in self.workers:
            if worker.poll() is None:
                self.scene.terminate(worker)
                if worker.returncode:
                    self.wrong.append(f"a worker that was told to stop ended with {worker.returncode}")
        account = self.scene.account(**options)
        for sentence in self.wrong:
            account.wrong(sentence)
        return account

    def _look_at_workers(self) -> None:
        for worker in [one for one in self.workers if one.poll() is not None]:
            self.workers.remove(worker)
            said = self.scene.worker_log().strip().splitlines()[-1:]
            self.wrong.append(f"a worker ended with {worker.returncode}, by itself: {said}")


@contextmanager
def play(
    configuration: Configuration,
    recipients: int,
    *,
    dice: random.Random,
    rate: float = 1000,
    lease_seconds: int = 5,
    workers: int = 2,
    queue: bool = True,
    folder: Path | None = None,
) -> Iterator[Play]:
    """A scene with its people imported, its workers at work and a notice to everybody published.

    `queue` False: SQLite with memory:// and one worker. `folder`: where SQLite's file stands, else in the scene's own.
    """
    with ExitStack() as stack:
        stage = stack.enter_context(scene(configuration, rate=rate, lease_seconds=lease_seconds, plain=False))
        if queue and stage.valkey is None:
            stage.valkey = stack.enter_context(Valkey(stage.folder))
        if folder is not None:
            stage.database_url = f"sqlite:///{folder / 'rolecast.db'}"
        stage.people(recipients)
        before_queue = before_database = None
        if stage.valkey is not None:
            before_queue = stack.enter_context(Proxy(stage.valkey.port))
            stage.broker_url = stage.valkey.url_on(before_queue.port)
        if stage.postgresql is not None:
            before_database = stack.enter_context(Proxy(stage.postgresql.port))
            stage.database_url = stage.postgresql.url_on(before_database.port)
        stack.callback(stage.end_processes)  # before the proxies, and these before the servers
        at_work = [stage.work() for _ in range(workers if queue else 1)]
        stage.publish([stage.notice()])
        yield Play(stage, before_queue, before_database, recipients, at_work, dice)


# ---------------------------------------------------------------- publishing meanwhile


@dataclass(slots=True)
class Publisher:
    """Somebody who publishes an invoice every half second, over HTTP or by the command line, until told to stop."""

    name: str
    publish: Callable[[Intent], Told]
    intents: list[Intent]
    every: float = 0.5
    told: list[Told] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the call in hand."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        for intent in self.intents:
            began = time.monotonic()
            self.told.append(self.publish(intent))
            self.seconds.append(time.monotonic() - began)
            if self._stopping.wait(max(0.0, self.every - self.seconds[-1])):
                return

    def bad(self, slowest: float) -> list[str]:
        """What must not be where publishing goes on undisturbed."""
        errors = [one for one in self.told if one.answer != "ok"]
        found = [f"{len(errors)} of {len(self.told)} published {self.name} failed: {errors[0]}"] if errors else []
        if max(self.seconds, default=0.0) > slowest:
            found.append(f"publishing {self.name} took {max(self.seconds):.1f} s once, more than {slowest:.0f}")
        return found

    def summary(self) -> str:
        """How many, and how fast."""
        if not self.seconds:
            return f"{self.name}: none"
        median, worst = statistics.median(self.seconds), max(self.seconds)
        return f"{self.name}: {len(self.told)} published, median {median:.3f} s, worst {worst:.3f} s"


@contextmanager
def publishers(stage: Scene, port: int, key: str, *, most: int, accounts: int) -> Iterator[tuple[Publisher, Publisher]]:
    """One over HTTP and one by the command line, publishing side by side."""
    web = Publisher(
        "over HTTP",
        lambda intent: stage.witness.publish_http(port, key, intent),
        stage.invoices(most, accounts=accounts, prefix="web"),
    )
    command = Publisher(
        "by command",
        lambda intent: stage.witness.publish_cli(stage, [intent])[0],
        stage.invoices(most, accounts=accounts, prefix="command"),
    )
    web.start()
    command.start()
    try:
        yield web, command
    finally:
        web.stop()
        command.stop()


def serve(stage: Scene) -> tuple[int, str]:
    """Start the web side and wait until it answers: (port, key)."""
    _, port, key = stage.serve()
    if not until(lambda: ready(port)[0] != 0, seconds=60, every=0.1):
        message = f"rolecast serve does not answer: {(stage.folder / 'serve.log').read_text(errors='replace')[-2000:]}"
        raise RuntimeError(message)
    return port, key


def ready(port: int) -> tuple[int, str, list[str]]:
    """What /readyz says: (HTTP status or 0, status, facts)."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=20) as response:
            code, body = response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            code, body = error.code, error.read()
    except OSError as error:
        return 0, str(error), []
    document = json.loads(body)
    return code, document["status"], document["facts"]
