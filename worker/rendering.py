"""One event for one recipient, as an email: subject, text, HTML and headers.

Promises: equal `Mail`, equal `Email`. A template sees plain values alone, and a signing link only in the variant
`esign`: in every other one it is taken out of the data first, wherever it stands (rules.md XC-08). What comes from
outside is text: escaped in HTML, one line in headers. A template with a fault raises RenderError and yields no mail.
Owns: the records Mail, Ground, Attachment and Email; headers and footer facts of contract.md section 8.
Types of the class `status` have no template, for they are never mailed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

from jinja2 import TemplateError, TemplateNotFound
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context
from jinja2.utils import concat

from worker import masking
from worker.event_fields import ATTACHMENT_TYPES, MAX_ATTACHMENT_BYTES
from worker.filters import filters, role_title
from worker.masking import WITHHELD
from worker.sandbox import (
    BASE,
    STYLE,
    Sandbox,
    TemplateRefused,
    environment,
    escaped,
    shipped_templates,
)
from worker.tracing import FIRST_HOLE, HOLES, USED, Computed, Holes, Leaf, mark, marked, split, tracing

T = TypeVar("T")
Variant = Literal["direct", "copy", "esign", "fallback", "approval", "contact_list"]

SUBJECT_LENGTH: Final = 200
NAME_LENGTH: Final = 100
OUTPUT_BUDGET: Final = 512 * 1024  # characters of one part (reliability.md A7)
MAX_ATTACHMENTS: Final = 5
PARTS: Final = ("subject.txt", "body.txt", "body.html")

# The types that carry a signing link, and the variants in which each other type is mailed.
SIGNED: Final = frozenset({"quote.issued", "contract.renewal", "contract.authorisation"})


_Seen = tuple[Mapping[str, object], Variant, tuple[dict[str, object], list[dict[str, object]]]]


class RenderError(Exception):
    """The mail cannot be made: names the template and the fault in one sentence. Sending it again does not help."""


@dataclass(slots=True)
class Ground:
    """One account's reason for a mail: the roles (keys, titles and reason codes in the same order) that brought it."""

    account: str
    account_name: str
    category: str
    roles: tuple[str, ...]
    role_titles: tuple[str, ...]
    reasons: tuple[str, ...]
    preference_url: str | None
    catalogue: str = ""
    category_title: str = ""


@dataclass(slots=True)
class Mail:
    """All that a rendering depends on; `grounds` has at least one entry, and the first gives the account name."""

    event: str
    type: str
    category: str
    category_title: str
    class_: str
    data: Mapping[str, object]
    variant: Variant
    to_name: str
    to_address: str
    locale: str
    timezone: str
    grounds: tuple[Ground, ...]
    vendor_name: str
    sender: str
    reply_to: str | None
    message_id: str
    date: datetime
    list_domain: str
    unsubscribe_url: str | None
    status_page_url: str | None
    extra: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that travels in the mail, checked and with a name that is safe to save under."""

    name: str
    media_type: str
    content: bytes


@dataclass(slots=True)
class Email:
    """A mail as meant, before it becomes bytes; header values are decoded text, without To, Subject and MIME ones."""

    subject: str
    text: str
    html: str
    headers: tuple[tuple[str, str], ...]
    to_name: str
    to_address: str
    attachments: tuple[Attachment, ...] = ()


# The places of a mail's personal values (see `Traced`): those of a ground come in threes behind the others.
NAME: Final = 0
SUBJECT: Final = 1
UNSUBSCRIBE: Final = 2  # a token
NUMBER: Final = 3  # the delivery's, in the Message-ID
LABEL: Final = 4  # the first account's, in the List-ID
FIRST_GROUND: Final = 5  # of each: its account's id, its account's name, its contact's preference token
IN_A_GROUND: Final = 3


@dataclass(frozen=True, slots=True)
class Traced:
    """A mail of which only the shared part is there: its personal values are marks (`worker.tracing`).

    The subject is not yet one line where it holds a mark.
    """

    subject: str
    text: str
    html: str
    headers: tuple[tuple[str, str], ...]
    by_place: bool  # the templates asked for the recipient's locale or time zone


@dataclass(frozen=True, slots=True)
class _Gaps:
    """What of a text stands around personal values and around blocks that are rendered each time."""

    literals: list[str]
    marks: list[tuple[int, int]]  # as `split` gives them
    holes: list[str]  # blocks, by place
    vars: dict[str, Any]  # what blocks see of the template's top
    blocks: dict[str, list[Callable[[Context], Iterator[str]]]]


@dataclass(frozen=True, slots=True)
class _Sketch:
    """One text of an outline."""

    template: str
    edges: dict[str, str]  # of long pieces that its mails share, see `_edges`
    gaps: _Gaps | None  # None where its template computes outside of blocks: it is rendered wholly each time


@dataclass(frozen=True, slots=True)
class Outline:
    """What mails share that differ in personal values alone, though their templates compute on these."""

    type: str
    subject: str | None  # None where it is personal
    text: _Sketch
    html: _Sketch
    headers: tuple[tuple[str, str], ...]  # as in `Traced`
    context: dict[str, object]  # what templates see, but for what is personal
    grounds: list[dict[str, object]]  # of it
    links: list[str]  # to unsubscribe, and to each ground's preferences: what stands before the token
    given: list[bool]  # which personal values there are
    by_place: bool  # the templates asked for the recipient's locale or time zone

    @property
    def octets(self) -> int:
        """About how much memory it takes."""
        return sum(
            len(piece) for one in (self.text, self.html) for piece in (one.gaps.literals if one.gaps else one.edges)
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault that `Renderer.check` found in a template."""

    template: str
    fault: str


