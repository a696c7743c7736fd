"""`rolecast status-page show`: what the status page's feed says now."""

from __future__ import annotations

from json import loads
from typing import Any

import typer

from worker.commands.console import Exit, Json, Stop, opened, print_json, print_line, print_table

app = typer.Typer(help="Where outages and maintenance are pointed.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Where outages and maintenance are pointed."""


@app.command("show")
def show(ctx: typer.Context, json: Json = False) -> None:
    """Read the feed and show its incidents; exit 69 where it can't be read."""
    with opened(ctx) as installation:
        settings = installation.settings
        if settings.status_page_feed_url is not None:
            installation.feed.refresh()
        with installation.database.read() as connection:
            state = installation.feed.adopt(connection)
    found: dict[str, Any] = {"url": settings.status_page_url, "feed": settings.status_page_feed_url}
    found |= loads(state.to_json())
    if json:
        print_json(found)
    else:
        print_line(f"page  {settings.status_page_url or 'none: set ROLECAST_STATUS_PAGE_URL'}")
        print_line(f"feed  {settings.status_page_feed_url or 'none: set ROLECAST_STATUS_PAGE_FEED_URL'}")
        if settings.status_page_feed_url is not None:
            print_line(f"read  {found['succeeded_at'] or 'never'}")
            heads = ("STATUS", "UPDATED", "TITLE", "LINK")
            rows = [(one["status"], one["updated_at"], one["title"], one["url"]) for one in found["incidents"]]
            print_table(heads, rows)
    if state.error and settings.status_page_feed_url is not None:
        raise Stop(Exit.UNREACHABLE, f"the feed can't be read: {state.error}")
