"""What stands before the pages: names, tokens, headers, forms of other sites, and people's data off this machine."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from tests.web_site import BASE, LISTEN, Web, an_event, opened, served
from worker.links import BadToken, Links, contact_identity
from worker.web import security
from worker.web.inbox import Inbox
from worker.web.security import own_hosts
from worker.web.server import ListenError, build, run

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with opened(tmp_path) as app:
        inbox = Inbox(tmp_path / "inbox")
        with served(app, inbox=inbox) as web:
            yield web
        inbox.stop()


# ---------------------------------------------------------------- tokens


def test_no_changed_or_invented_token_is_accepted() -> None:
    links = Links(("0" * 64, "1" * 64), BASE)
    chance = random.Random(2026)
    for purpose, numbers in (("u", (17, 3)), ("p", (41,)), ("u", (2**40, 200_000))):
        good = links.token(purpose, *numbers, identity=b"it")
        assert links.read(purpose, good, lambda *_: b"it") == numbers
        flipped = 0
        for position in range(len(good)):
            for bit in range(8):
                letter = chr(ord(good[position]) ^ 1 << bit)
                with pytest.raises(BadToken):
                    links.read(purpose, good[:position] + letter + good[position + 1 :], lambda *_: b"it")
                flipped += 1
        for _ in range(2000):
            made_up = "".join(chance.choices(ALPHABET, k=chance.choice([len(good), chance.randrange(80)])))
            with pytest.raises(BadToken):
                links.read(purpose, made_up, lambda *_: b"it")
        assert flipped > 150
        for cut in range(len(good)):
            with pytest.raises(BadToken):
                links.read(purpose, good[:cut], lambda *_: b"it")
        for appended in ("=", "A", "\n", " "):
            with pytest.raises(BadToken):
                links.read(purpose, good + appended, lambda *_: b"it")


@given(st.text(max_size=60))
def test_no_text_whatever_is_a_token(text: str) -> None:
    links = Links(("0" * 64,), BASE)
    for purpose in ("u", "p"):
        with pytest.raises(BadToken):
            links.read(purpose, text, lambda *_: b"it")


def test_a_link_signed_with_an_older_key_still_works_and_one_of_a_withdrawn_key_does_not(web: Web) -> None:
    older = Links(("old-secret-of-thirty-two-letters-",), BASE)
    path = older.preferences(web.number("acme", "c1"), contact_identity("acme", "c1")).removeprefix(BASE)
    settings = replace(web.app.settings, secret_keys=("new-secret-of-thirty-two-letters-", *older.keys))
    web.app.settings = settings
    with served(web.app) as after:
        assert after.client.get(path).status_code == 200
    web.app.settings = replace(settings, secret_keys=settings.secret_keys[:1])
    with served(web.app) as after:
        assert after.client.get(path).status_code == 404


def test_a_tampered_link_leads_to_a_friendly_page_that_echoes_nothing(web: Web) -> None:
    path = web.preferences_path("acme", "c1")
    for wrong in (
        path[:-1],
        path + "A",
        path[:-2] + "xx",
        "/preferences/<script>alert(1)</script>",
        "/unsubscribe/%00",
    ):
        answer = web.client.get(wrong)
        assert answer.status_code == 404
        assert answer.headers["content-type"].startswith("text/html")
        assert "Open it from the email again" in answer.text or wrong.endswith("</script>")
        assert "<script>alert" not in answer.text


# ---------------------------------------------------------------- headers


def test_personal_pages_forbid_scripts_frames_caching_and_referrers(web: Web) -> None:
    event = web.publish("webinar.scheduled", accounts="all")
    paths = (
        web.preferences_path("acme", "c1"),
        web.unsubscribe_path(event, "ada@acme.example"),
        "/preferences/nonsense",
    )
    for path in paths:
        headers = web.client.get(path).headers
        policy = {part.strip() for part in headers["content-security-policy"].split(";")}
        assert {"default-src 'none'", "style-src 'self'", "form-action 'self'", "frame-ancestors 'none'"} <= policy
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert headers["x-robots-tag"] == "noindex"
        assert headers["x-content-type-options"] == "nosniff"


def test_every_answer_has_a_policy_and_no_page_has_a_script_or_inline_style(web: Web) -> None:
    web.publish("service.notice", accounts="all")
    event = web.publish("webinar.scheduled", accounts="all")
    for path in (
        "/events",
        f"/events/{event}",
        "/inbox",
        "/inbox?q=x",
        web.preferences_path("acme", "c1"),
        "/nonsense",
    ):
        answer = web.client.get(path)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert not re.search(r"<script|<style|\sstyle=|\son\w+=|javascript:", answer.text, re.IGNORECASE)
        # Pages link to elsewhere; they fetch nothing from there.
        assert not re.search(r'(?:\ssrc|<link[^>]*\shref)="(?:https?:)?//', answer.text)


# ---------------------------------------------------------------- names


def test_pages_and_writing_calls_answer_only_under_the_installations_names(web: Web) -> None:
    key = web.key("publish:*", "read")
    body = json.dumps(an_event("service.notice", account="acme"))
    ulid = web.client.post("/v1/events", content=body, headers=key).json()["event"]
    wrong = {"Host": "attacker.example"}
    token = web.preferences_path("acme", "c1")
    for path in ("/", "/events", "/inbox", token, "/static/style.css"):
        assert web.client.get(path, headers=wrong).status_code == 400
    for path in ("/v1/events", f"/v1/events/{ulid}/cancel", token, "/unsubscribe/x"):
        assert web.client.post(path, content=body, headers={**key, **wrong}).status_code == 400
    for path in ("/healthz", "/readyz", "/metrics", f"/v1/events/{ulid}"):
        assert web.client.get(path, headers={**key, **wrong}).status_code == 200
    for name in ("127.0.0.1:8080", "localhost:8080", "LOCALHOST:8080", "[::1]:8080"):
        assert web.client.get(token, headers={"Host": name}).status_code == 200
    for name in ("127.0.0.1", "127.0.0.1:80", "localhost:8081", "127.0.0.1.attacker.example:8080", ""):
        assert web.client.get(token, headers={"Host": name}).status_code == 400


def test_the_names_follow_listen_and_public_url() -> None:
    names = own_hosts(("0.0.0.0", 8080), "https://mail.vendor.example")
    assert {"mail.vendor.example", "mail.vendor.example:443", "127.0.0.1:8080", "localhost:8080"} <= names
    assert not {"0.0.0.0:8080", "mail.vendor.example:8080", "mail.vendor.example:80"} & names
    assert own_hosts(("10.1.2.3", 80), "http://news.example:8000") == {"10.1.2.3", "10.1.2.3:80", "news.example:8000"}


# ---------------------------------------------------------------- people's data


@pytest.mark.parametrize(
    ("client", "base", "headers", "listen"),
    [
        ("192.0.2.7", BASE, {}, LISTEN),
        ("127.0.0.1", BASE, {"X-Forwarded-For": "192.0.2.7"}, LISTEN),
        ("127.0.0.1", BASE, {"Forwarded": "for=192.0.2.7"}, LISTEN),
        ("127.0.0.1", BASE, {}, ("0.0.0.0", 8080)),
    ],
)
def test_pages_with_peoples_data_are_shown_from_this_machine_to_this_machine_only(
    web: Web, client, base, headers, listen
) -> None:
    ulid = web.publish("service.notice", accounts="all")
    inbox = Inbox(web.app.database.path.parent / "other")
    with served(web.app, inbox=inbox, client=client, base=base, listen=listen) as other:
        for path in ("/events", f"/events/{ulid}", "/inbox", "/inbox/1", "/inbox/1/html", "/inbox/1/mail.eml"):
            answer = other.client.get(path, headers=headers)
            assert answer.status_code == 403, path
            assert "data, so it is served only" in answer.text
            assert "acme" not in answer.text
        assert other.client.post("/inbox/1/unsubscribe", headers=headers).status_code == 403
        assert other.client.get(web.preferences_path("acme", "c1"), headers=headers).status_code == 200
    inbox.stop()


def test_a_proxy_on_this_machine_does_not_open_the_pages(web: Web) -> None:
    web.app.settings = replace(web.app.settings, public_url="https://mail.vendor.example")
    with served(web.app, base="https://mail.vendor.example") as other:
        assert other.client.get("/events").status_code == 403


# ---------------------------------------------------------------- forms of other sites


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 404),
        ({"Sec-Fetch-Site": "same-origin"}, 404),
        ({"Sec-Fetch-Site": "none"}, 404),
        ({"Origin": BASE}, 404),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": BASE}, 403),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_a_form_of_another_site_is_refused(web: Web, headers, status) -> None:
    assert web.client.post("/inbox/1/unsubscribe", headers=headers).status_code == status


# ---------------------------------------------------------------- bodies, logs, and a real server


def test_a_body_that_does_not_arrive_in_time_is_refused() -> None:
    async def never() -> dict[str, object]:
        await asyncio.sleep(60)
        return {}

    request = security.Request({"type": "http", "headers": [], "method": "POST"}, never)
    with pytest.raises(security.Problem) as refused:
        asyncio.run(security.read_body(request, 100, seconds=0.05))
    assert refused.value.status == 408


def test_an_endless_body_is_cut_off() -> None:
    sent = 0

    async def endless() -> dict[str, object]:
        nonlocal sent
        sent += 1 << 20
        return {"type": "http.request", "body": b" " * (1 << 20), "more_body": True}

    request = security.Request({"type": "http", "headers": [], "method": "POST"}, endless)
    with pytest.raises(security.Problem) as refused:
        asyncio.run(security.read_body(request, 100))
    assert refused.value.status == 413
    assert sent <= 10 << 20


@contextmanager
def running(web: Web, inbox: Inbox | None = None) -> Iterator[str]:
    """A real server on a free port of this machine; its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = listener.getsockname()
        application = build(web.app, engine=None, inbox=inbox, listen=address)
        server = uvicorn.Server(uvicorn.Config(application, log_config=None, access_log=False, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{address[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def test_no_log_line_and_no_error_page_shows_a_token_a_key_or_an_address(web: Web, caplog, capsys) -> None:
    import httpx2

    key = web.key()
    path = web.unsubscribe_path(web.publish("webinar.scheduled", accounts="all"), "ada@acme.example")
    caplog.set_level("DEBUG")
    with running(web) as url:
        answers = [
            httpx2.get(url + path),
            httpx2.post(url + path, data={"List-Unsubscribe": "One-Click"}),
            httpx2.post(url + "/v1/events", json=an_event("service.notice", account="ada@acme.example"), headers=key),
            httpx2.get(url + path, headers={"Host": "attacker.example"}),
        ]
    assert [one.status_code for one in answers] == [200, 200, 422, 400]
    lines = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("http"))
    output = capsys.readouterr()
    for secret in (path.rpartition("/")[2], key["Authorization"][7:], "ada@acme.example"):
        assert secret not in lines + output.out + output.err


def test_an_unexpected_error_is_answered_without_its_inside(web: Web, monkeypatch) -> None:
    from worker import history

    def broken(*_arguments: object, **_more: object) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(history, "list_events", broken)
    answer = web.client.get("/events")
    assert answer.status_code == 500
    assert "secret inside" not in answer.text
    assert "RuntimeError" not in answer.text


def test_an_address_that_is_taken_is_told_with_the_remedy(web: Web) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        web.app.settings = replace(web.app.settings, listen=taken.getsockname())
        with pytest.raises(ListenError, match="ROLECAST_LISTEN"):
            run(web.app, engine=None, inbox=None)


def test_the_server_says_where_it_is_and_ends_gracefully_on_sigterm(tmp_path: Path) -> None:
    import httpx2

    program = (
        "import sys, pathlib\n"
        "from worker.app import open_app\n"
        "from worker.settings import Secret, Settings\n"
        "from worker.web.server import run\n"
        "where = Secret(f'sqlite:///{sys.argv[1]}')\n"
        "with open_app(Settings(database_url=where, listen=('127.0.0.1', 0))) as app:\n"
        "    run(app, engine=None, inbox=None)\n"
        "print('closed')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "rolecast.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = ""
        while not url:
            line = process.stderr.readline()
            assert line, "the server ended before it said where it is"
            found = re.search(r"Events +(http://127\.0\.0\.1:[1-9][0-9]*)/events", line)
            url = found[1] if found else ""
        answer = httpx2.get(f"{url}/healthz", timeout=10)
        page = httpx2.get(f"{url}/events", timeout=10)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=20)
    assert (answer.status_code, page.status_code) == (200, 200)
    assert process.returncode == 0
    assert output.endswith("closed\n")
    assert "Traceback" not in errors
