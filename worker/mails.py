"""From rows of the ledger to a `rendering.Mail`: everything that one delivery says, gathered in one place.

`gather` reads a whole slice in a few statements; `Composer` is pure: `mail_of` says what a mail says, `personal` those
values of it that differ among the recipients of an event. Sending and previewing go through it, so that they agree.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import repeat
from operator import gt, itemgetter
from typing import Any, NamedTuple, TypeVar, cast

from sqlalchemy import Connection, select

from subscriptions import directory
from subscriptions.bulk import by_id, read_columns
from subscriptions.catalogue import Catalogue
from subscriptions.directory import ContactRow, Known
from worker.fanout import EventRow
from worker.links import Links, Named, contact_identity, delivery_identity, named_contacts
from worker.rendering import Ground, Mail, Variant, list_label, shown_account, shown_name
from worker.schema import verdict_shapes
from worker.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shape:
    """A verdict without its contact."""

    delivery: str | None
    matched: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str | None, str], ...]
    deduplicated: bool


class GroundRow(NamedTuple):
    """One account's reason for a delivery, by numbers."""

    account: int
    contact: int
    shape: Shape


class Due(NamedTuple):
    """A delivery with its grounds, the first one first."""

    n: int
    mailbox: int
    mailbox_key: bytes  # what the mailbox is whatever its number: its address key
    attempts: int
    first_flight_at: int | None
    grounds: tuple[GroundRow, ...]
    reason: str | None = None  # why it waited until now


class Addressee(NamedTuple):
    """A contact as a mail to it needs it."""

    number: int
    account: int  # the account's number
    id: str
    name: str
    email: str  # as written: mail goes there
    address: str  # normalised; empty once erased
    mailbox: int
    locale: str
    timezone: str
    removed: bool


Contact = Addressee | ContactRow
"""A contact as a mail to it needs it, or with all that is known of it."""


@dataclass(frozen=True, slots=True)
class People:
    """The contacts and accounts that a set of deliveries speaks of, by number."""

    contacts: Mapping[int, Contact]
    accounts: Mapping[int, tuple[str, str, str]]  # (id, name, catalogue)
    members: Mapping[int, Sequence[ContactRow]]  # all contacts of an account, for requests only


@lru_cache(maxsize=4096)
def shape_of(body: str) -> Shape:
    """A stored verdict shape."""
    delivery, matched, dropped, deduplicated = json.loads(body)
    return Shape(
        delivery,
        tuple((role, reason) for role, reason in matched),
        tuple((role, reason) for role, reason in dropped),
        deduplicated,
    )


def load(connection: Connection, event: EventRow, numbers: Sequence[int]) -> tuple[list[Due], People]:
    """The deliveries of an event with these numbers, in order, and whom they speak of."""
    return gather(connection, event, *numbered(numbers), {})


def numbered(numbers: Sequence[int]) -> tuple[str, dict[str, int | list[int]]]:
    """The condition of `gather` for deliveries with these numbers."""
    return "d.n AMONG :numbers", {"numbers": list(numbers)}


