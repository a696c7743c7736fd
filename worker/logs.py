"""Logs: one line an event, on stderr, as JSON or for a terminal; every event name stands in `EVENT_NAMES`.

A line says what happened and, where something waits, what will happen next, in fields. Secrets and addresses are
masked before anything is written. Lines of libraries (dramatiq, uvicorn, alembic) come out in the same form.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog

EVENT_NAMES = frozenset(
    {
        "event.accepted",
        "event.refused",
        "event.redirected",
        "event.planned",
        "event.done",
        "slice.settled",
        "delivery.failed",
        "delivery.deferred",
        "delivery.held",
        "relay.connected",
        "relay.unusable",
        "worker.started",
        "worker.stopped",
        "worker.waits",
        "rescue.freed",
        "feed.failed",
        "feed.read",
        "web.started",
        "database.unusable",
        "database.upgraded",
        "scheduler.failed",
    }
)
#: Every event name that the project logs; a test holds the code against it.

_SECRET_KEYS = re.compile(r"password|token|secret|api_key|authorization|signature|dsn", re.IGNORECASE)
_ADDRESS = re.compile(r"([^\s<>@\"']{1,64})@([A-Za-z0-9.\-]+\.[A-Za-z0-9\-]+)")
_TOKEN_PATH = re.compile(r"/(unsubscribe|preferences)/[^\s\"?]+")


def configure(log_format: Literal["console", "json"] | None, *, level: int = logging.INFO) -> None:
    """Send every log line of the process to stderr, in the format asked for or fitting to stderr."""
    chosen = log_format or ("console" if sys.stderr.isatty() else "json")
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        redact,
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if chosen == "console"
        else structlog.processors.JSONRenderer()
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info if chosen == "json" else _untouched,
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("dramatiq", "uvicorn.access", "alembic", "mail.log", "aiosmtpd", "httpx", "asyncio"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def get(name: str) -> Any:
    """The logger of a module."""
    return structlog.get_logger(name)


def redact(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Stars for secrets, `a***@domain` for addresses, nothing behind the name of a personal link."""
    for key, value in line.items():
        if _SECRET_KEYS.search(key):
            line[key] = "***"
        elif isinstance(value, str):
            line[key] = masked(value)
    return line


def masked(text: str) -> str:
    """A text with its addresses and personal links made unreadable."""
    return _TOKEN_PATH.sub(r"/\1/***", _ADDRESS.sub(lambda found: f"{found[1][0]}***@{found[2]}", text))


def _untouched(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return line
