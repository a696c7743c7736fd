"""The hand-over to relays, against a scripted server: every stage where something can go wrong, and what it means."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.shared import shared
from tests.smtpd import (
    EXTENSIONS,
    Act,
    SmtpServer,
    close,
    delay,
    drip,
    hang,
    last_words,
    lose_the_reply,
    raw,
    reply,
    reset,
    stall,
)
from worker import relay as relay_module
from worker.relay import (
    About,
    Envelope,
    Kind,
    Outcome,
    Relay,
    RelayMisconfigured,
    Relays,
    RelayUnavailable,
    stuffed,
)
from worker.settings import RelaySettings

BODY = b"Subject: hello\r\n\r\nHello Ada.\r\n"
URGENT, NORMAL, BULK = 0, 1, 2


HANG, STALL, CRAWL, UNENDED = hang(), stall(), drip(0.1), raw(b"250")
PATIENCE = 0.25


@pytest.fixture(autouse=True)
def short_times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the clock is patched: where a test waits for the end of our patience, it comes in a quarter of a second."""
    act = getattr(request.node, "callspec", None) and request.node.callspec.params.get("act")
    seconds = PATIENCE if act in {HANG, STALL, CRAWL, UNENDED} else 10.0
    for name in ("CONNECT_SECONDS", "COMMAND_SECONDS", "BODY_SECONDS", "DOT_SECONDS"):
        monkeypatch.setattr(relay_module, name, seconds)


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as running:
        yield running


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine trusts the authority of the test."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


