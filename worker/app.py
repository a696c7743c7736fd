"""The composition root: the one place that knows every part, builds each once, and passes it to who needs it.

`open_app` gives an `App`: settings, database (migrated where that is its own to do), catalogues, intake. `Engine` is
what works: broker, event loop, relays, scheduler. Nothing is opened before they are called.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import dramatiq
from dramatiq.broker import Broker
from sqlalchemy import select

from subscriptions import schema
from subscriptions.catalogue import Catalogue, CatalogueError, load_catalogues
from subscriptions.database import Clock, Database, system_clock
from worker import actors, feeding, leases, logs, migrate
from worker.broker import QUEUES, Loop, make_broker
from worker.delivery import Sender, Settler
from worker.fanout import Planner
from worker.intake import Intake
from worker.ledger import Lane
from worker.links import Links, keys_for
from worker.lock import WorkLock
from worker.mails import Composer
from worker.relay import Relay, Relays
from worker.rendering import Renderer
from worker.rescue import QUEUED_SECONDS, Scheduler
from worker.settings import Settings
from worker.sharedfeed import SharedFeed
from worker.statuspage import StatusPage
from worker.writer import Writer

logger = logs.get(__name__)

STOP_SECONDS = 25
#: How long a stop waits for the flights in hand: less than a container's grace of 30.


class AnotherWorks(Exception):  # noqa: N818 - it reads as the sentence it is
    """Another process works on this database already; with memory:// only one can."""


@dataclass(slots=True)
class App:
    """An opened installation, as every command needs it."""

    settings: Settings
    database: Database
    catalogues: Mapping[str, Catalogue]
    planner: Planner
    feed: SharedFeed
    intake: Intake
    clock: Clock

    @property
    def links(self) -> Links | None:
        """What makes the links in mails; None where no link could work or no key is there."""
        keys = keys_for(self.settings.secret_keys, self.database.path)
        return Links(keys, self.settings.public_url) if keys and self.settings.links_work else None

    def composer(self) -> Composer:
        """What turns deliveries into mails."""
        return Composer(self.settings, self.catalogues, self.links)

    def renderer(self) -> Renderer:
        """What renders mails."""
        return Renderer(templates_dir=self.settings.templates_dir)


@contextmanager
def open_app(settings: Settings, *, clock: Clock = system_clock, migrates: bool = True) -> Iterator[App]:
    """Open the installation that the settings name, and close it at the end.

    A SQLite database is made and migrated where `migrates`; a PostgreSQL one must be at the code's schema. Raises
    `CatalogueError`, `DatabaseUnusable`, `migrate.SchemaError`.
    """
    catalogues = load_catalogues(settings.catalogues)
    database = Database(settings.database_url)
    try:
        migrate.prepare(database, clock=clock, migrates=migrates)
        require_catalogues(database, catalogues)
        planner = Planner(catalogues, settings.delivery, settings.team)
        status_page = StatusPage(
            url=settings.status_page_url,
            feed_url=settings.status_page_feed_url,
            allow=settings.status_page_feed_allow,
            clock=lambda: datetime.fromtimestamp(clock() / 1_000_000, UTC),
            every_s=settings.status_page_every,
        )
        feed = SharedFeed(database, status_page)
        intake = Intake(database, planner, feed, settings, clock)
        yield App(settings, database, catalogues, planner, feed, intake, clock)
    finally:
        database.close()


def require_catalogues(database: Database, catalogues: Mapping[str, Catalogue]) -> None:
    """Every account's catalogue must be there. Raises `CatalogueError`."""
    accounts = schema.accounts
    query = select(accounts.c.catalogue).where(accounts.c.removed_at.is_(None)).distinct()
    with database.read() as connection:
        missing = sorted(set(connection.execute(query).scalars()) - set(catalogues))
    if missing:
        known = ", ".join(catalogues)
        message = f"Accounts use the catalogue {missing[0]!r}, but ROLECAST_CATALOGUES gives {known}: add it there."
        raise CatalogueError(message)


