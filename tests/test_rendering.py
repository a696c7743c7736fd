"""What a recipient reads: every type in every variant, with words from outside that try to be more than words."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.compiler import CodeGenerator

from tests.shared import shared
from worker.events import TYPES
from worker.masking import WITHHELD
from worker.mime import assemble, prove
from worker.rendering import (
    SIGNED,
    Ground,
    Mail,
    Renderer,
    RenderError,
    _doubtful_link,
    _edges,
    file_name,
    list_id,
    one_line,
    variants,
)
from worker.sandbox import Sandbox

STATUS = {"outage_incident", "maintenance_notice"}
MAILED = {name: kind for name, kind in TYPES.items() if kind.category not in STATUS}
EVERY_MAIL = [(name, variant) for name in MAILED for variant in variants(name)]
RENDERER = Renderer()
GROUND = Ground(
    account="acme",
    account_name="Acme Corp",
    category="invoice",
    roles=("accounting", "payment_contact"),
    role_titles=("Accounting contact", "Payment contact (named once)"),
    reasons=("role_matched", "role_matched"),
    preference_url="https://notify.vendor.example/preferences/one",
    catalogue="issuetrak",
)
CHANGES = [
    ({"change": "add_role", "role": "r1", "contact": "c1"}, "Give Ada the role Quote Approver."),
    ({"change": "remove_role", "role": "r1", "contact": "c1"}, "Take the role Quote Approver from Ada."),
    (
        {"change": "replace_role", "role": "r1", "from": "c1", "to": "c2"},
        "Move the role Quote Approver from Ada to c2.",
    ),
    (
        {"change": "add_contact", "contact": {"id": "c3", "email": "eve@acme.example", "roles": ["r1", "r2"]}},
        "Add the contact c3 (eve@acme.example) with the role Quote Approver, r2.",
    ),
    ({"change": "remove_contact", "contact": "c1"}, "Remove the contact Ada."),
    (
        {"change": "change_address", "contact": "c1", "email": "a@acme.example"},
        "Change the address of Ada to a@acme.example.",
    ),
    ({"change": "update_contact", "contact": "c1", "fields": {"locale": "de"}}, "Change Ada: locale to de."),
    ({"change": "set_products", "contact": "c1", "products": None}, "Set the products of Ada to all."),
    (
        {"change": "set_opt_out", "contact": "c1", "role": "r1", "category": "announcement", "opted_out": True},
        "Switch announcement off for Ada in the role Quote Approver.",
    ),
]


def mail(type_name: str, variant: str = "direct", data: dict | None = None, **changes) -> Mail:
    category = TYPES[type_name].category
    made = Mail(
        event="01JCV3N6M1Q9T8S7R6P5N4M3K2",
        type=type_name,
        category=category,
        category_title="Some category",
        class_="transactional",
        data=dict(TYPES[type_name].sample) if data is None else data,
        variant=variant,
        to_name="Ada",
        to_address="Ada@acme.example",
        locale="en",
        timezone="Europe/Berlin",
        grounds=(replace(GROUND, category=category),),
        vendor_name="Northwind",
        sender="Northwind <notify@vendor.example>",
        reply_to="help@vendor.example",
        message_id="<abc@vendor.example>",
        date=datetime(2026, 11, 21, 10, tzinfo=UTC),
        list_domain="notify.vendor.example",
        unsubscribe_url=None,
        status_page_url="https://status.vendor.example/",
        extra={
            "requester": "Grace Hopper",
            "action_title": "Change contacts",
            "decide_url": "https://notify.vendor.example/requests/1",
            "contact_names": {"c1": "Ada"},
            "role_titles": {"r1": "Quote Approver (explained)"},
            "contacts": [{"name": "Ada", "email": "ada@acme.example", "roles": ["Quote Approver"]}],
        },
    )
    return replace(made, **changes)


class Page(HTMLParser):
    """The elements, links and visible text of an HTML part."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._hidden = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden += tag in ("style", "title")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("style", "title")

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    @property
    def links(self) -> list[str]:
        return [str(attrs["href"]) for tag, attrs in self.tags if tag == "a" and attrs.get("href")]


def named(tags: list, name: str) -> list[dict]:
    return [attrs for tag, attrs in tags if tag == name]


# --- Every mail ------------------------------------------------------------------------------------------------------


def test_every_mailed_type_has_a_template_and_no_status_type_has():
    folders = {path.name for path in (Path(__file__).parent.parent / "templates").iterdir() if path.is_dir()}
    assert folders - {"_base", "_operators"} == set(MAILED)


def test_the_shipped_templates_have_no_fault():
    assert RENDERER.check({name: kind.sample for name, kind in MAILED.items()}) == ()


@pytest.mark.parametrize(("type_name", "variant"), EVERY_MAIL)
def test_a_mail_says_in_text_what_it_says_in_html(type_name, variant):
    email = RENDERER.render(mail(type_name, variant, unsubscribe_url="https://notify.vendor.example/unsubscribe/one"))
    page = Page(email.html)
    assert not [link for link in page.links if link not in email.text]
    assert not [number for number in re.findall(r"\d[\d.,:]*\d|\d", page.text) if number not in email.text]
    assert "\n" not in email.subject
    assert "{{" not in email.html + email.text
    assert "jinja" not in email.html + email.text
    prove(email, assemble(email))


@pytest.mark.parametrize(("type_name", "variant"), EVERY_MAIL)
def test_a_mail_is_accessible(type_name, variant):
    page = Page(RENDERER.render(mail(type_name, variant)).html)
    assert len(named(page.tags, "h1")) == 1
    assert len(named(page.tags, "title")) == 1
    assert named(page.tags, "html")[0]["lang"] == "en"
    for table in named(page.tags, "table"):
        assert table.get("role") == "presentation" or table["class"] in ("facts", "list")
    assert all(cell.get("scope") in ("row", "col") for cell in named(page.tags, "th"))
    assert not named(page.tags, "img")
    sizes = [int(size) for size in re.findall(r"font-size: ?(\d+)px", "".join(str(attrs) for _, attrs in page.tags))]
    assert {size for size in sizes if size < 16} <= {1}  # the stripe's blank and the hidden preview


@pytest.mark.parametrize("type_name", MAILED)
def test_a_mail_needs_none_of_the_optional_fields(type_name):
    model = TYPES[type_name].model
    required = {field.alias or name for name, field in model.model_fields.items() if field.is_required()}
    sample = TYPES[type_name].sample
    bare = {key: value for key, value in sample.items() if key in required or key in ("account", "accounts")}
    nulls = {key: None for key in model.model_fields if key not in bare and key not in ("account", "accounts")}
    for variant in variants(type_name):
        RENDERER.render(mail(type_name, variant, data=bare, extra={}, status_page_url=None))
        RENDERER.render(mail(type_name, variant, data=bare | nulls, extra={}))


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_text_stands_out_from_its_ground_in_light_and_dark():
    style = (Path(__file__).parent.parent / "templates" / "_base" / "style.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    on_card = [".kind", "h1", ".content", "a", ".facts th", ".facts td", ".list th", ".list td", ".amount"]
    pairs = [(one, ".content") for one in on_card]
    pairs += [(one, "page") for one in (".brand", ".footer", ".footer-link")]
    pairs += [(".notice-cell", ".notice-cell"), (".button-link", ".button-cell"), (".content", "code")]

    def colour(sheet: str, selector: str, what: str) -> str:
        for names, rules in re.findall(
            r"([^{}]+)\{([^{}]*)\}", sheet.partition("@media")[0] if sheet is light else sheet
        ):
            found = re.search(rf"(?:^|[ ;]){what}: (#[0-9a-f]{{6}})", rules)
            if found and selector in [name.strip() for name in names.replace("*/", ",").split(",")]:
                return found.group(1)
        raise AssertionError(f"{selector} has no {what}")

    for sheet in (light, dark):
        for text, ground in pairs:
            behind = colour(sheet, ".page" if ground == "page" else ground, "background-color")
            lighter, darker = sorted((luminance(colour(sheet, text, "color")), luminance(behind)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)


# --- Variants --------------------------------------------------------------------------------------------------------


def test_a_copy_says_so_in_subject_header_and_body():
    email = RENDERER.render(mail("invoice.issued", "copy"))
    assert email.subject.startswith("Copy: Invoice 2026-000123")
    assert ("X-Rolecast-Copy", "yes") in email.headers
    assert "get a copy of invoices" in email.text
    assert not RENDERER.render(mail("invoice.issued")).subject.startswith("Copy")


@pytest.mark.parametrize("type_name", sorted(SIGNED))
def test_a_signing_link_is_in_the_signers_mail_alone(type_name):
    link = TYPES[type_name].sample["signing_url"]
    bare = link.removeprefix("https://")
    attachment = {"name": "quote.pdf", "media_type": "application/pdf", "url": link}
    spread = {
        **TYPES[type_name].sample,
        "body": f"Sign at [here]({link}) or {bare.upper()}?x=1 or {quote(link, safe='')}.",
        "reference": f"see {link}",
        "url": link,
        "attachments": [attachment],
    }
    for variant in variants(type_name):
        email = RENDERER.render(mail(type_name, variant, data=spread, extra={"note": link}))
        everything = (email.subject + email.text + email.html + repr(email.headers)).lower()
        assert (bare.lower() in everything) == (variant == "esign"), variant
        assert (quote(bare, safe="").lower() in everything) == (variant == "esign"), variant
        assert (WITHHELD in email.text) == (variant != "esign")


def test_a_template_of_the_operator_cannot_see_the_signing_link_either(tmp_path):
    (tmp_path / "quote.issued").mkdir()
    for part in ("subject.txt", "body.txt", "body.html"):
        (tmp_path / "quote.issued" / part).write_text("Sign: {{ data.get('signing_url') }} {{ data }}")
    renderer = Renderer(templates_dir=tmp_path)
    link = TYPES["quote.issued"].sample["signing_url"]
    assert link in renderer.render(mail("quote.issued", "esign")).text
    for variant in ("direct", "copy", "fallback"):
        assert link not in repr(renderer.render(mail("quote.issued", variant)))


def test_a_quote_without_a_signer_says_what_is_missing_and_what_to_do():
    text = RENDERER.render(mail("quote.issued", "fallback")).text
    assert "No one who may sign for Acme Corp can be reached" in text
    assert "name a contact who may sign" in text


def test_a_statement_that_falls_back_is_forwarded_with_its_reason():
    text = RENDERER.render(mail("statement.issued", "fallback")).text
    assert "forwarded to you because the contact of Acme Corp who usually receives it cannot be reached" in text


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
def test_an_approver_reads_who_asks_and_what_would_change(change, sentence):
    data = {"account": "acme", "action": "contact_change", "requested_by": "c2", "change": change}
    email = RENDERER.render(mail("action.requested", "approval", data=data))
    assert "Asked by: Grace Hopper" in email.text
    assert sentence in email.text
    assert sentence in Page(email.html).text


def test_the_contact_list_names_every_contact_with_its_roles():
    email = RENDERER.render(mail("action.requested", "contact_list"))
    assert "- Ada, ada@acme.example\n  Quote Approver" in email.text
    assert "Ada ada@acme.example" in Page(email.html.replace("<br", " <br")).text


def test_a_confirmed_change_of_contacts_says_that_outages_are_not_mailed_and_who_helps():
    text = RENDERER.render(mail("contacts.changed")).text
    assert "outages and maintenance are not announced by email" in text
    assert "Help with designating roles comes from your account manager." in text
    others = replace(GROUND, catalogue="billtrust")
    assert "account manager" not in RENDERER.render(mail("contacts.changed", grounds=(others,))).text


# --- Footer and headers ----------------------------------------------------------------------------------------------


def test_the_footer_names_each_ground_with_its_own_preference_link():
    second = replace(
        GROUND, account="globex", account_name="Globex", preference_url="https://notify.vendor.example/preferences/two"
    )
    email = RENDERER.render(mail("announcement.published", grounds=(replace(GROUND, category="announcement"), second)))
    assert "Acme Corp gave you the roles Accounting contact and Payment contact, which receive" in email.text
    assert "Preferences for Acme Corp: https://notify.vendor.example/preferences/one" in email.text
    assert "Preferences for Globex: https://notify.vendor.example/preferences/two" in email.text
    assert "https://status.vendor.example/" in email.text
    assert [value for name, value in email.headers if name == "X-Rolecast-Reason"] == [
        "account=acme; category=announcement; role=accounting,payment_contact",
        "account=globex; category=invoice; role=accounting,payment_contact",
    ]


def test_a_mail_that_may_be_opted_out_of_has_the_list_headers_and_others_have_none():
    lists = {"List-ID", "List-Unsubscribe", "List-Unsubscribe-Post"}
    url = "https://notify.vendor.example/unsubscribe/one"
    headers = dict(RENDERER.render(mail("announcement.published", unsubscribe_url=url)).headers)
    assert headers["List-ID"] == "<announcement.acme.notify.vendor.example>"
    assert headers["List-Unsubscribe"] == f"<{url}>"
    assert headers["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert not lists & set(dict(RENDERER.render(mail("invoice.issued")).headers))


def test_every_mail_carries_the_headers_of_the_contract():
    headers = dict(RENDERER.render(mail("invoice.issued")).headers)
    assert headers == {
        "Date": "Sat, 21 Nov 2026 10:00:00 +0000",
        "From": "Northwind <notify@vendor.example>",
        "Reply-To": "help@vendor.example",
        "Message-ID": "<abc@vendor.example>",
        "Auto-Submitted": "auto-generated",
        "X-Auto-Response-Suppress": "All",
        "Feedback-ID": "invoice:acme:transactional:rolecast",
        "X-Rolecast-Event": "01JCV3N6M1Q9T8S7R6P5N4M3K2",
        "X-Rolecast-Reason": "account=acme; category=invoice; role=accounting,payment_contact",
    }


def test_two_accounts_never_share_a_list():
    ids = ["acme", "Acme", "a.b", "a-b", "a_b", "..", "-", "A.B"]
    assert len({list_id("invoice", one, "vendor.example").lower() for one in ids}) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", list_id("invoice", one, "vendor.example")) for one in ids)


# --- Words from outside (reliability.md A1, A2, A5) ------------------------------------------------------------------


def naughty() -> list[str]:
    texts = json.loads(shared("corpora", "torture", "blns.json").read_text(encoding="utf-8"))
    names = json.loads(shared("corpora", "torture", "display-names-synthetic.json").read_text(encoding="utf-8"))
    ours = ["=?utf-8?q?A=0D=0ABcc=3A_evil=40x=2Ey?=", "A\r\nBcc: evil@x.example", "jinja0x", "<!--jinja0x-->", "\ud800"]
    return [text for text in [*texts, *names, *ours] if text.strip()]


def test_no_text_becomes_a_header_or_an_element():
    sample = TYPES["file.failed"].sample
    plain = RENDERER.render(mail("file.failed", data={**sample, "reason": "x", "file_name": "x"}))
    elements = [tag for tag, _ in Page(plain.html).tags]
    headers = [name for name, _ in plain.headers]
    for text in naughty():
        shaped = mail("file.failed", data={**sample, "reason": text, "file_name": text}, to_name=text)
        email = RENDERER.render(replace(shaped, grounds=(replace(shaped.grounds[0], account_name=text),)))
        page = Page(email.html)
        shown = " ".join(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", " ", text).split())
        assert [tag for tag, _ in page.tags] == elements, text
        assert shown in page.text, text
        assert shown in " ".join(email.text.split()), text
        assert [name for name, _ in email.headers] == headers
        prove(email, assemble(email))


def test_no_markdown_body_becomes_more_than_prose():
    allowed = {"p", "br", "strong", "em", "ul", "ol", "li", "a", "h2", "h3", "h4", "h5", "h6"}
    allowed |= {"blockquote", "code", "pre", "hr", "table", "thead", "tbody", "tr", "th", "td", "div"}
    frame = {"html", "head", "meta", "style", "title", "body", "h1"}
    for text in naughty():
        email = RENDERER.render(mail("announcement.published", data={"title": one_line(text, 99) or "T", "body": text}))
        page = Page(email.html)
        assert {tag for tag, _ in page.tags} <= allowed | frame, text
        assert len(named(page.tags, "h1")) == 1
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")], text
        assert all(link.startswith(("https://", "mailto:")) for link in page.links), text
        prove(email, assemble(email))


def test_a_markdown_body_keeps_its_lists_tables_and_safe_links():
    body = "# Head\n\n|a|b|\n|-|-|\n|1|2|\n\n[ok](https://a.example) [no](javascript:x) [rel](/x) ![i](https://t.example/p.png)"
    html = RENDERER.render(mail("service.notice", data={"account": "acme", "title": "T", "body": body})).html
    page = Page(html)
    assert len(named(page.tags, "h1")) == 1
    assert "https://a.example" in page.links
    assert not [link for link in page.links if not link.startswith("https://")]
    assert {"h2", "table", "th"} <= {tag for tag, _ in page.tags}
    assert "img" not in {tag for tag, _ in page.tags}


def test_a_long_subject_or_name_is_cut():
    email = RENDERER.render(
        mail("sales.message", data={"account": "a", "title": "t" * 500, "body": "b"}, to_name="n" * 300)
    )
    assert len(email.subject) == 200
    assert len(email.to_name) == 100


WORDS = st.sampled_from(
    ["href", 'href="https://', '="https://x.example', "='mailto:", '="mai', "hre", "f", "src", "s", "rc", "action",
     "act", "ion", "background", "=", "background=", "backgrou", "nd=", '">', " ", "x" * 9, "y" * 15, "z" * 17]
)  # fmt: skip


@given(st.lists(WORDS, max_size=6).map("".join), st.lists(st.lists(WORDS, max_size=8).map("".join), max_size=6))
def test_no_link_is_overlooked_because_only_the_edges_of_shared_texts_are_looked_at(value, literals):
    whole = value.join(literals)
    if not _doubtful_link(value.join(map(_edges, literals))):
        assert not _doubtful_link(whole)


@given(st.text())
def test_one_line_is_one_line(text):
    line = one_line(text, 50)
    assert len(line) <= 50
    assert len(line.splitlines()) <= 1


def test_only_values_that_json_knows_reach_a_template():
    with pytest.raises(RenderError, match="of the kind object"):
        RENDERER.render(mail("service.notice", data={"title": object(), "body": "b"}))


# --- Times, amounts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zone", "shown"),
    [
        ("UTC", "21 Nov 2026, 23:30 UTC"),
        ("Europe/Berlin", "22 Nov 2026, 00:30 Berlin time (21 Nov 2026, 23:30 UTC)"),
        ("America/New_York", "21 Nov 2026, 18:30 New York time (23:30 UTC)"),
        ("Not/AZone", "21 Nov 2026, 23:30 UTC"),
        ("../../etc/passwd", "21 Nov 2026, 23:30 UTC"),
    ],
)
def test_a_time_is_shown_in_the_recipients_zone_and_in_utc(zone, shown):
    data = {"account": "acme", "what": "Bank", "changed_at": "2026-11-21T23:30:00Z"}
    assert f"When: {shown}\n" in RENDERER.render(mail("payment_information.changed", data=data, timezone=zone)).text


@pytest.mark.parametrize(("amount", "shown"), [("1280.00", "1,280.00"), ("-5", "-5"), ("1234567.5", "1,234,567.5")])
def test_an_amount_keeps_its_decimals(amount, shown):
    data = {"account": "a", "number": "1", "amount": amount, "currency": "EUR", "due_on": "2026-12-21"}
    assert f"{shown} EUR" in RENDERER.render(mail("invoice.issued", data=data)).subject


# --- Attachments (A12) -----------------------------------------------------------------------------------------------


def attached(*files: dict) -> Mail:
    return mail("invoice.issued", data={**TYPES["invoice.issued"].sample, "attachments": list(files)})


def enclosed(name: str, media_type: str, content: bytes) -> dict:
    return {"name": name, "media_type": media_type, "content_base64": base64.b64encode(content).decode()}


def test_a_file_is_enclosed_and_a_linked_one_is_only_linked():
    link = {"name": "terms.pdf", "media_type": "application/pdf", "url": "https://files.vendor.example/terms.pdf"}
    email = RENDERER.render(attached(enclosed("Rechnung März.pdf", "application/pdf", b"%PDF-1.7 x"), link))
    assert [(one.name, one.content) for one in email.attachments] == [("Rechnung März.pdf", b"%PDF-1.7 x")]
    assert "- terms.pdf: https://files.vendor.example/terms.pdf" in email.text
    assert "https://files.vendor.example/terms.pdf" in Page(email.html).links
    prove(email, assemble(email))


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        (enclosed("a.exe", "application/x-msdownload", b"MZ"), "allowed are"),
        (enclosed("a.pdf", "application/pdf", b"MZ"), "does not hold what"),
        (enclosed("a.txt", "text/plain", b"a\0b"), "does not hold what"),
        (enclosed("a.txt", "text/plain", b"x" * (5 * 1024 * 1024 + 1)), "more than"),
        ({"name": "a.txt", "media_type": "text/plain", "content_base64": "%%%"}, "is not Base64"),
    ],
)
def test_a_file_that_is_not_what_it_says_stops_the_mail(file, fault):
    with pytest.raises(RenderError, match=fault):
        RENDERER.render(attached(file))


def test_more_than_five_files_stop_the_mail():
    with pytest.raises(RenderError, match="more than 5"):
        RENDERER.render(attached(*[enclosed("a.txt", "text/plain", b"x")] * 6))


@pytest.mark.parametrize(
    ("given_name", "safe"),
    [
        ("../../etc/passwd", "passwd.pdf"),
        ("C:\\x\\a.pdf", "a.pdf"),
        ("CON.pdf", "_ON.pdf"),
        ("\u202efdp.exe", "fdp.exe.pdf"),
        ("a\r\nb.pdf", "ab.pdf"),
        ("...", "file.pdf"),
        ("x" * 300 + ".pdf", "x" * 96 + ".pdf"),
    ],
)
def test_a_file_name_is_safe_to_save_under(given_name, safe):
    assert file_name(given_name, (".pdf",)) == safe


# --- Templates of operators (A6 to A10) ------------------------------------------------------------------------------


def with_body(folder: Path, source: str, *, name: str = "service.notice/body.html") -> Renderer:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return Renderer(templates_dir=folder)


def test_an_operators_template_may_extend_the_layout_and_use_its_parts(tmp_path):
    source = """{% extends "_base/layout.html" %}{% import "_base/parts.html" as parts %}
{% block content %}<p>{{ super() }}Ours: {{ data.title|upper }}</p>
{% for row in [1, 2] %}{{ loop.index }}{% endfor %}{{ parts.facts([("A", "<b>")]) }}{% endblock %}"""
    email = with_body(tmp_path, source).render(mail("service.notice"))
    assert "&lt;b&gt;" in email.html
    assert '<p style="' in email.html
    assert email.text == RENDERER.render(mail("service.notice")).text


def test_an_operators_style_sheet_colours_every_mail(tmp_path):
    sheet = (Path(__file__).parent.parent / "templates/_base/style.css").read_text().replace("#1f55c9", "#0a5c36")
    email = with_body(tmp_path, sheet, name="_base/style.css").render(mail("invoice.issued"))
    assert "background-color: #0a5c36" in email.html


REFUSED = [
    ("{{ data.title|safe }}", "safe"),
    ("{{ data.title|forceescape }}", "forceescape"),
    ("{% autoescape false %}{{ data.title }}{% endautoescape %}", "autoescap"),
    ("{% include 'invoice.issued/body.html' %}", "include"),
    ("{% include '_base/layout.html' %}", "include"),
    ("{% extends 'invoice.issued/body.html' %}", "_base/"),
    ("{% extends data.title %}", "_base/"),
    ("{% import '_base/words.txt' as words %}", ".html"),
    ("{% import '_base/parts.html' as parts with context %}", "without context"),
    ("{% macro f() %}{{ f() }}{% endmacro %}", "macros"),
    ("{{ 'x' * 1000000000 }}", r"\*"),
    ("{{ 10 ** 10 ** 10 }}", r"\*\*"),
    ("{{ '%1000000000s' % 'x' }}", "%"),
    ("{{ 'x'.center(1000000000) }}", "center"),
    ("{{ 'x'.ljust(9) }}", "ljust"),
    ("{{ '{}'.format(1) }}", "format"),
    ("{{ 'x'|center(1000000000) }}", "center"),
    ("{{ '%s'|format(1) }}", "format"),
    ("{{ ['x']|map('center', 9)|list }}", "center"),
    ("{% set f = 'x'.center %}{{ f(9) }}", "not available"),
    ("{% set super = 'x'.center %}{{ super(9) }}", "not available"),
    ("{{ 'x'['center'](9) }}", "only macros"),
    ("{% for i in range(10) %}{% endfor %}", "range"),
    ("{{ lipsum() }}", "lipsum"),
    ("{{ ''.__class__.__mro__ }}", "unsafe|__class__|undefined"),
    ("{{ data.__class__ }}", "__class__"),
    ("{{ data|attr('x') }}", "attr"),
    ("{{ data.pop('title') }}", "pop"),
    ("{% if %}", "Expected an expression"),
]


@pytest.mark.parametrize(("source", "fault"), REFUSED)
def test_a_template_that_reaches_too_far_is_refused_in_one_sentence(tmp_path, source, fault):
    with pytest.raises(RenderError, match=fault) as raised:
        with_body(tmp_path, source).render(mail("service.notice"))
    assert str(raised.value).startswith("service.notice/body.html")
    assert "\n" not in str(raised.value)


def test_a_macro_that_calls_itself_is_refused_in_the_base_too(tmp_path):
    macro = "{% macro a() %}{{ b() }}{% endmacro %}\n{% macro b() %}{{ a() }}{% endmacro %}"
    renderer = with_body(tmp_path, macro, name="_base/ours.html")
    (tmp_path / "service.notice").mkdir()
    (tmp_path / "service.notice/body.html").write_text("{% import '_base/ours.html' as ours %}{{ ours.a() }}")
    with pytest.raises(RenderError, match="macros cannot call themselves"):
        renderer.render(mail("service.notice"))


def test_output_beyond_the_budget_stops(tmp_path):
    source = "{% for a in data.title %}{% for b in data.title %}{{ data.body }}{% endfor %}{% endfor %}"
    data = {"account": "acme", "title": "t" * 200, "body": "b" * 10_000}
    with pytest.raises(RenderError, match="more than 512 KiB"):
        with_body(tmp_path, source).render(mail("service.notice", data=data))


def test_an_undefined_name_gives_one_clear_sentence(tmp_path):
    for source, sentence in [
        ("{{ data.titel }}", "service.notice/body.html: the data has no field 'titel'"),
        ("{{ titel }}", "service.notice/body.html: 'titel' is undefined"),
    ]:
        with pytest.raises(RenderError) as raised:
            with_body(tmp_path, source).render(mail("service.notice"))
        assert str(raised.value) == sentence


def test_a_link_to_a_script_stops_the_mail(tmp_path):
    for source in (
        "<a href='{{ data.target }}'>x</a>",
        '<A  HREF = "{{ data.target }}">x</A>',
        "<img src='{{ data.target }}'>",
    ):
        with pytest.raises(RenderError, match="neither https"):
            with_body(tmp_path, source).render(
                mail("service.notice", data={"title": "t", "body": "b", "target": "javascript:alert(1)"})
            )


def test_a_field_named_like_a_method_is_the_field(tmp_path):
    data = {"title": "t", "body": "b", "items": "mine"}
    assert "mine" in with_body(tmp_path, "{{ data.items }}").render(mail("service.notice", data=data)).html


class AsJinjaDoes(Sandbox):
    code_generator_class = CodeGenerator


@pytest.mark.parametrize(
    "source",
    [
        "{{ data.get('title') }} {{ data.get('absent') }} {{ data.get('absent', data.get('key')) }}",
        "{{ data.get(data.get('key')) }} {{ {'a': data}.get('a').get('key', 'x').get }}",
        "{% for x in data.get('rows', []) if {1: 'on'}.get(x) %}{{ x }}{{ data.get('key') }}{% endfor %}",
        "{% macro m(x, y=data.get('key')) %}{{ x.get(y) }}{{ y.get('x') }}{% endmacro %}{{ m(data) }}",
        "{% set x = data.get('rows').get('x') %}",
        "{{ other.get }}", "{{ other.get('x') }}", "{{ {'a': {}.get}.get('a')('x') }}", "{{ other.get|length }}",
        "{{ data.get() }}", "{{ data.get([]) }}", "{{ data.get('a', 'b', 'c') }}", "{{ data.get('a', default=1) }}",
        "{{ data.get(*['key']) }}", "{{ data.get(**{'key': 1}) }}", "{{ absent.get('x') }}", "{{ data.get(absent) }}",
        "{{ 'text'.get('x') }}", "{{ loop.get('x') }}", "{% call data.get('key') %}x{% endcall %}",
        "{{ " + "data.get(" * 40 + "'key'" + ")" * 40 + " }}",
    ],
)  # fmt: skip
def test_a_mapping_is_asked_by_get_as_in_jinjas_own_sandbox(source):
    def said(kind: type[Sandbox]) -> str:
        data = {"title": "t", "key": "title", "rows": [1, 2]}
        try:
            return str(kind(None).from_string(source).render(data=data, other={"get": "a field"}))
        except (TemplateError, TypeError) as error:
            return f"{type(error).__name__}: {error}"

    assert said(Sandbox) == said(AsJinjaDoes)


def test_a_shared_template_that_can_not_be_read_stops_no_mail_that_does_without_it(tmp_path):
    renderer = with_body(tmp_path, "{{ data.title }}")
    (tmp_path / "_base").mkdir()
    (tmp_path / "_base/mine.txt").write_bytes("{# Grüße #}".encode("latin-1"))
    renderer.prepare()
    assert renderer.render(mail("service.notice")).html


def test_check_finds_faults_and_files_that_no_mail_uses(tmp_path):
    renderer = with_body(tmp_path, "{{ data.titel }}")
    (tmp_path / "service.notise").mkdir()
    (tmp_path / "service.notise/body.txt").write_text("x")
    findings = renderer.check({name: kind.sample for name, kind in MAILED.items()})
    assert {one.template for one in findings} == {"service.notise/body.txt", "service.notice/body.html"}
    assert any("the data has no field 'titel'" in one.fault for one in findings)
