"""The demonstration: one process, fresh data, sample events of every type, and an inbox that catches every mail.

Nothing leaves the machine: the settings are made here, the only relay is the local inbox, and neither `ROLECAST_*` nor
`rolecast.toml` is read. It owns a folder, `./data/demo` unless another is named, and makes the files in it anew on each
run. `worker/sample` holds what it shows: a directory, the events, and the feed of a status page, all written for one
day; every date in them is moved so that this day is yesterday.
"""

from __future__ import annotations

import logging
import re
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from json import dumps
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from sqlalchemy import Connection

from subscriptions import directory, transfer
from subscriptions.database import Database
from worker import events, history, keys, logs
from worker.app import App, Engine, open_app
from worker.commands.console import progress
from worker.events import TYPES, Event
from worker.intake import Publisher
from worker.links import contact_identity
from worker.lock import WorkLock
from worker.settings import RelaySettings, Secret, Settings
from worker.web.inbox import Inbox

SAMPLE: Final = Path(__file__).with_name("sample")
SAMPLE_DAY: Final = date(2026, 11, 20)
#: The day on which the sample's events happen.
FOLDER: Final = Path("data/demo")
FILES: Final = ("rolecast.db*", "inbox.db*", "feed.atom")
#: What a demonstration leaves in its folder, and the next one removes.
PORT: Final = 8080
WORK_SECONDS: Final = 120.0
#: The sample is a hundred mails: whatever takes longer than this hangs.

SENDER: Final = "Larkspur Systems <notify@larkspur.example>"
STATUS_PAGE: Final = "https://status.larkspur.example"
OWN_PAGE: Final = ("acme", "ada")
#: The contact whose preference page is shown.


@dataclass(slots=True)
class TypeSummary:
    """What became of the events of one type. Contacts are counted once for each account and event."""

    type: str
    category: str
    events: int = 0
    accounts: set[str] = field(default_factory=set)
    mails: int = 0  # accepted by the inbox
    kinds: Counter[str] = field(default_factory=Counter)  # mails that are not plain ones: copy, fallback, ...
    merged: int = 0  # further reasons for a mail that somebody gets once, as a contact of several accounts
    status_page: str | None = None  # the link that answered, where nothing is mailed
    skipped: Counter[str] = field(default_factory=Counter)  # contacts without a mail, by reason
    nobody: set[str] = field(default_factory=set)  # accounts where nobody was left to write to
    refused: int = 0  # accounts whose catalogue does not have the category
    open: Counter[str] = field(default_factory=Counter)  # deliveries that are neither accepted nor withdrawn, by status


@dataclass(frozen=True, slots=True)
class Summary:
    """What the whole demonstration did."""

    accounts: int
    contacts: int
    types: tuple[TypeSummary, ...]
    caught: int  # mails in the inbox
    seconds: float

    @property
    def mails(self) -> int:
        """Mails that the ledger says were accepted."""
        return sum(row.mails for row in self.types)

    @property
    def unfinished(self) -> Counter[str]:
        """Deliveries that should have been accepted and were not, by status."""
        return sum((row.open for row in self.types), Counter())

    @property
    def complete(self) -> bool:
        """Whether every type was published, and every mail owed lies in the inbox, once."""
        return {row.type for row in self.types} == set(TYPES) and not self.unfinished and self.caught == self.mails


def run(*, once: bool, folder: Path | None, json: bool) -> int:
    """Show everything; with `once` end after the summary instead of serving the pages. Returns the exit code.

    0 where every mail that should have been caught was caught, else 1. Settings of the environment have no effect.
    """
    logs.configure(None, level=logging.WARNING)
    with _fresh(folder) as place, _inbox(place) as (inbox, relay):
        settings = _settings(place, relay)
        with open_app(settings) as app:
            _import_directory(app)
            app.feed.refresh()
            with _working(app) as engine:
                summary = _publish_all(app, engine, inbox)
                _show(app, summary, place, once=once, json=json)
                if not once:
                    from worker.web import server

                    server.run(app, engine=engine, inbox=inbox, demo=True)
    return 0 if summary.complete else 1


# ---------------------------------------------------------------- what it runs on


