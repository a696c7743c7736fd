"""Directory documents: accounts and contacts as JSON or JSON Lines, read strictly and written without loss.

`read_accounts` checks everything that the document alone can tell (contract, section 4): keys, types, ids, addresses,
roles, categories, repeated ids. All faults of a document are collected, up to 100, each with its place. Holders beyond
a role's limit and opt-outs that a catalogue does not allow are no faults: they are accepted and void (S-41, S-23).
JSON Lines are read a line at a time: of an account that has been passed on only its id is kept. `facts` turns a whole
document into what the resolver looks at. A key that a document does not have is ABSENT in the record: a new account
gets the default, a known one keeps what it has. Times are whole microseconds since 1970, UTC.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import EllipsisType
from typing import BinaryIO, Final, Literal, NamedTuple, TypeAlias, TypeVar
from zoneinfo import ZoneInfo

from subscriptions.addresses import BadAddress, normalise, trimmed
from subscriptions.audience import AccountFacts, ContactFacts
from subscriptions.catalogue import Catalogue, Role
from subscriptions.strictjson import Reader, StrictJSONError, loads, pointer

MAX_FAULTS: Final = 100
SETTERS: Final = ("recipient", "operator", "import", "complaint")

_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PRODUCT: Final = re.compile(r"[^\s;,\x00-\x1f\x7f](?:[^;,\x00-\x1f\x7f]{0,62}[^\s;,\x00-\x1f\x7f])?")
_CAUSE: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_LOCALE: Final = re.compile(r"[A-Za-z]{2,8}(?:-[A-Za-z0-9]{1,8})*")  # the outline of RFC 5646
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)  # RFC 3339
_ONE_DOCUMENT: Final = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*(?:"accounts"\s*:|\Z)')
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_ACCOUNT_KEYS: Final = frozenset({"id", "name", "catalogue", "uses", "bounced", "suppressions", "contacts"})
_CONTACT_KEYS: Final = frozenset(
    {"id", "name", "email", "kind", "roles", "products", "opt_outs", "locale", "timezone", "unreachable"}
)
_OPT_OUT_KEYS: Final = frozenset({"role", "category", "by", "at"})
_SUPPRESSION_KEYS: Final = frozenset({"address", "cause", "by", "at"})

_Keys = tuple[str | int, ...]  # the way to a value inside its account
_Value = TypeVar("_Value")


Absent: TypeAlias = EllipsisType
"""The type of ABSENT, so that a type checker can tell it from a value."""

ABSENT: Final = ...
"""Stands for a key that a document does not have."""

# The records are tuples: they are made three times as fast as frozen dataclasses, and a million at a time.


class OptOutRecord(NamedTuple):
    """A contact's wish not to receive a category in a role, and who recorded it."""

    role: str
    category: str
    by: str = "import"  # one of SETTERS
    at: int | None = None  # None = not said


class SuppressionRecord(NamedTuple):
    """An address that is not mailed, and why."""

    address: str  # normalised
    cause: str  # such as hard_bounce, complaint or operator
    by: str = "import"
    at: int | None = None


class ContactRecord(NamedTuple):
    """One contact as its document has it. A name, locale or timezone of None says that there is none."""

    id: str
    email: str  # as written: mail goes there
    address: str  # normalised
    name: str | Absent | None = ABSENT
    kind: Literal["person", "group"] | Absent = ABSENT
    roles: tuple[str, ...] | Absent = ABSENT
    products: frozenset[str] | Absent | None = ABSENT  # None = all
    opt_outs: tuple[OptOutRecord, ...] | Absent = ABSENT
    locale: str | Absent | None = ABSENT
    timezone: str | Absent | None = ABSENT
    unreachable: bool | Absent = ABSENT


