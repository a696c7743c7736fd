"""The transaction, against a scripted server: what a mail may be, and what each stage's fault means (R14)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.shared import shared
from tests.smtpd import (
    BODY,
    EXTENSIONS,
    LOCKSTEP,
    Act,
    SmtpServer,
    close,
    delay,
    drip,
    hand_over,
    hang,
    last_words,
    lose_the_reply,
    mail,
    raw,
    reply,
    reset,
    send,
    stall,
)
from worker import relay as relay_module
from worker import transaction
from worker.relay import Relay
from worker.replies import About, Kind, Outcome
from worker.transaction import stuffed

A, T, P, U, N = Kind.ACCEPTED, Kind.TEMPORARY, Kind.PERMANENT, Kind.UNKNOWN, Kind.NOT_SENT
RELAY, SENDER, RECIPIENT, CONTENT = About.RELAY, About.SENDER, About.RECIPIENT, About.CONTENT

HANG, STALL, CRAWL, UNENDED = hang(), stall(), drip(0.1), raw(b"250")
PATIENCE = 0.25


@pytest.fixture(autouse=True)
def short_times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the clock is patched: where a test waits for the end of our patience, it comes in a quarter of a second."""
    act = getattr(request.node, "callspec", None) and request.node.callspec.params.get("act")
    seconds = PATIENCE if act in {HANG, STALL, CRAWL, UNENDED} else 10.0
    monkeypatch.setattr(relay_module, "CONNECT_SECONDS", seconds)
    for name in ("COMMAND_SECONDS", "BODY_SECONDS", "DOT_SECONDS"):
        monkeypatch.setattr(transaction, name, seconds)


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as running:
        yield running


# ---------------------------------------------------------------- stage by stage (reliability.md 1.6)

STAGES: list[tuple[str, Act, Kind, About, int, str]] = [
    # what the table of codes and losses (test_smtp_table) leaves out
    ("mail", raw(b"what?\r\n"), T, RELAY, 0, "mail"),
    ("mail", raw(b"299 yes\r\n"), A, CONTENT, 250, "dot"),
    ("rcpt", reply(251), A, CONTENT, 250, "dot"),  # "not here, will forward" is a yes
    ("rcpt", drip(0.005), A, CONTENT, 250, "dot"),
    ("rcpt", raw(b"\xff\xfe\r\n"), T, RELAY, 0, "rcpt"),
    # answers ahead of time could belong to any command
    ("rcpt", raw(b"250 ok\r\n354 go on\r\n250 2.0.0 taken\r\n"), T, RELAY, 0, ""),
    ("data", reply(250), T, RELAY, 250, "data"),  # a yes that is no 354: not to be trusted
    ("data", raw(b"354\x00\r\n"), T, RELAY, 0, "data"),
    ("data", raw(b"354 go on\r\n250 2.0.0 taken\r\n"), T, RELAY, 0, ""),  # taken before it was said
    ("dot", reply(299), A, CONTENT, 299, "dot"),
    ("dot", delay(0.05), A, CONTENT, 250, "dot"),
    ("dot", drip(0.005), A, CONTENT, 250, "dot"),
    ("dot", last_words(250), A, CONTENT, 250, "dot"),
    ("dot", raw(b"250 2.0.0 taken\n"), A, CONTENT, 250, "dot"),  # a bare LF ends lines of many relays
    ("dot", CRAWL, U, RELAY, 0, "dot"),
    ("dot", raw(b"OK, thanks\r\n"), U, RELAY, 0, "dot"),
    ("dot", raw(b"150 hm\r\n"), U, RELAY, 0, "dot"),
    ("dot", raw(b"650 hm\r\n"), U, RELAY, 0, "dot"),
    ("dot", raw(b"25 hm\r\n"), U, RELAY, 0, "dot"),
    ("dot", raw(b"2500 hm\r\n"), U, RELAY, 0, "dot"),
    ("dot", raw(b"\r\n250 ok\r\n"), U, RELAY, 0, "dot"),
    ("dot", raw(b"250 o\rk\r\n"), U, RELAY, 0, "dot"),
    ("dot", UNENDED, U, RELAY, 0, "dot"),  # no line end: it may be the beginning of anything
    ("dot", raw(b"x" * 40_000), U, RELAY, 0, "dot"),  # longer than any answer
    ("dot", lose_the_reply(), U, RELAY, 0, "dot"),
]


