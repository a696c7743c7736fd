"""An asyncio loop without a broker: eight warm aiosmtplib connections take recipients from a queue.

`python -m` this module FROM TO.
"""

from __future__ import annotations

import asyncio
import sys

import aiosmtplib

from tests.bench.peers.mail import HOST, message, recipient, smtp_port

CONNECTIONS = 8


async def worker(queue: asyncio.Queue[int]) -> None:
    async with aiosmtplib.SMTP(hostname=HOST, port=smtp_port()) as client:
        while not queue.empty():
            await client.send_message(message(recipient(queue.get_nowait())))


async def main(start: int, end: int) -> None:
    queue: asyncio.Queue[int] = asyncio.Queue()
    for number in range(start, end):
        queue.put_nowait(number)
    await asyncio.gather(*[worker(queue) for _ in range(CONNECTIONS)])


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
