"""The account at the end of a run: published, planned, accepted, missing, second copies.

It reads three things only: what the witness wrote before and after each call, what the sink wrote as it accepted each
mail, and the ledger through SQL. *Missing* is a recipient of an event that was taken, with neither a copy in the sink
nor a delivery that is visibly held or ended otherwise. A *second copy* is charged to the fault that lies nearest to
the time at which the first was accepted.
"""

from __future__ import annotations

import bisect
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select

from subscriptions.database import Database
from subscriptions.schema import mailboxes
from worker.ledger import HOLD_CLASS, Status
from worker.schema import deliveries, events, flights, slices, tallies

IN_FLIGHT = 256
"""Mails of one worker process whose bytes may be out and whose outcome is not committed (design, principle 6)."""

SHOWN = 5
"""So many examples of a fault are named."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A mail that the sink accepted: when (microseconds since 1970), to whom, and the two headers."""

    at: int
    recipient: str
    message_id: str
    ulid: str


@dataclass(slots=True)
class Account:
    """What a run came to. `faults` are sentences: empty means passed."""

    published: int = 0  # events that Rolecast took
    planned: int = 0  # deliveries in the ledger
    expected: int = 0  # (event, recipient) pairs that the witness says were to be reached
    accepted: int = 0  # mails in the sink
    missing: int = 0
    copies: int = 0  # mails in the sink that were not the first of their pair
    copies_by_fault: list[int] = field(default_factory=list)  # in the order of the witness's faults
    lost_answers_ms: float = 0.0  # how long before its fault the oldest answer was given that no commit had kept
    held: int = 0
    refused: int = 0  # events that were refused, or whose publisher was told "later" and that are not in the ledger
    states: dict[str, int] = field(default_factory=dict)  # deliveries by status, counted
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return not self.faults

    @property
    def average(self) -> float:
        """Second copies a fault, on average."""
        return self.copies / len(self.copies_by_fault) if self.copies_by_fault else float(self.copies)

    def wrong(self, sentence: str, examples: Collection[object] = ()) -> None:
        """Note something that must not be, with a few of those that it concerns."""
        shown = ", ".join(str(one) for one in sorted(map(str, examples))[:SHOWN])
        self.faults.append(f"{sentence}{f': {shown}' if shown else ''}")

    def print(self) -> None:
        """The account as a table of one row, and what is wrong."""
        print_table([("", self, 0.0)], seconds=False)
        for fault in self.faults:
            print(f"  FAULT: {fault}", flush=True)


def print_table(rows: Sequence[tuple[str, Account, float]], *, seconds: bool = True) -> None:
    """Accounts with their names and seconds, one row each."""
    heads = ["campaign", "published", "planned", "accepted", "missing", "2nd copies", "most", "mean", "held"]
    cells = [
        [name, f"{one.published:,}", f"{one.planned:,}", f"{one.accepted:,}", f"{one.missing:,}", f"{one.copies:,}",
         str(max(one.copies_by_fault, default=0)), f"{one.average:.1f}", f"{one.held:,}", f"{took:.0f}",
         "yes" if one.passed else "NO"]
        for name, one, took in rows
    ]  # fmt: skip
    heads += ["seconds", "passed"]
    if not seconds:
        heads, cells = heads[1:-2] + heads[-1:], [row[1:-2] + row[-1:] for row in cells]
    widths = [max(len(row[number]) for row in [heads, *cells]) for number in range(len(heads))]
    for row in [heads, *cells]:
        print("  ".join(cell.rjust(width) if n else cell.ljust(width) for n, (cell, width) in
                        enumerate(zip(row, widths, strict=True))), flush=True)  # fmt: skip


def read_log(path: Path) -> list[Accepted]:
    """What the sink accepted, in its order; a line that is being written now is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if line.endswith("\n"):
            at, recipient, message_id, ulid = line.split()
            found.append(Accepted(int(at), recipient.lower(), message_id, ulid))
    return found


def draw_up(
    database_url: str,
    witness: Path,
    log: Path,
    *,
    bound: int = IN_FLIGHT,
    average: float | None = None,
    copies_in_hold_class: bool = False,
    ends: Collection[str] = ("accepted", "held"),
    ended: bool = True,
) -> Account:
    """The account of a run.

    `bound`: second copies that one fault may make (0: none at all), `average`: a fault's on average; the hold class may
    make none. `ends`: the statuses in which a delivery may stand. `ended`: everything must be done, no flight open.
    """
    told = _Told.read(witness)
    mails = read_log(log)
    database = Database(database_url)
    try:
        with database.read() as connection:
            ledger = _Ledger.read(connection)
    finally:
        database.close()
    account = Account(accepted=len(mails), planned=len(ledger.rows), states=dict(ledger.states))
    expected = _published(account, told, ledger)
    _reached(account, expected, ledger, mails, ends=ends)
    _copies(account, told, ledger, mails, bound=bound, average=average, hold_too=copies_in_hold_class)
    _books(account, ledger, mails, ended=ended)
    return account


# ---------------------------------------------------------------- what is read


@dataclass(slots=True)
class _Told:
    """The witness's file."""

    audiences: dict[str, frozenset[str]] = field(default_factory=dict)
    intents: dict[tuple[str, str], str] = field(default_factory=dict)  # (source, id) -> audience
    answers: dict[tuple[str, str], list[tuple[str, str | None]]] = field(default_factory=lambda: defaultdict(list))
    faults: list[int] = field(default_factory=list)  # times

    @classmethod
    def read(cls, path: Path) -> _Told:
        told = cls()
        for line in path.read_text(encoding="utf-8").splitlines():
            one: dict[str, Any] = json.loads(line)
            match one["what"]:
                case "audience":
                    told.audiences[one["name"]] = frozenset(address.lower() for address in one["recipients"])
                case "intent":
                    told.intents[one["source"], one["id"]] = one["audience"]
                case "outcome":
                    told.answers[one["source"], one["id"]].append((one["outcome"], one["event"]))
                case "fault":
                    told.faults.append(one["at"])
        return told


