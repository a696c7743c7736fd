"""Codes in words: what verdicts, deliveries and events say on pages. No sentence here claims more than the ledger."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup, escape

from subscriptions.catalogue import Catalogue
from worker.history import Audience

_SAID: Final[Mapping[str, str]] = {
    # why somebody gets a mail (contract, section 6)
    "role_matched": "receives it",
    "copy": "gets a copy",
    "fallback_used": "stands in: the usual contact can't be reached",
    "requester": "asked for it",
    # why somebody does not
    "no_role_match": "no role of theirs receives this",
    "opted_out": "chose not to get it",
    "product_not_selected": "not one of their products",
    "address_suppressed": "nothing is mailed to this address",
    "rejected_by_cardinality": "more hold this role than may; this place is void",
    "fallback_not_needed": "stands in only while the usual contact can't be reached",
    "duplicate_address": "the same address gets it already",
    "redirected_to_status_page": "answered with the status page",
    "product_not_on_account": "the account does not use the product",
    "category_not_in_catalogue": "the account's catalogue does not have this category",
    # why an event came out as it did
    "status_page_category": "outages and maintenance are never mailed",
    "no_reachable_recipient": "there is no contact who should get it, can be reached and wants it",
    "not_authorised_to_request": "who asked may not ask for this",
    "not_authorised_to_approve": "who approved may not approve this",
    "condition_not_met": "a condition for it is not met",
    "approval_needed": "waits for an approver",
    # outcomes
    "deliver": "mailed",
    "no_recipient": "nobody to mail",
    "rejected": "rejected",
    "authorised": "authorised",
    "pending_approval": "waits for approval",
    # states whose name alone says too little
    "redirected": "status page",
    # what deliveries wait for, and how they ended
    "event_cancelled": "the event was cancelled",
    "expired": "too late to be of use",
    "cannot_be_rendered": "the template could not be filled in",
    "unknown": "the relay's answer was lost; a person decides",
    "restored": "may have gone out before the database was restored; a person decides",
    "sent_again": "sent again after a lost answer",
    "sender_refused": "the relay refused our sender",
    "recipient_refused": "the relay refused the address",
    "content_refused": "the relay refused the content",
    "policy_refused": "the relay refused it by its policy",
    "given_up": "given up after many attempts",
    "settled_by_person": "settled by a person",
    "cannot_be_planned": "it could not be planned",
    "paused": "paused",
    "no_https": "waits for an https address in ROLECAST_PUBLIC_URL",
    "no_sender": "waits for ROLECAST_SENDER",
    "test": "recorded only: test mode",
    "team": "recorded only: not on the team's list",
    # how it travels
    "esign_request": "request for a signature",
    "approval_request": "request for approval",
    "contact_list": "list of contacts",
    "email": "email",
}


def said(code: str | None) -> str:
    """A code in words; one that is not known here is shown as it is, without underscores."""
    if code is None:
        return ""
    return _SAID.get(code) or code.replace("_", " ")


def with_code(text: str) -> Markup:
    """A sentence whose `commands` are shown as such."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


_MATCHED: Final[Mapping[str, str]] = {
    "role_matched": "as {role}",
    "copy": "a copy, as {role}",
    "fallback_used": "as {role}, because the usual contact can't be reached",
}


def title_of(catalogue: Catalogue | None, role: str) -> str:
    """A role as people call it; its key in words where the catalogue is gone or does not have it any more."""
    found = catalogue.roles.get(role) if catalogue else None
    return found.title if found else role.replace("_", " ")


def matched(pairs: Iterable[Mapping[str, Any]], catalogue: Catalogue | None) -> str:
    """Why somebody gets a mail: `as Executive contact; a copy, as ...`."""
    return "; ".join(
        _MATCHED.get(one["reason"], said(one["reason"])).format(role=title_of(catalogue, one["role"] or ""))
        for one in pairs
    )


def dropped(pairs: Iterable[Mapping[str, Any]], catalogue: Catalogue | None) -> str:
    """Why somebody does not get one, by role where it is a role's reason."""
    return "; ".join(
        f"{title_of(catalogue, one['role'])}: {said(one['reason'])}" if one["role"] else said(one["reason"])
        for one in pairs
    )


