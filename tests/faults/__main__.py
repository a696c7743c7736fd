"""`make faults` and `make soak`: every fault test, one after the other, and one table at the end.

    python -m tests.faults [NAME...] [--soak] [--list]

A name may be the beginning of several (`kills`, `points`). Ends with 1 where any failed.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

from tests.faults.account import Account, print_table
from tests.faults.stage import Size

MODULES = ("kills", "points", "queues", "databases", "hosts")
"""Where campaigns stand, in the order in which they run."""


def main() -> int:
    """Run, print, judge."""
    options = _options()
    campaigns = {name: run for name, run in _campaigns().items() if _wanted(name, options)}
    if options.list:
        print("\n".join(campaigns))
        return 0
    if not campaigns:
        print(f"no campaign begins with {' or '.join(options.names)}: --list names them", file=sys.stderr)
        return 2
    size = Size(
        soak=options.soak, recipients=options.recipients, kills=options.kills, times=options.times, seed=options.seed
    )
    print(f"seed {size.seed}", flush=True)
    signal.signal(signal.SIGTERM, _interrupt)
    rows: list[tuple[str, Account, float]] = []
    began = time.monotonic()
    try:
        for name, run in campaigns.items():
            rows.append(_played(name, run, size))
    except KeyboardInterrupt:
        print("interrupted: every process that was started has been ended", file=sys.stderr)
        return 130
    finally:
        if rows:
            print(f"\n{len(rows)} campaigns in {(time.monotonic() - began) / 60:.1f} minutes")
            print_table(rows)
    return int(not all(account.passed for _, account, _ in rows))


def _played(name: str, run: Callable[[Size], Account], size: Size) -> tuple[str, Account, float]:
    words = (getattr(run, "func", run).__doc__ or "").split("\n")[0]
    print(f"\n{time.strftime('%H:%M:%S')}  {name}: {words}", flush=True)
    began = time.monotonic()
    try:
        account = run(size)
    except Exception as error:
        traceback.print_exc()
        account = Account()
        account.wrong(f"the campaign itself failed: {error}")
    took = time.monotonic() - began
    account.print()
    return name, account, took


def _campaigns() -> dict[str, Callable[[Size], Account]]:
    found: dict[str, Callable[[Size], Account]] = {}
    for name in MODULES:
        found |= importlib.import_module(f"tests.faults.{name}").CAMPAIGNS
    return found


def _wanted(name: str, options: argparse.Namespace) -> bool:
    if options.configuration and not name.endswith(options.configuration):
        return False
    return not options.names or any(name.startswith(one) for one in options.names)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Fault tests.")
    parser.add_argument("names", nargs="*", help="campaigns, or how their names begin; without any, all")
    parser.add_argument("--soak", action="store_true", help="the large figures (hours)")
    parser.add_argument("--list", action="store_true", help="name the campaigns and end")
    parser.add_argument("--recipients", type=int, default=0, help="mails of a campaign (0: its own figure)")
    parser.add_argument("--kills", type=int, default=0, help="kills of a campaign (0: its own figure)")
    parser.add_argument("--times", type=int, default=0, help="repetitions (0: its own figure)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same moments")
    parser.add_argument("--configuration", choices=("sqlite", "postgresql"), help="only campaigns of it")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
