"""What stands before every page and call: the Host header, where a form may come from, sizes, and headers of answers.

- Pages and writing calls answer only under the names that the installation has (contract, section 7): a page of
  somebody else whose name was made to point here gets nothing (DNS rebinding).
- A form of another site changes nothing: `Sec-Fetch-Site`, else `Origin`, else no browser. What is authorised by an
  API key or by a personal link needs no such check: RFC 8058 posts come from mail providers.
- A body is read with a limit and a deadline, and never unpacked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.settings import is_loopback
from worker.web.problems import Problem

BODY_SECONDS: Final = 10.0
#: How long a body may take to arrive.
POLITE_BYTES: Final = 8 * 1024 * 1024
#: How much of a body that is too large is still read and dropped, so that the sender hears the answer.

_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_ANY_HOST: Final = ("/healthz", "/readyz", "/metrics")
_AUTHORISED_BY_ITSELF: Final = ("/v1/", "/unsubscribe/", "/preferences/")
_WILDCARDS: Final = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - names what it means, listens nowhere
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


def own_hosts(listen: tuple[str, int], public_url: str) -> frozenset[str]:
    """The Host headers that mean this installation, in lower case."""
    name, port = listen
    names = {name}
    if is_loopback(name) or name in _WILDCARDS:
        names |= {"127.0.0.1", "localhost", "::1"}
    public = urlsplit(public_url)
    found = {public.netloc.rpartition("@")[2].lower()}
    found.update(_authorities(public.hostname or "", public.port or _DEFAULT_PORTS[public.scheme], public.scheme))
    for one in names - _WILDCARDS:
        found.update(_authorities(one, port, "http"))
    return frozenset(found)


def _authorities(name: str, port: int, scheme: str) -> Iterable[str]:
    host = f"[{name}]" if ":" in name and not name.startswith("[") else name
    yield f"{host}:{port}".lower()
    if port == _DEFAULT_PORTS[scheme]:
        yield host.lower()


class Door:
    """ASGI middleware: lets in what belongs here, and gives every answer the headers that browsers need."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], public_url: str) -> None:
        self.app = app
        self.hosts = hosts
        self.public_origin = public_url.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse to."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        path = scope["path"]
        head = scope["method"] == "HEAD"
        if head:  # what GET answers, without its body: link checkers and load balancers ask so
            scope = {**scope, "method": "GET"}

        async def guarded(message: Message) -> None:
            if head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Cache-Control", "max-age=86400" if path.startswith("/static/") else "no-store")
                headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
                headers.setdefault("Referrer-Policy", "no-referrer")
            await send(message)

        problem = self._refusal(request, path)
        await (problem.response() if problem else self.app)(scope, receive, guarded)

    def _refusal(self, request: Request, path: str) -> Problem | None:
        if path in _ANY_HOST or (request.method in _SAFE and path.startswith(("/v1/", "/openapi.json"))):
            return None
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return Problem(
                400,
                "This server is not known under that name: use the host of ROLECAST_LISTEN or ROLECAST_PUBLIC_URL.",
            )
        if request.method in _SAFE or path.startswith(_AUTHORISED_BY_ITSELF) or self._is_own_form(request):
            return None
        return Problem(403, "This form was sent from another site.")

    def _is_own_form(self, request: Request) -> bool:
        """The rule of Go's CrossOriginProtection: browsers say where a form comes from; programs say nothing."""
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if site is not None:
            return site in {"same-origin", "none"}
        return origin is None or origin == self.public_origin or urlsplit(origin).netloc == request.headers["host"]


async def read_body(request: Request, most: int, *, seconds: float = BODY_SECONDS) -> bytes:
    """The body of a request, at most `most` bytes. Raises `Problem`: 413, 415 where encoded, 408 where slow."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Problem(415, "The body has a Content-Encoding; send it as it is.")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    chunks.append(chunk)
                elif size > most + POLITE_BYTES:
                    break
    except TimeoutError as error:
        raise Problem(408, f"The body did not arrive within {seconds:g} seconds.") from error
    if size > most:
        raise Problem(413, f"The body is larger than {most:,} bytes, which is the most that is taken here.")
    return b"".join(chunks)