class Renderer:
    """Renders mails from the shipped templates, over which those in `templates_dir` win file by file.

    Templates are read, checked and compiled when first used and kept; safe to share between threads.
    """

    def __init__(self, *, templates_dir: Path | None = None) -> None:
        self._operator = templates_dir
        self._shipped = shipped_templates()
        roots = (self._shipped,) if templates_dir is None else (templates_dir, self._shipped)
        self._roots = roots
        self._versions: dict[str, str] = {}
        style = next(root / STYLE for root in roots if (root / STYLE).is_file())
        self._environment = environment(roots, filters=filters(style))
        self._tracing = tracing(self._environment)
        self._seen: _Seen = ({}, "direct", ({}, []))

    def prepare(self) -> None:
        """Compile what all templates share, for the first mail would otherwise take a fifth of a second.

        What has a fault is left to be found by whoever renders it.
        """
        for name in sorted({path.stem for root in self._roots for path in (root / BASE).glob("*.txt")}):
            for suffix in (".txt", ".html"):
                with suppress(Exception):  # also what is no UTF-8, or cannot be compiled
                    self._environment.get_template(f"{BASE}{name}{suffix}")
                    self._tracing.get_template(f"{BASE}{name}{suffix}")

    def render(self, mail: Mail) -> Email:
        """The email that `mail` describes. Raises RenderError."""
        data, files = self._visible(mail)
        context = _context(mail, data, _linked(files))
        context["subject"] = subject = self._subject(mail.type, context)
        text, html = self._bodies(self._environment, mail.type, context)
        if (unsafe := _unsafe_link(html)) is not None:
            raise RenderError(f"{mail.type}/body.html: the link {unsafe!r} is neither https, http nor mailto")
        return Email(
            subject=subject,
            text=text,
            html=html,
            headers=headers(mail),
            to_name=shown_name(mail.to_name),
            to_address=mail.to_address,
            attachments=_enclosed(mail.type, files),
        )

    def _subject(self, type_name: str, context: dict[str, object]) -> str:
        subject = one_line(self._part(self._environment, type_name, "subject.txt", context), SUBJECT_LENGTH)
        if not subject:
            raise RenderError(f"{type_name}/subject.txt: the subject is empty; give it at least one word")
        return subject

    def outline(self, mail: Mail, *, values: Sequence[str], nonce: str) -> Outline:
        """The outline of the mails that differ from this one in personal values alone: in these, by their places.

        Where a template computes on these in blocks, they are rendered for each mail; where it does so outside of
        blocks, all of it is. Raises RenderError as `render` does.
        """
        data, files = self._visible(mail)
        context = _context(mail, data, _linked(files))
        tokens = personal_tokens(values)
        used: set[str] = set()
        traced = context | _leaves(context, tokens, nonce) | {USED: used}
        try:
            subject = self._part(self._tracing, mail.type, "subject.txt", traced)
        except Computed:
            subject = mark(nonce, SUBJECT)
        context["subject"] = self._subject(mail.type, context)
        traced["subject"] = Leaf(mark(nonce, SUBJECT))
        text, html = (self._sketch(mail.type, part, context, traced, nonce) for part in ("body.txt", "body.html"))
        del context["subject"]  # which the subject's own template does not see
        grounds = cast("list[dict[str, object]]", context["grounds"])
        urls = [context["unsubscribe_url"], *(ground["preference_url"] for ground in grounds)]
        return Outline(
            type=mail.type,
            subject=None if marked(subject) else one_line(subject, SUBJECT_LENGTH),
            text=text,
            html=html,
            headers=_marked_headers(mail, tokens, nonce),
            context=context,
            grounds=grounds,
            links=[
                cast("str", url or "").removesuffix(values[place])
                for url, place in zip(urls, (UNSUBSCRIBE, *_preferences(values)), strict=True)
            ],
            given=list(map(bool, values)),
            by_place=bool(used & {"locale", "timezone"}),
        )

    def _sketch(
        self, type_name: str, part: str, context: dict[str, object], traced: dict[str, object], nonce: str
    ) -> _Sketch:
        """One text of an outline: `context` is what its template sees, `traced` the same with leaves."""
        name, gaps, used = f"{type_name}/{part}", None, set[str]()
        usual = self._environment.context(name, context)
        pieces = _limited(self._environment.pieces(usual))  # fills in what stands at the top, and all blocks
        try:
            gaps = self._gaps(type_name, part, traced | {USED: used}, usual, nonce)
        except (Computed, RenderError):
            shared = pieces
        else:
            shared = gaps.literals
            cast("set[str]", traced[USED]).update(used)
        return _Sketch(name, {piece: _edges(piece) for piece in shared if len(piece) > 2 * _EDGE}, gaps)

    def _gaps(self, type_name: str, part: str, traced: dict[str, object], usual: Context, nonce: str) -> _Gaps:
        """The gaps of a text whose usual context was rendered before. Raises Computed where there are none."""
        holes = Holes(nonce)
        literals, marks = split(self._part(self._tracing, type_name, part, traced | {HOLES: holes}), nonce)
        if not holes.settled or any(level > (place < FIRST_HOLE) for place, level in marks):
            raise Computed("a block sees what is set behind it, or is escaped as a whole, or a value is escaped twice")
        return _Gaps(literals, marks, holes.names, usual.vars, usual.blocks)

    def fill(
        self, outline: Outline, values: Sequence[str], *, locale: str, timezone: str
    ) -> tuple[str, str, str] | None:
        """The subject, text and HTML of a mail with these personal values, by their places.

        None where it must be rendered in full, if only to tell what is wrong.
        """
        if list(map(bool, values)) != outline.given:
            return None
        context = _context_with(outline, values)
        context["locale"], context["timezone"] = locale, timezone
        try:
            context["subject"] = subject = outline.subject or self._subject(outline.type, context)
            known = [*values]
            known[SUBJECT] = subject
            plain, pieces = (self._pieces(sketch, known, context) for sketch in (outline.text, outline.html))
        except (RenderError, TemplateError, *_FAULTS):
            return None
        text, html = _tidy(concat(plain), concat(pieces))
        if _doubtful_link("".join(map(outline.html.edges.get, pieces, pieces))) and _unsafe_link(html) is not None:
            return None
        return subject, text, html

    def _pieces(self, sketch: _Sketch, values: Sequence[str], context: dict[str, object]) -> list[str]:
        """A text, piece by piece."""
        gaps = sketch.gaps
        if gaps is None:
            return _limited(self._environment.pieces(self._environment.context(sketch.template, context)))
        between = []
        seen = None
        for place, level in gaps.marks:
            if place < FIRST_HOLE:
                between.append(escaped(values[place]) if level else values[place])
                continue
            if seen is None:
                seen = self._environment.context(sketch.template, context)
                seen.vars, seen.blocks = gaps.vars, gaps.blocks
            between.append(concat(_limited(seen.blocks[gaps.holes[place - FIRST_HOLE]][0](seen))))
        return _limited(woven(gaps.literals, between))

    def trace(self, mail: Mail, *, tokens: Mapping[int, str], nonce: str) -> Traced:
        """The mail with marks in place of its personal values; `tokens` are those in its links, by their places.

        An empty value is none: it stays empty. Raises Computed where a template does more with a personal value than
        saying it, and RenderError as `render` does.
        """
        data, files = self._visible(mail)
        context = _context(mail, data, _linked(files))
        used: set[str] = set()
        context |= _leaves(context, tokens, nonce) | {USED: used}
        subject = self._part(self._tracing, mail.type, "subject.txt", context)
        if marked(subject):
            context["subject"] = Leaf(mark(nonce, SUBJECT))
        else:
            context["subject"] = subject = one_line(subject, SUBJECT_LENGTH)
        text, html = self._bodies(self._tracing, mail.type, context)
        return Traced(subject, text, html, _marked_headers(mail, tokens, nonce), bool(used & {"locale", "timezone"}))

    def _visible(self, mail: Mail) -> tuple[dict[str, object], list[dict[str, object]]]:
        """What `_visible` makes, once for neighbours that share their data: templates can change nothing of it."""
        data, variant, seen = self._seen
        if data is not mail.data or variant != mail.variant:
            seen = _visible(mail)
            self._seen = (mail.data, mail.variant, seen)
        return seen

    def _bodies(self, environment: Sandbox, type_name: str, context: dict[str, object]) -> tuple[str, str]:
        return _tidy(*(self._part(environment, type_name, part, context) for part in ("body.txt", "body.html")))

    def version(self, type_name: str) -> str:
        """A short hash of the sources that mails of a type are made from: equal version, equal templates."""
        known = self._versions.get(type_name)
        if known is None:
            digest = hashlib.blake2b(digest_size=8)
            for folder in ("_base", type_name):
                names = {path.name for root in self._roots for path in (root / folder).glob("*") if path.is_file()}
                for name in sorted(names):
                    path = next(root / folder / name for root in self._roots if (root / folder / name).is_file())
                    digest.update(f"{folder}/{name}\0".encode() + path.read_bytes())
            known = self._versions[type_name] = digest.hexdigest()
        return known

    def check(self, samples: Mapping[str, Mapping[str, object]]) -> tuple[Finding, ...]:
        """What is wrong with the templates: each type of `samples` (type -> data) is rendered in each of its variants.

        `samples` holds every type that is mailed; files of the operator's folder that belong to none are found too.
        """
        findings = [*self._strays(samples)]
        for type_name, data in samples.items():
            for variant in variants(type_name):
                try:
                    self.render(_sample_mail(type_name, data, variant))
                except RenderError as error:
                    template, _, fault = str(error).partition(": ")
                    findings.append(Finding(template, f"{fault} (variant {variant})"))
        return tuple(dict.fromkeys(findings))

    def _strays(self, types: Iterable[str]) -> Iterator[Finding]:
        if self._operator is None:
            return
        expected = {f"{name}/{part}" for name in types for part in PARTS}
        for path in sorted(self._operator.rglob("*")):
            name = path.relative_to(self._operator).as_posix()
            if path.is_file() and not name.startswith("_base/") and name not in expected and path.suffix != ".md":
                yield Finding(name, "no mail uses this file; a template is TYPE/subject.txt, body.txt or body.html")

    def _part(self, environment: Sandbox, type_name: str, part: str, context: dict[str, object]) -> str:
        name = f"{type_name}/{part}"
        try:
            budget = OUTPUT_BUDGET if environment is self._environment else OUTPUT_BUDGET // 2  # values may be longer
            return concat(_limited(environment.pieces(environment.context(name, context)), budget))
        except TemplateRefused as error:
            raise RenderError(str(error)) from None
        except TemplateNotFound as error:
            raise RenderError(f"{name}: there is no template {error.name}") from None
        except TemplateError as error:
            raise RenderError(f"{name}: {error.message}") from error
        except _FAULTS as error:
            raise RenderError(f"{name}: {type(error).__name__}: {error}") from error


