"""The local inbox: what it catches, finds, forgets and shows, through real SMTP and HTTP."""

from __future__ import annotations

import os
import re
import signal
import smtplib
import subprocess
import sys
import time
from collections.abc import Iterator
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTP
from functools import partial
from html import escape
from pathlib import Path

import pytest

from subscriptions.database import DatabaseUnusable
from tests.test_web_security import running
from tests.web_site import BASE, Web, an_event, opened, served
from worker import history
from worker.events import parse_event
from worker.intake import Publisher
from worker.web.inbox import Inbox, decoded, fault_of
from worker.web.inbox_pages import in_scheme, one_click_path

HOSTILE = '<p>Hello <b>you</b></p><script>alert(1)</script><img src="https://tracker.example/p.gif">'


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    inbox = Inbox(tmp_path / "inbox", slow_seconds=0.3)
    yield inbox
    inbox.stop()


@pytest.fixture
def port(inbox: Inbox) -> int:
    return inbox.start()[1]


@pytest.fixture
def web(tmp_path: Path, inbox: Inbox) -> Iterator[Web]:
    with opened(tmp_path) as app, served(app, inbox=inbox) as web:
        yield web


def a_mail(
    to: str = "ada@acme.example", subject: str = "Hello", text: str = "Good news.", **headers: str
) -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "Vendor <news@vendor.example>", to, subject
    for name, value in headers.items():
        mail[name.replace("_", "-")] = value
    mail.set_content(text)
    mail.add_alternative(HOSTILE, subtype="html")
    return mail


def send(port: int, *mails: EmailMessage) -> None:
    with smtplib.SMTP("127.0.0.1", port) as relay:
        for mail in mails:
            relay.send_message(mail)


# ---------------------------------------------------------------- catching


def test_a_mail_is_caught_byte_for_byte_and_found_by_what_it_says(inbox: Inbox, port: int) -> None:
    send(port, a_mail(subject="Rechnung für Öl", text="Zahlbar im Dezember\r\n.\r\nDanke", X_Rolecast_Event="01ABC"))
    send(port, a_mail("bob@acme.example", "Other"))
    assert inbox.count() == 2
    assert [one.recipient for one in inbox.mails()] == ["bob@acme.example", "ada@acme.example"]
    for search in ("rechnung", "FÜR öl", "dezember", "ada@", "ada dezember"):
        assert [one.subject for one in inbox.mails(search)] == ["Rechnung für Öl"], search
    assert inbox.mails("ada nonsense") == []
    assert inbox.mails("%") == []
    (caught,) = inbox.mails("ada@")
    opened_mail = inbox.open(caught.id)
    assert opened_mail.text.splitlines() == ["Zahlbar im Dezember", ".", "Danke"]
    assert opened_mail.html.startswith("<p>Hello")
    assert (caught.event, caught.envelope_from) == ("01ABC", "news@vendor.example")
    assert len(opened_mail.raw) == caught.size


def test_the_list_is_paged_newest_first(inbox: Inbox, port: int) -> None:
    send(port, *(a_mail(subject=f"Number {index}") for index in range(7)))
    seen, before = [], None
    while page := inbox.mails(before=before, limit=3):
        seen += [one.subject for one in page]
        before = page[-1].id
    assert seen == [f"Number {index}" for index in range(6, -1, -1)]


def test_a_mail_is_found_by_its_message_id(inbox: Inbox, port: int) -> None:
    send(port, a_mail(Message_ID="<1@vendor.example>"), a_mail(Message_ID="<2@vendor.example>"))
    found = inbox.find(["<2@vendor.example>", "<3@vendor.example>", ""])
    assert list(found) == ["<2@vendor.example>"]
    assert inbox.find([]) == {}


def test_only_the_last_mails_are_kept(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "small", keep=150)
    _, port = inbox.start()
    try:
        send(port, *(a_mail(subject=str(index)) for index in range(400)))
        assert 150 <= inbox.count() < 250
        assert inbox.mails(limit=1)[0].subject == "399"
    finally:
        inbox.stop()


