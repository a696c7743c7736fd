"""From an event to planned deliveries: accounts in pages, one pure resolver, one delivery per mailbox.

Promises: every contact of every account concerned has a stored verdict with its reason; a mailbox gets one delivery
per event however many accounts give a reason for it (each is a ground); a page and its checkpoint are one transaction,
so that a crash resumes where it stopped; memory does not grow with the audience.

Accounts of one constellation, whose contacts stand alike, are resolved once, by the same resolver. A page is read and
resolved in a reading transaction and written in a short one, so that publishers are hardly kept waiting. What changes
in between is seen by the senders as what changes later is: the event's guard was taken before its first page. A
delivery whose mailbox no other contact has is released with its page; the others are when the event is wholly
planned, so that each mail knows all its grounds.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, select, text, update

from subscriptions import directory
from subscriptions.audience import AccountFacts, Drop, EventFacts, Match, Verdicts, resolve
from subscriptions.bulk import RowStands, insert_rows, read_columns
from subscriptions.catalogue import Catalogue
from subscriptions.database import Clock, Database, insert_into
from subscriptions.directory import Constellation, Page
from subscriptions.schema import catalogue_versions
from worker import feeding, ledger, logs, matters
from worker.ledger import Lane, Status
from worker.links import varint, varints
from worker.schema import deliveries, events, more_grounds, slices, verdict_shapes, verdicts
from worker.settings import DELIVERY_MODES, Team

logger = logs.get(__name__)

PAGE = 1000
#: Accounts a transaction.
FIRST_PAGE = 50
#: Accounts of the first page of an event: sending begins at once.
MOST_ALIKE = 10_000
#: Constellations that are remembered while an event is planned.
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


Ground = tuple[int, int, int, int]
"""Mailbox, account, contact, shape."""


Stored = tuple[int, int, str, str, bytes | bytearray]
"""Account, catalogue's version, outcome, warnings, packed."""


@dataclass(slots=True)
class Rows:
    """Resolved accounts as the ledger keeps them, but for what is told by the event."""

    verdicts: dict[str | None, list[Stored]]  # by reason
    grounds: list[Ground]  # each of another mailbox, to which the event writes for the first time
    waiting: list[Ground]  # of mailboxes for which there may be further grounds
    unreached: Mapping[tuple[int, str], int]  # as `matters.note` takes it


@dataclass(slots=True)
class Numbered:
    """Rows with the numbers of their deliveries."""

    rows: Rows
    deliveries: list[tuple[int, int, int, int, int]]  # n, and a ground
    held: list[tuple[int, int, int, int, int]]  # the same, of those that may not be sent
    further: list[tuple[int, int, int, int]]  # n, account, contact, shape
    ready_n: int  # behind the last delivery that may be sent at once
    next_n: int  # behind the last one


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
        stored: dict[str | None, list[Stored]] = {}
        grounds = []
        for account, verdict in answers:
            number, pairs = account.number, []
            for one in verdict.recipients:
                contact = one.contact
                shape = shape_of((one.delivery, one.matched, one.dropped, one.deduplicated))
                if shape is None:
                    return None
                pairs.append((contact.number, shape))
                grounds.append((contact.mailbox, number, contact.number, shape))
            for other in verdict.excluded:
                shape = shape_of((None, (), other.dropped, False))
                if shape is None:
                    return None
                pairs.append((other.contact.number, shape))
            version = version_of(account.catalogue)
            if version is None:
                return None
            warnings = ",".join(verdict.warnings)
            stored.setdefault(verdict.reason, []).append((number, version, verdict.outcome, warnings, pack(pairs)))
        unreached = matters.unreached(event.id, event.class_, [verdict for _, verdict in answers])
        return Rows(stored, grounds, [], unreached)

    def number(
        self, connection: Connection, event: EventRow, rows: Rows, *, known: dict[int, int], next_n: int
    ) -> Numbered:
        """Give each delivery its number, `next_n` the first one, and find those that may not be sent in this mode.

        `known` is which mailboxes the event writes to already, with the number of the delivery: what waits becomes a
        further ground there. It grows by what is new.
        """
        fresh = [(n, *ground) for n, ground in enumerate(rows.grounds, next_n)]
        ready_n = next_n = next_n + len(fresh)
        further = []
        for mailbox, account, contact, shape in rows.waiting:
            if mailbox in known:
                further.append((known[mailbox], account, contact, shape))
            else:
                known[mailbox] = next_n
                fresh.append((next_n, mailbox, account, contact, shape))
                next_n += 1
        mode = self.mode_of(event.mode)
        if mode == "live":
            return Numbered(rows, fresh, [], further, ready_n, next_n)
        found = directory.addresses(connection, [one[1] for one in fresh]) if mode == "team" else {}
        may_leave = {box for box, address in found.items() if address in self.team}
        held = [one for one in fresh if one[1] not in may_leave]
        fresh = [one for one in fresh if one[1] in may_leave]
        return Numbered(rows, fresh, held, further, ready_n, next_n)