def certificate(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def mail(recipient: str = "ada@acme.example", body: bytes = BODY, **more: Any) -> Envelope:
    return Envelope(sender="b+1@bounces.example", recipient=recipient, body=body, **more)


async def hand_over(relay: Relay, *envelopes: Envelope, lane: int = BULK) -> list[Outcome]:
    outcomes: list[Outcome] = []

    def done(number: int, outcome: Outcome) -> None:
        assert number == len(outcomes)
        outcomes.append(outcome)

    await relay.send(envelopes, lane=lane, done=done)
    return outcomes


def send(settings: RelaySettings, *envelopes: Envelope) -> list[Outcome]:
    """One flight on a relay of its own."""

    async def fly() -> list[Outcome]:
        relay = Relay(settings, host_name="rolecast.test")
        try:
            return await hand_over(relay, *envelopes)
        finally:
            await relay.close()

    return asyncio.run(fly())


# ---------------------------------------------------------------- stage by stage (reliability.md 1.6)

A, T, P, U, N = Kind.ACCEPTED, Kind.TEMPORARY, Kind.PERMANENT, Kind.UNKNOWN, Kind.NOT_SENT
RELAY, SENDER, RECIPIENT, CONTENT = About.RELAY, About.SENDER, About.RECIPIENT, About.CONTENT

STAGES: list[tuple[str, Act, Kind, About, int, str]] = [
    # at MAIL: what is refused is our sender, a lost connection means that nothing was sent
    ("mail", reply(451), T, SENDER, 451, "mail"),
    ("mail", reply(550), P, SENDER, 550, "mail"),
    ("mail", reply(421), T, RELAY, 421, "mail"),
    ("mail", last_words(421), T, RELAY, 421, "mail"),
    ("mail", close(), N, RELAY, 0, "mail"),
    ("mail", reset(), N, RELAY, 0, "mail"),
    ("mail", HANG, N, RELAY, 0, "mail"),
    ("mail", raw(b"what?\r\n"), N, RELAY, 0, "mail"),
    ("mail", reply(354), T, RELAY, 354, "mail"),  # an answer of no use here: the session can't be trusted any more
    # at RCPT: only here is a refusal about the recipient
    ("rcpt", reply(450), T, RECIPIENT, 450, "rcpt"),
    ("rcpt", reply(452), T, RECIPIENT, 452, "rcpt"),
    ("rcpt", reply(550), P, RECIPIENT, 550, "rcpt"),
    ("rcpt", reply(553), P, RECIPIENT, 553, "rcpt"),
    ("rcpt", reply(251), A, CONTENT, 250, "dot"),  # "not here, will forward" is a yes
    ("rcpt", reply(421), T, RELAY, 421, "rcpt"),
    ("rcpt", close(), N, RELAY, 0, "rcpt"),
    ("rcpt", reset(), N, RELAY, 0, "rcpt"),
    ("rcpt", HANG, N, RELAY, 0, "rcpt"),
    ("rcpt", raw(b"\xff\xfe\r\n"), N, RELAY, 0, "rcpt"),
    # at DATA, before 354
    ("data", reply(451), T, CONTENT, 451, "data"),
    ("data", reply(554), P, CONTENT, 554, "data"),
    ("data", reply(421), T, RELAY, 421, "data"),
    ("data", reply(250), T, RELAY, 250, "data"),  # a yes that is no 354: not to be trusted
    ("data", close(), N, RELAY, 0, "data"),
    ("data", reset(), N, RELAY, 0, "data"),
    ("data", HANG, N, RELAY, 0, "data"),
    ("data", raw(b"354\x00\r\n" * 1), N, RELAY, 0, "data"),
    # after the dot: a definite answer is one, by its first digit; everything else is unknown
    ("dot", reply(250), A, CONTENT, 250, "dot"),
    ("dot", reply(251), A, CONTENT, 251, "dot"),
    ("dot", reply(299), A, CONTENT, 299, "dot"),
    ("dot", delay(0.05), A, CONTENT, 250, "dot"),
    ("dot", drip(0.005), A, CONTENT, 250, "dot"),
    ("dot", last_words(250), A, CONTENT, 250, "dot"),
    ("dot", reply(450), T, CONTENT, 450, "dot"),
    ("dot", reply(452), T, CONTENT, 452, "dot"),
    ("dot", reply(421), T, RELAY, 421, "dot"),
    ("dot", reply(552), P, CONTENT, 552, "dot"),
    ("dot", reply(554), P, CONTENT, 554, "dot"),
    ("dot", reply(354), U, CONTENT, 354, "dot"),
    ("dot", close(), U, RELAY, 0, "dot"),
    ("dot", reset(), U, RELAY, 0, "dot"),
    ("dot", HANG, U, RELAY, 0, "dot"),
    ("dot", CRAWL, U, RELAY, 0, "dot"),
    ("dot", raw(b"OK, thanks\r\n"), U, RELAY, 0, "dot"),
    ("dot", UNENDED, U, RELAY, 0, "dot"),  # no line end: it may be the beginning of anything
    ("dot", raw(b"x" * 40_000), U, RELAY, 0, "dot"),  # longer than any answer
    ("dot", lose_the_reply(), U, RELAY, 0, "dot"),
]


LOCKSTEP = tuple(name for name in EXTENSIONS if name != "PIPELINING")


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
    # A reset takes answers with it that were on their way: with pipelining it may be seen at an earlier command.
    lost_answers = extensions is EXTENSIONS and kind is N and said_at in {"rcpt", "data"}
    assert outcome.stage == said_at or (lost_answers and outcome.stage in {"mail", "rcpt"})
    if kind is not A and kind is not U:
        assert outcome.about is about


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


# ---------------------------------------------------------------- connecting


@pytest.mark.parametrize(
    ("stage", "act", "words"),
    [
        ("connect", reply(421, "too busy"), "421 too busy"),
        ("connect", reply(554, "no service"), "554 no service"),
        ("connect", close(), "can't be used now"),
        ("connect", reset(), "can't be used now"),
        ("connect", HANG, "can't be used now"),
        ("connect", raw(b"SSH-2.0-OpenSSH\r\n"), "can't be used now"),
        ("ehlo", reply(421, "too busy"), "421 too busy"),
        ("ehlo", reply(502, "unknown"), "can't be used now"),
        ("ehlo", close(), "can't be used now"),
        ("ehlo", reset(), "can't be used now"),
        ("ehlo", HANG, "can't be used now"),
        ("ehlo", raw(b"?\r\n"), "can't be used now"),
    ],
)
def test_a_relay_that_can_not_be_talked_to_is_unavailable_and_nothing_was_sent(
    server: SmtpServer, stage: str, act: Act, words: str
) -> None:
    server.on(stage, act)
    with pytest.raises(RelayUnavailable, match=f"the relay 127.0.0.1:{server.port} .*{words}"):
        send(server.relay(), mail())
    assert "MAIL" not in server.verbs()


def test_nothing_listens_there() -> None:
    with SmtpServer() as gone:
        pass
    with pytest.raises(RelayUnavailable, match=f"127.0.0.1:{gone.port}"):
        send(gone.relay(), mail())


# ---------------------------------------------------------------- TLS and credentials


def encrypted(authority: trustme.CA, name: str = "127.0.0.1", **more: Any) -> SmtpServer:
    return SmtpServer(certificate=certificate(authority, name), **more)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("tls", ["required", "opportunistic"])
def test_mail_is_encrypted_where_the_relay_offers_it(authority: trustme.CA, tls: str) -> None:
    with encrypted(authority) as server:
        outcomes = send(server.relay(tls=tls), mail(), mail())
    assert [outcome.kind for outcome in outcomes] == [A, A]
    assert all(one.tls for one in server.accepted)


@pytest.mark.usefixtures("trusted")
def test_implicit_tls_encrypts_from_the_first_byte(authority: trustme.CA) -> None:
    with encrypted(authority, implicit_tls=True) as server:
        [outcome] = send(server.relay(tls="required"), mail())
    assert outcome.kind is A
    assert server.accepted[0].tls
    assert "STARTTLS" not in server.verbs()


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("stage", "act", "kind"),
    [("rcpt", reply(550), P), ("rcpt", reset(), N), ("dot", close(), U), ("dot", reset(), U), ("dot", HANG, U)],
)
def test_stages_mean_the_same_on_an_encrypted_connection(
    authority: trustme.CA, stage: str, act: Act, kind: Kind
) -> None:
    with encrypted(authority) as server:
        server.on(stage, act, nth=1)
        outcomes = send(server.relay(tls="required"), mail(), mail("b@acme.example"))
    assert [outcome.kind for outcome in outcomes] == [kind, A]


