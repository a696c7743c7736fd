"""What each change does to the model, and what is refused: who may undo what another decided.

    set by                 undone by
    import, operator       import, operator, recipient
    recipient              recipient
    complaint              operator

An import only ever lifts suppressions that an import of the same account set; hard bounces and complaints stand until
an operator lifts them, whoever set them. What cannot be done is noted in the model as a fault (wrong in itself) or as
unknown (the directory does not have it); the batch goes on, so that its caller hears of all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Final

from subscriptions.addresses import normalise
from subscriptions.catalogue import Catalogue
from subscriptions.change_kinds import (
    Change,
    LiftSuppression,
    PutAccount,
    PutContact,
    RemoveAccount,
    RemoveContact,
    SetOptOut,
    Suppress,
)
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
from subscriptions.directory import listed
from subscriptions.documents import ABSENT, Absent, AccountRecord, ContactRecord, Fault, OptOutRecord, given

MAY_LIFT: Final[Mapping[str, frozenset[str]]] = {
    "import": frozenset({"import", "operator"}),
    "operator": frozenset({"import", "operator", "complaint"}),
    "recipient": frozenset({"import", "operator", "recipient"}),
    "complaint": frozenset(),
}
#: Whose opt-outs each may lift.

LASTING_CAUSES: Final = frozenset({"hard_bounce", "complaint", "erased"})
#: Causes of suppressions that no import lifts.


def carry_out(model: Model, change: Change) -> None:
    """Do one change in the model; what cannot be done is noted there."""
    match change:
        case PutAccount(record):
            _put_account(model, record)
        case RemoveAccount(ext):
            _remove_account(model, ext)
        case PutContact():
            _put_contact(model, change)
        case RemoveContact(account, ext):
            _remove_contact(model, account, ext)
        case SetOptOut():
            _set_opt_out(model, change)
        case Suppress(mailbox, cause, source, evidence):
            number = _suppressed_mailbox(model, mailbox)
            if number is not None:
                _suppress(model, (number, cause, source), Suppression(model.now, evidence, None, None))
        case LiftSuppression(mailbox, cause):
            _lift_suppression(model, mailbox, cause)


# ---------------------------------------------------------------- accounts and contacts


def _put_account(model: Model, record: AccountRecord) -> None:
    account = model.accounts.get(record.id)
    if account is None:
        account = model.accounts[record.id] = Account(0, record.id, "", "", frozenset(), True, {}, {})
    if account.removed:  # new, or back again: what is not said has its default
        account.removed, account.name, account.uses = False, "", frozenset()
    account.catalogue = record.catalogue
    account.name = given(record.name, account.name) or ""
    account.uses = given(record.uses, account.uses)
    model.named.add(account.ext)
    if not isinstance(record.contacts, Absent):
        _replace_contacts(model, account, record.contacts)
    if not (isinstance(record.suppressions, Absent) and isinstance(record.bounced, Absent)):
        _put_suppressions(model, account, record)


def _replace_contacts(model: Model, account: Account, records: Sequence[ContactRecord]) -> None:
    """Make the contacts those of the list, in its order; who is not in it is removed."""
    last = 0
    for record in records:
        before = account.contacts.get(record.id)
        last = before.position if before and not before.removed and before.position > last else last + 1
        _put(model, account, record, before, position=last, mailbox=model.mailbox(record.address))
    if len(account.contacts) > len(records):
        wanted = {record.id for record in records}
        for ext, contact in account.contacts.items():
            if ext not in wanted and not contact.removed:
                account.contacts[ext] = contact._replace(removed=True)


def _put_contact(model: Model, change: PutContact) -> None:
    account = model.account(change.account)
    if account is None:
        return
    before = account.contacts.get(change.id)
    live = before is not None and not before.removed
    if not live and isinstance(change.email, Absent):
        place = f"{change.account}/{change.id}"
        model.unknown.append(Fault(place, f"there is no contact {place!r}; give its email to add it"))
        return
    mailbox = before.mailbox if before else ""
    if not isinstance(change.email, Absent):
        mailbox = model.mailbox(normalise(change.email))
    position = before.position if before and live else _after_last(account)
    _put(model, account, change, before, position=position, mailbox=mailbox)
    model.named.add(account.ext)


def _after_last(account: Account) -> int:
    return max((contact.position for contact in account.contacts.values()), default=0) + 1


def _put(
    model: Model,
    account: Account,
    given: ContactRecord | PutContact,
    before: Contact | None,
    *,
    position: int,
    mailbox: int | str,
) -> None:
    """Add a contact, or change what is given of a known one; a removed one comes back with the defaults."""
    base = _NEW if before is None or before.removed else before
    number = 0 if before is None else before.number
    products = given.products
    if products is not ABSENT and products is not None and not products:
        place = f"{account.ext}/{given.id}"
        model.faults.append(Fault(place, "its products are empty; give none for all, or set opt-outs"))
    account.contacts[given.id] = Contact(
        number,
        given.id,
        position,
        base.name if given.name is ABSENT else given.name or "",
        base.email if given.email is ABSENT else given.email.strip(),
        base.kind if given.kind is ABSENT else given.kind,
        base.roles if given.roles is ABSENT else _stored(tuple(given.roles)),
        base.products if products is ABSENT else None if products is None else _stored(frozenset(products)),
        base.locale if given.locale is ABSENT else given.locale or "",
        base.timezone if given.timezone is ABSENT else given.timezone or "",
        base.unreachable if given.unreachable is ABSENT else given.unreachable,
        mailbox,
        False,
    )
    opt_outs_given = ABSENT if isinstance(given, PutContact) else given.opt_outs
    if not isinstance(opt_outs_given, Absent) and (opt_outs_given or before is not None):
        _put_opt_outs(model, account, account.contacts[given.id], opt_outs_given)


_NEW: Final = Contact(0, "", 0, "", "", "person", "", None, "", "", unreachable=False, mailbox="", removed=False)
"""What a new contact has where nothing else is said."""


@lru_cache(maxsize=4096)
def _stored(values: Collection[str]) -> str:
    return ",".join(sorted(set(values)))


def _remove_account(model: Model, ext: str) -> None:
    account = model.account(ext)
    if account is None:
        return
    account.removed = True
    for contact in account.live():
        account.contacts[contact.ext] = contact._replace(removed=True)


def _remove_contact(model: Model, account_ext: str, ext: str) -> None:
    found = model.contact(account_ext, ext)
    if found is None:
        return
    account, contact = found
    account.contacts[ext] = contact._replace(removed=True)
    model.named.add(account.ext)


# ---------------------------------------------------------------- opt-outs


def _put_opt_outs(model: Model, account: Account, contact: Contact, records: Sequence[OptOutRecord]) -> None:
    """Make a contact's opt-outs those of the list, as far as the actor may lift what is not in it."""
    named = set[OptOutKey]()
    for record in records:
        key = (contact.ext, record.role, record.category, record.by)
        named.add(key)
        if key not in account.opt_outs:
            at = model.now if record.at is None else record.at
            account.opt_outs[key] = OptOut(contact.mailbox, model.actor.name, at)
    # A role of a catalogue that the account had before is no word of its document: its opt-outs stay.
    roles = model.catalogues[account.catalogue].roles
    others = [key for key in account.opt_outs if key[0] == contact.ext and key not in named and key[1] in roles]
    for key in others:
        _lift_opt_out(model, account, key, model.actor.sets_as)


