"""The API of publishers (contract, section 7): events in, what became of them out.

An event is answered 202 only after its commit. Nothing here decides who gets what: `worker.intake` accepts,
`worker.history` reads; this module authenticates, limits, and speaks HTTP. A key sees the events that came with it,
and with the scope `read` all of them; what it may not see does not exist for it.
"""

from __future__ import annotations

import base64
import binascii
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection, select
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from subscriptions import directory
from subscriptions.audience import AccountFacts, Verdicts, answer, resolve
from worker import decisions, history, intake, keys
from worker import events as event_types
from worker.events import MAX_BATCH_BYTES, MAX_EVENT_BYTES_WITH_FILES, TYPES, Event, EventError, Received, from_http
from worker.fanout import EventRow, event_facts
from worker.intake import Accepted, Publisher, Refused
from worker.keys import ApiKey
from worker.schema import events
from worker.web.problems import Problem, of_events, of_refusal
from worker.web.security import read_body
from worker.web.site import Here, Site

router = APIRouter()

AT_ONCE: Final = 128
#: Requests of one key that may be in hand together; more are asked to come again (429).
PAGE: Final = 100
LARGEST_PAGE: Final = 1000

Cursor = Annotated[str | None, Query(alias="next", description="The `next` of the page before.", max_length=200)]
Limit = Annotated[int, Query(ge=1, le=LARGEST_PAGE)]


# ---------------------------------------------------------------- who calls


def _key(site: Site, request: Request) -> ApiKey:
    """The key of a request. Raises `Problem` 401."""
    scheme, _, presented = request.headers.get("authorization", "").partition(" ")
    challenge = {"WWW-Authenticate": 'Bearer realm="rolecast"'}
    if scheme.lower() != "bearer" or not presented.strip():
        raise Problem(401, "Send an API key: `Authorization: Bearer KEY`.", headers=challenge)
    now = site.app.clock()
    with site.app.database.read() as connection:
        key = keys.check(connection, presented.strip(), now)
    if key is None:
        raise Problem(401, "The API key is not valid; `rolecast keys list` shows which are.", headers=challenge)
    if key.unrecorded:
        with site.app.database.write() as connection:
            keys.record_use(connection, key, now=now)
    return key


class _InHand:
    """How many requests of each key are in hand."""

    def __init__(self) -> None:
        self._counts = Counter[int]()
        self._lock = threading.Lock()

    @contextmanager
    def one(self, key: ApiKey) -> Iterator[None]:
        """Count one request for as long as it lasts. Raises `Problem` 429 where there are too many."""
        with self._lock:
            if self._counts[key.number] >= AT_ONCE:
                detail = f"More than {AT_ONCE} requests of this key are in hand; send the next ones after them."
                raise Problem(429, detail, headers={"Retry-After": "1"})
            self._counts[key.number] += 1
        try:
            yield
        finally:
            with self._lock:
                self._counts[key.number] -= 1
                if not self._counts[key.number]:
                    del self._counts[key.number]


_in_hand = _InHand()


# ---------------------------------------------------------------- publishing

_EVENT_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["specversion", "id", "source", "type", "data"],
    "properties": {
        "specversion": {"const": "1.0"},
        "id": {"type": "string", "maxLength": 256},
        "source": {"type": "string", "format": "uri-reference", "maxLength": 1024},
        "type": {"type": "string", "enum": list(TYPES)},
        "time": {"type": "string", "format": "date-time"},
        "subject": {"type": "string"},
        "data": {"type": "object", "description": "See /v1/types/{type}/schema."},
    },
}
_PUBLISH_DOCS: Final[dict[str, Any]] = {
    "security": [{"key": []}],
    "requestBody": {
        "required": True,
        "content": {
            "application/cloudevents+json": {"schema": _EVENT_SCHEMA},
            "application/cloudevents-batch+json": {"schema": {"type": "array", "items": _EVENT_SCHEMA}},
            "application/json": {"schema": {"type": "object", "description": "The data, with ce- headers."}},
        },
    },
}
_KEY_DOCS: Final[dict[str, Any]] = {"security": [{"key": []}]}


@router.post("/v1/events", status_code=202, openapi_extra=_PUBLISH_DOCS, summary="Publish events")
async def publish(
    request: Request, site: Here, *, dry_run: bool = False, cursor: Cursor = None, limit: Limit = PAGE
) -> Response:
    """Accept one event or a batch, all or none; with `dry_run` answer who would get what, and store nothing."""
    key = await run_in_threadpool(_key, site, request)
    _known_parameters(request, ("dry_run", "next", "limit"))
    with _in_hand.one(key):
        batch = request.headers.get("content-type", "").lower().startswith("application/cloudevents-batch+json")
        body = await read_body(request, MAX_BATCH_BYTES if batch else MAX_EVENT_BYTES_WITH_FILES)
        if dry_run:
            received = await run_in_threadpool(_read, request, body, key)
            return await run_in_threadpool(_dry_run, site, received, key.publisher, cursor, limit)
        return await run_in_threadpool(_accept, site, request, body, key)


