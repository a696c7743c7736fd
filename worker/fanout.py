"""From an event to planned deliveries: accounts in pages, one pure resolver, one delivery per mailbox.

Promises: every contact of every account concerned has a stored verdict with its reason; a mailbox gets one delivery
per event however many accounts give a reason for it (each is a ground); a page and its checkpoint are one transaction,
so that a crash resumes where it stopped; memory does not grow with the audience. An event's slices are released when
it is wholly planned, so that each mail knows all its grounds.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, insert, select, text, update

from subscriptions import directory
from subscriptions.audience import AccountFacts, EventFacts, Excluded, Recipient, Verdicts, resolve
from subscriptions.catalogue import Catalogue
from subscriptions.database import Clock, Database, insert_into
from subscriptions.schema import catalogue_versions
from worker import feeding, ledger, logs, matters
from worker.ledger import Lane, Status
from worker.links import varint, varints
from worker.schema import deliveries, events, more_grounds, slices, verdict_shapes, verdicts
from worker.settings import DELIVERY_MODES, Team

logger = logs.get(__name__)

PAGE = 500
#: Accounts a transaction.
LARGE = 20_000
#: Deliveries from which on the database's statistics are renewed after planning (performance.md 2: a trap).


@dataclass(frozen=True, slots=True)
class EventRow:
    """An accepted event as the ledger holds it."""

    id: int
    ulid: str
    source: str
    ce_id: str
    type: str
    category: str
    class_: str
    lane: Lane
    scope: str
    routing: Mapping[str, Any]
    data: Mapping[str, Any]
    accepted_at: int
    mode: str
    not_before: int | None
    expires_at: int | None
    status: str
    sender_domain: str
    bounce_domain: str


def event_row(row: Any) -> EventRow:
    """A row of `events` as a value; a purged event has no data left."""
    payload = json.loads(row.payload) if row.payload else {}
    return EventRow(
        id=row.id,
        ulid=row.ulid,
        source=row.source,
        ce_id=row.ce_id,
        type=row.type,
        category=row.category,
        class_=row._mapping["class"],  # noqa: SLF001 - the public name of SQLAlchemy's row mapping
        lane=Lane(row.lane),
        scope=row.scope,
        routing=json.loads(row.routing) if row.routing else {},
        data=payload.get("data", {}),
        accepted_at=row.accepted_at,
        mode=row.mode,
        not_before=row.not_before,
        expires_at=row.expires_at,
        status=row.status,
        sender_domain=row.sender_domain,
        bounce_domain=row.bounce_domain,
    )


def event_facts(category: str, data: Mapping[str, Any], products: Sequence[str], *, attested: bool) -> EventFacts:
    """What the rules look at in an event.

    Without `attested`, who asked and who approved are taken as staff and as nobody (contract, section 3).
    """
    if category != "approval_request":
        return EventFacts(category=category, products=tuple(products))
    return EventFacts(
        category=category,
        products=tuple(products),
        action=data["action"],
        requested_by=data["requested_by"] if attested else "staff",
        approved_by=data.get("approved_by") if attested else None,
        acted_by=data.get("acted_by"),
        change=data.get("change"),
        context=frozenset(data.get("context") or ()),
    )


@dataclass(slots=True)
class Planner:
    """Turns verdicts into rows. One for a process; each transaction takes a `Planning` of its own."""

    catalogues: Mapping[str, Catalogue]
    delivery: str  # ROLECAST_DELIVERY
    team: Team
    _shapes: dict[str, int] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)

    def start(self, connection: Connection) -> Planning:
        """A planning inside the transaction of `connection`; call `keep` on it after the commit."""
        return Planning(self, connection)

    def mode_of(self, event_mode: str) -> str:
        """The stricter of the installation's mode and the key's."""
        return min(self.delivery, event_mode, key=DELIVERY_MODES.index)


@dataclass(slots=True)
class Planning:
    """The rows of one transaction."""

    planner: Planner
    connection: Connection
    _new_shapes: dict[str, int] = field(default_factory=dict)
    _new_versions: dict[str, int] = field(default_factory=dict)

    def keep(self) -> None:
        """After the commit: what was interned is known from now on."""
        self.planner._shapes.update(self._new_shapes)  # noqa: SLF001 - one object in two halves
        self.planner._versions.update(self._new_versions)  # noqa: SLF001

    def write(
        self,
        event: EventRow,
        answers: Sequence[tuple[AccountFacts, Verdicts]],
        *,
        next_n: int,
        now: int,
        owner: int,
    ) -> int:
        """Store verdicts and deliveries of a page; returns the next free number of a delivery.

        `next_n` is the first number to give. A mailbox that the event already writes to becomes a further ground.
        """
        shapes = self._intern(answers)
        self._store_verdicts(event.id, answers, shapes)
        unreached = matters.unreached(event.id, event.class_, (verdict for _, verdict in answers))
        matters.note(self.connection, owner, unreached, now=now)
        grounds = [
            (recipient.contact.mailbox, account.number, recipient.contact.number, shapes[_shape(recipient)], recipient)
            for account, verdict in answers
            for recipient in verdict.recipients
        ]
        if not grounds:
            return next_n
        known = {} if next_n == 1 else self._known(event.id, [ground[0] for ground in grounds])
        fresh: list[dict[str, Any]] = []
        further: list[dict[str, Any]] = []
        counts: Counter[tuple[int, Status]] = Counter()
        mode = self.planner.mode_of(event.mode)
        for mailbox, account, contact, shape, recipient in grounds:
            if mailbox in known:
                further.append(
                    {"event_id": event.id, "n": known[mailbox], "account_id": account, "contact_id": contact,
                     "shape_id": shape}
                )  # fmt: skip
                continue
            known[mailbox] = next_n
            held = mode == "test" or (mode == "team" and recipient.contact.email not in self.planner.team)
            status = Status.HELD if held else Status.PLANNED
            counts[event.id, status] += 1
            fresh.append(
                {"event_id": event.id, "n": next_n, "mailbox_id": mailbox, "account_id": account,
                 "contact_id": contact, "shape_id": shape, "status": int(status), "reason": mode if held else None,
                 "settled_at": now if held else None}
            )  # fmt: skip
            next_n += 1
        if fresh:
            self.connection.execute(insert(deliveries), fresh)
        if further:
            self.connection.execute(insert(more_grounds), further)
        ledger.add_tallies(self.connection, owner, counts)
        return next_n

    def _known(self, event_id: int, boxes: Sequence[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for start in range(0, len(boxes), 5000):
            rows = self.connection.execute(
                select(deliveries.c.mailbox_id, deliveries.c.n).where(
                    deliveries.c.event_id == event_id, deliveries.c.mailbox_id.in_(boxes[start : start + 5000])
                )
            )
            found.update((row.mailbox_id, row.n) for row in rows)
        return found

    def _store_verdicts(
        self, event_id: int, answers: Sequence[tuple[AccountFacts, Verdicts]], shapes: Mapping[str, int]
    ) -> None:
        rows = []
        for account, verdict in answers:
            pairs = [(one.contact.number, shapes[_shape(one)]) for one in _verdicts(verdict)]
            rows.append(
                {
                    "event_id": event_id,
                    "account_id": account.number,
                    "catalogue_version": self._version(account.catalogue),
                    "outcome": verdict.outcome,
                    "reason": verdict.reason,
                    "warnings": ",".join(verdict.warnings),
                    "packed": pack(pairs),
                }
            )
        if rows:
            self.connection.execute(insert(verdicts), rows)

    def _intern(self, answers: Sequence[tuple[AccountFacts, Verdicts]]) -> Mapping[str, int]:
        wanted = {_shape(one) for _, verdict in answers for one in _verdicts(verdict)}
        known = self.planner._shapes  # noqa: SLF001
        missing = sorted(body for body in wanted if body not in known and body not in self._new_shapes)
        if missing:
            self.connection.execute(
                insert_into(self.connection, verdict_shapes).on_conflict_do_nothing(),
                [{"body": body} for body in missing],
            )
            rows = self.connection.execute(
                select(verdict_shapes.c.body, verdict_shapes.c.id).where(verdict_shapes.c.body.in_(missing))
            )
            self._new_shapes.update((row.body, row.id) for row in rows)
        return {body: known.get(body) or self._new_shapes[body] for body in wanted}

    def _version(self, key: str) -> int:
        found = self.planner._versions.get(key) or self._new_versions.get(key)  # noqa: SLF001
        if found:
            return found
        catalogue = self.planner.catalogues[key]
        table = catalogue_versions
        query = select(table.c.id).where(table.c.key == key, table.c.version == catalogue.version)
        number: int | None = self.connection.execute(query).scalar_one_or_none()
        if number is None:
            # Another process may store the same version now: then its row is ours too.
            self.connection.execute(
                insert_into(self.connection, table)
                .values(key=key, version=catalogue.version, body=catalogue.body, since=time.time_ns() // 1000)
                .on_conflict_do_nothing()
            )
            number = int(self.connection.execute(query).scalar_one())
        self._new_versions[key] = number
        return number


def _verdicts(verdict: Verdicts) -> Iterator[Recipient | Excluded]:
    yield from verdict.recipients
    yield from verdict.excluded


def _shape(one: Recipient | Excluded) -> str:
    """A verdict without its contact, as text: [delivery, matched, dropped, deduplicated]."""
    if isinstance(one, Recipient):
        return json.dumps([one.delivery, one.matched, one.dropped, one.deduplicated], separators=(",", ":"))
    return json.dumps([None, [], one.dropped, False], separators=(",", ":"))


def pack(pairs: Iterable[tuple[int, int]]) -> bytes:
    """(contact, shape) pairs as varints: the distance to the contact before, and the shape."""
    out, before = bytearray(), 0
    for contact, shape in sorted(pairs):
        out += varint(contact - before) + varint(shape)
        before = contact
    return bytes(out)


def unpack(packed: bytes) -> list[tuple[int, int]]:
    """The (contact, shape) pairs that `pack` wrote."""
    numbers = varints(packed)
    pairs, contact = [], 0
    for distance, shape in zip(numbers[::2], numbers[1::2], strict=True):
        contact += distance
        pairs.append((contact, shape))
    return pairs


# ---------------------------------------------------------------- one account, inside the accepting transaction


def plan_one(
    planning: Planning, event: EventRow, account: AccountFacts, verdict: Verdicts, *, now: int, owner: int
) -> None:
    """Plan an event for one account: verdicts, deliveries, slices, and the event's state."""
    next_n = planning.write(event, [(account, verdict)], next_n=1, now=now, owner=owner)
    feeding.make_slices(planning.connection, event.id, event.lane, first_n=1, last_n=next_n - 1, due_at=now)
    planning.connection.execute(
        update(events)
        .where(events.c.id == event.id)
        .values(
            status="sending" if next_n > 1 else "done",
            next_n=next_n,
            planned_at=now,
            guard_at_plan=ledger.guard(planning.connection),
        )
    )


