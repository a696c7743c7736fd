"""What an event says, as people read it: a title, and its facts one by one. Signing links are masked in all of them.

Pure: takes the data as it was published, whatever the type, and knows no page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from worker.masking import WITHHELD, mask

Kind = Literal["text", "time", "link", "list"]


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that an event says. `items` has one entry, but for a list."""

    label: str
    kind: Kind
    items: tuple[str, ...]


_ELSEWHERE: Final = frozenset(
    {"account", "accounts", "title", "body", "attachments", "currency", "not_before", "expires_at"}
)
#: Fields that have a place of their own on a page.
_MONEY: Final = frozenset({"amount", "balance", "tax", "previous_amount", "opening_balance"})
_LABELS: Final[Mapping[str, str]] = {"url": "Page", "on": "Date", "join_url": "Join at", "signing_url": "Signing link"}
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d([Tt]\d\d:\d\d.*)?")


def title(type_name: str, data: Mapping[str, Any]) -> str:
    """What an event is about in one line, such as `Invoice issued: 7121, 1280.00 EUR`."""
    for name in ("title", "summary", "what"):
        if isinstance(data.get(name), str):
            return _hidden(data, data[name])
    money = _money(data, data.get("amount") or data.get("balance") or "")
    action = str(data.get("action", "")).replace("_", " ")
    said = (data.get("file_name"), action, data.get("number"), data.get("invoice"), data.get("period"), money)
    kind = type_name.replace(".", " ").replace("_", " ").capitalize()
    return _hidden(data, ": ".join(filter(None, (kind, ", ".join(str(one) for one in said if one)))))


def facts(data: Mapping[str, Any]) -> Iterator[Fact]:
    """What an event says besides its title, body and attachments, in the order in which it was published."""
    for name, value in data.items():
        if name in _ELSEWHERE or value is None or value == []:
            continue
        label = _LABELS.get(name) or name.replace("_", " ").capitalize()
        if name == "signing_url":
            yield Fact(label, "text", (WITHHELD,))
        elif isinstance(value, list):
            yield Fact(label, "list", tuple(_hidden(data, _flat(data, one)) for one in value))
        elif isinstance(value, Mapping):
            yield Fact(label, "list", tuple(_hidden(data, f"{key}: {_flat(data, one)}") for key, one in value.items()))
        else:
            text = _money(data, str(value)) if name in _MONEY else str(value)
            hidden = _hidden(data, text)
            is_link = hidden == text and text.startswith("https://") and not re.search(r"\s", text)
            yield Fact(label, "link" if is_link else "time" if _TIME.fullmatch(text) else "text", (hidden,))


def body(data: Mapping[str, Any]) -> str:
    """The Markdown of an event, empty where it has none."""
    return _hidden(data, data["body"]) if isinstance(data.get("body"), str) else ""


def attachments(data: Mapping[str, Any]) -> list[str]:
    """The names of the files that go with it, and whom one is for."""
    return [
        _hidden(data, one["name"]) + (f" (for {one['contact']} alone)" if one.get("contact") else "")
        for one in data.get("attachments") or ()
    ]


def _hidden(data: Mapping[str, Any], text: str) -> str:
    link = data.get("signing_url")
    return mask(text, link if isinstance(link, str) else None)


def _money(data: Mapping[str, Any], amount: str) -> str:
    return f"{amount} {data.get('currency') or ''}".strip() if amount else ""


def _flat(data: Mapping[str, Any], value: Any) -> str:
    """A value inside another one, in one line."""
    if not isinstance(value, Mapping):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if "description" in value:  # a line of an invoice or a quote
        quantity = f" ({value['quantity']})" if value.get("quantity") else ""
        return f"{value['description']}{quantity}: {_money(data, value['amount'])}"
    return "; ".join(f"{key}: {_flat(data, one)}" for key, one in value.items())