def gather(
    connection: Connection,
    event: EventRow,
    condition: str,
    values: Mapping[str, int | list[int]],
    shapes: dict[int, Shape],
) -> tuple[list[Due], People]:
    """The deliveries `d` of an event for which a condition holds, in order, and whom they speak of.

    A few statements, however many there are. `shapes` keeps the verdict shapes that were read, by number.
    """
    key = "hex(m.address_key)" if connection.dialect.name == "sqlite" else "encode(m.address_key, 'hex')"
    mailbox = by_id(connection, "mailboxes", "m", "d.mailbox_id")
    spoken_of = " ".join([
        by_id(connection, "contacts", "c", "d.contact_id", kind="LEFT JOIN"),
        by_id(connection, "mailboxes", "b", "c.mailbox_id", kind="LEFT JOIN"),
        by_id(connection, "accounts", "a", "d.account_id"),
    ])  # fmt: skip
    rest = f"FROM deliveries d {mailbox} {spoken_of} WHERE d.event_id = :event AND {condition}"
    found = read_columns(connection, (*_GROUND, *_OF_DELIVERY, key), rest, event=event.id, **values)
    if any(map(gt, found[_N], found[_N][1:])):  # they come in order, but nothing says so
        found = list(zip(*sorted(zip(*found, strict=True), key=itemgetter(_N)), strict=True))
    numbers: Sequence[int] = found[_N]
    more: list[Sequence[Any]] = [()] * len(_GROUND)
    if event.scope != "one" and numbers:
        rest = f"FROM more_grounds d {spoken_of} WHERE d.event_id = :event AND d.n BETWEEN :first AND :last"
        more = read_columns(connection, _GROUND, rest, event=event.id, first=numbers[0], last=numbers[-1])
    _learn_shapes(connection, {*found[_SHAPE], *more[_SHAPE]} - shapes.keys(), shapes)
    contacts: dict[int, Contact] = {}
    accounts: dict[int, tuple[str, str, str]] = {}
    grounds = list(zip(_spoken_of(found, shapes, contacts, accounts)))
    if more[_N]:
        further = defaultdict[int, list[GroundRow]](list)
        added = _spoken_of(more, shapes, contacts, accounts)
        for n, ground in sorted(zip(more[_N], added, strict=True), key=_in_order):
            further[n].append(ground)
        grounds = [(*first, *further.get(n, ())) for n, first in zip(numbers, grounds, strict=True)]
    boxes, attempts, first_flights, reasons, keys = found[_OWN:]
    dues = _made(Due, numbers, boxes, map(bytes.fromhex, keys), attempts, first_flights, grounds, reasons)
    members = directory.contacts_of(connection, accounts) if event.category == "approval_request" else {}
    return dues, People(contacts, accounts, members)


def as_planned(
    connection: Connection,
    event: EventRow,
    planned: Sequence[tuple[int, int, int, int, int]],
    known: Known,
    shapes: dict[int, Shape],
) -> tuple[list[Due], People]:
    """What `gather` finds of an event for one account that was planned a moment ago, out of what planned it.

    `planned` is its deliveries as `fanout.Planning.planned` has them.
    """
    _learn_shapes(connection, {shape for *_, shape in planned} - shapes.keys(), shapes)
    facts = {one.number: one for one in known.facts.contacts}
    dues, contacts = [], {}
    for n, mailbox, account, contact, shape in planned:
        name, email, locale, timezone, key = known.people[contact]
        one = facts[contact]
        contacts[contact] = Addressee(
            contact, account, one.id, name, email, one.email, mailbox, locale, timezone, removed=False
        )
        ground = GroundRow(account, contact, shapes[shape])
        dues.append(Due(n, mailbox, bytes.fromhex(key), 0, None, (ground,)))
    accounts = {known.facts.number: (known.facts.id, known.name, known.facts.catalogue)}
    members = directory.contacts_of(connection, accounts) if event.category == "approval_request" else {}
    return dues, People(contacts, accounts, members)


def _spoken_of(
    columns: Sequence[Sequence[Any]],
    shapes: Mapping[int, Shape],
    contacts: dict[int, Contact],
    accounts: dict[int, tuple[str, str, str]],
) -> list[GroundRow]:
    """The grounds in columns of `_GROUND`; adds whom they speak of."""
    numbers = columns[_CONTACT]
    addressees = _made(Addressee, numbers, *columns[_ADDRESSEE:_NAMED])
    contacts.update(zip(numbers, addressees, strict=True))
    if None in columns[_ADDRESSEE]:  # a contact that is gone
        for number, account in zip(numbers, columns[_ADDRESSEE], strict=True):
            if account is None:
                contacts.pop(number, None)
    accounts.update(zip(columns[_ACCOUNT], zip(*columns[_NAMED:_OWN], strict=True), strict=True))
    return _made(GroundRow, columns[_ACCOUNT], numbers, map(shapes.__getitem__, columns[_SHAPE]))


def _made(kind: type[T], *columns: Iterable[Any]) -> list[T]:
    """Named tuples of columns, as `kind(*values)` would make each: here no line of Python runs for one."""
    new: Any = tuple.__new__
    return list(map(new, repeat(kind), zip(*columns, strict=True)))


def _in_order(ground: tuple[int, GroundRow]) -> tuple[int, int, int]:
    n, (account, contact, _) = ground
    return n, account, contact


_N, _ACCOUNT, _CONTACT, _SHAPE, _ADDRESSEE, _NAMED, _OWN = 0, 1, 2, 3, 4, 13, 16
#: Where they begin in a row: a ground's numbers, its addressee, its account, what stands in `deliveries` alone.
_GROUND = (
    "d.n", "d.account_id", "d.contact_id", "d.shape_id", "c.account_id", "c.ext", "c.name", "c.email",
    "coalesce(b.address, '')", "c.mailbox_id", "c.locale", "c.timezone", "c.removed_at IS NOT NULL", "a.ext", "a.name",
    "a.catalogue",
)  # fmt: skip
_OF_DELIVERY = ("d.mailbox_id", "d.attempts", "d.first_flight_at", "d.reason")


