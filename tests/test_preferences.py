"""The recipient's pages: what they show, what they switch, and how far an opt-out reaches."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, func, insert, select, update

from subscriptions import changes
from subscriptions.audience import EventFacts, resolve
from subscriptions.changes import Actor, PutContact, RemoveContact, SetOptOut, Suppress
from subscriptions.schema import audit, contacts, installation, opt_outs
from tests.web_site import Web, opened, served
from worker.schema import events

ONE_CLICK = {"List-Unsubscribe": "One-Click"}
OPERATOR = Actor("cli:anna", "cli")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with opened(tmp_path) as app, served(app) as web:
        yield web


def change(web: Web, *wanted: changes.Change) -> None:
    with web.app.database.write() as connection:
        changes.apply(connection, OPERATOR, wanted, catalogues=web.app.catalogues, now=web.app.clock())


def rows(web: Web) -> set[tuple[str, str, str]]:
    """(role, category, set by) of every opt-out."""
    with web.app.database.read() as connection:
        return {
            tuple(row) for row in connection.execute(select(opt_outs.c.role, opt_outs.c.category, opt_outs.c.set_by))
        }


def audits(web: Web) -> list[tuple[str, str]]:
    with web.app.database.read() as connection:
        found = select(audit.c.actor, audit.c.door).where(audit.c.door == "preferences")
        return [tuple(row) for row in connection.execute(found)]


def guard(web: Web) -> int:
    with web.app.database.read() as connection:
        return connection.execute(select(installation.c.guard)).scalar_one()


def gets(web: Web, account: str, category: str) -> set[str]:
    """The contacts of an account that would get a category now."""
    facts = web.facts(account)
    found = resolve(web.app.catalogues[facts.catalogue], facts, EventFacts(category))
    return {one.contact.id for one in found.recipients}


def shown(text: str) -> dict[str, bool]:
    """The switches of a preference page, and whether each is on."""
    boxes = re.findall(r'<input type="checkbox"[^>]*>', text)
    return {re.search(r'value="(\w+)"', box)[1]: " checked" in box for box in boxes}


def save(web: Web, path: str, on: dict[str, bool]):
    form = {"shown": list(on), "on": [key for key, wanted in on.items() if wanted]}
    return web.client.post(path, data=form)


# ---------------------------------------------------------------- the preference page


def test_the_page_shows_what_a_contact_receives_and_why_and_nothing_else_about_people(web: Web) -> None:
    page = web.client.get(web.preferences_path("acme", "c1"))
    assert page.status_code == 200
    assert "a•••@acme.example" in page.text
    for other in ("ada@acme.example", "Ada@", ">Ada<", "bob", "Bob", "beta", "Beta"):
        assert other not in page.text
    assert "Acme Corp" in page.text
    assert "Webinar invitation" in page.text
    assert "as Executive" in page.text
    assert "https://status.vendor.example/" in page.text
    assert "never mail outages" in page.text
    switches = shown(page.text)
    catalogue = web.app.catalogues["billtrust"]
    held = [catalogue.roles[role] for role in ("executive", "primary_support")]
    allowed = {entry.category for role in held for entry in role.receives.values() if entry.opt_out}
    assert set(switches) == allowed
    assert all(switches.values())
    assert "Service outage" not in page.text


def test_the_page_of_every_contact_agrees_with_the_resolver(web: Web) -> None:
    for account in ("acme", "beta", "city"):
        facts = web.facts(account)
        catalogue = web.app.catalogues[facts.catalogue]
        for contact in facts.contacts:
            text = web.client.get(web.preferences_path(account, contact.id)).text
            for key, category in catalogue.vocabulary.categories.items():
                if category.class_ == "status" or not any(
                    key in catalogue.roles[role].receives for role in contact.roles
                ):
                    continue
                entries = [
                    catalogue.roles[role].receives[key]
                    for role in contact.roles
                    if key in catalogue.roles[role].receives
                ]
                if all(entry.mode != "fallback" for entry in entries):
                    assert contact.id in gets(web, account, key)
                assert category.title.partition(" (")[0] in text


def test_a_promotional_switch_holds_for_the_address_in_every_account(web: Web) -> None:
    path = web.preferences_path("acme", "c1")
    assert gets(web, "beta", "webinar_invite") == {"b1", "b2"}
    before = guard(web)
    answer = save(web, path, {**shown(web.client.get(path).text), "webinar_invite": False})
    assert answer.status_code == 200
    assert 'role="status"' in answer.text
    assert shown(answer.text)["webinar_invite"] is False
    assert gets(web, "acme", "webinar_invite") == set()
    assert gets(web, "beta", "webinar_invite") == {"b2"}
    assert guard(web) > before
    assert audits(web) == [(f"recipient:{web.number('acme', 'c1')}", "preferences")]
    assert shown(web.client.get(web.preferences_path("beta", "b1")).text)["webinar_invite"] is False


def sentence(text: str, category: str) -> str:
    """What the page says about a category that can be switched."""
    return " ".join(re.search(rf'id="why-{category}">(.*?)</p>', text, re.DOTALL)[1].split())


def test_what_is_switched_off_is_not_said_to_be_received(web: Web) -> None:
    path = web.preferences_path("acme", "c1")
    reach = "A change holds for your address, in all your roles and accounts."
    before = web.client.get(path).text
    assert sentence(before, "announcement") == "You get it as Executive contact."
    assert sentence(before, "webinar_invite") == f"You get it as Executive contact. {reach}"
    after = save(web, path, {"announcement": False, "webinar_invite": False}).text
    assert sentence(after, "announcement") == "Switched off. You would get it as Executive contact."
    assert sentence(after, "webinar_invite") == f"Switched off. You would get it as Executive contact. {reach}"
    assert sentence(after, "corporate_communication") == "You get it as Executive contact."


def test_an_informational_switch_is_the_contacts_own(web: Web) -> None:
    path = web.preferences_path("acme", "c1")
    save(web, path, {"announcement": False, "corporate_communication": True})
    assert gets(web, "acme", "announcement") == set()
    assert gets(web, "acme", "corporate_communication") == {"c1"}
    assert gets(web, "beta", "announcement") == {"b1", "b2"}
    assert rows(web) == {("executive", "announcement", "recipient")}


def test_what_was_switched_off_can_be_switched_on_again(web: Web) -> None:
    path = web.preferences_path("acme", "c1")
    everything = shown(web.client.get(path).text)
    save(web, path, dict.fromkeys(everything, False))
    assert not any(shown(web.client.get(path).text).values())
    answer = save(web, path, everything)
    assert shown(answer.text) == everything
    assert rows(web) == set()


def test_an_operators_opt_out_can_be_lifted_by_the_recipient_and_a_complaint_cannot(web: Web) -> None:
    change(web, SetOptOut(("acme", "c1"), "executive", "announcement", opted_out=True, set_by="operator"))
    path = web.preferences_path("acme", "c1")
    assert shown(web.client.get(path).text)["announcement"] is False
    assert shown(save(web, path, {"announcement": True}).text)["announcement"] is True
    change(web, Suppress("ada@acme.example", "complaint", "delivery:X/1"))
    page = web.client.get(path).text
    assert "announcement" not in shown(page)
    assert "reported our mail as unwanted" in page
    assert "What has been stopped" in page
    assert "You get it as Executive contact. Stopped" not in page
    save(web, path, {"announcement": True, "webinar_invite": True})
    assert gets(web, "acme", "announcement") == set()


def test_a_form_switches_nothing_that_its_page_did_not_offer(web: Web) -> None:
    path = web.preferences_path("city", "p1")
    locked = {"quote", "upgrade_notice", "contract_renewal", "sales_correspondence", "outage_incident", "nonsense"}
    answer = save(web, path, dict.fromkeys(locked - set(shown(web.client.get(path).text)), False))
    assert answer.status_code == 200
    assert rows(web) == set()
    assert web.client.post(path, data={}).status_code == 400
    assert rows(web) == set()


def test_an_invoice_copy_may_be_refused_and_the_duty_stays(web: Web) -> None:
    path = web.preferences_path("city", "p1")
    page = web.client.get(path).text
    assert shown(page)["invoice"] is True
    assert "You get a copy as Primary Contact." in page
    said = save(web, path, {"invoice": False}).text
    assert "Switched off in part. You get it as " in said
    assert "Otherwise you would also get a copy as Primary Contact." in said
    assert rows(web) == {("primary_contact", "invoice", "recipient")}
    assert "p1" in gets(web, "city", "invoice")


def test_a_role_beyond_its_limit_is_shown_as_void_and_brings_nothing(web: Web) -> None:
    extra = [
        PutContact("city", f"x{index}", email=f"x{index}@city.example", roles=["primary_contact"]) for index in range(2)
    ]
    change(web, *extra)
    last = web.client.get(web.preferences_path("city", "x1")).text
    assert "not in effect" in last
    assert shown(last) == {}


def test_product_preferences_are_shown(web: Web) -> None:
    assert "you chose: payments" in web.client.get(web.preferences_path("acme", "c2")).text
    assert "invoicing, payments" in web.client.get(web.preferences_path("acme", "c1")).text


def test_a_suppressed_address_is_told_that_nothing_is_mailed_to_it(web: Web) -> None:
    change(web, Suppress("ada@acme.example", "hard_bounce", "operator:anna"))
    page = web.client.get(web.preferences_path("acme", "c1")).text
    assert "nothing is mailed to this address" in page
    assert "You get it" not in page
    assert sentence(page, "announcement") == "You would get it as Executive contact."


def test_the_link_of_somebody_who_is_no_longer_a_contact_leads_to_a_friendly_page(web: Web) -> None:
    path = web.preferences_path("acme", "c2")
    change(web, RemoveContact("acme", "c2"))
    for answer in (web.client.get(path), save(web, path, {"announcement": False})):
        assert answer.status_code == 404
        assert "no longer a contact" in answer.text


def test_reading_the_page_changes_nothing(web: Web) -> None:
    path = web.preferences_path("acme", "c1")
    before = guard(web)
    for method in ("GET", "HEAD", "OPTIONS"):
        web.client.request(method, path)
    assert (rows(web), guard(web)) == (set(), before)


# ---------------------------------------------------------------- one click


def test_looking_at_the_unsubscribe_link_changes_nothing(web: Web) -> None:
    path = web.unsubscribe_path(web.publish("webinar.scheduled", accounts="all"), "ada@acme.example")
    before = guard(web)
    page = web.client.get(path)
    assert page.status_code == 200
    assert "<button>Stop it</button>" in page.text
    assert "ada@" not in page.text
    assert "Acme" not in page.text
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE"):
        web.client.request(method, path)
    assert (rows(web), guard(web)) == (set(), before)


@pytest.mark.parametrize("form", ["urlencoded", "multipart"])
def test_one_click_stops_a_promotional_category_for_the_address_at_once_and_for_good(web: Web, form: str) -> None:
    path = web.unsubscribe_path(web.publish("webinar.scheduled", accounts="all"), "ada@acme.example")
    before = guard(web)
    for _ in range(2):
        given = {"data": ONE_CLICK} if form == "urlencoded" else {"files": {"List-Unsubscribe": (None, "One-Click")}}
        answer = web.client.post(path, **given)
        assert (answer.status_code, answer.history) == (200, [])
        assert "location" not in answer.headers
        assert 'role="status"' in answer.text
    assert gets(web, "acme", "webinar_invite") == set()
    assert gets(web, "beta", "webinar_invite") == {"b2"}
    assert gets(web, "acme", "announcement") == {"c1"}
    assert guard(web) == before + 2  # one for each ground, and none for the second click
    assert {by for _, _, by in rows(web)} == {"recipient"}


def test_one_click_acts_on_every_ground_of_an_informational_mail_and_on_nobody_else(web: Web) -> None:
    path = web.unsubscribe_path(web.publish("announcement.published", accounts="all"), "ada@acme.example")
    web.client.post(path, data=ONE_CLICK)
    assert gets(web, "acme", "announcement") == set()
    assert gets(web, "beta", "announcement") == {"b2"}
    assert gets(web, "acme", "corporate_communication") == {"c1"}
    assert rows(web) == {("executive", "announcement", "recipient")}


def test_one_click_reaches_both_records_of_a_mailbox_that_were_merged_into_one_mail(web: Web) -> None:
    change(web, PutContact("acme", "c9", email="ada@ACME.example", roles=["executive", "secondary_support"]))
    ulid = web.publish("announcement.published", accounts=["acme"])
    web.client.post(web.unsubscribe_path(ulid, "ada@acme.example"), data=ONE_CLICK)
    assert gets(web, "acme", "announcement") == set()


def test_a_post_without_the_exact_words_changes_nothing(web: Web) -> None:
    path = web.unsubscribe_path(web.publish("webinar.scheduled", accounts="all"), "ada@acme.example")
    for body in (b"", b"List-Unsubscribe=one-click", b"List-Unsubscribe=One-Click&List-Unsubscribe=Two", b"x" * 17_000):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        assert web.client.post(path, content=body, headers=headers).status_code in {400, 413}
    assert web.client.post(path, json=ONE_CLICK).status_code == 400
    assert (
        web.client.post(path, content=b"\x00\xff", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    )
    assert rows(web) == set()


def test_the_plain_form_of_the_page_works_like_one_click(web: Web) -> None:
    path = web.unsubscribe_path(web.publish("webinar.scheduled", accounts="all"), "zoe@beta.example")
    name, value = re.search(r'<input type="hidden" name="([^"]+)" value="([^"]+)">', web.client.get(path).text).groups()
    answer = web.client.post(path, data={name: value}, headers={"Origin": "null", "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200
    assert gets(web, "beta", "webinar_invite") == {"b1"}


def test_a_link_for_one_purpose_is_worthless_for_another(web: Web) -> None:
    one_click = web.unsubscribe_path(web.publish("webinar.scheduled", accounts="all"), "ada@acme.example")
    token = one_click.rpartition("/")[2]
    assert web.client.get(f"/preferences/{token}").status_code == 404
    token = web.preferences_path("acme", "c1").rpartition("/")[2]
    assert web.client.post(f"/unsubscribe/{token}", data=ONE_CLICK).status_code == 404
    assert rows(web) == set()


def test_the_link_of_a_mail_whose_event_was_purged_says_so(web: Web) -> None:
    path = web.links.unsubscribe(999, 1, b"of an event that is gone").removeprefix("http://127.0.0.1:8080")
    answer = web.client.post(path, data=ONE_CLICK)
    assert answer.status_code == 404
    assert "so old" in answer.text


def test_a_page_whose_number_was_given_to_another_contact_is_answered_like_any_unknown_link(web: Web) -> None:
    unknown = web.client.get("/preferences/nonsense")
    path, number = web.preferences_path("acme", "c1"), web.number("acme", "c1")
    # given a restored database, in which somebody else was added under the number
    with web.app.database.write() as connection:
        row = connection.execute(select(contacts).where(contacts.c.id == number)).mappings().one()
        connection.execute(delete(contacts).where(contacts.c.id == number))
        connection.execute(insert(contacts).values(**{**row, "ext": "c9", "name": "Somebody else"}))
    # then the link of the older mail neither shows nor changes anything
    answer = web.client.get(path)
    assert (answer.status_code, answer.text) == (404, unknown.text)
    answer = save(web, path, {"service_notice": False, "webinar_invite": False})
    assert (answer.status_code, answer.text) == (404, unknown.text)
    assert rows(web) == set()
    # and theirs works
    assert web.client.get(web.preferences_path("acme", "c9")).status_code == 200


def test_one_click_from_a_mail_whose_event_number_was_given_to_another_changes_nothing(web: Web) -> None:
    unknown = web.client.post("/unsubscribe/nonsense", data=ONE_CLICK)
    path = web.unsubscribe_path(web.publish("webinar.scheduled", accounts="all"), "ada@acme.example")
    # given a restored database, in which another event got the number
    with web.app.database.write() as connection:
        connection.execute(update(events).values(ulid="01ANOTHEREVENT000000000000"))
    # then the older mail's button does nothing to that event's recipient
    for answer in (web.client.post(path, data=ONE_CLICK), web.client.get(path)):
        assert (answer.status_code, answer.text) == (404, unknown.text)
    assert rows(web) == set()
    assert audits(web) == []


def test_what_stopped_is_kept_by_the_next_import(web: Web) -> None:
    from tests.web_site import DIRECTORY, load

    web.client.post(
        web.unsubscribe_path(web.publish("webinar.scheduled", accounts="all"), "ada@acme.example"), data=ONE_CLICK
    )
    again = json.loads(json.dumps(DIRECTORY))
    again["accounts"][0]["contacts"][0]["opt_outs"] = []
    load(web.app, again)
    assert gets(web, "acme", "webinar_invite") == set()
    with web.app.database.read() as connection:
        assert connection.execute(select(func.count()).select_from(opt_outs)).scalar_one() > 0