@dataclass(slots=True)
class Engine:
    """What works in this process: takes due slices and sends them. Start it once, stop it once.

    `lanes` says which lanes it serves; with `memory://` all three.
    """

    app: App
    lanes: tuple[Lane, ...] = tuple(Lane)
    broker_client: Any = None  # stands in for Redis in tests
    queued_seconds: float = QUEUED_SECONDS
    _lock: WorkLock | None = None
    _broker: Broker | None = None
    _dramatiq: dramatiq.Worker | None = None
    _writer: Writer | None = None
    _scheduler: Scheduler | None = None
    _sender: Sender | None = None
    _relays: Relays = field(default_factory=lambda: Relays(()))
    number: int = 0

    def start(self) -> None:
        """Take the right to work, and begin. Raises `AnotherWorks`."""
        settings, database = self.app.settings, self.app.database
        alone = settings.broker_url == "memory://"
        if alone:
            self._lock = WorkLock(database)
            if not self._lock.take():
                holder = self._lock.holder()
                named = f" (process {holder})" if holder else ""
                message = f"another process works on this database already{named}: stop it, or leave the work to it"
                raise AnotherWorks(message)
        with database.write() as connection:
            self.number = leases.register(
                connection,
                host=socket.gethostname(),
                pid=os.getpid(),
                lanes=",".join(lane.name.lower() for lane in self.lanes) if settings.relay_urls else "",
                now=self.app.clock(),
            )
            now = self.app.clock()
            feeding.wake_waiting(connection, reasons=["no_https", "no_sender"], now=now)
        self._writer = Writer(database)
        self._writer.start()
        loop = Loop(self._opened, self._closing)
        self._broker = make_broker(settings.broker_url, [loop], client=self.broker_client)
        actors.declare(self._broker, self._deliver)
        connections = max((relay.connections for relay in settings.relay_urls), default=1)
        room = {Lane.URGENT: max(2, connections // 2), Lane.NORMAL: max(2, connections // 2), Lane.BULK: connections}
        self._scheduler = Scheduler(
            database=database,
            broker=self._broker,
            planner=self.app.planner,
            worker=self.number,
            clock=self.app.clock,
            room=room,
            alone=alone,
            lease_seconds=settings.lease_seconds,
            queued_seconds=self.queued_seconds,
            feed=self.app.feed if settings.status_page_feed_url else None,
            feed_seconds=settings.status_page_every,
            pause_relays=self._pause_relays,
            sends=bool(settings.relay_urls),
        )
        self.app.intake.wake = self._scheduler.wake
        if alone:
            self._scheduler.forget_queue()
        self._dramatiq = dramatiq.Worker(
            self._broker,
            queues={queue for lane, queue in QUEUES.items() if lane in self.lanes},
            worker_threads=sum(room[lane] for lane in self.lanes),
            worker_timeout=100,
        )
        self._broker.emit_after("process_boot")
        self._dramatiq.start()
        self._scheduler.start()
        logger.info("worker.started", worker=self.number, relays=[relay.name for relay in settings.relay_urls])

    async def _opened(self) -> None:
        settings = self.app.settings
        assert self._writer is not None
        host_name = settings.public_host.partition(":")[0] or socket.gethostname()
        self._relays = Relays([Relay(relay, host_name=host_name) for relay in settings.relay_urls])
        self._sender = Sender(
            settings=settings,
            planner=self.app.planner,
            composer=self.app.composer(),
            renderer=self.app.renderer(),
            relays=self._relays,
            writer=self._writer,
            settler=Settler(self._writer, self.number),
            worker=self.number,
            clock=self.app.clock,
            may_send=self.may_send,
        )

    def _pause_relays(self, names: set[str]) -> None:
        for relay in self._relays.all:
            relay.paused = relay.name in names

    async def _deliver(self, slice_id: int) -> None:
        assert self._sender is not None
        try:
            await self._sender.deliver(slice_id)
        finally:
            if self._scheduler is not None:
                self._scheduler.wake()

    async def _closing(self) -> None:
        if self._sender is not None:
            self._sender.settler.flush()
        await self._relays.close()

    def may_send(self) -> bool:
        """Whether flights may begin."""
        return self._scheduler is not None and self._scheduler.may_send()

    def wake(self) -> None:
        """Look at the ledger now."""
        if self._scheduler is not None:
            self._scheduler.wake()

    def healthy(self) -> bool:
        """Whether every thread that must live lives."""
        threads = [] if self._dramatiq is None else [*self._dramatiq.consumers.values(), *self._dramatiq.workers]
        return (
            self._scheduler is not None
            and self._scheduler.lives
            and all(isinstance(thread, threading.Thread) and thread.is_alive() for thread in threads)
        )

    def idle(self, event_ids: list[int] | None = None) -> bool:
        """Whether nothing (of these events) is due now; without a worker that has a relay no mail is due."""
        with self.app.database.read() as connection:
            if not leases.someone_sends(connection):
                return not feeding.waits_for_plan(connection, now=self.app.clock())
            return not feeding.due_now(connection, now=self.app.clock(), event_ids=event_ids)

    def until_idle(self, *, event_ids: list[int] | None = None, seconds: float | None = None,
                   look: Callable[[], None] = lambda: None) -> bool:  # fmt: skip
        """Wait until nothing is due now; `look` is called now and then. False where `seconds` were over before."""
        ends = None if seconds is None else time.monotonic() + seconds
        pause = 0.01
        while not self.idle(event_ids):
            look()
            if ends is not None and time.monotonic() > ends:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        look()
        return True

    def stop(self) -> None:
        """End after the flights in hand; what was not begun is free for whoever comes next."""
        if self._scheduler is not None:
            self._scheduler.stop()
        if self._dramatiq is not None:
            self._dramatiq.stop(timeout=STOP_SECONDS * 1000)
        if self._writer is not None:
            self._writer.stop()
        if self.number:
            with self.app.database.write() as connection:
                leases.free_own(connection, self.number, now=self.app.clock())
                leases.leave(connection, self.number)
        if self._broker is not None:
            self._broker.close()
        if self._lock is not None:
            self._lock.free()
        logger.info("worker.stopped", worker=self.number)
