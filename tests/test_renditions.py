"""A fan-out's mails by renditions: the same bytes as in full, and in full wherever that is not certain."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from subscriptions.catalogue import load_catalogues
from subscriptions.directory import ContactRow
from worker import mime
from worker.events import TYPES, sample
from worker.fanout import EventRow
from worker.ledger import Lane
from worker.links import Links
from worker.mails import Composer, Due, GroundRow, People, Shape
from worker.mime import MimeError
from worker.rendering import Renderer, RenderError
from worker.renditions import Press
from worker.settings import load
from worker.sheets import Sheet
from worker.transaction import Envelope

BEGUN = 1_795_255_200_000_000
ULID = "01JCV3N6M1Q9T8S7R6P5N4M3K2"
SETTINGS = load(
    {
        "ROLECAST_SENDER": "Vendor Support <support@vendor.example>",
        "ROLECAST_STATUS_PAGE_URL": "https://status.vendor.example",
    },
    folder=Path("/nowhere"),
)
CATALOGUES = load_catalogues()
LINKS = Links(("a key of the test, long enough",), "https://notify.vendor.example")
COMPOSER = Composer(SETTINGS, CATALOGUES, LINKS)
SHIPPED = Renderer()
DIRECT = Shape("email", (("primary_contact", "role_matched"),), (), False)
COPY = Shape("email", (("support_manager", "additional_by_default"),), (), False)
BOTH = Shape("email", (("invoice_primary", "role_matched"), ("primary_contact", "role_matched")), (), True)
ESIGN = Shape("esign_request", (("quote_approver", "role_matched"),), (), False)
NEVER = ("outage_incident", "maintenance_notice", "approval_request")  # mailed, or by a rendition
FAN_OUT = [name for name, kind in TYPES.items() if kind.category not in NEVER]
NOBODY = mime.Email(subject="s", text="", html="", headers=(("X-Rolecast-Event", ULID),), to_name="", to_address="")
BOUNDARY = mime.frame(NOBODY, b"", b"").boundaries[0].decode()
HOSTILE = (
    "", " ", "\x00", "<b>Ada</b>", "\"Ada\" O'Brien & Sons", "=?utf-8?q?A=0D=0ABcc=3A_evil=40x=2Ey?=", ".", ". Ada",
    "A" * 99, "A" * 600, "ä" * 99, "Zoë Strauß", "日本 太郎", "Ada\r\nBcc: evil@x.test", "Ada\nBob", "a\u2028b",
    "\ue000", "&amp;", "a  b", "\u3000x", "{{ name }}", 'href="javascript:x', "src=x", "=_", BOUNDARY, "👩\u200d🚀",
    "Q", "\\", "x" * 40 + " " + "y" * 40, "山田\u3000太郎", "a\u00adb", "\ud800",
)  # fmt: skip


def an_event(type_name: str = "service.notice", **data: Any) -> EventRow:
    """An event to everybody: a type's sample with other data; a datum of None is taken out."""
    body = {key: value for key, value in (dict(sample(type_name)["data"]) | data).items() if value is not None}
    return EventRow(
        id=7,
        ulid=ULID,
        source="/test",
        ce_id="e1",
        type=type_name,
        category=TYPES[type_name].category,
        class_="operational",
        lane=Lane(1),
        scope="all",
        routing={},
        data=body,
        accepted_at=BEGUN,
        mode="live",
        not_before=None,
        expires_at=None,
        status="accepted",
        sender_domain="vendor.example",
        bounce_domain="bounces.vendor.example",
    )


class Audience:
    """Deliveries as the ledger would give them; every one of another contact and account."""

    def __init__(self) -> None:
        self.dues: list[Due] = []
        self.people = People({}, {}, {})

    def add(
        self,
        name: str = "Ada",
        *,
        email: str = "ada@acme.example",
        accounts: Sequence[tuple[str, str]] = (("acme", "Acme Corp"),),
        shape: Shape = DIRECT,
        place: tuple[str, str] = ("en", "Europe/Berlin"),
        tried_at: int | None = None,
    ) -> Due:
        """One more mail, with a ground for each account (id, name)."""
        contacts, known = dict(self.people.contacts), dict(self.people.accounts)
        grounds = []
        for account, account_name in accounts:
            number = len(contacts) + 1
            contacts[number] = ContactRow(
                number, number, f"c{number}", name, email, email, number, "person", (), None, *place, False, False
            )
            known[number] = (account, account_name, "issuetrak")
            grounds.append(GroundRow(number, number, shape))
        self.people = People(contacts, known, {})
        n = len(self.dues) + 1
        self.dues.append(Due(n, n, n.to_bytes(32, "big"), 0, tried_at, tuple(grounds)))
        return self.dues[-1]

    def plain(self, count: int, **given: Any) -> Audience:
        """So many people with plain names."""
        for number in range(count):
            self.add(f"Ada {number}", accounts=((f"acme-{number}", f"Acme {number}"),), **given)
        return self


