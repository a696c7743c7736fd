"""What is wrong with an event, in words: faults with their place, and the sentences for what the models refuse.

Promises: a fault's message is one sentence that names field, value and remedy; values are shown short and printable,
and never those that only a signer or a file's owner may see.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import BaseModel, ValidationError

from subscriptions.permissions import CHANGES
from subscriptions.strictjson import pointer as json_pointer
from worker.event_fields import Rule

MAX_FAULTS: Final = 100  # more are not told: the first ones are corrected first anyway

FaultKind = Literal["unsupported", "too_large", "malformed", "invalid"]  # HTTP 415, 413, 400, 422, in this order
_KINDS: Final[tuple[FaultKind, ...]] = ("unsupported", "too_large", "malformed", "invalid")

_NEVER_SHOWN: Final = frozenset({"signing_url", "content_base64"})

# What pydantic's own checks expect, where no rule of event_fields speaks.
_EXPECTED: Final = {
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "too_long": "a list of at most {max_length} entries",
    "literal_error": "{expected}",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: its JSON pointer (RFC 6901), in a file of JSON Lines also its line, and a sentence."""

    pointer: str
    message: str
    kind: FaultKind
    line: int | None = None

    def __str__(self) -> str:
        places = [f"line {self.line}"] if self.line is not None else []
        places += [self.pointer] if self.pointer else []
        return f"{', '.join(places)}: {self.message}" if places else self.message


class EventError(Exception):
    """The events cannot be taken: `faults` says why, as completely as it can be known."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults[:MAX_FAULTS]
        others = len(self.faults) - 1
        super().__init__(str(self.faults[0]) + (f" (and {others} more)" if others else ""))

    @property
    def kind(self) -> FaultKind:
        """The gravest kind among the faults, which decides the status of the answer."""
        return min((fault.kind for fault in self.faults), key=_KINDS.index)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one most likely means."""
    matches = difflib.get_close_matches(name[:64], list(known), n=1)
    return matches[0] if matches else None


def shown(value: object) -> str:
    """A JSON value as it may stand in a message."""
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, str) and len(value) > 80:
        value = value[:77] + "..."
    text = json.dumps(value, ensure_ascii=False, default=str)[:120]
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def data_faults(type_name: str, model: type[BaseModel], data: dict[str, Any], pointer: str) -> list[Fault]:
    """What the type's model refuses in the data that stands at `pointer`; nothing where it fits."""
    try:
        model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[:MAX_FAULTS]
        return [_fault(type_name, model, data, detail, pointer) for detail in details]
    return []


def _fault(
    type_name: str, model: type[BaseModel], data: dict[str, Any], detail: Mapping[str, Any], pointer: str
) -> Fault:
    location, absent = detail["loc"], detail["type"] == "missing"
    if detail["type"] == "between_fields" and detail["ctx"]["field"]:
        location, absent = (*location, detail["ctx"]["field"]), True  # the field that it is told at need not be there
    path, found = _walk(data, location, keep_last=absent)
    match detail["type"]:
        case "between_fields":
            message = str(detail["ctx"]["remedy"])
        case "missing":
            message = _missing(type_name, model, path)
        case "extra_forbidden":
            message = _unknown_field(type_name, model, path)
        case _:
            message = _wrong_value(detail, path, found)
    return Fault(pointer + json_pointer(path), message, "invalid")


def _walk(data: Any, location: Sequence[str | int], *, keep_last: bool) -> tuple[list[str | int], object]:
    """The part of pydantic's location that leads through the data (it also names union members), and what is there."""
    path: list[str | int] = []
    for position, step in enumerate(location):
        if isinstance(data, dict):
            there = step in data
        else:
            there = isinstance(data, list) and isinstance(step, int) and step < len(data)
        if there or (keep_last and position == len(location) - 1):
            data = data[step] if there else None
            path.append(step)
    return path, data


def _missing(type_name: str, model: type[BaseModel], path: Sequence[str | int]) -> str:
    name = path[-1]
    if len(path) > 1:
        return f'"{name}" is missing in "{"/".join(map(str, path[:-1]))}"; add it.'
    rules = (rule for rule in model.model_fields[str(name)].metadata if isinstance(rule, Rule))
    return f'"{name}" is missing; {type_name} needs it: {next(rules).what}.'


def _unknown_field(type_name: str, model: type[BaseModel], path: Sequence[str | int]) -> str:
    name = str(path[-1])
    if len(path) > 1:
        return f'{shown(name)} is not a field of "{"/".join(map(str, path[:-1]))}"; remove it.'
    if name == "accounts":
        return f'"accounts" is for broadcasts, and {type_name} goes to one account; name it in "account".'
    near = nearest(name, model.model_fields)
    remedy = f'did you mean "{near}"?' if near else f'"rolecast types show {type_name}" lists its fields.'
    return f"{shown(name)} is not a field of {type_name}; {remedy}"


def _wrong_value(detail: Mapping[str, Any], path: Sequence[str | int], found: object) -> str:
    name, context = str(path[-1]), detail.get("ctx", {})
    if isinstance(path[-1], int):
        name = "/".join(map(str, path))
    if detail["type"] == "rule":
        expected = context["what"]
    elif detail["type"].startswith("union_tag"):  # the one union that is told apart by a tag
        name, found = "change", found.get("change") if isinstance(found, dict) else found
        expected = f"one of {', '.join(sorted(CHANGES))}"
    else:
        expected = _EXPECTED[detail["type"]].format(**context)
    value = "a value that is not shown" if name in _NEVER_SHOWN else shown(found)
    return f'"{name}" is {value}, but must be {expected}.'
