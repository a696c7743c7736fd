"""The events, and what became of each: totals, verdicts with their reasons in words, deliveries.

These pages show people's data. Until there is a sign-in they are served from this machine to this machine only.
"""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from worker import history
from worker.web.problems import Problem
from worker.web.site import Here, Site

router = APIRouter(include_in_schema=False)

EVENTS: Final = 50
ACCOUNTS: Final = 20
DELIVERIES: Final = 50

Number = Annotated[int, Query(ge=0, lt=2**62)]


def refused(request: Request, site: Site) -> Response | None:
    """The page that says why these are not shown here; None where they may be."""
    if site.shows_people(request):
        return None
    return site.personal("not_here", status=403, port=site.listen[1])


@router.get("/events")
def list_events(request: Request, site: Here, before: Annotated[str | None, Query(max_length=26)] = None) -> Response:
    """Events, the newest first."""
    if page := refused(request, site):
        return page
    with site.app.database.read() as connection:
        found = history.list_events(connection, limit=EVENTS + 1, before=before)
    older = found[EVENTS - 1]["event"] if len(found) > EVENTS else None
    return site.page("events", here="events", events=found[:EVENTS], older=older, newest=before is None)


@router.get("/events/{ulid}")
def show_event(ulid: str, request: Request, site: Here, *, verdicts: Number = 0, deliveries: Number = 0) -> Response:
    """One event: `verdicts` and `deliveries` say after which of them the lists begin."""
    if page := refused(request, site):
        return page
    with site.app.database.read() as connection:
        event = history.find_event(connection, ulid)
        if event is None:
            raise Problem(404, "There is no event with this number.")
        state = history.event_state(connection, event)
        answers, following = history.list_verdicts(connection, event, after=verdicts, limit=ACCOUNTS)
        sent = history.list_deliveries(connection, event, after=deliveries, limit=DELIVERIES + 1)
    page_of = sent[:DELIVERIES]
    caught = site.inbox.find(one["message_id"] or "" for one in page_of) if site.inbox else {}
    return site.page(
        "event",
        here="events",
        event=state,
        answers=answers,
        following=following,
        verdicts=verdicts,
        sent=page_of,
        more=page_of[-1]["n"] if len(sent) > DELIVERIES else None,
        deliveries=deliveries,
        caught=caught,
    )
