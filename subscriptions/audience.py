"""Who hears of an event, and why the others do not. Pure: no database, no clock, no other account.

`resolve` gives every contact of one account a verdict with its reason, in the order of evaluation of rules.md 5.2.
Dry run, explain, coverage and the real fan-out all call it, so they cannot disagree. Two rules are code, because no
data may switch them off: a status-page category never has a recipient (S-01, S-39), and only a role that signs gets
an e-signature request (XC-08).

What is made per contact is never changed after it was made, but not frozen: that would cost four times as much, and
a broadcast makes a million of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from subscriptions.catalogue import OPT_OUT_CLASSES, Catalogue, Category, Receives, Role
from subscriptions.permissions import (
    NeedsApproval,
    Place,
    Refused,
    condition_holds,
    granting_roles,
    is_required,
    limits_of,
    may,
    roles_with,
    void_places,
)

Match = tuple[str, str]  # (role, reason)
Drop = tuple[str | None, str]  # (role, reason); the role is None where no role would have matched

APPROVAL_REQUEST: Final = "approval_request"  # the category of every request (rules.md 5.3, point 14)
CONTACT_LIST: Final = "contact_list"  # the one action that is answered by mail, to the requester alone (BT-03, S-06)

_NO_ROLE_MATCH: Final[tuple[Drop, ...]] = ((None, "no_role_match"),)


@dataclass(slots=True)
class ContactFacts:
    """One contact of an account, as the rules see it. `email` is normalised; `number` and `mailbox` are row numbers."""

    id: str  # unique in its account
    email: str
    roles: tuple[str, ...]
    kind: str = "person"
    products: frozenset[str] | None = None  # product preferences; None = all
    opt_outs: frozenset[tuple[str, str]] = frozenset()  # (role, category), as recorded on this contact
    unreachable: bool = False  # an operator says so: opens fallbacks, the contact still gets mail
    number: int = 0
    mailbox: int = 0


@dataclass(slots=True)
class AccountFacts:
    """One account with its contacts in order of assignment. Addresses are normalised."""

    id: str
    catalogue: str
    uses: frozenset[str]
    contacts: tuple[ContactFacts, ...]
    suppressed: frozenset[str] = frozenset()  # addresses that are never mailed (XC-06)
    opted_out: frozenset[tuple[str, str]] = frozenset()  # (address, promotional category), from any record (XC-07)
    complained: frozenset[str] = frozenset()  # addresses that get no promotional or informational mail (XC-06)
    number: int = 0


@dataclass(frozen=True, slots=True)
class EventFacts:
    """What the rules look at in an event; `action` is set exactly for requests."""

    category: str
    products: tuple[str, ...] = ()
    action: str | None = None
    requested_by: str | None = None  # a contact id, or "staff"
    approved_by: str | None = None  # a contact id
    acted_by: str | None = None  # the person behind a group inbox
    change: Mapping[str, object] | None = None  # rules.md 5.3, point 10
    context: frozenset[str] = frozenset()  # names that conditions use


@dataclass(slots=True)
class Recipient:
    """A contact that gets a copy; `deduplicated` where more than one contact-role match was merged into it."""

    contact: ContactFacts
    delivery: str  # email, esign_request, approval_request, contact_list
    matched: tuple[Match, ...]
    dropped: tuple[Drop, ...]
    deduplicated: bool


@dataclass(slots=True)
class Excluded:
    """A contact that gets nothing, with each role that would have matched and why it did not."""

    contact: ContactFacts
    dropped: tuple[Drop, ...]


@dataclass(slots=True)
class Verdicts:
    """The outcome for one account, and a verdict for each of its contacts (none where no fan-out happens)."""

    outcome: str
    reason: str | None
    category: str
    recipients: tuple[Recipient, ...] = ()
    excluded: tuple[Excluded, ...] = ()
    warnings: tuple[str, ...] = ()
    authorised_roles: tuple[str, ...] = ()  # who may ask or approve, where the requester or approver may not (S-08)


def resolve(catalogue: Catalogue, account: AccountFacts, event: EventFacts) -> Verdicts:
    """The verdicts of one account on one event (rules.md 5.2 and 5.3)."""
    if event.category not in catalogue.categories:
        return _stopped(account, event, "rejected", "category_not_in_catalogue", ("category_not_in_catalogue",))
    if _belongs_on_status_page(catalogue, event.category):
        return _stopped(account, event, "redirected_to_status_page", "status_page_category")
    if event.action is not None:
        return _resolve_request(catalogue, account, event)
    products = _products_in_use(catalogue, account, event)
    if products is not None and not products:
        return _stopped(account, event, "no_recipient", "product_not_on_account")
    recipients, excluded, warnings = _FanOut(_plan_for(catalogue, event.category), account, products).run()
    if not recipients:
        return Verdicts("no_recipient", "no_reachable_recipient", event.category, (), excluded, warnings)
    return Verdicts("deliver", None, event.category, recipients, excluded, warnings)


def answer(
    verdicts: Verdicts,
    *,
    source: str,
    event: str,
    account: str,
    status_page: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The verdicts as the JSON-ready answer of contract section 6; `event` and `account` are ids."""
    result: dict[str, object] = {
        "source": source,
        "event": event,
        "account": account,
        "category": verdicts.category,
        "outcome": verdicts.outcome,
        "reason": verdicts.reason,
        "recipients": [
            {
                "contact": recipient.contact.id,
                "email": recipient.contact.email,
                "delivery": recipient.delivery,
                "matched": _pairs(recipient.matched),
                "dropped": _pairs(recipient.dropped),
                "deduplicated": recipient.deduplicated,
            }
            for recipient in verdicts.recipients
        ],
        "excluded": [
            {"contact": excluded.contact.id, "dropped": _pairs(excluded.dropped)} for excluded in verdicts.excluded
        ],
        "warnings": list(verdicts.warnings),
    }
    if verdicts.authorised_roles:
        result["authorised_roles"] = list(verdicts.authorised_roles)
    if verdicts.outcome == "redirected_to_status_page":
        result["status_page"] = dict(status_page) if status_page is not None else {"url": None, "incident": None}
    return result


