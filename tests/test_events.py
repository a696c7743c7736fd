"""Events: every type has a valid sample, every way in gives the same event, and every fault is told in a sentence."""

from __future__ import annotations

import base64
import copy
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import jsonschema
import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_binary, from_structured, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shared import shared
from worker import events
from worker.events import TYPES, Event, EventError, content, from_http, parse_batch, parse_event, parse_json, read_file

FIXTURES = Path(__file__).parent / "fixtures" / "events"

# Contract, section 3: type -> category, broadcast, required fields besides routing.
CONTRACT = {
    "announcement.published": ("announcement", True, "title body"),
    "webinar.scheduled": ("webinar_invite", True, "title starts_at ends_at join_url"),
    "corporate.published": ("corporate_communication", True, "title body"),
    "service.notice": ("service_communication", True, "title body"),
    "outage.started": ("outage_incident", True, "title started_at"),
    "outage.updated": ("outage_incident", True, "title started_at"),
    "outage.resolved": ("outage_incident", True, "title started_at"),
    "maintenance.scheduled": ("maintenance_notice", True, "title starts_at ends_at"),
    "file.failed": ("file_failure", False, "file_name failed_at reason"),
    "invoice.issued": ("invoice", False, "number amount currency due_on"),
    "statement.issued": ("financial_statement", False, "period balance currency"),
    "payment.due": ("payment_notice", False, "amount currency on"),
    "payment.failed": ("payment_notice", False, "amount currency on"),
    "payment.received": ("payment_notice", False, "amount currency on"),
    "payment_information.changed": ("payment_notice", False, "what changed_at"),
    "billing.notice": ("billing_correspondence", False, "title body"),
    "quote.issued": ("quote", False, "number title amount currency expires_on signing_url"),
    "contract.renewal": ("contract_renewal", False, "number amount currency renews_on signing_url"),
    "contract.authorisation": ("contract_authorisation", False, "number title signing_url"),
    "upgrade.announced": ("upgrade_notice", True, "version title body"),
    "technical.notice": ("technical_correspondence", True, "title body"),
    "sales.message": ("sales_correspondence", False, "title body"),
    "care.message": ("customer_care_correspondence", False, "title body"),
    "account.message": ("account_management_correspondence", False, "title body"),
    "marketing.message": ("marketing_communication", True, "title body"),
    "survey.opened": ("satisfaction_survey", True, "title survey_url closes_on"),
    "esolutions.campaign": ("esolutions_campaign", True, "title body"),
    "action.requested": ("approval_request", False, "action requested_by"),
    "contacts.changed": ("contact_change_confirmation", False, "summary"),
}


def invoice(**changes):
    """The sample invoice with fields of its data changed; a field set to ... is taken out."""
    value = events.sample("invoice.issued")
    value["data"].update(changes)
    value["data"] = {name: field for name, field in value["data"].items() if field is not ...}
    return value


def announcement(**routing):
    value = events.sample("announcement.published")
    del value["data"]["accounts"]
    value["data"].update(routing)
    return value


def refused(value):
    """The faults of a value, each as (kind, pointer, message)."""
    with pytest.raises(EventError) as error:
        parse_event(value)
    return [(fault.kind, fault.pointer, fault.message) for fault in error.value.faults]


def only_fault(value):
    (fault,) = refused(value)
    return fault


# ---------------------------------------------------------------- the registry


def test_the_registry_is_the_contract_s_table():
    assert {name: (kind.category, kind.broadcast) for name, kind in TYPES.items()} == {
        name: (category, broadcast) for name, (category, broadcast, _) in CONTRACT.items()
    }


@pytest.mark.parametrize("name", CONTRACT)
def test_exactly_the_contract_s_fields_are_required(name):
    required = {field for field, info in TYPES[name].model.model_fields.items() if info.is_required()}
    assert required - {"account"} == set(CONTRACT[name][2].split())
    for field in required:
        value = events.sample(name)
        del value["data"][field]
        kind, pointer, message = only_fault(value)
        assert (kind, pointer) == ("invalid", f"/data/{field}")
        assert f'"{field}" is missing' in message


@pytest.mark.parametrize("name", CONTRACT)
def test_every_sample_is_valid_also_against_its_json_schema(name):
    value = events.sample(name)
    event = parse_event(value)
    assert event.data == value["data"] == TYPES[name].sample
    assert event.type is TYPES[name]
    schema = events.json_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(json.loads(json.dumps(value["data"])))
    assert not validator.is_valid({**value["data"], "unheard_of": 1})
    assert not validator.is_valid({key: field for key, field in value["data"].items() if not key.startswith("account")})
    if TYPES[name].broadcast:
        assert validator.is_valid({**value["data"], "accounts": "all"})
        assert not validator.is_valid({**value["data"], "account": "acme"})
    envelope = json.loads(shared("corpora", "cloudevents", "cloudevents-v1.0-jsonschema.json").read_text())
    jsonschema.validate(value, envelope)


