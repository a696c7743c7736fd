"""What a value in an event's data must look like: one rule per kind of value, used by the models of event_types.

A rule checks a JSON value, never converts it, describes itself in the JSON Schema, and says in one phrase what is
expected; the same phrase stands in the error that a publisher reads. There are no numbers among the values: amounts
and counts are texts, so that the canonical form (RFC 8785) of an event never depends on a floating point.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from subscriptions.addresses import BadAddress, normalise

MAX_PRODUCTS: Final = 100
MAX_ATTACHMENT_BYTES: Final = 5 * 1024 * 1024

_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_IN_BODY: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BIDI: Final = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ID_PATTERN: Final = "^[A-Za-z0-9._-]{1,64}$"
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_AMOUNT_PATTERN: Final = r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,4})?$"
_AMOUNT: Final = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,4})?")
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_INSTANT: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt]([0-9]{2}:[0-9]{2}):([0-9]{2})(\.[0-9]{1,12})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_URI_CHARACTERS: Final = re.compile(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*")
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.\-]*[A-Za-z0-9])?\.?|\[[0-9A-Fa-f:.]+\]")
_RESERVED_NAME: Final = re.compile(r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_YEARS: Final = range(1900, 9000)  # far enough from both ends of datetime that no time zone leads beyond them

# ISO 4217, list one: the currencies and fund codes in use, without precious metals, test and no-currency codes.
_CURRENCIES: Final = """
    AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE
    CHF CHW CLF CLP CNY COP COU CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ
    GYD HKD HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL
    LYD MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR
    PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY
    TTD TWD TZS UAH UGX USD USN UYI UYU UYW UZS VED VES VND VUV WST XAF XCD XCG XDR XOF XPF XSU XUA YER ZAR ZMW ZWG
"""
CURRENCIES: Final = frozenset(_CURRENCIES.split())

# The attachments that are taken: media type -> (file name endings, first bytes; none where any text will do).
ATTACHMENT_TYPES: Final = {
    "application/pdf": ((".pdf",), b"%PDF-"),
    "image/png": ((".png",), b"\x89PNG\r\n\x1a\n"),
    "text/calendar": ((".ics",), b""),
    "text/csv": ((".csv",), b""),
    "text/plain": ((".txt", ".log"), b""),
}


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """What one value must be: `what` completes "must be ...", `check` decides, `schema` describes it to others."""

    what: str
    check: Callable[[Any], bool]
    schema: dict[str, Any] = field(default_factory=lambda: {"type": "string"})

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> CoreSchema:
        """Stands in for pydantic's own reading of the annotated type: no conversion takes place."""
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**self.schema, "description": self.what[0].upper() + self.what[1:] + "."}

    def _validate(self, value: object) -> object:
        if self.check(value):
            return value
        raise PydanticCustomError("rule", "must be {what}", {"what": self.what})


def _all(check: Callable[[str], bool]) -> Callable[[object], bool]:
    """The check for texts, made safe for any JSON value."""
    return lambda value: isinstance(value, str) and check(value)


def _line(longest: int) -> Rule:
    return Rule(
        f"one line of text, 1 to {longest} characters without control characters",
        _all(lambda text: len(text) <= longest and text.strip() != "" and not _CONTROL.search(text)),
        {"type": "string", "minLength": 1, "maxLength": longest},
    )


def instant(text: str) -> datetime:
    """The moment (in UTC) that an RFC 3339 time names. Raises ValueError.

    A leap second (:60) is read as the second before it; digits beyond microseconds are cut off.
    """
    parts = _INSTANT.fullmatch(text)
    if parts is None:
        raise ValueError(f"{text!r} is not an RFC 3339 time")
    day, minute, second, fraction, zone = parts.groups()
    if second == "60":
        second = "59"
    zone = "+00:00" if zone in ("Z", "z") else zone
    moment = datetime.fromisoformat(f"{day}T{minute}:{second}{(fraction or '.0')[:7].ljust(7, '0')}{zone}")
    if moment.year not in _YEARS:
        raise ValueError(f"{text!r} is outside the years {_YEARS.start} to {_YEARS.stop - 1}")
    return moment.astimezone(UTC)


def is_instant(text: str) -> bool:
    """Whether the text is an RFC 3339 time that Rolecast can work with."""
    try:
        instant(text)
    except ValueError:
        return False
    return True


def _is_date(text: str) -> bool:
    try:
        return _DATE.fullmatch(text) is not None and date.fromisoformat(text).year in _YEARS
    except ValueError:
        return False


def is_uri_reference(text: str) -> bool:
    """Whether the text is a URI-reference (RFC 3986, section 4.1) of one character or more."""
    if not _URI_CHARACTERS.fullmatch(text) or text.count("#") > 1:
        return False
    first_segment = re.split("[/?#]", text, maxsplit=1)[0]
    scheme, colon, _ = first_segment.partition(":")
    if colon and not _SCHEME.fullmatch(scheme):
        return False
    try:
        urlsplit(text)
    except ValueError:
        return False
    return True


def is_uri(text: str) -> bool:
    """Whether the text is a URI with a scheme (RFC 3986, section 3)."""
    scheme, colon, rest = text.partition(":")
    return is_uri_reference(text) and bool(colon and rest) and _SCHEME.fullmatch(scheme) is not None


def _is_page(text: str) -> bool:
    if len(text) > 2000 or not is_uri(text):
        return False
    parts = urlsplit(text)
    try:
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        return False
    host = parts.netloc.rpartition(":")[0] if parts.port is not None else parts.netloc.removesuffix(":")
    return parts.scheme == "https" and port_is_fine and _HOST.fullmatch(host) is not None


