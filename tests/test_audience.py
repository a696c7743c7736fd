"""Properties of the resolver over random accounts and events of both catalogues, and what its shape promises."""

from __future__ import annotations

import csv
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from subscriptions.audience import AccountFacts, ContactFacts, EventFacts, answer, resolve
from subscriptions.catalogue import Accepted, load_catalogues
from tests.shared import shared

CATALOGUES = load_catalogues()
VOCABULARY = CATALOGUES["billtrust"].vocabulary
STATUS = sorted(key for key, category in VOCABULARY.categories.items() if category.class_ == "status")
PRODUCTS = ("invoicing", "payments", "chat", "analytics")
ADDRESSES = tuple(f"{name}@acme.test" for name in ("ada", "ben", "cy", "di"))
CONTACT_IDS = tuple(f"c{number}" for number in range(7))

OUTCOMES = {
    "deliver",
    "redirected_to_status_page",
    "no_recipient",
    "rejected",
    "authorised",
    "pending_approval",
}
REASONS = {
    None,
    "status_page_category",
    "product_not_on_account",
    "no_reachable_recipient",
    "category_not_in_catalogue",
    "not_authorised_to_request",
    "not_authorised_to_approve",
    "condition_not_met",
    "rejected_by_cardinality",
    "approval_needed",
}
DELIVERIES = {"email", "esign_request", "approval_request", "contact_list"}
MATCHED = {"role_matched", "copy", "fallback_used", "requester"}
DROPPED = {
    "no_role_match",
    "opted_out",
    "product_not_selected",
    "address_suppressed",
    "rejected_by_cardinality",
    "fallback_not_needed",
    "duplicate_address",
    "redirected_to_status_page",
    "product_not_on_account",
    "category_not_in_catalogue",
}


def subsets(values, **kwargs):
    return st.lists(st.sampled_from(sorted(values)), unique=True, **kwargs)


@st.composite
def contacts(draw, catalogue, number):
    roles = draw(subsets(catalogue.roles, max_size=3))
    categories = sorted(catalogue.categories)
    opt_outs = st.tuples(st.sampled_from(sorted(catalogue.roles)), st.sampled_from(categories))
    return ContactFacts(
        CONTACT_IDS[number],
        draw(st.sampled_from(ADDRESSES)),
        tuple(roles),
        kind=draw(st.sampled_from(["person", "person", "group"])),
        products=draw(st.none() | subsets(PRODUCTS, min_size=1).map(frozenset)),
        opt_outs=frozenset(draw(st.lists(opt_outs, max_size=2))),
        unreachable=draw(st.integers(0, 5)) == 0,
    )


@st.composite
def accounts(draw, catalogue):
    size = draw(st.integers(0, len(CONTACT_IDS)))
    promotional = sorted(key for key, category in VOCABULARY.categories.items() if category.class_ == "promotional")
    opted_out = st.tuples(st.sampled_from(ADDRESSES), st.sampled_from(promotional))
    return AccountFacts(
        "acme",
        catalogue.key,
        frozenset(draw(subsets(PRODUCTS))),
        tuple(draw(contacts(catalogue, number)) for number in range(size)),
        suppressed=frozenset(draw(subsets(ADDRESSES, max_size=2))),
        opted_out=frozenset(draw(st.lists(opted_out, max_size=1))),
        complained=frozenset(draw(subsets(ADDRESSES, max_size=1))),
    )


def changes(catalogue):
    role = st.sampled_from(sorted(catalogue.roles))
    contact = st.sampled_from([*CONTACT_IDS, "unknown"])
    address = st.just("new@acme.test")
    added = st.fixed_dictionaries({"id": st.just("new"), "email": address, "roles": st.lists(role)})
    moves = st.sampled_from(["add_role", "remove_role"])
    return st.one_of(
        st.fixed_dictionaries({"change": moves, "role": role, "contact": contact}),
        st.fixed_dictionaries({"change": st.just("replace_role"), "role": role, "from": contact, "to": contact}),
        st.fixed_dictionaries({"change": st.just("add_contact"), "contact": added}),
        st.fixed_dictionaries({"change": st.just("remove_contact"), "contact": contact}),
        st.fixed_dictionaries({"change": st.just("change_address"), "contact": contact, "email": address}),
        st.fixed_dictionaries({"change": st.text(max_size=5)}),  # not a change: nothing may come of it
    )


