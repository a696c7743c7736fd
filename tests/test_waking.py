"""Wake-ups: what is due is told and begun at once, a word that is lost costs a look, and a dead server costs nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import insert, select, update

from subscriptions.database import Database
from tests.faults.servers import Valkey
from tests.house import ACME, app_on, event, house, import_accounts, publish
from tests.servers import redis_url
from tests.smtpd import Act, SmtpServer
from tests.test_delivery import Clock, states, vendor, working
from worker import feeding, rescue
from worker.app import App, Engine, telling_workers
from worker.broker import HardenedRedisBroker, enqueue, make_broker, redis_client
from worker.intake import Refused
from worker.ledger import Lane
from worker.schema import pauses, slices
from worker.waking import CHANNEL, DUE, PLAN, QUEUED, WORDS, Bell, Listener

__all__ = ["redis_url"]

NEVER_SECONDS = 3600.0


class Ear:
    """What a listener heard."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.starts = 0
        self._changed = threading.Condition()

    def heard(self, words: Collection[str]) -> None:
        with self._changed:
            if words == WORDS:
                self.starts += 1
            else:
                self.words += words
            self._changed.notify_all()

    def wait(self, until: Callable[[], bool], seconds: float = 20.0) -> None:
        with self._changed:
            assert self._changed.wait_for(until, seconds), (self.words, self.starts)


def until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)


def held(gate: threading.Event) -> Act:
    """Answers when the gate is opened."""

    def act(talk: Any, code: int, text: str) -> int:
        gate.wait(20)
        return int(talk.say(code, text))

    return act


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as running:
        yield running


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server of this test's own, which it may stop and freeze."""
    folder = tmp_path / "valkey"
    folder.mkdir()
    with Valkey(folder) as running:
        yield running


@contextmanager
def hearing(url: str) -> Iterator[Ear]:
    ear = Ear()
    listener = Listener(partial(redis_client, url), ear.heard)
    listener.start()
    try:
        yield ear
    finally:
        listener.stop()


@contextmanager
def ringing(url: str) -> Iterator[Bell]:
    bell = Bell(partial(redis_client, url))
    bell.start()
    try:
        yield bell
    finally:
        bell.stop()


# ---------------------------------------------------------------- words


def test_what_is_rung_is_heard_by_everybody_who_listens(redis_url: str) -> None:
    with hearing(redis_url) as one, hearing(redis_url) as other, ringing(redis_url) as bell:
        for ear in (one, other):
            ear.wait(lambda ear=ear: ear.starts == 1)  # type: ignore[misc]
        bell.ring([DUE[Lane.URGENT], PLAN])
        for ear in (one, other):
            ear.wait(lambda ear=ear: sorted(ear.words) == [DUE[Lane.URGENT], PLAN])  # type: ignore[misc]


def test_a_word_rung_a_thousand_times_is_said_a_few_times(redis_url: str) -> None:
    with hearing(redis_url) as ear, ringing(redis_url) as bell:
        ear.wait(lambda: ear.starts == 1)
        for _ in range(1000):
            bell.ring([PLAN])
        bell.ring([QUEUED[Lane.BULK]])
        ear.wait(lambda: QUEUED[Lane.BULK] in ear.words)
        assert 1 <= ear.words.count(PLAN) < 1000


def test_the_last_word_is_said_before_the_process_ends(redis_url: str) -> None:
    with hearing(redis_url) as ear:
        ear.wait(lambda: ear.starts == 1)
        with ringing(redis_url) as bell:
            bell.ring([PLAN])
        ear.wait(lambda: ear.words == [PLAN])


def test_what_strangers_say_is_not_listened_to(redis_url: str) -> None:
    with hearing(redis_url) as ear, redis.Redis.from_url(redis_url) as stranger:
        ear.wait(lambda: ear.starts == 1)
        for word in (b"", b"due", b"DROP TABLE", b"\xff\xfe", b"x" * 100_000, PLAN.encode()):
            stranger.publish(CHANNEL, word)
        ear.wait(lambda: bool(ear.words))
        assert ear.words == [PLAN]


