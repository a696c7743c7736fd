"""Every page in a real browser: no accessibility fault, nothing cut off on a phone, nothing fetched elsewhere.

Needs the `browser` extra and a Chromium on the machine: skips at home where there is none, fails in CI.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from email.message import EmailMessage
from types import SimpleNamespace

import pytest
from sqlalchemy import insert

from tests.test_inbox import send
from tests.test_web_security import running
from tests.web_site import BASE, opened, served
from worker import matters
from worker.schema import pauses
from worker.web.inbox import Inbox

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]

HTML = (
    '<!doctype html><html lang="en"><head><title>Hello</title><meta name="color-scheme" content="light dark"><style>'
    "body { background: rgb(250, 250, 250) }"
    "@media (prefers-color-scheme: dark) { body { background: rgb(10, 10, 10) } }"
    "</style></head><body><script>document.title = 'ran'</script><h1>Hello</h1>"
    '<p>Read <a href="/preferences/x">more</a>.</p><img alt="" src="https://tracker.example/p.gif"></body></html>'
)


def missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A running site with an event of each kind and a caught mail, and the paths of its pages."""
    folder = tmp_path_factory.mktemp("site")
    inbox = Inbox(folder / "inbox")
    _, port = inbox.start()
    with opened(folder) as app, served(app) as web:
        event = web.publish("webinar.scheduled", accounts="all")
        outage = web.publish("outage.started", accounts="all")
        body = "# One\n\n#### Two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\n" + "x" * 300 + "\n```"
        notice = web.publish("service.notice", accounts="all", title="T" * 120, body=body)
        quote = web.publish("quote.issued", account="city")
        request = web.publish("action.requested", account="acme", action="contact_list", requested_by="c1")
        with app.database.write() as connection:
            matters.note(connection, 1, {(number, matters.NOBODY): 2 for number in range(1, 6)}, now=app.clock())
            connection.execute(insert(pauses).values(scope="class", value="promotional", by="rolecast:x" * 9, at=1))
        one_click = web.unsubscribe_path(event, "ada@acme.example")
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = "Vendor <news@vendor.example>", "ada@acme.example", "Hello"
        mail["X-Rolecast-Event"] = event
        mail["List-Unsubscribe"], mail["List-Unsubscribe-Post"] = f"<{BASE}{one_click}>", "List-Unsubscribe=One-Click"
        mail.set_content("Hello\n\nRead more.")
        mail.add_alternative(HTML, subtype="html")
        send(port, mail)
        number = inbox.mails()[0].id
        paths = [
            "/events", f"/events/{event}", f"/events/{outage}", f"/events/{notice}", f"/events/{quote}",
            f"/events/{request}", "/inbox", "/inbox?q=nothing",
            *(f"/inbox/{number}?tab={tab}" for tab in ("html", "text", "headers", "source")),
            web.preferences_path("acme", "c1"), web.preferences_path("acme", "c3"), web.preferences_path("city", "p1"),
            one_click, "/preferences/nonsense", "/nonsense",
        ]  # fmt: skip
        with running(web, inbox) as url:
            yield SimpleNamespace(
                url=url, paths=paths, mail=f"/inbox/{number}", preferences=web.preferences_path("acme", "c2"), web=web
            )
    inbox.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """One Chromium for all tests of this file."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing("playwright is not installed: install rolecast[browser]")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        missing("no Chromium on this machine: install the package chromium")
    options = ["--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=options)
        yield found
        found.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_no_page_has_an_accessibility_fault_or_is_cut_off(browser, site, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, faults, asked = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    for path in site.paths:
        page.goto(site.url + path)
        result = Axe().run(page)
        if result.violations_count:
            faults.append(f"{path}: {result.generate_report()}")
        if page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
            faults.append(f"{path} is wider than {width} pixels")
        if page.evaluate("document.body.style.length || getComputedStyle(document.body).marginTop") != "0px":
            faults.append(f"{path} has lost its style")
    context.close()
    assert not faults, "\n".join(faults)
    assert {url for url in asked if not url.startswith(site.url)} <= {"https://tracker.example/p.gif"}  # and blocked


def test_a_mail_is_shown_in_a_frame_where_nothing_runs_and_the_scheme_is_the_chosen_one(browser, site) -> None:
    page = browser.new_page()
    loaded = []
    page.on("requestfinished", lambda request: loaded.append(request.url))
    for scheme, colour in (("light", "rgb(250, 250, 250)"), ("dark", "rgb(10, 10, 10)")):
        page.goto(f"{site.url}{site.mail}?scheme={scheme}", wait_until="networkidle")
        (frame,) = [one for one in page.frames if one.url.endswith(f"/html?scheme={scheme}")]
        assert frame.locator("h1").inner_text() == "Hello"
        # The frame runs no script of its own; the browser's tools may still look at its style.
        assert frame.locator("body").evaluate("body => getComputedStyle(body).backgroundColor") == colour
        assert frame.title() == "Hello"
    assert not any("tracker.example" in url for url in loaded)
    page.close()


def test_preferences_are_switched_with_the_keyboard_and_without_javascript(browser, site) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site.url + site.preferences)
    box = page.get_by_label("General service communication")
    box.focus()
    assert box.is_checked()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Save").focus()
    page.keyboard.press("Enter")
    page.get_by_role("status").wait_for()
    assert not page.get_by_label("General service communication").is_checked()
    assert ("secondary_support", "service_communication") in next(
        one.opt_outs for one in site.web.facts("acme").contacts if one.id == "c2"
    )
    context.close()


def test_the_inboxs_unsubscribe_button_works_in_a_browser(browser, site) -> None:
    page = browser.new_page()
    page.goto(site.url + site.mail)
    page.get_by_role("button", name="Unsubscribe as a mail program would").click()
    page.get_by_role("status").wait_for()
    assert "unsubscribed" in page.get_by_role("status").inner_text()
    page.close()
