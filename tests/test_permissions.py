"""Who may ask and approve: the whole authority matrix, and the properties that hold over random accounts."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subscriptions.audience import AccountFacts, ContactFacts, EventFacts
from subscriptions.catalogue import load_catalogues
from subscriptions.permissions import NeedsApproval, Permitted, Refused, action_concerned, may
from tests.shared import shared
from tests.test_audience import cases, requests

CATALOGUES = load_catalogues()
CONTEXT = frozenset({"self_service_unavailable"})
USES = frozenset({"invoicing", "chat"})
STANDING = {Refused: 0, NeedsApproval: 1, Permitted: 2}
REFUSALS = {
    "not_authorised_to_request",
    "not_authorised_to_approve",
    "condition_not_met",
    "rejected_by_cardinality",
}

anything = st.sampled_from(sorted(CATALOGUES)).flatmap(lambda key: cases(events=requests(CATALOGUES[key])))


def holder(*roles, **facts):
    return ContactFacts("c1", "ann@globex.test", roles, **facts)


def account(key, *contacts, uses=USES):
    return AccountFacts("globex", key, uses, contacts)


def request(action, requested_by="c1", **facts):
    return EventFacts("approval_request", action=action, requested_by=requested_by, **facts)


def test_the_authority_matrix_holds_cell_by_cell():
    """Every action by every role, as requester and as approver of what staff entered."""
    with shared("rules", "authority.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 500
    for row in rows:
        catalogue = CATALOGUES[row["catalogue"]]
        facts = account(catalogue.key, holder(row["role"]))
        asked = may(catalogue, facts, request(row["action"], context=CONTEXT))
        assert (not isinstance(asked, Refused)) == (row["may_do"] == "yes"), row
        if row["action"] in catalogue.approvals:
            entered = request(row["action"], "staff", approved_by="c1", context=CONTEXT)
            approved = may(catalogue, facts, entered)
            assert isinstance(approved, Permitted) == (row["may_approve"] == "yes"), row
        if row["condition"]:
            bare = account(catalogue.key, holder(row["role"]), uses=frozenset())
            assert may(catalogue, bare, request(row["action"])) == Refused("condition_not_met"), row


@given(anything)
def test_a_refusal_has_a_reason_of_the_contract(case):
    catalogue, facts, asked = case
    match may(catalogue, facts, asked):
        case Refused(reason, roles):
            assert reason in REFUSALS
            assert set(roles) <= catalogue.roles.keys()
        case NeedsApproval(action):
            assert action in catalogue.approvals
        case Permitted(action):
            assert action == action_concerned(catalogue, facts, asked)


@given(anything, st.data())
def test_a_further_role_never_takes_a_permission_away(case, data):
    catalogue, facts, asked = case
    asked = replace(asked, change=None, approved_by=None)  # a change or another's place can depend on who holds what
    further = data.draw(st.sampled_from(sorted(catalogue.roles)))
    richer = replace(
        facts,
        contacts=tuple(
            replace(contact, roles=tuple(dict.fromkeys((*contact.roles, further))))
            if contact.id == asked.requested_by
            else contact
            for contact in facts.contacts
        ),
    )
    before, after = may(catalogue, facts, asked), may(catalogue, richer, asked)
    assert STANDING[type(after)] >= STANDING[type(before)]


@given(anything)
def test_asking_in_the_name_of_nobody_known_is_refused(case):
    catalogue, facts, asked = case
    assert may(catalogue, facts, replace(asked, requested_by="nobody")).reason == "not_authorised_to_request"
    assert may(catalogue, facts, replace(asked, requested_by=None)).reason == "not_authorised_to_request"


@given(anything)
def test_a_group_inbox_that_names_nobody_has_no_authority(case):
    catalogue, facts, asked = case
    groups = replace(facts, contacts=tuple(replace(contact, kind="group") for contact in facts.contacts))
    standing = may(catalogue, groups, replace(asked, acted_by=None))
    if asked.requested_by != "staff":
        assert standing.reason == "not_authorised_to_request"
    else:
        assert not isinstance(standing, Permitted)


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_name_is_no_person(blank):
    catalogue = CATALOGUES["issuetrak"]
    facts = account("issuetrak", holder("invoice_primary", kind="group"))
    assert may(catalogue, facts, request("billing_change", acted_by=blank)).reason == "not_authorised_to_request"


def test_a_contact_whose_id_is_staff_does_not_approve_what_staff_enter():
    primary = ContactFacts("staff", "ann@globex.test", ("primary_contact",))
    facts = account("issuetrak", primary)
    assert may(CATALOGUES["issuetrak"], facts, request("data_import", "staff")) == NeedsApproval("data_import")


def test_a_catalogue_may_let_staff_act_without_approval():
    trusting = replace(CATALOGUES["issuetrak"], staff_requests_need_approval=False)
    facts = account("issuetrak", holder("primary_contact"))
    assert may(trusting, facts, request("data_import", "staff")) == Permitted("data_import")
    assert may(trusting, facts, request("support_request", "staff")).reason == "not_authorised_to_request"


@pytest.mark.parametrize(
    ("change", "action"),
    [
        ({"change": "add_role", "role": "payment_contact", "contact": "c2"}, "payment_contact_change"),
        ({"change": "remove_role", "role": "payment_approver", "contact": "c1"}, "payment_approver_change"),
        ({"change": "replace_role", "role": "payment_approver", "from": "c1", "to": "c2"}, "payment_approver_change"),
        ({"change": "remove_contact", "contact": "c1"}, "payment_approver_change"),
        ({"change": "change_address", "contact": "c1", "email": "x@acme.test"}, "payment_approver_change"),
        ({"change": "update_contact", "contact": "c1", "fields": {"kind": "group"}}, "payment_approver_change"),
        ({"change": "update_contact", "contact": "c1", "fields": {"timezone": "UTC"}}, "contact_change"),
        ({"change": "update_contact", "contact": "c2", "fields": {"name": "Ben"}}, "contact_change"),
        ({"change": "add_contact", "contact": {"id": "c1", "roles": []}}, "payment_approver_change"),
        ({"change": "add_contact", "contact": {"id": "n1", "roles": ["accounting"]}}, "contact_change"),
        ({"change": "add_role", "role": "accounting", "contact": "c1"}, "contact_change"),
        ({"change": "set_opt_out", "contact": "c1", "role": "payment_approver"}, "contact_change"),
    ],
)
@pytest.mark.parametrize("called", ["contact_change", "payment_contact_change"])
def test_the_role_concerned_decides_which_action_a_change_is(change, action, called):
    facts = account("billtrust", holder("payment_approver"), ContactFacts("c2", "ben@acme.test", ("accounting",)))
    assert action_concerned(CATALOGUES["billtrust"], facts, request(called, change=change)) == action


def test_a_change_that_cannot_be_read_keeps_the_name_it_came_with():
    facts = account("billtrust", holder("payment_approver"))
    for change in ({}, {"change": "swap"}, {"role": "accounting"}, {"change": None}, {"change": ["add_role"]}):
        asked = request("payment_approver_change", change=change)
        assert action_concerned(CATALOGUES["billtrust"], facts, asked) == "payment_approver_change"


def test_a_change_under_another_action_means_nothing():
    facts = account("issuetrak", holder("primary_contact"))
    last = {"change": "remove_role", "role": "primary_contact", "contact": "c1"}
    assert may(CATALOGUES["issuetrak"], facts, request("data_import", change=last)) == Permitted("data_import")


def test_passing_a_role_to_somebody_who_has_it_takes_it_from_the_first():
    ann, bob = holder("primary_contact"), ContactFacts("c2", "bob@globex.test", ("primary_contact",))
    passing = {"change": "replace_role", "role": "primary_contact", "from": "c1", "to": "c2"}
    asked = request("contact_change", change=passing)
    catalogue = CATALOGUES["issuetrak"]
    assert may(catalogue, account("issuetrak", ann, bob), asked) == Permitted("contact_change")
    roles = {**catalogue.roles, "primary_contact": replace(catalogue.roles["primary_contact"], min=2)}
    two = replace(catalogue, roles=roles)
    assert may(two, account("issuetrak", ann, bob), asked) == Refused("rejected_by_cardinality")


def test_an_over_full_role_may_be_thinned_out_but_not_added_to():
    contacts = [ContactFacts(f"c{number}", f"p{number}@globex.test", ("primary_contact",)) for number in range(1, 6)]
    facts = account("issuetrak", *contacts)
    catalogue = CATALOGUES["issuetrak"]

    def asked(**change):
        return may(catalogue, facts, request("contact_change", change=change))

    assert asked(change="remove_contact", contact="c5") == Permitted("contact_change")
    assert asked(change="remove_role", role="primary_contact", contact="c1") == Permitted("contact_change")
    assert asked(change="add_role", role="primary_contact", contact="c6") == Refused("rejected_by_cardinality")
