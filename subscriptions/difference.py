"""What a batch of changes comes to, as its caller is told: counts, and the first names of each kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

LISTED: Final = 1000
#: Names that a difference lists of each kind; it counts all. Keeps a million changes in flat memory.


@dataclass(slots=True)
class Tally:
    """How many there are, and the first of them by name."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more; its name is kept while there are few."""
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(name)

    @property
    def full(self) -> bool:
        """Whether it keeps no more names."""
        return len(self.first) >= LISTED

    def join(self, other: Tally) -> None:
        """Count what another batch counted."""
        self.count += other.count
        self.first.extend(other.first[: max(0, LISTED - len(self.first))])


@dataclass(slots=True)
class Difference:
    """What a batch of changes does to the directory, or did; grows while batches are added.

    Names are ACCOUNT, ACCOUNT/CONTACT, `ACCOUNT/CONTACT ROLE`, `ACCOUNT/CONTACT ROLE:CATEGORY (set by)` and
    `ADDRESS CAUSE (source)`. Kept is what the batch left out or would have lifted, but may not: others set it.
    Notes are sentences on what was accepted but is void, or vacant (S-23, S-41, S-43).
    """

    accounts_added: Tally = field(default_factory=Tally)
    accounts_changed: Tally = field(default_factory=Tally)
    accounts_removed: Tally = field(default_factory=Tally)
    accounts_unchanged: int = 0
    contacts_added: Tally = field(default_factory=Tally)
    contacts_changed: Tally = field(default_factory=Tally)
    contacts_removed: Tally = field(default_factory=Tally)
    contacts_unchanged: int = 0
    roles_given: Tally = field(default_factory=Tally)
    roles_taken: Tally = field(default_factory=Tally)
    opt_outs_set: Tally = field(default_factory=Tally)
    opt_outs_lifted: Tally = field(default_factory=Tally)
    opt_outs_kept: Tally = field(default_factory=Tally)
    suppressions_set: Tally = field(default_factory=Tally)
    suppressions_lifted: Tally = field(default_factory=Tally)
    suppressions_kept: Tally = field(default_factory=Tally)
    notes: Tally = field(default_factory=Tally)

    def join(self, other: Difference) -> None:
        """Add what another batch does."""
        self.accounts_unchanged += other.accounts_unchanged
        self.contacts_unchanged += other.contacts_unchanged
        for name in TALLIES:
            getattr(self, name).join(getattr(other, name))

    @property
    def empty(self) -> bool:
        """Whether nothing changes."""
        return not any(getattr(self, name).count for name in TALLIES if not name.endswith(("_kept", "notes")))

    def to_json(self) -> dict[str, Any]:
        """The difference as JSON values: counts, and the first names of each kind under `first`."""
        answer: dict[str, Any] = {}
        for name in TALLIES:
            tally = getattr(self, name)
            kind, _, what = name.rpartition("_")
            answer.setdefault(kind or what, {})[what] = {"count": tally.count, "first": list(tally.first)}
        answer["accounts"]["unchanged"] = {"count": self.accounts_unchanged}
        answer["contacts"]["unchanged"] = {"count": self.contacts_unchanged}
        answer["notes"] = answer["notes"]["notes"]
        return answer

    def lines(self) -> list[tuple[str, int, list[str]]]:
        """A row for each kind that occurs: what (`contacts added`), how many, and the first names of them."""
        rows = [(name.replace("_", " "), getattr(self, name).count, getattr(self, name).first) for name in TALLIES]
        rows.insert(3, ("accounts unchanged", self.accounts_unchanged, []))
        rows.insert(7, ("contacts unchanged", self.contacts_unchanged, []))
        return [row for row in rows if row[1]]


TALLIES: Final = tuple(
    name for name in Difference.__dataclass_fields__ if name not in {"accounts_unchanged", "contacts_unchanged"}
)
"""The fields of a difference that name what they count."""
