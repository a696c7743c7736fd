"""Limits that all workers of an installation keep together: rates of relays and domains, and a relay's day.

They live in the ledger, in the transaction that begins a flight, so they hold for any number of hosts, for both queues
and over a restart. A rate is one number a name: when the next mail may go, had all before it gone on time (GCRA).
A relay's quota counts mails that were begun in a UTC day, whatever became of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, func, select, update

from subscriptions.database import insert_into
from worker import logs
from worker.ledger import Lane
from worker.relay import Relay
from worker.schema import paces, relay_days

logger = logs.get(__name__)

SECOND = 1_000_000
DAY = 86_400 * SECOND

PATIENCE = {Lane.URGENT: 5 * SECOND, Lane.NORMAL: 3 * SECOND, Lane.BULK: 2 * SECOND}
#: How far ahead a lane's flights line up for a relay's rate; less for bulk, so that an urgent one finds room before it.
NO_RELAY_SECONDS = 5
#: How long a slice rests when no relay can be used now.
MIDNIGHT_SECONDS = 300
#: After a quota is spent, sending begins again within so many seconds of midnight (UTC), not all at once.
AT_ONCE = SECOND // 2
#: A mail whose slot for its domain comes within this time goes now; a later one is put off until its slot.
NO_QUOTA = 2**31
_LOCK = 0x726F6C65_70616365
#: PostgreSQL's advisory lock of who takes from these limits: several rows change, always one worker at a time.


@dataclass(frozen=True, slots=True)
class Choice:
    """The relay that a flight may use, and how many mails its day still has room for."""

    relay: Relay
    room: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing may begin before this time, microseconds."""

    until: int


