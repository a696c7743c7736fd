"""Mail addresses: what is accepted, how it is compared and how it is written to.

Two addresses are one mailbox exactly if their normal forms are equal (S-21). Plus-tags and dots are kept. Characters
that only look like others never merge two mailboxes: an address that would fold into a differently spelt one
(a circled or full-width letter in the domain, an ideographic full stop, a Kelvin sign for a K) is refused.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from email_validator import EmailNotValidError, ValidatedEmail, validate_email

_AROUND: Final = " \t\r\n\u00a0"  # trimmed; other control characters are refused wherever they stand
_LONGEST_SHOWN: Final = 80  # characters of a bad address that a message repeats

# Plain ASCII addresses, most of a directory, take this path at a hundredth of the library's cost. It accepts less than
# the library does: 64 characters in all keep every part within its limit, a double hyphen in the domain may be
# Punycode, and names for special use (RFC 6761) are the library's to judge.
_PLAIN: Final = re.compile(
    r"[A-Za-z0-9_!#$%&'*+\-/=?^`{|}~]+(?:\.[A-Za-z0-9_!#$%&'*+\-/=?^`{|}~]+)*"
    r"@(?:[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*\.)+"
    r"(?!(?i:arpa|invalid|local|localhost|onion)\Z)[A-Za-z]+\Z",
)
_PLAIN_LENGTH: Final = 64


class BadAddress(ValueError):  # noqa: N818 - it names the thing that is bad
    """The text is no address that mail can be sent to; the message is a sentence that says why."""


def normalise(text: str) -> str:
    """The form in which addresses are compared: trimmed, NFC, local part in lower case, domain as A-labels.

    `.test` and `.example` are accepted; quoted local parts, address literals, comments, display names and control
    characters are not. Raises BadAddress.
    """
    address = text.strip(_AROUND)
    if _is_plain(address):
        return address.lower()
    return _normalise_by_library(address)


def as_written(text: str) -> str:
    """The address that mail is sent to: trimmed and checked, its case kept. Raises BadAddress."""
    address = trimmed(text)
    if not _is_plain(address):
        _normalise_by_library(address)
    return address


def trimmed(text: str) -> str:
    """The text as `as_written` gives it, for one that `normalise` has accepted already."""
    return text.strip(_AROUND)


def _is_plain(trimmed: str) -> bool:
    return len(trimmed) <= _PLAIN_LENGTH and "=?" not in trimmed and _PLAIN.match(trimmed) is not None


def _normalise_by_library(trimmed: str) -> str:
    if "=?" in trimmed:  # some readers of headers would decode it into something else (reliability.md A2)
        raise BadAddress(
            f"{_shown(trimmed)} holds =?, which begins an encoded word in a mail: write the plain address."
        )
    checked = _check(trimmed)
    _refuse_folding_domain(trimmed, checked)
    local = unicodedata.normalize("NFC", checked.local_part.lower())
    if local.isascii() and not trimmed.rpartition("@")[0].isascii():
        raise BadAddress(f"{_shown(trimmed)} stands for {local}@{checked.ascii_domain}: write it with plain letters.")
    address = f"{local}@{checked.ascii_domain}"
    if address != trimmed:
        _check(address)  # lower case may be longer than capitals are
    return address


def _check(trimmed: str) -> ValidatedEmail:
    try:
        return validate_email(trimmed, check_deliverability=False, test_environment=True, strict=True)
    except EmailNotValidError as error:
        reason = str(error).removesuffix(".").replace(". ", "; ")
        raise BadAddress(f"{_shown(trimmed)} is not a mail address: {reason[:1].lower()}{reason[1:]}.") from None


def _refuse_folding_domain(trimmed: str, checked: ValidatedEmail) -> None:
    """Lower case, NFC and A-labels are other spellings of one domain; any other folding changes what was written."""
    written = trimmed.rpartition("@")[2].split(".")
    unicode_labels = checked.domain.split(".")
    ascii_labels = checked.ascii_domain.split(".")
    if len(written) != len(ascii_labels) or not all(map(_is_spelling, written, unicode_labels, ascii_labels)):
        raise BadAddress(f"{_shown(trimmed)} stands for the domain {checked.ascii_domain}: write it so.")


def _is_spelling(written: str, unicode_label: str, ascii_label: str) -> bool:
    if written.isascii():
        return written.lower() in (unicode_label, ascii_label)
    lower = "".join(char.lower() for char in unicodedata.normalize("NFC", written))  # a last sigma is no exception
    return lower == unicode_label and not unicode_label.isascii()


def _shown(text: str) -> str:
    """The text in quotes for a message: shortened, and escaped where a terminal or a log could be misled."""
    cut = text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
    return ascii(cut) if not cut.isprintable() else f"'{cut}'"