class AccountRecord(NamedTuple):
    """One account as its document has it, contacts in order of assignment."""

    id: str
    catalogue: str
    name: str | Absent | None = ABSENT
    uses: frozenset[str] | Absent = ABSENT
    bounced: tuple[str, ...] | Absent = ABSENT  # normalised
    suppressions: tuple[SuppressionRecord, ...] | Absent = ABSENT
    contacts: tuple[ContactRecord, ...] | Absent = ABSENT


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong at one place: a JSON pointer, in JSON Lines after the number of the line."""

    place: str
    message: str  # a sentence


class DocumentError(Exception):
    """The document is refused. `faults` has every fault found; the text is one sentence with the first one's place."""

    def __init__(self, name: str, faults: Sequence[Fault]) -> None:
        self.name = name
        self.faults = tuple(faults)
        first = self.faults[0]
        more = len(self.faults) - 1
        least = "at least " if len(self.faults) >= MAX_FAULTS else ""
        rest = f" ({least}{more} more fault{'s' if more > 1 else ''})" if more else ""
        place = f", {first.place}" if first.place else ""
        super().__init__(f"{name}{place}: {first.message.removesuffix('.')}{rest}.")


# ---------------------------------------------------------------- reading


def read_accounts(stream: BinaryIO, *, catalogues: Mapping[str, Catalogue], name: str) -> Iterator[AccountRecord]:
    """The accounts of a document, in its order. `name` is what faults call the document.

    A document with a fault raises DocumentError when it has been read to its end (or the 100th fault), so what was
    passed on before must not be kept until the iterator ends by itself. After the first fault nothing is passed on.
    """
    reader = _Reader(catalogues, name)
    number, line = _first_line(stream)
    if line is None:
        reader.fault_at("", 'The document is empty; it must have {"accounts": [...]} or one account a line.')
    elif _ONE_DOCUMENT.match(line):
        yield from _read_document(b"\n" * (number - 1) + line + stream.read(), reader)
    else:
        yield from _read_lines(number, line, stream, reader)
    if reader.faults:
        raise DocumentError(name, reader.faults)


def _first_line(stream: BinaryIO) -> tuple[int, bytes | None]:
    """The first line that is not blank, with its number from 1."""
    for number, line in enumerate(stream, start=1):
        if line.strip() and line.strip() != b"\xef\xbb\xbf":
            return number, line
    return 1, None


def _read_document(data: bytes, reader: _Reader) -> Iterator[AccountRecord]:
    try:
        document = loads(data)
    except StrictJSONError as error:
        place = f"line {error.line}" if error.pointer is None and error.line is not None else error.pointer or ""
        reader.fault_at(place, str(error))
        return
    del data
    if not isinstance(document, dict) or not isinstance(document.get("accounts"), list):
        reader.fault_at("/accounts", "The document must be an object with a list of accounts under 'accounts'.")
        return
    for key in document:
        if key != "accounts":
            reader.fault_at(pointer([key]), f"{_shown(key)} is an unknown key; a document has only 'accounts'.")
    for index, value in enumerate(document["accounts"]):
        account = reader.account(value, f"/accounts/{index}")
        if account is not None:
            yield account


def _read_lines(number: int, line: bytes, stream: BinaryIO, reader: _Reader) -> Iterator[AccountRecord]:
    if line.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"["):
        reader.fault_at("", 'The document must be {"accounts": [...]} or one account a line, not a bare list.')
        return
    json_reader = Reader()
    while line:
        if line.strip():
            place = f"line {number}"
            try:
                value = json_reader.loads(line, first_line=number)
            except StrictJSONError as error:
                reader.fault_at(f"{place}, {error.pointer}" if error.pointer else place, str(error))
            else:
                account = reader.account(value, f"{place}, ")
                if account is not None:
                    yield account
        line = stream.readline()
        number += 1