@dataclass(frozen=True, slots=True)
class _Row:
    """A delivery: its event's ULID, its number, its address, where it stands."""

    ulid: str
    n: int
    address: str
    status: str
    deferred: bool


@dataclass(slots=True)
class _Ledger:
    """What the ledger says."""

    events: dict[tuple[str, str], Any] = field(default_factory=dict)  # (source, id) -> its row
    rows: dict[tuple[str, str], _Row] = field(default_factory=dict)  # (ulid, address) -> delivery
    domains: dict[str, str] = field(default_factory=dict)  # ulid -> the domain of its Message-IDs
    hold: set[str] = field(default_factory=set)  # ULIDs of the hold class
    states: Counter[str] = field(default_factory=Counter)
    tallies: Counter[tuple[str, str]] = field(default_factory=Counter)  # (ulid, status)
    doubled: list[tuple[str, str]] = field(default_factory=list)
    flights: int = 0
    slices: int = 0

    @classmethod
    def read(cls, connection: Connection) -> _Ledger:
        ledger = cls()
        ulids = {}
        for event in connection.execute(select(events)):
            ledger.events[event.source, event.ce_id] = event
            ledger.domains[event.ulid] = event.sender_domain
            ulids[event.id] = event.ulid
            if event._mapping["class"] == HOLD_CLASS:
                ledger.hold.add(event.ulid)
        query = select(
            deliveries.c.event_id, deliveries.c.n, deliveries.c.status, deliveries.c.due_at, mailboxes.c.address
        ).join(mailboxes, mailboxes.c.id == deliveries.c.mailbox_id)
        for one in connection.execute(query):
            status = Status(one.status).name.lower()
            row = _Row(ulids[one.event_id], one.n, (one.address or "").lower(), status, one.due_at is not None)
            ledger.states[status] += 1
            if (row.ulid, row.address) in ledger.rows:
                ledger.doubled.append((row.ulid, row.address))
            ledger.rows[row.ulid, row.address] = row
        for event_id, status, n in connection.execute(
            select(tallies.c.event_id, tallies.c.status, func.sum(tallies.c.n)).group_by(
                tallies.c.event_id, tallies.c.status
            )
        ):
            if n:
                ledger.tallies[ulids[event_id], Status(status).name.lower()] = int(n)
        ledger.flights = connection.execute(select(func.count()).select_from(flights)).scalar_one()
        ledger.slices = connection.execute(
            select(func.count()).select_from(slices).where(slices.c.done_at.is_(None))
        ).scalar_one()
        return ledger


# ---------------------------------------------------------------- what is judged


def _published(account: Account, told: _Told, ledger: _Ledger) -> dict[tuple[str, str], str]:
    """Every (ULID, address) that is owed a mail -> its audience's name; an event is there wholly or not at all."""
    expected: dict[tuple[str, str], str] = {}
    for identity, audience in told.intents.items():
        answers = {answer for answer, _ in told.answers[identity]}
        ulids = {ulid for _, ulid in told.answers[identity] if ulid}
        event = ledger.events.get(identity)
        if event is None:
            if "ok" in answers:
                account.wrong("an event was taken and is not in the ledger", [identity])
            account.refused += 1
            continue
        if answers == {"refused"}:
            account.wrong("an event was refused and is in the ledger", [identity])
        if ulids - {event.ulid}:
            account.wrong("a publisher was told another event's id", [identity, *ulids])
        account.published += 1
        expected |= {(event.ulid, address): audience for address in told.audiences[audience]}
    strangers = set(ledger.events) - set(told.intents)
    if strangers:
        account.wrong("events are in the ledger that nobody published", strangers)
    account.expected = len(expected)
    return expected