@pytest.mark.usefixtures("trusted")
def test_a_large_mail_arrives_whole_on_an_encrypted_connection(authority: trustme.CA) -> None:
    body = b"Subject: large\r\n\r\n" + b"line\r\n" * 500_000
    with encrypted(authority) as server:
        [outcome] = send(server.relay(tls="required"), mail(body=body))
    assert outcome.kind is A
    assert server.accepted[0].body == body


@pytest.mark.usefixtures("trusted")
def test_no_mail_is_sent_where_tls_is_required_and_was_stripped(authority: trustme.CA) -> None:
    words = r"does not offer TLS .*tls=opportunistic"
    with (
        encrypted(authority, offers_starttls=False, users={"u": "p"}) as server,
        pytest.raises(RelayMisconfigured, match=words),
    ):
        send(server.relay(tls="required", user="u", password="p"), mail())
    assert server.verbs()[0] == "EHLO"
    assert not {"MAIL", "AUTH"} & set(server.verbs())


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("act", [reply(454, "not now"), close(), HANG, raw(b"?\r\n")])
def test_no_mail_is_sent_where_tls_is_required_and_fails(authority: trustme.CA, act: Act) -> None:
    with encrypted(authority) as server:
        server.on("starttls", act)
        with pytest.raises(RelayUnavailable):
            send(server.relay(tls="required"), mail())
    assert "MAIL" not in server.verbs()


def test_opportunistic_mail_goes_in_the_clear_where_nothing_else_is_offered(server: SmtpServer) -> None:
    [outcome] = send(server.relay(tls="opportunistic"), mail())
    assert outcome.kind is A
    assert not server.accepted[0].tls


def test_opportunistic_encryption_is_content_with_any_certificate(authority: trustme.CA) -> None:
    with encrypted(authority, "elsewhere.example") as server:
        [outcome] = send(server.relay(tls="opportunistic"), mail())
    assert outcome.kind is A
    assert server.accepted[0].tls


