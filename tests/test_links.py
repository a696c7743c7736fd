"""Personal links and envelope senders: nobody can make or change one without the key."""

from __future__ import annotations

import base64
import random
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.links import BadToken, Links, bounce_sender, keys_for, read_bounce, varint, varints
from worker.settings import SettingsError

BASE = "https://notify.acme.example"
LINKS = Links(("a key of the test, long enough",), BASE)
ADDRESS_KEY = b"k" * 32
NUMBERS = st.integers(min_value=0, max_value=2**63 - 1)


@given(st.lists(NUMBERS))
def test_numbers_come_back_as_they_were_written(numbers: list[int]) -> None:
    assert varints(b"".join(varint(number) for number in numbers)) == numbers


@given(NUMBERS, NUMBERS)
def test_a_link_names_what_it_was_made_for(event: int, number: int) -> None:
    assert LINKS.read("u", LINKS.token("u", event, number)) == [event, number]
    assert LINKS.read("p", LINKS.token("p", number)) == [number]


def test_links_stand_under_the_public_address() -> None:
    assert LINKS.unsubscribe(1, 2) == f"{BASE}/unsubscribe/{LINKS.token('u', 1, 2)}"
    assert LINKS.preferences(3) == f"{BASE}/preferences/{LINKS.token('p', 3)}"
    assert all(letter.isalnum() or letter in "-_" for letter in LINKS.token("u", 2**63 - 1, 2**31))


@given(NUMBERS, NUMBERS)
def test_a_link_for_one_purpose_is_worthless_for_the_other(event: int, number: int) -> None:
    with pytest.raises(BadToken):
        LINKS.read("p", LINKS.token("u", event, number))
    with pytest.raises(BadToken):
        LINKS.read("u", LINKS.token("p", event))


def test_a_link_names_no_address_and_differs_for_each_delivery() -> None:
    tokens = {LINKS.token("u", event, number) for event in range(30) for number in range(30)}
    assert len(tokens) == 900


def accepted(token: str) -> bool:
    for purpose in ("u", "p"):
        try:
            LINKS.read(purpose, token)  # type: ignore[arg-type]
        except BadToken:
            continue
        return True
    return False


def test_of_a_hundred_thousand_forged_links_none_is_accepted() -> None:
    rng = random.Random(2026)
    good = [LINKS.token("u", rng.randrange(10**6), rng.randrange(10**6)) for _ in range(50)]
    good += [LINKS.token("p", rng.randrange(10**6)) for _ in range(50)]
    assert all(accepted(token) for token in good)
    raw = [base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)) for token in good]
    forged = 0
    for number in range(50_000):  # a bit flipped anywhere
        octets = bytearray(raw[number % len(raw)])
        bit = rng.randrange(8 * len(octets))
        octets[bit // 8] ^= 1 << bit % 8
        forged += accepted(base64.urlsafe_b64encode(octets).rstrip(b"=").decode())
    for _ in range(50_000):  # bytes out of the air, with the purpose right
        forged += accepted(base64.urlsafe_b64encode(b"u" + rng.randbytes(rng.randrange(16, 30))).rstrip(b"=").decode())
    assert forged == 0


def test_a_link_has_one_spelling() -> None:
    token = LINKS.token("p", 5)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    others = {token[:place] + letter + token[place + 1 :] for place in range(len(token)) for letter in alphabet}
    others |= {token + "=", token + "==", token + "\n", " " + token, token + "A", token[:-1], token.swapcase()}
    others |= {token.replace("-", "+").replace("_", "/"), token + "é", ""}
    assert [other for other in others - {token} if accepted(other)] == []


def test_keys_are_changed_without_breaking_the_links_in_older_mails() -> None:
    old = Links(("the older key, long enough",), BASE)
    both = Links(("the newer key, long enough", "the older key, long enough"), BASE)
    newer = Links(("the newer key, long enough",), BASE)
    # given a link of an older mail
    token = old.token("u", 7, 8)
    # then it works while the older key is still listed
    assert both.read("u", token) == [7, 8]
    # and the newer one signs
    assert newer.read("u", both.token("u", 7, 8)) == [7, 8]
    # and once the older key is withdrawn its links end
    with pytest.raises(BadToken):
        newer.read("u", token)


# ---------------------------------------------------------------- envelope senders


@given(NUMBERS, st.integers(min_value=0, max_value=2**31 - 1))
def test_a_bounce_finds_its_delivery_in_whatever_case_it_comes_back(event: int, number: int) -> None:
    local, _, domain = bounce_sender(ADDRESS_KEY, event, number, "bounces.acme.example").rpartition("@")
    assert domain == "bounces.acme.example"
    assert len(local) <= 64  # RFC 5321, 4.5.3.1.1
    assert local == local.lower()
    assert all(letter.isalnum() or letter == "+" for letter in local)
    assert read_bounce(ADDRESS_KEY, local) == read_bounce(ADDRESS_KEY, local.upper()) == (event, number)


def test_the_envelope_sender_is_the_same_on_every_attempt() -> None:
    assert bounce_sender(ADDRESS_KEY, 4, 5, "b.example") == bounce_sender(ADDRESS_KEY, 4, 5, "b.example")


def test_forged_envelope_senders_are_refused() -> None:
    rng = random.Random(2026)
    local = bounce_sender(ADDRESS_KEY, 1234, 56, "b.example").partition("@")[0]
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    forged = [local[:place] + letter + local[place + 1 :] for place in range(2, len(local)) for letter in letters]
    forged += ["b+" + "".join(rng.choices(letters, k=rng.randrange(1, 45))) for _ in range(20_000)]
    forged += [
        "",
        "b",
        "b+",
        "+",
        "b+1",
        "b+ä",
        "b+\u0131",
        "postmaster",
        local + "a",
        local[:-1],
        local.replace("+", "-"),
    ]
    for one in set(forged) - {local}:
        with pytest.raises(BadToken):
            read_bounce(ADDRESS_KEY, one)
    with pytest.raises(BadToken):
        read_bounce(b"x" * 32, local)


# ---------------------------------------------------------------- keys


def test_configured_keys_win_and_nothing_is_written(tmp_path: Path) -> None:
    assert keys_for(["one", "two"], tmp_path / "rolecast.db") == ("one", "two")
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_key_where_none_is_configured_and_no_file_can_hold_one() -> None:
    assert keys_for([], None) == ()


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = keys_for([], tmp_path / "rolecast.db")
    assert keys_for([], tmp_path / "rolecast.db") == first
    [file] = tmp_path.iterdir()
    assert file.name == "rolecast.db.key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(first[0]) == 64


def test_processes_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    code = "import sys, pathlib, worker.links; print(worker.links.keys_for([], pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path / "rolecast.db")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert len({process.communicate(timeout=30)[0] for process in processes}) == 1
    assert [process.returncode for process in processes] == [0] * 6
    assert [file.name for file in tmp_path.iterdir()] == ["rolecast.db.key"]


def test_a_key_file_that_was_emptied_signs_nothing(tmp_path: Path) -> None:
    (tmp_path / "rolecast.db.key").write_text("\n")
    with pytest.raises(SettingsError, match=r"rolecast\.db\.key .*remove it"):
        keys_for([], tmp_path / "rolecast.db")


def test_random_text_is_no_token() -> None:
    for _ in range(1000):
        assert not accepted(secrets.token_urlsafe(20))
