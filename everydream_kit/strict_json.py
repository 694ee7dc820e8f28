"""The one reader of JSON that comes from outside or that people may edit: bounded, strict, and errors in words.

Files come from forums, from the Hub and from text editors. So size, nesting and numbers are bounded before anything uses
them, the top-level type is checked, and whatever is wrong is one `KitError` with file, line and column. "Not there" and
"broken" are different: a missing file is a `FileNotFoundError` (or the `missing` value), a broken one is never read as
empty, because whoever writes it back would erase what it held.

Not here: what the values mean (the config and each caller check that), YAML (`data/textfiles.py`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from everydream_kit.errors import KitError

MAX_BYTES = 16 << 20
"""Larger than any settings, manifest or tokenizer file; callers with larger files say so."""
MAX_DEPTH = 64
"""Nesting of lists and objects. Settings need 4; the interpreter's own limit is near 1000."""
MAX_INTEGER_DIGITS = 20
"""A 64-bit integer has at most 20. Python itself refuses to print one of more than 4300."""
MAX_LINE_BYTES = 4 << 20
_MANY_DIGITS = re.compile(rf"[0-9]{{{MAX_INTEGER_DIGITS + 1}}}")

_REQUIRED: Final = object()
_WORDS = {dict: "an object {...}", list: "a list [...]", str: "a text", int: "a whole number"}
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|-?(?:\d[\d.eE+-]*|Infinity)|NaN|[\[\]{}]', re.DOTALL)
_CURES = (
    ("Invalid \\escape", 'Write each backslash twice ("R:\\\\images"), or use "/".'),
    ("Invalid control character", "A line break inside a text is written \\n."),
    ("Illegal trailing comma", "Remove the comma before the closing bracket."),
    ("Expecting property name", "Names are in double quotes, without a comma after the last one."),
    ("Expecting value", "Is there a comma too many, or a text without double quotes?"),
    ("Expecting ',' delimiter", "Is a comma or a closing bracket missing before this place?"),
    ("Unterminated string", "A closing double quote is missing."),
    ("Extra data", "Only one object or list may be in the file."),
)


def read_json(
    path: str | os.PathLike[str],
    *,
    expect: type | None = dict,
    error: type[KitError] = KitError,
    missing: Any = _REQUIRED,
    max_bytes: int = MAX_BYTES,
    allow_nan: bool = False,
    name: str = "",
) -> Any:
    """Read a JSON file.

    Args:
        expect: type at the top: dict, list, or None for any.
        error: class of the errors that are raised.
        missing: returned where there is no such file; without it that is a FileNotFoundError.
        max_bytes: a larger file is refused.
        allow_nan: NaN and infinities are read as floats, for files that the kit itself writes measurements to.
        name: what messages call the file; its path if empty.

    Raises:
        FileNotFoundError: there is no such file, and `missing` is not given.
        KitError: of the class `error`; the file cannot be read, is too large, or is not what it should be.
    """
    source = name or str(path)
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        if missing is _REQUIRED:
            raise
        return missing
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the path
        folder = ". Give a file inside it" if isinstance(problem, IsADirectoryError) else ""
        raise error(f"{source}: cannot be read: {getattr(problem, 'strerror', None) or problem}{folder}.") from problem
    return parse_json(content, source, expect=expect, error=error, max_bytes=max_bytes, allow_nan=allow_nan)


