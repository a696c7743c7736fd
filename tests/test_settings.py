"""Settings: each parses from the environment, from TOML and from a file; each wrong value is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worker.settings import (
    CLASSES,
    NAMES,
    DomainRate,
    RelaySettings,
    Secret,
    Settings,
    SettingsError,
    Team,
    domain_of,
    is_loopback,
    load,
)

KEY = "0123456789abcdef0123456789abcdef"
RELAY = RelaySettings(
    host="relay.test",
    port=2525,
    implicit_tls=False,
    tls="opportunistic",
    user="an na",
    password=Secret("p@ss:w/rd"),
    connections=4,
    rate=2.5,
    daily=5000,
    warmup=14,
)
RELAY_URL = (
    "smtp://an%20na:p%40ss%3Aw%2Frd@relay.test:2525?tls=opportunistic&connections=4&rate=2.5&daily=5000&warmup=14"
)

GOOD: list[tuple[str, Any, Any]] = [
    # name, as written in TOML (the environment has the text of it), as it is read
    ("database_url", "postgresql://u:p@db.test/rolecast", "postgresql://u:p@db.test/rolecast"),
    ("broker_url", "redis://redis.test:6379/1", "redis://redis.test:6379/1"),
    ("relay_urls", [RELAY_URL], (RELAY,)),
    ("allow_plaintext", True, True),
    ("delivery", "test", "test"),
    (
        "team",
        ["Anna@Acme.example", "@team.example"],
        Team(frozenset({"anna@acme.example"}), frozenset({"team.example"})),
    ),
    ("sender", "Acme Support <support@acme.example>", "Acme Support <support@acme.example>"),
    ("sender_promotional", "news@acme.example", "news@acme.example"),
    ("sender_informational", "Ädam <a@acme.example>", "Ädam <a@acme.example>"),
    ("sender_operational", '"Acme, Inc." <o@acme.example>', '"Acme, Inc." <o@acme.example>'),
    ("sender_transactional", "Acme <t@acme.example>", "Acme <t@acme.example>"),
    ("sender_approval", "Acme <p@acme.example>", "Acme <p@acme.example>"),
    ("sender_security", "Acme <s@acme.example>", "Acme <s@acme.example>"),
    ("reply_to", "help@acme.example", "help@acme.example"),
    ("reply_to_promotional", "a@acme.example", "a@acme.example"),
    ("reply_to_informational", "b@acme.example", "b@acme.example"),
    ("reply_to_operational", "c@acme.example", "c@acme.example"),
    ("reply_to_transactional", "d@acme.example", "d@acme.example"),
    ("reply_to_approval", "e@acme.example", "e@acme.example"),
    ("reply_to_security", "f@acme.example", "f@acme.example"),
    ("bounce_domain", "Bounces.Bücher.example", "bounces.xn--bcher-kva.example"),
    ("public_url", "https://notify.acme.example/base/", "https://notify.acme.example/base"),
    ("listen", "0.0.0.0:0", ("0.0.0.0", 0)),
    ("status_page_url", "https://status.acme.example", "https://status.acme.example"),
    ("status_page_feed_url", "https://status.acme.example/feed?a=b", "https://status.acme.example/feed?a=b"),
    ("status_page_every", 90, 90),
    ("status_page_feed_allow", ["file", "private"], frozenset({"file", "private"})),
    ("catalogues", ["billtrust", "own.toml"], ("billtrust", "own.toml")),
    ("templates_dir", ".", Path()),
    ("secret_keys", [KEY, KEY[::-1]], (KEY, KEY[::-1])),
    ("operators", ["Ops@acme.example", "b@acme.example"], ("Ops@acme.example", "b@acme.example")),
    ("log_format", "json", "json"),
    ("lease_seconds", 5, 5),
    ("retry_minutes", [2, 10, 60], (2, 10, 60)),
    *((f"retry_minutes_{name}", [minute], (minute,)) for minute, name in enumerate(CLASSES, 1)),
    ("give_up_hours", 48, 48),
    *((f"give_up_hours_{name}", hours, hours) for hours, name in enumerate(CLASSES, 1)),
    (
        "domain_rates",
        ["Gmail.example=10", "bücher.example=0.5"],
        (DomainRate("gmail.example", 10.0), DomainRate("xn--bcher-kva.example", 0.5)),
    ),
]


def text_of(value: Any) -> str:
    """A TOML value as it stands in the environment."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return {True: "1", False: "0"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def read(environment: dict[str, str], folder: Path, toml: str | None = None) -> Settings:
    if toml is not None:
        (folder / "rolecast.toml").write_text(toml, encoding="utf-8")
    return load(environment, folder=folder)


