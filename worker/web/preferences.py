"""The recipient's pages: what one contact receives and why, and how to stop it.

`/preferences/{token}` shows and switches what the catalogue allows; `/unsubscribe/{token}` is RFC 8058: only a POST
with its exact body acts, whatever fetches the address. A link works without a sign-in, so a page shows no more than
the account, the roles and a masked address, and changes nothing but opt-outs of its contact, through
`subscriptions.changes` as every other door.

How far an opt-out reaches (S-22): a promotional category for the address, in every role and account; every other one
for the contact, in the roles that bring it and may be opted out of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email import message_from_bytes
from functools import partial
from typing import Final
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from sqlalchemy import Connection, select
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response

from subscriptions import changes, directory
from subscriptions.audience import AccountFacts, ContactFacts
from subscriptions.catalogue import OPT_OUT_CLASSES, Catalogue, Category, Receives
from subscriptions.changes import Actor, SetOptOut
from subscriptions.directory import ContactRow
from subscriptions.permissions import limits_of, void_places
from worker import mails
from worker.fanout import event_row
from worker.links import BadToken, Purpose, contact_now, delivery_now
from worker.schema import events
from worker.web.problems import Problem
from worker.web.security import read_body
from worker.web.site import Here, Site

router = APIRouter(include_in_schema=False)

FORM_BYTES: Final = 16 * 1024

_MODES: Final[Mapping[str, str]] = {
    "direct": "{verb} it as {roles}.",
    "copy": "{verb} a copy as {roles}.",
    "esign": "{verb} it to sign, as {roles}.",
    "fallback": "{verb} it as {roles}, but only while nobody who is {watched} can be reached.",
}


# ---------------------------------------------------------------- what a contact receives


@dataclass(frozen=True, slots=True)
class Kind:
    """One category as the page shows it."""

    key: str
    title: str
    says: str  # what the contact gets or would get, by which role, and how far a switch reaches
    on: bool
    switchable: bool
    stopped: bool  # by a complaint: this page can't switch it


@dataclass(frozen=True, slots=True)
class Held:
    """A role of the contact."""

    title: str
    void: bool  # more hold it than may: it brings nothing


@dataclass(frozen=True, slots=True)
class Received:
    """Everything that the page of one contact shows."""

    contact: ContactRow
    account_name: str
    catalogue: Catalogue
    roles: tuple[Held, ...]
    kinds: tuple[Kind, ...]
    approves: tuple[str, ...]  # titles of actions
    products: tuple[str, ...] | None  # the contact's choice; None = all that the account uses
    uses: tuple[str, ...]
    suppressed: bool

    @property
    def masked(self) -> str:
        """The address, so that its owner knows it and nobody else learns it."""
        local, _, domain = self.contact.address.rpartition("@")
        return f"{local[:1]}•••@{domain}"


def received(connection: Connection, site: Site, number: int) -> Received | None:
    """What the contact with that row number receives; None where it or its account was removed."""
    contact = directory.contact_rows(connection, [number]).get(number)
    names = directory.account_names(connection, [contact.account]) if contact else {}
    if contact is None or contact.removed or not contact.address:
        return None
    ext, name = names[contact.account]
    account = directory.account(connection, site.app.catalogues, ext)
    me = next((one for one in account.contacts if one.number == number), None) if account else None
    if account is None or me is None:
        return None
    catalogue = site.app.catalogues[account.catalogue]
    void, _ = void_places(limits_of(catalogue), account.contacts)
    roles = [role for role in me.roles if role in catalogue.roles]
    valid = [role for role in roles if (me.id, role) not in void]
    approves = {action for role in valid for action in catalogue.roles[role].may_approve}
    return Received(
        contact=contact,
        account_name=name or ext,
        catalogue=catalogue,
        roles=tuple(Held(catalogue.roles[role].title, role not in valid) for role in roles),
        kinds=tuple(_kinds(catalogue, account, me, valid)),
        approves=tuple(sorted(catalogue.vocabulary.actions[action].title for action in approves)),
        products=contact.products,
        uses=tuple(sorted(account.uses)),
        suppressed=me.email in account.suppressed,
    )


def _kinds(catalogue: Catalogue, account: AccountFacts, me: ContactFacts, roles: Iterable[str]) -> Iterable[Kind]:
    """Every category that the roles bring, in the vocabulary's order; the status page's are none of them."""
    held = list(roles)
    for category in catalogue.vocabulary.categories.values():
        entries = {role: entry for role in held if (entry := catalogue.roles[role].receives.get(category.key))}
        if entries and category.class_ != "status":
            yield _kind(catalogue, account, me, category, entries)


def _kind(
    catalogue: Catalogue,
    account: AccountFacts,
    me: ContactFacts,
    category: Category,
    entries: Mapping[str, Receives],
) -> Kind:
    optional = [role for role, entry in entries.items() if entry.opt_out]
    complained = me.email in account.complained and category.class_ in OPT_OUT_CLASSES
    everywhere = category.class_ == "promotional"
    if complained:
        off = set(entries)
    elif everywhere:
        stopped = (me.email, category.key) in account.opted_out or any(key == category.key for _, key in me.opt_outs)
        off = set(entries) if stopped else set()
    else:
        off = {role for role in optional if (role, category.key) in me.opt_outs}
    got = {role: entry for role, entry in entries.items() if role not in off}
    missed = {role: entry for role, entry in entries.items() if role in off}
    says = list(_gets(catalogue, got, "You would get" if me.email in account.suppressed else "You get"))
    if missed:
        says.insert(0, _why_off(complained=complained, partly=bool(got)))
        says += _gets(catalogue, missed, "Otherwise you would also get" if got else "You would get")
    elif optional and len(optional) < len(got) and not everywhere:
        says.append(f"You can stop what you get as {_titles(catalogue, optional)} only.")
    if everywhere and optional and not complained:
        says.append("A change holds for your address, in all your roles and accounts.")
    return Kind(
        key=category.key,
        title=category.title.partition(" (")[0],
        says=" ".join(says),
        on=not (missed and (complained or everywhere or off.issuperset(optional))),
        switchable=bool(optional) and not complained,
        stopped=complained,
    )


def _why_off(*, complained: bool, partly: bool) -> str:
    if complained:
        return "Stopped, because you reported our mail as unwanted. Write to us if you want it again."
    return "Switched off in part." if partly else "Switched off."


def _gets(catalogue: Catalogue, entries: Mapping[str, Receives], verb: str) -> Iterable[str]:
    """One sentence for each way in which roles bring a category."""
    ways: dict[tuple[str, str], list[str]] = {}
    for role, entry in entries.items():
        watched = catalogue.roles[entry.when_unreachable].title if entry.when_unreachable else ""
        ways.setdefault((entry.mode, watched), []).append(role)
    for (mode, watched), roles in ways.items():
        yield _MODES[mode].format(verb=verb, roles=_titles(catalogue, roles), watched=watched)


def _titles(catalogue: Catalogue, roles: Iterable[str]) -> str:
    return _joined(catalogue.roles[role].title for role in roles)


def _joined(titles: Iterable[str]) -> str:
    *others, last = titles
    return f"{', '.join(others)} and {last}" if others else last


# ---------------------------------------------------------------- the preference page


@router.api_route("/preferences/{token}", methods=["GET", "HEAD"])
def show(token: str, site: Here) -> Response:
    """What the contact receives and why. Changes nothing."""
    with site.app.database.read() as connection:
        (number,) = _numbers(site, "p", token, partial(contact_now, connection))
        return _page(site, received(connection, site, number))


@router.post("/preferences/{token}")
async def switch(token: str, request: Request, site: Here) -> Response:
    """Switch what the form says: `shown` are the categories that it had, `on` those that stay."""
    form = _form(request, await read_body(request, FORM_BYTES))
    if "shown" not in form:
        raise Problem(400, "Nothing was changed: the form was empty. Open the page again from the email.")
    return await run_in_threadpool(_switch, site, token, set(form["shown"]), set(form.get("on", ())))


def _switch(site: Site, token: str, shown: set[str], wanted: set[str]) -> Response:
    with site.app.database.read() as connection:  # nobody takes the write lock with a forged link
        (number,) = _numbers(site, "p", token, partial(contact_now, connection))
    with site.app.database.write() as connection:
        before = received(connection, site, number)
        if before is None:
            return _page(site, None)
        turned = [
            kind for kind in before.kinds if kind.switchable and kind.key in shown and kind.on != (kind.key in wanted)
        ]
        wishes = [wish for kind in turned for wish in _wishes(before, kind.key, off=kind.on)]
        _apply(connection, site, number, wishes, why="preference page")
        after = received(connection, site, number)
    failed = [kind.title for kind in (after.kinds if after else ()) if kind.key in shown and kind.switchable
              and kind.on != (kind.key in wanted)]  # fmt: skip
    error = f"Could not be switched: {_joined(failed)}. Write to us, and we will look into it." if failed else ""
    return _page(site, after, saved=not error, error=error)


def _wishes(found: Received, category: str, *, off: bool) -> Iterable[SetOptOut]:
    """The changes that switch one category of one contact."""
    return _opt_outs(found.catalogue, found.contact, category, found.contact.roles, off=off)


def _opt_outs(
    catalogue: Catalogue, contact: ContactRow, category: str, roles: Iterable[str], *, off: bool
) -> Iterable[SetOptOut]:
    """One opt-out that holds for the address where the category is promotional, else one for each of the roles."""
    if catalogue.vocabulary.categories[category].class_ == "promotional":
        yield SetOptOut(contact.number, None, category, off, "recipient")
        return
    for role in sorted(set(roles)):
        entry = catalogue.roles[role].receives.get(category) if role in catalogue.roles else None
        if entry is not None and entry.opt_out:
            yield SetOptOut(contact.number, role, category, off, "recipient")


def _apply(connection: Connection, site: Site, number: int, wishes: Iterable[SetOptOut], *, why: str) -> None:
    wanted = list(wishes)
    if wanted:
        actor = Actor(f"recipient:{number}", "preferences")
        changes.apply(connection, actor, wanted, catalogues=site.app.catalogues, now=site.app.clock(), why=why)


def _page(site: Site, found: Received | None, *, saved: bool = False, error: str = "") -> HTMLResponse:
    if found is None:
        raise Problem(404, "You are no longer a contact of that account, so there is nothing to choose here any more.")
    return site.personal(
        "preferences", received=found, saved=saved, error=error, status_page_url=site.app.settings.status_page_url
    )


# ---------------------------------------------------------------- one click


@dataclass(frozen=True, slots=True)
class _Promise:
    """What the unsubscribe link of one mail promised to stop."""

    category: Category
    wishes: Mapping[int, tuple[SetOptOut, ...]]  # by the number of the contact


@router.api_route("/unsubscribe/{token}", methods=["GET", "HEAD"])
def ask(token: str, site: Here) -> Response:
    """Ask before anything is done: scanners fetch every link of a mail. Changes nothing."""
    promise = _promise(site, token)
    return site.personal("unsubscribe", title=_plain(promise), everywhere=_everywhere(promise), done=False)


@router.post("/unsubscribe/{token}")
async def one_click(token: str, request: Request, site: Here) -> Response:
    """RFC 8058: stop what the mail promised, on every ground of it; once more changes nothing."""
    form = _form(request, await read_body(request, FORM_BYTES))
    if form.get("List-Unsubscribe") != ["One-Click"]:
        raise Problem(400, "Nothing was changed: the request must carry List-Unsubscribe=One-Click (RFC 8058).")
    return await run_in_threadpool(_unsubscribe, site, token)


def _unsubscribe(site: Site, token: str) -> Response:
    promise = _promise(site, token)
    with site.app.database.write() as connection:
        for number, wishes in promise.wishes.items():
            _apply(connection, site, number, wishes, why="one-click unsubscribe")
    return site.personal("unsubscribe", title=_plain(promise), everywhere=_everywhere(promise), done=True)


def _promise(site: Site, token: str) -> _Promise:
    """What the mail that carried this link promised to stop. Raises `Problem` 404."""
    with site.app.database.read() as connection:
        event_id, n = _numbers(site, "u", token, partial(delivery_now, connection))
        event = event_row(connection.execute(select(events).where(events.c.id == event_id)).one())
        dues, people = mails.load(connection, event, [n])
        members = directory.contacts_of(connection, people.accounts)
        named_ones = directory.contact_rows(connection, people.contacts)
    category = next(iter(site.app.catalogues.values())).vocabulary.categories[event.category]
    wishes: dict[int, tuple[SetOptOut, ...]] = {}
    for ground in dues[0].grounds:
        catalogue = site.app.catalogues[people.accounts[ground.account][2]]
        named = named_ones[ground.contact]
        matched = {role for role, _ in ground.shape.matched}
        wishes[named.number] = tuple(_opt_outs(catalogue, named, category.key, {*named.roles, *matched}, off=True))
        if category.class_ == "promotional":
            continue  # it holds for the address already
        for other in members.get(ground.account, ()):
            # Other records of the mailbox were merged into this ground: the footer named their roles as well.
            if other.mailbox == named.mailbox and other.number != named.number:
                wishes[other.number] = tuple(_opt_outs(catalogue, other, category.key, other.roles, off=True))
    return _Promise(category, wishes)


def _plain(promise: _Promise) -> str:
    return promise.category.title.partition(" (")[0]


def _everywhere(promise: _Promise) -> bool:
    return promise.category.class_ == "promotional"


# ---------------------------------------------------------------- tokens and forms


_UNKNOWN: Final = (
    "This link is not complete, not one of ours, or from an email so old that we do not know it any more."
    " Open it from the email again, copy all of it, or use the link of a newer one."
)
#: One answer for all: whose row a forged link names is nobody's business.


def _numbers(site: Site, purpose: Purpose, token: str, identity_of: Callable[..., bytes | None]) -> tuple[int, ...]:
    """The numbers of a personal link whose row is still the one that it was made for. Raises `Problem` 404."""
    if site.links is not None:
        with suppress(BadToken):
            return site.links.read(purpose, token, identity_of)
    raise Problem(404, _UNKNOWN)


def _form(request: Request, body: bytes) -> Mapping[str, list[str]]:
    """The fields of a form, urlencoded or multipart (RFC 8058 allows both); empty where it is neither."""
    written = request.headers.get("content-type", "")
    kind = written.partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":
        return parse_qs(body.decode("utf-8", "replace"), max_num_fields=200)
    if kind != "multipart/form-data":
        return {}
    # A form is built like a mail (RFC 7578), and small: the standard library reads it.
    message = message_from_bytes(b"Content-Type: " + written.encode("latin-1") + b"\r\n\r\n" + body)
    fields: dict[str, list[str]] = {}
    for part in message.get_payload() if message.is_multipart() else ():
        name = part.get_param("name", header="content-disposition") if not isinstance(part, str) else None
        payload = part.get_payload(decode=True) if not isinstance(part, str) else None
        if isinstance(name, str) and isinstance(payload, bytes):
            fields.setdefault(name, []).append(payload.decode("utf-8", "replace").rstrip("\r\n"))
    return fields