def _reached(
    account: Account, expected: dict[tuple[str, str], str], ledger: _Ledger, mails: Sequence[Accepted], *,
    ends: Collection[str],
) -> None:  # fmt: skip
    reached = {(mail.ulid, mail.recipient) for mail in mails}
    rows = ledger.rows
    account.held = ledger.states["held"]
    visible = {pair for pair, row in rows.items() if row.status != "planned" and row.status != "accepted"}
    missing = set(expected) - reached - visible
    account.missing = len(missing)
    if missing:
        stand = Counter(rows[pair].status if pair in rows else "not in the ledger" for pair in missing)
        account.wrong(f"{len(missing):,} are missing ({dict(stand)})", missing)
    if extra := reached - set(expected):
        account.wrong(f"{len(extra):,} mails went to somebody who was to get none", extra)
    if extra := set(rows) - set(expected):
        account.wrong(f"{len(extra):,} deliveries are for somebody who was to get none", extra)
    if odd := {
        pair
        for pair, row in rows.items()
        if row.status not in ends and not (row.status == "planned" and pair in missing)
    }:
        account.wrong(f"{len(odd):,} deliveries ended as {sorted({rows[pair].status for pair in odd})}", odd)
    if unproven := {pair for pair, row in rows.items() if row.status == "accepted" and pair not in reached}:
        account.wrong(f"{len(unproven):,} deliveries are accepted in the ledger without a copy in the sink", unproven)


def _copies(
    account: Account, told: _Told, ledger: _Ledger, mails: Sequence[Accepted], *, bound: int, average: float | None,
    hold_too: bool,
) -> None:  # fmt: skip
    first: dict[tuple[str, str], Accepted] = {}
    by_fault: Counter[int] = Counter()
    in_hold_class, renamed = [], []
    for mail in mails:
        pair = mail.ulid, mail.recipient
        if pair not in first:
            first[pair] = mail
            continue
        account.copies += 1
        fault = _nearest(told.faults, first[pair].at)
        by_fault[fault] += 1
        if fault >= 0:
            before = (told.faults[fault] - first[pair].at) / 1000
            account.lost_answers_ms = max(account.lost_answers_ms, before)
        if mail.message_id != first[pair].message_id:
            renamed.append(mail)
        if mail.ulid in ledger.hold:
            in_hold_class.append(mail)
    account.copies_by_fault = [by_fault[number] for number in range(len(told.faults))]
    if renamed:
        account.wrong(f"{len(renamed):,} second copies have another Message-ID than the first", renamed)
    if in_hold_class and not hold_too:
        account.wrong(f"{len(in_hold_class):,} second copies in the hold class", in_hold_class)
    most = max(by_fault.values(), default=0)
    if most > bound:
        account.wrong(f"a fault made {most} second copies, more than {bound}")
    if average is not None and account.average > average:
        account.wrong(f"{account.average:.1f} second copies a fault on average, more than {average:.0f}")


def _nearest(times: Sequence[int], at: int) -> int:
    """The place of the time nearest to `at`; -1 where there are none."""
    place = bisect.bisect(times, at)
    return min((n for n in (place - 1, place) if 0 <= n < len(times)), key=lambda n: abs(times[n] - at), default=-1)


_MESSAGE_ID = re.compile(r"<([0-9a-z]+)\.([0-9]+)@(.+)>")


def _books(account: Account, ledger: _Ledger, mails: Sequence[Accepted], *, ended: bool) -> None:
    """R33: every Message-ID is one delivery's, sums and tallies agree, nothing is left open."""
    numbered = {(row.ulid.lower(), row.n): row for row in ledger.rows.values()}
    foreign = []
    for mail in mails:
        parts = _MESSAGE_ID.fullmatch(mail.message_id)
        row = numbered.get((parts[1], int(parts[2]))) if parts else None
        if parts is None or row is None or (row.address, row.ulid) != (mail.recipient, mail.ulid) or (
            parts[3] != ledger.domains[row.ulid]
        ):  # fmt: skip
            foreign.append(mail)
    if foreign:
        account.wrong(f"{len(foreign):,} mails whose Message-ID is not that of their delivery", foreign)
    if ledger.doubled:
        account.wrong("a mailbox has several deliveries of one event", ledger.doubled)
    counted = Counter((row.ulid, row.status) for row in ledger.rows.values())
    if counted != ledger.tallies:
        wrong = {key for key in counted | ledger.tallies if counted[key] != ledger.tallies[key]}
        account.wrong(
            "the tallies are not the counts",
            [f"{key} counted {counted[key]}, tallied {ledger.tallies[key]}" for key in wrong],
        )
    if ended:
        if ledger.flights:
            account.wrong(f"{ledger.flights} flights are open at the end")
        if ledger.slices:
            account.wrong(f"{ledger.slices} slices are not done at the end")
        if undone := {key for key, event in ledger.events.items() if event.status != "done"}:
            account.wrong(f"{len(undone)} events are not done at the end", undone)