def by_press(
    press: Press, event: EventRow, audience: Audience, *, eightbit: bool = False, on_a_sheet: int = 3
) -> list[Any]:
    """The bytes of each mail, or the kind of its error; with so many on a sheet, or by the press alone."""
    makers = envelopes(press, event, audience, eightbit=eightbit, on_a_sheet=on_a_sheet)
    return [outcome(lambda make=make: make().body) for make in makers]


def envelopes(
    press: Press, event: EventRow, audience: Audience, *, eightbit: bool, on_a_sheet: int = 3
) -> Iterator[Callable[[], Envelope]]:
    """What makes each mail."""
    people = audience.people
    for position, due in enumerate(audience.dues):
        if not on_a_sheet:
            yield partial(press.envelope, event, due, people, begun=BEGUN, eightbit=eightbit)
            continue
        if not position % on_a_sheet:
            dues = audience.dues[position : position + on_a_sheet]
            sheet = Sheet(press, event, dues, people, begun=BEGUN, eightbit=eightbit)
        yield partial(sheet.envelope, due)


def in_full(
    renderer: Renderer, event: EventRow, audience: Audience, *, composer: Composer = COMPOSER, eightbit: bool = False
) -> list[Any]:
    """What a mail is without any press."""

    def body(due: Due) -> bytes:
        email = renderer.render(composer.mail_of(event, due, audience.people, now=BEGUN))
        return mime.assemble(email, eightbit=eightbit)

    return [outcome(lambda due=due: body(due)) for due in audience.dues]


def outcome(make: Callable[[], bytes]) -> bytes | type[Exception]:
    try:
        return make()
    except (RenderError, MimeError) as error:
        return type(error)


def a_press(renderer: Renderer = SHIPPED, composer: Composer = COMPOSER) -> Press:
    return Press(composer, renderer, b"k" * 32)


@cache
def with_body(source: str, part: str = "body.html") -> Renderer:
    """A renderer in which one part of the service notice is an operator's."""
    folder = Path(_FOLDER.name) / f"t{len(list(Path(_FOLDER.name).iterdir()))}"
    (folder / "service.notice").mkdir(parents=True)
    (folder / "service.notice" / part).write_text(source, encoding="utf-8")
    return Renderer(templates_dir=folder)


_FOLDER = TemporaryDirectory()


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


# ---------------------------------------------------------------- the same bytes


NAMES = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=120), st.sampled_from(["Ada", "Ben"]))
ACCOUNTS = st.tuples(
    st.one_of(
        st.sampled_from(["acme", "ACME", "a.b", "Q", "QQQQ", "x" * 60, "x" * 90, "a b", "ä", "=?x?="]),
        st.text("abc-_.Q1", min_size=1, max_size=70),
    ),
    NAMES,
)
SIMPLE = (
    "Dear {{ name }}, {{ account_name }}", "{{ name or 'you' }} {{ name|default('you') }} {{ 'Dear ' ~ name ~ '!' }}",
    "{% if name %}<p>{{ name|e }}</p>{% else %}nobody{% endif %}",
    "{% set who = name %}{% set both = [who, account_name] %}{% for one in both %}<i>{{ one }}</i>{% endfor %}",
    "{% for ground in grounds %}{{ loop.index }}: {{ ground.account }} {{ ground['account_name'] }}{% endfor %}",
    "{{ grounds|length }} {{ grounds|map(attribute='account_name')|join(', ') }} {{ (grounds|first).account }}",
    "{{ 'x' + name }} {{ name is defined }} {{ unsubscribe_url is none }}",
    "{{ {'a': name}.a }} {{ {'a': name}.get('a') }} {{ {'a': name}.get('b', name) }}",
    "<a href='{{ grounds[0].preference_url }}'>{{ grounds[0].preference_url|link }}</a>\n.\n{{ name }}\n\n\n\n.",
    '{% import "_base/words.html" as words %}{{ words.greeting(name) }} {{ words.why(grounds[0], variant) }}',
    "{% set x %} {{ name }} {% endset %}{{ x }}{% with a = name, b = 1 %}{{ a }}{% endwith %}",
    "{{ grounds|selectattr('catalogue', 'equalto', 'issuetrak')|list|length }}",
    "{{ grounds|selectattr('account')|list|length }} {{ grounds|rejectattr('account')|list|length }}",
    "{{ subject }} {{ data.title }} {{ timezone }} {{ locale }} é " + "long " * 180 + "{{ name }}",
    "{% for a, b in [(name, 1), ('x', account_name)] if a %}{{ a }}{{ b }}{% endfor %}",
    "{{ [name][0] }}{{ [name, 1][:1][0] }}{% set a, b = (name, 'x') %}{{ a }}",
)  # fmt: skip
COMPUTING = (
    "{% for (a, b), c in [((name ~ '')[:2], 1)] %}{{ a }}{% endfor %}{% set a, (b, c) = 1, ('x', 'y') %}",
    "{{ name|upper }}", "{{ name[0] }}", "{{ name[:2] }}", '{% if name == "Ada 2" %}x{% endif %}',
    "{{ name|length }}", "{% for c in name %}{{ c }}.{% endfor %}", '{{ "x" in name }}', '{{ name in ["Ada 2"] }}',
    "{{ name|truncate(5) }}", "<p title='{{ name }}'>x</p>", '<a href="https://x.example/?{{ name }}">x</a>',
    "{{ name.upper() }}", "{{ [name] }}", "{{ (name ~ '')|upper }}", "{{ (name ~ '')[0] }}",
    "{% if name ~ '' == 'Ada 2' %}x{% endif %}", "{{ grounds }}", "{{ {name ~ '': 1, 'Ada 2': 2}|length }}",
    "{{ {'Ada 2': 'x'}.get(name, 'y') }}", "{{ {'Ada 2': 'x'}.get(name ~ '', 'y') }}",
    "{{ 'Ada 2'.startswith(name) }}", "{{ 'Ada 2'.startswith(name ~ '') }}",
    "{{ [name, 'Ada 2']|unique|list|length }}", "{{ [name, 'Ada 2']|sort|first }}", "{{ [name, 'B']|max }}",
    "{{ [name, 'B']|join|length }}", "{{ grounds|map(attribute='account')|list|length }}{{ name|int }}",
    "{% set x %}{{ name }}{% endset %}{{ x|upper }}",
    "{% set x %}{{ name }}{% endset %}{% for c in x %}{{ c }} {% endfor %}",
    "{% filter upper %}{{ name }}{% endfilter %}", "{% set a, b = (name ~ '')[:2] %}{{ a }}", "{{ name is string }}",
    "{% for x in [name] if x == 'Ada 2' %}x{% endfor %}", "{{ name|e|e|urlencode }}", "{{ account_name|trim }}",
    "{{ 'x' if name > 'Ada 2' else 'y' }}",
    "{% for a, b in [('x', 'y'), 'xy', account_name[:2]] %}{{ a }}{% endfor %}",
    '{% import "_base/words.html" as words %}{{ words.greeting(name)|length }}',
    "{{ grounds[0].preference_url|length }}",
    '{% import "_base/words.html" as words %}{% if words.greeting(name) == "Hello Ada 2," %}x{% endif %}',
    "{{ grounds|selectattr('account', 'equalto', 'acme-2')|list|length }}", "{{ 1 if name is eq('Ada 2') else 2 }}",
)  # fmt: skip

_LAYOUT = '{% extends "_base/message.html" %}{% import "_base/parts.html" as parts %}{% set more = "Read on" %}'
IN_BLOCKS = (
    _LAYOUT + "{% block facts %}{{ name|upper }}{% endblock %}",
    _LAYOUT + "{% block heading %}{{ super() }} {{ name|length }}{% endblock %}",
    _LAYOUT + "{% block footer %}{{ super() }}{% if name == 'Ada 3' %}{{ name }}{% endif %}{% endblock %}",
    _LAYOUT + "{% set hello = 'Dear ' %}{% block facts %}{{ hello ~ name|upper }}{{ locale }}{% endblock %}",
    _LAYOUT + "{% block facts %}{{ parts.facts([(name|lower, account_name), ('b', timezone)]) }}{% endblock %}",
    _LAYOUT + "{% block facts %}{% for c in name %}{{ c }}\n\n\n\n{% endfor %}{% endblock %}",
    _LAYOUT + "{% block content %}{% if name|length < 9 %}{{ super() }}{% endif %}{% endblock %}{% block facts %}"
    "{{ grounds[0].account|upper }}{{ data.effective_at|datetime }}{{ subject }}{% endblock %}",
    _LAYOUT + "{% block facts %}<a href='https://x.test/{{ name[:9] }}' title='{{ name }}'>x</a>{% endblock %}",
    "<a hr{% block a %}{{ ('e' ~ name)[:2]|lower }}{% endblock %}=\"javascript:{{ name }}\">x</a>" + "long " * 20,
    "<a title='{{ name }}'>{{ name }}</a><a sr{% block a %}{{ name[:1] }}{% endblock %}='x:{{ name }}'>x</a>",
    "{% for g in grounds %}{{ g.account }}{% endfor %}{% block a %}{{ name|title }}\n\n\n{% endblock %}\n\n\n ",
)  # fmt: skip
NOT_ONLY_IN_BLOCKS = (
    "{% set who = name|upper %}{% block a %}{{ who }}{% endblock %}",
    "{% set who = name %}{% block a %}{{ who|upper }}{% endblock %}",
    "{% block a %}{{ x is defined }}{{ name|upper }}{% endblock %}{% set x = 1 %}",
    "{% set x = 0 %}{% block a %}{{ x }}{{ name|upper }}{% endblock %}{% set x = 1 %}",
    "{% for g in grounds %}{% block a scoped %}{{ g.account|upper }}{% endblock %}{% endfor %}",
    "{% for g in [1, 2] %}{% block a %}{{ name|upper }}{% endblock %}{% endfor %}",
    "{% filter upper %}{% block a %}{{ name|lower }}{% endblock %}{% endfilter %}",
)


