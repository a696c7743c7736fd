"""Fetches the status page's feed: one GET of one address that an operator configured, and nothing that it leads to.

Promises: https only, to public addresses only, unless `allow` says otherwise; the name is resolved once, judged, and
that address is connected to, so that a second answer of the name service changes nothing; at most three redirects, each
judged like the first address; 10 seconds and 2 MiB in all, whatever the server does; nothing is unpacked; no proxy and
no credentials. Every failure is a FeedError with a sentence for the operator. (reliability.md A16, A18.)
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import os
import queue
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

MAX_BYTES: Final = 2 * 1024 * 1024
DEADLINE_S: Final = 10.0  # for name, connections, redirects and body together
MAX_REDIRECTS: Final = 3

# Where clouds answer with credentials; never a status page, not even where private addresses are allowed.
_METADATA: Final = frozenset(map(ipaddress.ip_address, ("169.254.169.254", "100.100.100.200", "fd00:ec2::254")))
# IPv6 networks that carry an IPv4 address inside, so that any host could hide there: NAT64, 6to4, Teredo.
_CARRIERS: Final = tuple(
    map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96"))
)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class FeedError(Exception):
    """The feed could not be read; the message is one sentence for the operator.

    `retry_after_s` is how many seconds the server asks to be left alone, where it does.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of a feed, and what a conditional request for the next version carries."""

    body: bytes
    etag: str | None = None
    last_modified: str | None = None


@dataclass(frozen=True, slots=True)
class NotModified:
    """The server says that what was fetched before still holds (304)."""


def fetch(
    url: str,
    *,
    allow: Collection[str] = (),
    previous: Fetched | None = None,
    deadline_s: float = DEADLINE_S,
    tls: ssl.SSLContext | None = None,
) -> Fetched | NotModified:
    """The feed at `url`. Raises FeedError.

    `allow` may hold `file` (file: URLs and plain paths) and `private` (loopback and private addresses, then http too);
    `previous` makes the request conditional; `tls` replaces the context that verifies the server.
    """
    parts = _split(url)
    if parts.scheme in ("", "file"):
        if "file" not in allow:
            raise FeedError(
                f"The feed {_shown(url)} is a file; set ROLECAST_STATUS_PAGE_FEED_ALLOW=file to read files."
            )
        return _read_file(unquote(parts.path) if parts.scheme else url)
    deadline = time.monotonic() + deadline_s
    for _ in range(MAX_REDIRECTS + 1):
        answer = _get(url, "private" in allow, previous, deadline, tls)
        if not isinstance(answer, str):
            return answer
        url = answer
        if _split(url).scheme not in ("https", "http"):
            raise FeedError(f"The feed redirects to {_shown(url)}, which is not https; correct the feed's URL.")
    raise FeedError(f"The feed redirects more than {MAX_REDIRECTS} times, at last to {_shown(url)}; correct its URL.")


def _get(
    url: str, private: bool, previous: Fetched | None, deadline: float, tls: ssl.SSLContext | None
) -> Fetched | NotModified | str:
    """What one request brings, or the URL that it is redirected to."""
    parts = _judged(url, private)
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    address = _resolved(host, port, private, deadline)
    if parts.scheme == "http" and _is_public(address):
        raise FeedError(f"The feed {_shown(url)} is http on a public address; give its https URL.")
    try:
        with closing(_connected(parts, address, port, deadline, tls)) as connection:
            connection.settimeout(_left(deadline))
            connection.sendall(_request(parts, previous))
            response = http.client.HTTPResponse(_Deadlined(connection, deadline), method="GET")  # type: ignore[arg-type]
            with closing(response):
                response.begin()
                return _answer(url, response, conditional=previous is not None)
    except TimeoutError:
        raise FeedError(f"The feed {_shown(url)} did not answer in full within the time that it has.") from None
    except ssl.SSLError as error:
        raise FeedError(f"The server of the feed {_shown(url)} is not trusted: {error}.") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise FeedError(f"The feed {_shown(url)} could not be fetched: {reason[:200]}.") from None


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise FeedError(f"The feed's address {_shown(url)} is not a URL; correct it.") from None


def _judged(url: str, private: bool) -> SplitResult:
    """The parts of a URL that may be asked, as far as its text can tell."""
    parts = _split(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and private):
        raise FeedError(f"The feed {_shown(url)} is not an https URL; give one that is.")
    if "@" in parts.netloc:
        raise FeedError("The feed's URL carries a user name or password; give one without.")
    if not url.isascii() or any(char <= " " or char == "\x7f" for char in url):
        raise FeedError(f"The feed's URL {_shown(url)} has characters that must be percent-encoded; encode them.")
    try:
        if parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise FeedError(f"The feed's URL {_shown(url)} has no usable host and port; correct it.")


def _resolved(host: str, port: int, private: bool, deadline: float) -> _Address:
    """The first address of the name, when none of its addresses is one that may not be asked."""
    answers: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            answers.put(error)
        else:
            answers.put([str(address[0]) for *_, address in found])

    threading.Thread(target=ask, name="feed-resolver", daemon=True).start()  # getaddrinfo cannot be interrupted
    try:
        answer = answers.get(timeout=_left(deadline))
    except (queue.Empty, TimeoutError):
        raise FeedError(f"The feed's host {_shown(host)} could not be resolved in time.") from None
    if not isinstance(answer, list) or not answer:
        raise FeedError(f"The feed's host {_shown(host)} could not be resolved; check the name and the name service.")
    addresses = [ipaddress.ip_address(text) for text in answer]
    for address in addresses:
        if not (_is_public(address) or (private and _is_private(address))):
            remedy = "such addresses are never asked"
            if _is_private(address):
                remedy = "set ROLECAST_STATUS_PAGE_FEED_ALLOW=private to allow loopback and private addresses"
            raise FeedError(f"The feed's host {_shown(host)} has the address {address}, which is not public; {remedy}.")
    return addresses[0]


def _is_public(address: _Address) -> bool:
    address = _unmapped(address)
    if isinstance(address, ipaddress.IPv6Address) and any(address in network for network in _CARRIERS):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved and address not in _METADATA


def _is_private(address: _Address) -> bool:
    """Whether `private` allows it: loopback or a private network, but neither link-local nor unspecified."""
    address = _unmapped(address)
    if address.is_link_local or address.is_unspecified or address.is_multicast or address in _METADATA:
        return False
    return address.is_loopback or (address.is_private and not address.is_reserved)


def _unmapped(address: _Address) -> _Address:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _connected(
    parts: SplitResult, address: _Address, port: int, deadline: float, tls: ssl.SSLContext | None
) -> socket.socket:
    """A connection to the judged address; on https the certificate must be the host's."""
    connection = socket.create_connection((str(address), port), timeout=_left(deadline))
    if parts.scheme == "http":
        return connection
    try:
        connection.settimeout(_left(deadline))
        return (tls or ssl.create_default_context()).wrap_socket(connection, server_hostname=parts.hostname)
    except BaseException:
        connection.close()
        raise


