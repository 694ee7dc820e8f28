"""Reading the small text files that lie next to images: captions, one-value files, settings in YAML and JSON.

People write them with every editor there is, and downloads leave anything at all. `read_text` copes with the encodings
that Windows, macOS and Linux write and refuses what is not text. `read_mapping` reads settings from YAML or JSON
without trusting the file: no objects, no deep nesting, no expansion, and every value stays the text that was written
(so a caption `no` or `1984` is a caption), to be understood by whoever knows which type it should have.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MAX_TEXT_BYTES = 1 << 20
"""A caption or settings file beyond this is something else with the wrong name."""

MAX_NESTING = 8
"""Settings need three levels: a mapping, a list of tags, a tag with its weight."""

_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_TOO_DEEP = "maximum nesting depth"
"""What newer versions of libyaml say before our own limit is asked, since they read ahead; older ones say nothing."""
_NULL_TAG = "tag:yaml.org,2002:null"
_LOADER = getattr(yaml, "CLoader", yaml.Loader)  # only its event stream is used, which makes no objects


class Mapping(dict[str, Any]):
    """A mapping as a file spells it. `repeated` holds names given more than once; the last value counts."""

    repeated: tuple[str, ...] = ()


class TextError(ValueError):
    """The file is not text, or not in the format that its name says. The message is the cause."""


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, UTF-16 or UTF-32 (with byte order mark), else Windows-1252.

    Raises:
        TextError: the file is too large, or is not text in any of these.
        OSError: the file cannot be read.
    """
    return read_text_and_doubt(path)[0]


def read_text_and_doubt(path: str | Path) -> tuple[str, str]:
    """`read_text`, and what speaks against the encoding it was read in, or "".

    Code pages do not name themselves. In Western text letters beyond ASCII are few; where they are most of the words,
    the file is of another code page (GBK, Shift-JIS, KOI8, Windows-1251 ...), and Windows-1252 makes nonsense of it.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise TextError(f"larger than {MAX_TEXT_BYTES >> 20} MiB, so it is not a caption or settings file")
    encoding = next((name for bom, name in _BOMS if data.startswith(bom)), None) or _utf16_without_mark(data)
    try:
        text, doubt = data.decode(encoding or "utf-8"), ""
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise TextError(f"damaged {encoding} text at byte {error.start}") from error
        # One byte a letter: cp1252 is what Windows wrote before UTF-8, and Latin-1 where it has letters.
        text, doubt = data.decode("cp1252", "replace"), _doubt(data)
    strange = next((c for c in text if (c < " " and c not in "\t\n\r\f\v") or c == "\ufffd"), None)
    if strange is not None:
        raise TextError(f"holds {strange!r}: it is not text in UTF-8, UTF-16 or Windows-1252; save it as UTF-8")
    return text, doubt


def _utf16_without_mark(data: bytes) -> str | None:
    """UTF-16 that does not say so, as some tools write it: of Western letters every second byte is zero."""
    if len(data) < 2 or len(data) % 2 or b"\0" not in data:
        return None
    even, odd = data[::2].count(0), data[1::2].count(0)
    if even == 0 and odd > len(data) // 4:
        return "utf-16-le"
    return "utf-16-be" if odd == 0 and even > len(data) // 4 else None


_FOREIGN_SHARE = 0.4
"""Bytes beyond ASCII among those of words, from which on a text is hardly Western: French and Czech stay below 0.25."""


def _doubt(data: bytes) -> str:
    letters = sum(byte >= 0x80 or chr(byte).isalpha() for byte in data)
    foreign = sum(byte >= 0x80 for byte in data)
    if foreign < max(2, _FOREIGN_SHARE * letters):
        return ""
    return f"not UTF-8, and unlikely to be Windows-1252, as which it is read: {data.decode('cp1252', 'replace')[:40]!r}"


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read settings from a `.yaml`, `.yml` or `.json` file. An empty file gives no settings.

    Raises:
        TextError: not text, not YAML or JSON, no mapping at the top, or nested too deeply.
        OSError: the file cannot be read.
    """
    text = read_text(path)
    value = parse_json(text) if str(path).lower().endswith(".json") else parse_yaml(text)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TextError(f"holds a {kind_of(value)} where settings are expected, such as `multiply: 2`")
    return value