def test_addresses_of_test_domains_play_faults(inbox: Inbox, port: int) -> None:
    with smtplib.SMTP("127.0.0.1", port) as relay:
        relay.ehlo()
        for address, code in (("bounce-1@x.test", 550), ("tempfail@x.test", 451), ("BOUNCE@x.test", 550)):
            relay.mail("news@vendor.example")
            assert relay.rcpt(address)[0] == code
            relay.rset()
        started = time.monotonic()
        relay.sendmail("news@vendor.example", ["slow@x.test"], a_mail().as_bytes())
        assert time.monotonic() - started >= 0.3
    assert [one.recipient for one in inbox.mails()] == ["slow@x.test"]
    assert fault_of("bounce@acme.example") is None
    assert fault_of("ada@x.test") is None


def test_what_was_caught_is_there_after_a_restart(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "kept")
    send(inbox.start()[1], a_mail())
    inbox.stop()
    again = Inbox(tmp_path / "kept")
    assert again.count() == 1
    again.stop()


def test_a_broken_mail_is_caught_and_shown_as_it_is(inbox: Inbox, port: int, web: Web) -> None:
    broken = b"Subject: =?nonsense?q?a?= =?utf-8?b?!!?=\r\nContent-Type: text/html; charset=x-none\r\n\r\n\xff\xfe<b>"
    with smtplib.SMTP("127.0.0.1", port) as relay:
        relay.sendmail("a@x.example", ["b@x.example"], broken)
        relay.sendmail("a@x.example", ["b@x.example"], b"")
    for one in inbox.mails():
        for tab in ("html", "text", "headers", "source"):
            assert web.client.get(f"/inbox/{one.id}?tab={tab}").status_code == 200
    assert decoded("=?utf-8?q?=C3=A4?=") == "ä"


def test_several_hundred_mails_a_second_are_caught(inbox: Inbox, port: int) -> None:
    mails = [a_mail(subject=str(index)).as_bytes(policy=SMTP) for index in range(300)]
    started = time.monotonic()
    with smtplib.SMTP("127.0.0.1", port) as relay:
        for mail in mails:
            relay.sendmail("news@vendor.example", ["ada@acme.example"], mail)
    assert inbox.count() == 300
    assert 300 / (time.monotonic() - started) > 60  # far below what it does, for busy machines


# ---------------------------------------------------------------- showing


def test_the_pages_show_a_mail_in_four_views(inbox: Inbox, port: int, web: Web) -> None:
    event = web.publish("service.notice", accounts="all")
    send(port, a_mail(subject="Hello <you>", X_Rolecast_Event=event))
    page = web.client.get("/inbox?q=good+news").text
    assert "Hello &lt;you&gt;" in page
    assert "No mail with" in web.client.get("/inbox?q=nonsense").text
    (caught,) = inbox.mails()
    own = f"/inbox/{caught.id}"
    html = web.client.get(own).text
    assert f'src="{own}/html?scheme=light"' in html
    assert "allow-scripts" not in html
    assert "allow-same-origin" not in html
    assert f'href="/events/{event}"' in html
    assert "Good news." in web.client.get(f"{own}?tab=text").text
    assert "X-Rolecast-Event" in web.client.get(f"{own}?tab=headers").text
    assert "multipart/alternative" in web.client.get(f"{own}?tab=source").text
    assert web.client.get(f"{own}/mail.eml").content == inbox.open(caught.id).raw
    assert 'class="mail phone dark"' in web.client.get(f"{own}?width=phone&scheme=dark").text
    assert web.client.get("/inbox/999").status_code == 404
    assert web.client.get("/inbox/nonsense").status_code == 422
    assert web.client.get(f"{own}?tab=nonsense").status_code == 422


