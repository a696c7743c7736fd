"""Everything that can be configured, read once at start into one typed object (contract, section 2).

Environment `ROLECAST_*` wins over `rolecast.toml`, which wins over the defaults. `NAME_FILE` reads a value from a
file. An unknown name, or a value that does not parse, raises `SettingsError`: one line naming it and the remedy.
Secrets are `Secret`s: they show as stars wherever settings are listed, and no error shows them.
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from email.utils import parseaddr
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from subscriptions.addresses import BadAddress, as_written, normalise

PREFIX = "ROLECAST_"
CLASSES = ("promotional", "informational", "operational", "transactional", "approval", "security")
#: The classes that are mailed: contract section 2 has a sender for each.

DELIVERY_MODES = ("test", "team", "live")
#: From the strictest to the freest.


SHORTEST_KEY = 16
#: Characters of a key that signs links.

SLOWEST_RATE = 0.001
#: Mails a second: a slower one would be a mistake rather than a limit.


class SettingsError(Exception):
    """A setting is unknown or can't be read; the message is one line naming it, its value and the remedy."""


class Secret(str):
    """A value that does not show itself where settings are listed: its `repr` is stars, `str` gives it away."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """One relay of `ROLECAST_RELAY_URLS`."""

    host: str
    port: int
    implicit_tls: bool  # smtps://
    tls: Literal["required", "opportunistic", "none"]
    user: str | None
    password: Secret | None
    connections: int  # the limit of one worker process, all lanes together
    rate: float  # mails a second, of the installation; 0 = no limit
    daily: int = 0  # mails a UTC day, of the installation; 0 = no limit
    warmup: int = 0  # days until `daily` is reached: it doubles each day until then

    @property
    def name(self) -> str:
        """How the relay is called in the ledger, in logs and in `pause --relay`: `host:port`."""
        return f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether the relay is on this machine."""
        return is_loopback(self.host)


@dataclass(frozen=True, slots=True)
class Team:
    """Whom `team` mode may mail: addresses and domains, normalised."""

    addresses: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()

    def __contains__(self, address: str) -> bool:
        """Whether a normalised address belongs to the team."""
        return address in self.addresses or address.rpartition("@")[2] in self.domains


@dataclass(frozen=True, slots=True)
class DomainRate:
    """How many mails a second the installation sends to the addresses of one domain."""

    domain: str  # as normalised addresses have it: A-labels
    rate: float

    def __str__(self) -> str:
        return f"{self.domain}={self.rate:g}"


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting, typed; the defaults are the contract's."""

    database_url: Secret = Secret("sqlite:///rolecast.db")
    broker_url: Secret = Secret("memory://")
    relay_urls: tuple[RelaySettings, ...] = ()
    allow_plaintext: bool = False
    delivery: Literal["live", "team", "test"] = "live"
    team: Team = Team()
    sender: str | None = None
    sender_promotional: str | None = None
    sender_informational: str | None = None
    sender_operational: str | None = None
    sender_transactional: str | None = None
    sender_approval: str | None = None
    sender_security: str | None = None
    reply_to: str | None = None
    reply_to_promotional: str | None = None
    reply_to_informational: str | None = None
    reply_to_operational: str | None = None
    reply_to_transactional: str | None = None
    reply_to_approval: str | None = None
    reply_to_security: str | None = None
    bounce_domain: str | None = None
    public_url: str = "http://127.0.0.1:8080"
    listen: tuple[str, int] = ("127.0.0.1", 8080)
    status_page_url: str | None = None
    status_page_feed_url: str | None = None
    status_page_every: int = 60
    status_page_feed_allow: frozenset[str] = frozenset()
    catalogues: tuple[str, ...] = ("billtrust", "issuetrak")
    templates_dir: Path | None = None
    secret_keys: tuple[Secret, ...] = ()
    operators: tuple[str, ...] = ()
    log_format: Literal["console", "json"] | None = None
    lease_seconds: int = 30
    retry_minutes: tuple[int, ...] = (1, 5, 15, 30, 60, 120, 240)
    retry_minutes_promotional: tuple[int, ...] | None = None
    retry_minutes_informational: tuple[int, ...] | None = None
    retry_minutes_operational: tuple[int, ...] | None = None
    retry_minutes_transactional: tuple[int, ...] | None = None
    retry_minutes_approval: tuple[int, ...] | None = None
    retry_minutes_security: tuple[int, ...] | None = None
    give_up_hours: int = 96
    give_up_hours_promotional: int | None = None
    give_up_hours_informational: int | None = None
    give_up_hours_operational: int | None = None
    give_up_hours_transactional: int | None = None
    give_up_hours_approval: int | None = None
    give_up_hours_security: int | None = None
    domain_rates: tuple[DomainRate, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)  # name -> where its value came from

    def sender_of(self, class_: str) -> str | None:
        """`Name <address>` that mails of a class come from; None where none is configured."""
        specific: str | None = getattr(self, f"sender_{class_}", None)
        return specific or self.sender

    def reply_to_of(self, class_: str) -> str | None:
        """Where answers to mails of a class go; None means to the sender."""
        specific: str | None = getattr(self, f"reply_to_{class_}", None)
        return specific or self.reply_to

    def bounce_domain_of(self, class_: str) -> str | None:
        """The domain of the envelope senders of a class."""
        if self.bounce_domain:
            return self.bounce_domain
        sender = self.sender_of(class_)
        return domain_of(sender) if sender else None

    def retry_minutes_of(self, class_: str) -> tuple[int, ...]:
        """How long a mail of a class that was refused for now waits, by attempts made; the last one repeats."""
        specific: tuple[int, ...] | None = getattr(self, f"retry_minutes_{class_}", None)
        return specific or self.retry_minutes

    def give_up_hours_of(self, class_: str) -> int:
        """How long a mail of a class is tried, from when it was first owed."""
        specific: int | None = getattr(self, f"give_up_hours_{class_}", None)
        return specific or self.give_up_hours

    @property
    def public_host(self) -> str:
        """The authority (host and port) of `public_url`."""
        return urlsplit(self.public_url).netloc

    @property
    def links_work(self) -> bool:
        """Whether links in mails can work: https, or loopback where every relay is on loopback too."""
        parts = urlsplit(self.public_url)
        if parts.scheme == "https":
            return True
        return is_loopback(parts.hostname or "") and all(relay.loopback for relay in self.relay_urls)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=64)
