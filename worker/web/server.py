"""The web side as a whole: which pages and calls there are, and the server that answers them.

`build` makes the application, `run` serves it until a signal says stop. Importing FastAPI takes most of a second, so
this module is imported by the commands that serve, and by no other.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from worker import logs
from worker.app import App, Engine
from worker.links import Links, keys_for
from worker.web import api, events_page, health, inbox_pages, preferences, problems
from worker.web.inbox import Inbox
from worker.web.security import Door, own_hosts
from worker.web.site import STATIC, Site

logger = logs.get(__name__)

STOP_SECONDS = 10
#: How long requests in hand may take once a signal said stop.


class ListenError(Exception):
    """The address to listen on can't be taken; the sentence names it and the remedy."""


def build(
    app: App, *, engine: Engine | None, inbox: Inbox | None, listen: tuple[str, int], demo: bool = False
) -> FastAPI:
    """The web application of an opened installation. `listen` is where it is going to listen, its port the real one."""
    settings = app.settings
    secrets = keys_for(settings.secret_keys, app.database.path)
    site = Site(
        app=app,
        engine=engine,
        inbox=inbox,
        listen=listen,
        demo=demo,
        links=Links(secrets, settings.public_url) if secrets else None,
    )
    web = FastAPI(title="Rolecast", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    web.state.site = site
    problems.install(web, site)
    for router in (api.router, health.router, preferences.router, events_page.router):
        web.include_router(router)
    if inbox is not None:
        web.include_router(inbox_pages.router)
    web.add_api_route("/", _home, include_in_schema=False)
    web.mount("/static", StaticFiles(directory=STATIC), name="static")
    web.add_middleware(Door, hosts=own_hosts(listen, settings.public_url), public_url=settings.public_url)
    setattr(web, "openapi", lambda: _described(web))  # noqa: B010 - FastAPI's documented way, unknown to mypy
    return web


def run(app: App, *, engine: Engine | None, inbox: Inbox | None, demo: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, then end the requests in hand. Raises `ListenError`.

    Says on stderr where the pages are; the demonstration says that itself.
    """
    listener = _listener(*app.settings.listen)
    address = app.settings.listen[0], listener.getsockname()[1]
    web = build(app, engine=engine, inbox=inbox, listen=address, demo=demo)
    config = uvicorn.Config(
        web, log_config=None, access_log=False, proxy_headers=False, server_header=False, date_header=True,
        timeout_graceful_shutdown=STOP_SECONDS, timeout_keep_alive=15, lifespan="off",
    )  # fmt: skip
    url = url_of(*address)
    lines = [f"Events   {url}/events"]
    if inbox is not None:
        lines.append(f"Inbox    {url}/inbox")
    lines.append(f"API      {url}/v1/events   (described in {url}/openapi.json)")
    if not demo:
        print("\n".join(lines), file=sys.stderr, flush=True)  # noqa: T201 - for the person who started it
    logger.info("web.started", url=url)
    server = _Server(config)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()


class _Server(uvicorn.Server):
    """uvicorn's, which would raise the signal again once it has ended: what was started has to be stopped after it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End gracefully on SIGTERM and SIGINT, at once on a second Ctrl-C."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread hears signals
            return
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def url_of(host: str, port: int) -> str:
    """The URL under which this machine reaches the listening address."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - names it
    return f"http://{name}:{port}"


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # the URL that is printed next can be called at once
    except OSError as error:
        listener.close()
        message = f"can't listen on {host}:{port} ({error.strerror or error}): name another in ROLECAST_LISTEN"
        raise ListenError(message) from error
    return listener


def _home() -> Response:
    return RedirectResponse("/events", 303)


def _described(web: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the API key as what it is."""
    if not web.openapi_schema:
        schema = get_openapi(title="Rolecast", version="1", routes=web.routes)
        schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["key"] = {"type": "http", "scheme": "bearer"}
        web.openapi_schema = schema
    return web.openapi_schema
