"""Scenarios written as data: what the rules say about one event in one account, worked out by hand."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pytest

from subscriptions.audience import EventFacts, answer, resolve
from subscriptions.catalogue import load_catalogues
from subscriptions.documents import facts, read_accounts
from tests.shared import SHARED, shared

OWN = Path(__file__).parent / "fixtures" / "scenarios.jsonl"
SHARED_EXAMPLES = SHARED / "scenarios" / "examples.jsonl"

# What the resolver decides. The other rules describe, advise, or belong to the directory, the ledger or the mail.
DECIDED = {
    "BT": [*range(2, 10), 11, 12, *range(14, 17), *range(18, 23), 24, 25, *range(27, 41), *range(42, 54)],
    "IT": [*range(1, 28), *range(30, 60)],
    "XC": [1, 3, 4, 5, 6, 7, 8, 9],
    "S": [*range(1, 15), *range(16, 47), 48, 50],
}


def read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def named(scenario):
    return f"{scenario['id']}: {scenario['title']}"


@pytest.fixture(scope="module")
def catalogues():
    return load_catalogues()


@pytest.mark.parametrize("scenario", read(OWN), ids=named)
def test_our_own_scenario_comes_out_as_the_rules_say(scenario, catalogues):
    assert outcome_of(scenario, catalogues) == comparable(scenario["expected"])


@pytest.mark.parametrize("scenario", read(SHARED_EXAMPLES), ids=named)
def test_the_shared_scenario_comes_out_as_the_rules_say(scenario, catalogues):
    assert outcome_of(scenario, catalogues) == comparable(scenario["expected"])


def test_the_shared_scenarios_were_found():
    assert len(read(shared("scenarios", "examples.jsonl"))) >= 10


@pytest.mark.parametrize("family", DECIDED)
def test_every_rule_that_the_resolver_decides_has_a_scenario(family):
    covered = {rule for scenario in read(OWN) for rule in scenario["rules"]}
    wanted = {f"{family}-{number:02d}" for number in DECIDED[family]}
    assert wanted - covered == set()


def test_our_own_scenarios_have_ids_of_their_own():
    ids = [scenario["id"] for scenario in read(OWN)]
    assert ids == [f"RC-{number:03d}" for number in range(1, len(ids) + 1)]


def outcome_of(scenario, catalogues):
    account = account_facts(scenario, catalogues)
    given = answer(
        resolve(catalogues[scenario["catalogue"]], account, event_facts(scenario)),
        source="/scenarios",
        event=scenario["event"]["id"],
        account=account.id,
    )
    category = "approval_request" if scenario["kind"] == "action" else scenario["event"]["category"]
    assert given["category"] == category
    return comparable(given)


def account_facts(scenario, catalogues):
    document = {"accounts": [{**scenario["account"], "catalogue": scenario["catalogue"]}]}
    stream = BytesIO(json.dumps(document).encode())
    records = read_accounts(stream, catalogues=catalogues, name=scenario["id"])
    return facts(records, catalogues)[scenario["account"]["id"]]


def event_facts(scenario):
    event = scenario["event"]
    if scenario["kind"] == "notify":
        return EventFacts(event["category"], tuple(event["products"]))
    return EventFacts(
        "approval_request",
        action=event["action"],
        requested_by=event["requested_by"],
        approved_by=event["approved_by"],
        acted_by=event.get("acted_by"),
        change=event["data"] if "change" in event["data"] else None,
        context=frozenset(event["data"].get("context", ())),
    )


def comparable(answered):
    """An answer with its lists as sets: their order means nothing, but nothing may stand in them twice."""
    return {
        "outcome": answered["outcome"],
        "reason": answered["reason"],
        "warnings": as_set(answered["warnings"]),
        "recipients": as_set(
            (
                recipient["contact"],
                recipient["email"],
                recipient["delivery"],
                pairs(recipient["matched"]),
                pairs(recipient["dropped"]),
                recipient["deduplicated"],
            )
            for recipient in answered["recipients"]
        ),
        "excluded": as_set((excluded["contact"], pairs(excluded["dropped"])) for excluded in answered["excluded"]),
    }


def pairs(items):
    return as_set((item["role"], item["reason"]) for item in items)


def as_set(items):
    items = list(items)
    assert len(set(items)) == len(items), f"{items} holds something twice"
    return frozenset(items)