def domain_of(sender: str) -> str:
    """The domain (A-labels) of `Name <address>`."""
    return normalise(parseaddr(sender)[1]).rpartition("@")[2]


def load(environment: Mapping[str, str], *, config: Path | None = None, folder: Path | None = None) -> Settings:
    """The settings out of the environment, over a TOML file, over the defaults.

    `config` is the file of `--config` (must exist); without it `rolecast.toml` in `folder` is read where there is one.
    Raises `SettingsError`.
    """
    raw: dict[str, tuple[Any, str]] = {}
    path = config or ((folder or Path()) / "rolecast.toml")
    if config is not None or path.exists():
        raw.update(_from_file(path))
    raw.update(_from_environment(environment))
    values: dict[str, Any] = {}
    for name, (value, source) in raw.items():
        values[name] = _parsed(name, value, source)
    sources = {name: source for name, (_, source) in raw.items()}
    settings = Settings(**values, sources=sources)
    _check_together(settings)
    return settings


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name.endswith("_file") and name not in _PARSERS:
            name = name.removesuffix("_file")
            _known(name, variable)
            if variable.removesuffix("_FILE") in environment:
                message = f"{variable} and {variable.removesuffix('_FILE')} are both set: keep one of them"
                raise SettingsError(message)
            try:
                value = Path(value).read_text(encoding="utf-8").strip()  # noqa: PLW2901 - the file's content is the value
            except (OSError, UnicodeDecodeError) as error:
                message = f"{variable} names {value!r}, which can't be read ({error}): give a readable text file"
                raise SettingsError(message) from error
        _known(name, variable)
        found[name] = (value, variable)
    return found


def _from_file(path: Path) -> dict[str, tuple[Any, str]]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        message = f"the settings file {path} can't be read: {error}"
        raise SettingsError(message) from error
    except tomllib.TOMLDecodeError as error:
        message = f"the settings file {path} is not TOML: {error}"
        raise SettingsError(message) from error
    for name in document:
        _known(name, f"{name} in {path}")
    return {name: (value, f"{name} in {path}") for name, value in document.items()}


def _known(name: str, shown: str) -> None:
    if name in _PARSERS:
        return
    near = difflib.get_close_matches(name, _PARSERS, n=1)
    written = PREFIX + near[0].upper() if near and shown.startswith(PREFIX) else (near[0] if near else "")
    hint = f": did you mean {written}?" if near else ": remove it, or see `rolecast config show` for those there are"
    message = f"{shown} is not a setting that Rolecast knows{hint}"
    raise SettingsError(message)


def _parsed(name: str, value: Any, source: str) -> Any:
    try:
        return _PARSERS[name](value)
    except (ValueError, BadAddress) as error:
        shown = "***" if name in _SECRET else repr(value)
        message = f"{source} has the value {shown}: {error}"
        raise SettingsError(message) from error


