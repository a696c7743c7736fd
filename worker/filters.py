"""What templates may do with a value beside what Jinja's own filters do: amounts, dates, Markdown, links, roles.

Each says the same of equal values; what a value must not be is a `TemplateRuntimeError`, which names it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo

from jinja2 import pass_context
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context
from markupsafe import Markup

from worker.event_fields import instant
from worker.markdown import markdown_html
from worker.sandbox import inline_fragment


def filters(style: Path) -> dict[str, Callable[..., object]]:
    """The filters by name; `style` is the sheet whose rules Markdown's HTML gets."""
    return {
        "money": _money,
        "date": _date,
        "datetime": _datetime,
        "markdown": _Prose(style).html,
        "link": _link,
        "role_title": role_title,
    }


_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class _Prose:
    """The filter `markdown`: safe HTML with the style sheet's rules for `.prose` written into it."""

    def __init__(self, style: Path) -> None:
        css = style.read_text(encoding="utf-8")

        @lru_cache(maxsize=128)  # the recipients of a broadcast share its body
        def html(source: str) -> Markup:
            wrapped = inline_fragment(f'<div class="prose">{markdown_html(source)}</div>', css)
            return Markup(wrapped.partition(">")[2].removesuffix("</div>"))  # noqa: S704 - cleaned by markdown_html

        self.html = html


@lru_cache(maxsize=1024)
def _money(amount: str | None, currency: str) -> str:
    """`1,280.00 EUR`; an absent amount is an empty text."""
    if amount is None:
        return ""
    try:
        return f"{Decimal(amount):,f} {currency}"
    except InvalidOperation:
        raise TemplateRuntimeError(f"{amount!r} is not an amount") from None


@lru_cache(maxsize=1024)
def _date(day: str | None) -> str:
    """`21 Dec 2026`; an absent date is an empty text."""
    if day is None:
        return ""
    try:
        return _day(date.fromisoformat(day))
    except ValueError:
        raise TemplateRuntimeError(f"{day!r} is not a date") from None


@pass_context
def _datetime(context: Context, moment: str | None) -> str:
    """`21 Nov 2026, 11:00 Berlin time (10:00 UTC)`, in the recipient's time zone."""
    return "" if moment is None else _moment(moment, str(context.resolve("timezone")))


@lru_cache(maxsize=1024)
def _moment(moment: str, timezone: str) -> str:
    try:
        there = instant(moment)
    except ValueError:
        raise TemplateRuntimeError(f"{moment!r} is not a time") from None
    utc = f"{_day(there)}, {there:%H:%M} UTC"
    if timezone in ("", "UTC", "Etc/UTC"):
        return utc
    try:
        here = there.astimezone(ZoneInfo(timezone))
    except (LookupError, ValueError, OSError):  # an unknown zone must not keep anybody from hearing about the event
        return utc
    city = timezone.rpartition("/")[2].replace("_", " ")
    plain_utc = f"{there:%H:%M} UTC" if here.date() == there.date() else utc
    return f"{_day(here)}, {here:%H:%M} {city} time ({plain_utc})"


def _day(day: date) -> str:
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


def _link(url: str) -> str:
    """The address itself where it leads to the web or a mailbox; a fault where it leads elsewhere."""
    if url.startswith(("https://", "http://", "mailto:")):
        return url
    raise TemplateRuntimeError(f"{url!r} is no link that a mail may hold (https, http or mailto)")


def role_title(title: str) -> str:
    """The role's name without the explanation that a catalogue may give in brackets."""
    return title.partition(" (")[0]
