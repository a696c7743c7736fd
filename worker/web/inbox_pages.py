"""The pages of the local inbox: each caught mail as HTML, text, headers and source, in two widths, light and dark.

The HTML of a mail is never part of our page: it has an address of its own, a content security policy without scripts,
remote images or forms, and stands in a sandboxed frame. Signing links were masked when the mail was caught.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Query, Request
from starlette.responses import HTMLResponse, Response

from worker.history import moment
from worker.masking import MASKED
from worker.settings import is_loopback
from worker.web.events_page import refused
from worker.web.inbox import Inbox, Opened
from worker.web.problems import Problem
from worker.web.site import Here, Site

router = APIRouter(include_in_schema=False)

MAILS: Final = 50
POST_SECONDS: Final = 10.0

MAIL_POLICY: Final = (
    "sandbox allow-popups allow-popups-to-escape-sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
    " frame-ancestors 'self'"
)
#: Links open in a new tab; nothing runs, and nothing is fetched.

Tab = Literal["html", "text", "headers", "source"]
Width = Literal["desktop", "phone"]
Scheme = Literal["light", "dark"]


@router.get("/inbox")
def list_mails(
    request: Request,
    site: Here,
    q: Annotated[str, Query(max_length=200)] = "",
    before: Annotated[int | None, Query(ge=1, lt=2**62)] = None,
) -> Response:
    """Caught mails, the newest first; `q` is looked for in recipient, subject and text."""
    if page := refused(request, site):
        return page
    found = _inbox(site).mails(q, before=before, limit=MAILS + 1)
    return site.page(
        "inbox",
        here="inbox",
        mails=[(one, moment(one.at)) for one in found[:MAILS]],
        count=_inbox(site).count(),
        q=q,
        older=found[MAILS - 1].id if len(found) > MAILS else None,
        newest=before is None,
    )


@router.get("/inbox/{number}")
def show_mail(
    number: int,
    request: Request,
    site: Here,
    *,
    tab: Tab = "html",
    width: Width = "desktop",
    scheme: Scheme = "light",
) -> Response:
    """One mail, in one of its four views."""
    if page := refused(request, site):
        return page
    return _shown(site, _mail(site, number), tab=tab, width=width, scheme=scheme)


@router.get("/inbox/{number}/html")
def mail_html(number: int, request: Request, site: Here, *, scheme: Scheme = "light") -> Response:
    """The HTML part alone, for the frame, as a mail program with that colour scheme shows it."""
    if page := refused(request, site):
        return page
    html = in_scheme(_mail(site, number).html, scheme)
    return HTMLResponse(html, headers={"Content-Security-Policy": MAIL_POLICY, "Referrer-Policy": "no-referrer"})


@router.get("/inbox/{number}/mail.eml")
def mail_source(number: int, request: Request, site: Here) -> Response:
    """The bytes as they were caught."""
    if page := refused(request, site):
        return page
    headers = {"Content-Disposition": f'attachment; filename="mail-{number}.eml"'}
    return Response(_mail(site, number).raw, media_type="message/rfc822", headers=headers)


@router.post("/inbox/{number}/unsubscribe")
def unsubscribe(number: int, request: Request, site: Here) -> Response:
    """Do what a mail program's unsubscribe button does: the POST of RFC 8058, to our own address only."""
    if page := refused(request, site):
        return page
    mail = _mail(site, number)
    path = one_click_path(mail, site.app.settings.public_url)
    if path is None:
        raise Problem(422, "This mail carries no one-click unsubscribe link of ours.")
    status = _post(site.listen, path)
    if status == 200:
        return _shown(site, mail, said=f"The one-click request was answered with {status}: unsubscribed.")
    return _shown(site, mail, error=f"The one-click request was answered with {status}: nothing was changed.")


def _inbox(site: Site) -> Inbox:
    assert site.inbox is not None  # these pages exist only beside one
    return site.inbox


def _mail(site: Site, number: int) -> Opened:
    found = _inbox(site).open(number) if 0 < number < 2**62 else None
    if found is None:
        raise Problem(404, "There is no mail with this number; the inbox keeps the last ones only.")
    return found


def _shown(
    site: Site,
    mail: Opened,
    *,
    tab: Tab = "html",
    width: Width = "desktop",
    scheme: Scheme = "light",
    said: str = "",
    error: str = "",
) -> Response:
    return site.page(
        "mail",
        here="inbox",
        mail=mail,
        at=moment(mail.caught.at),
        source=mail.raw.decode("utf-8", "replace") if tab == "source" else "",
        tab=tab,
        width=width,
        scheme=scheme,
        masked=MASKED in mail.text + mail.html,
        can_unsubscribe=one_click_path(mail, site.app.settings.public_url) is not None,
        said=said,
        error=error,
    )


def one_click_path(mail: Opened, public_url: str) -> str | None:
    """The path of the mail's RFC 8058 link, where it is one of ours."""
    if mail.header("List-Unsubscribe-Post").replace(" ", "") != "List-Unsubscribe=One-Click":
        return None
    link = re.fullmatch(r"<([^<>\s]+)>", mail.header("List-Unsubscribe").strip())
    if link is None or not link[1].startswith(f"{public_url}/unsubscribe/"):
        return None
    return urlsplit(link[1]).path


def _post(listen: tuple[str, int], path: str) -> int:
    """Post the one-click body to ourselves; returns the status of the answer."""
    host = listen[0] if is_loopback(listen[0]) else "127.0.0.1"
    connection = http.client.HTTPConnection(host, listen[1], timeout=POST_SECONDS)
    try:
        connection.request(
            "POST", path, b"List-Unsubscribe=One-Click", {"Content-Type": "application/x-www-form-urlencoded"}
        )
        return connection.getresponse().status
    except OSError as error:
        raise Problem(502, f"The server did not answer its own request: {error}.") from error
    finally:
        connection.close()


_NEVER, _ALWAYS = "(max-width: 0px)", "(min-width: 0px)"
_PREFERS: Final = re.compile(r"\(\s*prefers-color-scheme\s*:\s*(light|dark)\s*\)", re.IGNORECASE)
_META: Final = re.compile(
    r"(<meta[^>]*name=[\"']?(?:supported-)?color-schemes?[\"']?[^>]*content=[\"'])[^\"']*", re.IGNORECASE
)
_ROOT: Final = re.compile(r"color-scheme\s*:\s*light\s+dark", re.IGNORECASE)
_HEAD: Final = re.compile(r"<head[^>]*>", re.IGNORECASE)


def in_scheme(html: str, scheme: Scheme) -> str:
    """The HTML with its colour scheme decided, and links that open in a new tab."""
    asked: Mapping[str, str] = {scheme: _ALWAYS}
    html = _PREFERS.sub(lambda found: asked.get(found[1].lower(), _NEVER), html)
    html = _ROOT.sub(f"color-scheme: {scheme}", _META.sub(rf"\g<1>{scheme}", html))
    decided = f'<base target="_blank"><style>:root {{ color-scheme: {scheme} }}</style>'
    return _HEAD.sub(lambda found: found[0] + decided, html, count=1) if _HEAD.search(html) else decided + html
