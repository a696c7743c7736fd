"""The events, and what became of each: totals, verdicts with their reasons in words, deliveries.

These pages show people's data. Until there is a sign-in they are served from this machine to this machine only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from markupsafe import Markup
from starlette.responses import Response

from subscriptions.catalogue import Catalogue
from worker import facts, history, standing
from worker.facts import Fact
from worker.fanout import EventRow
from worker.history import moment
from worker.markdown import markdown_html
from worker.web import words
from worker.web.problems import Problem
from worker.web.site import Here, Site

router = APIRouter(include_in_schema=False)

EVENTS: Final = 50
ACCOUNTS: Final = 20
CONTACTS: Final = 400
#: Contacts on one page, however large the accounts.
NAMED: Final = 12
#: Accounts that are named before the rest is counted.
DELIVERIES: Final = 50

Number = Annotated[int, Query(ge=0, lt=2**62)]


def refused(request: Request, site: Site) -> Response | None:
    """The page that says why these are not shown here; None where they may be."""
    if site.shows_people(request):
        return None
    return site.personal("not_here", status=403, port=site.listen[1])


@router.get("/events")
def list_events(request: Request, site: Here, before: Annotated[str | None, Query(max_length=26)] = None) -> Response:
    """Events, the newest first; above them what needs a person now."""
    if page := refused(request, site):
        return page
    with site.app.database.read() as connection:
        found = history.list_events(connection, limit=EVENTS + 1, before=before)
        newest = before is None
        matters = standing.look(connection, site.app.settings, now=site.app.clock(), quick=True) if newest else []
    older = found[EVENTS - 1]["event"] if len(found) > EVENTS else None
    return site.page(
        "events", here="events", events=found[:EVENTS], older=older, newest=newest,
        matters=[(one, words.with_code(one.what_to_do), moment(one.since)) for one in matters],
    )  # fmt: skip


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
        audience = history.audience(connection, event)
        answers, following = history.list_verdicts(
            connection, event, after=verdicts, limit=ACCOUNTS, contacts_limit=CONTACTS
        )
        sent = history.list_deliveries(connection, event, after=deliveries, limit=DELIVERIES + 1)
        named = {one["account"] for one in (*answers, *(ground for row in sent for ground in row["grounds"]))}
        judged_by = history.catalogues_of(connection, event, named)
    catalogues = {account: site.app.catalogues.get(key) for account, key in judged_by.items()}
    page_of = sent[:DELIVERIES]
    caught = site.inbox.find(one["message_id"] or "" for one in page_of) if site.inbox else {}
    return site.page(
        "event",
        here="events",
        event=state,
        title=facts.title(event.type, event.data),
        facts=_facts(event),
        body=Markup(_as_text_blocks(markdown_html(facts.body(event.data)))),  # noqa: S704 - cleaned by markdown_html
        attachments=facts.attachments(event.data),
        about=_about(event),
        outcome=words.outcome(state, audience, event.routing.get("account")),
        answers=[_Answer.of(one, catalogues.get(one["account"])) for one in answers],
        following=following,
        verdicts=verdicts,
        sent=[(one, _why(one, catalogues)) for one in page_of],
        more=page_of[-1]["n"] if len(sent) > DELIVERIES else None,
        deliveries=deliveries,
        caught=caught,
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """One account's answer in words."""

    account: str
    outcome: str
    warnings: tuple[str, ...]
    recipients: tuple[tuple[str, str, str, str], ...]  # contact, address, kind of mail, why
    skipped: tuple[words.Skipped, ...]
    left_out: int  # contacts who are not told here, because there are too many for a page

    @classmethod
    def of(cls, answer: Mapping[str, Any], catalogue: Catalogue | None) -> _Answer:
        skipped = words.skipped(answer, catalogue)
        return cls(
            account=answer["account"] or "a removed account",
            outcome=words.result(answer["outcome"], answer["reason"]),
            warnings=tuple(found for code in answer["warnings"] if (found := words.warning(code, catalogue))),
            recipients=tuple(
                (one["contact"], one["email"] or "erased", _kind(one["delivery"]), _received(one, catalogue))
                for one in answer["recipients"]
            ),
            skipped=tuple(skipped),
            left_out=answer.get("left_out", 0),
        )

    @property
    def in_a_line(self) -> str:
        """The whole answer, where one reason holds for everybody; else empty."""
        if self.recipients or self.left_out or len(self.skipped) > 1:
            return ""
        if not self.skipped or self.outcome.endswith(self.skipped[0][0]):
            return self.outcome
        return f"{self.outcome.partition(':')[0]}: {self.skipped[0][0]}"


def _received(one: Mapping[str, Any], catalogue: Catalogue | None) -> str:
    besides = words.dropped(one["dropped"], catalogue)
    return words.matched(one["matched"], catalogue) + (f" (not counted: {besides})" if besides else "")


def _kind(delivery: str) -> str:
    return "" if delivery == "email" else words.said(delivery)


def _why(delivery: Mapping[str, Any], catalogues: Mapping[str, Catalogue | None]) -> list[tuple[str, str]]:
    """For each ground who it is, and why."""
    return [
        (
            f"{ground['account']}/{ground['contact']}",
            words.matched(ground["matched"], catalogues.get(ground["account"]))
            + (f" ({kind})" if (kind := _kind(ground["delivery"])) else ""),
        )
        for ground in delivery["grounds"]
    ]


def _facts(event: EventRow) -> list[Fact]:
    """What the event says; of a request, who asked as far as it counts (contract, section 3)."""
    found = list(facts.facts(event.data))
    if event.category != "approval_request" or event.routing.get("attested"):
        return found
    doubted = {"Requested by": "taken as staff", "Approved by": "not counted"}
    return [
        replace(one, items=(f"{one.items[0]} ({doubted[one.label]}: the key does not attest)",))
        if one.label in doubted and one.items[0] != "staff"
        else one
        for one in found
    ]


def _about(event: EventRow) -> str:
    """The accounts that the event names."""
    named = event.routing.get("accounts")
    if named == "all":
        return "all accounts"
    if not isinstance(named, list):
        return str(event.routing.get("account", ""))
    return ", ".join(named) if len(named) <= NAMED else f"{', '.join(named[:NAMED])} and {len(named) - NAMED:,} more"


def _as_text_blocks(html: str) -> str:
    """The headings of a text as paragraphs: they are no headings of our page."""
    return re.sub(r"<h[1-6]>(.*?)</h[1-6]>", r"<p><strong>\1</strong></p>", html, flags=re.DOTALL)
