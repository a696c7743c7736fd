"""The status page: what its feed says, which incident an event is about, and the link that answers the event.

Promises: the feed can improve a link and nothing else. Whatever happens to it, an outage or maintenance event is
answered at once, out of what was read before, with the incident where one surely matches and with the page otherwise.
Texts of the feed are plain text here (no markup, bounded length), links are http or https.

Owns the only use of feedparser. Fetching is worker.feedclient's. The ways in which vendors differ are listed in
reliability.md 4.2.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final, Literal
from urllib.parse import urljoin, urlsplit

import feedparser

from worker.event_fields import instant
from worker.events import Event
from worker.feedclient import DEADLINE_S, MAX_BYTES, FeedError, Fetched, NotModified, fetch

__all__ = ["Feed", "FeedError", "FeedState", "Incident", "StatusPage", "match", "read_feed"]

MAX_ENTRIES: Final = 300
MAX_TAGS: Final = 100_000
MAX_TITLE: Final = 200  # characters, like all limits on texts here
MAX_TEXT: Final = 2000
_MAX_MARKUP: Final = 20_000
FRESH_FOR: Final = timedelta(minutes=15)  # how long what was read counts without another success

Status = Literal[
    "investigating", "identified", "monitoring", "ongoing", "resolved", "cancelled",
    "scheduled", "in_progress", "verifying", "completed", "unknown",
]  # fmt: skip
Kind = Literal["incident", "maintenance"]

OVER: Final[frozenset[Status]] = frozenset({"resolved", "completed", "cancelled"})
_ACTIVE: Final[frozenset[Status]] = frozenset(
    {"investigating", "identified", "monitoring", "ongoing", "in_progress", "verifying"}
)
_OF_MAINTENANCE: Final[frozenset[Status]] = frozenset({"scheduled", "in_progress", "verifying", "completed"})
_OF_INCIDENTS: Final[frozenset[Status]] = frozenset({"investigating", "identified", "monitoring", "ongoing"})


@dataclass(frozen=True, slots=True)
class Incident:
    """One incident or maintenance on the status page, as its newest entry tells it. Times are UTC."""

    key: str  # stable for as long as the feed shows the incident
    id: str  # the feed's own id of the newest entry, empty where it has none
    title: str
    url: str | None  # None where the feed gives no usable link
    status: Status
    updated_at: datetime | None
    started_at: datetime | None  # None where the feed does not tell
    text: str  # what the entries say, components included
    kind: Kind

    @property
    def active(self) -> bool:
        """Whether it is known to be going on: not over, not only planned, not unknown."""
        return self.status in _ACTIVE


@dataclass(frozen=True, slots=True)
class Feed:
    """What a feed says: its incidents, newest first."""

    incidents: tuple[Incident, ...] = ()

    def to_json(self) -> str:
        """The feed as a JSON text that from_json reads."""
        return json.dumps([{**asdict(incident)} for incident in self.incidents], default=_written, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Feed:
        """The feed that to_json wrote. Raises ValueError, KeyError or TypeError on anything else."""
        return cls(tuple(_incident_from(row) for row in json.loads(text)))


@dataclass(frozen=True, slots=True)
class FeedState:
    """What is known of the feed: shown by `rolecast status-page show`, and shared between processes as JSON."""

    feed: Feed = field(default_factory=Feed)
    checked_at: datetime | None = None  # the last time that the feed was asked
    succeeded_at: datetime | None = None  # the last time that it answered properly
    error: str | None = None  # why the last time failed, as a sentence; None where it did not

    def to_json(self) -> str:
        """The state as a JSON text that from_json reads."""
        state = {
            "checked_at": self.checked_at,
            "succeeded_at": self.succeeded_at,
            "error": self.error,
            "incidents": json.loads(self.feed.to_json()),
        }
        return json.dumps(state, default=_written, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> FeedState:
        """The state that to_json wrote. Raises ValueError, KeyError or TypeError on anything else."""
        state = json.loads(text)
        return cls(
            feed=Feed(tuple(_incident_from(row) for row in state["incidents"])),
            checked_at=_read_time(state["checked_at"]),
            succeeded_at=_read_time(state["succeeded_at"]),
            error=state["error"],
        )


class StatusPage:
    """The status page and what its feed said last.

    `url` is the page (None where none is set up), `feed_url` its feed, `allow` as in ROLECAST_STATUS_PAGE_FEED_ALLOW,
    `clock` tells the time in UTC, `every_s` how often it is refreshed, `deadline_s` how long one refresh may take.
    One thread refreshes, any thread asks for a pointer.
    """

    def __init__(
        self,
        url: str | None,
        *,
        feed_url: str | None = None,
        allow: Collection[str] = (),
        clock: Callable[[], datetime],
        every_s: float = 60,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._url = url
        self._feed_url = feed_url
        self._allow = frozenset(allow)
        self._clock = clock
        self._deadline_s = deadline_s
        self._fresh_for = max(FRESH_FOR, timedelta(seconds=3 * every_s))
        self._state = FeedState()
        self._fetched: Fetched | None = None  # what the next request is conditional on
        self._quiet_until: datetime | None = None  # the server asked to be left alone
        self._refreshing = threading.Lock()

    def refresh(self) -> FeedState:
        """Reads the feed once, within some ten seconds, and returns the new state. Never raises: errors are recorded.

        Does nothing where no feed is set up, while another refresh runs, or while the server asked to be left alone.
        """
        if self._feed_url is None or not self._refreshing.acquire(blocking=False):
            return self._state
        try:
            now = self._clock()
            if self._quiet_until is None or now >= self._quiet_until:
                self._state = self._read(self._feed_url, now)
        finally:
            self._refreshing.release()
        return self._state

    def adopt(self, state: FeedState) -> None:
        """Takes over what another process read, where it is newer than what this one knows."""
        ours, theirs = self._state.checked_at, state.checked_at
        if theirs is not None and (ours is None or theirs > ours):
            self._state = state
            self._fetched = None  # conditions of our last request say nothing about their feed

    def pointer(self, event: Event) -> dict[str, Any]:
        """The `status_page` of the event's answer (contract.md section 6). Never fetches, never raises.

        The incident is null where none surely matches, and where the feed failed or was not read lately.
        """
        state = self._state
        incident = None
        if state.error is None and state.succeeded_at and self._clock() - state.succeeded_at <= self._fresh_for:
            incident = match(event.data, event.products, state.feed)
        if incident is None:
            return {"url": self._url, "incident": None}
        return {
            "url": self._url,
            "incident": {
                "title": incident.title,
                "url": incident.url or self._url,
                "status": incident.status,
                "updated_at": _written(incident.updated_at) if incident.updated_at else None,
            },
        }

    def state(self) -> FeedState:
        """What is known of the feed at this moment."""
        return self._state

    def _read(self, feed_url: str, now: datetime) -> FeedState:
        """The state after asking the feed."""
        try:
            answer = fetch(feed_url, allow=self._allow, previous=self._fetched, deadline_s=self._deadline_s)
            if isinstance(answer, NotModified):
                return replace(self._state, checked_at=now, succeeded_at=now, error=None)
            feed = read_feed(answer.body, now=now)
        except FeedError as error:
            self._fetched = None  # the next good answer should be a whole one
            self._quiet_until = now + timedelta(seconds=error.retry_after_s) if error.retry_after_s else None
            return replace(self._state, checked_at=now, error=str(error))
        self._fetched = answer
        return FeedState(feed, checked_at=now, succeeded_at=now)


# ---------------------------------------------------------------- reading a feed


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of a feed; several may tell of one incident."""

    key: str
    id: str
    title: str
    url: str | None
    said: str | None  # a status, "update" (what was said before still holds), or None: nothing
    updated_at: datetime | None
    started_at: datetime | None
    text: str
    planned: bool  # its title speaks of maintenance


