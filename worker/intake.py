"""Accept a fact exactly once, for life.

(source, id) is unique in the database, so that concurrent publishers of one fact cannot both be first; nothing is
looked up before it is inserted. The same pair again is a duplicate where the content is equal (RFC 8785 of type,
subject, dataschema and data), and a conflict otherwise. An event for one account is resolved and planned in the same
transaction. A batch is all or nothing: one fault refuses it, 400 before 422 before 409.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, insert, select

from subscriptions import directory
from subscriptions.audience import AccountFacts, Verdicts, resolve
from subscriptions.database import Clock, Database, DatabaseUnusable, insert_into
from subscriptions.schema import account_products, accounts
from worker import fanout, ledger, logs
from worker.events import Event, content
from worker.fanout import EventRow, Planner, Planning, event_facts, event_row
from worker.schema import event_accounts, events
from worker.settings import Settings
from worker.sharedfeed import SharedFeed

logger = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class Publisher:
    """Who publishes: the local command line, or an API key."""

    name: str = "cli"
    mode: Literal["live", "team", "test"] = "live"
    attests: bool = True  # whether requested_by and approved_by count (contract, section 3)
    key_id: int | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to a publisher; `duplicate` where the fact was known already."""

    event: str  # the ULID
    source: str
    id: str
    duplicate: bool
    route: Literal["email", "status_page", "request"]
    outcome: str | None
    reason: str | None
    status_page: dict[str, Any] | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an event can't be accepted: `index` counts the events of the call, `pointer` points into that event."""

    index: int
    kind: Literal["invalid", "conflict"]
    pointer: str
    message: str


class Refused(Exception):  # noqa: N818 - reads as the sentence it is
    """Nothing was accepted; `faults` says why, one sentence each."""

    def __init__(self, faults: Sequence[Refusal]) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = tuple(faults)


class _Fault(Exception):  # noqa: N818 - carries one Refusal out of a deeper step
    def __init__(self, kind: Literal["invalid", "conflict"], pointer: str, message: str) -> None:
        super().__init__(message)
        self.kind: Literal["invalid", "conflict"] = kind
        self.pointer = pointer