notifications = st.builds(
    EventFacts, st.sampled_from(sorted(VOCABULARY.categories)), subsets((*PRODUCTS, "unknown"), max_size=3).map(tuple)
)


def requests(catalogue):
    return st.builds(
        EventFacts,
        st.just("approval_request"),
        action=st.sampled_from([*sorted(VOCABULARY.actions), *(["contact_change"] * 5), *catalogue.approvals]),
        requested_by=st.sampled_from(["staff", *CONTACT_IDS, "unknown"]),
        approved_by=st.none() | st.sampled_from([*CONTACT_IDS, "unknown"]),
        acted_by=st.sampled_from([None, "Pat Payne"]),
        change=st.none() | changes(catalogue),
        context=st.sampled_from([frozenset(), frozenset({"self_service_unavailable"})]),
    )


@st.composite
def cases(draw, *, events=None):
    """A catalogue, an account of it and an event."""
    catalogue = draw(st.sampled_from(sorted(CATALOGUES.values(), key=lambda catalogue: catalogue.key)))
    event = draw(events if events is not None else notifications | requests(catalogue))
    return catalogue, draw(accounts(catalogue)), event


@given(cases())
def test_every_contact_gets_exactly_one_verdict_or_no_fan_out_happens(case):
    catalogue, account, event = case
    verdicts = resolve(catalogue, account, event)
    named = [verdict.contact.id for verdict in (*verdicts.recipients, *verdicts.excluded)]
    if verdicts.outcome == "authorised" or (verdicts.outcome == "rejected" and event.action is not None):
        assert verdicts.excluded == ()
        assert [recipient.delivery for recipient in verdicts.recipients] in ([], ["contact_list"])
    else:
        assert sorted(named) == sorted(contact.id for contact in account.contacts)


@given(cases())
def test_one_mailbox_gets_at_most_one_copy_and_a_suppressed_one_none(case):
    catalogue, account, event = case
    addresses = [recipient.contact.email for recipient in resolve(catalogue, account, event).recipients]
    assert len(set(addresses)) == len(addresses)
    assert account.suppressed.isdisjoint(addresses)


@given(cases(), st.sampled_from(STATUS))
def test_no_status_page_category_ever_has_a_recipient_whatever_the_data_says(case, category):
    catalogue, account, event = case
    mailed = Accepted(category, "email", "stated", ())
    direct = replace(CATALOGUES["billtrust"].roles["accounting"].receives["invoice"], category=category)
    careless = replace(
        catalogue,
        categories={**catalogue.categories, category: mailed},
        roles={
            key: replace(role, receives={**role.receives, category: direct}) for key, role in catalogue.roles.items()
        },
    )
    for tried in (catalogue, careless):
        verdicts = resolve(tried, account, replace(event, category=category))
        assert verdicts.outcome == "redirected_to_status_page"
        assert verdicts.recipients == ()
        assert verdicts.warnings == ()


@given(cases(events=notifications))
def test_a_category_that_the_catalogue_sends_to_the_status_page_has_no_recipient_either(case):
    catalogue, account, event = case
    assume(event.category in catalogue.categories)
    pointed = Accepted(event.category, "status_page", "stated", ())
    stricter = replace(catalogue, categories={**catalogue.categories, event.category: pointed})
    assert resolve(stricter, account, event).outcome == "redirected_to_status_page"


@given(cases(events=notifications))
def test_a_signature_is_asked_only_of_a_valid_holder_of_a_role_that_signs(case):
    catalogue, account, event = case
    for recipient in resolve(catalogue, account, event).recipients:
        modes = {catalogue.roles[role].receives[event.category].mode for role, _ in recipient.matched}
        assert (recipient.delivery == "esign_request") == ("esign" in modes)
        assert recipient.delivery in {"email", "esign_request"}


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_contacts_matters_only_for_limits_and_for_who_represents_a_mailbox(case, random):
    catalogue, account, event = case
    verdicts = resolve(catalogue, account, event)
    assume(not any(warning.startswith("over_cardinality:") for warning in verdicts.warnings))
    shuffled = random.sample(account.contacts, len(account.contacts))
    again = resolve(catalogue, replace(account, contacts=tuple(shuffled)), event)
    assert mailboxes(again) == mailboxes(verdicts)
    assert (again.outcome, again.reason) == (verdicts.outcome, verdicts.reason)
    assert set(again.warnings) == set(verdicts.warnings)
    assert own_drops(again) == own_drops(verdicts)