def test_samples_name_only_example_hosts_and_belong_to_the_caller():
    for name in TYPES:
        hosts = re.findall(r"https?://([^/\"\\]+)", json.dumps(events.sample(name)))
        assert all(host.endswith(".example") for host in hosts)
    events.sample("invoice.issued")["data"]["lines"].clear()
    assert events.sample("invoice.issued")["data"]["lines"]


def test_an_event_keeps_what_was_published():
    event = parse_event({**invoice(products=["a", "b", "a"]), "subject": "s", "traceparent": "00-1", "dry": True})
    assert (event.source, event.subject, event.time) == ("/samples", "s", "2026-11-21T10:00:00Z")
    assert (event.account, event.accounts, event.products) == ("acme", None, ("a", "b"))
    assert event.extensions == {"traceparent": "00-1", "dry": True}
    assert parse_event(announcement(accounts="all")).accounts == "all"
    assert parse_event(announcement(accounts=["a", "b"])).accounts == ("a", "b")


def test_null_is_absent_in_optional_fields_and_attributes():
    event = parse_event({**invoice(url=None, not_before=None, products=None), "subject": None, "myextension": None})
    assert (event.subject, event.not_before, event.products, event.extensions) == (None, None, (), {})
    assert parse_event(announcement(account="acme", accounts=None)).account == "acme"


# ---------------------------------------------------------------- faults of the data


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"amount": 1280.0}, "/data/amount", '"amount" is 1280.0'),
        ({"amount": 1280}, "/data/amount", "1280.00"),
        ({"amount": "1,280.00"}, "/data/amount", '"1,280.00"'),
        ({"amount": "1e3"}, "/data/amount", "decimal"),
        ({"amount": "\u0661\u0662"}, "/data/amount", "decimal"),
        ({"amount": "1.0\n"}, "/data/amount", "decimal"),
        ({"amount": "007"}, "/data/amount", "decimal"),
        ({"currency": "EURO"}, "/data/currency", "ISO 4217"),
        ({"currency": "eur"}, "/data/currency", "ISO 4217"),
        ({"currency": "ZZZ"}, "/data/currency", "ISO 4217"),
        ({"due_on": "2026-02-30"}, "/data/due_on", "ISO 8601"),
        ({"due_on": "21.12.2026"}, "/data/due_on", "ISO 8601"),
        ({"due_on": "20261221"}, "/data/due_on", "ISO 8601"),
        ({"due_on": "2026-12-21T00:00:00Z"}, "/data/due_on", "ISO 8601"),
        ({"number": "x" * 101}, "/data/number", "1 to 100"),
        ({"number": ""}, "/data/number", "1 to 100"),
        ({"number": "   "}, "/data/number", "1 to 100"),
        ({"number": "a\nb"}, "/data/number", "one line"),
        ({"number": "a\u2028b"}, "/data/number", "one line"),
        ({"number": 7}, "/data/number", '"number" is 7'),
        ({"number": None}, "/data/number", '"number" is null'),
        ({"url": "http://pay.example/i"}, "/data/url", "https"),
        ({"url": "javascript:alert(1)"}, "/data/url", "https"),
        ({"url": "https://user:pw@pay.example/"}, "/data/url", "without user name"),
        ({"url": "https://pay.example/a b"}, "/data/url", "percent-encoded"),
        ({"url": "https://pay.example/\u0000"}, "/data/url", "percent-encoded"),
        ({"url": 'https://pay.example/"onclick="x'}, "/data/url", "percent-encoded"),
        ({"url": "https:///path"}, "/data/url", "https"),
        ({"url": "https://pay.example:99999/"}, "/data/url", "https"),
        ({"url": "https://pay.example/" + "a" * 2000}, "/data/url", "2,000"),
        ({"account": "no such id"}, "/data/account", '"no such id"'),
        ({"account": ["acme"]}, "/data/account", "a list of 1"),
        ({"accounts": ["acme"]}, "/data/accounts", "is for broadcasts"),
        ({"products": "invoicing"}, "/data/products", "a list"),
        ({"products": ["a b"]}, "/data/products", "product ids"),
        ({"amont": "1.00"}, "/data/amont", 'did you mean "amount"?'),
        ({"qqqq": 1}, "/data/qqqq", "rolecast types show invoice.issued"),
        ({"a/b~c": 1}, "/data/a~1b~0c", '"a/b~c" is not a field'),
        ({"lines": [{"description": "x"}]}, "/data/lines/0/amount", "missing"),
        ({"lines": [{"description": "x", "amount": "1", "vat": 1}]}, "/data/lines/0/vat", "not a field"),
        ({"lines": [3]}, "/data/lines/0", "an object"),
        ({"lines": {}}, "/data/lines", "an empty object"),
        ({"not_before": "2026-11-21"}, "/data/not_before", "RFC 3339"),
        ({"not_before": "2026-11-21T10:00:00"}, "/data/not_before", "RFC 3339"),
        ({"not_before": "2026-11-21 10:00:00Z"}, "/data/not_before", "RFC 3339"),
        ({"not_before": "2026-11-21T25:00:00Z"}, "/data/not_before", "RFC 3339"),
        ({"not_before": "9999-12-31T23:59:59Z"}, "/data/not_before", "RFC 3339"),
        ({"not_before": "0001-01-01T00:00:00+23:00"}, "/data/not_before", "RFC 3339"),
        (
            {"not_before": "2026-11-21T10:00:00+01:00", "expires_at": "2026-11-21T09:00:00Z"},
            "/data/expires_at", 'must be after "not_before"',
        ),
        ({"attachments": [{}] * 6}, "/data/attachments", "at most 5"),
    ],
)  # fmt: skip
def test_a_fault_in_the_data_is_told_with_field_value_and_remedy(changes, pointer, words):
    kind, place, message = only_fault(invoice(**changes))
    assert (kind, place) == ("invalid", pointer)
    assert words in message
    assert message.endswith((".", "?"))
    assert "\n" not in message


