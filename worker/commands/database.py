"""`rolecast db upgrade|check`: the schema."""

from __future__ import annotations

import typer

from worker.commands.console import Exit, Json, Stop, print_json, print_line, settings_of

app = typer.Typer(help="The database's schema.", no_args_is_help=True)


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
