"""Import and export of the directory: documents in, Changes out, and the directory as a document that loses nothing.

An import promises all or nothing. `checked` reads the whole document once, refuses it with every fault, and keeps what
it says in a file of its own (a third of the size), so that the database is locked only while rows are written, that
a pipe can be imported, and that what is applied is what was checked. `plan_import` says what an import would do;
`run_import` does it in one transaction. Memory holds some thousand contacts at a time for JSON Lines; one large JSON
document is read whole. Two imports at once happen one after the other.

An export writes accounts in the order of their numbers and every key of each, so that importing it changes nothing in
the directory that it came from, and makes an equal one elsewhere. It leaves out what the document has no word for:
removed accounts and contacts with what hangs on them, lifted suppressions, evidence, erased addresses, and opt-outs in
roles of a catalogue that the account no longer has.
"""

from __future__ import annotations

import gc
import io
import marshal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, cast

from sqlalchemy import ColumnElement, Connection, Select, exists, func, select, text

from subscriptions import directory
from subscriptions.catalogue import Catalogue
from subscriptions.changes import (
    Actor,
    Change,
    ChangeError,
    Difference,
    PutAccount,
    RemoveAccount,
    apply_batches,
    plan_batches,
    suppressed_by,
)
from subscriptions.database import Database
from subscriptions.documents import (
    ABSENT,
    Absent,
    AccountRecord,
    ContactRecord,
    OptOutRecord,
    SuppressionRecord,
    read_accounts,
    write_accounts,
)
from subscriptions.schema import accounts, contacts, mailboxes, opt_outs, suppressions

__all__ = ["ChangeError", "Checked", "Difference", "Progress", "checked", "export", "plan_import", "run_import"]

Progress = Callable[[int, int | None], None]
"""Told how much is done and of how much in all (None where that isn't known), in bytes of the document."""

BATCH: Final = 5000
"""Contacts in one batch of changes: some 10 MB."""


# ---------------------------------------------------------------- reading a document


@dataclass(slots=True)
class Checked:
    """A document without a fault, kept in a temporary file; good until the `with` of `checked` ends."""

    name: str
    accounts: int
    contacts: int
    size: int
    file: BinaryIO

    def batches(self, *, progress: Progress | None = None) -> Iterator[list[Change]]:
        """What the document says as changes, in batches of some thousand contacts."""
        self.file.seek(0)
        while self.file.tell() < self.size:
            length = int.from_bytes(self.file.read(8))
            yield [
                PutAccount(_unpacked(record))
                for record in marshal.loads(self.file.read(length))  # noqa: S302 - our own file
            ]
            if progress is not None:
                progress(self.file.tell(), self.size)
            gc.collect(0)  # what the drivers left in cycles since the last batch: see _collector_paused


@contextmanager
def checked(
    stream: BinaryIO,
    *,
    catalogues: Mapping[str, Catalogue],
    name: str,
    size: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Checked]:
    """Read a document to its end and keep it. `name` is what faults call it, `size` its bytes where they are known.

    Raises DocumentError with all faults; nothing was done then.
    """
    source = stream if progress is None else cast("BinaryIO", io.BufferedReader(_Told(stream, size, progress), 1 << 18))
    with tempfile.TemporaryFile(prefix="rolecast-import-") as kept:
        yield _kept(read_accounts(source, catalogues=catalogues, name=name), cast("BinaryIO", kept), name)


