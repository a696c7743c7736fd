"""The differences of a batch as rows: one set for each table, then the audit of them.

The audit has one row for each account and batch, by row numbers and without addresses or names. It writes mailboxes,
accounts, account_products, contacts, opt_outs, suppressions and audit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, func, select, text

from subscriptions.change_comparison import Found
from subscriptions.change_model import Account, Contact, Model
from subscriptions.directory import listed
from subscriptions.schema import accounts, contacts, mailboxes

_INSERT: Final = {
    "mailboxes": "INSERT INTO mailboxes (id, address_key, address) VALUES (?, ?, ?)",
    "accounts": "INSERT INTO accounts (id, ext, name, catalogue) VALUES (?, ?, ?, ?)",
    "account_products": "INSERT INTO account_products (product, account_id) VALUES (?, ?)",
    "contacts": (
        "INSERT INTO contacts (id, account_id, ext, position, name, email, kind, roles, products, locale, timezone,"
        " unreachable, mailbox_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    ),
    "opt_outs": (
        "INSERT INTO opt_outs (contact_id, role, category, set_by, mailbox_id, source, set_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)"
    ),
    "audit": "INSERT INTO audit (at, actor, door, account_id, kind, body) VALUES (?, ?, ?, ?, ?, ?)",
}


def write(connection: Connection, model: Model, found: Found, *, why: str) -> None:
    """Write a batch's differences: one set of rows per table, then its audit."""
    numbers = _write_mailboxes(connection, model, found)
    _write_accounts(connection, model, found)
    created = _write_contacts(connection, model, found, numbers)
    _write_opt_outs(connection, found, numbers, created)
    _write_suppressions(connection, found, numbers)
    _insert(connection, "audit", _audit_rows(model, found, numbers, created, why))


_Numbers = Mapping[int | str, int]  # of the addresses that were new; other mailboxes are numbers already


def _write_mailboxes(connection: Connection, model: Model, found: Found) -> _Numbers:
    """Give each new address a row, and an erased one that is named again its address; the numbers of the new ones."""
    used: dict[int | str, None] = {contact.mailbox: None for _, contact in found.new_contacts}
    used |= {contact.mailbox: None for _, contact in found.changed_contacts}
    used |= {suppression[0]: None for suppression, _ in found.suppressions_set}
    new = [mailbox for mailbox in used if isinstance(mailbox, str)]
    numbers: dict[int | str, int] = dict(zip(new, _numbers(connection, "mailboxes", len(new)), strict=True))
    _insert(connection, "mailboxes", [(numbers[address], model.keys[address], address) for address in new])
    again = [(model.addresses[mailbox], mailbox) for mailbox in used if mailbox in model.erased]
    _run(connection, "UPDATE mailboxes SET address = ? WHERE id = ?", again)
    return numbers


def _write_accounts(connection: Connection, model: Model, found: Found) -> None:
    new = found.new_accounts
    for account, number in zip(new, _numbers(connection, "accounts", len(new)), strict=True):
        account.number = number
    _insert(connection, "accounts", [(one.number, one.ext, one.name, one.catalogue) for one in new])
    _run(
        connection,
        "UPDATE accounts SET name = ?, catalogue = ?, removed_at = ? WHERE id = ?",
        [(one.name, one.catalogue, model.now if one.removed else None, one.number) for one in found.changed_accounts],
    )
    used, unused = [], []
    for account in (*new, *found.changed_accounts):
        before = account.was.uses if account.was else frozenset[str]()
        used += [(product, account.number) for product in account.uses - before]
        unused += [(product, account.number) for product in before - account.uses]
    _run(connection, "DELETE FROM account_products WHERE product = ? AND account_id = ?", unused)
    _insert(connection, "account_products", used)


def _write_contacts(
    connection: Connection, model: Model, found: Found, numbers: _Numbers
) -> dict[tuple[str, str], int]:
    """Write new and changed contacts; returns the numbers of the new ones by account and contact id."""
    created: dict[tuple[str, str], int] = {}
    rows = []
    new_numbers = _numbers(connection, "contacts", len(found.new_contacts))
    for (account, contact), new_number in zip(found.new_contacts, new_numbers, strict=True):
        created[account.ext, contact.ext] = new_number
        rows.append((new_number, account.number, *contact[1:-2], numbers.get(contact.mailbox, contact.mailbox)))
    _insert(connection, "contacts", rows)
    _run(
        connection,
        "UPDATE contacts SET position = ?, name = ?, email = ?, kind = ?, roles = ?, products = ?, locale = ?,"
        " timezone = ?, unreachable = ?, mailbox_id = ?, removed_at = ? WHERE id = ?",
        [
            (
                *contact[2:-2],
                numbers.get(contact.mailbox, contact.mailbox),
                model.now if contact.removed else None,
                contact.number,
            )
            for _, contact in found.changed_contacts
        ],
    )
    return created


def _contact_number(account: Account, ext: str, created: Mapping[tuple[str, str], int]) -> int:
    return account.contacts[ext].number or created[account.ext, ext]


def _write_opt_outs(
    connection: Connection, found: Found, numbers: _Numbers, created: Mapping[tuple[str, str], int]
) -> None:
    _run(
        connection,
        "DELETE FROM opt_outs WHERE contact_id = ? AND role = ? AND category = ? AND set_by = ?",
        [(_contact_number(account, key[0], created), *key[1:]) for account, key in found.opt_outs_lifted],
    )
    rows = [
        (
            _contact_number(account, key[0], created),
            *key[1:],
            numbers.get(opt_out.mailbox, opt_out.mailbox),
            opt_out.source,
            opt_out.at,
        )
        for account, key, opt_out in found.opt_outs_set
    ]
    _insert(connection, "opt_outs", rows)


