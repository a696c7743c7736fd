"""Relays against a scripted server: connecting, TLS, credentials, pooled connections, limits, breaker and failover."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.smtpd import (
    BULK,
    WAYS,
    Act,
    SmtpServer,
    close,
    crowd,
    delay,
    drip,
    flood,
    hand_over,
    hang,
    last_words,
    mail,
    raw,
    reply,
    reset,
    send,
)
from worker import relay as relay_module
from worker import transaction
from worker.relay import About, Kind, Outcome, Relay, RelayMisconfigured, Relays, RelayUnavailable

URGENT, NORMAL = 0, 1
A, T, P, U, N = Kind.ACCEPTED, Kind.TEMPORARY, Kind.PERMANENT, Kind.UNKNOWN, Kind.NOT_SENT

HANG, CRAWL = hang(), drip(0.1)
FLOOD, FLOODED_LINE = flood(b"250-more\r\n"), flood(b"2")
PATIENCE = 0.25


@pytest.fixture(autouse=True)
def short_times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the clock is patched: where a test waits for the end of our patience, it comes in a quarter of a second."""
    act = getattr(request.node, "callspec", None) and request.node.callspec.params.get("act")
    seconds = PATIENCE if act in {HANG, CRAWL} else 10.0
    monkeypatch.setattr(relay_module, "CONNECT_SECONDS", seconds)
    for name in ("COMMAND_SECONDS", "BODY_SECONDS", "DOT_SECONDS"):
        monkeypatch.setattr(transaction, name, seconds)


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
@pytest.mark.parametrize("way", WAYS)
def test_many_mails_arrive_whole_on_an_encrypted_connection(authority: trustme.CA, way: str) -> None:
    bodies = [b"Subject: %d\r\n\r\n" % number + b".line\r\n" * 8_000 for number in range(40)]
    with encrypted(authority, extensions=WAYS[way]) as server:
        outcomes = send(server.relay(tls="required"), *(mail(body=body) for body in bodies))
    assert {outcome.kind for outcome in outcomes} == {A}
    assert [one.body for one in server.accepted] == bodies
    assert server.connections == 1


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


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("implicit", [False, True])
def test_a_certificate_that_expired_is_told_to_a_person(authority: trustme.CA, implicit: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", not_after=datetime(2020, 1, 1, tzinfo=UTC)).configure_cert(context)
    with (
        SmtpServer(certificate=context, implicit_tls=implicit) as server,
        pytest.raises(RelayMisconfigured, match="no certificate that this machine trusts"),
    ):
        send(server.relay(tls="required"), mail())
    assert "MAIL" not in server.verbs()


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    "injected",
    [
        b"250 ok\r\n",
        b"250-relay.test\r\n250 AUTH PLAIN\r\n",
        b"250 ok\r\n250 ok\r\n250 ok\r\n354 go on\r\n250 2.0.0 taken\r\n",
    ],
)
def test_answers_said_before_the_encryption_are_not_heard_within_it(authority: trustme.CA, injected: bytes) -> None:
    """Answers behind the one to STARTTLS, in the same packet, came in the clear: anybody may have written them."""
    with encrypted(authority) as server:
        server.on("starttls", raw(b"220 go on\r\n" + injected))
        outcomes = send(server.relay(tls="required"), mail(), mail())
        assert [outcome.text for outcome in outcomes] == ["2.0.0 taken", "2.0.0 taken"]
        assert [one.tls for one in server.accepted] == [True, True]
        assert server.verbs().count("EHLO") == 2


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
    monkeypatch.setattr(transaction, "COMMAND_SECONDS", PATIENCE)
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


# ---------------------------------------------------------------- the breaker


def test_three_mails_lost_in_a_row_are_enough(server: SmtpServer) -> None:
    server.on("dot", reset())
    outcomes: list[Kind] = []

    async def fly() -> str | None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        with pytest.raises(RelayUnavailable, match=r"ends or loses the connection at each mail \(.*after the mail\)"):
            await relay.send([mail()] * 5, lane=BULK, done=lambda _, outcome: outcomes.append(outcome.kind))
        assert not relay.ready
        await relay.close()
        return relay.problem

    problem = asyncio.run(fly())
    assert problem is not None
    assert server.relay().name in problem
    assert outcomes == [U, U, U]
    assert server.connections == 3


@pytest.mark.parametrize(("act", "kind"), [(reply(421), T), (reset(), N), (HANG, N), (raw(b"?\r\n"), T)])
def test_losses_between_accepted_mails_are_no_matter(server: SmtpServer, act: Act, kind: Kind) -> None:
    for name in "abdegh":
        server.on("rcpt", act, recipient=f"{name}@acme.example")
    outcomes = send(server.relay(), *(mail(f"{name}@acme.example") for name in "abcdefghi"))
    assert [outcome.kind for outcome in outcomes] == [kind, kind, A] * 3


