"""Several mails in flight on one connection, against a scripted server: each answer is accounted for, in each way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.smtpd import (
    BODY,
    BULK,
    CHUNKED,
    WAYS,
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
    mails,
    numbers,
    raw,
    reply,
    reset,
    send,
    sender_of,
    stall,
)
from worker import relay as relay_module
from worker import transaction
from worker.relay import Envelope, Relay, RelayError, RelayMisconfigured, RelayUnavailable
from worker.replies import Kind, Outcome

A, T, P, U, N = Kind.ACCEPTED, Kind.TEMPORARY, Kind.PERMANENT, Kind.UNKNOWN, Kind.NOT_SENT

HANG, CRAWL, UNENDED = hang(), drip(0.1), raw(b"250")
PATIENCE = 0.25
STYLES: dict[str, dict[str, Any]] = {"at_once": {}, "gathered": {"gathers": True}, "torn": {"pieces": 3}}
"""How a relay writes its answers."""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the clock is patched: the end of our patience comes in a quarter of a second."""
    for name in ("COMMAND_SECONDS", "BODY_SECONDS", "DOT_SECONDS"):
        monkeypatch.setattr(transaction, name, PATIENCE)


@pytest.fixture(autouse=True)
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay is known to be quick, so that the window is wide from the first mail on."""
    if "narrow" not in request.fixturenames:
        monkeypatch.setattr(transaction, "NARROW", transaction.WINDOW)


@pytest.fixture
def narrow() -> None:
    """Nothing is known of the relay."""


def kinds(outcomes: list[Outcome]) -> list[Kind]:
    return [outcome.kind for outcome in outcomes]


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("way", WAYS)
def test_many_mails_arrive_each_once_and_in_order(way: str, style: str) -> None:
    with SmtpServer(extensions=WAYS[way], **STYLES[style]) as server:
        outcomes = send(server.relay(), *mails(60))
        assert [(outcome.kind, outcome.text) for outcome in outcomes] == [(A, "2.0.0 taken")] * 60
        assert numbers(server) == [*range(60)]
        assert server.connections == 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("code", [450, 550])
@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "dot"])
@pytest.mark.parametrize("way", WAYS)
def test_a_mail_refused_in_the_middle_leaves_the_others_their_own_sender(
    way: str, stage: str, code: int, style: str
) -> None:
    with SmtpServer(extensions=WAYS[way], **STYLES[style]) as server:
        for number in (1, 2, 5):
            where = sender_of(number) if stage == "mail" else f"r{number}@acme.example"
            server.on(stage, reply(code), recipient=where)
        outcomes = send(server.relay(), *mails(8))
        never_said = stage == "data" and way == "chunked"
        refused = A if never_said else T if code == 450 else P
        assert kinds(outcomes) == [refused if n in {1, 2, 5} else A for n in range(8)]
        assert numbers(server) == [n for n in range(8) if outcomes[n].kind is A]
        assert server.connections == 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("way", WAYS)
def test_mails_that_are_accepted_at_once_are_told_of_at_once(way: str, style: str) -> None:
    told: list[tuple[int, str]] = []
    together: list[int] = []

    def done(number: int, outcome: Outcome) -> None:
        told.append((number, outcome.reply))

    def took(numbers: Sequence[int], replies: Sequence[str]) -> None:
        together.append(len(numbers))
        told.extend(zip(numbers, replies, strict=True))

    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        await relay.send(mails(20), lane=BULK, done=done, took=took)
        await relay.close()

    with SmtpServer(extensions=WAYS[way], **STYLES[style]) as server:
        server.on("rcpt", reply(550), recipient="r9@acme.example")
        asyncio.run(fly())
        assert [number for number, _ in told] == [*range(20)]
        assert [said == "250 2.0.0 taken" for _, said in told] == [number != 9 for number in range(20)]
        assert numbers(server) == [number for number in range(20) if number != 9]
        assert (way, style) != ("chunked", "gathered") or max(together) > 1


def test_a_relay_that_takes_mails_whole_gets_them_without_being_waited_for() -> None:
    with SmtpServer(extensions=CHUNKED) as server:
        server.on("mail", delay(0.1), nth=1)
        assert kinds(send(server.relay(), *mails(5))) == [A] * 5
        assert server.verbs()[1:9] == ["MAIL", "RCPT", "BDAT", "RSET", "MAIL", "RCPT", "BDAT", "RSET"]
        assert "DATA" not in server.verbs()


WRITTEN_WHOLE: list[tuple[str, Act, Kind, int]] = [
    ("mail", raw(b"what?\r\n"), U, 0),
    ("mail", raw(b"299 yes\r\n"), A, 250),
    ("rcpt", reply(251), A, 250),
    ("rcpt", drip(0.005), A, 250),
    ("rcpt", raw(b"250 ok\r\n354 go on\r\n250 2.0.0 taken\r\n"), U, 354),
    ("dot", reply(299), A, 299),
    ("dot", raw(b"250-2.0.0\r\n250 taken\r\n"), A, 250),
    ("dot", raw(b"250 2.0.0 taken\n"), A, 250),
    ("dot", CRAWL, U, 0),
    ("dot", raw(b"150 hm\r\n"), U, 0),
    ("dot", raw(b"250 o\rk\r\n"), U, 0),
    ("dot", UNENDED, U, 0),
    ("dot", raw(b"x" * 40_000), U, 0),
    ("dot", lose_the_reply(), U, 0),
]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("stage", "act", "kind", "code"),
    WRITTEN_WHOLE,
    ids=[f"{number}-{row[0]}-{row[2]}" for number, row in enumerate(WRITTEN_WHOLE)],
)
def test_what_went_wrong_leaves_a_mail_unknown_that_was_written_whole(
    stage: str, act: Act, kind: Kind, code: int
) -> None:
    with SmtpServer(extensions=CHUNKED) as server:
        server.on(stage, act, nth=1)
        [outcome] = send(server.relay(), mail())
    assert (outcome.kind, outcome.code, outcome.stage) == (kind, code, "dot")


def test_the_words_of_a_relay_are_kept_printable_and_short() -> None:
    with SmtpServer(extensions=CHUNKED) as server:
        server.on("dot", raw(b"250 2.0.0 t\xe4ken \x1b[31m" + b"x" * 2000 + b"\r\n"))
        [outcome] = send(server.relay(), mail())
    assert outcome.text.startswith("2.0.0 t\\xe4ken ?[31mxxx")
    assert len(outcome.text) == 500


def test_a_relay_that_takes_a_mail_of_which_it_refused_the_recipient_is_left() -> None:
    with SmtpServer(extensions=CHUNKED, takes_data_anyway=True) as server:
        server.on("rcpt", reply(550), nth=1)
        assert kinds(send(server.relay(), *mails(1))) == [P]
        assert server.accepted == []


def test_a_mail_that_was_taken_though_its_sender_was_refused_is_unknown() -> None:
    def take_anyway(talk: Any, _code: int, _text: str) -> int:
        talk.mail = ("somebody@else.example", "")
        return int(talk.say(550, "no"))

    with SmtpServer(extensions=CHUNKED) as server:
        server.on("mail", take_anyway, nth=1)
        assert kinds(send(server.relay(), mail())) == [U]


@pytest.mark.parametrize("answer", [502, 421, 354])
def test_a_session_that_is_not_reset_ends(answer: int) -> None:
    """A mail behind a refused one could go out under its sender: what was written whole is unknown."""
    with SmtpServer(extensions=CHUNKED) as server:
        server.on("rset", reply(answer), nth=1)
        server.on("rcpt", reply(550), nth=1)
        assert kinds(send(server.relay(), *mails(3))) == [P, U, U]


# ---------------------------------------------------------------- lost connections


@pytest.mark.parametrize("end", [close(), last_words(421), lose_the_reply(rudely=False)], ids=["close", "bye", "taken"])
@pytest.mark.parametrize("answered", [0, 1, 5])
@pytest.mark.parametrize("way", WAYS)
def test_a_connection_that_drops_after_some_answers_leaves_exactly_the_written_ones_open(
    way: str, answered: int, end: Act
) -> None:
    with SmtpServer(extensions=WAYS[way]) as server:
        server.on("dot", end, nth=answered + 1)
        became = kinds(send(server.relay(), *mails(6)))
        assert became[:answered] == [A] * answered
        assert became[answered] in {T, U}
        assert became[answered + 1 :] == [U if way == "chunked" else A] * (5 - answered)
        assert [n for n in numbers(server) if became[n] is not U] == [n for n in range(6) if became[n] is A]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("end", [close(), reset(), last_words(421), HANG], ids=["close", "reset", "bye", "hang"])
@pytest.mark.parametrize("stage", ["mail", "rcpt", "dot"])
@pytest.mark.parametrize("way", WAYS)
def test_mails_that_were_not_written_go_on_the_next_connection(way: str, stage: str, end: Act) -> None:
    with SmtpServer(extensions=WAYS[way]) as server:
        server.on(stage, end, nth=20)
        became = kinds(send(server.relay(), *mails(60)))
        assert became.count(U) <= (transaction.WINDOW if way == "chunked" else 1)
        assert {n for n, kind in enumerate(became) if kind is A} <= set(numbers(server))
        assert len(numbers(server)) == len(set(numbers(server)))
        assert set(became[40:]) == {A}
        assert server.connections == 2


def test_a_relay_that_says_421_and_goes_on_answers_for_every_mail() -> None:
    """As Exim does at its limit of mails on a connection: each further MAIL is refused, the connection stays."""
    with SmtpServer(extensions=CHUNKED) as server:
        for number in range(5, 9):
            server.on("mail", reply(421, "too many messages in this connection"), nth=number)
        assert kinds(send(server.relay(), *mails(8))) == [A] * 8
        assert numbers(server) == [*range(8)]
        assert server.connections == 2


@pytest.mark.parametrize("stage", ["rcpt", "dot"])
def test_mails_behind_one_that_ended_the_session_are_heard_out(stage: str) -> None:
    with SmtpServer(extensions=CHUNKED) as server:
        server.on(stage, reply(450, "4.7.1 too much mail"), nth=2)
        assert kinds(send(server.relay(), *mails(40))) == [T if n == 1 else A for n in range(40)]
        assert numbers(server) == [n for n in range(40) if n != 1]
        assert server.connections == 2


@pytest.mark.parametrize("way", WAYS)
def test_one_lost_session_is_one_strike(way: str) -> None:
    """However many mails were in flight: the relay is not left alone for it."""
    with SmtpServer(extensions=WAYS[way]) as server:
        server.on("dot", reset(), nth=1)
        assert set(kinds(send(server.relay(), *mails(40)))[20:]) == {A}


@pytest.mark.parametrize("rested", [True, False])
def test_a_rested_connection_answers_for_one_mail_before_several_are_written(
    rested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction, "PROVE_SECONDS", -1.0 if rested else 60.0)

    async def fly() -> list[Outcome]:
        relay = Relay(server.relay(), host_name="rolecast.test")
        await hand_over(relay, mail())
        server.drop_all()
        outcomes = await hand_over(relay, *mails(3))
        await relay.close()
        return outcomes

    with SmtpServer(extensions=CHUNKED) as server:
        assert kinds(asyncio.run(fly())) == [A if rested else U] * 3


# ---------------------------------------------------------------- how many


def lost_with_the_session(*, each: float) -> int:
    """Mails that a session leaves unknown which ends with the 40th, at a relay that takes `each` seconds for a mail."""
    with SmtpServer(extensions=CHUNKED) as server:
        for number in range(1, 40):
            server.on("dot", delay(each), nth=number)
        server.on("dot", lose_the_reply(), nth=40)
        return kinds(send(server.relay(), *mails(60))).count(U)


@pytest.mark.usefixtures("narrow")
def test_few_mails_are_written_ahead_to_a_relay_that_takes_long_for_each() -> None:
    assert 1 <= lost_with_the_session(each=0.04) <= transaction.NARROW


@pytest.mark.usefixtures("narrow")
def test_many_mails_are_written_ahead_to_a_quick_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transaction, "QUICK_SECONDS", 1.0)  # a busy machine may take a millisecond for a mail
    assert lost_with_the_session(each=0.0) > transaction.WINDOW // 2


# ---------------------------------------------------------------- what goes alone


@pytest.mark.parametrize("way", WAYS)
def test_a_mail_that_is_marked_or_large_has_the_connection_for_itself(way: str) -> None:
    seen: list[int] = []

    async def mark() -> bool:
        seen.append(len(server.accepted))
        return True

    large = b"Subject: large\r\n\r\n" + b".line\r\n" * 20_000
    with SmtpServer(extensions=WAYS[way]) as server:
        marked = mail("marked@acme.example", before_dot=mark)
        order = [*mails(3), marked, marked, *mails(2), mail("large@acme.example", large), *mails(3)]
        assert kinds(send(server.relay(), *order)) == [A] * 11
        assert [one.recipient for one in server.accepted] == [one.recipient for one in order]
        assert seen == [3, 4]
        assert server.accepted[7].body == large
        assert server.connections == 1


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data"])
@pytest.mark.parametrize("way", WAYS)
def test_a_refused_mail_that_goes_alone_is_reset_before_the_next(way: str, stage: str) -> None:
    async def mark() -> bool:
        return True

    with SmtpServer(extensions=WAYS[way]) as server:
        server.on(stage, reply(550), nth=1)
        first, *others = mails(5)
        first.before_dot = mark
        assert kinds(send(server.relay(), first, *others)) == [P, A, A, A, A]
        assert numbers(server) == [1, 2, 3, 4]
        assert server.connections == 1


# ---------------------------------------------------------------- what is written


def test_a_body_goes_as_it_is_where_its_length_is_said() -> None:
    body = b"Subject: dots\r\n\r\n.\r\n..\r\n.x\r\nno end"
    with SmtpServer(extensions=CHUNKED) as server:
        assert kinds(send(server.relay(), mail(body=body), mail())) == [A, A]
        assert [one.body for one in server.accepted] == [body + b"\r\n", BODY]


@pytest.mark.parametrize("way", WAYS)
def test_a_body_of_eight_bits_says_so(way: str) -> None:
    with SmtpServer(extensions=WAYS[way]) as server:
        [outcome] = send(server.relay(), mail(body="Subject: x\r\n\r\ngrün\r\n".encode(), eightbit=True))
        assert outcome.kind is A
        assert server.accepted[0].options.endswith(" BODY=8BITMIME")


@pytest.mark.parametrize("way", WAYS)
def test_a_body_of_eight_bits_is_made_again_for_a_relay_that_does_not_take_them(way: str) -> None:
    with SmtpServer(extensions=[name for name in WAYS[way] if name != "8BITMIME"]) as server:
        outcomes = send(server.relay(), *mails(2), mail(eightbit=True), mail(eightbit=True), mail())
        assert outcomes[2] is outcomes[3] is transaction.NEEDS_8BITMIME
        assert kinds(outcomes) == [A, A, N, N, A]
        assert server.connections == 1


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("way", ["pipelined", "chunked"])
def test_a_relay_that_does_not_read_is_not_written_to_without_end(way: str) -> None:
    taken = 0

    def envelopes() -> Iterator[Envelope]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield mail(f"r{number}@acme.example", b"x" * 70 + b"\r\n" + b"line\r\n" * 10_000)

    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        with suppress(RelayError):
            await relay.send(envelopes(), lane=BULK, done=lambda *_: None)
        await relay.close()

    with SmtpServer(extensions=WAYS[way]) as server:
        server.on("body", stall())
        asyncio.run(fly())
    assert taken <= relay_module.STRIKES * transaction.WINDOW + 1  # the next one waits for the next connection


# ---------------------------------------------------------------- who makes the mails, and how many


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["made", "told"])
def test_a_fault_of_who_makes_the_mails_or_is_told_of_them_ends_the_flight(way: str, where: str) -> None:
    def envelopes() -> Iterator[Envelope]:
        yield from mails(4)
        if where == "made":
            raise RuntimeError("a template")

    def done(number: int, _outcome: Outcome) -> None:
        if where == "told" and number == 2:
            raise RuntimeError("a template")

    async def fly() -> list[Outcome]:
        relay = Relay(server.relay(), host_name="rolecast.test")
        with pytest.raises(RuntimeError, match="a template"):
            await relay.send(envelopes(), lane=BULK, done=done)
        outcomes = await hand_over(relay, *mails(1))
        await relay.close()
        return outcomes

    with SmtpServer(extensions=WAYS[way]) as server:
        assert kinds(asyncio.run(fly())) == [A]
        assert where == "told" or (numbers(server)[:4], server.connections) == ([0, 1, 2, 3], 1)


class Turnstile:
    """A gate of a few places, each taken by a mail from when it is made until a little after its outcome."""

    def __init__(self, places: int) -> None:
        self.free = places
        self._freed = asyncio.Event()

    def take(self, wanted: int) -> int:
        return min(wanted, self.free)

    def enter(self) -> None:
        self.free -= 1
        assert self.free >= 0

    def leave(self) -> None:
        self.free += 1
        self._freed.set()

    async def room(self) -> None:
        while not self.free:
            self._freed.clear()
            await self._freed.wait()


@pytest.mark.parametrize("places", [1, 3, 50])
@pytest.mark.parametrize("way", WAYS)
def test_no_more_mails_are_begun_than_the_gate_grants(way: str, places: int) -> None:
    async def fly() -> None:
        gate = Turnstile(places)
        loop = asyncio.get_running_loop()
        relay = Relay(server.relay(), host_name="rolecast.test")

        def envelopes() -> Iterator[Envelope]:
            for one in mails(50):
                gate.enter()
                yield one

        def done(_number: int, _outcome: Outcome) -> None:
            loop.call_later(0.001, gate.leave)

        await relay.send(envelopes(), lane=BULK, done=done, gate=gate)
        await asyncio.sleep(0.02)
        assert gate.free == places
        await relay.close()

    with SmtpServer(extensions=WAYS[way]) as server:
        asyncio.run(fly())
        assert numbers(server) == [*range(50)]


def test_what_a_relay_offers_is_known_before_the_first_mail_is_made() -> None:
    offered: list[frozenset[str]] = []

    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        assert relay.offers == frozenset()

        def envelopes() -> Iterator[Envelope]:
            offered.append(relay.offers)
            yield mail()

        await relay.send(envelopes(), lane=BULK, done=lambda *_: None)
        await relay.close()

    with SmtpServer(extensions=CHUNKED) as server:
        asyncio.run(fly())
    assert {"chunking", "pipelining", "8bitmime", "smtputf8", "size"} <= offered[0]


# ---------------------------------------------------------------- whatever a relay answers

SAID: dict[str, Act] = {
    "4yz": reply(450, "4.2.1 later"),
    "5yz": reply(550, "5.1.1 no"),
    "enough": reply(450, "4.7.1 too much mail"),
    "421": reply(421, "4.3.2 enough"),
    "530": reply(530, "5.7.0 sign in"),
    "close": close(),
    "reset": reset(),
    "goodbye": last_words(421),
    "garbage": raw(b"?\r\n"),
    "lost": lose_the_reply(),
}
SCRIPTS = st.lists(
    st.one_of(st.none(), st.tuples(st.sampled_from(["mail", "rcpt", "data", "dot"]), st.sampled_from(sorted(SAID)))),
    min_size=1,
    max_size=40,
)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("way", WAYS)
@hypothesis_settings(max_examples=25, deadline=None)
@given(script=SCRIPTS)
def test_whatever_a_relay_answers_each_mail_is_accounted_for(
    way: str, style: str, script: list[tuple[str, str] | None]
) -> None:
    """None is lost, none counts as accepted that was refused, none goes twice, each goes under its own sender."""
    outcomes: dict[int, Outcome] = {}

    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        left = [*range(len(script))]
        made = mails(len(script))
        while left:

            def done(number: int, outcome: Outcome, left: tuple[int, ...] = tuple(left)) -> None:
                assert left[number] not in outcomes
                outcomes[left[number]] = outcome

            try:
                await relay.send([made[n] for n in left], lane=BULK, done=done)
                assert set(outcomes) == set(range(len(script)))
            except RelayMisconfigured:
                server.forget(SAID["530"])  # a person corrected it
            except RelayUnavailable:
                pass
            relay._breaker.close()  # time passes
            left = [n for n in left if n not in outcomes]
        await relay.close()

    with SmtpServer(extensions=WAYS[way], **STYLES[style]) as server:
        for number, what in enumerate(script):
            if what is not None:
                stage, said = what
                where = sender_of(number) if stage == "mail" else f"r{number}@acme.example"
                server.on("dot" if said == "lost" else stage, SAID[said], recipient=where)
        asyncio.run(fly())
        taken = numbers(server)
    for number, outcome in outcomes.items():
        assert taken.count(number) == 1 if outcome.kind is A else taken.count(number) <= (outcome.kind is U)