def read_feed(data: bytes, *, now: datetime | None = None) -> Feed:
    """The incidents of an Atom or RSS feed. Raises FeedError for anything that is not one.

    At most the first 300 entries are read. Times after `now` count as `now`. A feed without entries is an all-clear.
    """
    try:
        return _read(_checked_text(data), now)
    except FeedError:
        raise
    except Exception as error:  # foreign input: whatever feedparser or we stumble over is the feed's fault
        raise FeedError(f"The feed could not be understood ({type(error).__name__}).") from error


def _read(text: str, now: datetime | None) -> Feed:
    # Nothing is fetched for a BytesIO. Markup is stripped below, so feedparser's own sanitising would only cost time.
    parsed = feedparser.parse(
        io.BytesIO(b'<?xml version="1.0" encoding="utf-8"?>' + text.lstrip().encode()),
        response_headers={"content-type": "application/xml; charset=utf-8"},
        sanitize_html=False,
        resolve_relative_uris=False,
    )
    if not parsed.get("version"):
        raise FeedError("The feed's address answers with something that is neither Atom nor RSS.")
    page = _link(parsed.feed.get("link"), None)
    by_key: dict[str, list[_Entry]] = {}
    for raw in parsed.entries[:MAX_ENTRIES]:
        entry = _entry(raw, page, now)
        by_key.setdefault(entry.key, []).append(entry)
    incidents = [_incident(entries) for entries in by_key.values()]
    incidents.sort(key=lambda incident: incident.updated_at or _LONG_AGO, reverse=True)
    return Feed(tuple(incidents))


_LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)
_DECLARATION: Final = re.compile(r"\s*<\?xml[^>]{0,200}?\?>")
_ENCODING: Final = re.compile(rb"""\s*<\?xml[^>]{0,100}?encoding=["']([A-Za-z0-9._-]{1,40})["']""")
_ENTRY_END: Final = re.compile(r"</(?:[A-Za-z]{1,20}:)?(entry|item)\s*>")


def _checked_text(data: bytes) -> str:
    """The feed's text without declaration, cut after the last entry that is read. Raises FeedError."""
    if len(data) > MAX_BYTES:
        raise FeedError(f"The feed is larger than {MAX_BYTES // 1024**2} MiB.")
    if not data.strip():
        raise FeedError("The feed is empty.")
    named = _ENCODING.match(data[:400])
    encoding = named[1].decode().lower() if named else "utf-8"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif encoding in ("utf-8", "utf8", "us-ascii", "ascii") or encoding.startswith("utf-16"):
        encoding = "utf-8-sig"
    if encoding not in ("utf-8-sig", "utf-16", "iso-8859-1", "iso-8859-15", "windows-1252", "shift_jis", "euc-jp"):
        raise FeedError(f'The feed is written in "{encoding}"; only UTF-8 and a few others are read.')
    try:
        text = data.decode(encoding)
    except UnicodeError:
        raise FeedError(f"The feed is not the {encoding.removesuffix('-sig').upper()} that it says it is.") from None
    text = _DECLARATION.sub("", text, count=1)
    if re.match(r"\s*(<!doctype\s+html|<html)", text, re.IGNORECASE):
        raise FeedError("The feed's address answers with an HTML page; give the address of its Atom or RSS feed.")
    _refuse_declarations(text)
    return _cut(text)


def _refuse_declarations(text: str) -> None:
    """Refuses DOCTYPE and ENTITY anywhere outside comments and CDATA: no feed needs them, bombs do."""
    position = 0
    while (position := text.find("<!", position)) >= 0:
        if text.startswith("<!--", position):
            end, skip = text.find("-->", position + 4), 3
        elif text.startswith("<![CDATA[", position):
            end, skip = text.find("]]>", position + 9), 3
        else:
            raise FeedError("The feed declares a document type or entities, which are never read.")
        if end < 0:
            raise FeedError("The feed is not well-formed XML: a comment or CDATA section does not end.")
        position = end + skip


