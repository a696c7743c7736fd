"""The relays: connections and their limits, failover, and when a failing relay is tried again.

aiosmtplib connects, negotiates TLS, says EHLO and authenticates; only this module knows it. After that the connection
belongs to `worker.transaction`, which speaks the mail transaction itself. All errors of the library are translated
here, once:

    RelayError
    +-- RelayUnavailable   nothing can be handed over now: a connection failed, the relay said "later" (421)
    +-- RelayMisconfigured a person must act: TLS refused or wrong, credentials refused or missing, no relay

What became of one mail is an `Outcome`, never an exception.
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NoReturn, cast

import aiosmtplib

from worker import logs
from worker.replies import About, Kind, Outcome, acceptance, printable
from worker.settings import RelaySettings
from worker.transaction import NEEDS_8BITMIME, WITHDRAWN, Channel, Envelope, Gate, Mail

__all__ = [
    "About",
    "Channel",
    "Envelope",
    "Gate",
    "Kind",
    "Outcome",
    "Places",
    "Relay",
    "RelayError",
    "RelayMisconfigured",
    "RelayUnavailable",
    "Relays",
]

logger = logs.get(__name__)

CONNECT_SECONDS = 30.0
#: For each step until a connection is ready: TCP and banner, EHLO, STARTTLS, AUTH.
READY_SECONDS = 60.0
#: For all of these steps together.
IDLE_SECONDS = 20.0
#: A pooled connection that rested longer is closed: relays drop idle ones, often without a word.
BACKOFF_SECONDS = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)
#: How long a relay that failed is left alone, by failures in a row.
ASIDE_SECONDS = 1.0
#: How long who was told "too many connections" waits for one of ours before it asks for another again.
STRIKES = 3
#: So many transactions lost in a row, with no mail accepted between them, and the relay is left alone.


class RelayError(Exception):
    """Nothing was handed over; the message is one sentence with the relay's name and its words."""


class RelayUnavailable(RelayError):  # noqa: N818 - reads as the sentence it is
    """Nothing can be handed over now: it will be tried again by itself."""


class RelayMisconfigured(RelayError):  # noqa: N818 - reads as the sentence it is
    """Nothing can be handed over until a person changes a setting; it is still tried again, seldom."""


class _Crowded(RelayUnavailable):
    """The relay takes no further connection of ours (R18); those that are open may go on."""


# ---------------------------------------------------------------- limits