def refused(environment: dict[str, str], folder: Path, toml: str | None = None) -> str:
    """The one line that a wrong setting is answered with."""
    with pytest.raises(SettingsError) as caught:
        read(environment, folder, toml)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_every_setting_has_a_row_in_the_table_of_this_test() -> None:
    assert [row[0] for row in GOOD] == list(NAMES)


@pytest.mark.parametrize(("name", "written", "expected"), GOOD, ids=[row[0] for row in GOOD])
def test_a_setting_reads_the_same_from_everywhere(tmp_path: Path, name: str, written: Any, expected: Any) -> None:
    team = {"ROLECAST_TEAM": "@x.example"} if name == "delivery" else {}
    variable = f"ROLECAST_{name.upper()}"
    # given it in the environment, in a file that the environment names, and in TOML
    (tmp_path / "value").write_text(text_of(written) + "\n", encoding="utf-8")
    from_environment = read({variable: text_of(written), **team}, tmp_path)
    from_a_file = read({f"{variable}_FILE": str(tmp_path / "value"), **team}, tmp_path)
    from_toml = read(team, tmp_path, f"{name} = {json.dumps(written, ensure_ascii=False)}")
    # then it is the same, and its source is known
    assert getattr(from_environment, name) == expected
    assert from_environment == from_a_file == from_toml
    assert from_environment.sources[name] == variable
    assert from_a_file.sources[name] == f"{variable}_FILE"
    assert from_toml.sources[name] == f"{name} in {tmp_path / 'rolecast.toml'}"


def test_the_defaults_are_the_contracts(tmp_path: Path) -> None:
    settings = read({}, tmp_path)
    assert (settings.database_url, settings.broker_url) == ("sqlite:///rolecast.db", "memory://")
    assert (settings.relay_urls, settings.delivery, settings.public_url) == ((), "live", "http://127.0.0.1:8080")
    assert (settings.listen, settings.status_page_every) == (("127.0.0.1", 8080), 60)
    assert settings.catalogues == ("billtrust", "issuetrak")
    assert settings.sources == {}


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    toml = 'public_url = "https://toml.example"\nstatus_page_every = 90'
    settings = read({"ROLECAST_PUBLIC_URL": "https://environment.example"}, tmp_path, toml)
    assert settings.public_url == "https://environment.example"
    assert settings.status_page_every == 90
    assert settings.lease_seconds == 30


def test_a_named_file_is_read_instead_of_the_one_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "rolecast.toml").write_text("lease_seconds = 5")
    (tmp_path / "other.toml").write_text("status_page_every = 90")
    settings = load({}, config=tmp_path / "other.toml", folder=tmp_path)
    assert (settings.lease_seconds, settings.status_page_every) == (30, 90)


def test_other_peoples_variables_are_left_alone(tmp_path: Path) -> None:
    assert read({"PATH": "/bin", "ROLECAST": "x", "XROLECAST_SENDER": "x"}, tmp_path) == Settings()


# ---------------------------------------------------------------- what is wrong is told in one line