def test_a_listener_whose_server_was_away_takes_everything_as_said(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.waking.RETRY_SECONDS", 0.02)
    monkeypatch.setattr("worker.waking.LONGEST_RETRY_SECONDS", 0.1)
    with hearing(valkey.url) as ear, ringing(valkey.url) as bell:
        ear.wait(lambda: ear.starts == 1)
        valkey.stop()
        bell.ring([PLAN])  # lost
        valkey.start()
        ear.wait(lambda: ear.starts == 2)
        until(lambda: bell.ring([DUE[Lane.NORMAL]]) or DUE[Lane.NORMAL] in ear.words)


def test_a_server_that_is_not_there_is_asked_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Semaphore(0)
    monkeypatch.setattr("worker.waking.RETRY_SECONDS", 0.1)

    def connect() -> Any:
        asked.release()
        return redis_client("redis://127.0.0.1:1/0")

    listener = Listener(connect, lambda _: None)
    listener.start()
    time.sleep(0.5)
    listener.stop()
    assert not listener.hears
    assert 1 <= sum(asked.acquire(blocking=False) for _ in range(100)) < 10


# ---------------------------------------------------------------- publishers


def test_a_publisher_is_not_kept_waiting_by_a_frozen_server(tmp_path: Path, valkey: Valkey) -> None:
    with house(tmp_path, ACME, broker_url=valkey.url) as app:
        valkey.pause()
        with telling_workers(app):
            for number in range(50):
                publish(app, event("file.failed", id=f"f{number}"))
        # that is reached while the server is frozen, after a fraction of the time that any of its answers may take
        assert states(app) == {"planned": 1}
        valkey.resume()


def test_a_publisher_does_without_a_server(tmp_path: Path) -> None:
    with house(tmp_path, ACME, broker_url="redis://127.0.0.1:1/0") as app, telling_workers(app):
        assert publish(app, event("file.failed"))[0].outcome == "deliver"


def test_only_what_left_something_to_do_is_told(database: Database, tmp_path: Path) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [ACME])
    told: list[set[str]] = []
    app.intake.wake = lambda words: told.append(set(words))
    publish(app, event("file.failed"))
    publish(app, event("file.failed"))  # known
    publish(app, event("outage.started", id="o"))  # no mail
    publish(app, event("invoice.issued", id="i"), event("service.notice", id="s", accounts="all"))
    assert told == [{DUE[Lane.URGENT]}, {DUE[Lane.NORMAL], PLAN}]


# ---------------------------------------------------------------- workers on Redis


@contextmanager
def publisher_beside(app: App, folder: Path, url: str) -> Iterator[App]:
    """The same installation, as a process that only publishes sees it."""
    with house(folder, clock=Clock(), database_url=app.database.url, broker_url=url) as other:
        yield other