_FAULTS: Final = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""What an expression of a template may raise, beside Jinja's own errors."""


def variants(type_name: str) -> tuple[Variant, ...]:
    """The variants in which a type can be mailed."""
    if type_name == "action.requested":
        return ("approval", "contact_list")
    if type_name in SIGNED:
        return ("direct", "copy", "esign", "fallback")
    return ("direct", "copy", "fallback")


def shown_name(name: str) -> str:
    """A recipient's name as mails show it; perhaps empty."""
    return one_line(name, NAME_LENGTH)


def shown_account(name: str, account: str) -> str:
    """An account's name as mails show it: its id where it has none."""
    return one_line(name, NAME_LENGTH) or account


def one_line(text: str, longest: int) -> str:
    """The text with control characters and line separators as spaces, trimmed and cut to `longest` characters."""
    # Whatever must not be in a header is not printable: most texts need no search.
    cleaned = text.strip() if text.isprintable() else NOT_IN_HEADERS.sub(" ", text).strip()
    return cleaned if len(cleaned) <= longest else cleaned[: longest - 3].rstrip() + "..."


NOT_IN_HEADERS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NOT_IN_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")
_LINK = re.compile(r"""<\w[^<>]*?\s(?:href|src|action|background)\s*=\s*["']?(?!https?://|mailto:|["'])([^"'>\s]*)""")

