"""Tokens: the personal links in mails, and the envelope senders that bounces come back to.

A token names a purpose and numbers, and carries a MAC of 128 bits (80 for bounces) that nobody can make without the
key. A token for one purpose is worthless for another. Links are signed by the first of `ROLECAST_SECRET_KEYS`; all of
them verify. Envelope senders are signed under the installation's address key, which never changes, so that they are
the same on every attempt.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from worker.settings import SHORTEST_KEY, SettingsError

Purpose = Literal["u", "p"]
"""u = one-click unsubscribe (names a delivery), p = preference page (names a contact)."""

_MAC_BYTES = 16
_BOUNCE_MAC_BYTES = 10


class BadToken(Exception):  # noqa: N818 - reads as the sentence it is
    """The link is not one that this installation made: it was cut short, changed, or its key was withdrawn."""


@dataclass(frozen=True, slots=True)
class Links:
    """Makes and reads personal links. `keys` are secret texts, `base` is `ROLECAST_PUBLIC_URL`."""

    keys: tuple[str, ...]
    base: str

    def unsubscribe(self, event_id: int, n: int) -> str:
        """The RFC 8058 address of one delivery: it acts on every ground of it."""
        return f"{self.base}/unsubscribe/{self.token('u', event_id, n)}"

    def preferences(self, contact_id: int) -> str:
        """The preference page of a contact."""
        return f"{self.base}/preferences/{self.token('p', contact_id)}"

    def token(self, purpose: Purpose, *numbers: int) -> str:
        """A token for the purpose and numbers, safe in a URL."""
        body = purpose.encode() + b"".join(varint(number) for number in numbers)
        return base64.urlsafe_b64encode(body + _mac(self.keys[0], body)).rstrip(b"=").decode()

    def read(self, purpose: Purpose, token: str) -> list[int]:
        """The numbers of a token. Raises `BadToken`."""
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadToken from error
        body, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != token:
            raise BadToken  # several spellings of one token would make a log of used ones useless
        good = [hmac.compare_digest(mac, _mac(key, body)) for key in self.keys]
        if not any(good) or body[:1] != purpose.encode():
            raise BadToken
        return varints(body[1:])


def _mac(key: str, body: bytes) -> bytes:
    return hmac.new(key.encode(), b"rolecast link v1\0" + body, hashlib.sha256).digest()[:_MAC_BYTES]


def bounce_sender(address_key: bytes, event_id: int, n: int, domain: str) -> str:
    """The envelope sender of a delivery: lower-case letters and digits only, at most 40 in the token."""
    body = varint(event_id) + varint(n)
    mac = hmac.new(address_key, b"rolecast bounce v1\0" + body, hashlib.sha256).digest()[:_BOUNCE_MAC_BYTES]
    token = base64.b32encode(body + mac).decode().rstrip("=").lower()
    return f"b+{token}@{domain}"


def read_bounce(address_key: bytes, local_part: str) -> tuple[int, int]:
    """(event, n) of an envelope sender's local part, in any case. Raises `BadToken`."""
    _, plus, token = local_part.upper().partition("+")
    try:
        raw = base64.b32decode(token + "=" * (-len(token) % 8)) if plus else b""
    except ValueError as error:
        raise BadToken from error
    if not raw or base64.b32encode(raw).decode().rstrip("=") != token:
        raise BadToken
    body, mac = raw[:-_BOUNCE_MAC_BYTES], raw[-_BOUNCE_MAC_BYTES:]
    expected = hmac.new(address_key, b"rolecast bounce v1\0" + body, hashlib.sha256).digest()[:_BOUNCE_MAC_BYTES]
    numbers = varints(body)
    if not hmac.compare_digest(mac, expected) or len(numbers) != 2:
        raise BadToken
    return numbers[0], numbers[1]


def keys_for(configured: Sequence[str], database_path: Path | None) -> tuple[str, ...]:
    """The configured keys; without any, the one kept beside a SQLite database, made on first use (mode 600).

    Empty where there is neither: then no link can be made. Raises `SettingsError` where the file holds no key.
    """
    if configured or database_path is None:
        return tuple(configured)
    path = database_path.with_name(database_path.name + ".key")
    if not path.exists():
        draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(draft, path)  # the first process wins: a link is made once
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    key = path.read_text(encoding="utf-8").strip()
    if len(key) < SHORTEST_KEY:
        message = f"the key file {path} holds no key: restore it, or remove it and the links in older mails end"
        raise SettingsError(message)
    return (key,)


def varint(number: int) -> bytes:
    """A number of 0 or more, seven bits a byte, the lowest first."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def varints(raw: bytes) -> list[int]:
    """The numbers that `varint` wrote one behind the other."""
    numbers, shift, current = [], 0, 0
    for byte in raw:
        current |= (byte & 127) << shift
        if byte > 127:
            shift += 7
        else:
            numbers.append(current)
            shift = current = 0
    return numbers
