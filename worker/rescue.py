"""What the ledger owes and no queue holds is queued again: the scheduler of a worker process.

It runs on a thread of its own, looks at the ledger several times a second (at once when it is woken), and does what is
due: plans events, gathers deferred mail, keeps the lanes' queues a few slices deep, frees what vanished workers held,
ends events, reads the status page's feed, tells operators. Feeding and rescuing are the same step, so an emptied queue
refills within a second or two.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from dramatiq.broker import Broker
from redis import RedisError

from subscriptions.database import Clock, Database, DatabaseUnusable
from worker import broker as queues
from worker import fanout, feeding, leases, ledger, logs, matters, waking
from worker.fanout import Planner
from worker.heartbeat import Heartbeat, steady
from worker.ledger import Lane
from worker.sharedfeed import SharedFeed

logger = logs.get(__name__)

T = TypeVar("T")

TICK_SECONDS = 0.2
#: How often the ledger is looked at when nobody woke the scheduler.
HEARING_SECONDS = 0.8
#: The same where every process tells what it commits: what falls due by time, and what was told in vain.
REST_SECONDS = 0.01
#: Between two looks, however often it is woken.
CROWDED_SECONDS = 0.05
#: The same where a server's queue holds work for longer than that: many slices are queued by each look then.
RESCUE_SECONDS = 5.0
#: How often vanished workers and forgotten queue entries are looked for.
RECONCILE_SECONDS = 1.0
#: How often the queue is compared with what the ledger believes to stand there.
ENDED_SECONDS = 2.0
#: How often events are looked for that ended without a last slice (their mail was settled elsewhere).
NOTICE_SECONDS = 30.0
#: How often is looked whether operators are to be told something.
PAUSE_SECONDS = 0.5
#: How soon a pause of a relay takes effect; other pauses are looked at before each flight.
TROUBLE_SECONDS = 2.0
#: How often what hinders this worker is put on record.
FULL_MICROSECONDS = 50_000
#: A lane that could take nothing is not looked at again before.
IN_HAND_SECONDS = 0.02
#: How often is looked how many slices are in hand: that asks no database.
STOCKED_MICROSECONDS = 100_000
#: Nor one in which whole slices stand or are at work, while more than half of them are in hand: each filling is a write
#: transaction, and what is left keeps every connection busy.
SMALL = 16
#: Slices of a mail or two that stand in a server's queue for each whole one: it is asked ten times a second only. A
#: queue of our own is filled at once, and what stands in it keeps threads from more urgent lanes.
AT_ONCE_MAILS = 32
#: So few mails of a lane in which nothing else is at work are begun without asking a queue's server.
QUEUED_SECONDS = 10.0
#: A slice that was queued so long ago and taken by nobody is queued again, whatever the queue says.


@dataclass(slots=True)
class Scheduler:
    """The loop that keeps a worker process busy with what is due.

    `width` is how many slices of each of its lanes this process works on at once. `alone` means that this process holds
    the lock of the database: every other worker is gone.
    """

    database: Database
    broker: Broker
    planner: Planner
    worker: int
    clock: Clock
    width: Mapping[Lane, int]
    alone: bool
    heart: Heartbeat
    lease_seconds: float
    in_hand: Callable[[], Collection[int]]  # the slices that this process works on
    deliver: Callable[[Sequence[int]], None]  # begins slices at once, without the queue
    queued_seconds: float = QUEUED_SECONDS
    feed: SharedFeed | None = None
    feed_seconds: float = 60.0
    pause_relays: Callable[[set[str]], None] = lambda _: None  # told which relays are paused, by name
    relay_problems: Callable[[], Mapping[str, str | None]] = dict  # relay -> why it can't be used, None where it can
    tell_operators: Callable[[], None] = lambda: None
    hears: Callable[[], bool] = lambda: False  # whether others tell this process what they commit
    tell: Callable[[Collection[str]], None] = lambda _: None  # tells the others (words of `waking`)
    sends: bool = True  # False where no relay is configured: then events are planned and mail waits
    patience: int = 0  # microseconds for which events are left to others to be planned
    queue_problem: str | None = None
    queue_away_since: float | None = None  # by the steady clock of this process
    crowded: bool = True  # whether more was due at the last look than could be begun at once
    _queue_faults: dict[str, str] = field(default_factory=dict)  # what can't be done with it now -> why
    _watch: leases.Watch = field(init=False)
    _woken: threading.Event = field(default_factory=threading.Event)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _planner: threading.Thread | None = None
    _teller: threading.Thread | None = None
    _next: dict[str, float] = field(default_factory=dict)
    _astray: set[int] = field(default_factory=set)  # slices of ours that nobody here works on, at the last look
    _ended_after: int = 0
    _rests: dict[Lane, tuple[int, int]] = field(default_factory=dict)  # until when, and until how few are in hand
    _reported: set[tuple[matters.Trouble, str]] = field(default_factory=set)
    _stocked: Sequence[Lane] = ()  # lanes with more to do that are well filled for now
    _shortage: str | None = None

    def __post_init__(self) -> None:
        self._watch = leases.Watch(self.worker, self.lease_seconds, longest_step=2 * self._rescue_seconds)

    @property
    def _rescue_seconds(self) -> float:
        return min(RESCUE_SECONDS, self.lease_seconds / 3, self.queued_seconds)

    def start(self) -> None:
        """Begin: free what earlier workers left, then go on until `stop`."""
        self._rescue()
        self._pauses()
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
        """Whether this worker may begin something: its lease holds, there is room, and nobody asked it to stop."""
        return not self._stopping.is_set() and self._shortage is None and self.heart.holds()

    @property
    def lives(self) -> bool:
        """Whether the loop runs."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wait()
            self._woken.clear()
            try:
                self.tick()
            except DatabaseUnusable as error:
                logger.warning("scheduler.failed", why=str(error), tried_again_in_seconds=1)
                self._stopping.wait(1.0)
            except Exception as error:
                logger.exception("scheduler.failed", why=str(error), tried_again_in_seconds=1)
                self._stopping.wait(1.0)
            self._stopping.wait(CROWDED_SECONDS if self.crowded and not self.alone else REST_SECONDS)

    def _wait(self) -> None:
        """Wait until something may be due: somebody says so, a lane was well filled and is no more, or time is over."""
        while self._stocked and not self._stopping.is_set():
            if self._woken.wait(IN_HAND_SECONDS):
                return
            now = self.clock()
            if not all(self._rests_now(lane, now) for lane in self._stocked):
                return
        self._woken.wait(HEARING_SECONDS * random.uniform(0.5, 1) if self.hears() else TICK_SECONDS)  # noqa: S311

    def tick(self) -> None:
        """Look once, and do what is due: mail first, then what is done now and then, whatever became of the mail."""
        try:
            if self.may_send():
                self._feed()
        finally:
            self._look_after()

    def _look_after(self) -> None:
        self._every("rescue", self._rescue_seconds, self._rescue)
        self._every("pauses", PAUSE_SECONDS, self._pauses)
        self._every("troubles", TROUBLE_SECONDS, self._troubles)
        self._every("ended", ENDED_SECONDS, self._ended)
        if self.feed is not None:
            self._every("feed", self.feed_seconds, self._refresh)
        if self.sends:
            self._every("operators", NOTICE_SECONDS, self._tell)
        if not self.alone and self.may_send():
            self._every("reconcile", RECONCILE_SECONDS, self._reconcile)

    def _feed(self) -> None:
        """Plan, gather and queue what is due."""
        now = self.clock()
        with self.database.read() as connection:
            waiting = feeding.look(connection, self.width if self.sends else (), now=now, waited=self.patience)
        at_once = [not self._rests_now(lane, now) and self._fill(lane, now) for lane in waiting.lanes]
        # What rests is looked at when it was to be: whoever finishes a slice need not tell.
        self._stocked = [
            lane for lane in waiting.lanes if self._rests.get(lane, (0, -1))[1] >= 0 and now < self._rests[lane][0]
        ]
        self.crowded = any(
            not begun and lane not in self._stocked for lane, begun in zip(waiting.lanes, at_once, strict=True)
        )
        if waiting.plan and (self._planner is None or not self._planner.is_alive()):
            self._planner = threading.Thread(target=self._plan, name="planner", daemon=True)
            self._planner.start()
        if waiting.retries:
            with self.database.write() as connection:
                feeding.gather_retries(connection, now=now)
            self.wake()
            self.tell(waking.DUE.values())

    def _every(self, name: str, seconds: float, do: Callable[[], None]) -> None:
        if time.monotonic() >= self._next.get(name, 0.0):
            self._next[name] = time.monotonic() + seconds
            do()

    # ------------------------------------------------------------ what is seldom

    def _rescue(self) -> None:
        """Free what vanished workers held, and what this one holds without working on it."""
        now = self.clock()
        with self.database.write() as connection:
            dead = None if self.alone else self._watch.look(connection, at=steady())
            freed = leases.free_orphans(connection, self.worker, dead=dead, now=now)
            # A claim whose commit was answered by nobody is ours, and nobody here knows of it.
            astray = leases.owned(connection, self.worker) - set(self.in_hand())
            freed += leases.free_some(connection, self.worker, astray & self._astray, now=now)
            if self._planner is None or not self._planner.is_alive():
                leases.free_plans(connection, self.worker)
            if self.queued_seconds < QUEUED_SECONDS or self.alone:
                feeding.forget_queued(connection, before=now - int(self.queued_seconds * 1_000_000))
        self._astray = astray
        if freed:
            logger.warning("rescue.freed", slices=freed, what_next="they are queued again")

    def _pauses(self) -> None:
        with self.database.read() as connection:
            self.pause_relays(feeding.paused_relays(connection))

    def _troubles(self) -> None:
        """Put on record what hinders this worker, and take away what does no more."""
        self._shortage = self.database.shortage()
        self._tell_of_the_queue()
        now_seen: dict[tuple[matters.Trouble, str], str | None] = {
            ("disk", ""): self._shortage,
            ("queue", ""): self.queue_problem,
            **{("relay", name): why for name, why in self.relay_problems().items()},
        }
        if self.feed is not None:
            now_seen["feed", ""] = self.feed.problem
        changed = {key: why for key, why in now_seen.items() if why is not None or key in self._reported}
        if changed:
            with self.database.write() as connection:
                for (kind, name), why in sorted(changed.items()):
                    matters.report(connection, self.worker, kind, name, why, now=self.clock())
        self._reported = {key for key, why in now_seen.items() if why is not None}

    def _refresh(self) -> None:
        if self.feed is not None:
            threading.Thread(target=self.feed.refresh, name="feed", daemon=True).start()

    def _tell(self) -> None:
        if self._teller is None or not self._teller.is_alive():
            self._teller = threading.Thread(target=self.tell_operators, name="notices", daemon=True)
            self._teller.start()

    def _ended(self) -> None:
        """End events of which nothing is left, some thousand a look: a last slice ends most of them by itself."""
        with self.database.read() as connection:
            ended, self._ended_after = feeding.ended(connection, after=self._ended_after)
        if ended:
            with self.database.write() as connection:
                feeding.end_events(connection, [number for number, _ in ended])
            for _, ulid in ended:
                logger.info("event.done", event_id=ulid)

    # ------------------------------------------------------------ planning

    def _plan(self) -> None:
        while not self._stopping.is_set():
            event = None
            try:
                with self.database.write() as connection:
                    event = fanout.take_event(connection, self.worker, now=self.clock(), waited=self.patience)
                if event is None:
                    return
                fanout.plan_event(
                    self.database,
                    self.planner,
                    event,
                    self.worker,
                    clock=self.clock,
                    go_on=self.may_send,
                    released=partial(self._released, event.lane),
                )
            except DatabaseUnusable as error:
                logger.warning("scheduler.failed", why=str(error), tried_again_in_seconds=1)
                return
            except Exception as error:
                if event is None:
                    raise
                self._set_aside(event, error)
            self._released(event.lane)

    def _released(self, lane: Lane) -> None:
        """Something of a lane may be sent now: here, and elsewhere."""
        if lane in self.width:
            self.wake()
        self.tell({waking.DUE[lane]})

    def _set_aside(self, event: fanout.EventRow, error: Exception) -> None:
        logger.exception("event.held", event_id=event.ulid, why=str(error), what_next="a person decides")
        try:
            with self.database.write() as connection:
                ledger.hold_event(connection, event.id, reason="cannot_be_planned")
        except DatabaseUnusable as unusable:  # it is taken up again, and fails again, and is held then
            logger.warning("scheduler.failed", why=str(unusable), tried_again_in_seconds=1)

    # ------------------------------------------------------------ the queue

    def forget_queue(self) -> None:
        """At the start of a process with its own queue: whatever was queued before is in no queue now."""
        with self.database.write() as connection:
            feeding.forget_queued(connection, before=ledger.NEVER)

    def _rests_now(self, lane: Lane, now: int) -> bool:
        """Whether a lane need not be filled yet: it rests, and more slices are in hand than it was to come down to."""
        until, few = self._rests.get(lane, (0, 0))
        return now < until and len(self.in_hand()) > few

    def _fill(self, lane: Lane, now: int) -> bool:
        """Queue what is due in a lane; whether it could be begun at once."""
        width = self.width[lane]
        with self.database.write() as connection:
            workers = 1 if self.alone else max(1, leases.serving(connection, lane))
            small = 1 if self.alone else SMALL
            taken = feeding.take(connection, lane, room=width * workers, small=small, now=now)
        if not taken.numbers:  # the queue is full, or what waits is paused: whoever finishes a slice makes room
            self._rests[lane] = now + FULL_MICROSECONDS, -1
            return False
        if taken.whole:
            self._rests[lane] = now + STOCKED_MICROSECONDS, min(width, taken.standing // workers) // 2
        if taken.first and len(taken.numbers) <= width and taken.mails <= AT_ONCE_MAILS:
            self.deliver(taken.numbers)
            return True
        self._asked("fill", partial(queues.enqueue, self.broker, lane, taken.numbers))
        if isinstance(self.broker, queues.HardenedRedisBroker):
            self.broker.look(lane)
        return False

    def _reconcile(self) -> None:
        """Queue again what the ledger believes to be queued, where the queue knows nothing of it."""
        for lane in self.width:
            before = self.clock() - int(RECONCILE_SECONDS * 1_000_000)
            with self.database.read() as connection:
                waiting = feeding.queued(connection, lane, before=before)
            if not waiting:
                continue
            standing = self._asked("look", partial(queues.standing, self.broker, lane))
            if standing is None:
                return
            old = self.clock() - int(self.queued_seconds * 1_000_000)
            lost = [number for number, at in waiting.items() if number not in standing or at < old]
            if lost:
                with self.database.write() as connection:
                    feeding.forget_queued(connection, before=before, numbers=lost)
                self.wake()

    def _asked(self, what: str, do: Callable[[], T]) -> T | None:
        """Ask the queue's server something; None where it can't be had."""
        try:
            answer = do()
        except (RedisError, OSError) as error:
            self._queue_faults[what] = str(error)
            self._tell_of_the_queue()
            return None
        if self._queue_faults.pop(what, None) is not None:
            self._tell_of_the_queue()
        return answer

    def _tell_of_the_queue(self) -> None:
        """Log once that the queue can't be used, and once that it can again: each thing that failed has to work."""
        faults = [*self._queue_faults.values(), *getattr(self.broker, "problems", {}).values()]
        if not faults and self.queue_problem is not None:
            logger.info("queue.usable", what_next="what waited is queued again")
            self.queue_problem = self.queue_away_since = None
        elif faults and self.queue_problem is None:
            self.queue_away_since = time.monotonic()
            logger.warning("queue.unusable", why=faults[0], tried_again_in_seconds=RECONCILE_SECONDS)
        if faults:
            self.queue_problem = f"the queue can't be used ({faults[0]}): mail waits until it can"
