"""`rolecast deliveries list|retry|release|settle`: one event's mails, and what a person decides about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.commands.console import (
    EventWords,
    Exit,
    Json,
    Stop,
    counted,
    event_of,
    opened,
    print_json,
    print_line,
    print_table,
    say,
    user,
)

if TYPE_CHECKING:
    from worker.decisions import Decision

app = typer.Typer(help="The mails of an event.", no_args_is_help=True)

Numbers = Annotated[
    list[int] | None, typer.Option("--number", "-n", metavar="N", min=1, help="Only this delivery; may be repeated.")
]


@app.command("list")
def list_(
    ctx: typer.Context,
    *,
    words: EventWords,
    status: Annotated[str | None, typer.Option("--status", metavar="STATUS", help="Only those that stand so.")] = None,
    reason: Annotated[str | None, typer.Option("--reason", metavar="REASON", help="Only those with this one.")] = None,
    after: Annotated[int, typer.Option("--after", metavar="N", min=0, help="Behind this number.")] = 0,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=100_000, help="How many.")] = 100,
    json: Json = False,
) -> None:
    """Show the deliveries of an event."""
    from worker import history, matters

    if status is not None and status not in history.STATUSES:
        raise Stop(Exit.USAGE, f"{status!r} is no status of a delivery: there are {', '.join(history.STATUSES)}")
    if reason is not None and reason not in history.REASONS:
        raise Stop(Exit.USAGE, f"{reason!r} is no reason of a delivery: there are {', '.join(history.REASONS)}")
    with opened(ctx) as installation, installation.database.read() as connection:
        event = event_of(connection, words)
        found = history.list_deliveries(connection, event, after=after, limit=limit, status=status, reason=reason)
    following = found[-1]["n"] if len(found) == limit else None
    if json:
        print_json({"event": event.ulid, "deliveries": found, "next": following})
        return
    # Of what was lost on the way, and of nothing else, a person needs the name by which the relay's log calls it.
    named = any(one["status"] == "held" and one["reason"] in matters.UNCERTAIN for one in found)
    heads = ("N", "CONTACT", "EMAIL", "STATUS", "REASON", "ATTEMPTS", "DUE", "RELAY", "REPLY")
    print_table(
        (*heads, "MESSAGE-ID") if named else heads,
        [
            (one["n"], f"{one['account']}/{one['contact']}", one["email"], one["status"], one["reason"],
             one["attempts"], one["due_at"], one["relay"], one["reply"], *([one["message_id"]] if named else []))
            for one in found
        ],
    )  # fmt: skip
    if following:
        say(f"there may be more: add --after {following}")


@app.command("retry")
def retry(ctx: typer.Context, words: EventWords, number: Numbers = None, json: Json = False) -> None:
    """Try failed and deferred mails of an event again, now."""
    from worker import decisions

    _decide(
        ctx,
        words,
        number,
        decisions.retry,
        what="deliveries.retried",
        done="to be tried again",
        nothing="no mail of it failed or is deferred",
        json=json,
    )


@app.command("release")
def release(
    ctx: typer.Context,
    *,
    words: EventWords,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="REASON", help="Only those held with this one.")
    ] = None,
    number: Numbers = None,
    json: Json = False,
) -> None:
    """Send held mails of an event; only under ROLECAST_DELIVERY=live.

    Those of unknown outcome may have gone out: they are sent only where --number or --reason chooses them.
    """
    from worker import decisions

    if reason is not None and reason not in decisions.HELD_REASONS:
        known = ", ".join(decisions.HELD_REASONS)
        raise Stop(Exit.USAGE, f"{reason!r} is no reason of held mail: there are {known}")
    _decide(
        ctx,
        words,
        number,
        partial(decisions.release, reason=reason),
        what="deliveries.released",
        done="released",
        nothing=f"no mail of it is held with the reason {reason}" if reason else "no mail of it is held",
        json=json,
        sends=True,
        reason=reason,
    )


@app.command("settle")
def settle(
    ctx: typer.Context,
    words: EventWords,
    *,
    accepted: Annotated[
        bool | None, typer.Option("--accepted/--failed", help="The relay has them, or never had them.")
    ] = None,
    number: Numbers = None,
    json: Json = False,
) -> None:
    """Say of held mails whose outcome is unknown whether they went out, as the relay's log tells."""
    from worker import decisions

    if accepted is None:
        raise Stop(Exit.USAGE, "say what the relay's log tells: --accepted where it has them, --failed where not")
    with opened(ctx) as installation, installation.database.write() as connection:
        event = event_of(connection, words)
        settled = decisions.settle(
            connection, event.id, numbers=number, accepted=accepted, by=f"cli:{user()}", now=installation.clock()
        )
    done = "settled as accepted" if accepted else "settled as failed; `rolecast deliveries retry` sends again"
    _told(event.ulid, settled, number, done=done, nothing="no mail of it is held with unknown outcome", json=json)


def stays_held(left: Mapping[str, int]) -> str:
    """That mails of unknown outcome (reason -> how many) are left to a person, in words."""
    count = sum(left.values())
    stay, them = ("stays", "it") if count == 1 else ("stay", "them")
    return f"{counted(count, 'mail')} of unknown outcome {stay} held: settle {them}"


def _decide(
    ctx: typer.Context,
    words: list[str],
    numbers: list[int] | None,
    decide: Callable[..., int],
    *,
    what: Decision,
    done: str,
    nothing: str,
    json: bool,
    sends: bool = False,
    reason: str | None = None,
) -> None:
    from worker import decisions

    with opened(ctx) as installation, installation.database.write() as connection:
        event = event_of(connection, words)
        mode = installation.planner.mode_of(event.mode)
        if sends and mode != "live":
            setting = "ROLECAST_DELIVERY" if installation.settings.delivery == mode else "the mode of its API key"
            raise Stop(Exit.CONFLICT, f"{setting} is {mode!r}, so released mail would be held again: only live sends")
        if event.status == "cancelled":
            raise Stop(Exit.CONFLICT, f"event {event.ulid} is cancelled: publish it again under a new id")
        now = installation.clock()
        changed = decide(connection, event.id, numbers=numbers, now=now)
        if changed:
            chosen = {"numbers": numbers} | ({"reason": reason} if reason else {})
            decisions.record(connection, what, event.id, by=f"cli:{user()}", now=now, **chosen, deliveries=changed)
        left = decisions.uncertain(connection, event.id) if sends and numbers is None and reason is None else {}
    if left:
        them = "it" if sum(left.values()) == 1 else "them"
        remedy = f"or release {them} with " + " or ".join(f"--reason {one}" for one in left)
        sentence = f"{stays_held(left)}, {remedy}"
        if not changed:
            raise Stop(Exit.NOT_FOUND, sentence)
        say(sentence)
    _told(event.ulid, changed, numbers, done=done, nothing=nothing, json=json)


def _told(ulid: str, changed: int, numbers: list[int] | None, *, done: str, nothing: str, json: bool) -> None:
    if not changed:
        chosen = f" among {', '.join(map(str, numbers))}" if numbers else ""
        raise Stop(Exit.NOT_FOUND, f"event {ulid}: {nothing}{chosen}")
    answer: dict[str, Any] = {"event": ulid, "deliveries": changed}
    if json:
        print_json(answer)
    else:
        print_line(f"{ulid}: {counted(changed, 'mail')} {done}")
