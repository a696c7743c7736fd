"""Celery on Redis, a task for each mail, smtplib.

Workers: `python -m celery -A tests.bench.peers.plain_celery worker -c 2`; publisher: `python -m` this module FROM TO.
"""

from __future__ import annotations

import os
import smtplib
import sys
from typing import Any

from celery import Celery

from tests.bench.peers.mail import HOST, message, recipient, smtp_port

app = Celery("mails", broker=os.environ["PEER_BROKER_URL"])
app.conf.task_ignore_result = True


@app.task(name="send_mail")
def send_mail(context: dict[str, Any]) -> None:
    with smtplib.SMTP(HOST, smtp_port()) as client:
        client.send_message(message(context))


if __name__ == "__main__":
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        send_mail.delay(recipient(number))
