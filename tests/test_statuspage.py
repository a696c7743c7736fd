"""The status page: every vendor's feed is read right, doubtful matches are none, and no feed can do harm."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shared import shared
from worker import events, feedclient, statuspage
from worker.statuspage import Feed, FeedError, FeedState, StatusPage, match, read_feed

FEEDS = Path(__file__).parent / "fixtures" / "feeds"
NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def utc(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def read(name, now=None):
    return read_feed((FEEDS / name).read_bytes(), now=now)


# ---------------------------------------------------------------- the vendors' feeds

# file -> one row per incident, newest first: key, title, link, status, updated, started, kind
VENDORS = {
    "aws-ec2-tokyo-2019-09.rss": [
        (None, "インスタンスの接続性について | Instance Availability", "http://status.aws.amazon.com/", "resolved",
         "2019-08-23T11:18:35", "2019-08-23T08:54:51", "incident"),
        (None, "[解決済] APIのエラー率の増加 | [RESOLVED] API Increased API Error Rates", "http://status.aws.amazon.com/",
         "resolved", "2017-06-05T05:58:04", None, "incident"),
    ],
    "azure-empty-allclear.rss": [],
    "googlecloud-2022-04-01.atom": [
        ("B1hD4KAtcxiyAWkcANfV",
         "Global: Cloud Monitoring Metrics may be unavailable or underreported for Cloud Pub/Sub",
         "https://status.cloud.google.com/incidents/B1hD4KAtcxiyAWkcANfV", "resolved",
         "2022-04-01T20:13:25", None, "incident"),
    ],
    "incidentio-openai-2026-02.atom": [
        ("01KHYH2KT8VNWS146V0S09MF29", "Increased latency in ChatGPT for some users",
         "https://status.openai.com//incidents/01KHYH2KT8VNWS146V0S09MF29", "resolved",
         "2026-02-20T22:44:27.567", None, "incident"),
        ("01KHRP7P1JF885BYA8SDWBDBR1", "Sora 2 Degraded Performance",
         "https://status.openai.com//incidents/01KHRP7P1JF885BYA8SDWBDBR1", "resolved",
         "2026-02-18T16:40:22.657", None, "incident"),
    ],
    "meraki-test-2026-03.rss": [
        (None, "Meraki Status Test Message", "https://status.meraki.net/", "unknown",
         "2026-03-23T18:00:00", None, "incident"),
    ],
    "openrouter-2026-09-03.rss": [
        ("l4Gmz6NbAW1o", "Web application degraded", "https://status.openrouter.ai/incidents/l4Gmz6NbAW1o", "resolved",
         "2026-08-28T19:50:46", None, "incident"),
        ("n8d-Ze48m14W", "Elevated 429s on Anthropic and OpenAI",
         "https://status.openrouter.ai/incidents/n8d-Ze48m14W", "investigating",
         "2026-08-28T02:15:31", "2026-08-28T02:15:00", "incident"),
    ],
    "slack-2025-12.rss": [
        ("https://slack-status.com/2025-12/a8c230d2dfa1ac93", "Incident: Issues loading or viewing threads",
         "https://slack-status.com/2025-12/a8c230d2dfa1ac93", "unknown", "2025-12-18T16:44:51", None, "incident"),
    ],
    "statuspage-claude-2026-09-03.atom": [
        ("461yvfrzpwtt", "Elevated errors for multiple models", "https://status.claude.com/incidents/461yvfrzpwtt",
         "investigating", "2026-09-03T14:49:48", "2026-09-03T14:49:00", "incident"),
        ("288w7p4hk1l1", "Elevated errors for Claude Sonnet 5", "https://status.claude.com/incidents/288w7p4hk1l1",
         "resolved", "2026-09-03T12:56:26", None, "incident"),
    ],
    "statuspage-github-2025-10-21.atom": [
        ("9klytnsknx20", "Disruption with Grok Code Fast 1 in Copilot",
         "https://www.githubstatus.com/incidents/9klytnsknx20", "resolved",
         "2025-10-21T20:25:22", "2025-10-20T14:46:00", "incident"),
        ("v61nk2fpysnq", "Disruption with some GitHub services",
         "https://www.githubstatus.com/incidents/v61nk2fpysnq", "resolved",
         "2025-10-21T17:39:34", "2025-10-21T16:00:00", "incident"),
    ],
    "statuspage-github-maintenance-2026-06.atom": [
        ("71hv2q6tk693", "Disruption with Claude Opus 4.7", "https://www.githubstatus.com/incidents/71hv2q6tk693",
         "investigating", "2026-06-08T09:08:58", "2026-06-08T09:05:00", "incident"),
        ("maintinprog", "Ongoing maintenance", "https://www.githubstatus.com/incidents/maintinprog",
         "in_progress", "2026-06-08T08:00:00", None, "maintenance"),
        ("oldresolved", "Old resolved incident", "https://www.githubstatus.com/incidents/oldresolved",
         "resolved", "2026-06-01T12:00:00", None, "incident"),
        ("maintdone", "Completed maintenance", "https://www.githubstatus.com/incidents/maintdone",
         "completed", "2026-05-20T12:00:00", None, "maintenance"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", VENDORS)
def test_each_vendor_s_feed_tells_its_incidents(name):
    feed = read_feed(shared("corpora", "status-feeds", name).read_bytes())
    assert len(feed.incidents) == len(VENDORS[name])
    for incident, (key, title, url, status, updated, started, kind) in zip(feed.incidents, VENDORS[name], strict=True):
        assert key in (None, incident.key)
        assert (incident.title, incident.url, incident.status, incident.kind) == (title, url, status, kind)
        assert incident.updated_at == utc(updated)
        assert incident.started_at == (utc(started) if started else None)
        assert "<" not in incident.text


def test_no_feed_of_the_corpus_goes_untested():
    folder = shared("corpora", "status-feeds")
    assert {path.name for path in folder.iterdir() if path.suffix in (".rss", ".atom")} == set(VENDORS)


# ---------------------------------------------------------------- traps, with feeds of our own


def test_an_update_carries_on_what_was_said_before_it_and_a_postmortem_does_not_reopen():
    cards, search, database = read("vendor-history.atom").incidents
    assert (cards.key, cards.status, cards.active, cards.started_at) == (
        "k2p9cards", "identified", True, utc("2026-11-21T09:45:00"),
    )  # fmt: skip
    assert (search.status, search.active) == ("resolved", False)
    assert (database.status, database.kind, database.active) == ("scheduled", "maintenance", False)


def test_a_status_that_stands_only_in_the_encoded_content_is_found_and_future_dates_count_as_now():
    (move,) = read("content-encoded.rss", now=NOW).incidents
    assert (move.key, move.status, move.kind, move.updated_at) == ("Zx81kQ", "scheduled", "maintenance", NOW)


def test_every_flap_is_an_entry_of_its_own_and_nothing_unsaid_counts_as_resolved():
    feed = read("flapping.rss")
    assert [incident.key for incident in feed.incidents] == ["gateway-3", "gateway-2", "gateway-1"]
    assert {incident.status for incident in feed.incidents} == {"unknown"}


def test_a_reopened_incident_is_open():
    (uploads,) = read("reopened.rss").incidents
    assert (uploads.key, uploads.status, uploads.updated_at) == ("2210", "investigating", utc("2026-11-19T15:40:00"))


def test_a_status_is_found_in_a_heading_and_in_a_category():
    slow, wrong = read("heading-status.rss").incidents
    assert (slow.status, slow.active) == ("ongoing", True)
    assert wrong.status == "resolved"
    assert slow.key == "x.status.example/INC-77"


def test_titles_are_text_and_links_lead_only_to_the_web():
    by_title = {incident.title: incident.url for incident in read("hostile.rss").incidents}
    assert by_title == {
        "Login fails & waits": None,
        "Data link": None,
        "File link": None,
        "Borrowed name": None,
        "Plain path": "https://status.vendor.example/incidents/path1",
        "No scheme": "https://status.vendor.example/incidents/bare1",
        "Two slashes": "https://status.vendor.example/incidents/slash1",
    }


def test_a_zone_name_without_a_sure_meaning_makes_the_time_unknown_rather_than_wrong():
    times = {incident.title: incident.updated_at for incident in read("zones.rss", now=NOW).incidents}
    assert times == {
        "Pacific": utc("2026-08-23T11:18:35"),
        "Japan by name": None,
        "No zone": None,
        "No weekday": utc("2026-08-22T19:18:00"),
        "From the future": NOW,
    }


def test_a_feed_survives_being_stored():
    for path in FEEDS.iterdir():
        feed = read_feed(path.read_bytes())
        assert Feed.from_json(feed.to_json()) == feed
        state = FeedState(feed, checked_at=NOW, succeeded_at=NOW - timedelta(minutes=1), error="Down.")
        assert FeedState.from_json(state.to_json()) == state
    assert FeedState.from_json(FeedState().to_json()) == FeedState()


def replay(steps):
    """What a reader of the feed's versions sees happen to each incident."""
    seen, story = {}, {}
    for data in steps:
        for incident in read_feed(data).incidents:
            before = seen.get(incident.key)
            if before is None:
                story.setdefault(incident.key, []).append("opened")
            elif incident.status in statuspage.OVER and before.status not in statuspage.OVER:
                story[incident.key].append("resolved")
            elif incident != before:
                story[incident.key].append("updated")
            seen[incident.key] = incident
    return story


