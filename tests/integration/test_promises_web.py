"""What publishers are promised, through the front door (reliability.md R21, R22, R24).

The web application is called as a server calls it, without sockets. `PAYLOADS=10000` (the figure of R21; 2,000 unless
told otherwise) says how many malformed payloads are sent.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import func, select

from subscriptions.database import Database
from tests import invariants
from tests.house import ACME, GLOBEX, app_on, envelope, house, import_accounts
from tests.web_site import BASE, LISTEN
from worker import keys
from worker.app import App
from worker.events import TYPES
from worker.schema import api_keys, deliveries, event_accounts, events, slices, tallies, verdicts
from worker.web.server import build

PAYLOADS = int(os.environ.get("PAYLOADS", "2000"))
GROWTH_MB = 50
STRUCTURED, BATCH, DATA = "application/cloudevents+json", "application/cloudevents-batch+json", "application/json"

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, and the body read as JSON."""


class Caller:
    """A publisher with a key that may publish everything."""

    def __init__(self, app: App) -> None:
        self.web: FastAPI = build(app, engine=None, inbox=None, listen=LISTEN)
        with app.database.write() as connection:
            _, self.key = keys.create(
                connection, name="publisher", mode="live", scopes=("publish:*",), types=TYPES, now=app.clock()
            )

    async def post(self, body: bytes, content_type: str = STRUCTURED, headers: Mapping[str, bytes] = {}) -> Answer:
        """One request to /v1/events. An exception that leaves the application fails the test."""
        sent = {
            b"host": BASE.removeprefix("http://").encode(),
            b"authorization": f"Bearer {self.key}".encode(),
            b"content-type": content_type.encode("latin-1"),
            **{name.encode("latin-1"): value for name, value in headers.items()},
        }
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/events", "raw_path": b"/v1/events", "query_string": b"", "root_path": "",
            "headers": list(sent.items()), "client": ("127.0.0.1", 50000), "server": LISTEN, "state": {},
        }  # fmt: skip
        pieces = [body[start : start + 65536] for start in range(0, len(body), 65536)] or [b""]
        said: list[Any] = []

        async def receive() -> Any:
            piece = pieces.pop(0) if pieces else b""
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        async def send(message: Any) -> None:
            said.append(message)

        await self.web(scope, receive, send)
        told = {name.decode(): value.decode() for name, value in said[0]["headers"]}
        whole = b"".join(one.get("body", b"") for one in said[1:])
        return said[0]["status"], told, json.loads(whole) if whole else None


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    with house(tmp_path, ACME, GLOBEX) as opened:
        yield opened


def size(app: App) -> dict[str, int]:
    """How many rows stand in each table that an accepted event touches."""
    tables = (events, event_accounts, deliveries, verdicts, slices, tallies, api_keys)
    with app.database.read() as connection:
        return {one.name: connection.execute(select(func.count()).select_from(one)).scalar_one() for one in tables}


# ---------------------------------------------------------------- R21: malformed payloads


HOSTILE: tuple[Any, ...] = (
    None, True, 0, -1, 2**53, 10**400, 1.5, 1e308, "", " ", "\u0000", "\u202e", "a" * 5_000, "é" * 999, [], {}, [[]],
    [None] * 50, {"": ""}, {"a": {"b": {"c": []}}}, "all", ["all"], ["acme"] * 3, "2026-02-30T25:61:61Z", "../../etc",
    "=?utf-8?q?A=0D=0ABcc=3A_evil=40x=2Ey?=", "{{ 7 * 7 }}", "javascript:alert(1)", "http://[", "9" * 400, "NaN",
)  # fmt: skip
DEEP: tuple[bytes, ...] = tuple(
    opening * depth + middle + closing * depth
    for depth in (33, 1_000, 100_000)
    for opening, middle, closing in ((b"[", b"1", b"]"), (b'{"data":', b"1", b"}"), (b"[", b"", b""))
)
HUGE: tuple[bytes, ...] = (
    b'{"data": "' + b"x" * 300_000 + b'"}',
    b"[" + b"1," * 200_000 + b"1]",
    b'{"data":' + b"9" * 200_000 + b"}",
    b"x" * 6_000_000,
    b'{"id":"' + b"\xc3\xa9" * 500_000 + b'"}',
)
TYPES_OF_CONTENT = (STRUCTURED, BATCH, DATA, "text/plain", "", "application/cloudevents+json; charset=utf-16", "\xff")


