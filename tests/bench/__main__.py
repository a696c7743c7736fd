"""`make bench`: how fast, at what cost and how soon, side by side with what people would use instead, in one run.

Everything runs on loopback and against one counting sink. It prints a table and the goals, and keeps every repetition
in `bench-results/`. It ends with 1 where a broadcast did not reach everybody exactly once; a goal that was missed is
printed, and ends it with 1 only with `--strict`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from tests.bench import chart, latency, machine, resolution, roundtrips, table, throughput, urgent
from tests.bench.goals import Goal, Results, judge
from tests.bench.installation import ONE, REDIS, Servers, make, servers
from tests.bench.stage import folder

PARTS = ("throughput", "roundtrips", "latency", "resolution")
FULL = (*PARTS, "urgent")
BROADCAST = 200_000
#: Recipients of the broadcast in whose middle single events are published, also where larger ones are measured.


def main() -> int:
    """Measure what was asked for, print it, judge it."""
    options = _options()
    if options.from_json:
        chart.write(json.loads(options.from_json.read_text(encoding="utf-8")), options.chart)
        return 0
    facts, began = machine.facts(), time.monotonic()
    parts = options.parts or (FULL if options.full else PARTS)
    console = Console(stderr=True)
    with folder() as place, servers(place) as shared, console.status("starting") as status:

        def tell(text: str) -> None:
            line = f"{time.monotonic() - began:4.0f} s  {text}"
            if console.is_terminal:
                status.update(line)
            else:
                console.print(line, soft_wrap=True)

        results = measure(parts, shared, options, tell)
    goals = judge(results)
    print("\n".join(table.lines(results, goals, facts)))
    raw = table.as_json(results, goals, facts, {name: str(value) for name, value in vars(options).items()})
    raw["seconds"] = round(time.monotonic() - began, 1)
    target = Path("bench-results") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    print(f"\n{raw['seconds']:.0f} s in all; every repetition: {target}")
    if options.chart:
        chart.write(raw, options.chart)
    failed = 0
    if "urgent" in parts:
        most = min(options.recipients, BROADCAST)
        failed = urgent.run(recipients=most, invoices=most // 2, times=100)
    return failed or verdict(results, goals, strict=options.strict)


def measure(parts: tuple[str, ...], shared: Servers, options: argparse.Namespace, tell: throughput.Tell) -> Results:
    """Every part that was asked for, in an order in which none disturbs another."""
    speed = resolution.measure(options.contacts) if "resolution" in parts else None
    found = None
    if "throughput" in parts:
        sizes = throughput.Sizes(options.recipients, tuple(options.sizes), options.peer_mails, options.repetitions)
        found = throughput.measure(shared, sizes, tell)
    homes = found.homes if found else {}
    size = BROADCAST if (ONE.key, BROADCAST) in homes else options.recipients
    needed = [ONE, REDIS] if "latency" in parts else [ONE] if "roundtrips" in parts else []
    for configuration in needed:
        if (configuration.key, size) not in homes:
            tell(f"importing {size:,} recipients: {configuration.label}")
            homes[configuration.key, size] = make(configuration, shared, size)
    trips, soon = None, None
    if "roundtrips" in parts:
        trips = roundtrips.measure(homes[ONE.key, size], options.repetitions, tell, share=options.share)
    if "latency" in parts:
        times = latency.Times(
            floor=max(10, int(300 * options.share)),
            back_to_back=max(10, int(300 * options.share)),
            idle=max(3, int(20 * options.share)),
            idle_cpu_seconds=max(1.0, 5.0 * options.share),
        )
        soon = latency.measure([homes[one.key, size] for one in needed], times, tell)
    return Results(found, soon, trips, speed)


def verdict(results: Results, goals: list[Goal], *, strict: bool) -> int:
    """1 where somebody was missed or mailed twice, or, if `strict`, where any goal was missed."""
    runs = [run for several in results.throughput.runs.values() for run in several] if results.throughput else []
    problems = results.latency.problems if results.latency else []
    if problems or not all(run.complete for run in runs):
        return 1
    return int(strict and any(goal.reached is False for goal in goals))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"some of {', '.join(FULL)}; without: all but the last"
    )
    parser.add_argument("--full", action="store_true", help="what `make bench-full` does: up to 1,000,000, and urgent")
    parser.add_argument("--recipients", type=int, help="of the broadcasts that are compared (200,000)")
    parser.add_argument("--sizes", type=int, nargs="*", help="other sizes that our own broadcasts have (10,000)")
    parser.add_argument("--peer-mails", type=int, default=2_000, help="how many mails a slow peer sends")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--contacts", type=int, default=1_000_000, help="that are resolved in memory")
    parser.add_argument("--share", type=float, default=1.0, help="of the usual times of latency and round trips")
    parser.add_argument("--strict", action="store_true", help="end with 1 where a goal is missed")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the chart there, an SVG")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing, draw the chart of that run")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(FULL):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(FULL)}")
    if options.from_json and not options.chart:
        parser.error("--from-json needs --chart")
    options.parts = tuple(options.parts)
    options.recipients = options.recipients or (1_000_000 if options.full else 200_000)
    if options.sizes is None:
        options.sizes = [1_000, 10_000, 200_000] if options.full else [10_000]
    return options


if __name__ == "__main__":
    sys.exit(main())