def test_entries_that_arrive_one_by_one_open_an_incident_once_and_end_it_once():
    text = shared("corpora", "status-feeds", "aws-ec2-tokyo-2019-09.rss").read_text()
    head, *items = text.split("<item>")
    items[-1] = items[-1].partition("</item>")[0] + "</item>"
    items = ["<item>" + item for item in items]
    versions = [
        (head + "".join(items[start:]) + "</channel></rss>").encode() for start in range(len(items) - 1, -1, -1)
    ]
    story = sorted(replay(versions).values())
    assert story == [["opened"], ["opened", "updated", "resolved"]]  # the old one was over when it was first seen


def test_updates_within_one_entry_open_an_incident_once_and_end_it_once():
    def version(updated, *said):
        blocks = "".join(f"&lt;p&gt;&lt;strong&gt;{word}&lt;/strong&gt; - text&lt;/p&gt;" for word in reversed(said))
        return (
            '<feed xmlns="http://www.w3.org/2005/Atom"><entry><id>tag:s.example,2005:Incident/1</id><title>Slow</title>'
            f'<updated>{updated}</updated><link href="https://s.example/incidents/abcd12"/>'
            f'<content type="html">{blocks}</content></entry></feed>'
        ).encode()

    said = ["Investigating", "Identified", "Update", "Monitoring", "Resolved", "Postmortem"]
    versions = [version(f"2026-11-21T1{n}:00:00Z", *said[: n + 1]) for n in range(len(said))]
    assert replay([v for v in versions for _ in range(2)]) == {
        "abcd12": ["opened", "updated", "updated", "updated", "resolved", "updated"]
    }