def payloads(dice: random.Random) -> Iterator[tuple[bytes, str, dict[str, bytes]]]:
    """Endless requests, most of them malformed: body, content type, further headers."""
    number = 0
    while True:
        number += 1
        event = envelope(dice.choice(list(TYPES)), id=f"fuzz-{number}")
        way = dice.randrange(100)
        if way < 35:  # a value somewhere is another one
            for _ in range(dice.randint(1, 3)):
                _spoil(event, dice)
            yield _written(event), STRUCTURED, {}
        elif way < 60:  # bytes were changed, cut or doubled
            yield _torn(_written(event), dice), dice.choice(TYPES_OF_CONTENT), {}
        elif way < 75:  # a batch with a fault in it
            several: list[Any] = [envelope("file.failed", id=f"fuzz-{number}-{n}") for n in range(dice.randint(0, 4))]
            several.insert(dice.randint(0, len(several)), dice.choice(HOSTILE))
            yield (_written(several) if dice.random() < 0.8 else _torn(_written(several), dice)), BATCH, {}
        elif way < 93:  # binary mode
            yield _binary(event, dice)
        elif way < 97:
            yield dice.choice(DEEP), dice.choice((STRUCTURED, BATCH)), {}
        elif way < 98:
            yield dice.choice(HUGE), dice.choice((STRUCTURED, BATCH)), {}
        else:  # anything
            yield dice.randbytes(dice.randrange(2_000)), dice.choice(TYPES_OF_CONTENT), {}


def _written(value: Any) -> bytes:
    return json.dumps(value).encode()


def _spoil(event: dict[str, Any], dice: random.Random) -> None:
    place: Any = event
    while True:
        inner = [name for name, value in place.items() if isinstance(value, dict) and value]
        if not inner or dice.random() < 0.3:
            break
        place = place[dice.choice(inner)]
    name = dice.choice([*place, "unknown", "data_base64", "CE-ID", ""])
    if dice.random() < 0.25:
        place.pop(name, None)
    else:
        place[name] = deepcopy(dice.choice(HOSTILE))


def _torn(written: bytes, dice: random.Random) -> bytes:
    torn = bytearray(written)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(torn) + 1)
        match dice.randrange(5):
            case 0:
                del torn[at:]
            case 1:
                torn[at:at] = dice.randbytes(dice.randint(1, 8))
            case 2:
                torn[at : at + 1] = bytes([dice.randrange(256)])
            case 3:
                torn[at:at] = torn[: dice.randrange(200)]
            case _:
                torn[at:at] = dice.choice((b"\\ud800", b"\\u0000", b"\x00", b"\xff\xfe", b"NaN", b"1e999", b",", b"}"))
    return bytes(torn)


def _binary(event: dict[str, Any], dice: random.Random) -> tuple[bytes, str, dict[str, bytes]]:
    headers = {
        f"ce-{name}": value.encode()
        for name, value in event.items()
        if name not in {"data", "datacontenttype"} and isinstance(value, str)
    }
    for _ in range(dice.randint(1, 2)):
        name = dice.choice([*headers, "ce-data", "ce-", "ce-unknown", "ce-specversion"])
        if dice.random() < 0.3:
            headers.pop(name, None)
        else:
            headers[name] = dice.choice((b"", b"%", b"%ZZ", b"%C3%28", b"%00", b"\xff\xfe", b"x" * 5_000, b"%ED%A0%80"))
    body = _written(event["data"])
    return body if dice.random() < 0.7 else _torn(body, dice), DATA, headers


def resident_mb() -> float:
    gc.collect()
    return float(importlib.import_module("psutil").Process().memory_info().rss) / 2**20


