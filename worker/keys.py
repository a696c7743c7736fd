"""API keys: who may publish over HTTP, what, and how far their mail goes.

A key is `rolecast_MODE_PUBLICID_SECRET`: the mode and the public id can be read by people and by secret scanners, the
secret is 256 random bits and ends with a checksum, so that a mistyped key is known without the database. Only a
SHA-256 of the whole key is stored: it is shown once, when it is made. Scopes: `publish:TYPE` or `publish:*`, `attest`
(who asked for an action and who approved it count), `read`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from sqlalchemy import Connection, Row, insert, select, update

from worker.intake import Publisher
from worker.schema import api_keys
from worker.settings import DELIVERY_MODES

Mode = Literal["live", "team", "test"]

_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_LETTERS = 43
#: 43 letters of 62 hold 256 bits.
_CHECK_LETTERS = 6
#: 6 letters of 62 hold a CRC-32.
_SHAPE = re.compile(
    rf"(rolecast_({'|'.join(DELIVERY_MODES)})_([0-9A-Za-z]{{12}})_[0-9A-Za-z]{{{_SECRET_LETTERS}}})"
    rf"([0-9A-Za-z]{{{_CHECK_LETTERS}}})"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
_NOBODY = hashlib.sha256(b"no key").digest()

RECORD_SECONDS = 60
#: The last use of a key is written down no more often than this.


class KeyRefused(Exception):  # noqa: N818 - it reads as the sentence it is
    """A key can't be made or found like that; `kind` says what the caller did: invalid, conflict or unknown."""

    def __init__(self, kind: Literal["invalid", "conflict", "unknown"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key as the database holds it; the secret itself is nowhere."""

    number: int
    public_id: str
    name: str
    mode: Mode
    scopes: frozenset[str]
    created_at: int
    used_at: int | None
    revoked_at: int | None
    unrecorded: bool = False  # the last use on record is old: `record_use` is due

    def may_publish(self, type_name: str) -> bool:
        """Whether events of this type may come with the key."""
        return not self.scopes.isdisjoint({"publish:*", f"publish:{type_name}"})

    @property
    def may_read(self) -> bool:
        """Whether events, deliveries and verdicts may be read with the key."""
        return "read" in self.scopes

    @property
    def publisher(self) -> Publisher:
        """Who publishes, as the intake takes it."""
        return Publisher(name=f"key:{self.name}", mode=self.mode, attests="attest" in self.scopes, key_id=self.number)


def create(
    connection: Connection, *, name: str, mode: str, scopes: Sequence[str], types: Collection[str], now: int
) -> tuple[ApiKey, str]:
    """Make a key: the record, and the key itself, which nobody can show again.

    `types` are the event types that a scope may name. Raises `KeyRefused`.
    """
    _check(name, mode, scopes, types)
    if connection.execute(select(api_keys.c.id).where(api_keys.c.name == name)).first() is not None:
        message = f"a key named {name!r} exists already (a revoked one keeps its name): choose another name"
        raise KeyRefused("conflict", message)
    public_id = _random(12)
    body = f"rolecast_{mode}_{public_id}_{_random(_SECRET_LETTERS)}"
    presented = body + _checksum(body)
    row = connection.execute(
        insert(api_keys)
        .values(
            public_id=public_id,
            secret_hash=hashlib.sha256(presented.encode()).digest(),
            name=name,
            mode=mode,
            scopes=" ".join(dict.fromkeys(scopes)),
            created_at=now,
        )
        .returning(api_keys)
    ).one()
    return _key(row), presented


def check(connection: Connection, presented: str, now: int) -> ApiKey | None:
    """The key that was presented; None where it is none of ours, or was revoked. Takes the same time for all."""
    shape = _SHAPE.fullmatch(presented)
    if shape is None or not hmac.compare_digest(_checksum(shape[1]), shape[4]):
        return None
    row = connection.execute(select(api_keys).where(api_keys.c.public_id == shape[3])).one_or_none()
    expected = bytes(row.secret_hash) if row is not None else _NOBODY
    same = hmac.compare_digest(hashlib.sha256(presented.encode()).digest(), expected)
    if row is None or not same or row.revoked_at is not None:
        return None
    return _key(row, now=now)


def record_use(connection: Connection, key: ApiKey, *, now: int) -> None:
    """Write down that the key was used just now."""
    connection.execute(update(api_keys).where(api_keys.c.id == key.number).values(used_at=now))


def list_keys(connection: Connection) -> list[ApiKey]:
    """Every key ever made, the oldest first."""
    return [_key(row) for row in connection.execute(select(api_keys).order_by(api_keys.c.id))]


def revoke(connection: Connection, reference: str, *, now: int) -> ApiKey:
    """Withdraw the key with that name or public id, at once and for good. Raises `KeyRefused`."""
    row = connection.execute(
        select(api_keys).where((api_keys.c.name == reference) | (api_keys.c.public_id == reference))
    ).first()
    if row is None:
        message = f"there is no key {reference!r}: `rolecast keys list` shows those there are"
        raise KeyRefused("unknown", message)
    if row.revoked_at is None:
        connection.execute(update(api_keys).where(api_keys.c.id == row.id).values(revoked_at=now))
    return _key(connection.execute(select(api_keys).where(api_keys.c.id == row.id)).one())


def _check(name: str, mode: str, scopes: Sequence[str], types: Collection[str]) -> None:
    if not _NAME.fullmatch(name):
        message = f"the name {name!r} is not one: give 1 to 64 letters, digits, spaces, dots, `_` or `-`"
        raise KeyRefused("invalid", message)
    if mode not in DELIVERY_MODES:
        message = f"the mode {mode!r} is not one: give live, team or test"
        raise KeyRefused("invalid", message)
    if not scopes:
        message = "a key without a scope can do nothing: give --scope publish:TYPE, publish:*, attest or read"
        raise KeyRefused("invalid", message)
    for scope in scopes:
        kind, colon, wanted = scope.partition(":")
        if scope in {"attest", "read", "publish:*"} or (kind == "publish" and wanted in types):
            continue
        remedy = "`rolecast types list` shows the types" if colon else "give publish:TYPE, publish:*, attest or read"
        message = f"the scope {scope!r} is not one: {remedy}"
        raise KeyRefused("invalid", message)


def _key(row: Row[Any], *, now: int | None = None) -> ApiKey:
    return ApiKey(
        number=row.id,
        public_id=row.public_id,
        name=row.name,
        mode=cast("Mode", row.mode),
        scopes=frozenset(row.scopes.split()),
        created_at=row.created_at,
        used_at=row.used_at,
        revoked_at=row.revoked_at,
        unrecorded=now is not None and (row.used_at is None or row.used_at <= now - RECORD_SECONDS * 1_000_000),
    )


def _random(letters: int) -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(letters))


def _checksum(body: str) -> str:
    number, letters = zlib.crc32(body.encode()), ""
    for _ in range(_CHECK_LETTERS):
        number, letter = divmod(number, len(_LETTERS))
        letters = _LETTERS[letter] + letters
    return letters
