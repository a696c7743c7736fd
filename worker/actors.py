"""The dramatiq actors. A message is one slice by its number: everything else is read from the ledger."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import dramatiq
from dramatiq.broker import Broker

from worker.broker import ACTOR


def declare(broker: Broker, deliver: Callable[[int], Awaitable[None]]) -> None:
    """Let the workers of `broker` deliver slices."""

    async def deliver_slice(slice_id: int) -> None:
        await deliver(slice_id)

    declared = dramatiq.actor(actor_name=ACTOR, queue_name="bulk", broker=broker)
    declared(deliver_slice)
