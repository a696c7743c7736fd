"""`rolecast work`, `serve`, `up` and `demo`: what runs until it is told to stop."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.commands.console import Exit, Json, Stop, print_json, say, settings_of
from worker.commands.signals import stopped_by_signals

if TYPE_CHECKING:
    from worker.app import Engine
    from worker.ledger import Lane
    from worker.settings import RelaySettings

LOOK_SECONDS = 0.1
QUEUE_ASK_SECONDS = 5.0
QUEUE_AWAY_SECONDS = 60.0
#: How long `--until-idle` waits for a queue's server that went away.


def add_to(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command("work")(work)
    app.command("serve")(serve)
    app.command("up")(up)
    app.command("demo")(demo)


def work(
    ctx: typer.Context,
    *,
    processes: Annotated[
        int, typer.Option("--processes", metavar="N", min=1, help="N for bulk, and one for each other lane.")
    ] = 1,
    lanes: Annotated[
        str | None, typer.Option("--lanes", metavar="LANE,...", help="Only these: urgent, normal, bulk.")
    ] = None,
    parent: Annotated[int | None, typer.Option("--parent", hidden=True, help="End when this process ends.")] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when nothing is due now.")] = False,
    json: Json = False,
) -> None:
    """Send what is due, until SIGTERM or Ctrl-C (twice: at once)."""
    settings = settings_of(ctx, long_running=True)
    chosen = _lanes(lanes, settings.broker_url)
    if processes > 1:
        _refuse_processes(processes, lanes, settings.broker_url)
    _reach_the_queue(settings.broker_url)
    if processes > 1:
        _work_in_processes(ctx, processes, until_idle=until_idle, json=json)
        return
    from worker.app import Engine, open_app

    with open_app(settings) as app, stopped_by_signals() as stop:
        if not settings.relay_urls:
            say("no relay is configured: events are planned, mail waits until ROLECAST_RELAY_URLS is set")
        engine = Engine(app, lanes=chosen)
        engine.start()
        ended = None
        try:
            while ended is None and not stop.is_set() and not (until_idle and engine.idle()):
                stop.wait(LOOK_SECONDS if until_idle else 1.0)
                ended = _why_ended(engine, parent, until_idle=until_idle)
        finally:
            engine.stop()
    if json:
        print_json({"stopped": stop.is_set(), "idle": until_idle and not stop.is_set() and ended is None})
    if ended is not None:
        raise ended


def _why_ended(engine: Engine, parent: int | None, *, until_idle: bool) -> Stop | None:
    """Why a worker can't go on by itself; None where it can."""
    if parent is not None and os.getppid() != parent:
        return Stop(Exit.FAILED, "the process that started this worker is gone: it ends too")
    if not engine.healthy():
        return Stop(Exit.FAILED, "this worker can't go on: nothing is lost, start it again")
    if until_idle and engine.queue_away_seconds > QUEUE_AWAY_SECONDS:
        return Stop(Exit.UNREACHABLE, f"{engine.queue_problem}; it was waited for {QUEUE_AWAY_SECONDS:.0f} s")
    return None


def _lanes(text: str | None, broker_url: str) -> tuple[Lane, ...]:
    from worker.ledger import Lane

    if text is None:
        return tuple(Lane)
    names = [part.strip().lower() for part in text.split(",") if part.strip()]
    known = {lane.name.lower(): lane for lane in Lane}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise Stop(Exit.USAGE, f"--lanes {text!r}: give some of {', '.join(known)}, separated by commas")
    if broker_url == "memory://" and len(set(names)) < len(known):
        message = "--lanes: with the broker memory:// one process serves all; set ROLECAST_BROKER_URL=redis://..."
        raise Stop(Exit.USAGE, message)
    return tuple(sorted({known[name] for name in names}))


def _refuse_processes(processes: int, lanes: str | None, broker_url: str) -> None:
    if broker_url == "memory://":
        message = (
            f"--processes {processes}: with the broker memory:// one process works at a time; "
            "leave the option out, or set ROLECAST_BROKER_URL=redis://..."
        )
        raise Stop(Exit.USAGE, message)
    if lanes is not None:
        raise Stop(Exit.USAGE, "--processes gives each lane processes of its own: leave out --lanes")


