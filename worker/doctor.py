"""Whether an installation is in order: each thing is looked at by itself, and told in one sentence with its remedy.

Nothing is changed: no database is made or migrated, no mail is sent, the feed is read and not kept. No check raises.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from subscriptions.catalogue import CatalogueError, load_catalogues
from subscriptions.database import Database, DatabaseUnusable, system_clock
from worker.settings import CLASSES, PREFIX, RelaySettings, Secret, Settings, Team

Level = Literal["ok", "note", "finding"]

FREE_BYTES = 200 * 1024 * 1024
#: Less free space than this beside a SQLite database is a finding: a million deliveries need about as much.
RELAY_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; a finding is something that a person should change."""

    name: str
    level: Level
    message: str

    def to_json(self) -> dict[str, str]:
        """The check as JSON values."""
        return {"check": self.name, "level": self.level, "message": self.message}


def examine(settings: Settings) -> list[Check]:
    """Look at everything, in the order in which it is needed."""
    looks: tuple[Callable[[Settings], Iterator[Check]], ...] = (
        _python,
        _settings,
        _catalogues,
        _database,
        _broker,
        _relays,
        _senders,
        _operators,
        _links,
        _status_page,
        _templates,
    )
    return [check for look in looks for check in look(settings)]


def mailed_samples() -> dict[str, dict[str, object]]:
    """The sample data of every type that is mailed, by type."""
    from worker.events import TYPES

    categories = next(iter(load_catalogues().values())).vocabulary.categories
    return {name: kind.sample for name, kind in TYPES.items() if categories[kind.category].class_ != "status"}


# ---------------------------------------------------------------- one look for each thing