@pytest.mark.parametrize("extensions", [LOCKSTEP, EXTENSIONS], ids=["lockstep", "pipelined"])
@pytest.mark.parametrize(
    ("stage", "act", "kind", "about", "code", "said_at"),
    STAGES,
    ids=[f"{number}-{row[0]}-{row[2]}" for number, row in enumerate(STAGES)],
)
def test_what_went_wrong_means_what_its_stage_says(
    stage: str, act: Act, kind: Kind, about: About, code: int, said_at: str, extensions: Sequence[str]
) -> None:
    with SmtpServer(extensions=extensions) as server:
        server.on(stage, act, nth=1)
        [outcome] = send(server.relay(), mail())
    assert (outcome.kind, outcome.code) == (kind, code)
    assert outcome.about is about
    assert outcome.stage == said_at or not said_at  # when an answer ahead of time is noticed is a matter of chance


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "dot"])
@pytest.mark.parametrize("act", [reply(450), reply(550), reply(421), close(), reset(), HANG, raw(b"?\r\n")])
def test_the_mails_behind_one_that_failed_go_out_all_the_same(server: SmtpServer, stage: str, act: Act) -> None:
    where = {"nth": 2} if stage == "mail" else {"recipient": "b@acme.example"}
    server.on(stage, act, **where)
    outcomes = send(server.relay(), *(mail(f"{name}@acme.example") for name in "abc"))
    assert (outcomes[0].kind, outcomes[2].kind) == (A, A)
    arrived = [one.recipient for one in server.accepted]
    assert arrived.count("a@acme.example") == arrived.count("c@acme.example") == 1
    assert arrived.count("b@acme.example") == (1 if outcomes[1].kind is A else 0)


@pytest.mark.parametrize("code", [450, 550])
@pytest.mark.parametrize("stage", ["mail", "rcpt"])
def test_a_relay_that_waits_for_a_mail_it_refused_gets_none(stage: str, code: int) -> None:
    with SmtpServer(takes_data_anyway=True) as server:
        server.on(stage, reply(code), nth=1)
        outcomes = send(server.relay(), mail("a@acme.example"), mail("b@acme.example"))
        assert [outcome.kind for outcome in outcomes] == [T if code == 450 else P, A]
        assert [one.recipient for one in server.accepted] == ["b@acme.example"]
        assert server.connections == 2


def test_a_relay_without_pipelining_hears_one_command_at_a_time() -> None:
    with SmtpServer(extensions=LOCKSTEP) as server:
        server.on("rcpt", reply(550), nth=1)
        outcomes = send(server.relay(), mail("a@acme.example"), mail("b@acme.example"))
        assert [outcome.kind for outcome in outcomes] == [P, A]
        assert server.verbs()[:7] == ["EHLO", "MAIL", "RCPT", "RSET", "MAIL", "RCPT", "DATA"]


def test_a_definite_refusal_keeps_the_connection_and_resets_it(server: SmtpServer) -> None:
    server.on("rcpt", reply(550, "5.1.1 nobody of that name"), recipient="gone@acme.example")
    outcomes = send(server.relay(), mail("gone@acme.example"), mail())
    assert outcomes[0].reply == "550 5.1.1 nobody of that name (at RCPT TO)"
    assert outcomes[1].kind is A
    assert server.connections == 1
    assert server.verbs()[:8] == ["EHLO", "MAIL", "RCPT", "DATA", "RSET", "MAIL", "RCPT", "DATA"]


@pytest.mark.parametrize("act", [close(), reset(), HANG, reply(502), raw(b"?\r\n")])
def test_a_refusal_stands_whatever_becomes_of_the_reset(server: SmtpServer, act: Act) -> None:
    server.on("rset", act)
    server.on("rcpt", reply(550), nth=1)
    outcomes = send(server.relay(), mail("gone@acme.example"), mail())
    assert [outcome.kind for outcome in outcomes] == [P, A]
    assert server.connections == 2