@dataclass(slots=True)
class Planning:
    """The rows of one transaction."""

    planner: Planner
    connection: Connection
    new_shapes: dict[Shape, int] = field(default_factory=dict)
    new_versions: dict[str, int] = field(default_factory=dict)
    planned: Sequence[tuple[int, int, int, int, int]] = ()  # what `write` stored and may leave, as in `Numbered`

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
        numbered = self.planner.number(self.connection, event, rows, known={}, next_n=next_n)
        self.store(event, numbered, now=now, owner=owner)
        self.planned = numbered.deliveries
        return numbered.next_n

    def store(self, event: EventRow, page: Numbered, *, now: int, owner: int) -> None:
        """Store verdicts, deliveries and further grounds, and count them. Raises `RowStands`."""
        connection, of_event = self.connection, {"event_id": event.id}
        for reason, stored in page.rows.verdicts.items():
            insert_rows(connection, verdicts, _VERDICT, stored, of_event | {"reason": reason})
        insert_rows(connection, deliveries, _DELIVERY, page.deliveries, of_event | {"status": int(Status.PLANNED)})
        if page.held:
            why = {"status": int(Status.HELD), "reason": self.planner.mode_of(event.mode), "settled_at": now}
            insert_rows(connection, deliveries, _DELIVERY, page.held, of_event | why)
        insert_rows(connection, more_grounds, _GROUND, page.further, of_event)
        matters.note(connection, owner, page.rows.unreached, now=now)
        counts = {(event.id, Status.PLANNED): len(page.deliveries), (event.id, Status.HELD): len(page.held)}
        ledger.add_tallies(connection, owner, counts)

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


_VERDICT = ("account_id", "catalogue_version", "outcome", "warnings", "packed")
_DELIVERY = ("n", "mailbox_id", "account_id", "contact_id", "shape_id")
_GROUND = ("n", "account_id", "contact_id", "shape_id")


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


def unpack(packed: bytes | bytearray) -> list[tuple[int, int]]:
    """The (contact, shape) pairs that `pack` wrote."""
    numbers = varints(bytes(packed))
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
    reading = _Reading(database, planner, event)
    size, free_at = min(page, FIRST_PAGE), 0.0
    while place is not None and not place.last and go_on():
        begins = place
        found = reading.page(begins, size)
        time.sleep(max(0.0, min(0.25, free_at - time.monotonic())))
        began = time.monotonic()
        try:
            place = _write(database, planner, event, worker, found, now=clock())
        except RowStands:  # a contact got the address of one that was planned: only then is it in no other contact's
            found = reading.page(begins, size, careful=True)
            place = _write(database, planner, event, worker, found, now=clock())
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
    numbered: Numbered


def _place(connection: Connection, event_id: int) -> _Place:
    columns = (events.c.plan_after_account, events.c.next_n, events.c.plan_epoch)
    after, next_n, epoch = connection.execute(select(*columns).where(events.c.id == event_id)).one()
    return _Place(after, next_n, epoch)


