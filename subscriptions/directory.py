"""The read side of the directory: accounts, contacts, opt-outs and suppressions, as the resolver and people see them.

It promises pages, never single rows in a loop: `facts` reads a page of accounts with everything that the resolver
looks at in three statements, however many contacts the page has. It also makes the installation row of an empty
database. It writes nothing else: `subscriptions.changes` is the only writer.

What holds for an address holds in the whole installation:

- a hard bounce, an operator's suppression or an erasure makes it `suppressed` (XC-06);
- a complaint ends promotional and informational mail to it (`complained`) and leaves it reachable;
- an opt-out from a promotional category counts for the mailbox that it was set under and for the mailbox that its
  contact has now, whichever record, role or account it was recorded under (S-22, principle 9 of the design).
"""

from __future__ import annotations

import json
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, repeat
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Select,
    Text,
    any_,
    column,
    func,
    literal,
    select,
    text,
)

from subscriptions.audience import AccountFacts, ContactFacts
from subscriptions.bulk import by_id, read_columns, read_rows
from subscriptions.catalogue import Catalogue
from subscriptions.schema import accounts, contacts, installation, mailboxes, suppressions

_Row = Any  # a row of a query; its columns stand beside it

PAGE = 500
#: Accounts read at a time: some 2,500 contacts, tens of milliseconds and about 2 MB.


@dataclass(frozen=True, slots=True)
class AccountRow:
    """An account as people see it."""

    number: int
    id: str
    name: str
    catalogue: str
    uses: tuple[str, ...]  # sorted
    contacts: int  # how many it has now


@dataclass(frozen=True, slots=True)
class ContactRow:
    """A contact as people and mails see it."""

    number: int
    account: int  # the account's number
    id: str
    name: str
    email: str  # as written: mail goes there
    address: str  # normalised; empty once erased
    mailbox: int
    kind: str
    roles: tuple[str, ...]  # sorted
    products: tuple[str, ...] | None  # sorted; None = all
    locale: str
    timezone: str
    unreachable: bool
    removed: bool


@dataclass(frozen=True, slots=True)
class SuppressionRow:
    """An address that gets less mail or none, and why."""

    address: str  # normalised; empty once erased
    mailbox: int
    cause: str  # hard_bounce | complaint | operator | erased
    source: str  # who or what said so, such as `import:acme`, `operator:anna`, `delivery:ULID/7`
    at: int
    evidence: str
    lifted_at: int | None
    lifted_by: str | None


# ---------------------------------------------------------------- the installation


def install(connection: Connection, *, now: int) -> None:
    """Give an empty database its installation row with a new address key; does nothing where there is one."""
    if connection.execute(select(installation.c.one)).first() is None:
        connection.execute(
            text(
                "INSERT INTO installation (one, address_key, guard, oldest_code) VALUES (1, :key, 0, 1)"
                " ON CONFLICT DO NOTHING"
            ),
            {"key": secrets.token_bytes(32)},
        )


def address_key(connection: Connection) -> bytes:
    """The 32-byte key under which addresses are hashed; made once for each installation and never changed."""
    return bytes(connection.execute(select(installation.c.address_key)).scalar_one())


def mailbox_key(key: bytes, address: str) -> bytes:
    """The 16 bytes that stand for a normalised address: a keyed hash, so that an erased one is known again."""
    return blake2b(address.encode(), digest_size=16, key=key).digest()


# ---------------------------------------------------------------- what the resolver looks at


def facts(
    connection: Connection,
    catalogues: Mapping[str, Catalogue],
    *,
    after: int = 0,
    limit: int = PAGE,
    only: Sequence[str] | None = None,
    scope_event: int | None = None,
) -> list[AccountFacts]:
    """One page of accounts in the order of their numbers, removed ones left out.

    `after` is the number of the last account of the page before, 0 for the first page; the page is the last one where
    it is empty. `only` narrows it to account ids, `scope_event` to the accounts that an event names.
    """
    numbers, exts, catalogue_keys, uses = _page(
        connection, _ACCOUNT, after=after, limit=limit, only=only, scope_event=scope_event
    )
    if not numbers:
        return []
    people = read_columns(connection, _PERSON, _people(connection), accounts=list(numbers))
    holds = _what_holds(connection, sorted({*people[_PERSON.index("c.mailbox_id")]}), _promotional(catalogues))
    contacts_by_account = _contact_facts(people, holds.opt_outs)
    found = [
        AccountFacts(ext, catalogue, _set_of(used), tuple(contacts_by_account.get(number, ())), number=number)
        for number, ext, catalogue, used in zip(numbers, exts, catalogue_keys, uses, strict=True)
    ]
    if holds.any:
        for one in found:
            _add_what_holds(one, holds)
    return found


