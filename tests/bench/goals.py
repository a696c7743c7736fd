"""The goals: what must be reached, what was measured, and whether it was. Every ratio comes out of one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.bench.figures import ratio
from tests.bench.latency import Latency
from tests.bench.throughput import Throughput

FLAT_FROM = 10_000
#: Recipients of the broadcast that the largest is compared with.


@dataclass(frozen=True, slots=True)
class Goal:
    """One line: `measured` is None where it was not measured; `most` says that less is better."""

    key: str
    what: str
    must: float
    goal: float | None
    measured: float | None
    unit: str = "x"
    most: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the must is reached; None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured <= self.must if self.most else self.measured >= self.must

    def as_json(self) -> dict[str, Any]:
        """For the raw results."""
        return {"key": self.key, "what": self.what, "must": self.must, "goal": self.goal, "measured": self.measured,
                "unit": self.unit, "at_most": self.most, "reached": self.reached}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that a run has measured; None where a part was left out."""

    throughput: Throughput | None = None
    latency: Latency | None = None
    round_trips: dict[str, dict[str, Any]] | None = None
    resolution: dict[str, Any] | None = None


def judge(results: Results) -> list[Goal]:
    """Every goal in its order."""
    found = list(_throughput(results.throughput or Throughput()))
    found += _round_trips(results.round_trips or {})
    found += _latency(results.latency or Latency())
    found += _counted(results.throughput)
    speed = results.resolution["contacts_a_second"] if results.resolution else None
    found.append(Goal("V", "contacts resolved a second, with reasons, one core", 300_000, None, speed, "/s"))
    return found


def _throughput(found: Throughput) -> Iterator[Goal]:
    def rate(name: str) -> float | None:
        return found.median(name, lambda run: run.rate)

    source = rate("smtp_source")
    yield Goal("G1", "Redis, 2 workers, SQLite : smtp-source", 1.0, 2.0, ratio(rate("redis"), source))
    yield Goal("G1", "one process, SQLite : smtp-source", 0.7, 1.0, ratio(rate("one"), source))
    yield Goal("G2", "a template that computes in a block : smtp-source", 0.35, 0.5, ratio(rate("in_parts"), source))
    yield Goal("G2", "one that computes outside of all : smtp-source", 0.35, 0.5, ratio(rate("in_full"), source))
    yield Goal("G3", "CHUNKING : PIPELINING alone", 1.5, None, ratio(rate("redis"), rate("pipelining")))
    yield Goal("G4", "mails/s : plain dramatiq", 60, 100, ratio(rate("redis"), rate("dramatiq")))
    if rate("celery") is not None:
        yield Goal("G4", "mails/s : Celery", 60, 100, ratio(rate("redis"), rate("celery")))
    cpu = found.median("redis", lambda run: run.running_cpu_of_1000)
    peer_cpu = found.median("dramatiq", lambda run: run.running_cpu_of_1000)
    yield Goal("G5", "plain dramatiq : ours, processor seconds per mail", 60, 100, ratio(peer_cpu, cpu))
    for name, label in (("one", "one process"), ("redis", "Redis, SQLite"), ("postgresql", "Redis, PostgreSQL")):
        yield from _flat(found, name, label)
    yield Goal("G7", "PostgreSQL : SQLite, mails/s", 0.6, 0.8, ratio(rate("postgresql"), rate("redis")))
    small, large = _two_sizes(found, "postgresql")
    if small is not None:
        server = [
            found.median("postgresql", lambda run: run.cpu["database"] / run.recipients, n) for n in (small, large)
        ]
        what = f"PostgreSQL's own processor per mail, {large:,} : {small:,}"
        yield Goal("G7", what, 1.15, 1.05, ratio(server[1], server[0]), most=True)


def _flat(found: Throughput, name: str, label: str) -> Iterator[Goal]:
    small, large = _two_sizes(found, name)
    if small is None or large is None:
        return
    cpu = [found.median(name, lambda run: run.running_cpu_of_1000, size) for size in (small, large)]
    peak = [found.median(name, lambda run: run.peak_mb, size) or 0.0 for size in (small, large)]
    sizes = f"{large:,} : {small:,}"
    yield Goal("G6", f"processor per mail, {sizes}, {label}", 1.15, 1.05, ratio(cpu[1], cpu[0]), most=True)
    yield Goal("G6", f"more memory, {sizes}, {label}", 30, 10, peak[1] - peak[0], "MB", most=True)


def _two_sizes(found: Throughput, name: str) -> tuple[int | None, int | None]:
    """10,000 (or the size next to it) and the largest; None where there is one size only."""
    sizes = found.sizes(name)
    if len(sizes) < 2:
        return None, None
    return min(sizes[:-1], key=lambda size: abs(size - FLAT_FROM)), sizes[-1]


def _round_trips(found: dict[str, dict[str, Any]]) -> list[Goal]:
    rates = {name: one["rate"] for name, one in found.items()}
    base = rates.get("aiosmtplib")
    return [
        Goal("G8", "20 ms replies: PIPELINING : aiosmtplib", 3.5, None, ratio(rates.get("pipelining"), base)),
        Goal("G8", "20 ms replies: CHUNKING : aiosmtplib", 3.5, 15, ratio(rates.get("chunking"), base)),
    ]


def _latency(found: Latency) -> list[Goal]:
    def of(name: str, share: float = 0.5) -> float | None:
        return found.percentile(name, share)

    def milliseconds(name: str) -> float | None:
        seconds = of(name)
        return None if seconds is None else 1000 * seconds

    def percent(share: float | None) -> float | None:
        return None if share is None else 100 * share

    most = {"most": True}
    lines = [
        Goal("G9", "one event back to back, p50 : floor", 3, 2, ratio(of("one back to back"), of("floor")), **most),
        Goal("G10", "one event after idling, Redis, p50", 60, 15, milliseconds("redis idle"), "ms", **most),
        Goal("G10", "idle workers, of a core", 5, None, percent(found.idle_cpu_share), "%", **most),
    ]
    for name, label in (("one", "one process"), ("redis", "Redis")):
        load, hangs = f"{name} under load", f"{name} under load, relay hangs"
        lines.append(
            Goal(
                "G11", f"during a broadcast, {label}, p50 : idle", 10, None, ratio(of(load), of(f"{name} idle")), **most
            )
        )
        lines.append(
            Goal("G11", f"during a broadcast, relay hangs, {label}, p50", 2000, None, milliseconds(hangs), "ms", **most)
        )
    return lines


def _counted(found: Throughput | None) -> list[Goal]:
    if found is None or not found.runs:
        return []
    runs = [run for several in found.runs.values() for run in several]
    whole = sum(run.complete for run in runs)
    return [Goal("G12", f"of {len(runs)} broadcasts: sink = ledger = recipients", len(runs), None, whole, "")]