# ---------------------------------------------------------------- feeds that are none


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"<!DOCTYPE html><html><body>Checking your browser</body></html>", "HTML page"),
        (b"<html><head></head></html>", "HTML page"),
        (b"hello", "neither Atom nor RSS"),
        (b'{"status": "ok"}', "neither Atom nor RSS"),
        (b"<status/>", "neither Atom nor RSS"),
        (b'<!DOCTYPE rss [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><rss version="2.0"/>', "document type"),
        (
            b'<?xml version="1.0"?><!-- <a> --><!DOCTYPE rss SYSTEM "http://x.example/d"><rss version="2.0"/>',
            "document",
        ),
        ('<!DOCTYPE rss [<!ENTITY a SYSTEM "file:///etc/hostname">]><rss version="2.0"/>'.encode("utf-16"), "document"),
        (b'<?xml version="1.0" encoding="cp037"?><rss/>', "only UTF-8"),
        (b'<?xml version="1.0"?><rss version="2.0">\xff\xfe</rss>', "UTF-8"),
        (b'<rss version="2.0"><channel><!-- never ends', "does not end"),
        (b'<rss version="2.0"><channel>' + b"<a>" * 200_000, "tags"),
        (b"<rss>" + b" " * statuspage.MAX_BYTES, "larger"),
    ],
)
def test_what_is_no_feed_is_told_and_read_no_further(data, reason):
    with pytest.raises(FeedError, match=reason):
        read_feed(data)


