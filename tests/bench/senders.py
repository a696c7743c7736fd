"""What Rolecast is compared with, as processes: `smtp-source`, and the peers of `tests.bench.peers`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.bench import machine
from tests.bench.installation import PROJECT, START_SECONDS, Run, Servers, end
from tests.bench.stage import Ran
from tests.faults.servers import until

WARM_UP = 50
#: Mails that a peer has sent before it is measured.
SLOWEST = 10.0
#: Mails a second: a peer that is slower has failed.


class NotInstalled(Exception):  # noqa: N818 - it reads as the sentence it is
    """The sender is not on this machine."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Something that people use instead; `needs` are the modules without which it is left out."""

    key: str
    label: str
    needs: tuple[str, ...]
    measure: Callable[[Peer, Servers, int], Run]

    @property
    def module(self) -> str:
        """Where it is written."""
        return f"tests.bench.peers.plain_{self.key}"

    def run(self, servers: Servers, mails: int) -> Run:
        """Send so many mails. Raises `NotInstalled`."""
        if any(importlib.util.find_spec(name) is None for name in self.needs):
            raise NotInstalled(self.key)
        return self.measure(self, servers, mails)


def smtp_source(servers: Servers, mails: int, *, length: int) -> Run:
    """postfix's own load generator: eight sessions, no rendering, no ledger. Raises `NotInstalled`."""
    program = shutil.which("smtp-source", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise NotInstalled("smtp-source")
    sink = servers.chunking
    sink.reset()
    sink_before = sink.counts()["cpu"]
    command = [program, "-d", "-N", "-s", "8", "-m", str(mails), "-l", str(length), "-M", "bench.example"]
    command += ["-f", "support@bench.example", "-t", "person@a.example", f"127.0.0.1:{sink.port}"]
    began = time.monotonic()
    ran = _waited(subprocess.Popen(command))
    return _counted(servers, "smtp_source", mails, began=began, cpu={"workers": ran.cpu_seconds}, started_cpu=0.0,
                    peaks=[ran.peak_mb], sink_before=sink_before)  # fmt: skip


def broker_peer(worker: list[str]) -> Callable[[Peer, Servers, int], Run]:
    """A peer with workers on Redis and a publisher of its own; rates are counted from the first mail on."""

    def measure(peer: Peer, servers: Servers, mails: int) -> Run:
        environment = _environment(servers) | {"PEER_BROKER_URL": servers.peer_queue()}
        sink = servers.chunking
        sink.reset()
        with (servers.folder / f"{peer.key}.log").open("ab") as log:
            command = [part.replace("MODULE", peer.module) for part in worker]
            workers = _start([sys.executable, "-m", *command], environment, log)
        try:
            started = _run(peer, environment, "0", str(WARM_UP))
            if not until(lambda: sink.counts()["accepted"] >= WARM_UP, seconds=START_SECONDS):
                raise SystemExit(f"{peer.label} does not send: see {servers.folder / f'{peer.key}.log'}")
            sink.reset()
            sink_before = sink.counts()["cpu"]
            before = (machine.cpu_seconds(workers.pid), machine.cpu_seconds(servers.valkey.pid))
            published = _run(peer, environment, str(WARM_UP), str(WARM_UP + mails))
            until(lambda: sink.counts()["accepted"] >= mails, seconds=60 + mails / SLOWEST)
            time.sleep(0.2)  # what is done after the relay's answer
            after = (machine.cpu_seconds(workers.pid), machine.cpu_seconds(servers.valkey.pid))
            peaks = machine.peaks_mb(workers.pid)
        finally:
            end(workers)
        cpu = {"workers": after[0] - before[0], "queue": after[1] - before[1], "publisher": published.cpu_seconds}
        return _counted(servers, peer.key, mails, began=None, cpu=cpu, started_cpu=started.cpu_seconds, peaks=peaks,
                        sink_before=sink_before)  # fmt: skip

    return measure


def loop_peer(peer: Peer, servers: Servers, mails: int) -> Run:
    """A peer that is one process, started, working and ended; rates are counted from the first mail on."""
    environment = _environment(servers)
    started = _run(peer, environment, "0", "0")
    servers.chunking.reset()
    sink_before = servers.chunking.counts()["cpu"]
    ran = _run(peer, environment, "0", str(mails))
    return _counted(servers, peer.key, mails, began=None, cpu={"workers": ran.cpu_seconds},
                    started_cpu=started.cpu_seconds, peaks=[ran.peak_mb], sink_before=sink_before)  # fmt: skip


def table_peer(peer: Peer, servers: Servers, mails: int) -> Run:
    """A peer that queues into its own tables and sends them by a second command; both count, their starts too."""
    path = servers.folder / f"{peer.key}.db"
    path.unlink(missing_ok=True)
    environment = _environment(servers) | {"PEER_DATABASE": str(path)}
    started = _run(peer, environment, "migrate")
    servers.chunking.reset()
    sink_before = servers.chunking.counts()["cpu"]
    began = time.monotonic()
    queued = _run(peer, environment, "queue", "0", str(mails))
    sent = _run(peer, environment, "send")
    cpu = {"publisher": queued.cpu_seconds, "workers": sent.cpu_seconds}
    return _counted(servers, peer.key, mails, began=began, cpu=cpu, started_cpu=started.cpu_seconds,
                    peaks=[sent.peak_mb], sink_before=sink_before)  # fmt: skip


DRAMATIQ = Peer("dramatiq", "plain dramatiq, 2 processes", ("dramatiq",),
                broker_peer(["dramatiq", "MODULE", "-p", "2", "-t", "8"]))  # fmt: skip
PEERS = (
    DRAMATIQ,
    Peer("asyncio", "asyncio, aiosmtplib, no queue", ("aiosmtplib",), loop_peer),
    Peer("celery", "Celery, 2 processes", ("celery",),
         broker_peer(["celery", "-A", "MODULE", "worker", "-c", "2", "-l", "warning"])),
    Peer("post_office", "django-post-office, 2 processes", ("django", "post_office"), table_peer),
)  # fmt: skip


def _counted(
    servers: Servers,
    name: str,
    mails: int,
    *,
    began: float | None,
    cpu: dict[str, float],
    started_cpu: float,
    peaks: list[float],
    sink_before: float,
) -> Run:
    """The run as the sink saw it, from `began` or from the first mail on."""
    counts = servers.chunking.counts()
    return Run(
        name=name,
        recipients=mails,
        seconds=max(1e-6, counts["last"] - (counts["first"] if began is None else began)),
        accepted=counts["accepted"],
        distinct=counts["distinct"],
        ledger=None,
        cpu=cpu,
        started_cpu=min(started_cpu, sum(cpu.values())),
        peak_mb=peaks[0],
        peak_sum_mb=sum(peaks),
        bytes_a_mail=counts["bytes"] / max(1, counts["accepted"]),
        sink_cpu=counts["cpu"] - sink_before,
    )


def _environment(servers: Servers) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ROLECAST_")}
    return ours | {"PEER_SMTP_PORT": str(servers.chunking.port), "PYTHONPATH": str(PROJECT)}


def _run(peer: Peer, environment: dict[str, str], *arguments: str) -> Ran:
    return _waited(_start([sys.executable, "-m", peer.module, *arguments], environment, None))


def _start(command: list[str], environment: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, cwd=PROJECT, stdout=log, stderr=log)


def _waited(process: subprocess.Popen[bytes]) -> Ran:
    """Wait for a process and take its usage. Raises `SystemExit` where it failed."""
    began = time.monotonic()
    peaks: list[float] = []
    # Its resource usage would tell the memory of the process that started it, where that had more.
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        peaks = machine.peaks_mb(process.pid) or peaks
        time.sleep(0.02)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{process.args!r} ended with {process.returncode}")
    return Ran(
        code=0,
        output="",
        errors="",
        seconds=time.monotonic() - began,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_mb=max(peaks, default=0.0),
    )


def length_for(servers: Servers, bytes_a_mail: float) -> int:
    """The `-l` with which smtp-source's mails are as long on the wire as ours."""
    probe = smtp_source(servers, 16, length=1000)
    return max(80, round(bytes_a_mail - (probe.bytes_a_mail - 1000)))