class _Reader:
    """Checks one account after another, and keeps the faults and the ids seen."""

    def __init__(self, catalogues: Mapping[str, Catalogue], name: str) -> None:
        self.catalogues = catalogues
        self.name = name
        self.faults: list[Fault] = []
        self.account_ids: set[str] = set()
        self.good_timezones: set[str] = set()
        self.prefix = ""  # the place of the account that is being read

    def fault_at(self, place: str, message: str) -> None:
        self.faults.append(Fault(place, message))
        if len(self.faults) >= MAX_FAULTS:
            raise DocumentError(self.name, self.faults)

    def fault(self, keys: _Keys, message: str) -> None:
        """A fault inside the account that is being read."""
        self.fault_at((self.prefix + pointer(keys)).removesuffix(", "), message)

    def account(self, value: object, prefix: str) -> AccountRecord | None:
        """The account, or None where this or an earlier one has a fault."""
        self.prefix = prefix
        if not isinstance(value, dict):
            self.fault((), f"An account must be an object, not {_kind(value)}.")
            return None
        self.known_keys(value, _ACCOUNT_KEYS, ())
        id_ = self.required_id(value, ())
        if id_ in self.account_ids:
            self.fault(("id",), f"The account id {_shown(id_)} stands twice in the document; merge the two.")
        self.account_ids.add(id_)
        catalogue = self.catalogue(value)
        record = AccountRecord(
            id=id_,
            catalogue=catalogue.key if catalogue else "",
            name=self.optional_text(value, "name", ()),
            uses=self.uses(value),
            bounced=self.optional_list(value, "bounced", (), self.address),
            suppressions=self.optional_list(value, "suppressions", (), self.suppression),
            contacts=self.contacts(value, catalogue),
        )
        return None if self.faults else record

    def catalogue(self, account: dict[str, object]) -> Catalogue | None:
        if "catalogue" not in account:
            self.fault((), "The key 'catalogue' is missing.")
            return None
        key = account["catalogue"]
        if isinstance(key, str) and key in self.catalogues:
            return self.catalogues[key]
        known = ", ".join(self.catalogues)
        self.fault(("catalogue",), f"{_shown(key)} is no catalogue; known are {known}.")
        return None

    # ------------------------------------------------------------ contacts

    def contacts(self, account: dict[str, object], catalogue: Catalogue | None) -> tuple[ContactRecord, ...] | Absent:
        values = account.get("contacts", ABSENT)
        if values is ABSENT:
            return ABSENT
        if not isinstance(values, list):
            self.fault(("contacts",), f"'contacts' must be a list, not {_kind(values)}.")
            return ABSENT
        seen: set[str] = set()
        records: list[ContactRecord] = []
        for index, value in enumerate(values):
            keys = ("contacts", index)
            if not isinstance(value, dict):
                self.fault(keys, f"A contact must be an object, not {_kind(value)}.")
                continue
            record = self.contact(value, keys, catalogue)
            if record.id in seen and record.id:
                self.fault((*keys, "id"), f"The contact id {_shown(record.id)} stands twice in this account.")
            seen.add(record.id)
            records.append(record)
        return tuple(records)

    def contact(self, contact: dict[str, object], keys: _Keys, catalogue: Catalogue | None) -> ContactRecord:
        self.known_keys(contact, _CONTACT_KEYS, keys)
        id_ = self.required_id(contact, keys)
        email, address = self.email(contact, keys)
        kind: Literal["person", "group"] | Absent = ABSENT
        if "kind" in contact:
            if contact["kind"] == "group":
                kind = "group"
            elif contact["kind"] == "person":
                kind = "person"
            else:
                self.fault((*keys, "kind"), f"{_shown(contact['kind'])} is no kind of contact; use person or group.")
        return ContactRecord(
            id=id_,
            email=email,
            address=address,
            name=self.optional_text(contact, "name", keys),
            kind=kind,
            roles=self.roles(contact, keys, catalogue, kind) if "roles" in contact else ABSENT,
            products=self.preferences(contact, keys) if "products" in contact else ABSENT,
            opt_outs=self.opt_outs(contact, keys, catalogue) if "opt_outs" in contact else ABSENT,
            locale=self.locale(contact, keys) if "locale" in contact else ABSENT,
            timezone=self.timezone(contact, keys) if "timezone" in contact else ABSENT,
            unreachable=self.unreachable(contact, keys) if "unreachable" in contact else ABSENT,
        )

    def email(self, contact: dict[str, object], keys: _Keys) -> tuple[str, str]:
        """The address as written, and its normal form."""
        if "email" not in contact:
            self.fault(keys, "The key 'email' is missing.")
            return "", ""
        value = contact["email"]
        address = self.address(value, (*keys, "email"))
        return (trimmed(value), address) if address and isinstance(value, str) else ("", "")

    def roles(
        self,
        contact: dict[str, object],
        keys: _Keys,
        catalogue: Catalogue | None,
        kind: Literal["person", "group"] | Absent,
    ) -> tuple[str, ...] | Absent:
        values = contact["roles"]
        if not isinstance(values, list):
            self.fault((*keys, "roles"), f"'roles' must be a list of role keys, not {_kind(values)}.")
            return ABSENT
        if catalogue is None:
            return ABSENT
        for index, key in enumerate(values):
            role = self.role(key, (*keys, "roles", index), catalogue)
            if role is not None and kind == "group" and "group" not in role.holder_kinds:
                self.fault(
                    (*keys, "roles", index),
                    f"The role {_shown(key)} needs a person, but this contact is of kind 'group'.",
                )
        return tuple(dict.fromkeys(key for key in values if isinstance(key, str)))

    def role(self, key: object, keys: _Keys, catalogue: Catalogue) -> Role | None:
        role = catalogue.roles.get(key) if isinstance(key, str) else None
        if role is None:
            self.fault(
                keys,
                f"{_shown(key)} is no role of {catalogue.key}; its roles are {', '.join(catalogue.roles)}.",
            )
        return role

    def opt_outs(
        self, contact: dict[str, object], keys: _Keys, catalogue: Catalogue | None
    ) -> tuple[OptOutRecord, ...] | Absent:
        if catalogue is None:
            return ABSENT

        def opt_out(value: object, place: _Keys) -> OptOutRecord | None:
            if not isinstance(value, dict):
                self.fault(place, f"An opt-out must be an object with 'role' and 'category', not {_kind(value)}.")
                return None
            self.known_keys(value, _OPT_OUT_KEYS, place)
            for key in ("role", "category"):
                if key not in value:
                    self.fault(place, f"The key '{key}' is missing.")
                    return None
            role = self.role(value["role"], (*place, "role"), catalogue)
            category = value["category"]
            if not isinstance(category, str) or category not in catalogue.vocabulary.categories:
                hint = _meant(category, catalogue.vocabulary.categories)
                self.fault((*place, "category"), f"{_shown(category)} is no category{hint}.")
                return None
            if role is None:
                return None
            return OptOutRecord(role.key, category, by=self.setter(value, place), at=self.time(value, place))

        return self.optional_list(contact, "opt_outs", keys, opt_out)

    def locale(self, contact: dict[str, object], keys: _Keys) -> str | Absent | None:
        value = self.optional_text(contact, "locale", keys)
        if isinstance(value, str) and not _LOCALE.fullmatch(value):
            self.fault((*keys, "locale"), f"{_shown(value)} is no language tag; write it as 'en' or 'de-AT'.")
        return value

    def timezone(self, contact: dict[str, object], keys: _Keys) -> str | Absent | None:
        value = self.optional_text(contact, "timezone", keys)
        if isinstance(value, str) and value not in self.good_timezones:
            try:
                ZoneInfo(value)
            except (KeyError, ValueError, OSError):
                self.fault((*keys, "timezone"), f"{_shown(value)} is no timezone; write it as 'Europe/Vienna'.")
            else:
                self.good_timezones.add(value)
        return value

    def unreachable(self, contact: dict[str, object], keys: _Keys) -> bool | Absent:
        value = contact["unreachable"]
        if isinstance(value, bool):
            return value
        self.fault((*keys, "unreachable"), f"'unreachable' must be true or false, not {_kind(value)}.")
        return ABSENT

    # ------------------------------------------------------------ what accounts and contacts share

    def suppression(self, value: object, keys: _Keys) -> SuppressionRecord | None:
        if not isinstance(value, dict):
            self.fault(keys, f"A suppression must be an object with 'address' and 'cause', not {_kind(value)}.")
            return None
        self.known_keys(value, _SUPPRESSION_KEYS, keys)
        for key in ("address", "cause"):
            if key not in value:
                self.fault(keys, f"The key '{key}' is missing.")
                return None
        cause = value["cause"]
        if not isinstance(cause, str) or not _CAUSE.fullmatch(cause):
            self.fault((*keys, "cause"), f"{_shown(cause)} is no cause; write hard_bounce, complaint or operator.")
            return None
        address = self.address(value["address"], (*keys, "address"))
        by, at = self.setter(value, keys), self.time(value, keys)
        return SuppressionRecord(address, cause, by=by, at=at) if address else None

    def known_keys(self, table: dict[str, object], known: frozenset[str], keys: _Keys) -> None:
        if table.keys() <= known:
            return
        for key in table:
            if key not in known:
                self.fault((*keys, key), f"{_shown(key)} is an unknown key{_meant(key, known)}.")

    def required_id(self, table: dict[str, object], keys: _Keys) -> str:
        if "id" not in table:
            self.fault(keys, "The key 'id' is missing.")
            return ""
        value = table["id"]
        if isinstance(value, str) and _ID.fullmatch(value):
            return value
        self.fault(
            (*keys, "id"),
            f"{_shown(value)} is no id; an id is a text of 1 to 64 letters, digits, '.', '_' and '-'.",
        )
        return ""

    def address(self, value: object, keys: _Keys) -> str | None:
        if not isinstance(value, str):
            self.fault(keys, f"An address must be a text, not {_kind(value)}.")
            return None
        try:
            return normalise(value)
        except BadAddress as error:
            self.fault(keys, str(error))
            return None

    def optional_text(self, table: dict[str, object], key: str, keys: _Keys) -> str | Absent | None:
        value = table.get(key, ABSENT)
        if isinstance(value, str) or value is None or value is ABSENT:
            return value
        self.fault((*keys, key), f"'{key}' must be a text or null, not {_kind(value)}.")
        return ABSENT

    def optional_list(
        self,
        table: dict[str, object],
        key: str,
        keys: _Keys,
        read: Callable[[object, _Keys], _Value | None],
    ) -> tuple[_Value, ...] | Absent:
        """The list under the key, each value as `read` returns it; None is a fault that `read` has recorded."""
        values = table.get(key, ABSENT)
        if values is ABSENT:
            return ABSENT
        if not isinstance(values, list):
            self.fault((*keys, key), f"'{key}' must be a list, not {_kind(values)}.")
            return ABSENT
        read_values = (read(value, (*keys, key, index)) for index, value in enumerate(values))
        return tuple(value for value in read_values if value is not None)

    def uses(self, account: dict[str, object]) -> frozenset[str] | Absent:
        products = self.optional_list(account, "uses", (), self.product)
        return ABSENT if isinstance(products, Absent) else frozenset(products)

    def preferences(self, contact: dict[str, object], keys: _Keys) -> frozenset[str] | Absent | None:
        if contact["products"] is None:
            return None
        products = self.optional_list(contact, "products", keys, self.product)
        if products == () and contact["products"] == []:
            self.fault((*keys, "products"), "'products' is empty; write null for all, or record opt-outs for none.")
        return ABSENT if isinstance(products, Absent) else frozenset(products)

    def product(self, value: object, keys: _Keys) -> str | None:
        if isinstance(value, str) and _PRODUCT.fullmatch(value):
            return value
        self.fault(keys, f"{_shown(value)} is no product; write 1 to 64 characters without ',' and ';'.")
        return None

    def setter(self, table: dict[str, object], keys: _Keys) -> str:
        by = table.get("by", "import")
        if isinstance(by, str) and by in SETTERS:
            return by
        self.fault((*keys, "by"), f"{_shown(by)} cannot have set it; use {', '.join(SETTERS[:-1])} or {SETTERS[-1]}.")
        return "import"

    def time(self, table: dict[str, object], keys: _Keys) -> int | None:
        if "at" not in table:
            return None
        value = table["at"]
        if isinstance(value, str) and _TIME.fullmatch(value):
            try:
                return (datetime.fromisoformat(value.upper()) - _EPOCH) // timedelta(microseconds=1)
            except ValueError:
                pass  # such as the 30th of February
        self.fault((*keys, "at"), f"{_shown(value)} is no time; write it as '2026-11-21T10:00:00Z' (RFC 3339).")
        return None