def _cut(text: str) -> str:
    """The text without entries beyond the limit, so that parsing has a bound. Raises FeedError for too many tags."""
    for count, end in enumerate(_ENTRY_END.finditer(text), 1):
        if count == MAX_ENTRIES and _ENTRY_END.search(text, end.end()):
            text = text[: end.end()] + ("</feed>" if end[1] == "entry" else "</channel></rss>")
            break
    if text.count("<") > MAX_TAGS:
        raise FeedError(f"The feed has more than {MAX_TAGS:,} tags in its first {MAX_ENTRIES} entries.")
    return text


def _incident(entries: Sequence[_Entry]) -> Incident:
    """The incident that these entries tell of; the newest decides (by its own time, not by its place)."""
    newest_first = sorted(entries, key=lambda entry: entry.updated_at or _LONG_AGO, reverse=True)
    newest = newest_first[0]
    status = _carried(entry.said for entry in newest_first)
    starts = [start for entry in entries if (start := entry.started_at or entry.updated_at) is not None]
    told = len(entries) > 1 or newest.started_at is not None
    planned = any(entry.planned for entry in entries)
    return Incident(
        key=newest.key,
        id=newest.id,
        title=newest.title,
        url=newest.url,
        status=status,
        updated_at=newest.updated_at,
        started_at=min(starts, default=None) if told else None,
        text=_clip(" ".join(entry.text for entry in newest_first), MAX_TEXT),
        kind="maintenance" if status in _OF_MAINTENANCE or (planned and status not in _OF_INCIDENTS) else "incident",
    )


def _carried(said: Iterable[str | None]) -> Status:
    """The status that entries (newest first) amount to: an update carries on what was said before it.

    An entry that says nothing carries on an incident that is going on, but neither its end nor its plan.
    """
    silent = False
    for word in said:
        if word == "update":
            continue
        if word is None:
            silent = True
            continue
        status: Status = word  # type: ignore[assignment]
        return "unknown" if silent and status not in _ACTIVE else status
    return "unknown"


def _entry(raw: feedparser.FeedParserDict, page: str | None, now: datetime | None) -> _Entry:
    markups = [part.get("value", "") for part in raw.get("content", [])] or [raw.get("summary", "")]
    markup = "\n".join(markups)[:_MAX_MARKUP]
    reader = _read_markup(markup)
    title, said_in_title = _title(str(raw.get("title", "")))
    updated_at = _clamped(_time(_raw_time(raw, "updated", "published")), now)
    url = _link(raw.get("link"), page)
    identity = _clip(_plain(str(raw.get("id") or "")), 500)
    said = _said_in(reader.headings, reader.text) or said_in_title
    said = said or _said_in([str(tag.get("term", "")) for tag in raw.get("tags", [])], "")
    started_at = _earliest(reader.smalls, updated_at)
    published = _clamped(_time(_raw_time(raw, "published")), now)
    return _Entry(
        key=_key(identity, url, title, published or updated_at),
        id=identity,
        title=title,
        url=url,
        said=said,
        updated_at=updated_at,
        started_at=started_at,
        text=_clip(reader.text, MAX_TEXT),
        planned=_PLANNED.search(title) is not None,
    )


# ---------------------------------------------------------------- keys and links

_CODE: Final = re.compile(
    r"/(?:incidents?|maintenances?|events?|issues?)/(?!(?:history|current|active|past|upcoming|today|all)\b)"
    r"([A-Za-z0-9_-]{4,64})/?(?:[?#]|$)",
    re.IGNORECASE,
)
_AWS_ID: Final = re.compile(r"(.*#[a-z0-9-]+)_\d{9,11}")  # ...#service-region_epoch, a new one per update
_HOST_FIRST: Final = re.compile(r"(?:[a-z0-9-]{1,63}\.)+[a-z]{2,24}(?::\d{1,5})?(?:/|$)", re.IGNORECASE)


