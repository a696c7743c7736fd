"""Worker processes and the web side killed, stopped and frozen in the middle of their work (R1, R2, R4, R5, R23, R32).

A killed process is started again at once. The moments are drawn over the progress of the whole run, as the sink sees
it; one in ten falls wherever it falls, also while a process starts, the others while the victim has flights open.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.account import IN_FLIGHT, Account
from tests.faults.servers import until
from tests.faults.stage import Configuration, Scene, Size, children_of, event, listens, scene

MEAN_COPIES = 12.0
"""Second copies a kill on average: 8 connections, each with one mail whose answer is due, and the settle buffer."""

GRACE_SECONDS = 30.0
"""A container's grace between SIGTERM and SIGKILL."""

RESCUED_SECONDS = 60.0
"""Within which the work of a crashed process goes on elsewhere (R32)."""

CHILDREN = 4
"""What `rolecast work --processes 2` starts: two for bulk, one for each other lane."""

LAST_MOMENT = 0.97
DONE_SECONDS = 180.0
"""How long the rest may take once the last fault is over."""


class Workers:
    """The worker processes of a scene: so many are kept running."""

    def __init__(self, stage: Scene, how_many: int) -> None:
        self._stage = stage
        self.running = [stage.work() for _ in range(how_many)]

    def all_started(self) -> bool:
        """Whether each of them works."""
        return all(self._stage.started(one) for one in self.running)

    def chosen(self, dice: random.Random, *, flying: bool, seconds: float = 20.0) -> subprocess.Popen[bytes]:
        """One of them; with `flying` one that has flights open (it is waited for, unless nobody has any in time)."""
        ends = time.monotonic() + seconds
        time.sleep(dice.uniform(0.0, 0.3))
        while flying and time.monotonic() < ends:
            sending = self._stage.flying()
            if found := [one for one in self.running if one.pid in sending and one.poll() is None]:
                return dice.choice(found)
            self.revive()
            time.sleep(0.005)
        return dice.choice(self.running)

    def replace(self, ended: subprocess.Popen[bytes]) -> None:
        """Start another for one that ended."""
        self.running[self.running.index(ended)] = self._stage.work()

    def revive(self) -> None:
        """Start another for each that ended by itself."""
        for one in [one for one in self.running if one.poll() is not None]:
            self.replace(one)


def workers_of(configuration: Configuration) -> int:
    """How many worker processes a configuration may have: with memory:// one works at a time."""
    return 1 if configuration == "sqlite" else 2


# ---------------------------------------------------------------- SIGKILL


def broadcast(
    size: Size, configuration: Configuration, *, average: float | None = MEAN_COPIES, lease_seconds: int = 3
) -> Account:
    """SIGKILL of worker processes during a broadcast."""
    recipients = size.choose(size.recipients, 3_000, 20_000)
    kills = size.choose(size.kills, 30, 200)
    dice = size.dice(f"broadcast {configuration}")
    with scene(configuration, lease_seconds=lease_seconds) as stage:
        stage.people(recipients)
        stage.publish([stage.notice()])
        strike(stage, Workers(stage, workers_of(configuration)), dice, mails=recipients, kills=kills)
        stage.until_done(DONE_SECONDS)
        return _told(stage, stage.account(average=average))


def hold(size: Size, configuration: Configuration) -> Account:
    """SIGKILL of worker processes while mail of the hold class is sent: no second copy, every held mail listed."""
    mails = size.choose(size.recipients, 600, 2_000)
    kills = size.choose(size.kills, 10, 40)
    dice = size.dice(f"hold {configuration}")
    with scene(configuration, rate=150) as stage:
        singles = mails // 4
        publish_hold_class(stage, crowd=mails - singles, singles=singles)
        strike(stage, Workers(stage, workers_of(configuration)), dice, mails=mails, kills=kills)
        stage.until_done(DONE_SECONDS)
        account = _told(stage, stage.account(bound=0))
        all_listed(stage, account)
        return account


def publish_hold_class(stage: Scene, *, crowd: int, singles: int) -> None:
    """A statement to `crowd` contacts of one account, and `singles` invoices."""
    people = [{"id": f"p{n}", "email": f"p{n}@crowd.example", "roles": ["accounting"]} for n in range(crowd)]
    documents: list[dict[str, Any]] = [{"id": "crowd", "catalogue": "billtrust", "contacts": people}]
    documents += [{"id": f"a{n}", "catalogue": "billtrust",
                   "contacts": [{"id": "a0", "email": f"a0@a{n}.example", "roles": ["accounting"]}]}
                  for n in range(min(singles, 100))]  # fmt: skip
    path = stage.folder / "hold.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in documents), encoding="utf-8")
    stage.run("accounts", "import", str(path))
    stage.witness.audience("crowd", [str(one["email"]) for one in people])
    data = {"account": "crowd", "period": "November 2026", "balance": "100.00", "currency": "EUR"}
    statement = event("statement.issued", "statement-1", data, audience="crowd")
    invoices = stage.invoices(singles, accounts=100)
    stage.publish([statement, *invoices])