def _shown(value: object) -> str:
    """The value for a message: as JSON, shortened, escaped where it could mislead a terminal."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 80 else text[:80] + "..."
    return text if text.isprintable() else json.dumps(value)[:80]


def _kind(value: object) -> str:
    """What sort of JSON value it is."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", str: "a text", int: "a number", float: "a number", list: "a list"}
    return kinds.get(type(value), "an object")


def _meant(key: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1) if isinstance(key, str) else []
    return f"; did you mean '{close[0]}'?" if close else ""


# ---------------------------------------------------------------- facts


def facts(records: Iterable[AccountRecord], catalogues: Mapping[str, Catalogue]) -> dict[str, AccountFacts]:
    """What the resolver looks at, by account id, of all accounts of a document.

    Bounced and suppressed addresses, complaints (XC-06) and promotional opt-outs (S-22) hold in every account.
    """
    accounts = list(records)
    suppressed: set[str] = set()
    complained: set[str] = set()
    opted_out: set[tuple[str, str]] = set()
    for account in accounts:
        suppressed.update(given(account.bounced, ()))
        for suppression in given(account.suppressions, ()):
            (complained if suppression.cause == "complaint" else suppressed).add(suppression.address)
        categories = catalogues[account.catalogue].vocabulary.categories
        for contact in given(account.contacts, ()):
            for opt_out in given(contact.opt_outs, ()):
                if categories[opt_out.category].class_ == "promotional":
                    opted_out.add((contact.address, opt_out.category))
                if opt_out.by == "complaint":
                    complained.add(contact.address)
    # One set of each for all accounts: they are the same everywhere and only ever asked for membership.
    everywhere = (frozenset(suppressed), frozenset(opted_out), frozenset(complained))
    return {account.id: _account_facts(account, *everywhere) for account in accounts}


