"""`rolecast work`, `serve`, `up` and `demo`: what runs until it is told to stop."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.commands.console import Exit, Json, Stop, print_json, say, settings_of
from worker.commands.signals import stopped_by_signals

if TYPE_CHECKING:
    from worker.settings import RelaySettings

LOOK_SECONDS = 0.1


def add_to(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command("work")(work)
    app.command("serve")(serve)
    app.command("up")(up)
    app.command("demo")(demo)


def work(
    ctx: typer.Context,
    processes: Annotated[int, typer.Option("--processes", metavar="N", min=1, help="Worker processes.")] = 1,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when nothing is due now.")] = False,
    json: Json = False,
) -> None:
    """Send what is due, on all lanes, until SIGTERM or Ctrl-C (twice: at once)."""
    settings = settings_of(ctx, long_running=True)
    if processes > 1 and settings.broker_url == "memory://":
        message = (
            f"--processes {processes}: with the broker memory:// one process works at a time; "
            "leave the option out, or set ROLECAST_BROKER_URL=redis://..."
        )
        raise Stop(Exit.USAGE, message)
    if processes > 1:
        message = f"--processes {processes}: this version starts one process; run `rolecast work` {processes} times"
        raise Stop(Exit.USAGE, message)
    from redis import RedisError

    from worker.app import Engine, open_app
    from worker.broker import ping

    try:
        ping(settings.broker_url)
    except RedisError as error:
        raise Stop(Exit.UNREACHABLE, f"the queue's server can't be reached ({error}): start it, then this") from error
    with open_app(settings) as app, stopped_by_signals() as stop:
        if not settings.relay_urls:
            say("no relay is configured: events are planned, mail waits until ROLECAST_RELAY_URLS is set")
        engine = Engine(app)
        engine.start()
        healthy = True
        try:
            while healthy and not stop.is_set() and not (until_idle and engine.idle()):
                stop.wait(LOOK_SECONDS if until_idle else 1.0)
                healthy = engine.healthy()
        finally:
            engine.stop()
    if json:
        print_json({"stopped": stop.is_set(), "idle": until_idle and not stop.is_set()})
    if not healthy:
        raise Stop(Exit.FAILED, "a thread of the worker ended: nothing is lost, start it again")


def serve(ctx: typer.Context) -> None:
    """Serve the web side: the API, the recipients' pages, the console."""
    settings = settings_of(ctx, long_running=True)
    from worker.app import open_app
    from worker.web import server

    with open_app(settings) as app:
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