def account(connection: Connection, catalogues: Mapping[str, Catalogue], ext: str) -> AccountFacts | None:
    """The facts of the account with that id, or None where there is none (or it was removed)."""
    found = facts(connection, catalogues, only=[ext])
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Known:
    """An account with what a mail to its contacts says beside its facts."""

    facts: AccountFacts
    name: str
    people: Mapping[int, tuple[str, str, str, str, str]]
    """By number of the contact: name, email as written, locale, time zone, mailbox key (hexadecimal)."""


def known(connection: Connection, catalogues: Mapping[str, Catalogue], ext: str) -> Known | None:
    """The same as `account` with the names of its contacts, in one statement; in two where something holds for them."""
    rows = read_rows(connection, *_one_account(connection.dialect.name), ext=ext)
    if not rows:
        return None
    number, catalogue, name, uses = rows[0][-len(_OF_ACCOUNT) :]
    there = [row for row in rows if row[_PERSON.index("m.address")] is not None]
    people = list(zip(*there, strict=True))[: len(_PERSON)] if there else [()] * len(_PERSON)
    held = sorted({row[_PERSON.index("c.mailbox_id")] for row in there if row[_HELD_AT]})
    holds = _what_holds(connection, held, _promotional(catalogues) if held else frozenset())
    contacts_of_it = _contact_facts(people, holds.opt_outs).get(number, ())
    found = AccountFacts(ext, catalogue, _set_of(uses), tuple(contacts_of_it), number=number)
    if holds.any:
        _add_what_holds(found, holds)
    place, first = _PERSON.index("c.id"), len(_PERSON)
    return Known(found, name, {row[place]: tuple(row[first:_HELD_AT]) for row in there})


_OF_ACCOUNT: Final = ("a.id", "a.catalogue", "a.name", "a.uses")


@lru_cache(maxsize=2)
def _one_account(dialect: str) -> tuple[tuple[str, ...], str]:
    """The columns of an account `:ext` and its contacts, and where they are found."""
    postgresql = dialect == "postgresql"
    aggregate, key = ("string_agg", "encode(m.address_key, 'hex')") if postgresql else ("group_concat", _HEX_KEY)
    rest = (
        f"FROM (SELECT a.id, a.catalogue, a.name,"  # noqa: S608 - put together from our own words
        f" (SELECT {aggregate}(p.product, ',') FROM account_products p WHERE p.account_id = a.id) AS uses"
        f" FROM accounts a WHERE a.ext = :ext AND a.removed_at IS NULL) a"
        f" LEFT JOIN contacts c ON c.account_id = a.id AND c.removed_at IS NULL"
        f" LEFT JOIN mailboxes m ON m.id = c.mailbox_id"
    )
    return (*_PERSON, "c.name", "c.email", "c.locale", "c.timezone", key, _IS_HELD, *_OF_ACCOUNT), rest


_HEX_KEY: Final = "hex(m.address_key)"
_IS_HELD: Final = (
    "(EXISTS (SELECT 1 FROM suppressions s WHERE s.mailbox_id = m.id AND s.lifted_at IS NULL)"
    " OR EXISTS (SELECT 1 FROM opt_outs o WHERE o.mailbox_id = m.id)"
    " OR EXISTS (SELECT 1 FROM contacts x JOIN opt_outs o ON o.contact_id = x.id WHERE x.mailbox_id = m.id))"
)
#: Whether `_HOLDING` would find anything for a mailbox: it seldom does.

_ACCOUNT: Final = ("id", "ext", "catalogue", "uses")


def _page(
    connection: Connection,
    columns: tuple[str, ...],
    *,
    after: int,
    limit: int,
    only: Sequence[str] | None,
    scope_event: int | None,
) -> list[Sequence[Any]]:
    """Columns of the accounts of a page; `uses` is the products in use, a comma between two."""
    values: dict[str, Any] = {"after": after, "limit": limit}
    source, number, narrowed = "accounts a", "a.id", ""
    if only is not None:
        narrowed = " AND a.ext AMONG :only"
        values["only"] = list(only)
    if scope_event is not None:  # the accounts of a broadcast to a list, in the order of its index: worker.schema's
        source, number = "event_accounts e JOIN accounts a ON a.id = e.account_id", "e.account_id"
        narrowed += " AND e.event_id = :event"
        values["event"] = scope_event
    aggregate = "string_agg" if connection.dialect.name == "postgresql" else "group_concat"
    rest = (
        "FROM (SELECT a.id, a.ext, a.catalogue, a.name,"  # noqa: S608 - put together from our own words
        f" (SELECT {aggregate}(p.product, ',') FROM account_products p WHERE p.account_id = a.id) AS uses"
        f" FROM {source} WHERE {number} > :after AND a.removed_at IS NULL{narrowed}"
        f" ORDER BY {number} LIMIT :limit) page"
    )
    return read_columns(connection, columns, rest, **values)