def _python(_settings: Settings) -> Iterator[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    fixed = {11: (3, 11, 10), 12: (3, 12, 5)}.get(sys.version_info[1])
    if fixed and sys.version_info[:3] < fixed:
        message = f"{found} folds some mail headers wrongly; Rolecast does it by itself, but take {fixed[1]}.{fixed[2]}"
        yield Check("python", "note", message.replace(f"take {fixed[1]}", f"take 3.{fixed[1]}"))
    else:
        yield Check("python", "ok", found)


def _settings(settings: Settings) -> Iterator[Check]:
    places = sorted({source.rpartition(" in ")[2] for source in settings.sources.values() if " in " in source})
    said = f"{len(settings.sources)} set{f', from {places[0]} and the environment' if places else ''}"
    yield Check("settings", "ok", said)
    if settings.delivery != "live":
        yield Check("delivery", "note", f"ROLECAST_DELIVERY is {settings.delivery}: other mail is recorded as held")


def _catalogues(settings: Settings) -> Iterator[Check]:
    try:
        found = load_catalogues(settings.catalogues)
    except CatalogueError as error:
        yield Check("catalogues", "finding", str(error))
    else:
        yield Check("catalogues", "ok", ", ".join(f"{one.key} ({len(one.roles)} roles)" for one in found.values()))


def _database(settings: Settings) -> Iterator[Check]:
    try:
        database = Database(settings.database_url)
        try:
            yield from _opened_database(database, settings)
        finally:
            database.close()
    except DatabaseUnusable as error:
        yield Check("database", "finding", str(error))


def _opened_database(database: Database, settings: Settings) -> Iterator[Check]:
    from worker import app, migrate, restore

    if database.path is not None:
        free = shutil.disk_usage(database.path.parent).free
        if free < FREE_BYTES:
            message = f"only {free // 1_048_576:,} MB are free beside {database.path}: make room"
            yield Check("disk", "finding", message)
        if not database.path.exists():
            yield Check("database", "note", f"there is no {database.path} yet: the first command makes it")
            return
    try:
        migrate.prepare(database, clock=system_clock, migrates=False)
    except migrate.SchemaError as error:
        yield Check("database", "finding", str(error))
        return
    _try_to_write(database)
    try:
        restore.refuse_if_older(database)
    except restore.OlderDatabase as error:  # the workers refuse it; what else there is to tell is told too
        yield Check("database", "finding", str(error))
    else:
        yield Check("database", "ok", f"{database.dialect}, at the code's schema, writable")
    yield from _pauses(database)
    yield from _matters(database, settings)
    try:
        app.require_catalogues(database, load_catalogues(settings.catalogues))
    except CatalogueError as error:
        yield Check("catalogues", "finding", str(error))


def _try_to_write(database: Database) -> None:
    """Write something that changes nothing, and take it back. Raises `DatabaseUnusable`."""
    from worker import ledger

    class _TakenBackError(Exception):
        pass

    with suppress(_TakenBackError), database.write() as connection:
        ledger.raise_guard(connection)
        raise _TakenBackError


def _pauses(database: Database) -> Iterator[Check]:
    from sqlalchemy import select

    from worker.schema import pauses

    with database.read() as connection:
        rows = connection.execute(select(pauses.c.scope, pauses.c.value)).all()
    if rows:
        named = ", ".join(f"{row.scope} {row.value}".strip() for row in rows)
        yield Check("pauses", "note", f"paused: {named}; `rolecast resume` goes on")


def _matters(database: Database, settings: Settings) -> Iterator[Check]:
    """What needs a person now; what is only told along is a note."""
    from worker import standing

    with database.read() as connection:
        found = standing.look(connection, settings, now=database.clock())
    for one in found:
        level: Level = "finding" if one.alone else "note"
        events = f" ({', '.join(one.events)}{f' and {one.more:,} more' if one.more else ''})" if one.events else ""
        yield Check("matters", level, f"{one.title}{events}: {one.what_to_do}")
    if not found:
        yield Check("matters", "ok", "nothing needs a person")


def _broker(settings: Settings) -> Iterator[Check]:
    if settings.broker_url == "memory://":
        yield Check("broker", "ok", "memory://, one process works at a time")
        return
    import redis

    from worker.broker import ping

    place = settings.broker_url.rpartition("@")[2]
    try:
        ping(settings.broker_url)
    except (redis.RedisError, OSError, ValueError) as error:
        message = f"the broker {place} can't be used ({error}): start it, or correct ROLECAST_BROKER_URL"
        yield Check("broker", "finding", message)
    else:
        yield Check("broker", "ok", f"{place} answers")


def _relays(settings: Settings) -> Iterator[Check]:
    if not settings.relay_urls:
        message = "no relay is configured: events are accepted, mail waits until ROLECAST_RELAY_URLS is set"
        yield Check("relay", "finding", message)
    for relay in settings.relay_urls:
        yield asyncio.run(_try_relay(relay, settings))


async def _try_relay(relay: RelaySettings, settings: Settings) -> Check:
    """Connect as the worker does: EHLO, STARTTLS and AUTH as configured; then QUIT."""
    from worker.relay import Relay, RelayError

    host_name = urlsplit(settings.public_url).hostname or "localhost"
    try:
        async with asyncio.timeout(RELAY_SECONDS):
            channel = await Relay(relay, host_name=host_name).connect()
            channel.close()
    except RelayError as error:
        return Check("relay", "finding", str(error))
    except TimeoutError:
        return Check("relay", "finding", f"the relay {relay.name} did not answer within {RELAY_SECONDS:.0f} s")
    await asyncio.sleep(0)
    safe = "TLS from the start" if relay.implicit_tls else f"tls={relay.tls}"
    return Check("relay", "ok", f"{relay.name} takes us ({safe}{', signed in' if relay.user else ''})")


def _senders(settings: Settings) -> Iterator[Check]:
    missing = [name for name in CLASSES if settings.sender_of(name) is None]
    if missing:
        message = f"no sender for {', '.join(missing)}: set ROLECAST_SENDER, until then their mails wait"
        yield Check("sender", "finding", message)
    else:
        yield Check("sender", "ok", str(settings.sender or "one for each class"))


def _operators(settings: Settings) -> Iterator[Check]:
    from worker.notices import recipients

    told = recipients(settings)
    if told:
        yield Check("operators", "ok", f"{len(told)} hear of what needs a person")
    elif not settings.operators:
        message = "ROLECAST_OPERATORS is not set: nobody is mailed about what needs a person"
        yield Check("operators", "note", message)
    elif settings.delivery != "live":
        yield Check("operators", "note", f"no notice is mailed: ROLECAST_DELIVERY is {settings.delivery}")
    else:
        yield Check("operators", "note", "no notice is mailed before ROLECAST_SENDER is set")


def _links(settings: Settings) -> Iterator[Check]:
    if not settings.links_work:
        message = (
            f"ROLECAST_PUBLIC_URL is {settings.public_url}, which is not https: mails that may be opted out of wait, "
            "others go without the preference link"
        )
        yield Check("public_url", "finding", message)
    elif not settings.public_url.startswith("https://"):
        message = f"{settings.public_url} is this machine: good for trying out, real mail needs an https address"
        yield Check("public_url", "note", message)
    else:
        yield Check("public_url", "ok", settings.public_url)
    if settings.secret_keys:
        yield Check("keys", "ok", f"{len(settings.secret_keys)} of them, the first signs")
    elif settings.database_url.startswith("sqlite:"):
        yield Check("keys", "ok", "kept beside the database, made by the first command that needs one")
    else:
        yield Check("keys", "finding", "ROLECAST_SECRET_KEYS is not set, so no link in a mail can be made: set one")


def _status_page(settings: Settings) -> Iterator[Check]:
    from worker.feedclient import FeedError, fetch
    from worker.statuspage import read_feed

    if settings.status_page_url is None:
        message = "ROLECAST_STATUS_PAGE_URL is not set: outages and maintenance are answered without an address"
        yield Check("status_page", "note", message)
    if settings.status_page_feed_url is None:
        return
    try:
        answer = fetch(settings.status_page_feed_url, allow=settings.status_page_feed_allow)
        incidents = len(read_feed(getattr(answer, "body", b"")).incidents)
    except FeedError as error:
        yield Check("status_page", "finding", f"the feed can't be read: {error}")
    else:
        yield Check("status_page", "ok", f"the feed has {incidents} incidents")


def _templates(settings: Settings) -> Iterator[Check]:
    from worker.rendering import Renderer

    samples = mailed_samples()
    findings = Renderer(templates_dir=settings.templates_dir).check(samples)
    for finding in findings:
        yield Check("templates", "finding", f"{finding.template}: {finding.fault}")
    if not findings:
        yield Check("templates", "ok", f"{len(samples)} types render")


# ---------------------------------------------------------------- what is set


def shown_settings(settings: Settings) -> list[tuple[str, str | None, str]]:
    """Every setting: its name in the environment, its value without secrets, and where it came from."""
    return [
        (PREFIX + one.name.upper(), _shown(getattr(settings, one.name)), settings.sources.get(one.name, "default"))
        for one in fields(settings)
        if one.name != "sources"
    ]


def _shown(value: Any) -> str | None:
    match value:
        case None | () | frozenset():
            return ", ".join(sorted(value)) or None if value else None
        case bool():
            return "1" if value else "0"
        case Secret():
            return _without_password(value)
        case Team():
            return ", ".join([*sorted(value.addresses), *(f"@{domain}" for domain in sorted(value.domains))]) or None
        case (str() as host, int() as port):
            return f"{host}:{port}"
        case tuple():
            relays = isinstance(value[0], RelaySettings)
            return " ".join(map(_relay_url, value)) if relays else ",".join(map(_listed, value))
        case Path():
            return str(value)
        case _:
            return str(value)


def _listed(value: object) -> str:
    return "***" if isinstance(value, Secret) else str(value)


def _relay_url(relay: RelaySettings) -> str:
    who = f"{relay.user}:***@" if relay.password is not None else f"{relay.user}@" if relay.user else ""
    scheme = "smtps" if relay.implicit_tls else "smtp"
    tls = "" if relay.implicit_tls else f"tls={relay.tls}&"
    quota = f"&daily={relay.daily}&warmup={relay.warmup}" if relay.daily else ""
    return f"{scheme}://{who}{relay.name}?{tls}connections={relay.connections}&rate={relay.rate:g}{quota}"


def _without_password(url: Secret) -> str:
    head, at, tail = url.rpartition("@")
    if not at:
        return str(url)
    scheme, _, who = head.partition("://")
    return f"{scheme}://{who.partition(':')[0]}:***@{tail}"
