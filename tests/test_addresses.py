# ruff: noqa: RUF001 - look-alikes are what these tests are about
from __future__ import annotations

import json
import string
import time

import pytest
from email_validator import EmailNotValidError, validate_email
from hypothesis import given, settings
from hypothesis import strategies as st

from subscriptions.addresses import BadAddress, _is_plain, _normalise_by_library, as_written, normalise
from tests.shared import shared

# Letters of every kind that make a difference somewhere: case, width, composition, direction, look-alikes.
TRICKY = "aZ09.-_+@\"'<>() \t\r\n\0\u00a0ßẞİıΣσς\u212a\u0301é。ｕⓔ٠אж例😀\u200b\u202e\ud800[]:,;xn"
LOCAL = st.text(string.ascii_letters + string.digits + "!#$%&'*+-/=?^_`{|}~.", min_size=1, max_size=20)
DOMAIN = st.lists(
    st.text(string.ascii_letters + string.digits + "-", min_size=1, max_size=12), min_size=1, max_size=4
).flatmap(lambda labels: st.sampled_from([".".join(labels), ".".join([*labels, "test"]), ".".join([*labels, "LOCAL"])]))
ASCII_ADDRESSES = st.builds("{}@{}".format, LOCAL, DOMAIN)
ANY_ADDRESSES = st.one_of(
    ASCII_ADDRESSES,
    st.text(TRICKY, max_size=20),
    st.builds("{}@{}".format, st.text(TRICKY, max_size=8), st.text(TRICKY, max_size=12)),
    st.builds("{}@{}.example".format, st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8)),
    st.emails(),
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Ada@Acme.Example", "ada@acme.example"),
        ("  ada@acme.example\r\n", "ada@acme.example"),
        ("ada+Bills@acme.test", "ada+bills@acme.test"),
        ("a.d.a@acme.example", "a.d.a@acme.example"),
        ("user@bücher.example", "user@xn--bcher-kva.example"),
        ("user@BÜCHER.example", "user@xn--bcher-kva.example"),
        ("user@xn--bcher-kva.example", "user@xn--bcher-kva.example"),
        ("user@e\u0301xample.example", "user@xn--xample-9ua.example"),
        ("Jose\u0301@acme.example", "josé@acme.example"),
        ("JOSÉ@acme.example", "josé@acme.example"),
        ("ΟΔΟΣ@acme.example", "οδος@acme.example"),
        ("user@ΟΔΟΣ.example", "user@xn--pxavbq.example"),
        ("a@" + "b" * 63 + ".example", "a@" + "b" * 63 + ".example"),
    ],
)
def test_two_spellings_of_one_mailbox_have_one_normal_form(text, normal):
    assert normalise(text) == normal


def test_the_address_as_written_keeps_its_case_and_loses_the_spaces_around():
    assert as_written(" Ada.Lovelace@Acme.Example\t") == "Ada.Lovelace@Acme.Example"
    assert as_written("Ada@Bücher.example") == "Ada@Bücher.example"


@pytest.mark.parametrize(
    "text",
    [
        "user@ⓔxample.example",
        "user@ｅｘａｍｐｌｅ.example",
        "user@acme。example",
        "user@acme．example",
        "user@boo\u212a.example",  # the Kelvin sign
        "boo\u212a@acme.example",
        "\u1fef@acme.example",  # NFC makes a backtick of it
        "user@xn--bcher-kva。example",
    ],
)
def test_characters_that_only_look_like_others_never_merge_two_mailboxes(text):
    with pytest.raises(BadAddress, match="stands for"):
        normalise(text)
    with pytest.raises(BadAddress, match="stands for"):
        as_written(text)