_PERSON: Final = (
    "c.account_id", "c.position", "c.id", "c.ext", "c.mailbox_id", "m.address", "c.roles", "c.kind", "c.products",
    "c.unreachable",
)  # fmt: skip
_HELD_AT: Final = len(_PERSON) + 5


def _people(connection: Connection) -> str:
    """The contacts of `:accounts` in any order; those whose address is erased are left out."""
    mailbox = by_id(connection, "mailboxes", "m", "c.mailbox_id")
    whose = "c.account_id AMONG :accounts AND c.removed_at IS NULL AND m.address IS NOT NULL"
    return f"FROM contacts c {mailbox} WHERE {whose}"


@dataclass(slots=True)
class _Holds:
    """What holds for some mailboxes and their contacts."""

    opt_outs: dict[int, set[tuple[str, str]]]  # (role, category) by contact
    promotional: dict[int, set[str]]  # categories opted out of, by mailbox
    complained: set[int]  # mailboxes
    suppressed: set[int]
    any: set[int]  # mailboxes of one of the three


def _contact_facts(
    people: Sequence[Sequence[Any]], own: Mapping[int, set[tuple[str, str]]]
) -> dict[int, list[ContactFacts]]:
    """The facts of contacts, by account number; made column by column, since a broadcast makes a million of them."""
    account_numbers, positions, numbers, exts, boxes, addresses, roles, kinds, products, unreachable = people
    nothing: frozenset[tuple[str, str]] = frozenset()
    wishes = [frozenset(own.get(number, nothing)) for number in numbers] if own else repeat(nothing)
    preferences = [None if some is None else _set_of(some) for some in products]
    made = map(
        ContactFacts,
        exts, addresses, map(listed, roles), kinds, preferences, wishes, map(bool, unreachable), numbers, boxes,
    )  # fmt: skip
    found = defaultdict[int, list[ContactFacts]](list)
    # In order of assignment; sorted here, since SQLite takes twice as long for it.
    for account_number, _, _, one in sorted(zip(account_numbers, positions, numbers, made, strict=True)):
        found[account_number].append(one)
    return found


def _add_what_holds(account: AccountFacts, holds: _Holds) -> None:
    """Put what holds for the addresses of an account into its facts, which nobody has seen yet."""
    concerned = [one for one in account.contacts if one.mailbox in holds.any]
    if not concerned:
        return
    account.suppressed = frozenset([one.email for one in concerned if one.mailbox in holds.suppressed])
    account.opted_out = frozenset(
        [(one.email, category) for one in concerned for category in holds.promotional.get(one.mailbox, ())]
    )
    account.complained = frozenset([one.email for one in concerned if one.mailbox in holds.complained])


def _promotional(catalogues: Mapping[str, Catalogue]) -> frozenset[str]:
    return frozenset(
        category.key
        for catalogue in catalogues.values()
        for category in catalogue.vocabulary.categories.values()
        if category.class_ == "promotional"
    )


_HOLDING: Final = (
    "FROM (SELECT c.mailbox_id AS mailbox, o.contact_id AS contact, o.role AS role, o.category AS category,"
    " o.set_by AS said FROM contacts c JOIN opt_outs o ON o.contact_id = c.id WHERE c.mailbox_id AMONG :held"
    " UNION ALL SELECT o.mailbox_id, o.contact_id, o.role, o.category, o.set_by FROM opt_outs o"
    " WHERE o.mailbox_id AMONG :held"
    " UNION ALL SELECT s.mailbox_id, NULL, NULL, NULL, s.cause FROM suppressions s"
    " WHERE s.mailbox_id AMONG :held AND s.lifted_at IS NULL) held"
)
#: Opt-outs of the contacts that have a mailbox now, and of those who had it when they opted out; suppressions.


