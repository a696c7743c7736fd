"""`rolecast events show|list|cancel|retry|matters` and `rolecast why`: what became of events, what needs a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

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
    shown,
    user,
)
from worker.commands.deliveries import stays_held
from worker.commands.explain import reasons

app = typer.Typer(help="What was published, and what became of it.", no_args_is_help=True)


def add_to(root: typer.Typer) -> None:
    """Add the command that stands in no group."""
    root.command("why")(why)


@app.command("list")
def list_(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=10_000, help="How many.")] = 50,
    before: Annotated[str | None, typer.Option("--before", metavar="EVENT", help="Older than this one.")] = None,
    json: Json = False,
) -> None:
    """Show the latest events, the newest first."""
    from worker import history

    with opened(ctx) as installation, installation.database.read() as connection:
        found = history.list_events(connection, limit=limit, before=before)
    if json:
        print_json({"events": found})
        return
    heads = ("EVENT", "ACCEPTED", "SOURCE", "ID", "TYPE", "STATUS", "OUTCOME", "DELIVERIES")
    print_table(
        heads,
        [
            (one["event"], one["accepted_at"], one["source"], one["id"], one["type"], one["status"], one["outcome"],
             _counts(one["totals"]))
            for one in found
        ],
    )  # fmt: skip


@app.command("show")
def show(ctx: typer.Context, words: EventWords, json: Json = False) -> None:
    """Show where an event stands."""
    from worker import history

    with opened(ctx) as installation, installation.database.read() as connection:
        state = history.event_state(connection, event_of(connection, words))
    if json:
        print_json(state)
        return
    for name, value in state.items():
        print_line(f"{name.replace('_', ' ')}: {shown(_value(value))}")


@app.command("cancel")
def cancel(ctx: typer.Context, words: EventWords, json: Json = False) -> None:
    """Withdraw what is not yet sent of an event, before the next flight; held mail too, but of unknown outcome."""
    from worker import decisions, history

    with opened(ctx) as installation, installation.database.write() as connection:
        event = event_of(connection, words)
        withdrawn = decisions.cancel(connection, event.id, by=f"cli:{user()}", now=installation.clock())
        left = decisions.uncertain(connection, event.id)
        if not withdrawn and event.status in {"done", "redirected"}:
            message = f"event {event.ulid} is {event.status}: there is nothing left to cancel"
            raise Stop(Exit.CONFLICT, message, *([stays_held(left)] if left else []))
        state = history.event_state(connection, event)
    if left:
        say(stays_held(left))
    if json:
        print_json({**state, "withdrawn": withdrawn})
    else:
        print_line(f"{event.ulid} cancelled: {counted(withdrawn, 'mail')} withdrawn, {_counts(state['totals'])}")


@app.command("retry")
def retry(ctx: typer.Context, words: EventWords, json: Json = False) -> None:
    """Plan an event again that could not be planned."""
    from worker import decisions, history

    with opened(ctx) as installation, installation.database.write() as connection:
        event = event_of(connection, words)
        if not decisions.plan_again(connection, event.id, by=f"cli:{user()}", now=installation.clock()):
            message = (
                f"event {event.ulid} is {event.status}, so it is not planned again: `rolecast deliveries retry` is for "
                "mails that failed"
            )
            raise Stop(Exit.CONFLICT, message)
        state = history.event_state(connection, event)
    if json:
        print_json(state)
    else:
        print_line(f"{event.ulid} is planned again")


@app.command("matters")
def matters(ctx: typer.Context, json: Json = False) -> None:
    """Show what needs a person now; exit 6 where something does."""
    from worker import standing

    with opened(ctx) as installation, installation.database.read() as connection:
        found = standing.look(connection, installation.settings, now=installation.clock())
    if json:
        print_json({"matters": [one.to_json() for one in found]})
    for one in () if json else found:
        print_line(f"{'!' if one.urgent else '-'} {shown(one.title)}")
        for name, value in (("since", _since(one.since)), ("events", _named(one.events, one.more))):
            if value:
                print_line(f"    {name:<7} {value}")
        print_line(f"    {'to do':<7} {shown(one.what_to_do)}")
    if any(one.alone for one in found):
        raise Stop(Exit.FINDINGS)
    say("nothing needs a person")


def why(
    ctx: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="EVENT CONTACT-OR-ADDRESS",
            show_default=False,
            help="The event (ULID, or SOURCE ID), then a contact id, ACCOUNT/CONTACT or an address.",
        ),
    ],
    json: Json = False,
) -> None:
    """Show why a contact got a mail, or did not, as it was when the event was resolved."""
    from worker import history

    if len(words) not in {2, 3}:
        raise Stop(Exit.USAGE, "name the event (its ULID, or SOURCE ID) and then the contact or address")
    *name, who = words
    with opened(ctx) as installation, installation.database.read() as connection:
        event = event_of(connection, name)
        found = history.why(connection, event, who)
    if not found and event.status in {"accepted", "planning"}:
        raise Stop(Exit.NOT_FOUND, f"event {event.ulid} is {event.status}: nobody is resolved yet, ask again later")
    if not found:
        message = f"nobody named {who!r} was a contact of an account that event {event.ulid} concerned"
        raise Stop(Exit.NOT_FOUND, message)
    if json:
        print_json({"event": event.ulid, "verdicts": found})
        return
    for one in found:
        for line in _told(one):
            print_line(line)


def _since(at: int | None) -> str:
    from worker.history import moment

    return moment(at) or ""


def _named(ulids: Sequence[str], more: int) -> str:
    return ", ".join(ulids) + (f" and {more:,} more" if more else "")


def _told(verdict: Mapping[str, Any]) -> Sequence[str]:
    head = f"{verdict['account']}/{verdict['contact']} <{verdict['email']}>"
    outcome = verdict["outcome"] + (f" ({verdict['reason']})" if verdict["reason"] else "")
    if verdict["delivery"] is None:
        because = reasons(verdict["dropped"]) or outcome
        return [f"{head} gets no mail of {verdict['category']}: {because}", f"  outcome for the account: {outcome}"]
    lines = [f"{head} gets {verdict['category']} as {verdict['delivery']}: {reasons(verdict['matched'])}"]
    if verdict["dropped"]:
        lines.append(f"  not for: {reasons(verdict['dropped'])}")
    sent = verdict["sent"]
    if sent:
        detail = ", ".join(str(sent[name]) for name in ("reason", "settled_at", "relay", "reply") if sent[name])
        lines.append(f"  delivery {sent['n']}: {sent['status']}{f' ({detail})' if detail else ''}")
    return lines


def _counts(totals: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {status}" for status, count in totals.items()) or "-"


def _value(value: object) -> object:
    if isinstance(value, dict):
        return _counts(value) if all(isinstance(one, int) for one in value.values()) else value
    if isinstance(value, list):
        return "; ".join(str(one) for one in value) or "-"
    return value if value is not None else "-"
