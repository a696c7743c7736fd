"""`rolecast accounts import|export|show|list`: the directory, from and to documents."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

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
    progress,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from subscriptions.transfer import Checked, Difference
    from worker.app import App

app = typer.Typer(help="Accounts and their contacts.", no_args_is_help=True)

NAMES = 5
#: Names that a row of the difference shows; --json has up to a thousand.


@app.command("import")
def import_(
    ctx: typer.Context,
    *,
    file: Annotated[str, typer.Argument(metavar="FILE", show_default=False, help="JSON or JSON Lines; - is stdin.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what it would change.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Also remove the accounts that it does not name.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    json: Json = False,
) -> None:
    """Import accounts, all or nothing; says what it adds, changes and removes."""
    with opened(ctx) as installation, _input(file) as (stream, size), ExitStack() as stack:
        from subscriptions import transfer

        with progress("checking") as tell:  # ends before a question is asked: it would be drawn over it
            document = stack.enter_context(
                transfer.checked(stream, catalogues=installation.catalogues, name=file, size=size, progress=tell)
            )
        if dry_run:
            difference = _planned(installation, document, prune=prune)
        else:
            if prune and not yes:
                _ask(_planned(installation, document, prune=True))
            with progress("importing") as told:
                difference = transfer.run_import(
                    installation.database,
                    document,
                    catalogues=installation.catalogues,
                    now=installation.clock(),
                    prune=prune,
                    progress=told,
                )
        size_of = f"{counted(document.accounts, 'account')}, {counted(document.contacts, 'contact')}"
    if json:
        print_json({"dry_run": dry_run, **difference.to_json()})
    else:
        print_table(("WHAT", "HOW MANY", "WHICH"), [_row(*line) for line in difference.lines()])
    done = "nothing was changed: this was a dry run" if dry_run else "imported"
    say(f"{file}: {size_of}; {'no difference' if difference.empty else done}")


def _planned(installation: App, document: Checked, *, prune: bool) -> Difference:
    from subscriptions import transfer

    with progress("comparing") as tell:
        return transfer.plan_import(
            installation.database,
            document,
            catalogues=installation.catalogues,
            now=installation.clock(),
            prune=prune,
            progress=tell,
        )


def _ask(planned: Difference) -> None:
    """Let a person confirm what --prune removes. Raises `Stop`."""
    gone = planned.accounts_removed
    if not gone.count:
        return
    which = ", ".join(gone.first[:NAMES]) + (", ..." if gone.count > NAMES else "")
    if not asks():
        message = (
            f"--prune would remove {counted(gone.count, 'account')} ({which}): look with --dry-run, then give --yes"
        )
        raise Stop(Exit.USAGE, message)
    if not typer.confirm(f"Remove {counted(gone.count, 'account')} ({which})?", err=True):
        raise Stop(Exit.FAILED, "nothing was imported")


def _row(what: str, count: int, names: Sequence[str]) -> tuple[str, str, str]:
    rest = f" and {count - NAMES:,} more" if count > NAMES else ""
    shown = "; ".join(names[:NAMES])
    return what, f"{count:,}", shown + rest if shown else ""


@contextmanager
def _input(name: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """A document's bytes and how many they are, where that is known."""
    if name == "-":
        yield sys.stdin.buffer, None
        return
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(Path(name).open("rb"))
        except OSError as error:
            raise Stop(Exit.USAGE, f"the file {name} can't be read ({error.strerror}): name one that exists") from error
        yield stream, os.fstat(stream.fileno()).st_size or None


@app.command("export")
def export(
    ctx: typer.Context,
    *,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write there instead of stdout.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="JSON Lines, one account a line.")] = False,
    account: Annotated[
        list[str] | None, typer.Option("--account", metavar="ID", help="Only this account; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The export is JSON anyway.")] = False,
) -> None:
    """Write the directory as a document that loses nothing: importing it again changes nothing."""
    del json
    from subscriptions import transfer

    with (
        opened(ctx) as installation,
        installation.database.read(patient=True) as connection,
        progress("exporting") as tell,
    ):
        with _output(out) as stream:
            written = transfer.export(
                connection,
                stream,
                catalogues=installation.catalogues,
                lines=lines,
                only=account,
                progress=lambda done: tell(done, None),
            )
        if account is not None and written < len(set(account)):
            raise Stop(Exit.NOT_FOUND, f"the directory has only {written} of the {len(set(account))} accounts named")
    say(f"{counted(written, 'account')} written{f' to {out}' if out else ''}")


@contextmanager
def _output(path: Path | None) -> Iterator[BinaryIO]:
    """Where an export goes: a file appears whole or not at all."""
    if path is None:
        yield sys.stdout.buffer
        return
    number, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as stream:
            yield stream
        Path(draft).replace(path)
    finally:
        with suppress(FileNotFoundError):
            Path(draft).unlink()


@app.command("show")
def show(
    ctx: typer.Context,
    *,
    account: Annotated[str, typer.Argument(metavar="ID", show_default=False, help="The account's id.")],
    json: Json = False,
) -> None:
    """Show an account with its contacts, in order of assignment."""
    import io
    from json import loads

    from subscriptions import directory, transfer

    with opened(ctx) as installation, installation.database.read() as connection:
        row = directory.account_row(connection, account)
        if row is None:
            message = f"there is no account {account!r}: `rolecast accounts list` shows those there are"
            raise Stop(Exit.NOT_FOUND, message)
        written = io.BytesIO()
        transfer.export(connection, written, catalogues=installation.catalogues, lines=True, only=[account])
    document: dict[str, Any] = loads(written.getvalue())
    if json:
        print_json(document)
        return
    print_line(f"{row.id}  {row.name or '-'}  catalogue {row.catalogue}  uses {', '.join(row.uses) or 'no product'}")
    print_table(
        ("CONTACT", "NAME", "EMAIL", "KIND", "ROLES", "PRODUCTS", "OPT-OUTS"),
        [
            (one["id"], one.get("name"), one["email"], one.get("kind"), ", ".join(one["roles"]) or "-",
             "all" if one.get("products") is None else ", ".join(one["products"]),
             ", ".join(f"{wish['role']}:{wish['category']}" for wish in one.get("opt_outs", ())) or "-")
            for one in document["contacts"]
        ],
    )  # fmt: skip
    for one in document.get("suppressions", ()):
        print_line(f"suppressed: {one['address']} ({one['cause']}, by {one['by']})")


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """Show every account."""
    from subscriptions import directory

    rows = []
    with opened(ctx) as installation, installation.database.read() as connection:
        after = 0
        while page := directory.list_accounts(connection, after=after):
            rows += page
            after = page[-1].number
    if json:
        found = [
            {"id": row.id, "name": row.name, "catalogue": row.catalogue, "uses": row.uses, "contacts": row.contacts}
            for row in rows
        ]
        print_json({"accounts": found})
    else:
        table = [(row.id, row.name or "-", row.catalogue, ", ".join(row.uses) or "-", row.contacts) for row in rows]
        print_table(("ACCOUNT", "NAME", "CATALOGUE", "USES", "CONTACTS"), table)