@dataclass(slots=True)
class Intake:
    """Accepts events into one installation. `wake` is called after a commit that left something to do."""

    database: Database
    planner: Planner
    feed: SharedFeed
    settings: Settings
    clock: Clock
    wake: Callable[[], None] = lambda: None

    def accept(self, batch: Sequence[Event], publisher: Publisher) -> list[Accepted]:
        """Accept events, all or none, in one transaction. Raises `Refused`, `DatabaseUnusable`."""
        shortage = self.database.shortage()
        if shortage is not None:
            raise DatabaseUnusable(shortage)
        with self.database.write() as connection:
            planning = self.planner.start(connection)
            answers = self._accept_all(planning, batch, publisher)
        planning.keep()
        for answer in answers:
            if not answer.duplicate:
                logger.info("event.accepted", event_id=answer.event, route=answer.route, outcome=answer.outcome)
        self.wake()
        return answers

    def dry_run(self, batch: Sequence[Event], publisher: Publisher) -> list[tuple[Event, AccountFacts, Verdicts]]:
        """The verdicts for each event and account, without storing anything. Raises `Refused`."""
        with self.database.read() as connection:
            found = []
            faults = []
            for index, event in enumerate(batch):
                try:
                    found += [(event, *pair) for pair in self._resolved(connection, event, publisher)]
                except _Fault as fault:
                    faults.append(Refusal(index, fault.kind, fault.pointer, str(fault)))
        if faults:
            raise Refused(faults)
        return found

    def _resolved(
        self, connection: Connection, event: Event, publisher: Publisher
    ) -> list[tuple[AccountFacts, Verdicts]]:
        facts = event_facts(event.type.category, event.data, event.products, attested=publisher.attests)
        catalogues = self.planner.catalogues
        if event.account is not None:
            account, verdict = self._one_account(connection, event, publisher)
            return [(account, verdict)]
        if event.accounts != "all":
            self._known_accounts(connection, event)
        answers: list[tuple[AccountFacts, Verdicts]] = []
        after = 0
        only = None if event.accounts == "all" else list(event.accounts or ())
        while page := directory.facts(connection, catalogues, after=after, limit=fanout.PAGE, only=only):
            answers += [(one, resolve(catalogues[one.catalogue], one, facts)) for one in page]
            after = page[-1].number
        return answers

    def _accept_all(self, planning: Planning, batch: Sequence[Event], publisher: Publisher) -> list[Accepted]:
        answers: list[Accepted] = []
        faults: list[Refusal] = []
        for index, event in enumerate(batch):
            try:
                answers.append(self._accept(planning, event, publisher))
            except _Fault as fault:
                faults.append(Refusal(index, fault.kind, fault.pointer, str(fault)))
        if faults:
            faults.sort(key=lambda fault: fault.kind == "conflict")  # 422 before 409
            raise Refused(faults)
        return answers

    def _accept(self, planning: Planning, event: Event, publisher: Publisher) -> Accepted:
        connection, now = planning.connection, self.clock()
        key = directory.address_key(connection)
        mac = hashlib.blake2b(content(event), key=key, digest_size=16).digest()
        notes = self._notes(connection, event)
        row = self._insert(connection, event, publisher, mac=mac, now=now)
        if row is None:
            return self._known_fact(connection, event, mac)
        verdict: Verdicts | None = None
        status_page = None
        if event.account is not None:
            account, verdict = self._one_account(connection, event, publisher)
        elif event.accounts == "all":
            self._someone(connection, event)
        else:
            self._list_accounts(connection, event, row.id)
        values: dict[str, Any] = {"notes": json.dumps(notes)}
        if verdict is not None:
            values |= {"outcome": verdict.outcome, "reason": verdict.reason}
        if row.class_ == "status":
            status_page = self.feed.pointer(connection, event)
            values |= {"status": "redirected", "outcome": "redirected_to_status_page", "planned_at": now,
                       "reason": "status_page_category", "status_page": json.dumps(status_page)}  # fmt: skip
        connection.execute(events.update().where(events.c.id == row.id).values(**values))
        if verdict is not None and row.class_ == "status":
            planning.write(row, [(account, verdict)], next_n=1, now=now, owner=ledger.NO_WORKER)
        elif verdict is not None and (row.not_before is None or row.not_before <= now):
            fanout.plan_one(planning, row, account, verdict, now=now, owner=ledger.NO_WORKER)
        return Accepted(
            event=row.ulid,
            source=event.source,
            id=event.id,
            duplicate=False,
            route=_route(row),
            outcome=verdict.outcome if verdict else None,
            reason=verdict.reason if verdict else None,
            status_page=status_page,
            notes=tuple(notes),
        )

    def _insert(
        self, connection: Connection, event: Event, publisher: Publisher, *, mac: bytes, now: int
    ) -> EventRow | None:
        """The new row, or None where (source, id) stands already."""
        category = event.type.category
        class_ = next(iter(self.planner.catalogues.values())).vocabulary.categories[category].class_
        routing: dict[str, Any] = {"products": list(event.products), "attested": publisher.attests}
        scope = "one"
        if event.account is not None:
            routing["account"] = event.account
        else:
            scope = "all" if event.accounts == "all" else "list"
            routing["accounts"] = event.accounts
        sender = self.settings.sender_of(class_)
        statement = (
            insert_into(connection, events)
            .values(
                ulid=new_ulid(now),
                source=event.source,
                ce_id=event.id,
                content_mac=mac,
                type=event.type.name,
                category=category,
                lane=int(ledger.lane_of(class_, broadcast=scope != "one")),
                scope=scope,
                routing=json.dumps(routing),
                payload=json.dumps(
                    {"data": event.data, "time": event.time, "subject": event.subject, "dataschema": event.dataschema},
                    ensure_ascii=False,
                ),
                accepted_at=now,
                key_id=publisher.key_id,
                mode=publisher.mode,
                not_before=_micros(event.not_before),
                expires_at=_micros(event.expires_at),
                status="accepted",
                sender_domain=_domain(sender),
                bounce_domain=(self.settings.bounce_domain_of(class_) or "") if sender else "",
                **{"class": class_},
            )
            .on_conflict_do_nothing(index_elements=["source", "ce_id"])
            .returning(events)
        )
        row = connection.execute(statement).one_or_none()
        return event_row(row) if row is not None else None

    def _known_fact(self, connection: Connection, event: Event, mac: bytes) -> Accepted:
        row = connection.execute(
            select(events).where(events.c.source == event.source, events.c.ce_id == event.id)
        ).one()
        if row.content_mac != mac:
            message = (
                f"source {event.source!r} and id {event.id!r} were accepted before with other content: "
                "a new fact needs a new id"
            )
            raise _Fault("conflict", "/id", message)
        return Accepted(
            event=row.ulid,
            source=event.source,
            id=event.id,
            duplicate=True,
            route=_route(event_row(row)),
            outcome=row.outcome if row.scope == "one" else None,
            reason=row.reason,
            status_page=json.loads(row.status_page) if row.status_page else None,
            notes=tuple(json.loads(row.notes or "[]")),
        )

    def _one_account(self, connection: Connection, event: Event, publisher: Publisher) -> tuple[AccountFacts, Verdicts]:
        account = directory.account(connection, self.planner.catalogues, event.account or "")
        if account is None:
            message = f'"account" is {event.account!r}, which the directory does not have: import it first'
            raise _Fault("invalid", "/data/account", message)
        facts = event_facts(event.type.category, event.data, event.products, attested=publisher.attests)
        verdict = resolve(self.planner.catalogues[account.catalogue], account, facts)
        if verdict.reason == "category_not_in_catalogue":
            message = (
                f"the type {event.type.name} is of the category {event.type.category!r}, which the catalogue "
                f"{account.catalogue!r} of account {account.id!r} does not have: nobody there can receive it"
            )
            raise _Fault("invalid", "/type", message)
        return account, verdict

    def _known_accounts(self, connection: Connection, event: Event) -> dict[str, int]:
        wanted = list(event.accounts or ())
        found: dict[str, int] = {}
        for start in range(0, len(wanted), 5000):
            rows = connection.execute(
                select(accounts.c.ext, accounts.c.id).where(
                    accounts.c.ext.in_(wanted[start : start + 5000]), accounts.c.removed_at.is_(None)
                )
            )
            found.update((row.ext, row.id) for row in rows)
        for position, ext in enumerate(wanted):
            if ext not in found:
                message = f'"accounts" names {ext!r}, which the directory does not have: import it first'
                raise _Fault("invalid", f"/data/accounts/{position}", message)
        return found

    def _list_accounts(self, connection: Connection, event: Event, event_id: int) -> None:
        found = self._known_accounts(connection, event)
        connection.execute(
            insert(event_accounts), [{"event_id": event_id, "account_id": number} for number in found.values()]
        )

    def _someone(self, connection: Connection, event: Event) -> None:
        if connection.execute(select(accounts.c.id).where(accounts.c.removed_at.is_(None)).limit(1)).first() is None:
            message = "data.accounts is 'all', but the directory has no account: import one first"
            raise _Fault("invalid", "/data/accounts", message)

    def _notes(self, connection: Connection, event: Event) -> list[str]:
        """What is told back to the publisher without refusing anything."""
        if not event.products:
            return []
        used = set(
            connection.execute(
                select(account_products.c.product)
                .join(accounts, accounts.c.id == account_products.c.account_id)
                .where(account_products.c.product.in_(event.products), accounts.c.removed_at.is_(None))
                .distinct()
            ).scalars()
        )
        return [f"no account uses the product {name!r}" for name in event.products if name not in used]


def _route(row: EventRow) -> Literal["email", "status_page", "request"]:
    if row.class_ == "status":
        return "status_page"
    return "request" if row.type == "action.requested" else "email"


def _micros(moment: Any) -> int | None:
    return int(moment.timestamp() * 1_000_000) if moment is not None else None


def _domain(sender: str | None) -> str:
    return sender.rpartition("@")[2].rstrip(">") if sender else ""


_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_ulid(now: int) -> str:
    """A ULID: 48 bits of milliseconds and 80 random bits, in Crockford's base 32."""
    number = (now // 1000 << 80) | secrets.randbits(80)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -5, -5))
