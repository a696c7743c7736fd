"""The database fails in the middle of a broadcast (reliability.md R11 and R12).

A worker that lives keeps what it learnt and writes it down when the database is back: nobody is missed, nobody gets a
second copy. A publisher is told at once that nothing was stored, and what was told that is not half there either.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.account import IN_FLIGHT, Account
from tests.faults.play import Play, play, publishers, ready, serve
from tests.faults.servers import until
from tests.faults.stage import Scene, Size
from tests.faults.witness import Intent, Told

UNREACHABLE = 69
"""The exit code of a command whose server can't be reached (contract, section 5)."""

SLOWEST_REFUSAL_SECONDS = 20.0
"""So soon a publisher hears that the database is away; a command starts a process first."""


# ---------------------------------------------------------------- PostgreSQL


def restarts(size: Size, *, recipients: int = 20_000, times: int = 10) -> Account:
    """R11: PostgreSQL restarted with `-m immediate`, again and again; the workers live, so no second copy."""
    recipients, times = size.choose(size.recipients, recipients, 100_000), size.choose(size.times, times, 50)
    with play("postgresql", recipients, dice=size.dice("restarts")) as one:
        for number in range(times):
            one.reach((number + one.dice.random()) / (times + 1))
            one.scene.witness.fault("restart")
            one.postgresql.restart(immediate=True)
        one.over()
        return one.end(bound=0)


def stopped(size: Size, *, recipients: int = 10_000, seconds: float = 30.0) -> Account:
    """PostgreSQL stopped while publishers go on: a clear 503 with Retry-After, exit 69, nothing half-accepted."""
    recipients = size.choose(size.recipients, recipients, 50_000)
    with play("postgresql", recipients, dice=size.dice("stopped")) as one:
        stage = one.scene
        port, key = serve(stage)
        one.reach(0.2)
        with publishers(stage, port, key, most=int(seconds * 4), accounts=recipients // 4) as (web, command):
            time.sleep(1.0)
            stage.witness.fault("stopped")
            one.postgresql.stop()
            middle = time.monotonic() + seconds / 2
            status, retry_after = post_once(stage, port, key, "probe")
            if status != 503 or not retry_after:
                one.wrong.append(f"without a database HTTP answered {status}, Retry-After {retry_after!r}")
            time.sleep(max(0.0, middle - time.monotonic()))
            if (code := ready(port)[0]) != 503:
                one.wrong.append(f"/readyz answered {code} without a database")
            time.sleep(seconds / 2)
            one.postgresql.start()
            stage.witness.fault("back")
            one.over()
            time.sleep(2.0)
        for publisher, codes in ((web, {202, 503}), (command, {0, UNREACHABLE})):
            _told_clearly(one, publisher.told, publisher.seconds, codes, publisher.summary(), publisher.name)
        return one.end(bound=0)


def _told_clearly(one: Play, told: list[Told], seconds: list[float], codes: set[int], summary: str, name: str) -> None:
    later = sum(answer.answer != "ok" for answer in told)
    print(f"    {summary}, {later} told to come later", flush=True)
    if not later:
        one.wrong.append(f"nobody who published {name} was told that the database was away")
    if odd := sorted({answer.code for answer in told} - codes):
        example = next(answer for answer in told if answer.code in odd)
        one.wrong.append(f"publishing {name} was answered with {odd}: {example.said[:200]!r}")
    if max(seconds, default=0.0) > SLOWEST_REFUSAL_SECONDS:
        one.wrong.append(f"publishing {name} took {max(seconds):.1f} s once")


def post_once(stage: Scene, port: int, key: str, id_: str) -> tuple[int, str | None]:
    """Publish an invoice of the first account over HTTP: (status, Retry-After); the witness knows."""
    [intent] = stage.invoices(1, accounts=1, prefix=id_)
    stage.witness.intend([intent])
    status, retry_after = _post(port, key, intent)
    stage.witness.learn([intent], [Told("ok" if status == 202 else "unknown", None, status)])
    return status, retry_after


def _post(port: int, key: str, intent: Intent) -> tuple[int, str | None]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/events",
        data=json.dumps(intent.event).encode(),
        headers={"Content-Type": "application/cloudevents+json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers["Retry-After"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Retry-After"]
    except OSError:
        return 0, None


# ---------------------------------------------------------------- SQLite


def locked(size: Size, *, recipients: int = 10_000, seconds: float = 30.0) -> Account:
    """R11: another process holds SQLite's write lock for half a minute."""
    recipients = size.choose(size.recipients, recipients, 50_000)
    with play("sqlite", recipients, dice=size.dice("locked"), queue=False) as one:
        stage = one.scene
        port, key = serve(stage)
        one.reach(0.3)
        stage.witness.fault("locked")
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(stage.folder / "rolecast.db"), str(seconds)], stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        holder.stdout.read(1)  # it holds the lock
        began = time.monotonic()
        status, retry_after = post_once(stage, port, key, "probe")
        took = time.monotonic() - began
        if took < seconds and (status != 503 or not retry_after):
            one.wrong.append(f"with the database locked HTTP answered {status}, Retry-After {retry_after!r}")
        print(f"    HTTP answered {status} after {took:.1f} s", flush=True)
        holder.wait()
        holder.stdout.close()
        one.over()
        account = one.end(bound=0)
        _check_integrity(account, stage.folder / "rolecast.db")
        return account


_HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("x", end="", flush=True)
time.sleep(float(sys.argv[2]))
connection.execute("ROLLBACK")
"""


def full_file(size: Size, *, recipients: int = 8_000) -> Account:
    """R12: SQLite may not grow beyond a page count; raised again when the processes are started anew."""
    recipients = size.choose(size.recipients, recipients, 50_000)
    with play("sqlite", recipients, dice=size.dice("full"), queue=False) as one:
        stage = one.scene
        path = stage.folder / "rolecast.db"
        one.reach(0.2)
        stage.terminate(one.workers.pop())
        stage.witness.fault("full")
        pages = _pragma(path, "page_count")
        stage.database_url = f"sqlite:///{path}?max_page_count={pages + 4}"
        one.workers.append(stage.work())
        refused = [stage.witness.publish_cli(stage, stage.invoices(200, accounts=recipients // 4, prefix=f"full{n}"))
                   for n in range(3)]  # fmt: skip
        codes = {answer.code for told in refused for answer in told}
        print(f"    publishing into the full database ended with {sorted(codes)}", flush=True)
        if codes != {1}:
            one.wrong.append(f"publishing into a full database ended with {sorted(codes)}, not 1")
        time.sleep(10.0)
        for worker in one.workers:
            if worker.poll() is None:
                stage.terminate(worker)  # it may end by itself or be told to: nothing is lost
        one.workers.clear()
        stage.database_url = ""
        one.workers.append(stage.work())
        stage.witness.fault("room again")
        one.over()
        account = one.end(bound=IN_FLIGHT)
        _check_integrity(account, path)
        return account


def full_disk(size: Size, *, recipients: int = 8_000, seconds: float = 20.0) -> Account:
    """R12: the disk of the database is full for a while; the worker and the web side live on."""
    recipients = size.choose(size.recipients, recipients, 20_000)
    with small_disk(megabytes=160) as disk:
        if disk is None:
            print("    skipped: this machine lets nobody mount a tmpfs (root is needed)", flush=True)
            return Account()
        with play("sqlite", recipients, dice=size.dice("disk"), queue=False, folder=disk) as one:
            stage = one.scene
            port, key = serve(stage)
            one.reach(0.2)
            stage.witness.fault("full")
            filler = disk / "filler"
            _fill(filler)
            ends = time.monotonic() + seconds
            answers: list[tuple[int, str | None]] = []
            while time.monotonic() < ends:
                answers.append(post_once(stage, port, key, f"full{len(answers)}"))
                time.sleep(0.5)
            code, status, facts = ready(port)
            told = stage.witness.publish_cli(stage, stage.invoices(1, accounts=1, prefix="command"))[0]
            filler.unlink()
            stage.witness.fault("room again")
            one.over()
            _judge_full(one, answers, told, (code, status, facts))
            if not until(lambda: ready(port)[1] == "ready", seconds=30, every=0.5):
                one.wrong.append(f"/readyz still says {ready(port)} half a minute after the disk had room")
            account = one.end(bound=0)
            _check_integrity(account, disk / "rolecast.db")
            return account


def _judge_full(one: Play, answers: list[tuple[int, str | None]], told: Told, said: tuple[int, str, list[str]]) -> None:
    print(f"    HTTP {sorted({status for status, _ in answers})}, command {told.code}, /readyz {said}", flush=True)
    # The first may still find a page to write to.
    if odd := {answer for answer in answers[2:] if answer[0] not in {503, 507}}:
        one.wrong.append(f"on a full disk HTTP answered {sorted(odd, key=str)}: 503 or 507, before anything is stored")
    if told.answer == "ok":
        one.wrong.append("on a full disk a command published")
    if said[1] == "ready":
        one.wrong.append("/readyz said ready on a full disk")


def _fill(path: Path) -> None:
    """Write until nothing more fits."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 65_536)


@contextlib.contextmanager
def small_disk(*, megabytes: int) -> Iterator[Path | None]:
    """A file system of its own in memory; None where this machine lets us mount none."""
    folder = Path(tempfile.mkdtemp(prefix="rolecast-disk-"))
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "rolecast-faults", str(folder)],
        check=False, stderr=subprocess.DEVNULL,
    ).returncode  # fmt: skip
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
        folder.rmdir()


def _pragma(path: Path, name: str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _check_integrity(account: Account, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        said = [row[0] for row in connection.execute("PRAGMA integrity_check")]
    if said != ["ok"]:
        account.wrong("integrity_check found faults", said)


CAMPAIGNS: dict[str, Callable[[Size], Account]] = {
    "databases-restarts": restarts,
    "databases-stopped": stopped,
    "databases-locked": locked,
    "databases-full-file": full_file,
    "databases-full-disk": full_disk,
}
