"""One slice: claim, render, hand over, settle.

The path of a slice, in order:

1. claim it, and begin its first flight, in one transaction; nobody else has it from then on
2. per flight: choose a relay whose limits have room (`paces`), or let the slice rest until one has
3. look at the guard; where it moved, check again who still may get it; leave domains alone that refuse (`destinations`)
4. render each mail as its turn comes, and hand it over on one connection
5. settle what became of each mail within 10 milliseconds or 32 outcomes
6. give the slice back, once all of that is committed

No transaction is open while a relay is talked to. What a crash leaves behind is named by open flights (`rescue`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection, insert, select, update

from subscriptions import directory
from subscriptions.audience import resolve
from subscriptions.database import Clock, DatabaseUnusable
from subscriptions.schema import accounts as accounts_table
from worker import ledger, logs, mime
from worker.fanout import EventRow, Planner, event_facts, event_row
from worker.ledger import HOLD_CLASS, NEVER, Claim, Lane, Settlement, Status
from worker.links import bounce_sender, delivery_identity
from worker.mails import Composer, Due, GroundRow, People, load, variant_of
from worker.paces import SECOND, Paces, Rest, flight_size
from worker.relay import About, Envelope, Kind, Outcome, Relay, RelayError, Relays
from worker.rendering import Renderer
from worker.schedule import SOON_SECONDS, Over, in_time, retry_at
from worker.schema import events, pauses, renditions
from worker.settings import Settings, domain_of
from worker.settler import Settler
from worker.transaction import WITHDRAWN
from worker.writer import Writer

T = TypeVar("T")


logger = logs.get(__name__)

FLIGHT = 32
#: Mails written to one connection together; before each flight everything that may have changed is looked at.
FAULT_SECONDS = 60
#: How long a slice rests after a fault of ours: it is seen in the log, and it does not spin.
SENDER_REFUSALS = 3
#: In a row, for one class: then the class is paused, so that a broadcast does not hold 200,000 mails one by one.


@dataclass(frozen=True, slots=True)
class Flight:
    """Mails that are about to leave together, with everything that they say."""

    id: int  # 0 in the hold class: each of its mails is begun before its last bytes
    begun: int  # when: the Date of mails that were never tried before
    starts: int  # its slot at the relay: nothing is written before
    guard: int  # as it was when the mails were checked
    relay: Relay
    dues: Sequence[Due]
    people: People
    withdrawn: Mapping[int, str]  # those that are not to be sent after all, or not now, and why
    put_off: Mapping[int, tuple[str, int]]  # those that their domain lets wait: why, and until when

    def domain_of(self, due: Due) -> str:
        """Where a mail goes, A-labels."""
        return _domain(due, self.people)


def _domain(due: Due, people: People) -> str:
    contact = people.contacts.get(due.grounds[0].contact)
    return contact.address.rpartition("@")[2] if contact is not None else ""


@dataclass(frozen=True, slots=True)
class Work:
    """A claimed slice with its first flight, begun in the same transaction; None where the slice owes nothing."""

    claim: Claim
    event: EventRow
    guard_at_plan: int
    address_key: bytes
    first: Flight | Rest | None
    numbers: tuple[int, ...]  # what comes after the first flight

    @property
    def hold(self) -> bool:
        """Whether its mails are of the hold class (design, principle 6)."""
        return self.event.class_ == HOLD_CLASS


@dataclass(slots=True)
class Sender:
    """Delivers slices. Lives on the event loop of a worker process."""

    settings: Settings
    planner: Planner
    composer: Composer
    renderer: Renderer
    relays: Relays
    writer: Writer
    settler: Settler
    worker: int
    clock: Clock
    may_send: Callable[[], bool]  # the lease is ours and nobody asked us to stop
    holds: Callable[[], bool]  # the lease is ours
    paces: Paces = field(init=False)
    _proven: set[tuple[int, str, str]] = field(default_factory=set)
    _refusals: Counter[str] = field(default_factory=Counter)  # class -> times its sender was refused in a row
    _paused_at: dict[str, int] = field(default_factory=dict)  # class -> when it was paused for that

    def __post_init__(self) -> None:
        self.paces = Paces({one.domain: one.rate for one in self.settings.domain_rates})

    async def deliver(self, slice_id: int) -> None:
        """Deliver what a slice owes; a slice that somebody else has, or that is done, is no fault."""
        if not self.may_send():
            return
        relays = self._ready_relays()
        work = await self.writer.run(lambda connection: self._take(connection, slice_id, relays))
        if work is None:
            return
        try:
            rest = await self._flights(work)
        except DatabaseUnusable as error:
            logger.warning("database.unusable", why=str(error), tried_again_in_seconds=1)
            await self._postpone(work, self.clock() + SECOND, fault=False)
            return
        except Exception as error:
            logger.exception("slice.failed", slice=slice_id, why=str(error), tried_again_in_seconds=FAULT_SECONDS)
            await self._postpone(work, self.clock() + FAULT_SECONDS * SECOND, fault=True)
            return
        if rest is not None:
            await self._postpone(work, rest.until, fault=False)
            return
        await self.settler.recorded(slice_id)
        now = self.clock()
        if await self._surely(lambda connection: ledger.finish(connection, work.claim, self.worker, now=now)):
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

    def _take(self, connection: Connection, slice_id: int, relays: Sequence[Relay]) -> Work | None:
        taken = ledger.claim(connection, slice_id, self.worker, now=self.clock())
        if taken is None:
            return None
        row = connection.execute(select(events).where(events.c.id == taken.event_id)).one()
        event = self._addressed(connection, event_row(row))
        numbers = ledger.owed(connection, taken)
        work = Work(taken, event, row.guard_at_plan, directory.address_key(connection), None, ())
        first = self._begin(connection, work, numbers, relays) if numbers else None
        return replace(work, first=first, numbers=_after(first, numbers))

    def _addressed(self, connection: Connection, event: EventRow) -> EventRow:
        """An event that was accepted before a sender was configured gets its domains once, for all attempts."""
        sender = self.settings.sender_of(event.class_)
        if event.sender_domain or not sender:
            return event
        bounce = self.settings.bounce_domain_of(event.class_) or domain_of(sender)
        connection.execute(
            update(events)
            .where(events.c.id == event.id, events.c.sender_domain == "")
            .values(sender_domain=domain_of(sender), bounce_domain=bounce)
        )
        return event_row(connection.execute(select(events).where(events.c.id == event.id)).one())

    # ------------------------------------------------------------ flights

    async def _flights(self, work: Work) -> Rest | None:
        """Flight after flight; until when the slice must rest, None where it need not."""
        begun, numbers = work.first, work.numbers
        while isinstance(begun, Flight):
            if not await self._starts(begun):
                await self._end(begun, [due.n for due in begun.dues])
                return None
            left = await self._fly(work, begun)
            if left is None or not (numbers := (*left, *numbers)) or not self.may_send():
                return None
            begin = partial(self._begin, work=work, numbers=numbers, relays=self._ready_relays())
            begun = await self.writer.run(begin)
            numbers = _after(begun, numbers)
        return begun

    async def _starts(self, flight: Flight) -> bool:
        """Wait for a flight's slot; False where it may not leave any more."""
        while self.may_send():
            wait = flight.starts - self.clock()
            if wait <= 0:
                return True
            await asyncio.sleep(min(wait / SECOND, 0.5))
        return False

    def _begin(
        self, connection: Connection, work: Work, numbers: Sequence[int], relays: Sequence[Relay]
    ) -> Flight | Rest | None:
        """Name the first of these mails and gather what they say; None where the claim was lost: others send them."""
        now, lane = self.clock(), work.claim.lane
        choice = self.paces.choose(connection, relays, among=len(self.relays.all), lane=lane, now=now)
        if isinstance(choice, Rest):
            return choice
        members = numbers[: 1 if work.hold else min(choice.room, flight_size(relays, FLIGHT))]
        if work.hold:
            flight_id, guard = 0, ledger.guard(connection)
        else:
            flight_id, guard = ledger.begin(connection, work.claim, self.worker, members, now=now)
            if not flight_id:
                return None
        checked = work.hold or guard != work.guard_at_plan
        dues, people, withdrawn = self._ready(connection, work.event, members, check=checked)
        leaving = [due for due in dues if due.n not in withdrawn]
        put_off = self._put_off(connection, leaving, people, lane=lane, now=now)
        starts = self.paces.take(connection, choice.relay, len(leaving) - len(put_off), now=now)
        if starts is None:
            ledger.land(connection, [flight_id])
            return Rest(now + SECOND)
        return Flight(flight_id, now, starts, guard, choice.relay, dues, people, withdrawn, put_off)

    def _put_off(
        self, connection: Connection, dues: Sequence[Due], people: People, *, lane: Lane, now: int
    ) -> dict[int, tuple[str, int]]:
        """Those of these mails that their domain lets wait: because it refuses, or because of its rate."""
        domains = {due.n: _domain(due, people) for due in dues}
        waits = self.settler.destinations.put_off(connection, domains, now=now)
        # Whoever waited for a slot of its domain has it now, and takes no second one.
        rated = {due.n: domains[due.n] for due in dues if due.n not in waits and due.reason != "domain_rate"}
        slots = self.paces.put_off(connection, rated, lane=lane, now=now)
        return {n: ("domain_waits", at) for n, at in waits.items()} | {
            n: ("domain_rate", at) for n, at in slots.items()
        }

    async def _fly(self, work: Work, flight: Flight) -> list[int] | None:
        """Send these mails; returns those that were not begun because the relay failed: another may take them.

        None where the claim seems to be lost, or a mail must be made again: the slice is looked at anew.
        """
        self.settler.expect(flight.id, len(flight.dues))
        mails = _Mails(self, work, flight)
        lane = int(work.claim.lane)
        try:
            await flight.relay.send(mails.envelopes(), lane=lane, done=mails.done, gate=self.settler)
        except RelayError:
            await self.settler.recorded(work.claim.slice_id)
            self.settler.forget(flight.id)
            left = [due.n for due in flight.dues if due.n not in mails.settled]
            await self._end(flight, left)
            return left
        if mails.stopped:
            self.settler.forget(flight.id)
            return None
        return []

    async def _end(self, flight: Flight, left: Sequence[int]) -> None:
        """End a flight of which these mails were not begun: they do not count in the relay's day."""
        unsent = sum(n not in flight.withdrawn and n not in flight.put_off for n in left)

        def end(connection: Connection) -> None:
            ledger.land(connection, [flight.id])
            self.paces.give_back(connection, flight.relay, unsent, begun=flight.begun)

        await self.writer.run(end)

    def _ready(
        self, connection: Connection, event: EventRow, members: Sequence[int], *, check: bool
    ) -> tuple[list[Due], People, dict[int, str]]:
        """The deliveries of a flight, whom they speak of, and why some of them are not to be sent, or not now.

        A delivery keeps the grounds that still stand, and goes out while there is one (design, principle 3).
        """
        dues, people = load(connection, event, members)
        whole = self._whole_event_waits(connection, event) if check else None
        if whole is not None:
            return dues, people, {due.n: whole for due in dues}
        fallen = self._fallen(connection, event, dues, people) if check else {}
        paused = self._paused_accounts(connection) if check else set()
        ready: list[Due] = []
        gone: dict[int, str] = {}
        for due in dues:
            reasons = [_fell(ground, due, people, fallen=fallen, paused=paused) for ground in due.grounds]
            standing = tuple(ground for ground, reason in zip(due.grounds, reasons, strict=True) if reason is None)
            if not standing:
                gone[due.n] = "paused" if "paused" in reasons else str(reasons[0])
                ready.append(due)
                continue
            ready.append(replace(due, grounds=standing))
            kept_back = self._kept_back(event, ready[-1], people)
            if kept_back is not None:
                gone[due.n] = kept_back
        return ready, people, gone

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

    def _paused_accounts(self, connection: Connection) -> set[int]:
        names = select(pauses.c.value).where(pauses.c.scope == "account")
        return set(connection.execute(select(accounts_table.c.id).where(accounts_table.c.ext.in_(names))).scalars())

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

    def keep_rendition(self, connection: Connection, event_id: int, variant: str, locale: str, hash_: str) -> None:
        """Remember which templates an event's variant was rendered with."""
        found = connection.execute(
            select(renditions.c.id).where(
                renditions.c.event_id == event_id, renditions.c.variant == variant, renditions.c.locale == locale
            )
        ).first()
        if found is None:
            connection.execute(
                insert(renditions).values(event_id=event_id, variant=variant, locale=locale, template_hash=hash_)
            )


