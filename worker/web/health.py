"""What machines ask of an installation: `/healthz`, `/readyz` and `/metrics`.

Everything is read from the ledger's counters and from indexes: no answer costs more because more was sent. No address
and nothing that was published is in them, so they are open to whoever reaches the web side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import redis
from fastapi import APIRouter
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Connection, Select, func, select
from starlette.responses import JSONResponse, PlainTextResponse, Response

from subscriptions.database import DatabaseUnusable
from worker import migrate, standing
from worker.ledger import NEVER, Lane, Status
from worker.schema import deliveries, events, flights, matters, slices, tallies, workers
from worker.standing import Matter
from worker.web.site import Here, Site

router = APIRouter()

QUEUE_SECONDS: Final = 1.0
#: Whoever asks waits about as long; a queue that answers later is no good either.
MOST: Final = 100_000
#: What is counted row by row is counted up to here.


@router.get("/healthz", summary="Whether the process answers")
def healthz() -> dict[str, str]:
    """Says that the web side lives; looks at nothing else."""
    return {"status": "ok"}


# ---------------------------------------------------------------- readiness


@router.get("/readyz", summary="Whether events can be taken")
def readyz(site: Here) -> Response:
    """200 while events can be taken and stored, with what is amiss besides (`degraded`); 503 otherwise."""
    unready, facts = _unready(site), []
    if not unready:
        try:
            facts = _amiss(site)
        except DatabaseUnusable as error:
            unready = [str(error)]
    if site.engine is not None and not site.engine.healthy():
        unready.append("a worker thread of this process has died: restart it")
    status = "unready" if unready else "degraded" if facts else "ready"
    headers = {"Retry-After": "5"} if unready else {}
    return JSONResponse({"status": status, "facts": unready + facts}, 503 if unready else 200, headers)


def _unready(site: Site) -> list[str]:
    """Why no event can be stored."""
    try:
        misfit = migrate.misfit(site.app.database)
    except (DatabaseUnusable, migrate.SchemaError) as error:
        return [str(error)]
    return [misfit] if misfit is not None else []


def _amiss(site: Site) -> list[str]:
    """What keeps mail from leaving, or waits for a person, while events are still taken."""
    settings = site.app.settings
    facts = []
    if not settings.relay_urls:
        facts.append("ROLECAST_RELAY_URLS is not set: events are taken, mail waits")
    if not settings.sender:
        facts.append("ROLECAST_SENDER is not set: mail waits")
    if not settings.links_work:
        facts.append("ROLECAST_PUBLIC_URL is not https: mails that may be opted out of wait")
    shortage = site.app.database.shortage()
    if shortage is not None:
        facts.append(shortage)
    silent = None if settings.broker_url == "memory://" else _queue_is_silent(settings.broker_url)
    if silent is not None:
        facts.append(silent)
    with site.app.database.read() as connection:
        found = standing.look(connection, settings, now=site.app.clock(), quick=True)
        if site.engine is None and not _alive(connection, site):
            facts.append("no worker is at work: start `rolecast work`")
        if settings.status_page_feed_url and (error := site.app.feed.adopt(connection).error):
            facts.append(f"the feed of the status page can't be read: {error}")
    told = {"no_relay", "no_worker", "feed", *(["queue"] if silent else []), *(["disk"] if shortage else [])}
    return facts + [_sentence(one) for one in found if one.alone and one.kind not in told]


def _sentence(matter: Matter) -> str:
    return f"{matter.title}; `rolecast events matters` says what to do"


def _queue_is_silent(url: str) -> str | None:
    """A sentence where the queue does not answer at once; None where it does."""
    client = redis.Redis.from_url(
        url,
        socket_timeout=QUEUE_SECONDS,
        socket_connect_timeout=QUEUE_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        client.ping()
    except (redis.RedisError, OSError, ValueError):
        return f"the queue {url.rpartition('@')[2]} does not answer: events are taken, mail waits for it"
    finally:
        client.close()
    return None


def _alive(connection: Connection, site: Site) -> list[Any]:
    since = site.app.clock() - 2 * site.app.settings.lease_seconds * 1_000_000
    return list(connection.execute(select(workers.c.lanes).where(workers.c.beat_at >= since)).scalars())


# ---------------------------------------------------------------- metrics


@dataclass(slots=True)
class _Metric:
    """One metric: its samples by their labels, which are (name, value) pairs."""

    name: str
    kind: str  # gauge | counter
    told: str
    samples: dict[tuple[tuple[str, str], ...], float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """The metric in Prometheus' text format."""
        yield f"# HELP {self.name} {self.told}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in sorted(self.samples.items()):
            named = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels)
            yield f"{self.name}{{{named}}} {value:.12g}" if named else f"{self.name} {value:.12g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _by(label: str, counts: Mapping[str, float]) -> dict[tuple[tuple[str, str], ...], float]:
    return {((label, value),): count for value, count in counts.items()}