def test_only_the_first_entries_of_a_huge_feed_are_read_and_quickly():
    items = "".join(
        f"<item><title>Flap {n}</title><guid>g{n}</guid><pubDate>Fri, 20 Nov 2026 10:00:00 GMT</pubDate></item>"
        for n in range(15_000)
    )
    began = time.perf_counter()
    feed = read_feed(f'<rss version="2.0"><channel>{items}</channel></rss>'.encode())
    assert len(feed.incidents) == statuspage.MAX_ENTRIES
    assert time.perf_counter() - began < 2


@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace")))
@settings(max_examples=200, deadline=None)
def test_whatever_arrives_is_a_feed_or_a_feed_error(noise):
    for data in (noise, b'<rss version="2.0"><channel><item><title>' + noise + b"</title></item></channel></rss>"):
        with contextlib.suppress(FeedError):
            read_feed(data)


# ---------------------------------------------------------------- matching


def outage(**fields):
    return {"account": "acme", "title": "Card payments are delayed", "started_at": "2026-11-21T09:42:00Z", **fields}


def found(data, products=(), feed=None):
    incident = match(data, products, feed or read("vendor-history.atom"))
    return incident and incident.key


@pytest.mark.parametrize(
    "name",
    [
        "k2p9cards",
        "tag:status.vendor.example,2005:Incident/9001",
        "https://status.vendor.example/incidents/k2p9cards",
        "https://status.vendor.example//incidents/k2p9cards/#update",
        "http://STATUS.vendor.example/incidents/k2p9cards",
    ],
)
def test_an_event_that_names_its_incident_gets_it(name):
    assert found(outage(title="Something else", incident=name)) == "k2p9cards"


def test_an_event_that_names_a_page_the_feed_does_not_show_gets_no_other_incident():
    there = outage(title="Card payments are confirmed late")
    assert found(there) == "k2p9cards"
    assert found({**there, "incident": "https://status.vendor.example/incidents/zzzzzz"}) is None
    assert found({**there, "incident": "OPS-4411"}) == "k2p9cards"  # an id of another house says nothing


@pytest.mark.parametrize(
    ("data", "products", "expected"),
    [
        (outage(title="Card payments are confirmed late"), (), "k2p9cards"),
        (outage(title="Card payments delayed", components=["Card payments"]), (), "k2p9cards"),
        (outage(title="Late confirmations of card payments", components=["Card payments"]), (), "k2p9cards"),
        (outage(title="Card payments delayed", components=["Bank transfers"]), (), None),
        (outage(title="Login fails"), (), None),
        (outage(title="Errors"), (), None),
        # The same title a week later is another outage.
        (outage(title="Card payments are confirmed late", started_at="2026-11-28T09:42:00Z"), (), None),
        # What was over before this one began is not this one.
        (outage(title="Invoice search misses new invoices", started_at="2026-11-21T09:00:00Z"), (), None),
        (outage(title="Invoice search misses new invoices", started_at="2026-11-20T06:50:00Z"), (), "q7search"),
        # An outage is not a maintenance, whatever its title.
        (outage(title="Database maintenance for invoicing", started_at="2026-11-18T12:00:00Z"), (), None),
        (
            {"title": "Database maintenance for invoicing", "starts_at": "2026-12-05T22:00:00Z",
             "ends_at": "2026-12-06T00:00:00Z"}, ("invoicing",), "m5database",
        ),
        (
            {"title": "Database maintenance for invoicing", "starts_at": "2027-06-05T22:00:00Z",
             "ends_at": "2027-06-06T00:00:00Z"}, ("invoicing",), None,
        ),
    ],
)  # fmt: skip
def test_an_event_is_matched_by_time_and_title_and_when_in_doubt_not_at_all(data, products, expected):
    assert found(data, products) == expected