def test_the_relays_words_are_kept_printable_and_short(server: SmtpServer) -> None:
    server.on("dot", raw(b"250-2.0.0 t\xe4ken \x1b[31m\r\n250 " + b"x" * 2000 + b"\r\n"))
    [outcome] = send(server.relay(), mail())
    assert outcome.kind is A
    assert outcome.text.startswith("2.0.0 t\\xe4ken ?[31m xxx")
    assert len(outcome.text) == 500


@pytest.mark.parametrize("act", [close(), reset(), STALL])
def test_a_connection_lost_in_the_middle_of_a_large_mail_means_not_sent(server: SmtpServer, act: Act) -> None:
    server.on("body", act)
    [outcome] = send(server.relay(), mail(body=b"x" * 70 + b"\r\n" + b"line\r\n" * 1_500_000))
    assert (outcome.kind, outcome.stage) == (N, "body")
    assert server.accepted == []


def test_a_large_mail_arrives_whole(server: SmtpServer) -> None:
    body = b"Subject: large\r\n\r\n" + b".starts with a dot\r\n" * 100_000
    [outcome] = send(server.relay(), mail(body=body))
    assert outcome.kind is A
    assert server.accepted[0].body == body


# ---------------------------------------------------------------- what a mail may be


def test_a_mail_larger_than_the_relay_takes_is_not_even_begun() -> None:
    with SmtpServer(extensions=["SIZE 1000"]) as server:
        outcomes = send(server.relay(), mail(body=b"x" * 998 + b"\r\n" + b"y\r\n"), mail())
    assert (outcomes[0].kind, outcomes[0].about) == (P, CONTENT)
    assert "1003 bytes, the relay takes 1000" in outcomes[0].text
    assert [one.options for one in server.accepted] == [f"SIZE={len(BODY)}"]


@pytest.mark.parametrize("offered", ["SIZE", "SIZE 0", "SIZE lots"])
def test_a_relay_that_names_no_size_takes_every_size(offered: str) -> None:
    with SmtpServer(extensions=[offered]) as server:
        [outcome] = send(server.relay(), mail())
    assert outcome.kind is A


def test_an_address_that_needs_smtputf8_says_so(server: SmtpServer) -> None:
    [outcome] = send(server.relay(), mail("jürgen@acme.example", body="To: jürgen\r\n".encode(), smtputf8=True))
    assert outcome.kind is A
    assert server.accepted[0].recipient == "jürgen@acme.example"
    assert server.accepted[0].options.endswith("BODY=8BITMIME SMTPUTF8")


def test_an_address_that_needs_smtputf8_is_refused_where_the_relay_has_it_not() -> None:
    with SmtpServer(extensions=["8BITMIME"]) as server:
        outcomes = send(server.relay(), mail("jürgen@acme.example", smtputf8=True), mail())
    assert (outcomes[0].kind, outcomes[0].about) == (P, RECIPIENT)
    assert "SMTPUTF8" in outcomes[0].text
    assert [one.recipient for one in server.accepted] == ["ada@acme.example"]


HOSTILE = [
    "a@b.example> SIZE=1",
    "a@b.example\r\nRCPT TO:<x@y.example",
    "a@b.example\nDATA",
    "x <a@b.example>",
    "a@b.example\x00",
    "a@b.example\u2028x",
    "a b@c.example",
]


@pytest.mark.parametrize("address", HOSTILE)
@pytest.mark.parametrize("place", ["sender", "recipient"])
def test_an_address_that_could_end_its_command_never_reaches_the_relay(
    server: SmtpServer, address: str, place: str
) -> None:
    envelope = mail()
    setattr(envelope, place, address)
    outcomes = send(server.relay(), envelope, mail())
    assert (outcomes[0].kind, outcomes[0].about) == (P, SENDER if place == "sender" else RECIPIENT)
    assert [one.recipient for one in server.accepted] == ["ada@acme.example"]
    assert server.verbs().count("RCPT") == 1