def test_refusals_of_mails_say_nothing_against_the_relay(server: SmtpServer) -> None:
    server.on("rcpt", reply(550, "5.1.1 nobody"))

    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        assert [outcome.kind for outcome in await hand_over(relay, *[mail()] * 6)] == [P] * 6
        assert relay.ready
        assert relay.problem is None
        await relay.close()

    asyncio.run(fly())


def test_one_flight_tries_a_relay_that_failed_and_the_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "BACKOFF_SECONDS", (0.05,))

    async def fly(first: SmtpServer, second: SmtpServer) -> None:
        relays = Relays([Relay(one.relay(), host_name="rolecast.test") for one in (first, second)])
        preferred, spare = relays.all
        with pytest.raises(RelayUnavailable):
            await hand_over(preferred, mail())
        await asyncio.sleep(0.06)
        assert preferred.ready
        assert preferred.problem is not None
        probe = asyncio.create_task(hand_over(preferred, mail("probe@acme.example")))
        await until(lambda: bool(first.accepted))
        assert relays.choose() is spare
        with pytest.raises(RelayUnavailable):  # who chose it before the probe began
            await hand_over(preferred, mail("early@acme.example"))
        [outcome] = await probe
        assert outcome.kind is A
        assert preferred.problem is None
        assert relays.choose() is preferred
        await relays.close()

    with SmtpServer() as first, SmtpServer() as second:
        first.on("connect", close(), nth=1)
        first.on("dot", _take_then_wait(0.2))
        asyncio.run(fly(first, second))
        assert [one.recipient for one in first.accepted] == ["probe@acme.example"]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that the server's threads do."""
    while not condition():  # noqa: ASYNC110 - threads set no asyncio.Event
        await asyncio.sleep(0.005)


def _take_then_wait(seconds: float) -> Act:
    def act(talk: Any, code: int, text: str) -> int:
        talk.keep()
        talk.pause(seconds)
        talk.write(f"{code} {text}\r\n".encode())
        return code

    return act


def test_a_probe_that_fails_leaves_the_relay_alone_for_longer(
    server: SmtpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "BACKOFF_SECONDS", (0.02, 30.0))
    server.on("connect", close(), nth=1)
    server.on("rcpt", reset(), nth=1)

    async def fly() -> list[Outcome]:
        relay = Relay(server.relay(), host_name="rolecast.test")
        with pytest.raises(RelayUnavailable):
            await hand_over(relay, mail())
        await asyncio.sleep(0.03)
        outcomes: list[Outcome] = []
        with pytest.raises(RelayUnavailable):
            await relay.send([mail(), mail()], lane=BULK, done=lambda _, outcome: outcomes.append(outcome))
        await asyncio.sleep(0.03)
        assert not relay.ready
        await relay.close()
        return outcomes

    assert [outcome.kind for outcome in asyncio.run(fly())] == [N]
    assert server.connections == 2


def test_a_probe_that_was_cancelled_is_followed_by_another(server: SmtpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "BACKOFF_SECONDS", (0.02,))
    server.on("connect", close(), nth=1)
    server.on("rcpt", delay(0.2), nth=1)

    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        with pytest.raises(RelayUnavailable):
            await hand_over(relay, mail())
        await asyncio.sleep(0.03)
        probe = asyncio.create_task(hand_over(relay, mail()))
        await asyncio.sleep(0.05)
        assert not relay.ready
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        assert relay.ready
        assert [outcome.kind for outcome in await hand_over(relay, mail())] == [A]
        assert relay.problem is None
        await relay.close()

    asyncio.run(fly())


def test_many_connections_that_fail_at_once_are_one_failure(
    server: SmtpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "BACKOFF_SECONDS", (0.02, 30.0))
    for number in range(1, 7):
        server.on("connect", close(), nth=number)

    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        failed = await asyncio.gather(*(hand_over(relay, mail()) for _ in range(6)), return_exceptions=True)
        assert {type(one) for one in failed} == {RelayUnavailable}
        await asyncio.sleep(0.05)
        assert relay.ready
        await relay.close()

    asyncio.run(fly())


def test_what_fails_while_a_relay_is_left_alone_does_not_prolong_it() -> None:
    async def fail() -> None:
        breaker = relay_module.Breaker()
        breaker.open(longest=False)
        until = breaker.until
        breaker.open(longest=False)
        assert (breaker.until, breaker.openings) == (until, 1)
        breaker.open(longest=True)  # a person must act: that takes longer
        assert breaker.until > until + 30

    asyncio.run(fail())


