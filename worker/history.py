"""What became of events: the read side of the ledger, for people, the command line and HTTP.

Every answer is JSON-ready and carries the names that people use: ULIDs, account and contact ids, addresses; row
numbers stay inside. Reading changes nothing. Verdicts are shown as they were when the event was resolved, whatever the
directory says now; counts come from tallies, never from counting deliveries.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Text, and_, cast, func, select
from sqlalchemy.dialects.postgresql import JSONB

from subscriptions import directory
from subscriptions.addresses import BadAddress, normalise
from subscriptions.database import Database
from subscriptions.directory import ContactRow, among
from subscriptions.schema import accounts, catalogue_versions, contacts, mailboxes
from worker import facts, matters
from worker.fanout import EventRow, event_row, unpack
from worker.ledger import CANCELLED, NEVER, Status
from worker.mails import Shape, message_id, shape_of
from worker.rendering import SIGNED
from worker.schema import deliveries, event_accounts, events, flights, more_grounds, slices, tallies, verdict_shapes
from worker.schema import verdicts as verdict_rows

STATUSES = (*(status.name.lower() for status in Status), "sending")
#: Every status that a delivery can be listed by (design, "Words").
REASONS = tuple(
    sorted(
        matters.HELD
        | matters.FAILED
        | matters.COUNTED
        | {"test", "team"}  # held as somebody wanted it
        | {"paused", "no_sender", "no_https", "domain_waits", "domain_rate", "connection_lost", "refused_for_now"}
        | {CANCELLED, "opted_out", "address_suppressed", "contact_removed", "expired"}
    )
)
#: Every reason that a delivery can be listed by: of held, failed, waiting, withdrawn and expired mail.


def find_event(connection: Connection, reference: str, ce_id: str | None = None) -> EventRow | None:
    """The event with that ULID, or with that source (`reference`) and id; None where there is none."""
    wanted = events.c.ulid == reference.upper()
    if ce_id is not None:
        wanted = and_(events.c.source == reference, events.c.ce_id == ce_id)
    row = connection.execute(select(events).where(wanted)).one_or_none()
    return event_row(row) if row is not None else None


def list_events(connection: Connection, *, limit: int = 50, before: str | None = None) -> list[dict[str, Any]]:
    """Events, the newest first, with what each is about; `before` is the ULID of the last one of the page before."""
    columns = [*_HEAD, _said(connection).label("said")]
    query = select(*columns).order_by(events.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(events.c.id < select(events.c.id).where(events.c.ulid == before.upper()).scalar_subquery())
    rows = connection.execute(query).all()
    totals = _totals(connection, [row.id for row in rows])
    return [{**_described(row), **_about(row), "totals": totals.get(row.id, {})} for row in rows]


def event_state(connection: Connection, event: EventRow) -> dict[str, Any]:
    """Where an event stands: what it is, how it was answered, and how many deliveries have which status."""
    row = connection.execute(select(*_HEAD).where(events.c.id == event.id)).one()
    accounts_resolved = connection.execute(
        select(func.count()).select_from(verdict_rows).where(verdict_rows.c.event_id == event.id)
    ).scalar_one()
    return {
        **_described(row),
        "accounts": accounts_resolved,
        "totals": _totals(connection, [event.id]).get(event.id, {}),
    }


def waiting(connection: Connection, event_ids: Sequence[int]) -> dict[str, int]:
    """How many deliveries of events are planned for later, by the reason they wait for."""
    query = (
        select(deliveries.c.reason, func.count())
        .where(deliveries.c.due_at.is_not(None), deliveries.c.status == int(Status.PLANNED))
        .where(among(connection, deliveries.c.event_id, event_ids))
        .group_by(deliveries.c.reason)
    )
    return {reason or "deferred": count for reason, count in connection.execute(query)}


def list_deliveries(
    connection: Connection,
    event: EventRow,
    *,
    after: int = 0,
    limit: int = 100,
    status: str | None = None,
    reason: str | None = None,
) -> list[dict[str, Any]]:
    """One page of an event's deliveries in the order of their numbers, each with its grounds.

    `after` is the number of the last one of the page before; `status` one of `STATUSES`, `reason` one of `REASONS`.
    Raises `ValueError`.
    """
    flying = _flying(connection, [event.id]).get(event.id, set())
    query = (
        select(deliveries, verdict_shapes.c.body, mailboxes.c.address)
        .join(verdict_shapes, verdict_shapes.c.id == deliveries.c.shape_id)
        .outerjoin(mailboxes, mailboxes.c.id == deliveries.c.mailbox_id)
        .where(deliveries.c.event_id == event.id, deliveries.c.n > after)
        .order_by(deliveries.c.n)
        .limit(limit)
    )
    if status is not None:
        query = query.where(_has_status(status, flying))
    if reason is not None:
        query = query.where(_has_reason(reason))
    rows = connection.execute(query).all()
    further = _further_grounds(connection, event, [row.n for row in rows])
    named = _Named.read(
        connection,
        {row.account_id for row in rows} | {one[0] for found in further.values() for one in found},
        {row.contact_id for row in rows} | {one[1] for found in further.values() for one in found},
    )
    return [
        {
            "n": row.n,
            "account": named.account(row.account_id),
            "contact": named.contact(row.contact_id),
            "email": row.address,
            **_state_of(row, flying),
            "message_id": message_id(event, row.n) if event.sender_domain else None,
            "grounds": [
                named.ground(account, contact, shape)
                for account, contact, shape in [
                    (row.account_id, row.contact_id, shape_of(row.body)),
                    *further.get(row.n, ()),
                ]
            ],
        }
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Audience:
    """How many people an event was about, once it is planned."""

    outcomes: Mapping[tuple[str, str | None], int]  # accounts by outcome and reason
    contacts: int
    recipients: int  # contacts whom it is for; one mailbox may be several of them
    mailboxes: int

    @property
    def accounts(self) -> int:
        """The accounts that were judged."""
        return sum(self.outcomes.values())


def audience(connection: Connection, event: EventRow) -> Audience:
    """The numbers behind an event's verdicts. The database puts the packed ones together; nobody is read one by one."""
    packed = verdict_rows.c.packed
    joined = (
        func.group_concat(func.hex(packed), "")
        if connection.dialect.name == "sqlite"
        else func.string_agg(func.encode(packed, "hex"), "")
    )
    rows = connection.execute(
        select(verdict_rows.c.outcome, verdict_rows.c.reason, func.count(), joined)
        .where(verdict_rows.c.event_id == event.id)
        .group_by(verdict_rows.c.outcome, verdict_rows.c.reason)
    ).all()
    numbers = sum(len(bytes.fromhex(text or "").translate(None, _NOT_LAST)) for *_, text in rows)
    boxes = connection.execute(select(events.c.next_n).where(events.c.id == event.id)).scalar_one() - 1
    further = connection.execute(
        select(func.count()).select_from(more_grounds).where(more_grounds.c.event_id == event.id)
    ).scalar_one()
    return Audience(
        outcomes={(outcome, reason): count for outcome, reason, count, _ in rows},
        contacts=numbers // 2,  # a contact and its verdict
        recipients=boxes + further,
        mailboxes=boxes,
    )