def _known_parameters(request: Request, known: Sequence[str]) -> None:
    """A misspelt `dry_run` must not send mail. Raises `Problem` 422 for a parameter that is unknown or there twice."""
    given = [name for name, _ in request.query_params.multi_items()]
    for name in given:
        if name not in known:
            raise Problem(422, f"There is no parameter {name[:40]!r} here: there are {', '.join(known)}.")
        if given.count(name) > 1:
            raise Problem(422, f"The parameter {name!r} stands twice: give it once.")


def _read(request: Request, body: bytes, key: ApiKey) -> Received:
    """The checked events of a request, which the key may publish. Raises `Problem`."""
    try:
        received = from_http(request.headers, body)
    except EventError as error:
        raise of_events(error) from None
    refused = [
        (f"/{index}/type" if received.batch else "/type", f"The key may not publish {event.type.name}.")
        for index, event in enumerate(received.events)
        if not key.may_publish(event.type.name)
    ]
    if refused:
        raise Problem(403, f"The scopes of the key {key.name!r} do not allow this.", errors=refused)
    return received


def _accept(site: Site, request: Request, body: bytes, key: ApiKey) -> Response:
    received = _read(request, body, key)
    try:
        answers = site.app.intake.accept(received.events, key.publisher)
    except Refused as error:
        raise of_refusal(error, batch=received.batch) from None
    told = [_told(one) for one in answers]
    return JSONResponse(told if received.batch else told[0], 202)


def _told(accepted: Accepted) -> dict[str, Any]:
    return {
        "event": accepted.event,
        "id": accepted.id,
        "source": accepted.source,
        "duplicate": accepted.duplicate,
        "route": accepted.route,
        "outcome": accepted.outcome,
        "status_page": accepted.status_page,
        "notes": list(accepted.notes),
        "links": {"self": f"/v1/events/{accepted.event}"},
    }


# ---------------------------------------------------------------- dry run


_Answers = list[tuple[AccountFacts, Verdicts]]


def _dry_run(site: Site, received: Received, publisher: Publisher, cursor: str | None, limit: int) -> Response:
    """One page of answers over all events of the request; the cursor names an event and how far it was answered."""
    index, after = _read_cursor(cursor, 2)
    few = _resolve_few(site, received, publisher, first=index)
    answers: list[dict[str, object]] = []
    while index < len(received.events) and len(answers) < limit:
        event, room = received.events[index], limit - len(answers)
        if index in few:
            page, after = few[index][after : after + room], after + room
            after = after if after < len(few[index]) else 0
        else:
            page, after = _resolve_page(site, event, publisher, after=after, limit=room)
        status_page = _status_page(site, event)
        answers += [
            answer(verdicts, source=event.source, event=event.id, account=account.id, status_page=status_page)
            for account, verdicts in page
        ]
        index += after == 0
    following = _cursor(index, after) if index < len(received.events) else None
    return JSONResponse({"answers": answers, "next": following})


def _resolve_few(site: Site, received: Received, publisher: Publisher, *, first: int) -> dict[int, _Answers]:
    """The verdicts of every event that names its accounts, by its index. Raises `Problem` with the faults of all."""
    found: dict[int, _Answers] = {}
    faults = []
    for index, event in enumerate(received.events):
        if index < first or event.accounts == "all":
            continue
        try:
            found[index] = [(one, verdicts) for _, one, verdicts in site.app.intake.dry_run([event], publisher)]
        except Refused as error:
            faults += [intake.Refusal(index, fault.kind, fault.pointer, fault.message) for fault in error.faults]
    if faults:
        raise of_refusal(Refused(faults), batch=received.batch)
    return found


def _resolve_page(site: Site, event: Event, publisher: Publisher, *, after: int, limit: int) -> tuple[_Answers, int]:
    """Verdicts of an event for all accounts from one on, and the account that they end with; 0 for the last page."""
    catalogues = site.app.catalogues
    facts = event_facts(event.type.category, event.data, event.products, attested=publisher.attests)
    with site.app.database.read() as connection:
        accounts = directory.facts(connection, catalogues, after=after, limit=limit + 1)
    page = [(one, resolve(catalogues[one.catalogue], one, facts)) for one in accounts[:limit]]
    return page, page[-1][0].number if len(accounts) > limit else 0


def _status_page(site: Site, event: Event) -> dict[str, Any] | None:
    vocabulary = next(iter(site.app.catalogues.values())).vocabulary
    if vocabulary.categories[event.type.category].class_ != "status":
        return None
    with site.app.database.read() as connection:
        return site.app.feed.pointer(connection, event)


