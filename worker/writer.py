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
Piece = tuple[Callable[[Connection], Any], Future[Any]]
"""Work, and who waits for it."""

MOST = 64
#: Pieces of work in a transaction at the most: a publisher in another process waits for no more than these.


class Writer:
    """Runs work in write transactions on a thread of its own, from `start` to `stop`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
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
        while (piece := self._waiting.get()) is not None:
            # Whoever gave up waiting before the work began does without it; from here on it can't be cancelled.
            if piece[1].set_running_or_notify_cancel():
                self._commit(piece)

    def _commit(self, first: Piece, *, alone: bool = False) -> None:
        """Begin, which may mean to wait for another process, and only then look what else came."""
        pieces = [first]
        try:
            with self._database.write() as connection:
                pieces += [] if alone else self._rest()
                results = [work(connection) for work, _ in pieces]
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to whoever asked
            if len(pieces) == 1:
                first[1].set_exception(error)
                return
            for piece in pieces:
                self._commit(piece, alone=True)
            return
        for (_, future), result in zip(pieces, results, strict=True):
            future.set_result(result)

    def _rest(self) -> list[Piece]:
        """What waits besides the first piece of a transaction."""
        pieces: list[Piece] = []
        while len(pieces) < MOST - 1:
            try:
                piece = self._waiting.get_nowait()
            except queue.Empty:
                break
            if piece is None:
                self._waiting.put(None)  # the end comes after this transaction
                break
            if piece[1].set_running_or_notify_cancel():
                pieces.append(piece)
        return pieces
