"""Outcomes of a worker process on their way into the ledger, and how many mails may be in flight meanwhile.

A mail is in flight from when it is handed over until its outcome is committed: a crash leaves no more in doubt (design,
principle 6). So the window between a relay's answer and its durable record is kept small: an outcome waits 10
milliseconds or for 192 others, and no further mail is begun while one waits for long. What can't be committed at once
is kept and tried again. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

from sqlalchemy import Connection

from worker import destinations, ledger, logs
from worker.destinations import Destinations, Wait
from worker.ledger import Claim, Lane, Settlement
from worker.writer import Writer

logger = logs.get(__name__)

SETTLE_SECONDS = 0.01
SETTLE_OUTCOMES = 192
#: Outcomes wait no longer, or for no more than these, before they are committed (design, principle 6).
IN_FLIGHT = 256
#: Mails of a worker process that were handed over and whose outcomes are not committed.
LAG_SECONDS = 0.03
#: No further mail is begun while an outcome is uncommitted for so long: a slow database then leaves little open.


@dataclass(slots=True)
class Finish:
    """A slice that is given back with the commit of its last outcome; `done` tells whether its event ended with it."""

    claim: Claim
    at: int
    done: asyncio.Future[bool]


@dataclass(slots=True)
class Settler:
    """Outcomes of a worker process on their way into the ledger, committed together."""

    writer: Writer
    worker: int
    destinations: Destinations = field(default_factory=Destinations)
    _pending: list[Settlement] = field(default_factory=list)
    _waits: int = 0  # outcomes in these
    _finishes: list[Finish] = field(default_factory=list)
    _besides: list[Callable[[Connection], None]] = field(default_factory=list)
    _flights: dict[int, int] = field(default_factory=dict)  # flight -> mails not yet settled
    _unrecorded: Counter[int] = field(default_factory=Counter)  # slice -> outcomes that are being committed
    _waiting: dict[int, asyncio.Event] = field(default_factory=dict)  # slice -> who waits until there are none
    _timer: asyncio.TimerHandle | None = None
    _since: float = 0.0  # when the oldest of those that wait came
    _committing: dict[int, float] = field(default_factory=dict)  # batch (its id) -> when its oldest came
    _uncommitted: int = 0  # outcomes in these batches
    _committed_some: asyncio.Event = field(default_factory=asyncio.Event)
    in_air: int = 0  # mails that were made for a relay and are not answered
    ending: Counter[Lane] = field(default_factory=Counter)  # slices that only wait for their last commit

    # ------------------------------------------------------------ the gate of the relays

    def take(self, wanted: int) -> int:
        """How many mails may be handed over now: none while an outcome waits for long."""
        room = IN_FLIGHT - self.in_air - self._uncommitted - self._waits
        return 0 if self._lags() else max(0, min(wanted, room))

    async def room(self) -> None:
        """Wait until `take` would grant one."""
        while not self.take(1):
            self._committed_some.clear()
            await self._committed_some.wait()

    def _lags(self) -> bool:
        if self._committing:
            return monotonic() - next(iter(self._committing.values())) > LAG_SECONDS
        return bool(self._pending) and monotonic() - self._since > LAG_SECONDS

    # ------------------------------------------------------------ outcomes

    def expect(self, flight_id: int, mails: int) -> None:
        """A flight of so many mails began."""
        if flight_id:
            self._flights[flight_id] = mails

    def forget(self, flight_id: int) -> None:
        """A flight ended before all its mails began."""
        self._flights.pop(flight_id, None)

    def add(self, settlement: Settlement) -> None:
        """What became of some mails; it is committed soon."""
        if not self._pending:
            self._since = monotonic()
            self._timer = asyncio.get_running_loop().call_later(SETTLE_SECONDS, self.flush)
        self._pending.append(settlement)
        self._waits += len(settlement.numbers)
        if self._waits >= SETTLE_OUTCOMES:
            self.flush()

    def besides(self, work: Callable[[Connection], None]) -> None:
        """Something that may wait until the next outcomes are committed, and is committed with them."""
        self._besides.append(work)

    async def recorded(self, slice_id: int) -> None:
        """Wait until every outcome of a slice is committed: a slice given back before would be sent again."""
        self.flush()
        if slice_id in self._unrecorded:
            await self._waiting.setdefault(slice_id, asyncio.Event()).wait()

    async def finish(self, claim: Claim, *, now: int, at_once: bool = True) -> bool:
        """Give a slice back together with its last outcomes, or once they are committed; whether its event ended.

        Not `at_once`: its outcomes wait for others as any do, so that small events that come one after the other are
        settled together.
        """
        if claim.slice_id in self._unrecorded:  # some are on their way: they may have to be tried again
            await self.recorded(claim.slice_id)
        finish = Finish(claim, now, asyncio.get_running_loop().create_future())
        self._finishes.append(finish)
        if at_once or self._timer is None:
            self.flush()
        self.ending[claim.lane] += 1
        try:
            return await finish.done
        finally:
            self.ending[claim.lane] -= 1

    def flush(self) -> None:
        """Commit what waits, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._pending = self._pending, []
        finishes, self._finishes = self._finishes, []
        besides, self._besides = self._besides, []
        landed = []
        for one in batch:
            mails, flight_id = len(one.numbers), one.flight_id
            self._unrecorded[one.slice_id] += mails
            if flight_id in self._flights:
                self._flights[flight_id] -= mails
                if not self._flights[flight_id]:
                    del self._flights[flight_id]
                    landed.append(flight_id)
        if batch:
            self._committing[id(batch)] = self._since
            self._uncommitted += self._waits
            self._waits = 0
        if batch or finishes or besides:
            self._submit(batch, landed, finishes, besides, self.destinations.changes() if batch else {})

    def _submit(
        self,
        batch: Sequence[Settlement],
        landed: Sequence[int],
        finishes: Sequence[Finish],
        besides: Sequence[Callable[[Connection], None]],
        learnt: Mapping[str, Wait | None],
    ) -> None:
        # A slice that is given back forgets its flights by itself.
        whole = {one.claim.slice_id for one in finishes}
        whole_flights = {one.flight_id for one in batch if one.slice_id in whole}
        open_ones = [flight_id for flight_id in landed if flight_id not in whole_flights]

        outcomes = ledger.arrange(batch, dialect=self.writer.dialect)

        def record(connection: Connection) -> list[bool]:
            if batch:
                ledger.settle(connection, self.worker, outcomes)
                ledger.land(connection, open_ones)
                destinations.record(connection, learnt, now=batch[-1].at)
            for work in besides:
                work(connection)
            return [ledger.finish(connection, one.claim, self.worker, now=one.at) for one in finishes]

        loop = asyncio.get_running_loop()
        again = partial(self._submit, batch, landed, finishes, besides, learnt)

        def done(future: Future[list[bool]]) -> None:
            loop.call_soon_threadsafe(self._committed, batch, finishes, learnt, again, future)

        self.writer.submit(record).add_done_callback(done)

    def _committed(
        self,
        batch: Sequence[Settlement],
        finishes: Sequence[Finish],
        learnt: Mapping[str, Wait | None],
        again: Callable[[], None],
        future: Future[list[bool]],
    ) -> None:
        error = future.exception()
        if error is not None:
            # The mails have left: the result is kept and tried again, for as long as this process lives.
            outcomes = sum(len(one.numbers) for one in batch)
            logger.error("database.unusable", why=str(error), outcomes=outcomes, tried_again_in_seconds=1)
            asyncio.get_running_loop().call_later(1.0, again)
            return
        self.destinations.written(learnt)
        if batch:
            del self._committing[id(batch)]
        for one in batch:
            mails, slice_id = len(one.numbers), one.slice_id
            self._uncommitted -= mails
            self._unrecorded[slice_id] -= mails
            if not self._unrecorded[slice_id]:
                del self._unrecorded[slice_id]
                if slice_id in self._waiting:
                    self._waiting.pop(slice_id).set()
        self._committed_some.set()
        for finish, ended in zip(finishes, future.result(), strict=True):
            if not finish.done.done():
                finish.done.set_result(ended)