def _after(begun: Flight | Rest | None, numbers: Sequence[int]) -> tuple[int, ...]:
    """The mails that come after a flight of the first of these."""
    return tuple(numbers[len(begun.dues) :] if isinstance(begun, Flight) else numbers)


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
    """The mails of one flight: made one by one as their turn comes, and settled as they are answered."""

    sender: Sender
    work: Work
    flight: Flight
    _flown: list[Due] = field(default_factory=list)
    _holds: dict[int, int] = field(default_factory=dict)  # n -> flight, in the hold class
    _fallen: dict[int, str] = field(default_factory=dict)  # what may not go after all, seen before its last bytes
    stopped: bool = False  # a mail may not leave by this claim
    settled: set[int] = field(default_factory=set)  # the numbers of which it is known what became of them

    def envelopes(self) -> Iterator[Envelope]:
        """Each mail that is to go; the others are settled on the way."""
        flight, event, sender = self.flight, self.work.event, self.sender
        for due in flight.dues:
            if not sender.holds():  # others may send what is left: to be frozen must not make second copies of it
                self.stopped = True
                return
            now = sender.clock()
            if sender.paused_since(event.class_, flight.begun):
                self._not_now(due, "paused")
                continue
            if due.n in flight.withdrawn:
                self._not_now(due, flight.withdrawn[due.n])
                continue
            if event.expires_at is not None and now >= event.expires_at:
                self._settle(due, Status.EXPIRED, "expired")
                continue
            if due.n in flight.put_off:
                self._put_off(due, *flight.put_off[due.n])
                continue
            waits = sender.settler.destinations.waits(flight.domain_of(due), now=now)
            if waits is not None:
                self._put_off(due, "domain_waits", waits)
                continue
            try:
                envelope = self._envelope(due, flight.people)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it is wrong with this mail alone (R20)
                logger.error("mail.unrenderable", event_id=self.work.event.ulid, n=due.n, why=str(error))
                self._settle(due, Status.HELD, "cannot_be_rendered", reply=str(error))
                continue
            self._flown.append(due)
            yield envelope

    def done(self, number: int, outcome: Outcome) -> None:
        """A mail was answered: one place turns what happened into a state."""
        due, event, sender = self._flown[number], self.work.event, self.sender
        if outcome is WITHDRAWN:
            sender.settler.give_back(1)
            if due.n in self._fallen:
                self._not_now(due, self._fallen[due.n])
            else:
                self.stopped = True  # the claim was lost, or we stop: it stays as it is, and goes with its slice
            return
        sender.settler.destinations.answered(
            self.flight.domain_of(due), outcome, attempts=due.attempts, now=sender.clock()
        )
        if outcome.kind is Kind.ACCEPTED:
            sender.sender_took(event.class_)
        match outcome.kind:
            case Kind.ACCEPTED:
                self._settle(due, Status.ACCEPTED, None, outcome=outcome)
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

    def _envelope(self, due: Due, people: People) -> Envelope:
        sender, event = self.sender, self.work.event
        mail = sender.composer.mail_of(event, due, people, now=self.flight.begun)
        email = sender.renderer.render(mail)
        body = mime.assemble(email)
        identity = delivery_identity(event.ulid, due.mailbox_key)
        variant = (event.id, variant_of(due.grounds[0].shape), mail.locale)
        if variant not in sender._proven:  # noqa: SLF001 - one object in two halves
            mime.prove(email, body)
            if len(sender._proven) > 10_000:  # noqa: SLF001
                sender._proven.clear()  # noqa: SLF001
            sender._proven.add(variant)  # noqa: SLF001
            hash_ = sender.renderer.version(event.type)
            sender.writer.submit(lambda c: sender.keep_rendition(c, *variant, hash_))
        return Envelope(
            sender=bounce_sender(self.work.address_key, event.id, due.n, identity, domain=event.bounce_domain),
            recipient=mime.wire_address(mail.to_address),
            body=body,
            smtputf8=mime.needs_smtputf8(mail.to_address),
            before_dot=(lambda: self._mark(due)) if event.class_ == HOLD_CLASS else None,
        )

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
        if ledger.guard(connection, held=True) != self.flight.guard:
            dues, _, withdrawn = self.sender._ready(connection, self.work.event, [due.n], check=True)  # noqa: SLF001 - one object in two halves
            if withdrawn:
                return 0, withdrawn[due.n]
            if dues[0].grounds != due.grounds:
                return 0, None  # it speaks of a ground that fell: it is made again
        flight_id, _ = ledger.begin(connection, self.work.claim, self.sender.worker, [due.n], now=self.flight.begun)
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
                event_id=event.id,
                n=due.n,
                slice_id=self.work.claim.slice_id,
                epoch=self.work.claim.epoch,
                flight_id=self._holds.get(due.n, self.flight.id),
                status=status,
                reason=reason,
                attempted=outcome is not None if attempted is None else attempted,
                due_at=due_at,
                relay=self.flight.relay.name if outcome is not None else None,
                reply=outcome.reply if outcome is not None else reply,
                flown_at=self.flight.begun,
                at=self.sender.clock(),
            )
        )
