"""An upload area that takes files of any size: dropped or chosen, sent in pieces; archives are unpacked by a background task.

Jupyter's own `FileUpload` fails silently from 10 MB on, the limit of one message. Here the page sends several messages of
up to 1 MB before the first answer: small files in bundles, large ones in pieces. A message whose answer is lost is sent
again under its number and is not carried out twice. What arrives is kept under a random name until it is complete.

A file of the same name is never overwritten silently: the page asks once for all of them what to do (`_names`). Nothing is
deleted: a replaced file moves next to the dataset, and `moves` lets undo take the whole upload back.

`Receiver` is the kernel's side and knows no widgets; `make_drop_zone` ties it to the page (`assets/drop_zone.js`).
Without anywidget there is no drop zone, and the panel says where to put files instead.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ipywidgets as widgets

from everydream_kit.atomic import create_temporary, put_in_place, sweep
from everydream_kit.data.image_files import EXTENSIONS
from everydream_kit.errors import DataError, KitError
from everydream_kit.panels.page_widgets import make_page_widget

PIECE_BYTES = 1 << 20
"""Of a message: far below Jupyter's limit of 10 MB."""
KEPT_ANSWERS = 256
"""Numbers of messages whose answers are known still; the page has a handful under way."""
ACCEPTED = {*EXTENSIONS, ".txt", ".caption", ".yaml", ".yml", ".json", ".zip"}
REFUSED = "not an image, a caption file or a .zip"


@dataclass
class Arriving:
    """A large file of which pieces are still missing."""

    name: str
    size: int
    replace: bool
    temporary: Path