def strike(stage: Scene, workers: Workers, dice: random.Random, *, mails: int, kills: int) -> None:
    """So many kills, spread over the progress to `mails`; a killed process is started again at once."""
    moments = sorted(dice.uniform(-0.02, LAST_MOMENT) for _ in range(kills))
    for moment in moments:
        stage.reach(int(moment * mails), seconds=60, meanwhile=workers.revive)
        victim = workers.chosen(dice, flying=dice.random() < 0.9)
        stage.kill(victim)
        workers.replace(victim)


def children(size: Size) -> Account:
    """SIGKILL of children of `rolecast work --processes 2`: the parent replaces each."""
    recipients = size.choose(size.recipients, 2_000, 20_000)
    kills = size.choose(size.kills, 12, 200)
    dice = size.dice("children")
    with scene("postgresql") as stage:
        stage.people(recipients)
        stage.publish([stage.notice()])
        parent = stage.work("--processes", "2")
        if not until(lambda: len(children_of(parent.pid)) == CHILDREN or parent.poll() is not None, seconds=30):
            return _never_started("`rolecast work --processes 2` did not start four processes")
        if parent.poll() is not None:
            return _never_started(f"`rolecast work --processes 2` ended with {parent.returncode}")
        for moment in sorted(dice.uniform(0.0, LAST_MOMENT) for _ in range(kills)):
            stage.reach(int(moment * recipients), seconds=60)
            time.sleep(dice.uniform(0.0, 0.3))
            there = children_of(parent.pid)
            flying = [one for one in there if one in stage.flying()]
            victim = dice.choice(flying if flying and dice.random() < 0.9 else there or [0])
            if victim:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                stage.witness.fault("kill", pid=victim)
        # One that dies again and again is started later and later, at most after 30 seconds.
        whole = until(lambda: len(children_of(parent.pid)) == CHILDREN, seconds=45)
        stage.until_done(DONE_SECONDS)
        account = _told(stage, stage.account(average=MEAN_COPIES))
        if not whole:
            account.wrong(f"the parent has {len(children_of(parent.pid))} processes in the end, not {CHILDREN}")
        if stage.terminate(parent) > GRACE_SECONDS:
            account.wrong(f"the parent took more than {GRACE_SECONDS:.0f} seconds to end")
        return account