_SAFE_TARGETS = ('="https://', '="http://', '="mailto:')
_EDGE: Final = 16  # longer than `href` with a target, and than any word that `_doubtful_link` looks for


def _unsafe_link(html: str) -> str | None:
    """The first link in the HTML that leads elsewhere than to the web or a mailbox."""
    if not _doubtful_link(html):
        return None
    found = _LINK.search(html)
    return found.group(1) if found else None


def _doubtful_link(html: str) -> bool:
    """Whether a link may be unsafe. Quick, and false of nearly every mail; words in a text only cost a slower look."""
    ours = all(rest.startswith(_SAFE_TARGETS) for rest in html.split("href")[1:])
    return not ours or "src" in html or "action" in html or "background=" in html


def _edges(literal: str) -> str:
    """A literal without its middle where that is safe: what `_doubtful_link` then finds hangs on the edges alone."""
    if len(literal) <= 2 * _EDGE:
        return literal
    opened = literal.rfind("href", -_EDGE)  # its target is in what follows
    doubtful = _doubtful_link(literal if opened < 0 else literal[:opened])
    return literal if doubtful else f"{literal[:_EDGE]}\0{literal[-_EDGE:]}"


def woven(literals: Sequence[T], between: Sequence[T]) -> list[T]:
    """A literal, what stands behind it, a literal, and so on to the last literal."""
    pieces = [*literals, *between]
    pieces[::2], pieces[1::2] = literals, between
    return pieces


