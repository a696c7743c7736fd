"""The composition root: the one place that knows every part, builds each once, and passes it to who needs it.

`open_app` gives an `App`: settings, database (migrated where that is its own to do), catalogues, intake. `Engine` is
what works: broker, event loop, relays, scheduler. Nothing is opened before they are called.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import dramatiq
from dramatiq.broker import Broker
from sqlalchemy import Connection, select

from subscriptions import directory, schema
from subscriptions.catalogue import Catalogue, CatalogueError, load_catalogues
from subscriptions.database import STALL_SECONDS, Clock, Database, DatabaseUnusable
from subscriptions.directory import Known
from worker import actors, feeding, leases, logs, migrate, notices, restore
from worker.broker import QUEUES, HardenedRedisBroker, Loop, make_broker, redis_client
from worker.delivery import Sender, Taken
from worker.fanout import EventRow, Planner, Planning
from worker.heartbeat import Heartbeat
from worker.intake import Intake
from worker.ledger import Lane
from worker.links import Links, keys_for
from worker.lock import WorkLock
from worker.mails import Composer
from worker.relay import Relay, RelayError, Relays
from worker.rendering import Renderer
from worker.renditions import Press
from worker.rescue import NOTICE_SECONDS, QUEUED_SECONDS, Scheduler
from worker.settings import Settings
from worker.settler import Settler
from worker.sharedfeed import SharedFeed
from worker.statuspage import StatusPage
from worker.waking import DUE, PLAN, QUEUED, Bell, Listener
from worker.writer import Writer

logger = logs.get(__name__)

AHEAD = 8
#: Messages of a lane of small slices that a process takes ahead, for each one that it works on.
IDLE_MILLISECONDS = {True: 100, False: 500}
#: How often an idle thread looks whether it is to end: with a queue of our own, and on Redis.
COLLECT_AFTER = (20_000, 20, 50)
#: Pages of accounts are many objects without cycles: Python's 700 would look through them again and again.
PLAN_PATIENCE = 500_000
#: Microseconds for which a process that does not serve the normal lane leaves planning to one that does: those of the
#: bulk lane are busy with sending, and those of the urgent lane are to have nothing else to do.
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
def telling_workers(app: App) -> Iterator[None]:
    """Tell the workers of other processes what this one accepts, at once and at no cost; with memory:// they look."""
    if app.settings.broker_url == "memory://":
        yield
        return
    bell = Bell(partial(redis_client, app.settings.broker_url))
    bell.start()
    app.intake.wake = bell.ring
    try:
        yield
    finally:
        bell.stop()