def _what_holds(connection: Connection, held: list[int], promotional: frozenset[str]) -> _Holds:
    """Opt-outs, complaints and suppressions that concern those mailboxes.

    An opt-out counts for the mailbox of its contact now, and for the one that it was set under.
    """
    holds = _Holds(defaultdict(set), defaultdict(set), set(), set(), set())
    if not held:
        return holds
    columns = ("mailbox", "contact", "role", "category", "said")
    rows = read_columns(connection, columns, _HOLDING, held=held)
    for mailbox, contact, role, category, said in zip(*rows, strict=True):
        if contact is None:
            (holds.complained if said == "complaint" else holds.suppressed).add(mailbox)
            continue
        holds.opt_outs[contact].add((role, category))
        if category in promotional:
            holds.promotional[mailbox].add(category)
        if said == "complaint":
            holds.complained.add(mailbox)
    holds.any = holds.complained | holds.suppressed | holds.promotional.keys()
    return holds


# ---------------------------------------------------------------- a page as columns, for broadcasts

Constellation = tuple[str, str | None, tuple[str, ...], tuple[int, ...], tuple["_Apart", ...]]
"""All that the rules look at in an account, for one category: catalogue, uses, and of its contacts in order of
assignment their traits, whether they are unreachable, and what sets them apart (empty where nothing does)."""

_Apart = tuple[int, frozenset[tuple[str, str]], bool, bool, bool]
"""Of a contact: the first one with the same mailbox, its own opt-outs, whether its address is suppressed, complained,
and opted out."""

_UNREACHABLE, _HELD, _SHARED = 1, 2, 4
#: Marks of a contact, added up.


@dataclass(slots=True)
class Page:
    """A page of accounts and their contacts by columns: a broadcast makes no object for each of a million contacts.

    The contacts of account number i are at `ends[i - 1]` up to `ends[i]` in the next four, in order of assignment.
    """

    accounts: Sequence[int]  # numbers, in order
    catalogues: Sequence[str]
    uses: Sequence[str | None]
    ends: Sequence[int]
    contacts: Sequence[int]  # numbers
    mailboxes: Sequence[int]
    traits: Sequence[str]  # kind, roles and, where they play a part, product preferences
    marks: Sequence[int]
    holds: _Holds  # of mailboxes with a mark

    @property
    def shared(self) -> set[int]:
        """The mailboxes that more than one contact has, or had when it was removed, in one account or several."""
        return {box for box, mark in zip(self.mailboxes, self.marks, strict=True) if mark & _SHARED}

    def constellations(self, category: str) -> list[Constellation]:
        """For each account what the rules look at in it: those with the same one get the same verdicts (`stand_in`)."""
        found: list[Constellation] = []
        traits, marks, start = self.traits, self.marks, 0
        for catalogue, uses, end in zip(self.catalogues, self.uses, self.ends, strict=True):
            apart: tuple[_Apart, ...] = ()
            own = tuple(marks[start:end])
            if own and max(own) > _UNREACHABLE:
                own = tuple([mark & _UNREACHABLE for mark in own])
                apart = self._apart(start, end, category)
            found.append((catalogue, uses, tuple(traits[start:end]), own, apart))
            start = end
        return found

    def _apart(self, start: int, end: int, category: str) -> tuple[_Apart, ...]:
        numbers, boxes, holds = self.contacts[start:end], self.mailboxes[start:end], self.holds
        if len(set(boxes)) == len(boxes) and holds.any.isdisjoint(boxes) and holds.opt_outs.keys().isdisjoint(numbers):
            return ()
        return tuple([
            (
                boxes.index(box),
                frozenset([one for one in holds.opt_outs.get(number, ()) if one[1] == category]),
                box in holds.suppressed,
                box in holds.complained,
                category in holds.promotional.get(box, ()),
            )
            for number, box in zip(numbers, boxes, strict=True)
        ])  # fmt: skip


def stand_in(constellation: Constellation, category: str, *, number: int) -> AccountFacts:
    """An account of that constellation, for an event of that category that is no request.

    Its contacts have their places in it as numbers, mailboxes, ids and addresses: of these the rules look only at which
    are the same.
    """
    catalogue, uses, traits, marks, apart = constellation
    nothing: frozenset[tuple[str, str]] = frozenset()
    made = []
    for place, (trait, unreachable) in enumerate(zip(traits, marks, strict=True)):
        kind, roles, *products = trait.split(";", 2)
        box, opt_outs = apart[place][:2] if apart else (place, nothing)
        preferences = _set_of(products[0]) if products else None
        made.append(
            ContactFacts(
                str(place), str(box), listed(roles), kind, preferences, opt_outs, bool(unreachable), place, box
            )
        )
    account = AccountFacts(str(number), catalogue, _set_of(uses), tuple(made), number=number)
    if apart:
        account.suppressed = frozenset([str(box) for box, _, suppressed, _, _ in apart if suppressed])
        account.complained = frozenset([str(box) for box, _, _, complained, _ in apart if complained])
        account.opted_out = frozenset([(str(box), category) for box, *_, opted_out in apart if opted_out])
    return account