def _tidy(text: str, html: str) -> tuple[str, str]:
    """The texts as they are sent: no two blank lines together in the plain one, one line end at their ends."""
    return _BLANK_LINES.sub("\n\n", text).strip() + "\n", html.strip() + "\n"


def _limited(given: Iterable[str], budget: int = OUTPUT_BUDGET) -> list[str]:
    """The pieces of a template's output, at most so many characters of it."""
    size = 0
    chunks: list[str] = []
    pieces = iter(given)
    while some := list(islice(pieces, 64)):
        size += sum(map(len, some))
        if size > budget:
            raise TemplateRuntimeError(f"makes more than {budget // 1024} KiB of output")
        chunks += some
    return chunks


# --- What a template sees --------------------------------------------------------------------------------------------


def _context(mail: Mail, data: dict[str, object], links: list[dict[str, str]]) -> dict[str, object]:
    grounds = [
        {
            "account": ground.account,
            "account_name": shown_account(ground.account_name, ground.account),
            "catalogue": ground.catalogue,
            "category": ground.category,
            "category_title": ground.category_title or mail.category_title,
            "roles": list(ground.roles),
            "role_titles": [role_title(title) for title in ground.role_titles],
            "preference_url": ground.preference_url,
        }
        for ground in mail.grounds
    ]
    return {
        "event": mail.event,
        "type": mail.type,
        "variant": mail.variant,
        "data": data,
        "extra": _plain(mail.extra, _secret(mail)),
        "category": mail.category,
        "category_title": mail.category_title,
        "name": shown_name(mail.to_name),
        "account_name": grounds[0]["account_name"],
        "grounds": grounds,
        "vendor": mail.vendor_name,
        "locale": mail.locale,
        "timezone": mail.timezone,
        "unsubscribe_url": mail.unsubscribe_url,
        "status_page_url": mail.status_page_url,
        "attachment_links": links,
    }