def _request(parts: SplitResult, previous: Fetched | None) -> bytes:
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [
        f"GET {target} HTTP/1.1",
        f"Host: {parts.netloc}",
        "User-Agent: Rolecast",
        "Accept: application/atom+xml, application/rss+xml, application/xml;q=0.9, text/xml;q=0.8",
        "Accept-Encoding: identity",
        "Connection: close",
    ]
    if previous and previous.etag:
        lines.append(f"If-None-Match: {previous.etag}")
    if previous and previous.last_modified:
        lines.append(f"If-Modified-Since: {previous.last_modified}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _answer(url: str, response: http.client.HTTPResponse, *, conditional: bool) -> Fetched | NotModified | str:
    location = response.getheader("Location")
    if response.status in (301, 302, 303, 307, 308) and location:
        return urljoin(url, location)
    if response.status == 304 and conditional:
        return NotModified()
    if response.status != 200:
        raise FeedError(
            f"The feed {_shown(url)} answered {response.status} {response.reason[:40]}.".replace(" .", "."),
            retry_after_s=_retry_after(response),
        )
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise FeedError(f"The feed {_shown(url)} came compressed, although that was not asked for.")
    if (response.length or 0) > MAX_BYTES:
        raise FeedError(f"The feed {_shown(url)} is larger than {MAX_BYTES // 1024**2} MiB.")
    body = response.read(MAX_BYTES + 1)
    if len(body) > MAX_BYTES:
        raise FeedError(f"The feed {_shown(url)} is larger than {MAX_BYTES // 1024**2} MiB.")
    if response.length:  # read() with a limit does not tell that the body was cut short
        raise FeedError(f"The feed {_shown(url)} broke off {response.length} bytes before its end.")
    return Fetched(body, etag=response.getheader("ETag"), last_modified=response.getheader("Last-Modified"))


def _retry_after(response: http.client.HTTPResponse) -> float | None:
    """The seconds that a 429 or 503 asks to wait: what it says within an hour, five minutes where it says nothing."""
    if response.status not in (429, 503):
        return None
    text = response.getheader("Retry-After", "").strip()
    return float(min(int(text), 3600)) if text.isascii() and text.isdigit() and len(text) < 10 else 300.0


def _read_file(path: str) -> Fetched:
    try:
        with open(path, "rb", opener=_open_plain) as file:
            body = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FeedError(f"The feed {_shown(path)} could not be read: {reason}.") from None
    if len(body) > MAX_BYTES:
        raise FeedError(f"The feed {_shown(path)} is larger than {MAX_BYTES // 1024**2} MiB.")
    return Fetched(body)


def _open_plain(path: str, flags: int) -> int:
    """Opens a regular file only: a pipe or a device could keep the reader for ever."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a plain file")
    return descriptor


def _left(deadline: float) -> float:
    """The seconds left until the deadline. Raises TimeoutError when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _shown(text: str) -> str:
    text = text if len(text) <= 200 else text[:197] + "..."
    return '"' + "".join(char if char.isprintable() else "?" for char in text) + '"'


class _Deadlined:
    """A connection whose reads all end at one deadline; http.client asks only for its makefile."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        """A buffered reader; `mode` is always rb."""
        return io.BufferedReader(_Reads(self._connection, lambda: _left(self._deadline)))


class _Reads(io.RawIOBase):
    def __init__(self, connection: socket.socket, left: Callable[[], float]) -> None:
        self._connection = connection
        self._left = left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._connection.settimeout(self._left())
        return self._connection.recv_into(buffer)
