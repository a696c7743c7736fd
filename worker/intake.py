"""Accept a fact exactly once, for life.

(source, id) is unique in the database, so that concurrent publishers of one fact cannot both be first: a row is
inserted as it is to stand, and only who finds one there looks at what it says. The same pair again is a duplicate where
the content is equal (RFC 8785 of type, subject, dataschema and data), and a conflict otherwise. An event for one
account is resolved and planned in the same transaction; where this process works and has room, its slice is claimed
there too, and sent after the commit. A batch is all or nothing: one fault refuses it, 400 before 422 before 409.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, Protocol

from sqlalchemy import Connection, insert, select

from subscriptions import directory
from subscriptions.audience import AccountFacts, Verdicts, resolve
from subscriptions.bulk import run
from subscriptions.database import Clock, Database, DatabaseUnusable
from subscriptions.directory import Known
from subscriptions.schema import account_products, accounts
from worker import fanout, feeding, ledger, logs, waking
from worker.delivery import Taken
from worker.events import Event, content
from worker.fanout import EventRow, Planner, Planning, event_facts, event_row
from worker.ledger import Lane
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


class Hands(Protocol):
    """What works in this process, as it is offered a slice in the transaction that makes it."""

    def take(
        self, planning: Planning, event: EventRow, *, mails: int, guard: int, known: Known | None, now: int
    ) -> Taken | None:
        """Claim the mails of a new event, the last that was planned; None where they must wait: others come first.

        `guard` is the one that stood before its facts were read, `known` its account where that was read with its
        people. What was taken is handed back by one of the others.
        """

    def send(self, taken: Sequence[Taken]) -> None:
        """What was taken is committed: it is sent. Returns at once."""

    def forget(self, taken: Sequence[Taken]) -> None:
        """What was taken came to nothing, or nobody knows."""


@dataclass(slots=True)
class Intake:
    """Accepts events into one installation.

    `wake` is called with what is due (words of `waking`) after a commit that left something to do.
    """

    database: Database
    planner: Planner
    feed: SharedFeed
    settings: Settings
    clock: Clock
    wake: Callable[[Collection[str]], None] = lambda _: None
    hands: Hands | None = None

    def accept(self, batch: Sequence[Event], publisher: Publisher) -> list[Accepted]:
        """Accept events, all or none, in one transaction. Raises `Refused`, `DatabaseUnusable`."""
        shortage = self.database.shortage()
        if shortage is not None:
            raise DatabaseUnusable(shortage)
        hands, taken = self.hands, list[Taken]()
        try:
            with self.database.write() as connection:
                planning = self.planner.start(connection)
                accepting = self._begin(planning, batch, publisher, hands, taken)
                answers = self._accept_all(accepting, batch)
        except BaseException:
            if hands is not None and taken:
                hands.forget(taken)
            raise
        if hands is not None and taken:
            hands.send(taken)
        if accepting.due:
            self.wake(accepting.due)
        planning.keep()
        for answer in answers:
            if not answer.duplicate:
                logger.info("event.accepted", event_id=answer.event, route=answer.route, outcome=answer.outcome)
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
            account = directory.account(connection, catalogues, event.account)
            verdict = self._verdict(event, account, publisher)
            return [(account, verdict)] if account is not None else []
        if event.accounts != "all":
            self._known_accounts(connection, event)
        answers: list[tuple[AccountFacts, Verdicts]] = []
        after = 0
        only = None if event.accounts == "all" else list(event.accounts or ())
        while page := directory.facts(connection, catalogues, after=after, limit=fanout.PAGE, only=only):
            answers += [(one, resolve(catalogues[one.catalogue], one, facts)) for one in page]
            after = page[-1].number
        return answers

    def _accept_all(self, accepting: _Accepting, batch: Sequence[Event]) -> list[Accepted]:
        answers: list[Accepted] = []
        faults: list[Refusal] = []
        for index, event in enumerate(batch):
            try:
                answers.append(self._accept(accepting, event))
            except _Fault as fault:
                faults.append(Refusal(index, fault.kind, fault.pointer, str(fault)))
        if faults:
            faults.sort(key=lambda fault: fault.kind == "conflict")  # 422 before 409
            raise Refused(faults)
        return answers

    def _begin(
        self,
        planning: Planning,
        batch: Sequence[Event],
        publisher: Publisher,
        hands: Hands | None,
        taken: list[Taken],
    ) -> _Accepting:
        """Read once what all events of a call need: the guard before the facts, so that what moves later is seen."""
        connection, catalogues = planning.connection, self.planner.catalogues
        key, guard = run(connection, _INSTALLATION).first
        names = list(dict.fromkeys(event.account for event in batch if event.account is not None))
        known = None
        if len(names) > 1:
            facts = directory.facts(connection, catalogues, only=names, limit=len(names))
        else:
            known = directory.known(connection, catalogues, names[0]) if names else None
            facts = [known.facts] if known is not None else []
        by_id = {one.id: one for one in facts}
        return _Accepting(planning, publisher, self.clock(), bytes(key), guard, by_id, known, hands, taken)

    def _accept(self, accepting: _Accepting, event: Event) -> Accepted:
        """Resolve an event, then write its row once, as it is to stand; who comes second finds it there."""
        connection, now = accepting.planning.connection, accepting.now
        mac = hashlib.blake2b(content(event), key=accepting.key, digest_size=16).digest()
        try:
            resolved = self._resolve(accepting, event)
        except _Fault:
            known = self._known_fact(connection, event, mac)  # its account may have gone since
            if known is None:
                raise
            return known
        row = self._values(event, accepting, resolved, mac=mac)
        inserted = run(connection, _insert_event(tuple(row)), row).first
        if inserted is None:
            known = self._known_fact(connection, event, mac)
            assert known is not None
            return known
        number = inserted[0]
        if resolved.listed is not None:
            connection.execute(_LIST, [{"event_id": number, "account_id": account} for account in resolved.listed])
        stored = _stored(row, event, number)
        account, verdict = resolved.account, resolved.verdict
        if account is not None and verdict is not None and row["planned_at"] is not None:
            accepting.planning.write(stored, [(account, verdict)], next_n=1, now=now, owner=ledger.NO_WORKER)
            if resolved.mails:
                self._make_slices(accepting, stored, resolved.mails)
        elif row["status"] == "accepted":
            accepting.due.add(waking.PLAN)
        return Accepted(
            event=stored.ulid,
            source=event.source,
            id=event.id,
            duplicate=False,
            route=_route(stored),
            outcome=verdict.outcome if verdict else None,
            reason=verdict.reason if verdict else None,
            status_page=resolved.status_page,
            notes=tuple(resolved.notes),
        )

    def _make_slices(self, accepting: _Accepting, event: EventRow, mails: int) -> None:
        """The slices of a planned event; a single one is taken by what works in this process, where there is room."""
        planning, now, hands = accepting.planning, accepting.now, accepting.hands
        if hands is not None and mails <= ledger.SLICE_SIZE:
            taken = hands.take(planning, event, mails=mails, guard=accepting.guard, known=accepting.known, now=now)
            if taken is not None:
                accepting.taken.append(taken)
                return
        feeding.make_slices(planning.connection, event.id, event.lane, first_n=1, last_n=mails, due_at=now)
        accepting.due.add(waking.DUE[event.lane])

    def _resolve(self, accepting: _Accepting, event: Event) -> _Resolved:
        """Who gets an event for one account; which accounts a list names. Raises `_Fault`."""
        connection = accepting.planning.connection
        found = _Resolved(self._class_of(event))
        if event.account is not None:
            found.account = accepting.accounts.get(event.account)
            found.verdict = self._verdict(event, found.account, accepting.publisher)
            found.mails = len({one.contact.mailbox for one in found.verdict.recipients})
        elif event.accounts == "all":
            self._someone(connection)
        else:
            found.listed = self._known_accounts(connection, event).values()
        found.notes = self._notes(connection, event, found.account)
        if found.class_ == "status":
            found.status_page = self.feed.pointer(connection, event)
        return found

    def _class_of(self, event: Event) -> str:
        return next(iter(self.planner.catalogues.values())).vocabulary.categories[event.type.category].class_

    def _values(self, event: Event, accepting: _Accepting, resolved: _Resolved, *, mac: bytes) -> dict[str, Any]:
        """The row of an event, as it stands once it is accepted."""
        publisher, now, class_ = accepting.publisher, accepting.now, resolved.class_
        routing: dict[str, Any] = {"products": list(event.products), "attested": publisher.attests}
        scope = "one"
        if event.account is not None:
            routing["account"] = event.account
        else:
            scope = "all" if event.accounts == "all" else "list"
            routing["accounts"] = event.accounts
        sender = self.settings.sender_of(class_)
        not_before = _micros(event.not_before)
        values: dict[str, Any] = {
            "ulid": new_ulid(now),
            "source": event.source,
            "ce_id": event.id,
            "content_mac": mac,
            "type": event.type.name,
            "category": event.type.category,
            "class": class_,
            "lane": int(ledger.lane_of(class_, broadcast=scope != "one")),
            "scope": scope,
            "routing": json.dumps(routing),
            "payload": json.dumps(
                {"data": event.data, "time": event.time, "subject": event.subject, "dataschema": event.dataschema},
                ensure_ascii=False,
            ),
            "accepted_at": now,
            "key_id": publisher.key_id,
            "mode": publisher.mode,
            "not_before": not_before,
            "expires_at": _micros(event.expires_at),
            "sender_domain": _domain(sender),
            "bounce_domain": (self.settings.bounce_domain_of(class_) or "") if sender else "",
            "notes": json.dumps(resolved.notes),
            "status": "accepted",
            "outcome": None,
            "reason": None,
            "status_page": None,
            "planned_at": None,
            "next_n": 1,
            "guard_at_plan": 0,
        }
        verdict = resolved.verdict
        if verdict is not None:
            values |= {"outcome": verdict.outcome, "reason": verdict.reason}
        if class_ == "status":
            values |= {"status": "redirected", "outcome": "redirected_to_status_page", "planned_at": now,
                       "reason": "status_page_category", "status_page": json.dumps(resolved.status_page)}  # fmt: skip
        elif verdict is not None and (not_before is None or not_before <= now):
            values |= {"status": "sending" if resolved.mails else "done", "next_n": 1 + resolved.mails,
                       "planned_at": now, "guard_at_plan": accepting.guard}  # fmt: skip
        return values

    def _known_fact(self, connection: Connection, event: Event, mac: bytes) -> Accepted | None:
        """The answer to a fact that was accepted before; None where it is new. Raises `_Fault` where it differs."""
        row = connection.execute(
            select(events).where(events.c.source == event.source, events.c.ce_id == event.id)
        ).one_or_none()
        if row is None:
            return None
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

    def _verdict(self, event: Event, account: AccountFacts | None, publisher: Publisher) -> Verdicts:
        """Who gets an event for one account. Raises `_Fault` where it can't be meant for that account."""
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
        return verdict

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

    def _someone(self, connection: Connection) -> None:
        if connection.execute(select(accounts.c.id).where(accounts.c.removed_at.is_(None)).limit(1)).first() is None:
            message = "data.accounts is 'all', but the directory has no account: import one first"
            raise _Fault("invalid", "/data/accounts", message)

    def _notes(self, connection: Connection, event: Event, account: AccountFacts | None) -> list[str]:
        """What is told back to the publisher without refusing anything."""
        unsure = [name for name in event.products if account is None or name not in account.uses]
        if not unsure:
            return []
        used = set(
            connection.execute(
                select(account_products.c.product)
                .join(accounts, accounts.c.id == account_products.c.account_id)
                .where(account_products.c.product.in_(unsure), accounts.c.removed_at.is_(None))
                .distinct()
            ).scalars()
        )
        return [f"no account uses the product {name!r}" for name in unsure if name not in used]


