"""A worker killed at the named points of R3, without a hook in the product.

Every point is a moment on the wire: proxies before the relay, PostgreSQL and the queue see it pass, kill the worker
and then let the bytes through or not. One mail is under way at a time, so that nothing else can be hit. What may come
of it: a second copy only where the sink had taken the mail (others), a held mail only where its mark was durable
(hold class); at every other point nothing is seen of the kill.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

from tests.faults.account import Account
from tests.faults.kills import all_listed
from tests.faults.proxy import Proxy, Verdict
from tests.faults.servers import until
from tests.faults.stage import Scene, Size, event, scene
from tests.faults.witness import Intent

Class = Literal["hold", "others"]

ACCOUNTS = 20
REACHED_SECONDS = 30.0
"""How long a point is waited for."""
DONE_SECONDS = 45.0
"""How long the mail of a killed worker may take to be settled by the next one."""


@dataclass(slots=True)
class Wires:
    """The three proxies, and the worker that is to be killed."""

    relay: Proxy
    database: Proxy
    queue: Proxy
    victim: int = 0
    reached: threading.Event = field(default_factory=threading.Event)

    def aim(self, victim: int) -> None:
        """Watch for nothing any more; the next kill is this process's."""
        for one in (self.relay, self.database, self.queue):
            one.forget()
        self.victim, self.reached = victim, threading.Event()

    def strike(self, then: Verdict) -> Callable[[], Verdict]:
        """An action: kill the worker; `then` says what becomes of the bytes that are passing."""
        victim, reached = self.victim, self.reached

        def act() -> Verdict:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            _until_dead(victim)
            reached.set()
            return then

        return act

    def arm(self, proxy: Proxy, side: Literal["client", "server"], pattern: bytes, then: Verdict) -> None:
        """Kill when the pattern passes the next time."""
        (proxy.on_client if side == "client" else proxy.on_server)(pattern, self.strike(then))


def _until_dead(pid: int) -> None:
    """A zombie is dead: its parent, this process, waits for it later."""
    until(lambda: _state(pid) in {"", "Z"}, seconds=5, every=0.001)


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Point:
    """A named point: what arms the wires, and what a kill there may cost by class."""

    name: str
    arm: Callable[[Wires], None]
    classes: tuple[Class, ...] = ("hold", "others")
    held: bool = False  # in the hold class the mail is held
    copy: bool = False  # of the others there is a second copy


def _enqueue(wires: Wires) -> None:
    wires.arm(wires.queue, "client", b"RPUSH", "drop")


def _connect(wires: Wires) -> None:
    wires.relay.reset()  # a connection that rests in the pool would be used, and nothing connected
    wires.arm(wires.relay, "server", b"220 ", "drop")


def _mark(wires: Wires) -> None:
    def said() -> Verdict:
        wires.arm(wires.database, "client", b"INSERT INTO flights", "drop")
        return None

    wires.relay.on_server(b"354 ", said)


def _body(wires: Wires) -> None:
    wires.arm(wires.relay, "server", b"354 ", "drop")


def _marked(wires: Wires) -> None:
    def marking() -> Verdict:
        wires.arm(wires.database, "server", b"COMMIT\0", "drop")
        return None

    wires.database.on_client(b"INSERT INTO flights", marking)


def _dot_lost(wires: Wires) -> None:
    wires.arm(wires.relay, "client", b"\r\n.\r\n", "drop")


def _dot_taken(wires: Wires) -> None:
    wires.arm(wires.relay, "client", b"\r\n.\r\n", None)


def _reply(wires: Wires) -> None:
    def said() -> Verdict:
        wires.arm(wires.database, "client", b"UPDATE deliveries", "drop")
        return None

    wires.relay.on_server(b"250 2.0.0 Ok: queued", said)