def _pairs(pairs: Iterable[tuple[str | None, str]]) -> list[dict[str, str | None]]:
    return [{"role": role, "reason": reason} for role, reason in pairs]


# ---------------------------------------------------------------- steps 1 to 3: before roles are looked at


def _stopped(
    account: AccountFacts, event: EventFacts, outcome: str, reason: str, warnings: tuple[str, ...] = ()
) -> Verdicts:
    """Every contact excluded for one reason that has nothing to do with roles (rules.md 5.3, point 1)."""
    code = "redirected_to_status_page" if reason == "status_page_category" else reason
    dropped: tuple[Drop, ...] = ((None, code),)
    excluded = tuple(Excluded(contact, dropped) for contact in account.contacts)
    return Verdicts(outcome, reason, event.category, (), excluded, warnings)


def _belongs_on_status_page(catalogue: Catalogue, category: str) -> bool:
    """By the vocabulary's class or by the catalogue's own word: either is enough, neither can overrule (XC-04)."""
    by_class = catalogue.vocabulary.categories[category].class_ == "status"
    return by_class or catalogue.categories[category].delivery == "status_page"


def _products_in_use(catalogue: Catalogue, account: AccountFacts, event: EventFacts) -> frozenset[str] | None:
    """The event's products that the account uses; None where products play no part (S-44, rules.md 5.3, point 2)."""
    if not event.products or not catalogue.vocabulary.categories[event.category].product_tagged:
        return None
    return account.uses.intersection(event.products)


# ---------------------------------------------------------------- what a catalogue says, worked out once