@dataclass(slots=True)
class Places:
    """The connections of one worker process, shared by its lanes: one is kept free for each other lane.

    The limit falls by one when the relay says that we have too many, and grows back with the mails that it accepts.
    """

    total: int
    lanes: int
    limit: float = 0.0  # as it stands now, at most `total`
    _taken: Counter[int] = field(default_factory=Counter)
    _waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.limit = float(self.total)

    @asynccontextmanager
    async def one(self, lane: int) -> AsyncIterator[None]:
        """Hold a place for as long as the block lasts."""
        await self._take(lane)
        try:
            yield
        finally:
            self._give(lane)

    @asynccontextmanager
    async def aside(self, lane: int) -> AsyncIterator[None]:
        """Within `one`: leave the place to others for as long as the block lasts, then wait for one again."""
        self._give(lane)
        taken = False
        try:
            yield
            await self._take(lane)
            taken = True
        finally:
            if not taken:
                self._taken[lane] += 1  # for `one`, which ends now and gives it back

    def shrink(self) -> bool:
        """One fewer, but never fewer than one for each lane that is at work; whether there was one to spare."""
        before, at_work = self.limit, sum(count > 0 for count in self._taken.values())
        self.limit = min(before, max(1.0, float(at_work), before - 1.0))
        return self.limit < before

    def grow(self, mails: int = 1) -> None:
        """Mails were accepted: after as many as there are connections, one more is tried."""
        for _ in range(mails):
            if self.limit >= self.total:
                return
            self.limit = min(float(self.total), self.limit + 1.0 / self.limit)
            self._hand_out()

    async def _take(self, lane: int) -> None:
        if self._free(lane):
            self._taken[lane] += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append((lane, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._give(lane)  # it was handed over at the same moment
            raise
        finally:
            self._waiting.remove((lane, waiter))

    def _give(self, lane: int) -> None:
        self._taken[lane] -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        for lane, waiter in self._waiting:
            if not waiter.done() and self._free(lane):
                self._taken[lane] += 1
                waiter.set_result(None)

    def _free(self, lane: int) -> bool:
        taken, limit = sum(self._taken.values()), int(self.limit)
        if not self._taken[lane]:
            return taken < limit
        others_without = self.lanes - sum(count > 0 for count in self._taken.values())
        return taken + 1 + others_without <= limit


@dataclass(slots=True)
class Breaker:
    """Whether a relay may be tried: closed (yes), open (not before a time), then half-open (by one flight only)."""

    openings: int = 0  # in a row; 0 = closed
    until: float = 0.0  # on the loop's clock
    strikes: int = 0  # transactions lost since a mail was accepted
    _probe: object | None = None  # the flight that tries, while half-open

    @property
    def ready(self) -> bool:
        """Whether a flight may begin now."""
        return not self.openings or (self._probe is None and asyncio.get_running_loop().time() >= self.until)

    def enter(self, flight: object) -> bool:
        """Whether this flight may go on to a connection; the first one while half-open becomes the probe."""
        if self.openings and self._probe is not flight:
            if not self.ready:
                return False
            self._probe = flight
        return True

    def leave(self, flight: object) -> None:
        """A flight ended; where it was the probe and learned nothing, the next one tries."""
        if self._probe is flight:
            self._probe = None

    def probes(self, flight: object) -> bool:
        """Whether this flight is the one that tries."""
        return self._probe is flight

    def open(self, *, longest: bool) -> float:
        """Something failed: leave the relay alone for a while; how many seconds. What fails meanwhile adds nothing."""
        now = asyncio.get_running_loop().time()
        if not self.openings or now >= self.until:
            self.openings += 1
        elif not longest:
            return self.until - now
        step = -1 if longest else min(self.openings, len(BACKOFF_SECONDS)) - 1
        seconds = BACKOFF_SECONDS[step] * random.uniform(1.0, 1.1)  # noqa: S311 - spreads the workers' attempts
        self.until, self.strikes, self._probe = now + seconds, 0, None
        return seconds

    def close(self) -> None:
        """The relay works."""
        self.openings, self.strikes, self._probe = 0, 0, None


# ---------------------------------------------------------------- one relay


class Relay:
    """One relay with its pooled connections."""

    def __init__(self, settings: RelaySettings, *, host_name: str, lanes: int = 3) -> None:
        self.settings = settings
        self.name = settings.name
        self.paused = False
        self.problem: str | None = None
        """Why it is not used, while its breaker is not closed: what an operator is told."""
        self.offers: frozenset[str] = frozenset()
        """What it said to the last EHLO, lower case ("chunking"); nothing before the first connection."""
        self._host_name = host_name
        self._places = Places(settings.connections, lanes)
        self._breaker = Breaker()
        self._resting: list[Channel] = []
        self._busy: set[Channel] = set()
        self._connecting = 0
        self._aside: deque[asyncio.Future[None]] = deque()  # who waits for a connection to come to rest
        self._context: ssl.SSLContext | None = None

    @property
    def ready(self) -> bool:
        """Whether it may be tried now."""
        return not self.paused and self._breaker.ready

    @property
    def works(self) -> bool:
        """Whether nothing keeps it from being tried; it may be asked on any thread."""
        return not self.paused and not self._breaker.openings

    async def send(
        self,
        envelopes: Iterable[Envelope],
        *,
        lane: int,
        done: Callable[[int, Outcome], None],
        took: Callable[[Sequence[int], Sequence[str]], None] | None = None,
        gate: Gate | None = None,
    ) -> None:
        """Hand a flight over on one connection; `done(i, outcome)` is called as each mail is answered, not by number.

        First there is a connection, and `offers` is known; then `envelopes` are taken, one by one, as room arises, and
        `done` is called once for each; or `took` for several that were accepted at once, with the relay's replies, in
        place of `done`. `gate` limits those in flight. Raises `RelayError` where no connection could be
        had or the relay takes nothing from us, and what `envelopes` raises, once those in flight are answered: `done`
        was not called for the mails that remain, whether taken or not, and nothing of them was sent.
        """
        flight = _Flight(self, iter(envelopes), done, gate, took)
        async with self._places.one(lane):
            channel: Channel | None = None
            try:
                while channel is None or await flight.ready():
                    if channel is None or not channel.usable:
                        channel = await self._channel(flight, lane, fresh=flight.begins_again())
                    await channel.carry(flight)
                if flight.error is not None:
                    raise flight.error
            finally:
                self._breaker.leave(flight)
                if channel is not None:
                    self._rest(channel)

    async def connect(self) -> Channel:
        """A new connection, ready for mail. Raises `RelayError`."""
        settings = self.settings
        client = aiosmtplib.SMTP(
            hostname=settings.host,
            port=settings.port,
            local_hostname=self._host_name,
            timeout=CONNECT_SECONDS,
            use_tls=settings.implicit_tls,
            start_tls=False,
            tls_context=self._tls_context(),
        )
        try:
            async with asyncio.timeout(READY_SECONDS):
                await client.connect()
                began = asyncio.get_running_loop().time()
                await client.ehlo()
                round_trip = asyncio.get_running_loop().time() - began
                if not settings.implicit_tls and (
                    settings.tls == "required"
                    or (settings.tls == "opportunistic" and client.supports_extension("starttls"))
                ):
                    await client.starttls()
                    await client.ehlo()
                if settings.user is not None:
                    self._password_is_safe(client)
                    await client.login(settings.user, str(settings.password or ""))
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            _abort(client)
            _translate(self.name, settings, error)
        except BaseException:
            _abort(client)
            raise
        extensions = {name.lower(): value for name, value in client.esmtp_extensions.items()}
        self.offers = frozenset(extensions)
        size = extensions.get("size", "")
        channel = Channel(
            cast("asyncio.Transport", client.transport),
            extensions=self.offers,
            size=int(size) if size.isdecimal() else 0,
            round_trip=round_trip,
        )
        # aiosmtplib closes what it believes to hold when it is collected: the connection is the channel's now.
        client.transport = client.protocol = None
        return channel

    def _password_is_safe(self, client: aiosmtplib.SMTP) -> None:
        """A password crosses no network in the clear that the settings did not allow (`tls=none` did)."""
        encrypted = client.get_transport_info("sslcontext") is not None
        if not encrypted and self.settings.tls == "opportunistic" and not self.settings.loopback:
            message = f"the relay {self.name} offers no TLS and would get the password in the clear: use tls=required"
            raise RelayMisconfigured(message)

    def _tls_context(self) -> ssl.SSLContext | None:
        """Made once and after failures: reading the machine's authorities takes some 20 ms."""
        if self._context is None and (self.settings.implicit_tls or self.settings.tls != "none"):
            self._context = _tls_context(self.settings)
        return self._context

    # ------------------------------------------------------------ which connection

    async def _channel(self, flight: object, lane: int, *, fresh: bool) -> Channel:
        """A connection for a flight, `fresh` or rested. Raises `RelayError`."""
        while True:
            if not self._breaker.enter(flight):
                raise RelayUnavailable(self.problem or f"the relay {self.name} is tried by another mail first")
            rested = None if fresh else self._rested()
            if rested is not None:
                self._busy.add(rested)
                return rested
            try:
                self._connecting += 1
                try:
                    channel = await self.connect()
                finally:
                    self._connecting -= 1
            except _Crowded as error:
                if not self._others_are_open():
                    self._failed(error)
                    raise
                self._places.shrink()
                await self._step_aside(lane)
                fresh = False
            except RelayError as error:
                self._failed(error)
                raise
            else:
                logger.debug("relay.connected", relay=self.name)
                self._busy.add(channel)
                return channel

    def _rested(self) -> Channel | None:
        now = asyncio.get_running_loop().time()
        while self._resting:
            channel = self._resting.pop()
            if channel.usable and now - channel.rested_since < IDLE_SECONDS:
                return channel
            channel.close()
        return None

    def _rest(self, channel: Channel) -> None:
        """A flight ended: its connection waits for the next one."""
        self._busy = {one for one in self._busy if one is not channel and one.usable}
        if channel.usable:
            self._resting.append(channel)
        while self._aside:
            waiter = self._aside.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _others_are_open(self) -> bool:
        return self._connecting > 0 or any(one.usable for one in (*self._busy, *self._resting))

    async def _step_aside(self, lane: int) -> None:
        """Leave the place to the connections that work, until one of them comes to rest, or for a second."""
        waiter = asyncio.get_running_loop().create_future()
        self._aside.append(waiter)
        async with self._places.aside(lane):
            with suppress(TimeoutError):
                async with asyncio.timeout(ASIDE_SECONDS):
                    await waiter

    # ------------------------------------------------------------ what is learned of the relay

    def accepted(self, mails: int = 1) -> None:
        """It took so many mails."""
        self._places.grow(mails)
        if self._breaker.openings or self._breaker.strikes:
            self._works()

    def refused(self, flight: object, outcome: Outcome) -> None:
        """It did not take a mail. Raises `RelayMisconfigured` where it takes nothing from us."""
        if outcome.about is not About.RELAY:
            if self._breaker.probes(flight):
                self._works()
        elif outcome.kind is Kind.PERMANENT:
            message = f"the relay {self.name} takes no mail from us ({outcome.reply}): correct ROLECAST_RELAY_URLS"
            error = RelayMisconfigured(message)
            self._failed(error)
            raise error
        else:
            self._struck(flight, outcome)

    def _struck(self, flight: object, outcome: Outcome) -> None:
        enough = outcome.code // 100 == 4 and (outcome.code != 421 or _CROWDED.search(outcome.text) is not None)
        if enough and self._others_are_open() and self._places.shrink():
            return
        self._breaker.strikes += 1
        if self._breaker.strikes >= STRIKES or self._breaker.probes(flight):
            message = f"the relay {self.name} ends or loses the connection at each mail ({outcome.reply})"
            self._failed(RelayUnavailable(message))

    def _works(self) -> None:
        if self._breaker.openings:
            logger.info("relay.usable", relay=self.name)
        self._breaker.close()
        self.problem = None

    def _failed(self, error: RelayError) -> None:
        wait = self._breaker.open(longest=isinstance(error, RelayMisconfigured))
        self._context = None
        if self.problem != str(error):
            seconds = round(wait, 1)
            logger.warning("relay.unusable", relay=self.name, why=str(error), tried_again_in_seconds=seconds)
        self.problem = str(error)

    async def close(self) -> None:
        """End every resting connection."""
        closing, self._resting = self._resting, []
        for channel in closing:
            channel.close()
        await asyncio.gather(*(channel.gone() for channel in closing))
        await asyncio.sleep(0)


class _Flight:
    """The mails of one `send`, as its connections take them: a `transaction.Cargo`."""

    def __init__(
        self,
        relay: Relay,
        envelopes: Iterator[Envelope],
        done: Callable[[int, Outcome], None],
        gate: Gate | None,
        took: Callable[[Sequence[int], Sequence[str]], None] | None = None,
    ) -> None:
        self.error: Exception | None = None
        """Why no more mails are begun: the relay takes nothing from us, or who makes them failed."""
        self._relay = relay
        self._envelopes = envelopes
        self._done = done
        self._took = took
        self._gate = gate
        self._next: deque[Mail] = deque()  # taken from the envelopes, and not begun, or to be begun again
        self._again = False  # the session ended before a mail that it had begun
        self._struck = False  # this connection ended: what that does to further mails tells nothing new
        self._taken = 0
        self._exhausted = False

    async def ready(self) -> bool:
        """Wait until there is a mail that may be begun; False where there are no more."""
        while not self._next and not self._exhausted and self.error is None:
            if mails := self.take(1):
                self._next.extend(mails)
            elif self._gate is not None and not self._exhausted:
                await self._gate.room()
        return bool(self._next) and self.error is None

    def take(self, wanted: int) -> list[Mail]:
        """At most so many that may be begun now; one that goes alone is the last of them."""
        mails: list[Mail] = []
        while self._next and len(mails) < wanted:
            mails.append(self._next.popleft())
            if mails[-1].envelope.alone:
                return mails
        wanted -= len(mails)
        if not wanted or self._exhausted or self.error is not None:
            return mails
        granted = wanted if self._gate is None else self._gate.take(wanted)
        before = self._taken
        try:
            for envelope in islice(self._envelopes, granted):
                mails.append(Mail(self._taken, envelope))
                self._taken += 1
                if envelope.alone:
                    break
            else:
                self._exhausted = self._taken < before + granted
        except Exception as error:  # noqa: BLE001 - raised by `send`, once the mails in flight are answered
            self.error = error
        return mails

    def put_back(self, mail: Mail) -> None:
        """One that was taken and not begun is the next again."""
        self._next.appendleft(mail)

    def done(self, mail: Mail, outcome: Outcome) -> None:
        """What became of a mail: the relay is judged by it, and who sends it is told.

        A mail before which a connection had ended, one that rested or carried others, goes again on a fresh one: that
        says nothing of this mail.
        """
        if outcome.kind is Kind.ACCEPTED:
            self._relay.accepted()
        elif mail.follows and _ended_before(outcome):
            self._next.append(mail)
            self._again = True
            return
        elif outcome is not WITHDRAWN and outcome is not NEEDS_8BITMIME:
            try:
                if outcome.about is not About.RELAY or outcome.kind is Kind.PERMANENT or not self._struck:
                    self._relay.refused(self, outcome)
            except RelayError as error:
                self.error = error
                return
            self._struck = self._struck or outcome.about is About.RELAY
        self._done(mail.number, outcome)

    def accepted(self, mails: Sequence[Mail], replies: Sequence[str]) -> None:
        """The same of several that were accepted."""
        self._relay.accepted(len(mails))
        if self._took is not None:
            self._took([mail.number for mail in mails], replies)
            return
        for mail, reply in zip(mails, replies, strict=True):
            self._done(mail.number, acceptance(reply))

    def begins_again(self) -> bool:
        """Before a connection is had: whether it must be a fresh one."""
        fresh, self._again, self._struck = self._again, False, False
        return fresh


class Relays:
    """The relays in order of preference: a later one is used while the earlier ones fail."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self.all = tuple(relays)

    @property
    def connections(self) -> int:
        """How many connections the preferred relay may have in this process."""
        return self.all[0].settings.connections if self.all else 0

    def choose(self) -> Relay:
        """The first relay that may be tried now. Raises `RelayError` where there is none."""
        for relay in self.all:
            if relay.ready:
                return relay
        if not self.all:
            message = "no relay is configured: set ROLECAST_RELAY_URLS; until then mail waits"
            raise RelayMisconfigured(message)
        message = "; ".join(f"{one.name} is paused" if one.paused else str(one.problem) for one in self.all)
        raise RelayUnavailable(message)

    async def close(self) -> None:
        """End every resting connection."""
        for relay in self.all:
            await relay.close()


def _tls_context(settings: RelaySettings) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.tls == "opportunistic" and not settings.implicit_tls:
        # Opportunistic: any encryption is better than none, so a wrong certificate does not send it in the clear.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _ended_before(outcome: Outcome) -> bool:
    """Whether the answer to MAIL, or its absence, shows that the session had ended before."""
    lost = outcome.about is About.RELAY and (outcome.code in {0, 421} or outcome.kind is Kind.PERMANENT)
    return lost and outcome.stage == "mail" and outcome is not NEEDS_8BITMIME


def _abort(client: aiosmtplib.SMTP) -> None:
    """End an unready connection at once: a polite end of TLS would wait for a relay that hangs."""
    if client.transport is not None:
        cast("asyncio.Transport", client.transport).abort()
    client.close()


_CROWDED = re.compile(r"too many (?:[\w-]+ ){0,3}(?:connections|sessions)", re.IGNORECASE)


def _translate(name: str, settings: RelaySettings, error: Exception) -> NoReturn:
    """The library's errors, sorted by who can help; the most specific first."""
    said = "no answer in time" if type(error) is TimeoutError else str(getattr(error, "message", error))
    said = printable((said or type(error).__name__).encode("utf-8", "backslashreplace"))[:300]
    code = getattr(error, "code", None)
    if code == 421 or (code is not None and _CROWDED.search(said)):
        message = f"the relay {name} can't be used now ({code} {said})"
        raise _Crowded(message) from error
    if code is not None and code // 100 == 4:  # said for now, at whatever stage (454 to AUTH: RFC 4954, 4.7.9)
        message = f"the relay {name} can't be used now ({code} {said})"
        raise RelayUnavailable(message) from error
    if isinstance(error, aiosmtplib.SMTPAuthenticationError) or code in {530, 534, 535, 538}:
        message = f"the relay {name} refused the user or password ({said}): correct them in ROLECAST_RELAY_URLS"
        raise RelayMisconfigured(message) from error
    if "WRONG_VERSION_NUMBER" in said:
        message = f"the relay {name} speaks no TLS on this port ({said}): use smtp:// for STARTTLS, or correct the port"
        raise RelayMisconfigured(message) from error
    if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError) or "certificate" in said.lower():
        message = f"the relay {name} has no certificate that this machine trusts ({said}): correct the host name or it"
        raise RelayMisconfigured(message) from error
    if settings.tls == "required" and "starttls" in said.lower():
        message = f"the relay {name} does not offer TLS ({said}): use tls=opportunistic only if its network is yours"
        raise RelayMisconfigured(message) from error
    if isinstance(error, aiosmtplib.SMTPException) and "auth" in said.lower() and settings.user:
        message = f"the relay {name} takes no user and password here ({said}): correct ROLECAST_RELAY_URLS"
        raise RelayMisconfigured(message) from error
    message = f"the relay {name} can't be used now ({code or ''} {said})".replace("( ", "(")
    raise RelayUnavailable(message) from error
