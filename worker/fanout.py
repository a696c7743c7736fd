"""From an event to planned deliveries: accounts in pages, one pure resolver, one delivery per mailbox.

Promises: every contact of every account concerned has a stored verdict with its reason; a mailbox gets one delivery
per event however many accounts give a reason for it (each is a ground); a page and its checkpoint are one transaction,
so that a crash resumes where it stopped; memory does not grow with the audience.

A page is read and resolved in a reading transaction and written in a short one, so that publishers are hardly kept
waiting. What changes in between is seen by the senders as what changes later is: the event's guard was taken before
its first page. A delivery whose mailbox no other contact has is released with its page; the others are when the event
is wholly planned, so that each mail knows all its grounds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from sqlalchemy import Connection, select, text, update

from subscriptions import directory
from subscriptions.audience import AccountFacts, Drop, EventFacts, Match, Verdicts, resolve
from subscriptions.bulk import insert_rows, read_columns
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
FIRST_PAGE = 50
#: Accounts of the first page of an event: sending begins at once.
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


Shape = tuple[str | None, tuple[Match, ...], tuple[Drop, ...], bool]
"""A verdict without its contact: delivery (None: excluded), matched, dropped, deduplicated."""


@dataclass(slots=True)
class Rows:
    """Resolved accounts as the ledger keeps them."""

    verdicts: list[tuple[Any, ...]]  # rows of `verdicts`
    grounds: list[tuple[int, int, int, int, str]]  # mailbox, account, contact, shape, normalised address
    unreached: Mapping[tuple[int, str], int]  # as `matters.note` takes it


@dataclass(slots=True)
class Planner:
    """Turns verdicts into rows. One for a process; each transaction takes a `Planning` of its own."""

    catalogues: Mapping[str, Catalogue]
    delivery: str  # ROLECAST_DELIVERY
    team: Team
    _shapes: dict[Shape, int] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)

    def start(self, connection: Connection) -> Planning:
        """A planning inside the transaction of `connection`; call `keep` on it after the commit."""
        return Planning(self, connection)

    def mode_of(self, event_mode: str) -> str:
        """The stricter of the installation's mode and the key's."""
        return min(self.delivery, event_mode, key=DELIVERY_MODES.index)

    def rows(
        self, event: EventRow, answers: Sequence[tuple[AccountFacts, Verdicts]], planning: Planning | None = None
    ) -> Rows | None:
        """The verdicts as rows; None where a shape or a catalogue's version has no number yet: `Planning.intern`.

        `planning` is the transaction that interned what others do not see yet.
        """
        shapes, versions = self._shapes, self._versions
        if planning is not None and (planning.new_shapes or planning.new_versions):
            shapes, versions = shapes | planning.new_shapes, versions | planning.new_versions
        shape_of, version_of = shapes.get, versions.get
        event_id, stored, grounds = event.id, [], []
        for account, verdict in answers:
            number, pairs = account.number, []
            for one in verdict.recipients:
                contact = one.contact
                shape = shape_of((one.delivery, one.matched, one.dropped, one.deduplicated))
                if shape is None:
                    return None
                pairs.append((contact.number, shape))
                grounds.append((contact.mailbox, number, contact.number, shape, contact.email))
            for other in verdict.excluded:
                shape = shape_of((None, (), other.dropped, False))
                if shape is None:
                    return None
                pairs.append((other.contact.number, shape))
            version = version_of(account.catalogue)
            if version is None:
                return None
            warnings = ",".join(verdict.warnings)
            stored.append((event_id, number, version, verdict.outcome, verdict.reason, warnings, pack(pairs)))
        return Rows(stored, grounds, matters.unreached(event_id, event.class_, [verdict for _, verdict in answers]))


@dataclass(slots=True)
class Planning:
    """The rows of one transaction."""

    planner: Planner
    connection: Connection
    new_shapes: dict[Shape, int] = field(default_factory=dict)
    new_versions: dict[str, int] = field(default_factory=dict)
    stored: Sequence[tuple[Any, ...]] = ()  # the last rows of `deliveries`

    def keep(self) -> None:
        """After the commit: what was interned is known from now on."""
        self.planner._shapes.update(self.new_shapes)  # noqa: SLF001 - one object in two halves
        self.planner._versions.update(self.new_versions)  # noqa: SLF001

    def write(
        self,
        event: EventRow,
        answers: Sequence[tuple[AccountFacts, Verdicts]],
        *,
        next_n: int,
        now: int,
        owner: int,
    ) -> int:
        """Store the verdicts and deliveries of an event for one account; returns the next free number of a delivery.

        `next_n` is the first number to give.
        """
        rows = self.planner.rows(event, answers, self)
        if rows is None:
            self.intern(answers)
            rows = self.planner.rows(event, answers, self)
            assert rows is not None
        return self.store(event, rows, rows.grounds, known={}, next_n=next_n, now=now, owner=owner)

    def store(
        self,
        event: EventRow,
        rows: Rows,
        grounds: Iterable[tuple[int, int, int, int, str]],
        *,
        known: dict[int, int],
        next_n: int,
        now: int,
        owner: int,
    ) -> int:
        """Store verdicts, and a delivery for each ground's mailbox in this order; returns the next free number.

        `known` is which mailboxes the event writes to already, with the number of the delivery: they become further
        grounds. It grows by what is new.
        """
        fresh: list[tuple[Any, ...]] = []
        further: list[tuple[int, int, int, int, int]] = []
        event_id, held = event.id, 0
        mode = self.planner.mode_of(event.mode)
        for mailbox, account, contact, shape, address in grounds:
            if mailbox in known:
                further.append((event_id, known[mailbox], account, contact, shape))
                continue
            known[mailbox] = next_n
            if mode == "test" or (mode == "team" and address not in self.planner.team):
                held += 1
                state: tuple[Any, ...] = (int(Status.HELD), mode, now)
            else:
                state = _PLANNED
            fresh.append((event_id, next_n, mailbox, account, contact, shape, *state))
            next_n += 1
        self.stored = fresh
        insert_rows(self.connection, verdicts, _VERDICT, rows.verdicts)
        insert_rows(self.connection, deliveries, _DELIVERY, fresh)
        insert_rows(self.connection, more_grounds, _GROUND, further)
        matters.note(self.connection, owner, rows.unreached, now=now)
        counts = {(event_id, Status.PLANNED): len(fresh) - held, (event_id, Status.HELD): held}
        ledger.add_tallies(self.connection, owner, counts)
        return next_n

    def intern(self, answers: Sequence[tuple[AccountFacts, Verdicts]]) -> None:
        """Give numbers to the shapes and the versions of catalogues that have none yet."""
        wanted: set[Shape] = set()
        for account, verdict in answers:
            wanted |= {(one.delivery, one.matched, one.dropped, one.deduplicated) for one in verdict.recipients}
            wanted |= {(None, (), one.dropped, False) for one in verdict.excluded}
            self._version(account.catalogue)
        known = self.planner._shapes  # noqa: SLF001
        bodies = {shape_text(shape): shape for shape in wanted if shape not in known}
        if not bodies:
            return
        self.connection.execute(
            insert_into(self.connection, verdict_shapes).on_conflict_do_nothing(),
            [{"body": body} for body in sorted(bodies)],
        )
        rows = self.connection.execute(
            select(verdict_shapes.c.body, verdict_shapes.c.id).where(verdict_shapes.c.body.in_(sorted(bodies)))
        )
        self.new_shapes.update((bodies[row.body], row.id) for row in rows)

    def _version(self, key: str) -> None:
        if key in self.planner._versions or key in self.new_versions:  # noqa: SLF001
            return
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
        self.new_versions[key] = number


_VERDICT = ("event_id", "account_id", "catalogue_version", "outcome", "reason", "warnings", "packed")
_DELIVERY = (
    "event_id", "n", "mailbox_id", "account_id", "contact_id", "shape_id", "status", "reason", "settled_at"
)  # fmt: skip
_GROUND = ("event_id", "n", "account_id", "contact_id", "shape_id")
_PLANNED = (int(Status.PLANNED), None, None)


def planned_now(planning: Planning) -> list[tuple[int, int, int, int, int]]:
    """The deliveries that were stored last and may leave: number, mailbox, account, contact, shape."""
    return [row[1:6] for row in planning.stored if row[6:] == _PLANNED]


def shape_text(shape: Shape) -> str:
    """A shape as it is stored: JSON of its four parts."""
    return json.dumps(shape, separators=(",", ":"))


def pack(pairs: Iterable[tuple[int, int]]) -> bytes:
    """(contact, shape) pairs as varints: the distance to the contact before, and the shape."""
    out, before = bytearray(), 0
    for contact, shape in sorted(pairs):
        distance = contact - before
        if distance < 128 and shape < 128:  # a byte each, as most are: a broadcast makes a million of them
            out.append(distance)
            out.append(shape)
        else:
            out += varint(distance) + varint(shape)
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


# ---------------------------------------------------------------- broadcasts, page by page


def take_event(connection: Connection, worker: int, *, now: int, waited: int = 0) -> EventRow | None:
    """Take over the planning of an event that waits for it: accepted and due, or left by a vanished worker.

    With `waited` only one that was accepted so many microseconds ago.
    """
    row = connection.execute(
        select(events)
        .where(events.c.status.in_(["accepted", "planning"]), events.c.plan_owner.is_(None))
        .where((events.c.not_before.is_(None)) | (events.c.not_before <= now))
        .where(events.c.accepted_at <= (now - waited if waited else ledger.NEVER))
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
    released: Callable[[], None] = lambda: None,
) -> None:
    """Plan an event that this worker took over, page by page, until it is done or `go_on` says stop.

    `released` is called after each page of which something may be sent. On SQLite a page is not written before others
    could write for as long as the page before took, so that publishers are not kept waiting.
    """
    with database.read() as connection:
        place: _Place | None = _place(connection, event.id)
    size, free_at = min(page, FIRST_PAGE), 0.0
    while place is not None and not place.last and go_on():
        found = _read_page(database, planner, event, place, size)
        time.sleep(max(0.0, min(0.25, free_at - time.monotonic())))
        with database.write() as connection:
            began = time.monotonic()
            place = _write_page(planner.start(connection), event, worker, found, now=clock())
        if database.dialect == "sqlite":
            ended = time.monotonic()
            free_at = ended + (ended - began)
        size = page
        released()
    if place is not None and place.last:
        logger.info("event.planned", event_id=event.ulid)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the planning of an event stands."""

    after: int  # the last account
    next_n: int
    epoch: int
    last: bool = False  # wholly planned