def warning(code: str, catalogue: Catalogue | None) -> str:
    """A warning of an answer (contract, section 6) as a sentence; empty where the outcome says it already."""
    kind, _, rest = code.partition(":")
    role, _, category = rest.partition(":")
    title = title_of(catalogue, role)
    if kind == "over_cardinality":
        found = catalogue.roles.get(role) if catalogue else None
        allowed = f"the {found.max} allowed" if found and found.max else "are allowed"
        return f"{title} has more holders than {allowed}; those beyond it do not count."
    if kind == "unreachable":
        return f"Nobody who is {title} can be reached."
    if kind == "opt_out_ignored":
        known = catalogue.vocabulary.categories.get(category) if catalogue else None
        about = (known.title if known else category.replace("_", " ")).partition(" (")[0]
        return f"An opt-out does not count: {title} can't opt out of “{about}”."
    return "" if kind in {"no_recipient", "category_not_in_catalogue"} else code.replace("_", " ")


def result(code: str, reason: str | None) -> str:
    """An outcome with its reason (contract, section 6), where that says more."""
    return said(code) if reason in {None, "approval_needed"} else f"{said(code)}: {said(reason)}"


def outcome(event: Mapping[str, Any], audience: Audience, account: str | None) -> list[str]:
    """What became of an event, in sentences: whom it was for, and which accounts it passed by.

    `account` is the one that it was for; None for a broadcast.
    """
    if event["status"] in {"accepted", "planning"}:
        return ["Its time has not come yet." if event["not_before"] and not event["planned_at"] else "Being planned."]
    sentences = []
    if event["outcome"] in {"authorised", "pending_approval", "rejected"}:
        sentences.append(f"{result(event['outcome'], event['reason']).capitalize()}.")
    where = account or _many(audience.accounts, "account")
    if audience.recipients:
        sentences.append(_mailed(event, audience, where))
    elif event["outcome"] in {None, "no_recipient"}:
        of_whom = f", of {_many(audience.contacts, 'contact')} in {where}" if audience.contacts else ""
        because = f": {said(event['reason'])}" if event["reason"] else ""
        sentences.append(f"Mailed to nobody{of_whom}{because}.")
    if event["outcome"] is None:
        sentences += _passed_by(audience)
    return sentences


def _mailed(event: Mapping[str, Any], audience: Audience, where: str) -> str:
    totals = event["totals"]
    done = totals.get("accepted", 0) + totals.get("bounced", 0) + totals.get("complained", 0)
    whom = f"{audience.recipients:,} of {_many(audience.contacts, 'contact')} in {where}"
    merged = audience.recipients - audience.mailboxes
    once = f", with {_many(audience.mailboxes, 'mail')}: who is a contact twice gets one" if merged else ""
    if done == audience.mailboxes:
        return f"Sent to {whom}{once}."
    so_far = " so far" if event["status"] == "sending" else ""
    return f"For {whom}{once}. {done:,} of {_many(audience.mailboxes, 'mail')} accepted by the relay{so_far}."


def _passed_by(audience: Audience) -> Iterable[str]:
    """Accounts of a broadcast that it did not reach, by reason."""
    for (result, reason), count in sorted(audience.outcomes.items(), key=str):
        if result == "rejected" and reason == "category_not_in_catalogue":
            whose = "its catalogue does" if count == 1 else "their catalogues do"
            yield f"{_many(count, 'account')} left out: {whose} not have this category."
        elif result in {"no_recipient", "rejected"} and audience.recipients:
            yield f"{_many(count, 'account')} with nobody to mail: {said(reason)}."


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


Skipped = tuple[str, Sequence[str]]
"""A reason in words, and the contacts whom it holds for."""


def skipped(answer: Mapping[str, Any], catalogue: Catalogue | None) -> list[Skipped]:
    """The contacts without a mail, by reason; those without a role for it come last."""
    groups: dict[str, list[str]] = {}
    for one in answer["excluded"]:
        groups.setdefault(dropped(one["dropped"], catalogue), []).append(one["contact"])
    last = said("no_role_match")
    return sorted(groups.items(), key=lambda group: group[0] == last)