@hypothesis_settings(max_examples=120, deadline=None)
@given(
    type_name=st.sampled_from(FAN_OUT),
    source=st.one_of(st.none(), *map(st.sampled_from, (SIMPLE, COMPUTING, IN_BLOCKS, NOT_ONLY_IN_BLOCKS))),
    part=st.sampled_from(["body.txt", "body.html"]),
    shape=st.sampled_from([DIRECT, COPY, BOTH, ESIGN]),
    others=st.lists(st.tuples(NAMES, st.lists(ACCOUNTS, min_size=1, max_size=2)), min_size=1, max_size=5),
    eightbit=st.booleans(),
    links=st.booleans(),
    email=st.sampled_from(["ada@acme.example", "ada@bücher.example", "zoë@acme.example", "a" * 60 + "@x.example"]),
    title=st.sampled_from(["Plain title", "Schöne Grüße", "日本語" * 30, "x" * 190]),
    on_a_sheet=st.sampled_from([0, 1, 3]),
)
def test_a_mail_by_a_rendition_has_the_bytes_of_the_same_mail_in_full(
    type_name, source, part, shape, others, eightbit, links, email, title, on_a_sheet
):
    renderer = SHIPPED if source is None else with_body(source.replace('.html"', f'{part[4:]}"'), part)
    event = an_event("service.notice" if source is not None else type_name)
    if "title" in event.data:
        event = replace(event, data={**event.data, "title": title})
    composer = COMPOSER if links else Composer(SETTINGS, CATALOGUES, None)
    audience = Audience().plain(2, shape=shape)
    for number in range(2):
        audience.add(accounts=(("first", f"First {number}"), ("second", "Second")), shape=shape)
    for name, accounts in others:
        audience.add(name, accounts=accounts, shape=shape, email=email)
    press = a_press(renderer, composer)
    with structlog.testing.capture_logs() as lines:
        made = by_press(press, event, audience, eightbit=eightbit, on_a_sheet=on_a_sheet)
    assert made == in_full(renderer, event, audience, composer=composer, eightbit=eightbit)
    assert lines == []


@pytest.mark.parametrize("type_name", FAN_OUT)
@pytest.mark.parametrize("eightbit", [False, True])
def test_every_shipped_type_is_filled_in(type_name, eightbit):
    event, audience = an_event(type_name), Audience().plain(7)
    audience.add("Zoë Strauß", tried_at=BEGUN - 5_000_000_000)
    audience.add("O'Brien & <Sons>", accounts=(("Globex Ltd.", "Glöbex & Co"),))
    press = a_press()
    made = by_press(press, event, audience, eightbit=eightbit)
    assert made == in_full(SHIPPED, event, audience, eightbit=eightbit)
    assert press.by_rendition >= 5
    assert any(not body.isascii() for body in made) == eightbit
    for due, body in zip(audience.dues, made, strict=True):
        email = SHIPPED.render(COMPOSER.mail_of(event, due, audience.people, now=BEGUN))
        mime.prove(email, body, eightbit=eightbit)


@pytest.mark.parametrize("source", SIMPLE)
def test_a_template_that_only_says_personal_values_is_filled_in(source):
    renderer, event, audience = with_body(source), an_event(), Audience().plain(9)
    audience.add("<Zoë> & 'Co'")
    press = a_press(renderer)
    assert by_press(press, event, audience) == in_full(renderer, event, audience)
    assert press.by_rendition >= 6


@pytest.mark.parametrize("source", COMPUTING)
def test_a_template_that_computes_on_a_personal_value_is_rendered_in_full(source, logged):
    renderer, event, audience = with_body(source), an_event(), Audience().plain(9)
    press = a_press(renderer)
    assert by_press(press, event, audience) == in_full(renderer, event, audience)
    assert press.by_rendition == 0
    assert press.in_full == 9
    assert logged == []


@pytest.mark.parametrize("source", [*IN_BLOCKS, *NOT_ONLY_IN_BLOCKS])
@pytest.mark.parametrize("part", ["body.txt", "body.html"])
def test_a_template_that_computes_in_blocks_is_rendered_by_an_outline_with_the_bytes_of_the_same_mail_in_full(
    source, part, logged
):
    renderer = with_body(source.replace('.html"', f'{part[4:]}"'), part)
    event, audience = an_event(), Audience().plain(12)
    for name in HOSTILE:
        audience.add(name)
        audience.add("Fred", accounts=((f"acme-{len(name)}", name),), place=("de", "Asia/Tokyo"))
    press = a_press(renderer)
    made = by_press(press, event, audience)
    assert made == in_full(renderer, event, audience)
    assert isinstance(made[0], bytes)
    outlined = [kind.outline.outline for kind in press._kinds.values() if kind.outline is not None]
    assert outlined
    gaps = [(outline.text if part == "body.txt" else outline.html).gaps is not None for outline in outlined]
    assert gaps == [source in IN_BLOCKS] * len(outlined)
    assert press.by_rendition == 0
    assert logged == []


@pytest.mark.parametrize("part", ["body.txt", "body.html", "subject.txt"])
def test_a_template_that_computes_outside_of_blocks_sees_what_each_recipient_alone_has(part, logged):
    source = (
        "{{ name|upper }} {{ account_name|lower }} {{ locale }} {{ data.effective_at|datetime }} {{ unsubscribe_url }}"
        "{% for g in grounds %} {{ g.account|upper }} {{ g.account_name }} {{ g.preference_url }} {{ g.roles|join }}"
        "{% endfor %} {{ variant }} {{ subject is defined }} {{ attachment_links|length }} {{ vendor }}"
    )
    mine = {"name": "a.csv", "media_type": "text/csv", "content_base64": "YSxiCg=="}
    linked = {"name": "b.pdf", "media_type": "application/pdf", "url": "https://x.example/b.pdf", "contact": "c5"}
    event = an_event(effective_at="2026-12-21T10:00:00Z", attachments=[mine, linked, mine | {"contact": "c3"}])
    renderer, audience = with_body(source, part), Audience()
    for number in range(60):
        audience.add(
            "" if number % 7 == 0 else f"Ada {number}",
            email=f"ada{number}@acme.example",
            shape=(DIRECT, COPY, BOTH)[number % 3],
            place=(("en", "de")[number // 3 % 2], ("UTC", "Europe/Berlin", "Asia/Tokyo")[number // 6 % 3]),
            accounts=[(f"acme-{number}", f"Acme {number}"), ("Globex Ltd.", "")][: 1 + number // 30],
            tried_at=BEGUN - 86_400_000_000 if number % 5 == 0 else None,
        )
    audience.dues *= 3
    for composer in (COMPOSER, Composer(SETTINGS, CATALOGUES, None)):
        press = a_press(renderer, composer)
        assert by_press(press, event, audience) == in_full(renderer, event, audience, composer=composer)
        assert sum(kind.outline is not None for kind in press._kinds.values()) > (10 if part != "subject.txt" else 0)
    assert logged == []


@pytest.mark.parametrize("part", ["body.txt", "body.html"])
def test_what_is_wrong_with_one_mail_of_an_outline_is_wrong_with_it_alone(part, logged):
    source = (
        "{% set who = name|lower %}{{ who }}{{ 1 // (who|length - 3) }}{% if ':' in who %}<a href='{{ who }}'>x</a>"
        "{% endif %}{% if who == 'much' %}{% for a in data.body %}{{ data.body }}{% endfor %}{% endif %}"
    )
    renderer, event, audience = with_body(source, part), an_event(body="b" * 1_000), Audience().plain(4)
    wrong = ["Ada", "much", *(["javascript:x"] if part == "body.html" else [])]
    for name in (*wrong, BOUNDARY, f"x{BOUNDARY}--", "https://x.example", "Zoë S", *HOSTILE):
        audience.add(name)
    press = a_press(renderer)
    made = by_press(press, event, audience)
    assert made == in_full(renderer, event, audience)
    failed = made[4 : 4 + len(wrong)]
    assert failed == [RenderError] * len(wrong)
    assert all(isinstance(body, bytes) for body in made[4 + len(wrong) : 8 + len(wrong)])
    assert logged == []


@pytest.mark.parametrize("source", ["{{ name|upper }}, {{ data.title }}", "{{ name[:0] }}", "{{ data.title|upper }}"])
def test_a_subject_that_is_computed_is_computed_for_each_mail_beside_an_outline(source):
    renderer, event, audience = with_body(source, "subject.txt"), an_event(), Audience().plain(9)
    press = a_press(renderer)
    assert by_press(press, event, audience) == in_full(renderer, event, audience)


@pytest.mark.parametrize("source", ["{{ name }}, {{ data.title }}", "{{ name|e }}, {{ account_name }}" + "!" * 180])
def test_a_subject_may_hold_the_name(source):
    renderer, event = with_body(source, "subject.txt"), an_event()
    audience = Audience().plain(6)
    for name in HOSTILE:
        audience.add(name, accounts=(("acme", name),))
    for eightbit in (False, True):
        press = a_press(renderer)
        assert by_press(press, event, audience, eightbit=eightbit) == in_full(
            renderer, event, audience, eightbit=eightbit
        )
        assert press.by_rendition >= 10


@pytest.mark.parametrize("eightbit", [False, True])
def test_hostile_names_are_written_as_in_full(eightbit):
    for event in (an_event(), an_event("marketing.message"), an_event(body="Schöne Grüße. " * 90)):
        audience = Audience().plain(3)
        for name in HOSTILE:
            audience.add(name)
            audience.add("Ada", accounts=((f"acme-{len(name)}", name),))
        press = a_press()
        made = by_press(press, event, audience, eightbit=eightbit)
        assert made == in_full(SHIPPED, event, audience, eightbit=eightbit)
        assert press.by_rendition > len(made) // 2
        assert all(body.count(b"\r\n--" + BOUNDARY.encode()) <= 3 for body in made)


@pytest.mark.parametrize("eightbit", [False, True])
def test_values_that_fill_a_line_are_written_as_in_full(eightbit):
    renderer, event = with_body("{{ name }} " + "long " * 170 + "{{ account_name|e }}", "body.txt"), an_event()
    audience = Audience().plain(3)
    for length in range(60, 100):
        audience.add("A" * length, accounts=((f"acme-{length}", "B" * 70),))
        audience.add("ä" * length, accounts=((f"acme-{length}", "B & " * 12 + "C"),))
    press = a_press(renderer)
    made = by_press(press, event, audience, eightbit=eightbit)
    assert made == in_full(renderer, event, audience, eightbit=eightbit)
    assert press.by_rendition >= 75


@pytest.mark.parametrize("eightbit", [False, True])
def test_a_percent_sign_is_one_like_any_other(eightbit):
    renderer = with_body("100 % {{ name }} %b %% %(x)s %{{ account_name }}%")
    event = an_event(title="50 % off: %b %s %%")
    audience = Audience().plain(8)
    audience.add("%b", accounts=(("acme", "5 % & 6 %s"),))
    press = a_press(renderer)
    made = by_press(press, event, audience, eightbit=eightbit)
    assert made == in_full(renderer, event, audience, eightbit=eightbit)
    assert press.by_rendition >= 4


def test_whether_a_mail_is_ascii_is_told_right():
    for event in (an_event(), an_event(body="Schöne Grüße.")):
        audience = Audience().plain(3)
        for name in HOSTILE:
            audience.add(name)
            audience.add("Ada", email="zoë@bücher.example", accounts=(("acme", name),))
        press = a_press()
        for make in envelopes(press, event, audience, eightbit=True):
            made = make()
            assert made.eightbit == (not made.body.isascii())


# ---------------------------------------------------------------- sheets


def a_sheet(press: Press, event: EventRow, audience: Audience) -> Sheet:
    return Sheet(press, event, audience.dues, audience.people, begun=BEGUN, eightbit=True)


def test_plain_mails_of_a_kind_with_a_rendition_are_made_together():
    event, audience, press = an_event(effective_at=None), Audience().plain(20), a_press()
    assert len(a_sheet(press, event, audience)) == 0  # there is no rendition yet
    by_press(press, event, audience, eightbit=True)
    assert len(a_sheet(press, event, audience)) == 20
    audience.plain(10, shape=COPY)
    assert len(a_sheet(press, event, audience)) == 20


@pytest.mark.parametrize(
    "given",
    [
        {"name": ""},
        {"name": " Ada"},
        {"name": "Zoë"},
        {"name": "Ada, Countess"},
        {"name": "Ada " * 30 + "A"},
        {"email": "zoë@acme.example"},
        {"email": "ada@bücher.example"},
        {"accounts": (("Acme", "Acme"),)},
        {"accounts": (("acme.eu", "Acme"),)},
        {"accounts": (("acme", "Acme & Co"),)},
        {"accounts": (("acme", "A " * 80 + "A"),)},
        {"accounts": (("acme", "Acme"), ("globex", "Globex"))},
        {"tried_at": BEGUN - 5_000_000_000},
    ],
)
def test_a_mail_that_needs_care_is_made_alone(given):
    event, audience, press = an_event(effective_at=None), Audience().plain(3), a_press()
    audience.add(**given)
    audience.add(**given)
    audience.plain(3)
    by_press(press, event, audience, eightbit=True)
    assert len(a_sheet(press, event, audience)) == 6
    assert by_press(press, event, audience, eightbit=True, on_a_sheet=8) == in_full(
        SHIPPED, event, audience, eightbit=True
    )


def test_accounts_with_ids_of_all_lengths_have_their_headers_folded_right():
    event, audience, press = an_event(effective_at=None), Audience(), a_press()
    for number in range(120):
        audience.add(accounts=(("a" * (1 + number % 60), f"Acme {number}"),))
    made = by_press(press, event, audience, eightbit=True, on_a_sheet=30)
    assert made == in_full(SHIPPED, event, audience, eightbit=True)
    assert len(a_sheet(press, event, audience)) == 120
    audience.dues.reverse()
    assert by_press(press, event, audience, eightbit=True, on_a_sheet=64) == made[::-1]


def test_a_contact_that_is_gone_spoils_no_other_mail_of_its_sheet():
    event, audience, press = an_event(effective_at=None), Audience().plain(6), a_press()
    by_press(press, event, audience, eightbit=True)
    del audience.people.contacts[2]
    sheet = a_sheet(press, event, audience)
    assert len(sheet) == 5
    with pytest.raises(KeyError):
        sheet.envelope(audience.dues[1])
    assert sheet.envelope(audience.dues[2]).recipient == "ada@acme.example"


def test_a_mail_that_can_not_be_made_spoils_no_other_mail_of_its_sheet():
    event, audience, press = an_event(effective_at=None), Audience().plain(6), a_press()
    whole = by_press(press, event, audience, eightbit=True)
    audience.people.accounts[2] = ("acme-1", "Acme 1", "a catalogue that nobody has any more")
    sheet = a_sheet(press, event, audience)
    with pytest.raises(KeyError):
        sheet.envelope(audience.dues[1])
    assert [sheet.envelope(due).body for due in audience.dues[2:]] == whole[2:]


def test_mails_of_an_event_with_attachments_and_of_one_account_are_made_alone():
    mine = {"name": "a.csv", "media_type": "text/csv", "content_base64": "YSxiCg=="}
    for event in (an_event("statement.issued", attachments=[mine]), replace(an_event(), scope="one")):
        audience, press = Audience().plain(6), a_press()
        by_press(press, event, audience, eightbit=True)
        assert len(a_sheet(press, event, audience)) == 0


# ---------------------------------------------------------------- kinds of mails


def test_mails_of_different_kinds_share_no_rendition():
    event = an_event(effective_at="2026-12-21T10:00:00Z")
    audience = Audience()
    for number in range(40):
        audience.add(
            "" if number % 7 == 0 else f"Ada {number}",
            shape=(DIRECT, COPY, BOTH)[number % 3],
            place=(("en", "de")[number // 3 % 2], ("UTC", "Europe/Berlin", "Asia/Tokyo")[number // 6 % 3]),
            accounts=[("acme", "Acme"), ("globex", "Globex")][: 1 + number // 20],
        )
    audience.dues *= 4
    press = a_press()
    assert by_press(press, event, audience) == in_full(SHIPPED, event, audience)
    assert press.by_rendition > 40


def test_recipients_of_all_time_zones_share_a_rendition_that_tells_no_time():
    event, audience = an_event(effective_at=None), Audience()
    for number in range(20):
        audience.add(f"Ada {number}", place=("en", f"Etc/GMT+{number}"))
    press = a_press()
    assert by_press(press, event, audience) == in_full(SHIPPED, event, audience)
    assert press.by_rendition >= 16


def test_an_attachment_is_in_the_mails_of_those_who_may_see_it():
    mine = {"name": "a.csv", "media_type": "text/csv", "content_base64": "YSxiCg=="}
    event = an_event("statement.issued", attachments=[mine | {"contact": "c3"}, mine | {"name": "b.csv"}])
    audience = Audience().plain(8)
    press = a_press()
    made = by_press(press, event, audience)
    assert made == in_full(SHIPPED, event, audience)
    assert [number for number, body in enumerate(made, 1) if b"a.csv" in body] == [3]
    assert press.by_rendition >= 5


def test_a_mail_to_one_account_and_a_request_are_rendered_in_full():
    for event in (replace(an_event(), scope="one"), an_event("action.requested", attachments=None)):
        audience = Audience().plain(5, shape=DIRECT)
        press = a_press()
        assert by_press(press, event, audience) == in_full(SHIPPED, event, audience)
        assert (press.by_rendition, press.in_full) == (0, 5)


def test_so_many_kinds_that_they_are_forgotten_are_still_right():
    event, audience = an_event(effective_at="2026-12-21T10:00:00Z"), Audience()
    for number in range(300):
        audience.add(f"Ada {number}", place=("en", f"Zone/{number}"))
    audience.dues *= 2
    press = a_press()
    assert by_press(press, event, audience) == in_full(SHIPPED, event, audience)
    assert len(press._kinds) <= 256


def test_it_is_told_once_which_templates_an_events_variants_were_rendered_with():
    event = an_event()
    audience = Audience().plain(5)
    audience.plain(5, shape=COPY)
    audience.plain(5, place=("de", "UTC"))
    press = a_press()
    by_press(press, event, audience)
    told = press.told()
    assert [(one.event_id, one.variant, one.locale) for one in told] == [
        (7, "direct", "en"), (7, "copy", "en"), (7, "direct", "de"),
    ]  # fmt: skip
    assert {one.template_hash for one in told} == {SHIPPED.version(event.type)}
    assert press.told() == []


def test_an_envelope_says_what_the_relay_must_know():
    audience = Audience().plain(4)
    audience.add("Zoë", email="zoë@bücher.example")
    press, event = a_press(), an_event()
    made = [make() for make in envelopes(press, event, audience, eightbit=True)]
    assert [(one.smtputf8, one.eightbit) for one in made] == [(False, False)] * 4 + [(True, True)]
    assert made[3].recipient == "ada@acme.example"
    assert made[4].recipient == "zoë@xn--bcher-kva.example"
    assert re.fullmatch(r"b\+[0-9a-f]{24,40}@bounces\.vendor\.example", made[3].sender)
    assert len({one.sender for one in made}) == 5
    assert not press.envelope(event, audience.dues[4], audience.people, begun=BEGUN, eightbit=False).eightbit


# ---------------------------------------------------------------- the check


def test_a_rendition_that_is_wrong_is_found_and_the_right_mail_goes_out(logged):
    renderer = with_body("{{ name }} {{ data.title|role_title }} sabotaged")
    said = []
    for environment in (renderer._environment, renderer._tracing):
        environment.filters["role_title"] = lambda title: f"{title} {len(said)}"
    event, audience = an_event(effective_at=None), Audience().plain(30)
    press = a_press(renderer)
    before = by_press(press, event, audience)[:9]
    assert logged == []
    assert press.by_rendition == 27  # all but the first, the one that the rendition was made from, and the 10th
    said.append("from now on the filter says something else, and the rendition is stale")
    audience.dues = audience.dues[:9] * 9
    after = by_press(press, event, audience)
    [line] = logged
    assert (line["event"], line["log_level"], line["event_id"]) == ("rendition.differs", "error", ULID)
    found = next(at for at, body in enumerate(after) if body != before[at % 9])
    assert found == 100 - 30 - 1  # the 100th of its kind
    assert after[found:] == in_full(renderer, event, audience)[found:]


def test_an_outline_that_is_wrong_is_found_and_the_right_mail_goes_out(logged):
    renderer = with_body("{{ data.title|role_title }} sabotaged {% block a %}{{ name|upper }}{% endblock %}")
    said = []
    for environment in (renderer._environment, renderer._tracing):
        environment.filters["role_title"] = lambda title: f"{title} {len(said)}"
    event, audience = an_event(effective_at=None), Audience().plain(9)
    press = a_press(renderer)
    by_press(press, event, audience)
    said.append("from now on the filter says something else, and the outline is stale")
    audience.dues = audience.dues[:4]
    assert by_press(press, event, audience) == in_full(renderer, event, audience)  # the first was the 10th of its kind
    assert [(line["event"], line["log_level"]) for line in logged] == [("rendition.differs", "error")]
    assert not any(kind.outline for kind in press._kinds.values())


def test_a_rendition_that_is_wrong_at_once_fills_no_mail(logged):
    renderer = with_body("{{ name }} {{ data.title|role_title }} never the same")
    count = iter(range(1000))
    renderer._environment.filters["role_title"] = lambda title: f"{title} {next(count)}"
    renderer._tracing.filters["role_title"] = lambda title: f"{title} traced"
    press = a_press(renderer)
    by_press(press, an_event(), Audience().plain(9))
    assert [line["event"] for line in logged] == ["rendition.differs"]
    assert press.by_rendition == 0