def test_all_faults_are_told_at_once():
    value = {**invoice(amount=1, currency=..., amont="1"), "time": "yesterday", "id": ""}
    assert [(kind, pointer) for kind, pointer, _ in refused(value)] == [
        ("malformed", "/id"), ("malformed", "/time"), ("invalid", "/data/amount"), ("invalid", "/data/currency"),
        ("invalid", "/data/amont"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("routing", "pointer", "words"),
    [
        ({}, "/data/account", "names no account"),
        ({"account": "acme", "accounts": ["acme"]}, "/data/accounts", "keep one"),
        ({"accounts": []}, "/data/accounts", "an empty list"),
        ({"accounts": ["a", "a"]}, "/data/accounts", "distinct"),
        ({"accounts": ["a b"]}, "/data/accounts", "account ids"),
        ({"accounts": "acme"}, "/data/accounts", '"all"'),
        ({"accounts": "ALL"}, "/data/accounts", '"all"'),
        ({"accounts": [1]}, "/data/accounts", "account ids"),
    ],
)
def test_a_broadcast_names_its_audience_exactly_once(routing, pointer, words):
    kind, place, message = only_fault(announcement(**routing))
    assert (kind, place) == ("invalid", pointer)
    assert words in message


def test_a_body_may_have_lines_and_tabs_and_no_other_control_character():
    value = announcement(account="acme", body="a\n\tb")
    assert parse_event(value)
    for character in "\r\x0b\x00\x7f\x85\u2028":
        assert only_fault(announcement(account="acme", body=f"a{character}b"))[1] == "/data/body"


@pytest.mark.parametrize("name", ["webinar.scheduled", "maintenance.scheduled"])
def test_what_ends_before_it_starts_is_refused(name):
    value = events.sample(name)
    value["data"]["ends_at"] = value["data"]["starts_at"]
    assert only_fault(value)[1] == "/data/ends_at"


def pdf(**fields):
    content = base64.b64encode(b"%PDF-1.7 x").decode()
    return {"name": "invoice.pdf", "media_type": "application/pdf", "content_base64": content, **fields}


@pytest.mark.parametrize(
    ("attachment", "field"),
    [
        (pdf(url="https://pay.example/i.pdf"), "url"),
        (pdf(content_base64=None), "url"),
        (pdf(content_base64="not base64!"), "content_base64"),
        (pdf(content_base64=""), "content_base64"),
        (pdf(content_base64=base64.b64encode(b"MZ\x90").decode()), "content_base64"),
        (pdf(media_type="application/x-msdownload"), "media_type"),
        (pdf(name="invoice.exe"), "name"),
        (pdf(name="../../invoice.pdf"), "name"),
        (pdf(name="C:\\invoice.pdf"), "name"),
        (pdf(name="invoice\u202efdp.pdf"), "name"),
        (pdf(name="CON.pdf"), "name"),
        (pdf(name=".pdf"), "name"),
        (pdf(name="a\r\nb.pdf"), "name"),
        (pdf(name="a" * 97 + ".pdf"), "name"),
        (pdf(contact="a b"), "contact"),
        (pdf(inline=True), "inline"),
        (pdf(media_type="text/plain", name="a.txt", content_base64=base64.b64encode(b"\xff\x00").decode()),
         "content_base64"),
    ],
)  # fmt: skip
def test_an_attachment_is_a_plain_file_of_a_known_type(attachment, field):
    assert parse_event(invoice(attachments=[pdf(contact="c1")]))
    kind, pointer, message = only_fault(invoice(attachments=[attachment]))
    assert (kind, pointer) == ("invalid", f"/data/attachments/0/{field}")
    assert attachment.get("content_base64") in (None, "") or attachment["content_base64"] not in message


def test_a_signing_link_is_not_repeated_in_a_fault():
    value = events.sample("quote.issued")
    value["data"]["signing_url"] = "http://sign.example/secret"
    assert "secret" not in only_fault(value)[2]


def test_every_change_of_the_rules_is_taken():
    taken = read_file((FIXTURES / "requests.jsonl").read_bytes(), name="requests.jsonl")
    assert {event.data["change"]["change"] for event in taken if event.data.get("change")} == {
        "add_role", "remove_role", "replace_role", "add_contact", "remove_contact", "change_address",
        "update_contact", "set_products", "set_opt_out",
    }  # fmt: skip
    validator = jsonschema.Draft202012Validator(events.json_schema("action.requested"))
    assert all(validator.is_valid(event.data) for event in taken)


@pytest.mark.parametrize(
    ("change", "pointer", "words"),
    [
        ({"change": "swap_role"}, "", "add_role, "),
        ({"role": "executive"}, "", "add_role"),
        ({"change": []}, "", "an empty list"),
        ("add_role", "", "an object"),
        ({"change": "add_role", "role": "executive"}, "/contact", "missing"),
        ({"change": "add_role", "role": "executive", "contact": "c1", "to": "c2"}, "/to", "not a field"),
        ({"change": "replace_role", "role": "executive", "to": "c1"}, "/from", "missing"),
        ({"change": "change_address", "contact": "c1", "email": "a@b@c"}, "/email", '"a@b@c"'),
        ({"change": "update_contact", "contact": "c1", "fields": {}}, "/fields", "empty"),
        ({"change": "update_contact", "contact": "c1", "fields": {"email": "a@b.example"}}, "/fields/email", "not a"),
        ({"change": "set_products", "contact": "c1", "products": []}, "/products", "one or more"),
        ({"change": "set_opt_out", "contact": "c1", "role": "r", "category": "c", "opted_out": 1}, "/opted_out", "or"),
        ({"change": "add_contact", "contact": {"id": "c1"}}, "/contact/email", "missing"),
        ({"change": "add_contact", "contact": {"id": "c1", "email": "a@b.example", "kind": "robot"}}, "/contact/kind",
         "person"),
    ],
)  # fmt: skip
def test_a_change_must_have_the_shape_of_its_kind(change, pointer, words):
    value = events.sample("action.requested")
    value["data"]["change"] = change
    kind, place, message = only_fault(value)
    assert (kind, place) == ("invalid", "/data/change" + pointer)
    assert words in message


# ---------------------------------------------------------------- faults of the envelope


@pytest.mark.parametrize(
    ("changes", "kind", "pointer", "words"),
    [
        ({"specversion": "1.1"}, "malformed", "/specversion", '"1.0"'),
        ({"specversion": 1.0}, "malformed", "/specversion", '"1.0"'),
        ({"specversion": None}, "malformed", "/specversion", "missing"),
        ({"id": ""}, "malformed", "/id", '""'),
        ({"id": 7}, "malformed", "/id", "7"),
        ({"id": "x" * 257}, "malformed", "/id", "256"),
        ({"id": "a\u0007b"}, "malformed", "/id", "control"),
        ({"source": ""}, "malformed", "/source", "URI-reference"),
        ({"source": "a b"}, "malformed", "/source", "URI-reference"),
        ({"source": "1a:b"}, "malformed", "/source", "URI-reference"),
        ({"source": "http://[x"}, "malformed", "/source", "URI-reference"),
        ({"type": ""}, "malformed", "/type", '""'),
        ({"type": ["x"]}, "malformed", "/type", "a list"),
        ({"type": "invoice.isued"}, "invalid", "/type", 'did you mean "invoice.issued"?'),
        ({"type": "weather"}, "invalid", "/type", "rolecast types list"),
        ({"time": "2026-11-21"}, "malformed", "/time", "RFC 3339"),
        ({"time": 5}, "malformed", "/time", "RFC 3339"),
        ({"subject": ""}, "malformed", "/subject", "1 to 1,024"),
        ({"datacontenttype": "text/xml"}, "malformed", "/datacontenttype", "application/json"),
        ({"datacontenttype": "application/json; charset=latin-1"}, "malformed", "/datacontenttype", "UTF-8"),
        ({"dataschema": "schema"}, "malformed", "/dataschema", "URI"),
        ({"dataschema": ""}, "malformed", "/dataschema", "URI"),
        ({"data": None}, "invalid", "/data", "missing"),
        ({"data": "text"}, "invalid", "/data", '"text"'),
        ({"data": []}, "invalid", "/data", "an empty list"),
        ({"data_base64": "e30="}, "malformed", "/data_base64", 'in "data"'),
        ({"Subject": "x"}, "malformed", "/Subject", 'did you mean "subject"?'),
        ({"my-extension": "x"}, "malformed", "/my-extension", "a-z and 0-9"),
        ({"myextension": {}}, "malformed", "/myextension", "an empty object"),
        ({"myextension": 1.5}, "malformed", "/myextension", "1.5"),
        ({"myextension": 2**31}, "malformed", "/myextension", "32-bit"),
        ({"myextension": "x" * 5000}, "malformed", "/myextension", "4,096"),
    ],
)
def test_a_fault_in_the_envelope_is_told_with_attribute_value_and_remedy(changes, kind, pointer, words):
    found, place, message = only_fault({**invoice(), **changes})
    assert (found, place) == (kind, pointer)
    assert words in message


@pytest.mark.parametrize(
    "source", ["/billing", "urn:uuid:6e8bc430", "https://billing.vendor.example/a?b=c#d", "1-555-1"]
)
def test_a_source_is_any_uri_reference(source):
    assert parse_event({**invoice(), "source": source}).source == source


@pytest.mark.parametrize(
    "time",
    ["2026-11-21T10:00:00Z", "2026-11-21t10:00:00.5z", "2026-11-21T23:59:60Z", "2026-11-21T10:00:00.123456789+01:00"],
)
def test_every_way_of_writing_a_time_of_rfc_3339_is_taken(time):
    event = parse_event({**invoice(not_before=time), "time": time})
    assert event.time == time
    assert event.not_before.tzinfo is UTC


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "x", [], [1]])
def test_what_is_no_object_is_no_event(value):
    assert only_fault(value)[:2] == ("malformed", "")


