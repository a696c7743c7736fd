"""One broadcast through a counting sink on loopback: how fast, how much memory, and is nobody missed?

Runs `rolecast publish --wait` for a small audience and a large one, prints a table, and writes `bench-results/`.
Ends with 1 where a recipient is missing or got two mails, or where memory grew with the audience.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.stage import Sink, Stage, folder

GROWTH_MB = 40.0
#: How much more memory the large audience may take than the small one (the issue's figure).


def measure(recipients: int, *, delay: int = 0) -> dict[str, Any]:
    """Publish one broadcast to so many recipients and count what arrived."""
    with folder() as place:
        sink = Sink(place, delay=delay)
        try:
            stage = Stage(place, sink)
            event = stage.fill(recipients)
            ran = stage.run("publish", str(event), "--wait", "--json")
            counts = sink.counts()
        finally:
            sink.stop()
    totals = json.loads(ran.output)["totals"]
    return {
        "recipients": recipients,
        "accepted_by_the_sink": counts["accepted"],
        "distinct": counts["distinct"],
        "ledger": totals,
        "seconds": round(ran.seconds, 2),
        "mails_a_second": round(recipients / ran.seconds, 1),
        "mails_a_second_while_sending": round(recipients / max(counts["last"] - counts["first"], 1e-9), 1),
        "cpu_seconds_per_1000": round(1000 * ran.cpu_seconds / recipients, 3),
        "peak_mb": round(ran.peak_mb, 1),
    }


def run(*, recipients: int, small: int) -> int:
    """Measure, print, judge; 0 where nobody is missing and memory stayed flat."""
    results = [measure(small), measure(recipients)]
    heads = ("recipients", "mails/s", "sending", "cpu s/1000", "peak MB", "accepted", "distinct")
    print(" ".join(head.rjust(11) for head in heads))
    for one in results:
        cells = (
            f"{one['recipients']:,}",
            f"{one['mails_a_second']:,.0f}",
            f"{one['mails_a_second_while_sending']:,.0f}",
            f"{one['cpu_seconds_per_1000']:.3f}",
            f"{one['peak_mb']:.1f}",
            f"{one['accepted_by_the_sink']:,}",
            f"{one['distinct']:,}",
        )
        print(" ".join(cell.rjust(11) for cell in cells))
    target = Path("bench-results") / f"broadcast-{time.strftime('%Y%m%d-%H%M%S')}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    faults = [
        f"{one['recipients']} recipients: {one['accepted_by_the_sink']} mails to {one['distinct']} of them"
        for one in results
        if not one["recipients"] == one["accepted_by_the_sink"] == one["distinct"] == one["ledger"].get("accepted")
    ]
    grown = results[1]["peak_mb"] - results[0]["peak_mb"]
    print(f"memory grew by {grown:.1f} MB from {small:,} to {recipients:,} recipients; raw: {target}")
    if grown > GROWTH_MB:
        faults.append(f"memory grew by {grown:.1f} MB")
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0
