"""`rolecast keys create|list|revoke`: who may publish over HTTP."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from worker.commands.console import Json, opened, print_json, print_line, print_table, say

app = typer.Typer(help="API keys.", no_args_is_help=True)


@app.command("create")
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Option("--name", metavar="N", help="What the key is called.")],
    scope: Annotated[
        list[str],
        typer.Option("--scope", metavar="SCOPE", help="publish:TYPE, publish:*, attest or read; may be repeated."),
    ],
    mode: Annotated[str, typer.Option("--mode", metavar="MODE", help="live, team or test.")] = "live",
    json: Json = False,
) -> None:
    """Make a key and print it, this once."""
    from worker import keys
    from worker.events import TYPES

    with opened(ctx) as installation, installation.database.write() as connection:
        key, presented = keys.create(
            connection, name=name, mode=mode, scopes=scope, types=TYPES.keys(), now=installation.clock()
        )
    if json:
        print_json({**_document(key), "key": presented})
    else:
        print_line(presented)
        say(f"key {key.name} ({key.mode}): this is the only time that it is shown, keep it as a secret")


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """Show the keys, without their secrets."""
    from worker import keys

    with opened(ctx) as installation, installation.database.read() as connection:
        found = [_document(key) for key in keys.list_keys(connection)]
    if json:
        print_json({"keys": found})
        return
    heads = ("NAME", "ID", "MODE", "SCOPES", "CREATED", "USED", "REVOKED")
    print_table(heads, [[*{**one, "scopes": " ".join(one["scopes"])}.values()] for one in found])


@app.command("revoke")
def revoke(
    ctx: typer.Context,
    key: Annotated[str, typer.Argument(metavar="NAME-OR-ID", show_default=False, help="Its name or public id.")],
    json: Json = False,
) -> None:
    """Withdraw a key, at once and for good."""
    from worker import keys

    with opened(ctx) as installation, installation.database.write() as connection:
        revoked = keys.revoke(connection, key, now=installation.clock())
    if json:
        print_json(_document(revoked))
    else:
        print_line(f"key {revoked.name} is revoked")


def _document(key: Any) -> dict[str, Any]:
    from worker.history import moment

    return {
        "name": key.name,
        "id": key.public_id,
        "mode": key.mode,
        "scopes": sorted(key.scopes),
        "created_at": moment(key.created_at),
        "used_at": moment(key.used_at),
        "revoked_at": moment(key.revoked_at),
    }