POINTS = (
    Point("commit-enqueue", _enqueue),
    Point("claim-connect", _connect),
    Point("354-mark", _mark, classes=("hold",)),
    Point("354-dot", _body, classes=("others",)),
    Point("mark-dot", _marked, classes=("hold",), held=True),
    Point("dot-reply-lost", _dot_lost, held=True),
    Point("dot-reply-taken", _dot_taken, held=True, copy=True),
    Point("reply-commit", _reply, held=True, copy=True),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One kill: where, and of which class the mail is."""

    point: Point
    class_: Class
    number: int

    @property
    def copies(self) -> int:
        """How many second copies it may make."""
        return int(self.point.copy and self.class_ == "others")

    @property
    def held(self) -> bool:
        """Whether its mail may end as held."""
        return self.point.held and self.class_ == "hold"

    def intent(self) -> Intent:
        """Its event, which has one recipient."""
        owner, id_ = f"a{self.number % ACCOUNTS}", f"{self.point.name}-{self.class_}-{self.number}"
        audience = f"{self.class_}@{owner}.example"
        if self.class_ == "hold":
            data = {"account": owner, "number": id_, "amount": "12.50", "currency": "EUR", "due_on": "2027-01-31"}
            return event("invoice.issued", id_, data, audience=audience)
        data = {"accounts": [owner], "title": f"Notice {id_}", "body": "Exports come from a new address."}  # type: ignore[dict-item]
        return event("service.notice", id_, data, audience=audience)


def points(size: Size, *, only: Sequence[str] = ()) -> Account:
    """SIGKILL exactly at each named point of a mail's way (R3)."""
    times = size.choose(size.times, 10, 50)
    trials = [Trial(point, class_, number) for point in POINTS if not only or point.name in only
              for class_ in point.classes for number in range(times)]  # fmt: skip
    with scene("postgresql", rate=0, lease_seconds=1) as stage, wires_of(stage) as wires:
        _people(stage)
        _, port, key = stage.serve()
        missed = []
        ended = []
        for trial in trials:
            victim = _through(stage, wires)
            if not until(stage.done, seconds=DONE_SECONDS, every=0.05):
                ended.append(trial.intent().event["id"])
            if not _play(stage, wires, trial, victim, port, key):
                missed.append(trial.intent().event["id"])
        wires.aim(0)
        _through(stage, wires)
        stage.until_done(DONE_SECONDS)
        account = stage.account(bound=1)
        _judge(stage, account, trials)
        all_listed(stage, account, most=2)
        if missed:
            account.wrong(f"{len(missed)} points were not reached within {REACHED_SECONDS:.0f} seconds", missed)
        if ended:
            account.wrong(f"before these, earlier mail was not settled within {DONE_SECONDS:.0f} seconds", ended)
        return account


def frozen_mark(size: Size) -> Account:
    """A worker frozen past its lease while the mark of a mail is being committed: no second copy (R5)."""
    times = size.choose(size.times, 3, 20)
    with scene("postgresql", rate=0, lease_seconds=2) as stage, wires_of(stage) as wires:
        _people(stage)
        _, port, key = stage.serve()
        unreached = 0
        for number in range(times):
            trial = Trial(Point("mark", _mark), "hold", number)
            frozen = _through(stage, wires)
            until(lambda one=frozen: stage.started(one), seconds=30)  # type: ignore[misc]
            wires.aim(frozen.pid)
            thawed = _freeze_at_commit(stage, wires, frozen, mails=stage.accepted() + 1)
            stage.witness.publish_http(port, key, trial.intent())
            unreached += not thawed.wait(2 * REACHED_SECONDS)
            wires.aim(0)
            until(stage.done, seconds=DONE_SECONDS, every=0.1)
            stage.end_workers()
        account = stage.account(bound=0)
        if unreached:
            account.wrong(f"in {unreached} of {times} trials nobody took over what the frozen worker had")
        return account


def _freeze_at_commit(stage: Scene, wires: Wires, frozen: subprocess.Popen[bytes], *, mails: int) -> threading.Event:
    """Freeze the worker when its COMMIT of a mark is on its way, until another has sent the mail; then both go on."""
    thawed = threading.Event()

    def committing() -> Verdict:
        frozen.send_signal(signal.SIGSTOP)
        stage.witness.fault("stop", pid=frozen.pid)
        stage.work()
        if stage.reach(mails, seconds=REACHED_SECONDS):
            thawed.set()
        frozen.send_signal(signal.SIGCONT)
        return None

    def marking() -> Verdict:
        wires.database.on_client(b"COMMIT", committing)
        return None

    wires.database.on_client(b"INSERT INTO flights", marking)
    return thawed


def _play(stage: Scene, wires: Wires, trial: Trial, victim: subprocess.Popen[bytes], port: int, key: str) -> bool:
    """Publish one event and kill the worker at the point; whether it was reached."""
    until(lambda: stage.started(victim), seconds=30)
    wires.aim(victim.pid)
    trial.point.arm(wires)
    stage.witness.publish_http(port, key, trial.intent())
    reached = wires.reached.wait(REACHED_SECONDS)
    stage.kill(victim, name=f"{trial.point.name} {trial.class_}")
    wires.aim(0)
    return reached


def _judge(stage: Scene, account: Account, trials: Sequence[Trial]) -> None:
    """Each kill costs what its point may cost, and no more."""
    copies = account.copies_by_fault
    held = {id_ for _, id_ in stage.with_held()}
    for point in POINTS:
        for class_ in point.classes:
            mine = [n for n, trial in enumerate(trials) if trial.point is point and trial.class_ == class_]
            made = sum(copies[n] for n in mine)
            kept = sum(trials[n].intent().event["id"] in held for n in mine)
            if mine:
                print(
                    f"  {point.name:16} {class_:7} {len(mine):3} kills, {made:3} second copies, {kept:3} held",
                    flush=True,
                )
    for number, trial in enumerate(trials):
        name = trial.intent().event["id"]
        if copies[number] > trial.copies:
            account.wrong(f"{copies[number]} second copies at {name}, where {trial.copies} may be")
        if name in held and not trial.held:
            account.wrong(f"{name} is held, where nothing may be seen of the kill")


def _people(stage: Scene) -> None:
    """Accounts with one contact for each class."""
    roles = {"hold": "accounting", "others": "primary_support"}
    accounts = [
        {
            "id": f"a{number}",
            "catalogue": "billtrust",
            "contacts": [
                {"id": class_, "email": f"{class_}@a{number}.example", "roles": [role]}
                for class_, role in roles.items()
            ],
        }
        for number in range(ACCOUNTS)
    ]
    path = stage.folder / "points.json"
    path.write_text(json.dumps({"accounts": accounts}), encoding="utf-8")
    stage.run("accounts", "import", str(path))
    for number in range(ACCOUNTS):
        for class_ in roles:
            stage.witness.audience(f"{class_}@a{number}.example", [f"{class_}@a{number}.example"])


@contextmanager
def wires_of(stage: Scene) -> Iterator[Wires]:
    """Proxies before the relay, the database and the queue of a scene."""
    assert stage.postgresql is not None
    assert stage.valkey is not None
    with Proxy(stage.sink.port) as relay, Proxy(stage.postgresql.port) as database, Proxy(stage.valkey.port) as queue:
        yield Wires(relay, database, queue)


def _through(stage: Scene, wires: Wires) -> subprocess.Popen[bytes]:
    """Start a worker that reaches everything through the proxies."""
    assert stage.postgresql is not None
    assert stage.valkey is not None
    direct = stage.database_url, stage.broker_url
    stage.relay_port = wires.relay.port
    stage.database_url = stage.postgresql.url_on(wires.database.port)
    stage.broker_url = stage.valkey.url_on(wires.queue.port)
    try:
        return stage.work()
    finally:
        stage.database_url, stage.broker_url = direct
        stage.relay_port = 0


CAMPAIGNS: dict[str, Callable[[Size], Account]] = {"points": points, "freezes-mark": frozen_mark}
