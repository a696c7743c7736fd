"""Mails of a fan-out, each written by filling what is personal into what is shared.

A *rendition* is the part of an event's mails that all recipients of one kind share: literals, encoded ahead, with
places for the personal values. It is made at the second mail of its kind, from one rendering with marks
(`worker.tracing`), and only where that proves that the templates do nothing with a personal value but say it.

Promises: equal input, equal bytes, whether by a rendition or in full. What cannot be proven is rendered in full: a
template that computes on a value, a value that is no plain piece of one line, a mail whose words hold a boundary. But
mails whose templates compute still share an *outline* (`worker.rendering.Outline`): their headers are filled in, as
is their subject where that is proven; where a template computes inside of blocks alone these are rendered for each
mail, and else all of its text.

And the proof is checked: the first mail of each rendition and outline, the 10th, 100th and each 1,000th of its kind are
also rendered without and compared byte by byte; where they differ, that is logged as an error, the full mail goes out,
and the kind has neither any more.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import repeat
from operator import itemgetter
from typing import Any, Final, TypeVar

from markupsafe import escape

from worker import logs, mime
from worker.fanout import EventRow
from worker.links import Named, bounce_sender, named_delivery
from worker.mails import Composer, Contact, Due, People, Shape
from worker.rendering import (
    FIRST_GROUND,
    IN_A_GROUND,
    LABEL,
    NAME,
    NAME_LENGTH,
    NOT_IN_HEADERS,
    NUMBER,
    OUTPUT_BUDGET,
    SUBJECT,
    SUBJECT_LENGTH,
    UNSUBSCRIBE,
    Email,
    Mail,
    Outline,
    Renderer,
    RenderError,
    Traced,
    date_text,
    one_line,
    personal_tokens,
    woven,
)
from worker.tracing import Computed, split
from worker.transaction import Envelope

T = TypeVar("T")

logger = logs.get(__name__)

MOST_KINDS: Final = 256
#: Kinds of mails that are remembered; a broadcast has about 20, one with 10,000 is rendered in full.
MOST_OCTETS: Final = 64 * 1024 * 1024
#: Of all renditions together, with their attachments.
MOST_PROVEN: Final = 10_000
LONGEST_VALUE: Final = 250
#: Characters of a personal value; names have at most 100, subjects 200.
TEMPLATE_OCTETS: Final = 256 * 1024
#: Of the templates of a rendition, but four at least: one for each length of an account's id, and for texts that are
#: ASCII and others.
MOST_TRIES: Final = 5
#: Mails of a kind whose own values keep a rendition from being made; after that it has none.
CHECKED: Final = (10, 100, 1_000)
#: Mails of a kind at which it is rendered in full too, beside its first; after that at each multiple of the last.


@dataclass(frozen=True, slots=True)
class Told:
    """An event's mails of a variant and locale were rendered with these templates."""

    event_id: int
    variant: str
    locale: str
    template_hash: str


@dataclass(slots=True)
class Kind:
    """The mails of an event that differ in personal values alone."""

    shapes: tuple[Shape, ...]  # kept, for their ids stand in the key
    listed: bool  # they can be opted out of
    mails: int = 0
    rendition: Rendition | None = None
    outline: _Outlined | None = None  # for those that must be rendered each
    placed: bool = False  # they have one locale and time zone
    by_place: bool = False  # those of each locale and time zone are a kind of their own
    refused: bool = False  # it is known that they must be rendered in full
    tries: int = 0  # to make a rendition
    checked_at: int = 0  # mails from which on the next one is checked
    locales: set[str] = field(default_factory=set)  # those whose first mail was rendered in full

    @property
    def octets(self) -> int:
        """About how much memory it takes."""
        return sum(made.octets for made in (self.rendition, self.outline) if made is not None)


@dataclass(slots=True)
class _Whole:
    """A mail that was rendered in full."""

    mail: Mail
    email: Email
    body: bytes


