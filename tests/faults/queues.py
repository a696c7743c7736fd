"""The queue's server fails in every way it can, in the middle of a broadcast (reliability.md R6 to R9).

Redis is a hint that may be lost at any time: nobody may be missed, nobody may get a second copy, and what was owed is
sent within a minute of the server's return. Publishing goes on while it is away, over HTTP and by the command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from tests.faults.account import Account
from tests.faults.play import Play, play, publishers, ready, serve
from tests.faults.servers import until
from tests.faults.stage import Configuration, Size

SLOWEST_ANSWER_SECONDS = 2.0
"""So long a publisher may wait over HTTP: a queue that stalls stands in nobody's way."""

SLOWEST_COMMAND_SECONDS = 15.0
"""The same for `rolecast publish`, most of which is the start of a process on a busy machine."""


def emptied(one: Play, times: int = 10) -> None:
    """R6: FLUSHALL, spread over the broadcast."""
    for number in range(times):
        one.reach((number + 1) / (times + 2))
        one.scene.witness.fault("emptied")
        one.valkey.empty()
    one.over()


def replies_lost(one: Play, probability: float = 0.1) -> None:
    """R8: one answer in ten never arrives, for the whole broadcast; what was asked has been done."""
    one.scene.witness.fault("replies lost")
    assert one.queue is not None
    one.queue.drop_replies(probability, one.dice)
    one.reach(1.0)
    print(f"    {one.queue.replies_lost} replies lost", flush=True)
    one.over()


def restarted(one: Play, times: int = 3) -> None:
    """R9: restarted without persistence."""
    for number in range(times):
        one.reach((number + 1) / (times + 2))
        one.scene.witness.fault("restarted")
        one.valkey.restart()
    one.over()


def full(one: Play, seconds: float = 15.0) -> None:
    """R9: no memory left, with noeviction."""
    _for_a_while(one, "full", one.valkey.full, seconds)


def locked(one: Play, seconds: float = 15.0) -> None:
    """R9: the password was changed."""
    _for_a_while(one, "locked", one.valkey.locked, seconds)


def read_only(one: Play, seconds: float = 15.0) -> None:
    """R9: read-only after a failover."""
    _for_a_while(one, "read only", one.valkey.read_only, seconds)


def frozen(one: Play, seconds: float = 20.0) -> None:
    """The server keeps its connections and answers nothing."""

    @contextmanager
    def stopped() -> Iterator[None]:
        one.valkey.pause()
        try:
            yield
        finally:
            one.valkey.resume()

    _for_a_while(one, "frozen", stopped, seconds)


def vanished(one: Play, seconds: float = 20.0) -> None:
    """Packets to it vanish, then arrive."""

    @contextmanager
    def cut_off() -> Iterator[None]:
        assert one.queue is not None
        one.queue.cut(silently=True)
        try:
            yield
        finally:
            one.queue.restore()

    _for_a_while(one, "vanished", cut_off, seconds)


def away(one: Play, seconds: float = 60.0) -> None:
    """R7: stopped for a minute while publishers go on, over HTTP and by the command line."""
    stage = one.scene
    port, key = serve(stage)
    one.reach(0.2)
    with publishers(stage, port, key, most=int(seconds * 4), accounts=one.recipients // 4) as both:
        time.sleep(2.0)  # some before
        stage.witness.fault("away")
        one.valkey.stop()
        time.sleep(seconds)
        code, status, facts = ready(port)
        one.valkey.start()
        stage.witness.fault("back")
        one.over()
        time.sleep(2.0)  # and some after
    for publisher, slowest in zip(both, (SLOWEST_ANSWER_SECONDS, SLOWEST_COMMAND_SECONDS), strict=True):
        print(f"    {publisher.summary()}", flush=True)
        one.wrong += publisher.bad(slowest)
    if (code, status) != (200, "degraded"):
        one.wrong.append(f"/readyz answered {code} {status} {facts} while the queue was away, not degraded")
    if not until(lambda: ready(port)[1] == "ready", seconds=30, every=0.5):
        one.wrong.append(f"/readyz still says {ready(port)} half a minute after the queue's return")


def _for_a_while(one: Play, name: str, fault: Callable[[], AbstractContextManager[None]], seconds: float) -> None:
    one.reach(0.3)
    one.scene.witness.fault(name)
    with fault():
        time.sleep(seconds)
    one.scene.witness.fault(f"{name} no more")
    one.over()


def campaign(
    size: Size,
    fault: Callable[[Play], None],
    configuration: Configuration = "postgresql",
    *,
    recipients: int,
    rate: float = 1000,
) -> Account:
    """The queue's server fails in the middle of a broadcast: nobody missed, nobody written to twice."""
    recipients = size.choose(size.recipients, recipients, 5 * recipients)
    with play(configuration, recipients, dice=size.dice(fault.__name__), rate=rate) as one:
        fault(one)
        return one.end(bound=0)


CAMPAIGNS: dict[str, Callable[[Size], Account]] = {
    "queues-emptied": partial(campaign, fault=emptied, recipients=20_000),
    "queues-emptied-sqlite": partial(campaign, fault=emptied, recipients=20_000, configuration="sqlite"),
    "queues-replies-lost": partial(campaign, fault=replies_lost, recipients=20_000),
    "queues-replies-lost-sqlite": partial(campaign, fault=replies_lost, recipients=8_000, configuration="sqlite"),
    "queues-away": partial(campaign, fault=away, recipients=20_000),
    "queues-restarted": partial(campaign, fault=restarted, recipients=8_000),
    "queues-full": partial(campaign, fault=full, recipients=8_000),
    "queues-locked": partial(campaign, fault=locked, recipients=8_000),
    "queues-read-only": partial(campaign, fault=read_only, recipients=8_000),
    "queues-frozen": partial(campaign, fault=frozen, recipients=8_000),
    "queues-vanished": partial(campaign, fault=vanished, recipients=8_000),
}
