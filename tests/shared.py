"""Where the corpora that are not ours to commit lie: beside the checkout, in CI and on the developers' machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def shared(*parts: str) -> Path:
    """The path of a shared file or folder; skips the test at home where there is none, and fails it in CI."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        if os.environ.get("CI"):
            pytest.fail(f"{'/'.join(parts)} is missing beside the checkout")
        pytest.skip("the shared corpora are not on this machine")
    return path
