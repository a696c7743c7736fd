"""`rolecast types list|show|sample`: the events that can be published."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.commands.console import Exit, Json, Stop, print_json, print_table

app = typer.Typer(help="The types of events.", no_args_is_help=True)

TypeName = Annotated[str, typer.Argument(metavar="TYPE", show_default=False, help="Such as invoice.issued.")]


@app.command("list")
def list_(json: Json = False) -> None:
    """Show every type with its category."""
    from worker.events import TYPES

    rows = [(kind.name, kind.category, kind.broadcast, kind.summary) for kind in TYPES.values()]
    if json:
        print_json(
            {"types": [dict(zip(("type", "category", "broadcast", "summary"), row, strict=True)) for row in rows]}
        )
    else:
        print_table(("TYPE", "CATEGORY", "BROADCAST", "WHAT IT SAYS"), rows)


@app.command("show")
def show(name: TypeName, json: Json = False) -> None:
    """Print the JSON Schema of a type's data."""
    del json  # the schema is JSON anyway
    from worker.events import json_schema

    print_json(json_schema(_known(name)))


@app.command("sample")
def sample(name: TypeName, json: Json = False) -> None:
    """Print a valid event of a type, ready to be published."""
    del json  # the event is JSON anyway
    from worker import events

    print_json(events.sample(_known(name)))


def _known(name: str) -> str:
    from worker.event_faults import nearest
    from worker.events import TYPES

    if name in TYPES:
        return name
    near = nearest(name, TYPES)
    hint = f"did you mean {near}?" if near else "`rolecast types list` shows those there are"
    raise Stop(Exit.NOT_FOUND, f"there is no type {name!r}: {hint}")
