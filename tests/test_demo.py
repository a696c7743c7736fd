"""The demonstration as a user starts it: a process of its own, in a folder of its own, in a hostile environment."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from subscriptions.database import Database
from worker import demo, history
from worker.events import TYPES
from worker.web.inbox import Inbox, Opened

WATCHED = """
import os, sys

HERE = (None, "127.0.0.1", "localhost", b"127.0.0.1", b"localhost")

def watch(name, facts):
    reached = facts[1] if name == "socket.connect" else facts if name == "socket.getaddrinfo" else ("127.0.0.1",)
    if isinstance(reached, tuple) and reached[0] not in HERE:
        os.write(2, f"{name} to {reached[0]!r}".encode())
        os._exit(99)

sys.addaudithook(watch)
from worker.cli import main
sys.argv[0] = "rolecast"
main()
"""
"""Runs the command line and ends it at the first attempt to reach another machine."""


def environment(**hostile: str) -> dict[str, str]:
    """The test's environment without settings of its own, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROLECAST_")}
    return {**kept, **hostile}


@dataclass(frozen=True)
class Shown:
    """What one demonstration left."""

    summary: dict[str, Any]
    messages: str
    folder: Path
    mails: list[Opened]
    events: list[dict[str, Any]]
    deliveries: list[dict[str, Any]]  # of all events, each with the type of its event

    def of(self, id_: str) -> list[Opened]:
        """The mails of the sample event with that id."""
        ulid = next(event["event"] for event in self.events if event["id"] == id_)
        return [mail for mail in self.mails if mail.caught.event == ulid]


