"""Who may ask for what, who may approve it, and which limits a change must keep. Pure.

Owns the authority half of rules.md 5.2: requester, condition, approver, limits, in this order. A role counts only
where its place is valid: places beyond a role's maximum are void, in order of assignment (S-41). What a person may
do is the union of what the person's valid roles allow, and nothing takes it away again (S-14).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from subscriptions.catalogue import Catalogue, Grant, Role

if TYPE_CHECKING:  # audience builds on this module; only the names of its facts are needed here
    from subscriptions.audience import AccountFacts, ContactFacts, EventFacts

STAFF: Final = "staff"  # requested_by of a request that the vendor's own staff entered
CONTACT_CHANGE: Final = "contact_change"  # the action of every change of contacts that no role claims for itself

# The changes of contacts that a request can carry: the complete list of rules.md 5.3, point 10.
CHANGES: Final = (
    "add_role",
    "remove_role",
    "replace_role",
    "add_contact",
    "remove_contact",
    "change_address",
    "update_contact",
    "set_products",
    "set_opt_out",
)

Place = tuple[str, str]  # (contact id, role key)
Right = Literal["may_do", "may_approve"]


@dataclass(frozen=True, slots=True)
class Permitted:
    """The request is complete: it may be carried out now. `action` is what the request amounts to (5.3, point 9)."""

    action: str


@dataclass(frozen=True, slots=True)
class NeedsApproval:
    """The requester may ask, and one of those who may approve `action` has yet to agree."""

    action: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The request is over; `reason` is one code of the contract, `roles` are those that may ask or approve (S-08)."""

    reason: str
    roles: tuple[str, ...] = ()


def may(catalogue: Catalogue, account: AccountFacts, request: EventFacts) -> Permitted | NeedsApproval | Refused:
    """Whether a request stands: requester's authority, condition, approver's authority, limits (rules.md 5.2)."""
    action = action_concerned(catalogue, account, request)
    void, _ = void_places(limits_of(catalogue), account.contacts)

    asking = _requester_grants(catalogue, account, request, action=action, void=void)
    if not asking:
        return Refused("not_authorised_to_request", roles_with(catalogue, action, "may_do"))
    if not any(condition_holds(grant.when, account.uses, request.context) for grant in asking):
        return Refused("condition_not_met")

    approved = not _needs_approval(catalogue, request, action)
    if not approved:
        # Who may approve an action approves the own request for it (S-07, S-36); a name given counts first.
        approver = request.requested_by if request.approved_by is None else request.approved_by
        approved = _may_approve(catalogue, account, request, approver=approver, action=action, void=void)
        if request.approved_by is not None and not approved:
            return Refused("not_authorised_to_approve", roles_with(catalogue, action, "may_approve"))

    if action in _change_actions(catalogue) and _breaks_a_limit(catalogue, account, request.change or {}):
        return Refused("rejected_by_cardinality")
    return Permitted(action) if approved else NeedsApproval(action)


def limits_of(catalogue: Catalogue) -> dict[str, int]:
    """The roles that have a maximum of holders, with it."""
    return {key: role.max for key, role in catalogue.roles.items() if role.max is not None}


def void_places(limits: Mapping[str, int], contacts: Iterable[ContactFacts]) -> tuple[set[Place], tuple[str, ...]]:
    """The places beyond each role's maximum, counted in order of assignment, and the roles that are over-full."""
    void: set[Place] = set()
    if not limits:
        return void, ()
    taken = dict.fromkeys(limits, 0)
    for contact in contacts:
        for role in taken.keys() & contact.roles:
            taken[role] += 1
            if taken[role] > limits[role]:
                void.add((contact.id, role))
    return void, tuple([role for role, count in taken.items() if count > limits[role]])


def condition_holds(condition: str | None, uses: Collection[str], context: Collection[str]) -> bool:
    """Whether a catalogue's condition is met: `account.uses:PRODUCT`, or a plain name among the request's context."""
    if condition is None:
        return True
    prefix, colon, product = condition.partition(":")
    if colon and prefix == "account.uses":
        return product in uses
    return condition in context


def is_required(role: Role, uses: Collection[str]) -> bool:
    """Whether the account must have a holder of the role: always, or while its condition is met (IT-08, IT-54)."""
    if role.requirement == "conditional":
        return condition_holds(role.required_when, uses, ())
    return role.requirement == "required"


def granting_roles(
    catalogue: Catalogue, contact: ContactFacts, action: str, *, void: Collection[Place], right: Right
) -> dict[str, Grant]:
    """The valid roles of a contact that grant an action, with the grants, whether their conditions are met or not."""
    found = {}
    for key in contact.roles:
        role = catalogue.roles.get(key)
        if role is None or (contact.id, key) in void:
            continue
        grant = _rights(role, right).get(action)
        if grant is not None:
            found[key] = grant
    return found


def roles_with(catalogue: Catalogue, action: str, right: Right) -> tuple[str, ...]:
    """The keys of the roles that may do or may approve an action, in the catalogue's order."""
    return tuple(key for key, role in catalogue.roles.items() if action in _rights(role, right))


