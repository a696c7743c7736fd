"""`rolecast publish`: accept events from files or stdin, and with `--wait` see them through.

Every input file is checked whole before anything of any is accepted. Up to 1,000 events of a file go in one
transaction, larger files in order in several, so that running the same command again completes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.commands.console import (
    Exit,
    Json,
    Stop,
    counted,
    opened,
    print_json,
    print_table,
    progress,
    say,
    told,
)
from worker.commands.explain import place_of, read_events
from worker.commands.signals import interrupted_by_sigterm

if TYPE_CHECKING:
    from worker.app import App
    from worker.events import Event
    from worker.intake import Accepted

CHUNK = 1000
#: Events in one transaction.
LOOK_SECONDS = 0.25
#: How often `--wait` looks at the totals.


def add_to(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command("publish")(publish)


def publish(
    ctx: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", show_default=False, help="Events; - is stdin.")],
    wait: Annotated[bool, typer.Option("--wait", help="Work, or watch, until nothing of it is due now.")] = False,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="S", min=0, help="With --wait: stop waiting after S seconds.")
    ] = None,
    json: Json = False,
) -> None:
    """Accept events: one, a JSON array, or JSON Lines. With --wait: 0 all accepted, 1 any failed, 6 any waits."""
    if timeout is not None and not wait:
        raise Stop(Exit.USAGE, "--timeout says how long to wait: give --wait with it")
    read = read_events(files)
    from worker.app import telling_workers

    with opened(ctx) as app, telling_workers(app):
        receipts = _accept(app, read)
        known = sum(receipt.duplicate for receipt in receipts)
        totals: dict[str, int] | None = None
        waiting: dict[str, int] = {}
        if wait:
            numbers = _numbers(app, [receipt.event for receipt in receipts])
            totals, waiting = _see_through(app, numbers, timeout)
        if json:
            document: dict[str, Any] = {"receipts": [_receipt(receipt) for receipt in receipts], "duplicates": known}
            print_json(document | ({"totals": totals, "waiting": waiting} if wait else {}))
        else:
            _report(receipts, totals)
        say(f"{counted(len(receipts) - known, 'event')} accepted{f', {known:,} known before' if known else ''}")
        if totals is None:
            say(_who_sends(app))
        else:
            _end(app, totals, waiting)


def _who_sends(app: App) -> str:
    """Where the mail goes from here: to the process that works already, or to one that has yet to be started."""
    from worker.lock import WorkLock

    lock = WorkLock(app.database)
    if app.settings.broker_url != "memory://" or not lock.take():
        return "a worker that runs already sends what is due"
    lock.free()
    return "no worker runs now: `rolecast work` or `rolecast up` sends what is due"


# ---------------------------------------------------------------- accepting


def _accept(app: App, read: Sequence[tuple[str, list[Event]]]) -> list[Accepted]:
    from worker.intake import Publisher, Refused

    publisher = Publisher()
    receipts: list[Accepted] = []
    total = sum(len(events) for _, events in read)
    with progress("accepting") as tell:
        for name, events in read:
            for start in range(0, len(events), CHUNK):
                try:
                    receipts += app.intake.accept(events[start : start + CHUNK], publisher)
                except Refused as refused:
                    _refuse(refused, name, events, start, before=len(receipts))
                tell(len(receipts), total)
    return receipts


def _refuse(refused: Any, name: str, events: Sequence[Event], start: int, *, before: int) -> None:
    faults = [
        f"{place_of(name, start + fault.index, events)}, {fault.pointer}: {fault.message}" for fault in refused.faults
    ]
    code = Exit.INVALID if any(fault.kind == "invalid" for fault in refused.faults) else Exit.CONFLICT
    stands = "nothing was accepted"
    if before:
        stands = f"the {counted(before, 'event')} before them were accepted, nothing else: correct and run it again"
    raise Stop(code, *told(faults), stands)


def _numbers(app: App, ulids: Sequence[str]) -> list[int]:
    from sqlalchemy import select

    from subscriptions.directory import among
    from worker.schema import events

    with app.database.read() as connection:
        return list(connection.execute(select(events.c.id).where(among(connection, events.c.ulid, ulids))).scalars())


def _receipt(receipt: Accepted) -> dict[str, Any]:
    return {**asdict(receipt), "notes": list(receipt.notes)}


def _report(receipts: Sequence[Accepted], totals: dict[str, int] | None) -> None:
    print_table(
        ("EVENT", "SOURCE", "ID", "ROUTE", "OUTCOME", "NOTES"),
        [
            (one.event, one.source, one.id, one.route, one.outcome or one.reason or "-",
             "; ".join([*(["known before"] if one.duplicate else []), *one.notes]))
            for one in receipts
        ],
    )  # fmt: skip
    if totals is not None:
        print_table(("DELIVERIES", "COUNT"), sorted(totals.items()))


# ---------------------------------------------------------------- seeing it through


def _see_through(app: App, numbers: list[int], timeout: float | None) -> tuple[dict[str, int], dict[str, int]]:
    """Work until nothing of these events is due now, or watch whoever works already: (totals, what waits for what)."""
    from worker import history

    def counts() -> dict[str, int]:
        with app.database.read() as connection:
            return history.counts(connection, numbers)

    with interrupted_by_sigterm(), _working(app) as wait_for, progress("sending") as tell:
        looked = 0.0

        def look() -> None:
            nonlocal looked
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                found = counts()
                total = sum(found.values())
                tell(total - found.get("planned", 0) - found.get("sending", 0), total or None)

        wait_for(numbers, timeout, look)
    with app.database.read() as connection:
        return history.counts(connection, numbers), history.waiting(connection, numbers)


@contextmanager
def _working(app: App) -> Iterator[Callable[[list[int], float | None, Callable[[], None]], bool]]:
    """What waits until nothing is due: an engine of our own, or the sight of somebody else's."""
    from worker.app import AnotherWorks, Engine

    engine = Engine(app)
    try:
        engine.start()
    except AnotherWorks as other:
        say(f"{other}; this command watches it")
        engine = Engine(app)  # never started: it only looks

        def watch(numbers: list[int], seconds: float | None, look: Callable[[], None]) -> bool:
            return engine.until_idle(event_ids=numbers, seconds=seconds, look=look)

        yield watch
        return
    try:
        yield lambda numbers, seconds, look: engine.until_idle(event_ids=numbers, seconds=seconds, look=look)
    finally:
        engine.stop()