# ---------------------------------------------------------------- broadcasts, page by page


def take_event(connection: Connection, worker: int, *, now: int) -> EventRow | None:
    """Take over the planning of an event that waits for it: accepted and due, or left by a vanished worker."""
    row = connection.execute(
        select(events)
        .where(events.c.status.in_(["accepted", "planning"]), events.c.plan_owner.is_(None))
        .where((events.c.not_before.is_(None)) | (events.c.not_before <= now))
        .order_by(events.c.lane, events.c.id)
        .limit(1)
    ).one_or_none()
    if row is None:
        return None
    taken = connection.execute(
        update(events)
        .where(events.c.id == row.id, events.c.plan_owner.is_(None), events.c.plan_epoch == row.plan_epoch)
        .values(
            plan_owner=worker,
            plan_epoch=row.plan_epoch + 1,
            status="planning",
            # As it stood before the first page: what changes while pages are planned is checked before sending.
            guard_at_plan=ledger.guard(connection) if row.status == "accepted" else row.guard_at_plan,
        )
    ).rowcount
    return event_row(row) if taken else None


def plan_event(
    database: Database,
    planner: Planner,
    event: EventRow,
    worker: int,
    *,
    clock: Clock,
    go_on: Callable[[], bool],
    page: int = PAGE,
) -> None:
    """Plan an event that this worker took over, page by page, until it is done or `go_on` says stop.

    Between pages the database rests as long as the page took, so that publishers are not kept waiting.
    """
    more = True
    while more and go_on():
        began = time.monotonic()
        with database.write() as connection:
            planning = planner.start(connection)
            more = _plan_page(planning, event, worker, now=clock(), page=page)
        planning.keep()
        if more:
            time.sleep(min(0.25, time.monotonic() - began))
    if more:
        return
    logger.info("event.planned", event_id=event.ulid)


