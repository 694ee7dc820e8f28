"""The pictures of a project as a list that can be searched and edited, every change with its undo. No widgets here.

Captions are edited where the data engine reads them: the `.txt` (or `.caption`) beside a picture. A picture whose
caption stands in a `.yaml` or `.json` is shown and not edited, since its tags may carry weights that a line of text
cannot. Settings go into the one-value files of a folder, or into the `.yaml` beside a picture. Nothing is deleted: what
is set aside is moved into a folder beside the dataset, and undo moves it back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from everydream_kit.data.captions import caption_from_file_name
from everydream_kit.data.dataset import Dataset, Problem
from everydream_kit.data.files import scan_dataset
from everydream_kit.errors import DataError

SETTINGS = ("multiply", "cond_dropout", "flip_p", "loss_scale")
"""What can be set for a folder or a picture here."""

_RANGES = {"multiply": (0.0, 1000.0), "cond_dropout": (0.0, 1.0), "flip_p": (0.0, 1.0), "loss_scale": (0.0, 100.0)}
_CAPTION_WORDS = frozenset({"main_prompt", "tags", "caption"})
_RICH_SIDECARS = (".yml", ".yaml", ".json")


@dataclass
class Change:
    """One undoable step: what the touched files held before (None: they were not there), and what was moved."""

    title: str
    before: dict[Path, bytes | None] = field(default_factory=dict)
    moved: list[tuple[Path, Path]] = field(default_factory=list)


class Album:
    """The pictures below a folder, in the data engine's order.

    Attributes:
        root: the dataset folder.
        dataset: the last scan.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.aside = self.root.with_name(f"{self.root.name}-set-aside")
        self._changes: list[Change] = []
        self.reload()

    def reload(self) -> None:
        """Scan again."""
        self.dataset: Dataset = scan_dataset(str(self.root))
        self._texts: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def problems(self) -> list[Problem]:
        return self.dataset.problems

    @property
    def last_change(self) -> str:
        """What undo would take back, or an empty text."""
        return self._changes[-1].title if self._changes else ""

    def path(self, index: int) -> Path:
        return Path(self.dataset.path(index))

    def name(self, index: int) -> str:
        """Path relative to the dataset folder."""
        return str(self.dataset.paths[index])

    def caption(self, index: int) -> str:
        """The caption as it stands in its file, or as the file name gives it."""
        if index not in self._texts:
            path = self.path(index)
            file = caption_file(path)
            rich = rich_caption_file(path)
            if rich is not None:
                self._texts[index] = self.dataset.caption(index).text
            elif file.is_file():
                self._texts[index] = file.read_text(encoding="utf-8-sig", errors="replace").strip()
            else:
                self._texts[index] = caption_from_file_name(path.name).text
        return self._texts[index]

    def locked_by(self, index: int) -> str:
        """Name of the settings file that holds the caption and keeps it from being edited here, or an empty text."""
        rich = rich_caption_file(self.path(index))
        return rich.name if rich is not None else ""

    def search(self, words: str) -> list[int]:
        """Pictures whose caption or path holds every word, and none written as `-word`; without words all pictures."""
        wanted = words.lower().split()
        found = []
        for index in range(len(self)):
            text = f"{self.name(index)} {self.caption(index)}".lower()
            if all((word[1:] not in text) if word[:1] == "-" and word[1:] else word in text for word in wanted):
                found.append(index)
        return found

    def set_caption(self, index: int, text: str) -> None:
        """Write a caption to its file.

        Raises:
            DataError: the caption stands in a settings file.
        """
        self._edit_captions("caption of " + self.name(index), {index: text.strip()})

    def add_tag(self, indices: Sequence[int], tag: str) -> int:
        """Put a tag at the end of captions that do not have it. Returns how many were changed."""
        tag = " ".join(tag.replace(",", " ").split())
        if not tag:
            raise DataError("Type the tag to add.")
        texts = {i: ", ".join([*_parts(self.caption(i)), tag]) for i in indices if tag not in _parts(self.caption(i))}
        self._edit_captions(f"tag {tag!r} on {len(texts)} pictures", texts)
        return len(texts)

    def remove_tag(self, indices: Sequence[int], tag: str) -> int:
        """Take a tag out of captions. Returns how many were changed."""
        tag = " ".join(tag.replace(",", " ").split())
        texts = {
            i: ", ".join(p for p in _parts(self.caption(i)) if p != tag)
            for i in indices
            if tag in _parts(self.caption(i))
        }
        self._edit_captions(f"tag {tag!r} off {len(texts)} pictures", texts)
        return len(texts)

    def count_tags(self, indices: Iterable[int] | None = None, most: int = 24) -> list[tuple[str, int]]:
        """The most frequent tags, with the number of pictures that have them."""
        counts: dict[str, int] = {}
        for index in indices if indices is not None else range(len(self)):
            for part in set(_parts(self.caption(index))):
                counts[part] = counts.get(part, 0) + 1
        return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:most]

    def folders(self) -> list[str]:
        """Folders that hold pictures, relative to the root; the root itself is `.`."""
        return sorted({str(Path(name).parent) for name in self.dataset.paths})

    def set_for_folder(self, folder: str, name: str, value: float | None) -> None:
        """Write a one-value file into a folder; None takes it away."""
        path = self.root / folder / f"{name}.txt"
        change = Change(f"{name} of folder {folder}")
        self._write(change, path, None if value is None else f"{_checked(name, value):g}\n".encode())
        self._finish(change)

    def set_for_pictures(self, indices: Sequence[int], name: str, value: float | None) -> None:
        """Write a setting into the `.yaml` beside each picture, keeping what else is there; None takes it away."""
        change = Change(f"{name} of {len(indices)} pictures")
        for index in indices:
            path = self.path(index).with_suffix(".yaml")
            held = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
            if not isinstance(held, dict):
                raise DataError(f"{path}: is no mapping of settings. Mend it first.")
            held.pop(name, None)
            if value is not None:
                held[name] = _checked(name, value)
            text = yaml.safe_dump(held, allow_unicode=True, sort_keys=False) if held else None
            self._write(change, path, text.encode() if text else None)
        self._finish(change)

    def set_aside(self, paths: Sequence[str | Path]) -> int:
        """Move files, with what speaks about them, out of the dataset. Returns how many were moved."""
        change = Change(f"{len(paths)} files set aside")
        for path in map(Path, paths):
            if not path.is_relative_to(self.root):
                raise DataError(f"{path}: lies outside the dataset folder; it is left where it is.")
            family = [path, *(path.with_suffix(s) for s in (".txt", ".caption", *_RICH_SIDECARS) if s != path.suffix)]
            for member in family:
                if member.is_file():
                    target = self.aside / member.relative_to(self.root)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(member, target)
                    change.moved.append((member, target))
        self._finish(change)
        return sum(1 for source, _ in change.moved if source in set(map(Path, paths)))

    def undo(self) -> str:
        """Take the last change back. Returns what it was, or an empty text where there is none."""
        if not self._changes:
            return ""
        change = self._changes.pop()
        for path, content in change.before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        for source, target in reversed(change.moved):
            shutil.move(target, source)
        self.reload()
        return change.title

    def _edit_captions(self, title: str, texts: dict[int, str]) -> None:
        for index in texts:
            lock = self.locked_by(index)
            if lock:
                raise DataError(f"{self.name(index)}: its caption stands in {lock}, with settings; edit that file.")
        change = Change(title)
        for index, text in texts.items():
            self._write(change, caption_file(self.path(index)), f"{text}\n".encode())
            self._texts[index] = text
        if texts:
            self._changes.append(change)

    def _write(self, change: Change, path: Path, content: bytes | None) -> None:
        change.before[path] = path.read_bytes() if path.is_file() else None
        if content is None:
            path.unlink(missing_ok=True)
            return
        beside = path.with_name(f".{path.name}.part")
        beside.write_bytes(content)
        os.replace(beside, path)

    def _finish(self, change: Change) -> None:
        self._changes.append(change)
        self.reload()


def caption_file(picture: Path) -> Path:
    """The text file that holds, or would hold, a caption: `.caption` if it is there, since it wins, else `.txt`."""
    other = picture.with_suffix(".caption")
    return other if other.is_file() else picture.with_suffix(".txt")


def rich_caption_file(picture: Path) -> Path | None:
    """A settings file beside a picture that says something about its caption, or None."""
    for suffix in _RICH_SIDECARS:
        path = picture.with_suffix(suffix)
        if path.is_file():
            try:
                held = yaml.safe_load(path.read_text("utf-8-sig"))
            except (yaml.YAMLError, UnicodeDecodeError):
                return path
            if isinstance(held, dict) and _CAPTION_WORDS & set(held):
                return path
    return None


def _parts(caption: str) -> list[str]:
    return [part for part in (" ".join(piece.split()) for piece in caption.split(",")) if part]


def _checked(name: str, value: float) -> float:
    low, high = _RANGES[name]
    if not low <= value <= high:
        raise DataError(f"{name}: must be from {low:g} to {high:g} (got {value:g})")
    return value