def mailboxes(verdicts):
    return {
        recipient.contact.email: (recipient.delivery, frozenset(recipient.matched), recipient.deduplicated)
        for recipient in verdicts.recipients
    }


def own_drops(verdicts):
    """What each contact was dropped for, apart from being a second record of a mailbox."""
    merged = {"duplicate_address", "no_role_match"}
    return {
        verdict.contact.id: {drop for drop in verdict.dropped if drop[1] not in merged}
        for verdict in (*verdicts.recipients, *verdicts.excluded)
    }


@given(cases())
def test_every_code_is_one_of_the_contract_and_every_warning_names_what_the_catalogue_has(case):
    catalogue, account, event = case
    verdicts = resolve(catalogue, account, event)
    assert verdicts.outcome in OUTCOMES
    assert verdicts.reason in REASONS
    for recipient in verdicts.recipients:
        assert recipient.delivery in DELIVERIES
        assert recipient.matched
        assert {reason for _, reason in recipient.matched} <= MATCHED
        assert len(set(recipient.matched)) == len(recipient.matched)
    for verdict in (*verdicts.recipients, *verdicts.excluded):
        assert {reason for _, reason in verdict.dropped} <= DROPPED
        assert len({role for role, _ in verdict.dropped}) == len(verdict.dropped)
        assert {role for role, _ in verdict.dropped} <= {None, *verdict.contact.roles}
    assert all(excluded.dropped for excluded in verdicts.excluded)
    assert len(set(verdicts.warnings)) == len(verdicts.warnings)
    for warning in verdicts.warnings:
        code, *rest = warning.split(":")
        match code:
            case "no_recipient" | "category_not_in_catalogue":
                assert rest == []
            case "unreachable" | "over_cardinality":
                assert re.fullmatch(r"[a-z_]+", rest[0])
                assert rest[0] in catalogue.roles
            case _:
                assert (code, rest[1]) == ("opt_out_ignored", verdicts.category)
                assert rest[0] in catalogue.roles


@given(cases())
def test_nobody_left_is_said_in_so_many_words(case):
    catalogue, account, event = case
    verdicts = resolve(catalogue, account, event)
    fanned_out = verdicts.reason == "no_reachable_recipient" or verdicts.outcome in {"deliver", "pending_approval"}
    if fanned_out:
        assert ("no_recipient" in verdicts.warnings) == (not verdicts.recipients)


@given(cases(events=notifications))
def test_a_complaint_or_a_promotional_opt_out_ends_that_mail_to_the_address(case):
    catalogue, account, event = case
    class_ = VOCABULARY.categories[event.category].class_
    addresses = {recipient.contact.email for recipient in resolve(catalogue, account, event).recipients}
    if class_ in {"promotional", "informational"}:
        assert addresses.isdisjoint(account.complained)
    if class_ == "promotional":
        assert addresses.isdisjoint(address for address, category in account.opted_out if category == event.category)
        assert addresses.isdisjoint(
            contact.email
            for contact in account.contacts
            if any(category == event.category for _, category in contact.opt_outs)
        )


@given(cases(), st.sampled_from(CONTACT_IDS))
def test_marking_a_contact_unreachable_never_takes_mail_away(case, contact_id):
    catalogue, account, event = case
    marked = tuple(
        replace(contact, unreachable=True) if contact.id == contact_id else contact for contact in account.contacts
    )
    before = mailboxes(resolve(catalogue, account, event))
    after = mailboxes(resolve(catalogue, replace(account, contacts=marked), event))
    assert before.keys() <= after.keys()


