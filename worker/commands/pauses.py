"""`rolecast pause` and `rolecast resume`: stop sending and go on, before the next flight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.commands.console import Exit, Json, Stop, opened, print_json, print_line, print_table, say, user

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from worker.app import App

Classes = Annotated[list[str] | None, typer.Option("--class", metavar="CLASS", help="Mails of a class.")]
Accounts = Annotated[list[str] | None, typer.Option("--account", metavar="ID", help="Mails to an account.")]
Events = Annotated[list[str] | None, typer.Option("--event", metavar="EVENT", help="Mails of an event (its ULID).")]
Relays = Annotated[list[str] | None, typer.Option("--relay", metavar="HOST:PORT", help="What goes to a relay.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command("pause")(pause)
    app.command("resume")(resume)


def pause(
    ctx: typer.Context,
    *,
    class_: Classes = None,
    account: Accounts = None,
    event: Events = None,
    relay: Relays = None,
    json: Json = False,
) -> None:
    """Stop sending, at once; without an option everything. Events are accepted and planned meanwhile."""
    from sqlalchemy import insert

    from worker import ledger
    from worker.schema import pauses

    with opened(ctx) as installation, installation.database.write() as connection:
        wanted = _scopes(installation, connection, classes=class_, accounts=account, events=event, relays=relay)
        standing = {(row["scope"], row["value"]) for row in _standing(connection)}
        fresh = [
            {"scope": scope, "value": value, "by": user(), "at": installation.clock()}
            for scope, value in wanted
            if (scope, value) not in standing
        ]
        if fresh:
            connection.execute(insert(pauses), fresh)
            ledger.raise_guard(connection)
        rows = _standing(connection)
    _show(rows, json=json)


def resume(
    ctx: typer.Context,
    *,
    class_: Classes = None,
    account: Accounts = None,
    event: Events = None,
    relay: Relays = None,
    json: Json = False,
) -> None:
    """Go on sending; without an option what `pause` without an option stopped."""
    from sqlalchemy import delete

    from worker import feeding, ledger
    from worker.schema import pauses

    with opened(ctx) as installation, installation.database.write() as connection:
        wanted = _scopes(
            installation, connection, classes=class_, accounts=account, events=event, relays=relay, known=False
        )
        standing = {(row["scope"], row["value"]) for row in _standing(connection)}
        missing = [f"{scope} {value}".strip() for scope, value in wanted if (scope, value) not in standing]
        if missing:
            others = ", ".join(f"{scope} {value}".strip() for scope, value in sorted(standing)) or "nothing"
            raise Stop(Exit.NOT_FOUND, f"not paused: {', '.join(missing)}; paused now: {others}")
        for scope, value in wanted:
            connection.execute(delete(pauses).where(pauses.c.scope == scope, pauses.c.value == value))
        ledger.raise_guard(connection)
        feeding.wake_waiting(connection, reasons=["paused"], now=installation.clock())
        rows = _standing(connection)
    _show(rows, json=json)


def _scopes(
    installation: App,
    connection: Connection,
    *,
    classes: Sequence[str] | None,
    accounts: Sequence[str] | None,
    events: Sequence[str] | None,
    relays: Sequence[str] | None,
    known: bool = True,
) -> list[tuple[str, str]]:
    """What is meant, as rows of `pauses`; `known` looks whether there is such a thing. Raises `Stop`."""
    wanted = [
        *(("class", value) for value in classes or ()),
        *(("account", value) for value in accounts or ()),
        *(("event", value.upper()) for value in events or ()),
        *(("relay", value) for value in relays or ()),
    ]
    if known:
        for scope, value in wanted:
            _look(installation, connection, scope, value)
    return wanted or [("all", "")]


def _look(installation: App, connection: Connection, scope: str, value: str) -> None:
    from subscriptions import directory
    from worker import history
    from worker.settings import CLASSES

    if scope == "class" and value not in CLASSES:
        raise Stop(Exit.NOT_FOUND, f"there is no class {value!r} of mails: there are {', '.join(CLASSES)}")
    if scope == "account" and directory.account_row(connection, value) is None:
        raise Stop(Exit.NOT_FOUND, f"there is no account {value!r}: `rolecast accounts list` shows those there are")
    if scope == "event" and history.find_event(connection, value) is None:
        raise Stop(Exit.NOT_FOUND, f"there is no event {value}: `rolecast events list` shows those there are")
    names = [relay.name for relay in installation.settings.relay_urls]
    if scope == "relay" and value not in names:
        raise Stop(Exit.NOT_FOUND, f"there is no relay {value!r}: there are {', '.join(names) or 'none'}")


def _standing(connection: Connection) -> list[dict[str, Any]]:
    from sqlalchemy import select

    from worker.history import moment
    from worker.schema import pauses

    rows = connection.execute(select(pauses).order_by(pauses.c.scope, pauses.c.value))
    return [{"scope": row.scope, "value": row.value, "by": row.by, "at": moment(row.at)} for row in rows]


def _show(rows: Sequence[dict[str, Any]], *, json: bool) -> None:
    if json:
        print_json({"paused": list(rows)})
    elif rows:
        print_table(("PAUSED", "WHICH", "BY", "SINCE"), [tuple(row.values()) for row in rows])
    else:
        print_line("nothing is paused")
        say("what waited for it is due now")
