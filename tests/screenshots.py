"""The README's pictures, made from a running demonstration: `make screenshots` (needs a Chromium on the machine).

Each picture is a page that a user sees, in docs/screenshots, at most 200 KB.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "screenshots"
LARGEST = 200 * 1024


@contextmanager
def demonstration() -> Iterator[dict[str, str]]:
    """A running demonstration; gives the addresses of its pages."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "worker.cli", "demo", "--json", "--folder", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert process.stdout is not None
            text = ""
            for line in process.stdout:
                text += line
                if line == "}\n":
                    break
            summary = json.loads(text)
            assert summary["complete"], "the demonstration is not complete: its pictures would show less"
            yield summary["pages"]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)


def take(page: Page, name: str) -> None:
    """Save what the page's window shows."""
    path = FOLDER / f"{name}.png"
    page.screenshot(path=path)
    size = path.stat().st_size
    assert size <= LARGEST, f"{path.name} has {size:,} bytes; {LARGEST:,} are allowed: show less of the page"
    print(f"{path.relative_to(ROOT)}: {size // 1024} KB")


def opened(browser: Browser, url: str, *, width: int = 1100, height: int = 760, dark: bool = False) -> Page:
    """A page of its own, with everything on it loaded."""
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    page.goto(url, wait_until="networkidle")
    return page


def main() -> None:
    """Take every picture."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no Chromium on this machine: install one (Debian: chromium and fonts-liberation)")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with demonstration() as pages, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"],
        )
        events = opened(browser, pages["events"], height=1280)
        events.get_by_role("link", name="Invoice issued").last.click()
        events.wait_for_load_state("networkidle")
        take(events, "event")
        inbox = opened(browser, f"{pages['inbox']}?q=Q-0417", width=900, height=1000)
        inbox.locator("ul.mails a").first.click()
        inbox.wait_for_load_state("networkidle")
        take(inbox, "mail")
        take(opened(browser, pages["preferences"], width=900, height=1000, dark=True), "preferences")
        browser.close()


if __name__ == "__main__":
    main()
