"""Signing links are found in every spelling."""

from __future__ import annotations

import json
from html import escape
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape as jinja_escape

from worker.masking import MASKED, WITHHELD, mask

LINK = "https://sign.example/d/Q-1%2F2?who='ada'&key=a+b~c"


def entities(text: str) -> str:
    return "".join(f"&#x{ord(one):04X};" for one in text)


@pytest.mark.parametrize(
    "spelt",
    [
        str, str.upper, escape, entities, quote, lambda link: quote(link, safe=""),
        lambda link: str(jinja_escape(link)),
        lambda link: json.dumps(link).replace("/", r"\/")[1:-1], lambda link: escape(quote(link)),
        lambda link: link.removeprefix("https://"), lambda link: link.replace("https", "http"), lambda link: link + "/",
        lambda link: link.replace("sign", "%73i&#103;n"),
    ],
)  # fmt: skip
def test_a_link_is_masked_however_it_is_spelt(spelt) -> None:
    assert mask(f'<a href="{spelt(LINK)}">', LINK) == f'<a href="{WITHHELD}">'
    assert mask(f"go: {spelt(LINK)}, now", LINK, instead=MASKED) == f"go: {MASKED}, now"


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40))
def test_any_link_is_masked_in_any_of_its_spellings(rest: str) -> None:
    link = f"https://sign.example/{rest}"
    for spelt in (link, escape(link), quote(link, safe=""), str(jinja_escape(link)), json.dumps(link)[1:-1]):
        assert "sign" not in mask(spelt, link).replace(WITHHELD, "").lower()


def test_other_texts_stay_as_they_are() -> None:
    text = "See https://sign.example/d/Q-1 and https://elsewhere.example."
    assert mask(text, LINK) == text
    assert mask(text, None) == text
