"""A process that publishes what it is told: an application that has Rolecast in it, or a web side that runs already.

Each line on stdin is an event; the answer is a line on stdout with the moment before it was accepted, seconds since
1970. With `--engine` the same process sends the mail as well.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import ExitStack

import worker.app
from worker import logs
from worker.app import Engine, open_app
from worker.events import parse_event
from worker.intake import Publisher
from worker.settings import load


def main() -> None:
    """Open the installation of the environment and publish until stdin ends."""
    settings = load(os.environ)
    logs.configure(settings.log_format, level=logging.WARNING)
    with ExitStack() as stack:
        app = stack.enter_context(open_app(settings))
        if "--engine" in sys.argv:
            engine = Engine(app)
            engine.start()
            stack.callback(engine.stop)
        elif telling_workers := getattr(worker.app, "telling_workers", None):
            stack.enter_context(telling_workers(app))
        print("ready", flush=True)
        for line in sys.stdin:
            value = json.loads(line)
            began = time.time()
            app.intake.accept([parse_event(value)], Publisher())
            print(f"{began:.6f}", flush=True)


if __name__ == "__main__":
    main()