def recovery(size: Size) -> Account:
    """SIGKILL of one of two workers under the usual lease of 30 seconds: its work goes on within 60 (R32)."""
    recipients = size.choose(size.recipients, 3_000, 3_000)
    with scene("postgresql", lease_seconds=30) as stage:
        stage.people(recipients)
        workers = Workers(stage, 2)
        until(workers.all_started, seconds=30)
        stage.publish([stage.notice()])
        stage.reach(recipients // 5)
        stage.kill(workers.chosen(size.dice("recovery"), flying=True))
        began = time.monotonic()
        stage.until_done(RESCUED_SECONDS + 30)
        took = time.monotonic() - began
        account = _told(stage, stage.account())
        print(f"  everything was done {took:.1f} seconds after the kill")
        if took > RESCUED_SECONDS:
            account.wrong(f"it took {took:.0f} seconds until a survivor had done the work")
        return account


# ---------------------------------------------------------------- SIGTERM


def terms(size: Size, configuration: Configuration) -> Account:
    """SIGTERM during a broadcast, started again each time: no second copy, and an end within the grace (R4)."""
    recipients = size.choose(size.recipients, 3_000, 20_000)
    times = size.choose(size.times, 10, 20)
    dice = size.dice(f"terms {configuration}")
    slow = []
    with scene(configuration) as stage:
        stage.people(recipients)
        stage.publish([stage.notice()])
        workers = Workers(stage, workers_of(configuration))
        for moment in sorted(dice.uniform(0.0, LAST_MOMENT) for _ in range(times)):
            stage.reach(int(moment * recipients), seconds=60)
            victim = workers.chosen(dice, flying=True)
            try:
                took = stage.terminate(victim, seconds=2 * GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                took = 2 * GRACE_SECONDS
                stage.kill(victim)
            slow.append((took, victim.returncode))
            workers.replace(victim)
        stage.until_done(DONE_SECONDS)
        account = _told(stage, stage.account(bound=0))
    print(f"  ended after {max(took for took, _ in slow):.1f} seconds at most")
    if late := [round(took, 1) for took, _ in slow if took > GRACE_SECONDS]:
        account.wrong(f"{len(late)} ends took more than {GRACE_SECONDS:.0f} seconds", late)
    if codes := {code for _, code in slow if code != 0}:
        account.wrong("workers did not end with 0", codes)
    return account


# ---------------------------------------------------------------- SIGSTOP


def freezes(size: Size, kind: str) -> Account:
    """A worker is frozen past its lease, another takes over, and it goes on (R5)."""
    times = size.choose(size.times, 10, 20)
    dice = size.dice(f"freezes {kind}")
    mails = (60 if kind == "hold" else 200) * times + 200
    with scene("postgresql", rate=150 if kind == "hold" else 300, lease_seconds=2) as stage:
        if kind == "hold":
            publish_hold_class(stage, crowd=mails - 100, singles=100)
        else:
            stage.people(mails)
            stage.publish([stage.notice()])
        workers = Workers(stage, 2)
        until(workers.all_started, seconds=30)
        for number in range(times):
            stage.reach(int(number / times * mails) + 20, seconds=60)
            victim = workers.chosen(dice, flying=True)
            victim.send_signal(signal.SIGSTOP)
            stage.witness.fault("stop", pid=victim.pid)
            # Until the others have seen that its lease is over and have taken its work.
            until(lambda one=victim: not stage.started(one), seconds=20, every=0.1)  # type: ignore[misc]
            time.sleep(dice.uniform(0.2, 1.5))
            victim.send_signal(signal.SIGCONT)
            time.sleep(0.3)
            workers.revive()
        stage.until_done(DONE_SECONDS)
        return _told(stage, stage.account(bound=0 if kind == "hold" else IN_FLIGHT))


# ---------------------------------------------------------------- the web side


def web(size: Size, configuration: Configuration) -> Account:
    """SIGKILL of the web side while events are published over HTTP; the client tries again: one event each (R23)."""
    count = size.choose(size.recipients, 300, 1_000)
    kills = size.choose(size.kills, 8, 40)
    dice = size.dice(f"web {configuration}")
    with scene(configuration, rate=0) as stage:
        stage.people(400)
        intents = stage.invoices(count, accounts=100)
        process, port, key = stage.serve()
        Workers(stage, 1)
        todo = list(intents)
        lock = threading.Lock()
        gave_up: list[str] = []

        def publish() -> None:
            while True:
                with lock:
                    if not todo:
                        return
                    intent = todo.pop()
                told = stage.witness.publish_http_until_told(port, key, intent, seconds=90)
                if told.answer != "ok":
                    gave_up.append(f"{intent.event['id']}: {told.code} {told.said[:200]}")

        threads = [threading.Thread(target=publish) for _ in range(8)]
        for thread in threads:
            thread.start()
        for number in range(kills):
            wanted = int((1 - (number + dice.random()) / (kills + 1)) * count)
            until(lambda most=wanted: len(todo) <= most, seconds=60)  # type: ignore[misc]
            time.sleep(dice.uniform(0.0, 0.02))
            stage.kill(process)
            process = stage.start("serve")
            until(lambda: listens(port), seconds=30)
        for thread in threads:
            thread.join()
        stage.until_done(DONE_SECONDS)
        account = _told(stage, stage.account(bound=0))
        if gave_up:
            account.wrong(f"{len(gave_up)} events were not taken in the end", gave_up)
        if account.published != count:
            account.wrong(f"{account.published} events for {count} that were published")
        return account


# ---------------------------------------------------------------- what all do at the end


def _told(stage: Scene, account: Account) -> Account:
    """Print what each fault cost."""
    print(f"  second copies after each of {len(account.copies_by_fault)} faults: {account.copies_by_fault}", flush=True)
    if account.copies:
        print(f"  the oldest answer that was lost had come {account.lost_answers_ms:.0f} ms before", flush=True)
    if not account.passed:
        kept = Path("bench-results") / f"faults-{time.strftime('%Y%m%d-%H%M%S')}"
        kept.mkdir(parents=True, exist_ok=True)
        for path in (stage.witness.path, stage.log, stage.folder / "work.log"):
            shutil.copy(path, kept)
        print(f"  the witness, the sink's log and what the workers said are kept in {kept}", flush=True)
    return account


def all_listed(stage: Scene, account: Account, *, most: int = 5) -> None:
    """Held mail stands in `rolecast deliveries list --status held`, with the reason `unknown`: of so many events."""
    for source, id_ in stage.with_held()[:most]:
        ran = stage.run("deliveries", "list", source, id_, "--status", "held", "--limit", "100000", "--json")
        listed = json.loads(ran.output)["deliveries"]
        held = stage.held(source, id_)
        if {one["n"] for one in listed} != held:
            account.wrong(f"{len(held)} mails of {id_} are held and {len(listed)} are listed")
        if odd := {one["reason"] for one in listed} - {"unknown"}:
            account.wrong(f"mails of {id_} are held for another reason", odd)


def _never_started(sentence: str) -> Account:
    account = Account()
    account.wrong(sentence)
    return account


CAMPAIGNS: dict[str, Callable[[Size], Account]] = {
    "kills-sqlite": partial(broadcast, configuration="sqlite"),
    "kills-postgresql": partial(broadcast, configuration="postgresql"),
    "kills-children": children,
    "hold-sqlite": partial(hold, configuration="sqlite"),
    "hold-postgresql": partial(hold, configuration="postgresql"),
    "recovery": recovery,
    "terms-sqlite": partial(terms, configuration="sqlite"),
    "terms-postgresql": partial(terms, configuration="postgresql"),
    "freezes": partial(freezes, kind="others"),
    "freezes-hold": partial(freezes, kind="hold"),
    "web-sqlite": partial(web, configuration="sqlite"),
    "web-postgresql": partial(web, configuration="postgresql"),
}