@pytest.mark.parametrize("words", ["530 5.7.0 Authentication required", "550 5.7.0 Must issue STARTTLS first"])
def test_a_relay_that_takes_nothing_from_us_is_told_to_a_person_and_another_takes_the_mail(words: str) -> None:
    outcomes: list[Outcome] = []

    async def fly(first: SmtpServer, second: SmtpServer) -> None:
        relays = Relays([Relay(one.relay(), host_name="rolecast.test") for one in (first, second)])
        with pytest.raises(RelayMisconfigured, match=r"takes no mail from us .*ROLECAST_RELAY_URLS"):
            await relays.choose().send([mail(), mail()], lane=BULK, done=lambda _, outcome: outcomes.append(outcome))
        assert outcomes == []
        assert relays.choose() is relays.all[1]
        assert [outcome.kind for outcome in await hand_over(relays.choose(), mail(), mail())] == [A, A]
        await relays.close()

    with SmtpServer() as first, SmtpServer() as second:
        first.on("mail", reply(int(words[:3]), words[4:]))
        asyncio.run(fly(first, second))
        assert first.verbs().count("MAIL") == 1
        assert len(second.accepted) == 2


# ---------------------------------------------------------------- a relay that takes fewer connections (R18)


def test_too_many_connections_are_fewer_from_then_on_and_no_mail_fails(
    server: SmtpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "ASIDE_SECONDS", 0.05)
    server.on("connect", crowd(3))
    server.on("dot", delay(0.005))

    async def fly() -> None:
        relay = Relay(server.relay(connections=8), host_name="rolecast.test")
        flights = [hand_over(relay, *[mail()] * 4, lane=lane % 3) for lane in range(24)]
        for outcomes in await asyncio.gather(*flights):
            assert [outcome.kind for outcome in outcomes] == [A] * 4
        assert relay.ready
        assert relay.problem is None
        await relay.close()

    asyncio.run(fly())
    assert len(server.accepted) == 96
    assert server.connections < 96


