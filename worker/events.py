"""Events as publishers send them: the registry of types, and the one way from bytes to a checked event.

Promises: what parse_event returns is a CloudEvents 1.0 event of a known type whose data fits the type's model and whose
audience is named exactly once; nothing in it was converted or invented. Whatever is wrong is told all at once, each
fault with its place, in one sentence that names field, value and remedy. Nothing here knows the directory: whether an
account exists and which categories it has is decided later.

Sources: CloudEvents 1.0.2 (spec, JSON event format, HTTP protocol binding), contract.md sections 3 and 7.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar
from urllib.parse import unquote_to_bytes

import rfc8785
from pydantic import BaseModel

from subscriptions import strictjson
from worker import event_types
from worker.event_faults import MAX_FAULTS, EventError, Fault, data_faults, nearest, shown
from worker.event_fields import instant, is_instant, is_uri, is_uri_reference
from worker.event_samples import SAMPLES

__all__ = [
    "TYPES",
    "Event",
    "EventError",
    "EventType",
    "Fault",
    "Received",
    "check_event_size",
    "content",
    "from_http",
    "json_schema",
    "parse_batch",
    "parse_event",
    "parse_json",
    "read_file",
    "sample",
]

MAX_EVENT_BYTES: Final = 256 * 1024  # one event without its content_base64, as compact JSON
MAX_EVENT_BYTES_WITH_FILES: Final = 5 * 1024 * 1024
MAX_BATCH_EVENTS: Final = 100
MAX_BATCH_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class EventType:
    """One kind of fact: its category, whether it may go to many accounts, the model and a sample of its data."""

    name: str
    category: str
    broadcast: bool
    model: type[BaseModel]
    sample: dict[str, Any]
    summary: str


@dataclass(frozen=True, slots=True)
class Event:
    """One checked CloudEvent. Exactly one of `account` and `accounts` is set; `data` is as it was published."""

    source: str
    id: str
    type: EventType
    time: str | None
    subject: str | None
    dataschema: str | None
    data: dict[str, Any]
    account: str | None
    accounts: tuple[str, ...] | Literal["all"] | None
    products: tuple[str, ...]
    not_before: datetime | None
    expires_at: datetime | None
    extensions: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Received:
    """The events of one HTTP request, in order, and whether they came as a batch."""

    events: tuple[Event, ...]
    batch: bool


def _registry(*rows: tuple[str, str, type[BaseModel], str]) -> Mapping[str, EventType]:
    return MappingProxyType(
        {
            name: EventType(name, category, issubclass(model, event_types.Broadcast), model, SAMPLES[name], summary)
            for name, category, model, summary in rows
        }
    )


TYPES: Final[Mapping[str, EventType]] = _registry(
    ("announcement.published", "announcement", event_types.Announcement, "News about a product"),
    ("webinar.scheduled", "webinar_invite", event_types.Webinar, "An invitation to a webinar"),
    ("corporate.published", "corporate_communication", event_types.CorporateNews, "News about the vendor itself"),
    ("service.notice", "service_communication", event_types.ServiceNotice, "A change in the running service"),
    ("outage.started", "outage_incident", event_types.Outage, "An outage begins; answered with the status page"),
    ("outage.updated", "outage_incident", event_types.Outage, "An outage goes on; answered with the status page"),
    ("outage.resolved", "outage_incident", event_types.Outage, "An outage is over; answered with the status page"),
    (
        "maintenance.scheduled",
        "maintenance_notice",
        event_types.Maintenance,
        "Planned work; answered with the status page",
    ),
    ("file.failed", "file_failure", event_types.FileFailure, "A file could not be processed"),
    ("invoice.issued", "invoice", event_types.Invoice, "An invoice is ready"),
    ("statement.issued", "financial_statement", event_types.Statement, "A statement of the account is ready"),
    ("payment.due", "payment_notice", event_types.PaymentDue, "A payment is due soon"),
    ("payment.failed", "payment_notice", event_types.PaymentFailed, "A payment did not go through"),
    ("payment.received", "payment_notice", event_types.PaymentReceived, "A payment arrived"),
    (
        "payment_information.changed",
        "payment_notice",
        event_types.PaymentInformationChanged,
        "The way of paying was changed",
    ),
    ("billing.notice", "billing_correspondence", event_types.BillingNotice, "A letter about billing"),
    ("quote.issued", "quote", event_types.Quote, "An offer waits for a signature"),
    ("contract.renewal", "contract_renewal", event_types.ContractRenewal, "A contract is up for renewal"),
    (
        "contract.authorisation",
        "contract_authorisation",
        event_types.ContractAuthorisation,
        "A contract waits for authorisation",
    ),
    ("upgrade.announced", "upgrade_notice", event_types.Upgrade, "A new version of a product"),
    ("technical.notice", "technical_correspondence", event_types.TechnicalNotice, "Something technical to know or do"),
    ("sales.message", "sales_correspondence", event_types.SalesMessage, "A letter from sales"),
    ("care.message", "customer_care_correspondence", event_types.CareMessage, "A letter from customer care"),
    (
        "account.message",
        "account_management_correspondence",
        event_types.AccountMessage,
        "A letter from the account manager",
    ),
    ("marketing.message", "marketing_communication", event_types.MarketingMessage, "Marketing"),
    ("survey.opened", "satisfaction_survey", event_types.Survey, "A survey on satisfaction"),
    ("esolutions.campaign", "esolutions_campaign", event_types.Campaign, "A campaign for electronic solutions"),
    (
        "action.requested",
        "approval_request",
        event_types.ActionRequest,
        "Somebody asks for an action that roles govern",
    ),
    ("contacts.changed", "contact_change_confirmation", event_types.ContactsChanged, "Contacts were changed"),
)


# ---------------------------------------------------------------- from JSON values to events


def parse_json(body: bytes) -> object:
    """The JSON value of the bytes, read strictly (see subscriptions.strictjson). Raises EventError, malformed."""
    try:
        return strictjson.loads(body)
    except strictjson.StrictJSONError as error:
        raise EventError(Fault(error.pointer or "", str(error), "malformed")) from None


def parse_event(value: object, *, pointer: str = "") -> Event:
    """The checked event of one JSON envelope; `pointer` is where it stands. Raises EventError with all its faults."""
    if not isinstance(value, dict):
        raise EventError(Fault(pointer, f"An event is a JSON object, but this is {shown(value)}.", "malformed"))
    too_large = check_event_size(value, pointer=pointer)
    if too_large:
        raise EventError(too_large)
    type_name, data = value.get("type"), value.get("data")
    kind = TYPES.get(type_name) if isinstance(type_name, str) else None
    faults = list(_envelope_faults(value, pointer))
    if kind is not None and isinstance(data, dict):
        faults += data_faults(kind.name, kind.model, data, f"{pointer}/data")
    if kind is None or faults:
        raise EventError(*faults)
    return _event(kind, value)


def parse_batch(value: object, *, pointer: str = "", most: int | None = None) -> list[Event]:
    """The events of a JSON array, in order, all or none; `most` is how many may stand in it. Raises EventError."""
    if not isinstance(value, list):
        raise EventError(Fault(pointer, f"A batch is a JSON array of events, but this is {shown(value)}.", "malformed"))
    if most is not None and len(value) > most:
        message = f"The batch holds {len(value):,} events; send at most {most:,} at a time."
        raise EventError(Fault(pointer, message, "too_large"))
    return _every(((f"{pointer}/{index}", None, item) for index, item in enumerate(value)), _parse_at)


def check_event_size(value: Mapping[str, Any], *, pointer: str = "") -> Fault | None:
    """The fault of an event beyond 256 KB without its content_base64, or beyond 5 MB with; None within both.

    Counted are the bytes of its compact JSON, so that it is the same for every way in.
    """
    size = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
    if size > MAX_EVENT_BYTES_WITH_FILES:
        message = f"The event has {size:,} bytes; with its attachments it may have {MAX_EVENT_BYTES_WITH_FILES:,}."
        return Fault(pointer, message, "too_large")
    if size > MAX_EVENT_BYTES:
        size -= _bytes_of_files(value.get("data"))
    if size > MAX_EVENT_BYTES:
        message = f"The event has {size:,} bytes without its attachments; it may have {MAX_EVENT_BYTES:,}."
        return Fault(pointer, message, "too_large")
    return None


def content(event: Event) -> bytes:
    """What makes two publications of one source and id the same: RFC 8785 of type, subject, dataschema and data."""
    fields = {"type": event.type.name, "subject": event.subject, "dataschema": event.dataschema, "data": event.data}
    return rfc8785.dumps(fields)


def sample(type_name: str) -> dict[str, Any]:
    """A valid structured CloudEvent of the type. Raises KeyError for a name that is not in TYPES."""
    return {
        "specversion": "1.0",
        "id": "sample-" + re.sub("[._]", "-", type_name),
        "source": "/samples",
        "type": type_name,
        "time": "2026-11-21T10:00:00Z",
        "datacontenttype": "application/json",
        "data": copy.deepcopy(TYPES[type_name].sample),
    }


def json_schema(type_name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of the type's data. Raises KeyError for a name that is not in TYPES."""
    schema = TYPES[type_name].model.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": type_name}