@dataclass(frozen=True, slots=True)
class _Page:
    """A page of accounts, read and resolved."""

    place: _Place  # where it begins
    after: int  # its last account
    last: bool  # no account comes after it
    rows: Rows
    known: dict[int, int]  # mailboxes of it that the event writes to already: the number of the delivery
    shared: Set[int]  # mailboxes of it that further contacts have: another page may give them further grounds


def _place(connection: Connection, event_id: int) -> _Place:
    columns = (events.c.plan_after_account, events.c.next_n, events.c.plan_epoch)
    after, next_n, epoch = connection.execute(select(*columns).where(events.c.id == event_id)).one()
    return _Place(after, next_n, epoch)


def _read_page(database: Database, planner: Planner, event: EventRow, place: _Place, limit: int) -> _Page:
    facts = event_facts(
        event.category, event.data, event.routing.get("products", ()), attested=event.routing.get("attested", False)
    )
    with database.read() as connection:
        accounts = directory.facts(
            connection,
            planner.catalogues,
            after=place.after,
            limit=limit,
            only=[event.routing["account"]] if event.scope == "one" else None,
            scope_event=event.id if event.scope == "list" else None,
        )
        answers = [(one, resolve(planner.catalogues[one.catalogue], one, facts)) for one in accounts]
        boxes = [recipient.contact.mailbox for _, verdict in answers for recipient in verdict.recipients]
        known = {} if place.next_n == 1 else _known(connection, event.id, boxes)
        shared = set() if event.scope == "one" else directory.shared(connection, boxes)
    rows = planner.rows(event, answers)
    if rows is None:
        with database.write() as connection:
            planning = planner.start(connection)
            planning.intern(answers)
        planning.keep()
        rows = planner.rows(event, answers)
        assert rows is not None
    after = accounts[-1].number if accounts else place.after
    return _Page(place, after, len(accounts) < limit, rows, known, shared)