# ---------------------------------------------------------------- strict JSON, sizes


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"{'a': 1}", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e400}', b'{"a": 1, "a": 2}',
        b'{"a": "\\ud800"}', b'{"a": "\\u0000"}', b'{"a": "\xff"}', b"[" * 100_000, b"9" * 5000,
        b'{"a": 9007199254740993}',
    ],
)  # fmt: skip
def test_what_two_readers_could_read_differently_is_malformed(body):
    with pytest.raises(EventError) as error:
        parse_json(body)
    assert error.value.kind == "malformed"


def test_an_event_beyond_256_kb_is_too_large_unless_its_files_make_it_so():
    kind, pointer, message = only_fault(announcement(account="acme", body="x" * 300 * 1024))
    assert (kind, pointer) == ("too_large", "")
    assert "262,144" in message
    large = base64.b64encode(b"%PDF-" + b"x" * 3 * 1024 * 1024).decode()
    assert parse_event(invoice(attachments=[pdf(content_base64=large)]))
    assert only_fault(invoice(attachments=[pdf(content_base64=large)] * 2))[0] == "too_large"


def test_an_event_of_256_kb_is_taken_to_the_byte():
    value = announcement(account="acme", body="x")
    value["subject"] = "x"
    padding = {f"e{n}": "x" * 4000 for n in range(65)}
    value.update(padding)
    size = len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
    value["data"]["body"] += "x" * (events.MAX_EVENT_BYTES - size)
    assert events.check_event_size(value) is None
    value["data"]["body"] += "x"
    assert events.check_event_size(value).kind == "too_large"