def test_the_html_of_a_mail_is_never_part_of_our_page(inbox: Inbox, port: int, web: Web) -> None:
    send(port, a_mail(text="<script>alert(2)</script>", subject="<script>alert(3)</script>"))
    number = inbox.mails()[0].id
    for tab in ("html", "text", "headers", "source"):
        assert "<script>" not in web.client.get(f"/inbox/{number}?tab={tab}").text
    alone = web.client.get(f"/inbox/{number}/html")
    policy = alone.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-popups allow-popups-to-escape-sandbox; default-src 'none'")
    assert "allow-scripts" not in policy
    assert "frame-ancestors 'self'" in policy
    assert alone.headers["referrer-policy"] == "no-referrer"


def test_a_colour_scheme_is_decided_by_the_server() -> None:
    html = (
        '<html><head><meta name="color-scheme" content="light dark"><style>:root { color-scheme: light dark }'
        "@media (prefers-color-scheme: dark) { b { color: red } }</style></head><body></body></html>"
    )
    dark, light = in_scheme(html, "dark"), in_scheme(html, "light")
    assert "prefers-color-scheme" not in dark + light
    assert "@media (min-width: 0px) { b" in dark
    assert "@media (max-width: 0px) { b" in light
    assert 'content="dark"' in dark
    assert "light dark" not in dark + light
    assert in_scheme("plain", "dark").endswith("plain")


def test_the_unsubscribe_button_does_the_post_of_a_mail_program(inbox: Inbox, port: int, web: Web) -> None:
    import httpx2

    event = web.publish("webinar.scheduled", accounts="all")
    with running(web, inbox) as url:
        path = web.unsubscribe_path(event, "ada@acme.example")
        send(port, a_mail(List_Unsubscribe=f"<{BASE}{path}>", List_Unsubscribe_Post="List-Unsubscribe=One-Click"))
        number = inbox.mails()[0].id
        assert "Unsubscribe as a mail program would" in httpx2.get(f"{url}/inbox/{number}").text
        answer = httpx2.post(f"{url}/inbox/{number}/unsubscribe")
    assert (answer.status_code, "unsubscribed" in answer.text) == (200, True)
    assert ("ada@acme.example", "webinar_invite") in web.facts("acme").opted_out


@pytest.mark.parametrize(
    ("link", "post"),
    [
        ("<https://attacker.example/unsubscribe/x>", "List-Unsubscribe=One-Click"),
        (f"<{BASE}/inbox/1/unsubscribe>", "List-Unsubscribe=One-Click"),
        (f"<{BASE}/unsubscribe/x>", ""),
        (f"<{BASE}@attacker.example/unsubscribe/x>", "List-Unsubscribe=One-Click"),
        (f"<mailto:x@attacker.example>, <{BASE}/unsubscribe/x>", "List-Unsubscribe=One-Click"),
    ],
)
def test_the_unsubscribe_button_calls_nobody_else(inbox: Inbox, port: int, web: Web, link: str, post: str) -> None:
    headers = {"List_Unsubscribe": link} | ({"List_Unsubscribe_Post": post} if post else {})
    send(port, a_mail(**headers))
    mail = inbox.open(inbox.mails()[0].id)
    assert one_click_path(mail, BASE) is None
    assert web.client.post(f"/inbox/{mail.caught.id}/unsubscribe").status_code == 422


# ---------------------------------------------------------------- signing links

SECRET = "https://sign.example/d/q-1?key=a'b&who=ada"


def a_quote(web: Web) -> str:
    return web.publish("quote.issued", account="city", signing_url=SECRET)


def a_signers_mail(event: str) -> EmailMessage:
    """A mail with the link in its subject, text, HTML and two files, encoded so that the bytes hide it."""
    mail = EmailMessage()
    mail["From"], mail["To"] = "Vendor <news@vendor.example>", "pia@city.example"
    mail["Subject"], mail["X-Rolecast-Event"] = f"Sign at {SECRET}, für heute", event
    mail.set_content(f"Sign here: {SECRET}\n\nGrüße\n", cte="base64")
    mail.add_alternative(f'<p><a href="{escape(SECRET)}">Sign</a></p>', subtype="html", cte="quoted-printable")
    mail.add_attachment(f"link,{SECRET}\n", subtype="csv", filename="links.csv")
    mail.add_attachment(f"%PDF-1.7 {SECRET}".encode(), maintype="application", subtype="pdf", filename="quote.pdf")
    return mail


