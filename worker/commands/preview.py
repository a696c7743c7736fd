"""`rolecast preview`: the mails that an event would make, rendered and not sent; nothing is stored.

The personal links in them are made with a key that is thrown away, and signing links are masked: a preview can be
passed around.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.commands.console import Exit, Json, Stop, counted, opened, print_json, print_line, say
from worker.commands.explain import read_events

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from subscriptions.audience import AccountFacts, Recipient, Verdicts
    from worker.app import App
    from worker.events import Event
    from worker.fanout import EventRow
    from worker.mails import Due, People
    from worker.rendering import Email
    from worker.settings import Settings

NO_SENDER = "No sender configured <sender@preview.example>"


def add_to(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command("preview")(preview)


@dataclass(frozen=True, slots=True)
class Rendered:
    """One mail that would be sent."""

    event: str
    account: str
    contact: str
    email: Email
    message: bytes


def preview(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", show_default=False, help="Events; - is stdin.")],
    contact: Annotated[
        str | None, typer.Option("--contact", metavar="ID", help="Only this contact's: CONTACT or ACCOUNT/CONTACT.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write subject.txt, body.txt, body.html, message.eml.")
    ] = None,
    json: Json = False,
) -> None:
    """Render what events would send, for every recipient or one; nothing is sent or stored."""
    [(_, events)] = read_events([file])
    with opened(ctx) as app:
        found = _render(app, events, contact)
    if contact is not None and not found:
        message = f"{contact} would get no mail of {file}: `rolecast explain {file}` says why"
        raise Stop(Exit.NOT_FOUND, message)
    if out is not None:
        _write(out, found)
    if json:
        print_json({"mails": [_document(one) for one in found]})
    elif out is None:
        for one in found:
            print_line(one.message.decode("utf-8", "replace").replace("\r\n", "\n"))
    say(f"{counted(len(found), 'mail')} rendered{f' into {out}' if out else ''}, none sent")


def _render(app: App, events: Sequence[Event], wanted: str | None) -> list[Rendered]:
    from worker import mime
    from worker.intake import Publisher
    from worker.links import Links
    from worker.mails import Composer

    settings = app.settings
    if settings.sender is None:
        say("no sender is configured: the preview shows one in its place")
        settings = replace(settings, sender=NO_SENDER)
    links = Links((secrets.token_hex(32),), settings.public_url) if settings.links_work else None
    composer = Composer(settings, app.catalogues, links)
    renderer = app.renderer()
    verdicts = app.intake.dry_run(events, Publisher())
    found = []
    with app.database.read() as connection:
        for place, event in enumerate(events):
            answers = [(account, verdict) for one, account, verdict in verdicts if one is event]
            row = _row(app, settings, event, place)
            for due, people, names in _dues(connection, row, answers):
                if wanted is not None and wanted not in {name for pair in names for name in (pair[1], "/".join(pair))}:
                    continue
                email = _masked(renderer.render(composer.mail_of(row, due, people, now=app.clock())), event)
                message = mime.assemble(email)
                mime.prove(email, message)
                found.append(Rendered(f"{event.source} {event.id}", *names[0], email, message))
    return found


def _dues(
    connection: Connection, row: EventRow, answers: Sequence[tuple[AccountFacts, Verdicts]]
) -> Iterator[tuple[Due, People, list[tuple[str, str]]]]:
    """What the planning would make of an event: (delivery, people, (account, contact) of each ground)."""
    from subscriptions import directory
    from worker.mails import Due, GroundRow, People, Shape

    boxes: dict[int, list[tuple[AccountFacts, Recipient]]] = {}
    for account, verdict in answers:
        for recipient in verdict.recipients:
            boxes.setdefault(recipient.contact.mailbox, []).append((account, recipient))
    grounds = [pair for pairs in boxes.values() for pair in pairs]
    accounts = {account.number: account for account, _ in grounds}
    names = directory.account_names(connection, accounts)
    people = People(
        contacts=directory.contact_rows(connection, {recipient.contact.number for _, recipient in grounds}),
        accounts={number: (*names[number], account.catalogue) for number, account in accounts.items()},
        members=directory.contacts_of(connection, accounts) if row.category == "approval_request" else {},
    )
    for n, (mailbox, pairs) in enumerate(boxes.items(), 1):
        due = Due(
            n=n,
            mailbox=mailbox,
            mailbox_key=b"",  # its links open nothing whatever they are bound to
            attempts=0,
            first_flight_at=None,
            grounds=tuple(
                GroundRow(
                    account.number, one.contact.number, Shape(one.delivery, one.matched, one.dropped, one.deduplicated)
                )
                for account, one in pairs
            ),
        )
        yield due, people, [(account.id, one.contact.id) for account, one in pairs]


def _row(app: App, settings: Settings, event: Event, place: int) -> EventRow:
    """The event as the ledger would hold it."""
    from worker import ledger
    from worker.fanout import EventRow
    from worker.intake import new_ulid
    from worker.settings import domain_of

    class_ = next(iter(app.catalogues.values())).vocabulary.categories[event.type.category].class_
    domain = domain_of(settings.sender_of(class_) or NO_SENDER)
    now = app.clock()
    return EventRow(
        id=place,
        ulid=new_ulid(now),
        source=event.source,
        ce_id=event.id,
        type=event.type.name,
        category=event.type.category,
        class_=class_,
        lane=ledger.lane_of(class_, broadcast=event.account is None),
        scope="one" if event.account is not None else "list",
        routing={"attested": True, "products": list(event.products)},
        data=event.data,
        accepted_at=now,
        mode="test",
        not_before=None,
        expires_at=None,
        status="accepted",
        sender_domain=domain,
        bounce_domain=domain,
    )


def _masked(email: Email, event: Event) -> Email:
    """The mail with another address in place of its signing link, however that is spelt there."""
    from worker.masking import MASKED, mask

    link = event.data.get("signing_url")
    if not isinstance(link, str):
        return email
    return replace(
        email,
        subject=mask(email.subject, link, instead=MASKED),
        text=mask(email.text, link, instead=MASKED),
        html=mask(email.html, link, instead=MASKED),
    )


def _document(one: Rendered) -> Mapping[str, Any]:
    return {
        "event": one.event,
        "account": one.account,
        "contact": one.contact,
        "to": one.email.to_address,
        "subject": one.email.subject,
        "text": one.email.text,
        "html": one.email.html,
        "headers": [[name, value] for name, value in one.email.headers],
        "message": one.message.decode("utf-8", "replace"),
    }


def _write(out: Path, found: Sequence[Rendered]) -> None:
    """The files of one mail in the folder itself; of several in folders ACCOUNT-CONTACT, numbered where they repeat."""
    used: set[str] = set()
    for one in found:
        folder = out
        if len(found) > 1:
            name, count = f"{one.account}-{one.contact}", 1
            while name in used:
                count += 1
                name = f"{one.account}-{one.contact}-{count}"
            used.add(name)
            folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "subject.txt").write_text(one.email.subject + "\n", encoding="utf-8")
        (folder / "body.txt").write_text(one.email.text, encoding="utf-8")
        (folder / "body.html").write_text(one.email.html, encoding="utf-8")
        (folder / "message.eml").write_bytes(one.message)
