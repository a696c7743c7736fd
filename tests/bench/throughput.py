"""Broadcasts: each sender in turn, again and again, so that what else the machine does meets them all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.bench import figures
from tests.bench.installation import (
    IN_FULL,
    IN_PARTS,
    ONE,
    PIPELINING,
    POSTGRESQL,
    REDIS,
    Configuration,
    Installation,
    Run,
    Servers,
    make,
)
from tests.bench.senders import PEERS, NotInstalled, length_for, smtp_source

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is sent: `recipients` of the broadcasts that are compared, other sizes, mails of a peer, repetitions."""

    recipients: int = 200_000
    others: tuple[int, ...] = (10_000,)
    peer_mails: int = 2_000
    repetitions: int = 3
    configurations: tuple[Configuration, ...] = (ONE, REDIS, POSTGRESQL)
    at_full_size: tuple[Configuration, ...] = (PIPELINING, IN_PARTS, IN_FULL)


@dataclass(slots=True)
class Throughput:
    """What was measured: runs by sender and recipients."""

    runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    not_installed: list[str] = field(default_factory=list)
    homes: dict[tuple[str, int], Installation] = field(default_factory=dict)

    def add(self, run: Run) -> None:
        """Keep one run."""
        self.runs.setdefault((run.name, run.recipients), []).append(run)

    def median(self, name: str, of: Callable[[Run], float], recipients: int | None = None) -> float | None:
        """The median of something over the runs of a sender, by default of its largest size; None without any."""
        sizes = [size for key, size in self.runs if key == name and recipients in (None, size)]
        return figures.median([of(run) for run in self.runs[name, max(sizes)]]) if sizes else None

    def sizes(self, name: str) -> list[int]:
        """The sizes that a sender was measured with, the smallest first."""
        return sorted(size for key, size in self.runs if key == name)


def measure(servers: Servers, sizes: Sizes, tell: Tell) -> Throughput:
    """Everything about throughput. Raises `SystemExit` where a sender fails."""
    found = Throughput()
    for recipients in (*sizes.others, sizes.recipients):
        for configuration in sizes.configurations:
            tell(f"importing {recipients:,} recipients: {configuration.label}")
            found.homes[configuration.key, recipients] = make(configuration, servers, recipients)
    for configuration in sizes.at_full_size:
        like = found.homes[REDIS.key, sizes.recipients]
        found.homes[configuration.key, sizes.recipients] = make(configuration, servers, sizes.recipients, like=like)
    for repetition in range(sizes.repetitions):
        for name, run in _senders(found, servers, sizes):
            tell(f"repetition {repetition + 1} of {sizes.repetitions}: {name}")
            try:
                found.add(run())
            except NotInstalled:
                if name not in found.not_installed:
                    found.not_installed.append(name)
    if ONE in sizes.configurations:
        tell(f"rolecast publish --wait, {sizes.recipients:,} recipients")
        found.add(found.homes[ONE.key, sizes.recipients].by_one_command())
    return found


def _senders(found: Throughput, servers: Servers, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Everybody once: name, and what measures it."""
    for home in sorted(found.homes.values(), key=lambda home: -home.recipients):
        yield f"{home.configuration.label}, {home.recipients:,} recipients", broadcaster(home)
    yield "smtp-source", lambda: source(found, servers, sizes.recipients)
    for peer in PEERS:
        yield peer.label, lambda peer=peer: peer.run(servers, sizes.peer_mails)  # type: ignore[misc]  # no type for the bound one


def broadcaster(home: Installation) -> Callable[[], Run]:
    """What starts the workers of an installation, sends one broadcast, and ends them."""

    def run() -> Run:
        with home.at_work():
            return home.broadcast()

    return run


def source(found: Throughput, servers: Servers, mails: int) -> Run:
    """smtp-source with mails as long as ours, the first that were measured. Raises `NotInstalled`."""
    ours = next(iter(found.runs.values()))[0]
    return smtp_source(servers, mails, length=length_for(servers, ours.bytes_a_mail))
