"""One slice: claim, render, hand over, settle.

The path of a slice, in order:

1. claim it; nobody else has it from then on. Its first flight is begun in the same transaction where that can be; a
   small one is read there, a large one outside of it, so that no writer waits
2. per flight: choose a relay whose limits have room (`paces`), or let the slice rest until one has
3. look at the guard; where it moved, check again who still may get it; leave domains alone that refuse (`destinations`)
4. write each mail as its turn comes (`sheets`, `renditions`), and hand it over on one connection
5. settle what became of each mail within 10 milliseconds or 192 outcomes (`settler`)
6. give the slice back in the transaction of its last outcomes, or once all of them are committed

No transaction is open while a relay is talked to. What a crash leaves behind is named by open flights (`rescue`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection, insert, select, update

from subscriptions import directory
from subscriptions.audience import resolve
from subscriptions.bulk import run
from subscriptions.database import Clock, Database, DatabaseUnusable
from subscriptions.directory import Known
from subscriptions.schema import accounts as accounts_table
from worker import ledger, logs
from worker.fanout import EventRow, Planner, Planning, event_facts, event_row
from worker.ledger import HOLD_CLASS, NEVER, SLICE_SIZE, Claim, Settlement, Status
from worker.mails import Composer, Due, GroundRow, People, Shape, as_planned, gather, numbered
from worker.paces import SECOND, Paces, Rest, flight_size
from worker.relay import About, Envelope, Kind, Outcome, Relay, RelayError, Relays
from worker.renditions import Press, Told
from worker.replies import acceptance
from worker.schedule import SOON_SECONDS, Over, in_time, retry_at
from worker.schema import events, pauses
from worker.settings import Settings, domain_of
from worker.settler import Settler
from worker.sheets import SHEET, Sheet
from worker.transaction import NEEDS_8BITMIME, WITHDRAWN
from worker.writer import Writer

T = TypeVar("T")


logger = logs.get(__name__)

FLIGHT = 32
#: Mails that a flight has at first; before each flight everything that may have changed is looked at.
LARGEST_FLIGHT = SLICE_SIZE
#: With a quick relay; how many of them are in flight is limited by the settler.
QUICK_SECONDS = 0.05
#: Flights to a relay grow where one was sent faster, and shrink where it took four times as long.
EVENTS = 16
#: Events that a process remembers.
FAULT_SECONDS = 60
#: How long a slice rests after a fault of ours: it is seen in the log, and it does not spin.
SENDER_REFUSALS = 3
#: In a row, for one class: then the class is paused, so that a broadcast does not hold 200,000 mails one by one.


_PAUSED_ACCOUNTS = select(pauses.c.value).where(pauses.c.scope == "account")


@dataclass(slots=True)
class Work:
    """A claimed slice: what it owes, and what is known of it."""

    claim: Claim
    event: EventRow
    dues: list[Due]  # in order; those that a flight took are gone
    people: People
    withdrawn: dict[int, str]  # those that are not to be sent after all, or not now, and why
    guard: int  # as it was when all of that was looked at
    looked: bool = False

    @property
    def hold(self) -> bool:
        """Whether its mails are of the hold class (design, principle 6)."""
        return self.event.class_ == HOLD_CLASS


@dataclass(slots=True)
class Flight:
    """Mails that are about to leave together."""

    id: int  # 0 in the hold class: each of its mails is begun before its last bytes
    begun: int  # when: the Date of mails that were never tried before
    starts: int  # its slot at the relay: nothing is written before
    relay: Relay
    dues: Sequence[Due]
    put_off: Mapping[int, tuple[str, int]]  # those that their domain lets wait: why, and until when
    last_n: int = 0  # the last number that it names, where its mails were not known when it began


@dataclass(slots=True)
class Taken:
    """A claimed slice, and what its first flight came to where that was begun with the claim."""

    work: Work
    first: Flight | Rest | None

    @property
    def slice_id(self) -> int:
        """The slice's number."""
        return self.work.claim.slice_id


def _domain(due: Due, people: People) -> str:
    contact = people.contacts.get(due.grounds[0].contact)
    return contact.address.rpartition("@")[2] if contact is not None else ""


