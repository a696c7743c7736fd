"""Signing links, taken out of whatever others may see (contract, section 8).

A signing link stands in the signer's mail alone. Here it is found however it is spelt: with or without its scheme, and
with any of its characters as HTML, URLs or JSON write them. Previews, mails that are not the signer's, the local inbox
and the pages all use this one module.
"""

from __future__ import annotations

import re
from functools import lru_cache
from html.entities import codepoint2name
from typing import Final

WITHHELD: Final = "[signing link withheld]"
#: Stands in text.
MASKED: Final = "https://signing-link.masked.example/"
#: Stands where an address must stay an address, such as behind a button; it leads nowhere.


@lru_cache(maxsize=64)
def pattern(link: str) -> re.Pattern[str]:
    """What finds a link in any text."""
    rest = (link.partition("://")[2] or link).rstrip("/")
    scheme = f"(?:{_all('http')}{_spelt('s')}?{_all('://')})?"
    return re.compile(f"{scheme}{_all(rest)}{_spelt('/')}?", re.IGNORECASE)


def mask(text: str, link: str | None, *, instead: str = WITHHELD) -> str:
    """The text with something else in place of the link; as it is where there is no link."""
    return pattern(link).sub(instead, text) if link else text


def _all(text: str) -> str:
    return "".join(map(_spelt, text))


def _spelt(character: str) -> str:
    """A character in every spelling: itself, percent-encoded, as an HTML reference, escaped as in JSON."""
    number = ord(character)
    percent = "".join(f"%{byte:02x}" for byte in character.encode())
    references = [f"#0*{number}", f"#x0*{number:x}"]
    if number in codepoint2name:
        references.append(codepoint2name[number])
    json = f"\\\\u{number:04x}" + (rf"|\\{re.escape(character)}" if character in '/"\\' else "")
    return f"(?:{re.escape(character)}|{percent}|&(?:{'|'.join(references)});|{json})"
