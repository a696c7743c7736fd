"""Outcomes of a worker process on their way into the ledger.

The window between a relay's answer and its durable record is kept small: an outcome waits 10 milliseconds or for 32
others, and no further mail is begun while too many wait. What can't be committed at once is kept and tried again.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from sqlalchemy import Connection

from worker import destinations, ledger, logs
from worker.destinations import Destinations, Wait
from worker.ledger import Settlement
from worker.writer import Writer

logger = logs.get(__name__)

SETTLE_SECONDS = 0.01
SETTLE_OUTCOMES = 32
#: Outcomes wait no longer, and no more of them, before they are committed (design, principle 6).
UNSETTLED = 48
LAG_SECONDS = 0.03
#: No further mail is begun while so many outcomes of this process are not committed, or one for so long: a crash then
#: leaves little open, whether the database is quick or slow.


@dataclass(slots=True)
class Settler:
    """Outcomes of a worker process on their way into the ledger, committed together."""

    writer: Writer
    worker: int
    destinations: Destinations = field(default_factory=Destinations)
    _pending: list[Settlement] = field(default_factory=list)
    _open: dict[int, int] = field(default_factory=dict)  # flight -> mails not yet settled
    _unrecorded: Counter[int] = field(default_factory=Counter)  # slice -> outcomes not yet committed
    _waiting: dict[int, asyncio.Event] = field(default_factory=dict)  # slice -> who waits until there are none
    _timer: asyncio.TimerHandle | None = None
    _unsettled: deque[float] = field(default_factory=deque)  # when each uncommitted outcome came, the oldest first
    _flying: int = 0  # mails that may be begun, and have no outcome yet
    _committed_some: asyncio.Event = field(default_factory=asyncio.Event)

    def expect(self, flight_id: int, mails: int) -> None:
        """A flight of so many mails began."""
        if flight_id:
            self._open[flight_id] = mails

    def forget(self, flight_id: int) -> None:
        """A flight ended before all its mails began."""
        self._open.pop(flight_id, None)

    def add(self, settlement: Settlement) -> None:
        """What became of one mail; it is committed soon."""
        self._pending.append(settlement)
        if settlement.relay is not None:
            self._flying -= 1
        self._unrecorded[settlement.slice_id] += 1
        self._unsettled.append(asyncio.get_running_loop().time())
        if len(self._pending) >= SETTLE_OUTCOMES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SETTLE_SECONDS, self.flush)

    def take(self, wanted: int) -> int:
        """How many of these mails may be begun now; each counts until its outcome is committed."""
        if self._unsettled and asyncio.get_running_loop().time() - self._unsettled[0] > LAG_SECONDS:
            return 0
        granted = max(0, min(wanted, UNSETTLED - len(self._unsettled) - self._flying))
        self._flying += granted
        return granted

    def give_back(self, unused: int) -> None:
        """So many of those taken were not begun after all."""
        self._flying -= unused
        self._committed_some.set()

    async def room(self) -> None:
        """Wait until few enough outcomes are uncommitted, and none for long."""
        while not self.take(1):
            self._committed_some.clear()
            await self._committed_some.wait()
        self.give_back(1)

    async def recorded(self, slice_id: int) -> None:
        """Wait until every outcome of a slice is committed: a slice given back before would be sent again."""
        self.flush()
        if slice_id in self._unrecorded:
            await self._waiting.setdefault(slice_id, asyncio.Event()).wait()

    def flush(self) -> None:
        """Commit what waits, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._pending = self._pending, []
        landed = []
        for one in batch:
            if one.flight_id in self._open:
                self._open[one.flight_id] -= 1
                if self._open[one.flight_id] == 0:
                    del self._open[one.flight_id]
                    landed.append(one.flight_id)
        if batch:
            self._submit(batch, landed, self.destinations.changes())

    def _submit(self, batch: list[Settlement], landed: list[int], learnt: Mapping[str, Wait | None]) -> None:
        def record(connection: Connection) -> None:
            ledger.settle(connection, self.worker, batch)
            ledger.land(connection, landed)
            destinations.record(connection, learnt, now=batch[-1].at)

        loop = asyncio.get_running_loop()

        def done(future: Future[None]) -> None:
            loop.call_soon_threadsafe(self._committed, batch, landed, learnt, future)

        self.writer.submit(record).add_done_callback(done)

    def _committed(
        self, batch: list[Settlement], landed: list[int], learnt: Mapping[str, Wait | None], future: Future[None]
    ) -> None:
        error = future.exception()
        if error is not None:
            # The mails have left: the result is kept and tried again, for as long as this process lives.
            logger.error("database.unusable", why=str(error), outcomes=len(batch), tried_again_in_seconds=1)
            asyncio.get_running_loop().call_later(1.0, self._submit, batch, landed, learnt)
            return
        self.destinations.written(learnt)
        for _ in batch:  # batches are committed in the order in which they came
            self._unsettled.popleft()
        self._committed_some.set()
        for slice_id, count in Counter(one.slice_id for one in batch).items():
            self._unrecorded[slice_id] -= count
            if not self._unrecorded[slice_id]:
                del self._unrecorded[slice_id]
                if slice_id in self._waiting:
                    self._waiting.pop(slice_id).set()