def _kept(records: Iterable[AccountRecord], file: BinaryIO, name: str) -> Checked:
    batch: list[Any] = []
    accounts_read = contacts_read = in_batch = 0
    with _collector_paused():
        for record in records:
            people = 0 if isinstance(record.contacts, Absent) else len(record.contacts)
            if batch and in_batch + people > BATCH:
                _keep(batch, file)
                batch, in_batch = [], 0
            batch.append(_packed(record))
            accounts_read += 1
            contacts_read += people
            in_batch += people + 1
        if batch:
            _keep(batch, file)
    file.flush()
    return Checked(name, accounts_read, contacts_read, file.tell(), file)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the search for reference cycles: it would look several times at some hundred thousand records a batch.

    They hold no cycles. What others leave is collected once a batch, so that memory stays flat.
    """
    ran = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if ran:
            gc.enable()


def _keep(batch: list[Any], file: BinaryIO) -> None:
    packed = marshal.dumps(batch)
    file.write(len(packed).to_bytes(8) + packed)


class _Told(io.RawIOBase):
    """A stream that tells how much of it was read."""

    def __init__(self, stream: BinaryIO, size: int | None, progress: Progress) -> None:
        self._stream = stream
        self._size = size
        self._progress = progress
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._done += len(data)
        self._progress(self._done, self._size)
        return len(data)


# Kept as plain tuples, with ABSENT in them: marshal writes and reads them ten times as fast as pickle does records.

_Packed = tuple[Any, ...]


def _packed(record: AccountRecord) -> _Packed:
    stopped, people = record.suppressions, record.contacts
    return (
        *record[:-2],
        stopped if isinstance(stopped, Absent) else [tuple(one) for one in stopped],
        people if isinstance(people, Absent) else [_packed_contact(contact) for contact in people],
    )


def _packed_contact(contact: ContactRecord) -> _Packed:
    if isinstance(contact.opt_outs, Absent):
        return tuple(contact)
    return (*contact[:_OPT_OUTS], [tuple(one) for one in contact.opt_outs], *contact[_OPT_OUTS + 1 :])


_OPT_OUTS: Final = ContactRecord._fields.index("opt_outs")


def _unpacked(packed: _Packed) -> AccountRecord:
    *head, stopped, people = packed
    if stopped is not ABSENT:
        stopped = tuple([SuppressionRecord._make(one) for one in stopped])
    if people is not ABSENT:
        people = tuple([_unpacked_contact(contact) for contact in people])
    return AccountRecord._make((*head, stopped, people))


def _unpacked_contact(packed: _Packed) -> ContactRecord:
    contact = ContactRecord._make(packed)
    if isinstance(contact.opt_outs, Absent):
        return contact
    return contact._replace(opt_outs=tuple([OptOutRecord._make(one) for one in contact.opt_outs]))


# ---------------------------------------------------------------- import


def plan_import(
    database: Database,
    document: Checked,
    *,
    catalogues: Mapping[str, Catalogue],
    now: int,
    prune: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """What importing the document would change; writes nothing.

    `prune` also removes the accounts that it does not name. Raises ChangeError where the document is good in itself,
    but not together with what the directory has (a group in a role that it holds there already).
    """
    with database.read(patient=True) as connection, _collector_paused():
        batches = _batches(connection, document, catalogues, prune=prune, progress=progress)
        return plan_batches(connection, _actor(document), batches, catalogues=catalogues, now=now)


def run_import(
    database: Database,
    document: Checked,
    *,
    catalogues: Mapping[str, Catalogue],
    now: int,
    actor: Actor | None = None,
    why: str = "",
    prune: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """Import the document in one transaction, all or nothing; returns what it changed.

    `actor` is `import:NAME` where it is not said. Raises ChangeError as `plan_import` does; nothing was done then.
    """
    with database.write() as connection, _collector_paused():
        batches = _batches(connection, document, catalogues, prune=prune, progress=progress)
        difference = apply_batches(
            connection, actor or _actor(document), batches, catalogues=catalogues, now=now, why=why
        )
        if connection.dialect.name == "postgresql" and document.contacts > BATCH:
            # With the statistics of before it would read all accounts for each page of them.
            connection.execute(text("ANALYZE accounts, account_products, contacts, mailboxes"))
        return difference


def _actor(document: Checked) -> Actor:
    return Actor(f"import:{document.name}", "import")


def _batches(
    connection: Connection,
    document: Checked,
    catalogues: Mapping[str, Catalogue],
    *,
    prune: bool,
    progress: Progress | None,
) -> Iterator[Sequence[Change]]:
    """The document's changes; with `prune` the removals of accounts that it does not name come first."""
    if prune:
        yield from _removals(connection, document)
    yield from document.batches(progress=progress)


def _removals(connection: Connection, document: Checked) -> Iterator[list[Change]]:
    """A removal for each account that the document does not name, in batches."""
    named: set[str] = set()
    for batch in document.batches():
        named.update([change.record.id for change in batch if isinstance(change, PutAccount)])
    after = 0
    while page := directory.list_accounts(connection, after=after):
        after = page[-1].number
        gone: list[Change] = [RemoveAccount(account.id) for account in page if account.id not in named]
        if gone:
            yield gone


# ---------------------------------------------------------------- export