def _context_with(outline: Outline, values: Sequence[str]) -> dict[str, object]:
    """What `_context` makes for a mail of an outline, but for its locale and time zone."""
    unsubscribe, *preferences = outline.links
    at = FIRST_GROUND
    grounds = []
    for shared, link in zip(outline.grounds, preferences, strict=True):
        ground = shared.copy()
        ground["account"], ground["account_name"] = values[at], values[at + 1]
        if link:
            ground["preference_url"] = link + values[at + 2]
        grounds.append(ground)
        at += IN_A_GROUND
    context = outline.context.copy()
    context["name"], context["account_name"], context["grounds"] = values[NAME], values[FIRST_GROUND + 1], grounds
    if unsubscribe:
        context["unsubscribe_url"] = unsubscribe + values[UNSUBSCRIBE]
    return context


def _preferences(values: Sequence[str]) -> range:
    """The places of the tokens in links to preferences."""
    return range(FIRST_GROUND + 2, len(values), IN_A_GROUND)


def personal_tokens(values: Sequence[str]) -> dict[int, str]:
    """Of personal values by their places those that stand in links and in the Message-ID."""
    return {place: values[place] for place in (UNSUBSCRIBE, NUMBER, *_preferences(values))}


def _leaves(context: Mapping[str, object], tokens: Mapping[int, str], nonce: str) -> dict[str, object]:
    """The personal values of a context as leaves, where they are not empty."""

    def leaf(value: object, place: int) -> object:
        token = tokens.get(place)
        if not isinstance(value, str) or not value:
            return value
        return Leaf((value.removesuffix(token) if token else "") + mark(nonce, place))

    grounds = [
        ground
        | {
            "account": leaf(ground["account"], place),
            "account_name": leaf(ground["account_name"], place + 1),
            "preference_url": leaf(ground["preference_url"], place + 2),
        }
        for place, ground in _placed(cast("list[dict[str, object]]", context["grounds"]))
    ]
    return {
        "name": leaf(context["name"], NAME),
        "account_name": grounds[0]["account_name"],
        "grounds": grounds,
        "unsubscribe_url": leaf(context["unsubscribe_url"], UNSUBSCRIBE),
    }


def _placed(grounds: Iterable[T]) -> Iterator[tuple[int, T]]:
    """Each ground with the place of its first value."""
    return ((FIRST_GROUND + IN_A_GROUND * index, ground) for index, ground in enumerate(grounds))


def _marked_headers(mail: Mail, tokens: Mapping[int, str], nonce: str) -> tuple[tuple[str, str], ...]:
    """The headers with marks for the delivery's number, the accounts and the token."""
    grounds = tuple(replace(ground, account=mark(nonce, place)) for place, ground in _placed(mail.grounds))
    before, _, after = mail.message_id.partition(f".{tokens[NUMBER]}@")
    url = mail.unsubscribe_url and mail.unsubscribe_url.removesuffix(tokens[UNSUBSCRIBE]) + mark(nonce, UNSUBSCRIBE)
    marks = replace(mail, grounds=grounds, message_id=f"{before}.{mark(nonce, NUMBER)}@{after}", unsubscribe_url=url)
    return headers(marks, label=lambda _: mark(nonce, LABEL))