def read_small_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a process last said about itself; {} where there is nothing, or nothing that can be read.

    For files that processes replace whole and that nobody writes back from what was read. Files that people may edit are read
    with `read_json`, which distinguishes missing from broken.
    """
    try:
        value: dict[str, Any] = read_json(path, missing={}, allow_nan=True)
    except KitError:
        return {}
    return value


def parse_json(
    content: str | bytes,
    source: str,
    *,
    expect: type | None = dict,
    error: type[KitError] = KitError,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    allow_nan: bool = False,
) -> Any:
    """Read JSON from memory.

    Args:
        content: text, or bytes in UTF-8 or UTF-16, with or without a byte order mark.
        source: what messages call it: the file, or who sent it.
        expect, error, max_bytes, allow_nan: as in `read_json`.
        max_depth: nesting of lists and objects.

    Raises:
        KitError: of the class `error`; the message names source, line and column.
    """
    if len(content) > max_bytes:
        raise error(f"{source}: larger than {max_bytes:,} bytes; a file of this kind is never that large.")
    text = _decode(content, source, error) if isinstance(content, bytes) else content.removeprefix("\ufeff")
    reader = _Reader(text, source, error, allow_nan)
    reader.check_depth(max_depth)
    value = reader.parse()
    if expect is not None and not isinstance(value, expect):
        raise error(f"{source}: holds {kind_of(value)} where {_WORDS.get(expect, expect.__name__)} is expected.")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _WORDS.get(type(value), "a number")


@dataclass
class JsonLines:
    """How far a file of JSON lines has been read, and what could not be.

    Attributes:
        bad: what is wrong with lines that cannot be read, with file and line; empty lines are no error.
        unfinished: the last line has no end: its writer is busy with it, or was killed.
        num_lines, num_bytes: how far the file has been read: its finished lines.
    """

    bad: list[str] = field(default_factory=list)
    unfinished: bool = False
    num_lines: int = 0
    num_bytes: int = 0


def iterate_json_lines(
    path: str | os.PathLike[str],
    *,
    error: type[KitError] = KitError,
    report: JsonLines | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Any]:
    """The objects of a file of JSON lines, one after the other, without holding the file. Bad lines go to `report.bad`.

    Args:
        report: of an earlier reading, to continue where that ended; a new one begins at the beginning.

    Raises:
        FileNotFoundError: there is no such file.
        KitError: of the class `error`; the file cannot be read.
    """
    report = JsonLines() if report is None else report
    report.unfinished = False
    try:
        with open(path, "rb") as file:
            file.seek(report.num_bytes)
            for line in _bounded_lines(file, max_line_bytes):
                if not line.endswith(b"\n"):
                    report.unfinished = True
                    return
                report.num_lines, report.num_bytes = report.num_lines + 1, file.tell()
                if not line.strip():
                    continue
                try:
                    place = f"{path}, line {report.num_lines}"
                    yield parse_json(line.rstrip(), place, max_bytes=max_line_bytes, allow_nan=True)
                except KitError as problem:
                    report.bad.append(str(problem))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as problem:
        folder = ". Give a file inside it" if isinstance(problem, IsADirectoryError) else ""
        raise error(f"{path}: cannot be read: {problem.strerror or problem}{folder}.") from problem


def _bounded_lines(file: Any, most: int) -> Iterator[bytes]:
    """Lines of a binary file; of one that is longer than `most` bytes no more than that is held at a time."""
    while line := file.readline(most + 2):
        rest = line
        while not rest.endswith(b"\n") and len(rest) > most:  # pass over the remainder of a line too long
            rest = file.readline(most + 2)
            line = line[: most + 1] + (b"\n" if rest.endswith(b"\n") else b"")
        yield line


def _decode(content: bytes, source: str, error: type[KitError]) -> str:
    encoding = json.detect_encoding(content)
    try:
        return content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as problem:
        line = content[: problem.start].count(b"\n") + 1
        raise error(
            f"{source}, line {line}: not UTF-8 text ({problem.reason} at byte {problem.start}). Save it as UTF-8."
        ) from problem


class _Reader:
    """One text on its way to a value."""

    def __init__(self, text: str, source: str, error: type[KitError], allow_nan: bool) -> None:
        self.text, self.source, self.error, self.allow_nan = text, source, error, allow_nan

    def parse(self) -> Any:
        try:
            return json.loads(
                self.text,
                parse_int=self._integer if _MANY_DIGITS.search(self.text) else int,  # int: json reads it at C's speed
                parse_float=self._float,
                parse_constant=self._constant,
                object_pairs_hook=self._object,
            )
        except json.JSONDecodeError as problem:
            cure = next((cure for message, cure in _CURES if problem.msg.startswith(message)), "")
            self._refuse(problem.pos, f"not valid JSON: {problem.msg}. {cure}".rstrip(), problem)
        except RecursionError as problem:  # `max_depth` lies near the interpreter's own limit
            raise self.error(f"{self.source}: nested too deeply.") from problem

    def check_depth(self, max_depth: int) -> None:
        """Raises before the parser recurses: what that costs depends on the interpreter."""
        if self.text.count("[") + self.text.count("{") <= max_depth:
            return
        depth = 0
        for token in _TOKEN.finditer(self.text):
            first = token[0][0]
            depth += (first in "[{") - (first in "]}")
            if depth > max_depth:
                self._refuse(token.start(), f"nested more than {max_depth} deep")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Raises where a name stands twice: which value counts depends on who reads the file."""
        found = dict(pairs)
        if len(found) != len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            self._refuse(
                self._find_last(name), f"{_shortened(name)!r} appears twice in one object; keep one of the two"
            )
        return found

    def _integer(self, digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
            self._refuse(self._find(digits), f"a whole number of {len(digits.lstrip('-')):,} digits")
        return int(digits)

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value) and not self.allow_nan:
            self._refuse(
                self._find(digits), f"{_shortened(digits)} is larger than any number that can be computed with"
            )
        return value

    def _constant(self, name: str) -> float:
        if not self.allow_nan:
            self._refuse(self._find(name), f"{name} is not a number")
        return float(name)

    def _find(self, wanted: str) -> int:
        """The position of a number; the same digits inside a string do not count."""
        return next((token.start() for token in _TOKEN.finditer(self.text) if token[0] == wanted), 0)

    def _find_last(self, name: str) -> int:
        """Where a name stands for the last time."""
        places = (token.start() for token in _TOKEN.finditer(self.text) if token[0].strip('"') == name)
        return max(places, default=0)

    def _refuse(self, place: int, what: str, cause: Exception | None = None) -> NoReturn:
        line = self.text.count("\n", 0, place) + 1
        column = place - self.text.rfind("\n", 0, place)
        end = "" if what.endswith((".", "?")) else "."
        raise self.error(f"{self.source}, line {line}, column {column}: {what}{end}") from cause


def _shortened(digits: str) -> str:
    return digits if len(digits) <= 30 else f"{digits[:12]}…"
