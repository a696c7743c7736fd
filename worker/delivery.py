"""One slice: claim, render, hand over, settle.

The path of a slice, in order:

1. claim it, and begin its first flight, in one transaction; nobody else has it from then on
2. per flight: look at the guard; where it moved, check again who still may get it
3. render each mail as its turn comes, and hand it over on one connection
4. settle what became of each mail within 10 milliseconds or 32 outcomes
5. give the slice back, once all of that is committed

No transaction is open while a relay is talked to. What a crash leaves behind is named by open flights (`rescue`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

from sqlalchemy import Connection, insert, select, update

from subscriptions import directory
from subscriptions.audience import resolve
from subscriptions.database import Clock
from subscriptions.schema import accounts as accounts_table
from worker import ledger, logs, mime
from worker.fanout import EventRow, Planner, event_facts, event_row
from worker.ledger import HOLD_CLASS, NEVER, Claim, Settlement, Status
from worker.links import bounce_sender
from worker.mails import Composer, Due, GroundRow, People, load, variant_of
from worker.relay import About, Envelope, Kind, Outcome, Relay, RelayError, Relays
from worker.rendering import Renderer, RenderError
from worker.schema import events, pauses, renditions
from worker.settings import Settings, domain_of
from worker.writer import Writer

logger = logs.get(__name__)

FLIGHT = 32
#: Mails written to one connection together; before each flight everything that may have changed is looked at.
SETTLE_SECONDS = 0.01
SETTLE_OUTCOMES = 32
#: Outcomes wait no longer, and no more of them, before they are committed (design, principle 6).
UNSETTLED = 48
#: No further mail is begun while so many outcomes of this process are not committed.
NO_RELAY_SECONDS = 5
#: How long a slice rests when no relay could be reached.
FAULT_SECONDS = 60
#: How long a slice rests after a fault of ours: it is seen in the log, and it does not spin.


@dataclass(frozen=True, slots=True)
class Flight:
    """Mails that are about to leave together, with everything that they say."""

    id: int  # 0 in the hold class: each of its mails is begun before its last bytes
    begun: int  # when: the Date of mails that were never tried before
    dues: Sequence[Due]
    people: People
    withdrawn: Mapping[int, str]  # those that are not to be sent after all, and why


@dataclass(frozen=True, slots=True)
class Work:
    """A claimed slice with its first flight, begun in the same transaction; None where the slice owes nothing."""

    claim: Claim
    event: EventRow
    guard_at_plan: int
    address_key: bytes
    first: Flight | None
    numbers: tuple[int, ...]  # what comes after the first flight

    @property
    def hold(self) -> bool:
        """Whether its mails are of the hold class (design, principle 6)."""
        return self.event.class_ == HOLD_CLASS


@dataclass(slots=True)
class Settler:
    """Outcomes of a worker process on their way into the ledger, committed together."""

    writer: Writer
    worker: int
    _pending: list[Settlement] = field(default_factory=list)
    _open: dict[int, int] = field(default_factory=dict)  # flight -> mails not yet settled
    _unrecorded: Counter[int] = field(default_factory=Counter)  # slice -> outcomes not yet committed
    _waiting: dict[int, asyncio.Event] = field(default_factory=dict)  # slice -> who waits until there are none
    _timer: asyncio.TimerHandle | None = None
    _unsettled: int = 0
    _room: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._room.set()

    def expect(self, flight_id: int, mails: int) -> None:
        """A flight of so many mails began."""
        if flight_id:
            self._open[flight_id] = mails

    def forget(self, flight_id: int) -> None:
        """A flight ended before all its mails began."""
        self._open.pop(flight_id, None)

    def add(self, settlement: Settlement) -> None:
        """What became of one mail; it is committed soon."""
        self._pending.append(settlement)
        self._unrecorded[settlement.slice_id] += 1
        self._unsettled += 1
        if self._unsettled >= UNSETTLED:
            self._room.clear()
        if len(self._pending) >= SETTLE_OUTCOMES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SETTLE_SECONDS, self.flush)

    async def room(self) -> None:
        """Wait until few enough outcomes are uncommitted."""
        await self._room.wait()

    async def recorded(self, slice_id: int) -> None:
        """Wait until every outcome of a slice is committed: a slice given back before would be sent again."""
        self.flush()
        if slice_id in self._unrecorded:
            await self._waiting.setdefault(slice_id, asyncio.Event()).wait()

    def flush(self) -> None:
        """Commit what waits, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._pending = self._pending, []
        landed = []
        for one in batch:
            if one.flight_id in self._open:
                self._open[one.flight_id] -= 1
                if self._open[one.flight_id] == 0:
                    del self._open[one.flight_id]
                    landed.append(one.flight_id)
        if batch:
            self._submit(batch, landed)

    def _submit(self, batch: list[Settlement], landed: list[int]) -> None:
        def record(connection: Connection) -> None:
            ledger.settle(connection, self.worker, batch)
            ledger.land(connection, landed)

        loop = asyncio.get_running_loop()

        def done(future: Future[None]) -> None:
            loop.call_soon_threadsafe(self._committed, batch, landed, future)

        self.writer.submit(record).add_done_callback(done)

    def _committed(self, batch: list[Settlement], landed: list[int], future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            # The mails have left: the result is kept and tried again, for as long as this process lives.
            logger.error("database.unusable", why=str(error), outcomes=len(batch), tried_again_in_seconds=1)
            asyncio.get_running_loop().call_later(1.0, self._submit, batch, landed)
            return
        self._unsettled -= len(batch)
        if self._unsettled < UNSETTLED:
            self._room.set()
        for slice_id, count in Counter(one.slice_id for one in batch).items():
            self._unrecorded[slice_id] -= count
            if not self._unrecorded[slice_id]:
                del self._unrecorded[slice_id]
                if slice_id in self._waiting:
                    self._waiting.pop(slice_id).set()


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
    _proven: set[tuple[int, str, str]] = field(default_factory=set)

    async def deliver(self, slice_id: int) -> None:
        """Deliver what a slice owes; a slice that somebody else has, or that is done, is no fault."""
        if not self.may_send():
            return
        work = await self.writer.run(lambda connection: self._take(connection, slice_id))
        if work is None:
            return
        try:
            await self._flights(work)
        except RelayError:
            await self._postpone(work, NO_RELAY_SECONDS, fault=False)
            return
        except Exception as error:
            logger.exception("slice.failed", slice=slice_id, why=str(error), tried_again_in_seconds=FAULT_SECONDS)
            await self._postpone(work, FAULT_SECONDS, fault=True)
            return
        await self.settler.recorded(slice_id)
        now = self.clock()
        await self._surely(lambda connection: ledger.finish(connection, work.claim, self.worker, now=now))

    async def _postpone(self, work: Work, seconds: int, *, fault: bool) -> None:
        """Give the slice back for a while; after a fault of ours its open flights end as a vanished worker's do."""
        await self.settler.recorded(work.claim.slice_id)
        now = self.clock()
        until = now + seconds * 1_000_000
        await self._surely(
            lambda connection: ledger.postpone(
                connection, work.claim, self.worker, until=until, now=now, hold=fault and work.hold, again=fault
            )
        )

    async def _surely(self, work: Callable[[Connection], None]) -> None:
        """Give a slice back even where the database can't be reached at once: it is tried until it can."""
        while True:
            try:
                await self.writer.run(work)
            except Exception as error:  # noqa: BLE001 - a slice that is not given back would wait for this process's end
                logger.warning("database.unusable", why=str(error), tried_again_in_seconds=1)
                await asyncio.sleep(1.0)
            else:
                return

    # ------------------------------------------------------------ claim

    def _take(self, connection: Connection, slice_id: int) -> Work | None:
        taken = ledger.claim(connection, slice_id, self.worker, now=self.clock())
        if taken is None:
            return None
        row = connection.execute(select(events).where(events.c.id == taken.event_id)).one()
        event = self._addressed(connection, event_row(row))
        numbers = ledger.owed(connection, taken)
        work = Work(taken, event, row.guard_at_plan, directory.address_key(connection), None, ())
        count = 1 if work.hold else FLIGHT
        first = self._begin(connection, work, numbers[:count]) if numbers else None
        return replace(work, first=first, numbers=tuple(numbers[count:]))

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

    async def _flights(self, work: Work) -> None:
        """Flight after flight; raises `RelayError` where no relay is left to try."""
        flight, numbers = work.first, list(work.numbers)
        while flight is not None and self.may_send():
            relay = self.relays.choose()
            numbers = await self._fly(work, relay, flight) + numbers
            count = 1 if work.hold else relay.rate.flight_size(FLIGHT)
            members, numbers = numbers[:count], numbers[count:]
            if not members:
                return
            flight = await self.writer.run(partial(self._begin, work=work, members=members))

    def _begin(self, connection: Connection, work: Work, members: Sequence[int]) -> Flight | None:
        """Name these mails and gather what they say; None where the claim was lost: its new owner sends them."""
        now = self.clock()
        if work.hold:
            flight_id, guard = 0, ledger.guard(connection)
        else:
            flight_id, guard = ledger.begin(connection, work.claim, self.worker, members, now=now)
            if not flight_id:
                return None
        checked = work.hold or guard != work.guard_at_plan
        dues, people, withdrawn = self._ready(connection, work.event, members, check=checked)
        return Flight(flight_id, now, dues, people, withdrawn)

    async def _fly(self, work: Work, relay: Relay, flight: Flight) -> list[int]:
        """Send these mails; returns those that were not begun because the relay failed: another may take them."""
        self.settler.expect(flight.id, len(flight.dues))
        mails = _Mails(self, work, flight, relay.name)
        try:
            await relay.send(mails.envelopes(), lane=int(work.claim.lane), done=mails.done, gate=self.settler.room)
        except RelayError:
            await self.settler.recorded(work.claim.slice_id)
            self.settler.forget(flight.id)
            await self.writer.run(lambda connection: ledger.land(connection, [flight.id]))
            return [due.n for due in flight.dues if due.n not in mails.settled]
        return []

    def _ready(
        self, connection: Connection, event: EventRow, members: Sequence[int], *, check: bool
    ) -> tuple[list[Due], People, dict[int, str]]:
        """The deliveries of a flight, whom they speak of, and why some of them are not to be sent after all.

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
            ready.append(replace(due, grounds=standing) if standing else due)
        return ready, people, gone

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
    relay: str
    _flown: list[Due] = field(default_factory=list)
    _holds: dict[int, int] = field(default_factory=dict)  # n -> flight, in the hold class
    settled: set[int] = field(default_factory=set)  # the numbers of which it is known what became of them

    def envelopes(self) -> Iterator[Envelope]:
        """Each mail that is to go; the others are settled on the way."""
        people = self.flight.people
        for due in self.flight.dues:
            reason = self.flight.withdrawn.get(due.n) or self._waits(due, people)
            if reason is not None:
                self._not_now(due, reason)
                continue
            expires = self.work.event.expires_at
            if expires is not None and self.sender.clock() >= expires:
                self._settle(due, Status.EXPIRED, "expired")
                continue
            try:
                envelope = self._envelope(due, people)
            except (RenderError, mime.MimeError) as error:
                logger.error("mail.unrenderable", event_id=self.work.event.ulid, n=due.n, why=str(error))
                self._settle(due, Status.HELD, "cannot_be_rendered", reply=str(error))
                continue
            self._flown.append(due)
            yield envelope

    def done(self, number: int, outcome: Outcome) -> None:
        """A mail was answered: one place turns what happened into a state."""
        due = self._flown[number]
        hold = self.work.event.class_ == HOLD_CLASS
        match outcome:
            case Outcome(kind=Kind.ACCEPTED):
                self._settle(due, Status.ACCEPTED, None, outcome=outcome)
            case Outcome(kind=Kind.UNKNOWN) if hold:
                self._settle(due, Status.HELD, "unknown", outcome=outcome)
            case Outcome(kind=Kind.PERMANENT, about=About.SENDER):
                self._settle(due, Status.HELD, "sender_refused", outcome=outcome)
            case Outcome(kind=Kind.PERMANENT, about=About.RECIPIENT):
                self._settle(due, Status.FAILED, "recipient_refused", outcome=outcome)
            case Outcome(kind=Kind.PERMANENT):
                self._settle(due, Status.FAILED, "content_refused", outcome=outcome)
            case Outcome(kind=Kind.UNKNOWN):
                self._again(due, "sent_again", outcome)
            case Outcome(kind=Kind.NOT_SENT):
                self._again(due, "connection_lost", outcome)
            case _:
                self._again(due, "refused_for_now", outcome)

    def _again(self, due: Due, reason: str, outcome: Outcome) -> None:
        at = ledger.retry_at(
            due.attempts + 1,
            now=self.sender.clock(),
            accepted_at=self.work.event.accepted_at,
            spread=random.random(),  # noqa: S311 - spreads retries, protects nothing
        )
        if at is None:
            self._settle(due, Status.FAILED, "given_up", outcome=outcome)
        else:
            self._settle(due, Status.PLANNED, reason, outcome=outcome, due_at=at)

    def _not_now(self, due: Due, reason: str) -> None:
        if reason in {"paused", "no_https", "no_sender"}:
            self._settle(due, Status.PLANNED, reason, due_at=NEVER)
        elif reason in {"test", "team"}:
            self._settle(due, Status.HELD, reason)
        else:
            self._settle(due, Status.CANCELLED, reason)

    def _waits(self, due: Due, people: People) -> str | None:
        """Why a mail may not leave now, though it is owed: a setting of this installation."""
        sender, event = self.sender, self.work.event
        mode = sender.planner.mode_of(event.mode)
        address = people.contacts[due.grounds[0].contact].address
        if mode == "test" or (mode == "team" and address not in sender.settings.team):
            return mode
        if not sender.settings.sender_of(event.class_):
            return "no_sender"
        if sender.composer.links is None and sender.composer.can_opt_out(event, due, people):
            return "no_https"
        return None

    def _envelope(self, due: Due, people: People) -> Envelope:
        sender, event = self.sender, self.work.event
        mail = sender.composer.mail_of(event, due, people, now=self.flight.begun)
        email = sender.renderer.render(mail)
        body = mime.assemble(email)
        variant = (event.id, variant_of(due.grounds[0].shape), mail.locale)
        if variant not in sender._proven:  # noqa: SLF001 - one object in two halves
            mime.prove(email, body)
            if len(sender._proven) > 10_000:  # noqa: SLF001
                sender._proven.clear()  # noqa: SLF001
            sender._proven.add(variant)  # noqa: SLF001
            hash_ = sender.renderer.version(event.type)
            sender.writer.submit(lambda c: sender.keep_rendition(c, *variant, hash_))
        return Envelope(
            sender=bounce_sender(self.work.address_key, event.id, due.n, event.bounce_domain),
            recipient=mime.wire_address(mail.to_address),
            body=body,
            smtputf8=mime.needs_smtputf8(mail.to_address),
            before_dot=(lambda: self._mark(due)) if event.class_ == HOLD_CLASS else None,
        )

    async def _mark(self, due: Due) -> bool:
        """The hold class: commit that this mail may leave, before its last bytes; False where the claim was lost."""
        if not self.sender.may_send():
            return False
        work, worker, begun = self.work, self.sender.worker, self.flight.begun
        flight_id, _ = await self.sender.writer.run(
            lambda connection: ledger.begin(connection, work.claim, worker, [due.n], now=begun)
        )
        self.sender.settler.expect(flight_id, 1)
        self._holds[due.n] = flight_id
        return bool(flight_id)

    def _settle(
        self,
        due: Due,
        status: Status,
        reason: str | None,
        *,
        outcome: Outcome | None = None,
        due_at: int | None = None,
        reply: str | None = None,
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
                attempted=outcome is not None,
                due_at=due_at,
                relay=self.relay if outcome is not None else None,
                reply=outcome.reply if outcome is not None else reply,
                flown_at=self.flight.begun,
                at=self.sender.clock(),
            )
        )