def _is_identity(value: object) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _is_accounts(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_identity, value)) and len(set(value)) == len(value)
    return value == "all"


def _is_products(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MAX_PRODUCTS and all(map(_is_identity, value))


def _is_address(text: str) -> bool:
    try:
        normalise(text)
    except BadAddress:
        return False
    return True


def _is_file_name(text: str) -> bool:
    return (
        0 < len(text) <= 100
        and text == text.strip(". ")
        and not _CONTROL.search(text)
        and not _BIDI.search(text)
        and not set(text) & set('/\\:*?"<>|')
        and _RESERVED_NAME.fullmatch(text) is None
    )


def decoded(content_base64: str) -> bytes | None:
    """The bytes of an attachment, or None where the text is not Base64 (RFC 4648, section 4)."""
    try:
        return base64.b64decode(content_base64, validate=True)
    except (ValueError, binascii.Error):
        return None


_IDENTITY_SCHEMA: Final = {"type": "string", "pattern": _ID_PATTERN}

Identity = Annotated[str, Rule('an id of 1 to 64 letters, digits, ".", "_" and "-"', _is_identity, _IDENTITY_SCHEMA)]
Accounts = Annotated[
    Any,
    Rule(
        '"all" or a list of one or more distinct account ids',
        _is_accounts,
        {
            "anyOf": [
                {"const": "all"},
                {"type": "array", "items": _IDENTITY_SCHEMA, "minItems": 1, "uniqueItems": True},
            ]
        },
    ),
]
Products = Annotated[
    list[str],
    Rule(
        f"a list of up to {MAX_PRODUCTS} product ids",
        _is_products,
        {"type": "array", "items": _IDENTITY_SCHEMA, "maxItems": MAX_PRODUCTS},
    ),
]
ContactProducts = Annotated[
    list[str],
    Rule(
        "a list of one or more product ids, or null for all products",
        lambda value: value is None or (_is_products(value) and value != []),
        {
            "anyOf": [
                {"type": "null"},
                {"type": "array", "items": _IDENTITY_SCHEMA, "minItems": 1, "maxItems": MAX_PRODUCTS},
            ]
        },
    ),
]
Word = Annotated[str, _line(40)]
Name = Annotated[str, _line(100)]
Line = Annotated[str, _line(200)]
LongLine = Annotated[str, _line(2000)]
Body = Annotated[
    str,
    Rule(
        "a text of 1 to 100,000 characters without control characters other than line feed and tab",
        _all(lambda text: len(text) <= 100_000 and text.strip() != "" and not _CONTROL_IN_BODY.search(text)),
        {"type": "string", "minLength": 1, "maxLength": 100_000},
    ),
]
Amount = Annotated[
    str,
    Rule(
        'a decimal number in a text, such as "1280.00"',
        _all(lambda text: _AMOUNT.fullmatch(text) is not None),
        {"type": "string", "pattern": _AMOUNT_PATTERN},
    ),
]
Currency = Annotated[
    str,
    Rule(
        'an ISO 4217 currency code, such as "EUR"',
        _all(lambda text: text in CURRENCIES),
        {"type": "string", "pattern": "^[A-Z]{3}$"},
    ),
]
Date = Annotated[
    str, Rule('an ISO 8601 date, such as "2026-12-21"', _all(_is_date), {"type": "string", "format": "date"})
]
Instant = Annotated[
    str,
    Rule(
        'an RFC 3339 time with its zone, such as "2026-11-21T10:00:00Z"',
        _all(is_instant),
        {"type": "string", "format": "date-time"},
    ),
]
Page = Annotated[
    str,
    Rule(
        "an https URL of at most 2,000 characters, without user name and with special characters percent-encoded",
        _all(_is_page),
        {"type": "string", "format": "uri", "pattern": "^https://", "maxLength": 2000},
    ),
]
Address = Annotated[
    str,
    Rule(
        'an email address, such as "ada@acme.example"',
        _all(_is_address),
        {"type": "string", "format": "email", "maxLength": 320},
    ),
]
FileName = Annotated[
    str,
    Rule(
        'a plain file name of at most 100 characters, such as "invoice-2026-000123.pdf"',
        _all(_is_file_name),
        {"type": "string", "minLength": 1, "maxLength": 100},
    ),
]
MediaType = Annotated[
    str,
    Rule(
        f"one of {', '.join(ATTACHMENT_TYPES)}",
        _all(lambda text: text in ATTACHMENT_TYPES),
        {"type": "string", "enum": sorted(ATTACHMENT_TYPES)},
    ),
]
Base64 = Annotated[
    str,
    Rule(
        "Base64 text (RFC 4648) of a file that is not empty",
        _all(lambda text: bool(decoded(text))),
        {"type": "string", "contentEncoding": "base64", "minLength": 1},
    ),
]
Switch = Annotated[bool, Rule("true or false", lambda value: isinstance(value, bool), {"type": "boolean"})]
HolderKind = Annotated[
    str,
    Rule(
        '"person" or "group"',
        lambda value: value in ("person", "group"),
        {"type": "string", "enum": ["person", "group"]},
    ),
]
OptOutBy = Annotated[
    str,
    Rule(
        '"recipient", "operator", "import" or "complaint"',
        lambda value: value in ("recipient", "operator", "import", "complaint"),
        {"type": "string", "enum": ["recipient", "operator", "import", "complaint"]},
    ),
]
