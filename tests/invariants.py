"""What holds in every ledger at every moment, whatever befell it (reliability.md R33), as functions for tests.

`check(database)` raises AssertionError with what is wrong; `standing` and `moved_backwards` compare two moments;
`unaccounted` compares what a relay took with what the ledger owes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from sqlalchemy import Connection, func, select

from subscriptions.database import Database
from subscriptions.directory import address_key
from subscriptions.schema import contacts, mailboxes
from worker.ledger import Status
from worker.links import BadToken, delivery_identity, read_bounce
from worker.schema import deliveries, events, flights, more_grounds, slices, tallies

FINAL = frozenset({Status.ACCEPTED, Status.FAILED, Status.CANCELLED, Status.EXPIRED, Status.HELD})
COMES_LATER = {
    Status.HELD: {Status.ACCEPTED},  # an answer that was learnt late
    Status.ACCEPTED: {Status.BOUNCED, Status.COMPLAINED},
    Status.BOUNCED: {Status.COMPLAINED},
}

Standing = Mapping[tuple[int, int], tuple[Status, int]]
"""(event, n) -> (status, attempts) at one moment."""


class Mail(Protocol):
    """A mail as a sink keeps it."""

    @property
    def sender(self) -> str: ...

    @property
    def recipient(self) -> str: ...


def check(database: Database) -> None:
    """Assert that the ledger agrees with itself; one snapshot, so it may be called while workers work."""
    with database.read() as connection:
        wrong = [*_sums(connection), *_orphans(connection), *_work(connection)]
    assert not wrong, "\n".join(wrong)


def _sums(connection: Connection) -> Iterable[str]:
    """Sum of states = planned; tallies = counts; a mailbox has one delivery of an event."""
    counted: dict[tuple[int, int], int] = {
        (row.event_id, row.status): row.n
        for row in connection.execute(
            select(deliveries.c.event_id, deliveries.c.status, func.count().label("n")).group_by(
                deliveries.c.event_id, deliveries.c.status
            )
        )
    }
    told: dict[tuple[int, int], int] = {
        (row.event_id, row.status): int(row.n)
        for row in connection.execute(
            select(tallies.c.event_id, tallies.c.status, func.sum(tallies.c.n).label("n")).group_by(
                tallies.c.event_id, tallies.c.status
            )
        )
        if row.n
    }
    if counted != told:
        yield f"tallies {told} are not the counts {counted}"
    sums = Counter[int]()
    for (event_id, _), n in counted.items():
        sums[event_id] += n
    for row in connection.execute(select(events.c.id, events.c.next_n)):
        if sums[row.id] != row.next_n - 1:
            yield f"event {row.id} planned {row.next_n - 1} deliveries and has {sums[row.id]}"
    twice = connection.execute(
        select(deliveries.c.event_id, deliveries.c.mailbox_id)
        .group_by(deliveries.c.event_id, deliveries.c.mailbox_id)
        .having(func.count() > 1)
    ).all()
    if twice:
        yield f"several deliveries of one event to one mailbox: {twice}"


def _orphans(connection: Connection) -> Iterable[str]:
    """Every row's event, contact and account exist, and a delivery writes to an account of its own contact."""
    for table in (deliveries, slices, tallies, more_grounds):
        lost = connection.execute(
            select(table.c.event_id).where(table.c.event_id.not_in(select(events.c.id))).distinct()
        ).all()
        if lost:
            yield f"{table.name} of events that do not exist: {lost}"
    for table in (deliveries, more_grounds):
        crossed = connection.execute(
            select(table.c.event_id, table.c.n)
            .outerjoin(contacts, contacts.c.id == table.c.contact_id)
            .where((contacts.c.id.is_(None)) | (contacts.c.account_id != table.c.account_id))
        ).all()
        if crossed:
            yield f"{table.name} with a contact of another account: {crossed[:5]}"