_TRAITS: Final = {
    False: "c.kind || ';' || c.roles",
    True: "c.kind || ';' || c.roles || coalesce(';' || c.products, '')",
}
_MARKS: Final = (
    f"CASE WHEN c.unreachable THEN {_UNREACHABLE} ELSE 0 END"  # noqa: S608 - put together from our own words
    " + CASE WHEN EXISTS (SELECT 1 FROM opt_outs o WHERE o.contact_id = c.id)"
    " OR EXISTS (SELECT 1 FROM opt_outs o WHERE o.mailbox_id = c.mailbox_id)"
    f" OR EXISTS (SELECT 1 FROM suppressions s WHERE s.mailbox_id = c.mailbox_id) THEN {_HELD} ELSE 0 END"
    " + CASE WHEN EXISTS (SELECT 1 FROM contacts o WHERE o.mailbox_id = c.mailbox_id AND o.id <> c.id)"
    f" THEN {_SHARED} ELSE 0 END"
)


def read_page(
    connection: Connection,
    catalogues: Mapping[str, Catalogue],
    *,
    after: int = 0,
    limit: int = PAGE,
    only: Sequence[str] | None = None,
    scope_event: int | None = None,
    products: bool = True,
) -> Page:
    """The same page that `facts` gives, as columns; without `products` product preferences are left out."""
    numbers, _, keys, uses = _page(connection, _ACCOUNT, after=after, limit=limit, only=only, scope_event=scope_event)
    if not numbers:
        return Page((), (), (), (), (), (), (), (), _what_holds(connection, [], frozenset()))
    columns = ("c.account_id", "c.position", "c.id", "c.mailbox_id", _TRAITS[products], _MARKS)
    people = read_columns(connection, columns, _people(connection), accounts=list(numbers))
    if people[0]:
        people = list(zip(*sorted(zip(*people, strict=True)), strict=True))
    owners, _, contact_numbers, boxes, traits, marks = people
    counts = Counter(owners)
    ends = list(accumulate([counts[number] for number in numbers]))
    marked = sorted({box for box, mark in zip(boxes, marks, strict=True) if mark > _UNREACHABLE})
    holds = _what_holds(connection, marked, _promotional(catalogues))
    return Page(numbers, keys, uses, ends, contact_numbers, boxes, traits, marks, holds)


def addresses(connection: Connection, boxes: Iterable[int]) -> dict[int, str]:
    """The normalised addresses of mailboxes by number; those that were erased are left out."""
    rest = "FROM mailboxes WHERE id AMONG :boxes AND address IS NOT NULL"
    return dict(zip(*read_columns(connection, ("id", "address"), rest, boxes=list(boxes)), strict=True))


# ---------------------------------------------------------------- what people see


def list_accounts(
    connection: Connection, *, after: int = 0, limit: int = PAGE, only: Sequence[str] | None = None
) -> list[AccountRow]:
    """One page of accounts in the order of their numbers; `after` and `only` as for `facts`."""
    columns = (*_ACCOUNT, "name")
    page = _page(connection, columns, after=after, limit=limit, only=only, scope_event=None)
    numbers = page[0]
    counts = (
        select(contacts.c.account_id, func.count())
        .where(among(connection, contacts.c.account_id, numbers), contacts.c.removed_at.is_(None))
        .group_by(contacts.c.account_id)
    )
    sizes: dict[int, int] = dict(connection.execute(counts).all())
    return [
        AccountRow(number, ext, name, catalogue, tuple(sorted(_set_of(uses))), sizes.get(number, 0))
        for number, ext, catalogue, uses, name in zip(*page, strict=True)
    ]


def account_row(connection: Connection, ext: str) -> AccountRow | None:
    """The account with that id for showing, or None where there is none (or it was removed)."""
    found = list_accounts(connection, only=[ext])
    return found[0] if found else None