WRONG: list[tuple[str, str, str]] = [
    # name, value, what the remedy says
    ("database_url", "mysql://db.test/x", "give sqlite:///PATH or postgresql://"),
    ("database_url", "sqlite://rolecast.db", "give sqlite:///PATH"),
    ("broker_url", "amqp://x", "give memory:// or redis://"),
    ("broker_url", "memory://x", "give memory:// or redis://"),
    ("database_url", "postgresql://127.0.0.1:abc/x", "with a port from 1 to 65535"),
    ("database_url", "postgresql://127.0.0.1:99999/x", "with a port from 1 to 65535"),
    ("database_url", "postgresql://[::1/x", "with a port from 1 to 65535"),
    ("database_url", "postgres://db.test/x?foo=bar", "the option 'foo' is unknown"),
    ("database_url", "postgresql://db.test/x?sslmode=require&sslmode=disable", "'sslmode' stands in it twice"),
    ("database_url", "postgresql://db.test/x?connect_timeout=abc", "connect_timeout in it is a whole number"),
    ("database_url", "postgresql://db.test/x?port=abc", "port in it is a whole number"),
    *(
        ("broker_url", f"redis://{rest}", "give memory:// or redis://HOST:PORT/NUMBER")
        for rest in ("127.0.0.1:99999", "127.0.0.1:0", "h:abc", "[::1", "h/x", "h/0/1", "h/-1", "h/\u0663", "h/0#x")
    ),
    ("broker_url", "redis://h/0?foo=bar", "the option 'foo' is unknown: there are none without rediss://"),
    ("broker_url", "redis://h?socket_timeout=abc", "the option 'socket_timeout' is unknown"),
    ("broker_url", "redis://h?ssl=true", "the option 'ssl' is unknown"),
    ("broker_url", "redis://h?retry=5", "the option 'retry' is unknown"),
    ("broker_url", "redis://h?ssl_cert_reqs=none", "the option 'ssl_cert_reqs' is unknown"),
    ("broker_url", "rediss://h?retry=5", "there are ssl_ca_certs, ssl_certfile, ssl_keyfile, ssl_cert_reqs, ssl_check"),
    ("broker_url", "rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs in it is one of required, optional, none"),
    ("broker_url", "rediss://h?ssl_check_hostname=2", "ssl_check_hostname in it is one of true, false"),
    ("broker_url", "rediss://h?ssl_ca_certs=/nowhere/ca.pem", "ssl_ca_certs in it names no file"),
    ("relay_urls", "relay.test:25", "give smtp://"),
    ("relay_urls", "http://relay.test", "give smtp://"),
    ("relay_urls", "smtp://", "give smtp://"),
    ("relay_urls", "smtp://relay.test:99999", "give smtp://"),
    ("relay_urls", "smtp://relay.test:0", "give smtp://"),
    ("relay_urls", "smtp://[::1", "give smtp://"),
    ("relay_urls", "smtp://relay.test/path", "give smtp://"),
    ("relay_urls", "smtp://relay.test?tls=maybe", "give one of required, opportunistic, none"),
    ("relay_urls", "smtp://relay.test?tls=", "give one of required, opportunistic, none"),
    ("relay_urls", "smtp://relay.test?connections=0", "give a whole number from 1 to 256"),
    ("relay_urls", "smtp://relay.test?connections=many", "give a whole number from 1 to 256"),
    ("relay_urls", "smtp://relay.test?rate=-1", "rate is mails a second"),
    ("relay_urls", "smtp://relay.test?rate=nan", "rate is mails a second"),
    ("relay_urls", "smtp://relay.test?rate=inf", "rate is mails a second"),
    ("relay_urls", "smtp://relay.test?rate=0.0001", "rate is mails a second"),
    ("relay_urls", "smtp://relay.test?daily=-1", "give a whole number from 0 to"),
    ("relay_urls", "smtp://relay.test?daily=9&warmup=61", "give a whole number from 0 to 60"),
    ("relay_urls", "smtp://relay.test?warmup=14", "warmup stands without daily"),
    ("retry_minutes", "", "give whole minutes from 1 to 1440"),
    ("retry_minutes", "1,0", "give whole minutes from 1 to 1440"),
    ("retry_minutes", "5,1", "the minutes fall from 5 to 1"),
    ("retry_minutes", "1,\u0665", "give whole minutes from 1 to 1440"),
    ("retry_minutes", "1,1_0", "give whole minutes from 1 to 1440"),
    ("relay_urls", "smtp://relay.test?daily=10&daily=20", "the option 'daily' stands in it twice"),
    ("retry_minutes_security", "soon", "give whole minutes from 1 to 1440"),
    ("give_up_hours", "0", "give a whole number from 1 to 720"),
    ("give_up_hours_approval", "never", "give a whole number from 1 to 720"),
    ("domain_rates", "slow.example", "'slow.example' is not DOMAIN=MAILS A SECOND"),
    ("domain_rates", "slow.example=0", "'slow.example=0' is not DOMAIN=MAILS A SECOND"),
    ("domain_rates", "a.example=1,A.example=2", "a.example stands in it twice"),
    (
        "relay_urls",
        "smtp://relay.test?speed=9",
        "'speed' is unknown: there are tls, connections, rate, daily and warmup",
    ),
    ("relay_urls", "smtp://:secret@relay.test", "a password stands without its user"),
    ("allow_plaintext", "perhaps", "give 1 or 0"),
    ("delivery", "Live", "give one of test, team, live"),
    ("team", "anna", "anna"),
    ("sender", "Acme", "give `Name <address>`"),
    ("sender", "", "give a text that is not empty"),
    ("sender", "Acme, Inc. <a@acme.example>", "in quotation marks"),
    ("sender", "Acme <a@acme.example>\r\nBcc: x@y.example", "give `Name <address>`"),
    ("sender", "Acme <a@b@c>", "a@b@c"),
    ("sender_security", "nobody@", "nobody@"),
    ("reply_to", "a b", "give `Name <address>`"),
    ("bounce_domain", "no domain", "no domain"),
    ("public_url", "notify.acme.example", "give an http or https address"),
    ("public_url", "ftp://notify.acme.example", "give an http or https address"),
    ("public_url", "https://notify.acme.example:http", "give an http or https address"),
    ("public_url", "https://notify.acme.example/?a=b", "give an http or https address"),
    ("public_url", "https://user@notify.acme.example", "give an http or https address"),
    ("public_url", "https://[::1", "give an http or https address"),
    ("listen", "8080", "give HOST:PORT"),
    ("listen", "127.0.0.1:", "give HOST:PORT"),
    ("listen", ":8080", "give HOST:PORT"),
    ("listen", "127.0.0.1:70000", "give HOST:PORT"),
    ("status_page_url", "status", "give an http or https address"),
    ("status_page_feed_url", "/etc/passwd", "give the https address of an Atom or RSS feed"),
    ("status_page_feed_url", "https://[::1", "give the https address of an Atom or RSS feed"),
    ("status_page_every", "1", "give a whole number from 5 to 86400"),
    ("status_page_every", "1.5", "give a whole number"),
    ("status_page_every", "soon", "give a whole number"),
    ("status_page_feed_allow", "everything", "give `file`, `private`, or both"),
    ("catalogues", ",", "name at least one catalogue"),
    ("templates_dir", "/nowhere/at/all", "it is not a folder"),
    ("secret_keys", "short", "give keys of at least 16 characters"),
    ("secret_keys", "", "give keys of at least 16 characters"),
    ("operators", "ops", "ops"),
    ("log_format", "xml", "give one of console, json"),
    ("lease_seconds", "0", "give a whole number from 1 to 3600"),
]
SECRET = {"database_url", "broker_url", "relay_urls", "secret_keys"}


