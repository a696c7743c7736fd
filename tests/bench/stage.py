"""The stage that benchmarks play on: a counting sink, a directory of any size, and the real commands as processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONTACTS = (("primary_support", 1), ("secondary_support", 2), ("communication_only", 1), ("accounting", 1))
#: The contacts of an account: four of the five get a service notice.
RECIPIENTS_PER_ACCOUNT = 4


class Sink:
    """csink: an SMTP server in C that counts what it accepts. `delay` is microseconds before each reply.

    `log` is a file that gets a line per accepted mail; `plain` offers neither PIPELINING nor CHUNKING; without
    `chunking` it offers PIPELINING alone; every `hang`th session hangs after its first mail; `rate` is how many mails a
    second it accepts in all (0: as many as come).
    """

    def __init__(
        self,
        folder: Path,
        *,
        delay: int = 0,
        log: Path | None = None,
        plain: bool = False,
        chunking: bool = True,
        hang: int = 0,
        rate: float = 0,
    ) -> None:
        program = folder / "csink"
        if not program.exists():
            compiler = shutil.which("cc") or shutil.which("gcc")
            if compiler is None:
                raise SystemExit("the sink is a C program: install a C compiler (Debian: gcc libc6-dev)")
            subprocess.run([compiler, "-O2", "-w", "-o", str(program), str(HERE / "csink.c")], check=True)
        self.port, self.control = free_port(), free_port()
        arguments = [str(program), str(self.port), str(self.control)]
        arguments += ["-d", str(delay)] if delay else []
        arguments += ["-l", str(log)] if log else []
        arguments += ["-P"] if plain else []
        arguments += [] if chunking else ["-n"]
        arguments += ["-H", str(hang)] if hang else []
        arguments += ["-r", str(rate)] if rate else []
        self._process = subprocess.Popen(arguments)
        self._wait()

    def _wait(self) -> None:
        for _ in range(100):
            try:
                self.counts()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise SystemExit("the sink did not start")

    def counts(self) -> dict[str, Any]:
        """What it accepted: accepted, distinct, dup, bytes, first, last (seconds of the monotonic clock), cpu."""
        return self._ask(b"GET\n")

    def reset(self) -> None:
        """Count from nothing."""
        self._ask(b"RESET\n")

    def _ask(self, what: bytes) -> dict[str, Any]:
        with socket.create_connection(("127.0.0.1", self.control), timeout=5) as control:
            control.sendall(what)
            answer = b""
            while not answer.endswith(b"}\n") and (more := control.recv(65536)):
                answer += more
        found: dict[str, Any] = json.loads(answer)
        return found

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="rolecast-bench-") as name:
        yield Path(name)


@dataclass(slots=True)
class Ran:
    """A command that ended: its code, its output, and what it took."""

    code: int
    output: str
    errors: str
    seconds: float
    cpu_seconds: float
    peak_mb: float


@dataclass(slots=True)
class Stage:
    """An installation in a folder whose relay is the sink."""

    folder: Path
    sink: Sink
    connections: int = 8
    lease_seconds: int = 30
    database_url: str = ""  # empty: SQLite in the folder
    broker_url: str = "memory://"
    relay_port: int = 0  # 0: the sink's own; a proxy before it has another
    settings: dict[str, str] = field(default_factory=dict)  # further ROLECAST_* names; they win

    def environment(self) -> dict[str, str]:
        """What the commands see: nothing of the caller's ROLECAST_* settings."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("ROLECAST_")}
        relay = self.relay_port or self.sink.port
        standing = {
            "ROLECAST_DATABASE_URL": self.database_url or f"sqlite:///{self.folder / 'rolecast.db'}",
            "ROLECAST_BROKER_URL": self.broker_url,
            "ROLECAST_RELAY_URLS": f"smtp://127.0.0.1:{relay}?tls=none&connections={self.connections}",
            "ROLECAST_SENDER": "Bench Support <support@bench.example>",
            "ROLECAST_LOG_FORMAT": "json",
            "ROLECAST_LEASE_SECONDS": str(self.lease_seconds),
        }
        return ours | standing | self.settings

    def start(self, *arguments: str, errors: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a command; its stderr goes to `errors`."""
        with (errors or Path(os.devnull)).open("ab") as sink:
            return subprocess.Popen(
                [sys.executable, "-m", "worker.cli", *arguments],
                env=self.environment(),
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=sink,
            )

    def run(self, *arguments: str, may_fail: bool = False) -> Ran:
        """Run a command to its end, watching its memory."""
        errors = self.folder / "stderr.log"
        errors.unlink(missing_ok=True)
        began = time.monotonic()
        process = self.start(*arguments, errors=errors)
        assert process.stdout is not None
        output = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.stdout.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        ran = Ran(
            code=process.returncode,
            output=output,
            errors=errors.read_text(encoding="utf-8", errors="replace"),
            seconds=time.monotonic() - began,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_mb=usage.ru_maxrss / 1024,
        )
        if ran.code != 0 and not may_fail:
            raise SystemExit(f"rolecast {' '.join(arguments)} ended with {ran.code}:\n{ran.output}{ran.errors[-3000:]}")
        return ran

    def fill(self, recipients: int) -> Path:
        """Import a directory in which a service notice has so many recipients; returns the event's file."""
        document = self.folder / "directory.jsonl"
        with document.open("w", encoding="utf-8") as file:
            for number in range(recipients // RECIPIENTS_PER_ACCOUNT):
                file.write(json.dumps(account(number)) + "\n")
        self.run("accounts", "import", str(document))
        notice = {
            "specversion": "1.0", "id": "bench-1", "source": "/bench", "type": "service.notice",
            "data": {"accounts": "all", "title": "Exports move to a new address",
                     "body": "From **1 December** on, exports come from `exports.bench.example`.\n\n"
                             "Please allow the new address in your firewall.\n\n- old: `files.bench.example`\n"
                             "- new: `exports.bench.example`\n"},
        }  # fmt: skip
        path = self.folder / "event.json"
        path.write_text(json.dumps(notice), encoding="utf-8")
        return path


def account(number: int) -> dict[str, Any]:
    """An account of the benchmark's directory: five contacts, four of whom get a service notice."""
    contacts = []
    for role, how_many in CONTACTS:
        for index in range(how_many):
            name = f"{role[0]}{index}"
            contacts.append(
                {"id": name, "name": f"Person {name} {number}", "email": f"{name}@a{number}.example", "roles": [role]}
            )
    return {"id": f"a{number}", "name": f"Account {number}", "catalogue": "billtrust", "uses": ["invoicing"],
            "contacts": contacts}  # fmt: skip
