"""aiosmtplib's own dialogue on eight warm connections, with mails that were written before: `python -m` SECONDS."""

from __future__ import annotations

import asyncio
import sys
import time

import aiosmtplib

from tests.bench.peers.mail import HOST, SENDER, message, recipient, smtp_port

CONNECTIONS = 8


async def send(number: int, seconds: float) -> None:
    context = recipient(number)
    mail = message(context).as_bytes().replace(b"\n", b"\r\n")
    async with aiosmtplib.SMTP(hostname=HOST, port=smtp_port()) as client:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            await client.sendmail(SENDER, [context["person"]["email"]], mail)


async def main(seconds: float) -> None:
    await asyncio.gather(*[send(number, seconds) for number in range(CONNECTIONS)])


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
