"""Worker processes under a small parent: N for bulk, one for each other lane; one that dies is replaced.

The parent sends nothing and opens nothing of its own. Its end is its children's end, however it comes: they are told
to stop, and one that finds its parent gone stops by itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from subscriptions.database import Database, DatabaseUnusable
from worker import logs
from worker.ledger import Lane
from worker.schema import workers

logger = logs.get(__name__)

STOP_SECONDS = 28.0
#: How long children may take to end their flights: less than a container's grace of 30.
BACKOFF_SECONDS = (0.0, 1.0, 2.0, 5.0, 15.0, 30.0)
#: Before a child is replaced, by how many in a row died young.
YOUNG_SECONDS = 20.0
#: A child that lived longer did not fail at its start.


@dataclass(slots=True)
class _Child:
    """The place of one worker process, whoever stands in it."""

    lane: Lane
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    again_at: float = 0.0
    died_young: int = 0


class Family:
    """The worker processes of one `rolecast work --processes N`."""

    def __init__(self, bulk: int, *, config: Path | None = None) -> None:
        self._config = config
        self._children = [_Child(lane) for lane in (Lane.URGENT, Lane.NORMAL, *[Lane.BULK] * bulk)]

    def start(self) -> None:
        """Start every process."""
        for child in self._children:
            self._spawn(child)

    def works(self, database: Database) -> bool:
        """Whether every process runs and is on record: before, nobody can say that nothing is due."""
        running = {child.process.pid for child in self._children if child.process and child.process.poll() is None}
        try:
            with database.read() as connection:
                known = set(
                    connection.execute(select(workers.c.pid).where(workers.c.host == socket.gethostname())).scalars()
                )
        except DatabaseUnusable:
            return False
        return len(running) == len(self._children) and running <= known

    def look(self) -> None:
        """Replace what died; one that dies again and again is started later and later."""
        now = time.monotonic()
        for child in self._children:
            if child.process is not None and child.process.poll() is not None:
                self._bury(child, child.process.returncode, now)
            if child.process is None and now >= child.again_at:
                self._spawn(child)

    def stop(self) -> None:
        """Tell every process to stop, wait for their flights, and end those that take too long."""
        running = [child.process for child in self._children if child.process is not None]
        for process in running:
            process.terminate()
        ends = time.monotonic() + STOP_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _spawn(self, child: _Child) -> None:
        command = [sys.executable, "-m", "worker.cli"]
        if self._config is not None:
            command += ["--config", str(self._config)]
        command += ["work", "--lanes", child.lane.name.lower(), "--parent", str(os.getpid())]
        # A session of its own: Ctrl-C in a terminal reaches the parent, which tells the children once.
        child.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - our own command
        child.started_at = time.monotonic()

    def _bury(self, child: _Child, code: int, now: float) -> None:
        child.died_young = child.died_young + 1 if now - child.started_at < YOUNG_SECONDS else 0
        wait = BACKOFF_SECONDS[min(child.died_young, len(BACKOFF_SECONDS) - 1)]
        child.process, child.again_at = None, now + wait
        logger.warning("worker.died", lane=child.lane.name.lower(), code=code, replaced_in_seconds=wait)