def _parse_at(value: object, pointer: str) -> Event:
    return parse_event(value, pointer=pointer)


_Item = TypeVar("_Item")


def _every(items: Iterable[tuple[str, int | None, _Item]], parse: Callable[[_Item, str], Event]) -> list[Event]:
    """The events of all items (pointer, line, value), or one EventError with the faults of them all."""
    events: list[Event] = []
    faults: list[Fault] = []
    for pointer, line, item in items:
        try:
            events.append(parse(item, pointer))
        except EventError as error:
            faults += (replace(fault, line=line) for fault in error.faults)
            if len(faults) >= MAX_FAULTS:
                break
    if faults:
        raise EventError(*faults)
    return events


def _bytes_of_files(data: object) -> int:
    """The bytes of all content_base64 in an event's data."""
    files = data.get("attachments") if isinstance(data, dict) else None
    texts = [file.get("content_base64") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts if isinstance(text, str))


# ---------------------------------------------------------------- the envelope

_REQUIRED: Final = ("specversion", "id", "source", "type")
_OPTIONAL: Final = ("subject", "time", "datacontenttype", "dataschema")
_ATTRIBUTES: Final = frozenset({*_REQUIRED, *_OPTIONAL, "data", "data_base64"})
_LONGEST: Final = {"source": 1024, "subject": 1024, "dataschema": 2048}  # characters; the others 256
_LONGEST_EXTENSION: Final = 4096
_EXTENSION_NAME: Final = re.compile("[a-z0-9]{1,64}")
_REFUSED: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")  # spec, section 2.1: String
_INTEGER: Final = range(-(2**31), 2**31)  # spec, section 2.1: Integer