def leaks(text: str) -> bool:
    return "sign.example" in text.lower() or "q-1?key" in text.lower()


def test_a_signing_link_is_masked_in_every_view_search_and_file(inbox: Inbox, port: int, web: Web) -> None:
    inbox.hide(partial(history.signing_link, web.app.database))
    send(port, a_signers_mail(a_quote(web)))
    [caught] = inbox.mails()
    own = f"/inbox/{caught.id}"
    for path in ("/inbox", own, *(f"{own}?tab={tab}" for tab in ("text", "headers", "source")), f"{own}/html"):
        assert not leaks(web.client.get(path).text), path
    downloaded = web.client.get(f"{own}/mail.eml").content
    for part in message_from_bytes(downloaded).walk():
        assert not leaks((part.get_payload(decode=True) or b"").decode("utf-8", "replace"))
    assert inbox.mails("sign.example") == inbox.mails("key=a") == []
    assert inbox.mails("signing-link.masked") == [caught]
    opened = inbox.open(caught.id)
    assert "Grüße" in opened.text
    assert opened.attachments == ("links.csv", "quote.pdf")
    assert "it is for its signer alone" in web.client.get(own).text


def test_other_mails_are_kept_byte_for_byte(inbox: Inbox, port: int, web: Web) -> None:
    event = web.publish("service.notice", accounts="all")
    mail = a_mail(X_Rolecast_Event=event)
    mail.set_boundary("the-same-in-both")
    send(port, mail)
    inbox.hide(partial(history.signing_link, web.app.database))
    send(port, mail)
    second, first = inbox.mails()
    assert inbox.open(first.id).raw == inbox.open(second.id).raw


def test_a_mail_waits_while_nobody_can_say_whether_it_holds_a_signing_link(inbox: Inbox, port: int) -> None:
    def unusable(_: str) -> None:
        message = "the database is gone"
        raise DatabaseUnusable(message)

    inbox.hide(unusable)
    with pytest.raises(smtplib.SMTPDataError) as refused:
        send(port, a_mail(X_Rolecast_Event="01M8"))
    assert refused.value.smtp_code == 451
    assert inbox.count() == 0


def test_up_with_an_inbox_masks_signing_links_from_the_first_mail_on(tmp_path: Path) -> None:
    import httpx2

    event = an_event("quote.issued", account="city", signing_url=SECRET)
    signer = {"id": "s", "email": "sue@city.example", "roles": ["quote_approver"]}
    city = {"id": "city", "catalogue": "issuetrak", "contacts": [signer]}
    with opened(tmp_path, contents={"accounts": [city]}) as app:
        app.intake.accept([parse_event(event)], Publisher())
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "ROLECAST_LISTEN": "127.0.0.1:0",
        "ROLECAST_DATABASE_URL": f"sqlite:///{tmp_path / 'rolecast.db'}",
        "ROLECAST_SENDER": "Vendor <news@vendor.example>",
    }  # fmt: skip
    command = [sys.executable, "-m", "worker.cli", "up", "--inbox"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=environment
    )
    try:
        url = next(line for line in process.stderr if line.startswith("Inbox ")).split()[1]
        for _ in range(600):
            found = re.search(r'href="/inbox/(\d+)"', httpx2.get(url).text)
            if found:
                break
            time.sleep(0.1)
        source = httpx2.get(f"{url}/{found[1]}/mail.eml").content
        assert b"X-Rolecast-Event" in source
        bodies = [part.get_payload(decode=True) or b"" for part in message_from_bytes(source).walk()]
        assert any(b"signing-link.masked.example" in body for body in bodies)
        assert not any(leaks(body.decode()) for body in bodies)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
