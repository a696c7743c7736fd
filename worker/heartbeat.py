"""The heartbeat of a worker process: a thread of its own, so that nothing else that is slow lets the lease run out.

`holds()` is this process's own deadline: it ends a lease after the last heartbeat was sent, which is before others may
take over. It is counted on a clock that goes on while the machine sleeps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from subscriptions.database import Clock, Database, DatabaseUnusable
from worker import leases, logs
from worker.lock import WorkLock

logger = logs.get(__name__)

BEAT_SECONDS = 5.0
#: Between two heartbeats, at the most; a shorter lease beats three times in it.

_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def steady() -> float:
    """Seconds on a clock that nobody sets, and that counts the time a machine sleeps where the system knows it."""
    return time.clock_gettime(_STEADY)


class Heartbeat:
    """Says that worker number `worker` lives, from `start` to `stop`."""

    def __init__(
        self,
        database: Database,
        lock: WorkLock,
        *,
        worker: int,
        lease_seconds: float,
        clock: Clock,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._lock = lock
        self._worker = worker
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._after = after  # done with each heartbeat
        self._holds_until = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.lost: str | None = None

    def start(self) -> None:
        """Beat once, then go on. Raises `DatabaseUnusable`."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def holds(self) -> bool:
        """Whether this worker may begin to send: nobody else can have taken its work yet."""
        return self.lost is None and steady() < self._holds_until

    @property
    def lives(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        pause = min(BEAT_SECONDS, self._lease_seconds / 3)
        while not self._ended.wait(pause) and self.lost is None:
            try:
                self._beat()
            except DatabaseUnusable as error:
                logger.warning("heartbeat.failed", why=str(error), tried_again_in_seconds=round(pause, 1))
            except Exception as error:
                logger.exception("heartbeat.failed", why=str(error), tried_again_in_seconds=round(pause, 1))

    def _beat(self) -> None:
        before = steady()
        with self._database.write() as connection:
            known = leases.beat(connection, self._worker, now=self._clock())
        if not known:
            self.lost = "other workers saw no heartbeat of this one for a lease, and took over its work"
        elif not self._lock.held():
            self.lost = "the connection that held the right to work on the database was lost"
        else:
            self._holds_until = before + self._lease_seconds
            self._after()
            return
        logger.error("worker.replaced", worker=self._worker, why=self.lost, what_next="this process ends")
