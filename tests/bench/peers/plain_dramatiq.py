"""dramatiq on Redis, an actor for each mail, aiosmtplib with its AsyncIO middleware.

Workers: `python -m dramatiq tests.bench.peers.plain_dramatiq -p 2 -t 8`; publisher: `python -m` this module FROM TO.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import aiosmtplib
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO

from tests.bench.peers.mail import HOST, message, recipient, smtp_port

broker = RedisBroker(url=os.environ["PEER_BROKER_URL"])
broker.add_middleware(AsyncIO())
dramatiq.set_broker(broker)


@dramatiq.actor
async def send_mail(context: dict[str, Any]) -> None:
    await aiosmtplib.send(message(context), hostname=HOST, port=smtp_port())


if __name__ == "__main__":
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        send_mail.send(recipient(number))
