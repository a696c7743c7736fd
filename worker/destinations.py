"""Domains that refuse for now are left alone for a while, by all workers together; the others do not notice (R17).

Three answers "not now" in a row about recipients of a domain, with no acceptance between, and no mail goes there for
1, 2, 4, ... 60 minutes. Then one mail tries: where it is refused too the wait grows, an acceptance ends it. What a
server says about one mailbox (4.2.x, greylisting) is nothing against its domain: the next mail may well go through.

A process keeps what it knows in memory, reads the table now and then when a flight begins, and writes with the outcomes
that it settles.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection, delete, func, select, update

from subscriptions.database import insert_into
from worker.paces import alone
from worker.relay import About, Kind, Outcome
from worker.schema import domains as table

FAILURES = 3
#: In a row, until a domain is left alone.
MINUTES = (1, 2, 4, 8, 16, 32, 60)
#: For how long, by failures from the third on; the last one repeats.
MINUTE = 60_000_000
PROBE_SECONDS = 60
#: How long the others wait for the one mail that tries.
SPREAD_SECONDS = 30
#: Mails that waited for a domain come back within so many seconds of each other.
READ_SECONDS = 0.5
#: How old what other processes know may be.
ALIVE_SECONDS = 3600
#: A domain that took a mail at its second try greylists: for so long its first refusals say nothing.
FORGET_HOURS = 24
#: A row that nobody renewed is taken out after so long.
MOST = 10_000
#: Domains that a process remembers without a row.


@dataclass(frozen=True, slots=True)
class Wait:
    """A domain that is left alone."""

    failures: int
    until_at: int
    said: str = ""


@dataclass(slots=True)
class Destinations:
    """What a worker process knows of the domains that it mails (A-labels)."""

    _rows: Mapping[str, Wait] = field(default_factory=dict)  # as read from the table
    _own: dict[str, Wait | None] = field(default_factory=dict)  # what happened here since; None = it took a mail
    _unwritten: set[str] = field(default_factory=set)
    _failures: Counter[str] = field(default_factory=Counter)  # in a row, of domains that have no row yet
    _alive: dict[str, int] = field(default_factory=dict)  # domains that greylist -> until when that is believed
    _probing: set[str] = field(default_factory=set)  # domains at which a mail of this process tries
    _read_at: int = 0

    # ------------------------------------------------------------ before a mail goes

    @property
    def calm(self) -> bool:
        """Whether nothing is known that could concern a mail, or an acceptance could end."""
        return not (self._rows or self._own or self._failures or self._probing)

    def refresh(self, connection: Connection, *, now: int) -> None:
        """Read what other processes know, where that was long ago."""
        if not 0 <= now - self._read_at < READ_SECONDS * 1_000_000:
            self._read(connection, now)

    def put_off(self, connection: Connection, domains: Mapping[int, str], *, now: int) -> dict[int, int]:
        """Those of these mails (number -> domain) that may not go now, with the time when they come again."""
        self.refresh(connection, now=now)
        later: dict[int, int] = {}
        for n, domain in domains.items():
            if self._state(domain) is not None and not self._tries(connection, domain, now):
                later[n] = self._again_at(domain, now)
        return later

    def waits(self, domain: str, *, now: int) -> int | None:
        """When a mail to a domain comes again, where the domain began to refuse after its flight began; else None."""
        state = self._state(domain)
        if state is None or state.until_at <= now or domain in self._probing:
            return None
        return self._again_at(domain, now)

    def _read(self, connection: Connection, now: int) -> None:
        rows = connection.execute(select(table.c.domain, table.c.failures, table.c.until_at))
        self._rows = {row.domain: Wait(row.failures, row.until_at) for row in rows}
        self._read_at = now

    def _state(self, domain: str) -> Wait | None:
        return self._own[domain] if domain in self._own else self._rows.get(domain)

    def _tries(self, connection: Connection, domain: str, now: int) -> bool:
        """Whether this mail is the one that tries a domain whose wait is over: of all workers, one."""
        seen = self._state(domain)
        if seen is None or seen.until_at > now:
            return seen is None
        alone(connection)
        until_at = now + PROBE_SECONDS * 1_000_000
        won = connection.execute(
            update(table).where(table.c.domain == domain, table.c.until_at == seen.until_at).values(until_at=until_at)
        ).rowcount
        if won:
            self._rows = {**self._rows, domain: Wait(seen.failures, until_at)}
            self._probing.add(domain)
            return True
        self._read(connection, now)  # another tries, or it is over
        found = self._state(domain)
        return found is None

    def _again_at(self, domain: str, now: int) -> int:
        state = self._state(domain)
        until_at = state.until_at if state is not None else now
        return max(until_at, now) + random.randrange(SPREAD_SECONDS * 1_000_000)  # noqa: S311 - protects nothing

    # ------------------------------------------------------------ after it was answered

    def answered(self, domain: str, outcome: Outcome, *, attempts: int, now: int) -> None:
        """Learn from what became of a mail that had been tried `attempts` times before."""
        if outcome.kind is Kind.ACCEPTED:
            self._accepted(domain, attempts, now)
        elif about_the_domain(outcome):
            self._refused(domain, outcome.reply, attempts, now)

    def _accepted(self, domain: str, attempts: int, now: int) -> None:
        self._failures.pop(domain, None)
        self._probing.discard(domain)
        if attempts and domain not in self._alive:
            if len(self._alive) >= MOST:
                self._alive.clear()
            self._alive[domain] = now + ALIVE_SECONDS * 1_000_000
        if self._state(domain) is not None:
            self._change(domain, None)

    def _refused(self, domain: str, said: str, attempts: int, now: int) -> None:
        if not attempts:
            if self._alive.get(domain, 0) > now:
                return
            self._alive.pop(domain, None)
        state = self._state(domain)
        if state is not None and state.until_at > now and domain not in self._probing:
            return  # it was on its way when the wait began
        self._probing.discard(domain)
        if state is not None:
            failures = state.failures + 1
        else:
            if len(self._failures) >= MOST:
                self._failures.clear()
            self._failures[domain] += 1
            failures = self._failures[domain]
            if failures < FAILURES:
                return
            del self._failures[domain]
        wait = MINUTES[min(failures - FAILURES, len(MINUTES) - 1)] * MINUTE
        spread = 0.8 + 0.4 * random.random()  # noqa: S311 - protects nothing
        self._change(domain, Wait(failures, now + max(MINUTE, int(wait * spread)), said))

    def _change(self, domain: str, state: Wait | None) -> None:
        self._own[domain] = state
        self._unwritten.add(domain)

    # ------------------------------------------------------------ into the ledger, with the outcomes

    def changes(self) -> dict[str, Wait | None]:
        """What is to be written now: domain -> its wait, or None where that ended."""
        changes = {domain: self._own[domain] for domain in sorted(self._unwritten)}
        self._unwritten.clear()
        return changes

    def written(self, changes: Mapping[str, Wait | None]) -> None:
        """These changes are committed: from now on the table is believed."""
        rows = dict(self._rows)
        for domain, state in changes.items():
            if domain in self._own and self._own[domain] is state and domain not in self._unwritten:
                del self._own[domain]
                rows.pop(domain, None)
                if state is not None:
                    rows[domain] = state
        self._rows = rows


def record(connection: Connection, changes: Mapping[str, Wait | None], *, now: int) -> None:
    """Write what a process learnt; of two waits for one domain the longer one stays."""
    if not changes:
        return
    alone(connection)
    over = [domain for domain, state in changes.items() if state is None]
    if over:
        connection.execute(delete(table).where(table.c.domain.in_(over)))
    waits = [
        {"domain": domain, "failures": state.failures, "until_at": state.until_at, "said": state.said}
        for domain, state in changes.items()
        if state is not None
    ]
    if not waits:
        return
    statement = insert_into(connection, table)
    later, new = func.max if connection.dialect.name == "sqlite" else func.greatest, statement.excluded
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["domain"],
            set_={
                "failures": later(table.c.failures, new.failures),
                "until_at": later(table.c.until_at, new.until_at),
                "said": new.said,
            },
        ),
        waits,
    )
    connection.execute(delete(table).where(table.c.until_at < now - FORGET_HOURS * 3_600_000_000))


_ABOUT_A_MAILBOX = re.compile(r"^4\.2\.\d|gr[ea]y.?list", re.IGNORECASE)
_NO_ANSWER = "no answer in time"
#: As `worker.transaction` puts it.


def about_the_domain(outcome: Outcome) -> bool:
    """Whether an outcome speaks against sending to the recipient's domain for now."""
    if outcome.kind is Kind.NOT_SENT:
        return outcome.stage == "rcpt" and outcome.text == _NO_ANSWER
    return (
        outcome.kind is Kind.TEMPORARY
        and outcome.about is About.RECIPIENT
        and outcome.code // 100 == 4
        and outcome.code != 452  # this mailbox is full (a 552 says so too)
        and not _ABOUT_A_MAILBOX.search(outcome.text)
    )
