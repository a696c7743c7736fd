"""The README and docs say what is: settings, commands, links, and the output that a reader will see."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import typer.main

from tests.test_demo import environment
from worker.cli import app
from worker.settings import NAMES, PREFIX

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy" / "README.md"]


@cache
def commands() -> set[tuple[str, ...]]:
    """Every command that there is, as the words that call it."""
    root = typer.main.get_command(app)
    found: set[tuple[str, ...]] = set()
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {(name,)} if inner is None else {(name, one) for one in inner}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_documented(name: str) -> None:
    assert f"| `{PREFIX}{name.upper()}`" in README or f", `{PREFIX}{name.upper()}`" in README


def test_no_setting_is_documented_that_does_not_exist() -> None:
    for page in PAGES:
        for name in re.findall(rf"{PREFIX}[A-Z_]+", page.read_text(encoding="utf-8")):
            assert name.removesuffix("_FILE").removeprefix(PREFIX).lower() in NAMES, f"{name} in {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:`|^\$ |^)rolecast ([a-z][a-z-]*)(?: ([a-z][a-z-]*)\b)?", text, re.MULTILINE)
    for first, second in named:
        assert (first,) in commands() or (first, second) in commands(), f"rolecast {first} {second}"


def test_every_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:`|^\$ )make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert target in targets, f"make {target} in {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("https://", "#")):
            path, _, anchor = link.partition("#")
            assert (page.parent / path).exists(), f"{link} in {page.name}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def normal(line: str) -> str:
    """A line of output without what differs from run to run."""
    line = re.sub(r"127\.0\.0\.1:\d+", "HOST", line)
    line = re.sub(r"in [\d.]+ seconds", "in N seconds", line)
    line = re.sub(r"(rolecast_live|/preferences/)[\w.-]+", r"\1", line)
    return " ".join(line.split())


def test_the_demonstration_prints_what_the_readme_shows(tmp_path: Path) -> None:
    block = README.partition("$ make demo\n")[2].partition("```")[0]
    expected = [normal(line) for line in block.splitlines() if line.strip() and line.strip() != "..."]
    assert len(expected) > 10
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "demo"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    printed = []
    assert process.stdout is not None
    for line in process.stdout:
        printed.append(normal(line))
        if "Ctrl-C" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    rest = iter(printed)
    for line in expected:
        assert line in rest, f"the demonstration does not print (here): {line}"
    assert printed[:3] == expected[:3]


def test_the_pictures_are_small() -> None:
    pictures = list((ROOT / "docs" / "screenshots").glob("*.png"))
    assert {picture.name for picture in pictures} == set(re.findall(r"screenshots/([\w-]+\.png)", README))
    assert all(picture.stat().st_size <= 200 * 1024 for picture in pictures)


def test_the_readme_names_the_number_of_types() -> None:
    from worker.events import TYPES

    assert f"all {len(TYPES)} types" in README
