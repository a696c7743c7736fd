"""What the status page's feed said last, shared by the processes of an installation through the database.

Whoever works reads the feed and keeps the reading; whoever accepts an event looks there. The feed can improve a link
and nothing else: no reading, and no failure to read, ever causes or delays a mail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from subscriptions.database import Database
from worker import logs
from worker.events import Event
from worker.schema import feed_state
from worker.statuspage import FeedState, StatusPage

logger = logs.get(__name__)


@dataclass(slots=True)
class SharedFeed:
    """A `StatusPage` whose readings are kept in the database."""

    database: Database
    status_page: StatusPage
    problem: str | None = None
    _seen: str | None = None

    def refresh(self) -> FeedState:
        """Read the feed once and keep what it says; never raises for the feed's sake."""
        state = self.status_page.refresh()
        if state.error:
            logger.warning("feed.failed", why=state.error, what_next="events are answered with the page")
        self.problem = f"the feed of the status page can't be read: {state.error}" if state.error else None
        body = state.to_json()
        with self.database.write() as connection:
            connection.execute(delete(feed_state))
            connection.execute(insert(feed_state).values(one=1, body=body))
        return state

    def pointer(self, connection: Connection, event: Event) -> dict[str, Any]:
        """The `status_page` of an event's answer (contract, section 6). Fetches nothing."""
        self.adopt(connection)
        return self.status_page.pointer(event)

    def adopt(self, connection: Connection) -> FeedState:
        """Take over what another process read last, where that is newer."""
        body = connection.execute(select(feed_state.c.body)).scalar_one_or_none()
        if body is not None and body != self._seen:
            self._seen = body
            self.status_page.adopt(FeedState.from_json(body))
        return self.status_page.state()
