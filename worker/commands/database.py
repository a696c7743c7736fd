"""`rolecast db upgrade|check|restored`: the schema, and what a restored backup must not send again."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.commands.console import (
    Exit,
    Json,
    Stop,
    asks,
    counted,
    opened,
    print_json,
    print_line,
    print_table,
    say,
    settings_of,
    user,
)

app = typer.Typer(help="The database: its schema, and a restored backup.", no_args_is_help=True)


@app.command("upgrade")
def upgrade(ctx: typer.Context, json: Json = False) -> None:
    """Bring the schema up to the code's."""
    settings = settings_of(ctx)
    from subscriptions.database import Database, system_clock
    from worker import migrate

    database = Database(settings.database_url)
    try:
        before, now = migrate.upgrade(database, clock=system_clock)
    finally:
        database.close()
    if json:
        print_json({"before": before, "now": now})
    elif before == now:
        print_line(f"the database is at schema {now} already")
    else:
        print_line(f"the database went from schema {before or 'none'} to {now}")


@app.command("check")
def check(ctx: typer.Context, json: Json = False) -> None:
    """Compare the schema with the code's; exit 6 where an upgrade is due."""
    settings = settings_of(ctx)
    from subscriptions.database import Database, system_clock
    from worker import migrate

    database = Database(settings.database_url)
    try:
        if database.path is not None and not database.path.exists():
            raise Stop(Exit.FINDINGS, f"there is no database {database.path} yet: the first command makes it")
        found, head = migrate.state(database)
        refusal = None
        try:
            migrate.prepare(database, clock=system_clock, migrates=False)
        except migrate.SchemaError as error:
            refusal = str(error)
    finally:
        database.close()
    if json:
        print_json({"found": found, "needed": head, "current": refusal is None})
    elif refusal is None:
        print_line(f"the database is at schema {head}")
    if refusal is not None:
        raise Stop(Exit.FINDINGS, refusal)


@app.command("restored")
def restored(
    ctx: typer.Context,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="TIME", help="When the backup was made (RFC 3339): later events are left alone."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """After a restore, before workers start: hold every mail that may have gone out since the backup.

    `rolecast deliveries release EVENT` sends held mail once somebody looked. Events accepted after the backup are gone:
    publishers may publish them again.
    """
    from worker import restore

    with opened(ctx) as installation:
        moment = _moment(since, now=installation.clock())
        if not yes:
            _confirm()
        try:
            held = restore.hold(
                installation.database,
                installation.planner,
                since=moment,
                actor=f"cli:{user()}",
                lease_seconds=installation.settings.lease_seconds,
                clock=installation.clock,
            )
        except restore.StillWorking as error:
            raise Stop(Exit.CONFLICT, str(error)) from error
    mails = sum(one.deliveries for one in held)
    if json:
        shown = [{"event": one.event, "deliveries": one.deliveries} for one in held]
        print_json({"since": since, "deliveries": mails, "events": shown})
    elif held:
        print_table(("EVENT", "HELD"), [(one.event, f"{one.deliveries:,}") for one in held])
    uncertain = f"{counted(mails, 'mail')} of {counted(len(held), 'event')}; nobody knows which went out"
    say(f"held as `restored`: {uncertain}" if held else "no mail was owed: nothing is held")
    say("what was accepted, opted out or suppressed after the backup is not in this database")


def _confirm() -> None:
    question = "Hold every mail that was owed when the backup was made?"
    if not asks():
        raise Stop(Exit.USAGE, "nobody can be asked here whether to hold all mail that is owed: give --yes")
    if not typer.confirm(question, err=True):
        raise Stop(Exit.FAILED, "nothing was changed")


def _moment(since: str | None, *, now: int) -> int | None:
    """`--since` in microseconds. Raises `Stop`."""
    if since is None:
        return None
    from worker.event_fields import instant

    try:
        moment = int(instant(since).timestamp() * 1_000_000)
    except ValueError as error:
        raise Stop(Exit.USAGE, f"--since: {error}; write it such as 2026-11-21T10:00:00Z") from error
    if moment > now:
        raise Stop(Exit.USAGE, f"--since {since} has not come yet: give the time at which the backup was made")
    return moment