def test_who_was_told_too_many_asks_again_only_after_mails_were_accepted(
    server: SmtpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "ASIDE_SECONDS", 0.01)
    server.on("connect", last_words(421, "too many connections"), nth=3)
    server.on("dot", _take_then_wait(0.2))

    async def fly() -> None:
        relay = Relay(server.relay(connections=3), host_name="rolecast.test", lanes=1)
        flights = [asyncio.create_task(hand_over(relay, mail())) for _ in range(2)]
        await until(lambda: len(server.accepted) == 2)
        flights += [asyncio.create_task(hand_over(relay, mail())) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert server.connections == 3
        await asyncio.gather(*flights)
        await asyncio.gather(*(hand_over(relay, mail()) for _ in range(3)))
        await relay.close()

    asyncio.run(fly())
    assert len({one.connection for one in server.accepted[:4]}) == 2
    assert len({one.connection for one in server.accepted[4:]}) == 3


def test_a_relay_that_has_had_enough_on_every_connection_is_left_alone(server: SmtpServer) -> None:
    server.on("rcpt", reply(450, "4.7.1 Error: too much mail from 127.0.0.1"))

    async def fly() -> None:
        relay = Relay(server.relay(connections=3), host_name="rolecast.test")
        outcomes: list[Outcome] = []

        async def flight(lane: int) -> None:
            with pytest.raises(RelayUnavailable, match="too much mail"):
                await relay.send([mail()] * 32, lane=lane, done=lambda _, outcome: outcomes.append(outcome))

        await asyncio.gather(*(flight(lane) for lane in (URGENT, NORMAL, BULK)))
        assert {(outcome.kind, outcome.about) for outcome in outcomes} == {(T, About.RELAY)}
        assert len(outcomes) < 12
        assert not relay.ready
        await relay.close()

    asyncio.run(fly())


def test_the_limit_falls_by_one_and_grows_back_with_accepted_mails() -> None:
    async def fly() -> None:
        places = relay_module.Places(4, lanes=3)
        async with places.one(URGENT), places.one(BULK):
            for expected in (3, 2, 2, 2):  # one for each lane at work stays
                places.shrink()
                assert places.limit == expected
        for _ in range(3):
            places.shrink()
        assert places.limit == 1
        grown = []
        for _ in range(12):
            places.grow()
            grown.append(int(places.limit))
        assert grown == [2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4]

    asyncio.run(fly())


def test_a_relay_that_takes_no_connection_at_all_is_left_alone(
    server: SmtpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "ASIDE_SECONDS", 0.05)
    server.on("connect", crowd(0))

    async def fly() -> None:
        relay = Relay(server.relay(), host_name="rolecast.test")
        failed = await asyncio.gather(*(hand_over(relay, mail()) for _ in range(6)), return_exceptions=True)
        assert all(isinstance(one, RelayUnavailable) for one in failed)
        assert not relay.ready
        await relay.close()

    asyncio.run(fly())


def test_a_cancelled_wait_for_a_place_gives_none_away() -> None:
    async def fly() -> None:
        places = relay_module.Places(2, lanes=1)

        async def stay(leave: asyncio.Event, *, aside: bool) -> None:
            async with places.one(BULK):
                if aside:
                    async with places.aside(BULK):
                        await leave.wait()
                await leave.wait()

        never, now = asyncio.Event(), asyncio.Event()
        now.set()
        holding = [asyncio.create_task(stay(never, aside=False)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(stay(never, aside=False)) for _ in range(3)]
        await asyncio.sleep(0)
        holding[0].cancel()  # at the same moment as who would get its place
        await asyncio.sleep(0)
        for task in (*waiting, holding[1]):
            task.cancel()
        await asyncio.gather(*holding, *waiting, return_exceptions=True)
        aside = [asyncio.create_task(stay(never, aside=True)) for _ in range(2)]
        await asyncio.sleep(0)
        assert (await asyncio.gather(*(stay(now, aside=False) for _ in range(4)))) == [None] * 4
        for task in aside:
            task.cancel()
        await asyncio.gather(*aside, return_exceptions=True)
        async with places.one(BULK), places.one(BULK):
            third = asyncio.create_task(stay(now, aside=False))
            await asyncio.sleep(0.01)
            assert not third.done()
        await third

    asyncio.run(fly())


# ---------------------------------------------------------------- a relay that hangs, crawls or floods (R15)


@pytest.mark.parametrize("stage", ["connect", "ehlo", "auth"])
@pytest.mark.parametrize("act", [CRAWL, FLOOD, FLOODED_LINE])
def test_a_relay_that_crawls_or_floods_is_left_within_the_time_of_its_stage(
    server: SmtpServer, stage: str, act: Act
) -> None:
    server.users = {"ada": "p"}
    server.on(stage, act)
    with measured() as most, pytest.raises(RelayUnavailable):
        send(server.relay(user="ada", password="p"), mail())
    assert most() < 10_000_000


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "dot", "rset"])
@pytest.mark.parametrize("act", [FLOOD, FLOODED_LINE])
def test_a_flood_within_a_mail_costs_little_memory(server: SmtpServer, stage: str, act: Act) -> None:
    server.on(stage, act, nth=1)
    if stage == "rset":
        server.on("rcpt", reply(550), nth=1)
    with measured() as most:
        outcomes = send(server.relay(), mail(), mail())
    assert [outcome.kind for outcome in outcomes] == [{"dot": U, "rset": P}.get(stage, T), A]
    assert most() < 10_000_000


def test_all_steps_to_a_ready_connection_share_one_time(server: SmtpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "READY_SECONDS", 0.2)
    for stage in ("connect", "ehlo"):
        server.on(stage, delay(0.15))
    with pytest.raises(RelayUnavailable, match="no answer in time"):
        send(server.relay(), mail())


@pytest.mark.parametrize("stage", ["connect", "mail", "dot"])
def test_connections_that_hang_leave_the_other_lanes_theirs(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Urgent and normal mail goes out while every connection that bulk mail may have hangs."""
    with SmtpServer() as server:
        for number in range(1, 7):
            server.on(stage, hang(), nth=number)

        async def fly() -> None:
            relay = Relay(server.relay(connections=8), host_name="rolecast.test")
            hanging = [asyncio.create_task(hand_over(relay, mail("bulk@acme.example"))) for _ in range(20)]
            await until(lambda: server.connections == 6 and (stage == "connect" or server.verbs().count("MAIL") == 6))
            await asyncio.sleep(0.02)
            for lane in (URGENT, NORMAL, URGENT):
                assert [outcome.kind for outcome in await hand_over(relay, mail(), mail(), lane=lane)] == [A, A]
            assert not any(task.done() for task in hanging)
            for task in hanging:
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)
            await relay.close()

        asyncio.run(fly())
        assert {one.recipient for one in server.accepted} == {"ada@acme.example"}


@contextmanager
def measured() -> Iterator[Callable[[], int]]:
    """The most memory that was allocated at once within the block, in bytes."""
    tracemalloc.start()
    most = 0
    try:
        yield lambda: most
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


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


def test_nothing_is_left_open_after_a_relay_was_closed(server: SmtpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "BACKOFF_SECONDS", (0.0,))
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