@dataclass(slots=True)
class _Accepting:
    """What the events of one call share: the transaction, and what was read in it for all of them."""

    planning: Planning
    publisher: Publisher
    now: int
    key: bytes  # the installation's
    guard: int  # as it stood before the facts were read
    accounts: Mapping[str, AccountFacts]  # those that the events are for, by id
    known: Known | None  # where they are for one account: the names of its people too
    hands: Hands | None
    taken: list[Taken]  # by the hands
    due: set[str] = field(default_factory=set)  # what the workers are told after the commit


@dataclass(slots=True)
class _Resolved:
    """What is known of an event before its row is written."""

    class_: str
    account: AccountFacts | None = None  # for one account: its facts, and who there gets it
    verdict: Verdicts | None = None
    mails: int = 0
    listed: Collection[int] | None = None  # the accounts of a list, by number
    notes: Sequence[str] = ()
    status_page: dict[str, Any] | None = None


_INSTALLATION = "SELECT address_key, guard FROM installation"
_LIST = insert(event_accounts)


@lru_cache(maxsize=1)
def _insert_event(columns: tuple[str, ...]) -> str:
    """A row of `events`, where none has its source and id."""
    values = ", ".join([f":{name}" for name in columns])
    return (
        f"INSERT INTO events ({', '.join(columns)}) VALUES ({values})"  # noqa: S608 - our own names
        " ON CONFLICT (source, ce_id) DO NOTHING RETURNING id"
    )


_AS_WRITTEN = {field.name for field in fields(EventRow)} - {"id", "class_", "lane", "routing", "data"}


def _stored(values: Mapping[str, Any], event: Event, number: int) -> EventRow:
    """The row that was just written, as others read it."""
    return EventRow(
        id=number,
        class_=values["class"],
        lane=Lane(values["lane"]),
        routing=json.loads(values["routing"]),
        data=event.data,
        **{name: values[name] for name in _AS_WRITTEN},
    )


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
