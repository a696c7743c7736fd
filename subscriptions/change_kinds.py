"""What may be asked of `subscriptions.changes`, and who asks: the words that every door to the directory uses.

Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from subscriptions.documents import ABSENT, Absent, AccountRecord


@dataclass(frozen=True, slots=True)
class Actor:
    """Who changes something, and the door that it came through."""

    name: str  # `cli:anna`, `key:billing`, `recipient:17`, `import:acme.json`, `bounce`
    door: str  # cli | import | api | console | preferences | bounce

    @property
    def sets_as(self) -> str:
        """Who an opt-out counts as set by, where nothing else is said: import, recipient or operator."""
        return {"import": "import", "preferences": "recipient"}.get(self.door, "operator")


@dataclass(frozen=True, slots=True)
class PutAccount:
    """Add an account, or make a known one as the record says; where it has contacts, they replace the known ones."""

    record: AccountRecord


@dataclass(frozen=True, slots=True)
class RemoveAccount:
    """Mark an account and its contacts as removed."""

    account: str


@dataclass(frozen=True, slots=True)
class PutContact:
    """Add a contact (then `email` is needed), or change what is given of a known one."""

    account: str
    id: str
    email: str | Absent = ABSENT  # as written
    name: str | Absent | None = ABSENT  # None = none, as for locale and timezone
    kind: str | Absent = ABSENT
    roles: Collection[str] | Absent = ABSENT
    products: Collection[str] | Absent | None = ABSENT  # None = all
    locale: str | Absent | None = ABSENT
    timezone: str | Absent | None = ABSENT
    unreachable: bool | Absent = ABSENT  # an operator says so: opens fallbacks, the contact still gets mail


@dataclass(frozen=True, slots=True)
class RemoveContact:
    """Mark a contact as removed; its opt-outs go on holding for its address."""

    account: str
    contact: str


@dataclass(frozen=True, slots=True)
class SetOptOut:
    """Opt a contact out of a category in a role, or in again. `role` None: in every role that allows it.

    A recipient who opts in again to a promotional category does so for the address, in the whole installation.
    """

    contact: int | tuple[str, str]  # its row number, or account and contact id
    role: str | None
    category: str
    opted_out: bool
    set_by: str  # recipient | operator | import | complaint


@dataclass(frozen=True, slots=True)
class Suppress:
    """Send less to an address, or nothing: a complaint ends promotional and informational mail, the others end all."""

    mailbox: int | str  # its row number, or an address
    cause: str  # hard_bounce | complaint | operator | erased
    source: str  # `delivery:ULID/7`, `operator:anna`, `import:acme`
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class LiftSuppression:
    """Lift what stands against an address: every cause but `erased`, or one cause."""

    mailbox: int | str
    cause: str | None = None


Change = PutAccount | RemoveAccount | PutContact | RemoveContact | SetOptOut | Suppress | LiftSuppression