def _check_together(settings: Settings) -> None:
    for relay in settings.relay_urls:
        if relay.tls == "none" and not relay.implicit_tls and not relay.loopback and not settings.allow_plaintext:
            message = (
                f"ROLECAST_RELAY_URLS: {relay.name} has tls=none and is not on this machine: use tls=required, "
                "or set ROLECAST_ALLOW_PLAINTEXT=1 if its network is yours"
            )
            raise SettingsError(message)
    if settings.delivery == "team" and not (settings.team.addresses or settings.team.domains):
        message = "ROLECAST_DELIVERY is 'team', but ROLECAST_TEAM names nobody: list addresses or @domains in it"
        raise SettingsError(message)


# ---------------------------------------------------------------- one parser per kind of value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        message = "give a text that is not empty"
        raise ValueError(message)
    return value.strip()


def _secret(value: Any) -> Secret:
    return Secret(_text(value))


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if isinstance(value, str) and value.strip().lower() in known:
        return known[value.strip().lower()]
    message = "give 1 or 0"
    raise ValueError(message)


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = low - 1
        if isinstance(value, str) and not _digits(value.strip()):  # int() also takes 1_0 and the digits of all scripts
            number = low - 1
        if isinstance(value, bool | float) or not low <= number <= high:
            message = f"give a whole number from {low} to {high}"
            raise ValueError(message)
        return number

    return parse


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            message = f"give one of {', '.join(choices)}"
            raise ValueError(message)
        return str(value)

    return parse


def _list(value: Any, separator: str | None = ",") -> list[str]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(separator) if part.strip()]
    if isinstance(value, Sequence) and all(isinstance(part, str) for part in value):
        return [str(part) for part in value]
    message = "give a list of texts"
    raise ValueError(message)


def _addresses(value: Any) -> tuple[str, ...]:
    return tuple(as_written(part) for part in _list(value))


def _team(value: Any) -> Team:
    parts = _list(value)
    return Team(
        addresses=frozenset(normalise(part) for part in parts if not part.startswith("@")),
        domains=frozenset(normalise("x" + part).rpartition("@")[2] for part in parts if part.startswith("@")),
    )


def _sender(value: Any) -> str:
    text = _text(value)
    name, address = parseaddr(text)
    if "@" not in address or any(ord(letter) < 32 for letter in text):
        message = (
            "give `Name <address>`, such as `Acme Support <support@acme.example>`; "
            'a name with a comma, a dot or the like stands in quotation marks: `"Acme, Inc." <support@acme.example>`'
        )
        raise ValueError(message)
    checked = as_written(address)
    if any(letter in name for letter in '()<>@,:;.[]"\\'):  # it must be read again as it was written
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{quoted}" <{checked}>'
    return f"{name} <{checked}>" if name else checked


def _domain(value: Any) -> str:
    return normalise("x@" + _text(value)).rpartition("@")[2]


def _web_url(value: Any) -> str:
    text = _text(value).rstrip("/")
    parts = _split(text)
    if (
        parts is None
        or parts.scheme not in {"http", "https"}
        or not parts.hostname
        or parts.username
        or parts.query
        or parts.fragment
    ):
        message = "give an http or https address, such as https://notify.acme.example"
        raise ValueError(message)
    return text


def _split(text: str) -> SplitResult | None:
    """The parts of an address; None where it is none, or its port is no port."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    return None if port == 0 else parts


def _page_url(value: Any) -> str:
    """A page's address, as written: it is answered and printed, and nothing is put behind it."""
    _web_url(value)
    return _text(value)


def _feed_url(value: Any) -> str:
    text = _text(value)
    parts = _split(text)
    if (
        parts is None
        or parts.scheme not in {"http", "https", "file"}
        or (parts.scheme != "file" and not parts.hostname)
    ):
        message = "give the https address of an Atom or RSS feed"
        raise ValueError(message)
    return text


def _listen(value: Any) -> tuple[str, int]:
    host, colon, port = _text(value).rpartition(":")
    if not colon or not port.isdecimal() or not host or int(port) > 65535:
        message = "give HOST:PORT, such as 127.0.0.1:8080 (port 0 takes a free one)"
        raise ValueError(message)
    return host.strip("[]"), int(port)


def _path(value: Any) -> Path:
    path = Path(_text(value))
    if not path.is_dir():
        message = "it is not a folder: give one that exists"
        raise ValueError(message)
    return path


