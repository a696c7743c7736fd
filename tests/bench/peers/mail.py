"""The mail that every peer sends: Jinja2 templates and `email.message.EmailMessage`, as a tutorial would have it."""

from __future__ import annotations

import os
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

SENDER = "Bench Support <support@bench.example>"
HOST = "127.0.0.1"

environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(["html"]),
    trim_blocks=True,
)


def smtp_port() -> int:
    """The sink's port, which the benchmark gives in the environment."""
    return int(os.environ["PEER_SMTP_PORT"])


def recipient(number: int) -> dict[str, Any]:
    """What a peer knows of one recipient, as it would stand in a task's arguments."""
    token = f"{number:022x}"
    return {
        "person": {
            "name": f"Person {number}",
            "email": f"p{number}@a{number // 4}.example",
            "role": "Primary support contact",
            "preferences": f"http://127.0.0.1:8080/preferences/{token}",
            "unsubscribe": f"http://127.0.0.1:8080/unsubscribe/{token}",
        },
        "account": {"id": f"a{number // 4}", "name": f"Account {number // 4}"},
    }


def message(context: dict[str, Any]) -> EmailMessage:
    """Render and build the mail of one recipient."""
    values = context | {
        "title": "Exports move to a new address",
        "since": "1 December",
        "new_host": "exports.bench.example",
        "hosts": [("old", "files.bench.example"), ("new", "exports.bench.example")],
    }
    mail = EmailMessage()
    mail["Date"] = formatdate()
    mail["From"] = SENDER
    mail["To"] = f"{context['person']['name']} <{context['person']['email']}>"
    mail["Subject"] = values["title"]
    mail["Message-ID"] = make_msgid(domain="bench.example")
    mail["Auto-Submitted"] = "auto-generated"
    mail["X-Auto-Response-Suppress"] = "All"
    mail["Feedback-ID"] = f"service_communication:{context['account']['id']}:informational:peer"
    mail["List-Unsubscribe"] = f"<{context['person']['unsubscribe']}>"
    mail["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    mail.set_content(environment.get_template("notice.txt").render(values))
    mail.add_alternative(environment.get_template("notice.html").render(values), subtype="html")
    return mail