@pytest.fixture(scope="module")
def foreign_relay() -> Iterator[socket.socket]:
    """A relay that nobody should talk to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        yield listener


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, foreign_relay: socket.socket) -> Shown:
    """One run with settings that would lead elsewhere, over the remains of an earlier one."""
    place = tmp_path_factory.mktemp("demo")
    folder = place / "data" / "demo"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("the user's own")
    for name in ("rolecast.db", "inbox.db"):
        (folder / name).write_text("left by an earlier version")
    elsewhere = f"smtp://127.0.0.1:{foreign_relay.getsockname()[1]}?tls=none"
    (place / "rolecast.toml").write_text(f'relay_urls = ["{elsewhere}"]\ndelivery = "live"\n')
    hostile = environment(
        ROLECAST_RELAY_URLS=elsewhere,
        ROLECAST_DATABASE_URL="postgresql://nobody@192.0.2.1/none",
        ROLECAST_BROKER_URL="redis://192.0.2.1:6379",
        ROLECAST_STATUS_PAGE_FEED_URL="https://192.0.2.1/feed.atom",
        ROLECAST_PUBLIC_URL="https://notify.example",
        ROLECAST_NO_SUCH_SETTING="1",
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "demo", "--once", "--json"],
        check=False, cwd=place, env=hostile, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    database = Database(f"sqlite:///{folder / 'rolecast.db'}")
    with database.read() as connection:
        events = history.list_events(connection, limit=1000)
        deliveries = []
        for event in events:
            row = history.find_event(connection, event["event"])
            assert row is not None
            deliveries += [{**one, "type": row.type} for one in history.list_deliveries(connection, row, limit=1000)]
    database.close()
    inbox = Inbox(folder)
    mails = [opened for caught in inbox.mails(limit=1000) if (opened := inbox.open(caught.id))]
    inbox.stop()
    return Shown(json.loads(done.stdout), done.stderr, folder, mails, events, deliveries)


def test_every_type_is_published_and_everything_is_done(shown: Shown) -> None:
    assert {event["type"] for event in shown.events} == set(TYPES)
    assert len(TYPES) == 29
    assert shown.summary["complete"] is True
    assert shown.summary["unfinished"] == {}
    assert {event["status"] for event in shown.events} <= {"done", "redirected"}
    assert shown.messages == ""


def test_every_mail_that_the_ledger_calls_accepted_lies_in_the_inbox_once(shown: Shown) -> None:
    assert {delivery["status"] for delivery in shown.deliveries} == {"accepted"}
    caught = [mail.caught.message_id for mail in shown.mails]
    assert sorted(caught) == sorted(delivery["message_id"] for delivery in shown.deliveries)
    assert len(set(caught)) == len(caught) == shown.summary["mails"] == shown.summary["caught"] > 90


def test_nothing_leaves_whatever_the_environment_says(shown: Shown, foreign_relay: socket.socket) -> None:
    with pytest.raises(BlockingIOError):
        foreign_relay.accept()
    assert len({delivery["relay"] for delivery in shown.deliveries}) == 1
    assert all(delivery["relay"].startswith("127.0.0.1:") for delivery in shown.deliveries)
    assert all(mail.caught.recipient.endswith(".example") for mail in shown.mails)
    assert not any("https://notify.example" in mail.text for mail in shown.mails)


def test_what_the_user_kept_in_the_folder_stays(shown: Shown) -> None:
    assert (shown.folder / "notes.txt").read_text() == "the user's own"


def test_an_outage_is_answered_with_its_incident_and_mailed_to_nobody(shown: Shown) -> None:
    pointed = [event for event in shown.events if event["category"] in {"outage_incident", "maintenance_notice"}]
    assert len(pointed) == 4
    for event in pointed:
        assert event["status"] == "redirected"
        assert event["totals"] == {}
        assert event["status_page"]["incident"]["url"].startswith("https://status.larkspur.example/incidents/")
    ulids = {event["event"] for event in pointed}
    assert not [mail for mail in shown.mails if mail.caught.event in ulids]
    assert not [mail for mail in shown.mails if "confirmed late" in mail.text]


def test_a_signing_link_is_in_the_signers_mail_alone(shown: Shown) -> None:
    with_link = {mail.caught.recipient for mail in shown.mails if b"sign.larkspur.example" in decoded(mail)}
    assert with_link == {"eleanor.voss@fernhill.example", "nina.kowalska@harrow.example"}
    assert [mail.caught.recipient for mail in shown.of("quote-0417")] == ["eleanor.voss@fernhill.example"]
    fallback = shown.of("quote-0418")
    assert [mail.caught.recipient for mail in fallback] == ["marcus.hale@granite.example"]
    assert "c4470e9a15" not in fallback[0].text + fallback[0].html


def decoded(mail: Opened) -> bytes:
    """Everything in a mail that a reader could come across."""
    return mail.raw + mail.text.encode() + mail.html.encode()


def test_copies_fallbacks_opt_outs_and_duplicates_occur(shown: Shown) -> None:
    rows = {row["type"]: row for row in shown.summary["types"]}
    assert rows["invoice.issued"]["kinds"] == {"copy": 2}
    assert rows["invoice.issued"]["skipped"].keys() >= {"opted_out", "rejected_by_cardinality", "address_suppressed"}
    assert rows["statement.issued"]["kinds"] == {"fallback": 2}
    assert rows["statement.issued"]["skipped"]["duplicate_address"] == 1
    assert rows["announcement.published"]["skipped"]["product_not_selected"] == 1
    assert rows["file.failed"]["nobody"] == ["cobalt"]  # its role is vacant
    assert rows["action.requested"]["kinds"] == {"approval_request": 4, "contact_list": 1}
    copies = [mail for mail in shown.of("invoice-7121") if mail.header("X-Rolecast-Copy") == "yes"]
    assert {mail.caught.recipient.partition("@")[0] for mail in copies} == {"agnes.whitfield", "priya.raman"}


def test_a_person_in_two_accounts_gets_one_mail_with_two_reasons(shown: Shown) -> None:
    own = [mail for mail in shown.of("webinar-late-payers") if mail.caught.recipient.startswith("tomas.okafor")]
    assert len(own) == 1
    reasons = [value for name, value in own[0].headers if name == "X-Rolecast-Reason"]
    assert [reason.partition(";")[0] for reason in reasons] == ["account=acme", "account=cobalt"]


def test_the_samples_dates_move_with_the_day_of_the_demonstration() -> None:
    for today in (date(2026, 11, 21), date(2028, 2, 29), date(2031, 1, 1)):
        outage = next(event for event in demo.sample_events(today) if event.type.name == "outage.started")
        assert outage.data["started_at"] == f"{today - timedelta(days=1)}T09:42:00Z"
        quote = next(event for event in demo.sample_events(today) if event.type.name == "quote.issued")
        assert date.fromisoformat(quote.data["expires_on"]) > today


def test_the_sample_stands_as_it_is_in_files_that_the_commands_take() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worker.cli", "explain", "--json", "--directory", str(demo.SAMPLE / "directory.json"),
         str(demo.SAMPLE / "events.json")],
        check=False, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {answer["outcome"] for answer in answers} == {
        "deliver", "no_recipient", "redirected_to_status_page", "rejected", "authorised", "pending_approval"
    }  # fmt: skip


@contextmanager
def running(place: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A demonstration that serves its pages."""
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, "demo", "--json"],
        cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if line == "}\n":
                break
        yield process, json.loads(text)["pages"]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def get(url: str) -> str:
    """A page, as soon as the server answers."""
    for _ in range(100):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())
        except ConnectionError:
            time.sleep(0.1)
        except OSError as error:
            if not isinstance(getattr(error, "reason", None), ConnectionError):
                raise
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