def _learn_shapes(connection: Connection, numbers: set[int], shapes: dict[int, Shape]) -> None:
    if numbers:
        table = verdict_shapes
        for row in connection.execute(select(table.c.id, table.c.body).where(table.c.id.in_(numbers))):
            shapes[row.id] = shape_of(row.body)


def may_opt_out(catalogue: Catalogue, category: str, roles: Sequence[str]) -> bool:
    """Whether somebody who gets a category by these roles may switch it off: every one of them must allow it."""
    allowed = [
        found.opt_out
        for role in roles
        if (held := catalogue.roles.get(role)) and (found := held.receives.get(category))
    ]
    return bool(allowed) and all(allowed)


def variant_of(shape: Shape) -> Variant:
    """Which of a type's mails a verdict asks for."""
    by_delivery = {"esign_request": "esign", "approval_request": "approval", "contact_list": "contact_list"}
    if shape.delivery in by_delivery:
        return cast("Variant", by_delivery[shape.delivery])
    reasons = {reason for _, reason in shape.matched}
    if "role_matched" in reasons:
        return "direct"
    return "fallback" if "fallback_used" in reasons else "copy"


@lru_cache(maxsize=1024)  # the contacts of an account stand side by side
def _said_of(account: str, name: str) -> tuple[bytes, bytes, bytes]:
    """An account's id, what mails call it, and its word in a List-ID, as UTF-8."""
    return account.encode(), shown_account(name or account, account).encode(), list_label(account).encode()


def message_id(event: EventRow, n: int) -> str:
    """The Message-ID of a delivery, the same on every attempt."""
    return f"<{event.ulid.lower()}.{n}@{event.sender_domain}>"