def _account_facts(
    account: AccountRecord,
    suppressed: frozenset[str],
    opted_out: frozenset[tuple[str, str]],
    complained: frozenset[str],
) -> AccountFacts:
    return AccountFacts(
        id=account.id,
        catalogue=account.catalogue,
        uses=given(account.uses, frozenset()),
        contacts=tuple(_contact_facts(contact) for contact in given(account.contacts, ())),
        suppressed=suppressed,
        opted_out=opted_out,
        complained=complained,
    )


def _contact_facts(contact: ContactRecord) -> ContactFacts:
    return ContactFacts(
        id=contact.id,
        email=contact.address,
        roles=given(contact.roles, ()),
        kind=given(contact.kind, "person"),
        products=given(contact.products, None),
        opt_outs=frozenset((opt_out.role, opt_out.category) for opt_out in given(contact.opt_outs, ())),
        unreachable=given(contact.unreachable, False),
    )


def given(value: _Value | Absent, default: _Value) -> _Value:
    """The value, or the default where the document does not have its key."""
    return default if isinstance(value, Absent) else value


# ---------------------------------------------------------------- writing


def write_accounts(records: Iterable[AccountRecord], stream: BinaryIO, *, lines: bool) -> None:
    """Writes the accounts as JSON Lines, or as one JSON document; reading them back gives equal records."""
    if lines:
        stream.writelines(_json(_account_value(record)) + b"\n" for record in records)
        return
    stream.write(b'{"accounts": [')
    separator = b"\n"
    for record in records:
        stream.write(separator + _json(_account_value(record)))
        separator = b",\n"
    stream.write(b"\n]}\n")


