"""What a run says in plain text: the senders side by side, latency, and the goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.bench import figures
from tests.bench.goals import Goal, Results
from tests.bench.installation import IN_FULL, IN_PARTS, ONE, PIPELINING, POSTGRESQL, REDIS, Run
from tests.bench.latency import Latency
from tests.bench.senders import PEERS
from tests.bench.throughput import Throughput

LABELS: Mapping[str, str] = (
    {"smtp_source": "smtp-source, 8 sessions"}
    | {one.key: one.label for one in (ONE, REDIS, POSTGRESQL, PIPELINING, IN_PARTS, IN_FULL)}
    | {f"{ONE.key}_command": "publish --wait, its start included"}
    | {peer.key: peer.label for peer in PEERS}
)
BUSY = 0.5
#: A load average above which something else runs.


def lines(results: Results, goals: list[Goal], machine: dict[str, Any]) -> Iterator[str]:
    """The whole text, line by line."""
    yield (
        f"{machine['date']}, {machine['cores']} cores of {machine['processor']}, Python {machine['python']}, "
        f"{machine['commit'] or 'no commit'}"
    )
    if machine["load_before"] > BUSY:
        yield f"The machine was busy before this run began (load {machine['load_before']:.1f}): figures are disturbed."
    yield ""
    if results.throughput:
        yield from _senders(results.throughput)
    if results.round_trips:
        yield ""
        yield "A relay that answers after 20 ms, mails a second over the connections that it saw:"
        for name, one in results.round_trips.items():
            label = "aiosmtplib's own dialogue" if name == "aiosmtplib" else f"one process, SQLite; {name.upper()}"
            yield f"  {label:44} {one['rate']:>10,.0f} {one['connections']:>4}"
    if results.latency:
        yield ""
        yield from _latency(results.latency)
    if results.resolution:
        one = results.resolution
        yield ""
        yield (
            f"Resolution alone, one core: {one['contacts_a_second']:,.0f} contacts a second with their reasons "
            f"({one['contacts']:,} contacts, {one['peak_mb']:.0f} MB)"
        )
    yield ""
    yield from _goals(goals)


def _senders(found: Throughput) -> Iterator[str]:
    source = found.median("smtp_source", lambda run: run.rate)
    yield (
        f"{'':42} {'recipients':>10} {'mails/s':>8} {'spread':>6} {': source':>8} {'cpu s/1000':>10} "
        f"{'peak MB':>7} {'of all':>6}"
    )
    for key, label in LABELS.items():
        for size in reversed(found.sizes(key)):
            runs = found.runs[key, size]
            yield _sender(label if size == found.sizes(key)[-1] else "", runs, source)
    for label in found.not_installed:
        yield f"{label:42} not installed"
    yield ""
    yield "Workers run before an event is published; the start of a process is only in the line that says so."
    yield from _counted(found)


def _sender(label: str, runs: list[Run], source: float | None) -> str:
    rates = [run.rate for run in runs]
    peak, peaks = figures.median([run.peak_mb for run in runs]), figures.median([run.peak_sum_mb for run in runs])
    rate = figures.median(rates)
    share = f"{rate / source:.3f}" if source else "-"
    cpu = figures.median([run.running_cpu_of_1000 for run in runs])
    return (
        f"{label:42.42} {runs[0].recipients:>10,} {rate:>8,.0f} {figures.spread(rates):>6.0%} {share:>8} {cpu:>10.3f} "
        f"{peak:>7.0f} {peaks:>6.0f}"
    )


def _counted(found: Throughput) -> Iterator[str]:
    """What the sink counted: one line where all is well, a line for each broadcast where it is not."""
    runs = [run for several in found.runs.values() for run in several]
    bad = [run for run in runs if not run.complete]
    total = sum(run.accepted for run in runs)
    yield f"The sink counted {total:,} mails in {len(runs)} broadcasts; {len(bad)} of them were not as they should be."
    for run in bad:
        yield (
            f"  {LABELS.get(run.name, run.name)}: {run.recipients:,} recipients, {run.accepted:,} mails to "
            f"{run.distinct:,} of them, {'no' if run.ledger is None else f'{run.ledger:,} in the'} ledger"
        )
    parts = found.runs.get((POSTGRESQL.key, max(found.sizes(POSTGRESQL.key), default=0)), [])
    if parts:
        of = {name: figures.median([1000 * run.cpu[name] / run.recipients for run in parts]) for name in parts[0].cpu}
        told = ", ".join(f"{name} {value:.4f}" for name, value in of.items())
        yield f"cpu s/1000 with PostgreSQL: {told} (its start included)"


def _latency(found: Latency) -> Iterator[str]:
    yield f"{'One event to two recipients, milliseconds':50} {'times':>5} {'p50':>9} {'p90':>9} {'p99':>9} {'max':>9}"
    for name, seconds in found.seconds.items():
        cells = [1000 * figures.percentile(seconds, share) for share in (0.5, 0.9, 0.99, 1.0)] if seconds else []
        label = {"floor": "floor: two mails on a warm connection"}.get(name, name.replace("one ", "one process, ", 1))
        label = label.replace("redis ", "Redis, ", 1)
        yield f"  {label:48} {len(seconds):>5} " + " ".join(f"{cell:>9.2f}" for cell in cells)
    if found.idle_cpu_share is not None:
        yield f"  idle workers on Redis, all processes: {100 * found.idle_cpu_share:.1f}% of a core"
    for problem in found.problems:
        yield f"  PROBLEM: {problem}"


def _goals(goals: list[Goal]) -> Iterator[str]:
    yield f"{'':4} {'':66} {'must':>10} {'measured':>10}"
    for goal in goals:
        sign = "<=" if goal.most else ">="
        measured = "-" if goal.measured is None else _figure(goal.measured, goal.unit)
        word = {None: "not measured", True: "reached", False: "MISSED"}[goal.reached]
        yield f"{goal.key:4} {goal.what:66.66} {sign + ' ' + _figure(goal.must, goal.unit):>10} {measured:>10}  {word}"


def _figure(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 20 or not unit else 2 if unit == "x" else 1
    return f"{value:,.{digits}f}" + ("" if unit in {"", "x"} else unit if unit in {"%", "/s"} else f" {unit}")


def as_json(results: Results, goals: list[Goal], machine: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The raw results: every repetition of everything."""
    found = results.throughput
    return {
        "machine": machine,
        "options": options,
        "broadcasts": [run.as_json() for several in found.runs.values() for run in several] if found else [],
        "not_installed": found.not_installed if found else [],
        "latency_seconds": results.latency.seconds if results.latency else {},
        "idle_cpu_share": results.latency.idle_cpu_share if results.latency else None,
        "round_trips": results.round_trips,
        "resolution": results.resolution,
        "goals": [goal.as_json() for goal in goals],
        "labels": dict(LABELS),
    }
