"""The command line: what stands on stdout and stderr, how commands end, and that nothing is half-done.

Most commands run inside this process; a process of its own gets what needs one (signals, limits, imports).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import pty
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from tests.house import ACME, GLOBEX, envelope
from tests.shared import shared
from tests.smtpd import SmtpServer, hang, lose_the_reply, reply
from tests.test_scenarios import comparable
from worker.cli import EXIT_CODES, app
from worker.commands.console import CODES
from worker.events import TYPES, sample

PROJECT = Path(__file__).parent.parent
INVOICE = envelope("invoice.issued")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in, an empty environment, and logging as it was afterwards."""
    for name in os.environ:
        if name.startswith("ROLECAST_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    handlers = logging.getLogger().handlers[:]
    level = logging.getLogger().level
    yield tmp_path
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def rolecast():
    """Run a command in this process; the result has exit_code, stdout and stderr."""

    def run(*words, given=None, **settings):
        environment = {f"ROLECAST_{name.upper()}": value for name, value in settings.items()}
        return CliRunner().invoke(app, [str(word) for word in words], env=environment, input=given)

    return run


@pytest.fixture
def directory(rolecast, folder):
    """A directory in the database."""
    written(folder / "directory.json", {"accounts": [ACME, GLOBEX]})
    assert rolecast("accounts", "import", "directory.json").exit_code == 0


def written(path, *documents):
    """A file with one JSON document, or several on lines."""
    path.write_text("\n".join(json.dumps(document) for document in documents), encoding="utf-8")
    return path


def refused(result, code, *parts):
    """The command ended with this code and says these things in few words, without data and without a traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr
    assert all(line.startswith("rolecast: ") for line in result.stderr.strip().splitlines())


def accepted(rolecast):
    return json.loads(rolecast("events", "list", "--json").stdout)["events"]


def process(*words, **options):
    """A process of its own; its environment is ours without ROLECAST_*."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)} | options.pop("env", {})
    command = [sys.executable, "-m", "worker.cli", *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **streams | options)


# ---------------------------------------------------------------- the root


def test_help_lists_the_commands_and_the_exit_codes_without_loading_heavy_libraries():
    heavy = ["sqlalchemy", "fastapi", "dramatiq", "pydantic", "alembic", "jinja2", "aiosmtplib", "feedparser", "rich"]
    code = (
        "import sys\nfrom worker.cli import main\nsys.argv = ['rolecast', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr.strip() == "[]"
    assert " ".join(EXIT_CODES.split()) in " ".join(done.stdout.split())
    commands = """explain publish work serve up demo accounts why preview events deliveries pause resume suppressions
        types templates status-page keys db config doctor"""
    assert [name for name in commands.split() if f"\n  {name} " not in done.stdout] == []


@pytest.mark.parametrize("name", CODES)
def test_every_error_that_has_an_exit_code_exists(name):
    module, _, kind = name.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), kind), Exception)