def _cursor(*numbers: int) -> str:
    return base64.urlsafe_b64encode(".".join(map(str, numbers)).encode()).decode().rstrip("=")


def _read_cursor(cursor: str | None, count: int) -> list[int]:
    """The numbers of a cursor, zeros for none. Raises `Problem` 400."""
    if cursor is None:
        return [0] * count
    try:
        numbers = [int(one) for one in base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).split(b".")]
    except (binascii.Error, ValueError):
        numbers = []
    if len(numbers) != count or not all(0 <= number < 2**62 for number in numbers):
        raise Problem(400, "`next` is not one that this server gave: take it from the page before.")
    return numbers


# ---------------------------------------------------------------- what became of events


@contextmanager
def _event(site: Site, request: Request, reference: str) -> Iterator[tuple[Connection, EventRow, ApiKey]]:
    """A reading connection and the event that the request asks for. Raises `Problem` 401 or 404."""
    key = _key(site, request)
    with site.app.database.read() as connection:
        row = history.find_event(connection, reference)
        own = select(events.c.key_id).where(events.c.id == (row.id if row else 0))
        if row is None or not (key.may_read or connection.execute(own).scalar() == key.number):
            raise Problem(404, f"There is no event {reference[:40]!r} that this key may see.")
        yield connection, row, key


@router.get("/v1/events/{event}", openapi_extra=_KEY_DOCS, summary="State and totals of an event")
def event_state(event: str, request: Request, site: Here) -> dict[str, Any]:
    """Where an event stands, and how many of its deliveries have which status."""
    with _event(site, request, event) as (connection, row, _):
        return _state(connection, row)


def _state(connection: Connection, row: EventRow) -> dict[str, Any]:
    own = f"/v1/events/{row.ulid}"
    links = {"self": own, "deliveries": f"{own}/deliveries", "verdicts": f"{own}/verdicts"}
    return {**history.event_state(connection, row), "links": links}


@router.get("/v1/events/{event}/deliveries", openapi_extra=_KEY_DOCS, summary="The deliveries of an event")
def event_deliveries(
    event: str, request: Request, site: Here, *, status: str | None = None, cursor: Cursor = None, limit: Limit = PAGE
) -> dict[str, Any]:
    """One page of an event's deliveries, each with its grounds and what became of it."""
    (after,) = _read_cursor(cursor, 1)
    with _event(site, request, event) as (connection, row, _):
        try:
            found = history.list_deliveries(connection, row, after=after, limit=limit + 1, status=status)
        except ValueError as error:
            raise Problem(422, str(error)) from None
    page = found[:limit]
    return {"deliveries": page, "next": _cursor(page[-1]["n"]) if len(found) > limit else None}


@router.get("/v1/events/{event}/verdicts", openapi_extra=_KEY_DOCS, summary="The verdicts of an event")
def event_verdicts(
    event: str, request: Request, site: Here, *, cursor: Cursor = None, limit: Limit = PAGE
) -> dict[str, Any]:
    """One page of the stored answers, one an account: who got it, who did not, and why."""
    (after,) = _read_cursor(cursor, 1)
    with _event(site, request, event) as (connection, row, _):
        answers, following = history.list_verdicts(connection, row, after=after, limit=limit)
    return {"answers": answers, "next": None if following is None else _cursor(following)}


@router.post("/v1/events/{event}/cancel", openapi_extra=_KEY_DOCS, summary="Cancel an event")
def event_cancel(event: str, request: Request, site: Here) -> dict[str, Any]:
    """Withdraw what is not yet sent of an event; doing it again changes nothing."""
    with _event(site, request, event) as (_, row, key):
        if not key.may_publish(row.type):
            raise Problem(403, f"The key {key.name!r} may not publish {row.type}, so it may not cancel it either.")
    with site.app.database.write() as connection:
        withdrawn = decisions.cancel(connection, row.id, by=f"api:{key.name}", now=site.app.clock())
        return {**_state(connection, row), "withdrawn": withdrawn}


# ---------------------------------------------------------------- event types


@router.get("/v1/types", summary="The event types")
def list_types() -> dict[str, Any]:
    """Every event type with its category; no key is needed."""
    return {
        "types": [
            {
                "type": one.name,
                "category": one.category,
                "broadcast": one.broadcast,
                "summary": one.summary,
                "links": {"schema": f"/v1/types/{one.name}/schema"},
            }
            for one in TYPES.values()
        ]
    }


@router.get("/v1/types/{name}/schema", summary="The JSON Schema of a type's data")
def type_schema(name: str) -> Response:
    """The JSON Schema (2020-12) of a type's data; no key is needed."""
    if name not in TYPES:
        raise Problem(404, f"There is no event type {name[:80]!r}: /v1/types lists them.")
    return JSONResponse(event_types.json_schema(name), media_type="application/schema+json")