def account_names(connection: Connection, numbers: Iterable[int]) -> dict[int, tuple[str, str]]:
    """Id and name of accounts by their numbers, removed ones included."""
    query = select(accounts.c.id, accounts.c.ext, accounts.c.name).where(among(connection, accounts.c.id, numbers))
    return {number: (ext, name) for number, ext, name in connection.execute(query).all()}


def existing(connection: Connection, exts: Iterable[str]) -> set[str]:
    """Those of the account ids that name an account, removed ones left out."""
    query = select(accounts.c.ext).where(among(connection, accounts.c.ext, exts), accounts.c.removed_at.is_(None))
    return set(connection.execute(query).scalars())


def contacts_of(connection: Connection, account_numbers: Iterable[int]) -> dict[int, list[ContactRow]]:
    """The contacts of accounts in order of assignment, by account number; removed ones left out."""
    query = _contact_rows().where(
        among(connection, contacts.c.account_id, account_numbers), contacts.c.removed_at.is_(None)
    )
    found = defaultdict[int, list[ContactRow]](list)
    in_order = query.order_by(contacts.c.account_id, contacts.c.position, contacts.c.id)
    for row in connection.execute(in_order).all():
        found[row.account_id].append(_contact_row(row))
    return found


def contact_rows(connection: Connection, numbers: Iterable[int]) -> dict[int, ContactRow]:
    """Contacts by their numbers, removed ones included and marked."""
    query = _contact_rows().where(among(connection, contacts.c.id, numbers))
    return {row.id: _contact_row(row) for row in connection.execute(query)}


def suppressions_of(
    connection: Connection, mailbox_numbers: Iterable[int] | None = None, *, lifted: bool = False
) -> list[SuppressionRow]:
    """The suppressions of mailboxes, or of all, oldest first; lifted ones only with `lifted`."""
    query = select(
        mailboxes.c.address,
        suppressions.c.mailbox_id,
        suppressions.c.cause,
        suppressions.c.source,
        suppressions.c.at,
        suppressions.c.evidence,
        suppressions.c.lifted_at,
        suppressions.c.lifted_by,
    ).join(mailboxes, mailboxes.c.id == suppressions.c.mailbox_id)
    if mailbox_numbers is not None:
        query = query.where(among(connection, suppressions.c.mailbox_id, mailbox_numbers))
    if not lifted:
        query = query.where(suppressions.c.lifted_at.is_(None))
    order = (suppressions.c.at, suppressions.c.mailbox_id, suppressions.c.cause, suppressions.c.source)
    return [
        SuppressionRow(address or "", *others) for address, *others in connection.execute(query.order_by(*order)).all()
    ]


def mailbox_number(connection: Connection, address: str) -> int | None:
    """The number of the mailbox with that normalised address, an erased one included; None where there is none."""
    wanted = mailbox_key(address_key(connection), address)
    return connection.execute(select(mailboxes.c.id).where(mailboxes.c.address_key == wanted)).scalar()


def _contact_rows() -> Select[Any]:
    return select(contacts, mailboxes.c.address).join(mailboxes, mailboxes.c.id == contacts.c.mailbox_id)


def _contact_row(row: _Row) -> ContactRow:
    return ContactRow(
        number=row.id,
        account=row.account_id,
        id=row.ext,
        name=row.name,
        email=row.email,
        address=row.address or "",
        mailbox=row.mailbox_id,
        kind=row.kind,
        roles=listed(row.roles),
        products=None if row.products is None else listed(row.products),
        locale=row.locale,
        timezone=row.timezone,
        unreachable=bool(row.unreachable),
        removed=row.removed_at is not None,
    )


# ---------------------------------------------------------------- helpers shared with the writer


@lru_cache(maxsize=4096)
def listed(stored: str) -> tuple[str, ...]:
    """A stored list (`a,b,c`) as a tuple."""
    return tuple(stored.split(",")) if stored else ()


@lru_cache(maxsize=4096)
def _set_of(stored: str | None) -> frozenset[str]:
    """The same as a set."""
    return frozenset(listed(stored or ""))


def among(
    connection: Connection, where: ColumnElement[Any], values: Iterable[int] | Iterable[str]
) -> ColumnElement[bool]:
    """The condition that a column is one of many values: one bound value and one statement text for any number."""
    wanted = list(values)
    if connection.dialect.name == "postgresql":
        kind = ARRAY(Text if isinstance(where.type, Text) else BigInteger)
        return where == any_(literal(wanted, kind))
    return where.in_(select(column("value")).select_from(func.json_each(json.dumps(wanted))))
