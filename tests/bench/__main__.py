"""`make bench`: the broadcast (`tests.bench.broadcast`), then urgent mail under load (`tests.bench.urgent`)."""

from __future__ import annotations

import argparse
import sys

from tests.bench import broadcast, urgent

PARTS = ("broadcast", "urgent")


def main() -> int:
    """Run what was asked for; 0 where every part says that its figures mean something."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; without: all")
    parser.add_argument("--recipients", type=int, default=200_000, help="of a broadcast")
    parser.add_argument("--small", type=int, default=10_000, help="of the broadcast that memory is compared with")
    parser.add_argument("--invoices", type=int, default=100_000, help="single events as a load")
    parser.add_argument("--times", type=int, default=100, help="file failures for each load")
    parser.add_argument("--configuration", choices=urgent.CONFIGURATIONS, action="append", help="of urgent")
    options = parser.parse_args()
    parts = tuple(options.parts) or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    failed = 0
    if "broadcast" in parts:
        failed |= broadcast.run(recipients=options.recipients, small=options.small)
    if "urgent" in parts:
        failed |= urgent.run(
            recipients=options.recipients,
            invoices=options.invoices,
            times=options.times,
            configurations=tuple(options.configuration or urgent.CONFIGURATIONS),
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