class _Plan:
    """Which roles receive one category and how; kept per catalogue and category, since audiences are large."""

    def __init__(self, catalogue: Catalogue, category: Category, receives: Mapping[str, Receives]) -> None:
        self.category = category
        self.limits = limits_of(catalogue)
        self.receives = receives
        # Roles to warn about where nobody can be reached, if the account has to have them (rules.md 5.3, point 4).
        self.duties = tuple(
            catalogue.roles[key]
            for key, entry in receives.items()
            if entry.mode in {"direct", "esign"} and _may_be_single(catalogue.roles[key])
        )
        fallbacks = {entry.when_unreachable for entry in receives.values() if entry.when_unreachable is not None}
        self.watched = fallbacks.union(role.key for role in self.duties)
        # Contacts hold few different sets of roles: what a set means is worked out once.
        self.held = lru_cache(maxsize=4096)(self._held)

    def _held(self, roles: tuple[str, ...]) -> _Held:
        distinct = dict.fromkeys(roles)
        entries = tuple((role, self.receives[role]) for role in distinct if role in self.receives)
        matches = tuple((role, _MATCHED[entry.mode]) for role, entry in entries)
        return _Held(
            entries,
            watched=tuple(role for role in distinct if role in self.watched),
            limited=tuple(role for role in distinct if role in self.limits),
            matches=None if any(entry.mode == "fallback" for _, entry in entries) else matches,
            signs=any(entry.mode == "esign" for _, entry in entries),
        )


@dataclass(frozen=True, slots=True)
class _Held:
    """What a set of roles means for one category."""

    entries: tuple[tuple[str, Receives], ...]  # those that receive it
    watched: tuple[str, ...]
    limited: tuple[str, ...]  # those that have a maximum of holders
    matches: tuple[Match, ...] | None  # what matches where nothing stands against it; None where others decide
    signs: bool  # one of the entries asks for a signature


def _may_be_single(role: Role) -> bool:
    return role.max == 1 or role.requirement in {"required", "conditional"}


_plans: dict[tuple[int, str], tuple[Catalogue, _Plan]] = {}  # holds the catalogue, so that its id stays its own


def _plan_for(catalogue: Catalogue, category: str) -> _Plan:
    known = _plans.get((id(catalogue), category))
    if known is not None:
        return known[1]
    receives = {key: role.receives[category] for key, role in catalogue.roles.items() if category in role.receives}
    plan = _Plan(catalogue, catalogue.vocabulary.categories[category], receives)
    _plans[id(catalogue), category] = catalogue, plan
    return plan


# ---------------------------------------------------------------- steps 4 to 7: roles, mailboxes, warnings


_Judged = tuple[ContactFacts, tuple[Match, ...], tuple[Drop, ...], bool]
"""What steps 4 and 5 say about one contact: matched, dropped, and whether a match asks for a signature."""