def test_no_address_of_the_torture_corpus_breaks_the_conversation(server: SmtpServer) -> None:
    rows = json.loads(shared("corpora", "torture", "addresses-synthetic.json").read_text(encoding="utf-8"))
    texts = [row if isinstance(row, str) else next(iter(row.values())) for row in _rows(rows)]
    texts = [text for text in texts if text.isprintable() and text and "\ud800" not in text]
    assert len(texts) > 20
    outcomes = send(server.relay(), *(mail(text, smtputf8=True) for text in texts), mail("last@acme.example"))
    assert outcomes[-1].kind is A
    assert len(server.accepted) == sum(outcome.kind is A for outcome in outcomes)


def _rows(value: Any) -> Iterator[Any]:
    """Every row of every list, wherever it stands in the document."""
    if isinstance(value, list):
        yield from value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _rows(part)


SMUGGLED = [
    b"\n..\n",
    b"\r\n..\r\n",
    b"\r\n...\r\n",
    b"\r\n.\r\r\n",
    b"\r\r\n.\r\n",
    b"\r\n.\n\r\n",
    b"\r\n.\x00\r\n",
    b"\x00\r\n.\r\n",
    b"\r\x00\n.\r\x00\n",
    b"\r\n .\r\n",
    b"\r\n. \r\n",
    b"\r\n.\t\r\n",
    b"\x0b.\x0b",
    b"\xc2\x85.\xc2\x85",
    b"\xe2\x80\xa8.\xe2\x80\xa8",
    b"\n.\n",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r.\r",
    b"\r\n.\r",
    b"\r.\r\n",
    b"\r\n\x00.\r\n",
    b"\n.\r",
    b"\r.\n",
    b"\r\n.\r\n",
]


@pytest.mark.parametrize("sequence", SMUGGLED)
def test_no_sequence_ends_a_mail_before_its_end(server: SmtpServer, sequence: bytes) -> None:
    second = b"MAIL FROM:<evil@x.example>\r\nRCPT TO:<victim@x.example>\r\nDATA\r\nboo\r\n.\r\n"
    body = b"Subject: one\r\n\r\nhello" + sequence + second
    outcomes = send(server.relay(), mail(body=body), mail())
    if outcomes[0].kind is A:
        assert [one.body for one in server.accepted] == [body, BODY]
    else:  # a bare CR or LF: refused before it is begun
        assert (outcomes[0].kind, outcomes[0].about) == (P, CONTENT)
        assert [one.body for one in server.accepted] == [BODY]


@hypothesis_settings(max_examples=150)
@given(st.lists(st.sampled_from([b"\r\n", b".", b"..", b"\r\n.", b"x", b"\r\n.\r\n", b"", b"\x00", b"\n", b"\r"])))
def test_what_arrives_is_what_was_meant_whatever_its_dots(parts: list[bytes]) -> None:
    body = b"".join(parts)
    wire = stuffed(body)
    assert wire.endswith(b"\r\n.\r\n")
    if body.replace(b"\r\n", b"").count(b"\n") + body.replace(b"\r\n", b"").count(b"\r") == 0:
        assert wire.find(b"\r\n.\r\n") == len(wire) - 5 or wire == b"\r\n.\r\n"
        read_back = (b"\r\n" + wire[:-3]).replace(b"\r\n.", b"\r\n")[2:]
        assert read_back == (body if body.endswith(b"\r\n") else body + b"\r\n")


def test_a_thousand_random_bodies_arrive_one_by_one(server: SmtpServer) -> None:
    pieces = st.lists(
        st.sampled_from([b"\r\n", b".", b"a", b"\r\n.\r\n", b"\r\n..", b"\n", b"\r", b"MAIL FROM:<x@y.example>\r\n"])
    ).map(b"".join)
    bodies: list[bytes] = []

    @hypothesis_settings(max_examples=200, database=None)
    @given(pieces)
    def collect(body: bytes) -> None:
        bodies.append(body)

    collect()
    outcomes = send(server.relay(), *(mail(body=body) for body in bodies))
    good = [body for body, outcome in zip(bodies, outcomes, strict=True) if outcome.kind is A]
    assert [one.body for one in server.accepted] == [one if one.endswith(b"\r\n") else one + b"\r\n" for one in good]
    assert {outcome.kind for outcome in outcomes} <= {A, P}


