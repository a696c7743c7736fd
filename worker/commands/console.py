"""What every command shares: settings, the opened installation, exit codes, and how data and messages are written.

Data goes to stdout, messages and progress to stderr. An expected failure is a `Stop` (or an error listed in `CODES`):
one sentence on stderr, and its exit code. Nothing heavy is imported here: `rolecast --help` comes by.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # these import SQLAlchemy, which no --help waits for
    from sqlalchemy import Connection

    from worker.app import App
    from worker.fanout import EventRow
    from worker.settings import Settings


class Exit(IntEnum):
    """How a command ended (contract, section 5)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    INVALID = 5
    FINDINGS = 6
    UNREACHABLE = 69
    INTERRUPTED = 130


CODES = {
    "worker.settings.SettingsError": Exit.USAGE,
    "subscriptions.catalogue.CatalogueError": Exit.USAGE,
    "subscriptions.documents.DocumentError": Exit.INVALID,
    "subscriptions.changes.NotFound": Exit.NOT_FOUND,
    "subscriptions.changes.ChangeError": Exit.INVALID,
    "subscriptions.database.DatabaseUnusable": Exit.FAILED,
    "worker.migrate.SchemaError": Exit.FAILED,
    "worker.event_faults.EventError": Exit.INVALID,
    "worker.app.AnotherWorks": Exit.CONFLICT,
    "worker.relay.RelayError": Exit.UNREACHABLE,
    "worker.feedclient.FeedError": Exit.UNREACHABLE,
    "worker.rendering.RenderError": Exit.FAILED,
    "worker.mime.MimeError": Exit.FAILED,
    "worker.web.server.ListenError": Exit.FAILED,
    "redis.exceptions.RedisError": Exit.UNREACHABLE,
}
"""The errors whose text is a sentence for the user, by name: their modules need not be loaded to tell them."""

MOST_FAULTS = 20
#: Faults that are written out; the others are counted.


class Stop(Exception):  # noqa: N818 - it is how a command ends, not always a fault
    """The command ends here with this exit code; each sentence is a line on stderr."""

    def __init__(self, code: Exit, *sentences: str) -> None:
        super().__init__("; ".join(sentences))
        self.code = code
        self.sentences = sentences


Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
"""The option that every command has."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options before the command."""

    config: Path | None
    verbose: int


def settings_of(ctx: typer.Context, *, long_running: bool = False) -> Settings:
    """The settings; from now on logs go to stderr, `long_running` commands tell what they do."""
    import logging

    from worker import logs
    from worker.settings import load

    options = ctx.find_object(Options) or Options(None, 0)
    settings = load(os.environ, config=options.config)
    quiet = logging.INFO if long_running else logging.WARNING
    logs.configure(settings.log_format, level=max(logging.DEBUG, quiet - 10 * options.verbose))
    return settings


@contextmanager
def opened(ctx: typer.Context) -> Iterator[App]:
    """The installation, opened for the time of a command."""
    settings = settings_of(ctx)
    from worker.app import open_app

    with open_app(settings) as app:
        yield app


def user() -> str:
    """Who works at the command line, as records name them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


# ---------------------------------------------------------------- naming events


EventWords = Annotated[
    list[str], typer.Argument(metavar="EVENT", show_default=False, help="The event's ULID, or its SOURCE and ID.")
]
"""An event as commands take it: one word or two."""


def event_of(connection: Connection, words: Sequence[str]) -> EventRow:
    """The event that one word (ULID) or two (source and id) name. Raises `Stop`."""
    from worker import history

    if len(words) not in {1, 2}:
        raise Stop(Exit.USAGE, f"name the event by its ULID or by SOURCE ID, not by {len(words)} words")
    event = history.find_event(connection, *words)
    if event is None:
        raise Stop(Exit.NOT_FOUND, f"there is no event {' '.join(words)}: `rolecast events list` shows those there are")
    return event


# ---------------------------------------------------------------- input


def read_file(name: str) -> bytes:
    """The bytes of a file, or of stdin for `-`. Raises `Stop`."""
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise Stop(Exit.USAGE, f"the file {name} can't be read ({error.strerror}): name one that exists") from error


def asks() -> bool:
    """Whether somebody sits there who can answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()


# ---------------------------------------------------------------- output


def say(message: str) -> None:
    """A line for the user, on stderr."""
    typer.echo(message, err=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print_line(json.dumps(document, ensure_ascii=False, indent=2))


def print_json_line(document: Any) -> None:
    """One JSON document on a line of its own."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")


def print_line(text: str = "") -> None:
    """A line of data on stdout."""
    sys.stdout.write(text + "\n")


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows in columns, none cut short, so that they can be read and piped on."""
    cells = [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[place]) for row in [[*heads], *cells]) for place in range(len(heads))]
    for row in [[*heads], *cells]:
        print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def shown(value: object) -> str:
    """A value as it stands in a table: one line, nothing that a terminal would obey."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "".join(letter if letter.isprintable() else " " for letter in str(value))


def counted(number: int, noun: str) -> str:
    """`1 event`, `2,000 events`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def told(faults: Sequence[str]) -> tuple[str, ...]:
    """The first of many faults as sentences, and how many more there are."""
    rest = len(faults) - MOST_FAULTS
    return (*faults[:MOST_FAULTS], *([f"and {counted(rest, 'more fault')}"] if rest > 0 else []))


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr where that is a terminal; call it with how much is done and of how much in all."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
