"""`make kills`: SIGKILL at random moments of a broadcast, started again each time: nobody missed, few second copies.

The moment is drawn over the whole run: while events are planned, mails are sent, outcomes are settled. After each kill
`rolecast work --until-idle` goes on. Prints, per kill, how many mails came twice, and ends with 1 where a recipient is
missing or a kill made more second copies than the design's "in flight" (256 mails a worker process).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time

from tests.bench.stage import Sink, Stage, folder

IN_FLIGHT = 256
#: Mails whose bytes may be out and whose outcome is not committed, of one worker process (design, principle 6).


def main() -> int:
    """Kill, go on, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipients", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--delay", type=int, default=1000, help="microseconds before each reply of the sink")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    with folder() as place:
        sink = Sink(place, delay=options.delay)
        try:
            return play(Stage(place, sink, lease_seconds=3), random.Random(seed), options.recipients, options.kills)
        finally:
            sink.stop()


def play(stage: Stage, dice: random.Random, recipients: int, kills: int) -> int:
    """Run the broadcast with its kills; 0 where nobody is missing and second copies stay within the bound."""
    event = stage.fill(recipients)
    moments = sorted(dice.uniform(0.0, 0.95) for _ in range(kills))
    copies = []
    command = ["publish", str(event), "--wait", "--json"]
    for moment in moments:
        before = stage.sink.counts()
        process = stage.start(*command, errors=stage.folder / "killed.log")
        while process.poll() is None and stage.sink.counts()["distinct"] < moment * recipients:
            time.sleep(0.005)
        time.sleep(dice.uniform(0.0, 0.5))
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
        time.sleep(0.2)  # what the kernel still delivers
        after = stage.sink.counts()
        copies.append(after["dup"])
        print(f"killed at {after['distinct']:>7,} of {recipients:,}; second copies so far {after['dup']}", flush=True)
        if before["distinct"] or after["distinct"]:
            command = ["work", "--until-idle"]
    stage.run("publish", str(event), "--wait", "--json")
    counts = stage.sink.counts()
    copies.append(counts["dup"])
    made = [later - earlier for earlier, later in itertools.pairwise(copies)]
    print(f"{recipients - counts['distinct']} missing; second copies after each kill: {made}, {counts['dup']} in all")
    states = json.loads(stage.run("events", "list", "--json").output)
    print(f"states: {[one.get('status') for one in states.get('events', states)]}")
    return int(counts["distinct"] != recipients or max(made, default=0) > IN_FLIGHT)


if __name__ == "__main__":
    sys.exit(main())