@pytest.mark.parametrize(
    "words",
    ["work", "serve", "up", "demo", "types list", "events list", "accounts import", "keys create", "doctor", "why"],
)
def test_every_command_has_help(rolecast, words):
    result = rolecast(*words.split(), "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_wrong_usage_ends_with_two(rolecast):
    assert rolecast("publish").exit_code == 2
    assert rolecast("nonsense").exit_code == 2
    assert rolecast("events", "list", "--limit", "many").exit_code == 2
    refused(rolecast("events", "show", "a", "b", "c"), 2, "by its ULID or by SOURCE ID")
    refused(rolecast("publish", "none.json"), 2, "none.json can't be read")


def test_a_setting_that_nobody_knows_or_that_does_not_parse_stops_every_command(rolecast, folder):
    refused(rolecast("events", "list", relay_url="x"), 2, "ROLECAST_RELAY_URL", "did you mean ROLECAST_RELAY_URLS")
    refused(rolecast("config", "show", delivery="loud"), 2, "ROLECAST_DELIVERY", "'loud'", "live")
    (folder / "rolecast.toml").write_text("sendre = 'x'", encoding="utf-8")
    refused(rolecast("events", "list"), 2, "sendre", "did you mean sender")
    (folder / "rolecast.toml").unlink()
    refused(rolecast("--config", "none.toml", "events", "list"), 2, "none.toml")
    refused(rolecast("events", "list", catalogues="none.toml"), 2, "none.toml")
    assert not (folder / "rolecast.db").exists()


def test_the_settings_are_shown_with_their_sources_and_without_secrets(rolecast, folder):
    (folder / "rolecast.toml").write_text("sender = 'News <news@vendor.example>'", encoding="utf-8")
    result = rolecast(
        "config",
        "show",
        "--json",
        relay_urls="smtp://anna:hushhush@relay.example:587",
        secret_keys="0123456789abcdef-hush",
        database_url="postgresql://me:hush@db.example/rolecast",
    )
    assert "hush" not in result.stdout
    found = {one["name"]: (one["value"], one["source"]) for one in json.loads(result.stdout)["settings"]}
    assert found["ROLECAST_SENDER"] == ("News <news@vendor.example>", "sender in rolecast.toml")
    assert found["ROLECAST_RELAY_URLS"][0] == "smtp://anna:***@relay.example:587?tls=required&connections=8&rate=0"
    assert found["ROLECAST_DATABASE_URL"] == ("postgresql://me:***@db.example/rolecast", "ROLECAST_DATABASE_URL")
    assert found["ROLECAST_LISTEN"] == ("127.0.0.1:8080", "default")


# ---------------------------------------------------------------- bad events

BAD_EVENTS = {
    "not JSON": (b'{"id": ', "line 1"),
    "an empty file": (b" \n", "empty"),
    "a duplicate key": (b'{"id": "a", "id": "b"}', "id"),
    "NaN": (json.dumps(INVOICE).replace('"1280.00"', "NaN").encode(), "NaN"),
    "not an object": (b"17", "17"),
    "a wrong type": (json.dumps(envelope("invoice.issued", amount=12)).encode(), "/data/amount"),
    "a missing field": (json.dumps(envelope("invoice.issued", number=None)).encode(), "number"),
    "an extra field": (json.dumps(envelope("invoice.issued", discount="1")).encode(), "discount"),
    "an unknown type": (json.dumps({**INVOICE, "type": "invoice.isued"}).encode(), "invoice.isued"),
    "a broadcast that is none": (
        json.dumps(envelope("invoice.issued", account=None, accounts="all")).encode(),
        "accounts",
    ),
    "an empty audience": (json.dumps(envelope("service.notice", account=None, accounts=[])).encode(), "accounts"),
    "two audiences": (json.dumps(envelope("service.notice", account="acme", accounts=["acme"])).encode(), "accounts"),
    "300 KB": (json.dumps(envelope("service.notice", body="x" * 300_000)).encode(), "262,144"),
    "a bad line": (f"{json.dumps(INVOICE)}\n{json.dumps(INVOICE)[:-9]}\n".encode(), "line 2"),
}


@pytest.mark.parametrize("what", BAD_EVENTS)
def test_an_event_with_a_fault_is_refused_by_its_place_and_nothing_of_any_file_is_accepted(rolecast, folder, what):
    body, part = BAD_EVENTS[what]
    (folder / "bad.json").write_bytes(body)
    written(folder / "good.json", INVOICE)
    written(folder / "directory.json", {"accounts": [ACME]})
    assert rolecast("accounts", "import", "directory.json").exit_code == 0
    refused(rolecast("publish", "good.json", "bad.json"), 5, "bad.json", part)
    assert accepted(rolecast) == []
    refused(rolecast("explain", "--directory", "directory.json", "--json", "good.json", "bad.json"), 5, part)


def test_an_account_that_nobody_knows_refuses_the_event_and_the_explanation(rolecast, folder, directory):
    written(folder / "events.jsonl", INVOICE, envelope("invoice.issued", id="e2", account="nobody"))
    refused(rolecast("publish", "events.jsonl"), 5, "event 2", "/data/account", "'nobody'", "nothing was accepted")
    assert accepted(rolecast) == []
    refused(rolecast("explain", "--json", "events.jsonl"), 5, "event 2", "/data/account", "'nobody'")
    for document in (folder / "directory.json",):
        refused(rolecast("explain", "--directory", document, "--json", "events.jsonl"), 5, "/data/account", "'nobody'")


def test_a_category_that_the_catalogue_lacks_refuses_a_publication_and_is_an_answer_of_explain(
    rolecast, folder, directory
):
    written(folder / "event.json", envelope("announcement.published", account="globex"))
    refused(rolecast("publish", "event.json"), 5, "/type", "announcement")
    for words in ([], ["--directory", "directory.json"]):
        result = rolecast("explain", "--json", *words, "event.json")
        assert result.exit_code == 0
        answer = json.loads(result.stdout)
        assert (answer["outcome"], answer["reason"]) == ("rejected", "category_not_in_catalogue")


def test_the_same_source_and_id_is_a_duplicate_or_a_conflict(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    first = json.loads(rolecast("publish", "--json", "event.json").stdout)
    again = json.loads(rolecast("publish", "--json", "-", given=json.dumps(INVOICE)).stdout)
    assert again["receipts"][0]["event"] == first["receipts"][0]["event"]
    assert (first["duplicates"], again["duplicates"]) == (0, 1)
    written(folder / "event.json", envelope("invoice.issued", amount="9.00"))
    refused(rolecast("publish", "event.json"), 4, "/id", "other content", "nothing was accepted")


# ---------------------------------------------------------------- bad directories


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"email": "no address"}, ("/contacts/0/email", "no address")),
        ({"roles": ["executiv"]}, ("executiv",)),
        ({"kind": "group"}, ("group", "executive")),
        ({"products": []}, ("products",)),
        ({"id": "ben"}, ("ben",)),
        ({"opt_outs": [{"role": "executive", "category": "x"}]}, ("opt_outs/0", "x")),
    ],
)
def test_a_directory_with_a_fault_is_refused_by_its_place_and_changes_nothing(rolecast, folder, change, parts):
    contact = ACME["contacts"][0] | change
    written(folder / "bad.json", {"accounts": [GLOBEX, ACME | {"contacts": [contact, *ACME["contacts"][1:]]}]})
    refused(rolecast("accounts", "import", "bad.json"), 5, "bad.json", *parts)
    assert json.loads(rolecast("accounts", "list", "--json").stdout) == {"accounts": []}
    written(folder / "event.json", INVOICE)
    refused(rolecast("explain", "--directory", "bad.json", "--json", "event.json"), 5, *parts)