@dataclass(slots=True)
class _Alike:
    """What is stored of every account of a constellation."""

    reason: str | None
    verdict: tuple[int, str, str]  # catalogue's version, outcome, warnings
    shapes: tuple[int, ...]  # of each contact, in the order of the page
    told: tuple[tuple[int, int], ...]  # place and shape of those who get a copy
    unreached: Mapping[tuple[int, str], int]
    packed: dict[tuple[int, ...], bytes] = field(default_factory=dict)  # by distances: behind the first number

    def pack(self, contacts: Sequence[int]) -> bytearray:
        """The packed verdicts of an account with these contacts, as `pack` makes them.

        A bytearray, since SQLite's driver takes it at once: it looks for adapters of bytes.
        """
        if not contacts:
            return bytearray()
        first = min(contacts)
        distances = tuple([number - first for number in contacts])
        rest = self.packed.get(distances)
        if rest is None:
            rest = self.packed[distances] = pack(zip(distances, self.shapes, strict=True))[1:]
        packed = bytearray(varint(first))
        packed += rest
        return packed


@dataclass(slots=True)
class _Reading:
    """Reads and resolves the pages of an event. Accounts that are alike are resolved once."""

    database: Database
    planner: Planner
    event: EventRow
    facts: EventFacts = field(init=False)
    alike: dict[Constellation, _Alike] = field(default_factory=dict)

    def __post_init__(self) -> None:
        event = self.event
        products, attested = event.routing.get("products", ()), event.routing.get("attested", False)
        self.facts = event_facts(event.category, event.data, products, attested=attested)

    def page(self, place: _Place, limit: int, *, careful: bool = False) -> _Page:
        """The page of so many accounts behind a place.

        `careful`: also mailboxes that one contact alone has are looked for among those that the event writes to.
        """
        event, catalogues = self.event, self.planner.catalogues
        only = [event.routing["account"]] if event.scope == "one" else None
        listed = event.id if event.scope == "list" else None
        with self.database.read() as connection:
            page = directory.read_page(
                connection,
                catalogues,
                after=place.after,
                limit=limit,
                only=only,
                scope_event=listed,
                products=bool(self.facts.products),
            )
            if self.facts.action is not None:  # what a request says depends on who is who
                accounts = directory.facts(connection, catalogues, after=place.after, limit=limit, only=only)
            asked = page.mailboxes if careful else list(page.shared)
            known = _known(connection, event.id, asked) if place.next_n > 1 and asked else {}
        rows = self._rows(page) if self.facts.action is None else self._resolved(accounts)
        if careful:
            rows.waiting += [ground for ground in rows.grounds if ground[0] in known]
            rows.grounds = [ground for ground in rows.grounds if ground[0] not in known]
        with self.database.read() as connection:
            numbered = self.planner.number(connection, event, rows, known=known, next_n=place.next_n)
        after = page.accounts[-1] if page.accounts else place.after
        return _Page(place, after, len(page.accounts) < limit, numbered)

    def _resolved(self, accounts: Sequence[AccountFacts]) -> Rows:
        """The rows of accounts, each resolved by itself."""
        catalogues, planner = self.planner.catalogues, self.planner
        answers = [(one, resolve(catalogues[one.catalogue], one, self.facts)) for one in accounts]
        rows = planner.rows(self.event, answers)
        if rows is None:
            with self.database.write() as connection:
                planning = planner.start(connection)
                planning.intern(answers)
            planning.keep()
            rows = planner.rows(self.event, answers)
            assert rows is not None
        return rows

    def _rows(self, page: Page) -> Rows:
        """The rows of a page: `_resolved` says what is stored of an account, and the same of each that is alike."""
        constellations = page.constellations(self.facts.category)
        self._learn(constellations)
        shared = page.shared if self.event.scope != "one" else frozenset()
        stored = defaultdict[str | None, list[Stored]](list)
        unreached = Counter[tuple[int, str]]()
        rows = Rows(stored, [], [], unreached)
        alike, start = self.alike, 0
        for account, constellation, end in zip(page.accounts, constellations, page.ends, strict=True):
            one, contacts, boxes = alike[constellation], page.contacts[start:end], page.mailboxes[start:end]
            stored[one.reason].append((account, *one.verdict, one.pack(contacts)))
            grounds = [(boxes[place], account, contacts[place], shape) for place, shape in one.told]
            if shared and not shared.isdisjoint(boxes):
                rows.waiting += [ground for ground in grounds if ground[0] in shared]
                rows.grounds += [ground for ground in grounds if ground[0] not in shared]
            else:
                rows.grounds += grounds
            if one.unreached:
                unreached.update(one.unreached)
            start = end
        return rows

    def _learn(self, constellations: Sequence[Constellation]) -> None:
        """Resolve a stand-in for each constellation that was not seen yet."""
        if len(self.alike) > MOST_ALIKE:
            self.alike.clear()
        new = list(dict.fromkeys(constellations) if not self.alike else set(constellations) - self.alike.keys())
        if not new:
            return
        accounts = [directory.stand_in(one, self.facts.category, number=number) for number, one in enumerate(new)]
        rows = self._resolved(accounts)
        told: dict[int, list[tuple[int, int]]] = {}
        for _, number, place, shape in rows.grounds:
            told.setdefault(number, []).append((place, shape))
        for reason, stored in rows.verdicts.items():
            for number, version, outcome, warnings, packed in stored:
                shapes = tuple([shape for _, shape in unpack(packed)])
                unreached = matters.unreached(self.event.id, self.event.class_, [Verdicts(outcome, reason, "")])
                verdict, copies = (version, outcome, warnings), tuple(told.get(number, ()))
                self.alike[new[number]] = _Alike(reason, verdict, shapes, copies, unreached)