def _lift_opt_out(model: Model, account: Account, key: OptOutKey, who: str) -> None:
    """Take an opt-out away where that one may; note it as kept otherwise."""
    if key[3] in MAY_LIFT[who]:
        del account.opt_outs[key]
    else:
        model.opt_outs_kept.add(opt_out_name(account, key))


def _set_opt_out(model: Model, change: SetOptOut) -> None:
    where = change.contact if isinstance(change.contact, tuple) else model.located.get(change.contact)
    if where is None:
        model.unknown.append(Fault(str(change.contact), f"there is no contact with the number {change.contact}"))
        return
    found = model.contact(*where)
    if found is None:
        return
    account, contact = found
    catalogue = model.catalogues[account.catalogue]
    place = f"{account.ext}/{contact.ext}"
    category = catalogue.vocabulary.categories.get(change.category)
    if category is None:
        model.faults.append(Fault(place, f"{change.category!r} is no category; see the catalogue's vocabulary"))
        return
    if change.role is not None and change.role not in catalogue.roles:
        known = ", ".join(catalogue.roles)
        model.faults.append(Fault(place, f"{change.role!r} is no role of {catalogue.key}; its roles are {known}"))
        return
    roles = [change.role] if change.role is not None else _roles_that_allow(catalogue, change.category)
    if not roles:
        model.faults.append(Fault(place, f"no role of {catalogue.key} may opt out of {change.category!r} (S-23)"))
        return
    if change.opted_out:
        for role in roles:
            key = (contact.ext, role, change.category, change.set_by)
            account.opt_outs.setdefault(key, OptOut(contact.mailbox, model.actor.name, model.now))
        return
    everywhere = category.class_ == "promotional" and change.set_by == "recipient"
    for other in model.accounts.values() if everywhere else [account]:
        for key, opt_out in list(other.opt_outs.items()):
            theirs = other is account and key[0] == contact.ext and key[1] in roles
            address_too = everywhere and contact.mailbox in {opt_out.mailbox, other.contacts[key[0]].mailbox}
            if key[2] == change.category and (theirs or address_too):
                _lift_opt_out(model, other, key, change.set_by)


def _roles_that_allow(catalogue: Catalogue, category: str) -> list[str]:
    return [
        role.key for role in catalogue.roles.values() if category in role.receives and role.receives[category].opt_out
    ]


# ---------------------------------------------------------------- suppressions