# Attribute -> (its check beyond "a text that is not empty", what is expected).
_FORMS: Final[Mapping[str, tuple[Callable[[str], bool], str]]] = {
    "specversion": (lambda text: text == "1.0", '"1.0"'),
    "source": (is_uri_reference, 'a URI-reference (RFC 3986), such as "/billing"'),
    "time": (is_instant, 'an RFC 3339 time with its zone, such as "2026-11-21T10:00:00Z"'),
    "datacontenttype": (lambda text: _is_json(_media_type(text)), "application/json in UTF-8, or absent"),
    "dataschema": (is_uri, 'a URI (RFC 3986), such as "https://schemas.vendor.example/invoice"'),
}


def _envelope_faults(value: Mapping[str, Any], pointer: str) -> Iterator[Fault]:
    """The faults of everything around the fields of `data`. Attributes that are null are absent (JSON format, 3.1)."""
    for name in _REQUIRED:
        if value.get(name) is None:
            message = f'"{name}" is missing; a CloudEvent must have {", ".join(_REQUIRED)}.'
            yield Fault(f"{pointer}/{name}", message, "malformed")
    for name, attribute in value.items():
        place = pointer + strictjson.pointer([name])
        if attribute is None:
            continue
        if name in _REQUIRED or name in _OPTIONAL:
            yield from _attribute_faults(name, attribute, place)
        elif name not in _ATTRIBUTES:
            yield from _extension_faults(name, attribute, place)
    if value.get("data_base64") is not None:
        message = '"data_base64" is not taken; give the data as a JSON object in "data".'
        yield Fault(f"{pointer}/data_base64", message, "malformed")
    elif not isinstance(value.get("data"), dict):
        found = "is missing" if value.get("data") is None else f"is {shown(value['data'])}"
        message = f'"data" {found}; give a JSON object with the fields of the type.'
        yield Fault(f"{pointer}/data", message, "invalid")


