"""Remembering a scan, so that the second start of an unchanged folder need not read it again.

One `.npz` file for each root holds the columns as they are. A picture is taken from it if the stamp of its files is
the same: size and time of the picture and of everything beside it, and the settings that hold there. If only a
caption changed, the header is still not read again. A file that is damaged or of another version is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from everydream_kit.data.dataset import NUMBERS, Dataset, Defaults, Problem
from everydream_kit.data.headers import Header
from everydream_kit.data.strings import StringColumn

VERSION = 1
"""Of the cache file and of everything that decides what a row holds; raise it when either changes."""

log = logging.getLogger(__name__)


class Remembered:
    """The last scan of a root, asked by picture. Empty if there was none.

    Rows of one folder lie together and are looked up through a table of that folder alone, so it costs little memory.
    """

    def __init__(self, dataset: Dataset | None = None) -> None:
        self._dataset = dataset
        self._remarks: dict[str, list[Problem]] = {}
        self._folders: dict[str, list[int]] = {}  # folder -> rows from .. to
        self._open: tuple[str, dict[str, int]] = ("", {})
        if dataset is None:
            return
        for problem in dataset.problems:
            if not problem.skipped:
                self._remarks.setdefault(problem.path, []).append(problem)
        for row, path in enumerate(dataset.paths):
            self._folders.setdefault(path.rpartition("/")[0], [row, row])[1] = row + 1

    def _row(self, relative: str) -> int | None:
        if self._dataset is None:
            return None
        folder = relative.rpartition("/")[0]
        name, rows = self._open  # one reference: threads may swap it under us
        if name != folder or not rows:
            first, end = self._folders.get(folder, (0, 0))
            rows = {self._dataset.paths[row]: row for row in range(first, end)}
            self._open = (folder, rows)
        return rows.get(relative)

    def find(self, relative: str, stamp: int) -> int | None:
        """The row of a picture whose files are all as they were, or None."""
        row = self._row(relative)
        return row if row is not None and self._dataset.numbers["stamp"][row] == stamp else None

    def header(self, relative: str, file_bytes: int, mtime_ns: int) -> Header | None:
        """The header of a picture whose own file is as it was, or None."""
        row = self._row(relative)
        if row is None:
            return None
        n = self._dataset.numbers
        if n["file_bytes"][row] != file_bytes or n["mtime_ns"][row] != mtime_ns:
            return None
        return Header(int(n["width"][row]), int(n["height"][row]), bool(n["alpha"][row]))

    def rows(self, rows: Sequence[int]) -> Dataset:
        return self._dataset.subset(rows)

    def remarks(self, path: str) -> list[Problem]:
        return self._remarks.get(path, [])


def cache_file(cache_dir: Path, root: str) -> Path:
    """Where the scan of a root is remembered."""
    return cache_dir / f"scan-{hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest()}.npz"


def load_remembered(cache_dir: Path | None, root: str) -> Remembered:
    """The last scan of a root; empty if there is none that can be used."""
    if cache_dir is None:
        return Remembered()
    path = cache_file(cache_dir, root)
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            if meta["version"] != VERSION or meta["root"] != os.fsencode(root).hex():
                return Remembered()
            return Remembered(_from_arrays(meta, file))
    except FileNotFoundError:
        return Remembered()
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s: the remembered scan is damaged and is made anew (%s)", path, error)
        return Remembered()


def _from_arrays(meta: dict, file: np.lib.npyio.NpzFile) -> Dataset:
    numbers = {name: file[f"number_{name}"] for name in NUMBERS}
    dataset = Dataset(
        roots=("",),
        paths=StringColumn(file["path_data"], file["path_ends"]),
        captions=StringColumn(file["caption_data"], file["caption_ends"]),
        numbers=numbers,
        batch_names=tuple(meta["batch_names"]),
        problems=[Problem(**problem) for problem in meta["problems"]],
        defaults=Defaults(),
    )
    if len({len(dataset.captions), len(dataset), *(len(column) for column in numbers.values())}) != 1:
        raise ValueError("columns of different lengths")
    return dataset


def save_remembered(cache_dir: Path, root: str, dataset: Dataset) -> None:
    """Remember the scan of one root, whole or not at all. A folder that cannot be written to only costs the cache."""
    path = cache_file(cache_dir, root)
    meta = {
        "version": VERSION,
        "root": os.fsencode(root).hex(),
        "batch_names": dataset.batch_names,
        "problems": [asdict(problem) for problem in dataset.problems],
    }
    arrays = {f"number_{name}": column for name, column in dataset.numbers.items()}
    arrays |= {"path_data": dataset.paths.data, "path_ends": dataset.paths.ends}
    arrays |= {"caption_data": dataset.captions.data, "caption_ends": dataset.captions.ends}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(part, path)
    except OSError as error:
        log.warning("%s: the scan could not be remembered (%s); the next start reads the folder again", path, error)
        part.unlink(missing_ok=True)
