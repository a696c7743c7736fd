"""The command line: one root with the shared options, and one place where a failure becomes a sentence and a code.

Data on stdout, messages and progress on stderr. The commands stand in `worker.commands`; they import what they need
when they run, so that `rolecast --help` stays fast.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from worker.commands import (
    accounts,
    database,
    deliveries,
    event_types,
    events,
    explain,
    keys,
    pauses,
    preview,
    publish,
    running,
    setup,
    status_page,
    suppressions,
    templates,
)
from worker.commands.console import CODES, Exit, Options, Stop, say, told

EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage or setting, 3 not found, 4 conflict, 5 invalid input, 6 findings, "
    "69 a server cannot be reached, 130 interrupted."
)


class Root(TyperGroup):
    """Runs a command; every expected failure ends in sentences on stderr and an exit code, never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except Stop as stop:
            self._end(stop.code, *stop.sentences)
        except KeyboardInterrupt:
            self._end(Exit.INTERRUPTED, "interrupted")
        except BrokenPipeError:  # whoever read our data has gone
            self._end(Exit.FAILED)
        except Exception as error:
            code = code_of(error)
            if code is None:
                raise
            self._end(code, *sentences_of(error))
        return result

    def _end(self, code: Exit, *sentences: str) -> None:
        for sentence in sentences:
            say(f"rolecast: {sentence}")
        raise typer.Exit(code)


def code_of(error: BaseException) -> Exit | None:
    """The exit code of an expected failure; None for what nobody expected: that is a fault of ours."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    if names[0] == "worker.intake.Refused":
        invalid = any(fault.kind == "invalid" for fault in getattr(error, "faults", ()))
        return Exit.INVALID if invalid else Exit.CONFLICT
    if names[0] == "worker.keys.KeyRefused":
        kinds = {"invalid": Exit.INVALID, "conflict": Exit.CONFLICT, "unknown": Exit.NOT_FOUND}
        return kinds[getattr(error, "kind", "invalid")]
    if names[0] == "subscriptions.database.DatabaseUnusable" and _unreachable(error.__cause__):
        return Exit.UNREACHABLE
    found = next((CODES[name] for name in names if name in CODES), None)
    return Exit.FAILED if found is None and isinstance(error, OSError) else found


def _unreachable(cause: BaseException | None) -> bool:
    """Whether a server refused or lost the connection, rather than the statement."""
    said = getattr(cause, "orig", None)
    if not type(said).__module__.startswith("psycopg"):
        return False
    state = getattr(said, "sqlstate", None)
    return state is None or state[:2] in {"08", "28", "3D", "57"}


_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def sentences_of(error: BaseException) -> tuple[str, ...]:
    """What a failure says to the user."""
    if isinstance(error, OSError):
        remedy = ": free space there, or raise the limit, then run the command again" if error.errno in _FULL else ""
        return (f"{error.filename or 'what was being written'}: {error.strerror or error}{remedy}",)
    faults = getattr(error, "faults", ())
    if len(faults) > 1:
        name = f"{error.name}, " if hasattr(error, "name") else ""
        return told([f"{name}{_fault(fault)}" for fault in faults])
    return (str(error),)


def _fault(fault: Any) -> str:
    place = getattr(fault, "place", "")
    if place:
        return f"{place}: {fault.message}"
    return str(fault.message) if hasattr(fault, "place") or hasattr(fault, "index") else str(fault)


app = typer.Typer(
    cls=Root,
    name="rolecast",
    help="Notification fan-out by contact role: events in, one mail per person out, with a reason for every verdict.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(asked: bool) -> None:
    if asked:
        try:
            found = version("rolecast")
        except PackageNotFoundError:
            found = "(a checkout that is not installed)"
        typer.echo(f"rolecast {found}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings file instead of ./rolecast.toml.")
    ] = None,
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="Tell more; twice: tell all.")] = 0,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Notification fan-out by contact role: events in, one mail per person out, with a reason for every verdict."""
    ctx.obj = Options(config, verbose)


for _module in (explain, publish, running, preview, events, pauses, setup):
    _module.add_to(app)
for _name, _group in (
    ("accounts", accounts.app),
    ("events", events.app),
    ("deliveries", deliveries.app),
    ("suppressions", suppressions.app),
    ("types", event_types.app),
    ("templates", templates.app),
    ("status-page", status_page.app),
    ("keys", keys.app),
    ("db", database.app),
    ("config", setup.app),
):
    app.add_typer(_group, name=_name)


def main() -> None:
    """Run the command of the process's arguments, and end the process with its exit code."""
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # closed by whoever started us: a file of ours must not get its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # something else was put in their place
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    code: Any = None
    try:
        app()
    except SystemExit as end:
        code = end.code
    except OSError as error:  # of the help, which is written before there is a command
        code = Exit.FAILED
        say(f"rolecast: {sentences_of(error)[0]}")
    try:
        sys.stdout.flush()
    except OSError:  # the data did not arrive; what Python flushes at its end must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = code or Exit.FAILED
    sys.exit(code)


if __name__ == "__main__":
    main()