def action_concerned(catalogue: Catalogue, account: AccountFacts, request: EventFacts) -> str:
    """The action that a request amounts to, whatever it is called (rules.md 5.3, point 9; S-10).

    An action named after a role (`payment_approver_change`) governs that role: giving or taking it, and the address
    and person of whoever holds it. Where a change concerns several such roles, the first in the catalogue decides.
    """
    assert request.action is not None
    actions = _change_actions(catalogue)
    change = request.change
    if change is None or change.get("change") not in CHANGES or request.action not in actions:
        return request.action
    concerned = _roles_concerned(account, change)
    return next((action for action, role in actions.items() if role in concerned), CONTACT_CHANGE)


def _rights(role: Role, right: Right) -> Mapping[str, Grant]:
    return role.may_do if right == "may_do" else role.may_approve


def _needs_approval(catalogue: Catalogue, request: EventFacts, action: str) -> bool:
    if request.requested_by == STAFF and not catalogue.staff_requests_need_approval:
        return False
    return action in catalogue.approvals


def _requester_grants(
    catalogue: Catalogue, account: AccountFacts, request: EventFacts, *, action: str, void: Collection[Place]
) -> list[Grant]:
    """What entitles the requester to ask; nothing where the requester may not.

    Staff may raise what the catalogue lists for approval, on the conditions under which it can be approved
    (rules.md 5.3, point 8).
    """
    if request.requested_by == STAFF:
        if action not in catalogue.approvals:
            return []
        return [catalogue.roles[key].may_approve[action] for key in roles_with(catalogue, action, "may_approve")]
    requester = _person_acting(account, request, request.requested_by)
    if requester is None:
        return []
    return list(granting_roles(catalogue, requester, action, void=void, right="may_do").values())


def _may_approve(
    catalogue: Catalogue,
    account: AccountFacts,
    request: EventFacts,
    *,
    approver: str | None,
    action: str,
    void: Collection[Place],
) -> bool:
    contact = None if approver == STAFF else _person_acting(account, request, approver)
    if contact is None:
        return False
    grants = granting_roles(catalogue, contact, action, void=void, right="may_approve").values()
    return any(condition_holds(grant.when, account.uses, request.context) for grant in grants)


def _person_acting(account: AccountFacts, request: EventFacts, contact_id: str | None) -> ContactFacts | None:
    """The contact of that id, if a person acts: a group inbox has to name one (S-34, rules.md 5.3, point 12)."""
    contact = next((contact for contact in account.contacts if contact.id == contact_id), None)
    if contact is None or (contact.kind == "group" and not (request.acted_by or "").strip()):
        return None
    return contact


def _change_actions(catalogue: Catalogue) -> dict[str, str | None]:
    """The catalogue's actions that change contacts, each with the role that it is named after."""
    actions: dict[str, str | None] = {}
    for key in catalogue.roles:
        action = f"{key}_change"
        if action in catalogue.approvals or roles_with(catalogue, action, "may_do"):
            actions[action] = key
    return {**actions, CONTACT_CHANGE: None}


def _roles_concerned(account: AccountFacts, change: Mapping[str, object]) -> set[str]:
    """The roles that a change gives or takes, and those of a contact whose address or person it changes."""
    given, taken = _moves(account, change)
    concerned = {role for _, role in (*given, *taken)}
    match change.get("change"):
        case "change_address":
            concerned.update(_roles_of(account, change.get("contact")))
        case "update_contact":
            fields = change.get("fields")
            if not isinstance(fields, Mapping) or fields.keys() - {"locale", "timezone"}:
                concerned.update(_roles_of(account, change.get("contact")))
        case "add_contact":  # under an id already in use it would change that contact
            added = change.get("contact")
            concerned.update(_roles_of(account, added.get("id") if isinstance(added, Mapping) else None))
    return concerned


def _breaks_a_limit(catalogue: Catalogue, account: AccountFacts, change: Mapping[str, object]) -> bool:
    """Whether a change gives a role beyond its maximum or takes it below its minimum (IT-02, IT-04, S-42).

    Holders are counted after the whole change, so that a replacement is one step; void places count, since they
    move up when an earlier one is given back.
    """
    given, taken = _moves(account, change)
    for key, role in catalogue.roles.items():
        gaining = {contact for contact, moved in given if moved == key}
        losing = {contact for contact, moved in taken if moved == key}
        if not gaining and not losing:
            continue
        before = {contact.id for contact in account.contacts if key in contact.roles}
        after = (before - losing) | gaining
        least = max(role.min, 1) if is_required(role, account.uses) else role.min
        if gaining and role.max is not None and len(after) > role.max:
            return True
        if before - after and len(after) < least:
            return True
    return False


def _moves(account: AccountFacts, change: Mapping[str, object]) -> tuple[set[Place], set[Place]]:
    """The places that a change gives, and those that it takes."""
    role, contact = str(change.get("role")), change.get("contact")
    match change.get("change"):
        case "add_role":
            return {(str(contact), role)}, set()
        case "remove_role":
            return set(), {(str(contact), role)}
        case "replace_role":
            return {(str(change.get("to")), role)}, {(str(change.get("from")), role)}
        case "add_contact" if isinstance(contact, Mapping):
            return {(str(contact.get("id")), key) for key in _texts(contact.get("roles"))}, set()
        case "remove_contact":
            return set(), {(str(contact), key) for key in _roles_of(account, contact)}
        case _:
            return set(), set()


def _roles_of(account: AccountFacts, contact_id: object) -> Iterator[str]:
    return (role for contact in account.contacts if contact.id == contact_id for role in contact.roles)


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []
