"""Markdown bodies of events as safe HTML.

Promises: what comes out holds only the elements listed here, links only to https and mailto, no image, no raw HTML of
the publisher's, and no `h1` (the mail has one already). The text part of a mail shows the Markdown source itself.
"""

from __future__ import annotations

import nh3
from markdown_it import MarkdownIt

TAGS = {
    "p", "br", "strong", "em", "ul", "ol", "li", "a", "h2", "h3", "h4", "h5", "h6", "blockquote", "code", "pre", "hr",
    "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip
_PARSER = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
_LOWERED = {"h1": "h2", "h2": "h3", "h3": "h4", "h4": "h5", "h5": "h6", "h6": "h6"}


def markdown_html(source: str) -> str:
    """The HTML of a CommonMark text (tables allowed), cleaned to the elements and links named above."""
    tokens = _PARSER.parse(source)
    for token in tokens:
        token.tag = _LOWERED.get(token.tag, token.tag)
    return nh3.clean(
        _PARSER.renderer.render(tokens, _PARSER.options, {}),
        tags=TAGS,
        attributes={"a": {"href"}, "ol": {"start"}},
        set_tag_attribute_values={"th": {"scope": "col"}},
        url_schemes={"https", "mailto"},
        url_relative="deny",
    )
