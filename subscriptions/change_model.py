"""The part of the directory that a batch of changes touches: loaded in sets, then changed in memory.

`load` reads what the changes name, one statement a table whatever their number. An account remembers how it was loaded,
so that `change_comparison` can tell what differs. An address that has no row yet stands for itself where others have a
mailbox number. It reads accounts, account_products, contacts, opt_outs, mailboxes and suppressions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, or_, select

from subscriptions.addresses import normalise
from subscriptions.catalogue import Catalogue
from subscriptions.change_kinds import (
    Actor,
    Change,
    LiftSuppression,
    PutAccount,
    PutContact,
    RemoveAccount,
    RemoveContact,
    SetOptOut,
    Suppress,
)
from subscriptions.difference import Tally
from subscriptions.directory import among, mailbox_key
from subscriptions.documents import Absent, Fault, given
from subscriptions.schema import account_products, accounts, contacts, mailboxes, opt_outs, suppressions


class Contact(NamedTuple):
    """A contact as its row; `mailbox` is the number, or the address where that has no row yet."""

    number: int  # 0 = new
    ext: str
    position: int
    name: str
    email: str
    kind: str
    roles: str
    products: str | None
    locale: str
    timezone: str
    unreachable: bool
    mailbox: int | str
    removed: bool


class OptOut(NamedTuple):
    """What is kept of an opt-out beside its key."""

    mailbox: int | str
    source: str
    at: int


class Suppression(NamedTuple):
    """What is kept of a suppression beside its key; it stands while `lifted_at` is None."""

    at: int
    evidence: str
    lifted_at: int | None
    lifted_by: str | None


OptOutKey = tuple[str, str, str, str]  # contact id, role, category, set by
SuppressionKey = tuple[int | str, str, str]  # mailbox, cause, source


@dataclass(slots=True)
class Account:
    """An account and all that hangs on it; `was` is how it was loaded, None for a new one."""

    number: int  # 0 = new
    ext: str
    name: str
    catalogue: str
    uses: frozenset[str]
    removed: bool
    contacts: dict[str, Contact]
    opt_outs: dict[OptOutKey, OptOut]
    was: Account | None = None

    def loaded(self) -> Account:
        """Remember how it is now as how it was."""
        self.was = replace(self, contacts=dict(self.contacts), opt_outs=dict(self.opt_outs))
        return self

    def live(self) -> list[Contact]:
        """The contacts that are not removed, in order of assignment."""
        return sorted((one for one in self.contacts.values() if not one.removed), key=attrgetter("position"))


@dataclass(slots=True)
class Model:
    """The part of the directory that a batch touches, first as it is and then as the batch makes it."""

    actor: Actor
    catalogues: Mapping[str, Catalogue]
    now: int
    accounts: dict[str, Account] = field(default_factory=dict)
    keys: dict[str, bytes] = field(default_factory=dict)  # mailbox keys of the addresses that changes name
    mailboxes: dict[str, int] = field(default_factory=dict)  # numbers of addresses that have a row
    addresses: dict[int, str] = field(default_factory=dict)  # the other way round
    erased: set[int] = field(default_factory=set)  # rows whose address was erased and is named again
    suppressions: dict[int | str, dict[tuple[str, str], Suppression]] = field(default_factory=dict)  # cause, source
    sources: dict[str, set[int]] = field(default_factory=dict)  # mailboxes by the source of a suppression
    suppressions_were: dict[SuppressionKey, Suppression] = field(default_factory=dict)
    located: dict[int, tuple[str, str]] = field(default_factory=dict)  # contact number -> account and contact id
    faults: list[Fault] = field(default_factory=list)
    unknown: list[Fault] = field(default_factory=list)
    opt_outs_kept: Tally = field(default_factory=Tally)
    suppressions_kept: Tally = field(default_factory=Tally)
    named: set[str] = field(default_factory=set)  # accounts that a change adds, fills or prunes of contacts
    role_faults: dict[tuple[str, str, str], str | None] = field(default_factory=dict)  # by catalogue, roles, kind

    def mailbox(self, address: str) -> int | str:
        """The number of an address, or itself where it has no row yet."""
        return self.mailboxes.get(address, address)

    def account(self, ext: str) -> Account | None:
        """A known account that is not removed; None is noted as a fault."""
        found = self.accounts.get(ext)
        if found is None or found.removed:
            self.unknown.append(Fault(ext, f"there is no account {ext!r}; see `rolecast accounts list`"))
            return None
        return found

    def contact(self, account: str, ext: str) -> tuple[Account, Contact] | None:
        """A known contact, a removed one as well; None is noted as a fault."""
        owner = self.accounts.get(account)
        if owner is None or ext not in owner.contacts:
            place = f"{account}/{ext}"
            self.unknown.append(Fault(place, f"there is no contact {place!r}; see `rolecast accounts show {account}`"))
            return None
        return owner, owner.contacts[ext]


def opt_out_name(account: Account, key: OptOutKey) -> str:
    """An opt-out as differences and notes name it."""
    ext, role, category, set_by = key
    return f"{account.ext}/{ext} {role}:{category} ({set_by})"


def suppression_name(model: Model, key: SuppressionKey) -> str:
    """A suppression as differences name it."""
    mailbox, cause, source = key
    address = model.addresses.get(mailbox, "erased") if isinstance(mailbox, int) else mailbox
    return f"{address} {cause} ({source})"


# ---------------------------------------------------------------- loading, in sets


def load(connection: Connection, key: bytes, model: Model, changes: Sequence[Change]) -> None:
    """Read accounts, contacts, opt-outs, mailboxes and suppressions that the changes name, one statement each."""
    touched = _Touched()
    for change in changes:
        _touch(touched, change)
    touched.accounts |= _locate(connection, model, [change for change in changes if isinstance(change, SetOptOut)])
    _load_mailboxes(connection, key, model, touched.addresses, touched.mailboxes)
    _load_accounts(connection, model, touched.accounts)
    if touched.suppressions:
        numbers = touched.mailboxes | set(model.mailboxes.values())
        for account in model.accounts.values():
            numbers.update([one.mailbox for one in account.contacts.values() if isinstance(one.mailbox, int)])
        _load_suppressions(connection, model, numbers, touched.sources)


@dataclass(slots=True)
class _Touched:
    """What changes name."""

    accounts: set[str] = field(default_factory=set)
    addresses: set[str] = field(default_factory=set)
    mailboxes: set[int] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)  # of suppressions
    suppressions: bool = False  # whether they matter


def _touch(touched: _Touched, change: Change) -> None:
    match change:
        case PutAccount(record):
            touched.accounts.add(record.id)
            touched.addresses.update([contact.address for contact in given(record.contacts, ())])
            touched.addresses.update([one.address for one in given(record.suppressions, ())])
            touched.addresses.update(given(record.bounced, ()))
            if not (isinstance(record.suppressions, Absent) and isinstance(record.bounced, Absent)):
                touched.suppressions = True
                touched.sources.add(f"import:{record.id}")
        case PutContact():
            touched.accounts.add(change.account)
            if not isinstance(change.email, Absent):
                touched.addresses.add(normalise(change.email))
        case RemoveAccount(ext) | RemoveContact(ext, _):
            touched.accounts.add(ext)
        case Suppress(mailbox) | LiftSuppression(mailbox):
            touched.suppressions = True
            if isinstance(mailbox, int):
                touched.mailboxes.add(mailbox)
            else:
                touched.addresses.add(normalise(mailbox))
        case SetOptOut():
            pass  # its account is looked up: it may be named by the contact's number


def _locate(connection: Connection, model: Model, changes: Sequence[SetOptOut]) -> set[str]:
    """The accounts of the contacts whose opt-outs change, and of those whose opt-outs hold for the same address."""
    pairs = {change.contact for change in changes if isinstance(change.contact, tuple)}
    numbers = {change.contact for change in changes if isinstance(change.contact, int)}
    accounts_named = {account for account, _ in pairs}
    query = select(contacts.c.id, accounts.c.ext, contacts.c.ext, contacts.c.mailbox_id).join(
        accounts, accounts.c.id == contacts.c.account_id
    )
    found: list[tuple[int, str, str, int]] = []
    if numbers:
        found += connection.execute(query.where(among(connection, contacts.c.id, numbers))).all()
    if pairs:
        by_account = query.where(among(connection, accounts.c.ext, accounts_named))
        found += [row for row in connection.execute(by_account).all() if (row[1], row[2]) in pairs]
    for number, account, ext, _ in found:
        model.located[number] = (account, ext)
        accounts_named.add(account)
    if any(not change.opted_out and change.set_by == "recipient" for change in changes):
        held = {mailbox for *_, mailbox in found}
        related = (
            query.join(opt_outs, opt_outs.c.contact_id == contacts.c.id)
            .where(or_(among(connection, opt_outs.c.mailbox_id, held), among(connection, contacts.c.mailbox_id, held)))
            .distinct()
        )
        accounts_named |= {account for _, account, *_ in connection.execute(related).all()}
    return accounts_named


def _load_mailboxes(
    connection: Connection, key: bytes, model: Model, addresses: Iterable[str], numbers: Iterable[int]
) -> None:
    """The numbers of addresses that have a row, found by their keys: an erased one is known again."""
    model.keys = {address: mailbox_key(key, address) for address in addresses}
    by_key = {found: address for address, found in model.keys.items()}
    for number, found, stored in _mailbox_rows(connection, list(by_key)):
        address = by_key[bytes(found)]
        model.mailboxes[address] = number
        model.addresses[number] = address
        if stored is None:
            model.erased.add(number)
    if numbers:
        query = select(mailboxes.c.id, mailboxes.c.address).where(among(connection, mailboxes.c.id, numbers))
        for number, stored in connection.execute(query).all():
            model.addresses[number] = stored or ""


def _mailbox_rows(connection: Connection, keys: list[bytes]) -> Iterable[tuple[int, bytes, str | None]]:
    """Number, key and address of the mailboxes with those keys, at the speed of the driver."""
    if connection.dialect.name == "postgresql":
        columns = "SELECT id, address_key, address FROM mailboxes WHERE address_key = ANY(%s)"
        return connection.exec_driver_sql(columns, (keys,)).all()
    found: list[Any] = []
    for start in range(0, len(keys), _KEYS):
        page = keys[start : start + _KEYS]
        marks = ", ".join("?" * len(page))
        statement = f"SELECT id, address_key, address FROM mailboxes WHERE address_key IN ({marks})"  # noqa: S608 - marks
        found += connection.exec_driver_sql(statement, tuple(page)).all()
    return found


_KEYS: Final = 1000
"""Address keys in one statement: far below the number of values that SQLite takes."""


def _load_accounts(connection: Connection, model: Model, named: Iterable[str]) -> None:
    """The accounts of those ids, with their products, contacts and opt-outs."""
    found = connection.execute(
        select(accounts.c.id, accounts.c.ext, accounts.c.name, accounts.c.catalogue, accounts.c.removed_at).where(
            among(connection, accounts.c.ext, named)
        )
    )
    by_number = {
        number: Account(number, ext, name, catalogue, frozenset(), removed_at is not None, {}, {})
        for number, ext, name, catalogue, removed_at in found.all()
    }
    if not by_number:
        return
    uses: dict[int, set[str]] = {}
    query = select(account_products.c.account_id, account_products.c.product)
    for number, product in connection.execute(
        query.where(among(connection, account_products.c.account_id, by_number))
    ).all():
        uses.setdefault(number, set()).add(product)
    for number, products in uses.items():
        by_number[number].uses = frozenset(products)
    _load_contacts(connection, by_number)
    _load_opt_outs(connection, by_number)
    for account in by_number.values():
        model.accounts[account.ext] = account.loaded()


def _load_contacts(connection: Connection, by_number: Mapping[int, Account]) -> None:
    for number, account_number, *others, unreachable, mailbox, removed_at in connection.execute(
        select(
            contacts.c.id,
            contacts.c.account_id,
            contacts.c.ext,
            contacts.c.position,
            contacts.c.name,
            contacts.c.email,
            contacts.c.kind,
            contacts.c.roles,
            contacts.c.products,
            contacts.c.locale,
            contacts.c.timezone,
            contacts.c.unreachable,
            contacts.c.mailbox_id,
            contacts.c.removed_at,
        ).where(among(connection, contacts.c.account_id, by_number))
    ).all():
        contact = Contact._make((number, *others, bool(unreachable), mailbox, removed_at is not None))
        by_number[account_number].contacts[contact.ext] = contact


def _load_opt_outs(connection: Connection, by_number: Mapping[int, Account]) -> None:
    for account_number, ext, role, category, set_by, *others in connection.execute(
        select(
            contacts.c.account_id,
            contacts.c.ext,
            opt_outs.c.role,
            opt_outs.c.category,
            opt_outs.c.set_by,
            opt_outs.c.mailbox_id,
            opt_outs.c.source,
            opt_outs.c.set_at,
        )
        .join(contacts, contacts.c.id == opt_outs.c.contact_id)
        .where(among(connection, contacts.c.account_id, by_number))
    ).all():
        by_number[account_number].opt_outs[ext, role, category, set_by] = OptOut(*others)


def _load_suppressions(connection: Connection, model: Model, numbers: Iterable[int], sources: Iterable[str]) -> None:
    query = select(
        suppressions.c.mailbox_id,
        suppressions.c.cause,
        suppressions.c.source,
        suppressions.c.at,
        suppressions.c.evidence,
        suppressions.c.lifted_at,
        suppressions.c.lifted_by,
        mailboxes.c.address,
    ).join(mailboxes, mailboxes.c.id == suppressions.c.mailbox_id)
    for condition in (
        among(connection, suppressions.c.mailbox_id, numbers),
        among(connection, suppressions.c.source, sources),
    ):
        for mailbox, cause, source, *others, address in connection.execute(query.where(condition)).all():
            model.suppressions.setdefault(mailbox, {})[cause, source] = Suppression(*others)
            model.suppressions_were[mailbox, cause, source] = Suppression(*others)
            model.sources.setdefault(source, set()).add(mailbox)
            model.addresses.setdefault(mailbox, address or "")
