"""`rolecast explain`: the verdicts for events, without sending or storing anything.

Against a document no database is needed, and none is opened. Every event and every account named is checked before
the first answer is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.commands.console import (
    Exit,
    Stop,
    opened,
    print_json_line,
    print_line,
    progress,
    read_file,
    say,
    settings_of,
    told,
)

if TYPE_CHECKING:
    from subscriptions.audience import AccountFacts
    from worker.events import Event

_Accounts = Callable[["Event"], "Iterator[AccountFacts]"]
_StatusPage = Callable[["Event"], "dict[str, Any]"]


def add_to(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command("explain")(explain)


def explain(
    ctx: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", show_default=False, help="Events; - is stdin.")],
    directory: Annotated[
        Path | None, typer.Option("--directory", metavar="FILE", help="Resolve against this document, no database.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One answer a line, for each event and account.")] = False,
) -> None:
    """Show who would hear of events and who would not, with every reason; nothing is sent or stored."""
    if directory is not None:
        _against_document(ctx, files, directory, json=json)
    else:
        _against_database(ctx, files, json=json)


def read_events(files: Sequence[str]) -> list[tuple[str, list[Event]]]:
    """The events of each file, every file checked whole. Raises `Stop` with every fault of every file."""
    from worker.events import EventError
    from worker.events import read_file as parse

    found: list[tuple[str, list[Event]]] = []
    faults: list[str] = []
    for name in files:
        try:
            found.append((name, parse(read_file(name), name=name)))
        except EventError as error:
            faults += [
                f"{name}, {fault}" if fault.pointer or fault.line else f"{name}: {fault}" for fault in error.faults
            ]
    if faults:
        raise Stop(Exit.INVALID, *told(faults))
    return found


def place_of(name: str, index: int, events: Sequence[Event]) -> str:
    """Where an event stands, for people."""
    event = events[index]
    return f"{name}, event {index + 1} ({event.source} {event.id})" if len(events) > 1 else f"{name}"


def _against_document(ctx: typer.Context, files: Sequence[str], document: Path, *, json: bool) -> None:
    from subscriptions.catalogue import load_catalogues
    from subscriptions.documents import facts, read_accounts

    settings = settings_of(ctx)
    catalogues = load_catalogues(settings.catalogues)
    read = read_events(files)
    try:
        with document.open("rb") as stream:
            known = facts(read_accounts(stream, catalogues=catalogues, name=str(document)), catalogues)
    except OSError as error:
        message = f"the document {document} can't be read ({error.strerror}): name one that exists"
        raise Stop(Exit.USAGE, message) from error
    _refuse_unknown(read, known, "the document")
    places = {name: place for place, name in enumerate(known)}

    def accounts(event: Event) -> Iterator[AccountFacts]:
        if event.account is not None:
            yield known[event.account]
        elif event.accounts == "all":
            yield from known.values()
        else:
            yield from (known[name] for name in sorted(event.accounts or (), key=places.__getitem__))

    page = {"url": settings.status_page_url, "incident": None}
    _answer(read, catalogues, accounts, lambda _event: page, json=json)


def _against_database(ctx: typer.Context, files: Sequence[str], *, json: bool) -> None:
    read = read_events(files)
    with opened(ctx) as app, app.database.read(patient=True) as connection:
        from subscriptions import directory

        wanted = sorted({name for _, events in read for event in events for name in _named(event)})
        known: dict[str, AccountFacts] = {}
        for start in range(0, len(wanted), directory.PAGE):
            page = directory.facts(connection, app.catalogues, only=wanted[start : start + directory.PAGE])
            known.update((account.id, account) for account in page)
        _refuse_unknown(read, known, "the directory")

        def accounts(event: Event) -> Iterator[AccountFacts]:
            if event.accounts == "all":
                after = 0
                while page := directory.facts(connection, app.catalogues, after=after):
                    yield from page
                    after = page[-1].number
            else:
                yield from sorted((known[name] for name in _named(event)), key=lambda account: account.number)

        _answer(read, app.catalogues, accounts, lambda event: app.feed.pointer(connection, event), json=json)


def _named(event: Event) -> tuple[str, ...]:
    if event.account is not None:
        return (event.account,)
    return () if event.accounts is None or event.accounts == "all" else event.accounts


def _refuse_unknown(read: Sequence[tuple[str, list[Event]]], known: Mapping[str, AccountFacts], where: str) -> None:
    faults = [
        f"{place_of(file, index, events)}, {_pointer(event, name)}: {where} has no account {name!r}"
        for file, events in read
        for index, event in enumerate(events)
        for name in _named(event)
        if name not in known
    ]
    if faults:
        raise Stop(Exit.INVALID, *told(faults))


def _pointer(event: Event, name: str) -> str:
    return "/data/account" if event.account is not None else f"/data/accounts/{list(event.accounts or ()).index(name)}"


def _answer(
    read: Sequence[tuple[str, list[Event]]],
    catalogues: Mapping[str, Any],
    accounts: _Accounts,
    status_page: _StatusPage,
    *,
    json: bool,
) -> None:
    from subscriptions.audience import answer, resolve
    from worker.fanout import event_facts

    events = [event for _, found in read for event in found]
    answers = 0
    with progress("explaining") as tell:
        for done, event in enumerate(events):
            tell(done, len(events))
            facts = event_facts(event.type.category, event.data, event.products, attested=True)
            page: dict[str, Any] | None = None
            if not json:
                print_line(f"{event.type.name}  {event.source} {event.id}")
            for account in accounts(event):
                verdicts = resolve(catalogues[account.catalogue], account, facts)
                if page is None and verdicts.outcome == "redirected_to_status_page":
                    page = status_page(event)
                found = answer(verdicts, source=event.source, event=event.id, account=account.id, status_page=page)
                answers += 1
                if json:
                    print_json_line(found)
                else:
                    _report(found)
    if not answers:
        say("no account is concerned: there are no events, or no accounts in the directory")


def _report(found: Mapping[str, Any]) -> None:
    """One answer as people read it: who, why; who not, why."""
    reason = f" ({found['reason']})" if found["reason"] else ""
    print_line(f"  {found['account']}: {found['outcome']}{reason}, {found['category']}")
    if found.get("status_page"):
        incident = found["status_page"]["incident"]
        print_line(
            f"    pointed to  {incident['url'] if incident else found['status_page']['url'] or 'no status page'}"
        )
    for one in found["recipients"]:
        print_line(f"    gets it     {one['contact']} <{one['email']}>, {one['delivery']}: {reasons(one['matched'])}")
    for one in found["excluded"]:
        print_line(f"    does not    {one['contact']}: {reasons(one['dropped'])}")
    for warning in found["warnings"]:
        print_line(f"    warning     {warning}")


def reasons(pairs: Sequence[Mapping[str, str | None]]) -> str:
    """Roles with their reasons, in words."""
    return ", ".join(f"{pair['role']} ({pair['reason']})" if pair["role"] else str(pair["reason"]) for pair in pairs)