_NOT_LAST = bytes(range(128, 256))
#: Bytes of a varint that others follow.


def catalogues_of(connection: Connection, event: EventRow, account_ids: Iterable[str]) -> dict[str, str]:
    """The key of the role catalogue by which each of these accounts was judged."""
    rows = connection.execute(
        select(accounts.c.ext, catalogue_versions.c.key)
        .join(verdict_rows, verdict_rows.c.account_id == accounts.c.id)
        .join(catalogue_versions, catalogue_versions.c.id == verdict_rows.c.catalogue_version)
        .where(verdict_rows.c.event_id == event.id, among(connection, accounts.c.ext, set(account_ids)))
    )
    return {row.ext: row.key for row in rows}


def signing_link(database: Database, ulid: str) -> str | None:
    """The signing link of an event, if its type has one. Raises `DatabaseUnusable`."""
    with database.read() as connection:
        wanted = and_(events.c.ulid == ulid.upper(), events.c.type.in_(SIGNED))
        payload = connection.execute(select(events.c.payload).where(wanted)).scalar()
    link = json.loads(payload)["data"].get("signing_url") if payload else None
    return link if isinstance(link, str) else None


def list_verdicts(
    connection: Connection, event: EventRow, *, after: int = 0, limit: int = 100, contacts_limit: int | None = None
) -> tuple[list[dict[str, Any]], int | None]:
    """One page of the stored answers (contract, section 6), one an account, and the cursor of the next page.

    With `contacts_limit` a page ends before it holds more contacts than that, but for its first account: of that one
    so many are told, and `left_out` says how many are not.
    A broadcast that was pointed to the status page has one answer for all, which stands with the event: no page here.
    """
    rows = connection.execute(
        select(verdict_rows)
        .where(verdict_rows.c.event_id == event.id, verdict_rows.c.account_id > after)
        .order_by(verdict_rows.c.account_id)
        .limit(limit + 1)
    ).all()
    page = rows[:limit]
    left_out = 0
    if contacts_limit is not None and page:
        page = page[: _fitting(page, contacts_limit)]
        left_out = max(0, len(unpack(bytes(page[0].packed))) - contacts_limit)
    first = {contact for contact, _ in unpack(bytes(page[0].packed))[:contacts_limit]} if left_out else None
    stored = _Stored.read(connection, event, page, only=first)
    answers = [stored.answer(row) for row in page]
    if left_out:
        answers[0]["left_out"] = left_out
    return answers, page[-1].account_id if len(rows) > len(page) else None


