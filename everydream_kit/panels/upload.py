"""An upload area that takes files of any size: dropped or chosen, sent in pieces; archives are unpacked by a chore.

Jupyter's own `FileUpload` fails in silence from 10 MB on, the limit of one message. Here the page sends one piece,
waits for the answer, and sends the next; a piece that is lost is sent again. What arrives is kept under another name
until it is whole. `Receiver` is the kernel's side and knows no widgets; `make_drop_zone` ties it to the page
(`assets/drop_zone.js`). Without anywidget there is no drop zone, and the panel says where to put files instead.
"""

from __future__ import annotations

import re
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import traitlets

from everydream_kit.errors import DataError, KitError
from everydream_kit.panels.forecast import PICTURE_SUFFIXES
from everydream_kit.panels.look import read_asset

PIECE_BYTES = 1 << 20
ACCEPTED = PICTURE_SUFFIXES | {".txt", ".caption", ".yaml", ".yml", ".json", ".zip"}


class Receiver:
    """Takes files piece by piece into a folder; a whole file appears at once, an archive waits beside the folder.

    Attributes:
        folder: where files go.
        received: names of the files that have come whole.
        archives: (archive, folder for its content) of those that wait to be unpacked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.received: list[str] = []
        self.archives = self._left_over()
        self._expected: dict[str, int] = {}

    def take(self, content: dict[str, Any], buffers: list[Any]) -> dict[str, Any]:
        """Handle one message of the page; the answer carries `error` where something is wrong."""
        try:
            step = {"begin": self._begin, "piece": self._piece, "end": self._end}[content["kind"]]
            step(content, buffers)
        except (KitError, OSError) as error:
            return {"to": "drop", "error": str(error)}
        return {"to": "drop", "name": content.get("name")}

    def _begin(self, content: dict[str, Any], buffers: list[Any]) -> None:
        name = safe_name(content["name"])
        if Path(name).suffix.lower() not in ACCEPTED:
            raise DataError("not a picture, a caption file or a .zip")
        part = self._part(name)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"")
        self._expected[name] = int(content["size"])

    def _piece(self, content: dict[str, Any], buffers: list[Any]) -> None:
        with self._part(safe_name(content["name"])).open("r+b") as file:
            file.seek(int(content["at"]))  # a piece that is sent again lands where it belongs
            file.write(bytes(buffers[0]))

    def _end(self, content: dict[str, Any], buffers: list[Any]) -> None:
        name = safe_name(content["name"])
        part, target = self._part(name), self.folder / name
        if part.stat().st_size != self._expected.pop(name, -1):
            part.unlink()
            raise DataError("arrived incomplete; send it again")
        if target.suffix.lower() == ".zip":
            arrived = self._arrivals() / f"{secrets.token_hex(4)}-{target.name}"
            part.replace(arrived)
            self.archives.append((arrived, target.with_suffix("")))
        else:
            part.replace(target)
            self.received.append(name)

    def _arrivals(self) -> Path:
        """Beside the dataset, on the same disk, where no scan looks."""
        folder = self.folder.with_name(f".{self.folder.name}-arrivals")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _left_over(self) -> list[tuple[Path, Path]]:
        """Archives that had arrived when the kernel ended."""
        return [
            (path, self.folder / path.name.partition("-")[2].removesuffix(".zip"))
            for path in sorted(self.folder.with_name(f".{self.folder.name}-arrivals").glob("*.zip"))
        ]

    def _part(self, name: str) -> Path:
        path = self.folder / name
        return path.with_name(f".{path.name}.part")


def unpack_upload(archive: Path, target: Path) -> int:
    """Unpack an uploaded archive, safely, as a folder that was not there before. Returns the number of files.

    Raises:
        DataError, DiskSpaceError: as `data.sources.unpack_archive`.
    """
    from everydream_kit.data.sources import unpack_archive

    unpacked = unpack_archive(archive, archive.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = target
    number = 2
    while free.exists():
        free = target.with_name(f"{target.name}-{number}")
        number += 1
    unpacked.replace(free)
    return sum(1 for path in free.rglob("*") if path.is_file())


def count_entries(archive: Path) -> int:
    """Files in a .zip, from its directory; 0 where it cannot be read (unpacking says why)."""
    try:
        with zipfile.ZipFile(archive) as file:
            return sum(not entry.is_dir() for entry in file.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return 0


def safe_name(name: str) -> str:
    """A relative path without anything that leads out of the folder or that file systems refuse.

    Raises:
        DataError: nothing of a name is left.
    """
    parts = [re.sub(r'[<>:"|?*\x00-\x1f]', "_", part).strip(". ") for part in name.replace("\\", "/").split("/")]
    kept = [part for part in parts if part]
    if not kept:
        raise DataError(f"{name!r}: no usable file name")
    return "/".join(kept)


def make_drop_zone(receiver: Receiver, on_done: Callable[[], object]) -> widgets.Widget | None:
    """The upload area, or None without anywidget. `on_done` is called when everything dropped has arrived."""
    kind = _drop_zone_class()
    if kind is None:
        return None
    zone = kind(piece=PIECE_BYTES)

    def take(widget: Any, content: dict[str, Any], buffers: list[Any]) -> None:
        if content.get("kind") == "all":
            on_done()
        elif "kind" in content:
            zone.send(receiver.take(content, buffers))

    zone.on_msg(take)
    return zone


def _drop_zone_class() -> Any:
    try:
        import anywidget
    except ImportError:
        return None
    global _cached  # noqa: PLW0603  one class for all panels: anywidget registers every new one with the page
    if _cached is None:

        class DropZone(anywidget.AnyWidget):
            _esm = read_asset("drop_zone.js")
            _css = read_asset("drop_zone.css")
            piece = traitlets.Int(PIECE_BYTES).tag(sync=True)

        _cached = DropZone
    return _cached


_cached: Any = None