# ---------------------------------------------------------------- withdrawn before its last bytes


def marker(result: bool | Exception) -> Callable[[], Any]:
    async def mark() -> bool:
        if isinstance(result, Exception):
            raise result
        return result

    return mark


def test_a_mail_is_marked_after_the_relay_said_go_on(server: SmtpServer) -> None:
    seen: list[list[str]] = []

    async def mark() -> bool:
        seen.append(server.verbs())
        return True

    [outcome] = send(server.relay(), mail(before_dot=mark))
    assert outcome.kind is A
    assert seen == [["EHLO", "MAIL", "RCPT", "DATA"]]


def test_a_refused_mail_is_never_marked(server: SmtpServer) -> None:
    server.on("data", reply(451))
    [outcome] = send(server.relay(), mail(before_dot=marker(AssertionError("it was marked"))))
    assert outcome.kind is T


def test_a_mail_withdrawn_before_its_last_bytes_is_not_sent_and_the_next_is(server: SmtpServer) -> None:
    outcomes = send(server.relay(), mail("a@acme.example", before_dot=marker(False)), mail("b@acme.example"))
    assert [outcome.kind for outcome in outcomes] == [N, A]
    assert outcomes[0].stage == "body"
    assert [one.recipient for one in server.accepted] == ["b@acme.example"]


@pytest.mark.parametrize("speaking", [False, True])
def test_a_connection_lost_while_a_mail_is_marked_means_not_sent(server: SmtpServer, speaking: bool) -> None:
    """Nothing of the body was written: the last bytes can't have arrived."""

    async def mark() -> bool:
        server.drop_all(b"421 4.4.2 too slow\r\n" if speaking else b"")
        await asyncio.sleep(0.05)
        return True

    outcomes = send(server.relay(), mail("a@acme.example", before_dot=mark), mail("b@acme.example"))
    assert [outcome.kind for outcome in outcomes] == [T if speaking else N, A]
    assert (outcomes[0].about, outcomes[0].stage) == (RELAY, "body")


def test_withdrawn_mails_say_nothing_against_the_relay(server: SmtpServer) -> None:
    outcomes = send(server.relay(), *[mail(before_dot=marker(False))] * 5, mail())
    assert [outcome.kind for outcome in outcomes] == [N, N, N, N, N, A]


def test_a_mark_that_fails_does_not_leave_a_half_open_transaction_in_the_pool(server: SmtpServer) -> None:
    async def fly() -> list[Outcome]:
        relay = Relay(server.relay(), host_name="rolecast.test")
        with pytest.raises(RuntimeError, match="disk"):
            await hand_over(relay, mail("a@acme.example", before_dot=marker(RuntimeError("disk"))))
        outcomes = await hand_over(relay, mail("b@acme.example"))
        await relay.close()
        return outcomes

    assert [outcome.kind for outcome in asyncio.run(fly())] == [A]
    assert [one.recipient for one in server.accepted] == ["b@acme.example"]


@pytest.mark.parametrize("stage", ["mail", "rcpt", "dot"])
def test_a_transaction_that_was_cancelled_is_not_continued_by_the_next_mail(server: SmtpServer, stage: str) -> None:
    server.on(stage, delay(0.1), nth=1)

    async def fly() -> list[Outcome]:
        relay = Relay(server.relay(), host_name="rolecast.test")
        task = asyncio.create_task(hand_over(relay, mail("a@acme.example")))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        outcomes = await hand_over(relay, mail("b@acme.example"))
        await relay.close()
        return outcomes

    [outcome] = asyncio.run(fly())
    assert outcome.kind is A
    assert server.connections == 2
