"""The read side of the directory: accounts, contacts, opt-outs and suppressions, as the resolver and people see them.

It promises pages, never single rows in a loop: `facts` reads a page of accounts with everything that the resolver
looks at in five statements, however many contacts the page has. It also makes the installation row of an empty
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
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

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
    table,
    text,
    union_all,
)

from subscriptions.audience import AccountFacts, ContactFacts
from subscriptions.catalogue import Catalogue
from subscriptions.schema import account_products, accounts, contacts, installation, mailboxes, opt_outs, suppressions

_Row = Any  # a row of a query; its columns stand beside it

PAGE = 500
#: Accounts read at a time: some 2,500 contacts, tens of milliseconds and about 2 MB.

_event_accounts = table("event_accounts", column("event_id"), column("account_id"))
#: The ledger's list of accounts of a broadcast; the table itself is worker.schema's.


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
    query = _page(connection, after=after, limit=limit, only=only, scope_event=scope_event)
    page = connection.execute(query).all()
    if not page:
        return []
    numbers = [number for number, *_ in page]
    uses = _uses(connection, numbers)
    people = _people(connection, numbers)
    holds = _what_holds(connection, {person.mailbox_id for person in people}, _promotional(catalogues))
    contacts_by_account = _contact_facts(people, holds.opt_outs)
    return [_account_facts(row, uses.get(row.id, ()), contacts_by_account.get(row.id, ()), holds) for row in page]


def account(connection: Connection, catalogues: Mapping[str, Catalogue], ext: str) -> AccountFacts | None:
    """The facts of the account with that id, or None where there is none (or it was removed)."""
    found = facts(connection, catalogues, only=[ext])
    return found[0] if found else None


def _page(
    connection: Connection, *, after: int, limit: int, only: Sequence[str] | None, scope_event: int | None
) -> Select[Any]:
    query = select(accounts.c.id, accounts.c.ext, accounts.c.catalogue)
    if scope_event is not None:
        query = query.join(_event_accounts, _event_accounts.c.account_id == accounts.c.id)
        query = query.where(_event_accounts.c.event_id == scope_event)
    if only is not None:
        query = query.where(among(connection, accounts.c.ext, only))
    return query.where(accounts.c.id > after, accounts.c.removed_at.is_(None)).order_by(accounts.c.id).limit(limit)


def _uses(connection: Connection, numbers: Iterable[int]) -> dict[int, list[str]]:
    """The products in use, by account number."""
    query = select(account_products.c.account_id, account_products.c.product).where(
        among(connection, account_products.c.account_id, numbers)
    )
    uses = defaultdict[int, list[str]](list)
    for number, product in connection.execute(query).all():
        uses[number].append(product)
    return uses


def _people(connection: Connection, numbers: Iterable[int]) -> Sequence[_Row]:
    """The contacts of accounts, by account and in order of assignment; those whose address is erased are left out."""
    query = (
        select(
            contacts.c.account_id,
            contacts.c.id,
            contacts.c.ext,
            contacts.c.mailbox_id,
            mailboxes.c.address,
            contacts.c.roles,
            contacts.c.kind,
            contacts.c.products,
            contacts.c.unreachable,
        )
        .join(mailboxes, mailboxes.c.id == contacts.c.mailbox_id)
        .where(among(connection, contacts.c.account_id, numbers))
        .where(contacts.c.removed_at.is_(None), mailboxes.c.address.is_not(None))
        .order_by(contacts.c.account_id, contacts.c.position, contacts.c.id)
    )
    return connection.execute(query).all()


@dataclass(slots=True)
class _Holds:
    """What holds for some mailboxes and their contacts."""

    opt_outs: dict[int, set[tuple[str, str]]]  # (role, category) by contact
    promotional: dict[int, set[str]]  # categories opted out of, by mailbox
    complained: set[int]  # mailboxes
    suppressed: set[int]
    any: set[int]  # mailboxes of one of the three


def _contact_facts(people: Sequence[_Row], own: Mapping[int, set[tuple[str, str]]]) -> dict[int, list[ContactFacts]]:
    """The facts of contacts, by account number."""
    nothing: frozenset[tuple[str, str]] = frozenset()
    found = defaultdict[int, list[ContactFacts]](list)
    for account_number, number, ext, mailbox, address, roles, kind, products, unreachable in people:
        found[account_number].append(
            ContactFacts(
                ext,
                address,
                listed(roles),
                kind,
                None if products is None else frozenset(listed(products)),
                frozenset(own[number]) if number in own else nothing,
                bool(unreachable),
                number,
                mailbox,
            )
        )
    return found


def _account_facts(row: _Row, uses: Iterable[str], people: Sequence[ContactFacts], holds: _Holds) -> AccountFacts:
    concerned = [one for one in people if one.mailbox in holds.any]
    return AccountFacts(
        id=row.ext,
        catalogue=row.catalogue,
        uses=frozenset(uses),
        contacts=tuple(people),
        suppressed=frozenset([one.email for one in concerned if one.mailbox in holds.suppressed]),
        opted_out=frozenset(
            [(one.email, category) for one in concerned for category in holds.promotional.get(one.mailbox, ())]
        ),
        complained=frozenset([one.email for one in concerned if one.mailbox in holds.complained]),
        number=row.id,
    )


def _promotional(catalogues: Mapping[str, Catalogue]) -> frozenset[str]:
    return frozenset(
        category.key
        for catalogue in catalogues.values()
        for category in catalogue.vocabulary.categories.values()
        if category.class_ == "promotional"
    )


def _what_holds(connection: Connection, held: set[int], promotional: frozenset[str]) -> _Holds:
    """Opt-outs, complaints and suppressions that concern those mailboxes.

    An opt-out counts for the mailbox of its contact now, and for the one that it was set under.
    """
    taken = (opt_outs.c.contact_id, opt_outs.c.role, opt_outs.c.category, opt_outs.c.set_by)
    by_contact = (
        select(contacts.c.mailbox_id, *taken)
        .join(opt_outs, opt_outs.c.contact_id == contacts.c.id)
        .where(among(connection, contacts.c.mailbox_id, held))
    )
    by_mailbox = select(opt_outs.c.mailbox_id, *taken).where(among(connection, opt_outs.c.mailbox_id, held))
    holds = _Holds(defaultdict(set), defaultdict(set), set(), set(), set())
    wishes = connection.execute(union_all(by_contact, by_mailbox)).all()
    for mailbox, contact, role, category, set_by in wishes:
        holds.opt_outs[contact].add((role, category))
        if category in promotional:
            holds.promotional[mailbox].add(category)
        if set_by == "complaint":
            holds.complained.add(mailbox)
    standing = select(suppressions.c.mailbox_id, suppressions.c.cause).where(
        among(connection, suppressions.c.mailbox_id, held), suppressions.c.lifted_at.is_(None)
    )
    for mailbox, cause in connection.execute(standing).all():
        (holds.complained if cause == "complaint" else holds.suppressed).add(mailbox)
    holds.any = holds.complained | holds.suppressed | holds.promotional.keys()
    return holds


# ---------------------------------------------------------------- what people see


def list_accounts(
    connection: Connection, *, after: int = 0, limit: int = PAGE, only: Sequence[str] | None = None
) -> list[AccountRow]:
    """One page of accounts in the order of their numbers; `after` and `only` as for `facts`."""
    page = connection.execute(
        _page(connection, after=after, limit=limit, only=only, scope_event=None).add_columns(accounts.c.name)
    ).all()
    numbers = [row.id for row in page]
    uses = _uses(connection, numbers)
    counts = (
        select(contacts.c.account_id, func.count())
        .where(among(connection, contacts.c.account_id, numbers), contacts.c.removed_at.is_(None))
        .group_by(contacts.c.account_id)
    )
    sizes: dict[int, int] = dict(connection.execute(counts).all())
    return [
        AccountRow(row.id, row.ext, row.name, row.catalogue, tuple(sorted(uses.get(row.id, ()))), sizes.get(row.id, 0))
        for row in page
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


def among(
    connection: Connection, where: ColumnElement[Any], values: Iterable[int] | Iterable[str]
) -> ColumnElement[bool]:
    """The condition that a column is one of many values: one bound value and one statement text for any number."""
    wanted = list(values)
    if connection.dialect.name == "postgresql":
        kind = ARRAY(Text if isinstance(where.type, Text) else BigInteger)
        return where == any_(literal(wanted, kind))
    return where.in_(select(column("value")).select_from(func.json_each(json.dumps(wanted))))
