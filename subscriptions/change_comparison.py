"""What differs between the model and what was loaded: for the caller's answer, and as rows to write."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from subscriptions.catalogue import Role
from subscriptions.change_model import (
    Account,
    Contact,
    Model,
    OptOut,
    OptOutKey,
    Suppression,
    SuppressionKey,
    opt_out_name,
    suppression_name,
)
from subscriptions.difference import Difference, Tally
from subscriptions.directory import listed


@dataclass(slots=True)
class Found:
    """The differences between a model and what was loaded: for the answer, and as rows to write."""

    difference: Difference = field(default_factory=Difference)
    guard: bool = False  # something took away a reason to mail somebody
    new_accounts: list[Account] = field(default_factory=list)
    changed_accounts: list[Account] = field(default_factory=list)  # removed ones too
    touched: list[Account] = field(default_factory=list)  # known ones with any difference
    new_contacts: list[tuple[Account, Contact]] = field(default_factory=list)
    changed_contacts: list[tuple[Account, Contact]] = field(default_factory=list)  # removed ones too
    opt_outs_set: list[tuple[Account, OptOutKey, OptOut]] = field(default_factory=list)
    opt_outs_lifted: list[tuple[Account, OptOutKey]] = field(default_factory=list)
    suppressions_set: list[tuple[SuppressionKey, Suppression]] = field(default_factory=list)
    suppressions_lifted: list[tuple[SuppressionKey, Suppression]] = field(default_factory=list)


def compare(model: Model) -> Found:
    """Compare the model with what was loaded."""
    found = Found()
    difference = found.difference
    for account in model.accounts.values():
        _compare_account(model, account, found)
    suppressions = [
        ((mailbox, *cause_and_source), suppression)
        for mailbox, against in model.suppressions.items()
        for cause_and_source, suppression in against.items()
    ]
    for key, now in suppressions:
        if model.suppressions_were.get(key) == now:
            continue
        if now.lifted_at is None:
            found.suppressions_set.append((key, now))
            difference.suppressions_set.add(suppression_name(model, key))
        else:
            found.suppressions_lifted.append((key, now))
            difference.suppressions_lifted.add(suppression_name(model, key))
    difference.opt_outs_kept = model.opt_outs_kept
    difference.suppressions_kept = model.suppressions_kept
    found.guard = found.guard or bool(
        found.opt_outs_set or found.opt_outs_lifted or found.suppressions_set or found.suppressions_lifted
    )
    return found


def _compare_account(model: Model, account: Account, found: Found) -> None:
    difference, was = found.difference, account.was
    contacts_differ = _compare_contacts(account, found)
    opt_outs_differ = _compare_opt_outs(account, found)
    if was is None:
        found.new_accounts.append(account)
        difference.accounts_added.add(account.ext)
    else:
        head_differs = (account.name, account.catalogue, account.uses) != (was.name, was.catalogue, was.uses)
        if head_differs or account.removed != was.removed:
            found.changed_accounts.append(account)
        if account.removed != was.removed:
            (difference.accounts_removed if account.removed else difference.accounts_added).add(account.ext)
            found.guard = found.guard or account.removed
        elif head_differs or contacts_differ or opt_outs_differ:
            difference.accounts_changed.add(account.ext)
        elif account.ext in model.named:
            difference.accounts_unchanged += 1
        if head_differs or contacts_differ or opt_outs_differ or account.removed != was.removed:
            found.touched.append(account)
    if account.ext in model.named and not account.removed:
        _note(model, account, difference.notes)


def _compare_contacts(account: Account, found: Found) -> bool:
    """Sort the contacts of an account by what becomes of them; whether anything does."""
    difference = found.difference
    were = account.was.contacts if account.was else {}
    differ = False
    for ext, contact in account.contacts.items():
        before = were.get(ext)
        if before == contact:
            difference.contacts_unchanged += not contact.removed
            continue
        differ = True
        name = f"{account.ext}/{ext}"
        if before is None:
            found.new_contacts.append((account, contact))
        else:
            found.changed_contacts.append((account, contact))
            found.guard = found.guard or contact.removed or contact.mailbox != before.mailbox
        if before is None or before.removed:
            difference.contacts_added.add(name)
            _compare_roles(name, (), listed(contact.roles), difference)
        elif contact.removed:
            difference.contacts_removed.add(name)
            _compare_roles(name, listed(before.roles), (), difference)
        elif before._replace(position=contact.position) == contact:
            difference.contacts_unchanged += 1  # only the order of the list is another
        else:
            difference.contacts_changed.add(name)
            _compare_roles(name, listed(before.roles), listed(contact.roles), difference)
    return differ


def _compare_roles(name: str, before: Collection[str], after: Collection[str], difference: Difference) -> None:
    if before == after:
        return
    given, taken = difference.roles_given, difference.roles_taken
    if not before and given.full:
        given.count += len(after)
        return
    for role in after:
        if role not in before:
            given.add(f"{name} {role}")
    for role in before:
        if role not in after:
            taken.add(f"{name} {role}")


def _compare_opt_outs(account: Account, found: Found) -> bool:
    were = account.was.opt_outs if account.was else {}
    if account.opt_outs.keys() == were.keys():
        return False
    for key, opt_out in account.opt_outs.items():
        if key not in were:
            found.opt_outs_set.append((account, key, opt_out))
            found.difference.opt_outs_set.add(opt_out_name(account, key))
    for key in were:
        if key not in account.opt_outs:
            found.opt_outs_lifted.append((account, key))
            found.difference.opt_outs_lifted.add(opt_out_name(account, key))
    return True


# ---------------------------------------------------------------- what is void, or vacant


def _note(model: Model, account: Account, notes: Tally) -> None:
    """Say what of an account is accepted but void, or vacant: S-41, S-43, S-23."""
    catalogue = model.catalogues[account.catalogue]
    watched = {role.key: role for role in catalogue.roles.values() if role.max is not None or _needed(role, account)}
    if watched:
        holders: dict[str, list[str]] = {key: [] for key in watched}
        for contact in account.live():
            for key in contact.roles.split(","):
                if key in holders:
                    holders[key].append(contact.ext)
        for key, held_by in holders.items():
            limit = watched[key].max
            if limit is not None and len(held_by) > limit:
                void = ", ".join(held_by[limit:])
                notes.add(f"{account.ext}: more than {limit} hold {key}; it is void for {void} (S-41)")
            if not held_by and _needed(watched[key], account):
                notes.add(f"{account.ext}: nobody holds {key}, which is {watched[key].requirement} (S-43)")
    for opt_out in account.opt_outs:
        ext, role_key, category, _ = opt_out
        role = catalogue.roles.get(role_key)
        received = role.receives.get(category) if role else None
        promotional = catalogue.vocabulary.categories[category].class_ == "promotional"  # holds for the address
        if not account.contacts[ext].removed and not promotional and (received is None or not received.opt_out):
            notes.add(f"{opt_out_name(account, opt_out)}: the catalogue does not allow this opt-out; it is void (S-23)")


def _needed(role: Role, account: Account) -> bool:
    """Whether the role has to be held: required, or conditional on a product that the account uses."""
    if role.requirement == "conditional":
        product = (role.required_when or "").removeprefix("account.uses:")
        return product in account.uses
    return role.requirement == "required"
