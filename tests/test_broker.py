"""The brokers: a slice's number reaches the actor, on either of them, and whatever Redis does is survived."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.broker import Broker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.errors import ConnectionClosed
from fakeredis import FakeRedis, FakeServer

from worker import actors
from worker.broker import MANY, QUEUES, HardenedRedisBroker, Loop, enqueue, make_broker, standing
from worker.ledger import Lane

FAILS = 13_000
"""A slice whose delivery fails."""


class Deliveries:
    """What reached the actor, and on which thread's loop."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.opened = self.closed = 0
        self._changed = threading.Condition()

    async def opening(self) -> None:
        self.opened += 1

    async def closing(self) -> None:
        self.closed += 1

    async def deliver(self, slice_id: int) -> None:
        with self._changed:
            self.numbers.append(slice_id)
            self._changed.notify_all()
        if slice_id == FAILS:
            message = "a slice that fails"
            raise LookupError(message)

    def wait_for(self, count: int, seconds: float = 10.0) -> list[int]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.numbers) >= count, seconds), self.numbers
            return list(self.numbers)


@contextmanager
def working(broker: Broker, *, threads: int = 2) -> Iterator[dramatiq.Worker]:
    broker.emit_after("process_boot")
    worker = dramatiq.Worker(broker, worker_threads=threads, worker_timeout=20)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
        broker.close()


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def deliveries() -> Deliveries:
    return Deliveries()


@pytest.fixture(params=["memory", "redis"])
def broker(request: pytest.FixtureRequest, server: FakeServer, deliveries: Deliveries) -> Broker:
    """Both kinds, with the actors declared."""
    return made(request.param, server, deliveries)


def made(kind: str, server: FakeServer, deliveries: Deliveries) -> Broker:
    loop = Loop(deliveries.opening, deliveries.closing)
    url = "memory://" if kind == "memory" else "redis://redis.test"
    client = None if kind == "memory" else FakeRedis(server=server)
    broker = make_broker(url, [loop], client=client)
    actors.declare(broker, deliveries.deliver)
    return broker


@pytest.mark.parametrize("lane", list(Lane))
def test_a_queued_slice_reaches_the_actor_whatever_its_lane(broker: Broker, deliveries: Deliveries, lane: Lane) -> None:
    with working(broker):
        enqueue(broker, lane, [42])
        assert deliveries.wait_for(1) == [42]


def test_slices_are_queued_all_at_once_and_each_arrives_once(broker: Broker, deliveries: Deliveries) -> None:
    enqueue(broker, Lane.BULK, range(1, 101))
    with working(broker):
        deliveries.wait_for(100)
        broker.join("bulk", timeout=5_000)
        assert sorted(deliveries.numbers) == list(range(1, 101))


def test_nothing_is_queued_where_there_is_nothing_to_queue(broker: Broker, deliveries: Deliveries) -> None:
    enqueue(broker, Lane.URGENT, [])
    with working(broker):
        enqueue(broker, Lane.BULK, [1])
        assert deliveries.wait_for(1) == [1]


def test_what_lives_on_the_loop_is_opened_before_the_first_slice_and_closed_after_the_last(
    broker: Broker, deliveries: Deliveries
) -> None:
    with working(broker):
        assert (deliveries.opened, deliveries.closed) == (1, 0)
        enqueue(broker, Lane.NORMAL, [1])
        deliveries.wait_for(1)
    assert (deliveries.opened, deliveries.closed) == (1, 1)


def test_the_loop_is_the_quick_one_where_it_is_installed(deliveries: Deliveries) -> None:
    uvloop = pytest.importorskip("uvloop")
    loops: list[asyncio.AbstractEventLoop] = []

    async def opening() -> None:
        loops.append(asyncio.get_running_loop())

    broker = make_broker("memory://", [Loop(opening, deliveries.closing)])
    with working(broker):
        assert isinstance(loops[0], uvloop.Loop)
    assert loops[0].is_closed()


def test_a_worker_whose_relay_can_not_be_opened_does_not_start() -> None:
    async def opening() -> None:
        message = "no template of that name"
        raise LookupError(message)

    async def closing() -> None:
        pass

    broker = make_broker("memory://", [Loop(opening, closing)])
    worker = dramatiq.Worker(broker, worker_threads=1, worker_timeout=20)
    with pytest.raises(Exception, match="no template of that name"):
        worker.start()
    worker.stop()
    broker.close()


def test_a_slice_that_fails_is_not_tried_again_by_the_queue(broker: Broker, deliveries: Deliveries) -> None:
    with working(broker):
        enqueue(broker, Lane.BULK, [FAILS])
        enqueue(broker, Lane.BULK, [7])
        deliveries.wait_for(2)
        time.sleep(0.1)
        assert sorted(deliveries.numbers) == [7, FAILS]


def test_a_message_carries_a_number_and_nothing_else(server: FakeServer, deliveries: Deliveries) -> None:
    broker = made("redis", server, deliveries)
    enqueue(broker, Lane.BULK, [42])
    [stored] = FakeRedis(server=server).hvals("rolecast:bulk.msgs")
    message = json.loads(stored)
    assert (message["actor_name"], message["args"], message["kwargs"]) == ("deliver", [42], {})
    assert set(message["options"]) == {"redis_message_id"}
    broker.close()


def test_a_bulk_of_slices_is_one_transaction(server: FakeServer, deliveries: Deliveries) -> None:
    broker = made("redis", server, deliveries)
    assert isinstance(broker, RedisBroker)
    enqueue(broker, Lane.URGENT, [1, 2, 3])
    client = FakeRedis(server=server)
    assert client.llen("rolecast:urgent") == client.hlen("rolecast:urgent.msgs") == 3
    # when Redis is gone nothing is queued, and who asked learns of it
    server.connected = False
    with pytest.raises(redis.ConnectionError):
        enqueue(broker, Lane.URGENT, [4])
    server.connected = True
    assert client.llen("rolecast:urgent") == 3
    broker.close()


