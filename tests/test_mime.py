"""The bytes on the wire: they say what was meant, whatever was meant."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from email import message_from_bytes, policy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.shared import shared
from worker.mime import (
    MimeError,
    are_plain_names,
    are_plain_recipients,
    assemble,
    encoded_body,
    encoded_words,
    is_plain_address,
    is_plain_name,
    needs_smtputf8,
    prove,
    says_plainly,
    wire_address,
)
from worker.rendering import Attachment, Email

EMAIL = Email(
    subject="Invoice 2026-000123",
    text="Hello Ada,\n\n.\nFrom here on.\n",
    html="<html><body><p>Hello Ada</p></body></html>\n",
    headers=(
        ("Date", "Sat, 21 Nov 2026 10:00:00 +0000"),
        ("From", "Northwind <notify@vendor.example>"),
        ("Reply-To", '"Help, please" <help@vendor.example>'),
        ("Message-ID", "<abc@vendor.example>"),
        ("X-Rolecast-Reason", "account=acme; category=invoice; role=accounting,payment_contact"),
        ("X-Rolecast-Reason", "account=globex; category=invoice; role=accounting"),
        ("List-Unsubscribe", "<https://notify.vendor.example/unsubscribe/" + "t" * 200 + ">"),
    ),
    to_name="Ada Lovelace",
    to_address="Ada@acme.example",
)
# What rendering hands over: no control characters, no line separators, trimmed.
LINES = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]) | st.sampled_from('=?_ "\\<>,;:@()'), max_size=200
).map(str.strip)  # fmt: skip
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=500)


def headers_of(raw: bytes) -> Counter[str]:
    return Counter(name.lower() for name, _ in message_from_bytes(raw, policy=policy.default).items())


def test_a_plain_mail_is_seven_bit_with_text_first():
    raw = assemble(EMAIL)
    prove(EMAIL, raw)
    read = message_from_bytes(raw, policy=policy.default)
    assert read.get_content_type() == "multipart/alternative"
    assert [part.get_content_type() for part in read.iter_parts()] == ["text/plain", "text/html"]
    assert raw.count(b"Content-Transfer-Encoding: 7bit") == 2
    assert b"To: Ada Lovelace <Ada@acme.example>\r\n" in raw
    assert raw == assemble(EMAIL)


def test_files_stand_outside_the_alternatives():
    files = (
        Attachment("invoice.pdf", "application/pdf", bytes(range(256)) * 50),
        Attachment("Überraschung 日本 " + "ä" * 80 + ".txt", "text/plain", b"x\r\ny\n"),
        Attachment('a "quoted" \\ name; x=y =?utf-8?q?a?=.csv', "text/csv", b"a,b\n"),
    )
    email = replace(EMAIL, attachments=files)
    raw = assemble(email)
    prove(email, raw)
    read = message_from_bytes(raw, policy=policy.default)
    assert read.get_content_type() == "multipart/mixed"
    kinds = [part.get_content_type() for part in read.iter_parts()]
    assert kinds == ["multipart/alternative", "application/pdf", "text/plain", "text/csv"]


@given(subject=LINES, name=LINES, text=TEXTS, html=TEXTS)
def test_whatever_is_meant_reads_back(subject, name, text, html):
    email = replace(EMAIL, subject=subject, to_name=name[:100].strip(), text=text, html=html)
    raw = assemble(email)
    prove(email, raw)
    head = raw.partition(b"\r\n\r\n")[0]
    assert raw.isascii()
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    assert all(len(line) <= 78 for line in head.split(b"\r\n") if b"unsubscribe" not in line)
    assert raw.replace(b"\r\n", b"").count(b"\n") == 0


@given(
    subject=LINES,
    name=LINES,
    text=TEXTS,
    html=TEXTS,
    address=st.sampled_from(["ada@acme.example", "zoë@bücher.example"]),
)
def test_whatever_is_meant_reads_back_where_the_relay_takes_eight_bits(subject, name, text, html, address):
    email = replace(EMAIL, subject=subject, to_name=name[:100].strip(), to_address=address, text=text, html=html)
    raw = assemble(email, eightbit=True)
    prove(email, raw, eightbit=True)
    assert max(map(len, raw.split(b"\r\n"))) <= 998


_FEW_SIGNS = st.lists(st.text('ab@ \nä"', max_size=5), min_size=1, max_size=4)


@given(_FEW_SIGNS)
def test_names_and_addresses_are_plain_together_where_each_of_them_is(texts):
    assert are_plain_names(texts) == all(map(is_plain_name, texts))
    names = ["a"] * len(texts)
    plain = all(re.fullmatch("[ab]+@[ab]+", text) for text in texts)
    assert are_plain_recipients(names, texts) == plain == all(map(is_plain_address, texts))


@given(LINES, st.integers(20, 75))
def test_encoded_words_are_short_whole_and_give_the_text_back(text, room):
    words = encoded_words(text, room)
    assert len(words[0]) <= max(room, 30)
    assert all(len(word) <= 75 and word.isascii() and " " not in word for word in words)
    raw = b"Subject: " + "\r\n ".join(words).encode() + b"\r\n\r\n"
    assert str(message_from_bytes(raw, policy=policy.default)["Subject"]) == text


def test_the_names_and_strings_that_break_others_read_back():
    torture = shared("corpora", "torture")
    texts = json.loads((torture / "blns.json").read_text(encoding="utf-8"))
    texts += json.loads((torture / "display-names-synthetic.json").read_text(encoding="utf-8"))
    meant = headers_of(assemble(EMAIL))
    for text in texts:
        line = " ".join(text.replace("\0", " ").split())[:100].strip()
        email = replace(EMAIL, subject=line, to_name=line, text=text, html=text)
        if not line.isprintable() and any(ord(one) < 32 or 127 <= ord(one) < 160 for one in line):
            with pytest.raises(MimeError, match="control character"):
                assemble(email)
            continue
        raw = assemble(email)
        prove(email, raw)
        assert headers_of(raw) == meant


def test_an_encoded_word_in_a_value_stays_text_even_when_the_mail_is_written_again():
    attack = "=?utf-8?q?A=0D=0ABcc=3A_evil=40x=2Ey?="
    email = replace(EMAIL, subject=attack, to_name=attack)
    raw = assemble(email)
    prove(email, raw)
    assert attack.encode() not in raw
    again = message_from_bytes(raw, policy=policy.default)
    assert str(again["Subject"]) == attack
    assert "bcc" not in headers_of(raw)


@pytest.mark.parametrize(
    "control", ["\r\n", "\n", "\r", "\0", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\t"]
)
def test_a_control_character_in_a_header_stops_the_mail(control):
    bad = f"A{control}Bcc: evil@x.example"
    for email in (
        replace(EMAIL, subject=bad),
        replace(EMAIL, to_name=bad),
        replace(EMAIL, to_address=f"a{control}@acme.example"),
        replace(EMAIL, headers=(*EMAIL.headers, ("X-Rolecast-Event", bad))),
        replace(EMAIL, headers=(*EMAIL.headers, (bad, "x"))),
        replace(EMAIL, attachments=(Attachment(bad, "text/plain", b"x"),)),
    ):
        with pytest.raises(MimeError):
            assemble(email)


@pytest.mark.parametrize(
    "address",
    ["a@b> SIZE=1", "a@b, x@y", "x <a@b>", "@a:b@c", "", "a", "a b@c.example", "a@b@c", "=?utf-8?q?a?=@b.example"],
)
def test_what_is_no_single_address_stops_the_mail(address):
    with pytest.raises(MimeError):
        assemble(replace(EMAIL, to_address=address))


def test_a_domain_is_written_in_ascii_and_the_local_part_as_it_was():
    assert wire_address("Ada@bücher.example") == "Ada@xn--bcher-kva.example"
    assert wire_address("user@faß.example") == "user@xn--fa-hia.example"
    assert wire_address("a.d+a_1-2@x_y.example") == "a.d+a_1-2@x_y.example"
    for wrong in ("", "@", "@acme.example", "ada@", "ada", "a@b@acme.example", "ada@@acme.example"):
        with pytest.raises(MimeError):
            wire_address(wrong)
    assert not needs_smtputf8("ada@bücher.example")
    with pytest.raises(MimeError, match="cannot be written in ASCII"):
        wire_address("ada@\u2603\ufe0f-.example")


def test_a_local_part_beyond_ascii_is_flagged_and_kept():
    email = replace(EMAIL, to_address="jürgen@bücher.example", to_name="Jürgen")
    assert needs_smtputf8(email.to_address)
    raw = assemble(email)
    prove(email, raw)
    assert "<jürgen@xn--bcher-kva.example>".encode() in raw


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("plain\n", b"7bit"),
        ("x" * 998, b"7bit"),
        ("x" * 999, b"quoted-printable"),
        ("bell\x07 and the rest of a line that is long enough\n", b"quoted-printable"),
        ("Grüße an alle, die dies hier lesen und sich daran freuen.\n", b"quoted-printable"),
        ("日本語のメール\n" * 20, b"base64"),
    ],
)
def test_a_part_is_encoded_in_the_shortest_way_that_is_clean(text, encoding):
    assert encoded_body(text)[1] == encoding


@given(TEXTS)
def test_no_encoding_of_a_part_is_shorter_than_the_one_taken(text):
    import base64
    import binascii

    body, encoding = encoded_body(text)
    octets = text.replace("\n", "\r\n").encode()
    if encoding != b"7bit":
        quoted = len(binascii.b2a_qp(text.encode(), istext=True).replace(b"\n", b"\r\n"))
        in_base64 = len(base64.encodebytes(octets).replace(b"\n", b"\r\n"))
        assert len(body) == min(quoted, in_base64)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("plain\n", b"7bit"),
        ("Grüße\n", b"8bit"),
        ("ä" * 499 + "\n", b"8bit"),
        ("ä" * 499 + "x\n", b"base64"),
        ("é bell\x07 and the rest of a line that is long enough\n", b"quoted-printable"),
    ],
)
def test_a_text_goes_as_it_is_where_the_relay_takes_eight_bits(text, encoding):
    assert encoded_body(text, eightbit=True)[1] == encoding


@given(st.lists(st.integers(0, 1100), max_size=5), st.booleans())
def test_a_line_of_more_than_998_octets_is_found_wherever_it_stands(lengths, ends):
    text = "\n".join("x" * length for length in lengths) + "\n" * ends
    assert (encoded_body(text)[1] == b"7bit") == all(length <= 998 for length in lengths)


def test_a_proof_for_seven_bits_refuses_eight():
    email = replace(EMAIL, text="Grüße\n")
    with pytest.raises(MimeError, match="7-bit"):
        prove(email, assemble(email, eightbit=True))
    raw = assemble(replace(email, to_name="Jürgen"), eightbit=True)
    with pytest.raises(MimeError, match="7-bit"):
        prove(email, raw.replace(b"To: ", "To: ü".encode()), eightbit=True)


def test_the_mails_of_an_event_share_their_boundary():
    headers = (*EMAIL.headers, ("X-Rolecast-Event", "01JCV3N6M1Q9T8S7R6P5N4M3K2"))
    others = (*EMAIL.headers[:3], ("Message-ID", "<other@vendor.example>"), headers[-1])
    first, second, third = (
        assemble(replace(EMAIL, headers=one)).split(b'boundary="')[1].split(b'"')[0]
        for one in (headers, others, EMAIL.headers)
    )
    assert first == second != third


def test_the_proof_fails_where_a_byte_was_changed_or_a_header_added():
    raw = assemble(EMAIL)
    for forged in (
        b"Bcc: evil@x.example\r\n" + raw,
        raw.replace(b"Hello Ada,", b"Hello Eve,"),
        raw.replace(b"To: Ada Lovelace", b"To: Eve Lovelace"),
        raw.replace(b"Subject: Invoice", b"Subject: invoice"),
        raw.replace(b"<Ada@acme.example>", b"<Ada@acme.example>, <eve@x.example>"),
        raw.replace(b"role=accounting\r\n", b"role=executive\r\n"),
        raw.replace(b"\r\n", b"\n"),
        raw.replace(b"Hello", b"Hell\xf6"),
    ):
        with pytest.raises(MimeError):
            prove(EMAIL, forged)


def test_a_boundary_stands_in_no_part():
    boundary = assemble(EMAIL).split(b'boundary="')[1].split(b'"')[0].decode()
    email = replace(EMAIL, text=f"--{boundary}\n")
    raw = assemble(email)
    prove(email, raw)
    assert raw.count(boundary.encode()) == 1


@given(
    st.one_of(LINES, st.text('ab .=?"<-', max_size=20)),
    st.one_of(LINES, st.just("Ada Lovelace")),
    st.one_of(TEXTS, st.just("plain\n")),
    st.booleans(),
)
def test_what_says_plainly_what_was_meant_is_proven_too(subject, name, text, eightbit):
    meant = replace(EMAIL, subject=subject, to_name=name, text=text, html=f"<p>{text}</p>")
    try:
        raw = assemble(meant, eightbit=eightbit)
    except MimeError:
        return
    if says_plainly(meant, raw, eightbit=eightbit):
        prove(meant, raw, eightbit=eightbit)


def test_what_is_said_plainly_is_read_octet_by_octet():
    meant = replace(EMAIL, to_name="Ada Lovelace", text="Good morning\n", html="<p>Good morning</p>\n")
    raw = assemble(meant)
    assert says_plainly(meant, raw)
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        with suppress(MimeError):  # wrong whatever it says
            assert not says_plainly(meant, changed), changed
    assert not says_plainly(meant, raw.replace(b"From:", b"Bcc: eve@x.example\r\nFrom:"))
