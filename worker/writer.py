"""One writer thread a process: what asks to be written together is committed together.

A commit on SQLite costs a flush of the disk whatever is in it, so the writer takes everything that waits and commits
once. Each piece of work keeps its order; whoever asked learns of it after the commit. Where a piece fails, all are
done again one by one, so that it fails alone.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from sqlalchemy import Connection

from subscriptions.database import Database

T = TypeVar("T")

MOST = 64
#: Pieces of work in a transaction at the most: a publisher in another process waits for no more than these.


class Writer:
    """Runs work in write transactions on a thread of its own, from `start` to `stop`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: queue.SimpleQueue[tuple[Callable[[Connection], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    @property
    def dialect(self) -> str:
        """The kind of database that is written."""
        return self._database.dialect

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, then end."""
        self._waiting.put(None)
        self._thread.join()

    def submit(self, work: Callable[[Connection], T]) -> Future[T]:
        """Have `work` done in a transaction; the result is there after the commit, in the order of submission."""
        future: Future[T] = Future()
        self._waiting.put((work, future))
        return future

    async def run(self, work: Callable[[Connection], T]) -> T:
        """The same for a coroutine, which waits for the commit."""
        return await asyncio.wrap_future(self.submit(work))

    def _run(self) -> None:
        stopping = False
        while not stopping:
            pieces = []
            piece = self._waiting.get()
            while piece is not None:
                pieces.append(piece)
                if len(pieces) >= MOST:
                    break
                try:
                    piece = self._waiting.get_nowait()
                except queue.Empty:
                    break
            else:
                stopping = True
            # Whoever gave up waiting before the work began does without it; from here on it can't be cancelled.
            wanted = [(work, future) for work, future in pieces if future.set_running_or_notify_cancel()]
            if wanted:
                self._commit(wanted)

    def _commit(self, pieces: list[tuple[Callable[[Connection], Any], Future[Any]]]) -> None:
        try:
            with self._database.write() as connection:
                results = [work(connection) for work, _ in pieces]
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to whoever asked
            if len(pieces) == 1:
                pieces[0][1].set_exception(error)
                return
            for piece in pieces:
                self._commit([piece])
            return
        for (_, future), result in zip(pieces, results, strict=True):
            future.set_result(result)