def _known(connection: Connection, event_id: int, boxes: list[int]) -> dict[int, int]:
    rest = "FROM deliveries WHERE event_id = :event AND mailbox_id AMONG :boxes"
    found = read_columns(connection, ("mailbox_id", "n"), rest, event=event_id, boxes=boxes)
    return dict(zip(*found, strict=True))


def _write_page(planning: Planning, event: EventRow, worker: int, page: _Page, *, now: int) -> _Place | None:
    """Store a page, and where the planning stands now; None where the event was cancelled, or another worker has it."""
    connection, place = planning.connection, page.place
    ours = (events.c.id == event.id) & (events.c.plan_owner == worker) & (events.c.plan_epoch == place.epoch)
    stands = (events.c.status == "planning") & (events.c.plan_after_account == place.after)
    # The first statement: nobody takes the event over while a page of it is written.
    if not connection.execute(update(events).where(ours & stands).values(plan_after_account=page.after)).rowcount:
        return None
    alone = [ground for ground in page.rows.grounds if ground[0] not in page.shared]
    others = [ground for ground in page.rows.grounds if ground[0] in page.shared]
    ready_n = place.next_n + sum(ground[0] not in page.known for ground in alone)
    grounds = chain(alone, others)
    next_n = planning.store(event, page.rows, grounds, known=page.known, next_n=place.next_n, now=now, owner=worker)
    feeding.make_slices(connection, event.id, event.lane, first_n=place.next_n, last_n=ready_n - 1, due_at=now)
    feeding.make_slices(connection, event.id, event.lane, first_n=ready_n, last_n=next_n - 1, due_at=None)
    values: dict[str, object] = {"next_n": next_n}
    if page.last:
        _release(connection, event.id, now=now)
        values |= {"status": "sending" if next_n > 1 else "done", "planned_at": now, "plan_owner": None}
    connection.execute(update(events).where(events.c.id == event.id).values(**values))
    if next_n > LARGE >= place.next_n:
        if connection.dialect.name == "sqlite":
            connection.execute(text("PRAGMA analysis_limit = 1000"))  # or it would read the table, and others wait
        connection.execute(text("ANALYZE deliveries"))
    return _Place(page.after, next_n, place.epoch, page.last)


def _release(connection: Connection, event_id: int, *, now: int) -> None:
    """Let go what waited for further grounds."""
    waiting = (slices.c.event_id == event_id) & slices.c.due_at.is_(None) & slices.c.done_at.is_(None)
    connection.execute(update(slices).where(waiting).values(due_at=now))