def _database_url(value: Any) -> Secret:
    text = _text(value)
    if not text.startswith(("sqlite:///", "postgresql://", "postgres://")):
        message = "give sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME"
        raise ValueError(message)
    if not text.startswith("sqlite:"):
        _check_postgresql(text)
    return Secret(text)


def _check_postgresql(text: str) -> None:
    """Refuse what libpq would not take: a wrong port, and options it does not know (if the driver is installed)."""
    from sqlalchemy.engine import URL, make_url  # it splits the URL in the end; with SQLite nothing here needs it
    from sqlalchemy.exc import ArgumentError

    try:
        parts: URL | None = make_url(text)
    except (ArgumentError, ValueError):
        parts = None
    if parts is None or not (parts.port is None or 0 < parts.port < 65536):
        message = "give postgresql://USER:PASSWORD@HOST:PORT/NAME, with a port from 1 to 65535"
        raise ValueError(message)
    options = _options(text.partition("?")[2], several=("host",))
    known = _libpq_options()
    if known is not None:
        _refuse_unknown(options, known, text.partition("?")[2], there_are="the connection parameters of libpq")
    for name in ("port", "connect_timeout"):
        if not _digits(options.get(name, "1")):
            message = f"{name} in it is a whole number"
            raise ValueError(message)


def _libpq_options() -> frozenset[str] | None:
    """The names that libpq knows; None where the driver is not installed, which opening the database tells."""
    try:
        from psycopg import pq
    except ImportError:
        return None
    return frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())


def _broker_url(value: Any) -> Secret:
    text = _text(value)
    parts = _split(text)
    if text != "memory://" and (
        parts is None
        or parts.scheme not in {"redis", "rediss", "unix"}
        or parts.fragment
        or not (parts.scheme == "unix" or _digits(parts.path.removeprefix("/") or "0"))
    ):
        message = "give memory:// or redis://HOST:PORT/NUMBER"
        raise ValueError(message)
    if parts is not None:
        _check_broker_options(parts)
    return Secret(text)


def _check_broker_options(parts: SplitResult) -> None:
    """Only the files and checks of TLS may be chosen: time-outs and retries are the broker's promises."""
    files = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
    choices = {"ssl_cert_reqs": ("required", "optional", "none"), "ssl_check_hostname": ("true", "false")}
    known = (*files, *choices) if parts.scheme == "rediss" else ()
    options = _options(parts.query)
    _refuse_unknown(options, known, parts.query, there_are=", ".join(known) if known else "none without rediss://")
    for name, given in options.items():
        if name in files and not Path(given).is_file():
            message = f"{name} in it names no file: give one that exists"
            raise ValueError(message)
        if name in choices and given not in choices[name]:
            message = f"{name} in it is one of {', '.join(choices[name])}"
            raise ValueError(message)


def _options(query: str, *, several: Sequence[str] = ()) -> dict[str, str]:
    """What stands behind the `?` of a URL, each once but for `several`. Raises `ValueError`."""
    options: dict[str, str] = {}
    for name, given in parse_qsl(query, keep_blank_values=True):
        if name in options and name not in several:
            message = f"{_option(name, query)} stands in it twice: keep one of them"
            raise ValueError(message)
        options[name] = given
    return options


def _refuse_unknown(options: Mapping[str, str], known: Collection[str], query: str, *, there_are: str) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        message = f"{_option(unknown[0], query)} is unknown: there are {there_are}"
        raise ValueError(message)


def _option(name: str, query: str) -> str:
    """An option as an error names it; a `?` in a password makes its rest look like one, and an `@` follows."""
    return f"the option {name!r}" if "@" not in query else "an option (a ? in a password is written %3F)"


def _secret_keys(value: Any) -> tuple[Secret, ...]:
    keys = tuple(Secret(part) for part in _list(value))
    if any(len(key) < SHORTEST_KEY for key in keys) or not keys:
        message = f"give keys of at least {SHORTEST_KEY} characters, such as `openssl rand -hex 32` prints"
        raise ValueError(message)
    return keys


def _feed_allow(value: Any) -> frozenset[str]:
    allowed = frozenset(_list(value))
    if not allowed <= {"file", "private"}:
        message = "give `file`, `private`, or both, separated by a comma"
        raise ValueError(message)
    return allowed


def _catalogues(value: Any) -> tuple[str, ...]:
    names = tuple(_list(value))
    if not names:
        message = "name at least one catalogue, such as billtrust"
        raise ValueError(message)
    return names