@contextmanager
def _fresh(folder: Path | None) -> Iterator[Path]:
    """An empty folder of the demonstration's own; a temporary one where the usual one is in use or can't be written."""
    place = (folder or FOLDER).absolute()
    temporary: Path | None = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        usable = _empty(place)
    except OSError:
        usable = False
    if not usable:
        place = temporary = Path(tempfile.mkdtemp(prefix="rolecast-demo-"))
    try:
        yield place
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _empty(place: Path) -> bool:
    """Remove what an earlier demonstration left; False, and nothing is touched, where one still runs."""
    path = place / "rolecast.db"
    if path.exists():
        database = Database(f"sqlite:///{path}")
        lock = WorkLock(database)
        free = lock.take()
        lock.free()
        database.close()
        if not free:
            return False
    for pattern in FILES:
        for file in place.glob(pattern):
            file.unlink()
    return True


@contextmanager
def _inbox(place: Path) -> Iterator[tuple[Inbox, RelaySettings]]:
    """The local inbox, running, and the relay that leads there."""
    inbox = Inbox(place)
    host, port = inbox.start()
    try:
        yield inbox, RelaySettings(host, port, False, "none", None, None, connections=8, rate=0.0)
    finally:
        inbox.stop()


def _settings(place: Path, relay: RelaySettings) -> Settings:
    """Settings that can't send anywhere but to the inbox."""
    port = _free_port()
    feed = place / "feed.atom"
    feed.write_text(_moved((SAMPLE / "feed.atom").read_text(encoding="utf-8")), encoding="utf-8")
    return Settings(
        database_url=Secret(f"sqlite:///{place / 'rolecast.db'}"),
        relay_urls=(relay,),
        sender=SENDER,
        reply_to="Larkspur Support <support@larkspur.example>",
        public_url=f"http://127.0.0.1:{port}",
        listen=("127.0.0.1", port),
        status_page_url=STATUS_PAGE,
        status_page_feed_url=feed.as_uri(),
        status_page_feed_allow=frozenset({"file"}),
    )


def _free_port() -> int:
    """8080, or a free one where that is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _working(app: App) -> Iterator[Engine]:
    engine = Engine(app)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


# ---------------------------------------------------------------- the sample


def sample_events(today: date) -> list[Event]:
    """The sample's events, as if they had happened on the day before `today`."""
    text = _moved((SAMPLE / "events.json").read_text(encoding="utf-8"), today)
    return events.parse_batch(events.parse_json(text.encode()))


def _moved(text: str, today: date | None = None) -> str:
    """The text with every date in it moved by as many days as lie between the sample's day and yesterday."""
    days = (today or datetime.now(UTC).date()) - timedelta(days=1) - SAMPLE_DAY
    return re.sub(r"(?<![\w-])\d{4}-\d\d-\d\d(?![\d-])", lambda found: str(date.fromisoformat(found[0]) + days), text)


def _import_directory(app: App) -> None:
    with (
        (SAMPLE / "directory.json").open("rb") as stream,
        transfer.checked(stream, catalogues=app.catalogues, name="directory.json") as document,
    ):
        transfer.run_import(app.database, document, catalogues=app.catalogues, now=app.clock())


def _publish_all(app: App, engine: Engine, inbox: Inbox) -> Summary:
    """Publish every sample event, wait until nothing of them is due, and sum up."""
    begun = time.monotonic()
    accepted = app.intake.accept(sample_events(datetime.now(UTC).date()), Publisher(name="demo"))
    with progress("Mails caught by the local inbox") as told:
        engine.until_idle(seconds=WORK_SECONDS, look=lambda: told(inbox.count(), _owed(app)))
    seconds = time.monotonic() - begun
    with app.database.read() as connection:
        types = [_summed(connection, answer.event) for answer in accepted]
        people = directory.facts(connection, app.catalogues)
    return Summary(
        accounts=len(people),
        contacts=sum(len(account.contacts) for account in people),
        types=tuple(_by_type(types)),
        caught=inbox.count(),
        seconds=seconds,
    )