def _work(connection: Connection) -> Iterable[str]:
    """Flights belong to slices; an event that is done owes nothing; whatever is owed is carried by something."""
    lost = connection.execute(select(flights.c.id).where(flights.c.slice_id.not_in(select(slices.c.id)))).all()
    if lost:
        yield f"flights of slices that do not exist: {lost}"
    unfinished = select(slices.c.event_id).where(slices.c.done_at.is_(None))
    owing = select(deliveries.c.event_id).where(deliveries.c.status == int(Status.PLANNED))
    early = connection.execute(
        select(events.c.id).where(events.c.status == "done", events.c.id.in_(unfinished) | events.c.id.in_(owing))
    ).all()
    if early:
        yield f"events are done and still owe: {early}"
    yield from _carried(connection)


def _carried(connection: Connection) -> Iterable[str]:
    """A planned delivery is deferred (it has a time), or an unfinished slice carries it: nothing is forgotten."""
    ranges: dict[int, list[tuple[int, int]]] = {}
    own: set[tuple[int, int]] = set()
    for row in connection.execute(select(slices).where(slices.c.done_at.is_(None))):
        if row.members:
            own |= {(row.id, n) for n in json.loads(row.members)}
        else:
            ranges.setdefault(row.event_id, []).append((row.first_n, row.last_n))
    waiting = connection.execute(
        select(deliveries.c.event_id, deliveries.c.n, deliveries.c.retry_slice)
        .join(events, events.c.id == deliveries.c.event_id)
        .where(deliveries.c.status == int(Status.PLANNED), deliveries.c.due_at.is_(None), events.c.status != "held")
    )
    forgotten = [
        (row.event_id, row.n)
        for row in waiting
        if (
            (row.retry_slice, row.n) not in own
            if row.retry_slice is not None
            else not any(first <= row.n <= last for first, last in ranges.get(row.event_id, ()))
        )
    ]
    if forgotten:
        yield f"deliveries that are owed and carried by nothing: {forgotten[:5]} ({len(forgotten)} in all)"


def standing(database: Database) -> Standing:
    """Where every delivery stands now."""
    with database.read() as connection:
        rows = connection.execute(
            select(deliveries.c.event_id, deliveries.c.n, deliveries.c.status, deliveries.c.attempts)
        )
        return {(row.event_id, row.n): (Status(row.status), row.attempts) for row in rows}


def moved_backwards(before: Standing, after: Standing) -> list[str]:
    """Deliveries that vanished, left a final state, or lost attempts; no person may have decided in between."""
    wrong = []
    for key, (status, attempts) in before.items():
        if key not in after:
            wrong.append(f"{key} is gone")
            continue
        then, made = after[key]
        if status in FINAL and then is not status and then not in COMES_LATER.get(status, ()):
            wrong.append(f"{key} went from {status.name} to {then.name}")
        if made < attempts:
            wrong.append(f"{key} had {attempts} attempts and has {made}")
    return wrong


def unaccounted(database: Database, mails: Iterable[Mail]) -> list[str]:
    """What a relay took that the ledger cannot account for: each mail names one delivery, and went to its mailbox."""
    with database.read() as connection:
        key = address_key(connection)
        rows = connection.execute(
            select(deliveries.c.event_id, deliveries.c.n, events.c.ulid, mailboxes.c.address_key, mailboxes.c.address)
            .join(events, events.c.id == deliveries.c.event_id)
            .join(mailboxes, mailboxes.c.id == deliveries.c.mailbox_id)
        ).all()
    known = {(row.event_id, row.n): row.address for row in rows}
    identities = {(row.event_id, row.n): delivery_identity(row.ulid, bytes(row.address_key)) for row in rows}
    wrong = []
    for mail in mails:
        try:
            named = read_bounce(key, mail.sender.partition("@")[0], lambda *numbers: identities.get(numbers))
        except BadToken:
            wrong.append(f"{mail.sender} names no delivery")
            continue
        if known.get(named) != mail.recipient.lower():
            wrong.append(f"delivery {named} is for {known.get(named)} and went to {mail.recipient}")
    return wrong