# ---------------------------------------------------------------- the same fact


def test_content_is_what_makes_two_publications_the_same():
    event = parse_event(invoice())
    assert content(event) == content(parse_event({**invoice(), "time": "2027-01-01T00:00:00Z", "traceparent": "x"}))
    for other in ({"subject": "x"}, {"dataschema": "urn:x:y"}, {"data": invoice(amount="1280.01")["data"]}):
        assert content(event) != content(parse_event({**invoice(), **other}))


@given(st.randoms(use_true_random=False), st.sampled_from(sorted(TYPES)))
@settings(max_examples=60, deadline=None)
def test_content_does_not_depend_on_the_order_of_keys(random, name):
    def shuffled(value):
        if isinstance(value, dict):
            keys = list(value)
            random.shuffle(keys)
            return {key: shuffled(value[key]) for key in keys}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    value = events.sample(name)
    assert content(parse_event(shuffled(value))) == content(parse_event(value))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(json_values, st.sampled_from(sorted(TYPES)), st.data())
@settings(max_examples=300, deadline=None)
def test_any_json_is_an_event_or_an_event_error(noise, name, data):
    value = events.sample(name)
    fields = sorted({*value["data"], *TYPES[name].model.model_fields})
    value["data"][data.draw(st.sampled_from(fields))] = noise
    attribute = data.draw(st.sampled_from(["", "data", *value, "myextension"]))
    for candidate in (noise, value, {**value, attribute: noise}, [noise, value]):
        for parse in (parse_event, parse_batch):
            told = ""
            try:
                parse(candidate)
            except EventError as error:
                told = str(error)
            assert told.isprintable()