class Receiver:
    """Takes files into a folder; a complete file appears at once, an archive waits next to the folder.

    Attributes:
        folder: where files go.
        excluded: where replaced files go, and where undo puts what has arrived.
        received: names of the files that are complete.
        moves: what undo takes back, as (from, to) in order: replaced files, and those that arrived.
        archives: (archive, folder for its content) of those that wait to be unpacked.
    """

    def __init__(self, folder: Path, excluded: Path | None = None) -> None:
        self.folder = folder
        self.excluded = excluded or folder.with_name(f"{folder.name}-excluded")
        self.received: list[str] = []
        self.moves: list[tuple[Path, Path]] = []
        self.archives = self._left_over()
        self._arriving: dict[str, Arriving] = {}
        self._answers: OrderedDict[str, dict[str, Any]] = OrderedDict()
        sweep(folder)
        sweep(self._arrivals_folder)

    def take(self, content: dict[str, Any], buffers: list[Any]) -> dict[str, Any]:
        """Handle one message of the page; the answer carries its number, and `error` where something is wrong."""
        number = str(content.get("number"))
        if number in self._answers:  # it is sent again, since the answer was late or lost
            return self._answers[number]
        answer: dict[str, Any] = {"to": "drop", "number": content.get("number")}
        handle = {
            "names": self._names,
            "bundle": self._bundle,
            "begin": self._begin,
            "piece": self._piece,
            "end": self._end,
        }
        try:
            answer |= handle[content["kind"]](content, buffers) or {}
        except (KitError, OSError) as error:
            answer["error"] = in_words(error)
        self._answers[number] = answer
        if len(self._answers) > KEPT_ANSWERS:
            self._answers.popitem(last=False)
        return answer

    def _names(self, content: dict[str, Any], buffers: list[Any]) -> dict[str, Any]:
        """Which of these files are there already, and what each is called if both are kept.

        An image and its captions have one stem, so they get a new one together.
        """
        safe = {name: path for name in content["names"] if (path := self._accepted(name)) and not _is_archive(path)}
        existing = [name for name, path in safe.items() if (self.folder / path).exists()]
        stems = {_stem(safe[name]) for name in existing}
        free = self._free_stems(stems, {_stem(path) for path in safe.values()})
        keep = {
            name: free[_stem(path)] + PurePosixPath(path).suffix for name, path in safe.items() if _stem(path) in stems
        }
        return {"existing": existing, "keep": keep}

    @staticmethod
    def _accepted(name: str) -> str | None:
        try:
            path = safe_name(name)
        except DataError:
            return None  # its own message reports it when it is sent
        return path if PurePosixPath(path).suffix.lower() in ACCEPTED else None

    def _free_stems(self, stems: set[str], sent: set[str]) -> dict[str, str]:
        """For each, `a-2`, or the first number of which no file is there or comes with this upload."""
        taken = set(sent)
        for parent in {PurePosixPath(stem).parent for stem in stems}:
            taken |= {_stem(str(parent / path.name)) for path in (self.folder / parent).iterdir()}
        return {
            stem: next(free for number in itertools.count(2) if (free := f"{stem}-{number}") not in taken)
            for stem in stems
        }

    def _bundle(self, content: dict[str, Any], buffers: list[Any]) -> dict[str, Any]:
        """Small files, complete in one message. One that cannot be taken does not hold up the others."""
        data, at, errors = memoryview(buffers[0]).cast("B"), 0, {}
        for entry in content["files"]:
            size = int(entry["size"])
            try:
                arriving = self._open(entry)
                arriving.temporary.write_bytes(data[at : at + size])
                self._place(arriving)
            except (KitError, OSError) as error:
                errors[str(entry["name"])] = in_words(error)
            at += size
        return {"errors": errors}

    def _begin(self, content: dict[str, Any], buffers: list[Any]) -> None:
        self._arriving[str(content["id"])] = self._open(content)

    def _piece(self, content: dict[str, Any], buffers: list[Any]) -> None:
        with self._of(content).temporary.open("r+b") as file:
            file.seek(int(content["at"]))  # pieces may overtake each other
            file.write(buffers[0])

    def _end(self, content: dict[str, Any], buffers: list[Any]) -> None:
        arriving = self._of(content)
        del self._arriving[str(content["id"])]
        self._place(arriving)

    def _of(self, content: dict[str, Any]) -> Arriving:
        arriving = self._arriving.get(str(content["id"]))
        if arriving is None:
            raise DataError("the kernel was restarted meanwhile; send it again")
        return arriving

    def _open(self, content: dict[str, Any]) -> Arriving:
        """A temporary file in the folder that it will stand in."""
        name = safe_name(str(content["name"]))
        if Path(name).suffix.lower() not in ACCEPTED:
            raise DataError(REFUSED)
        folder = self._arrivals_folder if _is_archive(name) else (self.folder / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = create_temporary(folder)
        os.close(descriptor)
        return Arriving(name, int(content["size"]), bool(content.get("replace")), temporary)

    def _place(self, arriving: Arriving) -> None:
        """Give a file that has arrived its name; what it replaces moves next to the dataset."""
        try:
            if arriving.temporary.stat().st_size != arriving.size:
                raise DataError("arrived incomplete; send it again")
            if _is_archive(arriving.name):
                archive = arriving.temporary.with_name(f"{secrets.token_hex(4)}-{Path(arriving.name).name}")
                arriving.temporary.replace(archive)
                self.archives.append((archive, (self.folder / arriving.name).with_suffix("")))
                return
            self._name(arriving, self.folder / arriving.name)
        except BaseException:
            arriving.temporary.unlink(missing_ok=True)
            raise

    def _name(self, arriving: Arriving, target: Path) -> None:
        kept = self.place_outside(arriving.name) if arriving.replace and target.is_file() else None
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(target, kept)
        try:
            put_in_place(arriving.temporary, target, replace=False)
        except BaseException:
            if kept is not None:
                shutil.move(kept, target)
            raise
        if kept is not None:
            self.moves.append((target, kept))
        self.moves.append((self.place_outside(arriving.name), target))
        self.received.append(arriving.name)

    def place_outside(self, name: str) -> Path:
        """Where a file can go that has to leave the dataset: a folder of its own, so that no name is taken."""
        return self.excluded / f"upload-{secrets.token_hex(4)}" / name

    @property
    def _arrivals_folder(self) -> Path:
        """Next to the dataset, on the same disk, where no scan looks."""
        return self.folder.with_name(f".{self.folder.name}-arrivals")

    def _left_over(self) -> list[tuple[Path, Path]]:
        """Archives that had arrived when the kernel ended."""
        return [
            (path, self.folder / path.name.partition("-")[2].removesuffix(".zip"))
            for path in sorted(self._arrivals_folder.glob("*.zip"))
        ]


def in_words(error: Exception) -> str:
    """An error as the page shows it behind the file's name."""
    if isinstance(error, FileExistsError):
        return "already exists, and stays as it is"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _is_archive(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() == ".zip"


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def safe_name(name: str) -> str:
    """A relative path without anything that leads out of the folder or that file systems refuse.

    Raises:
        DataError: nothing of a name is left.
    """
    from everydream_kit.data.sources import is_refused_by_windows

    parts = [re.sub(r'[<>:"|?*\x00-\x1f]', "_", part).strip(". ") for part in name.replace("\\", "/").split("/")]
    kept = [f"_{part}" if os.name == "nt" and is_refused_by_windows(part) else part for part in parts if part]
    if not kept:
        raise DataError(f"{name!r}: no usable file name")
    return "/".join(kept)


def make_drop_zone(receiver: Receiver, on_done: Callable[[], object]) -> widgets.Widget | None:
    """The upload area, or None without anywidget. `on_done` is called when everything dropped has arrived."""
    zone = make_page_widget("drop_zone", piece=PIECE_BYTES)
    if zone is None:
        return None

    def take(widget: Any, content: dict[str, Any], buffers: list[Any]) -> None:
        if content.get("kind") == "all":
            on_done()
        elif "kind" in content and "number" in content:
            zone.send(receiver.take(content, buffers))

    zone.on_msg(take)
    return zone
