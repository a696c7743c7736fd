"""An email as meant, written as the bytes that go to the relay; and the proof that the bytes say what was meant.

Promises: CRLF only, lines of at most 998 octets, equal Email equal bytes; 7-bit clean but for a local part outside
ASCII (see `needs_smtputf8`) and, where the relay offers 8BITMIME, for the texts (RFC 6152). No value can add a header:
a control character is refused, and a text that looks like an encoded word is encoded once more, because some Pythons
decode it into a header of its own when they read the mail (reliability.md A1, A2). Written directly, for the standard
library's builder takes 2.3 ms a mail; `prove` reads the bytes back with that library and compares. Dot-stuffing is the
relay's. What these functions say of a header or a text, `worker.renditions` says too: it fills in what they wrote.
Sources: RFC 5322 (format), 2045 to 2047 (MIME), 2231 (file names), 6532 (UTF-8 headers).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from email import message_from_bytes, message_from_string, policy
from email.errors import HeaderParseError
from email.header import decode_header
from email.message import Message
from email.policy import Policy
from email.utils import parseaddr
from functools import lru_cache
from typing import Final
from urllib.parse import quote

import idna

from worker.rendering import Attachment, Email

LINE: Final = 76  # header lines are folded to this where they can be (RFC 5322, 2.1.1: 78 should, 998 must)
LONGEST_LINE: Final = 998
ADDRESS_HEADERS: Final = frozenset({"From", "Reply-To"})
# Header values with a syntax of their own: never encoded, only folded.
STRUCTURED: Final = frozenset(
    {"Date", "Message-ID", "List-ID", "List-Unsubscribe", "List-Unsubscribe-Post", "Auto-Submitted"}
)


class MimeError(Exception):
    """The bytes would not say what was meant; the mail is not sent, and sending it again does not help."""


def needs_smtputf8(address: str) -> bool:
    """Whether only a relay that offers SMTPUTF8 (RFC 6531) can take the address: its local part is not ASCII."""
    return not address.rpartition("@")[0].isascii()


def assemble(email: Email, *, eightbit: bool = False) -> bytes:
    """The whole message; `eightbit`: its relay offers 8BITMIME.

    Raises MimeError where a header or address holds what no encoding makes harmless.
    """
    plain = text_part("plain", *encoded_body(email.text, eightbit=eightbit))
    html = text_part("html", *encoded_body(email.html, eightbit=eightbit))
    around = frame(email, plain, html)
    return b"".join((_header_block(email), around.before, plain, around.between, html, around.after))


@dataclass(slots=True)
class Frame:
    """What stands around the two texts of a mail, from its MIME-Version to its end, and the boundaries in it."""

    before: bytes
    between: bytes
    after: bytes
    boundaries: tuple[bytes, ...]
    first: bool  # these boundaries are the first choice: none stood in a part


def frame(email: Email, plain: bytes, html: bytes) -> Frame:
    """The frame for these texts: its boundaries follow from the event, and stand in none of the parts.

    All mails of an event share them, but for one whose own words hold a boundary: nobody knows it before the first mail
    of the event has arrived, yet a name may be changed meanwhile.
    """
    seed = _value(email, "X-Rolecast-Event") or _value(email, "Message-ID") or email.subject
    inner, first = _boundary((plain, html), seed)
    before = b'Content-Type: multipart/alternative;\r\n boundary="%s"\r\n\r\n--%s\r\n' % (inner, inner)
    between, after = b"\r\n--%s\r\n" % inner, b"\r\n--%s--\r\n" % inner
    boundaries: tuple[bytes, ...] = (inner,)
    if email.attachments:
        files = [_attachment_part(one) for one in email.attachments]
        outer, first_too = _boundary((before, plain, html, *files), seed + "/mixed")
        before = b'Content-Type: multipart/mixed;\r\n boundary="%s"\r\n\r\n--%s\r\n%s' % (outer, outer, before)
        after += b"".join(b"\r\n--%s\r\n%s" % (outer, file) for file in files) + b"\r\n--%s--\r\n" % outer
        boundaries, first = (inner, outer), first and first_too
    return Frame(b"MIME-Version: 1.0\r\n" + before, between, after, boundaries, first)


# --- Headers ---------------------------------------------------------------------------------------------------------

_ATOMS: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]+")
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9-]+")
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_+/*-]+(?: [A-Za-z0-9_+/*-]+)*")
_PLAIN_NAMES: Final = re.compile(rf"{_PLAIN_NAME.pattern}(?:\n{_PLAIN_NAME.pattern})*")
_NO_LOCAL_PART_OR_DOMAIN: Final = re.compile(r"(?:^|\n)@|@(?:\n|$)")
_PLAIN_IN_ADDRESS: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.+-"
_ADDRESS: Final = re.compile(r"[^\s<>(),:;\\\"@\[\]]+@[^\s<>(),:;\\\"@\[\]]+")


def _header_block(email: Email) -> bytes:
    lines = []
    to_is_due = True
    for name, value in email.headers:
        lines.append(header(name, value))
        if to_is_due and name == "From":
            lines += [mailbox_header("To", email.to_name, email.to_address), header("Subject", email.subject)]
            to_is_due = False
    if to_is_due:
        raise MimeError("the mail has no From header")
    return "".join(lines).encode("utf-8")


@lru_cache(maxsize=1024)  # the mails of a fan-out share most of theirs
def header(name: str, value: str) -> str:
    """A header with its line end: plain where it can be, else folded or in encoded words. Raises MimeError."""
    if not _HEADER_NAME.fullmatch(name):
        raise MimeError(f"{name!r} is no header name")
    _refuse_controls(name, value)
    if name in ADDRESS_HEADERS:
        return mailbox_header(name, *split_mailbox(value))
    if _is_plain(value):
        if len(name) + 2 + len(value) <= LINE:
            return f"{name}: {value}\r\n"
        if "  " not in value:
            return _folded(name, value.split(" "))
    if name in STRUCTURED or name.startswith("X-Rolecast-"):
        raise MimeError(f"{name} is {value!r}, but may hold plain ASCII only")
    return _folded(name, encoded_words(value, LINE - len(name) - 2))


def mailbox_header(name: str, display: str, address: str) -> str:
    """A header that holds one name, perhaps empty, and one address. Raises MimeError."""
    return written_mailbox(name, display, wire_address(address))


def are_plain_recipients(displays: Sequence[str], addresses: Sequence[str]) -> bool:
    """Whether the header To says names and addresses just as they are, `To: Name <address>` on one line.

    False also where the longest of several names and the longest address would need two.
    """
    short = max(map(len, displays)) + max(map(len, addresses)) + len("To:  <>") <= LINE
    return short and are_plain_names(displays) and _are_plain_addresses(addresses)


def is_plain_name(display: str) -> bool:
    """Whether it is words of letters and digits, and of signs that nothing has to escape."""
    return _PLAIN_NAME.fullmatch(display) is not None


def are_plain_names(displays: Collection[str]) -> bool:
    """Whether each of several is."""
    lines = "\n".join(displays)  # as many as there are names: none has two
    return lines.count("\n") == len(displays) - 1 and _PLAIN_NAMES.fullmatch(lines) is not None


def written_mailbox(name: str, display: str, written: str) -> str:
    """The same, of an address as `wire_address` writes it."""
    if len(name) + len(display) + len(written) + 5 <= LINE and _PLAIN_NAME.fullmatch(display):
        return f"{name}: {display} <{written}>\r\n"  # what is below says the same of nearly every name
    _refuse_controls(name, display)
    return _folded(name, [*_phrase(display, LINE - len(name) - 2), f"<{written}>" if display else written])


def is_plain_address(address: str) -> bool:
    """Whether it is one of the usual characters alone, which stands anywhere as it is."""
    return _are_plain_addresses((address,))


def _are_plain_addresses(addresses: Sequence[str]) -> bool:
    lines = "\n".join(addresses)
    if not lines.isascii():
        return False
    rest = b"@\n" * (len(addresses) - 1) + b"@"
    # Translated as octets: a pattern would take three times as long.
    return lines.encode().translate(None, _PLAIN_IN_ADDRESS) == rest and not _NO_LOCAL_PART_OR_DOMAIN.search(lines)


def wire_address(address: str) -> str:
    """The address as it stands in headers and SMTP commands: the domain as A-labels. Raises MimeError."""
    if is_plain_address(address):
        return address  # what is below says the same of nearly every address
    local, at, domain = address.strip().rpartition("@")
    if not domain.isascii():
        try:
            domain = idna.encode(domain, uts46=True).decode("ascii")
        except idna.IDNAError as error:
            raise MimeError(f"the address {address!r} has a domain that cannot be written in ASCII: {error}") from None
    _refuse_controls("address", address)
    written = local + at + domain
    if not _ADDRESS.fullmatch(written) or "=?" in written:
        raise MimeError(f"{address!r} is not an address that a header can hold")
    return written


def _phrase(display: str, room: int) -> list[str]:
    """A display name as atoms, a quoted string or encoded words: whichever says it plainly (RFC 5322, 3.2.5)."""
    if not display:
        return []
    if _is_plain(display) and "  " not in display and len(display) <= room:
        if _ATOMS.fullmatch(display) and '"' not in display:
            return [display]
        escaped = display.replace("\\", "\\\\").replace('"', '\\"')
        if len(escaped) + 2 <= room:
            return [f'"{escaped}"']
    return encoded_words(display, room)


def _is_plain(value: str) -> bool:
    """Whether the value can stand as it is: printable ASCII that no reader takes for an encoded word."""
    return value.isascii() and value.isprintable() and "=?" not in value and value == value.strip()


def _refuse_controls(name: str, value: str) -> None:
    if not value.isprintable() and _CONTROL.search(value):
        raise MimeError(f"{name} holds a control character: {value!r}")


def _folded(name: str, words: Iterable[str]) -> str:
    """The header, broken between words where a line would grow beyond LINE. Raises MimeError beyond LONGEST_LINE."""
    lines = []
    line = f"{name}:"
    for word in words:
        if len(line) + 1 + len(word) > LINE and line != f"{name}:":
            lines.append(line)
            line = ""
        line += f" {word}"
    lines.append(line)
    for one in lines:
        if len(one) > LONGEST_LINE // 4 and len(one.encode("utf-8", "replace")) > LONGEST_LINE:
            raise MimeError(f"{name} has a word longer than {LONGEST_LINE} octets")
    return "\r\n".join(lines) + "\r\n"


_Q_PLAIN: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+-/")
_Q: Final = tuple("_" if octet == 32 else chr(octet) if octet in _Q_PLAIN else f"={octet:02X}" for octet in range(256))
_Q_SHORT: Final = bytes(_Q_PLAIN | {ord(" ")})


def encoded_words(text: str, room: int) -> list[str]:
    """The text as encoded words of at most 75 characters (RFC 2047), the first of at most `room`.

    Q or B, whichever is shorter; a character is never split, and blanks are inside, so that joining the words with
    folds gives back the very text.
    """
    octets = text.encode("utf-8")
    in_q = len(octets) + 2 * len(octets.translate(None, _Q_SHORT))
    use_q = in_q <= (len(octets) + 2) // 3 * 4
    if (in_q if use_q else len(octets)) <= _word_limit(min(room, 75), use_q=use_q):  # what is below, for short texts
        return [_encoded_word([*map(_Q.__getitem__, octets)] if use_q else [text], use_q=use_q)]
    words: list[str] = []
    piece: list[str] = []
    size = 0  # of the piece: encoded characters for Q, octets for B
    limit = _word_limit(min(room, 75), use_q=use_q)
    for character in text:
        written = "".join(_Q[octet] for octet in character.encode("utf-8"))
        cost = len(written) if use_q else len(character.encode("utf-8"))
        if piece and size + cost > limit:
            words.append(_encoded_word(piece, use_q=use_q))
            piece, size, limit = [], 0, _word_limit(75, use_q=use_q)
        piece.append(written if use_q else character)
        size += cost
    words.append(_encoded_word(piece, use_q=use_q))
    return words


def _word_limit(length: int, *, use_q: bool) -> int:
    inside = max(length - len("=?utf-8?q??="), 12)
    return inside if use_q else inside // 4 * 3


def _encoded_word(piece: list[str], *, use_q: bool) -> str:
    text = "".join(piece)
    if use_q:
        return f"=?utf-8?q?{text}?="
    return f"=?utf-8?b?{base64.b64encode(text.encode('utf-8')).decode('ascii')}?="


def _value(email: Email, header: str) -> str:
    return next((value for name, value in email.headers if name == header), "")


# --- Parts -----------------------------------------------------------------------------------------------------------

_CONTROL_OCTETS: Final = bytes({*range(32), 127} - set(b"\t\r\n"))
_HIGH_AND_EQUALS: Final = bytes(octet for octet in range(256) if not (octet >= 128 or octet == ord("=")))


def text_part(subtype: str, body: bytes, encoding: bytes) -> bytes:
    """A text with its headers."""
    return b"Content-Type: text/%s; charset=utf-8\r\nContent-Transfer-Encoding: %s\r\n\r\n%s" % (
        subtype.encode("ascii"),
        encoding,
        body,
    )


def encoded_body(text: str, *, eightbit: bool = False) -> tuple[bytes, bytes]:
    """The text with CRLF, and its transfer encoding: 7bit where it fits, then 8bit where the relay takes it.

    Else the smaller of quoted-printable and Base64. Raises MimeError.
    """
    octets = wire_octets(text)
    if (eightbit or octets.isascii()) and not has_controls(octets) and not _has_long_line(octets):
        return octets, b"7bit" if octets.isascii() else b"8bit"
    return encoded_octets(octets, lambda: quoted_lines(octets))


def wire_octets(text: str) -> bytes:
    """The text as UTF-8 with CRLF. Raises MimeError."""
    try:
        return _line_ends(text).encode("utf-8").replace(b"\n", b"\r\n")
    except UnicodeEncodeError:
        raise MimeError("the text holds half of a surrogate pair, which is no character") from None


def has_controls(octets: bytes) -> bool:
    """Whether only an encoding carries the text, for it holds other control characters than tabs and line ends."""
    return len(octets.translate(None, _CONTROL_OCTETS)) != len(octets)


def _has_long_line(octets: bytes) -> bool:
    """Whether a line has more than LONGEST_LINE octets."""
    start = 0
    while len(octets) - start > LONGEST_LINE:
        end = octets.rfind(b"\r\n", start, start + LONGEST_LINE + 2)  # of as many lines as fit into one
        if end < 0:
            return True
        start = end + 2
    return False


def encoded_octets(octets: bytes, quoted: Callable[[], bytes]) -> tuple[bytes, bytes]:
    """The smaller of two encodings, and its name; `quoted` makes what `quoted_lines` makes of the octets."""
    lines_of_base64 = -(-len(octets) // 57)
    size_of_base64 = -(-len(octets) // 3) * 4 + 2 * lines_of_base64
    least_quoted = len(octets) + 2 * len(octets.translate(None, _HIGH_AND_EQUALS))
    if least_quoted <= size_of_base64:
        written = quoted()
        if len(written) <= size_of_base64:
            return written, b"quoted-printable"
    return _base64_lines(octets), b"base64"


def quoted_lines(octets: bytes) -> bytes:
    """Whole lines as quoted-printable; what becomes of a line does not depend on the others."""
    # With CRLF inside, b2a_qp breaks long lines by CRLF too; in a text of one line it would use LF.
    return binascii.b2a_qp(octets.replace(b"\r\n", b"\n"), istext=True).replace(b"\n", b"\r\n")


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _base64_lines(octets: bytes) -> bytes:
    encoded = base64.b64encode(octets)
    return b"\r\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76)) + b"\r\n"


def _attachment_part(attachment: Attachment) -> bytes:
    charset = "; charset=utf-8" if attachment.media_type.startswith("text/") else ""
    header = (
        f"Content-Type: {attachment.media_type}{charset}\r\n"
        f"Content-Transfer-Encoding: base64\r\n"
        f"Content-Disposition: attachment;\r\n {_file_name_parameter(attachment.name)}\r\n\r\n"
    )
    _refuse_controls("the attachment's name", attachment.name)
    return header.encode("ascii") + _base64_lines(attachment.content)


def _file_name_parameter(name: str) -> str:
    """`filename` as a quoted string, or in the numbered pieces of RFC 2231 where it is not plain or is long."""
    if _is_plain(name) and len(name) <= 60:
        escaped = name.replace("\\", "\\\\").replace('"', '\\"')
        return f'filename="{escaped}"'
    pieces: list[str] = ["utf-8''"]
    for character in name:
        written = quote(character, safe="")
        if len(pieces[-1]) + len(written) > 58:
            pieces.append("")
        pieces[-1] += written
    if len(pieces) == 1:
        return f"filename*={pieces[0]}"
    return ";\r\n ".join(f"filename*{number}*={piece}" for number, piece in enumerate(pieces))


def _boundary(parts: Sequence[bytes], seed: str) -> tuple[bytes, bool]:
    """A boundary that follows from the seed and stands in none of the parts; and whether it is the first choice."""
    attempt = 0
    while True:
        boundary = _candidate(attempt, seed)
        if not any(boundary in part for part in parts):
            return boundary, attempt == 0
        attempt += 1


@lru_cache(maxsize=64)  # the mails of an event share it
def _candidate(attempt: int, seed: str) -> bytes:
    digest = hashlib.sha256(f"{attempt}/{seed}".encode("utf-8", "replace")).hexdigest()[:32]
    return b"=_" + digest.encode("ascii")


# --- The proof -------------------------------------------------------------------------------------------------------


def prove(email: Email, raw: bytes, *, eightbit: bool = False) -> None:
    """Raises MimeError unless `raw` reads back as exactly `email`: its headers, one recipient, texts and files."""
    _prove_bytes(email, raw, eightbit=eightbit)
    plain = _read(raw, policy.compat32)
    modern = _read(raw, policy.default)
    intended = Counter([name.lower() for name, _ in email.headers] + ["to", "subject", "mime-version", "content-type"])
    for read in (plain, modern):
        found = Counter(name.lower() for name in read.keys())  # noqa: SIM118 - not a mapping: names may repeat
        if found != intended:
            differing = sorted((found - intended) + (intended - found))
            raise MimeError(f"the bytes read back with other headers than meant: {', '.join(differing)}")
    try:
        _prove_headers(email, plain, modern)
        _prove_parts(email, message_from_bytes(raw, policy=policy.default))
    except (HeaderParseError, UnicodeError, LookupError, ValueError, TypeError, AttributeError) as error:
        # The library itself cannot read what was written, whatever it stumbled over.
        raise MimeError(f"the bytes cannot be read back: {type(error).__name__}: {error}") from error


def says_plainly(email: Email, raw: bytes, *, eightbit: bool = False) -> bool:
    """Whether `raw` says exactly `email`, in a form that is read in one way only; False where it may need `prove`.

    Every header as it is, folded between words at the most, to one plain name and address; the two texts as they are.
    A thirtieth of the time of `prove`. Raises MimeError where the bytes are wrong whatever they say.
    """
    _prove_bytes(email, raw, eightbit=eightbit)
    head, _, rest = raw.partition(b"\r\n\r\n")
    opening = _BOUNDARY.search(head)
    if email.attachments or opening is None or not head.isascii() or b"=?" in head:
        return False
    if not (is_plain_name(email.to_name) and is_plain_address(email.to_address)):
        return False
    meant = [f"{name}: {value}" for name, value in email.headers]
    after_from = next((at for at, (name, _) in enumerate(email.headers, 1) if name == "From"), 0)
    meant[after_from:after_from] = [f"To: {email.to_name} <{email.to_address}>", f"Subject: {email.subject}"]
    meant += ["MIME-Version: 1.0", "Content-Type: multipart/alternative;" + opening[0].decode()]
    said = head.decode("ascii").replace("\r\n ", " ").split("\r\n")
    if said != meant or not all(map(str.isprintable, said)):
        return False
    line = b"--" + opening[1]
    texts = [(b"plain", wire_octets(email.text)), (b"html", wire_octets(email.html))]
    parts = [_PLAIN_PART % (kind, b"7" if text.isascii() else b"8", text) for kind, text in texts]
    return rest.split(line) == [b"", *parts, b"--\r\n"]


_BOUNDARY: Final = re.compile(rb' boundary="(=_[0-9a-f]{32})"\Z')
_PLAIN_PART: Final = b"\r\nContent-Type: text/%s; charset=utf-8\r\nContent-Transfer-Encoding: %sbit\r\n\r\n%s\r\n"


def _prove_bytes(email: Email, raw: bytes, *, eightbit: bool) -> None:
    without_line_ends = raw.replace(b"\r\n", b"")
    if b"\r" in without_line_ends or b"\n" in without_line_ends:
        raise MimeError("the bytes hold a CR or LF that stands alone")
    head, _, rest = raw.partition(b"\r\n\r\n")
    clean_head = head.isascii() or needs_smtputf8(email.to_address)
    if b"\0" in raw or not clean_head or not (eightbit or rest.isascii()):
        raise MimeError("the bytes are not 7-bit clean")
    if max(map(len, raw.split(b"\r\n"))) > LONGEST_LINE:
        raise MimeError(f"a line is longer than {LONGEST_LINE} octets")


def _read(raw: bytes, how: Policy[Message]) -> Message:
    # UTF-8 in a header (RFC 6532) is text to a reader who knows it; the library's bytes parser does not.
    if raw.partition(b"\r\n\r\n")[0].isascii():
        return message_from_bytes(raw, policy=how)
    return message_from_string(raw.decode("utf-8"), policy=how)


def _prove_headers(email: Email, plain: Message, modern: Message) -> None:
    mailboxes = [("To", email.to_name, email.to_address)]
    for name, value in email.headers:
        if name in ADDRESS_HEADERS:
            mailboxes.append((name, *split_mailbox(value)))
        elif value not in [_decoded(str(one)) for one in plain.get_all(name, [])]:
            raise MimeError(f"{name} does not read back as {value!r}")
    for read in (_decoded(str(plain["Subject"])), str(modern["Subject"])):
        if read != email.subject:
            raise MimeError(f"Subject reads back as {read!r}, but is {email.subject!r}")
    for name, display, address in mailboxes:
        read_name, read_address = parseaddr(_unfolded(str(plain[name])))
        if (_decoded(read_name), read_address) != (display, wire_address(address)):
            raise MimeError(f"{name} reads back as {_decoded(read_name)!r} <{read_address}>")
        if [one.addr_spec for one in getattr(modern[name], "addresses", ())] != [wire_address(address)]:
            raise MimeError(f"{name} does not read back as the one address {address!r}")


def _prove_parts(email: Email, modern: Message) -> None:
    parts = [part for part in modern.walk() if not part.is_multipart()]
    texts = [("text/plain", email.text), ("text/html", email.html)]
    if len(parts) != len(texts) + len(email.attachments):
        raise MimeError(f"the bytes hold {len(parts)} parts, not {len(texts) + len(email.attachments)}")
    for part, (kind, meant) in zip(parts, texts, strict=False):
        content = part.get_payload(decode=True)
        read = content.decode("utf-8") if isinstance(content, bytes) else None
        if part.get_content_type() != kind or read != _line_ends(meant).replace("\n", "\r\n"):
            raise MimeError(f"the part {kind} does not read back as it was written")
    for part, meant_file in zip(parts[len(texts) :], email.attachments, strict=True):
        read_file = (part.get_filename(), part.get_content_type(), part.get_payload(decode=True))
        if read_file != (meant_file.name, meant_file.media_type, meant_file.content):
            raise MimeError(f"the attachment {meant_file.name!r} does not read back as it was written")


def split_mailbox(value: str) -> tuple[str, str]:
    """`Name <address>`, `"Name" <address>` or an address alone, as name (perhaps empty) and address."""
    display, bracket, address = value.rpartition("<")
    display = display.strip()
    if len(display) > 1 and display[0] == display[-1] == '"':
        display = re.sub(r"\\(.)", r"\1", display[1:-1])
    return display, (address.removesuffix(">") if bracket else value).strip()


def _unfolded(value: str) -> str:
    return re.sub(r"\r?\n(?=[ \t])", "", value)


def _decoded(value: str) -> str:
    pieces = decode_header(_unfolded(value))
    return "".join(piece if isinstance(piece, str) else piece.decode(charset or "ascii") for piece, charset in pieces)