def test_look_alikes_of_another_alphabet_are_mailboxes_of_their_own():
    assert normalise("user@ex\u0430mple.example") == "user@xn--exmple-4nf.example"
    assert normalise("ｕｓｅｒ@acme.example") == "ｕｓｅｒ@acme.example"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "ada",
        "@acme.example",
        "ada@",
        "ada@@acme.example",
        "ada@acme",
        "ada@localhost",
        "ada@host.LOCAL",
        "ada@host.Invalid",
        "ada@acme.example.",
        "ada@[192.0.2.1]",
        "ada@192.0.2.1",
        '"a b"@acme.example',
        "ada@acme.example(work)",
        "Ada <ada@acme.example>",
        "<ada@acme.example>",
        "ada@acme.example, bob@acme.example",
        "ada@acme.example\r\nBcc: eve@acme.example",
        "ada\0@acme.example",
        "ada@acme.example\x0b",
        "ada\u200b@acme.example",
        "ada@acme.example\u202emoc",
        ".ada@acme.example",
        "a..a@acme.example",
        "ada@-acme.example",
        "ada@a--b.example",
        "a" * 65 + "@acme.example",
        "a@" + "b" * 64 + ".example",
        "a@" + ".".join(["b" * 60] * 5),
        "\ud800@acme.example",
    ],
)
def test_what_is_no_address_is_refused_with_one_printable_sentence(text):
    for function in (normalise, as_written):
        if text == "ada@a--b.example":
            assert function(text) == text  # third and fourth letter are no hyphens: an ordinary name
            continue
        with pytest.raises(BadAddress) as refused:
            function(text)
        message = str(refused.value)
        assert message.isprintable()
        assert message.endswith(".")
        assert ". " not in message


@settings(max_examples=400)
@given(ANY_ADDRESSES)
def test_the_normal_form_is_its_own_normal_form(text):
    try:
        normal = normalise(text)
    except BadAddress:
        return
    assert normalise(normal) == normal
    assert normalise(as_written(text)) == normal
    assert normal.rpartition("@")[2].isascii()


@settings(max_examples=400)
@given(st.one_of(ASCII_ADDRESSES, st.text(TRICKY, max_size=12)))
def test_the_fast_path_agrees_with_the_library(text):
    if not _is_plain(text):
        return
    assert text.isascii()
    library = validate_email(text, check_deliverability=False, test_environment=True, strict=True)
    assert text.lower() == library.normalized.lower() == _normalise_by_library(text)


def test_the_fast_path_agrees_with_the_library_on_the_torture_corpora():
    ours = json.loads(shared("corpora", "torture", "addresses-synthetic.json").read_bytes())
    theirs = json.loads(shared("corpora", "torture", "addresses-email-validator.json").read_bytes())
    for case in [*ours, *theirs]:
        text = case["address"]
        try:
            validate_email(text, check_deliverability=False, test_environment=True, strict=True)
            valid = True
        except EmailNotValidError:
            valid = False
        assert valid or not _is_plain(text)


ACCEPTED_HERE = {
    "my@example.com\n",  # the ends are trimmed
    "\nmy@example.com",
    "me@test.test.test",  # .test is accepted
    "λambdaツ@test",  # as are letters of every alphabet
}


def test_the_corpus_of_invalid_addresses_is_refused():
    cases = json.loads(shared("corpora", "torture", "addresses-email-validator.json").read_bytes())
    for case in cases:
        text = case["address"]
        invalid = case["source_test"].startswith("test_email_invalid") and text not in ACCEPTED_HERE
        if invalid or "only_if_quoted" in case["source_test"]:
            with pytest.raises(BadAddress):
                normalise(text)


def test_a_hundred_thousand_plain_addresses_are_normalised_within_a_second():
    started = time.perf_counter()
    for number in range(100_000):
        normalise(f"Ada.Lovelace{number}@acme-{number % 97}.example")
    assert time.perf_counter() - started < 1


def test_an_address_that_looks_like_an_encoded_word_is_refused() -> None:
    for address in ("=?utf-8?q?x?=@acme.example", "a=?b@acme.example"):
        with pytest.raises(BadAddress, match="encoded word"):
            normalise(address)