def _key(identity: str, url: str | None, title: str, first: datetime | None) -> str:
    """What names the incident: its code in the link, its id, its link, or else its title and date."""
    code = _CODE.search(url or "") or _CODE.search(identity)
    if code:
        return code[1]
    aws = _AWS_ID.fullmatch(identity)
    if aws:  # all updates of one incident share service, region and title
        return _digest(aws[1], title)
    if identity and not _is_home_page(identity):
        return identity
    if url and not _is_home_page(url):
        return _normal(url)
    return _digest(title, str(first))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _is_home_page(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return bool(parts.netloc) and parts.path in ("", "/") and not parts.query and not parts.fragment


def _normal(address: str) -> str:
    """An address as it is compared: no scheme, host in lower case, single slashes, no fragment, no slash at the end."""
    address = address.strip().partition("#")[0]
    rest = address.partition("://")[2] or address
    host, _, path = rest.partition("/")
    return re.sub("/{2,}", "/", f"{host.lower()}/{path}").rstrip("/")


def _link(written: object, page: str | None) -> str | None:
    """The link as http or https, made whole where the feed left something out; None where it is anything else."""
    link = str(written or "").strip()
    if not link or len(link) > 2000 or not link.isprintable() or set(link) & set(' <>"\\^`{|}'):
        return None
    try:
        scheme = urlsplit(link).scheme
        if not scheme or _HOST_FIRST.match(link):
            if link.startswith("//"):
                link = "https:" + link
            elif _HOST_FIRST.match(link):
                link = "https://" + link
            elif page:
                link = urljoin(page, link)
        parts = urlsplit(link)
        usable = parts.scheme in ("https", "http") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        return None
    return link if usable else None


# ---------------------------------------------------------------- what an entry says

# A feed's word, in lower case -> the status. Complete for the vendors of reliability.md 4.2.
_WORDS: Final[Mapping[str, str]] = {
    "investigating": "investigating",
    "identified": "identified",
    "monitoring": "monitoring",
    "resolved": "resolved",
    "fixed": "resolved",
    "closed": "resolved",
    "service is operating normally": "resolved",
    "postmortem": "update",
    "post-mortem": "update",
    "update": "update",
    "updated": "update",
    "informational message": "update",
    "active": "ongoing",
    "ongoing": "ongoing",
    "service degradation": "ongoing",
    "service disruption": "ongoing",
    "service impact": "ongoing",
    "performance issues": "ongoing",
    "degraded performance": "ongoing",
    "partial outage": "ongoing",
    "major outage": "ongoing",
    "scheduled": "scheduled",
    "planned": "scheduled",
    "maintenance scheduled": "scheduled",
    "in progress": "in_progress",
    "in-progress": "in_progress",
    "maintenance in progress": "in_progress",
    "verifying": "verifying",
    "completed": "completed",
    "complete": "completed",
    "maintenance complete": "completed",
    "maintenance completed": "completed",
    "cancelled": "cancelled",
    "canceled": "cancelled",
}
_STATUS_LINE: Final = re.compile(rf"\bstatus:\s*({'|'.join(sorted(_WORDS, key=len, reverse=True))})\b", re.IGNORECASE)
_TITLE_PREFIX: Final = re.compile(r"\s*([A-Za-z][A-Za-z -]{2,32}):\s+(?=\S)")
_BRACKETED: Final = re.compile(r"[\[(]\s*([A-Za-z][A-Za-z -]{2,32}?)\s*[\])]")
_PLANNED: Final = re.compile(r"\bmaintenance\b", re.IGNORECASE)


def _said_in(headings: Sequence[str], text: str) -> str | None:
    """The status that an entry's headings give (newest first), else a line `Status: ...`."""
    postmortem = update = False
    for heading in headings:
        word = re.sub(r"^status\s*:\s*", "", heading.strip().lower()).strip(" .:-\u2013\u2014!")
        said = _WORDS.get(word)
        postmortem = postmortem or word in ("postmortem", "post-mortem")
        update = update or said == "update"
        if said and said != "update":
            return said
    if postmortem:
        return "resolved"  # written only after the end
    line = _STATUS_LINE.search(text)
    said = _WORDS[line[1].lower()] if line else None
    return said or ("update" if update else None)


def _title(markup: str) -> tuple[str, str | None]:
    """The title as plain text without the status before it, and that status."""
    title = _clip(_read_markup(markup[:1000]).text, 1000)
    said = None
    prefix = _TITLE_PREFIX.match(title)
    if prefix and prefix[1].strip().lower() in _WORDS:
        said, title = _WORDS[prefix[1].strip().lower()], title[prefix.end() :]
    for bracketed in _BRACKETED.finditer(title):
        word = _WORDS.get(bracketed[1].lower())
        if word and word != "update":
            said = word
    return _clip(title, MAX_TITLE) or "(no title)", said


_HEADINGS: Final = frozenset({"strong", "b", "h1", "h2", "h3", "h4"})
_INLINE: Final = frozenset({"a", "b", "strong", "i", "em", "u", "span", "var", "code", "sup", "sub", "font", "time"})
_SILENT: Final = frozenset({"script", "style", "template", "title"})
# A tag, or a comment or instruction, each without another "<" inside: linear, whatever the text (HTMLParser is not).
_TAG: Final = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)[^<>]*>|<[!?][^<>]*>")


