"""Who commits something that is due tells the workers at once, over Redis' publish and subscribe; polling stays.

A word that is lost costs a second: every worker looks at the ledger and at its queues by itself. So a `Bell` promises
nothing and costs whoever rings it nothing, however the server fares: words are sent by a thread of its own, and
dropped where they can't be. A `Listener` is one connection of a worker process.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Final

from redis import RedisError

from worker.ledger import Lane

CHANNEL: Final = "rolecast:wake"

PLAN: Final = "plan"
#: An event waits to be planned.
DUE: Final = {lane: f"due {lane.name.lower()}" for lane in Lane}
#: The ledger owes a slice of that lane which stands in no queue.
QUEUED: Final = {lane: f"queued {lane.name.lower()}" for lane in Lane}
#: Messages were put into the queue of that lane.
WORDS: Final = frozenset({PLAN, *DUE.values(), *QUEUED.values()})

RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 5.0
#: Between two attempts to reach a server that can't be reached, growing.
LISTEN_SECONDS = 0.5
#: How soon a listener sees that it is to end.
END_SECONDS = 0.1
#: How long a process that ends waits for its last words; they are sent within a few milliseconds, or never.


class Bell:
    """Tells the workers of an installation; `ring` never waits and never fails."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect  # gives a client of the server; it is called on the bell's own thread
        self._lock = threading.Lock()
        self._words: set[str] = set()
        self._rung = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bell", daemon=True)

    def start(self) -> None:
        """Begin to send what is rung."""
        self._thread.start()

    def ring(self, words: Collection[str]) -> None:
        """Say these words soon; those that are still to be sent are sent once."""
        if words:
            with self._lock:
                self._words.update(words)
            self._rung.set()

    def stop(self) -> None:
        """Send the last words, where that takes no time; a server that hangs is not waited for."""
        self._ending.set()
        self._rung.set()
        if self._thread.is_alive():
            self._thread.join(END_SECONDS)

    def _run(self) -> None:
        client = self._connect()
        try:
            while True:
                self._rung.wait()
                self._rung.clear()
                ending = self._ending.is_set()
                with self._lock:
                    words, self._words = self._words, set()
                try:
                    for word in sorted(words):
                        client.publish(CHANNEL, word)
                except (RedisError, OSError):
                    self._ending.wait(RETRY_SECONDS)  # the words are lost; workers look by themselves
                if ending:
                    return
        finally:
            with suppress(RedisError, OSError):
                client.close()


class Listener:
    """Hears what is rung, on a thread and a connection of its own; calls `heard` with the words.

    After each connection, the first one included, `heard` is called with all words: some may have been missed.
    """

    def __init__(self, connect: Callable[[], Any], heard: Callable[[Collection[str]], None]) -> None:
        self._connect = connect
        self._heard = heard
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        self.hears = False  # whether it is connected, as far as it knows

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(2 * LISTEN_SECONDS)

    def _run(self) -> None:
        pause = RETRY_SECONDS
        while not self._ending.is_set():
            with suppress(RedisError, OSError):
                self._listen()
            pause = RETRY_SECONDS if self.hears else min(2 * pause, LONGEST_RETRY_SECONDS)
            self.hears = False
            self._ending.wait(pause * random.uniform(0.5, 1))  # noqa: S311 - spreads attempts, protects nothing

    def _listen(self) -> None:
        client = self._connect()
        try:
            subscription = client.pubsub()
            subscription.subscribe(CHANNEL)
            while not self._ending.is_set():
                message = subscription.get_message(timeout=LISTEN_SECONDS)
                if message is None:
                    continue
                if message["type"] == "subscribe":
                    self.hears = True
                    self._heard(WORDS)
                elif message["type"] == "message":
                    word = message["data"].decode("ascii", "replace")
                    if word in WORDS:  # anybody who reaches the server may say anything
                        self._heard({word})
            subscription.close()
        finally:
            client.close()