def _owed(app: App) -> int:
    with app.database.read() as connection:
        return sum(sum(event["totals"].values()) for event in history.list_events(connection, limit=1000))


# ---------------------------------------------------------------- the summary


def _summed(connection: Connection, ulid: str) -> TypeSummary:
    """What became of one event."""
    event = history.find_event(connection, ulid)
    assert event is not None
    state = history.event_state(connection, event)
    row = TypeSummary(event.type, event.category, events=1)
    row.mails = state["totals"].get("accepted", 0)
    row.open.update({name: n for name, n in state["totals"].items() if name not in {"accepted", "cancelled"}})
    if state["status_page"]:
        incident = state["status_page"]["incident"]
        row.status_page = incident["url"] if incident else state["status_page"]["url"]
        return row
    after: int | None = 0
    while after is not None:
        answers, after = history.list_verdicts(connection, event, after=after)
        for answer in answers:
            _add(row, answer)
            row.merged += len(answer["recipients"])
    row.merged -= sum(state["totals"].values())
    return row


def _add(row: TypeSummary, answer: Mapping[str, Any]) -> None:
    """Add one account's answer."""
    row.accounts.add(answer["account"])
    if answer["outcome"] == "rejected":
        row.refused += 1
        return
    if answer["reason"] == "no_reachable_recipient":
        row.nobody.add(answer["account"])
    for recipient in answer["recipients"]:
        reasons = {matched["reason"] for matched in recipient["matched"]}
        if recipient["delivery"] != "email":
            row.kinds[recipient["delivery"]] += 1
        elif "role_matched" not in reasons:
            row.kinds["copy" if "copy" in reasons else "fallback"] += 1
    for contact in answer["excluded"]:
        row.skipped[_telling([dropped["reason"] for dropped in contact["dropped"]])] += 1


def _telling(reasons: Sequence[str]) -> str:
    """The reason that says most of several."""
    return next((reason for reason in reasons if reason != "no_role_match"), "no_role_match")


def _by_type(rows: Sequence[TypeSummary]) -> Iterator[TypeSummary]:
    """One row a type, in the order of the registry."""
    for name in TYPES:
        same = [row for row in rows if row.type == name]
        if not same:
            continue
        whole = TypeSummary(name, TYPES[name].category)
        for row in same:
            whole.events += row.events
            whole.accounts |= row.accounts
            whole.mails += row.mails
            whole.kinds += row.kinds
            whole.merged += row.merged
            whole.status_page = row.status_page or whole.status_page
            whole.skipped += row.skipped
            whole.nobody |= row.nobody
            whole.refused += row.refused
            whole.open += row.open
        yield whole


def _show(app: App, summary: Summary, place: Path, *, once: bool, json: bool) -> None:
    """Write the summary, and where the pages are where they are served."""
    pages = {} if once else _pages(app, place)
    if json:
        sys.stdout.write(dumps({**_as_json(summary), "pages": pages}, ensure_ascii=False, indent=2) + "\n")
    else:
        _print_table(summary.types)
        sys.stdout.write("\n" + "\n".join([*_sentences(summary), *_page_lines(pages)]) + "\n")
    sys.stdout.flush()


def _as_json(summary: Summary) -> dict[str, Any]:
    return {
        "accounts": summary.accounts,
        "contacts": summary.contacts,
        "mails": summary.mails,
        "caught": summary.caught,
        "unfinished": dict(summary.unfinished),
        "complete": summary.complete,
        "types": [
            {
                "type": row.type,
                "category": row.category,
                "events": row.events,
                "accounts": sorted(row.accounts),
                "mails": row.mails,
                "kinds": dict(row.kinds),
                "merged": row.merged,
                "status_page": row.status_page,
                "skipped": dict(row.skipped),
                "nobody": sorted(row.nobody),
                "refused": row.refused,
            }
            for row in summary.types
        ],
    }


def _print_table(rows: Sequence[TypeSummary]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)
    wide = console.width >= 120
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Event type", no_wrap=True)
    if wide:
        table.add_column("Category", no_wrap=True)
    table.add_column("Audience", no_wrap=wide)
    table.add_column("Mails", justify="right")
    table.add_column("No role", justify="right", no_wrap=True)
    table.add_column("Notes")
    for row in rows:
        others = str(row.skipped["no_role_match"] or "")
        cells = [row.type, row.category, _audience(row), str(row.mails), others, _notes(row)]
        table.add_row(*cells if wide else [cells[0], *cells[2:]])
    console.print(table)