def _known(connection: Connection, event_id: int, boxes: Sequence[int]) -> dict[int, int]:
    rest = "FROM deliveries WHERE event_id = :event AND mailbox_id AMONG :boxes"
    found = read_columns(connection, ("mailbox_id", "n"), rest, event=event_id, boxes=list(boxes))
    return dict(zip(*found, strict=True))


def _write(
    database: Database, planner: Planner, event: EventRow, worker: int, page: _Page, *, now: int
) -> _Place | None:
    """Store a page, and where the planning stands now; None where the event was cancelled, or another worker has it.

    Raises `RowStands` where the event writes to one of the page's mailboxes already.
    """
    place, numbered = page.place, page.numbered
    values: dict[str, object] = {"plan_after_account": page.after, "next_n": numbered.next_n}
    if page.last:
        status = "sending" if numbered.next_n > 1 else "done"
        values |= {"status": status, "planned_at": now, "plan_owner": None}
    with database.write() as connection:
        ours = (events.c.id == event.id) & (events.c.plan_owner == worker) & (events.c.plan_epoch == place.epoch)
        stands = (events.c.status == "planning") & (events.c.plan_after_account == place.after)
        # The first statement: nobody takes the event over while a page of it is written.
        if not connection.execute(update(events).where(ours & stands).values(**values)).rowcount:
            return None
        planner.start(connection).store(event, numbered, now=now, owner=worker)
        ready_n, next_n = numbered.ready_n, numbered.next_n
        feeding.make_slices(connection, event.id, event.lane, first_n=place.next_n, last_n=ready_n - 1, due_at=now)
        feeding.make_slices(connection, event.id, event.lane, first_n=ready_n, last_n=next_n - 1, due_at=None)
        if page.last:
            _release(connection, event.id, now=now)
        if next_n > LARGE >= place.next_n:
            if connection.dialect.name == "sqlite":
                connection.execute(text("PRAGMA analysis_limit = 1000"))  # or it would read the table, and others wait
            connection.execute(text("ANALYZE deliveries"))
    return _Place(page.after, next_n, place.epoch, page.last)


def _release(connection: Connection, event_id: int, *, now: int) -> None:
    """Let go what waited for further grounds."""
    waiting = (slices.c.event_id == event_id) & slices.c.due_at.is_(None) & slices.c.done_at.is_(None)
    connection.execute(update(slices).where(waiting).values(due_at=now))