@pytest.mark.parametrize(("name", "value", "remedy"), WRONG, ids=[f"{row[0]}-{row[1]!r}" for row in WRONG])
def test_a_wrong_value_is_told_with_its_name_and_remedy(tmp_path: Path, name: str, value: str, remedy: str) -> None:
    variable = f"ROLECAST_{name.upper()}"
    line = refused({variable: value}, tmp_path)
    assert line.startswith(f"{variable} has the value ")
    assert remedy in line
    if name in SECRET:
        assert line.startswith(f"{variable} has the value ***: ")
    else:
        assert repr(value) in line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["[[1]]", "{a = 1}", "2020-01-01", "1.5", "[1, 'x']"])
def test_a_value_of_the_wrong_kind_in_toml_is_told_too(tmp_path: Path, name: str, value: str) -> None:
    line = refused({}, tmp_path, f"{name} = {value}")
    assert line.startswith(f"{name} in {tmp_path / 'rolecast.toml'} has the value ")


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ("ROLECAST_RELAY_URL", "did you mean ROLECAST_RELAY_URLS?"),
        ("ROLECAST_SENDR", "did you mean ROLECAST_SENDER?"),
        ("ROLECAST_SENDER_PROMOTION", "did you mean ROLECAST_SENDER_PROMOTIONAL?"),
        ("ROLECAST_DATABSE_URL_FILE", "did you mean ROLECAST_DATABASE_URL?"),
        ("ROLECAST_XYZZY", "see `rolecast config show`"),
        ("ROLECAST_", "see `rolecast config show`"),
        ("ROLECAST__FILE", "see `rolecast config show`"),
    ],
)
def test_an_unknown_name_stops_the_start_with_a_suggestion(tmp_path: Path, variable: str, remedy: str) -> None:
    line = refused({variable: "x"}, tmp_path)
    assert line.startswith(f"{variable} is not a setting that Rolecast knows")
    assert remedy in line