def test_a_worker_that_looks_by_itself_once_an_hour_sends_at_once_what_others_accept(
    tmp_path: Path, redis_url: str, server: SmtpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis.Redis.from_url(redis_url).flushall()
    monkeypatch.setattr(rescue, "HEARING_SECONDS", NEVER_SECONDS)
    monkeypatch.setattr(rescue, "TICK_SECONDS", NEVER_SECONDS)
    with vendor(tmp_path, server, broker_url=redis_url) as app, working(app) as engine:
        until(lambda: engine._listener is not None and engine._listener.hears)
        with publisher_beside(app, tmp_path, redis_url) as other, telling_workers(other):
            for number, kind in enumerate(("file.failed", "invoice.issued", "file.failed")):
                publish(other, event(kind, id=f"e{number}"))
                until(lambda number=number: len(server.accepted) == number + 1)  # type: ignore[misc]
            publish(other, event("service.notice", id="all", accounts="all"))
            until(lambda: len(server.accepted) > 4)


def test_a_word_that_is_lost_costs_a_look(tmp_path: Path, redis_url: str, server: SmtpServer) -> None:
    redis.Redis.from_url(redis_url).flushall()
    with vendor(tmp_path, server, broker_url=redis_url) as app, working(app) as engine:
        until(lambda: engine._listener is not None and engine._listener.hears)
        with publisher_beside(app, tmp_path, redis_url) as silent:
            publish(silent, event("file.failed"), event("invoice.issued", id="i"))
        until(lambda: len(server.accepted) == 2)


def test_words_said_twice_and_for_nothing_send_nothing_twice(
    tmp_path: Path, redis_url: str, server: SmtpServer
) -> None:
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    with vendor(tmp_path, server, broker_url=redis_url) as app, working(app) as engine:
        for number in range(20):
            for word in WORDS:
                client.publish(CHANNEL, word)
            publish(app, event("file.failed", id=f"f{number}"))
        assert engine.until_idle(seconds=20)
    assert len(server.accepted) == 20


def test_idle_workers_ask_the_server_seldom(tmp_path: Path, redis_url: str, server: SmtpServer) -> None:
    client = redis.Redis.from_url(redis_url)
    client.flushall()

    def asked() -> int:
        return sum(one["calls"] for name, one in client.info("commandstats").items() if "evalsha" in name)

    with vendor(tmp_path, server, broker_url=redis_url) as app, working(app):
        time.sleep(1.5)  # rests grow
        before = asked()
        time.sleep(2.0)
        assert asked() - before < 60, "three queues, and three of delayed messages that nobody fills"


def test_a_resting_consumer_fetches_at_once_what_is_enqueued_and_what_there_is_room_for(redis_url: str) -> None:
    redis.Redis.from_url(redis_url).flushall()
    broker = make_broker(redis_url, [])
    assert isinstance(broker, HardenedRedisBroker)
    consumer = broker.consume("urgent", prefetch=1, timeout=int(NEVER_SECONDS * 1000))
    found: list[Any] = []

    def look() -> threading.Thread:
        def one_message() -> None:
            while not (message := next(consumer)):
                consumer.misses = 30  # it rests for an hour
            found.append(message)

        consumer.misses = 30
        thread = threading.Thread(target=one_message, daemon=True)
        thread.start()
        return thread

    resting = look()
    time.sleep(0.1)
    enqueue(broker, Lane.URGENT, [7, 8])
    broker.look(Lane.URGENT)
    resting.join(20)
    assert [message.args for message in found] == [(7,)]
    # one that has as many as it may have rests until there is room for more
    resting = look()
    time.sleep(0.1)
    assert len(found) == 1
    consumer.ack(found[0])
    resting.join(20)
    assert [message.args for message in found] == [(7,), (8,)]
    broker.close()


# ---------------------------------------------------------------- straight to the loop


def test_an_event_in_a_process_that_works_needs_no_scheduler_and_no_queue(
    tmp_path: Path, server: SmtpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescue, "TICK_SECONDS", NEVER_SECONDS)
    with vendor(tmp_path, server) as app, working(app):
        time.sleep(0.1)
        app.intake.wake = lambda _: None  # nobody looks at the ledger
        for number in range(10):
            publish(app, event("file.failed", id=f"f{number}"))
            until(lambda number=number: len(server.accepted) == number + 1)  # type: ignore[misc]
            until(lambda number=number: states(app, number + 1) == {"accepted": 1})  # type: ignore[misc]


def room(
    app: App, engine: Engine, lane: Lane = Lane.URGENT, class_: str = "operational", account: str = "acme"
) -> bool:
    with app.database.read() as connection:
        return engine.room(connection, lane, class_, account, now=app.clock())


@pytest.mark.parametrize(("scope", "value"), [("all", ""), ("class", "operational"), ("account", "acme")])
def test_what_is_paused_is_not_begun(tmp_path: Path, server: SmtpServer, scope: str, value: str) -> None:
    with vendor(tmp_path, server) as app, working(app) as engine:
        assert room(app, engine)
        with app.database.write() as connection:
            connection.execute(insert(pauses).values(scope=scope, value=value, by="test", at=1))
        assert not room(app, engine)
        assert room(app, engine, class_="security") == (scope == "class")
        assert room(app, engine, account="globex") == (scope == "account")
        publish(app, event("file.failed"))
        assert engine.until_idle(seconds=20)
        assert server.accepted == []


def test_a_lane_is_not_made_wider(tmp_path: Path, server: SmtpServer) -> None:
    gate = threading.Event()
    server.on("dot", held(gate))
    with vendor(tmp_path, server) as app, working(app) as engine:
        width = engine._wide[Lane.URGENT]
        for number in range(width + 5):
            publish(app, event("file.failed", id=f"f{number}"))
        assert not room(app, engine)
        with app.database.read() as connection:
            marked = connection.execute(select(slices.c.id).where(slices.c.queued_at.is_not(None))).all()
        assert len(marked) == width
        assert room(app, engine, Lane.NORMAL), "each lane has room of its own"
        gate.set()
        assert engine.until_idle(seconds=20)
    assert len(server.accepted) == width + 5


def test_who_waits_in_a_lane_comes_first(database: Database, tmp_path: Path) -> None:
    app = app_on(database, tmp_path)
    import_accounts(app, [ACME])

    def may(lane: Lane) -> bool:
        with app.database.read() as connection:
            return feeding.room_at_once(connection, lane, "operational", "acme", width=4, now=app.clock())

    assert may(Lane.URGENT)
    publish(app, event("file.failed"))
    assert not may(Lane.URGENT)
    assert may(Lane.NORMAL)
    with database.write() as connection:
        taken = feeding.take(connection, Lane.URGENT, room=4, now=app.clock())
        assert (len(taken.numbers), taken.mails, taken.first) == (1, 1, True)
    assert may(Lane.URGENT), "it is at work, and others may be beside it"
    publish(app, event("file.failed", id="other"))
    with database.write() as connection:
        assert not feeding.take(connection, Lane.URGENT, room=4, now=app.clock()).first


def test_what_was_begun_is_ended_before_the_process_ends(tmp_path: Path, server: SmtpServer) -> None:
    gate = threading.Event()
    server.on("dot", held(gate))
    with vendor(tmp_path, server) as app:
        engine = Engine(app)
        engine.start()
        publish(app, event("file.failed"))
        until(lambda: "DATA" in server.verbs())
        stops = threading.Thread(target=engine.stop)
        stops.start()
        until(lambda: not engine.may_send())
        publish(app, event("file.failed", id="late"))  # nobody begins it any more
        gate.set()
        stops.join(20)
        assert states(app, 1) == {"accepted": 1}
        assert states(app, 2) == {"planned": 1}
        with working(app) as again:
            assert again.until_idle(seconds=20)
        assert len(server.accepted) == 2


def test_what_a_process_took_and_did_not_begin_is_sent_by_the_next(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("file.failed"))
        with app.database.write() as connection:
            connection.execute(update(slices).values(queued_at=app.clock()))  # and it died before it began
        with working(app) as engine:
            assert engine.until_idle(seconds=20)
        assert states(app) == {"accepted": 1}


@pytest.mark.parametrize("kind", ["file.failed", "invoice.issued"])
def test_what_was_claimed_with_its_event_and_never_begun_is_sent_once_by_the_next(
    tmp_path: Path, server: SmtpServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("file.failed", id="first"), event("invoice.issued", id="other"))  # its verdicts are known
        with working(app) as engine:
            assert engine.until_idle(seconds=20)
            monkeypatch.setattr(Engine, "send", lambda *_: None)  # as if it died with the commit
            publish(app, event(kind))
            with app.database.read() as connection:
                claimed = connection.execute(select(slices.c.owner).where(slices.c.done_at.is_(None))).scalars().all()
            assert claimed == [engine.number]
            time.sleep(0.1)
            assert len(server.accepted) == 2
        monkeypatch.undo()
        with working(app) as engine:
            assert engine.until_idle(seconds=20)
        assert states(app, 3) == {"accepted": 1}
        assert len(server.accepted) == 3


def test_a_batch_that_is_refused_after_a_claim_leaves_no_claim(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app, working(app) as engine:
        for _ in range(20):
            with pytest.raises(Refused):
                publish(app, event("file.failed"), event("file.failed", id="bad", account="nobody"))
        assert engine._in_hand == set()
        publish(app, event("file.failed"))
        assert engine.until_idle(seconds=20)
        until(lambda: not engine._in_hand)  # others see that a slice is done a moment before its worker is told
    assert len(server.accepted) == 1


def test_small_events_of_many_publishers_are_each_sent_once(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app, working(app) as engine:

        def some(publisher: int) -> None:
            for number in range(25):
                kind = ("file.failed", "invoice.issued")[number % 2]
                publish(app, event(kind, id=f"{publisher} {number}"))

        publishers = [threading.Thread(target=some, args=(number,)) for number in range(4)]
        for one in publishers:
            one.start()
        for one in publishers:
            one.join(60)
        assert engine.until_idle(seconds=30)
        assert engine._in_hand == set()
    assert len(server.accepted) == 100


def test_on_a_shared_queue_it_is_sent_by_another(tmp_path: Path, redis_url: str, server: SmtpServer) -> None:
    redis.Redis.from_url(redis_url).flushall()
    with vendor(tmp_path, server, broker_url=redis_url) as app, working(app) as engine:
        with publisher_beside(app, tmp_path, redis_url) as other:
            publish(other, event("file.failed"))
            with app.database.write() as connection:
                connection.execute(update(slices).where(slices.c.owner.is_(None)).values(queued_at=app.clock()))
        assert engine.until_idle(seconds=20)
        assert len(server.accepted) == 1
