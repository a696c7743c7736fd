"""The same path with dramatiq on a real Redis-compatible server: the queue is a hint, the ledger is the truth."""

from __future__ import annotations

import time
from pathlib import Path

import redis

from tests.house import ACME, event, house, publish
from tests.servers import redis_url
from tests.smtpd import SmtpServer
from tests.test_delivery import Clock
from worker import ledger
from worker.app import Engine

__all__ = ["redis_url"]

CROWD = {
    "id": "crowd",
    "catalogue": "billtrust",
    "contacts": [{"id": f"p{n}", "email": f"p{n}@crowd.example", "roles": ["secondary_support"]} for n in range(700)],
}


def test_a_broadcast_survives_a_queue_that_is_emptied_under_it(tmp_path: Path, redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    with (
        SmtpServer() as server,
        house(
            tmp_path,
            ACME,
            CROWD,
            clock=Clock(),
            broker_url=redis_url,
            relay_urls=f"smtp://127.0.0.1:{server.port}?tls=none&connections=4",
            public_url="https://notify.vendor.example",
        ) as app,
    ):
        publish(app, event("service.notice", accounts="all"), event("invoice.issued", id="i"))
        engine = Engine(app)
        engine.start()
        try:
            while len(server.accepted) < 100:
                time.sleep(0.01)
            client.flushall()
            assert engine.until_idle(seconds=60)
        finally:
            engine.stop()
        assert len(server.accepted) == 703
        assert len({mail.recipient for mail in server.accepted}) == 703
        with app.database.read() as connection:
            assert ledger.totals(connection, 1) == {"accepted": 702}
            assert ledger.totals(connection, 2) == {"accepted": 1}
    client.close()


def test_messages_carry_numbers_only(tmp_path: Path, redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    from dramatiq import Message

    from worker.broker import enqueue, make_broker
    from worker.ledger import Lane

    broker = make_broker(redis_url, [])
    enqueue(broker, Lane.URGENT, [17, 18])
    stored = client.hvals("rolecast:urgent.msgs")
    assert [Message.decode(one).args for one in stored] == [(17,), (18,)]
    assert all(b"@" not in one for one in stored)
    broker.close()
    client.close()