# ---------------------------------------------------------------- HTTP

STRUCTURED = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
BATCH = {"Content-Type": "application/cloudevents-batch+json"}


def binary(value):
    """The headers and body of an event in binary mode."""
    headers = {
        f"Ce-{name}": quote(str(attribute), safe=" !#$&'()*+,/:;=?@[]-._~")
        for name, attribute in value.items()
        if name not in ("data", "datacontenttype")
    }
    return {**headers, "Content-Type": value["datacontenttype"]}, json.dumps(value["data"]).encode()


def http_fault(headers, body=b""):
    with pytest.raises(EventError) as error:
        from_http(headers, body)
    return error.value.kind, error.value.faults[0].pointer, error.value.faults[0].message


@pytest.mark.parametrize("name", CONTRACT)
def test_an_event_is_the_same_in_all_three_modes(name):
    value = {**events.sample(name), "subject": "Zürich, 100 %", "traceparent": "00-ab"}
    expected = parse_event(value)
    body = json.dumps(value).encode()
    assert from_http(STRUCTURED, body) == events.Received((expected,), batch=False)
    assert from_http({"content-type": "application/json"}, body) == events.Received((expected,), batch=False)
    assert from_http(BATCH, b"[" + body + b"]") == events.Received((expected,), batch=True)
    assert from_http(*binary(value)) == events.Received((expected,), batch=False)


def test_an_empty_batch_is_no_event_and_no_fault():
    assert from_http(BATCH, b"[]") == events.Received((), batch=True)


def test_a_batch_is_taken_whole_or_not_at_all():
    body = json.dumps([invoice(), invoice(amount=1), {**invoice(), "id": ""}, 5]).encode()
    with pytest.raises(EventError) as error:
        from_http(BATCH, body)
    assert [(fault.kind, fault.pointer) for fault in error.value.faults] == [
        ("invalid", "/1/data/amount"), ("malformed", "/2/id"), ("malformed", "/3"),
    ]  # fmt: skip
    assert error.value.kind == "malformed"  # 400 before 422
    assert str(error.value).startswith("/1/data/amount: ")


def test_a_batch_has_at_most_100_events_and_1_mb():
    assert len(from_http(BATCH, json.dumps([invoice()] * 100).encode()).events) == 100
    assert http_fault(BATCH, json.dumps([invoice()] * 101).encode())[0] == "too_large"
    assert http_fault(BATCH, b" " * (events.MAX_BATCH_BYTES + 1))[0] == "too_large"
    assert http_fault(STRUCTURED, b" " * (events.MAX_EVENT_BYTES_WITH_FILES + 1))[0] == "too_large"


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "no Content-Type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "application/cloudevents+json"),
        ({"Content-Type": "text/plain"}, "text/plain"),
        ({"Content-Type": "application/cloudevents+xml"}, "cloudevents+xml"),
        ({"Content-Type": "application/cloudevents+json; charset=utf-16"}, "UTF-8"),
        ({"Content-Type": "application/xml", "ce-id": "1"}, "application/xml"),
        ({**STRUCTURED, "Content-Encoding": "gzip"}, "gzip"),
    ],
)
def test_what_is_not_json_in_utf_8_is_unsupported(headers, words):
    kind, _, message = http_fault(headers, json.dumps(invoice()).encode())
    assert kind == "unsupported"
    assert words in message


