"""What happened that a person may have to look at, and what hinders a worker: written as it happens, counted once.

It owns the tables `matters` and `troubles`. A matter is a count for an event and a reason: how many mails (or accounts)
ever; it never falls, so that whoever told of it knows whether there is more. What still needs a person is read from
the ledger by `worker.standing`. A trouble belongs to the worker that sees it, and ends when that worker says so, or
with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal

from sqlalchemy import Connection, delete

from subscriptions.audience import Verdicts
from subscriptions.database import insert_into
from worker.schema import matters, troubles

UNCERTAIN: Final = frozenset({"unknown", "restored"})
#: Reasons of held mail of which nobody knows whether it went out; the relay's log does.
HELD: Final = UNCERTAIN | {"sender_refused", "cannot_be_rendered"}
#: Reasons of held mail that a person must decide; `test` and `team` are as somebody wanted it.
FAILED: Final = frozenset({"given_up", "content_refused", "policy_refused", "recipient_refused", "settled_by_person"})
#: Reasons of mail that failed.
COUNTED: Final = frozenset({"sent_again"})
#: Counted for the metrics alone: the machine deals with it.
NOBODY: Final = "no_reachable_recipient"
#: An account of an event in which nobody could be told.
NOBODY_INTERESTED: Final = "nobody_interested"
#: The same for a promotional or informational event, where it is often as the account wants it.
REASONS: Final = HELD | FAILED | COUNTED | {NOBODY, NOBODY_INTERESTED}
#: Every reason that is noted.

Trouble = Literal["relay", "queue", "feed", "disk"]


def note(connection: Connection, owner: int, counts: Mapping[tuple[int, str], int], *, now: int) -> None:
    """Add what became of mails, (event number, reason) -> how many; reasons that are no matter are passed over.

    `owner` is the worker that saw it (0: whoever accepts events). Rows are written in the order of their keys, so that
    two workers never wait for each other.
    """
    rows = [
        {"event_id": event_id, "reason": reason, "owner": owner, "n": n, "first_at": now, "last_at": now}
        for (event_id, reason), n in sorted(counts.items())
        if n > 0 and reason in REASONS
    ]
    if not rows:
        return
    statement = insert_into(connection, matters)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["event_id", "reason", "owner"],
            set_={"n": matters.c.n + statement.excluded.n, "last_at": statement.excluded.last_at},
        ),
        rows,
    )


def unreached(event_id: int, class_: str, verdicts: Iterable[Verdicts]) -> Mapping[tuple[int, str], int]:
    """The accounts of an event of that class in which nobody could be told, as `note` takes them.

    An account that does not use the product, or whose catalogue does not have the category, is as it should be.
    """
    reason = NOBODY_INTERESTED if class_ in {"promotional", "informational"} else NOBODY
    nobody = sum(one.outcome == "no_recipient" and one.reason == "no_reachable_recipient" for one in verdicts)
    return {(event_id, reason): nobody} if nobody else {}


def report(connection: Connection, owner: int, kind: Trouble, name: str, why: str | None, *, now: int) -> None:
    """Say that something hinders this worker (`why`, one sentence without secrets), or that it does no more (None).

    While a trouble lasts it is reported again at least once a minute: one that nobody reports any more does not stand
    (`standing.SEEN_SECONDS`). `name` is which one: `HOST:PORT` of a relay or queue, empty where there is only one.
    """
    if why is None:
        own = (troubles.c.kind == kind) & (troubles.c.name == name) & (troubles.c.owner == owner)
        connection.execute(delete(troubles).where(own))
        return
    statement = insert_into(connection, troubles)
    connection.execute(
        statement.values(
            kind=kind, name=name, owner=owner, why=why, since_at=now, seen_at=now
        ).on_conflict_do_update(
            index_elements=["kind", "name", "owner"], set_={"why": why, "seen_at": now}
        )
    )  # fmt: skip