def test_a_dry_run_shows_the_difference_and_changes_nothing(rolecast, folder):
    written(folder / "directory.json", {"accounts": [ACME]})
    result = rolecast("accounts", "import", "--dry-run", "--json", "directory.json")
    assert json.loads(result.stdout)["accounts"]["added"] == {"count": 1, "first": ["acme"]}
    assert "dry run" in result.stderr
    assert json.loads(rolecast("accounts", "list", "--json").stdout) == {"accounts": []}


def test_pruning_needs_a_yes_where_nobody_can_be_asked(rolecast, folder, directory):
    written(folder / "less.json", {"accounts": [ACME]})
    refused(rolecast("accounts", "import", "--prune", "less.json"), 2, "1 account", "globex", "--yes")
    assert len(json.loads(rolecast("accounts", "list", "--json").stdout)["accounts"]) == 2
    assert rolecast("accounts", "import", "--prune", "--yes", "less.json").exit_code == 0
    assert [one["id"] for one in json.loads(rolecast("accounts", "list", "--json").stdout)["accounts"]] == ["acme"]


def test_the_question_of_a_prune_stands_alone_on_the_terminal(rolecast, folder, directory):
    written(folder / "other.json", {"accounts": [ACME | {"id": "new"}]})
    number, terminal = pty.fork()
    if not number:
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "TERM": "xterm"}
        os.execve(  # our own command, on a terminal
            sys.executable,
            [sys.executable, "-m", "worker.cli", "accounts", "import", "other.json", "--prune"],
            environment,
        )
    shown = b""
    while b"[y/N]:" not in shown:
        shown += os.read(terminal, 65_536)
    time.sleep(0.5)
    os.write(terminal, b"n\n")
    with suppress(OSError):  # the end of a terminal
        while part := os.read(terminal, 65_536):
            shown += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 1
    after = shown.partition(b"[y/N]:")[2]
    assert b"nothing was imported" in after
    assert b"checking" not in after


def test_an_export_is_imported_again_without_a_difference(rolecast, folder, directory):
    for words in ([], ["--lines"]):
        assert rolecast("accounts", "export", "--out", "out.json", *words).exit_code == 0
        result = rolecast("accounts", "import", "out.json")
        assert "no difference" in result.stderr
    assert json.loads(rolecast("accounts", "export", "--account", "acme").stdout)["accounts"][0]["id"] == "acme"
    assert rolecast("accounts", "export", "--account", "nobody").exit_code == 3
    assert [path.name for path in folder.glob(".out*")] == []


def test_an_account_is_shown_with_its_contacts(rolecast, directory):
    assert json.loads(rolecast("accounts", "show", "acme", "--json").stdout)["contacts"][0]["id"] == "ada"
    assert "ada@acme.example" in rolecast("accounts", "show", "acme").stdout
    refused(rolecast("accounts", "show", "nobody"), 3, "'nobody'")


# ---------------------------------------------------------------- bad databases


