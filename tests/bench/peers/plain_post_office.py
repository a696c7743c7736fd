"""django-post-office: mails are queued in its tables, `send_queued_mail --processes 2` delivers them.

`python -m` this module migrate | queue FROM TO | send. The database is PEER_DATABASE, a file.
"""

from __future__ import annotations

import os
import sys

import django
from django.conf import settings

from tests.bench.peers.mail import HOST, SENDER, message, recipient, smtp_port

settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "post_office"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["PEER_DATABASE"],
                           "OPTIONS": {"timeout": 60}}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
    EMAIL_BACKEND="post_office.EmailBackend",
    EMAIL_HOST=HOST,
    EMAIL_PORT=smtp_port(),
    POST_OFFICE={"BATCH_SIZE": 1000, "THREADS_PER_PROCESS": 8, "DEFAULT_PRIORITY": "medium"},
)  # fmt: skip
django.setup()


def queue(start: int, end: int) -> None:
    from post_office import mail

    for number in range(start, end):
        context = recipient(number)
        built = message(context)
        text, html = [part.get_content() for part in built.iter_parts()]
        headers = {name: str(built[name]) for name in ("List-Unsubscribe", "List-Unsubscribe-Post", "Feedback-ID")}
        mail.send(context["person"]["email"], SENDER, subject=str(built["Subject"]), message=text,
                  html_message=html, headers=headers)  # fmt: skip


if __name__ == "__main__":
    from django.core.management import call_command

    if sys.argv[1] == "migrate":
        call_command("migrate", verbosity=0)
    elif sys.argv[1] == "queue":
        queue(int(sys.argv[2]), int(sys.argv[3]))
    else:
        call_command("send_queued_mail", processes=2)