def _visible(mail: Mail) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The data that the variant may see, as plain values, and the attachments apart from it."""
    data = {key: value for key, value in mail.data.items() if key not in ("attachments", "signing_url")}
    secret = _secret(mail)
    visible = {key: _plain(value, secret) for key, value in data.items()}
    if mail.variant == "esign" and "signing_url" in mail.data:
        visible["signing_url"] = mail.data["signing_url"]
    given = mail.data.get("attachments")
    files = (
        [_file(item, secret) for item in given if isinstance(item, Mapping)] if isinstance(given, list | tuple) else []
    )
    return visible, files


def _file(item: Mapping[str, object], secret: re.Pattern[str] | None) -> dict[str, object]:
    # The content is long and Base64; only the words beside it are looked through.
    return {key: value if key == "content_base64" else _plain(value, secret) for key, value in item.items()}


def _secret(mail: Mail) -> re.Pattern[str] | None:
    """What finds the signing link in other texts, with or without its scheme; None where it may be seen."""
    link = mail.data.get("signing_url")
    if mail.variant == "esign" or not isinstance(link, str) or not link:
        return None
    return masking.pattern(link)


def _masked(value: str, secret: re.Pattern[str]) -> str | None:
    """The text without the signing link; an address that leads to it is absent altogether, like an optional field."""
    if not secret.search(value):
        return value
    is_address = value.lower().startswith(("https://", "http://")) and not re.search(r"\s", value)
    return None if is_address else secret.sub(WITHHELD, value)


def _plain(value: object, secret: re.Pattern[str] | None) -> object:
    """The value rebuilt of JSON's own kinds, without control characters and with the signing link masked."""
    if isinstance(value, str):
        if not value.isprintable():  # quick: most texts are, and only others need the search
            value = _NOT_IN_TEXT.sub(" ", value.replace("\r\n", "\n").replace("\r", "\n"))
        return value if secret is None else _masked(value, secret)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, secret): _plain(item, secret) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, secret) for item in value]
    raise RenderError(f"data: a value is of the kind {type(value).__name__}, which JSON does not have")


# --- Headers ---------------------------------------------------------------------------------------------------------


def headers(mail: Mail, *, label: Callable[[str], str] | None = None) -> tuple[tuple[str, str], ...]:
    """The headers of a mail but for To, Subject and those of MIME; `label` stands in for `list_label`."""
    first = mail.grounds[0]
    made = [("Date", date_text(mail.date)), ("From", one_line(mail.sender, 500))]
    if mail.reply_to:
        made.append(("Reply-To", one_line(mail.reply_to, 500)))
    message_id = mail.message_id if mail.message_id.startswith("<") else f"<{mail.message_id}>"
    made += [
        ("Message-ID", message_id),
        ("Auto-Submitted", "auto-generated"),
        ("X-Auto-Response-Suppress", "All"),
        ("Feedback-ID", f"{mail.category}:{first.account}:{mail.class_}:rolecast"),
        ("X-Rolecast-Event", mail.event),
    ]
    made += [
        ("X-Rolecast-Reason", f"account={one.account}; category={one.category}; role={','.join(one.roles)}")
        for one in mail.grounds
    ]
    if mail.variant == "copy":
        made.append(("X-Rolecast-Copy", "yes"))
    if mail.unsubscribe_url:
        made += [
            ("List-ID", f"<{list_id(first.category, first.account, mail.list_domain, label=label)}>"),
            ("List-Unsubscribe", f"<{mail.unsubscribe_url}>"),
            ("List-Unsubscribe-Post", "List-Unsubscribe=One-Click"),
        ]
    return tuple(made)


@lru_cache(maxsize=64)  # the mails of a flight share it
def date_text(moment: datetime) -> str:
    """A moment as the header Date says it."""
    return format_datetime(moment.astimezone(UTC))


def list_id(category: str, account: str, domain: str, *, label: Callable[[str], str] | None = None) -> str:
    """The List-ID (RFC 2919) of an account's category: stable, and distinct for distinct accounts."""
    return f"{category}.{(label or list_label)(account)}.{domain}"


def list_label(account: str) -> str:
    """An account as one word of a List-ID.

    List-IDs are compared without case and consist of dot-separated words, so an account id that is not one lower-case
    word gets a short hash.
    """
    if PLAIN_LABEL.fullmatch(account):
        return account
    word = re.sub(r"[^a-z0-9]+", "-", account.lower()).strip("-")[:30]
    return f"{word}-{hashlib.sha256(account.encode()).hexdigest()[:10]}".lstrip("-")


PLAIN_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?")


# --- Attachments (reliability.md A12) ---------------------------------------------------------------------------------

