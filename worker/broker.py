"""dramatiq's brokers as Rolecast uses them: hints that may be lost, never the truth.

`memory://` is dramatiq's in-process broker, `redis://` its RedisBroker with a consumer that survives what Redis does
when it fails over or stalls. There are no delays, no retries with back-off, no results: these live in the ledger.
"""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import dramatiq
import redis
from dramatiq.asyncio import EventLoopThread, get_event_loop_thread, set_event_loop_thread
from dramatiq.broker import Broker
from dramatiq.brokers.redis import RedisBroker, _RedisConsumer
from dramatiq.brokers.stub import StubBroker
from dramatiq.common import compute_backoff
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import AsyncIO, Middleware, Retries
from dramatiq.middleware.middleware import MiddlewareError
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker import logs
from worker.ledger import Lane
from worker.waking import CHANNEL, QUEUED

new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
with suppress(ModuleNotFoundError):  # an extra, which not every system has
    from uvloop import new_event_loop

logger = logs.get(__name__)

ACTOR = "deliver"
#: The only one there is.
QUEUES = {Lane.URGENT: "urgent", Lane.NORMAL: "normal", Lane.BULK: "bulk"}
MAINTENANCE_CHANCE = 50_000
#: Per million commands: dramatiq looks after dead workers' messages that often (its default is far too seldom).
DEAD_MESSAGE_MILLISECONDS = 3_600_000
#: Dead letters are worthless where the ledger is the truth.
QUIET_MILLISECONDS = 5_000
#: How often a queue of delayed messages is looked at: nothing of ours is ever delayed.
ENDING_SECONDS = 0.05
#: The same for all queues while the process ends.


