"""Codes in words: what verdicts, deliveries and events say on pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

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
    "no_reachable_recipient": "nobody who should hear of it can or wants to be reached",
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
    # what deliveries wait for, and how they ended
    "event_cancelled": "the event was cancelled",
    "expired": "too late to be of use",
    "cannot_be_rendered": "the template could not be filled in",
    "unknown": "the relay's answer was lost; a person decides",
    "sent_again": "sent again after a lost answer",
    "sender_refused": "the relay refused our sender",
    "recipient_refused": "the relay refused the address",
    "content_refused": "the relay refused the content",
    "given_up": "given up after many attempts",
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