def test_binary_mode_refuses_what_it_has_no_place_for():
    headers, body = binary(invoice())
    assert http_fault({**headers, "ce-data": "{}"}, body)[0] == "malformed"
    assert http_fault({**headers, "ce-datacontenttype": "application/json"}, body)[0] == "malformed"
    assert http_fault({**headers, "ce-subject": "caf\xe9"}, body)[:2] == ("malformed", "/subject")
    assert http_fault({**headers, "ce-subject": "%FF"}, body)[:2] == ("malformed", "/subject")
    assert http_fault({**headers, "ce-my_extension": "x"}, body)[:2] == ("malformed", "/my_extension")
    assert http_fault(headers, b"")[:2] == ("invalid", "/data")
    assert http_fault(headers, b"{")[:2] == ("malformed", "/data")
    assert http_fault(headers, b'{"a": 1, "a": 2}')[0] == "malformed"

    class Twice(dict):
        def items(self):
            return [*super().items(), ("CE-ID", "other")]

    kind, _, message = http_fault(Twice(headers), body)
    assert kind == "malformed"
    assert '"ce-id" stands there twice' in message


def test_a_quoted_header_is_unquoted_and_decoded_once():
    headers, body = binary(invoice())
    headers["ce-subject"] = '"Euro%20%E2%82%AC%20%F0%9F%98%80 \\"%2541\\""'
    assert from_http(headers, body).events[0].subject == 'Euro \u20ac \U0001f600 "%41"'


def test_an_array_sent_as_one_event_is_told_how_to_send_it():
    kind, _, message = http_fault(STRUCTURED, b"[]")
    assert kind == "malformed"
    assert "cloudevents-batch+json" in message


# ---------------------------------------------------------------- the CloudEvents corpus and the SDK as oracle


def spec_sample(number):
    (path,) = shared("corpora", "cloudevents").glob(f"spec-json-format-{number:02}-*.json")
    return json.loads(path.read_text())


def test_the_specification_s_events_lack_nothing_but_a_type_and_data_of_ours():
    assert [(kind, pointer) for kind, pointer, _ in refused(spec_sample(3))] == [("invalid", "/type")]
    for number in (4, 5):
        assert [(kind, pointer) for kind, pointer, _ in refused(spec_sample(number))] == [
            ("invalid", "/type"), ("invalid", "/data"),
        ]  # fmt: skip
    assert {pointer for _, pointer, _ in refused(spec_sample(1))} == {"/type", "/datacontenttype", "/data_base64"}
    assert {pointer for _, pointer, _ in refused(spec_sample(2))} == {"/type", "/datacontenttype", "/data"}
    assert {pointer for _, pointer, _ in refused(spec_sample(6))} == {"/type", "/data_base64"}


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_the_specification_s_attributes_are_taken_in_all_three_modes(number):
    value = {**spec_sample(number), "type": "invoice.issued", "data": invoice()["data"]}
    value["datacontenttype"] = "application/json"
    value.pop("data_base64", None)
    event = parse_event(value)
    assert event.extensions == {name: item for name, item in value.items() if name.startswith("comexample")}
    assert event.source == "/mycontext"
    body = json.dumps(value).encode()
    assert from_http(STRUCTURED, body).events == (event,)
    assert from_http(BATCH, b"[" + body + b"]").events == (event,)
    (again,) = from_http(*binary({name: item for name, item in value.items() if item is not None})).events
    assert again.extensions == {name: str(item) for name, item in event.extensions.items()}  # headers are texts
    assert content(again) == content(event)


def test_the_specification_s_batches_are_told_event_by_event():
    assert from_http(BATCH, json.dumps(spec_sample(8)).encode()).events == ()
    with pytest.raises(EventError) as error:
        from_http(BATCH, json.dumps(spec_sample(7)).encode())
    assert {fault.pointer for fault in error.value.faults} == {
        "/0/type", "/0/datacontenttype", "/0/data_base64", "/1/type",
    }  # fmt: skip


def test_the_conformance_suite_s_requests_are_read():
    text = shared("corpora", "cloudevents", "conformance-features-http-protocol-binding.feature").read_text()
    for media_type in re.findall(r"\| (application/\S+(?:; charset=utf-8)?) +\|", text):
        data = json.dumps(invoice()["data"])
        if "cloudevents" in media_type:
            (body,) = re.findall(r"Content-Length: 266\s+(\{.*?\n        \})", text, re.DOTALL)
            body = body.replace("com.example.someevent", "invoice.issued")
            body = re.sub(r'"data": \{[^}]*\}', '"data": ' + data.replace("\\", r"\\"), body)
            headers = {"Host": "example.com", "Content-Type": media_type}
        else:
            headers = dict(re.findall(r"(ce-\w+): (\S+)", text))
            headers |= {"ce-type": "invoice.issued", "Content-Type": media_type}
            body = data
        (event,) = from_http(headers, body.encode()).events
        assert (event.id, event.source, event.time) == (
            "1234-1234-1234", "/mycontext/subcontext", "2018-04-05T03:56:24Z",
        )  # fmt: skip