def _fitting(rows: Sequence[Row[Any]], contacts_limit: int) -> int:
    """How many of the rows hold no more contacts than that; the first one counts whatever it holds."""
    held = 0
    for place, row in enumerate(rows):
        held += len(unpack(bytes(row.packed)))
        if held > contacts_limit and place:
            return place
    return len(rows)


def why(connection: Connection, event: EventRow, who: str) -> list[dict[str, Any]]:
    """The stored verdict on each contact that `who` means: a contact id, ACCOUNT/CONTACT, or an address.

    Empty where nobody of that name was a contact of an account concerned when the event was resolved.
    """
    meant = _meant(connection, event, who)
    if event.status == "redirected" and event.scope != "one":
        return _redirected(connection, event, meant)
    rows = connection.execute(
        select(verdict_rows)
        .where(verdict_rows.c.event_id == event.id)
        .where(among(connection, verdict_rows.c.account_id, {contact.account for contact in meant.values()}))
        .order_by(verdict_rows.c.account_id)
    ).all()
    stored = _Stored.read(connection, event, rows, only=set(meant))
    return [one for row in rows for one in stored.verdicts_on(row, meant)]


def moment(micros: int | None) -> str | None:
    """A time of the ledger as RFC 3339 text; None where it is none, or waits for a person."""
    if micros is None or micros == NEVER:
        return None
    return datetime.fromtimestamp(micros / 1_000_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ---------------------------------------------------------------- events


_HEAD: tuple[ColumnElement[Any], ...] = tuple(
    column for column in events.c if column.name not in {"payload", "content_mac"}
)
#: An event without what was published, which may be megabytes.


def _said(connection: Connection) -> ColumnElement[str]:
    """An event's data as JSON without what may be long."""
    data: ColumnElement[Any]
    if connection.dialect.name == "sqlite":
        data = func.json_extract(events.c.payload, "$.data")
        return func.json_remove(data, "$.attachments", "$.body", "$.accounts", "$.lines")
    data = func.jsonb_extract_path(cast(events.c.payload, JSONB), "data", type_=JSONB)
    for name in ("attachments", "body", "accounts", "lines"):
        data = data.op("-", return_type=JSONB())(cast(name, Text))
    return cast(data, Text)


def _about(row: Row[Any]) -> dict[str, Any]:
    """What an event is about, and for whom: an account, a number of accounts, or all."""
    routing = json.loads(row.routing) if row.routing else {}
    named = routing.get("accounts")
    return {
        "title": facts.title(row.type, json.loads(row.said) if row.said else {}),
        "account": routing.get("account"),
        "accounts": len(named) if isinstance(named, list) else named,
    }


def _described(row: Row[Any]) -> dict[str, Any]:
    class_ = row._mapping["class"]  # noqa: SLF001 - the public name of SQLAlchemy's row mapping
    route = "status_page" if class_ == "status" else "request" if row.type == "action.requested" else "email"
    return {
        "event": row.ulid,
        "source": row.source,
        "id": row.ce_id,
        "type": row.type,
        "category": row.category,
        "class": class_,
        "status": row.status,
        "route": route,
        "outcome": row.outcome,
        "reason": row.reason,
        "status_page": json.loads(row.status_page) if row.status_page else None,
        "notes": json.loads(row.notes) if row.notes else [],
        "mode": row.mode,
        "accepted_at": moment(row.accepted_at),
        "not_before": moment(row.not_before),
        "expires_at": moment(row.expires_at),
        "planned_at": moment(row.planned_at),
        "cancelled_at": moment(row.cancelled_at),
    }


def _totals(connection: Connection, event_ids: Sequence[int]) -> dict[int, dict[str, int]]:
    """Deliveries by status for each event, zero counts left out; what is in open flights counts as sending."""
    if not event_ids:
        return {}
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    query = (
        select(tallies.c.event_id, tallies.c.status, func.sum(tallies.c.n))
        .where(among(connection, tallies.c.event_id, event_ids))
        .group_by(tallies.c.event_id, tallies.c.status)
    )
    for event_id, status, count in connection.execute(query):
        counts[event_id][Status(status).name.lower()] = int(count)
    for event_id, members in _flying(connection, event_ids).items():
        sending = _still_planned(connection, event_id, members)
        counts[event_id]["sending"] = sending
        counts[event_id]["planned"] = counts[event_id].get("planned", 0) - sending
    return {event_id: {name: n for name, n in found.items() if n} for event_id, found in counts.items()}


def _flying(connection: Connection, event_ids: Sequence[int]) -> dict[int, set[int]]:
    """The numbers of deliveries that open flights name, by event: at most a few hundred for each worker."""
    query = (
        select(slices.c.event_id, flights.c.members)
        .join(slices, slices.c.id == flights.c.slice_id)
        .where(among(connection, slices.c.event_id, event_ids))
    )
    named: dict[int, set[int]] = defaultdict(set)
    for event_id, members in connection.execute(query):
        named[event_id].update(json.loads(members))
    return named


def _still_planned(connection: Connection, event_id: int, members: Iterable[int]) -> int:
    query = (
        select(func.count())
        .select_from(deliveries)
        .where(deliveries.c.event_id == event_id, deliveries.c.status == int(Status.PLANNED))
        .where(among(connection, deliveries.c.n, members))
    )
    return int(connection.execute(query).scalar_one())


# ---------------------------------------------------------------- deliveries


def _has_status(status: str, flying: set[int]) -> ColumnElement[bool]:
    if status not in STATUSES:
        message = f"{status!r} is no status of a delivery: there are {', '.join(STATUSES)}"
        raise ValueError(message)
    if status == "sending":
        return and_(deliveries.c.status == int(Status.PLANNED), deliveries.c.n.in_(sorted(flying)))
    wanted = deliveries.c.status == int(Status[status.upper()])
    return and_(wanted, deliveries.c.n.not_in(sorted(flying))) if status == "planned" else wanted


def _has_reason(reason: str) -> ColumnElement[bool]:
    if reason not in REASONS:
        message = f"{reason!r} is no reason of a delivery: there are {', '.join(REASONS)}"
        raise ValueError(message)
    return deliveries.c.reason == reason


def _state_of(row: Row[Any], flying: set[int]) -> dict[str, Any]:
    status = Status(row.status)
    return {
        "status": "sending" if status is Status.PLANNED and row.n in flying else status.name.lower(),
        "reason": row.reason,
        "attempts": row.attempts,
        "due_at": moment(row.due_at),
        "relay": row.relay,
        "reply": row.reply,
        "settled_at": moment(row.settled_at),
    }


_GroundNumbers = tuple[int, int, Shape]  # account, contact, verdict


def _further_grounds(
    connection: Connection, event: EventRow, numbers: Sequence[int]
) -> dict[int, list[_GroundNumbers]]:
    found: dict[int, list[_GroundNumbers]] = defaultdict(list)
    if event.scope == "one" or not numbers:
        return found
    query = (
        select(more_grounds.c.n, more_grounds.c.account_id, more_grounds.c.contact_id, verdict_shapes.c.body)
        .join(verdict_shapes, verdict_shapes.c.id == more_grounds.c.shape_id)
        .where(more_grounds.c.event_id == event.id, among(connection, more_grounds.c.n, numbers))
        .order_by(more_grounds.c.n, more_grounds.c.account_id, more_grounds.c.contact_id)
    )
    for n, account, contact, body in connection.execute(query):
        found[n].append((account, contact, shape_of(body)))
    return found


@dataclass(frozen=True, slots=True)
class _Named:
    """The ids that people use, by row number."""

    accounts: Mapping[int, tuple[str, str]]
    contacts: Mapping[int, ContactRow]

    @classmethod
    def read(cls, connection: Connection, account_numbers: set[int], contact_numbers: set[int]) -> _Named:
        return cls(
            directory.account_names(connection, account_numbers), directory.contact_rows(connection, contact_numbers)
        )

    def account(self, number: int) -> str | None:
        return self.accounts[number][0] if number in self.accounts else None

    def contact(self, number: int) -> str | None:
        return self.contacts[number].id if number in self.contacts else None

    def ground(self, account: int, contact: int, shape: Shape) -> dict[str, Any]:
        return {
            "account": self.account(account),
            "contact": self.contact(contact),
            "delivery": shape.delivery,
            "matched": _pairs(shape.matched),
        }


def _pairs(pairs: Iterable[tuple[str | None, str]]) -> list[dict[str, str | None]]:
    return [{"role": role, "reason": reason} for role, reason in pairs]


# ---------------------------------------------------------------- verdicts


@dataclass(frozen=True, slots=True)
class _Mailed:
    """The delivery that a verdict led to, with the address that it went to."""

    address: str | None
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Stored:
    """Packed verdicts of an event with what is needed to show them."""

    event: EventRow
    status_page: dict[str, Any] | None
    named: _Named
    shapes: Mapping[int, Shape]
    mailed: Mapping[int, _Mailed]  # by contact
    only: set[int] | None  # the contacts that are told; None = all

    @classmethod
    def read(
        cls, connection: Connection, event: EventRow, rows: Sequence[Row[Any]], *, only: set[int] | None = None
    ) -> _Stored:
        """What the verdicts in `rows` speak of; `only` narrows it to some contacts."""
        pairs = [pair for row in rows for pair in unpack(bytes(row.packed)) if only is None or pair[0] in only]
        shapes = {
            number: shape_of(body)
            for number, body in connection.execute(
                select(verdict_shapes.c.id, verdict_shapes.c.body).where(
                    among(connection, verdict_shapes.c.id, {shape for _, shape in pairs})
                )
            )
        }
        named = _Named.read(connection, {row.account_id for row in rows}, {contact for contact, _ in pairs})
        recipients = [named.contacts[contact] for contact, shape in pairs if shapes[shape].delivery is not None]
        found = connection.execute(select(events.c.status_page).where(events.c.id == event.id)).scalar_one()
        page = json.loads(found) if found else None
        return cls(event, page, named, shapes, _mailed(connection, event, recipients), only)

    def answer(self, row: Row[Any]) -> dict[str, Any]:
        """A verdict row as the answer of contract section 6."""
        recipients: list[dict[str, Any]] = []
        excluded: list[dict[str, Any]] = []
        for number, shape_number in unpack(bytes(row.packed)):
            if self.only is not None and number not in self.only:
                continue
            shape = self.shapes[shape_number]
            contact = self.named.contact(number)
            if shape.delivery is None:
                excluded.append({"contact": contact, "dropped": _pairs(shape.dropped)})
            else:
                recipients.append({"contact": contact, **self._received(number, shape)})
        return {**self._head(row), "recipients": recipients, "excluded": excluded, "warnings": _listed(row.warnings)}

    def verdicts_on(self, row: Row[Any], meant: Mapping[int, ContactRow]) -> list[dict[str, Any]]:
        """The verdict on each contact of the row's account that is meant, with its delivery.

        Where no fan-out happened there is no verdict on anybody: the outcome and its reason are the answer.
        """
        packed = dict(unpack(bytes(row.packed)))
        found = []
        for number, contact in meant.items():
            if contact.account != row.account_id or (packed and number not in packed):
                continue
            head = {**self._head(row), "warnings": _listed(row.warnings), "contact": contact.id}
            if not packed:
                found.append({**head, "email": contact.address, **_NOTHING})
                continue
            shape = self.shapes[packed[number]]
            if shape.delivery is None:
                found.append({**head, "email": contact.address, **_NOTHING, "dropped": _pairs(shape.dropped)})
                continue
            state = self.mailed[number].state if number in self.mailed else None
            found.append({**head, **self._received(number, shape), "sent": state})
        return found

    def _head(self, row: Row[Any]) -> dict[str, Any]:
        head = {
            "source": self.event.source,
            "event": self.event.ce_id,
            "account": self.named.account(row.account_id),
            "category": self.event.category,
            "outcome": row.outcome,
            "reason": row.reason,
        }
        if row.outcome == "redirected_to_status_page":
            head["status_page"] = self.status_page
        return head

    def _received(self, number: int, shape: Shape) -> dict[str, Any]:
        contact = self.named.contacts[number]
        return {
            "email": self.mailed[number].address if number in self.mailed else contact.address,
            "delivery": shape.delivery,
            "matched": _pairs(shape.matched),
            "dropped": _pairs(shape.dropped),
            "deduplicated": shape.deduplicated,
        }


_NOTHING: Mapping[str, Any] = {"delivery": None, "matched": [], "dropped": [], "deduplicated": False, "sent": None}


def _listed(stored: str) -> list[str]:
    return stored.split(",") if stored else []


def _mailed(connection: Connection, event: EventRow, recipients: Sequence[ContactRow]) -> dict[int, _Mailed]:
    """The deliveries that these contacts are grounds of.

    They are looked for by the contact's mailbox, which is indexed; who has another address since is looked for by the
    contact, along the whole event.
    """
    found = _mailed_where(
        connection, event, among(connection, deliveries.c.mailbox_id, {one.mailbox for one in recipients})
    )
    moved = {one.number for one in recipients} - set(found)
    if moved:
        own = among(connection, deliveries.c.contact_id, moved)
        further = select(more_grounds.c.n).where(
            more_grounds.c.event_id == event.id, among(connection, more_grounds.c.contact_id, moved)
        )
        found |= _mailed_where(connection, event, own | deliveries.c.n.in_(further))
    return found


def _mailed_where(connection: Connection, event: EventRow, wanted: ColumnElement[bool]) -> dict[int, _Mailed]:
    rows = connection.execute(
        select(deliveries, mailboxes.c.address)
        .outerjoin(mailboxes, mailboxes.c.id == deliveries.c.mailbox_id)
        .where(deliveries.c.event_id == event.id, wanted)
    ).all()
    flying = _flying(connection, [event.id]).get(event.id, set())
    by_n = {row.n: _Mailed(row.address, {"n": row.n, **_state_of(row, flying)}) for row in rows}
    found = {row.contact_id: by_n[row.n] for row in rows}
    for n, grounds in _further_grounds(connection, event, list(by_n)).items():
        found |= {contact: by_n[n] for _, contact, _ in grounds}
    return found


# ---------------------------------------------------------------- whom a person means


def _meant(connection: Connection, event: EventRow, who: str) -> dict[int, ContactRow]:
    """The contacts, removed ones included, that a contact id, ACCOUNT/CONTACT or an address may mean."""
    if "@" in who:
        numbers = _with_address(connection, event, who)
    else:
        account, slash, contact = who.rpartition("/")
        query = (
            select(contacts.c.id)
            .join(accounts, accounts.c.id == contacts.c.account_id)
            .where(contacts.c.ext == contact)
        )
        if slash:
            query = query.where(accounts.c.ext == account)
        elif event.scope == "one":
            query = query.where(accounts.c.ext == event.routing.get("account"))
        numbers = set(connection.execute(query).scalars())
    return directory.contact_rows(connection, numbers)


def _with_address(connection: Connection, event: EventRow, address: str) -> set[int]:
    """Whoever has the address now, and whoever the event wrote to under it."""
    try:
        mailbox = directory.mailbox_number(connection, normalise(address))
    except BadAddress:
        return set()
    if mailbox is None:
        return set()
    now = connection.execute(select(contacts.c.id).where(contacts.c.mailbox_id == mailbox)).scalars()
    return {*now, *_mailed_where(connection, event, deliveries.c.mailbox_id == mailbox)}


def _redirected(connection: Connection, event: EventRow, meant: Mapping[int, ContactRow]) -> list[dict[str, Any]]:
    """A status-page broadcast stores one answer, which holds for everybody in the accounts that it was about."""
    concerned = {contact.account for contact in meant.values()}
    if event.scope == "list":
        named = select(event_accounts.c.account_id).where(event_accounts.c.event_id == event.id)
        concerned &= set(connection.execute(named).scalars())
    names = directory.account_names(connection, concerned)
    state = connection.execute(select(events.c.status_page).where(events.c.id == event.id)).scalar_one()
    return [
        {
            "source": event.source,
            "event": event.ce_id,
            "account": names[contact.account][0],
            "category": event.category,
            "outcome": "redirected_to_status_page",
            "reason": "status_page_category",
            "status_page": json.loads(state) if state else None,
            "warnings": [],
            "contact": contact.id,
            "email": contact.address,
            **_NOTHING,
            "dropped": [{"role": None, "reason": "redirected_to_status_page"}],
        }
        for contact in meant.values()
        if contact.account in names
    ]


def counts(connection: Connection, event_ids: Sequence[int]) -> dict[str, int]:
    """Deliveries by status over several events, as `event_state` counts them."""
    summed: dict[str, int] = defaultdict(int)
    for found in _totals(connection, event_ids).values():
        for name, count in found.items():
            summed[name] += count
    return dict(summed)
