"""docs/reliability.md names a test for each row, and the test is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.__main__ import _campaigns

ROOT = Path(__file__).resolve().parents[2]
TABLE = [
    [cell.strip() for cell in line.strip("| \n").split(" | ")]
    for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| R\d+ \|", line)
]


def test_every_row_stands_once() -> None:
    assert [row[0] for row in TABLE] == [f"R{number}" for number in range(1, 34)]
    assert {len(row) for row in TABLE} == {4}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_what_a_row_names_is_there(row: list[str]) -> None:
    """Files, tests (`file::test`; `::test` in the file named before it) and campaigns."""
    file = Path()
    found = 0
    campaigns = set(_campaigns())
    for name in re.findall(r"`([^`]+)`", row[2]):
        path, _, test = name.partition("::")
        if path.startswith("tests/"):
            file = ROOT / path
            assert file.is_file(), name
        if test:
            assert re.search(rf"^def {test}\(", file.read_text(encoding="utf-8"), re.MULTILINE), name
        if re.fullmatch(r"(kills|hold|recovery|terms|freezes|web|points|queues|databases|hosts)[\w*-]*", name):
            wanted = re.compile(name.replace("*", ".*"))
            assert any(wanted.fullmatch(one) for one in campaigns), name
        found += 1
    assert found or row[2].startswith("not yet")