def test_an_unknown_name_in_toml_stops_the_start_with_a_suggestion(tmp_path: Path) -> None:
    line = refused({}, tmp_path, 'relay_url = "x"')
    assert line.startswith(f"relay_url in {tmp_path / 'rolecast.toml'} is not a setting that Rolecast knows: ")
    assert line.endswith("did you mean relay_urls?")


def test_a_name_and_its_file_together_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "value").write_text("a@acme.example")
    line = refused({"ROLECAST_SENDER": "a@b.example", "ROLECAST_SENDER_FILE": str(tmp_path / "value")}, tmp_path)
    assert line == "ROLECAST_SENDER_FILE and ROLECAST_SENDER are both set: keep one of them"


def test_a_value_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "binary"):
        line = refused({"ROLECAST_SENDER_FILE": str(path)}, tmp_path)
        assert line.startswith(f"ROLECAST_SENDER_FILE names {str(path)!r}, which can't be read")


@pytest.mark.parametrize(("toml", "words"), [("a = ", "is not TOML"), ("sender = 'a'\nsender = 'b'", "is not TOML")])
def test_a_settings_file_that_is_not_toml_is_named(tmp_path: Path, toml: str, words: str) -> None:
    line = refused({}, tmp_path, toml)
    assert str(tmp_path / "rolecast.toml") in line
    assert words in line


def test_a_settings_file_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="can't be read"):
        load({}, config=tmp_path / "missing.toml")


def test_mail_in_the_clear_needs_a_word_off_this_machine(tmp_path: Path) -> None:
    url = {"ROLECAST_RELAY_URLS": "smtp://relay.test:25?tls=none"}
    line = refused(url, tmp_path)
    assert "relay.test:25 has tls=none and is not on this machine" in line
    assert "ROLECAST_ALLOW_PLAINTEXT=1" in line
    assert read({**url, "ROLECAST_ALLOW_PLAINTEXT": "1"}, tmp_path).relay_urls[0].tls == "none"
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert read({"ROLECAST_RELAY_URLS": f"smtp://{host}:25?tls=none"}, tmp_path).relay_urls[0].loopback