class _FanOut:
    """One event in one account: everything that a contact's verdict depends on, and the verdicts."""

    __slots__ = ("account", "held", "ignored", "over_full", "plan", "products", "reachable", "unwanted", "void")

    def __init__(self, plan: _Plan, account: AccountFacts, products: frozenset[str] | None) -> None:
        self.plan = plan
        self.account = account
        self.products = products
        self.held = [plan.held(contact.roles) for contact in account.contacts]
        self.void, self.over_full = self._void_places()
        self.reachable = self._reachable_roles()
        self.unwanted = _unwanted_at(plan.category, account)
        self.ignored: dict[str, None] = {}  # warnings about opt-outs that the catalogue does not allow, each once

    def run(self, delivery: str = "email") -> tuple[tuple[Recipient, ...], tuple[Excluded, ...], tuple[str, ...]]:
        """Recipients, excluded contacts and warnings; every contact is in exactly one of the first two."""
        judged = self._judge_all()
        emails = [contact.email for contact, matched, _, _ in judged if matched]
        if len(set(emails)) == len(emails):  # as almost always: there is nothing to merge
            recipients = tuple(
                [
                    Recipient(contact, "esign_request" if signs else delivery, matched, dropped, len(matched) > 1)
                    for contact, matched, dropped, signs in judged
                    if matched
                ]
            )
            excluded = tuple(
                [Excluded(contact, dropped or _NO_ROLE_MATCH) for contact, matched, dropped, _ in judged if not matched]
            )
            return recipients, excluded, self._warnings(recipients)
        mailboxes: dict[str, list[_Judged]] = {}
        for verdict in judged:
            if verdict[1]:
                mailboxes.setdefault(verdict[0].email, []).append(verdict)
        recipients = tuple([_merge(verdicts, delivery) for verdicts in mailboxes.values()])
        excluded = tuple(
            [_exclude(verdict) for verdict in judged if not verdict[1] or mailboxes[verdict[0].email][0] is not verdict]
        )
        return recipients, excluded, self._warnings(recipients)

    def _void_places(self) -> tuple[set[Place], tuple[str, ...]]:
        limited = [role for held in self.held for role in held.limited] if self.plan.limits else ()
        if len(set(limited)) == len(limited):  # nobody shares such a role, and each may be held once at least
            return set(), ()
        return void_places(self.plan.limits, self.account.contacts)

    def _reachable_roles(self) -> set[str]:
        """The watched roles with a valid holder who can be reached: looks at the address, not at opt-outs (S-26)."""
        reachable: set[str] = set()
        if not self.plan.watched:
            return reachable
        suppressed, void = self.account.suppressed, self.void
        for contact, held in zip(self.account.contacts, self.held, strict=True):
            if held.watched and not contact.unreachable and contact.email not in suppressed:
                reachable.update([role for role in held.watched if (contact.id, role) not in void])
        return reachable

    def _judge_all(self) -> list[_Judged]:
        """A judgement of each contact, in order. Where nothing stands against its roles, they say all there is."""
        products = self.products
        plain = not self.void and not self.unwanted and not self.account.suppressed
        return [
            (contact, held.matches, (), held.signs)
            if plain
            and held.matches is not None
            and not contact.opt_outs
            and (products is None or contact.products is None)
            else self._judge(contact, held.entries)
            for contact, held in zip(self.account.contacts, self.held, strict=True)
        ]

    def _judge(self, contact: ContactFacts, entries: Iterable[tuple[str, Receives]]) -> _Judged:
        matched: list[Match] = []
        dropped: list[Drop] = []
        signs = False
        for role, entry in entries:
            obstacle = self._obstacle(contact, role, entry)
            if obstacle is not None:
                dropped.append((role, obstacle))
            else:
                matched.append((role, _MATCHED[entry.mode]))
                signs = signs or entry.mode == "esign"
        return contact, tuple(matched), tuple(dropped), signs

    def _obstacle(self, contact: ContactFacts, role: str, entry: Receives) -> str | None:
        """Why a role that receives the category brings this contact no mail; None where it matches (steps 4, 5)."""
        if self.void and (contact.id, role) in self.void:
            return "rejected_by_cardinality"
        if entry.mode == "fallback" and entry.when_unreachable in self.reachable:
            return "fallback_not_needed"
        if self._opted_out(contact, role, entry):
            return "opted_out"
        if entry.product_preferences and self._not_selected(contact):
            return "product_not_selected"
        if contact.email in self.account.suppressed:
            return "address_suppressed"
        return None

    def _not_selected(self, contact: ContactFacts) -> bool:
        if self.products is None or contact.products is None:
            return False
        return self.products.isdisjoint(contact.products)

    def _opted_out(self, contact: ContactFacts, role: str, entry: Receives) -> bool:
        if contact.email in self.unwanted:
            return True
        if not contact.opt_outs or (role, entry.category) not in contact.opt_outs:
            return False
        if not entry.opt_out:
            self.ignored[f"opt_out_ignored:{role}:{entry.category}"] = None
        return entry.opt_out

    def _warnings(self, recipients: Collection[Recipient]) -> tuple[str, ...]:
        unreachable = [
            f"unreachable:{role.key}"
            for role in self.plan.duties
            if role.key not in self.reachable and (role.max == 1 or is_required(role, self.account.uses))
        ]
        nobody = () if recipients else ("no_recipient",)
        return (*nobody, *unreachable, *_over_cardinality(self.over_full), *self.ignored)


_MATCHED: Final = {"direct": "role_matched", "esign": "role_matched", "copy": "copy", "fallback": "fallback_used"}


