"""What the ledger owes and no queue holds is queued again: the scheduler of a worker process.

It runs on a thread of its own, looks at the ledger several times a second (at once when it is woken), and does what is
due: says that the worker lives, plans events, gathers deferred mail, keeps the lanes' queues a few slices deep, frees
what vanished workers held, ends events, reads the status page's feed. Feeding and rescuing are the same step, so an
emptied queue refills within a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dramatiq.broker import Broker
from redis import RedisError

from subscriptions.database import Clock, Database, DatabaseUnusable
from worker import broker as queues
from worker import fanout, feeding, leases, ledger, logs
from worker.fanout import Planner
from worker.ledger import Lane
from worker.sharedfeed import SharedFeed

logger = logs.get(__name__)

TICK_SECONDS = 0.2
#: How often the ledger is looked at when nobody woke the scheduler.
BEAT_SECONDS = 5.0
RESCUE_SECONDS = 5.0
#: How often vanished workers and forgotten queue entries are looked for.
PAUSE_SECONDS = 0.5
#: How soon a pause of a relay takes effect; other pauses are looked at before each flight.
QUEUED_SECONDS = 60.0
#: A slice that was queued so long ago and taken by nobody is queued again.


@dataclass(slots=True)
class Scheduler:
    """The loop that keeps a worker process busy with what is due.

    `room` is how many slices of each lane may be queued or in work at once. `alone` means that this process holds the
    lock of the database: every other worker is gone.
    """

    database: Database
    broker: Broker
    planner: Planner
    worker: int
    clock: Clock
    room: Mapping[Lane, int]
    alone: bool
    lease_seconds: int
    queued_seconds: float = QUEUED_SECONDS
    feed: SharedFeed | None = None
    feed_seconds: float = 60.0
    pause_relays: Callable[[set[str]], None] = lambda _: None  # told which relays are paused, by name
    sends: bool = True  # False where no relay is configured: then events are planned and mail waits
    _woken: threading.Event = field(default_factory=threading.Event)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _planner: threading.Thread | None = None
    _alive_until: float = 0.0
    _next: dict[str, float] = field(default_factory=dict)

    def start(self) -> None:
        """Begin: beat once, free what earlier workers left, then go on until `stop`."""
        self._beat()
        self._rescue()
        self._woken.set()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the step in hand; planning ends at its next page."""
        self._stopping.set()
        self._woken.set()
        for thread in (self._planner, self._thread):
            if thread is not None:
                thread.join()

    def wake(self) -> None:
        """Something may be due: look now."""
        self._woken.set()

    def may_send(self) -> bool:
        """Whether this worker's lease stands by its own clock, counted from before the heartbeat was sent."""
        return not self._stopping.is_set() and time.monotonic() < self._alive_until

    @property
    def lives(self) -> bool:
        """Whether the loop runs."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.wait(TICK_SECONDS)
            self._woken.clear()
            try:
                self.tick()
            except (DatabaseUnusable, RedisError) as error:
                logger.warning("scheduler.failed", why=str(error), tried_again_in_seconds=1)
                self._stopping.wait(1.0)
            except Exception as error:
                logger.exception("scheduler.failed", why=str(error), tried_again_in_seconds=1)
                self._stopping.wait(1.0)

    def tick(self) -> None:
        """Look once, and do what is due."""
        self._every("beat", min(BEAT_SECONDS, self.lease_seconds / 3), self._beat)
        self._every("rescue", min(RESCUE_SECONDS, self.lease_seconds / 2, self.queued_seconds), self._rescue)
        self._every("pauses", PAUSE_SECONDS, self._pauses)
        if self.feed is not None:
            self._every("feed", self.feed_seconds, self._refresh)
        now = self.clock()
        with self.database.read() as connection:
            plan = feeding.waits_for_plan(connection, now=now)
            retries = feeding.retries_due(connection, now=now)
            lanes = feeding.lanes_to_feed(connection, now=now) if self.sends else []
            ended = feeding.ended(connection)
        if plan and (self._planner is None or not self._planner.is_alive()):
            self._planner = threading.Thread(target=self._plan, name="planner", daemon=True)
            self._planner.start()
        if retries:
            with self.database.write() as connection:
                feeding.gather_retries(connection, now=now)
            self.wake()
        for lane in lanes:
            self._fill(lane, now)
        if ended:
            with self.database.write() as connection:
                feeding.end_events(connection, [number for number, _ in ended])
            for _, ulid in ended:
                logger.info("event.done", event_id=ulid)

    def _every(self, name: str, seconds: float, do: Callable[[], None]) -> None:
        if time.monotonic() >= self._next.get(name, 0.0):
            self._next[name] = time.monotonic() + seconds
            do()

    def _pauses(self) -> None:
        with self.database.read() as connection:
            self.pause_relays(feeding.paused_relays(connection))

    def _refresh(self) -> None:
        if self.feed is not None:
            threading.Thread(target=self.feed.refresh, name="feed", daemon=True).start()

    def _beat(self) -> None:
        before = time.monotonic()
        with self.database.write() as connection:
            leases.beat(connection, self.worker, now=self.clock())
        self._alive_until = before + self.lease_seconds

    def _rescue(self) -> None:
        now = self.clock()
        dead_before = None if self.alone else now - self.lease_seconds * 1_000_000
        with self.database.write() as connection:
            freed = leases.free_orphans(connection, self.worker, dead_before=dead_before, now=now)
            feeding.forget_queued(connection, before=now - int(self.queued_seconds * 1_000_000))
        if freed:
            logger.warning("rescue.freed", slices=freed, what_next="they are queued again")

    def forget_queue(self) -> None:
        """At the start of a process with its own queue: whatever was queued before is in no queue now."""
        with self.database.write() as connection:
            feeding.forget_queued(connection, before=ledger.NEVER)

    def _plan(self) -> None:
        while not self._stopping.is_set():
            event = None
            try:
                with self.database.write() as connection:
                    event = fanout.take_event(connection, self.worker, now=self.clock())
                if event is None:
                    return
                fanout.plan_event(
                    self.database, self.planner, event, self.worker, clock=self.clock, go_on=self.may_send
                )
            except DatabaseUnusable as error:
                logger.warning("scheduler.failed", why=str(error), tried_again_in_seconds=1)
                return
            except Exception as error:
                if event is None:
                    raise
                logger.exception("event.held", event_id=event.ulid, why=str(error), what_next="a person decides")
                with self.database.write() as connection:
                    ledger.hold_event(connection, event.id, reason="cannot_be_planned")
            self.wake()

    def _fill(self, lane: Lane, now: int) -> None:
        with self.database.write() as connection:
            chosen = feeding.take_for_queue(connection, lane, room=self.room[lane], now=now)
        if chosen:
            queues.enqueue(self.broker, lane, chosen)