def _reach_the_queue(broker_url: str) -> None:
    from redis import RedisError

    from worker.broker import ping

    try:
        ping(broker_url)
    except RedisError as error:
        raise Stop(Exit.UNREACHABLE, f"the queue's server can't be reached ({error}): start it, then this") from error


def _work_in_processes(ctx: typer.Context, processes: int, *, until_idle: bool, json: bool) -> None:
    """Watch over worker processes until a signal, or until nothing is due."""
    from worker.app import is_idle, open_app
    from worker.processes import Family

    settings = settings_of(ctx, long_running=True)
    with open_app(settings) as app, stopped_by_signals() as stop:
        family = Family(processes, config=ctx.obj.config)
        family.start()
        queue = _Queue(settings.broker_url)
        try:
            while not stop.wait(LOOK_SECONDS) and not (until_idle and family.works(app.database) and is_idle(app)):
                family.look()
                if until_idle and queue.is_gone():
                    message = f"the queue's server can't be reached; it was waited for {QUEUE_AWAY_SECONDS:.0f} s"
                    raise Stop(Exit.UNREACHABLE, message)
        finally:
            family.stop()
    if json:
        print_json({"stopped": stop.is_set(), "idle": until_idle and not stop.is_set()})


class _Queue:
    """The queue's server, as a parent sees it that sends nothing itself."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._asked = self._answered = time.monotonic()

    def is_gone(self) -> bool:
        """Whether it did not answer for `QUEUE_AWAY_SECONDS`; it is asked every few seconds."""
        from redis import RedisError

        from worker.broker import ping

        if time.monotonic() - self._asked >= QUEUE_ASK_SECONDS:
            self._asked = time.monotonic()
            with suppress(RedisError, OSError):
                ping(self._url)
                self._answered = time.monotonic()
        return time.monotonic() - self._answered > QUEUE_AWAY_SECONDS


def serve(ctx: typer.Context) -> None:
    """Serve the web side: the API, the recipients' pages, the console."""
    settings = settings_of(ctx, long_running=True)
    from worker.app import open_app, telling_workers
    from worker.web import server

    with open_app(settings) as app, telling_workers(app):
        server.run(app, engine=None, inbox=None)


def up(
    ctx: typer.Context,
    inbox: Annotated[bool, typer.Option("--inbox", help="Send into a local inbox; nothing leaves.")] = False,
) -> None:
    """Run everything in one process: web side, workers, scheduler."""
    settings = settings_of(ctx, long_running=True)
    from worker import history
    from worker.app import Engine, open_app
    from worker.web import server
    from worker.web.inbox import Inbox

    with ExitStack() as stack:
        caught: Inbox | None = None
        if inbox:
            caught = Inbox(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rolecast-inbox-"))))
            settings = replace(settings, relay_urls=(_local_relay(*caught.start()),))
            stack.callback(caught.stop)
        app = stack.enter_context(open_app(settings))
        if caught is not None:
            caught.hide(partial(history.signing_link, app.database))
        if not settings.relay_urls:
            say("no relay is configured: events are planned, mail waits until ROLECAST_RELAY_URLS is set")
        engine = Engine(app)
        engine.start()
        stack.callback(engine.stop)
        server.run(app, engine=engine, inbox=caught)


def _local_relay(host: str, port: int) -> RelaySettings:
    from worker.settings import RelaySettings

    return RelaySettings(host, port, implicit_tls=False, tls="none", user=None, password=None, connections=8, rate=0)


def demo(
    ctx: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Do the work, print the summary, and end.")] = False,
    folder: Annotated[Path | None, typer.Option("--folder", metavar="DIR", help="Keep the demo's data there.")] = None,
    json: Json = False,
) -> None:
    """Show it all with sample data and a local inbox; nothing leaves the machine."""
    del ctx
    from worker import demo as demonstration

    raise typer.Exit(demonstration.run(once=once, folder=folder, json=json))