def _write_suppressions(connection: Connection, found: Found, numbers: _Numbers) -> None:
    _run(
        connection,
        "INSERT INTO suppressions (mailbox_id, cause, source, at, evidence) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (mailbox_id, cause, source) DO UPDATE"
        " SET at = excluded.at, evidence = excluded.evidence, lifted_at = NULL, lifted_by = NULL",
        [
            (numbers.get(mailbox, mailbox), cause, source, new.at, new.evidence)
            for (mailbox, cause, source), new in found.suppressions_set
        ],
    )
    _run(
        connection,
        "UPDATE suppressions SET lifted_at = ?, lifted_by = ? WHERE mailbox_id = ? AND cause = ? AND source = ?",
        [(lifted.lifted_at, lifted.lifted_by, *key) for key, lifted in found.suppressions_lifted],
    )


def _numbers(connection: Connection, table: str, count: int) -> Sequence[int]:
    """Row numbers that nobody else gets: this is the only writer of these tables, one at a time."""
    if not count:
        return ()
    if connection.dialect.name == "postgresql":
        sequence = text("SELECT nextval(pg_get_serial_sequence(:table, 'id')) FROM generate_series(1, :count)")
        return connection.execute(sequence, {"table": table, "count": count}).scalars().all()
    columns = {"mailboxes": mailboxes.c.id, "accounts": accounts.c.id, "contacts": contacts.c.id}
    last = connection.execute(select(func.max(columns[table]))).scalar() or 0
    return range(last + 1, last + 1 + count)


def _insert(connection: Connection, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows at the speed of the driver: COPY on PostgreSQL, prepared once on SQLite."""
    if not rows:
        return
    if connection.dialect.name != "postgresql":
        connection.exec_driver_sql(_INSERT[table], list(rows))
        return
    head = _INSERT[table].removeprefix("INSERT INTO ").partition(" VALUES")[0]
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(f"COPY {head} FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def _run(connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Run a statement once for each row, in one call of the driver."""
    if rows:
        marks = "%s" if connection.dialect.name == "postgresql" else "?"
        connection.exec_driver_sql(statement.replace("?", marks), list(rows))


# ---------------------------------------------------------------- the audit


def _audit_rows(
    model: Model, found: Found, numbers: _Numbers, created: Mapping[tuple[str, str], int], why: str
) -> list[tuple[Any, ...]]:
    """One row for each account, and one for the suppressions: row numbers stand for people and addresses."""
    said: dict[str, Any] = {"why": why} if why else {}
    head = (model.now, model.actor.name, model.actor.door)
    added: dict[str, list[int]] = {}
    for (ext, _), new_number in created.items():
        added.setdefault(ext, []).append(new_number)
    rows: list[tuple[Any, ...]] = []
    for account in found.new_accounts:
        body = said | {"after": _audit_head(account)}
        if account.ext in added:  # compact, so that a first import of a million stays cheap
            body["contacts"] = {"count": len(added[account.ext]), "first": added[account.ext][0]}
        rows.append((*head, account.number, "added", json.dumps(body)))
    opt_outs_by_account: dict[str, dict[str, list[Any]]] = {}
    for account, key, _ in found.opt_outs_set:
        whose = opt_outs_by_account.setdefault(account.ext, {})
        whose.setdefault("set", []).append([_contact_number(account, key[0], created), *key[1:]])
    for account, key in found.opt_outs_lifted:
        whose = opt_outs_by_account.setdefault(account.ext, {})
        whose.setdefault("lifted", []).append([_contact_number(account, key[0], created), *key[1:]])
    for account in found.touched:
        body = said | _audit_change(account, numbers, created)
        if account.ext in opt_outs_by_account:
            body["opt_outs"] = opt_outs_by_account[account.ext]
        assert account.was is not None
        kind = "removed" if account.removed else "added" if account.was.removed else "changed"
        rows.append((*head, account.number, kind, json.dumps(body)))
    if found.suppressions_set or found.suppressions_lifted:
        body = said | {
            "set": [[numbers.get(key[0], key[0]), *key[1:]] for key, _ in found.suppressions_set],
            "lifted": [[numbers.get(key[0], key[0]), *key[1:]] for key, _ in found.suppressions_lifted],
        }
        rows.append((*head, None, "suppressions", json.dumps(body)))
    return rows


def _audit_head(account: Account) -> dict[str, Any]:
    return {"name": account.name, "catalogue": account.catalogue, "uses": sorted(account.uses)}


def _audit_change(account: Account, numbers: _Numbers, created: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Before and after of what differs in an account."""
    was = account.was
    assert was is not None
    body: dict[str, Any] = {}
    if _audit_head(was) != _audit_head(account):
        body |= {"before": _audit_head(was), "after": _audit_head(account)}
    people: dict[str, Any] = {}
    for ext, contact in account.contacts.items():
        before = was.contacts.get(ext)
        if before == contact:
            continue
        who = str(contact.number or created[account.ext, ext])
        people[who] = {
            "before": None if before is None or before.removed else _audit_contact(before, numbers),
            "after": None if contact.removed else _audit_contact(contact, numbers),
        }
        if before and before.name != contact.name:
            people[who]["name"] = "changed"  # what it was and is would be personal data
    if people:
        body["contacts"] = people
    return body


def _audit_contact(contact: Contact, numbers: _Numbers) -> dict[str, Any]:
    return {
        "position": contact.position,
        "mailbox": numbers.get(contact.mailbox, contact.mailbox),
        "kind": contact.kind,
        "roles": listed(contact.roles),
        "products": None if contact.products is None else listed(contact.products),
        "locale": contact.locale,
        "timezone": contact.timezone,
        "unreachable": contact.unreachable,
    }