@pytest.mark.usefixtures("trusted")
def test_no_encryption_is_asked_for_with_tls_none(authority: trustme.CA) -> None:
    with encrypted(authority) as server:
        send(server.relay(tls="none"), mail())
    assert "STARTTLS" not in server.verbs()


@pytest.mark.parametrize("implicit", [False, True])
def test_a_certificate_of_an_unknown_authority_is_told_to_a_person(authority: trustme.CA, implicit: bool) -> None:
    with (
        encrypted(authority, implicit_tls=implicit) as server,
        pytest.raises(RelayMisconfigured, match="no certificate that this machine trusts"),
    ):
        send(server.relay(tls="required"), mail())
    assert "MAIL" not in server.verbs()


def test_a_port_that_speaks_no_tls_is_told_as_such() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=_greet, args=(listener,), daemon=True).start()
        plain = SmtpServer(implicit_tls=True, port=listener.getsockname()[1]).relay(tls="required")
        with pytest.raises(RelayMisconfigured, match="speaks no TLS on this port"):
            send(plain, mail())


def _greet(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b"220 relay.test ESMTP\r\n")
        connection.recv(4096)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("implicit", [False, True])
def test_a_certificate_for_another_name_is_told_to_a_person(authority: trustme.CA, implicit: bool) -> None:
    with (
        encrypted(authority, "elsewhere.example", implicit_tls=implicit) as server,
        pytest.raises(RelayMisconfigured, match="no certificate that this machine trusts"),
    ):
        send(server.relay(tls="required"), mail())
    assert "MAIL" not in server.verbs()


def test_credentials_are_shown_once_a_connection(server: SmtpServer) -> None:
    server.users = {"ada": "p w:%@"}
    send(server.relay(user="ada", password="p w:%@"), mail(), mail())
    assert [one.user for one in server.accepted] == ["ada", "ada"]
    assert server.verbs().count("AUTH") == 1


def test_wrong_credentials_are_told_to_a_person_without_showing_them(server: SmtpServer) -> None:
    server.users = {"ada": "right-one"}
    with pytest.raises(RelayMisconfigured, match=r"refused the user or password .*ROLECAST_RELAY_URLS") as caught:
        send(server.relay(user="ada", password="wrong-one"), mail())
    assert "wrong-one" not in str(caught.value)
    assert "MAIL" not in server.verbs()


def test_credentials_for_a_relay_that_wants_none_are_told_to_a_person(server: SmtpServer) -> None:
    with pytest.raises(RelayMisconfigured, match="takes no user and password"):
        send(server.relay(user="ada", password="p"), mail())


@pytest.mark.parametrize("act", [reply(454, "4.7.0 later"), reply(421, "busy"), close(), reset(), HANG])
def test_a_login_that_fails_for_now_is_no_matter_for_a_person(server: SmtpServer, act: Act) -> None:
    server.users = {"ada": "p"}
    server.on("auth", act)
    with pytest.raises(RelayUnavailable, match="can't be used now"):
        send(server.relay(user="ada", password="p"), mail())


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


# ---------------------------------------------------------------- pooled connections and their limits


def test_connections_are_used_again_by_later_flights(server: SmtpServer) -> None:
    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        for _ in range(5):
            await hand_over(relay, mail(), mail())
        await relay.close()

    asyncio.run(fly())
    assert len(server.accepted) == 10
    assert server.connections == 1


@pytest.mark.parametrize("farewell", [b"", b"421 4.4.2 idle for too long\r\n"])
@pytest.mark.parametrize("noticed", [True, False])
def test_a_rested_connection_that_the_relay_closed_is_replaced_without_a_word(
    server: SmtpServer, farewell: bytes, noticed: bool
) -> None:
    async def fly() -> list[Outcome]:
        relay = Relay(server.relay(), host_name="rolecast.test")
        await hand_over(relay, mail())
        server.drop_all(farewell)
        if noticed:
            await asyncio.sleep(0.05)
        outcomes = await hand_over(relay, mail(), mail())
        await relay.close()
        return outcomes

    assert [outcome.kind for outcome in asyncio.run(fly())] == [A, A]
    assert len(server.accepted) == 3
    assert server.connections == 2