def _attribute_faults(name: str, text: object, place: str) -> Iterator[Fault]:
    longest = _LONGEST.get(name, 256)
    check, expected = _FORMS.get(name, (bool, f"a text of 1 to {longest:,} characters without control characters"))
    if not isinstance(text, str) or not text or len(text) > longest or _REFUSED.search(text) or not check(text):
        yield Fault(place, f'"{name}" is {shown(text)}, but must be {expected}.', "malformed")
    elif name == "type" and text not in TYPES:
        near = nearest(text, TYPES)
        remedy = f'did you mean "{near}"?' if near else '"rolecast types list" lists the known ones.'
        yield Fault(place, f'"type" is {shown(text)}, which is not a known event type; {remedy}', "invalid")


def _extension_faults(name: str, value: object, place: str) -> Iterator[Fault]:
    if not _EXTENSION_NAME.fullmatch(name):
        near = nearest(name, (*_REQUIRED, *_OPTIONAL, "data"))
        remedy = f'did you mean "{near}"?' if near else "extensions are named with a-z and 0-9 only."
        yield Fault(place, f"{shown(name)} is no attribute of a CloudEvent; {remedy}", "malformed")
    elif isinstance(value, str):
        if len(value) > _LONGEST_EXTENSION or _REFUSED.search(value):
            message = (
                f"{shown(name)} must be a text of at most {_LONGEST_EXTENSION:,} characters, none of them control."
            )
            yield Fault(place, message, "malformed")
    elif not isinstance(value, bool) and not (isinstance(value, int) and value in _INTEGER):
        message = f"{shown(name)} is {shown(value)}, but an extension must be a text, true, false or a 32-bit integer."
        yield Fault(place, message, "malformed")


def _event(kind: EventType, value: Mapping[str, Any]) -> Event:
    """The event of an envelope that has no fault."""
    data = value["data"]
    accounts = data.get("accounts")
    return Event(
        source=value["source"],
        id=value["id"],
        type=kind,
        time=value.get("time"),
        subject=value.get("subject"),
        dataschema=value.get("dataschema"),
        data=data,
        account=data.get("account"),
        accounts=tuple(accounts) if isinstance(accounts, list) else accounts,
        products=tuple(dict.fromkeys(data.get("products") or ())),
        not_before=instant(data["not_before"]) if data.get("not_before") else None,
        expires_at=instant(data["expires_at"]) if data.get("expires_at") else None,
        extensions={name: item for name, item in value.items() if name not in _ATTRIBUTES and item is not None},
    )


# ---------------------------------------------------------------- files


def read_file(data: bytes, *, name: str = "") -> list[Event]:
    """The events of a file: one event, a JSON array, or JSON Lines. Raises EventError with all faults of the file.

    A `name` that ends in .jsonl or .ndjson says that it is JSON Lines, unless its first line is no whole object;
    otherwise it shows in the first two lines.
    """
    if not data.strip():
        message = "The file is empty; it should hold one event, a JSON array or JSON Lines."
        raise EventError(Fault("", message, "malformed"))
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    first = next((line.strip() for line in lines if line.strip()), b"")
    named_lines = name.endswith((".jsonl", ".ndjson")) and first != b"{" and not first.startswith(b"[")
    if named_lines or _looks_like_lines(lines):
        return _every((("", number, line) for number, line in enumerate(lines, 1) if line.strip()), _parse_line)
    value = parse_json(data)
    return parse_batch(value) if isinstance(value, list) else [parse_event(value)]


def _looks_like_lines(lines: Sequence[bytes]) -> bool:
    """Whether two objects follow one another, each on a line: no single JSON value looks like this."""
    filled = (line.strip() for line in lines if line.strip())
    first, second = next(filled, b""), next(filled, b"")
    return first.startswith(b"{") and first.endswith(b"}") and second.startswith(b"{")


def _parse_line(line: bytes, _pointer: str) -> Event:
    try:
        value = strictjson.loads(line)
    except strictjson.StrictJSONError as error:
        message = str(error).replace(" at line 1, column ", " at column ")  # the line's number stands in the fault
        raise EventError(Fault(error.pointer or "", message, "malformed")) from None
    return parse_event(value)


# ---------------------------------------------------------------- HTTP

_STRUCTURED: Final = "application/cloudevents+json"
_BATCH: Final = "application/cloudevents-batch+json"
_QUOTED: Final = re.compile(r'"(?:[^"\\]|\\.)*"')