def export(
    connection: Connection,
    stream: BinaryIO,
    *,
    catalogues: Mapping[str, Catalogue],
    lines: bool,
    only: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the directory, or the accounts of those ids, as JSON Lines or as one JSON document.

    Pages are read one after another from the caller's transaction, which has to see one state of the database.
    Returns how many accounts were written; `progress` is told the same while it works.
    """
    written = 0

    def records() -> Iterator[AccountRecord]:
        nonlocal written
        for page in _exported(connection, catalogues, only):
            yield from page
            written += len(page)
            if progress is not None:
                progress(written)

    write_accounts(records(), stream, lines=lines)
    return written


def _exported(
    connection: Connection, catalogues: Mapping[str, Catalogue], only: Sequence[str] | None
) -> Iterator[list[AccountRecord]]:
    after = 0
    while page := directory.list_accounts(connection, after=after, only=only):
        stopped = _suppression_records(connection, page, only=only, first=after == 0)
        after = page[-1].number
        people = directory.contacts_of(connection, [account.number for account in page])
        wishes = _opt_out_records(connection, [one.number for found in people.values() for one in found])
        yield [
            AccountRecord(
                id=account.id,
                catalogue=account.catalogue,
                name=account.name or None,
                uses=frozenset(account.uses),
                suppressions=stopped.get(account.number, ()),
                contacts=tuple(
                    _record(contact, wishes.get(contact.number, ()), catalogues.get(account.catalogue))
                    for contact in people.get(account.number, ())
                ),
            )
            for account in page
        ]


def _record(
    contact: directory.ContactRow, wishes: Sequence[OptOutRecord], catalogue: Catalogue | None
) -> ContactRecord:
    return ContactRecord(
        id=contact.id,
        email=contact.email,
        address=contact.address,
        name=contact.name or None,
        kind="group" if contact.kind == "group" else "person",
        roles=contact.roles,
        products=None if contact.products is None else frozenset(contact.products),
        opt_outs=tuple(wish for wish in wishes if catalogue is None or wish.role in catalogue.roles),
        locale=contact.locale or None,
        timezone=contact.timezone or None,
        unreachable=contact.unreachable,
    )


def _opt_out_records(connection: Connection, numbers: Sequence[int]) -> dict[int, list[OptOutRecord]]:
    """The opt-outs of contacts by their numbers, in an order of their own."""
    query = select(
        opt_outs.c.contact_id, opt_outs.c.role, opt_outs.c.category, opt_outs.c.set_by, opt_outs.c.set_at
    ).where(directory.among(connection, opt_outs.c.contact_id, numbers))
    wishes: dict[int, list[OptOutRecord]] = {}
    for contact, *others in sorted(connection.execute(query).all()):
        wishes.setdefault(contact, []).append(OptOutRecord(*others))
    return wishes


def _suppression_records(
    connection: Connection, page: Sequence[directory.AccountRow], *, only: Sequence[str] | None, first: bool
) -> dict[int, tuple[SuppressionRecord, ...]]:
    """The suppressions that each account of a page exports, by account number.

    Those that its own import set; of the others those of its contacts' addresses, where it is the first account that
    has the address; and, if it is the first account of all, those of addresses that no contact has.
    """
    numbers = {account.id: account.number for account in page}
    found: dict[int, set[tuple[int, str, str, str]]] = {}
    own = directory.among(connection, suppressions.c.source, [f"import:{ext}" for ext in numbers])
    for address, cause, source, at in connection.execute(_standing().where(own)).all():
        whose = numbers[source.removeprefix("import:")]
        found.setdefault(whose, set()).add((at, address, cause, "import"))
    others = _held_elsewhere(connection, numbers.values(), only)
    if first and only is None:
        others += [(*row, page[0].number) for row in connection.execute(_standing().where(_held_by_nobody())).all()]
    importers = {source.removeprefix("import:") for _, _, source, *_ in others if source.startswith("import:")}
    exported = {f"import:{ext}" for ext in directory.existing(connection, importers)}
    for address, cause, source, at, holder in others:
        if holder in numbers.values() and source not in exported:
            found.setdefault(holder, set()).add((at, address, cause, suppressed_by(cause, source)))
    return {number: _sorted_suppressions(rows) for number, rows in found.items()}


def _held_elsewhere(connection: Connection, account_numbers: Iterable[int], only: Sequence[str] | None) -> list[Any]:
    """Suppressions of the addresses of accounts, each with the number of the first account that has the address."""
    mailbox_numbers = select(contacts.c.mailbox_id).where(
        directory.among(connection, contacts.c.account_id, account_numbers), contacts.c.removed_at.is_(None)
    )
    held = (
        _standing()
        .add_columns(func.min(contacts.c.account_id))
        .join(contacts, contacts.c.mailbox_id == suppressions.c.mailbox_id)
        .join(accounts, accounts.c.id == contacts.c.account_id)
        .where(contacts.c.removed_at.is_(None), accounts.c.removed_at.is_(None))
        .where(suppressions.c.mailbox_id.in_(mailbox_numbers))
        .group_by(suppressions.c.mailbox_id, *_STANDING)
    )
    if only is not None:
        held = held.where(directory.among(connection, accounts.c.ext, only))
    return list(connection.execute(held).all())


def _held_by_nobody() -> ColumnElement[bool]:
    return ~exists().where(
        contacts.c.mailbox_id == suppressions.c.mailbox_id,
        contacts.c.removed_at.is_(None),
        accounts.c.id == contacts.c.account_id,
        accounts.c.removed_at.is_(None),
    )


def _sorted_suppressions(rows: Iterable[tuple[int, str, str, str]]) -> tuple[SuppressionRecord, ...]:
    """Oldest first; of several that say the same the oldest."""
    oldest: dict[tuple[str, str, str], int] = {}
    for at, *said in sorted(rows):
        oldest.setdefault((said[0], said[1], said[2]), at)
    return tuple(SuppressionRecord(address, cause, by, at) for (address, cause, by), at in oldest.items())


_STANDING: Final = (mailboxes.c.address, suppressions.c.cause, suppressions.c.source, suppressions.c.at)


def _standing() -> Select[Any]:
    """Suppressions that are not lifted, of addresses that are not erased."""
    return (
        select(*_STANDING)
        .join_from(suppressions, mailboxes, mailboxes.c.id == suppressions.c.mailbox_id)
        .where(suppressions.c.lifted_at.is_(None), mailboxes.c.address.is_not(None))
    )