@given(cases())
@settings(max_examples=50)
def test_the_same_question_has_the_same_answer(case):
    catalogue, account, event = case
    assert resolve(catalogue, account, event) == resolve(catalogue, account, event)


def test_the_decision_matrix_holds_cell_by_cell():
    """One holder of one role, alone in an account, and one event of one category."""
    verdicts = {
        "receives": ("deliver", "email", "role_matched"),
        "copy": ("deliver", "email", "copy"),
        "esign": ("deliver", "esign_request", "role_matched"),
        "fallback": ("deliver", "email", "fallback_used"),
        "never": ("no_recipient", None, None),
        "status_page": ("redirected_to_status_page", None, None),
        "refused": ("rejected", None, None),
    }
    with shared("rules", "receives.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 350
    for row in rows:
        expected = verdicts[row["cell"]]
        opted_out = alone(row, opt_outs=frozenset({(row["role"], row["category"])}))
        elsewhere = alone(row, products=frozenset({"payments"}))
        assert alone(row) == expected, row
        if expected[0] == "deliver":
            assert (opted_out[0] == "no_recipient") == (row["opt_out"] == "yes"), row
            assert (elsewhere[0] == "no_recipient") == (row["product_preferences"] == "yes"), row
        else:
            assert opted_out == elsewhere == expected, row


def alone(row, **facts):
    """What becomes of an event where the only contact of the account holds the row's role."""
    contact = ContactFacts("c1", "ann@globex.test", (row["role"],), **facts)
    account = AccountFacts("globex", row["catalogue"], frozenset({"invoicing"}), (contact,))
    verdicts = resolve(CATALOGUES[row["catalogue"]], account, EventFacts(row["category"], ("invoicing",)))
    if not verdicts.recipients:
        return verdicts.outcome, None, None
    [recipient] = verdicts.recipients
    [(role, reason)] = recipient.matched
    assert role == row["role"]
    return verdicts.outcome, recipient.delivery, reason


def test_a_role_listed_twice_counts_once():
    ann = ContactFacts("c1", "ann@globex.test", ("quote_approver", "quote_approver"))
    account = AccountFacts("globex", "issuetrak", frozenset(), (ann,))
    verdicts = resolve(CATALOGUES["issuetrak"], account, EventFacts("quote"))
    assert [(r.matched, r.deduplicated) for r in verdicts.recipients] == [
        ((("quote_approver", "role_matched"),), False),
    ]
    assert verdicts.warnings == ()


def test_a_role_that_the_catalogue_does_not_know_means_nothing():
    ann = ContactFacts("c1", "ann@globex.test", ("executive", "primary_contact"))
    account = AccountFacts("globex", "issuetrak", frozenset(), (ann,))
    verdicts = resolve(CATALOGUES["issuetrak"], account, EventFacts("sales_correspondence"))
    assert [r.matched for r in verdicts.recipients] == [(("primary_contact", "role_matched"),)]


@pytest.mark.parametrize("page", [None, {"url": "https://status.example", "incident": None}])
def test_a_status_page_answer_carries_the_pointer_and_other_answers_do_not(page):
    ann = ContactFacts("c1", "ann@globex.test", ("primary_contact",))
    account = AccountFacts("globex", "issuetrak", frozenset(), (ann,))

    def asked(category):
        verdicts = resolve(CATALOGUES["issuetrak"], account, EventFacts(category))
        return answer(verdicts, source="/ops", event="e1", account="globex", status_page=page)

    assert asked("outage_incident")["status_page"] == (page or {"url": None, "incident": None})
    assert "status_page" not in asked("sales_correspondence")


def test_a_refused_request_says_which_roles_may_ask_and_not_who_holds_them():
    ben = ContactFacts("c1", "ben@acme.test", ("secondary_support",))
    ada = ContactFacts("c2", "ada@acme.test", ("executive",))
    account = AccountFacts("acme", "billtrust", frozenset(), (ben, ada))
    request = EventFacts("approval_request", action="contact_change", requested_by="c1")
    given = answer(resolve(CATALOGUES["billtrust"], account, request), source="/support", event="e1", account="acme")
    assert given["authorised_roles"] == ["executive", "primary_support"]
    assert "c2" not in str(given)