def _json(value: dict[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _account_value(account: AccountRecord) -> dict[str, object]:
    return _present(
        id=account.id,
        name=account.name,
        catalogue=account.catalogue,
        uses=_sorted(account.uses),
        bounced=account.bounced,
        suppressions=_mapped(account.suppressions, _suppression_value),
        contacts=_mapped(account.contacts, _contact_value),
    )


def _contact_value(contact: ContactRecord) -> dict[str, object]:
    return _present(
        id=contact.id,
        name=contact.name,
        email=contact.email,
        kind=contact.kind,
        roles=contact.roles,
        products=_sorted(contact.products),
        opt_outs=_mapped(contact.opt_outs, _opt_out_value),
        locale=contact.locale,
        timezone=contact.timezone,
        unreachable=contact.unreachable,
    )


def _opt_out_value(opt_out: OptOutRecord) -> dict[str, object]:
    return _present(role=opt_out.role, category=opt_out.category, by=opt_out.by, at=_time_text(opt_out.at))


def _suppression_value(suppression: SuppressionRecord) -> dict[str, object]:
    return _present(
        address=suppression.address, cause=suppression.cause, by=suppression.by, at=_time_text(suppression.at)
    )


def _present(**values: object) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not ABSENT}


def _sorted(products: frozenset[str] | Absent | None) -> list[str] | Absent | None:
    return sorted(products) if isinstance(products, frozenset) else products


def _mapped(
    values: tuple[_Value, ...] | Absent, write: Callable[[_Value], dict[str, object]]
) -> list[dict[str, object]] | Absent:
    return ABSENT if isinstance(values, Absent) else [write(value) for value in values]


def _time_text(at: int | None) -> str | Absent:
    if at is None:
        return ABSENT
    return (_EPOCH + timedelta(microseconds=at)).isoformat().replace("+00:00", "Z")