@dataclass(frozen=True, slots=True)
class _Markup:
    """A text without its markup, what stood in it as a heading or in bold, and what stood small, in order."""

    text: str
    headings: tuple[str, ...]
    smalls: tuple[str, ...]


def _read_markup(markup: str) -> _Markup:
    """The parts of a markup. What was escaped twice is unescaped once more, so that no tag is left in the text."""
    if re.search(r"&lt;/?[a-z]", markup) and not re.search(r"<[a-z]", markup):
        markup = html.unescape(markup)
    pieces: list[str] = []
    noted: dict[str, list[str]] = {"heading": [], "small": []}
    into: list[str] | None = None
    silent, position = "", 0
    for tag in _TAG.finditer(markup):
        words = "" if silent else html.unescape(markup[position : tag.start()])
        position = tag.end()
        pieces.append(words)
        if into is not None:
            into[-1] += words
        closing, name = tag[1] == "/", (tag[2] or "").lower()
        if silent or name in _SILENT:
            silent = "" if closing and silent in ("", name) else silent or name
        if name not in _INLINE:
            pieces.append(" ")
        if name in _HEADINGS or name == "small":
            into = None if closing else noted["small" if name == "small" else "heading"]
            if into is not None:
                into.append("")
    pieces.append("" if silent else html.unescape(markup[position:]))
    return _Markup(_plain("".join(pieces)), tuple(noted["heading"]), tuple(noted["small"]))


_INVISIBLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\\s]+")


def _plain(text: str) -> str:
    """The text on one line, without control characters and what turns its direction."""
    return _INVISIBLE.sub(" ", text).strip()