def test_two_incidents_that_fit_equally_well_are_no_match():
    cards = read("vendor-history.atom").incidents[0]
    twin = statuspage.replace(cards, key="twin")
    assert found(outage(title=cards.title), feed=Feed((cards, twin))) is None


# ---------------------------------------------------------------- fetching, from a real server


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers each path by the function of that name."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        getattr(self, self.path.strip("/").partition("/")[0].replace("-", "_"))()

    def say(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def feed(self):
        if self.headers.get("If-None-Match") == '"v1"':
            return self.say(304)
        return self.say(200, (FEEDS / "vendor-history.atom").read_bytes(), ETag='"v1"')

    def broken(self):
        self.say(500)

    def busy(self):
        self.say(429, Retry_After="120")

    def html(self):
        self.say(200, b"<!DOCTYPE html><html>Just a moment</html>")

    def empty(self):
        self.say(200)

    def big(self):
        self.say(200, b"x" * (3 * 1024 * 1024))

    def endless(self):  # 50 MB without saying how long it is
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(50):
                self.wfile.write(b"x" * 1024 * 1024)
        self.close_connection = True

    def drip(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                self.wfile.write(b"<")
                self.wfile.flush()
                time.sleep(0.05)
        self.close_connection = True

    def drip_headers(self):
        with contextlib.suppress(OSError):
            for _ in range(100):
                self.wfile.write(b"H")
                time.sleep(0.05)
        self.close_connection = True

    def short(self):
        self.send_response(200)
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(b"<rss version='2.0'>")
        self.close_connection = True

    def noise(self):
        self.wfile.write(b"220 smtp.vendor.example ESMTP\r\n")
        self.close_connection = True

    def zipped(self):
        self.say(200, b"\x1f\x8b", Content_Encoding="gzip")

    def entities(self):
        self.say(200, b'<!DOCTYPE rss [<!ENTITY a "aaaa">]><rss version="2.0"/>')

    def to_feed(self):
        self.say(302, Location="/feed")

    def to_file(self):
        self.say(302, Location="file:///etc/hostname")

    def to_metadata(self):
        self.say(302, Location="http://169.254.169.254/latest/meta-data/")

    def to_user(self):
        self.say(302, Location=f"http://user:secret@127.0.0.1:{self.server.server_port}/feed")

    def to_itself(self):
        self.say(302, Location="/to-itself")

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.requests = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Clock:
    def __init__(self):
        self.now = NOW

    def __call__(self):
        return self.now


def page(feed_url, allow=("private",), clock=None, **settings):
    url = "https://status.vendor.example"
    return StatusPage(url, feed_url=feed_url, allow=allow, clock=clock or Clock(), **settings)


def event(**fields):
    value = events.sample("outage.started")
    value["data"].update(fields)
    return events.parse_event(value)


ROOT = {"url": "https://status.vendor.example", "incident": None}


def test_an_outage_is_answered_with_its_incident(server):
    status_page = page(server.url + "/feed")
    assert status_page.pointer(event(incident="k2p9cards")) == ROOT  # nothing read yet
    state = status_page.refresh()
    assert (state.error, state.checked_at, len(state.feed.incidents)) == (None, NOW, 3)
    assert status_page.pointer(event(incident="k2p9cards")) == {
        "url": "https://status.vendor.example",
        "incident": {
            "title": "Card payments are confirmed late",
            "url": "https://status.vendor.example/incidents/k2p9cards",
            "status": "identified",
            "updated_at": "2026-11-21T10:31:00Z",
        },
    }
    json.dumps(status_page.pointer(event()))
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


def test_a_feed_that_did_not_change_is_not_sent_again(server):
    clock = Clock()
    status_page = page(server.url + "/feed", clock=clock)
    status_page.refresh()
    clock.now += timedelta(minutes=1)
    state = status_page.refresh()
    assert server.requests[1][1]["If-None-Match"] == '"v1"'
    assert (state.error, state.succeeded_at, len(state.feed.incidents)) == (None, clock.now, 3)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/broken", "500"),
        ("/html", "HTML page"),
        ("/empty", "empty"),
        ("/big", "larger than 2 MiB"),
        ("/endless", "larger than 2 MiB"),
        ("/drip", "within the time"),
        ("/drip-headers", "within the time"),
        ("/short", "before its end"),
        ("/noise", "could not be fetched"),
        ("/zipped", "compressed"),
        ("/entities", "document type"),
        ("/to-file", "not https"),
        ("/to-metadata", "169.254.169.254"),
        ("/to-user", "user name or password"),
        ("/to-itself", "more than 3 times"),
    ],
)
def test_a_feed_that_fails_is_recorded_and_the_page_answers_instead(server, path, reason):
    status_page = page(server.url + path, deadline_s=0.5)
    before = FeedState(read("vendor-history.atom"), checked_at=NOW - timedelta(minutes=1), succeeded_at=NOW)
    status_page.adopt(before)
    assert status_page.pointer(event(incident="k2p9cards"))["incident"]
    state = status_page.refresh()
    assert reason in state.error
    assert "secret" not in state.error
    assert state.feed == before.feed
    assert state.succeeded_at == before.succeeded_at
    assert status_page.pointer(event(incident="k2p9cards")) == ROOT