class Loop(AsyncIO):
    """The event loop of a worker process: relays, flights and settling live on it.

    `opened` and `closing` are awaited on the loop, before the first message and after the last.
    """

    def __init__(self, opened: Callable[[], Awaitable[None]], closing: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._opened = opened
        self._closing = closing

    def before_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
        """Start the loop, then what lives on it; a failure ends the process instead of being swallowed."""
        thread = EventLoopThread(self.logger)
        thread.loop.close()
        thread.loop = new_event_loop()
        thread.daemon = True  # a second SIGTERM must not hang on it
        try:
            thread.start(timeout=10)
            set_event_loop_thread(thread)
            thread.run_coroutine(self._opened())
        except Exception as error:
            raise MiddlewareError(str(error)) from error

    def before_worker_shutdown(self, broker: Broker, worker: dramatiq.Worker) -> None:
        """Let no consumer sleep on."""
        if isinstance(broker, HardenedRedisBroker):
            broker.end_rests()

    def after_worker_shutdown(self, broker: Broker, worker: dramatiq.Worker) -> None:
        """End what lives on the loop, then the loop."""
        thread = get_event_loop_thread()
        if thread is not None:
            thread.run_coroutine(self._closing())
        super().after_worker_shutdown(broker, worker)  # type: ignore[no-untyped-call]  # dramatiq has no types here


class _Consumer(_RedisConsumer):
    """Every error of Redis becomes a closed connection, which dramatiq's worker threads survive (queue.md, 9).

    What stands in the queue and is not ours is dropped: anybody who reaches the server can put anything there. Where
    there is nothing to do it rests as dramatiq's own does, longer and longer, but is woken by the queue's bell.
    """

    def __init__(self, broker: HardenedRedisBroker, queue_name: str, prefetch: int, timeout: int) -> None:
        super().__init__(broker, queue_name, prefetch, 0)  # type: ignore[no-untyped-call]  # it never sleeps by itself
        self._longest = max(timeout, QUIET_MILLISECONDS) if queue_name.endswith(".DQ") else timeout
        self._bell = broker.bells[queue_name]
        self._full = prefetch - max(1, prefetch // 8)  # with so few in work it is worth to fetch more

    def __next__(self) -> Any:
        problems = self.broker.problems
        self._bell.clear()  # before it looks: who rings from now on is heard
        try:
            message = self._safely(super().__next__)
        except ConnectionClosed as error:
            problems[self.queue_name] = str(error.__cause__ or error)
            raise
        problems.pop(self.queue_name, None)
        if message is None:
            _, milliseconds = compute_backoff(self.misses, max_backoff=self._longest)
            self._bell.wait(ENDING_SECONDS if self.broker.ends else milliseconds / 1000)
            return None
        if _is_ours(message, self.queue_name):
            return message
        logger.warning("queue.foreign", queue=self.queue_name, actor=str(message.actor_name)[:80])
        with suppress(KeyError, TypeError):  # it may name no number that could be taken off
            self.ack(message)
        return None

    def ack(self, message: Any) -> None:
        """Take a message off the queue for good; one that stays there costs a claim that fails."""
        with suppress(ConnectionClosed):
            self._safely(super().ack, message)
        self._make_room()

    def nack(self, message: Any) -> None:
        """Send a message to the dead letters, or leave it."""
        with suppress(ConnectionClosed):
            self._safely(super().nack, message)
        self._make_room()

    def _make_room(self) -> None:
        if self.outstanding_message_count <= self._full:
            self._bell.set()

    def requeue(self, messages: Any) -> None:
        """Put prefetched messages back, or leave it to the ledger."""
        with suppress(ConnectionClosed):
            self._safely(super().requeue, messages)

    @staticmethod
    def _safely(do: Callable[..., Any], *args: Any) -> Any:
        try:
            return do(*args)
        except redis.RedisError as error:
            raise ConnectionClosed(error) from error  # type: ignore[no-untyped-call]  # dramatiq has no types here


def _is_ours(message: Any, queue_name: str) -> bool:
    """Whether a message is what `enqueue` writes: a slice by its number."""
    number = message.args[0] if len(message.args) == 1 else None
    return (
        message.queue_name == queue_name
        and message.actor_name == ACTOR
        and not message.kwargs
        and "eta" not in message.options
        and type(number) is int
        and 0 < number < 2**63
    )


class HardenedRedisBroker(RedisBroker):
    """RedisBroker with the hardened consumer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]  # dramatiq has no types here
        self.problems: dict[str, str] = {}
        """Why messages can't be taken now, by queue; empty where they can."""
        self.bells: dict[str, threading.Event] = defaultdict(threading.Event)
        """Wake the consumer of a queue, by queue."""
        self.ends = False

    prefetch: Mapping[str, int] = {}
    """How many messages of a queue this process takes at once, by queue."""

    @property
    def consumer_class(self) -> type[_Consumer]:
        """The consumer that dramatiq's worker threads use."""
        return _Consumer

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> Any:
        """A consumer that takes as many messages as the lane of this process should."""
        return super().consume(queue_name, self.prefetch.get(queue_name, prefetch), timeout)

    def look(self, lane: Lane) -> None:
        """Something was put into the queue of a lane: fetch it now."""
        self.bells[QUEUES[lane]].set()

    def end_rests(self) -> None:
        """The process ends: its consumers are to see that they are told to stop."""
        self.ends = True
        for bell in list(self.bells.values()):
            bell.set()


def make_broker(url: str, middleware: Sequence[Middleware], *, client: Any = None) -> Broker:
    """A broker for `memory://` or `redis://...`; `client` stands in for the connection in tests."""
    parts = [Retries(max_retries=0), *middleware]
    if url == "memory://":
        broker: Broker = StubBroker(middleware=parts)
    else:
        broker = HardenedRedisBroker(
            client=client or redis_client(url),
            middleware=parts,
            maintenance_chance=MAINTENANCE_CHANCE,
            dead_message_ttl=DEAD_MESSAGE_MILLISECONDS,
            namespace="rolecast",
        )
    for name in QUEUES.values():
        broker.declare_queue(name)
    return broker


def redis_client(url: str) -> Any:
    """A client that never retries by itself (a lost reply would be executed twice) and never waits for long."""
    return redis.Redis.from_url(
        url,
        socket_timeout=5,
        socket_connect_timeout=1,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=30,
    )


def ping(url: str) -> None:
    """Ask the server of `redis://...` whether it is there, runs scripts and takes writes; `memory://` always does.

    Raises `redis.RedisError`.
    """
    if url != "memory://":
        client = redis_client(url)
        try:
            client.ping()
            client.eval("return 1", 0)  # dramatiq works by scripts
            client.set("rolecast:probe", "1", px=1)
        finally:
            client.close()


MANY = 10_000
#: A queue with more messages than that is not ours alone: it is emptied, and filled again from the ledger.


def standing(broker: Broker, lane: Lane) -> set[int]:
    """The slices whose messages the server knows, waiting or in work. Raises `redis.RedisError`."""
    assert isinstance(broker, RedisBroker)
    queue = f"{broker.namespace}:{QUEUES[lane]}"
    if broker.client.hlen(f"{queue}.msgs") > MANY or broker.client.llen(queue) > MANY:
        broker.client.delete(queue, f"{queue}.msgs")
        return set()
    found: set[int] = set()
    for payload in broker.client.hvals(f"{queue}.msgs"):
        try:
            found.add(int(json.loads(payload)["args"][0]))
        except (
            ValueError,
            LookupError,
            TypeError,
            OverflowError,
            RecursionError,
        ):  # somebody else's: nobody waits for it
            continue
    return found


def enqueue(broker: Broker, lane: Lane, slice_ids: Sequence[int]) -> None:
    """Put slices into the queue of a lane, on Redis all in one round trip, and tell who serves it.

    Raises `redis.RedisError`; a server that lets us tell nobody takes the messages all the same.
    """
    messages: list[dramatiq.Message[None]] = [
        dramatiq.Message(queue_name=QUEUES[lane], actor_name=ACTOR, args=(slice_id,), kwargs={}, options={})
        for slice_id in slice_ids
    ]
    if not isinstance(broker, RedisBroker):
        for message in messages:
            broker.enqueue(message)
        return
    queue = f"{broker.namespace}:{QUEUES[lane]}"
    payloads: dict[
        bytes | bytearray | memoryview[int] | str | int | float, bytes | bytearray | memoryview[int] | str | int | float
    ] = {}
    for message in messages:
        redis_id = str(uuid.uuid4())
        copy = message.copy(options={"redis_message_id": redis_id})
        broker.emit_before("enqueue", copy, None)
        payloads[redis_id] = copy.encode()
    if payloads:
        with broker.client.pipeline(transaction=True) as pipeline:
            pipeline.hset(f"{queue}.msgs", mapping=payloads)
            pipeline.rpush(queue, *payloads)
            pipeline.execute()
        with suppress(redis.RedisError):
            broker.client.publish(CHANNEL, QUEUED[lane])