@pytest.mark.parametrize("act", [close(), reset(), reply(421, "4.7.0 enough on this connection"), HANG])
def test_a_relay_that_ends_a_connection_after_some_mails_delays_none(server: SmtpServer, act: Act) -> None:
    server.on("mail", act, nth=3)
    outcomes = send(server.relay(), *(mail(f"{name}@acme.example") for name in "abcd"))
    assert [outcome.kind for outcome in outcomes] == [A, A, A, A]
    assert [one.recipient[0] for one in server.accepted] == ["a", "b", "c", "d"]


def test_a_connection_that_rested_too_long_is_not_trusted(server: SmtpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "IDLE_SECONDS", 0.02)

    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        await hand_over(relay, mail())
        await asyncio.sleep(0.05)
        await hand_over(relay, mail())
        await relay.close()

    asyncio.run(fly())
    assert [one.connection for one in server.accepted] == [1, 2]


def test_a_late_answer_is_never_taken_for_the_answer_to_the_next_mail(
    server: SmtpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "COMMAND_SECONDS", PATIENCE)
    server.on("rcpt", delay(2 * PATIENCE), nth=1)
    outcomes = send(server.relay(), mail("a@acme.example"), mail("b@acme.example"))
    assert [outcome.kind for outcome in outcomes] == [N, A]
    assert [one.connection for one in server.accepted] == [2]


def test_no_more_connections_are_open_than_allowed(server: SmtpServer) -> None:
    server.on("dot", delay(0.01))

    async def fly() -> None:
        relay = Relay(server.relay(connections=4), host_name="rolecast.test")
        flights = [hand_over(relay, mail(), mail(), lane=lane % 3) for lane in range(24)]
        await asyncio.gather(*flights)
        await relay.close()

    asyncio.run(fly())
    assert len(server.accepted) == 48
    assert 2 <= server.most_at_once <= 4


@pytest.mark.parametrize(
    ("connections", "busy", "bulk_gets", "others_get"),
    [
        # a place is kept for each lane that has none
        (8, BULK, 6, [URGENT, NORMAL]),
        (3, BULK, 1, [URGENT, NORMAL]),
        # too few for three lanes: a lane takes no second place, and whoever comes next takes the last
        (2, BULK, 1, [URGENT]),
        (1, BULK, 1, []),
        (8, URGENT, 6, [BULK, NORMAL]),
    ],
)
def test_one_connection_is_kept_free_for_each_other_lane(
    connections: int, busy: int, bulk_gets: int, others_get: list[int]
) -> None:
    async def fly() -> None:
        places = relay_module.Places(connections, lanes=3)
        held: list[int] = []
        leave = asyncio.Event()

        async def stay(lane: int) -> None:
            async with places.one(lane):
                held.append(lane)
                await leave.wait()

        tasks = [asyncio.create_task(stay(busy)) for _ in range(10)]
        await asyncio.sleep(0.01)
        assert held.count(busy) == bulk_gets
        for lane in others_get:  # a second of the same lane can't take the place of a third lane
            tasks += [asyncio.create_task(stay(lane)) for _ in range(3)]
            await asyncio.sleep(0.01)
        assert [held.count(lane) for lane in others_get] == [1] * len(others_get)
        assert len(held) == bulk_gets + len(others_get) <= connections
        leave.set()
        await asyncio.gather(*tasks)

    asyncio.run(fly())


def test_a_rate_is_held_over_all_flights_of_a_relay(server: SmtpServer) -> None:
    async def fly() -> float:
        relay = Relay(server.relay(rate=100.0), host_name="rolecast.test")
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(hand_over(relay, mail(), mail(), mail(), mail(), mail()) for _ in range(6)))
        took = loop.time() - began
        await relay.close()
        return took

    took = asyncio.run(fly())
    assert len(server.accepted) == 30
    assert took >= 0.29  # the first goes at once, the thirtieth 29 hundredths of a second later
    assert took < 2