@dataclass(frozen=True, slots=True)
class Composer:
    """Makes mails for one installation. `links` is None where no link in a mail could work."""

    settings: Settings
    catalogues: Mapping[str, Catalogue]
    links: Links | None

    def can_opt_out(self, event: EventRow, due: Due, people: People) -> bool:
        """Whether the mail must carry a way out (of its first ground)."""
        first = due.grounds[0]
        catalogue = self.catalogues[people.accounts[first.account][2]]
        return may_opt_out(catalogue, event.category, [role for role, _ in first.shape.matched])

    def mail_of(self, event: EventRow, due: Due, people: People, *, now: int) -> Mail:
        """What a delivery says. `now` is the date of a mail that was never tried before, microseconds."""
        first = due.grounds[0]
        contact = people.contacts[first.contact]
        category = next(iter(self.catalogues.values())).vocabulary.categories[event.category]
        sender = self.settings.sender_of(event.class_) or ""
        opt_out = self.links is not None and self.can_opt_out(event, due, people)
        identity = delivery_identity(event.ulid, due.mailbox_key)
        return Mail(
            event=event.ulid,
            type=event.type,
            category=event.category,
            category_title=category.title,
            class_=event.class_,
            data=self._data(event, due, people),
            variant=variant_of(first.shape),
            to_name=contact.name,
            to_address=contact.email,
            locale=contact.locale,
            timezone=contact.timezone,
            grounds=tuple(self._ground(event, ground, people, category.title) for ground in due.grounds),
            vendor_name=sender.partition("<")[0].strip().strip('"') or event.sender_domain,
            sender=sender,
            reply_to=self.settings.reply_to_of(event.class_),
            message_id=message_id(event, due.n),
            date=datetime.fromtimestamp((due.first_flight_at or now) // 1_000_000, UTC),
            list_domain=event.sender_domain,
            unsubscribe_url=self.links.unsubscribe(event.id, due.n, identity) if opt_out and self.links else None,
            status_page_url=self.settings.status_page_url,
            extra=self._extra(event, first, people) if event.category == "approval_request" else {},
        )

    def personal(self, due: Due, delivery: Named, people: People, *, listed: bool) -> list[bytes]:
        """What of a mail differs by recipient, as UTF-8, in the places of `rendering`; `delivery` is that of `due`.

        `listed`: it can be opted out of. The same as stands in `mail_of`: what is filled into a rendition must be what
        a whole rendering says.
        """
        contacts, accounts, links = people.contacts, people.accounts, self.links
        grounds = due.grounds
        first = grounds[0]
        token = label = b""
        if listed and links is not None:
            token = links.token_of(b"u", delivery)
            _, _, label = _said_of(*accounts[first.account][:2])
        values = [shown_name(contacts[first.contact].name).encode(), b"", token, b"%d" % due.n, label]
        preference = b""
        for account, contact, _ in grounds:
            ext, name, _ = accounts[account]
            if links is not None:
                preference = links.tokens_of(b"p", named_contacts(((contact, ext, contacts[contact].id),)))[0]
            word, title, _ = _said_of(ext, name)
            values += (word, title, preference)
        return values

    def columns(
        self, named: Sequence[Named], mails: Sequence[tuple[Due, Contact, str, str]], *, listed: bool
    ) -> list[Sequence[bytes]]:
        """What `personal` says of mails of one ground whose values mails show as they are, a column for each place.

        A mail is given with its contact, its account's id and its account's name; `named` are the same deliveries.
        """
        links, blank = self.links, [b""] * len(mails)
        tokens, words, preferences = blank, [account.encode() for _, _, account, _ in mails], blank
        if links is not None:
            contacts = named_contacts((one.number, account, one.id) for _, one, account, _ in mails)
            preferences = links.tokens_of(b"p", contacts)
            tokens = links.tokens_of(b"u", named) if listed else blank
        names, titles = [one.name.encode() for _, one, _, _ in mails], [title.encode() for _, _, _, title in mails]
        labels = words if listed and links is not None else blank
        return [names, blank, tokens, [b"%d" % due.n for due, _, _, _ in mails], labels, words, titles, preferences]

    def _ground(self, event: EventRow, ground: GroundRow, people: People, category_title: str) -> Ground:
        ext, name, key = people.accounts[ground.account]
        catalogue = self.catalogues[key]
        roles = tuple(role for role, _ in ground.shape.matched)
        identity = contact_identity(ext, people.contacts[ground.contact].id)
        return Ground(
            account=ext,
            account_name=name or ext,
            category=event.category,
            roles=roles,
            role_titles=tuple(catalogue.roles[role].title if role in catalogue.roles else role for role in roles),
            reasons=tuple(reason for _, reason in ground.shape.matched),
            preference_url=self.links.preferences(ground.contact, identity) if self.links else None,
            catalogue=key,
            category_title=category_title,
        )

    def _data(self, event: EventRow, due: Due, people: People) -> Mapping[str, object]:
        """The event's data as this recipient may see it: attachments for somebody else are taken out."""
        attested = event.category != "approval_request" or event.routing.get("attested")
        seen = self.attachments_seen(event, due, people)
        if attested and all(seen):
            return event.data
        data = dict(event.data)
        if seen:
            data["attachments"] = [item for item, is_seen in zip(data["attachments"], seen, strict=True) if is_seen]
        if not attested:
            data["requested_by"] = "staff"
        return data

    def attachments_seen(self, event: EventRow, due: Due, people: People) -> tuple[bool, ...]:
        """Of each of the event's attachments, whether this recipient may see it."""
        given = event.data.get("attachments")
        if not given:
            return ()
        contacts = {people.contacts[ground.contact].id for ground in due.grounds}
        return tuple(not item.get("contact") or item["contact"] in contacts for item in given)

    def _extra(self, event: EventRow, ground: GroundRow, people: People) -> Mapping[str, object]:
        """What a request mail says beyond the event: names, titles, and the list of contacts where that was asked."""
        catalogue = self.catalogues[people.accounts[ground.account][2]]
        titles = {key: role.title for key, role in catalogue.roles.items()}
        members = people.members.get(ground.account, ())
        names = {member.id: member.name or member.id for member in members}
        action = str(event.data.get("action", ""))
        known = catalogue.vocabulary.actions.get(action)
        extra: dict[str, Any] = {
            "action_title": known.title if known else action,
            "role_titles": titles,
            "contact_names": names,
            "requester": names.get(str(event.data.get("requested_by")), ""),
        }
        if action == "contact_list":
            extra["contacts"] = [
                {
                    "name": member.name,
                    "email": member.email,
                    "roles": [titles.get(role, role) for role in member.roles],
                }
                for member in members
                if not member.removed
            ]
        return extra