def test_malformed_payloads_break_nothing_and_leave_nothing(app: App) -> None:
    """R21: no 5xx, no partial row, memory that does not grow."""
    caller = Caller(app)
    requests = payloads(random.Random(21))
    answered = Counter[int]()
    fresh = 0

    async def some(count: int) -> None:
        nonlocal fresh
        for _ in range(count):
            body, content_type, headers = next(requests)
            status, told, answer = await caller.post(body, content_type, headers)
            answered[status] += 1
            assert status < 500, (status, body[:300], headers)
            if status == 202:
                fresh += sum(not one["duplicate"] for one in (answer if isinstance(answer, list) else [answer]))
            else:
                assert told["content-type"] == "application/problem+json", (status, body[:300])

    async def all_of_them() -> float:
        await some(PAYLOADS // 4)
        before = resident_mb()
        await some(PAYLOADS - PAYLOADS // 4)
        return resident_mb() - before

    growth = asyncio.run(all_of_them())
    assert growth <= GROWTH_MB
    assert size(app)["events"] == fresh, "what was refused left no row"
    invariants.check(app.database)
    assert answered[202] < PAYLOADS // 5, answered
    assert {400, 413, 415, 422} <= set(answered), answered
    status, _, answer = asyncio.run(caller.post(_written(envelope("invoice.issued", id="good"))))
    assert (status, answer["outcome"]) == (202, "deliver")


# ---------------------------------------------------------------- R22: the same event many times at once


@pytest.fixture
def either(database: Database, tmp_path: Path) -> App:
    """An installation on each kind of database."""
    opened = app_on(database, tmp_path)
    import_accounts(opened, [ACME, GLOBEX])
    return opened


def test_an_event_published_a_thousand_times_at_once_is_one_event(either: App) -> None:
    """R22: one event, one fan-out, the same answer apart from `duplicate`; other content is a conflict."""
    caller = Caller(either)
    body = _written(envelope("invoice.issued", id="once"))
    other = _written(envelope("invoice.issued", id="once", number="another"))

    async def crowd() -> list[Answer]:
        room = asyncio.Semaphore(100)  # a key may have 128 requests in hand

        async def one(number: int) -> Answer:
            async with room:
                return await caller.post(other if number % 10 == 9 else body)

        return await asyncio.gather(*(one(number) for number in range(1_000)))

    answers = asyncio.run(crowd())
    good = [answer for status, _, answer in answers if status == 202]
    refused = [answer for status, _, answer in answers if status == 409]
    assert len(good) + len(refused) == 1_000
    assert sorted((len(good), len(refused))) == [100, 900], "whichever came first is the fact"
    assert sum(not one["duplicate"] for one in good) == 1
    assert len({json.dumps(one | {"duplicate": None}, sort_keys=True) for one in good}) == 1
    assert {error["pointer"] for one in refused for error in one["errors"]} == {"/id"}
    assert size(either) | {"tallies": 0, "api_keys": 0} == {
        "events": 1, "event_accounts": 0, "deliveries": 1, "verdicts": 1, "slices": 1, "tallies": 0, "api_keys": 0,
    }  # fmt: skip
    invariants.check(either.database)


# ---------------------------------------------------------------- R24: a batch with faults


def test_a_batch_of_a_hundred_with_three_faults_is_refused_whole(either: App) -> None:
    """R24: all or nothing, a pointer for each fault; corrected, it is accepted whole, and again it is a duplicate."""
    caller = Caller(either)
    batch = [envelope("file.failed", id=f"b{number}") for number in range(100)]
    good = _written(batch)
    before = size(either)
    batch[7] = envelope("file.failed", id="b7", account="nobody-knows")
    del batch[50]["data"]["file_name"]
    batch[99] |= {"type": "file.exploded"}
    status, _, answer = asyncio.run(caller.post(_written(batch), BATCH))
    assert status == 422
    assert {error["pointer"].split("/")[1] for error in answer["errors"]} <= {"7", "50", "99"}
    assert size(either) == before, "nothing of it is stored"

    seen: set[str] = set()
    while status == 422:  # a publisher corrects what it is told, until nothing is left
        for error in answer["errors"]:
            index = error["pointer"].split("/")[1]
            batch[int(index)] = envelope("file.failed", id=f"b{index}")
            seen.add(index)
        assert size(either) == before
        status, _, answer = asyncio.run(caller.post(_written(batch), BATCH))
    assert (status, seen) == (202, {"7", "50", "99"})
    assert _written(batch) == good
    assert [one["id"] for one in answer] == [f"b{number}" for number in range(100)]
    assert size(either)["events"] == before["events"] + 100
    status, _, again = asyncio.run(caller.post(good, BATCH))
    assert (status, {one["duplicate"] for one in again}) == (202, {True})
    invariants.check(either.database)