@dataclass(slots=True)
class Sender:
    """Delivers slices. Lives on the event loop of a worker process."""

    settings: Settings
    database: Database
    planner: Planner
    composer: Composer
    press: Press
    relays: Relays
    writer: Writer
    settler: Settler
    worker: int
    clock: Clock
    may_send: Callable[[], bool]  # the lease is ours and nobody asked us to stop
    holds: Callable[[], bool]  # the lease is ours
    paces: Paces = field(init=False)
    _events: dict[int, tuple[EventRow, int]] = field(default_factory=dict)  # number -> (event, guard at its plan)
    _shapes: dict[int, Shape] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)  # relay -> how many mails its next flight may have
    _refusals: Counter[str] = field(default_factory=Counter)  # class -> times its sender was refused in a row
    _paused_at: dict[str, int] = field(default_factory=dict)  # class -> when it was paused for that

    def __post_init__(self) -> None:
        self.paces = Paces({one.domain: one.rate for one in self.settings.domain_rates})

    async def deliver(self, slice_id: int) -> None:
        """Deliver what a slice owes; a slice that somebody else has, or that is done, is no fault."""
        if not self.may_send():
            return
        relays = self._ready_relays()
        taken = await self.writer.run(partial(self._take, slice_id=slice_id, relays=relays))
        if taken is not None:
            await self.deliver_taken(taken)

    def take_new(
        self, planning: Planning, event: EventRow, *, mails: int, guard: int, known: Known | None
    ) -> Taken | None:
        """Claim a new event's mails, the last that were planned, and begin the first flight, before the commit.

        `guard` is the one that stood before its facts were read, `known` its account where that was read with its
        people; nothing is paused that concerns it. None where a relay does not work: its mails take the usual way. May
        be called on any thread; after the commit `deliver_taken` goes on.
        """
        relays, connection = self.relays.all, planning.connection
        if not all(relay.works for relay in relays):
            return None
        claim = ledger.claim_new(connection, event.id, event.lane, self.worker, mails=mails, now=self.clock())
        work = Work(claim, event, [], People({}, {}, {}), {}, guard)
        # A verdict's shape that is new has a number only if this is committed: who remembers numbers must not see it.
        if known is None or mails > FLIGHT or planning.new_shapes:
            return Taken(work, None)
        dues, people = as_planned(connection, event, planning.planned, known, self._shapes)
        self._see(connection, work, dues, people, check=False)
        return Taken(work, self._begin(connection, work=work, relays=relays) if work.dues else None)

    async def deliver_taken(self, taken: Taken, *, alone: bool = True) -> None:
        """Deliver what a claimed slice owes. Not `alone`: its last commit may wait for those of others like it."""
        work, first = taken.work, taken.first
        try:
            if not work.looked:
                first = await self._first(work, first)
            rest = await self._flights(work, first)
        except DatabaseUnusable as error:
            logger.warning("database.unusable", why=str(error), tried_again_in_seconds=1)
            await self._postpone(work, self.clock() + SECOND, fault=False)
            return
        except Exception as error:
            number = work.claim.slice_id
            logger.exception("slice.failed", slice=number, why=str(error), tried_again_in_seconds=FAULT_SECONDS)
            await self._postpone(work, self.clock() + FAULT_SECONDS * SECOND, fault=True)
            return
        if rest is not None:
            await self._postpone(work, rest.until, fault=False)
        elif await self.settler.finish(work.claim, now=self.clock(), at_once=alone or work.hold):
            logger.info("event.done", event_id=work.event.ulid)

    def _ready_relays(self) -> tuple[Relay, ...]:
        """The relays that may be tried now, in the order of preference."""
        return tuple(relay for relay in self.relays.all if relay.ready)

    async def _postpone(self, work: Work, until: int, *, fault: bool) -> None:
        """Give the slice back until then; after a fault of ours its open flights end as a vanished worker's do."""
        await self.settler.recorded(work.claim.slice_id)
        now = self.clock()
        await self._surely(
            lambda connection: ledger.postpone(
                connection, work.claim, self.worker, until=until, now=now, hold=fault and work.hold, again=fault
            )
        )

    async def _surely(self, work: Callable[[Connection], T]) -> T:
        """Give a slice back even where the database can't be reached at once: it is tried until it can."""
        while True:
            try:
                return await self.writer.run(work)
            except Exception as error:  # noqa: BLE001 - a slice that is not given back would wait for this process's end
                logger.warning("database.unusable", why=str(error), tried_again_in_seconds=1)
                await asyncio.sleep(1.0)

    # ------------------------------------------------------------ claim

    def _take(self, connection: Connection, *, slice_id: int, relays: Sequence[Relay]) -> Taken | None:
        """Claim a slice, and begin the first flight of a small one; None where another has it, or it is done."""
        claim = ledger.claim(connection, slice_id, self.worker, now=self.clock())
        if claim is None:
            return None
        event, guard_at_plan = self._event(connection, claim.event_id)
        work = Work(claim, event, [], People({}, {}, {}), {}, guard_at_plan)
        if claim.last_n - claim.first_n >= FLIGHT:
            return Taken(work, self._begin_unseen(connection, work, relays))
        self._look(connection, work, *ledger.owed(claim), guard=ledger.guard(connection))
        return Taken(work, self._begin(connection, work=work, relays=relays) if work.dues else None)

    def _begin_unseen(self, connection: Connection, work: Work, relays: Sequence[Relay]) -> Flight | None:
        """Begin the first flight of a large slice by its numbers alone, where no limit asks whose mails they are.

        It saves a transaction. None where it can't be, or the slice was made of what is tried again.
        """
        claim, now, destinations = work.claim, self.clock(), self.settler.destinations
        destinations.refresh(connection, now=now)
        limited = not self.paces.unlimited(relays) or not destinations.calm
        if limited or work.hold or claim.members is not None or not relays:
            return None
        last_n = min(claim.last_n, claim.first_n + self._sizes.get(relays[0].name, FLIGHT) - 1)
        members = range(claim.first_n, last_n + 1)
        flight_id, _ = ledger.begin(connection, claim, self.worker, members, now=now)
        return Flight(flight_id, now, now, relays[0], [], {}, last_n)

    async def _first(self, work: Work, begun: Flight | Rest | None) -> Flight | Rest | None:
        """Gather what a large slice owes, which keeps no writer waiting, and begin its first flight if need be."""

        def look() -> None:
            with self.database.read() as connection:
                self._look(connection, work, *ledger.owed(work.claim), guard=ledger.guard(connection))

        await asyncio.to_thread(look)
        if not work.dues:
            return None
        if isinstance(begun, Flight):
            begun.dues = [due for due in work.dues if due.n <= begun.last_n]
            if begun.dues:
                return begun
        return await self.writer.run(partial(self._begin, work=work, relays=self._ready_relays()))

    def _event(self, connection: Connection, number: int) -> tuple[EventRow, int]:
        """An event, and the guard as it stood when it was planned; neither changes once it is sent.

        An event that was accepted before a sender was configured gets its domains once, for all attempts.
        """
        known = self._events.get(number)
        if known is not None:
            return known
        row = connection.execute(select(events).where(events.c.id == number)).one()
        event = event_row(row)
        sender = self.settings.sender_of(event.class_)
        if not event.sender_domain and sender:
            bounce = self.settings.bounce_domain_of(event.class_) or domain_of(sender)
            connection.execute(
                update(events)
                .where(events.c.id == event.id, events.c.sender_domain == "")
                .values(sender_domain=domain_of(sender), bounce_domain=bounce)
            )
            return event_row(connection.execute(select(events).where(events.c.id == number)).one()), row.guard_at_plan
        if event.sender_domain and event.scope != "one":
            if len(self._events) >= EVENTS:
                self._events.clear()
            self._events[number] = event, row.guard_at_plan
        return event, row.guard_at_plan

    def _look(
        self, connection: Connection, work: Work, condition: str, values: Mapping[str, int | list[int]], *, guard: int
    ) -> None:
        """Gather deliveries with whom they speak of; where the guard moved, find those that may not be sent any more.

        A delivery keeps the grounds that still stand, and goes out while there is one (design, principle 3).
        """
        dues, people = gather(connection, work.event, condition, values, self._shapes)
        check = guard != work.guard or self._an_account_is_paused(connection, people)
        self._see(connection, work, dues, people, check=check)
        work.guard = guard

    def _see(self, connection: Connection, work: Work, dues: list[Due], people: People, *, check: bool) -> None:
        """Take these for what a slice owes, and find those that may not be sent: with `check` in the ledger too."""
        work.dues, work.people, work.withdrawn, work.looked = dues, people, {}, True
        if check:
            self._check(connection, work)
        if self._may_keep_back(work.event):
            for due in work.dues:
                kept_back = self._kept_back(work.event, due, work.people) if due.n not in work.withdrawn else None
                if kept_back is not None:
                    work.withdrawn[due.n] = kept_back

    # ------------------------------------------------------------ flights

    async def _flights(self, work: Work, begun: Flight | Rest | None) -> Rest | None:
        """Flight after flight; until when the slice must rest, None where it need not."""
        while isinstance(begun, Flight):
            if not await self._fly(work, begun) or not work.dues or not self.may_send():
                return None
            begun = await self.writer.run(partial(self._begin, work=work, relays=self._ready_relays()))
        return begun

    async def _starts(self, flight: Flight) -> bool:
        """Wait for a flight's slot; False where it may not leave any more."""
        while self.may_send():
            wait = flight.starts - self.clock()
            if wait <= 0:
                return True
            await asyncio.sleep(min(wait / SECOND, 0.5))
        return False

    def _begin(self, connection: Connection, *, work: Work, relays: Sequence[Relay]) -> Flight | Rest | None:
        """Name the first of the mails that a slice owes; None where the claim was lost: others send them."""
        now, lane = self.clock(), work.claim.lane
        choice = self.paces.choose(connection, relays, among=len(self.relays.all), lane=lane, now=now)
        if isinstance(choice, Rest):
            return choice
        most = self._sizes.get(choice.relay.name, FLIGHT)
        size = 1 if work.hold else min(choice.room, flight_size(relays, most))
        members = [due.n for due in work.dues[:size]]
        if work.hold:
            flight_id, guard = 0, ledger.guard(connection)
        else:
            flight_id, guard = ledger.begin(connection, work.claim, self.worker, members, now=now)
            if not flight_id:
                return None
        if guard != work.guard:
            self._look(connection, work, *numbered([due.n for due in work.dues]), guard=guard)
        dues = work.dues[:size]
        put_off = self._put_off(connection, work, dues, now=now)
        stay = sum(due.n in work.withdrawn for due in dues) if work.withdrawn else 0
        leaving = len(dues) - stay - len(put_off)
        starts = self.paces.take(connection, choice.relay, leaving, now=now)
        if starts is None:
            ledger.land(connection, [flight_id])
            return Rest(now + SECOND)
        return Flight(flight_id, now, starts, choice.relay, dues, put_off)

    def _put_off(
        self, connection: Connection, work: Work, dues: Sequence[Due], *, now: int
    ) -> dict[int, tuple[str, int]]:
        """Those of these mails that their domain lets wait: because it refuses, or because of its rate."""
        destinations = self.settler.destinations
        destinations.refresh(connection, now=now)
        if destinations.calm and not self.paces.domain_rates:
            return {}
        domains = {due.n: _domain(due, work.people) for due in dues if due.n not in work.withdrawn}
        waits = destinations.put_off(connection, domains, now=now)
        # Whoever waited for a slot of its domain has it now, and takes no second one.
        waited = {due.n for due in dues if due.reason == "domain_rate"}
        rated = {n: domain for n, domain in domains.items() if n not in waits and n not in waited}
        slots = self.paces.put_off(connection, rated, lane=work.claim.lane, now=now)
        return {n: ("domain_waits", at) for n, at in waits.items()} | {
            n: ("domain_rate", at) for n, at in slots.items()
        }

    async def _fly(self, work: Work, flight: Flight) -> bool:
        """Send the mails of a flight; False where the claim seems to be lost, or a mail must be made again.

        Mails that were not begun because the relay failed go back into the slice: another relay may take them.
        """
        mails = _Mails(self, work, flight)
        del work.dues[: len(flight.dues)]
        try:
            if not await self._starts(flight):
                await self._end(work, flight, flight.dues)
                return False
            self.settler.expect(flight.id, len(flight.dues))
            before = asyncio.get_running_loop().time()
            if mails.leave:
                lane = int(work.claim.lane)
                await flight.relay.send(
                    mails.envelopes(), lane=lane, done=mails.done, took=mails.took, gate=self.settler
                )
            else:  # a relay that is down must not keep them from being settled
                mails.settle_all()
        except RelayError:
            await self.settler.recorded(work.claim.slice_id)
            left = [due for due in flight.dues if due.n not in mails.settled]
            await self._end(work, flight, left)
            work.dues[:0] = left
            return True
        finally:
            self.settler.in_air -= mails.in_air
            if len(mails.settled) < len(flight.dues):
                self.settler.forget(flight.id)
        self._fit(flight, asyncio.get_running_loop().time() - before)
        return not mails.stopped

    def _fit(self, flight: Flight, seconds: float) -> None:
        """The next flight to a relay is larger where this one was quick, so that few are begun; smaller where slow."""
        size = len(flight.dues)
        if seconds < QUICK_SECONDS and size >= FLIGHT:
            self._sizes[flight.relay.name] = min(2 * size, LARGEST_FLIGHT)
        elif seconds > 4 * QUICK_SECONDS:
            self._sizes[flight.relay.name] = max(size // 2, FLIGHT)

    async def _end(self, work: Work, flight: Flight, left: Sequence[Due]) -> None:
        """End a flight of which these mails were not begun: they do not count in the relay's day."""
        unsent = sum(due.n not in work.withdrawn and due.n not in flight.put_off for due in left)

        def end(connection: Connection) -> None:
            ledger.land(connection, [flight.id])
            self.paces.give_back(connection, flight.relay, unsent, begun=flight.begun)

        await self.writer.run(end)

    def _check(self, connection: Connection, work: Work) -> None:
        """Find what may not be sent any more, or not now: it, its grounds or its event may have fallen meanwhile."""
        event, people = work.event, work.people
        whole = self._whole_event_waits(connection, event)
        if whole is not None:
            work.withdrawn = {due.n: whole for due in work.dues}
            return
        fallen = self._fallen(connection, event, work.dues, people)
        paused = self._paused_accounts(connection)
        for place, due in enumerate(work.dues):
            reasons = [_fell(ground, due, people, fallen=fallen, paused=paused) for ground in due.grounds]
            standing = tuple(ground for ground, reason in zip(due.grounds, reasons, strict=True) if reason is None)
            if not standing:
                work.withdrawn[due.n] = "paused" if "paused" in reasons else str(reasons[0])
                continue
            work.dues[place] = due._replace(grounds=standing)

    def _may_keep_back(self, event: EventRow) -> bool:
        """Whether any mail of an event may be kept back: only then are they looked at one by one."""
        sends = self.planner.mode_of(event.mode) == "live" and self.settings.sender_of(event.class_)
        return not sends or self.composer.links is None

    def _kept_back(self, event: EventRow, due: Due, people: People) -> str | None:
        """Why a mail may not leave now, though it is owed: a setting of this installation."""
        mode = self.planner.mode_of(event.mode)
        address = people.contacts[due.grounds[0].contact].address
        if mode == "test" or (mode == "team" and address not in self.settings.team):
            return mode
        if not self.settings.sender_of(event.class_):
            return "no_sender"
        if self.composer.links is None and self.composer.can_opt_out(event, due, people):
            return "no_https"
        return None

    def _whole_event_waits(self, connection: Connection, event: EventRow) -> str | None:
        """Why nothing of the event is sent now: it was cancelled, or it, its class or everything is paused."""
        status = connection.execute(select(events.c.status).where(events.c.id == event.id)).scalar_one()
        if status == "cancelled":
            return "event_cancelled"
        standing = {(row.scope, row.value) for row in connection.execute(select(pauses.c.scope, pauses.c.value))}
        whole = {("all", ""), ("class", event.class_), ("event", event.ulid)}
        return "paused" if standing & whole else None

    def _an_account_is_paused(self, connection: Connection, people: People) -> bool:
        """Also before the event was planned, when the guard does not tell."""
        names = set(connection.execute(_PAUSED_ACCOUNTS).scalars())
        return bool(names) and any(ext in names for ext, _, _ in people.accounts.values())

    def _paused_accounts(self, connection: Connection) -> set[int]:
        paused = select(accounts_table.c.id).where(accounts_table.c.ext.in_(_PAUSED_ACCOUNTS))
        return set(connection.execute(paused).scalars())

    def _fallen(self, connection: Connection, event: EventRow, dues: Sequence[Due], people: People) -> dict[int, str]:
        """Who opted out or was suppressed since the planning: contact -> reason.

        The accounts are resolved again, but only these two reasons count: a fallback that was planned stays, for its
        event has been told to nobody else.
        """
        names = sorted({people.accounts[ground.account][0] for due in dues for ground in due.grounds})
        facts = event_facts(
            event.category,
            event.data,
            event.routing.get("products", ()),
            attested=event.routing.get("attested", False),
        )
        fallen: dict[int, str] = {}
        for start in range(0, len(names), 500):
            for account in directory.facts(
                connection, self.planner.catalogues, limit=500, only=names[start : start + 500]
            ):
                verdict = resolve(self.planner.catalogues[account.catalogue], account, facts)
                for one in verdict.excluded:
                    reasons = {reason for _, reason in one.dropped}
                    for reason in ("address_suppressed", "opted_out"):
                        if reason in reasons:
                            fallen[one.contact.number] = reason
        return fallen

    def sender_took(self, class_: str) -> None:
        """A mail of the class was accepted."""
        if class_ in self._refusals:
            del self._refusals[class_]

    def sender_refused(self, class_: str, said: str) -> None:
        """A relay refused the sender of a class for good; after three times in a row the class is paused."""
        self._refusals[class_] += 1
        if self._refusals[class_] < SENDER_REFUSALS:
            return
        del self._refusals[class_]
        now = self._paused_at[class_] = self.clock()
        what_next = f"correct the sender, then `rolecast resume --class {class_}`"
        logger.error("class.paused", mail_class=class_, why=said, what_next=what_next)
        self.writer.submit(partial(_pause_class, class_=class_, now=now))

    def paused_since(self, class_: str, begun: int) -> bool:
        """Whether this process paused a class after a flight began."""
        return self._paused_at.get(class_, -1) >= begun


def _keep_rendition(connection: Connection, *, made: Told) -> None:
    """Remember which templates an event's variant was rendered with."""
    row = {"event": made.event_id, "variant": made.variant, "locale": made.locale, "hash": made.template_hash}
    run(connection, _RENDITION, row)


_RENDITION = """
    INSERT INTO renditions (event_id, variant, locale, template_hash) VALUES (:event, :variant, :locale, :hash)
    ON CONFLICT DO NOTHING
"""


def _pause_class(connection: Connection, *, class_: str, now: int) -> None:
    chosen = (pauses.c.scope == "class") & (pauses.c.value == class_)
    if connection.execute(select(pauses.c.at).where(chosen)).first() is None:
        by = "rolecast: the relay refused the sender"
        connection.execute(insert(pauses).values(scope="class", value=class_, by=by, at=now))
    ledger.raise_guard(connection)


def _fell(
    ground: GroundRow, due: Due, people: People, *, fallen: Mapping[int, str], paused: Collection[int]
) -> str | None:
    """Why a ground stands no more, or waits; None where it stands."""
    contact = people.contacts.get(ground.contact)
    if contact is None or contact.removed or contact.mailbox != due.mailbox:
        return "contact_removed"  # or moved: the delivery is for the mailbox that was planned
    if ground.contact in fallen:
        return fallen[ground.contact]
    return "paused" if ground.account in paused else None


@dataclass(slots=True)
class _Mails:
    """The mails of one flight: written as their turn comes, and settled as they are answered."""

    sender: Sender
    work: Work
    flight: Flight
    _flown: list[Due] = field(default_factory=list)
    _holds: dict[int, int] = field(default_factory=dict)  # n -> flight, in the hold class
    _fallen: dict[int, str] = field(default_factory=dict)  # what may not go after all, seen before its last bytes
    stopped: bool = False  # a mail may not leave by this claim
    answered: int = 0  # of those that were made
    settled: set[int] = field(default_factory=set)  # the numbers of which it is known what became of them

    @property
    def leave(self) -> bool:
        """Whether any of them may leave."""
        kept = (self.work.withdrawn, self.flight.put_off)
        return any(all(due.n not in one for one in kept) for due in self.flight.dues)

    def settle_all(self) -> None:
        """Settle mails of which none may leave."""
        for _ in self.envelopes():
            message = "a mail was made that may not leave"
            raise RuntimeError(message)

    @property
    def in_air(self) -> int:
        """How many were made and not answered."""
        return len(self._flown) - self.answered

    def envelopes(self) -> Iterator[Envelope]:
        """Each mail that is to go; the others are settled on the way."""
        work, flight, event, sender = self.work, self.flight, self.work.event, self.sender
        destinations = sender.settler.destinations
        limited = work.withdrawn or flight.put_off or event.expires_at is not None
        for position, due in enumerate(flight.dues):
            if not position % SHEET:
                sheet = self._sheet(flight.dues[position : position + SHEET])
            if not sender.holds():  # others may send what is left: to be frozen must not make second copies of it
                self.stopped = True
                return
            perhaps_not = limited or not destinations.calm or sender.paused_since(event.class_, flight.begun)
            if perhaps_not and self._stays(due):
                continue
            try:
                envelope = sheet.envelope(due)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it is wrong with this mail alone (R20)
                logger.error("mail.unrenderable", event_id=event.ulid, n=due.n, why=str(error))
                self._settle(due, Status.HELD, "cannot_be_rendered", reply=str(error))
                continue
            if work.hold:
                envelope.before_dot = partial(self._mark, due)
            if sender.press.news:
                for one in sender.press.told():
                    sender.settler.besides(partial(_keep_rendition, made=one))
            self._flown.append(due)
            sender.settler.in_air += 1
            yield envelope

    def done(self, number: int, outcome: Outcome) -> None:
        """A mail was answered: one place turns what happened into a state."""
        due, event, sender = self._flown[number], self.work.event, self.sender
        sender.settler.in_air -= 1
        self.answered += 1
        if outcome is WITHDRAWN or outcome is NEEDS_8BITMIME:
            self._not_sent(due)
            return
        accepted = outcome.kind is Kind.ACCEPTED
        destinations = sender.settler.destinations
        if not accepted or due.attempts or not destinations.calm:
            domain = _domain(due, self.work.people)
            destinations.answered(domain, outcome, attempts=due.attempts, now=sender.clock())
        if accepted:
            sender.sender_took(event.class_)
            self._settle(due, Status.ACCEPTED, None, outcome=outcome)
            return
        match outcome.kind:
            case Kind.PERMANENT:
                self._refused(due, outcome)
            case Kind.UNKNOWN if self.work.hold:
                self._settle(due, Status.HELD, "unknown", outcome=outcome)
            case Kind.UNKNOWN:
                self._again(due, "sent_again", outcome)
            case Kind.NOT_SENT:
                self._again(due, "connection_lost", outcome)
            case Kind.TEMPORARY if outcome.about is About.RELAY:
                self._soon(due, outcome)
            case Kind.TEMPORARY:
                self._again(due, "refused_for_now", outcome)

    def took(self, numbers: Sequence[int], replies: Sequence[str]) -> None:
        """Mails were accepted, with these replies: what `done` makes of each, at once where it has nothing to learn."""
        work, flight, event, sender = self.work, self.flight, self.work.event, self.sender
        dues = [self._flown[number] for number in numbers]
        if work.hold or not sender.settler.destinations.calm or any(due.attempts for due in dues):
            for number, reply in zip(numbers, replies, strict=True):
                self.done(number, acceptance(reply))
            return
        sender.settler.in_air -= len(dues)
        self.answered += len(dues)
        sender.sender_took(event.class_)
        settled = [due.n for due in dues]
        self.settled.update(settled)
        sender.settler.add(
            Settlement(
                event.id,
                settled,
                replies,
                work.claim.slice_id,
                work.claim.epoch,
                flight.id,
                Status.ACCEPTED,
                None,
                attempted=True,
                due_at=None,
                relay=flight.relay.name,
                flown_at=flight.begun,
                at=sender.clock(),
            )
        )

    def _not_sent(self, due: Due) -> None:
        """A mail was not begun after all: withdrawn by us, or written for a relay that takes other bytes."""
        if due.n in self._fallen:
            self._not_now(due, self._fallen[due.n])
        else:
            self.stopped = True  # the claim was lost, we stop, or it is made again: it goes with its slice

    def _refused(self, due: Due, outcome: Outcome) -> None:
        """A mail was refused for good: what about decides whether a person must look."""
        match outcome.about:
            case About.SENDER:
                self._settle(due, Status.HELD, "sender_refused", outcome=outcome)
                self.sender.sender_refused(self.work.event.class_, outcome.reply)
            case About.RECIPIENT:
                self._settle(due, Status.FAILED, "recipient_refused", outcome=outcome)
            case About.POLICY:
                self._settle(due, Status.FAILED, "policy_refused", outcome=outcome)
            case About.CONTENT | About.RELAY:
                self._settle(due, Status.FAILED, "content_refused", outcome=outcome)

    def _again(self, due: Due, reason: str, outcome: Outcome) -> None:
        """The mail was tried in vain: it goes again by its schedule, or never."""
        event, settings = self.work.event, self.sender.settings
        at = retry_at(
            due.attempts + 1,
            minutes=settings.retry_minutes_of(event.class_),
            give_up_hours=settings.give_up_hours_of(event.class_),
            now=self.sender.clock(),
            owed_since=self._owed_since,
            expires_at=event.expires_at,
            spread=random.random(),  # noqa: S311 - spreads retries, protects nothing
        )
        self._then(due, reason, at, outcome=outcome)

    def _soon(self, due: Due, outcome: Outcome) -> None:
        """The relay ended the session: that is not the mail's doing, and costs it no attempt (R18)."""
        rest = int(SOON_SECONDS * SECOND * (1 + 0.2 * random.random()))  # noqa: S311 - protects nothing
        self._then(due, "refused_for_now", self._in_time(self.sender.clock() + rest), outcome=outcome, attempted=False)

    def _put_off(self, due: Due, reason: str, at: int) -> None:
        """The mail's domain lets it wait; for its own rate a mail is not given up, though it may expire."""
        expires = self.work.event.expires_at
        if reason == "domain_waits":
            self._then(due, reason, self._in_time(at))
        else:
            self._then(due, reason, Over.EXPIRED if expires is not None and expires <= at else at)

    @property
    def _owed_since(self) -> int:
        return max(self.work.event.accepted_at, self.work.event.not_before or 0)

    def _in_time(self, at: int) -> int | Over:
        event = self.work.event
        hours = self.sender.settings.give_up_hours_of(event.class_)
        return in_time(at, give_up_hours=hours, owed_since=self._owed_since, expires_at=event.expires_at)

    def _then(
        self, due: Due, reason: str, at: int | Over, *, outcome: Outcome | None = None, attempted: bool | None = None
    ) -> None:
        """The mail goes again at a time, or it is over."""
        if not isinstance(at, Over):
            self._settle(due, Status.PLANNED, reason, outcome=outcome, due_at=at, attempted=attempted)
        else:
            status = Status.EXPIRED if at is Over.EXPIRED else Status.FAILED
            self._settle(due, status, at.value, outcome=outcome, attempted=attempted)

    def _not_now(self, due: Due, reason: str) -> None:
        if reason in {"paused", "no_https", "no_sender"}:
            self._settle(due, Status.PLANNED, reason, due_at=NEVER)
        elif reason in {"test", "team"}:
            self._settle(due, Status.HELD, reason)
        else:
            self._settle(due, Status.CANCELLED, reason)

    def _stays(self, due: Due) -> bool:
        """Settle a mail that is not to go, or not now; False where nothing keeps it."""
        work, flight, event, sender = self.work, self.flight, self.work.event, self.sender
        if sender.paused_since(event.class_, flight.begun):
            self._not_now(due, "paused")
        elif due.n in work.withdrawn:
            self._not_now(due, work.withdrawn[due.n])
        elif event.expires_at is not None and sender.clock() >= event.expires_at:
            self._settle(due, Status.EXPIRED, "expired")
        elif due.n in flight.put_off:
            self._put_off(due, *flight.put_off[due.n])
        else:
            destinations = sender.settler.destinations
            if destinations.calm:
                return False
            waits = destinations.waits(_domain(due, work.people), now=sender.clock())
            if waits is None:
                return False
            self._put_off(due, "domain_waits", waits)
        return True

    def _sheet(self, dues: Sequence[Due]) -> Sheet:
        work, flight = self.work, self.flight
        eightbit = "8bitmime" in flight.relay.offers
        if work.withdrawn or flight.put_off:
            dues = [due for due in dues if due.n not in work.withdrawn and due.n not in flight.put_off]
        return Sheet(self.sender.press, work.event, dues, work.people, begun=flight.begun, eightbit=eightbit)

    async def _mark(self, due: Due) -> bool:
        """The hold class: commit that this mail may leave, before its last bytes; False where it may not, or not now.

        What was opted out of, cancelled or paused since the flight looked is withdrawn in the same transaction.
        """
        if not self.sender.may_send():
            return False
        flight_id, fallen = await self.sender.writer.run(lambda connection: self._begin_one(connection, due))
        if fallen is not None:
            self._fallen[due.n] = fallen
        if not flight_id:
            return False
        self.sender.settler.expect(flight_id, 1)
        self._holds[due.n] = flight_id
        return self.sender.holds()  # frozen while it was committed: others may send it by now

    def _begin_one(self, connection: Connection, due: Due) -> tuple[int, str | None]:
        """(flight, why it may not go after all); flight 0 where it may not, or the claim was lost."""
        claim, guard = self.work.claim, ledger.guard(connection, held=True)
        if guard != self.work.guard:
            again = Work(claim, self.work.event, [], People({}, {}, {}), {}, self.work.guard)
            self.sender._look(connection, again, *numbered([due.n]), guard=guard)  # noqa: SLF001 - one object in two halves
            if again.withdrawn:
                return 0, again.withdrawn[due.n]
            if not again.dues or again.dues[0].grounds != due.grounds:
                return 0, None  # it speaks of a ground that fell: it is made again
        flight_id, _ = ledger.begin(connection, claim, self.sender.worker, [due.n], now=self.flight.begun)
        return flight_id, None

    def _settle(
        self,
        due: Due,
        status: Status,
        reason: str | None,
        *,
        outcome: Outcome | None = None,
        due_at: int | None = None,
        reply: str | None = None,
        attempted: bool | None = None,  # None: where the relay said something
    ) -> None:
        event = self.work.event
        self.settled.add(due.n)
        if status is Status.HELD:
            logger.warning("delivery.held", event_id=event.ulid, n=due.n, reason=reason, what_next="a person decides")
        elif status is Status.PLANNED and outcome is not None:
            logger.info("delivery.deferred", event_id=event.ulid, n=due.n, reason=reason, reply=outcome.reply)
        elif status is Status.FAILED and outcome is not None:
            logger.warning("delivery.failed", event_id=event.ulid, n=due.n, reason=reason, reply=outcome.reply)
        self.sender.settler.add(
            Settlement(
                event.id,
                (due.n,),
                (outcome.reply if outcome is not None else reply,),
                self.work.claim.slice_id,
                self.work.claim.epoch,
                self._holds.get(due.n, self.flight.id),
                status,
                reason,
                outcome is not None if attempted is None else attempted,
                due_at,
                self.flight.relay.name if outcome is not None else None,
                self.flight.begun,
                self.sender.clock(),
            )
        )