def _audience(row: TypeSummary) -> str:
    if row.status_page is not None:
        return "everybody"
    names = sorted(row.accounts)
    return ", ".join(names) if len(names) < 3 else f"{len(names)} accounts"


_KINDS: Final = {
    "copy": ("a copy", "copies"),
    "fallback": ("as a fallback", "as fallbacks"),
    "esign_request": ("to sign", "to sign"),
    "approval_request": ("to approve", "to approve"),
    "contact_list": ("with the contact list", "with the contact list"),
}
_REASONS: Final = {
    "opted_out": "opted out",
    "product_not_selected": "for other products only",
    "product_not_on_account": "without the product",
    "address_suppressed": "suppressed",
    "rejected_by_cardinality": "beyond the role's limit",
    "fallback_not_needed": "not needed as fallback",
    "duplicate_address": "same mailbox again",
}


def _notes(row: TypeSummary) -> str:
    """What the numbers of a row don't tell: which mails are special, and why contacts who hold a role got none."""
    if row.status_page is not None:
        return f"status page {urlsplit(row.status_page).path}"
    notes = [f"{count} {_KINDS[kind][count > 1]}" for kind, count in row.kinds.items()]
    notes += [f"{row.merged} for two accounts"] if row.merged else []
    notes += [f"{row.skipped[reason]} {words}" for reason, words in _REASONS.items() if row.skipped[reason]]
    notes += [f"nobody at {' and '.join(sorted(row.nobody))}"] if row.nobody else []
    notes += [f"{row.refused} accounts without the category"] if row.refused else []
    notes += [f"{count} {status.upper()}" for status, count in row.open.items()]
    return ", ".join(notes)


def _sentences(summary: Summary) -> list[str]:
    pointed = sum(row.events for row in summary.types if row.status_page is not None)
    published = sum(row.events for row in summary.types)
    work = (
        f"{published} events of {len(summary.types)} types for {summary.accounts} accounts with {summary.contacts} "
        f"contacts: {summary.mails} mails in {summary.seconds:.1f} seconds, all caught by the local inbox."
    )
    if not summary.complete:
        left = ", ".join(f"{count} {status}" for status, count in summary.unfinished.items()) or "none left open"
        work = f"NOT COMPLETE: {summary.mails} mails accepted, {summary.caught} caught, {left}."
    return [work, f"{pointed} events were pointed to the status page and mailed to nobody: outages and maintenance."]


def _pages(app: App, place: Path) -> dict[str, str]:
    """Where there is something to see, and what a publisher needs."""
    base = app.settings.public_url
    account, contact = OWN_PAGE
    with app.database.write() as connection:
        found = directory.account(connection, app.catalogues, account)
        assert found is not None
        number = next(one.number for one in found.contacts if one.id == contact)
        _, key = keys.create(
            connection, name="demo", mode="live", scopes=["publish:*", "read"], types=TYPES, now=app.clock()
        )
    assert app.links is not None
    shown = place
    with suppress(ValueError):
        shown = place.relative_to(Path.cwd())
    return {
        "events": f"{base}/events",
        "inbox": f"{base}/inbox",
        "preferences": app.links.preferences(number, contact_identity(account, contact)),
        "key": key,
        "database": f"sqlite:///{shown / 'rolecast.db'}",
    }


def _page_lines(pages: Mapping[str, str]) -> list[str]:
    if not pages:
        return ["Nothing left this machine."]
    return [
        "",
        f"Inbox        {pages['inbox']:<32} every mail that would have gone out",
        f"Events       {pages['events']:<32} who got what and why, and why others did not",
        f"Preferences  {pages['preferences']}",
        f"API key      {pages['key']}",
        f"Database     {pages['database']}",
        "",
        "Nothing leaves this machine: whatever you publish ends in the inbox. Ctrl-C stops it.",
    ]