@dataclass(slots=True)
class Paces:
    """The limits as one worker process sees them. `domain_rates` are mails a second by domain (A-labels)."""

    domain_rates: Mapping[str, float]
    _told: set[tuple[str, int]] = field(default_factory=set)  # (relay, day) that is known to be spent

    def unlimited(self, relays: Sequence[Relay]) -> bool:
        """Whether no limit is set that a flight to one of these relays would have to keep."""
        return not self.domain_rates and not any(relay.settings.rate or relay.settings.daily for relay in relays)

    def choose(
        self, connection: Connection, relays: Sequence[Relay], *, among: int, lane: Lane, now: int
    ) -> Choice | Rest:
        """The first of `relays`, those `among` all that can be tried now, whose limits let a flight begin soon.

        Nothing is taken yet: `take` does that, in the same transaction.
        """
        if not self.unlimited(relays):
            alone(connection)
        for relay in relays:
            room = self._room(connection, relay, now)
            if not room:
                continue
            if relay.settings.rate:
                query = select(paces.c.ready_at).where(paces.c.name == _relay_pace(relay))
                ready_at = connection.execute(query).scalar() or 0
                if ready_at > now + PATIENCE[lane]:
                    return Rest(ready_at)
            return Choice(relay, room)
        if relays and len(relays) == among:
            spread = random.randrange(MIDNIGHT_SECONDS * SECOND)  # noqa: S311 - protects nothing
            return Rest((now // DAY + 1) * DAY + spread)
        return Rest(now + NO_RELAY_SECONDS * SECOND)

    def take(self, connection: Connection, relay: Relay, count: int, *, now: int) -> int | None:
        """Let `count` mails begin at a relay: when the first may go; None where its day has no room for them."""
        if not count:
            return now
        if relay.settings.daily and not self._count(connection, relay, count, now):
            return None
        if not relay.settings.rate:
            return now
        return _reserve(connection, _relay_pace(relay), count, relay.settings.rate, now=now)

    def give_back(self, connection: Connection, relay: Relay, count: int, *, begun: int) -> None:
        """Do not count mails that could not be begun after all: a relay that is down must not spend its day."""
        if relay.settings.daily and count:
            chosen = (relay_days.c.relay == relay.name) & (relay_days.c.day == begun // DAY)
            connection.execute(update(relay_days).where(chosen).values(mails=relay_days.c.mails - count))

    def put_off(self, connection: Connection, domains: Mapping[int, str], *, lane: Lane, now: int) -> dict[int, int]:
        """Take a slot for each of these mails (number -> domain); those whose slot comes later, with its time.

        A more urgent lane does not line up behind slots promised to a less urgent one, which goes slower after it.
        """
        later: dict[int, int] = {}
        for domain in sorted(self.domain_rates.keys() & set(domains.values())):
            rate = self.domain_rates[domain]
            numbers = [n for n, of in domains.items() if of == domain]
            starts = [
                _reserve(connection, f"domain {domain} {one.name.lower()}", len(numbers), rate, now=now)
                for one in Lane
                if one >= lane
            ]
            for place, n in enumerate(numbers):
                slot = starts[0] + int(place * SECOND / rate)
                if slot > now + AT_ONCE:
                    later[n] = slot
        return later

    def _room(self, connection: Connection, relay: Relay, now: int) -> int:
        """How many mails a relay's day has room for."""
        if not relay.settings.daily:
            return NO_QUOTA
        quota, counted = self._today(connection, relay, now)
        room = max(0, quota - counted)
        day = now // DAY
        if not room and (relay.name, day) not in self._told:
            self._told.add((relay.name, day))
            what_next = "the next relay is used, or mail waits until midnight UTC"
            logger.warning("relay.spent", relay=relay.name, mails=counted, quota=quota, what_next=what_next)
        return room

    def _today(self, connection: Connection, relay: Relay, now: int) -> tuple[int, int]:
        """(quota, mails begun) of a relay today."""
        day, mine = now // DAY, relay_days.c.relay == relay.name
        first = select(func.min(relay_days.c.day)).where(mine).scalar_subquery()
        counted = select(relay_days.c.mails).where(mine, relay_days.c.day == day).scalar_subquery()
        row = connection.execute(select(first, counted)).one()
        number = 1 if row[0] is None else max(1, day - row[0] + 1)
        return quota_of(relay.settings.daily, relay.settings.warmup, number), row[1] or 0

    def _count(self, connection: Connection, relay: Relay, count: int, now: int) -> bool:
        """Count mails in the relay's day, unless they would be more than its quota."""
        quota, _ = self._today(connection, relay, now)
        if count > quota:
            return False
        statement = insert_into(connection, relay_days).values(relay=relay.name, day=now // DAY, mails=count)
        together = relay_days.c.mails + statement.excluded.mails
        row = connection.execute(
            statement.on_conflict_do_update(
                index_elements=["relay", "day"], set_={"mails": together}, where=together <= quota
            ).returning(relay_days.c.mails)
        ).first()
        return row is not None


def quota_of(daily: int, warmup: int, number: int) -> int:
    """A relay's quota on its `number`-th day, from 1: it doubles each day and is `daily` from day `warmup` on."""
    return daily if number >= warmup else math.ceil(daily * 2.0 ** (number - warmup))


def flight_size(relays: Sequence[Relay], most: int) -> int:
    """The largest flight that takes no more than a quarter of a second of the rate of any of these relays."""
    rates = [relay.settings.rate for relay in relays if relay.settings.rate]
    return max(1, min(most, int(min(rates) / 4))) if rates else most


def alone(connection: Connection) -> None:
    """Have these limits to oneself until the transaction ends; on SQLite whoever writes has that anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))


def _relay_pace(relay: Relay) -> str:
    return f"relay {relay.name}"


def _reserve(connection: Connection, name: str, count: int, per_second: float, *, now: int) -> int:
    """Line up `count` mails: when the first of them may go."""
    cost = int(count * SECOND / per_second)
    statement = insert_into(connection, paces).values(name=name, ready_at=now + cost)
    later = func.max if connection.dialect.name == "sqlite" else func.greatest
    ready_at = connection.execute(
        statement.on_conflict_do_update(
            index_elements=["name"], set_={"ready_at": later(paces.c.ready_at, now) + cost}
        ).returning(paces.c.ready_at)
    ).scalar_one()
    return int(ready_at) - cost
