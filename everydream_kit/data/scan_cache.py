"""Remembering a scan, so that the second start of an unchanged folder need not read it again.

One `.npz` file for each root holds the columns as they are. An image is taken from it if the stamp of its files is
the same: size and time of the image and of everything next to it, and the settings that hold there. If only a
caption changed, the header is still not read again. A file that is damaged or of another version is as good as none.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from everydream_kit.atomic import open_atomic
from everydream_kit.data.dataset import NUMBERS, Dataset, Defaults
from everydream_kit.data.headers import Header
from everydream_kit.data.strings import StringColumn

VERSION = 2
"""Of the cache file and of everything that decides what a row holds; raise it when either changes."""

log = logging.getLogger(__name__)


NEVER = 0
"""Stamp of a row that is to be read again next time."""


class Remembered:
    """The last scan of a root, asked by image. Empty if there was none.

    Attributes:
        stamps: (n,) of the rows.
    """

    def __init__(self, dataset: Dataset | None = None, in_folder_order: bool = True) -> None:
        """
        Args:
            dataset: what was remembered.
            in_folder_order: the images of a folder follow each other, sorted by name, so that bisection finds them without
                a table of all names.
        """
        self._dataset = dataset
        self._folders: dict[str, tuple[int, int]] = {}
        self._everything: dict[str, int] | None = None
        if dataset is None:
            self.stamps = np.empty(0, np.int64)
            return
        self.stamps = dataset.numbers["stamp"]
        if not in_folder_order:
            self._everything = {path: row for row, path in enumerate(dataset.paths)}
            return
        for row, path in enumerate(dataset.paths):
            folder = path[: path.rfind("/") + 1]
            first, _ = self._folders.get(folder, (row, row))
            self._folders[folder] = (first, row + 1)

    def look_up(self, paths: Sequence[str]) -> Mapping[str, int]:
        """Rows by path, of at least those of `paths` that are known; they must be of one folder, and sorted."""
        if self._dataset is None or self._everything is not None:
            return self._everything or {}
        folder = paths[0][: paths[0].rfind("/") + 1]
        if folder not in self._folders:
            return {}
        first, end = self._folders[folder]
        names = self._dataset.paths
        first = bisect.bisect_left(names, paths[0], first, end)
        end = bisect.bisect_right(names, paths[-1], first, end)
        return {names[row]: row for row in range(first, end)}

    def header(self, row: int, file_bytes: int, mtime_ns: int) -> Header | None:
        """The header of an image whose own file is as it was, or None."""
        assert self._dataset is not None  # rows come from look_up
        n = self._dataset.numbers
        if n["file_bytes"][row] != file_bytes or n["mtime_ns"][row] != mtime_ns or n["stamp"][row] == NEVER:
            return None
        return Header(int(n["width"][row]), int(n["height"][row]), bool(n["alpha"][row]))

    def is_all_of(self, dataset: Dataset) -> bool:
        """Whether saving this scan would change nothing."""
        return (
            self._dataset is not None
            and np.array_equal(self._dataset.paths.data, dataset.paths.data)
            and np.array_equal(self.stamps, dataset.numbers["stamp"])
        )

    def rows(self, rows: Sequence[int]) -> Dataset:
        """Some rows as a dataset, without problems: rows that had any are stamped NEVER."""
        assert self._dataset is not None  # rows come from look_up
        return replace(self._dataset.subset(rows), problems=[])


def cache_file(cache_dir: Path, root: str) -> Path:
    """Where the scan of a root is remembered."""
    return cache_dir / f"scan-{hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest()}.npz"


def load_remembered(cache_dir: Path | None, root: str, in_folder_order: bool) -> Remembered:
    """The last scan of a root; empty if there is none that can be used."""
    if cache_dir is None:
        return Remembered()
    path = cache_file(cache_dir, root)
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            if meta["version"] != VERSION or meta["root"] != os.fsencode(root).hex():
                return Remembered()
            return Remembered(_from_arrays(meta, file), in_folder_order)
    except (FileNotFoundError, NotADirectoryError):
        return Remembered()
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s: the cached scan is damaged and is rebuilt (%s)", path, error)
        return Remembered()


def _from_arrays(meta: dict[str, Any], file: np.lib.npyio.NpzFile) -> Dataset:
    numbers = {name: file[f"number_{name}"] for name in NUMBERS}
    dataset = Dataset(
        roots=("",),
        paths=StringColumn(file["path_data"], file["path_ends"]),
        captions=StringColumn(file["caption_data"], file["caption_ends"]),
        numbers=numbers,
        batch_names=tuple(meta["batch_names"]),
        defaults=Defaults(),
    )
    if len({len(dataset.captions), len(dataset), *(len(column) for column in numbers.values())}) != 1:
        raise ValueError("columns of different lengths")
    return dataset


def save_remembered(cache_dir: Path, root: str, dataset: Dataset) -> None:
    """Remember the scan of one root, atomically. A folder that cannot be written to only costs the cache."""
    path = cache_file(cache_dir, root)
    meta = {
        "version": VERSION,
        "root": os.fsencode(root).hex(),
        "batch_names": dataset.batch_names,
    }
    arrays: dict[str, Any] = {f"number_{name}": column for name, column in dataset.numbers.items()}
    arrays |= {"path_data": dataset.paths.data, "path_ends": dataset.paths.ends}
    arrays |= {"caption_data": dataset.captions.data, "caption_ends": dataset.captions.ends}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open_atomic(path, durable=False) as file:  # what is lost costs one more look through the folder
            np.savez(file, **arrays)
    except OSError as error:
        log.warning("%s: the scan could not be cached (%s); the next start reads the folder again", path, error)