def _put_suppressions(model: Model, account: Account, record: AccountRecord) -> None:
    """Add the suppressions of a document; lift those that an import of this account set and that it names no more."""
    own = f"import:{account.ext}"
    named = set[tuple[int | str, str]]()
    for address in given(record.bounced, ()):
        mailbox = model.mailbox(address)
        named.add((mailbox, "hard_bounce"))
        _suppress(model, (mailbox, "hard_bounce", own), Suppression(model.now, "", None, None))
    for one in given(record.suppressions, ()):
        mailbox = model.mailbox(one.address)
        named.add((mailbox, one.cause))
        if not _said_already(model, mailbox, one.cause, one.by, own):
            source = own if one.by == "import" else f"{one.by}:{own}"
            at = model.now if one.at is None else one.at
            _suppress(model, (mailbox, one.cause, source), Suppression(at, "", None, None))
    if isinstance(record.suppressions, Absent):
        return
    held = {contact.mailbox for contact in account.contacts.values() if not contact.removed}
    for mailbox in held | model.sources.get(own, set()):
        for (cause, source), standing in model.suppressions.get(mailbox, {}).items():
            if standing.lifted_at is not None or (mailbox, cause) in named:
                continue
            if source == own and cause not in LASTING_CAUSES:
                lifted = standing._replace(lifted_at=model.now, lifted_by=model.actor.name)
                model.suppressions[mailbox][cause, source] = lifted
            else:
                model.suppressions_kept.add(suppression_name(model, (mailbox, cause, source)))


def suppressed_by(cause: str, source: str) -> str:
    """Who a suppression counts as set by in a document: the first word of its source where documents know it."""
    first = source.partition(":")[0]
    if first in {"recipient", "operator", "import", "complaint"}:
        return first
    return "complaint" if cause == "complaint" else "import"


def _said_already(model: Model, mailbox: int | str, cause: str, by: str, own: str) -> bool:
    """Whether what a document says stands: by an import of the account itself, or by others than imports."""
    return any(
        standing.lifted_at is None
        and why == cause
        and suppressed_by(cause, source) == by
        and (source == own or not source.startswith("import:"))
        for (why, source), standing in model.suppressions.get(mailbox, {}).items()
    )


def _suppress(model: Model, key: SuppressionKey, new: Suppression) -> None:
    mailbox, cause, source = key
    against = model.suppressions.setdefault(mailbox, {})
    standing = against.get((cause, source))
    if standing is None or standing.lifted_at is not None:
        against[cause, source] = new


def _suppressed_mailbox(model: Model, mailbox: int | str) -> int | str | None:
    """The mailbox that a suppression is about, or None with a fault for a number without a row."""
    if isinstance(mailbox, str):
        return model.mailbox(normalise(mailbox))
    if mailbox in model.addresses:
        return mailbox
    model.unknown.append(Fault(str(mailbox), f"there is no mailbox with the number {mailbox}"))
    return None


def _lift_suppression(model: Model, mailbox: int | str, cause: str | None) -> None:
    number = _suppressed_mailbox(model, mailbox)
    lifted = False
    if number is None:
        return
    against = model.suppressions.get(number, {})
    for (why, source), standing in against.items():
        if standing.lifted_at is None and (why == cause if cause else why != "erased"):
            against[why, source] = standing._replace(lifted_at=model.now, lifted_by=model.actor.name)
            lifted = True
    if not lifted:
        which = f"no suppression for {cause}" if cause else "no suppression"
        model.unknown.append(Fault(str(mailbox), f"{which} stands against {mailbox}; see `rolecast suppressions list`"))


# ---------------------------------------------------------------- checking the model


def check(model: Model, account: Account) -> None:
    """Refuse a role that the catalogue doesn't have, and a group in a role that needs a person (S-34)."""
    catalogue = model.catalogues.get(account.catalogue)
    if catalogue is None:
        titles = ", ".join(model.catalogues)
        model.faults.append(Fault(account.ext, f"{account.catalogue!r} is no catalogue; known are {titles}"))
        return
    # What the same catalogue accepted before is not looked at again.
    known = account.was.contacts if account.was and account.was.catalogue == account.catalogue else {}
    for contact in account.contacts.values():
        if contact.removed or known.get(contact.ext) == contact:
            continue
        kind = (account.catalogue, contact.roles, contact.kind)
        if kind not in model.role_faults:
            model.role_faults[kind] = _role_fault(catalogue, contact.roles, contact.kind)
        message = model.role_faults[kind]
        if message is not None:
            model.faults.append(Fault(f"{account.ext}/{contact.ext}", message))


def _role_fault(catalogue: Catalogue, roles: str, kind: str) -> str | None:
    for key in listed(roles):
        role = catalogue.roles.get(key)
        if role is None:
            return f"{key!r} is no role of {catalogue.key}; its roles are {', '.join(catalogue.roles)}"
        if kind not in role.holder_kinds:
            return f"the role {key!r} needs a person, but this contact is of kind {kind!r}"
    return None
