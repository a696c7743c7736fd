from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subscriptions.strictjson import MAX_DEPTH, StrictJSONError, loads, pointer

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
)


@given(VALUES, st.booleans())
def test_what_is_strict_json_is_read_as_the_standard_library_reads_it(value, escaped):
    assert loads(json.dumps(value, ensure_ascii=escaped).encode()) == value


@given(st.binary())
def test_any_bytes_are_read_or_refused_with_a_printable_sentence(data):
    try:
        loads(data)
    except StrictJSONError as error:
        message = str(error)
    else:
        return
    assert message.isprintable()
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b'{"a": 1, "a": 2}', "/a"),
        (b'{"x": [0, {"a": 1, "b": 2, "a": 1}]}', "/x/1/a"),
        (b'{"a/b": {"~": 1, "~": 2}}', "/a~1b/~0"),
        (b'{"a": NaN}', "/a"),
        (b"[0, Infinity]", "/1"),
        (b"[-Infinity]", "/0"),
        (b"[1e999]", "/0"),
        (b"[9007199254740993]", "/0"),
        (b"[-9007199254740993]", "/0"),
        (b"[" + b"9" * 5000 + b"]", "/0"),
        (b'{"a": "\\ud800"}', "/a"),
        (b'{"a": ["\\udc00\\ud800"]}', "/a/0"),
        (b'{"\\ud800": 1}', "/\\ud800"),
        (b'{"a": "x\\u0000y"}', "/a"),
        (b'{"\\u0000": 1}', "/\\x00"),
        (b"[" * 33 + b"]" * 33, "/0" * 32),
    ],
)
def test_what_readers_could_understand_differently_is_refused_at_its_pointer(data, place):
    with pytest.raises(StrictJSONError) as refused:
        loads(data)
    assert refused.value.pointer == place
    assert str(refused.value).startswith(place)


@pytest.mark.parametrize(
    ("data", "line", "column", "position"),
    [
        (b"", 1, 1, 0),
        (b" \n ", 1, 1, 0),
        (b'{"a": 1,}', 1, 9, 8),
        (b'{"a": 1', 1, 8, 7),
        (b"[1]\n[2]", 2, 1, 4),
        (b"['a']", 1, 2, 1),
        (b'["\x00"]', 1, 3, 2),
        ('["é",\n é]'.encode(), 2, 2, 8),
        (b"{}{}", 1, 3, 2),
    ],
)
def test_broken_json_is_refused_with_line_column_and_byte(data, line, column, position):
    with pytest.raises(StrictJSONError) as refused:
        loads(data)
    assert (refused.value.line, refused.value.column, refused.value.position) == (line, column, position)


def test_text_that_is_not_utf8_is_refused_with_its_line():
    with pytest.raises(StrictJSONError, match=r"Line 2 is not UTF-8"):
        loads('{"a":\n"é"}'.encode("latin-1"))
    with pytest.raises(StrictJSONError, match="not UTF-8"):
        loads('{"a": 1}'.encode("utf-16"))


def test_a_byte_order_mark_in_front_is_skipped():
    assert loads(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_the_first_line_of_a_piece_of_a_file_keeps_its_number():
    with pytest.raises(StrictJSONError, match="line 7, column 2") as refused:
        loads(b"[,]", first_line=7)
    assert refused.value.line == 7


def test_the_deepest_level_is_read_and_a_million_levels_are_refused():
    assert loads(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    with pytest.raises(StrictJSONError, match="deeper than 32"):
        loads(b"[" * 1_000_000)


def test_whole_numbers_up_to_what_a_float_holds_exactly_are_read():
    assert loads(b"[9007199254740991, -9007199254740991]") == [2**53 - 1, 1 - 2**53]


def test_a_pointer_escapes_its_two_characters():
    assert pointer(["a/b", 0, "~"]) == "/a~1b/0/~0"
