"""Every reply code and every loss at every stage, each with its exact outcome (reliability.md 1.6, R13, R14)."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.smtpd import (
    CHUNKED,
    WAYS,
    Act,
    SmtpServer,
    close,
    hang,
    last_words,
    mail,
    raw,
    reply,
    reset,
    send,
    stall,
)
from worker import relay as relay_module
from worker import transaction
from worker.relay import About, Kind, RelayMisconfigured, RelayUnavailable

PATIENCE = 0.1
CONNECTING = ("connect", "ehlo", "starttls", "auth")
TRANSACTION = ("mail", "rcpt", "data", "dot")

REPLIES = """
reply       connect ehlo    starttls auth    mail        rcpt        data        dot
# the code alone
421         later   later   later    later   T/relay     T/relay     T/relay     T/relay
450         later   later   later    later   T/sender    T/recipient T/content   T/content
451         later   later   later    later   T/sender    T/recipient T/content   T/content
452         later   later   later    later   T/sender    T/recipient T/content   T/content
454         later   later   later    later   T/sender    T/recipient T/content   T/content
530         person  person  person   person  person      P/sender    P/sender    P/sender
534         person  person  person   person  person      P/sender    P/sender    P/sender
535         person  person  person   person  person      P/sender    P/sender    P/sender
538         person  person  person   person  person      P/sender    P/sender    P/sender
550         later   later   later    person  P/sender    P/recipient P/content   P/content
551         later   later   later    person  P/sender    P/recipient P/content   P/content
552         later   later   later    person  P/content   T/recipient P/content   P/content
553         later   later   later    person  P/sender    P/recipient P/content   P/content
554         later   later   later    person  P/sender    P/policy    P/content   P/content
501         later   later   later    person  P/sender    P/recipient P/content   P/content
503         later   later   later    person  P/sender    P/policy    P/content   P/content
556         later   later   later    person  P/sender    P/recipient P/content   P/content
# with an enhanced code that says more
450_4.7.1   later   later   later    later   T/sender    T/recipient T/content   T/content
450_4.7.1_too_much_mail later later later later T/relay  T/relay     T/relay     T/relay
451_4.7.0_rate_limited  later later later later T/relay  T/relay     T/relay     T/relay
450_4.2.1_at_a_high_rate later later later later T/sender T/recipient T/content  T/content
452_4.3.1   later   later   later    later   T/sender    T/recipient T/content   T/content
452_4.5.3   later   later   later    later   T/relay     T/relay     T/relay     T/relay
454_4.7.0   later   later   later    later   T/sender    T/recipient T/content   T/content
530_5.7.0   person  person  person   person  person      P/sender    P/sender    P/sender
535_5.7.8   person  person  person   person  person      P/sender    P/sender    P/sender
550_5.1.1   later   later   later    person  P/sender    P/recipient P/recipient P/recipient
550_5.1.8   later   later   later    person  P/sender    P/sender    P/sender    P/sender
550_5.2.1   later   later   later    person  P/sender    P/recipient P/content   P/content
550_5.2.2   later   later   later    person  P/sender    T/recipient T/recipient T/recipient
550_5.4.1   later   later   later    person  P/sender    P/recipient P/content   P/content
550_5.6.0   later   later   later    person  P/sender    P/recipient P/content   P/content
550_5.7.0   later   later   later    person  P/sender    P/policy    P/policy    P/policy
550_5.7.1   later   later   later    person  P/sender    P/policy    P/policy    P/policy
550_5.7.8   later   later   later    person  person      P/policy    P/policy    P/policy
551_5.7.1   later   later   later    person  P/sender    P/policy    P/policy    P/policy
552_5.2.2   later   later   later    person  P/content   T/recipient T/recipient T/recipient
552_5.2.3   later   later   later    person  P/content   P/content   P/content   P/content
552_5.3.4   later   later   later    person  P/content   P/content   P/content   P/content
554_5.3.4   later   later   later    person  P/content   P/content   P/content   P/content
552_5.7.0   later   later   later    person  P/content   P/policy    P/policy    P/policy
553_5.1.3   later   later   later    person  P/sender    P/recipient P/recipient P/recipient
553_5.7.1   later   later   later    person  P/sender    P/policy    P/policy    P/policy
554_5.1.1   later   later   later    person  P/sender    P/recipient P/content   P/content
554_5.2.2   later   later   later    person  P/sender    T/recipient T/recipient T/recipient
554_5.6.0   later   later   later    person  P/sender    P/policy    P/content   P/content
554_5.7.1   later   later   later    person  P/sender    P/policy    P/policy    P/policy
# with one that contradicts the code: the code decides alone
421_5.1.1   later   later   later    later   T/relay     T/relay     T/relay     T/relay
450_5.1.1   later   later   later    later   T/sender    T/recipient T/content   T/content
451_5.7.8   later   later   later    later   T/sender    T/recipient T/content   T/content
452_5.3.4   later   later   later    later   T/sender    T/recipient T/content   T/content
454_2.0.0   later   later   later    later   T/sender    T/recipient T/content   T/content
530_4.1.1   person  person  person   person  person      P/sender    P/sender    P/sender
535_2.0.0   person  person  person   person  person      P/sender    P/sender    P/sender
550_2.1.5   later   later   later    person  P/sender    P/recipient P/content   P/content
550_4.7.1   later   later   later    person  P/sender    P/recipient P/content   P/content
551_4.2.2   later   later   later    person  P/sender    P/recipient P/content   P/content
552_4.7.1   later   later   later    person  P/content   T/recipient P/content   P/content
553_4.7.8   later   later   later    person  P/sender    P/recipient P/content   P/content
554_4.1.1   later   later   later    person  P/sender    P/policy    P/content   P/content
250_5.1.1   -       -       -        -       A           A           T/relay     A
"""
"""Rows are what the relay says, columns when. `later`: RelayUnavailable; `person`: RelayMisconfigured, in both cases
before anything was sent; else what becomes of the mail and what it is about (A accepted, T temporary, P permanent).
About the relay means that the session ended and the next mail has a new one; all else leaves the session in use."""

LOSSES = """
fault       connect ehlo    starttls auth    mail        rcpt        data        body        dot
reset       later   later   later    later   N           N           N           N           U
close       later   later   later    later   N           N           N           N           U
hang        later   later   later    later   N           N           N           -           U
stall       later   later   later    later   N           N           N           N           U
goodbye     later   later   later    later   T/relay     T/relay     T/relay     -           T/relay
garbage     later   later   later    later   T/relay     T/relay     T/relay     T/relay     U
endless     later   later   later    later   T/relay     T/relay     T/relay     T/relay     U
go_on       later   later   later    -       T/relay     T/relay     -           -           U
"""
"""What happens instead of an answer; `body` is the middle of a large mail. N: not sent; U: unknown."""

CHUNKED_LOSSES = """
fault       mail        rcpt        dot
reset       U+U         U+U         U+U
close       U+U         U+U         U+U
hang        U+U         U+U         U+U
stall       U+U         U+U         U+U
goodbye     T+U         T+U         T+U
garbage     U+U         U+U         U+U
endless     U+U         U+U         U+U
go_on       U+U         U+U         U+U
"""
"""The same with CHUNKING: a small mail was written whole, and so was the next one, which is in flight beside it."""

ACTS: dict[str, Act] = {
    "reset": reset(),
    "close": close(),
    "hang": hang(),  # it reads on, and says nothing
    "stall": stall(),
    "goodbye": last_words(421, "4.3.2 shutting down"),
    "garbage": raw(b"HTTP/1.1 400 Bad Request\r\n"),
    "endless": raw(b"250-more\r\n" * 10_000),
    "go_on": reply(354),
}
KINDS = {
    "A": Kind.ACCEPTED,
    "T": Kind.TEMPORARY,
    "P": Kind.PERMANENT,
    "N": Kind.NOT_SENT,
    "U": Kind.UNKNOWN,
}
LARGE = b"Subject: large\r\n\r\n" + b"line\r\n" * 1_000_000


def cells(table: str, stages: Sequence[str]) -> Iterator[Any]:
    """(what, stage, meaning) of each cell under these stages."""
    lines = [line.split() for line in table.strip().splitlines() if not line.startswith("#")]
    heads = lines[0]
    for what, *meanings in lines[1:]:
        for stage, meaning in zip(heads[1:], meanings, strict=True):
            if stage in stages and meaning != "-":
                yield pytest.param(what, stage, meaning, id=f"{what}-{stage}")


def by_way(some: Iterator[Any], *, chunked: Sequence[str]) -> Iterator[Any]:
    """(way, what, stage, meaning) of cells; with CHUNKING only at these stages."""
    for cell in some:
        for way in WAYS:
            if way != "chunked" or cell.values[1] in chunked:
                yield pytest.param(way, *cell.values, id=f"{way}-{cell.id}")


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Only the clock is patched."""
    seconds = PATIENCE if request.node.callspec.params["what"] in {"hang", "stall"} else 10.0
    monkeypatch.setattr(relay_module, "CONNECT_SECONDS", seconds)
    for name in ("COMMAND_SECONDS", "DOT_SECONDS"):
        monkeypatch.setattr(transaction, name, seconds)
    monkeypatch.setattr(transaction, "BODY_SECONDS", 5 * seconds)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def trusted(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


def said(what: str) -> Act:
    if what in ACTS:
        return ACTS[what]
    code, _, text = what.partition("_")
    return reply(int(code), text.replace("_", " ") or "no")


@pytest.mark.parametrize(("what", "stage", "meaning"), [*cells(REPLIES, CONNECTING), *cells(LOSSES, CONNECTING)])
def test_a_connection_that_does_not_get_ready_sends_nothing(
    what: str,
    stage: str,
    meaning: str,
    certificate: ssl.SSLContext,
    trusted: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    with SmtpServer(
        certificate=certificate if stage == "starttls" else None, users={"ada": "hush"} if stage == "auth" else None
    ) as server:
        server.on(stage, said(what))
        options: dict[str, Any] = {"tls": "required"} if stage == "starttls" else {}
        if stage == "auth":
            options |= {"user": "ada", "password": "hush"}
        expected = {"later": RelayUnavailable, "person": RelayMisconfigured}[meaning]
        with pytest.raises(expected, match=f"the relay 127.0.0.1:{server.port} "):
            send(server.relay(**options), mail())
        assert not {"MAIL", "RCPT", "DATA"} & set(server.verbs())


@pytest.mark.parametrize(
    ("way", "what", "stage", "meaning"), [*by_way(cells(REPLIES, TRANSACTION), chunked=("mail", "rcpt", "dot"))]
)
def test_a_reply_within_a_mail_means_what_the_table_says(way: str, what: str, stage: str, meaning: str) -> None:
    with SmtpServer(extensions=WAYS[way]) as server:
        server.on(stage, said(what), nth=1)
        mails = (mail("ada@acme.example"), mail("next@acme.example"))
        if meaning == "person":
            with pytest.raises(RelayMisconfigured, match="takes no mail from us"):
                send(server.relay(), *mails)
            # With CHUNKING the next one is in flight by then, and taken: of that, `done` tells.
            assert [one.recipient for one in server.accepted] == (["next@acme.example"] if way == "chunked" else [])
            return
        first, second = send(server.relay(), *mails)
        kind, _, about = meaning.partition("/")
        assert (first.kind, first.stage) == (KINDS[kind], "dot" if kind == "A" else stage)
        assert kind == "A" or first.about is About(about)
        assert first.code == int(what[:3])
        assert second.kind is Kind.ACCEPTED
        taken = [one.recipient for one in server.accepted]
        assert taken == (["ada@acme.example"] if kind == "A" else []) + ["next@acme.example"]
        # Where the next one is in flight already, it is answered before the session ends.
        assert server.connections == (2 if about == "relay" and way != "chunked" else 1)


@pytest.mark.parametrize(
    ("way", "what", "stage", "meaning"),
    [*by_way(cells(LOSSES, (*TRANSACTION, "body")), chunked=("body",))],
)
def test_a_loss_within_a_mail_is_unknown_only_after_its_dot(way: str, what: str, stage: str, meaning: str) -> None:
    with SmtpServer(extensions=WAYS[way]) as server:
        server.on(stage, said(what), nth=1)
        large = mail("ada@acme.example", body=LARGE) if stage == "body" else mail("ada@acme.example")
        first, second = send(server.relay(), large, mail("next@acme.example"))
        kind = meaning.partition("/")[0]
        if (what, first.stage) == ("endless", "dot"):
            kind, stage = "U", "dot"  # the answer was too long only when the rest of the mail had been written
        assert (first.kind, first.about) == (KINDS[kind], About.RELAY)
        # A reset takes answers with it that were on their way: with pipelining it may be seen at an earlier command.
        assert first.stage == stage or (kind == "N" and stage in {"rcpt", "data"} and way == "pipelined")
        assert second.kind is Kind.ACCEPTED
        assert [one.recipient for one in server.accepted] == ["next@acme.example"]
        assert server.connections == 2


@pytest.mark.parametrize(("what", "stage", "meaning"), [*cells(CHUNKED_LOSSES, TRANSACTION)])
def test_a_loss_in_a_window_leaves_those_unknown_that_were_written(what: str, stage: str, meaning: str) -> None:
    with SmtpServer(extensions=CHUNKED) as server:
        server.on(stage, said(what), nth=1)
        outcomes = send(server.relay(), mail("ada@acme.example"), mail("next@acme.example"))
        assert "+".join(outcome.kind[0].upper() for outcome in outcomes) == meaning
        assert {outcome.about for outcome in outcomes} == {About.RELAY}
        assert server.accepted == [] or what in {"garbage", "endless", "go_on"}  # unknown: it may have been taken


@pytest.mark.parametrize("what", ["reset", "close", "hang"])
def test_a_small_mail_leaves_with_its_dot_and_is_unknown_if_lost_in_its_middle(what: str) -> None:
    with SmtpServer() as server:
        server.on("body", said(what), nth=1)
        [outcome] = send(server.relay(), mail())
    assert (outcome.kind, outcome.stage) == (Kind.UNKNOWN, "dot")
