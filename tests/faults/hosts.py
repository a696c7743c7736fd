"""Hosts that are cut off from each other, and hosts whose clocks are apart (reliability.md R5 and R10).

A host is a worker process with a proxy of its own before the database and the queue; where network namespaces can be
made, also one behind a link that is taken down, so that packets truly vanish. The others take over; a host that comes
back sends nothing that it had not begun before.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from subprocess import Popen

from tests.faults.account import IN_FLIGHT, Account
from tests.faults.proxy import Proxy
from tests.faults.servers import until
from tests.faults.stage import Scene, Size, scene
from tests.faults.witness import Intent

LEASE_SECONDS = 4
CUT_SECONDS = 32.0
"""Longer than the lease, and than PostgreSQL keeps a transaction (and its locks) that was open at the cut: 20 s."""

TAKEN_OVER_AFTER_SECONDS = 26.0
"""By then the others have taken over and finished what they could."""

TAKEN_OVER_SECONDS = 60.0


@dataclass(slots=True)
class Host:
    """A worker process that reaches the database and the queue over proxies of its own.

    A worker whose work was taken over ends by itself (exit 1) once it learns of it; whoever runs it starts it again.
    """

    worker: Popen[bytes]
    database: Proxy
    queue: Proxy

    def cut(self, *, silently: bool) -> None:
        """Cut it off from both."""
        self.database.cut(silently=silently)
        self.queue.cut(silently=silently)

    def restore(self) -> None:
        """Bring it back."""
        self.database.restore()
        self.queue.restore()


def _host(stage: Scene, stack: ExitStack) -> Host:
    assert stage.postgresql is not None
    assert stage.valkey is not None
    database = stack.enter_context(Proxy(stage.postgresql.port))
    queue = stack.enter_context(Proxy(stage.valkey.port))
    direct = stage.database_url, stage.broker_url
    stage.database_url, stage.broker_url = stage.postgresql.url_on(database.port), stage.valkey.url_on(queue.port)
    worker = stage.work()
    stage.database_url, stage.broker_url = direct
    return Host(worker, database, queue)


# ---------------------------------------------------------------- cut off


def cut_off(size: Size, *, kind: str, recipients: int = 16_000, times: int = 1, silently: bool = True) -> Account:
    """A host is cut off from database and queue for longer than its lease, and comes back."""
    recipients = size.choose(size.recipients, recipients, 40_000)
    times = size.choose(size.times, times, 10)
    with ExitStack() as stack:
        # Half a thousand a second: the cut comes in the middle, however long it lasts.
        stage = stack.enter_context(scene("postgresql", rate=300, plain=False, lease_seconds=LEASE_SECONDS))
        stage.people(recipients)
        hosts = [_host(stage, stack) for _ in range(2)]
        stack.callback(stage.end_processes)
        stage.publish(_mails(stage, kind, recipients))
        wrong: list[str] = []
        workers = [host.worker for host in hosts]
        for number in range(times):
            stage.reach(int(recipients * (number + 0.5) / (times + 1)), seconds=120)
            wrong += _cut_once(stage, hosts[0], silently=silently)
            # As a supervisor does. It is the one that is cut off again.
            if until(lambda: hosts[0].worker.poll() is not None, seconds=15):
                hosts[0] = _host(stage, stack)
                workers.append(hosts[0].worker)
                until(lambda: stage.started(hosts[0].worker), seconds=30)
        return _ended(stage, workers, wrong, bound=0 if kind == "hold" else IN_FLIGHT)


def _mails(stage: Scene, kind: str, recipients: int) -> list[Intent]:
    """What is on its way: invoices are the hold class, a notice is sent again where its outcome is unknown."""
    if kind == "hold":
        return stage.invoices(recipients // 4, accounts=recipients // 4)
    return [stage.notice()]


def _cut_once(stage: Scene, host: Host, *, silently: bool) -> list[str]:
    stage.witness.fault("cut off", pid=host.worker.pid)
    began = time.monotonic()
    host.cut(silently=silently)
    taken_over = until(lambda: not _owns(stage, host.worker.pid), seconds=TAKEN_OVER_AFTER_SECONDS, every=0.25)
    took = time.monotonic() - began
    time.sleep(max(0.0, CUT_SECONDS - took))
    stage.witness.fault("back", pid=host.worker.pid)
    host.restore()
    if taken_over:
        print(f"    taken over after {took:.1f} s", flush=True)
        return []
    return [f"the work of a host that was cut off was not taken over within {TAKEN_OVER_AFTER_SECONDS:.0f} s"]


def _owns(stage: Scene, pid: int) -> bool:
    """Whether a worker process still owns slices."""
    assert stage.postgresql is not None
    query = "SELECT count(*) FROM slices JOIN workers ON workers.id = slices.owner WHERE done_at IS NULL AND pid = "
    return bool(stage.postgresql.call(f"{query}{pid}")[0][0])


def _ended(stage: Scene, workers: list[Popen[bytes]], wrong: list[str], *, bound: int) -> Account:
    began = time.monotonic()
    if not stage.until_done(TAKEN_OVER_SECONDS + 3 * 60):
        wrong.append(f"not done {time.monotonic() - began:.0f} seconds after the last fault")
    for worker in workers:
        if worker.poll() is not None:
            if worker.returncode != 1 or "worker.replaced" not in stage.worker_log():
                wrong.append(f"a worker ended with {worker.returncode}, by itself")
            continue
        stage.terminate(worker)
        if worker.returncode:
            wrong.append(f"a worker that was told to stop ended with {worker.returncode}")
    account = stage.account(bound=bound, ends=("accepted", "held"))
    for sentence in wrong:
        account.wrong(sentence)
    return account


# ---------------------------------------------------------------- a link that is down

_NETWORK = "10.213.77"


@contextmanager
def other_host(name: str) -> Iterator[Callable[[str], bool] | None]:
    """A network namespace whose only link leads here; None where this machine lets us make none.

    Gives what takes its link "down" or "up"; here is `_NETWORK`.1.
    """
    commands = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", f"{name}-a", "type", "veth", "peer", "name", "eth0", "netns", name],
        ["ip", "addr", "add", f"{_NETWORK}.1/24", "dev", f"{name}-a"],
        ["ip", "link", "set", f"{name}-a", "up"],
        ["ip", "-n", name, "addr", "add", f"{_NETWORK}.2/24", "dev", "eth0"],
        ["ip", "-n", name, "link", "set", "eth0", "up"],
        ["ip", "-n", name, "link", "set", "lo", "up"],
    ]
    able = os.geteuid() == 0 and shutil.which("ip") is not None and all(_runs(command) for command in commands)
    try:
        yield (lambda state: _runs(["ip", "link", "set", f"{name}-a", state])) if able else None
    finally:
        if os.geteuid() == 0 and shutil.which("ip") is not None:
            _runs(["ip", "link", "del", f"{name}-a"])
            _runs(["ip", "netns", "del", name])


def _runs(command: list[str]) -> bool:
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def link_down(size: Size, *, recipients: int = 8_000) -> Account:
    """A host in a network namespace whose link is down for longer than its lease, to the relay as well."""
    recipients = size.choose(size.recipients, recipients, 40_000)
    name = f"rc{os.getpid() % 100_000}"
    with other_host(name) as link, ExitStack() as stack:
        if link is None:
            print("    skipped: this machine lets nobody make a network namespace (root is needed)", flush=True)
            return Account()
        stage = stack.enter_context(scene("postgresql", rate=300, plain=False, lease_seconds=LEASE_SECONDS))
        assert stage.postgresql is not None
        assert stage.valkey is not None
        stage.people(recipients)
        here = f"{_NETWORK}.1"
        doors = [stack.enter_context(Proxy(port, host=here)) for port in
                 (stage.postgresql.port, stage.valkey.port, stage.sink.port)]  # fmt: skip
        near = stage.work()
        direct = stage.database_url, stage.broker_url
        stage.database_url = stage.postgresql.url_on(doors[0].port, here)
        stage.broker_url = stage.valkey.url_on(doors[1].port, here)
        stage.settings["ROLECAST_RELAY_URLS"] = f"smtp://{here}:{doors[2].port}?tls=none&connections=8"
        stage.settings["ROLECAST_ALLOW_PLAINTEXT"] = "1"
        far = _start(stage, stack, "ip", "netns", "exec", name, sys.executable, "-m", "worker.cli", "work")
        stage.database_url, stage.broker_url = direct
        del stage.settings["ROLECAST_RELAY_URLS"], stage.settings["ROLECAST_ALLOW_PLAINTEXT"]
        stack.callback(stage.end_processes)
        stage.publish([stage.notice()])
        stage.reach(recipients // 4)
        stage.witness.fault("link down")
        link("down")
        time.sleep(CUT_SECONDS)
        link("up")
        stage.witness.fault("link up")
        return _ended(stage, [near, far], [], bound=IN_FLIGHT)


# ---------------------------------------------------------------- clocks apart

_WITH_CLOCK = """
import sys, time
from pathlib import Path
hands, real = Path(sys.argv.pop(1)), time.time_ns
def shifted():
    said = hands.read_text().strip()
    return real() + int(said) * 10**9 if said[0] in "+-" else int(said) * 10**9
