"""`rolecast config show` and `rolecast doctor`: what is set, and whether it works."""

from __future__ import annotations

import typer

from worker.commands.console import Exit, Json, Stop, counted, print_json, print_line, print_table, say, settings_of

app = typer.Typer(help="The settings.", no_args_is_help=True)


def add_to(root: typer.Typer) -> None:
    """Add the command that stands in no group."""
    root.command("doctor")(doctor)


@app.callback()
def group() -> None:
    """The settings."""


@app.command("show")
def show(ctx: typer.Context, json: Json = False) -> None:
    """Show every setting, its value (secrets as stars) and where it comes from."""
    from worker.doctor import shown_settings

    rows = shown_settings(settings_of(ctx))
    if json:
        print_json({"settings": [{"name": name, "value": value, "source": source} for name, value, source in rows]})
    else:
        print_table(("SETTING", "VALUE", "FROM"), rows)


def doctor(ctx: typer.Context, json: Json = False) -> None:
    """Look at everything that has to be in order before mail leaves; exit 6 where something is not."""
    settings = settings_of(ctx)
    from worker.doctor import examine

    checks = examine(settings)
    findings = [check for check in checks if check.level == "finding"]
    if json:
        print_json({"findings": len(findings), "checks": [check.to_json() for check in checks]})
    else:
        for check in checks:
            mark = {"ok": "ok  ", "note": "note", "finding": "FIND"}[check.level]
            print_line(f"{mark}  {check.name}: {check.message}")
    say(counted(len(findings), "finding"))
    if findings:
        raise Stop(Exit.FINDINGS)