def _plan_page(planning: Planning, event: EventRow, worker: int, *, now: int, page: int) -> bool:
    """One page; False when the event is wholly planned, cancelled, or another worker has it."""
    connection = planning.connection
    state = connection.execute(
        select(events.c.plan_after_account, events.c.next_n, events.c.plan_owner, events.c.status)
        .where(events.c.id == event.id)
        .with_for_update()  # nobody takes the event over while a page of it is written
    ).one()
    if state.plan_owner != worker or state.status != "planning":
        return False
    accounts = directory.facts(
        connection,
        planning.planner.catalogues,
        after=state.plan_after_account,
        limit=page,
        only=[event.routing["account"]] if event.scope == "one" else None,
        scope_event=event.id if event.scope == "list" else None,
    )
    facts = event_facts(
        event.category, event.data, event.routing.get("products", ()), attested=event.routing.get("attested", False)
    )
    answers = [(one, resolve(planning.planner.catalogues[one.catalogue], one, facts)) for one in accounts]
    next_n = planning.write(event, answers, next_n=state.next_n, now=now, owner=worker)
    feeding.make_slices(connection, event.id, event.lane, first_n=state.next_n, last_n=next_n - 1, due_at=None)
    if len(accounts) == page:
        connection.execute(
            update(events).where(events.c.id == event.id).values(plan_after_account=accounts[-1].number, next_n=next_n)
        )
        if next_n > LARGE >= state.next_n:
            connection.execute(text("ANALYZE deliveries"))
        return True
    connection.execute(
        update(slices).where(slices.c.event_id == event.id, slices.c.due_at.is_(None)).values(due_at=now)
    )
    connection.execute(
        update(events)
        .where(events.c.id == event.id)
        .values(
            status="sending" if next_n > 1 else "done",
            next_n=next_n,
            planned_at=now,
            plan_owner=None,
            plan_after_account=accounts[-1].number if accounts else state.plan_after_account,
        )
    )
    return False