_WAITS = {
    "paused": "paused: `rolecast resume` lets it go",
    "no_https": "ROLECAST_PUBLIC_URL is not https, so the links in it could not work",
    "no_sender": "no sender is configured: set ROLECAST_SENDER",
}


def _end(app: App, totals: dict[str, int], waiting: dict[str, int]) -> None:
    """The exit code that the totals ask for, with the reason why something waits."""
    from worker import feeding

    owed = totals.get("planned", 0) + totals.get("sending", 0)
    for reason, count in waiting.items():
        say(f"{counted(count, 'mail')} waiting: {_WAITS.get(reason, f'{reason}, it is tried again by itself')}")
    rest = owed - sum(waiting.values())
    if rest > 0 and not app.settings.relay_urls:
        say(f"{counted(rest, 'mail')} waiting: no relay is configured, set ROLECAST_RELAY_URLS")
    elif rest > 0:
        with app.database.read() as connection:
            pause = "a pause stands (`rolecast resume` ends it), " if feeding.pauses_stand(connection) else ""
        why = f"{pause}no relay could be used, or the time was over; a worker goes on with it"
        say(f"{counted(rest, 'mail')} waiting: {why}")
    if totals.get("held"):
        say(f"{counted(totals['held'], 'mail')} held: a person decides, see `rolecast deliveries list EVENT`")
    if totals.get("failed"):
        raise Stop(Exit.FAILED, f"{counted(totals['failed'], 'mail')} failed: see `rolecast deliveries list EVENT`")
    if owed or totals.get("held"):
        raise Stop(Exit.FINDINGS)