def test_a_read_only_database_is_told_in_a_sentence_and_can_still_be_read(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    read_only = f"sqlite:///{folder / 'rolecast.db'}?mode=ro"
    refused(rolecast("publish", "event.json", database_url=read_only), 1, "readonly", "writable")
    written(folder / "other.json", {"accounts": [ACME | {"id": "other"}]})
    refused(rolecast("accounts", "import", "other.json", database_url=read_only), 1, "readonly")
    assert rolecast("accounts", "list", database_url=read_only).exit_code == 0
    assert accepted(rolecast) == []


def test_a_full_disk_is_told_in_a_sentence_and_nothing_is_half_written(rolecast, folder, directory):
    contacts = [{"id": f"c{n}", "email": f"c{n}@large.example", "roles": ["executive"]} for n in range(5000)]
    written(folder / "large.json", {"accounts": [ACME | {"id": "large", "contacts": contacts}]})
    most = (folder / "rolecast.db").stat().st_size + 65_536

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    # The kept copy of the document is written first: it must fit, so its temporary folder is in memory's hands.
    importing = process("accounts", "import", "large.json", cwd=folder, preexec_fn=limit)
    _, said = importing.communicate(timeout=60)
    assert importing.returncode == 1
    assert said.startswith("rolecast: ")
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    listed = json.loads(rolecast("accounts", "list", "--json").stdout)["accounts"]
    assert [one["id"] for one in listed] == ["acme", "globex"]


def test_a_database_newer_than_the_code_is_left_alone(rolecast, folder, directory):
    with sqlite3.connect(folder / "rolecast.db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
        raw.execute("UPDATE installation SET oldest_code = 9999")
    raw.close()
    for words in (["events", "list"], ["db", "upgrade"], ["work", "--until-idle"]):
        refused(rolecast(*words), 1, "9999", "newer")
    assert rolecast("db", "check").exit_code == 6


def test_a_file_that_is_no_database_and_a_folder_that_is_not_there_are_told_in_a_sentence(rolecast, folder):
    (folder / "rolecast.db").write_text("Dear diary, " * 100, encoding="utf-8")
    refused(rolecast("events", "list"), 1, "not a database")
    refused(rolecast("events", "list", database_url="sqlite:///none/rolecast.db"), 1, "none")


def test_a_damaged_database_is_told_in_a_sentence_with_the_remedy(rolecast, folder, directory):
    file = folder / "rolecast.db"
    for beside in folder.glob("rolecast.db-*"):
        beside.unlink()
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(rolecast("accounts", "list"), 1, "malformed", "restore a backup")


def test_a_catalogue_that_accounts_use_but_the_settings_do_not_name_stops_every_command(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    for words in (["publish", "event.json"], ["explain", "event.json"], ["preview", "event.json"], ["up"]):
        refused(rolecast(*words, catalogues="issuetrak"), 2, "'billtrust'", "ROLECAST_CATALOGUES")
    assert "'billtrust'" in rolecast("doctor", catalogues="issuetrak").stdout
    assert accepted(rolecast) == []


@pytest.mark.parametrize("words", ["types list", "--help", "config show --json"])
def test_data_that_cannot_be_written_ends_with_one_and_a_sentence(folder, words):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        writing = process(*words.split(), cwd=folder, stdout=full)
        _, said = writing.communicate(timeout=30)
    assert writing.returncode == 1
    assert said.startswith("rolecast: ")
    assert "free space" in said
    assert len(said.strip().splitlines()) == 1


def test_a_command_whose_output_was_closed_works_all_the_same(folder):
    command = f'exec "{sys.executable}" -m worker.cli events list >&-'
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    ended = subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == b""
    assert (folder / "rolecast.db").read_bytes().startswith(b"SQLite format 3")


def test_a_server_that_cannot_be_reached_ends_with_sixty_nine(rolecast):
    refused(rolecast("events", "list", database_url="postgresql://me:hush@127.0.0.1:9/x"), 69, "127.0.0.1:9")


def test_the_schema_is_made_and_checked(rolecast):
    assert rolecast("db", "check").exit_code == 6
    made = json.loads(rolecast("db", "upgrade", "--json").stdout)
    assert made["before"] is None
    assert json.loads(rolecast("db", "check", "--json").stdout) == {
        "found": made["now"],
        "needed": made["now"],
        "current": True,
    }


# ---------------------------------------------------------------- explain


def scenarios():
    path = shared("scenarios", "examples.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_event(scenario):
    """The scenario's event as rules.md 5.3, point 16 says."""
    event = scenario["event"]
    category = "approval_request" if scenario["kind"] == "action" else event["category"]
    value = sample(next(name for name, kind in TYPES.items() if kind.category == category))
    value["id"] = event["id"]
    data = {name: given for name, given in value["data"].items() if name not in {"account", "accounts", "products"}}
    if scenario["kind"] == "action":
        data = {name: event[name] for name in ("action", "requested_by", "approved_by", "acted_by") if event.get(name)}
        data |= {"change": event["data"]} if "change" in event["data"] else {}
        data |= {"context": event["data"]["context"]} if "context" in event["data"] else {}
    if event.get("products"):
        data["products"] = event["products"]
    return {**value, "data": {**data, "account": scenario["account"]["id"]}}


def test_the_shared_scenarios_come_out_through_explain(rolecast, folder):
    for scenario in scenarios():
        account = {**scenario["account"], "catalogue": scenario["catalogue"]}
        written(folder / "directory.json", {"accounts": [account]})
        written(folder / "event.json", as_event(scenario))
        result = rolecast("explain", "--directory", "directory.json", "--json", "event.json")
        assert result.exit_code == 0, result.stderr
        assert comparable(json.loads(result.stdout)) == comparable(scenario["expected"]), scenario["id"]
    assert not (folder / "rolecast.db").exists()


def test_explain_answers_in_order_with_the_database_as_with_the_document(rolecast, folder, directory):
    written(
        folder / "events.json",
        [
            envelope("service.notice", id="b", account=None, accounts="all"),
            INVOICE,
            envelope("outage.started", id="o", account=None, accounts=["globex", "acme"]),
        ],
    )
    page = {"status_page_url": "https://status.vendor.example"}
    one = rolecast("explain", "--json", "events.json", **page)
    other = rolecast("explain", "--json", "--directory", "directory.json", "events.json", **page)
    assert one.stdout == other.stdout
    answers = [json.loads(line) for line in one.stdout.splitlines()]
    assert [(found["event"], found["account"]) for found in answers] == [
        ("b", "acme"),
        ("b", "globex"),
        ("e1", "acme"),
        ("o", "acme"),
        ("o", "globex"),
    ]
    assert answers[-1]["status_page"] == {"url": "https://status.vendor.example", "incident": None}
    report = rolecast("explain", "events.json").stdout
    assert "gets it     cy <cy@acme.example>, email: accounting (role_matched)" in report
    assert "does not    ada: no_role_match" in report


def test_explain_takes_hundreds_of_events_against_hundreds_of_accounts_within_seconds(rolecast, folder):
    accounts = [{**ACME, "id": f"a{number}"} for number in range(600)]
    written(folder / "directory.jsonl", *accounts)
    events = [envelope("invoice.issued", id=f"e{number}", account=f"a{number}") for number in range(600)]
    written(folder / "events.jsonl", *events, envelope("service.notice", id="b", account=None, accounts="all"))
    began = time.monotonic()
    result = rolecast("explain", "--directory", "directory.jsonl", "--json", "events.jsonl")
    assert len(result.stdout.splitlines()) == 1200
    assert time.monotonic() - began < 10


def test_a_reader_who_leaves_early_ends_explain_without_a_word(folder):
    written(folder / "directory.jsonl", *[{**ACME, "id": f"a{number}"} for number in range(500)])
    written(folder / "event.json", envelope("service.notice", account=None, accounts="all"))
    explaining = process("explain", "--directory", "directory.jsonl", "--json", "event.json", cwd=folder)
    explaining.stdout.close()
    assert explaining.wait(timeout=30) == 1
    assert explaining.stderr.read() == ""
    explaining.stderr.close()


# ---------------------------------------------------------------- sending


def sending(server, **settings):
    return {
        "relay_urls": f"smtp://127.0.0.1:{server.port}?tls=none",
        "sender": "Vendor <support@vendor.example>",
        **settings,
    }


def test_publish_waits_until_everything_is_sent_and_says_the_totals(rolecast, folder, directory):
    written(folder / "events.json", [INVOICE, envelope("service.notice", id="b", account=None, accounts="all")])
    with SmtpServer() as server:
        result = rolecast("publish", "--wait", "--json", "events.json", **sending(server))
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["totals"] == {"accepted": len(server.accepted)}
        assert "cy@acme.example" in [mail.recipient for mail in server.accepted]
        before = len(server.accepted)
        assert rolecast("publish", "--wait", "events.json", **sending(server)).exit_code == 0
        assert len(server.accepted) == before
    result = rolecast("why", "/test", "e1", "cy@acme.example")
    assert "gets invoice as email: accounting (role_matched)" in result.stdout
    assert "accepted" in result.stdout
    refused(rolecast("why", "/test", "e1", "nobody"), 3, "'nobody'")
    refused(rolecast("why", "/test", "e9", "cy"), 3, "no event /test e9")
    refused(rolecast("events", "cancel", "/test", "e1"), 4, "nothing left to cancel")


def test_without_a_relay_mail_waits_and_publish_says_why(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    result = rolecast("publish", "--wait", "--json", "event.json")
    assert result.exit_code == 6
    assert json.loads(result.stdout)["totals"] == {"planned": 1}
    assert "ROLECAST_RELAY_URLS" in result.stderr


@pytest.mark.parametrize("what", ["TLS", "credentials"])
def test_a_relay_that_refuses_us_leaves_the_mail_waiting(rolecast, folder, directory, what):
    written(folder / "event.json", INVOICE)
    with SmtpServer(users={"anna": "right"} if what == "credentials" else None) as server:
        address = f"127.0.0.1:{server.port}"
        url = f"smtp://{address}" if what == "TLS" else f"smtp://anna:hushhush@{address}?tls=none"
        result = rolecast("publish", "--wait", "--timeout", "20", "event.json", **sending(server, relay_urls=url))
        assert result.exit_code == 6, result.output
        assert "no relay could be used" in result.stderr
        assert "hushhush" not in result.output
        assert "Traceback" not in result.output
        doctor = rolecast("doctor", **sending(server, relay_urls=url))
        assert doctor.exit_code == 6
        assert f"relay: the relay {address} " in doctor.stdout
        assert ("does not offer TLS" if what == "TLS" else "refused the user or password") in doctor.stdout
        assert "hushhush" not in doctor.output
        assert server.accepted == []
        later = rolecast("work", "--until-idle", **sending(server))
        assert later.exit_code == 0
    assert json.loads(rolecast("events", "show", "/test", "e1", "--json").stdout)["totals"] in (
        {"planned": 1},
        {"accepted": 1},
    )


def test_a_mail_that_failed_ends_with_one_and_can_be_tried_again(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    with SmtpServer() as server:
        server.on("rcpt", reply(550, "no such user"), nth=1)
        result = rolecast("publish", "--wait", "event.json", **sending(server))
        assert result.exit_code == 1
        [failed] = json.loads(rolecast("deliveries", "list", "/test", "e1", "--json").stdout)["deliveries"]
        assert (failed["status"], failed["reason"]) == ("failed", "recipient_refused")
        assert "no such user" in failed["reply"]
        refused(rolecast("deliveries", "release", "/test", "e1"), 3, "held")
        assert rolecast("deliveries", "retry", "/test", "e1").exit_code == 0
        assert rolecast("work", "--until-idle", **sending(server)).exit_code == 0
        assert [mail.recipient for mail in server.accepted] == ["cy@acme.example"]
    assert rolecast("deliveries", "list", "/test", "e1", "--status", "sent").exit_code == 2
    refused(rolecast("deliveries", "list", "/test", "e1", "--reason", "nonsense"), 2, "'nonsense'", "recipient_refused")


def test_held_mail_is_released_only_where_mail_is_live(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    with SmtpServer() as server:
        result = rolecast("publish", "--wait", "event.json", **sending(server, delivery="test"))
        assert result.exit_code == 6
        assert "1 mail held" in result.stderr
        refused(rolecast("deliveries", "release", "/test", "e1", delivery="test"), 4, "ROLECAST_DELIVERY", "'test'")
        assert json.loads(rolecast("deliveries", "release", "/test", "e1", "--json").stdout)["deliveries"] == 1
        assert server.accepted == []
        assert rolecast("work", "--until-idle", **sending(server)).exit_code == 0
        assert len(server.accepted) == 1


def test_mail_whose_answer_was_lost_is_listed_and_settled_by_a_person(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    assert rolecast("events", "matters").exit_code == 0
    with SmtpServer() as server:
        server.on("dot", lose_the_reply(), nth=1)
        assert rolecast("publish", "--wait", "event.json", **sending(server)).exit_code == 6
        [sent] = server.accepted
    found = rolecast("events", "matters", **sending(server))
    assert found.exit_code == 6
    assert found.stdout.startswith("- 1 mail is held: the relay's answer was lost")
    ulid = accepted(rolecast)[0]["event"]
    assert f"rolecast deliveries settle {ulid} --accepted" in found.stdout
    [matter] = json.loads(rolecast("events", "matters", "--json", **sending(server)).stdout)["matters"]
    assert (matter["kind"], matter["count"], matter["events"]) == ("unknown", 1, [ulid])
    assert "1 mail is held" in rolecast("doctor", **sending(server)).stdout

    listed = rolecast("deliveries", "list", ulid, "--status", "held", "--reason", "unknown")
    assert "MESSAGE-ID" in listed.stdout
    [one] = json.loads(rolecast("deliveries", "list", ulid, "--reason", "unknown", "--json").stdout)["deliveries"]
    assert one["message_id"] in listed.stdout
    assert one["message_id"].encode() in sent.body
    assert json.loads(rolecast("deliveries", "list", ulid, "--reason", "team", "--json").stdout)["deliveries"] == []

    refused(rolecast("deliveries", "settle", ulid), 2, "--accepted", "--failed")
    refused(rolecast("deliveries", "settle", ulid, "--accepted", "-n", "7"), 3, "unknown", "7")
    assert json.loads(rolecast("deliveries", "settle", ulid, "--accepted", "--json").stdout)["deliveries"] == 1
    refused(rolecast("deliveries", "settle", ulid, "--failed"), 3, "unknown")
    assert json.loads(rolecast("events", "show", ulid, "--json").stdout)["totals"] == {"accepted": 1}
    done = rolecast("events", "matters", **sending(server))
    assert (done.exit_code, done.stdout) == (0, "")
    assert "nothing needs a person" in done.stderr


def test_mail_whose_answer_was_lost_is_sent_again_only_where_a_person_chose_it(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    with SmtpServer() as server:
        server.on("dot", lose_the_reply(), nth=1)
        assert rolecast("publish", "--wait", "event.json", **sending(server)).exit_code == 6
        stays = "1 mail of unknown outcome stays held: settle it"
        refused(rolecast("deliveries", "release", "/test", "e1"), 3, f"{stays}, or release it with --reason unknown")
        refused(rolecast("deliveries", "release", "/test", "e1", "--reason", "nonsense"), 2, "'nonsense'", "unknown")
        refused(rolecast("deliveries", "release", "/test", "e1", "--reason", "team"), 3, "with the reason team")
        refused(rolecast("events", "cancel", "/test", "e1"), 4, "nothing left to cancel", stays)
        assert accepted(rolecast)[0]["status"] == "done"
        released = rolecast("deliveries", "release", "/test", "e1", "--reason", "unknown", "--json")
        assert (json.loads(released.stdout)["deliveries"], released.stderr) == (1, "")
        assert rolecast("work", "--until-idle", **sending(server)).exit_code == 0
        assert len(server.accepted) == 2
    with closing(sqlite3.connect(folder / "rolecast.db")) as connection:
        kept = connection.execute("SELECT body FROM audit WHERE kind = 'deliveries.released'").fetchall()
    assert [json.loads(body)["reason"] for (body,) in kept] == ["unknown"]


def test_what_a_release_and_a_cancel_leave_held_is_said(rolecast, folder, directory):
    written(folder / "event.json", envelope("service.notice", account=None, accounts="all"))
    with SmtpServer() as server:
        assert rolecast("publish", "--wait", "event.json", **sending(server, delivery="test")).exit_code == 6
    for status, words in (("done", ("deliveries", "release")), ("sending", ("events", "cancel"))):
        assert accepted(rolecast)[0]["status"] == status
        with closing(sqlite3.connect(folder / "rolecast.db")) as connection, connection:
            connection.execute("UPDATE deliveries SET reason = 'unknown' WHERE n = 1")
        result = rolecast(*words, "/test", "e1", "--json")
        assert result.exit_code == 0, result.output
        assert "1 mail of unknown outcome stays held: settle it" in result.stderr
    assert json.loads(result.stdout)["withdrawn"] >= 1
    assert json.loads(result.stdout)["totals"]["held"] == 1


def test_held_mail_is_withdrawn_with_its_event_though_the_event_is_done(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    with SmtpServer() as server:
        assert rolecast("publish", "--wait", "event.json", **sending(server, delivery="test")).exit_code == 6
        assert accepted(rolecast)[0]["status"] == "done"
        result = rolecast("events", "cancel", "/test", "e1")
        assert result.stdout.endswith("cancelled: 1 mail withdrawn, 1 cancelled\n")
        refused(rolecast("deliveries", "release", "/test", "e1"), 4, "cancelled")
        assert rolecast("work", "--until-idle", **sending(server)).exit_code == 0
        assert server.accepted == []


def test_mail_that_was_settled_as_not_sent_can_be_tried_again(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    with SmtpServer() as server:
        server.on("dot", lose_the_reply(), nth=1)
        assert rolecast("publish", "--wait", "event.json", **sending(server)).exit_code == 6
        assert rolecast("deliveries", "settle", "/test", "e1", "--failed", "-n", "1").exit_code == 0
        assert rolecast("deliveries", "retry", "/test", "e1").exit_code == 0
        assert rolecast("work", "--until-idle", **sending(server)).exit_code == 0
    assert json.loads(rolecast("events", "show", "/test", "e1", "--json").stdout)["totals"] == {"accepted": 1}
    with closing(sqlite3.connect(folder / "rolecast.db")) as connection:
        kept = connection.execute("SELECT kind, actor FROM audit WHERE kind LIKE 'deliveries.%' ORDER BY id").fetchall()
    assert [kind for kind, _ in kept] == ["deliveries.settled", "deliveries.retried"]
    assert all(actor.startswith("cli:") for _, actor in kept)


def test_an_event_that_could_not_be_planned_is_planned_again_or_cancelled(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    assert rolecast("publish", "event.json").exit_code == 0
    refused(rolecast("events", "retry", "/test", "e1"), 4, "sending", "rolecast deliveries retry")
    for command, status in (("retry", "planning"), ("cancel", "cancelled")):
        with closing(sqlite3.connect(folder / "rolecast.db")) as connection, connection:
            connection.execute("UPDATE events SET status = 'held', reason = 'cannot_be_planned'")
        assert "1 event is held" in rolecast("events", "matters").stdout
        assert rolecast("events", command, "/test", "e1").exit_code == 0
        assert accepted(rolecast)[0]["status"] == status


def test_what_is_paused_waits_until_it_is_resumed(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    refused(rolecast("pause", "--class", "loud"), 3, "'loud'", "transactional")
    refused(rolecast("pause", "--relay", "relay.example:25"), 3, "relay.example:25")
    paused = json.loads(rolecast("pause", "--account", "acme", "--json").stdout)["paused"]
    assert [(one["scope"], one["value"]) for one in paused] == [("account", "acme")]
    with SmtpServer() as server:
        result = rolecast("publish", "--wait", "event.json", **sending(server))
        assert result.exit_code == 6
        assert "rolecast resume" in result.stderr
        refused(rolecast("resume", "--class", "transactional"), 3, "account acme")
        assert rolecast("resume", "--account", "acme").exit_code == 0
        assert rolecast("work", "--until-idle", **sending(server)).exit_code == 0
        assert len(server.accepted) == 1


def test_a_cancelled_event_is_not_sent(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    rolecast("publish", "event.json")
    assert json.loads(rolecast("events", "cancel", "/test", "e1", "--json").stdout)["withdrawn"] == 1
    with SmtpServer() as server:
        assert rolecast("work", "--until-idle", **sending(server)).exit_code == 0
        assert server.accepted == []
    refused(rolecast("deliveries", "retry", "/test", "e1"), 4, "cancelled")


def test_a_suppressed_address_gets_nothing_until_that_is_lifted(rolecast, folder, directory):
    written(folder / "event.json", INVOICE)
    assert rolecast("suppressions", "add", "CY@acme.example", "--why", "asked by phone").exit_code == 0
    [found] = json.loads(rolecast("suppressions", "list", "--json").stdout)["suppressions"]
    assert (found["address"], found["cause"], found["evidence"]) == ("cy@acme.example", "operator", "asked by phone")
    answer = json.loads(rolecast("explain", "--json", "event.json").stdout)
    assert {"contact": "cy", "dropped": [{"role": "accounting", "reason": "address_suppressed"}]} in answer["excluded"]
    assert rolecast("suppressions", "remove", "cy@acme.example").exit_code == 0
    assert rolecast("suppressions", "remove", "cy@acme.example").exit_code == 3
    refused(rolecast("suppressions", "add", "no address"), 5, "no address")


def test_two_workers_on_memory_are_refused(rolecast):
    refused(rolecast("work", "--processes", "2"), 2, "memory://", "ROLECAST_BROKER_URL")


def test_a_worker_stops_gracefully_and_another_one_is_refused_meanwhile(rolecast, folder, directory):
    working = process("work", cwd=folder)
    try:
        for line in working.stderr:
            if "worker.started" in line:
                break
        other = rolecast("work", "--until-idle")
        assert other.exit_code == 4
        assert f"another process works on this database already (process {working.pid})" in other.stderr
        working.send_signal(signal.SIGTERM)
        assert working.wait(timeout=30) == 0
    finally:
        working.kill()
        working.communicate()


def test_an_interrupted_command_ends_with_a_hundred_and_thirty(folder, rolecast, directory):
    written(folder / "event.json", INVOICE)
    with SmtpServer() as server:
        server.on("connect", hang())
        environment = {f"ROLECAST_{name.upper()}": value for name, value in sending(server).items()}
        publishing = process("publish", "--wait", "event.json", cwd=folder, env=environment)
        while not server.connections and publishing.poll() is None:
            time.sleep(0.05)
        publishing.send_signal(signal.SIGINT)
        server.stopping.set()
        server.drop_all()
        out, said = publishing.communicate(timeout=60)
    assert publishing.returncode == 130
    assert out == ""
    assert "rolecast: interrupted" in said
    assert "Traceback" not in said


# ---------------------------------------------------------------- preview, templates, types, keys, status page


def test_a_preview_is_written_for_one_contact_and_masks_the_signing_link(rolecast, folder, directory):
    link = "https://sign.vendor.example/q/7?a=1&b=2"
    written(folder / "event.json", envelope("quote.issued", account="globex", signing_url=link))
    result = rolecast("preview", "event.json", "--contact", "quinn", "--out", "out")
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == ["body.html", "body.txt", "message.eml", "subject.txt"]
    for name in names:
        assert b"sign.vendor.example" not in (folder / "out" / name).read_bytes()
    assert "signing-link.masked.example" in (folder / "out" / "body.txt").read_text()
    assert accepted(rolecast) == []
    nobody = rolecast("preview", "event.json", "--contact", "pay")
    assert (nobody.exit_code, nobody.stdout) == (3, "")
    assert "pay would get no mail" in nobody.stderr


def test_previews_of_several_stand_in_folders_of_their_own(rolecast, folder, directory):
    written(folder / "event.json", envelope("service.notice", account=None, accounts="all"))
    mails = json.loads(rolecast("preview", "event.json", "--json", "--out", "out").stdout)["mails"]
    assert len(mails) > 1
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(
        f"{mail['account']}-{mail['contact']}" for mail in mails
    )


def test_a_template_with_an_undefined_name_is_a_finding(rolecast, folder):
    assert json.loads(rolecast("templates", "check", "--json").stdout) == {"findings": []}
    mine = folder / "mine" / "invoice.issued"
    mine.mkdir(parents=True)
    (mine / "body.txt").write_text("Dear {{ nobody }}", encoding="utf-8")
    result = rolecast("templates", "check", templates_dir="mine")
    assert result.exit_code == 6
    assert "invoice.issued/body.txt" in result.stdout
    assert "nobody" in result.stdout


@pytest.mark.parametrize("name", TYPES)
def test_every_sample_can_be_published_as_it_is_printed(rolecast, folder, name):
    result = rolecast("types", "sample", name)
    assert json.loads(result.stdout)["type"] == name
    (folder / "event.json").write_text(result.stdout, encoding="utf-8")
    account = {**ACME, "id": "acme"}
    written(folder / "directory.json", {"accounts": [account, {**GLOBEX, "id": "globex"}]})
    explained = rolecast("explain", "--directory", "directory.json", "--json", "event.json")
    assert explained.exit_code in {0, 5}
    assert json.loads(rolecast("types", "show", name).stdout)["title"] == name


def test_a_type_that_does_not_exist_is_answered_with_the_one_that_was_meant(rolecast):
    refused(rolecast("types", "show", "invoice.isued"), 3, "did you mean invoice.issued")
    assert len(json.loads(rolecast("types", "list", "--json").stdout)["types"]) == 29


def test_a_key_is_shown_once(rolecast):
    made = json.loads(
        rolecast("keys", "create", "--name", "billing", "--mode", "test", "--scope", "publish:*", "--json").stdout
    )
    assert made["key"].startswith("rolecast_test_")
    listed = rolecast("keys", "list", "--json").stdout
    assert made["key"] not in listed
    assert json.loads(listed)["keys"][0]["scopes"] == ["publish:*"]
    refused(rolecast("keys", "create", "--name", "billing", "--scope", "read"), 4, "'billing'")
    refused(rolecast("keys", "create", "--name", "other", "--scope", "publish:x"), 5, "publish:x")
    assert rolecast("keys", "revoke", "billing").exit_code == 0
    refused(rolecast("keys", "revoke", "nobody"), 3, "'nobody'")


FEED = """<?xml version="1.0"?><feed xmlns="http://www.w3.org/2005/Atom"><title>Status</title>
<id>urn:x</id><updated>2026-11-21T09:00:00Z</updated>
<entry><id>urn:1</id><title>Slow exports</title><link href="https://status.vendor.example/i/1"/>
<updated>2026-11-21T09:00:00Z</updated><content type="html">Investigating</content></entry></feed>"""


def test_the_status_page_shows_what_the_feed_says(rolecast, folder):
    feed = written(folder / "feed.json")
    feed.write_text(FEED, encoding="utf-8")
    result = rolecast(
        "status-page", "show", "--json", status_page_feed_url=f"file://{feed}", status_page_feed_allow="file"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["incidents"][0]["title"] == "Slow exports"


@pytest.mark.parametrize(
    "body",
    [b"<html>no feed</html", b"x" * 9_000_000, b'<!DOCTYPE x [<!ENTITY a "aa">]><feed>&a;</feed>', None],
    ids=["not XML", "huge", "entities", "down"],
)
def test_a_feed_that_cannot_be_read_is_told_in_a_sentence(rolecast, folder, body):
    feed = folder / "feed.xml"
    url = f"file://{feed}"
    if body is None:
        url = "http://127.0.0.1:9/feed"
    else:
        feed.write_bytes(body)
    result = rolecast("status-page", "show", status_page_feed_url=url, status_page_feed_allow="file,private")
    assert result.exit_code == 69
    assert "the feed can't be read: " in result.stderr
    assert "Traceback" not in result.stderr


def test_events_are_listed_and_shown(rolecast, folder, directory):
    written(folder / "events.json", [INVOICE, envelope("invoice.issued", id="e2")])
    rolecast("publish", "events.json")
    found = accepted(rolecast)
    assert [one["id"] for one in found] == ["e2", "e1"]
    assert all(one["totals"] == {"planned": 1} for one in found)
    older = json.loads(rolecast("events", "list", "--json", "--before", found[0]["event"]).stdout)["events"]
    assert [one["id"] for one in older] == ["e1"]
    shown = rolecast("events", "show", found[0]["event"])
    assert "status: sending" in shown.stdout
    assert all(first >= second for first, second in pairwise(one["accepted_at"] for one in found))


def test_a_worker_says_at_once_that_its_queues_server_cannot_be_reached(rolecast, directory):
    refused(rolecast("work", "--until-idle", broker_url="redis://127.0.0.1:1/0"), 69, "can't be reached", "start it")
