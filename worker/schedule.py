"""When a mail that was refused for now goes again, and when it is over (reliability.md R19).

Pure: a retry is never closer than a minute, is spread by a fifth to either side, and never comes after the mail's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

MINUTE = 60_000_000
HOUR = 60 * MINUTE

SOON_SECONDS = 60
#: How long a mail rests whose relay ended the session: that says nothing of the mail, so it costs no attempt (R18).


class Over(StrEnum):
    """Why a mail is not tried again, as the ledger's reason."""

    GIVEN_UP = "given_up"
    EXPIRED = "expired"


def retry_at(
    attempts: int,
    *,
    minutes: Sequence[int],
    give_up_hours: int,
    now: int,
    owed_since: int,
    expires_at: int | None,
    spread: float,
) -> int | Over:
    """When a mail goes again after so many attempts, microseconds; or why it never does.

    `minutes` are the waits by attempts made, the last one repeats; `spread` lies in 0..1 and shifts a wait by up to a
    fifth to either side. `owed_since` is when the mail was first owed: its event's acceptance, or `not_before`.
    """
    wait = minutes[min(attempts, len(minutes)) - 1] * MINUTE
    at = now + max(MINUTE, int(wait * (0.8 + 0.4 * spread)))
    return in_time(at, give_up_hours=give_up_hours, owed_since=owed_since, expires_at=expires_at)


def in_time(at: int, *, give_up_hours: int, owed_since: int, expires_at: int | None) -> int | Over:
    """`at`, where the mail may still go then; else which end comes before it, the earlier of the two."""
    ends = owed_since + give_up_hours * HOUR
    if expires_at is not None and expires_at <= min(at, ends):
        return Over.EXPIRED
    return at if at < ends else Over.GIVEN_UP
