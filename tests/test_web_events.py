"""The pages of events: what an event says, what became of it, and who did not hear of it and why, in plain words."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

from subscriptions import changes
from subscriptions.changes import Actor, PutContact
from tests.web_site import Web, opened, served
from worker import matters
from worker.ledger import Status

SECRET = "https://sign.example/d/q-1?key=abc&who=ada"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with opened(tmp_path) as app, served(app) as web:
        yield web


def page(web: Web, ulid: str, query: str = "") -> str:
    """The page of an event in one line."""
    answer = web.client.get(f"/events/{ulid}{query}")
    assert answer.status_code == 200
    return " ".join(answer.text.split())


def words(html: str) -> str:
    """What a person reads of it."""
    return unescape(" ".join(re.sub(r"<[^>]+>", " ", html.replace("<wbr>", "")).split()))


def outcome(html: str) -> str:
    return words(re.search(r'<div class="outcome[^"]*">(.*?)</div>', html)[1])


# ---------------------------------------------------------------- what an event says


def test_the_page_shows_what_the_event_says_and_never_its_signing_link(web: Web) -> None:
    attachment = {
        "name": "quote.pdf",
        "media_type": "application/pdf",
        "url": "https://files.example/q",
        "contact": "p1",
    }
    ulid = web.publish(
        "quote.issued", account="city", title=f"Sign {SECRET}", signing_url=SECRET, amount="7400.00", currency="EUR",
        body=f"Go to [it]({SECRET}) or {SECRET.upper()}.", attachments=[attachment], expires_on="2026-12-31",
        lines=[{"description": "Chat", "amount": "6400.00", "quantity": "2"}],
    )  # fmt: skip
    html = page(web, ulid)
    for shown in ("7400.00 EUR", "31 Dec 2026", "Chat (2): 6400.00 EUR", "quote.pdf (for p1 alone)", "Signing link"):
        assert shown in html
    for text in (html, web.client.get("/events").text):
        assert "sign.example" not in text.lower()
        assert "key=abc" not in text.lower()
    assert "files.example" not in html
    assert "[signing link withheld]" in html


def test_a_body_is_shown_as_text_that_can_do_nothing(web: Web) -> None:
    body = (
        "# Big\n\n<script>alert(1)</script> **bold** ![x](https://tracker.example/p.gif) [go](javascript:alert(1))"
        " [page](https://vendor.example)"
    )
    html = page(web, web.publish("service.notice", accounts="all", title="<b>Hello</b>", body=body))
    assert "<strong>bold</strong>" in html
    assert 'href="https://vendor.example"' in html
    assert "<p><strong>Big</strong></p>" in html
    assert "&lt;b&gt;Hello&lt;/b&gt;" in html
    for unwanted in ("<script", "<img", 'href="javascript', "<b>"):
        assert unwanted not in html


def test_the_list_says_what_each_event_is_about_and_for_whom(web: Web) -> None:
    web.publish("service.notice", accounts="all", title="Exports move")
    web.publish("invoice.issued", account="city", number="7121", amount="1280.00", currency="EUR", period=None)
    web.publish("webinar.scheduled", accounts=["acme", "beta"], title="Late payers")
    rows = [words(row) for row in re.findall(r"<tr>(.*?)</tr>", " ".join(web.client.get("/events").text.split()))[1:]]
    assert rows[0].startswith("Late payers webinar.scheduled · /samples")
    assert "2 accounts sending" in rows[0]
    assert rows[1].startswith("Invoice issued: 7121, 1280.00 EUR invoice.issued")
    assert "all accounts sending planned 3" in rows[2]


def test_who_asked_is_shown_as_far_as_it_counts(web: Web) -> None:
    ulid = web.publish("action.requested", account="acme", action="contact_list", requested_by="c1")
    html = page(web, ulid)
    assert "Action requested: contact list" in html
    assert "does not attest" not in html
    with web.app.database.write() as connection:
        connection.exec_driver_sql("""UPDATE events SET routing = '{"account": "acme", "attested": false}'""")
    assert "c1 (taken as staff: the key does not attest)" in page(web, ulid)


# ---------------------------------------------------------------- what became of it


def test_the_outcome_of_a_broadcast_is_told_in_words(web: Web) -> None:
    ulid = web.publish("announcement.published", accounts="all")
    html = page(web, ulid)
    told = outcome(html)
    # Ada is an executive of two accounts with one mailbox.
    assert told.startswith("For 3 of 7 contacts in 3 accounts, with 2 mails: who is a contact twice gets one.")
    assert "0 of 2 mails accepted by the relay so far." in told
    assert "1 account left out: its catalogue does not have this category." in told
    with web.app.database.write() as connection:
        connection.exec_driver_sql("UPDATE tallies SET status = ?", (int(Status.ACCEPTED),))
        connection.exec_driver_sql("UPDATE events SET status = 'done'")
    assert outcome(page(web, ulid)).startswith("Sent to 3 of 7 contacts in 3 accounts, with 2 mails")


def test_the_outcome_for_one_account_names_it(web: Web) -> None:
    assert outcome(page(web, web.publish("invoice.issued", account="city"))).startswith(
        "For 2 of 2 contacts in city. 0 of 2 mails accepted by the relay so far."
    )
    asked = page(web, web.publish("action.requested", account="acme", action="contact_list", requested_by="c3"))
    assert outcome(asked).startswith("Rejected: who asked may not ask for this.")


def test_an_account_without_the_category_is_one_line(web: Web) -> None:
    html = page(web, web.publish("announcement.published", accounts="all"))
    city = re.search(r'<div class="account"> <h3[^>]*>city.*?</div>', html)[0]
    assert words(city) == "city rejected: the account's catalogue does not have this category"
    assert "p1" not in city


def test_contacts_that_one_reason_holds_for_share_a_row(web: Web) -> None:
    html = words(page(web, web.publish("announcement.published", account="acme")))
    assert "c1 ada@acme.example recipient as Executive contact" in html.replace("ada @acme", "ada@acme")
    assert "c2, c3 skipped no role of theirs receives this" in html


def test_warnings_are_sentences(web: Web) -> None:
    extra = [
        PutContact("city", f"x{index}", email=f"x{index}@city.example", roles=["primary_contact"]) for index in range(2)
    ]
    with web.app.database.write() as connection:
        changes.apply(connection, Actor("cli:anna", "cli"), extra, catalogues=web.app.catalogues, now=web.app.clock())
    html = page(web, web.publish("invoice.issued", account="city"))
    assert "Primary Contact has more holders than the 3 allowed; those beyond it do not count." in html
    assert "cardinality" not in html


def test_an_outage_says_that_it_was_pointed_to_the_status_page_and_mailed_to_nobody(web: Web) -> None:
    ulid = web.publish("outage.started", accounts="all")
    html = page(web, ulid)
    assert outcome(html).startswith("Pointed to the status page, mailed to nobody.")
    assert 'href="https://status.vendor.example/"' in html
    incident = '{"url": "https://status.vendor.example/", "incident": {"title": "Cards are slow", "status": "resolved",'
    incident += ' "url": "https://status.vendor.example/i/1", "updated_at": "2026-11-20T11:05:00Z"}}'
    with web.app.database.write() as connection:
        connection.exec_driver_sql("UPDATE events SET status_page = ?", (incident,))
    html = page(web, ulid)
    assert '<a href="https://status.vendor.example/i/1" rel="noreferrer">Cards are slow</a>' in html
    assert "resolved, 20 Nov 2026, 11:05:00 UTC" in html


def test_an_event_whose_payload_is_gone_still_has_a_page(web: Web) -> None:
    ulid = web.publish("quote.issued", account="city")
    with web.app.database.write() as connection:
        connection.exec_driver_sql("UPDATE events SET payload = NULL, routing = NULL")
    assert "What was published is not kept any more." in page(web, ulid)
    assert "Quote issued" in web.client.get("/events").text


# ---------------------------------------------------------------- size


def test_a_page_of_a_large_broadcast_is_small_and_opens_at_once(tmp_path: Path) -> None:
    accounts = [
        {"id": f"a{number}", "catalogue": "billtrust", "uses": ["invoicing"],
         "contacts": [
             {"id": f"c{one}", "email": f"c{one}@a{number}.example", "roles": ["executive"]} for one in range(size)
         ]}
        for number, size in enumerate([3000, *[50] * 60])
    ]  # fmt: skip
    with opened(tmp_path, contents={"accounts": accounts}) as app, served(app) as web:
        ulid = web.publish("announcement.published", accounts="all")
        page(web, ulid)
        began = time.monotonic()
        html = page(web, ulid)
        took = time.monotonic() - began
        assert "of 6,000 contacts in 61 accounts" in html
        assert "2,600 more contacts are not listed here." in html
        assert len(html) < 300_000
        assert took < 1.0
        seen, path = set(), f"/events/{ulid}"
        while path:
            html = " ".join(web.client.get(path).text.split())
            seen |= set(re.findall(r'<h3 id="account-\d+">(a\d+) ', html))
            following = re.search(r'href="(/events/\w+\?verdicts=\d+)#verdicts">Further accounts', html)
            path = following[1] if following else ""
        assert seen == {f"a{number}" for number in range(61)}


# ---------------------------------------------------------------- what needs a person


def test_what_needs_a_person_stands_above_the_events(web: Web) -> None:
    ulid = web.publish("service.notice", account="acme")
    assert "What needs a person" not in web.client.get("/events").text
    with web.app.database.write() as connection:
        matters.note(connection, 1, {(1, matters.NOBODY): 2}, now=web.app.clock())
        connection.exec_driver_sql("INSERT INTO pauses VALUES ('class', '<b>', 'rolecast:<i>', 1795255200000000)")
    html = " ".join(web.client.get("/events").text.split())
    told = words(re.search(r"<table class=\"stacks\">(.*?)</table>", html)[1])
    assert told.startswith("What Since (UTC) What to do urgent class <b> is paused: Rolecast paused it by itself (<i>)")
    assert "21 Nov 10:00:00 see to the cause, then rolecast resume --class <b>" in told
    assert f"nobody could be told in 2 accounts: no contact should get it, can be reached and wants it {ulid}" in told
    assert "<code>rolecast resume --class &lt;b&gt;</code>" in html
    assert f'<a href="/events/{ulid}" class="id">' in html
    assert html.index("What needs a person") < html.index("All events")
    assert "What needs a person" not in web.client.get(f"/events?before={ulid}").text
