"""What every page and call of the web side is given: the opened installation, and how pages are made from templates.

The site is built once, by `worker.web.server`, and reached from a request through `Here`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from worker.app import App, Engine
from worker.links import Links
from worker.settings import is_loopback
from worker.web import words
from worker.web.inbox import Inbox

PAGES = Path(__file__).with_name("pages")
STATIC = Path(__file__).with_name("static")

PERSONAL_PAGE = "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
#: The content security policy of pages behind a personal link.
OPERATORS_PAGE = PERSONAL_PAGE + "; frame-src 'self'"
#: Of the others: the inbox shows a mail in a frame.


class Pages:
    """The templates of the web side."""

    @cached_property
    def environment(self) -> Environment:
        """Jinja2, escaping everything and strict about undefined names."""
        environment = Environment(
            loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        environment.filters["when"] = when
        environment.filters["day"] = day
        environment.filters["said"] = words.said
        environment.globals["style"] = f"/static/style.css?{self._version}"
        return environment

    @cached_property
    def _version(self) -> str:
        return hashlib.sha256((STATIC / "style.css").read_bytes()).hexdigest()[:12]

    def html(self, name: str, **values: Any) -> str:
        """A page as text."""
        given: Mapping[str, Any] = values
        return self.environment.get_template(f"{name}.html").render(given)


@dataclass(frozen=True, slots=True)
class Site:
    """One running web side. `inbox` is None where mails leave for real; `engine` where another process works."""

    app: App
    engine: Engine | None
    inbox: Inbox | None
    listen: tuple[str, int]  # where it really listens
    demo: bool
    links: Links | None  # reads the links of old mails as well, whatever the settings say now
    pages: Pages = field(default_factory=Pages)

    @property
    def vendor(self) -> str:
        """The vendor's name, as mails give it."""
        sender = self.app.settings.sender_of("informational") or ""
        return sender.partition("<")[0].strip().strip('"') or self.app.settings.public_host

    def personal(self, name: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        """A page for a recipient: no way from it to anything else."""
        headers = {
            "Content-Security-Policy": PERSONAL_PAGE,
            "Referrer-Policy": "no-referrer",
            "X-Robots-Tag": "noindex",
        }
        html = self.pages.html(name, vendor=self.vendor, **values)
        return HTMLResponse(html, status_code=status, headers=headers)

    def page(self, name: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        """A page for operators, with the way to the others."""
        html = self.pages.html(name, has_inbox=self.inbox is not None, demo=self.demo, **values)
        headers = {"Content-Security-Policy": OPERATORS_PAGE, "Referrer-Policy": "same-origin"}
        return HTMLResponse(html, status_code=status, headers=headers)

    def shows_people(self, request: Request) -> bool:
        """Whether this request may see people's data without a sign-in: from this machine to this machine.

        What came through a proxy did not come from this machine, wherever the proxy runs.
        """
        if self.demo:
            return True
        client = request.client.host if request.client else ""
        host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
        forwarded = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip", "via"))
        return all(map(is_loopback, (self.listen[0], client, host))) and not forwarded


def when(text: str | None) -> str:
    """An RFC 3339 time as people read it: `21 Nov 2026, 10:00:05 UTC`, a date likewise; text that is neither stays."""
    try:
        if text and len(text) == len("2026-11-21"):
            return f"{date.fromisoformat(text):%-d %b %Y}"
        return f"{datetime.fromisoformat(text.upper()).astimezone(UTC):%-d %b %Y, %H:%M:%S} UTC" if text else ""
    except (ValueError, OverflowError):
        return text or ""


def day(text: str | None) -> str:
    """The same without year and zone, for narrow columns: `21 Nov 10:00:05`."""
    return f"{datetime.fromisoformat(text):%-d %b %H:%M:%S}" if text else ""


def _here(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


Here = Annotated[Site, Depends(_here)]
"""The site, as a parameter of an endpoint."""
