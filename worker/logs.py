"""Logs: one line an event, on stderr, as JSON or for a terminal; every event name stands in `EVENT_NAMES`.

A line says what happened and, where something waits, what will happen next, in fields. Secrets and addresses are
masked before anything is written. Lines of libraries (dramatiq, uvicorn, alembic) come out in the same form.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

import structlog

EVENT_NAMES = frozenset(
    {
        "event.accepted",
        "event.planned",
        "event.done",
        "event.held",
        "slice.failed",
        "delivery.failed",
        "delivery.deferred",
        "delivery.held",
        "mail.unrenderable",
        "rendition.differs",
        "relay.connected",
        "relay.unusable",
        "relay.usable",
        "worker.started",
        "worker.stopped",
        "rescue.freed",
        "feed.failed",
        "web.started",
        "database.unusable",
        "database.upgraded",
        "scheduler.failed",
        "relay.spent",
        "class.paused",
        "notice.prepared",
        "notice.sent",
        "heartbeat.failed",
        "worker.replaced",
        "worker.died",
        "queue.unusable",
        "queue.usable",
        "queue.foreign",
        "thread.failed",
    }
)
#: Every event name that the project logs; a test holds the code against it.

_SECRET_KEYS = re.compile(r"password|token|secret|api_key|authorization|signature|dsn", re.IGNORECASE)
_ADDRESS = re.compile(r"([^\s<>@\"']{1,64})@([\w.\-]+\.[\w\-]+)")
_CREDENTIALS = re.compile(r"://[^\s/@]*@")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_TOKEN_PATH = re.compile(r"/(unsubscribe|preferences)/[^\s\"?]+")


def configure(log_format: Literal["console", "json"] | None, *, level: int = logging.INFO) -> None:
    """Send every log line of the process to stderr, in the format asked for or fitting to stderr."""
    chosen = log_format or ("console" if sys.stderr.isatty() else "json")
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        if chosen == "console"
        else structlog.processors.JSONRenderer()
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.addFilter(_told_by_us)
    threading.excepthook = _thread_failed
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("dramatiq", "uvicorn", "uvicorn.access", "alembic", "mail.log", "aiosmtpd", "httpx", "asyncio"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _told_by_us(line: logging.LogRecord) -> bool:
    """dramatiq tells of a queue that is away, or is filled by strangers, again and again; we say it once."""
    return not str(line.msg).startswith(("Consumer encountered a connection error", "Found 'None' message"))


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """A thread that ends by a fault is a log line like any other; who needs it sees that it is gone."""
    name = failed.thread.name if failed.thread is not None else ""
    trace = (failed.exc_type, failed.exc_value, failed.exc_traceback)
    logger = get(__name__)
    logger.error("thread.failed", thread=name, why=str(failed.exc_value), exc_info=trace)


def get(name: str) -> Any:
    """The logger of a module."""
    return structlog.get_logger(name)


def redact(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Stars for secrets, `a***@domain` for addresses, nothing behind the name of a personal link."""
    for key, value in line.items():
        line[key] = _redacted(key, value)
    return line


def _redacted(key: str, value: Any) -> Any:
    if _SECRET_KEYS.search(key):
        return "***"
    if isinstance(value, Mapping):
        return {name: _redacted(str(name), part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(key, part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = masked(str(value))
    # Control characters could make a line look like two, or paint the terminal; a trace keeps its lines.
    return text if key == "exception" else _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def masked(text: str) -> str:
    """A text with its addresses, personal links and the credentials of its URLs made unreadable."""
    text = _CREDENTIALS.sub("://***@", text)
    return _TOKEN_PATH.sub(r"/\1/***", _ADDRESS.sub(lambda found: f"{found[1][0]}***@{found[2]}", text))