def from_http(headers: Mapping[str, str], body: bytes) -> Received:
    """The events of one HTTP request in structured, batch or binary mode. Raises EventError.

    `headers.items()` may name a header twice; a repeated one that matters here is refused. An envelope sent as plain
    application/json without ce- headers counts as structured.
    """
    fields = _header_fields(headers)
    media_type = _media_type(fields.get("content-type", ""))
    binary = any(name.startswith("ce-") for name in fields)
    if media_type == _BATCH:
        _refuse_long_body(body, MAX_BATCH_BYTES, "a batch")
        return Received(tuple(parse_batch(parse_json(body), most=MAX_BATCH_EVENTS)), batch=True)
    if media_type == _STRUCTURED or (media_type == "application/json" and not binary):
        _refuse_long_body(body, MAX_EVENT_BYTES_WITH_FILES, "an event with its attachments")
        value = parse_json(body)
        if isinstance(value, list):
            raise EventError(Fault("", f"The body is a JSON array; send a batch as {_BATCH}.", "malformed"))
        return Received((parse_event(value),), batch=False)
    if binary and _is_json(media_type):
        _refuse_long_body(body, MAX_EVENT_BYTES_WITH_FILES, "an event with its attachments")
        return Received((parse_event(_binary_envelope(fields, body)),), batch=False)
    found = (
        f"has the Content-Type {shown(fields['content-type'])}" if "content-type" in fields else "has no Content-Type"
    )
    remedy = f"send {_STRUCTURED}, {_BATCH}, or application/json with ce- headers, in UTF-8."
    raise EventError(Fault("", f"The request {found}; {remedy}", "unsupported"))


def _header_fields(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that matter here, by lower-case name. Refuses repeated ones and encoded bodies."""
    fields: dict[str, str] = {}
    for written, value in headers.items():
        name = written.lower()
        if name in ("content-type", "content-encoding") or name.startswith("ce-"):
            if name in fields:
                raise EventError(Fault("", f'The header "{name}" stands there twice; send it once.', "malformed"))
            fields[name] = value.strip()
    encoding = fields.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        message = f"The body has the Content-Encoding {shown(encoding)}; send it as it is."
        raise EventError(Fault("", message, "unsupported"))
    return fields


def _refuse_long_body(body: bytes, most: int, what: str) -> None:
    if len(body) > most:
        raise EventError(Fault("", f"The body has {len(body):,} bytes; {what} may have {most:,}.", "too_large"))


def _binary_envelope(fields: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """The envelope that a request in binary mode stands for (HTTP protocol binding, section 3.1)."""
    envelope: dict[str, Any] = {"datacontenttype": fields["content-type"]}
    for name, value in fields.items():
        attribute = name.removeprefix("ce-")
        if attribute in ("data", "data_base64", "datacontenttype"):
            message = f'The header "{name}" is not used in binary mode: the body is the data, Content-Type its type.'
            raise EventError(Fault("", message, "malformed"))
        if attribute != name:
            envelope[attribute] = _header_text(name, value)
    if body.strip():
        try:
            envelope["data"] = strictjson.loads(body)
        except strictjson.StrictJSONError as error:
            raise EventError(Fault("/data" + (error.pointer or ""), str(error), "malformed")) from None
    return envelope


def _header_text(name: str, value: str) -> str:
    """The attribute that a header's value writes (HTTP protocol binding, section 3.1.3.2)."""
    if _QUOTED.fullmatch(value):
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    try:
        return unquote_to_bytes(value.encode("ascii")).decode()
    except UnicodeError:
        message = f'The header "{name}" is not ASCII with percent-encoded UTF-8; encode its value.'
        raise EventError(Fault("/" + name.removeprefix("ce-"), message, "malformed")) from None


def _media_type(content_type: str) -> str:
    """The bare media type in lower case; empty where a charset other than UTF-8 is named, since JSON has no other."""
    media_type, *parameters = (part.strip().lower() for part in content_type.split(";"))
    charsets = [part.removeprefix("charset=").strip('"') for part in parameters if part.startswith("charset=")]
    return media_type if all(charset in ("utf-8", "utf8", "us-ascii") for charset in charsets) else ""


def _is_json(media_type: str) -> bool:
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))