_NOT_IN_FILE_NAMES = re.compile(
    '[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff:*?"<>|%]'
)
_RESERVED_NAME = re.compile(r"(?i:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?")


def _linked(files: list[dict[str, object]]) -> list[dict[str, str]]:
    """The attachments that are given by their address; they are linked, never fetched."""
    return [
        {"name": one_line(str(file.get("name") or "file"), NAME_LENGTH), "url": url}
        for file in files
        if isinstance(url := file.get("url"), str) and url.startswith("https://")
    ]


def _enclosed(type_name: str, files: list[dict[str, object]]) -> tuple[Attachment, ...]:
    enclosed = [_attachment(type_name, file) for file in files if file.get("content_base64")]
    if len(enclosed) > MAX_ATTACHMENTS:
        raise RenderError(f"{type_name}: {len(enclosed)} attachments are more than {MAX_ATTACHMENTS}; send fewer")
    size = sum(len(one.content) for one in enclosed)
    if size > MAX_ATTACHMENT_BYTES:
        raise RenderError(
            f"{type_name}: attachments of {size} bytes are more than {MAX_ATTACHMENT_BYTES}; link them by url"
        )
    return tuple(enclosed)


def _attachment(type_name: str, file: dict[str, object]) -> Attachment:
    media_type = str(file.get("media_type"))
    given = one_line(str(file.get("name") or "file"), 500)
    if media_type not in ATTACHMENT_TYPES:
        known = ", ".join(ATTACHMENT_TYPES)
        raise RenderError(f"{type_name}: the attachment {given!r} is of the type {media_type!r}; allowed are {known}")
    try:
        content = base64.b64decode(str(file["content_base64"]), validate=True)
    except (binascii.Error, ValueError):
        raise RenderError(f"{type_name}: content_base64 of the attachment {given!r} is not Base64") from None
    endings, first_bytes = ATTACHMENT_TYPES[media_type]
    fits = content.startswith(first_bytes) and (not media_type.startswith("text/") or _is_text(content))
    if not fits:
        raise RenderError(f"{type_name}: the attachment {given!r} does not hold what {media_type} says")
    return Attachment(name=file_name(given, endings), media_type=media_type, content=content)


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False


def file_name(given: str, endings: tuple[str, ...]) -> str:
    """A name safe to save under: no folder, control or direction mark, no device, its type's ending, <= 100 long."""
    name = _NOT_IN_FILE_NAMES.sub("", given.replace("\\", "/").rpartition("/")[2]).strip(" .")
    if not name.lower().endswith(endings):
        name = f"{name or 'file'}{endings[0]}"
    stem, dot, ending = name.rpartition(".")
    name = f"{stem[: NAME_LENGTH - len(ending) - 1].rstrip(' .') or 'file'}{dot}{ending}"
    return f"_{name[1:]}" if _RESERVED_NAME.fullmatch(name) else name


def _sample_mail(type_name: str, data: Mapping[str, object], variant: Variant) -> Mail:
    """A mail as `check` needs it: every part of the layout in use."""
    ground = Ground(
        account="acme",
        account_name="Acme Corp",
        category=type_name,
        roles=("accounting",),
        role_titles=("Accounting contact",),
        reasons=("role_matched",),
        preference_url="https://rolecast.example/preferences/token",
        catalogue="issuetrak",
        category_title="sample mails",
    )
    return Mail(
        event="01JCV0000000000000000000ZZ",
        type=type_name,
        category=type_name,
        category_title="sample mails",
        class_="informational",
        data=data,
        variant=variant,
        to_name="Ada",
        to_address="ada@acme.example",
        locale="en",
        timezone="Europe/Berlin",
        grounds=(ground,),
        vendor_name="Vendor",
        sender="Vendor <notify@vendor.example>",
        reply_to=None,
        message_id="<sample@vendor.example>",
        date=datetime(2026, 11, 21, 10, tzinfo=UTC),
        list_domain="vendor.example",
        unsubscribe_url="https://rolecast.example/unsubscribe/token",
        status_page_url="https://status.vendor.example",
        extra={
            "contacts": [{"name": "Ada", "email": "ada@acme.example", "roles": ["Accounting contact"]}],
            "requester": "Ada",
            "decide_url": "https://rolecast.example/requests/1",
        },
    )
