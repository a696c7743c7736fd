"""JSON read strictly: what two readers could understand differently is refused, with its place.

Refused beside broken JSON (RFC 8259): duplicate keys, NaN and infinities (also as numbers too large for a float),
whole numbers that a float cannot hold exactly (RFC 7493, section 2.2), lone surrogates, U+0000, text that is not
UTF-8, and nesting beyond 32 levels. A byte order mark in front is skipped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Final

MAX_DEPTH: Final = 32
_EXACT: Final = 2**53 - 1  # the largest whole number up to which a float holds every one
_SUSPECT: Final = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")  # escapes that may write U+0000 or half a character

_Trail = tuple["_Trail | None", "str | int"]  # the way from the root: (parent's trail, key or index)


class StrictJSONError(ValueError):
    """The bytes are not strict JSON: one sentence, with the place as far as it is known.

    `position` counts bytes from 0, `line` and `column` from 1; `pointer` is a JSON pointer (RFC 6901).
    """

    def __init__(
        self,
        message: str,
        *,
        pointer: str | None = None,
        position: int | None = None,
        line: int | None = None,
        column: int | None = None,
    ) -> None:
        super().__init__(message)
        self.pointer = pointer
        self.position = position
        self.line = line
        self.column = column


class _Mark:
    """Stands in the parsed value where something is refused, until the walk has found its pointer."""

    __slots__ = ("key", "message")

    def __init__(self, message: str, key: str | None = None) -> None:
        self.message = message
        self.key = key


def loads(data: bytes, *, first_line: int = 1) -> object:
    """The value that the bytes write. Raises StrictJSONError at the first fault found.

    `first_line` is the number that the first line has in faults.
    """
    return Reader().loads(data, first_line=first_line)


class Reader:
    """Reads many short texts, such as lines, without the cost of a new decoder for each; one thread at a time."""

    def __init__(self) -> None:
        self._marks: list[_Mark] = []
        self._decoder = _decoder(self._marks)

    def loads(self, data: bytes, *, first_line: int = 1) -> object:
        """As the function `loads`."""
        text = _decode(data, first_line)
        self._marks.clear()
        try:
            value: object = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            raise _syntax_error(text, error, first_line) from None
        except RecursionError:
            raise StrictJSONError(f"The JSON is nested deeper than {MAX_DEPTH} levels.") from None
        if self._marks or data.count(b"{") + data.count(b"[") > MAX_DEPTH or _SUSPECT.search(data):
            _refuse_first_fault(value)
        return value


def pointer(keys: Sequence[str | int]) -> str:
    """The JSON pointer (RFC 6901) of the value that these keys and indexes lead to from the root."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def _decode(data: bytes, first_line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line = before.count(b"\n") + first_line
        raise StrictJSONError(
            f"Line {line} is not UTF-8 text (byte {error.start}); JSON is written in UTF-8.",
            position=error.start,
            line=line,
        ) from None


def _syntax_error(text: str, error: json.JSONDecodeError, first_line: int) -> StrictJSONError:
    line = error.lineno + first_line - 1
    if not text.strip():
        return StrictJSONError("There is no JSON: the input is empty.", position=0, line=first_line, column=1)
    reason = error.msg[:1].lower() + error.msg[1:]
    reason = reason.removesuffix(" starting at").removesuffix(" at")  # the place follows in our own words
    return StrictJSONError(
        f"The JSON is broken at line {line}, column {error.colno}: {reason}.",
        position=len(text[: error.pos].encode()),
        line=line,
        column=error.colno,
    )


def _decoder(marks: list[_Mark]) -> json.JSONDecoder:
    """The standard decoder, leaving a mark wherever it reads something that is refused."""

    def mark(message: str, key: str | None = None) -> _Mark:
        marks.append(_Mark(message, key))
        return marks[-1]

    def whole_number(digits: str) -> int | _Mark:
        if len(digits) < 16:
            return int(digits)
        number = int(digits) if len(digits) < 20 else _EXACT + 1
        if abs(number) > _EXACT:
            return mark("is a whole number too large to be exact everywhere; write it as a text")
        return number

    def fraction(digits: str) -> float | _Mark:
        number = float(digits)
        return number if math.isfinite(number) else mark("is too large a number")

    def constant(name: str) -> _Mark:
        return mark(f"is {name}, which JSON does not have")

    def members(pairs: list[tuple[str, object]]) -> dict[str, object] | _Mark:
        table = dict(pairs)
        if len(table) == len(pairs):
            return table
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                return mark("is a duplicate key; keep one of the two", key)
            seen.add(key)
        raise AssertionError("a shorter table has a repeated key")

    return json.JSONDecoder(
        object_pairs_hook=members, parse_int=whole_number, parse_float=fraction, parse_constant=constant
    )


def _refuse_first_fault(root: object) -> None:
    """Walks the value in the order of the document and raises for the first mark, deep level or bad text."""
    stack: list[tuple[object, _Trail | None, int]] = [(root, None, 0)]
    while stack:
        value, trail, depth = stack.pop()
        if isinstance(value, _Mark):
            raise _refusal(value.message, trail if value.key is None else (trail, value.key))
        if isinstance(value, str):
            _refuse_bad_text(value, trail)
        elif isinstance(value, dict | list):
            depth += 1
            if depth > MAX_DEPTH:
                raise _refusal(f"is nested deeper than {MAX_DEPTH} levels", trail)
            if isinstance(value, dict):
                for key in value:
                    _refuse_bad_text(key, (trail, key))
                stack.extend((child, (trail, key), depth) for key, child in reversed(value.items()))
            else:
                stack.extend((value[index], (trail, index), depth) for index in range(len(value) - 1, -1, -1))


def _refuse_bad_text(text: str, trail: _Trail | None) -> None:
    if "\0" in text:
        raise _refusal("contains U+0000, which no text may hold", trail)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _refusal("contains half a character (a lone surrogate)", trail) from None


def _refusal(message: str, trail: _Trail | None) -> StrictJSONError:
    keys: list[str | int] = []
    while trail is not None:
        trail, key = trail
        keys.append(key)
    place = _printable(pointer(keys[::-1]))
    return StrictJSONError(f"{place or 'The whole JSON value'} {message}.", pointer=place)


def _printable(text: str) -> str:
    """The text with what cannot be encoded or printed as escapes, so that it may stand in any message."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )
