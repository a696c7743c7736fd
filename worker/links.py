"""Tokens: the personal links in mails, and the envelope senders that bounces come back to.

A token names a purpose and row numbers, and carries a MAC of 128 bits (80 for bounces) that nobody can make without
the key. A token for one purpose is worthless for another. Links are signed by the first of `ROLECAST_SECRET_KEYS`; all
of them verify. Envelope senders are signed under the installation's address key, which never changes, so that they are
the same on every attempt.

A database restored from a backup gives row numbers again, to others. So the MAC also covers an *identity* that is never
given again: of a delivery its event's ULID and its mailbox, of a contact its account's id and its own. It isn't in the
token: who reads one looks the row up, and a token whose row is another by now is as bad as a forged one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import add
from pathlib import Path
from typing import Final, Literal

from sqlalchemy import Connection, select

from subscriptions.schema import accounts, contacts, mailboxes
from worker.schema import deliveries, events
from worker.settings import SHORTEST_KEY, SettingsError

Purpose = Literal["u", "p"]
"""u = one-click unsubscribe (names a delivery), p = preference page (names a contact)."""

_MAC_BYTES = 16
_BOUNCE_MAC_BYTES = 10
_ROW: Final = 2**63 - 1
_DELIVERY: Final = (_ROW, 2**31 - 1)
_LARGEST: Final[Mapping[Purpose, tuple[int, ...]]] = {"u": _DELIVERY, "p": (_ROW,)}
#: The numbers of each kind of token, each with the largest that its column can hold.


_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")

_Signer = Callable[[Iterable[bytes]], list[bytes]]
#: The MAC of each of these: three are made a mail.


class BadToken(Exception):  # noqa: N818 - reads as the sentence it is
    """Not a token of this installation for what stands in its row now.

    It was cut short or changed, its key was withdrawn, or the row is gone or another's since a restore.
    """


# ---------------------------------------------------------------- what a token is bound to


def delivery_identity(ulid: str, mailbox_key: bytes) -> bytes:
    """What a delivery is whatever its number: its event's ULID and the address key of its mailbox."""
    return ulid.encode() + b"\0" + mailbox_key


def contact_identity(account: str, contact: str) -> bytes:
    """What a contact is whatever its number, and whatever its address: the ids that people use."""
    return f"{account}\0{contact}".encode()


Named = tuple[bytes, bytes]
"""What a token names: its numbers as they stand in the token, and the identity of what they stand for."""


def named_delivery(event_id: int, ulid: str, n: int, mailbox_key: bytes) -> Named:
    """A delivery, for the tokens of its mail."""
    return named_deliveries(event_id, ulid, ((n, mailbox_key),))[0]


def named_deliveries(event_id: int, ulid: str, deliveries: Iterable[tuple[int, bytes]]) -> list[Named]:
    """The same of deliveries of one event, each its number and its mailbox's address key."""
    event, identity = varint(event_id), delivery_identity(ulid, b"")
    return [(event + varint(n), identity + mailbox_key) for n, mailbox_key in deliveries]


def named_contacts(contacts: Iterable[tuple[int, str, str]]) -> list[Named]:
    """Contacts, each its number, its account's id and its own, for the links to their preferences."""
    return [(varint(number), contact_identity(account, contact)) for number, account, contact in contacts]


def delivery_now(connection: Connection, event_id: int, n: int) -> bytes | None:
    """The identity of the delivery that has these numbers now; None where there is none."""
    row = connection.execute(
        select(events.c.ulid, mailboxes.c.address_key)
        .join(deliveries, deliveries.c.event_id == events.c.id)
        .join(mailboxes, mailboxes.c.id == deliveries.c.mailbox_id)
        .where(deliveries.c.event_id == event_id, deliveries.c.n == n)
    ).one_or_none()
    return delivery_identity(row.ulid, bytes(row.address_key)) if row is not None else None


def contact_now(connection: Connection, contact_id: int) -> bytes | None:
    """The identity of the contact that has this number now, removed ones included; None where there is none."""
    row = connection.execute(
        select(accounts.c.ext, contacts.c.ext)
        .join(contacts, contacts.c.account_id == accounts.c.id)
        .where(contacts.c.id == contact_id)
    ).one_or_none()
    return contact_identity(row[0], row[1]) if row is not None else None


# ---------------------------------------------------------------- links in mails


@dataclass(frozen=True, slots=True)
class Links:
    """Makes and reads personal links. `keys` are secret texts, `base` is `ROLECAST_PUBLIC_URL`."""

    keys: tuple[str, ...]
    base: str
    _sign: _Signer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sign", _link_signer(self.keys[0]))

    def unsubscribe(self, event_id: int, n: int, identity: bytes) -> str:
        """The RFC 8058 address of one delivery: it acts on every ground of it."""
        return f"{self.base}/unsubscribe/{self.token('u', event_id, n, identity=identity)}"

    def preferences(self, contact_id: int, identity: bytes) -> str:
        """The preference page of a contact."""
        return f"{self.base}/preferences/{self.token('p', contact_id, identity=identity)}"

    def token(self, purpose: Purpose, *numbers: int, identity: bytes) -> str:
        """A token for the purpose, the numbers and what they stand for, safe in a URL."""
        return self.token_of(purpose.encode(), (b"".join(map(varint, numbers)), identity)).decode()

    def token_of(self, purpose: bytes, named: Named) -> bytes:
        """The same token of what is written already, as octets."""
        return self.tokens_of(purpose, (named,))[0]

    def tokens_of(self, purpose: bytes, named: Sequence[Named]) -> list[bytes]:
        """A token for each of these: two are made a mail."""
        bodies = [purpose + numbers for numbers, _ in named]
        macs = self._sign([body + identity for body, (_, identity) in zip(bodies, named, strict=True)])
        raw = map(add, bodies, macs)
        return [binascii.b2a_base64(one, newline=False).translate(_URL_SAFE, b"=") for one in raw]

    def read(self, purpose: Purpose, token: str, identity_of: Callable[..., bytes | None]) -> tuple[int, ...]:
        """The numbers of a token that was made for what they stand for now. Raises `BadToken`.

        `identity_of(*numbers)` looks that up; it is also asked for numbers that somebody made up.
        """
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadToken from error
        body, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != token:
            raise BadToken  # several spellings of one token would make a log of used ones useless
        if body[:1] != purpose.encode():
            raise BadToken
        numbers = _numbers(body[1:], _LARGEST[purpose])
        signed = body + _known(identity_of(*numbers))
        good = [hmac.compare_digest(mac, _link_signer(key)([signed])[0]) for key in self.keys]
        if not any(good):
            raise BadToken
        return numbers


def _numbers(raw: bytes, largest: Sequence[int]) -> tuple[int, ...]:
    """The numbers of a token that isn't verified yet: as many as there should be, and such as a database may be asked.

    Raises `BadToken`.
    """
    if len(raw) > sum(len(varint(most)) for most in largest):
        raise BadToken
    numbers = tuple(varints(raw))
    if len(numbers) != len(largest) or any(number > most for number, most in zip(numbers, largest, strict=True)):
        raise BadToken
    if b"".join(varint(number) for number in numbers) != raw:
        raise BadToken
    return numbers


def _known(identity: bytes | None) -> bytes:
    if identity is None:
        raise BadToken
    return identity


@lru_cache(maxsize=32)  # the keys of an installation
def _link_signer(key: str) -> _Signer:
    return _signer(key.encode(), b"rolecast link v1\0", _MAC_BYTES)


@lru_cache(maxsize=32)  # an installation has one
def _sender_signer(address_key: bytes) -> _Signer:
    return _signer(address_key, b"rolecast bounce v1\0", _BOUNCE_MAC_BYTES)


def _signer(key: bytes, purpose: bytes, length: int) -> _Signer:
    """What makes the first so many bytes of HMAC-SHA-256 of the purpose and each text that is to be signed.

    Its two hashes are begun once with what all tokens share (RFC 2104, section 4): a third faster than `hmac`'s copies.
    """
    block = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
    begin = hashlib.sha256(bytes(octet ^ 0x36 for octet in block) + purpose).copy
    end = hashlib.sha256(bytes(octet ^ 0x5C for octet in block)).copy

    def sign(texts: Iterable[bytes]) -> list[bytes]:
        macs = []
        for text in texts:
            inner, outer = begin(), end()
            inner.update(text)
            outer.update(inner.digest())
            macs.append(outer.digest()[:length])
        return macs

    return sign


# ---------------------------------------------------------------- envelope senders


def bounce_sender(address_key: bytes, delivery: Named, *, domain: str) -> str:
    """The envelope sender of a delivery: hexadecimal, for not every server keeps the case of letters.

    The token has at most 40 characters up to event 2**35 - 1, and 48 at most: the local part may have 64 (RFC 5321,
    4.5.3.1.1).
    """
    return bounce_senders(address_key, (delivery,), domain=domain)[0]


def bounce_senders(address_key: bytes, deliveries: Sequence[Named], *, domain: str) -> list[str]:
    """The same of several deliveries."""
    macs = _sender_signer(address_key)([numbers + identity for numbers, identity in deliveries])
    return [f"b+{numbers.hex()}{mac.hex()}@{domain}" for (numbers, _), mac in zip(deliveries, macs, strict=True)]


def read_bounce(
    address_key: bytes, local_part: str, identity_of: Callable[[int, int], bytes | None]
) -> tuple[int, int]:
    """(event, n) of an envelope sender's local part, in any case. Raises `BadToken`.

    `identity_of` is asked as in `Links.read`.
    """
    token = local_part.lower().partition("+")[2]
    try:
        raw = bytes.fromhex(token)
    except ValueError as error:
        raise BadToken from error
    if raw.hex() != token:
        raise BadToken
    body, mac = raw[:-_BOUNCE_MAC_BYTES], raw[-_BOUNCE_MAC_BYTES:]
    event_id, n = _numbers(body, _DELIVERY)
    signed = body + _known(identity_of(event_id, n))
    if not hmac.compare_digest(mac, _sender_signer(address_key)([signed])[0]):
        raise BadToken
    return event_id, n


# ---------------------------------------------------------------- keys


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


# ---------------------------------------------------------------- numbers


_BYTES: Final = tuple(bytes((number,)) for number in range(128))


def varint(number: int) -> bytes:
    """A number of 0 or more, seven bits a byte, the lowest first."""
    if number < 128:
        return _BYTES[number]
    if number < 1 << 14:
        return bytes((number & 127 | 128, number >> 7))
    if number < 1 << 21:  # so far without a loop: three of these are written a mail
        return bytes((number & 127 | 128, number >> 7 & 127 | 128, number >> 14))
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
