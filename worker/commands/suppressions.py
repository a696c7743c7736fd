"""`rolecast suppressions list|add|remove`: addresses that get less mail, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.commands.console import Exit, Json, Stop, opened, print_json, print_line, print_table, user

if TYPE_CHECKING:
    from subscriptions.changes import Change, Difference

app = typer.Typer(help="Addresses that are not mailed.", no_args_is_help=True)

Address = Annotated[str, typer.Argument(metavar="ADDRESS", show_default=False, help="The address.")]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="The reason, for the record.")]


@app.command("list")
def list_(
    ctx: typer.Context,
    address: Annotated[str | None, typer.Option("--address", metavar="ADDRESS", help="Only this one's.")] = None,
    lifted: Annotated[bool, typer.Option("--lifted", help="Also those that were lifted.")] = False,
    json: Json = False,
) -> None:
    """Show who is not mailed, and since when and why."""
    from subscriptions import directory
    from worker.history import moment

    wanted = _normalised(address) if address is not None else None
    with opened(ctx) as installation, installation.database.read() as connection:
        boxes = None
        if wanted is not None:
            number = directory.mailbox_number(connection, wanted)
            boxes = [] if number is None else [number]
        rows = directory.suppressions_of(connection, boxes, lifted=lifted)
    found: list[dict[str, Any]] = [
        {
            "address": row.address or None,
            "cause": row.cause,
            "source": row.source,
            "at": moment(row.at),
            "evidence": row.evidence,
            "lifted_at": moment(row.lifted_at),
            "lifted_by": row.lifted_by,
        }
        for row in rows
    ]
    if json:
        print_json({"suppressions": found})
    else:
        print_table(("ADDRESS", "CAUSE", "SOURCE", "AT", "WHY", "LIFTED", "BY"), [tuple(one.values()) for one in found])


@app.command("add")
def add(ctx: typer.Context, address: Address, why: Why = "", json: Json = False) -> None:
    """Never mail an address again, until `remove`; takes effect before the next flight."""
    from subscriptions.changes import Suppress

    wanted = _normalised(address)
    change = Suppress(wanted, cause="operator", source=f"operator:{user()}", evidence=why)
    changed = _apply(ctx, change, why)
    if json:
        print_json({"address": wanted, "added": changed.suppressions_set.count})
    else:
        print_line(f"{wanted} is not mailed any more")


@app.command("remove")
def remove(
    ctx: typer.Context,
    address: Address,
    cause: Annotated[
        str | None, typer.Option("--cause", metavar="CAUSE", help="Only this one: hard_bounce, complaint, operator.")
    ] = None,
    why: Why = "",
    json: Json = False,
) -> None:
    """Mail an address again: lifts what stands against it."""
    from subscriptions.changes import LiftSuppression

    wanted = _normalised(address)
    causes = ("hard_bounce", "complaint", "operator")
    if cause is not None and cause not in causes:
        raise Stop(Exit.USAGE, f"--cause {cause!r} is not one that can be lifted: there are {', '.join(causes)}")
    changed = _apply(ctx, LiftSuppression(wanted, cause), why)
    if not changed.suppressions_lifted.count:
        raise Stop(Exit.NOT_FOUND, f"nothing that can be lifted stands against {wanted}")
    if json:
        print_json({"address": wanted, "lifted": changed.suppressions_lifted.count})
    else:
        print_line(f"{wanted} is mailed again")


def _normalised(address: str) -> str:
    from subscriptions.addresses import BadAddress, normalise

    try:
        return normalise(address)
    except BadAddress as error:
        raise Stop(Exit.INVALID, str(error)) from error


def _apply(ctx: typer.Context, change: Change, why: str) -> Difference:
    from subscriptions import changes

    with opened(ctx) as installation, installation.database.write() as connection:
        return changes.apply(
            connection,
            changes.Actor(f"cli:{user()}", "cli"),
            [change],
            catalogues=installation.catalogues,
            now=installation.clock(),
            why=why,
        )
