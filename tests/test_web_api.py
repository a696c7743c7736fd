"""The API of publishers: what it takes, refuses and answers, against a real installation on SQLite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, select

from subscriptions.schema import audit
from tests.web_site import Web, an_event, opened, served
from worker import events as event_types
from worker import keys
from worker.app import open_app
from worker.schema import events
from worker.settings import Secret
from worker.web import api


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with opened(tmp_path) as app, served(app) as web:
        yield web


def post(web: Web, body, headers, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return web.client.post("/v1/events", content=content, headers=headers, **options)


def stored(web: Web) -> int:
    with web.app.database.read() as connection:
        return connection.execute(select(func.count()).select_from(events)).scalar_one()


def batch(headers):
    return {**headers, "Content-Type": "application/cloudevents-batch+json"}


# ---------------------------------------------------------------- accepting


def test_an_accepted_event_is_answered_with_exactly_the_contracts_body(web: Web) -> None:
    event = an_event("service.notice", account="acme", products=["nonesuch"])
    answer = post(web, event, web.key())
    assert answer.status_code == 202
    body = answer.json()
    ulid = body["event"]
    assert len(ulid) == 26
    assert body == {
        "event": ulid,
        "id": event["id"],
        "source": "/samples",
        "duplicate": False,
        "route": "email",
        "outcome": "no_recipient",
        "status_page": None,
        "notes": ["no account uses the product 'nonesuch'"],
        "links": {"self": f"/v1/events/{ulid}"},
    }


def test_the_same_event_again_is_a_duplicate_and_other_content_a_conflict(web: Web) -> None:
    key, event = web.key(), an_event("service.notice", account="acme")
    first, again = post(web, event, key).json(), post(web, {**event, "time": "2026-11-22T10:00:00Z"}, key)
    assert again.status_code == 202
    assert again.json() == {**first, "duplicate": True}
    event["data"]["title"] = "Something else"
    conflict = post(web, event, key)
    assert conflict.status_code == 409
    assert conflict.headers["content-type"] == "application/problem+json"
    assert conflict.json()["errors"][0]["pointer"] == "/id"
    assert stored(web) == 1


def test_an_outage_is_answered_with_the_status_page(web: Web) -> None:
    answer = post(web, an_event("outage.started", accounts="all"), web.key()).json()
    assert answer["route"] == "status_page"
    assert answer["status_page"] == {"url": "https://status.vendor.example/", "incident": None}
    assert answer["outcome"] is None


def test_binary_mode_and_a_batch_are_taken_as_well(web: Web) -> None:
    key = web.key()
    event = an_event("service.notice", account="acme")
    headers = {
        "Authorization": key["Authorization"],
        "Content-Type": "application/json",
        "ce-specversion": "1.0",
        "ce-id": "binary-1",
        "ce-source": "/samples",
        "ce-type": "service.notice",
    }
    assert post(web, event["data"], headers).json()["id"] == "binary-1"
    several = [an_event("service.notice", account=name) for name in ("acme", "beta")]
    answers = post(web, [*several, several[0]], batch(key)).json()
    assert [one["duplicate"] for one in answers] == [False, False, True]
    assert [one["id"] for one in answers] == [one["id"] for one in (*several, several[0])]
    assert post(web, [], batch(key)).json() == []


def test_a_batch_is_all_or_nothing_and_its_pointers_begin_with_the_index(web: Web) -> None:
    good, unknown = an_event("service.notice", account="acme"), an_event("service.notice", account="nobody")
    refused = post(web, [good, unknown], batch(web.key()))
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "/1/data/account"
    assert stored(web) == 0


# ---------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("change", "status", "pointer"),
    [
        ({"specversion": "0.3"}, 400, "/specversion"),
        ({"type": "invoice.isued"}, 422, "/type"),
        ({"data": {"account": "acme", "title": "x", "body": "y", "titel": "z"}}, 422, "/data/titel"),
        ({"data": {"account": "nobody", "title": "x", "body": "y"}}, 422, "/data/account"),
        ({"data": {"accounts": ["acme", "nobody"], "title": "x", "body": "y"}}, 422, "/data/accounts/1"),
    ],
)
def test_a_fault_is_told_with_its_pointer(web: Web, change, status, pointer) -> None:
    refused = post(web, {**an_event("service.notice", account="acme"), **change}, web.key())
    assert refused.status_code == status
    problem = refused.json()
    assert refused.headers["content-type"] == "application/problem+json"
    assert pointer in [error["pointer"] for error in problem["errors"]]
    assert problem["status"] == status
    assert stored(web) == 0


def test_a_category_that_the_catalogue_lacks_refuses_the_event(web: Web) -> None:
    refused = post(web, an_event("invoice.issued", account="beta"), web.key())
    accepted = post(web, an_event("webinar.scheduled", account="city"), web.key(name="other"))
    assert {refused.status_code, accepted.status_code} <= {202, 422}
    assert 422 in {refused.status_code, accepted.status_code}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b'"\\ud800"', b'{"a": "\\u0000"}', b"[" * 100_000, b"\xff", b"[]"],
)
def test_what_is_not_strict_json_is_malformed(web: Web, body: bytes) -> None:
    assert post(web, body, web.key()).status_code == 400


def test_a_body_that_is_too_large_encoded_or_of_another_kind_is_refused(web: Web) -> None:
    key = web.key()
    event = an_event("service.notice", account="acme", body="x" * 300_000)
    assert post(web, event, key).status_code == 413
    assert post(web, b" " * (5 * 1024 * 1024 + 1), key).status_code == 413
    assert post(web, b" " * (1024 * 1024 + 1), batch(key)).status_code == 413
    assert post(web, [an_event("service.notice", account="acme")] * 101, batch(key)).status_code == 413
    assert post(web, event, {**key, "Content-Encoding": "gzip"}).status_code == 415
    assert post(web, event, {**key, "Content-Type": "text/xml"}).status_code == 415


def test_a_call_without_a_good_key_is_refused_before_its_body_is_read(web: Web) -> None:
    key = web.key()
    event = an_event("service.notice", account="acme")
    wrong = key["Authorization"][:-1] + ("A" if key["Authorization"][-1] != "A" else "B")
    for authorization in ("", "Bearer", "Bearer nonsense", wrong, key["Authorization"].replace("Bearer", "Basic")):
        refused = post(web, event, {**key, "Authorization": authorization})
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Bearer")
    with web.app.database.write() as connection:
        keys.revoke(connection, "publisher", now=1)
    assert post(web, event, key).status_code == 401


def test_a_key_publishes_only_what_its_scopes_name(web: Web) -> None:
    key = web.key("publish:service.notice")
    assert post(web, an_event("service.notice", account="acme"), key).status_code == 202
    refused = post(web, an_event("marketing.message", account="city"), key)
    assert refused.status_code == 403
    assert refused.json()["errors"][0]["pointer"] == "/type"


def test_who_asked_counts_only_from_a_key_that_attests(web: Web) -> None:
    request = an_event("action.requested", account="acme", action="contact_list", requested_by="c1")
    plain = web.client.post(
        "/v1/events?dry_run=true", content=json.dumps(request), headers=web.key(name="plain")
    ).json()
    attesting = web.client.post(
        "/v1/events?dry_run=true", content=json.dumps(request), headers=web.key("publish:*", "attest", name="attesting")
    ).json()
    assert [one["contact"] for one in attesting["answers"][0]["recipients"]] == ["c1"]
    assert plain["answers"][0]["recipients"] == []


def test_a_key_with_too_many_requests_in_hand_is_asked_to_come_again(web: Web, monkeypatch) -> None:
    monkeypatch.setattr(api, "AT_ONCE", 0)
    refused = post(web, an_event("service.notice", account="acme"), web.key())
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"


def test_a_database_that_cannot_be_written_is_answered_503_with_retry_after(web: Web) -> None:
    key = web.key()
    event = an_event("service.notice", account="acme")
    read_only = Secret(f"sqlite:///{web.app.database.path}?mode=ro")
    with open_app(replace(web.app.settings, database_url=read_only)) as app, served(app) as beside:
        refused = post(beside, event, key)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["content-type"] == "application/problem+json"
        assert str(web.app.database.path) not in refused.text
        dry = beside.client.post("/v1/events?dry_run=true", content=json.dumps(event), headers=key)
        assert dry.status_code in {200, 503}
    assert post(web, event, key).json()["duplicate"] is False


# ---------------------------------------------------------------- dry run


def test_a_dry_run_answers_what_would_happen_and_stores_nothing(web: Web) -> None:
    event = an_event("service.notice", account="acme")
    answer = web.client.post("/v1/events?dry_run=true", content=json.dumps(event), headers=web.key())
    assert answer.status_code == 200
    (only,) = answer.json()["answers"]
    assert (only["source"], only["event"], only["account"]) == ("/samples", event["id"], "acme")
    assert {one["contact"] for one in only["recipients"]} | {one["contact"] for one in only["excluded"]} == {
        "c1", "c2", "c3",
    }  # fmt: skip
    assert answer.json()["next"] is None
    assert stored(web) == 0


def test_a_dry_run_of_a_batch_is_paged_and_every_answer_comes_once(web: Web) -> None:
    key = batch(web.key())
    body = [
        an_event("service.notice", accounts="all"),
        an_event("outage.started", account="acme"),
        an_event("service.notice", accounts=["beta", "city", "acme"]),
    ]
    seen, cursor = [], None
    for _ in range(20):
        address = "/v1/events?dry_run=true&limit=2" + (f"&next={cursor}" if cursor else "")
        page = web.client.post(address, content=json.dumps(body), headers=key).json()
        assert len(page["answers"]) <= 2
        seen += [(one["event"], one["account"]) for one in page["answers"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert sorted(seen) == sorted(
        [(body[0]["id"], name) for name in ("acme", "beta", "city")]
        + [(body[1]["id"], "acme")]
        + [(body[2]["id"], name) for name in ("acme", "beta", "city")]
    )


def test_a_dry_run_says_the_same_as_the_real_run_stores(web: Web) -> None:
    event = an_event("service.notice", accounts="all")
    key = web.key("publish:*", "read")
    dry = web.client.post("/v1/events?dry_run=true", content=json.dumps(event), headers=key).json()["answers"]
    ulid = web.publish("service.notice", accounts="all")
    real = web.client.get(f"/v1/events/{ulid}/verdicts", headers=key).json()["answers"]
    for answer in (*dry, *real):
        answer["recipients"].sort(key=lambda one: one["contact"])
        answer["excluded"].sort(key=lambda one: one["contact"])
    assert real == dry


@pytest.mark.parametrize("query", ["dryrun=true", "dry-run=true", "dry_run=true&dry_run=false"])
def test_a_misspelt_dry_run_is_refused_instead_of_published(web: Web, query: str) -> None:
    event = an_event("service.notice", account="acme")
    answer = web.client.post(f"/v1/events?{query}", content=json.dumps(event), headers=web.key())
    assert answer.status_code == 422
    assert "dry_run" in answer.json()["detail"]
    assert stored(web) == 0


@pytest.mark.parametrize("address", ["/healthz", "/readyz", "/metrics", "/v1/types", "/openapi.json"])
def test_head_answers_what_get_does_without_its_body(web: Web, address: str) -> None:
    answer = web.client.head(address)
    assert answer.status_code == 200
    assert answer.content == b""
    assert web.client.head("/v1/events").status_code == 405


def test_a_cursor_that_was_made_up_is_refused(web: Web) -> None:
    body, key = json.dumps(an_event("service.notice", account="acme")), web.key()
    for cursor in ("x", "LTEuMA", "MA", "a" * 199):
        answer = web.client.post(f"/v1/events?dry_run=true&next={cursor}", content=body, headers=key)
        assert answer.status_code == 400, cursor


# ---------------------------------------------------------------- reading and cancelling


def test_an_event_shows_its_state_deliveries_and_verdicts(web: Web) -> None:
    key = web.key("publish:*", "read")
    ulid = web.publish("service.notice", accounts="all")
    state = web.client.get(f"/v1/events/{ulid}", headers=key).json()
    assert (state["event"], state["status"], state["accounts"]) == (ulid, "sending", 3)
    seen, cursor = [], None
    while True:
        address = f"/v1/events/{ulid}/deliveries?limit=1" + (f"&next={cursor}" if cursor else "")
        page = web.client.get(address, headers=key).json()
        seen += [one["email"] for one in page["deliveries"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert len(seen) == len(set(seen)) == state["totals"]["planned"]
    first = web.client.get(f"/v1/events/{ulid}/verdicts?limit=2", headers=key).json()
    rest = web.client.get(f"/v1/events/{ulid}/verdicts?limit=2&next={first['next']}", headers=key).json()
    assert [one["account"] for one in first["answers"] + rest["answers"]] == ["acme", "beta", "city"]
    assert rest["next"] is None


def test_a_key_sees_its_own_events_and_with_read_all_of_them(web: Web) -> None:
    own, other, reader = web.key(name="own"), web.key(name="other"), web.key("read", name="reader")
    ulid = post(web, an_event("service.notice", account="acme"), own).json()["event"]
    for address in (f"/v1/events/{ulid}", f"/v1/events/{ulid}/deliveries", f"/v1/events/{ulid}/verdicts"):
        assert web.client.get(address, headers=own).status_code == 200
        assert web.client.get(address, headers=reader).status_code == 200
        assert web.client.get(address).status_code == 401
        hidden = web.client.get(address, headers=other)
        missing = web.client.get(address.replace(ulid, "0" * 26), headers=other)
        assert hidden.status_code == missing.status_code == 404


def test_a_cancelled_event_sends_no_more_and_cancelling_again_changes_nothing(web: Web) -> None:
    key = web.key("publish:*", "read")
    ulid = web.publish("service.notice", accounts="all")
    first = web.client.post(f"/v1/events/{ulid}/cancel", headers=key).json()
    again = web.client.post(f"/v1/events/{ulid}/cancel", headers=key).json()
    assert first["status"] == again["status"] == "cancelled"
    assert first["totals"] == again["totals"] == {"cancelled": first["withdrawn"]}
    assert (first["withdrawn"] > 0, again["withdrawn"]) == (True, 0)
    assert web.client.post(f"/v1/events/{ulid}/cancel", headers=web.key("read", name="reader")).status_code == 403
    with web.app.database.read() as connection:
        kept = connection.execute(select(audit.c.actor).where(audit.c.kind == "event.cancelled")).scalars().all()
    assert len(kept) == 1, "who cancelled is kept, once"
    assert kept[0].startswith("api:")


# ---------------------------------------------------------------- types, health, description


def test_types_and_their_schemas_are_told_without_a_key(web: Web) -> None:
    told = web.client.get("/v1/types").json()["types"]
    assert {one["type"] for one in told} == set(event_types.TYPES)
    schema = web.client.get("/v1/types/invoice.issued/schema")
    assert schema.json() == event_types.json_schema("invoice.issued")
    assert web.client.get("/v1/types/nonesuch/schema").status_code == 404


def test_health_readiness_metrics_and_the_description_are_there(web: Web) -> None:
    assert web.client.get("/healthz").json() == {"status": "ok"}
    ready = web.client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert any("ROLECAST_RELAY_URLS" in fact for fact in ready.json()["facts"])
    web.publish("service.notice", accounts="all")
    assert 'rolecast_deliveries{status="planned"}' in web.client.get("/metrics").text
    described = web.client.get("/openapi.json").json()
    assert "application/cloudevents+json" in described["paths"]["/v1/events"]["post"]["requestBody"]["content"]
    assert not any(path.startswith(("/inbox", "/preferences", "/unsubscribe")) for path in described["paths"])
