"""The only writer of the directory: every import, command, page and bounce changes it through `apply`.

It promises: a batch of changes is checked whole before anything is written; what is written is one set of rows per
table, however many changes there are; who, when, why, before and after stand in one audit row for each account and
batch, by row numbers and without addresses or names; and who set an opt-out or a suppression stays known, so that
nobody undoes what another decided (`change_rules` says who may undo what). Contacts and accounts are marked as removed
and keep their opt-outs.

The path of a batch, a module a step:

    change_kinds       what the caller asks for
    change_model       load what it touches
    change_rules       change that in memory, and check it
    change_comparison  compare it with what was loaded: the rows to write, and the answer (`difference`)
    change_writing     write the rows, and the audit

`plan_batches` leaves out the last, so that a dry run can't disagree with the real one. One writer works at a time, on
PostgreSQL by a lock of the transaction, on SQLite by nature.

It owns the tables mailboxes, accounts, account_products, contacts, opt_outs, suppressions and audit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from sqlalchemy import Connection, func, select, text

from subscriptions.catalogue import Catalogue
from subscriptions.change_comparison import compare
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
from subscriptions.change_model import Model, load
from subscriptions.change_rules import carry_out, check, suppressed_by
from subscriptions.change_writing import write
from subscriptions.difference import LISTED, Difference
from subscriptions.directory import address_key
from subscriptions.documents import Fault

__all__ = [
    "LISTED",
    "Actor",
    "Change",
    "ChangeError",
    "Difference",
    "LiftSuppression",
    "NotFound",
    "PutAccount",
    "PutContact",
    "RemoveAccount",
    "RemoveContact",
    "SetOptOut",
    "Suppress",
    "apply",
    "apply_batches",
    "plan_batches",
    "suppressed_by",
]


class ChangeError(Exception):
    """A batch was refused and nothing of it was done; `faults` names each place, as ACCOUNT or ACCOUNT/CONTACT."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(f"{faults[0].place}: {faults[0].message}")
        self.faults = tuple(faults)


class NotFound(ChangeError):  # noqa: N818 - it reads as the sentence it is
    """The batch names an account, contact or address that the directory does not have."""


def apply(
    connection: Connection,
    actor: Actor,
    changes: Iterable[Change],
    *,
    catalogues: Mapping[str, Catalogue],
    now: int,
    why: str = "",
) -> Difference:
    """Do a batch of changes, all of it or nothing, in the caller's writing transaction.

    `now` is the time in microseconds UTC, `why` goes into the audit. Raises ChangeError or NotFound before anything of
    the batch is written. Raises the installation's guard once where something took away a reason to mail somebody.
    """
    return apply_batches(connection, actor, [changes], catalogues=catalogues, now=now, why=why)


def apply_batches(
    connection: Connection,
    actor: Actor,
    batches: Iterable[Iterable[Change]],
    *,
    catalogues: Mapping[str, Catalogue],
    now: int,
    why: str = "",
) -> Difference:
    """Do batches of changes one after another in one transaction; memory holds one of them at a time.

    As `apply` otherwise; where a batch is refused, the caller has to roll back what those before it did.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_WRITER_LOCK)))
    difference, guard = Difference(), False
    key = address_key(connection)
    for changes in batches:
        model = _changed(connection, key, actor, changes, catalogues=catalogues, now=now)
        found = compare(model)
        write(connection, model, found, why=why)
        difference.join(found.difference)
        guard = guard or found.guard
        del changes, model, found  # the next batch is made when this one is gone
    if guard:
        connection.execute(text("UPDATE installation SET guard = guard + 1"))
    return difference


def plan_batches(
    connection: Connection,
    actor: Actor,
    batches: Iterable[Iterable[Change]],
    *,
    catalogues: Mapping[str, Catalogue],
    now: int,
) -> Difference:
    """What `apply_batches` would do, by the same code; writes nothing."""
    difference = Difference()
    key = address_key(connection)
    for changes in batches:
        model = _changed(connection, key, actor, changes, catalogues=catalogues, now=now)
        difference.join(compare(model).difference)
        del changes, model
    return difference


_WRITER_LOCK: Final = 0x526F6C65
"""The PostgreSQL advisory lock that one writer of the directory holds at a time."""


def _changed(
    connection: Connection,
    key: bytes,
    actor: Actor,
    changes: Iterable[Change],
    *,
    catalogues: Mapping[str, Catalogue],
    now: int,
) -> Model:
    """Load what the changes touch, change it in memory, check it. Raises ChangeError or NotFound."""
    changes = list(changes)
    model = Model(actor, catalogues, now)
    load(connection, key, model, changes)
    for change in changes:
        carry_out(model, change)
    for ext in model.named:
        check(model, model.accounts[ext])
    if model.faults:
        raise ChangeError([*model.faults, *model.unknown])
    if model.unknown:
        raise NotFound(model.unknown)
    return model