def parse_json(text: str) -> Any:
    """Read JSON; NaN and infinity are refused.

    Raises:
        TextError: not valid JSON; the message says line and column.
    """
    if not text.strip():
        return None
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_pairs)
    except TextError:
        raise
    except json.JSONDecodeError as error:
        raise TextError(
            f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}{_cure(error.msg)}"
        ) from error
    except RecursionError as error:
        raise TextError("nested too deeply to be settings") from error
    except ValueError as error:  # a number of thousands of digits
        raise TextError(f"not valid JSON: {error}") from error


def _cure(message: str) -> str:
    return '. Write each backslash twice ("R:\\\\images"), or use "/"' if message.startswith("Invalid \\escape") else ""


def _pairs(pairs: list[tuple[str, Any]]) -> Mapping:
    """A JSON object."""
    items = Mapping(pairs)
    if len(items) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        items.repeated = tuple(name for name, count in counts.items() if count > 1)
    return items


def _refuse_constant(name: str) -> Any:
    raise TextError(f"{name} is not a number that a setting can have")


def parse_yaml(text: str) -> Any:
    """Read YAML into dicts, lists and the strings that were written (None for null and for nothing).

    Anchors, aliases and merge keys (`<<`) work; an alias is the same object again, so nothing multiplies. Types are not
    guessed and tags such as `!!python/object` have no effect. Of a name given twice the last value counts, and
    `Mapping.repeated` holds it.

    Raises:
        TextError: not valid YAML, several documents, or nested too deeply; the message says line and column.
    """
    try:
        events = iter(yaml.parse(text, Loader=_LOADER))
        return _Composer(events).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        if _TOO_DEEP in (error.problem or ""):
            raise TextError(f"{where}nested too deeply to be settings") from error
        raise TextError(f"{where}not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise TextError(f"not valid YAML: {str(error).splitlines()[0]}") from error


def _line_of(event: yaml.Event) -> int:
    """The line that an event of the parser begins on, from 1."""
    return event.start_mark.line + 1 if event.start_mark is not None else 1


class _Composer:
    """Builds plain values from YAML's events. PyYAML's own composer recurses, and its C one can crash the process."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._anchors: dict[str, Any] = {}

    def document(self) -> Any:
        value = None
        num_documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    raise TextError(f"line {_line_of(event)}: a second document starts with `---`; keep one")
            elif isinstance(event, yaml.NodeEvent):
                value = self._node(event, 0)
        return value

    def _node(self, event: yaml.Event, depth: int) -> Any:
        if depth > MAX_NESTING:
            raise TextError(f"line {_line_of(event)}: nested too deeply to be settings")
        if isinstance(event, yaml.AliasEvent):
            alias = getattr(event, "anchor", None)  # the stubs do not know it
            if alias not in self._anchors:
                raise TextError(f"line {_line_of(event)}: *{alias} refers to nothing")
            return self._anchors[alias]
        if isinstance(event, yaml.ScalarEvent):
            # `implicit[0]`: plain and without a tag. The style is None or "" for it, with and without libyaml.
            is_plain = event.implicit[0] or event.tag == _NULL_TAG
            value: Any = None if is_plain and event.value in ("", "~", "null", "Null", "NULL") else event.value
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(depth)
        else:
            value = self._mapping(depth)
        anchor = getattr(event, "anchor", None)
        if anchor:
            self._anchors[anchor] = value
        return value

    def _sequence(self, depth: int) -> list[Any]:
        items = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return items

    def _mapping(self, depth: int) -> Mapping:
        items: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        repeated: dict[str, None] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            value = self._node(next(self._events), depth + 1)
            if not isinstance(key, str):
                raise TextError(f"line {_line_of(event)}: a name is expected, found a {kind_of(key)}")
            if key == "<<":
                for source in value if isinstance(value, list) else [value]:
                    merged = {**source, **merged} if isinstance(source, dict) else merged
            else:
                if key in items:
                    repeated[key] = None
                items[key] = value
        mapping = Mapping({**merged, **items})
        mapping.repeated = tuple(repeated)
        return mapping


def require_text(text: str) -> str:
    """The text itself, if it can be written to a file. JSON can spell half a character, such as `\\ud800`.

    Raises:
        TextError: it cannot be written, or holds a NUL.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"holds {text[error.start : error.end]!r}, which is not a character") from error
    if "\0" in text:
        raise TextError("holds a NUL character")
    return text


def kind_of(value: Any) -> str:
    """What a value is, in the words of someone who wrote it in a file."""
    kinds = {
        dict: "mapping",
        Mapping: "mapping",
        list: "list",
        str: "text",
        bool: "yes/no value",
        int: "number",
        float: "number",
    }
    return "nothing" if value is None else kinds.get(type(value), type(value).__name__)
