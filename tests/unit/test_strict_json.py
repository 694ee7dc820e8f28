"""The reader of JSON from outside: every way to be broken is one error with its place, and none is read as empty."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everydream_kit.errors import CheckpointError, KitError
from everydream_kit.strict_json import MAX_LINE_BYTES, JsonLines, iterate_json_lines, parse_json, read_json

BROKEN = {
    "stray comma": ('{"a": 1,\n "b": [2,],\n}', "line 2, column"),
    "trailing comma": ('{\n"a": 1,\n}', "line"),
    "half": ('{"a": "b', "line 1, column 7: not valid JSON: Unterminated string"),
    "empty": ("", "line 1, column 1: not valid JSON"),
    "Windows path": ('{"data_root":\n "R:\\images"}', "line 2, column 5: not valid JSON: Invalid \\escape"),
    "second object": ('{"a": 1}\n{"a": 2}', "line 2, column 1: not valid JSON: Extra data"),
    "6000 digits": ('{"text": "777",\n "n": ' + "7" * 6000 + "}", "line 2, column 7: a whole number of 6,000 digits"),
    "-6000 digits": ("[-" + "7" * 6000 + "]", "line 1, column 2: a whole number of 6,000 digits"),
    "infinite": ('{"n": 1e999}', "line 1, column 7: 1e999 is larger than any number"),
    "NaN": ('{"NaN": "NaN",\n "n": NaN}', "line 2, column 7: NaN is not a number"),
    "Infinity": ('{"n": -Infinity}', "line 1, column 7: -Infinity is not a number"),
    "deep lists": ("[" * 100_000 + "]" * 100_000, "line 1, column 65: nested more than 64 deep"),
    "deep objects": ('{"a":' * 1000 + "1" + "}" * 1000, "nested more than 64 deep"),
}


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_one_error_with_its_place(tmp_path, text, words):
    path = tmp_path / "any.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError) as raised:
        read_json(path, expect=None, error=CheckpointError, missing={})
    assert str(raised.value).startswith(f"{path}, line ")
    assert words in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("text", "kind"),
    [("[1]", "a list"), ('"a"', "a text"), ("3", "a whole number"), ("null", "null"), ("true", "true")],
)
def test_another_type_at_the_top_is_named(text, kind):
    with pytest.raises(KitError, match=rf"x\.json: holds {kind}.* where an object \{{\.\.\.\}} is expected"):
        parse_json(text, "x.json")


def test_a_missing_file_is_not_a_broken_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    assert read_json(tmp_path / "none.json", missing=None) is None
    with pytest.raises(KitError, match=r"cannot be read: Is a directory\. Give a file inside it\."):
        read_json(tmp_path, missing=None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_encodings_that_editors_write_are_read(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_bytes('{"caption": "café 日本"}'.encode(encoding))
    assert read_json(path) == {"caption": "café 日本"}


def test_other_encodings_are_refused_with_the_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('{\n"caption":\n"café"}'.encode("cp1252"))
    with pytest.raises(KitError, match=r"a\.json, line 3: not UTF-8 text"):
        read_json(path)


def test_a_file_that_is_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b" " * 1001)
    with pytest.raises(KitError, match="larger than 1,000 bytes"):
        read_json(path, max_bytes=1000)


def test_brackets_in_texts_are_no_nesting():
    value = {"prompt": "[" * 500 + '"' + "{" * 500}
    assert parse_json(json.dumps(value), "x") == value


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:0123456789eE+-.NaInfity\\u ', max_size=80).map(str.encode))
def test_any_bytes_give_a_value_or_one_error(content):
    try:
        value = parse_json(content, "x", expect=None)
    except KitError as error:
        assert str(error).startswith("x")
    else:
        json.dumps(value, allow_nan=False)


def test_bad_lines_are_collected_and_an_unfinished_one_is_said(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": {"b"{"c": 2}\n\n[3]\n\xff\n{"n": NaN}\n{"a": 4}\n{"a": ')
    found = JsonLines()
    assert [value.get("a") for value in iterate_json_lines(path, report=found)] == [1, None, 4]
    assert [bad.split(": ")[0].removeprefix(f"{path}, ") for bad in found.bad] == [
        "line 2, line 1, column 11",
        "line 4",
        "line 5, line 1",
    ]
    assert found.unfinished
    with pytest.raises(FileNotFoundError):
        next(iterate_json_lines(tmp_path / "none.jsonl"))


def test_a_line_without_end_is_never_held_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * (3 * MAX_LINE_BYTES) + b'"}\n{"a": 2}\n')
    assert list(iterate_json_lines(path)) == [{"a": 2}]


@pytest.mark.parametrize(
    ("text", "place", "name"),
    [
        ('{"lr": 1,\n "lr": 2}', "line 2, column 2", "lr"),
        ('{"a": [{"b": 1, "c": "b", "b": 1}]}', "line 1, column 27", "b"),
    ],
)
def test_a_name_that_stands_twice_is_refused(text, place, name):
    """Which of the two counts depends on who reads it, so what was checked need not be what is used."""
    with pytest.raises(KitError, match=rf"x, {place}: '{name}' appears twice"):
        parse_json(text, "x")
    assert parse_json('{"a": {"b": 1}, "b": {"a": 1}}', "x") == {"a": {"b": 1}, "b": {"a": 1}}