def _retry_minutes(value: Any) -> tuple[int, ...]:
    try:
        parts = value if isinstance(value, Sequence) and not isinstance(value, str) else _list(value)
        minutes = tuple(map(_whole(1, 1440), parts))
    except ValueError:
        minutes = ()
    if not minutes:
        message = "give whole minutes from 1 to 1440, separated by commas, such as 1,5,15,30,60"
        raise ValueError(message)
    for before, after in itertools.pairwise(minutes):
        if after < before:
            message = f"the minutes fall from {before} to {after}: give them in rising order, such as 1,5,15,30,60"
            raise ValueError(message)
    return minutes


def _domain_rates(value: Any) -> tuple[DomainRate, ...]:
    rates: dict[str, DomainRate] = {}
    for part in _list(value):
        domain, _, number = part.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not domain or not SLOWEST_RATE <= rate < 1e9:
            message = f"{part!r} is not DOMAIN=MAILS A SECOND, such as gmail.example=10 or slow.example=0.5"
            raise ValueError(message)
        name = _domain(domain)
        if name in rates:
            message = f"{name} stands in it twice: keep one of them"
            raise ValueError(message)
        rates[name] = DomainRate(name, rate)
    return tuple(rates.values())


def _relays(value: Any) -> tuple[RelaySettings, ...]:
    return tuple(_relay(part) for part in _list(value, separator=None))


def _relay(text: str) -> RelaySettings:
    parts = _split(text)
    if (
        parts is None
        or parts.scheme not in {"smtp", "smtps"}
        or not parts.hostname
        or parts.path not in {"", "/"}
        or parts.fragment
    ):
        message = "give smtp://[user:password@]host:port or smtps://...; several are separated by spaces"
        raise ValueError(message)
    options = _relay_options(parts)
    implicit = parts.scheme == "smtps"
    if parts.password is not None and not parts.username:
        message = "a password stands without its user: give user:password@"
        raise ValueError(message)
    daily, warmup = _whole(0, 10**9)(options.get("daily", 0)), _whole(0, 60)(options.get("warmup", 0))
    if warmup and not daily:
        message = "warmup stands without daily: give the mails a day that it leads up to, such as daily=50000&warmup=14"
        raise ValueError(message)
    return RelaySettings(
        host=parts.hostname,
        port=parts.port or (465 if implicit else 587),
        implicit_tls=implicit,
        tls=_one_of("required", "opportunistic", "none")(options.get("tls", "required")),  # type: ignore[arg-type]
        user=unquote(parts.username) if parts.username else None,
        password=Secret(unquote(parts.password)) if parts.password is not None else None,
        connections=_whole(1, 256)(options.get("connections", 8)),
        rate=_rate(options.get("rate", "0")),
        daily=daily,
        warmup=warmup,
    )


def _relay_options(parts: SplitResult) -> dict[str, str]:
    options = _options(parts.query)
    known = ("tls", "connections", "rate", "daily", "warmup")
    _refuse_unknown(options, known, parts.query, there_are="tls, connections, rate, daily and warmup")
    return options


def _rate(value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = -1.0
    if rate != 0 and not SLOWEST_RATE <= rate < 1e9:
        message = f"rate is mails a second: give 0 (no limit) or a number from {SLOWEST_RATE}"
        raise ValueError(message)
    return rate


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "database_url": _database_url,
    "broker_url": _broker_url,
    "relay_urls": _relays,
    "allow_plaintext": _flag,
    "delivery": _one_of(*DELIVERY_MODES),
    "team": _team,
    "sender": _sender,
    **{f"sender_{name}": _sender for name in CLASSES},
    "reply_to": _sender,
    **{f"reply_to_{name}": _sender for name in CLASSES},
    "bounce_domain": _domain,
    "public_url": _web_url,
    "listen": _listen,
    "status_page_url": _page_url,
    "status_page_feed_url": _feed_url,
    "status_page_every": _whole(5, 86400),
    "status_page_feed_allow": _feed_allow,
    "catalogues": _catalogues,
    "templates_dir": _path,
    "secret_keys": _secret_keys,
    "operators": _addresses,
    "log_format": _one_of("console", "json"),
    "lease_seconds": _whole(1, 3600),
    "retry_minutes": _retry_minutes,
    **{f"retry_minutes_{name}": _retry_minutes for name in CLASSES},
    "give_up_hours": _whole(1, 720),
    **{f"give_up_hours_{name}": _whole(1, 720) for name in CLASSES},
    "domain_rates": _domain_rates,
}
_SECRET = {"database_url", "broker_url", "relay_urls", "secret_keys"}

NAMES = tuple(name.name for name in fields(Settings) if name.name != "sources")
#: Every setting's name, in the order of the contract: `ROLECAST_` and capitals in the environment.
