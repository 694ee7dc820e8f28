"""Tables of captions: rows of an image's name and its caption.

`read_table` reads any table that a person names. `FolderTable` is one that lies in a dataset's folder under the name
that a tool gives it: Hugging Face's `metadata.jsonl` and `metadata.csv` (imagefolder), and kohya's `meta_cap.json`
and `meta_lat.json`. Names in it start at its own folder.
"""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from everydream_kit.data.textfiles import TextError, require_text
from everydream_kit.errors import DataError
from everydream_kit.strict_json import parse_json

FOLDER_TABLES = ("metadata.jsonl", "metadata.csv", "meta_lat.json", "meta_cap.json")
"""In the order in which they are asked."""
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
UNREAD_TABLE = "metadata.parquet"
MOST_BAD_ROWS = 3
"""Of a table that are named."""

MAX_TABLE_BYTES = 256 << 20
"""A million images with long captions."""
_NAME_COLUMNS = ("image", "file_name", "filename", "file", "path", "name")
_CAPTION_COLUMNS = ("caption", "text", "prompt", "description")


class UnreadTableError(DataError):
    """A table, or a line of it, that cannot be read: which captions it holds is not known."""


def read_table(table: Path) -> list[tuple[str, str]]:
    """Image names and captions of a table.

    Raises:
        DataError: it cannot be read, the columns are not there, or a row lacks one of them.
    """
    pairs: list[tuple[str, str]] = []
    bad: list[str] = []
    for number, row, name, caption in _rows(table, bad):
        if bad:
            break
        if not isinstance(name, str) or not isinstance(caption, str) or not name:
            raise DataError(f"{table}: row {number} has no image name or no caption: {row!r}.")
        pairs.append((name, " ".join(caption.split())))
    if bad:
        raise DataError(f"{table}: cannot be read as a table of captions ({bad[0]}).")
    return pairs


class FolderTable:
    """The captions of a folder's table, asked by image.

    Attributes:
        path: of the table.
        num_rows: rows with a name and a caption.
        unread: what of it cannot be read, or an empty text. Images without a caption may have theirs there.
    """

    def __init__(self, path: str) -> None:
        """
        Raises:
            DataError: the table has no row, or no such columns.
        """
        self.path = path
        self._folder = os.path.dirname(path)
        self._captions: dict[str, str] = {}
        self._used: set[str] = set()
        self._bare_names: set[str] = set()
        bad: list[str] = []
        try:
            for number, _, name, caption in _rows(Path(path), bad):
                if isinstance(name, str) and isinstance(caption, str) and name:
                    self._add(table_key(name), " ".join(caption.split()), f"row {number}", bad)
        except UnreadTableError as error:
            bad.append(str(error).removeprefix(f"{path}: ").rstrip("."))
        more = f" and {len(bad) - MOST_BAD_ROWS} more" if len(bad) > MOST_BAD_ROWS else ""
        self.unread = "; ".join(bad[:MOST_BAD_ROWS]) + more
        self._by_stem = {os.path.splitext(key)[0]: key for key in self._captions}
        self.num_rows = len(self._captions)

    def _add(self, key: str, caption: str, row: str, bad: list[str]) -> None:
        try:
            self._captions[key] = require_text(caption)
        except TextError as error:
            bad.append(f"{row}: its caption {error}")

    def caption_of(self, image: str) -> str | None:
        """The caption of an image by its absolute path, or None. As with caption files, the extension may be another:
        kohya's scripts name images without, and a copy may have been saved in another format."""
        inside = table_key(os.path.relpath(image, self._folder))
        self._bare_names.update((bare := inside.rpartition("/")[2], os.path.splitext(bare)[0]))
        names = (inside, table_key(image), self._by_stem.get(os.path.splitext(inside)[0], ""))
        key = next((name for name in names if name in self._captions), None)
        if key is None:
            return None
        self._used.add(key)
        return self._captions[key]

    @property
    def num_unused(self) -> int:
        """Rows that no image asked for so far."""
        return self.num_rows - len(self._used)

    @property
    def has_bare_names(self) -> bool:
        """Whether a row that no image asked for has the bare name of one."""
        return any(key.rpartition("/")[2] in self._bare_names for key in self._captions.keys() - self._used)


def listed_caption(image: str, tables: Sequence[FolderTable]) -> str | None:
    """What the tables of a folder and of those above it say of an image; the nearest counts."""
    said = [
        table.caption_of(image) for table in tables
    ]  # each is asked: a row that a nearer table replaces has an image
    return next((caption for caption in said if caption is not None), None)


def unread_table(tables: Sequence[FolderTable]) -> str | None:
    """The nearest table that may hold a caption which cannot be read, or None."""
    return next((table.path for table in tables if table.unread), None)


def captions_cure(table: Path) -> str:
    """How a table's captions come to their images."""
    return (
        f"write its captions next to your images with `everydream tidy captions-from-table {quote(str(table))} FOLDER`."
    )


def table_cure(path: Path) -> str:
    """The same as a sentence to append, for a file that is a table by its name; else nothing."""
    return f" To use a table: {captions_cure(path)}" if path.suffix.lower() in TABLE_SUFFIXES else ""


def table_key(name: str) -> str:
    """What names of a table and of images are compared by."""
    return unicodedata.normalize("NFC", name.replace("\\", "/").removeprefix("./"))


def _rows(table: Path, bad: list[str]) -> Iterator[tuple[int, dict[str, Any], Any, Any]]:
    """Number, row, name and caption of each row; lines that cannot be read go to `bad`."""
    try:
        rows = _parse_rows(table, bad)
    except (OSError, ValueError, csv.Error, DataError) as error:
        raise UnreadTableError(f"{table}: cannot be read as a table of captions ({error}).") from error
    if bad and not rows:
        return
    if not rows:
        raise DataError(f"{table}: has no rows.")
    name, caption = (_column(rows[0], wanted, table) for wanted in (_NAME_COLUMNS, _CAPTION_COLUMNS))
    yield from ((number, row, row.get(name), row.get(caption)) for number, row in enumerate(rows, 1))


def _parse_rows(table: Path, bad: list[str]) -> list[dict[str, Any]]:
    if table.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"larger than {MAX_TABLE_BYTES >> 20} MiB")
    text, suffix = table.read_text(encoding="utf-8-sig"), table.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return list(csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ","))
    if suffix == ".jsonl":
        rows = list(_parse_lines(text, bad))
    else:
        held = parse_json(text, "the table", expect=None, error=DataError, max_bytes=MAX_TABLE_BYTES)
        rows = [{"image": k, "caption": _said(v)} for k, v in held.items()] if isinstance(held, dict) else held
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("a list of objects is expected")
    return rows


def _parse_lines(text: str, bad: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # a caption may hold the other line ends of Unicode
        if line.strip():
            try:
                yield parse_json(line, f"line {number}", error=DataError)
            except DataError as error:
                bad.append(str(error).replace(f"line {number}, line 1, ", f"line {number}, ").rstrip("."))


def _said(value: Any) -> Any:
    """A mapping's caption: the text, or kohya's object with caption, tags or both."""
    if not isinstance(value, dict):
        return value
    parts = [value.get("caption"), value.get("tags")]
    return ", ".join(part for part in parts if isinstance(part, str) and part) if any(parts) else None


def _column(row: dict[str, Any], wanted: tuple[str, ...], table: Path) -> str:
    found = {str(name).strip().lower(): name for name in row}
    for name in wanted:
        if name in found:
            return found[name]
    raise DataError(f"{table}: none of the columns is called {', '.join(wanted)} (found {', '.join(map(str, row))}).")