class Press:
    """Writes the mails of a process. `address_key` signs their envelope senders."""

    def __init__(self, composer: Composer, renderer: Renderer, address_key: bytes) -> None:
        self.composer = composer
        self.address_key = address_key
        self._renderer = renderer
        self._kinds: OrderedDict[tuple[Any, ...], Kind] = OrderedDict()
        self._octets = 0  # of the renditions
        self._proven: set[tuple[int, str, str]] = set()
        self._read_back: set[tuple[str, ...]] = set()  # (type, version, variant, locale) that the library could read
        self.news: list[Told] = []  # what `told` will say
        self._nonce = secrets.token_hex(4)
        self.by_rendition = 0  # mails that were made so
        self.in_full = 0

    def envelope(self, event: EventRow, due: Due, people: People, *, begun: int, eightbit: bool) -> Envelope:
        """One mail, to be handed to a relay; `eightbit`: the relay offers 8BITMIME. `begun` is the date of a first try.

        Raises RenderError and MimeError: nothing is wrong with other mails.
        """
        contact = people.contacts[due.grounds[0].contact]
        delivery = named_delivery(event.id, event.ulid, due.n, due.mailbox_key)
        recipient, written = mime.wire_address(contact.email), None
        if self.shares(event):
            written = self._filled(
                event, due, people, contact, recipient=recipient, delivery=delivery, begun=begun, eightbit=eightbit
            )
        if written is not None:
            body, is_ascii = written
        else:
            body = self._full(event, due, people, begun=begun, eightbit=eightbit).body
            is_ascii = body.isascii()
        sender = bounce_sender(self.address_key, delivery, domain=event.bounce_domain)
        # By place, for names cost here: smtputf8, eightbit, checked.
        return Envelope(sender, recipient, body, not recipient.isascii(), eightbit and not is_ascii, True)

    @staticmethod
    def shares(event: EventRow) -> bool:
        """Whether the mails of an event may have renditions: those to one account are too few, or say too much."""
        return event.scope != "one" and event.category != "approval_request"

    def told(self) -> list[Told]:
        """The variants and locales of events that were rendered since this was last asked."""
        told, self.news = self.news, []
        return told

    # ------------------------------------------------------------ in full

    def _full(self, event: EventRow, due: Due, people: People, *, begun: int, eightbit: bool) -> _Whole:
        """The mail rendered for its recipient alone; the first of each variant and locale is read back."""
        mail = self.composer.mail_of(event, due, people, now=begun)
        email = self._renderer.render(mail)
        body = mime.assemble(email, eightbit=eightbit)
        self.in_full += 1
        variant = (event.id, mail.variant, mail.locale)
        if variant not in self._proven:
            version = self._renderer.version(event.type)
            self._prove((event.type, version, mail.variant, mail.locale), email, body, eightbit=eightbit)
            if len(self._proven) >= MOST_PROVEN:
                self._proven.clear()
            self._proven.add(variant)
            self.news.append(Told(*variant, version))
        return _Whole(mail, email, body)

    def _prove(self, templates: tuple[str, ...], email: Email, body: bytes, *, eightbit: bool) -> None:
        """Read a mail back: by the standard library the first of these templates, and each that is not plain."""
        known = templates in self._read_back
        if not (known and mime.says_plainly(email, body, eightbit=eightbit)):
            mime.prove(email, body, eightbit=eightbit)
            if len(self._read_back) >= MOST_PROVEN:
                self._read_back.clear()
            self._read_back.add(templates)

    # ------------------------------------------------------------ by a rendition

    def _filled(
        self,
        event: EventRow,
        due: Due,
        people: People,
        contact: Contact,
        *,
        recipient: str,
        delivery: Named,
        begun: int,
        eightbit: bool,
    ) -> tuple[bytes, bool] | None:
        """The mail by the rendition or outline of its kind, and whether it is ASCII; None where it must be in full."""
        kind = self.kind_of(event, due, people, contact, eightbit=eightbit)
        kind.mails += 1
        if contact.locale not in kind.locales or (kind.refused and kind.outline is None):
            kind.locales.add(contact.locale)
            return None
        values = self.composer.personal(due, delivery, people, listed=kind.listed)
        if bool(values[NAME]) != bool(contact.name):
            return None  # a name of blanks alone: the kind's others have one
        seconds = _seconds(due, begun)
        if kind.rendition is not None:
            written = kind.rendition.write(values, recipient, seconds, eightbit=eightbit)
        elif kind.outline is not None:
            written = kind.outline.write(self._renderer, values, contact, recipient, seconds, eightbit=eightbit)
        else:
            body = self._first(event, due, people, kind, values, begun=begun, eightbit=eightbit)
            return body, body.isascii()
        if written is None:
            return None
        if kind.mails >= kind.checked_at:
            body = self.checked(event, due, people, kind, written[0], begun=begun, eightbit=eightbit)
            return body, body.isascii()
        if kind.rendition is not None:
            self.by_rendition += 1
        else:
            self.in_full += 1
        return written

    def kind_of(self, event: EventRow, due: Due, people: People, contact: Contact, *, eightbit: bool) -> Kind:
        """The kind of a mail: all that its words depend on but the personal values."""
        grounds, accounts = due.grounds, people.accounts
        first = grounds[0]
        key: tuple[Any, ...] = (
            event.ulid, event.sender_domain, eightbit, bool(contact.name), id(first.shape), accounts[first.account][2],
        )  # fmt: skip
        if len(grounds) > 1:
            key += tuple((id(one.shape), accounts[one.account][2]) for one in grounds[1:])
        if event.data.get("attachments"):
            key += (self.composer.attachments_seen(event, due, people),)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._remember(key, self._new_kind(event, due, people))
        if kind.by_place:
            of_all, key = key, (*key, contact.locale, contact.timezone)
            kind = self._kinds.get(key)
            if kind is None:
                return self._remember(key, self._new_kind(event, due, people, placed=True))
            self._kinds.move_to_end(of_all)
        self._kinds.move_to_end(key)
        return kind

    def _new_kind(self, event: EventRow, due: Due, people: People, *, placed: bool = False) -> Kind:
        listed = self.composer.links is not None and self.composer.can_opt_out(event, due, people)
        return Kind(tuple(ground.shape for ground in due.grounds), listed, placed=placed)

    def _remember(self, key: tuple[Any, ...], kind: Kind) -> Kind:
        self._kinds[key] = kind
        while len(self._kinds) > MOST_KINDS or (self._octets > MOST_OCTETS and len(self._kinds) > 1):
            _, forgotten = self._kinds.popitem(last=False)
            self._octets -= forgotten.octets
        return kind

    def _first(
        self, event: EventRow, due: Due, people: People, kind: Kind, values: list[bytes], *, begun: int, eightbit: bool
    ) -> bytes:
        """A mail in full, from which its kind gets a rendition where the templates allow one."""
        whole = self._full(event, due, people, begun=begun, eightbit=eightbit)
        made = self._made(whole, kind, values)
        if made is None:
            return whole.body
        recipient = mime.wire_address(whole.mail.to_address)
        written = made.write(values, recipient, _seconds(due, begun), eightbit=eightbit)
        if written is not None:
            body, _ = written
            kind.rendition = made
            self._octets += made.octets
            self._check(event, due, kind, body, whole)
            mime.prove(whole.email, whole.body, eightbit=eightbit)
        return whole.body

    def _made(self, whole: _Whole, kind: Kind, values: Sequence[bytes]) -> Rendition | None:
        """A new rendition for a kind; None where the templates allow none."""
        kind.tries += 1
        kind.refused = kind.tries >= MOST_TRIES
        said = [value.decode() for value in values]
        try:
            traced = self._renderer.trace(whole.mail, tokens=personal_tokens(said), nonce=self._nonce)
            if traced.by_place and not kind.placed:
                kind.by_place = True
                return None
            return Rendition(traced, whole.email, self._nonce, grounds=len(whole.mail.grounds))
        except Computed:
            self._outline(whole, kind, said)
        except (RenderError, mime.MimeError):
            kind.refused = True
        return None

    def _outline(self, whole: _Whole, kind: Kind, values: Sequence[str]) -> None:
        """Give a kind whose templates compute an outline."""
        kind.refused = True
        try:
            outline = self._renderer.outline(whole.mail, values=values, nonce=self._nonce)
        except RenderError:
            return
        if outline.by_place and not kind.placed:
            kind.by_place, kind.refused = True, False
        else:
            kind.outline = _Outlined(outline, whole.email, self._nonce)
            self._octets += kind.outline.octets

    def checked(
        self, event: EventRow, due: Due, people: People, kind: Kind, body: bytes, *, begun: int, eightbit: bool
    ) -> bytes:
        """A mail of a kind in full, after it was compared with what was made without."""
        whole = self._full(event, due, people, begun=begun, eightbit=eightbit)
        self._check(event, due, kind, body, whole)
        return whole.body

    def _check(self, event: EventRow, due: Due, kind: Kind, body: bytes, whole: _Whole) -> None:
        """Compare a mail with itself in full; where they differ the kind has no rendition any more."""
        last = CHECKED[-1]
        further = (kind.mails // last + 1) * last
        kind.checked_at = next((count for count in CHECKED if count > kind.mails), further)
        if body == whole.body:
            return
        place = next((at for at, (a, b) in enumerate(zip(body, whole.body, strict=False)) if a != b), len(whole.body))
        logger.error("rendition.differs", event_id=event.ulid, n=due.n, octet=place, what_next="it is rendered in full")
        if any(one is kind for one in self._kinds.values()):
            self._octets -= kind.octets
        kind.rendition, kind.outline, kind.refused = None, None, True


def _seconds(due: Due, begun: int) -> int:
    """The date of a mail, seconds since 1970: when it was first tried."""
    return (due.first_flight_at or begun) // 1_000_000


# ---------------------------------------------------------------- renditions

_SPECIAL: Final = b"&<>\"'="  # what is escaped, and what begins a boundary
LONGEST_WORD: Final = 80  # octets of a plain word: an account's id, or a token
_HEADERS: Final = 1_500  # octets that a mail's headers take, about
TITLE: Final = FIRST_GROUND + 1  # of the first account, as mails show it
_AT_ONCE: Final = frozenset({NAME, UNSUBSCRIBE, FIRST_GROUND, TITLE, FIRST_GROUND + 2})  # places of one ground in texts
# What is filled into templates: the values of a mail of one ground, two of them escaped, and lines that it has alone.
_NAME_ESCAPED, _TITLE_ESCAPED, _TO, _DATE, _AFTER, _SUBJECT = range(
    FIRST_GROUND + IN_A_GROUND, FIRST_GROUND + IN_A_GROUND + 6
)
_ESCAPED: Final = {NAME: _NAME_ESCAPED, TITLE: _TITLE_ESCAPED}
_Template = tuple[bytes, Callable[[Sequence[Any]], tuple[Any, ...]]]
"""Octets with a `%b` wherever something is filled in, and what takes that out of the above in its order."""


def _template(pieces: Sequence[bytes | int]) -> _Template:
    """A template of literals and of the numbers of what is filled in."""
    octets = b"".join([b"%b" if isinstance(piece, int) else piece.replace(b"%", b"%%") for piece in pieces])
    return octets, itemgetter(*[piece for piece in pieces if isinstance(piece, int)])


class Rendition:
    """What the mails of a kind share, and where their personal values go. Raises Computed where that is not certain."""

    def __init__(self, traced: Traced, email: Email, nonce: str, *, grounds: int) -> None:
        forms: dict[tuple[int, int], int] = {}  # (place, how often escaped) -> slot
        self._subject = split(traced.subject, nonce)
        _refuse_marks("plain", *self._subject)
        self._plain = _Text("plain", traced.text, nonce, forms)
        self._html = _Text("html", traced.html, nonce, forms)
        self._forms = tuple((place, bool(level), not _is_token(place)) for place, level in forms)
        self._frame = mime.frame(email, self._plain.shared, self._html.shared)
        self._doubtful = self._plain.doubtful or self._html.doubtful  # whether a boundary must be looked for in each
        if not self._frame.first:
            raise Computed("a text or a file holds a boundary")
        fixed = None if self._subject[1] else mime.header("Subject", email.subject).encode()
        self._head = _Head(traced.headers, fixed, nonce, grounds=grounds)
        if fixed is not None and traced.subject != email.subject:
            raise Computed("the subject is another without marks")
        self._templates: dict[tuple[int, tuple[bool, bool]], _Template] = {}
        self._room = min(self._plain.room, self._html.room)
        simple = grounds == 1 and fixed is not None and {place for place, _, _ in self._forms} <= _AT_ONCE
        self._at_once = simple and not self._doubtful and self._room >= LONGEST_WORD
        self._is_ascii = self._plain.shared_is_ascii, self._html.shared_is_ascii
        texts = self._plain.size + self._html.size
        self._kept = max(4, TEMPLATE_OCTETS // (texts + _HEADERS))  # templates
        self.octets = 3 * texts + self._kept * (texts + _HEADERS) + len(self._frame.after)

    def write(self, values: list[bytes], recipient: str, seconds: int, *, eightbit: bool) -> tuple[bytes, bool] | None:
        """The mail with these values (as `Composer.personal` gives them), and whether all of it is ASCII.

        None where it must be rendered in full. `recipient` is as `mime.wire_address` writes it. Raises MimeError.
        Nearly all mails are filled into one template of all their octets; those whose values need more care are not.
        """
        head = self._head.pieces(values) if self._at_once else None
        if head is None:
            return self._written_by_pieces(values, recipient, seconds, eightbit=eightbit)
        name, title = values[NAME], values[TITLE]  # people chose these, each one trimmed line; the rest is plain words
        chosen = name + title
        if len(chosen.translate(None, _SPECIAL)) != len(chosen):
            if b"=" in chosen:  # it could hold a boundary
                return self._written_by_pieces(values, recipient, seconds, eightbit=eightbit)
            name, title = escape(name.decode()).encode(), escape(title.decode()).encode()
        is_ascii = self._is_ascii if chosen.isascii() else (self._plain.is_ascii(values), self._html.is_ascii(values))
        if len(name) + len(title) > self._room or not (eightbit or all(is_ascii)):
            return self._written_by_pieces(values, recipient, seconds, eightbit=eightbit)
        template, order = self._template(head, len(values[FIRST_GROUND]), is_ascii)
        to = mime.written_mailbox("To", values[NAME].decode(), recipient).encode()
        octets = (*values, name, title, to, _date_line(seconds), self._frame.after)
        return template % order(octets), all(is_ascii) and to.isascii()

    def _template(self, head: Sequence[bytes | int], length: int, is_ascii: tuple[bool, bool]) -> _Template:
        """The template for mails with this head, whose plain and whose HTML text are ASCII or not; it is kept."""
        key = length, is_ascii
        found = self._templates.get(key)
        if found is None:
            frame = self._frame
            plain = self._plain.pieces(is_ascii=is_ascii[0])
            html = self._html.pieces(is_ascii=is_ascii[1])
            if len(self._templates) >= self._kept:
                self._templates.clear()
            found = _template([*head, frame.before, *plain, frame.between, *html, _AFTER])
            self._templates[key] = found
        return found

    def form(self, length: int, *, eightbit: bool) -> tuple[_Template, bool] | None:
        """The template for mails whose values are plain, with an account's id of a length, and whether they are ASCII.

        Plain values are ASCII, have at most 100 characters each, and nothing in them is escaped. None where such mails
        can't be filled into one template.
        """
        head = self._head.pieces_for(length) if self._at_once and self._room >= 2 * NAME_LENGTH else None
        if head is None or not (eightbit or all(self._is_ascii)):
            return None
        return self._template(head, length, self._is_ascii), all(self._is_ascii)

    def lines(
        self, columns: Sequence[Sequence[bytes]], recipients: Iterable[str], *, begun: int
    ) -> list[Iterable[bytes]]:
        """What is filled into `form` behind these columns of plain values (`Composer.columns`), as further columns.

        `begun` is the date of the mails, microseconds.
        """
        names, titles = columns[NAME], columns[TITLE]
        to = [b"To: %b <%b>\r\n" % (name, address.encode()) for name, address in zip(names, recipients, strict=True)]
        date = _date_line(begun // 1_000_000)
        return [names, titles, to, repeat(date), repeat(self._frame.after)]

    def _written_by_pieces(
        self, octets: Sequence[bytes], recipient: str, seconds: int, *, eightbit: bool
    ) -> tuple[bytes, bool] | None:
        """What `write` promises, whatever the values are."""
        values = [value.decode() for value in octets]
        literals, marks = self._subject
        if marks:
            said = [str(escape(values[place])) if level else values[place] for place, level in marks]
            values[SUBJECT] = one_line("".join(woven(literals, said)), SUBJECT_LENGTH)
            if not values[SUBJECT] or max(map(len, said)) > LONGEST_VALUE:
                return None
        filled = []
        doubtful = self._doubtful
        for place, escaped, chosen in self._forms:
            value = values[place]
            if chosen and not (  # by people: any text
                0 < len(value) <= LONGEST_VALUE
                and value == value.strip()
                and (value.isprintable() or not NOT_IN_HEADERS.search(value))
            ):
                return None
            written = value.encode()
            if chosen:
                doubtful = doubtful or b"=" in written
                if escaped and len(written.translate(None, _SPECIAL)) != len(written):
                    written = escape(value).encode()
            filled.append(written)
        plain, plain_head = self._plain.write(filled, eightbit=eightbit)
        html, html_head = self._html.write(filled, eightbit=eightbit)
        frame = self._frame
        if doubtful and any(boundary in plain or boundary in html for boundary in frame.boundaries):
            return None
        head = self._head.write(values, recipient, seconds)
        body = b"".join((head, frame.before, plain_head, plain, frame.between, html_head, html, frame.after))
        return body, body.isascii()


class _Outlined:
    """An outline and what its mails share around their two texts."""

    def __init__(self, outline: Outline, email: Email, nonce: str) -> None:
        self.outline = outline
        fixed = None if outline.subject is None else mime.header("Subject", outline.subject).encode()
        self._head = _Head(outline.headers, fixed, nonce, grounds=len(outline.grounds))
        self._frame = mime.frame(email, b"", b"")
        self.octets = outline.octets + len(self._frame.after)

    def write(
        self,
        renderer: Renderer,
        values: Sequence[bytes],
        contact: Contact,
        recipient: str,
        seconds: int,
        *,
        eightbit: bool,
    ) -> tuple[bytes, bool] | None:
        """What `Rendition.write` promises, with texts that are rendered for the contact."""
        said = [value.decode() for value in values]
        filled = renderer.fill(self.outline, said, locale=contact.locale, timezone=contact.timezone)
        if filled is None:
            return None
        said[SUBJECT], text, html = filled
        plain_part = mime.text_part("plain", *mime.encoded_body(text, eightbit=eightbit))
        html_part = mime.text_part("html", *mime.encoded_body(html, eightbit=eightbit))
        frame = self._frame
        if any(boundary in plain_part or boundary in html_part for boundary in frame.boundaries):
            return None
        head = self._head.write(said, recipient, seconds)
        body = b"".join((head, frame.before, plain_part, frame.between, html_part, frame.after))
        return body, body.isascii()


def _is_token(place: int) -> bool:
    """Whether the value at a place is made of letters, digits, `-` and `_`; people choose the others."""
    return place == UNSUBSCRIBE or (place >= FIRST_GROUND and (place - FIRST_GROUND) % IN_A_GROUND == 2)


class _Text:
    """One of the two texts of a rendition: octets around the personal values."""

    def __init__(self, subtype: str, text: str, nonce: str, forms: dict[tuple[int, int], int]) -> None:
        texts, marks = split(text, nonce)
        self.size = len(text)
        _refuse_marks(subtype, texts, marks)
        literals = [mime.wire_octets(literal) for literal in texts]
        # Escaping changes no token, so that it has one form.
        slots = [forms.setdefault((place, level and not _is_token(place)), len(forms)) for place, level in marks]
        self.shared = b"\0".join(literals)
        self.shared_is_ascii = self.shared.isascii()
        self.doubtful = any(map(_BEGUN_BOUNDARY.search, texts[:-1]))
        self.heads = {name: mime.text_part(subtype, b"", name) for name in _ENCODINGS}
        self._literals = literals
        self._order = (
            itemgetter(*woven(range(len(literals)), [len(literals) + slot for slot in slots])) if slots else None
        )
        self._controls = any(map(mime.has_controls, literals))
        self._lines = _lines(literals, slots)
        self._literal_size = sum(map(len, literals))
        lengths = [(_octets_of(line), tuple(piece for piece in line if isinstance(piece, int))) for line in self._lines]
        self._widest = max(length for length, _ in lengths)
        self._widest_shared = max((length for length, own in lengths if not own), default=0)
        self._personal_lines = [(length, own) for length, own in lengths if own]
        places = [_ESCAPED.get(place, place) if level else place for place, level in marks]
        self._pieces: list[bytes | int] = woven([*literals], places)
        self._chosen = tuple({place for place, _ in marks} & {NAME, TITLE})
        self.room = self._room()
        self._quoted: list[bytes | list[bytes | int]] | None = None

    def is_ascii(self, values: Sequence[bytes]) -> bool:
        """Whether the text of a mail of one ground is, with these values."""
        return self.shared_is_ascii and all(values[place].isascii() for place in self._chosen)

    def pieces(self, *, is_ascii: bool) -> list[bytes | int]:
        """The text with its headers, for a template; sent as it is."""
        return [self.heads[b"7bit" if is_ascii else b"8bit"], *self._pieces]

    def _room(self) -> int:
        """With values of at most so many octets the text needs no encoding for its lines; -1: it always needs one."""
        if self._controls or self._widest_shared > mime.LONGEST_LINE:
            return -1
        rooms = [(mime.LONGEST_LINE - length) // len(own) for length, own in self._personal_lines]
        return min(rooms, default=mime.LONGEST_LINE)

    def write(self, values: Sequence[bytes], *, eightbit: bool) -> tuple[bytes, bytes]:
        """The text with these values as it is sent, and the headers that say how: what `mime.encoded_body` says."""
        octets = b"".join(self._order((*self._literals, *values))) if self._order is not None else self._literals[0]
        is_ascii = octets.isascii()
        if (eightbit or is_ascii) and not self._controls and self._lines_fit(values, len(octets)):
            return octets, self.heads[b"7bit" if is_ascii else b"8bit"]
        encoded, name = mime.encoded_octets(octets, lambda: self._in_quoted(values))
        return encoded, self.heads[name]

    def _lines_fit(self, values: Sequence[bytes], size: int) -> bool:
        if self._widest + size - self._literal_size <= mime.LONGEST_LINE:
            return True  # even if all values stood in the longest line
        return self._widest_shared <= mime.LONGEST_LINE and all(
            length + sum(len(values[slot]) for slot in slots) <= mime.LONGEST_LINE
            for length, slots in self._personal_lines
        )

    def _in_quoted(self, values: Sequence[bytes]) -> bytes:
        """Quoted-printable, in which the lines that all share are encoded once."""
        if self._quoted is None:
            self._quoted = _shared_encoded(self._lines[:-1])  # behind the last line end stands nothing
        return b"".join(
            piece if isinstance(piece, bytes) else mime.quoted_lines(_line(piece, values)) for piece in self._quoted
        )


_ENCODINGS: Final = (b"7bit", b"8bit", b"quoted-printable", b"base64")


def _refuse_marks(subtype: str, texts: Sequence[str], marks: Sequence[tuple[int, int]]) -> None:
    """Raises Computed where what is done to a whole text, in full, could be another thing for another value."""
    if len(marks) * LONGEST_VALUE * len("&#34;") > OUTPUT_BUDGET // 2:
        raise Computed("a text has so many personal values that it could grow beyond its budget")
    in_tag = False
    for text, (place, level) in zip(texts, marks, strict=False):
        opened, closed = text.rfind("<"), text.rfind(">")
        in_tag = opened > closed if max(opened, closed) >= 0 else in_tag
        if level > 1 or (subtype == "html" and not _is_token(place) and (in_tag or level != 1)):
            raise Computed("a personal value stands in a tag, or is escaped otherwise than once")


# A boundary is `=_` and hexadecimal digits (mime.frame), and stands in no shared text. So it can stand in a mail only
# where a value holds its `=`, or where one follows a text that ends like this.
_BEGUN_BOUNDARY: Final = re.compile(r"=(?:_[0-9a-f]*)?\Z")


def _lines(literals: Sequence[bytes], slots: Sequence[int]) -> list[list[bytes | int]]:
    """The lines of a text without their ends, each as octets and slots."""
    lines: list[list[bytes | int]] = [[]]
    for literal, slot in zip(literals, [*slots, None], strict=True):
        first, *others = literal.split(b"\r\n")
        lines[-1].append(first)
        lines += [[other] for other in others]
        if slot is not None:
            lines[-1].append(slot)
    return lines


def _octets_of(line: Sequence[bytes | int]) -> int:
    return sum(len(piece) for piece in line if isinstance(piece, bytes))


def _line(pieces: Sequence[bytes | int], values: Sequence[bytes]) -> bytes:
    return b"".join([piece if isinstance(piece, bytes) else values[piece] for piece in pieces]) + b"\r\n"


def _shared_encoded(lines: Sequence[list[bytes | int]]) -> list[bytes | list[bytes | int]]:
    """The lines of a text, those that all mails share as quoted-printable."""
    made: list[bytes | list[bytes | int]] = []
    for line in lines:
        if any(isinstance(piece, int) for piece in line):
            made.append(line)
            continue
        encoded = mime.quoted_lines(_line(line, ()))
        if made and isinstance(made[-1], bytes):
            made[-1] += encoded
        else:
            made.append(encoded)
    return made


# ---------------------------------------------------------------- headers

_PLAIN_WORD: Final = re.compile(rb"[A-Za-z0-9_.-]{1,%d}" % LONGEST_WORD)
# Plain words that stand where the personal ones will: no header has one of them by itself.
_STAND_INS: Final[dict[int, str]] = {NUMBER: "NzNzNz", UNSUBSCRIBE: "UxUxUx"}


class _Head:
    """The headers of a rendition.

    How a header is folded depends on its value's length. So for each length of an account's id the headers are written
    once by `mime.header` with a stand-in of that length, which later gives way to the id; what is no plain word, and
    the mails with several grounds, have their headers written each time.
    """

    def __init__(self, headers: Sequence[tuple[str, str]], subject: bytes | None, nonce: str, *, grounds: int) -> None:
        self._headers = [(name, *split(value, nonce)) for name, value in headers]
        self._subject = subject
        self._one_ground = grounds == 1
        self._pieces: dict[int, list[bytes | int] | None] = {}

    def pieces(self, values: Sequence[bytes]) -> list[bytes | int] | None:
        """The header block but for the headers of MIME, for mails of one ground; None where it must be written."""
        account = values[FIRST_GROUND]
        if values[LABEL] not in (b"", account) or not _PLAIN_WORD.fullmatch(account):
            return None
        return self.pieces_for(len(account))

    def pieces_for(self, length: int) -> list[bytes | int] | None:
        """The same for an account's id that is a plain word of this length, and is what the List-ID says."""
        if length not in self._pieces:
            self._pieces[length] = self._made_for(length)
        return self._pieces[length]

    def write(self, values: Sequence[str], recipient: str, seconds: int) -> bytes:
        """The whole header block but for those of MIME. Raises MimeError."""
        date = _date_line(seconds)
        to = mime.written_mailbox("To", values[NAME], recipient).encode()
        subject = self._subject if self._subject is not None else mime.header("Subject", values[SUBJECT]).encode()
        octets = [value.encode() for value in values]
        found = self.pieces(octets) if self._one_ground else None
        if found is None:
            return self._written(values, date, to, subject)
        filled_in = (*octets, b"", b"", to, date, b"", subject)
        return b"".join([filled_in[piece] if isinstance(piece, int) else piece for piece in found])

    def _written(self, values: Sequence[str], date: bytes, to: bytes, subject: bytes) -> bytes:
        lines = []
        for name, literals, marks in self._headers:
            if name == "Date":
                lines.append(date)
                continue
            value = "".join(woven(literals, [values[place] for place, _ in marks]))
            lines.append(mime.header(name, value).encode())
            if name == "From":
                lines += [to, subject]
        return b"".join(lines)

    def _made_for(self, length: int) -> list[bytes | int] | None:
        """The pieces for a length, folded once with a stand-in; None where another id could be folded otherwise."""
        account = "Q" * length
        words = _STAND_INS | {FIRST_GROUND: account, LABEL: account}
        pieces: list[bytes | int] = []
        for name, literals, marks in self._headers:
            if name == "Date":
                pieces.append(_DATE)
                continue
            stand_ins = [words[place] for place, _ in marks]
            value = "".join(woven(literals, stand_ins))
            line = mime.header(name, value)
            found = re.split(f"({'|'.join(set(stand_ins))})", line) if stand_ins else [line]
            of_any_length = account not in stand_ins
            if found[1::2] != stand_ins or (stand_ins and of_any_length and (" " in value or len(line) > 800)):
                return None
            pieces.append(found[0].encode())
            for (place, _), literal in zip(marks, found[2::2], strict=True):
                pieces += [FIRST_GROUND if place == LABEL else place, literal.encode()]
            if name == "From":
                pieces += [_TO, _SUBJECT if self._subject is None else self._subject]
        return pieces if all(isinstance(piece, int) or piece.isascii() for piece in pieces) else None


@lru_cache(maxsize=64)
def _date_line(seconds: int) -> bytes:
    return mime.header("Date", date_text(datetime.fromtimestamp(seconds, UTC))).encode()
