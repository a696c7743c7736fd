"""An installed wheel works from any folder: templates, migrations, catalogues, pages and samples are in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as pip would lay it out."""
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)],
        cwd=HERE,
        check=True,
        capture_output=True,
    )
    wheel = next(target.glob("*.whl"))
    site = target / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def rolecast(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROLECAST_")}
    return subprocess.run(
        [sys.executable, "-m", "worker.cli", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_template_of_the_wheel_renders(site: Path, tmp_path: Path) -> None:
    assert not (site / "templates").exists()
    assert (site / "worker" / "templates" / "_base" / "layout.html").exists()
    ran = rolecast(site, tmp_path, "templates", "check")
    assert ran.returncode == 0, ran.stderr


def test_the_wheel_migrates_a_new_database_and_accepts_an_event(site: Path, tmp_path: Path) -> None:
    (tmp_path / "directory.json").write_text(
        '{"accounts": [{"id": "acme", "catalogue": "billtrust", "contacts":'
        ' [{"id": "a", "email": "a@acme.example", "roles": ["accounting"]}]}]}'
    )
    sample = rolecast(site, tmp_path, "types", "sample", "invoice.issued")
    (tmp_path / "event.json").write_text(sample.stdout)
    assert rolecast(site, tmp_path, "accounts", "import", "directory.json").returncode == 0
    published = rolecast(site, tmp_path, "publish", "event.json")
    assert published.returncode == 0, published.stderr
    assert (tmp_path / "rolecast.db").exists()


def test_the_wheel_holds_nothing_but_the_two_packages(site: Path) -> None:
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"worker", "subscriptions"}
    assert (site / "worker" / "py.typed").exists()