def test_a_redirect_to_the_feed_is_followed(server):
    assert page(server.url + "/to-feed").refresh().error is None


def test_a_server_that_asks_to_be_left_alone_is_left_alone(server):
    clock = Clock()
    status_page = page(server.url + "/busy", clock=clock)
    assert "429" in status_page.refresh().error
    clock.now += timedelta(seconds=60)
    status_page.refresh()
    assert len(server.requests) == 1
    clock.now += timedelta(seconds=61)
    status_page.refresh()
    assert len(server.requests) == 2


def test_what_was_read_long_ago_counts_no_longer():
    clock = Clock()
    status_page = page(None, clock=clock)
    status_page.adopt(FeedState(read("vendor-history.atom"), checked_at=NOW, succeeded_at=NOW))
    clock.now += timedelta(minutes=10)
    assert status_page.pointer(event(incident="k2p9cards"))["incident"]
    clock.now += timedelta(minutes=10)
    assert status_page.pointer(event(incident="k2p9cards")) == ROOT


def test_of_two_processes_states_the_newer_one_counts():
    status_page = page(None)
    newer = FeedState(read("vendor-history.atom"), checked_at=NOW, succeeded_at=NOW)
    status_page.adopt(newer)
    status_page.adopt(FeedState(checked_at=NOW - timedelta(minutes=1), error="Down."))
    status_page.adopt(FeedState())
    assert status_page.state() == newer


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://status.vendor.example/feed", "not an https URL"),
        ("ftp://status.vendor.example/feed", "not an https URL"),
        ("https://user:secret@status.vendor.example/feed", "user name"),
        ("https://127.0.0.1/feed", "not public"),
        ("https://[::1]/feed", "not public"),
        ("https://[::ffff:127.0.0.1]/feed", "not public"),
        ("https://[::ffff:10.0.0.1]/feed", "not public"),
        ("https://[64:ff9b::7f00:1]/feed", "not public"),
        ("https://[2002:7f00:1::]/feed", "not public"),
        ("https://2130706433/feed", "not public"),
        ("https://0x7f.1/feed", "not public"),
        ("https://0.0.0.0/feed", "never asked"),
        ("https://10.1.2.3/feed", "not public"),
        ("https://192.168.0.1/feed", "not public"),
        ("https://100.64.0.1/feed", "not public"),
        ("https://169.254.169.254/feed", "never asked"),
        ("https://[fe80::1]/feed", "never asked"),
        ("https://224.0.0.1/feed", "never asked"),
        ("https:///feed", "no usable host"),
        ("https://status.vendor.example:99999/feed", "no usable host"),
        ("https://[oops/feed", "not a URL"),
        ("https://status.vendor.example/fe ed", "percent-encoded"),
        ("https://status.vendor.example/feed\r\nX: y", "percent-encoded|not a URL"),
        ("file:///etc/hostname", "ROLECAST_STATUS_PAGE_FEED_ALLOW=file"),
        ("/etc/hostname", "ROLECAST_STATUS_PAGE_FEED_ALLOW=file"),
    ],
)
def test_an_address_that_may_not_be_asked_is_not_asked(url, reason):
    with pytest.raises(FeedError, match=reason) as refusal:
        feedclient.fetch(url)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "[fd00:ec2::254]", "0.0.0.0", "[::]", "224.0.0.1", "[64:ff9b::7f00:1]"]
)
def test_even_where_private_addresses_are_allowed_some_are_not(host):
    with pytest.raises(FeedError, match="never asked"):
        feedclient.fetch(f"http://{host}/feed", allow=("private",))


