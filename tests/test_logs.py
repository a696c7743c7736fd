"""Log lines: one form for all, nothing personal or secret in them, and no event name that is not listed."""

from __future__ import annotations

import ast
import contextvars
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from worker import logs

ROOT = Path(__file__).resolve().parent.parent


class Written:
    """What stderr received so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Written]:
    """What stderr received; the logging of the process is put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Written(capsys)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def last(stream: Written) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(stream.getvalue().splitlines()[-1])
    return line


def test_a_line_is_json_where_stderr_is_no_terminal(written: Written) -> None:
    logs.configure(None)
    logs.get("worker.relay").warning("relay.unusable", relay="relay.test:25", tried_again_in_seconds=5)
    line = last(written)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "relay.unusable",
        "level": "warning",
        "relay": "relay.test:25",
        "tried_again_in_seconds": 5,
    }


def test_a_line_for_people_is_one_line(written: Written) -> None:
    logs.configure("console")
    logs.get("worker.relay").info("worker.started", worker=3)
    [line] = written.getvalue().splitlines()
    assert "worker.started" in line
    assert "worker=3" in line


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_lines_of_libraries_come_out_in_the_same_form(written: Written, log_format: Any) -> None:
    logs.configure(log_format)
    logging.getLogger("dramatiq.worker").warning("Lost %s", "ada.lovelace@acme.example")
    [line] = written.getvalue().splitlines()
    assert "Lost a***@acme.example" in line
    assert "warning" in line
    assert "lovelace" not in line


def test_libraries_that_talk_much_are_heard_only_when_they_warn(written: Written) -> None:
    logs.configure("json")
    for name in ("dramatiq", "uvicorn.access", "alembic.runtime", "mail.log", "httpx", "asyncio"):
        logging.getLogger(name).info("GET /unsubscribe/abc")
    assert written.getvalue() == ""


CANARIES = ["kanarienvogel", "hunter2", "s3cr3t-token", "AbCdEf123456", "jürgen.müller"]

LINES: list[dict[str, Any]] = [
    {"why": "no kanarienvogel@acme.example there"},
    {"why": "<jürgen.müller@straße.example>"},
    {"password": "hunter2"},
    {"relay_password": "hunter2", "smtp": {"password": "hunter2", "host": "h"}},
    {"token": "s3cr3t-token"},
    {"api_key": "s3cr3t-token", "authorization": "Bearer s3cr3t-token"},
    {"path": "/unsubscribe/AbCdEf123456"},
    {"path": "https://notify.acme.example/preferences/AbCdEf123456?x=1"},
    {"url": "redis://:hunter2@localhost:6379/0"},
    {"url": "postgresql://rolecast:hunter2@db/rolecast"},
    {"url": "smtp://user:hunter2@relay.test:587"},
    {"people": ["kanarienvogel@acme.example", ("kanarienvogel@acme.example",)]},
    {"nested": {"deep": [{"to": "kanarienvogel@acme.example"}]}},
    {"error": ValueError("no kanarienvogel@acme.example")},
]


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("facts", LINES, ids=[str(number) for number in range(len(LINES))])
def test_nothing_personal_or_secret_is_written(written: Written, log_format: Any, facts: dict[str, Any]) -> None:
    logs.configure(log_format)
    logs.get("worker.test").warning("delivery.failed", **facts)
    assert "delivery.failed" in written.getvalue()
    assert [canary for canary in CANARIES if canary in written.getvalue()] == []


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_trace_shows_no_address_and_no_variable(written: Written, log_format: Any) -> None:
    logs.configure(log_format)
    password = "hunter2"  # in the frame, as a variable would be
    people: dict[str, str] = {}
    try:
        people["no kanarienvogel@acme.example"]
    except LookupError:
        logs.get("worker.test").exception("delivery.failed")
        logging.getLogger("some.library").exception("it failed")
    assert password not in written.getvalue()
    assert "kanarienvogel" not in written.getvalue()
    assert written.getvalue().count("KeyError: 'no k***@acme.example'") == 2


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("forged", ["a\nevent.done", "\x1b[31mred", "a\rb", "a\u2028b", "\x9b1m"])
def test_no_value_can_make_a_line_of_its_own_or_paint_the_terminal(
    written: Written, log_format: Any, forged: str
) -> None:
    logs.configure(log_format)
    logs.get("worker.test").info("event.accepted", source=forged)
    logging.getLogger("some.library").warning(forged)
    text = written.getvalue()
    assert len(text.splitlines()) == 2
    assert not set(text) & {"\x1b", "\r", "\u2028", "\x9b"}


def test_what_is_bound_once_stands_in_every_line(written: Written) -> None:
    logs.configure("json")

    def work() -> None:
        structlog.contextvars.bind_contextvars(event_id="01J", to="kanarienvogel@acme.example")
        logs.get("worker.test").info("event.planned")

    contextvars.copy_context().run(work)
    assert (last(written)["event_id"], last(written)["to"]) == ("01J", "k***@acme.example")


def test_a_text_without_anything_personal_stays_as_it_is() -> None:
    for text in ("relay.test:25", "100 % @ once", "/events/01J", "see https://status.acme.example/incidents/1", ""):
        assert logs.masked(text) == text


def names_in_the_source() -> dict[str, str]:
    """Every first argument of `logger.<level>(...)`, and where it stands."""
    levels = {"debug", "info", "warning", "error", "exception", "critical"}
    found = {}
    for path in [*(ROOT / "worker").rglob("*.py"), *(ROOT / "subscriptions").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in levels
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "logger"
            ):
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: a name that is put together"
                found[str(node.args[0].value)] = f"{path}:{node.lineno}"
    return found


def test_every_event_name_in_the_source_is_listed_and_every_listed_one_is_used() -> None:
    found = names_in_the_source()
    assert {name: place for name, place in found.items() if name not in logs.EVENT_NAMES} == {}
    assert set(logs.EVENT_NAMES) - set(found) == set()


def test_event_names_are_a_noun_and_a_verb() -> None:
    assert [name for name in logs.EVENT_NAMES if not all(part.isalpha() for part in name.split("."))] == []
    assert {name.count(".") for name in logs.EVENT_NAMES} == {1}