time.time_ns = shifted
time.time = lambda: shifted() / 1e9
from worker.cli import main
main()
"""
"""A command whose wall clock a file moves: `+120`, `-3600`, or where it stands, in seconds since 1970.

Not faketime: 0.9.10 breaks the waiting of Python's threads.
"""

YEAR_2038 = "2147483647"  # 2038-01-19 03:14:07


def clocks(size: Size, *, hands: Sequence[str], recipients: int = 6_000) -> Account:
    """R10: one of two hosts has a clock of its own: no second copy, nothing expired or given up."""
    recipients = size.choose(size.recipients, recipients, 40_000)
    accounts = recipients // 4
    with scene("postgresql", rate=300, plain=False, lease_seconds=LEASE_SECONDS) as stage, ExitStack() as stack:
        stage.people(recipients)
        face = stage.folder / "clock"
        face.write_text(hands[0])
        true = stage.work()
        wrong = _start(stage, stack, sys.executable, "-c", _WITH_CLOCK, str(face), "work")
        stage.publish([stage.notice(), *stage.invoices(50, accounts=accounts)])
        for number, said in enumerate(hands):
            stage.reach(recipients * number // len(hands))
            stage.witness.fault(f"clock {said}")
            face.write_text(said)
            stage.publish(stage.invoices(10, accounts=accounts, prefix=f"clock{number}"))
        return _ended(stage, [true, wrong], [], bound=0)


def _start(stage: Scene, stack: ExitStack, *command: str) -> Popen[bytes]:
    """Start a worker in its own way; ended at the end of the stack."""
    with (stage.folder / "work.log").open("ab") as log:
        process = Popen(command, env=stage.environment(), cwd=stage.folder, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


CAMPAIGNS: dict[str, Callable[[Size], Account]] = {
    "hosts-cut-off": partial(cut_off, kind="notice"),
    "hosts-cut-off-hold": partial(cut_off, kind="hold"),
    "hosts-refused": partial(cut_off, kind="notice", silently=False),
    "hosts-link-down": link_down,
    "hosts-clock-ahead": partial(clocks, hands=("+120",)),
    "hosts-clock-behind": partial(clocks, hands=("-120",)),
    "hosts-clock-jumps": partial(clocks, hands=("+0", "-3600", YEAR_2038, "+0")),
}
