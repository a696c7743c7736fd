"""A relay that is 20 ms away: how many mails a second over eight connections, by aiosmtplib's own dialogue and by ours.

Every reply of the sink comes 20 ms after what it answers. Ours is `rolecast work` with a broadcast, once where the
relay offers PIPELINING alone and once with CHUNKING; rates are between the first and the last mail that was accepted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tests.bench import figures
from tests.bench.installation import PROJECT, Installation
from tests.bench.stage import Sink

DELAY_MICROSECONDS = 20_000
SECONDS = 4.0
#: How long aiosmtplib sends.
ACCOUNTS = {"pipelining": 1_024, "chunking": 2_500}
#: To how many accounts we send: at least a slice for each connection.
CONNECTIONS = 10
#: Of ours: eight for a broadcast, and one that is kept free for each other lane.
WARM_UP_ACCOUNTS = 50
Tell = Callable[[str], None]


def measure(home: Installation, repetitions: int, tell: Tell, *, share: float = 1.0) -> dict[str, dict[str, Any]]:
    """Mails a second by dialogue, with all repetitions; `share` makes everything shorter."""
    rates: dict[str, list[float]] = {"aiosmtplib": [], "pipelining": [], "chunking": []}
    sessions = {}
    sinks = {name: Sink(home.folder, delay=DELAY_MICROSECONDS, chunking=name == "chunking") for name in ACCOUNTS}
    usual = home.sink, home.connections
    home.connections = CONNECTIONS
    try:
        for repetition in range(repetitions):
            tell(f"20 ms to the relay: repetition {repetition + 1} of {repetitions}")
            sinks["pipelining"].reset()
            aiosmtplib_loop(sinks["pipelining"], SECONDS * share)
            rates["aiosmtplib"].append(_rate(sinks["pipelining"]))
            for name, sink in sinks.items():
                home.sink = sink
                most = home.recipients // 4
                with home.at_work(warm_up_accounts=WARM_UP_ACCOUNTS):
                    home.broadcast(max(1, min(most, int(ACCOUNTS[name] * share))))
                rates[name].append(_rate(sink))
                sessions[name] = sink.counts()["maxlive"]
    finally:
        home.sink, home.connections = usual
        for sink in sinks.values():
            sink.stop()
    return {
        name: {"rate": figures.median(values), "rates": values, "connections": sessions.get(name, 8)}
        for name, values in rates.items()
    }


def aiosmtplib_loop(sink: Sink, seconds: float) -> None:
    """Eight warm connections of aiosmtplib send mails that were written before, for so many seconds."""
    command = [sys.executable, "-m", "tests.bench.peers.dialogue", str(seconds)]
    subprocess.run(
        command,
        env=os.environ | {"PEER_SMTP_PORT": str(sink.port), "PYTHONPATH": str(PROJECT)},
        cwd=PROJECT,
        check=True,
    )


def _rate(sink: Sink) -> float:
    counts = sink.counts()
    return float((counts["accepted"] - 1) / max(1e-6, counts["last"] - counts["first"]))