def test_a_team_that_names_nobody_is_refused(tmp_path: Path) -> None:
    assert "ROLECAST_TEAM names nobody" in refused({"ROLECAST_DELIVERY": "team"}, tmp_path)


# ---------------------------------------------------------------- secrets


def test_no_secret_is_shown_by_an_error_or_a_listing(tmp_path: Path) -> None:
    canary = "kanarienvogel-0123456789"
    good = {
        "ROLECAST_DATABASE_URL": f"postgresql://u:{canary}@db.test/x",
        "ROLECAST_BROKER_URL": f"redis://:{canary}@redis.test",
        "ROLECAST_RELAY_URLS": f"smtp://u:{canary}@relay.test",
        "ROLECAST_SECRET_KEYS": canary,
    }
    settings = read(good, tmp_path)
    assert canary not in repr(settings)
    assert canary not in f"{settings!r} {settings.relay_urls} {settings.secret_keys}"
    wrong = {
        "ROLECAST_DATABASE_URL": f"mysql://u:{canary}@db.test/x",
        "ROLECAST_BROKER_URL": f"amqp://:{canary}@redis.test",
        "ROLECAST_RELAY_URLS": f"smtp://u:{canary}@relay.test?tls=x",
        "ROLECAST_SECRET_KEYS": f"{canary},x",
    }
    for name, value in wrong.items():
        assert canary not in refused({name: value}, tmp_path)
        assert canary not in refused({}, tmp_path, f"{name.removeprefix('ROLECAST_').lower()} = '{value}'")
        (tmp_path / "rolecast.toml").unlink()
    assert canary not in refused({"ROLECAST_RELAY_URLS": f"smtp://u:{canary}@relay.test?tls=none"}, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgresql://u:hush@db.test:abc/x"),
        ("DATABASE_URL", "postgresql://u:hush@db.test/x?foo=bar"),
        ("BROKER_URL", "redis://u:hush@h:abc"),
        ("BROKER_URL", "redis://u:12?hush@h/0"),
        ("RELAY_URLS", "smtp://u:12?hush@relay.test"),
    ],
)
def test_a_password_in_a_url_that_cannot_be_read_is_not_shown(tmp_path: Path, name: str, value: str) -> None:
    assert "hush" not in refused({f"ROLECAST_{name}": value}, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("broker_url", "redis://"),
        ("broker_url", "redis://u:p%2F@[::1]:6379/"),
        ("broker_url", "unix:///run/redis.sock"),
        ("broker_url", f"rediss://h:6380/1?ssl_ca_certs={__file__}&ssl_cert_reqs=required&ssl_check_hostname=false"),
        ("database_url", "postgresql://u:p%40:/w@[::1]:5432/x?sslmode=require&application_name=a"),
        ("database_url", "postgresql://u@/x?host=a.test:5432&host=b.test&connect_timeout=2"),
        ("database_url", "postgresql:///x?host=/run/postgresql"),
    ],
)
def test_a_url_that_its_driver_takes_is_taken(tmp_path: Path, name: str, value: str) -> None:
    assert getattr(read({f"ROLECAST_{name.upper()}": value}, tmp_path), name) == value


# ---------------------------------------------------------------- what follows from settings


def test_relays_stand_in_the_order_of_preference(tmp_path: Path) -> None:
    settings = read({"ROLECAST_RELAY_URLS": "smtp://a.test smtps://b.test\n smtp://c.test:2525"}, tmp_path)
    assert [relay.name for relay in settings.relay_urls] == ["a.test:587", "b.test:465", "c.test:2525"]
    assert [relay.implicit_tls for relay in settings.relay_urls] == [False, True, False]
    assert {relay.tls for relay in settings.relay_urls} == {"required"}
    assert {(relay.connections, relay.rate, relay.user) for relay in settings.relay_urls} == {(8, 0.0, None)}