def test_a_name_that_is_resolved_differently_the_second_time_gains_nothing(server, monkeypatch):
    """The address that was judged is the one that is connected to, and one private answer among several refuses."""
    real, asked = socket.getaddrinfo, []

    def rebinding(host, port, *args, **kwargs):
        if host != "rebind.test":
            return real(host, port, *args, **kwargs)
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "169.254.169.254"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    fetched = feedclient.fetch(f"http://rebind.test:{server.server_port}/feed", allow=("private",))
    assert b"Vendor Status" in fetched.body
    assert asked == ["rebind.test"]
    assert server.requests[0][1]["Host"] == f"rebind.test:{server.server_port}"

    def mixed(host, port, *args, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("192.0.2.1", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", mixed)
    with pytest.raises(FeedError, match="not public"):
        feedclient.fetch("https://mixed.test/feed")


def test_https_is_spoken_only_with_a_server_that_proves_its_name(server):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://localhost:{server.server_port}/feed"
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    assert b"Vendor Status" in feedclient.fetch(url, allow=("private",), tls=trusting).body
    with pytest.raises(FeedError, match="not trusted"):
        feedclient.fetch(url, allow=("private",))
    with pytest.raises(FeedError, match="not trusted"):
        feedclient.fetch(url.replace("localhost", "127.0.0.1"), allow=("private",), tls=trusting)


def test_a_feed_may_be_a_file_where_files_are_allowed(tmp_path):
    path = FEEDS / "vendor-history.atom"
    for written in (str(path), path.as_uri()):
        assert len(page(written, allow=("file",)).refresh().feed.incidents) == 3
    with pytest.raises(FeedError, match="No such file"):
        feedclient.fetch(str(tmp_path / "missing.atom"), allow=("file",))
    with pytest.raises(FeedError, match="not a plain file"):
        feedclient.fetch("/dev/zero", allow=("file",))


def test_an_installation_without_a_feed_points_to_the_page():
    status_page = page(None)
    assert status_page.refresh() == FeedState()
    assert status_page.pointer(event()) == ROOT