def test_the_sdk_reads_what_we_sample_and_we_read_what_the_sdk_writes():
    for name in TYPES:
        value = {**events.sample(name), "subject": "Zürich \u20ac 100 %", "myextension": "x"}
        ours = parse_event(value)
        attributes = {key: item for key, item in value.items() if key != "data"}
        attributes["time"] = datetime(2026, 11, 21, 10, tzinfo=UTC)
        theirs = CloudEvent(attributes=attributes, data=value["data"])
        for write in (to_structured, to_binary):
            message = write(theirs, JSONFormat())
            (event,) = from_http(message.headers, message.body).events
            assert (event.id, event.subject, event.data) == (ours.id, ours.subject, ours.data)
            assert event.extensions == {"myextension": "x"}
            assert content(event) == content(ours)
        read = from_structured(
            HTTPMessage(headers=STRUCTURED, body=json.dumps(value).encode()), JSONFormat(), CloudEvent
        )
        assert read.get_data() == ours.data
        headers, body = binary(value)
        read = from_binary(HTTPMessage(headers=headers, body=body), JSONFormat(), CloudEvent)
        assert (read.get_subject(), read.get_data()) == (ours.subject, ours.data)


# ---------------------------------------------------------------- files


def test_a_file_is_one_event_an_array_or_json_lines():
    one, two = invoice(), invoice(number="2")
    assert [event.data for event in read_file(json.dumps(one, indent=2).encode())] == [one["data"]]
    assert [event.data for event in read_file(json.dumps(one).encode() + b"\n")] == [one["data"]]
    lines = f"{json.dumps(one)}\r\n\n{json.dumps(two)}\n".encode()
    for data in (json.dumps([one, two]).encode(), lines, b"\xef\xbb\xbf" + lines):
        assert [event.data for event in read_file(data)] == [one["data"], two["data"]]
    assert read_file(b"[]") == []
    many = read_file((FIXTURES / "array.json").read_bytes(), name="array.json")
    assert [event.type.name for event in many] == ["invoice.issued", "outage.started"]
    assert (many[0].not_before, many[1].accounts) == (datetime(2026, 11, 22, 5, tzinfo=UTC), "all")


def file_faults(data, name=""):
    with pytest.raises(EventError) as error:
        read_file(data, name=name)
    return [(fault.line, fault.pointer, fault.message) for fault in error.value.faults]


def test_the_whole_file_is_checked_and_every_fault_has_its_place():
    lines = [json.dumps(invoice()), "{broken}", "", json.dumps(invoice(amount=1)), '{"a": 1, "a": 2}', "[1]"]
    faults = file_faults("\n".join(lines).encode())
    assert [(line, pointer) for line, pointer, _ in faults] == [(2, ""), (4, "/data/amount"), (5, "/a"), (6, "")]
    assert "broken at column 2" in faults[0][2]
    array = json.dumps([invoice(), invoice(amount=1)]).encode()
    assert [(line, pointer) for line, pointer, _ in file_faults(array)] == [(None, "/1/data/amount")]
    assert "line 3" in file_faults(b'{\n "a": 1,\n "b" 2\n}')[0][2]
    assert file_faults(b"\n")[0][2].startswith("The file is empty")
    assert file_faults(b"nonsense", name="events.jsonl")[0][0] == 1


def test_a_file_of_nothing_but_faults_tells_the_first_hundred():
    assert len(file_faults(b'{"a": 1}\n' * 1000)) == events.MAX_FAULTS


def test_an_error_reads_as_a_sentence_with_its_place():
    with pytest.raises(EventError, match=r'^line 1, /data/amount: "amount" is 1, but must be .* \(and 1 more\)$'):
        read_file(f"{json.dumps(invoice(amount=1, currency=1))}\n{json.dumps(invoice())}".encode())


def test_events_are_values():
    event = parse_event(invoice())
    assert isinstance(event, Event)
    assert event == parse_event(copy.deepcopy(invoice()))


def test_what_another_action_changes_is_the_publishers_own_word():
    routing = {"what": "routing", "to": "queue 7"}
    value = events.sample("action.requested")
    value["data"] |= {"action": "account_change", "change": routing}
    assert parse_event(value).data["change"] == routing
    value["data"]["action"] = "contact_change"
    with pytest.raises(EventError, match="add_role"):
        parse_event(value)


def test_a_file_named_as_lines_may_hold_one_indented_event_or_an_array():
    one = events.sample("invoice.issued")
    for text in (json.dumps(one, indent=1), json.dumps([one, one | {"id": "2"}])):
        assert read_file(text.encode(), name="events.jsonl")[0].id == one["id"]