@pytest.mark.parametrize(
    ("rate", "wanted", "size"),
    [
        (0.0, 32, 32),  # no limit
        (1000.0, 32, 32),  # a quarter of a second is 250 mails
        (40.0, 32, 10),
        (1.0, 32, 1),  # never less than one
        (0.1, 32, 1),
    ],
)
def test_a_flight_takes_no_more_than_a_quarter_second_of_the_rate(rate: float, wanted: int, size: int) -> None:
    assert relay_module.Rate(rate).flight_size(wanted) == size


# ---------------------------------------------------------------- several relays


def test_the_second_relay_is_used_while_the_first_fails_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "BACKOFF_SECONDS", (0.1,))

    async def fly(first: SmtpServer, second: SmtpServer) -> list[str]:
        relays = Relays([Relay(one.relay(), host_name="rolecast.test") for one in (first, second)])
        chosen = [relays.choose().name]
        # when the first can't be reached
        with pytest.raises(RelayUnavailable):
            await hand_over(relays.choose(), mail())
        # then the second has its mail
        chosen.append(relays.choose().name)
        await hand_over(relays.choose(), mail())
        # until the first has rested and works again
        await asyncio.sleep(0.12)
        chosen.append(relays.choose().name)
        await hand_over(relays.choose(), mail())
        assert relays.all[0].problem is None
        await relays.close()
        return chosen

    with SmtpServer() as first, SmtpServer() as second:
        first.on("connect", close(), nth=1)
        chosen = asyncio.run(fly(first, second))
        assert chosen == [first.relay().name, second.relay().name, first.relay().name]
        assert (len(first.accepted), len(second.accepted)) == (1, 1)


def test_a_relay_that_needs_a_person_is_tried_seldom(server: SmtpServer) -> None:
    server.users = {}

    async def fly() -> None:
        relay = Relay(server.relay(user="ada", password="p"), host_name="rolecast.test")
        with pytest.raises(RelayMisconfigured):
            await hand_over(relay, mail())
        assert not relay.ready
        with pytest.raises(RelayUnavailable, match="refused the user or password"):
            Relays([relay]).choose()
        await relay.close()

    asyncio.run(fly())


def test_where_no_relay_is_configured_the_remedy_is_told() -> None:
    with pytest.raises(RelayMisconfigured, match="set ROLECAST_RELAY_URLS"):
        Relays([]).choose()


def test_a_paused_relay_is_passed_over() -> None:
    async def look() -> None:
        with SmtpServer() as first, SmtpServer() as second:
            relays = Relays([Relay(one.relay(), host_name="rolecast.test") for one in (first, second)])
            relays.all[0].paused = True
            assert relays.choose() is relays.all[1]
            relays.all[1].paused = True
            with pytest.raises(RelayUnavailable, match=f"{relays.all[0].name} is paused"):
                relays.choose()

    asyncio.run(look())


def test_the_mails_that_could_not_be_begun_are_not_reported(server: SmtpServer) -> None:
    server.on("dot", last_words(421), nth=2)
    server.on("connect", close(), nth=2)
    outcomes: list[Kind] = []

    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        envelopes = [mail(f"{name}@acme.example") for name in "abcd"]
        with pytest.raises(RelayUnavailable):
            await relay.send(envelopes, lane=BULK, done=lambda _, outcome: outcomes.append(outcome.kind))
        assert not relay.ready
        await relay.close()

    asyncio.run(fly())
    assert outcomes == [A, T]
    assert [one.recipient[0] for one in server.accepted] == ["a"]


def test_nothing_is_left_open_after_a_relay_was_closed(server: SmtpServer) -> None:
    server.on("rcpt", reset(), nth=2)
    server.on("ehlo", close(), nth=2)

    async def fly() -> int:
        before = len(asyncio.all_tasks())
        relay = Relay(server.relay(), host_name="rolecast.test")
        with pytest.raises(RelayUnavailable):
            await hand_over(relay, mail(), mail(), mail())
        await hand_over(relay, mail())
        await relay.close()
        await asyncio.sleep(0.02)
        return len(asyncio.all_tasks()) - before

    assert asyncio.run(fly()) == 0
    gc.collect()  # what was not closed complains here