@router.get("/metrics", summary="Counts for Prometheus", response_class=PlainTextResponse)
def metrics(site: Here) -> Response:
    """Events, mails, matters, work that is due, workers and troubles, in Prometheus' text format."""
    with site.app.database.read() as connection:
        found = [*_ledger(connection), *_due(connection, now=site.app.clock()), *_state(connection, site)]
    text = "".join(f"{line}\n" for metric in found for line in metric.lines())
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _ledger(connection: Connection) -> Iterator[_Metric]:
    """What was published, and what became of it: from tallies, never by counting deliveries."""
    rows = connection.execute(select(events.c.status, func.count()).group_by(events.c.status)).all()
    by_event = {status: int(count) for status, count in rows}
    yield _Metric("rolecast_events", "gauge", "Events by status.", _by("status", by_event))
    sums = connection.execute(select(tallies.c.status, func.sum(tallies.c.n)).group_by(tallies.c.status)).all()
    by_delivery = {status.name.lower(): 0 for status in Status}
    by_delivery |= {Status(status).name.lower(): int(count) for status, count in sums}
    yield _Metric("rolecast_deliveries", "gauge", "Mails by status.", _by("status", by_delivery))
    noted = connection.execute(select(matters.c.reason, func.sum(matters.c.n)).group_by(matters.c.reason)).all()
    by_reason = {reason: int(count) for reason, count in noted}
    again = by_reason.pop("sent_again", 0)
    yield _Metric(
        "rolecast_matters_total", "counter", "What a person may have to look at, as it happened, by reason.",
        _by("reason", by_reason),
    )  # fmt: skip
    yield _Metric(
        "rolecast_unknown_outcomes_sent_again_total", "counter",
        "Mails whose answer was lost and that were sent again: at most so many second copies.", {(): again},
    )  # fmt: skip


def _due(connection: Connection, *, now: int) -> Iterator[_Metric]:
    """What is owed now, and for how long."""
    due = [slices.c.done_at.is_(None), slices.c.due_at <= now]
    waiting = {
        lane.name.lower(): _up_to_most(connection, select(slices.c.id).where(slices.c.lane == int(lane), *due))
        for lane in Lane
    }
    yield _Metric("rolecast_slices_due", "gauge", f"Slices that are due, up to {MOST}.", _by("lane", waiting))
    oldest = standing.oldest_due(connection, now=now)
    ages = {lane.name.lower(): _seconds(now, oldest.get(lane)) for lane in Lane}
    yield _Metric(
        "rolecast_slice_due_age_seconds", "gauge", "For how long the oldest due slice has been due.", _by("lane", ages)
    )
    later = [deliveries.c.due_at.is_not(None), deliveries.c.due_at < NEVER]
    deferred = _up_to_most(connection, select(deliveries.c.due_at).where(*later))
    yield _Metric("rolecast_deferred", "gauge", f"Mails that are tried again later, up to {MOST}.", {(): deferred})
    first = connection.execute(select(func.min(deliveries.c.due_at)).where(*later, deliveries.c.due_at <= now)).scalar()
    yield _Metric(
        "rolecast_deferred_due_age_seconds", "gauge", "For how long the oldest of them has been due.",
        {(): _seconds(now, first)},
    )  # fmt: skip


def _up_to_most(connection: Connection, query: Select[Any]) -> int:
    page = query.limit(MOST).subquery()
    return int(connection.execute(select(func.count()).select_from(page)).scalar_one())


def _seconds(now: int, then: int | None) -> float:
    return 0.0 if then is None else max(0, now - then) / 1_000_000


def _state(connection: Connection, site: Site) -> Iterator[_Metric]:
    """Who works, what hinders, and what waits for a person."""
    now = site.app.clock()
    served = Counter(lane for lanes in _alive(connection, site) for lane in (lanes.split(",") if lanes else ["none"]))
    by_lane = {lane.name.lower(): 0 for lane in Lane} | served
    yield _Metric("rolecast_workers", "gauge", "Living worker processes by the lanes they serve.", _by("lane", by_lane))
    in_flight = connection.execute(select(func.count()).select_from(flights)).scalar_one()
    yield _Metric("rolecast_flights_open", "gauge", "Flights whose outcomes are not all recorded.", {(): in_flight})
    found = standing.look(connection, site.app.settings, now=now)
    yield _Metric(
        "rolecast_troubles", "gauge", "What hinders a living worker, by kind.", _by("kind", _troubles(found))
    )  # fmt: skip
    waiting: Counter[str] = Counter()
    for one in found:
        if one.alone and one.kind not in standing.TROUBLES:
            waiting[one.kind] += one.count
    yield _Metric("rolecast_needs_person", "gauge", "What needs a person now, by kind.", _by("kind", waiting))
    overdue = sum(one.overdue for one in found)
    yield _Metric(
        "rolecast_unknown_outcomes_overdue", "gauge", "Mails with unknown outcome that were held for more than a day.",
        {(): overdue},
    )  # fmt: skip
    if site.app.settings.status_page_feed_url:
        read_at = site.app.feed.adopt(connection).succeeded_at
        if read_at is not None:
            age = now / 1_000_000 - read_at.timestamp()
            told = "How long ago the status page's feed was last read well."
            yield _Metric("rolecast_feed_age_seconds", "gauge", told, {(): max(0.0, age)})


def _troubles(found: Iterable[Matter]) -> dict[str, int]:
    counts = Counter(one.kind for one in found if one.kind in standing.TROUBLES)
    return {kind: counts[kind] for kind in standing.TROUBLES}