def test_a_class_has_its_own_sender_or_the_common_one(tmp_path: Path) -> None:
    environment = {
        "ROLECAST_SENDER": "Acme <a@acme.example>",
        "ROLECAST_SENDER_SECURITY": "Acme Security <s@safe.example>",
        "ROLECAST_REPLY_TO": "help@acme.example",
    }
    settings = read(environment, tmp_path)
    assert settings.sender_of("security") == "Acme Security <s@safe.example>"
    assert settings.sender_of("promotional") == "Acme <a@acme.example>"
    assert settings.bounce_domain_of("security") == "safe.example"
    assert settings.reply_to_of("security") == "help@acme.example"
    assert Settings().sender_of("security") is None
    assert Settings().bounce_domain_of("security") is None


def test_a_class_has_its_own_schedule_or_the_common_one(tmp_path: Path) -> None:
    environment = {
        "ROLECAST_RETRY_MINUTES": "2,4",
        "ROLECAST_RETRY_MINUTES_SECURITY": "1",
        "ROLECAST_GIVE_UP_HOURS_SECURITY": "6",
    }
    settings = read(environment, tmp_path)
    assert (settings.retry_minutes_of("security"), settings.give_up_hours_of("security")) == ((1,), 6)
    assert (settings.retry_minutes_of("promotional"), settings.give_up_hours_of("promotional")) == ((2, 4), 96)
    assert Settings().retry_minutes_of("security") == (1, 5, 15, 30, 60, 120, 240)


@pytest.mark.parametrize(
    "sender",
    ["a@acme.example", "Acme <a@acme.example>", '"Acme, Inc." <a@acme.example>', r'"A \"B\" <C>" <a@acme.example>'],
)
def test_a_senders_domain_is_found_whatever_its_name(tmp_path: Path, sender: str) -> None:
    settings = read({"ROLECAST_SENDER": sender}, tmp_path)
    assert settings.sender is not None
    assert domain_of(settings.sender) == "acme.example"
    assert settings.bounce_domain_of("security") == "acme.example"


@pytest.mark.parametrize(
    ("public", "relays", "work"),
    [
        ("https://notify.acme.example", "smtp://relay.test", True),
        ("http://notify.acme.example", "smtp://127.0.0.1", False),  # anybody on the way could read it
        ("http://127.0.0.1:8080", "smtp://127.0.0.1", True),  # the mails stay on this machine, so do the links
        ("http://127.0.0.1:8080", "smtp://127.0.0.1 smtp://relay.test", False),
        ("http://localhost:8080", "", True),
        ("http://[::1]:8080", "", True),
    ],
)
def test_links_work_where_a_recipient_can_reach_them(tmp_path: Path, public: str, relays: str, work: bool) -> None:
    settings = read({"ROLECAST_PUBLIC_URL": public, "ROLECAST_RELAY_URLS": relays}, tmp_path)
    assert settings.links_work is work


def test_the_team_is_known_by_address_and_by_domain() -> None:
    team = Team(frozenset({"anna@acme.example"}), frozenset({"team.example"}))
    assert "anna@acme.example" in team
    assert "whoever@team.example" in team
    assert "whoever@acme.example" not in team
    assert "whoever@sub.team.example" not in team


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False),
     ("localhost.acme.example", False), ("", False)],
)  # fmt: skip
def test_this_machine_is_known_by_its_addresses(host: str, here: bool) -> None:
    assert is_loopback(host) is here


def test_the_status_page_is_answered_as_it_was_written(tmp_path: Path) -> None:
    for url in ("https://status.vendor.example", "https://status.vendor.example/"):
        assert load({"ROLECAST_STATUS_PAGE_URL": url}, folder=tmp_path).status_page_url == url