def _unwanted_at(category: Category, account: AccountFacts) -> Collection[str]:
    """The account's addresses that want none of this category in any role (XC-06, XC-07, rules.md 5.3, point 5)."""
    if category.class_ not in OPT_OUT_CLASSES:
        return ()
    emails = [contact.email for contact in account.contacts] if account.complained else ()
    unwanted = account.complained.intersection(emails)
    if category.class_ == "informational":
        return unwanted
    return unwanted.union(
        contact.email
        for contact in account.contacts
        if (contact.email, category.key) in account.opted_out
        or (contact.opt_outs and any(key == category.key for _, key in contact.opt_outs))
    )


def _merge(verdicts: list[_Judged], delivery: str) -> Recipient:
    """One copy for one mailbox: its first matching record represents it, a signature beats plain mail (step 6)."""
    contact, matched, dropped, _ = verdicts[0]
    if any(signs for *_, signs in verdicts):
        delivery = "esign_request"
    if len(verdicts) == 1:
        return Recipient(contact, delivery, matched, dropped, len(matched) > 1)
    union = dict.fromkeys(match for _, matches, _, _ in verdicts for match in matches)
    return Recipient(contact, delivery, tuple(union), dropped, deduplicated=True)


def _exclude(verdict: _Judged) -> Excluded:
    contact, matched, dropped, _ = verdict
    duplicates = tuple((role, "duplicate_address") for role, _ in matched)
    return Excluded(contact, (*duplicates, *dropped) or _NO_ROLE_MATCH)


def _over_cardinality(roles: Iterable[str]) -> list[str]:
    return [f"over_cardinality:{role}" for role in roles]


# ---------------------------------------------------------------- requests


def _resolve_request(catalogue: Catalogue, account: AccountFacts, request: EventFacts) -> Verdicts:
    """Whether a request stands, and who is asked or answered. Without either, there is no fan-out."""
    permission = may(catalogue, account, request)
    if isinstance(permission, NeedsApproval):
        plan = _approval_plan(catalogue, account, request, permission.action)
        recipients, excluded, warnings = _FanOut(plan, account, None).run("approval_request")
        return Verdicts("pending_approval", "approval_needed", APPROVAL_REQUEST, recipients, excluded, warnings)
    void, over_full = void_places(limits_of(catalogue), account.contacts)
    warnings = tuple(_over_cardinality(over_full))
    if isinstance(permission, Refused):
        return Verdicts(
            "rejected", permission.reason, APPROVAL_REQUEST, warnings=warnings, authorised_roles=permission.roles
        )
    if permission.action != CONTACT_LIST:
        return Verdicts("authorised", None, APPROVAL_REQUEST, warnings=warnings)
    reply = _contact_list_reply(catalogue, account, request, void)
    if not reply:
        warnings = ("no_recipient", *warnings)
    return Verdicts("authorised", None, APPROVAL_REQUEST, reply, warnings=warnings)


def _approval_plan(catalogue: Catalogue, account: AccountFacts, request: EventFacts, action: str) -> _Plan:
    """Approval requests go to the roles that may approve this action, and to no other role (rules.md 4)."""
    receives = {}
    for key in roles_with(catalogue, action, "may_approve"):
        grant = catalogue.roles[key].may_approve[action]
        if condition_holds(grant.when, account.uses, request.context):
            receives[key] = Receives(
                category=APPROVAL_REQUEST,
                mode="direct",
                when_unreachable=None,
                opt_out=False,
                product_preferences=False,
                basis=grant.basis,
                source=grant.source,
            )
    return _Plan(catalogue, catalogue.vocabulary.categories[APPROVAL_REQUEST], receives)


def _contact_list_reply(
    catalogue: Catalogue, account: AccountFacts, request: EventFacts, void: Collection[Place]
) -> tuple[Recipient, ...]:
    """The list goes to the requester alone, for every role that grants it; nowhere if the address is suppressed."""
    for contact in account.contacts:
        if contact.id == request.requested_by and contact.email not in account.suppressed:
            grants = granting_roles(catalogue, contact, CONTACT_LIST, void=void, right="may_do")
            matched = tuple(
                (role, "requester")
                for role, grant in grants.items()
                if condition_holds(grant.when, account.uses, request.context)
            )
            return (Recipient(contact, "contact_list", matched, (), len(matched) > 1),)
    return ()