@contextmanager
def open_app(settings: Settings, *, clock: Clock | None = None, migrates: bool = True) -> Iterator[App]:
    """Open the installation that the settings name, and close it at the end.

    A SQLite database is made and migrated where `migrates`; a PostgreSQL one must be at the code's schema. `clock` is
    the database's unless a test gives another. Raises `CatalogueError`, `DatabaseUnusable`, `migrate.SchemaError`.
    """
    catalogues = load_catalogues(settings.catalogues)
    # A transaction of a process that froze is ended before its lease is: whoever takes over finds nothing locked.
    database = Database(settings.database_url, stall_seconds=max(2, min(STALL_SECONDS, settings.lease_seconds // 2)))
    clock = clock or database.clock
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
    number: int = 0
    _lock: WorkLock | None = None
    _heart: Heartbeat | None = None
    _broker: Broker | None = None
    _dramatiq: dramatiq.Worker | None = None
    _writer: Writer | None = None
    _scheduler: Scheduler | None = None
    _sender: Sender | None = None
    _loop: asyncio.AbstractEventLoop | None = None  # where relays and flights live
    _relays: Relays = field(default_factory=lambda: Relays(()))
    _in_hand: set[int] = field(default_factory=set)
    _worked: bool = False  # since the last heartbeat
    _wide: Mapping[Lane, int] = field(default_factory=dict)  # how many slices of a lane are worked on at once
    _direct: set[asyncio.Task[None]] = field(default_factory=set)  # slices that came straight from intake
    _ends_at: float = 0.0  # by then flights in hand have ended, or are given up
    _bell: Bell | None = None
    _listener: Listener | None = None

    def start(self) -> None:
        """Take the right to work, and begin. Raises `AnotherWorks`, `restore.OlderDatabase`, `DatabaseUnusable`."""
        gc.freeze()
        gc.set_threshold(*COLLECT_AFTER)
        try:
            self._take_the_right()
            self._open()
        except BaseException:
            self.stop()
            raise
        logger.info(
            "worker.started",
            worker=self.number,
            lanes=[lane.name.lower() for lane in self.lanes],
            relays=[relay.name for relay in self.app.settings.relay_urls],
        )

    @property
    def alone(self) -> bool:
        """Whether no other process may work on this database: each would have a queue of its own."""
        return self.app.settings.broker_url == "memory://"

    def _take_the_right(self) -> None:
        """The lock, and a number that owns slices."""
        settings, database = self.app.settings, self.app.database
        lock = WorkLock(database, shared=not self.alone)
        if not lock.take():
            holder = lock.holder()
            named = f" (process {holder})" if holder and self.alone else ""
            kind = "another process works" if self.alone else "a process with the broker memory:// works"
            message = f"{kind} on this database already{named}: stop it, or leave the work to it"
            raise AnotherWorks(message)
        self._lock = lock
        restore.refuse_if_older(database)
        with database.write() as connection:
            now = self.app.clock()
            self.number = leases.register(
                connection,
                host=socket.gethostname(),
                pid=os.getpid(),
                lanes=self.lanes if settings.relay_urls else (),
                now=now,
            )
            feeding.wake_waiting(connection, reasons=["no_https", "no_sender"], now=now)
        self._heart = Heartbeat(
            database,
            lock,
            worker=self.number,
            lease_seconds=settings.lease_seconds,
            clock=self.app.clock,
            after=self._mark,
        )
        self._heart.start()

    def _mark(self) -> None:
        """Leave beside the database that mails were sent from it, so that an older copy of it is recognised."""
        if self._worked:
            self._worked = False
            restore.mark(self.app.database)

    def _open(self) -> None:
        """Writer, queue, loop, scheduler: each once, in the order in which they need each other."""
        settings, database = self.app.settings, self.app.database
        assert self._heart is not None
        self._writer = Writer(database)
        self._writer.start()
        loop = Loop(self._opened, self._closing)
        self._broker = make_broker(settings.broker_url, [loop], client=self.broker_client)
        actors.declare(self._broker, self._deliver)
        width = self._wide = self._width()
        if not self.alone:
            connect = partial(redis_client, settings.broker_url)
            self._bell = Bell(connect)
            self._listener = Listener(connect, self._heard)
        self._scheduler = Scheduler(
            database=database,
            broker=self._broker,
            planner=self.app.planner,
            worker=self.number,
            clock=self.app.clock,
            width=width,
            alone=self.alone,
            heart=self._heart,
            lease_seconds=settings.lease_seconds,
            in_hand=lambda: frozenset(self._in_hand),
            queued_seconds=self.queued_seconds,
            feed=self.app.feed if settings.status_page_feed_url else None,
            feed_seconds=settings.status_page_every,
            pause_relays=self._pause_relays,
            relay_problems=lambda: {relay.name: relay.problem for relay in self._relays.all},
            tell_operators=self._tell_operators,
            hears=lambda: self._listener is not None and self._listener.hears,
            deliver=self.deliver,
            tell=self._tell,
            sends=bool(settings.relay_urls),
            patience=0 if Lane.NORMAL in self.lanes else PLAN_PATIENCE,
        )
        self.app.intake.wake = self._accepted
        if settings.relay_urls:
            self.app.intake.hands = self
        if self.alone:
            self._scheduler.forget_queue()
        self._dramatiq = dramatiq.Worker(
            self._broker,
            queues={queue for lane, queue in QUEUES.items() if lane in self.lanes},
            worker_threads=sum(width.values()),
            worker_timeout=IDLE_MILLISECONDS[self.alone],
        )
        if isinstance(self._broker, HardenedRedisBroker):
            # As many as are worked on: what one lane takes ahead keeps threads from the others, and what one process
            # hoards another one waits for. A lane of small slices with a process of its own takes some more.
            ahead = AHEAD if self.lanes in {(Lane.URGENT,), (Lane.NORMAL,)} else 1
            self._broker.prefetch = {QUEUES[lane]: ahead * count for lane, count in width.items()}
        self._broker.emit_after("process_boot")
        self._dramatiq.start()
        self._scheduler.start()
        if self._bell is not None and self._listener is not None:
            self._bell.start()
            self._listener.start()

    def _width(self) -> dict[Lane, int]:
        """How many slices of each lane are worked on at once: some threads stay free of bulk."""
        connections = max((relay.connections for relay in self.app.settings.relay_urls), default=1)
        if len(self.lanes) == 1:
            return {self.lanes[0]: max(2, connections)}
        return {lane: max(2, connections if lane is Lane.BULK else connections // 2) for lane in self.lanes}

    async def _opened(self) -> None:
        settings = self.app.settings
        assert self._writer is not None
        assert self._heart is not None
        self._loop = asyncio.get_running_loop()
        host_name = settings.public_host.partition(":")[0] or socket.gethostname()
        lanes = len(self.lanes)
        self._relays = Relays([Relay(relay, host_name=host_name, lanes=lanes) for relay in settings.relay_urls])
        composer, renderer = self.app.composer(), self.app.renderer()
        if settings.relay_urls:
            renderer.prepare()
        with self.app.database.read() as connection:
            address_key = directory.address_key(connection)
        self._sender = Sender(
            settings=settings,
            database=self.app.database,
            planner=self.app.planner,
            composer=composer,
            press=Press(composer, renderer, address_key),
            relays=self._relays,
            writer=self._writer,
            settler=Settler(self._writer, self.number),
            worker=self.number,
            clock=self.app.clock,
            may_send=self.may_send,
            holds=self._heart.holds,
        )

    def _pause_relays(self, names: set[str]) -> None:
        for relay in self._relays.all:
            relay.paused = relay.name in names

    # ------------------------------------------------------------ what is due is told, and begun at once

    def _tell(self, words: Collection[str]) -> None:
        if self._bell is not None:
            self._bell.ring(words)

    def _accepted(self, words: Collection[str]) -> None:
        """Something that is due was committed in this process."""
        self.wake()
        self._tell(words)

    def _heard(self, words: Collection[str]) -> None:
        """Another process told what it did."""
        for lane in self.lanes:
            if QUEUED[lane] in words and isinstance(self._broker, HardenedRedisBroker):
                self._broker.look(lane)
        if PLAN in words or any(DUE[lane] in words for lane in self.lanes):
            self.wake()

    def take(
        self, planning: Planning, event: EventRow, *, mails: int, guard: int, known: Known | None, now: int
    ) -> Taken | None:
        """Claim a new event's mails where there is room (see `intake.Hands`).

        Before the commit nobody else sees the claim; from then on it must be known to be worked on.
        """
        account = known.facts.id if known is not None else ""
        if self._sender is None or not self.room(planning.connection, event.lane, event.class_, account, now=now):
            return None
        taken = self._sender.take_new(planning, event, mails=mails, guard=guard, known=known)
        if taken is not None:
            self._in_hand.add(taken.slice_id)
        return taken

    def send(self, taken: Sequence[Taken]) -> None:
        """Send what was taken; what the loop does not begin any more is freed at the end of this process."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._begin_taken, taken)
            time.sleep(0)  # else this thread keeps Python's lock until it waits for something

    def forget(self, taken: Sequence[Taken]) -> None:
        """What was taken is not known to be committed: where it is after all, `rescue` frees it."""
        self._in_hand.difference_update([one.slice_id for one in taken])

    def room(self, connection: Connection, lane: Lane, class_: str, account: str, *, now: int) -> bool:
        """Whether a slice for an account may be begun without the queue."""
        if lane not in self.lanes or not self.may_send():
            return False
        ending = self._sender.settler.ending[lane] if self._sender is not None else 0
        return feeding.room_at_once(connection, lane, class_, account, width=self._wide[lane] + ending, now=now)

    def deliver(self, slice_ids: Sequence[int]) -> None:
        """Begin slices that are marked as queued; one that can't be begun any more is queued again by `rescue`."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._begin, slice_ids)

    def _begin(self, slice_ids: Sequence[int]) -> None:
        if not self.may_send():
            return
        for slice_id in slice_ids:
            self._keep(asyncio.create_task(self._deliver(slice_id)))

    def _begin_taken(self, taken: Sequence[Taken]) -> None:
        assert self._sender is not None
        for one in taken:
            self._keep(asyncio.create_task(self._work(one.slice_id, self._sender.deliver_taken(one, alone=False))))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._direct.add(task)
        task.add_done_callback(self._direct.discard)

    async def _deliver(self, slice_id: int) -> None:
        assert self._sender is not None
        if slice_id in self._in_hand:  # a second message for the same slice
            return
        self._in_hand.add(slice_id)
        await self._work(slice_id, self._sender.deliver(slice_id))

    async def _work(self, slice_id: int, delivering: Coroutine[Any, Any, None]) -> None:
        """Deliver a slice that is in hand."""
        self._worked = True
        try:
            await delivering
        except DatabaseUnusable as error:  # nothing was begun; a claim that was made after all is found and freed
            logger.warning("database.unusable", why=str(error), what_next="the slice is queued again")
        finally:
            self._in_hand.discard(slice_id)
            if self._scheduler is not None and self._scheduler.crowded:
                self._scheduler.wake()  # there is room for one that waits

    def _tell_operators(self) -> None:
        """Tell operators what needs a person, where there is something new; the next look tells what failed here."""
        database, settings, loop = self.app.database, self.app.settings, self._loop
        try:
            notice = notices.prepare(database, settings, self.number, now=self.app.clock())
            if notice is None or loop is None:
                return
            telling = notices.tell(self._relays, notices.envelopes(notice, settings))
            try:
                reply = asyncio.run_coroutine_threadsafe(telling, loop).result()
            except RelayError:
                with database.write() as connection:
                    notices.give_back(connection, notice)
                return
            with database.write() as connection:
                notices.sent(connection, notice, reply, now=self.app.clock())
        except DatabaseUnusable as error:
            logger.warning("database.unusable", why=str(error), tried_again_in_seconds=NOTICE_SECONDS)

    async def _closing(self) -> None:
        if self._direct:
            await asyncio.wait(self._direct, timeout=max(0.0, self._ends_at - time.monotonic()))
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
        """Whether every thread that must live lives, and the work is still ours."""
        threads = [] if self._dramatiq is None else [*self._dramatiq.consumers.values(), *self._dramatiq.workers]
        return (
            self._scheduler is not None
            and self._scheduler.lives
            and self._heart is not None
            and self._heart.lives
            and self._heart.lost is None
            and all(isinstance(thread, threading.Thread) and thread.is_alive() for thread in threads)
        )

    @property
    def queue_problem(self) -> str | None:
        """Why the queue's server can't be used now; None where it can."""
        return self._scheduler.queue_problem if self._scheduler is not None else None

    @property
    def queue_away_seconds(self) -> float:
        """For how long the queue's server could not be used."""
        since = self._scheduler.queue_away_since if self._scheduler is not None else None
        return 0.0 if since is None else time.monotonic() - since

    def idle(self, event_ids: list[int] | None = None) -> bool:
        """Whether nothing (of these events) is due now; see `is_idle`."""
        return is_idle(self.app, event_ids, lanes=self.lanes)

    def until_idle(
        self,
        *,
        event_ids: list[int] | None = None,
        seconds: float | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> bool:
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
        """End after the flights in hand; what was not begun is free for whoever comes next.

        Never raises: what can't be given back now, because the database is away, is freed by whoever comes next.
        """
        self.app.intake.hands = None
        self._ends_at = time.monotonic() + STOP_SECONDS
        if self._scheduler is not None:
            self._scheduler.stop()
        if self._listener is not None:
            self._listener.stop()
        if self._dramatiq is not None:
            self._dramatiq.stop(timeout=STOP_SECONDS * 1000)
        if self._writer is not None:
            self._writer.stop()
        if self._heart is not None:
            self._heart.stop()
            with suppress(DatabaseUnusable):
                self._mark()
        if self.number:
            try:
                with self.app.database.write() as connection:
                    leases.free_own(connection, self.number, now=self.app.clock())
                    leases.leave(connection, self.number)
            except DatabaseUnusable as error:
                logger.warning("database.unusable", why=str(error), what_next="another worker frees what is left")
        if self._bell is not None:
            self._bell.stop()
        if self._broker is not None:
            self._broker.close()
        if self._lock is not None:
            self._lock.free()
        if self.number:
            logger.info("worker.stopped", worker=self.number)


def is_idle(app: App, event_ids: list[int] | None = None, *, lanes: Collection[Lane] = tuple(Lane)) -> bool:
    """Whether nothing (of these events, in these lanes) is due now; without a worker that has a relay no mail is due.

    While the database is away nobody knows: it is not idle.
    """
    try:
        with app.database.read() as connection:
            served = lanes if leases.someone_sends(connection) else ()
            return not feeding.due_now(connection, now=app.clock(), event_ids=event_ids, lanes=served)
    except DatabaseUnusable as error:
        logger.warning("database.unusable", why=str(error), tried_again_in_seconds=1)
        time.sleep(1.0)
        return False
