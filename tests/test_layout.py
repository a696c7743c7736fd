"""The house rules that a machine can hold: who imports whom, what is said where, and that imports do nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MIGRATIONS = ROOT / "worker" / "migrations"
MODULES = sorted([*(ROOT / "worker").rglob("*.py"), *(ROOT / "subscriptions").rglob("*.py")])
IDS = [str(path.relative_to(ROOT)) for path in MODULES]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, in functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "?"


def test_the_subscriptions_never_import_the_worker() -> None:
    places = [path for path in MODULES if path.is_relative_to(ROOT / "subscriptions")]
    assert places
    assert {path.name: name for path in places for name in imported(path) if name.split(".")[0] == "worker"} == {}


def test_one_module_knows_how_to_speak_smtp_to_a_relay() -> None:
    knows = {path.name for path in MODULES if any(name.split(".")[0] == "aiosmtplib" for name in imported(path))}
    assert knows == {"relay.py"}
    assert not [path.name for path in MODULES if "smtplib" in imported(path)]


def test_nothing_is_unpickled_or_evaluated() -> None:
    forbidden = {"pickle", "marshal", "shelve", "dill", "yaml"}
    found = {(path.name, name) for path in MODULES for name in imported(path) if name in forbidden}
    assert found <= {("transfer.py", "marshal")}  # a nameless temporary file that the same process wrote
    calls = {
        f"{path.name}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}
    }
    assert calls == set()


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_everything_public_says_what_it_promises(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module), "the module says nothing"
    silent = []
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node) and path.parent.name != "versions":
                silent.append(node.name)
            if isinstance(node, ast.ClassDef):
                silent += [
                    f"{node.name}.{part.name}"
                    for part in node.body
                    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
                    and not part.name.startswith("_")
                    and not ast.get_docstring(part)
                    and "overload" not in {ast.unparse(one) for one in part.decorator_list}
                ]
    assert silent == []


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_nothing_is_left_to_be_done_later(path: Path) -> None:
    assert re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8")) == []


def test_names_of_people_and_hosts_are_reserved_ones() -> None:
    """Only `.example`, `.test` and what never leaves the machine; the standards' own addresses are no hosts of ours."""
    allowed = re.compile(r"(?:[\w.-]*\.(?:example|test|local|invalid)|localhost)$")
    found = {
        f"{path.name}: {address}"
        for path in MODULES
        for address in re.findall(r"[\w.+-]+@([\w-]+(?:\.[\w-]+)+)", path.read_text(encoding="utf-8"))
        if not allowed.match(address)
    }
    assert found == set()


IMPORT_ALL = """
import builtins, importlib, pkgutil, socket, sqlite3, sys, threading

opened = []

def refuse(what):
    def call(*args, **more):
        opened.append(f"{what}{args!r}")
        raise AssertionError(f"{what}{args!r} at import")
    return call

# first the libraries: what they read at import is their own affair
import alembic.command, dramatiq.brokers.redis, fastapi, jinja2, sqlalchemy, structlog, typer, uvicorn, rich.console
import rich.progress, rich.table, pydantic, email_validator, feedparser, css_inline, nh3, markdown_it, aiosmtplib
import aiosmtpd.controller, sqlalchemy.dialects.sqlite, sqlalchemy.dialects.postgresql, zoneinfo, importlib.metadata

socket.socket.connect = refuse("connect")
socket.socket.bind = refuse("bind")
sqlite3.connect = refuse("sqlite3.connect")
sqlalchemy.create_engine = refuse("create_engine")
real_open, ours = builtins.open, tuple(sys.argv[1:])

def watched(path, *args, **more):
    frame = sys._getframe(1)
    if frame.f_code.co_filename.startswith(ours):
        opened.append(f"open({path!r}) in {frame.f_code.co_filename}")
    return real_open(path, *args, **more)

builtins.open = watched
threads = threading.active_count()
names = []
for package in ("subscriptions", "worker"):
    names.append(package)
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if "migrations" not in found.name and not found.name.endswith("__main__"):
            names.append(found.name)
for name in names:
    importlib.import_module(name)
assert threading.active_count() == threads, threading.enumerate()
assert not opened, opened
print(len(names))
"""


def test_nothing_is_opened_at_import() -> None:
    ours = [str(ROOT / "worker"), str(ROOT / "subscriptions")]
    command = [sys.executable, "-c", IMPORT_ALL, *ours]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


HEAVY = ("alembic", "sqlalchemy", "dramatiq", "redis", "fastapi", "starlette", "uvicorn", "aiosmtplib", "aiosmtpd",
         "jinja2", "feedparser", "pydantic", "css_inline", "structlog", "email_validator")  # fmt: skip


def test_help_does_not_wait_for_the_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['rolecast', '--help']\n"
        "from worker.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert "typer" in loaded
    assert loaded & set(HEAVY) == set()