def test_the_consumers_survive_a_redis_that_goes_away_and_comes_back(
    server: FakeServer, deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.05)
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.05)
    broker = made("redis", server, deliveries)
    with working(broker) as worker:
        enqueue(broker, Lane.BULK, [1])
        deliveries.wait_for(1)
        # when Redis is gone for a moment
        server.connected = False
        time.sleep(0.3)
        server.connected = True
        # then every thread lives, and what is queued afterwards arrives
        enqueue(broker, Lane.BULK, [2])
        enqueue(broker, Lane.URGENT, [3])
        assert sorted(deliveries.wait_for(3, 20))[-2:] == [2, 3]
        assert all(consumer.is_alive() for consumer in worker.consumers.values())
        assert all(thread.is_alive() for thread in worker.workers)


def test_an_error_of_redis_is_a_closed_connection_to_the_consumer_and_nothing_to_the_workers(
    server: FakeServer, deliveries: Deliveries
) -> None:
    broker = made("redis", server, deliveries)
    enqueue(broker, Lane.BULK, [1])
    consumer = broker.consume("bulk", prefetch=10, timeout=10)
    message = next(consumer)
    server.connected = False
    with pytest.raises(ConnectionClosed):
        next(consumer)
    consumer.ack(message)  # a worker thread that waited here for the server would deliver nothing else
    consumer.nack(message)
    consumer.requeue([message])
    server.connected = True
    broker.close()


def hostile() -> list[bytes]:
    good: dict[str, Any] = {
        "queue_name": "bulk", "actor_name": "deliver", "args": [1], "kwargs": {}, "options": {},
        "message_id": "x", "message_timestamp": 1,
    }  # fmt: skip
    return [
        b"",
        b"not json",
        b"\x80\x04\x95pickle",
        b"[]",
        b"{}",
        json.dumps({**good, "actor_name": "os.system", "args": ["true"]}).encode(),
        json.dumps({**good, "args": []}).encode(),
        json.dumps({**good, "args": [1, 2, 3]}).encode(),
        json.dumps({**good, "kwargs": {"x": 1}}).encode(),
        *(json.dumps({**good, "args": [what]}).encode() for what in (True, 1.5, "1", -1, 10**40, None, float("inf"))),
        json.dumps({**good, "queue_name": "nosuch"}).encode(),
        json.dumps({**good, "queue_name": "urgent"}).encode(),
        json.dumps({**good, "options": {"eta": 10**15}}).encode(),
        b"[" * 100_000,
    ]


def test_hostile_messages_in_redis_stop_nothing_and_deliver_nothing(
    server: FakeServer, deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.02)
    broker = made("redis", server, deliveries)
    client = FakeRedis(server=server)
    for number, body in enumerate(hostile()):
        client.hset("rolecast:bulk.msgs", str(number), body)
        client.rpush("rolecast:bulk", str(number))
    client.rpush("rolecast:bulk", "an id without a message")
    with working(broker) as worker:
        enqueue(broker, Lane.BULK, [5])
        enqueue(broker, Lane.URGENT, [6])
        assert sorted(deliveries.wait_for(2, 20)) == [5, 6]
        assert all(consumer.is_alive() for consumer in worker.consumers.values())
        assert all(thread.is_alive() for thread in worker.workers)
    assert sorted(deliveries.numbers) == [5, 6]


def test_what_strangers_put_into_the_queue_is_not_taken_for_a_slice_that_stands_there(
    server: FakeServer, deliveries: Deliveries
) -> None:
    broker = made("redis", server, deliveries)
    client = FakeRedis(server=server)
    for number, body in enumerate(hostile()):
        client.hset("rolecast:normal.msgs", str(number), body)
    enqueue(broker, Lane.NORMAL, [77])
    assert 77 in standing(broker, Lane.NORMAL)
    broker.close()


@pytest.mark.parametrize("where", ["list", "hash"])
def test_a_queue_that_strangers_filled_is_emptied(where: str, server: FakeServer, deliveries: Deliveries) -> None:
    broker = made("redis", server, deliveries)
    client = FakeRedis(server=server)
    if where == "list":
        client.rpush("rolecast:normal", *range(MANY + 1))
    else:
        client.hset("rolecast:normal.msgs", mapping={str(number): "x" for number in range(MANY + 1)})
    enqueue(broker, Lane.NORMAL, [77])
    assert standing(broker, Lane.NORMAL) == set(), "so that everything that waits is queued again"
    enqueue(broker, Lane.NORMAL, [77])
    assert standing(broker, Lane.NORMAL) == {77}
    broker.close()


def test_a_queue_that_gives_no_messages_is_a_problem_until_it_does(server: FakeServer, deliveries: Deliveries) -> None:
    broker = made("redis", server, deliveries)
    assert isinstance(broker, HardenedRedisBroker)
    consumer = broker.consume("bulk", prefetch=10, timeout=10)
    server.connected = False
    with pytest.raises(ConnectionClosed):
        next(consumer)
    assert "bulk" in broker.problems
    server.connected = True
    next(consumer)
    assert broker.problems == {}
    broker.close()


def test_each_lane_has_a_queue_of_its_own(broker: Broker) -> None:
    assert set(QUEUES) == set(Lane)
    assert broker.get_declared_queues() >= set(QUEUES.values())
    broker.close()