def _clip(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "\u2026"


# ---------------------------------------------------------------- times

_MONTHS: Final = {
    "jan": 1, "feb": 2, "mar": 3, "apr": 4, "may": 5, "jun": 6,
    "jul": 7, "aug": 8, "sep": 9, "oct": 10, "nov": 11, "dec": 12,
}  # fmt: skip
# Zone names of RFC 822, in hours. Any other name (JST, CET, BST, ...) makes the time unknown instead of wrong.
_ZONES: Final = {
    "UT": 0, "UTC": 0, "GMT": 0, "Z": 0,
    "EST": -5, "EDT": -4, "CST": -6, "CDT": -5, "MST": -7, "MDT": -6, "PST": -8, "PDT": -7,
}  # fmt: skip
_RFC_822: Final = re.compile(
    r"(?:[A-Za-z]{3,9},?\s+)?(\d{1,2})\s+([A-Za-z]{3})[a-z]*\s+(\d{4})\s+(\d{1,2}):(\d{2})(?::(\d{2}))?\s*"
    r"([A-Za-z]{1,5}|[+-]\d{2}:?\d{2})"
)
_SMALL: Final = re.compile(
    r"([A-Za-z]{3})[a-z]*\s+(\d{1,2}),?\s+(?:(\d{4}),?\s+)?(\d{1,2}):(\d{2})(?::\d{2})?\s*([AaPp][Mm])?\s*([A-Z]{1,4})\b"
)


def _raw_time(raw: feedparser.FeedParserDict, *names: str) -> str:
    """The first of the entry's times that is there, as written."""
    for name in names:
        if dict.__contains__(raw, name):  # FeedParserDict would answer `updated` with `published`, and warn
            return str(dict.__getitem__(raw, name))[:100]
    return ""


def _time(text: str) -> datetime | None:
    """The moment that an RFC 3339 or RFC 822 time names; None where its zone is missing or has no sure meaning."""
    try:
        return instant(text.strip())
    except ValueError:
        pass
    parts = _RFC_822.fullmatch(text.strip())
    if parts is None:
        return None
    day, month, year, hour, minute, second, zone = parts.groups()
    offset = _offset(zone)
    if offset is None or month.lower() not in _MONTHS:
        return None
    moment = _moment((int(year), _MONTHS[month.lower()], int(day), int(hour), int(minute)), offset)
    return moment and moment + timedelta(seconds=min(int(second or 0), 59))


def _offset(zone: str) -> timedelta | None:
    if zone[0] in "+-":
        digits = zone[1:].replace(":", "")
        return (1 if zone[0] == "+" else -1) * timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    hours = _ZONES.get(zone.upper())
    return None if hours is None else timedelta(hours=hours)


def _moment(numbers: Sequence[int], offset: timedelta) -> datetime | None:
    """The UTC time of year, month, day, hour and minute in a zone; None where there is no such day."""
    try:
        year, month, day, hour, minute = numbers
        return datetime(year, month, day, hour, minute, tzinfo=timezone(offset)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _earliest(smalls: Sequence[str], updated_at: datetime | None) -> datetime | None:
    """The earliest of the times that stand before an entry's updates; they have no year, the entry's own time has."""
    if updated_at is None:
        return None
    moments = []
    for small in smalls:
        parts = _SMALL.search(_plain(small[:100]))
        offset = _offset(parts[7]) if parts else None
        if parts is None or offset is None or parts[1].lower() not in _MONTHS:
            continue
        hour = int(parts[4]) % 12 + (12 if parts[6].lower() == "pm" else 0) if parts[6] else int(parts[4])
        for year in (int(parts[3]),) if parts[3] else (updated_at.year, updated_at.year - 1):
            moment = _moment((year, _MONTHS[parts[1].lower()], int(parts[2]), hour, int(parts[5])), offset)
            if moment and moment <= updated_at + timedelta(days=1):
                moments.append(moment)
                break
    first = min(moments, default=None)
    return first if first and first <= updated_at + timedelta(minutes=5) else None  # later is a contradiction


def _clamped(moment: datetime | None, now: datetime | None) -> datetime | None:
    return min(moment, now) if moment and now else moment


# ---------------------------------------------------------------- matching

_NEAR: Final = timedelta(hours=12)  # between an event's start and its incident's
_LATER: Final = timedelta(days=3)  # how long after an event's start its incident may have been written
_AHEAD: Final = timedelta(days=60)  # how long before maintenance begins it may have been announced
# Words that say little about which incident it is.
_COMMON_WORDS: Final = """
    a an and are at be by down due during errors error elevated degraded degradation delay delayed delays
    disruption for from has high in incident increased is issue issues latency may not of on or our outage partial
    performance possible problem problems rate rates scheduled maintenance service services slow slower some
    system systems the to unavailable update upgrade users we with customers planned emergency
"""
_COMMON: Final = frozenset(_COMMON_WORDS.split())


def match(data: Mapping[str, Any], products: Sequence[str], feed: Feed) -> Incident | None:
    """The incident that an outage or maintenance event is about; None when in doubt.

    First by the event's `incident` (the incident's code, id or link); else by time together with the title, or with a
    part of the title and the product or component. Two that fit equally well are no match.
    """
    named = data.get("incident")
    if isinstance(named, str) and named.strip():
        found = [incident for incident in feed.incidents if _is_named(incident, named.strip())]
        if found or "://" in named:  # a link to something that the feed does not show is not something else
            return found[0] if len(found) == 1 else None
    title = data.get("title")
    if not isinstance(title, str):
        return None
    kind: Kind = "maintenance" if "starts_at" in data else "incident"
    subjects = [str(name) for name in (*(data.get("components") or ()), *products)]
    scored = [
        (score, incident)
        for incident in feed.incidents
        if incident.kind == kind
        and _fits_in_time(data, incident)
        and (score := _likeness(title, subjects, incident)) > 0
    ]
    best = max((score for score, _ in scored), default=0)
    winners = [incident for score, incident in scored if score == best]
    return winners[0] if len(winners) == 1 else None


def _is_named(incident: Incident, name: str) -> bool:
    if name in (incident.key, incident.id):
        return True
    if incident.url is None or _is_home_page(incident.url):
        return False
    return _normal(name) == _normal(incident.url) or name == _normal(incident.url).rpartition("/")[2]


def _fits_in_time(data: Mapping[str, Any], incident: Incident) -> bool:
    """Whether event and incident can be about the same hours."""
    start, end = _told(data.get("started_at") or data.get("starts_at")), _told(data.get("ends_at"))
    if start is None or incident.updated_at is None:
        return False
    if incident.kind == "maintenance":
        return start - _AHEAD <= incident.updated_at <= (end or start) + _LATER
    if incident.status in OVER and incident.updated_at < start:
        return False
    if incident.started_at is not None:
        return abs(incident.started_at - start) <= _NEAR
    return start - _NEAR <= incident.updated_at <= start + _LATER


def _told(written: object) -> datetime | None:
    try:
        return instant(written) if isinstance(written, str) else None
    except ValueError:
        return None


def _likeness(title: str, subjects: Sequence[str], incident: Incident) -> float:
    """How surely the texts mean the same: 0 not at all, 3 the same title."""
    if _flat(title) == _flat(incident.title):
        return 3
    ours, theirs = _telling(title), _telling(incident.title)
    shared = len(ours & theirs)
    if not shared:
        return 0
    share = shared / len(ours | theirs)
    about = f" {_flat(incident.title)} {_flat(incident.text)} "
    named = any(f" {_flat(subject)} " in about for subject in subjects if _flat(subject))
    if share >= 0.6 and shared >= 2 and (named or not subjects):
        return 1 + share
    return share if named and shared >= 2 and share >= 0.4 else 0


def _flat(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.replace("_", " ").lower()))


def _telling(text: str) -> set[str]:
    return {word for word in _flat(text).split() if word not in _COMMON}


# ---------------------------------------------------------------- as JSON


def _written(moment: object) -> str:
    """A time as RFC 3339 in UTC, to the second where it has no fraction."""
    if not isinstance(moment, datetime):
        raise TypeError(f"{moment!r} cannot be written as JSON")
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _read_time(text: str | None) -> datetime | None:
    return None if text is None else instant(text)


def _incident_from(row: Mapping[str, Any]) -> Incident:
    times = {name: _read_time(row[name]) for name in ("updated_at", "started_at")}
    return Incident(**{**row, **times})