def test_the_pages_are_served_on_a_free_port_beside_another_demonstration_until_ctrl_c(tmp_path: Path) -> None:
    with running(tmp_path) as (_, first), running(tmp_path) as (process, second):
        assert first["inbox"] != second["inbox"]
        assert first["database"] == "sqlite:///data/demo/rolecast.db"
        assert "rolecast-demo-" in second["database"]
        assert "97 mails" in get(first["inbox"])
        assert "97 mails" in get(second["inbox"])
        assert "invoice.issued" in get(second["events"])
        assert "Executive contact" in get(second["preferences"])
        event = {
            "specversion": "1.0", "id": "mine", "source": "/test", "type": "payment.due",
            "data": {"account": "harrow", "amount": "5.00", "currency": "EUR", "on": "2027-01-01"},
        }  # fmt: skip
        request = urllib.request.Request(
            second["inbox"].replace("/inbox", "/v1/events"),
            data=json.dumps(event).encode(),
            headers={"Authorization": f"Bearer {second['key']}", "Content-Type": "application/cloudevents+json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 202
        for _ in range(100):
            if "98 mails" in get(second["inbox"]):
                break
            time.sleep(0.1)
        assert "98 mails" in get(second["inbox"])
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - begun < 5  # two seconds on a machine that does nothing else
        folder = Path(second["database"].removeprefix("sqlite:///")).parent
        assert not folder.exists()


def test_the_summary_tells_the_user_what_happened_and_that_nothing_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worker.cli", "demo", "--once"],
        check=False, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.split() and line.split()[0] in TYPES]
    assert rows == list(TYPES)
    assert re.search(r"35 events of 29 types for 10 accounts with 44 contacts: 97 mails in [\d.]+ seconds", done.stdout)
    assert done.stdout.endswith("Nothing left this machine.\n")


def test_a_missing_mail_fails_the_demonstration() -> None:
    row = demo.TypeSummary("invoice.issued", "invoice", mails=2)
    whole = [demo.TypeSummary(name, "x") for name in TYPES if name != row.type]
    assert demo.Summary(1, 1, (row, *whole), caught=2, seconds=1.0).complete
    assert not demo.Summary(1, 1, (row, *whole), caught=1, seconds=1.0).complete
    assert not demo.Summary(1, 1, (row,), caught=2, seconds=1.0).complete
    row.open["held"] = 1
    assert not demo.Summary(1, 1, (row, *whole), caught=2, seconds=1.0).complete


def test_the_sample_lies_on_the_day_before_today_whenever_it_is_shown() -> None:
    today = datetime.now(UTC).date()
    assert str(today - timedelta(days=1)) in demo._moved("2026-11-20T11:20:00Z")
    assert demo._moved("case-20431 tag:x,2026:a 2026-000123") == "case-20431 tag:x,2026:a 2026-000123"
