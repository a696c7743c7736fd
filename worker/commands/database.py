"""`rolecast db upgrade|check|restored`: the schema, and what a restored backup must not send again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:  # it imports SQLAlchemy, which no --help waits for
    from worker.restore import Later

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
    send_later_events: Annotated[
        bool, typer.Option("--send-later-events", help="Events accepted after TIME are owed mail: it may be sent.")
    ] = False,
    json: Json = False,
) -> None:
    """After a restore, before workers start: hold every mail that may have gone out since the backup.

    `rolecast deliveries release EVENT --reason restored` sends it once somebody looked. Events accepted after the
    backup are gone: publishers may publish them again.
    """
    from worker import restore

    with opened(ctx) as installation:
        moment = _moment(since, now=installation.clock())
        if not yes:
            _confirm()
        try:
            outcome = restore.hold(
                installation.database,
                installation.planner,
                since=moment,
                agree=_agreement(since, yes=yes, given=send_later_events),
                actor=f"cli:{user()}",
                lease_seconds=installation.settings.lease_seconds,
                clock=installation.clock,
            )
        except restore.StillWorking as error:
            raise Stop(Exit.CONFLICT, str(error)) from error
        except restore.LaterMailOwed as error:
            message = (
                f"nothing is held: {_named(error.later, since)} would be left alone and SENT, though the database is "
                "older than the mails that were sent from it: correct the time and its zone, leave --since out, or add "
                "--send-later-events if none of that has gone out"
            )
            raise Stop(Exit.CONFLICT, message) from error
    held, later = outcome.held, outcome.later
    mails = sum(one.deliveries for one in held)
    if json:
        shown = [{"event": one.event, "deliveries": one.deliveries} for one in held]
        left = {"deliveries": later.deliveries, "events": later.events}
        print_json({"since": since, "deliveries": mails, "events": shown, "left_alone": left})
    elif held:
        print_table(("EVENT", "HELD"), [(one.event, f"{one.deliveries:,}") for one in held])
    uncertain = f"{counted(mails, 'mail')} of {counted(len(held), 'event')}; nobody knows which went out"
    none = "nothing is held" if later.deliveries else "no mail was owed: nothing is held"
    say(f"held as `restored`: {uncertain}" if held else none)
    if later.deliveries:
        say(_left_alone(later, since))
    say("what was accepted, opted out or suppressed after the backup is not in this database")


def _agreement(since: str | None, *, yes: bool, given: bool) -> Callable[[Later], bool]:
    """Whether mail that is left alone may be sent: said by the option, or at the terminal."""

    def agree(later: Later) -> bool:
        if given or yes:
            return given
        if not typer.confirm(f"{_left_alone(later, since)}. Is it certain that none of it went out before?", err=True):
            raise Stop(Exit.FAILED, "nothing is held: correct the time and its zone, or leave --since out")
        return True

    return agree


def _left_alone(later: Later, since: str | None) -> str:
    verb = "is" if later.deliveries == 1 else "are"
    return f"{_named(later, since)} {verb} left alone and will be SENT"


def _named(later: Later, since: str | None) -> str:
    return f"{counted(later.deliveries, 'mail')} of {counted(later.events, 'event')} accepted after {since}"


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
